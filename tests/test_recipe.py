"""The rules of the paper: one test a rule, named after its section, with numbers that a pencil can
check. Start here to see what a stage does that GRPO alone does not; the tests of the
single files go further into each.
"""

import json
import math
import random
import statistics

import pytest
from test_grpo import FLAT, UNEVEN, roll
from test_swerl_reward import EXACT, FILES, GOLDEN

import coderl
import ifrl
import mathrl
import rlhf
import sft
import swerl
from engine import Rollout
from lib import data
from lib.prompts import count_correct
from model import render_turns

ASK = [{"role": "user", "content": "What is 6 * 7?"}]


def rollout(text, row=None, finish="stop", group=0, think=True, reward=float("nan"), status=""):
    row = {"messages": ASK, "think": think, **(row or {})}
    return Rollout(
        row=row,
        group=group,
        prompt_ids=[1],
        seed=0,
        completion_ids=[2, 3],
        finish_reason=finish,
        text=text,
        reward=reward,
        status=status,
    )


def table_of(scores):
    """A reward model that is a table: it knows the score of each answer."""
    return lambda messages, answers: [scores[answer] for answer in answers]


# ---- SFT (3.1, D.1) ------------------------------------------------------------------------------
def test_4_1_cosine_schedule_as_printed():
    """Table 14: the cosine runs over 100K steps. After the 20K steps of stage 1 the rate is still
    90% of its start, (1 + cos(pi / 5)) / 2."""
    cfg = sft.Config(lr=5e-5, warmup_steps=200, schedule_steps=100_000)
    assert sft.learning_rate(20_000, cfg) == pytest.approx(5e-5 * 0.9045085, rel=1e-6)
    assert sft.learning_rate(50_000, cfg) == pytest.approx(2.5e-5)
    assert sft.learning_rate(100_000, cfg) == 0.0
    # Step 100 is in the middle of the warm-up.
    assert sft.learning_rate(100, cfg) == pytest.approx(2.5e-5, rel=1e-5)


def test_3_1_2_multi_turn_history_has_no_thinking_and_is_not_trained_on():
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\na\n</think>\n\n1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>\nb\n</think>\n\n2"},
    ]
    row = sft.normalize({"messages": messages, "thinking": True}, "row 1")
    assert render_turns(row["messages"], row["think"], row["tools"])[1:] == [
        ("user", "One? /no_think", False),
        ("assistant", "1", False),
        ("user", "Two? /think", False),
        ("assistant", "<think>\nb\n</think>\n\n2", True),
    ]


def test_3_1_2_think_and_no_think_rows_of_one_prompt_differ_by_flag_and_answer():
    turns = []
    for text, think in (("<think>\nhm\n</think>\n\n42", True), ("42", False)):
        messages = [*ASK, {"role": "assistant", "content": text}]
        row = sft.normalize({"messages": messages, "thinking": think}, "row 1")
        turns.append(render_turns(row["messages"], row["think"], row["tools"]))
    with_thinking, without = turns
    assert with_thinking[0] == without[0]
    assert with_thinking[1][1] == "What is 6 * 7? /think"
    assert without[1][1] == "What is 6 * 7? /no_think"
    assert with_thinking[2][1:] == ("<think>\nhm\n</think>\n\n42", True)
    assert without[2][1:] == ("42", True)


def test_3_3_1_tool_calling_conversation_trains_calls_and_answer_but_not_the_tool():
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "mul", "arguments": '{"a": 6, "b": 7}'},
    }
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "42."},
    ]
    tools = json.dumps([{"name": "mul"}])
    row = sft.normalize({"messages": messages, "tools": tools, "thinking": False}, "row 1")
    system, *turns = render_turns(row["messages"], row["think"], row["tools"])
    assert '<tools>\n{"name": "mul"}\n</tools>' in system[1]
    assert turns == [
        ("user", "What is 6 * 7? /no_think", False),
        (
            "assistant",
            '<tool_call>\n{"name": "mul", "arguments": {"a": 6, "b": 7}}\n</tool_call>',
            True,
        ),
        ("user", "<tool_response>\n42\n</tool_response>", False),
        ("assistant", "42.", True),
    ]


