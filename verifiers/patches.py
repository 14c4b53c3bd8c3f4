"""Edits of source text: SEARCH/REPLACE blocks and unified diffs, as pure functions on {path: text}. swerl.py says what an edit earns.

An edit applies exactly or not at all: SEARCH text is whole lines that stand in the file once, or blank for a file that is empty or not there yet.
Free are prose and fences around a block, the spelling of a path, CRLF and the end of the last line.
"""

import difflib
import functools
import io
import posixpath
import re
import tokenize
from collections import Counter


class NoPatch(ValueError):
    """The edits or the patch cannot be read or applied; the message is the reason that the log counts."""


def replace_lines(text, old, new, at=None):
    """Replace the one place of text where `old` occurs as whole lines by `new`, whose lines end the way the old ones do. With `at`, that place
    is taken if it fits."""
    lines = text.split("\n")
    bare = [line.rstrip("\r") for line in lines]
    fits = lambda i: bare[i : i + len(old)] == old
    hits = (
        [at]
        if at is not None and fits(at)
        else list(filter(fits, range(len(lines) - len(old) + 1)))
    )
    if len(hits) != 1:
        raise NoPatch("text found more than once" if hits else "text not found")
    end = "\r" if lines[min(hits[0], len(lines) - 1)].endswith("\r") else ""
    lines[hits[0] : hits[0] + len(old)] = [line + end for line in new]
    return "\n".join(lines)


# ---- SEARCH/REPLACE edits ------------------------------------------------------------------------
# one edit, as parse_edits reads it
BLOCK = "### {path}\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE"


def parse_edits(text):
    """[(path, old lines, new lines)] of all SEARCH/REPLACE blocks; prose and fences around them are free."""
    edits, path, part = [], None, None
    for line in text.replace("\r\n", "\n").split("\n"):
        mark = line.rstrip()
        if part is None and line.startswith("### "):
            path = mark[4:].strip(" `*")
        elif mark == "<<<<<<< SEARCH":
            if path is None or part is not None:
                raise NoPatch("block without a path, or inside another")
            old, new = [], []
            part = old
        elif part is not None and part is old and mark == "=======":
            part = new
        elif part is not None and part is new and mark == ">>>>>>> REPLACE":
            edits.append((path, old, new))
            part = None
        elif part is not None:
            part.append(line)
    if part is not None or not edits:
        raise NoPatch("block not closed" if part is not None else "no block")
    return edits


def edited(response, files):
    """Files after the edits of a response, or NoPatch. Edits see the result of those before them."""
    head, closed, answer = response.rpartition("</think>")
    if not closed and "<think>" in response:
        raise NoPatch("thinking not closed")
    files, known = dict(files), {posixpath.normpath(path): path for path in files}
    for path, old, new in parse_edits(answer):
        path = posixpath.normpath(path)
        key = next((known[p] for p in (path, re.sub("^[ab]/", "", path)) if p in known), None)
        blank = not any(line.strip() for line in old)
        if key is not None and not blank:
            files[key] = replace_lines(files[key], old, new)
        elif blank and (
            not files[key].strip() if key is not None else not re.match(r"/|\.\.?(/|$)", path)
        ):
            known[path], files[key or path] = key or path, "\n".join(new) + "\n"
        else:
            raise NoPatch("blank search text" if blank else "unknown file")
    return files


def apply_edits(response, files):
    """{path: text} after the edits of a response, or None if they do not parse or apply."""
    try:
        return edited(response, files)
    except NoPatch:
        return None


def as_response(files, after):
    """The response that makes this change: one block a file, the whole file searched and replaced (a deleted one by nothing)."""
    text = lambda version, path: version.get(path, "").replace("\r", "").removesuffix("\n")
    blocks = {
        path: BLOCK.format(path=path, old=text(files, path), new=text(after, path))
        for path in changes(files, after)
    }
    return "</think>\n" + "\n".join(
        block if after.get(path) else block.replace("\n\n>>>>>>>", "\n>>>>>>>")
        for path, block in blocks.items()
    )


