"""The report of a run: report.html (one file, opens anywhere, asks no network), report.md, matrix.png and the curves.

    python -m evals.report --run=out/toy

Everything comes from what the run left in its folder: results.jsonl (scores), samples/ (completions and verdicts), and each
stage's metrics.jsonl and run.json. The page itself is report_template.html; only its data is written here.
"""

import glob
import html
import importlib.metadata
import json
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass

import numpy as np

from evals.plots import draw_matrix
from evals.results import OWN, STAGES, TASK_ORDER, base_of, broken_gates, columns_of, read_results
from lib.checkpoint import git_hash
from lib.flags import parse_config


@dataclass
class Config:
    run: str = "out/toy"  # folder of a run
    problems: int = 6  # of each task and mode, shown with the completions after every stage
    samples: int = 2  # completions of each problem that are shown
    characters: int = 6000  # most of a completion that are shown: its beginning and its end
    points: int = 300  # most of a curve


# ---- 1. What the run left ------------------------------------------------------------------------
CURVES = {
    "reward": "reward",
    "len": "completion tokens",
    "trunc": "share cut off",
    "entropy": "entropy",
    "flat": "groups of equal rewards",
    "gap": "sampler - trainer gap",
    "grad_norm": "gradient norm",
    "loss": "loss",
}


def read_jsonl(path):
    return (
        [json.loads(line) for line in open(path) if line.endswith("\n")]
        if os.path.exists(path)
        else []
    )


def thin(points, most):
    """Every so many-th point, the last one included."""
    return points[:: -(-len(points) // most)] + points[-1:] if len(points) > most else points


def read_stage(folder, cfg):
    """A stage's time, tokens, curves and command; None if it was not trained here."""
    name, rows = os.path.basename(folder), read_jsonl(os.path.join(folder, "metrics.jsonl"))
    path = os.path.join(folder, "final", "run.json")
    if not rows or not os.path.exists(path):
        return None
    run, curves = json.load(open(path)), {}
    for key, title in CURVES.items():
        # rlhf: the raw score, whatever the shaping
        key = "reward/rm_score" if key == "reward" and "reward/rm_score" in rows[0] else key
        if points := [
            (r["step"], r[key]) for r in rows if r.get(key) is not None and np.isfinite(r[key])
        ]:
            curves[title] = thin(points, cfg.points)
    if dots := [(r["step"], r["eval"]) for r in rows if "eval" in r]:
        curves["held-out"] = dots
    # sft logs some of its steps: the others cost as much as these
    logged = len(rows) / max(r["step"] for r in rows)
    total = lambda key: sum(r.get(key, 0.0) for r in rows) / logged
    return {
        "name": name,
        "steps": run["step"],
        "gen": total("time/gen"),
        "train": total("time/train"),
        "tokens": total("num_tokens"),
        "curves": curves,
        "command": shlex.join(run["command"]),
        "git": run["git"],
        "torch": run["torch"],
        "world": run["world"],
        "config": run["config"],
    }


def read_rollouts(folder, stages, cfg):
    """The first problems of every task, mode and stage with their completions and verdicts, ordered to be stepped through."""
    shown = []
    for path in glob.glob(os.path.join(folder, "samples", "*", "*_sampled.rank*.jsonl")):
        stage, name = path.split(os.sep)[-2], os.path.basename(path).partition(".rank")[0]
        task, mode = re.fullmatch(r"(.+?)_(think|no_think)_sampled", name).groups()
        if stage not in stages:
            continue
        for r in read_jsonl(path):
            if r["problem"] < cfg.problems and r["sample"] < cfg.samples and "score" in r:
                text, half = r["text"], cfg.characters // 2
                text = (
                    text
                    if len(text) <= cfg.characters
                    else f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
                )
                keep = ("problem", "sample", "score", "reward", "status", "tokens", "finish_reason")
                shown.append(
                    {
                        "stage": stage,
                        "set": f"{task}, {mode}",
                        "prompt": r["prompt"][-cfg.characters :],
                        "text": text,
                        **{k: r[k] for k in keep},
                    }
                )
    order = list(
        dict.fromkeys(f"{task}, {mode}" for task in TASK_ORDER for mode in ("think", "no_think"))
    )
    return sorted(
        shown,
        key=lambda r: (order.index(r["set"]), r["problem"], stages.index(r["stage"]), r["sample"]),
    )


def versions():
    packages = ("torch", "transformers", "triton", "numpy", "safetensors", "math-verify", "vllm")
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return f"python {sys.version.split()[0]}, " + ", ".join(found)


def span(seconds):
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def gather(cfg):
    """Everything the page shows, as plain JSON."""
    cells, stages = read_results(cfg.run, "run")
    columns = columns_of(cells, stages)
    order = lambda path: (STAGES.index(base_of(os.path.basename(path))), os.path.basename(path))
    folders = [
        p
        for p in glob.glob(os.path.join(cfg.run, "*"))
        if os.path.isdir(p) and base_of(os.path.basename(p)) in STAGES
    ]
    runs = [run for run in (read_stage(p, cfg) for p in sorted(folders, key=order)) if run]
    seconds, tokens = sum(r["gen"] + r["train"] for r in runs), sum(r["tokens"] for r in runs)
    measured = [c for (s, *_), c in cells.items() if s in stages]
    day = time.strftime(
        "%Y-%m-%d", time.gmtime(os.path.getmtime(os.path.join(cfg.run, "results.jsonl")))
    )
    tiles = [
        (str(len(runs)), "training runs"),
        (span(seconds), "of sampling and training"),
        (f"{tokens / 1e6:.2f}M", "tokens trained on"),
        (str(sum(c["n"] * c["samples"] for c in measured)), "completions graded"),
        (str(len(columns)), "benchmark columns"),
    ]
    return {
        "name": os.path.basename(os.path.normpath(cfg.run)),
        "subtitle": f"{' > '.join(stages)}, measured {day}",
        "tiles": tiles,
        "stages": stages,
        "columns": columns,
        "cells": measured,
        "own": OWN,
        "decodings": [
            d for d in ("sampled", "greedy") if any(c["decoding"] == d for c in measured)
        ],
        "gates": [text for _, text in broken_gates(cells, stages)],
        "runs": runs,
        "rollouts": read_rollouts(cfg.run, stages, cfg),
        "metrics": [m for m in CURVES.values() if any(m in r["curves"] for r in runs)],
        "versions": versions(),
        "footer": f"Written by evals/report.py at commit {git_hash()[:10]}.",
    }


# ---- 2. report.html and report.md ----------------------------------------------------------------
def write_html(data, path):
    """The template with the data in it; "<" is escaped, so that no sample can end the script element."""
    here = os.path.dirname(os.path.abspath(__file__))
    page = open(os.path.join(here, "report_template.html"), encoding="utf-8").read()
    page = page.replace("__DATA__", json.dumps(data, allow_nan=False).replace("<", "\\u003c"), 1)
    with open(path, "w", encoding="utf-8") as f:
        f.write(
            page.replace(
                "<title>cascade report</title>",
                f"<title>{html.escape(data['name'])}: cascade report</title>",
                1,
            )
        )


def table(head, rows):
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)
    )


