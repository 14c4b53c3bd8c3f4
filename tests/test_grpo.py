"""GRPO on examples small enough to check by hand: start here. What is tested stands below the
waterline of mathrl.py.

One step: sample G completions a prompt -> reward -> advantage inside the group -> one packed
batch -> one loss with one denominator -> one update. The order of the tests is the order of the
step; the last part is rlhf.py's stabilisers.
"""

import inspect
import itertools
import json
import math
import pickle
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import make_tiny
from transformers import AutoModelForCausalLM

import coderl
import ifrl
import mathrl
import rlhf
import swerl
from engine import Rollout, sampler_correction
from lib import common, packing, prompts
from lib.logs import summarize
from lib.packing import pack_rollouts, shared_prefixes
from verifiers import constraints

CFG = dict(group_size=4, temperature=0.9, micro_batch_tokens=64, overlong_filter=True)
STOP = 2  # the stop token of these examples


def config(**changes):
    return mathrl.Config(**{**CFG, **changes})


def rollout(
    reward, group=0, status="ok", finish_reason="stop", prompt=(5, 6), completion=(7, STOP)
):
    return Rollout(
        row={"messages": [], "think": False},
        group=group,
        prompt_ids=list(prompt),
        seed=0,
        completion_ids=list(completion),
        sampler_logprobs=[0.0] * len(completion),
        finish_reason=finish_reason,
        reward=reward,
        status=status,
    )


def advantages(rollouts, **changes):
    mathrl.compute_advantages(rollouts, config(**changes))
    return [round(r.advantage, 4) for r in rollouts]


# ---- 1. Advantages: (r - mean) / (std + 1e-6) inside the group, std unbiased ---------------------
def test_advantages_by_hand():
    # The mean is 0.25 and the deviations are 0.75, -0.25, -0.25, -0.25. The variance is
    # (0.5625 + 3 * 0.0625) / 3 = 0.25, so the standard deviation is 0.5.
    assert advantages([rollout(r) for r in (1.0, 0.0, 0.0, 0.0)]) == [1.5, -0.5, -0.5, -0.5]
    # Two groups do not see each other. The second has mean 2.5 and variance
    # (2.25 + 0.25 + 0.25 + 2.25) / 3 = 1.6667, so its standard deviation is 1.291.
    first = [rollout(r) for r in (1.0, 0.0, 0.0, 0.0)]
    second = [rollout(r, group=1) for r in (1.0, 2.0, 3.0, 4.0)]
    assert advantages(first + second) == [1.5, -0.5, -0.5, -0.5, -1.1619, -0.3873, 0.3873, 1.1619]


@pytest.mark.parametrize("reward", [0.0, 1.0, -1.0, 0.1 + 0.2])
def test_advantages_of_an_all_equal_group_are_zero(reward):
    """Exactly zero: a standard deviation of 1e-17 from rounding would blow up to an advantage."""
    rollouts = [rollout(reward) for _ in range(4)]
    assert advantages(rollouts) == [0.0] * 4
    assert all(r.in_loss for r in rollouts), "their tokens stay in the denominator (G5)"


def test_the_overlong_filter_leaves_truncated_rollouts_out():
    def group():
        return [rollout(1.0), rollout(0.0), rollout(0.0, finish_reason="length"), rollout(0.0)]

    # Rewards (1, 0, 0) are left: their mean is 1/3, their standard deviation 0.57735.
    assert advantages(group()) == [1.1547, -0.5773, 0.0, -0.5773]
    assert advantages(group(), overlong_filter=False) == [1.5, -0.5, -0.5, -0.5]
    filtered = group()
    advantages(filtered)
    assert [r.in_loss for r in filtered] == [True, True, False, True]


def test_infrastructure_failures_are_always_left_out():
    for overlong_filter in (True, False):
        group = [rollout(1.0), rollout(0.0), rollout(float("nan"), status="infra"), rollout(0.0)]
        assert advantages(group, overlong_filter=overlong_filter) == [1.1547, -0.5773, 0.0, -0.5773]
        assert [r.in_loss for r in group] == [True, True, False, True]


def test_a_group_of_which_one_rollout_is_left_teaches_nothing():
    group = [rollout(1.0)] + [rollout(0.0, finish_reason="length") for _ in range(3)]
    assert advantages(group) == [0.0] * 4
    assert not any(r.in_loss for r in group)


def test_a_missing_reward_is_an_error_not_a_zero():
    missing = rollout(float("nan"), status="wrong")
    with pytest.raises(AssertionError, match="reward nan"):
        advantages([rollout(1.0), rollout(0.0), missing, rollout(0.0)])


def test_torn_groups_are_refused():
    with pytest.raises(AssertionError, match="torn"):
        advantages([rollout(1.0), rollout(0.0), rollout(0.0, group=1), rollout(0.0, group=1)])


# ---- 2. The packed batch: flat tokens, offsets, and the positions of completion tokens -----------
def test_a_packed_batch_by_hand():
    a = rollout(1, prompt=(5, 6), completion=(7, STOP))
    b = rollout(0, prompt=(8,), completion=(9, 10, 11))
    a.advantage, b.advantage = 1.5, -0.5
    a.sampler_logprobs, b.sampler_logprobs = [-1.0, -2.0], [-3.0, -4.0, -5.0]
    batch = pack_rollouts([a, b], "cpu")
    assert batch["input_ids_T"].tolist() == [5, 6, 7, STOP, 8, 9, 10, 11]
    assert batch["cu_seqlens"].tolist() == [0, 4, 8] and batch["max_seqlen"] == 4
    # The loss counts the completions with their stop tokens, and no prompt token.
    assert batch["loss_index"].tolist() == [2, 3, 5, 6, 7]
    assert batch["advantages_T"].tolist() == [0, 0, 1.5, 1.5, 0, -0.5, -0.5, -0.5]
    assert batch["sampler_logprobs_T"].tolist() == [0, 0, -1, -2, 0, -3, -4, -5]


def test_the_batch_drawn_in_mathrl_is_what_the_packer_makes():
    """Every line of the drawing above rollout() in mathrl.py is compared with pack_rollouts."""
    a = rollout(1, prompt=(5, 6), completion=(7, 8))
    b = rollout(0, prompt=(5, 6), completion=(9,))
    a.advantage, b.advantage = 0.7, -0.7
    batch = pack_rollouts([a, b], "cpu")
    drawn = {}
    for line in inspect.getsource(mathrl).splitlines():
        if match := re.match(r"#     (\w+) ((?: +-?[\d.]+)+)", line):
            drawn[match[1]] = [float(number) for number in match[2].split()]
    first_U, copy_T = batch.pop("shared")
    made = batch | {"copy_T": copy_T, "t": torch.arange(7)}
    assert len(drawn) == 6 and "first_U = [0, 1, 2, 3, 6]" in inspect.getsource(mathrl)
    assert first_U.tolist() == [0, 1, 2, 3, 6]
    for name, numbers in drawn.items():
        assert made[name].tolist() == pytest.approx(numbers), name


