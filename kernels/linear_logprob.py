"""Log-probability of a target token and entropy of its distribution, straight from hidden states.

    z = hidden @ weight.T / temperature      logprob = z[target] - logsumexp(z)      entropy = -sum(p * log p)

The logits z [N, V] are never whole in memory: at 32K tokens and a vocabulary of 151,936 they would be 20 GB in fp32,
and plain autograd keeps several copies. Instead (GPU) the vocabulary is cut into chunks: a matrix product makes one
chunk of fp32 logits for all tokens, a row kernel folds it into four numbers per token, and the chunk's memory is used
again. Backward makes each chunk a second time, turns it into dz and multiplies on: one third more arithmetic than
keeping z, memory flat in V. The matrix products are cuBLAS's; the row kernels do the rest.

Pass only the tokens that are trained on: compaction scales the whole cost by their share. fp32 logits are not
negotiable: bf16 ones are off by up to 0.06 nat at |z| = 16, and trainer and sampler then disagree about the policy.
"""

import torch

from kernels.dispatch import tl, triton, use_triton

# N tokens   D model width   V vocabulary   C one chunk of the vocabulary

VOCAB_CHUNK = 8192  # columns per chunk on the GPU: 1 GiB of fp32 logits at 32K tokens
CPU_BLOCK = 2**18  # logits per block of tokens on the CPU, which fits the cache of one core
CPU_KEEP = 2**24  # up to this many probabilities (64 MB) are kept for backward instead of being computed again


