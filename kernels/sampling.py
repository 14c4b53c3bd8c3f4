"""Draw one token per row of logits, and its log-probability, from one given uniform number per row.

    p     = softmax(logits / temperature)
    kept  = top-k of p, then top-p of what top-k left
    token = first t with cumsum(p * kept)[t] > uniform * sum(p * kept)

The randomness comes in as `uniform`, so a draw is a pure function: a row gives the same token
whatever it is batched with. The log-probability is of the full tempered softmax, the quantity that
the trainer computes; top-k and top-p only restrict what can be drawn. Equal logits at the edge of
top-k or top-p are kept together, so ties need no order.

The CPU path sorts each row. The kernel does not sort. It searches for the smallest p that is kept:
9 passes over a row at most for top-p (10 for top-k), and 2 or 3 where few tokens are likely.
"""

import numpy as np
import torch
import torch.nn.functional as F

from kernels.dispatch import tl, triton, use_triton

# B rows   V vocabulary

# The CPU path sums probabilities in blocks of this many tokens.
WIDTH = 32

# The kernel reads a row in blocks of BLOCK tokens. Its search tries TRIES values in a pass, with
# smaller blocks, because a program keeps a running sum for every value and place in the block.
BLOCK = 4096
TRIES = 8
TRIES_BLOCK = 1024


