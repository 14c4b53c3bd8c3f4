"""Removes the rows of a training set that share 9 words in a row with a held-out set (paper 3.2).

    python -m extras.decontaminate --data=nvidia/Nemotron-Cascade-RL-Math \\
        --eval_data=HuggingFaceH4/MATH-500,math-ai/aime25 --out=out/math_clean.jsonl

Prints how many were removed, and the first of them.
"""

import collections
import dataclasses
import json
import os
import re

from lib.common import print0
from lib.data import data_files, read_file, read_rows
from lib.flags import parse_config

ASKED = (
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


def ngrams(row, n):
    """{n words in a row, lower-case, without punctuation} of what a row asks, answers left out; a shorter text is one gram by itself."""
    nested = row.get("responses_create_params")
    texts = [
        v for k, v in {**row, **(nested if isinstance(nested, dict) else {})}.items() if k in ASKED
    ]
    turns = [
        m
        for v in texts
        if isinstance(v, list)
        for m in v
        if isinstance(m, dict) and m.get("role") == "user"
    ]
    grams = set()
    for text in [v for v in texts if isinstance(v, str)] + [
        m["content"] for m in turns if isinstance(m.get("content"), str)
    ]:
        words = re.findall(r"\w+", text.lower())
        grams |= (
            {" ".join(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}
            if words
            else set()
        )
    return grams


def decontaminate(rows, held_out, n=9, template=10):
    """Yields (where, row, gram): gram is "" or n words that the row shares with a held-out row. Grams of more than `template` held-out
    rows are the wording around the problems, and no match."""
    counts = collections.Counter(gram for _, row in held_out for gram in ngrams(row, n))
    known = {gram for gram, rows_with_it in counts.items() if rows_with_it <= template}
    for where, row in rows:
        yield where, row, min(ngrams(row, n) & known, default="")


@dataclasses.dataclass
class Decontamination:
    data: str = ""  # training set, of any size: it is streamed
    eval_data: str = ""  # held-out sets, joined by commas
    out: str = ""  # .jsonl of the rows that are left
    n: int = 9  # words in a row; paper 3.2 and 4.5.1


def write_decontaminated(cfg):
    """Writes the rows of cfg.data that share no n-gram with cfg.eval_data, and prints how many did, with the first of them."""
    held_out, shared, total = read_rows(cfg.eval_data), [], 0
    rows = ((where, row) for file in data_files(cfg.data) for where, row, _ in read_file(file))
    with open(cfg.out + ".tmp", "w") as f:
        for total, (where, row, gram) in enumerate(decontaminate(rows, held_out, cfg.n), 1):
            if gram:
                shared.append((where, gram))
            else:
                f.write(json.dumps(row) + "\n")
    os.rename(cfg.out + ".tmp", cfg.out)
    first = f' (first: {shared[0][0]}, "{shared[0][1]}")' if shared else ""
    print0(
        f"data {cfg.data}: removed {len(shared)} of {total} rows that share {cfg.n} words in a row with one of {len(held_out)} held-out rows{first}"
    )


if __name__ == "__main__":
    write_decontaminated(parse_config(Decontamination))
