"""Training's guards against replies that follow a constraint by its letter alone (paper 4.4).

    objection(instruction_ids, kwargs, text, prompt)   why training does not pay, or None

verifiers/constraints.py decides as the references decide, and evaluation asks nothing else. A
policy is paid for each reply that passes, so it finds what passes without being an answer: ten
times "a", a bare 1 as JSON, brackets without a word, the prompt itself, a comma in another script.
Training therefore asks for more, and never for less: ifrl.verify calls objection only for replies
that pass the references' rules.

The guards come in two groups. Four know nothing of the constraints: what nobody can see does not
count [D35], a reply holds a word [D34], does not repeat itself and is not a copy of its prompt
[D36]. The others are one small function for a constraint, in the table IN_EARNEST: a language has
to be one that can be told [D11], the form that was asked for holds words [D34], and the words of
the instruction are meant [D37].
"""

import functools
import re
import unicodedata
from collections import Counter

import langdetect
from langdetect import detector_factory
from langdetect.detector import Detector
from langdetect.utils.ngram import NGram

from verifiers.constraints import (
    CHECKS,
    POSTSCRIPTS,
    SIX_STARS,
    THREE_STARS,
    argument_names,
    check,
    clean_kwargs,
    compare,
    phrase_spans,
    placeholders,
    punkt,
    split_sentences,
    titles,
    tokens,
)

# ---- 1. The text as a reader sees it [D35] -------------------------------------------------------
# Categories of characters without a picture: controls, format characters (zero-width blanks, soft
# hyphens), surrogates, private use, unassigned.
UNSEEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn"}
# Characters that unicode calls letters, marks or symbols and that show nothing: grapheme joiner,
# four Hangul fillers, Braille blank, variation selectors.
UNSEEN = {0x034F, 0x115F, 0x1160, 0x3164, 0xFFA0, 0x2800, *range(0xFE00, 0xFE10)}
# Letters of Greek and Cyrillic that look like a Latin letter, and that letter.
LOOKALIKES = dict(
    zip(
        "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u0501\u051b\u051d"
        "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406\u0408\u0405"
        "\u03bf\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5"
        "\u03a7",
        "aeopcyxijsdqwABEKMHOPCTXIJSoABEZHIKMNOPTYX",
        strict=True,
    )
)


@functools.cache
def seen_as(character):
    """What one character looks like: "" if nothing, an ASCII text if like that, else itself."""
    if character in "\n\t\r":
        return character
    if character in "\u2028\u2029":
        return "\n"
    if unicodedata.category(character) in UNSEEN_CATEGORIES or ord(character) in UNSEEN:
        return ""
    # Fullwidth and mathematical letters, wide blanks, the ellipsis and others have an ASCII twin.
    twin = unicodedata.normalize("NFKC", character)
    return twin if twin.isascii() else character


def in_latin(match):
    """A word that mixes Latin letters with their twins of other scripts: the twins become Latin."""
    word = match[0]
    has_latin = re.search("[a-zA-Z]", word) is not None
    if not has_latin:
        return word
    return "".join(LOOKALIKES.get(letter, letter) for letter in word)


def as_seen(text):
    """A text without its invisible characters, and with ASCII for what looks like ASCII."""
    text = text.translate({ord(character): seen_as(character) for character in set(text)})
    if text.isascii():
        return text
    return re.sub(r"\w+", in_latin, text)


# ---- 2. Words ------------------------------------------------------------------------------------
def words_of(text):
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def has_word(text):
    """Is there a letter or a digit?"""
    return re.search(r"[^\W_]", text) is not None


def is_passage(text):
    """Can a text be a paragraph, a section or a response: two words, or six letters?

    Six letters, since some scripts put no blank between words.
    """
    words = words_of(text)
    return len(words) >= 2 or sum(len(word) for word in words) >= 6


def has_words_besides(text, parts):
    """Are there words outside of the parts of a text?"""
    num_inside = sum(len(words_of(part)) for part in parts)
    return len(words_of(text)) > num_inside


# ---- 3. Repetition and copies [D36] --------------------------------------------------------------
# Longer words are looked at letter by letter, as a text is word by word.
LONG_WORD = 30
# A copy of the prompt is a run of as many words that stand in it.
COPIED_RUN = 6


def repeats_itself(text):
    """Does a text say the same over and over?

    It does if its different words and one more are fewer than the root of its length, so that one
    word may stand four times and a phrase of two words four times, too; or if three in four of its
    triples of words are repetitions. Honest texts stay far away from both: bench/README.md.
    """
    words = words_of(text)
    if (len(set(words)) + 1) ** 2 < len(words):
        return True
    triples = list(zip(words, words[1:], words[2:]))
    if 4 * len(set(triples)) < len(triples):
        return True
    return any(len(word) >= LONG_WORD and len(set(word)) ** 2 < len(word) for word in words)


