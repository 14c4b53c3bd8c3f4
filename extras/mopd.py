"""MOPD: multi-teacher on-policy distillation, an optional repair after the cascade (Cascade 2, arXiv 2603.19220, section 4.4).

A later stage costs some of what an earlier one taught. The policy samples from the prompts of every domain; on each token it
drew, the checkpoint that was best at that domain says how likely it finds it, and the difference of the two log-probs is the
token's advantage (the reverse KL, on sampled tokens). No verifier and no reward model: the teachers are the cascade's own
earlier checkpoints, frozen. Below the waterline two functions differ from Math RL's.
Deviations from the paper:
  1. A domain is drawn as often as it has prompts; the paper does not give its mixture.
  2. Every rank reads every teacher whole, in bf16 on a GPU, at every step, one after the other: vLLM and training leave room for no more.
A good run: the reward, minus the KL to the teachers in nats a token, climbs towards 0.
torchrun --nproc_per_node=8 extras/mopd.py --init_from=out/swerl/final --out_dir=out/mopd --rope_factor=4 --data=rlhf:DATA:out/rlhf/final,mathrl:DATA:out/mathrl/final
"""

import functools
import importlib
import itertools
import math
import os
import statistics
import sys
import time
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

# the repository: this script may be started by its path
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

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
from lib.data import count_correct, encode_prompts, next_prompts
from lib.flags import parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, summarize
from lib.packing import balance, collate, pack_rollouts
from model import Qwen3, load_tokenizer
from verifiers.pool import timed


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    init_from: str = "out/swerl/final"  # the student
    out_dir: str = "out/mopd"
    # comma-separated STAGE:DATA:TEACHER: a stage's name, a set that it loads, a checkpoint of the
    # same tokenizer
    data: str = ""
    eval_data: str = ""  # the same with held-out sets; "": no held-out metric
    engine: str = "auto"  # rollouts: auto, torch or vllm
    prompts_per_step: int = 128  # over all ranks; Cascade 2 table 8
    group_size: int = 4  # completions per prompt; Cascade 2 table 8
    num_steps: int = 50  # Cascade 2 section 4.4: 40 to 50
    max_prompt_tokens: int = 4096  # longer prompts are dropped at load
    max_new_tokens: int = 98304  # Cascade 2 table 8
    rope_factor: float = 0.0  # YaRN factor, of student and teachers; 0: as each checkpoint has it
    temperature: float = 1.0  # of the sampler and of all log-probs
    top_p: float = 1.0  # sampler only
    top_k: int = 0  # sampler only; 0: off
    max_refill_rounds: int = 0  # of the common loop; nothing is flat here
    lr: float = 2e-6  # AdamW; Cascade 2 table 8
    final_lr: float = 1.0  # last step's learning rate as a fraction of lr, linear
    warmup_steps: int = 30  # linear; Cascade 2 section 4.4
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; Cascade 2 eq. 3
    importance_limit: float = 2.0
    micro_batch_tokens: int = 32768  # tokens of one packed forward pass on one rank
    max_infra: float = 0.02  # of the common loop; nothing can fail here
    eval_every: int = 10  # steps; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    save_every: int = 10  # steps
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
    """Rows of every STAGE:DATA:TEACHER, each read by its stage's own loader, with the teacher's folder in row["teacher"]."""
    rows = []
    for item in (path or cfg.data).split(","):
        stage, _, rest = item.partition(":")
        data, _, teacher = rest.rpartition(":")
        if stage not in ("rlhf", "ifrl", "mathrl", "coderl", "swerl") or not data:
            fail(
                f"--data: {item!r} is not STAGE:DATA:TEACHER, e.g. mathrl:math.jsonl:out/mathrl/final."
            )
        if not os.path.exists(os.path.join(teacher, "config.json")):
            fail(f"--data: teacher {teacher} of {data} is no checkpoint (config.json is missing).")
        module = importlib.import_module(stage)
        knobs = {"min_prompt_tokens": 0} if stage == "swerl" else {}
        loaded = module.load_rows(
            module.Config(data=data, max_prompt_tokens=cfg.max_prompt_tokens, **knobs), limit=limit
        )
        rows += [
            {"messages": row["messages"], "think": row["think"], "teacher": teacher}
            for row in loaded
        ]
    return rows


