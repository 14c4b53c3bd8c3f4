"""Math answers: is the answer in the last box equal to the gold answer?

    last_box(text)                the content of the last \\boxed{} of a response
    compare(gold, answer)         "ok", "wrong", "timeout" or "infra"
    sound_rows(rows, n)           drops golds it cannot read, marks those to compare as text
    answer_pool(n)                threads with a child process each, in which same_answer may run

An answer is read in three steps. Its text gets one spelling (verifiers/answer_forms.py). Words and
numbers that are written out are compared here. Everything else is taken apart into lists, tuples,
relations, names and units; the formulas that are left go to math-verify (sympy) [D14]. sympy can
hang on hostile LaTeX, so this runs in a child process that has CPU_SECONDS for an answer.

An answer that is not written as a number is refused where the gold is one [D15]: a policy farms
hedges, chains ("7!") and restated problems. The same holds for the other parts: a list wants a
list, an equation an equation, and what the parser does not read is never equal [D26].
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from sympy.core.function import AppliedUndef

from lib.common import all_gather, print0, ranks
from lib.progress import progress
from verifiers import answer_forms as forms
from verifiers import sandbox
from verifiers.answer_forms import TEXT

# math-verify and its parser warn about every answer that does not parse.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

CPU_SECONDS = 3  # for the comparison of one answer
# The child is killed after this much waiting. It means that the machine has stalled.
WALL_SECONDS = 120
MAX_ANSWER = 512  # characters inside the box
MOST_NESTED = 40  # braces in a formula
MOST_MEMBERS = 32  # of a list: its members are compared in pairs

# ---- 1. The box ----------------------------------------------------------------------------------
# So many boxes are read from the end. More do not fit into one around them.
MOST_BOXES = MAX_ANSWER // len(r"\fbox{}") + 1
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
    # A flood of boxes costs bounded work.
    for box in list(BOX.finditer(text))[-MOST_BOXES:]:
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
INTEGER = re.compile(r"[-+]?\d{1,500}", re.A)
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3}|(?: \d{3})(?!\d))+(?:\.\d+)?", re.A)
BASE = re.compile(r"\(?\s*([A-F]*\d[0-9A-F]*)\s*\)?\s*_\s*(?:\{\s*(\d+)\s*\}|(\d))", re.A)
CLOCK = re.compile(r"\d{1,2}:[0-5]\d(:[0-5]\d)?( ?[ap]\.? ?m\.?)?", re.I | re.A)
DATE = re.compile(r"\d{1,4}([-/])\d{1,2}\1\d{1,4}", re.A)
# What the answer to a number may look like besides a plain number: powers, fractions, roots, E for
# "\times 10^".
VALUE = re.compile(
    r"(\d(?!\s+\d)|[.^{}()/\s]|(?<![\w)}])-|\\frac|\\sqrt|E)+",
    re.A,
)
# Signs of a list, a relation or a set.
SIGN_OF_RELATION = re.compile(
    r"[=<>;]|\\\\|\\text\w*\{[^}]*\d"
    r"|\\(equiv|approx|sim|simeq|cong|neq?|leq?|geq?|lt|gt|to|([Ll]eft)?[Rr]ightarrow"
    r"|iff|implies|in|lor|land|vee|wedge|cup|cap|mid|pm|mp|l?dots|cdots|q?quad)(?![A-Za-z])"
)
# A sum, a product, an integral, a limit or a derivative: it restates the problem instead of
# solving it.
RESTATED = re.compile(r"\\(sum|prod|i+nt|oint|lim)(?![A-Za-z])|\\frac\{d\}\{d")
# Work that is left to do: a factorial, a binomial, a maximum.
UNDONE = re.compile(
    r"!|\\(sum|prod|i+nt|oint|lim|limsup|liminf|binom|choose|max|min|sup|inf|gcd|det)(?![A-Za-z])"
)


def plain_number(text):
    """Exact value of a number that is written out, or None: "1,024", "-3.50", "7/2",
    "\\frac{7}{2}"."""
    text = text.strip()
    if (held := forms.brackets(text)) and held[0] == "(" and held[2] == ")":
        text = held[1]
    text = re.sub(r"^\{([^{}]*)\}$", r"\1", text)
    text = re.sub(r"^([-+]?)\s*\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if THOUSANDS.fullmatch(text):
        text = re.sub("[, ]", "", text)
    divides_by_zero = re.search(r"/0+$", text)
    if not NUMBER.fullmatch(text) or divides_by_zero:
        return None
    return Fraction(text)


def value_of(text):
    """The value in an answer, without name and unit."""
    return forms.split_unit(forms.split_name(text)[1])[0]


def is_not_a_plain_number(answer, gold):
    """True if the gold is a number and the answer is not written as one [D15].

    Refused are hedges, chains of equations, and work left undone.
    """
    answer = value_of(answer)
    answer = re.sub(r"\\(times|cdot)\s*10\s*\^", "E", answer)
    answer = re.sub(r"\s*-\s*", "-", answer)
    answer_restates = RESTATED.search(answer) and not RESTATED.search(gold)
    gold_value, gold_unit = forms.split_unit(forms.split_name(gold)[1])
    if gold_unit == "deg":
        answer = answer.replace(r"\pi", "(1)")  # an angle may be given in radians
    if plain_number(gold_value) is not None or answer_restates:
        return not VALUE.fullmatch(answer)

    # A gold such as 2\pi or \sqrt{3} is a number, too. A gold with other letters is an
    # expression, and one with a relation or brackets is a set or an interval: those are compared
    # part by part.
    symbols = re.sub(r"\\(?!infty)[A-Za-z]+|[ei](?![A-Za-z])", "", gold_value)
    if re.search(r"[A-Za-z,:=<>|\[\]]", symbols) or SIGN_OF_RELATION.search(gold):
        return False
    if not re.search(r"\d|\\pi|e", gold):
        return False
    if SIGN_OF_RELATION.search(answer):
        return True
    return bool(UNDONE.search(answer) and not UNDONE.search(gold))


def equal_written_numbers(gold, answer):
    """Compare two numbers that are written out, with their units. None where this cannot tell.

    A percentage equals a hundredth of itself. A gold that is an integer may have lost its percent
    sign: the problem has asked for "what percent".
    """
    gold_name, gold = forms.split_name(gold)
    answer_name, answer = forms.split_name(answer)
    gold_value, gold_unit = forms.split_unit(gold)
    answer_value, answer_unit = forms.split_unit(answer)
    answer_value = re.sub(r"(?<=\d)_\{?10\}?$", "", answer_value)
    a, b = plain_number(gold_value), plain_number(answer_value)
    if a is None or b is None:
        return None
    if gold_name and answer_name and not same_name(gold_name, answer_name):
        return False
    if forms.known_units_differ(gold_unit, answer_unit):
        return False
    if gold_unit == "%" and answer_unit == "%":
        return a == b
    if gold_unit == "%":
        return a == b or (a == 100 * b and answer_unit == "")
    if answer_unit == "%":
        return 100 * a == b or (a == b and a.denominator == 1 and "." not in gold_value)
    if a == b or a.denominator == 1:
        return a == b
    # Decimals may still be equal after rounding.
    return None


# ---- 3. Equality of two formulas by math-verify --------------------------------------------------
# "6 4 0" is no product.
PRODUCT = re.compile(r"[A-Za-z ]+")
DIGITS_APART = re.compile(r"\d\s+\d")
LAST_NUMBER = re.compile(r"\d(?!.*\d)", re.S)
# Letters of a formula that are no macro
LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+|(?<=[A-Za-z])[A-Za-z]+")
# What the parser drops: primes and transposes. They have to agree as text.
MARKS = re.compile(r"'+|\^\{?(?:T|\\ast|\*|c)\}?(?![A-Za-z])|\\(?:overline|bar|hat|vec|dot)\b")
READING = ConversionConfig(lowercase_symbols=False)
NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")


class GaveUp(BaseException):
    """The verifier has used up its CPU seconds. No Exception, so that no library catches it."""


@functools.lru_cache(maxsize=256)
def read_formula(text, is_complex):
    """The sympy expression of a formula, or None if the parser does not read it [D14]."""
    # The parser's time grows fast with the depth of braces, and no answer is that deep.
    opened = itertools.accumulate((char == "{") - (char == "}") for char in text)
    if max(opened, default=0) > MOST_NESTED:
        return None
    try:
        formula = latex2sympy(
            normalize_latex(text, NORMALIZATION),
            is_real=None if is_complex else True,
            normalization_config=None,
            conversion_config=READING,
        )
        if is_complex and isinstance(formula, sympy.Expr):
            formula = formula.subs(sympy.Symbol("i"), sympy.I)
        return formula
    except Exception:  # noqa: BLE001  the parser throws anything at hostile LaTeX
        return None


def reads_everything(text, formula, is_complex):
    """True if nothing in the text was ignored by the parser.

    Another last digit has to give another formula, and every letter has to be in it.
    """
    if match := LAST_NUMBER.search(text):
        digit = "1" if match[0] != "1" else "2"
        changed = text[: match.start()] + digit + text[match.end() :]
        if read_formula(changed, is_complex) == formula:
            return False
    found = formula.atoms(sympy.Symbol, AppliedUndef) if hasattr(formula, "atoms") else set()
    names = "".join(str(atom) for atom in found)
    without_macros = re.sub(r"\\mathbb\{\w\}|\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+", " ", text)
    letters = "".join(LETTERS.findall(without_macros))
    return set(letters) - set("eidEI") <= set(names)


def equal_formulas(gold, answer):
    """Compare two formulas without relations, lists, names and units."""
    if forms.bare(gold) == forms.bare(answer):
        return True
    if sorted(MARKS.findall(gold)) != sorted(MARKS.findall(answer)):
        return False
    if forms.has_words(gold) or forms.has_words(answer):
        return forms.tokens(gold) == forms.tokens(answer)
    if PRODUCT.fullmatch(gold) and PRODUCT.fullmatch(answer):
        return sorted(gold.replace(" ", "")) == sorted(answer.replace(" ", ""))
    if DIGITS_APART.search(gold) or DIGITS_APART.search(answer):
        return False
    gold, answer = forms.same_constant(gold, answer)
    is_complex = bool(COMPLEX.search(gold) or COMPLEX.search(answer))
    a, b = read_formula(gold, is_complex), read_formula(answer, is_complex)
    if a is None or b is None:
        return False
    if differ_at_a_point(a, b) or not verify([a], [b], timeout_seconds=None):
        return False
    if not equal_numbers(a, b, "." in gold + answer):
        return False
    return reads_everything(answer, b, is_complex) and reads_everything(gold, a, is_complex)


def point_of(letters, shift):
    """A positive fraction for each letter."""
    ordered = sorted(letters, key=str)
    return {
        letter: sympy.Rational(7 + 4 * index + shift, 11 + 2 * index)
        for index, letter in enumerate(ordered)
    }


def differ_at_a_point(a, b, shift=0):
    """True if two expressions with letters have different values where the letters are fractions.

    This refutes at once what sympy would try to simplify for seconds.
    """
    letters = getattr(a, "free_symbols", set()) | getattr(b, "free_symbols", set())
    if not letters or not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
        return False
    point = point_of(letters, shift)
    try:
        left, right = complex(a.evalf(15, subs=point)), complex(b.evalf(15, subs=point))
        return abs(left - right) > 1e-3 * max(abs(left), abs(right), 1e-30)
    except Exception:  # noqa: BLE001  functions without a value, sums without an end
        return False


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


def equal_equations(gold, answer):
    """Compare two equations with letters: left minus right may differ by a constant factor only.

    gold, answer: pairs (left, right) of texts. Solution sets are not compared: every equation
    without a real solution would be equal to every other.
    """
    text = " ".join([*gold, *answer])
    is_complex = bool(COMPLEX.search(text))
    sides = [read_formula(side, is_complex) for side in (*gold, *answer)]
    if any(not isinstance(side, sympy.Expr) for side in sides):
        return False
    if sorted(MARKS.findall(" ".join(gold))) != sorted(MARKS.findall(" ".join(answer))):
        return False
    differences = [sides[0] - sides[1], sides[2] - sides[3]]
    if differences[0].free_symbols != differences[1].free_symbols:
        return False
    # Denominators of one side may stand on the other: y = 1/x is xy = 1.
    a, b = [sympy.numer(sympy.together(difference)) for difference in differences]
    if a == 0 or b == 0:
        return False
    factor = (a / b).subs(point_of(a.free_symbols, 0))
    if factor.free_symbols or not factor.is_finite or factor == 0:
        return False
    if differ_at_a_point(a, factor * b, shift=2):
        return False
    if sympy.simplify(a - factor * b) != 0:
        return False
    for side, formula in zip(answer, sides[2:], strict=True):
        if not reads_everything(side, formula, is_complex):
            return False
    return True


# ---- 4. Equality of two answers, part by part, in a child process --------------------------------
def same_parts(gold, answer):
    """Compare two spelled answers part by part; formulas are what is left at the end."""
    if forms.bare(gold) == forms.bare(answer):
        return True
    gold, gold_quantifier = forms.simple_form(gold)
    answer, answer_quantifier = forms.simple_form(answer)
    if gold_quantifier != answer_quantifier:
        return False
    if r"\ldots" in gold or r"\ldots" in answer:
        return same_with_dots(gold, answer)

    # A name in front of a whole list: "x = 1, 2", "(x,y) \in \{(1,2),(3,4)\}".
    gold_members, answer_members = forms.members(gold), forms.members(answer)
    gold_names, gold_values = list_names(gold_members)
    answer_names, answer_values = list_names(answer_members)
    if not gold_values or not answer_values:
        return False

    # "a=1, b=2" may be answered in any order with its names, in its own order without them.
    if len(set(gold_names)) > 1 or len(set(answer_names)) > 1:
        return same_named(gold_names, gold_values, answer_names, answer_values)
    if gold_names[0] and answer_names[0] and not same_name(gold_names[0], answer_names[0]):
        return False
    if len(gold_values) == 1 and len(answer_values) == 1:
        # A set of one number is no number.
        is_number = plain_number(value_of(gold)) is not None
        if is_number and forms.in_braces(answer) and not forms.in_braces(gold):
            return False
        return same_member(gold_members[0], answer_members[0])
    # "(1, 2)" may stand for the list 1, 2.
    if len(answer_values) == 1 and not gold.startswith(r"\{"):
        held = forms.brackets(answer_values[0])
        if held and held[0] == "(" and held[2] == ")":
            answer_values = forms.members(held[1])
    return same_multiset(gold_values, answer_values)


def list_names(members):
    """(names, values) of the members of a list. A name of the first alone is the name of all."""
    pairs = [forms.split_name(member) for member in members]
    names = [name for name, _ in pairs]
    values = []
    for name, value in pairs:
        # x \in \{1, 2\}: the set stands behind the name.
        named_set = len(pairs) == 1 and name and forms.in_braces(value)
        has_two_signs = value.count(r"\pm") == 1 and not forms.brackets(value)
        if named_set or has_two_signs:
            values.extend(forms.members(value))
        else:
            values.append(value)
    if names and names[0] and not any(names[1:]):
        names = [names[0]] * len(names)
    return names, values


def same_name(gold, answer):
    """True if two names are one: f(x) and f(t) are."""
    if gold == answer:
        return True
    gold_function, gold_open, _ = gold.partition("(")
    answer_function, answer_open, _ = answer.partition("(")
    return gold_function == answer_function != "" and gold_open == answer_open


def same_named(gold_names, gold_values, answer_names, answer_values):
    """Compare lists where the members of one have different names."""
    if len(answer_values) == 1 and (held := forms.brackets(answer_values[0])):
        answer_values = forms.members(held[1])
        answer_names = [""] * len(answer_values)
    if len(gold_values) == 1 and (held := forms.brackets(gold_values[0])):
        gold_values = forms.members(held[1])
        gold_names = [""] * len(gold_values)
    if len(gold_values) != len(answer_values):
        return False
    if all(gold_names) and all(answer_names):
        if sorted(gold_names) != sorted(answer_names):
            return False
        if len(set(gold_names)) < len(gold_names):
            pairs = zip(gold_names, answer_names, strict=True)
            return all(a == b for a, b in pairs) and same_order(gold_values, answer_values)
        order = [answer_names.index(name) for name in gold_names]
        answer_values = [answer_values[index] for index in order]
    elif any(gold_names) and any(answer_names):
        return False
    return same_order(gold_values, answer_values)


def same_order(gold, answer):
    """Compare two lists member by member."""
    if len(gold) != len(answer):
        return False
    return all(same_member(a, b) for a, b in zip(gold, answer, strict=True))


def same_multiset(gold, answer):
    """Compare two lists whose order does not matter; how often a member stands there does."""
    if len(gold) != len(answer) or len(gold) > MOST_MEMBERS:
        return False
    left = list(answer)
    # Members of the same text first: they need no parser.
    open_members = []
    for member in gold:
        equal = [other for other in left if forms.bare(other) == forms.bare(member)]
        if equal:
            left.remove(equal[0])
        else:
            open_members.append(member)
    for member in open_members:
        for other in left:
            units = {forms.split_unit(member)[1], forms.split_unit(other)[1]} - {""}
            if len(units) < 2 and same_member(member, other):
                left.remove(other)
                break
        else:
            return False
    return True


def same_with_dots(gold, answer):
    """An endless list is compared in its order, dots with dots."""
    a = forms.split_top(gold, forms.SEPARATOR)[0]
    b = forms.split_top(answer, forms.SEPARATOR)[0]
    if len(a) != len(b) or len(a) < 2:
        return False
    for member, other in zip(a, b, strict=True):
        has_dots = r"\ldots" in member + other
        if has_dots and forms.bare(member) != forms.bare(other):
            return False
        if not has_dots and not same_member(member, other):
            return False
    return True


def same_member(gold, answer):
    """Compare two members of lists: names, brackets, relations, ratios, units, then formulas."""
    gold_name, gold = forms.split_name(gold)
    answer_name, answer = forms.split_name(answer)
    if gold_name and answer_name:
        if not same_name(gold_name, answer_name):
            return False
        if gold_name != answer_name:
            answer = renamed_variable(gold_name, answer_name, answer)

    # Relations: as many and the same signs on both sides. A chain before the answer is a hedge.
    gold_parts, gold_signs = forms.relation(gold)
    answer_parts, answer_signs = forms.relation(answer)
    if gold_signs or answer_signs:
        # x = 2y+1 without a name's side: the side with the name is put back.
        if len(gold_signs) == 1 and not answer_signs and answer_name:
            answer_parts, answer_signs = [answer_name, answer], ["="]
        if len(answer_signs) == 1 and not gold_signs and gold_name:
            gold_parts, gold_signs = [gold_name, gold], ["="]
        return same_relation(gold_parts, gold_signs, answer_parts, answer_signs)

    # Unions of intervals, in any order.
    gold_union = forms.split_top(gold, forms.UNION)[0]
    answer_union = forms.split_top(answer, forms.UNION)[0]
    if len(gold_union) > 1 and len(gold_union) == len(answer_union):
        return same_multiset(gold_union, answer_union)

    # Tuples and intervals: the same brackets, and the members in their order.
    gold_tuple, answer_tuple = as_tuple(gold), as_tuple(answer)
    if shape(gold) and shape(answer) and shape(gold) != shape(answer):
        return False
    if gold_tuple and answer_tuple:
        same_brackets = gold_tuple[0::2] == answer_tuple[0::2]
        return same_brackets and same_order(gold_tuple[1], answer_tuple[1])
    one_is_tuple = bool(gold_tuple or answer_tuple)
    may_be_equal = "matrix" in gold + answer or sets_of_numbers(gold, answer)
    if one_is_tuple and not may_be_equal:
        return False

    # Ratios: quotient by quotient.
    gold_ratio = forms.split_top(gold, forms.COLON)[0]
    answer_ratio = forms.split_top(answer, forms.COLON)[0]
    if len(gold_ratio) > 1 or len(answer_ratio) > 1:
        return same_ratio(gold_ratio, answer_ratio)
    return same_quantity(gold, answer)


def sets_of_numbers(gold, answer):
    """True if both texts are sets of real numbers, one of them written with an operation."""
    operation = r"\\(?:cup|cap|setminus|mathbb|emptyset|backslash)(?![A-Za-z])"
    return bool(re.search(operation, gold) or re.search(operation, answer))


def renamed_variable(gold_name, answer_name, answer):
    """An answer f(t) = ... in the variable of the gold f(x) = ..., "?" if it has that one, too."""
    new, old = gold_name[-2:-1], answer_name[-2:-1]
    if re.search(rf"(?<![\\A-Za-z]){new}", answer):
        return "?"
    return re.sub(rf"(?<![\\A-Za-z]){old}(?![A-Za-z])", new, answer)


MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}", re.S)


def shape(text):
    """(rows, columns) of a matrix, None of anything else."""
    match = MATRIX.fullmatch(text.strip())
    if not match:
        return None
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    return len(rows), rows[0].count("&") + 1 if rows else 0


def as_tuple(text):
    """(opening, members, closing) of a tuple, an interval or a vector; None if it is none.

    A number in brackets is no tuple. "[[1,2],[3,4]]" is a matrix and read as one.
    """
    if match := MATRIX.fullmatch(text.strip()):
        rows = [row.split("&") for row in re.split(r"\\\\", match[2]) if row.strip()]
        if len(rows) > 1 and all(len(row) > 1 for row in rows):
            listed = [f"[{','.join(cell.strip() for cell in row)}]" for row in rows]
            return "[", listed, "]"
        cells = [cell.strip() for row in rows for cell in row]
        return ("(", cells, ")") if len(cells) > 1 else None
    held = forms.brackets(text)
    if not held:
        return None
    parts, signs = forms.split_top(held[1], forms.SEPARATOR)
    if any(sign not in (",", ";") for sign in signs):
        return None
    if len(parts) < 2 or not all(parts):
        return None
    return held[0], parts, held[2]


def same_relation(gold_parts, gold_signs, answer_parts, answer_signs):
    """Compare two chains of relations."""
    has_letters = re.search(r"(?<![\\A-Za-z])[A-Za-df-z]", " ".join(gold_parts))
    # A chain of numbers ends in its value: "\log_8 4 = \frac23", "\frac{40}{3} \approx 13.33".
    if not answer_signs and not has_letters:
        ends = [gold_parts[-1]]
        if r"\approx" in gold_signs:
            ends.append(gold_parts[0])
        if all(sign in ("=", r"\approx") for sign in gold_signs):
            return any(same_member(end, answer_parts[0]) for end in ends)
    if gold_signs != answer_signs:
        return False
    if same_order(gold_parts, answer_parts):
        return True
    if gold_signs == ["="] and has_letters:
        return equal_equations(gold_parts, answer_parts)
    return False


def same_ratio(gold, answer):
    """Compare a : b : c with d : e : f, where a/b is the fraction for a ratio of two."""
    if len(gold) == 2 and len(answer) == 1:
        return equal_formulas(r"\frac{%s}{%s}" % tuple(gold), answer[0])
    if len(gold) != len(answer):
        return False
    for a, b in zip(gold[1:], answer[1:], strict=True):
        if not equal_formulas(rf"({a})\cdot({answer[0]})", rf"({b})\cdot({gold[0]})"):
            return False
    return True


def same_quantity(gold, answer):
    """Compare two values with their units."""
    if (written := equal_written_numbers(gold, answer)) is not None:
        return written
    gold, gold_unit = forms.split_unit(gold)
    answer, answer_unit = forms.split_unit(answer)
    # 45 degrees are \pi/4.
    if gold_unit == "deg" and answer_unit in ("", "rad") and r"\pi" in answer:
        gold, gold_unit = rf"\frac{{({gold})\pi}}{{180}}", "rad"
    if answer_unit == "deg" and gold_unit in ("", "rad") and r"\pi" in gold:
        answer, answer_unit = rf"\frac{{({answer})\pi}}{{180}}", "rad"
    if forms.known_units_differ(gold_unit, answer_unit):
        return False
    # "n \text{ odd}" is no "n \text{ even}"; only a number may have its unit in other words.
    units = {gold_unit, answer_unit} - {""}
    if len(units) == 2 and "%" not in units and plain_number(gold) is None:
        return False
    if gold_unit == "%" and answer_unit != "%":
        return equal_formulas(rf"\frac{{{gold}}}{{100}}", answer) or equal_formulas(gold, answer)
    if answer_unit == "%" and gold_unit != "%":
        return equal_formulas(gold, rf"\frac{{{answer}}}{{100}}")

    # The digits of a numeral in another base; its base may be left out.
    gold_base, answer_base = BASE.fullmatch(gold), BASE.fullmatch(answer)
    if gold_base:
        digits = re.sub(r"[\s()]", "", answer_base[1] if answer_base else answer)
        base = (answer_base[2] or answer_base[3]) if answer_base else None
        return gold_base[1] == digits and base in (None, gold_base[2] or gold_base[3])
    if answer_base:
        if (answer_base[2] or answer_base[3]) != "10":
            return False
        answer = answer_base[1]
    return equal_formulas(gold, answer)


def equal(gold, answer):
    """True or False for two spelled answers; None if the verifier gave up.

    Runs in a child process. A CPU clock ends it, so the verdict does not depend on how busy the
    machine is.
    """

    def give_up(*_):
        raise GaveUp

    signal.signal(signal.SIGVTALRM, give_up)
    # Again and again: a library may catch the first one.
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS, 0.1)
    try:
        return same_parts(gold, answer)
    except (GaveUp, MemoryError):
        return None
    except Exception:  # noqa: BLE001  sympy throws anything at hostile LaTeX
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


# The child has a second more of CPU time before the kernel ends it, for hangs in C.
equal_in_child = sandbox.killable(equal, CPU_SECONDS + 1, WALL_SECONDS)


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


# ---- 5. The verdict ------------------------------------------------------------------------------
# Golds that are words are compared as text: "ABC" is no product, "Alice and Bob" no list.
WORDS = re.compile(r"[A-Z]{3,}|(?!(?:sin|cos|tan|cot|log|exp) )[^\W\d_]{3,}(?: [^\W\d_]+)+")

# A single word of four letters is text, too. Shorter ones are products unless they stand here.
SHORT_WORDS = set("yes no on off odd up one two six ten all any dne".split())
# A choice letter, with or without its brackets and its content
CHOICE = re.compile(r"\(?\s*([A-J])\s*\)?\s*[.:]?")
CHOICE_AND_CONTENT = re.compile(
    r"(?:option |choice )?(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*(.*)", re.I | re.S
)
OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])|\bor\b|\band\b")
NUMBER_WORDS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBER_WORDS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
MILLIONS = re.compile(r"([\d.,]+)\s+(million|billion|thousand)")
POWER_OF = {"thousand": 3, "million": 6, "billion": 9}
# Imaginary units make sympy treat every letter as complex.
COMPLEX = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])|\\(?:imath|Re|Im)(?![A-Za-z])")


@functools.lru_cache(maxsize=4096)
def spelled(text):
    """forms.spell, remembered: a gold answer is compared with a group of answers."""
    return forms.spell(text)


def is_words(text):
    """True if a gold answer is one or more words and no formula."""
    if WORDS.fullmatch(text) or text.casefold() in SHORT_WORDS:
        return True
    return bool(re.fullmatch(r"[^\W\d_]{4,}", text))


def choice_letter(text):
    """The letter of "B", "(B) 5" or "B: 5"; None if the content names another letter."""
    text = TEXT.sub(r"\1", text).strip()
    if match := CHOICE.fullmatch(text):
        return match[1]
    match = CHOICE_AND_CONTENT.fullmatch(text)
    if not match or OTHER_CHOICE.search(match[3]):
        return None
    return (match[1] or match[2]).upper()


def number_in_words(text):
    """ "two" as "2", "1.5 million" as "1500000"."""
    words = TEXT.sub(r"\1", text).strip()
    if words.casefold() in NUMBER_WORDS:
        return NUMBER_WORDS[words.casefold()]
    match = MILLIONS.fullmatch(words)
    if match and (number := plain_number(match[1])) is not None:
        return str(number * 10 ** POWER_OF[match[2]])
    return text


def same_answer(gold, answer, as_text=False):
    """True or False; None if the verifier gave up. Raises TimeoutError if the machine stalls.

    as_text: compare the texts alone, for golds that the verifier does not read soundly.
    """
    # Most pairs are two integers and need no spelling.
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    gold = spelled(gold)
    answer = forms.spell(answer)
    if not gold or not answer:
        return False
    if forms.bare(gold) == forms.bare(answer):
        return True
    if as_text:
        return False

    # Words are text. So are dates and times of day.
    gold_text = TEXT.sub(r"\1", gold).strip()
    answer_text = TEXT.sub(r"\1", answer).strip()
    if is_words(gold_text):
        return gold_text.casefold() == answer_text.casefold()
    if CLOCK.fullmatch(gold_text) or DATE.fullmatch(gold_text):
        letters = [re.sub(r"[.\s]", "", text).casefold() for text in (gold_text, answer_text)]
        return letters[0] == letters[1]
    if CHOICE.fullmatch(gold_text) and not answer_text[:1].isdigit():
        letter = choice_letter(answer)
        if letter or len(answer_text) == 1:
            return (letter or answer_text.upper()) == choice_letter(gold)

    # Two numbers that are written out are compared exactly. Different decimals may still be equal
    # after rounding, which math-verify decides.
    answer = number_in_words(answer)
    written = equal_written_numbers(gold, answer)
    if written is not None:
        return written

    # A number wants a number.
    if is_not_a_plain_number(answer, gold):
        return False
    return equal_in_child(gold, answer)


# A formula in a problem's text
FORMULA = re.compile(
    r"(?<!\\)\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]|\\begin\{(?:align|equation)\*?\}(.+?)"
    r"\\end\{(?:align|equation)\*?\}",
    re.S,
)


def copies_formula(prompt, answer, gold):
    """True if an answer that is equal to the gold is only a formula of the problem [D28].

    "Simplify $3x+4x$" asks for another form of its own formula, so the formula itself solves
    nothing. A number that is written out, and the gold's own text, are no copies.
    """
    answer, gold = forms.spell(answer), spelled(gold)
    if forms.bare(answer) == forms.bare(gold) or plain_number(value_of(answer)) is not None:
        return False
    if not re.search(r"[^\w\s]", answer):
        return False  # a letter, a word
    given = {forms.bare(answer), forms.bare(forms.split_name(answer)[1])}
    for match in FORMULA.finditer(prompt):
        formula = next(group for group in match.groups() if group)
        formula = forms.spell(formula)
        if forms.bare(formula) in given or forms.bare(forms.split_name(formula)[1]) in given:
            return True
    return False


def compare(gold, answer, prompt=None, as_text=False):
    """The status of an answer: "ok", "wrong", "timeout" (the verifier gave up) or "infra".

    prompt: the problem; without it a copy of one of its formulas is not found. as_text: the answer
    has to be the gold's own text. "infra" means that the machine stalls: a run with too many of
    these stops (--max_infra).
    """
    try:
        same = same_answer(gold, answer, as_text)
    except TimeoutError:
        return "infra"
    if same is None:
        return "timeout"
    if same and prompt is not None and copies_formula(prompt, answer, gold):
        return "wrong"
    return "ok" if same else "wrong"


# ---- 6. Golds that cannot be compared ------------------------------------------------------------
def sound_rows(rows, num_workers, name, folder=""):
    """The rows whose "answer" the verifier can read; those it misreads get "as_text": True [D27].

    Dropped is a gold that does not verify against itself. A gold that would also let wrong answers
    pass is compared as text only. Both are counted and printed, with `name` in front.
    """
    golds = [row["answer"] for row in rows]
    distinct = list(dict.fromkeys(golds))
    found = dict(zip(distinct, check_golds(distinct, num_workers, folder, name), strict=True))
    troubles = [found[gold] for gold in golds]
    as_text = [(gold, trouble) for gold, trouble in zip(golds, troubles, strict=True) if trouble]
    kept = []
    for row, trouble in zip(rows, troubles, strict=True):
        if trouble:
            row = {**row, "as_text": True}
        if trouble is not None:
            kept.append(row)
    if len(kept) < len(rows):
        print0(f"{name}: dropped {len(rows) - len(kept)} answers that do not verify")
    if as_text:
        gold, trouble = as_text[0]
        print0(
            f"{name}: {len(as_text)} answers are compared as text only, "
            f'the first of them "{gold}": {trouble}'
        )
    return kept


def check_golds(golds, num_workers, folder="", name="data"):
    """What each gold is good for, as rank 0 finds it: no rank trains on other rows.

    None: it does not verify against itself. A sentence: why it is compared as text only. "": it is
    sound. They are checked in parallel. The results are kept in a hidden file of `folder`, so that
    a run with the same golds and the same verifier does not check them again.
    """
    troubles = None
    if ranks()[0] == 0:
        path = os.path.join(folder, f".golds_{checksum_of(golds)}.json")
        if os.path.exists(path):
            with open(path) as f:
                troubles = json.load(f)
        else:
            print0(f"{name}: checking that {len(golds)} answers verify")
            checked = answer_pool(num_workers).map(trouble_of, golds)
            troubles = list(progress(checked, "answers", len(golds)))
            # Two runs may start on the same data at once, so each writes a file of its own first.
            if os.path.isdir(folder):
                with open(f"{path}.{os.getpid()}", "w") as f:
                    json.dump(troubles, f)
                os.replace(f"{path}.{os.getpid()}", path)
    return all_gather(troubles)[0]


def checksum_of(golds):
    """Of the golds and of the verifier's own text: another verifier may find another result."""
    digest = hashlib.blake2b(json.dumps(golds).encode(), digest_size=8)
    for path in (__file__, forms.__file__):
        with open(path, "rb") as f:
            digest.update(f.read())
    return digest.hexdigest()


