"""Draw one token per row of logits, and its log-probability, from one given uniform number per row.

    p     = softmax(logits / temperature)
    kept  = top-k of p, then top-p of what top-k left
    token = first t with cumsum(p * kept)[t] > uniform * sum(p * kept)

The randomness comes in as `uniform`, so a draw is a pure function: a row gives the same token
whatever it is batched with. The log-probability is of the full tempered softmax, the quantity that
the trainer computes; top-k and top-p only restrict what can be drawn. Equal logits at the edge of
top-k or top-p are kept together, so ties need no order.

The CPU path sorts each row. The kernel does not sort: it finds the thresholds by bisection.
"""

import numpy as np
import torch
import torch.nn.functional as F

from kernels.dispatch import tl, triton, use_triton

# B rows   V vocabulary

# The CPU path sums probabilities in blocks of this many tokens.
WIDTH = 32


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
def load_block(row_ptr, start, inverse_temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """One block of tempered logits in fp32; past the end -inf, which is probability 0."""
    cols = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    return z * inverse_temperature, cols


@triton.jit
def order_key(z):
    """fp32 -> int32 of the same order: a threshold is bisected exactly in at most 32 steps."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def amount_at_or_above(
    row_ptr, key, m, inverse_temperature, MASS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """The number of logits whose key is at least `key`; with MASS, their sum of exp(z - m)."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, cols = load_block(row_ptr, start, inverse_temperature, V, BLOCK)
        inside = (order_key(z) >= key) & (cols < V)
        total += tl.where(inside, tl.exp(z - m) if MASS else 1.0, 0.0)
    return tl.sum(total)


@triton.jit
def threshold(
    row_ptr,
    low,
    high,
    goal,
    m,
    inverse_temperature,
    MASS: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key in [low, high) with amount_at_or_above(key) >= goal."""
    while high - low > 1:
        middle = low + (high - low) // 2
        if amount_at_or_above(row_ptr, middle, m, inverse_temperature, MASS, V, BLOCK) >= goal:
            low = middle
        else:
            high = middle
    return low


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
):
    """One program per row; a row of 152K logits stays in the L2 cache over its passes."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride

    # For log_softmax: the running max m, the running sum s of exp(z - m), and where the max stands.
    m = -float("inf")
    s = 0.0
    best = 0
    for start in range(0, V, BLOCK):
        z, cols = load_block(row_ptr, start, inverse_temperature, V, BLOCK)
        block_max = tl.max(z)
        if block_max > m:
            best = start + tl.argmax(z, 0)
        new_m = tl.maximum(m, block_max)
        s = s * tl.exp(m - new_m) + tl.sum(tl.exp(z - new_m))
        m = new_m

    token = best
    if not GREEDY:
        # kept = top-k, then top-p of what top-k left: the tokens whose key is at least `low`
        low = tl.full([], -2147483648, tl.int64)
        high = order_key(m).to(tl.int64) + 1
        if TOP_K:
            low = threshold(row_ptr, low, high, top_k, m, inverse_temperature, False, V, BLOCK)
        if TOP_P:
            mass = amount_at_or_above(row_ptr, low, m, inverse_temperature, True, V, BLOCK)
            goal = top_p * mass
            low = threshold(row_ptr, low, high, goal, m, inverse_temperature, True, V, BLOCK)

        # token = first t with cumsum(p * kept)[t] > uniform * sum(p * kept); p is exp(z - m) here
        uniform = tl.load(uniform_ptr + row)
        mass = amount_at_or_above(row_ptr, low, m, inverse_temperature, True, V, BLOCK)
        below = uniform * mass
        done = 0.0
        token = V
        last = 0
        for start in range(0, V, BLOCK):
            z, cols = load_block(row_ptr, start, inverse_temperature, V, BLOCK)
            kept = (order_key(z) >= low) & (cols < V)
            p = tl.where(kept, tl.exp(z - m), 0.0)
            reached = (done + tl.cumsum(p, 0) > below) & (p > 0.0)
            token = tl.minimum(token, tl.min(tl.where(reached, cols, V)))
            last = tl.maximum(last, tl.max(tl.where(p > 0.0, cols, 0)))
            done += tl.sum(p)
        # Rounding may leave the last running sum short of `below`: then take the last kept token.
        token = tl.minimum(token, last)

    # logprob = log_softmax(logits / temperature)[token]
    chosen = tl.load(row_ptr + token).to(tl.float32) * inverse_temperature
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, chosen - m - tl.log(s))


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
        BLOCK=min(4096, triton.next_power_of_2(vocab)),
        num_warps=8,
    )
    return token, logprob
