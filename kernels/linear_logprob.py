"""Log-probability of a target token and entropy of its distribution, straight from hidden states."""

import torch


def linear_logprob_ref(hidden, weight, target, temperature=1.0):
    """Materialises the logits; see linear_logprob."""
    logits = hidden.float() @ weight.float().T if hidden.dtype != torch.float64 else hidden @ weight.T
    scale = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    logprobs = torch.log_softmax(logits / scale, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, target[:, None])[:, 0], entropy


def linear_logprob(hidden, weight, target, temperature=1.0):
    """hidden [N, D], weight [V, D], target [N] int64, temperature float or [N] -> (logprob [N], entropy [N]), fp32."""
    return linear_logprob_ref(hidden, weight, target, temperature)
