"""Log-probability of a target token and entropy of its distribution, straight from hidden states.

    z = hidden @ weight.T / temperature      logprob = z[target] - logsumexp(z)      entropy = -sum(p * log p)

The logits z [N, V] are never whole in memory: at 32K tokens and a vocabulary of 151,936 they would be 20 GB in fp32,
and plain autograd keeps several copies. Instead they are made tile by tile, each folded into four numbers per token,
and the tile's memory is used again. Backward makes each tile a second time, turns it into dz and multiplies on: one
third more arithmetic than keeping z, memory flat in V. The matrix products are the library's; the rest is row work.
A tile is, on the GPU, all tokens x 8192 columns (one fat product, dweight written once, no sum over tokens to carry);
on the CPU what one core's cache holds. A vocabulary that fits one tile keeps its probabilities and skips the remake.

Pass only the tokens that are trained on: compaction scales the whole cost by their share. fp32 logits are not
negotiable: bf16 ones are off by up to 0.06 nat at |z| = 16, and trainer and sampler then disagree about the policy.
"""

import torch

from kernels.dispatch import tl, triton, use_triton

# N tokens   D model width   V vocabulary

# columns of a tile on the GPU: 1 GiB of fp32 logits at 32K tokens
GPU_COLUMNS = 8192
CPU_COLUMNS, CPU_TILE = 2048, 2**18  # on the CPU: columns, and logits in all (1 MB)
# probabilities (64 MB) that the CPU keeps for backward at most
CPU_KEEP = 2**24


