"""Guards: the vote takes the patch that most samples agree on, and the contest loop learns.

It submits one program a round, remembers its verdicts, and stops at the limit of submissions.
Programs, and the commands that a user brings, really run; only what the model would write is
scripted.
"""

import json
import re
import sys

import pytest
from conftest import run_python
from test_benchmarks import make_swebench, write_jsonl

import sft
from engine import Rollout, TorchEngine, request_seed
from evals import benchmarks, scaling
from lib import data
from model import Qwen3, Qwen3Config, hf_config, load_tokenizer, render_chat

FILES = {"app.py": "def f(x):\n    return x - 1\n", "note.txt": "hi\n"}


def patch(line, comment=""):
    return (
        "<think>x</think>\n```diff\n### app.py\n<<<<<<< SEARCH\n    return x - 1\n=======\n"
        f"    return {line}{comment}\n>>>>>>> REPLACE\n```"
    )


# ---- Majority vote -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "texts, chosen",
    [
        # Comments do not split a vote; of equals the shortest is taken.
        ([patch("x + 1"), patch("x + 2"), patch("x + 1", "  # why")], 0),
        ([patch("x + 1", "  # a long story"), patch("x + 2"), patch("x + 1")], 2),
        # A tie: the shorter one.
        ([patch("x + 2000"), patch("x + 3")], 1),
        # A patch that does not parse has no vote.
        ([patch("x +"), patch("x +"), patch("x + 3")], 2),
        # Patches that change nothing have no vote, though they are many.
        ([patch("x - 1", "  # a"), patch("x - 1", "  # b"), patch("(x - 1)"), patch("x + 1")], 3),
        ([patch("(x - 1)"), patch("x - 1;"), patch("x - 1", "  # a")], None),
        # Nothing was changed, nothing was said.
        ([patch("x - 1"), "no patch"], None),
    ],
)
def test_the_vote_by_hand(texts, chosen):
    assert scaling.vote(texts, FILES) == chosen


def test_a_file_for_another_python_has_a_vote_and_a_new_empty_file_is_a_change():
    old = {"old.py": "print 1\nx = 1\n"}
    assert scaling.normal_patch(old, {"old.py": "print 1\nx = 1  # one\n"}) is None
    assert scaling.normal_patch(old, {"old.py": "print 1\nx = 2\n"})
    assert scaling.normal_patch(FILES, {**FILES, "note.txt": "hi  \n\n"}) is None
    assert scaling.normal_patch(FILES, {**FILES, "p/__init__.py": ""})
    assert scaling.normal_patch(FILES, {**FILES, "app.py": "def f(x:\n"}) is None


# A user's --check. It writes down what it was given; x + 7 breaks the repository's tests.
CHECK = """
import json
import sys

given = json.load(sys.stdin)
with open(sys.argv[1], "a") as f:
    f.write(sys.argv[2] + " " + json.dumps(given) + chr(10))
patch = given["patch"]
passes = {"always": True, "never": False, "plus": "+    return x + " in patch}
regression = 0 if "x + 7" in patch else 5
print(json.dumps({"regression": regression, "scripts": [passes[s] for s in given["scripts"]]}))
"""


def test_3_3_1_regression_then_reproduction_then_the_vote(tmp_path):
    """The command really runs.

    Of the model's scripts, one passes before the patch, one never, and one shows the bug.
    """
    (tmp_path / "check.py").write_text(CHECK)
    command = f"{sys.executable} {tmp_path / 'check.py'} {tmp_path / 'calls'}"
    lines = ("x + 7", "x + 7", "x * 2", "x * 2", "x + 1")
    texts = [patch(line) for line in lines] + ["no patch", patch("x - 1"), patch("x +")]
    row = {"files": FILES, "instance_id": "a__b-1"}

    def check(row, patch, scripts):
        return scaling.run_check(command, row, patch, scripts)

    eligible = scaling.survivors(texts, row, ["always", "never", "plus"], check)
    assert eligible == {4}
    assert scaling.vote(texts, FILES, eligible) == 4
    assert scaling.vote(texts, FILES) == 0, "the majority alone takes what breaks the repository"

    # The repository without a patch is asked first, then each distinct patch once.
    calls = []
    for line in (tmp_path / "calls").read_text().splitlines():
        calls.append(json.loads(line.partition(" ")[2]))
    assert calls[0] == {"patch": "", "scripts": ["always", "never", "plus"]}
    assert len(calls) == 4
    for call in calls[1:]:
        assert call["patch"]
        assert call["scripts"] == ["never", "plus"]
    start = "diff --git a/app.py b/app.py\n--- a/app.py\n+++ b/app.py\n@@"
    assert calls[1]["patch"].startswith(start)


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
    command = f"{sys.executable} {tmp_path / 'check.py'}"
    with pytest.raises(SystemExit) as stop:
        scaling.run_check(command, {"instance_id": "a__b-1"}, "", [])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "a__b-1" in printed


