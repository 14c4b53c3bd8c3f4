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
import collections
import decimal
import json
import math
import re
import textwrap

from lib.data import BadRow
from verifiers import sandbox

# A problem's own time limit counts up to here: a wrong field must not hold a slot for an hour.
LONGEST_SECONDS = 60.0
# So many programs are remembered with their verdicts.
MOST_KNOWN = 4096
# {(program, id of its tests, limits): (tests, verdicts)}. An entry keeps its tests alive, so no
# other tests can get their id.
_known = collections.OrderedDict()

# ---- 1. The program in a response ----------------------------------------------------------------
# A line with a fence: what stands before the fence, the fence, what follows it.
FENCE = re.compile(r"^([^\n]*?)(`{3,}|~{3,})([^\n]*)$", re.M)
# What may stand before a fence that opens a block: white space, a quote's ">", a list's "1.".
MARKER = re.compile(r"[\s>]*(?:(?:[-*+]|\d{1,9}[.)])\s+)?")
# "python", "Python3", "py", "{.python .numberLines}", "python title=x", but not "pycon".
PYTHON = re.compile(r"\s*(?:\{\s*)?\.?(?:python|pypy|py)[\d.]*(?![\w-])", re.I)


def fenced(code):
    """The shortest response that gives this program."""
    return f"</think>\n```python\n{code}\n```"


def extract_code(text, name=None):
    """The last Python block of a text, or None if it has no block.

    If some blocks define the function `name`, the last of those counts: a response often shows its
    function first and an example call after it. Blocks without a label count where no block says
    that it is Python.
    """
    labelled, unlabelled = code_blocks(text)
    blocks = labelled or unlabelled
    if not blocks:
        return None
    if name:
        definition = re.compile(rf"\bdef {re.escape(name)}\b")
        defining = [block for block in blocks if definition.search(block)]
        if defining:
            return defining[-1]
    return blocks[-1]


# An open block. label: "python", "" or "other". column: that of its fence. start: of its code.
Block = collections.namedtuple("Block", "fence label column start")


def code_blocks(text):
    """(blocks labelled as Python, blocks without a label) of a text in Markdown, in their order."""
    codes = {"python": [], "": [], "other": []}
    block = None  # the open one
    for line in FENCE.finditer(text):
        if block and closes(block, line):
            codes[block.label].append(closed(text[block.start : line.start()], block))
            block = None
            continue
        opened = opened_block(line)
        # A new block ends one that was left open. Other fences in an open block are its code.
        if block and opened and nobody_closed(block, opened):
            codes[block.label].append(unclosed(text[block.start : line.start()], block))
            block = opened
        block = block or opened
    # A block that is open at the end is no answer, by the format that the prompt asks for and in
    # LiveCodeBench: nobody can tell whether it is complete. A fence behind code does close it.
    if block and block.fence[:3] in text[block.start :]:
        codes[block.label].append(unclosed(text[block.start :], block))
    return codes["python"], codes[""]


def opened_block(line):
    """The Block that a line with a fence opens if no block is open, or None."""
    before, fence, rest = line.groups()
    if "`" in rest:
        return None
    python = PYTHON.match(rest)
    column = len(before)
    if not MARKER.fullmatch(before):
        # Text may stand before the fence if nothing but a label follows: "Here: ```python".
        if not python or rest[python.end() :].strip():
            return None
        column -= len(before.lstrip())
    label = "other" if rest.strip() else ""
    return Block(fence, "python" if python else label, column, line.end() + 1)


def closes(block, line):
    """True if a line with a fence closes an open block, by the rules of CommonMark.

    The fence stands alone on its line, is as long as the opening one and hardly further in. So one
    in a string or in an indented docstring cuts nothing.
    """
    before, fence, rest = line.groups()
    alone = not before.strip() and not rest.strip()
    return alone and len(before) < block.column + 4 and fence.startswith(block.fence)


def nobody_closed(block, opened):
    """True if a block that opens within an open one shows that nobody closed that one.

    It has a label, and is hardly further in. All else within a block is part of its code.
    """
    if opened.column >= block.column + 4 or not opened.label:
        return False
    return opened.label == "python" or opened.fence[0] == block.fence[0]


