"""Is the run dead? One sentence that names the cause and what to change, from the metrics of
metrics.jsonl.

A run can go on for days without learning anything: no step has a gradient, or every completion is
cut off. None of this is an error of the program, so nothing else would end it. A fault that lasts
SAY_AFTER steps is said, and one that lasts --max_dead_steps ends the run with exit code 3.
"""

import math
import statistics
from types import SimpleNamespace

# Steps in a row after which a fault is said; it is said again when twice as many have passed.
SAY_AFTER = 5
# What a run was like at its beginning is the mean of so many steps.
FIRST_STEPS = 10
# A share of all rollouts that counts as all of them.
ALL = 0.99

# A step without a gradient whose rollouts all have the same status: what that means. The names are
# those of lib.logs.STATUSES.
ONE_STATUS = {
    "ok": "every completion is paid: the prompts are too easy, or the verifier pays everything; "
    "take harder prompts, and read rollouts.rank0.jsonl",
    "wrong": "no completion is paid: the prompts are too hard, or the verifier pays nothing (are "
    "the golds right?); take easier prompts, and read rollouts.rank0.jsonl",
    "no_answer": "no completion holds an answer that the verifier finds: the policy does not know "
    "the format; start from a checkpoint after SFT, or change the prompt",
    "language": "every completion leaves the language of its prompt: start from another "
    "checkpoint, or read language_ok in verifiers/language.py",
    "timeout": "every verification runs into its time limit: the machine is too busy (lower "
    "--reward_workers), or the limit is too short",
    "crash": "every program crashes: the tests or the sandbox do not fit the data; run one by hand",
    "infra": "no verdict arrives: the verifier itself fails",
}


def value(row, name):
    """A metric of a step as a number; nan if it was not logged."""
    found = row.get(name)
    return math.nan if found is None else found


def mean(rows, name):
    """Mean of a metric over the steps that have it; nan if none has."""
    found = [row[name] for row in rows if math.isfinite(value(row, name))]
    return statistics.fmean(found) if found else math.nan


# ---- Faults --------------------------------------------------------------------------------------
# Each takes the step's metrics, the history of the run and its flags, and returns a sentence, or ""
# if the step does not have the fault. Comparisons with nan are false, so what a stage does not log
# cannot be a fault.
def no_gradient(row, past, cfg):
    """No token of the step has a gradient, for whatever reason."""
    if value(row, "grad_norm") != 0:
        return ""
    return f"no gradient: {why_no_gradient(row, past, cfg)}"


def why_no_gradient(row, past, cfg):
    if "reward" not in row:
        return "the loss is 0 or does not depend on the weights (an edited loss?)"
    if value(row, "trunc") >= 0.9:
        return (
            f"{row['trunc']:.0%} of the completions are cut off, so that they are paid nothing or "
            "--overlong_filter leaves them out; raise --max_new_tokens, or start from a checkpoint "
            "that ends its answers"
        )
    if value(row, "unclosed") >= ALL:
        return (
            "no completion closes its thought with </think>; raise --max_new_tokens, or start from "
            "a checkpoint after SFT"
        )
    if row.get("reward/rm_std") == 0:
        return "the reward model scores every answer alike; train another one (--rm)"
    statuses = {name: value(row, f"status/{name}") for name in ONE_STATUS}
    for status, share in statuses.items():
        if share >= ALL and value(row, "flat") == 1:
            return describe_one_status(status, past)
    if value(row, "flat") == 1:
        return (
            "the completions of each prompt all earn the same, though the prompts do not: they are "
            "copies of each other, or the rewards do not look at them; raise --temperature"
        )
    if row.get("num_tokens") == 0:
        return (
            "too few completions of a prompt are in the loss to compare them; raise "
            "--max_new_tokens or --group_size"
        )
    if getattr(cfg, "importance_limit", 0):
        return (
            "rewards differ, and yet every token weighs 0: all importance weights are beyond "
            f"--importance_limit={cfg.importance_limit:g}; raise it, or turn it off with 0"
        )
    return "rewards differ, and yet the loss does not depend on the weights (an edited loss?)"


def describe_one_status(status, past):
    """Say what it means that all rollouts have a status. It matters whether it was so before."""
    varied = bool(past.rewards) and min(past.rewards) < max(past.rewards)
    if status == "ok" and varied:
        return "every prompt is solved; take harder prompts, or end here"
    if status == "wrong" and varied:
        return (
            "no completion is paid any more: the policy has broken down; lower --lr, and go on "
            "from an earlier checkpoint"
        )
    return f"every rollout is {status}: {ONE_STATUS[status]}"


def no_learning_rate(row, past, cfg):
    if value(row, "lr") == 0:
        return "the learning rate is 0: nothing is learned; look at the schedule (--lr, --final_lr)"
    return ""


def into_the_limit(row, past, cfg):
    if value(row, "trunc") >= 0.9:
        return (
            f"{row['trunc']:.0%} of the completions are cut off (at the beginning "
            f"{past.start('trunc'):.0%}); raise --max_new_tokens, or lower --lr if the lengths grew"
        )
    return ""


def length_collapse(row, past, cfg):
    if value(row, "len") < 0.1 * past.start("len"):
        return (
            f"completions have {row['len']:.0f} tokens instead of {past.start('len'):.0f}: the "
            "policy has found that short answers are paid; lower --lr, and read what is paid in "
            "rollouts.rank0.jsonl"
        )
    return ""


def never_closed(row, past, cfg):
    if value(row, "unclosed") >= 0.95:
        return (
            f"{row['unclosed']:.0%} of the thoughts are never closed with </think>; raise "
            "--max_new_tokens, or start from a checkpoint after SFT"
        )
    return ""


