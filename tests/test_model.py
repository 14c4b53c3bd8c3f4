"""Our Qwen3 equals that of transformers: all five shapes, YaRN, folders in both directions; and a
sequence has the same logits packed, padded and alone.

Everything runs in float32 on the CPU with random weights. The norm weights are random too, because
norm weights of 1 hide mistakes. With test_engine.py this shows that a log-prob means the same
thing wherever it is computed: in the sampler, in the trainer, in transformers.
"""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM
from transformers import Qwen3Config as TheirConfig

from kernels import attention
from lib.packing import shared_prefixes
from model import (
    QWEN3_SIZES,
    Checkpointing,
    Qwen3,
    Qwen3Config,
    hf_config,
    max_positions,
    packed_batch,
    read_config,
    rope_tables,
)

PUBLISHED = {
    "0.6b": 0.596049920e9,
    "1.7b": 1.720574976e9,
    "4b": 4.022468096e9,
    "8b": 8.19073536e9,
    "14b": 14.7683072e9,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


def scaled_down(size, **changes):
    """A model of one of the five shapes, 64 times smaller. It keeps the ratios of query to kv
    heads and of MLP to width, and whether the embeddings are tied."""
    full = Qwen3Config(**QWEN3_SIZES[size])
    shape = dict(
        vocab_size=211,
        hidden_size=full.hidden_size // 64,
        intermediate_size=full.intermediate_size // 64,
        num_hidden_layers=3,
        num_attention_heads=full.num_attention_heads,
        num_key_value_heads=full.num_key_value_heads,
        head_dim=16,
        rope_theta=full.rope_theta,
        max_position_embeddings=128,
        tie_word_embeddings=full.tie_word_embeddings,
    )
    return make_tiny(std=0.1, **{**shape, **changes})


def theirs(model, folder):
    """Load the same weights in transformers, from a folder that ours has saved. Eager attention is
    the plain formula."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def random_ids(*shape, vocab=211, seed=0):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(got, expected, tolerance, what):
    error = (got - expected).abs().max().item()
    print(f"{what}: max error {error:.1e}, tolerance {tolerance:.0e}")
    assert error < tolerance


@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_logits_equal_those_of_transformers(size, yarn, tmp_path):
    model = scaled_down(size, rope_scaling=YARN if yarn else {})
    ids = random_ids(2, 96)  # more than the 64 positions that YaRN stretches
    with torch.no_grad():
        ours, reference = model(ids), theirs(model, tmp_path)(ids).logits
    assert ours.std() > 0.3, "logits this flat would be equal whatever the model did"
    close(ours, reference, 1e-5, f"{size} logits of size {ours.abs().max():.1f}")


def test_yarn_changes_the_logits():
    """The test above would pass if neither side read rope_scaling."""
    ids = random_ids(1, 96)
    with torch.no_grad():
        plain = scaled_down("8b")(ids)
        stretched = scaled_down("8b", rope_scaling=YARN)(ids)
    assert (plain - stretched).abs().max() > 1e-2


def test_packed_equals_padded_equals_alone(tmp_path):
    model = scaled_down("8b")
    reference = theirs(model, tmp_path)
    lengths = [7, 31, 1, 18, 2]
    rows = [random_ids(n, seed=n) for n in lengths]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    with torch.no_grad():
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        hidden = model.packed_hidden(torch.cat(rows), cu_seqlens, max(lengths))
        packed = F.linear(hidden, model.head_weight).split(lengths)

        # transformers gets the rows as one batch, padded at the left.
        longest = max(lengths)
        ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
        seen = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        padded = reference(ids, attention_mask=seen, position_ids=positions).logits
        for i, row in enumerate(rows):
            alone = model(row[None])[0]
            unpadded = padded[i, -len(row) :]
            close(packed[i], alone, 1e-5, f"packed against alone, {len(row)} tokens")
            close(unpadded, alone, 1e-5, f"padded transformers against alone, {len(row)} tokens")


def test_row_order_does_not_matter():
    model = scaled_down("0.6b")
    ids = random_ids(5, 23)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        close(model(ids)[order], model(ids[order]), 1e-6, "rows in another order")


def test_logprobs_are_those_of_the_logits_and_entry_t_is_about_token_t():
    model = scaled_down("4b")
    row = random_ids(20)
    temperature = 0.7
    index = torch.arange(5, 20)
    with torch.no_grad():
        batch = packed_batch(row, torch.tensor([0, 20], dtype=torch.int32), 20, index)
        logprobs, entropy = model.token_logprobs(batch, temperature=temperature)
        nll = model.nll(batch)
        table = torch.log_softmax(model(row[None])[0] / temperature, -1)
        plain = torch.log_softmax(model(row[None])[0], -1)
    assert not logprobs[:5].any() and not entropy[:5].any(), "tokens that are not scored have 0"
    for t in range(5, 20):
        expected_entropy = -(table[t - 1].exp() * table[t - 1]).sum()
        assert abs(logprobs[t] - table[t - 1, row[t]]) < 1e-5, f"token {t}"
        assert abs(entropy[t] - expected_entropy) < 1e-5, f"token {t}"
    close(nll, -plain[torch.arange(4, 19), row[5:]].sum(), 1e-4, "summed negative log-likelihood")


def test_a_saved_folder_opens_in_transformers_and_gives_the_same_greedy_tokens(tmp_path):
    for size in ("0.6b", "8b"):  # the embeddings of the first are tied
        model = scaled_down(size)
        prompt = random_ids(1, 9)
        reference = theirs(model, tmp_path / size)
        ids = prompt
        for _ in range(20):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        generated = reference.generate(
            prompt,
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert generated.tolist() == ids.tolist()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
def test_a_folder_of_transformers_opens_in_ours(tied, yarn, tmp_path):
    rope = {"rope_theta": 1e6, **(YARN if yarn else {"rope_type": "default"})}
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(
        TheirConfig(
            vocab_size=211,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            rope_parameters=rope,
        )
    ).eval()
    # A small limit makes transformers write several files.
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = random_ids(2, 96)
    with torch.no_grad():
        ours = Qwen3.from_pretrained(tmp_path)(ids)
        close(ours, reference(ids).logits, 1e-5, "transformers -> ours")


def test_rope_settings_are_read_in_the_spelling_of_transformers_4_too(tmp_path):
    model = scaled_down("8b", rope_scaling=YARN)
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 1e6, "rope_scaling": YARN}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == model.config


def test_rope_factor_switches_yarn_on(tmp_path):
    scaled_down("8b", max_position_embeddings=40960).save_pretrained(tmp_path)
    loaded = Qwen3.from_pretrained(tmp_path, rope_factor=2.0)
    assert loaded.config.rope_scaling == {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32768,
    }
    assert loaded.max_positions() == 65536
    loaded.save_pretrained(tmp_path / "again")
    again = read_config(tmp_path / "again")
    assert again.rope_scaling == loaded.config.rope_scaling
    assert again.max_position_embeddings == 65536, "vLLM serves that many tokens, no more"
    for a, b in zip(rope_tables(again, 300), rope_tables(loaded.config, 300), strict=True):
        assert torch.equal(a, b)


def test_save_then_load_is_bitwise_equal(tmp_path):
    for size in ("1.7b", "14b"):
        model = scaled_down(size, rope_scaling=YARN)
        model.save_pretrained(tmp_path / size)
        loaded = Qwen3.from_pretrained(tmp_path / size)
        assert loaded.config == model.config
        saved, opened = dict(model.named_parameters()), dict(loaded.named_parameters())
        assert list(saved) == list(opened)
        for name in saved:
            assert torch.equal(saved[name], opened[name]), name


def broken(tmp_path, change, size="8b"):
    """A saved folder whose tensors, a dictionary by name, change() has changed in place."""
    scaled_down(size).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_a_missing_tensor_is_named(tmp_path):
    name = "model.layers.1.self_attn.q_norm.weight"
    with pytest.raises(ValueError, match=f"1 tensors are missing, first {name}"):
        Qwen3.from_pretrained(broken(tmp_path, lambda state: state.pop(name)))


def test_an_unknown_tensor_is_named(tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"

    def add_a_bias(state):
        state[name] = torch.zeros(4)

    with pytest.raises(ValueError, match=f"unknown tensor {name}"):
        Qwen3.from_pretrained(broken(tmp_path, add_a_bias))


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    def shrink(state):
        state["model.norm.weight"] = torch.zeros(3)

    with pytest.raises(ValueError, match=r"model.norm.weight is \(3,\), expected \(64,\)"):
        Qwen3.from_pretrained(broken(tmp_path, shrink))


def test_the_copy_of_a_tied_head_is_left_alone(tmp_path):
    def copy(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    assert Qwen3.from_pretrained(broken(tmp_path, copy, size="0.6b")).lm_head is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen3'"),
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe', expected 'qwen3'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}, "rope_scaling": None},
            "rope_type 'llama3' is not supported",
        ),
        ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
    ],
)
def test_another_architecture_is_refused(change, message, tmp_path):
    scaled_down("8b").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Qwen3.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", QWEN3_SIZES)
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        model = Qwen3(Qwen3Config(**QWEN3_SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[size]


def gradients(checkpointing, dtype=torch.float32):
    """Gradients of log-probs and entropies of a packed batch, in a model of four layers."""
    model = make_tiny(num_hidden_layers=4).to(dtype)
    model.checkpointing = checkpointing
    cu_seqlens = torch.tensor([0, 12, 40], dtype=torch.int32)
    scored = torch.cat([torch.arange(1, 12), torch.arange(13, 40)])
    batch = packed_batch(random_ids(40, vocab=61), cu_seqlens, 28, scored)
    logprobs_T, entropy_T = model.token_logprobs(batch)
    (logprobs_T + 0.1 * entropy_T).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_bit_of_a_gradient(dtype):
    """Of all layers or of some. In bf16 every sum has to be rounded equally often, too."""
    kept = gradients(Checkpointing(), dtype)
    for layers in (1, 4):
        again = gradients(Checkpointing(layers), dtype)
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_attention_that_is_kept_over_a_checkpoint_runs_once_and_changes_no_bit(monkeypatch):
    """The autograd node is that of GPUs, with PyTorch's attention in the place of the kernels.
    tests/kernel_checks.py has the kernels themselves."""
    runs = []

    def forward(*args):
        runs.append(1)
        return attention.flash_attention_varlen_ref(*args), torch.zeros(())

    def backward(dout, q, k, v, cu_seqlens, max_seqlen):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attention.flash_attention_varlen_ref(*inputs, cu_seqlens, max_seqlen)
        return torch.autograd.grad(out, inputs, dout)

    def backward_q(dout, q, k, v, out, lse, *where):
        return backward(dout, q, k, v, *where)[0], None

    def backward_kv(dout, q, k, v, lse, delta, *where):
        return backward(dout, q, k, v, *where)[1:]

    monkeypatch.setattr(attention, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(attention, "forward_triton", forward)
    monkeypatch.setattr(attention, "backward_q_triton", backward_q)
    monkeypatch.setattr(attention, "backward_kv_triton", backward_kv)
    found = []
    for checkpointing in (Checkpointing(), Checkpointing(4), Checkpointing(4, attention=3)):
        runs.clear()
        found.append((gradients(checkpointing), len(runs)))
    assert [num_runs for _, num_runs in found] == [4, 8, 5]
    for again, _ in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][0], again, strict=True))


def test_inputs_of_layers_that_wait_in_host_memory_change_no_bit(monkeypatch):
    """save_on_cpu gets one tensor of [T, D] a layer, and nothing that is inside a layer."""
    copied = []

    class SaveOnCpu(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            def pack(tensor):
                if tensor.is_floating_point():
                    copied.append(tuple(tensor.shape))
                return tensor.clone()

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr("model.save_on_cpu", SaveOnCpu)
    kept = gradients(Checkpointing())
    assert copied == []
    moved = gradients(Checkpointing(3, offload=True))
    assert copied == 3 * [(40, 32)]
    assert all(torch.equal(a, b) for a, b in zip(kept, moved, strict=True))


def worst_relative_norm(got, expected):
    """The largest norm of a difference, relative to the norm of the expected tensor."""
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        worst = max(worst, ((a - b).norm() / b.norm()).item())
    return worst


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_sequences_begin_with_alike_is_computed_once_and_nothing_changes(checkpointing):
    """Log-probs, entropies, the SFT loss and all gradients are compared with those of computing
    every token for itself. The relative tolerance is 1e-5.

    The sequences are samples of two prompts and a lone one. Of the first prompt's samples two are
    the same, and the third ends inside them.
    """

    def draw(n, seed):
        return random_ids(n, vocab=61, seed=seed).tolist()

    first, second, tail = draw(20, 1), draw(9, 2), draw(7, 3)
    sequences = [
        first + tail,
        second + draw(5, 4),
        first + tail[:4],
        draw(6, 5),
        first + tail,
        second + draw(8, 6),
    ]
    # The loss counts the last tokens of each sequence.
    index, cu_seqlens = [], [0]
    for sequence, num_scored in zip(sequences, (7, 5, 4, 2, 7, 8), strict=True):
        cu_seqlens.append(cu_seqlens[-1] + len(sequence))
        index += range(cu_seqlens[-1] - num_scored, cu_seqlens[-1])
    index = torch.tensor(index)
    weight_M = torch.randn(len(index), generator=torch.Generator().manual_seed(7))
    ids = torch.tensor(sum(sequences, []))
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    shared = shared_prefixes(sequences, "cpu")
    found = []
    for prefixes in (shared, None):
        model = make_tiny()
        model.checkpointing = Checkpointing(2 if checkpointing else 0)
        batch = packed_batch(ids, cu_seqlens, 27, index, prefixes)
        logprobs_T, entropy_T = model.token_logprobs(batch, temperature=0.7)
        nll = model.nll(batch)
        loss = (weight_M * (logprobs_T + entropy_T)[index]).sum() + nll
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        found.append([logprobs_T.detach(), entropy_T.detach(), nll.detach(), *gradients])
    worst = worst_relative_norm(*found)
    print(
        f"{len(shared[0])} of {len(shared[1])} tokens computed: "
        f"worst relative difference {worst:.1e} (limit 1e-5)"
    )
    assert worst < 1e-5 and len(shared[0]) == 20 + 7 + 9 + 5 + 8 + 6


def test_rows_nobody_reads_leave_the_last_layer_and_change_nothing(tiny):
    """Only rows that are scored go through the last layer's o_proj and MLP. The slow way computes
    every row and picks the scored ones afterwards."""
    ids = random_ids(40, vocab=61)
    cu_seqlens = torch.tensor([0, 11, 17, 40], dtype=torch.int32)
    keep = torch.tensor([3, 4, 9, 15, 16, 30, 38])
    fast = tiny.packed_hidden(ids, cu_seqlens, 23, keep)
    slow = tiny.packed_hidden(ids, cu_seqlens, 23)[keep]
    found = []
    for hidden in (fast, slow):
        loss = hidden.square().sum() + hidden[:, 0].sum()
        found.append([hidden, *torch.autograd.grad(loss, list(tiny.parameters()))])
    worst = worst_relative_norm(*found)
    print(f"hidden states and gradients: worst relative difference {worst:.1e} (limit 1e-5)")
    assert worst < 1e-5


def test_the_head_of_a_big_vocabulary_takes_longer_chunks_and_the_same_loss(monkeypatch):
    """On CPUs linear_cross_entropy takes chunks of 512 tokens if the weight is big, and of 128
    tokens if it is as small as this one."""
    from kernels import linear_cross_entropy as op

    hidden = torch.randn(1100, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4000, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4000, (1100,))
    results = []
    for big in (op.BIG, 0):
        monkeypatch.setattr(op, "BIG", big)
        loss = op.linear_cross_entropy(hidden, weight, target)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    loss = op.linear_cross_entropy_ref(hidden, weight, target)
    exact = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    worst = 0.0
    for got in results:
        for a, b in zip(got, exact, strict=True):
            worst = max(worst, ((a - b).abs().max() / b.abs().max()).item())
    print(f"worst relative difference {worst:.1e} (limit 1e-12)")
    assert worst < 1e-12


def test_chunks_of_the_head_on_gpus_are_equal_and_as_long_as_memory_allows():
    """4096 tokens of Qwen3's vocabulary, half of that beside a frozen head, more of a small one."""
    from kernels.linear_cross_entropy import tokens_of_chunk

    found = [tokens_of_chunk(n, 151936, frozen=False) for n in (0, 1, 4096, 4097, 32768, 33000)]
    assert found == [1, 1, 4096, 2049, 4096, 3667]
    assert tokens_of_chunk(32768, 151936, frozen=True) == 2048
    assert tokens_of_chunk(32768, 8192, frozen=False) == 32768


def test_the_factor_of_a_loss_is_not_rounded_to_bf16():
    """SFT multiplies its sum by 8 ranks / 1,234,567 tokens. As a bf16 number that is off by 0.2%,
    and so would be every gradient; products of bf16 numbers are right on average."""
    from kernels.linear_cross_entropy import linear_cross_entropy

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(9000, 64, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(9000, (300,), generator=generator)
    factor = 8 / 1_234_567
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))
    scaled = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, target) * factor, (hidden, weight)
    )
    for a, b in zip(plain, scaled, strict=True):
        ratio = (b.double() * a.double()).sum() / (a.double() ** 2).sum() / factor
        print(f"factor {ratio - 1:+.1e} off, tolerance 1e-04")
        assert abs(ratio - 1) < 1e-4


