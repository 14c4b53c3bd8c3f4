"""RLHF: stage 2 of the cascade (paper 4.2 and 4.3). GRPO against the score of a reward model.

Reward: the scalar score of a Bradley-Terry reward model, which reads question and answer, never the
thinking. A reply that never closes its thinking earns the lowest score of the batch, one in another
language 10 less. Without --rm the reward model is trained first, on the pairs of --rm_data, and
kept in out_dir/rm; --rm takes any Hugging Face sequence classifier or the URL of a scoring
endpoint. Half of every batch of a unified run is answered in think mode, half in no_think (4.3.2).
A good run prints a pair accuracy of the reward model well over 0.7, and then a reward that rises
while len and trunc stay put.

    torchrun --nproc_per_node=8 rlhf.py --init_from=out/sft2/final --out_dir=out/rlhf

Deviations from the paper, numbered as in docs/paper.md: D1 language by letters of other scripts; D6
a reward model from Qwen3, of any size; D7 the stabilisers for small reward models are flags, off by
default; D8 the floor for a reply that never closes its thinking; D33 a group that agrees on another
language is not punished for it.
"""

import functools
import math
import operator
import os
import statistics
import time
from dataclasses import dataclass, replace

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
from lib.data import BadRow, first_nonempty, load_table, required_field
from lib.flags import Beta, PositiveFloat, PositiveInt, RolloutFlags, Share, TopP, parse_config
from lib.guard import check_step, fail, one_sentence
from lib.logs import Logger, console_line, show_sample, summarize
from lib.lora import base_policy
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
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/sft2/final"  # checkpoint of the stage before, or any Qwen3 folder
    out_dir: str = "out/rlhf"  # checkpoints and the log; an interrupted run resumes from it
    data: str = "nvidia/Nemotron-Cascade-RL-RLHF"  # hub id, folder, parquet, .json or .jsonl
    eval_data: str = ""  # held-out rows in the same schemas; "": no held-out metric
    seed: int = 0  # of sampling and of the order of prompts

    rm: str = ""  # reward model: a folder or an http(s) URL; "": train one
    rm_init_from: str = ""  # weights its training starts from [D6]; "": those of init_from
    rm_data: str = "nvidia/Nemotron-Cascade-RM-Training"  # chosen/rejected or HelpSteer rows
    rm_eval_data: str = ""  # held-out rows in the same schemas, for the pair accuracy; "": none
    rm_samples_per_step: PositiveInt = 256  # pairs per update, over all ranks; paper 4.2.2
    rm_epochs: PositiveInt = 1  # more were worse; paper 4.2.2
    rm_lr: PositiveFloat = 2e-6  # AdamW, 3% warm-up, then linear to 0 (G6); paper 4.2.2
    rm_max_len: PositiveInt = 8192  # tokens of question and answer; longer ones are dropped (G6)

    prompts_per_step: PositiveInt = (
        256  # prompts (groups) per step, over all ranks; paper T15 (128 in the text)
    )
    group_size: PositiveInt = 8  # completions per prompt (G); paper T15
    num_steps: PositiveInt = 800  # paper T15
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 12288  # 12K; paper T15
    rope_factor: float = 0.0  # YaRN factor, 2.0 above 32K tokens; 0: as in the checkpoint
    temperature: PositiveFloat = 0.6  # of sampling and of the loss; paper T15
    top_p: TopP = 0.95  # of sampling only (G4); paper T15
    top_k: int = 0  # of sampling only; 0: off
    # False: completions that are cut off are trained on, which teaches brevity; paper 4.3.2
    overlong_filter: bool = False
    # share of every batch that is answered in think mode; 1.0 for thinking models; paper 4.3.2
    think_share: Share = 0.5

    lr: PositiveFloat = 2e-6  # learning rate of AdamW; paper T15
    final_lr: Share = 1.0  # last learning rate as a fraction of lr, linear decay (G2)
    warmup_steps: int = 0  # steps of linear warm-up of the learning rate
    beta1: Beta = 0.9  # of AdamW; paper T15
    beta2: Beta = 0.95  # of AdamW; paper T15
    weight_decay: float = 0.01  # of AdamW; not stated in the paper (G3)
    grad_clip: PositiveFloat = 1.0  # most norm of the gradient; not stated in the paper (G3)
    importance_limit: float = 0.0  # off if 0; Cascade 2 takes 2 (engine.sampler_correction)

    kl_coef: float = 0.0  # weight of KL(policy || init_from) in the loss [D7]; paper 6.3: 1e-3
    sequence_level: bool = False  # loss: mean over sequences of their token means [D7]; paper 6.3
    shape_reward: bool = False  # reward: tanh of the z-score in the group [D7]; paper 6.3

    reward_workers: PositiveInt = 8  # parallel requests to a scoring endpoint, per rank
    eval_every: int = 20  # steps between held-out metrics; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    save_every: PositiveInt = 50  # steps between checkpoints


