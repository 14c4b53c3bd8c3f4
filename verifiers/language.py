"""Does a response mix languages although its prompt is purely English? A test on letters. [D1]

The paper punishes mixed language (4.3.2, 4.5.2, 4.6.2). It needs no language model to see most of
it: a policy that drifts writes letters of another script. But honest answers have such letters too:
a translation that was asked for, a name in its own script, a quoted text, a string in a program.
So the rule asks two questions. Is the prompt purely English, in its letters and in what it asks
for? And are the foreign letters more than names and quotations are?
"""

import re
import unicodedata
from collections import Counter

# First words of Unicode character names that are no sign of another language: the Latin and Greek
# scripts, and letters that serve as symbols.
ALWAYS_ALLOWED = {
    "LATIN",
    "GREEK",
    "MATHEMATICAL",
    "MODIFIER",
    "FULLWIDTH",
    "MICRO",
    "FEMININE",
    "MASCULINE",
}

# Beginnings of words for a language, a people, a country or a script that does not write Latin
# letters. Most also begin the word that other European languages have ("chinois", "chinesisch").
# A script with a Unicode name, like "Tamil", needs no entry: `names_other_language` knows it.
OTHER_LANGUAGES = re.compile(
    r"""\b(?:
    afghan | amhar | arab(?:s?\b|[ei](?!l)|isch|o\b) | aramaic | azerb | bangla | belarus |
    bihar | bulgar | burm[ae] | cambod | canton | chin(?:a\b|ese|es[aeio]\b|o[is]|o\b) | cina\b |
    cines[ei]\b | cyrill | kyrill | cor[e\u00e9]e?[an] | cuneiform | dari\b | dzongkha | egypt |
    eritre | ethiop | emoticon | farsi | furigana | giappon | gujarat | hanja | hangeul | hanyu |
    hanzi | h[e\u00e9]br | ebraic | hieroglyph | hindi\b | hindu | hong\ kong | india\b |
    indian\b | iran | iraq | islam | israel | japan | japon | jew(?!el) | kaomoji | kana\b |
    kanji | kazakh | kore[ai] | koran | kurd | kirg | kyrg | lao\b | laos\b | macedon | mandarin |
    maldiv | manchu | marathi | mongol | muslim | myanmar | nepal | oriya | pakistan | pashto |
    persia | persisch | pinyin | punjab | qu?r'?an | romaji | rus[aoi]\b | russ(?:i|k|o|es?\b) |
    sanskrit | serb | sindhi | slavic | slavonic | soviet | sri\ lanka | taiwan | tajik | talmud |
    tatar | tigrin | torah | ukrain | uighur | uyghur | urdu | vedic | yiddish | zhong
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# Words by which a prompt asks for other languages without a name.
ANY_LANGUAGE = re.compile(
    r"""\b(?:
    (?<!programming\ )languages\b | multiling | polyglot | unicode | utf-?8 | i18n |
    internationali[sz] | locali[sz]ation | non-(?:english | latin | ascii) | writing\ systems? |
    (?:another | any | different | foreign | local | mother | native | original | other | random)
    \ (?:language | tongue | script | alphabet | spelling)
    )""",
    re.IGNORECASE | re.VERBOSE,
)

# Places where English text shows foreign words as such: code, quotation marks, brackets, emphasis,
# quoted lines and rows of tables. All but the first end on the line on which they begin.
CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
SHOWN = re.compile(
    r"""
    `[^`\n]+`
    | "[^"\n]{1,200}" | \u201c[^\u201d\n]{1,200}\u201d
    | \u201e[^\u201c\u201d\n]{1,200}[\u201c\u201d]
    | (?<!\w)'[^'\n]{1,200}'(?!\w) | \u2018[^\u2019\n]{1,200}\u2019
    | \u00ab[^\u00bb\n]{1,200}\u00bb | \u300c[^\u300d\n]{1,200}\u300d
    | \u300e[^\u300f\n]{1,200}\u300f | \u300a[^\u300b\n]{1,200}\u300b
    | \([^()\n]{1,100}\) | \[[^\[\]\n]{1,100}\] | \uff08[^\uff09\n]{1,100}\uff09
    | \*\*[^*\n]{1,100}\*\* | (?<![\w*])\*[^*\s][^*\n]{0,100}\*(?![\w*])
    | ^[ ]*>.*$ | ^[ ]*\|.*\|[ ]*$
    """,
    re.VERBOSE | re.MULTILINE,
)

# A passage of foreign letters, which stand as MARK: a Latin word or the end of the line ends it.
MARK = "\ue000"
PASSAGE = re.compile(f"{MARK}(?:[^\\w\\n]|[\\d_])*")

# Limits, in Latin letters. A wide character (Chinese, Japanese, Korean) says as much as 3 of them.
WIDE = 3
LONGEST_NAME = 30  # a longer passage is a sentence: "Fyodor Mikhailovich Dostoevsky" has 28
MOST_NAMES = 2  # more passages in the open, whose language nobody names, are a habit
WINDOW = 80  # characters before and after a passage in which its language may be named


def language_ok(prompt, response):
    """False if the prompt is purely English and the response mixes another language into it.

    Thinking and answer are judged by themselves: an answer in another language is no less foreign
    after a long thought in English.
    """
    if response.isascii():
        return True
    foreign = foreign_letters(response)
    if not foreign or foreign_letters(prompt) or names_other_language(prompt, foreign):
        return True
    return not any(is_mixed(part, foreign) for part in response.split("</think>"))


def foreign_letters(text):
    """The letters of a text that are neither Latin nor Greek nor symbols, as a set."""
    letters = set()
    for character in set(text):
        if ord(character) <= 127 or not character.isalpha():
            continue
        # Superscripts, subscripts, letterlike symbols and number forms.
        if 0x2070 <= ord(character) < 0x2190:
            continue
        if script(character) not in ALWAYS_ALLOWED:
            letters.add(character)
    return letters


def script(letter):
    """The script of a letter, by the first word of its Unicode name.

    "CJK UNIFIED IDEOGRAPH-4E00" gives CJK, "KATAKANA-HIRAGANA PROLONGED SOUND MARK" KATAKANA.
    """
    first_word = unicodedata.name(letter, "UNNAMED").split()[0]
    return first_word.split("-")[0]


def names_other_language(text, letters):
    """Whether a text names a language that does not write Latin letters, or the script of these."""
    if OTHER_LANGUAGES.search(text) or ANY_LANGUAGE.search(text):
        return True
    return any(re.search(rf"\b{name}", text, re.IGNORECASE) for name in set(map(script, letters)))


def is_mixed(text, foreign):
    """Whether the foreign letters of an English text are more than names and quotations."""
    open_text = SHOWN.sub(" ", CODE.sub(" ", text))
    all_letters = num_letters(text)

    # Share: most of the text is foreign. What is shown in quotes or code counts from a sentence on.
    num_open = num_letters(open_text, foreign)
    num_foreign = num_letters(text, foreign)
    if 2 * num_open > all_letters:
        return True
    if num_foreign > 2 * LONGEST_NAME and 2 * num_foreign > all_letters:
        return True

    # Passages in the open: one is too long for a name, or there are too many different ones.
    # A short one is honest where the text beside it names a language ("in Japanese: ...").
    unnamed = set()
    marked = open_text.translate(dict.fromkeys(map(ord, foreign), MARK))
    for match in PASSAGE.finditer(marked):
        start, end = match.span()
        passage = "".join(c for c in open_text[start:end] if c in foreign)
        if num_letters(passage) > LONGEST_NAME:
            return True
        beside = open_text[max(start - WINDOW, 0) : end + WINDOW]
        if not names_other_language(beside, passage):
            unnamed.add(passage)
        if len(unnamed) > MOST_NAMES:
            return True
    return False


def num_letters(text, among=None):
    """Number of letters of a text, or of those `among` a set; a wide one counts as three."""
    total = 0
    for character, count in Counter(text).items():
        if character.isalpha() if among is None else character in among:
            is_wide = unicodedata.east_asian_width(character) in ("W", "F")
            total += WIDE * count if is_wide else count
    return total
