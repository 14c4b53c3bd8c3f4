"""What a run will take, said before it starts: memory at the three moments at which it peaks, and the time of a step at most.

A file of its own because it is arithmetic about the model and no part of it: model.py is Qwen3 alone, and common.py imports no model.
check_memory prints the plan of a stage from its flags, and ends a run that cannot fit with a sentence before anything is loaded.
tests/test_plan.py holds the plan against bytes and products counted as they happen.
"""

import contextlib
import os

import torch

from lib.common import print0
from lib.guard import fail
from model import Qwen3, read_config


def activation_elements(config, checkpointing):
    """Numbers that the layers keep for backward, per token, in the compute precision (a few fp32 statistics are left out)."""
    D, F_ = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    # 2 sums, 2 normed; q k before and after RoPE, v, out; gate, up, their product
    layer = 4 * D + 3 * heads + 3 * F_
    return (
        D * (config.num_hidden_layers + 1) + layer
        if checkpointing
        else layer * config.num_hidden_layers
    )


def memory_plan(
    config, world, tokens, longest, gpu=True, nll=False, engine="vllm", reference=False
):
    """{"load", "update", "rollouts"}: {part: bytes on one rank} at the three moments at which memory peaks. tokens: of a packed
    micro-batch. longest: of a sequence, prompt included. Estimates where a part depends on the allocator: see its comment."""
    with torch.device("meta"):
        model = Qwen3(config)
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    # embedding, head, last norm: gathered from first forward to last backward
    root = total - layer * config.num_hidden_layers
    width, sharded, V, D = 2 if gpu else 4, gpu or world > 1, config.vocab_size, config.hidden_size
    # fp32 master weights, two moments
    state = {"weights": 4 * total // world, "optimizer": 8 * total // world}
    copies = {"reference": width * total} if reference else {}
    replica = {"engine weights": width * total} if sharded else {}
    update = state | copies | {"gradients": 4 * total // world}
    # two layers and the root whole; gradients of the root and a layer in flight, once more in fp32
    # for their reduction
    if sharded:
        update["gathered"] = width * (root + 2 * layer) + (width + 4) * (root + layer)
    peak_layer = 3 * config.intermediate_size + 2 * D  # gradients alive beside what the layer kept
    update["activations"] = width * tokens * (activation_elements(config, gpu) + peak_layer)
    columns, rows = (V, min(2048, tokens)) if nll else (min(V, 8192), tokens)
    update["logits"] = (
        (columns * rows * (4 + width) if gpu else 2**21)
        + 4 * tokens * D
        + (4 * V * D if nll else 0)
    )
    # vLLM sleeps meanwhile, its weights in host memory
    update |= replica if engine == "torch" else {}
    cache = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * width
        * longest
    )
    # of one sequence, the least that goes on
    rollouts = state | copies | replica | {"KV cache": cache}
    return {"load": {"weights": 4 * total}, "update": update} | (
        {} if nll else {"rollouts": rollouts}
    )


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
    """(seconds of generation, seconds of the update) of one step if every completion ran to its limit: an upper end, at rates that
    well-kept code reaches on an H100 (40% of its peak arithmetic, 60% of its bandwidth). tokens, rows: of the whole step. room: bytes for
    KV caches; where they hold few sequences, the weights are read for each few anew."""
    with torch.device("meta"):
        total = sum(p.numel() for p in Qwen3(config).parameters())
    # looking up is no product
    total -= 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    # checkpointing: all but each last product
    again = total - config.num_hidden_layers * config.hidden_size * config.intermediate_size
    attention = (
        2 * longest * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    )
    # attention: forward twice, backward 2.5 of one
    update = tokens * (6 * total + 2 * again + 4.5 * attention) / (world * flops)
    cache = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    # of half-written completions, the mean over their growth
    caches = rows / world * cache * (longest - new_tokens / 2)
    # all caches at every token, and all weights at every token of a wave
    read = new_tokens * (2 * total * max(caches / room, 1) + caches)
    return read / bandwidth, update


def free_memory(device, world):
    """Bytes that a rank may still take: of its GPU, or its share of what the machine or its container has left."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info()[0]
            + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated()
        )
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):
        free = min(
            free,
            int(open("/sys/fs/cgroup/memory.max").read())
            - int(open("/sys/fs/cgroup/memory.current").read()),
        )
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world))


def longest_sequence(cfg):
    return (
        cfg.max_seq_len
        if hasattr(cfg, "max_seq_len")
        else cfg.max_prompt_tokens + cfg.max_new_tokens
    )


def check_memory(folder, cfg, world, device, pair=0):
    """Prints the plan of memory and time of a run that starts from `folder`, in two or three lines, and ends a run that cannot fit.
    pair: tokens of the longest pair, where a reward model is trained; its step is SFT's, but for the logits, which it does not make."""
    if not os.path.exists(os.path.join(folder, "config.json")) or not os.path.exists(
        "/proc/meminfo"
    ):
        return  # loading says what is wrong with the folder
    nll, longest = pair > 0 or hasattr(cfg, "max_seq_len"), pair or longest_sequence(cfg)
    tokens = max(cfg.micro_batch_tokens, longest)
    shares = {"replicate": 1, "hybrid": int(os.environ.get("LOCAL_WORLD_SIZE", world))}.get(
        cfg.shard, world
    )
    plan = memory_plan(
        read_config(folder),
        shares,
        tokens,
        longest,
        device.type == "cuda",
        nll,
        "" if nll else cfg.engine,
        not nll and getattr(cfg, "kl_coef", 0) > 0,
    )
    if cfg.shard == "offload" and device.type == "cuda":
        plan = {
            moment: {
                k: n for k, n in parts.items() if k not in ("weights", "optimizer", "gradients")
            }
            for moment, parts in plan.items()
        }
    free, GB = free_memory(device, world), 1e9
    for moment in list(plan)[1:]:
        parts = ", ".join(f"{part} {n / GB:.2g}" for part, n in plan[moment].items())
        print0(
            f"{'reward model, ' * (pair > 0)}{moment}: {sum(plan[moment].values()) / GB:.3g} of {free / GB:.3g} GB a rank ({parts})"
        )
    rows, new_tokens = (
        (cfg.prompts_per_step * cfg.group_size, cfg.max_new_tokens)
        if not nll
        else (cfg.rm_samples_per_step if pair else cfg.samples_per_step, 0)
    )
    # of an H100 and of a CPU core, as well-kept code reaches them
    rates = (400e12, 2e12) if device.type == "cuda" else (2e10, 5e9)
    # as gpu_share has it
    room = (
        max(0.6 * free - plan.get("rollouts", {}).get("engine weights", 0), 1e9)
        if device.type == "cuda"
        else float("inf")
    )
    gen, update = time_plan(
        read_config(folder), world, rows * longest, longest, new_tokens, rows, *rates, room
    )
    parts = f"{update:.3g} s" if nll else f"{gen:.3g} s of rollouts and {update:.3g} s of update"
    print0(
        f"{'reward model, ' * (pair > 0)}time: a step takes at most about {parts}, if every sequence has {longest} tokens"
    )
    if max(gen, update) > cfg.phase_timeout:
        print0(
            f"time: a phase of more than --phase_timeout={cfg.phase_timeout:g} s ends the run, again and again when it is resumed: raise it if such steps are meant"
        )
    for moment, parts in plan.items():
        if sum(parts.values()) > free:
            most = max(parts, key=parts.get)
            fail(
                f"{folder} on {world} ranks: {moment} needs about {sum(parts.values()) / GB:.1f} GB a rank and {free / GB:.1f} GB are free; most of it is "
                f"{most}, {parts[most] / GB:.1f} GB: take more ranks, or fewer {'--rm_max_len and ' * (pair > 0)}--micro_batch_tokens (now {tokens} at a time)."
            )