def closed(body, block):
    """The code of a block with a closing line. A fence behind code ended it before: "print(1)```".

    That is, if the fence stands in no string and no comment, as far as quotes tell.
    """
    for line in FENCE.finditer(body):
        before, fence, rest = line.groups()
        if before.strip() and not rest.strip() and fence.startswith(block.fence):
            code = body[: line.start(2)]
            open_quotes = [code.count(quote) % 2 for quote in ('"""', "'''")]
            open_quotes += [before.count(quote) % 2 for quote in ('"', "'")]
            if not any(open_quotes) and "#" not in before:
                body = code
            break
    return without_indent(body)


def unclosed(body, block):
    """The code of a block without a closing line: up to a fence behind code ("print(1)```")."""
    code, _, _ = body.partition(block.fence[:3])
    return without_indent(code)


def without_indent(code):
    """The code without the indent that all its lines share, as in a list item.

    Code that starts at the margin stays as it is: dedent would empty its strings' blank lines.
    """
    is_indented = code.lstrip("\r\n")[:1] in (" ", "\t")
    return textwrap.dedent(code) if is_indented else code


# ---- 2. Comparison [D17] -------------------------------------------------------------------------
# A number as programs print it. "007" is no number but a text, and so is "1_000".
NUMBER = re.compile(
    r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?inf"
)
# Most difference of printed fractions, and what a double loses of a large one [D29].
ABSOLUTE = decimal.Decimal("1e-6")
RELATIVE = decimal.Decimal("1e-12")


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
    """True if two lines are the same text, or lists of numbers that are the same one by one."""
    got, expected = got.strip(), expected.strip()
    if got == expected:
        return True
    # A program may print a flood of numbers, and their decimals would fill the memory.
    if len(got) >= 2 * len(expected) + 1000 or not (got + expected).isascii():
        return False
    got_words, expected_words = got.split(), expected.split()
    if len(got_words) != len(expected_words):
        return False
    if not all(map(NUMBER.fullmatch, got_words + expected_words)):
        return False
    return all(map(same_printed_number, got_words, expected_words))


def same_printed_number(got, expected):
    """True if two printed numbers are the same decimal, "6.0" and "6", or fractions 1e-6 apart."""
    try:
        got_value, expected_value = decimal.Decimal(got), decimal.Decimal(expected)
        if got_value == expected_value:
            return True
        # [D29] A whole number is exact, whatever its size.
        if not (is_fraction(got) and is_fraction(expected)):
            return False
        tolerance = ABSOLUTE + RELATIVE * abs(expected_value)
        return abs(got_value - expected_value) <= tolerance
    except ArithmeticError:
        return False  # an exponent beyond all reason


def is_fraction(number):
    """True if a number is printed with a decimal point or a negative exponent."""
    return "." in number or "e-" in number.lower()


def same_value(got, expected):
    """Rule for calls: the same JSON value, with the same types. Floats may differ a little.

    A float and a number are equal within 1e-8 plus 1e-5 of the expected float, or within 1e-8 plus
    1e-5 if an int is expected. Beyond 2^53 a float does not hold every int, and has to be exact.
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
    if isinstance(got, int) or isinstance(expected, int):
        if max(abs(got), abs(expected)) >= 2**53:
            return False
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

    In the sandbox a program fares alike in every run, and samples of a problem often have the same
    program, so it is run once on the same tests (the same object). A failure of the sandbox is
    not remembered.
    """
    key = (code, id(tests), timeout, memory_mb, stop)
    _, verdicts = _known.get(key, (None, None))
    if verdicts:
        return list(verdicts)
    verdicts = list(each_verdict(code, tests, timeout, memory_mb, stop))
    if "infra" not in verdicts:
        _known[key] = (tests, tuple(verdicts))
    if len(_known) > MOST_KNOWN:
        _known.popitem(last=False)
    return verdicts


