"""Draws one token per row, with its log-probability, from one uniform number per row."""

import torch


def sample_tokens_ref(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """Inverse-CDF draw in vocabulary order from softmax(logits / temperature) restricted to top-k, then top-p."""
    logits = logits.float()
    if temperature == 0:
        logprobs = torch.log_softmax(logits, dim=-1)
        logprob, token = logprobs.max(dim=-1)
        return token, logprob
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.exp()
    if top_k > 0 and top_k < probs.shape[-1]:
        probs = probs.masked_fill(probs < probs.topk(top_k, dim=-1).values[:, -1:], 0.0)
    if top_p < 1.0:
        descending = probs.sort(dim=-1, descending=True).values
        before = descending.cumsum(-1) - descending  # mass of the strictly better places
        goal = top_p * probs.sum(-1, keepdim=True)
        smallest_kept = descending.masked_fill(before >= goal, torch.inf).amin(-1, keepdim=True)
        probs = probs.masked_fill(probs < smallest_kept, 0.0)
    cdf = probs.cumsum(-1)
    token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    last = (probs > 0).int().mul(torch.arange(probs.shape[-1], device=probs.device)).amax(-1, keepdim=True)
    token = torch.minimum(token, last)[:, 0]
    return token, logprobs.gather(1, token[:, None])[:, 0]


def sample_tokens(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """logits [B, V], uniform [B] in [0, 1) -> (token [B] int64, logprob [B] fp32 under the full tempered softmax)."""
    return sample_tokens_ref(logits, uniform, temperature, top_p, top_k)
