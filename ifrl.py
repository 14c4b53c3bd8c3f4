"""IF-RL: stage 3 of the cascade, verifiable instructions (paper 4.4).

What changes relative to mathrl.py:
  1. Reward: every constraint of the prompt must hold (prompt-level strict, 0/1). Default is the paper's unified
     model: rules only, no_think, 8K, no overlong filter. --think=True is the thinking model: 1 + sigmoid(z) if the
     rules hold, else 0, z = reward-model score normalised in its group; s1 8K, s2 16K with the overlong filter.
  2. Dynamic sampling (max_refill_rounds > 0): groups whose final rewards are all equal are drawn again.
  3. Curriculum: --taxonomy=ifeval first (25 ids), then --taxonomy=iftrain (prompts with any of 29 further ids).
Deviations: [dev 1] 256 prompts a step as in table 16, the text says 128. [dev 2] z uses all G rollouts and the
unbiased std, std 0 gives sigmoid(0). [dev 3] In training a reply without a single letter is in no language; the
reference takes undetectable text for followed, which symbols exploit. check(), check_loose() and metric() keep the
reference's rule. [dev 4] Where the reference draws a random parameter, the row is dropped; n_start 0 and a symbol
as letter count as written. [dev 5] An answer of over 50,000 characters follows nothing.

    torchrun --nproc_per_node=8 ifrl.py --init_from=out/rlhf/final --taxonomy=ifeval
In a good run reward rises while len stays; under_20_words rising means that short replies farm the easy constraints.
"""