def each_verdict(code, tests, timeout, memory_mb, stop):
    """Run a program on its tests and yield the verdicts, see run_tests."""
    name = tests.get("fn_name")
    sizes = [len(expected.encode("utf-8", "replace")) for expected in tests["outputs"]]
    results = sandbox.run_each(code, sandbox_jobs(tests), timeout, memory_mb, sizes)
    for result, expected in zip(results, tests["outputs"]):
        verdict = result.status
        if verdict == "ok" and not as_expected(result, expected, name):
            verdict = "wrong"
        yield verdict
        if stop and verdict != "ok":
            break
    # Hand back the slot of this program in the sandbox at once.
    results.close()


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
    if not tests["fn_name"]:
        return f"import sys\nprint({answers!r}[sys.stdin.read()])\n"
    calls = {}
    for lines, value in answers.items():
        values = [json.loads(line, object_hook=sandbox.decode_keys) for line in lines.split("\n")]
        calls[repr(values)] = value
    return (
        "import json\n"
        f"def {tests['fn_name']}(*args): return json.loads({calls!r}[repr(list(args))])\n"
    )


# ---- 4. The form of the tests --------------------------------------------------------------------
def normal_form(tests, name=None, header=""):
    """Tests as a public set writes them -> {"inputs": [str], "outputs": [str], "fn_name"}.

    Without fn_name (None), a test is a standard input and what the program prints. With it, a test
    is the arguments of a call, one JSON value a line, and the JSON of what the call returns.
    name: of the function, where the row has it outside its tests. header: the row's starter code.
    Raises BadRow(reason) for tests of no use, and the errors of Python for some unknown forms.
    """
    tests = inputs_and_outputs(tests)
    inputs = tests.get("inputs") or []
    outputs = tests.get("outputs") or []
    if not isinstance(inputs, list) or not isinstance(outputs, list) or None in inputs + outputs:
        raise BadRow("tests of an unknown form")
    if not inputs or len(inputs) != len(outputs):
        raise BadRow("no tests, or more inputs than outputs")

    name, signature = find_function(tests, name, header)
    if name:
        inputs = [json_lines(arguments, signature) for arguments in inputs]
        outputs = [json.dumps(value) for value in returned_values(outputs, signature)]
    else:
        inputs = [plain_lines(text) for text in inputs]
        outputs = [plain_lines(text) for text in outputs]

    # A program that does nothing would pass [D30].
    if all(output.strip() in ("", "null" if name else "") for output in outputs):
        raise BadRow("nothing to compute: every expected output is empty")
    # No program can pass tests that expect two different outputs for one input.
    last_output = dict(zip(inputs, outputs))
    for text, expected in zip(inputs, outputs):
        other = last_output[text]
        if expected != other and not same_output(expected, other):
            raise BadRow("two outputs for one input")
    return {"inputs": inputs, "outputs": outputs, "fn_name": name}


def inputs_and_outputs(tests):
    """Tests as text, as a list of tests or under "test_cases" -> {"inputs", "outputs", ...}.

    "fn_name": what the tests themselves say. "kind": "call" or "stdin" if they say which they are.
    """
    if isinstance(tests, str):
        tests = parse_literal(tests)
    if isinstance(tests, dict) and "test_cases" in tests:  # PrimeIntellect
        if tests.get("language", "python") != "python":
            raise BadRow("not a Python problem")
        tests = tests["test_cases"]
    if not isinstance(tests, list):
        return tests | {"fn_name": name_in(tests), "kind": kind_of(tests)}
    # DeepCoder, codeforces: one object per test, and each may name its function.
    names = {name_in(test) for test in tests}
    kinds = {kind_of(test) for test in tests}
    if len(names) != 1 or len(kinds) != 1:
        raise BadRow("tests of several functions, or none")
    return {
        "inputs": [test["input"] for test in tests],
        "outputs": [test["output"] for test in tests],
        "fn_name": names.pop(),
        "kind": kinds.pop(),
    }


def name_in(fields):
    """The name of a function in a row or a test: "fn_name" or "func_name" of its metadata."""
    metadata = fields.get("metadata")
    if isinstance(metadata, str) and is_literal(metadata):
        metadata = parse_literal(metadata)
    if not isinstance(metadata, dict):
        metadata = {}
    return fields.get("fn_name") or metadata.get("func_name") or None


