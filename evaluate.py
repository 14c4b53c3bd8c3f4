"""Measures a checkpoint: toy skills and public benchmarks with 95% intervals, the stage-by-skill matrix, the gates between stages.

    python evaluate.py --model=out/toy/mathrl/final --tasks=all-toy          one table
    python evaluate.py --model=... --tasks=aime24,math500 --results=...      the paper's protocol (appendix B), hub id or local file
    python evaluate.py --matrix=out/toy                                      the table and plots of a whole run
    python evaluate.py --gates=out/toy                                       exit code 2 where a stage lost more than it may
    python evaluate.py --model=out/toy/swerl/final --chat                    talk to it; /think and /no_think switch the mode

A task runs through its stage's own data loader, prompt builder and verifier, and through the sampler the stage trains with.
Sampled scores are means over k completions a problem, the protocol of the paper (avg@k); the interval resamples problems, not
completions, because completions of one problem are not independent. Each finished completion is a JSON line beside the results
(samples/<stage>/<task>_<mode>_<decoding>.rank0.jsonl): an interrupted evaluation repeats none of them.
"""

import glob
import hashlib
import importlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from engine import Rollout, make_engine, request_seed
from evals.benchmarks import BENCHMARKS
from evals.plots import draw_matrix
from evals.results import TOY, check_gates, keep_best, kept_lines, steps_of_same_compute
from lib.checkpoint import lock
from lib.common import all_gather, finish, init_distributed
from lib.flags import parse_config
from lib.guard import fail, one_sentence
from model import Qwen3, load_tokenizer, render_chat


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    tasks: str = "all-toy"  # comma-separated names of TASKS
    # folder with <task>_<split>.jsonl (toy) or <task>.jsonl, .json, .parquet; else the hub is asked
    data: str = "out/toy/data"
    split: str = "test"  # toy only: test is for reporting, dev for tuning
    stage: str = ""  # row label; "": the model's folder name
    # JSONL file that one line a cell is appended to; finished samples are kept in samples/ beside
    # it
    results: str = ""
    # arenahard: URL of an OpenAI-compatible server, up to /v1 (key: JUDGE_API_KEY); lcb_pro: of its
    # judge
    judge: str = ""
    judge_model: str = "gpt-4-turbo-2024-04-09"  # the paper's
    verifier_python: str = ""  # bfcl, swebench: python of the environment that has their package
    repos: str = ""  # swebench: folder of git clones named owner__name
    engine: str = "auto"  # auto, torch or vllm
    modes: str = ""  # think, no_think or think,no_think; "": the task's own
    # completions per problem of the sampled score; 0: the task's protocol, as in the next four
    samples: int = 0
    temperature: float = -1.0  # -1: the task's protocol
    top_p: float = 0.0
    max_new_tokens: int = 0
    rope_factor: float = 0.0  # YaRN factor; 0: the task's own, or as the checkpoint has it
    limit: int = 0  # problems per task; 0: all
    seed: int = 0
    label_seed: int = 0  # seed of the training run, written into the results
    matrix: str = ""  # run folder: print its matrix, write matrix.png and one plot a stage
    gates: str = ""  # run folder: check the gates of its results.jsonl, of one stage with --stage
    # stage folder: make the best of its checkpoints in candidates.jsonl its final one
    keep_best: str = ""
    # "RL folder,SFT folder": print how many SFT steps cost the seconds of that RL run
    same_compute: str = ""
    chat: bool = False  # talk to the model in the terminal


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
):
    """One row of TASKS: load(path, outside) -> rows, (submit, collect), metric; where the rows come from; the protocol."""
    return dict(locals())


def stage_task(name, modes, **overrides):
    """A toy skill, graded by the stage that teaches it."""

    def load(path, outside):
        stage = importlib.import_module(name)
        cfg = stage.Config(data=path, reward_workers=2, **overrides)
        return stage.load_rows(cfg), stage.make_reward(cfg), stage.metric

    return task(load, modes)


