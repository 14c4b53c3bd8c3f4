"""Guards: what the paper keeps from stage to stage is the same text in all five RL scripts; what
differs is listed here, by name.

Read the table as the paper's summary: what each stage has instead of Math RL's (`changed`), and
what it needs besides (`own`). A fix below the waterline is made in all five scripts in one
commit, or this fails.
"""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WATERLINE = "# ~~~~~~~~ waterline"

# Every stage has its own of these: knobs, data, reward, what is logged, what is measured.
EVERY_STAGE = {
    "Config",
    "load_rows",
    "select_rows",
    "make_reward",
    "monitor",
    "self_test",
    "metric",
}

# What only Math RL has: the answer stands under one of several names.
MATH_RL = {"find_answer"}

DISTILL = {"compute_advantages", "grpo_loss"}

EXPECTED = {
    # Reward: a Bradley-Terry model (reward_model.py), trained first, or somebody's endpoint. Loss:
    # stabilisers for small reward models (6.3).
    "rlhf.py": {
        "changed": {"normalize", "grpo_loss"},
        "absent": {"verdict", "reward", "judge"},
        "own": {
            "answer_of",
            "status_of",
            "lowest_ok_score",
            "mean_and_std",
            "shape_rewards",
            "reward_model_path",
            "reference_model",
            "reference_logprobs",
        },
    },
    # Reward: all constraints of the prompt hold, and for thinking models the reward model's
    # preference on top (4.4).
    "ifrl.py": {
        "changed": {"normalize", "reward", "rollout"},
        "absent": {"verdict", "judge"},
        "own": {
            "read_constraints",
            "is_list_of",
            "taxonomy_of",
            "answer_of",
            "verify",
            "add_preference",
            "extremes",
        },
    },
    # Reward: all unit tests pass (verifiers/programs.py), in the sandbox (4.6).
    "coderl.py": {
        "changed": {"normalize", "verdict", "reward", "judge"},
        "absent": set(),
        "own": {"statement", "shown_header", "join_parts", "normal_tests"},
    },
    # Reward: edits (patches.py) against the golden patch, nothing is run; -1 for edits that do not
    # apply (4.7).
    "swerl.py": {
        "changed": {"normalize", "verdict", "reward"},
        "absent": {"judge"},
        "own": {
            "find_issue",
            "source_files",
            "read_files",
            "read_commit",
            "read_clone",
            "git",
            "choose_files",
            "lexical_judge",
            "judge_rollout",
        },
    },
    # No reward at all: teachers speak about each token (Cascade 2, 4.4).
    "extras/mopd.py": {
        "changed": DISTILL,
        "absent": {"normalize", "verdict", "reward", "judge"},
        "own": {"load_domain", "load_teacher", "ask_teacher", "differences"},
    },
}
# what differs below the waterline
BELOW = {
    "rlhf.py": {"grpo_loss"},
    "ifrl.py": {"rollout"},
    "coderl.py": set(),
    "swerl.py": set(),
    "extras/mopd.py": DISTILL,
}


def top_level(text):
    """{name: its lines, decorators and comments included} of every top-level function, class and
    assignment."""
    lines, named = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            named[node.name] = lines[first - 1 : node.end_lineno]
    return named


def functions(script):
    return top_level((ROOT / script).read_text())


def below(script):
    """The lines under the waterline."""
    _, _, rest = (ROOT / script).read_text().partition(WATERLINE)
    assert rest, f"{script} has no waterline"
    return rest.splitlines()


@pytest.mark.parametrize("script", EXPECTED)
def test_below_the_waterline_a_stage_is_mathrl_line_for_line(script):
    """Names that differ are taken out of both; everything else, comments and blank lines between
    functions included, is equal."""
    ours, canon = "\n".join(below(script)), "\n".join(below("mathrl.py"))
    a, b = top_level("#" + ours), top_level("#" + canon)
    assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == BELOW[script]
    for name in BELOW[script]:
        ours, canon = (
            ours.replace("\n".join(a[name]), name),
            canon.replace("\n".join(b[name]), name),
        )
    assert ours.splitlines() == canon.splitlines()


@pytest.mark.parametrize("script", EXPECTED)
def test_a_change_below_the_waterline_says_why(script):
    text = top_level("#" + "\n".join(below(script)))
    assert all(
        any("# CHANGED: " in line and "paper" in line for line in text[name])
        for name in BELOW[script]
    )


@pytest.mark.parametrize("script", EXPECTED)
def test_a_stage_differs_from_mathrl_only_where_the_table_says(script):
    """Equality, not inclusion: the table cannot go stale."""
    ours, canon, expected = functions(script), functions("mathrl.py"), EXPECTED[script]
    assert {n for n in ours.keys() & canon.keys() if ours[n] != canon[n]} == EVERY_STAGE | expected[
        "changed"
    ]
    assert canon.keys() - ours.keys() == MATH_RL | expected["absent"]
    assert ours.keys() - canon.keys() == expected["own"]


def test_stages_share_rewards_where_they_are_taught_and_nothing_else():
    """SWE evaluation runs Code RL's tests, inside a function."""
    stages, shared = {"sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl", "extras/mopd"}, {}
    for stage in stages | {"verifiers/reward_model", "verifiers/constraints", "verifiers/patches"}:
        tree = ast.parse((ROOT / f"{stage}.py").read_text())
        for node in ast.walk(tree):
            names = (
                {a.name for a in node.names}
                if isinstance(node, ast.Import)
                else {getattr(node, "module", "")}
                if isinstance(node, ast.ImportFrom)
                else set()
            )
            if names & stages:
                assert node not in tree.body, f"{stage}.py imports {names} at its top"
                shared[stage] = names & stages
    assert shared == {"swerl": {"coderl"}}


# ---- The diff in README.md -----------------------------------------------------------------------
def verdict_of(script):
    """The lines of a stage's verdict()."""
    text = (ROOT / script).read_text()
    found = re.search(r"^def verdict\(.*?(?=\n\n\n)", text, re.DOTALL | re.MULTILINE)
    return found[0].split("\n")


def with_real_diff(readme):
    """The text of README.md with the diff of the two verdicts between its two marks."""
    diff = difflib.unified_diff(verdict_of("mathrl.py"), verdict_of("coderl.py"), lineterm="", n=99)
    # The first three lines are the names of the files and the position: nobody needs them here.
    block = "```diff\n" + "\n".join(list(diff)[3:]) + "\n```"
    before, mark, rest = readme.partition("<!-- from the code")
    comment, end_of_comment, rest = rest.partition("-->\n")
    _, end_mark, after = rest.partition("\n<!-- end -->")
    assert mark and end_mark, "README.md has lost the marks around the diff"
    return before + mark + comment + end_of_comment + block + end_mark + after


def test_the_diff_in_the_readme_is_the_real_one():
    """If not: python tests/test_stage_diff.py writes it."""
    readme = (ROOT / "README.md").read_text()
    assert readme == with_real_diff(readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_real_diff(path.read_text()))
