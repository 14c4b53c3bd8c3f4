"""How the time and memory of one GRPO step grow with response length, group size, model size and
ranks, on CPU.

    python bench/growth.py              # four minutes on an idle machine
    python bench/growth.py --quick      # one step a point and no length over 512: a minute
    python bench/growth.py --sweeps=ranks,padding      # measures these alone and keeps the others
    python bench/growth.py --sweeps=    # measures nothing, fits and plots once more

It writes bench/growth.json and .png. The model has the toy's shape and prompts, untrained, fp32,
one thread a rank. Stop tokens are banned, so lengths are exact. The reward is how rare the letter e
is, so every group has a signal and every token is trained on. Every point is a process of its own,
forked from one that has imported everything: the memory of a point is its peak over what it had
after the fork. Times are CPU seconds, summed over ranks, because they mean the same on a busy
machine. Each curve is fitted by a + b x + c x^2 (least squares of relative errors, no negative
coefficient), and shares are those at the largest x. Memory is fitted while the step is a single
micro-batch. From then on, more tokens make more micro-batches, not larger ones.

`padding` is measured on completions of very unequal lengths (one token in 48 ends them). It
compares the rows that went through the layers with the rows that some prompt, draw or loss needs.
It does the same for the slots that attention looks at.
"""

import argparse
import itertools
import json
import os
import pickle
import socket
import statistics
import sys
import time
import traceback

import numpy as np
import torch
from grpo import rarity
from side_by_side import OUT, ROOT, machine, toy_folder, versions

import engine
import mathrl
from kernels import attention
from lib.checkpoint import git_hash
from lib.common import init_distributed, shard
from model import Qwen3, load_tokenizer, read_config

BASE = {"prompts": 2, "group": 4, "length": 128, "width": 96, "ranks": 1}
SWEEPS = {
    "length": (
        "response length (tokens), 2 prompts x 4",
        [{"length": n} for n in (64, 128, 256, 512, 1024, 2048, 4096)],
    ),
    "group": (
        "completions a prompt, 2 prompts x 128 tokens",
        [{"group": n} for n in (2, 4, 8, 16, 32, 64)],
    ),
    "width": (
        "model width (0.17M to 31M parameters), 2 x 4 x 128 tokens",
        [{"width": n} for n in (48, 96, 192, 384, 768)],
    ),
    "ranks": (
        "ranks, 8 prompts x 8 x 128 tokens",
        [{"prompts": 8, "group": 8, "ranks": n} for n in (1, 2)],
    ),
}
MICRO = 8192  # tokens of a packed micro-batch


