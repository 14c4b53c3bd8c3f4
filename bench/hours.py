"""How long a preset of run_cascade.sh takes on one card, and what it needs there, by the plan.

    python bench/hours.py --preset=0.6b-1gpu
    python bench/hours.py --preset=4b-1gpu --card=48

The commands are those that DRY_RUN=1 prints, each estimated as it would estimate itself before it
starts (lib/plan.py): at the rates of an H100, with every sequence at its full length. So it is an
upper end where that card is not slower, and answers are mostly shorter. To every command come
START_S seconds for imports, weights and vLLM. That is an allowance; nothing here is measured.
"""

import dataclasses
import importlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import protocol  # noqa: E402
from lib import estimate, plan  # noqa: E402
from lib.flags import PositiveFloat, parse_config  # noqa: E402
from lib.guard import fail  # noqa: E402
from model import QWEN3_SIZES, Qwen3Config  # noqa: E402

STAGES = ("sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl", "extras.mopd")
# Problems of a task, and tokens that are more than most of its prompts have.
PROBLEMS = {"gsm8k": 1319, "math500": 500, "humaneval": 164, "ifeval": 541}
PROMPT_TOKENS = 512
START_S = 120
USABLE = 0.93  # of a card's memory, what CUDA and the allocator leave
GPU = torch.device("cuda")


@dataclass
class Config:
    preset: str = "0.6b-1gpu"  # of run_cascade.sh: 0.6b-1gpu or 4b-1gpu
    card: PositiveFloat = 80.0  # GB of its memory


# ---- What a preset runs --------------------------------------------------------------------------
def dry_run(*command, **environment):
    """The lines that a shell script prints with DRY_RUN=1."""
    env = {**os.environ, "DRY_RUN": "1", "OUT": "out/no_such_run", **environment}
    done = subprocess.run(
        ["bash", *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        fail(done.stderr.strip().splitlines()[-1], note="")
    return done.stdout.splitlines()


def module_and_flags(line):
    """("extras.mopd", flags) of a printed command, (None, []) of a line that starts no Python."""
    words = shlex.split(line)
    for i, word in enumerate(words):
        if word.endswith(".py"):
            return word.removesuffix(".py").replace("/", "."), words[i + 1 :]
        if word == "-m":
            return words[i + 1], words[i + 2 :]
    return None, []


def parsed(module, flags):
    """The Config that a script would make of its flags."""
    argv = sys.argv
    sys.argv = [module, *flags]
    try:
        return parse_config(importlib.import_module(module).Config)
    finally:
        sys.argv = argv


# ---- What that costs -----------------------------------------------------------------------------
def stage_costs(config, cfg, free):
    """(GB at the least, seconds of a step) of a stage on one card with so many bytes free."""
    nll = hasattr(cfg, "max_seq_len")
    if not nll:
        cfg = dataclasses.replace(cfg, engine="vllm")
    run = plan.Run(config, cfg, 1, GPU, plan.longest_sequence(cfg), nll, pair=False, free=free)
    # The least memory, with all layers computed again; what is left of the card buys time.
    memory = plan.plan_of_flags(run)
    seconds = plan.time_of_flags(run, memory, plan.choose_checkpointing(run, reduce_once=False))
    peak = max(sum(parts.values()) for parts in memory.values())
    return peak / plan.GB, sum(seconds.values())


def evaluation_costs(config, cfg, free):
    """(GB of the weights, seconds) of one task of evaluate.py."""
    if cfg.tasks not in PROBLEMS:
        fail(f"{cfg.tasks}: no number of problems in PROBLEMS of bench/hours.py.", note="")
    how = protocol(cfg.tasks, cfg)
    rows = (cfg.limit or PROBLEMS[cfg.tasks]) * how["samples"]
    longest = PROMPT_TOKENS + how["max_new_tokens"]
    weights = estimate.memory_plan(config, 1, 1, longest)["rollouts"]["engine weights"]
    room = max(estimate.vllm_cache_bytes(config, free, weights), plan.GB)
    seconds, _ = estimate.time_plan(config, 1, 0, longest, how["max_new_tokens"], rows, room=room)
    # The evaluation holds the weights as the stage does, and vLLM has its own.
    return 2 * weights / plan.GB, seconds


def preset_costs(preset, card):
    """[(what, number of steps, GB at the least, hours)] of all commands of a preset."""
    config = Qwen3Config(**QWEN3_SIZES[preset.partition("-")[0]])
    free = USABLE * card * plan.GB
    costs = []
    for line in dry_run("run_cascade.sh", preset):
        module, flags = module_and_flags(line)
        if line.startswith("==") or module not in (*STAGES, "evaluate"):
            continue
        cfg = parsed(module, flags)
        if module == "evaluate":
            gb, seconds = evaluation_costs(config, cfg, free)
            name, steps = f"{cfg.tasks} after {cfg.stage}", 1
        else:
            gb, seconds = stage_costs(config, cfg, free)
            name, steps = os.path.basename(cfg.out_dir), cfg.num_steps
        costs.append((name, steps, gb, (START_S + steps * seconds) / 3600))
    return costs


def main(cfg):
    if not cfg.preset.endswith("-1gpu"):
        fail(f"--preset={cfg.preset}: expected 0.6b-1gpu or 4b-1gpu.", note="")
    costs = preset_costs(cfg.preset, cfg.card)
    print(f"{cfg.preset} on one card of {cfg.card:g} GB, at most, by the plan of lib/plan.py")
    print("| what | steps | GB at the least | hours |\n|---|---|---|---|")
    for name, steps, gb, hours in costs:
        print(f"| {name} | {steps} | {gb:.0f} | {hours:.2f} |")
    fits = all(gb <= USABLE * cfg.card for _, _, gb, _ in costs)
    total = sum(hours for *_, hours in costs)
    print(f"\nin all {total:.1f} hours; {'fits' if fits else 'does not fit'}")


if __name__ == "__main__":
    main(parse_config(Config))
