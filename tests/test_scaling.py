"""Guards: the vote takes the patch that most samples agree on, and the contest loop submits one program a round, remembers its
verdicts, and stops at the limit of submissions. Programs really run; only what the model would write is scripted.
"""

import json
import sys

import pytest
from test_benchmarks import swebench  # noqa: F401  a repository with calc.py to mend, other.py, and a test file

import sft
from engine import Rollout
from evals import scaling
from lib import data

FILES = {"app.py": "def f(x):\n    return x - 1\n", "note.txt": "hi\n"}


def patch(line, comment=""):
    return f"<think>x</think>\n```diff\n### app.py\n<<<<<<< SEARCH\n    return x - 1\n=======\n    return {line}{comment}\n>>>>>>> REPLACE\n```"


def test_the_vote_by_hand():
    # comments do not split a vote; shortest
    assert scaling.vote([patch("x + 1"), patch("x + 2"), patch("x + 1", "  # why")], FILES) == 0
    assert (
        scaling.vote([patch("x + 1", "  # a long story"), patch("x + 2"), patch("x + 1")], FILES)
        == 2
    )
    assert scaling.vote([patch("x + 2000"), patch("x + 3")], FILES) == 1  # a tie: the shorter one
    # what does not parse has no vote
    assert scaling.vote([patch("x +"), patch("x +"), patch("x + 3")], FILES) == 2
    # nothing changed, nothing said
    assert scaling.vote([patch("x - 1"), "no patch"], FILES) is None


CHECK = """
import json, sys
given = json.load(sys.stdin)
open(sys.argv[1], "a").write(sys.argv[2] + " " + json.dumps(given) + chr(10))
patch = given["patch"]
passes = lambda script: {"always": True, "never": False, "plus": "+    return x + " in patch}[script]
print(json.dumps({"regression": 0 if "x + 7" in patch else 5, "scripts": [passes(s) for s in given["scripts"]]}))
"""


def test_3_3_1_regression_then_reproduction_then_the_vote(tmp_path):
    """A repository whose tests x + 7 breaks; of the model's scripts, one shows the bug, one passes before, one never. The command really runs."""
    (tmp_path / "check.py").write_text(CHECK)
    command = f"{sys.executable} {tmp_path / 'check.py'} {tmp_path / 'calls'}"
    texts = [
        patch("x + 7"),
        patch("x + 7"),
        patch("x * 2"),
        patch("x * 2"),
        patch("x + 1"),
        "no patch",
        patch("x - 1"),
        patch("x +"),
    ]
    row = {"files": FILES, "instance_id": "a__b-1"}
    fit = scaling.survivors(
        texts, row, ["always", "never", "plus"], lambda *args: scaling.run_check(command, *args)
    )
    assert fit == {4} and scaling.vote(texts, FILES, fit) == 4
    assert scaling.vote(texts, FILES) == 0, "the majority alone takes what breaks the repository"
    calls = [
        json.loads(line.partition(" ")[2]) for line in (tmp_path / "calls").read_text().splitlines()
    ]
    assert [(c["patch"] != "", c["scripts"]) for c in calls] == [
        (False, ["always", "never", "plus"])
    ] + [(True, ["never", "plus"])] * 3
    assert calls[1]["patch"].startswith(
        "diff --git a/app.py b/app.py\n--- a/app.py\n+++ b/app.py\n@@"
    )


@pytest.mark.parametrize(
    "program, said",
    [
        ("print(3)", '"3"'),
        ("import sys; sys.exit('no docker')", '"no docker"'),
        ("print('{}')", "expected"),
    ],
)
def test_a_check_that_does_not_answer_is_one_sentence(program, said, tmp_path, capsys):
    (tmp_path / "check.py").write_text(program)
    with pytest.raises(SystemExit) as stop:
        scaling.run_check(
            f"{sys.executable} {tmp_path / 'check.py'}", {"instance_id": "a__b-1"}, "", []
        )
    assert (
        stop.value.code == 2
        and said in (printed := capsys.readouterr().err)
        and "a__b-1" in printed
    )


def test_scripts_that_reproduce_are_the_distinct_ones_the_model_writes():
    sample, prompts = scripted([("assert f(1) == 2", 0.0), ("assert f(1) == 2", 0.0), (None, 0.0)])
    row = {"issue": "f is off by two", "messages": [{"content": "unused"}]}
    assert scaling.reproduction_scripts(row, 1, sample, 3) == ["assert f(1) == 2\n"]


PROBLEM = {
    "name": "sum",
    "statement": "Read two numbers.",
    "samples": {"inputs": ["1 1\n"], "outputs": ["2\n"]},
    "subtasks": [
        {
            "name": "small",
            "points": 30,
            "statement": "both at most 9",
            "tests": {"inputs": ["2 3\n", "4 4\n"], "outputs": ["5\n", "8\n"]},
        },
        {
            "name": "all",
            "points": 70,
            "tests": {"inputs": ["2 3\n", "50 60\n"], "outputs": ["5\n", "110\n"]},
        },
    ],
}
RIGHT, SMALL = (
    "print(sum(map(int, input().split())))",
    "print(sum(map(int, input().split())) % 100)",
)


