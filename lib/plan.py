"""Memory and time of a run, planned before it starts.

check_memory is what the stages call. It prints the estimate that follows from their flags, and ends
a run that cannot fit with one sentence, before anything is loaded. Memory is estimated at the three
moments at which it peaks (load, update, rollouts), time as the longest that a step may take. What
memory is left is spent: fewer layers are computed again in backward (Checkpointing in model.py).
The arithmetic is that of lib/estimate.py.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass

import torch

from lib.common import all_reduce, print0
from lib.estimate import (
    adapter_elements,
    bytes_beside_sampler,
    count_parameters,
    memory_plan,
    state_bytes,
    time_plan,
    vllm_cache_bytes,
)
from lib.guard import engine_name, fail
from model import Checkpointing, Qwen3Config, read_config

GB = 1e9
# Bytes a second: between two GPUs of a node, between a GPU and host memory, onto a disk.
LINK, HOST_LINK, DISK = 300e9, 40e9, 1e9
# Share of a GPU's free memory that an update may fill with what need not be computed again. The
# rest is for gaps between blocks, NCCL and a plan that errs. vLLM leaves its graphs there, too.
USABLE, VLLM_ASLEEP = 0.9, 4e9
# Share of a whole GPU within which gradients wait for the last micro-batch.
ROOMY = 0.8


# ---- What a run has ------------------------------------------------------------------------------
def free_memory(device, world):
    """Bytes that a rank may still take: of its GPU, or on CPUs its share of the machine.

    Inside a container, the machine is what the container may use.
    """
    if device.type == "cuda":
        free_on_device, _ = torch.cuda.mem_get_info()
        # PyTorch's allocator holds memory that no tensor uses.
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free_on_device + unused
    with open("/proc/meminfo") as f:
        available = next(line for line in f if line.startswith("MemAvailable"))
    free = int(available.split()[1]) * 1024
    # Without a limit, memory.max is missing or says "max".
    with contextlib.suppress(OSError, ValueError):
        limit = read_number("/sys/fs/cgroup/memory.max")
        used = read_number("/sys/fs/cgroup/memory.current")
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world))


def gpu_memory(device):
    """Bytes of a GPU, whatever is free of them."""
    return torch.cuda.get_device_properties(device).total_memory


def read_number(path):
    """The whole number that a file consists of."""
    with open(path) as f:
        return int(f.read())


def longest_sequence(cfg):
    """Tokens of the longest sequence that the flags allow."""
    if hasattr(cfg, "max_seq_len"):
        return cfg.max_seq_len
    return cfg.max_prompt_tokens + cfg.max_new_tokens


# ---- The plan of a run ---------------------------------------------------------------------------
@dataclass
class Run:
    """What a plan is made from: a model, the flags, and the longest sequences that they allow."""

    config: Qwen3Config
    cfg: object
    world: int
    device: torch.device
    longest: int  # tokens of the longest sequence
    nll: bool  # training on given tokens, without rollouts
    pair: bool  # of these, pairs for a reward model
    free: float  # bytes that the rank with least may take

    @property
    def gpu(self):
        return self.device.type == "cuda"

    @property
    def tokens(self):
        """Tokens of a micro-batch; a sequence that is longer is a micro-batch by itself."""
        return max(self.cfg.micro_batch_tokens, self.longest)

    @property
    def sharing(self):
        """Ranks that share the weights."""
        if self.cfg.shard == "replicate":
            return 1
        return ranks_here(self.world) if self.cfg.shard == "hybrid" else self.world

    @property
    def method(self):
        if self.pair:
            return "adamw"  # a reward model trains whole, in fp32
        return "lora" if self.cfg.lora_rank else self.cfg.optimizer

    @property
    def card(self):
        """Bytes of the GPU. Without one to ask it is taken for free as a whole (bench/hours.py)."""
        return gpu_memory(self.device) if torch.cuda.is_available() else self.free

    @property
    def engine(self):
        return "" if self.nll else engine_name(self.cfg.engine)


def ranks_here(world):
    """Ranks of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def check_memory(folder, cfg, world, device, pair=0):
    """Print memory and time of a run that starts from `folder`; end a run that cannot fit.

    Returns (the Checkpointing of the model, whether gradients are reduced once a step).
    pair: tokens of the longest pair, if a reward model is trained. It is planned like SFT, although
    it makes no logits.
    """
    # A folder without config.json is no checkpoint. Loading it says so in better words.
    if not os.path.exists(os.path.join(folder, "config.json")):
        return Checkpointing(), False
    if not os.path.exists("/proc/meminfo"):
        return Checkpointing(), False
    nll = pair > 0 or hasattr(cfg, "max_seq_len")
    longest = pair or longest_sequence(cfg)
    # All ranks decide alike, by the one that has least.
    free = -all_reduce({"free": -free_memory(device, world)}, "max")["free"]
    run = Run(read_config(folder), cfg, world, device, longest, nll, pair > 0, free)
    if not nll:
        check_tensor_parallel(run)
    reduce_once = has_room_for_gradients(run)
    checkpointing = choose_checkpointing(run, reduce_once)
    plan = plan_of_flags(run, checkpointing, reduce_once)

    subject = "reward model, " if pair > 0 else ""
    for moment, parts in plan.items():
        if moment != "load":
            needed = sum(parts.values())
            print0(
                f"{subject}{moment}: {needed / GB:.3g} of {free / GB:.3g} GB a rank "
                f"({listed(parts)})"
            )
    if not nll:
        print_rows(run, plan)
    if run.gpu:
        print_bought(run, subject, checkpointing, reduce_once, plan)
        print_host_memory(run, subject, checkpointing)
    print_time(run, subject, checkpointing, plan)

    # Refuse what cannot fit.
    flags = "--rm_max_len and --micro_batch_tokens" if pair > 0 else "--micro_batch_tokens"
    offload = "" if cfg.offload_activations or not run.gpu else ", or --offload_activations"
    for moment, parts in plan.items():
        needed = sum(parts.values())
        if needed > free:
            largest = max(parts, key=parts.get)
            fail(
                f"{folder} on {world} ranks: {moment} needs about {needed / GB:.1f} GB a rank and "
                f"{free / GB:.1f} GB are free; most of it is {largest}, "
                f"{parts[largest] / GB:.1f} GB: take more ranks{offload}, or fewer {flags} "
                f"(now {run.tokens} at a time)."
            )
    if run.engine == "vllm":
        refuse_small_caches(run, plan)
    return checkpointing, reduce_once


