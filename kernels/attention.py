"""Causal grouped-query attention over packed sequences of different lengths (the "varlen" layout), exact and tiled.

    out[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s]       over the tokens s <= t of the sequence of t, scale = H^-0.5

Sequences lie one behind another in [T, heads, H]; cu_seqlens holds where each begins and, last, where the last ends.
Query head n reads key head n // (N / K). A program keeps a block of queries and walks over blocks of keys with a
running max m and sum, rescaling when the max rises (FlashAttention). Backward makes p again from the logsumexp:

    p = exp(scores - lse);  dv = p^T dout;  ds = p * (dout v^T - delta),  delta = sum(dout * out)
    dk = scale * ds^T q;  dq = scale * ds k

dk and dv in one kernel, where a program owns keys, dq in another: 7 products, not 5, but no atomics, so runs repeat.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import tl, triton, use_triton

# T tokens   N query heads   K key heads   H head width   L padded length

# CPU: sequences padded to one multiple of this share an SDPA call; fastest of 8, 16, 32
LENGTH_STEP = 16
# exp2 is the hardware's exponential: exp(x) = exp2(x * log2(e))
LOG2E = 1.4426950408889634


def attention_sdpa(q, k, v):
    """[batch, L, heads, H] -> [batch, L, N, H], causal. Padding on the right needs no mask: no token looks ahead."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen):
    """The CPU path. Sequences of like length, right-padded to one length, go through SDPA together: twice as fast as
    padding all to max_seqlen at lengths of 40 to 160, and 3x as fast as a call per sequence at lengths of 3 to 20."""
    num_seqs, total = len(cu_seqlens) - 1, len(q)
    if num_seqs * max_seqlen == total:  # equally long: views only, nothing is copied
        return attention_sdpa(*(x.unflatten(0, (num_seqs, max_seqlen)) for x in (q, k, v))).flatten(
            0, 1
        )
    lengths = cu_seqlens.diff().long()
    padded = (lengths + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
    order = padded.argsort()
    starts = torch.empty_like(padded)  # place of each sequence in the padded buffer, shortest first
    starts[order] = padded[order].cumsum(0) - padded[order]
    slots = torch.arange(total) + torch.repeat_interleave(
        starts - cu_seqlens[:-1], lengths, output_size=total
    )
    bucket_lengths, counts = (
        x.tolist() for x in padded[order].unique_consecutive(return_counts=True)
    )
    sizes = [length * count for length, count in zip(bucket_lengths, counts)]
    buffers = [
        x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, slots, x).split(sizes)
        for x in (q, k, v)
    ]
    outs = [
        attention_sdpa(*(x.unflatten(0, (count, length)) for x in bucket)).flatten(0, 1)
        for length, count, *bucket in zip(bucket_lengths, counts, *buffers)
    ]
    return torch.cat(outs).index_select(0, slots)


@triton.jit
def load_rows(
    ptr,
    rows,
    length,
    token_stride,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    INSIDE: tl.constexpr = False,
):
    """[rows, H] of one head of one sequence, zeros past its end (INSIDE: none is); rows is int64, so no offset can wrap."""
    cols = tl.arange(0, H_BLOCK)
    place = ptr + rows[:, None] * token_stride + cols[None, :]
    if INSIDE and H == H_BLOCK:
        return tl.load(place)
    return tl.load(place, mask=(rows[:, None] < length) & (cols[None, :] < H), other=0.0)


@triton.jit
def store_rows(ptr, x, rows, length, token_stride, H: tl.constexpr, H_BLOCK: tl.constexpr):
    """The reverse of load_rows."""
    cols = tl.arange(0, H_BLOCK)
    mask = (rows[:, None] < length) & (cols[None, :] < H)
    tl.store(
        ptr + rows[:, None] * token_stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def locate(cu_seqlens_ptr, num_blocks, BLOCK: tl.constexpr):
    """The program's sequence (first token, length) and its block's first row; the last, longest blocks come first."""
    sequence = tl.program_id(0) // num_blocks
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64) - begin
    return begin, length, block * BLOCK


