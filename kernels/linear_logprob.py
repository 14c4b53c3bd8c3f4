"""Log-probability of a target token and entropy of its distribution, straight from hidden states.

    z       = hidden @ weight.T / temperature
    logprob = z[target] - logsumexp(z)
    entropy = -sum(p * log p),    p = softmax(z)

    dz      = (dlogprob * (onehot - p) - dentropy * p * (log p + entropy)) / temperature
    dhidden = dz @ weight
    dweight = dz.T @ hidden

The logits z [N, V] are never whole in memory: at 32K tokens and a vocabulary of 151,936 they would
be 20 GB in fp32, and plain autograd keeps several copies. Instead they are made tile by tile. Each
tile is folded into four numbers per token, and its memory is used again. Backward makes each tile
a second time, turns it into dz and multiplies on. That is one third more arithmetic than keeping z,
with memory flat in V. The matrix products are the library's; the rest is row work.

On the GPU a tile is all tokens x 8192 columns: one fat product, dweight is written once, and no sum
over tokens has to be carried. On the CPU a tile is what one core's cache holds. A vocabulary that
fits one tile keeps its probabilities and is not made again.

Pass only the tokens that are trained on: compaction scales the whole cost by their share. fp32
logits are not negotiable: bf16 logits are off by up to 0.06 nat at |z| = 16, and trainer and
sampler then disagree about the policy.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import tl, triton, use_triton, wide_dtype

# N tokens   D model width   V vocabulary

# Columns of a tile on the GPU: 1 GiB of fp32 logits at 32K tokens.
GPU_COLUMNS = 8192
# Columns of a tile on the CPU, and logits of a tile in all (1 MB).
CPU_COLUMNS = 2048
CPU_TILE = 2**18
# The CPU keeps at most this many probabilities for backward (64 MB).
CPU_KEEP = 2**24


def linear_logprob_ref(hidden, weight, target, temperature=1.0):
    """The definition, logits and all; arguments as in linear_logprob."""
    dtype = wide_dtype(hidden)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[:, None]
    z = hidden.to(dtype) @ weight.to(dtype).T / temperature
    logprobs = torch.log_softmax(z, dim=-1)
    logprob = logprobs.gather(1, target[:, None])[:, 0]
    entropy = -torch.linalg.vecdot(logprobs.exp(), logprobs)
    return logprob, entropy


def fold_torch(z, column, scale, state, out=None):
    """Fold a tile of logits z [tokens, columns] into the running numbers of its tokens, in place.

    state [4, tokens] holds, for each token and all columns so far,

    m  = running max, -1e30 at first        s  = sum(exp(z - m))
    zt = the target's logit                 u  = sum(exp(z - m) * (z - m))

    When a tile raises the max from m to m', the sums are rescaled: with a = exp(m - m'),
    u = a * (u + (m - m') * s) and s = a * s. In the end logprob = zt - m - log(s) and
    entropy = log(s) - u / s, which stays exact where logsumexp - sum(p * z) cancels.

    column [tokens] is the target's column in this tile, which may lie outside of it. scale is
    1 / temperature [tokens] or None for 1. out, if given, receives exp(z - m). z is overwritten.
    """
    m, s, u, zt = state
    if scale is not None:
        z *= scale[:, None]

    # zt += z[target], for the tokens whose target lies in this tile
    inside = (column >= 0) & (column < z.shape[1])
    safe_column = torch.where(inside, column, 0)
    target_logit = z.gather(1, safe_column[:, None])[:, 0]
    zt += torch.where(inside, target_logit, 0.0)

    # m' = max(m, z) and e = exp(z - m')
    new_m = torch.maximum(m, z.amax(1))
    shrink = m - new_m
    a = shrink.exp()
    centred = z.sub_(new_m[:, None])
    e = torch.exp(centred, out=out)

    # u = a * (u + (m - m') * s) + sum(e * (z - m'))
    u.add_(shrink * s).mul_(a).add_(torch.linalg.vecdot(e, centred))
    # s = a * s + sum(e)
    s.mul_(a).add_(e.sum(1))
    m.copy_(new_m)


def dz_torch(z, p, column, scale, logprob, entropy, lse, dlogprob, dentropy):
    """The gradient dz [tokens, columns] of a tile, by the formula above.

    Takes the logits z, or their probabilities p if forward kept them; p, scale and dentropy may be
    None. column is as in fold_torch, lse is logsumexp(z), the other arguments are [tokens].
    """
    if p is None:
        if scale is not None:
            z = z.mul_(scale[:, None])
        p = z.sub_(lse[:, None]).exp_()

    # dz = dlogprob * (onehot - p). The target's entry has 1 - p = -expm1(log p), which keeps its
    # digits near p = 1.
    dz = p * -dlogprob[:, None]
    inside = ((column >= 0) & (column < p.shape[1])).nonzero()[:, 0]
    target_dz = dlogprob * -torch.expm1(logprob)
    dz[inside, column[inside]] = target_dz[inside]

    # dz -= dentropy * p * (log p + entropy)
    if dentropy is not None:
        p_log_p = torch.xlogy(p, p)
        dz -= p_log_p.addcmul_(p, entropy[:, None]).mul_(dentropy[:, None])

    if scale is not None:
        dz.mul_(scale[:, None])
    return dz


@triton.jit
def fold_chunk(
    z_ptr,
    target_ptr,
    scale_ptr,
    state_ptr,
    num_tokens,
    z_stride,
    chunk_start,
    chunk_cols,
    BLOCK: tl.constexpr,
):
    """fold_torch, one program per token; m, s, u stay in registers over the walk along the columns.

    The tile covers the vocabulary from chunk_start on; state is [4, num_tokens].
    """
    token = tl.program_id(0).to(tl.int64)
    row_ptr = z_ptr + token * z_stride
    scale = tl.load(scale_ptr + token)
    state = state_ptr + token
    m = tl.load(state)
    s = tl.load(state + num_tokens)
    u = tl.load(state + 2 * num_tokens)

    cols = tl.arange(0, BLOCK)
    for start in range(0, chunk_cols, BLOCK):
        mask = start + cols < chunk_cols
        z = tl.load(row_ptr + start + cols, mask=mask, other=-1e30) * scale
        # m' = max(m, z) and e = exp(z - m')
        new_m = tl.maximum(m, tl.max(z))
        shrink = m - new_m
        a = tl.exp(shrink)
        centred = z - new_m
        e = tl.exp(centred)
        # the old sums, rescaled to the new max, plus those of this block
        u = a * (u + shrink * s) + tl.sum(e * centred)
        s = a * s + tl.sum(e)
        m = new_m
    tl.store(state, m)
    tl.store(state + num_tokens, s)
    tl.store(state + 2 * num_tokens, u)

    # zt = z[target], if the target lies in this tile
    column = tl.load(target_ptr + token) - chunk_start
    if (column >= 0) & (column < chunk_cols):
        target_logit = tl.load(row_ptr + column) * scale
        tl.store(state + 3 * num_tokens, target_logit)


@triton.jit
def logits_to_dz(
    z_ptr,
    dz_ptr,
    target_ptr,
    scale_ptr,
    logprob_ptr,
    entropy_ptr,
    lse_ptr,
    dlogprob_ptr,
    dentropy_ptr,
    z_stride,
    dz_stride,
    chunk_start,
    chunk_cols,
    blocks_per_row,
    HAS_DENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz_torch, one program per BLOCK columns of one token.

    dz is stored in the dtype of the products that follow.
    """
    token = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    cols = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = cols < chunk_cols
    scale = tl.load(scale_ptr + token)
    logprob = tl.load(logprob_ptr + token)
    dlogprob = tl.load(dlogprob_ptr + token)
    column = tl.load(target_ptr + token) - chunk_start

    # p = exp(logp),  logp = z - logsumexp(z)
    z = tl.load(z_ptr + token * z_stride + cols, mask=mask, other=-1e30) * scale
    logp = z - tl.load(lse_ptr + token)
    p = tl.exp(logp)

    # dz = dlogprob * (onehot - p). For the target, 1 - p = -expm1(logprob): Triton has no expm1, so
    # near 0 it is a short series, elsewhere 1 - exp.
    series = -logprob * (1.0 + logprob * (0.5 + logprob * (0.16666667 + logprob * 0.041666668)))
    one_minus_p = tl.where(logprob > -0.05, series, 1.0 - tl.exp(logprob))
    dz = dlogprob * tl.where(cols == column, one_minus_p, -p)

    # dz -= dentropy * p * (logp + entropy)
    if HAS_DENTROPY:
        dentropy = tl.load(dentropy_ptr + token)
        entropy = tl.load(entropy_ptr + token)
        dz -= dentropy * p * (logp + entropy)

    dz_row = dz_ptr + token * dz_stride
    tl.store(dz_row + cols, (dz * scale).to(dz_ptr.dtype.element_ty), mask=mask)


def fold_triton(z, target, scale, state, start):
    """Launch fold_chunk on a tile z [tokens, columns], which is the vocabulary from `start` on."""
    num_tokens, num_cols = z.shape
    fold_chunk[(num_tokens,)](
        z,
        target,
        scale,
        state,
        num_tokens,
        z.stride(0),
        start,
        num_cols,
        BLOCK=4096,
        num_warps=8,
    )


def dz_triton(z, dz, target, scale, logprob, entropy, lse, dlogprob, dentropy, start):
    """Launch logits_to_dz on a tile z [tokens, columns]; writes to dz. dentropy may be None."""
    num_tokens, num_cols = z.shape
    blocks_per_row = triton.cdiv(num_cols, 4096)
    logits_to_dz[(num_tokens * blocks_per_row,)](
        z,
        dz,
        target,
        scale,
        logprob,
        entropy,
        lse,
        dlogprob,
        # An unused pointer argument must still be a tensor.
        logprob if dentropy is None else dentropy,
        z.stride(0),
        dz.stride(0),
        start,
        num_cols,
        blocks_per_row,
        HAS_DENTROPY=dentropy is not None,
        BLOCK=4096,
        num_warps=8,
    )


def mm_fp32(a, b, out):
    """out = a @ b, summed and written in fp32.

    From bf16 operands this needs torch.mm's out_dtype, which only CUDA has.
    """
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def head_logits(hidden, weight):
    """The logits hidden @ weight.T [N, V] of a sampler: the product that linear_logprob makes.

    Operands in bf16 are multiplied and summed in fp32, and the sum stays in fp32.
    """
    wide = wide_dtype(hidden)
    if hidden.is_cuda and hidden.dtype != wide:
        return torch.mm(hidden, weight.T, out_dtype=wide)
    # PyTorch's CPU has no product of bf16 operands with an fp32 result.
    return F.linear(hidden.to(wide), weight.to(wide))


def addmm_fp32(out, a, b):
    """out += a @ b in fp32, from operands in fp32 or bf16."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def slices(total, size):
    """Slices of at most `size` that cover range(total) in order."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def tiles(num_tokens, vocab, on_gpu):
    """Slices of the vocabulary and slices of the tokens; every pair of two is a tile of logits."""
    width = min(vocab, GPU_COLUMNS if on_gpu else CPU_COLUMNS)
    height = num_tokens if on_gpu else CPU_TILE // width
    return slices(vocab, width), slices(num_tokens, max(1, height))


def new_buffer(column_slices, token_blocks, like, dtype):
    """Memory for the largest tile, which is the first."""
    height = token_blocks[0].stop if token_blocks else 0
    return like.new_empty(column_slices[0].stop * height, dtype=dtype)


def make_tile(hidden, weight, block, columns, buffer):
    """The logits [tokens, columns] of one tile, in the memory of the buffer."""
    height = block.stop - block.start
    width = columns.stop - columns.start
    tile = buffer[: height * width].view(height, width)
    return mm_fp32(hidden[block], weight[columns].T, tile)


def rows_of(x, block):
    """The rows of a per-token tensor that belong to a block of tokens; None stays None."""
    return None if x is None else x[block]


def forward_tiles(hidden, weight, target, scale, keep, on_gpu):
    """Return logprob, entropy and logsumexp [N], and the probabilities [N, V] or None.

    The probabilities are kept if `keep` asks for them and they are few, see CPU_KEEP.
    """
    num_tokens = len(hidden)
    vocab = len(weight)
    dtype = wide_dtype(hidden)
    column_slices, token_blocks = tiles(num_tokens, vocab, on_gpu)
    buffer = new_buffer(column_slices, token_blocks, hidden, dtype)

    # The four running numbers of every token, see fold_torch.
    state = hidden.new_zeros(4, num_tokens, dtype=dtype)
    m, s, u, zt = state
    m.fill_(-1e30)

    kept = None
    few = num_tokens * vocab <= CPU_KEEP
    if keep and not on_gpu and len(column_slices) == 1 and few:
        kept = hidden.new_empty(num_tokens, vocab)

    for columns in column_slices:
        for block in token_blocks:
            z = make_tile(hidden, weight, block, columns, buffer)
            if on_gpu:
                fold_triton(z, target, scale, state, columns.start)
                continue
            column = target[block] - columns.start
            kept_rows = rows_of(kept, block)
            fold_torch(z, column, rows_of(scale, block), state[:, block], kept_rows)
            if kept is not None:
                # exp(z - m) becomes p: with one tile of columns, s is final already.
                kept_rows.mul_(s[block, None].reciprocal())

    log_s = s.log()
    logprob = zt - m - log_s
    entropy = log_s - u / s
    return logprob, entropy, m + log_s, kept


def backward_tiles(
    dlogprob, dentropy, hidden, weight, target, scale, logprob, entropy, lse, kept, on_gpu, frozen
):
    """Return dhidden [N, D], summed over the columns in fp32, and dweight [V, D].

    The rows of dweight are final as soon as their columns are done. A frozen weight has none.
    """
    num_tokens = len(hidden)
    column_slices, token_blocks = tiles(num_tokens, len(weight), on_gpu)
    dhidden = torch.zeros(hidden.shape, dtype=logprob.dtype, device=hidden.device)
    dweight = None
    if not frozen:
        dweight = torch.empty_like(weight) if num_tokens else torch.zeros_like(weight)

    buffer = new_buffer(column_slices, token_blocks, hidden, logprob.dtype)
    if hidden.dtype == buffer.dtype:
        dz_buffer = buffer
    else:
        dz_buffer = new_buffer(column_slices, token_blocks, hidden, hidden.dtype)

    per_token = scale, logprob, entropy, lse, dlogprob, dentropy
    for columns in column_slices:
        for block in token_blocks:
            # z and dz [tokens, columns]
            z = None
            if kept is None:
                z = make_tile(hidden, weight, block, columns, buffer)
            if on_gpu:
                dz = dz_buffer[: z.numel()].view(z.shape)
                dz_triton(z, dz, target, *per_token, columns.start)
            else:
                column = target[block] - columns.start
                rows = [rows_of(x, block) for x in per_token]
                dz = dz_torch(z, rows_of(kept, block), column, *rows)

            addmm_fp32(dhidden[block], dz, weight[columns])
            if frozen:
                continue
            # The first block of tokens overwrites what was in memory, the others add to it.
            beta = 0 if block is token_blocks[0] else 1
            dweight[columns].addmm_(dz.T, hidden[block], beta=beta)
    return dhidden, dweight


class LinearLogprob(torch.autograd.Function):
    """The autograd node: it saves its inputs and a few numbers per token.

    On the CPU it also saves the probabilities where they are few.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, scale, keep):
        ctx.hidden_dtype = hidden.dtype
        ctx.weight_dtype = weight.dtype
        ctx.on_gpu = use_triton(hidden, weight, target)
        # PyTorch's CPU has no product of bf16 operands with an fp32 result.
        if not ctx.on_gpu:
            hidden = hidden.to(wide_dtype(hidden))
            weight = weight.to(wide_dtype(weight))
        logprob, entropy, lse, kept = forward_tiles(hidden, weight, target, scale, keep, ctx.on_gpu)
        ctx.save_for_backward(hidden, weight, target, scale, logprob, entropy, lse, kept)
        # An output that nobody used has gradient None, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, dlogprob, dentropy):
        hidden, weight, target, scale, logprob, entropy, lse, kept = ctx.saved_tensors
        if dlogprob is None:
            dlogprob = torch.zeros_like(logprob)
        dlogprob = dlogprob.contiguous()
        if dentropy is not None:
            dentropy = dentropy.contiguous()
        saved = hidden, weight, target, scale, logprob, entropy, lse, kept
        frozen = not ctx.needs_input_grad[1]
        dhidden, dweight = backward_tiles(dlogprob, dentropy, *saved, ctx.on_gpu, frozen)
        if not frozen:
            dweight = dweight.to(ctx.weight_dtype)
        return dhidden.to(ctx.hidden_dtype), dweight, None, None, None


def linear_logprob(hidden, weight, target, temperature=1.0):
    """Log-probability of each token's target and entropy of its distribution, both [N] in fp32.

    hidden [N, D], weight [V, D], target [N] int64, temperature a float or [N]. Both outputs are
    differentiable in hidden and weight.
    """
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(-1) != 1:
        weight = weight.contiguous()

    # scale = 1 / temperature [N], or None for 1 on the CPU.
    dtype = wide_dtype(hidden)
    if isinstance(temperature, torch.Tensor):
        scale = temperature.to(dtype).reciprocal()
    elif temperature == 1.0 and not use_triton(hidden, weight):
        scale = None
    else:
        # A Python float as kernel argument would recompile, or under torch.compile become fp64.
        scale = torch.full((len(hidden),), 1.0 / temperature, dtype=dtype, device=hidden.device)

    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearLogprob.apply(hidden, weight, target, scale, keep)
