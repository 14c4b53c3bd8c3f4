"""Joint RL: all domains in every batch, the alternative to which the paper compares its cascade.

The paper trains domain after domain and says why (1 and 4.1.1): verifiers of unlike speed need not
wait for each other, and each domain has its own lengths, temperature and learning rate. This script
is the other way, so that the two can be compared (bench/orders.py). Every row carries the name of
its domain, which is a stage, and everything of a row is its stage's: how it is read and asked, its
reward, which of its completions stay out of the loss, whether flat groups are replaced (IF-RL) and
whether a KL term holds the policy back (RLHF). What a batch has once is this script's: sampling,
learning rate, denominator. Below the waterline two functions are not as in mathrl.py.

    torchrun --nproc_per_node=8 extras/jointrl.py --init_from=out/sft2/final --data="DOMAINS"

DOMAINS is for instance "rlhf --data=chat.jsonl --num_steps=80; mathrl --data=math.jsonl
--num_steps=50": stages with flags of their own, between semicolons. Of 130 prompts 80 are then
chat's, spread evenly over the batches.

Deviations from the paper, numbered as in docs/paper.md: D53 the filter of Math RL over epochs is
off, all domains have one learning rate.
"""

import functools
import importlib
import math
import os
import shlex
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

# The repository's root, since this script may be started by its path.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine import Rollout, make_engine, request_seed, sampler_correction
from extras.mopd import ask_teacher, load_teacher
from lib.check import end_before_training
from lib.checkpoint import load_checkpoint, load_policy, lock, mark_final, save_checkpoint
from lib.common import (
    all_reduce,
    average_gradients,
    finish,
    micro_batches,
    print0,
    start_run,
    whole_groups,
)
from lib.flags import (
    Beta,
    PositiveFloat,
    PositiveInt,
    RolloutFlags,
    Share,
    TopP,
    field_names,
    parse_config,
    underscores,
)
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, show_sample, summarize
from lib.optimizer import make_optimizer
from lib.packing import collate
from lib.progress import counted
from lib.prompts import (
    check_same_rows,
    encode_prompts,
    interleaved,
    load_history,
    longest_first,
    next_prompts,
    prompts_checksum,
    remember,
)


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/sft2/final"  # the SFT checkpoint; RLHF's KL term holds the policy to it
    out_dir: str = "out/jointrl"  # checkpoints and the log; an interrupted run resumes from it
    # the domains: stages with their own flags, separated by semicolons; num_steps is a domain's
    # share of the prompts, in proportion to that of the others
    data: str = ""
    eval_data: str = ""  # the same with held-out sets; "": no held-out metric
    seed: int = 0  # of sampling and of the order of prompts

    prompts_per_step: PositiveInt = 128  # prompts (groups) per step, over all ranks and domains
    group_size: PositiveInt = 8  # completions per prompt (G)
    num_steps: PositiveInt = 500  # of the whole run
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 24576  # of all domains
    rope_factor: float = 0.0  # YaRN factor, 2.0 above 32K tokens; 0: as in the checkpoint
    temperature: PositiveFloat = 1.0  # of sampling and of the loss
    top_p: TopP = 0.95  # of sampling only
    top_k: int = 0  # of sampling only; 0: off

    lr: PositiveFloat = 2e-6  # learning rate of AdamW
    final_lr: Share = 1.0  # last learning rate as a fraction of lr, linear decay
    warmup_steps: int = 0  # steps of linear warm-up of the learning rate
    beta1: Beta = 0.9  # of AdamW
    beta2: Beta = 0.95  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    grad_clip: PositiveFloat = 1.0  # most norm of the gradient
    importance_limit: float = 0.0  # off if 0; Cascade 2 takes 2 (engine.sampler_correction)

    eval_every: int = 20  # steps between held-out metrics; 0: never
    eval_rows: int = 1280  # held-out rows of all domains together, one sample each


# ---- 2. Data -------------------------------------------------------------------------------------
STAGES = ("rlhf", "ifrl", "mathrl", "coderl", "swerl")
# Flags that a domain has for itself although this script has them, too.
OF_A_DOMAIN = {"data", "num_steps"}


