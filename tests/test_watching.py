"""Guards: a run can be watched. No minute is silent; what is written is JSON and fits a screen;
every rollout is kept, once, also over a resume.
"""

import json
import math
import re
import sys
import time
from concurrent.futures import Future

import pytest
from conftest import run_python

import evaluate
import lib.progress
import mathrl
from engine import Rollout
from lib import logs, trackers
from lib.common import print0
from lib.progress import break_silence, counted, counting, progress


def config(folder, **changes):
    return mathrl.Config(out_dir=str(folder), num_steps=10, **changes)


def rollouts_of(step, groups=2, size=2, text="x"):
    """The rollouts of a step as a stage has them after the update."""
    made = []
    for group in range(groups):
        row = {"index": 10 * step + group, "messages": [{"role": "user", "content": f"q{group}"}]}
        for sample in range(size):
            r = Rollout(row, group, [1, 2], seed=0, sample=sample)
            r.completion_ids, r.finish_reason, r.text = [3, 4, 5], "stop", f"{text}{sample}"
            r.reward, r.status, r.advantage = float(sample), "ok" if sample else "wrong", 0.7
            made.append(r)
    # A rank samples the longest first, not prompt by prompt.
    return made[::2] + made[1::2]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Silence -------------------------------------------------------------------------------------
@pytest.fixture()
def silent_for(monkeypatch):
    """A function that sets how many seconds ago the last line was printed."""

    def set_seconds(seconds):
        at = {"at": time.monotonic() - seconds}
        monkeypatch.setattr(lib.progress, "last_printed", at)

    return set_seconds


def test_a_minute_of_silence_is_broken_once(silent_for, capsys):
    silent_for(59)
    break_silence("step 7, save_checkpoint", 59)
    assert capsys.readouterr().out == ""
    silent_for(61)
    for _ in range(3):
        break_silence("step 7, save_checkpoint", 61)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert out.endswith(": step 7, save_checkpoint: 61 s so far\n")


def test_a_printed_line_is_no_silence(silent_for, capsys):
    silent_for(61)
    print0("step 1/10")
    break_silence("step 2, rollout", 3)
    assert capsys.readouterr().out == "step 1/10\n"


