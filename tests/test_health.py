"""Guards: a run that is dead says so, and why; a run that learns is left alone.

Faults are injected where they arise: into the rollouts of a step, its flags, its loss or its
schedule. Stage code then makes the metrics (advantages, summary, gradient of a tiny model), and
lib/health.py reads those. What takes many steps to show is injected into the metrics themselves.
"""

import json
import math
import re

import pytest
import torch
from conftest import ROOT, make_tiny, run_python
from test_grpo import config, random_step
from test_stages import command

import mathrl
from lib.health import SAY_AFTER, Health, findings, is_said
from lib.logs import Logger, summarize

STEPS = 6


# ---- Steps ---------------------------------------------------------------------------------------
def real_step(step, spoil, model, **flags):
    """The metrics of one step of Math RL whose rollouts were spoiled by spoil(step, rollouts)."""
    rollouts = random_step(seed=step)
    for r in rollouts:
        r.row = {"messages": [], "think": True}
        r.text = "<think>a</think>b"
        if r.status != "infra":
            r.status = "ok" if r.reward else "wrong"
    spoil(step, rollouts)
    cfg = config(**flags)
    mathrl.compute_advantages(rollouts, cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    row = summarize(rollouts, {"box": 1.0})
    row |= mathrl.train_step(model, optimizer, rollouts, cfg, torch.device("cpu"), world=1)
    return {"step": step, "lr": cfg.lr, **row}


def all_are(status, reward):
    def spoil(step, rollouts):
        for r in rollouts:
            r.status, r.reward = status, reward

    return spoil


def later(spoil, first=3):
    """The fault begins at a later step: before it, the run learns."""

    def spoil_later(step, rollouts):
        if step >= first:
            spoil(step, rollouts)

    return spoil_later


def cut_off(step, rollouts):
    for r in rollouts:
        r.finish_reason = "length"


def never_closed(step, rollouts):
    for r in rollouts:
        r.text, r.status, r.reward = "<think>a", "no_answer", 0.0


def copies(step, rollouts):
    """All completions of a prompt earn the same, other prompts something else."""
    for r in rollouts:
        r.reward = float(r.group % 2)
        r.status = "ok" if r.reward else "wrong"


def one_is_left(step, rollouts):
    """Of each group all but one are cut off."""
    for i, r in enumerate(rollouts):
        r.finish_reason = "stop" if i % 4 == 0 else "length"
        r.reward, r.status = float(i % 4 == 0), "ok" if i % 4 == 0 else "wrong"


def far_from_the_sampler(step, rollouts):
    for r in rollouts:
        r.sampler_logprobs = [-80.0] * len(r.completion_ids)


def one_token(step, rollouts):
    for r in rollouts:
        r.completion_ids, r.sampler_logprobs = r.completion_ids[-1:], [-1.0]
        r.text = ""


def ten_times_as_long(step, rollouts):
    for r in rollouts:
        r.completion_ids = r.completion_ids[:1] * 20
        r.sampler_logprobs = [-1.0] * 20


def long_then_short(step, rollouts):
    (ten_times_as_long if step <= 10 else one_token)(step, rollouts)


def nothing(step, rollouts):
    pass


# (what is wrong, how the rollouts are spoiled, flags, what the sentence has to say)
OF_A_STEP = [
    ("verifier pays nothing", all_are("wrong", 0.0), {}, "the verifier pays nothing"),
    ("verifier pays everything", all_are("ok", 1.0), {}, "the verifier pays everything"),
    ("all solved at last", later(all_are("ok", 1.0)), {}, "every prompt is solved"),
    ("broken down at last", later(all_are("wrong", 0.0)), {}, "the policy has broken down"),
    ("one status: language", all_are("language", -1.0), {}, "every rollout is language"),
    ("one status: timeout", all_are("timeout", 0.0), {}, "every rollout is timeout"),
    ("one status: crash", all_are("crash", 0.0), {}, "every rollout is crash"),
    ("one status: no answer", all_are("no_answer", 0.0), {}, "does not know the format"),
    ("one status: infra", all_are("infra", math.nan), {}, "the verifier itself fails"),
    ("all truncated, filtered", cut_off, {"overlong_filter": True}, "100% of the completions are"),
    ("all truncated", cut_off, {"overlong_filter": False}, "100% of the completions are cut off"),
    ("no thought closed", never_closed, {}, "closes its thought"),
    ("copies", copies, {}, "copies of each other"),
    ("groups of one", one_is_left, {"overlong_filter": True}, "too few completions of a prompt"),
    ("weights all zero", far_from_the_sampler, {"importance_limit": 2.0}, "--importance_limit=2"),
    ("length collapse", long_then_short, {}, "instead of 20"),
]


@pytest.mark.parametrize(
    ("spoil", "flags", "expected"),
    [fault[1:] for fault in OF_A_STEP],
    ids=[fault[0] for fault in OF_A_STEP],
)
def test_a_fault_of_a_step_is_named(spoil, flags, expected):
    steps = {long_then_short: 16, cut_off: STEPS}.get(spoil, 2 + STEPS)
    model = make_tiny()
    rows = [real_step(step, spoil, model, **flags) for step in range(1, steps + 1)]
    (found,) = findings(rows, {"eval_rows": 64, **flags})
    first, last, sentence = found
    print(f"steps {first} to {last}: {sentence}")
    assert expected in sentence
    assert last == steps


def test_a_loss_that_is_cut_from_the_weights_is_named(monkeypatch):
    monkeypatch.setattr(mathrl, "grpo_loss", lambda logprobs_T, *_: 0.0 * logprobs_T.sum())
    model = make_tiny()
    rows = [real_step(step, nothing, model) for step in range(1, STEPS + 1)]
    ((_, _, sentence),) = findings(rows, {})
    assert "rewards differ, and yet the loss does not depend on the weights" in sentence


def test_steps_that_learn_name_nothing():
    model = make_tiny()
    rows = [real_step(step, nothing, model) for step in range(1, 12)]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert findings(rows, {"eval_rows": 64}) == []


# ---- Faults that take many steps -----------------------------------------------------------------
def healthy(step):
    """A step of a run that learns."""
    row = {"step": step, "reward": 0.3 + step / 200, "len": 900 + step, "trunc": 0.05}
    row |= {"flat": 0.3, "unclosed": 0.05, "entropy": 0.4, "grad_norm": 0.2, "num_tokens": 9e4}
    row |= {"loss": 0.01, "lr": 1e-6, "status/ok": 0.3, "status/wrong": 0.7}
    return row


def sft(step, **changes):
    return {"step": step, "loss": 1.0, "grad_norm": 0.3, "lr": 1e-5, "num_tokens": 9e4, **changes}


def evals_of(values, every=20):
    """The rows of a run with these held-out metrics, one every 20 steps."""
    rows = [healthy(step) for step in range(1, every * len(values) + 1)]
    for i, score in enumerate(values, 1):
        rows[every * i - 1]["eval"] = score
    return rows


LATER = range(30, 60)
OF_A_RUN = [
    ("learning rate", "lr", lambda step: 0.0, "the learning rate is 0"),
    ("entropy to 0", "entropy", lambda step: 0.4 * 0.8 ** (step - 30), "the entropy has fallen"),
    ("entropy to noise", "entropy", lambda step: 0.4 * 1.2 ** (step - 30), "writes noise"),
    ("into the limit", "trunc", lambda step: min(0.05 * (step - 29), 1.0), "cut off (at the beg"),
    ("thoughts stay open", "unclosed", lambda step: 0.97, "97% of the thoughts are never closed"),
    ("lengths", "len", lambda step: 900 * 0.8 ** (step - 29), "tokens instead of 9"),
]


@pytest.mark.parametrize(
    ("name", "values", "expected"), [f[1:] for f in OF_A_RUN], ids=[f[0] for f in OF_A_RUN]
)
def test_a_fault_that_grows_is_named(name, values, expected):
    rows = [healthy(step) for step in range(1, 30)]
    rows += [{**healthy(step), name: values(step)} for step in LATER]
    found = findings(rows, {"eval_rows": 64})
    assert len(found) == 1
    assert expected in found[0][2]
    assert found[0][0] >= 30


def test_a_reward_model_that_scores_all_alike_is_named():
    rows = []
    for step in range(1, 1 + STEPS):
        row = {**healthy(step), "reward/rm_std": 0.0, "grad_norm": 0.0, "flat": 1.0}
        rows.append({**row, "reward": 0.1, "status/ok": 1.0})
    ((_, _, sentence),) = findings(rows, {})
    assert "the reward model scores every answer alike" in sentence


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([sft(step, loss=1.0 if step < 30 else 3.0) for step in range(1, 60)], "training diverges"),
        ([sft(step, grad_norm=0.0, loss=0.0) for step in range(1, 20)], "the loss is 0 or"),
        ([sft(step, lr=0.0) for step in range(1, 20)], "the learning rate is 0"),
    ],
)
def test_faults_of_sft_are_named(rows, expected):
    ((_, _, sentence),) = findings(rows, {})
    assert expected in sentence


