"""Measures a checkpoint: toy skills and public benchmarks with 95% intervals, matrix and gates.

    python evaluate.py --model=out/toy/mathrl/final --tasks=all-toy       one table
    python evaluate.py --model=... --tasks=aime24,math500 --results=...   the paper's protocol
    python evaluate.py --matrix=out/toy       the stage-by-skill table and plots of a whole run
    python evaluate.py --check_tasks=bfcl,... what these tasks lack to be measured, if anything
    python evaluate.py --gates=out/toy        exit code 2 where a stage lost more than it may
    python evaluate.py --model=out/toy/swerl/final --chat                 talk to the model

The rows of a benchmark come from a local file or from the hub; its protocol is that of appendix B.
A toy task runs through its stage's own data loader, prompt builder and verifier, and through the
sampler that the stage trains with; besides temperature 1 and greedy decoding it is measured as the
paper measures (PAPER). A task <skill>_hard has the problems that are longer than nearly all
demonstrations. Sampled scores are means over k completions of each problem
(avg@k, the paper's protocol). The interval resamples problems, not completions, because the
completions of one problem are not independent. Each finished completion is a JSON line beside the
results (samples/<stage>/<task>_<mode>_<decoding>.rank0.jsonl), so an interrupted evaluation repeats
none.
"""

import dataclasses
import glob
import hashlib
import importlib
import json
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine import Rollout, make_engine, request_seed
from evals.benchmarks import BENCHMARKS
from evals.pass_at import fields as pass_at_fields
from evals.pass_at import plot_pass_at, print_pass_at
from evals.plots import draw_matrix
from evals.results import (
    DECODINGS,
    TOY,
    check_gates,
    interval,
    keep_best,
    kept_lines,
    print_gates,
    steps_of_same_compute,
)
from lib.checkpoint import lock
from lib.common import all_gather, finish, init_distributed, print0
from lib.data import data_files, read_file
from lib.flags import PositiveInt, Share, parse_config
from lib.guard import fail, never_silent, one_sentence
from lib.progress import counting
from model import Qwen3, find_file, load_tokenizer, render_chat


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    tasks: str = "all-toy"  # comma-separated names of TASKS; all-toy: all skills of the toy
    # Folder with <task>_<split>.jsonl (toy) or <task>.jsonl, .json, .parquet or .csv, or a folder
    # of such files called <task>. A task without any is read from the hub.
    data: str = "out/toy/data"
    split: str = "test"  # toy only: test is for reporting, dev for tuning
    # Label of the rows. "": the folder's name; for out/toy/my_idea/final that is my_idea.
    stage: str = ""
    # JSONL file to which one line for each task, mode and decoding is appended. The finished
    # samples are kept in samples/ beside it.
    results: str = ""
    # arenahard: URL of an OpenAI-compatible server, up to /v1 (its key: JUDGE_API_KEY)
    judge: str = ""
    judge_model: str = "gpt-4-turbo-2024-04-09"  # the paper's
    code_judge: str = ""  # lcb_pro: URL of the benchmark's own judge
    # bfcl, swebench: the python of an environment that has the benchmark's package. Two packages
    # whose pins contradict each other have two, joined by a comma.
    verifier_python: str = ""
    repos: str = ""  # swebench: folder of git clones named owner__name
    ignore_fields: str = ""  # a task of a stage: fields that matter and may stay unread, as there
    # swebench: tokens of a prompt; the paper's 14B model has 65536, with --rope_factor=3
    prompt_tokens: PositiveInt = 32768
    engine: str = "auto"  # auto, torch or vllm
    modes: str = ""  # think, no_think or think,no_think; "": the task's own
    decodings: str = ""  # of sampled, paper, greedy, joined by commas; "": the task's own
    # e.g. 1,2,4,8,16: pass@k of these k as well, of at least so many samples of each problem
    # (evals/pass_at.py)
    pass_at: str = ""
    # The next five replace the task's own protocol; their defaults leave it as it is.
    samples: int = 0  # completions of each problem for the sampled score
    temperature: float = -1.0  # of the sampled score
    top_p: Share = 0.0  # of the sampled score
    max_new_tokens: int = 0  # of a completion
    rope_factor: float = 0.0  # YaRN factor
    limit: int = 0  # problems of each task; 0: all
    seed: int = 0
    label_seed: int = 0  # seed of the training run, written into the results
    matrix: str = ""  # run folder: print its matrix, write matrix.png and one plot a stage
    gates: str = ""  # run folder: check the gates of its results.jsonl; with --stage of that stage
    # Stage folder: the best of its checkpoints in candidates.jsonl becomes its final one.
    keep_best: str = ""
    # "RL folder,SFT folder": print how many SFT steps cost the seconds of that RL run. A third
    # folder, of extras/rejection.py: less the seconds that its sampling took.
    same_compute: str = ""
    # Names of TASKS: only say what they lack to be measured with these flags, and exit with code 2
    # if that is something. run_cascade.sh asks before it trains.
    check_tasks: str = ""
    offline: bool = False  # --check_tasks asks neither the hub nor a server
    chat: bool = False  # talk to the model in the terminal


