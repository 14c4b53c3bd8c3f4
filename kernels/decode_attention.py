"""Attention of one new token per row over a KV cache, which the sampler runs in every layer.

    out[b, n] = sum over s of softmax_s(scale * q[b, n] . k[b, n // G, s]) * v[b, n // G, s]
                over the slots start[b] <= s < length,    scale = H^-0.5

G = N / K query heads read the same key head. Rows are right-aligned: all rows write the same slot,
and a row with a shorter prompt starts later. What lies before the start of a row or from `length`
on is never read by the kernel (it may be anything, NaN too).

The work is to read the cache once: 4 flops per cached number and query head. So a program takes one
key head of one row and all G query heads that share it. A few long rows would then leave most of
the GPU idle, so each row is cut into splits of SPLIT slots, and each split is a program of its own;
a second kernel joins the splits (flash-decoding). The partial sums add 3% to the traffic at G = 4,
H = 128.

Splits and blocks are counted from the row's own start and have a fixed size. So the order of the
sums, and with it every bit of a row's result, does not depend on what the row is batched with.

There is no backward: nothing is trained through the sampler.
"""

import torch

from kernels.attention import LOG2E, attend, load_rows, model_constants, store_rows
from kernels.dispatch import cast, tl, triton, use_triton, widen

# B rows   N query heads   K key heads   H head width   S cache slots   G = N / K

# Slots per split, and slots that a program loads at a time.
SPLIT = 256
BLOCK = 64


def slot_bias(start, length, slots, heads=1):
    """[B, heads, slots] to add to the scores: 0 on a row's slots start <= s < length, else -inf.

    With heads = K, decode_attention reads the result as it lies; with heads = 1 it makes a copy in
    each call.
    """
    slot = torch.arange(slots, device=start.device)
    outside = (slot < start[:, None, None]) | (slot >= length)
    bias = torch.zeros(len(start), heads, slots, device=start.device)
    return bias.masked_fill_(outside, -torch.inf)


def decode_attention_ref(q, k_cache, v_cache, start, length, bias=None):
    """The definition, which is also the CPU path; arguments as in decode_attention.

    The G query heads that share a key head are the rows of one small product with its keys. That
    needs no copies and is much faster than PyTorch's fused attention, which is made for long
    queries. The product runs over all slots, in use or not, so unused slots must hold numbers, not
    NaN. A product with only the used part of each row would read memory with gaps and take two to
    three times as long.
    """
    B, N, H = q.shape
    K, S = k_cache.shape[1:3]
    if bias is None:
        bias = slot_bias(start, length, S)
    bias = cast(bias, q.dtype).expand(B, K, S).reshape(B * K, 1, S)

    # scores [B * K, G, S]
    queries = q.reshape(B * K, -1, H)
    keys = k_cache.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(bias, queries, keys, alpha=H**-0.5)

    # out [B * K, G, H], that is [B, N, H]
    weights = cast(widen(scores).softmax(-1), v_cache.dtype)
    return torch.bmm(weights, v_cache.flatten(0, 1)).view(B, N, H)


