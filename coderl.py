"""Code RL: stage 5 of the cascade (paper 4.6).

What changes relative to mathrl.py:
  1. Reward: 1 only if every test passes, else 0; mixed language earns 0, not -1 (-1 teaches "wrong but clean").
  2. Tests run in sandbox.py while other completions still decode; no expected output ever leaves this process.
  3. One stage at 44K tokens, lr 4e-6, no overlong filter (truncated: 0), no epoch-wise filter.
Deviations from the paper:
  1. Its 9.8K problems are not public: load_rows() reads the public sets they came from, in six schemas.
  2. Its verifier descends from LiveCodeBench's, which gives full marks to programs that look up the answer inside the
     runner. Kept are its comparison rules; not kept: `==` between Python objects (results are JSON: a tuple is a list,
     True is not 1) and the whole-problem time limit. Idioms that its rewriting breaks (open(0), globals) pass.
  3. Time limits are CPU seconds, so that a busy machine fails nobody.
  4. Interactive and special-judge problems are found by their fields, else by their wording.
torchrun --nproc_per_node=8 coderl.py --init_from=out/mathrl/final --out_dir=out/coderl
"""

import ast
import decimal
import json
import math
import random
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import sandbox
from common import BadRow, fail, field, load_table, print0

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    init_from: str = "out/mathrl/final"  # checkpoint of the previous stage, or any Hugging Face Qwen3 folder
    out_dir: str = "out/coderl"
    data: str = "nvidia/Nemotron-RL-coding-competitive_coding"  # hub id, folder, parquet, .json or .jsonl
    eval_data: str = ""  # same schemas; "": no held-out metric
    engine: str = "auto"  # rollouts: auto or torch
    prompts_per_step: int = 128  # over all ranks; paper T19
    group_size: int = 8  # completions per prompt (G); paper T19
    num_steps: int = 90  # paper T19; 64 for the thinking models
    max_prompt_tokens: int = 4096  # longer prompts are dropped at load
    max_new_tokens: int = 45056  # 44K, the last steps 48K; 14B: 56K; paper T19
    rope_factor: float = 2.0  # YaRN: prompt + completion pass 32K
    temperature: float = 1.0  # of the sampler and of the trained log-probs; paper T19, 0.8 with 48K
    top_p: float = 0.95  # sampler only (recipe gap 6); paper T19
    top_k: int = 0  # sampler only; 0: off
    overlong_filter: bool = False  # truncated completions earn 0; paper 4.6.2
    max_refill_rounds: int = 0  # dynamic sampling: rounds of fresh prompts for groups of equal rewards (IF-RL only)
    test_seconds: float = 6.0  # CPU time of one test, a problem's own limit if that is longer; LiveCodeBench's default
    memory_mb: int = 1024  # of one test
    lr: float = 4e-6  # AdamW; paper T19
    final_lr: float = 1.0  # last step's learning rate as a fraction of lr, linear; 1: constant (recipe gap 3)
    warmup_steps: int = 0  # linear
    beta1: float = 0.9  # paper T19
    beta2: float = 0.95  # paper T19
    weight_decay: float = 0.01  # not stated in the paper (recipe gap 4)
    grad_clip: float = 1.0  # not stated in the paper
    clip_low: float = 0.2  # ratio clip; never binds, one update a batch keeps the ratio at 1
    clip_high: float = 0.2
    micro_batch_tokens: int = 65536  # tokens of one packed forward pass on one rank
    reward_workers: int = 64  # programs in flight per rank; the sandbox runs two per core at a time
    max_infra: float = 0.02  # the run stops when a larger share of a step's rewards are infrastructure failures
    eval_every: int = 10  # steps; 0: never
    eval_rows: int = 256  # held-out rows, one sample each
    save_every: int = 10  # steps
    sample_every: int = 10  # steps between printed samples
    seed: int = 0


# ---- 2. Data ---------------------------------------------------------------------------------------------------------

