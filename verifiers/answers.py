"""Math answers: is the answer in the last box equal to the gold answer?

    last_box(text)                the content of the last \\boxed{} of a response
    same_answer(gold, answer)     True, False, or None if the verifier gave up or had to be killed
    answer_pool(n)              threads with a child process each, in which same_answer may run

Integers and plain numbers are compared here. Everything else goes to math-verify (sympy), which
can hang on hostile LaTeX, so it runs in a child process that is killed after VERIFY_SECONDS.
Before that, an answer that is not written as a number is refused where the gold is one [D15]: a
policy farms hedges, chains ("7!") and restated problems.
"""

import functools
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify

from verifiers import sandbox

# math-verify and its parser warn about every answer that does not parse.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

VERIFY_SECONDS = 9.5  # the child is killed after this
# math-verify's own limit for each of its calls: parse the gold, parse the answer, compare them.
PARSE_SECONDS = 3
MAX_ANSWER = 512  # characters inside the box

# ---- 1. The box ----------------------------------------------------------------------------------
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")


def boxed_response(answer):
    """The shortest response that gives this answer."""
    return "</think>\\boxed{" + answer + "}"


def count_boxes(text):
    """How many boxes a text opens."""
    return len(BOX.findall(text))


def last_box(text):
    """Content of the last outermost \\boxed{} or \\fbox{}, or None.

    None if there is no box, if the last one is unbalanced or too long, or if it holds a second
    box beside other text (a hedge): "\\boxed{33} so \\boxed{\\boxed{34}}" -> "34"; "\\boxed{33
    \\boxed{34}}" -> None.
    """
    content = None
    end = 0
    # Only the last eight boxes are read, so that a flood of boxes costs bounded work.
    for box in list(BOX.finditer(text))[-8:]:
        if box.start() < end:
            continue  # inside the box before
        content, length = read_braces(text[box.end() : box.end() + MAX_ANSWER + 2])
        if content is not None:
            end = box.end() + length
    if content is None:
        return None
    # A box around a box, with nothing else between their braces.
    inner = BOX.match(content)
    if inner and content[inner.end() :].startswith("{") and content.endswith("}"):
        content = content[inner.end() + 1 : -1].strip()
    return None if BOX.search(content) else content


def read_braces(text):
    """(content, length) of the balanced {...} that the text starts with; (None, 0) if there is
    none."""
    depth = 0
    for token in re.finditer(r"\\.|[{}]|[^\\{}]+", text, re.S):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
        if depth <= 0:
            if token[0] == "}":
                return text[1 : token.end() - 1].strip(), token.end()
            break
    return None, 0


# ---- 2. Numbers ----------------------------------------------------------------------------------
# "12", "-3.50", ".5", "7/2"
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+|\d+/\d+)", re.A)
# A name in front of the answer: "x = ", "a_{1}=", "f(x) \equiv "
NAME = re.compile(r"\\?[A-Za-z]+(_\w|_\{\w+\}|\([A-Za-z]\))?\s*(=|\\(equiv|approx)(?![a-z]))\s*")
# A unit behind it: percent, degrees, a base of ten, \text{ cm}^2
UNIT = re.compile(
    r"\s*(\\?%|\^\{?\\circ\}?|\\degree|_\{?10\}?"
    r"|\\(text\w*|mathrm|mbox)\{[^{}\d]*\}(\^\{?[23]\}?)?)$"
)
# What the answer to a number may look like besides a plain number: powers, fractions, roots, E for
# "\times 10^", a unit in words.
VALUE = re.compile(
    r"(\d(?!\s+\d)|[.^{}()/\s]|(?<![\w)}])-|\\[cdt]?frac|\\sqrt|\\(left|right)(?![a-z])|E)+"
    r"([A-Za-z]{2}[A-Za-z ]*)?",
    re.A,
)
# Signs of a list, a relation or a set.
RELATION = re.compile(
    r"[=<>;]|\\\\|\\text\w*\{[^}]*\d"
    r"|\\(equiv|approx|sim|simeq|cong|neq?|leq?|geq?|lt|gt|to|([Ll]eft)?[Rr]ightarrow"
    r"|iff|implies|in|lor|land|vee|wedge|cup|cap|mid|pm|mp|l?dots|cdots|q?quad)(?![A-Za-z])"
)
# A sum, a product, an integral, a limit or a derivative: it restates the problem instead of
# solving it.
RESTATED = re.compile(r"\\(sum|prod|i+nt|oint|lim)(?![A-Za-z])|\\[dt]?frac\{d\}\{d")
# Work that is left to do: a factorial, a binomial, a maximum.
UNDONE = re.compile(
    r"!|\\(sum|prod|i+nt|oint|lim|limsup|liminf|[dt]?binom|choose|max|min|sup|inf|gcd|det)"
    r"(?![A-Za-z])"
)
TEXT = re.compile(r"\\(?:text\w*|mathrm|mathbf|mbox)\{([^{}]*)\}")


