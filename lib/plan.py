"""Memory and time of a run, estimated before it starts.

check_memory is what the stages call. It prints the estimate that follows from their flags, and ends
a run that cannot fit with one sentence, before anything is loaded. Memory is estimated at the three
moments at which it peaks (load, update, rollouts), time as the longest that a step may take.

This is arithmetic about the model and no part of it: model.py is Qwen3 alone, and lib/common.py
imports no model. tests/test_plan.py compares the estimate with counted bytes and matrix products.
"""

import contextlib
import functools
import json
import os
from dataclasses import asdict

import torch

from lib.common import print0
from lib.guard import engine_name, fail
from model import Qwen3, Qwen3Config, read_config

GB = 1e9


# ---- Memory --------------------------------------------------------------------------------------
def activation_elements(config, checkpointing):
    """Number of elements per token that the layers keep for backward, in the compute precision.

    checkpointing: every layer keeps its input alone, and one layer at a time is computed again.
    A few fp32 statistics per token are left out.
    """
    D = config.hidden_size
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    # D wide: two residual sums and two normalized inputs. Heads: q and k before RoPE, q and k after
    # it, v and the attention output. MLP: gate, up, and their product.
    layer = 4 * D + 3 * heads + 3 * config.intermediate_size
    if checkpointing:
        return D * (config.num_hidden_layers + 1) + layer
    return layer * config.num_hidden_layers


@functools.cache
def count_parameters(config):
    """(parameters of a model, of one of its layers), without allocating them.

    config: the fields of a Qwen3Config as JSON, which can be a key of the cache.
    """
    with torch.device("meta"):
        model = Qwen3(Qwen3Config(**json.loads(config)))
    total = sum(p.numel() for p in model.parameters())
    return total, sum(p.numel() for p in model.model.layers[0].parameters())


