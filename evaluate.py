"""Measures a checkpoint: every skill's held-out metric, sampled and greedy, with 95% intervals; draws the stage-by-skill matrix.

    python evaluate.py --model=out/toy/mathrl/final --tasks=all-toy          one table
    python evaluate.py --matrix=out/toy                                      the table and plots of a whole run

A task runs through its stage's own data loader, prompt builder and verifier, and through the sampler the stage trains with.
Sampled scores are means over `samples` completions at `temperature`, the protocol of the paper (avg@k, appendix B); the interval
resamples problems, not completions, because completions of one problem are not independent.
"""

import json
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch

import common
from engine import Rollout, make_engine, request_seed
from model import Qwen3, load_tokenizer, render_chat


@dataclass
class Config:
    model: str = ""  # checkpoint folder
    tasks: str = "all-toy"  # comma-separated names of TASKS
    data: str = "out/toy/data"  # folder with <task>_<split>.jsonl
    split: str = "test"  # test is for reporting, dev for tuning
    stage: str = ""  # row label; "": the model's folder name
    results: str = ""  # JSONL file that one line a cell is appended to
    engine: str = "auto"  # auto, torch or vllm
    samples: int = 4  # completions per problem of the sampled score
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 96
    limit: int = 0  # problems per task; 0: all
    seed: int = 0
    label_seed: int = 0  # seed of the training run, written into the results
    matrix: str = ""  # run folder: print its matrix, write matrix.png and one plot a stage
    same_compute: str = ""  # "RL folder,SFT folder": print how many SFT steps cost the seconds of that RL run


# ---- 1. Tasks --------------------------------------------------------------------------------------------------------
def stage_task(name, modes, **overrides):
    """(modes, load) of a task that is graded by the stage that teaches it."""

    def load(path):
        stage = __import__(name)
        cfg = stage.Config(data=path, reward_workers=2, **overrides)
        return stage.load_rows(cfg), stage.make_reward(cfg), stage.metric

    return modes, load


def load_chat(path):
    """The chat column is graded by the rule stated in toy.py, which neither the policy nor its reward model has seen."""
    import rlhf
    import toy

    def collect(rollouts):
        for r in rollouts:
            closed = not r.row["think"] or "</think>" in r.text
            r.reward = toy.chat_score(r.row["messages"][-1]["content"], rlhf.answer_of(r)) if closed and r.finish_reason == "stop" else 0.0
            r.status = "ok"

    return rlhf.load_rows(rlhf.Config(data=path)), (lambda rollout: None, collect), lambda r: r.reward


TASKS = {  # name -> (modes, load(path) -> rows, (submit, collect), metric)
    "chat": (("think", "no_think"), load_chat),
    "if": stage_task("ifrl", ("think", "no_think")),
    "math": stage_task("mathrl", ("think",)),
    "code": stage_task("coderl", ("think",)),
    "swe": stage_task("swerl", ("think",), min_prompt_tokens=0),
}


# ---- 2. Scores -------------------------------------------------------------------------------------------------------
def interval(scores_PG, seed=0, resamples=2000):
    """(mean, low, high): 95% bootstrap over problems of the mean of their mean scores."""
    per_problem = np.asarray(scores_PG, dtype=np.float64).mean(axis=1)
    draws = np.random.default_rng(seed).integers(0, len(per_problem), (resamples, len(per_problem)))
    low, high = np.percentile(per_problem[draws].mean(axis=1), [2.5, 97.5])
    return float(per_problem.mean()), float(low), float(high)


