"""Code RL: stage 5 of the cascade (paper 4.6).

The same loop as mathrl.py, which is the RL stage to read first; a program is judged instead of a
boxed answer. Its tests run in a sandbox while other completions still decode (4.6.2).

Reward: 1 if the last ```python block after </think> passes every test, else 0. If the reasoning
leaves the language of the prompt it is 0 as well, not -1: -1 would pay wrong programs for their
clean language. Completions have 44K to 56K tokens, and one that is cut off earns 0.

    torchrun --nproc_per_node=8 coderl.py --init_from=out/mathrl/final --out_dir=out/coderl

Deviations from the paper, numbered as in docs/paper.md: D1 language by Unicode scripts; D16 public
sets instead of the paper's 9.8K problems; D17 LiveCodeBench's comparison, not its runner; D18 time
limits in CPU seconds; D19 special judges are found by fields or wording; D29 printed fractions may
differ by 1e-6; D30 rows that ask for one thing and test another are dropped; D39 prompts in our own
words.
"""

import functools
import math
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
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
from lib.data import BadRow, first_nonempty, load_table, required_field
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
from verifiers import programs, sandbox
from verifiers.asserts import asserted_calls
from verifiers.language import language_ok
from verifiers.pool import in_background
from verifiers.programs import extract_code, fenced, run_tests, table_program


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    init_from: str = "out/mathrl/final"  # checkpoint of the stage before, or any Qwen3 folder
    out_dir: str = "out/coderl"  # checkpoints and the log; an interrupted run resumes from it
    # hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-RL-coding-competitive_coding"
    eval_data: str = ""  # held-out rows in the same schemas; "": no held-out metric
    seed: int = 0  # of sampling and of the order of prompts

    prompts_per_step: PositiveInt = 128  # prompts (groups) per step, over all ranks; paper T19
    group_size: PositiveInt = 8  # completions per prompt (G); paper T19
    num_steps: PositiveInt = 90  # 60 + 30 steps, thinking models 64; paper T19
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 45056  # 44K, then 48K; 14B: 56K; paper T19
    rope_factor: float = 0.0  # YaRN factor, 2.0 above 32K tokens; 0: as in the checkpoint
    temperature: PositiveFloat = 1.0  # of sampling and of the loss; paper T19: 1.0, 0.8
    top_p: TopP = 0.95  # of sampling only (G4); paper T19
    top_k: int = 0  # of sampling only; 0: off
    overlong_filter: bool = False  # completions that are cut off earn 0; paper 4.6.2

    lr: PositiveFloat = 4e-6  # learning rate of AdamW; paper T19
    final_lr: Share = 1.0  # last learning rate as a fraction of lr, linear decay (G2)
    warmup_steps: int = 0  # steps of linear warm-up of the learning rate
    beta1: Beta = 0.9  # of AdamW; paper T19
    beta2: Beta = 0.95  # of AdamW; paper T19
    weight_decay: float = 0.01  # of AdamW; not stated in the paper (G3)
    grad_clip: PositiveFloat = 1.0  # most norm of the gradient; not stated in the paper (G3)
    importance_limit: float = 0.0  # off if 0; Cascade 2 takes 2 (engine.sampler_correction)

    micro_batch_tokens: PositiveInt = 65536  # tokens of one packed forward pass on one rank
    reward_workers: PositiveInt = 64  # programs in flight per rank; two per core run at a time
    # CPU seconds of one test, LiveCodeBench's default; a problem's own limit where that is longer
    test_seconds: PositiveFloat = 6.0
    memory_mb: PositiveInt = 4096  # memory of one test in MiB
    eval_every: int = 10  # steps between held-out metrics; 0: never
    eval_rows: int = 256  # held-out rows, one sample each


# ---- 2. Data -------------------------------------------------------------------------------------
# The instructions are in our own words [D39].
FORMAT = "End your answer with the whole program in one block that begins with ```python."
PLAIN = "{problem}\n\nSolve this problem in Python. " + FORMAT
HEADER_LINES = "Function header:\n```\n"  # as rows of public sets write it
HEADER = (
    "{problem}\n\nWrite this function, under its own name and with these parameters.\n\n"
    + HEADER_LINES
    + "{header}\n```\n\n"
    + FORMAT
)