@functools.cache
def parse_domains(text):
    """{stage: Config of the stage} of --data."""
    domains = {}
    for part in text.split(";"):
        stage, *words = shlex.split(part) or [""]
        if stage not in STAGES or stage in domains:
            fail(
                f"--data: {part.strip()!r} does not begin with a stage that is not there yet "
                f"({', '.join(STAGES)}), e.g. mathrl --data=math.jsonl --num_steps=50."
            )
        given = {underscores(word).lstrip("-").partition("=")[0] for word in words}
        shared = given & field_names(Config) - OF_A_DOMAIN
        if shared:
            fail(f"--data: {stage} cannot have its own --{min(shared)}: give it to the whole run.")
        domains[stage] = parse_config(importlib.import_module(stage).Config, words)
        if getattr(domains[stage], "sequence_level", False):
            fail(f"--data: {stage}: --sequence_level=true has no place in a loss over tokens.")
    return domains


def domains_of(cfg):
    """{stage: Config of the stage}. What a domain cannot have for itself is this run's."""
    own = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    domains = {}
    for stage, stage_cfg in parse_domains(cfg.data).items():
        names = own.keys() & field_names(type(stage_cfg)) - OF_A_DOMAIN - {"eval_data"}
        domains[stage] = replace(stage_cfg, **{name: own[name] for name in names})
    return domains


def load_rows(cfg, path=None, limit=0):
    """Rows of all domains of cfg.data (or path), each as its stage loads it, with its domain.

    They are spread evenly, so that the first eval_rows of them are of all domains.
    """
    domains = []
    for stage, stage_cfg in domains_of(replace(cfg, data=path or cfg.data)).items():
        loaded = importlib.import_module(stage).load_rows(stage_cfg, limit=limit)
        domains.append([row | {"domain": stage} for row in loaded])
    return interleaved(domains)


def select_rows(rows, epoch, history, cfg):
    """Indices of this epoch's rows, in order: of each domain num_steps, spread evenly.

    A domain's prompts come in the order of its own stage, whose epochs have other lengths than
    this one: each epoch here goes on where the domain was.
    """
    taken = []
    for stage, stage_cfg in domains_of(cfg).items():
        count = stage_cfg.num_steps
        of_domain = [row for row in rows if row["domain"] == stage]
        taken.append(take_prompts(of_domain, stage, stage_cfg, epoch * count, count))
    return interleaved(taken)


def take_prompts(rows, stage, cfg, start, count):
    """Indices of `count` prompts of a domain, from the start-th that its stage would take.

    The stage sees no history, so Math RL's filter over epochs (4.5.2) is off [D53].
    """
    select = importlib.import_module(stage).select_rows
    # The stage counts the rows of its domain alone.
    numbered = [row | {"index": number} for number, row in enumerate(rows)]
    per_epoch = len(select(numbered, 0, {}, cfg))
    if not per_epoch:
        fail(f"--data: {stage} has no prompt of at most {cfg.max_prompt_tokens} tokens.")
    taken = []
    while len(taken) < count:
        epoch, position = divmod(start + len(taken), per_epoch)
        taken += select(numbered, epoch, {}, cfg)[position:][: count - len(taken)]
    return [rows[number]["index"] for number in taken]


def fresh_prompts(rows, stage, step, cfg):
    """Indices of a domain's rows in an order of this step."""
    of_domain = [row["index"] for row in rows if row["domain"] == stage]
    order = np.random.default_rng([cfg.seed, step, 7]).permutation(len(of_domain))
    return [of_domain[i] for i in order]


