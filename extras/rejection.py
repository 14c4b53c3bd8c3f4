"""Rejection sampling: a stage's own samples that its verifier passed, as rows for sft.py.

It is no stage of the paper, but a control of its RL stages (bench/control.sh): does a stage need
policy gradients, or is it enough to imitate what the verifier lets through? One round, as in
arXiv 2308.01825 and 2304.06767:

    samples = what the RL stage would have drawn if it had never updated its policy: from the
              checkpoint that it started from, on the same prompts, with the same flags
    kept    = the samples that the stage's verifier passes and sft.py can read, each different one
              of a prompt once
    sft.py  trains on them, from the same checkpoint

    torchrun --nproc_per_node=8 extras/rejection.py --like=out/toy/mathrl --out_dir=out/kept
    torchrun --nproc_per_node=8 sft.py --data=out/kept/rows.jsonl --init_from=... --out_dir=...

A sample passes if its status is ok and it ended by itself: all constraints hold, the answer is
right, all tests pass, the edits are the golden patch. The reward model of RLHF passes nobody. There
the best of a group is kept, by its raw score, if it closed its thinking and kept to the language of
the prompt (best-of-n).

out_dir gets rows.jsonl when all is sampled, and before it steps.jsonl, with the seconds, the counts
and the rows of every step. An interrupted run goes on where it was.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass

import torch

# The repository's root, since this script may be started by its path.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import sft
from engine import make_engine
from lib.checkpoint import lock, read_run_json
from lib.common import all_gather, finish, init_distributed, print0, whole_groups
from lib.data import BadRow
from lib.flags import parse_config
from lib.guard import fail, never_silent, one_sentence
from lib.prompts import encode_prompts, load_history, next_prompts, prompts_checksum, remember
from model import Qwen3, load_tokenizer


@dataclass
class Config:
    like: str = ""  # folder of a finished RL stage: its script, flags, prompts and first checkpoint
    out_dir: str = ""  # folder for the rows; not that of the SFT which follows
    num_steps: int = 0  # steps of sampling; 0: as many as the stage had
    engine: str = ""  # auto, torch or vllm; "": that of the stage


# ---- 1. The stage --------------------------------------------------------------------------------
def stage_of(cfg):
    """Return (module, its Config) of the run in cfg.like."""
    folder = os.path.join(cfg.like, "final")
    with one_sentence(f"--like={cfg.like}, a finished RL stage"):
        run = read_run_json(folder)
    script = os.path.basename(run["command"][0]).removesuffix(".py")
    module = importlib.import_module(script)
    if not hasattr(module, "make_reward"):
        fail(f"--like={cfg.like}: {script}.py has no verifier. Nothing was sampled.", note="")
    known = {field.name for field in dataclasses.fields(module.Config)}
    flags = {name: value for name, value in run["config"].items() if name in known}
    # Groups that replace flat ones are of use to an update only, and rollout does not return them.
    if "max_refill_rounds" in known:
        flags["max_refill_rounds"] = 0
    return module, module.Config(**flags)


# ---- 2. What is kept -----------------------------------------------------------------------------
def passed(rollouts, module):
    """Return this rank's rollouts that are worth imitating.

    rollouts: this rank's share of a step, verified. A group may be spread over the ranks.
    """
    fit = [r for r in whole_groups(rollouts) if r.status == "ok" and r.finish_reason == "stop"]
    if hasattr(module, "reward_model_path"):  # RLHF, or a copy of it
        # Best of n: the first one with the highest score of the reward model.
        best = {}
        for r in sorted(fit, key=lambda r: r.sample):
            if r.group not in best or r.score > best[r.group].score:
                best[r.group] = r
        fit = list(best.values())
    # The rollouts of other ranks are copies without a text.
    mine = {id(r) for r in rollouts}
    return [r for r in fit if id(r) in mine]


def sft_row(r, category):
    """Return a rollout as a conversation, a row of sft.py. Its thought stands in its reply."""
    reply = {"role": "assistant", "content": r.text}
    return {
        "messages": [*r.row["messages"], reply],
        "thinking": r.row["think"],
        "category": category,
        "index": r.row["index"],
        "sample": r.sample,
    }


def is_readable(row):
    """Whether sft.py takes a row. It refuses a stray </think>, which no verifier minds."""
    try:
        sft.normalize(row, "")
    except BadRow:
        return False
    return True


def unseen(rows, seen):
    """Return the rows whose prompt, mode and reply are new, and add them to `seen`."""
    new = []
    for row in rows:
        key = (row["index"], row["thinking"], row["messages"][-1]["content"])
        if key not in seen:
            seen.add(key)
            new.append(row)
    return new


# ---- 3. Files ------------------------------------------------------------------------------------
def read_lines(path):
    """Return the whole lines of a JSONL file; [] if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path) as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def write_lines(path, lines):
    """Write a JSONL file as a whole or not at all."""
    with open(path + ".tmp", "w") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    os.replace(path + ".tmp", path)