@triton.jit
def decode_split(
    q_ptr,
    k_ptr,
    v_ptr,
    start_ptr,
    out_ptr,
    acc_ptr,
    m_ptr,
    total_ptr,
    k_row_stride,
    k_head_stride,
    k_slot_stride,
    v_row_stride,
    v_head_stride,
    v_slot_stride,
    length_ptr,
    num_splits,
    scale,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    G_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One program per split of one key head of one row.

    WHOLE says that no row has a second split, so the result is final. Otherwise acc, m and total of
    the split are left for decode_join: the unnormalised sum, the max and the sum of the softmax.
    """
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(0) // num_splits % K
    row = (tl.program_id(0) // num_splits // K).to(tl.int64)
    first = tl.load(start_ptr + row).to(tl.int64) + split * SPLIT
    length = tl.load(length_ptr).to(tl.int64)
    # A short row has fewer splits than the longest row.
    if first >= length:
        return

    # q [G, H], padded to at least 16 rows, the least that a tensor core takes
    G: tl.constexpr = N // K
    group = tl.arange(0, G_BLOCK).to(tl.int64)
    head = row * N + kv_head * G
    q = load_rows(q_ptr + head * H, group, G, H, H, H_BLOCK)

    # acc = sum of p * v and total = sum of p over the slots of this split, by the loop of
    # attention.py. Every query is the newest token, so the causal mask of that loop cuts off
    # exactly the slots from `length` on.
    k_ptr += row * k_row_stride + tl.cast(kv_head, tl.int64) * k_head_stride
    v_ptr += row * v_row_stride + tl.cast(kv_head, tl.int64) * v_head_stride
    acc = tl.zeros([G_BLOCK, H_BLOCK], tl.float32)
    m = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    newest = tl.zeros([G_BLOCK], tl.int64) + (length - 1)
    stop = tl.minimum(first + SPLIT, length)
    acc, m, total = attend(
        acc,
        m,
        total,
        q,
        k_ptr,
        v_ptr,
        k_slot_stride,
        v_slot_stride,
        newest,
        length,
        first,
        stop,
        scale,
        True,
        H,
        H_BLOCK,
        BLOCK,
    )

    if WHOLE:
        store_rows(out_ptr + head * H, acc / total[:, None], group, G, H, H, H_BLOCK)
    else:
        # acc [B, N, splits, H], m and total [B, N, splits]
        split_ptr = acc_ptr + (head * num_splits + split) * H
        store_rows(split_ptr, acc, group, G, num_splits * H, H, H_BLOCK)
        place = (head + group) * num_splits + split
        tl.store(m_ptr + place, m, mask=group < G)
        tl.store(total_ptr + place, total, mask=group < G)


@triton.jit
def decode_join(
    acc_ptr,
    m_ptr,
    total_ptr,
    start_ptr,
    out_ptr,
    length_ptr,
    num_splits,
    N: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
):
    """One program per query head of one row: it sums the splits of this head.

    Each split is rescaled from its own max to the common max. The loop takes SPLITS_BLOCK splits at
    a time.
    """
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr)
    splits = tl.cdiv(length - tl.load(start_ptr + head // N), SPLIT)
    acc = tl.zeros([H_BLOCK], tl.float32)
    m = -float("inf")
    total = 0.0
    for first in range(0, splits, SPLITS_BLOCK):
        # split_m and split_total [splits], split_acc [splits, H]
        split = first + tl.arange(0, SPLITS_BLOCK).to(tl.int64)
        mask = split < splits
        place = head * num_splits + split
        split_m = tl.load(m_ptr + place, mask=mask, other=-float("inf"))
        split_total = tl.load(total_ptr + place, mask=mask, other=0.0)
        split_acc = load_rows(acc_ptr + head * num_splits * H, split, splits, H, H, H_BLOCK)

        new_m = tl.maximum(m, tl.max(split_m))
        share = tl.exp2(split_m - new_m)
        shrink = tl.exp2(m - new_m)
        acc = acc * shrink + tl.sum(split_acc * share[:, None], 0)
        total = total * shrink + tl.sum(split_total * share)
        m = new_m

    cols = tl.arange(0, H_BLOCK)
    out = acc / total
    tl.store(out_ptr + head * H + cols, out.to(out_ptr.dtype.element_ty), mask=cols < H)


def decode_attention_triton(q, k_cache, v_cache, start, length):
    """Launch one program per row, key head and split, then one per row and query head to join."""
    B, N, H = q.shape
    K, S = k_cache.shape[1:3]
    q = q.contiguous()
    out = torch.empty_like(q)
    if not isinstance(length, torch.Tensor):
        length = torch.full((1,), length, device=q.device)

    # As many splits as the cache has room for, because only the GPU knows `length`. Programs past
    # `length` end at once.
    splits = triton.cdiv(S, SPLIT)
    if splits > 1:
        acc = q.new_empty(B, N, splits, H, dtype=torch.float32)
        m, total = q.new_empty(2, B, N, splits, dtype=torch.float32)
    else:
        # Nothing is read or written through these pointers, but they must be tensors.
        acc = m = total = out

    sizes = model_constants(q, k_cache)
    decode_split[(B * K * splits,)](
        q,
        k_cache,
        v_cache,
        start,
        out,
        acc,
        m,
        total,
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        length,
        splits,
        H**-0.5 * LOG2E,
        **sizes,
        G_BLOCK=max(16, triton.next_power_of_2(N // K)),
        SPLIT=SPLIT,
        BLOCK=BLOCK,
        WHOLE=splits == 1,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        decode_join[(B * N,)](
            acc,
            m,
            total,
            start,
            out,
            length,
            splits,
            N=N,
            H=H,
            H_BLOCK=sizes["H_BLOCK"],
            SPLIT=SPLIT,
            SPLITS_BLOCK=16,
            num_warps=2,
        )
    return out


def decode_attention(q, k_cache, v_cache, start, length, bias=None):
    """Attention of one token per row, q [B, N, H], over the caches [B, K, S, H] -> [B, N, H].

    The caches may have any strides but the last, which is 1. start [B] int, below length. length is
    an int, or a tensor [1] that is read on the device, so that a captured CUDA graph can be
    replayed for the next token. bias is the slot_bias of all S slots, made once for many calls;
    only the CPU path reads it.
    """
    if not use_triton(q, k_cache, v_cache, start):
        return decode_attention_ref(q, k_cache, v_cache, start, length, bias)
    return decode_attention_triton(q, k_cache, v_cache, start, length)
