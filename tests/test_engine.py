"""The sampler, a full forward and the trainer agree token by token, and a completion depends on its
prompt and seed alone.

With test_model.py this closes the circle: the sampler, the model that is trained and transformers
give a completion the same log-probs. The model is a briefly taught toy, so that rows finish at
different times, with and without the stop token.
"""

import copy
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny

import engine as module
from engine import Rollout, TorchEngine, check_parity, make_engine, request_seed, uniforms
from kernels.linear_logprob import linear_logprob
from lib.packing import pack_rollouts
from model import Qwen3, packed_batch, render_chat, stop_ids
from verifiers.pool import in_background

PROMPTS = [
    "Tell me about rain.",
    "Hi",
    "Start with 7, then add 2, times 3. What is the result?",
    "Why do people like old books and bread?",
]


@pytest.fixture(scope="module")
def model(taught):
    model = Qwen3.from_pretrained(taught)
    with torch.no_grad():
        # The model has learnt two dozen problems by heart. Smaller logits make it less sure.
        model.model.norm.weight.mul_(0.5)
    return model


@pytest.fixture()
def engine(model, tokenizer):
    return TorchEngine(model, tokenizer)


def ask(tokenizer, samples=1, seed=0, prompts=PROMPTS):
    """Rollouts to generate, `samples` of each prompt. The prompts differ in length."""
    rollouts = []
    for g, text in enumerate(prompts):
        ids, _ = render_chat(tokenizer, [{"role": "user", "content": text}], think=g % 2 == 0)
        rollouts += [
            Rollout(row={}, group=g, prompt_ids=ids, seed=request_seed(seed, g, n))
            for n in range(samples)
        ]
    return rollouts


def outputs(rollouts):
    return [(r.completion_ids, r.finish_reason, r.text) for r in rollouts]


@torch.no_grad()
def trainer_logprobs(model, rollouts, temperature):
    """Per rollout, its completion's log-probs as train_step computes them: in one packed batch."""
    rows = [torch.tensor(r.prompt_ids + r.completion_ids) for r in rollouts]
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    index = torch.cat(
        [torch.arange(end - len(r.completion_ids), end) for r, end in zip(rollouts, ends)]
    )
    cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
    batch = packed_batch(torch.cat(rows), cu_seqlens, max(map(len, rows)), index)
    logprobs, _ = model.token_logprobs(batch, temperature=temperature)
    return [logprobs[end - len(r.completion_ids) : end] for r, end in zip(rollouts, ends)]


def test_greedy_generate_equals_repeated_forward_for_ragged_prompts(engine, model, tokenizer):
    rollouts = ask(tokenizer)
    assert len({len(r.prompt_ids) for r in rollouts}) > 2
    engine.generate(rollouts, 48, temperature=0)
    for r in rollouts:
        ids = list(r.prompt_ids)
        while len(ids) < len(r.prompt_ids) + 48 and (
            len(ids) == len(r.prompt_ids) or ids[-1] not in stop_ids(tokenizer)
        ):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids[len(r.prompt_ids) :] == r.completion_ids
    assert len({len(r.completion_ids) for r in rollouts}) > 1, (
        "all ended together: rows leaving the batch was not tested"
    )


def test_cached_decoding_equals_the_full_forward(engine, model, tokenizer, monkeypatch):
    """The logits of every decoding step, and not only their argmax, are compared with one forward
    over the finished sequences."""
    seen = []
    decode = engine._decode

    def record(token_B, position_B, *args):
        logits_BV = decode(token_B, position_B, *args)
        seen.append((position_B.tolist(), token_B.tolist(), logits_BV))
        return logits_BV

    monkeypatch.setattr(engine, "_decode", record)
    # Finished rows leave the batch at once, and later rows move up.
    monkeypatch.setattr(engine, "shrink_at", 1.0)
    rollouts = ask(tokenizer, samples=8)
    engine.generate(rollouts, 48, temperature=1.0)
    assert len({len(r.completion_ids) for r in rollouts}) > 3, (
        "all ended together: rows leaving the batch was not tested"
    )
    with torch.no_grad():
        full = [model(torch.tensor([r.prompt_ids + r.completion_ids]))[0] for r in rollouts]
    worst, compared = 0.0, 0
    for step, (positions, tokens, logits_BV) in enumerate(seen):
        alive = [i for i, r in enumerate(rollouts) if len(r.completion_ids) > step + 1]
        assert len(alive) == len(positions)
        fed_at = {}  # (position, token) that a step feeds: the rollouts it may belong to
        for i in alive:
            r = rollouts[i]
            key = (len(r.prompt_ids) + step, r.completion_ids[step])
            fed_at.setdefault(key, []).append(i)
        for position, token, logits_V in zip(positions, tokens, logits_BV, strict=True):
            fed = fed_at.get((position, token), [])
            worst = max(worst, min((full[i][position] - logits_V).abs().max().item() for i in fed))
            compared += 1
    print(
        f"decode logits against full forward: max error {worst:.1e} over {compared} tokens, "
        "tolerance 5e-05"
    )
    assert worst < 5e-5 and compared > 50


