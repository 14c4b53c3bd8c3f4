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
    ("inf 1", "inf 1.0", True),
    # Fractions may differ by 1e-6 [D29].
    ("0.333333", "0.3333333333", True),
    ("0.142857", "0.142857142857", True),
    ("0.001022310089310", "0.00102231008931026", True),
    ("1 0.5000004", "1 0.5", True),
    ("0.33333", "0.3333333333", False),
    ("0.50001", "0.5", False),
    ("1e-7", "1.5e-7", True),
    ("1234567.25", "1234567.50", False),
    ("9007199254740992.0", "9007199254740993", False),
    ("9007199254740993", "9007199254740992.0", False),
    ("0", "0.0000005", False),
    ("1e400000000", "1.5", False),
    ("1.5e999999999999999999", "2.5", False),
    # A text of digits is no number.
    ("1", "0001", False),
    ("7", "007", False),
    ("1_000", "1000", False),
    ("\u0663 1", "3 1", False),
    ("1\u00a02", "1 2", False),
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
    # Beyond 2^53 floats have gaps, so an int is only itself.
    (9007199254740992.0, 9007199254740993, False),
    (9007199254740993, 9007199254740992.0, False),
    (9007199254740992.0, 9007199254740992, True),
    ((10**9 + 7) * (10**9 + 6) / 2, (10**9 + 7) * (10**9 + 6) // 2, False),
    ([9007199254740992.0], [9007199254740993], False),
    (1e300, 10**400, False),
    (10**400, float("inf"), False),
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
    assert "Solve this problem in Python." in plain
    header = coderl.normalize(
        {"question": "Do it.", "starter_code": "class Solution:", "tests": json.dumps(CALL)},
        "row 1",
    )["messages"][0]["content"]
    assert "Function header:\n```\nclass Solution:\n```" in header and "in Python" not in header
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
    assert sorted(coderl.select_rows(rows, 2, {0: (8, 8)}, coderl.Config())) == [0, 1, 2]


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


WORDINGS = {  # our own sentences
    "several": [
        "Your answer is right if its absolute or relative error does not exceed 10^{-6}.",
        "Print them in any order.",
        "Print the edges in any order.",
        "Print any valid permutation.",
        "If there are several, find any of them.",
        "If there are multiple such arrays, print any.",
        "There are multiple suitable pairs, output any.",
        "Print the vertices in arbitrary order.",
        "Numbers may be printed in any order.",
        "print the strings, one per line, in any order",
        "At most 10^{-6} absolute or relative error.",
        "The order of output does not matter.",
        "It is acceptable for an answer to have an error of 10^-9.",
        "Print the names in any order.",
        "Print the nodes of the cycle in any order.",
        "Print the numbers in any order, separated by blanks.",
        "Print the moves in any order.",
        "Output the indices of the chosen cards in arbitrary order.",
        "Return the list of matching pairs in any order.",
        "You may return the answer in any order.",
        "The edges can be printed in any order.",
        "Your output may list the towns in any order.",
        "The answer may be given in any order.",
        "If several answers exist, you can choose any.",
        "If there is more than one solution, any choice is acceptable.",
        "Any valid triple will be accepted.",
        "You can output any solution that fits.",
        "If there are several suitable colourings, print any of them.",
        "Should more than one plan work, report any one of them.",
        "When many schedules are optimal, give any.",
        "If there are multiple such strings, output one of them.",
        "Print any arrangement that satisfies all the rules.",
        "In case of a tie you may output any of the tied players.",
        "If the answer is not unique, print any.",
        "There may be several ways to do it; it does not matter which one you print.",
        "Any correct answer is accepted.",
        "All valid partitions will be accepted.",
        "The order of the integers in the output is not important.",
        "The order in which you print the lines does not matter.",
        "The order of the returned words doesn't matter.",
        "Print the edges one per line; their order is irrelevant.",
        "Find an arbitrary valid assignment and print it.",
        "Your answer is judged by a special checker.",
        "Print the area correct to 6 decimal places with tolerance 1e-6.",
        "Your answer may differ from the jury's by at most 1e-6.",
        "Your result should differ from the correct one by no more than 10^{-4}.",
        "An answer within 10^-6 of the true value is fine.",
        "The answer must have an absolute error of at most 0.0001.",
        "Relative error up to 1e-9 is tolerated.",
        "Your output will be considered correct if it is accurate to within 1e-5.",
        "If multiple\nsolutions exist, print any\nof them.",
        "If more than one route is possible, you may print any.",
        "Multiple answers may exist. Any will do.",
        "If there is more than one answer, you are free to choose which one to print.",
        "Print any one such permutation.",
        "Output one possible distribution of the sweets.",
        "Print a possible order of the tasks.",
        "If there are many ways to do so, write any of those.",
        "The lines can go in any order.",
        "Print all the pairs, in no particular order.",
        "You can print the pairs in whatever order you like.",
        "Print the found words; any order is fine.",
        "The output will be checked by a program that accepts every correct plan.",
        "Answers with an error below 0.000001 count as right.",
        "The checker allows a deviation of 1e-4.",
        "Absolute or relative deviations up to 10^{-5} are ignored.",
        "Small rounding errors up to 1e-6 are allowed.",
        "Print the first such pair; if several exist, print whichever you find.",
        "Return the groups, the order of which does not matter.",
        "If there exist multiple valid trees, output any valid one.",
        "Any of the shortest paths is considered a correct answer.",
        "Where more than one layout fits, output whichever comes to mind.",
        "If multiple sequences have this property, show one.",
        "Print a valid sequence of operations.",
        "The pairs may appear in the output in any order.",
        "The sets can be listed in any order, and so can their elements.",
        "Return any index at which the list peaks.",
        "Print each triangle once; the order of the triangles is arbitrary.",
        "Your answer is accepted if it is at most 1e-6 off the exact value.",
        "The answer should be exact to within an absolute error of 0.00001.",
        "You can print any of the best plans.",
        "When two plans tie, either may be printed.",
        "Output any sequence with this sum.",
    ],
    "interactive": [
        "This problem is interactive.",
        "This is an interactive task.",
        "Do not forget to flush.",
        "Remember to flush after each line.",
        "Your program has to communicate with the jury program.",
        "You must flush the standard output after each question.",
        "The interactor answers with a single number.",
        "Your program interacts with the grader through standard input and output.",
        "You may ask the judge at most 20 questions.",
        "After printing a query, read the reply of the judge.",
        "In this interactive problem you guess a number.",
        "This is a two-way interaction with the judge.",
        "Flush stdout after every query.",
        "Make sure to flush your output.",
        "Your program will talk to the judge's program.",
        "Use fflush(stdout) or sys.stdout.flush() after printing a query.",
        "The grader is adaptive.",
        "To make a query, print a line with ? and read the answer from the jury.",
        "Note that the task is interactive: flush after each guess.",
        "You communicate with a judge that hides a permutation.",
        "Print the guess, flush, and read the verdict.",
        "This problem uses an interactor.",
    ],
    "plain": [
        "The edges are given in any order. Print their sum.",
        "In any case, print the sum.",
        "You can print each letter in any case.",
        "Output: 3\nExplanation: We can pick the elements in any order",
        "If you cannot find any such x, print -1.",
        "Print the minimum total cost of visiting all the cities in any order.",
        "Return the mean absolute error of two lists.",
        "Print the number of possible answers.",
        "Print YES if there is any pair.",
        "Find whether any such x exists.",
        "Print the number of ways in any order.",
        "You can buy the books in any order. Print the minimum cost.",
        "Print the words in lexicographically increasing order; the list does not "
        "contain duplicate words.",
        "Print the distinct words in lexicographically increasing order and does not "
        "contain duplicate words.",
        "Print the vertices in clockwise order (starting from an arbitrary one given in "
        "the input).",
        "The corners are given in clockwise order (starting from an arbitrary one).",
        "Print the minimum number of moves when the cards may be picked in any order.",
        "Print the number of ways to visit all towns in any order.",
        "The edges are given in any order. Print their total length.",
        "You may visit the shops in any order and then return home. Print the least cost.",
        "Count the combinations of coins; the order of the coins does not matter.",
        "Two sets are equal if the order of their elements does not matter. Print the "
        "number of different sets.",
        "If there are several answers, print the smallest one.",
        "If several strings qualify, output the lexicographically smallest.",
        "If there is no such number, do not print any digits.",
        "For multiple test cases, print one line for each.",
        "The input has several cases; for each of them print one integer.",
        "In one move you can choose any two neighbours and swap them.",
        "You can choose any of the boxes at each step. Print the largest sum.",
        "Can she reach any of them? Print YES or NO.",
        "Print YES if any of the numbers is even.",
        "You can print each letter in any case (upper or lower).",
        "It is guaranteed that the answer is unique.",
        "Print the answer in ascending order.",
        "Print the elements in the order in which they are given.",
        "Print the sum rounded to two decimal places.",
        "Every price is given with a precision of 0.01.",
        "Print ERROR if the command is not known.",
        "The machine flushes the tank every 10 minutes.",
        "An interactive map shows n towns.",
        "Any string that ends in b is accepted by this automaton. Is the word accepted?",
        "A query is a pair of numbers; for each query print the sum.",
        "The judge of the contest gives each dancer a score.",
        "Jobs may run in any order. Output the earliest finishing time.",
        "Output: 3\nExplanation: the balls are taken in any order.",
        "If any of the lines is empty, skip it.",
        "The robot must return to its base after visiting the points in any order.",
        "Given two sorted lists, return one sorted list.",
        "The tickets are sold in arbitrary order. Find the profit.",
        "Print the largest value that any of them can reach.",
        "Print the number of integers that divide any of the given ones.",
        "If there are several longest words, print the one that comes first.",
        "Sort the list; if two have equal keys, keep their order.",
        "The pieces may be joined in any order. What is the least effort?",
        "Print the median; the input may come in any order.",
        "Return the maximum over all subsets chosen in any order.",
        "The function returns the list without duplicates, in the original order.",
        "Return True if any two numbers have this sum.",
        "The teams play in arbitrary order; print the name of the last winner.",
        "Any two towns are connected by at most one road.",
        "There are many solutions to the equation; print how many.",
        "Print the probability with exactly six digits after the point.",
        "The distance of any two points is at least 0.001.",
        "A move is accepted if the piece can go there. Print the accepted moves in the "
        "order given.",
        "The user interacts with a shop through commands.",
        "The jury gives marks from 1 to 10.",
        "He may take coins of any kind, several of them at once. Output the least number of coins.",
        "The answers to different queries are independent.",
        "Print the index of any-angle turns.",
        "Print the amount of water left when the taps are opened in any order.",
        "Print the cities on the cheapest route, in order of visit.",
        "Return whether the words can be put in some order such that each begins with "
        "the last letter of the one before.",
        "Any answer must be below 1000.",
        "Multiple test cases are given. Print one number for each.",
        "If there are many, report the one with the smallest index.",
        "Items may be bought in any order. Print the items left over, sorted by name.",
        "The numbers differ by at least 0.01. Print the closest pair.",
        "Print the output of the machine.",
        "No two solutions are alike; print their number.",
        "The printer prints pages in any order. How long does it take?",
        "She may answer any of the questions. Print the best score.",
        "The message is accepted if any checksum fits. Print OK or BAD.",
        "Do not output any blank lines.",
        "A valid code has any number of digits; print the number of valid codes.",
        "Return the order of the group.",
    ],
}


def kind_of_problem(problem):
    if programs.is_interactive(problem):
        return "interactive"
    return "several" if programs.has_several_answers(problem) else "plain"


def test_problems_that_a_comparison_cannot_judge_are_found_by_their_wording():
    """Prints precision and recall over our own sentences."""
    asked = [(kind, text) for kind, texts in WORDINGS.items() for text in texts]
    told = [kind_of_problem("You are given a tree. " + text) for _, text in asked]
    wrong = [(got, want, text) for got, (want, text) in zip(told, asked) if got != want]
    for kind in ("several", "interactive"):
        right = sum(got == want == kind for got, (want, _) in zip(told, asked))
        print(
            f"{kind}: precision {right} of {told.count(kind)}, "
            f"recall {right} of {len(WORDINGS[kind])}, among {len(asked)} sentences"
        )
    assert wrong == []


def test_a_long_statement_is_read_in_time():
    for wording in ("print any ", "any ", "error of ", "\n ", "order ", "10 ^ { - "):
        started = time.process_time()
        kind_of_problem(wording * (60_000 // len(wording)))
        print(f"{wording!r}: {time.process_time() - started:.2f} s, at most 1")
        assert time.process_time() - started < 1


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
        ("```cpp\na\n```", None),
        ("```python\na\n```\n```text\nb\n```", "a\n"),
        ("", None),
        ("```python```", None),
        ("```python\n```", ""),
        ("1. so\n   ```python\n   if a:\n     b\n   ```", "if a:\n  b\n"),
        # Markdown's own forms count.
        ("``` python\na\n```", "a\n"),
        ('~~~python\ns = """\n```\n"""\n~~~', 's = """\n```\n"""\n'),
        ('```python title="x"\na\n```', "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ("```python3.11\na\n```", "a\n"),
        ("````python\n```\n````", "```\n"),
        ("10. so\n    ```python\n    a\n    ```", "a\n"),
        ("Here: ```python\na\n```", "a\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        # A fence inside a string or a docstring cuts nothing.
        ('```python\ns = "```"\n```', 's = "```"\n'),
        (
            '```python\ndef f():\n    """\n    ```\n    1\n    ```\n    """\n```',
            'def f():\n    """\n    ```\n    1\n    ```\n    """\n',
        ),
        (
            '```python\ndef f():\n    """\n    ```python\n    1\n    ```\n    """\n```',
            'def f():\n    """\n    ```python\n    1\n    ```\n    """\n',
        ),
        # Blocks without a label count where no block is Python's.
        ("```\na\n```", "a\n"),
        ("```text\n1\n```\n```\na\n```", "a\n"),
        ("```\n1\n```\n```python\na\n```\n```\n2\n```", "a\n"),
        ("```pycon\n>>> a\n```", None),
        # A block left open at the end is no answer, as in LiveCodeBench.
        ("```python\na", None),
        ("```python\na\n```python\nb\n```", "b\n"),
        ("```python\nprint(1)```", "print(1)"),
        ("```python\nprint(1)```\nIt prints:\n```\n1\n```", "print(1)"),
        ('```python\ns = """```\n"""\n```', 's = """```\n"""\n'),
        ("```python\na\n```text\n1\n```", "a\n"),
        ("```python\na```\n```text\nb\n```", "a"),
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
    """The rule is about English prompts; tests/test_language.py has its cases."""
    assert coderl.language_ok("把它加倍", "让我想想 x") and coderl.language_ok("把它加倍", "so x")
    assert not coderl.language_ok("Double it.", "让我想想 x")
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
    # The code is a piece of the text, but for the indent of its lines.
    assert code is None or without_margins(code) in without_margins(text)


def without_margins(text):
    return "\n".join(line.strip() for line in text.split("\n"))


def test_a_blank_line_of_a_string_keeps_its_spaces():
    program = 'x = """a\n  \nb"""\n'
    assert coderl.extract_code(f"```python\n{program}```") == program
    assert coderl.extract_code("- so:\n  ```python\n  a = 1\n  b = 2\n  ```") == "a = 1\nb = 2\n"


@pytest.mark.parametrize(
    "text", ["`" * 200_000, "```" + " " * 100_000 + "x", "```python\n" * 25_000, "```\n" * 60_000]
)
def test_extraction_takes_no_longer_than_the_text(text):
    started = time.process_time()
    coderl.extract_code(text)
    print(f"{time.process_time() - started:.2f} s for {len(text)} characters, at most 1")
    assert time.process_time() - started < 1


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
            SlowEngine(), [row] * 3, [0, 1, 2], 1, {}, cfg, (submit, collect), 0, 1
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


# ---- Rows that ask for a function ----------------------------------------------------------------
TWICE = "class Solution:\n    def twice(self, n):"
TYPED = "class Solution:\n    def twice(self, n: int) -> int:\n        "


def loaded(**row):
    return coderl.normalize({"problem": "Do it."} | row, "row 1")["tests"]


@pytest.mark.parametrize(
    "row, inputs, outputs, right",
    [
        # The name from the row's metadata (L2), from "entry_point" (L3), from the header (L1).
        (
            {
                "metadata": {"func_name": "f"},
                "tests": '[{"input": "3", "output": "6", "testtype": "functional"}]',
            },
            ["3"],
            ["6"],
            "def f(n): return 2 * n",
        ),
        (
            {"metadata": '{"func_name": "f"}', "tests": {"inputs": ["3"], "outputs": ["6"]}},
            ["3"],
            ["6"],
            "def f(n): return 2 * n",
        ),
        (
            {
                "entry_point": "Solution().twice",
                "input_output": [{"input": "n = 3", "output": "6"}],
                "starter_code": TYPED,
            },
            ["3"],
            ["6"],
            "class Solution:\n    def twice(self, n): return 2 * n",
        ),
        (
            {"starter_code": TWICE, "input_output": {"inputs": ["n = 5"], "outputs": ["10"]}},
            ["5"],
            ["10"],
            "class Solution:\n    def twice(self, n): return 2 * n",
        ),
        # The header stands in the prompt.
        (
            {
                "problem": coderl.HEADER.format(problem="Twice n.", header=TWICE),
                "tests": {"inputs": ["5"], "outputs": ["10"]},
            },
            ["5"],
            ["10"],
            "class Solution:\n    def twice(self, n): return 2 * n",
        ),
        # Bare strings (L4): the header says so, or one of them is no literal.
        (
            {
                "starter_code": "def f(n: int) -> str:",
                "tests": {"inputs": ["3"], "outputs": ["21"], "fn_name": "f"},
            },
            ["3"],
            ['"21"'],
            "def f(n): return '21'",
        ),
        (
            {"tests": {"inputs": ["3", "4"], "outputs": ["21", "ab"], "fn_name": "f"}},
            ["3", "4"],
            ['"21"', '"ab"'],
            "def f(n): return '21' if n == 3 else 'ab'",
        ),
        (
            {"tests": {"inputs": ["3"], "outputs": ['"21"'], "fn_name": "f"}},
            ["3"],
            ['"21"'],
            "def f(n): return '21'",
        ),
        # Dictionaries with integer keys (L6): as APPS and TACO read theirs, or as they are written.
        (
            {"tests": {"inputs": [[{"1": {"2": 3}}]], "outputs": [[3]], "fn_name": "f"}},
            ['{"": [[1, {"": [[2, 3]]}]]}'],
            ["3"],
            "def f(d): return d[1][2]",
        ),
        (
            {"tests": {"inputs": ["{1: 'a', None: [{2: 3}]}"], "outputs": ["3"], "fn_name": "f"}},
            ['{"": [[1, "a"], [null, [{"": [[2, 3]]}]]]}'],
            ["3"],
            "def f(d): return d[None][0][2]",
        ),
        (
            {"tests": {"inputs": ['{"1": 3}'], "outputs": ["3"], "fn_name": "f"}},
            ['{"1": 3}'],
            ["3"],
            "def f(d): return d['1']",
        ),
        (
            {"tests": {"inputs": ['{"": [[1, 2]]}'], "outputs": ["2"], "fn_name": "f"}},
            ['{"": [["", [[1, 2]]]]}'],
            ["2"],
            "def f(d): return d[''][0][1]",
        ),
        # Arguments by name (L8), as an object, as its text and as LeetCode writes them.
        (
            {
                "starter_code": "def f(a, b):",
                "tests": {"inputs": [{"b": 1, "a": 5}], "outputs": [4], "fn_name": "f"},
            },
            ["5\n1"],
            ["4"],
            "def f(a, b): return a - b",
        ),
        (
            {
                "starter_code": "def f(a, b):",
                "tests": {"inputs": ['{"b": 1, "a": 5}'], "outputs": ["4"], "fn_name": "f"},
            },
            ["5\n1"],
            ["4"],
            "def f(a, b): return a - b",
        ),
        (
            {
                "starter_code": "def f(a, b):",
                "tests": {"inputs": ["b = true\na = [null, -5]"], "outputs": ["1"], "fn_name": "f"},
            },
            ["[null, -5]\ntrue"],
            ["1"],
            "def f(a, b): return 1 if b is True and a == [None, -5] else 0",
        ),
        # Results wrapped in a list (P4): as in APPS, but not where the header says otherwise.
        (
            {"tests": {"inputs": [[1], [2]], "outputs": [[1], [2]], "fn_name": "f"}},
            ["1", "2"],
            ["1", "2"],
            "def f(x): return x",
        ),
        (
            {
                "starter_code": "def f(x: int) -> list[int]:",
                "tests": {"inputs": [[1], [2]], "outputs": [[1], [2]], "fn_name": "f"},
            },
            ["1", "2"],
            ["[1]", "[2]"],
            "def f(x): return [x]",
        ),
        (
            {
                "starter_code": "def f(x: int) -> List[int]:",
                "tests": {"inputs": [[1], [2]], "outputs": [[[1]], [[2]]], "fn_name": "f"},
            },
            ["1", "2"],
            ["[1]", "[2]"],
            "def f(x): return [x]",
        ),
    ],
)
def test_a_row_that_asks_for_a_function_is_read_as_its_header_says(row, inputs, outputs, right):
    tests = loaded(**row)
    assert (tests["inputs"], tests["outputs"]) == (inputs, outputs)
    assert coderl.reward(answer(right), tests) == 1
    assert coderl.reward(answer("pass"), tests) == 0
    # The self test can check such rows, too.
    assert coderl.reward(programs.fenced(programs.table_program(tests)), tests) == 1
    assert coderl.reward(programs.fenced(programs.table_program(tests, spoil=True)), tests) == 0


NAMELESS = "a function is asked for, and nothing names it"
UNFIT = "do not fit the function header"


@pytest.mark.parametrize(
    "row, reason",
    [
        # L1, L2, L3: calls that nothing names.
        (
            {"tests": '[{"input": "3", "output": "6", "testtype": "functional"}]'},
            NAMELESS,
        ),
        ({"tests": [{"input": "3", "output": "6", "type": "function_call"}]}, NAMELESS),
        (
            {"tests": PAIRS, "starter_code": "class Solution {\n  public int f(int n) {\n"},
            NAMELESS,
        ),
        ({"tests": PAIRS, "starter_code": "def f(a):\n  def g(b):\ndef h(c):"}, NAMELESS),
        ({"tests": [{"input": "n = 7, q = [[1]]", "output": "1"}]}, NAMELESS),
        ({"tests": [p | {"type": "stdin_stdout"} for p in PAIRS], "starter_code": TWICE}, NAMELESS),
        # GeeksforGeeks' own form of a list.
        (
            {
                "starter_code": TWICE,
                "input_output": {"inputs": ["n = 2\na[] = {1, 2}"], "outputs": ["3"]},
            },
            "neither JSON",
        ),
        # Types of one's own, and values of another type than the header's.
        (
            {
                "starter_code": "class Solution:\n    def f(self, r: Optional[TreeNode]) -> int:",
                "input_output": [{"input": "r = [1, null, 2]", "output": "3"}],
            },
            UNFIT,
        ),
        (
            {
                "starter_code": "def f(s: str) -> int:",
                "tests": {"inputs": ["7"], "outputs": ["1"], "fn_name": "f"},
            },
            UNFIT,
        ),
        (
            {
                "starter_code": "def f(s: int) -> None:",
                "tests": {"inputs": ["7"], "outputs": ["1"], "fn_name": "f"},
            },
            UNFIT,
        ),
        (
            {
                "starter_code": "def f(a, b):",
                "tests": {"inputs": ["7"], "outputs": ["1"], "fn_name": "f"},
            },
            UNFIT,
        ),
        # L8: classes to design, arguments by name without a header, a bare true of a program.
        (
            {
                "starter_code": "class LRUCache:\n    def __init__(self, n):\n        ",
                "tests": {"inputs": [[["get"], [[1]]]], "outputs": [[1]], "fn_name": "LRUCache"},
            },
            "a class is asked for",
        ),
        ({"tests": {"inputs": [{"a": 1}], "outputs": [1], "fn_name": "f"}}, UNFIT),
        ({"tests": {"inputs": ["1"], "outputs": [True]}}, "unknown form"),
        ({"tests": {"inputs": ["{[]: 1}"], "outputs": ["1"], "fn_name": "f"}}, "neither JSON"),
        ({"tests": {"inputs": ["a = {[]: 1}"], "outputs": ["1"], "fn_name": "f"}}, "neither JSON"),
        ({"tests": {"inputs": ["1"], "outputs": [[[1, 2], [3]]]}}, "unknown form"),
        # P3: a program that does nothing passes.
        ({"tests": {"inputs": ["1", "2"], "outputs": ["\n", " "]}}, "nothing to compute"),
        (
            {"tests": {"inputs": ["1"], "outputs": ["null"], "fn_name": "f"}},
            "nothing to compute",
        ),
        (
            {"tests": {"inputs": [[1]], "outputs": [[None]], "fn_name": "f"}},
            "nothing to compute",
        ),
        # P4: some results wrapped, and others not.
        (
            {"tests": {"inputs": [[1], [2]], "outputs": [[1], 2], "fn_name": "f"}},
            "only some are wrapped",
        ),
        # L4: a text that looks like a broken literal is no bare string.
        (
            {"tests": {"inputs": ["1", "2"], "outputs": ["ab", "[1, 2"], "fn_name": "f"}},
            "neither JSON",
        ),
    ],
)
def test_a_row_that_no_program_or_any_program_solves_is_dropped(row, reason):
    with pytest.raises(BadRow, match=reason):
        loaded(**row)


def test_a_header_is_shown_for_calls_only():
    row = coderl.normalize({"problem": "p", "tests": PAIRS, "starter_code": "import sys"}, "row 1")
    assert row["tests"]["fn_name"] is None and "header" not in row["messages"][0]["content"]


@pytest.mark.parametrize(
    "limit, seconds",
    [
        (2, 2.0),
        ("2.0 seconds", 2.0),
        ("2000 ms", 2.0),
        (2000, 2.0),
        ("250 milliseconds", 0.25),
        ({"seconds": 3, "nanos": 500_000_000}, 3.5),
        ("4.5s", 4.5),
        ("0.5 minutes", 30.0),
        (1e9, programs.LONGEST_SECONDS),
        ("unknown", None),
        ("", None),
        (None, None),
        ({}, None),
    ],
)
def test_a_time_limit_is_read_in_its_unit_and_bounded(limit, seconds):
    tests = loaded(tests=PAIRS, time_limit=limit)
    assert tests["time_limit"] == seconds


def test_the_self_test_stops_on_a_function_whose_tests_run_a_program(capsys):
    shown = coderl.HEADER.format(problem="Twice n.", header=TWICE)
    by_name = STDIN | {"inputs": ["n = 1", "n = 2"]}
    for problem, tests in ((shown, STDIN), ("Twice n.", by_name)):
        messages = [{"role": "user", "content": problem}]
        with pytest.raises(SystemExit):
            coderl.self_test(
                [{"messages": messages, "tests": tests, "solution": ""}], coderl.Config()
            )
        assert "a function is asked for, but the tests run a program" in capsys.readouterr().err


LEETCODE = [  # our own problems in LeetCode's form: statement, header, examples, a right answer
    (
        "Given an integer array nums and an integer k, return how many of its numbers exceed k.",
        "def countAbove(self, nums: List[int], k: int) -> int:",
        [("nums = [3,1,4], k = 2", "2"), ("nums = [], k = 0", "0")],
        "return sum(x > k for x in nums)",
    ),
    (
        "Given a string s, return it with every letter doubled.",
        "def doubled(self, s: str) -> str:",
        [('s = "ab1"', '"aabb1"'), ('s = ""', '""')],
        "return ''.join(c * (1 + c.isalpha()) for c in s)",
    ),
    (
        "Given two numbers a and b, return their mean.",
        "def mean(self, a: int, b: int) -> float:",
        [("a = 1, b = 2", "1.50000"), ("a = -1, b = 1", "0.00000")],
        "return (a + b) / 2",
    ),
    (
        "Given a grid of characters, return whether any row has only dots.",
        "def freeRow(self, grid: List[List[str]]) -> bool:",
        [('grid = [[".","#"],[".","."]]', "true"), ('grid = [["#"]]', "false")],
        "return any(all(c == '.' for c in row) for row in grid)",
    ),
    (
        "Given flags that may be null, return them without the nulls.",
        "def known(self, flags: List[Optional[bool]]) -> List[bool]:",
        [("flags = [true, null, false]", "[true,false]"), ("flags = [null]", "[]")],
        "return [flag for flag in flags if flag is not None]",
    ),
    (
        "Given two integers, return their greatest common divisor.",
        "def gcd(self, a: int, b: int) -> int:",
        [("a = 12, b = 18", "6"), ("a = 7, b = 9", "1")],
        "return gcd(a, b)",
    ),
    (
        "Given points, return the median of the distances from the origin by city block.",
        "def median(self, points: list[tuple[int, int]]) -> int | float:",
        [("points = [[1,2],[0,1],[5,5]]", "3"), ("points = [[0,1],[1,2]]", "2")],
        "return statistics.median(abs(x) + abs(y) for x, y in points)",
    ),
    (
        "Keep the numbers sorted and return the k-th after all insertions.",
        "def kth(self, nums: List[int], k: int) -> int:",
        [("nums = [3,1,2], k = 2", "2"), ("nums = [9], k = 1", "9")],
        "from sortedcontainers import SortedList; return SortedList(nums)[k - 1]",
    ),
]


@pytest.mark.parametrize("statement, header, examples, body", LEETCODE)
def test_rows_in_leetcodes_form_pay_the_right_answer_and_no_empty_one(
    statement, header, examples, body
):
    shown = "".join(f"\nInput: {given}\nOutput: {result}\n" for given, result in examples)
    starter = f"class Solution:\n    {header}\n        "
    row = coderl.normalize(
        {
            "problem_description": f"{statement}\n\nExample:{shown}",
            "prompt": "from typing import *",
            "starter_code": starter,
            "input_output": [{"input": given, "output": result} for given, result in examples],
        },
        "row 1",
    )
    name = row["tests"]["fn_name"]
    assert statement in row["messages"][0]["content"] and header in row["messages"][0]["content"]
    programs.sandbox.run("pass")  # now the mode is known: packages need namespaces
    if "sortedcontainers" not in body or programs.sandbox._mode == "full":
        assert coderl.verdict(answer(starter + body), row["tests"])[1] == "ok"
    for empty in ("pass", "class Solution: pass", f"{starter}pass", f"def {name}(*a): pass"):
        assert coderl.reward(answer(empty), row["tests"]) == 0, empty


# ---- A function that the answer never defined (P1) -----------------------------------------------
@pytest.mark.parametrize(
    "name, given, result",
    [
        ("median", "[3, 1, 2]", "2"),
        ("gcd", "12\n18", "6"),
        ("add", "2\n3", "5"),
        ("sum", "[1, 2]", "3"),
        ("sorted", "[2, 1]", "[1, 2]"),
        ("copy", "[1]", "[1]"),
        ("len", "[1]", "1"),
        ("factorial", "5", "120"),
    ],
)
def test_a_function_that_the_answer_never_defined_is_not_called(name, given, result):
    tests = {"inputs": [given], "outputs": [result], "fn_name": name}
    for code in ("pass", "def helper(): return 0", "class Solution:\n    def other(self): pass"):
        assert coderl.verdict(answer(code), tests)[1] == "crash", code


@pytest.mark.parametrize(
    "code",
    [
        "from math import gcd",
        "import math\ngcd = math.gcd",
        "from math import *",
        "def gcd(a, b): return a if not b else gcd(b, a % b)",
        "class Solution:\n    def gcd(self, a, b): return gcd(a, b)",
        "class Solution:\n    def gcd(self, a, b): return math.gcd(a, b)",
    ],
)
def test_a_name_of_the_prelude_may_be_defined_imported_and_used(code):
    tests = {"inputs": ["12\n18"], "outputs": ["6"], "fn_name": "gcd"}
    assert coderl.reward(answer(code), tests) == 1


# ---- The end of a program ------------------------------------------------------------------------
READ = "import io, os, sys\nn = input()\ntotal = str(sum(map(int, input().split())))\n"


@pytest.mark.parametrize(
    "code",
    [
        'w = open(1, "w")\nw.write(total)',
        'w = os.fdopen(1, "w")\nprint(total, file=w)',
        'w = open(1, "wb")\nw.write(total.encode())',
        'w = io.BufferedWriter(io.FileIO(1, "w"))\nw.write(total.encode())',
        'kept = {"w": open(1, "w")}\ndef f(): pass\nkept["w"].write(total)',
        'kept = {"w": open(1, "w")}\nkept["w"].write(total)\nsys.exit(0)',
        'class A:\n    def __init__(self): self.w, self.me = open(1, "w"), self\na = A()\n'
        "a.w.write(total)",
        "class A:\n    def __del__(self): print(total)\na = A()",
        "class A:\n    def __del__(self): sys.stdout.write(total)\na = A()\na.me = a",
        "sys.stdout = io.TextIOWrapper(sys.stdout.detach())\nprint(total)",
        "print(total)\nsys.stdout.close()",
        "import threading\nthreading.Thread(target=lambda: print(total)).start()",
        "import atexit\natexit.register(lambda: print(total))",
    ],
)
def test_what_a_program_still_holds_at_its_end_is_printed(code):
    tests = {"inputs": ["3\n1 2 3\n"], "outputs": ["6\n"], "fn_name": None}
    assert coderl.run_tests(READ + code, tests) == ["ok"]
    # The same program in a plain interpreter.
    done = subprocess.run(
        [sys.executable, "-c", READ + code],
        input=tests["inputs"][0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("6", 0)


# ---- What is remembered --------------------------------------------------------------------------
def test_equal_programs_run_once_on_the_same_tests_and_infra_is_not_remembered(monkeypatch):
    """The same tests are the same object: rows live as long as a run."""
    statuses, runs = ["ok", "crash", "infra"], []

    def run_each(code, *_):
        runs.append(code)
        yield programs.sandbox.Result(statuses[len(runs) - 1], "", 2, 0.0)

    monkeypatch.setattr(programs.sandbox, "run_each", run_each)
    tests = {"inputs": ["1"], "outputs": ["2"], "fn_name": "f"}
    assert coderl.run_tests("a", tests) == ["ok"]
    known = coderl.run_tests("a", tests)
    known.append("a caller's own")
    assert coderl.run_tests("a", tests) == ["ok"] and runs == ["a"]
    # Another program, other limits or other tests: another run.
    statuses += ["crash", "wrong"]
    assert coderl.run_tests("b", tests) == ["crash"]
    assert coderl.run_tests("a", tests, timeout=1.0) == ["infra"]
    assert coderl.run_tests("a", tests, timeout=1.0) == ["crash"]
    assert coderl.run_tests("a", dict(tests)) == ["wrong"]
    assert runs == ["a", "b", "a", "a", "a"]


def test_the_oldest_verdicts_are_forgotten(monkeypatch):
    monkeypatch.setattr(programs, "MOST_KNOWN", 2)
    monkeypatch.setattr(programs, "each_verdict", lambda *_: ["ok"])
    for code in "abc":
        coderl.run_tests(code, {"inputs": []})
    assert [key[0] for key in programs._known] == ["b", "c"]