def load_chat(path, outside):
    """The chat column is graded by the rule stated in toy.py, which neither the policy nor its reward model has seen."""
    import rlhf
    import toy

    def collect(rollouts):
        for r in rollouts:
            closed = not r.row["think"] or "</think>" in r.text
            r.reward = (
                toy.chat_score(r.row["messages"][-1]["content"], rlhf.answer_of(r))
                if closed and r.finish_reason == "stop"
                else 0.0
            )
            r.status = "ok"

    return (
        rlhf.load_rows(rlhf.Config(data=path)),
        (lambda rollout: None, collect),
        lambda r: r.reward,
    )


TASKS = {
    "chat": task(load_chat, ("think", "no_think")),
    "if": stage_task("ifrl", ("think", "no_think")),
    "math": stage_task("mathrl", ("think",)),
    "code": stage_task("coderl", ("think",)),
    "swe": stage_task("swerl", ("think",), min_prompt_tokens=0),
}
TASKS |= {name: task(**row) for name, row in BENCHMARKS.items()}


# ---- 2. Scores -----------------------------------------------------------------------------------
def interval(scores_PG, weights_PG=None, seed=0, resamples=2000):
    """(mean, low, high): 95% bootstrap over problems of the (weighted) mean of their scores."""
    scores_PG = np.asarray(scores_PG, dtype=np.float64)
    weights_PG = (
        np.ones_like(scores_PG) if weights_PG is None else np.asarray(weights_PG, dtype=np.float64)
    )
    sums_P, weights_P = (scores_PG * weights_PG).sum(axis=1), weights_PG.sum(axis=1)
    draws = np.random.default_rng(seed).integers(0, len(sums_P), (resamples, len(sums_P)))
    low, high = np.percentile(sums_P[draws].sum(axis=1) / weights_P[draws].sum(axis=1), [2.5, 97.5])
    return float(sums_P.sum() / weights_P.sum()), float(low), float(high)


def source(name, cfg):
    """Where the rows of a task are: a file or folder of --data named after it, or its hub id."""
    names = (f"{name}_{cfg.split}.jsonl", f"{name}.jsonl", f"{name}.json", f"{name}.parquet", name)
    found = [path for path in (os.path.join(cfg.data, n) for n in names) if os.path.exists(path)]
    return found[0] if found else TASKS[name]["hub"] or os.path.join(cfg.data, names[0])


def protocol(name, cfg):
    """The sampling settings of a task: the flags that were given, else its own (paper, appendix B)."""
    given = dict(
        samples=cfg.samples,
        top_p=cfg.top_p,
        max_new_tokens=cfg.max_new_tokens,
        rope_factor=cfg.rope_factor,
    )
    given = {k: v or TASKS[name][k] for k, v in given.items()}
    return given | {
        "temperature": TASKS[name]["temperature"] if cfg.temperature < 0 else cfg.temperature
    }


def weights_of(folder):
    """What tells the weights of two checkpoints apart: the checksums of run.json, else sizes and times of the files."""
    names = sorted(f for f in os.listdir(folder) if f.endswith((".safetensors", "config.json")))
    files = (
        json.load(open(run))["files"]
        if os.path.exists(run := os.path.join(folder, "run.json"))
        else {}
    )
    return [
        [n, files[n]]
        if n in files
        else [n, os.path.getsize(path := os.path.join(folder, n)), os.stat(path).st_mtime_ns]
        for n in names
    ]


def appending(path):
    """The file, open for more lines; one that was cut off is ended first."""
    out = open(path, "a")
    out.write("\n" if out.tell() and not open(path).read().endswith("\n") else "")
    return out


