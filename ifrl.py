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
import itertools
import json
import math
import multiprocessing
import random
import re
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from engine import Rollout, make_engine, request_seed, sampler_correction  # keep copies beside it
from lib.checkpoint import load_checkpoint, load_policy, lock, mark_final, save_checkpoint
from lib.common import all_gather, all_reduce, average_gradients, finish, print0, start_run
from lib.data import BadRow, as_messages, load_table, required_field
from lib.flags import Beta, PositiveFloat, PositiveInt, RolloutFlags, Share, TopP, parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, show_sample, summarize
from lib.packing import balance, collate, pack_rollouts
from lib.prompts import count_correct, encode_prompts, load_history, next_prompts, prompts_checksum
from verifiers.constraints import CHECKS, IFEVAL, check, clean_kwargs, unusable
from verifiers.pool import timed
from verifiers.reward_model import check_reward_model, load_reward_model, rm_device


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    init_from: str = "out/rlhf/final"
    out_dir: str = "out/ifrl"
    # hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-Cascade-RL-Instruction-Following"
    eval_data: str = ""  # same schemas, e.g. google/IFEval; "": no held-out metric
    # False: unified model, rules only; True: thinking model, rules and reward model
    think: bool = False
    # reward model (folder or URL, as in rlhf.py), read only with --think=True
    rm: str = "out/rlhf/rm"
    # ifeval: prompts with the 25 ids only (s1); iftrain: with any of the 29 others (s2); all
    taxonomy: str = "all"
    need_letters: bool = True  # a reply without letters is in no language [dev 3]; training only
    prompts_per_step: PositiveInt = 256  # over all ranks; paper T16 [dev 1]
    group_size: PositiveInt = 8  # completions per prompt (G); paper T16
    num_steps: PositiveInt = 2300  # then 800 more for iftrain; paper T16 (thinking 550 + 300)
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 8192  # 8K in both unified stages; thinking s2 16K
    # YaRN factor; 2.0 once prompt + completion can pass 32K; 0: as the checkpoint has it
    rope_factor: float = 0.0
    temperature: PositiveFloat = 0.6  # of the sampler and of the trained log-probs; paper T16
    top_p: TopP = 0.95  # sampler only (gap G4); paper T16
    top_k: int = 20  # sampler only; paper 4.4.2
    overlong_filter: bool = False  # True only in s2 of the thinking model; paper T16
    # dynamic sampling: rounds of fresh prompts for groups of equal rewards
    max_refill_rounds: int = 4
    lr: PositiveFloat = 2e-6  # AdamW; paper T16
    # last step's learning rate as a fraction of lr, linear; 1: constant (gap G2)
    final_lr: Share = 1.0
    warmup_steps: int = 0  # linear
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    weight_decay: float = 0.01  # not stated in the paper (gap G3)
    grad_clip: PositiveFloat = 1.0  # not stated in the paper
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; 2: Cascade 2 eq. 3; 0: all
    # weigh 1
    importance_limit: float = 0.0
    reward_workers: PositiveInt = 8  # verifier processes per rank; 0: in this one
    eval_every: int = 20  # steps; 0: never
    eval_rows: int = 541  # all of IFEval
    save_every: PositiveInt = 50  # steps
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
# A micro-batch is packed: whole sequences stand one behind another, without padding. Two rollouts
# of the prompt [5, 6], with completion [7, 8] and advantage 0.7, and with [9] and -0.7, become
#
#     position        0    1    2    3    4    5    6
#     input_ids_T     5    6    7    8    5    6    9       T = 7 tokens
#     cu_seqlens      0                   4              7  starts of the sequences, and the end
#     loss_index                2    3              6       M = 3 tokens of completions
#     advantages_T    0    0  0.7  0.7    0    0 -0.7
#     first_U         0    1    2    3              6       U = 5 tokens with distinct pasts
#     copy_T          0    1    2    3    0    1    4       token 4 is a copy of token 0
#
# Suffixes name axes: entry t of every _T tensor is about token t; _M runs over loss_index.


