"""Spends many samples on one problem, in three ways.

Majority vote over patches (paper 7.4):
    python -m evals.scaling --model=out/toy/swerl/final --vote=out/toy/data/swe_test.jsonl
The submit-and-learn loop for contest problems (paper 5.1):
    python -m evals.scaling --model=... --ioi=problems.jsonl --rounds=50 --max_new_tokens=131072
Answers of a teacher that name the right files, as SFT data (paper 3.3.2):
    python -m evals.scaling --model=... --localise=nebius/SWE-rebench --repos=clones --out=loc.jsonl

A row of --ioi is {"name", "statement", "samples": tests, "subtasks": [{"name", "points",
"statement", "tests", "partial"}]}, with tests as {"inputs", "outputs"}.
The repository tests of --vote need the repository's container, so the user brings the command:
--check=COMMAND is run as `COMMAND instance_id` and gets {"patch": git diff, "scripts": [...]} on
standard input. It applies the patch and prints {"regression": how many of the repository's tests
pass, "scripts": [whether each ends without an error]}. Without --check a patch only has to parse.
Deviation from the paper: tail confidence is the mean log-prob of the drawn tokens, not of the top
20 tokens at each position.
"""

import contextlib
import json
import os
import shlex
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import coderl
import swerl
from engine import Rollout, make_engine, request_seed
from evals import benchmarks
from lib import data
from lib.common import finish, init_distributed
from lib.flags import PositiveFloat, PositiveInt, TopP, parse_config
from lib.guard import fail
from model import Qwen3, load_tokenizer, render_chat
from verifiers import patch_effect, patches


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    vote: str = ""  # rows of swerl.py: sample patches, take the majority's
    check: str = ""  # command that tests a patch in the repository's container, see above
    # With --check: how many scripts the model writes that fail while the bug is there. Paper 3.3.1
    # has 10, paper 7.4 has 40.
    reproductions: int = 10
    ioi: str = ""  # contest problems, see above
    localise: str = ""  # rows of SWE-bench's form: which files have to change, for SFT
    repos: str = ""  # --localise: folder of git clones named owner__name
    out: str = ""  # --localise: file for the rows of sft.py
    # Completions of a problem (paper: 32), or candidates of a subtask in a round (paper: 20).
    samples: PositiveInt = 20
    rounds: PositiveInt = 50  # submissions of a problem; the limit of the IOI
    max_new_tokens: PositiveInt = 32768  # paper: 128K for the IOI
    temperature: PositiveFloat = 0.6  # of sampling
    top_p: TopP = 0.95  # of sampling
    rope_factor: float = 0.0  # YaRN factor; 0: as the checkpoint has it
    engine: str = "auto"  # auto, torch or vllm
    limit: int = 0  # problems; 0: all
    seed: int = 0


def answer_of(text):
    """Return what stands after the thought."""
    return text.rpartition("</think>")[2]


def as_messages(text):
    return [{"role": "user", "content": text}]


# Below, sample(conversations, key, row) -> rollouts is the model: one completion a conversation.
# key: numbers that no other call of the run has; they seed the draws. row: stored in each rollout.


# ---- 1. Majority vote ----------------------------------------------------------------------------
def normal_patch(files, after):
    """Return what a patch does, whatever its comments and layout: ((path, syntax tree), ...).

    files, after: {path: text} before and after it. None if a file no longer parses, or if nothing
    but comments and layout changed: such patches would all be equal, and could win the vote.
    """
    changed = []
    for path in patches.changes(files, after):
        before, text = files.get(path), after[path]
        if before is not None and patch_effect.same_code(path, before, text):
            continue
        if patch_effect.stops_parsing(path, before or "", text):
            return None
        tree = patch_effect.syntax_tree(text) if path.endswith(".py") else None
        changed.append((path, text if tree is None else tree))
    return tuple(changed) or None


def vote(texts, files, eligible=None):
    """Return the index of the response whose patch most responses agree on.

    Of equals the shortest patch wins. None if no patch applies. eligible: the indices that may be
    chosen and have a vote; None: all.
    """
    afters, patch_of = {}, {}
    for i, text in enumerate(texts):
        if eligible is not None and i not in eligible:
            continue
        after = patches.apply_edits(text, files)
        patch = after and normal_patch(files, after)
        if patch:
            afters[i], patch_of[i] = after, patch
    votes = Counter(patch_of.values())

    def place(i):
        size = sum(len(diff) for diff in patches.changes(files, afters[i]).values())
        return -votes[patch_of[i]], size, i

    return min(patch_of, key=place, default=None)