FORMAT = "lace the solution code in the following format:\n```python\n# Your solution code here\n```"  # AceReason's
PLAIN = "{problem}\n\nWrite Python code to solve the problem. Please p" + FORMAT
HEADER = "{problem}\n\nSolve the problem starting with the provided function header.\n\nFunction header:\n```\n{header}\n```\n\nP"
INTERACTIVE = re.compile(r"this is an interactive (problem|task)|interactor|flush the output", re.I)
ANY_ANSWER = re.compile(r"(any|multiple|several|more than one) (\w+ )?(valid |correct |possible |optimal )*(answer|solution|output)s?"
                        r".{0,60}(accepted|print any|output any|return any|any of them)|(print|output|return) any of them", re.I | re.S)  # fmt: skip


def loads(text):
    """A JSON value; sets that were written by Python's repr (TACO, PrimeIntellect) are read as its literals."""
    try:
        return json.loads(text)
    except ValueError:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise BadRow("tests that are neither JSON nor Python literals")


def find_tests(row):
    """The raw tests of a row in any of the six schemas: {"inputs", "outputs", "fn_name"} or a list of single tests."""
    for holder in ("verifier_metadata", "responses_create_params"):  # Nemotron-RL-coding, new and old
        if isinstance(row.get(holder), dict) and row[holder].get("unit_tests"):
            return row[holder]["unit_tests"]
    for name in ("unit_tests", "tests", "verification_info", "input_output", "official_tests"):
        if row.get(name):
            return row[name]  # DeepCoder; PrimeIntellect; TACO and APPS; open-r1/codeforces
    raise BadRow("no tests")


def normal_tests(row):
    """{"inputs": [str], "outputs": [str], "fn_name", "time_limit"}; a call's input is one JSON value per line."""
    tests = find_tests(row)
    tests = loads(tests) if isinstance(tests, str) else tests
    if isinstance(tests, dict) and "test_cases" in tests:
        if tests.get("language", "python") != "python":
            raise BadRow("not a Python problem")
        tests = tests["test_cases"]
    if isinstance(tests, list):
        names = {t.get("fn_name") or (t.get("metadata") or {}).get("func_name") for t in tests}
        if len(names) != 1:
            raise BadRow("tests of several functions, or none")
        tests = {"inputs": [t["input"] for t in tests], "outputs": [t["output"] for t in tests], "fn_name": names.pop()}
    inputs, outputs, name = tests.get("inputs") or [], tests.get("outputs") or [], tests.get("fn_name") or None
    if not inputs or len(inputs) != len(outputs):
        raise BadRow("no tests, or more inputs than outputs")
    if name:
        lines = lambda x: [loads(line) for line in x.split("\n") if line.strip()] if isinstance(x, str) else list(x)
        inputs = ["\n".join(json.dumps(value) for value in lines(x)) for x in inputs]
        outputs = [loads(x) if isinstance(x, str) else x for x in outputs]
        if all(isinstance(x, list) and len(x) == 1 for x in outputs) and not isinstance(tests["outputs"][0], str):
            outputs = [x[0] for x in outputs]  # TACO and APPS wrap every result in a list
        outputs = [json.dumps(x) for x in outputs]
    else:
        text = lambda x: "\n".join(map(str, x)) if isinstance(x, list) else str(x)
        inputs, outputs = [text(x) for x in inputs], [text(x) for x in outputs]
    return {"inputs": inputs, "outputs": outputs, "fn_name": name, "time_limit": row.get("time_limit")}


def statement(row, where):
    """The problem text of a row; open-r1/codeforces keeps it in parts."""
    if row.get("description"):
        parts = [("", row["description"]), ("Input\n", row.get("input_format")), ("Output\n", row.get("output_format")),
                 ("Note\n", row.get("note"))]  # fmt: skip
        parts += [("Example\n", f"Input:\n{e['input']}\nOutput:\n{e['output']}") for e in row.get("examples") or []]
        return "\n\n".join(title + text for title, text in parts if text)
    text = row.get("problem") or row.get("question") or row.get("prompt")
    text = text or (row.get("responses_create_params") or {}).get("input")
    text = text[-1]["content"] if isinstance(text, list) else text
    return text if isinstance(text, str) and text.strip() else field(row, where, "problem")