# ---- RLHF (4.3) ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "share, modes",
    [
        (0.5, "ntntntntnt" + "tntntntntn"),  # every prompt once, then once in its other mode
        (1.0, "tttttttttt"),
        (0.0, "nnnnnnnnnn"),
        (0.2, "nnnntnnnnt" + "ttttnttttn"),
    ],
)
def test_4_3_2_a_unified_run_has_every_prompt_in_both_modes(share, modes, tmp_path):
    prompts = [{"prompt": f"Q{i}"} for i in range(10)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    rows = rlhf.load_rows(rlhf.Config(data=str(tmp_path / "p.jsonl"), think_share=share))
    assert "".join("nt"[row["think"]] for row in rows) == modes
    assert [row["number"] for row in rows] == [*range(10)] * (len(modes) // 10)


def rows_in_both_modes(num_prompts):
    modes = [(number, think) for think in (False, True) for number in range(num_prompts)]
    return [{"number": n, "think": t, "index": i} for i, (n, t) in enumerate(modes)]


@pytest.mark.parametrize("num_prompts", [1000, 1001])
def test_4_3_2_half_of_every_batch_is_in_each_mode(num_prompts):
    """128 of 256 in each of 50 batches (13 epochs), also in those that end an epoch; every prompt
    is seen once an epoch, in one mode and then in the other."""
    rows = rows_in_both_modes(num_prompts)
    cfg = rlhf.Config(prompts_per_step=256, seed=3)
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}}
    walk = []
    for _ in range(50):
        batch = rlhf.next_prompts(rows, state, cfg, rlhf.select_rows)
        assert sum(rows[i]["think"] for i in batch) == 128
        walk += batch
    num_epochs = len(walk) // num_prompts
    for epoch in range(num_epochs):
        seen = [rows[i] for i in walk[epoch * num_prompts :][:num_prompts]]
        assert sorted(row["number"] for row in seen) == [*range(num_prompts)]
        for row in seen:
            assert row["think"] == ((row["number"] + epoch) % 2 == 1)
    # The prompts themselves are shuffled, anew in every epoch.
    numbers = [rows[i]["number"] for i in walk]
    assert numbers[:num_prompts] != sorted(numbers[:num_prompts])
    assert numbers[:num_prompts] != numbers[num_prompts : 2 * num_prompts]


def test_4_3_2_other_shares_and_prompts_of_one_mode():
    """A quarter of every batch thinks for think_share 0.25. A prompt that names its own mode, or is
    too long in the other, keeps the one that it has, and no prompt is left out."""
    rows = rows_in_both_modes(1000)
    cfg = rlhf.Config(think_share=0.25, seed=3)
    for epoch in range(4):
        pool = rlhf.select_rows(rows, epoch, {}, cfg)
        shares = [sum(rows[i]["think"] for i in pool[k : k + 100]) for k in range(0, 1000, 100)]
        assert shares == [25] * 10
    # Without the rows 0 to 9, the prompts 0 to 9 can only think.
    rows = rows[10:]
    for index, row in enumerate(rows):
        row["index"] = index
    pool = rlhf.select_rows(rows, 0, {}, rlhf.Config(seed=3))
    assert sorted(rows[i]["number"] for i in pool) == [*range(1000)]
    assert all(rows[i]["think"] for i in pool if rows[i]["number"] < 10)


