"""The matrix of a run, printed and drawn, its benchmarks over the stages, and the curves."""

import glob
import itertools
import os

import numpy as np

from evals.results import (
    CONTROLS,
    base_of,
    columns_of,
    cost_of,
    decodings_of,
    kept_lines,
    own_skill_rows,
    paired_difference,
    read_results,
)

SCORES_TITLE = "held-out score after each stage, %, with its 95% interval"
HOW = {
    "paper": "temperature 0.6, top-p 0.95",
    "sampled": "sampled",
    "greedy": "greedy",
}
OUTLINE = "#c2570c"  # around the cells of a stage's own skill

# The panels of curves_<stage>.png: keys of metrics.jsonl, and their titles. SFT has no rewards.
RL_PANELS = (
    ("reward", "reward"),
    ("len", "completion tokens"),
    ("trunc", "share truncated"),
    ("entropy", "entropy, nats/token"),
)
SFT_PANELS = (("loss", "loss, nats/token"), ("grad_norm", "gradient norm"), ("lr", "learning rate"))


def skill_of(stage, own):
    """Return the task that a stage teaches, from own: {script: task}; None if it teaches none."""
    return own.get(base_of(stage))


def is_taught(task, stage, own):
    """True for the skill of a stage, and for its hard problems."""
    skill = skill_of(stage, own)
    skills = skill if isinstance(skill, tuple) else (skill,)
    return task.removesuffix("_hard") in skills


# ---- 1. The matrix, printed ----------------------------------------------------------------------
def draw_matrix(folder, own):
    """Print the stage-by-skill tables of folder/results.jsonl; draw matrix.png, stages.png, curves.

    own: {script: the task that it teaches}
    """
    cells, stages = read_results(folder, "matrix")
    columns = columns_of(cells, stages)
    decodings = decodings_of(cells, stages)
    for decoding in decodings:
        print_scores(cells, stages, columns, decoding, own)
    for decoding in decodings:
        print_own_skills(folder, cells, stages, decoding, own)
    headline = decodings[0]
    print_other_skills(cells, stages, columns, headline, own)
    print_losses(cells, stages, columns, decodings)
    title = f"{SCORES_TITLE} ({HOW[headline]})"
    path = os.path.join(folder, "matrix.png")
    plot_matrix(path, cells, stages, columns, own, title, headline)
    if len(stages) > 1:
        path = os.path.join(folder, "stages.png")
        plot_stages(path, cells, stages, columns, own, title, decoding=headline)
    plot_all_curves(folder, stages)


def percents(cell):
    return 100 * cell["score"], 100 * cell["low"], 100 * cell["high"]


def percent_with_interval(cell, digits):
    """Format a result line as percent: 58.3 [54.3, 62.4]. digits: those of the interval's ends."""
    score, low, high = percents(cell)
    return f"{score:.1f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_scores(cells, stages, columns, decoding, own):
    """Print one row a stage and one column a task and mode; a star marks a stage's own skill."""
    # Names of the recipe fit into eight characters, a name of one's own may be longer.
    width = max([8, *(len(stage) + 1 for stage in stages)])
    print(f"\n{HOW[decoding]}, held-out test split, percent [95% interval]; * a stage's own skill")
    print(" " * width + "".join(f"{task + ' ' + mode:>22s}" for task, mode in columns))
    for stage in stages:
        line = f"{stage:{width}s}"
        for task, mode in columns:
            cell = cells.get((stage, task, mode, decoding))
            text = percent_with_interval(cell, 0) if cell else "-"
            star = "*" if is_taught(task, stage, own) else " "
            line += f"{text + star:>22s}"
        print(line)


def print_own_skills(folder, cells, stages, decoding, own):
    """Print each stage's own skill before and after it, and after what else took the same seconds.

    Its hard problems, where they were measured, have a line of their own.
    """
    print(
        f"\nown skill, {HOW[decoding]}, before -> after the stage that teaches it,"
        " and the difference problem by problem"
        " | the same seconds spent on something else instead, if that was run"
    )
    for row in own_skill_rows(cells, stages, decoding, own):
        stage, task, mode, before, after, controls = row
        line = f"{stage:8s}{task:>10s} {mode:9s}"
        line += f"{padded_interval(before)} -> {padded_interval(after)}"
        difference = paired_difference(folder, before, after)
        if difference:
            mean, low, high = (100 * value for value in difference)
            line += f"  {mean:+.1f} [{low:.1f}, {high:.1f}]"
        if before["high"] < after["low"]:
            line += "  beyond the intervals' overlap"
        else:
            line += "  within the intervals"
        for name, control in controls.items():
            line += f" | {name} {padded_interval(control)}"
        print(line)


