"""Guards: the memory plan that is printed at start-up.

Weights, gradients and optimizer are compared byte for byte with a small run on the CPU, activations
with what autograd really keeps. A run that cannot fit ends before step 1. The plan of the paper's
presets is printed for 8 x 80 GB and 8 x 141 GB (pytest -s), beside the numbers that follow from the
shapes by hand.
"""

import importlib.util
import json
import os
import random
import re
import types
from functools import partial

import pytest
import test_presets
import torch
from conftest import make_tiny, run_python
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf
from engine import gpu_share
from kernels.attention import flash_attention_varlen_ref
from lib import common, plan
from lib.common import compute_device
from lib.packing import shared_prefixes
from lib.plan import activation_elements, memory_plan, time_plan
from model import QWEN3_SIZES, Qwen3Config, hf_config, packed_batch

GB = 1e9


def test_auto_is_planned_as_the_sampler_that_it_becomes(world, monkeypatch):
    """Without vLLM, auto is the built-in sampler, whose whole replica stays during the update."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = plan.read_config(str(world / "base"))
    device = torch.device("cuda")
    update = {}
    for engine in ("auto", "torch"):
        cfg = types.SimpleNamespace(shard="full", engine=engine, optimizer="adamw", lora_rank=0)
        parts = plan.plan_of_flags(config, cfg, 8, device, 1000, 1000, nll=False)
        update[engine] = parts["update"]
    assert update["auto"] == update["torch"] and "engine weights" in update["auto"]


def test_offload_computes_on_the_host_with_its_share_of_the_cores(monkeypatch):
    """OMP_NUM_THREADS=1 is meant for verifiers. Without a GPU everything obeys it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    assert common.num_threads(32, beside_gpu=True) == 24
    assert common.num_threads(32) == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert common.num_threads(32) == 24


def kept_for_backward(model, run):
    """Bytes of the distinct storages that autograd holds after a forward pass.

    Parameters and inputs are left out.
    """
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in own:
            # holding it keeps its address from being used again
            kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(n for n, _ in kept.values())


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": False},
        {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4},
    ],
)
def test_weights_gradients_and_optimizer_are_exact(shape):
    model = make_tiny(**shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    measured = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "optimizer": sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.dim()),
    }
    plan = memory_plan(model.config, 1, 8, 8, gpu=False)["update"]
    assert measured == {part: plan[part] for part in measured}
    # one process on a CPU keeps one copy of everything
    assert "gathered" not in plan and "engine weights" not in plan


class GPUAttention(torch.autograd.Function):
    """Keeps what the GPU's attention kernel keeps: q, k, v, out, and a number a head.

    The CPU path keeps padded copies besides.
    """

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen):
        out = flash_attention_varlen_ref(q, k, v, cu_seqlens, max_seqlen)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:2]))
        return out

    @staticmethod
    def backward(ctx, dout):
        raise NotImplementedError


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(checkpointing, monkeypatch):
    """Within 6%: the plan leaves out a few fp32 statistics a token and layer.

    With checkpointing the layer that is recomputed is measured by itself. The CPU path with its own
    attention keeps up to a quarter more.
    """
    on_cpu = measure(checkpointing)[1]
    monkeypatch.setattr("model.flash_attention_varlen", GPUAttention.apply)
    planned, measured = measure(checkpointing)
    print(
        f"checkpointing {checkpointing}: planned {planned}, measured {measured} bytes, "
        f"off by {planned / measured - 1:+.1%}, tolerance 6%; "
        f"with the CPU's attention {on_cpu}, {on_cpu / planned - 1:+.1%}"
    )
    assert abs(planned / measured - 1) < 0.06 and planned < on_cpu < 1.25 * planned


