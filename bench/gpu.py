"""Real sizes on one GPU: forward and backward, decoding, and whole steps of SFT and GRPO.

    python bench/gpu.py [--steps=4b] [--samplers=0.6b,4b] [--passes=0.6b,8b] [--rounds=3]

It takes two minutes and writes bench/gpu.json and .png. Weights and tokens are random, the compute
is in bf16.
  steps    sft.train_step and mathrl.train_step as a run has them: FSDP2 (of one rank), fp32 master
           weights and AdamW, activation checkpointing. SFT also with the output of attention kept,
           and with a third of the layers kept whole. GRPO trains on 4 prompts x 8 completions of
           64 to 2,048 tokens, with every prompt computed once and with nothing shared.
  sampler  a decoding step of 64 rows after prompts of 512 tokens: ours and transformers' generate,
           at top_p 1 as in training, and ours at 0.95, too, as in evaluation. The floor is the time
           to read weights and cache once.
  pass     forward, cross-entropy and backward without activation checkpointing, on the same weights
           and tokens: ours, transformers (SDPA) and, where it is installed (pip install
           liger-kernel), transformers with Liger's kernels. The sequences have equal lengths, then
           mixed lengths, which transformers has to pad. Contestants take turns, and their losses
           have to agree.
MFU counts 6 FLOPs a weight and token plus causal attention, without recomputation. It is given over
the matmul rate of this GPU measured in the same run, and over the datasheet's. A prompt counts for
each of its completions, shared or not.
"""

import argparse
import functools
import gc
import importlib.util
import json
import math
import statistics
import time

import torch
from side_by_side import ROOT, versions

import mathrl
import sft
from engine import Rollout, TorchEngine, request_seed
from lib import packing
from lib.checkpoint import git_hash
from lib.common import finish, init_distributed, shard
from model import QWEN3_SIZES, Checkpointing, Qwen3, Qwen3Config, hf_config, packed_batch

LENGTHS = {"equal": [4096] * 2, "mixed": [1024, 1536, 2048, 3584]}  # tokens of a pass: 8,192
# FLOP/s of dense bf16 products on NVIDIA's datasheets, by a part of the device's name.
DATASHEET = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}


# ---- Measuring -----------------------------------------------------------------------------------
def seconds(run):
    """(seconds, peak GiB beyond what was there, what it returned)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, clock = torch.cuda.memory_allocated(), time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - clock, (torch.cuda.max_memory_allocated() - before) / 2**30, result


def ceilings():
    """(FLOP/s of a bf16 product, bytes/s of a copy, both counted as read and written)."""
    a, source = (
        torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16),
        torch.empty(2**30, device="cuda", dtype=torch.int8),
    )
    product, copy = (
        min(seconds(run)[0] for _ in range(10)) for run in (lambda: a @ a, lambda: source.clone())
    )
    return 2 * 8192**3 / product, 2 * 2**30 / copy


def useful_flops(config, total, sequences):
    """Return the FLOPs of forward and backward over sequences of these lengths.

    A token costs 6 for each weight that multiplies. In each layer it costs 12 N H for each of the
    n / 2 tokens that it attends to on average.
    """
    # Untied embeddings are looked up and multiply nothing.
    weights = total - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return sum(6 * weights * n + attention * n * n for n in sequences)


def utilisation(flop_per_s, matmul_rate):
    """MFU over the matmul rate measured here, and over the datasheet's: None if that is unknown."""
    name = torch.cuda.get_device_name()
    peaks = [peak for part, peak in DATASHEET.items() if part in name]
    of_datasheet = flop_per_s / peaks[0] if peaks else None
    return {"mfu": flop_per_s / matmul_rate, "mfu_datasheet": of_datasheet}


def shown(row):
    """The two MFUs of a row as text: of the measured rate, then of the datasheet's."""
    datasheet = row["mfu_datasheet"]
    of_datasheet = "?" if datasheet is None else f"{datasheet:.0%}"
    return f"MFU {row['mfu']:.0%} (datasheet {of_datasheet})"


def build(size, dtype):
    """Qwen3 of that size on the GPU, random; gradients then have a size that bf16 can hold."""
    with torch.device("meta"):
        model = Qwen3(Qwen3Config(**QWEN3_SIZES[size])).to(dtype)
    model = model.to_empty(device="cuda")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.dim() == 2 else torch.nn.init.ones_(p)
    return model


def forget():
    gc.collect()
    torch.cuda.empty_cache()