def linear_logprob_ref(hidden, weight, target, temperature=1.0):
    """The definition, logits and all."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    temperature = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    logprobs = torch.log_softmax(hidden.to(wide) @ weight.to(wide).T / temperature, dim=-1)
    return logprobs.gather(1, target[:, None])[:, 0], -torch.linalg.vecdot(logprobs.exp(), logprobs)


def fold_torch(z, column, scale, state, out=None):
    """Folds a tile of logits into the four running numbers of its tokens, state [4, tokens]; out receives exp(z - m).

    m = running max, -1e30 at first;  s = sum(exp(z - m));  u = sum(exp(z - m) * (z - m));  zt = the target's logit
    A new max m' rescales: a = exp(m - m');  u = a * (u + (m - m') * s);  s = a * s. In the end
    logprob = zt - m - log(s) and entropy = log(s) - u / s, which stays exact where logsumexp - sum(p * z) cancels.
    """
    m, s, u, zt = state
    if scale is not None:
        z *= scale[:, None]
    inside = (column >= 0) & (column < z.shape[1])
    zt += torch.where(inside, z.gather(1, torch.where(inside, column, 0)[:, None])[:, 0], 0.0)
    new_m = torch.maximum(m, z.amax(1))
    shrink, z = m - new_m, z.sub_(new_m[:, None])
    a, e = shrink.exp(), torch.exp(z, out=out)
    u.add_(shrink * s).mul_(a).add_(torch.linalg.vecdot(e, z))
    s.mul_(a).add_(e.sum(1))
    m.copy_(new_m)


def dz_torch(z, p, column, scale, logprob, entropy, lse, dlogprob, dentropy):
    """The gradient of a tile: dz = dlogprob * (onehot - p) - dentropy * p * (log p + entropy), all over temperature.

    z is given, or p if that was kept. The target's entry is dlogprob * (1 - p); -expm1(log p) keeps its digits.
    """
    if p is None:
        z = z if scale is None else z.mul_(scale[:, None])
        p = z.sub_(lse[:, None]).exp_()
    dz = p * -dlogprob[:, None]
    inside = ((column >= 0) & (column < p.shape[1])).nonzero()[:, 0]
    dz[inside, column[inside]] = (dlogprob * -torch.expm1(logprob))[inside]
    if dentropy is not None:
        dz -= torch.xlogy(p, p).addcmul_(p, entropy[:, None]).mul_(dentropy[:, None])
    return dz if scale is None else dz.mul_(scale[:, None])


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
    """fold_torch, one program per token; its four numbers live in registers while it walks over the columns."""
    token = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + token)
    state = state_ptr + token
    m = tl.load(state)
    s = tl.load(state + num_tokens)
    u = tl.load(state + 2 * num_tokens)
    cols = tl.arange(0, BLOCK)
    for start in range(0, chunk_cols, BLOCK):
        mask = start + cols < chunk_cols
        z = tl.load(z_ptr + token * z_stride + start + cols, mask=mask, other=-1e30) * scale
        new_m = tl.maximum(m, tl.max(z))
        shrink = m - new_m
        a = tl.exp(shrink)
        centred = z - new_m
        e = tl.exp(centred)
        u = a * (u + shrink * s) + tl.sum(e * centred)
        s = a * s + tl.sum(e)
        m = new_m
    tl.store(state, m)
    tl.store(state + num_tokens, s)
    tl.store(state + 2 * num_tokens, u)
    column = tl.load(target_ptr + token) - chunk_start
    if (column >= 0) & (column < chunk_cols):
        tl.store(state + 3 * num_tokens, tl.load(z_ptr + token * z_stride + column) * scale)


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
    """dz_torch, in the dtype of the products that follow; one program per BLOCK columns of one token."""
    token = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    cols = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = cols < chunk_cols
    scale = tl.load(scale_ptr + token)
    logprob = tl.load(logprob_ptr + token)
    dlogprob = tl.load(dlogprob_ptr + token)
    column = tl.load(target_ptr + token) - chunk_start
    # logp = z - logsumexp(z);  p = exp(logp)
    logp = tl.load(z_ptr + token * z_stride + cols, mask=mask, other=-1e30) * scale - tl.load(
        lse_ptr + token
    )
    p = tl.exp(logp)
    # dz = dlogprob * (onehot - p), where 1 - p of the target is -expm1(logprob): a short series
    # near 0, exp elsewhere
    series = -logprob * (1.0 + logprob * (0.5 + logprob * (0.16666667 + logprob * 0.041666668)))
    one_minus_p = tl.where(logprob > -0.05, series, 1.0 - tl.exp(logprob))
    dz = dlogprob * tl.where(cols == column, one_minus_p, -p)
    # dz -= dentropy * p * (logp + entropy)
    if HAS_DENTROPY:
        dz -= tl.load(dentropy_ptr + token) * p * (logp + tl.load(entropy_ptr + token))
    tl.store(dz_ptr + token * dz_stride + cols, (dz * scale).to(dz_ptr.dtype.element_ty), mask=mask)


def mm_fp32(a, b, out):
    """out = a @ b, summed and written in fp32: from bf16 operands that needs out_dtype, which only CUDA has."""
    return (
        torch.mm(a, b, out=out)
        if a.dtype == out.dtype
        else torch.mm(a, b, out_dtype=out.dtype, out=out)
    )


def addmm_fp32(out, a, b):
    """out += a @ b in fp32, from operands of either width."""
    return (
        out.addmm_(a, b)
        if a.dtype == out.dtype
        else torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    )


def tiles(num_tokens, vocab, on_gpu):
    """Pairs (columns, list of token blocks) of slices that cover the logits, column by column."""
    width = min(vocab, GPU_COLUMNS if on_gpu else CPU_COLUMNS)
    height = max(1, num_tokens if on_gpu else CPU_TILE // width)
    blocks = [
        slice(start, min(start + height, num_tokens)) for start in range(0, num_tokens, height)
    ]
    return [(slice(start, min(start + width, vocab)), blocks) for start in range(0, vocab, width)]


def new_buffer(cover, like, dtype):
    """Memory for the largest tile, which is the first."""
    columns, blocks = cover[0]
    return like.new_empty(columns.stop * blocks[0].stop if blocks else 0, dtype=dtype)


def make_tile(hidden, weight, block, columns, buffer):
    """The logits of one tile, in the buffer's memory."""
    shape = block.stop - block.start, columns.stop - columns.start
    return mm_fp32(hidden[block], weight[columns].T, buffer[: shape[0] * shape[1]].view(shape))


def forward_tiles(hidden, weight, target, scale, keep, on_gpu):
    """Returns logprob, entropy and logsumexp [N], and the probabilities if they are wanted and few."""
    num_tokens, vocab, wide = (
        len(hidden),
        len(weight),
        torch.promote_types(hidden.dtype, torch.float32),
    )
    m, s, u, zt = state = hidden.new_zeros(4, num_tokens, dtype=wide)
    m.fill_(-1e30)
    cover = tiles(num_tokens, vocab, on_gpu)
    keep = keep and not on_gpu and len(cover) == 1 and num_tokens * vocab <= CPU_KEEP
    kept = hidden.new_empty(num_tokens, vocab) if keep else None
    buffer = new_buffer(cover, hidden, wide)
    for columns, blocks in cover:
        for block in blocks:
            z = make_tile(hidden, weight, block, columns, buffer)
            if on_gpu:
                fold_chunk[(num_tokens,)](
                    z,
                    target,
                    scale,
                    state,
                    num_tokens,
                    z.stride(0),
                    columns.start,
                    z.shape[1],
                    BLOCK=4096,
                    num_warps=8,
                )
            else:
                out, row_scale = (x if x is None else x[block] for x in (kept, scale))
                fold_torch(z, target[block] - columns.start, row_scale, state[:, block], out)
                if keep:
                    out.mul_(s[block, None].reciprocal())
    log_s = s.log()
    return zt - m - log_s, log_s - u / s, m + log_s, kept


def backward_tiles(
    dlogprob, dentropy, hidden, weight, target, scale, logprob, entropy, lse, kept, on_gpu
):
    """dhidden is summed over the columns in fp32; the rows of dweight are final when their columns are done."""
    num_tokens = len(hidden)
    dhidden = torch.zeros(hidden.shape, dtype=logprob.dtype, device=hidden.device)
    dweight = torch.empty_like(weight) if num_tokens else torch.zeros_like(weight)
    cover = tiles(num_tokens, len(weight), on_gpu)
    buffer = new_buffer(cover, hidden, logprob.dtype)
    dz_buffer = buffer if hidden.dtype == buffer.dtype else new_buffer(cover, hidden, hidden.dtype)
    for columns, blocks in cover:
        for block in blocks:
            z = make_tile(hidden, weight, block, columns, buffer) if kept is None else None
            if on_gpu:
                dz = dz_buffer[: z.numel()].view(z.shape)
                launches = triton.cdiv(z.shape[1], 4096)
                logits_to_dz[(num_tokens * launches,)](
                    z,
                    dz,
                    target,
                    scale,
                    logprob,
                    entropy,
                    lse,
                    dlogprob,
                    logprob if dentropy is None else dentropy,
                    z.stride(0),
                    dz.stride(0),
                    columns.start,
                    z.shape[1],
                    launches,
                    HAS_DENTROPY=dentropy is not None,
                    BLOCK=4096,
                    num_warps=8,
                )
            else:
                p, *rows = (
                    x if x is None else x[block]
                    for x in (kept, scale, logprob, entropy, lse, dlogprob, dentropy)
                )
                dz = dz_torch(z, p, target[block] - columns.start, *rows)
            addmm_fp32(dhidden[block], dz, weight[columns])
            dweight[columns].addmm_(dz.T, hidden[block], beta=0 if block is blocks[0] else 1)
    return dhidden, dweight


class LinearLogprob(torch.autograd.Function):
    """Saves the inputs and a few numbers per token (on the CPU also the probabilities where they are few)."""

    @staticmethod
    def forward(ctx, hidden, weight, target, scale, keep):
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.on_gpu = use_triton(hidden, weight, target)
        # PyTorch's CPU has no product of bf16 operands with an fp32 result
        if not ctx.on_gpu:
            hidden, weight = (
                x.to(torch.promote_types(x.dtype, torch.float32)) for x in (hidden, weight)
            )
        logprob, entropy, lse, kept = forward_tiles(hidden, weight, target, scale, keep, ctx.on_gpu)
        ctx.save_for_backward(hidden, weight, target, scale, logprob, entropy, lse, kept)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, dlogprob, dentropy):
        hidden, weight, target, scale, logprob, *rest = ctx.saved_tensors
        dlogprob = torch.zeros_like(logprob) if dlogprob is None else dlogprob.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        grads = backward_tiles(
            dlogprob, dentropy, hidden, weight, target, scale, logprob, *rest, ctx.on_gpu
        )
        return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes)), None, None, None


def linear_logprob(hidden, weight, target, temperature=1.0):
    """hidden [N, D], weight [V, D], target [N] int64, temperature float or [N] -> (logprob [N], entropy [N]), fp32.

    Both outputs are differentiable in hidden and weight."""
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if isinstance(temperature, torch.Tensor):
        scale = temperature.to(wide).reciprocal()
    elif temperature == 1.0 and not use_triton(hidden, weight):
        scale = None
    else:  # a tensor: a Python float as kernel argument would recompile or be promoted to fp64 under torch.compile
        scale = torch.full((len(hidden),), 1.0 / temperature, dtype=wide, device=hidden.device)
    keep = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return LinearLogprob.apply(hidden, weight, target, scale, keep)