def measure(checkpointing):
    """(planned, measured) bytes of a forward pass over two packed sequences."""
    model, T = (
        make_tiny(hidden_size=64, intermediate_size=192, num_hidden_layers=6, head_dim=16),
        200,
    )
    model.gradient_checkpointing = checkpointing
    packed = (torch.arange(T) % 61, torch.tensor([0, 120, T], dtype=torch.int32), 120)
    measured = kept_for_backward(model, lambda: model.packed_hidden(*packed))
    if checkpointing:
        model.gradient_checkpointing = False
        whole = kept_for_backward(model, lambda: model.packed_hidden(*packed))
        model.model.layers = model.model.layers[:5]
        measured += whole - kept_for_backward(model, lambda: model.packed_hidden(*packed))
        model.config.num_hidden_layers = 6
    return 4 * T * activation_elements(model.config, checkpointing), measured


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prefixes_keep_less_than_the_plan_says(checkpointing):
    """The plan is for sequences that have nothing in common.

    Attention holds a copy of q, k and v for every token, so sharing must save more than these cost
    even where it is only just worth it (a tenth of the tokens).
    """
    model = make_tiny(hidden_size=64, intermediate_size=192, num_hidden_layers=6, head_dim=16)
    model.gradient_checkpointing = checkpointing
    draw = random.Random(0)
    for common_tokens in (22, 80):
        sequences = [
            [1] * common_tokens + draw.choices(range(2, 61), k=100 - common_tokens)
            for _ in range(2)
        ]
        shared = shared_prefixes(sequences, "cpu")
        packed = (
            torch.tensor(sequences[0] + sequences[1]),
            torch.tensor([0, 100, 200], dtype=torch.int32),
            100,
            torch.arange(200),
        )
        alone = kept_for_backward(model, partial(model.packed_hidden, *packed, None))
        less = kept_for_backward(model, partial(model.packed_hidden, *packed, shared))
        print(
            f"checkpointing {checkpointing}, {len(shared[0])} of 200 tokens computed: "
            f"{less} of {alone} bytes, {less / alone:.1%}"
        )
        assert less < alone


def test_kv_cache_is_what_the_sampler_allocates(world):
    from engine import TorchEngine
    from model import Qwen3, load_tokenizer

    model = Qwen3.from_pretrained(world / "base")
    engine, seen = TorchEngine(model, load_tokenizer(world / "base")), []
    decode = engine._decode
    # args[3]: the cache
    engine._decode = lambda *args: (
        seen.append(sum(t.nbytes for pair in args[3] for t in pair)),
        decode(*args),
    )[1]
    from engine import Rollout

    engine.generate([Rollout(row={}, group=0, prompt_ids=[5] * 11, seed=1)], 9, 1.0)
    assert (
        seen and seen[0] == memory_plan(model.config, 1, 20, 20, gpu=False)["rollouts"]["KV cache"]
    )


def test_shapes_of_the_8b_model_by_hand():
    """16.4 GB of bf16 weights, and 0.147 MB of KV cache a token.

    A layer keeps 3.7 GB at 32K tokens besides the 0.8 GB product that its SwiGLU kernel could make
    again.
    """
    plan = memory_plan(Qwen3Config(), 8, 32768, 32768)
    assert plan["load"]["weights"] == 4 * 8190735360
    assert (
        plan["update"]["weights"] == 8190735360 // 2 and plan["update"]["optimizer"] == 8190735360
    )
    assert plan["rollouts"]["engine weights"] == 2 * 8190735360
    assert plan["rollouts"]["KV cache"] == 32768 * 2 * 36 * 8 * 128 * 2
    layer = 2 * 32768 * (activation_elements(Qwen3Config(), True) - 4096 * 37)
    assert layer / GB - 2 * 32768 * 12288 / GB == pytest.approx(3.7, abs=0.05)
    # one sum a layer is what a checkpoint keeps
    assert 2 * 32768 * 4096 * 36 / GB == pytest.approx(9.66, abs=0.1)


