"""Guards: SFT trains on the last assistant turns only, packing changes nothing but the time, and a step's samples are a pure
function of (seed, step), which is why a resumed run sees what a straight one saw.

The loss is one mean over all trained tokens of the step (not a mean of means), checked against a loop over conversations.
"""

import math

import numpy as np
import pytest
import torch

import common
import sft
from conftest import make_tiny


def config(**changes):
    return sft.Config(**{"micro_batch_tokens": 64, "grad_clip": 1e9, **changes})


def random_samples(count=12, seed=0):
    """(ids, mask, category) with trained spans that differ in length, one of them in two pieces."""
    draw, samples = np.random.default_rng(seed), []
    for n in range(count):
        ids = draw.integers(0, 61, draw.integers(4, 25)).astype(np.int32)
        mask = np.zeros(len(ids), bool)
        mask[draw.integers(2, len(ids)) :] = True
        if n == 3:
            mask[1] = True
        samples.append((ids, mask, "even" if n % 2 == 0 else "odd"))
    return samples


def gradient(samples, **changes):
    """({parameter: gradient}, metrics) of one train_step, read off as the optimizer is about to use it."""
    model, grads = make_tiny(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: grads.update({n: p.grad.clone() for n, p in model.named_parameters()}))
    metrics = sft.train_step(model, optimizer, samples, config(**changes), torch.device("cpu"), world=1)
    return grads, metrics


def distance(a, b):
    return max((a[n] - b[n]).abs().max() for n in a).item() / max(g.abs().max() for g in a.values()).item()


def literal_loss(model, samples):
    """Mean over the trained tokens of all conversations, one conversation and one token at a time."""
    total, count = 0.0, 0
    for ids, mask, _ in samples:
        logprobs = torch.log_softmax(model(torch.from_numpy(ids).long()[None])[0], -1)
        for t in np.flatnonzero(mask):
            total, count = total - logprobs[t - 1, int(ids[t])], count + 1
    return total / count


def test_loss_and_gradient_equal_a_loop_over_conversations_and_tokens():
    samples, model = random_samples(), make_tiny()
    grads, metrics = gradient(samples)
    loss = literal_loss(model, samples)
    loss.backward()
    error = distance({n: p.grad for n, p in model.named_parameters()}, grads)
    print(f"gradient against the loop: relative error {error:.1e}, tolerance 1e-05; loss {metrics['loss']:.6f} against {loss.item():.6f}")
    assert error < 1e-5 and abs(metrics["loss"] - loss.item()) < 1e-5
    assert metrics["num_tokens"] == sum(mask.sum() for _, mask, _ in samples)


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 100, 10**6])
def test_the_gradient_does_not_depend_on_packing(micro_batch_tokens):
    error = distance(gradient(random_samples())[0], gradient(random_samples(), micro_batch_tokens=micro_batch_tokens)[0])
    print(f"packs of {micro_batch_tokens} tokens: relative difference {error:.1e}, tolerance 1e-05")
    assert error < 1e-5


def test_the_gradient_does_not_depend_on_the_order_of_samples():
    error = distance(gradient(random_samples())[0], gradient(random_samples()[::-1])[0])
    print(f"reversed: relative difference {error:.1e}, tolerance 1e-05")
    assert error < 1e-5


def test_packs_keep_conversations_whole_and_stay_in_their_budget():
    samples = random_samples(30)
    batches = sft.pack(samples, 50, "cpu")
    assert all(len(b["input_ids_T"]) <= 50 and b["max_seqlen"] == b["cu_seqlens"].diff().max() for b in batches)
    packed = [part.tolist() for b in batches for part in b["input_ids_T"].split(b["cu_seqlens"].diff().tolist())]
    assert sorted(packed) == sorted(ids.tolist() for ids, _, _ in samples)
    assert sum(len(b["loss_index"]) for b in batches) == sum(mask.sum() for _, mask, _ in samples)


