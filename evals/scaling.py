"""Many samples of one problem: majority vote over patches (paper 7.4), the submit-and-learn loop for contest problems (5.1), and
answers of a teacher that name the right files, as SFT data (3.3.2).

    python -m evals.scaling --model=out/toy/swerl/final --vote=out/toy/data/swe_test.jsonl --samples=16
    python -m evals.scaling --model=... --ioi=problems.jsonl --rounds=50 --samples=20 --max_new_tokens=131072
    python -m evals.scaling --model=teacher --localise=nebius/SWE-rebench --repos=clones --out=localisation.jsonl --samples=8 --temperature=1

A row of --ioi: {"name", "statement", "samples": tests, "subtasks": [{"name", "points", "statement", "tests", "partial"}]}, tests
as {"inputs", "outputs"}. The repository tests of --vote need its container, so they are a command of yours: --check=COMMAND is run as
`COMMAND instance_id` and gets {"patch": git diff, "scripts": [...]} on standard input; it applies the patch and prints {"regression":
how many of the repository's tests pass, "scripts": [whether each ends without an error]}. Without it a syntax check is all.
Deviation from the paper: tail confidence is the mean log-prob of the drawn tokens, not of the top 20.
"""

import ast
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
from lib.flags import parse_config
from lib.guard import fail
from model import Qwen3, load_tokenizer, render_chat
from verifiers import patches


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    vote: str = ""  # rows of swerl.py: sample patches, take the majority's
    check: str = ""  # command that tests a patch in the repository's container, see above
    # with --check: scripts the model writes that fail while the bug is there; paper 3.3.1: 10, 7.4:
    # 40
    reproductions: int = 10
    ioi: str = ""  # contest problems, see above
    localise: str = ""  # rows of SWE-bench's form: which files have to change, for SFT
    repos: str = ""  # their repositories: a folder of git clones named owner__name
    out: str = ""  # where the rows for sft.py go
    # completions of a problem, or candidates of a subtask in a round; paper: 32, 20
    samples: int = 20
    rounds: int = 50  # submissions a problem; IOI's limit
    max_new_tokens: int = 32768  # paper: 128K for IOI
    temperature: float = 0.6
    top_p: float = 0.95
    rope_factor: float = 0.0  # YaRN factor; 0: as the checkpoint has it
    engine: str = "auto"
    limit: int = 0  # problems; 0: all
    seed: int = 0


# ---- 1. Majority vote ----------------------------------------------------------------------------
def normal_patch(files, after):
    """What a patch does, whatever its comments and layout: {path: syntax tree}; None if a file does not parse, or nothing changed."""
    try:
        changed = {f: text for f, text in after.items() if files.get(f) != text}
        return (
            tuple(
                (f, ast.dump(ast.parse(t)) if f.endswith(".py") else t)
                for f, t in sorted(changed.items())
            )
            or None
        )
    except (SyntaxError, ValueError, RecursionError):
        return None


def vote(texts, files, fit=None):
    """Index of the response whose patch most responses agree on; of equals, the shortest patch; None if no patch applies. fit: the
    indices that may be chosen and have a vote."""
    afters = [
        patches.apply_edits(text, files) if fit is None or i in fit else None
        for i, text in enumerate(texts)
    ]
    keys = [after and normal_patch(files, after) for after in afters]
    counts = Counter(key for key in keys if key)
    size = lambda i: sum(len(diff) for diff in patches.changes(files, afters[i]).values())
    return min(
        (i for i, key in enumerate(keys) if key),
        key=lambda i: (-counts[keys[i]], size(i), i),
        default=None,
    )


REPRODUCE = """Write a Python script that reproduces this issue. It is run in the repository: it has to end with an error while the issue is
there, and without one as soon as it is solved. {format}

{issue}"""


def reproduction_scripts(row, n, sample, count):
    """The distinct scripts among `count` that the model writes for the issue."""
    messages = [
        {"role": "user", "content": REPRODUCE.format(format=coderl.FORMAT, issue=row["issue"])}
    ]
    texts = [r.text.rpartition("</think>")[2] for r in sample([messages] * count, (n, 1), row)]
    return list(dict.fromkeys(filter(None, map(coderl.extract_code, texts))))


def survivors(texts, row, scripts, check):
    """Indices of the patches that pass most regression tests and, of these, most reproduction scripts; scripts that the unpatched
    repository passes show no bug and are left out (Agentless's order, paper 3.3.1). Equal patches are tested once."""
    afters = [patches.apply_edits(text, row["files"]) for text in texts]
    diffs = [
        after and normal_patch(row["files"], after) and benchmarks.git_patch(row["files"], after)
        for after in afters
    ]
    scripts = [
        script
        for script, passes in zip(scripts, check(row, "", scripts)["scripts"], strict=True)
        if not passes
    ]
    found = {diff: check(row, diff, scripts) for diff in dict.fromkeys(filter(None, diffs))}
    rank = {diff: (result["regression"], sum(result["scripts"])) for diff, result in found.items()}
    return {i for i, diff in enumerate(diffs) if diff and rank[diff] == max(rank.values())}


