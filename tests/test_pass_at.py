"""Guards: pass@k is the share of draws of k samples that have a right one among them, its intervals
are over problems, and evaluate.py, the table, the plot and the page say the same.
"""

import itertools
import json

import numpy as np
import pytest
from conftest import run_python
from test_evaluate import cell, read_jsonl, write_jsonl
from test_report import write_report

import evaluate
from evals import pass_at


def line(stage, right, samples=4, task="math", decoding="sampled", ks=(1, 2, 4)):
    """A result line with pass@k: `right` says how many samples of each problem are right."""
    scores_PG = [[1.0] * c + [0.0] * (samples - c) for c in right]
    found = cell(stage, task, 50, 40) | {"decoding": decoding, "n": len(right)}
    return found | {"samples": samples, "tokens": 9.0} | pass_at.fields(scores_PG, ks)


# ---- The estimator -------------------------------------------------------------------------------
def literal(scores, k):
    """The share of all subsets of k samples with a right one among them, by enumeration."""
    subsets = list(itertools.combinations(scores, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def test_the_estimate_is_the_share_of_all_subsets_with_a_right_sample():
    errors = []
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c <= n and k <= n:
            scores = [True] * c + [False] * (n - c)
            errors.append(abs(pass_at.pass_at(n, c, k) - literal(scores, k)))
    print(f"{len(errors)} cases: max difference {max(errors):.1e}, tolerance 1e-12")
    assert max(errors) < 1e-12
    assert pass_at.pass_at(16, 1, 16) == 1.0
    assert pass_at.pass_at(16, 0, 16) == 0.0
    assert pass_at.pass_at(10, 3, 1) == pytest.approx(0.3)


def test_the_estimate_is_unbiased():
    """A policy that is right with chance p has pass@k = 1 - (1 - p)^k, whatever n was drawn."""
    p, k, n = 0.3, 3, 5
    expected = 0.0
    for scores in itertools.product([True, False], repeat=n):
        c = sum(scores)
        expected += p**c * (1 - p) ** (n - c) * pass_at.pass_at(n, c, k)
    print(f"difference {abs(expected - (1 - (1 - p) ** k)):.1e}, tolerance 1e-12")
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_intervals_resample_problems_and_only_a_full_score_is_right():
    scores_PG = [[1.0, 0.8, 0.0, 1.0], [0.99, 0.8, 0.6, 0.0]] * 50
    found = pass_at.fields(scores_PG, [4, 1])
    assert found["right"] == [2, 0] * 50
    mean, low, high = found["pass_at"]["4"]
    assert mean == 0.5
    # 100 problems, half of them solved: the standard error is 0.05.
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)
    assert found["pass_at"]["1"][0] == 0.25
    assert json.loads(json.dumps(found)) == found


def test_a_gain_is_resampled_in_pairs():
    """Each problem gains as much: however different the problems are, the gain is certain."""
    right = np.arange(11)
    before, after = line("sft", right, samples=20), line("mathrl", right + 5, samples=20)
    assert pass_at.gain(before, after, 1) == pytest.approx((0.25, 0.25, 0.25))
    apart = before["pass_at"]["1"][2] - before["pass_at"]["1"][1]
    assert apart > 0.15


# ---- evaluate.py ---------------------------------------------------------------------------------
def test_evaluate_draws_as_many_samples_as_the_largest_k():
    def samples(**flags):
        return evaluate.protocol("math", evaluate.Config(**flags))["samples"]

    assert (samples(), samples(pass_at="1,8"), samples(pass_at="4", samples=32)) == (2, 8, 32)
    how = evaluate.protocol("math", evaluate.Config())
    cfg = evaluate.Config(decodings="paper,greedy")
    assert list(evaluate.variants_of("math", how, cfg)) == ["paper", "greedy"]
    assert list(evaluate.variants_of("math", how, evaluate.Config())) == [
        "sampled",
        "paper",
        "greedy",
    ]
    for flags in ({"pass_at": "1,x"}, {"pass_at": "0"}, {"decodings": "sampled,hot"}):
        with pytest.raises(SystemExit):
            evaluate.check_flags(["math"], evaluate.Config(model="nowhere", **flags))


@pytest.mark.slow
def test_result_lines_get_pass_at_beside_what_they_had(world, tmp_path):
    """The samples of an earlier run are used again, and its lines stay as they are."""
    common = ["evaluate.py", f"--model={world}/base", f"--data={world}", "--tasks=math"]
    common += ["--stage=sft", "--max_new_tokens=8", "--limit=3"]
    run_python(*common, f"--results={tmp_path}/results.jsonl")
    earlier = (tmp_path / "results.jsonl").read_text()
    kept = tmp_path / "samples" / "sft" / "math_think_sampled.rank0.jsonl"
    first = {row["key"] for row in read_jsonl(kept)}
    assert len(first) == 3 * 2

    flags = ["--pass_at=1,4", "--decodings=sampled", f"--results={tmp_path}/passk.jsonl"]
    run_python(*common, *flags)
    assert (tmp_path / "results.jsonl").read_text() == earlier
    (found,) = read_jsonl(tmp_path / "passk.jsonl")
    assert (found["decoding"], found["samples"], len(found["right"])) == ("sampled", 4, 3)
    assert set(found["pass_at"]) == {"1", "4"}
    keys = {row["key"] for row in read_jsonl(kept)}
    assert first < keys
    assert len(keys) == 3 * 4


# ---- Table, plot and page ------------------------------------------------------------------------
@pytest.fixture()
def run(tmp_path):
    """Math before and after its stage, in two decodings; its hard problems in one."""
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 3, 60), rng.integers(1, 5, 60)
    kept = [
        line("mathrl", low),
        line("ifrl", low, decoding="paper"),
        line("mathrl", high, decoding="paper"),
        line("ifrl", low),
        line("mathrl", high),  # measured again: it replaces the first line
        line("ifrl", low, task="math_hard"),
        line("mathrl", low, task="math_hard"),
        line("mathrl_rejection", low),
    ]
    write_jsonl(tmp_path / "passk.jsonl", kept)
    measured = [cell("ifrl", "math", 40, 40), cell("mathrl", "math", 80, 40)]
    measured += [cell("mathrl_control", "math", 41, 40), cell("mathrl_rejection", "math", 60, 40)]
    write_jsonl(tmp_path / "results.jsonl", [row | {"tokens": 9.0} for row in measured])
    return tmp_path


