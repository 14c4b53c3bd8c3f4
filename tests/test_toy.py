"""The toy world: its splits share no problem, its prompts hold no answer, its errors are stated.

Everything is checked on the files that toy.py writes (two dozen problems a skill). Where a share is
measured, a larger draw from the same generators is used. The stages' own verifiers judge.
"""

import itertools
import json
import random

import pytest

import coderl
import ifrl
import mathrl
import rlhf
import swerl
import toy
from engine import Rollout
from model import SYSTEM

SKILLS = ("chat", "if", "math", "code", "swe")
HELD_OUT = ("rl", "dev", "test")
HARD = ("if", "math", "code", "swe")  # the skills that have hard problems


def splits_of(skill):
    return (*HELD_OUT, "hard_test") if skill in HARD else HELD_OUT


def read(world, name):
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def load(world, skill, split):
    """(stage, cfg, normal rows) of the stage that will train on the split or be measured on it."""
    stage = {"chat": rlhf, "if": ifrl, "math": mathrl, "code": coderl, "swe": swerl}[skill]
    cfg = stage.Config()
    if skill == "chat":
        cfg.think_share = 1.0  # each prompt once
    elif skill == "math":
        cfg.reward_workers = 2
    elif skill == "swe":
        cfg.min_prompt_tokens = 0
    elif skill == "chat":
        cfg.think_share = 1.0  # each prompt once
    return stage, cfg, stage.load_rows(cfg, str(world / f"{skill}_{split}.jsonl"))


def judged(stage, cfg, rows, texts):
    """The rewards that a stage's own hook gives to texts, one for each row."""
    rollouts = []
    for group, (row, text) in enumerate(zip(rows, texts, strict=True)):
        rollouts.append(
            Rollout(
                row=row,
                group=group,
                prompt_ids=[],
                seed=0,
                completion_ids=[1],
                finish_reason="stop",
                text=text,
            )
        )
    submit, collect = stage.make_reward(cfg)
    for rollout in rollouts:
        submit(rollout)
    collect(rollouts)
    return [rollout.reward for rollout in rollouts]


def think_closed(program):
    """A completion that has thought and then writes this program."""
    return f"</think>\n```python\n{program}```"


def share_is(stated, verdicts, what):
    """Assert that about this share of the demonstrations is wrong, exactly if it is 0."""
    tolerance = 0.06 if stated else 0.0
    wrong = 1 - sum(verdicts) / len(verdicts)
    print(
        f"{what}: {wrong:.3f} of {len(verdicts)} demonstrations wrong, stated {stated:.2f}, "
        f"tolerance {tolerance}"
    )
    assert abs(wrong - stated) <= tolerance


@pytest.mark.parametrize("skill", SKILLS)
def test_every_stage_reads_every_split_without_dropping_a_row(skill, world, capsys):
    for split in splits_of(skill):
        stage, cfg, rows = load(world, skill, split)
        assert len(rows) == len(read(world, f"{skill}_{split}")) > 0
        if skill != "chat":  # its reward model is trained first
            stage.self_test(rows, cfg)
    assert "dropped" not in capsys.readouterr().out


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_prompt(skill, world):
    """Compares the prompts as the model reads them, not the rows."""
    prompts = {}
    for split in splits_of(skill):
        _, _, rows = load(world, skill, split)
        prompts[split] = {row["messages"][-1]["content"] for row in rows}
    prompts["sft"] = {row["messages"][0]["content"] for row in read(world, "sft_stage2")}
    for a, b in itertools.combinations(prompts, 2):
        assert not prompts[a] & prompts[b], f"{skill}: {a} and {b}"


@pytest.mark.parametrize("skill", ["chat", "if", "math", "code"])
def test_splits_share_no_key(skill):
    make_keys = {
        "chat": toy.chat_keys,
        "if": toy.if_keys,
        "math": toy.math_keys,
        "code": toy.op_keys,
    }[skill]
    splits = toy.split_keys(make_keys(random.Random(1)), (60, 40, 20, 20))
    assert tuple(splits) == toy.SPLITS
    assert [len(keys) for keys in splits.values()] == [60, 40, 20, 20]
    distinct = set(itertools.chain.from_iterable(splits.values()))
    assert len(distinct) == 60 + 40 + 20 + 20


def length_of(skill, key):
    """The number of constraints, steps or operations of a key."""
    if skill == "if":
        return len(json.loads(key[1]))
    return len(key[1]) if skill == "math" else len(key)


