"""What each stage gains and what it forgets, in two ways of training the same cascade.

    bash bench/lora.sh            trains out/toy-lora beside out/toy, and ends with this table
    python bench/lora.py --full=out/toy --other=out/toy-lora
    python bench/lora.py --full=out/toy,out/toy-seed1 --other=out/toy-lora,out/toy-seed1-lora

All numbers are points of held-out score, after a stage minus before it. "own" is the skill that
the stage teaches, in the mode that it trains; "others" the mean over all other skills; "worst" the
one of them that lost most. With several runs each is the mean over them [lowest, highest]. The last
line is what is lost by the end: of the best score that each skill had after any stage, the mean
loss until the last one.
"""

import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evals.plots import is_taught
from evals.results import columns_of, read_results
from evaluate import own_skills
from lib.flags import parse_config
from lib.guard import fail

NAMES = ("own", "others", "worst")


@dataclass
class Config:
    full: str = "out/toy"  # run folders of full training, joined by commas: a seed each
    other: str = "out/toy-lora"  # those of the other way, with the same seeds in the same order
    decoding: str = "paper"  # paper, sampled or greedy


def changes(folder, flag, decoding):
    """({stage: {name: points}}, points lost by the end) of a run folder; names as in NAMES."""
    cells, stages = read_results(folder, flag)
    own = own_skills()
    # Others, as MOPD or an ablation, teach no skill of the cascade.
    stages = [stage for stage in stages if stage == "sft" or stage in own]
    columns = columns_of(cells, stages)
    scores = {}  # (stage, task, mode) -> points
    for stage, (task, mode) in itertools.product(stages, columns):
        cell = cells.get((stage, task, mode, decoding))
        if cell is None:
            fail(f"{folder}: no score of {task} ({mode}, {decoding}) after {stage}.", note="")
        scores[stage, task, mode] = 100 * cell["score"]

    found = {}
    for before, after in itertools.pairwise(stages):
        # IF-RL samples without thinking.
        trained_mode = "no_think" if after == "ifrl" else "think"
        gains, others = [], []
        for task, mode in columns:
            change = scores[after, task, mode] - scores[before, task, mode]
            if task == own[after] and mode == trained_mode:
                gains.append(change)
            elif not is_taught(task, after, own):
                others.append(change)
        found[after] = {"own": gains[0], "others": statistics.fmean(others), "worst": min(others)}

    losses = []
    for task, mode in columns:
        best = max(scores[stage, task, mode] for stage in stages)
        losses.append(best - scores[stages[-1], task, mode])
    return found, statistics.fmean(losses)


def spread(values):
    """ "+3.1 [+2.0, +4.5]" of one number a run; one alone has no brackets."""
    text = f"{statistics.fmean(values):+.1f}"
    if len(values) > 1:
        text += f" [{min(values):+.1f}, {max(values):+.1f}]"
    return text


def main(cfg):
    ways = []
    for flag in ("full", "other"):
        folders = getattr(cfg, flag).split(",")
        ways.append([changes(folder, flag, cfg.decoding) for folder in folders])
    stages = list(ways[0][0][0])
    if any(list(found) != stages for way in ways for found, _ in way):
        fail("--full and --other: the runs do not have the same stages.", note="Nothing was read.")

    titles = [f"{name}, {way}" for name in NAMES for way in ("full", "other")]
    print("| stage | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for stage in stages:
        texts = [spread([run[stage][name] for run, _ in way]) for name in NAMES for way in ways]
        print(f"| {stage} | " + " | ".join(texts) + " |")
    lost = [spread([-points for _, points in way]) for way in ways]
    print(f"\nlost by the end, mean over all skills: full {lost[0]}, other {lost[1]}")


if __name__ == "__main__":
    main(parse_config(Config))
