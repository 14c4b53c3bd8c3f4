"""Guards: what is asked of vLLM, in which order and how often. A stand-in records it, so no vLLM is
needed; tests/test_vllm.py asks the real one.

A GPU's memory is lent to and fro within a step. One call too few is a crash on a card where nobody
looks, one too many costs seconds a step.
"""

import json
import sys
import types
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny

import engine as module
import mathrl
import rlhf
from engine import VLLMEngine, by_turns, make_engine, request_seed
from lib import estimate, plan
from lib.estimate import vllm_cache_bytes
from model import QWEN3_SIZES, Qwen3Config

GB = 1e9


class StandIn:
    """LLMEngine, as far as engine.py knows it: it ends each request at its first token, and its
    memory is lent as vLLM's is."""

    def __init__(self, args):
        self.args = args
        self.calls = []
        self.requests = []
        self.asleep = set()
        self.model_executor = self
        cache = SimpleNamespace(num_gpu_blocks=args.kv_cache_memory_bytes // 1000, block_size=16)
        self.vllm_config = SimpleNamespace(cache_config=cache)

    @classmethod
    def from_engine_args(cls, args):
        return cls(args)

    def sleep(self, level):
        self.calls.append(f"sleep({level})")
        self.asleep = {"weights", "kv_cache"}

    def discard(self, tags):
        assert not self.asleep and self.calls[-1] == "forget"
        self.calls.append(f"free {tags[0]}")
        self.asleep = set(tags)

    def wake_up(self, tags):
        assert set(tags) <= self.asleep
        self.calls.append(f"wake {tags[0]}")
        self.asleep -= set(tags)

    def reset_prefix_cache(self):
        self.calls.append("forget")
        return True

    def collective_rpc(self, method, args=()):
        if method == "compute_weight_checksums":
            return [{}]
        assert "weights" not in self.asleep
        self.calls.append("write")
        self.names = [name for name, _ in args[0]]
        return [[]]

    def add_request(self, number, prompt, params):
        assert not self.asleep
        self.requests.append((number, prompt["prompt_token_ids"], params.seed))

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        finished, self.requests = self.requests, []
        self.calls.append(f"decode {len(finished)}")
        for number, prompt_ids, seed in finished:
            token = (prompt_ids[0] + seed) % 50
            output = SimpleNamespace(
                token_ids=[token], logprobs=[{token: SimpleNamespace(logprob=-1.0)}]
            )
            yield SimpleNamespace(request_id=number, outputs=[output])


class Tokenizer:
    def token_to_id(self, token):
        return 60

    def decode(self, ids, skip_special_tokens):
        return ""


@pytest.fixture()
def on_gpu(monkeypatch):
    """Modules called vllm that hold the stand-in, and a GPU of 85 GB to look at."""
    vllm = types.ModuleType("vllm")
    vllm.EngineArgs = vllm.SamplingParams = SimpleNamespace
    vllm.LLMEngine = StandIn
    params = types.ModuleType("vllm.sampling_params")
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY=0)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    monkeypatch.setattr(module, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(module, "compute_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 85e9))
    for user in (module, plan):
        monkeypatch.setattr(user, "gpu_memory", lambda device: 85e9)

    def check_parity(engine, model):
        engine.generate([rollout(0)], 8, 2.0)
        engine.syncs += 1
        return 0.0

    monkeypatch.setattr(module, "check_parity", check_parity)


def rollout(group, sample=0):
    return module.Rollout({}, group, [3 + group, 5], request_seed(group, sample), sample)


def flags(Config=mathrl.Config, **changes):
    return Config(**{"engine": "vllm", **changes})


def run_of(**changes):
    cuda = torch.device("cuda")
    cfg = flags(**changes)
    longest = plan.longest_sequence(cfg)
    return plan.Run(Qwen3Config(), cfg, 8, cuda, longest, nll=False, pair=False, free=80e9)


def test_a_step_sleeps_once_and_wakes_weights_before_caches(on_gpu):
    """The loop of a stage with three rounds of rollouts (IF-RL) and an evaluation: the weights go
    once, are copied nowhere, and caches are freed whenever nothing is decoded."""
    model = make_tiny()
    engine = VLLMEngine(model, Tokenizer())
    for _ in range(2):
        del engine.llm.calls[:]
        for _ in range(3):
            engine.generate([rollout(0), rollout(1)], 8, 1.0)
        engine.sleep()
        engine.sync(model)
        engine.generate([rollout(2)], 8, 1.0)
    # Cached prefixes are forgotten with their caches, and when weights change.
    freed = ["forget", "free kv_cache"]
    one_round = ["wake kv_cache", "decode 2", *freed]
    sync = ["wake weights", "write", "forget", "wake kv_cache", "decode 1", *freed]
    evaluation = ["wake kv_cache", "decode 1", *freed]
    assert engine.llm.calls == [*one_round * 3, "sleep(2)", *sync, *evaluation]
    assert set(engine.llm.names) == {name for name, _ in model.named_parameters()}


def test_an_engine_without_weights_does_not_sample(on_gpu):
    engine = VLLMEngine(make_tiny(), Tokenizer())
    engine.sleep()
    with pytest.raises(RuntimeError, match="sync.. has to give it weights"):
        engine.generate([rollout(0)], 8, 1.0)


def test_caches_are_those_of_the_plan_whatever_is_free(on_gpu, monkeypatch, capsys):
    """A resumed run gets the same caches, and says how many tokens they hold."""
    given = []
    for free in (80e9, 30e9):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 85e9))
        args = make_engine("vllm", make_tiny(), Tokenizer(), flags()).llm.args
        assert args.hf_overrides == {"head_dtype": "float32"} and args.max_model_len == -1
        given.append(args.kv_cache_memory_bytes)
    assert given[0] == given[1] == pytest.approx(0.75 * 85e9 - estimate.vllm_work(85e9), rel=1e-3)
    assert f"hold {given[0] // 1000 * 16:,} tokens" in capsys.readouterr().out


