"""SwiGLU: silu(gate) * up."""

import torch.nn.functional as F


def swiglu_ref(gate, up):
    """silu(gate) * up with silu(z) = z * sigmoid(z)."""
    return F.silu(gate) * up


def swiglu(gate, up):
    """silu(gate) * up, elementwise: two tensors of one shape -> one."""
    return swiglu_ref(gate, up)
