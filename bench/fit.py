"""Will it fit on one card? The plan of lib/plan.py for every size of Qwen3, card and method.

    python bench/fit.py                    RL with 2K of prompt and 8K of answer
    python bench/fit.py --new_tokens=24576 the first length of Math RL

A cell has the most tokens of a packed micro-batch that fit, for `adamw` (weights, gradients and
moments in fp32), --optimizer=adamw_bf16 (all in bf16) and --lora_rank=32 (a frozen base in bf16);
"-" is where not even one sequence of full length fits. RL counts vLLM's weights beside the
trainer's, and keys and values of one full sequence; SFT has no sampler.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.estimate import memory_plan
from lib.flags import PositiveInt, parse_config
from model import QWEN3_SIZES, Qwen3Config

CARDS = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}
METHODS = ("adamw", "adamw_bf16", "lora")
MOST = 2**18  # tokens of a micro-batch; no run needs more
# Of a card's memory, what CUDA, the allocator's gaps and NCCL leave.
USABLE = 0.93


@dataclass
class Config:
    prompt_tokens: PositiveInt = 2048
    new_tokens: PositiveInt = 8192
    lora_rank: PositiveInt = 32


def largest_micro_batch(config, room, longest, method, rank, nll):
    """The most tokens, to 1,024, whose plan fits into `room` bytes; 0 if no sequence does."""

    def fits(tokens):
        plan = memory_plan(
            config, 1, tokens, longest, nll=nll, method=method, lora_rank=rank, engine="vllm"
        )
        return max(sum(parts.values()) for parts in plan.values()) <= room

    if not fits(longest):
        return 0
    # Bisect between a sequence, which fits, and MOST.
    low, high = longest, MOST
    while high - low > 1024:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return high if fits(MOST) else low


def table(cfg, nll):
    """Markdown lines: a row a size, a column a card; in each cell the three methods."""
    longest = cfg.prompt_tokens + cfg.new_tokens
    lines = ["| Qwen3 | " + " | ".join(CARDS) + " |", "|---" * (len(CARDS) + 1) + "|"]
    for name, shape in QWEN3_SIZES.items():
        config = Qwen3Config(**shape)
        cells = []
        for room in CARDS.values():
            sizes = []
            for method in METHODS:
                tokens = largest_micro_batch(
                    config, USABLE * room, longest, method, cfg.lora_rank, nll
                )
                sizes.append(f"{tokens // 1024}K" if tokens else "-")
            cells.append(" / ".join(sizes))
        lines.append(f"| {name.upper()} | " + " | ".join(cells) + " |")
    return lines


def main(cfg):
    longest = cfg.prompt_tokens + cfg.new_tokens
    print(f"One card, sequences of {longest} tokens: adamw / adamw_bf16 / lora")
    for title, nll in (("RL", False), ("SFT", True)):
        print(f"\n{title}\n")
        print("\n".join(table(cfg, nll)))


if __name__ == "__main__":
    main(parse_config(Config))