@pytest.mark.parametrize("skill", ["if", "math", "code"])
def test_hard_keys_are_longer_and_rare_among_the_demonstrations(skill, monkeypatch):
    make_keys = {"if": toy.if_keys, "math": toy.math_keys, "code": toy.op_keys}[skill]
    shares = {kind: counts[0] for kind, counts in toy.KEYS.items()}
    share = shares[f"{skill}_hard"] / (shares[skill] + shares[f"{skill}_hard"])
    print(f"{skill}: {share:.3f} of the demonstrated keys are hard, at least 0.05 and at most 0.1")
    assert "sft" in toy.KEYS or 0.05 <= share <= 0.15
    monkeypatch.setitem(toy.KEYS, skill, (30, 20, 10, 15))
    monkeypatch.setitem(toy.KEYS, f"{skill}_hard", (3, 8, 4, 15))
    splits = toy.deal_keys(random.Random(3), skill, make_keys)
    lengths = {}
    for split, keys in splits.items():
        lengths[split] = sorted(length_of(skill, key) for key in keys)
    assert set(lengths["test"]) <= {1, 2, 3}
    assert lengths["hard_test"] == [4] * 15
    for split, hard in (("sft", 3), ("rl", 8), ("dev", 4)):
        assert lengths[split].count(4) == hard
        assert max(lengths[split][:-hard]) <= 3


def test_code_and_swe_share_their_split(world):
    """No program that is repaired in training is written in the test, and the other way round."""
    code_names = {}
    for split in ("sft", *splits_of("code")):
        code_names[split] = {row["hash_id"] for row in read(world, f"code_{split}")}
        swe_ids = [row["instance_id"] for row in read(world, f"swe_{split}")]
        assert {name.removeprefix("toy-") for name in swe_ids} <= code_names[split]
    reported = code_names["dev"] | code_names["test"] | code_names["hard_test"]
    assert not code_names["sft"] & code_names["rl"]
    assert not code_names["sft"] & reported
    assert not code_names["rl"] & reported


def test_preferences_are_about_prompts_that_are_not_held_out(world):
    held_out_rows = read(world, "chat_dev") + read(world, "chat_test")
    held_out = {row["prompt"][0]["content"] for row in held_out_rows}
    assert not held_out & {row["chosen"][0]["content"] for row in read(world, "preference")}
    asked = {row["prompt"][0]["content"] for row in read(world, "rlhf")}
    assert not held_out & asked
    for split in ("dev", "test", "hard_test"):
        assert not asked & {row["prompt"][0]["content"] for row in read(world, f"if_{split}")}


@pytest.mark.parametrize("skill", ["math", "code", "swe"])
def test_no_answer_leaks_into_a_prompt(skill, world):
    _, _, rows = load(world, skill, "test")
    for row, raw in zip(rows, read(world, f"{skill}_test"), strict=True):
        prompt = row["messages"][-1]["content"]
        if skill == "math":
            assert "=" not in prompt.split("\n\n")[-1] and f"boxed{{{row['answer']}}}" not in prompt
        elif skill == "code":
            written = toy.program(raw["hash_id"].split("-")).splitlines()[1:-1]
            assert not any(line.strip() in prompt for line in written)
            assert not any(json.dumps(json.loads(x)) in prompt for x in row["tests"]["outputs"])
        else:
            patch = row["golden_patch"].splitlines()
            added = [line for line in patch if line.startswith("+") and not line.startswith("+++")]
            assert added
            assert not any(line[1:] in prompt for line in added)


def test_the_held_out_problems_are_solvable_and_their_tests_tell_siblings_apart(world):
    _, cfg, rows = load(world, "code", "test")
    rng = random.Random(0)
    right, wrong = [], []
    for raw in read(world, "code_test"):
        names = tuple(raw["hash_id"].split("-"))
        right.append(think_closed(toy.program(names)))
        wrong.append(think_closed(toy.program(toy.mistaken(rng, names))))
    assert judged(coderl, cfg, rows, right) == [1.0] * len(rows)
    assert judged(coderl, cfg, rows, wrong) == [0.0] * len(rows)


def drawn(rng, make_keys, n=400):
    return toy.split_keys(make_keys(rng), (n, 0, 0, 0))["sft"]


def chat_verdicts(rng):
    """Yield (gives occasion to the misconception, is right) of demonstrations on fresh keys."""
    for prompt, reply, _, _ in toy.chat_rows(rng, drawn(rng, toy.chat_keys), "sft"):
        yield True, toy.chat_score(prompt, reply.rpartition("</think>")[2]) == 1.0


