"""Guards: a fault in the middle of a run ends it in seconds, with a sentence.

The sentence names rank, step and phase. No process is left, and the same command goes on from the
last checkpoint.

Real stages run under torchrun with two ranks (gloo, FSDP2) in the world of conftest.py. DRILL
imports a stage, breaks things at given steps of rank 1, and runs it. The runs of one test share a
folder: each goes on from where the fault before it ended the last one. With -s they print what the
ranks said and how long the end took; tests/test_faults.log is the log of a whole run.
"""

import functools
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_python
from test_stages import command, metrics

from lib import guard

DRILL = """
import json, os, re, signal, sys, time
sys.path.insert(0, ROOT)
faults, out, sys.argv = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:]
import torch
import engine
from verifiers import answers
from lib.common import finish
from lib.flags import parse_config
stage = __import__(sys.argv[0].removesuffix(".py"))
rank, now, healed = int(os.environ.get("RANK", 1)), {"step": 0}, []
rollout, judge, grpo_loss, collate = stage.rollout, stage.judge, stage.grpo_loss, stage.collate
generate, check_parity = engine.TorchEngine.generate, engine.check_parity

def descendants(pid):
    tasks = os.listdir(f"/proc/{pid}/task")
    children = []
    for task in tasks:
        children += map(int, open(f"/proc/{pid}/task/{task}/children").read().split())
    return children + [d for c in children for d in descendants(c)]

def strikes(name):
    hit = rank == 1 and faults.get(str(now["step"])) == name
    if hit and name != "worker":
        open(os.path.join(out, "struck"), "w").close()
    return hit

def noting_rollout(*args):
    now["step"] = args[3]
    with open(os.path.join(out, f"pids_{rank}"), "w") as f:
        print(os.getpid(), *descendants(os.getpid()), file=f)
    return rollout(*args)

def break_generate(self, *args, **kwargs):
    generate(self, *args, **kwargs)
    if strikes("raise"):
        raise ValueError("a row that nobody expected")
    for name in ("KILL", "STOP"):
        if strikes(name):
            os.kill(os.getpid(), getattr(signal, "SIG" + name))
    if strikes("cancel"):  # what a scheduler does
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    if strikes("stuck in C"):  # holds the interpreter lock
        re.match("(a+)+$", "a" * 60 + "b")

def break_collate(*args):
    return time.sleep(600) if strikes("hung rank") else collate(*args)

def break_parity(replica, model):  # a sync that has left garbage behind
    if strikes("garbage"):
        replica.model.model.norm.weight.mul_(1.05)
    return check_parity(replica, model)

def break_judge(*args, **kwargs):
    if strikes("hung reward"):
        while True:
            time.sleep(60)
    if strikes("worker") and not healed:
        healed.append([os.kill(pid, signal.SIGKILL) for pid in descendants(os.getpid())])
        if stage.__name__ == "mathrl":
            assert answers.equal_in_child(r"\\\\frac{1}{2}", "0.5") is True
    return judge(*args, **kwargs)

def break_loss(*args):
    loss = grpo_loss(*args)
    # On both ranks: one rank alone may have nothing to learn from at this step.
    broken = faults.get(str(now["step"]))
    if broken in ("nan", "inf"):
        open(os.path.join(out, "struck"), "w").close()
    if broken == "nan":
        return loss * torch.nan
    if broken == "inf":
        return loss + torch.inf  # the gradient of this one is finite
    return loss

stage.rollout, stage.judge = noting_rollout, break_judge
stage.grpo_loss, stage.collate = break_loss, break_collate
engine.TorchEngine.generate, engine.check_parity = break_generate, break_parity
"""
# DRILL is a module of its own and not part of the script that runs: the guard would name the
# functions of the script as phases.
RUN_DRILL = """
from drill import finish, parse_config, stage
stage.main(parse_config(stage.Config))
finish()
"""
AGAIN = "Run it again: it goes on from the last checkpoint."