def test_scripts_that_reproduce_are_the_distinct_ones_the_model_writes():
    sample, prompts = scripted([("assert f(1) == 2", 0.0), ("assert f(1) == 2", 0.0), (None, 0.0)])
    row = {"issue": "f is off by two", "messages": [{"content": "unused"}]}
    assert scaling.reproduction_scripts(row, 1, sample, 3) == ["assert f(1) == 2\n"]


# ---- best@k of SWE-bench -------------------------------------------------------------------------
def edit(text):
    return (
        "<think>x</think>\n### calc.py\n<<<<<<< SEARCH\n    return a - b\n=======\n"
        f"    return {text}\n>>>>>>> REPLACE"
    )


# Five samples of one issue, with the harness's scores. Three change nothing but a comment, two
# agree. The thought of the last one is not closed.
PATCHES = [
    (edit("a - b  # one"), 0.0),
    (edit("a - b  # two"), 0.0),
    (edit("a - b  # three"), 0.0),
    (edit("a + b"), 1.0),
    (edit("a + b  # sum"), 1.0),
    ("<think>" + edit("a * b").removeprefix("<think>x</think>"), 0.0),
]


def make_candidates(tmp_path, sampled=PATCHES, num_graded=6, prompt=None):
    """Write SWE-bench of one issue and what evaluate.py leaves of it; return the flags of --vote.

    The samples of swebench_files name calc.py and other.py, which is not in the golden patch.
    """
    write_jsonl(tmp_path / "swebench.jsonl", [make_swebench(tmp_path)])
    cfg = scaling.Config(
        vote=str(tmp_path / "swebench.jsonl"),
        candidates=str(tmp_path / "samples"),
        repos=str(tmp_path),
        samples=len(sampled),
    )
    outside = {
        "samples": cfg.candidates,
        "repos": cfg.repos,
        "prompt_tokens": cfg.prompt_tokens,
    }
    (row,), *_ = benchmarks.load_swebench(cfg.vote, outside)
    assert list(row["files"]) == ["calc.py", "other.py"]
    lines = []
    for k, (text, score) in enumerate(sampled):
        line = {"problem": 0, "sample": k, "text": text, "key": str(k)}
        line["prompt"] = prompt or row["messages"][-1]["content"]
        if k < num_graded:
            line["score"] = score
        lines.append(line)
    # The samples of one issue lie in the files of two ranks.
    write_jsonl(tmp_path / "samples" / "swebench_think_sampled.rank0.jsonl", lines[::2])
    write_jsonl(tmp_path / "samples" / "swebench_think_sampled.rank1.jsonl", lines[1::2])
    return cfg


def test_best_at_k_elects_from_the_localised_patches_and_takes_the_harness_verdict(
    tmp_path, capsys
):
    cfg = make_candidates(tmp_path)

    def sample(conversations, key, row):
        raise AssertionError("nothing has to be sampled without --check")

    mean, elected, best = scaling.run_vote(cfg, sample)
    assert (mean, elected, best) == (pytest.approx(2 / 6), 1.0, 1.0)
    assert "best@6, elected 100.0 | pass@6 100.0" in capsys.readouterr().out


# A user's --check of calc.py: a product breaks the repository's tests.
CALC_CHECK = """
import json
import sys

given = json.load(sys.stdin)
with open(sys.argv[1], "a") as f:
    f.write(given["patch"] + chr(10))
regression = 4 if "a * b" in given["patch"] else 5
print(json.dumps({"regression": regression, "scripts": [False] * len(given["scripts"])}))
"""


