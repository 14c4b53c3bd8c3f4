"""Guards: SFT trains on the last assistant turns only, packing changes nothing but the time, and a
step's samples are a pure function of the seed and a cursor of a few numbers, which is why a
resumed run sees what a straight one saw.

The loss is one mean over all trained tokens of the step (not a mean of means), checked against a
loop over conversations.
"""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import make_tiny

import sft
from lib import data
from model import render_chat


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
    """({parameter: gradient}, metrics) of one train_step, read off as the optimizer is about to
    use it."""
    model, grads = make_tiny(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: grads.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    metrics = sft.train_step(
        model, optimizer, samples, config(**changes), torch.device("cpu"), world=1
    )
    return grads, metrics


def distance(a, b):
    return (
        max((a[n] - b[n]).abs().max() for n in a).item()
        / max(g.abs().max() for g in a.values()).item()
    )


def literal_loss(model, samples):
    """Mean over the trained tokens of all conversations, one conversation and one token at a
    time."""
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
    print(
        f"gradient against the loop: relative error {error:.1e}, tolerance 1e-05; "
        f"loss {metrics['loss']:.6f} against {loss.item():.6f}"
    )
    assert error < 1e-5 and abs(metrics["loss"] - loss.item()) < 1e-5
    assert metrics["num_tokens"] == sum(mask.sum() for _, mask, _ in samples)


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 100, 10**6])
def test_the_gradient_does_not_depend_on_packing(micro_batch_tokens):
    error = distance(
        gradient(random_samples())[0],
        gradient(random_samples(), micro_batch_tokens=micro_batch_tokens)[0],
    )
    print(f"packs of {micro_batch_tokens} tokens: relative difference {error:.1e}, tolerance 1e-05")
    assert error < 1e-5


def test_the_gradient_does_not_depend_on_the_order_of_samples():
    error = distance(gradient(random_samples())[0], gradient(random_samples()[::-1])[0])
    print(f"reversed: relative difference {error:.1e}, tolerance 1e-05")
    assert error < 1e-5


def test_packs_keep_conversations_whole_and_stay_in_their_budget():
    samples = random_samples(30)
    batches, _ = sft.pack(samples, 50, "cpu")
    assert all(
        len(b["input_ids_T"]) <= 50 and b["max_seqlen"] == b["cu_seqlens"].diff().max()
        for b in batches
    )
    packed = [
        part.tolist()
        for b in batches
        for part in b["input_ids_T"].split(b["cu_seqlens"].diff().tolist())
    ]
    assert sorted(packed) == sorted(ids.tolist() for ids, _, _ in samples)
    assert sum(len(b["loss_index"]) for b in batches) == sum(mask.sum() for _, mask, _ in samples)


def test_an_untrained_token_gets_no_loss():
    """Changing the last tokens of a conversation, not trained on and after everything that is,
    changes no loss."""
    ids, mask, category = random_samples()[0]
    mask[:] = False
    mask[2:5] = True
    other = ids.copy()
    other[5:] = (other[5:] + 1) % 61
    assert (
        gradient([(ids, mask, category)])[1]["loss"]
        == gradient([(other, mask, category)])[1]["loss"]
    )


def test_a_step_without_trained_tokens_is_an_error():
    ids, mask, category = random_samples()[0]
    with pytest.raises(AssertionError, match="no token"):
        gradient([(ids, np.zeros_like(mask), category)])


def test_rows_become_ids_and_a_mask_on_the_last_answer(world, tokenizer):
    samples = sft.load_samples(str(world / "sft_stage2.jsonl"), tokenizer, config(max_seq_len=512))
    rows = [
        sft.normalize(row, where) for where, row in data.read_rows(str(world / "sft_stage2.jsonl"))
    ]
    assert len(samples) == len(rows)
    for (ids, mask, category), row in zip(samples, rows, strict=True):
        answer = tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
        assert (
            answer == row["messages"][-1]["content"].strip() + "<|im_end|>"
            and category == row["category"]
        )


