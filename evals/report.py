"""The report of a run: report.html (one file, opens anywhere, asks no network), report.md, plots.

    python -m evals.report --run=out/toy           the run folder of a cascade
    python -m evals.report --run=out/my_idea       the folder of one stage, evaluated or not
    python -m evals.report --run=out/toy --live    the same page, written anew while the run goes on
    python -m evals.report --compare=out/a,out/b   out/a/compare.html: curves in one plot, flags

Everything comes from what the run left in its folder: results.jsonl (scores), samples/ (completions
and verdicts), and what training left in each stage's folder (evals/training.py). The page itself is
report_template.html; only its data is written here.
"""

import glob
import html
import importlib.metadata
import json
import os
import re
import sys
import time
from dataclasses import dataclass

from evals.pass_at import plot_pass_at, print_pass_at, read_pass_at, table_of
from evals.plots import HOW, draw_matrix, percent_with_interval, plot_all_curves, skill_of
from evals.results import (
    CONTROLS,
    TASK_ORDER,
    broken_gates,
    columns_of,
    decodings_of,
    has_results,
    own_skill_rows,
    read_results,
    why_unchecked,
)
from evals.training import (
    CURVES,
    STATUS_CURVES,
    differing_flags,
    folder_name,
    is_done,
    is_one_stage,
    pair_stages,
    read_jsonl,
    read_stage,
    read_training_rollouts,
    stage_folders,
)
from evaluate import own_skills
from lib.checkpoint import git_hash
from lib.flags import PositiveInt, parse_config
from lib.guard import fail
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
    training_prompts: PositiveInt = 16  # prompts of each stage's training that are shown
    training_samples: PositiveInt = 4  # rollouts of each of them that are shown
    live: bool = False  # write the page again and again, until the run ends or Ctrl-C
    every: PositiveInt = 30  # seconds between two pages of --live
    compare: str = ""  # two folders, A,B: A/compare.html, with the curves of both in one plot


# ---- 1. What the run left ------------------------------------------------------------------------
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


def read_controls(cells, stages):
    """Return [(stage, task, mode, decoding, [lines])] of own skills for which a control was run.

    Lines: before the stage, after it, and of each of CONTROLS; None where it was not run.
    """
    found = []
    for decoding in decodings_of(cells, stages):
        for row in own_skill_rows(cells, stages, decoding, own_skills()):
            stage, task, mode, before, after, controls = row
            if controls:
                lines = [before, after, *(controls.get(name) for name in CONTROLS.values())]
                found.append((stage, task, mode, decoding, lines))
    return found


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


def read_runs(folders, cfg):
    """What training left in each of these folders, of those that have logged a step."""
    runs = [read_stage(folder, cfg) for folder in folders]
    return [run for run in runs if run]


def describe_training(cfg, runs):
    """Say of a run without results what trains now, or until when it trained."""
    under_way = [f"{run['name']}: {run['progress']}" for run in runs if run["progress"]]
    if under_way:
        return "; ".join(under_way)
    logs = [os.path.join(folder, "metrics.jsonl") for folder in stage_folders(cfg.run)]
    newest = max(logs, key=os.path.getmtime)
    return f"trained until {day_of(newest)}, not evaluated yet"


