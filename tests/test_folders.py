"""Guards: Hugging Face folders that others wrote are read as their owners meant them, or refused by
name; folders that we write open elsewhere without a warning, and serve as the model card asks."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import Qwen3Config as TheirConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import coderl
from engine import Rollout, TorchEngine
from lib import checkpoint
from model import (
    Checkpointing,
    Qwen3,
    find_file,
    load_tokenizer,
    read_config,
    save_tokenizer,
    stop_ids,
    tokenizer_files,
)

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}


@pytest.fixture()
def folder(tmp_path):
    """A saved tiny model, untied."""
    make_tiny(tie_word_embeddings=False).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value != "removed"}))


def refuses(folder, *words):
    with pytest.raises(ValueError) as error:
        Qwen3.from_pretrained(folder)
    print(error.value)
    for word in words:
        assert word in str(error.value)


# ---- config.json ---------------------------------------------------------------------------------
# What our own fields do not hold, in transformers' Qwen3, and another value of it.
OTHER_VALUES = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_dropout": 0.1,
}
# Fields of transformers' Qwen3 that change no logit by themselves.
NEUTRAL = {
    "transformers_version",
    "architectures",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "dtype",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "initializer_range",
    "use_cache",
    "sliding_window",
    "max_window_layers",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "_name_or_path",
    "model_type",
    "rope_parameters",
}


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_field_that_changes_the_computation_is_refused_by_name(name, folder):
    edit_config(folder, **{name: OTHER_VALUES[name]})
    refuses(folder, "config.json", name)


def test_every_field_of_transformers_qwen3_is_read_or_refused_or_neutral():
    """A field that a later transformers adds turns this red."""
    ours = set(read_config.__globals__["Qwen3Config"].__dataclass_fields__)
    assert TheirConfig().to_dict().keys() - ours - OTHER_VALUES.keys() == NEUTRAL


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        {"partial_rotary_factor": 0.5},
        {"num_key_value_heads": None},
        {"rope_theta": "removed", "rope_parameters": "removed"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_fields_of_other_models_and_gaps_are_refused_by_name(changes, folder):
    edit_config(folder, **changes)
    refuses(folder, "config.json", next(iter(changes)))


@pytest.mark.parametrize("rope_type", sorted(ROPE_INIT_FUNCTIONS.keys() - {"yarn"}))
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_every_other_kind_of_rope_is_refused_by_name(rope_type, spelling, folder):
    kind = "rope_type" if spelling == "rope_parameters" else "type"
    rope = {kind: rope_type, "factor": 2.0, "rope_theta": 1e4}
    edit_config(folder, rope_parameters=None, rope_scaling=None)
    edit_config(folder, **{spelling: rope})
    refuses(folder, rope_type)


@pytest.mark.parametrize(
    "extra",
    [
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"truncate": False},
        {"partial_rotary_factor": 0.5},
        {"short_factor": [1.0]},
        {"factor": None},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_field_of_yarn_that_is_not_read_is_refused_by_name(extra, folder):
    edit_config(folder, rope_parameters={**YARN, "rope_theta": 1e4, **extra})
    refuses(folder, next(iter(extra)))


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 1.3},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"truncate": True, "partial_rotary_factor": 1.0, "mscale": None},
        {"original_max_position_embeddings": None},
    ],
    ids=lambda extra: next(iter(extra), "plain"),
)
def test_a_yarn_of_others_gives_their_logits(extra, folder):
    rope = {**YARN, "rope_theta": 1e4, **extra}
    rope = {name: value for name, value in rope.items() if value is not None}
    edit_config(folder, rope_parameters=rope, max_position_embeddings=128)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = Qwen3.from_pretrained(folder)
    ids = torch.randint(0, 61, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        off = (theirs(ids).logits - ours(ids)).abs().max().item()
    print(f"largest difference of a logit {off:.1e}, tolerance 1e-04")
    assert off < 1e-4 and ours.max_positions() == 256


# ---- Weights -------------------------------------------------------------------------------------
def test_two_sets_of_weights_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    part = {"model.norm.weight": state["model.norm.weight"] + 1}
    save_file(part, folder / "z_left_over.safetensors")
    refuses(folder, "two sets of weights", "model.safetensors", "z_left_over.safetensors")


def test_a_file_of_other_tensors_is_left_alone_as_transformers_does(folder):
    expected = Qwen3.from_pretrained(folder).state_dict()
    save_file({"running_mean": torch.zeros(3)}, folder / "a_statistic.safetensors")
    found = Qwen3.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_of_a_sharded_folder_the_files_of_the_index_are_read(folder):
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(expected)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    weight_map = {}
    for file, tensors in files.items():
        save_file({name: expected[name] for name in tensors}, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file({"other": torch.zeros(3)}, folder / "zero.safetensors")
    found = Qwen3.from_pretrained(folder).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (folder / "two.safetensors").unlink()
    refuses(folder, "two.safetensors is missing")


def test_a_head_that_differs_although_tied_is_refused(tmp_path):
    make_tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert Qwen3.from_pretrained(tmp_path).lm_head is None
    save_file(state | {"lm_head.weight": embedding + 0.01}, tmp_path / "model.safetensors")
    refuses(tmp_path, "lm_head.weight", "tie_word_embeddings")


def test_an_adapter_that_is_not_merged_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    refuses(folder, "adapter_config.json")


def test_weights_that_are_no_safetensors_are_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, "no file that ends in .safetensors", "pytorch_model.bin")


def test_a_hub_id_is_answered_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B"):
        find_file("Qwen/Qwen3-8B", "config.json")
    (tmp_path / "out").mkdir()
    for path in ("out/none", "none", str(tmp_path / "none"), "a/b/c"):
        with pytest.raises(ValueError, match="no such folder$"):
            find_file(path, "config.json")


# ---- YaRN ----------------------------------------------------------------------------------------
def test_code_rl_leaves_the_yarn_of_a_checkpoint_alone():
    assert coderl.Config().rope_factor == 0.0


@pytest.mark.parametrize(
    "positions, advice",
    [(40960, "lower it, or pass --rope_factor=3."), (32768, "--rope_factor=3."), (4096, "it.")],
)
def test_stretching_is_advised_to_models_of_qwen3_s_context(
    positions, advice, world, tmp_path, capsys, monkeypatch
):
    shutil.copytree(world / "base", tmp_path / "model")
    edit_config(tmp_path / "model", max_position_embeddings=positions)
    monkeypatch.setattr(checkpoint, "check_memory", lambda *args: (Checkpointing(), False))
    cfg = coderl.Config(init_from=str(tmp_path / "model"), out_dir=str(tmp_path / "out"))
    cfg.max_new_tokens = 70_000
    with pytest.raises(SystemExit):
        checkpoint.load_policy(cfg, 1, torch.device("cpu"))
    said = capsys.readouterr().err
    assert f"over the {positions} positions" in said and f"{advice} Nothing was trained." in said
    assert ("--rope_factor" in said) == (positions >= 32768)


@pytest.mark.parametrize("positions, original", [(40960, 32768), (32768, 32768), (262144, 262144)])
def test_yarn_stretches_the_context_that_the_model_was_trained_on(positions, original, folder):
    edit_config(folder, max_position_embeddings=positions)
    model = Qwen3.from_pretrained(folder, rope_factor=2.0)
    assert model.config.rope_scaling["original_max_position_embeddings"] == original
    assert model.max_positions() == 2 * original


# ---- Tokenizer and stop tokens -------------------------------------------------------------------
def test_stop_tokens_of_generation_config_end_a_completion_and_are_kept(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "a")
    model, tokenizer = Qwen3.from_pretrained(tmp_path / "a"), load_tokenizer(tmp_path / "a")
    prompt = tokenizer.encode("What is 2 + 2?").ids

    def sample(tokenizer):
        rollout = Rollout({}, 0, prompt, seed=1)
        TorchEngine(model, tokenizer).generate([rollout], 12, 1.0)
        return rollout

    # The third token that is drawn becomes a stop token of the folder.
    stop = sample(tokenizer).completion_ids[2]
    for stops in ([stop], stop):
        path = tmp_path / "a" / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": stops}))
        tokenizer = load_tokenizer(tmp_path / "a")
        rollout = sample(tokenizer)
        assert rollout.completion_ids[-1] == stop and rollout.finish_reason == "stop"
    save_tokenizer(tmp_path / "a", tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == stop_ids(tokenizer) and stop in saved["eos_token_id"]
    assert stop_ids(load_tokenizer(tmp_path / "b")) == stop_ids(tokenizer)


def test_a_checkpoint_is_saved_although_init_from_is_gone(world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    model = Qwen3.from_pretrained(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    cfg = coderl.Config(init_from=str(tmp_path / "base"))
    folder = checkpoint.save_checkpoint(str(tmp_path), 1, model, optimizer, cfg, {})
    assert tokenizer_files(folder).keys() >= {"tokenizer.json", "generation_config.json"}
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(world / "base").get_vocab()


# ---- Our folders elsewhere -----------------------------------------------------------------------
@pytest.fixture()
def warnings_of_transformers():
    """What transformers logs as a warning or worse."""
    seen = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


@pytest.mark.parametrize("rope_factor", [0.0, 2.0])
def test_a_saved_folder_opens_in_transformers_without_a_warning(
    rope_factor, world, tmp_path, warnings_of_transformers
):
    model = Qwen3.from_pretrained(world / "base", rope_factor=rope_factor)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    folder = checkpoint.save_checkpoint(
        str(tmp_path), 1, model, optimizer, coderl.Config(init_from=str(world / "base")), {}
    )
    AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert warnings_of_transformers == []

    # A server that samples by the folder's own settings samples as the model card asks.
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.temperature, settings.top_p, settings.do_sample) == (0.6, 0.95, True)
    stops = SimpleNamespace(token_to_id=load_tokenizer(folder).token_to_id)
    assert settings.eos_token_id == theirs.generation_config.eos_token_id == stop_ids(stops)
    assert warnings_of_transformers == []