def test_long_conversations_are_dropped_not_cut(world, tokenizer, capsys):
    path = str(world / "sft_stage2.jsonl")
    longest = max(
        len(ids) for ids, _, _ in sft.load_samples(path, tokenizer, config(max_seq_len=512))
    )
    samples = sft.load_samples(path, tokenizer, config(max_seq_len=longest - 1))
    assert max(len(ids) for ids, _, _ in samples) < longest and "dropped" in capsys.readouterr().out
    assert all(mask[-2] and not mask[-1] for _, mask, _ in samples), (
        "ends with its trained <|im_end|> and a newline"
    )


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "last turn"),
        ([{"role": "user", "content": "Hi"}], "last turn"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}], "empty"),
        ([{"role": "assistant", "content": "Hi"}], "no user turn"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused_with_a_reason(messages, reason):
    with pytest.raises(data.BadRow, match=reason):
        sft.normalize({"messages": messages}, "row 1")


def test_thinking_models_leave_the_other_conversations_out():
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}
        for text in ("<think>\nh\n</think>\nHi.", "Hi.")
    ]
    assert (
        sft.normalize(rows[0], "row 1", think_only=True)["think"]
        and not sft.normalize(rows[1], "row 2")["think"]
    )
    with pytest.raises(data.BadRow, match="a no_think conversation"):
        sft.normalize(rows[1], "row 2", think_only=True)


@pytest.mark.parametrize(
    "written",
    [
        '{"ok": 1}',
        '<tool_response>\n{"ok": 1}\n</tool_response>',
        '<tool_response>{"ok": 1}</tool_response>\n',
    ],
)
def test_a_tool_s_reply_is_wrapped_once_whoever_wrote_the_tags(written, tokenizer):
    turns = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": written},
        {"role": "assistant", "content": "b"},
    ]
    row = sft.normalize({"messages": turns}, "row 1")
    ids, _ = render_chat(tokenizer, row["messages"], True, add_generation_prompt=False)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert (
        text.count("<tool_response>") == text.count("</tool_response>") == 1
        and '<tool_response>\n{"ok": 1}\n</tool_response>' in text
    )


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_thinking_in_a_field_of_its_own_is_trained_on(name, tokenizer):
    """It once vanished: "4" was trained under /think."""
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", name: "two and two"},
    ]
    for row in ({"messages": turns}, {"messages": turns, "thinking": True}):
        row = sft.normalize(row, "row 1")
        ids, mask = render_chat(tokenizer, row["messages"], row["think"], [], False)
        trained = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on], False)
        assert row["think"] and trained == "<think>\ntwo and two\n</think>\n\n4<|im_end|>"
    with pytest.raises(data.BadRow, match="reasoning in a no_think conversation"):
        sft.normalize({"messages": turns, "thinking": False}, "row 1")
    with pytest.raises(data.BadRow, match="has a part that is not text"):
        sft.normalize({"messages": [turns[0], turns[1] | {name: [{"data": "x"}]}]}, "row 1")


def test_thinking_in_a_field_of_the_history_goes_as_all_thinking_of_the_history(tokenizer):
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye."},
    ]
    row = sft.normalize({"messages": turns, "thinking": False}, "row 1")
    ids, _ = render_chat(tokenizer, row["messages"], row["think"], [], False)
    assert "two and two" not in tokenizer.decode(ids) and not row["think"]


def test_a_later_system_turn_and_an_old_function_call_are_in_the_text(tokenizer):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
        {"role": "system", "content": "From now on answer in French."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "sun"},
        {"role": "assistant", "content": "Non."},
    ]
    row = sft.normalize({"messages": turns}, "row 1")
    ids, _ = render_chat(tokenizer, row["messages"], row["think"], [], False)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "<|im_start|>system\nFrom now on answer in French.<|im_end|>" in text
    assert 'assistant\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' in text
    assert "<tool_response>\nsun\n</tool_response>" in text


