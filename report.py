"""The report of a run: report.html (one file, opens anywhere, no network), report.md, and the plots.

    python report.py --run=out/toy
"""

import json
import os
import sys
from dataclasses import dataclass

import numpy as np

import common
import evaluate
from evaluate import OWN


@dataclass
class Config:
    run: str = "out/toy"  # folder of a run


def plot_run(folder, cells, stages, columns):
    """matrix.png and one curves_<stage>.png a stage, for the README and other places without a browser."""
    plot_matrix(os.path.join(folder, "matrix.png"), cells, stages, columns)
    for s in stages[1:]:
        if os.path.exists(metrics := os.path.join(folder, s, "metrics.jsonl")):
            plot_curves(metrics, os.path.join(folder, f"curves_{s}.png"), s)


def plot_matrix(path, cells, stages, columns):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = np.array([[100 * cells[s, t, m, "sampled"]["score"] if (s, t, m, "sampled") in cells else np.nan for t, m in columns] for s in stages])
    figure, axis = plt.subplots(figsize=(1.35 * len(columns) + 1.5, 0.7 * len(stages) + 1.6))
    axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, s in enumerate(stages):
        for x, (task, mode) in enumerate(columns):
            r = cells.get((s, task, mode, "sampled"))
            if r:
                colour = "white" if values[y, x] < 60 else "black"
                half = 50 * (r["high"] - r["low"])
                axis.text(x, y, f"{values[y, x]:.1f}\n\u00b1{half:.1f}", ha="center", va="center", color=colour, fontsize=9,
                          fontweight="bold" if OWN.get(s) == task else "normal")  # fmt: skip
            if OWN.get(s) == task:
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axis.set_xticks(range(len(columns)), [f"{t}\n{m}" for t, m in columns])
    axis.set_yticks(range(len(stages)), stages)
    axis.set_title("held-out score after each stage, % (sampled, 95% interval; red: what the stage teaches)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curves(metrics_path, path, stage):
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in open(metrics_path)]
    rows = [r | {"reward": r.get("reward/rm_score", r["reward"])} for r in rows]  # rlhf: the raw score, whatever the shaping
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2))
    for axis, (key, title) in zip(axes, (("reward", "reward"), ("len", "completion tokens"), ("trunc", "share truncated"), ("entropy", "entropy, nats/token"))):
        steps, values = [r["step"] for r in rows], [r[key] for r in rows]
        window = max(len(values) // 20, 1)
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, [np.mean(values[max(0, i - window) : i + 1]) for i in range(len(values))], color="tab:blue", label="training")
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


def main(cfg):
    evaluate.draw_matrix(cfg.run)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main(common.parse_config(Config))
