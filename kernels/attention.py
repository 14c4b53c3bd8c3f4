"""Causal grouped-query attention over packed sequences of different lengths (the "varlen" layout).

    out[t] = sum_s softmax_s(softmax_scale * q[t] . k[s]) v[s]       over the tokens s <= t of the sequence of t

Sequences lie one behind another in [T, heads, H]; cu_seqlens holds where each begins and, last, where the last ends.
Query head n reads key head n // (N / K).
"""

import torch
import torch.nn.functional as F

# T tokens   N query heads   K key heads   H head width   L padded length

LENGTH_STEP = 16  # sequences padded to one multiple of this share an SDPA call; 16 measured fastest of 8, 16, 32


def attention_sdpa(q, k, v):
    """[batch, L, heads, H] -> [batch, L, N, H], causal. Padding on the right needs no mask: no token looks ahead."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    ).transpose(1, 2)


def flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen, softmax_scale=None):
    """Sequences of like length, right-padded to one length, go through SDPA together: about twice as fast as padding
    all to max_seqlen for lengths between 40 and 160, and faster than one call per sequence when they are short."""
    num_seqs, total = len(cu_seqlens) - 1, len(q)
    if softmax_scale is not None:
        q = q * (softmax_scale * q.shape[-1] ** 0.5)
    if num_seqs * max_seqlen == total:  # equally long: views only, nothing is copied
        return attention_sdpa(*(x.unflatten(0, (num_seqs, max_seqlen)) for x in (q, k, v))).reshape(q.shape)

    lengths = cu_seqlens.diff().long()
    padded = (lengths + LENGTH_STEP - 1) // LENGTH_STEP * LENGTH_STEP
    order = padded.argsort()
    starts = torch.empty_like(padded)  # place of each sequence in the padded buffer, shortest first
    starts[order] = padded[order].cumsum(0) - padded[order]
    slots = torch.arange(total) + torch.repeat_interleave(starts - cu_seqlens[:-1], lengths, output_size=total)
    bucket_lengths, counts = (x.tolist() for x in padded[order].unique_consecutive(return_counts=True))
    sizes = [length * count for length, count in zip(bucket_lengths, counts)]
    buffers = [x.new_zeros(sum(sizes), *x.shape[1:]).index_copy(0, slots, x).split(sizes) for x in (q, k, v)]
    outs = [
        attention_sdpa(*(x.unflatten(0, (count, length)) for x in bucket)).flatten(0, 1)
        for length, count, *bucket in zip(bucket_lengths, counts, *buffers)
    ]
    return torch.cat(outs).index_select(0, slots)


def flash_attention_varlen(q, k, v, cu_seqlens, max_seqlen, softmax_scale=None):
    """Causal GQA: q [T, N, H], k and v [T, K, H] packed, cu_seqlens [num_seqs + 1] int, max_seqlen a Python int."""
    return flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen, softmax_scale)
