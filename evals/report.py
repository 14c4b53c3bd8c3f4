"""The report of a run: report.html (one file, opens anywhere, asks no network), report.md, plots.

    python -m evals.report --run=out/toy           the run folder of a cascade
    python -m evals.report --run=out/my_idea       the folder of one stage, evaluated or not

Everything comes from what the run left in its folder: results.jsonl (scores), samples/ (completions
and verdicts), and each stage's metrics.jsonl and run.json. The page itself is report_template.html;
only its data is written here.
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

from evals.plots import draw_matrix, plot_all_curves, skill_of
from evals.results import (
    TASK_ORDER,
    broken_gates,
    columns_of,
    has_results,
    in_stage_order,
    read_results,
    why_unchecked,
)
from evaluate import own_skills
from lib.checkpoint import git_hash
from lib.flags import PositiveInt, parse_config
from lib.logs import without_middle
from lib.progress import span


@dataclass
class Config:
    run: str = "out/toy"  # folder of a cascade, or of one stage
    problems: PositiveInt = 6  # problems of each task and mode whose completions are shown
    samples: PositiveInt = 2  # completions of each problem that are shown, after every stage
    # A completion with more characters than this is shown without its middle.
    characters: PositiveInt = 6000
    points: PositiveInt = 300  # most points of a curve


# ---- 1. What the run left ------------------------------------------------------------------------
# Key of metrics.jsonl -> title of its curve.
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
    """Read the whole lines of a JSONL file; [] if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path) as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def thin(points, most):
    """Keep at most about `most` points, evenly spaced, and the last one."""
    if len(points) <= most:
        return points
    stride = -(-len(points) // most)  # rounded up
    return points[::stride] + points[-1:]


def is_one_stage(folder):
    """True for the folder of one stage, which holds metrics.jsonl, step_*/ and final itself."""
    return os.path.isfile(os.path.join(folder, "metrics.jsonl"))


def folder_name(folder):
    return os.path.basename(os.path.abspath(folder))


def stage_folders(run, stages):
    """Return the folders of the stages that were trained in a run, in the order of `stages`.

    stages: the evaluated ones in their order. A stage that was trained to its end but not
    evaluated stands where a cascade has it, or last.
    """
    if is_one_stage(run):
        return [run]
    trained = [
        name
        for name in sorted(os.listdir(run))
        if is_one_stage(os.path.join(run, name))
        and os.path.exists(os.path.join(run, name, "final", "run.json"))
    ]
    names = in_stage_order(dict.fromkeys([*stages, *trained]))
    return [os.path.join(run, name) for name in names if name in trained]


def read_saved_run(folder):
    """Read run.json of a stage's final checkpoint, else of its newest one; None if it has none."""
    newest_first = sorted(glob.glob(os.path.join(glob.escape(folder), "step_*")), reverse=True)
    for checkpoint in (os.path.join(folder, "final"), *newest_first):
        path = os.path.join(checkpoint, "run.json")
        if os.path.exists(path):
            with open(path) as f:
                return json.load(f)
    return None


def read_curves(rows, most):
    """Return {title: [(step, value)]} of what a stage logged, at most about `most` points each."""
    curves = {}
    for key, title in CURVES.items():
        if key == "reward" and "reward/rm_score" in rows[0]:
            # RLHF shapes its rewards: the raw score of the reward model is what compares.
            key = "reward/rm_score"
        logged = [row for row in rows if row.get(key) is not None]
        points = [(row["step"], row[key]) for row in logged if np.isfinite(row[key])]
        if points:
            curves[title] = thin(points, most)
    held_out = [(row["step"], row["eval"]) for row in rows if "eval" in row]
    if held_out:
        curves["held-out"] = held_out
    return curves


def read_stage(folder, cfg):
    """Read the time, tokens, curves and command of a stage; None if it has logged no step."""
    rows = read_jsonl(os.path.join(folder, "metrics.jsonl"))
    if not rows:
        return None
    last_step = max(row["step"] for row in rows)
    # SFT logs only some of its steps. The others are taken to cost as much as these.
    logged_share = len(rows) / last_step

    def total(key):
        return sum(row.get(key, 0.0) for row in rows) / logged_share

    saved = read_saved_run(folder)
    if saved is None:
        # Nothing was saved yet. Without a command the page lists no command for this stage.
        saved = {"step": last_step, "command": [], "git": "", "torch": "", "world": 0, "config": {}}
    return {
        "name": folder_name(folder),
        "steps": saved["step"],
        "gen": total("time/gen"),
        "train": total("time/train"),
        "tokens": total("num_tokens"),
        "curves": read_curves(rows, cfg.points),
        "command": shlex.join(saved["command"]),
        "git": saved["git"],
        "torch": saved["torch"],
        "world": saved["world"],
        "config": saved["config"],
    }


def read_rollouts(folder, stages, cfg):
    """Read completions and verdicts of the first problems of every task, mode and stage.

    They come in the order in which the page steps through them: by task and mode, problem, stage.
    """
    shown = []
    for path in glob.glob(os.path.join(folder, "samples", "*", "*_sampled.rank*.jsonl")):
        stage = path.split(os.sep)[-2]
        name = os.path.basename(path).partition(".rank")[0]
        task, mode = re.fullmatch(r"(.+?)_(think|no_think)_sampled", name).groups()
        if stage not in stages:
            continue
        for kept in read_jsonl(path):
            wanted = kept["problem"] < cfg.problems and kept["sample"] < cfg.samples
            if not wanted or "score" not in kept:
                continue
            rollout = {
                "stage": stage,
                "set": f"{task}, {mode}",
                "prompt": kept["prompt"][-cfg.characters :],
                "text": without_middle(kept["text"], cfg.characters),
            }
            for key in (
                "problem",
                "sample",
                "score",
                "reward",
                "status",
                "tokens",
                "finish_reason",
            ):
                rollout[key] = kept[key]
            shown.append(rollout)

    # Tasks of one's own come after those that TASK_ORDER lists, by name.
    others = sorted({rollout["set"].rpartition(", ")[0] for rollout in shown} - set(TASK_ORDER))
    sets = [f"{task}, {mode}" for task in (*TASK_ORDER, *others) for mode in ("think", "no_think")]

    def place(rollout):
        set_place, stage_place = sets.index(rollout["set"]), stages.index(rollout["stage"])
        return set_place, rollout["problem"], stage_place, rollout["sample"]

    return sorted(shown, key=place)


def versions():
    """Name the versions of python and of the packages that decide what a run computes."""
    found = [f"python {sys.version.split()[0]}"]
    for name in ("torch", "transformers", "triton", "numpy", "safetensors", "math-verify", "vllm"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join(found)


def day_of(path):
    """Return the day on which a file was last written."""
    return time.strftime("%Y-%m-%d", time.gmtime(os.path.getmtime(path)))


def gather(cfg):
    """Collect everything the page shows, as plain JSON."""
    if is_one_stage(cfg.run) and not has_results(cfg.run):
        cells, stages = {}, []
        day = day_of(os.path.join(cfg.run, "metrics.jsonl"))
        subtitle = f"trained until {day}, not evaluated yet"
        unmeasured = (
            f"Nothing was evaluated yet: python evaluate.py --model={cfg.run}/final "
            f"--results={cfg.run}/results.jsonl"
        )
        unchecked = "no gate was checked: nothing was evaluated yet."
    else:
        cells, stages = read_results(cfg.run, "run")
        day = day_of(os.path.join(cfg.run, "results.jsonl"))
        subtitle = f"{' > '.join(stages)}, measured {day}"
        unmeasured = ""
        unchecked = why_unchecked(cells, stages)
    columns = columns_of(cells, stages)
    measured = [cell for (stage, *_), cell in cells.items() if stage in stages]
    decodings = [
        decoding
        for decoding in ("sampled", "greedy")
        if any(cell["decoding"] == decoding for cell in measured)
    ]
    runs = []
    for folder in stage_folders(cfg.run, stages):
        run = read_stage(folder, cfg)
        if run:
            runs.append(run)
    seconds = sum(run["gen"] + run["train"] for run in runs)
    tokens = sum(run["tokens"] for run in runs)
    graded = sum(cell["n"] * cell["samples"] for cell in measured)
    tiles = [
        (str(len(runs)), "training runs"),
        (span(seconds), "of sampling and training"),
        (f"{tokens / 1e6:.2f}M", "tokens trained on"),
        (str(graded), "completions graded"),
        (str(len(columns)), "benchmark columns"),
    ]
    skills = {stage: skill_of(stage, own_skills()) for stage in stages}
    return {
        "name": folder_name(cfg.run),
        "subtitle": subtitle,
        "tiles": tiles,
        "stages": stages,
        "columns": columns,
        "cells": measured,
        "own": {stage: task for stage, task in skills.items() if task},
        "decodings": decodings,
        "gates": [text for _, text in broken_gates(cells, stages)],
        "unchecked": capitalized(unchecked),
        "unmeasured": unmeasured,
        "runs": runs,
        "rollouts": read_rollouts(cfg.run, stages, cfg),
        "metrics": [title for title in CURVES.values() if any(title in r["curves"] for r in runs)],
        "versions": versions(),
        "footer": f"Written by evals/report.py at commit {git_hash()[:10]}.",
    }


def capitalized(sentence):
    return sentence[:1].upper() + sentence[1:]


# ---- 2. report.html ------------------------------------------------------------------------------
def write_html(data, path):
    """Write the template with the data in it."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, "report_template.html"), encoding="utf-8") as f:
        page = f.read()
    # "<" is escaped, so that no completion of a model can end the script element.
    escaped = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = page.replace("__DATA__", escaped, 1)
    title = f"<title>{html.escape(data['name'])}: cascade report</title>"
    page = page.replace("<title>cascade report</title>", title, 1)
    with open(path, "w", encoding="utf-8") as f:
        f.write(page)


# ---- 3. report.md --------------------------------------------------------------------------------
def table(head, rows):
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def indented(text):
    return "\n".join("    " + line for line in text.splitlines())


def scores_md(data, cells):
    """Return a paragraph for each decoding: the stage-by-skill table."""
    if data["unmeasured"]:
        return [data["unmeasured"]]
    paragraphs = []
    head = ["", *(f"{task} {mode}" for task, mode in data["columns"])]
    for decoding in data["decodings"]:
        rows = []
        for stage in data["stages"]:
            row = [stage]
            for task, mode in data["columns"]:
                cell = cells.get((stage, task, mode, decoding))
                text = "-"
                if cell:
                    low, high = 100 * cell["low"], 100 * cell["high"]
                    text = f"{100 * cell['score']:.1f} [{low:.1f}, {high:.1f}]"
                row.append(text)
            rows.append(row)
        caption = f"Held-out, {decoding}, percent [95% interval]."
        paragraphs.append(f"{caption}\n\n{table(head, rows)}")
    return paragraphs


def gates_md(data):
    if data["gates"]:
        return "\n".join(f"- {text}" for text in data["gates"])
    return data["unchecked"] or "Every gate holds."


def times_md(data):
    head = ["stage", "steps", "time", "sampling", "training", "tokens trained on"]
    rows = []
    for run in data["runs"]:
        times = [span(run["gen"] + run["train"]), span(run["gen"]), span(run["train"])]
        rows.append([run["name"], run["steps"], *times, f"{run['tokens']:.0f}"])
    return table(head, rows)


def modes_md(data, cells):
    """Return the table of the sampled scores that were measured with and without thinking."""
    tasks = [task for task, mode in data["columns"] if mode == "no_think"]
    rows = []
    for stage in data["stages"]:
        for task in tasks:
            think = cells.get((stage, task, "think", "sampled"))
            no_think = cells.get((stage, task, "no_think", "sampled"))
            if think and no_think:
                percents = [f"{100 * cell['score']:.1f}" for cell in (think, no_think)]
                rows.append([stage, task, *percents])
    if not rows:
        return "No task was measured in both modes."
    return table(["stage", "task", "think", "no_think"], rows)


def rollouts_md(data):
    """Return a paragraph for each task and mode: the last completion of the last stage."""
    last_of_set = {}
    for rollout in data["rollouts"]:
        last_of_set[rollout["set"]] = rollout
    paragraphs = []
    for rollout in last_of_set.values():
        paragraphs.append(
            f"{rollout['set']}, after {rollout['stage']}: score {rollout['score']:g}, "
            f"{rollout['status']}, {rollout['tokens']} tokens\n\n"
            f"{indented(rollout['prompt'])}\n\nreply:\n\n{indented(rollout['text'])}"
        )
    return paragraphs


def commands_md(data):
    return "\n".join(
        f"    {run['command']}    # commit {run['git'][:10]}, {run['world']} ranks"
        for run in data["runs"]
        if run["command"]
    )


def write_md(data, path):
    """Write the same as the page for places without a browser."""
    cells = {(c["stage"], c["task"], c["mode"], c["decoding"]): c for c in data["cells"]}
    paragraphs = [
        f"# Cascade report: {data['name']}",
        data["subtitle"] + ".",
        "## Scores",
        *scores_md(data, cells),
        "## Gates",
        gates_md(data),
        "## Time and tokens",
        times_md(data),
        "## Think and no_think",
        modes_md(data, cells),
        "## Rollouts",
        *rollouts_md(data),
        "## Commands and versions",
        data["versions"],
        commands_md(data),
    ]
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n\n".join(paragraphs) + "\n")


# ---- 4. main -------------------------------------------------------------------------------------
def main(cfg):
    data = gather(cfg)
    if data["unmeasured"]:
        print(data["unmeasured"])
        plot_all_curves(cfg.run, [])
    else:
        draw_matrix(cfg.run, own_skills())
    write_html(data, os.path.join(cfg.run, "report.html"))
    write_md(data, os.path.join(cfg.run, "report.md"))
    print(f"\nreport: {os.path.join(cfg.run, 'report.html')} and report.md")


if __name__ == "__main__":
    main(parse_config(Config))
