"""Code RL: stage 5 of the cascade (paper 4.6).

What changes relative to mathrl.py:
  1. Reward: 1 only if every test passes, else 0; mixed language earns 0, not -1 (-1 teaches "wrong but clean").
  2. Tests run in sandbox.py while other completions still decode; no expected output ever leaves this process.
  3. 44K to 56K tokens by model, lr 4e-6, no overlong filter (truncated: 0), no epoch-wise filter.
Deviations from the paper:
  1. Its 9.8K problems are not public: load_rows() reads the public sets they came from, in six schemas.
  2. Its verifier descends from LiveCodeBench's, which gives full marks to programs that look up the answer in the runner. Kept are
     its comparison rules; not kept: `==` between Python objects (results are JSON: a tuple is a list, True is not 1), the whole-problem
     time limit, and one process for all calls of a program (here one a test). Idioms that its rewriting breaks (open(0), globals) pass.
  3. Time limits are CPU seconds, so that a busy machine fails nobody.
  4. Interactive and special-judge problems are found by their fields, else by their wording.
  5. Mixed language is a test on Unicode scripts, as in mathrl.py.
torchrun --nproc_per_node=8 coderl.py --init_from=out/mathrl/final --out_dir=out/coderl
"""

import ast
import decimal
import json
import math
import random
import re
import statistics
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

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
from verifiers import sandbox
from verifiers.language import language_ok
from verifiers.pool import in_background


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config(RolloutFlags):  # engine, memory, checkpoints, time limits: lib/flags.py
    # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    init_from: str = "out/mathrl/final"
    out_dir: str = "out/coderl"
    # hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-RL-coding-competitive_coding"
    eval_data: str = ""  # same schemas; "": no held-out metric
    prompts_per_step: PositiveInt = 128  # over all ranks; paper T19
    group_size: PositiveInt = 8  # completions per prompt (G); paper T19
    num_steps: PositiveInt = 90  # paper T19; 64 for the thinking models
    max_prompt_tokens: PositiveInt = 4096  # longer prompts are dropped at load
    max_new_tokens: PositiveInt = 45056  # 44K, the last steps 48K; 14B: 56K; paper T19
    rope_factor: float = 2.0  # YaRN: prompt + completion pass 32K
    temperature: PositiveFloat = (
        1.0  # of the sampler and of the trained log-probs; paper T19, 0.8 with 48K
    )
    top_p: TopP = 0.95  # sampler only (gap G4); paper T19
    top_k: int = 0  # sampler only; 0: off
    overlong_filter: bool = False  # truncated completions earn 0; paper 4.6.2
    # CPU time of one test [dev 3], a problem's own limit if that is longer; LiveCodeBench's default
    test_seconds: PositiveFloat = 6.0
    memory_mb: PositiveInt = 4096  # of one test
    lr: PositiveFloat = 4e-6  # AdamW; paper T19
    # last step's learning rate as a fraction of lr, linear; 1: constant (gap G2)
    final_lr: Share = 1.0
    warmup_steps: int = 0  # linear
    beta1: Beta = 0.9  # paper T19
    beta2: Beta = 0.95  # paper T19
    weight_decay: float = 0.01  # not stated in the paper (gap G3)
    grad_clip: PositiveFloat = 1.0  # not stated in the paper
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; 2: Cascade 2 eq. 3; 0: all
    # weigh 1
    importance_limit: float = 0.0
    micro_batch_tokens: PositiveInt = 65536  # tokens of one packed forward pass on one rank
    reward_workers: PositiveInt = (
        64  # programs in flight per rank; the sandbox runs two per core at a time
    )
    eval_every: int = 10  # steps; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    seed: int = 0


# ---- 2. Data -------------------------------------------------------------------------------------
# AceReason's
FORMAT = "Please place the solution code in the following format:\n```python\n# Your solution code here\n```"
PLAIN = "{problem}\n\nWrite Python code to solve the problem. " + FORMAT
HEADER = (
    "{problem}\n\nSolve the problem starting with the provided function header.\n\nFunction header:\n```\n{header}\n```\n\n"
    + FORMAT
)
INTERACTIVE = re.compile(r"this is an interactive (problem|task)|interactor|flush the output", re.I)
ANY_ANSWER = re.compile(
    r"(any|multiple|several|more than one) (\w+ )?(valid |correct |possible |optimal )*(answer|solution|output)s?.{0,60}"
    r"(accepted|(print|output|return) any|any of them)|(print|output|return|(?<!not )(?<!n't )find) any( (one )?(of (them|these)|valid|suitable"
    r"|possible|such)|(?=[.,;:)\n]|$))|(multiple|several|many) [^.\n]{0,60}(print|output|return) (any|one)\b|order [^.\n]{0,30}(does not|doesn't"
    r"|arbitrary)|(print|output|return)(ed)?\b(?! the (n\w+|m\w+|total|sum|cost|score|largest|smallest) )[^.:\n]{0,60} in (any|arbitrary) order"
    r"|(absolute|relative) error [^.\n]{0,40}(exceed|at most|less|within|more than|greater)|\berror (of (up|at|less|no|10|1e|\$)|less|greater)"
    r"|(within|at most|up to) [^.\n]{0,25}(error|absolute|relative)",
    re.I | re.S,
)


