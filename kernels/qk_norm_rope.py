"""RMSNorm of every query and key head, then the rotary position embedding, in one pass (as Qwen3).

    z = weight * x / rms(x)                               over the H numbers of one head
    y = [z1 * cos - z2 * sin,  z2 * cos + z1 * sin]       z1, z2 are the two halves of z
                                                          (Hugging Face's rotate-half layout)

Backward undoes the rotation (its inverse is the rotation with -sin) and then applies the gradient
of RMSNorm, see rms_norm.py. q and k may be views into one fused projection: the heads of a token
lie side by side, tokens may lie any distance apart.
"""

import torch

from kernels.dispatch import cast, cpu_without_grad, num_programs, tl, triton, use_triton, widen
from kernels.rms_norm import inverse_rms, rms_norm_ref

# T tokens   N query heads   K key heads   H head width


def rotate_ref(z, cos_T1H, sin_T1H):
    """The rotation of z [T, heads, H]; cos and sin [T, 1, H/2] belong to each token's position."""
    z1, z2 = z.chunk(2, dim=-1)
    y1 = z1 * cos_T1H - z2 * sin_T1H
    y2 = z2 * cos_T1H + z1 * sin_T1H
    return torch.cat((y1, y2), dim=-1).to(z.dtype)


def qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, position_ids, eps=1e-6):
    """The definition; shapes as in qk_norm_rope."""
    cos_T1H = cos[position_ids][:, None]
    sin_T1H = sin[position_ids][:, None]
    q_out = rotate_ref(rms_norm_ref(q, q_weight, eps), cos_T1H, sin_T1H)
    k_out = rotate_ref(rms_norm_ref(k, k_weight, eps), cos_T1H, sin_T1H)
    return q_out, k_out


# All layers of a forward pass ask for the same angles, so the last answers are kept.
last_tables = None  # ((cos, sin), the two full-width tables)
last_angles = None  # ((cos, sin, position_ids), version of position_ids, the rows of the tables)


def same_objects(asked, known):
    """True if each tensor is the very same object as its partner."""
    return all(a is b for a, b in zip(asked, known))


def full_width_tables(cos, sin):
    """cos and sin [max_pos, H/2] -> [max_pos, 1, H]: (cos, cos) and (-sin, sin) side by side."""
    global last_tables
    if last_tables is None or not same_objects((cos, sin), last_tables[0]):
        cos_table = torch.cat((cos, cos), dim=-1)[:, None]
        sin_table = torch.cat((-sin, sin), dim=-1)[:, None]
        last_tables = (cos, sin), (cos_table, sin_table)
    return last_tables[1]


def angles(cos, sin, position_ids):
    """The rows [T, 1, H] of both full-width tables at these positions, for rotate_torch."""
    global last_angles
    asked = cos, sin, position_ids
    # PyTorch counts the in-place changes of a tensor in _version. Tensors made in inference mode
    # have no counter; the sampler's position_ids are new objects in each step.
    version = 0 if position_ids.is_inference() else position_ids._version
    known = last_angles is not None and same_objects(asked, last_angles[0])
    if not known or version != last_angles[1]:
        rows = [table.index_select(0, position_ids) for table in full_width_tables(cos, sin)]
        last_angles = asked, version, rows
    return last_angles[2]


