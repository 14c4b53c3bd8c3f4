"""Run every Triton kernel and print its errors against float64 as one JSON object.

    python tests/kernel_checks.py            # in the interpreter; run by tests/test_kernels.py
    python tests/kernel_checks.py cuda       # on a GPU; run by tests/test_gpu.py
    python tests/kernel_checks.py NAME       # int64_offsets with int32 row offsets in NAME.py

This is a process of its own, because TRITON_INTERPRET has to be set before Triton is imported, and
the compiler does not work beside the interpreter.
"""

import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile

os.environ["TRITON_INTERPRET"] = "0" if sys.argv[1:] == ["cuda"] else "1"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from torch.utils.checkpoint import checkpoint

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

ON_GPU = sys.argv[1:] == ["cuda"]
ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKS = {}


def check(fn):
    """Register a check: a function of the module under test that returns the largest error."""
    CHECKS[fn.__name__] = fn
    return fn


def poison_empty():
    """Fill fresh memory with NaN (integers: a large number), to make unwritten elements seen."""

    def poisoned(make):
        def fill(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(torch.nan)
            return out.fill_(torch.iinfo(out.dtype).max // 2)

        return fill

    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)


def compare(fn, ref, inputs, *rest, only=None):
    """Largest error, relative to the largest entry, over the outputs and gradients of fn.

    The gradients are those to every input. With only=i the gradient flows into output i alone.
    """
    wide = [x.detach().double().requires_grad_() for x in inputs]
    rest64 = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rest
    ]
    outs, refs = (
        x if isinstance(x, tuple) else (x,) for x in (fn(*inputs, *rest), ref(*wide, *rest64))
    )
    outs, refs = (x if only is None else x[only : only + 1] for x in (outs, refs))
    douts = [torch.randn(out.shape, dtype=torch.float64) for out in refs]
    grads = torch.autograd.grad(
        outs, inputs, [d.to(out) for d, out in zip(douts, outs)], allow_unused=True
    )
    refgrads = torch.autograd.grad(refs, wide, douts, allow_unused=True)
    pairs = [(a, b) for a, b in zip((*outs, *grads), (*refs, *refgrads)) if b is not None]
    return worst(
        ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs
    )