def test_an_untrained_token_gets_no_loss():
    """Changing the last tokens of a conversation, not trained on and after everything that is, changes no loss."""
    ids, mask, category = random_samples()[0]
    mask[:] = False
    mask[2:5] = True
    other = ids.copy()
    other[5:] = (other[5:] + 1) % 61
    assert gradient([(ids, mask, category)])[1]["loss"] == gradient([(other, mask, category)])[1]["loss"]


def test_a_step_without_trained_tokens_is_an_error():
    ids, mask, category = random_samples()[0]
    with pytest.raises(AssertionError, match="no token"):
        gradient([(ids, np.zeros_like(mask), category)])


def test_rows_become_ids_and_a_mask_on_the_last_answer(world, tokenizer):
    samples = sft.load_samples(str(world / "sft_stage2.jsonl"), tokenizer, config(max_seq_len=512))
    rows = [sft.normalize(row, where) for where, row in common.read_rows(str(world / "sft_stage2.jsonl"))]
    assert len(samples) == len(rows)
    for (ids, mask, category), row in zip(samples, rows, strict=True):
        answer = tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
        assert answer == row["messages"][-1]["content"].strip() + "<|im_end|>" and category == row["category"]


def test_long_conversations_are_dropped_not_cut(world, tokenizer, capsys):
    path = str(world / "sft_stage2.jsonl")
    longest = max(len(ids) for ids, _, _ in sft.load_samples(path, tokenizer, config(max_seq_len=512)))
    samples = sft.load_samples(path, tokenizer, config(max_seq_len=longest - 1))
    assert max(len(ids) for ids, _, _ in samples) < longest and "dropped" in capsys.readouterr().out
    assert all(mask[-2] and not mask[-1] for _, mask, _ in samples), "ends with its trained <|im_end|> and a newline"


@pytest.mark.parametrize("messages, reason", [
    ([], "last turn"),
    ([{"role": "user", "content": "Hi"}], "last turn"),
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}], "empty"),
    ([{"role": "assistant", "content": "Hi"}], "no user turn"),
])  # fmt: skip
def test_rows_that_cannot_be_trained_on_are_refused_with_a_reason(messages, reason):
    with pytest.raises(common.BadRow, match=reason):
        sft.normalize({"messages": messages}, "row 1")


def test_the_learning_rate_by_hand():
    cfg = config(lr=1.0, warmup_steps=10, schedule_steps=100)
    rate = lambda step: sft.learning_rate(step, cfg)
    assert rate(5) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.05)))  # half way up, on the cosine's shoulder
    assert rate(10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))
    assert rate(50) == pytest.approx(0.5) and rate(100) == 0.0 == rate(500)
    assert [rate(s) for s in range(1, 11)] == sorted(rate(s) for s in range(1, 11))
    assert [rate(s) for s in range(10, 101)] == sorted((rate(s) for s in range(10, 101)), reverse=True)


def test_samples_are_a_pure_function_of_seed_and_step():
    cfg = config(samples_per_step=4, seed=3)
    walk = [sft.sample_indices(10, step, cfg) for step in range(1, 16)]
    assert walk[::-1] == [sft.sample_indices(10, step, cfg) for step in range(15, 0, -1)], "in any order"
    flat = sum(walk, [])
    for epoch in range(6):  # 60 samples: six whole epochs, across step borders
        assert sorted(flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert flat[:10] != flat[10:20], "every epoch has an order of its own"
    assert walk != [sft.sample_indices(10, step, config(samples_per_step=4, seed=4)) for step in range(1, 16)]


def test_a_step_may_be_larger_than_the_data():
    indices = sft.sample_indices(3, 1, config(samples_per_step=8))
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2] and len(indices) == 8


def test_held_out_loss_is_per_trained_token_and_by_category():
    samples, model = random_samples(), make_tiny()
    metrics = sft.evaluate(model, samples, config(), torch.device("cpu"), rank=0, world=1)
    with torch.no_grad():
        for category in ("even", "odd"):
            expected = literal_loss(model, [s for s in samples if s[2] == category]).item()
            assert metrics[f"eval/{category}"] == pytest.approx(expected, rel=1e-5)