def run_check(command, row, patch, scripts):
    """What the user's command says of a patch."""
    given = json.dumps({"patch": patch, "scripts": scripts})
    done = subprocess.run(
        [*shlex.split(command), row["instance_id"]], input=given, capture_output=True, text=True
    )
    try:
        result = json.loads(done.stdout)
        assert isinstance(result["regression"], int) and len(result["scripts"]) == len(scripts)
        return result
    except (ValueError, KeyError, TypeError, AssertionError):
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1][:200]
        fail(
            f'--check: on {row["instance_id"]} it ended with {done.returncode} and said "{said}"; expected {{"regression": number, "scripts": '
            f"[{len(scripts)} booleans]}}.",
            note="Votes so far stand above.",
        )


def run_vote(cfg, sample):
    rows = swerl.load_rows(swerl.Config(data=cfg.vote, min_prompt_tokens=0))
    rows, sums = rows[: cfg.limit] if cfg.limit else rows, np.zeros(3)
    check = lambda *args: run_check(cfg.check, *args)
    for n, row in enumerate(rows, 1):
        rollouts = sample([row["messages"]] * cfg.samples, n, row)
        texts = [r.text for r in rollouts]
        fit = (
            survivors(texts, row, reproduction_scripts(row, n, sample, cfg.reproductions), check)
            if cfg.check
            else None
        )
        right, chosen = [swerl.metric(r) for r in rollouts], vote(texts, row["files"], fit)
        if None in right:
            fail(f"row {n}: the sandbox failed.", note="Votes so far stand above.")
        sums += [np.mean(right), 0.0 if chosen is None else right[chosen], max(right)]
        if n % 10 == 0 or n == len(rows):
            mean, voted, best = 100 * sums / n
            print(
                f"{n:4d} problems | one sample {mean:.1f} | majority of {cfg.samples} {voted:.1f} | any of {cfg.samples} {best:.1f}",
                flush=True,
            )
    return sums / len(rows)


# ---- 2. Submit and learn -------------------------------------------------------------------------
TAIL = 2048  # tokens at the end whose confidence ranks candidates
KEPT_FAILURES, KEPT_BEST = 5, 3  # submissions shown again; paper 5.1


def confidence(rollout):
    """Mean log-prob of the last tokens: how sure the model was when it wrote its program."""
    return (
        float(np.mean(rollout.sampler_logprobs[-TAIL:]))
        if len(rollout.sampler_logprobs)
        else -float("inf")
    )


def attempt_prompt(problem, subtask, memory, solved):
    """The problem, this subtask, what was submitted for it with verdicts, and the programs that solved other subtasks."""
    parts = [
        f"Write Python code to solve the problem. {coderl.FORMAT}",
        problem["statement"],
        f"Solve this subtask: {subtask.get('statement') or subtask['name']}",
    ]
    failed = (
        sorted(memory, key=lambda m: -m[1])[:KEPT_BEST]
        if subtask.get("partial")
        else memory[-KEPT_FAILURES:]
    )
    parts += [
        f"An earlier submission earned {100 * share:.0f}% ({verdict}):\n```python\n{code}```"
        for code, share, verdict in failed
    ]
    parts += [
        f"This solved subtask {name}, which may help:\n```python\n{code}```"
        for name, code in solved.items()
    ]
    return "\n\n".join(parts)


