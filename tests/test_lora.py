"""LoRA and bf16 AdamW: the adapter against a literal twin and against peft, training, resume and
ranks, and what a run refuses. Which weights train is one flag of every stage."""

import json

import pytest
import torch
from conftest import ROOT, make_tiny, run_python
from safetensors.torch import load_file
from test_stages import DATA, command

import mathrl
import rlhf
from bench import bf16, fit
from bench import lora as lora_table
from engine import Rollout, TorchEngine, request_seed, whole_parameters
from kernels.adamw import AdamW, adamw_bf16_, first_element
from lib import estimate
from lib.checkpoint import gather_weights
from lib.lora import (
    LoraLinear,
    add_lora,
    base_policy,
    changed_share,
    load_adapter,
    lora_layers,
    save_adapter,
)
from lib.optimizer import make_optimizer
from lib.packing import pack_rollouts
from model import Qwen3

IDS = torch.arange(5, 45).view(2, 20)


def adapted(rank=4, alpha=6.0, std=0.2, **shape):
    """A tiny model with adapters that do something: B is not zero any more."""
    model = make_tiny(**shape)
    add_lora(model, rank, alpha, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, part in lora_layers(model):
            part.lora_B.normal_(std=std, generator=generator)
    return model


def plain_copy(model):
    """A model without adapters that has the weights whole_parameters gives."""
    copy = Qwen3(model.config)
    copy.load_state_dict({name: tensor.clone() for name, tensor in whole_parameters(model)})
    return copy


# ---- The formula ---------------------------------------------------------------------------------
def test_a_fresh_adapter_changes_nothing_and_is_peft_s_initial_one():
    base, model = make_tiny(), make_tiny()
    add_lora(model, rank=4, alpha=0, seed=3)
    assert torch.equal(model(IDS), base(IDS))
    layers = dict(lora_layers(model))
    assert len(layers) == 2 * 7
    for part in layers.values():
        bound = part.weight.shape[1] ** -0.5
        assert 0.8 * bound < part.lora_A.abs().max() <= bound and not part.lora_B.any()
        assert part.scale == 2.0  # alpha 0 is twice the rank
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 14 and all(".lora_" in name for name in trained)


def test_merged_weights_give_the_logits_of_the_adapters():
    model = adapted()
    merged = plain_copy(model)
    error = (model(IDS) - merged(IDS)).abs().max().item()
    change = (make_tiny()(IDS) - merged(IDS)).abs().max().item()
    print(f"adapted against merged logits: {error:.1e} off, tolerance 1e-5 (change {change:.2f})")
    assert error < 1e-5 and change > 0.1
    # A checkpoint has the same weights as a sampler.
    weights = gather_weights(model, rank=0)
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: p.shape for name, p in make_tiny().named_parameters()
    }
    assert all(torch.equal(weights[name], p) for name, p in merged.named_parameters())


def test_gradients_equal_those_of_a_literal_twin():
    """The twin computes W + scale * B A as one matrix and lets autograd do the rest."""
    generator = torch.Generator().manual_seed(1)
    linear = torch.nn.Linear(12, 20, bias=False).requires_grad_(False)
    part = LoraLinear(linear, rank=3, alpha=5.0, generator=generator)
    with torch.no_grad():
        part.lora_B.normal_(generator=generator)
    x = torch.randn(7, 12, generator=generator)
    dy = torch.randn(7, 20, generator=generator)
    (part(x) * dy).sum().backward()

    A = part.lora_A.detach().clone().requires_grad_()
    B = part.lora_B.detach().clone().requires_grad_()
    y = x @ (part.weight.detach() + 5.0 / 3 * (B @ A)).T
    (y * dy).sum().backward()
    for name, mine, twin in (("A", part.lora_A.grad, A.grad), ("B", part.lora_B.grad, B.grad)):
        error = ((mine - twin).abs().max() / twin.abs().max()).item()
        print(f"gradient of {name}: {error:.1e} off, tolerance 1e-5")
        assert error < 1e-5
    assert part.weight.grad is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_head_has_no_gradient_and_changes_none(tied):
    """nll and token_logprobs: gradients of the adapters are those with a head that trains."""
    index = torch.arange(1, 20)
    batch = {
        "input_ids_T": IDS[0],
        "cu_seqlens": torch.tensor([0, 20], dtype=torch.int32),
        "max_seqlen": 20,
        "loss_index": index,
        "shared": None,
    }
    for ask in (lambda m: m.nll(batch), lambda m: m.token_logprobs(batch)[0].sum()):
        gradients = []
        for trains in (False, True):
            model = adapted(tie_word_embeddings=tied)
            model.head_weight.requires_grad_(trains)
            ask(model).backward()
            assert (model.head_weight.grad is not None) == trains
            gradients.append([p.grad for name, p in model.named_parameters() if ".lora_" in name])
        for frozen, trained in zip(*gradients, strict=True):
            assert torch.equal(frozen, trained)