# ---- Forward and backward ------------------------------------------------------------------------
# transformers' function for RoPE (False: stock, True: Liger's). It is a global of a module, so
# every turn sets its own.
ROTATE = {}


def theirs(model, liger=False):
    """transformers' model on the same weights."""
    from transformers import Qwen3Config as TheirConfig
    from transformers.models.qwen3 import modeling_qwen3

    raw = {
        k: v
        for k, v in hf_config(model.config).items()
        if k not in ("architectures", "model_type", "dtype")
    }
    with torch.device("meta"):
        twin = modeling_qwen3.Qwen3ForCausalLM(TheirConfig(**raw, attn_implementation="sdpa"))
    twin.load_state_dict({**model.state_dict(), "lm_head.weight": model.head_weight}, assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config).cuda()
    ROTATE.setdefault(False, modeling_qwen3.apply_rotary_pos_emb)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        stock = dict(vars(modeling_qwen3))
        apply_liger_kernel_to_qwen3(model=twin)
        ROTATE[True] = modeling_qwen3.apply_rotary_pos_emb
        vars(modeling_qwen3).update(stock)  # it patches the module as well as this model
    return twin


def contestants(model, sequences):
    """{who: function that returns the loss, gradients made}."""
    from transformers.models.qwen3 import modeling_qwen3

    lengths, width = [len(s) for s in sequences], max(map(len, sequences))
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    ids_T = torch.cat(sequences)
    index = (~torch.isin(torch.arange(len(ids_T), device="cuda"), ends[:-1])).nonzero()[:, 0]
    padded = torch.stack([torch.cat((s, s.new_zeros(width - len(s)))) for s in sequences])
    mask = torch.arange(width, device="cuda") < ends.diff()[:, None]
    batch = {
        "input_ids": padded,
        "labels": padded.masked_fill(~mask, -100),
        "attention_mask": None if len(set(lengths)) == 1 else mask.long(),
    }

    def ours():
        loss = model.nll(packed_batch(ids_T, ends.int(), width, index)) / len(index)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    def turn(twin, liger):
        modeling_qwen3.apply_rotary_pos_emb = ROTATE[liger]
        loss = twin(**batch, use_cache=False).loss
        loss.backward()
        twin.zero_grad(set_to_none=True)
        return loss.item()

    stock_twin = theirs(model).train()
    whos = {"ours": ours, "transformers": functools.partial(turn, stock_twin, False)}
    if importlib.util.find_spec("liger_kernel"):
        liger_twin = theirs(model, liger=True).train()
        whos["transformers + Liger"] = functools.partial(turn, liger_twin, True)
    return whos


