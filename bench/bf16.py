"""Which weights move in a step of AdamW in bf16, and how much of the update arrives.

    python bench/bf16.py                              weights as a Qwen3 has them at first
    python bench/bf16.py --model=out/toy/sft2/final   those of a checkpoint

bf16 keeps 8 significant bits: rounded to the nearest number, an update below 1/512 of a weight is
always lost, one above 1/256 never. --optimizer=adamw_bf16 rounds stochastically
(kernels/adamw.py): few weights move in a step, each by a whole bf16 step, and on average by what
AdamW meant. Both are measured here for one step, after some steps with random gradients have filled
the moments.

"arrives" is the part of the exact update that the weights made: sum(made * exact) / sum(exact^2).
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernels.adamw import adamw_ref, round_torch
from lib.flags import PositiveInt, parse_config
from lib.guard import fail

# Learning rates of the paper's RL and SFT (T14 to T20), and of the toy's.
RATES = (2e-6, 5e-5, 4e-4, 8e-3)
WEIGHTS = 1 << 20  # how many are looked at


@dataclass
class Config:
    model: str = ""  # folder of a checkpoint; "": random weights of standard deviation 0.02
    warmup: PositiveInt = 20  # steps that fill the moments
    seed: int = 0
    out: str = ""  # JSON file for the results


def some_weights(folder, generator):
    """WEIGHTS weights of a model in bf16, [WEIGHTS]: matrices only, drawn at random."""
    if not folder:
        return (0.02 * torch.randn(WEIGHTS, generator=generator)).bfloat16()
    path = os.path.join(folder, "model.safetensors")
    if not os.path.exists(path):
        fail(f"--model={folder}: no model.safetensors there.", note="Nothing was measured.")
    matrices = [tensor.flatten() for tensor in load_file(path).values() if tensor.dim() == 2]
    weights = torch.cat(matrices)
    drawn = torch.randint(0, len(weights), (WEIGHTS,), generator=generator)
    return weights[drawn].bfloat16()


def measure(p, lr, warmup, generator):
    """{"nearest" and "stochastic": (share of the weights that move, share that arrives)} at lr."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    options = dict(lr=lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, first=0, grad_scale=1)
    for step in range(1, warmup + 2):
        gradient = torch.randn(p.numel(), generator=generator)
        new, bits = adamw_ref(p, gradient, m, v, step=step, seed=step, **options)
        # The moments are kept in bf16, too.
        new_p, m, v = new[0], round_torch(new[1], bits[1]), round_torch(new[2], bits[2])
    exact = new_p - p.float()
    found = {}
    for name, rounded in (
        ("nearest", new_p.bfloat16()),
        ("stochastic", round_torch(new_p, bits[0])),
    ):
        made = rounded.float() - p.float()
        moved = (made != 0).float().mean().item()
        arrives = ((made * exact).sum() / exact.square().sum()).item()
        found[name] = (moved, arrives)
    return found


def main(cfg):
    generator = torch.Generator().manual_seed(cfg.seed)
    p = some_weights(cfg.model, generator)
    print(f"{cfg.model or 'random weights'}: {p.float().std():.3f} is their standard deviation\n")
    print("| learning rate | to nearest: weights that move | arrives | stochastic | arrives |")
    print("|---|---|---|---|---|")
    results = {"model": cfg.model, "std": p.float().std().item(), "rates": {}}
    for lr in RATES:
        found = measure(p, lr, cfg.warmup, generator)
        cells = [f"{value:.2%}" for pair in found.values() for value in pair]
        print(f"| {lr:g} | " + " | ".join(cells) + " |")
        results["rates"][lr] = found
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(parse_config(Config))
