"""Edits of source text, as pure functions on {path: text}: SEARCH/REPLACE blocks and unified diffs.

An edit applies exactly or not at all. Its SEARCH text is a run of whole lines that stands in the
file exactly once. For a file that is empty or does not exist yet, the SEARCH text is blank. These
things are free: prose and fences around a block, the spelling of a path, an edit written twice,
carriage returns before line ends, and a missing line end after the last line. What an edit earns is
decided in swerl.py.
"""

import difflib
import functools
import posixpath
import re
from collections import Counter

import numpy as np


class NoPatch(ValueError):
    """The edits or the patch cannot be read or applied. The log counts its message."""


def find_lines(lines, run):
    """Return the indices at which the lines `run` begin in `lines`."""
    if not run:
        return list(range(len(lines) + 1))
    starts = []
    start = -1
    while True:
        # list.index is much faster than a loop over all lines, and most lines begin no run.
        try:
            start = lines.index(run[0], start + 1)
        except ValueError:
            return starts
        if lines[start : start + len(run)] == run:
            starts.append(start)


def replace_lines(text, old, new, at=None):
    """Replace the one place in text where the lines `old` occur by the lines `new`.

    The place has to be unique, unless `old` stands at line index `at`: then that place is taken.
    The new lines get the line end (with or without a carriage return) of the first line they
    replace. Raises NoPatch if there is no such place or more than one.
    """
    lines = text.split("\n")
    bare_lines = [line.rstrip("\r") for line in lines]

    if at is not None and bare_lines[at : at + len(old)] == old:
        starts = [at]
    else:
        starts = find_lines(bare_lines, old)
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
SEARCH = "<<<<<<< SEARCH"
DIVIDER = "======="
REPLACE = ">>>>>>> REPLACE"


def read_path(line):
    """Return the path that a heading line names, or None if the line is no such heading.

    The prompt asks for "### path". Backticks, bold type, a colon, and "File:" before the path are
    free. A deeper heading has to look like a path, since it can also be a heading of prose.
    """
    heading = re.match(r"(#{3,6}) +(.*)", line)
    if heading is None:
        return None
    level, path = heading.groups()
    path = re.sub(r"(?i)^[*`]*(file|path)[*` ]*:", "", path).strip(" `*:")
    if level != "###" and not re.fullmatch(r"\S*[./]\S*", path):
        return None
    return path


def parse_edits(text):
    """Return [(path, old lines, new lines)] of all SEARCH/REPLACE blocks in text.

    A path stays in force until the next "### " line, so several blocks can follow one path. A block
    is divided at its first line "=======". Raises NoPatch if there is no block, or one without a
    path, inside another, or not closed.
    """
    edits = []
    path = None
    section = None  # "search" or "replace" inside a block, None outside
    for line in text.replace("\r\n", "\n").split("\n"):
        marker = line.rstrip()
        if section is None and read_path(marker) is not None:
            path = read_path(marker)
        elif marker == SEARCH:
            if path is None or section is not None:
                raise NoPatch("block without a path, or inside another")
            section = "search"
            old, new = [], []
        elif section == "search" and marker == DIVIDER:
            section = "replace"
        elif section == "replace" and marker == REPLACE:
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


def move_divider(old, new, text):
    """Return (old, new) of an edit, divided where the file wants it.

    A file can have a line "=======" itself, under a title for instance. Then several lines of a
    block look like the divider. The last one is taken before which stands text of the file.
    """
    bare_lines = [line.rstrip() for line in text.split("\n")]
    block = [*old, DIVIDER, *new]
    dividers = [i for i, line in enumerate(block) if line.rstrip() == DIVIDER]
    for divider in reversed(dividers[1:]):
        longer = [line.rstrip() for line in block[:divider]]
        if find_lines(bare_lines, longer):
            return block[:divider], block[divider + 1 :]
    return old, new


