"""Math RL: stage 4 of Nemotron-Cascade (arXiv 2512.13607, section 4.5). The RL stage to read first.

New to GRPO? Read from section 5 down, then sections 1 to 4. One step of main():

    rollouts  = engine.generate(prompts x group_size)  each keeps its tokens and their log-probs
    reward    = judge(rollout)                         1 right, 0 wrong, -1 another language
    advantage = (reward - mean of its group) / std     one number for all tokens of a completion
    loss      = -(sum over completion tokens of ratio * advantage) / (their number in the batch)
                                                       ratio is 1: one update per batch (4.1.2)
    optimizer.step(); engine.sync(model)               one update; the sampler gets the new weights

Reward: 1 if the last \\boxed{} after </think> holds the gold answer, 0 if not, -1 if the reasoning
leaves the language of the prompt. Completions may grow to 24K, 32K, 40K tokens in three runs.

    torchrun --nproc_per_node=8 mathrl.py --init_from=out/ifrl/final --out_dir=out/mathrl

4.1.2 is a section of the paper, T17 its table 17, G1 a choice where it is silent (docs/paper.md).
Deviations: D1 language by Unicode scripts; D14, D15, D26, D27, D28 what equals the gold answer; D39
the instruction is in our own words.
"""

import math
import random
import re
import statistics
import time
from dataclasses import dataclass, replace

import torch

from engine import Rollout, make_engine, request_seed, sampler_correction  # keep copies beside it
from lib.chats import only_question
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
from lib.data import (
    BadRow,
    cache_folder,
    first_nonempty,
    load_table,
    one_row_each,
    required_field,
)
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
from verifiers.answers import (
    answer_pool,
    boxed_response,
    compare,
    count_boxes,
    last_box,
    sound_rows,
)
from verifiers.language import language_ok
from verifiers.pool import in_background


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/ifrl/final"  # checkpoint of the stage before, or any Qwen3 folder
    out_dir: str = "out/mathrl"  # checkpoints and the log; an interrupted run resumes from it
    data: str = "nvidia/Nemotron-Cascade-RL-Math"  # hub id, folder, parquet, .json or .jsonl
    eval_data: str = ""  # held-out rows in the same schemas; "": no held-out metric
    seed: int = 0  # of sampling and of the order of prompts

    prompts_per_step: PositiveInt = 128  # prompts (groups) per step, over all ranks; T17
    group_size: PositiveInt = 8  # completions per prompt (G); T17
    num_steps: PositiveInt = 190  # 190 in the first run, then 240 and 70; T17
    max_prompt_tokens: PositiveInt = 2048  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 24576  # 24K in the first run, then 32K and 40K; T17
    rope_factor: float = 0.0  # YaRN factor, 2.0 above 32K tokens; 0: as in the checkpoint
    temperature: PositiveFloat = 1.0  # of sampling and of the loss; 1.0, 1.0, 0.8 in T17
    top_p: TopP = 0.95  # of sampling only (G4); T17
    top_k: int = 0  # of sampling only; 0: off
    overlong_filter: bool = True  # completions that are cut off stay out of the loss (G5)
    readmit_hard: Share = 0.10  # chance to stay of a problem that no rollout solved; 4.5.2
    readmit_easy: Share = 0.01  # chance to stay of a problem that every rollout solved

    lr: PositiveFloat = 2e-6  # learning rate of AdamW; T17
    final_lr: Share = 1.0  # last learning rate as a fraction of lr, linear decay (G2)
    warmup_steps: int = 0  # steps of linear warm-up of the learning rate
    beta1: Beta = 0.9  # of AdamW; T17
    beta2: Beta = 0.95  # of AdamW; T17
    weight_decay: float = 0.01  # of AdamW; not stated in the paper (G3)
    grad_clip: PositiveFloat = 1.0  # most norm of the gradient; not stated in the paper (G3)
    importance_limit: float = 0.0  # off if 0; Cascade 2 takes 2 (engine.sampler_correction)

    reward_workers: PositiveInt = 8  # verifier processes per rank
    eval_every: int = 20  # steps between held-out metrics; 0: never
    eval_rows: int = 256  # held-out rows, one sample each


# ---- 2. Data -------------------------------------------------------------------------------------
INSTRUCTION = (  # [D39]
    "Solve the problem step by step. Put the final answer, and nothing else, inside \\boxed{}.\n\n"
)
# DAPO-Math-17k wraps its problems in an instruction of its own, which asks for "Answer:".
DAPO = re.compile(
    r"Solve the following math problem step by step\..*?\n\n(.*)\n\nRemember to put your answer.*",
    re.S,
)


def normalize(row, where):
    """One row of any known math set -> {"messages", "think", "answer"}; BadRow drops a row."""
    name = first_nonempty(row, "problem", "question", "prompt")
    problem = only_question(required_field(row, where, name, (str, list)), name)
    problem = DAPO.sub(r"\1", problem)
    name, gold = find_answer(row, where)
    if isinstance(gold, float) and not math.isfinite(gold):
        raise BadRow(f'field "{name}" is {gold}')  # pandas writes NaN where nothing is
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        raise BadRow(f'field "{name}" is neither text nor a number')
    gold = str(gold)
    # A written solution instead of a bare answer: its last box, or in GSM8K what follows ####.
    if "\\boxed" in gold:
        gold = last_box(gold) or ""
    gold = gold.rpartition("####")[2].strip()
    if not problem or not gold:
        raise BadRow("empty problem or answer")
    messages = [{"role": "user", "content": INSTRUCTION + problem}]
    return {"messages": messages, "think": True, "answer": gold}


