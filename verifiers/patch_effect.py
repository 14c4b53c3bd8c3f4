"""What a change of source text does: nothing, nothing but removing, or breaking a file.

Python is judged by its syntax tree, so neither comments nor layout nor spelling matter. Other
languages are judged by their lines.
"""

import ast
import functools
import io
import re
import threading
import tokenize
import warnings
from collections import Counter

from verifiers.patches import changes

# Python warns of odd literals, but neither the log nor a verdict depends on a candidate's style.
FILE_NAME = "<candidate>"
warnings.filterwarnings("ignore", module=FILE_NAME)


# Python 3.11 counts the depth of all trees under construction in one place. If the garbage
# collector lets another thread run meanwhile, which parses as well, both raise SystemError.
ONE_PARSER = threading.Lock()


def parse(source):
    """Return the syntax tree of Python source, or None if this Python does not read it."""
    try:
        with ONE_PARSER:
            return ast.parse(source.removeprefix("\ufeff"), FILE_NAME)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@functools.lru_cache(32)
def syntax_tree(source):
    """Return the syntax tree of Python source as text, or None if this Python does not read it.

    Comments, blanks, line breaks, parentheses and trailing commas are not in it.
    """
    tree = parse(source)
    try:
        return ast.dump(tree) if tree else None
    except RecursionError:
        return None


def code_tokens(source):
    """Return [(type, text)] of the tokens of Python source, without comments and blank lines."""
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        # The width of an indentation and the form of a line end do not matter.
        is_layout = token.type in (tokenize.INDENT, tokenize.NEWLINE)
        tokens.append((token.type, "" if is_layout else token.string))
    return tokens


def same_code(path, old, new):
    """Tell whether two versions of a file are the same code.

    Python is the same if its syntax tree is. Source for another Python has no tree here, so its
    tokens without comments are compared. In files of other languages the same code may differ in
    blank lines and in blanks at line ends.
    """
    if not path.endswith(".py"):
        return code_lines(old) == code_lines(new)
    old_tree, new_tree = syntax_tree(old), syntax_tree(new)
    if old_tree is not None and new_tree is not None:
        return old_tree == new_tree
    # Tokenizing is slow. Most versions already differ in their text without comments and spaces.
    if re.sub(r"#.*|\s", "", old) != re.sub(r"#.*|\s", "", new):
        return False
    try:
        return code_tokens(old) == code_tokens(new)
    except (SyntaxError, tokenize.TokenError):
        return False


def code_lines(text):
    """Return the lines of a text that are not blank, without the blanks at their ends."""
    return [line.rstrip() for line in text.split("\n") if line.strip()]


def stops_parsing(path, old, new):
    """Tell whether a Python file can be read before a change and not after it."""
    return path.endswith(".py") and syntax_tree(old) is not None and syntax_tree(new) is None


def without_new_comments(source, known):
    """Return Python source without the comments that `known` does not have.

    A line that holds nothing but such a comment is left out. Text that is no Python stays as it is.
    """
    lines = source.split("\n")
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.string.rstrip() not in known:
                row, column = token.start
                # A comment reaches to the end of its line. None marks a line that goes.
                lines[row - 1] = lines[row - 1][:column].rstrip() or None
    except (SyntaxError, tokenize.TokenError):
        return source
    return "\n".join(line for line in lines if line is not None)


# The fields of a compound statement that hold statements, exception handlers or cases.
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Expressions that can do more than give a value.
EFFECTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)
# Nodes that literals consist of.
LITERALS = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.UnaryOp)
# Statements behind which no other statement of their block is reached.
ENDS = (ast.Return, ast.Raise, ast.Break, ast.Continue)


def has_effect(expression):
    return any(isinstance(node, EFFECTS) for node in ast.walk(expression))


def is_literal(expression):
    nodes = ast.walk(expression)
    return all(isinstance(node, (*LITERALS, ast.unaryop, ast.expr_context)) for node in nodes)


