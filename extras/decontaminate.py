"""Remove the rows of a training set that share 9 words in a row with a held-out set (paper 3.2).

    python -m extras.decontaminate --data=nvidia/Nemotron-Cascade-RL-Math \\
        --eval_data=HuggingFaceH4/MATH-500,math-ai/aime25 --out=out/math_clean.jsonl

Prints how many rows were removed, and the first of these.
"""

import collections
import dataclasses
import json
import os
import re

from lib.common import print0
from lib.data import data_files, read_file, read_rows
from lib.flags import PositiveInt, parse_config

# The fields that hold a question, in the schemas of all stages. Answers are not compared.
QUESTION_FIELDS = (
    "problem",
    "question",
    "prompt",
    "messages",
    "conversation",
    "input",
    "description",
    "problem_statement",
    "original_prompt",
)


@dataclasses.dataclass
class Decontamination:
    data: str = ""  # training set, of any size: it is streamed
    eval_data: str = ""  # held-out sets, joined by commas
    out: str = ""  # .jsonl of the rows that are left
    n: PositiveInt = 9  # words in a row; paper 3.2 and 4.5.1


def question_texts(row):
    """The texts of a row's questions: whole fields, and the user turns of chats."""
    fields = dict(row)
    # NVIDIA's RL sets keep the prompt in an object inside the row.
    nested = row.get("responses_create_params")
    if isinstance(nested, dict):
        fields.update(nested)
    texts = []
    for name in QUESTION_FIELDS:
        value = fields.get(name)
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, list):
            texts += user_texts(value)
    return texts


def user_texts(turns):
    """The texts of the user turns of a chat."""
    texts = []
    for turn in turns:
        is_user = isinstance(turn, dict) and turn.get("role") == "user"
        if is_user and isinstance(turn.get("content"), str):
            texts.append(turn["content"])
    return texts


def ngrams(row, n):
    """The set of all runs of n words in a row's questions, in lower case, without punctuation.

    A text of fewer than n words is one gram by itself.
    """
    grams = set()
    for text in question_texts(row):
        words = re.findall(r"\w+", text.lower())
        if not words:
            continue
        num_grams = max(len(words) - n + 1, 1)
        grams.update(" ".join(words[i : i + n]) for i in range(num_grams))
    return grams


def decontaminate(rows, held_out, n=9, template=10):
    """Yield (where, row, gram) of each (where, row): n words shared with a held-out row, or "".

    A gram of more than `template` held-out rows is the wording around the problems, like "put your
    answer in a box", and counts as no match.
    """
    num_rows_with = collections.Counter()
    for _, row in held_out:
        num_rows_with.update(ngrams(row, n))
    held_out_grams = {gram for gram, count in num_rows_with.items() if count <= template}
    for where, row in rows:
        shared = ngrams(row, n) & held_out_grams
        yield where, row, min(shared, default="")


def write_decontaminated(cfg):
    """Write the rows of cfg.data that share no n-gram with cfg.eval_data, and print the count."""
    held_out = read_rows(cfg.eval_data)
    rows = ((where, row) for file in data_files(cfg.data) for where, row, _ in read_file(file))
    removed = []  # (where, gram)
    total = 0
    with open(cfg.out + ".tmp", "w") as f:
        for where, row, gram in decontaminate(rows, held_out, cfg.n):
            total += 1
            if gram:
                removed.append((where, gram))
            else:
                f.write(json.dumps(row) + "\n")
    os.rename(cfg.out + ".tmp", cfg.out)

    first = ""
    if removed:
        where, gram = removed[0]
        first = f' (first: {where}, "{gram}")'
    print0(
        f"data {cfg.data}: removed {len(removed)} of {total} rows that share {cfg.n} words in a "
        f"row with one of {len(held_out)} held-out rows{first}"
    )


if __name__ == "__main__":
    write_decontaminated(parse_config(Decontamination))
