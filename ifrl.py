"""IF-RL: stage 3 of the cascade, verifiable instructions (paper 4.4).

Reward: 1 if the answer follows every constraint of its prompt, else 0. This is the paper's unified
model, which answers without thinking. --think=True trains the thinking model, which earns
1 + sigmoid(z) where all constraints hold, else 0; z is the reward model's score of the answer,
normalised in its group.

Two things besides the reward are not as in mathrl.py. Dynamic sampling (max_refill_rounds): a group
whose rewards are all equal makes room for the group of a fresh prompt. Curriculum (taxonomy): first
prompts with IFEval's 25 constraints only, then prompts with any of 29 further constraints.

    torchrun --nproc_per_node=8 ifrl.py --init_from=out/rlhf/final --taxonomy=ifeval

In a good run the reward rises while len stays. If under_20_words rises, the policy farms the
constraints that a short reply follows by itself. A reply that is cut off is judged as it stands
(G15), and no reply for its language (G14). refused_by_guards is the share of the replies that
follow their constraints by the letter alone.

Deviations from the paper, numbered as in docs/paper.md: D9 256 prompts a step; D10 z over all
rollouts of a group; D12 no random parameters; D13 a very long answer follows nothing. Training asks
for more than the references' checks, by which evaluation counts (verifiers/constraint_guards.py):
D11 a language that can be told; D34 forms that hold words; D35 only what a reader sees counts; D36
neither repetition nor a copy of the prompt; D37 the words of the instruction are meant.
"""

import ast
import json
import math
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine import Rollout, make_engine, request_seed, sampler_correction  # keep copies beside it
from lib.chats import as_messages
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
from lib.data import BadRow, load_table, required_field
from lib.flags import Beta, PositiveFloat, PositiveInt, RolloutFlags, Share, TopP, parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, show_sample, summarize
from lib.optimizer import make_optimizer
from lib.packing import collate
from lib.progress import counted
from lib.prompts import (
    check_same_rows,
    encode_prompts,
    load_history,
    longest_first,
    next_prompts,
    prompts_checksum,
    remember,
    shuffled,
)
from verifiers.constraint_guards import objection
from verifiers.constraint_workers import in_processes
from verifiers.constraints import CHECKS, IFEVAL, check, clean_kwargs, unusable
from verifiers.reward_model import check_reward_model, load_reward_model, rm_device


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/rlhf/final"  # checkpoint of the stage before, or any Qwen3 folder
    out_dir: str = "out/ifrl"  # checkpoints and the log; an interrupted run resumes from it
    # hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-Cascade-RL-Instruction-Following"
    eval_data: str = ""  # held-out rows in the same schemas; "": no held-out metric
    seed: int = 0  # of sampling and of the order of prompts

    # False: the unified model, where constraints alone decide; True: the thinking model, which a
    # reward model judges as well
    think: bool = False
    rm: str = "out/rlhf/rm"  # reward model, a folder or URL as in rlhf.py; read with --think=True
    # prompts to train on: ifeval (with IFEval's 25 constraints only, first), iftrain (with any of
    # the 29 others, second) or all
    taxonomy: str = "all"
    # in training, a reply that follows its constraints by the letter alone earns nothing
    # [D11, D13, D34-D37]; False: the references' rules decide, as in evaluation
    guards: bool = True

    prompts_per_step: PositiveInt = (
        256  # prompts (groups) per step, over all ranks; paper T16 (128 in the text) [D9]
    )
    group_size: PositiveInt = 8  # completions per prompt (G); paper T16
    # paper T16: 2300, then 800 more for iftrain (thinking model: 550, then 300)
    num_steps: PositiveInt = 2300
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 8192  # paper T16 (thinking model: 16K for iftrain)
    rope_factor: float = 0.0  # YaRN factor, 2.0 above 32K tokens; 0: as in the checkpoint
    temperature: PositiveFloat = 0.6  # of sampling and of the loss; paper T16
    top_p: TopP = 0.95  # of sampling only (G4); paper T16
    top_k: int = 20  # of sampling only; 0: off; paper 4.4.2
    # completions that are cut off are not trained on (G5); paper T16: only in the thinking
    # model's iftrain run
    overlong_filter: bool = False
    # dynamic sampling: most rounds of fresh prompts for groups of equal rewards (G16); 0: off;
    # paper 4.4.2
    max_refill_rounds: int = 4

    lr: PositiveFloat = 2e-6  # learning rate of AdamW; paper T16
    final_lr: Share = 1.0  # last learning rate as a fraction of lr, linear decay (G2)
    warmup_steps: int = 0  # steps of linear warm-up of the learning rate
    beta1: Beta = 0.9  # of AdamW
    beta2: Beta = 0.95  # of AdamW
    weight_decay: float = 0.01  # of AdamW; not stated in the paper (G3)
    grad_clip: PositiveFloat = 1.0  # most norm of the gradient; not stated in the paper (G3)
    importance_limit: float = 0.0  # off if 0; Cascade 2 takes 2 (engine.sampler_correction)

    reward_workers: PositiveInt = 8  # verifier processes per rank
    eval_every: int = 20  # steps between held-out metrics; 0: never
    eval_rows: int = 541  # held-out rows, one sample each; all of IFEval
    save_every: PositiveInt = 50  # steps between checkpoints