# ---- 2. Data -------------------------------------------------------------------------------------
# Fields of the sets of logged conversations (WildChat, LMSYS, Arena).
LOGGED = ("conversation", "conversations", "conversation_a")


def normalize(row, where):
    """One row of any known prompt set -> {"messages"}, ending with a user turn. BadRow drops it.

    A logged conversation gives its first user turn, because what follows answers another model.
    """
    name = first_nonempty(row, "prompt", "messages", *LOGGED)
    turns = as_messages(required_field(row, where, name, (str, list)), name)
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise BadRow("no user turn")
    last = users[0] if name in LOGGED else users[-1]
    if not turns[last]["content"].strip():
        raise BadRow("no user turn")
    kept = turns[: last + 1]
    if any(turn.get("tool_calls") for turn in kept):
        raise BadRow("a turn that calls a tool")
    return {"messages": [{"role": turn["role"], "content": turn["content"]} for turn in kept]}


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path). A unified run has two of each prompt, one for either mode.

    The first half of the rows has every prompt once, think_share of them in think mode.
    """
    rows = load_table(path or cfg.data, normalize, limit, cfg.ignore_fields)
    for number, row in enumerate(rows):
        row["number"] = number  # of the prompt
        row["think"] = thinks_at(number, cfg.think_share)
    if 0 < cfg.think_share < 1:
        rows += [row | {"think": not row["think"]} for row in rows]
    return rows


def thinks_at(turn, share):
    """Whether the mode of this turn is think: a share of the turns, spread evenly.

    It is where the rounded-down number of such turns grows, e.g. at every second one for 0.5.
    """
    return math.floor((turn + 1) * share) > math.floor(turn * share)


def select_rows(rows, epoch, history, cfg):
    """Indices of this epoch's rows, in order: each prompt once, in one of its modes.

    Prompts alternate from epoch to epoch, so that each is seen in both modes (G17). The order
    alternates as well, so that half of every batch, or think_share of it, is in think mode (paper
    4.3.2).
    """
    # {number of a prompt: {mode: index of its row}}. A mode can be missing: a prompt can name its
    # own (" /think" at its end), or be just too long in one of them.
    modes_of = {}
    for row in rows:
        modes_of.setdefault(row["number"], {})[row["think"]] = row["index"]

    # Each mode gets its prompts, in random order.
    by_mode = {True: [], False: []}
    for number in shuffled(list(modes_of), cfg.seed, epoch):
        think = thinks_at(number + epoch, cfg.think_share)
        if think not in modes_of[number]:
            think = not think
        by_mode[think].append(modes_of[number][think])

    # The two lists are merged evenly: entry k of n stands at (k + 1/2) / n of the epoch.
    places = []
    for indices in by_mode.values():
        for k, index in enumerate(indices):
            places.append(((k + 0.5) / len(indices), index))
    places.sort(key=operator.itemgetter(0))  # stable: think comes first where both share a place
    return [index for _, index in places]


# ---- 3. Reward -----------------------------------------------------------------------------------
def answer_of(rollout):
    """The text that is scored: what follows the thinking (paper 4.3.2).

    It is the whole reply in no_think mode, and where </think> is missing.
    """
    if not rollout.row["think"]:
        return rollout.text
    return rollout.text.rpartition("</think>")[2].strip()


# Share of a group that answers in another language only if it was asked for [D33].
ASKED_FOR = 0.75


def find_mixed(rollouts):
    """Whether each rollout mixes languages although its prompt is English [D1]."""
    for r in rollouts:
        prompt = " ".join(turn["content"] for turn in r.row["messages"])
        r.status = "" if language_ok(prompt, r.text) else "language"

    # A prompt can ask for another language in words that language_ok does not know. Nearly the
    # whole group then answers in it, and the floor would let a refusal win. Such a group is left
    # to the reward model [D33]. A held-out rollout is alone in its group and agrees with nobody.
    groups = {}
    for r in whole_groups(rollouts):
        groups.setdefault(r.group, []).append(r.status == "language")
    asked = set()
    for group, mixed in groups.items():
        if sum(mixed) >= 3 and sum(mixed) >= ASKED_FOR * len(mixed):
            asked.add(group)
    if asked:
        print0(f"reward: {len(asked)} of {len(groups)} groups agree on another language, no floor")
    return [r.status == "language" and r.group not in asked for r in rollouts]


def status_of(rollout, score, is_mixed):
    """Status of a rollout. Its score is None where the endpoint failed."""
    if is_mixed:
        return "language"
    if score is None:
        return "infra"
    if rollout.row["think"] and "</think>" not in rollout.text:  # [D8]
        return "no_answer"
    return "ok"


def lowest_ok_score(rollouts, scores):
    """Lowest score of all ranks' rollouts with status ok; 0 if there are none."""
    ok_scores = [s for r, s in zip(rollouts, scores, strict=True) if r.status == "ok"]
    lowest = min(ok_scores, default=math.inf)
    # The minimum over ranks is the maximum of the negated scores.
    lowest = -all_reduce({"lowest": -lowest}, "max")["lowest"]
    return lowest if math.isfinite(lowest) else 0.0


