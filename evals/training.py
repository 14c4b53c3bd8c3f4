"""What the training of a stage left in its folder: curves, rollouts, flags, faults.

A stage can be read while it trains: metrics.jsonl, rollouts.rank0.jsonl and run.json are there from
its first step on.
"""

import glob
import json
import os
import shlex
import time

import numpy as np

from evals.results import in_stage_order
from lib.health import findings
from lib.logs import STATUSES, without_middle
from lib.progress import span

# Key of metrics.jsonl -> title of its curve, which is the name of its axis, too.
CURVES = {
    "reward": "reward",
    "len": "completion tokens",
    "trunc": "share cut off",
    "entropy": "entropy, nats a token",
    "flat": "groups of equal rewards",
    "kl": "KL to the reference, nats a token",
    "gap": "sampler - trainer gap, nats a token",
    "grad_norm": "gradient norm",
    "loss": "loss",
    "lr": "learning rate",
    "tokens/s": "trained tokens a second",
    "memory/peak_gb": "peak memory, GB",
}
STATUS_CURVES = "statuses, share of rollouts"


# ---- 1. Files ------------------------------------------------------------------------------------
def read_jsonl(path):
    """Read the whole lines of a JSONL file; [] if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path) as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def is_one_stage(folder):
    """True for the folder of one stage, which holds metrics.jsonl, step_*/ and final itself."""
    return os.path.isfile(os.path.join(folder, "metrics.jsonl"))


def is_done(folder):
    """True for a stage that was trained to its end."""
    return os.path.exists(os.path.join(folder, "final", "run.json"))


def folder_name(folder):
    return os.path.basename(os.path.abspath(folder))


def stage_folders(run, stages=()):
    """Return the folders of the stages that train or were trained in a run.

    stages: the evaluated ones in their order. Another one stands where a cascade has it, or last.
    """
    if is_one_stage(run):
        return [run]
    found = []
    if os.path.isdir(run):
        names = sorted(os.listdir(run))
        found = [name for name in names if is_one_stage(os.path.join(run, name))]
    names = in_stage_order(dict.fromkeys([*stages, *found]))
    return [os.path.join(run, name) for name in names if name in found]


def read_saved_run(folder):
    """Read run.json of a stage's final checkpoint, else of its newest one, else that of the run
    that has just begun; {} if it has none."""
    newest_first = sorted(glob.glob(os.path.join(glob.escape(folder), "step_*")), reverse=True)
    for place in (os.path.join(folder, "final"), *newest_first, folder):
        path = os.path.join(place, "run.json")
        if os.path.exists(path):
            with open(path) as f:
                return json.load(f)
    return {}


# ---- 2. Curves -----------------------------------------------------------------------------------
def thin(points, most):
    """Keep at most about `most` points, evenly spaced, and the last one."""
    if len(points) <= most:
        return points
    stride = -(-len(points) // most)  # rounded up
    return points[::stride] + points[-1:]


def points_of(rows, key, most):
    """[(step, value)] of the steps that logged a finite value."""
    points = []
    for row in rows:
        value = row.get(key)
        if value is not None and np.isfinite(value):
            points.append((row["step"], value))
    return thin(points, most)


def read_curves(rows, most):
    """Return {title: [(step, value)]} of what a stage logged, at most about `most` points each."""
    for row in rows:
        seconds = row.get("time/gen", 0.0) + row.get("time/train", 0.0)
        if seconds > 0 and row.get("num_tokens"):
            row["tokens/s"] = row["num_tokens"] / seconds
    curves = {}
    for key, title in CURVES.items():
        if key == "reward" and "reward/rm_score" in rows[0]:
            # RLHF shapes its rewards: the raw score of the reward model is what compares.
            key = "reward/rm_score"
        points = points_of(rows, key, most)
        if points:
            curves[title] = points
    held_out = points_of(rows, "eval", most)
    if held_out:
        curves["held-out"] = held_out
    return curves


def read_statuses(rows, most):
    """{status: [(step, share)]} of the statuses that some rollout had."""
    statuses = {name: points_of(rows, f"status/{name}", most) for name in STATUSES}
    return {name: points for name, points in statuses.items() if any(y for _, y in points)}


def read_stage(folder, cfg):
    """Read the time, tokens, curves, faults and command of a stage; None if it logged no step."""
    rows = read_jsonl(os.path.join(folder, "metrics.jsonl"))
    if not rows:
        return None
    last_step = max(row["step"] for row in rows)
    # SFT logs only some of its steps. The others are taken to cost as much as these.
    logged_share = len(rows) / last_step

    def total(key):
        return sum(row.get(key, 0.0) for row in rows) / logged_share

    # Without a command the page lists no command for this stage.
    saved = {"command": [], "git": "", "torch": "", "world": 0, "config": {}}
    saved |= read_saved_run(folder)
    return {
        "name": folder_name(folder),
        "steps": last_step,
        "progress": "" if is_done(folder) else describe_progress(rows, saved["config"]),
        "gen": total("time/gen"),
        "train": total("time/train"),
        "tokens": total("num_tokens"),
        "curves": read_curves(rows, cfg.points),
        "statuses": read_statuses(rows, cfg.points),
        "faults": [
            f"Steps {first} to {last}: {sentence}."
            for first, last, sentence in findings(rows, saved["config"])
        ],
        "command": shlex.join(saved["command"]),
        "git": saved["git"],
        "torch": saved["torch"],
        "world": saved["world"],
        "config": saved["config"],
    }


def describe_progress(rows, config):
    """ "step 120 of 500, about 3.2 h left, last step at 12:03 UTC" of a stage that is not done."""
    last = rows[-1]
    text = f"step {last['step']}"
    num_steps = config.get("num_steps")
    if num_steps:
        text += f" of {num_steps}"
    if "time/unix" not in last:
        return text
    recent = [row for row in rows[-20:] if "time/unix" in row]
    steps = last["step"] - recent[0]["step"]
    if num_steps and steps:
        seconds_per_step = (last["time/unix"] - recent[0]["time/unix"]) / steps
        text += f", about {span(seconds_per_step * (num_steps - last['step']))} left"
    return text + time.strftime(", last step at %H:%M UTC", time.gmtime(last["time/unix"]))


# ---- 3. Rollouts ---------------------------------------------------------------------------------
def groups_from(path, offset):
    """Yield the rollouts of a prompt after another, from the first prompt behind a byte on."""
    with open(path, "rb") as f:
        f.seek(offset)
        if offset:
            f.readline()  # the rest of a line
        group = []
        for line in f:
            if not line.endswith(b"\n"):
                break  # still being written
            rollout = json.loads(line)
            if "question" in rollout and group:
                yield group
                group = []
            if "question" in rollout or group:
                group.append(rollout)
        if group:
            yield group


def evenly_spaced_groups(path, count):
    """At most `count` groups from all over a file, which may have gigabytes, with the last one."""
    size = os.path.getsize(path)
    groups = []
    for i in range(count - 1):
        groups.append(next(groups_from(path, size * i // (count - 1)), None))
    # The last group: look for one ever further from the end.
    for distance in (1 << 16, 1 << 20, 1 << 24, size):
        *_, last = [None, *groups_from(path, max(size - distance, 0))]
        if last:
            groups.append(last)
            break
    found = {(group[0]["step"], group[0]["prompt"]): group for group in groups if group}
    return [found[place] for place in sorted(found)]


def read_training_rollouts(folder, cfg):
    """Rollouts of rank 0 from all over the training, in the form of report.read_rollouts."""
    name = folder_name(folder)
    paths = [os.path.join(folder, f"rollouts.rank0{kind}.jsonl") for kind in (".older", "")]
    paths = [path for path in paths if os.path.exists(path)]
    groups = []
    for path in paths:
        groups += evenly_spaced_groups(path, cfg.training_prompts // len(paths))
    shown = []
    for group in groups:
        question = without_middle(group[0]["question"], cfg.characters)
        for rollout in group[: cfg.training_samples]:
            on_the_page = {
                "stage": name,
                "set": "training",
                "problem": rollout["prompt"],
                "prompt": question,
                "text": without_middle(rollout["text"], cfg.characters),
            }
            shown.append(rollout | on_the_page)
    return shown


# ---- 4. Two runs side by side --------------------------------------------------------------------
def pair_stages(runs):
    """[(name, stage of A or None, stage of B or None)]: stages of one name, or the two single ones.

    runs: the stages of A and those of B, as read_stage returns them.
    """
    if all(len(stages) == 1 for stages in runs):
        (a,), (b,) = runs
        name = a["name"] if a["name"] == b["name"] else f"{a['name']} / {b['name']}"
        return [(name, a, b)]
    by_name = [{stage["name"]: stage for stage in stages} for stages in runs]
    names = in_stage_order(dict.fromkeys([*by_name[0], *by_name[1]]))
    return [(name, by_name[0].get(name), by_name[1].get(name)) for name in names]


def differing_flags(a, b):
    """[(flag, value of A, value of B)] of two stages; "-" where one has no such flag."""
    rows = []
    for name in dict.fromkeys([*a["config"], *b["config"]]):
        rows.append((name, a["config"].get(name, "-"), b["config"].get(name, "-")))
    for name in ("git", "torch", "world"):
        rows.append((f"({name})", a[name], b[name]))
    return [(name, str(x), str(y)) for name, x, y in rows if x != y]