def kind_of(test):
    """ "call" or "stdin" if a test says which it is, else None."""
    kind = str(test.get("testtype") or test.get("type"))
    if kind.startswith("func"):
        return "call"
    return "stdin" if kind.startswith("stdin") else None


def parse_literal(text):
    """A JSON value, or a Python literal: TACO and PrimeIntellect were written by Python's repr."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise BadRow("tests that are neither JSON nor Python literals")


# ---- The function that is asked for --------------------------------------------------------------
# What a header says of a function. parameters: its annotation (a node of ast, or None) by name;
# None: not known. returns: such an annotation.
Signature = collections.namedtuple("Signature", "parameters returns")
UNKNOWN = Signature(None, None)


def find_function(tests, name, header):
    """(name of the function, its Signature), or (None, UNKNOWN) for programs that read stdin.

    A row that asks for a function in any way is never read as a program's [D30].
    """
    functions, classes = read_header(header)
    # The tests name it, or else the row, or else the header, if it has one function. Tests that say
    # that they are a program's are never read as calls.
    if tests["fn_name"]:
        name = tests["fn_name"]
    elif tests["kind"] == "stdin":
        name = None
    elif not name and len(functions) == 1:
        (name,) = functions
    if not name:
        texts = tests["inputs"]
        by_name = all(isinstance(text, str) and arguments_by_name(text) for text in texts)
        if tests["kind"] == "call" or defines_function(header) or by_name:
            raise BadRow("a function is asked for, and nothing names it")
        return None, UNKNOWN
    # LeetCode's "Solution().twoSum" is the method of a new Solution.
    name = name.rpartition(".")[2]
    if not name.isidentifier():
        raise BadRow("tests of an unknown form")
    if name in classes:
        raise BadRow("a class is asked for, not a function")
    return name, functions.get(name, UNKNOWN)


def defines_function(header):
    """Whether a header, of whatever language, begins a function or a class."""
    return bool(re.search(r"^\s*(def|class)\b", header, re.M))


def read_header(header):
    """({name: Signature} of the functions of a header, {names of its classes}).

    Its functions are those at the top and the methods of class Solution. The last one may lack its
    body.
    """
    for body in ("", "\n" + 40 * " " + "pass"):
        try:
            tree = ast.parse(header.expandtabs(4).rstrip() + body)
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            tree = ast.Module([], [])  # so far it is no Python
    functions = {}
    classes = set()
    for node in tree.body:
        members = [node]
        if isinstance(node, ast.ClassDef):
            classes.add(node.name)
            members = node.body if node.name == "Solution" else []
        for member in members:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                functions[member.name] = signature_of(member, is_method=member is not node)
    return functions, classes


def signature_of(function, is_method):
    """The Signature of a function in a syntax tree."""
    arguments = function.args
    parameters = {argument.arg: argument.annotation for argument in arguments.args}
    if is_method and not function.decorator_list:
        parameters.pop("self", None)
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults:
        parameters = None
    return Signature(parameters, function.returns)


def fits(value, annotation):
    """Whether JSON holds a value of this type. False for types of one's own, like TreeNode."""
    if annotation is None:
        return True
    if isinstance(annotation, ast.Constant):
        if isinstance(annotation.value, str):  # an annotation in quotes
            return True
        return annotation.value is value  # None
    if isinstance(annotation, ast.BinOp):  # X | Y
        return fits(value, annotation.left) or fits(value, annotation.right)
    # Take "List" and its items out of "List[int]" or "typing.List[int]".
    items = []
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        annotation = annotation.value
    name = getattr(annotation, "attr", getattr(annotation, "id", "")).lower()
    if name == "optional":
        return value is None or all(fits(value, item) for item in items)
    if name == "union":
        return any(fits(value, item) for item in items)
    if name in ("list", "sequence", "iterable"):
        return isinstance(value, list) and all(fits(x, item) for x in value for item in items)
    if name == "tuple":
        return isinstance(value, (list, tuple))
    if name in ("dict", "mapping", "defaultdict"):
        return isinstance(value, dict)
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    kinds = {"int": int, "str": str, "bool": bool, "any": type(value), "object": type(value)}
    return type(value) is kinds.get(name)