def test_shared_prefixes_by_hand_and_against_all_prefixes():
    first_U, copy_T = shared_prefixes([[5, 6, 7], [5, 6, 8]], "cpu")
    assert first_U.tolist() == [0, 1, 2, 5] and copy_T.tolist() == [0, 1, 2, 0, 1, 3]
    # Equal tokens after different pasts are not shared.
    assert shared_prefixes([[5, 6, 7], [6, 6, 7]], "cpu") is None
    draw = random.Random(0)
    for _ in range(200):
        num_sequences = draw.randint(2, 12)
        sequences = [draw.choices((1, 2), k=draw.randint(1, 8)) for _ in range(num_sequences)]
        pasts = [tuple(s[: i + 1]) for s in sequences for i in range(len(s))]
        shared = shared_prefixes(sequences, "cpu")
        if shared is None:
            assert len(set(pasts)) >= 0.9 * len(pasts)
            continue
        first_U, copy_T = shared
        assert len(first_U) == len(set(pasts)), "each past is there once"
        found = [pasts[i] for i in first_U[copy_T].tolist()]
        assert found == pasts, "every token finds its own past"


def test_micro_batches_hold_every_sequence_once_in_their_budget():
    rollouts = []
    for n in range(40):
        r = rollout(0, group=n, prompt=range(3, 4 + n % 5), completion=range(10, 11 + n % 7))
        r.advantage = (n % 3 - 1.0) * (n + 1)  # every third has none and is left out
        rollouts.append(r)
    batches, _ = mathrl.collate(rollouts, config(micro_batch_tokens=30), "cpu")
    assert len(batches) > 3 and all(len(b["input_ids_T"]) <= 30 for b in batches)
    seen, expected = [], []  # the advantage of every token that the loss counts
    for b in batches:
        seen += b["advantages_T"][b["loss_index"]].tolist()
    for r in rollouts:
        if r.advantage:
            expected += [r.advantage] * len(r.completion_ids)
    assert sorted(seen) == sorted(expected)


def test_samples_of_a_prompt_share_a_micro_batch():
    rollouts = []
    for n, g in itertools.product(range(4), range(5)):
        length = 1 + (3 * g + n) % 7
        r = rollout(0, group=g, prompt=[g + 1] * 12, completion=range(10, 10 + length))
        r.advantage = 1.0
        rollouts.append(r)
    batches, _ = mathrl.collate(rollouts, config(micro_batch_tokens=80), "cpu")
    groups = [b["input_ids_T"][b["cu_seqlens"][:-1].long()].tolist() for b in batches]
    for part in groups:
        runs = [key for key, _ in itertools.groupby(part)]
        assert len(runs) == len(set(part)), "samples of a group stand side by side"
    num_parts = sum(len(set(part)) for part in groups)
    assert num_parts <= 5 + len(batches) - 1, "a group is cut only where a micro-batch ends"


def test_a_sequence_longer_than_the_budget_is_a_batch_of_its_own():
    rollouts = [rollout(1, completion=range(50)), rollout(0)]
    rollouts[0].advantage, rollouts[1].advantage = 1.0, -1.0
    batches, _ = mathrl.collate(rollouts, config(micro_batch_tokens=10), "cpu")
    assert [len(b["input_ids_T"]) for b in batches] == [52, 4]


# ---- 3. The loss: -sum of ratio * advantage over completion tokens, by the tokens of the step ----
def token_batch(advantage_of_tokens):
    """One sequence: a prompt token, then one completion token per advantage."""
    T = 1 + len(advantage_of_tokens)
    return {
        "cu_seqlens": torch.tensor([0, T], dtype=torch.int32),
        "loss_index": torch.arange(1, T),
        "advantages_T": torch.tensor([0.0, *advantage_of_tokens]),
    }


def loss_and_grad(ratios, advantage_of_tokens, tokens, stage=mathrl, cfg=None):
    old_T = torch.tensor([0.0] + [-1.0] * len(ratios))
    logprobs_T = (old_T + torch.tensor([1.0, *ratios]).log()).requires_grad_()
    counts = {"tokens": tokens, "sequences": 1}
    loss = stage.grpo_loss(
        logprobs_T=logprobs_T,
        old_logprobs_T=old_T,
        batch=token_batch(advantage_of_tokens),
        counts=counts,
        cfg=cfg or config(),
    )
    loss.backward()
    return loss.item(), logprobs_T.grad.tolist()


def test_loss_by_hand_on_three_tokens():
    # Ratios 1.1, 0.9, 1.0 and advantage 2 give -(2.2 + 1.8 + 2.0) / 3 = -2. The derivative of a
    # ratio by its log-prob is the ratio.
    loss, grad = loss_and_grad([1.1, 0.9, 1.0], [2.0, 2.0, 2.0], tokens=3)
    assert loss == pytest.approx(-2.0)
    assert grad == pytest.approx([0.0, -2.2 / 3, -1.8 / 3, -2.0 / 3])
    # In a step of 30 tokens the same three give a tenth, though this micro-batch holds no others.
    assert loss_and_grad([1.1, 0.9, 1.0], [2.0, 2.0, 2.0], tokens=30)[0] == pytest.approx(-0.2)


def test_on_policy_the_ratio_is_one_and_the_gradient_reinforce():
    logprobs_T = torch.randn(9).requires_grad_()
    batch = token_batch([0.7] * 5 + [-1.3] * 3)
    loss = mathrl.grpo_loss(
        logprobs_T=logprobs_T,
        old_logprobs_T=logprobs_T.detach(),
        batch=batch,
        counts={"tokens": 8},
        cfg=config(),
    )
    loss.backward()
    assert loss.item() == (-(batch["advantages_T"][1:].sum()) / 8).item()
    assert logprobs_T.grad.tolist() == (-batch["advantages_T"] / 8).tolist()


def test_only_completion_tokens_get_gradient_stop_token_included():
    # The second prompt is made of stop tokens: a mask that is made from ids would fail here.
    a = rollout(1, completion=(7, 9, STOP))
    b = rollout(0, prompt=(STOP, STOP), completion=(STOP,))
    a.advantage, b.advantage = 1.0, -1.0
    batch = pack_rollouts([a, b], "cpu")
    logprobs_T = torch.full((8,), -1.0).requires_grad_()
    mathrl.grpo_loss(
        logprobs_T=logprobs_T,
        old_logprobs_T=logprobs_T.detach(),
        batch=batch,
        counts={"tokens": 4},
        cfg=config(),
    ).backward()
    # The tokens are prompt, prompt, 7, 9, stop and then prompt, prompt, stop.
    assert logprobs_T.grad.tolist() == [0, 0, -0.25, -0.25, -0.25, 0, 0, 0.25]


