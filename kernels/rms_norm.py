"""RMSNorm, alone or fused with the residual addition before it. Start here if you have never read a
Triton kernel.

    y = weight * x / rms(x),    rms(x) = sqrt(mean(x^2) + eps)

over the last axis, for each row on its own.

Why a kernel: the formula does 4 flops per number, so a GPU spends its time moving x, not computing.
Written out in eager PyTorch it is eight small kernels that each read and write a full tensor; at
32K tokens x 4096 in bf16 that moves 4.8 GB where reading x once and writing y once moves 0.5 GB. A
fused kernel can be up to 9x faster for that reason alone, and it keeps one number per row for
backward instead of a whole tensor.

Triton in two minutes. A kernel is a function that the GPU runs many times at once; each run is a
*program* and knows itself by its number, tl.program_id(0). Programs run in any order and do not
talk to each other, so each must own what it writes: here, one row of y. Inside a program there are
no threads to manage: a value is one number or a whole *block* of them, held in registers. With
D = 5 and BLOCK = 8, this is what program 1 does:

    cols = tl.arange(0, BLOCK)           [0 1 2 3 4 5 6 7]: a block's size is a power of two, fixed
                                         when compiled
    mask = cols < D                      [1 1 1 1 1 0 0 0]: the last three lanes lie in somebody
                                         else's row
    x_ptr + 1 * x_stride + cols          eight addresses; x_ptr is where the tensor begins,
                                         distances count elements
    tl.load(address, mask, other=0.0)    five numbers come from memory, three are 0; nothing else is
                                         touched
    tl.sum(x * x)                        arithmetic is elementwise, tl.sum makes one number of a
                                         block
    tl.store(address, y, mask)           five numbers go back

Python launches it as kernel[(number_of_programs,)](tensors and numbers): a tensor arrives as the
address of its first element. Arguments marked tl.constexpr are compiled in, one machine program for
each value that ever occurs, so only what the model fixes is marked (D, yes; the number of tokens,
no). num_warps says how many threads share a program.

To watch one at work without a GPU, put print(x) into the kernel and run, from the repository's
root,

    TRITON_INTERPRET=1 python -c \
        "from kernels.rms_norm import *; print(rms_norm(torch.randn(3, 5), torch.ones(5)))"

Read on in this order: the two _ref (what is computed), forward_torch and rms_norm_forward (the
same, in PyTorch and in Triton), backward_torch and rms_norm_backward, then the launches and the
autograd node that ties them together.

Four habits, the same in every file here: load, then .to(tl.float32) before any arithmetic; row
numbers are int64 before they are multiplied by a stride (row * stride passes 2^31 after 14K rows of
152K logits); no float atomics, so a run repeats bit for bit; the PyTorch line that a group of
Triton lines computes stands above it.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import (
    cast,
    cpu_without_grad,
    num_programs,
    tl,
    triton,
    use_triton,
    wide_dtype,
    widen,
)

# T rows (tokens)   D row width
# The tests hold every implementation below against rms_norm_ref in float64.


def rms_norm_ref(x, weight, eps=1e-6):
    """The definition. x / rms(x) is rounded to the dtype of x before the weight multiplies it, as
    in HF Qwen3.
    """
    x_hat = F.rms_norm(x.to(wide_dtype(x)), x.shape[-1:], None, eps)
    return weight * x_hat.to(x.dtype)


def add_rms_norm_ref(x, residual, weight, eps=1e-6):
    """summed = x + residual; returns (rms_norm(summed), summed)."""
    summed = x + residual
    return rms_norm_ref(summed, weight, eps), summed


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) over the last axis of x, fp32 or fp64, on the CPU."""
    # vector_norm reads x once, where (x * x).sum(-1) makes a tensor first
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # mean(x^2) + eps = eps + norm * norm / D
    eps = norm.new_full((), eps)
    return torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


