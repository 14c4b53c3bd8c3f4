"""pass@k, the chance that at least one of k samples of a problem is right: estimate, table, plot.

    python evaluate.py --model=M --tasks=math500 --pass_at=1,2,4,8,16 --results=R/results.jsonl
    bash bench/passk.sh      before and after each stage of the toy, on the stage's own skill

pass@1 says how often a policy is right, pass@k of a large k what it can find at all. RL raises
pass@1; whether it raises pass@k of its start too, or only moves it into pass@1, is an open question
(arXiv 2504.13837).

The headline is sampling at the task's own protocol, for the toy at temperature 1: these samples are
the policy's own distribution. A lower temperature or a top-p below 1 keeps rare answers from being
drawn at all, so pass@k would measure the sampler, too. (For the toy, temperature 0.6 and top-p 0.95
stand beside it, which is how the paper and arXiv 2504.13837 sample.)

A sample is right if its score is 1. A score that is graded counts only where it is full: chat of
the toy has five qualities, and a reply passes with all five.
"""

import glob
import itertools
import math
import os

import numpy as np

from evals.plots import HOW, OUTLINE, is_taught
from evals.results import DECODINGS, TASK_ORDER, in_stage_order, interval, kept_lines

# results.jsonl has such lines where evaluate.py was asked for pass@k; bench/passk.sh keeps its own.
FILES = ("results.jsonl", "passk.jsonl")
COLOURS = ("#2f8f84", "#4c6fb3", "#8a5fa8", "#777777", "#b0883b", "#3f3f3f")