def loads(text):
    """A JSON value; sets that were written by Python's repr (TACO, PrimeIntellect) are read as its literals."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise BadRow("tests that are neither JSON nor Python literals")


def normal_tests(row):
    """{"inputs": [str], "outputs": [str], "fn_name", "time_limit"} from any of the six schemas [dev 1]; a call's input is one JSON value per line."""
    # Nemotron, new and old
    holders = [
        row[name]
        for name in ("verifier_metadata", "responses_create_params")
        if isinstance(row.get(name), dict)
    ]
    # DeepCoder; PrimeIntellect; TACO and APPS; codeforces
    fields = ("unit_tests", "tests", "verification_info", "input_output", "official_tests")
    tests = next(
        filter(
            None,
            [holder.get("unit_tests") for holder in holders] + [row.get(name) for name in fields],
        ),
        None,
    )
    if not tests:
        raise BadRow("no tests")
    tests = loads(tests) if isinstance(tests, str) else tests
    if isinstance(tests, dict) and "test_cases" in tests:
        if tests.get("language", "python") != "python":
            raise BadRow("not a Python problem")
        tests = tests["test_cases"]
    if isinstance(tests, list):
        names = {t.get("fn_name") or (t.get("metadata") or {}).get("func_name") for t in tests}
        if len(names) != 1:
            raise BadRow("tests of several functions, or none")
        tests = {
            "inputs": [t["input"] for t in tests],
            "outputs": [t["output"] for t in tests],
            "fn_name": names.pop(),
        }
    inputs, outputs, name = (
        tests.get("inputs") or [],
        tests.get("outputs") or [],
        tests.get("fn_name") or None,
    )
    if not isinstance(inputs, list) or not isinstance(outputs, list) or None in inputs + outputs:
        raise BadRow("tests of an unknown form")
    if not inputs or len(inputs) != len(outputs):
        raise BadRow("no tests, or more inputs than outputs")
    if name:
        lines = lambda x: (
            [loads(line) for line in x.split("\n") if line.strip()]
            if isinstance(x, str)
            else list(x)
        )
        inputs = ["\n".join(json.dumps(value) for value in lines(x)) for x in inputs]
        outputs = [loads(x) if isinstance(x, str) else x for x in outputs]
        if all(isinstance(x, list) and len(x) == 1 for x in outputs) and not isinstance(
            tests["outputs"][0], str
        ):
            outputs = [x[0] for x in outputs]  # TACO and APPS wrap every result in a list
        outputs = [json.dumps(x) for x in outputs]
    else:
        inputs, outputs = (
            ["\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in part]
            for part in (inputs, outputs)
        )
    last = dict(zip(inputs, outputs))
    if any(y != last[x] and not same_output(y, last[x]) for x, y in zip(inputs, outputs)):
        raise BadRow("two outputs for one input")
    # a number, or TACO's "2.0 seconds"
    seconds = re.match(r"\d+(\.\d+)?", str(row.get("time_limit") or ""))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "fn_name": name,
        "time_limit": float(seconds[0]) if seconds else None,
    }


def statement(row, where):
    """The problem text of a row; open-r1/codeforces keeps it in parts."""
    if row.get("description") and isinstance(row["description"], str):
        titles = {
            "description": "",
            "input_format": "Input\n",
            "output_format": "Output\n",
            "note": "Note\n",
        }
        parts = [f"{title}{row[name]}" for name, title in titles.items() if row.get(name)]
        examples = row.get("examples") if isinstance(row.get("examples"), list) else []
        parts += [
            f"Example\nInput:\n{e.get('input')}\nOutput:\n{e.get('output')}"
            for e in examples
            if isinstance(e, dict)
        ]
        return "\n\n".join(parts)
    nested = row.get("responses_create_params")
    asked = {**row, "input": nested.get("input")} if isinstance(nested, dict) else row
    if not {"problem", "question", "prompt", "input", "description"} & asked.keys():
        required_field(row, where, "problem")  # stops the run and names the fields that are there
    name = next((k for k in ("problem", "question", "prompt", "input") if asked.get(k)), "problem")
    return ([{"content": ""}] + as_messages(asked.get(name) or "", name))[-1]["content"]