# ---- 3. Reward -----------------------------------------------------------------------------------
def make_reward(cfg):
    """(submit, collect): every rollout goes to the reward of its own stage."""
    hooks = {}
    for stage, stage_cfg in domains_of(cfg).items():
        hooks[stage] = importlib.import_module(stage).make_reward(stage_cfg)

    def submit(rollout):
        submit_one, _ = hooks[rollout.row["domain"]]
        return submit_one(rollout)

    def collect(rollouts):
        for stage, (_, collect_some) in hooks.items():
            of_domain = [r for r in rollouts if r.row["domain"] == stage]
            # Ranks wait for each other in RLHF's, so all call it or none.
            if all_reduce({"n": len(of_domain)})["n"]:
                collect_some(of_domain)

    return submit, collect


@functools.cache
def reference_model(folder, rope_factor):
    """The frozen policy that the run started from."""
    return load_teacher(folder, rope_factor)


def add_reference(rollouts, cfg):
    """Give the rollouts of a domain with a KL term their log-probs under the reference policy."""
    domains = domains_of(cfg)
    for r in rollouts:
        if getattr(domains[r.row["domain"]], "kl_coef", 0) > 0:
            reference = reference_model(cfg.init_from, cfg.rope_factor)
            logprobs = ask_teacher(reference, r, cfg.temperature)
            # Exactly 0 says that a token has no reference (grpo_loss).
            r.teacher_logprobs = [min(logprob, -1e-9) for logprob in logprobs]


def monitor(rollouts):
    """This stage's numbers for the log: of each domain its share of the rollouts, and what its
    rewards and tokens add to the mean over all. A domain's own mean is that over its share."""
    n = max(len(rollouts), 1)
    shares = {}
    for stage in STAGES:
        of_domain = [r for r in rollouts if r.row["domain"] == stage]
        scored = [r.reward for r in of_domain if r.status != "infra"]
        shares[f"{stage}/share"] = len(of_domain) / n
        shares[f"{stage}/reward"] = sum(scored) / n
        shares[f"{stage}/len"] = sum(len(r.completion_ids) for r in of_domain) / n
    return shares


def self_test(rows, cfg):
    """Before training: the self test of every domain's stage, on its own rows."""
    for stage, stage_cfg in domains_of(cfg).items():
        of_domain = [row for row in rows if row["domain"] == stage]
        importlib.import_module(stage).self_test(of_domain, stage_cfg)


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """The metric of the rollout's own stage. Their mean serves to watch a run, and nothing else:
    RLHF's has another scale."""
    return importlib.import_module(rollout.row["domain"]).metric(rollout)


# ~~~~~~~~ waterline: below it all RL stages are the same, line for line (tests/test_stage_diff.py)
# ---- 5. GRPO -------------------------------------------------------------------------------------
# A micro-batch is packed: whole sequences, one after another, without padding. Take the prompt
# [5, 6] and two rollouts: completion [7, 8], advantage 0.7; completion [9], advantage -0.7.
#
#     t               0    1    2    3    4    5    6
#     input_ids_T     5    6    7    8    5    6    9       T = 7 tokens
#     cu_seqlens      0                   4              7  starts of the sequences, and the end
#     loss_index                2    3              6       M = 3 completion tokens
#     advantages_T    0    0  0.7  0.7    0    0 -0.7       zero at prompt tokens
#     copy_T          0    1    2    3    0    1    4       an entry of first_U, see below
#
# Entry t of every _T tensor is about token t: logprobs_T[t] is its log-prob given the tokens before
# it. _M tensors run over loss_index. Rollouts of one prompt share its tokens, so the model computes
# U = 5 tokens, those at first_U = [0, 1, 2, 3, 6]. The result of token t is that of the token at
# first_U[copy_T[t]]: for token 4, the second 5, that is token 0.