def worst(errors):
    """The largest; NaN counts as larger than anything."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def randn(*shape, dtype=torch.float32):
    """Normal numbers that want a gradient."""
    return torch.randn(shape).to(dtype).requires_grad_()


@check
def rms_norm_fp32(module=rms_norm, dtype=torch.float32):
    """Widths that are not powers of two, one row, more rows than programs, slices of wider rows."""
    errors = [
        compare(
            module.rms_norm,
            module.rms_norm_ref,
            [randn(rows, width, dtype=dtype), randn(width, dtype=dtype)],
        )
        for rows, width in ((3, 37), (1, 2), (7, 128))
    ]
    sliced, transposed = randn(4, 3, 100, dtype=dtype)[:, :, 20:60], randn(40, 5, dtype=dtype).T
    errors += [
        compare(module.rms_norm, module.rms_norm_ref, [x, randn(40, dtype=dtype)])
        for x in (sliced, transposed)
    ]
    return worst(errors)


@check
def add_rms_norm_fp32(module=rms_norm, dtype=torch.float32):
    """Both outputs and three gradients; also with only the first or only the second output used."""
    inputs = [randn(5, 37, dtype=dtype), randn(5, 74, dtype=dtype)[:, ::2], randn(37, dtype=dtype)]
    errors = [
        compare(module.add_rms_norm, module.add_rms_norm_ref, inputs, only=only)
        for only in (None, 0, 1)
    ]

    def of_sum(summed, weight):
        return module.add_rms_norm(None, summed, weight)

    def of_sum_ref(summed, weight):
        return module.rms_norm_ref(summed, weight), 1 * summed

    errors += [compare(of_sum, of_sum_ref, inputs[1:], only=only) for only in (None, 0, 1)]
    return worst(errors)


@check
def rms_norm_bf16():
    """bf16 in and out: within two units of the last place.

    The interpreter truncates where the GPU rounds.
    """
    return worst([rms_norm_fp32(dtype=torch.bfloat16), add_rms_norm_fp32(dtype=torch.bfloat16)])


@check
def qk_norm_rope_fp32(module=qk_norm_rope, dtype=torch.float32):
    """24-wide heads, views into one fused projection, positions out of order."""
    errors = []
    for tokens, n, k, width in ((5, 4, 2, 24), (1, 1, 1, 2), (7, 3, 1, 16)):
        fused = randn(tokens, n + 2 * k, width, dtype=dtype)
        angle = torch.rand(50, width // 2) * 6
        weights = [randn(width, dtype=dtype), randn(width, dtype=dtype)]
        inputs = [fused[:, :n], fused[:, n : n + k], *weights]
        rest = angle.cos(), angle.sin(), torch.randint(50, (tokens,))
        errors.append(compare(module.qk_norm_rope, module.qk_norm_rope_ref, inputs, *rest))
    return worst(errors)


@check
def qk_norm_rope_bf16():
    """As rms_norm_bf16."""
    return qk_norm_rope_fp32(dtype=torch.bfloat16)


@check
def swiglu_fp32(module=swiglu, dtype=torch.float32):
    """More than one block per row, ragged ends, one row, the two halves of one fused projection."""
    fused = randn(3, 2 * 1100, dtype=dtype)
    pairs = [[randn(*shape, dtype=dtype) for _ in range(2)] for shape in ((2, 3, 37), (1, 5))] + [
        fused.chunk(2, dim=-1)
    ]
    return worst([compare(module.swiglu, module.swiglu_ref, list(pair)) for pair in pairs])


@check
def swiglu_bf16():
    """As rms_norm_bf16."""
    return swiglu_fp32(dtype=torch.bfloat16)


@check
def linear_logprob_fp32(module=linear_logprob):
    """Several ragged vocabulary chunks, one temperature for all or one each, a sharp row.

    Also the gradient of either output alone.
    """
    errors = []
    for tokens, width, vocab, chunk in ((5, 8, 37, 16), (1, 3, 5, 8192), (6, 4, 300, 100)):
        module.GPU_COLUMNS = chunk
        inputs = [randn(tokens, width), randn(vocab, width)]
        inputs[0].data[1:2] *= 20  # nearly all mass on one token
        target = torch.randint(vocab, (tokens,))
        for temperature in (1.0, 0.6, torch.rand(tokens) + 0.5):
            errors.append(
                compare(
                    module.linear_logprob, module.linear_logprob_ref, inputs, target, temperature
                )
            )
    for only in range(2):
        errors.append(
            compare(
                module.linear_logprob, module.linear_logprob_ref, inputs, target, 0.7, only=only
            )
        )
    inputs = [randn(4, 6).T, randn(300, 8)[:, ::2]]  # non-contiguous
    errors.append(compare(module.linear_logprob, module.linear_logprob_ref, inputs, target, 0.7))
    module.GPU_COLUMNS = 8192
    return worst(errors)


@check
def linear_cross_entropy_fp32(module=linear_cross_entropy):
    """Ragged token chunks, one token, some rows or all rows ignored; non-contiguous inputs."""
    errors = []
    for tokens, vocab, chunk, ignored in (
        (5, 37, 2, 1),
        (7, 37, 3, 1),
        (3, 300, 2048, 0),
        (4, 9, 3, 4),
        (1, 9, 3, 0),
    ):
        module.GPU_TILE = chunk * vocab
        target = torch.randint(vocab, (tokens,))
        target[:ignored] = -100
        inputs = [randn(8, tokens).T, randn(vocab, 16)[:, ::2]]
        errors.append(
            compare(module.linear_cross_entropy, module.linear_cross_entropy_ref, inputs, target)
        )
    return worst(errors)


def mm_in_fp32(a, b, out):
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_in_fp32(out, a, b):
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))


@check
def linear_heads_bf16():
    """bf16 operands with fp32 logits and sums.

    PyTorch's CPU has no matrix product for that pair, so there fp32 operands stand in.
    """
    if not ON_GPU:
        for module in (linear_logprob, linear_cross_entropy):
            module.mm_fp32 = mm_in_fp32
            module.addmm_fp32 = addmm_in_fp32
    inputs = [randn(5, 8, dtype=torch.bfloat16), randn(300, 8, dtype=torch.bfloat16)]
    target = torch.randint(300, (5,))
    logprob = compare(
        linear_logprob.linear_logprob, linear_logprob.linear_logprob_ref, inputs, target, 0.6
    )
    loss = compare(
        linear_cross_entropy.linear_cross_entropy,
        linear_cross_entropy.linear_cross_entropy_ref,
        inputs,
        target,
    )
    return worst([logprob, loss])


@check
def attention_fp32(module=attention, dtype=torch.float32):
    """Sequences of length 1, around one block and over two; 24-wide heads; GQA.

    q, k and v are views into a fused projection.
    """
    errors = []
    for lengths, n, k, width in (((1, 130, 5), 2, 1, 24), ((64, 1, 128), 2, 2, 16)):
        total = sum(lengths)
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        fused = randn(total, n + 2 * k, width, dtype=dtype)
        inputs = [fused[:, :n], fused[:, n : n + k], fused[:, n + k :]]
        rest = cu_seqlens, max(lengths)
        errors.append(
            compare(module.flash_attention_varlen, module.flash_attention_varlen_ref, inputs, *rest)
        )
    return worst(errors)


@check
def attention_fp16():
    """Half precision into the products, fp32 sums.

    The interpreter computes fp16 products right, bf16 products wrong.
    """
    return attention_fp32(dtype=torch.float16)


@check
def attention_kept_fp32(module=attention):
    """Gradients beside a checkpoint that keeps attention's output, against one that computes it
    again: 0 if they are equal bit for bit and the forward kernel has run once instead of twice."""
    cu_seqlens = torch.tensor([0, 9, 30], dtype=torch.int32)
    inputs = [randn(30, heads, 16) for heads in (4, 2, 2)]
    runs = []
    forward = module.forward_triton

    def counted(*args):
        runs.append(1)
        return forward(*args)

    module.forward_triton = counted
    found = []
    for kept in (None, []):

        def layer(q, k, v, kept=kept):
            # The product keeps attention's output for backward, as the projection behind it does.
            return module.flash_attention_varlen(q, k, v, cu_seqlens, 21, kept) * q

        out = checkpoint(layer, *inputs, use_reentrant=False)
        found += [torch.autograd.grad(out.square().sum(), inputs), len(runs)]
        assert not kept, "what was kept is taken out again"
    module.forward_triton = forward
    again, runs_again, kept, runs_in_all = found
    assert (runs_again, runs_in_all) == (2, 3)
    return worst((a - b).abs().max().item() for a, b in zip(again, kept))


def decode_case(starts, length, n, k, width, dtype):
    """q, two caches laid out [B, S, K, H] whose unused slots hold NaN, and the same with zeros."""
    # The factor 3 makes attention peaked, so that the maxima of the splits differ.
    q = (3 * torch.randn(len(starts), n, width)).to(dtype)
    start, slots = torch.tensor(starts), torch.arange(length + 9)
    unused = (slots < start[:, None]) | (slots >= length)
    clean = [torch.randn(len(starts), length + 9, k, width).to(dtype) for _ in range(2)]
    clean = [x.masked_fill_(unused[..., None, None], 0.0).transpose(1, 2) for x in clean]
    return q, [x.masked_fill(unused[:, None, :, None], torch.nan) for x in clean], clean, start


@check
def decode_attention_fp32(module=decode_attention, dtype=torch.float32):
    """One slot, one split, 3 to 37 splits (more than are joined at once), ragged starts.

    One case has 5 query heads of width 24 per key head.
    """
    errors = []
    shapes = (
        (256, (0,), 1, 2, 2, 24),
        (256, (3, 0, 69), 70, 10, 2, 24),
        (16, (0, 550, 301), 590, 3, 1, 16),
    )
    for module.SPLIT, starts, length, n, k, width in shapes:
        module.BLOCK = min(64, module.SPLIT)
        q, dirty, clean, start = decode_case(starts, length, n, k, width, dtype)
        out = module.decode_attention(q, *dirty, start, length).double()
        expected = module.decode_attention_ref(
            q.double(), *(x.double() for x in clean), start, length
        )
        errors.append(((out - expected).abs().max() / expected.abs().max()).item())
    module.SPLIT, module.BLOCK = 256, 64
    return worst(errors)


@check
def decode_attention_fp16():
    """As attention_fp16."""
    return decode_attention_fp32(dtype=torch.float16)


@check
def decode_attention_batched():
    """Share of numbers of a row's result that change with what the row is batched with.

    Alone, the row has no other rows beside it, starts at slot 0 and has fewer splits.
    """
    q, cache, _, start = decode_case((430, 210, 0), 600, 2, 1, 16, torch.float32)
    together = decode_attention.decode_attention(q, *cache, start, 600)
    errors = []
    for b, first in enumerate(start.tolist()):  # alone and moved to the left edge
        alone = [x[b : b + 1, :, first:] for x in cache]
        out = decode_attention.decode_attention(
            q[b : b + 1], *alone, torch.tensor([0]), 600 - first
        )
        errors.append((out[0] != together[b]).double().mean().item())
    return worst(errors)


@check
def sampling_fp32(module=sampling):
    """The same token as the CPU path unless the uniform number is within 1e-5 of a CDF step."""
    errors, usual = [], (module.BLOCK, module.TRIES_BLOCK)
    module.BLOCK = module.TRIES_BLOCK = 1024
    logits = torch.randn(4, 5003)[:, 3:] * 3
    logits[1, 7:] = -torch.inf
    logits[2] = logits[2].round()  # many ties
    for temperature, top_p, top_k in (
        (1.0, 1.0, 0),
        (0, 1.0, 0),
        (0.6, 0.95, 0),
        (1.0, 1.0, 20),
        (1.0, 0.5, 9),
    ):
        uniform = torch.rand(4)
        uniform[0], uniform[3] = 0.0, 1 - 2**-24
        token, logprob = module.sample_tokens(logits, uniform, temperature, top_p, top_k)
        bounds = []
        for shift in (-1e-5, 1e-5):
            near = (uniform + shift).clamp(0, 1 - 2**-24).cpu()
            bound, _ = module.sample_tokens_ref(logits.cpu(), near, temperature, top_p, top_k)
            bounds.append(bound.to(token.device))
        low, high = bounds
        errors.append(float(((token < low) | (token > high)).any()))

        logprobs = torch.log_softmax(logits.double() / (temperature or 1.0), dim=-1)
        exact = logprobs.gather(1, token[:, None])[:, 0]
        errors.append((logprob - exact).abs().max().item())
    module.BLOCK, module.TRIES_BLOCK = usual
    return worst(errors)


def hard_rows(vocab):
    """[8, vocab] logits in ascending order, hard on a search for the edge of a nucleus.

    Normal numbers; one token with nearly all of the probability; all equal; many ties; only two
    possible tokens; each token e^0.01 times as likely as the one before; neighbouring floats; bf16.
    """
    place = torch.arange(vocab)
    rows = [torch.randn(vocab) * 3, torch.randn(vocab), torch.zeros(vocab)]
    rows += [(torch.randn(vocab) * 2).round(), torch.full((vocab,), -torch.inf), place * 0.01]
    rows += [20 + place * 2.0**-19, (torch.randn(vocab) * 3).bfloat16().float()]
    rows[1][0], rows[4][-2:] = 30.0, torch.tensor([0.5, 1.0])
    return torch.stack(rows).sort(dim=-1).values


def nucleus_size(logits, temperature, top_p, top_k):
    """Tokens [B] that top-k and then top-p leave, by sorting in float64; ties are kept together."""
    probs = (logits.double() / temperature).softmax(-1).sort(descending=True).values
    if top_k:
        probs = probs.where(probs >= probs[:, top_k - 1, None], 0.0)
    mass_of_larger = probs.cumsum(-1) - probs
    kept = (mass_of_larger < top_p * probs.sum(-1, keepdim=True)) & (probs > 0)
    smallest = probs.gather(1, kept.sum(-1, keepdim=True) - 1)
    return (probs >= smallest).sum(-1)


# (temperature, top_p, top_k)
RESTRICTIONS = [(1.0, top_p, 0) for top_p in (0.95, 0.5, 1e-6, 0.9999, 1.0)]
RESTRICTIONS += [(1.0, 1.0, 1), (1.0, 1.0, 20), (0.8, 0.9, 4_000)]


@check
def sampling_nucleus(module=sampling, vocab=5_003, restrictions=RESTRICTIONS, block=2048):
    """The share of rows whose nucleus is not the one of sorting, for no top_p within 5e-5 of it.

    In a row in ascending order the number 0 draws the least likely token that is left. Sums are
    fp32, and NumPy adds the columns of the interpreter's blocks number by number, so that ties add
    their rounding up.
    """
    errors, usual = [], (module.BLOCK, module.TRIES_BLOCK)
    if not ON_GPU:
        # The interpreter takes as long for a small block as for a large one.
        module.BLOCK = module.TRIES_BLOCK = block
    for temperature, top_p, top_k in restrictions:
        logits = hard_rows(vocab)
        least, _ = module.sample_tokens(logits, torch.zeros(8), temperature, top_p, top_k)
        size = vocab - least
        low, high = (
            nucleus_size(logits, temperature, top_p * near, top_k) for near in (1 - 5e-5, 1 + 5e-5)
        )
        errors.append(((size < low) | (size > high)).double().mean().item())
    module.BLOCK, module.TRIES_BLOCK = usual
    return worst(errors)


@check
def sampling_nucleus_151936():
    """At Qwen3's vocabulary, which is not a multiple of a block, and its usual sampling."""
    return sampling_nucleus(vocab=151_936, restrictions=[(0.6, 0.95, 0)], block=2**14)