def score_task(name, engine, tokenizer, cfg, rank, world):
    """One result line for each mode and decoding of a task; every rank decodes its share of the problems."""
    modes, load = TASKS[name]
    rows, (submit, collect), metric = load(os.path.join(cfg.data, f"{name}_{cfg.split}.jsonl"))
    rows = rows[: cfg.limit] if cfg.limit else rows
    results = []
    for mode in modes:
        for row in rows:
            row["think"] = mode == "think"
            row["prompt_ids"] = render_chat(tokenizer, row["messages"], row["think"])[0]
        for decoding, samples, temperature in (("sampled", cfg.samples, cfg.temperature), ("greedy", 1, 0.0)):
            rollouts = [
                Rollout(row=row, group=i, prompt_ids=row["prompt_ids"], seed=request_seed(cfg.seed, 1, i, k))
                for i, row in enumerate(rows) if i % world == rank for k in range(samples)
            ]  # fmt: skip
            engine.generate(rollouts, cfg.max_new_tokens, temperature, cfg.top_p, on_finished=submit)
            collect(rollouts)
            scores = np.reshape([metric(r) for r in rollouts], (-1, samples))
            score, low, high = interval(np.concatenate(common.all_gather(scores)))
            results.append({"stage": cfg.stage, "task": name, "mode": mode, "decoding": decoding, "score": score, "low": low, "high": high,
                            "n": len(rows), "samples": samples, "seed": cfg.label_seed, "split": cfg.split})  # fmt: skip
    return results


def print_table(results):
    for r in results:
        print(f"{r['stage']:8s} {r['task']:5s} {r['mode']:9s} {r['decoding']:8s} {100 * r['score']:5.1f}  "
              f"[{100 * r['low']:5.1f}, {100 * r['high']:5.1f}]  n={r['n']} x {r['samples']}", flush=True)  # fmt: skip


# ---- 3. The matrix ---------------------------------------------------------------------------------------------------
STAGES = ("sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl", "mopd")
OWN = {"rlhf": "chat", "ifrl": "if", "mathrl": "math", "coderl": "code", "swerl": "swe"}


def draw_matrix(folder):
    """Print the stage-by-skill tables of folder/results.jsonl and write matrix.png and curves_<stage>.png beside it."""
    path = os.path.join(folder, "results.jsonl")
    if not os.path.exists(path):
        common.fail(f"--matrix={folder}: no results.jsonl there.")
    cells = {}
    for line in open(path):
        r = json.loads(line)
        cells[r["stage"], r["task"], r["mode"], r["decoding"]] = r  # a re-run replaces
    columns = [(task, mode) for task, (modes, _) in TASKS.items() for mode in modes]
    stages = [s for s in STAGES if any(key[0] == s for key in cells)]
    for decoding in ("sampled", "greedy"):
        print(f"\n{decoding}, held-out test split, percent [95% interval]; * a stage's own skill")
        print(f"{'':8s}" + "".join(f"{task + ' ' + mode:>22s}" for task, mode in columns))
        for s in stages:
            line = f"{s:8s}"
            for task, mode in columns:
                r = cells.get((s, task, mode, decoding))
                text = f"{100 * r['score']:.1f} [{100 * r['low']:.0f}, {100 * r['high']:.0f}]" if r else "-"
                line += f"{text + ('*' if OWN.get(s) == task else ' '):>22s}"
            print(line)
    taught = [s for s in stages if s in ("sft", *OWN)]
    print("\nown skill, sampled, before -> after the stage that teaches it:")
    for before, after in zip(taught, taught[1:]):
        mode = "no_think" if after == "ifrl" else "think"
        a, b = (cells.get((s, OWN[after], mode, "sampled")) for s in (before, after))
        if not (a and b):
            continue
        verdict = "beyond the intervals' overlap" if b["low"] > a["high"] else "within the intervals"
        print(f"{after:8s}{OWN[after]:>5s} {mode:9s}{100 * a['score']:6.1f} [{100 * a['low']:.1f}, {100 * a['high']:.1f}] -> "
              f"{100 * b['score']:5.1f} [{100 * b['low']:.1f}, {100 * b['high']:.1f}]  {verdict}")  # fmt: skip
    if any(key[0].endswith("_control") for key in cells):
        print_controls(cells, taught)
    plot_matrix(os.path.join(folder, "matrix.png"), cells, stages, columns)
    for s in stages[1:]:
        if os.path.exists(metrics := os.path.join(folder, s, "metrics.jsonl")):
            plot_curves(metrics, os.path.join(folder, f"curves_{s}.png"), s)


