"""RMSNorm of every query and key head, then the rotary position embedding, in one pass (Qwen3's order).

    z = weight * x / rms(x)                      over the H numbers of one head
    y = [z1 * cos - z2 * sin,  z2 * cos + z1 * sin]      z1, z2 the two halves of z (HF's rotate-half layout)

Backward undoes the rotation (its inverse is itself with -sin), then applies the RMSNorm gradient of rms_norm.py.
q and k may be views into one fused projection: a token's heads lie side by side, tokens any distance apart.
"""

import torch

from kernels.dispatch import bare, cast, num_programs, tl, triton, use_triton, wide
from kernels.rms_norm import inverse_rms, rms_norm_ref

# T tokens   N query heads   K key heads   H head width


def qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, position_ids, eps=1e-6):
    """The definition; shapes as in qk_norm_rope."""
    cos_T1H, sin_T1H = cos[position_ids][:, None], sin[position_ids][:, None]

    def rotate(z):
        z1, z2 = z.chunk(2, dim=-1)
        return torch.cat((z1 * cos_T1H - z2 * sin_T1H, z2 * cos_T1H + z1 * sin_T1H), dim=-1).to(
            z.dtype
        )

    return rotate(rms_norm_ref(q, q_weight, eps)), rotate(rms_norm_ref(k, k_weight, eps))


# (what was looked up, what was found): all layers of a forward pass ask for the same
last_angles = None
last_tables = None  # ((cos, sin), the same as rotate_torch wants them)


def angles(cos, sin, position_ids):
    """The rows of these tokens for rotate_torch: cos [T, 1, H] holds both halves, sin [T, 1, H] carries the minus of the first."""
    global last_angles, last_tables
    # the sampler's are new each step
    asked, version = (
        (cos, sin, position_ids),
        0 if position_ids.is_inference() else position_ids._version,
    )
    if (
        last_angles is None
        or any(a is not b for a, b in zip(asked, last_angles[0]))
        or version != last_angles[1]
    ):
        if last_tables is None or any(a is not b for a, b in zip(asked, last_tables[0])):
            last_tables = (
                asked[:2],
                [torch.cat(halves, dim=-1)[:, None] for halves in ((cos, cos), (-sin, sin))],
            )
        last_angles = (
            asked,
            version,
            [table.index_select(0, position_ids) for table in last_tables[1]],
        )
    return last_angles[2]