@pytest.mark.parametrize(
    ("values", "scale"), [((0.5, 0.7, 0.5, 0.5, 0.5), 1.0), ((2.0, 4.0, 3.0, 3.0, 3.0), 1.0)]
)
def test_held_out_that_falls_while_the_reward_rises_is_named(values, scale):
    rows = evals_of(values) + [healthy(step) for step in range(101, 110)]
    ((first, _, sentence),) = findings(rows, {"eval_rows": 256})
    assert first == 100
    assert "held-out falls while the reward rises: from" in sentence
    assert "go on from step 40" in sentence


@pytest.mark.parametrize(
    "values",
    [
        (0.5, 0.6, 0.7, 0.8, 0.8),
        (0.5, 0.7, 0.68, 0.66, 0.69),  # noise of 256 rows
        (0.5, 0.7, 0.5, 0.7, 0.5),  # not in a row
        (0.7, 0.5, 0.5),  # too few
    ],
)
def test_held_out_that_does_not_fall_names_nothing(values):
    assert findings(evals_of(values), {"eval_rows": 256}) == []


def test_held_out_that_falls_with_the_reward_is_another_fault():
    rows = evals_of((0.5, 0.7, 0.5, 0.5, 0.5, 0.5))
    for row in rows:
        row["reward"] = 0.5
    assert findings(rows, {"eval_rows": 256}) == []


