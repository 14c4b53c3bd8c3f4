"""Rollouts into packed batches: shares of the ranks, micro-batches without padding, shared prefixes computed once.

T is the number of tokens of a packed micro-batch; entry t of every per-token tensor is about token t.
"""

import dataclasses

import numpy as np
import torch

from lib.common import all_gather


def assign_to_ranks(units, world):
    """(largest number of tokens on a rank, shares): the largest unit goes first, each to the rank that then has the fewest tokens. A rank
    computes a prompt once, so it counts once there."""
    shares, tokens, there = [[] for _ in range(world)], [0] * world, [set() for _ in range(world)]
    for unit in sorted(
        units,
        key=lambda unit: (
            -sum(len(r.prompt_ids) + len(r.completion_ids) for r in unit),
            unit[0].seed,
        ),
    ):
        sums = [
            n
            + sum(len(r.completion_ids) for r in unit)
            + (unit[0].group not in groups) * len(unit[0].prompt_ids)
            for n, groups in zip(tokens, there)
        ]
        rank = sums.index(min(sums))
        shares[rank] += unit
        tokens[rank] = sums[rank]
        there[rank].add(unit[0].group)
    return max(tokens), shares


def balance(rollouts, world):
    """This rank's share of all ranks' rollouts with a gradient: dealt one by one, or by whole groups where prompts are long."""
    if world == 1:
        return rollouts
    groups = {}
    for rank, part in enumerate(
        all_gather(
            [dataclasses.replace(r, row={}, text="", pending=None) for r in rollouts if r.advantage]
        )
    ):
        for r in part:
            r.group = (rank, r.group)
            groups.setdefault(r.group, []).append(r)
    ways = [[r] for group in groups.values() for r in group], groups.values()
    return min((assign_to_ranks(units, world) for units in ways), key=lambda way: way[0])[1][
        torch.distributed.get_rank()
    ]


def split_by_budget(items, length, budget):
    """Lists of consecutive items, as long as their lengths sum to at most `budget`; a longer item stands alone."""
    packs, room = [], 0
    for item in items:
        if length(item) > room:
            packs.append([])
            room = budget
        packs[-1].append(item)
        room -= length(item)
    return packs


def collate(rollouts, cfg, device):
    """Packed micro-batches of at most micro_batch_tokens each, equal prompts together, long sequences first. Rollouts with advantage 0
    have no gradient and are left out here (their tokens stay in the denominator). Masks come from recorded lengths only."""
    groups, length = {}, lambda r: len(r.prompt_ids) + len(r.completion_ids)
    for r in sorted((r for r in rollouts if r.advantage), key=length, reverse=True):
        groups.setdefault(tuple(r.prompt_ids), []).append(r)
    return [
        pack_rollouts(pack, device)
        for pack in split_by_budget(
            (r for group in groups.values() for r in group), length, cfg.micro_batch_tokens
        )
    ]


def shared_prefixes(sequences, device):
    """(first_U, copy_T) of sequences that are packed one behind another: the places of the first tokens with their past, and for every
    token which of them it equals, or None where that saves less than a tenth. [[5, 6, 7], [5, 6, 8]] -> [0, 1, 2, 5], [0, 1, 2, 0, 1, 3]."""
    starts = np.cumsum([0, *map(len, sequences)])
    copy_T, order = (
        np.arange(starts[-1]),
        sorted(range(len(sequences)), key=lambda i: (sequences[i], i)),
    )
    # sorted: nobody has a longer prefix in common with b than the one before it
    for a, b in zip(order, order[1:]):
        pairs = enumerate(zip(sequences[a], sequences[b]))
        length = next(
            (i for i, (x, y) in pairs if x != y), min(len(sequences[a]), len(sequences[b]))
        )
        copy_T[starts[b] : starts[b] + length] = copy_T[starts[a] : starts[a] + length]
    first_U, copy_T = np.unique(copy_T, return_inverse=True)
    return (
        (torch.from_numpy(first_U).to(device), torch.from_numpy(copy_T).to(device))
        if len(first_U) < 0.9 * len(copy_T)
        else None
    )


def pack_rollouts(rollouts, device):
    """One micro-batch: [p1 c1 p2 c2 ...] flat, with the offsets of the sequences and the positions of completion tokens."""
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    index = [
        np.arange(end - len(r.completion_ids), end)
        for r, end in zip(rollouts, cu_seqlens[1:], strict=True)
    ]
    advantages_T, sampler_logprobs_T, teacher_logprobs_T = np.zeros((3, cu_seqlens[-1]), np.float32)
    for r, where in zip(rollouts, index, strict=True):
        advantages_T[where], sampler_logprobs_T[where], teacher_logprobs_T[where] = (
            r.advantage,
            r.sampler_logprobs,
            r.teacher_logprobs or 0.0,
        )
    tensor = lambda x, dtype=None: torch.as_tensor(x, dtype=dtype).to(device)
    return {
        "input_ids_T": tensor(np.concatenate([r.prompt_ids + r.completion_ids for r in rollouts])),
        "cu_seqlens": tensor(cu_seqlens, torch.int32),
        "max_seqlen": max(lengths),
        "loss_index": tensor(np.concatenate(index)),
        "shared": shared_prefixes([r.prompt_ids + r.completion_ids for r in rollouts], device),
        "advantages_T": tensor(advantages_T),
        "sampler_logprobs_T": tensor(sampler_logprobs_T),
        "teacher_logprobs_T": tensor(teacher_logprobs_T),
    }