# ---- 4. The whole update, against a twin that is nothing but the formula -------------------------
def random_step(seed=0, groups=5, G=4):
    """Rollouts with random tokens and rewards. Two are truncated, one has no verdict (infra), and
    the rewards of one group are all equal."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=draw))

    def ids(n):
        return torch.randint(0, 61, (n,), generator=draw).tolist()

    rollouts = []
    for g in range(groups):
        prompt = ids(number(2, 9))
        for n in range(G):
            completion = ids(number(1, 12)) + [STOP]
            reward = float(number(0, 2)) if g else 1.0
            sample = rollout(reward, group=g, prompt=prompt, completion=completion)
            sample.sampler_logprobs = [-1.0] * len(completion)
            rollouts.append(sample)
    rollouts[6].finish_reason, rollouts[11].finish_reason = "length", "length"
    rollouts[13].reward, rollouts[13].status = float("nan"), "infra"
    for g in range(1, groups):
        rollouts[4 * g].reward, rollouts[4 * g + 1].reward = 1.0, 0.0
    return rollouts


def gradient(rollouts, stage=mathrl, model=None, **changes):
    """Return ({parameter: gradient}, metrics) of one train_step. The gradient is copied when the
    optimizer is about to use it."""
    model = model or make_tiny()
    cfg = stage.Config(**{**CFG, "grad_clip": 1e9, **changes})
    stage.compute_advantages(rollouts, cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grads = {}

    def copy_gradient(*_):
        for name, p in model.named_parameters():
            grads[name] = p.grad.clone()

    optimizer.register_step_pre_hook(copy_gradient)
    metrics = stage.train_step(model, optimizer, rollouts, cfg, torch.device("cpu"), world=1)
    return grads, metrics


def distance(a, b):
    """The largest difference of two gradients, relative to the largest entry of the first."""
    scale = max(g.abs().max() for g in a.values())
    return max((a[n] - b[n]).abs().max() for n in a).item() / scale.item()


def literal_twin(model, rollouts, cfg):
    """Equation 1 and section 6.3 of the paper, word for word: a padded float64 forward of
    transformers, and Python loops over groups and tokens."""

    def kept(r):
        return r.status != "infra" and not (cfg.overlong_filter and r.finish_reason == "length")

    longest = max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
    loss, num_tokens = 0.0, 0
    for group in sorted({r.group for r in rollouts}):
        members = [r for r in rollouts if r.group == group and kept(r)]
        rewards = torch.tensor([r.reward for r in members], dtype=torch.float64)
        for r, A in zip(members, (rewards - rewards.mean()) / (rewards.std() + 1e-6)):
            ids = r.prompt_ids + r.completion_ids
            row = torch.tensor([ids + [0] * (longest - len(ids))])
            seen = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids))])
            logits = model(row, attention_mask=seen).logits[0] / cfg.temperature
            for t in range(len(r.prompt_ids), len(ids)):
                logprob = torch.log_softmax(logits[t - 1], -1)[ids[t]]
                ratio = (logprob - logprob.detach()).exp()
                loss = loss - torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
                num_tokens += 1
    (loss / num_tokens).backward()
    return {n: p.grad for n, p in model.named_parameters()}, (loss / num_tokens).item(), num_tokens


@pytest.mark.parametrize("overlong_filter", [True, False])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_and_gradient_equal_the_literal_formula(tied, overlong_filter, tmp_path):
    model, rollouts = make_tiny(tie_word_embeddings=tied), random_step()
    model.save_pretrained(tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    )
    grads, metrics = gradient(rollouts, model=model, overlong_filter=overlong_filter)
    expected, loss, num_tokens = literal_twin(
        twin, rollouts, config(overlong_filter=overlong_filter)
    )
    error = distance(expected, {n: g.double() for n, g in grads.items()})
    print(
        f"gradient against the formula in float64: relative error {error:.1e}, tolerance 1e-05; "
        f"loss {metrics['loss']:.6f} against {loss:.6f}"
    )
    assert error < 1e-5 and grads.keys() == expected.keys()
    assert metrics["num_tokens"] == num_tokens and abs(metrics["loss"] - loss) < 1e-6


def test_gradient_does_not_depend_on_micro_batch_tokens():
    reference, metrics = gradient(random_step(), micro_batch_tokens=10**6)
    for micro_batch_tokens in (1, 25, 60):
        grads, again = gradient(random_step(), micro_batch_tokens=micro_batch_tokens)
        error = distance(reference, grads)
        print(
            f"micro-batches of {micro_batch_tokens} tokens: relative difference {error:.1e}, "
            "tolerance 1e-05"
        )
        assert error < 1e-5
        assert again == pytest.approx(metrics, rel=1e-5), "no metric may depend on it either"


def test_gradient_does_not_depend_on_the_order_of_rollouts():
    def shuffled(order, inner):
        rollouts = random_step()
        return [rollouts[4 * g + n] for g in order for n in inner]

    reference, _ = gradient(random_step())
    for order, inner in (((4, 2, 0, 1, 3), (0, 1, 2, 3)), ((0, 1, 2, 3, 4), (3, 1, 0, 2))):
        error = distance(reference, gradient(shuffled(order, inner))[0])
        print(f"groups {order}, inside {inner}: relative difference {error:.1e}, tolerance 1e-05")
        assert error < 1e-5


def test_a_mean_per_micro_batch_would_fail_the_tests_above():
    """The usual wrong denominator fails, so the tolerance above means something."""
    original = mathrl.grpo_loss

    def mean_of_the_micro_batch(logprobs_T, old_T, batch, counts, cfg):
        return original(logprobs_T, old_T, batch, {"tokens": len(batch["loss_index"])}, cfg)

    try:
        mathrl.grpo_loss = mean_of_the_micro_batch
        whole, _ = gradient(random_step(), micro_batch_tokens=10**6)
        cut, _ = gradient(random_step(), micro_batch_tokens=25)
    finally:
        mathrl.grpo_loss = original
    error = distance(whole, cut)
    print(f"per-micro-batch means: relative difference {error:.1e}")
    assert error > 1e-2


def test_a_step_without_any_signal_changes_nothing():
    model = make_tiny()
    before = {n: p.clone() for n, p in model.named_parameters()}
    cfg, rollouts = config(), [rollout(1.0) for _ in range(8)]
    for r in rollouts[4:]:
        r.group = 1
    mathrl.compute_advantages(rollouts, cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    metrics = mathrl.train_step(model, optimizer, rollouts, cfg, torch.device("cpu"), world=1)
    assert metrics["grad_norm"] == 0 and metrics["num_tokens"] == 16
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_is_not_applied():
    model, rollouts = make_tiny(), random_step()
    before = {n: p.clone() for n, p in model.named_parameters()}
    mathrl.compute_advantages(rollouts, config())
    rollouts[5].advantage = float("inf")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    metrics = mathrl.train_step(model, optimizer, rollouts, config(), torch.device("cpu"), world=1)
    assert not math.isfinite(metrics["grad_norm"])
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())


def test_one_update_makes_good_completions_likelier():
    model = make_tiny()
    rollouts = random_step()
    cfg = config(micro_batch_tokens=10**6, grad_clip=1.0)
    mathrl.compute_advantages(rollouts, cfg)
    (batch,), _ = mathrl.collate(rollouts, cfg, "cpu")

    def score():
        logprobs_T, _ = model.token_logprobs(batch, cfg.temperature)
        return (logprobs_T * batch["advantages_T"]).sum().item()

    before = score()
    mathrl.train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        rollouts,
        cfg,
        torch.device("cpu"),
        world=1,
    )
    assert score() > before


# ---- 5. Which prompts: a walk through permutations, and dynamic sampling -------------------------
def fresh_state():
    return {"epoch": 0, "position": 0, "pool": [], "history": {}}


def test_every_epoch_is_a_permutation_of_the_rows():
    rows = [{} for _ in range(12)]
    state = fresh_state()
    cfg = config(prompts_per_step=4)
    epochs = [[], []]
    for epoch in epochs:
        for _ in range(3):
            epoch += mathrl.next_prompts(rows, state, cfg, mathrl.select_rows)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]


def test_next_prompts_goes_on_from_a_state_saved_as_json():
    rows, cfg = [{} for _ in range(10)], config(prompts_per_step=4)
    straight, state = [], fresh_state()
    for _ in range(9):
        straight.append(mathrl.next_prompts(rows, state, cfg, mathrl.select_rows))
    resumed, state = [], fresh_state()
    for step in range(9):
        resumed.append(mathrl.next_prompts(rows, state, cfg, mathrl.select_rows))
        state = json.loads(json.dumps(state))
    assert straight == resumed


def test_the_epoch_filter_drops_solved_and_hopeless_problems():
    """Paper 4.5.2, through next_prompts. Rows 0-9 are always solved, rows 10-19 never, and the
    others sometimes; then some of the dropped rows return."""
    rows = [{} for _ in range(30)]
    cfg = config(prompts_per_step=10, readmit_easy=0.0, readmit_hard=0.0)
    state = fresh_state()
    first = []
    for _ in range(3):
        first += mathrl.next_prompts(rows, state, cfg, mathrl.select_rows)
    assert sorted(first) == list(range(30))
    num_correct = [4] * 10 + [0] * 10 + [2] * 10
    state["history"] = {str(i): [correct, 4] for i, correct in enumerate(num_correct)}
    assert sorted(mathrl.next_prompts(rows, state, cfg, mathrl.select_rows)) == list(range(20, 30))
    state = fresh_state() | {"history": state["history"], "epoch": 1}
    cfg = config(prompts_per_step=20, readmit_easy=0.0, readmit_hard=1.0)
    assert sorted(mathrl.next_prompts(rows, state, cfg, mathrl.select_rows)) == list(range(10, 30))


def test_what_the_epoch_filter_counts():
    """It counts, by row, the correct and the sampled rollouts. A rollout that the overlong filter
    leaves out is no evidence of difficulty."""
    rollouts = [
        rollout(1.0),
        rollout(0.0, status="wrong"),
        rollout(0.0, status="no_answer", finish_reason="length"),
        rollout(1.0),
    ]
    for r in rollouts:
        r.row = {"index": 7, "messages": []}
    mathrl.compute_advantages(rollouts, config())
    assert prompts.count_correct(rollouts) == {"7": [2, 3]}


class TableEngine:
    """An engine without a model: every completion is one stop token, and a table says what it
    earns."""

    def __init__(self, rewards):
        self.rewards = rewards  # function of a row's index: the rewards of its G samples
        self.asked = []  # the rows of each call of generate()

    def generate(self, rollouts, max_new_tokens, temperature, top_p, top_k, on_finished):
        self.asked.append([r.row["index"] for r in rollouts[::4]])
        for r in rollouts:
            r.completion_ids = [STOP]
            r.sampler_logprobs = [0.0]
            r.finish_reason = "stop"
            r.text = ""
            on_finished(r)

    def collect(self, rollouts):
        for n, r in enumerate(rollouts):
            r.reward, r.status = self.rewards(r.row["index"])[n % 4], "ok"


def roll(rewards, num_rows=20, indices=(0, 1, 2, 3), flat=0.0, **changes):
    """Return the rollouts to train on, the rollouts for the log, and the engine. flat: the share of
    groups without a gradient in the step before."""
    engine = TableEngine(rewards)
    submitted = []
    rows = [{"index": i, "messages": [], "prompt_ids": [i]} for i in range(num_rows)]
    hook = (submitted.append, engine.collect)
    cfg = ifrl.Config(**{**CFG, "max_refill_rounds": 0, **changes})
    state = {"flat": flat}
    trained, sampled = ifrl.rollout(engine, rows, list(indices), 1, state, cfg, hook, 0, 1)
    num_sampled = 4 * sum(map(len, engine.asked))
    assert len(submitted) == num_sampled, "every finished completion goes to the verifier at once"
    return trained, sampled, engine


# The rewards of a group without a gradient, and of a group with one.
FLAT = [0.0] * 4
UNEVEN = [1.0, 0.0, 0.0, 1.0]


def on_ranks(world, monkeypatch, work):
    """[work(rank) for every rank], each in a thread of its own. What a rank gathers is pickled, as
    between processes."""
    here = threading.local()
    meet = threading.Barrier(world, timeout=60)
    sent = [None] * world

    def all_gather(value):
        sent[here.rank] = pickle.dumps(value)
        meet.wait()
        received = [pickle.loads(text) for text in sent]
        meet.wait()
        return received

    def on_rank(rank):
        here.rank = rank
        return work(rank)

    for module in (packing, common):
        monkeypatch.setattr(module, "all_gather", all_gather)
        monkeypatch.setattr(module, "ranks", lambda: (here.rank, world))
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(on_rank, range(world)))


class SpreadEngine(TableEngine):
    """A TableEngine that does not know which rank it is on: the seed decides a sample's reward."""

    def collect(self, rollouts):
        for r in rollouts:
            flat = self.rewards(r.row["index"]) == FLAT
            r.reward, r.status = 0.0 if flat else float(r.seed % 2), "ok"


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("stage, refills", [(mathrl, 0), (ifrl, 0), (ifrl, 3)])
def test_samples_are_spread_over_the_ranks_and_nothing_else_changes(
    stage, refills, world, monkeypatch
):
    """Every rank has as many of a prompt's samples, and seeds, rewards, advantages and what is kept
    are those of one process."""
    rows = [{"index": i, "messages": [], "prompt_ids": [i]} for i in range(40)]
    changes = {"max_refill_rounds": refills} if stage is ifrl else {}
    cfg = stage.Config(**{**CFG, "group_size": 8, **changes})

    def work(rank, world=world):
        engine = SpreadEngine(lambda i: FLAT if i % 2 else UNEVEN)
        hook = (lambda r: None, engine.collect)
        return stage.rollout(engine, rows, [0, 1, 2, 3, 4, 5], 1, {}, cfg, hook, rank, world)

    def told(rollouts):
        return sorted((r.group, r.seed, r.reward, r.advantage, r.in_loss) for r in rollouts)

    trained, sampled = work(0, world=1)
    found = on_ranks(world, monkeypatch, work)
    for which, whole in enumerate((trained, sampled)):
        parts = [rollouts[which] for rollouts in found]
        assert told(r for part in parts for r in part) == told(whole)
        for group in {r.group for r in whole}:
            shares = [sum(r.group == group for r in part) for part in parts]
            assert max(shares) - min(shares) <= 1, "a prompt's samples are on all ranks"
    assert len({r.group for r in trained if r.advantage}) == (6 if refills else 3)