GUARDED = """
import os, signal, sys, threading, time
sys.path.insert(0, ROOT)
from lib import guard

def rollout():
    WHAT

def main():
    guard.guard(1.5)
    for step in range(7, 10):
        rollout()

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, code, sentence",
    [
        (
            "raise ValueError('boom, as expected.\\nAnd details.')",
            1,
            "ValueError: boom, as expected",
        ),
        (
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
            143,
            "ended by SIGTERM: another rank had ended, or the job was stopped",
        ),
        (
            "lock = threading.Lock(); lock.acquire(); lock.acquire()",
            1,
            "not done after 1.5 s (--phase_timeout), now in rollout",
        ),
        (
            "print('a line of the log', file=open('/dev/full', 'w'), flush=True)",
            2,
            "the disk is full (OSError: [Errno 28] No space left on device)",
        ),
        ("sys.exit(4)", 4, ""),
        ("time.sleep(1)", 0, ""),  # three steps of a second each: the limit is of one
        # a worker just ends
        (
            (
                "child = os.fork() or time.sleep(9); os.kill(child, 15); "
                "assert os.waitpid(child, 0)[1] == 15"
            ),
            0,
            "",
        ),
    ],
)
def test_the_guard_says_where_a_process_was(what, code, sentence, tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(GUARDED.replace("ROOT", repr(str(ROOT))).replace("WHAT", what))
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "RANK": "3"},
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("stage.py: ")]
    assert (done.returncode, said) == (
        code,
        [f"stage.py: rank 3, step 7, rollout: {sentence}. {AGAIN}"] if sentence else [],
    )


@pytest.mark.parametrize(
    "error, code, sentence, trace",
    [
        (KeyboardInterrupt(), 130, "start: interrupted. Run it again", False),
        (AssertionError(), 1, "start: AssertionError. Run it again", True),
        (KeyError("a"), 1, "start: KeyError: 'a'. Run it again", True),
    ],
)
def test_an_error_without_a_text_has_a_sentence(error, code, sentence, trace, monkeypatch, capfd):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(guard.os, "_exit", end)
    monkeypatch.setattr(guard, "exception_is_reported", threading.Event())
    with pytest.raises(SystemExit) as stop:
        guard.uncaught(type(error), error, None)
    said = capfd.readouterr().err
    assert stop.value.code == code and sentence in said
    assert (type(error).__name__ in said.splitlines()[0]) == trace


FAILS = """
import os, sys, time
sys.path.insert(0, ROOT)
from lib.guard import fail
if os.environ["RANK"] in RANKS:
    fail("--data=none: no such file.")
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["01", "1"])
def test_a_user_error_is_said_once_and_again_below_torchrun_s_traceback(failing, tmp_path):
    script = tmp_path / "mathrl.py"
    script.write_text(FAILS.replace("ROOT", repr(str(ROOT))).replace("RANKS", repr(failing)))
    code, _, said = run_python(script, ranks=2, check=False)
    sentence = "mathrl.py: --data=none: no such file. Nothing was trained."
    lines = said.strip().splitlines()
    assert code != 0 and lines.count(sentence) == 1, said
    last = [i for i, line in enumerate(lines) if sentence in line][-1]
    assert last >= len(lines) - 3, f"{len(lines) - last} lines above the end"