def test_time_by_hand():
    """Update without attention: (8 * params - 2 * down projections) * tokens / (ranks * rate).

    Generation reads all weights once for every new token.
    """
    config = Qwen3Config(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=10,
    )
    params = 10 * 8 + 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 + 2 * 8 + 8  # head; q k v o; mlp; norms
    gen, update = time_plan(
        config, 2, tokens=100, longest=20, new_tokens=10, rows=4, flops=1.0, bandwidth=1.0
    )
    assert update == 100 * (8 * params - 2 * 8 * 16 + 4.5 * 2 * 20 * 8) / 2
    # two rows a rank, at the mean length of 15
    assert gen == 10 * (2 * params + 2 * 4 * 8 * (20 - 5))


class CountProducts(TorchDispatchMode):
    """Adds up the arithmetic of every matrix product and attention that is really called.

    A multiply and add counts 2.
    """

    total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name, tensors = op.__name__, [a for a in args if isinstance(a, torch.Tensor)]
        if name.startswith(("mm", "addmm")):
            a, b = tensors[-2:]
            self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        elif "attention" in name:
            # [rows, heads, tokens, width]; causal: half of two (five) squares
            q = tensors[1 if "backward" in name else 0]
            self.total += (
                (2.5 if "backward" in name else 1)
                * 2
                * q.shape[0]
                * q.shape[1]
                * q.shape[2] ** 2
                * q.shape[3]
            )
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("longest", [16, 128])
@pytest.mark.parametrize("tied", [False, True])
def test_the_arithmetic_of_an_update_is_what_a_run_really_does(longest, tied, monkeypatch):
    """Products counted as they are called, with checkpointing, without kept probabilities.

    That is as on a GPU. The plan has the norm weights and each sequence's first token (which is not
    scored) besides, and does not know that some rows of the last layer are never read.
    """
    monkeypatch.setattr("kernels.linear_logprob.CPU_KEEP", 0)
    model = make_tiny(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        head_dim=16,
        vocab_size=512,
        tie_word_embeddings=tied,
    )
    model.gradient_checkpointing, T = True, 256
    scored = torch.arange(T)[torch.arange(T) % longest > 0]
    with CountProducts() as counted:
        cu_seqlens = torch.arange(0, T + 1, longest, dtype=torch.int32)
        batch = packed_batch(torch.arange(T), cu_seqlens, longest, scored)
        model.token_logprobs(batch)[0].sum().backward()
    planned = time_plan(model.config, 1, T, longest, 0, T // longest, flops=1.0)[1]
    print(
        f"tied {tied}, sequences of {longest}: planned {planned:.4g}, counted {counted.total:.4g}, "
        f"off by {planned / counted.total - 1:+.1%}, tolerance 4%"
    )
    assert abs(planned / counted.total - 1) < 0.04


def test_a_run_that_cannot_fit_ends_with_one_sentence_before_it_loads_anything(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(Qwen3Config())))
    cfg = types.SimpleNamespace(
        optimizer="adamw",
        lora_rank=0,
        max_prompt_tokens=2048,
        max_new_tokens=24576,
        micro_batch_tokens=32768,
        engine="vllm",
        prompts_per_step=128,
        group_size=8,
        shard="full",
        phase_timeout=7200.0,
    )
    for free, moment in (
        (20e9, "load needs about 32.8 GB"),
        (45e9, "update needs about"),
        (200e9, None),
    ):
        monkeypatch.setattr(plan, "free_memory", lambda device, world, free=free: free)
        if moment is None:
            plan.check_memory(str(tmp_path), cfg, 8, torch.device("cuda"))
        else:
            with pytest.raises(SystemExit) as stop:
                plan.check_memory(str(tmp_path), cfg, 8, torch.device("cuda"))
            error = capsys.readouterr().err
            assert (
                stop.value.code == 2
                and error.count("\n") == 1
                and moment in error
                and "Nothing was trained." in error
            )
    printed = capsys.readouterr().out
    assert "update: " in printed and "rollouts: " in printed and "of 200 GB a rank" in printed
    gen, update = time_plan(
        Qwen3Config(), 8, 1024 * 26624, 26624, 24576, 1024, room=0.6 * 200e9 - 16.4e9
    )
    # 270 GB of caches go through 104
    assert 1.05 < gen / time_plan(Qwen3Config(), 8, 1024 * 26624, 26624, 24576, 1024)[0] < 1.5
    assert (
        f"at most about {gen:.3g} s of rollouts and {update:.3g} s of update" in printed
        and "--phase_timeout" not in printed
    )
    cfg.phase_timeout = gen - 1
    plan.check_memory(str(tmp_path), cfg, 8, torch.device("cuda"))
    assert f"more than --phase_timeout={gen - 1:g} s ends the run" in capsys.readouterr().out


