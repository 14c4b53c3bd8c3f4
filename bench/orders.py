"""The cascade against its alternatives on the toy: does the order of the stages matter?

    python bench/orders.py          # hours; the same command goes on where it was killed

Every arm starts from the same SFT checkpoint and has the same verifiers, RL steps, prompts and
samples of every domain, and so about the same tokens, which are counted:

    paper      the cascade: RLHF, IF-RL, Math RL, Code RL, SWE RL
    backward   the same stages, the last one first
    rlhf_last  the cascade with RLHF at its end instead of its start
    joint      one stage with all domains in every batch (extras/jointrl.py)
    joint_2x   the same at twice the learning rate
    mopd       a specialist of each domain from the SFT checkpoint, then their distillation into it
               (extras/mopd.py), whose own tokens come on top
    mean       the same specialists, their weights averaged
    repair     the cascade, then MOPD from its own checkpoints: tokens on top, too
    clock      no training to keep: short slices of every stage, of joint RL and of MOPD, in turns,
               so that a busy moment of the machine slows all of them down

Commands and flags are those that run_cascade.sh and bench/mopd.sh print with DRY_RUN=1; only where
a stage starts and what it is called differ. One learning rate has to serve all domains in `joint`:
the mean of the stages' own, weighted by their steps. The stages' rates were tuned for the cascade
and this one for nothing, hence the second try. RLHF trains its reward model from the SFT
checkpoint, in the arm paper; the others take this one, so that all have the same reward.

Each arm runs on every seed, in the toy's world with its tensions and in the one without
(toy.py --tensions=false). The scores are held-out, of each arm's end, of the SFT checkpoint and of
the specialists. An interval is 95% of a bootstrap of two levels: seeds are drawn with replacement,
and in each of them problems. Over three seeds it is about their range, which holds the truth in
three of four cases, not in 19 of 20, where seeds differ more than problems do; so a verdict asks
besides that all seeds agree in sign. Differences are taken problem by problem, since all arms of a
seed answer the same ones. Seconds are wall seconds of sampling, verifying and updating, times the
ranks; slices start from the SFT checkpoint, whatever the stage would start from. Joint RL draws
twice its prompts of IF-RL at once for dynamic sampling, IF-RL itself 1.7 times where a quarter of
its groups are flat: a twentieth of all its samples. The results go to bench/toy/orders.json and
orders.png; runs and logs are under --out. Ctrl-C or SIGTERM stop it with what it has started; after
a SIGKILL the stage under way runs on by itself.
"""

import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# In front of bench/, which has files called sft.py and kernels.py as well.
sys.path.insert(0, str(ROOT))

from evals.results import DECODINGS, kept_lines, problem_scores  # noqa: E402
from lib.flags import PositiveInt, boolean, parse_config  # noqa: E402
from lib.guard import fail  # noqa: E402

STAGES = ("rlhf", "ifrl", "mathrl", "coderl", "swerl")
ORDERS = {
    "paper": STAGES,
    "backward": STAGES[::-1],
    "rlhf_last": ("ifrl", "mathrl", "coderl", "swerl", "rlhf"),
}
ARMS = ("paper", "backward", "rlhf_last", "mopd", "mean", "repair", "joint", "joint_2x", "clock")
# Where the scores of an arm are: a folder of its world, and the label in its results.jsonl.
ENDS = {
    "sft": ("paper", "sft"),
    "paper": ("paper", "swerl"),
    "backward": ("backward", "rlhf"),
    "rlhf_last": ("rlhf_last", "rlhf"),
    "joint": ("joint", "joint"),
    "joint_2x": ("joint_2x", "joint"),
    "mopd": ("specialists", "mopd"),
    "mean": ("specialists", "mean"),
    "repair": ("repair", "mopd"),
}
SAMPLED = ("sampled", "trained")  # tokens
COSTLY = tuple(arm for arm in ENDS if arm != "sft")  # arms that train something to keep
# The specialist of chat is the first stage of the paper's order, which starts from SFT as well.
SPECIALISTS = {stage: ("specialists", stage) for stage in STAGES} | {"rlhf": ("paper", "rlhf")}
COLUMNS = (
    ("chat", "think"),
    ("chat", "no_think"),
    ("if", "no_think"),
    ("if", "think"),
    ("if_hard", "no_think"),
    ("math", "think"),
    ("math_hard", "think"),
    ("code", "think"),
    ("code_hard", "think"),
    ("swe", "think"),
    ("swe_hard", "think"),
)
TEACHES = {"rlhf": "chat", "ifrl": "if", "mathrl": "math", "coderl": "code", "swerl": "swe"}
REASONING = [column for column in COLUMNS if column[0].startswith(("math", "code"))]
# Seconds of a piece, two at a time on two cores, for the estimate before the start.
TYPICAL = {
    "data": 10,
    "sft1": 18,
    "sft2": 88,
    "rlhf": 24,
    "ifrl": 35,
    "mathrl": 12,
    "coderl": 48,
    "swerl": 50,
    "joint": 200,
    "mopd": 40,
    "mean": 1,
    "score": 22,
    "clock": 12,
}
# The slices of the arm clock: rounds, and steps of a slice; the first one is not counted.
CLOCK_ROUNDS = 3
CLOCK_STEPS = dict.fromkeys(STAGES, 9) | {"joint": 25, "mopd": 5}
# What a dry run of run_cascade.sh calls its run folder here.
PLACE = "RUN_FOLDER"