def print_other_skills(cells, stages, columns, decoding, own):
    """Print what each stage does to the skills that it does not teach, and what its controls do."""
    print(
        f"\nall other skills, {HOW[decoding]}, points above the stage before: mean (the worst one)"
    )
    for before, after in itertools.pairwise(stages):
        others = [column for column in columns if not is_taught(column[0], after, own)]
        texts = []
        for ending, name in {"": "", **CONTROLS}.items():
            changes = {}
            for task, mode in others:
                start = cells.get((before, task, mode, decoding))
                end = cells.get((after + ending, task, mode, decoding))
                if start and end:
                    changes[task, mode] = 100 * (end["score"] - start["score"])
            if changes:
                worst = min(changes, key=changes.get)
                mean = sum(changes.values()) / len(changes)
                text = f"{mean:+.1f} ({' '.join(worst)} {changes[worst]:+.1f})"
                texts.append(f"{name} {text}".strip())
        if texts:
            print(f"{after:8s} " + " | ".join(texts))


def print_losses(cells, stages, columns, decodings):
    """Print which scores fell beyond the intervals' overlap, and which end below the first stage.

    Beside each fall stands what GATES of evals/results.py allows.
    """
    fallen, lower = [], []
    for before, after in itertools.pairwise(stages):
        for (task, mode), decoding in itertools.product(columns, decodings):
            high = cells.get((before, task, mode, decoding))
            low = cells.get((after, task, mode, decoding))
            if not high or not low or low["high"] >= high["low"]:
                continue
            points, payer = cost_of(after, task)
            repaid = f", which {payer} has to bring back" if payer else ""
            fallen.append(
                f"{after:8s}{task:>10s} {mode:9s}{decoding:8s}"
                f"{padded_interval(high)} -> {padded_interval(low)} | {points:g} points{repaid}"
            )

    first, last = stages[0], stages[-1]
    for (task, mode), decoding in itertools.product(columns, decodings):
        start = cells.get((first, task, mode, decoding))
        end = cells.get((last, task, mode, decoding))
        if start and end and end["score"] < start["score"]:
            lower.append(
                f"{task:>18s} {mode:9s}{decoding:8s}"
                f"{padded_interval(start)} -> {padded_interval(end)}"
            )

    print("\nfell beyond the intervals' overlap, and what the gate of that stage allows")
    print("\n".join(fallen) or "none")
    print(f"\nlower after {last} than after {first}")
    print("\n".join(lower) or "none")


def padded_interval(cell):
    score, low, high = percents(cell)
    return f"{score:5.1f} [{low:.1f}, {high:.1f}]"


