"""AdamW whose weights and both moments are bf16, rounded stochastically.

    m = b1 * m + (1 - b1) * g                           m_hat = m / (1 - b1^step)
    v = b2 * v + (1 - b2) * g^2                         v_hat = v / (1 - b2^step)
    p = p * (1 - lr * wd) - lr * m_hat / (sqrt(v_hat) + eps)

8B parameters take 65 GB (weights, gradients, two moments) instead of 131 GB in fp32.

bf16 keeps 8 significant bits: rounded to the nearest number, an update below 1/512 of a weight is
always lost, one above 1/256 never. So training can stop in silence. Stochastic rounding adds a
random number below one bf16 step before it cuts: the value is right on average and small updates
arrive. All arithmetic is fp32. The random bits are a hash of (seed, element), so a step repeats bit
for bit, on the CPU as on the GPU.
"""

import torch

from kernels.dispatch import tl, triton, use_triton

# Elements that the CPU computes at once.
PIECE = 1 << 14


def hash_torch(index, seed):
    """A well-mixed 32-bit number per element: two rounds of xorshift and multiplication.

    index int64 of any shape, seed an int -> int64 of that shape, which holds a uint32.
    """
    mask = 0xFFFFFFFF
    offset = seed * 0x9E3779B9 & mask
    x = (index + offset) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def round_torch(x, random16):
    """fp32 -> bf16, rounded away from 0 with the probability of the part that is cut off.

    A bf16 number is the high half of an fp32 number: add 16 random bits, then drop the low 16.
    """
    bits = x.view(torch.int32) + random16.to(torch.int32)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def adamw_ref(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, seed, first, grad_scale):
    """The definition: returns the new (p, m, v) in fp32, unrounded, and the random bits of each."""
    p = p.float()
    m = m.float()
    v = v.float()
    g = g.float() * grad_scale

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    update = m_hat / (v_hat.sqrt() + eps)
    p = p - lr * (weight_decay * p + update)

    # Each element needs 3 x 16 random bits, so two hashes of 32 bits are enough.
    index = first + torch.arange(p.numel(), device=p.device).view(p.shape)
    hash1 = hash_torch(index, 2 * seed)
    hash2 = hash_torch(index, 2 * seed + 1)
    return (p, m, v), (hash1 & 0xFFFF, hash1 >> 16, hash2 & 0xFFFF)


