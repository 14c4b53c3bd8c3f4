"""Ranks: start, sharding, collectives. Nothing here takes a tensor with a batch axis. fail and one_sentence, for scripts that
cannot go on, are in guard.py."""

import ctypes
import datetime
import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist

from lib.guard import fail, guard, one_sentence


# ---- Ranks ---------------------------------------------------------------------------------------
def ranks():
    """(rank, world): torchrun's variables decide; without them it is one process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_run(cfg):
    """(rank, world, device) of a stage's run, which from here on says why when it ends early."""
    guard(cfg.phase_timeout)
    # whoever waits in a collective outlasts the rank that it waits for
    return init_distributed(cfg.seed, 2 * cfg.phase_timeout)


def init_distributed(seed, timeout_s=1800):
    """(rank, world, device). Seeds everything."""
    rank, world = ranks()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    libc = ctypes.CDLL(None)
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(libc, "prctl"):
        # a rank dies with its launcher: it would train on and hold out_dir
        libc.prctl(1, signal.SIGKILL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # glibc gives big temporaries back to the system after every op, which faults each page in
        # again: keeping them makes a training
        # step of the tiny model 1.5 to 2 times faster. What comes by mmap cannot be kept, hence
        # none does.
        if hasattr(libc, "mallopt"):
            # allocations by mmap: none; trim threshold, top pad
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26)):
                libc.mallopt(option, value)
        torch.set_num_threads(
            int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // world))
        )
        spare_compiler()
    if world > 1 or device.type == "cuda":
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        # taken, or nobody answers
        with one_sentence(f"rank {rank} of {world} at MASTER_PORT={os.environ.get('MASTER_PORT')}"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
                **alone,
            )
    torch.manual_seed(seed)
    return rank, world, device


def spare_compiler():
    """PyTorch's optimizers import its compiler (146 MB, 1.2 s a process) only to keep it off their methods. Nothing is compiled here."""
    adamw = torch.optim.AdamW
    for method in (adamw.add_param_group, adamw.zero_grad, adamw.state_dict, adamw.load_state_dict):
        method.__wrapped__.__dict__["__dynamo_disable"] = method.__wrapped__
    adamw.step = torch.no_grad()(adamw.step.__wrapped__)


def print0(*args):
    if ranks()[0] == 0:
        print(*args, flush=True)


def all_reduce(values, op="sum"):
    """{name: number} reduced over ranks, in one collective; keys must be equal on every rank."""
    if not dist.is_initialized():
        return dict(values)
    t = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    dist.all_reduce(t, dict(sum=dist.ReduceOp.SUM, max=dist.ReduceOp.MAX)[op])
    return dict(zip(values, t.tolist()))


def all_gather(value):
    """[value of rank 0, value of rank 1, ...] for any picklable value."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


# parameters of a layer that is gathered alone: below, the latency of a collective costs more than
# its bytes
SMALLEST_SHARE = 1 << 20


def shard(model, device, how="full"):
    """FSDP2: fp32 master weights, bf16 compute on GPUs, fp32 gradient reduction; how: see the stages' --shard. Every layer is a collective
    of its own where that is worth it; a small model travels in one piece. What is whole on every CPU stays the plain module."""
    if how not in ("full", "hybrid", "offload", "replicate"):
        fail(f"--shard={how}: expected full, hybrid, offload or replicate.")
    if dist.is_initialized() and (how != "replicate" or device.type == "cuda"):
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        dtype, inside = (
            torch.bfloat16 if device.type == "cuda" else torch.float32,
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if how == "hybrid" else 1,
        )
        # about in-place use of layer outputs: there is none
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        # RoPE stays fp32
        options = {
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        }
        if how in ("hybrid", "replicate"):
            options["mesh"] = dist.init_device_mesh(
                device.type,
                (dist.get_world_size() // inside, inside),
                mesh_dim_names=("replicate", "shard"),
            )
        if how == "offload":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for layer in model.model.layers:
            if sum(p.numel() for p in layer.parameters()) >= SMALLEST_SHARE:
                fully_shard(layer, **options)
        fully_shard(model, **options)
        # FSDP gathers the root's weights when forward is called. These methods are entrances too.
        for method in ("token_logprobs", "nll"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    return model


def compute_device(model):
    """Where the model computes. Under --shard=offload its parameters rest in host memory; their mesh is where they are gathered."""
    p = next(model.parameters())
    kind = p.device_mesh.device_type if hasattr(p, "device_mesh") else p.device.type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else p.device


def average_gradients(model):
    """Over the ranks, in one collective, of parameters that are whole on each; sharded ones were averaged in backward."""
    whole = (
        [p for p in model.parameters() if not hasattr(p, "full_tensor")] if ranks()[1] > 1 else []
    )
    if whole:
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in whole]
        )
        dist.all_reduce(flat)
        for p, part in zip(
            whole, flat.div_(ranks()[1]).split([p.numel() for p in whole]), strict=True
        ):
            p.grad = part.view_as(p)


def finish():
    """End of every script: leave without interpreter teardown, where gloo's threads sometimes abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
