"""RLHF: stage 2 of the cascade (paper 4.2 and 4.3). A Bradley-Terry reward model, then GRPO against its scalar score.

Without --rm the reward model is trained first (--rm_data) and kept in out_dir/rm; --rm takes any Hugging Face sequence
classifier, or the URL of a scoring endpoint. It reads question and answer, never the thinking. Half of the prompts of a
unified run are answered in think mode, half in no_think (paper 4.3.2). Deviations from the paper and gaps filled:
  1. The reward model starts from --rm_init_from, any size; the paper's is Qwen2.5-72B-Instruct (4.2.2).
  2. Small reward models are unstable (paper 6.3): --kl_coef=1e-3 --sequence_level=true --shape_reward=true are the paper's
     stabilisers, off by default as in its main runs.
  3. Mixed language is a test on Unicode scripts; "the lowest score in the batch" is over all ranks' unpenalised rollouts.
  4. A think-mode reply that never closes its thought earns the lowest score of the batch. The paper scores the whole text
     and finds that low; a small reward model likes a reply without any thinking just as well, and the mode is lost.

torchrun --nproc_per_node=8 rlhf.py --init_from=out/sft2/final --out_dir=out/rlhf
A good run prints a reward-model pair accuracy well over 0.7 and then a reward that rises while len and trunc stay put.
"""

import functools
import math
import os
import statistics
import time
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from engine import Rollout, make_engine, request_seed
from lib.checkpoint import (
    load_checkpoint,
    load_history,
    load_policy,
    lock,
    mark_final,
    save_checkpoint,
)
from lib.common import all_gather, all_reduce, average_gradients, finish, print0, start_run
from lib.data import (
    BadRow,
    as_messages,
    count_correct,
    encode_prompts,
    first_nonempty,
    load_table,
    next_prompts,
    required_field,
)
from lib.flags import parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, summarize
from lib.packing import balance, collate, pack_rollouts
from model import Qwen3
from verifiers.language import language_ok
from verifiers.pool import timed
from verifiers.reward_model import (
    check_reward_model,
    load_reward_model,
    rm_device,
    train_reward_model,
)


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    init_from: str = "out/sft2/final"
    out_dir: str = "out/rlhf"
    # prompts: hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-Cascade-RL-RLHF"
    eval_data: str = ""  # same schemas; "": no held-out metric
    # of the prompts answered in think mode; 1.0 for thinking-only models. Paper 4.3.2
    think_share: float = 0.5
    rm: str = ""  # reward model folder or http(s) URL; "": train one
    # where training it starts; "": init_from. The paper: Qwen2.5-72B-Instruct [dev 1]
    rm_init_from: str = ""
    rm_data: str = "nvidia/Nemotron-Cascade-RM-Training"  # chosen/rejected or HelpSteer rows
    rm_eval_data: str = ""  # same schemas, for the pair accuracy
    rm_samples_per_step: int = 256  # pairs per update; paper 4.2.2
    rm_epochs: int = 1  # paper 4.2.2: longer was worse
    rm_lr: float = 2e-6  # AdamW, 3% warm-up, then linear to 0 (gap G6); paper 4.2.2
    rm_max_len: int = 8192  # tokens of question and answer; longer pairs are dropped (gap G6)
    # k3 estimate of KL(policy || init_from) in the loss; paper 6.3: 1e-3 [dev 2]
    kl_coef: float = 0.0
    sequence_level: bool = False  # mean over sequences of their token means; paper 6.3
    shape_reward: bool = False  # tanh of the group z-score; paper 6.3
    engine: str = "auto"  # rollouts: auto, torch or vllm
    prompts_per_step: int = 256  # over all ranks; paper T15 (128 in the text)
    group_size: int = 8  # completions per prompt (G); paper T15
    num_steps: int = 800  # paper T15
    max_prompt_tokens: int = 4096  # longer prompts are dropped at load
    max_new_tokens: int = 12288  # paper T15
    # YaRN factor; 2.0 once prompt + completion can pass 32K; 0: as the checkpoint has it
    rope_factor: float = 0.0
    temperature: float = 0.6  # of the sampler and of the trained log-probs; paper T15
    top_p: float = 0.95  # sampler only (gap G4); paper T15
    top_k: int = 0  # sampler only; 0: off
    # truncated completions are scored as they are, which teaches brevity; paper 4.3.2
    overlong_filter: bool = False
    # dynamic sampling: rounds of fresh prompts for groups of equal rewards (IF-RL only)
    max_refill_rounds: int = 0
    lr: float = 2e-6  # AdamW; paper T15
    # last step's learning rate as a fraction of lr, linear; 1: constant (gap G2)
    final_lr: float = 1.0
    warmup_steps: int = 0  # linear
    beta1: float = 0.9  # paper T15
    beta2: float = 0.95  # paper T15
    weight_decay: float = 0.01  # not stated in the paper (gap G3)
    grad_clip: float = 1.0  # not stated in the paper
    clip_low: float = 0.2  # ratio clip; never binds, one update a batch keeps the ratio at 1
    clip_high: float = 0.2
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; 2: Cascade 2 eq. 3; 0: all
    # weigh 1
    importance_limit: float = 0.0
    micro_batch_tokens: int = 32768  # tokens of one packed forward pass on one rank
    reward_workers: int = 8  # parallel requests to a scoring endpoint
    # the run stops when a larger share of a step's rewards are infrastructure failures
    max_infra: float = 0.02
    eval_every: int = 20  # steps; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    save_every: int = 50  # steps
    # weights and optimizer over all ranks; hybrid: inside a node, replicated across nodes; offload:
    # in host memory; replicate: whole
    shard: str = "full"
    # seconds that a phase of a step (rollout, train_step, evaluate) may last before the run ends
    # and says where
    phase_timeout: float = 7200.0
    sample_every: int = 10  # steps between printed samples
    seed: int = 0


