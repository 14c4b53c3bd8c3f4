"""SwiGLU, the gate of the MLP: out = silu(gate) * up with silu(z) = z * sigmoid(z), elementwise.

The memory it saves matters more than the arithmetic: eager keeps gate, up and silu(gate) for backward, this keeps gate
and up and computes silu again. gate and up may be the two halves of one fused projection (any distance between rows).
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import bare, cast, tl, triton, use_triton, wide


def swiglu_ref(gate, up):
    """The definition, rounded once at the end."""
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)


def forward_torch(gate, up):
    """The CPU path: swiglu_ref without its second temporary."""
    return cast(F.silu(wide(gate)).mul_(up), gate.dtype)


def backward_torch(dout, gate, up):
    """dup = dout * silu(gate);   dgate = dout * up * silu'(gate), silu'(z) = s + z * s * (1 - s), s = sigmoid(z)."""
    dup, dgate = F.silu(gate).mul_(dout), dout * up
    # PyTorch's own fused silu', in place
    return torch.ops.aten.silu_backward(dgate, gate, grad_input=dgate), dup


@triton.jit
def swiglu_forward(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, D: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per BLOCK columns of one row; all programs lie on grid axis 0, the only one without a 65535 limit."""
    blocks_per_row: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    cols = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    # out = silu(gate) * up
    tl.store(
        out_ptr + row * D + cols,
        (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty),
        mask=mask,
    )


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
    """Reads three tensors, writes two: 10 bytes per bf16 element, the least there is."""
    blocks_per_row: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    cols = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    dout = tl.load(dout_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    # s = sigmoid(gate)
    s = tl.sigmoid(gate)
    # dup = dout * silu(gate)
    dup = dout * gate * s
    # dgate = dout * up * (s + gate * s * (1 - s))
    dgate = dout * up * (s + gate * s * (1.0 - s))
    tl.store(dgate_ptr + row * D + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + row * D + cols, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def launch(kernel, num_rows, width, *args):
    """1024 numbers per program of 4 warps: 8 per thread, one 16-byte load each in bf16."""
    block = min(1024, triton.next_power_of_2(width))
    kernel[(num_rows * triton.cdiv(width, block),)](*args, D=width, BLOCK=block, num_warps=4)


class SwiGLU(torch.autograd.Function):
    """Saves gate and up only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if not use_triton(gate, up):
            return forward_torch(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        launch(swiglu_forward, *gate.shape, gate, up, out, gate.stride(0), up.stride(0))
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, up = ctx.saved_tensors
        if not use_triton(gate, up):
            return backward_torch(dout, gate, up)
        dgate, dup = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
        strides = gate.stride(0), up.stride(0)
        launch(swiglu_backward, *gate.shape, dout.contiguous(), gate, up, dgate, dup, *strides)
        return dgate, dup


def swiglu(gate, up):
    """silu(gate) * up, elementwise: gate and up [..., D] of one shape -> [..., D]."""
    if bare(gate, up):
        return forward_torch(gate, up)
    shape, width = gate.shape, gate.shape[-1]
    gate, up = (x.reshape(-1, width) for x in (gate, up))
    gate, up = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate, up))
    return SwiGLU.apply(gate, up).view(shape)
