"""Code RL reads six public schemas into one form, and pays only if a program passes every test.

Guarded: what is dropped and why; LiveCodeBench's comparison rules; extraction after the last
</think>; the language rule; the reward hook verifying in the background; the self test noticing
wrong tests. Nothing here needs a network or a GPU.
"""

import json
import os
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coderl
from lib.data import BadRow
from verifiers import programs

STDIN = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"], "fn_name": None, "time_limit": None}
CALL = {
    "inputs": ["[1, 2]\n3", '[]\n"a"'],
    "outputs": ["[3]", "true"],
    "fn_name": "f",
    "time_limit": None,
}
PAIRS = [{"input": "1\n", "output": "2\n"}, {"input": "2\n", "output": "4\n"}]

ROWS = {  # schema: (row without a statement, normal form of its tests)
    "Nemotron-RL-coding": (
        {
            "verifier_metadata": {
                "unit_tests": {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
            }
        },
        STDIN,
    ),
    "Nemotron-RL-coding, old": (
        {
            "responses_create_params": {
                "unit_tests": {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}
            }
        },
        STDIN,
    ),
    "Nemotron-RL-coding, calls": ({"verifier_metadata": {"unit_tests": dict(CALL)}}, CALL),
    "DeepCoder, list": (
        {"tests": json.dumps([p | {"type": "stdin_stdout"} for p in PAIRS])},
        STDIN,
    ),
    "DeepCoder, TACO": (
        {"tests": json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]})},
        STDIN,
    ),
    "DeepCoder, LCB": (
        {
            "tests": json.dumps(
                [
                    {
                        "input": i,
                        "output": o,
                        "testtype": "functional",
                        "metadata": {"func_name": "f"},
                    }
                    for i, o in zip(CALL["inputs"], CALL["outputs"])
                ]
            )
        },
        CALL,
    ),
    "PrimeIntellect": (
        {
            "verification_info": json.dumps(
                {
                    "language": "python",
                    "test_cases": [p | {"type": "stdin_stdout", "fn_name": None} for p in PAIRS],
                }
            )
        },
        STDIN,
    ),
    "PrimeIntellect, repr": (
        {"verification_info": repr({"language": "python", "test_cases": PAIRS})},
        STDIN,
    ),
    "open-r1/codeforces": (
        {
            "official_tests": PAIRS,
            "official_tests_complete": True,
            "input_mode": "stdio",
            "time_limit": 8.0,
        },
        STDIN | {"time_limit": 8.0},
    ),
    "TACO": (
        {"input_output": json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]})},
        STDIN,
    ),
    "APPS, lines": (
        {"input_output": json.dumps({"inputs": [["3", "1"]], "outputs": [["2", "4"]]})},
        STDIN | {"inputs": ["3\n1"], "outputs": ["2\n4"]},
    ),
    "APPS, calls": (
        {
            "input_output": json.dumps(
                {"fn_name": "f", "inputs": [[[1, 2], 3], [[], "a"]], "outputs": [[[3]], [True]]}
            )
        },
        CALL,
    ),
}

DROPPED = {  # part of the reason: row
    "interactive": {"problem": "This is an interactive problem.", "tests": json.dumps(PAIRS)},
    "special judge": {
        "problem": "If there are multiple answers, print any of them.",
        "tests": json.dumps(PAIRS),
    },
    "special judge, by field": {
        "problem": "p",
        "official_tests": PAIRS,
        "generated_checker": "import sys",
    },
    "interactive, by field": {"problem": "p", "official_tests": PAIRS, "input_mode": "interactive"},
    "incomplete": {"problem": "p", "official_tests": PAIRS, "official_tests_complete": False},
    "no tests": {"problem": "p", "tests": ""},
    "two outputs": {
        "problem": "p",
        "tests": json.dumps({"inputs": ["1", "1"], "outputs": ["2", "3"]}),
    },
    "more inputs": {"problem": "p", "tests": json.dumps({"inputs": ["1"], "outputs": []})},
    "neither JSON": {"problem": "p", "tests": "__import__('os')"},
    "several functions": {
        "problem": "p",
        "tests": json.dumps([PAIRS[0] | {"fn_name": "f"}, PAIRS[1] | {"fn_name": "g"}]),
    },
    "not a Python": {
        "problem": "p",
        "verification_info": json.dumps({"language": "rust", "test_cases": PAIRS}),
    },
    "unknown form": {"problem": "p", "tests": "[1, 2]"},
}