def sample_tokens_ref(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """The definition, which is also the CPU path; arguments as in sample_tokens."""
    logits = logits.float()
    vocab = logits.shape[-1]
    if temperature == 0:
        logprob, token = torch.log_softmax(logits, dim=-1).max(dim=-1)
        return token, logprob

    # The tempered softmax, [B, V].
    if temperature != 1:
        logits = logits / temperature
    probs = logits.softmax(-1)

    if top_p < 1.0 or 0 < top_k < vocab:
        drop_unlikely_(probs, top_p, top_k)
    return draw(probs, uniform)


def drop_unlikely_(probs, top_p, top_k):
    """Set to 0, in place, the probabilities [B, V] that top-k and then top-p exclude."""
    vocab = probs.shape[-1]
    # NumPy sorts with SIMD instructions, 8 times faster than torch.sort.
    ascending = torch.from_numpy(np.sort(probs.numpy(), axis=-1))

    # top-k: everything below the k-th largest probability goes.
    if 0 < top_k < vocab:
        kth_largest = ascending[:, vocab - top_k, None]
        ascending.masked_fill_(ascending < kth_largest, 0.0)

    # top-p: a probability stays while the larger ones together are below the goal.
    mass = ascending.cumsum(-1)
    total = mass[:, -1:]
    mass_of_larger = total - mass
    stays = mass_of_larger < top_p * total
    # argmax returns the first position that stays: in ascending order, the smallest probability.
    smallest = ascending.gather(1, stays.int().argmax(-1, keepdim=True))
    probs.masked_fill_(probs < smallest, 0.0)


def draw(probs, uniform):
    """The token where the running sum of a row first passes uniform * its total, and log p of it.

    probs [B, V], which need not sum to 1, uniform [B] -> (token [B], logprob [B]). A running sum is
    slow, because it adds one number after the other. So the row is cut into blocks: a running sum
    over the blocks finds the block, a second one inside that block finds the token.
    """
    # blocks [B, V / WIDTH, WIDTH], the last one filled up with zeros; masses [B, V / WIDTH]
    padding = -probs.shape[-1] % WIDTH
    if padding:
        probs = F.pad(probs, (0, padding))
    blocks = probs.view(len(probs), -1, WIDTH)
    masses = blocks.sum(-1)

    # The block in which the running sum passes `below`, [B, 1].
    ends = masses.cumsum(-1)
    below = uniform[:, None] * ends[:, -1:]
    block = first_above(ends, below)

    # inside [B, WIDTH]: the probabilities of that block. Subtract what lies before the block.
    inside = blocks.gather(1, block[..., None].expand(-1, -1, WIDTH))[:, 0]
    below_inside = below - ends.gather(1, block) + masses.gather(1, block)
    column = first_above(inside.cumsum(-1), below_inside.clamp_(min=0.0))

    token = (block * WIDTH + column)[:, 0]
    logprob = inside.gather(1, column).log()[:, 0]
    return token, logprob


def first_above(sums, below):
    """[B, 1]: where the running sums [B, N] first exceed below [B, 1], which is not negative.

    The number added at that place is above 0, so no excluded token is drawn. Rounding may bring
    `below` up to the last sum, so it is held one step under that sum.
    """
    just_under_last = sums[:, -1:].nextafter(sums.new_zeros(()))
    return torch.searchsorted(sums, torch.minimum(below, just_under_last), right=True)


@triton.jit
def probabilities(row_ptr, start, top, inverse_temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, 1]: p = exp((logit - top) / temperature) of one block; past the end of the row 0.

    `top` is the largest logit of the row. So p is the softmax times a factor, and the best token
    has 1. Every pass over the row computes the same bits.
    """
    cols = start + tl.arange(0, BLOCK)[:, None]
    logit = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    return tl.exp((logit - top) * inverse_temperature)


@triton.jit
def threshold(
    row_ptr,
    top,
    inverse_temperature,
    low,
    goal,
    MASS: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TRIES: tl.constexpr,
):
    """The largest p such that the tokens with this p or more reach the goal: in number, or with
    MASS in sum. At `low` they have to reach it.

    Floats that are not negative are in the order of their bits, so this is a search for an integer.
    A pass over the row tries TRIES values at once, and one of the TRIES + 1 parts between them
    remains.
    """
    # The goal is reached at `low`. It is not at `high`, which is above every p.
    low = tl.full([], low, tl.float32).to(tl.int32, bitcast=True)
    high = tl.full([], 1.0, tl.float32).to(tl.int32, bitcast=True) + 1
    while high - low > 1:
        step = (high - low + TRIES) // (TRIES + 1)
        tries = tl.minimum(low + step * (1 + tl.arange(0, TRIES)[None, :]), high - 1)
        tried_p = tries.to(tl.float32, bitcast=True)
        low_p = low.to(tl.float32, bitcast=True)
        high_p = high.to(tl.float32, bitcast=True)

        # One pass: the amount at or above each value, the lowest p from low on, and the highest p
        # below high. A `where` around the addition is one instruction less than one inside it.
        amounts = tl.zeros([BLOCK, TRIES], tl.float32)
        lowest = tl.full([BLOCK, 1], 1.0, tl.float32)
        highest = tl.zeros([BLOCK, 1], tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            p = probabilities(row_ptr, start, top, inverse_temperature, V, BLOCK)
            amounts = tl.where(p >= tried_p, amounts + (p if MASS else 1.0), amounts)
            lowest = tl.where(p >= low_p, tl.minimum(lowest, p), lowest)
            highest = tl.where(p < high_p, tl.maximum(highest, p), highest)

        # The range shrinks to the part whose lower end reaches the goal and whose upper end does
        # not, and then to the tokens in the old range. If these all have one p, the search ends.
        reached = tl.sum(amounts, 0)[None, :] >= goal
        low = tl.max(tl.where(reached, tries, low))
        high = tl.min(tl.where(reached, high, tries))
        low = tl.maximum(low, tl.min(lowest).to(tl.int32, bitcast=True))
        high = tl.minimum(high, tl.max(highest).to(tl.int32, bitcast=True) + 1)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def block_masses(
    row_ptr,
    top,
    inverse_temperature,
    floor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """[BLOCKS]: the sum of the kept p of every block."""
    masses = tl.zeros([BLOCKS], tl.float32)
    for block in range(tl.cdiv(V, BLOCK)):
        p = probabilities(row_ptr, block * BLOCK, top, inverse_temperature, V, BLOCK)
        p = tl.where(p >= floor, p, 0.0)
        masses = tl.where(tl.arange(0, BLOCKS) == block, tl.sum(p), masses)
    return masses


@triton.jit
def first_passing(amounts, below, N: tl.constexpr):
    """The first place at which the running sum of amounts [N] passes `below`.

    No place with amount 0 is taken. Rounding may leave the last sum short of `below`: then it is
    the last place with an amount.
    """
    place = tl.arange(0, N)
    passed = (tl.cumsum(amounts, 0) > below) & (amounts > 0.0)
    last = tl.max(tl.where(amounts > 0.0, place, 0))
    return tl.minimum(tl.min(tl.where(passed, place, N)), last)


@triton.jit
def sample_kernel(
    logits_ptr,
    uniform_ptr,
    token_ptr,
    logprob_ptr,
    row_stride,
    inverse_temperature,
    top_p,
    top_k,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TRIES_BLOCK: tl.constexpr,
    TRIES: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride

    # The largest logit, where it stands, and the sum of p, the denominator of the softmax: a
    # running sum, which shrinks whenever a block has a larger logit.
    top = -1e30
    total = 0.0
    token = 0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        logit = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        block_top = tl.max(logit)
        if block_top > top:
            token = start + tl.argmax(logit, 0)
        new_top = tl.maximum(top, block_top)
        total = total * tl.exp((top - new_top) * inverse_temperature)
        total += tl.sum(tl.exp((logit - new_top) * inverse_temperature))
        top = new_top

    if not GREEDY:
        # kept = top-k, then top-p of what top-k left: the tokens whose p is at least `floor`
        floor = 0.0
        mass = total
        if TOP_K:
            floor = threshold(
                row_ptr, top, inverse_temperature, floor, top_k, False, V, TRIES_BLOCK, TRIES
            )
            mass = tl.sum(block_masses(row_ptr, top, inverse_temperature, floor, V, BLOCK, BLOCKS))
        if TOP_P:
            # The mass is 1 or more. Tokens below (1 - top_p) / V together have less than 1 - top_p,
            # so the goal is reached without them.
            low = tl.maximum(floor, (1.0 - top_p) / V)
            floor = threshold(
                row_ptr, top, inverse_temperature, low, top_p * mass, True, V, TRIES_BLOCK, TRIES
            )

        # token = first t with cumsum(p * kept)[t] > uniform * sum(p * kept): first its block
        masses = block_masses(row_ptr, top, inverse_temperature, floor, V, BLOCK, BLOCKS)
        below = tl.load(uniform_ptr + row) * tl.sum(masses)
        block = first_passing(masses, below, BLOCKS)
        mass_before = tl.sum(tl.where(tl.arange(0, BLOCKS) < block, masses, 0.0))
        p = probabilities(row_ptr, block * BLOCK, top, inverse_temperature, V, BLOCK)
        p = tl.where(p >= floor, p, 0.0)
        token = block * BLOCK + first_passing(tl.reshape(p, [BLOCK]), below - mass_before, BLOCK)

    # logprob = log_softmax(logits / temperature)[token]
    chosen = tl.load(row_ptr + token).to(tl.float32)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, (chosen - top) * inverse_temperature - tl.log(total))


def sample_tokens(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """Draw a token per row: logits [B, V], uniform [B] in [0, 1) -> (token [B], logprob [B]).

    token is int64; logprob is fp32, under the full tempered softmax. Temperature 0 takes the best
    token, with its logprob at temperature 1. top_k 0 and top_p 1 switch these limits off.
    """
    if not use_triton(logits, uniform):
        return sample_tokens_ref(logits, uniform, temperature, top_p, top_k)

    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows, vocab = logits.shape
    block = min(BLOCK, triton.next_power_of_2(vocab))
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sample_kernel[(rows,)](
        logits,
        uniform,
        token,
        logprob,
        logits.stride(0),
        1.0 / temperature if temperature > 0 else 1.0,
        top_p,
        top_k,
        GREEDY=temperature == 0,
        TOP_K=0 < top_k < vocab,
        TOP_P=top_p < 1.0,
        V=vocab,
        BLOCK=block,
        BLOCKS=triton.next_power_of_2(triton.cdiv(vocab, block)),
        TRIES_BLOCK=min(TRIES_BLOCK, block),
        TRIES=TRIES,
        num_warps=8,
    )
    return token, logprob