def test_bf16_rounds_the_merged_weight_once_and_can_swallow_a_small_update():
    model = adapted(std=0.2).bfloat16()
    for _, part in lora_layers(model):
        part.lora_A.data = part.lora_A.data.float()
        part.lora_B.data = part.lora_B.data.float()
        exact = part.weight.double() + part.scale * (part.lora_B.double() @ part.lora_A.double())
        assert torch.equal(part.merged_weight(part.weight), exact.to(torch.bfloat16))
    large = changed_share(model)
    for _, part in lora_layers(model):
        part.lora_B.data *= 1e-4
    small = changed_share(model)
    print(f"share of weights that change: {large:.3f}, with adapters 1e-4 as large {small:.3f}")
    assert large > 0.9 and small < 0.1


def test_the_sampler_decodes_with_a_replica_that_has_the_merged_weights(tokenizer):
    model = adapted(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=1024)
    engine = TorchEngine(model, tokenizer)
    assert engine.model is not model and not lora_layers(engine.model)
    rollouts = [Rollout({}, 0, [5, 6, 7], request_seed(i)) for i in range(4)]
    engine.generate(rollouts, 8, 1.0)
    batch = pack_rollouts(rollouts, torch.device("cpu"))
    logprobs_T, _ = model.token_logprobs(batch)
    gap_M = (logprobs_T - batch["sampler_logprobs_T"])[batch["loss_index"]]
    print(f"sampler against trainer: {gap_M.abs().max():.1e}, tolerance 1e-4")
    assert gap_M.abs().max() < 1e-4


def test_the_reference_of_rlhf_is_the_policy_without_its_adapters():
    model = adapted()
    rollouts = [Rollout({}, 0, [5, 6, 7], 1, completion_ids=[8, 9, 10])]
    rollouts[0].sampler_logprobs = [0.0] * 3
    batch = pack_rollouts(rollouts, torch.device("cpu"))
    expected, _ = make_tiny().token_logprobs(batch, temperature=0.6)
    found = rlhf.reference_logprobs(batch, rlhf.Config(lora_rank=4))
    assert torch.equal(found, expected)
    changed, _ = model.token_logprobs(batch, temperature=0.6)
    assert not torch.allclose(changed, expected, atol=1e-2)
    with pytest.raises(ZeroDivisionError), base_policy():
        1 / 0  # noqa: B018
    assert all(part.enabled for _, part in lora_layers(model))


# ---- On the disk ---------------------------------------------------------------------------------
def test_an_adapter_comes_back_and_one_of_another_base_is_refused(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, "models/base")
    again = make_tiny()
    add_lora(again, 4, 6.0, seed=9)
    load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    other = make_tiny(seed=8)
    add_lora(other, 4, 6.0, seed=9)
    with pytest.raises(ValueError, match="not the weights beside which .*adapter_model"):
        load_adapter(other, tmp_path)


def test_peft_opens_the_adapter_and_computes_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = adapted(vocab_size=64)
    make_tiny(vocab_size=64).save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        error = (theirs(IDS).logits - model(IDS)).abs().max().item()
        merged = theirs.merge_and_unload()(IDS).logits
    print(f"peft's logits: {error:.1e} off, merged {(merged - model(IDS)).abs().max():.1e}")
    assert error < 1e-4


# ---- bf16 AdamW ----------------------------------------------------------------------------------
def test_rounding_does_not_depend_on_how_a_parameter_is_sharded():
    """Two halves that step by themselves end bit for bit where the whole one does."""

    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(11, 4, generator=generator).bfloat16()
    gradient = torch.randn(11, 4, generator=generator)

    def step(rows, first):
        p = whole[rows].clone()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        adamw_bf16_(p, gradient[rows], m, v, lr=1e-2, step=1, seed=7, first=first)
        return torch.cat([p, m, v])

    expected = step(slice(0, 11), 0).view(3, 11, 4)
    parts = [step(slice(0, 6), 0).view(3, 6, 4), step(slice(6, 11), 24).view(3, 5, 4)]
    assert torch.equal(torch.cat(parts, dim=1), expected)
    shifted = step(slice(6, 11), 0).view(3, 5, 4)
    assert not torch.equal(shifted, parts[1]), "the place of a shard does not count"
    assert first_element(whole) == 0