def mean_and_std(scores):
    """Mean and standard deviation of the scores of all ranks. None, a failure, does not count."""
    known = [s for s in scores if s is not None]
    squares = sum(s * s for s in known)
    sums = all_reduce({"n": len(known), "sum": sum(known), "squares": squares})
    n = max(sums["n"], 1)
    mean = sums["sum"] / n
    variance = max(sums["squares"] / n - mean**2, 0.0)
    return mean, math.sqrt(variance)


def shape_rewards(rollouts):
    """reward = tanh of the z-score in the group, for small reward models (paper 6.3) [D7]."""
    groups = {}
    for r in whole_groups(rollouts):
        if r.status != "infra":
            groups.setdefault(r.group, []).append(r)
    for group in groups.values():
        # A held-out rollout is alone in its group and keeps its score.
        if len(group) < 2:
            continue
        mean = statistics.fmean(r.reward for r in group)
        std = statistics.pstdev(r.reward for r in group)  # biased: divided by n
        for r in group:
            r.reward = math.tanh((r.reward - mean) / (std + 1e-6))


def reward_model_path(cfg):
    """Folder or URL of the reward model, whether given or trained here."""
    return cfg.rm or os.path.join(cfg.out_dir, "rm")


def make_reward(cfg):
    """(submit, collect): submit starts nothing, since collect scores all rollouts in one batch."""
    path = reward_model_path(cfg)
    if not cfg.rm and not os.path.exists(path):
        train_reward_model(cfg, path)
        if cfg.check:
            return None  # no step follows, and there is no reward model yet
    score = load_reward_model(path, rm_device(), cfg.reward_workers)

    def submit(rollout):
        """Do nothing: a single completion has to wait for the batch."""

    def collect(rollouts):
        """Set score, reward and status of the rollouts."""
        # Score: the reward model reads the conversation and the answer to it.
        conversations = [r.row["messages"] for r in rollouts]
        scores, seconds = timed(score, conversations, [answer_of(r) for r in rollouts])

        # Status: which replies are penalised, and where the endpoint failed.
        mixed = find_mixed(rollouts)
        for r, s, is_mixed in zip(rollouts, scores, mixed, strict=True):
            r.status = status_of(r, s, is_mixed)
            r.verify_s = seconds / len(rollouts)

        # Floor: a penalised reply earns the lowest score of the others, or 10 less (paper 4.3.2).
        lowest = lowest_ok_score(rollouts, scores)
        mean, std = mean_and_std(scores)
        floors = {"infra": math.nan, "no_answer": lowest, "language": lowest - 10.0}
        for r, s in zip(rollouts, scores, strict=True):
            r.score = floors.get(r.status, s)
            r.reward = r.score
            r.batch_mean = mean
            r.batch_std = std

        # Shape: the reward becomes the tanh of the z-score in the group; the score stays.
        if cfg.shape_reward:
            shape_rewards(rollouts)

    return submit, collect


def monitor(rollouts):
    """This stage's numbers for the log.

    rm_score and rm_std: mean and standard deviation of the reward model's raw scores over all
    ranks; the reward itself may be shaped. rm_group_std: that of the scores in a group, on average.
    """
    groups = {}
    for r in whole_groups(rollouts):
        if math.isfinite(r.score):
            groups.setdefault(r.group, []).append(r.score)
    group_stds = [statistics.pstdev(scores) for scores in groups.values()]
    n = max(len(rollouts), 1)
    return {
        "rm_score": sum(r.batch_mean for r in rollouts) / n,
        "rm_std": sum(r.batch_std for r in rollouts) / n,
        "rm_group_std": sum(group_stds) / max(len(group_stds), 1),
    }