def normalize(row, where):
    """One row of any known code set -> {"messages", "think", "tests", "solution"}, or BadRow."""
    problem = statement(row, where).strip()
    if not problem:
        raise BadRow("no problem statement")
    # A comparison of outputs cannot judge these problems; the paper drops them, too (4.6.1) [D19].
    if row.get("input_mode") == "interactive" or programs.is_interactive(problem):
        raise BadRow("interactive")
    if row.get("generated_checker") or programs.has_several_answers(problem):
        raise BadRow("several answers are right (special judge)")
    if row.get("official_tests_complete") is False or row.get("input_mode") == "file":
        raise BadRow("incomplete tests, or tests through files")
    header = row.get("starter_code") or ""
    try:
        tests = normal_tests(row, header or shown_header(problem))
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise BadRow("tests of an unknown form")

    # Ask for one block of code, and name the function where the problem does not.
    name = tests["fn_name"]
    if not name:
        header = ""
    elif not header and name not in problem:
        header = f"def {name}(...):"
    if "```python" not in problem:
        template = HEADER if header else PLAIN
        problem = template.format(problem=problem, header=header.rstrip())

    # A reference solution: text, a list of texts, or such a list as text.
    gold = row.get(first_nonempty(row, "solution", "gold_standard_solution", "solutions", "code"))
    if row.get("canonical_solution"):
        gold = f"{row.get('prompt')}{row['canonical_solution']}"  # HumanEval's is the body alone
    gold = gold or ""
    if isinstance(gold, str) and gold.startswith("["):
        gold = programs.parse_literal(gold)
    if not isinstance(gold, str):
        gold = next((text for text in gold if isinstance(text, str)), "")
    messages = [{"role": "user", "content": problem}]
    solution = extract_code(gold) or gold
    return {"messages": messages, "think": True, "tests": tests, "solution": solution}


def statement(row, where):
    """The problem text of a row. Stops the run if the row has no field for it."""
    if row.get("description") and isinstance(row["description"], str):
        return join_parts(row)
    nested = row.get("responses_create_params")
    if isinstance(nested, dict):
        row = row | {"input": nested.get("input")}
    names = ("problem", "question", "problem_description", "prompt", "input", "text")
    if not {*names, "description"} & row.keys():
        required_field(row, where, "problem")
    for name in names:
        if row.get(name):
            return only_question(row[name], name)
    return ""


def shown_header(problem):
    """The function header in a prompt that shows one as ours does, or ""."""
    return problem.partition(HEADER_LINES)[2].partition("```")[0]


def join_parts(row):
    """The problem text of a row of open-r1/codeforces, which keeps it in parts."""
    parts = [row["description"]]
    for name, title in (("input_format", "Input"), ("output_format", "Output"), ("note", "Note")):
        if row.get(name):
            parts.append(f"{title}\n{row[name]}")
    examples = row.get("examples")
    if isinstance(examples, list):
        for example in examples:
            if isinstance(example, dict):
                given, printed = example.get("input"), example.get("output")
                parts.append(f"Example\nInput:\n{given}\nOutput:\n{printed}")
    return "\n\n".join(parts)


def normal_tests(row, header=""):
    """The tests of a row of any of the six schemas, in the form that run_tests takes [D16].

    header: of the function that the row asks for.
    """
    candidates = []
    for name in ("verifier_metadata", "responses_create_params"):  # Nemotron, new and old
        if isinstance(row.get(name), dict):
            candidates.append(row[name].get("unit_tests"))
    # DeepCoder; PrimeIntellect; TACO and APPS; codeforces.
    for name in ("unit_tests", "tests", "verification_info", "input_output", "official_tests"):
        candidates.append(row.get(name))
    candidates.append(asserted_calls(row))  # HumanEval, MBPP
    found = [tests for tests in candidates if tests]
    if not found:
        raise BadRow("no tests")
    # A name may also stand beside the tests: DeepCoder and LiveCodeBench, LeetCode sets.
    name = programs.name_in(row) or row.get("entry_point")
    tests = programs.normal_form(found[0], name, header)
    tests["time_limit"] = programs.time_limit(row.get("time_limit"))
    return tests


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path) that unit tests can judge."""
    return load_table(path or cfg.data, normalize, limit, cfg.ignore_fields)


def select_rows(rows, epoch, history, cfg):
    """Indices of this epoch's rows, in order: all of them. Code RL has no epoch-wise filter."""
    return shuffled(range(len(rows)), cfg.seed, epoch)


