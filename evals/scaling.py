"""Spends many samples on one problem, in three ways.

Majority vote over patches, best@k (paper 3.3.1, 7.4). After --tasks=swebench_files, evaluate.py
samples k patches an issue from the files that the model itself found, and grades each by the
official harness. This elects one of the k without looking at the grades:
    python evaluate.py --model=M --results=R/results.jsonl --stage=S --tasks=swebench --samples=32
        --repos=clones --verifier_python=.venv-swebench/bin/python
    python -m evals.scaling --model=M --vote=princeton-nlp/SWE-bench_Verified@test --samples=32
        --candidates=R/samples/S --repos=clones --check=COMMAND
The submit-and-learn loop for contest problems (paper 5.1):
    python -m evals.scaling --model=M --ioi=problems.jsonl --max_new_tokens=131072 --rope_factor=4
Answers of a teacher that name the right files, as SFT data (paper 3.3.2):
    python -m evals.scaling --model=M --localise=nebius/SWE-rebench --repos=clones --out=loc.jsonl

--vote without --candidates takes rows of swerl.py, shows the files of their golden patches, samples
the patches itself and scores them as swerl.py's held-out metric does.
The repository's tests need its container, so the user brings the command: --check=COMMAND is run as
`COMMAND instance_id` and gets {"patch": git diff, "scripts": [...]} on standard input. It applies
the patch and prints {"regression": how many of the repository's tests pass, "scripts": [whether
each ends without an error]}. Without --check a patch only has to parse.
A row of --ioi is {"name", "statement", "samples": tests, "subtasks": [{"name", "points",
"statement", "tests"}]}, with tests as {"inputs", "outputs"}. With the contest's own graders,
--grader=COMMAND is run as `COMMAND name subtask`, or as `COMMAND name samples`, and gets a C++
program on standard input. It prints {"score": share of the subtask's points, 0 to 1, "verdict":
text for the model}; rows then need neither samples nor tests, and a subtask with "partial": true
may earn a part of its points.

Deviations from the paper, numbered as in docs/paper.md: D50 scripts that reproduce an issue are
written without seeing patches, and judged by how they end; D51 tail confidence is the mean log-prob
of the drawn tokens; D52 without --grader programs are Python, and a subtask is all or nothing.
"""

import contextlib
import glob
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
from evals.results import kept_lines
from lib import data
from lib.common import finish, init_distributed
from lib.flags import PositiveFloat, PositiveInt, TopP, parse_config
from lib.guard import fail, one_sentence
from model import (
    Qwen3,
    load_tokenizer,
    max_positions,
    original_positions,
    read_config,
    render_chat,
)
from verifiers import patch_effect, patches


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    vote: str = ""  # SWE-bench, or rows of swerl.py: of the patches take the majority's
    # --vote: folder of evaluate.py's samples of swebench_files and swebench. "": patches are
    # sampled here, for prompts that show the golden files
    candidates: str = ""
    prompt_tokens: PositiveInt = 32768  # --candidates: what evaluate.py was given; paper: 14B 64K
    check: str = ""  # --vote: command that tests a patch in the repository's container, see above
    # With --check: how many scripts the model writes that fail while the bug is there. Paper 7.4
    # has 40, paper 3.3.1 has 10.
    reproductions: PositiveInt = 40
    ioi: str = ""  # contest problems, see above
    grader: str = ""  # --ioi: command that judges a program as the contest does, see above
    localise: str = ""  # rows of SWE-bench's form: which files have to change, for SFT
    repos: str = ""  # --vote, --localise: folder of git clones named owner__name
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
    """Return the distinct scripts among `count` that the model writes for the issue [D50]."""
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