# The decoding of the paper's own scores (appendix B), beside temperature 1 and greedy
PAPER = {"temperature": 0.6, "top_p": 0.95}


# ---- 1. Tasks ------------------------------------------------------------------------------------
def task(
    load,
    modes=("think",),
    hub="",
    samples=3,
    max_new_tokens=96,
    temperature=1.0,
    top_p=1.0,
    rope_factor=0.0,
    greedy=True,
    paper=False,
    script="",
    needs=None,
):
    """Return one row of TASKS.

    load(path, outside) -> rows, (submit, collect), metric. Each row has "messages". submit(rollout)
    starts the verdict of a finished completion, collect(rollouts) waits for the verdicts and sets
    reward and status, metric(rollout) is the score. outside: {flag: value} of what a loader may
    need besides its rows.
    hub: where the rows are if --data does not have them. greedy: measure greedy decoding as well.
    paper: measure it by PAPER as well, where the sampled score is not yet the paper's.
    script: the stage that teaches this task, "" for a benchmark. needs(path, outside) -> a sentence
    for each thing outside that load would miss. The rest is the sampling protocol.
    """
    return {
        "load": load,
        "modes": modes,
        "hub": hub,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "rope_factor": rope_factor,
        "greedy": greedy,
        "paper": paper,
        "script": script,
        "needs": needs,
    }


def stage_task(script, modes, **settings):
    """Return a task that is graded by the stage script that teaches it.

    script: name of a module with Config, load_rows, make_reward and metric, as each RL stage has
    them. settings: fields of its Config. So a copy of a stage, with rows and a verdict of its own,
    becomes a task by one line of TASKS: "countdown": stage_task("my_countdown", ("think",)).
    """

    def load(path, outside):
        stage = import_stage(script)
        values = {"data": path}
        known = {field.name for field in dataclasses.fields(stage.Config)}
        # think_share: RLHF loads each prompt once for either mode; here each mode is set in turn.
        defaults = {
            "reward_workers": 2,
            "think_share": 1.0,
            "ignore_fields": outside.get("ignore_fields", ""),
        }
        for name, value in defaults.items():
            if name in known:
                values[name] = value
        values.update(settings)
        cfg = stage.Config(**values)
        return stage.load_rows(cfg), stage.make_reward(cfg), stage.metric

    return task(load, modes, samples=2, paper=True, script=script)


def import_stage(script):
    """Import a stage script by the name of its module."""
    try:
        return importlib.import_module(script)
    except ModuleNotFoundError as error:
        if error.name != script:
            raise  # the script is there, but something that it imports is not
        fail(f"TASKS of evaluate.py: there is no script {script}.py.", note="Nothing was measured.")


def load_chat(path, outside):
    """Grade the chat skill by the rule stated in toy.py.

    Neither the policy nor its reward model has seen this rule.
    """
    import rlhf
    import toy

    def submit(rollout):
        pass  # the rule is quick: collect() applies it

    def collect(rollouts):
        for r in rollouts:
            thought_is_closed = not r.row["think"] or "</think>" in r.text
            question = r.row["messages"][-1]["content"]
            r.reward = 0.0
            if thought_is_closed and r.finish_reason == "stop":
                r.reward = toy.chat_score(question, rlhf.answer_of(r))
            r.status = "ok"

    def metric(rollout):
        return rollout.reward

    rows = rlhf.load_rows(rlhf.Config(data=path, think_share=1.0))  # each prompt once
    return rows, (submit, collect), metric


