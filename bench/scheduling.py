"""How long ranks wait for each other: simulated at the sizes of the 8B presets, and measured.

    python bench/scheduling.py              simulation; writes bench/scheduling.json
    python bench/scheduling.py --measure    two CPU ranks with completions of very unequal length

The simulation computes no model. `before` is how ranks were dealt their work earlier: whole prompts
to every world-th rank in the order of the epoch; rollouts of equal token counts, packed in a row;
conversations of SFT by length in turns. `after` is what the stages call now. Its assumptions are
printed with the result.
"""

import heapq
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from bench.side_by_side import machine  # noqa: E402
from engine import Rollout  # noqa: E402
from lib.packing import (  # noqa: E402
    Unit,
    attention_cost,
    equal_packs,
    num_tokens,
    pack_prompts,
    split_by_budget,
)
from lib.prompts import longest_first  # noqa: E402

WORLD = 8
ASSUMPTIONS = {
    "ranks": WORLD,
    "update": "a sequence of n tokens costs n (1 + n / 24,000), a micro-batch what its sequences "
    "cost, a prompt once in it; ranks wait for each other at every micro-batch (FSDP2)",
    "lengths": "lognormal, sigma 0.55 between prompts and 0.35 within, cut at the limit",
    "flat": "45% of the groups have no gradient",
    "rollouts": "a decoding step reads 16.4 GB of weights and the caches (147 KB a token) at 2.6 "
    "TB/s and takes 2 ms besides; a rank has caches for 210K tokens (60% of an 80 GB card) or 286K "
    "(75%); rows start while their prompt fits and the newest is preempted when caches are full",
    "history": "the mean length of a prompt in the epoch before, its samples drawn anew",
    "steps": "mean of 5 steps, each with lengths of its own",
}


@dataclass
class Setting:
    name: str
    mean: int  # tokens of a completion
    limit: int
    prompt: int
    prompts: int
    group: int
    budget: int  # micro_batch_tokens
    sigma: float = 0.55  # of the lognormal between prompts


RL = [
    Setting("Math RL, 24K", 8400, 24576, 300, 128, 8, 32768),
    Setting("Code RL, 48K", 12000, 49152, 600, 128, 8, 65536),
    Setting("SWE RL, 16K prompts", 12000, 16384, 16384, 128, 16, 32768),
]


# ---- The work of a step --------------------------------------------------------------------------
def completions(setting, draw):
    """([prompt, sample] tokens, and the same prompts in the epoch before)."""
    between = draw.lognormal(0, setting.sigma, setting.prompts)
    scale = setting.mean / np.exp((setting.sigma**2 + 0.35**2) / 2)
    found = []
    for _ in range(2):
        within = draw.lognormal(0, 0.35, (setting.prompts, setting.group))
        lengths = scale * between[:, None] * within
        found.append(np.clip(lengths, 16, setting.limit).astype(int))
    return found


def rollouts_of(setting, lengths, advantage=1.0):
    made = []
    for group, row in enumerate(lengths):
        prompt = tuple([group + 1] * setting.prompt)
        for sample, n in enumerate(row):
            r = Rollout({"index": group}, group, prompt, seed=len(made), sample=sample)
            r.completion_ids, r.advantage = range(n), advantage
            made.append(r)
    return made


# ---- Update --------------------------------------------------------------------------------------
def cost_of(pack):
    """Cost of a micro-batch of rollouts."""
    prompts = {r.prompt_ids for r in pack}
    attention = sum(attention_cost(num_tokens(r)) for r in pack)
    return attention + sum(len(r.completion_ids) for r in pack) + sum(map(len, prompts))


def waited(packs_of_ranks, cost):
    """(cost of a step in which ranks wait for the costliest at every micro-batch, work of all)."""
    most = max(map(len, packs_of_ranks))
    costs = [[cost(pack) for pack in packs] for packs in packs_of_ranks]
    padded = [row + [0.0] * (most - len(row)) for row in costs]
    return sum(max(column) for column in zip(*padded)), sum(map(sum, costs))


def update_before(rollouts, budget):
    """Tokens alone were balanced; each rank then packed its share, prompt by prompt."""
    shares, tokens = [[] for _ in range(WORLD)], [0] * WORLD
    prompts = [set() for _ in range(WORLD)]
    for r in sorted(rollouts, key=num_tokens, reverse=True):
        loads = []
        for rank in range(WORLD):
            again = r.group in prompts[rank]
            loads.append(tokens[rank] + len(r.completion_ids) + len(r.prompt_ids) * (not again))
        rank = int(np.argmin(loads))
        shares[rank].append(r)
        tokens[rank] = loads[rank]
        prompts[rank].add(r.group)
    packs = []
    for share in shares:
        groups = {}
        for r in share:
            groups.setdefault(r.group, []).append(r)
        in_order = [r for group in groups.values() for r in group]
        packs.append(split_by_budget(in_order, num_tokens, budget))
    return packs