REPRODUCE = (
    "Write a Python script that reproduces this issue. It is run in the repository: it has to end "
    "with an error while the issue is\nthere, and without one as soon as it is solved. "
    "{format}\n\n{issue}"
)


def reproduction_scripts(row, n, sample, count):
    """Return the distinct scripts among `count` that the model writes for the issue."""
    messages = as_messages(REPRODUCE.format(format=coderl.FORMAT, issue=row["issue"]))
    scripts = []
    for r in sample([messages] * count, (n, 1), row):
        script = coderl.extract_code(answer_of(r.text))
        if script and script not in scripts:
            scripts.append(script)
    return scripts


def survivors(texts, row, scripts, check):
    """Return the indices of the patches that pass the most tests.

    Regression tests come first, then reproduction scripts: Agentless's order, paper 3.3.1. Equal
    patches are tested once. check(row, patch, scripts) -> {"regression", "scripts"}
    """
    files = row["files"]
    diffs = []
    for text in texts:
        after = patches.apply_edits(text, files)
        applies = after and normal_patch(files, after)
        diffs.append(benchmarks.git_patch(files, after) if applies else None)

    # A script that the unpatched repository passes shows no bug.
    unpatched = check(row, "", scripts)["scripts"]
    scripts = [script for script, passes in zip(scripts, unpatched, strict=True) if not passes]

    tests_passed = {}
    for diff in dict.fromkeys(filter(None, diffs)):
        result = check(row, diff, scripts)
        tests_passed[diff] = (result["regression"], sum(result["scripts"]))
    if not tests_passed:
        return set()
    most = max(tests_passed.values())
    return {i for i, diff in enumerate(diffs) if diff and tests_passed[diff] == most}


def is_check_result(result, scripts):
    """True if the user's command printed what the docstring above asks for."""
    try:
        counts_tests = isinstance(result["regression"], int)
        return counts_tests and len(result["scripts"]) == len(scripts)
    except (KeyError, TypeError):
        return False


def run_check(command, row, patch, scripts):
    """Return what the user's command says of a patch."""
    done = subprocess.run(
        [*shlex.split(command), row["instance_id"]],
        input=json.dumps({"patch": patch, "scripts": scripts}),
        capture_output=True,
        text=True,
        check=False,
    )
    result = None
    with contextlib.suppress(ValueError):
        result = json.loads(done.stdout)
    if not is_check_result(result, scripts):
        output = done.stderr.strip() or done.stdout.strip() or "nothing"
        said = output.splitlines()[-1][:200]
        fail(
            f'--check: on {row["instance_id"]} it ended with {done.returncode} and said "{said}"; '
            f'expected {{"regression": number, "scripts": [{len(scripts)} booleans]}}.',
            note="Votes so far stand above.",
        )
    return result


def run_vote(cfg, sample):
    """Print and return the mean scores of one sample, of the majority's and of the best one."""
    rows = swerl.load_rows(swerl.Config(data=cfg.vote, min_prompt_tokens=0))
    if cfg.limit:
        rows = rows[: cfg.limit]

    def check(row, patch, scripts):
        return run_check(cfg.check, row, patch, scripts)

    sums = np.zeros(3)
    for n, row in enumerate(rows, 1):
        rollouts = sample([row["messages"]] * cfg.samples, n, row)
        texts = [r.text for r in rollouts]
        eligible = None
        if cfg.check:
            scripts = reproduction_scripts(row, n, sample, cfg.reproductions)
            eligible = survivors(texts, row, scripts, check)
        scores = [swerl.metric(r) for r in rollouts]
        chosen = vote(texts, row["files"], eligible)
        if None in scores:
            fail(f"row {n}: the sandbox failed.", note="Votes so far stand above.")
        sums += [np.mean(scores), 0.0 if chosen is None else scores[chosen], max(scores)]
        if n % 10 == 0 or n == len(rows):
            mean, voted, best = 100 * sums / n
            print(
                f"{n:4d} problems | one sample {mean:.1f} | majority of {cfg.samples} {voted:.1f} "
                f"| any of {cfg.samples} {best:.1f}",
                flush=True,
            )
    return sums / len(rows)


