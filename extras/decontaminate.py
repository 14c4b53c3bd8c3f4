"""Remove the rows of a training set that share 9 words in a row with a held-out set (paper 3.2).

    python -m extras.decontaminate --data=nvidia/Nemotron-Cascade-RL-Math \\
        --eval_data=HuggingFaceH4/MATH-500,math-ai/aime25 --out=out/math_clean.jsonl

Prints how many rows were removed, the first of these, and how many rows ask nothing that could be
compared. A set of which no row does ends the run: "removed 0" would be a false all-clear.
"""

import collections
import dataclasses
import json
import os
import re
import unicodedata

from lib.chats import CHATS, ROLE_NAMES, split_text, text_of_part
from lib.common import print0
from lib.data import iterate_rows, read_rows
from lib.flags import PositiveInt, parse_config
from lib.guard import fail

# The fields that hold a question, in the schemas of all stages. Answers are not compared.
QUESTION_FIELDS = (
    "problem",
    "question",
    "prompt",
    "query",
    "statement",
    "description",
    "problem_description",
    "problem_statement",
    "original_prompt",
    *CHATS,
    "conversation_a",
    "context",
)
# Read where none of these has a text: sets for pre-training have whole pages in `text`, and a
# preference row repeats its question in front of the answer.
LAST_FIELDS = ("input", "text", "chosen")
# Scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, Japanese, Chinese. Each
# character is a token. The marks above and below letters are parts of their words.
SPACELESS = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
TOKEN = re.compile(rf"[{SPACELESS}]|(?:(?![{SPACELESS}])[\w\u0300-\u036f\u0900-\u0dff])+")
IS_SPACELESS = re.compile(f"[{SPACELESS}]")


@dataclasses.dataclass
class Decontamination:
    data: str = ""  # training set, of any size: it is streamed
    eval_data: str = ""  # held-out sets, joined by commas
    out: str = ""  # .jsonl of the rows that are left
    n: PositiveInt = 9  # words in a row; paper 3.2 and 4.5.1


def question_texts(row):
    """The texts of a row's questions: whole fields, and the user turns of chats."""
    if not isinstance(row, dict):
        return []
    fields = dict(row)
    # NVIDIA's RL sets keep the prompt in an object inside the row.
    nested = row.get("responses_create_params")
    if isinstance(nested, dict):
        fields.update(nested)
    fields = {str(name).lower(): value for name, value in fields.items()}
    # Alpaca's instruction asks nothing without its input.
    if fields.get("instruction"):
        parts = [fields["instruction"], fields.get("input") or fields.get("context") or ""]
        return asked_texts("\n".join(map(str, parts)))
    texts = []
    for name in QUESTION_FIELDS:
        texts += asked_texts(fields.get(name))
    for name in LAST_FIELDS:
        if not texts:
            texts += asked_texts(fields.get(name), may_be_answer=name == "chosen")
    return texts


def asked_texts(value, may_be_answer=False):
    """What a field asks: its text, or the user turns of its chat.

    may_be_answer: a text that is no chat is an answer.
    """
    if isinstance(value, str):
        turns = turns_in(value)
        if not turns:
            return [value] if tokens_of(value) and not may_be_answer else []
        value = turns
    texts = []
    for turn in value if isinstance(value, list) else []:
        if isinstance(turn, dict):
            role = turn.get("role") or turn.get("from")
            content = turn.get("content") or turn.get("value") or turn.get("text")
            parts = content if isinstance(content, list) else [content]
            if ROLE_NAMES.get(role, role) == "user":
                texts += [text for text in map(text_of_part, parts) if text and tokens_of(text)]
    return texts


def turns_in(text):
    """The turns of a chat that is one text: JSON, as a .csv has it, or with marks; else []."""
    if text.lstrip().startswith("[{"):
        try:
            return json.loads(text)
        except ValueError:
            return []
    return split_text(text)


def tokens_of(text):
    """The words of a text, in one form of each letter, in lower case and without punctuation."""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(tokens, n):
    """Yield all runs of n words. A character of a script without spaces counts as half a word."""
    halves = [1 if IS_SPACELESS.match(token) else 2 for token in tokens]
    end, length = 0, 0
    for start in range(len(tokens)):
        # Each run is the shortest from its start on, so it does not depend on what surrounds it.
        while length < 2 * n and end < len(tokens):
            length += halves[end]
            end += 1
        if length < 2 * n:
            return
        yield " ".join(tokens[start:end])
        length -= halves[start]


def compared(row, n):
    """(whole questions, runs of n words) of a row, as two sets of texts."""
    wholes, grams = set(), set()
    for text in question_texts(row):
        tokens = tokens_of(text)
        wholes.add(" ".join(tokens))
        grams.update(ngrams(tokens, n))
    return wholes, grams


def decontaminate(rows, held_out, n=9, template=10):
    """Yield (where, row, shared) of each (where, row): what it shares with a held-out row, or "".

    It shares a whole question, or n words in a row. Words of more than `template` held-out rows are
    the wording around the problems, like "put your answer in a box", and count as no match.
    shared is None if the row asks nothing that could be compared.
    """
    held_out_wholes = set()
    num_rows_with = collections.Counter()
    for _, row in held_out:
        wholes, grams = compared(row, n)
        held_out_wholes |= wholes
        num_rows_with.update(grams)
    held_out_grams = {gram for gram, count in num_rows_with.items() if count <= template}
    for where, row in rows:
        wholes, grams = compared(row, n)
        shared = (grams & held_out_grams) or (wholes & held_out_wholes)
        yield where, row, min(shared, default="") if wholes else None


def write_decontaminated(cfg):
    """Write the rows of cfg.data that share nothing with cfg.eval_data, and print the counts."""
    held_out = read_rows(cfg.eval_data)
    silent = [(where, row) for where, row in held_out if not question_texts(row)]
    say_silent(silent, len(held_out), cfg.eval_data, "cannot be found in the training set")

    removed = []  # (where, what is shared)
    silent = []  # (where, row) of those that ask nothing
    total = 0
    with open(cfg.out + ".tmp", "w") as f:
        for where, row, shared in decontaminate(iterate_rows(cfg.data), held_out, cfg.n):
            total += 1
            if shared:
                removed.append((where, shared))
                continue
            if shared is None:
                silent.append((where, row if not silent else None))
            # What JSON does not have, like a date of a parquet file, is written as text.
            f.write(json.dumps(row, default=str) + "\n")
    if len(silent) == total:
        os.remove(cfg.out + ".tmp")
    say_silent(silent, total, cfg.data, "are kept")
    os.rename(cfg.out + ".tmp", cfg.out)

    first = ""
    if removed:
        where, shared = removed[0]
        shown = shared[:200].encode(errors="replace").decode()
        first = f' (first: {where}, "{shown}")'
    print0(
        f"data {cfg.data}: removed {len(removed)} of {total} rows that share {cfg.n} words in a "
        f"row with one of {len(held_out)} held-out rows{first}"
    )


def say_silent(silent, total, path, consequence):
    """Print how many of the rows ask nothing that could be compared. If all do, the run ends."""
    if not silent and total:
        return
    fields = ""
    if silent:
        where, row = silent[0]
        names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        fields = f" (first: {where}, has: {names})"
    if len(silent) == total:
        note = "Nothing was compared."
        fail(f"data {path}: none of {total} rows asks anything in a known field{fields}.", note)
    print0(f"data {path}: {len(silent)} of {total} rows ask nothing and {consequence}{fields}")


if __name__ == "__main__":
    write_decontaminated(parse_config(Decontamination))
