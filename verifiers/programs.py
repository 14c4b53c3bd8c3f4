"""Programs: does a program pass its unit tests?

    extract_code(text, name)      the program in a response: its last ```python block
    run_tests(code, tests)        a verdict for each test: "ok", "wrong", "timeout", ...
    normal_form(tests)            tests in the form of any public set -> the form run_tests takes
    table_program(tests)          a program that knows every answer, to check the tests

A test runs a whole program (standard input -> what it prints) or one call of a function
(arguments -> what it returns). Every test runs in a process of its own in the sandbox, which never
sees the expected output: the comparison is made here, by LiveCodeBench's rules [D17].
"""

import ast
import decimal
import json
import math
import re
import textwrap

from lib.data import BadRow
from verifiers import sandbox

# ---- 1. The program in a response ----------------------------------------------------------------
BLOCK = re.compile(r"```(?:python3?|py)[^\S\n]*\n(.*?)```", re.S | re.I)


def fenced(code):
    """The shortest response that gives this program."""
    return f"</think>\n```python\n{code}\n```"


def extract_code(text, name=None):
    """The last ```python block of a text, or None if it has no block.

    If some blocks define the function `name`, the last of those counts: a response often shows its
    function first and an example call after it.
    """
    blocks = [textwrap.dedent(block) for block in BLOCK.findall(text)]
    if not blocks:
        return None
    if name:
        definition = re.compile(rf"\bdef {re.escape(name)}\b")
        defining = [block for block in blocks if definition.search(block)]
        if defining:
            return defining[-1]
    return blocks[-1]


# ---- 2. Comparison [D17] -------------------------------------------------------------------------
def same_output(got, expected):
    """LiveCodeBench's rule for printed text: equally many lines, and every line the same.

    White space around the text and around each line does not count.
    """
    got_lines = got.strip().split("\n")
    expected_lines = expected.strip().split("\n")
    if len(got_lines) != len(expected_lines):
        return False
    return all(map(same_line, got_lines, expected_lines))


def same_line(got, expected):
    """True if two lines are the same text, or the same list of exact decimals ("6.0" is "6")."""
    got, expected = got.strip(), expected.strip()
    if got == expected:
        return True
    # A program may print a flood of numbers, and their decimals would fill the memory.
    if len(got) >= 2 * len(expected) + 1000:
        return False
    try:
        return decimals(got) == decimals(expected)
    except decimal.InvalidOperation:
        return False  # some word is no number


def decimals(line):
    return [decimal.Decimal(word) for word in line.split()]


def same_value(got, expected):
    """Rule for calls: the same JSON value, with the same types. Floats may differ a little.

    A float and a number are equal within 1e-8 plus 1e-5 of the expected float, or within 1e-8 plus
    1e-5 if an int is expected.
    """
    if isinstance(expected, float) or isinstance(got, float):
        return same_number(got, expected)
    if type(got) is not type(expected):  # True is not 1
        return False
    if isinstance(got, list):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict):
        if got.keys() != expected.keys():
            return False
        return all(same_value(got[key], expected[key]) for key in got)
    return got == expected


def same_number(got, expected):
    """same_value for two values of which one is a float."""
    for value in (got, expected):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
    if got == expected:
        return True
    difference = abs(got - expected)
    scale = abs(expected) if isinstance(expected, float) else 1
    tolerance = 1e-8 + 1e-5 * scale
    # With an infinite tolerance every number would equal infinity.
    return difference <= tolerance and tolerance < math.inf


# ---- 3. The verdicts -----------------------------------------------------------------------------
def run_tests(code, tests, timeout=6.0, memory_mb=4096, stop=False):
    """One verdict per test: ok, wrong, timeout, memory, crash, output (too much of it) or infra.

    tests: in normal form, see normal_form. timeout: CPU seconds of one test [D18].
    stop: run no further test after the first that is not ok.
    """
    name = tests.get("fn_name")
    verdicts = []
    sizes = [len(expected.encode("utf-8", "replace")) for expected in tests["outputs"]]
    results = sandbox.run_each(code, sandbox_jobs(tests), timeout, memory_mb, sizes)
    for result, expected in zip(results, tests["outputs"]):
        verdict = result.status
        if verdict == "ok" and not as_expected(result, expected, name):
            verdict = "wrong"
        verdicts.append(verdict)
        if stop and verdict != "ok":
            break
    # Hand back the slot of this program in the sandbox at once.
    results.close()
    return verdicts


def sandbox_jobs(tests):
    """Yield what the sandbox takes for each test: a standard input, or (name, [arguments])."""
    name = tests.get("fn_name")
    for text in tests["inputs"]:
        if name:
            yield name, [sandbox.load_json(line) for line in text.split("\n") if line]
        else:
            yield text


def as_expected(result, expected, name):
    """True if a test that ran to its end gave the expected output."""
    try:
        if name:
            return same_value(result.value, sandbox.load_json(expected))
        return same_output(result.stdout, expected)
    except (RecursionError, OverflowError):
        # The value is nested beyond reason, or it is an int that no float can hold.
        return False