def print_controls(cells, taught):
    """The honest control: the seconds of each RL stage spent on more SFT over the same demonstrations instead."""
    print("\nown skill, sampled: before the stage, after it, and after the same seconds of more SFT from the same checkpoint")
    for before, after in zip(taught, taught[1:]):
        mode = "no_think" if after == "ifrl" else "think"
        found = [cells.get((s, OWN[after], mode, "sampled")) for s in (before, after, f"{after}_control")]
        if all(found):
            texts = [f"{100 * r['score']:5.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" for r in found]
            print(f"{after:8s}{OWN[after]:>5s} {mode:9s} before {texts[0]}   RL {texts[1]}   more SFT {texts[2]}")


def steps_of_same_compute(rl_folder, sft_folder):
    """SFT steps that take as long as the RL run's sampling, verifying and training (evaluations left out of both)."""
    read = lambda folder: [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]
    seconds = sum(r["time/gen"] + r["time/train"] for r in read(rl_folder))
    return round(seconds / float(np.median([r["time/train"] for r in read(sft_folder)])))


def plot_matrix(path, cells, stages, columns):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = np.array([[100 * cells[s, t, m, "sampled"]["score"] if (s, t, m, "sampled") in cells else np.nan for t, m in columns] for s in stages])
    figure, axis = plt.subplots(figsize=(1.35 * len(columns) + 1.5, 0.7 * len(stages) + 1.6))
    axis.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, s in enumerate(stages):
        for x, (task, mode) in enumerate(columns):
            r = cells.get((s, task, mode, "sampled"))
            if r:
                colour = "white" if values[y, x] < 60 else "black"
                half = 50 * (r["high"] - r["low"])
                axis.text(x, y, f"{values[y, x]:.1f}\n\u00b1{half:.1f}", ha="center", va="center", color=colour, fontsize=9,
                          fontweight="bold" if OWN.get(s) == task else "normal")  # fmt: skip
            if OWN.get(s) == task:
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axis.set_xticks(range(len(columns)), [f"{t}\n{m}" for t, m in columns])
    axis.set_yticks(range(len(stages)), stages)
    axis.set_title("held-out score after each stage, % (sampled, 95% interval; red: what the stage teaches)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_curves(metrics_path, path, stage):
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in open(metrics_path)]
    rows = [r | {"reward": r.get("reward/rm_score", r["reward"])} for r in rows]  # rlhf: the raw score, whatever the shaping
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2))
    for axis, (key, title) in zip(axes, (("reward", "reward"), ("len", "completion tokens"), ("trunc", "share truncated"), ("entropy", "entropy, nats/token"))):
        steps, values = [r["step"] for r in rows], [r[key] for r in rows]
        window = max(len(values) // 20, 1)
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        axis.plot(steps, [np.mean(values[max(0, i - window) : i + 1]) for i in range(len(values))], color="tab:blue", label="training")
        if key == "reward" and any("eval" in r for r in rows):
            held_out = [(r["step"], r["eval"]) for r in rows if "eval" in r]
            axis.plot(*zip(*held_out), "o-", color="tab:red", markersize=3, label="held-out (dev)")
            axis.legend(fontsize=8)
        axis.set_title(f"{stage}: {title}", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- 4. main ---------------------------------------------------------------------------------------------------------
def main(cfg):
    if cfg.matrix:
        return draw_matrix(cfg.matrix)
    if cfg.same_compute:
        return print(steps_of_same_compute(*cfg.same_compute.split(",")))
    names = list(TASKS) if cfg.tasks == "all-toy" else cfg.tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        common.fail(f"--tasks: {', '.join(unknown)} unknown (has: {', '.join(TASKS)}).")
    if not os.path.exists(os.path.join(cfg.model, "config.json")):
        common.fail(f"--model={cfg.model}: no checkpoint there (config.json is missing).")
    rank, world, device = common.init_distributed(cfg.seed)
    cfg.stage = cfg.stage or os.path.basename(os.path.normpath(cfg.model))
    tokenizer = load_tokenizer(cfg.model)
    model = Qwen3.from_pretrained(cfg.model, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    engine = make_engine(cfg.engine, model, tokenizer)
    for name in names:
        results = score_task(name, engine, tokenizer, cfg, rank, world)
        if rank == 0:
            print_table(results)
        if cfg.results and rank == 0:
            with open(cfg.results, "a") as f:
                f.writelines(json.dumps(r) + "\n" for r in results)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main(common.parse_config(Config))
    common.finish()
