"""One GRPO step in slow motion: every number from the prompt's tokens to the new log-probs.

    python extras/slow_motion.py --init_from=out/toy/sft2/final                    Math RL
    python extras/slow_motion.py --init_from=out/toy/sft2/final --stage=coderl     another stage

Runs one step of a stage with the stage's own functions (load_rows, make_reward, rollout,
compute_advantages, collate, grpo_loss, train_step), keeps what they return, and shows it in seven
steps: in the terminal, and as a page in out/slow_motion. The step trains a copy in memory on the
CPU; the checkpoint stays as it is. The settings are those of the toy (run_cascade.sh).
"""

import importlib
import os
import statistics
import sys
import time
from dataclasses import dataclass

import torch

# The repository: this script is started by its path.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine import TorchEngine
from extras.slow_motion_view import print_steps, write_page
from lib.common import finish
from lib.flags import PositiveInt, parse_config
from lib.guard import fail, one_sentence
from lib.optimizer import make_optimizer
from lib.packing import collate
from lib.prompts import encode_prompts, next_prompts
from model import Qwen3, load_tokenizer


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    stage: str = "mathrl"  # whose functions run: rlhf, ifrl, mathrl, coderl or swerl
    init_from: str = "out/toy/sft2/final"  # checkpoint that makes the step; it is only read
    data: str = ""  # prompts, as the stage reads them; "": the toy's, in the run of init_from
    rm: str = ""  # reward model of rlhf, folder or URL; "": the toy's, in the run of init_from
    group_size: PositiveInt = 6  # completions per prompt (G)
    prompts: PositiveInt = 2  # prompts of the step, so the number of groups
    max_new_tokens: PositiveInt = 96  # a completion is cut off there, as in the toy
    lr: float = 0.0  # learning rate of AdamW; 0: the toy's of the stage
    seed: int = 0  # which prompts are taken, and what is sampled
    out: str = ""  # the page; "": out/slow_motion/STAGE.html


# What the toy sets in a stage (run_cascade.sh), beside what all stages share.
TOY = {
    "rlhf": {"lr": 3e-4, "kl_coef": 0.1, "shape_reward": True},
    "ifrl": {"lr": 3e-4, "max_refill_rounds": 1},
    "mathrl": {"lr": 6e-4},
    "coderl": {"lr": 5e-4, "memory_mb": 1024},
    "swerl": {
        "lr": 3e-4,
        "min_prompt_tokens": 0,
        "lexical_floor": 0.98,
        "overlong_filter": False,
    },
}
SKILL = {"rlhf": "chat", "ifrl": "if", "mathrl": "math", "coderl": "code", "swerl": "swe"}


def stage_config(stage, cfg):
    """The stage's Config with the flags of the toy (run_cascade.sh)."""
    # init_from is RUN/STAGE/final, and the toy's files lie in RUN/data and RUN/rlhf/rm.
    run_folder = os.path.dirname(os.path.dirname(os.path.normpath(cfg.init_from)))
    own = dict(TOY[cfg.stage])
    own["lr"] = cfg.lr or own["lr"]
    if cfg.stage == "rlhf":
        own["rm"] = cfg.rm or os.path.join(run_folder, "rlhf", "rm")
        if "://" not in own["rm"] and not os.path.exists(own["rm"]):
            fail(f"--rm: {own['rm']} is not there, and rlhf needs a reward model.")
    data = cfg.data or os.path.join(run_folder, "data", f"{SKILL[cfg.stage]}_rl.jsonl")
    if not cfg.data and not os.path.exists(data):
        fail(f"--data: {data} is not there. Pass a file, or make it with bash run_cascade.sh.")
    return stage.Config(
        init_from=cfg.init_from,
        data=data,
        seed=cfg.seed,
        prompts_per_step=cfg.prompts,
        group_size=cfg.group_size,
        num_steps=1,
        max_prompt_tokens=256,
        max_new_tokens=cfg.max_new_tokens,
        rope_factor=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        reward_workers=2,
        # The toy has 8192. With fewer one sees that a batch is cut.
        micro_batch_tokens=512,
        **own,
    )


