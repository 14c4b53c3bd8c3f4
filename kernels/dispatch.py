"""Choose the implementation: CUDA tensors go to the Triton kernel, CPU tensors to PyTorch.

There is no fallback: a kernel that fails raises. With TRITON_INTERPRET=1 set before this import,
CPU tensors go to the kernels too, through Triton's interpreter. The interpreter is slow; with it
tests/test_kernels.py checks the kernels without a GPU.
"""

import importlib.util
import os
import sys
import types

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Every kernel file takes `triton` and `tl` from here, so that a machine without Triton (a Mac) can
# import the kernel files too. A CPU process that launches no kernel does not import Triton either,
# which saves it 73 MB. A process that compiles kernels without a GPU imports Triton before this
# file, and "triton" is then in sys.modules.
triton_installed = importlib.util.find_spec("triton") is not None
triton_needed = torch.cuda.is_available() or INTERPRET or "triton" in sys.modules

if triton_installed and triton_needed:
    import triton
    import triton.language as tl
else:
    # Stand-ins for the two names that are read while a kernel file is imported.
    triton = types.SimpleNamespace(jit=lambda fn: fn)
    tl = types.SimpleNamespace(constexpr=int)


def use_triton(*tensors):
    """True for GPU tensors (or with the interpreter on), False for CPU tensors.

    Raises ValueError for tensors on different devices and TypeError for a DTensor.
    """
    device = tensors[0].device
    for tensor in tensors:
        # Only a DTensor (a tensor sharded by FSDP) has placements.
        if hasattr(tensor, "placements"):
            raise TypeError(
                "kernels take plain tensors; "
                "call them inside the module that FSDP gathers, or .to_local()"
            )
        if tensor.device != device:
            devices = sorted({str(t.device) for t in tensors})
            raise ValueError(f"tensors on different devices: {devices}")
    return INTERPRET or tensors[0].is_cuda


def num_programs(device, per_sm=4):
    """Number of programs for a kernel whose programs loop over rows: per_sm per multiprocessor."""
    if device.type == "cpu":
        # The interpreter: three programs are enough for an uneven share of the rows.
        return 3
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device):
    """Bytes of shared memory that a program may take; the interpreter has no limit."""
    if device.type == "cpu":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def cpu_without_grad(*tensors):
    """True if an op may call its CPU forward directly, without an autograd node.

    So it is in every step of the CPU sampler, whose tensors are so small that autograd's
    bookkeeping would take as long as the arithmetic.
    """
    return not (torch.is_grad_enabled() or use_triton(*tensors))


def wide_dtype(x):
    """The dtype that sums and exponentials of x are computed in: fp32, or fp64 if x is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x):
    """x in its wide dtype: bf16 and fp16 become fp32, fp32 and fp64 stay as they are."""
    return x if x.itemsize > 2 else x.float()


def cast(x, dtype):
    """x.to(dtype), without the call if x has that dtype already.

    The call takes a microsecond even if there is nothing to convert. That is a third of an op on
    the few rows of a decoding step.
    """
    return x if x.dtype == dtype else x.to(dtype)