def test_a_set_that_is_named_again_is_read_as_often(tmp_path):
    """Stage 2 sees science twice and SWE three times (paper 3.2.4, 3.3.2)."""
    for name, n in (("a", 10), ("b", 3)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({name: i}) + "\n" for i in range(n))
        )
    cursors = data.fresh_cursors(
        f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl,{tmp_path}/b.jsonl,{tmp_path}/b.jsonl"
    )
    rows = [row for _, row in data.stream_rows(cursors)]
    assert sorted(map(str, rows)) == sorted(
        [str({"a": i}) for i in range(10)] + [str({"b": i}) for i in range(3)] * 3
    )
    assert all(share == 1 for _, _, share in cursors.values()) and len(cursors) == 4


def test_a_commit_to_a_hub_s_set_does_not_strand_a_run(monkeypatch, tokenizer):
    """The names of its files hold the commit; a resumed run reads on in the one that it began
    with."""
    state = {
        "epoch": 0,
        "block": 0,
        "position": 0,
        "seen": {},
        "files": {f"hf://datasets/a/b@{'1' * 40}/x.jsonl": [5, 50, 0.5]},
    }
    monkeypatch.setattr(
        sft, "fresh_cursors", lambda path: {f"hf://datasets/a/b@{'2' * 40}/x.jsonl": [0, 0, 0.0]}
    )
    read = []
    monkeypatch.setattr(
        sft,
        "load_samples",
        lambda path, tokenizer, cfg, cursors, seen: (
            read.append(dict(cursors)) or [([1], [1], "all")] * 4
        ),
    )
    next(sft.stream_steps(tokenizer, state, sft.Config(samples_per_step=2)))
    assert list(read[0]) == [f"hf://datasets/a/b@{'1' * 40}/x.jsonl"]
    monkeypatch.setattr(
        sft, "fresh_cursors", lambda path: {f"hf://datasets/a/b@{'2' * 40}/y.jsonl": [0, 0, 0.0]}
    )
    with pytest.raises(SystemExit):
        next(sft.stream_steps(tokenizer, state, sft.Config(samples_per_step=2)))


def test_the_learning_rate_by_hand():
    cfg = config(lr=1.0, warmup_steps=10, schedule_steps=100)

    def rate(step):
        return sft.learning_rate(step, cfg)

    # half way up, on the cosine's shoulder
    assert rate(5) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.05)))
    assert rate(10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.1)))
    assert rate(50) == pytest.approx(0.5) and rate(100) == 0.0 == rate(500)
    assert [rate(s) for s in range(1, 11)] == sorted(rate(s) for s in range(1, 11))
    assert [rate(s) for s in range(10, 101)] == sorted(
        (rate(s) for s in range(10, 101)), reverse=True
    )


# ---- Which conversations: blocks of a stream -----------------------------------------------------
@pytest.fixture()
def rows(tmp_path, monkeypatch):
    """rows({file: number of rows}) -> folder whose conversations are tokenized to [file number,
    row number]."""

    def render(tokenizer, messages, think, tools, add_generation_prompt):
        return [int(word) for word in messages[0]["content"].split()], [0, 1]

    def rows(sizes):
        for f, (name, n) in enumerate(sizes.items()):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            turns = [
                [
                    {"role": "user", "content": f"{f} {i}"},
                    {"role": "assistant", "content": "x" * (1 + 9 * f)},
                ]
                for i in range(n)
            ]
            (tmp_path / name).write_text(
                "".join(json.dumps({"messages": t, "category": name}) + "\n" for t in turns)
            )
        return str(tmp_path)

    monkeypatch.setattr(sft, "render_chat", render)
    return rows


def fresh():
    return {"epoch": 0, "block": 0, "position": 0, "files": {}, "seen": {}}


def walk(cfg, steps, state=None):
    """([file, row] of each conversation, step after step, and the state as a checkpoint would
    keep it after each step)"""
    state = fresh() if state is None else state
    stream, taken, states = sft.stream_steps(None, state, cfg), [], []
    for _ in range(steps):
        taken.append([ids.tolist() for ids, _, _ in next(stream)])
        states.append(json.loads(json.dumps(state)))
    return taken, states