def test_what_the_trainer_keeps_is_not_vllm_s(on_gpu, monkeypatch):
    """KL against a reference policy (RLHF of the thinking models) keeps a copy of the weights."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(module, "VLLMEngine", lambda model, tokenizer, room, ranks: room)
    model = SimpleNamespace(config=Qwen3Config())
    weights = 2 * 8190735360
    same = {"max_prompt_tokens": 2048, "max_new_tokens": 24576}
    plain = make_engine("vllm", model, None, flags(rlhf.Config, **same))
    with_reference = make_engine("vllm", model, None, flags(rlhf.Config, **same, kl_coef=1e-3))
    assert plain == pytest.approx(0.75 * 85e9 - weights - estimate.vllm_work(85e9))
    assert 0 < plain - with_reference < weights
    shared = make_engine("vllm", model, None, flags(tensor_parallel=4))
    assert shared - plain == pytest.approx(weights * 3 / 4)
    # On one GPU 8B leaves nothing, and a sentence says so.
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit):
        make_engine("vllm", model, None, flags())


@pytest.mark.parametrize("size", ["8b", "14b"])
def test_trainer_and_vllm_fit_side_by_side(size):
    """While rollouts are sampled: state, what a sync gathers, vLLM, and what CUDA takes."""
    config = Qwen3Config(**QWEN3_SIZES[size])
    memory = estimate.memory_plan(config, 8, 32768, 26624)
    beside = estimate.bytes_beside_sampler(memory)
    weights = memory["rollouts"]["engine weights"]
    caches = vllm_cache_bytes(config, 85e9, beside)
    total, layer = estimate.count_parameters(json.dumps(asdict(config)))
    gathered = 2 * (total - layer * (config.num_hidden_layers - 2))
    work = estimate.vllm_work(85e9)
    whole = beside + gathered + weights + caches + work + estimate.unusable(85e9)
    share = (weights + caches + work) / 85e9
    print(f"{size}: vLLM has {share:.0%} of 85 GB, {caches / GB:.1f} GB of it caches")
    assert whole <= 85e9 and (share == pytest.approx(0.75) or whole == pytest.approx(85e9))


def test_ranks_that_share_an_engine_ask_the_same_and_each_gets_its_own(on_gpu, monkeypatch):
    """Three ranks with unequal numbers of rollouts. Every request is made once on each rank, in the
    same order, and every result is used on one rank."""
    shares = [[rollout(rank, n) for n in range(count)] for rank, count in enumerate((3, 1, 2))]
    everyone = [[(r.prompt_ids, r.seed, r.greedy) for r in share] for share in shares]
    asked = []
    for rank, share in enumerate(shares):
        monkeypatch.setattr(VLLMEngine, "_of_all_ranks", lambda self, mine: ([mine], 0))
        monkeypatch.setattr(module, "slice_of", lambda name, whole, ranks: whole)
        engine = VLLMEngine(make_tiny(), Tokenizer(), ranks=3)
        assert engine.llm.args.tensor_parallel_size == 3

        def of_all_ranks(self, mine, rank=rank):
            assert mine == everyone[rank]
            return everyone, rank

        monkeypatch.setattr(VLLMEngine, "_of_all_ranks", of_all_ranks)
        seen, add = [], engine.llm.add_request
        engine.llm.add_request = lambda *args, seen=seen, add=add: (
            seen.append(args[:2]),
            add(*args),
        )
        ended = []
        engine.generate(share, 8, 1.0, on_finished=ended.append)
        asked.append(seen)
        assert [id(r) for r in ended] == [id(r) for r in share]
    assert asked[0] == asked[1] == asked[2] and len(asked[0]) == 6
    for share in shares:
        for r in share:
            assert r.completion_ids == [(r.prompt_ids[0] + r.seed) % 50]


def test_requests_of_ranks_take_turns():
    """Each rank's list has the prompts with long answers first; so has the list of all."""
    requests, owners = by_turns([["a0", "a1", "a2"], ["b0"], []], ["only"], 1)
    assert requests == ["a0", "b0", "a1", "a2"] and owners == [None, "only", None, None]
    assert by_turns([[], []], [], 0) == ([], [])