# ---- 2. Data -------------------------------------------------------------------------------------
def normalize(row, where):
    """One row of any set -> {"messages", "instruction_id_list", "kwargs"}. BadRow drops it."""
    ids, kwargs, prompt = read_constraints(row, where)
    messages = []
    for turn in as_messages(prompt):
        if turn.get("tool_calls"):
            raise BadRow("a turn that calls a tool")
        messages.append({"role": turn["role"], "content": turn["content"]})
    # IF-RL samples its own replies, so a reply at the end of the row is taken off.
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or not messages[-1]["content"].strip():
        raise BadRow("no prompt")
    well_formed = is_list_of(ids, str) and is_list_of(kwargs, (dict, type(None)))
    if not well_formed or not ids or len(ids) != len(kwargs):
        raise BadRow("no constraints, or not one kwargs object for each")
    kwargs = [clean_kwargs(arguments) for arguments in kwargs]
    for instruction_id, arguments in zip(ids, kwargs, strict=True):
        # A constraint that lacks a parameter is unusable; the reference draws a random one [D12].
        reason = unusable(instruction_id, arguments)
        if reason:
            raise BadRow(reason)
    return {"messages": messages, "instruction_id_list": list(ids), "kwargs": kwargs}


def read_constraints(row, where):
    """(instruction ids, kwargs, prompt) of a row in any of the four schemas (docs/data.md).

    The prompt is a text or a list of chat messages.
    """
    if "instruction_id_list" in row or "ground_truth" not in row:
        ids = required_field(row, where, "instruction_id_list", list)
        kwargs = required_field(row, where, "kwargs", list)
        return ids, kwargs, row.get("prompt") or row.get("messages") or ""
    # allenai's sets have [{"instruction_id", "kwargs"}] as text: a Python literal, or JSON.
    for parse in (ast.literal_eval, json.loads):
        try:
            truth = parse(required_field(row, where, "ground_truth"))
            if isinstance(truth, list):
                truth = truth[0]
            ids, kwargs = truth["instruction_id"], truth["kwargs"]
            return ids, kwargs, required_field(row, where, "messages", list)
        except (ValueError, SyntaxError, LookupError, TypeError):  # BadRow is a ValueError
            continue
    raise BadRow("ground_truth holds no instruction_id and kwargs")


def is_list_of(values, kinds):
    """True for a list in which every value is an instance of kinds."""
    return isinstance(values, list) and all(isinstance(value, kinds) for value in values)