OUTPUTS = [  # printed, expected, same?
    ("6\n", "6", True),
    (" 6 \n\n", "6\n", True),
    ("1 2\n3", "1 2 \n3\n", True),
    ("1\n2", "1 2", False),
    ("", "", True),
    ("6.0", "6", True),
    ("6.000", "6", True),
    ("6.0001", "6", False),
    ("1e3", "1000", True),
    ("0.1 0.2", ".1 .20", True),
    ("yes", "YES", False),
    ("a b", "a  b", False),
    ("1 a", "1.0 a", False),
    ("nan", "nan", True),
    ("nan 1", "nan 1.0", False),
    ("sNaN", "1", False),
    ("6\n6", "6", False),
    ("1" + "0" * 100, "1e100", True),
    ("0x10", "16", False),
    ("-0", "0", True),
]

VALUES = [  # returned, expected, same?
    (3, 3, True),
    (3, 4, False),
    (3, 3.0, True),
    (0.3333333, 1 / 3, True),
    (0.33, 1 / 3, False),
    (True, 1, False),
    (1, True, False),
    (True, True, True),
    (1.0, True, False),
    ("3", 3, False),
    (None, None, True),
    (None, 0, False),
    ([1, [2]], [1, [2]], True),
    ([1, 2], [1], False),
    ([1.0000001], [1], True),
    ({"a": 1}, {"a": 1.0}, True),
    ({"a": 1}, {"b": 1}, False),
    ([], {}, False),
    (float("nan"), 0.0, False),
    (float("inf"), float("inf"), True),
    (float("inf"), 1.0, False),
    (10**30, 10**30 + 1, False),
    (1000009999.0, 1000000000, False),
    (1000009.0, 1e6, True),  # beside an int 1e-5 is of one
]


def answer(code, think="hm"):
    return f"{think}</think>\nHere:\n```python\n{code}\n```\nDone."


def rollout(text, tests, prompt="Double it.", think=True, finish="stop"):
    row = {"messages": [{"role": "user", "content": prompt}], "think": think, "tests": tests}
    return SimpleNamespace(
        text=text, row=row, finish_reason=finish, reward=None, status="", pending=None
    )


@pytest.mark.parametrize("schema", ROWS)
def test_every_schema_becomes_the_same_normal_form(schema):
    raw, expected = ROWS[schema]
    row = coderl.normalize({"problem": "Double it."} | raw, "row 1")
    assert row["tests"] == expected and row["think"] is True
    assert (
        row["messages"][0]["content"].startswith("Double it.")
        and "```python" in row["messages"][0]["content"]
    )


@pytest.mark.parametrize("reason", DROPPED)
def test_unfit_rows_are_dropped_with_a_reason(reason):
    with pytest.raises(BadRow, match=reason.split(",")[0]):
        coderl.normalize(DROPPED[reason], "row 1")


def test_the_prompt_asks_for_one_block_and_shows_the_header():
    plain = coderl.normalize({"question": "Double it.", "tests": json.dumps(PAIRS)}, "row 1")[
        "messages"
    ][0]["content"]
    assert "Write Python code to solve the problem." in plain
    header = coderl.normalize(
        {"question": "Do it.", "starter_code": "class Solution:", "tests": json.dumps(CALL)},
        "row 1",
    )["messages"][0]["content"]
    assert (
        "Function header:\n```\nclass Solution:\n```" in header
        and "Write Python code" not in header
    )
    assert (
        "def f(...):"
        in coderl.normalize({"question": "Do it.", "tests": json.dumps(CALL)}, "row 1")["messages"][
            0
        ]["content"]
    )
    done = {
        "responses_create_params": {
            "input": [{"role": "user", "content": "Use ```python\n# code\n```. Double it."}]
        },
        "tests": json.dumps(PAIRS),
    }
    assert (
        coderl.normalize(done, "row 1")["messages"][0]["content"]
        == "Use ```python\n# code\n```. Double it."
    )


def test_codeforces_statements_are_put_together():
    raw = {
        "description": "Double it.",
        "input_format": "n",
        "output_format": "2n",
        "examples": [{"input": "1", "output": "2"}],
        "official_tests": PAIRS,
    }
    text = coderl.normalize(raw, "row 1")["messages"][0]["content"]
    assert text.startswith("Double it.\n\nInput\nn\n\nOutput\n2n\n\nExample\nInput:\n1\nOutput:\n2")


def test_rows_come_from_a_file_and_drops_are_counted(tmp_path, capsys):
    path = tmp_path / "code.jsonl"
    path.write_text(
        "".join(
            json.dumps({"problem": f"Double it {i}."} | ROWS["TACO"][0]) + "\n" for i in range(3)
        )
        + json.dumps(DROPPED["incomplete"])
        + "\n"
    )
    rows = coderl.load_rows(coderl.Config(data=str(path)))
    assert len(rows) == 3 and "dropped 1 of 4 rows, incomplete" in capsys.readouterr().out
    assert coderl.select_rows(rows, 2, {0: (8, 8)}, coderl.Config()) == [0, 1, 2]


