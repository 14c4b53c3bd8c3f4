"""Whole stages as processes: two ranks equal one, a killed and resumed run equals a straight one
bit for bit, and each stage feeds the next.

The world is toy.py's with two dozen problems a skill, and the model has 0.1M parameters. Verifiers,
sandbox, checkpoints and ranks (gloo, FSDP2) are the real ones. RL trains on the problems that SFT
has seen, so that some rewards differ and there is a gradient at all.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_tiny, run_python
from safetensors.torch import load_file

from lib import checkpoint, prompts
from lib.logs import Logger
from lib.optimizer import make_optimizer
from model import tokenizer_files
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
    # With one round of refills, which all ranks take together.
    "ifrl": dict(data="if_rl", eval_data="if_dev", prompts_per_step=6, max_refill_rounds=1),
    "mathrl": dict(data="math_sft", eval_data="math_dev"),
    "coderl": dict(data="code_sft", eval_data="code_dev"),
    "swerl": dict(data="swe_sft", eval_data="swe_dev", min_prompt_tokens=0),
}


def command(stage, world, out, init_from, **changes):
    """Arguments of one run of a stage in the small world."""
    loop = LOOP if stage == "sft" else {**LOOP, **RL}
    flags = {**loop, **DATA[stage], **changes}
    for name, value in flags.items():
        if name.endswith("data"):
            flags[name] = world / f"{value}.jsonl"
    return [
        f"{stage}.py",
        f"--init_from={init_from}",
        f"--out_dir={out}",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


@pytest.fixture(scope="module")
def reward_model(world, taught, tmp_path_factory):
    """A reward model that all runs of RLHF share, so that their policies can be compared alone."""
    out = tmp_path_factory.mktemp("rm")
    run_python(*command("rlhf", world, out, taught, num_steps=1))
    return out / "rm"


@pytest.fixture(scope="module")
def straight(world, taught, tmp_path_factory, request):
    """A function from a stage to the folder of its uninterrupted run in one process. The run is
    made when a test first asks for it."""
    made = {}

    def run(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(f"straight_{stage}")
            run_python(*command(stage, world, made[stage], taught, **extra(stage, request)))
        return made[stage]

    return run


def extra(stage, request):
    """The flags by which RLHF uses the shared reward model."""
    return {"rm": request.getfixturevalue("reward_model")} if stage == "rlhf" else {}


def metrics(out):
    """The rows of metrics.jsonl without times and memory, which differ from run to run."""
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))})
    return rows


def weights(out):
    return load_file(out / "final" / "model.safetensors")


def without(metrics, names):
    return {name: value for name, value in metrics.items() if name not in names}


def distance(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.mark.slow
@pytest.mark.parametrize("stage", DATA)
def test_two_ranks_equal_one_process(stage, world, taught, straight, tmp_path, request):
    """They are equal up to rounding. Now and then the rounding decides which of two tokens is
    drawn; then the runs part for good, and another seed is tried. Three such seeds in a row are no
    accident."""
    for seed in (0, 1, 2):
        one = straight(stage) if seed == 0 else tmp_path / f"one{seed}"
        two = tmp_path / f"two{seed}"
        if seed:
            run_python(*command(stage, world, one, taught, seed=seed, **extra(stage, request)))
        run_python(*command(stage, world, two, taught, seed=seed, **extra(stage, request)), ranks=2)
        moved = distance(weights(one), load_file(taught / "model.safetensors"))
        error = distance(weights(one), weights(two))
        print(
            f"{stage}, seed {seed}: {STEPS} steps moved weights by up to {moved:.1e}; "
            f"two ranks differ from one by {error:.1e}, tolerance 1e-05"
        )
        off = []
        for a, b in zip(metrics(one), metrics(two), strict=True):
            # A rate of a constraint that nobody was given is null.
            nulls = {name for name in a if a[name] is None}
            assert nulls == {name for name in b if b[name] is None}
            a, b = without(a, nulls), without(b, nulls)
            if a != pytest.approx(b, rel=1e-3, abs=1e-5):
                off.append((a, b))
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
    # AdamW's first steps are as large for a tiny gradient as for a large one.
    print(f"reward model on two ranks: difference {error:.1e}, tolerance 3e-05")
    assert error < 3e-5


@pytest.mark.slow
def test_ranks_refill_uneven_groups_in_step(world, taught, tmp_path):
    """A rank that has its groups takes part in the rounds of the others, so that no rank waits
    for ever."""
    run_python(*command("ifrl", world, tmp_path, taught, num_steps=2, max_refill_rounds=3), ranks=2)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


def run_and_kill(args, out, at_step, ranks=1):
    """Start a run, and kill it with all its ranks the moment metrics.jsonl has a line of that
    step."""
    launch = []
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    process = subprocess.Popen(
        [sys.executable, *launch, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = out / "metrics.jsonl"
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if log.exists() and f'"step": {at_step},' in log.read_text():
            break
        time.sleep(0.005)
    assert process.poll() is None, "ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Ranks and verifiers take a moment to end.
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
    if stage != "sft":
        kept, kept_straight = (out / "rollouts.rank0.jsonl" for out in (tmp_path, one))
        assert kept.read_bytes() == kept_straight.read_bytes()


@pytest.mark.slow
def test_a_run_on_two_ranks_resumes_bit_for_bit_too(world, taught, tmp_path):
    straight_args = command("mathrl", world, tmp_path / "straight", taught)
    args = command("mathrl", world, tmp_path / "killed", taught)
    run_python(*straight_args, ranks=2)
    (tmp_path / "killed").mkdir()
    # The kill reaches the launcher alone. Its ranks have sessions of their own and end with it.
    run_and_kill(args, tmp_path / "killed", at_step=3, ranks=2)
    assert not (tmp_path / "killed" / "final").exists()
    run_python(*args, ranks=2)
    assert distance(weights(tmp_path / "straight"), weights(tmp_path / "killed")) == 0.0
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")


# From one layout to another, as (ranks, --shard); "2 nodes" is a rank on each.
MOVES = [
    ("mathrl", (2, "full"), (1, "full")),
    ("sft", (1, "full"), (2, "full")),
    ("sft", (4, "full"), (2, "full")),
    ("sft", (2, "full"), ("2 nodes", "hybrid")),
]


@pytest.mark.slow
@pytest.mark.parametrize("stage, before, after", MOVES)
def test_a_killed_run_goes_on_on_another_number_of_ranks(
    stage, before, after, world, taught, straight, tmp_path, request
):
    """Weights, optimizer, history and data position move: the later steps are those of the straight
    run in one process, to rounding. Micro-batches of another size change nothing either."""
    ranks, how = before
    args = command(stage, world, tmp_path, taught, shard=how)
    run_and_kill(args, tmp_path, at_step=3, ranks=ranks)
    start = int(checkpoint.step_folders(tmp_path)[-1].removeprefix("step_"))
    assert 0 < start < STEPS and not (tmp_path / "final").exists()
    ranks, how = after
    args = command(stage, world, tmp_path, taught, shard=how, micro_batch_tokens=700)
    if ranks == "2 nodes":
        printed = run_on_two_nodes(args)
    else:
        _, printed, _ = run_python(*args, ranks=ranks)
    assert f"steps {start + 1}..{STEPS}" in printed
    one = straight(stage)
    moved = distance(weights(one), load_file(taught / "model.safetensors"))
    error = distance(weights(one), weights(tmp_path))
    print(
        f"{stage}, {before} -> {after} after step {start}: weights moved by {moved:.1e}, off the "
        f"straight run by {error:.1e}, tolerance 1e-05"
    )
    assert moved > 1e-4 and error < 1e-5
    for a, b in zip(metrics(one), metrics(tmp_path), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def run_on_two_nodes(args):
    """Run a stage with one rank on each of two nodes, as far as torchrun knows. Returns stdout of
    the first."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--master-addr=localhost", f"--master-port={port}"]
    nodes = [
        subprocess.Popen(
            [*launch, f"--node-rank={i}", *map(str, args)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    printed = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    return printed[0][0]


@pytest.mark.slow
def test_math_length_stages_share_the_epoch_filter_s_state(world, taught, tmp_path):
    """Paper 4.5.2 over 24K -> 32K -> 40K: the second length starts in the epoch in which the
    first one stopped, and with its counts. Other data starts afresh."""

    def run(name, init_from, **changes):
        """Run two steps of Math RL; return what it prints."""
        flags = dict(num_steps=2, save_every=2, eval_every=0, **changes)
        _, printed, _ = run_python(*command("mathrl", world, tmp_path / name, init_from, **flags))
        return printed

    def state(name):
        return json.loads((tmp_path / name / "final" / "run.json").read_text())["state"]

    run("s1", taught)
    printed = run("s2", tmp_path / "s1" / "final", max_new_tokens=56)
    before, after = state("s1"), state("s2")
    assert len(before["history"]) == 8
    assert "what it knows of 8 of them" in printed
    assert after["epoch"] == before["epoch"] + 1
    assert before["history"].keys() <= after["history"].keys()
    printed = run("s3", tmp_path / "s1" / "final", data="math_dev")
    assert "what it knows of" not in printed


@pytest.mark.parametrize(
    "state, data, carried",
    [
        (
            {"data": 7, "history": {"3": [1, 8]}, "epoch": 2, "position": 5, "pool": [1]},
            7,
            {"history": {"3": [1, 8]}, "epoch": 2},
        ),
        ({"data": 7, "history": {"3": [1, 8]}, "epoch": 2}, 8, {}),  # the rows are others
        ({"data": 7, "history": {}, "epoch": 2}, 7, {}),
        ({"skipped": 0}, 7, {}),  # SFT keeps no history
    ],
)
def test_history_is_carried_over_for_the_same_rows_only(state, data, carried, tmp_path, capsys):
    """Paper 4.5.2; `data` is the checksum of the rows."""
    (tmp_path / "run.json").write_text(json.dumps({"state": state}))
    assert prompts.load_history(str(tmp_path), data) == carried
    assert ("goes on with what it knows of 1 of them" in capsys.readouterr().out) == bool(carried)
    # A Hugging Face folder has no run.json, and so no history.
    assert prompts.load_history(str(tmp_path / "none"), data) == {}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SystemExit):
        prompts.load_history(str(tmp_path), data)


@pytest.mark.slow
def test_every_stage_takes_two_steps_from_the_checkpoint_of_the_one_before(world, tmp_path):
    """This is the cascade in miniature, from random weights. A finished stage that is started
    again leaves everything as it is."""
    previous = world / "base"
    for stage in DATA:
        out = tmp_path / stage
        args = command(stage, world, out, previous, num_steps=2, save_every=1)
        run_python(*args)
        assert [row["step"] for row in metrics(out)] == [1, 2]
        for line in (out / "metrics.jsonl").read_text().splitlines():
            assert 0.05 < json.loads(line)["memory/rss_gb"] < 10
        expected = {"config.json", "model.safetensors", "run.json"}
        expected |= {"tokenizer.json", "chat_template.jinja"}
        assert expected <= {path.name for path in (out / "final").iterdir()}
        previous = out / "final"

    def result():
        """The weights and the log of the last stage."""
        return (previous / "model.safetensors").read_bytes(), metrics(previous.parent)

    before = result()
    run_python(*args)
    assert result() == before


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
    assert code == 2
    assert message in stderr
    assert stderr.rstrip().endswith("Nothing was trained.")
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_refuses(world, tmp_path):
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, stderr = run_python(*command("sft", world, tmp_path, world / "base"), check=False)
    assert code == 2 and "another run is writing here" in stderr
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--lrr=3", "--group=3", "--num_steps=many"])
def test_flags_that_do_not_exist_are_errors(flag):
    code, _, stderr = run_python("mathrl.py", flag, check=False)
    assert code == 2 and flag[2:].split("=")[0] in stderr


@pytest.mark.exhaustive
def test_the_whole_cascade_goes_on_after_kills_at_random_instants(tmp_path):
    """Six kills, as in bench/kill.log, at other instants."""
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
def tiny_with_tokenizer(world):
    """A random model that brings along the tokenizer's files, as one that was loaded does."""
    model = make_tiny()
    model.tokenizer_files = tokenizer_files(world / "base")
    return model


@pytest.fixture()
def checkpoints(world, tmp_path, capsys):
    """A run folder in which steps 1, 2 and 3 were saved, and the last two checkpoints kept."""
    model = tiny_with_tokenizer(world)
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


def flip_the_last_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "file, damage",
    [
        ("model.safetensors", flip_the_last_bit),
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
    """A run that was killed while saving leaves a folder under a temporary name."""
    shutil.copytree(checkpoints / "step_000003", checkpoints / "step_000004.tmp")
    assert checkpoint.latest_checkpoint(checkpoints).endswith("step_000003")
    shutil.rmtree(checkpoints / "step_000003")
    shutil.rmtree(checkpoints / "step_000002")
    assert checkpoint.latest_checkpoint(checkpoints) == ""
    assert checkpoint.latest_checkpoint(checkpoints / "no_such_run") == ""


@pytest.mark.parametrize("file", ["optim_rank0.pt", "config.json", "tokenizer.json", "run.json"])
def test_a_full_disk_ends_a_save_with_one_sentence_and_the_last_checkpoint_intact(
    file, checkpoints, world, capsys
):
    """The file is a link to /dev/full, which answers every write as a full disk does."""
    before = sorted(os.listdir(checkpoints))
    half = checkpoints / "step_000004.tmp"
    half.mkdir()
    (half / file).symlink_to("/dev/full")
    model = tiny_with_tokenizer(world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()  # makes the optimizer's moments, which have to be written too
    cfg = Config(init_from=str(world / "base"))
    with pytest.raises(SystemExit) as ended:
        checkpoint.save_checkpoint(str(checkpoints), 4, model, optimizer, cfg, {"cursor": 4})
    said = capsys.readouterr().err
    print(said)
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "step_000004 cannot be written" in said
    assert "step_000003 before it is whole" in said
    assert sorted(os.listdir(checkpoints)) == before
    assert checkpoint.latest_checkpoint(checkpoints).endswith("step_000003")


def test_a_disk_may_fill_at_any_byte_of_a_save(world, tmp_path, capsys):
    """A small disk of its own (tmpfs) gets ever more room until a save fits. All saves before end
    with a sentence and leave nothing behind."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        model = tiny_with_tokenizer(world)
        cfg = Config(init_from=str(world / "base"))
        rooms = []  # bytes that were free in the saves that did not fit
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
            assert os.listdir(tmp_path) == ["step_000001"]
            assert checkpoint.latest_checkpoint(tmp_path).endswith("step_000001")
        said = capsys.readouterr().err.splitlines()
        print(
            f"{len(rooms)} sizes of a disk too small, up to {rooms[-1]} bytes:",
            *{line.partition(" cannot")[2] for line in said},
            sep="\n",
        )
        assert len(said) == len(rooms) > 5
        assert all("step_000002 cannot be written" in line for line in said)
        assert checkpoint.latest_checkpoint(tmp_path).endswith("step_000002")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_verifier_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    """A child that the run forked, as it forks verifiers, still lives when the same command
    starts again."""
    start = (
        "import os, sys, time; from lib import checkpoint; checkpoint.lock(sys.argv[1]); "
        "os.fork() or time.sleep(20); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", start, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and lock_is_free(tmp_path)


def test_a_checkpoint_brings_back_optimizer_and_cursor(checkpoints):
    from model import Qwen3

    model = Qwen3.from_pretrained(checkpoints / "step_000003")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    found = checkpoint.load_checkpoint(checkpoints / "step_000003", optimizer, Config())
    assert found == (3, {"cursor": 3})
    assert {int(s["step"]) for s in optimizer.state.values()} == {3}
    assert len(optimizer.state) == len(list(model.parameters()))


def shards_of(whole, count):
    """The shards of FSDP2: torch.chunk, and empty ones where there are fewer rows than ranks."""
    chunks = list(whole.chunk(count))
    return chunks + [whole[:0]] * (count - len(chunks))


def test_shards_are_cut_anew_for_another_number_of_ranks(monkeypatch):
    """All rows of all sizes, from any number of ranks to any other, also where ranks have none."""
    for rows, before, after in itertools.product((1, 2, 5, 8, 12), (1, 2, 3, 4, 7), (1, 2, 3, 8)):
        whole = torch.arange(3 * rows).float().view(rows, 3)
        for index, expected in enumerate(shards_of(whole, after)):
            parameter = torch.nn.Parameter(whole.clone())
            moment = SimpleNamespace(to_local=lambda local=torch.empty_like(expected): local)
            monkeypatch.setattr(torch, "empty_like", lambda p, moment=moment, **_: moment)
            monkeypatch.setattr(checkpoint, "shard_of", lambda p, i=index: (i, after))
            found = checkpoint.own_rows(parameter, shards_of(whole, before)).to_local()
            monkeypatch.undo()
            assert torch.equal(found, expected), (rows, before, after, index)


def test_moments_in_bf16_come_back_too(world, tmp_path):
    """This optimizer counts its steps by an int."""
    cfg = Config(init_from=str(world / "base"), optimizer="adamw_bf16")
    model = tiny_with_tokenizer(world).to(torch.bfloat16)
    optimizer = make_optimizer(model, cfg)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    folder = checkpoint.save_checkpoint(str(tmp_path), 1, model, optimizer, cfg, {})
    again = make_optimizer(model, cfg)
    checkpoint.load_checkpoint(folder, again, cfg)
    for p in model.parameters():
        assert again.state[p]["step"] == optimizer.state[p]["step"] == 1
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(again.state[p][name], optimizer.state[p][name])


def test_the_optimizer_of_an_older_version_is_refused(checkpoints, capsys):
    path = checkpoints / "step_000003" / "run.json"
    run = json.loads(path.read_text())
    del run["shards"]
    path.write_text(json.dumps(run))
    with pytest.raises(SystemExit):
        checkpoint.load_checkpoint(checkpoints / "step_000003", None, Config())
    assert "its optimizer is that of an older version" in capsys.readouterr().err


def test_the_log_is_cut_back_to_the_step_resumed_from(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"'
    )
    logger = Logger(Config(out_dir=str(tmp_path)), 2)
    logger.log(3, {"a": 33})
    assert [row["a"] for row in metrics(tmp_path)] == [1, 2, 33]


def test_final_always_names_the_last_checkpoint(checkpoints):
    for name in ("step_000002", "step_000003"):
        checkpoint.mark_final(str(checkpoints), str(checkpoints / name))
        assert os.readlink(checkpoints / "final") == name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "mathrl"])
def test_the_optimizer_is_what_the_flags_say(stage, world, taught, tmp_path):
    """The log has the learning rate of every step, a checkpoint keeps betas and weight decay, and
    a resumed run takes the values that its own flags say."""
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
    if stage == "sft":
        flags["schedule_steps"] = 8
    else:
        flags["final_lr"] = 0.5
    run_python(*command(stage, world, tmp_path, taught, **flags))
    expected = []
    for step in (1, 2, 3, 4):
        warm_up = min(1.0, step / 2)
        if stage == "sft":
            decay = 0.5 * (1 + math.cos(math.pi * step / 8))
        else:
            decay = 0.5 + 0.5 * (1 - step / 4)
        expected.append(1e-3 * warm_up * decay)
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(expected)
    (group,) = torch.load(tmp_path / "final" / "optim_rank0.pt")["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.7), 0.3)
    assert group["lr"] == pytest.approx(expected[-1])
    flags |= dict(num_steps=5, weight_decay=0.1, beta2=0.6)
    run_python(*command(stage, world, tmp_path, taught, **flags))
    (group,) = torch.load(tmp_path / "final" / "optim_rank0.pt")["param_groups"]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.6), 0.1)


def test_a_stage_that_goes_on_is_not_done(checkpoints, world):
    """After --num_steps was raised, the folder has no `final` until the run ends: the next stage
    may not start, and no link may dangle."""
    checkpoint.mark_final(str(checkpoints), str(checkpoints / "step_000003"))
    model = tiny_with_tokenizer(world)
    optimizer = torch.optim.AdamW(model.parameters())
    cfg = Config(init_from=str(world / "base"))
    checkpoint.save_checkpoint(str(checkpoints), 4, model, optimizer, cfg, {})
    assert not os.path.lexists(checkpoints / "final")


def test_pruning_spares_the_best(checkpoints, world):
    rows = [{"step": 2, "eval": 0.9}, {"step": 3, "eval": 0.1}]
    (checkpoints / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_with_tokenizer(world)
    cfg = Config(init_from=str(world / "base"))
    for step in (4, 5):
        optimizer = torch.optim.AdamW(model.parameters())
        checkpoint.save_checkpoint(str(checkpoints), step, model, optimizer, cfg, {})
    assert checkpoint.step_folders(checkpoints) == ["step_000002", "step_000004", "step_000005"]


def test_a_step_that_was_not_applied_prunes_nothing(checkpoints, world):
    """The weights may be bad since the step before, and the last good ones those before that."""
    model = tiny_with_tokenizer(world)
    cfg = Config(init_from=str(world / "base"))
    before = checkpoint.step_folders(checkpoints)
    for skipped in (1, 2):
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"skipped": skipped}
        checkpoint.save_checkpoint(str(checkpoints), 3 + skipped, model, optimizer, cfg, state)
    assert checkpoint.step_folders(checkpoints) == [*before, "step_000004", "step_000005"]
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save_checkpoint(str(checkpoints), 6, model, optimizer, cfg, {"skipped": 0})
    assert checkpoint.step_folders(checkpoints) == ["step_000005", "step_000006"]
