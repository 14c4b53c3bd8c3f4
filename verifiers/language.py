"""Does a response keep to the language of its prompt? A test on Unicode scripts."""

import unicodedata

# First words of Unicode character names that are allowed in any response: the Latin and Greek
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


def language_ok(prompt, response):
    """False if the response has letters of a script that the prompt does not use.

    Latin, Greek and symbols are always fine.
    """
    return scripts(response) <= scripts(prompt)


def scripts(text):
    """The scripts of a text beyond those always allowed, for instance {"CYRILLIC", "CJK"}.

    A script is named by the first word of its letters' Unicode names.
    """
    found = set()
    for character in set(text):
        if ord(character) <= 127 or not character.isalpha():
            continue
        # Superscripts, subscripts, letterlike symbols and number forms.
        if 0x2070 <= ord(character) < 0x2190:
            continue
        # "CJK UNIFIED IDEOGRAPH-4E00" gives CJK. "KATAKANA-HIRAGANA PROLONGED SOUND MARK" gives
        # KATAKANA.
        first_word = unicodedata.name(character, "UNNAMED").split()[0]
        found.add(first_word.split("-")[0])
    return found - ALWAYS_ALLOWED