# ---- 2. Submit and learn -------------------------------------------------------------------------
TAIL = 2048  # tokens at the end of a completion whose confidence ranks candidates
# How many submissions of a subtask are shown to the model again (paper 5.1): the last failures, or
# the best ones where a subtask gives partial points.
KEPT_FAILURES = 5
KEPT_BEST = 3


@dataclass
class Submission:
    """A program that did not solve its subtask."""

    code: str
    share: float  # of the subtask's tests that it passed
    verdicts: str  # "3 ok, 1 wrong"


def confidence(rollout):
    """Return the mean log-prob of the last tokens: how sure the model was of its program."""
    if not len(rollout.sampler_logprobs):
        return -float("inf")
    return float(np.mean(rollout.sampler_logprobs[-TAIL:]))


def attempt_prompt(problem, subtask, submissions, solved):
    """Return the prompt of an attempt at a subtask.

    It shows the problem, the subtask, what was submitted for it with verdicts, and the programs
    that solved other subtasks, solved: {name: program}.
    """
    if subtask.get("partial"):
        shown = sorted(submissions, key=lambda submission: -submission.share)[:KEPT_BEST]
    else:
        shown = submissions[-KEPT_FAILURES:]
    parts = [
        f"Write Python code to solve the problem. {coderl.FORMAT}",
        problem["statement"],
        f"Solve this subtask: {subtask.get('statement') or subtask['name']}",
    ]
    for submission in shown:
        parts.append(
            f"An earlier submission earned {100 * submission.share:.0f}% ({submission.verdicts}):\n"
            f"```python\n{submission.code}```"
        )
    for name, code in solved.items():
        parts.append(f"This solved subtask {name}, which may help:\n```python\n{code}```")
    return "\n\n".join(parts)


class Contest:
    """One problem while it is being solved: what was submitted, and what it has earned so far."""

    def __init__(self, problem, submit):
        """submit(code, tests, stop=False) -> verdicts of the tests, "ok" among them"""
        self.problem = problem
        self.submit = submit
        self.num_submissions = 0
        self.solved = {}  # {subtask: the program that solved it}
        self.share = {subtask["name"]: 0.0 for subtask in problem["subtasks"]}
        self.failures = {subtask["name"]: [] for subtask in problem["subtasks"]}
        self.pool = ThreadPoolExecutor(8)

    def open_subtasks(self):
        return [s for s in self.problem["subtasks"] if s["name"] not in self.solved]

    def points(self):
        return sum(s["points"] * self.share[s["name"]] for s in self.problem["subtasks"])

    def most_confident(self, subtask, rollouts):
        """Return the program worth a submission, or None.

        Candidates without code, those submitted before, and those that fail the problem's samples
        are dropped; of the rest the one that the model was surest of is taken.
        """
        submitted = {submission.code for submission in self.failures[subtask["name"]]}
        codes = []
        for r in rollouts:
            closed = "</think>" in r.text
            codes.append(coderl.extract_code(answer_of(r.text)) if closed else None)

        def passes_samples(code):
            if not code or code in submitted:
                return False
            return set(self.submit(code, self.problem["samples"], stop=True)) == {"ok"}

        passed = list(self.pool.map(passes_samples, codes))
        fit = [i for i in range(len(codes)) if passed[i]]
        if not fit:
            return None
        return codes[max(fit, key=lambda i: confidence(rollouts[i]))]

    def judge(self, code, subtask):
        """Judge a submission on every subtask, as at the contest; remember a failure on its own."""
        self.num_submissions += 1
        for other in self.problem["subtasks"]:
            name = other["name"]
            verdicts = self.submit(code, other["tests"])
            passed = verdicts.count("ok") / len(verdicts)
            earned = passed if other.get("partial") or passed == 1 else 0.0
            self.share[name] = max(self.share[name], earned)
            if passed == 1:
                self.solved.setdefault(name, code)
            elif other is subtask:
                counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(verdicts).items())
                self.failures[name].append(Submission(code, passed, counts))