def test_a_single_bad_step_is_no_fault():
    rows = [healthy(step) for step in range(1, 60)]
    for row in rows[20::SAY_AFTER]:
        row |= {"grad_norm": 0.0, "flat": 1.0}
    assert findings(rows, {}) == []


# ---- Real logs -----------------------------------------------------------------------------------
CONSOLE = {"ent": "entropy", "grad": "grad_norm"}


def stages_of_log(path):
    """[rows of a stage] of a committed log of the toy cascade: the numbers of its console lines."""
    stages = []
    for line in path.read_text(errors="replace").splitlines():
        found = re.match(r"step (\d+)/\d+ \| (.*)", line)
        if not found:
            continue
        step = int(found[1])
        if not stages or step <= stages[-1][-1]["step"]:
            stages.append([])
        row = {"step": step}
        for field in found[2].split(" | "):
            name, _, number = field.partition(" ")
            if re.fullmatch(r"-?[\d.]+(e[-+]\d+)?%?", number):
                scale = 0.01 if number.endswith("%") else 1.0
                row[CONSOLE.get(name, name)] = float(number.rstrip("%")) * scale
        stages[-1].append(row)
    return stages


@pytest.mark.parametrize("name", ["seed0", "seed1", "seed2", "control"])
def test_healthy_runs_of_the_toy_name_nothing(name):
    stages = stages_of_log(ROOT / "bench" / "toy" / f"{name}.log")
    assert len(stages) >= 5
    assert sum(map(len, stages)) > 200
    for rows in stages:
        assert findings(rows, {"eval_rows": 150}) == []