def count(n):
    """A count, short: 2.1M. As the page writes it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(round(n))


def gather(cfg):
    """Collect everything the page shows, as plain JSON."""
    cells, stages = {}, []
    if has_results(cfg.run) or not stage_folders(cfg.run):
        cells, stages = read_results(cfg.run, "run")
    folders = stage_folders(cfg.run, stages)
    runs = read_runs(folders, cfg)
    if stages:
        subtitle = f"{' > '.join(stages)}, measured {day_of(f'{cfg.run}/results.jsonl')}"
        unmeasured = ""
        unchecked = why_unchecked(cells, stages)
    else:
        subtitle = describe_training(cfg, runs)
        unmeasured = (
            f"Nothing was evaluated yet: python evaluate.py --model={folders[-1]}/final "
            f"--results={cfg.run}/results.jsonl"
        )
        unchecked = "no gate was checked: nothing was evaluated yet."
    columns = columns_of(cells, stages)
    measured = [cell for (stage, *_), cell in cells.items() if stage in stages]
    rollouts = read_rollouts(cfg.run, stages, cfg)
    for folder in folders:
        rollouts += read_training_rollouts(folder, cfg)
    skills = {stage: skill_of(stage, own_skills()) for stage in stages}
    tiles = tiles_of(runs)
    if measured:
        graded = sum(cell["n"] * cell["samples"] for cell in measured)
        tiles.append((count(graded), "completions graded"))
        tiles.append((str(len(columns)), "benchmark columns"))
    return page_data(folder_name(cfg.run), subtitle, runs, rollouts, cfg.live * cfg.every) | {
        "tiles": tiles,
        "stages": stages,
        "columns": columns,
        "cells": measured,
        "own": {stage: task for stage, task in skills.items() if task},
        "decodings": decodings_of(cells, stages),
        "pass_at": pass_at_data(cfg.run),
        "pass_at_table": table_of(cfg.run),
        "controls": read_controls(cells, stages),
        "gates": [text for _, text in broken_gates(cells, stages)],
        "unchecked": capitalized(unchecked),
        "unmeasured": unmeasured,
    }


def page_data(name, subtitle, runs, rollouts, reload_s):
    """The data of a page about training alone; the evaluation's part is added by `gather`.

    reload_s: seconds after which the page loads itself anew; 0: never
    """
    metrics = [title for title in CURVES.values() if any(title in r["curves"] for r in runs)]
    if any(run["statuses"] for run in runs):
        metrics.append(STATUS_CURVES)
    return {
        "name": name,
        "subtitle": subtitle,
        "reload": reload_s,
        "tiles": tiles_of(runs),
        "stages": [],
        "columns": [],
        "cells": [],
        "own": {},
        "decodings": [],
        "pass_at": [],
        "pass_at_table": ([], []),
        "controls": [],
        "control_names": ["before", "after RL", *CONTROLS.values()],
        "gates": [],
        "unchecked": "",
        "unmeasured": "",
        "runs": runs,
        "rollouts": rollouts,
        "metrics": metrics,
        "status_curves": STATUS_CURVES,
        "compare": None,
        "versions": versions(),
        "footer": f"Written by evals/report.py at commit {git_hash()[:10]}.",
    }


def pass_at_data(folder):
    """The curves of pass@k, of the headline decoding: {"task", "mode", "curves"} a panel.

    curves: [(stage, decoding, [[k, score, low, high]])]
    """
    panels = {}
    for (task, mode, decoding), stages in read_pass_at(folder).items():
        panel = panels.setdefault((task, mode), {"task": task, "mode": mode, "curves": []})
        if panel["curves"] and panel["curves"][0][1] != decoding:
            continue
        for stage, line in stages.items():
            points = sorted([int(k), *estimate] for k, estimate in line["pass_at"].items())
            panel["curves"].append((stage, decoding, points))
    return list(panels.values())


def tiles_of(runs):
    seconds = sum(run["gen"] + run["train"] for run in runs)
    tokens = sum(run["tokens"] for run in runs)
    return [
        (str(len(runs)), "training runs"),
        (span(seconds), "of sampling and training"),
        (count(tokens), "tokens trained on"),
    ]


def gather_comparison(cfg):
    """Collect what the page of --compare shows: the stages of two runs, paired."""
    folders = cfg.compare.split(",")
    if len(folders) != 2:
        fail(f"--compare={cfg.compare}: expected two folders, A,B.", note="Nothing was read.")
    sides = []
    for folder in folders:
        runs = read_runs(stage_folders(folder), cfg)
        if not runs:
            fail(f"--compare: no metrics.jsonl in {folder} or below.", note="Nothing was read.")
        sides.append(runs)

    names = [folder_name(folder) for folder in folders]
    if names[0] == names[1]:
        # The same stage of two cascades: its folder alone does not tell them apart.
        names = ["/".join(os.path.abspath(folder).split(os.sep)[-2:]) for folder in folders]
    pairs, flags = [], []
    for title, a, b in pair_stages(sides):
        pairs.append({"title": title, "curves": [a and a["curves"], b and b["curves"]]})
        if a and b:
            flags.append({"title": title, "rows": differing_flags(a, b)})
    rollouts = []
    for name, folder in zip(names, folders):
        for stage in stage_folders(folder):
            of_stage = read_training_rollouts(stage, cfg)
            rollouts += [rollout | {"set": f"training of {name}"} for rollout in of_stage]

    runs = []
    for name, folder, side in zip(names, folders, sides):
        for run in side:
            label = name if is_one_stage(folder) else f"{name}: {run['name']}"
            runs.append(run | {"name": label})
    under_way = [f"{run['name']}: {run['progress']}" for run in runs if run["progress"]]
    subtitle = "; ".join(under_way) or "both are trained"
    page = page_data(" and ".join(names), subtitle, runs, rollouts, cfg.live * cfg.every)
    return page | {"compare": {"names": names, "pairs": pairs, "flags": flags}}


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
        caption = f"Held-out, {HOW[decoding]}, percent [95% interval]."
        paragraphs.append(f"{caption}\n\n{table(head, rows)}")
    return paragraphs


def controls_md(data):
    """Return the table of own skills beside the controls; where none was run, a sentence."""
    if not data["controls"]:
        return "No control was run (`bash bench/control.sh`)."
    rows = []
    for stage, task, mode, decoding, lines in data["controls"]:
        scores = [percent_with_interval(line, 1) if line else "-" for line in lines]
        rows.append([stage, f"{task} {mode}", decoding, *scores])
    return table(["stage", "own skill", "decoding", *data["control_names"]], rows)


def pass_at_md(data):
    """Return the table of pass@k before and after each stage; unmeasured, a sentence."""
    ks, rows = data["pass_at_table"]
    if not rows:
        return "It was not measured before and after a stage (`--pass_at` of evaluate.py)."
    head = ["stage", "task", "mode", "decoding", *(f"pass@{k}" for k in ks)]
    caption = "Before -> after the stage, percent [95% interval of the difference]."
    return f"{caption}\n\n{table(head, rows)}"


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
        if "score" in rollout:
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
        "## The same seconds, spent on something else",
        controls_md(data),
        "## pass@k",
        pass_at_md(data),
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
def write_report(cfg):
    """Write report.html and report.md; print the tables and draw the plots, unless --live."""
    data = gather(cfg)
    write_html(data, os.path.join(cfg.run, "report.html"))
    write_md(data, os.path.join(cfg.run, "report.md"))
    if cfg.live:
        return
    if data["unmeasured"]:
        print(data["unmeasured"])
        plot_all_curves(cfg.run, [folder_name(folder) for folder in stage_folders(cfg.run)])
    else:
        draw_matrix(cfg.run, own_skills())
        print_pass_at(cfg.run)
        plot_pass_at(cfg.run, own_skills())


def goes_on(cfg):
    """True until every stage that has begun is trained. The next stage of a cascade may not have
    begun, so a page of a cascade is written until Ctrl-C."""
    folders = cfg.compare.split(",") if cfg.compare else [cfg.run]
    return not all(is_one_stage(folder) and is_done(folder) for folder in folders)


def main(cfg):
    path = os.path.join(cfg.run, "report.html")
    write = write_report
    if cfg.compare:
        path = os.path.join(cfg.compare.split(",")[0], "compare.html")

        def write(cfg):
            write_html(gather_comparison(cfg), path)

    try:
        while cfg.live and goes_on(cfg):
            write(cfg)
            print(f"{time.strftime('%H:%M:%S')} {path}; Ctrl-C ends this", flush=True)
            time.sleep(cfg.every)
    except KeyboardInterrupt:
        print()
    # The last page does not load itself anew.
    cfg.live = False
    write(cfg)
    print(f"\nreport: {path}" + ("" if cfg.compare else " and report.md"))


if __name__ == "__main__":
    main(parse_config(Config))
