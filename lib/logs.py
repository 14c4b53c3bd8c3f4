"""What a run prints and writes: at every step one console line, one line of metrics.jsonl and its
rollouts.
"""

import collections
import dataclasses
import glob
import json
import math
import os
import re
import resource
import sys
import time

import torch

from lib.common import all_reduce, closers, print0, ranks, whole_groups
from lib.guard import fail, one_sentence
from lib.health import Health, is_said
from lib.progress import span
from lib.trackers import Tracker, tracker_names

# The status of a rollout's reward, in every stage. An edit that does not apply is a "no_answer".
STATUSES = ("ok", "wrong", "no_answer", "language", "timeout", "crash", "infra")


# ---- Metrics of a step ---------------------------------------------------------------------------
def summarize(rollouts, shares):
    """Mean metrics over the rollouts of all ranks: {name: number}.

    shares: {name: mean over this rank's rollouts}, a stage's own metrics; they come back as
    "reward/name". Numerators and denominators are summed over the ranks separately, since ranks
    have different numbers of rollouts.
    """
    rewards_of_group = {}
    for r in whole_groups(rollouts):
        rewards_of_group.setdefault(r.group, set()).add(r.reward)

    sums = {
        "n": len(rollouts),
        "reward": sum(r.reward for r in rollouts if r.status != "infra"),
        "len": sum(len(r.completion_ids) for r in rollouts),
        "trunc": sum(r.finish_reason == "length" for r in rollouts),
        # A thinking rollout that never closed its reasoning.
        "unclosed": sum(r.row["think"] and "</think>" not in r.text for r in rollouts),
        "verifiers_s": sum(r.verify_s for r in rollouts),
    }
    for status in STATUSES:
        sums[f"status/{status}"] = sum(r.status == status for r in rollouts)
    for name, share in shares.items():
        sums[f"reward/{name}"] = share * len(rollouts)
    sums = all_reduce(sums)

    num_rollouts, verifiers_s = sums.pop("n"), sums.pop("verifiers_s")
    num_scored = max(num_rollouts - sums["status/infra"], 1)
    # A group whose rewards are all equal has no advantages, and teaches nothing.
    num_flat = sum(len(rewards) == 1 for rewards in rewards_of_group.values())
    means = {"flat": num_flat / len(rewards_of_group)}
    for name, total in sums.items():
        means[name] = total / (num_scored if name == "reward" else num_rollouts)
    # Seconds that all verifiers worked, a sum. Most of it passes while other rollouts still decode.
    means["time/verifiers"] = verifiers_s
    return means


def console_line(step, num_steps, m):
    """Return the line of one RL step, in a fixed order: step 120/500 | reward 0.431 | ...

    m: the metrics of the step.
    """
    seconds = max(m["time/gen"] + m["time/train"], 1e-9)
    scored = not nothing_scored(m)
    fields = [
        f"step {step}/{num_steps}",
        f"reward {m['reward']:.3f}",
        f"len {m['len']:.0f}",
        f"trunc {m['trunc']:.0%}",
        f"flat {m['flat']:.0%}",
        f"ent {m['entropy']:.2f}" if scored else "ent -",
        f"gap {m['gap']:.1e}" if scored else "gap -",
        f"grad {m['grad_norm']:.2f}",
        f"lr {m['lr']:.1e}",
        f"gen {m['time/gen']:.1f}s train {m['time/train']:.1f}s",
        f"{m['num_tokens'] / seconds / 1000:.1f}k tok/s",
        f"{peak_memory() / 2**30:.1f} GB",
    ]
    if m.get("kl"):
        fields.append(f"kl {m['kl']:.1e}")
    if "eval" in m:
        fields.append(f"eval {m['eval']:.3f}")
    return " | ".join(fields)


def nothing_scored(m):
    """True if no token of a step had a gradient: then entropy and gap, means over such tokens, say
    nothing, and their 0 is no collapse."""
    return m.get("entropy") == 0 and m["grad_norm"] == 0


