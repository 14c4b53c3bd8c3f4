"""Causal grouped-query attention over packed sequences ("varlen" layout), exact and tiled.

    out[t] = sum over s of softmax_s(scale * q[t] . k[s]) * v[s],    scale = H^-0.5
             over the tokens s <= t of the sequence that t belongs to

Sequences lie one behind another in [T, heads, H]. cu_seqlens holds where each sequence begins and,
last, where the last one ends. Query head n reads key head n // (N / K).

Forward is FlashAttention: a program keeps a block of queries and walks over blocks of keys with a
running max and a running sum, which it rescales when the max rises. Backward makes the
probabilities p again from the logsumexp of the scores:

    p  = exp(scores - lse)
    dv = p^T dout
    ds = p * (dout v^T - delta),    delta = sum(dout * out)
    dk = scale * ds^T q
    dq = scale * ds k

One kernel makes dk and dv, where a program owns a block of keys, another kernel makes dq. That
takes 7 matrix products instead of 5, but no atomics, so a run repeats bit for bit.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import shared_memory, tl, triton, use_triton

# T tokens   N query heads   K key heads   H head width   L padded length

# On the CPU, sequences that are padded to the same multiple of this share one SDPA call. 16 is the
# fastest of 8, 16 and 32.
LENGTH_STEP = 16
# The hardware's exponential is exp2: exp(x) = exp2(x * log2(e)).
LOG2E = 1.4426950408889634


def attention_sdpa(q, k, v):
    """Causal attention of a padded batch: [batch, L, heads, H] -> [batch, L, N, H].

    Padding on the right needs no mask, because no token looks ahead.
    """
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def attention_of_equal_lengths(q, k, v, num_seqs, length):
    """Causal attention of packed sequences [num_seqs * length, heads, H] of one length."""
    shape = num_seqs, length
    out = attention_sdpa(q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape))
    return out.flatten(0, 1)


def flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen):
    """The CPU path: sequences of like length are padded to one length and share an SDPA call.

    That is twice as fast as padding all sequences to max_seqlen at lengths of 40 to 160, and 3
    times as fast as a call per sequence at lengths of 3 to 20.
    """
    num_seqs = len(cu_seqlens) - 1
    total = len(q)
    if num_seqs * max_seqlen == total:
        return attention_of_equal_lengths(q, k, v, num_seqs, max_seqlen)

    # Pad each length up to a multiple of LENGTH_STEP and order the sequences by padded length.
    lengths = cu_seqlens.diff().long()
    padded = (lengths + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
    order = padded.argsort()

    # starts [num_seqs]: where each sequence begins in the padded buffer, the shortest one first.
    starts = torch.empty_like(padded)
    starts[order] = padded[order].cumsum(0) - padded[order]

    # slots [T]: the place of each token in the padded buffer.
    shift = starts - cu_seqlens[:-1]
    slots = torch.arange(total) + torch.repeat_interleave(shift, lengths, output_size=total)

    # A bucket holds all sequences of one padded length; sizes are its slots.
    bucket_lengths, counts = padded[order].unique_consecutive(return_counts=True)
    bucket_lengths = bucket_lengths.tolist()
    counts = counts.tolist()
    sizes = [length * count for length, count in zip(bucket_lengths, counts)]

    # Copy q, k and v into padded buffers, cut at the buckets.
    buckets = []
    for x in (q, k, v):
        buffer = x.new_zeros(sum(sizes), *x.shape[1:])
        buckets.append(buffer.index_copy(0, slots, x).split(sizes))

    # One SDPA call per bucket, then the tokens back in their order.
    outs = []
    for bucket_q, bucket_k, bucket_v, count, length in zip(*buckets, counts, bucket_lengths):
        outs.append(attention_of_equal_lengths(bucket_q, bucket_k, bucket_v, count, length))
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
    """[rows, H] of one head of one sequence, zeros past the end of the sequence.

    rows is int64, so no offset can wrap. INSIDE promises that no row lies past the end.
    """
    cols = tl.arange(0, H_BLOCK)
    place = ptr + rows[:, None] * token_stride + cols[None, :]
    if INSIDE and H == H_BLOCK:
        return tl.load(place)
    mask = (rows[:, None] < length) & (cols[None, :] < H)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, x, rows, length, token_stride, H: tl.constexpr, H_BLOCK: tl.constexpr):
    """The reverse of load_rows."""
    cols = tl.arange(0, H_BLOCK)
    place = ptr + rows[:, None] * token_stride + cols[None, :]
    mask = (rows[:, None] < length) & (cols[None, :] < H)
    tl.store(place, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def locate(cu_seqlens_ptr, num_blocks, BLOCK: tl.constexpr):
    """The program's sequence (its first token and its length) and the first row of its block.

    The last blocks of a sequence see the most keys. They come first, so that no long block is left
    for the end.
    """
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
    """Take the keys start .. stop into the online softmax of a block of queries.

    acc [queries, H] is the sum of p * v, m [queries] the running max, total [queries] the running
    sum of p. rows are the positions of the queries. scale > 0 has log2(e) in it.
    """
    for first in range(start, stop, BLOCK_K):
        # scores = q k^T, [queries, keys], not yet scaled
        cols = first + tl.arange(0, BLOCK_K).to(tl.int64)
        k = load_rows(k_ptr, cols, length, k_stride, H, H_BLOCK, not MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(cols[None, :] <= rows[:, None], scores, -float("inf"))

        # p = exp(scale * scores - new max). The scores are scaled only here, where scaling and
        # subtraction are one multiply-add per entry.
        new_m = tl.maximum(m, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_m[:, None])

        # Rescale the old sums to the new max, then add this block of keys.
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
    """One program per block of queries of one head. It stores out and lse [N, T].

    lse is in base 2: log2 of the sum of exp2(scores * scale).
    """
    begin, length, first_row = locate(cu_seqlens_ptr, num_blocks, BLOCK_Q)
    if first_row >= length:
        return
    head = tl.program_id(1)
    kv_head = head // (N // K)
    rows = first_row + tl.arange(0, BLOCK_Q).to(tl.int64)
    q = load_rows(q_ptr + begin * q_stride + head * H, rows, length, q_stride, H, H_BLOCK)
    k_ptr += begin * k_stride + kv_head * H
    v_ptr += begin * v_stride + kv_head * H
    acc = tl.zeros([BLOCK_Q, H_BLOCK], tl.float32)
    m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    # Keys before the block of queries need no mask, keys beside it do, keys behind it are not
    # visited. tl.static_range is unrolled when compiled: this makes two loops over keys.
    diagonal = first_row // BLOCK_K * BLOCK_K
    for masked in tl.static_range(2):
        if masked:
            start = diagonal
            stop = tl.minimum(first_row + BLOCK_Q, length)
        else:
            start = 0
            stop = diagonal
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

    # out = acc / total;  lse = m + log(total)
    out = acc / total[:, None]
    store_rows(out_ptr + (begin * N + head) * H, out, rows, length, N * H, H, H_BLOCK)
    lse_row = lse_ptr + tl.cast(head, tl.int64) * num_tokens + begin
    tl.store(lse_row + rows, m + tl.log2(total), mask=rows < length)


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
    """One program per block of keys of one key head; blocks are transposed, [keys, queries].

    Tensor descriptors (TMA: the GPU's copy engine computes addresses and puts zeros past the end)
    leave registers to dk and dv: 4.3 ms where pointers took 5.8 ms. scale has log2(e) in it,
    softmax_scale has not.
    """
    begin, length, first_col = locate(cu_seqlens_ptr, num_blocks, BLOCK_K)
    if first_col >= length:
        return
    kv_head = tl.program_id(1)
    group: tl.constexpr = N // K
    length = length.to(tl.int32)
    first_col = first_col.to(tl.int32)
    cols = first_col + tl.arange(0, BLOCK_K)

    # k and v [keys, H]
    k_rows = tl.make_tensor_descriptor(
        k_ptr + begin * k_stride + kv_head * H, [length, H], [k_stride, 1], [BLOCK_K, H_BLOCK]
    )
    v_rows = tl.make_tensor_descriptor(
        v_ptr + begin * v_stride + kv_head * H, [length, H], [v_stride, 1], [BLOCK_K, H_BLOCK]
    )
    k = k_rows.load([first_col, 0])
    v = v_rows.load([first_col, 0])
    dk = tl.zeros([BLOCK_K, H_BLOCK], tl.float32)
    dv = tl.zeros([BLOCK_K, H_BLOCK], tl.float32)

    # All query heads that read this key head, and for each the queries from the diagonal on.
    for head in range(kv_head * group, (kv_head + 1) * group):
        q_rows = tl.make_tensor_descriptor(
            q_ptr + begin * q_stride + head * H, [length, H], [q_stride, 1], [BLOCK_Q, H_BLOCK]
        )
        dout_rows = tl.make_tensor_descriptor(
            dout_ptr + (begin * N + head) * H, [length, H], [N * H, 1], [BLOCK_Q, H_BLOCK]
        )
        per_row = begin + tl.cast(head, tl.int64) * num_tokens
        for first in range(first_col // BLOCK_Q * BLOCK_Q, length, BLOCK_Q):
            rows = first + tl.arange(0, BLOCK_Q)
            # p = exp(scores - lse); rows past the end get lse = inf and so p = 0
            q = q_rows.load([first, 0])
            lse = tl.load(lse_ptr + per_row + rows, mask=rows < length, other=float("inf"))
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = tl.exp2(scores * scale - lse[None, :])
            p = tl.where(cols[:, None] <= rows[None, :], p, 0.0)
            # dv += p^T dout
            dout = dout_rows.load([first, 0])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            # ds = p * (dout v^T - delta)
            delta = tl.load(delta_ptr + per_row + rows, mask=rows < length, other=0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            # dk += ds^T q
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    dk_head = dk_ptr + (begin * K + kv_head) * H
    dv_head = dv_ptr + (begin * K + kv_head) * H
    cols = cols.to(tl.int64)
    store_rows(dk_head, dk * softmax_scale, cols, length, K * H, H, H_BLOCK)
    store_rows(dv_head, dv, cols, length, K * H, H, H_BLOCK)


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
    """One program per block of queries of one head.

    This kernel runs first and leaves delta [N, T] for attention_backward_kv.
    """
    begin, length, first_row = locate(cu_seqlens_ptr, num_blocks, BLOCK_Q)
    if first_row >= length:
        return
    head = tl.program_id(1)
    kv_head = head // (N // K)
    rows = first_row + tl.arange(0, BLOCK_Q).to(tl.int64)
    q = load_rows(q_ptr + begin * q_stride + head * H, rows, length, q_stride, H, H_BLOCK)
    dout = load_rows(dout_ptr + (begin * N + head) * H, rows, length, N * H, H, H_BLOCK)
    out = load_rows(out_ptr + (begin * N + head) * H, rows, length, N * H, H, H_BLOCK)

    # delta = (dout * out).sum(-1)
    per_row = begin + rows + tl.cast(head, tl.int64) * num_tokens
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + per_row, delta, mask=rows < length)

    lse = tl.load(lse_ptr + per_row, mask=rows < length, other=float("inf"))
    k_ptr += begin * k_stride + kv_head * H
    v_ptr += begin * v_stride + kv_head * H
    dq = tl.zeros([BLOCK_Q, H_BLOCK], tl.float32)

    # Two loops over keys, as in the forward kernel.
    diagonal = first_row // BLOCK_K * BLOCK_K
    for masked in tl.static_range(2):
        if masked:
            start = diagonal
            stop = tl.minimum(first_row + BLOCK_Q, length)
        else:
            start = 0
            stop = diagonal
        for first in range(start, stop, BLOCK_K):
            cols = first + tl.arange(0, BLOCK_K).to(tl.int64)
            k = load_rows(k_ptr, cols, length, k_stride, H, H_BLOCK, not masked)
            v = load_rows(v_ptr, cols, length, v_stride, H, H_BLOCK, not masked)
            # p = exp(scores - lse), [queries, keys]
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            p = tl.exp2(scores * scale - lse[:, None])
            if masked:
                p = tl.where(cols[None, :] <= rows[:, None], p, 0.0)
            # ds = p * (dout v^T - delta)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            # dq += ds k
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_head = dq_ptr + (begin * N + head) * H
    store_rows(dq_head, dq * softmax_scale, rows, length, N * H, H, H_BLOCK)


def model_constants(q, k):
    """Constants to compile in: head counts, head width, and the block that holds the width.

    The block is at least 16, the least that a tensor core takes.
    """
    _, num_q_heads, width = q.shape
    width_block = max(16, triton.next_power_of_2(width))
    return {"N": num_q_heads, "K": k.shape[1], "H": width, "H_BLOCK": width_block}


def forward_triton(q, k, v, cu_seqlens, max_seqlen):
    """Launch one program per block of 128 queries and head; returns out and lse [N, T]."""
    num_tokens, num_heads, width = q.shape
    num_seqs = len(cu_seqlens) - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(num_heads, num_tokens, dtype=torch.float32)
    blocks = triton.cdiv(max_seqlen, 128)
    attention_forward[(blocks * num_seqs, num_heads)](
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        num_tokens,
        blocks,
        width**-0.5 * LOG2E,
        **model_constants(q, k),
        BLOCK_Q=128,
        BLOCK_K=64,
        num_warps=8,
        num_stages=3,
    )
    return out, lse


def backward_q_stages(itemsize, shared_bytes):
    """The pipeline stages of attention_backward_q that fit into this much shared memory.

    In bf16 three take 160 KiB on Hopper and 128 KiB on others, two take 96 KiB. Data centre cards
    have 163 KiB and more, other cards 99 KiB. In fp32 three fit nowhere.
    """
    return 3 if itemsize == 2 and shared_bytes >= 160 * 1024 else 2


def backward_q_triton(dout, q, k, v, out, lse, cu_seqlens, max_seqlen):
    """Launch one program per block of 128 queries and head; returns dq and delta [N, T]."""
    num_tokens, num_heads, width = q.shape
    num_seqs = len(cu_seqlens) - 1
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    scale = width**-0.5
    blocks = triton.cdiv(max_seqlen, 128)
    attention_backward_q[(blocks * num_seqs, num_heads)](
        q,
        k,
        v,
        out,
        dout,
        lse,
        delta,
        dq,
        cu_seqlens,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        num_tokens,
        blocks,
        scale * LOG2E,
        scale,
        **model_constants(q, k),
        BLOCK_Q=128,
        BLOCK_K=64,
        num_warps=8,
        num_stages=backward_q_stages(q.itemsize, shared_memory(q.device)),
    )
    return dq, delta


def backward_kv_triton(dout, q, k, v, lse, delta, cu_seqlens, max_seqlen):
    """Launch one program per block of 64 keys and key head; returns dk and dv."""
    num_tokens, _, width = q.shape
    num_seqs = len(cu_seqlens) - 1
    num_kv_heads = k.shape[1]
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    scale = width**-0.5
    blocks = triton.cdiv(max_seqlen, 64)
    allow_descriptors(q.device)
    attention_backward_kv[(blocks * num_seqs, num_kv_heads)](
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        cu_seqlens,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        num_tokens,
        blocks,
        scale * LOG2E,
        scale,
        **model_constants(q, k),
        BLOCK_Q=64,
        BLOCK_K=64,
        num_warps=4,
        num_stages=2,
    )
    return dk, dv


def allow_descriptors(device):
    """Give Triton memory for tensor descriptors made inside a kernel.

    Triton keeps one allocator per thread, and autograd calls backward in a thread of its own, so
    this runs before each launch.
    """

    def allocate(size, align, stream):
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


class FlashAttention(torch.autograd.Function):
    """The autograd node: it saves q, k, v, out and one number per token and head."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, kept):
        if kept:
            out, lse = kept.pop()
        else:
            out, lse = forward_triton(q, k, v, cu_seqlens, max_seqlen)
            if kept is not None:
                # Detached: the history of out leads back to this list, and a ring is never freed.
                kept.append((out.detach(), lse))
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        dout = dout.contiguous()
        dq, delta = backward_q_triton(dout, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen)
        dk, dv = backward_kv_triton(dout, q, k, v, lse, delta, cu_seqlens, ctx.max_seqlen)
        return dq, dk, dv, None, None, None


def for_copy_engine(x):
    """x if the copy engine can read it, else a contiguous copy of x.

    The numbers of a token must lie side by side, and every row must begin at a multiple of 16
    bytes.
    """
    packed = x.stride()[1:] == (x.shape[2], 1)
    row_bytes = x.stride(0) * x.element_size()
    if packed and row_bytes % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def flash_attention_varlen(q, k, v, cu_seqlens, max_seqlen, kept=None):
    """Causal attention of packed sequences: q [T, N, H], k and v [T, K, H] -> [T, N, H].

    cu_seqlens [num_seqs + 1] int, max_seqlen a Python int. Raises ValueError on GPUs if a head is
    not a multiple of 16 bytes, which the copy engine needs.

    kept: for gradient checkpointing, a list, empty at first. The first call puts its output there,
    and the next one, with equal inputs, takes it out instead of computing it again. The CPU path
    does not use it: PyTorch's attention has a backward of its own.
    """
    if not use_triton(q, k, v, cu_seqlens):
        return flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen)
    if q.shape[2] * q.element_size() % 16:
        raise ValueError(
            f"a head of {q.shape[2]} numbers of {q.element_size()} bytes: "
            "on GPUs a multiple of 16 bytes is needed"
        )
    q = for_copy_engine(q)
    k = for_copy_engine(k)
    v = for_copy_engine(v)
    return FlashAttention.apply(q, k, v, cu_seqlens, max_seqlen, kept)
