"""Unit tests that are Python asserts (HumanEval, MBPP), as calls with the result that is expected.

An assert runs inside the program that it tests, where the program could answer it without solving
anything: by an object that equals everything, or by leaving with success. So asserts are not run. A
plain one, `assert f(1, 2) == 3`, says which call gives what; a row with any other is dropped.
"""

import ast

from lib.data import BadRow

REASON = "tests that are no plain asserts, like assert f(1) == 2"


def asserted_calls(row):
    """{"inputs", "outputs", "fn_name"} of the asserts of a row, or {} if it has none.

    HumanEval has a function check(candidate) in `test` and the name in `entry_point`; MBPP has a
    list of asserts, which call the function by its name. Raises BadRow.
    """
    lines = [*(row.get("test_list") or []), *(row.get("challenge_test_list") or [])]
    source = row.get("test") or "\n".join(map(str, lines))
    if not isinstance(source, str) or not source.strip():
        return {}
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadRow(REASON)

    name = None
    if row.get("test"):
        checks = [node for node in statements if isinstance(node, ast.FunctionDef)]
        if len(checks) != 1 or checks[0].name != "check" or not row.get("entry_point"):
            raise BadRow(REASON)
        statements, name = checks[0].body, str(row["entry_point"])
    names, inputs, outputs = set(), [], []
    for node in statements:
        if is_no_test(node):
            continue
        called, arguments, expected = read_assert(node)
        names.add(called)
        inputs.append(arguments)
        outputs.append(expected)
    if len(names) != 1:
        raise BadRow(REASON)
    return {"inputs": inputs, "outputs": outputs, "fn_name": name or names.pop()}


def is_no_test(node):
    """Whether a statement tests nothing: a text, an import, or `assert True`."""
    if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant):
        return True
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass))


def read_assert(node):
    """(name, arguments, expected result) of `assert name(arguments) == result`, all of it literals.

    The arguments are a list, or an object if the call names them; the result is a text, from which
    "10" and 10 are told apart. Raises BadRow.
    """
    try:
        call, (operator,) = node.test.left, node.test.ops
        (expected,) = node.test.comparators
        if not isinstance(operator, ast.Eq) or (call.args and call.keywords):
            raise BadRow(REASON)
        arguments = [plain_value(argument, (list,)) for argument in call.args]
        if call.keywords:
            arguments = {word.arg: plain_value(word.value, (list,)) for word in call.keywords}
        # A list that is returned for a tuple passes, as in all other sets.
        return call.func.id, arguments, repr(plain_value(expected, (list, tuple)))
    except (AttributeError, ValueError, TypeError, RecursionError, MemoryError):
        raise BadRow(REASON)


def plain_value(node, sequences):
    """The value of a literal. Raises BadRow for what JSON does not hold.

    sequences: list, or list and tuple. A program could need its argument to be a tuple.
    """
    value = ast.literal_eval(node)
    if holds_only_json(value, sequences):
        return value
    raise BadRow(REASON)


def holds_only_json(value, sequences):
    """Whether JSON can write the value. A tuple counts as a list if `sequences` has it."""
    if isinstance(value, sequences):
        return all(holds_only_json(item, sequences) for item in value)
    if isinstance(value, dict):
        items = [*value.keys(), *value.values()]
        return all(holds_only_json(item, sequences) for item in items)
    return value is None or isinstance(value, (bool, int, float, str))