def write_md(data, path):
    """The same for places without a browser."""
    cells = {(c["stage"], c["task"], c["mode"], c["decoding"]): c for c in data["cells"]}
    text = [f"# Cascade report: {data['name']}", data["subtitle"] + ".", "## Scores"]
    for decoding in data["decodings"]:
        value = lambda c: (
            f"{100 * c['score']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]" if c else "-"
        )
        rows = [
            [s, *(value(cells.get((s, t, m, decoding))) for t, m in data["columns"])]
            for s in data["stages"]
        ]
        text.append(
            f"Held-out, {decoding}, percent [95% interval].\n\n"
            + table(["", *(f"{t} {m}" for t, m in data["columns"])], rows)
        )
    text += [
        "## Gates",
        "\n".join(f"- {g}" for g in data["gates"]) or "Every gate holds.",
        "## Time and tokens",
    ]
    rows = [
        [
            r["name"],
            r["steps"],
            span(r["gen"] + r["train"]),
            span(r["gen"]),
            span(r["train"]),
            f"{r['tokens']:.0f}",
        ]
        for r in data["runs"]
    ]
    text.append(
        table(["stage", "steps", "time", "sampling", "training", "tokens trained on"], rows)
    )
    both = [t for t, m in data["columns"] if m == "no_think" and (t, "think") in data["columns"]]
    pairs = [
        [s, t, *(f"{100 * cells[s, t, m, 'sampled']['score']:.1f}" for m in ("think", "no_think"))]
        for s in data["stages"]
        for t in both
        if all((s, t, m, "sampled") in cells for m in ("think", "no_think"))
    ]
    text += [
        "## Think and no_think",
        table(["stage", "task", "think", "no_think"], pairs)
        if pairs
        else "No task was measured in both modes.",
        "## Rollouts",
    ]
    seen = {}
    for r in data["rollouts"]:
        seen[r["set"]] = r  # the last stage's last one
    indent = lambda s: "\n".join("    " + line for line in s.splitlines())
    text += [
        f"{r['set']}, after {r['stage']}: score {r['score']:g}, {r['status']}, {r['tokens']} tokens\n\n{indent(r['prompt'])}\n\nreply:\n\n{indent(r['text'])}"
        for r in seen.values()
    ]
    text += [
        "## Commands and versions",
        data["versions"],
        "\n".join(
            f"    {r['command']}    # commit {r['git'][:10]}, {r['world']} ranks"
            for r in data["runs"]
        ),
    ]
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n\n".join(text) + "\n")


# ---- 3. main -------------------------------------------------------------------------------------
def main(cfg):
    draw_matrix(cfg.run)
    data = gather(cfg)
    write_html(data, os.path.join(cfg.run, "report.html"))
    write_md(data, os.path.join(cfg.run, "report.md"))
    print(f"\nreport: {os.path.join(cfg.run, 'report.html')} and report.md")


if __name__ == "__main__":
    main(parse_config(Config))
