"""Attention of one new token per row over a KV cache: what the built-in sampler runs in every layer for every token.

    out[b, n] = sum_s softmax_s(H^-0.5 * q[b, n] . k[b, n // G, s]) v[b, n // G, s]     over the slots start[b] <= s < length

G = N / K query heads read the same key head. Rows are right-aligned: all write the same slot, a row with a shorter
prompt starts later, and what lies before its start or from `length` on is never read (it may be anything, NaN too).

The work is reading the cache once: 4 flops per cached number and query head. So a program takes one key head of one
row and all G query heads that share it, and long rows are cut into splits of SPLIT slots, each a program of its own,
or a few long rows would leave most of the GPU idle; a second pass joins the splits (flash-decoding). Splits and blocks
are counted from the row's own start and have a fixed size: the order of the sums, and so every bit of a row's result,
does not depend on what the row is batched with. The partial sums add 3% to the traffic at G = 4, H = 128.

There is no backward: nothing is trained through the sampler.
"""

import torch

from kernels.attention import LOG2E, attend, load_rows, model_constants, store_rows
from kernels.dispatch import cast, tl, triton, use_triton, wide

# B rows   N query heads   K key heads   H head width   S cache slots   G = N / K

SPLIT, BLOCK = 256, 64  # slots of a split, of which a program loads BLOCK at a time


def slot_bias(start, length, slots, heads=1):
    """[B, heads, slots] to add to the scores: 0 on a row's slots start <= s < length, -inf elsewhere. With the K key heads it is read as
    it lies, with one it is copied in each call."""
    slot = torch.arange(slots, device=start.device)
    outside = (slot < start[:, None, None]) | (slot >= length)
    return torch.zeros(len(start), heads, slots, device=start.device).masked_fill_(
        outside, -torch.inf
    )


def decode_attention_ref(q, k_cache, v_cache, start, length, bias=None):
    """The definition, which is also the CPU path: the G query heads that share a key head are the rows of one small
    product with its keys. No copies, and much faster than the fused attention, which is made for long queries. It multiplies
    all slots, in use or not, so they must hold numbers: the product with a part of each row reads memory with gaps and takes
    two to three times as long."""
    (B, N, H), (K, S) = q.shape, k_cache.shape[1:3]
    bias = (
        cast(slot_bias(start, length, S) if bias is None else bias, q.dtype)
        .expand(B, K, S)
        .reshape(B * K, 1, S)
    )
    scores = torch.baddbmm(
        bias, q.reshape(B * K, -1, H), k_cache.flatten(0, 1).transpose(1, 2), alpha=H**-0.5
    )
    weights = cast(wide(scores).softmax(-1), v_cache.dtype)
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
    """One program per split of one key head of one row. WHOLE: no row has a second split, so the result is final."""
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(0) // num_splits % K
    row = (tl.program_id(0) // num_splits // K).to(tl.int64)
    first, length = (
        tl.load(start_ptr + row).to(tl.int64) + split * SPLIT,
        tl.load(length_ptr).to(tl.int64),
    )
    if first >= length:  # a row with fewer splits than the longest
        return
    G: tl.constexpr = N // K
    group = tl.arange(0, G_BLOCK).to(tl.int64)  # G padded to 16, the least rows a tensor core takes
    head = row * N + kv_head * G
    q = load_rows(q_ptr + head * H, group, G, H, H, H_BLOCK)
    k_ptr += row * k_row_stride + tl.cast(kv_head, tl.int64) * k_head_stride
    v_ptr += row * v_row_stride + tl.cast(kv_head, tl.int64) * v_head_stride
    acc = tl.zeros([G_BLOCK, H_BLOCK], tl.float32)
    m = tl.full([G_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([G_BLOCK], tl.float32)
    # weights = softmax(scores);  acc = weights @ values      running, unnormalised: the loop of
    # attention.py, in which
    # every query is the newest token, so that the causal mask cuts off exactly the slots from
    # `length` on
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
        store_rows(
            acc_ptr + (head * num_splits + split) * H, acc, group, G, num_splits * H, H, H_BLOCK
        )
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
    """One program per query head of one row: its splits, each scaled from its own max to the common one, summed."""
    head = tl.program_id(0).to(tl.int64)
    splits = tl.cdiv(tl.load(length_ptr) - tl.load(start_ptr + head // N), SPLIT)
    acc = tl.zeros([H_BLOCK], tl.float32)
    m, total = -float("inf"), 0.0
    for first in range(0, splits, SPLITS_BLOCK):
        split = first + tl.arange(0, SPLITS_BLOCK).to(tl.int64)
        split_m = tl.load(
            m_ptr + head * num_splits + split, mask=split < splits, other=-float("inf")
        )
        split_total = tl.load(total_ptr + head * num_splits + split, mask=split < splits, other=0.0)
        split_acc = load_rows(acc_ptr + head * num_splits * H, split, splits, H, H, H_BLOCK)
        new_m = tl.maximum(m, tl.max(split_m))
        share, shrink = tl.exp2(split_m - new_m), tl.exp2(m - new_m)
        acc = acc * shrink + tl.sum(split_acc * share[:, None], 0)
        total = total * shrink + tl.sum(split_total * share)
        m = new_m
    cols = tl.arange(0, H_BLOCK)
    tl.store(out_ptr + head * H + cols, (acc / total).to(out_ptr.dtype.element_ty), mask=cols < H)


def decode_attention_triton(q, k_cache, v_cache, start, length):
    """Launches one program per row, key head and split of the longest row that the cache can hold; then the join."""
    (B, N, H), (K, S) = q.shape, k_cache.shape[1:3]
    length = (
        length if isinstance(length, torch.Tensor) else torch.full((1,), length, device=q.device)
    )
    # not of length, which only the GPU knows: programs past it end at once
    splits = triton.cdiv(S, SPLIT)
    sizes, q = model_constants(q, k_cache), q.contiguous()
    out = torch.empty_like(q)
    # unused pointers: any tensor
    acc = q.new_empty(B, N, splits, H, dtype=torch.float32) if splits > 1 else out
    m, total = q.new_empty(2, B, N, splits, dtype=torch.float32) if splits > 1 else (out, out)
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
    """q [B, N, H]; k_cache, v_cache [B, K, S, H], any strides but the last; start [B] int, below length. length: an int, or a
    tensor [1] that is read on the device, so that a captured CUDA graph can be replayed for the next token.

    Returns [B, N, H]. bias: slot_bias of all S slots, made once for many calls; only the CPU path reads it."""
    if not use_triton(q, k_cache, v_cache, start):
        return decode_attention_ref(q, k_cache, v_cache, start, length, bias)
    return decode_attention_triton(q, k_cache, v_cache, start, length)