def scripted(*turns):
    """sample() of a model that writes these programs, call after call; the prompts it was given."""
    prompts, turns = [], iter(turns)

    def sample(conversations, key, row):
        prompts.append(row["messages"][0]["content"])
        programs = next(turns)
        return [
            Rollout(
                row=row,
                group=0,
                prompt_ids=[],
                seed=0,
                text=f"<think>x</think>\n```python\n{code}\n```" if code else "<think>hm",
                sampler_logprobs=[sure],
            )
            for code, sure in programs
        ]

    return sample, prompts


def config(**changes):
    return scaling.Config(samples=2, rounds=3, **changes)


def test_a_submission_scores_every_subtask_and_the_rest_learns_from_it():
    sample, prompts = scripted(
        [(SMALL, -0.5), ("print(3)", -0.1)],
        [(SMALL + " ", -0.2), (RIGHT, -0.9)],
        [(RIGHT, -0.9), (None, 0.0)],
    )
    assert scaling.solve(PROBLEM, sample, config()) == (100, 3)
    assert "both at most 9" in prompts[0] and "earlier submission" not in prompts[0]
    # round 1, subtask all: the confident one fails its tests
    assert "This solved subtask small" in prompts[1] and SMALL in prompts[1]
    # round 2: the verdict is fed back, small is left alone
    assert "earned 50% (1 ok, 1 wrong)" in prompts[2] and len(prompts) == 3


def test_candidates_that_fail_the_samples_or_have_no_code_cost_no_submission():
    sample, prompts = scripted(*[[("print(7)", -0.1), (None, -0.1)]] * 6)
    assert scaling.solve(PROBLEM, sample, config()) == (0, 0) and len(prompts) == 6


def test_the_limit_of_submissions_holds_and_the_same_program_is_not_submitted_twice():
    wrong = [f"print(2 if input() == '1 1' else {i})" for i in range(9)]
    sample, _ = scripted(*[[(w, -0.1), (wrong[0], -0.01)] for w in wrong])
    assert scaling.solve(PROBLEM, sample, config()) == (0, 3)


def test_partial_subtasks_keep_their_share_and_show_the_best():
    problem = PROBLEM | {"subtasks": [PROBLEM["subtasks"][1] | {"partial": True}]}
    sample, prompts = scripted(
        [(SMALL, -0.1)] * 2, [("print(2)", -0.1)] * 2, [("print(2 )", -0.1)] * 2
    )
    assert scaling.solve(problem, sample, config()) == (35, 3)
    assert prompts[2].index("earned 50%") < prompts[2].index("earned 0%")


def test_only_the_last_failures_are_shown():
    memory = [(f"print({i})\n", 0.0, "1 wrong") for i in range(9)]
    text = scaling.attempt_prompt(PROBLEM, PROBLEM["subtasks"][0], memory, {})
    assert [i for i in range(9) if f"print({i})" in text] == [4, 5, 6, 7, 8]


@pytest.mark.slow
def test_the_vote_runs_on_a_checkpoint(taught, world, capsys):
    mean, voted, best = scaling.run_vote(
        scaling.Config(vote=str(world / "swe_test.jsonl"), samples=2, limit=3), make_sample(taught)
    )
    assert 0 <= voted <= best <= 1 and mean <= best and "majority of 2" in capsys.readouterr().out


def make_sample(folder):
    from engine import TorchEngine, request_seed
    from model import Qwen3, load_tokenizer, render_chat

    tokenizer = load_tokenizer(folder)
    engine = TorchEngine(Qwen3.from_pretrained(folder), tokenizer)

    def sample(conversations, key, row):
        rollouts = [
            Rollout(
                row=row,
                group=0,
                prompt_ids=render_chat(tokenizer, m, True)[0],
                seed=request_seed(key, k),
            )
            for k, m in enumerate(conversations)
        ]
        engine.generate(rollouts, 60, 1.0)
        return rollouts

    return sample


def test_localisation_answers_that_name_every_golden_file_become_rows_for_sft(
    tmp_path, swebench, capsys
):  # noqa: F811
    """Five answers: right, right among others, wrong, no closed thought, cut off. Two are kept, and sft.py reads them."""
    said = ["calc.py", "1. `other.py`\n2. `calc.py`", "other.py", None, "calc.py"]
    asked = []

    def sample(conversations, key, row):
        asked.append(conversations[0][0]["content"])
        return [
            Rollout(
                row=row,
                group=0,
                prompt_ids=[],
                seed=0,
                text=f"<think>hm</think>{t}" if t else "<think>calc.py",
                finish_reason="length" if i == 4 else "stop",
            )
            for i, t in enumerate(said)
        ]

    (tmp_path / "rows.jsonl").write_text(json.dumps(swebench) + "\n")
    out = tmp_path / "sft.jsonl"
    cfg = scaling.Config(
        localise=str(tmp_path / "rows.jsonl"),
        repos=str(tmp_path),
        out=str(out),
        samples=5,
        model="teacher",
    )
    assert scaling.run_localise(cfg, sample) == (2, 1)
    assert (
        "add subtracts" in asked[0]
        and "\nother.py\n" in asked[0]
        and "test_calc.py" not in asked[0]
    )
    assert "2 of 5 answers name every file" in capsys.readouterr().out
    rows = data.load_table(str(out), sft.normalize)
    assert [r["messages"][-1]["content"] for r in rows] == [
        "<think>hm</think>calc.py",
        "<think>hm</think>1. `other.py`\n2. `calc.py`",
    ]
    assert {(r["category"], r["think"]) for r in rows} == {("swe_localization", True)} and rows[0][
        "messages"
    ][0]["content"] == asked[0]