def test_4_3_2_answer_only_scoring_and_the_language_rule(monkeypatch):
    """The scores are 3 and -2. The reply in another script would score 50 and gets 10 less than
    the lowest score, -12."""
    scores = {"good": 3.0, "bad": -2.0, "\u597d": 50.0}
    monkeypatch.setattr(rlhf, "load_reward_model", lambda *args: table_of(scores))
    rollouts = [rollout(f"<think>aha</think>{text}") for text in scores]
    rlhf.make_reward(rlhf.Config(rm="table"))[1](rollouts)
    assert [r.reward for r in rollouts] == [3.0, -2.0, -12.0]


# ---- IF-RL (4.4) ---------------------------------------------------------------------------------
def test_4_4_2_unified_reward_is_all_constraints_or_nothing():
    row = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"num_words": 3, "relation": "less than"}],
    }
    replies = ("Two words", "Two, words", "Now four words here", "Yes, four words here")
    rollouts = [rollout(text, row, think=False) for text in replies]
    ifrl.make_reward(ifrl.Config(reward_workers=0))[1](rollouts)
    assert [r.reward for r in rollouts] == [1.0, 0.0, 0.0, 0.0]


def test_4_4_2_thinking_reward_is_one_plus_the_sigmoid_of_the_z_score(monkeypatch):
    """Scores 0, 0 and 3 have mean 1 and unbiased standard deviation sqrt(3). The z-scores are
    -0.57735, -0.57735 and 1.1547, and their sigmoids 0.359543 and 0.760361. A reply that breaks a
    constraint earns 0."""
    scores = {"a": 0.0, "b,": 0.0, "c": 3.0}
    monkeypatch.setattr(ifrl, "load_reward_model", lambda *args: table_of(scores))
    row = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rollouts = [rollout(f"<think>x</think>{text}", row) for text in scores]
    ifrl.make_reward(ifrl.Config(think=True, reward_workers=0))[1](rollouts)
    mean, std = statistics.mean(scores.values()), statistics.stdev(scores.values())
    z = [(score - mean) / std for score in scores.values()]
    assert [round(x, 5) for x in z] == [-0.57735, -0.57735, 1.1547]
    assert [r.reward for r in rollouts] == pytest.approx([1.359543, 0.0, 1.760361], abs=1e-5)


def test_4_4_2_dynamic_sampling_refills_flat_groups_in_a_bounded_number_of_rounds():
    """With 2 of 4 groups flat, one refill asks for 2 prompts. With flat groups only, there are
    max_refill_rounds refills and no more."""
    _, _, engine = roll(lambda i: FLAT if i < 2 else UNEVEN, max_refill_rounds=4, num_rows=1000)
    assert [len(asked) for asked in engine.asked] == [4, 2]
    _, _, engine = roll(lambda i: FLAT, max_refill_rounds=4, num_rows=1000)
    assert [len(asked) for asked in engine.asked] == [4, 4, 4, 4, 4]


# ---- Math RL (4.5) -------------------------------------------------------------------------------
def group_with_a_cut_rollout():
    """Four rollouts with rewards 1, 0, 0, 0; the third one is cut off at the length limit."""
    ends = ((1.0, "stop"), (0.0, "stop"), (0.0, "length"), (0.0, "stop"))
    return [rollout("", reward=reward, status="ok", finish=finish) for reward, finish in ends]


def test_4_5_2_overlong_skip_leaves_loss_denominator_and_group_statistics():
    """The 24K stage skips the rollout that is cut off. Rewards 1, 0, 0 are left: mean 1/3,
    standard deviation 1/sqrt(3), advantages 1.1547 and -0.5774."""
    group = group_with_a_cut_rollout()
    mathrl.compute_advantages(group, mathrl.Config(group_size=4, overlong_filter=True))
    assert [round(r.advantage, 4) for r in group] == [1.1547, -0.5773, 0.0, -0.5773]
    denominator = sum(len(r.completion_ids) for r in group if r.in_loss)
    assert denominator == 6, "two tokens each of three rollouts"