@pytest.mark.parametrize(
    "temperature, top_p, top_k", [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.3, 0.9, 20)]
)
def test_logprobs_of_the_sampler_are_those_of_the_trainer(
    engine, model, tokenizer, temperature, top_p, top_k
):
    """They are log-probs of softmax(logits / temperature) over the whole vocabulary, whatever
    tokens top-p and top-k forbid (G4)."""
    rollouts = ask(tokenizer, samples=4)
    engine.generate(rollouts, 40, temperature, top_p, top_k)
    gaps = []
    for r, ours in zip(rollouts, trainer_logprobs(model, rollouts, temperature), strict=True):
        gaps.append((ours - torch.tensor(r.sampler_logprobs)).abs().max().item())
    print(f"sampler against trainer: max gap {max(gaps):.1e}, tolerance 1e-05")
    assert max(gaps) < 1e-5


def test_in_bf16_the_sampler_s_logits_are_the_trainer_s_in_fp32(tokenizer, monkeypatch):
    """Prefill and decode: from the same hidden states as linear_logprob, and as near to float64.

    Rounded to bf16, a logit of 20 is off by up to 0.06.
    """
    model = make_tiny(vocab_size=tokenizer.get_vocab_size(), std=1.0).to(torch.bfloat16)
    model.requires_grad_(False)
    engine = TorchEngine(model, tokenizer)
    engine.stops = []
    seen, head = [], module.head_logits

    def watch(hidden, weight):
        seen.append((hidden, head(hidden, weight)))
        return seen[-1][1]

    monkeypatch.setattr(module, "head_logits", watch)
    rollouts = [Rollout({}, 0, [3 + i, 5], seed=i) for i in range(3)]
    engine.generate(rollouts, 4, 1.0)
    assert len(seen) == 4, "one prefill and three decoding steps"
    weight, worst, rounded = model.head_weight, 0.0, 0.0
    for step, (hidden, logits) in enumerate(seen):
        exact = hidden.double() @ weight.double().T
        worst = max(worst, (logits - exact).abs().max().item())
        rounded = max(rounded, (F.linear(hidden, weight) - exact).abs().max().item())
        tokens = torch.tensor([r.completion_ids[step] for r in rollouts])
        ours = linear_logprob(hidden, weight, tokens)[0]
        theirs = torch.tensor([r.sampler_logprobs[step] for r in rollouts])
        worst = max(worst, (ours - theirs).abs().max().item())
    print(f"off by {worst:.1e} nats, tolerance 1e-04; rounded to bf16 by {rounded:.1e}")
    assert worst < 1e-4 < rounded


def test_a_completion_does_not_depend_on_what_it_is_batched_with(engine, tokenizer):
    together, alone = ask(tokenizer, samples=3), ask(tokenizer, samples=3)
    engine.generate(together, 40, 1.0)
    for r in reversed(alone):
        engine.generate([r], 40, 1.0)
    assert outputs(together) == outputs(alone)
    gap = 0.0
    for a, b in zip(together, alone, strict=True):
        for x, y in zip(a.sampler_logprobs, b.sampler_logprobs, strict=True):
            gap = max(gap, abs(x - y))
    print(f"log-probs together against alone: max gap {gap:.1e}, tolerance 1e-05")
    assert gap < 1e-5


def test_waves_of_max_rows_change_nothing(engine, model, tokenizer):
    whole, waves = ask(tokenizer, samples=3), ask(tokenizer, samples=3)
    engine.generate(whole, 40, 1.0)
    TorchEngine(model, tokenizer, max_rows=5).generate(waves, 40, 1.0)
    assert outputs(whole) == outputs(waves)


def test_the_same_seeds_give_the_same_completions_and_other_seeds_others(engine, tokenizer):
    first = ask(tokenizer, 2, seed=0)
    again = ask(tokenizer, 2, seed=0)
    other = ask(tokenizer, 2, seed=1)
    for rollouts in (first, again, other):
        engine.generate(rollouts, 40, 1.0)
    assert outputs(first) == outputs(again) != outputs(other)
    assert [r.sampler_logprobs for r in first] == [r.sampler_logprobs for r in again], (
        "not bit for bit"
    )
    assert len({tuple(r.completion_ids) for r in first}) == len(first), (
        "samples of one prompt should differ"
    )