# ---- One point -----------------------------------------------------------------------------------
def build(point, stops):
    """Return a stage's own parts, for a model of this width.

    These are (cfg, rows, model, optimizer, engine, rank, world, device).
    """
    rank, world, device = init_distributed(0)
    folder, width = OUT / "data" / "base", point["width"]
    cfg = mathrl.Config(
        init_from=str(folder),
        prompts_per_step=point["prompts"],
        group_size=point["group"],
        max_new_tokens=point["length"],
        lr=1e-4,
        max_prompt_tokens=256,
        top_p=1.0,
        micro_batch_tokens=MICRO,
        overlong_filter=False,
        importance_limit=0.0,
    )
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    config.max_position_embeddings, config.intermediate_size = (
        8192,
        config.intermediate_size * width // config.hidden_size,
    )
    config.num_attention_heads, config.num_key_value_heads = (
        max(width // 24, 2),
        max(width // 48, 1),
    )
    config.hidden_size = width
    model = shard(Qwen3.from_config(config, seed=0), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, fused=True)
    with open(OUT / "data" / "math_rl.jsonl") as f:
        rows = [mathrl.normalize(json.loads(line), "") for _, line in zip(range(64), f)]
    sampler = engine.TorchEngine(model, tokenizer)
    sampler.stops = stops(config.vocab_size)
    return (
        cfg,
        mathrl.encode_prompts(rows, tokenizer, cfg),
        model,
        optimizer,
        sampler,
        rank,
        world,
        device,
    )


HOOK = (lambda r: vars(r).update(reward=rarity(r.text), status="ok")), (lambda rollouts: None)


def peak_mb():
    """Peak of this process since the last call."""
    with open("/proc/self/status") as f:
        peak = next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return peak


def measure(point, repeats):
    """Medians over `repeats` steps of this rank, the first left out if there are more."""
    peak_mb()
    before = peak_mb()
    cfg, rows, model, optimizer, sampler, rank, world, device = build(point, lambda vocab: [-1])
    turns, gaps = [], []
    for step in range(1, 1 + repeats):
        marks = [(time.process_time(), time.perf_counter())]
        indices = [
            (step * cfg.prompts_per_step + i) % len(rows) for i in range(cfg.prompts_per_step)
        ]
        trained, _ = mathrl.rollout(sampler, rows, indices, step, {}, cfg, HOOK, rank, world)
        marks.append((time.process_time(), time.perf_counter()))
        metrics = mathrl.train_step(model, optimizer, trained, cfg, device, world)
        sampler.sync(model)
        marks.append((time.process_time(), time.perf_counter()))
        (gen_cpu, gen_wall), (update_cpu, update_wall) = (
            [b - a for a, b in zip(*pair)] for pair in itertools.pairwise(marks)
        )
        assert metrics["num_tokens"] == cfg.prompts_per_step * cfg.group_size * cfg.max_new_tokens
        turns.append((gen_cpu, update_cpu, gen_wall, update_wall))
        gaps.append(metrics["gap"])
    medians = [statistics.median(column) for column in zip(*(turns[1:] or turns))]
    return dict(zip(("rollout", "update", "rollout_wall", "update_wall"), medians)) | {
        "memory_mb": peak_mb() - before,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gap": max(gaps),
    }


def measure_padding(point, repeats):
    """Count the rows and the attention slots of rollout and update.

    The completions of these steps are ragged. Each count is [computed, needed].
    """
    cfg, rows, model, optimizer, sampler, rank, world, device = build(
        point, lambda vocab: list(range(0, vocab, 48))
    )
    counts, where = (
        {k: [0, 0] for k in ("rollout rows", "rollout slots", "update rows", "update slots")},
        {"now": "rollout"},
    )
    hidden_states, decode, sdpa = (
        Qwen3.hidden_states,
        engine.TorchEngine._decode,
        attention.attention_sdpa,
    )

    def counting_hidden_states(self, input_ids_T, *args, **kwargs):
        counts[f"{where['now']} rows"][0] += len(input_ids_T)
        return hidden_states(self, input_ids_T, *args, **kwargs)

    def counting_decode(self, token_B, position_B, slot_1, cache, bias_B1S):
        counts["rollout slots"][0] += len(token_B) * cache[0][0].shape[2]
        counts["rollout slots"][1] += int((position_B + 1).sum())
        return decode(self, token_B, position_B, slot_1, cache, bias_B1S)

    def counting_sdpa(q, k, v):
        if where["now"] == "update":
            counts["update slots"][0] += q.shape[0] * q.shape[1] ** 2 // 2
        return sdpa(q, k, v)

    Qwen3.hidden_states, engine.TorchEngine._decode, attention.attention_sdpa = (
        counting_hidden_states,
        counting_decode,
        counting_sdpa,
    )
    lengths = []
    for step in range(1, 1 + repeats):
        indices, where["now"] = (
            range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step),
            "rollout",
        )
        trained, sampled = mathrl.rollout(
            sampler, rows, [i % len(rows) for i in indices], step, {}, cfg, HOOK, rank, world
        )
        distinct = {tuple(r.prompt_ids) for r in sampled}
        # The sampler reads every token but the last of a completion.
        counts["rollout rows"][1] += sum(map(len, distinct)) + sum(
            len(r.completion_ids) - 1 for r in sampled
        )
        where["now"] = "update"
        mathrl.train_step(model, optimizer, trained, cfg, device, world)
        whole = [tuple(r.prompt_ids + r.completion_ids) for r in trained if r.advantage]
        # Tokens with equal pasts need one row together.
        counts["update rows"][1] += len({ids[:n] for ids in whole for n in range(1, len(ids) + 1)})
        counts["update slots"][1] += model.config.num_hidden_layers * sum(
            len(ids) ** 2 // 2 for ids in whole
        )
        lengths += [len(r.completion_ids) for r in sampled]
    return {"counts": counts, "lengths": [min(lengths), statistics.median(lengths), max(lengths)]}


def in_children(function, point, repeats):
    """function(point, repeats) in a forked process for each rank; the list of what they return."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port, pipes = s.getsockname()[1], []
    for rank in range(point["ranks"]):
        reader, writer = os.pipe()
        if os.fork() == 0:
            if point["ranks"] > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(point["ranks"]),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            try:
                os.write(writer, pickle.dumps(function(point, repeats)))
            except BaseException:  # noqa: BLE001 (a child never returns into the parent's code)
                traceback.print_exc()
            os._exit(0)
        os.close(writer)
        pipes.append(os.fdopen(reader, "rb"))
    answers = [pipe.read() for pipe in pipes]
    for _ in pipes:
        os.wait()
    return (
        [pickle.loads(answer) for answer in answers]
        if all(answers)
        else sys.exit("growth.py: a point failed")
    )


def sweep(name, quick):
    title, points = SWEEPS[name]
    row = {"title": title, "x": []}
    for point in (BASE | changes for changes in points):
        size = point["length"] * point["group"] * point["prompts"] * point["width"] / point["ranks"]
        if quick and size > 500_000:
            continue
        ranks = in_children(measure, point, 1 if quick or size > 800_000 else 3)
        combined = {
            key: (max if key.endswith(("wall", "mb", "gap", "parameters")) else sum)(
                r[key] for r in ranks
            )
            for key in ranks[0]
        }
        row["x"].append(point[name])
        for key, value in combined.items():
            row.setdefault(key, []).append(value)
        print(
            f"{name:>8s} {point[name]:5}: rollout {combined['rollout']:7.2f} "
            f"update {combined['update']:7.2f} CPU s "
            f"(wall {combined['rollout_wall']:.2f} {combined['update_wall']:.2f}), "
            f"{combined['memory_mb']:6.0f} MB a rank, gap {combined['gap']:.0e}",
            flush=True,
        )
    return row


def padding(world):
    ranks = in_children(
        measure_padding, BASE | {"prompts": 8, "group": 8, "length": 512, "ranks": world}, 4
    )
    totals = {
        key: [sum(r["counts"][key][i] for r in ranks) for i in (0, 1)] for key in ranks[0]["counts"]
    }
    print(
        f"padding, {world} ranks: "
        + ", ".join(
            f"{key} {1 - needed / computed:.2%}" for key, (computed, needed) in totals.items()
        ),
        flush=True,
    )
    shares = {
        key: {"computed": computed, "needed": needed, "share": 1 - needed / computed}
        for key, (computed, needed) in totals.items()
    }
    return shares | {"completion lengths, min median max": ranks[0]["lengths"]}


# ---- Fit and report ------------------------------------------------------------------------------
def fit(x, y):
    """Fit a + b x + c x^2 by least squares of relative errors, with no negative coefficient.

    Returns (a, b, c) and the largest relative error.
    """
    x, y = np.array(x, float), np.array(y, float)
    terms, best = np.stack([np.ones_like(x), x, x * x], 1) / y[:, None], None
    for used in range(1, 8):  # every subset of the terms: exact, and there are seven
        columns = [i for i in range(3) if used >> i & 1]
        found, *_ = np.linalg.lstsq(terms[:, columns], np.ones_like(y), rcond=None)
        error = np.square(terms[:, columns] @ found - 1).sum()
        if (found >= 0).all() and (best is None or error < best[0] * 0.99):
            best = error, columns, found
    whole = np.zeros(3)
    whole[best[1]] = best[2]
    return whole, float(np.abs(terms @ whole - 1).max())


def describe(name, sweep):
    """Fits of a sweep's curves, printed."""
    line, fits = f"{name:>11s}", {}
    for key in ("rollout", "update", "memory_mb"):
        points = list(zip(sweep["x"], sweep[key], SWEEPS[name][1]))
        if key == "memory_mb":
            points = [p for p in points if micro_batch_tokens(BASE | p[2]) <= MICRO]
        x, y, _ = zip(*points)
        (a, b, c), worst = fit(x, y)
        share = np.array([a, b * x[-1], c * x[-1] ** 2]) / (a + b * x[-1] + c * x[-1] ** 2)
        fits[key] = {
            "a": a,
            "b": b,
            "c": c,
            "up_to": x[-1],
            "share_at_largest": list(share),
            "worst_relative_error": worst,
        }
        line += (
            f"\n{key:>22s} = {a:.3g} + {b:.3g} x + {c:.3g} x^2 up to {x[-1]}: "
            f"there {share[0]:.0%} {share[1]:.0%} {share[2]:.0%}, off by at most {worst:.0%}"
        )
    print(line, flush=True)
    return fits


def micro_batch_tokens(point):
    # A prompt has about 60 tokens.
    return point["prompts"] * point["group"] * (point["length"] + 60) / point["ranks"]


def use_log_scales(axis, curves):
    """Make both axes logarithmic, with room around the curves and minor labels at 2, 3 and 5."""
    from matplotlib.ticker import FuncFormatter

    def minor_label(value, _):
        text = f"{value:g}"
        return text if text[0] in "235" else ""

    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(min(curve[0] for curve in curves) / 1.5, max(map(max, curves)) * 2)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(minor_label))


