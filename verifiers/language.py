"""Does a response keep to the language of its prompt? A test on Unicode scripts."""

import unicodedata


def language_ok(prompt, response):
    """False if response has letters of a script that prompt does not use; Latin, Greek and symbols are always fine."""

    def scripts(text):
        letters = (
            c for c in set(text) if ord(c) > 127 and c.isalpha() and not 0x2070 <= ord(c) < 0x2190
        )
        names = {unicodedata.name(c, "UNNAMED").split()[0].split("-")[0] for c in letters}
        return names - {
            "LATIN",
            "GREEK",
            "MATHEMATICAL",
            "MODIFIER",
            "FULLWIDTH",
            "MICRO",
            "FEMININE",
            "MASCULINE",
        }

    return scripts(response) <= scripts(prompt)