def test_finish_reasons_and_the_stop_token(engine, tokenizer):
    """A stopped completion ends with its stop token, which its text leaves out. A truncated one
    has all the tokens that are allowed."""
    rollouts = ask(tokenizer, samples=8)
    engine.generate(rollouts, 24, 1.0)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        stops = [i for i, token in enumerate(r.completion_ids) if token in stop_ids(tokenizer)]
        assert len(r.sampler_logprobs) == len(r.completion_ids) <= 24
        if r.finish_reason == "stop":
            assert stops == [len(r.completion_ids) - 1]
        else:
            assert not stops and len(r.completion_ids) == 24
        ids_of_text = r.completion_ids[: len(r.completion_ids) - len(stops)]
        assert r.text == tokenizer.decode(ids_of_text, skip_special_tokens=False)


def test_a_stop_token_at_the_last_allowed_place_is_a_stop(engine, tokenizer):
    rollouts = ask(tokenizer, samples=4)
    engine.generate(rollouts, 40, 1.0)
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    shortest = min(stopped, key=lambda r: len(r.completion_ids))
    again = Rollout(row={}, group=0, prompt_ids=shortest.prompt_ids, seed=shortest.seed)
    engine.generate([again], len(shortest.completion_ids), 1.0)
    assert again.finish_reason == "stop" and again.completion_ids == shortest.completion_ids


def test_greedy_rows_beside_sampled_ones_are_what_each_would_be_alone(engine, tokenizer):
    apart = [ask(tokenizer, samples=2) for _ in range(2)]
    mixed = ask(tokenizer, samples=4)
    engine.generate(apart[0], 40, 1.0)
    engine.generate(apart[1], 40, 0.0)
    for i, r in enumerate(mixed):
        r.greedy = i % 4 >= 2
    engine.generate(mixed, 40, 1.0)
    wanted = {}
    for greedy, rollouts in enumerate(apart):
        for r in rollouts[::2]:
            wanted[r.group, greedy] = r.completion_ids
    found = [mixed[4 * g + 2 * greedy].completion_ids == ids for (g, greedy), ids in wanted.items()]
    num_tokens = sum(len(ids) for ids in wanted.values())
    print(
        f"{sum(found)} of {len(found)} completions equal those decoded apart, {num_tokens} tokens"
    )
    assert all(found) and len({str(ids) for ids in wanted.values()}) > len(wanted) // 2


def test_a_finished_completion_is_handed_on_while_others_still_decode(engine, tokenizer):
    rollouts = ask(tokenizer, samples=4)
    events = []  # the completion that was handed on, and the lengths of the unfinished ones

    def on_finished(r):
        unfinished = [len(other.completion_ids) for other in rollouts if not other.finish_reason]
        events.append((r, unfinished))
        assert r.text and r.finish_reason, "handed on before it was complete"

    engine.generate(rollouts, 60, 1.0, on_finished=on_finished)
    assert sorted(id(r) for r, _ in events) == sorted(id(r) for r in rollouts), "each one once"
    assert events[0][1] and events[-1][1] == [], "the first was handed on while others decoded"
    lengths = [len(r.completion_ids) for r, _ in events]
    assert lengths == sorted(lengths)
    # A chat shows the tokens that are there. An unfinished completion has as many tokens as the
    # one that has just ended, or gets its last one in the same step.
    for r, unfinished in events:
        assert set(unfinished) <= {len(r.completion_ids), len(r.completion_ids) - 1}


@pytest.mark.parametrize("top_p, top_k", [(1.0, 3), (0.5, 0), (0.8, 5)])
def test_top_k_and_top_p_restrict_what_can_be_drawn(engine, model, tokenizer, top_p, top_k):
    rollouts = ask(tokenizer, samples=200, prompts=PROMPTS[1:2])
    engine.generate(rollouts, 1, 4.0, top_p, top_k)
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([rollouts[0].prompt_ids]))[0, -1] / 4.0, -1)
    order = p.argsort(descending=True)[: top_k or len(p)]
    kept = p[order] / p[order].sum()
    num_allowed = len(order)
    if top_p < 1:
        num_allowed = int((kept.cumsum(0) < top_p).sum()) + 1
    allowed = order[:num_allowed].tolist()
    drawn = {r.completion_ids[0] for r in rollouts}
    assert drawn <= set(allowed) and len(drawn) > 1
    for r in rollouts:
        gap = abs(r.sampler_logprobs[0] - p[r.completion_ids[0]].log())
        assert gap < 1e-5, "renormalised over what is allowed"