@pytest.mark.parametrize(
    "ranks, in_node, engine, said",
    [
        (2, 8, "torch", "the built-in sampler has none"),
        (3, 8, "vllm", "the 8 ranks of a node are no multiple"),
        (16, 16, "vllm", "the model's 8 key heads"),
        (4, 8, "vllm", ""),
    ],
)
def test_an_impossible_sharing_is_refused_before_anything_is_loaded(
    ranks, in_node, engine, said, monkeypatch, capsys
):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(in_node))
    run = run_of(tensor_parallel=ranks, engine=engine)
    if not said:
        plan.check_tensor_parallel(run)
        return
    with pytest.raises(SystemExit):
        plan.check_tensor_parallel(run)
    assert f"--tensor_parallel={ranks}: {said}" in capsys.readouterr().err


def test_caches_that_hold_no_sequence_are_refused(on_gpu, capsys):
    """8B and 64K tokens on two GPUs of 85 GB, which leave 61K each: one engine of both has room."""
    alone = replace(run_of(), world=2, longest=65_536)
    with pytest.raises(SystemExit):
        plan.refuse_small_caches(alone, plan.plan_of_flags(alone))
    said = (
        "its caches hold 60,784 tokens, fewer than a sequence of 65536: take more ranks, --tensor"
    )
    assert said in capsys.readouterr().err
    shared = replace(run_of(tensor_parallel=2), world=2, longest=65_536)
    plan.refuse_small_caches(shared, plan.plan_of_flags(shared))


def test_how_many_sequences_decode_at_once():
    """8B, 210K tokens of caches: 7 of 128 sequences of 26,624 tokens. Two ranks that share an
    engine have twice the caches for twice the sequences."""
    room = 210_000 * 147_456
    assert plan.rows_at_once(run_of(), room) == (210_000, 7, 128)
    assert plan.rows_at_once(run_of(tensor_parallel=2), room) == (420_000, 15, 256)
    in_waves = run_of(engine="torch")  # of a power of two
    assert plan.rows_at_once(in_waves, room) == (210_000, 4, 128)
    short = run_of(max_prompt_tokens=50, max_new_tokens=50)
    assert plan.rows_at_once(short, room) == (210_000, 128, 128)
