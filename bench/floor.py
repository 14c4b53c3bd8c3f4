"""Where a step's CPU time goes, operator by operator: how much of it is matrix products, and how
much would be left if everything else were free.

    python bench/floor.py [--rounds=5]      # one thread; writes bench/floor.json and .png

The bench needs no peer. It runs three pieces of the toy cascade with the stages' own functions and
settings: an SFT update on 128 conversations, the rollouts of a GRPO step (16 x 8 completions of 80
tokens) and the update of that step. torch.profiler attributes the time of every operator to one of
the groups below. "Python" is the time that no operator accounts for. It includes the cost of the
profiler, so a plain run is timed beside it. The floor is the time of the products and of attention
alone. "of peak" compares the products with one large square product.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

# This import comes before side_by_side takes this folder off the path. From then on `import sft`
# means the stage and not bench/sft.py.
import grpo
import torch
from side_by_side import ROOT, machine, toy_folder

import sft
from lib.common import init_distributed
from model import Qwen3, load_tokenizer

GROUPS = {  # first match wins; names are aten operators
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::linear",
        "aten::matmul",
        "aten::addmv",
    ),
    "attention": ("scaled_dot_product", "flash_attention"),
    "optimizer": ("_fused_adam", "foreach"),
    "copies and indices": (
        "copy_",
        "index",
        "gather",
        "scatter",
        "cat",
        "clone",
        "zero",
        "fill",
        "select",
        "slice",
        "sort",
        "unique",
        "repeat",
        "empty",
        "embedding",
    ),
    "elementwise and norms": ("aten::",),
}
COLOURS = dict(
    zip(
        [*GROUPS, "Python"],
        ("tab:blue", "tab:cyan", "tab:purple", "tab:orange", "tab:green", "0.75"),
    )
)


def pieces():
    """{name: function that runs it once}, each on its own model."""
    import mathrl

    rank, world, device = init_distributed(0)
    torch.set_num_threads(1)
    cfg, rows = grpo.toy_rows("fixed")
    tokenizer = load_tokenizer(cfg.init_from)
    rows = mathrl.encode_prompts(rows, tokenizer, cfg)
    model = Qwen3.from_pretrained(cfg.init_from)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    engine = mathrl.make_engine("torch", model, tokenizer)
    engine.stops = [-1]  # no completion ends early
    hook = (
        (lambda r: vars(r).update(reward=grpo.rarity(r.text), status="ok")),
        (lambda rollouts: None),
    )

    def rollout():
        return mathrl.rollout(engine, rows, range(grpo.PROMPTS), 1, {}, cfg, hook, rank, world)[0]

    sft_cfg = sft.Config(
        init_from=toy_folder("base"),
        data=str(Path(toy_folder("base")).parent / "sft_stage1.jsonl"),
        max_seq_len=512,
        micro_batch_tokens=8192,
        limit=1000,
    )
    samples = sft.load_samples(sft_cfg.data, tokenizer, sft_cfg)[:128]
    trained = rollout()
    return {
        "SFT update, 128 conversations": lambda: sft.train_step(
            model, optimizer, samples, sft_cfg, device, world
        ),
        "GRPO rollouts, 128 x 80 tokens": rollout,
        "GRPO update, 128 completions": lambda: mathrl.train_step(
            model, optimizer, trained, cfg, device, world
        ),
    }


def by_group(run):
    """({group: seconds}, floating point operations of the products) of one profiled run."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True
    ) as profile:
        clock = time.process_time()
        run()
        whole = time.process_time() - clock
    seconds, flops = dict.fromkeys(GROUPS, 0.0), 0
    for event in profile.key_averages():
        group = next(
            (name for name, parts in GROUPS.items() if any(part in event.key for part in parts)),
            None,
        )
        if group:
            seconds[group] += event.self_cpu_time_total / 1e6
        flops += event.flops if group == "matrix products" else 0
    return seconds | {"Python": max(whole - sum(seconds.values()), 0.0)}, flops


def peak(n=1024, rounds=10):
    """FLOP/s of a large square product on one thread."""
    a, b, best = torch.randn(n, n), torch.randn(n, n), 1e9
    for _ in range(rounds):
        clock = time.process_time()
        a @ b
        best = min(best, time.process_time() - clock)
    return 2 * n**3 / best


def measure(run, rounds):
    """Medians over the rounds, after a warm-up."""
    run()
    plain, profiled = [], []
    for _ in range(rounds):
        clock = time.process_time()
        run()
        plain.append(time.process_time() - clock)
        profiled.append(by_group(run))
    seconds = {group: statistics.median(s[group] for s, _ in profiled) for group in profiled[0][0]}
    return {
        "plain_s": statistics.median(plain),
        "seconds": seconds,
        "product_flops": profiled[0][1],
    }


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 0.6 * len(rows) + 1.8))
    left = [0.0] * len(rows)
    for group, colour in COLOURS.items():
        shares = [row["seconds"][group] / sum(row["seconds"].values()) for row in rows.values()]
        axis.barh(list(rows), shares, 0.6, left=left, color=colour, label=group)
        for place, (start, share) in enumerate(zip(left, shares)):
            if share > 0.04:
                axis.text(
                    start + share / 2,
                    place,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white",
                )
        left = [a + b for a, b in zip(left, shares)]
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of CPU time")
    axis.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.4, -0.28), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    runs, rows, top = pieces(), {}, peak()
    for name, run in runs.items():
        rows[name] = row = measure(run, args.rounds)
        spent = row["seconds"]
        whole, products = sum(spent.values()), spent["matrix products"]
        row["floor_share"] = (products + spent["attention"]) / whole
        row["of_peak"] = row["product_flops"] / products / top
        print(
            f"{name:32s}{row['plain_s']:7.2f} s | floor {row['floor_share']:4.0%} | "
            f"products at {row['of_peak']:4.0%} of {top / 1e9:.0f} GFLOP/s | "
            + ", ".join(f"{group} {s / whole:.0%}" for group, s in spent.items())
        )
    head = {
        "command": ["bench/floor.py", f"--rounds={args.rounds}"],
        "machine": machine(),
        "torch": torch.__version__,
        "peak_flops": top,
    }
    out = ROOT / "bench" / "floor"
    out.with_suffix(".json").write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