def linear_logprob_ref(hidden, weight, target, temperature=1.0):
    """The definition, logits and all."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    temperature = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    logprobs = torch.log_softmax(hidden.to(wide) @ weight.to(wide).T / temperature, dim=-1)
    return logprobs.gather(1, target[:, None])[:, 0], -torch.linalg.vecdot(logprobs.exp(), logprobs)


# ---- CPU: blocks of tokens against the whole vocabulary ----


def softmax_block(hidden, weight, inverse_temperature):
    """log p and p of one block of tokens, [block, V] in fp32."""
    z = hidden @ weight.T
    logprobs = torch.log_softmax(z if inverse_temperature is None else z.mul_(inverse_temperature[:, None]), dim=-1)
    return logprobs, logprobs.exp()


def token_blocks(num_tokens, vocab):
    """Slices of tokens whose logits fit the cache, and never fewer than 128 of them, which would starve the product."""
    step = max(128, CPU_BLOCK // vocab)
    return [slice(start, start + step) for start in range(0, num_tokens, step)]


def forward_torch(hidden, weight, target, inverse_temperature, keep):
    """Returns logprob, entropy and, where asked for and few, the probabilities."""
    num_tokens, vocab = len(hidden), len(weight)
    logprob, entropy = hidden.new_empty(2, num_tokens).unbind()
    kept = hidden.new_empty(num_tokens, vocab) if keep and num_tokens * vocab <= CPU_KEEP else None
    for block in token_blocks(num_tokens, vocab):
        scale = None if inverse_temperature is None else inverse_temperature[block]
        logprobs, probs = softmax_block(hidden[block], weight, scale)
        logprob[block] = logprobs.gather(1, target[block, None])[:, 0]
        entropy[block] = -torch.linalg.vecdot(probs, logprobs)
        if kept is not None:
            kept[block] = probs
    return logprob, entropy, kept


def backward_torch(dlogprob, dentropy, hidden, weight, target, inverse_temperature, logprob, entropy, kept):
    """dz = dlogprob * (onehot - p) - dentropy * p * (log p + entropy), all over temperature; then two products."""
    dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight)
    for block in token_blocks(len(hidden), len(weight)):
        scale = None if inverse_temperature is None else inverse_temperature[block]
        probs = softmax_block(hidden[block], weight, scale)[1] if kept is None else kept[block]
        dz = probs * -dlogprob[block, None]
        # the target's entry is dlogprob * (1 - p); -expm1(log p) keeps its digits when p is nearly 1
        dz.scatter_(1, target[block, None], (dlogprob[block] * -torch.expm1(logprob[block]))[:, None])
        if dentropy is not None:
            dz -= dentropy[block, None] * (torch.xlogy(probs, probs) + probs * entropy[block, None])
        if scale is not None:
            dz *= scale[:, None]
        torch.mm(dz, weight, out=dhidden[block])
        dweight.addmm_(dz.T, hidden[block])
    return dhidden, dweight


# ---- GPU: chunks of the vocabulary for all tokens ----


@triton.jit
def fold_chunk(
    z_ptr, target_ptr, scale_ptr, state_ptr, num_tokens, z_stride, chunk_start, chunk_cols, BLOCK: tl.constexpr,
):  # fmt: skip
    """Folds one chunk of logits into a token's four running numbers (state [4, N]):

    m = running max, -1e30 at first;  s = sum(exp(z - m));  u = sum(exp(z - m) * (z - m));  zt = the target's logit
    A new max m' rescales: a = exp(m - m');  u = a * (u + (m - m') * s);  s = a * s. In the end
    logprob = zt - m - log(s) and entropy = log(s) - u / s, which stays exact where logsumexp - sum(p * z) cancels.
    """
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
    z_ptr, dz_ptr, target_ptr, scale_ptr, logprob_ptr, entropy_ptr, lse_ptr, dlogprob_ptr, dentropy_ptr,
    z_stride, dz_stride, chunk_start, chunk_cols, blocks_per_row, HAS_DENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """backward_torch for one chunk: dz in the dtype of the products that follow, 1 / temperature included."""
    token = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    cols = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = cols < chunk_cols
    scale = tl.load(scale_ptr + token)
    logprob = tl.load(logprob_ptr + token)
    dlogprob = tl.load(dlogprob_ptr + token)
    column = tl.load(target_ptr + token) - chunk_start
    # logp = z - logsumexp(z);  p = exp(logp)
    logp = tl.load(z_ptr + token * z_stride + cols, mask=mask, other=-1e30) * scale - tl.load(lse_ptr + token)
    p = tl.exp(logp)
    # dz = dlogprob * (onehot - p), where 1 - p of the target is -expm1(logprob): a short series near 0, exp elsewhere
    series = -logprob * (1.0 + logprob * (0.5 + logprob * (0.16666667 + logprob * 0.041666668)))
    one_minus_p = tl.where(logprob > -0.05, series, 1.0 - tl.exp(logprob))
    dz = dlogprob * tl.where(cols == column, one_minus_p, -p)
    # dz -= dentropy * p * (logp + entropy)
    if HAS_DENTROPY:
        dz -= tl.load(dentropy_ptr + token) * p * (logp + tl.load(entropy_ptr + token))
    tl.store(dz_ptr + token * dz_stride + cols, (dz * scale).to(dz_ptr.dtype.element_ty), mask=mask)


def mm_fp32(a, b, out):
    """out = a @ b, summed and written in fp32: from bf16 operands that needs out_dtype, which only CUDA has."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def addmm_fp32(out, a, b):
    """out += a @ b in fp32, from operands of either width."""
    return out.addmm_(a, b) if a.dtype == out.dtype else torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def vocab_chunks(vocab):
    """Equal slices of at most VOCAB_CHUNK columns, the last one shorter."""
    return [(start, min(start + VOCAB_CHUNK, vocab)) for start in range(0, vocab, VOCAB_CHUNK)]


def forward_triton(hidden, weight, target, scale):
    """Returns logprob, entropy and logsumexp, each [N] fp32."""
    num_tokens = len(hidden)
    m, s, u, zt = state = hidden.new_zeros(4, num_tokens, dtype=torch.float32)
    m.fill_(-1e30)
    buffer = hidden.new_empty(num_tokens * min(VOCAB_CHUNK, len(weight)), dtype=torch.float32)
    for start, end in vocab_chunks(len(weight)):
        z = mm_fp32(hidden, weight[start:end].T, buffer[: num_tokens * (end - start)].view(num_tokens, -1))
        fold_chunk[(num_tokens,)](
            z, target, scale, state, num_tokens, z.stride(0), start, end - start, BLOCK=4096, num_warps=8,
        )  # fmt: skip
    log_s = s.log()
    return zt - m - log_s, log_s - u / s, m + log_s


def backward_triton(dlogprob, dentropy, hidden, weight, target, scale, logprob, entropy, lse):
    """dhidden is summed over the chunks in fp32; each chunk of dweight is one product over all tokens."""
    num_tokens, dtype = len(hidden), hidden.dtype
    dhidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    dweight = torch.empty_like(weight)
    width = min(VOCAB_CHUNK, len(weight))
    z_buffer = hidden.new_empty(num_tokens * width, dtype=torch.float32)
    dz_buffer = z_buffer if dtype == torch.float32 else hidden.new_empty(num_tokens * width)
    for start, end in vocab_chunks(len(weight)):
        cols = end - start
        z, dz = (b[: num_tokens * cols].view(num_tokens, cols) for b in (z_buffer, dz_buffer))
        mm_fp32(hidden, weight[start:end].T, z)
        blocks = triton.cdiv(cols, 4096)
        logits_to_dz[(num_tokens * blocks,)](
            z, dz, target, scale, logprob, entropy, lse, dlogprob, logprob if dentropy is None else dentropy,
            z.stride(0), dz.stride(0), start, cols, blocks,
            HAS_DENTROPY=dentropy is not None, BLOCK=4096, num_warps=8,
        )  # fmt: skip
        addmm_fp32(dhidden, dz, weight[start:end])
        torch.mm(dz.T, hidden, out=dweight[start:end])
    return dhidden, dweight


class LinearLogprob(torch.autograd.Function):
    """Two-pass: saves the inputs and a few numbers per token (on the CPU also the probabilities where they are few)."""

    @staticmethod
    def forward(ctx, hidden, weight, target, scale, keep):
        if use_triton(hidden, weight, target):
            logprob, entropy, extra = forward_triton(hidden, weight, target, scale)
        else:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            logprob, entropy, extra = forward_torch(hidden.to(wide), weight.to(wide), target, scale, keep)
        ctx.save_for_backward(hidden, weight, target, scale, logprob, entropy, extra)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, dlogprob, dentropy):
        hidden, weight, *rest = ctx.saved_tensors
        logprob = rest[2]
        dlogprob = torch.zeros_like(logprob) if dlogprob is None else dlogprob.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        if use_triton(hidden, weight):
            dhidden, dweight = backward_triton(dlogprob, dentropy, hidden, weight, *rest)
        else:
            dhidden, dweight = backward_torch(dlogprob, dentropy, hidden.to(logprob), weight.to(logprob), *rest)
        return dhidden.to(hidden.dtype), dweight.to(weight.dtype), None, None, None


def linear_logprob(hidden, weight, target, temperature=1.0):
    """hidden [N, D], weight [V, D], target [N] int64, temperature float or [N] -> (logprob [N], entropy [N]), fp32.

    Differentiable in both outputs with respect to hidden and weight. temperature must be positive.
    """
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
