"""What the paper keeps from stage to stage is the same text in all RL scripts; what differs is
listed here, by name.

Read the table EXPECTED as the paper's summary: `changed` names what a stage does in another way
than Math RL, `absent` what it does without, and `own` what it needs besides. A fix below the
waterline is made in all scripts in one commit, or these tests fail.
"""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WATERLINE = "# ~~~~~~~~ waterline"

# Every stage has its own version of these: knobs, data, reward, what it logs, what it measures.
EVERY_STAGE = {
    "Config",
    "load_rows",
    "select_rows",
    "make_reward",
    "monitor",
    "self_test",
    "metric",
}

# Only Math RL has this one: the answer of its data sets stands under one of several names.
MATH_RL = {"find_answer"}

DISTILL = {"compute_advantages", "grpo_loss"}
JOIN = {"rollout", "grpo_loss"}

EXPECTED = {
    # The reward is a Bradley-Terry model (verifiers/reward_model.py), trained first, or an
    # endpoint. The loss has stabilisers for small reward models (6.3).
    "rlhf.py": {
        "changed": {"normalize", "grpo_loss"},
        "absent": {"verdict", "reward", "judge"},
        "own": {
            "thinks_at",
            "answer_of",
            "find_mixed",
            "status_of",
            "lowest_ok_score",
            "mean_and_std",
            "shape_rewards",
            "reward_model_path",
            "reference_model",
            "reference_logprobs",
        },
    },
    # The reward says whether all constraints of the prompt hold. For thinking models the reward
    # model's preference is added (4.4).
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
    # The reward says whether all unit tests pass (verifiers/programs.py) in the sandbox (4.6).
    "coderl.py": {
        "changed": {"normalize", "verdict", "reward", "judge"},
        "absent": set(),
        "own": {"statement", "shown_header", "join_parts", "normal_tests"},
    },
    # The reward compares the edits (verifiers/patches.py) with the golden patch and runs nothing.
    # Edits that do not apply earn -1 (4.7).
    "swerl.py": {
        "changed": {"normalize", "verdict", "reward"},
        "absent": {"judge"},
        "own": {
            "find_issue",
            "own_prompt",
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
    # There is no reward: teachers give every token an advantage (Cascade 2, 4.4).
    "extras/mopd.py": {
        "changed": DISTILL,
        "absent": {"normalize", "verdict", "reward", "judge"},
        "own": {"load_domain", "load_teacher", "ask_teacher", "differences"},
    },
    # Every rollout has the reward, the masks and the KL term of its own domain's stage.
    "extras/jointrl.py": {
        "changed": JOIN,
        "absent": {"normalize", "verdict", "reward", "judge"},
        "own": {
            "parse_domains",
            "domains_of",
            "take_prompts",
            "reference_model",
            "add_reference",
            "fresh_prompts",
        },
    },
}

# The functions that differ from Math RL's below the waterline.
BELOW = {
    "rlhf.py": {"grpo_loss"},
    "ifrl.py": {"rollout"},
    "coderl.py": set(),
    "swerl.py": set(),
    "extras/mopd.py": DISTILL,
    "extras/jointrl.py": JOIN,
}


def top_level(text):
    """Map the name of every top-level function and class to its lines, decorators and comments
    included."""
    lines = text.splitlines()
    named = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            # Decorators stand above the line of the name.
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
    """The functions that differ are taken out of both texts. The rest is equal, comments and blank
    lines included."""
    ours, canon = "\n".join(below(script)), "\n".join(below("mathrl.py"))
    # The text begins in the middle of the waterline: "#" makes its first line a comment.
    a, b = top_level("#" + ours), top_level("#" + canon)
    assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == BELOW[script]
    for name in BELOW[script]:
        ours = ours.replace("\n".join(a[name]), name)
        canon = canon.replace("\n".join(b[name]), name)
    assert ours.splitlines() == canon.splitlines()


@pytest.mark.parametrize("script", EXPECTED)
def test_a_change_below_the_waterline_says_why(script):
    text = top_level("#" + "\n".join(below(script)))
    for name in BELOW[script]:
        assert any("# CHANGED: " in line and "paper" in line for line in text[name]), name


@pytest.mark.parametrize("script", EXPECTED)
def test_a_stage_differs_from_mathrl_only_where_the_table_says(script):
    """The sets are equal, not only included, so the table cannot go stale."""
    ours, canon = functions(script), functions("mathrl.py")
    expected = EXPECTED[script]
    changed = {name for name in ours.keys() & canon.keys() if ours[name] != canon[name]}
    assert changed == EVERY_STAGE | expected["changed"]
    assert canon.keys() - ours.keys() == MATH_RL | expected["absent"]
    assert ours.keys() - canon.keys() == expected["own"]


def test_stages_share_rewards_where_they_are_taught_and_nothing_else():
    """No stage imports another one at its top. Inside a function, SWE RL's evaluation imports Code
    RL to run the tests."""
    stages = {"sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl", "extras/mopd", "extras/jointrl"}
    shared = {}
    for stage in stages | {"verifiers/reward_model", "verifiers/constraints", "verifiers/patches"}:
        tree = ast.parse((ROOT / f"{stage}.py").read_text())
        for node in ast.walk(tree):
            names = set()
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {node.module}
            if names & stages:
                assert node not in tree.body, f"{stage}.py imports {names} at its top"
                shared[stage] = names & stages
    assert shared == {"swerl": {"coderl"}}


# ---- The diff in README.md -----------------------------------------------------------------------
def verdict_of(script):
    """The lines of a stage's function verdict()."""
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
    """When this fails, `python tests/test_stage_diff.py` writes the diff anew."""
    readme = (ROOT / "README.md").read_text()
    assert readme == with_real_diff(readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_real_diff(path.read_text()))