@triton.jit
def attend(
    acc,
    m,
    total,
    q,
    k_ptr,
    v_ptr,
    k_stride,
    v_stride,
    rows,
    length,
    start,
    stop,
    scale,
    MASKED: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Takes the keys start .. stop into the online softmax of a block of queries; scale > 0 has log2(e) in it."""
    for first in range(start, stop, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K).to(tl.int64)
        k = load_rows(k_ptr, cols, length, k_stride, H, H_BLOCK, not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(cols[None, :] <= rows[:, None], scores, -float("inf"))
        # scaled only here, so that below it is one multiply-add an entry
        new_m = tl.maximum(m, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        total = total * shrink + tl.sum(p, 1)
        m = new_m
        v = load_rows(v_ptr, cols, length, v_stride, H, H_BLOCK, not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, m, total


@triton.jit
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_tokens,
    num_blocks,
    scale,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per block of queries of one head. out and lse [N, T] (base 2, of scores * scale)."""
    begin, length, first_row = locate(cu_seqlens_ptr, num_blocks, BLOCK_Q)
    if first_row >= length:
        return
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_Q).to(tl.int64)
    q = load_rows(q_ptr + begin * q_stride + head * H, rows, length, q_stride, H, H_BLOCK)
    k_ptr += begin * k_stride + head // (N // K) * H
    v_ptr += begin * v_stride + head // (N // K) * H
    acc = tl.zeros([BLOCK_Q, H_BLOCK], tl.float32)
    m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    # keys before the block of queries need no mask, those beside it do, those behind it are not
    # visited
    diagonal = first_row // BLOCK_K * BLOCK_K
    for masked in tl.static_range(2):  # unrolled when compiled: two loops
        start, stop = (
            (diagonal, tl.minimum(first_row + BLOCK_Q, length)) if masked else (0, diagonal)
        )
        acc, m, total = attend(
            acc,
            m,
            total,
            q,
            k_ptr,
            v_ptr,
            k_stride,
            v_stride,
            rows,
            length,
            start,
            stop,
            scale,
            masked,
            H,
            H_BLOCK,
            BLOCK_K,
        )
    store_rows(
        out_ptr + (begin * N + head) * H, acc / total[:, None], rows, length, N * H, H, H_BLOCK
    )
    tl.store(
        lse_ptr + tl.cast(head, tl.int64) * num_tokens + begin + rows,
        m + tl.log2(total),
        mask=rows < length,
    )


@triton.jit
def attention_backward_kv(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_tokens,
    num_blocks,
    scale,
    softmax_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per block of keys of one key head; blocks are computed transposed, [keys, queries]. Tensor descriptors (TMA: the
    copy engine computes addresses and puts zeros past the end) leave registers to dk and dv: 4.3 ms where pointers took 5.8."""
    begin, length, first_col = locate(cu_seqlens_ptr, num_blocks, BLOCK_K)
    if first_col >= length:
        return
    kv_head, length, first_col = tl.program_id(1), length.to(tl.int32), first_col.to(tl.int32)
    cols = first_col + tl.arange(0, BLOCK_K)
    k_rows = tl.make_tensor_descriptor(
        k_ptr + begin * k_stride + kv_head * H, [length, H], [k_stride, 1], [BLOCK_K, H_BLOCK]
    )
    v_rows = tl.make_tensor_descriptor(
        v_ptr + begin * v_stride + kv_head * H, [length, H], [v_stride, 1], [BLOCK_K, H_BLOCK]
    )
    k, v = k_rows.load([first_col, 0]), v_rows.load([first_col, 0])
    dk = tl.zeros([BLOCK_K, H_BLOCK], tl.float32)
    dv = tl.zeros([BLOCK_K, H_BLOCK], tl.float32)
    for head in range(kv_head * (N // K), (kv_head + 1) * (N // K)):
        q_rows = tl.make_tensor_descriptor(
            q_ptr + begin * q_stride + head * H, [length, H], [q_stride, 1], [BLOCK_Q, H_BLOCK]
        )
        dout_rows = tl.make_tensor_descriptor(
            dout_ptr + (begin * N + head) * H, [length, H], [N * H, 1], [BLOCK_Q, H_BLOCK]
        )
        per_row = begin + tl.cast(head, tl.int64) * num_tokens
        for first in range(first_col // BLOCK_Q * BLOCK_Q, length, BLOCK_Q):
            rows = first + tl.arange(0, BLOCK_Q)
            q = q_rows.load([first, 0])
            # rows past the end: p = 0
            lse = tl.load(lse_ptr + per_row + rows, mask=rows < length, other=float("inf"))
            # p = exp(scores - lse)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
            p = tl.where(cols[:, None] <= rows[None, :], p, 0.0)
            # dv += p^T dout
            dout = dout_rows.load([first, 0])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            # ds = p * (dout v^T - delta)
            delta = tl.load(delta_ptr + per_row + rows, mask=rows < length, other=0.0)
            ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
            # dk += ds^T q
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    wide = cols.to(tl.int64)
    store_rows(
        dk_ptr + (begin * K + kv_head) * H, dk * softmax_scale, wide, length, K * H, H, H_BLOCK
    )
    store_rows(dv_ptr + (begin * K + kv_head) * H, dv, wide, length, K * H, H, H_BLOCK)


@triton.jit
def attention_backward_q(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_tokens,
    num_blocks,
    scale,
    softmax_scale,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per block of queries of one head. Runs first and leaves delta [N, T] for attention_backward_kv."""
    begin, length, first_row = locate(cu_seqlens_ptr, num_blocks, BLOCK_Q)
    if first_row >= length:
        return
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_Q).to(tl.int64)
    q = load_rows(q_ptr + begin * q_stride + head * H, rows, length, q_stride, H, H_BLOCK)
    dout = load_rows(dout_ptr + (begin * N + head) * H, rows, length, N * H, H, H_BLOCK)
    out = load_rows(out_ptr + (begin * N + head) * H, rows, length, N * H, H, H_BLOCK)
    per_row = begin + rows + tl.cast(head, tl.int64) * num_tokens
    # delta = (dout * out).sum(-1)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + per_row, delta, mask=rows < length)
    lse = tl.load(lse_ptr + per_row, mask=rows < length, other=float("inf"))
    k_ptr += begin * k_stride + head // (N // K) * H
    v_ptr += begin * v_stride + head // (N // K) * H
    dq = tl.zeros([BLOCK_Q, H_BLOCK], tl.float32)
    diagonal = first_row // BLOCK_K * BLOCK_K
    for masked in tl.static_range(2):  # as in the forward kernel
        start, stop = (
            (diagonal, tl.minimum(first_row + BLOCK_Q, length)) if masked else (0, diagonal)
        )
        for first in range(start, stop, BLOCK_K):
            cols = first + tl.arange(0, BLOCK_K).to(tl.int64)
            k = load_rows(k_ptr, cols, length, k_stride, H, H_BLOCK, not masked)
            v = load_rows(v_ptr, cols, length, v_stride, H, H_BLOCK, not masked)
            # p = exp(scores - lse)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
            if masked:
                p = tl.where(cols[None, :] <= rows[:, None], p, 0.0)
            # dq += (p * (dout v^T - delta)) k
            ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr + (begin * N + head) * H, dq * softmax_scale, rows, length, N * H, H, H_BLOCK)


