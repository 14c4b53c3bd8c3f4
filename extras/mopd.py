"""MOPD: multi-teacher on-policy distillation, an optional repair after the cascade.

It is no stage of the paper, but one of the next: Cascade 2 (arXiv 2603.19220), section 4.4. A later
stage costs some of what an earlier stage taught, and MOPD distils it back. The teachers are the
cascade's own earlier checkpoints, frozen. The policy, their student, samples completions for the
prompts of every domain. The checkpoint that was best at a domain says for each token of these
completions how likely it finds it. One step of main():

    rollouts  = engine.generate(prompts x group_size)    each keeps its tokens and their log-probs
    advantage = log pi_teacher - log pi_student          one number for each token
    loss      = -sum_t weight_t * advantage_t * log pi_student_t / all tokens
                                                         weight is pi_student / pi_sampler
    optimizer.step()                                     one AdamW update
    engine.sync(model)                                   the sampler gets the new weights

In expectation the gradient is that of the reverse KL of each next token, KL(student || teacher),
given the tokens before it; that a token also changes what follows is left out. There is no verifier
and no reward model. The reward is for the log only: minus the KL to the teacher in nats a token. In
a good run it climbs towards 0. Below the waterline two functions are not as in mathrl.py.

    torchrun --nproc_per_node=8 extras/mopd.py --init_from=out/swerl/final --data=DOMAINS

DOMAINS is for instance rlhf:chat.jsonl:out/rlhf/final,mathrl:math.jsonl:out/mathrl/final.

Deviations from the paper, numbered as in docs/paper.md: D24 a domain is drawn as often as it has
prompts; D25 every rank holds a whole teacher, one after the other; D49 the teacher of a domain is
the checkpoint of its own stage, and the learning rate warms up from 0.
"""

import importlib
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch

# The repository's root, since this script may be started by its path.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine import Rollout, make_engine, request_seed, sampler_correction
from lib.check import end_before_training
from lib.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_policy,
    lock,
    mark_final,
    save_checkpoint,
)
from lib.common import (
    all_reduce,
    average_gradients,
    finish,
    micro_batches,
    print0,
    start_run,
    whole_groups,
)
from lib.flags import Beta, PositiveFloat, PositiveInt, RolloutFlags, Share, TopP, parse_config
from lib.guard import check_step, fail, one_sentence
from lib.logs import Logger, console_line, show_sample, summarize
from lib.optimizer import make_optimizer
from lib.packing import collate, pack_rollouts
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
    shuffled,
)
from model import Qwen3, find_file, load_tokenizer
from verifiers.pool import timed


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/swerl/final"  # the student: the cascade's last checkpoint
    out_dir: str = "out/mopd"  # checkpoints and the log; an interrupted run resumes from it
    # the domains, comma-separated STAGE:DATA:TEACHER: a stage's name, a set that it loads, and a
    # checkpoint with the student's tokenizer
    data: str = ""
    eval_data: str = ""  # the same with held-out sets; "": no held-out metric
    seed: int = 0  # of sampling and of the order of prompts

    # prompts (groups) per step, over all ranks; Cascade 2 table 8
    prompts_per_step: PositiveInt = 128
    group_size: PositiveInt = 4  # completions per prompt; Cascade 2 table 8
    num_steps: PositiveInt = 50  # Cascade 2 section 4.4: 40 to 50
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 98304  # Cascade 2 table 8
    rope_factor: float = 0.0  # YaRN factor of student and teachers; 0: as in each checkpoint
    temperature: PositiveFloat = 1.0  # sampler, and all log-probs
    top_p: TopP = 1.0  # of sampling only
    top_k: int = 0  # of sampling only; 0: off

    lr: PositiveFloat = 2e-6  # learning rate of AdamW; Cascade 2 section 4.4 (table 8: 3e-6)
    final_lr: Share = 1.0  # last learning rate as a fraction of lr, linear decay
    # steps of linear warm-up of the learning rate, from 0 [D49]; Cascade 2 section 4.4
    warmup_steps: int = 30
    beta1: Beta = 0.9  # of AdamW
    beta2: Beta = 0.95  # of AdamW
    weight_decay: float = 0.01
    grad_clip: PositiveFloat = 1.0  # bound on the norm of the whole gradient
    # a token weighs pi_student / pi_sampler, and nothing where this is outside [1 / limit, limit];
    # 0: off; Cascade 2 eq. 3 (engine.sampler_correction)
    importance_limit: float = 2.0

    eval_every: int = 10  # steps between held-out metrics; 0: never
    eval_rows: int = 256  # held-out rows, one sample each


# ---- 2. Data -------------------------------------------------------------------------------------
STAGES = ("rlhf", "ifrl", "mathrl", "coderl", "swerl")


def load_rows(cfg, path=None, limit=0):
    """Rows of all domains of cfg.data (or path), each with the folder of its teacher.

    They are spread evenly, so that the first eval_rows of them are of all domains.
    """
    domains = (path or cfg.data).split(",")
    return interleaved([load_domain(domain, cfg, limit) for domain in domains])


