"""RMSNorm of each query and key head, then the rotary position embedding (Qwen3's order, rotate-half layout)."""

import torch

from kernels.rms_norm import rms_norm_ref


def qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, position_ids, eps=1e-6):
    """q [T, N, H], k [T, K, H], cos and sin [max_pos, H/2] fp32, position_ids [T] -> (q, k) normed and rotated."""
    cos_T1H, sin_T1H = cos[position_ids][:, None], sin[position_ids][:, None]

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        rotated = (first * cos_T1H - second * sin_T1H, second * cos_T1H + first * sin_T1H)
        return torch.cat(rotated, dim=-1).to(x.dtype)

    return rotate(rms_norm_ref(q, q_weight, eps)), rotate(rms_norm_ref(k, k_weight, eps))


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin, position_ids, eps=1e-6):
    """Per-head RMSNorm and RoPE of q [T, N, H] and k [T, K, H]; cos, sin [max_pos, H/2] fp32 with YaRN's factor in."""
    return qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, position_ids, eps)