def race(size, setting, rounds, flop_rate):
    """Return the rows of one setting.

    A contestant that does not fit into the GPU's memory says so and takes no more turns.
    """
    model = build(size, torch.bfloat16)
    sequences = [
        torch.randint(model.config.vocab_size, (n,), device="cuda") for n in LENGTHS[setting]
    ]
    flops = useful_flops(model.config, sum(p.numel() for p in model.parameters()), LENGTHS[setting])
    whos, turns, losses = contestants(model, sequences), {}, {}
    for _ in range(rounds + 2):
        for who in list(whos):
            try:
                took, peak, losses[who] = seconds(whos[who])
            except Exception as error:  # a peer that does not fit, or not to this version
                if who == "ours":
                    raise
                print(
                    f"{size} pass, {setting:5s} {who:21s} left: {type(error).__name__}: {error}"[
                        :200
                    ].splitlines()[0],
                    flush=True,
                )
                del whos[who], error
                turns[who] = []
                forget()
                continue
            turns.setdefault(who, []).append((took, peak))
    rows = []
    for who, all_ in turns.items():
        row = {"part": "pass", "size": size, "setting": setting, "who": who, "seconds": None}
        if who in whos:
            times, peaks = zip(*all_[2:])
            ratios = [t / mine for t, (mine, _) in zip(times, turns["ours"][2:])]
            middle = statistics.median(times)
            row |= {
                "seconds": middle,
                "tokens_per_s": sum(LENGTHS[setting]) / middle,
                **utilisation(flops / middle, flop_rate),
                "peak_gib": max(peaks),
                "loss": losses[who],
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
            print(
                f"{size} pass, {setting:5s} {who:21s} {1e3 * middle:8.1f} ms "
                f"{row['tokens_per_s']:8.0f} tok/s  {shown(row)}  {max(peaks):5.1f} GiB  "
                f"x{row['ratio']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}] of our "
                f"time, loss {row['loss']:.4f}",
                flush=True,
            )
        rows.append(row)
    assert max(losses.values()) - min(losses.values()) < 0.02, f"not the same computation: {losses}"
    return rows


# ---- Steps ---------------------------------------------------------------------------------------
def steps(size, rounds, rates, device):
    """Return the rows for the SFT step and the GRPO step.

    The model is made as checkpoint.load_policy and the stages' main make it.
    """
    model = build(size, torch.float32)
    config, total = model.config, sum(p.numel() for p in model.parameters())
    model.checkpointing = Checkpointing(config.num_hidden_layers)
    model = shard(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    rng = torch.Generator().manual_seed(0)

    def some(n):
        return torch.randint(config.vocab_size, (n,), generator=rng)

    samples = [
        (some(4096).int().numpy(), (torch.arange(4096) > 255).numpy(), "all") for _ in range(8)
    ]
    cfg = sft.Config(micro_batch_tokens=32768)

    def sft_step():
        return sft.train_step(model, optimizer, samples, cfg, device, 1)

    # What backward computes again: every layer; all of it but attention; so two layers of three.
    layers = config.num_hidden_layers
    most = layers * 2 // 3
    choices = {
        "attention kept": Checkpointing(layers, layers),
        "a third kept": Checkpointing(most, most),
        "": Checkpointing(layers),
    }
    rows = []
    for setting, choice in choices.items():
        model.checkpointing = choice
        row = report("SFT step", size, setting, rounds, sft_step, [4096] * 8, config, total, rates)
        rows.append(row)

    lengths = torch.linspace(64, 2048, 32)[torch.randperm(32, generator=rng)].int().tolist()
    prompts = [some(512).tolist() for _ in range(4)]
    rollouts = [
        Rollout(
            row={},
            group=i // 8,
            prompt_ids=prompts[i // 8],
            seed=i,
            completion_ids=some(n).tolist(),
            sampler_logprobs=[-12.0] * n,
            advantage=1.0 if i % 2 else -1.0,
            finish_reason="stop",
        )
        for i, n in enumerate(lengths)
    ]
    cfg = mathrl.Config(micro_batch_tokens=32768, temperature=1.0, importance_limit=0.0)
    whole, alone = [512 + n for n in lengths], packing.shared_prefixes

    def step():
        return mathrl.train_step(model, optimizer, rollouts, cfg, device, 1)

    rows.append(report("GRPO step", size, "", rounds, step, whole, config, total, rates))
    packing.shared_prefixes = lambda sequences, device: None
    rows.append(
        report("GRPO step", size, "nothing shared", rounds, step, whole, config, total, rates)
    )
    packing.shared_prefixes = alone
    return rows


def report(part, size, setting, rounds, run, sequences, config, total, rates):
    """The row of a step: median of `rounds` after one."""
    torch.cuda.reset_peak_memory_stats()
    turns = [seconds(run)[:2] for _ in range(rounds + 1)][1:]
    middle, tokens = statistics.median(t for t, _ in turns), sum(sequences)
    row = {
        "part": part,
        "size": size,
        "setting": setting,
        "who": "ours",
        "seconds": middle,
        "tokens_per_s": tokens / middle,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "seconds_min": min(turns)[0],
        "seconds_max": max(turns)[0],
        **utilisation(useful_flops(config, total, sequences) / middle, rates[0]),
    }
    print(
        f"{size} {part} {setting:15s} {1e3 * middle:8.1f} ms "
        f"[{1e3 * row['seconds_min']:.1f}, {1e3 * row['seconds_max']:.1f}] for {tokens} tokens: "
        f"{row['tokens_per_s']:8.0f} tok/s  {shown(row)}  "
        f"{row['peak_gib']:5.1f} GiB with weights and AdamW",
        flush=True,
    )
    return row


class Tokenizer:
    """Text is not measured here."""

    def token_to_id(self, token):
        return -1

    def decode(self, ids, skip_special_tokens):
        return ""


def sampler(size, rates, rows=64, prompt=512, new=128):
    """Rows for a decoding step: what `new` tokens more take, over `new`."""
    model = build(size, torch.bfloat16).requires_grad_(False)
    config, engine, twin = model.config, TorchEngine(model, Tokenizer()), theirs(model).eval()
    ids = torch.tensor([range(i % 8, prompt + i % 8) for i in range(rows)], device="cuda")
    twin.generation_config.eos_token_id, twin.generation_config.pad_token_id = None, 0

    def ours(n, top_p=1.0):
        engine.generate(
            [
                Rollout(row={}, group=0, prompt_ids=p, seed=request_seed(i))
                for i, p in enumerate(ids.tolist())
            ],
            n,
            1.0,
            top_p,
        )

    @torch.no_grad()
    def transformers(n):
        twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=n,
        )

    weights = sum(p.numel() for p in model.parameters())
    cache = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.head_dim
        * rows
        * (prompt + 32 + new / 2)
    )
    floor, found = 2 * (weights + cache) / rates[1], []
    runs = {
        "ours": ours,
        "ours, top-p 0.95": functools.partial(ours, top_p=0.95),
        "transformers": transformers,
    }
    for who, run in runs.items():
        run(8)
        (few, *_), (many, peak, _) = (
            seconds(functools.partial(run, 32)),
            seconds(functools.partial(run, 32 + new)),
        )
        step = (many - few) / new
        found.append(
            {
                "part": "sampler",
                "size": size,
                "who": who,
                "setting": f"{rows} rows",
                "seconds": step,
                "tokens_per_s": rows / step,
                "floor_seconds": floor,
                "peak_gib": peak,
            }
        )
        print(
            f"{size} sampler {who:21s} {1e3 * step:8.2f} ms a step of {rows} rows, "
            f"{rows / step:8.0f} tok/s; reading weights and cache takes {1e3 * floor:.2f} ms",
            flush=True,
        )
    return found


# ---- Report --------------------------------------------------------------------------------------
def plot(rows, title, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [row for row in rows if row["seconds"] and row["part"] != "sampler"]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.32 * len(found) + 1.4), sharey=True)
    names = [
        f"{row['size']} {row['part']} {row['setting']}, {row['who']}".replace(" ,", ",")
        for row in found
    ]
    labels = (
        [f"{row['mfu']:.2f} ({row['mfu_datasheet'] or math.nan:.2f})" for row in found],
        [f"{row['peak_gib']:.0f}" for row in found],
    )
    titles = ("MFU: share of the matmul rate measured here (of the datasheet's)", "peak GiB")
    for axis, key, texts, title_ in zip(axes, ("mfu", "peak_gib"), labels, titles):
        bars = axis.barh(
            range(len(found)),
            [row[key] for row in found],
            color=["tab:blue" if row["who"] == "ours" else "0.7" for row in found],
        )
        axis.bar_label(bars, texts, fontsize=8, padding=2)
        axis.margins(x=0.16)
        axis.set_xlabel(title_)
    axes[0].set_yticks(range(len(found)), names, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--steps", default="4b", help="sizes")
    parser.add_argument("--samplers", default="0.6b,4b", help="sizes")
    parser.add_argument("--passes", default="0.6b,8b", help="sizes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(ROOT / "bench" / "gpu"), help="path without suffix")
    args = parser.parse_args()
    torch.manual_seed(0)
    _, _, device = init_distributed(0)
    rates, name, rows = ceilings(), torch.cuda.get_device_name(), []
    print(
        f"{name}: bf16 product {rates[0] / 1e12:.0f} TFLOP/s, copy {rates[1] / 1e12:.2f} TB/s",
        flush=True,
    )
    packages = ["torch", "triton", "transformers"] + ["liger_kernel"] * bool(
        importlib.util.find_spec("liger_kernel")
    )
    flags = [f"--{key}={getattr(args, key)}" for key in ("steps", "samplers", "passes", "rounds")]
    head = dict(
        command=["bench/gpu.py", *flags],
        git=git_hash(),
        gpu=name,
        **versions(*packages),
        matmul_flop_per_s=rates[0],
        copy_bytes_per_s=rates[1],
        lengths=LENGTHS,
    )
    jobs = [(steps, size, args.rounds, rates, device) for size in args.steps.split(",") if size]
    jobs += [(sampler, size, rates) for size in args.samplers.split(",") if size]
    jobs += [
        (race, size, setting, args.rounds, rates[0])
        for size in args.passes.split(",")
        if size
        for setting in LENGTHS
    ]
    for job, *flags in jobs:
        rows += job(*flags)
        forget()
        with open(args.out + ".json", "w") as f:  # after every part: what has been measured stays
            f.write(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    plot(
        rows,
        f"One {name}, Qwen3 in bf16, random weights, torch {torch.__version__}",
        args.out + ".png",
    )
    finish()


if __name__ == "__main__":
    main()
