"""The results of a run: the stage-by-skill matrix, and the gates between its stages."""

import contextlib
import glob
import json
import math
import os

import numpy as np

from evals.benchmarks import BENCHMARKS
from lib.checkpoint import mark_final
from lib.guard import fail

STAGES = ("sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl", "mopd")
TOY = ("chat", "if", "math", "code", "swe")
TASK_ORDER = (*TOY, *BENCHMARKS)
OWN = {"rlhf": "chat", "ifrl": "if", "mathrl": "math", "coderl": "code", "swerl": "swe"}

# Points a stage may cost a task, beyond the noise band of the two scores. A pair is a sacrifice:
# the points, and the stage
# that has to bring them back. What stages may cost adds up; the noise does not.
GATES = {
    # any stage, any task; the toy skills share a third of a million parameters
    "*": {"*": 1.0, **dict.fromkeys(TOY, 3.0)},
    # paper T4: IFEval 70.8 -> 50.1, T5: 90.4
    "rlhf": {"ifeval": (25.0, "ifrl"), "ifbench": (5.0, "ifrl"), "if": (10.0, "ifrl")},
    # paper T5: MMLU-Pro 77.8 -> 74.5; toy: chat's rule and the constraints disagree
    "ifrl": {"mmlu_pro": 3.0, "chat": 10.0},
}


def kept_lines(pattern):
    """What these JSONL files keep; a line that was cut off counts for nothing."""
    for line in (line for file in sorted(glob.glob(pattern)) for line in open(file)):
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def base_of(stage):
    """mathrl2 -> mathrl: sub-stages share the gates of their stage."""
    return stage.rstrip("0123456789")


def read_results(folder, flag):
    """({(stage, task, mode, decoding): result line}, stages in their order) of a run folder."""
    path, cells = os.path.join(folder, "results.jsonl"), {}
    if not os.path.isfile(path):
        fail(f"--{flag}={folder}: no results.jsonl there.", note="Nothing was read.")
    for r in kept_lines(glob.escape(path)):
        cells[r["stage"], r["task"], r["mode"], r["decoding"]] = r  # a re-run replaces
    known = {s for s, *_ in cells if base_of(s) in STAGES}
    return cells, sorted(known, key=lambda s: (STAGES.index(base_of(s)), s))


def broken_gates(cells, stages):
    """[(stage, sentence)] for every stage that lost more than it may. Each score is held against the best one before it; a
    loss that was reported is not reported again at later stages. IFEval at 70, rlhf may cost 25 that ifrl has to bring back: 50 after rlhf
    is fine, 60 after ifrl breaks, since what rlhf was lent is due by then."""
    broken, books = [], {}
    for stage in stages:
        for (s, name, mode, decoding), now in cells.items():
            if s != stage or decoding != "sampled":
                continue
            book = books.setdefault((name, mode), {"best": now, "spent": 0.0, "owed": {}})
            if book["best"] is now:
                continue
            costs = GATES["*"] | GATES.get(base_of(stage), {})
            cost = costs.get(name, costs["*"])
            points, payer = cost if isinstance(cost, tuple) else (cost, "")
            book["spent"] += points
            if payer:
                book["owed"][payer] = book["owed"].get(payer, 0.0) + points
            due = [
                p
                for p in book["owed"]
                if STAGES.index(p) < STAGES.index(base_of(stage))
                or p == base_of(stage)
                and stage != p + "1"
            ]
            # a stage of several parts pays by its second
            book["spent"] -= sum(book["owed"].pop(p) for p in due)
            best = book["best"]
            loss, band = (
                100 * (best["score"] - now["score"]),
                100 * math.hypot(best["score"] - best["low"], now["high"] - now["score"]),
            )
            if too_much := loss - band > book["spent"] + 1e-9:
                text = f"{name} ({mode}) is at {100 * now['score']:.1f} after {stage}, {loss:.1f} below {best['stage']} ({100 * best['score']:.1f}); "
                text += f"noise explains {band:.1f} and {book['spent']:.1f} may be lost"
                broken.append((stage, text + (f": {due[0]} had to bring it back." if due else ".")))
            if loss <= 0 or too_much:
                books[name, mode] = {"best": now, "spent": 0.0, "owed": {}}
    return broken


def check_gates(folder, stage=""):
    """One sentence and a next step for broken gates (of one stage, if named), else ""."""
    broken = [
        (s, text) for s, text in broken_gates(*read_results(folder, "gates")) if stage in ("", s)
    ]
    if not broken:
        return ""
    s, more = broken[0][0], f" ({len(broken) - 1} more gates broke.)" if len(broken) > 1 else ""
    return (
        f"gate: {broken[0][1]}{more} Train {s} again with a lower lr or fewer steps (remove {folder}/{s} first), declare the loss in "
        f"GATES of evals/results.py, or go on from the best checkpoint of {s} with KEEP_BEST=1."
    )


def keep_best(folder):
    """folder/final becomes the checkpoint with the highest mean held-out dev score over all tasks (candidates.jsonl)."""
    means = {}
    for r in kept_lines(glob.escape(os.path.join(folder, "candidates.jsonl"))):
        if r["decoding"] == "sampled" and os.path.exists(os.path.join(folder, r["stage"])):
            means.setdefault(r["stage"], {})[r["task"], r["mode"]] = r["score"]
    means = {step: sum(scores.values()) / len(scores) for step, scores in means.items()}
    if not means:
        fail(
            f"--keep_best={folder}: no candidates.jsonl with scores of checkpoints that are there.",
            note="",
        )
    mark_final(folder, os.path.join(folder, best := max(sorted(means), key=means.get)))
    print(
        f"{folder}/final -> {best}, mean dev score {100 * means[best]:.1f} ("
        + ", ".join(f"{s} {100 * m:.1f}" for s, m in sorted(means.items()))
        + ")"
    )


def columns_of(cells, stages):
    """[(task, mode)] that some stage was measured on, in the order of TASK_ORDER."""
    present, order = {key[1:3] for key in cells if key[0] in stages}, list(TASK_ORDER)
    return sorted(
        present,
        key=lambda c: (
            order.index(c[0]) if c[0] in TASK_ORDER else len(order),
            c[0],
            c[1] != "think",
        ),
    )


def steps_of_same_compute(rl_folder, sft_folder):
    """SFT steps that take as long as the RL run's sampling, verifying and training (evaluations left out of both)."""
    read = lambda folder: [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]
    seconds = sum(r["time/gen"] + r["time/train"] for r in read(rl_folder))
    return round(seconds / float(np.median([r["time/train"] for r in read(sft_folder)])))
