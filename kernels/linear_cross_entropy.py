"""Cross-entropy of a linear head in a single pass: the loss of supervised fine-tuning.

    loss = sum over tokens of logsumexp(z) - z[target],    z = hidden @ weight.T

The loss is a sum over tokens, so its gradient is known as soon as a token's logits are: dz = p - onehot. Forward takes
a chunk of tokens against the whole vocabulary, makes dz from the logits at once and multiplies it on; backward only
scales what forward left. Three matrix products instead of linear_logprob's four, no [N, V] tensor. The price: dweight
is summed over chunks and needs an fp32 buffer [V, D] (sums in bf16 drift: 1e-2 relative error after 128 chunks, 2e-3
in fp32), and a second derivative does not exist.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import triton, use_triton
from kernels.linear_logprob import addmm_fp32, fold_chunk, logits_to_dz, mm_fp32

# N tokens   D model width   V vocabulary

# tokens per chunk on the GPU: 1.2 GiB of fp32 logits at V = 151,936
TOKEN_CHUNK = 2048
# on the CPU: logits per chunk, but at least 128 tokens, fewer would starve the product, and 512
# beside a weight
CPU_TILE = 2**18
# of more numbers than any cache holds: each chunk reads it twice, and reads and writes its gradient
BIG = 2**23


def linear_cross_entropy_ref(hidden, weight, target, ignore_index=-100):
    """The definition, logits and all."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(
        hidden.to(wide) @ weight.to(wide).T, target, ignore_index=ignore_index, reduction="sum"
    )


def forward_torch(hidden, weight, target, valid, needs_grad):
    """CPU path: returns the summed loss and, if wanted, both gradients. Ignored rows must have target 0."""
    loss = hidden.new_zeros(())
    dhidden, dweight = (
        (torch.empty_like(hidden), torch.zeros_like(weight)) if needs_grad else (None, None)
    )
    step = max(512 if weight.numel() > BIG else 128, CPU_TILE // len(weight))
    for block in (slice(start, start + step) for start in range(0, len(hidden), step)):
        index, weight_of = target[block, None], valid[block, None].to(hidden.dtype)
        z = hidden[block] @ weight.T
        logprobs = torch.log_softmax(z, dim=-1)
        logprob = logprobs.gather(1, index)
        loss -= (logprob * weight_of).sum()
        if needs_grad:
            # dz = (p - onehot) * valid
            dz = torch.exp(logprobs, out=z).scatter_(1, index, torch.expm1(logprob)).mul_(weight_of)
            torch.mm(dz, weight, out=dhidden[block])
            dweight.addmm_(dz.T, hidden[block])
    return loss, dhidden, dweight


def forward_triton(hidden, weight, target, valid, needs_grad):
    """The same on the GPU, with the row kernels of linear_logprob.py: statistics of a row, then logits -> dz."""
    (num_tokens, _), vocab, dtype = hidden.shape, len(weight), hidden.dtype
    loss = hidden.new_zeros((), dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if needs_grad else None
    dweight = (
        torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_grad else None
    )
    z_buffer = hidden.new_empty(min(TOKEN_CHUNK, num_tokens), vocab, dtype=torch.float32)
    dz_buffer = (
        z_buffer if dtype == torch.float32 else z_buffer.new_empty(z_buffer.shape, dtype=dtype)
    )
    ones = z_buffer.new_ones(len(z_buffer))
    blocks = triton.cdiv(vocab, 4096)
    for start in range(0, num_tokens, TOKEN_CHUNK):
        block = slice(start, min(start + TOKEN_CHUNK, num_tokens))
        rows = block.stop - block.start
        z, dz = mm_fp32(hidden[block], weight.T, z_buffer[:rows]), dz_buffer[:rows]
        m, s, u, zt = state = z.new_zeros(4, rows)
        m.fill_(-1e30)
        fold_chunk[(rows,)](
            z, target[block], ones, state, rows, z.stride(0), 0, vocab, BLOCK=4096, num_warps=8
        )
        lse = m + s.log()
        logprob, dlogprob = zt - lse, -valid[block].float()
        loss += torch.dot(logprob, dlogprob)
        if needs_grad:
            logits_to_dz[(rows * blocks,)](
                z,
                dz,
                target[block],
                ones,
                logprob,
                logprob,
                lse,
                dlogprob,
                logprob,
                z.stride(0),
                dz.stride(0),
                0,
                vocab,
                blocks,
                HAS_DENTROPY=False,
                BLOCK=4096,
                num_warps=8,
            )
            torch.mm(dz, weight, out=dhidden[block])
            addmm_fp32(dweight, dz.T, hidden[block])
    return loss, dhidden, dweight


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward; backward multiplies them by the gradient of the loss, without reading it."""

    @staticmethod
    def forward(ctx, hidden, weight, target, ignore_index, needs_grad):
        valid = target != ignore_index
        target = target.masked_fill(~valid, 0)
        if use_triton(hidden, weight, target):
            loss, dhidden, dweight = forward_triton(hidden, weight, target, valid, needs_grad)
        else:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            loss, dhidden, dweight = forward_torch(
                hidden.to(wide), weight.to(wide), target, valid, needs_grad
            )
        if needs_grad:
            ctx.save_for_backward(dhidden.to(hidden.dtype), dweight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        return (
            *(gradient * dloss.to(gradient.dtype) for gradient in ctx.saved_tensors),
            None,
            None,
            None,
        )


def linear_cross_entropy(hidden, weight, target, ignore_index=-100):
    """hidden [N, D], weight [V, D], target [N] int64 -> summed loss, fp32; the caller divides by its token count."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, target, ignore_index, needs_grad)
