"""SwiGLU, the gate of the MLP, elementwise.

    out = silu(gate) * up,    silu(z) = z * s,    s = sigmoid(z)

    dup   = dout * silu(gate)
    dgate = dout * up * silu'(gate),    silu'(z) = s + z * s * (1 - s)

The memory it saves matters more than the arithmetic: eager PyTorch keeps gate, up and silu(gate)
for backward. This op keeps gate and up and computes silu(gate) again. gate and up may be the two
halves of one fused projection: their rows may lie any distance apart.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import cast, cpu_without_grad, tl, triton, use_triton, widen
from kernels.rms_norm import as_rows

# T rows (tokens)   D row width


def swiglu_ref(gate, up):
    """The definition, rounded once at the end."""
    return (F.silu(widen(gate)) * widen(up)).to(gate.dtype)


def forward_torch(gate, up):
    """The CPU path: swiglu_ref without its second temporary."""
    out = F.silu(widen(gate)).mul_(up)
    return cast(out, gate.dtype)


def backward_torch(dout, gate, up):
    """The gradients (dgate, dup) on the CPU, with PyTorch's own fused silu'."""
    dup = F.silu(gate).mul_(dout)
    # dgate first holds the gradient of silu(gate), then, in place, the gradient of gate.
    dgate = dout * up
    torch.ops.aten.silu_backward(dgate, gate, grad_input=dgate)
    return dgate, dup


@triton.jit
def load_block(ptr, cols, mask):
    """BLOCK numbers of one row in fp32; lanes past the end of the row get 0."""
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_block(ptr, x, cols, mask):
    """The reverse of load_block."""
    tl.store(ptr + cols, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_forward(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, D: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per BLOCK columns of one row.

    All programs lie on grid axis 0, because it is the only axis without a limit of 65535.
    """
    blocks_per_row: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    cols = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    gate = load_block(gate_ptr + row * gate_stride, cols, mask)
    up = load_block(up_ptr + row * up_stride, cols, mask)

    # out = silu(gate) * up
    out = gate * tl.sigmoid(gate) * up
    store_block(out_ptr + row * D, out, cols, mask)


@triton.jit
def swiglu_backward(
    dout_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    gate_stride,
    up_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK columns of one row, as in forward.

    It reads three tensors and writes two: 10 bytes per bf16 element, the least that is possible.
    """
    blocks_per_row: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    cols = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D

    dout = load_block(dout_ptr + row * D, cols, mask)
    gate = load_block(gate_ptr + row * gate_stride, cols, mask)
    up = load_block(up_ptr + row * up_stride, cols, mask)

    # s = sigmoid(gate)
    s = tl.sigmoid(gate)
    # dup = dout * silu(gate)
    dup = dout * gate * s
    # dgate = dout * up * silu'(gate)
    dgate = dout * up * (s + gate * s * (1.0 - s))

    store_block(dgate_ptr + row * D, dgate, cols, mask)
    store_block(dup_ptr + row * D, dup, cols, mask)


def launch(kernel, num_rows, width, *args):
    """Launch a kernel with 1024 numbers per program of 4 warps.

    That is 8 numbers per thread, in bf16 one 16-byte load for each tensor.
    """
    block = min(1024, triton.next_power_of_2(width))
    programs = num_rows * triton.cdiv(width, block)
    kernel[(programs,)](*args, D=width, BLOCK=block, num_warps=4)


class SwiGLU(torch.autograd.Function):
    """The autograd node. It saves gate and up only, both [T, D]."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if not use_triton(gate, up):
            return forward_torch(gate, up)
        num_rows, width = gate.shape
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        launch(swiglu_forward, num_rows, width, gate, up, out, gate.stride(0), up.stride(0))
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        if not use_triton(gate, up):
            return backward_torch(dout, gate, up)
        num_rows, width = gate.shape
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        tensors = dout.contiguous(), gate, up, dgate, dup
        launch(swiglu_backward, num_rows, width, *tensors, gate.stride(0), up.stride(0))
        return dgate, dup


def swiglu(gate, up):
    """silu(gate) * up, elementwise: gate and up [..., D] of one shape -> [..., D]."""
    if cpu_without_grad(gate, up):
        return forward_torch(gate, up)
    return SwiGLU.apply(as_rows(gate), as_rows(up)).view(gate.shape)