def rotate_torch(z, cos, sin):
    """cos and sin as angles() gives them."""
    return (z * cos).addcmul_(z.roll(z.shape[-1] // 2, -1), sin)


def forward_torch(x, weight, cos, sin, eps):
    """One of q, k on the CPU; returns y and 1 / rms [T, N, 1]."""
    dtype, x = x.dtype, wide(x)
    rstd = inverse_rms(x, eps)
    x_hat = cast(x * rstd, dtype)
    z = x_hat.mul_(weight) if dtype == weight.dtype else x_hat * weight
    return cast(rotate_torch(cast(z, x.dtype), cos, sin), dtype), rstd


def backward_torch(dy, x, weight, cos, sin, rstd):
    """dz = rotate(dy, cos, -sin); then as in rms_norm.py: dweight = sum(dz * x_hat), dx = rstd * (g - x_hat * mean)."""
    dtype, (x, dy, weight) = x.dtype, (t.to(rstd.dtype) for t in (x, dy, weight))
    dz = rotate_torch(dy, cos, -sin)
    product = (dz * x).mul_(rstd)
    dweight = product.flatten(0, 1).sum(0)
    mean = (product @ weight)[..., None] / x.shape[-1]
    dx = torch.mul(dz, weight, out=product).addcmul_(x, mean.mul_(rstd), value=-1).mul_(rstd)
    return dx.to(dtype), dweight


@triton.jit
def load_halves(ptr, heads, half, mask, HALF: tl.constexpr):
    """The first and second half of each head of one token, as two [heads, half] blocks in fp32."""
    offsets = heads[:, None] * 2 * HALF + half[None, :]
    first = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_halves(ptr, first, second, heads, half, mask, HALF: tl.constexpr):
    """The reverse of load_halves."""
    offsets = heads[:, None] * 2 * HALF + half[None, :]
    tl.store(ptr + offsets, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + offsets + HALF, second.to(ptr.dtype.element_ty), mask=mask)


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
    """All heads of q or k of one token, forward."""
    heads, half = tl.arange(0, HEADS_BLOCK), tl.arange(0, HALF_BLOCK)
    mask = (heads[:, None] < HEADS) & (half[None, :] < HALF)
    x1, x2 = load_halves(x_ptr, heads, half, mask, HALF)
    w1 = tl.load(weight_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    # rstd = (x.square().mean(-1) + eps).rsqrt()
    rstd = 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)
    tl.store(rstd_ptr + heads, rstd, mask=heads < HEADS)
    # z = weight * (x * rstd).to(x.dtype), rounded once more as the reference does
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    z1 = ((x1 * rstd[:, None]).to(dtype).to(tl.float32) * w1).to(dtype).to(tl.float32)
    z2 = ((x2 * rstd[:, None]).to(dtype).to(tl.float32) * w2).to(dtype).to(tl.float32)
    # y = cat(z1 * cos - z2 * sin, z2 * cos + z1 * sin)
    store_halves(y_ptr, z1 * cos - z2 * sin, z2 * cos + z1 * sin, heads, half, mask, HALF)


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
    """All heads of q or k of one token, backward; returns the token's share of dweight in two halves."""
    heads, half = tl.arange(0, HEADS_BLOCK), tl.arange(0, HALF_BLOCK)
    mask = (heads[:, None] < HEADS) & (half[None, :] < HALF)
    x1, x2 = load_halves(x_ptr, heads, half, mask, HALF)
    dy1, dy2 = load_halves(dy_ptr, heads, half, mask, HALF)
    w1 = tl.load(weight_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)[None, :]
    rstd = tl.load(rstd_ptr + heads, mask=heads < HEADS, other=0.0)[:, None]
    # dz = rotate(dy, cos, -sin)
    dz1, dz2 = dy1 * cos + dy2 * sin, dy2 * cos - dy1 * sin
    # x_hat = x * rstd;  g = dz * weight;  dx = rstd * (g - x_hat * (g * x_hat).mean(-1))
    x1, x2, g1, g2 = x1 * rstd, x2 * rstd, dz1 * w1, dz2 * w2
    mean = ((tl.sum(g1 * x1, 1) + tl.sum(g2 * x2, 1)) / (2 * HALF))[:, None]
    store_halves(dx_ptr, rstd * (g1 - x1 * mean), rstd * (g2 - x2 * mean), heads, half, mask, HALF)
    # dweight = (dz * x_hat).sum over tokens and heads
    return tl.sum(dz1 * x1, 0), tl.sum(dz2 * x2, 0)


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
    angle = tl.load(pos_ptr + token).to(tl.int64) * HALF + half
    cos = tl.load(cos_ptr + angle, mask=half < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=half < HALF, other=0.0)[None, :]
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
    """A few programs walk over the tokens; each keeps its share of both weights' gradients, [4, H/2] in registers."""
    program = tl.program_id(0)
    half = tl.arange(0, HALF_BLOCK)
    inside = half < HALF
    dqw1, dqw2 = tl.zeros([HALF_BLOCK], tl.float32), tl.zeros([HALF_BLOCK], tl.float32)
    dkw1, dkw2 = tl.zeros([HALF_BLOCK], tl.float32), tl.zeros([HALF_BLOCK], tl.float32)
    # tokens are fetched two ahead: 0.29 ms where 0.38 were needed
    for i in tl.range(program, num_tokens, num_programs, num_stages=3):
        token = tl.cast(i, tl.int64)
        angle = tl.load(pos_ptr + token).to(tl.int64) * HALF + half
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)[None, :]
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)[None, :]
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
        dqw1, dqw2, dkw1, dkw2 = dqw1 + q1, dqw2 + q2, dkw1 + k1, dkw2 + k2
    out = dweight_ptr + program * 4 * HALF + half
    tl.store(out, dqw1, mask=inside)
    tl.store(out + HALF, dqw2, mask=inside)
    tl.store(out + 2 * HALF, dkw1, mask=inside)
    tl.store(out + 3 * HALF, dkw2, mask=inside)