def find_answer(row, where):
    """(name, value) of the field with the answer. Stops the run if the row has none of them."""
    if not {"answer", "expected_answer", "reward_model", "solution"} & row.keys():
        required_field(row, where, "answer")  # stops the run with a sentence
    nested = row.get("reward_model")
    ground_truth = nested.get("ground_truth") if isinstance(nested, dict) else None
    fields = row | {"ground_truth": ground_truth}
    for name in ("answer", "expected_answer", "ground_truth", "solution"):
        if fields.get(name) is not None:
            return name, fields[name]
    return "answer", ""


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path): each problem once, only answers that the verifier can read."""
    path = path or cfg.data
    rows = load_table(path, normalize, limit, cfg.ignore_fields)
    distinct = one_row_each(rows, path)
    # An answer that the verifier misreads is compared as text only [D27].
    cache = cache_folder(path, cfg.out_dir)
    kept = sound_rows(distinct, cfg.reward_workers, f"data {path}", cache)
    if not kept:
        fail(f"data {path}: no answer that the verifier can read.")
    return kept


def select_rows(rows, epoch, history, cfg):
    """Indices of this epoch's rows, in order: the filter of paper 4.5.2, drawn from the full set.

    history: {row index: (num_correct, num_rollouts)} when the row was last sampled. A row that
    all or none of them solved stays with chance readmit_easy or readmit_hard only.
    """
    # Every row has its own draw, so that the history of one never shifts the luck of another.
    draw = random.Random(f"{cfg.seed} {epoch}")
    pool = []
    for index in range(len(rows)):
        num_correct, num_rollouts = history.get(index, (0, 0))
        chance = 1.0
        if num_rollouts and num_correct == num_rollouts:
            chance = cfg.readmit_easy
        elif num_rollouts and num_correct == 0:
            chance = cfg.readmit_hard
        if draw.random() < chance:
            pool.append(index)
    return shuffled(pool or range(len(rows)), cfg.seed, epoch)


# ---- 3. Reward -----------------------------------------------------------------------------------
def verdict(response, answer, prompt=None, as_text=False):
    """(reward, status) of a response: the last box after the last </think> counts.

    as_text: the answer in the box has to be the gold's own text (load_rows says for which rows).
    """
    reasoning, closed, final = response.rpartition("</think>")
    if not closed:
        reasoning, final = response, ""
    if prompt is not None and not language_ok(prompt, reasoning):  # [D1]
        return -1, "language"
    given = last_box(final)
    if not given:
        return 0, "no_answer"
    # A time-out stays in the loss: else LaTeX that stalls the verifier would escape its 0.
    status = compare(str(answer), given, prompt, as_text)
    return (1 if status == "ok" else 0), status


def reward(response, answer, prompt=None, as_text=False):
    """1, 0 or -1 (-1 only with a prompt). The verifier has 4 CPU seconds for an answer."""
    return verdict(response, answer, prompt, as_text)[0]


def judge(r):
    """(reward, status) of a rollout. If it was cut off at max_new_tokens, a 1 becomes 0."""
    text = r.text if r.row["think"] else "</think>" + r.text
    prompt = " ".join(turn["content"] for turn in r.row["messages"])
    value, status = verdict(text, r.row["answer"], prompt, r.row.get("as_text", False))
    if r.finish_reason == "length" and value == 1:
        return 0, "no_answer"  # also for the log and the history, which the filter spares
    return value, status


def make_reward(cfg):
    """(submit, collect): start a rollout's verdict in the background; wait for all verdicts."""
    return in_background(answer_pool(cfg.reward_workers), judge, ("reward", "status"))


def monitor(rollouts):
    """This stage's numbers for the log, as shares of this rank's rollouts."""
    with_box, with_two, wrong_box = 0, 0, 0
    for r in rollouts:
        _, closed, final = r.text.rpartition("</think>")
        boxes = count_boxes(final) if closed else 0
        with_box += boxes > 0
        with_two += boxes > 1
        wrong_box += boxes > 0 and r.status == "wrong"
    n = max(len(rollouts), 1)
    return {"box": with_box / n, "two_boxes": with_two / n, "box_wrong": wrong_box / n}


def self_test(rows, cfg):
    """Before training, on a sample: the gold earns 1, another number 0, an unclosed thought 0."""
    for row in random.Random(cfg.seed).sample(rows, min(32, len(rows))):
        gold = row["answer"]
        right, wrong = boxed_response(gold), boxed_response("-7151623.5")
        unclosed = right.removeprefix("</think>")
        as_text = row.get("as_text", False)
        earned = [reward(text, gold, None, as_text) for text in (right, wrong, unclosed)]
        if earned != [1, 0, 0]:
            fail(f'verifier self test: answer "{gold}" earns {earned} where [1, 0, 0] is right.')


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(r):
    """Accuracy of one held-out rollout; the mean over k samples is the paper's avg@k."""
    return float(r.reward == 1)


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
