"""What a run prints and writes: one console line and one line of metrics.jsonl a step."""

import json
import os
import resource

import torch

from lib.common import all_reduce, print0, ranks
from lib.guard import one_sentence


# ---- Log -----------------------------------------------------------------------------------------
def console_line(step, num_steps, m):
    """step 120/500 | reward 0.431 | len 2831 | ...: one line for a step of RL, in a fixed order."""
    rate = m["num_tokens"] / max(m["time/gen"] + m["time/train"], 1e-9)
    line = (
        f"step {step}/{num_steps} | reward {m['reward']:.3f} | len {m['len']:.0f} | trunc {m['trunc']:.0%} | flat {m['flat']:.0%} | "
        f"ent {m['entropy']:.2f} | gap {m['gap']:.1e} | grad {m['grad_norm']:.2f} | lr {m['lr']:.1e} | gen {m['time/gen']:.1f}s "
        f"train {m['time/train']:.1f}s | {rate / 1000:.1f}k tok/s | {peak_memory() / 2**30:.1f} GB"
    )
    return line + (f" | eval {m['eval']:.3f}" if "eval" in m else "")


# of a rollout's reward, in every stage; no_answer: also an edit that does not apply
STATUSES = ("ok", "wrong", "no_answer", "language", "timeout", "crash", "infra")


def summarize(rollouts, shares):
    """Means over the rollouts of all ranks: numerators and denominators are reduced apart."""
    n, groups = len(rollouts), {}
    for r in rollouts:
        groups.setdefault(r.group, set()).add(r.reward)
    sums = {
        "n": n,
        "groups": len(groups),
        "flat": sum(len(rewards) == 1 for rewards in groups.values()),
    }
    sums["reward"] = sum(r.reward for r in rollouts if r.status != "infra")
    sums["len"] = sum(len(r.completion_ids) for r in rollouts)
    sums["trunc"] = sum(r.finish_reason == "length" for r in rollouts)
    sums["unclosed"] = sum(r.row["think"] and "</think>" not in r.text for r in rollouts)
    sums["verifiers_s"] = sum(r.verify_s for r in rollouts)
    sums |= {f"status/{s}": sum(r.status == s for r in rollouts) for s in STATUSES}
    sums |= {f"reward/{name}": share * n for name, share in shares.items()}
    sums = all_reduce(sums)
    n, groups, verifiers_s = sums.pop("n"), sums.pop("groups"), sums.pop("verifiers_s")
    means = {
        k: v / (groups if k == "flat" else max(n - sums["status/infra"], 1) if k == "reward" else n)
        for k, v in sums.items()
    }
    # of all workers; most of it while others still decode
    return means | {"time/verifiers": verifiers_s}


def show_sample(rollout):
    """Print a rollout of this step: the end of its prompt, its text, its reward."""
    print0(f"  prompt: {rollout.row['messages'][-1]['content']!r}")
    print0(f"  sample: {rollout.text!r}")
    print0(f"  reward: {rollout.reward:g} ({rollout.status}, {rollout.finish_reason})")


def peak_memory():
    """Bytes: the most this process has held, on its GPU if there is one."""
    return (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


class Logger:
    """One console line and one metrics.jsonl line a step. After a resume the file is cut back to the step resumed from."""

    def __init__(self, out_dir, step):
        self.path = os.path.join(out_dir, "metrics.jsonl")
        if ranks()[0] == 0:
            old = (
                [line for line in open(self.path) if line.endswith("\n")]
                if os.path.exists(self.path)
                else []
            )
            with one_sentence(f"{self.path} is not the log of a run"):
                kept = [line for line in old if json.loads(line)["step"] <= step]
            with open(self.path + ".tmp", "w") as f:
                f.writelines(kept)
            os.replace(self.path + ".tmp", self.path)

    def log(self, step, metrics, line=""):
        """Host memory is what this process holds now, its verifiers not counted."""
        if os.path.exists("/proc/self/statm"):
            metrics["memory/rss_gb"] = (
                int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**30
            )
        if ranks()[0] == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        line and print0(line)
