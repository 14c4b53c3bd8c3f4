"""How the text of a math answer is read: one spelling for each sign, and the parts of the answer.

    spell(text)          one spelling for dollars, macros, unicode signs, plain functions
    split_unit(text)     "12 \\text{ cm}" -> ("12", "cm")
    split_name(text)     "f(x) = 2x" -> ("f(x)", "2x")
    members(text)        "1, 2 \\text{ or } 3" -> ["1", "2", "3"]
    brackets(text)       "[0,1)" -> ("[", "0,1", ")")
    relation(text)       "0 < x < 1" -> (["0", "x", "1"], ["<", "<"])

Nothing here computes. verifiers/answers.py compares the parts.
"""

import re

# ---- 1. Spelling ---------------------------------------------------------------------------------
UNICODE = {
    "\u2212": "-",
    "\u2013": "-",
    "\u00b0": r"^\circ ",
    "\u00d7": r"\times ",
    "\u00f7": "/",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u221e": r"\infty ",
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ",
    "\u03bb": r"\lambda ",
    "\u2264": r"\leq ",
    "\u2265": r"\geq ",
    "\u2260": r"\neq ",
    "\u2248": r"\approx ",
    "\u00b1": r"\pm ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u2032": "'",
    "\u2019": "'",
    "\u2033": "''",
    "\u2026": r"\ldots ",
    "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
}
UNICODE = str.maketrans(UNICODE)
SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
SUPERSCRIPT = re.compile(rf"(?<=[\w)}}\]])[{SUPERSCRIPTS}]+")
TO_DIGITS = str.maketrans(SUPERSCRIPTS, "0123456789-")

# An argument without braces: a digit or a letter, or a braced or macro argument as it is.
UNICODE_ROOT = re.compile(r"([\u221a\u221b])\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
PLAIN_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|pi|infinity)"
    r"(?=[\s\d(/{^_+*)\-]|$)"
)
# \text{...} and its relatives, with the content that has no braces of its own
TEXT = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname\*?)\s*\{([^{}]*)\}")
FUNCTION = r"\\(?:sin|cos|tan|cot|sec|csc|ln|log|exp)"

# Macros of one meaning. A macro ends where its letters end.
MACROS = {
    "dfrac": r"\frac",
    "tfrac": r"\frac",
    "cfrac": r"\frac",
    "dbinom": r"\binom",
    "tbinom": r"\binom",
    "Bbb": r"\mathbb",
    "varnothing": r"\emptyset",
    "le": r"\leq",
    "leqslant": r"\leq",
    "ge": r"\geq",
    "geqslant": r"\geq",
    "ne": r"\neq",
    "lt": "<",
    "gt": ">",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "lbrack": "[",
    "rbrack": "]",
    "langle": "(",
    "rangle": ")",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "colon": ":",
    "degree": r"^\circ",
    "dots": r"\ldots",
    "cdots": r"\ldots",
    "dotsc": r"\ldots",
    "bigcup": r"\cup",
    "bigtriangleup": r"\triangle",
    "top": "T",
    "mathrm{d}": "d",
}
MACRO = re.compile(r"\\(" + "|".join(sorted(MACROS, key=len, reverse=True)) + r")(?![A-Za-z])")
SIZES = re.compile(
    r"\\(left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits|rm|bf)(?![A-Za-z])\s?"
)
# A letter set upright is that letter, \mathrm{i} is no unit. The letters of units stay as they are.
UPRIGHT_LETTER = re.compile(
    r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{((?![mgshLlNJWVK])[^\W\d_]|\\pi ?)\}"
)
SPACING = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\\(?:thinspace|nobreak)(?![A-Za-z])")


def balanced_argument(text, start):
    """The index behind the {...} that begins at text[start], or None."""
    depth = 0
    for position in range(start, len(text)):
        if text[position - 1 : position] == "\\":
            continue
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return position + 1
    return None


