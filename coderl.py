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
import functools
import json
import math
import random
import re
import statistics
import textwrap
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
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
from verifiers import sandbox
from verifiers.language import language_ok
from verifiers.pool import in_background


# ---- 1. Config -----------------------------------------------------------------------------------
@dataclass
class Config:
    # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    init_from: str = "out/mathrl/final"
    out_dir: str = "out/coderl"
    # hub id, folder, parquet, .json or .jsonl
    data: str = "nvidia/Nemotron-RL-coding-competitive_coding"
    eval_data: str = ""  # same schemas; "": no held-out metric
    engine: str = "auto"  # rollouts: auto, torch or vllm
    prompts_per_step: int = 128  # over all ranks; paper T19
    group_size: int = 8  # completions per prompt (G); paper T19
    num_steps: int = 90  # paper T19; 64 for the thinking models
    max_prompt_tokens: int = 4096  # longer prompts are dropped at load
    max_new_tokens: int = 45056  # 44K, the last steps 48K; 14B: 56K; paper T19
    rope_factor: float = 2.0  # YaRN: prompt + completion pass 32K
    temperature: float = 1.0  # of the sampler and of the trained log-probs; paper T19, 0.8 with 48K
    top_p: float = 0.95  # sampler only (gap G4); paper T19
    top_k: int = 0  # sampler only; 0: off
    overlong_filter: bool = False  # truncated completions earn 0; paper 4.6.2
    # dynamic sampling: rounds of fresh prompts for groups of equal rewards (IF-RL only)
    max_refill_rounds: int = 0
    # CPU time of one test [dev 3], a problem's own limit if that is longer; LiveCodeBench's default
    test_seconds: float = 6.0
    memory_mb: int = 4096  # of one test
    lr: float = 4e-6  # AdamW; paper T19
    # last step's learning rate as a fraction of lr, linear; 1: constant (gap G2)
    final_lr: float = 1.0
    warmup_steps: int = 0  # linear
    beta1: float = 0.9  # paper T19
    beta2: float = 0.95  # paper T19
    weight_decay: float = 0.01  # not stated in the paper (gap G3)
    grad_clip: float = 1.0  # not stated in the paper
    clip_low: float = 0.2  # ratio clip; never binds, one update a batch keeps the ratio at 1
    clip_high: float = 0.2
    # tokens weigh pi_train / pi_sampler, 0 outside [1 / limit, limit]; 2: Cascade 2 eq. 3; 0: all
    # weigh 1
    importance_limit: float = 0.0
    micro_batch_tokens: int = 65536  # tokens of one packed forward pass on one rank
    reward_workers: int = 64  # programs in flight per rank; the sandbox runs two per core at a time
    # the run stops when a larger share of a step's rewards are infrastructure failures
    max_infra: float = 0.02
    eval_every: int = 10  # steps; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    save_every: int = 10  # steps
    # weights and optimizer over all ranks; hybrid: inside a node, replicated across nodes; offload:
    # in host memory; replicate: whole
    shard: str = "full"
    # seconds that a phase of a step (rollout, train_step, evaluate) may last before the run ends
    # and says where
    phase_timeout: float = 7200.0
    sample_every: int = 10  # steps between printed samples
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