def launch_config(q, k, numbers):
    """Head counts and widths are model constants, so they are compiled in; blocks are the next powers of two. numbers: of q that a warp
    takes; 1024 forward and 2048 backward, whose loop keeps more of them in flight, are the fastest of 256 .. 4096."""
    (_, n, width), kv = q.shape, k.shape[1]
    up = triton.next_power_of_2
    blocks = {"N_BLOCK": up(n), "K_BLOCK": up(kv), "HALF_BLOCK": up(width // 2)}
    return {
        "N": n,
        "K": kv,
        "HALF": width // 2,
        **blocks,
        "num_warps": min(8, max(1, up(n) * up(width) // numbers)),
    }


class QKNormRope(torch.autograd.Function):
    """q and k in one node; saves its inputs and 1 / rms of each head, not the normed tensors."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, position_ids, eps):
        if use_triton(q, k, q_weight, k_weight, cos, sin, position_ids):
            outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
            rstds = [
                torch.empty(*x.shape[:2], 1, dtype=torch.float32, device=x.device) for x in (q, k)
            ]
            qk_norm_rope_forward[(len(q),)](
                q,
                k,
                q_weight,
                k_weight,
                cos,
                sin,
                position_ids,
                *outs,
                *rstds,
                q.stride(0),
                k.stride(0),
                eps,
                **launch_config(q, k, 1024),
            )
        else:
            cos, sin = angles(cos, sin, position_ids)
            outs, rstds = zip(
                *(forward_torch(x, w, cos, sin, eps) for x, w in ((q, q_weight), (k, k_weight)))
            )
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, position_ids, *rstds)
        return tuple(outs)

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        q, k, q_weight, k_weight, cos, sin, position_ids, *rstds = ctx.saved_tensors
        dq_out, dk_out = dq_out.contiguous(), dk_out.contiguous()
        if use_triton(q, k, q_weight, k_weight):
            dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
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
                *rstds,
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
        else:
            dq, dq_weight = backward_torch(dq_out, q, q_weight, cos, sin, rstds[0])
            dk, dk_weight = backward_torch(dk_out, k, k_weight, cos, sin, rstds[1])
        return (
            dq,
            dk,
            dq_weight.to(q_weight.dtype),
            dk_weight.to(k_weight.dtype),
            None,
            None,
            None,
            None,
        )


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin, position_ids, eps=1e-6):
    """Per-head RMSNorm and RoPE of q [T, N, H] and k [T, K, H] -> the same shapes.

    q_weight, k_weight [H]; cos, sin [max_pos, H/2] fp32 with YaRN's attention factor already in; position_ids [T] int.
    """
    if bare(q, k, q_weight, k_weight, cos, sin, position_ids):
        heads = [x.shape[1] for x in (q, k)]  # all as one: half as many small operations
        weight = torch.cat([w.expand(n, -1) for w, n in zip((q_weight, k_weight), heads)])
        return forward_torch(
            torch.cat((q, k), dim=1), weight, *angles(cos, sin, position_ids), eps
        )[0].split(heads, dim=1)
    q, k = (x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous() for x in (q, k))
    return QKNormRope.apply(
        q, k, q_weight, k_weight, cos.contiguous(), sin.contiguous(), position_ids, eps
    )