def rotate_torch(z, cos, sin):
    """y = [z1, z2] * [cos, cos] + [z2, z1] * [-sin, sin]; cos and sin come from angles()."""
    swapped = z.roll(z.shape[-1] // 2, -1)
    return (z * cos).addcmul_(swapped, sin)


def forward_torch(x, weight, cos, sin, eps):
    """The CPU path for q or k: x [T, N, H] -> y [T, N, H] and 1 / rms [T, N, 1]."""
    dtype = x.dtype
    x = widen(x)
    rstd = inverse_rms(x, eps)
    # z = weight * x / rms(x), rounded where the reference rounds
    x_hat = cast(x * rstd, dtype)
    z = x_hat.mul_(weight) if dtype == weight.dtype else x_hat * weight
    # y = rotate(z)
    y = rotate_torch(cast(z, x.dtype), cos, sin)
    return cast(y, dtype), rstd


def backward_torch(dy, x, weight, cos, sin, rstd):
    """The gradients (dx [T, N, H], dweight [H]) of forward_torch."""
    dtype = x.dtype
    x = x.to(rstd.dtype)
    dy = dy.to(rstd.dtype)
    weight = weight.to(rstd.dtype)
    # dz = the rotation undone
    dz = rotate_torch(dy, cos, -sin)
    # dweight = sum over tokens and heads of dz * x_hat,    x_hat = x * rstd
    product = (dz * x).mul_(rstd)
    dweight = product.flatten(0, 1).sum(0)
    # dx = rstd * (g - x_hat * mean(g * x_hat)),    g = dz * weight
    mean = (product @ weight)[..., None] / x.shape[-1]
    dx = torch.mul(dz, weight, out=product)
    dx.addcmul_(x, mean.mul_(rstd), value=-1).mul_(rstd)
    return dx.to(dtype), dweight


@triton.jit
def load_halves(ptr, heads, half, mask, HALF: tl.constexpr):
    """The first and second half of each head of one token, as two [heads, half] blocks in fp32."""
    place = ptr + (heads[:, None] * 2 * HALF + half[None, :])
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(ptr, first, second, heads, half, mask, HALF: tl.constexpr):
    """The reverse of load_halves."""
    place = ptr + (heads[:, None] * 2 * HALF + half[None, :])
    tl.store(place, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(place + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_half(ptr, half, HALF: tl.constexpr):
    """Half a row of a weight, of cos or of sin, as [1, half] in fp32, to be used for all heads."""
    return tl.load(ptr + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x rounded to dtype and back in fp32, as the reference rounds."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def norm_rope_token(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """All heads of q or k of one token, forward; blocks are [heads, half], cos, sin [1, half]."""
    heads = tl.arange(0, HEADS_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    mask = (heads[:, None] < HEADS) & (half[None, :] < HALF)
    x1, x2 = load_halves(x_ptr, heads, half, mask, HALF)
    w1 = load_half(weight_ptr, half, HALF)
    w2 = load_half(weight_ptr + HALF, half, HALF)

    # rstd = (x.square().mean(-1) + eps).rsqrt()
    square_sum = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
    rstd = 1.0 / tl.sqrt(square_sum / (2 * HALF) + eps)
    tl.store(rstd_ptr + heads, rstd, mask=heads < HEADS)

    # z = weight * (x * rstd).to(x.dtype)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    z1 = rounded(rounded(x1 * rstd[:, None], dtype) * w1, dtype)
    z2 = rounded(rounded(x2 * rstd[:, None], dtype) * w2, dtype)

    # y = cat(z1 * cos - z2 * sin, z2 * cos + z1 * sin)
    y1 = z1 * cos - z2 * sin
    y2 = z2 * cos + z1 * sin
    store_halves(y_ptr, y1, y2, heads, half, mask, HALF)


@triton.jit
def norm_rope_token_backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    cos,
    sin,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """All heads of q or k of one token, backward; returns the token's dweight as two halves."""
    heads = tl.arange(0, HEADS_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    mask = (heads[:, None] < HEADS) & (half[None, :] < HALF)
    x1, x2 = load_halves(x_ptr, heads, half, mask, HALF)
    dy1, dy2 = load_halves(dy_ptr, heads, half, mask, HALF)
    w1 = load_half(weight_ptr, half, HALF)
    w2 = load_half(weight_ptr + HALF, half, HALF)
    rstd = tl.load(rstd_ptr + heads, mask=heads < HEADS, other=0.0)[:, None]

    # dz = rotate(dy, cos, -sin)
    dz1 = dy1 * cos + dy2 * sin
    dz2 = dy2 * cos - dy1 * sin
    # x_hat = x * rstd
    x_hat1 = x1 * rstd
    x_hat2 = x2 * rstd
    # g = dz * weight
    g1 = dz1 * w1
    g2 = dz2 * w2
    # dx = rstd * (g - x_hat * (g * x_hat).mean(-1))
    mean = (tl.sum(g1 * x_hat1, 1) + tl.sum(g2 * x_hat2, 1)) / (2 * HALF)
    dx1 = rstd * (g1 - x_hat1 * mean[:, None])
    dx2 = rstd * (g2 - x_hat2 * mean[:, None])
    store_halves(dx_ptr, dx1, dx2, heads, half, mask, HALF)
    # dweight = (dz * x_hat).sum over heads here, over tokens in the caller
    return tl.sum(dz1 * x_hat1, 0), tl.sum(dz2 * x_hat2, 0)


@triton.jit
def qk_norm_rope_forward(
    q_ptr,
    k_ptr,
    qw_ptr,
    kw_ptr,
    cos_ptr,
    sin_ptr,
    pos_ptr,
    q_out_ptr,
    k_out_ptr,
    q_rstd_ptr,
    k_rstd_ptr,
    q_stride,
    k_stride,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """One program per token: its cos and sin are fetched once for all query and key heads."""
    token = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_BLOCK)
    position = tl.load(pos_ptr + token).to(tl.int64)
    cos = load_half(cos_ptr + position * HALF, half, HALF)
    sin = load_half(sin_ptr + position * HALF, half, HALF)
    norm_rope_token(
        q_ptr + token * q_stride,
        qw_ptr,
        q_out_ptr + token * N * HALF * 2,
        q_rstd_ptr + token * N,
        cos,
        sin,
        eps,
        N,
        N_BLOCK,
        HALF,
        HALF_BLOCK,
    )
    norm_rope_token(
        k_ptr + token * k_stride,
        kw_ptr,
        k_out_ptr + token * K * HALF * 2,
        k_rstd_ptr + token * K,
        cos,
        sin,
        eps,
        K,
        K_BLOCK,
        HALF,
        HALF_BLOCK,
    )


@triton.jit
def qk_norm_rope_backward(
    dq_out_ptr,
    dk_out_ptr,
    q_ptr,
    k_ptr,
    qw_ptr,
    kw_ptr,
    cos_ptr,
    sin_ptr,
    pos_ptr,
    q_rstd_ptr,
    k_rstd_ptr,
    dq_ptr,
    dk_ptr,
    dweight_ptr,
    q_stride,
    k_stride,
    num_tokens,
    num_programs,
    N: tl.constexpr,
    K: tl.constexpr,
    N_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """A few programs walk over the tokens, program p of P takes the tokens p, p + P, p + 2P ...

    Each program keeps its share of the gradients of both weights in registers, as four halves
    [H/2], and the shares are summed afterwards in a fixed order.
    """
    program = tl.program_id(0)
    half = tl.arange(0, HALF_BLOCK)
    inside = half < HALF
    dqw1 = tl.zeros([HALF_BLOCK], tl.float32)
    dqw2 = tl.zeros([HALF_BLOCK], tl.float32)
    dkw1 = tl.zeros([HALF_BLOCK], tl.float32)
    dkw2 = tl.zeros([HALF_BLOCK], tl.float32)

    # num_stages=3 fetches tokens two ahead: 0.29 ms instead of 0.38 ms.
    for i in tl.range(program, num_tokens, num_programs, num_stages=3):
        token = tl.cast(i, tl.int64)
        position = tl.load(pos_ptr + token).to(tl.int64)
        cos = load_half(cos_ptr + position * HALF, half, HALF)
        sin = load_half(sin_ptr + position * HALF, half, HALF)
        q1, q2 = norm_rope_token_backward(
            dq_out_ptr + token * N * HALF * 2,
            q_ptr + token * q_stride,
            qw_ptr,
            q_rstd_ptr + token * N,
            dq_ptr + token * N * HALF * 2,
            cos,
            sin,
            N,
            N_BLOCK,
            HALF,
            HALF_BLOCK,
        )
        k1, k2 = norm_rope_token_backward(
            dk_out_ptr + token * K * HALF * 2,
            k_ptr + token * k_stride,
            kw_ptr,
            k_rstd_ptr + token * K,
            dk_ptr + token * K * HALF * 2,
            cos,
            sin,
            K,
            K_BLOCK,
            HALF,
            HALF_BLOCK,
        )
        dqw1 += q1
        dqw2 += q2
        dkw1 += k1
        dkw2 += k2

    # shares [P, 2, H]: the gradient of q_weight, then that of k_weight
    out = dweight_ptr + program * 4 * HALF + half
    tl.store(out, dqw1, mask=inside)
    tl.store(out + HALF, dqw2, mask=inside)
    tl.store(out + 2 * HALF, dkw1, mask=inside)
    tl.store(out + 3 * HALF, dkw2, mask=inside)


def launch_config(q, k, numbers_per_warp):
    """Constants to compile in: head counts and widths, and their blocks, the next powers of two.

    numbers_per_warp counts the numbers of q that one warp takes. The fastest of 256 .. 4096 are
    1024 forward and 2048 backward, where the loop keeps more numbers in flight.
    """
    _, num_q_heads, width = q.shape
    num_k_heads = k.shape[1]
    q_heads_block = triton.next_power_of_2(num_q_heads)
    num_warps = q_heads_block * triton.next_power_of_2(width) // numbers_per_warp
    return {
        "N": num_q_heads,
        "K": num_k_heads,
        "HALF": width // 2,
        "N_BLOCK": q_heads_block,
        "K_BLOCK": triton.next_power_of_2(num_k_heads),
        "HALF_BLOCK": triton.next_power_of_2(width // 2),
        "num_warps": min(8, max(1, num_warps)),
    }


def forward_triton(q, k, q_weight, k_weight, cos, sin, position_ids, eps):
    """Launch one program per token; returns both outputs and 1 / rms of each head [T, heads, 1]."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q_rstd = torch.empty(*q.shape[:2], 1, dtype=torch.float32, device=q.device)
    k_rstd = torch.empty(*k.shape[:2], 1, dtype=torch.float32, device=k.device)
    qk_norm_rope_forward[(len(q),)](
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        position_ids,
        q_out,
        k_out,
        q_rstd,
        k_rstd,
        q.stride(0),
        k.stride(0),
        eps,
        **launch_config(q, k, 1024),
    )
    return q_out, k_out, q_rstd, k_rstd


def backward_triton(
    dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, position_ids, q_rstd, k_rstd
):
    """Launch a few programs per multiprocessor and sum their shares of the weights' gradients."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    programs = min(len(q), num_programs(q.device))
    shares = torch.empty(programs, 2, q.shape[-1], dtype=torch.float32, device=q.device)
    qk_norm_rope_backward[(programs,)](
        dq_out,
        dk_out,
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        position_ids,
        q_rstd,
        k_rstd,
        dq,
        dk,
        shares,
        q.stride(0),
        k.stride(0),
        len(q),
        programs,
        **launch_config(q, k, 2048),
    )
    dq_weight, dk_weight = shares.sum(0)
    return dq, dk, dq_weight, dk_weight


class QKNormRope(torch.autograd.Function):
    """q and k in one autograd node; it saves its inputs and 1 / rms, not the normed tensors."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, position_ids, eps):
        if use_triton(q, k, q_weight, k_weight, cos, sin, position_ids):
            q_out, k_out, q_rstd, k_rstd = forward_triton(
                q, k, q_weight, k_weight, cos, sin, position_ids, eps
            )
        else:
            # From here on, cos and sin [T, 1, H] are the rows of the tokens, also in backward.
            cos, sin = angles(cos, sin, position_ids)
            q_out, q_rstd = forward_torch(q, q_weight, cos, sin, eps)
            k_out, k_rstd = forward_torch(k, k_weight, cos, sin, eps)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, position_ids, q_rstd, k_rstd)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        q, k, q_weight, k_weight, cos, sin, position_ids, q_rstd, k_rstd = ctx.saved_tensors
        dq_out = dq_out.contiguous()
        dk_out = dk_out.contiguous()
        if use_triton(q, k, q_weight, k_weight):
            saved = q, k, q_weight, k_weight, cos, sin, position_ids, q_rstd, k_rstd
            dq, dk, dq_weight, dk_weight = backward_triton(dq_out, dk_out, *saved)
        else:
            dq, dq_weight = backward_torch(dq_out, q, q_weight, cos, sin, q_rstd)
            dk, dk_weight = backward_torch(dk_out, k, k_weight, cos, sin, k_rstd)
        dq_weight = dq_weight.to(q_weight.dtype)
        dk_weight = dk_weight.to(k_weight.dtype)
        return dq, dk, dq_weight, dk_weight, None, None, None, None


def with_whole_heads(x):
    """x [T, heads, H] if the heads of a token lie side by side, else a contiguous copy of x."""
    if x.stride(1) == x.shape[2] and x.stride(2) == 1:
        return x
    return x.contiguous()


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin, position_ids, eps=1e-6):
    """Per-head RMSNorm and RoPE of q [T, N, H] and k [T, K, H] -> the same shapes.

    q_weight and k_weight [H]; cos and sin [max_pos, H/2] fp32, with YaRN's attention factor already
    in them; position_ids [T] int.
    """
    if cpu_without_grad(q, k, q_weight, k_weight, cos, sin, position_ids):
        # All heads go through as one tensor [T, N + K, H]: half as many small operations.
        heads = [q.shape[1], k.shape[1]]
        weight = torch.cat((q_weight.expand(heads[0], -1), k_weight.expand(heads[1], -1)))
        both = torch.cat((q, k), dim=1)
        y, _ = forward_torch(both, weight, *angles(cos, sin, position_ids), eps)
        return y.split(heads, dim=1)

    q = with_whole_heads(q)
    k = with_whole_heads(k)
    cos = cos.contiguous()
    sin = sin.contiguous()
    return QKNormRope.apply(q, k, q_weight, k_weight, cos, sin, position_ids, eps)