def test_the_optimizer_of_the_flags_steps_what_trains():
    model = adapted()
    optimizer = make_optimizer(model, mathrl.Config(lora_rank=4))
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 28 and isinstance(optimizer, torch.optim.AdamW)
    whole = make_optimizer(make_tiny().bfloat16(), mathrl.Config(optimizer="adamw_bf16", lr=3e-4))
    assert isinstance(whole, AdamW) and whole.defaults["lr"] == 3e-4
    for flags in ({"optimizer": "sgd"}, {"optimizer": "adamw_bf16", "lora_rank": 4}):
        with pytest.raises(SystemExit):
            make_optimizer(model, mathrl.Config(**flags))


def test_stochastic_rounding_delivers_what_rounding_to_nearest_loses(capsys):
    """The paper's RL rate on weights of standard deviation 0.02; bench/README.md has the table."""
    generator = torch.Generator().manual_seed(0)
    p = (0.02 * torch.randn(1 << 18, generator=generator)).bfloat16()
    found = bf16.measure(p, 2e-6, 5, generator)
    (_, lost), (moved, arrives) = found["nearest"], found["stochastic"]
    print(f"arrives: to nearest {lost:.3f}, stochastic {arrives:.3f}, tolerance 0.1")
    assert lost < 0.05 and 0.01 < moved < 0.05
    assert abs(arrives - 1) < 0.1
    bf16.main(bf16.Config())
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2e-06")]
    cells = rows[0].removeprefix("| 2e-06")
    assert cells in (ROOT / "bench" / "README.md").read_text()


# ---- The plan ------------------------------------------------------------------------------------
def test_the_plan_counts_adapters_and_bf16_byte_for_byte():
    model = adapted(rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    model(IDS).sum().backward()
    optimizer.step()
    adapters = [p for p in model.parameters() if p.requires_grad]
    moments = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    measured = sum(p.nbytes + p.grad.nbytes for p in adapters) + sum(t.nbytes for t in moments)
    planned = estimate.memory_plan(model.config, 1, 8, 8, gpu=False, method="lora", lora_rank=4)
    assert planned["update"]["adapters"] == measured
    base = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert planned["update"]["weights"] == base
    assert planned["update"]["optimizer"] == planned["update"]["gradients"] == 0

    model = make_tiny().bfloat16()
    optimizer = AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    planned = estimate.memory_plan(model.config, 1, 8, 8, gpu=False, method="adamw_bf16")["update"]
    assert planned["weights"] == sum(p.nbytes for p in model.parameters())
    assert planned["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert planned["optimizer"] == sum(t.nbytes for t in moments)


# ---- Whole runs ----------------------------------------------------------------------------------
def train(stage, out, init_from, world, steps, ranks=1, **flags):
    arguments = command(stage, world, out, init_from, num_steps=steps, **flags)
    return run_python(*arguments, ranks=ranks, check=False)


def weights_of(folder, name="adapter/adapter_model.safetensors"):
    return load_file(folder / "final" / name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", DATA)
def test_every_stage_trains_adapters_by_one_flag(stage, world, taught, tmp_path):
    """`final` is a merged folder with the adapter beside it: base + scale * B A, to rounding."""
    out = tmp_path / "run"
    code, printed, errors = train(stage, out, taught, world, 2, lora_rank=4, lr=1e-2)
    assert code == 0, errors
    if stage != "sft":
        assert "lora: the first step changes" in printed
    base, merged = load_file(taught / "model.safetensors"), weights_of(out, "model.safetensors")
    adapter = weights_of(out)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name]
        if f"{key}.lora_A.weight" in adapter:
            update = adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            expected = expected + 2.0 * update
        assert torch.allclose(tensor, expected, atol=1e-6), name
    saved = json.loads((out / "final" / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 4 and saved["base_model_name_or_path"] == str(taught)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {"optimizer": "adamw_bf16"}])
def test_a_resumed_run_is_a_straight_run_and_two_ranks_are_one(flags, world, taught, tmp_path):
    flags = {**flags, "lr": 1e-2}
    name = "model.safetensors"
    if "lora_rank" in flags:
        name = "adapter/adapter_model.safetensors"

    def run(folder, steps, ranks=1):
        code, _, errors = train("sft", folder, taught, world, steps, ranks, **flags)
        assert code == 0, errors
        return weights_of(folder, name)

    straight = run(tmp_path / "straight", 4)
    run(tmp_path / "resumed", 2)
    resumed = run(tmp_path / "resumed", 4)
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)

    # One step on two ranks. Their gradients differ by the rounding of fp32, so that now and then a
    # bf16 number falls on the next one.
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 1, ranks=2)
    errors = [(two[key].float() - one[key].float()).abs().max().item() for key in one]
    differ = sum((two[key] != one[key]).sum().item() for key in one)
    total = sum(tensor.numel() for tensor in one.values())
    print(f"two ranks against one: {max(errors):.1e} at most; {differ} of {total} numbers differ")
    if "lora_rank" in flags:
        assert max(errors) < 1e-4
    else:
        assert differ < 0.005 * total


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_adapters_go_on_on_another_number_of_ranks(first, then, world, taught, tmp_path):
    """To rounding, as weights do: two steps on some ranks, and two more on others."""

    def run(folder, steps, ranks):
        code, _, errors = train("sft", folder, taught, world, steps, ranks, lora_rank=4, lr=1e-2)
        assert code == 0, errors
        return weights_of(folder)

    straight = run(tmp_path / "straight", 4, 1)
    before = run(tmp_path / "moved", 2, first)
    moved = run(tmp_path / "moved", 4, then)
    error = max((moved[key] - straight[key]).abs().max().item() for key in straight)
    change = max((moved[key] - before[key]).abs().max().item() for key in straight)
    print(f"{first} ranks, then {then}: {error:.1e} off, tolerance 1e-3 (two steps: {change:.1e})")
    assert error < 1e-3 and change > 1e-2