# ---- 1. Estimate ---------------------------------------------------------------------------------
def pass_at(num_samples, num_right, k):
    """Return the unbiased estimate of a problem's pass@k: 1 - C(n - c, k) / C(n, k).

    It is the share of all draws of k of the n samples, without replacement, with one of the c right
    ones among them (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def pass_at_of(line, k):
    """Return the estimates of pass@k [P] of the problems of a result line."""
    return np.array([pass_at(line["samples"], c, k) for c in line["right"]])


def fields(scores_PG, ks):
    """Return what --pass_at adds to a result line of P problems with G scores each.

    right: how many of its samples are right, problem by problem. pass_at: {k: [mean, low, high]},
    with the 95% interval over problems; the keys are texts, as in JSON.
    """
    num_samples = np.shape(scores_PG)[1]
    right = (np.asarray(scores_PG) >= 1).sum(axis=1).tolist()
    line = {"samples": num_samples, "right": right}
    estimates = {}
    for k in ks:
        estimates[str(k)] = list(interval(pass_at_of(line, k)[:, None]))
    return {"pass_at": estimates, "right": right}


def gain(before, after, k):
    """Return (difference, low, high) of the pass@k of two result lines over the same problems.

    Problems are resampled in pairs, since both lines share their hard ones.
    """
    differences_P = pass_at_of(after, k) - pass_at_of(before, k)
    return interval(differences_P[:, None])


# ---- 2. What a run has measured ------------------------------------------------------------------
def read_pass_at(folder):
    """Return {(task, mode, decoding): {stage: result line}} of the lines that have pass@k.

    Tasks come in the order of TASK_ORDER, the headline decoding first, stages as the cascade runs
    them. Controls are left out.
    """
    lines = {}
    for name in FILES:
        for line in kept_lines(os.path.join(glob.escape(folder), name)):
            if "pass_at" in line:
                # A later line replaces an earlier one: the evaluation was run again.
                column = line["task"], line["mode"], line["decoding"]
                lines.setdefault(column, {})[line["stage"]] = line

    def place(column):
        task, mode, decoding = column
        rank = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
        return rank, task, mode, decoding != "sampled", DECODINGS.index(decoding)

    ordered = {}
    for column in sorted(lines, key=place):
        stages = in_stage_order(lines[column])
        ordered[column] = {stage: lines[column][stage] for stage in stages}
    return ordered


def steps_of(stages):
    """Yield (line before, line after) of successive stages that were measured on the same rows."""
    for before, after in itertools.pairwise(stages.values()):
        if len(before["right"]) == len(after["right"]):
            yield before, after


def ks_of(lines):
    """Return the k, in order, that all these result lines have."""
    shared = set.intersection(*(set(line["pass_at"]) for line in lines))
    return sorted(int(k) for k in shared)


# ---- 3. Table ------------------------------------------------------------------------------------
def table_of(folder):
    """Return (ks, rows) of pass@k before and after each stage.

    A row is [stage, task, mode, decoding, a text for each k]: 54.8 -> 87.4 [+29, +36], with the 95%
    interval of the difference.
    """
    found = []
    for column, stages in read_pass_at(folder).items():
        found += [(column, before, after) for before, after in steps_of(stages)]
    if not found:
        return [], []
    ks = ks_of([line for _, *pair in found for line in pair])
    rows = []
    for (task, mode, decoding), before, after in found:
        row = [after["stage"], task, mode, decoding]
        for k in ks:
            start, end = before["pass_at"][str(k)][0], after["pass_at"][str(k)][0]
            _, low, high = gain(before, after, k)
            changes = f"[{100 * low:+.0f}, {100 * high:+.0f}]"
            row.append(f"{100 * start:.1f} -> {100 * end:.1f} {changes}")
        rows.append(row)
    return ks, rows


def print_pass_at(folder):
    """Print pass@k before and after each stage, if it was measured."""
    ks, rows = table_of(folder)
    if not rows:
        return
    print("\npass@k before -> after the stage, percent [95% interval of the difference]")
    print(" " * 39 + "".join(f"{f'pass@{k}':>26s}" for k in ks))
    for stage, task, mode, decoding, *texts in rows:
        head = f"{stage:8s}{task:>10s} {mode:9s} {decoding:10s}"
        print(head + "".join(f"{text:>26s}" for text in texts))


# ---- 4. Plot -------------------------------------------------------------------------------------
def plot_pass_at(folder, own):
    """Draw folder/passk.png: one panel a task, one curve a stage over k, with its 95% band.

    The stage that teaches the task is orange. Dotted: the other decodings. own: {script: the task
    that it teaches}. Nothing is drawn where nothing was measured.
    """
    columns = read_pass_at(folder)
    if not columns:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # {(task, mode): its decodings, the headline first}
    panels = {}
    for task, mode, decoding in columns:
        panels.setdefault((task, mode), []).append(decoding)
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)  # rounded up
    size = (4.6 * num_columns, 3.4 * num_rows + 0.5)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((task, mode), decodings) in zip(axes.flat, panels.items()):
        for decoding in decodings:
            is_headline = decoding == decodings[0]
            draw_curves(axis, columns[task, mode, decoding], own, is_headline)
        axis.set_title(f"{task} {mode} ({HOW[decodings[0]]})", fontsize=10)
        axis.legend(fontsize=8, loc="best")
    dotted = {decoding for decodings in panels.values() for decoding in decodings[1:]}
    legend = "pass@k, %, with its 95% interval; orange: after the stage that teaches it"
    for decoding in sorted(dotted):
        legend += f"; dotted: {HOW[decoding]}"
    figure.text(0.5, 0.01, legend, ha="center", fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0.3 / size[1], 1, 1))
    figure.savefig(os.path.join(folder, "passk.png"), dpi=130)
    plt.close(figure)


def draw_curves(axis, stages, own, is_headline):
    """Draw one curve a stage, {stage: result line}: solid with a band, or dotted beside those."""
    colours = itertools.cycle(COLOURS)
    for stage, line in stages.items():
        ks = ks_of([line])
        scores = [100 * line["pass_at"][str(k)][0] for k in ks]
        lows = [100 * line["pass_at"][str(k)][1] for k in ks]
        highs = [100 * line["pass_at"][str(k)][2] for k in ks]
        colour = OUTLINE if is_taught(line["task"], stage, own) else next(colours)
        if is_headline:
            axis.plot(ks, scores, "o-", color=colour, markersize=4, label=stage)
            axis.fill_between(ks, lows, highs, color=colour, alpha=0.18, linewidth=0)
        else:
            axis.plot(ks, scores, ":", color=colour, linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.set_xlabel("k", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