def taxonomy_of(row):
    """ifeval if all constraints of a row are among IFEval's 25, else iftrain."""
    return "ifeval" if set(row["instruction_id_list"]) <= IFEVAL.keys() else "iftrain"


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path): only constraints that can be verified, only of cfg.taxonomy."""
    if cfg.taxonomy not in ("all", "ifeval", "iftrain"):
        fail(f"--taxonomy={cfg.taxonomy}: expected all, ifeval or iftrain.")
    path = path or cfg.data
    # Held-out rows are measured whole, whatever this run trains on.
    keep_all = cfg.taxonomy == "all" or path == cfg.eval_data

    def normalize_and_select(row, where):
        normal = normalize(row, where)
        if not keep_all and taxonomy_of(normal) != cfg.taxonomy:
            raise BadRow(f"not of taxonomy {cfg.taxonomy}")
        return {**normal, "think": cfg.think}

    rows = load_table(path, normalize_and_select, limit, cfg.ignore_fields)
    counts = Counter()
    for row in rows:
        counts.update(row["instruction_id_list"])
    num_beyond = sum(taxonomy_of(row) == "iftrain" for row in rows)
    print0(
        f"data {path}: {len(rows)} prompts, {sum(counts.values())} constraints of "
        f"{len(counts)} kinds, {num_beyond} prompts with ids beyond IFEval's 25"
    )
    return rows


def select_rows(rows, epoch, history, cfg):
    """Indices of this epoch's rows, in order: all of them.

    Dynamic sampling replaces the prompts that are too easy or too hard.
    """
    return shuffled(range(len(rows)), cfg.seed, epoch)


# ---- 3. Reward -----------------------------------------------------------------------------------
# In training a longer answer follows no constraint, so that a verdict's time has a bound [D13].
MAX_CHARS = 50_000


def answer_of(text):
    """The text after the last </think>, or all of it where that tag is missing."""
    return text.rpartition("</think>")[2]


def verify(text, think, instruction_id_list, kwargs, guards=True, prompt=""):
    """(followed, status) of a completion's answer, which with think is the text after </think>.

    followed is evaluation's: a bool for each constraint, by the references' rules. status is
    training's: "ok" if all are followed, and with guards only if there is no objection to the
    answer (verifiers/constraint_guards.py), which reads the prompt too. Guards also bound the
    length of an answer; a longer one follows nothing.
    """
    answer = text
    if think:
        # Stripped, so that the blank line after the tag is no empty first paragraph.
        answer = answer_of(text).strip()
    if not answer.strip() or (think and "</think>" not in text):
        return [False] * len(instruction_id_list), "no_answer"

    # Prompt-level strict: the reward asks for all constraints, the log for each.
    too_long = guards and len(answer) > MAX_CHARS  # [D13]
    followed = []
    for instruction_id, arguments in zip(instruction_id_list, kwargs, strict=True):
        followed.append(not too_long and check(instruction_id, arguments, answer))

    status = "ok" if all(followed) else "wrong"
    # The references take much for followed that is no answer, which a policy finds: symbols for a
    # language, empty brackets, one word again and again [D11] [D34] [D35] [D36] [D37].
    if status == "ok" and guards and objection(instruction_id_list, kwargs, answer, prompt):
        status = "wrong"
    return followed, status


def reward(response, instruction_id_list, kwargs, prompt=""):
    """1 if the answer follows every constraint in earnest, else 0: the unified model's reward.

    Training's rules decide; check() has those of evaluation.
    """
    # A response with a think tag is a thinking model's, so its answer stands after the tag.
    think = re.search("</?think>", response) is not None
    _, status = verify(response, think, instruction_id_list, kwargs, prompt=prompt)
    return 1 if status == "ok" else 0


def add_preference(rollouts, scores):
    """Set the thinking model's rewards: 1 + sigmoid(z) where all constraints hold, else 0.

    scores: the reward model's, None where its endpoint failed, which makes an infra failure.
    """
    for rollout, score in zip(rollouts, scores, strict=True):
        rollout.score = score
    groups = {}
    for rollout in whole_groups(rollouts):
        groups.setdefault(rollout.group, []).append(rollout)
    for members in groups.values():
        # Mean and std are those of all rollouts, also of the ones that break a constraint [D10].
        known = [rollout.score for rollout in members if rollout.score is not None]
        mean = statistics.fmean(known) if known else 0.0
        std = statistics.stdev(known) if len(known) > 1 else 0.0  # unbiased: divided by n - 1
        for rollout in members:
            z = 0.0  # where all scores are equal
            if rollout.score is None:
                rollout.status = "infra"
            elif std > 0:
                z = (rollout.score - mean) / std
            rollout.reward = 0.0
            if rollout.status == "ok":
                preference = 1 / (1 + math.exp(-z))
                rollout.reward = 1 + preference


def make_reward(cfg):
    """(submit, collect): start a rollout's verdict in the background; wait for all verdicts.

    For the thinking model, collect also asks the reward model. In every sample_every-th call it
    prints which constraints are followed least and most often.
    """

    def arguments(rollout):
        row = rollout.row
        ids, kwargs = row["instruction_id_list"], row["kwargs"]
        prompt = row["messages"][-1]["content"] if row["messages"] else ""
        return rollout.text, row["think"], ids, kwargs, cfg.guards, prompt

    submit, wait = in_processes(cfg.reward_workers, verify, arguments)
    num_calls = 0

    def collect(rollouts):
        nonlocal num_calls
        # Constraints: wait for the verdicts that are not there yet.
        for rollout, verdict in zip(rollouts, wait(rollouts), strict=True):
            if verdict is None:
                # A keyword that takes too long as a pattern is not the policy's fault: masked.
                verdict = [False] * len(rollout.row["kwargs"]), "infra"
            rollout.followed, rollout.status = verdict
            rollout.reward = 1.0 if rollout.status == "ok" else 0.0
        if cfg.think:
            # Preference: the reward model, loaded in the first call, reads prompt and answer.
            score = load_reward_model(cfg.rm, rm_device(), cfg.reward_workers)
            prompts = [rollout.row["messages"] for rollout in rollouts]
            answers = [answer_of(rollout.text).strip() for rollout in rollouts]
            add_preference(rollouts, score(prompts, answers))
        num_calls += 1
        if cfg.sample_every and num_calls % cfg.sample_every == 0:
            print0(extremes(monitor(rollouts)))

    return submit, collect


def monitor(rollouts):
    """This stage's numbers for the log, as shares of all rollouts.

    They are the short replies, the replies that the references' rules would have paid and training
    does not, and how often each constraint was given and followed by the references' rules.
    """
    num_short, num_refused = 0, 0
    given, followed = Counter(), Counter()
    for r in rollouts:
        num_short += len(answer_of(r.text).split()) < 20
        num_refused += all(r.followed) and r.status == "wrong"
        for instruction_id, holds in zip(r.row["instruction_id_list"], r.followed, strict=True):
            given[instruction_id] += 1
            followed[instruction_id] += holds
    n = max(len(rollouts), 1)
    shares = {"under_20_words": num_short / n, "refused_by_guards": num_refused / n}
    # All 54 constraints are listed, given or not, because the ranks add their lists up.
    for name in CHECKS:
        shares[f"given/{name}"] = given[name] / n
        shares[f"followed/{name}"] = followed[name] / n
    return shares


def extremes(shares, k=5):
    """One line with the constraints followed least and most often. shares: from monitor."""
    rates = []
    for name in CHECKS:
        given = shares[f"given/{name}"]
        if given:
            rates.append((shares[f"followed/{name}"] / given, name))
    rates.sort()
    lowest = ", ".join(f"{name} {rate:.0%}" for rate, name in rates[:k])
    highest = ", ".join(f"{name} {rate:.0%}" for rate, name in rates[-k:])
    short = shares["under_20_words"]
    return f"  followed least: {lowest} | most: {highest} | under 20 words: {short:.0%}"


def self_test(rows, cfg):
    """Before training, on a sample: an empty reply earns 0, and every constraint is decidable.

    There are no gold replies to test with.
    """
    for row in random.Random(cfg.seed).sample(rows, min(64, len(rows))):
        ids, kwargs = row["instruction_id_list"], row["kwargs"]
        undecidable = [unusable(*pair) for pair in zip(ids, kwargs, strict=True)]
        if reward("", ids, kwargs) or any(undecidable):
            fail(
                f"verifier self test: {ids} with {kwargs} rewards an empty reply "
                "or cannot be decided."
            )
    if cfg.think:
        check_reward_model(cfg.rm, rows, cfg.reward_workers)


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """1 if a held-out rollout follows every constraint by the references' rules, without guards.

    The mean over rollouts is the prompt-level strict accuracy.
    """
    return float(all(rollout.followed))


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
    """Sample groups of completions until enough have unequal rewards; verify them; set advantages.

    Returns (for_update, sampled): this rank's rollouts of the groups that are kept, and those of
    this step's own prompts for the log, which are an unbiased view of the policy.
    """
    # CHANGED: dynamic sampling (paper 4.4.2, DAPO). A group of equal rewards has no gradient; it
    # makes room for the group of a fresh prompt.
    submit, collect = reward_hook
    wanted = len(indices)
    # After this step's prompts come fresh ones, from a permutation of all rows, so they may repeat
    # one of this step. Of this sequence the first groups with a gradient are kept, however many are
    # sampled at once.
    fresh = np.random.default_rng([cfg.seed, step, 7]).permutation(len(rows))
    prompts = [*indices, *fresh][: wanted * (1 + cfg.max_refill_rounds)]
    drawn, kept, num_drawn = [], [], 0
    for _ in range(1 + cfg.max_refill_rounds):
        # A round waits for its longest completion, so one large round is quicker than two. Sample
        # more groups than are missing: as many as were flat in the step before will be, and two
        # standard deviations on top.
        missing, flat = wanted - len(kept), state.get("flat", 0.0)
        share_kept = max(1 - flat, 1 / (1 + cfg.max_refill_rounds))
        end = num_drawn + math.ceil((missing + 2 * math.sqrt(missing * flat)) / share_kept)
        rollouts = []
        for group, index in enumerate(prompts[num_drawn:end], num_drawn):
            prompt_ids = rows[index]["prompt_ids"]
            for sample in range(cfg.group_size):
                seed = request_seed(cfg.seed, step, 0, group, sample)
                rollouts.append(Rollout(rows[index], group, prompt_ids, seed, sample))
        num_drawn = min(end, len(prompts))
        # Ranks take turns, so that the samples of a prompt with long answers are spread over them.
        rollouts = longest_first(rollouts, state)[rank::world]

        # Sample. The moment a completion ends, its verifier starts, while the others still decode.
        sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
        with counted(submit, f"step {step} rollout", len(rollouts)) as finished:
            engine.generate(rollouts, *sampling, on_finished=finished)
            # Verify: most verdicts are there by now, collect waits for the rest.
            collect(rollouts)

        # Keep the groups with a gradient; all of them where dynamic sampling is off.
        groups = whole_groups(rollouts)
        compute_advantages(groups, cfg)
        has_gradient = {r.group for r in groups if r.advantage != 0}
        if cfg.max_refill_rounds == 0:
            has_gradient = {r.group for r in groups}
        kept += sorted(has_gradient)
        drawn += rollouts
        # All ranks know all groups, so they stop in the same round.
        if len(kept) >= wanted or num_drawn == len(prompts):
            break
    first_kept = set(kept[:wanted])
    for_update = [r for r in drawn if r.group in first_kept]
    return for_update, [r for r in drawn if r.group < wanted]


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

    Token-level policy gradient, paper eq. 1. The denominator is the number of completion tokens of
    the whole batch, on all ranks (6.3; G8), so the result does not depend on how the batch was cut.
    """
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
    return -(weights_M * (ratio_M * advantages_M)).sum() / counts["tokens"]


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
