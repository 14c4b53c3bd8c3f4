"""Guards: NVIDIA's released checkpoints are measured by one command, and laid beside their card.

The scores in here are made up. Nobody has measured these checkpoints with this evaluation yet.
"""

import json

import matplotlib
import pytest
from conftest import ROOT
from test_evaluate import write_jsonl
from test_presets import dry_run, module_and_flags, parsed

import evaluate
from bench import cards
from bench.paper_table import FINAL, PAPER, STAGES, TEACHES, THINKING, cells_of
from evals import plots

matplotlib.use("Agg")


def line(stage, task, score, half, n=100, samples=8, mode="think"):
    """A result line as evaluate.py writes it, with the interval score +- half, all in percent."""
    return {
        "stage": stage,
        "task": task,
        "mode": mode,
        "decoding": "sampled",
        "score": score / 100,
        "low": (score - half) / 100,
        "high": (score + half) / 100,
        "n": n,
        "samples": samples,
    }


# ---- The command ---------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_preset_measures_every_score_of_the_card_on_its_own_checkpoint():
    measured = {}
    lines = dry_run("run_cascade.sh", "cards", NPROC="8", TASKS="")
    for text in lines:
        module, flags = module_and_flags(text)
        if module != "evaluate":
            continue
        cfg = parsed(module, flags)
        measured.setdefault((cfg.stage, cfg.model), []).append(cfg.tasks)
        assert cfg.tasks in evaluate.TASKS
        assert cfg.results == "out/no_such_run/results.jsonl"
    intermediate = "models/Nemotron-Cascade-8B-Intermediate-ckpts/Nemotron-Cascade-8B-"
    names = ("SFT", "RLHF", "IFRL", "MathRL", "CodeRL")
    models = [*(intermediate + name for name in names), "models/Nemotron-Cascade-8B"]
    assert list(measured) == list(zip(STAGES, models, strict=True))
    for tasks in measured.values():
        # The localisation comes before the repair that reads it.
        assert tasks == [*list(PAPER)[:-1], "swebench_files", "swebench"]
    downloads = [text for text in lines if " download " in text]
    # What is there already is not downloaded again.
    folders = {
        "nvidia/Nemotron-Cascade-8B-Intermediate-ckpts": models[0],
        "nvidia/Nemotron-Cascade-8B": models[-1],
    }
    wanted = [hub_id for hub_id, folder in folders.items() if not (ROOT / folder).exists()]
    assert [text.split()[2] for text in downloads] == wanted
    assert lines[-1] == ".venv/bin/python bench/cards.py --run=out/no_such_run"


@pytest.mark.slow
def test_the_preset_measures_what_the_user_names():
    lines = dry_run("run_cascade.sh", "cards", TASKS="aime25", LIMIT="4")
    tasks = [text for text in lines if "evaluate.py" in text]
    assert len(tasks) == 6
    assert all("--tasks=aime25 " in text and "--limit=4" in text for text in tasks)


# ---- The table -----------------------------------------------------------------------------------
def test_the_table_lays_ours_beside_the_cards_with_intervals(tmp_path, capsys):
    """AIME 2025 after SFT: the card has 72.8; ours is 71 +- 4, so it is inside. After RLHF it has
    75.0, ours is 70 +- 2: outside. IFEval counts without thinking only."""
    write_jsonl(
        tmp_path / "results.jsonl",
        [
            line("sft", "aime25", 40.0, 1.0),  # measured again below
            line("sft", "aime25", 71.0, 4.0, n=30, samples=64),
            line("rlhf", "aime25", 70.0, 2.0, n=30, samples=64),
            line("rlhf", "ifeval", 80.0, 2.0),
            line("rlhf", "ifeval", 50.0, 2.0, mode="no_think"),
            line("my_idea", "aime25", 1.0, 1.0),
        ],
    )
    cards.main(cards.Config(run=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "cards.md").read_text() == printed
    rows = {text.split("|")[1].strip(): text for text in printed.splitlines() if "|" in text}
    assert (
        "| 71.0 [67.0, 75.0] / 72.8 | **70.0 [68.0, 72.0] / 75.0** | - / 75.2 |" in rows["aime25"]
    )
    assert rows["aime25"].endswith("| 1920 / 1920 |")
    assert "| - / 70.8 | 50.0 [48.0, 52.0] / 50.1 |" in rows["ifeval"]
    assert rows["ifeval"].endswith("| 800 / 4328 |")
    assert rows["mmlu"].endswith("| - / 14079 |")
    assert "3 of 66 scores were measured; the card's is inside our interval for 2" in printed


def test_results_without_a_score_of_the_card_are_refused(tmp_path, capsys):
    write_jsonl(tmp_path / "results.jsonl", [line("my_idea", "aime25", 1.0, 1.0)])
    with pytest.raises(SystemExit) as stop:
        cards.main(cards.Config(run=str(tmp_path)))
    assert stop.value.code == 2
    assert "no score of a stage and task of the card" in capsys.readouterr().err
    assert not (tmp_path / "cards.md").exists()


# ---- The figure ----------------------------------------------------------------------------------
def test_a_panel_has_every_measured_stage_with_its_interval_and_its_number():
    from matplotlib import pyplot

    stages = ["sft", "rlhf", "ifrl"]
    cells = {}
    for cell in (line("sft", "aime25", 40.0, 3.0), line("ifrl", "aime25", 55.5, 2.0)):
        cells[cell["stage"], "aime25", "think", "sampled"] = cell
    figure, axis = pyplot.subplots()
    plots.draw_panel(axis, cells, stages, ("aime25", "think", "sampled"), {"ifrl": "aime25"})
    assert [text.get_text() for text in axis.texts] == ["40.0", "55.5"]
    curve, *dots = axis.lines
    assert list(curve.get_xdata()) == [0, 2]
    assert [dot.get_color() == plots.OUTLINE for dot in dots] == [False, True]
    ends = [bar.get_segments()[0][:, 1].tolist() for bar in axis.collections]
    assert ends == [pytest.approx([37.0, 43.0]), pytest.approx([53.5, 57.5])]
    pyplot.close(figure)


def test_the_papers_figure_is_drawn_from_its_table(tmp_path):
    """LiveCodeBench v6 of 14B through the cascade: 63.1 after SFT, 74.6 at the end (figure F1)."""
    cells = cells_of(THINKING["14b-thinking"])
    path = tmp_path / "lcb.png"
    columns = [("lcb_v5", ""), ("lcb_v6", "")]
    plots.plot_stages(path, cells, STAGES, columns, TEACHES)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert cells["sft", "lcb_v6", "", "sampled"] == {"score": 0.631}
    assert cells["swerl", "lcb_v6", "", "sampled"] == {"score": 0.746}
    assert FINAL["LiveCodeBench Pro 25Q2 easy"]["14b-thinking"] == 68.9


def test_a_run_has_its_benchmarks_over_the_stages_beside_its_matrix(tmp_path):
    rows = [line("sft", "math", 50.0, 3.0), line("rlhf", "math", 51.0, 3.0)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.draw_matrix(str(tmp_path), evaluate.own_skills())
    assert (tmp_path / "stages.png").exists()