def test_the_table_has_each_stage_after_the_one_before(run, capsys):
    found = pass_at.read_pass_at(str(run))
    assert list(found) == [
        ("math", "think", "sampled"),
        ("math", "think", "paper"),
        ("math_hard", "think", "sampled"),
    ]
    assert list(found["math", "think", "sampled"]) == ["ifrl", "mathrl"]

    ks, rows = pass_at.table_of(str(run))
    assert ks == [1, 2, 4]
    assert [row[:4] for row in rows] == [
        ["mathrl", "math", "think", "sampled"],
        ["mathrl", "math", "think", "paper"],
        ["mathrl", "math_hard", "think", "sampled"],
    ]
    assert rows[2][4].endswith("[+0, +0]")
    before = found["math", "think", "sampled"]["ifrl"]["pass_at"]["4"][0]
    assert rows[0][6].startswith(f"{100 * before:.1f} -> 100.0 [+")
    pass_at.print_pass_at(str(run))
    *_, head, _, _, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["pass@1", "pass@2", "pass@4"]
    assert last.split()[:4] == ["mathrl", "math_hard", "think", "sampled"]


def test_the_plot_and_the_page_show_it(run, capsys):
    data, text = write_report(run)
    assert (run / "passk.png").stat().st_size > 5000
    assert [(panel["task"], len(panel["curves"])) for panel in data["pass_at"]] == [
        ("math", 2),
        ("math_hard", 2),
    ]
    stage, decoding, points = data["pass_at"][0]["curves"][1]
    assert (stage, decoding, [k for k, *_ in points]) == ("mathrl", "sampled", [1, 2, 4])
    assert "| mathrl | math | think | paper |" in text
    assert "pass@k before -> after the stage" in capsys.readouterr().out


def test_both_controls_stand_beside_their_stage(run, capsys):
    data, text = write_report(run)
    printed = capsys.readouterr().out
    assert "| more SFT  41.0 [" in printed
    assert "| SFT on own samples that passed  60.0 [" in printed
    (row,) = data["controls"]
    assert row[:4] == ["mathrl", "math", "think", "sampled"]
    assert [line["stage"] for line in row[4]] == [
        "ifrl",
        "mathrl",
        "mathrl_control",
        "mathrl_rejection",
    ]
    assert "more SFT | SFT on own samples that passed |" in text
    assert data["stages"] == ["ifrl", "mathrl"]


def test_nothing_is_drawn_where_nothing_was_measured(tmp_path, capsys):
    pass_at.plot_pass_at(str(tmp_path), {})
    pass_at.print_pass_at(str(tmp_path))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
