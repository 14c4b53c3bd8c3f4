"""Where the wall time of a cascade went: generation, update, the rest of each stage, and scoring.

    python bench/phases.py [--run=out/toy]       # prints a table, writes bench/phases.json and .png

It reads a finished run folder. Generation and update are the sums of time/gen and time/train over
metrics.jsonl. The ends of the phases come from the dates of files: .lock (start), final (trained),
scored (evaluated). So the times are only true for a run that was not interrupted, in the folder
where it was made. "start and rest" is what is left: imports, data and verifiers, the reward model
of rlhf, held-out checks, checkpoints.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from side_by_side import ROOT, machine

STAGES = ("sft1", "sft2", "rlhf", "ifrl", "mathrl", "coderl", "swerl")
PHASES = {
    "generate": "tab:orange",
    "update": "tab:blue",
    "start and rest": "0.75",
    "score": "tab:green",
}


def phases(folder):
    """Seconds of each phase of a finished stage."""
    with open(folder / "metrics.jsonl") as f:
        metrics = [json.loads(line) for line in f]

    def date(name):
        return os.lstat(folder / name).st_mtime

    row = {
        "steps": len(metrics),
        "generate": sum(m.get("time/gen", 0.0) for m in metrics),
        "update": sum(m["time/train"] for m in metrics),
    }
    row["start and rest"] = date("final") - date(".lock") - row["generate"] - row["update"]
    row["score"] = date("scored") - date("final") if (folder / "scored").exists() else 0.0
    return row


def plot(table, total, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.4 * len(table) + 1.6))
    left = [0.0] * len(table)
    for phase, colour in PHASES.items():
        values = [row[phase] for row in table.values()]
        axis.barh(
            list(table),
            values,
            0.65,
            left=left,
            color=colour,
            label=f"{phase}: {sum(values):.0f} s",
        )
        left = [a + b for a, b in zip(left, values)]
    for place, (end, row) in enumerate(zip(left, table.values())):
        axis.text(end, place, f" {row['steps']} steps", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(left))
    axis.set_xlabel("seconds")
    axis.set_title(
        f"The toy cascade by phase: {total:.0f} s from the first stage's start to the last score",
        fontsize=9,
    )
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--run", default="out/toy")
    parser.add_argument("--out", default=str(ROOT / "bench" / "phases"), help="path without suffix")
    args = parser.parse_args()
    done = [stage for stage in STAGES if (Path(args.run) / stage / "final").exists()]
    if not done:
        sys.exit(f"phases.py: {args.run} has no finished stage.")
    table = {stage: phases(Path(args.run) / stage) for stage in done}
    run = json.loads((Path(args.run) / done[-1] / "final" / "run.json").read_text())
    print(
        f"{'stage':10s}{'steps':>6s}"
        + "".join(f"{phase:>16s}" for phase in PHASES)
        + f"{'sum':>10s}"
    )
    for stage, row in table.items():
        print(
            f"{stage:10s}{row['steps']:6d}"
            + "".join(f"{row[phase]:16.1f}" for phase in PHASES)
            + f"{sum(row[p] for p in PHASES):10.1f}"
        )
    sums = {phase: sum(row[phase] for row in table.values()) for phase in PHASES}
    last = max(
        os.lstat(Path(args.run) / done[-1] / name).st_mtime
        for name in ("final", "scored")
        if (Path(args.run) / done[-1] / name).exists()
    )
    total = last - os.lstat(Path(args.run) / done[0] / ".lock").st_mtime
    print(
        f"{'all':16s}"
        + "".join(f"{sums[phase]:16.1f}" for phase in PHASES)
        + f"{sum(sums.values()):10.1f}   (first start to last end {total:.1f})"
    )
    head = {
        "command": "bench/phases.py",
        "git": run["git"],
        "ranks": run["world"],
        "torch": run["torch"],
        "machine": machine(),
    }
    Path(args.out).with_suffix(".json").write_text(
        json.dumps(head | {"seconds": table, "sums": sums, "total": total}, indent=1) + "\n"
    )
    plot(table, total, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
