"""Guards on a machine with a GPU. Without one they are skipped.

The Triton kernels there = float64, bf16 is as good as transformers', the GPU's model = the CPU's,
and runs repeat bit for bit. tests/test_stages.py, too, trains on the GPU where there is one.

    .venv/bin/python -m pytest -s tests/test_gpu.py
"""

import itertools
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny
from test_kernels import TOLERANCES

from engine import Replay, Rollout, TorchEngine, request_seed
from kernels.attention import flash_attention_varlen, flash_attention_varlen_ref
from kernels.decode_attention import decode_attention
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.linear_logprob import linear_logprob
from kernels.sampling import sample_tokens, sample_tokens_ref
from lib.packing import shared_prefixes
from model import Checkpointing, hf_config, packed_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def randn(*shape, dtype=torch.bfloat16, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_()


def relative(got, exact):
    """||got - exact|| / ||exact||."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def grads(outs, inputs, douts):
    return torch.autograd.grad(
        outs, inputs, [d.to(out) for d, out in zip(douts, outs, strict=True)]
    )


# ---- Kernels -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def measured():
    done = subprocess.run(
        [sys.executable, "tests/kernel_checks.py", "cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TOLERANCES)
def test_kernel_matches_float64_forward_and_every_gradient(measured, name):
    print(f"{name}: error {measured[name]:.1e}, tolerance {TOLERANCES[name]:.0e}")
    assert measured[name] <= TOLERANCES[name]


def test_a_deliberately_broken_kernel_fails_here_too(measured):
    broken = {name: error for name, error in measured.items() if name.startswith("broken")}
    print(*(f"{name}: error {error:.1e}" for name, error in broken.items()), sep="\n")
    assert len(broken) == 23 and not any(error <= 0.05 for error in broken.values())


def test_rows_beyond_two_billion_elements_are_found(measured):
    far = {name: error for name, error in measured.items() if name.startswith("int64")}
    print(far)
    assert len(far) == 7 and all(error < 1e-5 for error in far.values())


@pytest.mark.parametrize("n, k, width", [(32, 8, 128), (16, 8, 128), (40, 8, 128), (4, 2, 24)])
def test_attention_in_bf16_is_as_near_to_float64_as_pytorchs(n, k, width):
    """At the heads of 8B, 0.6B, 14B and the toy, on sequences of 1 to 1,500 tokens.

    The yardstick is SDPA on the same bf16 numbers.
    """
    torch.manual_seed(0)
    lengths = [1, 1500, 127, 128, 129, 64, 700]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    inputs = [randn(sum(lengths), heads, width) for heads in (n, k, k)]
    dout = [torch.randn(sum(lengths), n, width, device="cuda").bfloat16()]

    def alone(q, k, v):  # a call per sequence, in the dtype of its inputs
        parts = (x.split(lengths) for x in (q, k, v))

        def attend(*one):
            return F.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in one), is_causal=True, enable_gqa=True
            )

        return torch.cat([attend(*one)[0].transpose(0, 1) for one in zip(*parts)])

    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = alone(*wide)
    exact = [exact, *grads([exact], wide, dout)]
    errors = {}
    for who, fn in (
        ("ours", lambda *x: flash_attention_varlen(*x, cu_seqlens, max(lengths))),
        ("sdpa", alone),
    ):
        out = fn(*inputs)
        errors[who] = [
            relative(a, b) for a, b in zip((out, *grads([out], inputs, dout)), exact, strict=True)
        ]
        print(
            f"{who} {n}/{k} heads of {width}: out, dq, dk, dv "
            + ", ".join(f"{e:.1e}" for e in errors[who])
        )
    assert all(a < 1.3 * b for a, b in zip(errors["ours"], errors["sdpa"], strict=True))


def test_attention_repeats_bit_for_bit():
    lengths = [300, 1, 777]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    inputs = [randn(sum(lengths), heads, 128) for heads in (32, 8, 8)]
    runs = [
        torch.autograd.grad(
            flash_attention_varlen(*inputs, cu_seqlens, 777).float().square().sum(), inputs
        )
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_decode_attention_reads_the_cache_as_the_trainer_s_attention_does():
    """One row of 3,000 slots stands beside a short one, in bf16, with 8B's heads.

    Each has to equal the last row of the packed causal attention.
    """
    torch.manual_seed(0)
    lengths, slots = [3000, 17], 3072
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    q, k, v = (randn(sum(lengths), heads, 128).detach() for heads in (32, 8, 8))
    caches = [
        torch.full((2, 8, slots, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    ]
    for cache, x in zip(caches, (k, v)):
        for b, part in enumerate(x.split(lengths)):
            cache[b, :, 3000 - lengths[b] : 3000] = part.transpose(0, 1)
    last, start = cu_seqlens[1:].long() - 1, 3000 - torch.tensor(lengths, device="cuda")
    got = decode_attention(q[last].contiguous(), *caches, start, 3000)
    exact = flash_attention_varlen_ref(
        *(x.double().cpu() for x in (q, k, v)), cu_seqlens.cpu(), 3000
    )[last.cpu()].cuda()
    error = relative(got, exact)
    print(f"decode attention: relative error {error:.1e}, tolerance 4e-03 (bf16 rounds to 4e-03)")
    assert error < 4e-3


def test_head_at_the_real_vocabulary_is_fp32_inside():
    """151,936 columns, bf16 operands; the yardstick is float64 on the same numbers.

    Compared are log-probs, entropy, loss and gradients.
    """
    torch.manual_seed(0)
    hidden = randn(300, 1024)
    weight = randn(151936, 1024, scale=0.05)
    target = torch.randint(151936, (300,), device="cuda")
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = torch.log_softmax(wide[0] @ wide[1].T / 0.7, -1)
    exact = [logprobs.gather(1, target[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)]
    douts = [torch.randn(300, device="cuda") for _ in range(2)]
    exact += grads(exact, wide, douts)
    del logprobs
    got = list(linear_logprob(hidden, weight, target, 0.7))
    got += grads(got, (hidden, weight), douts)
    worst = [(a.double() - b).abs().max().item() for a, b in zip(got[:2], exact[:2])] + [
        relative(a, b) for a, b in zip(got[2:], exact[2:])
    ]
    print(
        "log-prob and entropy off by {:.1e} and {:.1e} nats (limit 1e-4), "
        "gradients by {:.1e} and {:.1e} (limit 4e-3)".format(*worst)
    )
    assert max(worst[:2]) < 1e-4 and max(worst[2:]) < 4e-3
    loss = linear_cross_entropy(hidden, weight, target)
    exact_loss = F.cross_entropy(wide[0] @ wide[1].T, target, reduction="sum")
    pairs = zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(exact_loss, wide),
        strict=True,
    )
    worst = [abs(loss.item() / exact_loss.item() - 1), *(relative(a, b) for a, b in pairs)]
    print(
        "cross-entropy off by {:.1e} (limit 1e-6), "
        "its gradients by {:.1e} and {:.1e} (limit 4e-3)".format(*worst)
    )
    assert worst[0] < 1e-6 and max(worst[1:]) < 4e-3


def test_sampling_draws_what_the_cpu_draws_at_the_real_vocabulary():
    torch.manual_seed(0)
    logits, uniform = torch.randn(64, 151936, device="cuda") * 2, torch.rand(64, device="cuda")
    for temperature, top_p, top_k in (
        (1.0, 1.0, 0),
        (0.6, 0.95, 0),
        (0.6, 0.95, 20),
        (0.0, 1.0, 0),
    ):
        token, logprob = sample_tokens(logits, uniform, temperature, top_p, top_k)
        low, high = (
            sample_tokens_ref(
                logits.cpu(), (uniform.cpu() + d).clamp(0, 1 - 2**-24), temperature, top_p, top_k
            )[0]
            for d in (-3e-5, 3e-5)
        )
        exact = torch.log_softmax(logits.double() / (temperature or 1.0), -1).gather(
            1, token[:, None]
        )[:, 0]
        error = (logprob - exact).abs().max().item()
        print(
            f"temperature {temperature}, top_p {top_p}, top_k {top_k}: "
            f"log-probs off by {error:.1e}, tolerance 1e-5"
        )
        assert ((token.cpu() >= low) & (token.cpu() <= high)).all() and error < 1e-5


# ---- Model and sampler ---------------------------------------------------------------------------
SEQUENCES = [[5, 6, 7, 8] * 5 + tail for tail in ([9], [9, 10, 11], [12] * 7)] + [
    list(range(1, 40))
]


def packed(device):
    """Arguments of Qwen3.forward for SEQUENCES; every token but the first of each is scored."""
    ends = torch.tensor([0, *map(len, SEQUENCES)]).cumsum(0).tolist()
    index = torch.tensor(
        [i for a, b in itertools.pairwise(ends) for i in range(a + 1, b)], device=device
    )
    return [
        torch.tensor(list(itertools.chain(*SEQUENCES)), device=device),
        torch.tensor(ends, dtype=torch.int32, device=device),
        39,
        index,
    ]


def scored(device, share=False, checkpointing=False):
    """Return [log-probs, entropies, nll, gradients] of a random model, fp32.

    In the loss, every token has a random weight.
    """
    model = make_tiny().to(device)
    layers = 2 if checkpointing else 0
    model.checkpointing = Checkpointing(layers, attention=layers, offload=checkpointing)
    args = packed(device)
    args.append(shared_prefixes(SEQUENCES, device) if share else None)
    logprobs_T, entropy_T = model.token_logprobs(packed_batch(*args), temperature=0.7)
    nll = model.nll(packed_batch(*args))
    weight_M = torch.randn(len(args[3]), generator=torch.Generator().manual_seed(7)).to(device)
    ((weight_M * (logprobs_T + entropy_T)[args[3]]).sum() + nll).backward()
    return [x.detach().cpu() for x in (logprobs_T, entropy_T, nll)] + [
        p.grad.cpu() for p in model.parameters()
    ]


@pytest.mark.parametrize("share, checkpointing", [(False, False), (True, False), (True, True)])
def test_the_model_on_the_gpu_is_the_model_on_the_cpu(share, checkpointing):
    worst = max(
        relative(a, b.double())
        for a, b in zip(scored("cuda", share, checkpointing), scored("cpu"), strict=True)
    )
    print(
        f"GPU{' with shared prefixes' * share}: worst relative difference {worst:.1e} (limit 2e-5)"
    )
    assert worst < 2e-5


def test_gradients_repeat_bit_for_bit_with_shared_prefixes():
    runs = [scored("cuda", share=True) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_in_bf16_logits_are_as_near_to_fp32_as_those_of_transformers():
    from transformers import AutoModelForCausalLM, Qwen3Config

    model = make_tiny(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=4096,
        std=0.05,
    ).cuda()
    raw = {
        k: v
        for k, v in hf_config(model.config).items()
        if k not in ("architectures", "model_type", "dtype")
    }
    theirs = (
        AutoModelForCausalLM.from_config(Qwen3Config(**raw), attn_implementation="sdpa")
        .cuda()
        .eval()
    )
    theirs.load_state_dict({**model.state_dict(), "lm_head.weight": model.head_weight})
    ids = torch.randint(4096, (4, 250), device="cuda")
    with torch.no_grad():
        exact, errors = model(ids).double(), {}
        errors["fp32"] = relative(theirs(ids).logits, exact)
        errors |= {
            "ours": relative(model.bfloat16()(ids), exact),
            "transformers": relative(theirs.bfloat16()(ids).logits, exact),
        }
    print(
        "logits: transformers in fp32 differ by {fp32:.1e} (limit 1e-5); rounding to bf16 "
        "moves ours by {ours:.1e}, theirs by {transformers:.1e}".format(**errors)
    )
    assert errors["fp32"] < 1e-5 and errors["ours"] < 1.1 * errors["transformers"]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_sampler_s_log_probs_are_the_trainer_s(dtype, limit, tokenizer):
    """The gap is a mean over tokens, as in the gate of every run (guard.check_step).

    32 rows with prompts of unequal lengths get 300 tokens each, so the cache is split twice.
    """
    model = make_tiny(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512, std=0.1
    ).to("cuda", dtype)
    engine = TorchEngine(model, tokenizer)
    engine.stops = [-1]
    rollouts = [
        Rollout(row={}, group=0, prompt_ids=list(range(3, 9 + i % 5)), seed=request_seed(i))
        for i in range(32)
    ]
    engine.generate(rollouts, 300, 0.8, top_p=0.95)
    rows = [r.prompt_ids + r.completion_ids for r in rollouts]
    ends = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
    index = torch.tensor(
        [i for r, end in zip(rollouts, ends[1:]) for i in range(end - len(r.completion_ids), end)],
        device="cuda",
    )
    with torch.no_grad():
        batch = packed_batch(
            torch.tensor(sum(rows, []), device="cuda"),
            torch.tensor(ends, dtype=torch.int32, device="cuda"),
            max(map(len, rows)),
            index,
        )
        logprobs_T, _ = model.token_logprobs(batch, temperature=0.8)
    sampled = torch.tensor([x for r in rollouts for x in r.sampler_logprobs], device="cuda")
    gap = (logprobs_T[index] - sampled).abs().mean().item()
    print(
        f"sampler against trainer, {str(dtype)[6:]}: mean gap {gap:.1e} nats a token, "
        f"limit {limit:.0e}"
    )
    assert gap < limit and len(index) == 32 * 300


def test_a_recorded_decoding_step_is_the_step(tokenizer, monkeypatch):
    """Tokens and log-probs are the same with and without CUDA graphs.

    Rows end and leave at all times, the cache grows, and it is split.
    """
    model = make_tiny(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512, std=0.1
    ).to("cuda", torch.bfloat16)
    graph, runs, recorded = Replay.__init__, [], []
    capture = torch.cuda.CUDAGraph.capture_end
    monkeypatch.setattr(
        torch.cuda.CUDAGraph,
        "capture_end",
        lambda self: (recorded.append(len(runs)), capture(self))[1],
    )
    for op_by_op in (4, 10**9):
        monkeypatch.setattr(
            Replay, "__init__", lambda self, function, calls=op_by_op: graph(self, function, calls)
        )
        engine = TorchEngine(model, tokenizer)
        engine.stops = range(0, tokenizer.get_vocab_size(), 40)
        runs.append(
            [
                Rollout(
                    row={},
                    group=0,
                    prompt_ids=[3 + n % 400 for n in range(195 + i % 5)],
                    seed=request_seed(i),
                )
                for i in range(48)
            ]
        )
        engine.generate(runs[-1], 300, 0.8)
    lengths = sorted(len(r.completion_ids) for r in runs[0])
    print(f"completions of {lengths[0]} to {lengths[-1]} tokens, {len(recorded)} graphs")
    assert set(recorded) == {1} and lengths[-1] > 60 and len(set(lengths)) > 10
    assert all(
        a.completion_ids == b.completion_ids and a.sampler_logprobs == b.sampler_logprobs
        for a, b in zip(*runs, strict=True)
    )