def test_draws_follow_the_tempered_softmax(engine, model, tokenizer):
    """2000 first tokens are as close to softmax(logits / T), in total variation distance, as 2000
    fair draws are."""
    for temperature in (1.5, 3.0):
        rollouts = ask(tokenizer, samples=2000, prompts=PROMPTS[1:2])
        engine.generate(rollouts, 1, temperature)
        with torch.no_grad():
            logits = model(torch.tensor([rollouts[0].prompt_ids]))[0, -1]
        p = torch.softmax(logits / temperature, -1)
        drawn = torch.tensor([r.completion_ids[0] for r in rollouts])
        counts = drawn.bincount(minlength=len(p)) / 2000
        fair_counts = []
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            draws = torch.multinomial(p, 2000, True, generator=generator)
            fair_counts.append(draws.bincount(minlength=len(p)) / 2000)
        fair = torch.stack(fair_counts)
        distance = (counts - p).abs().sum().item() / 2
        limit = ((fair - p).abs().sum(-1) / 2).max().item() * 1.1
        print(
            f"temperature {temperature}: total variation {distance:.3f}, "
            f"worst of 50 fair samples {limit / 1.1:.3f}"
        )
        assert distance < limit


def test_random_numbers_are_uniform_and_each_seed_has_its_own():
    u = uniforms([request_seed(0, i) for i in range(200)], 0, 200)
    assert 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(u.std() - 12**-0.5) < 0.005
    later = uniforms([5, 9], 3, 4)
    assert (later == uniforms([5, 9], 0, 7)[:, 3:]).all(), "number t of a stream is always the same"
    product = abs((u[:-1] * u[1:]).mean())
    assert math.isclose(product, 0.25, abs_tol=0.005), "neighbouring seeds are correlated"
    requests = itertools.product(range(9), repeat=3)  # step, prompt, sample
    assert len({request_seed(0, *request) for request in requests}) == 9**3