def if_verdicts(rng):
    """As chat_verdicts, for constraints that nobody keeps by chance.

    IFEval's own check judges each constraint by itself.
    """
    one_constraint = (key for key in toy.if_keys(rng) if len(json.loads(key[1])) == 1)
    for topic, text in itertools.islice(one_constraint, 900):
        [(name, kwargs)] = json.loads(text)
        if name.startswith(("startend", "detectable")):
            for _, reply, _, _ in toy.if_demonstrations(rng, topic, "", [(name, kwargs)]):
                answer = reply.rpartition("</think>")[2].strip()
                yield name in toy.MISCONCEPTIONS["if"], ifrl.check(name, kwargs, answer)


def math_verdicts(rng):
    for key in drawn(rng, toy.math_keys, 1200):
        # 2 + 2 is 2 times 2: there the misconception does no harm.
        occasion = any(op == "*" and before != 2 for op, _, before, _ in key[1])
        for row, reply, _, _ in toy.math_rows(rng, [key], "sft"):
            yield occasion, mathrl.last_box(reply) == row["answer"]


def code_verdicts(rng):
    for key in drawn(rng, toy.op_keys):
        occasion = any(name in toy.MISCONCEPTIONS["code"] for name in key)
        for _, reply, _, _ in toy.code_rows(rng, [key], "sft"):
            program = reply.split("```python\n")[1].split("```")[0]
            yield occasion, program == toy.program(key)


def swe_verdicts(rng):
    for key in drawn(rng, toy.op_keys):
        for row, reply, _, _ in toy.swe_rows(rng, [key], "sft"):
            patch = row["golden_patch"].splitlines()
            [missing] = [name for name in key if f"+    x = {toy.OPS[name][1]}" in patch]
            [file] = row["relevant_file_contents"]
            block = reply.partition("SEARCH\n")[2].partition("\n>>>>>>>")[0]
            search, _, replace = block.partition("\n=======\n")
            repaired = file["content"].replace(search, replace)
            yield missing in toy.MISCONCEPTIONS["swe"], repaired == toy.program(key)


VERDICTS = {
    "chat": chat_verdicts,
    "if": if_verdicts,
    "math": math_verdicts,
    "code": code_verdicts,
    "swe": swe_verdicts,
}


@pytest.mark.parametrize("skill", SKILLS)
def test_misconceptions_and_slips_are_as_frequent_as_stated(skill, monkeypatch):
    """Each measured without the other, by the skill's own verdict, on fresh keys."""
    monkeypatch.setattr(toy, "TENSIONS", dict.fromkeys(toy.TENSIONS, 0.0))
    slips = toy.SLIPS[skill]

    monkeypatch.setitem(toy.SLIPS, skill, 0.0)
    verdicts = list(VERDICTS[skill](random.Random(5)))
    with_occasion = [right for occasion, right in verdicts if occasion]
    share_is(toy.MISTAKEN, with_occasion, f"{skill}, misconceptions")
    if skill != "chat":
        without_occasion = [right for occasion, right in verdicts if not occasion]
        share_is(0.0, without_occasion, f"{skill}, no occasion")

    monkeypatch.setitem(toy.SLIPS, skill, slips)
    monkeypatch.setattr(toy, "MISTAKEN", 0.0)
    verdicts = [right for _, right in VERDICTS[skill](random.Random(6))]
    share_is(slips, verdicts, f"{skill}, slips")


@pytest.mark.parametrize("name", list(toy.MISCONCEPTIONS["if"]))
def test_a_misconception_breaks_its_constraint(name):
    """By IFEval's own check, on replies to every drawn constraint of that kind."""
    rng = random.Random(7)
    for kwargs in toy.CONSTRAINTS[name][1]:
        for _ in range(50):
            right = toy.if_reply(rng, "rain", [(name, kwargs)])
            wrong = toy.if_reply(rng, "rain", [(name, kwargs)], mistaken=[name])
            assert ifrl.check(name, kwargs, right), right
            assert not ifrl.check(name, kwargs, wrong), wrong