def test_7_4_forty_scripts_and_the_repositorys_tests_say_who_may_be_elected(tmp_path):
    majority = [(edit("a * b"), 0.0), (edit("a * b  # times"), 0.0), (edit("a + b"), 1.0)]
    cfg = make_candidates(tmp_path, majority)
    assert scaling.run_vote(cfg, None)[1] == 0.0

    (tmp_path / "check.py").write_text(CALC_CHECK)
    cfg.check = f"{sys.executable} {tmp_path / 'check.py'} {tmp_path / 'calls'}"
    asked = []

    def sample(conversations, key, row):
        asked.extend(messages[0]["content"] for messages in conversations)
        text = "</think>```python\nassert 0\n```"
        return [Rollout(row=row, group=0, prompt_ids=[], seed=0, text=text) for _ in conversations]

    assert scaling.run_vote(cfg, sample)[1] == 1.0
    assert len(asked) == 40
    assert "add subtracts" in asked[0]
    calls = (tmp_path / "calls").read_text()
    assert calls.count("diff --git") == 3


def test_candidates_that_are_not_those_of_the_rows_are_refused(tmp_path, capsys):
    for folder, change, said in (
        ("few", {"num_graded": 4}, "has 4 graded patches of 6"),
        ("other", {"prompt": "another"}, "for another prompt"),
    ):
        (tmp_path / folder).mkdir()
        cfg = make_candidates(tmp_path / folder, **change)
        with pytest.raises(SystemExit) as stop:
            scaling.run_vote(cfg, None)
        assert stop.value.code == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert "me__calc-1" in printed


def test_clones_reach_the_rows_of_swerl(tmp_path):
    """A row of SWE-Gym's form, whose files are in a clone, has a vote: --repos is handed on."""
    write_jsonl(tmp_path / "gym.jsonl", [make_swebench(tmp_path)])
    cfg = scaling.Config(vote=str(tmp_path / "gym.jsonl"), repos=str(tmp_path), samples=2)

    def sample(conversations, key, row):
        row["think"] = True
        texts = (edit("a + b"), edit("a * b"))
        return [Rollout(row=row, group=0, prompt_ids=[], seed=0, text=text) for text in texts]

    mean, _, best = scaling.run_vote(cfg, sample)
    assert (mean, best) == (0.5, 1.0)


# ---- Submit and learn ----------------------------------------------------------------------------
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
RIGHT = "print(sum(map(int, input().split())))"
SMALL = "print(sum(map(int, input().split())) % 100)"  # right as long as the sum has two digits


def scripted(*turns):
    """Return sample() of a model that writes these programs, and the list of its prompts.

    A turn is a list of (program, log-prob) pairs; a program None is a thought that never ends.
    """
    prompts = []
    remaining = iter(turns)

    def sample(conversations, key, row):
        prompts.append(row["messages"][0]["content"])
        rollouts = []
        for code, logprob in next(remaining):
            text = f"<think>x</think>\n```python\n{code}\n```" if code else "<think>hm"
            r = Rollout(row=row, group=0, prompt_ids=[], seed=0, text=text)
            r.sampler_logprobs = [logprob]
            rollouts.append(r)
        return rollouts

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
    assert "both at most 9" in prompts[0]
    assert "earlier submission" not in prompts[0]
    # Round 1, subtask all: the confident candidate fails the tests, and the solved subtask helps.
    assert "This solved subtask small" in prompts[1]
    assert SMALL in prompts[1]
    # Round 2: the verdict is fed back, and the solved subtask is left alone. C.3: the history comes
    # last.
    assert "earned 0% (1 ok, 1 wrong)" in prompts[2]
    assert prompts[2].index("This solved subtask small") < prompts[2].index("earned 0%")
    assert len(prompts) == 3


def test_candidates_that_fail_the_samples_or_have_no_code_cost_no_submission():
    turn = [("print(7)", -0.1), (None, -0.1)]
    sample, prompts = scripted(*[turn] * 6)
    assert scaling.solve(PROBLEM, sample, config()) == (0, 0)
    assert len(prompts) == 6


def test_the_limit_of_submissions_holds_and_the_same_program_is_not_submitted_twice():
    wrong = [f"print(2 if input() == '1 1' else {i})" for i in range(9)]
    turns = [[(program, -0.1), (wrong[0], -0.01)] for program in wrong]
    sample, _ = scripted(*turns)
    assert scaling.solve(PROBLEM, sample, config()) == (0, 3)


