"""AdamW whose weights and both moments are bf16, rounded stochastically: 8B parameters in 65 GB instead of 131 GB.

    m = b1 * m + (1 - b1) * g;   v = b2 * v + (1 - b2) * g^2;   p = p * (1 - lr * wd) - lr * m_hat / (sqrt(v_hat) + eps)

bf16 has 8 bits of precision, so an update below 1/256 of a weight rounds to nothing and training stops in silence.
Stochastic rounding adds a random number below one bf16 step before cutting: the value is right on average and small
updates arrive. All arithmetic is fp32; the random bits are a hash of (seed, element), so a step repeats bit for bit,
on the CPU as on the GPU.
"""

import torch

from kernels.dispatch import tl, triton, use_triton


def hash_torch(index, seed):
    """A well-mixed 32-bit number per element (int64 holding uint32): two multiply-xorshift rounds."""
    mask = 0xFFFFFFFF
    x = (index + (seed * 0x9E3779B9 & mask)) & mask
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return x ^ (x >> 16)


def round_torch(x, random16):
    """fp32 -> bf16, up with the probability of the part cut off: add 16 random bits, drop the low 16."""
    bits = x.view(torch.int32) + random16.to(torch.int32)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def adamw_ref(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, seed, grad_scale):
    """The definition: returns the new p, m, v in fp32, before rounding, and the random bits of the three roundings."""
    p, m, v, g = p.float(), m.float(), v.float(), g.float() * grad_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
    p = p - lr * (weight_decay * p + update)
    index = torch.arange(p.numel(), device=p.device).view(p.shape)
    first, second = hash_torch(index, 2 * seed), hash_torch(index, 2 * seed + 1)
    return (p, m, v), (first & 0xFFFF, first >> 16, second & 0xFFFF)


@triton.jit
def hash_triton(index, seed):
    """hash_torch."""
    x = index.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def store_rounded(ptr, x, random16, mask):
    """round_torch, then store: what is left after dropping 16 bits is a bf16 number, so the cast is exact."""
    bits = x.to(tl.int32, bitcast=True) + random16.to(tl.int32)
    tl.store(ptr, (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16), mask=mask)


@triton.jit
def adamw_kernel(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    scalars_ptr,
    seed_ptr,
    grad_scale_ptr,
    numel,
    BLOCK: tl.constexpr,
):
    """adamw_ref and the three roundings, in place: 14 bytes of traffic per parameter. Scalars come as a tensor."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    decay, beta1, beta2 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    step_size, scale2, eps = (
        tl.load(scalars_ptr + 3),
        tl.load(scalars_ptr + 4),
        tl.load(scalars_ptr + 5),
    )
    p = tl.load(p_ptr + index, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32) * tl.load(grad_scale_ptr)
    # m = beta1 * m + (1 - beta1) * g
    m = beta1 * tl.load(m_ptr + index, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta1) * g
    # v = beta2 * v + (1 - beta2) * g * g
    v = beta2 * tl.load(v_ptr + index, mask=mask, other=0.0).to(tl.float32) + (1.0 - beta2) * g * g
    # p = p * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) +
    # eps)
    p = p * decay - step_size * m / (tl.sqrt(v * scale2) + eps)
    seed = tl.load(seed_ptr)
    first, second = hash_triton(index, 2 * seed), hash_triton(index, 2 * seed + 1)
    store_rounded(p_ptr + index, p, first & 0xFFFF, mask)
    store_rounded(m_ptr + index, m, first >> 16, mask)
    store_rounded(v_ptr + index, v, second & 0xFFFF, mask)


def adamw_bf16_(
    p, g, m, v, *, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, step, seed, grad_scale=None
):
    """One step in place on one bf16 parameter p with gradient g (bf16 or fp32) and bf16 moments m, v.

    step counts from 1; seed must differ for each parameter and step. grad_scale, a tensor of one element, multiplies
    the gradient: the clip coefficient, which so costs no pass of its own and no synchronisation.
    """
    (beta1, beta2), seed = betas, seed & 0x7FFFFFFF
    grad_scale = torch.ones(1, device=p.device) if grad_scale is None else grad_scale.float()
    if not use_triton(p, g, m, v):
        new, random = adamw_ref(
            p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, seed, grad_scale
        )
        for old, x, bits in zip((p, m, v), new, random):
            old.copy_(round_torch(x, bits))
        return
    assert p.is_contiguous() and m.is_contiguous() and v.is_contiguous(), (
        "p, m and v are updated in place"
    )
    scalars = [
        1 - lr * weight_decay,
        beta1,
        beta2,
        lr / (1 - beta1**step),
        1 / (1 - beta2**step),
        eps,
    ]
    scalars = torch.tensor(scalars, dtype=torch.float32).to(p.device, non_blocking=True)
    seed = torch.tensor([seed], dtype=torch.int64).to(p.device, non_blocking=True)
    grid = (triton.cdiv(p.numel(), 1024),)
    adamw_kernel[grid](
        p, g.contiguous(), m, v, scalars, seed, grad_scale, p.numel(), BLOCK=1024, num_warps=4
    )


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's interface over adamw_bf16_; sharded parameters (FSDP2) are updated shard by shard."""

    def __init__(self, params, lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, seed=0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed = seed

    @torch.no_grad()
    def step(self, grad_scale=None):
        """One update of every parameter that has a gradient; grad_scale as in adamw_bf16_."""
        for number, (group, p) in enumerate((g, p) for g in self.param_groups for p in g["params"]):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            tensors = p, p.grad, state["exp_avg"], state["exp_avg_sq"]
            sharded = hasattr(p, "to_local")
            shard = torch.distributed.get_rank() if sharded else 0
            adamw_bf16_(
                *(t.to_local() if sharded else t for t in tensors),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=state["step"],
                seed=hash((self.seed, state["step"], number, shard)),
                grad_scale=grad_scale,
            )