def listed(parts):
    """ "weights 4.1, optimizer 8.2": the parts of a moment in GB."""
    return ", ".join(f"{part} {size / GB:.2g}" for part, size in parts.items())


def plan_of_flags(run, checkpointing=None, reduce_once=False):
    """memory_plan of a run, as --shard spreads it over ranks and host memory."""
    plan = memory_plan(
        run.config,
        run.sharing,
        run.tokens,
        run.longest,
        gpu=run.gpu,
        nll=run.nll,
        engine=run.engine,
        reference=not run.nll and getattr(run.cfg, "kl_coef", 0) > 0,
        method=run.method,
        lora_rank=run.cfg.lora_rank,
        checkpointing=checkpointing,
        reduce_once=reduce_once,
    )
    if run.cfg.shard == "offload" and run.gpu:
        # These parts rest in host memory and take nothing of the GPU's.
        for parts in plan.values():
            for part in ("weights", "optimizer", "gradients"):
                parts.pop(part, None)
    return plan


def bytes_of_update(run, checkpointing, reduce_once):
    return sum(plan_of_flags(run, checkpointing, reduce_once)["update"].values())


def choose_checkpointing(run, reduce_once):
    """The Checkpointing that --checkpoint_layers and --offload_activations mean.

    `auto` is the least that has to be computed again for an update within the free bytes.
    """
    layers, offload = run.config.num_hidden_layers, run.cfg.offload_activations
    flag = run.cfg.checkpoint_layers
    if flag == "all":
        return Checkpointing(layers, offload=offload)
    if flag.isdecimal():
        return Checkpointing(min(int(flag), layers), offload=offload)
    if flag != "auto":
        fail(f"--checkpoint_layers={flag}: expected auto, all or a number of layers.")
    if not run.gpu:
        return Checkpointing()
    room = USABLE * run.free
    if run.engine == "vllm":
        room -= VLLM_ASLEEP
    # The last layer is the first that backward needs, and one layer has to be whole anyway.
    most = layers - 1
    choices = [Checkpointing(again, again, offload) for again in range(most)]
    # Nothing saves more seconds a byte than attention's output, so that is given up last.
    choices += [Checkpointing(most, attention, offload) for attention in range(most, 0, -1)]
    for checkpointing in choices:
        if bytes_of_update(run, checkpointing, reduce_once) <= room:
            return checkpointing
    return Checkpointing(most, offload=offload)