def recall(rollouts, path, rank):
    """Fill the rollouts whose completion an earlier run has finished; this rank's file, open for more."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    found, out = {}, appending(f"{path}.rank{rank}.jsonl")
    for kept in kept_lines(glob.escape(path) + ".rank*.jsonl"):
        if "score" in kept or kept["key"] not in found:
            found[kept["key"]] = kept
    for r in rollouts:
        if kept := found.get(r.key):
            r.text, r.finish_reason, r.num_tokens = (
                kept["text"],
                kept["finish_reason"],
                kept["tokens"],
            )
            r.metric, r.weight, r.reward, r.status = (
                kept.get(k) for k in ("score", "weight", "reward", "status")
            )
    return out


def as_line(r):
    """One JSON line of a completion; the verdict is there once it has been given."""
    verdict = (
        {"score": r.metric, "weight": r.weight, "reward": r.reward, "status": r.status}
        if r.metric is not None
        else {}
    )
    return (
        json.dumps(
            {
                "key": r.key,
                "problem": r.group,
                "sample": r.sample,
                "prompt": r.row["messages"][-1]["content"],
                "text": r.text,
                "finish_reason": r.finish_reason,
                "tokens": r.num_tokens,
                **verdict,
            }
        )
        + "\n"
    )


def complete(engine, decodings, how, hook, metric, rank):
    """Sample and grade what no earlier run has: all decodings of a mode in one batch. Each completion is on the disk the moment
    it ends, its verdict when all have. Equal completions of a problem have one verdict, which is worked out once."""
    (submit, collect), twins, files, same = (
        hook,
        {},
        [],
        lambda r: (r.group, r.text, r.finish_reason),
    )
    for rollouts, path in decodings:
        files.append(recall(rollouts, path, rank) if path else None)
        for r in rollouts:
            r.out, r.twin = files[-1], twins.setdefault(same(r), r) if r.finish_reason else None

    def finished(r):
        r.num_tokens, r.twin = len(r.completion_ids), twins.setdefault(same(r), r)
        if r.out:
            r.out.write(as_line(r))
            r.out.flush()
        if r.twin is r:
            submit(r)

    everyone = [r for rollouts, _ in decodings for r in rollouts]
    engine.generate(
        [r for r in everyone if not r.finish_reason],
        how["max_new_tokens"],
        how["temperature"],
        how["top_p"],
        on_finished=finished,
    )
    ungraded = [r for r in everyone if r.twin is r and r.metric is None]
    collect(ungraded)
    with ThreadPoolExecutor(2) as pool:  # swe's metric runs programs
        for r, value in zip(
            ungraded, pool.map(lambda r: None if r.status == "infra" else metric(r), ungraded)
        ):
            r.metric, r.weight = value, float(getattr(r, "votes", 1.0))
    for r in everyone:
        r.metric, r.weight, r.reward, r.status = (
            r.twin.metric,
            r.twin.weight,
            r.twin.reward,
            r.twin.status,
        )
    [finish_file(rollouts, out) for (rollouts, _), out in zip(decodings, files) if out]
    if missing := sum(r.metric is None for r in everyone):
        fail(
            f"{missing} of {len(everyone)} verdicts failed (verifier or judge).",
            note="Completions are kept: run it again to judge them.",
        )


def finish_file(rollouts, out):
    """The file in its order, with verdicts; what a larger --limit has left there stays."""
    out.close()
    now, same = {r.key for r in rollouts}, rollouts[0].key.partition("-")[0] if rollouts else ""
    others = [
        k
        for k in kept_lines(glob.escape(out.name))
        if k["key"] not in now and k["key"].startswith(same)
    ]
    with open(out.name + ".tmp", "w") as f:
        f.writelines([*map(as_line, rollouts), *(json.dumps(k) + "\n" for k in others)])
    os.replace(out.name + ".tmp", out.name)


def score_task(name, engine, tokenizer, cfg, rank, world, positions):
    """One result line for each mode and decoding of a task; every rank decodes its share. Prompt and completion share `positions`."""
    how, modes = protocol(name, cfg), cfg.modes.split(",") if cfg.modes else TASKS[name]["modes"]
    samples = cfg.results and os.path.join(os.path.dirname(cfg.results), "samples", cfg.stage)
    outside = dict(
        data=cfg.data,
        samples=samples,
        judge=cfg.judge,
        judge_model=cfg.judge_model,
        verifier_python=cfg.verifier_python,
        repos=cfg.repos,
    )
    rows, hook, metric = TASKS[name]["load"](source(name, cfg), outside)
    rows, results, weights = rows[: cfg.limit] if cfg.limit else rows, [], weights_of(cfg.model)
    digest = lambda *what: hashlib.blake2b(json.dumps(what).encode(), digest_size=8).hexdigest()
    for mode in modes:
        for row in rows:
            row["think"] = mode == "think"
            row["prompt_ids"] = render_chat(
                tokenizer, row["messages"], row["think"], row.get("tools")
            )[0]
        decodings = []
        for decoding, k, temperature in (
            ("sampled", how["samples"], how["temperature"]),
            ("greedy", 1, 0.0),
        )[: 1 + TASKS[name]["greedy"]]:
            mine = [
                (i, j)
                for i in range(len(rows))
                for j in range(k)
                if (i * k + j if len(rows) < 8 * world else i) % world == rank
            ]
            rollouts = [
                Rollout(
                    row=rows[i],
                    group=i,
                    prompt_ids=rows[i]["prompt_ids"],
                    seed=request_seed(cfg.seed, 1, i, j),
                    greedy=temperature == 0,
                )
                for i, j in mine
            ]
            same = digest(
                weights, how | {"samples": 0, "temperature": temperature}, type(engine).__name__
            )
            for (_, j), r in zip(mine, rollouts, strict=True):
                r.sample, r.metric, r.key = j, None, f"{same}-{digest(r.prompt_ids, r.seed)}"
            decodings.append(
                (rollouts, samples and os.path.join(samples, f"{name}_{mode}_{decoding}"))
            )
        room = min(how["max_new_tokens"], positions - max(len(row["prompt_ids"]) for row in rows))
        complete(engine, decodings, how | {"max_new_tokens": room}, hook, metric, rank)
        for (rollouts, path), decoding in zip(decodings, ("sampled", "greedy")):
            mine = [(r.group, r.sample, r.metric, r.weight, r.num_tokens) for r in rollouts]
            _, k, scores, weights_PG, tokens = zip(
                *sorted(x for part in all_gather(mine) for x in part)
            )
            score, low, high = interval(
                np.reshape(scores, (len(rows), -1)), np.reshape(weights_PG, (len(rows), -1))
            )
            results.append(
                {
                    "stage": cfg.stage,
                    "task": name,
                    "mode": mode,
                    "decoding": decoding,
                    "score": score,
                    "low": low,
                    "high": high,
                    "n": len(rows),
                    "samples": max(k) + 1,
                    "seed": cfg.label_seed,
                    "split": cfg.split,
                    "tokens": sum(tokens) / len(tokens),
                }
            )
    return results


def print_table(results):
    for r in results:
        print(
            f"{r['stage']:8s} {r['task']:5s} {r['mode']:9s} {r['decoding']:8s} {100 * r['score']:5.1f}  "
            f"[{100 * r['low']:5.1f}, {100 * r['high']:5.1f}]  n={r['n']} x {r['samples']}",
            flush=True,
        )


# ---- 3. Chat -------------------------------------------------------------------------------------
def chat(model, engine, tokenizer, cfg):
    """Talk in the terminal. The reply appears while it is sampled; the mode is a flag of each user turn, as in training."""
    print(
        "/think and /no_think switch the mode (at the end of a message: for that turn), /new forgets, ctrl-d leaves."
    )
    messages, think = [], True
    while True:
        try:
            text = input(f"\n{'think' if think else 'no_think'}> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if text in ("/think", "/no_think"):
            think = text == "/think"
        elif text == "/new":
            messages = []
        elif text:
            messages.append({"role": "user", "content": text})
            prompt_ids = render_chat(tokenizer, messages, think)[0]
            room = min(cfg.max_new_tokens or 8192, model.max_positions() - len(prompt_ids))
            if room < 1:
                messages = (
                    print(
                        f"The conversation fills all {model.max_positions()} positions of this model: this is a new one."
                    )
                    or []
                )
                continue
            r = Rollout(
                row={},
                group=0,
                prompt_ids=prompt_ids,
                seed=request_seed(cfg.seed, 2, time.time_ns()),
            )
            # what the paper evaluates with
            how = (0.6 if cfg.temperature < 0 else cfg.temperature, cfg.top_p or 0.95)
            sampling = threading.Thread(target=engine.generate, args=([r], room, *how), daemon=True)
            sampling.start()
            shown = 0
            while shown < len(r.text) or sampling.is_alive():
                sampling.join(0.03)
                # half a character waits for its other half
                now = r.text or tokenizer.decode(list(r.completion_ids)).rstrip("\ufffd")
                print(now[shown:], end="", flush=True)
                shown = len(now)
            print("" if r.finish_reason == "stop" else " [cut off]")
            messages.append({"role": "assistant", "content": r.text})


# ---- 4. main -------------------------------------------------------------------------------------
def load(cfg, device, rope_factor):
    """(model, engine) of --model; YaRN where the task's protocol wants it."""
    with one_sentence(f"--model={cfg.model}", note="Nothing was measured."):
        model = Qwen3.from_pretrained(
            cfg.model,
            device=device,
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            rope_factor=rope_factor,
        )
    return model, make_engine("torch" if cfg.chat else cfg.engine, model, load_tokenizer(cfg.model))