import ast
import atexit
import ctypes
import functools
import itertools
import json
import math
import multiprocessing
import random
import re
import signal
import statistics
import time
import zlib
from collections import Counter
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
    load_table,
    next_prompts,
    required_field,
)
from lib.flags import parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, summarize
from lib.packing import balance, collate, pack_rollouts
from verifiers.constraints import CHECKS, IFEVAL, check, clean_kwargs, unusable
from verifiers.pool import timed
from verifiers.reward_model import check_reward_model, load_reward_model, rm_device


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    init_from: str = "out/rlhf/final"
    out_dir: str = "out/ifrl"
    # hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-Cascade-RL-Instruction-Following"
    eval_data: str = ""  # same schemas, e.g. google/IFEval; "": no held-out metric
    engine: str = "auto"  # rollouts: auto, torch or vllm
    # False: unified model, rules only; True: thinking model, rules and reward model
    think: bool = False
    # reward model (folder or URL, as in rlhf.py), read only with --think=True
    rm: str = "out/rlhf/rm"
    # ifeval: prompts with the 25 ids only (s1); iftrain: with any of the 29 others (s2); all
    taxonomy: str = "all"
    need_letters: bool = True  # a reply without letters is in no language [dev 3]; training only
    prompts_per_step: int = 256  # over all ranks; paper T16 [dev 1]
    group_size: int = 8  # completions per prompt (G); paper T16
    num_steps: int = 2300  # then 800 more for iftrain; paper T16 (thinking 550 + 300)
    max_prompt_tokens: int = 4096  # longer prompts are dropped at load
    max_new_tokens: int = 8192  # 8K in both unified stages; thinking s2 16K
    # YaRN factor; 2.0 once prompt + completion can pass 32K; 0: as the checkpoint has it
    rope_factor: float = 0.0
    temperature: float = 0.6  # of the sampler and of the trained log-probs; paper T16
    top_p: float = 0.95  # sampler only (gap G4); paper T16
    top_k: int = 20  # sampler only; paper 4.4.2
    overlong_filter: bool = False  # True only in s2 of the thinking model; paper T16
    # dynamic sampling: rounds of fresh prompts for groups of equal rewards
    max_refill_rounds: int = 4
    lr: float = 2e-6  # AdamW; paper T16
    # last step's learning rate as a fraction of lr, linear; 1: constant (gap G2)
    final_lr: float = 1.0
    warmup_steps: int = 0  # linear
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01  # not stated in the paper (gap G3)
    grad_clip: float = 1.0  # not stated in the paper
    clip_low: float = 0.2  # ratio clip; never binds, one update a batch keeps the ratio at 1
    clip_high: float = 0.2
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; 2: Cascade 2 eq. 3; 0: all
    # weigh 1
    importance_limit: float = 0.0
    micro_batch_tokens: int = 32768  # tokens of one packed forward pass on one rank
    reward_workers: int = 8  # verifier processes per rank; 0: in this one
    # the run stops when a larger share of a step's rewards are infrastructure failures
    max_infra: float = 0.02
    eval_every: int = 20  # steps; 0: never
    eval_rows: int = 541  # all of IFEval
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
def read_constraints(row, where):
    """(ids, kwargs, prompt) of any of the four schemas; the prompt is a string or a list of chat messages."""
    if "ground_truth" not in row or "instruction_id_list" in row:
        ids, kwargs = (
            required_field(row, where, "instruction_id_list", list),
            required_field(row, where, "kwargs", list),
        )
        return ids, kwargs, row.get("prompt") or row.get("messages") or ""
    # allenai: [{instruction_id, kwargs}] as the text of a Python literal
    for parse in (ast.literal_eval, json.loads):
        try:
            truth = parse(required_field(row, where, "ground_truth"))
            truth = truth[0] if isinstance(truth, list) else truth
            return (
                truth["instruction_id"],
                truth["kwargs"],
                required_field(row, where, "messages", list),
            )
        except (ValueError, SyntaxError, LookupError, TypeError):
            continue
    raise BadRow("ground_truth holds no instruction_id and kwargs")


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data, or of path, as {messages, think, instruction_id_list, kwargs}; what is dropped is counted."""
    if cfg.taxonomy not in ("all", "ifeval", "iftrain"):
        fail(f"--taxonomy={cfg.taxonomy}: expected all, ifeval or iftrain.")

    def normalize(row, where):
        ids, kwargs, prompt = read_constraints(row, where)
        messages = [{"role": m["role"], "content": m["content"]} for m in as_messages(prompt)]
        if messages and messages[-1]["role"] == "assistant":  # a reply is not ours to imitate
            messages.pop()
        if not messages or not messages[-1]["content"].strip():
            raise BadRow("no prompt")
        list_of = lambda values, kinds: (
            isinstance(values, list) and all(isinstance(v, kinds) for v in values)
        )  # noqa: E731
        if (
            not list_of(ids, str)
            or not list_of(kwargs, (dict, type(None)))
            or not ids
            or len(ids) != len(kwargs)
        ):
            raise BadRow("no constraints, or not one kwargs object for each")
        kwargs = [clean_kwargs(k) for k in kwargs]
        for reason in filter(None, map(unusable, ids, kwargs)):
            raise BadRow(reason)  # [dev 4]
        # measured whole, whatever this stage trains on
        held_out = (path or cfg.data) == cfg.eval_data
        if not held_out and cfg.taxonomy not in (
            "all",
            "ifeval" if IFEVAL.keys() >= set(ids) else "iftrain",
        ):
            raise BadRow(f"not of taxonomy {cfg.taxonomy}")
        return {
            "messages": messages,
            "think": cfg.think,
            "instruction_id_list": list(ids),
            "kwargs": kwargs,
        }

    rows = load_table(path or cfg.data, normalize, limit)
    ids = Counter(name for row in rows for name in row["instruction_id_list"])
    beyond = sum(not IFEVAL.keys() >= set(row["instruction_id_list"]) for row in rows)
    print0(
        f"data {path or cfg.data}: {len(rows)} prompts, {sum(ids.values())} constraints of {len(ids)} kinds, "
        f"{beyond} prompts with ids beyond IFEval's 25"
    )
    return rows


def select_rows(rows, epoch, history, cfg):
    """Indices this epoch draws from: all of them; easy and hopeless prompts are left to dynamic sampling."""
    return list(range(len(rows)))


# ---- 3. Reward -----------------------------------------------------------------------------------
# a longer answer follows nothing [dev 5]: some patterns take quadratic time
MAX_CHARS = 50_000
# for the verdicts still open when the last completion is done; they take milliseconds
VERDICT_SECONDS = 60


def verify(text, think, instruction_id_list, kwargs, need_letters=True):
    """([followed, by the reference], status) of one completion, judged on its answer, the text after </think>."""
    # "\n\n" after the tag is no empty first paragraph
    answer = text.rpartition("</think>")[2].strip() if think else text
    if not answer.strip() or (think and "</think>" not in text):
        return [False] * len(instruction_id_list), "no_answer"
    pairs = zip(instruction_id_list, kwargs, strict=True)
    followed = [len(answer) <= MAX_CHARS and check(name, k, answer) for name, k in pairs]
    mute = (
        need_letters
        and not any(map(str.isalpha, answer))
        and "language:response_language" in instruction_id_list
    )
    return followed, "ok" if all(followed) and not mute else "wrong"  # mute: [dev 3]


def reward(response, instruction_id_list, kwargs):
    """1 if the answer follows every constraint, else 0: the training reward, hence with [dev 3]."""
    return int(
        verify(response, re.search("</?think>", response), instruction_id_list, kwargs)[1] == "ok"
    )


def add_preference(rollouts, scores):
    """Thinking model: reward = 1 + sigmoid(z) where all rules hold, z = score normalised over its whole group."""
    for _, members in itertools.groupby(
        zip(rollouts, scores, strict=True), key=lambda pair: pair[0].group
    ):
        members = list(members)
        known = [score for _, score in members if score is not None]  # None: the endpoint failed
        std = statistics.stdev(known) if len(known) > 1 else 0.0
        for rollout, score in members:
            rollout.status = "infra" if score is None else rollout.status
            # [dev 2]
            z = (score - statistics.fmean(known)) / std if std > 0 and score is not None else 0.0
            rollout.reward = 1 + 1 / (1 + math.exp(-z)) if rollout.status == "ok" else 0.0


def make_reward(cfg):
    """(submit, collect): submit(rollout) starts its verdict in the background, collect(rollouts) waits and sets it; in
    think mode collect then asks the reward model."""

    def start():
        # PR_SET_PDEATHSIG: a worker dies when its parent does
        mortal = ctypes.CDLL(None).prctl, (1, signal.SIGKILL)
        pool = multiprocessing.get_context("fork").Pool(cfg.reward_workers, *mortal)
        atexit.register(pool.terminate)
        return pool

    pool, rounds = start() if cfg.reward_workers else None, itertools.count(1)

    def submit(rollout):
        row = rollout.row
        job = (
            verify,
            rollout.text,
            row["think"],
            row["instruction_id_list"],
            row["kwargs"],
            cfg.need_letters,
        )
        rollout.pending = pool.apply_async(timed, job) if pool else timed(*job)
        return rollout.pending

    def collect(rollouts):
        nonlocal pool
        waiting = [rollout.pending or submit(rollout) for rollout in rollouts]
        deadline = time.monotonic() + VERDICT_SECONDS
        for rollout, result in zip(rollouts, waiting, strict=True):
            try:
                result = result.get(max(0.0, deadline - time.monotonic())) if pool else result
            except (
                multiprocessing.TimeoutError
            ):  # a keyword that takes for ever as a pattern: masked, nobody's fault
                result = ([False] * len(rollout.row["kwargs"]), "infra"), VERDICT_SECONDS
            (rollout.followed, rollout.status), rollout.verify_s = result
            rollout.pending = None
            rollout.reward = float(rollout.status == "ok")
        if any(rollout.status == "infra" for rollout in rollouts):
            pool.terminate()
            pool = start()
        if cfg.think:
            score = load_reward_model(cfg.rm, rm_device(), cfg.reward_workers)  # once: it is cached
            # no tag: the whole text
            answers = [rollout.text.rpartition("</think>")[2].strip() for rollout in rollouts]
            add_preference(
                rollouts, score([rollout.row["messages"] for rollout in rollouts], answers)
            )
        if cfg.sample_every and next(rounds) % cfg.sample_every == 0:
            print0(extremes(monitor(rollouts)))

    return submit, collect


def monitor(rollouts):
    """This stage's numbers for the log, as shares of all rollouts: short replies, constraints given and followed."""
    n = max(len(rollouts), 1)
    shares = {
        "under_20_words": sum(len(r.text.rpartition("</think>")[2].split()) < 20 for r in rollouts)
        / n
    }
    given, followed = Counter(), Counter()
    for r in rollouts:
        given.update(r.row["instruction_id_list"])
        followed.update(itertools.compress(r.row["instruction_id_list"], r.followed))
    for name in CHECKS:  # always all of them: ranks add these up
        shares |= {f"given/{name}": given[name] / n, f"followed/{name}": followed[name] / n}
    return shares