def without_middle(text, most):
    """Return a text, or the beginning and the end of a long one: `most` characters together."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"


def show_sample(rollout):
    """Print a rollout of this step: its prompt, its text, its reward. Together they fit a screen:
    a completion of 24K tokens would be a line of 100 KB."""
    print0(f"  prompt: {without_middle(rollout.row['messages'][-1]['content'], 400)!r}")
    print0(f"  sample: {without_middle(rollout.text, 1000)!r}")
    print0(f"  reward: {rollout.reward:g} ({rollout.status}, {rollout.finish_reason})")


def peak_memory():
    """Return the most bytes that this process has held: on its GPU, or without one on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024


# ---- Log -----------------------------------------------------------------------------------------
class Logger:
    """Prints the console line of every step on rank 0 and writes what the run leaves in out_dir:

    metrics.jsonl         the numbers of every step
    rollouts.rank0.jsonl  what was sampled (--keep_rollouts), one file a rank
    run.json              flags and command of the run that writes there now

    step: the step that the run resumes from. What was written of later steps is removed.
    """

    def __init__(self, cfg, step):
        self.cfg = cfg
        self.rank, world = ranks()
        self.path = os.path.join(cfg.out_dir, "metrics.jsonl")
        # SFT samples nothing, and has no such flag.
        gigabytes = cfg.keep_rollouts if hasattr(cfg, "keep_rollouts") else 0.0
        self.rollouts = RolloutFile(cfg.out_dir, self.rank, gigabytes / world)
        if self.rank == 0:
            cut_back_rollouts(cfg.out_dir, step)
            history = self.cut_back(step)
            self.health = Health(cfg, history)
            self.describe_run(world)
            self.trackers = self.open_trackers(history)
        # When the latest steps ended, for the time that is left.
        self.began = time.monotonic()
        self.step_ends = collections.deque([(step, self.began)], maxlen=20)

    def cut_back(self, step):
        """Keep the lines up to `step`, and return their rows. A line without its end, from a killed
        run, goes too."""
        lines = []
        if os.path.exists(self.path):
            with open(self.path) as f:
                lines = [line for line in f if line.endswith("\n")]
        with one_sentence(f"{self.path} is not the log of a run"):
            rows = [json.loads(line) for line in lines]
            kept = [line for line, row in zip(lines, rows, strict=True) if row["step"] <= step]
        # Write a new file and rename it, so that a kill at any instant leaves a whole log.
        with open(self.path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(self.path + ".tmp", self.path)
        return rows[: len(kept)]

    def describe_run(self, world):
        """Write run.json, so that a run can be read before its first checkpoint."""
        run = {
            "config": dataclasses.asdict(self.cfg),
            "command": sys.argv,
            "torch": torch.__version__,
            "world": world,
        }
        path = os.path.join(self.cfg.out_dir, "run.json")
        with open(path + ".tmp", "w") as f:
            json.dump(run, f)
        os.replace(path + ".tmp", path)

    def open_trackers(self, history):
        """One Tracker for each name of --report_to. They are closed when the script ends."""
        config = dataclasses.asdict(self.cfg)
        names = tracker_names(self.cfg.report_to)
        trackers = [Tracker(name, self.cfg.out_dir, config, history) for name in names]
        closers.extend(tracker.close for tracker in trackers)
        return trackers

    def log(self, step, metrics, line="", rollouts=()):
        """Write the metrics of a step and this rank's rollouts; print `line` if there is one.

        Adds to the metrics "memory/rss_gb", the host memory that this process holds now, without
        its verifier processes; "memory/peak_gb", peak_memory; "time/unix", seconds since 1970.
        """
        if os.path.exists("/proc/self/statm"):
            with open("/proc/self/statm") as f:
                resident_pages = int(f.read().split()[1])
            metrics["memory/rss_gb"] = resident_pages * resource.getpagesize() / 2**30
        metrics["memory/peak_gb"] = peak_memory() / 2**30
        metrics["time/unix"] = round(time.time(), 3)
        if not getattr(self.cfg, "kl_coef", 0):
            metrics.pop("kl", None)  # no reference policy
        if nothing_scored(metrics):
            metrics |= {"entropy": None, "gap": None}

        self.rollouts.write(step, rollouts)
        if self.rank == 0:
            with open(self.path, "a") as f:
                f.write(as_json({"step": step, **metrics}) + "\n")
            for tracker in self.trackers:
                tracker.log({"step": step, **metrics})
        if line:
            print0(f"{line} | {self.time_left(step)}")
        if self.rank == 0:
            self.check_health({"step": step, **metrics})

    def check_health(self, row):
        """Say what is wrong with a run that learns nothing, and end it if that lasts."""
        sentence, steps = self.health.check(row)
        if 0 < self.cfg.max_dead_steps <= steps:
            for tracker in self.trackers:
                tracker.close()
            fail(
                f"step {row['step']}, for {steps} steps in a row (--max_dead_steps): {sentence}.",
                note="The last checkpoint is whole.",
                code=3,
            )
        if is_said(steps):
            print0(f"warning: step {row['step']}, for {steps} steps in a row: {sentence}.")

    def time_left(self, step):
        """Elapsed time since this process began, and what the latest 20 steps say is left."""
        now = time.monotonic()
        first_step, first_end = self.step_ends[0]
        self.step_ends.append((step, now))
        seconds_per_step = (now - first_end) / max(step - first_step, 1)
        left = seconds_per_step * (self.cfg.num_steps - step)
        return f"{span(now - self.began)} gone, {span(left)} left"


def as_json(row):
    """A row as a line of JSON, which knows no NaN and no infinity: they become null."""
    finite = {}
    for name, value in row.items():
        broken = isinstance(value, float) and not math.isfinite(value)
        finite[name] = None if broken else value
    return json.dumps(finite, allow_nan=False)


class RolloutFile:
    """The rollouts that a rank sampled, one a line, in the order of the steps.

    {"step", "prompt" (its row), "sample", "reward", "status", "advantage", "tokens",
    "finish_reason", "text"}; the first line of a prompt has "question" besides, its last turn.

    gigabytes: the limit of this rank, 0 keeps none. A file that has grown to half of it becomes the
    older half, and the older half before it goes: the newest rollouts stay.
    """

    def __init__(self, out_dir, rank, gigabytes):
        self.path = os.path.join(out_dir, f"rollouts.rank{rank}.jsonl")
        self.older = os.path.join(out_dir, f"rollouts.rank{rank}.older.jsonl")
        self.most_bytes = gigabytes * 1e9 / 2

    def write(self, step, rollouts):
        if not self.most_bytes or not rollouts:
            return
        with open(self.path, "a") as f:
            group = None
            # Prompt by prompt: a rank samples in another order, and not every sample of a prompt.
            for r in sorted(rollouts, key=lambda r: (r.group, r.sample)):
                f.write(as_json(as_line(step, r, with_question=r.group != group)) + "\n")
                group = r.group
            size = f.tell()
        if size > self.most_bytes:
            os.replace(self.path, self.older)


def cut_back_rollouts(out_dir, step):
    """Remove the rollouts of later steps, and lines without their end, from the files of all ranks:
    the run before may have had more of them."""
    for path in glob.glob(os.path.join(glob.escape(out_dir), "rollouts.rank*.jsonl")):
        # Steps only grow, so what goes is the end of a file.
        with open(path, "rb+") as f:
            f.truncate(end_of_step(f, step))


def as_line(step, r, with_question):
    """What is kept of a rollout."""
    line = {
        "step": step,
        "prompt": r.row["index"],
        "sample": r.sample,
        "reward": r.reward,
        "status": r.status,
        "advantage": r.advantage,
        "tokens": len(r.completion_ids),
        "finish_reason": r.finish_reason,
        "text": r.text,
    }
    if with_question:
        line["question"] = r.row["messages"][-1]["content"]
    return line


def end_of_step(f, step):
    """Byte behind the last whole line of a file of rollouts that is not of a later step."""
    end = 0
    for line in f:
        found = re.match(rb'{"step": (\d+),', line)
        if not found or int(found[1]) > step or not line.endswith(b"\n"):
            break
        end += len(line)
    return end