def search_passes():
    """The passes over each of the hard rows in which the interpreter finds four nuclei of it."""
    probabilities = sampling.probabilities
    usual = sampling.BLOCK, sampling.TRIES_BLOCK
    calls = []

    def counted(*args):
        calls.append(args)
        return probabilities(*args)

    # With one block a row, a pass is one call.
    sampling.probabilities = counted
    sampling.BLOCK = sampling.TRIES_BLOCK = 8192
    passes = []
    for row in hard_rows(5_003):
        for top_p in (0.95, 0.5, 1e-6, 0.9999):
            calls.clear()
            sampling.sample_tokens(row[None], torch.zeros(1), 1.0, top_p)
            # Two passes are not the search's: the masses of the blocks, and the token in its block.
            passes.append(len(calls) - 2)
    sampling.probabilities = probabilities
    sampling.BLOCK, sampling.TRIES_BLOCK = usual
    return passes


@check
def adamw_bf16(module=adamw):
    """Share of elements of p, g, m, v that differ from the CPU path after 3 steps.

    Both paths round with the same random bits.
    """
    made = [torch.randn(1500).bfloat16() for _ in range(2)]
    made += [torch.zeros(1500).bfloat16() for _ in range(2)]
    states = [[x.clone() for x in made] for _ in range(2)]
    for use_kernel, (p, g, m, v) in enumerate(states):
        module.use_triton = lambda *_, on=use_kernel: bool(on)
        for step in range(1, 4):
            options = {"lr": 1e-3, "weight_decay": 0.1, "step": step, "seed": 2**40 + step}
            module.adamw_bf16_(p, g, m, v, grad_scale=torch.tensor([0.5]), **options)
    return worst((a != b).double().mean().item() for a, b in zip(*states))