def table_program(tests, spoil=False):
    """A program that knows every answer. If spoiled, its answer to the last test is wrong.

    It stands in for the reference solution, which most rows do not have.
    """
    answers = dict(zip(tests["inputs"], tests["outputs"]))
    if spoil:
        answers[tests["inputs"][-1]] = '"no such answer"'
    if tests["fn_name"]:
        return (
            "import json\n"
            f"def {tests['fn_name']}(*args): "
            f"return json.loads({answers!r}['\\n'.join(map(json.dumps, args))])\n"
        )
    return f"import sys\nprint({answers!r}[sys.stdin.read()])\n"


# ---- 4. The form of the tests --------------------------------------------------------------------
def normal_form(tests):
    """Tests as a public set writes them -> {"inputs": [str], "outputs": [str], "fn_name"}.

    Without fn_name (None), a test is a standard input and what the program prints. With it, a test
    is the arguments of a call, one JSON value a line, and the JSON of what the call returns.
    Raises BadRow(reason) for tests of no use, and the errors of Python for some unknown forms.
    """
    tests = inputs_and_outputs(tests)
    inputs = tests.get("inputs") or []
    outputs = tests.get("outputs") or []
    name = tests.get("fn_name") or None
    if not isinstance(inputs, list) or not isinstance(outputs, list) or None in inputs + outputs:
        raise BadRow("tests of an unknown form")
    if not inputs or len(inputs) != len(outputs):
        raise BadRow("no tests, or more inputs than outputs")
    if name:
        inputs = [json_lines(arguments) for arguments in inputs]
        outputs = [json.dumps(value) for value in returned_values(outputs)]
    else:
        inputs = [plain_lines(text) for text in inputs]
        outputs = [plain_lines(text) for text in outputs]

    # No program can pass tests that expect two different outputs for one input.
    last_output = dict(zip(inputs, outputs))
    for text, expected in zip(inputs, outputs):
        other = last_output[text]
        if expected != other and not same_output(expected, other):
            raise BadRow("two outputs for one input")
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}


def inputs_and_outputs(tests):
    """Tests as text, as a list of tests or under "test_cases" -> {"inputs", "outputs", ...}."""
    if isinstance(tests, str):
        tests = parse_literal(tests)
    if isinstance(tests, dict) and "test_cases" in tests:  # PrimeIntellect
        if tests.get("language", "python") != "python":
            raise BadRow("not a Python problem")
        tests = tests["test_cases"]
    if not isinstance(tests, list):
        return tests
    # DeepCoder, codeforces: one object per test, and each may name its function.
    names = {test.get("fn_name") or (test.get("metadata") or {}).get("func_name") for test in tests}
    if len(names) != 1:
        raise BadRow("tests of several functions, or none")
    return {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": names.pop(),
    }


def parse_literal(text):
    """A JSON value, or a Python literal: TACO and PrimeIntellect were written by Python's repr."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise BadRow("tests that are neither JSON nor Python literals")


def json_lines(arguments):
    """The arguments of a call, a list or lines of literals, as one JSON value a line."""
    if isinstance(arguments, str):
        arguments = [parse_literal(line) for line in arguments.split("\n") if line.strip()]
    return "\n".join(json.dumps(value) for value in arguments)


def returned_values(outputs):
    """The values that calls return, each given as itself or as the text of a literal."""
    values = [parse_literal(x) if isinstance(x, str) else x for x in outputs]
    # TACO and APPS wrap every result in a list. A text such as "[1]" is meant as it stands.
    wrapped = all(isinstance(value, list) and len(value) == 1 for value in values)
    if wrapped and not isinstance(outputs[0], str):
        values = [value[0] for value in values]
    return values


def plain_lines(text):
    """The input or output of a program, given as text or as a list of lines, as text."""
    if isinstance(text, list):
        return "\n".join(map(str, text))
    return str(text)


# ---- 5. Problems that a comparison cannot judge [D19] --------------------------------------------
# An interactive problem: the program talks with a judge.
INTERACTIVE = re.compile(r"this is an interactive (problem|task)|interactor|flush the output", re.I)
# A problem with several right outputs: it needs a special judge. One alternative per wording.
ANY_ANSWER = re.compile(
    # "if there are multiple answers, any of them is accepted"
    r"(any|multiple|several|more than one) (\w+ )?(valid |correct |possible |optimal )*"
    r"(answer|solution|output)s?.{0,60}(accepted|(print|output|return) any|any of them)"
    # "print any valid permutation", "find any of them", but not "if you cannot find any such x"
    r"|(print|output|return|(?<!not )(?<!n't )find) any"
    r"( (one )?(of (them|these)|valid|suitable|possible|such)|(?=[.,;:)\n]|$))"
    # "there are many such arrays, print one"
    r"|(multiple|several|many) [^.\n]{0,60}(print|output|return) (any|one)\b"
    # "the order of output does not matter"
    r"|order [^.\n]{0,30}(does not|doesn't|arbitrary)"
    # "print them in any order", but not "print the number of ways to visit them in any order"
    r"|(print|output|return)(ed)?\b"
    r"(?! the (n\w+|m\w+|total|sum|cost|score|largest|smallest) )"
    r"[^.:\n]{0,60} in (any|arbitrary) order"
    # "if its absolute or relative error does not exceed 1e-6", "an error of 1e-9"
    r"|(absolute|relative) error [^.\n]{0,40}(exceed|at most|less|within|more than|greater)"
    r"|\berror (of (up|at|less|no|10|1e|\$)|less|greater)"
    r"|(within|at most|up to) [^.\n]{0,25}(error|absolute|relative)",
    re.I | re.S,
)