def self_test(rows, cfg):
    """Before training: the reward model answers, and not with one number for everything."""
    if cfg.check and not cfg.rm and not os.path.exists(reward_model_path(cfg)):
        return  # make_reward has not trained it
    check_reward_model(reward_model_path(cfg), rows, cfg.reward_workers)


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """The score of one held-out rollout, with the floors and before shaping.

    It has no bounds, and it compares only with scores of the same reward model.
    """
    return rollout.score


# ---- The reference policy of the KL term in grpo_loss (paper 6.3) --------------------------------
@functools.cache
def reference_model(folder, rope_factor, device):
    """The frozen policy this stage started from, whatever checkpoint it was resumed from."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with one_sentence(f"--init_from={folder}, the reference of the KL term"):
        model = Qwen3.from_pretrained(folder, dtype=dtype, device=device, rope_factor=rope_factor)
    return model.requires_grad_(False)


@torch.no_grad()
def reference_logprobs(batch, cfg):
    """Log-probs [T] of a micro-batch's tokens under the reference, at the policy's temperature."""
    if cfg.lora_rank:
        # The policy without its adapters is what this stage started from.
        with base_policy() as model:
            logprobs_T, _ = model.token_logprobs(batch, temperature=cfg.temperature)
        return logprobs_T
    model = reference_model(cfg.init_from, cfg.rope_factor, batch["input_ids_T"].device)
    logprobs_T, _ = model.token_logprobs(batch, temperature=cfg.temperature)
    return logprobs_T


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

    indices: rows of this step's prompts. state: of the run (lib/prompts.py). reward_hook: submit(r)
    starts the verdict of a rollout in the background, collect waits for all and sets reward and
    status of each. Returns (for_update, sampled): this rank's rollouts for train_step and those for
    the log. They are the same but in IF-RL, whose dynamic sampling (4.4.2) replaces some groups.
    """
    submit, collect = reward_hook
    # A group is the group_size rollouts of one prompt. Seeds follow from the prompt's place in
    # indices and the sample, so that completions do not depend on ranks.
    rollouts = []
    for group, index in enumerate(indices):
        prompt_ids = rows[index]["prompt_ids"]
        for sample in range(cfg.group_size):
            seed = request_seed(cfg.seed, step, 0, group, sample)
            rollouts.append(Rollout(rows[index], group, prompt_ids, seed, sample))
    # Ranks take turns, so that the samples of a prompt with long answers are spread over them.
    rollouts = longest_first(rollouts, state)[rank::world]

    # Sample. The moment a completion ends, its verifier starts, while the others still decode.
    sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
    with counted(submit, f"step {step} rollout", len(rollouts)) as finished:
        engine.generate(rollouts, *sampling, on_finished=finished)
        # Verify: most verdicts are there by now, collect waits for the rest.
        collect(rollouts)

    compute_advantages(whole_groups(rollouts), cfg)
    return rollouts, rollouts


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
    """-(sum of ratio * advantage over this micro-batch's completion tokens) / (tokens of all).

    Token-level policy gradient, paper eq. 1, with the stabilisers of 6.3 on top: a KL term towards
    the policy this stage started from, and sequence-level averaging.
    """
    # CHANGED: the stabilisers for small reward models (paper 6.3) join the loss of other stages.
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
    if cfg.kl_coef > 0:
        # k3 = e^d - d - 1 with d = log reference - log policy. Its gradient is that of
        # KL(reference || policy), to first order also that of KL(policy || reference). Groups of
        # equal rewards were left out by collate and feel no pull.
        d_M = reference_logprobs(batch, cfg)[scored_M] - logprobs_T[scored_M]
        kl_M = d_M.exp() - d_M - 1
        loss_M = loss_M + cfg.kl_coef * kl_M
        batch["kl_sum"] = kl_M.detach().sum().item()  # for the log
    if cfg.sequence_level:
        # Every sequence counts the same: a token weighs 1 / the length of its sequence.
        sequence_M = torch.searchsorted(batch["cu_seqlens"].long(), scored_M, right=True)
        length_M = sequence_M.bincount()[sequence_M]
        return (loss_M / length_M).sum() / counts["sequences"]
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