def test_a_reward_model_of_8b_trains_on_eight_gpus_of_80_gb_and_on_one_it_says_why_not(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(Qwen3Config())))
    cfg = rlhf.Config()
    monkeypatch.setattr(plan, "free_memory", lambda device, world: 78e9)
    plan.check_memory(str(tmp_path), cfg, 8, torch.device("cuda"), pair=2 * cfg.rm_max_len)
    assert "reward model, update: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.check_memory(str(tmp_path), cfg, 1, torch.device("cuda"), pair=2 * cfg.rm_max_len)
    assert "fewer --rm_max_len and --micro_batch_tokens" in capsys.readouterr().err


def test_the_plan_is_printed_at_start_up_of_a_stage(world, tmp_path):
    _, printed, _ = run_python(
        "sft.py",
        f"--init_from={world}/base",
        f"--data={world}/sft_stage1.jsonl",
        f"--out_dir={tmp_path}",
        "--num_steps=1",
        "--samples_per_step=4",
        "--max_seq_len=512",
        "--micro_batch_tokens=512",
        "--eval_every=0",
    )
    line = next(line for line in printed.splitlines() if line.startswith("update: "))
    assert "GB a rank (weights 0.00" in line and "free" not in line
    assert (
        "time: a step takes at most about " in printed
        and "rollouts" not in printed.partition("time: ")[2].partition("\n")[0]
    )


@pytest.mark.parametrize("preset, size", [("8b", "8b"), ("14b-thinking", "14b")])
def test_plan_of_the_paper_s_presets(preset, size):
    """Prints what each sub-stage needs on one of 8 GPUs, and where 80 and 141 GB do.

    A stage that needs more is not an error of the plan: it wants more nodes (the paper gives no
    count), and says so at start-up.
    """
    print(
        f"\n{'stage':8s} {'length':>7s} {'tokens':>7s} {'update':>7s} {'of it activations':>18s} "
        f"{'logits':>7s} {'rollouts':>9s} {'80 GB':>6s} {'141 GB':>7s} {'16 x 80':>8s} "
        f"{'gen s':>7s} {'update s':>9s}"
    )
    config, needs = Qwen3Config(**QWEN3_SIZES[size]), {}
    for script, cfg in test_presets.commands(preset):
        longest = cfg.max_seq_len if script == "sft" else cfg.max_prompt_tokens + cfg.max_new_tokens
        tokens = max(cfg.micro_batch_tokens, longest)
        plans = [
            memory_plan(config, ranks, tokens, longest, nll=script == "sft") for ranks in (8, 16)
        ]
        peaks = [max(sum(parts.values()) for parts in plan.values()) / GB for plan in plans]
        update, rollouts = plans[0]["update"], sum(plans[0].get("rollouts", {}).values()) / GB
        rows = cfg.samples_per_step if script == "sft" else cfg.prompts_per_step * cfg.group_size
        gen, train = time_plan(
            config, 8, rows * longest, longest, 0 if script == "sft" else cfg.max_new_tokens, rows
        )
        fits = ["fits" if fit else "no" for fit in (peaks[0] < 79, peaks[0] < 140, peaks[1] < 79)]
        print(
            f"{script:8s} {longest:7d} {tokens:7d} {sum(update.values()) / GB:7.1f} "
            f"{update['activations'] / GB:18.1f} {update['logits'] / GB:7.1f} {rollouts:9.1f} "
            f"{fits[0]:>6s} {fits[1]:>7s} {fits[2]:>8s} {gen:7.0f} {train:9.0f}"
        )
        needs[script, longest] = peaks[0]
        # or the watchdog ends the run at its longest step, and at the same step when it is resumed
        assert max(gen, train) < cfg.phase_timeout
    assert all(need < 140 for need in needs.values()) and min(needs.values()) > 30