def normalize(row, where):
    """One row of any known code set -> {"messages", "think", "tests", "solution"}; BadRow drops it with a reason."""
    problem = statement(row, where).strip()
    if row.get("input_mode") == "interactive" or INTERACTIVE.search(problem):
        raise BadRow("interactive")
    if row.get("generated_checker") or ANY_ANSWER.search(problem):
        raise BadRow("several answers are right (special judge)")
    if row.get("official_tests_complete") is False or row.get("input_mode") == "file":
        raise BadRow("incomplete tests, or tests through files")
    tests = normal_tests(row)
    name, header = tests["fn_name"], row.get("starter_code")
    if name and not header and name not in problem:
        header = f"def {name}(...):"
    if "```python" not in problem:
        problem = HEADER.format(problem=problem, header=header.rstrip()) + FORMAT if header else PLAIN.format(problem=problem)
    gold = row.get("solution") or row.get("gold_standard_solution") or row.get("solutions") or ""
    gold = (loads(gold) if gold.startswith("[") else gold) if isinstance(gold, str) else gold
    gold = gold if isinstance(gold, str) else next((s for s in gold if isinstance(s, str)), "")
    return {"messages": [{"role": "user", "content": problem}], "think": True, "tests": tests, "solution": unfence(gold)}


def load_rows(cfg, path=None, limit=0):
    """Rows of cfg.data (or path) in the normal form; what was dropped is printed by reason."""
    return load_table(path or cfg.data, normalize, limit)


def select_rows(rows, epoch, history, cfg):
    """Indices of the rows in this epoch's pool: all of them."""
    return list(range(len(rows)))


# ---- 3. Reward -------------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"```(?:python3?|py)[^\S\n]*\n(.*?)```", re.S | re.I)


def extract_code(text):
    """The last ```python block, or None."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else None


def unfence(text):
    """A solution with or without its fence."""
    return extract_code(text) or text


def same_output(got, expected):
    """LiveCodeBench's rule for programs: equal stripped lines, each as text or as a list of exact decimals."""
    got, expected = ([line.strip() for line in text.strip().split("\n")] for text in (got, expected))
    if len(got) != len(expected):
        return False
    for line, wanted in zip(got, expected):
        if line != wanted:
            try:
                if [decimal.Decimal(x) for x in line.split()] != [decimal.Decimal(x) for x in wanted.split()]:
                    return False
            except decimal.InvalidOperation:
                return False
    return True


def same_value(got, expected):
    """Rule for calls: the same JSON value, exact types; where one side is a float, 1e-5 relative or 1e-8 absolute."""
    if isinstance(expected, float) or isinstance(got, float):
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (got, expected))
        return numbers and (got == expected or abs(got - expected) <= 1e-8 + 1e-5 * abs(expected))
    if type(got) is not type(expected):
        return False
    if isinstance(got, list):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(got, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in got)
    return got == expected


def run_tests(code, tests, timeout=6.0, memory_mb=1024, stop=False):
    """One verdict per test: ok, wrong, timeout, memory, crash, output or infra; with stop, up to the first not ok."""
    name, verdicts = tests.get("fn_name"), []
    calls = ((name, [json.loads(line) for line in text.split("\n") if line]) if name else text for text in tests["inputs"])
    results = sandbox.run_each(code, calls, timeout, memory_mb)
    for result, expected in zip(results, tests["outputs"]):
        verdict = result.status
        if verdict == "ok":
            try:
                right = same_value(result.value, json.loads(expected)) if name else same_output(result.stdout, expected)
            except (RecursionError, OverflowError):  # nested beyond reason, or an int no float can hold
                right = False
            verdict = "ok" if right else "wrong"
        verdicts.append(verdict)
        if stop and verdict != "ok":
            break
    results.close()  # the program ends here
    return verdicts


def language_ok(prompt, response):
    """False if response has letters of a script that prompt does not use; Latin, Greek and symbols are always fine."""

    def scripts(text):
        letters = (c for c in set(text) if ord(c) > 127 and c.isalpha() and not 0x2070 <= ord(c) < 0x2190)
        names = {unicodedata.name(c, "UNNAMED").split()[0].split("-")[0] for c in letters}
        return names - {"LATIN", "GREEK", "MATHEMATICAL", "MODIFIER", "FULLWIDTH", "MICRO", "FEMININE", "MASCULINE"}

    return scripts(response) <= scripts(prompt)


