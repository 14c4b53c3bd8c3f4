"""Rollouts into packed batches: shares of the ranks, micro-batches, shared prefixes.

A micro-batch holds whole sequences, one behind another, without padding. mathrl.py, section 5,
shows one.

    T tokens of a packed micro-batch; entry t of every per-token tensor is about token t
    U tokens among them whose past is unlike that of all tokens before them
"""

import dataclasses

import numpy as np
import torch

from lib.common import all_gather


# ---- 1. Which rank trains on what ----------------------------------------------------------------
def num_tokens(rollout):
    """Length of a rollout's sequence: prompt and completion."""
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def balance(rollouts, world):
    """This rank's share of all ranks' rollouts that have a gradient, so that ranks have equal
    work."""
    if world == 1:
        return rollouts
    # Rollouts travel without what training does not need: the data row, the text, the reward's
    # future.
    mine = [
        dataclasses.replace(r, row={}, text="", pending=None) for r in rollouts if r.advantage != 0
    ]
    groups = {}
    for rank, part in enumerate(all_gather(mine)):
        for r in part:
            r.group = (rank, r.group)
            groups.setdefault(r.group, []).append(r)

    # Deal single rollouts, or whole groups where prompts are long: the smaller largest share wins.
    singles = [[r] for group in groups.values() for r in group]
    largest_by_single, by_single = assign_to_ranks(singles, world)
    largest_by_group, by_group = assign_to_ranks(groups.values(), world)
    shares = by_single if largest_by_single <= largest_by_group else by_group
    return shares[torch.distributed.get_rank()]


def assign_to_ranks(units, world):
    """(tokens of the largest share, shares): greedy bin packing of lists of rollouts of one prompt.

    The longest unit goes first, each to the rank that then has the fewest tokens. A rank computes a
    prompt once, so its tokens count once there.
    """
    shares = [[] for _ in range(world)]
    tokens = [0] * world
    prompts = [set() for _ in range(world)]

    def longest_first(unit):
        return -sum(num_tokens(r) for r in unit), unit[0].seed

    for unit in sorted(units, key=longest_first):
        group = unit[0].group
        completion_tokens = sum(len(r.completion_ids) for r in unit)
        # What every rank would have with this unit on top.
        loads = []
        for rank in range(world):
            prompt_tokens = 0 if group in prompts[rank] else len(unit[0].prompt_ids)
            loads.append(tokens[rank] + completion_tokens + prompt_tokens)
        rank = loads.index(min(loads))
        shares[rank] += unit
        tokens[rank] = loads[rank]
        prompts[rank].add(group)
    return max(tokens), shares


# ---- 2. Micro-batches ----------------------------------------------------------------------------
def split_by_budget(items, length, budget):
    """Lists of consecutive items whose lengths sum to at most `budget`; a longer item stands
    alone."""
    packs = []
    room = 0
    for item in items:
        if length(item) > room:
            packs.append([])
            room = budget
        packs[-1].append(item)
        room -= length(item)
    return packs


def collate(rollouts, cfg, device):
    """Packed micro-batches of at most cfg.micro_batch_tokens tokens each.

    Rollouts with advantage 0 have no gradient and are left out; their tokens stay in the
    denominator of the loss, which train_step counts before.
    """
    # Long sequences first, and rollouts of one prompt together, so that the prompt is computed
    # once.
    groups = {}
    with_gradient = [r for r in rollouts if r.advantage != 0]
    for r in sorted(with_gradient, key=num_tokens, reverse=True):
        groups.setdefault(tuple(r.prompt_ids), []).append(r)
    in_order = [r for group in groups.values() for r in group]
    packs = split_by_budget(in_order, num_tokens, cfg.micro_batch_tokens)
    return [pack_rollouts(pack, device) for pack in packs]


def pack_rollouts(rollouts, device):
    """One micro-batch: [prompt 1, completion 1, prompt 2, completion 2, ...] as flat tensors.

    Masks come from the lengths that the sampler recorded, never from token ids. The result is a
    dictionary that model.token_logprobs reads, with advantages and log-probs beside it.
    """
    sequences = [r.prompt_ids + r.completion_ids for r in rollouts]
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    total = cu_seqlens[-1]

    advantages_T = np.zeros(total, np.float32)
    sampler_logprobs_T = np.zeros(total, np.float32)
    teacher_logprobs_T = np.zeros(total, np.float32)
    completions = []
    for r, end in zip(rollouts, cu_seqlens[1:], strict=True):
        completion = np.arange(end - len(r.completion_ids), end)
        completions.append(completion)
        advantages_T[completion] = r.advantage
        sampler_logprobs_T[completion] = r.sampler_logprobs
        teacher_logprobs_T[completion] = r.teacher_logprobs or 0.0

    def tensor(array, dtype=None):
        return torch.as_tensor(array, dtype=dtype).to(device)

    return {
        "input_ids_T": tensor(np.concatenate(sequences)),
        "cu_seqlens": tensor(cu_seqlens, torch.int32),
        "max_seqlen": max(lengths),
        "loss_index": tensor(np.concatenate(completions)),
        "shared": shared_prefixes(sequences, device),
        "advantages_T": tensor(advantages_T),
        "sampler_logprobs_T": tensor(sampler_logprobs_T),
        "teacher_logprobs_T": tensor(teacher_logprobs_T),
    }


def shared_prefixes(sequences, device):
    """(first_U, copy_T) of sequences packed one behind another, or None where it saves under a
    tenth.

    [[5, 6, 7], [5, 6, 8]] -> first_U [0, 1, 2, 5], copy_T [0, 1, 2, 0, 1, 3]: tokens 3 and 4
    repeat tokens 0 and 1 and their past, so the layers compute four tokens instead of six.
    first_U: one position per distinct prefix. copy_T[t]: which entry of first_U token t equals.
    """
    starts = np.cumsum([0, *map(len, sequences)])
    copy_T = np.arange(starts[-1])
    # In sorted order no sequence has a longer prefix in common with b than the one just before it.
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i], i))
    for a, b in zip(order, order[1:]):
        length = common_prefix_length(sequences[a], sequences[b])
        copy_T[starts[b] : starts[b] + length] = copy_T[starts[a] : starts[a] + length]
    first_U, copy_T = np.unique(copy_T, return_inverse=True)
    if len(first_U) >= 0.9 * len(copy_T):
        return None
    return torch.from_numpy(first_U).to(device), torch.from_numpy(copy_T).to(device)


def common_prefix_length(a, b):
    """How many tokens two sequences have in common at their beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
