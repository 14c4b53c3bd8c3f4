"""Ranks: how they start, how a model is sharded over them, how they exchange numbers.

Nothing here takes a tensor with a batch axis. How a script ends is in lib/guard.py.
"""

import ctypes
import dataclasses
import datetime
import os
import signal
import sys
import warnings

import torch
import torch.distributed as dist

from lib.guard import fail, guard, one_sentence
from lib.lora import lora_parameters
from lib.progress import printed, progress
from lib.trackers import tracker_names

# After how long a collective gives up: set when the ranks meet, for groups that are made later.
collectives = {"timeout": None}


# ---- Start ---------------------------------------------------------------------------------------
def ranks():
    """(rank, world) from torchrun's environment variables; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def start_run(cfg):
    """Start a stage: (rank, world, device). From here on, a run that ends early says why."""
    guard(cfg.phase_timeout)
    tracker_names(cfg.report_to)  # a wrong one ends the script now, not after loading
    # Collectives time out later than phases do. A rank that waits for a stuck one then lives until
    # the watch thread of the stuck one has said where it is.
    mixed = cfg.optimizer == "adamw_bf16"
    return init_distributed(cfg.seed, 2 * cfg.phase_timeout, cfg.shard, mixed)


def init_distributed(seed, timeout_s=1800, how="full", mixed=False):
    """Set up device, threads, process group and PyTorch's seed: (rank, world, device).

    timeout_s: seconds after which a collective gives up. how: the flag --shard. mixed: weights are
    kept in another precision than that of the computation.
    """
    rank, world = ranks()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    else:
        device = torch.device("cpu")

    libc = ctypes.CDLL(None)
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(libc, "prctl"):
        # PR_SET_PDEATHSIG: a rank dies with torchrun. Else it would train on and hold out_dir.
        libc.prctl(1, signal.SIGKILL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory(libc)
        skip_compiler_import()
    if device.type == "cpu" or how == "offload":
        torch.set_num_threads(num_threads(world, device.type == "cuda"))
    # Else a product that is split over its inner dimension may add up its parts in bf16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    # One process alone has a group of its own where it needs FSDP's mixed precision.
    if world > 1 or mixed or device.type == "cuda":
        init_process_group(rank, world, device, timeout_s)
    torch.manual_seed(seed)
    return rank, world, device


def num_threads(world, beside_gpu=False):
    """Threads of this rank on CPUs: OMP_NUM_THREADS, or else an equal share of the cores.

    Beside a GPU they belong to --shard=offload, which sums gradients and runs AdamW in host memory.
    OMP_NUM_THREADS=1 is meant for verifiers then: one core would take seconds a step.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not given or beside_gpu:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return max(1, (os.cpu_count() or 1) // ranks_here)
    # "2,1" has a number for each level of nested regions. Here is one level.
    outermost = given.partition(",")[0].strip()
    if not outermost.isdecimal() or int(outermost) < 1:
        fail(f"OMP_NUM_THREADS={given}: expected a whole number above 0.")
    return int(outermost)


def init_process_group(rank, world, device, timeout_s):
    """Join the other ranks at MASTER_PORT. Without torchrun the group is this process alone."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"timeout": datetime.timedelta(seconds=timeout_s)}
    collectives["timeout"] = options["timeout"]
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    # This fails where the port is taken, or where no other rank answers.
    with one_sentence(f"rank {rank} of {world} at MASTER_PORT={os.environ.get('MASTER_PORT')}"):
        dist.init_process_group(backend, **options)


def keep_freed_memory(libc):
    """Tell glibc to keep the memory that tensors free.

    By default glibc gives large blocks back to the system after every op, and the next op pays a
    page fault for each page. Keeping them makes a training step of the tiny model 1.5 to 2 times
    faster. Blocks that were allocated by mmap cannot be kept, so mmap is switched off.
    """
    if not hasattr(libc, "mallopt"):
        return
    # The numbers are those of glibc's malloc.h.
    m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 1 << 26)


def skip_compiler_import():
    """Keep PyTorch's optimizers from importing its compiler, which nothing here uses.

    The import costs 146 MB and 1.2 s a process. The optimizers do it only to keep the compiler off
    their own methods.
    """
    adamw = torch.optim.AdamW
    # These methods are wrapped by a decorator that imports the compiler on the first call, and then
    # stores the wrapped function here. Storing it beforehand makes the import unnecessary.
    for method in (adamw.add_param_group, adamw.zero_grad, adamw.state_dict, adamw.load_state_dict):
        method.__wrapped__.__dict__["__dynamo_disable"] = method.__wrapped__
    # `step` has a wrapper of another kind. Of what that does, only no_grad is needed.
    adamw.step = torch.no_grad()(adamw.step.__wrapped__)


# ---- Collectives ---------------------------------------------------------------------------------
def print0(*args):
    """Print on rank 0 only."""
    if ranks()[0] == 0:
        print(*args, flush=True)
        printed()


def all_reduce(values, op="sum"):
    """Reduce {name: number} over all ranks in one collective; op is "sum" or "max".

    The names and their order must be the same on every rank.
    """
    if not dist.is_initialized():
        return dict(values)
    operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
    numbers = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
    dist.all_reduce(numbers, operation)
    return dict(zip(values, numbers.tolist()))


def all_gather(value, group=None):
    """[value of rank 0, value of rank 1, ...] for any picklable value; of a group's ranks only, if
    one is given."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group)
    return gathered


def whole_groups(rollouts):
    """The rollouts of all ranks in the order of their groups: the samples of a prompt side by side.

    A group is spread over the ranks, and rewards are compared inside it. This rank's rollouts are
    the objects themselves, so what is set in them stays. Those of other ranks come without prompt,
    tokens and text: their row has its index alone, and completion_ids has the right length only.
    """
    rank, world = ranks()
    parts = [rollouts]
    if world > 1:
        parts = all_gather([without_texts(r) for r in rollouts])
        parts[rank] = rollouts
    everyone = [r for part in parts for r in part]
    return sorted(everyone, key=lambda r: r.group)


def without_texts(r):
    """A copy of a rollout that is a few numbers, to be sent to other ranks."""
    return dataclasses.replace(
        r,
        row={"index": r.row.get("index")},
        prompt_ids=[],
        completion_ids=range(len(r.completion_ids)),
        sampler_logprobs=[],
        teacher_logprobs=[],
        text="",
        pending=None,
    )


# ---- Sharding ------------------------------------------------------------------------------------
# A layer with at least this many parameters is gathered by itself. Below it, the latency of one
# more collective costs more than the bytes.
SMALLEST_SHARE = 1 << 20


def shard(model, device, how="full", reduce_once=False):
    """Wrap the model with FSDP2, in place, and return it. `how` is the stages' flag --shard.

    reduce_once: gradients of all micro-batches are summed before ranks exchange them.

    Master weights and the reduction of gradients are fp32; the computation is bf16 on GPUs and fp32
    on CPUs. On CPUs, --shard=replicate leaves the module unwrapped, and average_gradients does the
    rest.
    """
    if how not in ("full", "hybrid", "offload", "replicate"):
        fail(f"--shard={how}: expected full, hybrid, offload or replicate.")
    # Weights in bf16 are wrapped on CPUs, too, since FSDP casts them to fp32 for the computation.
    kept_whole = how == "replicate" and device.type != "cuda"
    in_fp32 = next(model.parameters()).dtype == torch.float32
    if not dist.is_initialized() or (kept_whole and in_fp32):
        return model

    # The import takes a while, so that only runs that shard pay for it.
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # FSDP2 warns of layers whose outputs are changed in place. This model changes none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    options = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # the inputs hold cos and sin of RoPE, which stay fp32
        ),
        "ignored_params": lora_parameters(model),  # whole on every rank
    }
    if how in ("hybrid", "replicate"):
        # Weights are sharded over the ranks of one node, or over one rank, and copied across nodes.
        ranks_per_copy = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if how == "hybrid" else 1
        options["mesh"] = mesh_of_copies(device, ranks_per_copy)
    if how == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")

    # Large layers are gathered one by one. What is left, or all of a small model, is one piece.
    for layer in model.model.layers:
        if sum(p.numel() for p in layer.parameters()) >= SMALLEST_SHARE:
            fully_shard(layer, **options)
    fully_shard(model, **options)
    model.reduce_once = reduce_once
    # FSDP gathers the root's weights when forward is called. These methods are entrances, too.
    for method in ("token_logprobs", "nll"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    return model


def mesh_of_copies(device, ranks_per_copy):
    """The mesh of ranks [copies, ranks_per_copy]; its groups wait as long as the group of all does.

    Groups that DeviceMesh makes by itself have a timeout of their own, 10 minutes with NCCL.
    """
    from torch.distributed.device_mesh import DeviceMesh

    grid = torch.arange(dist.get_world_size()).view(-1, ranks_per_copy)
    timeout = collectives["timeout"]
    replicate, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), timeout=timeout)
    shard, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=timeout)
    return DeviceMesh.from_group(
        [replicate, shard], device.type, mesh=grid, mesh_dim_names=("replicate", "shard")
    )