def normalize(row, where):
    """One row of any known code set -> {"messages", "think", "tests", "solution"}; BadRow drops it with a reason."""
    if not (problem := statement(row, where).strip()):
        raise BadRow("no problem statement")
    if row.get("input_mode") == "interactive" or INTERACTIVE.search(problem):
        raise BadRow("interactive")  # [dev 4]
    if row.get("generated_checker") or ANY_ANSWER.search(problem):
        raise BadRow("several answers are right (special judge)")
    if row.get("official_tests_complete") is False or row.get("input_mode") == "file":
        raise BadRow("incomplete tests, or tests through files")
    try:
        tests = normal_tests(row)
    except (AttributeError, KeyError, TypeError, RecursionError):
        raise BadRow("tests of an unknown form")
    header = row.get("starter_code") or (
        f"def {name}(...):" if (name := tests["fn_name"]) and name not in problem else ""
    )
    if "```python" not in problem:
        problem = (HEADER if header else PLAIN).format(problem=problem, header=header.rstrip())
    gold = row.get("solution") or row.get("gold_standard_solution") or row.get("solutions") or ""
    gold = loads(gold) if isinstance(gold, str) and gold.startswith("[") else gold
    gold = gold if isinstance(gold, str) else next((s for s in gold if isinstance(s, str)), "")
    return {
        "messages": [{"role": "user", "content": problem}],
        "think": True,
        "tests": tests,
        "solution": extract_code(gold) or gold,
    }


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path) in the normal form; what was dropped is printed by reason."""
    return load_table(path or cfg.data, normalize, limit)


def select_rows(rows, epoch, history, cfg):
    """Indices of the rows in this epoch's pool: all of them."""
    return list(range(len(rows)))


# ---- 3. Reward -----------------------------------------------------------------------------------
BLOCK = re.compile(r"```(?:python3?|py)[^\S\n]*\n(.*?)```", re.S | re.I)


def extract_code(text, name=None):
    """The last ```python block, or the last that defines the function asked for, where one does; None without a block."""
    blocks = list(map(textwrap.dedent, BLOCK.findall(text)))
    return (
        [block for block in blocks if name and re.search(rf"\bdef {re.escape(name)}\b", block)]
        or blocks
        or [None]
    )[-1]


def same_output(got, expected):
    """LiveCodeBench's rule for programs: equal stripped lines, each as text or as a list of exact decimals."""
    got, expected = (
        [line.strip() for line in text.strip().split("\n")] for text in (got, expected)
    )
    decimals = lambda line: [decimal.Decimal(x) for x in line.split()]
    # no decimals of a flood
    alike = lambda a, b: a == b or len(a) < 2 * len(b) + 1000 and decimals(a) == decimals(b)
    try:
        return len(got) == len(expected) and all(map(alike, got, expected))
    except decimal.InvalidOperation:
        return False


def same_value(got, expected):
    """Rule for calls [dev 2]: the same JSON value, exact types; 1e-5 relative or 1e-8 absolute beside a float, 1e-5 of one beside an int."""
    if isinstance(expected, float) or isinstance(got, float):
        numbers = all(
            isinstance(x, (int, float)) and not isinstance(x, bool) for x in (got, expected)
        )
        return numbers and (
            got == expected
            or abs(got - expected)
            <= 1e-8 + 1e-5 * (abs(expected) if isinstance(expected, float) else 1)
            < math.inf
        )
    if type(got) is not type(expected):
        return False
    if isinstance(got, list):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict):
        return got.keys() == expected.keys() and all(
            same_value(got[key], expected[key]) for key in got
        )
    return got == expected


def run_tests(code, tests, timeout=6.0, memory_mb=4096, stop=False):
    """One verdict per test: ok, wrong, timeout, memory, crash, output or infra; with stop, up to the first not ok."""
    name, verdicts = tests.get("fn_name"), []
    given = (
        (name, [json.loads(line) for line in text.split("\n") if line]) if name else text
        for text in tests["inputs"]
    )
    results = sandbox.run_each(code, given, timeout, memory_mb)
    for result, expected in zip(results, tests["outputs"]):
        verdict = result.status
        if verdict == "ok":
            try:
                right = (
                    same_value(result.value, json.loads(expected))
                    if name
                    else same_output(result.stdout, expected)
                )
            except (
                RecursionError,
                OverflowError,
            ):  # nested beyond reason, or an int no float can hold
                right = False
            verdict = "ok" if right else "wrong"
        verdicts.append(verdict)
        if stop and verdict != "ok":
            break
    results.close()  # the program ends here
    return verdicts