TASKS = {
    "chat": task(load_chat, ("think", "no_think"), samples=2, paper=True, script="rlhf"),
    "if": stage_task("ifrl", ("think", "no_think")),
    "if_hard": stage_task("ifrl", ("no_think",)),
    "math": stage_task("mathrl", ("think",)),
    "math_hard": stage_task("mathrl", ("think",)),
    "code": stage_task("coderl", ("think",)),
    "code_hard": stage_task("coderl", ("think",)),
    "swe": stage_task("swerl", ("think",), min_prompt_tokens=0),
    "swe_hard": stage_task("swerl", ("think",), min_prompt_tokens=0),
    **{name: task(**row) for name, row in BENCHMARKS.items()},
}


def own_skills():
    """Return {stage script: the task that it teaches}, the first one of TASKS."""
    skills = {}
    for name, row in TASKS.items():
        script = row["script"].rpartition(".")[2]
        if script:
            skills.setdefault(script, name)
    return skills


def source(name, cfg):
    """Return where the rows of a task are: a file or folder of --data, else its hub id."""
    names = [f"{name}_{cfg.split}.jsonl"]
    names += [f"{name}{ending}" for ending in (".jsonl", ".json", ".parquet", ".csv", "")]
    paths = [os.path.join(cfg.data, file_name) for file_name in names]
    for path in paths:
        if os.path.exists(path):
            return path
    return TASKS[name]["hub"] or paths[0]


def ks_of(cfg):
    """Return the k of --pass_at, in order."""
    return sorted({int(k) for k in cfg.pass_at.split(",") if k})


def protocol(name, cfg):
    """Return the sampling settings of a task: the flags that were given, else its own."""
    own = TASKS[name]
    # The keys of finished samples depend on this order (see make_rollouts).
    return {
        "samples": max(cfg.samples or own["samples"], *ks_of(cfg), 1),
        "top_p": cfg.top_p or own["top_p"],
        "max_new_tokens": cfg.max_new_tokens or own["max_new_tokens"],
        "rope_factor": cfg.rope_factor or own["rope_factor"],
        "temperature": own["temperature"] if cfg.temperature < 0 else cfg.temperature,
    }


# ---- 2. Finished samples on the disk -------------------------------------------------------------
def digest(*what):
    """Return a short checksum of JSON values."""
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()


def weights_of(folder):
    """Return what tells the weights of two checkpoints apart.

    That is the checksums of run.json, or the sizes and times of files which it does not list.
    """
    checksums = {}
    run_json = os.path.join(folder, "run.json")
    if os.path.exists(run_json):
        with open(run_json) as f:
            checksums = json.load(f)["files"]
    found = []
    for name in sorted(os.listdir(folder)):
        if not name.endswith((".safetensors", "config.json")):
            continue
        if name in checksums:
            found.append([name, checksums[name]])
        else:
            path = os.path.join(folder, name)
            found.append([name, os.path.getsize(path), os.stat(path).st_mtime_ns])
    return found


def appending(path):
    """Open a file for more lines; a last line that was cut off is ended first."""
    out = open(path, "a")  # the caller closes it
    if out.tell() and not Path(path).read_text().endswith("\n"):
        out.write("\n")
    return out


def as_line(r):
    """Return a completion as one JSON line; the verdict is in it once it has been given."""
    line = {
        "key": r.key,
        "problem": r.group,
        "sample": r.sample,
        "prompt": r.row["messages"][-1]["content"],
        "text": r.text,
        "finish_reason": r.finish_reason,
        "tokens": r.num_tokens,
    }
    if r.metric is not None:
        line["score"] = r.metric
        line["weight"] = r.weight
        line["reward"] = r.reward
        line["status"] = r.status
    return json.dumps(line) + "\n"