@pytest.mark.parametrize("block_rows", [1000, 30, 7, 1])
@pytest.mark.parametrize("samples_per_step", [4, 8, 100])
def test_every_epoch_has_every_conversation_once_and_an_order_of_its_own(
    block_rows, samples_per_step, rows
):
    path = rows({"a.jsonl": 24, "b/c.jsonl": 6})
    taken, _ = walk(
        config(data=path, samples_per_step=samples_per_step, block_rows=block_rows),
        240 // samples_per_step,
    )
    flat, epochs = sum(taken, []), []
    for epoch in range(len(flat) // 30):
        epochs.append(flat[30 * epoch : 30 * epoch + 30])
        assert sorted(epochs[-1]) == [[0, i] for i in range(24)] + [[1, i] for i in range(6)]
    assert block_rows == 1 or epochs[0] != epochs[1]
    assert flat == sum(
        walk(
            config(data=path, samples_per_step=samples_per_step, block_rows=block_rows), len(taken)
        )[0],
        [],
    ), "a function of the seed"
    assert block_rows == 1 or flat != sum(
        walk(
            config(data=path, samples_per_step=samples_per_step, block_rows=block_rows, seed=4),
            len(taken),
        )[0],
        [],
    )


def test_a_set_that_is_one_block_is_walked_through_in_permutations_of_seed_and_epoch(rows):
    taken, _ = walk(config(data=rows({"a.jsonl": 10}), samples_per_step=5, seed=3), 4)
    order = [np.random.default_rng([3, epoch]).permutation(10).tolist() for epoch in range(2)]
    assert [i for _, i in sum(taken, [])] == sum(order, [])


@pytest.mark.parametrize("block_rows", [1000, 16, 5])
def test_a_resumed_run_reads_the_same_conversations_from_any_step_on(block_rows, rows):
    cfg = config(
        data=rows({"a.jsonl": 40, "b.jsonl": 13}), samples_per_step=6, block_rows=block_rows
    )
    taken, states = walk(cfg, 20)
    for step in range(1, 20):
        assert walk(cfg, 20 - step, states[step - 1])[0] == taken[step:]


def test_every_block_has_the_mix_of_all_files_by_size(rows):
    """Three quarters of the bytes in one file: three quarters of every block's bytes, to within a
    row of each."""
    path = rows({"a.jsonl": 300, "b.jsonl": 100})
    sizes = {
        f: (len(open(f"{path}/{name}").read()), n)
        for f, (name, n) in enumerate({"a.jsonl": 300, "b.jsonl": 100}.items())
    }
    taken, _ = walk(config(data=path, samples_per_step=40, block_rows=40), 10)
    shares = [sum(f == 0 for f, _ in step) / 40 for step in taken]
    print(
        f"rows of the first file in each block: {shares}, in the whole {300 / 400}; bytes {sizes}"
    )
    assert all(abs(share - 0.75) <= 0.05 for share in shares)


def test_rows_that_do_not_fit_are_dropped_by_block_and_counts_by_category_go_on(
    rows, monkeypatch, capsys
):
    path = rows({"a.jsonl": 20, "b.jsonl": 4})
    with open(f"{path}/a.jsonl", "a") as f:
        f.write('{"messages": []}\n')
    render = sft.render_chat

    def long(*args, **kw):
        return ([0] * 99, [1] * 99) if args[1][0]["content"] == "1 3" else render(*args, **kw)

    monkeypatch.setattr(sft, "render_chat", long)
    taken, _ = walk(config(data=path, samples_per_step=23, block_rows=13, max_seq_len=50), 1)
    assert sorted(taken[0])[:-3] == [[0, i] for i in range(20)]
    printed = capsys.readouterr().out
    assert "over 50 tokens" in printed and "the last turn is not the assistant's" in printed
    assert [line.split()[3] for line in printed.splitlines() if f"{path}: a.jsonl" in line][
        -1
    ] == "20"
    assert [line.split()[3] for line in printed.splitlines() if f"{path}: b.jsonl" in line][
        -1
    ] == "3"


def test_limit_ends_the_epoch_early(rows):
    taken, _ = walk(
        config(data=rows({"a.jsonl": 40}), samples_per_step=5, limit=10, block_rows=4), 4
    )
    assert sorted(taken[0] + taken[1]) == sorted(taken[2] + taken[3]) == [[0, i] for i in range(10)]


def test_other_files_than_those_trained_on_so_far_are_refused(rows, tmp_path):
    cfg = config(data=rows({"a.jsonl": 8}), samples_per_step=4)
    _, states = walk(cfg, 1)
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(SystemExit):
        walk(cfg, 1, states[0])


def test_memory_is_bounded_by_the_block_not_by_the_set(rows, tmp_path):
    """Ten times the rows at the same block_rows: the peak of a whole epoch stays, while ten times
    the block needs more."""
    peaks = {}
    for n, block_rows in ((400, 200), (4000, 200), (4000, 4000)):
        path = rows({"a.jsonl": n})
        stream = sft.stream_steps(
            None, fresh(), config(data=path, samples_per_step=100, block_rows=block_rows)
        )
        tracemalloc.start()
        for _ in range(n // 100):
            next(stream)
        peaks[n, block_rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    print("peak bytes {rows, block_rows}:", peaks)
    assert peaks[4000, 200] < 1.3 * peaks[400, 200] < peaks[4000, 4000]


def test_held_out_loss_is_per_trained_token_and_by_category():
    samples, model = random_samples(), make_tiny()
    metrics = sft.evaluate(model, samples, config(), torch.device("cpu"))
    with torch.no_grad():
        for category in ("even", "odd"):
            expected = literal_loss(model, [s for s in samples if s[2] == category]).item()
            assert metrics[f"eval/{category}"] == pytest.approx(expected, rel=1e-5)


def test_the_rate_stays_at_zero_after_the_schedule():
    assert sft.learning_rate(150, sft.Config(schedule_steps=100, warmup_steps=0)) == 0.0


def test_a_conversation_of_exactly_the_limit_is_kept(world, tokenizer):
    path = str(world / "sft_stage2.jsonl")
    longest = max(
        len(ids) for ids, _, _ in sft.load_samples(path, tokenizer, config(max_seq_len=512))
    )
    assert (
        max(
            len(ids) for ids, _, _ in sft.load_samples(path, tokenizer, config(max_seq_len=longest))
        )
        == longest
    )


def test_sft_clips_its_gradient_and_applies_none_that_is_not_finite():
    model = make_tiny()

    def flat():
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    optimizer, before = torch.optim.SGD(model.parameters(), lr=1.0), flat()
    logged = sft.train_step(
        model, optimizer, random_samples(), config(grad_clip=0.01), torch.device("cpu"), world=1
    )
    assert (flat() - before).norm().item() == pytest.approx(0.01, rel=1e-3) and logged[
        "grad_norm"
    ] > 0.02
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    before = flat()
    logged = sft.train_step(
        model, optimizer, random_samples(), config(), torch.device("cpu"), world=1
    )
    assert not math.isfinite(logged["loss"] + logged["grad_norm"]) and torch.equal(flat(), before)


def test_llama_nemotron_rows_without_a_mode_are_answers_without_thinking():
    row = {"input": [{"role": "user", "content": "Hi"}], "output": "Ho"}
    thinks = row | {"output": "<think>\nHm.\n</think>\n\nHo"}
    assert [sft.normalize(row | mode, "x")["think"] for mode in ({}, {"reasoning": "off"})] == [
        False,
        False,
    ]
    assert [sft.normalize(thinks | mode, "x")["think"] for mode in ({}, {"reasoning": "on"})] == [
        True,
        True,
    ]
