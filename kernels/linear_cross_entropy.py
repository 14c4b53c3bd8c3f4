"""Cross-entropy of a linear head in one pass."""

import torch
import torch.nn.functional as F


def linear_cross_entropy_ref(hidden, weight, target, ignore_index=-100):
    """Sum of -log p(target) over the rows whose target is not ignore_index."""
    logits = hidden.float() @ weight.float().T if hidden.dtype != torch.float64 else hidden @ weight.T
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(hidden, weight, target, ignore_index=-100):
    """hidden [N, D], weight [V, D], target [N] int64 -> summed loss (divide by the global token count yourself)."""
    return linear_cross_entropy_ref(hidden, weight, target, ignore_index)