def test_4_5_2_overlong_zero_stays_in_loss_and_group_statistics():
    """In the 32K and 40K stages a rollout that is cut off earns 0, even if its last box was right,
    and counts: mean 1/4, standard deviation 1/2."""
    text = "x</think>\\boxed{42}"
    assert mathrl.judge(rollout(text, {"answer": "42"}, finish="length")) == (0, "no_answer")
    assert mathrl.judge(rollout(text, {"answer": "42"})) == (1, "ok")
    group = group_with_a_cut_rollout()
    mathrl.compute_advantages(group, mathrl.Config(group_size=4, overlong_filter=False))
    assert [r.advantage for r in group] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    assert all(r.in_loss for r in group)


def test_4_5_2_skipped_rollouts_are_no_evidence_of_difficulty():
    """Two rollouts right, one wrong and one skipped count as 2 right of 3. A prompt whose rollouts
    were all skipped is not in the history."""
    rollouts = [
        rollout("", {"index": 7}, reward=1.0, status="ok"),
        rollout("", {"index": 7}, reward=0.0, status="no_answer", finish="length"),
        rollout("", {"index": 7}, reward=1.0, status="ok"),
        rollout("", {"index": 7}, reward=0.0, status="wrong"),
    ]
    skipped = dict(group=1, reward=0.0, status="no_answer", finish="length")
    rollouts += [rollout("", {"index": 8}, **skipped) for _ in range(4)]
    mathrl.compute_advantages(rollouts, mathrl.Config(group_size=4, overlong_filter=True))
    assert count_correct(rollouts) == {"7": [2, 3]}


def test_4_5_2_epoch_filter_readmits_a_tenth_of_the_unsolved_and_a_hundredth_of_the_solved():
    """Each row has one draw of random.Random("seed epoch"). An unsolved row returns if its draw is
    below 0.10, a solved row if it is below 0.01."""
    # Of rows 0-1999 the odd ones are unsolved and the even ones solved. Rows 2000-2099 are in
    # between, and rows 2100-2199 unseen.
    history = {i: (0, 8) if i % 2 else (8, 8) for i in range(2000)}
    history |= {i: (5, 8) for i in range(2000, 2100)}
    pool = mathrl.select_rows([{}] * 2200, 3, history, mathrl.Config(seed=5))
    draw = random.Random("5 3")
    expected = []
    for i in range(2200):
        share = 0.10 if i % 2 else 0.01
        if draw.random() < share or i >= 2000:
            expected.append(i)
    assert sorted(pool) == expected
    unsolved = sum(i % 2 for i in pool if i < 2000)
    solved = sum(1 - i % 2 for i in pool if i < 2000)
    print(
        f"returned: {unsolved} of 1000 unsolved (10%: 100 +- 28 at 3 sigma), "
        f"{solved} of 1000 solved (1%: 10 +- 9.4)"
    )
    assert 72 <= unsolved <= 128 and 1 <= solved <= 20


# ---- Code RL (4.6) -------------------------------------------------------------------------------
def test_4_6_2_mixed_language_earns_zero_in_code_and_minus_one_in_math():
    """Sections 4.5.2 and 4.6.2 differ. With -1 in code, a policy that cannot solve a problem would
    learn that a wrong answer in one language is a win."""
    tests = {"inputs": ["1\n"], "outputs": ["2\n"], "fn_name": None, "time_limit": None}
    right = "</think>\n```python\nprint(int(input()) * 2)\n```"
    assert coderl.verdict("So" + right, tests, "Double it.")[:2] == (1, "ok")
    assert coderl.verdict("\u8ba9\u6211" + right, tests, "Double it.")[:2] == (0, "language")
    in_math = mathrl.verdict("\u8ba9\u6211</think>\\boxed{42}", "42", "What is 6 * 7?")
    assert in_math == (-1, "language")