def strip_decoration(text):
    """Remove dollars, LaTeX spacing, thousands commas, a name in front, a trailing unit or
    period."""
    text = text.replace("{,}", ",")
    text = re.sub(r",\\!\s*", ",", text)
    text = re.sub(r"\\[!,:; ()\[\]]|~|\\?\$", "", text)
    text = text.strip().removesuffix(".")
    if NAME.match(text):
        text = NAME.sub("", text, count=1)
    text = UNIT.sub("", text)
    if TEXT.fullmatch(text):
        text = TEXT.sub(r"\1", text).strip()
    has_thousands_separators = re.fullmatch(r"[-+]?[1-9]\d{0,2}([, ]\d{3})+(\.\d+)?", text)
    if has_thousands_separators:
        text = re.sub("[, ]", "", text)
    return text


def plain_number(text):
    """Exact value of a number that is written out, or None.

    Written out are "1,024", "-3.50", "7/2", "\\frac{7}{2}", "12 \\text{ cm}".
    """
    text = strip_decoration(text)
    text = re.sub(r"^([-+]?)\\[cdt]?frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    divides_by_zero = re.search(r"/0+$", text)
    if not NUMBER.fullmatch(text) or divides_by_zero:
        return None
    return Fraction(text)


def is_not_a_plain_number(answer, gold):
    """True if the gold is a number and the answer is not written as one [D15].

    Refused are hedges, chains of equations, and work left undone.
    """
    answer = strip_decoration(answer)
    answer = re.sub(r"\\(times|cdot)\s*10\s*\^", "E", answer)
    answer = re.sub(r"\s*-\s*", "-", answer)
    answer_restates = RESTATED.search(answer) and not RESTATED.search(gold)
    if plain_number(gold) is not None or answer_restates:
        return not VALUE.fullmatch(answer)

    # A gold such as 2\pi or \sqrt{3} is a number, too. A gold with other letters is an
    # expression, and one with a relation or brackets is a set or an interval: those are left to
    # math-verify.
    symbols = re.sub(r"\\(?!infty)[A-Za-z]+|[ei](?![A-Za-z])", "", strip_decoration(gold))
    if re.search(r"[A-Za-z,=<>|\[\]]", symbols) or RELATION.search(gold):
        return False
    if not re.search(r"\d|\\pi|e", gold):
        return False
    if RELATION.search(answer):
        return True
    return bool(UNDONE.search(answer) and not UNDONE.search(gold))


# ---- 3. Equality by math-verify, in a child process ----------------------------------------------
# Whitespace that does not separate two digits: "x + 1" = "x+1", but "3 5" stays.
SPACE = re.compile(r"(?<![\d\s])\s+|\s+(?![\d\s])")
# math-verify takes these for units and drops them: the last letters of "2ab" where no bracket
# holds them, and in "3 \text{ h } 20 \text{ min}", which ends in \text, everything behind the 3.
TRAILING_LETTERS = re.compile(
    r"(?<=[\d}\s])(?!(?:[cmk]m|ft|hr|yr|sq|am|pm)$)[A-Za-z](?: ?[A-Za-z])?$"
)
TRAILING_TEXT = re.compile(
    r"(\\(?:text|mbox)\{[^{}]*\}.*\d.*?)\s*\\(?:text|mbox)\{[^{}]*\}$",
    re.S,
)


def without_spacing(text):
    """Drop spacing and \\text{}. Answers that agree here need no parser."""
    return SPACE.sub("", TEXT.sub(r"\1", text))


def protect_units(text):
    """Put into brackets what math-verify would drop as a unit."""
    text = TRAILING_TEXT.sub(r"\1", text)
    return f"({text})" if TRAILING_LETTERS.search(text) else text


def equal(gold, answer):
    """True or False by math-verify [D14]; None if it gave up. sympy may hang, so this runs in a
    child.

    The gold is read in any form, the answer as LaTeX only.
    """
    start = time.monotonic()
    same = without_spacing(gold) == without_spacing(answer)
    try:
        gold_forms = parse(boxed_response(protect_units(gold)), parsing_timeout=PARSE_SECONDS)
        answer_forms = parse(
            boxed_response(protect_units(answer)),
            [LatexExtractionConfig()],
            parsing_timeout=PARSE_SECONDS,
        )
        if not same and verify(gold_forms, answer_forms, timeout_seconds=PARSE_SECONDS):
            has_decimals = "." in gold + answer
            has_percent = "%" in gold + answer
            same = has_percent or equal_numbers(gold_forms[0], answer_forms[0], has_decimals)
    except BaseException:
        # sympy throws anything at hostile LaTeX, and math-verify's own timeout is no Exception.
        pass
    if same:
        return True
    gave_up = time.monotonic() - start >= PARSE_SECONDS
    return None if gave_up else False


def equal_numbers(a, b, has_decimals):
    """Check what verify() called equal: it rounds, so tiny numbers are all equal, and 1 - 1/n! is
    1."""
    if a == b:
        return True
    if not getattr(a, "is_number", False) or not getattr(b, "is_number", False):
        return True
    difference = a - b
    near = bool(abs(difference.evalf(30)) <= 1e-4 * abs(a.evalf(30)))
    exact = difference.equals(0)  # None if sympy cannot tell
    if a.is_Integer:
        return exact is True
    if has_decimals:
        return near
    return near and exact is not False


equal_in_child = sandbox.killable(equal, VERIFY_SECONDS)


@functools.cache
def answer_pool(num_workers):
    """Thread pool in which every thread owns a child process, all forked when this returns.

    Call it early, while the process is small: a fork copies its page tables.
    """
    pool = ThreadPoolExecutor(num_workers)
    barrier = threading.Barrier(num_workers)

    def start_child(_):
        equal_in_child.start()
        barrier.wait()  # no thread takes a second turn before each has had its first

    list(pool.map(start_child, range(num_workers)))
    return pool


# ---- 4. The verdict ------------------------------------------------------------------------------
# Characters that people write instead of LaTeX: minus, dash, degree, times, infinity.
UNICODE = {0x2212: "-", 0x2013: "-", 0xB0: r"^\circ", 0xD7: r"\times ", 0x221E: r"\infty "}
# Golds that are words are compared as text: "ABC" is no product, "Alice and Bob" no list.
WORDS = re.compile(r"[A-Z]{3,}|(?!(?:sin|cos|tan|cot|log|exp) )[^\W\d_]{3,}(?: [^\W\d_]+)+")


def same_answer(gold, answer):
    """True or False; None if the verifier gave up or had to be killed."""
    gold = gold.translate(UNICODE)
    answer = answer.translate(UNICODE)

    # Words are text.
    gold_text = TEXT.sub(r"\1", gold).strip()
    if WORDS.fullmatch(gold_text):
        answer_text = TEXT.sub(r"\1", answer).strip().removesuffix(".")
        return gold_text.casefold() == answer_text.casefold()

    # Two numbers that are written out are compared exactly. Different decimals may still be equal
    # after rounding, which math-verify decides.
    a, b = plain_number(gold), plain_number(answer)
    if a is not None and b is not None and "%" not in gold:
        if a == b or a.denominator == 1:
            return a == b

    # A number wants a number.
    if without_spacing(gold) != without_spacing(answer) and is_not_a_plain_number(answer, gold):
        return False
    return equal_in_child(gold, answer.removesuffix("."))
