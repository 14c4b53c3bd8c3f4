"""Guards: whole stages as processes: two ranks = one, a killed and resumed run = a straight one bit
for bit, and each feeds the next.

The world is toy.py's with two dozen problems a skill, the model has 0.1M parameters; verifiers,
sandbox, checkpoints and ranks (gloo, FSDP2) are the real ones. RL is given the problems that SFT
has seen, so that some rewards differ and there is a gradient at all.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, make_tiny, run_python
from safetensors.torch import load_file

from lib import checkpoint
from lib.logs import Logger
from sft import Config

STEPS = 6
LOOP = dict(num_steps=STEPS, save_every=2, eval_every=3, micro_batch_tokens=512, lr=1e-4)
RL = dict(
    prompts_per_step=4,
    group_size=4,
    max_prompt_tokens=256,
    max_new_tokens=48,
    rope_factor=0,
    temperature=1.0,
    top_p=1,
    top_k=0,
    reward_workers=2,
    eval_rows=4,
    sample_every=3,
)
DATA = {
    "sft": dict(
        data="sft_stage2",
        eval_data="sft_stage1",
        samples_per_step=16,
        max_seq_len=512,
        warmup_steps=2,
    ),
    "rlhf": dict(
        data="chat_rl",
        eval_data="chat_dev",
        rm_data="preference",
        rm_eval_data="preference_dev",
        rm_samples_per_step=8,
        rm_lr=1e-3,
    ),
    # each rank has spare prompts of its own
    "ifrl": dict(data="if_rl", eval_data="if_dev", prompts_per_step=12, max_refill_rounds=0),
    "mathrl": dict(data="math_sft", eval_data="math_dev"),
    "coderl": dict(data="code_sft", eval_data="code_dev"),
    "swerl": dict(data="swe_sft", eval_data="swe_dev", min_prompt_tokens=0),
}


def command(stage, world, out, init_from, **changes):
    """Arguments of one run of a stage in the small world."""
    flags = {**LOOP, **(RL if stage != "sft" else {}), **DATA[stage], **changes}
    flags |= {
        name: world / f"{value}.jsonl" for name, value in flags.items() if name.endswith("data")
    }
    return [
        f"{stage}.py",
        f"--init_from={init_from}",
        f"--out_dir={out}",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


@pytest.fixture(scope="module")
def reward_model(world, taught, tmp_path_factory):
    """A reward model to share, so that policies can be compared apart from it."""
    out = tmp_path_factory.mktemp("rm")
    run_python(*command("rlhf", world, out, taught, num_steps=1))
    return out / "rm"


@pytest.fixture(scope="module")
def straight(world, taught, tmp_path_factory, request):
    """{stage: folder} of one-process runs without interruption, each made when it is first asked
    for."""
    made = {}

    def run(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"straight_{stage}")
            run_python(*command(stage, world, made[stage], taught, **extra(stage, request)))
        return made[stage]

    return run


def extra(stage, request):
    return {"rm": request.getfixturevalue("reward_model")} if stage == "rlhf" else {}


def metrics(out):
    """metrics.jsonl without the clock and the memory."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows
    ]


def weights(out):
    return load_file(out / "final" / "model.safetensors")