# ---- Arguments and results -----------------------------------------------------------------------
def json_lines(arguments, signature=UNKNOWN):
    """The arguments of a call as one JSON value a line.

    They are a list, lines of literals, or given by name: as an object, or as "n = 5, k = [1]".
    """
    names = signature.parameters and list(signature.parameters)
    if isinstance(arguments, str):
        by_name = arguments_by_name(arguments)
        if by_name:
            arguments = by_name
        else:
            lines = [line for line in arguments.split("\n") if line.strip()]
            arguments = [parse_literal(line) for line in lines]
            # A single object may hold the arguments by name.
            if names and len(names) > 1 and len(arguments) == 1 and is_keyed(arguments[0], names):
                arguments = arguments[0]
    else:
        arguments = whole_keys(arguments)
    if isinstance(arguments, dict):
        if not names or not is_keyed(arguments, names):
            raise BadRow("arguments that do not fit the function header, or no header")
        arguments = [arguments[name] for name in names]
    if names is not None:
        annotations = signature.parameters.values()
        if len(arguments) != len(names) or not all(map(fits, arguments, annotations)):
            raise BadRow("arguments that do not fit the function header, or no header")
    return "\n".join(json.dumps(encode_keys(value)) for value in arguments)


def is_keyed(value, names):
    """Whether a value is an object with exactly these keys."""
    return isinstance(value, dict) and value.keys() == set(names)