def verdict(response, tests, prompt=None, timeout=6.0, memory_mb=4096):
    """(reward, status, share of tests passed before the first failure) of one response with its reasoning."""
    reasoning, closed, final = response.rpartition("</think>")
    if prompt is not None and not language_ok(prompt, reasoning if closed else response):  # [dev 5]
        return 0, "language", 0.0
    if (code := extract_code(final, tests.get("fn_name")) if closed else None) is None:
        return 0, "no_answer", 0.0
    verdicts = run_tests(
        code, tests, max(timeout, tests.get("time_limit") or 0), memory_mb, stop=True
    )
    status = {"memory": "crash", "output": "crash"}.get(verdicts[-1], verdicts[-1])
    return int(status == "ok"), status, verdicts.count("ok") / len(tests["inputs"])


def reward(response, tests, prompt=None):
    """1 if the last ```python block after </think> passes every test, else 0."""
    return verdict(response, tests, prompt)[0]


def judge(rollout, cfg):
    """(reward, status, share passed) of a rollout. A truncated one has not answered, whatever it wrote on the way."""
    text = rollout.text if rollout.row["think"] else "</think>" + rollout.text
    if rollout.finish_reason == "length":
        return 0, "no_answer", 0.0
    return verdict(
        text,
        rollout.row["tests"],
        " ".join(turn["content"] for turn in rollout.row["messages"]),
        cfg.test_seconds,
        cfg.memory_mb,
    )


def make_reward(cfg):
    """(submit, collect): submit(rollout) starts its tests in the background, collect(rollouts) sets the rewards."""
    # starts the zygote, and announces a host without namespaces, before there is a model
    sandbox.run("pass")
    return in_background(
        ThreadPoolExecutor(cfg.reward_workers),
        lambda r: judge(r, cfg),
        ("reward", "status", "passed"),
    )


def monitor(rollouts):
    """This stage's numbers for the log, as shares of all rollouts; passed is never part of the reward."""
    mean = lambda values: sum(values) / max(len(rollouts), 1)
    shares = {
        kind: mean(r.status == kind for r in rollouts)
        for kind in ("wrong", "timeout", "crash", "no_answer", "language")
    }
    return {**shares, "passed": mean(getattr(r, "passed", 0.0) for r in rollouts)}


def table_program(tests, spoil=False):
    """A program that knows every answer: the gold of rows without a solution. Spoiled, its last answer is wrong."""
    answers = dict(zip(tests["inputs"], tests["outputs"])) | (
        {tests["inputs"][-1]: '"no such answer"'} if spoil else {}
    )
    if tests["fn_name"]:
        return f"import json\ndef {tests['fn_name']}(*args): return json.loads({answers!r}['\\n'.join(map(json.dumps, args))])\n"
    return f"import sys\nprint({answers!r}[sys.stdin.read()])\n"


def self_test(rows, cfg):
    """Before training: on a sample, a program that prints the expected outputs earns 1, with one output spoiled 0."""
    fence = lambda code: f"</think>\n```python\n{code}\n```"
    sample = random.Random(cfg.seed).sample(rows, min(16, len(rows)))
    for row in sample:
        right, spoiled = (
            reward(fence(table_program(row["tests"], spoil)), row["tests"])
            for spoil in (False, True)
        )
        if (right, spoiled) != (1, 0):
            fail(
                f"sandbox self test: the expected outputs earn {right} and spoiled ones {spoiled}, not 1 and 0, for {row['messages'][-1]['content'][:80]!r}."
            )
    solved = [reward(fence(row["solution"]), row["tests"]) for row in sample if row["solution"]]
    print0(
        f"self test: {len(sample)} rows graded right, {sum(solved)} of {len(solved)} reference solutions pass"
        + (
            ""
            if solved
            else " (no row has one: whether the tests themselves are right was not checked)"
        )
    )
    if solved and sum(solved) < len(solved) / 2:
        fail(
            f"sandbox self test: only {sum(solved)} of {len(solved)} reference solutions pass their own tests."
        )


# ---- 4. Eval -------------------------------------------------------------------------------------
def metric(rollout):
    """Whether one held-out rollout passes all tests; the mean over samples is the pass@1 of the paper."""
    return float(rollout.reward == 1)


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