# ---- 2. The matrix, drawn ------------------------------------------------------------------------
def plot_matrix(path, cells, stages, columns, own, title=SCORES_TITLE, decoding="sampled"):
    """Draw the scores of one decoding as a heat map, one row a stage.

    An outline marks what a stage teaches. An arrow is the change against the stage above; it is
    bold where the intervals do not overlap. own: {script: task, or a tuple of tasks}
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    width, height = 1.35 * len(columns) + 1.3, 0.72 * len(stages) + 1.2  # inches
    figure, axis = plt.subplots(figsize=(width, height))
    teal = LinearSegmentedColormap.from_list("teal", ["#f1f7f5", "#8fc7bd", "#2f8f84", "#0b5d56"])
    for y, stage in enumerate(stages):
        for x, (task, mode) in enumerate(columns):
            cell = cells.get((stage, task, mode, decoding))
            if not cell:
                continue
            before = cells.get((stages[y - 1], task, mode, decoding)) if y > 0 else None
            edge = OUTLINE if is_taught(task, stage, own) else "none"
            box = {"facecolor": teal(cell["score"]), "edgecolor": edge, "linewidth": 2.2}
            axis.add_patch(plt.Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, **box))
            write_cell(axis, x, y, cell, before)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(stages) - 0.5, -0.5))
    labels = [f"{task}\n{mode}" if mode else task for task, mode in columns]
    axis.set_xticks(range(len(columns)), labels)
    axis.set_yticks(range(len(stages)), stages)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    legend = f"{title}; outlined: the skill a stage teaches"
    figure.text(0.5, 0.015, legend, ha="center", fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_cell(axis, x, y, cell, before):
    """Write the score of a cell, and under it the half-width of its interval and the change.

    before: the result line of the stage above, or None
    """
    # Dark cells have white text.
    color = "white" if cell["score"] > 0.55 else "#16302c"
    style = {"ha": "center", "va": "center", "color": color}
    score = f"{100 * cell['score']:.1f}"
    axis.text(x, y - 0.13, score, fontsize=12.5, fontweight="bold", **style)

    # The paper's table has no intervals, so it has neither a half-width nor a bold change.
    half_width, beyond_noise = "", False
    if "low" in cell:
        half_width = f"\u00b1{50 * (cell['high'] - cell['low']):.1f}  "
        if before:
            beyond_noise = cell["low"] > before["high"] or cell["high"] < before["low"]

    change = cell["score"] - before["score"] if before else 0.0
    arrow = ""
    if abs(change) >= 0.0005:  # what would be written as 0.0 is left out
        arrow = "\u25b2" if change > 0 else "\u25bc"
        arrow += f"{abs(100 * change):.1f}"
    weight = "bold" if beyond_noise else "normal"
    axis.text(x, y + 0.24, half_width + arrow, fontsize=8, fontweight=weight, **style)


# ---- 3. Benchmarks over the stages ---------------------------------------------------------------
PAGE_WIDTH = 15  # inches


def plot_stages(
    path,
    cells,
    stages,
    columns,
    own,
    title=SCORES_TITLE,
    references=None,
    decoding="sampled",
):
    """Draw one panel a benchmark: its score by one decoding after each stage, as a line.

    The dots of the stages that teach it are orange. own: {script: task, or a tuple of tasks}.
    references: {task: (name, score)} of a dashed line, for instance another model's score
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A stage needs room for its number. In inches:
    panel_width = max(3.6, 0.45 * len(stages) + 0.6)
    num_columns = min(len(columns), max(int(PAGE_WIDTH / panel_width), 1))
    num_rows = -(-len(columns) // num_columns)  # rounded up
    size = (max(panel_width * num_columns, 8.0), 2.9 * num_rows + 0.5)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, (task, mode) in zip(axes.flat, columns):
        draw_panel(axis, cells, stages, (task, mode, decoding), own)
        axis.set_title(f"{task} {mode}".strip(), fontsize=10)
        if references and task in references:
            name, score = references[task]
            axis.axhline(100 * score, color="#777777", linestyle="--", linewidth=1, label=name)
            axis.legend(fontsize=8, loc="lower right")
    legend = f"{title}; orange: the skill a stage teaches"
    figure.text(0.5, 0.01, legend, ha="center", fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0.2 / size[1], 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_panel(axis, cells, stages, column, own):
    """Draw the score of one task, mode and decoding over the stages, each with its number."""
    task = column[0]
    measured = []
    for x, stage in enumerate(stages):
        cell = cells.get((stage, *column))
        if cell:
            measured.append((x, stage, cell))
    xs = [x for x, _, _ in measured]
    scores = [100 * cell["score"] for _, _, cell in measured]
    axis.plot(xs, scores, color="#2f8f84", linewidth=1.5, zorder=1)
    for x, stage, cell in measured:
        color = OUTLINE if is_taught(task, stage, own) else "#0b5d56"
        # The paper's scores have no interval.
        low, high = 100 * cell.get("low", cell["score"]), 100 * cell.get("high", cell["score"])
        axis.vlines(x, low, high, color=color, linewidth=1.5)
        axis.plot(x, 100 * cell["score"], "o", color=color, markersize=5, zorder=4)
        place = {"xy": (x, high), "xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
        # On white, so that a line that rises steeply does not cross the number.
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axis.annotate(f"{100 * cell['score']:.1f}", **place, fontsize=8, bbox=behind)
    axis.set_xticks(range(len(stages)), stages, fontsize=8)
    if max(map(len, stages)) > 8:  # longer than the names of the recipe
        axis.tick_params(axis="x", rotation=30)
    axis.set_xlim(-0.4, len(stages) - 0.6)
    axis.margins(y=0.18)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", alpha=0.3)


# ---- 4. Curves -----------------------------------------------------------------------------------
def plot_all_curves(folder, stages):
    """Draw curves_<stage>.png of every stage but SFT that was trained in this folder.

    folder: of a cascade, or of one stage, which then holds metrics.jsonl itself
    """
    metrics_of = {stage: os.path.join(folder, stage, "metrics.jsonl") for stage in stages}
    own_metrics = os.path.join(folder, "metrics.jsonl")
    if os.path.exists(own_metrics):
        metrics_of = {os.path.basename(os.path.abspath(folder)): own_metrics}
    for stage, metrics in metrics_of.items():
        if base_of(stage) != "sft" and os.path.exists(metrics):
            plot_curves(metrics, os.path.join(folder, f"curves_{stage}.png"), stage)


def plot_curves(metrics_path, path, stage):
    """Draw the training curves of one stage, each with its running mean, and the held-out dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(kept_lines(glob.escape(metrics_path)))
    for row in rows:
        if "reward/rm_score" in row:
            # RLHF shapes its rewards: the raw score of the reward model is what compares.
            row["reward"] = row["reward/rm_score"]
    panels = RL_PANELS if any("reward" in row for row in rows) else SFT_PANELS
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 3.2))
    for axis, (key, title) in zip(axes, panels):
        logged = [row for row in rows if row.get(key) is not None]
        steps = [row["step"] for row in logged]
        values = [row[key] for row in logged]
        # The running mean covers a twentieth of the run.
        window = max(len(values) // 20, 1)
        means = [np.mean(values[max(0, i - window) : i + 1]) for i in range(len(values))]
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, means, color="tab:blue", label="training")
        held_out = [row for row in rows if "eval" in row]
        if key == "reward" and held_out:
            dot_steps = [row["step"] for row in held_out]
            dots = [row["eval"] for row in held_out]
            axis.plot(dot_steps, dots, "o-", color="tab:red", markersize=3, label="held-out (dev)")
            axis.legend(fontsize=8)
        axis.set_title(f"{stage}: {title}", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