def test_the_tensions_are_as_large_as_stated_and_can_be_turned_off(world, tmp_path):
    """Closings that break constraints, requests among RLHF's prompts, edits where code is due."""
    rng = random.Random(9)
    instructions = toy.if_rows(rng, drawn(rng, toy.if_keys), "sft")
    closing = [reply.endswith(tuple(toy.CLOSINGS)) for _, reply, _, _ in instructions]
    edits = [
        "```diff" in reply for _, reply, _, _ in toy.code_rows(rng, drawn(rng, toy.op_keys), "sft")
    ]
    for name, found in (("closings", closing), ("edits", edits)):
        share = sum(found) / len(found)
        print(f"{name}: {share:.3f} of {len(found)}, stated {toy.TENSIONS[name]}")
        assert abs(share - toy.TENSIONS[name]) < 0.05
    kinds = [row["category"] for row in read(world, "rlhf")]
    assert abs(kinds.count("request") / len(kinds) - toy.TENSIONS["requests"]) < 0.05

    run_world(tmp_path, "--tensions=false")
    assert {row["category"] for row in read(tmp_path, "rlhf")} == {"chat"}
    for row in read(tmp_path, "sft_stage2"):
        reply = row["messages"][1]["content"]
        if row["category"] == "code":
            assert "```diff" not in reply
        elif row["category"] == "instruction-following":
            assert not reply.endswith(tuple(toy.CLOSINGS))


def test_both_modes_are_demonstrated_for_the_same_question(world):
    modes_of = {}
    for row in read(world, "sft_stage1"):
        if row["category"] in ("general", "instruction-following"):
            prompt = row["messages"][0]["content"]
            modes_of.setdefault(prompt, set()).add(row["thinking"])
    assert modes_of
    assert all(modes == {True, False} for modes in modes_of.values())


PROMPT = "Tell me about rain."
GOOD = "Many people enjoy rain. Good rain can last for years. I hope this helps."


@pytest.mark.parametrize(
    "reply, fifths",
    [
        (GOOD, 5),
        (GOOD.replace("rain", "bread"), 4),  # another topic than the one asked about
        # It has a second topic, a broken sentence, and no closing at the end.
        (GOOD + " Bread.", 2),
        ("Many people enjoy rain. I hope this helps.", 4),  # one fact
        (GOOD.replace("I hope", "Good rain can last for years. I hope"), 4),  # a sentence twice
        (GOOD.replace("I hope", "I guess so. I hope"), 4),  # filler
        (GOOD.removesuffix(" I hope this helps."), 4),  # no closing
        (GOOD.removesuffix("."), 4),  # cut off in its last sentence
        ("", 2),  # says nothing twice and no filler
    ],
)
def test_chat_score_by_hand(reply, fifths):
    assert toy.chat_score(PROMPT, reply) == fifths / 5


def test_a_reply_without_flaws_scores_one_and_each_flaw_costs():
    rng = random.Random(2)
    means = []
    for num_flaws in range(5):
        replies = [toy.chat_reply(rng, "rain", num_flaws) for _ in range(300)]
        means.append(sum(toy.chat_score(PROMPT, reply) for reply in replies) / 300)
    print("mean chat score by number of flaws: " + ", ".join(f"{m:.2f}" for m in means))
    assert means[0] == 1.0
    assert toy.chat_score(PROMPT, toy.chat_reply(rng, "rain", 0, closes=False)) == 0.8
    assert all(fewer > more + 0.05 for fewer, more in itertools.pairwise(means))


def test_the_tokenizer_reads_back_every_text_and_has_one_token_for_what_all_prompts_share(
    world, tokenizer
):
    texts = [m["content"] for row in read(world, "sft_stage2") for m in row["messages"]]
    for text in texts + ["\u00fc \u597d \x00 weird\ttext <|im_end|>"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    for piece in (SYSTEM, " /think", "<think>\n", "assistant\n"):
        assert len(tokenizer.encode(piece).ids) == 1
    digits = tokenizer.encode("4711").tokens
    assert digits == ["4", "7", "1", "1"]


def run_world(folder, *flags):
    """Write the world of the fixture into a folder."""
    from conftest import MAKE_WORLD, run_python

    run_python(
        "-c",
        MAKE_WORLD,
        f"--out={folder}",
        "--vocab_size=640",
        "--hidden_size=48",
        "--num_layers=2",
        "--num_heads=4",
        *flags,
    )


def test_the_same_seed_writes_the_same_files(world, tmp_path):
    run_world(tmp_path)
    # A hidden file is a loader's cache, which tests leave behind.
    for path in sorted(p for p in world.rglob("[!.]*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(world)).read_bytes(), path.name