def adapter_elements(config, rank):
    """Number of elements of LoRA's adapters (lib/lora.py): rank x (in + out) for each weight."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    query, kv = config.num_attention_heads * H, config.num_key_value_heads * H
    # q and o, k and v, then gate, up and down.
    widths = 2 * (D + query) + 2 * (D + kv) + 3 * (D + F)
    return rank * widths * config.num_hidden_layers


def state_bytes(total, adapters, width, method):
    """Bytes of {weights, optimizer, gradients} before they are shared out, and of whole adapters.

    method: "adamw" (all in fp32), "adamw_bf16", or "lora": total weights, frozen in compute
    precision of this width, beside adapters in fp32.
    """
    if method == "lora":
        # AdamW's two moments, and the gradient, of the adapters alone. They are not shared out.
        state = {"weights": width * total, "optimizer": 0, "gradients": 0}
        return state, {"adapters": (4 + 8 + 4) * adapters}
    size = 2 if method == "adamw_bf16" else 4
    state = {"weights": size * total, "optimizer": 2 * size * total, "gradients": size * total}
    return state, {}


def memory_plan(
    config,
    world,
    tokens,
    longest,
    gpu=True,
    nll=False,
    engine="vllm",
    reference=False,
    method="adamw",
    lora_rank=0,
):
    """Bytes on one rank at the moments at which memory peaks: {moment: {part: bytes}}.

    The moments are "load", "update" and, unless nll, "rollouts".

    world:      ranks that share the weights
    tokens:     of a packed micro-batch
    longest:    tokens of the longest sequence, prompt included
    nll:        training on given tokens (SFT, reward model), without rollouts
    engine:     of the rollouts: "vllm" or "torch"
    reference:  whether a reference policy is kept for a KL term
    method:     "adamw", "adamw_bf16" or "lora", the last with adapters of lora_rank

    Parts that depend on the allocator are estimates.
    """
    total, layer = count_parameters(json.dumps(asdict(config)))
    # The root of FSDP: embedding, head and last norm. They are gathered from the beginning of
    # forward to the end of backward.
    root = total - layer * config.num_hidden_layers

    width = 2 if gpu else 4  # bytes of a number in compute precision: bf16 or fp32
    lora = method == "lora"
    # Weights in bf16 are wrapped by FSDP on one CPU process, too (lib.common.shard).
    sharded = gpu or world > 1 or method == "adamw_bf16"

    # The trainer's state stays at all times: weights, and AdamW's two moments.
    adapters = adapter_elements(config, lora_rank)
    shared_out, whole = state_bytes(total, adapters, width, method)
    loaded = shared_out["weights"]
    shared_out = {part: size // world for part, size in shared_out.items()}
    gradients = shared_out.pop("gradients")
    state = {**shared_out, **whole}
    # With LoRA the reference is the policy without its adapters.
    if reference and not lora:
        state["reference"] = width * total

    update = dict(state)
    update["gradients"] = gradients
    if sharded:
        # The root and two layers are whole in compute precision: the current one, and the next one,
        # which FSDP gathers ahead. The gradients of the root and of one layer are on their way, in
        # compute precision and once more in fp32 for the reduction.
        update["gathered"] = width * (root + 2 * layer)
        if not lora:
            update["gathered"] += (width + 4) * (root + layer)

    # Besides what is kept for backward, the gradients inside the MLP of one layer are alive.
    gradients_in_layer = 3 * config.intermediate_size + 2 * config.hidden_size
    elements = activation_elements(config, gpu) + gradients_in_layer
    update["activations"] = width * tokens * elements
    update["logits"] = logits_bytes(config, tokens, width, gpu, nll, frozen=lora)
    # The engine's own copy of the weights. During the update vLLM keeps its copy in host memory.
    engine_weights = {"engine weights": width * total} if sharded or lora else {}
    if engine == "torch":
        update.update(engine_weights)

    plan = {"load": {"weights": loaded}, "update": update}
    if not nll:
        # Keys and values of one sequence of full length: with less, no rollout can be completed.
        kv_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        rollouts = {**state, **engine_weights}
        rollouts["KV cache"] = kv_elements * width * longest
        plan["rollouts"] = rollouts
    return plan


def logits_bytes(config, tokens, width, gpu, nll, frozen=False):
    """Bytes of the logits of a micro-batch and of their gradients.

    The kernels make the logits in tiles, in fp32 and in compute precision: linear_cross_entropy
    (nll) whole rows of 2048 tokens, linear_logprob 8192 columns of all tokens.
    """
    V, D = config.vocab_size, config.hidden_size
    if not gpu:
        tiles = 2**21  # on CPUs two fp32 tiles of 1 MB
    elif nll:
        tiles = V * min(2048, tokens) * (4 + width)
    else:
        tiles = min(V, 8192) * tokens * (4 + width)
    hidden_gradient = 4 * tokens * D
    # linear_cross_entropy sums the gradient of the head in fp32.
    head_gradient = 4 * V * D if nll and not frozen else 0
    return tiles + hidden_gradient + head_gradient


# ---- Time ----------------------------------------------------------------------------------------
def time_plan(
    config,
    world,
    tokens,
    longest,
    new_tokens,
    rows,
    flops=400e12,
    bandwidth=2e12,
    room=float("inf"),
):
    """(seconds of generation, seconds of the update) of a step of sequences of full length.

    An upper end, at rates that good code reaches on an H100: 40% of its peak arithmetic (flops, per
    second) and 60% of its memory bandwidth (bytes per second).

    tokens, rows:  tokens and sequences of the whole step, over all ranks
    longest:       tokens of a sequence, of which new_tokens are generated
    room:          bytes of a rank for KV caches. Where they hold few sequences at a time, the
                   weights are read again for every few.
    """
    total, _ = count_parameters(json.dumps(asdict(config)))
    # Looking up an embedding is no matrix product. A tied embedding is the head as well.
    if not config.tie_word_embeddings:
        total -= config.vocab_size * config.hidden_size

    # Update. A parameter costs 2 operations per token in forward and 4 in backward. Checkpointing
    # computes each layer again, all but its last product (the down projection): 2 more.
    down = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    recomputed = total - down
    # Causal attention does this much per token in one forward pass. It runs forward twice, and
    # backward costs 2.5 forward passes: 4.5 in all.
    heads = config.num_attention_heads * config.head_dim
    attention = 2 * longest * heads * config.num_hidden_layers
    operations = tokens * (6 * total + 2 * recomputed + 4.5 * attention)
    update_s = operations / (world * flops)

    # Generation. Every new token reads the KV caches of all rows of the rank (keys and values, two
    # bytes each), at the mean length of a completion while it grows. It also reads all weights (two
    # bytes each), once for every wave of rows whose caches fit into `room`.
    cache_of_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    caches = rows / world * cache_of_token * (longest - new_tokens / 2)
    waves = max(caches / room, 1)
    bytes_read = new_tokens * (2 * total * waves + caches)
    return bytes_read / bandwidth, update_s


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
def check_memory(folder, cfg, world, device, pair=0):
    """Print memory and time of a run that starts from `folder`; end a run that cannot fit.

    pair: tokens of the longest pair, if a reward model is trained. It is planned like SFT, although
    it makes no logits.
    """
    # A folder without config.json is no checkpoint. Loading it says so in better words.
    if not os.path.exists(os.path.join(folder, "config.json")):
        return
    if not os.path.exists("/proc/meminfo"):
        return
    config = read_config(folder)
    nll = pair > 0 or hasattr(cfg, "max_seq_len")
    longest = pair or longest_sequence(cfg)
    # A sequence that is longer than a micro-batch is a micro-batch by itself.
    tokens = max(cfg.micro_batch_tokens, longest)
    plan = plan_of_flags(config, cfg, world, device, tokens, longest, nll, pair)
    free = free_memory(device, world)
    subject = "reward model, " if pair > 0 else ""

    # Memory, a line for each moment but loading.
    for moment, parts in plan.items():
        if moment != "load":
            needed = sum(parts.values())
            listed = ", ".join(f"{part} {n / GB:.2g}" for part, n in parts.items())
            print0(f"{subject}{moment}: {needed / GB:.3g} of {free / GB:.3g} GB a rank ({listed})")

    # Time, a line.
    generation_s, update_s = time_of_flags(
        config, cfg, world, device, longest, nll, pair, plan, free
    )
    if nll:
        parts = f"{update_s:.3g} s"
    else:
        parts = f"{generation_s:.3g} s of rollouts and {update_s:.3g} s of update"
    print0(
        f"{subject}time: a step takes at most about {parts}, if every sequence has {longest} tokens"
    )
    if max(generation_s, update_s) > cfg.phase_timeout:
        print0(
            f"time: a phase of more than --phase_timeout={cfg.phase_timeout:g} s ends the run, "
            "again and again when it is resumed: raise it if such steps are meant"
        )

    # Refuse what cannot fit.
    flags = "--rm_max_len and --micro_batch_tokens" if pair > 0 else "--micro_batch_tokens"
    for moment, parts in plan.items():
        needed = sum(parts.values())
        if needed > free:
            largest = max(parts, key=parts.get)
            fail(
                f"{folder} on {world} ranks: {moment} needs about {needed / GB:.1f} GB a rank and "
                f"{free / GB:.1f} GB are free; most of it is {largest}, "
                f"{parts[largest] / GB:.1f} GB: take more ranks, or fewer {flags} "
                f"(now {tokens} at a time)."
            )


def plan_of_flags(config, cfg, world, device, tokens, longest, nll, pair=0):
    """memory_plan of a run with these flags, as --shard spreads it over ranks and host memory."""
    # Ranks that share the weights.
    sharing = world
    if cfg.shard == "replicate":
        sharing = 1
    if cfg.shard == "hybrid":
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    gpu = device.type == "cuda"
    method = "lora" if cfg.lora_rank else cfg.optimizer
    if pair:
        method = "adamw"  # a reward model trains whole, in fp32
    plan = memory_plan(
        config,
        sharing,
        tokens,
        longest,
        gpu=gpu,
        nll=nll,
        engine="" if nll else engine_name(cfg.engine),
        reference=not nll and getattr(cfg, "kl_coef", 0) > 0,
        method=method,
        lora_rank=cfg.lora_rank,
    )
    if cfg.shard == "offload" and gpu:
        # These parts rest in host memory and take nothing of the GPU's.
        for parts in plan.values():
            for part in ("weights", "optimizer", "gradients"):
                parts.pop(part, None)
    return plan


def time_of_flags(config, cfg, world, device, longest, nll, pair, plan, free):
    """time_plan of a run with these flags, on an H100 or on one core of a CPU."""
    if not nll:
        rows, new_tokens = cfg.prompts_per_step * cfg.group_size, cfg.max_new_tokens
    elif pair:
        rows, new_tokens = cfg.rm_samples_per_step, 0
    else:
        rows, new_tokens = cfg.samples_per_step, 0
    if device.type == "cuda":
        flops, bandwidth = 400e12, 2e12
        # vLLM gets 60% of the GPU (engine.gpu_share), its weights included. 1 GB at least keeps the
        # estimate finite.
        weights = plan.get("rollouts", {}).get("engine weights", 0)
        room = max(0.6 * free - weights, 1e9)
    else:
        flops, bandwidth = 2e10, 5e9
        room = float("inf")
    generation_s, update_s = time_plan(
        config, world, rows * longest, longest, new_tokens, rows, flops, bandwidth, room
    )
    # Dynamic sampling of IF-RL: a round of fresh prompts may be as large as the first.
    rounds = 1 + getattr(cfg, "max_refill_rounds", 0)
    return rounds * generation_s, update_s