@triton.jit
def hash_triton(index, seed):
    """hash_torch; uint32 arithmetic drops the high bits by itself."""
    x = index.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def store_rounded(ptr, x, random16, mask):
    """round_torch, then store. What is left after the cut is a bf16 number: the cast is exact."""
    bits = x.to(tl.int32, bitcast=True) + random16.to(tl.int32)
    rounded = (bits & -65536).to(tl.float32, bitcast=True)
    tl.store(ptr, rounded.to(tl.bfloat16), mask=mask)


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
    """adamw_ref and the three roundings, in place: 14 bytes of traffic per parameter.

    The scalars come as a tensor, see adamw_bf16_.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel

    decay = tl.load(scalars_ptr)
    beta1 = tl.load(scalars_ptr + 1)
    beta2 = tl.load(scalars_ptr + 2)
    step_size = tl.load(scalars_ptr + 3)
    v_scale = tl.load(scalars_ptr + 4)
    eps = tl.load(scalars_ptr + 5)

    p = tl.load(p_ptr + index, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + index, mask=mask, other=0.0).to(tl.float32)
    g = g * tl.load(grad_scale_ptr)
    m = tl.load(m_ptr + index, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + index, mask=mask, other=0.0).to(tl.float32)

    # m = beta1 * m + (1 - beta1) * g
    m = beta1 * m + (1.0 - beta1) * g
    # v = beta2 * v + (1 - beta2) * g * g
    v = beta2 * v + (1.0 - beta2) * g * g
    # p = p * (1 - lr * weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v_hat) + eps)
    p = p * decay - step_size * m / (tl.sqrt(v * v_scale) + eps)

    # seed_ptr: the seed, and the place of element 0 in the whole parameter
    seed = tl.load(seed_ptr)
    place = tl.load(seed_ptr + 1) + index
    hash1 = hash_triton(place, 2 * seed)
    hash2 = hash_triton(place, 2 * seed + 1)
    store_rounded(p_ptr + index, p, hash1 & 0xFFFF, mask)
    store_rounded(m_ptr + index, m, hash1 >> 16, mask)
    store_rounded(v_ptr + index, v, hash2 & 0xFFFF, mask)


def adamw_triton(p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, seed, first, grad_scale):
    """One step in place on the GPU; arguments as in adamw_ref."""
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
    # The scalars change from step to step. As a tensor they never make Triton compile again.
    scalars = torch.tensor(scalars, dtype=torch.float32).to(p.device, non_blocking=True)
    seed = torch.tensor([seed, first], dtype=torch.int64).to(p.device, non_blocking=True)
    tensors = p, g.contiguous(), m, v, scalars, seed, grad_scale
    programs = triton.cdiv(p.numel(), 1024)
    adamw_kernel[(programs,)](*tensors, p.numel(), BLOCK=1024, num_warps=4)


def adamw_bf16_(
    p,
    g,
    m,
    v,
    *,
    lr,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.0,
    step,
    seed,
    first=0,
    grad_scale=None,
):
    """One step in place on a bf16 parameter p with gradient g (bf16, fp32) and bf16 moments m, v.

    step counts from 1. seed must differ for each parameter and each step. first: where p begins in
    the whole parameter, if p is a shard of it, so that rounding does not depend on the shards.
    grad_scale, a tensor of one element, multiplies the gradient: it is the coefficient of gradient
    clipping, which so costs no pass of its own and no synchronisation.
    """
    beta1, beta2 = betas
    seed = seed & 0x7FFFFFFF
    if grad_scale is None:
        grad_scale = torch.ones(1, device=p.device)
    else:
        grad_scale = grad_scale.float()

    options = lr, beta1, beta2, eps, weight_decay, step, seed, first, grad_scale
    if use_triton(p, g, m, v):
        adamw_triton(p, g, m, v, *options)
        return
    # In pieces, because the definition holds some 70 bytes an element while it computes.
    flat = p.view(-1), g.reshape(-1), m.view(-1), v.view(-1)
    for start in range(0, p.numel(), PIECE):
        piece = [tensor[start : start + PIECE] for tensor in flat]
        new_values, random_bits = adamw_ref(*piece, *options[:-2], first + start, grad_scale)
        for old, new, bits in zip((piece[0], *piece[2:]), new_values, random_bits):
            old.copy_(round_torch(new, bits))


def local_shard(tensor):
    """This rank's part of a parameter sharded by FSDP2, or the tensor itself if it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_element(p):
    """Where this rank's shard begins in the whole parameter, counted in elements.

    FSDP2 deals the rows of a parameter out in equal parts, of which the last can be smaller.
    """
    if not hasattr(p, "to_local"):
        return 0
    first = 0
    for mesh_dim, placement in enumerate(p.placements):
        if placement.is_shard():
            rows = -(-p.shape[0] // p.device_mesh.size(mesh_dim))
            row = min(rows * p.device_mesh.get_local_rank(mesh_dim), p.shape[0])
            first = row * (p.numel() // p.shape[0])
    return first


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's interface over adamw_bf16_; updates sharded parameters shard by shard."""

    def __init__(self, params, lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, seed=0):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.seed = seed

    @torch.no_grad()
    def step(self, grad_scale=None):
        """One update of every parameter that has a gradient; grad_scale as in adamw_bf16_."""
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        for number, (group, p) in enumerate(parameters):
            if p.grad is None:
                continue

            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1

            # Every step and parameter rounds with random bits of its own, which are the same on
            # all ranks: copies of a shard stay equal. Python's hash of integers is the same in
            # every process.
            seed = hash((self.seed, state["step"], number))

            adamw_bf16_(
                local_shard(p),
                local_shard(p.grad),
                local_shard(state["exp_avg"]),
                local_shard(state["exp_avg_sq"]),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=state["step"],
                seed=seed,
                first=first_element(p),
                grad_scale=grad_scale,
            )