def rollout(engine, rows, indices, step, state, cfg, reward_hook, rank, world):
    """Sample a group of completions for each prompt; verify them; set advantages.

    Returns (for_update, sampled): this rank's rollouts of the groups that are kept, and those of
    this step's own prompts for the log. They differ where IF-RL is among the domains.
    """
    # CHANGED: each domain has the masks and the dynamic sampling (paper 4.4.2) of its own stage.
    submit, collect = reward_hook
    domains = domains_of(cfg)
    wanted = Counter(rows[index]["domain"] for index in indices)
    prompts, num_drawn, drawn = list(indices), 0, []
    kept = {stage: [] for stage in domains}
    rounds = {stage: getattr(domains[stage], "max_refill_rounds", 0) for stage in domains}
    for number in range(max(1, *rounds.values())):
        # A domain that replaces flat groups samples as many fresh prompts as it wants groups, so
        # that one round is mostly enough. They may repeat a prompt of this step.
        for stage, count in wanted.items():
            if number < rounds[stage] and len(kept[stage]) < count:
                fresh = fresh_prompts(rows, stage, step, cfg)
                prompts += fresh[number * count :][:count]
        rollouts = []
        for group, index in enumerate(prompts[num_drawn:], num_drawn):
            prompt_ids = rows[index]["prompt_ids"]
            for sample in range(cfg.group_size):
                seed = request_seed(cfg.seed, step, 0, group, sample)
                rollouts.append(Rollout(rows[index], group, prompt_ids, seed, sample))
        if not rollouts:
            break
        num_drawn = len(prompts)
        # Ranks take turns, so that the samples of a prompt with long answers are spread over them.
        rollouts = longest_first(rollouts, state)[rank::world]

        # Sample. The moment a completion ends, its verifier starts, while the others still decode.
        sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
        with counted(submit, f"step {step} rollout", len(rollouts)) as finished:
            engine.generate(rollouts, *sampling, on_finished=finished)
            # Verify: most verdicts are there by now, collect waits for the rest.
            collect(rollouts)
        drawn += rollouts

        # Keep the first groups with a gradient; all of them where none is replaced.
        groups = whole_groups(rollouts)
        for stage, stage_cfg in domains.items():
            # Rollouts of other ranks have come without their rows.
            of_domain = [r for r in groups if rows[r.row["index"]]["domain"] == stage]
            compute_advantages(of_domain, stage_cfg)
            has_gradient = {r.group for r in of_domain if r.advantage != 0 or not rounds[stage]}
            kept[stage] = [*kept[stage], *sorted(has_gradient)][: wanted[stage]]
    kept_groups = {group for of_stage in kept.values() for group in of_stage}
    for_update = [r for r in drawn if r.group in kept_groups]
    add_reference(for_update, cfg)
    return for_update, [r for r in drawn if r.group < len(indices)]


def compute_advantages(rollouts, cfg):
    """advantage = (reward - mean) / (std + 1e-6) inside each group (paper eq. 1; G1).

    Rollouts without a verdict (make_reward's hook says "infra" where a worker failed), and
    truncated ones under overlong_filter, are left out of the loss, its denominator and the group
    statistics (G5).
    """
    for first in range(0, len(rollouts), cfg.group_size):
        group = rollouts[first : first + cfg.group_size]
        assert len({r.group for r in group}) == 1, "a group was torn apart"
        for r in group:
            infra = r.status == "infra"
            filtered = cfg.overlong_filter and r.finish_reason == "length"
            assert infra or math.isfinite(r.reward), f"reward {r.reward} in group {r.group}"
            r.in_loss = not infra and not filtered
        rewards = [r.reward for r in group if r.in_loss]
        # A rollout that is left alone has nothing to be compared with, so it leaves the loss, too.
        # A group of equal rewards stays in the denominator, with advantage 0. Compare the rewards:
        # by rounding, the std of equal ones can be 1e-17, and dividing by it would invent a signal.
        all_equal = len(rewards) < 2 or max(rewards) == min(rewards)
        for r in group:
            r.in_loss = r.in_loss and len(rewards) > 1
            r.advantage = 0.0
        if all_equal:
            continue
        mean = statistics.fmean(rewards)
        std = statistics.stdev(rewards)  # unbiased: divided by n - 1
        for r in group:
            if r.in_loss:
                r.advantage = (r.reward - mean) / (std + 1e-6)