@pytest.mark.parametrize("printed, expected, same", OUTPUTS)
def test_printed_output_is_compared_as_livecodebench_does(printed, expected, same):
    assert programs.same_output(printed, expected) is same


def test_a_flood_of_numbers_is_not_read_number_by_number():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flood = "1 " * 4_000_000
    assert not programs.same_output(flood, "3")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{grown:.0f} MB more, limit 100")
    assert grown < 100


@pytest.mark.parametrize(
    "wording, several",
    [
        ("Your answer is right if its absolute or relative error does not exceed 10^{-6}.", True),
        ("Print them in any order.", True),
        ("Print the edges in any order.", True),
        ("Print any valid permutation.", True),
        ("If there are several, find any of them.", True),
        ("The edges are given in any order. Print their sum.", False),
        ("In any case, print the sum.", False),
        ("You can print each letter in any case.", False),
        ("Output: 3\nExplanation: We can pick the elements in any order", False),
        ("If you cannot find any such x, print -1.", False),
        ("Print the minimum total cost of visiting all the cities in any order.", False),
        ("Return the mean absolute error of two lists.", False),
        ("Print the number of possible answers.", False),
        ("If there are multiple such arrays, print any.", True),
        ("There are multiple suitable pairs, output any.", True),
        ("Print the vertices in arbitrary order.", True),
        ("Numbers may be printed in any order.", True),
        ("print the strings, one per line, in any order", True),
        ("At most 10^{-6} absolute or relative error.", True),
        ("The order of output does not matter.", True),
        ("It is acceptable for an answer to have an error of 10^-9.", True),
        ("Print YES if there is any pair.", False),
        ("Find whether any such x exists.", False),
        ("Print the number of ways in any order.", False),
        ("You can buy the books in any order. Print the minimum cost.", False),
    ],
)
def test_problems_with_several_right_outputs_are_dropped_by_their_wording(wording, several):
    assert bool(programs.ANY_ANSWER.search("You are given a tree. " + wording)) is several


@pytest.mark.parametrize("returned, expected, same", VALUES)
def test_returned_values_are_compared_by_type_and_with_a_documented_tolerance(
    returned, expected, same
):
    assert programs.same_value(returned, expected) is same


@pytest.mark.parametrize(
    "text, code",
    [
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```py\na\n```", "a\n"),
        ("```Python3  \na\n```", "a\n"),
        ("```\na\n```", None),
        ("```cpp\na\n```", None),
        ("```python\na", None),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("", None),
        ("```python```", None),
        ("```python\n```", ""),
        ("1. so\n   ```python\n   if a:\n     b\n   ```", "if a:\n  b\n"),
    ],
)
def test_the_last_python_block_counts(text, code):
    assert coderl.extract_code(text) == code


def test_of_a_function_the_last_block_that_defines_it_counts():
    text = (
        "```python\n"
        "class Solution:\n"
        "    def f(self): return 1\n"
        "```\n"
        "Example:\n"
        "```python\n"
        "print(Solution().f())\n"
        "```"
    )
    assert (
        coderl.extract_code(text, "f").startswith("class")
        and coderl.extract_code(text, "g") == coderl.extract_code(text) == "print(Solution().f())\n"
    )
    assert coderl.extract_code("```python\ndef f(): return 1\n```\nNo:\n" + text, "f").startswith(
        "class"
    )


@pytest.mark.parametrize(
    "response, tests, earned",
    [
        (answer("print(int(input()) * 2)"), STDIN, (1, "ok", 1.0)),
        (answer("print(2)"), STDIN, (0, "wrong", 0.5)),
        (answer("1 / 0"), STDIN, (0, "crash", 0.0)),
        (answer("x = [0] * 10**12"), STDIN, (0, "crash", 0.0)),
        (answer("while True: pass"), STDIN, (0, "timeout", 0.0)),
        ("print(int(input()) * 2)", STDIN, (0, "no_answer", 0.0)),
        # </think> is missing
        ("```python\nprint(int(input()) * 2)\n```", STDIN, (0, "no_answer", 0.0)),
        (
            "```python\nprint(int(input()) * 2)\n```\n</think>\nsee above",
            STDIN,
            (0, "no_answer", 0.0),
        ),
        (answer("print(int(input()) * 2)") + "\nOr was it</think>?", STDIN, (0, "no_answer", 0.0)),
        (answer("print(2)") + answer("print(int(input()) * 2)"), STDIN, (1, "ok", 1.0)),
        (answer("def f(a, b): return [3] if a else True"), CALL, (1, "ok", 1.0)),
        (answer("def f(a, b): return [3] if a else 1"), CALL, (0, "wrong", 0.5)),
        (answer("print(int(input()) * 2)", think="让我想想"), STDIN, (0, "language", 0.0)),
        # the rule is about the reasoning
        (answer("print(int(input()) * 2)  # 注释"), STDIN, (1, "ok", 1.0)),
        (answer("print(int(input()) * 2)", think="let α ∈ ℝ, naïve"), STDIN, (1, "ok", 1.0)),
    ],
)
def test_a_response_earns_one_only_if_every_test_passes(response, tests, earned):
    assert coderl.verdict(response, tests, "Double it.", timeout=0.3) == earned


