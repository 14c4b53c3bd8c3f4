"""The prompts of an RL stage: encoded once, dealt out in epochs, and how often each was solved.

Which prompts a step takes is a function of the seed, the step and what a checkpoint stores
(`state`), so a resumed run takes the prompts that a straight run takes.
"""

import json
import os
import zlib

import numpy as np

from lib.common import print0
from lib.guard import fail, one_sentence
from model import NO_THINK, THINK, render_chat


def encode_prompts(rows, tokenizer, cfg):
    """Rows with "prompt_ids", "think" and "index"; prompts over cfg.max_prompt_tokens are
    dropped."""
    intern = {}  # share int objects: 8 bytes a token instead of 36
    for row in rows:
        # "/think" or "/no_think" typed at the end of a prompt overrides the row's mode, and the
        # verifier has to know the mode.
        asked = row["messages"][-1]["content"].strip()
        if asked.endswith(THINK):
            row["think"] = True
        elif asked.endswith(NO_THINK):
            row["think"] = False
        ids, _ = render_chat(tokenizer, row["messages"], row["think"])
        row["prompt_ids"] = [intern.setdefault(token, token) for token in ids]
    kept = [row for row in rows if len(row["prompt_ids"]) <= cfg.max_prompt_tokens]
    if not kept:
        fail(f"data: every prompt is longer than max_prompt_tokens={cfg.max_prompt_tokens}.")
    if len(kept) < len(rows):
        dropped = len(rows) - len(kept)
        print0(
            f"data: dropped {dropped} of {len(rows)} rows, "
            f"prompt over {cfg.max_prompt_tokens} tokens"
        )
    for index, row in enumerate(kept):
        row["index"] = index
    return kept


def prompts_checksum(rows):
    """CRC of all prompts in their order: equal on every rank, and before and after a resume."""
    crc = 0
    for row in rows:
        crc = zlib.crc32(repr(row["prompt_ids"]).encode(), crc)
    return crc


def shuffled(items, seed, epoch):
    """The items in a random order, which is another one in every epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(len(items))
    return [items[i] for i in order]


def next_prompts(rows, state, cfg, select_rows):
    """Row indices of the next step; moves the position in `state` on.

    An epoch is a walk through the pool that select_rows picks for it, in the order that it gives.
    A step that reaches the end of an epoch goes on in the next one.
    """
    chosen = []
    while len(chosen) < cfg.prompts_per_step:
        if state["position"] >= len(state["pool"]):
            epoch = state["epoch"]
            history = {int(index): counts for index, counts in state["history"].items()}
            state["pool"] = select_rows(rows, epoch, history, cfg)
            state["position"] = 0
            state["epoch"] = epoch + 1
        missing = cfg.prompts_per_step - len(chosen)
        taken = state["pool"][state["position"] :][:missing]
        state["position"] += len(taken)
        chosen += taken
    return chosen


def count_correct(rollouts):
    """{row index: [num_correct, num_rollouts]} of one rank, over the rollouts in the loss.

    The indices are strings, as they come back from a checkpoint's JSON.
    """
    counts = {}
    for r in rollouts:
        if r.in_loss:
            correct, total = counts.get(str(r.row["index"]), (0, 0))
            counts[str(r.row["index"])] = [correct + (r.status == "ok"), total + 1]
    return counts


def load_history(folder, data):
    """{"history", "epoch"} of the run that wrote this checkpoint, or {} if it had other prompts.

    So the epoch filter of paper 4.5.2 goes on over the length stages of Math RL. data:
    prompts_checksum.
    """
    path = os.path.join(folder, "run.json")
    state = {}
    with one_sentence(f"--init_from={folder}: run.json cannot be read"):
        if os.path.exists(path):
            with open(path) as f:
                state = json.load(f)["state"]
    if state.get("data") != data or not state.get("history"):
        return {}
    print0(
        f"{folder}: same prompts, so the epoch filter goes on "
        f"with what it knows of {len(state['history'])} of them"
    )
    return {"history": state["history"], "epoch": state["epoch"]}