def load_domain(domain, cfg, limit):
    """Rows of one STAGE:DATA:TEACHER, read by the loader of the stage."""
    stage, _, rest = domain.partition(":")
    # DATA may hold a colon, TEACHER may not.
    data, _, teacher = rest.rpartition(":")
    if stage not in STAGES or not data:
        fail(
            f"--data: {domain!r} is not STAGE:DATA:TEACHER, "
            "e.g. mathrl:math.jsonl:out/mathrl/final."
        )
    with one_sentence(f"--data: teacher {teacher} of {data}"):
        find_file(teacher, "config.json")
    module = importlib.import_module(stage)
    flags = {"data": data, "max_prompt_tokens": cfg.max_prompt_tokens}
    flags["ignore_fields"] = cfg.ignore_fields
    if stage == "swerl":
        flags["min_prompt_tokens"] = 0  # SWE RL drops short prompts otherwise
    rows = []
    for row in module.load_rows(module.Config(**flags), limit=limit):
        rows.append({"messages": row["messages"], "think": row["think"], "teacher": teacher})
    return rows


def select_rows(rows, epoch, history, cfg):
    """Indices of this epoch's rows, in order: all, so a large domain comes often [D24]."""
    return shuffled(range(len(rows)), cfg.seed, epoch)


# ---- 3. Reward -----------------------------------------------------------------------------------
def load_teacher(folder, rope_factor):
    """A frozen checkpoint, whole on every rank [D25]; in bf16 on a GPU."""
    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device, dtype = torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    teacher = Qwen3.from_pretrained(folder, dtype=dtype, device=device, rope_factor=rope_factor)
    return teacher.requires_grad_(False)


@torch.no_grad()
def ask_teacher(teacher, rollout, temperature):
    """Log-probs of a rollout's completion tokens under the teacher, a list of floats.

    One rollout at a time, because real completions are long.
    """
    batch = pack_rollouts([rollout], teacher.head_weight.device)
    logprobs_T, _ = teacher.token_logprobs(batch, temperature=temperature)
    return logprobs_T[batch["loss_index"]].tolist()


def differences(rollout):
    """log pi_teacher - log pi_sampler of every token of a completion, in nats."""
    pairs = zip(rollout.teacher_logprobs, rollout.sampler_logprobs, strict=True)
    return [teacher - sampler for teacher, sampler in pairs]


def make_reward(cfg):
    """(submit, collect): submit has nothing to start; collect asks the teachers.

    The reward is for the log only: minus the KL to the teacher in nats a token, estimated on the
    rollout's own tokens.
    """

    def submit(rollout):
        pass

    def collect(rollouts):
        # One teacher at a time is in memory [D25].
        for folder in sorted({r.row["teacher"] for r in rollouts}):
            teacher = load_teacher(folder, cfg.rope_factor)
            for r in rollouts:
                if r.row["teacher"] != folder:
                    continue
                r.teacher_logprobs, r.verify_s = timed(ask_teacher, teacher, r, cfg.temperature)
                r.reward = statistics.fmean(differences(r))
                r.status = "ok"
            del teacher

    return submit, collect


def monitor(rollouts):
    """This stage's number for the log: by how many nats teacher and student differ on a token.

    It is a mean of absolute values: unlike in the KL, opposite signs do not cancel out.
    """
    distances = []
    for r in rollouts:
        distances.append(statistics.fmean(abs(difference) for difference in differences(r)))
    return {"abs_difference": sum(distances) / max(len(rollouts), 1)}


def self_test(rows, cfg):
    """Before training: every teacher has the student's tokenizer, so token ids mean the same."""
    # A run that goes on needs init_from no more: it may be gone.
    student = latest_checkpoint(cfg.out_dir) or cfg.init_from
    with one_sentence(f"--init_from={student}"):
        vocabulary = load_tokenizer(student).get_vocab()
    for folder in sorted({row["teacher"] for row in rows}):
        if load_tokenizer(folder).get_vocab() != vocabulary:
            fail(
                f"teacher {folder} has another tokenizer than {student}: "
                "its log-probs would be of other tokens."
            )


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """Minus the KL of one held-out rollout to its teacher, in nats a token."""
    return rollout.reward


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
    """1 for every rollout: the advantages are the tokens' own, in grpo_loss."""
    # CHANGED: no group, no reward; the teacher speaks about each token (Cascade 2 paper 4.4)
    for r in rollouts:
        r.in_loss = True
        r.advantage = 1.0


def grpo_loss(logprobs_T, old_logprobs_T, batch, counts, cfg):
    """-sum of weight * advantage * log pi over a micro-batch's completion tokens, over the batch's.

    Cascade 2 eq. 4: advantage = log pi_teacher - log pi_trainer of the token, weight = pi_trainer /
    pi_sampler; neither has a gradient.
    """
    # CHANGED: distillation instead of a policy gradient on rewards (Cascade 2 paper 4.4)
    scored_M = batch["loss_index"]
    advantages_M = (batch["teacher_logprobs_T"] - old_logprobs_T)[scored_M]
    weights_M = sampler_correction(old_logprobs_T, batch, cfg.importance_limit)
    return -(weights_M * advantages_M * logprobs_T[scored_M]).sum() / counts["tokens"]


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