def test_prompts_that_were_long_last_time_go_first():
    """Row 2 had 90 tokens, row 0 had 10. Rows 1 and 3 are new and stand at the average of 50. The
    samples of a prompt stay together, and the seeds are those of the prompt's place."""
    rows = [{"index": i, "messages": [], "prompt_ids": [i]} for i in range(4)]
    engine = TableEngine(lambda i: FLAT)
    hook = (lambda r: None, engine.collect)
    seeds = []
    for state in ({}, {"lengths": {"2": 90.0, "0": 10.0}}):
        engine.asked = []
        _, sampled = mathrl.rollout(engine, rows, [0, 1, 2, 3], 1, state, config(), hook, 0, 1)
        seeds.append({(r.row["index"], r.seed) for r in sampled})
    assert engine.asked == [[2, 1, 3, 0]] and seeds[0] == seeds[1]


def test_what_a_step_leaves_behind_for_the_next_ones():
    groups = [rollout(1.0, completion=[7] * 10), rollout(0.0, status="wrong", completion=[7] * 30)]
    groups += [rollout(1.0, group=1, completion=[7] * 4, finish_reason="length") for _ in range(2)]
    for r in groups:
        r.row = {"index": 5 + r.group}
    mathrl.compute_advantages(groups, config(group_size=2))
    state = {"history": {"6": [0, 2], "9": [1, 2]}, "lengths": {"9": 8.0}}
    prompts.remember(groups, state)
    assert state["history"] == {"5": [1, 2], "6": [0, 2], "9": [1, 2]}, "6 was left out of the loss"
    assert state["lengths"] == {"5": 20.0, "6": 4.0, "9": 8.0}
    assert state["flat"] == 0.5