def brace_arguments(text, macro, count):
    """Put the arguments of a macro into braces: \\frac{ab}c, \\frac12, \\binom n2."""
    result, position = "", 0
    for match in re.finditer(rf"\\{macro}(?![A-Za-z])(\[[^\]]*\])?", text):
        if match.start() < position:
            continue  # inside an argument that was copied
        result += text[position : match.end()]
        position = match.end()
        for _ in range(count):
            rest = text[position:]
            position += len(rest) - len(rest.lstrip())
            end = (
                balanced_argument(text, position) if text[position : position + 1] == "{" else None
            )
            if end is not None:
                inner = brace_arguments(text[position + 1 : end - 1], macro, count)
                result += "{" + inner + "}"
                position = end
                continue
            token = re.match(r"\\[A-Za-z]+|[A-Za-z\d]", text[position:])
            if not token:
                break
            result += "{" + token[0] + "}"
            position += token.end()
    return result + text[position:]


def spell(text):
    """One spelling for what people and models write in many ways. The meaning stays."""
    text = text.translate(UNICODE)
    text = SUPERSCRIPT.sub(lambda match: "^{" + match[0].translate(TO_DIGITS) + "}", text)
    text = UNICODE_ROOT.sub(unicode_root, text)
    if "matrix" not in text and "cases" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # a dump with doubled backslashes
    text = re.sub(r"(\\\\)\[-?[\d.]+(pt|em|ex|mm)\]", r"\1", text)

    # Thousands: "12{,}040" and "12,\!040" are numbers whatever stands around them.
    text = re.sub(r"(?<=\d)(\{,\}|,\\!)\s*(?=\d{3})", ",", text)
    text = re.sub(r"\\!\s?", "", text)
    text = text.replace(r"\text{\$}", r"\$ ")

    # Spacing, delimiters of formulas, sizes. Dollars of money keep their backslash.
    text = SIZES.sub("", text)
    text = SPACING.sub(" ", text)
    text = re.sub(r"(?<!\\)\\[()\[\]]|(?<!\\)\$", " ", text)
    text = re.sub(r"_(\w)(?=\s)", r"_{\1}", text)
    text = MACRO.sub(lambda match: MACROS[match[1]] + " ", text)
    text = UPRIGHT_LETTER.sub(r"\1", text)
    text = re.sub(r"\\(?:mathrm|operatorname|text)\{(ln|log|sin|cos|tan|exp)\}", r"\\\1 ", text)
    text = re.sub(r"\{(\\(?:sin|cos|tan|ln|log))\s*\}", r"\1", text)
    text = re.sub(r"\\math(?:bf|rm|it|sf)\{([\d.,\s]*)\}|\\text\w*\{([\d.,\s]*)\}", r"\1\2", text)

    # Primes, degrees, blackboard letters.
    text = re.sub(r"\^\s*(\{\s*(?:\\prime\s*)+\}|(?:\\prime)(?![a-z]))", prime_marks, text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])", r"^\\circ", text)
    text = re.sub(r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}", text)

    # Plain functions and signs.
    text = re.sub(r"(?<![\\A-Za-z])exp\s*\(([^()]*)\)", r"e^{\1}", text)
    text = re.sub(r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = PLAIN_FUNCTION.sub(lambda match: "\\" + match[1].replace("infinity", "infty"), text)
    text = re.sub(r"\\log_\{?e\}?(?![a-z])", r"\\ln", text)
    text = re.sub(r"(?<=\d)[eE]([-+]?\d+)(?![\d.])", r"\\times 10^{\1}", text)
    text = re.sub(r"(?<=[\w)}])\s*\*\s*(?=[\w(\\])", r"\\cdot ", text)
    text = re.sub(r"(?<=[+\-])\s*\+\s*-|\+\s*-(?=[\s\d])", "-", text)
    text = re.sub(r"\{\}_\{?(\w)\}?C_\{?(\w)\}?", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\{([^{}]+)\\choose(?![a-z])([^{}]+)\}", r"\\binom{\1}{\2}", text)
    # "\sin x \cdot y" is (\sin x) y.
    text = re.sub(
        rf"({FUNCTION}\s*)([A-Za-z]|\\[a-z]+|\d+|\([^()]*\))\s*\\(?:cdot|times)(?![a-z])",
        r"(\1\2)\\cdot",
        text,
    )
    for macro, count in (("frac", 2), ("binom", 2), ("sqrt", 1)):
        if "\\" + macro in text:
            text = brace_arguments(text, macro, count)
    text = re.sub(r"(\d+)?\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?$", repeating, text.strip())
    text = re.sub(r"(?<![\d/.^_{])(\d+)\s+(\d+)/(\d+)(?![\d.])", mixed_number, text)
    text = re.sub(r"\s+", " ", text).strip()
    if text.startswith("{") and balanced_argument(text, 0) == len(text):
        text = text[1:-1].strip()
    # Nothing but words, or a number and its unit, in one \text{}.
    if match := TEXT.fullmatch(text):
        text = match[1].strip()
    if text.casefold() in ("empty set", "the empty set", "null set"):
        text = r"\emptyset"
    return re.sub(r"\s*\.$", "", text).strip()


def unicode_root(match):
    """A unicode root sign with what it covers."""
    macro = r"\sqrt" if match[1] == "\u221a" else r"\sqrt[3]"
    return macro + "{" + match[2].strip("(){}") + "}"


def prime_marks(match):
    """One apostrophe for each \\prime."""
    return "'" * match[0].count("prime")


def repeating(match):
    """0.1\\overline{6} as a fraction."""
    whole, fixed, repeated = match[1] or "0", match[2], match[3]
    numerator = int(whole + fixed + repeated) - int(whole + fixed)
    denominator = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def mixed_number(match):
    """ "3 1/2" as 3\\frac{1}{2}; "3 7/2" is left alone."""
    if int(match[2]) >= int(match[3]):
        return match[0]
    return rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}"


# ---- 2. Words ------------------------------------------------------------------------------------
# Spaces that do not separate two digits: "x + 1" = "x+1", but "3 5" stays.
SPACE = re.compile(r"(?<![\d\s])\s+|\s+(?![\d\s])")
# A unit is a noun. These words of the closed classes of English, numerals among them, change what
# stands before them, or take it back: "34 million", "34 and a half", "34 is wrong", "34 if n".
NO_UNIT = set(
    "a an the and or nor not no but if then else when where while for from to at on off over "
    "under with without as by than more less least most about around approximately roughly nearly "
    "almost exactly only either neither both all any some none every each is are was were be been "
    "being isn aren does do did can could may might must should would will maybe perhaps possibly "
    "wrong right true false incorrect correct it its this that these those other another also plus "
    "minus times divided multiplied mod modulo choose factorial squared cubed power root zero one "
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred "
    "thousand million billion trillion dozen half halves third thirds quarter quarters fourth "
    "fourths fifth fifths sixth sixths seventh eighth eighths ninth tenth tenths hundredth "
    "hundredths thousandth thousandths percent pct xor between sqrt sin cos tan log exp infinity "
    "infty".split()
)
UNITS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "yr": "year years",
    "L": "l liter liters litre litres",
    "mL": "ml milliliter milliliters",
    "deg": "degree degrees",
    "rad": "radian radians",
    "%": "",
    "$": "dollar dollars usd bucks",
    "cent": "cents",
    "mol": "mole moles",
    "Pa": "pascal pascals",
    "kPa": "",
    "kW": "kilowatt kilowatts",
    "eV": "",
    "ha": "hectare hectares",
    "N": "newton newtons",
    "J": "joule joules",
    "W": "watt watts",
    "V": "volt volts",
    "K": "kelvin",
    "Hz": "hertz",
}
UNIT_OF = {}
for symbol, names in UNITS.items():
    for name in [symbol, *names.split()]:
        UNIT_OF[name] = symbol