UPDATING = """
import sys, time
sys.path.insert(0, ROOT)
from lib import guard
from lib.progress import progress

def train_step(seconds):
    for second in progress(seconds, "update"):
        time.sleep(second)

def main():
    guard.LEAST_UPDATE_S = 0
    guard.guard(40)
    for step in range(7, 8):
        train_step(SECONDS)

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "seconds, code, sentence",
    [
        ([1, 1, 1, 1], 0, ""),  # every micro-batch is a sign of life
        (
            [1, 30],
            1,
            "stage.py: rank 3, step 7, train_step: not done after 2 s (of the --phase_timeout, "
            f"without a micro-batch more), now in train_step. {AGAIN}",
        ),
    ],
)
def test_an_update_may_not_take_as_long_as_rollouts(seconds, code, sentence, tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(UPDATING.replace("ROOT", repr(str(ROOT))).replace("SECONDS", str(seconds)))
    env = {**os.environ, "RANK": "3"}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, env=env
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("stage.py: ")]
    assert (done.returncode, "".join(said)) == (code, sentence)
    limits = [guard.update_limit(limit_s) for limit_s in (20, 7200, 43200)]
    assert limits == [20, 360, 2160], "short limits of tests hold for all phases"


def test_a_stack_that_changes_while_it_is_read_is_read_again(monkeypatch):
    """Python 3.11 can hand out an object that is no frame; the watch must not end of it."""
    frame, main = sys._getframe(), threading.main_thread().ident
    stacks = [{main: SimpleNamespace(f_back=object())}, {main: frame}]
    with monkeypatch.context() as patch:
        patch.setattr(guard.sys, "_current_frames", lambda: stacks.pop(0))
        frames = guard.main_thread_frames()
    assert not stacks and frames[-1] is frame


def test_check_step_stops_what_is_broken_and_nothing_else(capsys):
    cfg = SimpleNamespace(lr=1.0, max_infra=0.1, engine="torch", top_p=1.0, top_k=0)
    good, state = {"grad_norm": 1.0, "loss": 0.5, "gap": 1e-5, "status/infra": 0.05}, {"skipped": 0}
    nan, inf = float("nan"), float("inf")
    for metrics_, skipped in (
        (good, 0),
        ({"grad_norm": nan, "loss": 1.0}, 1),
        ({"grad_norm": 1.0, "loss": inf}, 2),
        (good, 0),
        (good | {"grad_norm": inf, "gap": nan}, 1),
    ):
        guard.check_step(3, metrics_, state, cfg)
        assert state["skipped"] == metrics_["skipped"] == skipped
    for broken, sentence in (
        ({"gap": 0.06}, "step 3, rollout: the sampler's log-probs are 6.0e-02 a token off"),
        ({"gap": nan}, "nan a token off"),
        (
            {"status/infra": 0.2},
            "step 3, rollout: 20.0% of the rewards are infrastructure failures (--max_infra=0.1)",
        ),
    ):
        with pytest.raises(SystemExit):
            guard.check_step(3, good | broken, {"skipped": 0}, cfg)
        assert sentence in capsys.readouterr().err
    cfg.engine, cfg.top_p = "vllm", 0.9  # its log-probs are of the nine tenths that are left
    guard.check_step(3, good | {"gap": 0.1}, {"skipped": 0}, cfg)
    with pytest.raises(SystemExit):
        guard.check_step(3, good | {"gap": 0.2}, {"skipped": 0}, cfg)


@pytest.fixture()
def drill(world, taught, tmp_path):
    return functools.partial(run_drill, tmp_path, world, taught)


def run_drill(folder, world, taught, faults, stage="mathrl", ranks=2, **flags):
    """One run with faults {step: name} on rank 1.

    Returns the exit code, what the stage said, the steps that were done, and the seconds from the
    last fault until the last process had gone (they all hold the pipes that are read here).
    """
    out, script = folder / stage, folder / "run_drill.py"
    out.mkdir(exist_ok=True)
    (folder / "drill.py").write_text(DRILL.replace("ROOT", repr(str(ROOT))))
    script.write_text(RUN_DRILL)
    flags = {"num_steps": max(faults, default=0) + 2, "save_every": 1, "eval_every": 0} | flags
    code, stdout, stderr = run_python(
        script,
        json.dumps(faults),
        out,
        *command(stage, world, out, taught, **flags),
        ranks=ranks,
        check=False,
    )
    ended = time.time()
    nobody_left(out)
    struck = out / "struck"
    seconds = ended - struck.stat().st_mtime if struck.exists() else 0.0
    struck.unlink(missing_ok=True)
    said = [line for line in stderr.splitlines() if line.startswith(f"{stage}.py: ")]
    steps = [m["step"] for m in metrics(out)] if (out / "metrics.jsonl").exists() else []
    print(
        f"{stage}, {faults}: code {code}, all gone {seconds:.1f} s after the fault, "
        f"steps done {steps}",
        *said,
        sep="\n  ",
    )
    assert (code == 0) == (not said) or "Timeout (" in stderr, stdout[-1000:] + stderr[-3000:]
    return SimpleNamespace(
        code=code, said=said, stdout=stdout, stderr=stderr, seconds=seconds, steps=steps, out=out
    )


def nobody_left(out):
    """Ranks, verifiers and zygotes of the last rollout; they get three seconds to notice."""
    pids = {int(pid) for file in out.glob("pids_*") for pid in file.read_text().split()}
    deadline = time.time() + 3
    while (
        left := [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    ) and time.time() < deadline:
        time.sleep(0.05)
    assert pids and not left, f"still there: {left}"


def said_by(run, rank):
    return [line for line in run.said if f": rank {rank}, " in line]


@pytest.mark.slow
def test_a_rank_that_raises_and_one_that_is_killed_and_a_killed_verifier(drill):
    run = drill({2: "raise"})
    assert said_by(run, 1) == [
        f"mathrl.py: rank 1, step 2, rollout: ValueError: a row that nobody expected. {AGAIN}"
    ]
    assert "Traceback" in run.stderr and run.steps == [1] and run.seconds < 60
    run = drill({2: "worker", 3: "inf", 4: "KILL"})
    assert "steps 2.." in run.stdout and run.steps == [1, 2, 3] and run.seconds < 60
    assert run.said[0].startswith(
        ("mathrl.py: rank 0, step 4, summarize: ", "mathrl.py: rank 0, step 4, rollout: ")
    ), "the rank that is left"
    rows = metrics(run.out)
    assert rows[1]["status/timeout"] == rows[1]["status/infra"] == 0, "the verifier that was killed"
    assert [m["skipped"] for m in rows] == [0, 0, 1] and rows[2]["loss"] is None  # inf


@pytest.mark.slow
def test_an_engine_that_missed_an_update_stops_the_run(drill):
    run = drill({2: "garbage"})
    (culprit,) = said_by(run, 1)
    assert culprit.startswith(
        "mathrl.py: rank 1, step 2, sync: RuntimeError: weight sync 2: the engine's log-probs are "
    ) and run.steps == [1]
    again = drill({}, num_steps=3)
    assert "steps 2..3" in again.stdout and again.steps == [1, 2, 3]


@pytest.mark.exhaustive
def test_hung_ranks_and_rewards_end_and_say_where(drill):
    late = "not done after 20 s (--phase_timeout), now in"
    sentences = {
        "hung reward": f"rank 1, step 2, rollout: {late} collect",
        "hung rank": f"rank 1, step 3, train_step: {late} train_step",
        "STOP": f"rank 0, step 4, summarize: {late} all_reduce",
        "stuck in C": f"rank 0, step 5, summarize: {late} all_reduce",
        "cancel": "rank 1, step 6, rollout: ended by SIGTERM",
    }
    for step, (fault, expected) in enumerate(sentences.items(), 2):
        run = drill({step: fault}, phase_timeout=20)
        assert (
            any(expected in line for line in run.said)
            and run.steps == list(range(1, step))
            and run.seconds < 90
        )
    assert drill({}, num_steps=7).steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.exhaustive
def test_three_steps_without_a_finite_gradient_are_enough(drill):
    run = drill({2: "nan", 3: "inf", 5: "nan", 6: "nan", 7: "nan"})
    assert run.code and [m["skipped"] for m in metrics(run.out)] == [0, 1, 2, 0, 1, 2]
    assert (
        "step 7, train_step: loss (nan) or gradient (nan) was not finite three times in a row"
        in run.said[0]
    )
    again = drill({}, num_steps=8)
    assert "steps 7..8" in again.stdout and again.steps == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.exhaustive
def test_code_rl_outlives_its_zygote_and_one_process_ends_alike(drill):
    run = drill({2: "worker"}, stage="coderl")
    assert run.code == 0 and [m["status/infra"] for m in metrics(run.out)] == [0] * 4
    assert drill({2: "raise"}, ranks=1).said == [
        f"mathrl.py: rank 0, step 2, rollout: ValueError: a row that nobody expected. {AGAIN}"
    ]
    run = drill({3: "hung reward"}, ranks=1, phase_timeout=20)
    assert [line.partition(" (")[0] for line in run.said] == [
        "mathrl.py: rank 0, step 3, rollout: not done after 20 s"
    ]
    run = drill({4: "stuck in C"}, ranks=1, phase_timeout=10)
    assert run.code and "Timeout (0:00:40)!" in run.stderr and "in rollout" in run.stderr, (
        "no sentence here: Python cannot run, but C prints the stack"
    )