def has_room_for_gradients(run):
    """Whether gradients stay whole on every rank, until a step's last micro-batch reduces them.

    It costs nothing where no ranks share the weights. Elsewhere only a GPU on which nothing has to
    be computed again has room for it. The size of the GPU decides and not what is free just now:
    the order of the sums depends on it, which a resumed run has to repeat.
    """
    if not run.gpu or run.method == "lora":
        return False
    whole = bytes_of_update(run, Checkpointing(), True)
    if whole <= bytes_of_update(run, Checkpointing(), False):
        return True
    return whole <= ROOMY * gpu_memory(run.device)


def print_bought(run, subject, checkpointing, reduce_once, plan):
    """What an update computes again, and what the memory that it takes for the rest is worth."""
    layers = run.config.num_hidden_layers
    everything = Checkpointing(layers)
    more = sum(plan["update"].values()) - bytes_of_update(run, everything, reduce_once)
    seconds = time_of_flags(run, plan, checkpointing)["update"]
    most_seconds = time_of_flags(run, plan, everything)["update"]
    without_attention = checkpointing.layers - checkpointing.attention
    print0(
        f"{subject}backward computes {checkpointing.layers} of {layers} layers again, attention in "
        f"{without_attention}: {more / GB:+.3g} GB and {seconds - most_seconds:+.3g} s of update, "
        "against all of them (--checkpoint_layers)"
    )
    if reduce_once:
        whole = plan["update"]["whole gradients"]
        more = whole - plan_of_flags(run)["update"].get("gradients", 0)
        print0(f"{subject}ranks exchange gradients once a step: {more / GB:+.3g} GB")


# ---- The sampler's caches ------------------------------------------------------------------------
# Rows that are decoded at once at most, by vLLM and by the built-in sampler.
VLLM_ROWS, TORCH_ROWS = 256, 1024