def test_a_chinese_prompt_may_be_thought_about_in_chinese():
    assert coderl.language_ok("把它加倍", "让我想想 x") and not coderl.language_ok(
        "把它加倍", "давай"
    )
    started = time.perf_counter()
    assert coderl.language_ok("Double it.", "So the answer is 4. " * 10_000)
    print(f"200 KB in {1e3 * (time.perf_counter() - started):.1f} ms")


def test_rewards_are_computed_in_the_background_and_land_on_their_rollouts():
    submit, collect = coderl.make_reward(coderl.Config(reward_workers=8, test_seconds=0.5))
    good, bad = answer("print(int(input()) * 2)"), answer("print(3)")
    rollouts = [rollout(good if i % 3 else bad, STDIN) for i in range(24)] + [
        rollout(answer("while 1: pass"), STDIN)
    ]
    rollouts += [
        rollout(good, STDIN, finish="length"),
        rollout("```python\nprint(int(input()) * 2)\n```", STDIN, think=False),
    ]
    started = time.perf_counter()
    for r in rollouts[:-1]:  # the last is left to collect()
        submit(r)
    assert time.perf_counter() - started < 0.5, "submit() waits for the tests"
    collect(rollouts)
    assert [r.reward for r in rollouts] == [int(i % 3 > 0) for i in range(24)] + [0, 0, 1]
    assert [r.status for r in rollouts[24:]] == ["timeout", "no_answer", "ok"]
    assert [coderl.metric(r) for r in rollouts[:2]] == [0.0, 1.0]
    shares = coderl.monitor(rollouts)
    assert (
        shares["wrong"] == 8 / 27
        and shares["timeout"] == shares["no_answer"] == 1 / 27
        and shares["passed"] == 17 / 27
    )


def test_a_longer_limit_of_the_problem_is_respected():
    slow = answer(
        "import time\nn = int(input())\nwhile time.process_time() < 0.5: pass\nprint(2 * n)"
    )
    assert coderl.verdict(slow, STDIN, timeout=0.2)[1] == "timeout"
    assert coderl.verdict(slow, STDIN | {"time_limit": 5.0}, timeout=0.2)[1] == "ok"


def test_the_self_test_passes_sound_rows_and_stops_on_unsound_ones(capsys):
    cfg = coderl.Config()

    def row(tests, solution=""):
        messages = [{"role": "user", "content": "p"}]
        return {"messages": messages, "tests": tests, "solution": solution}

    coderl.self_test([row(STDIN), row(CALL)], cfg)
    assert "was not checked" in capsys.readouterr().out
    coderl.self_test([row(STDIN, "print(int(input()) * 2)"), row(CALL)], cfg)
    assert "1 of 1 reference solutions pass" in capsys.readouterr().out
    contradiction = {"inputs": ["1", "1"], "outputs": ["2", "3"], "fn_name": None}
    for rows in ([row(contradiction)], [row(STDIN, "print(1)")]):
        with pytest.raises(SystemExit):
            coderl.self_test(rows, cfg)
        assert "Nothing was trained." in capsys.readouterr().err


def test_importing_the_stage_starts_nothing():
    code = (
        "import sys, coderl\n"
        "from verifiers import sandbox\n"
        "print('vllm' in sys.modules, sandbox._zygote)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(coderl.__file__),
        check=False,
    )
    assert done.stdout == "False None\n", done.stderr


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=8,
)
lines = st.text(alphabet="0123456789.-+eE nasNINf\n_\u0663", max_size=30)


def comparisons_hold(a, b, x, y):
    assert programs.same_output(a, b) == programs.same_output(b, a)
    assert programs.same_output(a, a) and programs.same_output(a + " \n", a)
    assert programs.same_value(x, json.loads(json.dumps(x))) or "nan" in repr(x)
    assert isinstance(programs.same_value(x, y), bool)