def num_copied(words, source):
    """How many words stand in runs of COPIED_RUN words or more that another text has as well."""
    runs = set(zip(*(source[start:] for start in range(COPIED_RUN))))
    num_words = 0
    end_of_copy = 0
    for start in range(len(words) - COPIED_RUN + 1):
        if tuple(words[start : start + COPIED_RUN]) in runs:
            end = start + COPIED_RUN
            num_words += end - max(start, end_of_copy)
            end_of_copy = end
    return num_words


def copies(text, prompt):
    """Is a text the prompt again: four in five of its words, and half of the prompt's?

    The second half spares honest answers: a corrected text is copied, but the wish that it be
    corrected is not.
    """
    words, source = words_of(text), words_of(prompt)
    most_is_copied = num_copied(words, source) > 0.8 * len(words)
    return most_is_copied and num_copied(source, words) > 0.5 * len(source)


# ---- 4. Language [D11] ---------------------------------------------------------------------------
# langdetect looks at the first 10,000 characters only.
LANGDETECT_CHARS = 10_000


def is_told_in(text, language):
    """Can langdetect tell the language of a text, and is it this one in every part of the text?

    At least half of the letters have to be evidence: letters of an alphabet that langdetect has a
    profile for, outside of addresses, which it leaves out.
    """
    detector_factory.init_factory()
    known = detector_factory._factory.word_lang_prob_map
    without_addresses = Detector.MAIL_RE.sub(" ", Detector.URL_RE.sub(" ", text))
    evidence = 0
    for character, frequency in Counter(without_addresses).items():
        if character.isalpha() and NGram.normalize(character) in known:
            evidence += frequency
    num_letters = sum(map(str.isalpha, text))
    if evidence == 0 or 2 * evidence < num_letters:
        return False
    # Parts of equal length, so that no short rest is judged by itself.
    num_parts = -(-len(text) // LANGDETECT_CHARS)
    length = -(-len(text) // num_parts)
    try:
        for start in range(0, len(text), length):
            if langdetect.detect(text[start : start + length]) != language:
                return False
    except langdetect.LangDetectException:
        return False
    return True


# ---- 5. Forms that hold words [D34] --------------------------------------------------------------
# From here on, the parameters behind `text` are the arguments of the constraint, as in
# verifiers/constraints.py. Each function is asked of a reply that passes the check there.


def counts_words(text, num_words, relation):
    # \w+ of the reference takes a lone underscore for a word. Half of the words have letters.
    words = words_of(text)
    num_with_letters = sum(1 for word in words if not word.isdigit())
    enough = len(words) >= num_words and 2 * num_with_letters >= num_words
    return relation == "less than" or enough


def counts_sentences(text, num_sentences, relation):
    # The same sentence again is no further one, nor is one without a word.
    sentences = {same.strip().lower() for same in punkt().tokenize(text) if has_word(same)}
    return relation == "less than" or len(sentences) >= num_sentences


def starred_paragraphs_are_passages(text):
    return all(is_passage(part) for part in re.split(THREE_STARS, text) if part.strip())


def paragraphs_hold_words(text):
    return all(has_word(part) for part in text.split("\n\n") if part.strip())


def two_paragraphs_are_passages(text):
    return all(is_passage(part) for part in text.split("\n\n") if part.strip())


def placeholders_have_names(text, num_placeholders):
    found = placeholders(text)
    named = [placeholder for placeholder in found if has_word(placeholder)]
    return len(named) >= num_placeholders and has_words_besides(text, found)


def postscript_follows_a_text(text, postscript_marker):
    marker = postscript_marker.strip()
    pattern = POSTSCRIPTS.get(marker, re.escape(marker.lower()))
    found = re.search(pattern, text.lower())
    if not found:
        return False
    lowered = text.lower()
    return has_word(lowered[: found.start()]) and has_word(lowered[found.end() :])


def bullets_hold_words(text, num_bullets):
    num_with_words = 0
    for line in text.split("\n"):
        bullet = re.match(r"[^\S\n]*(\*(?!\*)|-)", line)
        if bullet and has_word(line[bullet.end() :]):
            num_with_words += 1
    return num_with_words == num_bullets


def highlights_are_parts_of_a_text(text, num_highlights):
    # Stars in pairs, single or double. The same part again is no further one.
    found = re.findall(r"\*\*[^\n*]*\*\*|\*[^\n*]*\*", text)
    different = {part.strip("*").strip().lower() for part in found if has_word(part)}
    return len(different) >= num_highlights and has_words_besides(text, found)


def sections_are_passages(text, section_spliter, num_sections):
    pieces = re.split(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)
    # The text before the first heading is no section.
    return sum(is_passage(piece) for piece in pieces[1:]) >= num_sections


def json_holds_words(text):
    # A bare number or string is valid JSON, but no object or list.
    body = re.sub(r"(?i)^```(json)?", "", text.strip()).lstrip()
    return body[:1] in ("{", "[") and has_word(body)


def title_stands_over_a_text(text):
    found = titles(text)
    return any(has_word(title) for title in found) and has_words_besides(text, found)


def responses_are_passages(text):
    return all(is_passage(part) for part in text.split(SIX_STARS) if part.strip())


def answer_follows_the_prompt(text, prompt_to_repeat):
    answer = text.strip()[len(prompt_to_repeat.strip()) :]
    return has_word(answer) and not copies(answer, prompt_to_repeat)


def text_stands_before_the_end(text, end_phrase):
    body = text.strip().strip('"')
    return has_word(body[: -len(end_phrase.strip())])


def brackets_hold_words(text):
    return all(has_word(word) for word in text.split())


def bigrams_hold_words(text):
    words = text.split()
    return len(words) >= 2 and all(has_word(word) for word in words)


def sentences_hold_words(text, n_sent, n_words):
    for paragraph in re.split(THREE_STARS, text):
        if not all(has_word(sentence) for sentence in split_sentences(paragraph)):
            return False
    return True


def hyphens_join_two_sentences(text):
    sentences = split_sentences(text.replace("-", " "))
    return 2 <= len(sentences) == len(text.split("-"))


# ---- 6. The words of the instruction are meant [D37] ---------------------------------------------


def times(text, keyword):
    """How often a keyword stands in a text as it is written, not as a pattern."""
    return len(re.findall(re.escape(keyword.strip()), text, re.IGNORECASE))


def is_a_word_of(text, word):
    """Does a word stand in a text with no letter, digit or underscore at its sides?"""
    pattern = rf"(?<!\w){re.escape(word.strip())}(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def speaks_of_more(text, keywords):
    """Are there as many other words as keywords in a text?"""
    pattern = "|".join(re.escape(keyword.strip()) for keyword in keywords)
    rest, num_keywords = re.subn(pattern, " ", text, flags=re.IGNORECASE)
    return len(words_of(rest)) >= num_keywords


def means_keywords(text, keywords):
    all_are_there = all(times(text, keyword) for keyword in keywords)
    return all_are_there and speaks_of_more(text, keywords)


def means_keyword_times(text, keyword, frequency, relation):
    return compare(times(text, keyword), frequency, relation) and speaks_of_more(text, [keyword])


def means_keyword_once(text, keyword):
    return times(text, keyword) == 1 and speaks_of_more(text, [keyword])


def means_keywords_once_and_twice(text, keyword1, keyword2):
    counts = times(text, keyword1), times(text, keyword2)
    return counts == (1, 2) and speaks_of_more(text, [keyword1, keyword2])


def means_forbidden_words(text, forbidden_words):
    return not any(is_a_word_of(text, word) for word in forbidden_words)


def gives_one_fixed_answer(text):
    return len(set(re.findall(r"My answer is (yes|no|maybe)\.", text))) == 1


def changes_every_copy(text, phrase, small_n):
    """Exactly one word differs in each copy of the phrase, not in the last one alone."""
    phrase_words = phrase.split()
    for span in phrase_spans(text, phrase_words[0], phrase_words[-1]):
        if sum(a != b for a, b in zip(span.split(), phrase_words)) != 1:
            return False
    return True


def has_no_mark(text, name):
    """Is there no punctuation mark or symbol with a name like FULL STOP, in any script?"""
    for character in set(text):
        is_mark = unicodedata.category(character)[0] in "PS"
        if is_mark and name in unicodedata.name(character, ""):
            return False
    return True


def counts_lowercase_words_of_all_scripts(text, N):
    return sum(word.islower() for word in re.findall(r"\w+", text)) <= N


def counts_letters_of_all_scripts(text, N, relation):
    return compare(sum(map(str.isalpha, text)), N, relation)


def has_long_palindrome(text):
    # Every English text has "a" or "I".
    for word in set(words_of(text)):
        if len(word) >= 3 and len(set(word)) >= 2 and word == word[::-1]:
            return True
    return False


def tokens_are_unique_without_case(text):
    lowered = [token.lower() for token in tokens(text)]
    return len(set(lowered)) == len(lowered)


def start_and_end_are_words(text):
    # Another word stands between them.
    are_words = has_word(tokens(text)[0]) and has_word(tokens(text)[-1])
    return are_words and len(set(words_of(text))) >= 2


# What training asks besides the check of verifiers/constraints.py. Constraints that are not listed
# have the four general guards alone.
IN_EARNEST = {
    "keywords:existence": means_keywords,
    "keywords:frequency": means_keyword_times,
    "keywords:forbidden_words": means_forbidden_words,
    "language:response_language": is_told_in,
    "length_constraints:number_sentences": counts_sentences,
    "length_constraints:number_paragraphs": starred_paragraphs_are_passages,
    "length_constraints:number_words": counts_words,
    "length_constraints:nth_paragraph_first_word": paragraphs_hold_words,
    "detectable_content:number_placeholders": placeholders_have_names,
    "detectable_content:postscript": postscript_follows_a_text,
    "detectable_format:number_bullet_lists": bullets_hold_words,
    "detectable_format:constrained_response": gives_one_fixed_answer,
    "detectable_format:number_highlighted_sections": highlights_are_parts_of_a_text,
    "detectable_format:multiple_sections": sections_are_passages,
    "detectable_format:json_format": json_holds_words,
    "detectable_format:title": title_stands_over_a_text,
    "combination:two_responses": responses_are_passages,
    "combination:repeat_prompt": answer_follows_the_prompt,
    "startend:end_checker": text_stands_before_the_end,
    "change_case:english_capital": lambda text: is_told_in(text, "en"),
    "change_case:english_lowercase": lambda text: is_told_in(text, "en"),
    "punctuation:no_comma": lambda text: has_no_mark(text, "COMMA"),
    "copy:repeat_phrase": changes_every_copy,
    "detectable_format:sentence_hyphens": hyphens_join_two_sentences,
    "detectable_format:square_brackets": brackets_hold_words,
    "keywords:word_once": means_keyword_once,
    "keywords:word_count_different_numbers": means_keyword_times,
    "keywords:exclude_word_harder": lambda text, keyword: not is_a_word_of(text, keyword),
    "paragraphs:paragraphs": starred_paragraphs_are_passages,
    "paragraphs:paragraphs2": two_paragraphs_are_passages,
    "detectable_format:bigram_wrapping": bigrams_hold_words,
    "punctuation:punctuation_dot": lambda text: has_no_mark(text, "FULL STOP"),
    "punctuation:punctuation_exclamation": lambda text: has_no_mark(text, "EXCLAMATION MARK"),
    "count:lowercase_counting": counts_lowercase_words_of_all_scripts,
    "letters:letter_counting": counts_letters_of_all_scripts,
    "count:counting_composition": sentences_hold_words,
    "count:count_unique": tokens_are_unique_without_case,
    "count:count_increment_word": means_keywords_once_and_twice,
    "keywords:palindrome": has_long_palindrome,
    "keywords:start_end": start_and_end_are_words,
}
# id: (guard, names of its arguments in the guard's order)
GUARDS = {name: (guard, argument_names(guard)) for name, guard in IN_EARNEST.items()}


# ---- 7. The verdict ------------------------------------------------------------------------------
# These say what the text is, so it may repeat itself, copy the prompt, or hold no word.
TEXT_IS_GIVEN = {
    "copy:repeat_phrase",
    "copy:copy",
    "copy:copying_simple",
    "copy:copying_multiple",
    "new:copy_span_idx",
}


def objection(instruction_ids, kwargs, text, prompt=""):
    """Why a reply that passes the references' rules earns nothing in training, or None.

    prompt: the text that the reply answers; "" where nobody knows it.
    """
    seen = as_seen(text)
    if not TEXT_IS_GIVEN.intersection(instruction_ids):
        if not has_word(seen):
            return "no word"
        if repeats_itself(seen):
            return "repeats itself"
        # Who has to repeat the prompt copies it: the answer behind it is judged in IN_EARNEST.
        if "combination:repeat_prompt" not in instruction_ids and copies(seen, prompt):
            return "copy of the prompt"
    for instruction_id, arguments in zip(instruction_ids, kwargs, strict=True):
        # Indices of characters are those of the prompt as it is written.
        if instruction_id == "new:copy_span_idx":
            continue
        arguments = arguments_as_seen(arguments)
        # The check again, on what a reader sees.
        if seen != text and not check(instruction_id, arguments, seen):
            return f"{instruction_id}: only by what nobody sees"
        if not is_meant(instruction_id, arguments, seen):
            return f"{instruction_id}: by the letter"
    return None


def arguments_as_seen(kwargs):
    """Arguments with their texts as a reader sees them."""
    result = {}
    for name, value in clean_kwargs(kwargs).items():
        if isinstance(value, str):
            value = as_seen(value)
        elif isinstance(value, list):
            value = [as_seen(item) if isinstance(item, str) else item for item in value]
        result[name] = value
    return result


def is_meant(instruction_id, kwargs, text):
    """Does the constraint's own guard, if it has one, let a text pass? One that raises does not."""
    if instruction_id not in GUARDS:
        return instruction_id in CHECKS
    guard, names = GUARDS[instruction_id]
    try:
        return bool(guard(text, *[kwargs[name] for name in names]))
    except Exception:  # noqa: BLE001
        return False
