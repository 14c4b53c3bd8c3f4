"""What a run prints and writes: at every step one console line and one line of metrics.jsonl."""

import json
import os
import resource

import torch

from lib.common import all_reduce, print0, ranks
from lib.guard import one_sentence

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
    for r in rollouts:
        rewards_of_group.setdefault(r.group, set()).add(r.reward)

    sums = {
        "n": len(rollouts),
        "groups": len(rewards_of_group),
        # A group whose rewards are all equal has no advantages, and teaches nothing.
        "flat": sum(len(rewards) == 1 for rewards in rewards_of_group.values()),
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

    num_rollouts, num_groups = sums.pop("n"), sums.pop("groups")
    verifiers_s = sums.pop("verifiers_s")
    num_scored = max(num_rollouts - sums["status/infra"], 1)
    denominators = {"flat": num_groups, "reward": num_scored}
    means = {}
    for name, total in sums.items():
        means[name] = total / denominators.get(name, num_rollouts)
    # Seconds that all verifiers worked, a sum. Most of it passes while other rollouts still decode.
    means["time/verifiers"] = verifiers_s
    return means


def console_line(step, num_steps, m):
    """Return the line of one RL step, in a fixed order: step 120/500 | reward 0.431 | ...

    m: the metrics of the step.
    """
    seconds = max(m["time/gen"] + m["time/train"], 1e-9)
    fields = [
        f"step {step}/{num_steps}",
        f"reward {m['reward']:.3f}",
        f"len {m['len']:.0f}",
        f"trunc {m['trunc']:.0%}",
        f"flat {m['flat']:.0%}",
        f"ent {m['entropy']:.2f}",
        f"gap {m['gap']:.1e}",
        f"grad {m['grad_norm']:.2f}",
        f"lr {m['lr']:.1e}",
        f"gen {m['time/gen']:.1f}s train {m['time/train']:.1f}s",
        f"{m['num_tokens'] / seconds / 1000:.1f}k tok/s",
        f"{peak_memory() / 2**30:.1f} GB",
    ]
    if "eval" in m:
        fields.append(f"eval {m['eval']:.3f}")
    return " | ".join(fields)


def show_sample(rollout):
    """Print a rollout of this step: the end of its prompt, its text, its reward."""
    print0(f"  prompt: {rollout.row['messages'][-1]['content']!r}")
    print0(f"  sample: {rollout.text!r}")
    print0(f"  reward: {rollout.reward:g} ({rollout.status}, {rollout.finish_reason})")


def peak_memory():
    """Return the most bytes that this process has held: on its GPU, or without one on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024


# ---- Log -----------------------------------------------------------------------------------------
class Logger:
    """Prints the console line and writes the metrics.jsonl line of every step, on rank 0.

    step: the step that the run resumes from. Lines of later steps are removed from the file.
    """

    def __init__(self, out_dir, step):
        self.path = os.path.join(out_dir, "metrics.jsonl")
        if ranks()[0] == 0:
            self.cut_back(step)

    def cut_back(self, step):
        """Keep the lines up to `step`. A line without its end, from a killed run, goes too."""
        lines = []
        if os.path.exists(self.path):
            with open(self.path) as f:
                lines = [line for line in f if line.endswith("\n")]
        with one_sentence(f"{self.path} is not the log of a run"):
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        # Write a new file and rename it, so that a kill at any instant leaves a whole log.
        with open(self.path + ".tmp", "w") as f:
            f.writelines(kept)
        os.replace(self.path + ".tmp", self.path)

    def log(self, step, metrics, line=""):
        """Write the metrics of a step, and print `line` if there is one.

        Adds "memory/rss_gb" to the metrics: the host memory that this process holds now, without
        its verifier processes.
        """
        if os.path.exists("/proc/self/statm"):
            with open("/proc/self/statm") as f:
                resident_pages = int(f.read().split()[1])
            metrics["memory/rss_gb"] = resident_pages * resource.getpagesize() / 2**30
        if ranks()[0] == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        if line:
            print0(line)