def thought_end(response):
    """Return the index in response where its thought is over, or None if it is not closed.

    The tag </think> can also stand in the text of an edit, and prose can mention it. So tags inside
    a SEARCH/REPLACE block are passed over. Of the others a tag that begins its line counts before
    one that ends its line, and this before one inside a line. Of equals the last one counts.
    """
    best = None
    offset = 0
    block_start = None  # offset of the last SEARCH marker that may open a block
    outside = []  # (offset, line) of the lines outside of blocks
    for line in response.split("\n"):
        marker = line.rstrip()
        if marker == SEARCH:
            block_start = offset
        outside.append((offset, line))
        if marker == REPLACE and block_start is not None:
            while outside and outside[-1][0] >= block_start:
                outside.pop()
            block_start = None
        offset += len(line) + 1

    for offset, line in outside:
        for tag in re.finditer("</think>", line):
            begins_line = not line[: tag.start()].strip()
            ends_line = not line[tag.end() :].strip()
            rank = (begins_line, ends_line, offset + tag.end())
            if best is None or rank > best:
                best = rank
    return best[-1] if best else None


def find_file(path, known):
    """Return the known file that a normalised path means, or None if there is none."""
    if path in known:
        return known[path]
    # Unified diffs put a/ or b/ before a path, and models copy that.
    without_prefix = re.sub("^[ab]/", "", path)
    return known.get(without_prefix)


def edited(response, files):
    """Return the files after the edits of a response, {path: text}.

    The thinking is not read. Every edit sees the result of the edits before it. An edit that was
    made already, and is written again, counts once. Raises NoPatch if the edits cannot be parsed or
    one of them does not apply.
    """
    end = thought_end(response)
    if end is None and "<think>" in response:
        raise NoPatch("thinking not closed")
    edits = parse_edits(response[end or 0 :])

    files = dict(files)
    # normalised path -> the path under which `files` has it
    known = {posixpath.normpath(path): path for path in files}
    for number, (path, old, new) in enumerate(edits):
        if (path, old, new) in edits[:number]:
            continue
        path = posixpath.normpath(path)
        file = find_file(path, known)
        if file is not None:
            old, new = move_divider(old, new, files[file])
        if any(line.strip() for line in old):
            if file is None:
                raise NoPatch("unknown file")
            text = replace_lines(files[file], old, new)
            # An empty REPLACE text is written as one blank line. It empties a file all the same.
            files[file] = text if text.strip() else ""
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
        text = "\n".join(new) + "\n"
        files[file] = text if text.strip() else ""
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
def read_hunk(lines, start, num_old, num_new):
    """Return (old lines, new lines, number of lines) of the hunk that begins at `start`.

    Many sets cut blanks off the end of a patch, and its last lines with them. If both sides lack
    as many lines, these were blank context, which the hunk gets back. Whether the file has such
    lines is seen when the hunk is applied.
    """
    old, new = [], []
    at = start
    while at < len(lines) and (len(old) < num_old or len(new) < num_new):
        # An empty line is a context line that lost its leading blank.
        mark = lines[at][:1] or " "
        if mark not in " -+\\":
            break
        # "\ No newline at end of file" belongs to neither side.
        if mark in " -":
            old.append(lines[at][1:])
        if mark in " +":
            new.append(lines[at][1:])
        at += 1
    missing = num_old - len(old)
    # A hunk that changes nothing yet has lost more than blanks.
    if missing != num_new - len(new) or (missing > 0 and old == new):
        raise NoPatch("golden patch is cut off")
    blank = [""] * missing
    return old + blank, new + blank, at - start