def plot(sweeps, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(2, len(sweeps), figsize=(4.1 * len(sweeps), 6.6), sharex="col")
    for (time_axis, memory_axis), (name, sweep) in zip(axes.T, sweeps.items(), strict=True):
        x, bars = np.array(sweep["x"], float), name == "ranks"
        for axis, keys in (
            (time_axis, {"rollout": "tab:orange", "update": "tab:blue"}),
            (memory_axis, {"memory_mb": "tab:green"}),
        ):
            for place, (key, colour) in enumerate(keys.items()):
                if bars:
                    axis.bar(
                        x + 0.3 * (place - 0.5 * (len(keys) - 1)),
                        sweep[key],
                        0.28,
                        color=colour,
                        label=key,
                    )
                    continue
                coefficients = [sweep["fit"][key][k] for k in "abc"]
                smooth = np.geomspace(x[0], sweep["fit"][key]["up_to"], 100)
                axis.plot(smooth, np.polyval(coefficients[::-1], smooth), color=colour, linewidth=1)
                axis.plot(
                    x,
                    sweep[key],
                    "o",
                    color=colour,
                    markersize=5,
                    label=key.replace("memory_mb", "memory"),
                )
                axis.plot(
                    x,
                    sweep[key][0] * x / x[0],
                    ":",
                    color=colour,
                    linewidth=1,
                    label="proportional" if key != "rollout" else None,
                )
                if smooth[-1] < x[-1]:
                    axis.axvline(
                        np.sqrt(smooth[-1] * x[list(x).index(round(smooth[-1])) + 1]),
                        color="0.6",
                        linewidth=1,
                    )
                    axis.text(
                        0.98,
                        0.03,
                        "several micro-batches",
                        transform=axis.transAxes,
                        fontsize=7,
                        color="0.4",
                        ha="right",
                    )
            if not bars:
                use_log_scales(axis, [sweep[k] for k in keys])
            axis.set_xticks(x, [f"{n:.0f}" for n in x], fontsize=8)
            axis.minorticks_off() if bars else axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
        time_axis.set_ylabel("CPU seconds a step, all ranks" if name == "length" else "")
        memory_axis.set_ylabel("peak MB a rank" if name == "length" else "")
        time_axis.set_title(sweep["title"], fontsize=9)
        memory_axis.set_xlabel(name)
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8)
    figure.suptitle(
        "Growth of one GRPO step (toy shape, fp32): dots measured, lines a + b x + c x^2, "
        "dotted: proportional from the first point",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="one step a point, no length over 512")
    parser.add_argument(
        "--sweeps", default=",".join([*SWEEPS, "padding"]), help="what to measure; the rest is kept"
    )
    parser.add_argument("--out", default=str(ROOT / "bench" / "growth"), help="path without suffix")
    args = parser.parse_args()
    toy_folder("base")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    began, found = time.time(), {"sweeps": {}}
    if os.path.exists(args.out + ".json"):
        with open(args.out + ".json") as f:
            found = json.load(f)
    for name in args.sweeps.split(",") if args.sweeps else ():
        if name == "padding":
            found["padding"] = {f"{n} ranks": padding(n) for n in (1, 2)}
        else:
            found["sweeps"][name] = sweep(name, args.quick)
    if args.sweeps:
        found.setdefault("runs", []).append(
            {
                "command": ["bench/growth.py", *sys.argv[1:]],
                "git": git_hash(),
                "machine": machine(),
                "threads_each": 1,
                **versions("torch"),
                "settings": BASE | {"micro_batch_tokens": MICRO, "dtype": "float32"},
                "seconds": time.time() - began,
            }
        )
    for name, one in found["sweeps"].items():
        if name != "ranks":
            one["fit"] = describe(name, one)
    with open(args.out + ".json", "w") as f:
        f.write(json.dumps(found, indent=1) + "\n")
    plot(found["sweeps"], args.out + ".png")


if __name__ == "__main__":
    main()
