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
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from engine import Rollout, make_engine, request_seed, sampler_correction  # keep copies beside it
from lib.checkpoint import load_checkpoint, load_policy, lock, mark_final, save_checkpoint
from lib.common import all_gather, all_reduce, average_gradients, finish, print0, start_run
from lib.data import BadRow, as_messages, first_nonempty, load_table, required_field
from lib.flags import Beta, PositiveFloat, PositiveInt, RolloutFlags, Share, TopP, parse_config
from lib.guard import check_step, fail
from lib.logs import Logger, console_line, show_sample, summarize
from lib.packing import balance, collate, pack_rollouts
from lib.prompts import count_correct, encode_prompts, load_history, next_prompts, prompts_checksum
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
    # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    init_from: str = "out/sft2/final"
    out_dir: str = "out/rlhf"
    # prompts: hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-Cascade-RL-RLHF"
    eval_data: str = ""  # same schemas; "": no held-out metric
    # of the prompts answered in think mode; 1.0 for thinking-only models. Paper 4.3.2
    think_share: Share = 0.5
    rm: str = ""  # reward model folder or http(s) URL; "": train one
    # where training it starts; "": init_from. The paper: Qwen2.5-72B-Instruct [dev 1]
    rm_init_from: str = ""
    rm_data: str = "nvidia/Nemotron-Cascade-RM-Training"  # chosen/rejected or HelpSteer rows
    rm_eval_data: str = ""  # same schemas, for the pair accuracy
    rm_samples_per_step: PositiveInt = 256  # pairs per update; paper 4.2.2
    rm_epochs: PositiveInt = 1  # paper 4.2.2: longer was worse
    rm_lr: PositiveFloat = 2e-6  # AdamW, 3% warm-up, then linear to 0 (gap G6); paper 4.2.2
    rm_max_len: PositiveInt = (
        8192  # tokens of question and answer; longer pairs are dropped (gap G6)
    )
    # k3 estimate of KL(policy || init_from) in the loss; paper 6.3: 1e-3 [dev 2]
    kl_coef: float = 0.0
    sequence_level: bool = False  # mean over sequences of their token means; paper 6.3
    shape_reward: bool = False  # tanh of the group z-score; paper 6.3
    prompts_per_step: PositiveInt = 256  # over all ranks; paper T15 (128 in the text)
    group_size: PositiveInt = 8  # completions per prompt (G); paper T15
    num_steps: PositiveInt = 800  # paper T15
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 12288  # paper T15
    # YaRN factor; 2.0 once prompt + completion can pass 32K; 0: as the checkpoint has it
    rope_factor: float = 0.0
    temperature: PositiveFloat = 0.6  # of the sampler and of the trained log-probs; paper T15
    top_p: TopP = 0.95  # sampler only (gap G4); paper T15
    top_k: int = 0  # sampler only; 0: off
    # truncated completions are scored as they are, which teaches brevity; paper 4.3.2
    overlong_filter: bool = False
    lr: PositiveFloat = 2e-6  # AdamW; paper T15
    # last step's learning rate as a fraction of lr, linear; 1: constant (gap G2)
    final_lr: Share = 1.0
    warmup_steps: int = 0  # linear
    beta1: Beta = 0.9  # paper T15
    beta2: Beta = 0.95  # paper T15
    weight_decay: float = 0.01  # not stated in the paper (gap G3)
    grad_clip: PositiveFloat = 1.0  # not stated in the paper
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; 2: Cascade 2 eq. 3; 0: all
    # weigh 1
    importance_limit: float = 0.0
    reward_workers: PositiveInt = 8  # parallel requests to a scoring endpoint
    eval_every: int = 20  # steps; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    save_every: PositiveInt = 50  # steps
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
    return model.token_logprobs(batch, temperature=cfg.temperature)[0]


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
    """Sample a group of completions for each of this rank's prompts; verify them; set advantages.

    Returns (trained, sampled): the rollouts to train on and those to log. Here both are the same;
    IF-RL's dynamic sampling (paper 4.4.2) trains on others than it logs.
    """
    submit, collect = reward_hook
    # A group: group_size rollouts of one prompt. Every rank takes every world-th prompt.
    rollouts = []
    for group, index in enumerate(indices[rank::world]):
        prompt_ids = rows[index]["prompt_ids"]
        for sample in range(cfg.group_size):
            seed = request_seed(cfg.seed, step, 0, group * world + rank, sample)
            rollouts.append(Rollout(rows[index], group, prompt_ids, seed))

    # Sample. The moment a completion ends, its verifier starts, while the others still decode.
    no_bar = None if rank == 0 else True
    with tqdm(total=len(rollouts), desc=f"step {step} rollout", leave=False, disable=no_bar) as bar:

        def finished(r):
            submit(r)
            bar.update()

        sampling = (cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k)
        engine.generate(rollouts, *sampling, on_finished=finished)
        # Verify: wait for the verdicts that are not there yet.
        collect(rollouts)

    compute_advantages(rollouts, cfg)
    return rollouts, rollouts


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

    Token-level policy gradient, paper eq. 1, with the stabilisers of 6.3 on top: a KL term towards
    the policy this stage started from, and sequence-level averaging.
    """
    # CHANGED: the stabilisers for small reward models (paper 6.3) join the loss of the other stages.
    scored_M = batch["loss_index"]
    advantages_M = batch["advantages_T"][scored_M]
    # One update per batch (4.1.2): the policy is the one that sampled, so the ratio is exactly 1
    # and PPO's clip could never bind. Its gradient is the gradient of the log-prob.
    ratio_M = (logprobs_T - old_logprobs_T)[scored_M].exp()
    weights_M = sampler_correction(old_logprobs_T, batch, cfg.importance_limit)
    loss_M = -(weights_M * (ratio_M * advantages_M))
    if cfg.kl_coef > 0:
        # k3 = e^d - d - 1 with d = log reference - log policy. Its gradient is that of
        # KL(reference || policy), to first order also that of KL(policy || reference). Groups of
        # equal rewards were left out by collate and feel no pull.
        d_M = reference_logprobs(batch, cfg)[scored_M] - logprobs_T[scored_M]
        loss_M = loss_M + cfg.kl_coef * (d_M.exp() - d_M - 1)
    if cfg.sequence_level:
        # Every sequence counts the same: a token weighs 1 / the length of its sequence.
        sequence_M = torch.searchsorted(batch["cu_seqlens"].long(), scored_M, right=True)
        length_M = sequence_M.bincount()[sequence_M]
        return (loss_M / length_M).sum() / counts["sequences"]
    return loss_M.sum() / counts["tokens"]


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