def names_read(tree):
    """Return the names that code reads anywhere, or shares with other functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            names.update(node.names)
    return names


def bound_names(statement):
    """Return the names that a statement binds and does nothing else, or None if it does more."""
    if isinstance(statement, ast.Assign) and not has_effect(statement.value):
        targets = statement.targets
        return [target.id if isinstance(target, ast.Name) else None for target in targets]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, FUNCTIONS) and not statement.decorator_list:
        return [statement.name]
    return None


def does_nothing(statement, in_function, read):
    """Tell whether a statement, the blocks inside it aside, does nothing.

    It is pass, a value that nobody takes (None, ..., a string), an assignment of a name to itself,
    or in a function an annotation alone or what binds names that are not in `read`. Outside of
    functions another file may read a name.
    """
    if isinstance(statement, (ast.Pass, ast.Global, ast.Nonlocal)):
        return True
    if isinstance(statement, ast.Expr):
        return not has_effect(statement.value)
    if isinstance(statement, ast.AnnAssign) and statement.value is None:
        return in_function
    names = bound_names(statement)
    if names is None or None in names:
        return False
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
        if set(names) == {statement.value.id}:
            return True
    return in_function and read.isdisjoint(names)


def live_block(statement):
    """Return the one block of a statement that is ever run, or None if there is not just one."""
    if isinstance(statement, (ast.If, ast.While)) and isinstance(statement.test, ast.Constant):
        if not statement.test.value:
            return statement.orelse
        if isinstance(statement, ast.If):
            return statement.body
    return None


def list_statements(body, depth, in_function, read):
    """Return [(depth, text, is_plain)] of the statements of a block that do something, in order.

    Statements that are never reached are left out. The text of a compound statement is its head. A
    plain statement returns nothing, or a literal. read: the names that are read in the file.
    """
    found = []
    for statement in body:
        live = live_block(statement)
        if live is not None:
            found += list_statements(live, depth, in_function, read)
            continue
        # A function has a scope of its own. So has a class, but its names are read from outside.
        is_local = in_function
        if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            is_local = isinstance(statement, FUNCTIONS)
        inside = []
        for field in BLOCKS:
            block = getattr(statement, field, [])
            inside += list_statements(block, depth + 1, is_local, read)
        # A test, or a loop, that nothing comes of.
        head = getattr(statement, "test", None) or getattr(statement, "iter", None)
        is_idle = isinstance(statement, (ast.If, ast.For)) and not inside and not has_effect(head)
        if is_idle or does_nothing(statement, in_function, read):
            continue
        is_plain = isinstance(statement, ast.Return)
        if is_plain and statement.value is not None:
            is_plain = is_literal(statement.value)
        found.append((depth, head_of(statement), is_plain))
        found += inside
        if isinstance(statement, ENDS):
            break
    return found


def head_of(statement):
    """Return a statement without the blocks inside it, as text."""
    parts = [type(statement).__name__]
    for field, value in ast.iter_fields(statement):
        if field in BLOCKS:
            continue
        for item in value if isinstance(value, list) else [value]:
            parts.append(ast.dump(item) if isinstance(item, ast.AST) else repr(item))
        parts.append(";")
    return " ".join(parts)


# A line without code, in most languages' spelling.
IDLE_LINE = re.compile(r"\s*(#.*|//.*|pass|return|\.\.\.)?\s*")


@functools.lru_cache(32)
def statements(source, is_python):
    """Return list_statements of a file. Of text that is no Python, each line is a statement."""
    tree = parse(source) if is_python else None
    if tree is not None:
        try:
            return list_statements(tree.body, 0, False, names_read(tree))
        except RecursionError:
            pass
    lines = [line.rstrip() for line in source.split("\n")]
    return [(0, line, False) for line in lines if not IDLE_LINE.fullmatch(line)]


def is_part(some, whole):
    """Tell whether the items of `some` stand in `whole` in the same order."""
    rest = iter(whole)
    return all(item in rest for item in some)


def only_removes(files, predicted, oracle):
    """Tell whether `predicted` adds no statement that does something, where `oracle` adds one.

    files, predicted, oracle: {path: text} before a change, after it, and after the golden one.
    "return", "return None" and other plain returns count only if the golden change adds the same.
    """
    oracle_adds = False
    for path in changes(files, predicted) | changes(files, oracle):
        versions = [version.get(path, "") for version in (files, predicted, oracle)]
        # All versions of a file are read in the same way.
        is_python = path.endswith(".py") and None not in map(syntax_tree, versions)
        before, after, golden = [statements(text, is_python) for text in versions]
        oracle_adds = oracle_adds or not is_part(golden, before)
        added = Counter(golden) - Counter(before)
        before = [item for item in before if not item[2] or item in added]
        after = [item for item in after if not item[2] or item in added]
        if not is_part(after, before):
            return False
    return oracle_adds
