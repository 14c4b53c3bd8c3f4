"""Times every kernel against PyTorch eager, torch.compile and (on a GPU) Liger, in one run.

    python bench/kernels.py      # prints a table, writes bench/kernels_<device>.json and .png
    python bench/kernels.py --compile=0 --rounds=10 --only=swiglu

On a GPU the shapes are those of Qwen3-8B at 32K packed tokens in bf16. On a CPU they are those of
the laptop cascade's model in fp32. The floor of a kernel is the time that its least traffic (or its
products) would take at the copy bandwidth (or matmul rate) measured in the same run; "of floor" is
floor / time. Every round times each contestant once, and the median over rounds is reported, so
that a slow moment of the machine hits all contestants. Small tensors can beat a floor, because they
stay in the cache. Last comes the peak memory of head and loss, beside logits made whole, over
growing vocabularies.
"""

import argparse
import importlib.metadata
import importlib.util
import inspect
import json
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from side_by_side import machine

from kernels import (
    adamw,
    attention,
    decode_attention,
    linear_cross_entropy,
    linear_logprob,
    qk_norm_rope,
    rms_norm,
    sampling,
    swiglu,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# T is the number of tokens, D the width, N the query heads, K the key heads, H the head width, F
# the width of the MLP, V the vocabulary, B the sampled rows, S the cache slots.
SHAPES = {
    "cuda": {
        "T": 32768,
        "D": 4096,
        "N": 32,
        "K": 8,
        "H": 128,
        "F": 12288,
        "V": 151936,
        "B": 256,
        "S": 4096,
        "lengths": [4096] * 8,
    },
    "cpu": {
        "T": 10000,
        "D": 96,
        "N": 4,
        "K": 2,
        "H": 24,
        "F": 288,
        "V": 600,
        "B": 256,
        "S": 200,
        "lengths": [40 + i * 120 // 99 for i in range(100)],
    },
}
# The peak memory of head and loss is taken at these tokens, widths and vocabularies. Whole logits
# are compared up to the vocabulary `whole`.
HEADS = {
    "cuda": {
        "tokens": 32768,
        "width": 4096,
        "vocabularies": (16384, 65536, 151936),
        "whole": 16384,
    },
    "cpu": {"tokens": 4096, "width": 64, "vocabularies": (8192, 32768, 131072), "whole": 32768},
}


def hf_rms_norm(x, weight, eps=1e-6):
    """As Hugging Face's Qwen3 writes it."""
    x_hat = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return weight * x_hat.to(x.dtype)


def hf_add_rms_norm(x, residual, weight):
    """Addition, then the norm."""
    residual = x + residual
    return hf_rms_norm(residual, weight), residual


def hf_qk_norm_rope(q, k, q_weight, k_weight, cos, sin, position_ids):
    """Norm, then rotate-half with full-width tables."""
    cos, sin = (torch.cat((x, x), dim=-1)[position_ids][:, None].to(q.dtype) for x in (cos, sin))

    def rotate(x):
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-x2, x1), dim=-1) * sin

    return rotate(hf_rms_norm(q, q_weight)), rotate(hf_rms_norm(k, k_weight))


def padded_sdpa(q, k, v, cu_seqlens, max_seqlen):
    """All sequences padded to the longest, one SDPA call."""
    lengths = cu_seqlens.diff()
    inside = torch.arange(max_seqlen, device=q.device) < lengths[:, None]
    slots = inside.flatten().nonzero()[:, 0]
    padded = [
        x.new_zeros(len(lengths) * max_seqlen, *x.shape[1:])
        .index_copy(0, slots, x)
        .unflatten(0, (-1, max_seqlen))
        for x in (q, k, v)
    ]
    q, k, v = (x.transpose(1, 2) for x in padded)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)


def masked_sdpa(q, k_cache, v_cache, start, length, bias):
    """PyTorch's fused attention of the new token to its cache. The mask is ready, as for ours."""
    k, v = k_cache[:, :, :length], v_cache[:, :, :length]
    mask = bias[:, None, :, :length].to(q.dtype)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[
        :, :, 0
    ]


