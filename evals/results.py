"""The results of a run: the stage-by-skill matrix, and the gates between its stages."""

import contextlib
import glob
import itertools
import json
import math
import os

import numpy as np

from evals.benchmarks import BENCHMARKS
from lib.checkpoint import mark_final
from lib.guard import fail

STAGES = ("sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl", "mopd")
TOY = ("chat", "if", "if_hard", "math", "math_hard", "code", "code_hard", "swe", "swe_hard")
# "paper" is how the paper decodes: temperature 0.6, top-p 0.95. It is the headline of the toy. A
# benchmark has it as "sampled", by its own protocol.
DECODINGS = ("paper", "sampled", "greedy")
TASK_ORDER = (*TOY, *BENCHMARKS)

# GATES[stage][task]: the points that a stage may cost a task, beyond the noise of the two scores.
# "*" stands for any stage, and for any task. A pair is a sacrifice: the points, and the stage that
# has to bring them back. The points of successive stages add up; their noise does not.
GATES = {
    # A toy skill may lose more than a benchmark, because all five share a third of a million
    # parameters.
    "*": {"*": 1.0, **dict.fromkeys(TOY, 3.0)},
    # Paper T4: RLHF takes IFEval from 70.8 to 50.1. T5: IF-RL brings it back, to 90.4.
    "rlhf": {
        "ifeval": (25.0, "ifrl"),
        "ifbench": (5.0, "ifrl"),
        # The tensions of the toy world are those of TENSIONS in toy.py.
        "if": (25.0, "ifrl"),
        "if_hard": (20.0, "ifrl"),
    },
    # Paper T5: IF-RL takes MMLU-Pro from 77.8 to 74.5 and ArenaHard from 90.1 to 88.0.
    "ifrl": {"mmlu_pro": 3.0, "chat": 15.0},
    # Paper T6: Math RL takes ArenaHard from 88.0 to 87.0.
    "mathrl": {"chat": 8.0},
    # Paper T8: SWE RL takes LiveCodeBench v5 from 75.3 to 74.3. Its cost for chat is the toy's own.
    "swerl": {"code": 10.0, "code_hard": 10.0, "chat": 5.0},
}


# ---- 1. What a run has measured ------------------------------------------------------------------
def kept_lines(pattern):
    """Yield the rows of the JSONL files that match; a line that was cut off is skipped."""
    for path in sorted(glob.glob(pattern)):
        with open(path) as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


def base_of(stage):
    """Return the stage that a part belongs to: mathrl2 -> mathrl. The parts share its gates.

    A name that no cascade knows keeps its digits: my_idea2 is a stage of its own.
    """
    base = stage.rstrip("0123456789")
    return base if base in STAGES else stage


# Endings of names that are comparisons, not stages (bench/control.sh), e.g. of mathrl_control: what
# the seconds of the stage before the ending were spent on instead
CONTROLS = {
    "_control": "more SFT",
    "_rejection": "SFT on own samples that passed",
}


def is_control(stage):
    """True for mathrl_control, mathrl_rejection and the like."""
    return stage.endswith(tuple(CONTROLS))


def in_stage_order(names):
    """Sort stage names as the cascade runs them; names that no cascade knows come last, as given.

    Controls are left out. Of the parts of a stage the one without a number is the last: coderl1,
    coderl.
    """

    def place(name):
        return STAGES.index(base_of(name)), name == base_of(name), name

    names = [name for name in names if not is_control(name)]
    known = sorted((name for name in names if base_of(name) in STAGES), key=place)
    unknown = [name for name in names if name not in known]
    return known + unknown


def has_results(folder):
    """True if something was evaluated into this run folder."""
    return os.path.isfile(os.path.join(folder, "results.jsonl"))


def read_results(folder, flag):
    """Read results.jsonl of a run folder; without one the process ends with a sentence.

    Returns {(stage, task, mode, decoding): result line} and the stages in their order.
    """
    if not has_results(folder):
        fail(f"--{flag}={folder}: no results.jsonl there.", note="Nothing was read.")
    cells = {}
    for line in kept_lines(glob.escape(os.path.join(folder, "results.jsonl"))):
        # A later line replaces an earlier one: the evaluation was run again.
        cells[line["stage"], line["task"], line["mode"], line["decoding"]] = line
    by_appearance = dict.fromkeys(stage for stage, *_ in cells)
    return cells, in_stage_order(by_appearance)


def columns_of(cells, stages):
    """Return [(task, mode)] that some stage was measured on, in the order of TASK_ORDER.

    Tasks that are not in TASK_ORDER come last, by name.
    """
    present = {(task, mode) for stage, task, mode, _ in cells if stage in stages}

    def place(column):
        task, mode = column
        rank = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
        return rank, task, mode != "think"

    return sorted(present, key=place)


def decodings_of(cells, stages):
    """Return the decodings by which some stage was measured, the headline first."""
    measured = {decoding for stage, _, _, decoding in cells if stage in stages}
    return [decoding for decoding in DECODINGS if decoding in measured]