def model_constants(q, k):
    """Compiled in: head counts and width, and the width's block (at least 16, the least a tensor core takes)."""
    block = max(16, triton.next_power_of_2(q.shape[2]))
    return {"N": q.shape[1], "K": k.shape[1], "H": q.shape[2], "H_BLOCK": block}


class FlashAttention(torch.autograd.Function):
    """Saves q, k, v, out and one number per token and head."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen):
        (total, n, _), num_seqs = q.shape, len(cu_seqlens) - 1
        out, lse = (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            q.new_empty(n, total, dtype=torch.float32),
        )
        blocks = triton.cdiv(max_seqlen, 128)
        attention_forward[(blocks * num_seqs, n)](
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            total,
            blocks,
            q.shape[2] ** -0.5 * LOG2E,
            **model_constants(q, k),
            BLOCK_Q=128,
            BLOCK_K=64,
            num_warps=8,
            num_stages=3,
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        (total, n, _), num_seqs, dout = q.shape, len(cu_seqlens) - 1, dout.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta, device = torch.empty_like(lse), q.device
        strides, scale = (q.stride(0), k.stride(0), v.stride(0)), q.shape[2] ** -0.5
        blocks_q, blocks_k = triton.cdiv(ctx.max_seqlen, 128), triton.cdiv(ctx.max_seqlen, 64)
        attention_backward_q[(blocks_q * num_seqs, n)](
            q,
            k,
            v,
            out,
            dout,
            lse,
            delta,
            dq,
            cu_seqlens,
            *strides,
            total,
            blocks_q,
            scale * LOG2E,
            scale,
            **model_constants(q, k),
            BLOCK_Q=128,
            BLOCK_K=64,
            num_warps=8,
            num_stages=3 if q.itemsize == 2 else 2,
        )
        # descriptors; one a thread
        triton.set_allocator(
            lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device)
        )
        attention_backward_kv[(blocks_k * num_seqs, k.shape[1])](
            q,
            k,
            v,
            dout,
            lse,
            delta,
            dk,
            dv,
            cu_seqlens,
            *strides,
            total,
            blocks_k,
            scale * LOG2E,
            scale,
            **model_constants(q, k),
            BLOCK_Q=64,
            BLOCK_K=64,
            num_warps=4,
            num_stages=2,
        )
        return dq, dk, dv, None, None


def flash_attention_varlen(q, k, v, cu_seqlens, max_seqlen):
    """Causal GQA: q [T, N, H], k and v [T, K, H] packed, cu_seqlens [num_seqs + 1] int, max_seqlen a Python int. ValueError on GPUs
    where a head is no multiple of 16 bytes, as the copy engine wants it."""
    if not use_triton(q, k, v, cu_seqlens):
        return flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen)
    fits = lambda x: (
        x.stride()[1:] == (x.shape[2], 1)
        and (x.stride(0) * x.element_size() | x.data_ptr()) % 16 == 0
    )
    q, k, v = (x if fits(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    if q.shape[2] * q.element_size() % 16:
        raise ValueError(
            f"a head of {q.shape[2]} numbers of {q.element_size()} bytes: on GPUs a multiple of 16 bytes is needed"
        )
    return FlashAttention.apply(q, k, v, cu_seqlens, max_seqlen)