# ---- 2. Data -------------------------------------------------------------------------------------
def load_rows(cfg, path=None, limit=0):
    """Prompts of cfg.data (or path): a `prompt` or `messages` chat list, or text; of a logged conversation (WildChat, LMSYS,
    Arena) the first user turn, because what follows answers another model. Modes alternate."""

    def normalize(row, where):
        logged = ("conversation", "conversation_a")
        name = first_nonempty(row, "prompt", "messages", *logged)
        turns = as_messages(required_field(row, where, name, (str, list)), name)
        users = [i for i, m in enumerate(turns) if m["role"] == "user"]
        last = users[0 if name in logged else -1] if users else -1
        if last < 0 or not turns[last]["content"].strip():
            raise BadRow("no user turn")
        return {
            "messages": [{"role": m["role"], "content": m["content"]} for m in turns[: last + 1]]
        }

    rows = load_table(path or cfg.data, normalize, limit)
    for i, row in enumerate(rows):  # all G completions of a prompt share its mode (gap G8)
        row["think"] = math.floor((i + 1) * cfg.think_share) > math.floor(i * cfg.think_share)
    return rows


def select_rows(rows, epoch, history, cfg):
    """Indices this epoch draws from: all of them."""
    return list(range(len(rows)))


# ---- 3. Reward -----------------------------------------------------------------------------------
@functools.cache
def reference_model(folder, rope_factor, device):
    """The frozen policy this stage started from, whatever it was resumed from."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Qwen3.from_pretrained(
        folder, dtype=dtype, device=device, rope_factor=rope_factor
    ).requires_grad_(False)


@torch.no_grad()
def reference_logprobs(batch, cfg):
    """Token log-probs [T] of a micro-batch under the reference, at the policy's temperature."""
    model = reference_model(cfg.init_from, cfg.rope_factor, batch["input_ids_T"].device)
    packed = (
        batch["input_ids_T"],
        batch["cu_seqlens"],
        batch["max_seqlen"],
        batch["loss_index"],
        batch["shared"],
    )
    return model(*packed, temperature=cfg.temperature)[0]