def test_a_sandbox_that_fails_is_no_verdict(monkeypatch, capsys):
    """It is asked again, and a third failure ends the run: the program may be right."""
    answers = [["infra"], ["infra"], ["ok"]]
    monkeypatch.setattr("coderl.run_tests", lambda *args, **keywords: answers.pop(0))
    assert scaling.sandbox_judge(RIGHT, PROBLEM, None) == (1.0, "1 ok")
    answers += [["infra"]] * 3
    with pytest.raises(SystemExit) as stop:
        scaling.sandbox_judge(RIGHT, PROBLEM, PROBLEM["subtasks"][0])
    assert stop.value.code == 2
    assert "sum: the sandbox failed 3 times" in capsys.readouterr().err


# A contest's grader: it writes down what it was asked, and takes a C++ program for the share that
# stands in it.
GRADER = """
import json
import re
import sys

code = sys.stdin.read()
with open(sys.argv[1], "a") as f:
    f.write(" ".join(sys.argv[2:]) + chr(10))
score = float(re.search(r"share ([0-9.]+)", code)[1])
if sys.argv[3] == "samples":
    score = 1
print(json.dumps({"score": score, "verdict": f"{score} of the points"}))
"""


def scripted_cpp(*turns):
    """As scripted(), for turns of shares that the program of each candidate will earn."""
    prompts = []
    remaining = iter(turns)

    def sample(conversations, key, row):
        prompts.append(row["messages"][0]["content"])
        rollouts = []
        for share in next(remaining):
            text = f"<think>x</think>\n```cpp\n// share {share}\n```"
            r = Rollout(row=row, group=0, prompt_ids=[], seed=0, text=text)
            r.sampler_logprobs = [-0.1]
            rollouts.append(r)
        return rollouts

    return sample, prompts


def test_partial_points_are_the_graders_and_the_best_are_shown(tmp_path):
    (tmp_path / "grader.py").write_text(GRADER)
    grader = f"{sys.executable} {tmp_path / 'grader.py'} {tmp_path / 'asked'}"
    subtasks = [
        {"name": "all", "points": 70, "partial": True},
        {"name": "exact", "points": 30},
    ]
    problem = {"name": "triples", "statement": "Find all triples.", "subtasks": subtasks}
    scaling.check_problem(problem, "ioi.jsonl row 1", grader)
    # Each round tries both subtasks. Half of "all" is half of its points, half of "exact" nothing.
    shares = [(0.25,), (0.1,), (0.5,), (0.2,), (0.0,), (0.3,)]
    sample, prompts = scripted_cpp(*shares)
    cfg = scaling.Config(samples=1, rounds=6, grader=grader)
    assert scaling.solve(problem, sample, cfg) == (70 * 0.5, 6)
    assert "C++17" in prompts[0]
    # The third attempt at "all" sees its best submission first.
    assert prompts[4].index("earned 50%") < prompts[4].index("earned 25%")
    asked = (tmp_path / "asked").read_text().split("\n")
    assert asked[:3] == ["triples samples", "triples all", "triples exact"]


@pytest.mark.parametrize(
    "program, said",
    [
        ("print(3)", '"3"'),
        ("import sys; sys.exit('no isolate')", '"no isolate"'),
        ('print(\'{"score": 30, "verdict": ""}\')', "0 to 1"),
    ],
)
def test_a_grader_that_does_not_answer_is_one_sentence(program, said, tmp_path, capsys):
    (tmp_path / "grader.py").write_text(program)
    judge = scaling.command_judge(f"{sys.executable} {tmp_path / 'grader.py'}")
    with pytest.raises(SystemExit) as stop:
        judge("int main() {}", {"name": "triples"}, None)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "--grader: on triples samples" in printed


def test_a_problem_that_cannot_be_judged_is_refused_before_sampling(capsys):
    partial = PROBLEM | {"subtasks": [PROBLEM["subtasks"][0] | {"partial": True}]}
    untested = PROBLEM | {"subtasks": [{"name": "small", "points": 30}]}
    for problem, said in ((partial, "pass --grader"), (untested, 'no "tests" field')):
        with pytest.raises(SystemExit):
            scaling.check_problem(problem, "ioi.jsonl row 1", "")
        assert said in capsys.readouterr().err
    scaling.check_problem(PROBLEM, "ioi.jsonl row 1", "")