def sorted_sampling(logits, uniform, temperature, top_p):
    """Nucleus sampling by sorting the vocabulary."""
    probs, order = torch.softmax(logits.float() / temperature, dim=-1).sort(descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0).cumsum(-1)
    place = torch.searchsorted(probs, uniform[:, None] * probs[:, -1:]).clamp(
        max=probs.shape[-1] - 1
    )
    return order.gather(1, place)[:, 0], torch.log_softmax(logits.float() / temperature, -1).gather(
        1, place
    )[:, 0]


def logprob_entropy(hidden, weight, target):
    """As trainers write it: bf16 logits, the softmax in fp32."""
    logprobs = torch.log_softmax((hidden @ weight.T).float(), -1)
    return logprobs.gather(1, target[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def cases(device, s):
    """Return {name: (inputs, contestants, bytes forward, bytes both, FLOPs forward, FLOPs both)}.

    Among the contestants, ours comes first. "both" is forward and backward together.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    element = torch.empty((), dtype=dtype).element_size()
    target = torch.randint(s["V"], (s["T"],), device=device)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    table = layer_cases(device, s, randn) | head_cases(device, s, randn, target, element)
    if device == "cuda":
        add_gpu_contestants(table, target, max(s["lengths"]))
    # The table counts elements. Turn them into bytes.
    return {
        name: (*row[:2], *(x * element for x in row[2:4]), *row[4:]) for name, row in table.items()
    }


def layer_cases(device, s, randn):
    """Return the rows of the kernels inside a layer, with elements instead of bytes."""
    T, D, N, K, H, width = s["T"], s["D"], s["N"], s["K"], s["H"], s["F"]
    x, norm_weight = randn(T, D), randn(D)
    angle = torch.rand(max(s["lengths"]), H // 2, device=device)
    rope = angle.cos(), angle.sin(), torch.arange(T, device=device) % len(angle)

    cu_seqlens = torch.tensor([0, *s["lengths"]], device=device).cumsum(0, dtype=torch.int32)
    packed = sum(s["lengths"])
    qkv = randn(packed, N, H), randn(packed, K, H), randn(packed, K, H)
    attention_flops = sum(2 * n * n * N * H for n in s["lengths"])

    start = torch.randint(s["S"] // 4, (s["B"],), device=device)
    cache = [randn(s["B"], K, s["S"], H).detach() for _ in range(2)]
    decode_args = start, s["S"] - 1, decode_attention.slot_bias(start, s["S"] - 1, s["S"])
    slots = int((s["S"] - 1 - start).sum())

    return {
        "rms_norm": (
            (x, norm_weight),
            {
                "ours": rms_norm.rms_norm,
                "eager": hf_rms_norm,
                "fused": lambda x, w: F.rms_norm(x, (D,), w, 1e-6),
            },
            2 * T * D,
            5 * T * D,
            0,
            0,
        ),
        "add_rms_norm": (
            (x, randn(T, D), norm_weight),
            {"ours": rms_norm.add_rms_norm, "eager": hf_add_rms_norm},
            4 * T * D,
            8 * T * D,
            0,
            0,
        ),
        "qk_norm_rope": (
            (randn(T, N, H), randn(T, K, H), randn(H), randn(H), *rope),
            {"ours": qk_norm_rope.qk_norm_rope, "eager": hf_qk_norm_rope},
            2 * T * (N + K) * H,
            5 * T * (N + K) * H,
            0,
            0,
        ),
        "swiglu": (
            (randn(T, width), randn(T, width)),
            {"ours": swiglu.swiglu, "eager": lambda g, u: F.silu(g) * u},
            3 * T * width,
            8 * T * width,
            0,
            0,
        ),
        "attention": (
            (*qkv, cu_seqlens, max(s["lengths"])),
            {"ours": attention.flash_attention_varlen, "eager": padded_sdpa},
            0,
            0,
            attention_flops,
            3.5 * attention_flops,
        ),
        "decode_attention": (
            (randn(s["B"], N, H).detach(), *cache, *decode_args),
            {"ours": decode_attention.decode_attention, "eager": masked_sdpa},
            2 * slots * K * H,
            0,
            0,
            0,
        ),
    }


def head_cases(device, s, randn, target, element):
    """Return the rows of the kernels behind the layers, with elements instead of bytes.

    `element` is the size of one in bytes.
    """
    T, D, V = s["T"], s["D"], s["V"]
    hidden, head = randn(T, D), randn(V, D, scale=0.05)
    head_flops = 2 * T * V * D
    logits, uniform = torch.randn(s["B"], V, device=device) * 2, torch.rand(s["B"], device=device)

    numel = 2**28 if device == "cuda" else 2**20
    state = [torch.randn(numel, device=device).bfloat16() for _ in range(4)]
    plain = torch.optim.AdamW([state[0].clone().requires_grad_()], fused=True)
    plain.param_groups[0]["params"][0].grad = state[1]

    def ce(h, w):
        return F.cross_entropy((h @ w.T).float(), target, reduction="sum")

    return {
        "linear_logprob": (
            (hidden, head, target),
            {"ours": linear_logprob.linear_logprob, "eager": logprob_entropy},
            0,
            0,
            head_flops,
            3 * head_flops,
        ),
        "logprob vs cross_entropy": (
            (hidden, head),
            {"ours": lambda h, w: linear_logprob.linear_logprob(h, w, target)[0], "eager": ce},
            0,
            0,
            head_flops,
            3 * head_flops,
        ),
        "linear_cross_entropy": (
            (hidden, head),
            {
                "ours": lambda h, w: linear_cross_entropy.linear_cross_entropy(h, w, target),
                "eager": ce,
            },
            0,
            0,
            0,
            3 * head_flops,
        ),
        "sampling": (
            (logits, uniform, 0.6, 0.95),
            {"ours": sampling.sample_tokens, "eager": sorted_sampling},
            s["B"] * V * 4 / element,
            0,
            0,
            0,
        ),
        "adamw": (
            (),
            {
                "ours": lambda: adamw.adamw_bf16_(*state, lr=1e-6, step=9, seed=1),
                "eager": plain.step,
            },
            numel * 14 / element,
            0,
            0,
            0,
        ),
    }


def add_gpu_contestants(table, target, longest):
    """Add PyTorch's FlashAttention-2 and, where it is installed, Liger's Triton kernels.

    Liger is installed by pip install liger-kernel.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 the argument does not exist and grouped heads are always accepted.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    table["attention"][1]["fa2"] = lambda q, k, v, cu, n: varlen_attn(
        q, k, v, cu, cu, n, n, window_size=(-1, 0), **gqa
    )
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as LigerLinearCE,
        )
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        table["rms_norm"][1]["liger"] = lambda x, w: LigerRMSNormFunction.apply(
            x, w, 1e-6, 0.0, "llama", False
        )
        table["swiglu"][1]["liger"] = lambda g, u: LigerSiLUMulFunction.apply(g, u)
        table["linear_cross_entropy"][1]["liger"] = lambda h, w: LigerLinearCE.apply(
            h, w, target, None, None, -100, 0.0, 0.0, "sum"
        )[0]


def liger_version(device):
    """Whether Liger takes part, in words that go into the JSON as well."""
    if device == "cpu":
        return "not compared: its kernels need a GPU"
    installed = importlib.util.find_spec("liger_kernel")
    return (
        importlib.metadata.version("liger_kernel")
        if installed
        else "not compared: not installed (pip install liger-kernel)"
    )


def head_peak(who, vocab, device):
    """Return (MiB at the peak of head, loss and their gradients beyond the inputs, seconds).

    On a CPU it has to run in a process of its own, because the peak is that of the whole process,
    read from /proc. The seconds are then CPU time of one thread.
    """
    tokens, width = HEADS[device]["tokens"], HEADS[device]["width"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_num_threads(1)
    hidden, weight = (
        torch.randn(n, width, device=device).to(dtype).requires_grad_() for n in (tokens, vocab)
    )
    target = torch.randint(vocab, (tokens,), device=device)

    def whole():
        return -F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")

    run = {
        "ours": lambda: linear_logprob.linear_logprob(hidden, weight, target)[0],
        "whole": whole,
    }[who]

    def resident(name):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(name + r":\s+(\d+)", status)[1]) / 1024

    # A small call first: the libraries it loads are not counted.
    linear_logprob.linear_logprob(hidden[:8], weight[:8], target[:8] % 8)[0].sum().backward()
    hidden.grad = weight.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated() / 2**20, time.time()
    else:
        # The peak starts again from here.
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before, start = resident("VmRSS"), time.process_time()
    run().sum().backward()
    if device == "cpu":
        return resident("VmHWM") - before, time.process_time() - start
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20 - before, time.time() - start


def head_table(device):
    """Return the peak memory and time of ours and of whole logits over vocabularies.

    Each number is the least of two runs, which are interleaved.
    """
    rows = []
    for vocab in HEADS[device]["vocabularies"]:
        whos = ("ours", "whole") if vocab <= HEADS[device]["whole"] else ("ours",)
        runs = {who: [] for who in whos}
        for who in whos * 2:
            if device == "cuda":
                runs[who].append(head_peak(who, vocab, device))
            else:
                command = [sys.executable, __file__, f"--head={who}", f"--vocab={vocab}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[who].append(json.loads(done.stdout.splitlines()[-1]))
        for who in whos:
            mib, seconds = (min(values) for values in zip(*runs[who]))
            tokens, width = HEADS[device]["tokens"], HEADS[device]["width"]
            gradients = (tokens + vocab) * width * (2 if device == "cuda" else 4) / 2**20
            rows.append(
                {
                    "who": who,
                    "tokens": tokens,
                    "vocab": vocab,
                    "peak_mib": mib,
                    "gradients_mib": gradients,
                    "seconds": seconds,
                }
            )
            print(
                f"head and loss, {tokens} tokens x {vocab}: {who:5s} {mib:8.1f} MiB at the peak "
                f"({gradients:.1f} of it gradients), {seconds:.3f} s",
                flush=True,
            )
    return rows


def clock(fn, device, flush):
    """Return the milliseconds of one call.

    On a GPU, events measure it. The L2 cache is emptied first, and everything is launched before
    the call starts, as in training, where the CPU runs ahead. On a CPU the time is CPU time of one
    thread.
    """
    if device == "cuda":
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # clock ticks, 1 ms
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.process_time()
    fn()
    return (time.process_time() - start) * 1e3


def full_pass(fn, inputs):
    """A call that runs forward and backward and keeps no gradients."""
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    douts = {}

    def run():
        outs = fn(*inputs)
        outs = [x for x in (outs if isinstance(outs, tuple) else (outs,)) if x.requires_grad]
        for i, out in enumerate(outs):
            douts.setdefault(i, torch.ones_like(out))
        torch.autograd.grad(outs, wanted, [douts[i] for i in range(len(outs))])

    return run if wanted else None


def ceilings(device, dtype):
    """Copy bandwidth in bytes/s and matmul rate in FLOP/s of this machine, best of 20."""
    numel, n = (2**29, 8192) if device == "cuda" else (2**24, 1024)
    source, a = (
        torch.ones(numel, device=device, dtype=dtype),
        torch.randn(n, n, device=device).to(dtype),
    )
    sink, flush = torch.empty_like(source), torch.empty(2**26, device=device)
    copy = min(clock(lambda: sink.copy_(source), device, flush) for _ in range(20))
    product = min(clock(lambda: a @ a, device, flush) for _ in range(20))
    return 2 * source.nbytes / copy * 1e3, 2 * n**3 / product * 1e3


def measure(name, case, device, rounds, use_compile, rates, flush):
    """One row per contestant and direction."""
    inputs, contestants, *work = case
    contestants = dict(contestants)
    if use_compile and name != "adamw":
        contestants["compile"] = torch.compile(contestants["eager"], dynamic=False)
    rows = []
    for direction, moved, flops in (
        ("forward", work[0], work[2]),
        ("forward+backward", work[1], work[3]),
    ):
        runs, memory = {}, {}
        for who, fn in contestants.items():
            run = (lambda fn=fn: fn(*inputs)) if direction == "forward" else full_pass(fn, inputs)
            if run is None or not (moved or flops):
                break
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                run(), run()  # compile and warm up
            except torch.OutOfMemoryError:
                print(f"{name:26s} {direction:17s} {who:8s} does not fit into memory", flush=True)
                continue
            memory[who] = (
                (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else None
            )
            runs[who] = run
        # This direction is not timed: there is nothing to differentiate, or the table gives it no
        # work because forward alone would compare unlike things.
        if not runs:
            continue
        times = {who: [] for who in runs}
        for _ in range(rounds):
            for who, run in runs.items():
                times[who].append(clock(run, device, flush))
        medians = {who: statistics.median(values) for who, values in times.items()}
        floor = moved / rates[0] * 1e3 if moved else flops / rates[1] * 1e3
        for who, ms in medians.items():
            rate = moved / ms / 1e9 if moved else flops / ms / 1e9
            row = {
                "kernel": name,
                "direction": direction,
                "who": who,
                "ms": ms,
                "of_floor": floor / ms,
                "peak_gib": memory[who],
            }
            rows.append(
                row
                | {
                    "rate": rate,
                    "unit": "TB/s" if moved else "TFLOP/s",
                    "ours_speedup": ms / medians["ours"],
                }
            )
            print(
                f"{name:26s} {direction:17s} {who:8s} {ms:9.3f} ms {rate:9.3f} "
                f"{rows[-1]['unit']:8s}{100 * floor / ms:4.0f}% of floor   "
                f"{ms / medians['ours']:5.2f}x ours",
                flush=True,
            )
    return rows


def plot(rows, title, path):
    """Bars: time of each contestant over ours, per kernel and direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row["kernel"], row["direction"]) for row in rows))
    whos = list(dict.fromkeys(row["who"] for row in rows))
    figure, axis = plt.subplots(figsize=(10, 0.42 * len(groups) + 1.5))
    height = 0.8 / len(whos)
    for i, who in enumerate(whos):
        found = {
            (row["kernel"], row["direction"]): row["ours_speedup"]
            for row in rows
            if row["who"] == who
        }
        places = [g + i * height for g, group in enumerate(groups) if group in found]
        axis.barh(places, [found[group] for group in groups if group in found], height, label=who)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(
        [g + 0.4 - height / 2 for g in range(len(groups))],
        [f"{k}, {d}" for k, d in groups],
        fontsize=8,
    )
    axis.invert_yaxis()
    axis.set_xlabel("time relative to ours (right of 1: slower than ours)")
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    """Measures, prints, writes the JSON and the plot."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--out", default="", help="path without suffix")
    parser.add_argument(
        "--head",
        default="",
        help="ours or whole: print the peak MiB and the seconds of head and loss, no more",
    )
    parser.add_argument("--vocab", type=int, default=32768)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.head:
        return print(json.dumps(head_peak(args.head, args.vocab, device)))
    if device == "cpu":
        from lib.common import init_distributed

        init_distributed(0)  # the trainer's memory settings
        torch.set_num_threads(1)  # CPU time of one thread means the same on a busy machine
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else machine()["cpu"]
    rates = ceilings(device, dtype)
    print(
        f"{name}: copy {rates[0] / 1e12:.3f} TB/s, matmul {rates[1] / 1e12:.3f} TFLOP/s ({dtype})\n"
        f"Liger: {liger_version(device)}"
    )
    flush = torch.empty(2**26, device=device) if device == "cuda" else None
    rows = []
    for kernel, case in cases(device, SHAPES[device]).items():
        if args.only in kernel:
            rows += measure(kernel, case, device, args.rounds, args.compile, rates, flush)
    memory = [] if args.only else head_table(device)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    versions |= {
        name: importlib.util.find_spec(name) and __import__(name).__version__
        for name in ("triton",)
    }
    versions["liger"] = liger_version(device)
    head = {
        "device": name,
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "shapes": SHAPES[device],
        "rounds": args.rounds,
    }
    head |= {
        "command": ["bench/kernels.py", *sys.argv[1:]],
        "copy_bytes_per_s": rates[0],
        "matmul_flop_per_s": rates[1],
    }
    out = pathlib.Path(args.out or ROOT / "bench" / f"kernels_{device}")
    out.with_suffix(".json").write_text(
        json.dumps(head | {"head_memory": memory, "rows": rows}, indent=1) + "\n"
    )
    plot(
        rows,
        f"{name}, torch {torch.__version__}, {args.rounds} interleaved rounds",
        out.with_suffix(".png"),
    )


if __name__ == "__main__":
    main()