def test_a_run_of_the_toy_that_died_is_named():
    """SWE RL with the overlong filter: nobody learns to end, and at last no step has a gradient."""
    (rows,) = stages_of_log(ROOT / "bench" / "toy" / "failed" / "swerl_overlong_filter.log")
    found = findings(rows, {"eval_rows": 150})
    assert found[0][0] > 10
    assert all("of the completions are cut off" in sentence for _, _, sentence in found)
    assert found[-1][1] == 90


# ---- What the run does ---------------------------------------------------------------------------
DEAD = {"grad_norm": 0.0, "loss": 0.0, "flat": 1.0, "trunc": 0.0, "reward": 0.0, "len": 9.0}
DEAD |= {"status/wrong": 1.0, "num_tokens": 90, "lr": 1e-6}


def test_a_dead_run_is_told_and_ends_with_code_3(tmp_path, capsys):
    cfg = mathrl.Config(out_dir=str(tmp_path), max_dead_steps=11)
    logger = Logger(cfg, 0)
    with pytest.raises(SystemExit) as ended:
        for step in range(1, 20):
            logger.log(step, dict(DEAD))
    assert ended.value.code == 3
    said = capsys.readouterr()
    warnings = [line for line in said.out.splitlines() if line.startswith("warning")]
    assert [line.split(":")[1] for line in warnings] == [
        " step 5, for 5 steps in a row",
        " step 10, for 10 steps in a row",
    ]
    (end,) = said.err.splitlines()
    assert "step 11, for 11 steps in a row (--max_dead_steps): no gradient: every rollout is" in end
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 11


def test_a_dead_run_may_go_on_if_the_flag_says_so(tmp_path):
    logger = Logger(mathrl.Config(out_dir=str(tmp_path), max_dead_steps=0), 0)
    for step in range(1, 50):
        logger.log(step, dict(DEAD))


def test_a_resumed_run_counts_anew(tmp_path):
    """Its flags may have changed. What the run was like at its beginning is remembered."""
    cfg = mathrl.Config(out_dir=str(tmp_path), max_dead_steps=11)
    logger = Logger(cfg, 0)
    for step in range(1, 11):
        logger.log(step, dict(DEAD))
    resumed = Logger(cfg, 10)
    for step in range(11, 21):
        resumed.log(step, dict(DEAD))
    assert resumed.health.past.start("len") == 9.0


def test_when_a_fault_is_said():
    assert [steps for steps in range(100) if is_said(steps)] == [5, 10, 20, 40, 80]


def test_health_reads_what_json_leaves():
    """A metric that was not finite is null in the file, and nan in a running step."""
    health = Health(mathrl.Config())
    for row in ({"step": 1, "loss": None, "grad_norm": None, "entropy": None}, {"step": 2}):
        assert health.check(row) == ("", 0)
    assert health.check({"step": 3, "loss": math.nan, "grad_norm": math.inf}) == ("", 0)


@pytest.mark.slow
def test_a_stage_that_cuts_off_every_completion_ends_with_code_3(world, taught, tmp_path):
    flags = {"num_steps": 30, "max_new_tokens": 2, "eval_every": 0, "save_every": 3}
    code, out, err = run_python(
        *command("mathrl", world, tmp_path, taught, max_dead_steps=6, **flags), check=False
    )
    assert code == 3
    assert "warning: step 5, for 5 steps in a row: no gradient: 100% of the completions are" in out
    (end,) = [line for line in err.splitlines() if line.startswith("mathrl.py: ")]
    assert "step 6, for 6 steps in a row" in end
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["entropy"] for row in rows] == [None] * 6
    assert (tmp_path / "step_000003").is_dir()