def test_the_docstrings_ioi_command_has_the_positions_it_needs(tmp_path, capsys):
    """The cascade's own checkpoint has 65,536: the sentence names the factor that it lacks."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}
    config = hf_config(Qwen3Config(max_position_embeddings=65536, rope_scaling=yarn))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (command,) = re.findall(r"--ioi=\S+ (.*)", scaling.__doc__)
    flags = dict(flag.removeprefix("--").split("=") for flag in command.split())
    tokens = int(flags["max_new_tokens"])
    factor = float(flags["rope_factor"])
    cfg = scaling.Config(model=str(tmp_path), ioi="x", max_new_tokens=tokens, rope_factor=factor)
    assert scaling.check_flags(cfg) == tokens == 128 * 1024
    cfg.rope_factor = 0.0
    with pytest.raises(SystemExit) as stop:
        scaling.check_flags(cfg)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "has 65536 positions: pass --rope_factor=4" in printed


def test_only_the_last_failures_are_shown():
    failures = [scaling.Submission(f"print({i})\n", 0.0, "1 wrong") for i in range(9)]
    text = scaling.attempt_prompt(PROBLEM, PROBLEM["subtasks"][0], failures, {})
    assert [i for i in range(9) if f"print({i})" in text] == [4, 5, 6, 7, 8]


# ---- On a model ----------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_vote_runs_on_a_checkpoint(taught, world, capsys):
    cfg = scaling.Config(vote=str(world / "swe_test.jsonl"), samples=2, limit=3)
    mean, voted, best = scaling.run_vote(cfg, make_sample(taught))
    assert 0 <= voted <= best <= 1
    assert mean <= best
    assert "best@2, elected" in capsys.readouterr().out


@pytest.mark.slow
def test_prompt_and_completion_share_the_positions_of_the_model(world, tmp_path):
    """As many new tokens as there are positions are no IndexError: a prompt shortens them, and one
    that fills them is skipped."""
    long = PROBLEM | {"name": "long", "statement": "Read two numbers. " * 2000}
    write_jsonl(tmp_path / "ioi.jsonl", [PROBLEM, long])
    positions = Qwen3.from_pretrained(world / "base").max_positions()
    flags = ["--ioi=" + str(tmp_path / "ioi.jsonl"), "--samples=2", "--rounds=1"]
    flags += [f"--model={world}/base", f"--max_new_tokens={positions}"]
    _, printed, _ = run_python("-m", "evals.scaling", *flags)
    assert printed.count(f"fills all {positions} positions: skipped") == 2  # both subtasks
    assert "2 problems, 0 points with 0 submissions" in printed


def make_sample(folder):
    tokenizer = load_tokenizer(folder)
    engine = TorchEngine(Qwen3.from_pretrained(folder), tokenizer)

    def sample(conversations, key, row):
        rollouts = []
        for k, messages in enumerate(conversations):
            prompt_ids = render_chat(tokenizer, messages, True)[0]
            seed = request_seed(key, k)
            rollouts.append(Rollout(row=row, group=0, prompt_ids=prompt_ids, seed=seed))
        engine.generate(rollouts, 60, 1.0)
        return rollouts

    return sample


# ---- Localisation demonstrations -----------------------------------------------------------------
def test_localisation_answers_that_name_every_golden_file_become_rows_for_sft(tmp_path, capsys):
    """Five answers: right, right among others, wrong, no closed thought, cut off.

    Two are kept, and sft.py reads them.
    """
    swebench = make_swebench(tmp_path)
    texts = [
        "<think>hm</think>calc.py",
        "<think>hm</think>1. `other.py`\n2. `calc.py`",
        "<think>hm</think>other.py",
        "<think>calc.py",
        "<think>hm</think>calc.py",
    ]
    reasons = ["stop", "stop", "stop", "stop", "length"]
    asked = []

    def sample(conversations, key, row):
        asked.append(conversations[0][0]["content"])
        rollouts = []
        for text, reason in zip(texts, reasons, strict=True):
            r = Rollout(row=row, group=0, prompt_ids=[], seed=0, text=text, finish_reason=reason)
            rollouts.append(r)
        return rollouts

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
    assert "add subtracts" in asked[0]
    assert "\nother.py\n" in asked[0]
    assert "test_calc.py" not in asked[0]
    assert "2 of 5 answers name every file" in capsys.readouterr().out
    rows = data.load_table(str(out), sft.normalize)
    assert [row["messages"][-1]["content"] for row in rows] == texts[:2]
    assert {(row["category"], row["think"]) for row in rows} == {("swe_localization", True)}
    assert rows[0]["messages"][0]["content"] == asked[0]