@dataclass
class Config:
    seeds: str = "0,1,2"  # comma-separated; 100 to 102 are those that the world was designed on
    tensions: str = "true,false"  # worlds: true, false or both
    arms: str = ",".join(ARMS)  # comma-separated names of arms to run; "": only the table
    jobs: PositiveInt = 2  # worlds that run side by side, each in one process
    # take finished runs of run_cascade.sh (out/toy, out/toy-seed1, ...) as the arm paper of the
    # worlds with tensions, where that arm has not begun
    reuse: bool = False
    out: str = "out/orders"  # folder of all runs
    report: str = "bench/toy/orders"  # path of the results without ending; "": none


# ---- 1. The commands of run_cascade.sh -----------------------------------------------------------
def dry_run(script, seed):
    """The commands that a shell script prints with DRY_RUN=1, as lists of words."""
    env = os.environ | {"DRY_RUN": "1", "OUT": PLACE, "SEED": str(seed)}
    # One process without a launcher: on few cores, runs side by side beat ranks side by side.
    env["LAUNCH"] = ".venv/bin/python"
    done = subprocess.run(
        ["bash", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return [shlex.split(line) for line in done.stdout.splitlines() if "python" in line]


def name_of(words):
    """The name of a command: the last part of its --out_dir, else that of its script."""
    for word in words:
        if word.startswith("--out_dir="):
            return os.path.basename(word)
    return Path(words[1]).stem


@functools.cache
def commands(seed):
    """{name: words} of the toy's commands: toy, sft1, sft2, the stages, evaluate and mopd."""
    found = {}
    for words in dry_run("run_cascade.sh", seed) + dry_run("bench/mopd.sh", seed):
        # All calls of evaluate.py are the same but for the checkpoint.
        found.setdefault(name_of(words), words)
    return found


def with_flags(words, **flags):
    """A command with some of its flags replaced, or added."""
    for name, value in flags.items():
        words = [word for word in words if not word.startswith(f"--{name}=")]
        words = [*words, f"--{name}={value}"]
    return words


def flag(words, name):
    """The value of a flag that a command has."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return values[-1]  # as the script itself takes them, the last one counts


def joint_command(stages, rate=1):
    """The command of extras/jointrl.py. stages: {stage: its command in the cascade}.

    A domain has its stage's flags, and as many prompts as its stage has in all its steps. The flags
    that all five stages have are the run's own. rate: factor of the learning rate.
    """
    shared = [w for w in stages["rlhf"][2:] if all(w in words for words in stages.values())]
    # Verifiers are a domain's own, whatever their number.
    shared = [word for word in shared if not word.startswith("--reward_workers=")]
    not_own = ("--init_from=", "--out_dir=", "--eval_data=", "--lr=")
    domains, steps, weighted_lr = [], 0, 0.0
    for stage, words in stages.items():
        num_steps = int(flag(words, "num_steps"))
        own = [w for w in words[2:] if w not in shared and not w.startswith(not_own)]
        own = with_flags(own, num_steps=num_steps)
        domains.append(shlex.join([stage, *own]))
        steps += num_steps
        weighted_lr += num_steps * float(flag(words, "lr"))
    command = [stages["rlhf"][0], "extras/jointrl.py", *shared]
    lr = f"{rate * weighted_lr / steps:.2e}"
    # The cost of held-out metrics is no part of what is compared, so none is taken.
    return with_flags(command, data="; ".join(domains), num_steps=steps, lr=lr, eval_every=0)


# ---- 2. The pieces of a world --------------------------------------------------------------------
@dataclass
class Piece:
    """A command, or the averaging of weights; it has been done when a file exists."""

    kind: str  # key of TYPICAL
    done: Path
    words: list  # of the command; of "mean" the checkpoints
    log: Path


class World:
    """One seed with or without tensions: its folder, and the pieces of its arms."""

    def __init__(self, seed, tensions, cfg):
        self.seed, self.tensions = seed, tensions
        self.name = f"seed{seed}-{'tensions' if tensions else 'plain'}"
        self.folder = Path(cfg.out) / self.name
        self.pieces = {}  # by the file that says that it is done, so that none is there twice

    def place(self, words):
        """The words of a command, with this world's run of the paper's order as its run folder."""
        return [word.replace(PLACE, str(self.folder / "paper")) for word in words]

    def add(self, kind, done, words):
        name = "_".join(dict.fromkeys([*done.parts[-3:-1], kind]))
        log = self.folder / "logs" / f"{name}.log"
        self.pieces.setdefault(done, Piece(kind, done, words, log))

    def train(self, stage, arm, before, **flags):
        """Add the training of a stage into an arm, from a checkpoint; return where it ends."""
        folder = self.folder / arm / stage
        words = self.place(commands(self.seed)[stage])
        words = with_flags(words, init_from=before, out_dir=folder, **flags)
        self.add("clock" if arm.startswith("clock") else stage, folder / "final", words)
        return folder / "final"

    def score(self, checkpoint, label=""):
        """Add the evaluation of a checkpoint into the results.jsonl of its arm."""
        folder = checkpoint.parent
        label = label or folder.name
        words = with_flags(
            self.place(commands(self.seed)["evaluate"]),
            model=checkpoint,
            stage=label,
            results=folder.parent / "results.jsonl",
        )
        self.add("score", folder / "scored", words)

    def plan(self, arms):
        """Add the pieces of these arms, in an order in which each finds what it needs."""
        paper = self.folder / "paper"
        words = with_flags(
            self.place(commands(self.seed)["toy"]), tensions=str(self.tensions).lower()
        )
        self.add("data", paper / "data" / "done", words)
        sft1 = self.train("sft1", "paper", paper / "data" / "base")
        sft = self.train("sft2", "paper", sft1)
        self.score(sft, "sft")
        # RLHF comes first in every world, since all arms need its reward model.
        self.train("rlhf", "paper", sft)
        self.score(paper / "rlhf" / "final")
        for arm in arms:
            getattr(self, f"plan_{arm}", functools.partial(self.plan_order, arm))(sft)

    def rlhf_flags(self, stage):
        """Outside of the arm paper, RLHF takes the reward model that it trained there."""
        return {"rm": self.folder / "paper" / "rlhf" / "rm"} if stage == "rlhf" else {}

    def plan_order(self, arm, sft):
        before = sft
        for stage in ORDERS[arm]:
            # In the arm paper, RLHF trains the reward model.
            flags = self.rlhf_flags(stage) if arm != "paper" else {}
            before = self.train(stage, arm, before, **flags)
            if arm == "paper":
                self.score(before)
        self.score(before)

    def train_joint(self, arm, sft, rate=1, **flags):
        """Add joint RL into an arm, from the SFT checkpoint; return where it ends."""
        stages = {stage: self.place(commands(self.seed)[stage]) for stage in STAGES}
        stages["rlhf"] = with_flags(stages["rlhf"], **self.rlhf_flags("rlhf"))
        folder = self.folder / arm / "joint"
        words = with_flags(joint_command(stages, rate), init_from=sft, out_dir=folder, **flags)
        self.add("clock" if arm.startswith("clock") else "joint", folder / "final", words)
        return folder / "final"

    def plan_joint(self, sft):
        self.score(self.train_joint("joint", sft))

    def plan_joint_2x(self, sft):
        self.score(self.train_joint("joint_2x", sft, rate=2))

    def plan_clock(self, sft):
        """Add the slices; each one starts from the SFT checkpoint and measures nothing held-out."""
        self.plan_order("paper", sft)  # MOPD's teachers
        for number in range(CLOCK_ROUNDS):
            arm = f"clock{number}"
            for stage in STAGES:
                flags = self.rlhf_flags(stage)
                self.train(stage, arm, sft, num_steps=CLOCK_STEPS[stage], eval_every=0, **flags)
            self.train_joint(arm, sft, num_steps=CLOCK_STEPS["joint"])
            flags = {"num_steps": CLOCK_STEPS["mopd"], "eval_every": 0}
            self.train("mopd", arm, sft, **self.teachers({}), **flags)

    def specialists(self, sft):
        """Add a specialist of each domain; return {stage: its checkpoint}."""
        trained = {"rlhf": self.folder / "paper" / "rlhf" / "final"}
        for stage in STAGES[1:]:
            trained[stage] = self.train(stage, "specialists", sft)
            self.score(trained[stage])
        return trained

    def teachers(self, of_stages):
        """MOPD's flags that name teachers, {stage: checkpoint}; the others are the cascade's."""
        words = commands(self.seed)["mopd"]
        flags = {}
        for name in ("data", "eval_data"):
            domains = flag(words, name)
            for stage, teacher in of_stages.items():
                domains = domains.replace(f"{PLACE}/{stage}/final", str(teacher))
            (flags[name],) = self.place([domains])
        return flags

    def plan_mopd(self, sft):
        flags = self.teachers(self.specialists(sft))
        self.score(self.train("mopd", "specialists", sft, **flags))

    def plan_mean(self, sft):
        mean = self.folder / "specialists" / "mean" / "final"
        self.add("mean", mean, list(self.specialists(sft).values()))
        self.score(mean)

    def plan_repair(self, sft):
        self.plan_order("paper", sft)
        end = self.folder / "paper" / "swerl" / "final"
        self.score(self.train("mopd", "repair", end, **self.teachers({})))

    def open_pieces(self):
        return [piece for piece in self.pieces.values() if not piece.done.exists()]


def link_finished(world):
    """Take the folder of a finished run_cascade.sh as this world's arm paper."""
    name = f"toy-seed{world.seed}" if world.seed else "toy"
    finished, arm = ROOT / "out" / name, world.folder / "paper"
    if world.tensions and not arm.exists() and (finished / "swerl" / "scored").exists():
        world.folder.mkdir(parents=True, exist_ok=True)
        arm.symlink_to(finished)
        print(f"{world.name}: the arm paper is out/{name}", flush=True)


def average(checkpoints, folder):
    """Write a checkpoint whose weights are the mean of those of others, in fp32.

    It has the tokenizer and the configuration of the first one.
    """
    import torch

    from model import Qwen3, save_tokenizer

    models = [Qwen3.from_pretrained(checkpoint) for checkpoint in checkpoints]
    weights = [model.state_dict() for model in models]
    mean = {}
    for name in weights[0]:
        mean[name] = torch.stack([of_model[name] for of_model in weights]).mean(dim=0)
    # The folder gets its name last, so one with that name is complete.
    written = folder.with_name(folder.name + ".tmp")
    models[0].save_pretrained(written, mean)
    save_tokenizer(checkpoints[0], written)
    written.rename(folder)


# ---- 3. Run --------------------------------------------------------------------------------------
running = set()  # processes that this one has started and that have not ended


def run_piece(piece):
    """Run the command of a piece; its output goes to its log."""
    if piece.kind == "mean":
        return average(piece.words, piece.done)
    piece.log.parent.mkdir(parents=True, exist_ok=True)
    env = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with open(piece.log, "a") as log:
        print(shlex.join(piece.words), file=log, flush=True)
        process = subprocess.Popen(
            piece.words, cwd=ROOT, env=env | os.environ, stdout=log, stderr=subprocess.STDOUT
        )
        running.add(process)
        code = process.wait()
        running.discard(process)
    if code:
        raise RuntimeError(f"{shlex.join(piece.words[1:3])} ended with {code}: see {piece.log}")
    if not piece.done.exists():
        piece.done.touch()  # a stage makes `final` itself


def run_world(world):
    """Run what is open in a world, one piece after the other. Returns the sentence of a failure."""
    for piece in world.open_pieces():
        began = time.time()
        try:
            run_piece(piece)
        except (RuntimeError, OSError) as error:
            print(f"{world.name}: {error}", flush=True)
            return f"{world.name}: {error}"
        name = "/".join(piece.done.parts[-3:-1])
        print(f"{world.name}: {piece.kind} of {name} in {time.time() - began:.0f} s", flush=True)
    return ""


def stop_children(number, frame):
    for process in list(running):
        process.terminate()
    os._exit(128 + number)


def run(worlds, jobs):
    """Run all worlds, so many at a time."""
    to_do = [piece for world in worlds for piece in world.open_pieces()]
    minutes = sum(TYPICAL[piece.kind] for piece in to_do) / 60
    at_once = min(jobs, len(worlds))
    print(
        f"{len(to_do)} pieces to do: about {minutes:.0f} minutes of a core, "
        f"{minutes / at_once:.0f} minutes with {at_once} worlds at a time on quiet cores",
        flush=True,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_children)
    with ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failure in pool.map(run_world, worlds) if failure]
    if failures:
        fail("; ".join(failures) + ".", note="What has ended is kept.")


# ---- 4. Scores -----------------------------------------------------------------------------------
@functools.cache
def read_scores(folder):
    """{(label, task, mode, decoding): scores [problems]} of an arm's folder."""
    lines = {}
    for line in kept_lines(glob.escape(str(folder)) + "/results.jsonl"):
        lines[line["stage"], line["task"], line["mode"], line["decoding"]] = line
    scores = {key: problem_scores(folder, line) for key, line in lines.items()}
    missing = [key for key, of_problems in scores.items() if of_problems is None]
    assert not missing, f"{folder}: samples are not those of the scores of {missing[0]}"
    return scores


def scores_of(world, end, column, decoding):
    """Scores [problems] of a checkpoint, (arm folder, label), or None if it was not measured."""
    folder, label = end
    return read_scores(world.folder / folder).get((label, *column, decoding))


def two_level(scores_CSP, resamples=2000):
    """(mean, low, high) of scores [columns, seeds, problems], with the 95% interval of both levels.

    The mean is that of the columns' means. Seeds are drawn with replacement, the same for all
    columns, then problems of each drawn seed and column. With one seed it is the interval over
    problems.
    """
    scores_CSP = np.asarray(scores_CSP, dtype=np.float64)
    num_columns, num_seeds, num_problems = scores_CSP.shape
    rng = np.random.default_rng(0)
    means_R = np.zeros(resamples)
    for _ in range(num_seeds):
        seeds_R = rng.integers(0, num_seeds, resamples)
        for scores_SP in scores_CSP:
            problems_RP = rng.integers(0, num_problems, (resamples, num_problems))
            drawn_RP = scores_SP[seeds_R[:, None], problems_RP]
            means_R += drawn_RP.mean(axis=1) / (num_seeds * num_columns)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(scores_CSP.mean()), float(low), float(high)


def compare(worlds, end, base_of, columns, decoding):
    """two_level of what a checkpoint scores above another one, problem by problem, or None.

    end: (arm folder, label) of the checkpoint. base_of: {column: that of the other one}, None for
    the score itself. Several columns are averaged.
    """
    of_seeds = []
    for world in worlds:
        own = [scores_of(world, end, column, decoding) for column in columns]
        other = [np.zeros(1)] * len(own)
        if base_of:
            other = [scores_of(world, base_of[column], column, decoding) for column in columns]
        if any(scores is None for scores in own + other):
            continue
        sizes = {len(scores) for scores in own + other} - {1}
        if len(sizes) > 1:
            fail(f"{world.folder}: scores of {sizes} problems cannot be compared.", note="")
        of_seeds.append([a - b for a, b in zip(own, other, strict=True)])
    if not of_seeds:
        return None
    means = [float(np.mean(of_columns)) for of_columns in of_seeds]
    return {"seeds": len(of_seeds), "of": two_level(np.swapaxes(of_seeds, 0, 1)), "means": means}


def percent(comparison, sign=""):
    """ "58.3 [54.3, 62.4]", or "-" for None. sign: "+" for differences."""
    if comparison is None:
        return "-"
    mean, low, high = (100 * value for value in comparison["of"])
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def trainings_of(arm):
    """[(arm folder, stage)] of the RL and the distillation that an arm consists of."""
    stages = {name: [(name, stage) for stage in order] for name, order in ORDERS.items()}
    specialists = list(SPECIALISTS.values())
    parts = stages | {"mean": specialists, "mopd": [*specialists, ("specialists", "mopd")]}
    parts |= {"repair": [*stages["paper"], ("repair", "mopd")]}
    return parts.get(arm, [(arm, "joint")])


def read_steps(folder):
    """[metrics] of the steps of a training."""
    return list(kept_lines(glob.escape(str(folder)) + "/metrics.jsonl"))


def step_seconds(metrics):
    return metrics["time/gen"] + metrics["time/train"]


def costs(world, arm):
    """{"sampled", "trained", "logged", "steps"} of an arm, or None if it has not ended.

    sampled: tokens of the completions to a step's own prompts; the replacements that IF-RL samples
    for flat groups are in no log. trained: tokens in the loss. logged: seconds times ranks, however
    busy the machine was. steps: {stage: its steps}.
    """
    sums = {"sampled": 0.0, "trained": 0.0, "logged": 0.0}
    steps = {}
    for part, stage in trainings_of(arm):
        folder = world.folder / part / stage
        if not (folder / "final").exists():
            return None
        run_json = json.loads((folder / "run.json").read_text())
        completions = run_json["config"]["prompts_per_step"] * run_json["config"]["group_size"]
        steps[stage] = len(read_steps(folder))
        for metrics in read_steps(folder):
            sums["sampled"] += metrics["len"] * completions
            sums["trained"] += metrics["num_tokens"]
            sums["logged"] += step_seconds(metrics) * run_json["world"]
    return sums | {"steps": steps}


def clocked(world):
    """[{stage: mean seconds of a step}], one for each round of the arm clock that has ended."""
    rounds = []
    for number in range(CLOCK_ROUNDS):
        folder = world.folder / f"clock{number}"
        seconds = {}
        for stage in CLOCK_STEPS:
            if (folder / stage / "final").exists():
                steps = [step_seconds(metrics) for metrics in read_steps(folder / stage)]
                seconds[stage] = float(np.mean(steps[1:]))
        if len(seconds) == len(CLOCK_STEPS):
            rounds.append(seconds)
    return rounds


def seconds_of(steps, seconds):
    """Seconds of an arm with these steps {stage: number}, by one round of the clock."""
    return sum(number * seconds[stage] for stage, number in steps.items())


# ---- 5. The report -------------------------------------------------------------------------------
def specialist_of(column):
    """(arm folder, label) of the specialist of a column's domain."""
    (stage,) = (s for s, task in TEACHES.items() if column[0].removesuffix("_hard") == task)
    return SPECIALISTS[stage]


# What a score is compared with: {name: {column: (arm folder, label)}}
BASES = {
    "above_sft": dict.fromkeys(COLUMNS, ENDS["sft"]),
    "above_specialist": {column: specialist_of(column) for column in COLUMNS},
    "above_paper": dict.fromkeys(COLUMNS, ENDS["paper"]),
}


def print_table(title, worlds, rows, base_of=None):
    """Print a Markdown table of the headline decoding, a row an arm, the mean of all columns last.

    rows: {name: (arm folder, label)}. base_of: what to take off, as in compare.
    """
    print(f"\n**{title}**, percent [bootstrap over seeds and problems]\n")
    print("| | " + " | ".join(" ".join(column) for column in COLUMNS) + " | all | seeds |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    groups = [*([column] for column in COLUMNS), COLUMNS]
    for name, end in rows.items():
        cells = [compare(worlds, end, base_of, group, DECODINGS[0]) for group in groups]
        if any(cells):
            texts = [percent(cell, "+" if base_of else "") for cell in cells]
            num_seeds = max(cell["seeds"] for cell in cells if cell)
            print(f"| {name} | " + " | ".join(texts) + f" | {num_seeds} |")


def print_lost(worlds):
    """Print which columns of each arm end below SFT in some decoding, by the whole interval."""
    print("\nBelow SFT by the whole interval, any decoding:\n")
    for arm, end in ENDS.items():
        lost, measured = [], False
        for column, decoding in itertools.product(COLUMNS, DECODINGS):
            gain = compare(worlds, end, BASES["above_sft"], [column], decoding)
            measured = measured or gain is not None
            if direction(gain) == "down":
                lost.append(f"{' '.join(column)} {decoding} {percent(gain, '+')}")
        if measured and arm != "sft":
            print(f"- {arm}: {', '.join(lost) or 'none'}")


def print_costs(worlds):
    """Print tokens and seconds of each arm, means over seeds or rounds, with the range of these."""
    rounds = [seconds for world in worlds for seconds in clocked(world)]
    print(
        "\n| | sampled tokens, M | trained tokens, M | seconds x ranks, by the clock | as logged |"
    )
    print("|---|---|---|---|---|")
    for arm in COSTLY:
        found = [cost for cost in (costs(world, arm) for world in worlds) if cost]
        if not found:
            continue
        texts = [f"{np.mean([cost[name] for cost in found]) / 1e6:.2f}" for name in SAMPLED]
        clock = [seconds_of(found[0]["steps"], seconds) for seconds in rounds]
        for seconds in (clock, [cost["logged"] for cost in found]):
            text = "-"
            if seconds:
                text = f"{np.mean(seconds):.0f} [{min(seconds):.0f}, {max(seconds):.0f}]"
            texts.append(text)
        print(f"| {arm} | " + " | ".join(texts) + " |")
    print(
        "\nAs logged: however busy the machine was when the arm ran. By the clock: steps times the "
        f"seconds of a step in {len(rounds)} rounds of slices in turns [least, most]."
    )


def difference(comparison):
    """ "+1.5 [+0.2, +2.8] over 3 seeds", or "-" for None."""
    if comparison is None:
        return "-"
    return f"{percent(comparison, '+')} over {comparison['seeds']} seeds"


def direction(comparison):
    """Where an interval and each seed's mean lie: "up", "down", or else "level"; "" for None."""
    if comparison is None:
        return ""
    _, low, high = comparison["of"]
    if low > 0 and min(comparison["means"]) > 0:
        return "up"
    if high < 0 and max(comparison["means"]) < 0:
        return "down"
    return "level"


def falls(worlds):
    """(falls, cells) of the paper's order, over the skills that an earlier RL stage had taught.

    A cell is a stage, a column and a decoding; it fell if it is "down" (direction) after the stage
    against before it. falls: {(stage, skill): [texts]}, the skills that lost in some cell. cells:
    {(stage, skill): number of cells}.
    """
    fell, cells = {}, {}
    for number, (before, after) in enumerate(itertools.pairwise(("sft", *STAGES))):
        taught = {TEACHES[stage] for stage in STAGES[:number]}
        for column, decoding in itertools.product(COLUMNS, DECODINGS):
            pair = after, column[0].removesuffix("_hard")
            ends = [("paper", stage) for stage in (after, before)]
            change = compare(worlds, ends[0], {column: ends[1]}, [column], decoding)
            if pair[1] not in taught or change is None:
                continue
            cells[pair] = cells.get(pair, 0) + 1
            if direction(change) == "down":
                text = f"{' '.join(column)} {decoding} {percent(change, '+')}"
                fell.setdefault(pair, []).append(text)
    return fell, cells


def order_matters(worlds):
    """(verdict, lines of evidence): whether the same stages in another order end elsewhere.

    It is no sentence of the paper, and the number, a point over all skills, is ours.
    """
    verdict, evidence = "", []
    for arm in ("backward", "rlhf_last"):
        end = compare(worlds, ENDS[arm], BASES["above_paper"], COLUMNS, DECODINGS[0])
        evidence.append(f"{arm} ends above the paper's order by {difference(end)}")
        if end and direction(end) != "level" and abs(end["of"][0]) > 0.01:
            verdict = "holds"
        elif end:
            verdict = verdict or "does not hold"
    return verdict, evidence


def claims(worlds):
    """{sentence: (verdict, lines of evidence)} for worlds of one kind: ours, then the paper's."""
    found = {}
    decoding = DECODINGS[0]

    found["the order of the stages matters (by over a point, all skills)"] = order_matters(worlds)

    # RLHF first lifts reasoning.
    last = dict.fromkeys(COLUMNS, ENDS["rlhf_last"])
    itself = compare(worlds, SPECIALISTS["rlhf"], BASES["above_sft"], REASONING, decoding)
    first = compare(worlds, ENDS["paper"], last, REASONING, decoding)
    evidence = [
        f"RLHF itself, math and code against the SFT row: {difference(itself)}",
        f"the end of the paper's order against RLHF last: {difference(first)}",
    ]
    for column in REASONING:
        of_column = compare(worlds, ENDS["paper"], last, [column], decoding)
        evidence.append(f"  of it {column[0]}: {difference(of_column)}")
    verdict = ""
    if itself and first:
        ways = {direction(itself), direction(first)}
        verdict = "not told apart"
        if ways == {"up"}:
            verdict = "holds"
        elif "down" in ways:
            verdict = "does not hold"
    found["RLHF first lifts reasoning"] = verdict, evidence

    # Later stages rarely degrade earlier ones: at most one pair in ten of a stage and a skill that
    # was taught before. The paper says "rarely"; the number is ours.
    fell, cells = falls(worlds)
    verdict = ""
    if cells:
        verdict = "holds" if len(fell) <= len(cells) / 10 else "does not hold"
    num_fell = sum(len(texts) for texts in fell.values())
    evidence = [
        f"of {len(cells)} pairs of a stage and a skill taught before, {len(fell)} fell in some "
        f"decoding; of {sum(cells.values())} cells, {num_fell}"
    ]
    evidence += [f"{stage} on {skill}: {', '.join(t)}" for (stage, skill), t in fell.items()]
    found["later stages rarely degrade earlier ones (at most one pair in ten)"] = verdict, evidence

    # Domain-wise is cheaper than joint.
    evidence, ratios, tokens = [], [], []
    for world in worlds:
        cascade, joint = costs(world, "paper"), costs(world, "joint")
        if not cascade or not joint:
            continue
        tokens.append(joint["trained"] / cascade["trained"])
        for seconds in clocked(world):
            of_both = [seconds_of(cost["steps"], seconds) for cost in (joint, cascade)]
            ratios.append(of_both[0] / of_both[1])
    if tokens:
        evidence.append(f"joint takes {np.mean(tokens):.2f} times the trained tokens")
    for arm in ("joint", "joint_2x"):
        base_of = dict.fromkeys(COLUMNS, ENDS[arm])
        score = compare(worlds, ENDS["paper"], base_of, COLUMNS, decoding)
        evidence.append(f"the paper's order ends above {arm} by {difference(score)}, all columns")
    verdict = ""
    if ratios:
        evidence.append(
            f"by the clock joint takes {np.mean(ratios):.2f} times the seconds at equal steps "
            f"[{min(ratios):.2f}, {max(ratios):.2f}], {len(ratios)} rounds"
        )
        verdict = "not told apart"
        if min(ratios) > 1:
            verdict = "holds"
        elif max(ratios) < 1:
            verdict = "does not hold"
    found["domain-wise is cheaper than joint"] = verdict, evidence
    return found


def print_claims(kinds):
    """Print each claim with its evidence. kinds: {name of a kind of world: its worlds}."""
    of_kind = {kind: claims(worlds) for kind, worlds in kinds.items()}
    print("\n**Our question and three sentences of the paper, at this size**")
    for claim in next(iter(of_kind.values())):
        print(f"\n{claim}")
        verdicts = {}
        for kind, found in of_kind.items():
            verdicts[kind], evidence = found[claim]
            print(f"- {kind}: {verdicts[kind] or 'not measured'}")
            for line in evidence:
                print(f"  - {line}")
        built_in, without = verdicts.get("with tensions"), verdicts.get("without tensions")
        if built_in and without and built_in != without:
            print(f"- {built_in!r} is so only with the tensions: without them {without!r}")
    return {kind: {c: v for c, (v, _) in found.items()} for kind, found in of_kind.items()}


def plot(kinds, path):
    """One panel a column: every arm's score with its interval, with and without tensions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decoding = DECODINGS[0]
    figure, axes = plt.subplots(3, 4, figsize=(13, 9), sharey=True)
    colours = {"with tensions": "tab:blue", "without tensions": "tab:orange"}
    shifts = {"with tensions": -0.15, "without tensions": 0.15}
    for axis, column in zip(axes.flat, COLUMNS):
        for kind, worlds in kinds.items():
            for place, end in enumerate(ENDS.values()):
                cell = compare(worlds, end, None, [column], decoding)
                if not cell:
                    continue
                mean, low, high = (100 * value for value in cell["of"])
                y = place + shifts[kind]
                axis.plot([low, high], [y, y], color=colours[kind], lw=2)
                axis.plot(mean, y, "o", color=colours[kind], ms=4)
                if place == 0:
                    axis.axvline(mean, color=colours[kind], lw=0.8, ls=":")
        axis.set_title(" ".join(column), fontsize=9)
        axis.set_yticks(range(len(ENDS)), list(ENDS))
        axis.grid(axis="x", alpha=0.3)
    axes.flat[0].set_ylim(len(ENDS) - 0.5, -0.5)
    legend = axes.flat[-1]
    legend.axis("off")
    for kind, worlds in kinds.items():
        legend.plot([], [], "o-", color=colours[kind], label=f"{kind}, {len(worlds)} seeds")
    legend.legend(loc="center", fontsize=9, title="held-out score at the end of each arm, %")
    figure.suptitle(
        "The cascade against its alternatives: temperature 0.6, top-p 0.95; bars: bootstrap over "
        "seeds and problems; dotted: SFT",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def as_json(kinds):
    """Every cell in every decoding: score, gain over SFT and difference to the paper's order."""
    cells = []
    ends = ENDS | {f"specialist {stage}": end for stage, end in SPECIALISTS.items()}
    for kind, worlds in kinds.items():
        for (arm, end), column in itertools.product(ends.items(), COLUMNS):
            for decoding in DECODINGS:
                score = compare(worlds, end, None, [column], decoding)
                if not score:
                    continue
                cell = {"world": kind, "arm": arm, "task": column[0], "mode": column[1]}
                cell |= {"decoding": decoding, "seeds": score["seeds"], "score": score["of"]}
                for name, base_of in BASES.items():
                    above = compare(worlds, end, base_of, [column], decoding)
                    cell[name] = above["of"] if above else None
                cells.append(cell)
    return cells


def report(worlds, cfg):
    """Print the tables and the claims; write the JSON and the plot."""
    kinds = {}
    for world in worlds:
        kind = "with tensions" if world.tensions else "without tensions"
        if scores_of(world, ENDS["sft"], COLUMNS[0], DECODINGS[0]) is not None:
            kinds.setdefault(kind, []).append(world)
    if not kinds:
        fail("no world has a score of its SFT checkpoint yet.", note="")
    specialists = {f"specialist {stage}": end for stage, end in SPECIALISTS.items()}
    for kind, of_kind in kinds.items():
        seeds = ", ".join(str(world.seed) for world in of_kind)
        about = f"{kind}, seeds {seeds}, temperature 0.6, top-p 0.95"
        arms = {arm: end for arm, end in ENDS.items() if arm != "sft"}
        others = {arm: end for arm, end in arms.items() if arm != "paper"}
        print_table(f"Score: {about}", of_kind, ENDS | specialists)
        print_table(f"Above SFT: {about}", of_kind, arms | specialists, BASES["above_sft"])
        title = f"Above the specialist of the column: {about}"
        print_table(title, of_kind, arms, BASES["above_specialist"])
        print_table(f"Above the paper's order: {about}", of_kind, others, BASES["above_paper"])
        print_lost(of_kind)
        print_costs(of_kind)
    verdicts = print_claims(kinds)
    if cfg.report:
        costs_of = []
        for world, arm in itertools.product(worlds, COSTLY):
            with contextlib.suppress(FileNotFoundError):
                cost = costs(world, arm)
                if cost:
                    costs_of.append({"world": world.name, "arm": arm, **cost})
        found = {"command": "python bench/orders.py", "config": dataclasses.asdict(cfg)}
        found |= {"cells": as_json(kinds), "costs": costs_of, "claims": verdicts}
        Path(cfg.report).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        plot(kinds, Path(cfg.report).with_suffix(".png"))


def main(cfg):
    os.chdir(ROOT)
    arms = [arm for arm in cfg.arms.split(",") if arm]
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        fail(f"--arms: {', '.join(unknown)} unknown (has: {', '.join(ARMS)}).", note="")
    worlds = []
    for tensions, seed in itertools.product(cfg.tensions.split(","), cfg.seeds.split(",")):
        try:
            worlds.append(World(int(seed), boolean(tensions), cfg))
        except ValueError:
            fail(
                f"--seeds={cfg.seeds} --tensions={cfg.tensions}: expected whole numbers, and true "
                "or false, joined by commas.",
                note="",
            )
    for world in worlds:
        if cfg.reuse:
            link_finished(world)
        if arms:
            world.plan(arms)
    if arms:
        run(worlds, cfg.jobs)
    report(worlds, cfg)


if __name__ == "__main__":
    main(parse_config(Config))