def arguments_by_name(text):
    """{name: value} of arguments written as "n = 5, k = [1]" or one a line, else None."""
    if not re.match(r"\s*[A-Za-z_]\w*\s*=[^=]", text):
        return None
    try:
        call = ast.parse(f"f({text.strip()})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        try:
            call = ast.parse(f"f({', '.join(text.strip().splitlines())})", mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    if not isinstance(call, ast.Call) or call.args:
        return None
    call = JsonConstants().visit(call)
    try:
        return {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords}
    except (ValueError, TypeError, RecursionError, MemoryError):
        return None


class JsonConstants(ast.NodeTransformer):
    """Read true, false and null as JSON does: LeetCode writes them so."""

    values = {"true": True, "false": False, "null": None}

    def visit_Name(self, node):
        return ast.Constant(self.values[node.id]) if node.id in self.values else node


def whole_keys(value):
    """A value of APPS or TACO, whose runners read the keys of an argument {"1": 2} as numbers."""
    if isinstance(value, list):
        return [whole_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    if keys and all(isinstance(key, str) and re.fullmatch(r"-?\d{1,18}", key) for key in keys):
        keys = [int(key) for key in keys]
    return dict(zip(keys, map(whole_keys, value.values())))


def encode_keys(value):
    """A value whose dictionaries have only text as keys: {1: 2} becomes {"": [[1, 2]]}.

    sandbox.decode_keys undoes it for the program.
    """
    if isinstance(value, (list, tuple)):
        return [encode_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    if all(isinstance(key, str) for key in value) and value.keys() != {""}:
        return {key: encode_keys(item) for key, item in value.items()}
    if any(isinstance(key, tuple) for key in value):
        raise BadRow("tests of an unknown form")
    return {"": [[key, encode_keys(item)] for key, item in value.items()]}


def returned_values(outputs, signature=UNKNOWN):
    """The values that calls return: of the ways to read them, the first that fits the header."""
    for values in readings(outputs):
        if all(fits(value, signature.returns) for value in values):
            return values
    raise BadRow("results that do not fit the function header")


# It begins as a list, an object, a quoted text or a number with a sign, or it has several lines.
BROKEN_LITERAL = re.compile(r"^[\[({\"'+.-]|^(inf|nan)|\n", re.I)


def readings(outputs):
    """Yield the ways to read the results of calls, the likeliest first."""
    if all(isinstance(x, str) for x in outputs):
        if all(is_literal(x) for x in outputs):
            yield [parse_literal(x) for x in outputs]
        # If one is none, all are bare strings; but not where it looks like a broken literal.
        elif any(BROKEN_LITERAL.search(x.strip()) for x in outputs):
            raise BadRow("tests that are neither JSON nor Python literals")
        yield outputs
        return
    values = [parse_literal(x) if isinstance(x, str) else x for x in outputs]
    # TACO and APPS wrap every result in a list. Where only some are lists of one, who knows.
    of_one = [isinstance(value, list) and len(value) == 1 for value in values]
    if all(of_one):
        yield [value[0] for value in values]
    elif any(of_one) and not all(isinstance(value, list) for value in values):
        raise BadRow("results of which only some are wrapped in a list")
    yield values


def is_literal(text):
    """Whether a text is a JSON value or a Python literal."""
    try:
        parse_literal(text)
    except BadRow:
        return False
    return True


def plain_lines(text):
    """The input or output of a program, given as text or as a list of lines, as text."""
    lines = text if isinstance(text, list) else [text]
    for line in lines:
        if isinstance(line, bool) or not isinstance(line, (str, int, float)):
            raise BadRow("tests of an unknown form")
    return "\n".join(map(str, lines))


def time_limit(value):
    """Seconds of a limit: 2, "2.0 seconds", "2000 ms", 2000 or {"seconds": 2}. None if unknown."""
    if isinstance(value, dict):
        seconds = (value.get("seconds") or 0) + (value.get("nanos") or 0) / 1e9
    else:
        written = re.match(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).lower())
        if not written:
            return None
        seconds = float(written[1])
        # No known problem has a limit of 100 seconds, or one under 100 milliseconds.
        unit = written[2]
        if unit.startswith(("ms", "milli")) or (not unit and seconds >= 100):
            seconds /= 1000
        elif unit.startswith("m"):
            seconds *= 60
    return min(seconds, LONGEST_SECONDS) or None


# ---- 5. Problems that a comparison cannot judge [D19] --------------------------------------------
# An interactive problem: the program talks with a judge.
INTERACTIVE = re.compile(
    r"interactive (problem|task|challenge)|(problem|task) is interactive|\binteractor\b"
    r"|flush (the |your )?(output|stdout|standard output|stream|buffer)|stdout\.flush|fflush"
    r"|\bprint.{0,40}\bflush\b"
    r"|(forget|remember|sure|need|have|must) (to )?flush\b(?! the (?!output|std|standard))"
    r"|(communicates?|interacts?|interaction|talks?) (with|to) (the|a|our) "
    r"(jury|judge|grader|system|testing|checker)"
    r"|\bask (the|our) (judge|jury|grader|system)\b|(judge|jury|grader) is adaptive"
    r"|(reply|replies|response|answer)s? (of|from) the (judge|jury|grader|interactor)",
    re.I,
)
# A sentence about what a program prints. To return home, or to report to the base, prints nothing.
PRINTS = (
    r"\b(?:(?:print|output|report|display)(?:ed)?|returns?|returned)\b(?! (?:to |home|back|from))"
)
VERB = r"(?:print|output|return|report|display|write|give)"
ANSWER = r"(?:answer|solution|output|result|response)s?\b"
# It prints one number: the order in which things were done to get it is free, its value is not.
ONE_NUMBER = re.compile(
    PRINTS
    + r" (?:only )?(?:the |a |its |their )?(?:\w+ )?(?:number|amount|count|minimum|maximum|min"
    r"|max|total|sum|cost|score|length|size|probability|smallest|largest|least|most|fewest|highest"
    r"|lowest|greatest|longest|shortest|earliest|latest|product|profit|median)\b"
    r"(?!.*\b(?:then|followed by|and the|and then|and print|and output)\b)",
    re.I,
)
FREE_ORDER = re.compile(
    r"\b(?:any|arbitrary|whatever|no particular|an? arbitrary) (?:\w+ )?order\b"
    r"|\border\b.{0,60}?\b(?:(?:does|do)(?:n't| not) matter|is(?:n't| not) (?:important|relevant)"
    r"|is (?:unimportant|irrelevant|arbitrary|up to you)|(?:can|may) be arbitrary)",
    re.I,
)
ABOUT_OUTPUT = re.compile(
    PRINTS + r"|\b(?:your|the) " + ANSWER + r"|\blines (?:can|may) (?:be|go|appear|come)"
    r"|\b(?:can|may) be listed\b",
    re.I,
)
# 10^{-6}, 10-6, $10^{-6}$, 1e-6, 0.0001
SMALL = r"(?:10\s*\^?\s*\{?\s*[-\u2212]\s*\d|1(?:\.0)?e-\d|0?\.0+1\b)"
# Wordings that leave the output open wherever they stand. One alternative per wording.
ANY_ANSWER = re.compile(
    # "print any valid permutation", "give any.", but not "do not print any spaces"
    r"(?<!not )(?<!n't )(?<!never )\b" + VERB + r" any\b(?!-)"
    r"(?! (?:more|extra|other|additional|further|number|amount|leading|trailing)\b)"
    r"|(?<!not )(?<!n't )\bfind any(?= (?:one )?(?:of (?:them|these)|valid|suitable|possible|such)"
    r"|[.,;:)]|$)"
    # "print a possible order", "find an arbitrary assignment", "print whichever you find"
    r"|\b" + VERB + r" (?:an?|one|some) (?:possible|valid|suitable|feasible|such)\b"
    r"|\b(?:find|" + VERB + r") (?:an |some )arbitrary\b(?! order)|\b" + VERB + r" whichever\b"
    # "any valid triple will be accepted", but not "by the automaton"
    r"|\b(?:any|all) (?:\w+ ){1,5}?(?:is|are|be) "
    r"(?:accepted|acceptable|considered (?:a )?correct)\b(?! (?:by|if) )"
    r"|\bany (?:one )?will do\b|\baccepts (?:any|every|all) (?:correct|valid)\b"
    # "there are several solutions; choose any", "many such arrays, print one of them"
    r"|\b(?:any|multiple|several|more than one|many|different) .{0,80}?"
    r"(?:accepted(?! (?:by|if) )|any of them|which (?:one )?to " + VERB + r"\b"
    r"|\b(?:choose|pick|show|find|" + VERB + r") "
    r"(?:any|one)(?= (?:of (?:them|these|those)|such)|[.,;:)]|$))"
    r"|(?:does not|doesn't) matter which .{0,20}(?:choose|" + VERB + r")"
    r"|\beither (?:one )?(?:can|may) be (?:printed|output|returned)"
    r"|\bspecial (?:judge|checker)\b"
    # "if its absolute or relative error does not exceed 1e-6"
    r"|\b(?:absolute|relative) error .{0,40}(?:exceed|at most|less|within|more than|greater|up to)"
    r"|\berror (?:of (?:up|at|less|no|10|1e|\$)|less|greater)"
    r"|\b(?:within|at most|up to) .{0,25}\b(?:error|absolute|relative)\b"
    r"|\b(?:tolerance|error|differ|accura|precision|within|deviat|off by)(?:(?!at least).){0,60}"
    + SMALL
    + r"|"
    + SMALL
    + r" (?:off|away from|of) the (?:exact|true|correct)",
    re.I,
)
# An input may be given with an error, or in any order.
ABOUT_INPUT = re.compile(r"\b(?:is|are) given\b|\binput\b", re.I)


def is_interactive(problem):
    """Whether the wording of a problem says that the program talks with a judge."""
    return bool(INTERACTIVE.search(problem))


def has_several_answers(problem):
    """Whether the wording of a problem says that several outputs are right."""
    return any(map(leaves_output_open, sentences(problem)))


def sentences(text):
    """The sentences of a text. A line that begins with a small letter continues the one before."""
    joined = re.sub(r"\n[ \t]*(?=[a-z])", " ", text)
    return re.split(r"(?<=[.!?])\s+|\n", joined)


def leaves_output_open(sentence):
    """Whether a sentence says that several outputs are right."""
    if ABOUT_INPUT.search(sentence) and not ABOUT_OUTPUT.search(sentence):
        return False
    if ANY_ANSWER.search(sentence):
        return True
    # "Print them in any order", "the order of the output does not matter".
    free = FREE_ORDER.search(sentence)
    if not free or ONE_NUMBER.search(sentence):
        return False
    if ABOUT_INPUT.search(sentence, max(0, free.start() - 40), free.start()):
        return False
    return bool(ABOUT_OUTPUT.search(sentence, 0, free.end()))
