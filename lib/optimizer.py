"""What steps the weights: AdamW in fp32, or in bf16 with stochastic rounding (kernels/adamw.py)."""

import torch

from kernels.adamw import AdamW as AdamWBf16
from lib.guard import fail

OPTIMIZERS = ("adamw", "adamw_bf16")


def make_optimizer(model, cfg):
    """The optimizer of a stage's flags, over the parameters that train: with LoRA, the adapters."""
    if cfg.optimizer not in OPTIMIZERS:
        fail(f"--optimizer={cfg.optimizer}: expected {' or '.join(OPTIMIZERS)}.")
    if cfg.lora_rank and cfg.optimizer != "adamw":
        fail("--lora_rank: adapters are small and stay fp32, so they train with --optimizer=adamw.")
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {
        "lr": cfg.lr,
        "betas": (cfg.beta1, cfg.beta2),
        "weight_decay": cfg.weight_decay,
    }
    if cfg.optimizer == "adamw_bf16":
        return AdamWBf16(parameters, seed=cfg.seed, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def weight_dtype(cfg, device):
    """Precision in which the weights of a run are kept.

    fp32, unless they are frozen (LoRA: the precision of the computation) or stepped in bf16.
    """
    if cfg.lora_rank:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if cfg.optimizer == "adamw_bf16" else torch.float32