def apply_patch(patch, files):
    """Return {path: text} after a unified diff in the form that git writes.

    A deleted file becomes "". Raises NoPatch if the patch is cut off, binary, or does not apply.
    """
    before = files
    files = dict(before)
    lines = patch.replace("\r\n", "\n").split("\n")
    source = None
    target = None
    created = None
    moved_to = set()
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("diff --git "):
            match = re.match(r"diff --git (?:a/)?(.+) (?:b/)?\1$", line)
            created = match[1] if match else None
        elif line.startswith("new file mode") and created is not None:
            # An empty new file has no hunk, so this line alone says that it is made.
            files.setdefault(created, "")
        elif match := re.match(r"(---|rename from|copy from) (?:a/)?([^\t]+)", line):
            source = match[2]
        elif match := re.match(r"(\+\+\+|rename to|copy to) (?:b/)?([^\t]+)", line):
            keyword, target = match.groups()
            if target == "/dev/null":
                target = source  # a deleted file
            is_other_file = source not in ("/dev/null", target)
            if is_other_file and source not in files:
                raise NoPatch("golden patch needs a file that is not given")
            if is_other_file and keyword != "+++":
                # Git names the state before the whole patch, so that two files can change places.
                files[target] = before.get(source, files[source])
                moved_to.add(target)
                if keyword == "rename to" and source not in moved_to:
                    files[source] = ""
            if source == "/dev/null" and target not in files:
                files[target] = ""  # a new file
        elif match := re.match(r"@@ -\d+(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", line):
            # A count that is left out is 1.
            num_old = int(match[1] or 1)
            num_new = int(match[3] or 1)
            old, new, num_lines = read_hunk(lines, at, num_old, num_new)
            at += num_lines
            if target not in files:
                raise NoPatch("golden patch needs a file that is not given")
            # Hunks count lines from 1. A hunk without new lines names the line before it.
            first_line = int(match[2])
            place = first_line - 1 if num_new > 0 else first_line
            try:
                files[target] = replace_lines(files[target], old, new, place)
            except NoPatch as error:
                is_cut = num_lines < max(num_old, num_new)
                raise NoPatch("golden patch is cut off" if is_cut else str(error))
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


# The diff of a new file without text: a hunk without lines.
EMPTY_FILE = "@@ -0,0 +0,0 @@"


def changes(files, other):
    """Return {path: unified diff} of the files that differ.

    A file that `other` lacks counts as empty. One that `files` lacks is a change even if it is
    empty, since an empty __init__.py makes a package.
    """
    diffs = {}
    for path in sorted({*files, *other}):
        diff = unified(files.get(path, ""), other.get(path, ""))
        if not diff and path not in files and not other[path]:
            diff = EMPTY_FILE
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
# Runs of characters are compared for diffs whose first search takes difflib fewer inner steps.
MAX_INNER_STEPS = 2e7
# Ranges with at most so many pairs of items are searched by a plain loop, which is faster there.
SMALL_RANGE = 30_000