def interval(scores_PG, weights_PG=None, seed=0, resamples=2000):
    """Return (mean, low, high) of the weighted mean score, with its 95% bootstrap interval.

    P problems with G completions each; whole problems are drawn with replacement.
    """
    scores_PG = np.asarray(scores_PG, dtype=np.float64)
    if weights_PG is None:
        weights_PG = np.ones_like(scores_PG)
    weights_PG = np.asarray(weights_PG, dtype=np.float64)
    sums_P = (scores_PG * weights_PG).sum(axis=1)
    weights_P = weights_PG.sum(axis=1)
    # [resamples, P]: the problems of each resampled set
    draws = np.random.default_rng(seed).integers(0, len(sums_P), (resamples, len(sums_P)))
    means = sums_P[draws].sum(axis=1) / weights_P[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums_P.sum() / weights_P.sum()), float(low), float(high)


def problem_scores(folder, line):
    """Mean score of each problem of a result line [problems], from the samples beside it.

    None if the samples are not there, or not those of the line.
    """
    samples = os.path.join(glob.escape(os.path.join(folder, "samples", line["stage"])), "")
    name = f"{line['task']}_{line['mode']}_{line['decoding']}.rank*.jsonl"
    num_problems, num_samples = line.get("n", 0), line.get("samples", 0)
    sums, counts = np.zeros(num_problems), np.zeros(num_problems)
    seen = set()
    for row in kept_lines(samples + name):
        place = row["problem"], row["sample"]
        # An evaluation with more problems or samples may have left more in the file.
        if row["problem"] >= num_problems or row["sample"] >= num_samples or place in seen:
            continue
        seen.add(place)
        sums[row["problem"]] += row["score"]
        counts[row["problem"]] += 1
    if not num_problems or not counts.all():
        return None
    scores = sums / counts
    return scores if abs(scores.mean() - line["score"]) < 1e-6 else None


def paired_difference(folder, before, after):
    """(mean, low, high) of what `after` scores above `before`, problem by problem, or None.

    The 95% interval resamples problems. Both lines answer the same ones, so that it is narrower
    than the two intervals beside each other tell.
    """
    scores_before, scores_after = problem_scores(folder, before), problem_scores(folder, after)
    if scores_before is None or scores_after is None or len(scores_before) != len(scores_after):
        return None
    return interval((scores_after - scores_before)[:, None])


def own_skill_rows(cells, stages, decoding, own):
    """Yield (stage, task, mode, line before, line after, {name of CONTROLS: its line}).

    One row for the skill that a stage teaches, and one for its hard problems where they were
    measured. A control that was not run is missing.
    """
    taught = [stage for stage in stages if stage == "sft" or stage in own]
    for before, after in itertools.pairwise(taught):
        # IF-RL samples without thinking.
        mode = "no_think" if after == "ifrl" else "think"
        for task in (own[after], f"{own[after]}_hard"):
            line_before = cells.get((before, task, mode, decoding))
            line_after = cells.get((after, task, mode, decoding))
            if not line_before or not line_after:
                continue
            controls = {}
            for ending, name in CONTROLS.items():
                control = cells.get((after + ending, task, mode, decoding))
                if control:
                    controls[name] = control
            yield after, task, mode, line_before, line_after, controls


# ---- 2. Gates ------------------------------------------------------------------------------------
def cost_of(stage, task):
    """Return the points that a stage may cost a task, and the stage that repays them or ""."""
    costs = GATES["*"] | GATES.get(base_of(stage), {})
    cost = costs.get(task, costs["*"])
    return cost if isinstance(cost, tuple) else (cost, "")


def must_have_repaid(payer, stage):
    """True if `payer` should have brought back by now, after `stage`, what it owes.

    A stage of several parts repays by its second part. A stage that no cascade knows demands
    nothing, since it may stand anywhere in the cascade.
    """
    base = base_of(stage)
    if base not in STAGES:
        return False
    if base == payer:
        return stage != payer + "1"
    return STAGES.index(payer) < STAGES.index(base)


def cells_of(cells, stage):
    """Yield ((task, mode, decoding), result line) of the scores of one stage."""
    for (name, *column), cell in cells.items():
        if name == stage:
            yield tuple(column), cell


def checked_stages(cells, stages):
    """Return the stages that have a score which an earlier stage has too."""
    checked, seen = [], set()
    for stage in stages:
        measured = {column for column, _ in cells_of(cells, stage)}
        if measured & seen:
            checked.append(stage)
        seen |= measured
    return checked


