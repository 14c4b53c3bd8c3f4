"""Bytes and seconds of a model, by arithmetic alone: what an update, rollouts and caches take.

The functions know a model's configuration and a few numbers, no flags and no GPU. lib/plan.py makes
the plan of a run from them. tests/test_plan.py compares them with counted bytes and products.
"""

import functools
import json
from dataclasses import asdict

import torch

from kernels.linear_cross_entropy import tokens_of_chunk
from model import Checkpointing, Qwen3, Qwen3Config


# ---- Memory --------------------------------------------------------------------------------------
def activation_elements(config, checkpointing):
    """Number of elements per token that the layers keep for backward, in the compute precision.

    Of the layers that are computed again, one at a time is whole. The others come last: when
    backward computes the first layer again, it is done with them.
    A few fp32 statistics per token are left out.
    """
    D = config.hidden_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    # D wide: two residual sums and two normalized inputs. Heads: q and k before RoPE, q and k after
    # it, v and the attention output. MLP: gate, up, and their product.
    layer = 4 * D + 3 * (query + kv) + 3 * config.intermediate_size
    whole = max(config.num_hidden_layers - checkpointing.layers, 1)
    # The inputs of layers that are computed again, and the sum before the last norm.
    inputs = 1 if checkpointing.offload else checkpointing.layers + 1
    return D * inputs + query * checkpointing.attention + layer * whole


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
    checkpointing=None,
    reduce_once=False,
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
    checkpointing: what backward computes again; None: all layers on GPUs, none on CPUs
    reduce_once: whether gradients stay whole until the last micro-batch

    Parts that depend on the allocator are estimates.
    """
    total, layer = count_parameters(json.dumps(asdict(config)))
    # The root of FSDP: embedding, head and last norm. They are gathered from the beginning of
    # forward to the end of backward.
    root = total - layer * config.num_hidden_layers

    width = 2 if gpu else 4  # bytes of a number in compute precision: bf16 or fp32
    if checkpointing is None:
        checkpointing = Checkpointing(config.num_hidden_layers if gpu else 0)
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
    if reduce_once:
        # FSDP sums them in fp32, and frees a layer's as it makes its shard.
        del update["gradients"]
        update["whole gradients"] = 4 * total
    if sharded:
        # The root and two layers are whole in compute precision: the current one, and the next one,
        # which FSDP gathers ahead. The gradients of the root and of one layer are on their way, in
        # compute precision and once more in fp32 for the reduction.
        update["gathered"] = width * (root + 2 * layer)
        if not lora:
            update["gathered"] += (width + 4) * (root + layer)

    # Besides what is kept for backward, the gradients inside the MLP of one layer are alive.
    gradients_in_layer = 3 * config.intermediate_size + 2 * config.hidden_size
    elements = activation_elements(config, checkpointing) + gradients_in_layer
    update["activations"] = width * tokens * elements
    update["logits"] = logits_bytes(config, tokens, width, gpu, nll, frozen=lora)
    # The engine's own copy of the weights. During the update vLLM has none.
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
    (nll) whole rows of some tokens, linear_logprob 8192 columns of all tokens.
    """
    V, D = config.vocab_size, config.hidden_size
    if not gpu:
        tiles = 2**21  # on CPUs two fp32 tiles of 1 MB
    elif nll:
        tiles = V * tokens_of_chunk(tokens, V, frozen) * (4 + width)
    else:
        tiles = min(V, 8192) * tokens * (4 + width)
    hidden_gradient = 4 * tokens * D
    # linear_cross_entropy sums the gradient of the head in fp32.
    head_gradient = 4 * V * D if nll and not frozen else 0
    return tiles + hidden_gradient + head_gradient


# ---- The sampler's caches ------------------------------------------------------------------------
# The most that vLLM gets of a GPU. It frees all of it before an update, so 0.75 is safe where the
# trainer's state leaves as much.
VLLM_SHARE = 0.75


def vllm_work(card):
    """Bytes of a GPU of `card` bytes that vLLM takes beside weights and caches: activations of a
    prefill, recorded graphs, NCCL. An estimate, 4.1 GB of 85 and 2.6 of 25."""
    return 2e9 + card / 40


def unusable(card):
    """Bytes of a GPU that no tensor gets: contexts of CUDA and NCCL, gaps between tensors."""
    return 1e9 + card / 40


def vllm_cache_bytes(config, card, beside, tensor_parallel=1):
    """Bytes for vLLM's KV caches on a GPU of `card` bytes, 0 if nothing is left.

    beside: bytes of the trainer that stay there while rollouts are sampled. At a sync its root and
    two layers are gathered besides. The number depends on no measurement, so that a run which is
    resumed cuts the same batches.
    """
    total, layer = count_parameters(json.dumps(asdict(config)))
    root = total - layer * config.num_hidden_layers
    gathered = 2 * (root + 2 * layer)
    mine = min(VLLM_SHARE * card, card - beside - gathered - unusable(card))
    return max(int(mine - 2 * total / tensor_parallel - vllm_work(card)), 0)


def bytes_beside_sampler(plan):
    """Bytes that stay on a GPU while rollouts are sampled: weights, moments, a reference policy."""
    of_sampler = ("engine weights", "KV cache")
    return sum(n for part, n in plan["rollouts"].items() if part not in of_sampler)


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
    checkpointing=None,
    nll=False,
    tensor_parallel=1,
):
    """(seconds of generation, seconds of the update) of a step of sequences of full length.

    An upper end, at rates that good code reaches on an H100: 40% of its peak arithmetic (flops, per
    second) and 60% of its memory bandwidth (bytes per second).

    tokens, rows:  tokens and sequences of the whole step, over all ranks
    longest:       tokens of a sequence, of which new_tokens are generated
    room:          bytes of a rank for KV caches. Where they hold few sequences at a time, the
                   weights are read again for every few.
    checkpointing: what backward computes again; None: all layers
    nll:           the loss is linear_cross_entropy, which makes its logits once
    tensor_parallel: ranks that share a copy of the weights for sampling; each reads its slice
    """
    total, layer = count_parameters(json.dumps(asdict(config)))
    layers = config.num_hidden_layers
    if checkpointing is None:
        checkpointing = Checkpointing(layers)
    # Looking up an embedding is no matrix product. A tied embedding is the head as well.
    if not config.tie_word_embeddings:
        total -= config.vocab_size * config.hidden_size

    # Update. A parameter costs 2 operations per token in forward and 4 in backward. A layer that is
    # computed again costs 2 more, all but its last product (the down projection); so do logits.
    down = config.hidden_size * config.intermediate_size
    again = checkpointing.layers * (layer - down)
    if not nll:
        again += config.vocab_size * config.hidden_size
    # Causal attention of a layer does this much per token in one forward pass. Backward costs 2.5
    # forward passes, and computing it again 1.
    attention = 2 * longest * config.num_attention_heads * config.head_dim
    runs = 3.5 * layers + checkpointing.layers - checkpointing.attention
    operations = tokens * (6 * total + 2 * again + runs * attention)
    update_s = operations / (world * flops)

    # Generation. Every new token reads the KV caches of all rows of the rank (keys and values, two
    # bytes each), at the mean length of a completion while it grows. It also reads all weights (two
    # bytes each), once for every wave of rows whose caches fit into `room`.
    cache_of_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    caches = rows / world * cache_of_token * (longest - new_tokens / 2)
    waves = max(caches / room, 1)
    bytes_read = new_tokens * (2 * total / tensor_parallel * waves + caches)
    return bytes_read / bandwidth, update_s