def update_after(rollouts, budget):
    packs = pack_prompts(rollouts, budget, WORLD)
    return [packs[rank::WORLD] for rank in range(WORLD)]


def sft_before(lengths, budget):
    in_order = sorted(lengths, reverse=True)
    return [split_by_budget(in_order[rank::WORLD], int, budget) for rank in range(WORLD)]


def sft_after(lengths, budget):
    units = [Unit([n], int(n), n + attention_cost(n)) for n in lengths]
    packs, _ = equal_packs(units, budget, WORLD)
    return [packs[rank::WORLD] for rank in range(WORLD)]


# ---- Rollouts ------------------------------------------------------------------------------------
def decode_seconds(rollouts, caches):
    """Seconds of one rank for its rollouts in this order; events are ends, starts, preemptions."""
    # In the order of the queue: (place, tokens whose cache is needed at the start, tokens to come).
    waiting = [(i, len(r.prompt_ids), len(r.completion_ids)) for i, r in enumerate(rollouts)][::-1]
    # Heap of (when it ends, place, when it began, tokens at its beginning); `at` tokens decoded.
    running, clock, at, used = [], 0.0, 0, 0
    while waiting or running:
        while waiting and used + waiting[-1][1] + 512 <= caches:
            place, held, left = waiting.pop()
            heapq.heappush(running, (at + left, place, at, held))
            used += held
        rows = len(running)
        # Until a row ends or the caches are full.
        steps = min(running[0][0] - at, max((caches - used) // rows, 1))
        bytes_read = steps * 16.4e9 + 147456 * (steps * used + rows * steps * steps / 2)
        clock += bytes_read / 2.6e12 + 0.002 * steps
        at += steps
        used += rows * steps
        while running and running[0][0] <= at:
            ends, _, began, held = heapq.heappop(running)
            used -= held + ends - began
        if used + len(running) > caches and len(running) > 1:
            newest = max(range(len(running)), key=lambda i: running[i][1])
            ends, place, began, held = running.pop(newest)
            heapq.heapify(running)
            used -= held + at - began
            # It keeps its tokens, and its cache is computed anew when it starts again.
            waiting.append((place, held + at - began, ends - at))
    return clock


def rollout_seconds(setting, lengths, past, caches, spread, first):
    rollouts = rollouts_of(setting, lengths)
    if first:
        known = {str(i): float(row.mean()) for i, row in enumerate(past)}
        rollouts = longest_first(rollouts, {"lengths": known})
    shares = [rollouts[rank::WORLD] for rank in range(WORLD)]
    if not spread:
        shares = [[r for r in rollouts if r.group % WORLD == rank] for rank in range(WORLD)]
    return [decode_seconds(share, caches) for share in shares]


# ---- Simulation ----------------------------------------------------------------------------------
def simulate():
    draw = np.random.default_rng(0)
    table = {"assumptions": ASSUMPTIONS, "update": {}, "rollouts": {}}
    for setting in RL:
        before, after = [], []
        for _ in range(5):
            lengths, _ = completions(setting, draw)
            rollouts = rollouts_of(setting, lengths[: int(0.55 * setting.prompts)])
            for found, deal in ((before, update_before), (after, update_after)):
                cost, work = waited(deal(rollouts, setting.budget), cost_of)
                found.append((cost, work / WORLD))
        table["update"][setting.name] = ratios(before, after)
    for name, mean, limit in (("SFT, 16K", 2800, 16384), ("SFT, 32K", 7000, 32768)):
        before, after = [], []
        for _ in range(5):
            lengths = draw.lognormal(0, 0.9, 256)
            lengths = np.clip(lengths * mean / lengths.mean(), 16, limit).astype(int)
            for found, deal in ((before, sft_before), (after, sft_after)):
                packs = deal(lengths, limit)
                cost, work = waited(packs, lambda pack: sum(n + attention_cost(n) for n in pack))
                found.append((cost, work / WORLD))
        table["update"][name] = ratios(before, after)

    setting = RL[0]
    steps = [completions(setting, draw) for _ in range(5)]
    for name, caches, spread, first in (
        ("whole prompts by rank (before)", 210_000, False, False),
        ("samples spread", 210_000, True, False),
        ("samples spread, longest first (after)", 210_000, True, True),
        ("before, 75% of the card", 286_000, False, False),
        ("samples spread, 75% of the card", 286_000, True, False),
        ("after, 75% of the card", 286_000, True, True),
    ):
        ranks = [rollout_seconds(setting, *step, caches, spread, first) for step in steps]
        table["rollouts"][name] = {
            "seconds": round(statistics.fmean(max(row) for row in ranks)),
            "mean_rank": round(statistics.fmean(statistics.fmean(row) for row in ranks)),
        }
    return table


def ratios(before, after):
    """Cost over the ideal, before and after, and how many times faster a step is."""
    over = [statistics.fmean(cost / ideal for cost, ideal in found) for found in (before, after)]
    faster = statistics.fmean(b[0] / a[0] for b, a in zip(before, after))
    return {
        "before": round(over[0], 3),
        "after": round(over[1], 3),
        "faster": round(faster, 3),
    }


# ---- The real thing on two CPU ranks -------------------------------------------------------------
MEASURE = """
import json, sys, time
import numpy as np, torch
import engine
from bench import scheduling
from conftest import make_tiny
from lib.common import all_gather, finish, init_distributed
from lib.packing import pack_rollouts
from lib.prompts import longest_first

rank, world, device = init_distributed(0)
scheduling.WORLD = world
# Eight prompts of very unequal length: a few answers are ten times as long as most.
setting = scheduling.Setting("two ranks", 150, 1500, 40, 8, 8, 2000, sigma=1.2)
# Wide, with narrow heads: attention has about the share of the arithmetic that it has at 8B.
model = make_tiny(
    hidden_size=384, intermediate_size=1152, head_dim=16, max_position_embeddings=2048
)


class Tokenizer:
    def token_to_id(self, token):
        return 61  # never drawn

    def decode(self, ids, skip_special_tokens):
        return ""


def end_at_length(self, tokens, step):
    for b, r in self.running:
        r.completion_ids.append(tokens[b])
        if len(r.completion_ids) == lengths[r.group][r.sample]:
            engine.finish_rollout(r, "stop", self.engine.tokenizer, None)
    self.running = [(b, r) for b, r in self.running if not r.finish_reason]


engine.Wave.collect = end_at_length
sampler = engine.TorchEngine(model, Tokenizer())


def generate(name):
    fresh = []
    for r in rollouts:
        fresh.append(engine.Rollout(r.row, r.group, r.prompt_ids, r.seed, r.sample))
    if name == "before":
        mine = [r for r in fresh if r.group % world == rank]
    else:
        mine = longest_first(fresh, {"lengths": known})[rank::world]
    begun = time.process_time()
    sampler.generate(mine, setting.limit, 1.0)
    return [time.process_time() - begun]


def update(name):
    deal = scheduling.update_before if name == "before" else scheduling.update_after
    seconds = []
    for pack in deal(rollouts, setting.budget)[rank]:
        batch = pack_rollouts(pack, device)
        begun = time.process_time()
        model.token_logprobs(batch)[0].sum().backward()
        seconds.append(time.process_time() - begun)
    return seconds


steps = []
for seed in range(4):
    draw = np.random.default_rng(seed)
    lengths, past = scheduling.completions(setting, draw)
    known = {str(i): float(row.mean()) for i, row in enumerate(past)}
    rollouts = scheduling.rollouts_of(setting, lengths)
    for r in rollouts:
        ids = draw.integers(3, 61, len(r.completion_ids)).tolist()
        r.prompt_ids, r.completion_ids = [r.group + 3] * 40, ids
        r.sampler_logprobs = [0.0] * len(ids)
    found = {"rollouts": {"before": [], "after": []}, "update": {"before": [], "after": []}}
    for turn in range(2 * int(sys.argv[1])):
        name = ("before", "after")[turn % 2]
        found["rollouts"][name].append(generate(name))
        found["update"][name].append(update(name))
    steps.append(found)
everyone = all_gather(steps)
if rank == 0:
    print(json.dumps(everyone))
finish()
"""


def measure(turns=2):
    """{phase: {before, after}}: what a step takes on two ranks that wait for each other at every
    micro-batch, and which share of it the ranks idle.

    It is put together from CPU seconds, which other processes on the machine disturb least: every
    rank times its own parts, before and after in turns, and the median of each part counts. Summed
    over four steps.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    program = Path(tempfile.mkdtemp()) / "measure.py"
    program.write_text(MEASURE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, program, str(turns)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    everyone = json.loads(done.stdout.splitlines()[-1])
    found = {}
    for phase, name in itertools.product(("rollouts", "update"), ("before", "after")):
        took, worked = 0.0, 0.0
        for ranks in zip(*everyone):
            # [rank][part]: median over the turns. A rank with fewer parts waits for the others.
            cost = []
            for rank in ranks:
                cost.append([statistics.median(part) for part in zip(*rank[phase][name])])
            took += sum(max(part) for part in itertools.zip_longest(*cost, fillvalue=0.0))
            worked += sum(map(sum, cost))
        found.setdefault(phase, {})[name] = {
            "cpu_seconds": round(took, 3),
            "idle_share": round(1 - worked / len(everyone) / took, 3),
        }
    return found


def main():
    path = ROOT / "bench" / "scheduling.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if "--measure" in sys.argv:
        result["measured on two CPU ranks"] = measure() | {"machine": machine()}
        print(json.dumps(result["measured on two CPU ranks"], indent=1))
    else:
        began = time.time()
        result |= simulate()
        print(json.dumps(result, indent=1))
        print(f"{time.time() - began:.0f} s")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