def broken_gates(cells, stages):
    """Return [(stage, sentence)] for every score of a stage that fell by more than it may.

    A score is held against the best one before it. A loss that was reported is not reported again
    at later stages. Example: IFEval is at 70 and RLHF may cost 25 that IF-RL has to bring back. 50
    after RLHF is fine; 60 after IF-RL breaks the gate, since by then the 25 are no longer allowed.
    """
    broken = []
    # One account for each column: the best result so far, the points that may be lost against it,
    # and which part of those points which stage still has to bring back.
    accounts = {}
    for stage in stages:
        for column, now in cells_of(cells, stage):
            if column not in accounts:
                accounts[column] = {"best": now, "allowed": 0.0, "owed": {}}
                continue
            account = accounts[column]
            task, mode, decoding = column

            # This stage's own allowance is added to what earlier stages were allowed.
            points, payer = cost_of(stage, task)
            account["allowed"] += points
            if payer:
                account["owed"][payer] = account["owed"].get(payer, 0.0) + points

            # A debt that had to be repaid by now is no longer allowed.
            due = [payer for payer in account["owed"] if must_have_repaid(payer, stage)]
            account["allowed"] -= sum(account["owed"].pop(payer) for payer in due)

            # The noise is that of a difference: the two half-intervals that face each other.
            best = account["best"]
            loss = 100 * (best["score"] - now["score"])
            noise = 100 * math.hypot(best["score"] - best["low"], now["high"] - now["score"])
            too_much = loss - noise > account["allowed"] + 1e-9
            if too_much:
                repaid = f": {due[0]} had to bring it back." if due else "."
                sentence = (
                    f"{task} ({mode}, {decoding}) is at {100 * now['score']:.1f} after {stage}, "
                    f"{loss:.1f} below {best['stage']} ({100 * best['score']:.1f}); "
                    f"noise explains {noise:.1f} and {account['allowed']:.1f} may be lost{repaid}"
                )
                broken.append((stage, sentence))
            if loss <= 0 or too_much:
                accounts[column] = {"best": now, "allowed": 0.0, "owed": {}}
    return broken


def why_unchecked(cells, stages, stage=""):
    """Say why no gate was checked (after `stage`, if one is named); "" if one was."""
    checked = checked_stages(cells, stages)
    if stage and stage not in checked:
        return f"no gate was checked: {stage} has no score that a stage before it has too."
    if not checked:
        return "no gate was checked: no two stages have a score of the same task."
    return ""


def check_gates(folder, stage=""):
    """Return a sentence and a next step if a gate (after `stage`, if named) is broken, else ""."""
    cells, stages = read_results(folder, "gates")
    broken = [(s, text) for s, text in broken_gates(cells, stages) if stage in ("", s)]
    if not broken:
        return ""
    first_stage, sentence = broken[0]
    more = f" ({len(broken) - 1} more gates broke.)" if len(broken) > 1 else ""
    return (
        f"gate: {sentence}{more} Train {first_stage} again with a lower lr or fewer steps "
        f"(remove {folder}/{first_stage} first), declare the loss in GATES of evals/results.py, "
        f"or go on from the best checkpoint of {first_stage} with KEEP_BEST=1."
    )


def print_gates(folder, stage=""):
    """Print that every gate of a run holds, or that none was checked; a broken one ends with 2."""
    broken = check_gates(folder, stage)
    if broken:
        fail(broken, note="")
    unchecked = why_unchecked(*read_results(folder, "gates"), stage)
    print(f"{folder}: {unchecked or 'every gate holds.'}")


# ---- 3. The best checkpoint, and SFT of the same cost --------------------------------------------
def keep_best(folder):
    """Make the checkpoint with the highest mean dev score (candidates.jsonl) folder/final."""
    # {checkpoint: {(task, mode): score}} of the checkpoints that still exist
    scores = {}
    for line in kept_lines(glob.escape(os.path.join(folder, "candidates.jsonl"))):
        step = line["stage"]
        if line["decoding"] == "sampled" and os.path.exists(os.path.join(folder, step)):
            scores.setdefault(step, {})[line["task"], line["mode"]] = line["score"]
    if not scores:
        fail(
            f"--keep_best={folder}: no candidates.jsonl with scores of checkpoints that are there.",
            note="",
        )
    means = {step: sum(of_step.values()) / len(of_step) for step, of_step in scores.items()}
    # Of equal means the earliest checkpoint is kept.
    best = max(sorted(means), key=means.get)
    mark_final(folder, os.path.join(folder, best))
    listed = ", ".join(f"{step} {100 * mean:.1f}" for step, mean in sorted(means.items()))
    print(f"{folder}/final -> {best}, mean dev score {100 * means[best]:.1f} ({listed})")


def steps_of_same_compute(rl_folder, sft_folder, sampling_folder=""):
    """Return the SFT steps that take as long as the RL run's sampling, verifying and training.

    Evaluations are left out of both. sampling_folder: of extras/rejection.py, whose own sampling
    and verifying is a part of these seconds; SFT gets the rest, and one step at least.
    """

    def read(folder, name="metrics.jsonl"):
        with open(os.path.join(folder, name)) as lines:
            return [json.loads(line) for line in lines]

    seconds = sum(row["time/gen"] + row["time/train"] for row in read(rl_folder))
    if sampling_folder:
        seconds -= sum(row["time/gen"] for row in read(sampling_folder, "steps.jsonl"))
    step_seconds = float(np.median([row["time/train"] for row in read(sft_folder)]))
    return max(round(seconds / step_seconds), 1)
