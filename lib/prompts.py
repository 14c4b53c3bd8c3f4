"""The prompts of an RL stage: encoded once, dealt out in epochs, samples spread over the ranks.

Which prompts a step takes is a function of the seed, the step and what a checkpoint stores
(`state`), so a resumed run takes the prompts that a straight run takes.
"""

import json
import operator
import os
import statistics
import zlib

import numpy as np

from lib.common import all_gather, print0
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


def interleaved(lists):
    """The items of several lists in one list, in which each of them is spread evenly."""
    places = []
    for items in lists:
        # Item k of n stands at (k + 1/2) / n of the whole.
        places += [((k + 0.5) / len(items), item) for k, item in enumerate(items)]
    places.sort(key=operator.itemgetter(0))  # stable: equal places keep the order of the lists
    return [item for _, item in places]


def check_same_rows(checksum, state, resume, cfg):
    """End the run if its prompts are not those of every rank and of the checkpoint it goes on from.

    checksum: prompts_checksum of this rank. A new run keeps it in `state`.
    """
    trained_on = state.setdefault("data", checksum)
    checksums = set(all_gather(checksum))
    if len(checksums) > 1:
        fail(f"data {cfg.data}: the rows are not the same on every rank.")
    if checksums != {trained_on}:
        fail(f"data {cfg.data}: the rows are not those that {resume} was trained on.")


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


def longest_first(rollouts, state):
    """Rollouts in the order in which to sample them: prompts with long answers last time first.

    The longest decides when a step's sampling is over, so it must not start late. A prompt without
    a past stands where the average one does.
    """
    lengths = state.get("lengths", {})
    average = statistics.fmean(lengths.values()) if lengths else 0.0

    def length_last_time(r):
        return lengths.get(str(r.row.get("index")), average)

    return sorted(rollouts, key=length_last_time, reverse=True)


def remember(groups, state):
    """Note in `state` what the next steps need to know of this one. groups: from whole_groups.

    history: {row: [num_correct, num_rollouts]} of the rollouts in the loss, for select_rows.
    lengths: {row: tokens of a completion, on average}, for longest_first.
    flat: the share of groups without a gradient, for the dynamic sampling of IF-RL.
    The rows are strings, as they come back from a checkpoint's JSON.
    """
    state["history"] |= count_correct(groups)
    lengths, advantages = {}, {}
    for r in groups:
        lengths.setdefault(str(r.row["index"]), []).append(len(r.completion_ids))
        advantages.setdefault(r.group, []).append(r.advantage)
    state.setdefault("lengths", {})
    state["lengths"] |= {row: statistics.fmean(of_row) for row, of_row in lengths.items()}
    num_flat = sum(not any(of_group) for of_group in advantages.values())
    state["flat"] = num_flat / max(len(advantages), 1)


def count_correct(rollouts):
    """{row index as a string: [num_correct, num_rollouts]} over the rollouts in the loss."""
    counts = {}
    for r in rollouts:
        if r.in_loss:
            correct, total = counts.get(str(r.row["index"]), (0, 0))
            counts[str(r.row["index"])] = [correct + (r.status == "ok"), total + 1]
    return counts


def load_history(folder, data):
    """{"history", "epoch", "lengths"} of the run that wrote this checkpoint, or {}.

    So the epoch filter of paper 4.5.2 goes on over the length stages of Math RL. data:
    prompts_checksum; a run with other prompts passes nothing on.
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
    return {name: state[name] for name in ("history", "epoch", "lengths") if name in state}