def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """-(sum of ratio * advantage over this micro-batch's completion tokens) / counts["tokens"].

    Token-level policy gradient, paper eq. 1, over the tokens of all domains. RLHF's rows have its
    KL term towards the policy that the run started from (6.3).
    """
    # CHANGED: the KL term (paper 6.3), for the tokens that have a log-prob of the reference.
    scored_M = batch["loss_index"]
    advantages_M = batch["advantages_T"][scored_M]
    # One update per batch (4.1.2): the caller passes these log-probs, detached, as the old ones.
    # (The sampler's serve only the correction below.) exp(x - x.detach()) is 1, so PPO's clip
    # would never act, and its gradient is that of x: this is REINFORCE with the group's mean as
    # the baseline.
    ratio_M = (logprobs_T - old_logprobs_T)[scored_M].exp()
    # Sampler and trainer differ by rounding. With importance_limit, a token weighs exp(trainer -
    # sampler log-prob), or 0 beyond the limit. Off: every token weighs 1.
    weights_M = sampler_correction(old_logprobs_T, batch, cfg.importance_limit)
    loss_M = -(weights_M * (ratio_M * advantages_M))
    kl_coef = getattr(domains_of(cfg).get("rlhf"), "kl_coef", 0.0)
    if kl_coef > 0:
        # k3 as in rlhf.py. A log-prob of exactly 0 is that of a row without a reference.
        reference_M = batch["teacher_logprobs_T"][scored_M]
        d_M = torch.where(reference_M == 0, 0.0, reference_M - logprobs_T[scored_M])
        kl_M = d_M.exp() - d_M - 1
        loss_M = loss_M + kl_coef * kl_M
        batch["kl_sum"] = kl_M.detach().sum().item()  # for the log
    return loss_M.sum() / counts["tokens"]


def train_step(model, optimizer, rollouts, cfg, device, world):
    """One gradient update from the rollouts of all ranks; returns the metrics."""
    # The denominator: completion tokens of all ranks, before the batch is cut. (RLHF's loss can
    # average over sequences instead.)
    in_loss = [r for r in rollouts if r.in_loss]
    num_tokens = sum(len(r.completion_ids) for r in in_loss)
    counts = all_reduce({"tokens": num_tokens, "sequences": len(in_loss)})

    # Pack: micro-batches without padding, of equal cost on all ranks. Rollouts with advantage 0
    # have no gradient and are left out here: those outside the loss, and groups of equal rewards,
    # whose tokens were counted above. Every rank has to run as many forward and backward passes,
    # so one that runs out of rollouts gets dummies, which weigh 0.
    batches, num_real = collate(rollouts, cfg, device)

    sums = {"loss": 0.0, "gap": 0.0, "entropy": 0.0, "kl": 0.0, "scored": 0}
    for i, batch in enumerate(micro_batches(batches, model)):
        is_real = i < num_real
        # Score: log-probs of the completion tokens under the policy, at the sampler's temperature.
        logprobs_T, entropy_T = model.token_logprobs(batch, temperature=cfg.temperature)
        # Loss: the old log-probs are these, without gradient.
        loss = grpo_loss(logprobs_T, logprobs_T.detach(), batch, counts, cfg)
        # Backward: gradients are averaged over ranks later, but the denominator is global already,
        # so multiply by the number of ranks to undo the average.
        weight = world if is_real else 0.0
        (loss * weight).backward()
        if is_real:
            # gap: |log-prob of the trainer - log-prob of the sampler|, in nats
            gap_T = (logprobs_T.detach() - batch["sampler_logprobs_T"]).abs()
            sums["loss"] += loss.item()
            sums["gap"] += gap_T.sum().item()
            sums["entropy"] += entropy_T.detach().sum().item()
            sums["kl"] += batch.get("kl_sum", 0.0)  # set by a loss with a reference policy (6.3)
            sums["scored"] += len(batch["loss_index"])

    # Clip: average the gradients that FSDP has not averaged, then bound the norm of all of them.
    average_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    grad_norm = float(grad_norm)

    # Update, unless no rollout had a gradient, or loss or gradient is inf or nan (their sum is then
    # no finite number). check_step stops the training after three such steps in a row.
    sums = all_reduce(sums)
    if batches and math.isfinite(grad_norm + sums["loss"]):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    num_scored = max(sums["scored"], 1)
    return {
        "loss": sums["loss"],
        "gap": sums["gap"] / num_scored,
        "entropy": sums["entropy"] / num_scored,
        "kl": sums["kl"] / num_scored,
        "grad_norm": grad_norm,
        "num_tokens": counts["tokens"],
    }