def extremes(shares, k=5):
    """One line: the ids followed least and most often, from monitor()'s shares."""
    given = [name for name in CHECKS if shares[f"given/{name}"]]
    rates = sorted((shares[f"followed/{name}"] / shares[f"given/{name}"], name) for name in given)
    lowest, highest = (
        ", ".join(f"{name} {rate:.0%}" for rate, name in part) for part in (rates[:k], rates[-k:])
    )
    return f"  followed least: {lowest} | most: {highest} | under 20 words: {shares['under_20_words']:.0%}"


def self_test(rows, cfg):
    """Before training. There are no gold replies: an empty one must earn 0 and every constraint must be decidable."""
    for row in random.Random(cfg.seed).sample(rows, min(64, len(rows))):
        ids, kwargs = row["instruction_id_list"], row["kwargs"]
        if reward("", ids, kwargs) or any(map(unusable, ids, kwargs)):
            fail(
                f"verifier self test: {ids} with {kwargs} rewards an empty reply or cannot be decided."
            )
    if cfg.think:
        check_reward_model(cfg.rm, rows, cfg.reward_workers)


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """Prompt-level strict accuracy of one verified rollout by the reference's rules, that is without [dev 3]."""
    return float(all(rollout.followed))


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
    # exactly 1: one update a batch (4.1.2)
    ratio_M = (logprobs_T - old_logprobs_T)[batch["loss_index"]].exp()
    advantages_M = batch["advantages_T"][batch["loss_index"]]
    clipped_M = ratio_M.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    weights_M = importance(old_logprobs_T, batch, cfg)
    return (
        -(weights_M * torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)).sum()
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