def test_without_refill_every_group_is_trained_on():
    trained, sampled, engine = roll(lambda i: UNEVEN if i == 2 else FLAT)
    assert trained == sampled and len(trained) == 16 and engine.asked == [[0, 1, 2, 3]]


def test_refill_keeps_uneven_groups_and_asks_for_the_missing():
    trained, sampled, engine = roll(lambda i: FLAT if i < 2 else UNEVEN, max_refill_rounds=4)
    assert len(engine.asked[0]) == 4 and [r.row["index"] for r in sampled[::4]] == [0, 1, 2, 3]
    assert len(trained) == 16
    assert {r.row["index"] for r in trained} >= {2, 3}
    assert all(r.row["index"] >= 2 for r in trained)
    assert len(engine.asked[1]) == 2, "two groups were missing"
    assert len({r.group for r in trained}) == 4, "fresh groups have numbers of their own"
    assert len({r.seed for r in trained}) == 16


def test_refill_is_bounded_by_its_rounds_and_by_the_rows():
    def uneven_once(i):
        return UNEVEN if i == 0 else FLAT

    trained, _, engine = roll(uneven_once, max_refill_rounds=3, num_rows=1000)
    assert len(engine.asked) == 4
    assert {r.row["index"] for r in trained} == {0}, "one group is left: the step is smaller"
    _, _, engine = roll(uneven_once, max_refill_rounds=99, num_rows=12)
    assert sum(map(len, engine.asked[1:])) <= 12


def test_without_an_uneven_group_there_is_nothing_to_train_on():
    trained, sampled, _ = roll(lambda i: FLAT, max_refill_rounds=2)
    assert len(sampled) == 16 and trained == []
    model = make_tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    metrics = ifrl.train_step(model, optimizer, trained, config(), torch.device("cpu"), world=1)
    assert metrics["grad_norm"] == metrics["num_tokens"] == 0 and not optimizer.state


def test_a_refill_asks_at_once_for_as_many_as_will_be_flat():
    """If half of the groups were flat in the step before, 4 prompts become 14, which is
    (4 + 2 sqrt(4 / 2)) / 0.5 and under the limit of 4 x (1 + 4). Where no group is flat then, the
    first 4 are kept."""
    _, sampled, engine = roll(lambda i: UNEVEN, flat=0.5, max_refill_rounds=4)
    assert len(engine.asked) == 1 and len(engine.asked[0]) == 14
    assert len(sampled) == 16, "the log has the step's own prompts only"
    trained, _, engine = roll(lambda i: UNEVEN, flat=0.99, max_refill_rounds=1)
    assert len(engine.asked[0]) == 8, "no more than before: one refill of all prompts"
    assert [r.row["index"] for r in trained[::4]] == [0, 1, 2, 3]
    _, _, engine = roll(lambda i: FLAT, flat=0.5, max_refill_rounds=0)
    assert engine.asked == [[0, 1, 2, 3]]


@pytest.mark.parametrize("flat", [0.2, 0.5, 0.9])
def test_the_groups_that_are_kept_do_not_depend_on_how_many_are_drawn_at_once(flat):
    """They are the first ones with a gradient, whatever share the step before had."""

    def rewards(i):
        return UNEVEN if i % 3 == 0 else FLAT

    one, _, few = roll(rewards, num_rows=200, max_refill_rounds=9)
    many, _, at_once = roll(rewards, num_rows=200, max_refill_rounds=9, flat=flat)
    assert [(r.group, r.seed) for r in one] == [(r.group, r.seed) for r in many]
    assert len(one) == 16 and len(at_once.asked) < len(few.asked)


def test_kept_groups_have_the_distribution_of_groups_with_a_gradient():
    """Of ten kinds of prompts, kind k has a gradient with chance k / 10. Kept groups then have kind
    k with chance k / 45, drawn one by one or many at once (chi-squared, 8 degrees of freedom: 26.1
    is passed by one sample of a thousand)."""
    draw = random.Random(0)
    for flat in (0.0, 0.55):
        counts = [0] * 10
        for step in range(60):
            luck = [draw.random() for _ in range(400)]

            def rewards(i, luck=luck):
                return UNEVEN if luck[i] < i % 10 / 10 else FLAT

            indices = draw.sample(range(400), 16)
            trained, _, _ = roll(
                rewards, num_rows=400, indices=indices, flat=flat, max_refill_rounds=9, seed=step
            )
            for r in trained[::4]:
                counts[r.row["index"] % 10] += 1
        total = sum(counts)
        expected = [total * k / 45 for k in range(10)]
        chi_squared = sum((n - e) ** 2 / e for n, e in zip(counts[1:], expected[1:], strict=True))
        print(f"flat share known as {flat}: {counts}, chi-squared {chi_squared:.1f}, limit 26.1")
        assert counts[0] == 0 and total > 900 and chi_squared < 26.1