def verdict(response, tests, prompt=None, timeout=6.0, memory_mb=1024):
    """(reward, status, share of tests passed before the first failure) of one response with its reasoning."""
    reasoning, closed, final = response.rpartition("</think>")
    if prompt is not None and not language_ok(prompt, reasoning if closed else response):
        return 0, "language", 0.0
    code = extract_code(final) if closed else None
    if code is None:
        return 0, "no_answer", 0.0
    verdicts = run_tests(code, tests, max(timeout, tests.get("time_limit") or 0), memory_mb, stop=True)
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
    prompt = " ".join(turn["content"] for turn in rollout.row["messages"])
    return verdict(text, rollout.row["tests"], prompt, cfg.test_seconds, cfg.memory_mb)


def make_reward(cfg):
    """(submit, collect): submit(rollout) starts its tests in the background, collect(rollouts) waits and sets rewards."""
    sandbox.run("pass")  # starts the zygote, and announces a host without namespaces, before there is a model
    pool = ThreadPoolExecutor(cfg.reward_workers)
    pending = {}  # id -> (rollout, future); holding the rollout keeps its id unique

    def submit(rollout):
        pending[id(rollout)] = rollout, pool.submit(judge, rollout, cfg)

    def collect(rollouts):
        for rollout in rollouts:
            if id(rollout) not in pending:
                submit(rollout)
            rollout.reward, rollout.status, rollout.passed = pending.pop(id(rollout))[1].result()

    return submit, collect


def monitor(rollouts):
    """This stage's numbers for the log, as shares of all rollouts; passed is never part of the reward."""
    kinds = ("wrong", "timeout", "crash", "no_answer", "language")
    shares = {kind: sum(r.status == kind for r in rollouts) for kind in kinds}
    shares["passed"] = sum(getattr(r, "passed", 0.0) for r in rollouts)
    return {name: total / max(len(rollouts), 1) for name, total in shares.items()}


def table_program(tests, spoil=False):
    """A program that knows every answer: the gold of rows without a solution. Spoiled, its last answer is wrong."""
    answers = dict(zip(tests["inputs"], tests["outputs"]))
    if spoil:
        answers[tests["inputs"][-1]] = '"no such answer"'
    if tests["fn_name"]:
        return f"import json\nTABLE = {answers!r}\ndef {tests['fn_name']}(*args):\n" \
               f"    return json.loads(TABLE['\\n'.join(json.dumps(a) for a in args)])\n"  # fmt: skip
    return f"import sys\nprint({answers!r}[sys.stdin.read()])\n"


def self_test(rows, cfg):
    """Before training: on a sample, a program that prints the expected outputs earns 1, with one output spoiled 0."""
    fence = lambda code: f"</think>\n```python\n{code}\n```"
    sample = random.Random(cfg.seed).sample(rows, min(16, len(rows)))
    for row in sample:
        earned = [reward(fence(table_program(row["tests"], spoil)), row["tests"]) for spoil in (False, True)]
        if earned != [1, 0]:
            fail(f"sandbox self test: the expected outputs earn {earned[0]} and spoiled ones {earned[1]}, not 1 and 0, for "
                 f"{row['messages'][-1]['content'][:80]!r}.")  # fmt: skip
    solved = [reward(fence(row["solution"]), row["tests"]) for row in sample if row["solution"]]
    print0(f"self test: {len(sample)} rows graded right, {sum(solved)} of {len(solved)} reference solutions pass"
           + ("" if solved else " (no row has one: whether the tests themselves are right was not checked)"))  # fmt: skip
    if solved and sum(solved) < len(solved) / 2:
        fail(f"sandbox self test: only {sum(solved)} of {len(solved)} reference solutions pass their own tests.")


# ---- 4. Eval ---------------------------------------------------------------------------------------------------------


def metric(rollout):
    """Whether one held-out rollout passes all tests; the mean over samples is the pass@1 of the paper."""
    return float(rollout.reward == 1)