def solve(problem, sample, cfg, submit=coderl.run_tests, number=0):
    """Return (points, submissions) of a problem.

    In each round every open subtask gets cfg.samples candidates, and one candidate is submitted.
    Its verdicts are shown to the model in the next round.
    """
    contest = Contest(problem, submit)
    for turn in range(cfg.rounds):
        for subtask in contest.open_subtasks():
            name = subtask["name"]
            prompt = attempt_prompt(problem, subtask, contest.failures[name], contest.solved)
            messages = as_messages(prompt)
            rollouts = sample(
                [messages] * cfg.samples,
                (number, turn, problem["subtasks"].index(subtask)),
                {"messages": messages, "think": True},
            )
            code = contest.most_confident(subtask, rollouts)
            if code is not None and contest.num_submissions < cfg.rounds:
                contest.judge(code, subtask)
        print(
            f"{problem['name']} round {turn + 1}/{cfg.rounds} | "
            f"{contest.num_submissions} submissions | {contest.points():g} points | "
            f"solved: {', '.join(contest.solved) or '-'}",
            flush=True,
        )
        if not contest.open_subtasks() or contest.num_submissions >= cfg.rounds:
            break
    return contest.points(), contest.num_submissions


def run_contests(cfg, sample):
    """Solve every problem of --ioi and print the sum of the points."""
    problems = data.read_rows(cfg.ioi, cfg.limit)
    for where, problem in problems:
        present = {key: value for key, value in problem.items() if value is not None}
        for name, kind in (("statement", str), ("samples", dict), ("subtasks", list)):
            data.required_field(present, where, name, kind)
    results = [solve(problem, sample, cfg, number=n) for n, (_, problem) in enumerate(problems)]
    points = sum(points for points, _ in results)
    submissions = sum(submissions for _, submissions in results)
    print(f"{len(results)} problems, {points:g} points with {submissions} submissions")


# ---- 3. Localisation demonstrations --------------------------------------------------------------
def run_localise(cfg, sample):
    """Write the teacher's answers that name every file of the golden patch, as rows for sft.py.

    This is the first step of Agentless-mini. The prompt has the issue and all Python files of the
    repository. Returns (answers kept, rows).
    """
    rows, *_ = benchmarks.load_swebench_files(cfg.localise, {"repos": cfg.repos})
    if cfg.limit:
        rows = rows[: cfg.limit]
    rows = [row for row in rows if row["golden"]]
    kept = 0
    with open(cfg.out + ".tmp", "w") as f:
        for n, row in enumerate(rows, 1):
            for r in sample([row["messages"]] * cfg.samples, n, row):
                named = []
                if "</think>" in r.text and r.finish_reason == "stop":
                    named = benchmarks.named_files(answer_of(r.text))
                if not set(row["golden"]) <= set(named):
                    continue
                kept += 1
                demonstration = {
                    "messages": [*row["messages"], {"role": "assistant", "content": r.text}],
                    "category": "swe_localization",
                    "generator": cfg.model,
                    "thinking": True,
                }
                f.write(json.dumps(demonstration) + "\n")
    os.rename(cfg.out + ".tmp", cfg.out)
    print(
        f"{cfg.localise}: {kept} of {len(rows) * cfg.samples} answers name every file of their "
        f"golden patch -> {cfg.out}"
    )
    return kept, len(rows)


# ---- 4. main -------------------------------------------------------------------------------------
def main(cfg):
    has_task = cfg.vote or cfg.ioi or (cfg.localise and cfg.out)
    if not has_task or not os.path.exists(os.path.join(cfg.model, "config.json")):
        fail(
            "--model=folder and one of --vote=file, --ioi=file, --localise=file --out=file are "
            "needed.",
            note="Nothing was sampled.",
        )
    # A day, because long completions keep a process busy for hours.
    _, _, device = init_distributed(cfg.seed, 24 * 3600)
    tokenizer = load_tokenizer(cfg.model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Qwen3.from_pretrained(
        cfg.model, device=device, dtype=dtype, rope_factor=cfg.rope_factor
    )
    engine = make_engine(cfg.engine, model, tokenizer)

    def sample(conversations, key, row):
        numbers = key if isinstance(key, tuple) else (key,)
        rollouts = []
        for k, messages in enumerate(conversations):
            prompt_ids = render_chat(tokenizer, messages, True)[0]
            seed = request_seed(cfg.seed, 3, *numbers, k)
            rollouts.append(Rollout(row=row, group=0, prompt_ids=prompt_ids, seed=seed))
        engine.generate(rollouts, cfg.max_new_tokens, cfg.temperature, cfg.top_p)
        return rollouts

    if cfg.vote:
        run_vote(cfg, sample)
    elif cfg.localise:
        run_localise(cfg, sample)
    else:
        run_contests(cfg, sample)


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
