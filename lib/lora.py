"""LoRA (arXiv 2106.09685): weights stay as they are, and two thin matrices beside each are trained.

    y = x W^T + scale * (x A^T) B^T       W [out, in] frozen, A [rank, in], B [out, rank]
                                          scale = alpha / rank

B starts at 0, so that training starts from the base model. --lora_rank=32 puts such a pair beside
every linear layer of attention and MLP. Gradients and optimizer hold these alone: with the weights
they take 18 GB at 8B instead of 131.

Whoever asks for the weights of a LoRA model gets merged ones, W + scale * B A, made in fp32 and
rounded once: the samplers (engine.whole_parameters) and the folder of a checkpoint. In a folder
`adapter` beside the merged weights lies the adapter itself, as peft and vLLM open it.

The base is kept in the precision of the computation, bf16 on GPUs, and sharded by FSDP2 like any
weights. The adapters stay fp32 and whole on every rank, since they are small;
lib.common.average_gradients averages their gradients.
"""

import contextlib
import json
import os
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Module):
    """A frozen linear layer without bias, and its adapter. x [..., in] -> [..., out]."""

    def __init__(self, linear, rank, alpha, generator):
        super().__init__()
        out_features, in_features = linear.weight.shape
        device = linear.weight.device
        self.weight = linear.weight  # under the name that it has without LoRA
        self.scale = alpha / rank
        self.enabled = True
        # PEFT's initial values: A uniform in +-1 / sqrt(in), B zero.
        bound = in_features**-0.5
        A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def forward(self, x):
        y = F.linear(x, self.weight)
        if not self.enabled:
            return y
        thin = F.linear(x, self.lora_A.to(x.dtype))
        return y + self.scale * F.linear(thin, self.lora_B.to(x.dtype))

    def merged_weight(self, weight):
        """W + scale * B A, for the whole weight W [out, in]; in its precision, rounded once."""
        update = self.lora_B.float() @ self.lora_A.float()
        return (weight.float() + self.scale * update).to(weight.dtype)


# ---- Into the model and out of it ----------------------------------------------------------------
def add_lora(model, rank, alpha, seed):
    """Freeze a Qwen3 and put an adapter beside every linear layer of attention and MLP, in place.

    The same seed gives the same adapters on every rank. alpha 0 is twice the rank.
    """
    alpha = alpha or 2.0 * rank
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP)):
            for name in names:
                adapted = LoraLinear(getattr(part, name), rank, alpha, generator)
                setattr(part, name, adapted)
    add_lora.model = model  # for base_policy
    model.lora_config = {"r": rank, "lora_alpha": alpha}
    # Tells this base from another. Later its weights may be sharded.
    model.lora_base_crc = base_crc(model)


def lora_layers(model):
    """[(name, LoraLinear)] of a model; none without LoRA."""
    return [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLinear)]


def lora_parameters(model):
    """The parameters of all adapters, a set."""
    parameters = set()
    for _, part in lora_layers(model):
        parameters |= {part.lora_A, part.lora_B}
    return parameters


@torch.no_grad()
def plain_parameters(module, prefix=""):
    """(name, tensor) of every parameter under the names of a model without LoRA.

    A weight with an adapter comes merged. Where it is sharded still, it comes as it is.
    """
    for path, part in module.named_modules(prefix=prefix):
        if isinstance(part, LoraLinear):
            is_whole = not hasattr(part.weight, "full_tensor")
            weight = part.merged_weight(part.weight) if is_whole else part.weight
            yield f"{path}.weight", weight
            continue
        for name, parameter in part.named_parameters(path, recurse=False):
            yield name, parameter.detach()


@contextlib.contextmanager
def base_policy():
    """Gives the newest model with adapters; inside it computes without them.

    So RLHF's reference policy needs no second copy of the weights.
    """
    layers = [part for _, part in lora_layers(add_lora.model)]
    for part in layers:
        part.enabled = False
    try:
        yield add_lora.model
    finally:
        for part in layers:
            part.enabled = True


@torch.no_grad()
def changed_share(model):
    """Share of the adapted weights that differ from the base once they are merged and rounded.

    bf16 keeps 8 significant bits: an update below 1/512 of a weight vanishes. All ranks call this.
    """
    changed = total = 0
    for _, part in lora_layers(model):
        sharded = hasattr(part.weight, "full_tensor")
        weight = part.weight.full_tensor() if sharded else part.weight
        changed += (part.merged_weight(weight) != weight).sum().item()
        total += weight.numel()
    return changed / max(total, 1)


# ---- On the disk, as PEFT has it -----------------------------------------------------------------
def base_crc(model):
    """CRC of the first row of every adapted weight: tells the base of an adapter from another."""
    crc = 0
    for _, part in lora_layers(model):
        crc = zlib.crc32(part.weight[0].float().cpu().numpy().tobytes(), crc)
    return crc


def adapter_state(model):
    """{PEFT's name: tensor} of all adapters."""
    state = {}
    for name, part in lora_layers(model):
        state[f"base_model.model.{name}.lora_A.weight"] = part.lora_A
        state[f"base_model.model.{name}.lora_B.weight"] = part.lora_B
    return state


def save_adapter(model, folder, base):
    """Write folder/adapter, which peft opens. base: folder of the base model.

    It is a folder of its own, since transformers takes adapter_config.json beside a model for the
    sign that the model is not there.
    """
    folder = os.path.join(folder, "adapter")
    os.makedirs(folder)
    state = {}
    for name, tensor in adapter_state(model).items():
        state[name] = tensor.detach().cpu().contiguous()
    metadata = {"format": "pt", "base_crc": str(model.lora_base_crc)}
    save_file(state, os.path.join(folder, "adapter_model.safetensors"), metadata)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **model.lora_config,
        "lora_dropout": 0.0,
        "target_modules": [*ATTENTION, *MLP],
        "bias": "none",
        "inference_mode": True,
    }
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)


@torch.no_grad()
def load_adapter(model, folder):
    """Fill the adapters from a checkpoint's folder. ValueError if they belong to another base."""
    path = os.path.join(folder, "adapter", "adapter_model.safetensors")
    with safe_open(path, framework="pt") as saved:
        base = (saved.metadata() or {}).get("base_crc")
        if base != str(model.lora_base_crc):
            raise ValueError(f"these are not the weights beside which {path} was trained")
        for name, parameter in adapter_state(model).items():
            parameter.copy_(saved.get_tensor(name))