def answer_of(rollout):
    """What is scored: the text after </think>; the whole reply in no_think mode or when the tag is missing (paper 4.3.2)."""
    return rollout.text.rpartition("</think>")[2].strip() if rollout.row["think"] else rollout.text


def make_reward(cfg):
    """(submit, collect). Scores are computed in one batch when all completions are there; submit has nothing to start."""
    path = cfg.rm or os.path.join(cfg.out_dir, "rm")
    if not cfg.rm and not os.path.exists(path):
        train_reward_model(cfg, path)
    score = load_reward_model(path, rm_device(), cfg.reward_workers)

    def collect(rollouts):
        scores, seconds = timed(
            score, [r.row["messages"] for r in rollouts], [answer_of(r) for r in rollouts]
        )
        for r, s in zip(rollouts, scores, strict=True):
            r.status = (
                "infra"
                if s is None
                else "no_answer"
                if r.row["think"] and "</think>" not in r.text
                else "ok"
            )
            r.verify_s = seconds / len(rollouts)
            # [dev 3]
            r.status = (
                r.status
                if language_ok(" ".join(m["content"] for m in r.row["messages"]), r.text)
                else "language"
            )
        lowest = min(
            [s for r, s in zip(rollouts, scores, strict=True) if r.status == "ok"], default=math.inf
        )
        lowest = -all_reduce({"lowest": -lowest}, "max")["lowest"]
        lowest = lowest if math.isfinite(lowest) else 0.0
        known = [s for s in scores if s is not None]
        sums = all_reduce(
            {"n": len(known), "sum": sum(known), "squares": sum(s * s for s in known)}
        )
        mean = sums["sum"] / max(sums["n"], 1)
        std = math.sqrt(max(sums["squares"] / max(sums["n"], 1) - mean**2, 0.0))
        # [dev 4], paper 4.3.2
        floors = {"infra": math.nan, "no_answer": lowest, "language": lowest - 10.0}
        for r, s in zip(rollouts, scores, strict=True):
            r.reward = r.score = floors.get(r.status, s)
            r.batch_mean, r.batch_std = mean, std
        for group in {r.group for r in rollouts} if cfg.shape_reward else ():
            members = [r for r in rollouts if r.group == group and r.status != "infra"]
            if len(members) < 2:
                continue
            mean, std = (
                statistics.fmean(r.reward for r in members),
                statistics.pstdev(r.reward for r in members),
            )
            for r in members:
                r.reward = math.tanh((r.reward - mean) / (std + 1e-6))

    return (lambda rollout: None), collect


def monitor(rollouts):
    """This stage's numbers for the log: mean and spread of the reward model's raw scores over the batch of all ranks (the reward may be a
    shaped one), and the spread of the scores in a group."""
    groups, mean = {}, lambda values: sum(values) / max(len(values), 1)
    for r in rollouts:
        if math.isfinite(r.score):
            groups.setdefault(r.group, []).append(r.score)
    batch = {
        "rm_score": mean([r.batch_mean for r in rollouts]),
        "rm_std": mean([r.batch_std for r in rollouts]),
    }
    return batch | {"rm_group_std": mean([statistics.pstdev(group) for group in groups.values()])}


def self_test(rows, cfg):
    """Before training: the reward model answers, and not with one number for everything."""
    check_reward_model(cfg.rm or os.path.join(cfg.out_dir, "rm"), rows, cfg.reward_workers)


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """The score of a held-out rollout, floors included, unshaped (unbounded; compare only within one reward model)."""
    return rollout.score


# ~~~~~~~~ waterline: below it all RL stages are the same, line for line (tests/test_stage_diff.py)