def test_summary_by_hand():
    rollouts = [
        rollout(1.0, completion=(7, STOP)),
        rollout(0.0, status="wrong", completion=(7,), finish_reason="length"),
        rollout(float("nan"), status="infra"),
        rollout(0.0, status="no_answer"),
    ]
    rollouts += [rollout(1.0, group=1) for _ in range(4)]
    verified = (("a", 0.5), ("</think>b", 0.25), ("", 0.25))
    for r, (text, verify_s) in zip(rollouts[:3], verified, strict=True):
        r.row = {**r.row, "think": True}
        r.text = text
        r.verify_s = verify_s
    summary = summarize(rollouts, mathrl.monitor(rollouts))
    assert summary["reward"] == pytest.approx(5 / 7), "of the seven that have a reward"
    assert summary["flat"] == 0.5 and summary["trunc"] == 1 / 8 and summary["len"] == 15 / 8
    assert summary["unclosed"] == 2 / 8 and summary["time/verifiers"] == 1.0
    assert summary["status/infra"] == 1 / 8 and summary["status/ok"] == 5 / 8
    assert sum(v for k, v in summary.items() if k.startswith("status/")) == 1


# The names in metrics.jsonl that a stage logs besides EVERYWHERE, the names that all stages log.
LOGGED = {
    mathrl: {"box", "two_boxes", "box_wrong"},
    coderl: {"wrong", "timeout", "crash", "no_answer", "language", "passed"},
    swerl: {reason.replace(" ", "_") for reason in swerl.REASONS}
    | {"other", "p_yes", "p_yes_or_no"},
    ifrl: {"under_20_words", "refused_by_guards"}
    | {f"{what}/{name}" for what in ("given", "followed") for name in constraints.CHECKS},
    rlhf: {"rm_score", "rm_std", "rm_group_std"},
}
EVERYWHERE = {
    "reward",
    "flat",
    "trunc",
    "unclosed",
    "len",
    "time/verifiers",
    "status/infra",
    "status/timeout",
    "status/language",
    "status/no_answer",
}


@pytest.mark.parametrize("stage", LOGGED, ids=lambda stage: stage.__name__)
def test_every_step_logs_what_shows_a_broken_verifier(stage):
    rollouts = [rollout(1.0), rollout(0.0, status="wrong")]
    for r in rollouts:
        r.row = {**r.row, "think": True, "instruction_id_list": ["punctuation:no_comma"]}
        r.text = "<think>x</think>y"
        r.followed = [True]
        r.passed = 1.0
        r.reason = "exact"
        r.score = 1.0
        r.batch_mean = 1.0
        r.batch_std = 0.0
    logged = summarize(rollouts, stage.monitor(rollouts))
    of_the_stage = {name for name in logged if name.startswith("reward/")}
    assert logged.keys() - of_the_stage >= EVERYWHERE
    assert {name.removeprefix("reward/") for name in of_the_stage} == LOGGED[stage]


def test_rlhf_logs_the_reward_model_s_mean_and_spreads(monkeypatch):
    """The groups have scores (1, 3) and (5, 5, none): an endpoint that failed gives no score. The
    mean is 3.5, the variance (6.25 + 0.25 + 2.25 + 2.25) / 4."""
    collect = table_reward(monkeypatch, {"a": 1.0, "b": 3.0, "c": 5.0, "lost": None})
    rollouts = replies(["a", "b"]) + replies(["c", "c", "lost"], group=1)
    collect(rollouts)
    assert rlhf.monitor(rollouts) == pytest.approx(
        {"rm_score": 3.5, "rm_std": math.sqrt(2.75), "rm_group_std": 0.5}
    )
    lost = replies(["lost"])
    collect(lost)
    assert rlhf.monitor(lost) == {"rm_score": 0.0, "rm_std": 0.0, "rm_group_std": 0.0}


def test_importance_weights_by_hand():
    """Sampler log-probs -1, -1.2 and -2 against -1 in the trainer give weights 1, e^0.2 and 0:
    e^1 is over the limit of 2."""
    for stage in (mathrl, rlhf):
        old_T = torch.tensor([0.0, -1.0, -1.0, -1.0])
        batch = token_batch([2.0, -1.0, 1.0]) | {
            "sampler_logprobs_T": torch.tensor([0.0, -1.0, -1.2, -2.0])
        }
        cfg = stage.Config(**{**CFG, "importance_limit": 2.0})
        logprobs_T = old_T.clone().requires_grad_()
        loss = stage.grpo_loss(
            logprobs_T=logprobs_T,
            old_logprobs_T=old_T,
            batch=batch,
            counts={"tokens": 3, "sequences": 1},
            cfg=cfg,
        )
        loss.backward()
        assert loss.item() == pytest.approx(-(2.0 - math.exp(0.2)) / 3)
        assert logprobs_T.grad.tolist() == pytest.approx([0.0, -2 / 3, math.exp(0.2) / 3, 0.0])


# ---- 6. rlhf.py: the stabilisers for small reward models (paper 6.3) -----------------------------
def rlhf_config(**changes):
    return rlhf.Config(**{**CFG, "overlong_filter": False, **changes})


def test_without_stabilisers_rlhf_has_the_loss_of_the_others():
    for ratio, advantage in ((1.5, 1.0), (0.5, 1.0), (1.5, -1.0), (0.5, -1.0)):
        ratios = [ratio, 1.0]
        token_advantages = [advantage, 0.3]
        ours = loss_and_grad(ratios, token_advantages, 2, rlhf, rlhf_config())
        assert ours == loss_and_grad(ratios, token_advantages, 2)


def test_sequence_level_weights_by_hand():
    """Completions of 1 and 3 tokens in one pack have weights 1/1 and 1/3. The sum is divided by
    the 5 sequences of all ranks and micro-batches."""
    a = rollout(1, prompt=(5, 6), completion=(STOP,))
    b = rollout(0, prompt=(8,), completion=(9, 10, STOP))
    a.advantage, b.advantage = 1.5, -0.5
    logprobs_T = torch.full((7,), -1.0).requires_grad_()
    loss = rlhf.grpo_loss(
        logprobs_T=logprobs_T,
        old_logprobs_T=logprobs_T.detach(),
        batch=pack_rollouts([a, b], "cpu"),
        counts={"tokens": 99, "sequences": 5},
        cfg=rlhf_config(sequence_level=True),
    )
    loss.backward()
    assert loss.item() == pytest.approx(-(1.5 - 0.5) / 5)
    third = 0.5 / 3 / 5
    assert logprobs_T.grad.tolist() == pytest.approx([0, 0, -1.5 / 5, 0, third, third, third])