def broken(name, right, wrong):
    """A module of kernels/ with one line of a kernel changed."""
    source = (ROOT / "kernels" / f"{name}.py").read_text()
    assert source.count(right) >= 1, f"{name}.py no longer contains: {right}"
    path = pathlib.Path(tempfile.mkdtemp()) / f"{name}.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"broken_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Each row names a file, the right code, the broken code and the check that must notice.
MUTANTS = [
    ("rms_norm", "(tl.sum(g * x_hat) / D)", "(tl.sum(g) / D)", rms_norm_fp32),
    ("rms_norm", "dx += dsummed", "dx += 0 * dsummed", add_rms_norm_fp32),
    ("rms_norm", "mask = cols < D", "mask = cols < D - 1", rms_norm_fp32),
    ("qk_norm_rope", "dy1 * cos + dy2 * sin", "dy1 * cos - dy2 * sin", qk_norm_rope_fp32),
    ("qk_norm_rope", "y2 = z2 * cos + z1 * sin", "y2 = z2 * cos - z1 * sin", qk_norm_rope_fp32),
    ("swiglu", "gate * tl.sigmoid(gate) * up", "gate * tl.sigmoid(gate)", swiglu_fp32),
    ("swiglu", "(s + gate * s * (1.0 - s))", "s", swiglu_fp32),
    ("linear_logprob", "u = a * (u + shrink * s) + tl", "u = a * u + tl", linear_logprob_fp32),
    ("linear_logprob", "p * (logp + entropy)", "p * logp", linear_logprob_fp32),
    (
        "linear_cross_entropy",
        "addmm_fp32(dweight, dz.T, hidden[block])",
        "mm_fp32(dz.T, hidden[block], dweight)",
        linear_cross_entropy_fp32,
    ),
    ("attention", "- delta[:, None])", ")", attention_fp32),
    ("attention", "total = total * shrink + tl", "total = total + tl", attention_fp32),
    ("attention", "- delta[None, :])", ")", attention_fp32),
    ("decode_attention", "split_acc * share[:, None]", "split_acc", decode_attention_fp32),
    ("decode_attention", "total * shrink + tl.sum", "tl.sum", decode_attention_fp32),
    (
        "decode_attention",
        "first + SPLIT, length)",
        "first + SPLIT + 1, length)",
        decode_attention_fp32,
    ),
    ("decode_attention", "+ (length - 1)", "+ length", decode_attention_fp32),
    ("decode_attention", "+ split * SPLIT", "* 0 + split * SPLIT", decode_attention_fp32),
    ("sampling", "below - mass_before", "below", sampling_fp32),
    ("sampling", "(1.0 - top_p) / V", "1.0 - top_p", sampling_nucleus),
    ("sampling", "[None, :] >= goal", "[None, :] >= 0.99 * goal", sampling_nucleus),
    ("sampling", "bitcast=True) + 1)", "bitcast=True))", sampling_nucleus),
    ("adamw", "hash1 >> 16, mask", "hash1 & 0xFFFF, mask", adamw_bf16),
]


