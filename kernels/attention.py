"""Causal grouped-query attention over packed sequences of different lengths."""

import torch
import torch.nn.functional as F


def flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen, softmax_scale=None):
    """Right-pads to [num_seqs, max_seqlen] and calls SDPA: with a causal mask no token sees the padding behind it."""
    lengths = cu_seqlens.diff()
    num_seqs, total = len(lengths), len(q)
    if num_seqs * max_seqlen == total:  # equally long: a view, nothing is copied
        padded = [x.view(num_seqs, max_seqlen, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(q.shape)
    offsets = torch.arange(max_seqlen, device=q.device)
    inside = offsets < lengths[:, None]
    slots = inside.flatten().nonzero()[:, 0]  # place of each token in the padded batch
    padded = []
    for x in (q, k, v):
        empty = x.new_zeros(num_seqs * max_seqlen, *x.shape[1:])
        padded.append(empty.index_copy(0, slots, x).view(num_seqs, max_seqlen, *x.shape[1:]).transpose(1, 2))
    out = F.scaled_dot_product_attention(*padded, is_causal=True, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[slots]


def flash_attention_varlen(q, k, v, cu_seqlens, max_seqlen, softmax_scale=None):
    """Causal GQA: q [T, N, H], k and v [T, K, H] packed, cu_seqlens [num_seqs + 1] int, max_seqlen a Python int."""
    return flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen, softmax_scale)