def solve(problem, sample, cfg, submit=coderl.run_tests, number=0):
    """(points, submissions): a round samples candidates for every open subtask, drops those without code or failing the samples,
    submits the most confident one, and remembers its verdicts."""
    share, memory, solved, submissions = (
        {s["name"]: 0.0 for s in problem["subtasks"]},
        {s["name"]: [] for s in problem["subtasks"]},
        {},
        0,
    )
    pool = ThreadPoolExecutor(8)
    for turn in range(cfg.rounds):
        for subtask in [s for s in problem["subtasks"] if s["name"] not in solved]:
            name = subtask["name"]
            messages = [
                {"role": "user", "content": attempt_prompt(problem, subtask, memory[name], solved)}
            ]
            rollouts = sample(
                [messages] * cfg.samples,
                (number, turn, problem["subtasks"].index(subtask)),
                {"messages": messages, "think": True},
            )
            codes = [
                coderl.extract_code(r.text.rpartition("</think>")[2])
                if "</think>" in r.text
                else None
                for r in rollouts
            ]
            known = {code for code, _, _ in memory[name]}
            passes = lambda code: (
                bool(code)
                and code not in known
                and set(submit(code, problem["samples"], stop=True)) == {"ok"}
            )
            fit = [i for i, ok in enumerate(pool.map(passes, codes)) if ok]
            if not fit or submissions >= cfg.rounds:
                continue
            code = codes[max(fit, key=lambda i: confidence(rollouts[i]))]
            submissions += 1
            # one submission is judged on every subtask, as at the contest
            for other in problem["subtasks"]:
                verdicts = submit(code, other["tests"])
                got = verdicts.count("ok") / len(verdicts)
                share[other["name"]] = max(
                    share[other["name"]], got if other.get("partial") or got == 1 else 0.0
                )
                if got == 1:
                    solved.setdefault(other["name"], code)
                elif other is subtask:
                    memory[name].append(
                        (code, got, ", ".join(f"{n} {v}" for v, n in Counter(verdicts).items()))
                    )
        points = sum(s["points"] * share[s["name"]] for s in problem["subtasks"])
        print(
            f"{problem['name']} round {turn + 1}/{cfg.rounds} | {submissions} submissions | {points:g} points | solved: {', '.join(solved) or '-'}",
            flush=True,
        )
        if len(solved) == len(problem["subtasks"]) or submissions >= cfg.rounds:
            break
    return points, submissions


# ---- 3. Localisation demonstrations --------------------------------------------------------------
def run_localise(cfg, sample):
    """(answers kept, rows): Agentless-mini's first step. The prompt has the issue and all Python files of the repository; of the teacher's answers
    those stay that name every file of the golden patch (recall 1)."""
    rows, kept = benchmarks.load_swebench_files(cfg.localise, {"repos": cfg.repos})[0], 0
    rows = [row for row in rows[: cfg.limit or None] if row["golden"]]
    with open(cfg.out + ".tmp", "w") as f:
        for n, row in enumerate(rows, 1):
            for r in sample([row["messages"]] * cfg.samples, n, row):
                named = (
                    benchmarks.named(r.text.rpartition("</think>")[2])
                    if "</think>" in r.text and r.finish_reason == "stop"
                    else []
                )
                if set(row["golden"]) <= set(named):
                    messages, kept = (
                        [*row["messages"], {"role": "assistant", "content": r.text}],
                        kept + 1,
                    )
                    f.write(
                        json.dumps(
                            {
                                "messages": messages,
                                "category": "swe_localization",
                                "generator": cfg.model,
                                "thinking": True,
                            }
                        )
                        + "\n"
                    )
    os.rename(cfg.out + ".tmp", cfg.out)
    print(
        f"{cfg.localise}: {kept} of {len(rows) * cfg.samples} answers name every file of their golden patch -> {cfg.out}"
    )
    return kept, len(rows)


# ---- 4. main -------------------------------------------------------------------------------------
def main(cfg):
    if not (cfg.vote or cfg.ioi or cfg.localise and cfg.out) or not os.path.exists(
        os.path.join(cfg.model, "config.json")
    ):
        fail(
            "--model=folder and one of --vote=file, --ioi=file, --localise=file --out=file are needed.",
            note="Nothing was sampled.",
        )
    _, _, device = init_distributed(cfg.seed, 24 * 3600)
    tokenizer, dtype = (
        load_tokenizer(cfg.model),
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    engine = make_engine(
        cfg.engine,
        Qwen3.from_pretrained(cfg.model, device=device, dtype=dtype, rope_factor=cfg.rope_factor),
        tokenizer,
    )

    def sample(conversations, key, row):
        key = key if isinstance(key, tuple) else (key,)
        rollouts = [
            Rollout(
                row=row,
                group=0,
                prompt_ids=render_chat(tokenizer, messages, True)[0],
                seed=request_seed(cfg.seed, 3, *key, k),
            )
            for k, messages in enumerate(conversations)
        ]
        engine.generate(rollouts, cfg.max_new_tokens, cfg.temperature, cfg.top_p)
        return rollouts

    if cfg.vote or cfg.localise:
        return run_vote(cfg, sample) if cfg.vote else run_localise(cfg, sample)
    problems = data.read_rows(cfg.ioi, cfg.limit)
    for where, problem in problems:
        for name, kind in (("statement", str), ("samples", dict), ("subtasks", list)):
            data.required_field(
                {k: v for k, v in problem.items() if v is not None}, where, name, kind
            )
    total = [solve(problem, sample, cfg, number=n) for n, (_, problem) in enumerate(problems)]
    print(
        f"{len(total)} problems, {sum(points for points, _ in total):g} points with {sum(n for _, n in total)} submissions"
    )


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