# ---- 5. GRPO -------------------------------------------------------------------------------------
# T tokens of a packed micro-batch; entry t of every per-token tensor is about token t
def rollout(engine, rows, indices, step, cfg, reward_hook, rank, world):
    """(trained, sampled): this rank's rollouts with rewards, verified while others still decode. With max_refill_rounds > 0
    groups of equal rewards make room for fresh prompts (DAPO dynamic sampling, paper 4.4.2): `trained` are the groups kept,
    `sampled` those of the first round, an unbiased view of the policy."""
    submit, collect = reward_hook
    mine, trained, sampled = indices[rank::world], [], []
    wanted, spare = (
        len(mine),
        list(np.random.default_rng([cfg.seed, step, 7]).permutation(len(rows)))[rank::world],
    )
    for refill in range(1 + cfg.max_refill_rounds):
        fresh = [
            Rollout(
                row=rows[i],
                group=refill * wanted + g,
                prompt_ids=rows[i]["prompt_ids"],
                seed=request_seed(cfg.seed, step, refill, g * world + rank, sample),
            )
            for g, i in enumerate(mine)
            for sample in range(cfg.group_size)
        ]
        with tqdm(
            total=len(fresh),
            desc=f"step {step} rollout",
            leave=False,
            disable=None if rank == 0 else True,
        ) as bar:
            finished = lambda r, bar=bar: (submit(r), bar.update())
            engine.generate(
                fresh,
                cfg.max_new_tokens,
                cfg.temperature,
                cfg.top_p,
                cfg.top_k,
                on_finished=finished,
            )
            collect(fresh)
        compute_advantages(fresh, cfg)
        groups = [fresh[g : g + cfg.group_size] for g in range(0, len(fresh), cfg.group_size)]
        uneven = [group for group in groups if any(r.advantage for r in group)]
        trained += [r for group in (uneven if cfg.max_refill_rounds else groups) for r in group]
        sampled = sampled or fresh
        missing = max(wanted - len(trained) // cfg.group_size, 0) if spare else 0
        if refill == cfg.max_refill_rounds or not all_reduce({"n": missing}, "max")["n"]:
            # all ranks stop in the same round: a reward hook may hold collectives
            break
        mine, spare = spare[:missing], spare[missing:]
    # nothing to learn from: an idle batch
    return trained or [replace(sampled[0], trained=False, advantage=0.0)], sampled


def compute_advantages(rollouts, cfg):
    """(r - mean) / std inside each group, paper eq. 1; unbiased std + 1e-6 (gap G1). Infra failures, and truncated
    rollouts under overlong_filter, leave the loss, its denominator and the group statistics (gap G5)."""
    for first in range(0, len(rollouts), cfg.group_size):
        group = rollouts[first : first + cfg.group_size]
        assert len({r.group for r in group}) == 1, "a group was torn apart"
        for r in group:
            assert r.status == "infra" or math.isfinite(r.reward), (
                f"reward {r.reward} for {r.row['messages']}"
            )
            r.trained = r.status != "infra" and not (
                cfg.overlong_filter and r.finish_reason == "length"
            )
        rewards = [r.reward for r in group if r.trained]
        # by comparison: a std of 1e-17 is not a signal
        even = len(rewards) < 2 or max(rewards) == min(rewards)
        mean, std = (0.0, 1.0) if even else (statistics.fmean(rewards), statistics.stdev(rewards))
        for r in group:
            r.trained = r.trained and len(rewards) > 1
            r.advantage = 0.0 if even or not r.trained else (r.reward - mean) / (std + 1e-6)


def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """Token-level policy gradient, paper eq. 1 with the batch-wide denominator of 6.3: the sum over this micro-batch's
    completion tokens of -min(ratio A, clip(ratio) A), over the completion tokens of all ranks and micro-batches."""
    # CHANGED: the stabilisers for small reward models (paper 6.3) are added to the loss of the other stages
    # exactly 1: one update a batch (4.1.2)
    ratio_M = (logprobs_T - old_logprobs_T)[batch["loss_index"]].exp()
    advantages_M = batch["advantages_T"][batch["loss_index"]]
    clipped_M = ratio_M.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss_M = -importance(old_logprobs_T, batch, cfg) * torch.minimum(
        ratio_M * advantages_M, clipped_M * advantages_M
    )
    # k3 = e^d - d - 1, d = log ref - log policy; its gradient is that of KL(ref || policy), to
    # first
    if cfg.kl_coef > 0:
        # order also of KL(policy || ref). Groups of equal rewards were left out by collate and feel
        # no pull.
        d_M = reference_logprobs(batch, cfg)[batch["loss_index"]] - logprobs_T[batch["loss_index"]]
        loss_M = loss_M + cfg.kl_coef * (d_M.exp() - d_M - 1)
    if cfg.sequence_level:  # weigh each token by 1 / its sequence's length
        sequence_M = torch.searchsorted(batch["cu_seqlens"].long(), batch["loss_index"], right=True)
        return (loss_M / sequence_M.bincount()[sequence_M]).sum() / counts["sequences"]
    return loss_M.sum() / counts["tokens"]


def importance(old_logprobs_T, batch, cfg):
    """Weights of the completion tokens, without gradient: pi_train / pi_sampler corrects for a sampler that computes otherwise
    (vLLM in bf16); a token whose ratio leaves [1 / limit, limit] is dropped."""
    if not cfg.importance_limit:
        return 1.0
    ratio_M = (old_logprobs_T - batch["sampler_logprobs_T"])[batch["loss_index"]].exp()
    return ratio_M * ((ratio_M >= 1 / cfg.importance_limit) & (ratio_M <= cfg.importance_limit))


def train_step(model, optimizer, rollouts, cfg, device, world):
    """One gradient update from the rollouts of all ranks; returns the metrics. A loss or gradient that is not finite is not applied."""
    in_loss = [r for r in rollouts if r.trained]
    counts = all_reduce(
        {"tokens": sum(len(r.completion_ids) for r in in_loss), "sequences": len(in_loss)}
    )
    batches = collate(balance(rollouts, world), cfg, device)
    # every rank runs equally many: collectives must match
    most = int(all_reduce({"n": len(batches)}, "max")["n"])
    idle = most - len(batches)
    batches += [pack_rollouts([replace(rollouts[0], advantage=0.0)], device)] * idle
    sums = {"loss": 0.0, "gap": 0.0, "entropy": 0.0, "scored": 0}
    for i, batch in enumerate(batches):
        packed = (
            batch["input_ids_T"],
            batch["cu_seqlens"],
            batch["max_seqlen"],
            batch["loss_index"],
            batch["shared"],
        )
        logprobs_T, entropy_T = model(*packed, temperature=cfg.temperature)
        loss = grpo_loss(
            logprobs_T=logprobs_T,
            old_logprobs_T=logprobs_T.detach(),
            batch=batch,
            counts=counts,
            cfg=cfg,
        )
        # ranks are averaged, the denominator is global; idle batches weigh 0
        (loss * world * (i < most - idle)).backward()
        if i < most - idle:
            sums["loss"] += loss.item()
            sums["gap"] += (logprobs_T.detach() - batch["sampler_logprobs_T"]).abs().sum().item()
            sums["entropy"] += entropy_T.detach().sum().item()
            sums["scored"] += len(batch["loss_index"])
    average_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
    sums = all_reduce(sums)
    if math.isfinite(grad_norm + sums["loss"]) and most:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    per_token = {k: sums[k] / max(sums["scored"], 1) for k in ("gap", "entropy")}
    return {
        "loss": sums["loss"],
        **per_token,
        "grad_norm": grad_norm,
        "num_tokens": counts["tokens"],
    }


def evaluate(engine, rows, cfg, reward_hook, rank, world):
    """Mean metric of one sample for each held-out row, at the training temperature; the seeds never change."""
    rollouts = [
        Rollout(row=row, group=i, prompt_ids=row["prompt_ids"], seed=request_seed(cfg.seed, 99, i))
        for i, row in enumerate(rows)
    ]
    rollouts = rollouts[rank::world]
    engine.generate(
        rollouts,
        cfg.max_new_tokens,
        cfg.temperature,
        cfg.top_p,
        cfg.top_k,
        on_finished=reward_hook[0],
    )
    reward_hook[1](rollouts)
    sums = all_reduce(
        {
            "score": sum(
                known := [
                    m for r in rollouts if r.status != "infra" and (m := metric(r)) is not None
                ]
            ),
            "n": len(known),
        }
    )
    return sums["score"] / max(sums["n"], 1)


# ---- 6. main -------------------------------------------------------------------------------------
def main(cfg):
    lock(cfg.out_dir)
    rank, world, device = start_run(cfg)
    if cfg.prompts_per_step % world:
        fail(f"--prompts_per_step={cfg.prompts_per_step} is not a multiple of {world} ranks.")
    # first of all: its workers are forked while this process is still small
    reward_hook = make_reward(cfg)
    rows = load_rows(cfg)
    eval_rows = (
        load_rows(replace(cfg, data=cfg.eval_data))[: cfg.eval_rows] if cfg.eval_data else []
    )
    self_test(rows, cfg)

    tokenizer, model, resume = load_policy(cfg, world, device)
    rows, eval_rows = (
        encode_prompts(rows, tokenizer, cfg),
        eval_rows and encode_prompts(eval_rows, tokenizer, cfg),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}, "skipped": 0}
    data = functools.reduce(
        lambda crc, row: zlib.crc32(repr(row["prompt_ids"]).encode(), crc), rows, 0
    )
    state |= load_history(cfg.init_from, data)
    start, state = load_checkpoint(resume, optimizer, cfg) if resume else (0, state)
    if set(all_gather(data)) != {state.setdefault("data", data)}:
        fail(
            f"data {cfg.data}: the rows are not the same on every rank, or not those that {resume} was trained on."
        )
    engine = make_engine(cfg.engine, model, tokenizer)
    logger = Logger(cfg.out_dir, start)
    num_params = sum(p.numel() for p in model.parameters())
    print0(
        f"{resume or cfg.init_from} -> {cfg.out_dir}: {num_params / 1e6:.1f}M parameters, {len(rows)} prompts, {world} ranks on {device.type}, "
        f"steps {start + 1}..{cfg.num_steps} of {cfg.prompts_per_step} x {cfg.group_size}"
    )

    for step in range(start + 1, cfg.num_steps + 1):
        clock = time.time()
        trained, sampled = rollout(
            engine,
            rows,
            next_prompts(rows, state, cfg, select_rows),
            step,
            cfg,
            reward_hook,
            rank,
            world,
        )
        generated = time.time()
        decay = cfg.final_lr + (1 - cfg.final_lr) * (1 - step / cfg.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, step / max(cfg.warmup_steps, 1)) * decay
        metrics = summarize(sampled, monitor(sampled)) | train_step(
            model, optimizer, trained, cfg, device, world
        )
        engine.sync(model)
        metrics |= {
            "lr": optimizer.param_groups[0]["lr"],
            "time/gen": generated - clock,
            "time/train": time.time() - generated,
        }
        for counts in all_gather(count_correct(sampled)):
            state["history"] |= counts
        check_step(step, metrics, state, cfg)
        if (
            cfg.eval_every
            and eval_rows
            and (step % cfg.eval_every == 0 or step in (1, cfg.num_steps))
        ):
            metrics["eval"] = evaluate(engine, eval_rows, cfg, reward_hook, rank, world)
        logger.log(step, metrics, console_line(step, cfg.num_steps, metrics))
        if cfg.sample_every and (step % cfg.sample_every == 0 or step == 1):
            r = sampled[0]
            print0(
                f"  prompt: {r.row['messages'][-1]['content']!r}\n  sample: {r.text!r}\n  reward: {r.reward:g} ({r.status}, {r.finish_reason})"
            )
        if step % cfg.save_every == 0 or step == cfg.num_steps:
            folder = save_checkpoint(cfg.out_dir, step, model, optimizer, cfg, state)
    mark_final(cfg.out_dir, folder if start < cfg.num_steps else resume)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