def kl_gradient(logits, ref_logits, monkeypatch):
    """The expected gradient of the k3 term at one position: policy(v) times the gradient of k3(v)
    by the logits, summed over the vocabulary."""
    expected = torch.zeros_like(logits)
    policy = torch.softmax(logits, -1)
    batch = token_batch([0.0])
    batch["advantages_T"] = batch["advantages_T"].double()
    for v in range(len(logits)):
        # A prompt token, and then the token v.
        z = logits.clone().requires_grad_()
        zero = torch.zeros((), dtype=z.dtype)
        logprobs_T = torch.stack([zero, torch.log_softmax(z, -1)[v]])
        reference_T = torch.stack([zero, torch.log_softmax(ref_logits, -1)[v]])
        monkeypatch.setattr(rlhf, "reference_logprobs", lambda *_: reference_T, raising=False)
        rlhf.grpo_loss(
            logprobs_T=logprobs_T,
            old_logprobs_T=logprobs_T.detach(),
            batch=batch,
            counts={"tokens": 1, "sequences": 1},
            cfg=rlhf_config(kl_coef=1.0),
        ).backward()
        expected += policy[v] * z.grad
    return expected


def exact_kl_gradients(logits, ref_logits):
    """Gradients of KL(policy || ref) and KL(ref || policy) with respect to the policy's logits."""

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum()

    log_ref = torch.log_softmax(ref_logits, -1)
    first = logits.clone().requires_grad_()
    kl(torch.log_softmax(first, -1), log_ref).backward()
    second = logits.clone().requires_grad_()
    kl(log_ref, torch.log_softmax(second, -1)).backward()
    return first.grad, second.grad


def test_kl_gradient_matches_an_exact_kl(monkeypatch):
    """As a loss, k3 has exactly the gradient of KL(ref || policy). Where the two are close, this is
    also the gradient of KL(policy || ref) to first order. The k1 estimator would have none at all:
    its expected gradient is 0."""
    draw = torch.Generator().manual_seed(0)
    ref = torch.randn(7, generator=draw, dtype=torch.float64)
    push = torch.randn(7, generator=draw, dtype=torch.float64)
    far = kl_gradient(ref + push, ref, monkeypatch)
    _, forward = exact_kl_gradients(ref + push, ref)
    error = (far - forward).abs().max() / forward.abs().max()
    near = kl_gradient(ref + 1e-3 * push, ref, monkeypatch)
    reverse, _ = exact_kl_gradients(ref + 1e-3 * push, ref)
    near_error = (near - reverse).abs().max() / reverse.abs().max()
    print(
        f"k3 against KL(ref || policy): {error:.1e}, tolerance 1e-12; "
        f"near equality against KL(policy || ref): {near_error:.1e}, tolerance 1e-02"
    )
    assert error < 1e-12 and near_error < 1e-2
    at_rest = kl_gradient(ref, ref, monkeypatch)
    assert at_rest.abs().max() < 1e-15, "no pull where policy and reference agree"


def table_reward(monkeypatch, scores, **changes):
    """Return rlhf's collect() with a table in place of the reward model. A score of None says that
    the endpoint failed."""

    def load_table(path, device, workers):
        return lambda messages, answers: [scores[answer] for answer in answers]

    monkeypatch.setattr(rlhf, "load_reward_model", load_table)
    return rlhf.make_reward(rlhf_config(rm="table", **changes))[1]


def replies(texts, group=0, think=False):
    rollouts = [rollout(float("nan"), group=group) for _ in texts]
    for r, text in zip(rollouts, texts, strict=True):
        r.text = text
        r.row = {"messages": [{"role": "user", "content": "Hi"}], "think": think}
    return rollouts


def test_the_reward_is_the_score_without_the_thinking(monkeypatch):
    """A reply that never closes its thinking has no answer: it earns the lowest score of the
    batch, whatever it says."""
    collect = table_reward(monkeypatch, {"good": 2.0, "bad": -1.0, "<think> never closed": 9.0})
    rollouts = replies(
        ["<think>\nlong\n</think>good", "<think>\n</think>bad", "<think> never closed"], think=True
    )
    collect(rollouts)
    assert [(r.reward, r.status) for r in rollouts] == [
        (2.0, "ok"),
        (-1.0, "ok"),
        (-1.0, "no_answer"),
    ]


def test_another_language_earns_ten_below_the_lowest_score(monkeypatch):
    """A reply that the endpoint failed to judge earns no reward."""
    collect = table_reward(monkeypatch, {"good": 2.0, "bad": -1.0, "\u597d": 9.0, "lost": None})
    rollouts = replies(["good", "bad", "\u597d", "lost"])
    collect(rollouts)
    assert [r.status for r in rollouts] == ["ok", "ok", "language", "infra"]
    assert [r.reward for r in rollouts[:3]] == [2.0, -1.0, -11.0] and math.isnan(rollouts[3].reward)


def test_a_refusal_does_not_win_where_another_language_was_asked_for(monkeypatch):
    """Three right answers score 3, 2.5 and 2.8, a refusal -4. They once earned -14 each."""
    scores = {"\u8c22\u8c22": 3.0, "\u591a\u8c22": 2.5, "\u611f\u8c22\u60a8": 2.8, "I can't.": -4.0}
    for prompt in ("How do you say thank you in Chinese?", "Thank me as they do in Harbin."):
        rollouts = replies(scores)
        for r in rollouts:
            r.row = {"messages": [{"role": "user", "content": prompt}], "think": False}
        table_reward(monkeypatch, scores)(rollouts)
        assert [r.reward for r in rollouts] == list(scores.values()), prompt


@pytest.mark.parametrize(
    "texts, penalised",
    [
        (["\u597d"] * 6 + ["Hi"] * 2, 0),  # three quarters agree
        (["\u597d"] * 5 + ["Hi"] * 3, 5),
        (["\u597d"] * 8, 0),
        (["\u597d"] * 2, 2),  # too few to agree
        (["\u597d"], 1),  # a held-out rollout
    ],
)
def test_a_group_agrees_on_another_language_only_with_three_quarters(
    texts, penalised, monkeypatch, capsys
):
    collect = table_reward(monkeypatch, {"\u597d": 1.0, "Hi": 0.0})
    rollouts = replies(texts)
    collect(rollouts)
    assert sum(r.status == "language" for r in rollouts) == penalised
    assert ("1 of 1 groups agree" in capsys.readouterr().out) == (not penalised)


def test_shaped_rewards_are_the_tanh_of_the_group_z_score(monkeypatch):
    collect = table_reward(monkeypatch, {"a": 0.0, "b": 4.0}, shape_reward=True)
    rollouts = replies(["a", "b", "a", "b"]) + replies(["a", "a", "a", "a"], group=1)
    collect(rollouts)
    # The first group has mean 2 and biased standard deviation 2, the second is all equal.
    z_scores = (-1, 1, -1, 1, 0, 0, 0, 0)
    assert [round(r.reward, 5) for r in rollouts] == [round(math.tanh(z), 5) for z in z_scores]