def trouble_of(gold):
    """None, a sentence or "" for one gold; see check_golds."""
    given = last_box(boxed_response(gold))
    if not given or compare(gold, given) != "ok":
        return None
    return unsound(gold)


def unsound(gold):
    """Why this gold answer should be compared as text only [D27]; "" if it need not be.

    The tests know no kinds of answers. They ask whether the verifier reads the whole gold: without
    its decoration it has to be equal, and with another number, without its last letters, or with
    a bare equation in its place it has to be wrong. A verifier that gives up says no either.
    """
    text = spelled(gold)
    if plain_number(text) is not None or is_words(TEXT.sub(r"\1", text)):
        return ""
    undecorated = re.sub(r"(?<!\\)\$", "", TEXT.sub(r"\1", gold)).strip()
    undecorated = re.sub(r"\s*\.$", "", undecorated)
    if same_answer(gold, undecorated) is not True:
        return "its bare text is not equal"
    for changed in changed_numbers(text):
        if same_answer(gold, changed) is not False:
            return f"{changed} is not wrong"
    value = value_of(forms.simple_form(text)[0])
    shortened = re.sub(r"(?<=[^A-Za-z\\])\s*[A-Za-z]+$", "", value)
    if shortened not in ("", value) and same_answer(gold, shortened) is not False:
        return f"{shortened} is not wrong"
    for equation in ("1=1", "1=2"):
        if same_answer(gold, equation) is not False and forms.bare(text) != equation:
            return f"{equation} is not wrong"
    return ""


def changed_numbers(text):
    """The text with each of its numbers raised by one, at most eight of them."""
    changed = []
    for match in list(re.finditer(r"\d+", text))[:8]:
        number = str(int(match[0]) + 1)
        changed.append(text[: match.start()] + number + text[match.end() :])
    return changed
