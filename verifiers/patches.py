"""Edits of source text, as pure functions on {path: text}: SEARCH/REPLACE blocks and unified diffs.

An edit applies exactly or not at all. Its SEARCH text is a run of whole lines that stands in the
file exactly once. For a file that is empty or does not exist yet, the SEARCH text is blank. These
things are free: prose and fences around a block, the spelling of a path, carriage returns before
line ends, and a missing line end after the last line. What an edit earns is decided in swerl.py.
"""

import difflib
import functools
import io
import posixpath
import re
import tokenize
from collections import Counter


class NoPatch(ValueError):
    """The edits or the patch cannot be read or applied. The log counts its message."""


def replace_lines(text, old, new, at=None):
    """Replace the one place in text where the lines `old` occur by the lines `new`.

    The place has to be unique, unless `old` stands at line index `at`: then that place is taken.
    The new lines get the line end (with or without a carriage return) of the first line they
    replace. Raises NoPatch if there is no such place or more than one.
    """
    lines = text.split("\n")
    bare_lines = [line.rstrip("\r") for line in lines]

    def fits(start):
        return bare_lines[start : start + len(old)] == old

    if at is not None and fits(at):
        starts = [at]
    else:
        starts = [start for start in range(len(lines) - len(old) + 1) if fits(start)]
    if not starts:
        raise NoPatch("text not found")
    if len(starts) > 1:
        raise NoPatch("text found more than once")

    start = starts[0]
    # `start` is past the last line where lines are added to the end of the file.
    first_line = lines[min(start, len(lines) - 1)]
    line_end = "\r" if first_line.endswith("\r") else ""
    lines[start : start + len(old)] = [line + line_end for line in new]
    return "\n".join(lines)


# ---- SEARCH/REPLACE edits ------------------------------------------------------------------------
# The form of one edit. parse_edits reads it, and the prompt of swerl.py shows it.
BLOCK = "### {path}\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE"


def parse_edits(text):
    """Return [(path, old lines, new lines)] of all SEARCH/REPLACE blocks in text.

    A path stays in force until the next "### " line, so several blocks can follow one path.
    Raises NoPatch if there is no block, or one without a path, inside another, or not closed.
    """
    edits = []
    path = None
    section = None  # "search" or "replace" inside a block, None outside
    for line in text.replace("\r\n", "\n").split("\n"):
        marker = line.rstrip()
        if section is None and line.startswith("### "):
            path = marker[4:].strip(" `*")
        elif marker == "<<<<<<< SEARCH":
            if path is None or section is not None:
                raise NoPatch("block without a path, or inside another")
            section = "search"
            old, new = [], []
        elif section == "search" and marker == "=======":
            section = "replace"
        elif section == "replace" and marker == ">>>>>>> REPLACE":
            section = None
            edits.append((path, old, new))
        elif section == "search":
            old.append(line)
        elif section == "replace":
            new.append(line)
    if section is not None:
        raise NoPatch("block not closed")
    if not edits:
        raise NoPatch("no block")
    return edits


def find_file(path, known):
    """Return the known file that a normalised path means, or None if there is none."""
    if path in known:
        return known[path]
    # Unified diffs put a/ or b/ before a path, and models copy that.
    without_prefix = re.sub("^[ab]/", "", path)
    return known.get(without_prefix)


def edited(response, files):
    """Return the files after the edits of a response, {path: text}.

    The thinking is not read. Every edit sees the result of the edits before it. Raises NoPatch if
    the edits cannot be parsed or one of them does not apply.
    """
    _, closed, answer = response.rpartition("</think>")
    if not closed and "<think>" in response:
        raise NoPatch("thinking not closed")

    files = dict(files)
    # normalised path -> the path under which `files` has it
    known = {posixpath.normpath(path): path for path in files}
    for path, old, new in parse_edits(answer):
        path = posixpath.normpath(path)
        file = find_file(path, known)
        if any(line.strip() for line in old):
            if file is None:
                raise NoPatch("unknown file")
            files[file] = replace_lines(files[file], old, new)
            continue

        # A blank SEARCH text writes a whole file. The file has to be empty, or new and inside the
        # repository: the path is neither absolute nor "." nor one that leads above the root.
        if file is None:
            allowed = not re.match(r"/|\.\.?(/|$)", path)
            file = path
        else:
            allowed = not files[file].strip()
        if not allowed:
            raise NoPatch("blank search text")
        known[path] = file
        files[file] = "\n".join(new) + "\n"
    return files


def apply_edits(response, files):
    """Return {path: text} after the edits of a response, or None if they do not parse or apply."""
    try:
        return edited(response, files)
    except NoPatch:
        return None


def as_response(files, after):
    """Write the response whose edits lead from `files` to `after`.

    There is one block a file. It searches the whole old text and replaces it by the whole new one.
    A deleted file is replaced by no line at all.
    """

    def text_of(version, path):
        return version.get(path, "").replace("\r", "").removesuffix("\n")

    blocks = []
    for path in changes(files, after):
        block = BLOCK.format(path=path, old=text_of(files, path), new=text_of(after, path))
        if not after.get(path):
            # An empty {new} leaves one blank line before the end marker. Drop it.
            block = block.replace("\n\n>>>>>>>", "\n>>>>>>>")
        blocks.append(block)
    return "</think>\n" + "\n".join(blocks)