def test_other_ranks_are_silent(silent_for, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    silent_for(1000)
    break_silence("step 2, rollout", 1000)
    assert capsys.readouterr().out == ""


def test_what_is_done_and_left_is_said(silent_for, capsys, monkeypatch):
    done = []
    with counted(done.append, "rollout", 4) as finished:
        finished("a")
        lib.progress.under_way[-1].began = time.monotonic() - 100
        silent_for(61)
        break_silence("step 7, rollout", 100)
    assert done == ["a"]
    said = capsys.readouterr().out
    assert said.endswith("step 7, rollout: 1.7 min so far, 1 of 4 done, about 5.0 min left\n")
    assert lib.progress.under_way == []


def test_counts_nest_and_end_with_their_block():
    with counting("outer", 3):
        assert list(progress([1, 2], "inner")) == [1, 2]
        assert [count.total for count in lib.progress.under_way] == [3]
        with pytest.raises(ValueError, match="boom"), counting("broken"):
            raise ValueError("boom")
        assert len(lib.progress.under_way) == 1
    unknown = list(progress(iter("ab"), "stream"))
    assert unknown == ["a", "b"]


def test_the_score_so_far_by_hand():
    """Verdicts of 1, 0, 1, 1: mean 0.75, standard deviation 0.433, 1.96 * 0.433 / 2 = 0.424."""
    score = evaluate.ScoreSoFar()
    assert score.describe() == ""
    futures = [Future() for _ in range(4)]
    for future in futures:
        score.add(future)
    score.add(None)  # a hook whose verdicts come at the end
    assert score.describe() == ""
    futures[1].set_result((0, "wrong"))
    futures[0].set_result((1, "ok"))
    futures[2].set_exception(OSError("lost"))
    assert score.describe() == "score so far 0.500 +- 0.693"
    futures[3].set_result(1.0)
    score.add(1.0)
    assert score.describe() == "score so far 0.750 +- 0.424"


def test_the_line_a_minute_has_the_score(silent_for, capsys):
    with counting("evaluation", 4) as count:
        count.add("score so far 0.500 +- 0.693")
        count.add()
        silent_for(61)
        break_silence("start, measure", 61)
    assert "measure: 61 s so far, 2 of 4 done, score so far 0.500 +- 0.693, about" in (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_script_without_a_guard_is_never_silent():
    slow = """
import time
import lib.progress
from lib.guard import never_silent
lib.progress.SILENCE_S = 1
def measure():
    time.sleep(3)
def main():
    never_silent()
    measure()
main()
"""
    _, out, _ = run_python("-c", slow)
    assert re.search(r"measure: [12] s so far", out), out


# ---- The log -------------------------------------------------------------------------------------
def test_metrics_are_json_whatever_a_step_gave(tmp_path):
    logger = logs.Logger(config(tmp_path), 0)
    logger.log(1, {"loss": math.nan, "grad_norm": math.inf, "reward": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=pytest.fail)
    assert (row["loss"], row["grad_norm"], row["reward"]) == (None, None, 0.5)
    assert abs(row["time/unix"] - time.time()) < 60


def test_entropy_without_a_scored_token_is_no_zero(tmp_path):
    """Where no token had a gradient, a mean over such tokens is not 0 but unknown."""
    metrics = {"reward": 1.0, "len": 3.0, "trunc": 0.0, "flat": 1.0, "entropy": 0.0, "gap": 0.0}
    metrics |= {"grad_norm": 0.0, "lr": 1e-6, "time/gen": 1.0, "time/train": 1.0, "num_tokens": 9}
    line = logs.console_line(1, 10, metrics)
    assert " | ent - | gap - | " in line
    logs.Logger(config(tmp_path), 0).log(1, metrics)
    (row,) = lines_of(tmp_path / "metrics.jsonl")
    assert (row["entropy"], row["gap"]) == (None, None)
    metrics |= {"entropy": 0.5, "grad_norm": 0.1, "gap": 1e-6}
    assert " | ent 0.50 | gap 1.0e-06 | " in logs.console_line(1, 10, metrics)


@pytest.mark.parametrize(("kl_coef", "logged"), [(0.001, True), (0.0, False)])
def test_kl_is_logged_where_there_is_a_reference(kl_coef, logged, tmp_path):
    cfg = config(tmp_path)
    cfg.kl_coef = kl_coef
    logs.Logger(cfg, 0).log(1, {"kl": 0.02, "grad_norm": 1.0, "entropy": 1.0})
    (row,) = lines_of(tmp_path / "metrics.jsonl")
    assert ("kl" in row) == logged


def test_the_line_says_what_is_left(tmp_path, monkeypatch, capsys):
    """Ten steps of 30 s: after step 4 two minutes have passed and three are left."""
    now = [1000.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    logger = logs.Logger(config(tmp_path), 0)
    for step in range(1, 5):
        now[0] += 30
        logger.log(step, {"grad_norm": 1.0}, f"step {step}/10")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 4/10 | 2.0 min gone, 3.0 min left"


def test_a_sample_fits_a_screen(capsys):
    (r, *_) = rollouts_of(1)
    r.text = "begin " + "long " * 20000 + "end"
    r.row["messages"][-1]["content"] = "asked " + "x" * 5000
    logs.show_sample(r)
    out = capsys.readouterr().out
    assert len(out) < 24 * 80
    assert "begin" in out and "end'" in out and "characters" in out


# ---- Rollouts of training ------------------------------------------------------------------------
def test_every_rollout_is_kept(tmp_path):
    logger = logs.Logger(config(tmp_path), 0)
    for step in (1, 2):
        logger.log(step, {"grad_norm": 1.0}, rollouts=rollouts_of(step))
    kept = lines_of(tmp_path / "rollouts.rank0.jsonl")
    assert [(r["step"], r["prompt"], r["sample"]) for r in kept] == [
        (step, 10 * step + group, sample)
        for step in (1, 2)
        for group in (0, 1)
        for sample in (0, 1)
    ]
    assert kept[1] == {
        "step": 1,
        "prompt": 10,
        "sample": 1,
        "reward": 1.0,
        "status": "ok",
        "advantage": 0.7,
        "tokens": 3,
        "finish_reason": "stop",
        "text": "x1",
    }
    assert kept[2]["question"] == "q1"


def test_a_reward_that_is_missing_is_null(tmp_path):
    lost = rollouts_of(1)
    lost[0].reward, lost[0].status = math.nan, "infra"
    logs.Logger(config(tmp_path), 0).log(1, {"grad_norm": 1.0}, rollouts=lost)
    assert lines_of(tmp_path / "rollouts.rank0.jsonl")[0]["reward"] is None


@pytest.mark.parametrize("torn", ["", '{"step": 3, "prompt'])
def test_a_resumed_run_keeps_each_rollout_once(torn, tmp_path):
    """A run that was killed in step 3 and goes on from step 1 leaves the file of a straight run."""
    for name, resume in (("straight", False), ("resumed", True)):
        folder = tmp_path / name
        folder.mkdir()
        logger = logs.Logger(config(folder), 0)
        for step in (1, 2):
            logger.log(step, {"grad_norm": 1.0}, rollouts=rollouts_of(step))
        if resume:
            with open(folder / "rollouts.rank0.jsonl", "a") as f:
                f.write(torn)
            logger = logs.Logger(config(folder), 1)
            logger.log(2, {"grad_norm": 1.0}, rollouts=rollouts_of(2))
        logger.log(3, {"grad_norm": 1.0}, rollouts=rollouts_of(3))
    straight, resumed = (
        (tmp_path / name / "rollouts.rank0.jsonl").read_bytes() for name in ("straight", "resumed")
    )
    assert resumed == straight


def test_the_newest_rollouts_stay_within_the_limit(tmp_path):
    limit = 20_000
    logger = logs.Logger(config(tmp_path, keep_rollouts=limit / 1e9), 0)
    for step in range(1, 101):
        logger.log(step, {"grad_norm": 1.0}, rollouts=rollouts_of(step, text="y" * 100))
    files = sorted(tmp_path.glob("rollouts.*"))
    one_step = len(rollouts_of(1)) * 300
    assert sum(path.stat().st_size for path in files) <= limit + one_step
    steps = [row["step"] for path in files for row in lines_of(path)]
    newest = min(steps)
    assert set(steps) == set(range(newest, 101)) and newest > 1
    # Going on from a step that only the older half has leaves nothing of later steps.
    logs.Logger(config(tmp_path, keep_rollouts=limit / 1e9), newest + 1)
    assert {row["step"] for path in files if path.exists() for row in lines_of(path)} == {
        newest,
        newest + 1,
    }


def test_a_run_on_fewer_ranks_cuts_back_the_files_of_all(tmp_path, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setattr(logs, "ranks", lambda rank=rank: (rank, 2))
        logger = logs.Logger(config(tmp_path), 0)
        for step in (1, 2, 3):
            logger.log(step, {"grad_norm": 1.0}, rollouts=rollouts_of(step))
    monkeypatch.setattr(logs, "ranks", lambda: (0, 1))
    logs.Logger(config(tmp_path), 1)
    for rank in (0, 1):
        assert {row["step"] for row in lines_of(tmp_path / f"rollouts.rank{rank}.jsonl")} == {1}


def test_none_are_kept_where_none_are_wanted(tmp_path):
    logger = logs.Logger(config(tmp_path, keep_rollouts=0), 0)
    logger.log(1, {"grad_norm": 1.0}, rollouts=rollouts_of(1))
    assert not list(tmp_path.glob("rollouts*"))


def test_a_run_says_what_it_is_before_its_first_checkpoint(tmp_path):
    logs.Logger(config(tmp_path, lr=3e-6), 0)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["lr"] == 3e-6
    assert run["world"] == 1
    assert isinstance(run["command"], list)


def test_ranks_keep_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "ranks", lambda: (1, 2))
    logs.Logger(config(tmp_path), 0).log(1, {"grad_norm": 1.0}, rollouts=rollouts_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.rank1.jsonl"]


# ---- Colours -------------------------------------------------------------------------------------
def test_a_file_gets_marks_instead_of_colours(tokenizer):
    from model import show_tokens

    ids = tokenizer.encode("What is 1 + 1?").ids
    mask = [i >= 3 for i in range(len(ids))]
    plain = show_tokens(tokenizer, ids, mask, colours=False)
    coloured = show_tokens(tokenizer, ids, mask)
    assert "\033" not in plain
    assert plain.replace("[[", "").replace("]]", "") == "What is 1 + 1?"
    assert plain == coloured.replace("\033[31m", "").replace("\033[32m", "[[").replace(
        "\033[0m", "", 1
    ).replace("\033[0m", "]]")


# ---- Trackers ------------------------------------------------------------------------------------
STAND_IN = """
import json, os
def init(**options):
    save(["init", options["name"], options["config"]["lr"], options["resume"]])
def log(metrics, step):
    if metrics.get("reward") == 0.5:
        raise ConnectionError("no route")
    save(["log", step, metrics])
def finish():
    save(["finish"])
def save(call):
    with open(os.environ["CALLS"], "a") as f:
        f.write(json.dumps(call) + chr(10))
"""


@pytest.fixture()
def calls(tmp_path, monkeypatch):
    """A package named trackio that writes its calls into a file: the path of that file."""
    (tmp_path / "trackio.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(logs, "closers", [])
    yield tmp_path / "calls"
    sys.modules.pop("trackio", None)


def log_steps(folder, steps, resumed_from, report_to="trackio"):
    folder.mkdir(exist_ok=True)
    logger = logs.Logger(config(folder, report_to=report_to), resumed_from)
    for step in steps:
        reward = step / 10
        logger.log(step, {"reward": reward, "status/ok": 0.5, "loss": math.nan, "grad_norm": 1.0})


def test_a_tracker_gets_the_metrics_under_their_names(calls, tmp_path):
    log_steps(tmp_path / "math", [1, 2], 0)
    for close in logs.closers:
        close()
    opened, *logged, closed = lines_of(calls)
    assert opened[0] == "init" and opened[2:] == [2e-6, "allow"]
    assert f"{tmp_path.name}-math-" in opened[1]
    assert [call[1] for call in logged] == [1, 2]
    numbers = logged[1][2]
    assert (numbers["reward"], numbers["status/ok"]) == (0.2, 0.5)
    assert "loss" not in numbers and "memory/rss_gb" in numbers
    assert closed == ["finish"]


def test_a_resumed_run_sends_each_step_once_and_to_the_same_run(calls, tmp_path):
    log_steps(tmp_path / "math", [1, 2, 3], 0)
    log_steps(tmp_path / "math", [2, 3, 4], 1)
    names = {call[1] for call in lines_of(calls) if call[0] == "init"}
    assert len(names) == 1
    assert [call[1] for call in lines_of(calls) if call[0] == "log"] == [1, 2, 3, 4]


def test_a_tracker_that_comes_later_gets_the_steps_before(calls, tmp_path):
    log_steps(tmp_path / "math", [1, 2, 3], 0, report_to="")
    log_steps(tmp_path / "math", [3, 4], 2)
    assert [call[1] for call in lines_of(calls) if call[0] == "log"] == [1, 2, 3, 4]


def test_a_tracker_that_fails_does_not_end_the_run(calls, tmp_path, capsys):
    log_steps(tmp_path / "math", [4, 5, 6], 0)
    assert "--report_to=trackio, step 5: ConnectionError: no route" in capsys.readouterr().out
    assert [row["step"] for row in lines_of(tmp_path / "math" / "metrics.jsonl")] == [4, 5, 6]


@pytest.mark.parametrize(
    ("report_to", "sentence"),
    [
        ("wandbb", "--report_to=wandbb: expected trackio, wandb, tensorboard, joined by commas."),
        ("wandb", "--report_to=wandb: that package is not installed: pip install wandb."),
    ],
)
def test_a_tracker_that_is_not_there_is_one_sentence(report_to, sentence, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        trackers.tracker_names(report_to)
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_tensorboard_reads_what_was_sent(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(logs, "closers", [])
    log_steps(tmp_path / "math", [1, 2], 0, report_to="tensorboard")
    for close in logs.closers:
        close()
    events = EventAccumulator(str(tmp_path / "math" / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("reward")] == [(1, 0.1), (2, 0.2)]