class RunMatcher(difflib.SequenceMatcher):
    """difflib's matcher, with a search for the longest common run that is fast on long texts.

    Its results are those of difflib without junk, down to which of equal runs is taken. difflib
    visits every pair of equal items, which are very many in a flood of one character. Here every
    run of 1, 2, 4, ... items has a number, and equal runs have equal numbers. Two runs of any
    length are equal if the numbers of their two ends are.
    """

    def __init__(self, a, b):
        super().__init__(None, a, b, autojunk=False)
        number_of = {}
        numbers_a = np.array([number_of.setdefault(x, len(number_of)) for x in a], dtype=np.int64)
        numbers_b = np.array([number_of.setdefault(x, len(number_of)) for x in b], dtype=np.int64)
        # levels[k]: the numbers of all runs of 2**k items in a, and in b
        self.levels = []
        length = 1
        while len(numbers_a) and len(numbers_b):
            self.levels.append((numbers_a, numbers_b))
            if not common(numbers_a, numbers_b)[0].any():
                break
            if min(len(numbers_a), len(numbers_b)) <= length:
                break
            # A run of twice the length is a pair of neighbouring runs.
            pairs_a, pairs_b = join(numbers_a, length), join(numbers_b, length)
            _, numbers = np.unique(np.concatenate((pairs_a, pairs_b)), return_inverse=True)
            numbers_a, numbers_b = numbers[: len(pairs_a)], numbers[len(pairs_a) :]
            length *= 2

    def find_longest_match(self, alo=0, ahi=None, blo=0, bhi=None):
        """Return difflib.Match(start in a, start in b, length) of the longest common run.

        Of equally long runs the first one in a is taken, and of its places the first one in b.
        """
        ahi = len(self.a) if ahi is None else ahi
        bhi = len(self.b) if bhi is None else bhi
        if (ahi - alo) * (bhi - blo) <= SMALL_RANGE:
            return self.search_small_range(alo, ahi, blo, bhi)

        # The starts in a and b of all common runs of `length` items. First the length is doubled.
        starts = (np.arange(alo, ahi), np.arange(blo, bhi))
        ends = (ahi, bhi)
        length = 0
        for level in range(len(self.levels)):
            longer = self.common_starts(starts, ends, level, 2**level)
            if not len(longer[0]):
                break
            starts, length = longer, 2**level
        if length == 0:
            return difflib.Match(alo, blo, 0)
        # Then it grows by smaller and smaller steps. A longer run begins where a shorter one does.
        level = length.bit_length() - 1
        for smaller in reversed(range(level)):
            longer = self.common_starts(starts, ends, level, length + 2**smaller)
            if len(longer[0]):
                starts, length = longer, length + 2**smaller
        start_a = int(starts[0][0])
        run = self.a[start_a : start_a + length]
        same = (start for start in starts[1].tolist() if self.b[start : start + length] == run)
        return difflib.Match(start_a, next(same), length)

    def search_small_range(self, alo, ahi, blo, bhi):
        """Return the same by difflib's own loop, but with the places of this range alone."""
        places = {}
        for j in range(blo, bhi):
            places.setdefault(self.b[j], []).append(j)
        best = difflib.Match(alo, blo, 0)
        lengths = {}  # lengths[j]: how long the common run is that ends at the present i and at j
        for i in range(alo, ahi):
            longer = {}
            for j in places.get(self.a[i], ()):
                length = lengths.get(j - 1, 0) + 1
                longer[j] = length
                if length > best.size:
                    best = difflib.Match(i - length + 1, j - length + 1, length)
            lengths = longer
        return best

    def common_starts(self, starts, ends, level, length):
        """Return the starts in a and b of the common runs of this length, among `starts`.

        ends: where the ranges in a and b end. The length is from 2**level to 2**(level + 1).
        """
        keys = []
        fitting = []
        for numbers, side_starts, end in zip(self.levels[level], starts, ends, strict=True):
            side_starts = side_starts[side_starts <= end - length]
            key = numbers[side_starts]
            if length > 2**level:
                # A run is known by the numbers of its two ends, which overlap or touch.
                second_end = numbers[side_starts + length - 2**level]
                key = (key << 32) | second_end
            keys.append(key)
            fitting.append(side_starts)
        in_both = common(*keys)
        return fitting[0][in_both[0]], fitting[1][in_both[1]]


def join(numbers, length):
    """Return one number for each pair of runs that stand `length` items apart."""
    return (numbers[:-length] << 32) | numbers[length:]


def common(a, b):
    """Return two Boolean arrays: which items of a are also in b, and which of b in a."""
    return np.isin(a, b), np.isin(b, a)


def ratio(a, b):
    """Return difflib's ratio of two diffs, in [0, 1].

    Characters are compared. Where that would take more than seconds (a flood of one character),
    lines are compared instead, and where lines are too slow as well, the ratio is 0.
    """
    if a == b:
        return 1.0
    for x, y in ((a, b), (a.split("\n"), b.split("\n"))):
        # difflib meets every pair of equal items once in its first search.
        count_x, count_y = Counter(x), Counter(y)
        inner_steps = sum(n * count_y[item] for item, n in count_x.items())
        if inner_steps < MAX_INNER_STEPS:
            return RunMatcher(x, y).ratio()
    return 0.0


def similarity(files, predicted, oracle):
    """Return the lexical similarity in [0, 1] of two versions of `files`.

    It is the mean ratio of the two diffs over all files that either side changes. A file that only
    one side changes counts as 0. Two versions without any change are equal, so they get 1.
    """
    predicted_diffs = changes(files, predicted)
    oracle_diffs = changes(files, oracle)
    ratios = []
    # Sorted, because the last bit of a sum depends on the order of its terms.
    for path in sorted(predicted_diffs.keys() | oracle_diffs.keys()):
        if path in predicted_diffs and path in oracle_diffs:
            ratios.append(ratio(predicted_diffs[path], oracle_diffs[path]))
        else:
            ratios.append(0.0)
    return sum(ratios) / len(ratios) if ratios else 1.0