def no_entropy(row, past, cfg):
    entropy = value(row, "entropy")
    if entropy < 0.001 or (entropy < 0.02 and entropy < 0.1 * past.start("entropy")):
        return (
            f"the entropy has fallen to {entropy:.4f} nats: all completions of a prompt become the "
            "same; lower --lr, raise --temperature, or go on from an earlier checkpoint"
        )
    return ""


def noise(row, past, cfg):
    entropy = value(row, "entropy")
    if entropy > 3.0 and entropy > 3 * past.start("entropy"):
        return (
            f"the entropy has grown to {entropy:.1f} nats: the policy writes noise; lower "
            "--lr, and go on from an earlier checkpoint"
        )
    return ""


def held_out_falls(row, past, cfg):
    """Three held-out metrics in a row are clearly below the best, while the reward has grown."""
    if len(past.evals) < 4:
        return ""
    best_step, best = max(past.evals, key=lambda step_and_eval: step_and_eval[1])
    latest = past.evals[-3:]
    # Twice the standard error of a share of eval_rows, or a tenth of a score that is no share.
    share = min(max(best, 0.0), 1.0)
    error = math.sqrt(share * (1 - share) / max(getattr(cfg, "eval_rows", 0), 1))
    limit = best - max(0.1 * abs(best), 2 * error)
    if any(step <= best_step or score >= limit for step, score in latest):
        return ""
    then, now = past.reward_before(best_step), past.reward_before(latest[-1][0])
    if now > then + 0.05 * abs(then):
        return (
            f"held-out falls while the reward rises: from {best:.3f} at step {best_step} to "
            f"{latest[-1][1]:.3f}, the reward from {then:.3f} to {now:.3f}; the policy games the "
            f"reward or knows the prompts by heart: go on from step {best_step}, and read "
            "rollouts.rank0.jsonl"
        )
    return ""


def loss_rises(row, past, cfg):
    """SFT: the loss is far above its lowest. An RL loss says nothing about progress."""
    if "reward" in row or math.isnan(past.lowest_loss):
        return ""
    if value(row, "loss") > 2 * past.lowest_loss + 0.5:
        return (
            f"the loss has risen from {past.lowest_loss:.3f} to {row['loss']:.3f}: training "
            "diverges; lower --lr, and go on from an earlier checkpoint"
        )
    return ""


# In this order: a step may have several faults, and the first names the cause.
FAULTS = (
    no_gradient,
    no_learning_rate,
    into_the_limit,
    length_collapse,
    never_closed,
    no_entropy,
    noise,
    held_out_falls,
    loss_rises,
)


# ---- A run ---------------------------------------------------------------------------------------
class History:
    """What the faults have to know of the steps before."""

    def __init__(self):
        self.first_rows = []
        self.rewards = []  # of every step, with their steps
        self.reward_steps = []
        self.evals = []  # (step, held-out metric)
        self.lowest_loss = math.nan
        self.latest_losses = []

    def add(self, row):
        if len(self.first_rows) < FIRST_STEPS:
            self.first_rows.append(row)
        if math.isfinite(value(row, "reward")):
            self.rewards.append(row["reward"])
            self.reward_steps.append(row["step"])
        if math.isfinite(value(row, "eval")):
            self.evals.append((row["step"], row["eval"]))
        # The lowest mean of FIRST_STEPS losses, as single losses are noise.
        if math.isfinite(value(row, "loss")):
            self.latest_losses = [*self.latest_losses, row["loss"]][-FIRST_STEPS:]
            smooth = statistics.fmean(self.latest_losses)
            full = len(self.latest_losses) == FIRST_STEPS
            if full and not smooth >= self.lowest_loss:
                self.lowest_loss = smooth

    def start(self, name):
        """Mean of a metric over the first steps; nan before there are so many."""
        if len(self.first_rows) < FIRST_STEPS:
            return math.nan
        return mean(self.first_rows, name)

    def reward_before(self, step):
        """Mean reward of the FIRST_STEPS steps that end with this one."""
        rewards = [r for s, r in zip(self.reward_steps, self.rewards, strict=True) if s <= step]
        return statistics.fmean(rewards[-FIRST_STEPS:]) if rewards else math.nan


class Health:
    """Follows a run step by step.

    rows: the steps before, when a run is resumed. They say what the run was like, but their faults
    do not count any more, since flags may have changed.
    """

    def __init__(self, cfg, rows=()):
        self.cfg = cfg
        self.past = History()
        self.lasted = dict.fromkeys(FAULTS, 0)
        for row in rows:
            self.past.add(row)

    def check(self, row):
        """(sentence, steps in a row) of this step's fault; ("", 0) if it has none."""
        self.past.add(row)
        found = "", 0
        for fault in FAULTS:
            sentence = fault(row, self.past, self.cfg)
            self.lasted[fault] = self.lasted[fault] + 1 if sentence else 0
            if sentence and not found[1]:
                found = sentence, self.lasted[fault]
        return found


def is_said(steps):
    """True for 5, 10, 20, 40, ... steps in a row."""
    doublings = steps / SAY_AFTER
    return doublings >= 1 and math.log2(doublings).is_integer()


def findings(rows, config):
    """[(first step, last step, sentence)] of the faults that were said in a run.

    config: {flag: value} of the run. A fault that lasted is listed once, with its last sentence.
    """
    health = Health(SimpleNamespace(**config))
    found = []
    for row in rows:
        sentence, steps = health.check(row)
        if steps == SAY_AFTER:
            found.append([row["step"] - steps + 1, row["step"], sentence])
        elif steps > SAY_AFTER and found:
            found[-1][1:] = row["step"], sentence
    return [tuple(finding) for finding in found]