# ---- 3. Reward -----------------------------------------------------------------------------------
def verdict(response, tests, prompt=None, timeout=6.0, memory_mb=4096):
    """(reward, status, share of tests passed): the last ```python block after </think> counts."""
    reasoning, closed, final = response.rpartition("</think>")
    if not closed:
        reasoning, final = response, ""
    if prompt is not None and not language_ok(prompt, reasoning):  # [D1]
        return 0, "language", 0.0  # not -1, which would pay wrong programs for clean language
    code = extract_code(final, tests.get("fn_name"))
    if code is None:
        return 0, "no_answer", 0.0
    seconds = max(timeout, tests.get("time_limit") or 0)  # CPU seconds of one test [D18]
    verdicts = run_tests(code, tests, seconds, memory_mb, stop=True)
    status = verdicts[-1]
    if status in ("memory", "output"):
        status = "crash"
    return int(status == "ok"), status, verdicts.count("ok") / len(tests["inputs"])


def reward(response, tests, prompt=None):
    """1 if every test passes, else 0."""
    return verdict(response, tests, prompt)[0]


def judge(rollout, cfg):
    """(reward, status, share passed) of a rollout. One that is cut off never earns 1 (4.6.2)."""
    if rollout.finish_reason == "length":
        return 0, "no_answer", 0.0
    text = rollout.text if rollout.row["think"] else "</think>" + rollout.text
    prompt = " ".join(turn["content"] for turn in rollout.row["messages"])
    return verdict(text, rollout.row["tests"], prompt, cfg.test_seconds, cfg.memory_mb)


def make_reward(cfg):
    """(submit, collect): start a rollout's verdict in the background; wait for all verdicts."""
    # A first program starts the sandbox, and on a host without namespaces prints that at once.
    sandbox.run("pass")
    pool = ThreadPoolExecutor(cfg.reward_workers)
    return in_background(pool, functools.partial(judge, cfg=cfg), ("reward", "status", "passed"))


def monitor(rollouts):
    """This stage's numbers for the log, as shares of all rollouts.

    passed: the share of tests that passed before the first failure. It is never a reward.
    """
    n = max(len(rollouts), 1)
    shares = {}
    for status in ("wrong", "timeout", "crash", "no_answer", "language"):
        shares[status] = sum(r.status == status for r in rollouts) / n
    shares["passed"] = sum(getattr(r, "passed", 0.0) for r in rollouts) / n
    return shares


def self_test(rows, cfg):
    """Before training, on a sample: expected outputs earn 1, spoiled ones 0; solutions pass."""
    # No program passes the tests of a function that are run as a program's.
    for row in rows:
        if row["tests"]["fn_name"]:
            continue
        problem = row["messages"][-1]["content"]
        by_name = all(map(programs.arguments_by_name, row["tests"]["inputs"]))
        if by_name or programs.defines_function(shown_header(problem)):
            fail(
                "sandbox self test: a function is asked for, but the tests run a program, "
                f"for {problem[:80]!r}."
            )

    sample = random.Random(cfg.seed).sample(rows, min(16, len(rows)))
    for row in sample:
        tests = row["tests"]
        right = reward(fenced(table_program(tests)), tests)
        spoiled = reward(fenced(table_program(tests, spoil=True)), tests)
        if (right, spoiled) != (1, 0):
            problem = row["messages"][-1]["content"]
            fail(
                f"sandbox self test: the expected outputs earn {right} and spoiled ones {spoiled}, "
                f"not 1 and 0, for {problem[:80]!r}."
            )

    # Reference solutions tell whether the tests themselves are right.
    solved = [reward(fenced(row["solution"]), row["tests"]) for row in sample if row["solution"]]
    result = f"{sum(solved)} of {len(solved)} reference solutions pass"
    note = ""
    if not solved:
        note = " (no row has one: whether the tests themselves are right was not checked)"
    print0(f"self test: {len(sample)} rows graded right, {result}{note}")
    if sum(solved) < len(solved) / 2:
        fail(f"sandbox self test: only {result} their own tests.")


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """1.0 if a held-out rollout passes all tests; the mean over samples is the paper's pass@1."""
    return float(rollout.reward == 1)


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