def evaluate(engine, rows, cfg, reward_hook, rank, world):
    """Mean metric of one sample per held-out row, at the training temperature, seeds fixed."""
    submit, collect = reward_hook
    rollouts = []
    for i in range(rank, len(rows), world):
        seed = request_seed(cfg.seed, 99, i)  # 99 for step: the same each time
        rollouts.append(Rollout(rows[i], i, rows[i]["prompt_ids"], seed))
    sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    with counted(submit, "evaluation", len(rollouts)) as finished:
        engine.generate(rollouts, *sampling, on_finished=finished)
        collect(rollouts)
    # Rows without a score do not count: no verdict, or no tests to run (SWE RL).
    scores = [metric(r) for r in rollouts if r.status != "infra"]
    scores = [score for score in scores if score is not None]
    sums = all_reduce({"score": sum(scores), "n": len(scores)})
    return sums["score"] / max(sums["n"], 1)


# ---- 6. main -------------------------------------------------------------------------------------
def main(cfg):
    lock(cfg.out_dir)
    rank, world, device = start_run(cfg)
    if cfg.prompts_per_step * cfg.group_size < world:
        fail(f"--prompts_per_step x --group_size is less than a rollout for each of {world} ranks.")

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
    optimizer = make_optimizer(model, cfg)  # AdamW

    # The state of a run besides weights and optimizer: which prompts come next, how often each was
    # solved (a run on the same prompts as the one before goes on with its history), skipped steps.
    start = 0
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}, "skipped": 0}
    checksum = prompts_checksum(rows)
    state |= load_history(cfg.init_from, checksum)
    if resume:
        start, state = load_checkpoint(resume, optimizer, cfg)
    check_same_rows(checksum, state, resume, cfg)

    engine = make_engine(cfg.engine, model, tokenizer, cfg)
    if cfg.check or start >= cfg.num_steps:
        return end_before_training(rows, tokenizer, model, cfg, resume)
    logger = Logger(cfg, start)
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
        for_update, sampled = rollout(
            engine, rows, indices, step, state, cfg, reward_hook, rank, world
        )
        update_clock = time.time()

        # Update: the sampler frees its memory on a GPU. Linear warm-up, linear decay, one gradient
        # step, new weights for the sampler.
        engine.sleep()
        warmup = min(1.0, step / max(cfg.warmup_steps, 1))
        decay = cfg.final_lr + (1 - cfg.final_lr) * (1 - step / cfg.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * warmup * decay
        metrics = summarize(sampled, monitor(sampled))
        metrics |= train_step(model, optimizer, for_update, cfg, device, world)
        engine.sync(model)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        metrics["time/gen"] = update_clock - clock
        metrics["time/train"] = time.time() - update_clock

        # Remember how often each prompt was solved; stop if the step was broken.
        remember(whole_groups(sampled), state)
        check_step(step, metrics, state, cfg)

        # Evaluate, log, show a sample, save.
        is_last = step == cfg.num_steps
        if cfg.eval_every and eval_rows and (step % cfg.eval_every == 0 or step == 1 or is_last):
            metrics["eval"] = evaluate(engine, eval_rows, cfg, reward_hook, rank, world)
        logger.log(step, metrics, console_line(step, cfg.num_steps, metrics), sampled)
        if cfg.sample_every and (step % cfg.sample_every == 0 or step == 1):
            show_sample(sampled[0])
        if step % cfg.save_every == 0 or is_last:
            folder = save_checkpoint(cfg.out_dir, step, model, optimizer, cfg, state)
    mark_final(cfg.out_dir, folder)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