def forward_torch(x, residual, weight, eps):
    """The CPU path: what rms_norm_ref computes, in the fewest passes over memory. Also returns
    1 / rms, [T, 1].
    """
    summed = x if residual is None else x + residual
    x = widen(summed)
    rstd = inverse_rms(x, eps)
    x_hat = cast(x * rstd, summed.dtype)
    y = x_hat.mul_(weight) if x_hat.dtype == weight.dtype else x_hat * weight
    return y, summed, rstd


def backward_torch(dy, dsummed, x, weight, rstd):
    """The gradient, in PyTorch. With x_hat = x * rstd and y = weight * x_hat the chain rule gives

        dweight = sum over rows of dy * x_hat
        dx      = rstd * (g - x_hat * mean(g * x_hat)) with g = dy * weight

    where the mean comes from x inside rms(x), plus dsummed, the gradient that arrives on the
    residual stream itself. dy * x_hat serves both lines: the sum of g * x_hat over a row is its
    product with the weight.
    """
    dtype = x.dtype
    x = x.to(rstd.dtype)
    dy = dy.to(rstd.dtype)
    weight = weight.to(rstd.dtype)

    # product = dy * x_hat
    product = (dy * x).mul_(rstd)
    dweight = product.sum(0)

    # dx = rstd * (g - x_hat * mean(g * x_hat)) + dsummed
    mean = (product @ weight)[:, None] / x.shape[-1]
    dx = torch.mul(dy, weight, out=product)
    dx.addcmul_(x, mean.mul_(rstd), value=-1).mul_(rstd)
    if dsummed is not None:
        dx.add_(dsummed)
    return dx.to(dtype), dweight


@triton.jit
def rms_norm_forward(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    summed_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: read it once, keep it in registers, write y. The row is never read a
    second time.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    # BLOCK is the next power of two; lanes past D load 0 and store nothing
    mask = cols < D

    # summed = x + residual        (ADD is compiled in: without a residual these lines do not exist)
    x_row = x_ptr + row * x_stride
    x = tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual_row = residual_ptr + row * residual_stride
        x += tl.load(residual_row + cols, mask=mask, other=0.0).to(tl.float32)
        summed = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * D + cols, summed, mask=mask)
        x = summed.to(tl.float32)  # normalise what was stored, rounding included

    # rstd = (x.square().mean(-1) + eps).rsqrt()
    rstd = 1.0 / tl.sqrt(tl.sum(x * x) / D + eps)
    tl.store(rstd_ptr + row, rstd)

    # y = weight * (x * rstd).to(x.dtype)
    x_hat = (x * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = (weight * x_hat).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * D + cols, y, mask=mask)


@triton.jit
def rms_norm_backward(
    dy_ptr,
    dsummed_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    x_stride,
    num_rows,
    num_programs,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """backward_torch. A program per row, as above, would not do: all rows add to the one dweight,
    and programs that add to one place need atomics, whose order changes from run to run. Instead a
    few programs walk over many rows each: program p of P takes the rows p, p + P, p + 2P ... and
    keeps its share of dweight in registers; the P shares are summed afterwards in a fixed order,
    for P * D extra numbers.
    """
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)

    # num_stages=3 fetches rows two ahead: 0.20 ms instead of 0.24 ms
    for i in tl.range(program, num_rows, num_programs, num_stages=3):
        row = tl.cast(i, tl.int64)
        dy_row = dy_ptr + row * D
        dy = tl.load(dy_row + cols, mask=mask, other=0.0).to(tl.float32)
        x_row = x_ptr + row * x_stride
        x = tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        if ADD:
            dsummed_row = dsummed_ptr + row * D
            dsummed = tl.load(dsummed_row + cols, mask=mask, other=0.0).to(tl.float32)

        # x_hat = x * rstd
        x_hat = x * rstd
        # dweight = (dy * x_hat).sum(0)
        dweight += dy * x_hat
        # g = dy * weight
        g = dy * weight
        # dx = rstd * (g - x_hat * (g * x_hat).mean(-1)) + dsummed
        dx = rstd * (g - x_hat * (tl.sum(g * x_hat) / D))
        if ADD:
            dx += dsummed
        tl.store(dx_ptr + row * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    tl.store(dweight_ptr + program * D + cols, dweight, mask=mask)


def launch_config(width):
    """Block and warps (groups of 32 threads) per program: about 16 numbers per thread keep a row in
    registers.
    """
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def forward_triton(x, residual, weight, eps):
    """Launches one program per row of x [T, D]; the rows may lie any distance apart, D must be
    contiguous.
    """
    num_rows, width = x.shape
    y_dtype = torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=y_dtype, device=x.device)
    summed = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    # an unused pointer argument must still be a tensor
    extra = x if residual is None else residual
    rms_norm_forward[(num_rows,)](
        x,
        extra,
        weight,
        y,
        summed,
        rstd,
        x.stride(0),
        extra.stride(0),
        eps,
        D=width,
        ADD=residual is not None,
        **launch_config(width),
    )
    return y, summed, rstd