def rollout(engine, rows, indices, step, cfg, reward_hook, rank, world):
    """Sample groups of completions until enough have unequal rewards; verify them; set advantages.

    Returns (trained, sampled): the groups that are kept, and those of the first round for the log,
    which are an unbiased view of the policy.
    """
    # CHANGED: dynamic sampling (paper 4.4.2, DAPO). A group of equal rewards has no gradient; it makes
    # room for the group of a fresh prompt.
    submit, collect = reward_hook
    prompts = indices[rank::world]
    wanted = len(prompts)
    # Fresh prompts come from a permutation of all rows, so they may repeat one of this step.
    order = np.random.default_rng([cfg.seed, step, 7]).permutation(len(rows))
    spare = list(order)[rank::world]
    trained, sampled = [], []
    for refill in range(1 + cfg.max_refill_rounds):
        fresh = []
        for group, index in enumerate(prompts):
            prompt_ids = rows[index]["prompt_ids"]
            for sample in range(cfg.group_size):
                seed = request_seed(cfg.seed, step, refill, group * world + rank, sample)
                fresh.append(Rollout(rows[index], refill * wanted + group, prompt_ids, seed))

        # Sample. The moment a completion ends, its verifier starts, while the others still decode.
        no_bar = None if rank == 0 else True
        with tqdm(
            total=len(fresh), desc=f"step {step} rollout", leave=False, disable=no_bar
        ) as bar:

            def finished(r, bar=bar):
                submit(r)
                bar.update()

            sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
            engine.generate(fresh, *sampling, on_finished=finished)
            # Verify: wait for the verdicts that are not there yet.
            collect(fresh)

        # Keep the groups with a gradient; all of them where dynamic sampling is off.
        compute_advantages(fresh, cfg)
        for first in range(0, len(fresh), cfg.group_size):
            group = fresh[first : first + cfg.group_size]
            has_gradient = any(r.advantage != 0 for r in group)
            if has_gradient or cfg.max_refill_rounds == 0:
                trained += group
        if refill == 0:
            sampled = fresh
        if refill == cfg.max_refill_rounds:
            break

        # Refill what is missing. All ranks stop in the same round: a reward hook may hold collectives.
        missing = max(wanted - len(trained) // cfg.group_size, 0) if spare else 0
        if all_reduce({"n": missing}, "max")["n"] == 0:
            break
        prompts, spare = spare[:missing], spare[missing:]
    if not trained:
        # Nothing to learn from: one rollout that is not trained on makes an idle batch.
        trained = [replace(sampled[0], trained=False, advantage=0.0)]
    return trained, sampled


def compute_advantages(rollouts, cfg):
    """advantage = (reward - mean) / (std + 1e-6) inside each group (paper eq. 1; gap G1).

    Infrastructure failures, and truncated rollouts under overlong_filter, are not trained on:
    they leave the loss, its denominator and the group statistics (gap G5).
    """
    for first in range(0, len(rollouts), cfg.group_size):
        group = rollouts[first : first + cfg.group_size]
        assert len({r.group for r in group}) == 1, "a group was torn apart"
        for r in group:
            infra = r.status == "infra"
            filtered = cfg.overlong_filter and r.finish_reason == "length"
            assert infra or math.isfinite(r.reward), f"reward {r.reward} for {r.row['messages']}"
            r.trained = not infra and not filtered
        rewards = [r.reward for r in group if r.trained]
        # Equal rewards say nothing about which completion is better. They are compared, since by
        # rounding the std of equal rewards can be 1e-17, and dividing by it would invent a signal.
        all_equal = len(rewards) < 2 or max(rewards) == min(rewards)
        for r in group:
            # One rollout alone has nothing to be compared with.
            r.trained = r.trained and len(rewards) > 1
            r.advantage = 0.0
        if all_equal:
            continue
        mean = statistics.fmean(rewards)
        std = statistics.stdev(rewards)  # unbiased: divided by n - 1
        for r in group:
            if r.trained:
                r.advantage = (r.reward - mean) / (std + 1e-6)


def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """-sum of ratio * advantage over a micro-batch's completion tokens, over those of the batch.

    Token-level policy gradient, paper eq. 1. The denominator counts the tokens of all ranks and
    micro-batches (6.3), so the sum of the losses does not depend on how the batch was cut.
    """
    scored_M = batch["loss_index"]
    advantages_M = batch["advantages_T"][scored_M]
    # One update per batch (4.1.2): the policy is the one that sampled, so the ratio is exactly 1
    # and PPO's clip could never bind. Its gradient is the gradient of the log-prob.
    ratio_M = (logprobs_T - old_logprobs_T)[scored_M].exp()
    weights_M = sampler_correction(old_logprobs_T, batch, cfg.importance_limit)
    return -(weights_M * (ratio_M * advantages_M)).sum() / counts["tokens"]


def train_step(model, optimizer, rollouts, cfg, device, world):
    """One gradient update from the rollouts of all ranks; returns the metrics."""
    # The denominator: completion tokens of all ranks, before the batch is cut (sequences: RLHF's).
    in_loss = [r for r in rollouts if r.trained]
    num_tokens = sum(len(r.completion_ids) for r in in_loss)
    counts = all_reduce({"tokens": num_tokens, "sequences": len(in_loss)})

    # Pack: ranks get about equal shares of all rollouts, cut into micro-batches without padding.
    batches = collate(balance(rollouts, world), cfg, device)
    num_real = len(batches)
    # Collectives have to match, so a rank with fewer micro-batches adds dummies, which weigh 0.
    num_batches = int(all_reduce({"n": num_real}, "max")["n"])
    if num_real < num_batches:
        dummy = pack_rollouts([replace(rollouts[0], advantage=0.0)], device)
        batches += [dummy] * (num_batches - num_real)

    sums = {"loss": 0.0, "gap": 0.0, "entropy": 0.0, "scored": 0}
    for i, batch in enumerate(batches):
        is_real = i < num_real
        # Score: log-probs of the completion tokens under the policy, at the sampler's temperature.
        logprobs_T, entropy_T = model.token_logprobs(batch, temperature=cfg.temperature)
        # Loss: the old policy is this one, without gradient.
        loss = grpo_loss(logprobs_T, logprobs_T.detach(), batch, counts, cfg)
        # Backward: FSDP averages gradients over ranks, but the denominator is global already, so
        # multiply by the number of ranks to undo the average.
        weight = world if is_real else 0.0
        (loss * weight).backward()
        if is_real:
            gap_T = (logprobs_T.detach() - batch["sampler_logprobs_T"]).abs()
            sums["loss"] += loss.item()
            sums["gap"] += gap_T.sum().item()
            sums["entropy"] += entropy_T.detach().sum().item()
            sums["scored"] += len(batch["loss_index"])

    # Clip: average what FSDP has not averaged, then bound the norm of the whole gradient.
    average_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    grad_norm = float(grad_norm)

    # Update. A loss or gradient that is not finite is not applied (check_step ends a run of three).
    sums = all_reduce(sums)
    if math.isfinite(grad_norm + sums["loss"]) and num_batches:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    num_scored = max(sums["scored"], 1)
    return {
        "loss": sums["loss"],
        "gap": sums["gap"] / num_scored,
        "entropy": sums["entropy"] / num_scored,
        "grad_norm": grad_norm,
        "num_tokens": counts["tokens"],
    }


def evaluate(engine, rows, cfg, reward_hook, rank, world):
    """Mean metric of one sample per held-out row, at the training temperature, seeds fixed."""
    submit, collect = reward_hook
    rollouts = []
    for i in range(rank, len(rows), world):
        seed = request_seed(cfg.seed, 99, i)
        rollouts.append(Rollout(rows[i], i, rows[i]["prompt_ids"], seed))
    sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    engine.generate(rollouts, *sampling, on_finished=submit)
    collect(rollouts)
    scores = [metric(r) for r in rollouts if r.status != "infra"]
    scores = [score for score in scores if score is not None]
    sums = all_reduce({"score": sum(scores), "n": len(scores)})
    return sums["score"] / max(sums["n"], 1)


# ---- 6. main -------------------------------------------------------------------------------------
def main(cfg):
    lock(cfg.out_dir)
    rank, world, device = start_run(cfg)
    if cfg.prompts_per_step % world:
        fail(f"--prompts_per_step={cfg.prompts_per_step} is not a multiple of {world} ranks.")

    # Reward workers come first: they are forked while this process is still small.
    reward_hook = make_reward(cfg)
    rows = load_rows(cfg)
    eval_rows = []
    if cfg.eval_data:
        eval_rows = load_rows(replace(cfg, data=cfg.eval_data))[: cfg.eval_rows]
    self_test(rows, cfg)

    # The policy: the newest checkpoint of out_dir, else init_from.
    tokenizer, model, resume = load_policy(cfg, world, device)
    rows = encode_prompts(rows, tokenizer, cfg)
    if eval_rows:
        eval_rows = encode_prompts(eval_rows, tokenizer, cfg)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        weight_decay=cfg.weight_decay,
        fused=True,
    )

    # The state of a run besides weights and optimizer: which prompts come next, what was solved.
    start = 0
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}, "skipped": 0}
    data = prompts_checksum(rows)
    state |= load_history(cfg.init_from, data)
    if resume:
        start, state = load_checkpoint(resume, optimizer, cfg)
    state.setdefault("data", data)
    if set(all_gather(data)) != {state["data"]}:
        fail(
            f"data {cfg.data}: the rows are not the same on every rank, "
            f"or not those that {resume} was trained on."
        )

    engine = make_engine(cfg.engine, model, tokenizer)
    logger = Logger(cfg.out_dir, start)
    num_params = sum(p.numel() for p in model.parameters())
    print0(
        f"{resume or cfg.init_from} -> {cfg.out_dir}: {num_params / 1e6:.1f}M parameters, "
        f"{len(rows)} prompts, {world} ranks on {device.type}, "
        f"steps {start + 1}..{cfg.num_steps} of {cfg.prompts_per_step} x {cfg.group_size}"
    )

    for step in range(start + 1, cfg.num_steps + 1):
        # Rollout: sample completions of the next prompts, verify them, compute advantages.
        clock = time.time()
        indices = next_prompts(rows, state, cfg, select_rows)
        trained, sampled = rollout(engine, rows, indices, step, cfg, reward_hook, rank, world)
        generated = time.time()

        # Update: linear warm-up, linear decay, one gradient step, new weights for the sampler.
        warmup = min(1.0, step / max(cfg.warmup_steps, 1))
        decay = cfg.final_lr + (1 - cfg.final_lr) * (1 - step / cfg.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * warmup * decay
        metrics = summarize(sampled, monitor(sampled))
        metrics |= train_step(model, optimizer, trained, cfg, device, world)
        engine.sync(model)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        metrics["time/gen"] = generated - clock
        metrics["time/train"] = time.time() - generated

        # Remember how often each prompt was solved; stop if the step was broken.
        for counts in all_gather(count_correct(sampled)):
            state["history"] |= counts
        check_step(step, metrics, state, cfg)

        # Evaluate, log, show a sample, save.
        is_last = step == cfg.num_steps
        if cfg.eval_every and eval_rows and (step % cfg.eval_every == 0 or step == 1 or is_last):
            metrics["eval"] = evaluate(engine, eval_rows, cfg, reward_hook, rank, world)
        logger.log(step, metrics, console_line(step, cfg.num_steps, metrics))
        if cfg.sample_every and (step % cfg.sample_every == 0 or step == 1):
            show_sample(sampled[0])
        if step % cfg.save_every == 0 or is_last:
            folder = save_checkpoint(cfg.out_dir, step, model, optimizer, cfg, state)
    mark_final(cfg.out_dir, folder if start < cfg.num_steps else resume)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
