"""Cross-entropy of a linear head in a single pass: the loss of supervised fine-tuning.

    z    = hidden @ weight.T
    loss = sum over tokens of logsumexp(z) - z[target]

    dz = p - onehot,    p = softmax(z);    dhidden = dz @ weight;    dweight = dz.T @ hidden

The loss is a sum over tokens, so the gradient of a token is known as soon as its logits are.
Forward takes a chunk of tokens against the whole vocabulary, makes dz from the logits at once and
multiplies it on; backward only scales what forward left. So there are three matrix products instead
of linear_logprob's four, and no [N, V] tensor. The price: dweight is summed over chunks and needs
an fp32 buffer [V, D] (sums in bf16 drift: after 128 chunks the relative error is 1e-2, with fp32
sums 2e-3), and a second derivative does not exist.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import use_triton, wide_dtype
from kernels.linear_logprob import addmm_fp32, dz_triton, fold_triton, mm_fp32, slices

# N tokens   D model width   V vocabulary

# Logits per chunk on the GPU: 4096 tokens of Qwen3's vocabulary, 2.3 GiB in fp32. Every chunk reads
# and writes dweight, for 6% of the products' time; 2048 tokens would be 12%.
GPU_TILE = 4096 * 151936
# Logits per chunk on the CPU. But a chunk has at least 128 tokens, since the product would starve
# on fewer, and at least 512 tokens beside a big weight.
CPU_TILE = 2**18
# A weight of more numbers than this is big: no cache holds it, and each chunk of tokens reads it
# twice and reads and writes its gradient.
BIG = 2**23


def tokens_of_chunk(num_tokens, vocab, frozen):
    """Tokens per chunk on the GPU: of equal chunks, the fewest that GPU_TILE allows.

    A frozen weight has no dweight, so that half of the memory is as fast.
    """
    most = max(GPU_TILE // vocab // (2 if frozen else 1), 1)
    num_chunks = max(-(-num_tokens // most), 1)
    return max(-(-num_tokens // num_chunks), 1)


def linear_cross_entropy_ref(hidden, weight, target, ignore_index=-100):
    """The definition, logits and all; arguments as in linear_cross_entropy."""
    dtype = wide_dtype(hidden)
    z = hidden.to(dtype) @ weight.to(dtype).T
    return F.cross_entropy(z, target, ignore_index=ignore_index, reduction="sum")


def forward_torch(hidden, weight, target, valid, needs_grad, frozen):
    """The CPU path: returns the summed loss and, if needs_grad, dhidden [N, D] and dweight [V, D].

    valid [N] is False for the tokens to ignore, whose target must be 0. A frozen weight has no
    gradient.
    """
    loss = hidden.new_zeros(())
    dhidden = torch.empty_like(hidden) if needs_grad else None
    dweight = torch.zeros_like(weight) if needs_grad and not frozen else None

    least = 512 if weight.numel() > BIG else 128
    for block in slices(len(hidden), max(least, CPU_TILE // len(weight))):
        index = target[block, None]
        counts = valid[block, None].to(hidden.dtype)  # 1.0 or, for a token to ignore, 0.0

        # z [tokens, V]; logprob [tokens, 1] of the targets
        z = hidden[block] @ weight.T
        logprobs = torch.log_softmax(z, dim=-1)
        logprob = logprobs.gather(1, index)
        loss -= (logprob * counts).sum()
        if not needs_grad:
            continue

        # dz = (p - onehot) * counts. For the target, p - 1 = expm1(log p) keeps its digits.
        dz = torch.exp(logprobs, out=z)
        dz.scatter_(1, index, torch.expm1(logprob)).mul_(counts)
        torch.mm(dz, weight, out=dhidden[block])
        if not frozen:
            dweight.addmm_(dz.T, hidden[block])
    return loss, dhidden, dweight


def forward_triton(hidden, weight, target, valid, needs_grad, frozen):
    """forward_torch on the GPU, with the row kernels of linear_logprob.py."""
    num_tokens = len(hidden)
    vocab = len(weight)
    dtype = hidden.dtype
    loss = hidden.new_zeros((), dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if needs_grad else None
    dweight = None
    if needs_grad and not frozen:
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    # Memory for the logits and the dz of one chunk, used again by each chunk.
    chunk = tokens_of_chunk(num_tokens, vocab, frozen)
    z_buffer = hidden.new_empty(chunk, vocab, dtype=torch.float32)
    dz_buffer = z_buffer
    if dtype != torch.float32:
        dz_buffer = z_buffer.new_empty(z_buffer.shape, dtype=dtype)
    scale = z_buffer.new_ones(len(z_buffer))  # temperature 1

    for block in slices(num_tokens, chunk):
        rows = block.stop - block.start
        z = mm_fp32(hidden[block], weight.T, z_buffer[:rows])
        dz = dz_buffer[:rows]

        # Fold each row of logits into its running numbers, see fold_torch.
        state = z.new_zeros(4, rows)
        m, s, _, zt = state
        m.fill_(-1e30)
        fold_triton(z, target[block], scale, state, 0)
        lse = m + s.log()
        logprob = zt - lse

        # loss = -sum of logprob over the valid tokens, so dlogprob is -1 for these and else 0
        dlogprob = -valid[block].float()
        loss += torch.dot(logprob, dlogprob)
        if not needs_grad:
            continue

        # dz = dlogprob * (onehot - p); without dentropy the entropy is not read
        dz_triton(z, dz, target[block], scale, logprob, logprob, lse, dlogprob, None, 0)
        torch.mm(dz, weight, out=dhidden[block])
        if not frozen:
            addmm_fp32(dweight, dz.T, hidden[block])
    return loss, dhidden, dweight


class LinearCrossEntropy(torch.autograd.Function):
    """The autograd node: forward makes the gradients, backward scales them.

    Backward multiplies by the gradient of the loss on the device, without reading it on the host.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, ignore_index, needs_grad):
        frozen = not weight.requires_grad
        valid = target != ignore_index
        target = target.masked_fill(~valid, 0)
        if use_triton(hidden, weight, target):
            loss, dhidden, dweight = forward_triton(
                hidden, weight, target, valid, needs_grad, frozen
            )
        else:
            dtype = wide_dtype(hidden)
            loss, dhidden, dweight = forward_torch(
                hidden.to(dtype), weight.to(dtype), target, valid, needs_grad, frozen
            )
        if needs_grad:
            if not frozen:
                dweight = dweight.to(weight.dtype)
            ctx.save_for_backward(dhidden.to(hidden.dtype), dweight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        dhidden = times(dhidden, dloss)
        if dweight is not None:
            dweight = times(dweight, dloss)
        return dhidden, dweight, None, None, None


def times(rows, factor):
    """rows [N, D] times an fp32 scalar on the device, multiplied in fp32, in the dtype of the rows.

    In bf16 the factor itself would be rounded, by up to 0.2%, and every gradient be off by as much.
    """
    if rows.dtype == factor.dtype:
        return rows * factor
    scaled = torch.empty_like(rows)
    # A piece at a time: the head of 8B parameters would be a copy of 2.5 GB.
    for block in slices(len(rows), 8192):
        scaled[block] = rows[block].to(wide_dtype(rows)) * factor
    return scaled


def linear_cross_entropy(hidden, weight, target, ignore_index=-100):
    """Summed cross-entropy in fp32, over the tokens whose target is not ignore_index.

    hidden [N, D], weight [V, D], target [N] int64. The caller divides by its number of tokens.
    """
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearCrossEntropy.apply(hidden, weight, target, ignore_index, needs_grad)
