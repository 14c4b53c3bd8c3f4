"""--check: what a run would do, shown before its first step; and the end of a stage that is done.

A run that fails after hours mostly does so for what could be seen at once: prompts that are not
what they were meant to be, a disk that is too small. When end_before_training is called, a stage
has loaded data, verifier and model, printed its plan of memory and time, and run its self test.
"""

import os
import shutil

from lib.checkpoint import mark_final, read_run_json
from lib.common import print0

SHOWN = 10  # prompts
HEAD, TAIL = 600, 400  # characters of a prompt


def end_before_training(rows, tokenizer, model, cfg, resume):
    """What main does instead of training: with --check a report, else a line that it is done.

    rows: the prompts of an RL stage ({"prompt_ids", "think", ...}), or the samples of the first SFT
    step ((ids, mask, category)). resume: the checkpoint that the run goes on from, or "".
    """
    if not cfg.check:
        step = read_run_json(resume)["step"]
        print0(f"{cfg.out_dir}: done, {resume} is step {step} of --num_steps={cfg.num_steps}")
        mark_final(cfg.out_dir, resume)
        return
    # From all over the set, as a set is often sorted.
    count = min(SHOWN, len(rows))
    for i in range(count):
        show(rows, i * len(rows) // count, tokenizer)
    print0(cost_of_data(rows, cfg))
    print0(cost_of_disk(model, cfg))
    print0("check: everything loads and the self test passes. Nothing was trained.")


def show(rows, index, tokenizer):
    """Print a row as the model reads it, special tokens and mode included; of an SFT sample also
    what is trained."""
    ids, mode = ids_of(rows[index]), ""
    if isinstance(rows[index], dict):
        mode = ", think" if rows[index]["think"] else ", no_think"
    text = clip(tokenizer.decode(ids, skip_special_tokens=False))
    print0(f"--- {index + 1} of {len(rows)}: {len(ids):,} tokens{mode} ---\n{text}")
    if not mode:
        _, mask, _ = rows[index]
        trained = [token for token, on in zip(ids, mask, strict=True) if on]
        text = clip(tokenizer.decode(trained, skip_special_tokens=False))
        print0(f"--- of these {len(trained):,} are trained ---\n{text}")


def ids_of(row):
    """The token ids of a prompt, or of an SFT sample."""
    return row["prompt_ids"] if isinstance(row, dict) else list(row[0])


def clip(text):
    """A text without its middle, where it is long."""
    if len(text) <= HEAD + TAIL:
        return text
    left_out = len(text) - HEAD - TAIL
    return f"{text[:HEAD]}\n[... {left_out:,} characters ...]\n{text[-TAIL:]}"


def cost_of_data(rows, cfg):
    """A line: tokens of the rows, what a step takes of them, and how often a run sees them."""
    lengths = [len(ids_of(row)) for row in rows]
    mean = sum(lengths) / len(lengths)
    if not isinstance(rows[0], dict):
        return (
            f"check: a step trains on {len(rows):,} conversations; those of the first have "
            f"{mean:,.0f} tokens, {max(lengths):,} at most, {sum(lengths):,} together"
        )
    completions = cfg.prompts_per_step * cfg.group_size
    epochs = cfg.num_steps * cfg.prompts_per_step / len(rows)
    return (
        f"check: a step samples {cfg.prompts_per_step} x {cfg.group_size} completions, at most "
        f"{completions * cfg.max_new_tokens:,} tokens; a prompt has {mean:,.0f} tokens, "
        f"{max(lengths):,} at most; {cfg.num_steps} steps see the {len(rows):,} prompts "
        f"{epochs:.2g} times"
    )


def cost_of_disk(model, cfg):
    """A line: what checkpoints take of the disk, and what is free."""
    # The weights, and the two moments of AdamW of those that train.
    num_bytes = 0
    for p in model.parameters():
        num_tensors = 3 if p.requires_grad else 1
        num_bytes += num_tensors * p.numel() * p.element_size()
    checkpoint = num_bytes / 1e9
    # The two newest, the best one, and one that is being written.
    copies = 4
    free = shutil.disk_usage(cfg.out_dir).free / 1e9
    too_small = ": not enough" if copies * checkpoint > free else ""
    return (
        f"check: a checkpoint has about {checkpoint:.2g} GB, and up to {copies} are on the disk "
        f"at a time; {free:.3g} GB are free at {os.path.abspath(cfg.out_dir)}{too_small}"
    )