UNIT_OF |= {"mph": "mi/h", "kmh": "km/h", "kph": "km/h"}
# "square inches", "sq cm", "units": no part of the unit's name
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}

EXPONENT = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
UPRIGHT = rf"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox)\s*\{{[^{{}}\d]*\}}{EXPONENT}"
# the upright words at the end of an answer, also "\mathrm{m} / \mathrm{s}"
UPRIGHT_UNIT = re.compile(rf"(?P<value>.*?)\s*(?P<unit>{UPRIGHT}(?:\s*/\s*{UPRIGHT})*)$", re.S)
# plain words behind a number: "34 people", "34 m/s", "34cm^2"
BARE_UNIT = re.compile(
    rf"(?P<value>[-+]?\s?(?:[\d,. ]*\d|\\frac\{{\d+\}}\{{\d+\}}|\d+/\d+)\.?)"
    rf"(?P<unit>(?:\s+[A-Za-z]|[A-Za-z]{{2}})[A-Za-z. ]*(?:/[A-Za-z ]+)?{EXPONENT})$"
)


def bare(text):
    """A text without spacing and without \\text{}. Answers that agree here are equal."""
    text = TEXT.sub(r"\1", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return SPACE.sub("", text).strip()


def unit_name(text):
    """The unit of a text in one spelling, "" if there is none, None if it is no unit."""
    power = "".join(re.findall(r"\d", text))
    words = re.findall(r"[^\W\d_]+|/", TEXT.sub(r" \1 ", text))
    words = [word for word in words if word.lower() not in ("units", "unit")]
    for word in words:
        # Words of one or two letters may be variables: \text{ x}, \mathrm{ab}.
        unknown = len(word) < 3 and word not in ("/", "of") and word not in UNIT_OF
        if unknown or word.lower() in NO_UNIT:
            return None
    name = ""
    for word in words:
        if word.lower() in POWERS:
            power = POWERS[word.lower()][1:]
        elif word == "per":
            name += "/"
        else:
            name += UNIT_OF.get(word, UNIT_OF.get(word.lower(), " " + word.lower()))
    return name + ("^" + power if power else "")


def split_unit(text):
    """(value, unit): percent, degrees, money, words behind a value. unit is "" if there is none."""
    if match := re.fullmatch(r"(.*?)\s*\\?%|(.*?)\s*(?:\\text\{\s*)?percent\s*\}?", text, re.S):
        return (match[1] or match[2] or "").strip(), "%"
    if match := re.fullmatch(r"([-+]?)\s*\\\$\s*(.*)", text, re.S):
        value, unit = split_unit(match[2])
        return match[1] + value, "$" if unit in ("", "$") else "$ " + unit
    if text.endswith(r"^\circ"):
        return text.removesuffix(r"^\circ").strip(), "deg"
    if match := re.fullmatch(r"(.*\d)\s*\^?\s*(?:\{\s*)?(?:\\text\{)?(?:st|nd|rd|th)\}*", text):
        return match[1], ""
    match = UPRIGHT_UNIT.fullmatch(text) or BARE_UNIT.fullmatch(text)
    if not match or not match["value"]:
        return text, ""
    # One letter, or letters right behind the number, may be variables: "5 x", "2ab".
    letters = re.match(r"\s*([A-Za-z]+)", match["unit"])
    if letters and letters[1] not in UNIT_OF:
        follows_at_once = not match["unit"].startswith(" ")
        if follows_at_once or len(letters[1]) == 1:
            return text, ""
    # "3 \text{ hours } 20 \text{ minutes}" are two quantities.
    if has_words(match["value"]):
        return text, ""
    name = unit_name(match["unit"])
    if name is None:
        return text, ""
    return match["value"].strip(), name


def has_words(text):
    """True if a text has words besides its formula: \\text{...}, or a word of four letters."""
    plain = re.sub(r"\\(?:begin|end)\{[a-z]*\}", " ", text)
    if any(re.search(r"[^\W\d_]", content) for content in TEXT.findall(plain)):
        return True
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", plain)
    units = [word for word in words if len(word) > 1 and word in UNIT_OF]
    return bool(units) or any(len(word) > 3 for word in words)


def tokens(text):
    """Numbers, signs and words of a text, each unit in one spelling."""
    found = re.findall(r"\d[\d.,]*\d|[^\W_]+|[^\s\w,]", TEXT.sub(r" \1 ", text))
    result = []
    for token in found:
        if token != "and":
            result.append(UNIT_OF.get(token, UNIT_OF.get(token.lower(), token.lower())))
    return result


def same_constant(gold, answer):
    """Write the constant of integration of both texts as a capital C."""
    small = r"(?<![\\A-Za-z])c(?![A-Za-z])"
    large = r"(?<![\\A-Za-z])C(?![A-Za-z])"
    if re.search(large, gold) and not re.search(small, gold) and not re.search(large, answer):
        answer = re.sub(small, "C", answer)
    return gold, answer


def known_units_differ(gold, answer):
    """True if both units are known and are not the same: cm against cm^2, degrees against rad."""

    def known(unit):
        parts = re.split(r"[/^]", unit)
        return bool(unit) and all(part in UNITS or part.isdigit() for part in parts)

    return known(gold) and known(answer) and gold != answer


# ---- 3. Parts ------------------------------------------------------------------------------------
MACRO_NAME = re.compile(r"\\[A-Za-z]+|\\.")
OPENING = re.compile(r"\\\{|\\begin\{|[([{]|\\lfloor|\\lceil")
CLOSING = re.compile(r"\\\}|\\end\{|[)\]}]|\\rfloor|\\rceil")
RELATION = re.compile(
    r"\\(?:leq|geq|neq|approx|equiv|in|to|sim|cong|subset|implies|iff|Rightarrow|rightarrow)"
    r"(?![A-Za-z])|[=<>]"
)
SEPARATOR = re.compile(
    r"\s*[,;]?\s*(?:\\text\w*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
    r"|\\(?:lor|vee)(?![A-Za-z]))\s*|[,;]"
)
UNION = re.compile(r"\\cup(?![A-Za-z])")
COLON = re.compile(":")
# "xy = 1" has a product, no name, in front.
NAME = re.compile(
    r"(?![a-z]{2}$)\\?[A-Za-z]+'*(?:_\w|_\{\w+\})?(?:\^\{-1\})?(?:\([A-Za-z]\))?"
    r"|\([A-Za-z](?:_\w)?(?:,\s*[A-Za-z](?:_\w)?)+\)"
    r"|\\(?:angle|triangle|overline)\s*\{?[A-Z]+\}?"
)


def split_top(text, separator):
    """(parts, separators) of a text, split where no bracket is open.

    Brackets are only counted, not matched, so that intervals such as [0,1) work.
    """
    parts, found, depth, start, position = [], [], 0, 0, 0
    while position < len(text):
        if depth == 0 and (match := separator.match(text, position)) and match.end() > position:
            parts.append(text[start:position].strip())
            found.append(match[0].strip())
            start = position = match.end()
            continue
        if match := OPENING.match(text, position):
            depth += 1
        elif match := CLOSING.match(text, position):
            depth -= 1
        elif match := MACRO_NAME.match(text, position):
            pass  # a macro is one piece: the "in" of \sin is no sign
        position = match.end() if match else position + 1
    return [*parts, text[start:].strip()], found


def brackets(text):
    """(opening, content, closing) if one pair of brackets holds the whole text, else None."""
    match = re.fullmatch(r"(\\\{|[(\[\]])(.*)(\\\}|[)\]\[])", text, re.S)
    if not match:
        return None
    depth = 0
    content = match[2]
    position = 0
    while position < len(content):
        if found := OPENING.match(content, position):
            depth += 1
        elif found := CLOSING.match(content, position):
            depth -= 1
            if depth < 0:
                return None
        position = found.end() if found else position + 1
    if depth:
        return None
    opening, closing = match[1], match[3]
    # ]0,1[ is (0,1).
    if opening == "]":
        opening = "("
    elif closing == "]" and match[1] == ")":
        return None
    if closing == "[":
        closing = ")"
    return opening, content.strip(), closing


def in_braces(text):
    """True if one pair of \\{ \\} holds the whole text."""
    held = brackets(text)
    return held is not None and held[0] == r"\{"


def split_name(text):
    """(name, value): "x = 5" -> ("x", "5"). name is "" if none stands in front."""
    parts, signs = split_top(text, RELATION)
    if len(parts) == 2 and signs[0] in ("=", r"\equiv", r"\approx", r"\in"):
        is_set = parts[1].startswith(("(", "[", "]", r"\{", r"\mathbb", r"\emptyset"))
        if NAME.fullmatch(parts[0]) and parts[1] and (is_set or signs[0] != r"\in"):
            return re.sub(r"[\s{}]", "", parts[0]), parts[1]
    return "", text


def relation(text):
    """(members, signs) of a chain of relations. A chain that falls is turned round."""
    parts, signs = split_top(text, RELATION)
    turned = {">": "<", r"\geq": r"\leq"}
    if signs and all(sign in turned for sign in signs):
        parts.reverse()
        signs = [turned[sign] for sign in reversed(signs)]
    return parts, signs


def members(text):
    """The members of a list or of a set in braces. One \\pm makes two of a member."""
    if in_braces(text):
        text = brackets(text)[1]
    result = []
    for member in split_top(text, SEPARATOR)[0]:
        if not member:
            continue  # "1, 2, and 3" has an empty one before its "and"
        if member.count(r"\pm") == 1 and not brackets(member):
            result.append(member.replace(r"\pm", "+", 1).removeprefix("+").strip())
            result.append(member.replace(r"\pm", "-", 1))
        else:
            result.append(member)
    return result


# ---- 4. Whole forms ------------------------------------------------------------------------------
BUILDER = re.compile(
    r"\\\{\s*(?P<what>[^|:]*?)\s*(?:\\mid(?![a-z])|\||:)\s*(?P<condition>.*)\\\}", re.S
)
# "k \in \mathbb{Z}" at the end of an answer, whatever word introduces it
QUANTIFIER = re.compile(
    r"(?P<what>.*?)"
    r"(?:,|;|\\text\w*\{\s*(?:for|where|with|for all|,)?\s*\}|(?<![a-z])(?:for|where))+\s*"
    r"(?P<letter>[A-Za-z])\s*\\in\s*\\mathbb\{(?P<set>[A-Z])\}",
    re.S,
)
# "for all x", "for any constant c", "for all real numbers x": nothing to compare
FOR_ALL = re.compile(
    r"\s*,?\s*(?:\\text\w*\{\s*)?,?\s*for (?:all|any|every|each|some)"
    r"(?: (?:real|complex|constant|arbitrary|numbers?|constants?|values? of))*\s*\}?"
    r"\s*\$?[A-Za-z]?\s*(?:\\in\s*\\mathbb\{[A-Z]\}|\\text\{\s*\})?\s*\}?$"
)
NUMBER_LIKE = re.compile(
    r"(?!.*[A-Za-z]{2})(?:[-+]|\d|[./{}()\s]|\\(?:frac|sqrt|pi|infty)(?![a-z]))+"
)


def simple_form(text):
    """(text, quantifier): set-builders, quantifiers, "for all x" and inequalities made plain.

    A range of one letter between numbers becomes an interval with the letter as its name:
    "0 < x \\leq 9" -> "x \\in (0,9]".
    """
    text = FOR_ALL.sub("", text)
    quantifier = ""
    if match := BUILDER.fullmatch(text):
        what, condition = match["what"], match["condition"].strip()
        letter = re.fullmatch(r"([A-Za-z])(\s*\\in\s*\\mathbb\{R\})?", what)
        text = condition if letter else f"{what}, {condition}"
    if match := QUANTIFIER.fullmatch(text):
        # The bound letter may have any name.
        quantifier = match["set"]
        letter = match["letter"]
        text = re.sub(rf"(?<![\\A-Za-z]){letter}(?![A-Za-z])", r"\\kappa ", match["what"])
        text = text.removesuffix(",").strip()
        if in_braces(text):
            text = brackets(text)[1]
    # "x < -2 or x > 3" is one union.
    parts, separators = split_top(text, SEPARATOR)
    if separators and all("or" in separator for separator in separators):
        ranges = [split_name(range_as_interval(part)) for part in parts]
        names = {name for name, value in ranges if value.startswith(("(", "["))}
        if len(names) == 1 and "" not in names:
            union = r" \cup ".join(value for _, value in ranges)
            return rf"{names.pop()} \in {union}", quantifier
    return range_as_interval(text), quantifier


def range_as_interval(text):
    """An inequality of one letter with bounds that are numbers, as an interval."""
    parts, signs = relation(text)
    if not signs or any(sign not in ("<", r"\leq") for sign in signs):
        return text
    letters = [bool(re.fullmatch(r"[A-Za-z]|\\[a-z]+", part)) for part in parts]
    bounds = [bool(NUMBER_LIKE.fullmatch(part)) for part in parts]
    opening = {"<": "(", r"\leq": "["}[signs[0]]
    closing = {"<": ")", r"\leq": "]"}[signs[-1]]
    if len(parts) == 3 and letters[1] and bounds[0] and bounds[2]:
        return rf"{parts[1]} \in {opening}{parts[0]},{parts[2]}{closing}"
    if len(parts) == 2 and letters[0] and bounds[1] and not bounds[0]:
        return rf"{parts[0]} \in (-\infty,{parts[1]}{closing}"
    if len(parts) == 2 and letters[1] and bounds[0] and not bounds[1]:
        return rf"{parts[1]} \in {opening}{parts[0]},\infty)"
    return text