def recall(rollouts, path, rank):
    """Fill the rollouts that an earlier run has finished; return this rank's file, open for more.

    The files of all ranks are read, since an earlier run may have had other ranks.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    out = appending(f"{path}.rank{rank}.jsonl")
    finished = {}
    for kept in kept_lines(glob.escape(path) + ".rank*.jsonl"):
        # A line with a verdict wins over a line of the same completion without one.
        if "score" in kept or kept["key"] not in finished:
            finished[kept["key"]] = kept
    for r in rollouts:
        kept = finished.get(r.key)
        if kept is None:
            continue
        r.text = kept["text"]
        r.finish_reason = kept["finish_reason"]
        r.num_tokens = kept["tokens"]
        r.metric = kept.get("score")
        r.weight = kept.get("weight")
        r.reward = kept.get("reward")
        r.status = kept.get("status")
    return out


def finish_file(rollouts, out):
    """Write the file again, in the order of the rollouts and with their verdicts.

    Completions of the same weights and settings that this run did not ask for stay: an earlier one
    may have had a larger --limit.
    """
    out.close()
    asked = {r.key for r in rollouts}
    same_settings = rollouts[0].key.partition("-")[0] if rollouts else ""
    others = [
        kept
        for kept in kept_lines(glob.escape(out.name))
        if kept["key"] not in asked and kept["key"].startswith(same_settings)
    ]
    with open(out.name + ".tmp", "w") as f:
        f.writelines(as_line(r) for r in rollouts)
        f.writelines(json.dumps(kept) + "\n" for kept in others)
    os.replace(out.name + ".tmp", out.name)


# ---- 3. Scores -----------------------------------------------------------------------------------
class ScoreSoFar:
    """The mean of the verdicts that are there, with its 95% interval, for the bar of an evaluation.

    Short completions end first, so it moves until the last one. Skills whose verdicts come all at
    the end have none.
    """

    def __init__(self):
        self.pending, self.rewards = [], []

    def add(self, verdict):
        """verdict: what `submit` of a hook returned: a future, the reward itself, or nothing."""
        if isinstance(verdict, float):
            self.rewards.append(verdict)
        elif hasattr(verdict, "done"):
            self.pending.append(verdict)

    def describe(self):
        """ "score so far 0.512 +- 0.080", or "" before the first verdict."""
        ended = [future for future in self.pending if future.done()]
        self.pending = [future for future in self.pending if future not in ended]
        for future in ended:
            if future.exception() is None:
                verdict = future.result()
                # A verdict is the reward, or the reward and what else belongs to it.
                self.rewards.append(float(verdict[0] if isinstance(verdict, tuple) else verdict))
        if not self.rewards:
            return ""
        error = np.std(self.rewards) / len(self.rewards) ** 0.5
        return f"score so far {np.mean(self.rewards):.3f} +- {1.96 * error:.3f}"


def complete(engine, decodings, how, hook, metric, rank):
    """Sample and grade what no earlier run has, all decodings of a mode in one batch.

    decodings: [(rollouts, path of their samples or "")]. A completion is on the disk the moment it
    ends, its verdict when all have ended. Equal completions of a problem share one verdict, which
    is worked out once.
    """
    submit, collect = hook
    # {problem and completion: the first rollout that has it}; equal ones take its verdict
    first_with = {}

    def find_twin(r):
        return first_with.setdefault((r.group, r.text, r.finish_reason), r)

    files = []
    for rollouts, path in decodings:
        out = recall(rollouts, path, rank) if path else None
        files.append(out)
        for r in rollouts:
            r.out = out
            r.twin = find_twin(r) if r.finish_reason else None

    def on_finished(r):
        r.num_tokens = len(r.completion_ids)
        r.twin = find_twin(r)
        if r.out:
            r.out.write(as_line(r))
            r.out.flush()
        if r.twin is r:
            score.add(submit(r))
        count.add(score.describe())

    # Sample: the verdicts of finished completions are worked out while others still decode. A long
    # prompt leaves less room for its own completions, and for no others.
    everyone = [r for rollouts, _ in decodings for r in rollouts]
    of_budget = {}
    for r in everyone:
        if not r.finish_reason:
            budget = min(how["max_new_tokens"], r.row.get("room", how["max_new_tokens"]))
            of_budget.setdefault(budget, []).append(r)
    score = ScoreSoFar()
    with counting("evaluation", sum(map(len, of_budget.values()))) as count:
        for budget, rollouts in sorted(of_budget.items(), reverse=True):
            if budget > 0:
                engine.generate(
                    rollouts, budget, how["temperature"], how["top_p"], on_finished=on_finished
                )
                continue
            for r in rollouts:  # not asked: an empty answer that was cut off, which scores 0
                r.finish_reason = "length"
                on_finished(r)

    # Grade: a verdict that failed stays None, for a later run.
    ungraded = [r for r in everyone if r.twin is r and r.metric is None]
    collect(ungraded)

    def grade(r):
        r.metric = None if r.status == "infra" else metric(r)
        r.weight = float(getattr(r, "votes", 1.0))

    with ThreadPoolExecutor(2) as pool:  # threads, because the metric of swe runs programs
        list(pool.map(grade, ungraded))
    for r in everyone:
        r.metric, r.weight = r.twin.metric, r.twin.weight
        r.reward, r.status = r.twin.reward, r.twin.status

    for (rollouts, _), out in zip(decodings, files):
        if out:
            finish_file(rollouts, out)
    missing = sum(r.metric is None for r in everyone)
    if missing:
        fail(
            f"{missing} of {len(everyone)} verdicts failed (verifier or judge).",
            note="Completions are kept: run it again to judge them.",
        )


def make_rollouts(rows, how, settings, cfg, rank, world):
    """Return this rank's rollouts of one decoding: how["samples"] for each row.

    settings: what completions have to share to be taken for each other's; in the key of each
    """
    k = how["samples"]
    same_settings = digest(*settings)
    rollouts = []
    for i, row in enumerate(rows):
        for j in range(k):
            # Problems are dealt to ranks whole. Where problems are few, samples are dealt.
            turn = i * k + j if len(rows) < 8 * world else i
            if turn % world != rank:
                continue
            r = Rollout(
                row=row,
                group=i,
                prompt_ids=row["prompt_ids"],
                seed=request_seed(cfg.seed, 1, i, j),
                greedy=how["temperature"] == 0,
            )
            r.sample = j
            r.metric = None
            r.key = f"{same_settings}-{digest(r.prompt_ids, r.seed)}"
            rollouts.append(r)
    return rollouts


def score_of(rollouts, rows, ks=()):
    """Return the numbers of a result line, over the rollouts of all ranks.

    more: {"parts": {difficulty or half of the benchmark: its score}} where rows have such a part,
    and pass@k of these ks.
    """
    num_rows = len(rows)
    mine = [(r.group, r.sample, r.metric, r.weight, r.num_tokens) for r in rollouts]
    # Sorted by problem and sample, so that a reshape puts the completions of a problem in a row.
    everyones = sorted(entry for part in all_gather(mine) for entry in part)
    _, samples, scores, weights, tokens = zip(*everyones)
    scores_PG = np.reshape(scores, (num_rows, -1))
    weights_PG = np.reshape(weights, (num_rows, -1))
    score, low, high = interval(scores_PG, weights_PG)
    parts = [row.get("part") for row in rows]
    score_of_part = {}
    for part in sorted(set(parts) - {None}):
        mine = [i for i, other in enumerate(parts) if other == part]
        score_of_part[part], _, _ = interval(scores_PG[mine], weights_PG[mine], resamples=1)
    more = {"parts": score_of_part} if score_of_part else {}
    if ks:
        more |= pass_at_fields(scores_PG, ks)
    return {
        "score": score,
        "low": low,
        "high": high,
        "n": num_rows,
        "samples": max(samples) + 1,
        "tokens": sum(tokens) / len(tokens),
        "more": more,
    }


def samples_folder(cfg):
    """Return the folder of the finished samples, "" if they are not kept."""
    if not cfg.results:
        return ""
    return os.path.join(os.path.dirname(cfg.results), "samples", cfg.stage)


def outside_of(cfg):
    """Return {name: value} of what the loader of a benchmark may need besides its rows."""
    return {
        "data": cfg.data,
        "judge": cfg.judge,
        "judge_model": cfg.judge_model,
        "code_judge": cfg.code_judge,
        "verifier_python": cfg.verifier_python,
        "repos": cfg.repos,
        "ignore_fields": cfg.ignore_fields,
        "samples": samples_folder(cfg),
        "prompt_tokens": cfg.prompt_tokens,
        "tasks": task_names(cfg.check_tasks or cfg.tasks),
        "offline": cfg.offline,
    }


def variants_of(name, how, cfg):
    """Return {decoding: its sampling settings} of a task, whose protocol is `how`."""
    variants = {"sampled": how}
    if TASKS[name]["paper"]:
        variants["paper"] = how | PAPER
    if TASKS[name]["greedy"]:
        variants["greedy"] = how | {"samples": 1, "temperature": 0.0}
    if cfg.decodings:
        asked = cfg.decodings.split(",")
        variants = {decoding: how for decoding, how in variants.items() if decoding in asked}
    return variants


def score_task(name, engine, tokenizer, cfg, rank, world, positions):
    """Return one result line for each mode and decoding of a task; every rank decodes its share.

    positions: what prompt and completion may take together
    """
    how = protocol(name, cfg)
    modes = cfg.modes.split(",") if cfg.modes else TASKS[name]["modes"]
    samples = samples_folder(cfg)
    rows, hook, metric = TASKS[name]["load"](source(name, cfg), outside_of(cfg))
    if cfg.limit:
        rows = rows[: cfg.limit]
    weights = weights_of(cfg.model)
    engine_name = type(engine).__name__

    variants = variants_of(name, how, cfg)
    results = []
    for mode in modes:
        for row in rows:
            row["think"] = mode == "think"
            prompt_ids, *_ = render_chat(tokenizer, row["messages"], row["think"], row.get("tools"))
            row["prompt_ids"] = prompt_ids
            # Tokens that prompt and completion may take together end at the model's positions.
            row["room"] = 0 if "not_asked" in row else max(positions - len(prompt_ids), 0)
        print_short_of_room(name, rows, how["max_new_tokens"])
        decodings = {}
        for decoding, variant in variants.items():
            # The number of samples is left out of the key: it changes no sample.
            settings = (weights, variant | {"samples": 0}, engine_name)
            rollouts = make_rollouts(rows, variant, settings, cfg, rank, world)
            path = os.path.join(samples, f"{name}_{mode}_{decoding}") if samples else ""
            decodings[decoding] = (rollouts, path)
        # Greedy completions share a batch with the sampled ones: a row can be greedy by itself.
        apart = decodings.pop("paper", None)
        if decodings:
            complete(engine, list(decodings.values()), how, hook, metric, rank)
        if apart:
            complete(engine, [apart], variants["paper"], hook, metric, rank)
            decodings["paper"] = apart
        for decoding in variants:
            rollouts, _ = decodings[decoding]
            # Greedy completions of a problem are all equal: there is nothing to choose from.
            ks = ks_of(cfg) if variants[decoding]["temperature"] > 0 else []
            numbers = score_of(rollouts, rows, ks)
            results.append(
                {
                    "stage": cfg.stage,
                    "task": name,
                    "mode": mode,
                    "decoding": decoding,
                    "score": numbers["score"],
                    "low": numbers["low"],
                    "high": numbers["high"],
                    "n": numbers["n"],
                    "samples": numbers["samples"],
                    "seed": cfg.label_seed,
                    "split": cfg.split,
                    "tokens": numbers["tokens"],
                    **numbers["more"],
                }
            )
    return results


def print_short_of_room(name, rows, max_new_tokens):
    """Say how many prompts leave less room for an answer than the protocol, or none.

    Those without room are not asked and score 0, as an answer does that is cut off.
    """
    not_asked = [
        row.get("not_asked", "the prompt fills all positions") for row in rows if not row["room"]
    ]
    for reason, count in Counter(not_asked).items():
        print0(f"{name}: {count} of {len(rows)} problems score 0 without being asked: {reason}")
    short = [row["room"] for row in rows if 0 < row["room"] < max_new_tokens]
    if short:
        print0(
            f"{name}: {len(short)} of {len(rows)} prompts are so long that their answers may have "
            f"fewer than {max_new_tokens} tokens (the longest leaves {min(short)})"
        )


def print_table(results):
    for r in results:
        print(
            f"{r['stage']:8s} {r['task']:5s} {r['mode']:9s} {r['decoding']:8s} "
            f"{100 * r['score']:5.1f}  [{100 * r['low']:5.1f}, {100 * r['high']:5.1f}]  "
            f"n={r['n']} x {r['samples']}",
            flush=True,
        )
        if "parts" in r:
            scores = ", ".join(f"{part} {100 * p:.1f}" for part, p in r["parts"].items())
            print(f"         of these: {scores}", flush=True)


# ---- 4. Chat -------------------------------------------------------------------------------------
def stream(engine, tokenizer, r, room, temperature, top_p):
    """Sample one reply, and print it while it grows."""
    # Not the thread's own join: on Python 3.11 Ctrl-C in it ends the wait for good.
    ended = threading.Event()

    def sample():
        try:
            engine.generate([r], room, temperature, top_p)
        finally:
            ended.set()

    threading.Thread(target=sample, daemon=True).start()
    shown = 0
    while shown < len(r.text) or not ended.is_set():
        try:
            ended.wait(0.03)
        except KeyboardInterrupt:
            # The sampler lets a rollout go that has a finish reason. What was said stays said.
            r.finish_reason = "interrupt"
            ended.wait()
            r.text = tokenizer.decode(r.completion_ids, skip_special_tokens=False)
        # r.text is set when the reply has ended. Until then half a character, which decodes to
        # U+FFFD, waits for its other half.
        text = r.text or tokenizer.decode(list(r.completion_ids)).rstrip("\ufffd")
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print({"stop": "", "interrupt": " [stopped]"}.get(r.finish_reason, " [cut off]"))


def chat(model, engine, tokenizer, cfg):
    """Talk in the terminal. The mode is a flag of each user turn, as in training."""
    print(
        "/think and /no_think switch the mode (at the end of a message: for that turn), "
        "/new forgets, ctrl-d leaves."
    )
    # The defaults are what the paper evaluates with.
    temperature = 0.6 if cfg.temperature < 0 else cfg.temperature
    top_p = cfg.top_p or 0.95
    messages, think = [], True
    while True:
        try:
            text = input(f"\n{'think' if think else 'no_think'}> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text in ("/think", "/no_think"):
            think = text == "/think"
            continue
        if text == "/new":
            messages = []
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        prompt_ids = render_chat(tokenizer, messages, think)[0]
        room = min(cfg.max_new_tokens or 8192, model.max_positions() - len(prompt_ids))
        if room < 1:
            print(
                f"The conversation fills all {model.max_positions()} positions of this model: "
                "this is a new one."
            )
            messages = []
            continue
        seed = request_seed(cfg.seed, 2, time.time_ns())
        r = Rollout(row={}, group=0, prompt_ids=prompt_ids, seed=seed)
        stream(engine, tokenizer, r, room, temperature, top_p)
        messages.append({"role": "assistant", "content": r.text})


# ---- 5. main -------------------------------------------------------------------------------------
def label_of(folder):
    """Return the name that a checkpoint goes by: out/toy/my_idea/final is my_idea."""
    name = os.path.basename(os.path.normpath(folder))
    if name == "final":
        name = os.path.basename(os.path.dirname(os.path.abspath(folder)))
    return name


def task_names(text):
    """Return the tasks that --tasks or --check_tasks names."""
    return list(TOY) if text == "all-toy" else text.split(",")


def refuse_unknown(names):
    """End the process with one sentence if a task is unknown."""
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        fail(
            f"--tasks: {', '.join(unknown)} unknown (has: {', '.join(TASKS)}).",
            note="Nothing was measured.",
        )


def missing_for(name, path, outside):
    """Return a sentence for each thing that a task lacks to be measured."""
    task_row = TASKS[name]
    if task_row["needs"]:
        return task_row["needs"](path, outside)
    if not task_row["hub"] and not os.path.exists(path):
        return [f"there is no {path}"]
    return []


def refuse_missing(name, path, outside):
    """End the process with one sentence if a benchmark lacks something (a stage says so itself)."""
    sentences = missing_for(name, path, outside)
    if sentences and not TASKS[name]["script"]:
        fail(f"{name}: {'; '.join(sentences)}.", note="Nothing was measured.")


def check_tasks(names, cfg):
    """End the process with one sentence that says what tasks lack to be measured, if anything.

    A cascade asks before it trains, since its longest stage comes before its first measurement.
    """
    refuse_unknown(names)
    # {what is missing: the tasks that need it}
    missing = {}
    for name in names:
        for sentence in missing_for(name, source(name, cfg), outside_of(cfg)):
            missing.setdefault(sentence, []).append(name)
    if missing:
        parts = [f"{', '.join(tasks)}: {sentence}" for sentence, tasks in missing.items()]
        fail("; ".join(parts) + ".")
    # The first row of each is read, which ends in a sentence where the hub does not give it.
    for name in names:
        path = source(name, cfg)
        if os.path.isfile(path) or (path == TASKS[name]["hub"] and path and not cfg.offline):
            next(read_file(data_files(path)[0]), None)
    print(f"every task can be measured: {', '.join(names)}", flush=True)


def check_flags(names, cfg):
    """End the process with one sentence if the flags cannot be meant."""
    refuse_unknown(names)
    with one_sentence(f"--model={cfg.model}", note="Nothing was measured."):
        find_file(cfg.model, "config.json")
    unknown = [mode for mode in cfg.modes.split(",") if mode not in ("", "think", "no_think")]
    if unknown:
        fail(
            f"--modes: {', '.join(unknown)} unknown (has: think, no_think).",
            note="Nothing was measured.",
        )
    unknown = [
        decoding for decoding in cfg.decodings.split(",") if decoding not in ("", *DECODINGS)
    ]
    if unknown:
        fail(
            f"--decodings: {', '.join(unknown)} unknown (has: {', '.join(DECODINGS)}).",
            note="Nothing was measured.",
        )
    if not re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", cfg.pass_at):
        fail(
            f"--pass_at={cfg.pass_at}: expected numbers above 0, joined by commas.",
            note="Nothing was measured.",
        )
    # vLLM keeps the RoPE it was started with, and one process has one vLLM.
    rope_factors = {protocol(name, cfg)["rope_factor"] for name in names}
    if len(rope_factors) > 1 and cfg.engine != "torch" and torch.cuda.is_available():
        fail(
            "--tasks: some take YaRN and some do not (or give --rope_factor, or --engine=torch): "
            "measure them apart.",
            note="Nothing was measured.",
        )


def load(cfg, device, rope_factor):
    """Return (model, engine) of --model, with YaRN where the task's protocol wants it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with one_sentence(f"--model={cfg.model}", note="Nothing was measured."):
        model = Qwen3.from_pretrained(
            cfg.model, device=device, dtype=dtype, rope_factor=rope_factor
        )
    engine = make_engine("torch" if cfg.chat else cfg.engine, model, load_tokenizer(cfg.model))
    return model, engine


