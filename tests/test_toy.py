"""The toy world: its splits share no problem, its prompts hold no answer, its flaws are declared.

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


def read(world, name):
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def load(world, skill, split):
    """(stage, cfg, normal rows) of the stage that will train on the split or be measured on it."""
    stage = {"chat": rlhf, "if": ifrl, "math": mathrl, "code": coderl, "swe": swerl}[skill]
    cfg = stage.Config()
    if skill == "math":
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


def assert_flawed_as_declared(skill, verdicts):
    """Compare the share of false verdicts with FLAWED, the share that is drawn to be flawed."""
    tolerance = 0.06
    declared = toy.FLAWED[skill]
    flawed = 1 - sum(verdicts) / len(verdicts)
    print(
        f"{skill}: {flawed:.2f} of {len(verdicts)} demonstrations flawed, "
        f"declared {declared:.2f}, tolerance {tolerance}"
    )
    assert abs(flawed - declared) < tolerance


@pytest.mark.parametrize("skill", SKILLS)
def test_every_stage_reads_every_split_without_dropping_a_row(skill, world, capsys):
    for split in HELD_OUT:
        stage, cfg, rows = load(world, skill, split)
        assert len(rows) == len(read(world, f"{skill}_{split}")) > 0
        if skill != "chat":  # its reward model is trained first
            stage.self_test(rows, cfg)
    assert "dropped" not in capsys.readouterr().out


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_prompt(skill, world):
    """Compares the prompts as the model reads them, not the rows."""
    prompts = {}
    for split in HELD_OUT:
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


def test_code_and_swe_share_their_split(world):
    """No program that is repaired in training is written in the test, and the other way round."""
    code_names = {}
    for split in ("sft", *HELD_OUT):
        code_names[split] = {row["hash_id"] for row in read(world, f"code_{split}")}
        swe_ids = [row["instance_id"] for row in read(world, f"swe_{split}")]
        assert {name.removeprefix("toy-") for name in swe_ids} <= code_names[split]
    reported = code_names["dev"] | code_names["test"]
    assert not code_names["sft"] & code_names["rl"]
    assert not code_names["sft"] & reported
    assert not code_names["rl"] & reported


def test_preferences_are_about_prompts_that_are_not_held_out(world):
    held_out_rows = read(world, "chat_dev") + read(world, "chat_test")
    held_out = {row["prompt"][0]["content"] for row in held_out_rows}
    assert not held_out & {row["chosen"][0]["content"] for row in read(world, "preference")}


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


def test_demonstrations_are_flawed_as_often_as_declared(world):
    """Measured on 400 fresh keys by each skill's own verdict."""
    rng = random.Random(5)

    def draw(make_keys):
        return toy.split_keys(make_keys(rng), (400, 0, 0, 0))["sft"]

    chat = toy.chat_rows(rng, draw(toy.chat_keys), "sft")
    instructions = toy.if_rows(rng, draw(toy.if_keys), "sft")
    math = toy.math_rows(rng, draw(toy.math_keys), "sft")

    verdicts = []
    for prompt, reply, _, _ in chat:
        verdicts.append(toy.chat_score(prompt, reply.rpartition("</think>")[2]) == 1.0)
    assert_flawed_as_declared("chat", verdicts)
    verdicts = [mathrl.last_box(reply) == row["answer"] for row, reply, _, _ in math]
    assert_flawed_as_declared("math", verdicts)
    for _, reply, think, _ in chat + instructions + math:
        assert think == reply.startswith("<think>")


def test_code_and_swe_demonstrations_are_flawed_as_often_as_declared(world):
    rng = random.Random(6)
    keys = toy.split_keys(toy.op_keys(rng), (150, 0, 0, 0))["sft"]
    written = []
    for key in keys:
        for _, reply, _, _ in toy.code_rows(rng, [key], "sft"):
            program = reply.split("```python\n")[1].split("```")[0]
            written.append(program == toy.program(key))
    repaired = []
    for row, reply, _, _ in toy.swe_rows(rng, keys, "sft"):
        (file,) = row["relevant_file_contents"]
        edit = reply.partition("SEARCH\n")[2].partition("\n>>>>>>>")[0]
        search, _, replace = edit.partition("\n=======\n")
        fixed = toy.program(row["instance_id"].removeprefix("toy-").split("-"))
        repaired.append(file["content"].replace(search, replace) == fixed)
    assert_flawed_as_declared("code", written)
    assert_flawed_as_declared("swe", repaired)


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


def test_the_same_seed_writes_the_same_files(world, tmp_path):
    from conftest import MAKE_WORLD, run_python

    run_python(
        "-c",
        MAKE_WORLD,
        f"--out={tmp_path}",
        "--vocab_size=640",
        "--hidden_size=48",
        "--num_layers=2",
        "--num_heads=4",
    )
    # Hidden files are the verdicts on golds that stages have kept beside their data.
    for path in sorted(p for p in world.rglob("[!.]*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(world)).read_bytes(), path.name