# ---- 2. Run the step -----------------------------------------------------------------------------
def run_step(cfg):
    """One step of the stage, as its main() makes it. Returns what it saw, as plain values."""
    clock = time.time()
    stage = importlib.import_module(cfg.stage)
    device = torch.device("cpu")
    torch.manual_seed(cfg.seed)

    # Setup: reward workers before the model, since they are forked; prompts, policy, sampler.
    with one_sentence(f"--init_from={cfg.init_from}"):
        tokenizer = load_tokenizer(cfg.init_from)
    stage_cfg = stage_config(stage, cfg)
    reward_hook = stage.make_reward(stage_cfg)
    rows = stage.load_rows(stage_cfg, limit=400)  # a few are enough, and take less time
    with one_sentence(f"--init_from={cfg.init_from}"):
        model = Qwen3.from_pretrained(cfg.init_from, device=device)
    rows = encode_prompts(rows, tokenizer, stage_cfg)
    optimizer = make_optimizer(model, stage_cfg)
    engine = TorchEngine(model, tokenizer)

    # Rollout: sample groups of completions, verify them, compute advantages.
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}}
    indices = next_prompts(rows, state, stage_cfg, stage.select_rows)
    rollouts, sampled = stage.rollout(engine, rows, indices, 1, state, stage_cfg, reward_hook, 0, 1)

    # Look at the loss before the update, on the micro-batches that train_step will make again.
    in_loss = [r for r in rollouts if r.in_loss]
    num_tokens = sum(len(r.completion_ids) for r in in_loss)
    counts = {"tokens": num_tokens, "sequences": len(in_loss)}
    batches, _ = collate(rollouts, stage_cfg, device)
    losses, before = look_at_loss(stage, model, batches, counts, stage_cfg)

    # Update, then score the same tokens under the new weights.
    metrics = stage.train_step(model, optimizer, rollouts, stage_cfg, device, 1)
    after = {}
    with torch.no_grad():
        for batch in batches:
            logprobs_T, _ = model.token_logprobs(batch, temperature=stage_cfg.temperature)
            after |= by_sequence(batch, {"after": logprobs_T})

    # IF-RL drops groups without a gradient. If it dropped all, the sampled ones are shown.
    listed = rollouts if batches else sampled
    first = choose_group(listed, cfg.group_size)
    group = listed[first : first + cfg.group_size]
    advantages = [r.advantage for r in group]
    best = advantages.index(max(advantages))
    return {
        "stage": cfg.stage,
        "init_from": cfg.init_from,
        "data": stage_cfg.data,
        "seed": cfg.seed,
        "lr": stage_cfg.lr,
        "grad_clip": stage_cfg.grad_clip,
        "prompt": token_texts(tokenizer, group[0].prompt_ids),
        "rollouts": [describe(r) for r in listed],
        "first": first,  # the group that is shown begins with this rollout
        "group": [describe_tokens(r, tokenizer, before, after, num_tokens) for r in group],
        "has_gradient": any(advantages),
        "best": best,
        "worst": advantages.index(min(advantages)),
        "micro_batch": describe_batch(group[best], batches, tokenizer),
        "num_tokens": num_tokens,
        "losses": losses,
        "metrics": metrics,
        "seconds": time.time() - clock,
    }