# ---- Unified diffs -------------------------------------------------------------------------------
def read_hunk(lines, num_old, num_new):
    """Take one hunk from the iterator of patch lines and return (old lines, new lines)."""
    old, new = [], []
    while len(old) < num_old or len(new) < num_new:
        line = next(lines, None)
        if line is None:
            raise NoPatch("golden patch is cut off")
        # An empty line is a context line that lost its leading blank.
        mark = line[:1] or " "
        if mark not in " -+\\":
            raise NoPatch("golden patch is cut off")
        # "\ No newline at end of file" belongs to neither side.
        if mark in " -":
            old.append(line[1:])
        if mark in " +":
            new.append(line[1:])
    return old, new


def apply_patch(patch, files):
    """Return {path: text} after a unified diff in the form that git writes.

    A deleted file becomes "". Raises NoPatch if the patch is cut off, binary, or does not apply.
    """
    files = dict(files)
    lines = iter(patch.replace("\r\n", "\n").split("\n"))
    source = None
    target = None
    for line in lines:
        if match := re.match(r"(---|rename from) (?:a/)?([^\t]+)", line):
            source = match[2]
        elif match := re.match(r"(\+\+\+|rename to) (?:b/)?([^\t]+)", line):
            keyword, target = match.groups()
            if target == "/dev/null":
                target = source  # a deleted file
            is_other_file = source not in ("/dev/null", target)
            if is_other_file and source not in files:
                raise NoPatch("golden patch needs a file that is not given")
            if is_other_file and keyword == "rename to":
                files[target] = files[source]
                files[source] = ""
            if source == "/dev/null" and target not in files:
                files[target] = ""  # a new file
        elif match := re.match(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", line):
            # A count that is left out is 1.
            num_old = int(match[1] or 1)
            num_new = int(match[3] or 1)
            old, new = read_hunk(lines, num_old, num_new)
            if target not in files:
                raise NoPatch("golden patch needs a file that is not given")
            # Hunks count lines from 1. A hunk without new lines names the line before it.
            first_line = int(match[2])
            at = first_line - 1 if num_new > 0 else first_line
            files[target] = replace_lines(files[target], old, new, at)
        elif line.startswith(("Binary files", "GIT binary")):
            raise NoPatch("binary patch")
    return files


# The cache pays because swerl.py asks for the golden diff once a rollout and for the candidate's
# diff three times.
@functools.lru_cache(256)
def unified(old, new):
    """Return the unified diff of two texts without its header, with 3 lines of context.

    Carriage returns and the end of the last line are not compared.
    """

    def lines_of(text):
        if not text:
            return []
        # str.splitlines would also cut at form feeds and at line separators inside a string.
        return text.replace("\r\n", "\n").removesuffix("\n").split("\n")

    diff = list(difflib.unified_diff(lines_of(old), lines_of(new), lineterm="", n=3))
    return "\n".join(diff[2:])


def changes(files, other):
    """Return {path: unified diff} of the files that differ; a missing file counts as empty."""
    diffs = {}
    for path in sorted({*files, *other}):
        diff = unified(files.get(path, ""), other.get(path, ""))
        if diff:
            diffs[path] = diff
    return diffs


def as_patch(before, after):
    """Return the unified diff from `before` to `after`, in the form that apply_patch reads."""
    parts = []
    for path, diff in changes(before, after).items():
        source = f"a/{path}" if path in before else "/dev/null"
        parts.append(f"--- {source}\n+++ b/{path}\n{diff}\n")
    return "".join(parts)


# ---- How alike two changes are -------------------------------------------------------------------
# difflib's first search may take this many inner steps. With more, it would last seconds.
MAX_INNER_STEPS = 2e7


def ratio(a, b):
    """Return difflib's ratio of two diffs, in [0, 1].

    Characters are compared. Where that would take more than seconds (a flood of one character),
    lines are compared instead, and where lines are too slow as well, the ratio is 0.
    """
    for x, y in ((a, b), (a.split("\n"), b.split("\n"))):
        # difflib meets every pair of equal items once in its first search.
        count_x, count_y = Counter(x), Counter(y)
        inner_steps = sum(n * count_y[item] for item, n in count_x.items())
        if inner_steps < MAX_INNER_STEPS:
            return difflib.SequenceMatcher(None, x, y, autojunk=False).ratio()
    return 0.0


def similarity(files, predicted, oracle):
    """Return the lexical similarity in [0, 1] of two versions of `files`.

    It is the mean ratio of the two diffs over all files that either side changes. A file that only
    one side changes counts as 0. Two versions without any change are equal, so they get 1.
    """
    predicted_diffs = changes(files, predicted)
    oracle_diffs = changes(files, oracle)
    ratios = []
    for path in predicted_diffs.keys() | oracle_diffs.keys():
        if path in predicted_diffs and path in oracle_diffs:
            ratios.append(ratio(predicted_diffs[path], oracle_diffs[path]))
        else:
            ratios.append(0.0)
    return sum(ratios) / len(ratios) if ratios else 1.0


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
    """Tell whether two versions of a Python file are the same code.

    The same code may differ in comments, blank lines and the width of indentation. For files of
    other languages, and for text that is not Python, the answer is False.
    """
    if not path.endswith(".py"):
        return False
    # Tokenizing is slow. Most versions already differ in their text without comments and spaces.
    if re.sub(r"#.*|\s", "", old) != re.sub(r"#.*|\s", "", new):
        return False
    try:
        return code_tokens(old) == code_tokens(new)
    except (SyntaxError, tokenize.TokenError):
        return False