def main(cfg):
    if cfg.matrix:
        return draw_matrix(cfg.matrix)
    if cfg.gates:
        broken = check_gates(cfg.gates, cfg.stage)
        return fail(broken, note="") if broken else print(f"{cfg.gates}: every gate holds.")
    if cfg.keep_best:
        return keep_best(cfg.keep_best)
    if cfg.same_compute:
        return print(steps_of_same_compute(*cfg.same_compute.split(",")))
    names = list(TOY) if cfg.tasks == "all-toy" else cfg.tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        fail(
            f"--tasks: {', '.join(unknown)} unknown (has: {', '.join(TASKS)}).",
            note="Nothing was measured.",
        )
    if not os.path.exists(os.path.join(cfg.model, "config.json")):
        fail(
            f"--model={cfg.model}: no checkpoint there (config.json is missing).",
            note="Nothing was measured.",
        )
    if unknown := [mode for mode in cfg.modes.split(",") if mode not in ("", "think", "no_think")]:
        fail(
            f"--modes: {', '.join(unknown)} unknown (has: think, no_think).",
            note="Nothing was measured.",
        )
    if (
        len({protocol(name, cfg)["rope_factor"] for name in names}) > 1
        and cfg.engine != "torch"
        and torch.cuda.is_available()
    ):
        fail(
            "--tasks: some take YaRN and some do not (or give --rope_factor, or --engine=torch): measure them apart.",
            note="Nothing was measured.",
        )
    # ranks finish hours apart where answers are long
    rank, world, device = init_distributed(cfg.seed, 24 * 3600)
    cfg.stage = cfg.stage or os.path.basename(os.path.normpath(cfg.model))
    with one_sentence(f"--model={cfg.model}", note="Nothing was measured."):
        tokenizer, loaded = load_tokenizer(cfg.model), None
    if cfg.results:
        lock(os.path.dirname(cfg.results) or ".")
        open(cfg.results, "a").close()  # what cannot be written is said now, not after hours
    if cfg.chat:
        return chat(*load(cfg, device, cfg.rope_factor), tokenizer, cfg)
    for name in names:
        how = protocol(name, cfg)
        if loaded != how["rope_factor"]:
            (model, engine), loaded = load(cfg, device, how["rope_factor"]), how["rope_factor"]
        if how["max_new_tokens"] > model.max_positions():
            fail(
                f"{name}: {how['max_new_tokens']} new tokens, but {cfg.model} has {model.max_positions()} positions: pass --max_new_tokens.",
                note="",
            )
        results = score_task(name, engine, tokenizer, cfg, rank, world, model.max_positions())
        print_table(results if rank == 0 else [])
        if cfg.results and rank == 0:
            with appending(cfg.results) as f:
                f.writelines(json.dumps(r) + "\n" for r in results)
    # of a run folder: run_cascade.sh stops if broken_gate has text
    if os.path.basename(cfg.results) == "results.jsonl" and rank == 0:
        with open(os.path.join(os.path.dirname(cfg.results), "broken_gate"), "w") as f:
            f.write(check_gates(os.path.dirname(cfg.results), cfg.stage))


if __name__ == "__main__":
    main(parse_config(Config))
    finish()
