"""Lays scores that evaluate.py measured on NVIDIA's own checkpoints beside those of their card.

    bash run_cascade.sh cards                     measures the six checkpoints of the 8B column
    python bench/cards.py --run=out/cards         prints the table, writes out/cards/cards.md

The checkpoints are nvidia/Nemotron-Cascade-8B-Intermediate-ckpts and nvidia/Nemotron-Cascade-8B on
the hub, plain Qwen3 folders. The card's scores are those of the paper (bench/paper_table.py). So
this tests the evaluation, not a training run: where the card's score lies outside of our interval,
prompts, answers or judges differ from NVIDIA's.

Both sides answer the same problems, and the interval is over problems. It is therefore wider than
the noise between two evaluations of one checkpoint, which differ only in what was drawn.
"""

import os
import sys
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from bench.paper_table import PAPER, STAGES  # noqa: E402
from evals.report import table  # noqa: E402
from evals.results import read_results  # noqa: E402
from lib.flags import parse_config  # noqa: E402
from lib.guard import fail  # noqa: E402


@dataclass
class Config:
    run: str = "out/cards"  # folder with results.jsonl, a stage of the card for each checkpoint


def compare(cells):
    """Return (rows of the table, cells measured, cells with the card's score inside our interval).

    cells: {(stage, task, mode, decoding): result line}
    """
    rows, num_measured, num_inside = [], 0, 0
    for task, (completions, scores) in PAPER.items():
        # The unified model's IFEval is measured without thinking (appendix B).
        mode = "no_think" if task == "ifeval" else "think"
        row, ours = [task], set()
        for stage, card in zip(STAGES, scores, strict=True):
            cell = cells.get((stage, task, mode, "sampled"))
            if cell is None:
                row.append(f"- / {card}")
                continue
            score, low, high = (100 * cell[key] for key in ("score", "low", "high"))
            inside = low <= card <= high
            text = f"{score:.1f} [{low:.1f}, {high:.1f}] / {card}"
            row.append(text if inside else f"**{text}**")
            num_measured += 1
            num_inside += inside
            ours.add(cell["n"] * cell["samples"])
        row.append(f"{', '.join(map(str, sorted(ours))) or '-'} / {completions}")
        rows.append(row)
    return rows, num_measured, num_inside


def main(cfg):
    cells, _ = read_results(cfg.run, "run")
    rows, num_measured, num_inside = compare(cells)
    if num_measured == 0:
        fail(
            f"--run={cfg.run}: no score of a stage and task of the card (stages: "
            f"{', '.join(STAGES)}; tasks: {', '.join(PAPER)}).",
            note="Nothing was written.",
        )
    text = (
        "Nemotron-Cascade-8B: ours, percent [95% interval] / the card's; bold: the card's score is "
        "outside of our interval. Last column: completions, ours / appendix B's.\n\n"
        f"{table(['', *STAGES, 'completions'], rows)}\n\n"
        f"{num_measured} of {len(PAPER) * len(STAGES)} scores were measured; the card's is inside "
        f"our interval for {num_inside} of them."
    )
    print(text)
    with open(os.path.join(cfg.run, "cards.md"), "w") as f:
        f.write(text + "\n")


if __name__ == "__main__":
    main(parse_config(Config))