def backward_triton(dy, dsummed, x, weight, rstd):
    """Launches a few programs per multiprocessor and sums their shares of dweight."""
    num_rows, width = x.shape
    programs = min(num_rows, num_programs(x.device, per_sm=2))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shares = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    rms_norm_backward[(programs,)](
        dy,
        dy if dsummed is None else dsummed,
        x,
        weight,
        rstd,
        dx,
        shares,
        x.stride(0),
        num_rows,
        programs,
        D=width,
        ADD=dsummed is not None,
        **launch_config(width),
    )
    return dx, shares.sum(0)


class RMSNorm(torch.autograd.Function):
    """Ties forward and backward together for autograd; the same two lines choose CPU or GPU in both
    directions.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, eps, returns_sum):
        forward = forward_triton if use_triton(x, weight) else forward_torch
        y, summed, rstd = forward(x, residual, weight, eps)
        ctx.save_for_backward(summed, weight, rstd)
        # an output that nobody used has gradient None, not a tensor of zeros
        ctx.set_materialize_grads(False)
        ctx.has_residual = residual is not None
        return (y, summed) if returns_sum else y

    @staticmethod
    def backward(ctx, dy, dsummed=None):
        x, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dsummed, dsummed if ctx.has_residual else None, None, None, None
        dsummed = None if dsummed is None else dsummed.contiguous()
        backward = backward_triton if use_triton(x, weight) else backward_torch
        dx, dweight = backward(dy.contiguous(), dsummed, x, weight, rstd)
        return dx, dx if ctx.has_residual else None, dweight.to(weight.dtype), None, None


def as_rows(x):
    """[..., D] -> [T, D] whose rows are contiguous; a view wherever the strides allow one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x, weight, eps=1e-6):
    """RMSNorm over the last axis: x [..., D], weight [D] -> [..., D]."""
    if cpu_without_grad(x, weight):
        return forward_torch(x, None, weight, eps)[0]
    return RMSNorm.apply(as_rows(x), None, weight, eps, False).view(x.shape)


def add_rms_norm(x, residual, weight, eps=1e-6):
    """Residual addition, then RMSNorm: x, residual [..., D], weight [D] -> (y, summed) with
    summed = x + residual.

    x None: residual is the sum already. Backward then adds the gradient of the sum inside the
    kernel as well, so that it is rounded as often as where x is given.
    """
    shape = residual.shape
    if x is None:
        x, residual = residual, None
    if cpu_without_grad(x, weight):
        return forward_torch(x, residual, weight, eps)[:2]
    if residual is not None:
        residual = as_rows(residual)
    y, summed = RMSNorm.apply(as_rows(x), residual, weight, eps, True)
    return y.view(shape), summed.view(shape)