def select_rows(rows, epoch, history, cfg):
    """All of them, in every epoch [dev 1]."""
    return list(range(len(rows)))


# ---- 3. Reward -----------------------------------------------------------------------------------
def load_teacher(folder, rope_factor):
    """A frozen checkpoint, whole on every rank [dev 2]."""
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Qwen3.from_pretrained(
        folder, dtype=dtype, device=device, rope_factor=rope_factor
    ).requires_grad_(False)


@torch.no_grad()
def ask_teacher(teacher, rollout, temperature):
    """Log-probs of the student's completion tokens under the teacher of their domain. One rollout at a time: real ones are long."""
    ids_T = torch.tensor(
        rollout.prompt_ids + rollout.completion_ids, device=teacher.head_weight.device
    )
    cu_seqlens = torch.tensor([0, len(ids_T)], dtype=torch.int32, device=ids_T.device)
    index_M = torch.arange(len(rollout.prompt_ids), len(ids_T), device=ids_T.device)
    return teacher(ids_T, cu_seqlens, len(ids_T), index_M, temperature=temperature)[0][
        index_M
    ].tolist()


def make_reward(cfg):
    """(submit, collect). collect asks the teachers; the reward is only for the log: minus the KL to the teacher, estimated
    on the rollout's own tokens, in nats a token."""

    def collect(rollouts):
        domain = lambda r: r.row["teacher"]
        for folder, asked in itertools.groupby(sorted(rollouts, key=domain), domain):
            teacher = load_teacher(folder, cfg.rope_factor)
            for r in asked:
                r.teacher_logprobs, r.verify_s = timed(ask_teacher, teacher, r, cfg.temperature)
                r.reward = statistics.fmean(
                    t - s for t, s in zip(r.teacher_logprobs, r.sampler_logprobs, strict=True)
                )
                r.status = "ok"
            del teacher

    return (lambda rollout: None), collect


def monitor(rollouts):
    """This stage's numbers for the log: by how many nats teacher and student differ on a token, whichever is surer."""
    spread = [
        statistics.fmean(abs(t - s) for t, s in zip(r.teacher_logprobs, r.sampler_logprobs))
        for r in rollouts
    ]
    return {"abs_difference": sum(spread) / max(len(rollouts), 1)}


def self_test(rows, cfg):
    """Before training: every teacher reads the student's tokens as the student does."""
    vocabulary = load_tokenizer(cfg.init_from).get_vocab()
    for folder in sorted({row["teacher"] for row in rows}):
        if load_tokenizer(folder).get_vocab() != vocabulary:
            fail(
                f"teacher {folder} has another tokenizer than {cfg.init_from}: its log-probs would be of other tokens."
            )


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """Minus the KL of one held-out rollout, nats a token."""
    return rollout.reward


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
    """1 for every rollout: the advantages are the tokens' own, in grpo_loss.
    # CHANGED: no group, no reward; the teacher speaks about each token (Cascade 2 paper 4.4)"""
    for r in rollouts:
        r.trained, r.advantage = True, 1.0


def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """Cascade 2 eq. 4: the sum over this micro-batch's completion tokens of -w a log pi, over the completion tokens of all ranks
    and micro-batches. a = log pi_teacher - log pi_train, w = pi_train / pi_sampler; neither has a gradient.
    # CHANGED: distillation instead of a policy gradient on rewards (Cascade 2 paper 4.4)"""
    advantages_M = (batch["teacher_logprobs_T"] - old_logprobs_T)[batch["loss_index"]]
    return (
        -(
            importance(old_logprobs_T, batch, cfg) * advantages_M * logprobs_T[batch["loss_index"]]
        ).sum()
        / counts["tokens"]
    )


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