def test_sampling_leaves_the_trained_model_as_it_was(model, tokenizer):
    engine = make_engine("auto", model, tokenizer)
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine.generate(ask(tokenizer), 4, 1.0)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.fixture(scope="module")
def opened(taught, tokenizer):
    """(stale, new): a policy that opens every thought with two tokens of probability 1, as Qwen3's
    tokenizer makes <think> and a line end, and the same policy some updates later."""
    policy = Qwen3.from_pretrained(taught)
    opening = tokenizer.encode("<think>\n\n", add_special_tokens=False).ids
    assert len(opening) == 2
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    stale = None
    for step in range(90):
        sequences = []
        for text in (*PROMPTS, "What is 2 + 3? Think, then answer in one sentence."):
            ids, _ = render_chat(tokenizer, [{"role": "user", "content": text}], think=True)
            tail = torch.randint(300, (12,), generator=draw).tolist()
            sequences.append((ids, [*opening, *tail]))
        rollouts = [
            Rollout({}, 0, ids, 0, completion_ids=tail, sampler_logprobs=[0.0] * len(tail))
            for ids, tail in sequences
        ]
        batch = pack_rollouts(rollouts, "cpu")
        logprobs_T, _ = policy.token_logprobs(batch)
        logprobs_RS = logprobs_T[batch["loss_index"]].view(len(rollouts), -1)
        (-logprobs_RS[:, 2:].mean() - 20 * logprobs_RS[:, :2].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 84:
            stale = copy.deepcopy(policy)
            # The updates of RL are small.
            optimizer.param_groups[0]["lr"] = 3e-4
    return stale, policy


def half_written(stale, new):
    """An engine that has got the first half of the tensors."""
    engine_model = copy.deepcopy(new)
    tensors = list(stale.named_parameters())
    late = dict(tensors[len(tensors) // 2 :])
    with torch.no_grad():
        for name, p in engine_model.named_parameters():
            if name in late:
                p.copy_(late[name])
    return engine_model


def two_layers_swapped(stale, new):
    engine_model = copy.deepcopy(new)
    first, second = engine_model.model.layers[0], engine_model.model.layers[1]
    engine_model.model.layers[0], engine_model.model.layers[1] = second, first
    return engine_model


FAULTS = {
    "stale": lambda stale, new: stale,
    "half written": half_written,
    "two layers swapped": two_layers_swapped,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_parity_gate_sees_behind_the_opening_of_a_thought(
    fault, opened, tokenizer, monkeypatch
):
    """Two tokens at temperature 1, of probability 1, tell nothing: a stale engine passes with them.
    Eight at temperature 2 stop each of the faults, and let the right engine pass."""
    _, new = opened
    broken = TorchEngine(FAULTS[fault](*opened), tokenizer)
    with pytest.raises(RuntimeError, match="does not sample from the policy that is trained"):
        check_parity(broken, new)
    gap = check_parity(TorchEngine(new, tokenizer), new)
    monkeypatch.setattr("engine.PARITY_TEMPERATURE", 1.0)
    monkeypatch.setattr("engine.PARITY_TOKENS", 2)
    if fault == "stale":
        unseen = check_parity(broken, new)
        print(f"right engine {gap:.1e}; stale engine with two certain tokens {unseen:.1e}")
    assert gap < 1e-5


def test_a_resumed_sampler_cuts_the_same_waves(engine, monkeypatch):
    """The rows of a wave follow from the memory that no tensor holds. Before the first update
    PyTorch's allocator has kept nothing unused, later 20 GB, and a little may always differ."""
    found = []
    of_one_token = engine._rows_that_fit(1)
    weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), element_size=lambda: 2)
    body = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
    monkeypatch.setattr(engine, "model", SimpleNamespace(config=engine.model.config, model=body))
    for free, reserved, allocated in ((40, 20, 20), (20, 40, 20), (19, 40.5, 20)):
        for name, gigabytes in (("reserved", reserved), ("allocated", allocated)):
            monkeypatch.setattr(torch.cuda, f"memory_{name}", lambda n=gigabytes: int(n * 1e9))
        free_and_total = (int(free * 1e9), int(80e9))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, pair=free_and_total: pair)
        found.append(engine._rows_that_fit(1_000_000))
    print(f"rows of a wave {found}; of one token without a GPU {of_one_token}")
    assert len(set(found)) == 1 and 1 < found[0] < 1024 and found[0].bit_count() == 1


def test_an_unknown_engine_is_refused(model, tokenizer):
    with pytest.raises(SystemExit):
        make_engine("warp", model, tokenizer)


def test_equal_completions_of_a_prompt_have_one_verdict_which_is_worked_out_once():
    """Completions are equal if they have the same row, text and finish reason. After collect()
    every verdict is worked out anew."""
    asked = []
    row, other = {"a": 1}, {"a": 1}

    def verdict(r):
        asked.append(r.text)
        return float(len(r.text)), "ok"

    submit, collect = in_background(ThreadPoolExecutor(2), verdict, ("reward", "status"))

    def rollout(row, text, reason):
        return Rollout(row=row, group=0, prompt_ids=[1], seed=0, text=text, finish_reason=reason)

    for expected in (4, 8):
        rollouts = [
            rollout(row, "ab", "stop"),
            rollout(row, "ab", "stop"),
            rollout(row, "ab", "length"),
            rollout(row, "abc", "stop"),
            rollout(other, "ab", "stop"),
        ]
        for r in rollouts[:4]:
            submit(r)
        collect(rollouts)  # it submits the last one itself
        for r in rollouts:
            assert (r.reward, r.status, r.pending) == (float(len(r.text)), "ok", None)
        assert len(asked) == expected and rollouts[0].verify_s > 0 == rollouts[1].verify_s


@pytest.mark.parametrize(
    "verdict, said",
    [
        (None, "the judge returned None, expected (reward, status)"),
        (1.0, "the judge returned 1.0"),
        ((1.0, "ok", 0.5), "the judge returned (1.0, 'ok', 0.5)"),
        ((None, "ok"), "the judge's reward is None, expected a finite number"),
        ((float("nan"), "wrong"), "the judge's reward is nan"),
        ((float("inf"), "ok"), "the judge's reward is inf"),
        (("1", "ok"), "the judge's reward is '1'"),
        ((0.5, "partial"), "the judge's status is 'partial', expected one of ('ok', "),
    ],
)
def test_a_verdict_of_another_form_is_named(verdict, said):
    submit, collect = in_background(ThreadPoolExecutor(1), lambda r: verdict, ("reward", "status"))
    with pytest.raises(ValueError) as error:
        collect([Rollout({}, 0, [], seed=0)])
    assert said in str(error.value)


@pytest.mark.parametrize("verdict", [(np.float32(0.5), "ok"), (True, "ok"), (None, "infra")])
def test_other_numbers_and_a_failure_without_a_reward_are_verdicts(verdict):
    submit, collect = in_background(ThreadPoolExecutor(1), lambda r: verdict, ("reward", "status"))
    rollout = Rollout({}, 0, [], seed=0)
    collect([rollout])
    assert (rollout.reward, rollout.status) == verdict