def micro_batches(batches, model):
    """Yield the micro-batches of a step. Ranks exchange gradients as rarely as memory allows."""
    for i, batch in enumerate(progress(batches, "update")):
        exchange_gradients(model, i == len(batches) - 1)
        yield batch


def exchange_gradients(model, is_last):
    """Say whether the next backward is the last one of a step.

    Whole copies of a model (--shard=hybrid, replicate) are averaged in the last one alone, which
    takes no memory. With reduce_once, shards are made in the last one alone, too.
    """
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_gradient_sync(is_last or not model.reduce_once)
        model.set_requires_all_reduce(is_last)


def compute_device(model):
    """Return the device on which the model computes.

    Under --shard=offload its parameters rest in host memory. The mesh that they are sharded over
    then names the kind of device on which they are gathered.
    """
    parameter = next(model.parameters())
    if hasattr(parameter, "device_mesh"):
        kind = parameter.device_mesh.device_type
    else:
        kind = parameter.device.type
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def average_gradients(model):
    """Average over the ranks the gradients of parameters that are whole on each, in one collective.

    FSDP has averaged the gradients of sharded parameters during backward.
    """
    world = ranks()[1]
    if world == 1:
        return
    # Sharded parameters are DTensors, which have full_tensor(). Frozen ones have no gradient.
    whole = [p for p in model.parameters() if not hasattr(p, "full_tensor")]
    parameters = [p for p in whole if p.requires_grad]
    if not parameters:
        return
    # A rank without a gradient takes part with zeros, as the others wait for it.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat.div_(world)
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


# ---- End -----------------------------------------------------------------------------------------
# What has to be closed when a script ends: trackers send what they still hold.
closers = []


def finish():
    """End a script without interpreter teardown, where gloo's threads sometimes abort the process.

    Every script ends with this call.
    """
    for close in closers:
        close()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