def test_gradient_checkpointing_keeps_no_random_states(tiny, monkeypatch):
    """Nothing in a layer is random."""
    states = []
    get_state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(1) or get_state())
    tiny.checkpointing = Checkpointing(2)
    tiny(torch.tensor([[1, 2, 3]])).sum().backward()
    assert not states


@pytest.mark.parametrize("factor", [2.0, 4.0])
def test_yarn_at_the_real_head_width_is_that_of_transformers(factor):
    """A small head has only eight frequencies, which hide how the ends of YaRN's ramp are
    rounded."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = Qwen3Config(
        rope_scaling={
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": 32768,
        }
    )
    values = hf_config(ours)
    del values["architectures"], values["model_type"]
    inv_freq, scale = ROPE_INIT_FUNCTIONS["yarn"](TheirConfig(**values), "cpu")
    cos_TH, sin_TH = rope_tables(ours, 2)
    angle_H = torch.atan2(sin_TH[1], cos_TH[1])
    assert torch.allclose(angle_H, inv_freq, rtol=1e-5, atol=0)
    assert torch.allclose(cos_TH[0], torch.full((64,), scale))


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_yarn_is_switched_on_as_the_page_says(factor, tmp_path):
    """The fields of bench/README.md in a config.json without YaRN give what --rope_factor gives."""
    page = (ROOT / "bench" / "README.md").read_text()
    fields = re.search(r"### Beyond 32K tokens.*?```json\n(.*?)```", page, re.DOTALL)[1]
    if factor == 3.0:
        fields = fields.replace("2.0", "3.0").replace("65536", "98304")
    scaled_down("8b", max_position_embeddings=32768).save_pretrained(tmp_path)
    expected = Qwen3.from_pretrained(tmp_path, rope_factor=factor).config
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | json.loads(fields)))

    ours = read_config(tmp_path)
    assert ours.rope_scaling == expected.rope_scaling and ours.rope_theta == expected.rope_theta
    assert max_positions(ours) == max_positions(expected) == factor * 32768
    theirs = TheirConfig.from_pretrained(tmp_path)
    written = hf_config(expected)
    assert theirs.rope_parameters == TheirConfig(**written).rope_parameters
    assert theirs.max_position_embeddings == written["max_position_embeddings"]


def test_a_stretched_checkpoint_takes_another_factor_from_the_original_length(world, tmp_path):
    own = Qwen3.from_pretrained(world / "base")
    original = own.max_positions()
    Qwen3.from_pretrained(world / "base", rope_factor=4.0).save_pretrained(tmp_path)
    assert Qwen3.from_pretrained(tmp_path).max_positions() == 4 * original
    assert Qwen3.from_pretrained(tmp_path, rope_factor=2.0).max_positions() == 2 * original