@settings(max_examples=300, deadline=2000)
@given(lines, lines, junk, junk)
def test_comparisons_never_fail_and_are_reflexive(a, b, x, y):
    comparisons_hold(a, b, x, y)


@pytest.mark.exhaustive
@settings(max_examples=20_000, deadline=2000)
@given(lines, lines, junk, junk)
def test_comparisons_hold_on_twenty_thousand_pairs(a, b, x, y):
    comparisons_hold(a, b, x, y)


@settings(max_examples=300, deadline=2000)
@given(
    st.lists(
        st.sampled_from(
            ["```python\n", "```", "</think>", "```py\n", "x = 1\n", "``", " ", "\n", "</thi"]
        ),
        max_size=12,
    ).map("".join)
)
def test_extraction_takes_any_text(text):
    code = coderl.extract_code(text.rpartition("</think>")[2])
    assert code is None or ("```" not in code and code in text)


@settings(max_examples=300, deadline=2000)
@given(
    junk,
    st.sampled_from(
        [
            "tests",
            "verification_info",
            "input_output",
            "official_tests",
            "verifier_metadata",
            "unit_tests",
        ]
    ),
    st.booleans(),
)
def test_junk_in_the_place_of_tests_drops_the_row_and_nothing_else(value, name, as_text):
    row = {"problem": "p", name: json.dumps(value) if as_text else value}
    try:
        tests = coderl.normalize(row, "row 1")["tests"]
        assert len(tests["inputs"]) == len(tests["outputs"]) > 0
    except BadRow:
        pass


@pytest.mark.slow
def test_verifying_while_others_decode_saves_what_verifying_afterwards_costs():
    """Paper 4.6.2, measured: verify rollouts as they finish, and when the last is done.

    12 completions leave an engine one after another, and each program needs its CPU time. Prints
    the seconds saved.
    """
    from engine import Rollout

    busy = answer(
        "import time\n"
        "end = time.process_time() + 0.15\n"
        "while time.process_time() < end: pass\n"
        "print(int(input()) * 2)"
    )
    row = {
        "messages": [{"role": "user", "content": "Double it."}],
        "think": True,
        "tests": STDIN,
        "prompt_ids": [1],
        "index": 0,
    }
    cfg = coderl.Config(reward_workers=8, group_size=4)

    class SlowEngine:
        def generate(self, rollouts, max_new_tokens, temperature, top_p, top_k, on_finished):
            for r in rollouts:
                time.sleep(0.3)  # a completion every 0.3 s
                r.completion_ids, r.sampler_logprobs, r.finish_reason, r.text = (
                    [1],
                    [0.0],
                    "stop",
                    busy,
                )
                on_finished(r)

    def seconds(submit, collect):
        clock = time.perf_counter()
        rollouts, _ = coderl.rollout(
            SlowEngine(), [row] * 3, [0, 1, 2], 1, cfg, (submit, collect), 0, 1
        )
        assert [r.reward for r in rollouts] == [1] * 12 and all(
            isinstance(r, Rollout) for r in rollouts
        )
        return time.perf_counter() - clock, sum(r.verify_s for r in rollouts)

    submit, collect = coderl.make_reward(cfg)
    afterwards, _ = seconds(
        lambda r: None, lambda rollouts: (list(map(submit, rollouts)), collect(rollouts))
    )
    overlapped, verifiers = seconds(submit, collect)
    print(
        f"verified while decoding {overlapped:.2f} s, afterwards {afterwards:.2f} s: "
        f"{afterwards - overlapped:.2f} s saved of {verifiers:.2f} s in the verifiers; "
        "decoding alone 3.6 s"
    )
    assert afterwards - overlapped > 0.2


@pytest.mark.parametrize(
    "returned, expected, same",
    [
        (1.000009, 1.0, True),
        (1.00002, 1.0, False),
        (100.0009, 100.0, True),
        (100.002, 100.0, False),
        (1e-9, 0.0, True),
        (1e-7, 0.0, False),
        (5.0, float("inf"), False),
        (float("inf"), float("inf"), True),
        (float("-inf"), float("inf"), False),
        (float("nan"), 1.0, False),
    ],
)
def test_floats_are_alike_to_five_digits_and_infinity_is_only_itself(returned, expected, same):
    assert programs.same_value(returned, expected) is same


def test_stringified_one_element_lists_stay_lists():
    assert coderl.normal_tests({"tests": [{"input": "[1]", "output": "[1]", "fn_name": "f"}]})[
        "outputs"
    ] == ["[1]"]