def ask_command(flag, command, arguments, given, is_valid, expected):
    """Return the JSON that a user's command prints for a text on its standard input.

    flag: the flag that names the command. is_valid(result): whether it is what was expected.
    """
    done = subprocess.run(
        [*shlex.split(command), *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    with contextlib.suppress(ValueError, KeyError, TypeError):
        result = json.loads(done.stdout)
        if is_valid(result):
            return result
    output = done.stderr.strip() or done.stdout.strip() or "nothing"
    said = output.splitlines()[-1][:200]
    fail(
        f'{flag}: on {" ".join(arguments)} it ended with {done.returncode} and said "{said}"; '
        f"expected {expected}.",
        note="What was found so far stands above.",
    )


def run_check(command, row, patch, scripts):
    """Return what the user's command says of a patch: {"regression", "scripts"}."""

    def is_valid(result):
        counts_tests = isinstance(result["regression"], int)
        return counts_tests and len(result["scripts"]) == len(scripts)

    given = json.dumps({"patch": patch, "scripts": scripts})
    expected = f'{{"regression": number, "scripts": [{len(scripts)} booleans]}}'
    return ask_command("--check", command, [row["instance_id"]], given, is_valid, expected)


def sampled_candidates(cfg, sample):
    """Yield (row, texts, scores) of rows of swerl.py, whose prompts show the golden files."""
    rows = swerl.load_rows(swerl.Config(data=cfg.vote, repos=cfg.repos, min_prompt_tokens=0))
    for n, row in enumerate(rows[: cfg.limit or None], 1):
        rollouts = sample([row["messages"]] * cfg.samples, n, row)
        # Where the prompt left no room to answer there is no patch, which scores 0.
        scores = [swerl.metric(r) for r in rollouts] or [0.0]
        if None in scores:
            fail(f"row {n}: the sandbox failed.", note="Votes so far stand above.")
        yield row, [r.text for r in rollouts], scores


def graded_candidates(cfg):
    """Yield (row, texts, scores) of SWE-bench: patches that evaluate.py has sampled and graded.

    Their prompts show the files that the model found itself, and the scores are the harness's.
    """
    outside = {
        "samples": cfg.candidates,
        "repos": cfg.repos,
        "prompt_tokens": cfg.prompt_tokens,
    }
    rows, *_ = benchmarks.load_swebench(cfg.vote, outside)
    # {problem: {number of the sample: its line}}
    kept = {}
    pattern = os.path.join(glob.escape(cfg.candidates), "swebench_think_sampled.rank*.jsonl")
    for line in kept_lines(pattern):
        if "score" in line:
            kept.setdefault(line["problem"], {})[line["sample"]] = line
    for problem, row in enumerate(rows[: cfg.limit or None]):
        lines = [kept.get(problem, {}).get(k) for k in range(cfg.samples)]
        num_graded = sum(line is not None for line in lines)
        if num_graded < cfg.samples:
            fail(
                f"--candidates={cfg.candidates}: {row['instance_id']} has {num_graded} graded "
                f"patches of {cfg.samples}: run evaluate.py --tasks=swebench "
                f"--samples={cfg.samples}, or pass --samples.",
                note="Votes so far stand above.",
            )
        if lines[0]["prompt"] != row["messages"][-1]["content"]:
            fail(
                f"--candidates={cfg.candidates}: the patches for {row['instance_id']} were sampled "
                "for another prompt than --vote, --repos and the samples of swebench_files make.",
                note="Votes so far stand above.",
            )
        yield row, [line["text"] for line in lines], [line["score"] for line in lines]


def run_vote(cfg, sample):
    """Print and return the mean scores: of one sample, of the elected one and of the best one.

    The elected one's is the paper's best@k, and the best one's is pass@k.
    """

    def check(row, patch, scripts):
        return run_check(cfg.check, row, patch, scripts)

    candidates = graded_candidates(cfg) if cfg.candidates else sampled_candidates(cfg, sample)
    sums, k = np.zeros(3), cfg.samples
    for n, (row, texts, scores) in enumerate(candidates, 1):
        eligible = None
        # An instance for which no file was found has no patch to check.
        if cfg.check and row["files"]:
            scripts = reproduction_scripts(row, n, sample, cfg.reproductions)
            eligible = survivors(texts, row, scripts, check)
        chosen = vote(texts, row["files"], eligible)
        sums += [np.mean(scores), 0.0 if chosen is None else scores[chosen], max(scores)]
        mean, voted, best = 100 * sums / n
        print(
            f"{n:4d} problems | one sample {mean:.1f} | best@{k}, elected {voted:.1f} "
            f"| pass@{k} {best:.1f}",
            flush=True,
        )
    return sums / n


# ---- 2. Submit and learn -------------------------------------------------------------------------
TAIL = 2048  # tokens at the end of a completion whose confidence ranks candidates
# How many submissions of a subtask are shown to the model again (paper 5.1): the last failures, or
# the best ones where a subtask gives partial points.
KEPT_FAILURES = 5
KEPT_BEST = 3
# A sandbox that fails says nothing about the program.
SANDBOX_TRIES = 3
# With --grader: the graders of a contest compile C++.
CPP_FORMAT = "End your answer with the whole program in one block that begins with ```cpp."


@dataclass
class Submission:
    """A program that did not solve its subtask."""

    code: str
    share: float  # of the subtask's points that it earned
    verdict: str  # "3 ok, 1 wrong", or what the contest's grader said


def sandbox_judge(code, problem, subtask):
    """Return (share of the points, verdict) of a Python program by the tests of the row [D52].

    As at the IOI a subtask is worth what its worst test is worth; here a test is passed or not.
    subtask None: the samples
    """
    tests = problem["samples"] if subtask is None else subtask["tests"]
    for _ in range(SANDBOX_TRIES):
        verdicts = coderl.run_tests(code, tests, stop=subtask is None)
        if "infra" not in verdicts:
            break
    else:
        fail(
            f"{problem['name']}: the sandbox failed {SANDBOX_TRIES} times on one program.",
            note="Points so far stand above.",
        )
    counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(verdicts).items())
    return float(set(verdicts) == {"ok"}), counts


def command_judge(command):
    """Return a judge like sandbox_judge that asks the user's command, see above."""

    def is_valid(result):
        return 0 <= result["score"] <= 1 and isinstance(result["verdict"], str)

    def judge(code, problem, subtask):
        arguments = [problem["name"], "samples" if subtask is None else subtask["name"]]
        expected = '{"score": 0 to 1, "verdict": text}'
        result = ask_command("--grader", command, arguments, code, is_valid, expected)
        return float(result["score"]), result["verdict"]

    return judge


def confidence(rollout):
    """Return the mean log-prob of the last tokens: how sure the model was of its program [D51]."""
    if not len(rollout.sampler_logprobs):
        return -float("inf")
    return float(np.mean(rollout.sampler_logprobs[-TAIL:]))


def attempt_prompt(problem, subtask, submissions, solved, language="python"):
    """Return the prompt of an attempt at a subtask.

    It shows the problem, the subtask, the programs that solved other subtasks, {name: program}, and
    last what was submitted for this one, with verdicts: the order of the paper's prompt (C.3).
    """
    if subtask.get("partial"):
        shown = sorted(submissions, key=lambda submission: -submission.share)[:KEPT_BEST]
    else:
        shown = submissions[-KEPT_FAILURES:]
    wanted = f"Solve this problem in Python. {coderl.FORMAT}"
    if language == "cpp":
        wanted = f"Solve this problem in C++17. {CPP_FORMAT}"
    parts = [
        wanted,
        problem["statement"],
        f"Solve this subtask: {subtask.get('statement') or subtask['name']}",
    ]
    for name, code in solved.items():
        parts.append(f"This solved subtask {name}, which may help:\n```{language}\n{code}```")
    for submission in shown:
        parts.append(
            f"An earlier submission earned {100 * submission.share:.0f}% ({submission.verdict}):\n"
            f"```{language}\n{submission.code}```"
        )
    return "\n\n".join(parts)


def program_of(rollout, language):
    """Return the program of a completion, or None."""
    if "</think>" not in rollout.text:
        return None
    answer = answer_of(rollout.text)
    if language == "python":
        return coderl.extract_code(answer)
    programs = benchmarks.CPP_BLOCK.findall(answer)
    return programs[-1] if programs else None


class Contest:
    """One problem while it is being solved: what was submitted, and what it has earned so far."""

    def __init__(self, problem, judge, language):
        """judge: sandbox_judge, or one like it. language: of its programs, python or cpp"""
        self.problem = problem
        self.judge = judge
        self.language = language
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
        codes = [program_of(r, self.language) for r in rollouts]

        def passes_samples(code):
            if not code or code in submitted:
                return False
            return self.judge(code, self.problem, None)[0] == 1

        passed = list(self.pool.map(passes_samples, codes))
        fit = [i for i in range(len(codes)) if passed[i]]
        if not fit:
            return None
        return codes[max(fit, key=lambda i: confidence(rollouts[i]))]

    def submit(self, code, subtask):
        """Judge a program on every subtask, as at the contest; remember a failure on its own."""
        self.num_submissions += 1
        for other in self.problem["subtasks"]:
            name = other["name"]
            share, verdict = self.judge(code, self.problem, other)
            earned = share if other.get("partial") or share == 1 else 0.0
            self.share[name] = max(self.share[name], earned)
            if share == 1:
                self.solved.setdefault(name, code)
            elif other is subtask:
                self.failures[name].append(Submission(code, share, verdict))


def solve(problem, sample, cfg, number=0):
    """Return (points, submissions) of a problem.

    In each round every open subtask gets cfg.samples candidates, and one candidate is submitted.
    Its verdicts are shown to the model in the next round.
    """
    contest = Contest(problem, sandbox_judge, "python")
    if cfg.grader:
        contest = Contest(problem, command_judge(cfg.grader), "cpp")
    for turn in range(cfg.rounds):
        for subtask in contest.open_subtasks():
            name = subtask["name"]
            prompt = attempt_prompt(
                problem, subtask, contest.failures[name], contest.solved, contest.language
            )
            messages = as_messages(prompt)
            rollouts = sample(
                [messages] * cfg.samples,
                (number, turn, problem["subtasks"].index(subtask)),
                {"messages": messages, "think": True},
            )
            code = contest.most_confident(subtask, rollouts)
            if code is not None and contest.num_submissions < cfg.rounds:
                contest.submit(code, subtask)
        print(
            f"{problem['name']} round {turn + 1}/{cfg.rounds} | "
            f"{contest.num_submissions} submissions | {contest.points():g} points | "
            f"solved: {', '.join(contest.solved) or '-'}",
            flush=True,
        )
        if not contest.open_subtasks() or contest.num_submissions >= cfg.rounds:
            break
    return contest.points(), contest.num_submissions


def check_problem(problem, where, grader):
    """End the process if a problem of --ioi lacks a field, before anything is sampled."""
    fields = {"name": str, "statement": str, "subtasks": list}
    of_subtask = {"name": str, "points": (int, float)}
    if not grader:
        fields["samples"] = dict
        of_subtask["tests"] = dict

    def require(row, place, kinds):
        present = {key: value for key, value in row.items() if value is not None}
        for name, kind in kinds.items():
            data.required_field(present, place, name, kind)

    require(problem, where, fields)
    for subtask in problem["subtasks"]:
        require(subtask, f"{where} subtasks", of_subtask)
        if subtask.get("partial") and not grader:
            fail(
                f"data {where}: subtask {subtask['name']} has partial points, which only the "
                "contest's own grader can give: pass --grader.",
                note="Nothing was sampled.",
            )


def run_contests(cfg, sample):
    """Solve every problem of --ioi and print the sum of the points."""
    problems = data.read_rows(cfg.ioi, cfg.limit)
    for where, problem in problems:
        check_problem(problem, where, cfg.grader)
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
def check_flags(cfg):
    """End the process with one sentence if the flags cannot be meant; return the positions."""
    has_task = cfg.vote or cfg.ioi or (cfg.localise and cfg.out)
    if not has_task:
        fail(
            "--model=folder and one of --vote=file, --ioi=file, --localise=file --out=file are "
            "needed.",
            note="Nothing was sampled.",
        )
    with one_sentence(f"--model={cfg.model}", note="Nothing was sampled."):
        config = read_config(cfg.model)
    positions, original = max_positions(config), original_positions(config)
    if cfg.rope_factor > 1:
        positions = int(cfg.rope_factor * original)
    if cfg.max_new_tokens > positions:
        advice = "pass fewer tokens"
        # YaRN is for Qwen3's context; a shorter one is that of a small model.
        if cfg.max_new_tokens > original >= 32768:
            factor = -(-cfg.max_new_tokens // original)  # rounded up
            advice = f"pass --rope_factor={factor}, or fewer tokens"
        fail(
            f"--max_new_tokens={cfg.max_new_tokens}, but {cfg.model} has {positions} positions: "
            f"{advice}.",
            note="Nothing was sampled.",
        )
    return positions


def main(cfg):
    positions = check_flags(cfg)
    # A day, because long completions keep a process busy for hours.
    _, _, device = init_distributed(cfg.seed, 24 * 3600)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with one_sentence(f"--model={cfg.model}", note="Nothing was sampled."):
        tokenizer = load_tokenizer(cfg.model)
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
        # Prompt and completion share the positions. All conversations of a call are the same.
        longest_prompt = max(len(r.prompt_ids) for r in rollouts)
        room = min(cfg.max_new_tokens, positions - longest_prompt)
        if room < 1:
            print(f"a prompt of {longest_prompt} tokens fills all {positions} positions: skipped")
            return []
        engine.generate(rollouts, room, cfg.temperature, cfg.top_p)
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