# ---- Unified diffs -------------------------------------------------------------------------------
def apply_patch(patch, files):
    """{path: text} after a unified diff, as git writes it; a deleted file becomes "". NoPatch if it does not apply."""
    files, lines, source, target = (
        dict(files),
        iter(patch.replace("\r\n", "\n").split("\n")),
        None,
        None,
    )
    for line in lines:
        if name := re.match(r"(---|rename from) (?:a/)?([^\t]+)", line):
            source = name[2]
        elif name := re.match(r"(\+\+\+|rename to) (?:b/)?([^\t]+)", line):
            target = source if name[2] == "/dev/null" else name[2]
            if source not in files and source not in ("/dev/null", target):
                raise NoPatch("golden patch needs a file that is not given")
            if source not in ("/dev/null", target) and name[1] == "rename to":
                files[target], files[source] = files[source], ""
            if target not in files and source == "/dev/null":
                files[target] = ""
        elif hunk := re.match(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", line):
            num_old, num_new = (1 if n is None else int(n) for n in hunk.group(1, 3))
            old, new = [], []
            while len(old) < num_old or len(new) < num_new:
                body = next(lines, None)
                if body is None or body[:1] not in " +-\\":
                    raise NoPatch("golden patch is cut off")
                # an empty line is context whose blank was stripped
                old += [body[1:]] if body[:1] in " -" else []
                new += [body[1:]] if body[:1] in " +" else []
            if target not in files:
                raise NoPatch("golden patch needs a file that is not given")
            files[target] = replace_lines(files[target], old, new, at=int(hunk[2]) - (num_new > 0))
        elif line.startswith(("Binary files", "GIT binary")):
            raise NoPatch("binary patch")
    return files


# the golden diff is asked for once a rollout, the candidate's three times
@functools.lru_cache(256)
def unified(old, new):
    """Unified diff of two texts without its header: 3 lines of context, line ends not compared."""
    # splitlines would cut at form feeds
    lines = lambda text: text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
    return "\n".join(list(difflib.unified_diff(lines(old), lines(new), lineterm="", n=3))[2:])


def changes(files, other):
    """{path: unified diff} of the files that differ; a missing file counts as an empty one."""
    diffs = {
        path: unified(files.get(path, ""), other.get(path, "")) for path in sorted({*files, *other})
    }
    return {path: diff for path, diff in diffs.items() if diff}


def as_patch(before, after):
    """Unified diff of {path: text} against another, in the form that apply_patch reads."""
    head = lambda path: f"--- {'a/' + path if path in before else '/dev/null'}\n+++ b/{path}\n"
    return "".join(head(path) + diff + "\n" for path, diff in changes(before, after).items())


# ---- How alike two changes are -------------------------------------------------------------------
def ratio(a, b):
    """difflib's ratio of two diffs by character; by line where that would take seconds (floods of one character)."""
    for x, y in ((a, b), (a.split("\n"), b.split("\n"))):
        left, right = Counter(x), Counter(y)
        # inner steps of difflib's first search
        if sum(n * right[item] for item, n in left.items()) < 2e7:
            return difflib.SequenceMatcher(None, x, y, autojunk=False).ratio()
    return 0.0


def similarity(files, predicted, oracle):
    """Lexical similarity in [0, 1]: mean ratio of the two diffs over all files touched by either side."""
    ours, golden = changes(files, predicted), changes(files, oracle)
    both, touched = ours.keys() & golden.keys(), ours.keys() | golden.keys()
    ratios = [ratio(ours[path], golden[path]) if path in both else 0.0 for path in touched]
    return sum(ratios) / len(ratios) if ratios else 1.0


def same_code(path, old, new):
    """True if two versions of a Python file differ in comments, blank lines and the width of indentation only."""
    # cheap
    if not path.endswith(".py") or len({re.sub(r"#.*|\s", "", text) for text in (old, new)}) > 1:
        return False
    try:
        versions = [
            list(tokenize.generate_tokens(io.StringIO(text).readline)) for text in (old, new)
        ]
    except (SyntaxError, tokenize.TokenError):
        return False
    blank, layout = (tokenize.COMMENT, tokenize.NL), (tokenize.INDENT, tokenize.NEWLINE)
    a, b = (
        [(t.type, t.type in layout or t.string) for t in tokens if t.type not in blank]
        for tokens in versions
    )
    return a == b