def read_steps(out_dir, state):
    """Return (lines of steps.jsonl, state) of the steps that are done; a new run has none.

    A step writes its line first and its state then, so a line without its state is of a step that
    was cut off.
    """
    saved = read_lines(os.path.join(out_dir, "state.json"))
    if not saved:
        return [], state
    lines = read_lines(os.path.join(out_dir, "steps.jsonl"))
    return [line for line in lines if line["step"] <= saved[0]["step"]], saved[0]["state"]


def report(steps, rows, cfg):
    """Print what was sampled, what share of it was kept, and what it cost."""
    num_sampled = sum(line["sampled"] for line in steps)
    num_passed = sum(line["passed"] for line in steps)
    seconds = sum(line["time/gen"] for line in steps)
    print0(
        f"{cfg.like} -> {cfg.out_dir}/rows.jsonl: {num_sampled} samples in {len(steps)} steps, "
        f"{num_passed} passed ({num_passed / num_sampled:.1%}), {len(rows)} of them kept, "
        f"{seconds:.1f} s of sampling and verifying"
    )


# ---- 4. main -------------------------------------------------------------------------------------
def main(cfg):
    lock(cfg.out_dir)
    rows_path = os.path.join(cfg.out_dir, "rows.jsonl")
    if os.path.exists(rows_path):
        print0(f"{rows_path} is there: nothing to do.")
        return
    module, stage_cfg = stage_of(cfg)
    category = module.__name__

    # A day, because ranks finish hours apart where answers are long.
    rank, world, device = init_distributed(stage_cfg.seed, 24 * 3600)
    never_silent()

    # Verifier and prompts of the stage; the policy that it started from, which stays as it is.
    reward_hook = module.make_reward(stage_cfg)
    rows = module.load_rows(stage_cfg)
    tokenizer = load_tokenizer(stage_cfg.init_from)
    rows = encode_prompts(rows, tokenizer, stage_cfg)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Qwen3.from_pretrained(
        stage_cfg.init_from, dtype=dtype, device=device, rope_factor=stage_cfg.rope_factor
    )
    engine = make_engine(cfg.engine or stage_cfg.engine, model, tokenizer)

    state = {"epoch": 0, "position": 0, "pool": [], "history": {}}
    state |= load_history(stage_cfg.init_from, prompts_checksum(rows))
    steps, state = read_steps(cfg.out_dir, state)
    seen, kept = set(), []
    for line in steps:
        kept += unseen(line["rows"], seen)
    if rank == 0:
        # What a step that was cut off has written goes.
        write_lines(os.path.join(cfg.out_dir, "steps.jsonl"), steps)

    for step in range(len(steps) + 1, (cfg.num_steps or stage_cfg.num_steps) + 1):
        # Sample and verify, as this step of the stage did.
        clock = time.time()
        indices = next_prompts(rows, state, stage_cfg, module.select_rows)
        _, sampled = module.rollout(
            engine, rows, indices, step, state, stage_cfg, reward_hook, rank, world
        )
        seconds = time.time() - clock
        everyone = whole_groups(sampled)
        remember(everyone, state)

        # Keep what passed, in the order of prompts and samples whatever the number of ranks.
        fit = passed(sampled, module)
        mine = [(r.group, r.sample, sft_row(r, category)) for r in fit]
        shares = [entry for share in all_gather(mine) for entry in share]
        shares.sort(key=lambda entry: entry[:2])
        readable = [row for _, _, row in shares if is_readable(row)]
        new = unseen(readable, seen)
        kept += new
        line = {"step": step, "time/gen": seconds, "sampled": len(everyone)}
        steps.append(line | {"passed": len(shares), "rows": new})
        if rank == 0:
            with open(os.path.join(cfg.out_dir, "steps.jsonl"), "a") as f:
                f.write(json.dumps(steps[-1]) + "\n")
            saved = {"step": step, "state": state}
            write_lines(os.path.join(cfg.out_dir, "state.json"), [saved])

    if not kept:
        fail(f"--like={cfg.like}: no sample passed.", note=f"See {cfg.out_dir}/steps.jsonl.")
    if rank == 0:
        write_lines(rows_path, kept)
    report(steps, kept, cfg)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
