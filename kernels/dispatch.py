"""Which implementation runs: CUDA tensors go to the Triton kernel, CPU tensors to the PyTorch reference. Nothing else.

There is no fallback: a kernel that fails raises. With TRITON_INTERPRET=1 set before this import, CPU tensors go to the
kernels too, through Triton's interpreter, which is slow and how tests/test_kernels.py checks them without a GPU.
"""

import importlib.util
import os
import sys
import types

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Every kernel file takes `triton` and `tl` from here, so that a machine without Triton (a Mac) can
# import them too. Where nothing
# will be launched it is not imported, which saves a CPU process 73 MB; whoever compiles kernels
# without a GPU has imported it before.
if importlib.util.find_spec("triton") and (
    torch.cuda.is_available() or INTERPRET or "triton" in sys.modules
):
    import triton
    import triton.language as tl
else:
    triton = types.SimpleNamespace(jit=lambda fn: fn)
    tl = types.SimpleNamespace(constexpr=int)


def use_triton(*tensors):
    """True for GPU tensors (or with the interpreter on), False for CPU tensors; a mixture or a DTensor is refused."""
    device = tensors[0].device
    for tensor in tensors:
        if hasattr(tensor, "placements"):
            raise TypeError(
                "kernels take plain tensors; call them inside the module that FSDP gathers, or .to_local()"
            )
        if tensor.device != device:
            raise ValueError(
                f"tensors on different devices: {sorted({str(t.device) for t in tensors})}"
            )
    return INTERPRET or tensors[0].is_cuda


def num_programs(device, per_sm=4):
    """How many programs to launch for a kernel whose programs loop over rows: a few for each multiprocessor."""
    return (
        3
        if device.type == "cpu"
        else per_sm * torch.cuda.get_device_properties(device).multi_processor_count
    )


def bare(*tensors):
    """True where an op is its forward_torch and nothing else: on CPUs without gradients, as in every small step of the sampler, in
    which autograd's bookkeeping would take as long as the arithmetic."""
    return not (torch.is_grad_enabled() or use_triton(*tensors))


def wide(x):
    """x in fp32 (fp64 stays): what sums and exponentials are computed in."""
    return x if x.itemsize > 2 else x.float()


def cast(x, dtype):
    """x.to(dtype), which takes a microsecond where there is nothing to do: a third of an op on the rows of a small decoding step."""
    return x if x.dtype == dtype else x.to(dtype)