def measure(names, tokenizer, cfg, rank, world, device):
    """Measure one task after the other; append their lines to --results and print them."""
    loaded_rope_factor = None
    for name in names:
        refuse_missing(name, source(name, cfg), outside_of(cfg))
    for name in names:
        how = protocol(name, cfg)
        if loaded_rope_factor != how["rope_factor"]:
            model, engine = load(cfg, device, how["rope_factor"])
            loaded_rope_factor = how["rope_factor"]
        positions = model.max_positions()
        if how["max_new_tokens"] > positions:
            fail(
                f"{name}: {how['max_new_tokens']} new tokens, but {cfg.model} has {positions} "
                "positions: pass --max_new_tokens.",
                note="",
            )
        results = score_task(name, engine, tokenizer, cfg, rank, world, positions)
        if rank > 0:
            continue
        print_table(results)
        if cfg.results:
            with appending(cfg.results) as f:
                f.writelines(json.dumps(result) + "\n" for result in results)


def main(cfg):
    if cfg.matrix:
        draw_matrix(cfg.matrix, own_skills())
        print_pass_at(cfg.matrix)
        plot_pass_at(cfg.matrix, own_skills())
        return
    if cfg.gates:
        print_gates(cfg.gates, cfg.stage)
        return
    if cfg.keep_best:
        keep_best(cfg.keep_best)
        return
    if cfg.check_tasks:
        check_tasks(task_names(cfg.check_tasks), cfg)
        return
    if cfg.same_compute:
        print(steps_of_same_compute(*cfg.same_compute.split(",")))
        return

    names = task_names(cfg.tasks)
    check_flags(names, cfg)
    # A day, because ranks finish hours apart where answers are long.
    rank, world, device = init_distributed(cfg.seed, 24 * 3600)
    never_silent()
    cfg.stage = cfg.stage or label_of(cfg.model)
    with one_sentence(f"--model={cfg.model}", note="Nothing was measured."):
        tokenizer = load_tokenizer(cfg.model)
    results_folder = os.path.dirname(cfg.results)
    if cfg.results:
        lock(results_folder or ".")
        # A file that cannot be written is reported now, not after hours.
        open(cfg.results, "a").close()
    if cfg.chat:
        model, engine = load(cfg, device, cfg.rope_factor)
        chat(model, engine, tokenizer, cfg)
        return

    measure(names, tokenizer, cfg, rank, world, device)
    # run_cascade.sh stops when the file broken_gate of its run folder has text.
    if rank == 0 and os.path.basename(cfg.results) == "results.jsonl":
        with open(os.path.join(results_folder, "broken_gate"), "w") as f:
            f.write(check_gates(results_folder, cfg.stage))


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