def distance(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.mark.slow
@pytest.mark.parametrize("stage", DATA)
def test_two_ranks_equal_one_process(stage, world, taught, straight, tmp_path, request):
    """Up to rounding, which decides now and then which of two tokens is drawn: then the runs part
    for good, so another seed is tried. Three seeds in a row that part are no accident."""
    for seed in (0, 1, 2):
        one, two = (
            straight(stage) if seed == 0 else tmp_path / f"one{seed}",
            tmp_path / f"two{seed}",
        )
        if seed:
            run_python(*command(stage, world, one, taught, seed=seed, **extra(stage, request)))
        run_python(*command(stage, world, two, taught, seed=seed, **extra(stage, request)), ranks=2)
        moved, error = (
            distance(weights(one), load_file(taught / "model.safetensors")),
            distance(weights(one), weights(two)),
        )
        print(
            f"{stage}, seed {seed}: {STEPS} steps moved weights by up to {moved:.1e}; two ranks differ from one by {error:.1e}, tolerance 1e-05"
        )
        off = [
            (a, b)
            for a, b in zip(metrics(one), metrics(two), strict=True)
            if a != pytest.approx(b, rel=1e-3, abs=1e-5)
        ]
        if error < 1e-5 and not off:
            break
    assert moved > 1e-4 and error < 1e-5 and not off
    assert any(row["grad_norm"] > 0 for row in metrics(one)), "no gradient: equal for no reason"


@pytest.mark.slow
def test_two_ranks_train_the_same_reward_model(world, taught, reward_model, tmp_path):
    run_python(*command("rlhf", world, tmp_path, taught, num_steps=1), ranks=2)
    error = distance(
        load_file(reward_model / "model.safetensors"),
        load_file(tmp_path / "rm" / "model.safetensors"),
    )
    print(f"reward model on two ranks: difference {error:.1e}, tolerance 1e-05")
    assert error < 1e-5


@pytest.mark.slow
def test_ranks_refill_uneven_groups_in_step(world, taught, tmp_path):
    """A rank that has its groups goes on taking part in the others' rounds: nobody waits for
    ever."""
    run_python(*command("ifrl", world, tmp_path, taught, num_steps=2, max_refill_rounds=3), ranks=2)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


def run_and_kill(args, out, at_step, ranks=1):
    """Start a run and kill it, and all its ranks, the moment metrics.jsonl has a line of that
    step."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    process = subprocess.Popen(
        [sys.executable, *launch, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and f'"step": {at_step},' in (
            out / "metrics.jsonl"
        ).read_text():
            break
        time.sleep(0.005)
    assert process.poll() is None, "ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # ranks and verifiers take a moment to go
    while (out / ".lock").exists() and not lock_is_free(out):
        time.sleep(0.05)


def lock_is_free(out):
    with open(out / ".lock") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            return False


@pytest.mark.slow
@pytest.mark.parametrize("stage", DATA)
def test_a_killed_and_resumed_run_equals_a_straight_one_bit_for_bit(
    stage, world, taught, straight, tmp_path, request
):
    args = command(stage, world, tmp_path, taught, **extra(stage, request))
    run_and_kill(args, tmp_path, at_step=3)
    before = checkpoint.step_folders(tmp_path)
    assert before and not (tmp_path / "final").exists()
    _, stdout, _ = run_python(*args)
    start = int(before[-1].removeprefix("step_"))
    assert f"steps {start + 1}..{STEPS}" in stdout and 0 < start < STEPS, stdout[-500:]
    one = straight(stage)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "final" / name).read_bytes() == (one / "final" / name).read_bytes(), name
    assert metrics(tmp_path) == metrics(one)


@pytest.mark.slow
def test_a_run_on_two_ranks_resumes_bit_for_bit_too(world, taught, tmp_path):
    straight_args, args = (
        command("mathrl", world, tmp_path / name, taught) for name in ("straight", "killed")
    )
    run_python(*straight_args, ranks=2)
    (tmp_path / "killed").mkdir()
    # of the launcher alone: its ranks, in sessions of their own, go with it
    run_and_kill(args, tmp_path / "killed", at_step=3, ranks=2)
    assert not (tmp_path / "killed" / "final").exists()
    run_python(*args, ranks=2)
    assert distance(weights(tmp_path / "straight"), weights(tmp_path / "killed")) == 0.0
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")


@pytest.mark.slow
def test_math_length_stages_share_the_epoch_filter_s_state(world, taught, tmp_path):
    """Paper 4.5.2 over 24K -> 32K -> 40K: the second stage starts in the epoch, and with the counts,
    at which the first stopped; other data starts afresh."""
    args = dict(num_steps=2, save_every=2, eval_every=0)
    run_python(*command("mathrl", world, tmp_path / "s1", taught, **args))
    before = json.loads((tmp_path / "s1" / "final" / "run.json").read_text())["state"]
    _, printed, _ = run_python(
        *command(
            "mathrl", world, tmp_path / "s2", tmp_path / "s1" / "final", **args, max_new_tokens=56
        )
    )
    after = json.loads((tmp_path / "s2" / "final" / "run.json").read_text())["state"]
    assert (
        len(before["history"]) == 8
        and f"what it knows of {len(before['history'])} of them" in printed
    )
    assert (
        after["epoch"] == before["epoch"] + 1
        and before["history"].keys() <= after["history"].keys()
    )
    _, printed, _ = run_python(
        *command(
            "mathrl", world, tmp_path / "s3", tmp_path / "s1" / "final", **args, data="math_dev"
        )
    )
    assert "what it knows of" not in printed


@pytest.mark.parametrize(
    "state, data, carried",
    [
        (
            {"data": 7, "history": {"3": [1, 8]}, "epoch": 2, "position": 5, "pool": [1]},
            7,
            {"history": {"3": [1, 8]}, "epoch": 2},
        ),
        ({"data": 7, "history": {"3": [1, 8]}, "epoch": 2}, 8, {}),  # other rows
        ({"data": 7, "history": {}, "epoch": 2}, 7, {}),
        ({"skipped": 0}, 7, {}),  # SFT keeps no history
    ],
)
def test_history_is_carried_over_for_the_same_rows_only(state, data, carried, tmp_path, capsys):
    """Paper 4.5.2."""
    (tmp_path / "run.json").write_text(json.dumps({"state": state}))
    assert checkpoint.load_history(str(tmp_path), data) == carried
    assert ("goes on with what it knows of 1 of them" in capsys.readouterr().out) == bool(carried)
    # a Hugging Face folder has no run.json
    assert checkpoint.load_history(str(tmp_path / "none"), data) == {}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SystemExit):
        checkpoint.load_history(str(tmp_path), data)


@pytest.mark.slow
def test_every_stage_takes_two_steps_from_the_checkpoint_of_the_one_before(world, tmp_path):
    """The cascade in miniature, from random weights; also a finished stage that is started again
    leaves everything as it is."""
    previous = world / "base"
    for stage in DATA:
        out = tmp_path / stage
        args = command(stage, world, out, previous, num_steps=2, save_every=1)
        run_python(*args)
        assert [row["step"] for row in metrics(out)] == [1, 2] and (
            out / "final" / "config.json"
        ).exists()
        assert all(
            0.05 < json.loads(line)["memory/rss_gb"] < 10
            for line in (out / "metrics.jsonl").read_text().splitlines()
        )
        assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "run.json"} <= {
            p.name for p in (out / "final").iterdir()
        }
        previous = out / "final"
    before = (
        (tmp_path / "swerl" / "final" / "model.safetensors").read_bytes(),
        metrics(tmp_path / "swerl"),
    )
    run_python(*args)
    assert before == (
        (tmp_path / "swerl" / "final" / "model.safetensors").read_bytes(),
        metrics(tmp_path / "swerl"),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "nowhere"}, "--init_from=nowhere: "),
        ({"data": "no_such_file"}, "no_such_file.jsonl: no such file"),
        ({"max_prompt_tokens": 3}, "every prompt is longer than max_prompt_tokens=3"),
    ],
)
def test_what_is_wrong_before_training_is_one_sentence_and_exit_code_2(
    changes, message, world, tmp_path
):
    args = command("mathrl", world, tmp_path, **{"init_from": world / "base", **changes})
    code, _, stderr = run_python(*args, check=False)
    assert (
        code == 2
        and message in stderr
        and stderr.rstrip().endswith("Nothing was trained.")
        and "Traceback" not in stderr
    )


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_refuses(world, tmp_path):
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, stderr = run_python(*command("sft", world, tmp_path, world / "base"), check=False)
    assert (
        code == 2 and "another run is writing here" in stderr and os.listdir(tmp_path) == [".lock"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--lrr=3", "--group=3", "--num_steps=many"])
def test_flags_that_do_not_exist_are_errors(flag):
    code, _, stderr = run_python("mathrl.py", flag, check=False)
    assert code == 2 and flag[2:].split("=")[0] in stderr


@pytest.mark.exhaustive
def test_the_whole_cascade_goes_on_after_kills_at_random_instants(tmp_path):
    """Six of the kills of bench/kill.log, with other instants."""
    _, printed, _ = run_python(
        "tests/kill_harness.py",
        "--kills=6",
        "--seed=1",
        f"--out={tmp_path}/cascade",
        f"--log={tmp_path}/log",
        timeout=3000,
    )
    print(printed)
    assert "6 kills, 1 cascades, every one equal to the undisturbed run bit for bit" in printed


# ---- Checkpoints, without a stage ----------------------------------------------------------------
@pytest.fixture()
def checkpoints(world, tmp_path, capsys):
    """A run folder with checkpoints of steps 1, 2 and 3 of which the last two were kept."""
    model = make_tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    cfg = Config(init_from=str(world / "base"))
    for step in (1, 2, 3):
        model(torch.tensor([[1, 2, 3]])).sum().backward()
        optimizer.step()
        checkpoint.save_checkpoint(str(tmp_path), step, model, optimizer, cfg, {"cursor": step})
    return tmp_path


def test_the_newest_two_checkpoints_are_kept(checkpoints):
    assert checkpoint.step_folders(checkpoints) == ["step_000002", "step_000003"]
    assert checkpoint.latest_checkpoint(checkpoints).endswith("step_000003")


@pytest.mark.parametrize(
    "file, damage",
    [
        (
            "model.safetensors",
            lambda path: path.write_bytes(
                path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
            ),
        ),
        ("optim_rank0.pt", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("tokenizer.json", lambda path: path.unlink()),
        ("run.json", lambda path: path.write_text("{")),
        ("run.json", lambda path: path.write_text("[]")),
        ("run.json", lambda path: path.write_text('{"files": 1}')),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_one_line(file, damage, checkpoints, capsys):
    damage(checkpoints / "step_000003" / file)
    assert checkpoint.latest_checkpoint(checkpoints).endswith("step_000002")
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 and "step_000003 is damaged" in out[0]


def test_half_a_checkpoint_does_not_count(checkpoints):
    """What a run that was killed while saving leaves behind."""
    shutil.copytree(checkpoints / "step_000003", checkpoints / "step_000004.tmp")
    assert checkpoint.latest_checkpoint(checkpoints).endswith("step_000003")
    shutil.rmtree(checkpoints / "step_000003")
    shutil.rmtree(checkpoints / "step_000002")
    assert (
        checkpoint.latest_checkpoint(checkpoints)
        == ""
        == checkpoint.latest_checkpoint(checkpoints / "no_such_run")
    )


@pytest.mark.parametrize("file", ["optim_rank0.pt", "config.json", "tokenizer.json", "run.json"])
def test_a_full_disk_ends_a_save_with_one_sentence_and_the_last_checkpoint_intact(
    file, checkpoints, world, capsys
):
    """/dev/full answers every write as a full disk does."""
    half, before = checkpoints / "step_000004.tmp", sorted(os.listdir(checkpoints))
    half.mkdir()
    (half / file).symlink_to("/dev/full")
    model = make_tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()  # its moments, too, have to be written
    with pytest.raises(SystemExit) as ended:
        checkpoint.save_checkpoint(
            str(checkpoints),
            4,
            model,
            optimizer,
            Config(init_from=str(world / "base")),
            {"cursor": 4},
        )
    said = capsys.readouterr().err
    print(said)
    assert (
        ended.value.code == 2
        and said.count("\n") == 1
        and "step_000004 cannot be written" in said
        and "checkpoint before it is whole" in said
    )
    assert sorted(os.listdir(checkpoints)) == before and checkpoint.latest_checkpoint(
        checkpoints
    ).endswith("step_000003")


def test_a_disk_may_fill_at_any_byte_of_a_save(world, tmp_path, capsys):
    """A disk of its own (tmpfs) with ever more room, until a save fits: all the ones before end
    in a sentence and leave nothing."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        model, cfg, rooms = make_tiny(), Config(init_from=str(world / "base")), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.tensor([[1, 2, 3]])).sum().backward()
        optimizer.step()
        checkpoint.save_checkpoint(str(tmp_path), 1, model, optimizer, cfg, {"cursor": 1})

        def free():
            return shutil.disk_usage(tmp_path).free

        for room in range(0, 2 << 20, 32 << 10):
            (tmp_path / "filler").write_bytes(bytes(free() - room))
            with contextlib.suppress(SystemExit):
                checkpoint.save_checkpoint(str(tmp_path), 2, model, optimizer, cfg, {"cursor": 2})
                break
            (tmp_path / "filler").unlink()
            rooms.append(room)
            assert sorted(os.listdir(tmp_path)) == ["step_000001"] and checkpoint.latest_checkpoint(
                tmp_path
            ).endswith("step_000001")
        said = capsys.readouterr().err.splitlines()
        print(
            f"{len(rooms)} sizes of a disk too small, up to {rooms[-1]} bytes:",
            *{line.partition(" cannot")[2] for line in said},
            sep="\n",
        )
        assert len(said) == len(rooms) > 5 and all(
            "step_000002 cannot be written" in line for line in said
        )
        assert checkpoint.latest_checkpoint(tmp_path).endswith("step_000002")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_verifier_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    """A child forked by the run, as verifiers are, still lives when the same command starts
    again."""
    start = "import checkpoint, os, sys, time; checkpoint.lock(sys.argv[1]); os.fork() or time.sleep(20); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", start, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and lock_is_free(tmp_path)


def test_a_checkpoint_brings_back_optimizer_and_cursor(checkpoints):
    from model import Qwen3

    model = Qwen3.from_pretrained(checkpoints / "step_000003")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert checkpoint.load_checkpoint(checkpoints / "step_000003", optimizer, Config()) == (
        3,
        {"cursor": 3},
    )
    assert {int(s["step"]) for s in optimizer.state.values()} == {3} and len(
        optimizer.state
    ) == len(list(model.parameters()))


def test_another_number_of_ranks_is_refused(checkpoints, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        checkpoint.load_checkpoint(checkpoints / "step_000003", None, Config())
    assert "written by 1 ranks" in capsys.readouterr().err


def test_the_log_is_cut_back_to_the_step_resumed_from(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"'
    )
    logger = Logger(str(tmp_path), 2)
    logger.log(3, {"a": 33})
    assert [row["a"] for row in metrics(tmp_path)] == [1, 2, 33]


def test_final_always_names_the_last_checkpoint(checkpoints):
    for name in ("step_000002", "step_000003"):
        checkpoint.mark_final(str(checkpoints), str(checkpoints / name))
        assert os.readlink(checkpoints / "final") == name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "mathrl"])
