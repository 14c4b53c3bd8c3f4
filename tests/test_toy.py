"""Guards: the toy's splits share no problem, its demonstrations are as flawed as declared, its answers are not in its prompts.

Everything is checked on the files that toy.py writes (two dozen problems a skill) and, where a share is measured, on larger draws
from the same generators; verdicts are those of the stages' own verifiers.
"""

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
    """Normal rows, through the stage that will train or be measured on them."""
    path, workers = str(world / f"{skill}_{split}.jsonl"), dict(reward_workers=2)
    stage, cfg = {
        "chat": (rlhf, rlhf.Config()),
        "if": (ifrl, ifrl.Config()),
        "math": (mathrl, mathrl.Config(**workers)),
        "code": (coderl, coderl.Config()),
        "swe": (swerl, swerl.Config(min_prompt_tokens=0)),
    }[skill]
    return stage, cfg, stage.load_rows(cfg, path)


def judged(stage, cfg, rows, texts):
    """Rewards that a stage's own hook gives to texts."""
    rollouts = [
        Rollout(
            row=row,
            group=g,
            prompt_ids=[],
            seed=0,
            completion_ids=[1],
            finish_reason="stop",
            text=text,
        )
        for g, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    submit, collect = stage.make_reward(cfg)
    for r in rollouts:
        submit(r)
    collect(rollouts)
    return [r.reward for r in rollouts]


@pytest.mark.parametrize("skill", SKILLS)
def test_every_stage_reads_every_split_without_dropping_a_row(skill, world, capsys):
    for split in HELD_OUT:
        stage, cfg, rows = load(world, skill, split)
        assert len(rows) == len(read(world, f"{skill}_{split}")) > 0
        stage.self_test(rows, cfg) if skill != "chat" else None
    assert "dropped" not in capsys.readouterr().out


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_prompt(skill, world):
    """By what the model reads, and in the demonstrations by what the stages would render."""
    prompts = {
        split: {row["messages"][-1]["content"] for row in load(world, skill, split)[2]}
        for split in HELD_OUT
    }
    prompts["sft"] = {row["messages"][0]["content"] for row in read(world, "sft_stage2")}
    for a in prompts:
        for b in prompts:
            assert a == b or not prompts[a] & prompts[b], f"{skill}: {a} and {b}"


@pytest.mark.parametrize("skill", ["chat", "if", "math", "code"])
def test_splits_share_no_key(skill):
    make_keys = {
        "chat": toy.chat_keys,
        "if": toy.if_keys,
        "math": toy.math_keys,
        "code": toy.op_keys,
    }[skill]
    splits = toy.split_keys(make_keys(random.Random(1)), (60, 40, 20, 20))
    assert [len(keys) for keys in splits.values()] == [60, 40, 20, 20] and tuple(
        splits
    ) == toy.SPLITS
    assert len({key for keys in splits.values() for key in keys}) == 140


def test_code_and_swe_share_their_split(world):
    """A composition that is repaired in training is not written in the test, and the other way round."""
    names = {
        split: {r["hash_id"] for r in read(world, f"code_{split}")} for split in ("sft", *HELD_OUT)
    }
    for split in names:
        assert {
            r["instance_id"].removeprefix("toy-") for r in read(world, f"swe_{split}")
        } <= names[split]
    assert not names["sft"] & (names["rl"] | names["dev"] | names["test"]) and not names["rl"] & (
        names["dev"] | names["test"]
    )


def test_preferences_are_about_prompts_that_are_not_held_out(world):
    held_out = {
        row["prompt"][0]["content"]
        for split in ("dev", "test")
        for row in read(world, f"chat_{split}")
    }
    assert not held_out & {row["chosen"][0]["content"] for row in read(world, "preference")}


@pytest.mark.parametrize("skill", ["math", "code", "swe"])
def test_no_answer_leaks_into_a_prompt(skill, world):
    for row, raw in zip(load(world, skill, "test")[2], read(world, f"{skill}_test"), strict=True):
        prompt = row["messages"][-1]["content"]
        if skill == "math":
            assert "=" not in prompt.split("\n\n")[-1] and f"boxed{{{row['answer']}}}" not in prompt
        elif skill == "code":
            written = toy.program(raw["hash_id"].split("-")).splitlines()[1:-1]
            assert not any(line.strip() in prompt for line in written)
            assert not any(json.dumps(json.loads(x)) in prompt for x in row["tests"]["outputs"])
        else:
            fixed = [
                line[1:]
                for line in row["golden_patch"].splitlines()
                if line.startswith("+") and not line.startswith("+++")
            ]
            assert fixed and not any(line in prompt for line in fixed)


def test_the_held_out_problems_are_solvable_and_their_tests_tell_siblings_apart(world):
    _, cfg, rows = load(world, "code", "test")
    programs = [raw["hash_id"].split("-") for raw in read(world, "code_test")]
    answer = lambda names: f"</think>\n```python\n{toy.program(names)}```"
    assert judged(coderl, cfg, rows, map(answer, programs)) == [1.0] * len(rows)
    rng = random.Random(0)
    assert judged(
        coderl, cfg, rows, [answer(toy.mistaken(rng, tuple(names))) for names in programs]
    ) == [0.0] * len(rows)


def test_demonstrations_are_flawed_as_often_as_declared(world):
    """Measured by each skill's own verdict, on 400 fresh keys; what is declared is the share that is drawn flawed."""
    rng = random.Random(5)
    keys = lambda make: toy.split_keys(make(rng), (400, 0, 0, 0))["sft"]
    made = {
        "chat": toy.chat_rows(rng, keys(toy.chat_keys), "sft"),
        "if": toy.if_rows(rng, keys(toy.if_keys), "sft"),
        "math": toy.math_rows(rng, keys(toy.math_keys), "sft"),
    }
    good = {
        "chat": [
            toy.chat_score(prompt, reply.rpartition("</think>")[2]) == 1.0
            for prompt, reply, _, _ in made["chat"]
        ],
        "math": [mathrl.last_box(reply) == row["answer"] for row, reply, _, _ in made["math"]],
    }
    for skill, verdicts in good.items():
        flawed = 1 - sum(verdicts) / len(verdicts)
        print(
            f"{skill}: {flawed:.2f} of {len(verdicts)} demonstrations flawed, declared {toy.FLAWED[skill]:.2f}, tolerance 0.06"
        )
        assert abs(flawed - toy.FLAWED[skill]) < 0.06
    assert all(
        think == reply.startswith("<think>")
        for rows in made.values()
        for _, reply, think, _ in rows
    )


def test_code_and_swe_demonstrations_are_flawed_as_often_as_declared(world):
    rng = random.Random(6)
    keys = toy.split_keys(toy.op_keys(rng), (150, 0, 0, 0))["sft"]
    written = [
        reply.split("```python\n")[1].split("```")[0] == toy.program(key)
        for key in keys
        for reply in [None]
        for _, reply, _, _ in toy.code_rows(rng, [key], "sft")
    ]
    repaired = []
    for row, reply, _, _ in toy.swe_rows(rng, keys, "sft"):
        files = {f["file_path"]: f["content"] for f in row["relevant_file_contents"]}
        search, _, replace = (
            reply.partition("SEARCH\n")[2].partition("\n>>>>>>>")[0].partition("\n=======\n")
        )
        fixed = toy.program(row["instance_id"].removeprefix("toy-").split("-"))
        repaired.append(files["app.py"].replace(search, replace) == fixed)
    for skill, verdicts in (("code", written), ("swe", repaired)):
        flawed = 1 - sum(verdicts) / len(verdicts)
        print(
            f"{skill}: {flawed:.2f} of {len(verdicts)} demonstrations flawed, declared {toy.FLAWED[skill]:.2f}, tolerance 0.06"
        )
        assert abs(flawed - toy.FLAWED[skill]) < 0.06


def test_both_modes_are_demonstrated_for_the_same_question(world):
    by_prompt = {}
    for row in read(world, "sft_stage1"):
        by_prompt.setdefault(row["messages"][0]["content"], set()).add(
            (row["category"], row["thinking"])
        )
    parallel = [
        modes
        for modes in by_prompt.values()
        if {c for c, _ in modes} & {"general", "instruction-following"}
    ]
    assert parallel and all({t for _, t in modes} == {True, False} for modes in parallel)


PROMPT = "Tell me about rain."
GOOD = "Many people enjoy rain. Good rain can last for years. I hope this helps."


@pytest.mark.parametrize(
    "reply, fifths",
    [
        (GOOD, 5),
        (GOOD.replace("rain", "bread"), 4),  # another topic than the one asked about
        # a topic too many, a broken sentence, and no closing at the end
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
    means = [
        sum(toy.chat_score(PROMPT, toy.chat_reply(rng, "rain", flaws)) for _ in range(300)) / 300
        for flaws in range(5)
    ]
    print("mean chat score by number of flaws: " + ", ".join(f"{m:.2f}" for m in means))
    assert means[0] == 1.0 and all(a > b + 0.05 for a, b in zip(means, means[1:]))


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
    for path in sorted(p for p in world.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(world)).read_bytes(), path.name
