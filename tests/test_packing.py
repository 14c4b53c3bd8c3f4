"""Packs of equal cost: each sequence once, within the budget, and no rank waits for another.

The greedy filling is compared with a plain loop that is slow and obvious. What it saves at real
sizes is in bench/scheduling.py; tests/test_shard.py has four processes.
"""

import random

import numpy as np
import pytest

from lib.packing import ATTENTION_TOKENS, Unit, attention_cost, equal_packs, fill_packs


def units_of(lengths, prompts=None):
    """A Unit for each length. With prompts, sequence i begins with prompt i % prompts."""
    units = []
    for i, n in enumerate(lengths):
        prompt = i % prompts if prompts else -1
        shared = 40.0 if prompts else 0.0
        units.append(Unit([i], int(n), n + attention_cost(n) - shared, prompt, shared))
    return units


def slow_fill(units, budget, num_packs):
    """fill_packs as a loop over packs: of those with room, take the one that is then cheapest."""
    packs = [{"members": [], "tokens": 0, "cost": 0.0, "prompts": set()} for _ in range(num_packs)]
    for unit in units:
        best, best_cost = None, None
        for pack in packs:
            cost = pack["cost"] + unit.cost
            if unit.prompt not in pack["prompts"]:
                cost += unit.prompt_cost
            has_room = pack["tokens"] + unit.num_tokens <= budget or not pack["members"]
            if has_room and (best is None or cost < best_cost):
                best, best_cost = pack, cost
        if best is None:
            return None
        best["members"] += unit.sequences
        best["tokens"] += unit.num_tokens
        best["cost"] = best_cost
        best["prompts"].add(unit.prompt)
    return [pack["members"] for pack in packs], [pack["cost"] for pack in packs]


@pytest.mark.parametrize("prompts", [None, 5])
def test_the_filling_is_that_of_a_plain_loop(prompts):
    draw = random.Random(0)
    num_full = 0
    for _ in range(60):
        lengths = [draw.randint(50, 400) for _ in range(draw.randint(1, 40))]
        units = units_of(lengths, prompts)
        num_packs = draw.randint(1, 12)
        expected = slow_fill(units, 1000, num_packs)
        found = fill_packs(units, 1000, num_packs)
        if expected is None:
            num_full += 1
            assert found is None
            continue
        assert found[0] == expected[0]
        assert found[1].tolist() == pytest.approx(expected[1])
    assert 5 < num_full < 55, "both outcomes were met"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_packs_hold_each_sequence_once_within_the_budget_and_ranks_get_as_many(world):
    draw = random.Random(world)
    lengths = [draw.randint(10, 700) for _ in range(50)] + [2500]
    packs, cost = equal_packs(units_of(lengths), 1000, world)
    assert len(packs) % world == 0
    assert sorted(i for pack in packs for i in pack) == list(range(51))
    for pack in packs:
        assert sum(lengths[i] for i in pack) <= 1000 or pack == [50], "a longer one stands alone"
    costs = [sum(lengths[i] + lengths[i] ** 2 / ATTENTION_TOKENS for i in pack) for pack in packs]
    assert costs == sorted(costs, reverse=True)
    assert cost == pytest.approx(sum(costs[::world]))


def test_ranks_without_a_sequence_get_an_empty_pack_at_the_end():
    packs, _ = equal_packs(units_of([5, 9]), 1000, 4)
    assert packs == [[1], [0], [], []]


def test_no_rank_waits_at_the_lengths_of_a_real_run():
    """Conversations of SFT and completions of RL: the step costs at most 2% and 6% more than if all
    ranks were busy to its end, as many micro-batches as there must be included."""
    draw = np.random.default_rng(0)
    for name, mean, count, longest, budget, limit in (
        ("RL, 24K", 8400, 560, 24576, 32768, 1.02),
        ("SFT, 16K", 2800, 256, 16384, 16384, 1.06),
    ):
        lengths = draw.lognormal(0, 0.65, count)
        lengths = np.minimum(lengths * mean / lengths.mean(), longest).astype(int)
        packs, cost = equal_packs(units_of(lengths), budget, 8)
        ideal = sum(n + attention_cost(n) for n in lengths) / 8
        print(f"{name}: {len(packs)} packs, {cost / ideal:.3f} of the ideal, tolerance {limit}")
        assert cost < limit * ideal
