"""Sequences into packed micro-batches of equal cost for all ranks, with shared prefixes.

A micro-batch holds whole sequences, one behind another, without padding. mathrl.py, section 5,
shows one.

    T tokens of a packed micro-batch; entry t of every per-token tensor is about token t
    U tokens among them whose past is unlike that of all tokens before them
    P packs of a step, over all ranks
"""

import dataclasses

import numpy as np
import torch

from lib.common import all_gather, ranks

# Attention in a sequence of this many tokens costs as much as all matrix products do. It follows
# from the arithmetic of Qwen3-8B at half the products' rate; the packing depends on it only weakly.
ATTENTION_TOKENS = 24_000


# ---- 1. Packs of equal cost ----------------------------------------------------------------------
@dataclasses.dataclass
class Unit:
    """Sequences that are packed as one: a single one, or several samples of a prompt."""

    sequences: list
    num_tokens: int  # of all of them: this counts against the budget of a micro-batch
    # in tokens' worth of matrix products, attention included, without that of the prompt
    cost: float
    prompt: int = -1  # number of the prompt that the sequences begin with; -1: none is shared
    prompt_cost: float = 0.0  # due once in every pack that holds sequences of this prompt


def attention_cost(num_tokens):
    """Cost of attention in a sequence: it grows with the square of the length."""
    return num_tokens**2 / ATTENTION_TOKENS


def equal_packs(units, budget, world):
    """(packs, cost of a step): lists of sequences, costliest pack first, for [rank::world].

    The packs are a multiple of `world` and have at most `budget` tokens each; a longer unit stands
    alone. FSDP ties the ranks together layer by layer, so a step costs the sum over micro-batches
    of the costliest rank. It is least if the packs are filled over all ranks, costliest unit first,
    each into the pack that is then cheapest. Packs that stay empty come last.
    """
    total = sum(min(unit.num_tokens, budget) for unit in units)
    num_packs = world * max(1, -(-total // (budget * world)))
    costliest_first = sorted(units, key=lambda unit: -unit.cost - unit.prompt_cost)
    filled = fill_packs(costliest_first, budget, num_packs)
    while filled is None:
        num_packs += world
        filled = fill_packs(costliest_first, budget, num_packs)
    packs, cost_P = filled
    order = np.argsort(-cost_P, kind="stable")
    return [packs[i] for i in order], cost_P[order][::world].sum()


def fill_packs(units, budget, num_packs):
    """(packs, their costs [P]) of the units in this order, or None if they do not fit."""
    packs = [[] for _ in range(num_packs)]
    room_P = np.full(num_packs, budget)
    cost_P = np.zeros(num_packs)
    has_prompt = {}  # number of a prompt: which packs hold it already [P]
    for unit in units:
        holds_P = has_prompt.setdefault(unit.prompt, np.zeros(num_packs, bool))
        after_P = cost_P + unit.cost + unit.prompt_cost * ~holds_P
        # An empty pack takes a unit of any length.
        fits_P = (room_P >= unit.num_tokens) | (room_P == budget)
        if not fits_P.any():
            return None
        chosen = np.where(fits_P, after_P, np.inf).argmin()
        packs[chosen] += unit.sequences
        room_P[chosen] -= unit.num_tokens
        cost_P[chosen] = after_P[chosen]
        holds_P[chosen] = True
    return packs, cost_P


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


# ---- 2. Micro-batches of rollouts ----------------------------------------------------------------
def num_tokens(rollout):
    """Length of a rollout's sequence: prompt and completion."""
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def collate(rollouts, cfg, device):
    """(batches, num_real): this rank's micro-batches, from the rollouts of all ranks together.

    Every rank gets as many, of at most cfg.micro_batch_tokens tokens each, and at every place the
    ranks' micro-batches cost about the same. Those from num_real on are dummies for a rank that has
    run out of rollouts. Rollouts with advantage 0 have no gradient and are left out; their tokens
    stay in the denominator of the loss, which train_step counts before.
    """
    rank, world = ranks()
    everyone = [r for r in rollouts if r.advantage != 0]
    if world > 1:
        # Rollouts travel without what training does not need: the data row, the text, the future of
        # the reward.
        light = [dataclasses.replace(r, row={}, text="", pending=None) for r in everyone]
        everyone = [r for part in all_gather(light) for r in part]
    if not everyone:
        return [], 0
    packs = pack_prompts(everyone, cfg.micro_batch_tokens, world)[rank::world]
    num_real = sum(len(pack) > 0 for pack in packs)
    dummy = [min(everyone, key=num_tokens)]
    return [pack_rollouts(pack or dummy, device) for pack in packs], num_real


def pack_prompts(rollouts, budget, world):
    """equal_packs of rollouts. In a pack, those of one prompt share it and stand side by side."""
    groups = {}
    for r in sorted(rollouts, key=num_tokens, reverse=True):
        groups.setdefault(tuple(r.prompt_ids), []).append(r)
    number_of = {prompt: number for number, prompt in enumerate(groups)}
    # Pack single rollouts, or, where prompts are long, as many of a group as fit: the one whose
    # step costs less.
    singles = [unit_of([r], n) for n, group in enumerate(groups.values()) for r in group]
    parts = []
    for n, group in enumerate(groups.values()):
        parts += [unit_of(part, n) for part in split_by_budget(group, num_tokens, budget)]
    by_single, cost_by_single = equal_packs(singles, budget, world)
    by_part, cost_by_part = equal_packs(parts, budget, world)
    packs = by_single if cost_by_single <= cost_by_part else by_part

    def prompt_number(r):
        return number_of[tuple(r.prompt_ids)]

    return [sorted(pack, key=prompt_number) for pack in packs]


def unit_of(rollouts, prompt):
    """Rollouts of one prompt as a Unit. Attention sees every sequence whole, prompt included."""
    cost = sum(len(r.completion_ids) + attention_cost(num_tokens(r)) for r in rollouts)
    total = sum(num_tokens(r) for r in rollouts)
    return Unit(rollouts, total, cost, prompt, len(rollouts[0].prompt_ids))


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