def look_at_loss(stage, model, batches, counts, cfg):
    """(loss of every micro-batch, {sequence: {name: one value per token}}), without an update."""
    losses, numbers = [], {}
    for batch in batches:
        with torch.no_grad():
            old_logprobs_T, _ = model.token_logprobs(batch, temperature=cfg.temperature)
        # A leaf of its own, so that autograd tells how the loss depends on each log-prob.
        logprobs_T = old_logprobs_T.clone().requires_grad_()
        loss = stage.grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg)
        losses.append(loss.item())
        # The factors inside grpo_loss, computed as it does.
        weight_T = torch.zeros_like(old_logprobs_T)
        weight_T[batch["loss_index"]] = stage.sampler_correction(
            old_logprobs_T, batch, cfg.importance_limit
        )
        values = {
            "logprob": logprobs_T.detach(),
            "old": old_logprobs_T,
            "ratio": (logprobs_T.detach() - old_logprobs_T).exp(),
            "weight": weight_T,
            "gradient": torch.autograd.grad(loss, logprobs_T)[0],
        }
        numbers |= by_sequence(batch, values)
    return losses, numbers


def by_sequence(batch, values):
    """{ids of a sequence: {name: its part of a per-token tensor [T]}} of a packed micro-batch."""
    ids = batch["input_ids_T"].tolist()
    offsets = batch["cu_seqlens"].tolist()
    parts = {}
    for start, end in zip(offsets, offsets[1:]):
        sequence = tuple(ids[start:end])
        parts[sequence] = {name: x_T[start:end].tolist() for name, x_T in values.items()}
    return parts


def choose_group(rollouts, group_size):
    """Index of the first rollout of the group whose rewards differ most."""

    def spread(first):
        rewards = [r.reward for r in rollouts[first : first + group_size] if r.in_loss]
        return statistics.pstdev(rewards) if rewards else 0.0

    return max(range(0, len(rollouts), group_size), key=spread)


# ---- 3. What is kept of it -----------------------------------------------------------------------
def token_texts(tokenizer, ids):
    """[{"id", "text"}] of token ids, each decoded by itself."""
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    return [{"id": token, "text": text} for token, text in zip(ids, texts, strict=True)]


def describe(r):
    """A rollout without its tokens."""
    return {
        "group": r.group,
        "reward": r.reward,
        "status": r.status,
        "cut_off": r.finish_reason == "length",
        "in_loss": r.in_loss,
        "advantage": r.advantage,
        "length": len(r.completion_ids),
    }


def describe_tokens(r, tokenizer, before, after, num_tokens):
    """A rollout with its tokens and their numbers; without gradient it was not in a micro-batch."""
    sequence = tuple(r.prompt_ids + r.completion_ids)
    tokens = token_texts(tokenizer, r.completion_ids)
    for i, token in enumerate(tokens):
        token["sampler"] = r.sampler_logprobs[i]
        if r.advantage == 0:
            continue
        for name, values in {**before[sequence], **after[sequence]}.items():
            token[name] = values[len(r.prompt_ids) + i]
        token["share"] = -token["weight"] * token["ratio"] * r.advantage / num_tokens
    return {**describe(r), "tokens": tokens}


def describe_batch(r, batches, tokenizer):
    """The micro-batch that this rollout is in, as lists; {} if it is in none."""
    sequence = tuple(r.prompt_ids + r.completion_ids)
    for number, batch in enumerate(batches):
        if sequence not in by_sequence(batch, {}):
            continue
        first, copy = None, None
        if batch["shared"] is not None:
            first, copy = (x.tolist() for x in batch["shared"])
        return {
            "number": number,
            "tokens": token_texts(tokenizer, batch["input_ids_T"].tolist()),
            "cu_seqlens": batch["cu_seqlens"].tolist(),
            "loss_index": batch["loss_index"].tolist(),
            "advantages": batch["advantages_T"].tolist(),
            "first": first,
            "copy": copy,
        }
    return {}


# ---- 4. main -------------------------------------------------------------------------------------
def main(cfg):
    if cfg.stage not in TOY:
        fail(f"--stage={cfg.stage}: expected {', '.join(TOY)}.")
    run = run_step(cfg)
    print_steps(run)
    path = cfg.out or os.path.join("out", "slow_motion", f"{cfg.stage}.html")
    write_page(path, run)
    print(f"\nThe same as a page: {path} ({run['seconds']:.1f} s)")


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
