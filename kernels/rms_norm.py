"""RMSNorm, alone and fused with the residual addition before it."""

import torch
import torch.nn.functional as F


def rms_norm_ref(x, weight, eps=1e-6):
    """y = weight * (x / rms(x)), the product with weight after rounding x / rms(x) to the dtype of x (as HF Qwen3)."""
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    x_hat = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return weight * x_hat.to(x.dtype)


def add_rms_norm_ref(x, residual, weight, eps=1e-6):
    """residual_out = x + residual; y = rms_norm(residual_out). Returns (y, residual_out)."""
    residual = x + residual
    return rms_norm_ref(residual, weight, eps), residual


def rms_norm(x, weight, eps=1e-6):
    """RMSNorm over the last axis: x [..., D], weight [D] -> [..., D]."""
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(x, residual, weight, eps=1e-6):
    """Residual addition and RMSNorm in one: x, residual [..., D] -> (y, x + residual)."""
    return add_rms_norm_ref(x, residual, weight, eps)