def test_the_optimizer_is_what_the_flags_say(stage, world, taught, tmp_path):
    """Rate by rate in the log, betas and weight decay in what a checkpoint keeps; a resumed run
    takes what its flags say then."""
    flags = dict(
        num_steps=4,
        save_every=4,
        eval_every=0,
        lr=1e-3,
        warmup_steps=2,
        beta1=0.8,
        beta2=0.7,
        weight_decay=0.3,
    )
    flags |= dict(schedule_steps=8) if stage == "sft" else dict(final_lr=0.5)
    run_python(*command(stage, world, tmp_path, taught, **flags))
    if stage == "sft":
        expected = [
            1e-3 * min(1.0, s / 2) * 0.5 * (1 + math.cos(math.pi * s / 8)) for s in (1, 2, 3, 4)
        ]
    else:
        expected = [1e-3 * min(1.0, s / 2) * (0.5 + 0.5 * (1 - s / 4)) for s in (1, 2, 3, 4)]
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(expected)
    (group,) = torch.load(tmp_path / "final" / "optim_rank0.pt")["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.7), 0.3) and group[
        "lr"
    ] == pytest.approx(expected[-1])
    run_python(
        *command(
            stage, world, tmp_path, taught, **flags | dict(num_steps=5, weight_decay=0.1, beta2=0.6)
        )
    )
    (group,) = torch.load(tmp_path / "final" / "optim_rank0.pt")["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.6), 0.1)


def test_a_stage_that_goes_on_is_not_done(checkpoints, world):
    """--num_steps was raised: until its end no `final` says that the next stage may start, and
    none dangles."""
    checkpoint.mark_final(str(checkpoints), str(checkpoints / "step_000003"))
    model = make_tiny()
    checkpoint.save_checkpoint(
        str(checkpoints),
        4,
        model,
        torch.optim.AdamW(model.parameters()),
        Config(init_from=str(world / "base")),
        {},
    )
    assert not os.path.lexists(checkpoints / "final")


def test_pruning_spares_the_best(checkpoints, world):
    (checkpoints / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "eval": e}) + "\n" for s, e in ((2, 0.9), (3, 0.1)))
    )
    model = make_tiny()
    for step in (4, 5):
        checkpoint.save_checkpoint(
            str(checkpoints),
            step,
            model,
            torch.optim.AdamW(model.parameters()),
            Config(init_from=str(world / "base")),
            {},
        )
    assert checkpoint.step_folders(checkpoints) == ["step_000002", "step_000004", "step_000005"]
