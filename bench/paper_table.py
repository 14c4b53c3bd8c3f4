"""Prints the paper's own scores by stage, and draws them, to stand beside ours.

    python bench/paper_table.py    prints two tables, writes bench/paper_8b.png and paper_lcb.png

Nothing here was measured by this repository. The source is Nemotron-Cascade (arXiv 2512.13607):
tables T2 and T4-T8 for the stages, T1 for the final models; the model cards repeat them. IFEval is
prompt-level strict, in no_think for the unified model; all other scores are in think mode. The
paper prints no intervals, so an arrow says by how much two scores differ, not that the difference
is beyond noise. tests/test_evaluate.py holds the gates of evals/results.py against these columns,
with the noise that as many draws would have. bench/cards.py lays them beside scores of ours.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

from evals.plots import plot_matrix, plot_stages  # noqa: E402
from evals.report import table  # noqa: E402

STAGES = ("sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl")
# Nemotron-Cascade-8B: {benchmark: (problems x completions (appendix B), score after each stage)}
PAPER = {
    # Appendix B counts 14,079 problems; the test split on the hub has 14,042.
    "mmlu": (14079, (83.0, 83.1, 83.4, 83.4, 83.7, 83.7)),
    "mmlu_pro": (12032, (74.4, 77.8, 74.5, 75.0, 75.3, 75.7)),
    "gpqa": (198 * 8, (63.5, 66.8, 66.1, 65.7, 67.4, 66.5)),
    "arenahard": (500, (70.0, 90.1, 88.0, 87.0, 87.8, 87.9)),
    "ifeval": (541 * 8, (70.8, 50.1, 90.4, 92.1, 90.7, 90.2)),
    "ifbench": (294 * 8, (21.2, 24.5, 40.5, 40.4, 38.1, 40.8)),
    "aime24": (30 * 64, (83.6, 86.1, 86.2, 90.2, 89.1, 89.5)),
    "aime25": (30 * 64, (72.8, 75.0, 75.2, 81.9, 80.5, 80.1)),
    "lcb_v5": (279 * 8, (59.2, 70.2, 70.2, 70.6, 75.3, 74.3)),
    "lcb_v6": (454 * 8, (56.7, 67.2, 66.7, 67.4, 71.5, 71.1)),
    "swebench": (500 * 4, (26.1, 28.2, 28.3, 30.6, 31.6, 37.2)),
}
# The thinking models: {model: {benchmark: score after each stage}}
THINKING = {
    "8b-thinking": {
        "mmlu": (83.6, 83.9, 83.8, 83.8, 84.3, 84.0),
        "mmlu_pro": (74.5, 76.2, 74.8, 75.0, 75.4, 75.5),
        "gpqa": (64.2, 67.3, 65.2, 63.8, 67.7, 66.7),
        "arenahard": (71.7, 89.9, 86.3, 84.0, 85.4, 85.8),
        "ifeval": (66.3, 45.5, 83.3, 84.7, 83.1, 83.7),
        "ifbench": (23.2, 23.9, 42.1, 39.8, 41.8, 41.4),
        "aime24": (83.8, 86.4, 85.6, 90.2, 88.3, 88.8),
        "aime25": (71.6, 75.1, 72.3, 80.2, 81.8, 81.4),
        "lcb_v5": (59.6, 70.3, 69.0, 71.2, 74.3, 74.5),
        "lcb_v6": (56.7, 67.3, 65.9, 68.1, 71.0, 71.4),
        "swebench": (30.2, 33.3, 32.4, 32.5, 33.3, 38.5),
    },
    "14b-thinking": {
        "mmlu": (84.9, 85.2, 85.0, 84.8, 85.1, 85.1),
        "mmlu_pro": (76.0, 77.7, 76.4, 76.9, 77.6, 77.0),
        "gpqa": (68.3, 71.3, 70.1, 67.6, 70.3, 69.6),
        "arenahard": (76.9, 93.1, 90.2, 89.3, 89.8, 89.5),
        "ifeval": (69.8, 56.2, 81.3, 84.3, 81.8, 81.9),
        "ifbench": (24.3, 25.6, 40.4, 41.0, 41.0, 41.7),
        "aime24": (86.9, 88.4, 89.2, 90.4, 90.4, 89.7),
        "aime25": (81.1, 81.8, 82.3, 83.3, 83.5, 83.3),
        "lcb_v5": (66.1, 75.2, 75.3, 75.2, 78.0, 77.5),
        "lcb_v6": (63.1, 72.3, 72.7, 72.4, 74.8, 74.6),
        "swebench": (34.5, 38.8, 38.4, 39.7, 39.6, 43.1),
    },
}
# What the cards of the final models have besides (T1; pass@32: 7.4). The paper's localisation has a
# retrieval half that ours has not.
FINAL = {
    "LiveCodeBench Pro 25Q2 easy": {"8b": 65.7, "8b-thinking": 64.8, "14b-thinking": 68.9},
    "LiveCodeBench Pro 25Q2 medium": {"8b": 6.4, "8b-thinking": 6.1, "14b-thinking": 10.5},
    "BFCL V3": {"8b": 64.4, "14b-thinking": 67.5},
    "SWE-bench Verified, best@32": {"8b": 43.6, "14b-thinking": 53.8},
    "SWE-bench Verified, pass@32": {"8b": 57.7, "14b-thinking": 67.0},
}
# DeepSeek-R1-0528, the teacher of SFT (T1)
TEACHER = {"lcb_v5": ("DeepSeek-R1-0528", 0.748), "lcb_v6": ("DeepSeek-R1-0528", 0.733)}
# The benchmarks that a stage is meant to raise: bold in the table, outlined in the heat map.
TEACHES = {
    "rlhf": ("arenahard",),
    "ifrl": ("ifeval", "ifbench"),
    "mathrl": ("aime24", "aime25"),
    "coderl": ("lcb_v5", "lcb_v6"),
    "swerl": ("swebench",),
}


def cells_of(columns):
    """Return result lines without intervals, as evals/plots.py reads them: {(stage, task, ...)}."""
    cells = {}
    for name, scores in columns.items():
        for stage, score in zip(STAGES, scores, strict=True):
            cells[stage, name, "", "sampled"] = {"score": score / 100}
    return cells


def draw():
    """Write the table of 8B as a heat map, and LiveCodeBench of 14B over the stages (figure F1)."""
    columns = [(name, "") for name in PAPER]
    cells = cells_of({name: scores for name, (_, scores) in PAPER.items()})
    title = "NOT OURS: Nemotron-Cascade-8B as its paper reports it (arXiv 2512.13607, T2, T4-T8), %"
    plot_matrix(os.path.join(HERE, "paper_8b.png"), cells, STAGES, columns, TEACHES, title)

    title = "NOT OURS: Nemotron-Cascade-14B-Thinking, from its paper (T2, T4-T8), %"
    columns = [("lcb_v5", ""), ("lcb_v6", "")]
    cells = cells_of(THINKING["14b-thinking"])
    path = os.path.join(HERE, "paper_lcb.png")
    plot_stages(path, cells, STAGES, columns, TEACHES, title, TEACHER)


def main():
    draw()
    rows = []
    for i, stage in enumerate(STAGES):
        row = [stage]
        for name, (_, scores) in PAPER.items():
            taught = name in TEACHES.get(stage, ())
            row.append(f"**{scores[i]}**" if taught else scores[i])
        rows.append(row)
    print(table(["after", *PAPER], rows))

    models = ("8b", *THINKING)
    rows = []
    for name, scores in FINAL.items():
        rows.append([name, *(scores.get(model, "-") for model in models)])
    print("\n" + table(["final", *models], rows))


if __name__ == "__main__":
    main()