def test_a_group_whose_scores_all_failed_is_shaped_to_nothing(monkeypatch):
    collect = table_reward(monkeypatch, {"a": 0.0, "b": 4.0, "lost": None}, shape_reward=True)
    rollouts = replies(["a", "b", "a", "b"]) + replies(["lost"] * 4, group=1)
    collect(rollouts)
    assert [r.status for r in rollouts[4:]] == ["infra"] * 4


def test_the_kl_term_pulls_towards_the_weights_at_the_start(tmp_path):
    """At the start the KL term changes nothing. Later it adds the k3 gradient against the frozen
    start to the update."""
    start = make_tiny()
    start.save_pretrained(tmp_path)

    def gradient_with(kl_coef, model=None):
        flags = dict(init_from=str(tmp_path), kl_coef=kl_coef, overlong_filter=False)
        grads, _ = gradient(random_step(), stage=rlhf, model=model, **flags)
        return grads

    assert distance(gradient_with(0.5), gradient_with(0.0)) < 1e-5

    def moved():
        return make_tiny(seed=3)

    pulled = gradient_with(0.5, model=moved())
    free = gradient_with(0.0, model=moved())
    assert pulled.keys() == free.keys()
    extra = {name: pulled[name] - free[name] for name in pulled}
    rollouts = random_step()
    cfg = rlhf_config(micro_batch_tokens=10**6)
    model = moved()
    rlhf.compute_advantages(rollouts, cfg)
    num_tokens = sum(len(r.completion_ids) for r in rollouts if r.in_loss)
    (batch,), _ = rlhf.collate(rollouts, cfg, "cpu")
    with torch.no_grad():
        reference_T = start.token_logprobs(batch, cfg.temperature)[0]
    d_T = reference_T - model.token_logprobs(batch, cfg.temperature)[0]
    (0.5 * (d_T.exp() - d_T - 1)[batch["loss_index"]].sum() / num_tokens).backward()
    error = distance({n: p.grad for n, p in model.named_parameters()}, extra)
    print(f"pull of the KL term: relative error {error:.1e}, tolerance 1e-04")
    assert error < 1e-4


def test_a_batch_without_a_sound_reply_has_finite_rewards(monkeypatch):
    collect = table_reward(monkeypatch, {"a": 0.0, "\u597d": 1.0})
    rollouts = replies(["a", "\u597d"], think=True)
    collect(rollouts)
    assert [(r.reward, r.status) for r in rollouts] == [(0.0, "no_answer"), (-10.0, "language")]


def sampled_at(step, seed=0, refill=0, num_rows=1000):
    """Return the seeds of one step's rollouts, and the rows that each round asked for."""
    engine = TableEngine(lambda i: UNEVEN if i == 0 else FLAT)
    rows = [{"index": i, "messages": [], "prompt_ids": [i]} for i in range(num_rows)]
    cfg = ifrl.Config(**{**CFG, "seed": seed, "max_refill_rounds": refill})
    hook = (lambda r: None, engine.collect)
    _, sampled = ifrl.rollout(engine, rows, [0, 1, 2, 3], step, {}, cfg, hook, 0, 1)
    return [r.seed for r in sampled], engine.asked


def test_every_step_and_run_has_its_own_seeds_and_spare_prompts():
    """With the same noise at every step, a prompt would have the same luck in every epoch."""
    seeds = [set(sampled_at(step, seed)[0]) for step, seed in ((1, 0), (2, 0), (1, 1))]
    assert all(len(s) == 16 for s in seeds) and len(set.union(*seeds)) == 48
    spare = [sampled_at(step, refill=1)[1][1] for step in (1, 2)]
    assert len(spare[0]) == len(spare[1]) == 3 and set(spare[0]) != set(spare[1])


def test_importance_weights_leave_out_both_ends():
    """The trainer has -1. A sampler at -0.2 gives e^-0.8 = 0.45, which is under 1/2: weight 0.
    A sampler at -0.4 gives weight e^-0.6 = 0.55."""
    batch = {
        "loss_index": torch.tensor([1, 2]),
        "sampler_logprobs_T": torch.tensor([0.0, -0.2, -0.4]),
    }
    trainer_T = torch.tensor([0.0, -1.0, -1.0])
    assert sampler_correction(trainer_T, batch, 2.0).tolist() == pytest.approx(
        [0.0, math.exp(-0.6)]
    )
    assert sampler_correction(trainer_T, batch, 0.0) == 1.0


def test_the_gradient_is_clipped_before_it_is_applied():
    """SGD at lr 1 moves the weights by the clipped gradient, whose norm is grad_clip. The log has
    the norm before clipping."""
    model, rollouts, cfg = make_tiny(), random_step(), config(grad_clip=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    mathrl.compute_advantages(rollouts, cfg)
    logged = mathrl.train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        rollouts,
        cfg,
        torch.device("cpu"),
        world=1,
    )
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before)]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3) and logged["grad_norm"] > 0.02


def test_gap_and_entropy_are_per_completion_token():
    """A sampler that is half a nat off on every token has a gap of 0.5, however long the prompts
    are."""
    model = make_tiny()
    rollouts = random_step()
    cfg = config(micro_batch_tokens=10**6, overlong_filter=False)
    mathrl.compute_advantages(rollouts, cfg)
    entropies = []
    for r in rollouts:
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        P = len(r.prompt_ids)
        logprobs_TV = (model(ids)[0].detach() / cfg.temperature).log_softmax(-1)[P - 1 : -1]
        logprobs_T = logprobs_TV.gather(1, torch.tensor(r.completion_ids)[:, None])[:, 0]
        r.sampler_logprobs = (logprobs_T + 0.5).tolist()
        if r.advantage:
            entropies += (-(logprobs_TV.exp() * logprobs_TV).sum(-1)).tolist()
    logged = mathrl.train_step(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        rollouts,
        cfg,
        torch.device("cpu"),
        world=1,
    )
    assert logged["gap"] == pytest.approx(0.5, rel=1e-3)
    assert logged["entropy"] == pytest.approx(np.mean(entropies), rel=1e-3)


def test_the_floor_is_the_lowest_score_of_a_sound_reply(monkeypatch):
    """The scores of a reply with unclosed thinking, or in another language, do not lower the
    floor."""
    collect = table_reward(
        monkeypatch, {"good": 2.0, "bad": -1.0, "<think> never closed": -7.0, "\u597d": -20.0}
    )
    rollouts = replies(
        ["</think>good", "</think>bad", "<think> never closed", "</think>\u597d"], think=True
    )
    collect(rollouts)
    assert [r.reward for r in rollouts] == [2.0, -1.0, -1.0, -11.0]