@pytest.mark.slow
def test_a_run_is_resumed_only_as_it_was_begun(world, taught, tmp_path):
    run = tmp_path / "run"
    assert train("sft", run, taught, world, 1, lora_rank=4)[0] == 0
    for flags in ({}, {"lora_rank": 8}):
        code, _, errors = train("sft", run, taught, world, 2, **flags)
        assert code == 2 and "was trained with --lora_rank=4, now" in errors, errors
    # Another base, under the name of the first.
    code, _, errors = train("sft", run, world / "base", world, 2, lora_rank=4)
    assert code == 2 and "these are not the weights beside which" in errors, errors
    # `final` is a model like any other: it starts a run of any kind.
    assert train("sft", tmp_path / "full", run / "final", world, 1)[0] == 0
    code, _, errors = train("sft", tmp_path / "full", taught, world, 2, lora_rank=4)
    assert code == 2 and "was trained with --lora_rank=0, now 4" in errors, errors
    code, _, errors = train("sft", tmp_path / "negative", taught, world, 2, lora_rank=-1)
    assert code == 2 and "--lora_rank=-1: expected a number from 0" in errors


def test_the_page_has_the_table_of_the_plan(capsys):
    """8B trains on one card of 80 GB with LoRA, 4B on 48, 1.7B on 24; the page says what is printed
    by the command that it names."""
    fit.main(fit.Config())
    printed = capsys.readouterr().out.partition("\nSFT")[0]
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    page = (ROOT / "bench" / "README.md").read_text()
    assert len(rows) == 6 and all(row in page for row in rows)
    with_lora = {}
    for row in rows[1:]:
        size, *cells = row[2:-2].split(" | ")
        with_lora[size] = [one.split(" / ")[2] for one in cells]
    assert with_lora["8B"][2] != "-" and with_lora["4B"][1] != "-" and with_lora["1.7B"][0] != "-"


def test_gains_and_losses_are_those_of_a_pencil(tmp_path, capsys):
    """Two skills, two seeds: Math RL gains 40 and costs IF 10, and IF-RL's gain is half lost."""
    scores = {  # stage: points of (if no_think, math think), for seeds 0 and 1
        "sft": ((20, 50), (20, 50)),
        "ifrl": ((40, 48), (60, 50)),
        "mathrl": ((30, 88), (50, 90)),
    }
    for seed in (0, 1):
        lines = []
        for stage, by_seed in scores.items():
            columns = (("if", "no_think"), ("math", "think"))
            for (task, mode), points in zip(columns, by_seed[seed], strict=True):
                line = {"stage": stage, "task": task, "mode": mode, "decoding": "paper"}
                lines.append(json.dumps({**line, "score": points / 100}))
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.jsonl").write_text("\n".join(lines))
    folders = f"{tmp_path}/0,{tmp_path}/1"
    lora_table.main(lora_table.Config(full=folders, other=f"{tmp_path}/0"))
    printed = capsys.readouterr().out
    assert "| ifrl | +30.0 [+20.0, +40.0] | +20.0 | -1.0 [-2.0, +0.0] | -2.0 |" in printed
    assert "| mathrl | +40.0 [+40.0, +40.0] | +40.0 | -10.0 [-10.0, -10.0] | -10.0 |" in printed
    assert "full -5.0 [-5.0, -5.0], other -5.0" in printed