def cache_bytes(run, plan):
    """Bytes of one rank for KV caches."""
    if not run.gpu:
        return 1 << 30  # of both samplers
    beside = bytes_beside_sampler(plan)
    if run.engine == "vllm":
        return vllm_cache_bytes(run.config, run.card, beside, run.cfg.tensor_parallel)
    # The built-in sampler takes half of what is left then (engine.TorchEngine._rows_that_fit).
    return max((run.free - beside - plan["rollouts"].get("engine weights", 0)) // 2, 0)


def rows_at_once(run, room):
    """(tokens that fit into caches of `room` bytes a rank, sequences of full length that an engine
    decodes at once, sequences that it has to decode in a step)."""
    config, cfg = run.config, run.cfg
    width = 2 if run.gpu else 4
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    # Ranks that share an engine have a share of every token's keys and values each.
    tokens = int(room * cfg.tensor_parallel // (elements * width))
    rows = -(-cfg.prompts_per_step * cfg.group_size * cfg.tensor_parallel // run.world)
    fit = tokens // run.longest
    if run.engine == "vllm":
        return tokens, min(fit, VLLM_ROWS, rows), rows
    # The built-in sampler takes a power of two.
    fit = 1 << (max(fit, 1).bit_length() - 1)
    return tokens, min(fit, TORCH_ROWS, rows), rows


def print_rows(run, plan):
    """A line: how many sequences decode at once."""
    room = cache_bytes(run, plan)
    tokens, at_once, rows = rows_at_once(run, room)
    print0(
        f"rollouts: caches of {room / GB:.3g} GB a rank hold {tokens:,} tokens: {at_once} of "
        f"{rows} sequences of {run.longest} tokens decode at once, {rows - at_once} wait"
    )


def refuse_small_caches(run, plan):
    """End the run if vLLM's caches do not hold one sequence of full length."""
    tokens, at_once, _ = rows_at_once(run, cache_bytes(run, plan))
    if at_once == 0:
        fail(
            f"--engine=vllm: beside the trainer its caches hold {tokens:,} tokens, fewer than a "
            f"sequence of {run.longest}: take more ranks, --tensor_parallel or --shard=offload."
        )


def check_tensor_parallel(run):
    """End the run if vLLM cannot be shared by as many ranks as --tensor_parallel says."""
    config, ranks = run.config, run.cfg.tensor_parallel
    if ranks == 1:
        return
    flag = f"--tensor_parallel={ranks}"
    if run.engine != "vllm":
        fail(f"{flag}: the built-in sampler has none, it takes --engine=vllm.")
    if ranks_here(run.world) % ranks:
        fail(f"{flag}: the {ranks_here(run.world)} ranks of a node are no multiple of it.")
    heads = config.num_key_value_heads
    if heads % ranks or config.num_attention_heads % ranks or config.intermediate_size % ranks:
        fail(f"{flag}: the model's {heads} key heads or its widths are no multiple of it.")


# ---- Host memory ---------------------------------------------------------------------------------
def host_plan(run, checkpointing):
    """Bytes of host memory beside GPUs: ({part: bytes} of every rank, {part: bytes} of rank 0)."""
    width = 2 if run.gpu else 4
    total, _ = count_parameters(json.dumps(asdict(run.config)))
    adapters = adapter_elements(run.config, run.cfg.lora_rank)
    shared_out, _ = state_bytes(total, adapters, width, run.method)
    every = {}
    if checkpointing.offload:
        # PyTorch takes pinned memory in powers of two.
        tensor = width * run.tokens * run.config.hidden_size
        every["inputs of layers"] = checkpointing.layers * 2 ** (tensor - 1).bit_length()
    if run.cfg.shard == "offload":
        every |= {part: size // run.sharing for part, size in shared_out.items()}
    # vLLM keeps nothing there: before an update it drops its weights, as the next are others.
    if not run.nll:
        every["reward model"] = reward_model_bytes(run, width)
    every = {part: size for part, size in every.items() if size > 0}
    return every, {"gathered weights": shared_out["weights"]}


def reward_model_bytes(run, width):
    """Bytes of RLHF's own reward model, which rests in host memory; 0 without one."""
    # Another one rests there, too, with a size that is not known here, or is behind a URL.
    if getattr(run.cfg, "rm", "none"):
        return 0
    folder = run.cfg.rm_init_from or run.cfg.init_from
    total, _ = count_parameters(json.dumps(asdict(read_config(folder))))
    return width * total


def print_host_memory(run, subject, checkpointing):
    """A line: what all ranks of this machine, and rank 0 besides, take of its memory."""
    every, first = host_plan(run, checkpointing)
    here = ranks_here(run.world)
    needed = here * sum(every.values()) + sum(first.values())
    free = here * free_memory(torch.device("cpu"), run.world)
    each = f"each of {here} ranks: {listed(every)}; " if every else ""
    print0(
        f"{subject}host memory: {needed / GB:.3g} of {free / GB:.3g} GB on this machine "
        f"({each}rank 0 while it saves: {listed(first)})"
    )
    if needed > free:
        print0(f"{subject}host memory: that is more than is free, and may end the run later")


# ---- Seconds -------------------------------------------------------------------------------------
def time_of_flags(run, plan, checkpointing):
    """{part of a step: seconds} of a run with these flags, on H100s or on one core of a CPU.

    sync: of the engine; saving: a step's share of a checkpoint.
    """
    cfg = run.cfg
    if not run.nll:
        rows, new_tokens = cfg.prompts_per_step * cfg.group_size, cfg.max_new_tokens
    elif run.pair:
        rows, new_tokens = cfg.rm_samples_per_step, 0
    else:
        rows, new_tokens = cfg.samples_per_step, 0
    engine_weights = plan.get("rollouts", {}).get("engine weights", 0)
    if run.gpu:
        flops, bandwidth, link = 400e12, 2e12, LINK
        # 1 GB at least keeps the estimate finite.
        room = 1e9 if run.nll else max(cache_bytes(run, plan), 1e9)
    else:
        flops, bandwidth, link = 2e10, 5e9, 5e9
        room = float("inf")
    generation_s, update_s = time_plan(
        run.config,
        run.world,
        rows * run.longest,
        run.longest,
        new_tokens,
        rows,
        flops,
        bandwidth,
        room,
        checkpointing,
        run.nll,
        1 if run.nll else cfg.tensor_parallel,
    )
    if run.gpu and checkpointing.offload:
        # The inputs of layers go to host memory and come back.
        inputs = 2 * rows * run.longest / run.world * run.config.hidden_size * checkpointing.layers
        update_s += 2 * inputs / HOST_LINK
    # The weights are gathered, then written. vLLM has dropped its own.
    sync_s = engine_weights / link + 2 * engine_weights / bandwidth
    # Dynamic sampling of IF-RL: a round of fresh prompts may be as large as the first.
    rounds = 1 + getattr(cfg, "max_refill_rounds", 0)
    seconds = {"rollouts": rounds * generation_s, "update": update_s, "sync": sync_s}
    if not run.pair:
        seconds["saving"] = checkpoint_bytes(run) / DISK / cfg.save_every
    return {part: size for part, size in seconds.items() if size > 0}


def checkpoint_bytes(run):
    """Bytes of a checkpoint: weights and AdamW's two moments; with LoRA merged weights, adapters
    and their moments."""
    total, _ = count_parameters(json.dumps(asdict(run.config)))
    adapters = adapter_elements(run.config, run.cfg.lora_rank)
    shared_out, whole = state_bytes(total, adapters, 2 if run.gpu else 4, run.method)
    # An adapter's 16 bytes a number are 4 of weight, 8 of moments, 4 of gradient.
    of_adapters = whole.get("adapters", 0) * 12 // 16
    return shared_out["weights"] + shared_out["optimizer"] + of_adapters


def print_time(run, subject, checkpointing, plan):
    """A line: the parts of a step in seconds. Another one if a part is over the limit."""
    seconds = time_of_flags(run, plan, checkpointing)
    parts = ", ".join(f"{size:.3g} s of {part}" for part, size in seconds.items())
    saved = ""
    if "saving" in seconds:
        saved = f"; {checkpoint_bytes(run) / GB:.3g} GB are saved every {run.cfg.save_every} steps"
    print0(
        f"{subject}time: a step takes at most about {parts}, if every sequence has {run.longest} "
        f"tokens{saved}"
    )
    if max(seconds.values()) > run.cfg.phase_timeout:
        print0(
            f"time: a phase of more than --phase_timeout={run.cfg.phase_timeout:g} s ends the run, "
            "again and again when it is resumed: raise it if such steps are meant"
        )