def test_4_6_2_all_tests_or_nothing():
    tests = {
        "inputs": ["1\n", "2\n", "3\n", "4\n"],
        "outputs": ["2\n", "4\n", "6\n", "9\n"],
        "fn_name": None,
        "time_limit": None,
    }
    response = "</think>\n```python\nprint(int(input()) * 2)\n```"
    value, status, passed = coderl.verdict(response, tests, "Double it.")
    assert (value, status) == (0, "wrong")
    assert passed < 1


# ---- SWE RL (4.7) --------------------------------------------------------------------------------
@pytest.mark.parametrize("limit, most", [(20, 1), (25, 2), (40, 4), (99, 5)])
def test_4_7_1_prompts_show_golden_and_noisy_files_up_to_a_length_by_the_seed(limit, most):
    """A file of 30 characters takes 10 tokens, at 3 characters a token. A limit of 20 tokens would
    hold two files, but there the golden file has 60 characters."""
    files = {f"f{i}.py": "x" * 30 for i in range(8)}
    if limit == 20:
        files["f0.py"] = "x" * 60
    cfg = swerl.Config(max_prompt_tokens=limit, chars_per_token=3.0, noisy_share=1.0, max_files=5)

    def shown():
        """The names of the files in the prompt, in order, for 40 seeds."""
        choices = []
        for seed in range(40):
            choices.append(tuple(swerl.choose_files(files, ["f0.py"], cfg, random.Random(seed))))
        return choices

    choices = shown()
    assert {len(names) for names in choices} == {most}
    assert all("f0.py" in names for names in choices)
    assert shown() == choices
    if most > 1:
        assert len(set(choices)) > 3, "the seed chooses the files and their order"
    too_short = swerl.Config(max_prompt_tokens=10, chars_per_token=3.0)
    with pytest.raises(data.BadRow, match="alone exceed"):
        swerl.choose_files(files, list(files), too_short, random.Random(0))


def test_4_7_1_a_share_of_the_prompts_shows_golden_files_alone():
    files = {f"f{i}.py": "x" for i in range(4)}

    def num_alone(noisy_share):
        """How many of 400 prompts show the golden file alone."""
        cfg = swerl.Config(noisy_share=noisy_share)
        count = 0
        for seed in range(400):
            shown = swerl.choose_files(files, ["f0.py"], cfg, random.Random(seed))
            count += len(shown) == 1
        return count

    half = num_alone(0.5)
    print(f"golden file alone at noisy_share 0.5: {half} of 400 (200 +- 30 at 3 sigma)")
    assert num_alone(0.0) == 400
    assert num_alone(1.0) == 0
    assert 170 <= half <= 230


@pytest.mark.parametrize(
    "text, finish, earned",
    [
        (EXACT, "stop", 1.0),
        (EXACT, "length", -1.0),
        ("<think>never closed", "stop", -1.0),
        ("<think>x</think>no block", "stop", -1.0),
        (
            "<think>x</think>### shop/cart.py\n<<<<<<< SEARCH\n    return result\n=======\n"
            "    return result\n>>>>>>> REPLACE",
            "stop",
            0.0,
        ),
    ],
)
def test_4_7_2_equation_2_minus_one_zero_one(text, finish, earned):
    """An edit that does not apply earns -1, one that changes nothing 0, the golden change 1. A
    truncated rollout earns -1 in the 24K stage and is skipped in the 16K stage."""
    r = rollout(text, {"files": FILES, "golden_patch": GOLDEN, "issue": "i"}, finish=finish)
    assert swerl.judge_rollout(r, swerl.Config())[0] == earned


def test_4_7_2_the_judge_pays_its_probability_of_yes():
    """A repair in other words than the golden one earns the judge's P(YES), here 0.3."""

    def judge(*versions):
        return 0.3

    other = EXACT.replace("sum(prices) + tax", "tax + sum(prices)")
    assert swerl.reward(other, FILES, GOLDEN, judge) == 0.3
    assert math.isclose(swerl.reward(EXACT, FILES, GOLDEN, judge), 1)
