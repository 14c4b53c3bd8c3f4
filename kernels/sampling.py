"""Draws one token per row of logits, with its log-probability, from one given uniform number per row.

    p = softmax(logits / temperature);   kept = top-k, then top-p of p
    token = first t with cumsum(p * kept)[t] > uniform * sum(p * kept)

The randomness comes in as `uniform`, so a draw is a pure function: a row gives the same token whatever it is batched
with. The log-probability is of the full tempered softmax, the quantity the trainer computes; top-k and top-p only
restrict what can be drawn. Equal logits at the edge of top-k or top-p are kept together, so ties need no order.
The CPU path sorts each row; the kernel does not, it finds the thresholds by bisection.
"""

import numpy as np
import torch
import torch.nn.functional as F

from kernels.dispatch import tl, triton, use_triton

# B rows   V vocabulary

WIDTH = 32  # of a block on the CPU path


def sample_tokens_ref(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """The definition, which is also the CPU path."""
    logits, vocab = logits.float(), logits.shape[-1]
    if temperature == 0:
        logprob, token = torch.log_softmax(logits, dim=-1).max(dim=-1)
        return token, logprob
    logits = logits / temperature if temperature != 1 else logits
    probs = logits.softmax(-1)
    if top_p < 1.0 or 0 < top_k < vocab:
        # SIMD: 8 times faster than torch.sort
        ascending = torch.from_numpy(np.sort(probs.numpy(), axis=-1))
        if 0 < top_k < vocab:
            ascending.masked_fill_(ascending < ascending[:, vocab - top_k, None], 0.0)
        mass = ascending.cumsum(-1)
        # while the better ones together are below the goal
        stays = mass[:, -1:] - mass < top_p * mass[:, -1:]
        probs.masked_fill_(probs < ascending.gather(1, stays.int().argmax(-1, keepdim=True)), 0.0)
    # By blocks: running sums are slow, they add one number after the other, and only one block of a
    # row needs them.
    blocks = (F.pad(probs, (0, -vocab % WIDTH)) if vocab % WIDTH else probs).view(
        len(probs), -1, WIDTH
    )
    masses = blocks.sum(-1)
    ends = masses.cumsum(-1)
    below = uniform[:, None] * ends[:, -1:]
    block = first_above(ends, below)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, WIDTH))[:, 0]
    at = first_above(
        inside.cumsum(-1), (below - ends.gather(1, block) + masses.gather(1, block)).clamp_(min=0.0)
    )
    return (block * WIDTH + at)[:, 0], inside.gather(1, at).log()[:, 0]


def first_above(sums, below):
    """[B, 1]: where the running sums [B, N] first pass below [B, 1], which is not negative; what is added there is above 0, also if rounding has
    taken below to the last sum."""
    return torch.searchsorted(
        sums, torch.minimum(below, sums[:, -1:].nextafter(sums.new_zeros(()))), right=True
    )


@triton.jit
def load_block(row_ptr, start, inverse_temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """One block of tempered logits in fp32; -inf, that is probability 0, past the end."""
    cols = start + tl.arange(0, BLOCK)
    z = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    return z * inverse_temperature, cols


@triton.jit
def order_key(z):
    """fp32 -> int32 of the same order, so that a threshold can be bisected exactly in at most 32 steps."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def amount_at_or_above(
    row_ptr, key, m, inverse_temperature, MASS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    """How many logits have at least this key (MASS: their sum of exp(z - m))."""
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
    """The largest key with amount_at_or_above(key) >= goal, in [low, high)."""
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
    # logprobs = log_softmax(logits / temperature): running max m and sum s, and where the max
    # stands
    m, s, best = -float("inf"), 0.0, 0
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
        # kept = top-k, then top-p of what top-k left
        low = tl.full([], -2147483648, tl.int64)
        high = order_key(m).to(tl.int64) + 1
        if TOP_K:
            low = threshold(row_ptr, low, high, top_k, m, inverse_temperature, False, V, BLOCK)
        if TOP_P:
            goal = top_p * amount_at_or_above(row_ptr, low, m, inverse_temperature, True, V, BLOCK)
            low = threshold(row_ptr, low, high, goal, m, inverse_temperature, True, V, BLOCK)
        # token = first t with cumsum(p * kept)[t] > uniform * mass
        below = tl.load(uniform_ptr + row) * amount_at_or_above(
            row_ptr, low, m, inverse_temperature, True, V, BLOCK
        )
        done, token, last = 0.0, V, 0
        for start in range(0, V, BLOCK):
            z, cols = load_block(row_ptr, start, inverse_temperature, V, BLOCK)
            p = tl.where((order_key(z) >= low) & (cols < V), tl.exp(z - m), 0.0)
            reached = (done + tl.cumsum(p, 0) > below) & (p > 0.0)
            token = tl.minimum(token, tl.min(tl.where(reached, cols, V)))
            last = tl.maximum(last, tl.max(tl.where(p > 0.0, cols, 0)))
            done += tl.sum(p)
        token = tl.minimum(token, last)  # rounding may leave the end of the CDF short of `below`
    # logprob = logprobs[token]
    chosen = tl.load(row_ptr + token).to(tl.float32) * inverse_temperature
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, chosen - m - tl.log(s))


def sample_tokens(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """logits [B, V], uniform [B] in [0, 1) -> (token [B] int64, logprob [B] fp32 under the full tempered softmax).

    temperature 0 takes the best token (logprob then at temperature 1); top_k 0 and top_p 1 switch the limits off.
    """
    if not use_triton(logits, uniform):
        return sample_tokens_ref(logits, uniform, temperature, top_p, top_k)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
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
