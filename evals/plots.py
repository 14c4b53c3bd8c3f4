"""The matrix of a run, printed and drawn, and the curves of its stages."""

import json
import os

import numpy as np

from evals.results import OWN, base_of, columns_of, read_results


def draw_matrix(folder):
    """Print the stage-by-skill tables of folder/results.jsonl and write matrix.png and curves_<stage>.png beside it."""
    cells, stages = read_results(folder, "matrix")
    columns = columns_of(cells, stages)
    for decoding in ("sampled", "greedy"):
        print(f"\n{decoding}, held-out test split, percent [95% interval]; * a stage's own skill")
        print(f"{'':8s}" + "".join(f"{task + ' ' + mode:>22s}" for task, mode in columns))
        for s in stages:
            line = f"{s:8s}"
            for task, mode in columns:
                r = cells.get((s, task, mode, decoding))
                text = (
                    f"{100 * r['score']:.1f} [{100 * r['low']:.0f}, {100 * r['high']:.0f}]"
                    if r
                    else "-"
                )
                line += f"{text + ('*' if OWN.get(s) == task else ' '):>22s}"
            print(line)
    taught = [s for s in stages if s in ("sft", *OWN)]
    print(
        "\nown skill, sampled, before -> after the stage that teaches it | the same seconds spent on more SFT instead, if that was run"
    )
    for before, after in zip(taught, taught[1:]):
        mode = "no_think" if after == "ifrl" else "think"
        a, b, control = (
            cells.get((s, OWN.get(after), mode, "sampled"))
            for s in (before, after, f"{after}_control")
        )
        if a and b:
            texts = [
                f"{100 * r['score']:5.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
                for r in (a, b, control)
                if r
            ]
            texts[1] += (
                "  beyond the intervals' overlap"
                if b["low"] > a["high"]
                else "  within the intervals"
            )
            print(
                f"{after:8s}{OWN[after]:>5s} {mode:9s}"
                + " -> ".join(texts[:2])
                + f" | {texts[-1]}" * bool(control)
            )
    plot_run(folder, cells, stages, columns)


def plot_run(folder, cells, stages, columns):
    """matrix.png and one curves_<stage>.png a stage, for the README and other places without a browser."""
    plot_matrix(os.path.join(folder, "matrix.png"), cells, stages, columns)
    for s in stages[1:]:
        if os.path.exists(metrics := os.path.join(folder, s, "metrics.jsonl")):
            plot_curves(metrics, os.path.join(folder, f"curves_{s}.png"), s)


def plot_matrix(
    path,
    cells,
    stages,
    columns,
    title="held-out score after each stage, %, with its 95% interval (sampled)",
    own={s: (task,) for s, task in OWN.items()},
):
    """An outline marks what a stage teaches, an arrow the change against the stage above, bold where the intervals do not overlap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    figure, axis = plt.subplots(figsize=(1.35 * len(columns) + 1.3, 0.72 * len(stages) + 1.2))
    teal = LinearSegmentedColormap.from_list("teal", ["#f1f7f5", "#8fc7bd", "#2f8f84", "#0b5d56"])
    for y, s in enumerate(stages):
        for x, (task, mode) in enumerate(columns):
            if not (r := cells.get((s, task, mode, "sampled"))):
                continue
            before, taught = (
                cells.get((stages[y - 1], task, mode, "sampled")) if y else None,
                task in own.get(base_of(s), ()),
            )
            axis.add_patch(
                plt.Rectangle(
                    (x - 0.47, y - 0.46),
                    0.94,
                    0.92,
                    facecolor=teal(r["score"]),
                    edgecolor="#c2570c" if taught else "none",
                    linewidth=2.2,
                )
            )
            change = r["score"] - before["score"] if before else 0.0
            how = dict(ha="center", va="center", color="white" if r["score"] > 0.55 else "#16302c")
            axis.text(
                x, y - 0.13, f"{100 * r['score']:.1f}", fontsize=12.5, fontweight="bold", **how
            )
            band = f"\u00b1{50 * (r['high'] - r['low']):.1f}  " if "low" in r else ""
            sure = bool(band and before) and (
                r["low"] > before["high"] or r["high"] < before["low"]
            )
            arrow = (
                ("\u25bc", "\u25b2")[change > 0] + f"{abs(100 * change):.1f}"
                if abs(change) >= 0.0005
                else ""
            )
            axis.text(
                x,
                y + 0.24,
                band + arrow,
                fontsize=8,
                fontweight="bold" if sure else "normal",
                **how,
            )
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(stages) - 0.5, -0.5))
    axis.set_xticks(range(len(columns)), [f"{t}\n{m}" if m else t for t, m in columns])
    axis.set_yticks(range(len(stages)), stages)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.text(
        0.5,
        0.015,
        f"{title}; outlined: the skill a stage teaches",
        ha="center",
        fontsize=9,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curves(metrics_path, path, stage):
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in open(metrics_path)]
    # rlhf: the raw score, whatever the shaping
    rows = [r | {"reward": r.get("reward/rm_score", r["reward"])} for r in rows]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2))
    for axis, (key, title) in zip(
        axes,
        (
            ("reward", "reward"),
            ("len", "completion tokens"),
            ("trunc", "share truncated"),
            ("entropy", "entropy, nats/token"),
        ),
    ):
        steps, values = [r["step"] for r in rows], [r[key] for r in rows]
        window = max(len(values) // 20, 1)
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(
            steps,
            [np.mean(values[max(0, i - window) : i + 1]) for i in range(len(values))],
            color="tab:blue",
            label="training",
        )
        if key == "reward" and any("eval" in r for r in rows):
            held_out = [(r["step"], r["eval"]) for r in rows if "eval" in r]
            axis.plot(*zip(*held_out), "o-", color="tab:red", markersize=3, label="held-out (dev)")
            axis.legend(fontsize=8)
        axis.set_title(f"{stage}: {title}", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