def far_rows(*shape, rows=3, dtype=torch.float32):
    """Rows 2^30 elements apart, so that row 2 lies beyond int32.

    Without a GPU they lie in a sparse file: 9 GB of addresses and a few KB on disk. On a GPU they
    lie in 9 GB of its memory, in which every call gets columns of its own.
    """
    first = far_rows.used if ON_GPU else 0
    size = 2**30 * (rows - 1) + first + torch.Size(shape).numel()
    if ON_GPU:
        if far_rows.memory is None:
            far_rows.memory = torch.zeros(2**31 + 2**20, dtype=dtype)
        far = far_rows.memory
        # The next call begins at the next multiple of 128 columns.
        far_rows.used = -(-(size % 2**30) // 128) * 128
    else:
        # The memory stays mapped after the file is deleted.
        with tempfile.NamedTemporaryFile() as file:
            far = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    strides = torch.empty(shape).stride()
    return far.as_strided((rows, *shape), (2**30, *strides), first).copy_(torch.randn(rows, *shape))


far_rows.memory, far_rows.used = None, 0


def int64_offsets(modules):
    """Largest error, forward and backward, of every kernel that reads rows by a stride.

    The rows lie far apart, see far_rows.
    """
    ones, angle, rows = torch.ones(8, requires_grad=True), torch.rand(9, 4), torch.arange(3)
    x, gate, up = far_rows(8), far_rows(8), far_rows(8)
    q, k, v = far_rows(2, 8), far_rows(1, 8), far_rows(1, 8)
    norm, rope, mlp, attend = (
        modules[name] for name in ("rms_norm", "qk_norm_rope", "swiglu", "attention")
    )
    head, draw, decode = (
        modules[name] for name in ("linear_logprob", "sampling", "decode_attention")
    )
    varlen = torch.tensor([0, 3], dtype=torch.int32), 3
    z, target, ones3 = far_rows(8), torch.tensor([1, 7, 0]), torch.ones(3)
    state = torch.zeros(4, 3)
    state[0] = -1e30
    head.fold_chunk[(3,)](z, target, ones3, state, 3, z.stride(0), 0, 8, BLOCK=8)
    logprob = state[3] - state[0] - state[1].log()
    dz, lse = far_rows(8), state[0] + state[1].log()
    head.logits_to_dz[(3,)](
        z,
        dz,
        target,
        ones3,
        logprob,
        logprob,
        lse,
        ones3,
        logprob,
        z.stride(0),
        dz.stride(0),
        0,
        8,
        1,
        HAS_DENTROPY=False,
        BLOCK=8,
    )
    # Eight draws are compared, because a single one might be right by chance.
    draws = [draw.sample_tokens(z, uniform_3) for uniform_3 in torch.rand(8, 3)]
    logprobs = torch.log_softmax(z, dim=-1)
    yield "rms_norm", compare_far(norm.rms_norm, norm.rms_norm_ref, [x], ones)
    yield (
        "qk_norm_rope",
        compare_far(
            rope.qk_norm_rope, rope.qk_norm_rope_ref, [q, k], ones, ones, angle, angle, rows
        ),
    )
    yield "swiglu", compare_far(mlp.swiglu, mlp.swiglu_ref, [gate, up])
    yield (
        "attention",
        compare_far(
            attend.flash_attention_varlen, attend.flash_attention_varlen_ref, [q, k, v], *varlen
        ),
    )
    keys, values, start = far_rows(2, 4, 8), far_rows(2, 4, 8), torch.tensor([0, 1, 2])
    near = decode.decode_attention_ref(ones.expand(3, 4, 8), keys.clone(), values.clone(), start, 4)
    far = decode.decode_attention(ones.detach().expand(3, 4, 8), keys, values, start, 4)
    yield "decode_attention", (far - near).abs().max().item()
    exact = (
        logprobs.gather(1, target[:, None])[:, 0],
        torch.nn.functional.one_hot(target, 8) - logprobs.exp(),
    )
    yield "linear_logprob", worst((a - b).abs().max().item() for a, b in zip((logprob, dz), exact))
    yield (
        "sampling",
        worst(
            (drawn - logprobs.gather(1, token[:, None])[:, 0]).abs().max().item()
            for token, drawn in draws
        ),
    )


def compare_far(fn, ref, far, *rest):
    """Like compare, against the same numbers moved close together."""
    near = [x.clone().requires_grad_() for x in far]
    far = [x.requires_grad_() for x in far]
    outs, refs = (x if isinstance(x, tuple) else (x,) for x in (fn(*far, *rest), ref(*near, *rest)))
    grads = [
        torch.autograd.grad([x.square().sum() for x in y], z)
        for y, z in ((outs, far), (refs, near))
    ]
    return worst((a - b).abs().max().item() for a, b in zip((*outs, *grads[0]), (*refs, *grads[1])))


def main():
    torch.manual_seed(0)
    poison_empty()
    results = {name: fn() for name, fn in CHECKS.items()}
    for name, right, wrong, fn in MUTANTS:
        results[f"broken {name}: {right} -> {wrong}"] = fn(broken(name, right, wrong))
    if not ON_GPU:
        results["search_passes"] = search_passes()
    results |= {f"int64 {name}": error for name, error in int64_offsets(FAR_KERNELS)}
    print(json.dumps(results))


FAR_KERNELS = {
    "rms_norm": rms_norm,
    "qk_norm_rope": qk_norm_rope,
    "swiglu": swiglu,
    "attention": attention,
    "decode_attention": decode_attention,
    "linear_logprob": linear_logprob,
    "sampling": sampling,
}

if __name__ == "__main__":
    if ON_GPU or len(sys.argv) == 1:
        torch.set_default_device("cuda" if ON_GPU else "cpu")
        main()
    else:
        # The argument names a file. With int32 row offsets its kernels crash or read wrong rows.
        torch.manual_seed(0)
        int32 = {sys.argv[1]: broken(sys.argv[1], "tl.int64", "tl.int32")}
        print(json.dumps(dict(int64_offsets(FAR_KERNELS | int32))))