def test_whole_copies_are_planned_as_whole(tmp_path, capsys):
    """--shard=replicate: every rank holds all weights and moments, so ranks do not save any."""
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=64,
    )
    (tmp_path / "config.json").write_text(json.dumps(hf_config(config)))
    cfg = types.SimpleNamespace(
        optimizer="adamw",
        lora_rank=0,
        max_prompt_tokens=8,
        max_new_tokens=8,
        micro_batch_tokens=64,
        engine="torch",
        prompts_per_step=8,
        group_size=8,
        phase_timeout=9.0,
    )
    lines = {}
    for how in ("full", "replicate"):
        cfg.shard = how
        for world in (1, 4):
            plan.check_memory(str(tmp_path), cfg, world, torch.device("cpu"))
            line = next(
                line for line in capsys.readouterr().out.splitlines() if line.startswith("update")
            )
            lines[how, world] = line.partition("GB a rank ")[2]
    assert lines["replicate", 4] == lines["replicate", 1] == lines["full", 1] != lines["full", 4]


def test_hybrid_shards_are_a_node_s_and_offloaded_ones_are_not_the_gpu_s(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text(json.dumps(hf_config(Qwen3Config())))
    cfg = types.SimpleNamespace(
        optimizer="adamw",
        lora_rank=0,
        max_prompt_tokens=2048,
        max_new_tokens=24576,
        micro_batch_tokens=32768,
        engine="vllm",
        prompts_per_step=128,
        group_size=8,
        phase_timeout=7200.0,
    )
    monkeypatch.setattr(plan, "free_memory", lambda device, world: 80e9)

    def update_of(how, world):
        cfg.shard = how
        plan.check_memory(str(tmp_path), cfg, world, torch.device("cuda"))
        line = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("update")
        )
        return dict(re.findall(r"(\w+) ([\d.]+)[,)]", line))

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert update_of("hybrid", 16) == update_of("full", 8) != update_of("full", 16)
    full, offloaded = update_of("full", 8), update_of("offload", 8)
    assert (
        offloaded
        == {k: n for k, n in full.items() if k not in ("weights", "optimizer", "gradients")}
        and len(full) == len(offloaded) + 3
    )


@pytest.mark.parametrize(
    "held, share", [(4.1e9 * 12 / 4, 0.6), (4.1e9 * 12, 0.274), (8.2e9 * 12, 0.1)]
)
def test_vllm_gets_what_weights_and_moments_leave_of_a_gpu(held, share, monkeypatch):
    """8B over 8, 2 and 1 GPUs of 85 GB.

    A parameter here is a stand-in that knows its size and where it lies.
    """
    part = types.SimpleNamespace(dtype=torch.float32, is_cuda=True, numel=lambda: held / 12)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=85e9)
    )
    model = types.SimpleNamespace(
        parameters=lambda: iter([types.SimpleNamespace(to_local=lambda: part)])
    )
    assert gpu_share(model) == pytest.approx(share, abs=0.01)
    part.is_cuda = False  # --shard=offload
    assert gpu_share(model) == 0.6


def test_offloaded_parameters_are_computed_with_where_their_mesh_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    rest = types.SimpleNamespace(device=torch.device("cpu"))
    model = types.SimpleNamespace(parameters=lambda: iter([rest]))
    assert compute_device(model) == torch.device("cpu")
    rest.device_mesh = types.SimpleNamespace(device_type="cuda")
    assert compute_device(model) == torch.device("cuda", 3)
