"""Guards: in joint RL every domain is what its stage is: rows, prompts, order, reward, masks,
dynamic sampling and KL term; and one domain alone is its stage."""

import importlib
from collections import Counter

import pytest
import torch
from conftest import run_python
from safetensors.torch import load_file

import mathrl
import rlhf
from engine import Rollout, make_engine
from extras import jointrl
from lib.prompts import encode_prompts, next_prompts
from model import Qwen3

SHARED = {
    "prompts_per_step": 12,
    "group_size": 4,
    "max_prompt_tokens": 256,
    "max_new_tokens": 24,
    "temperature": 1.0,
    "top_p": 1.0,
    "micro_batch_tokens": 4096,
}
STEPS = {"ifrl": 3, "mathrl": 5, "swerl": 4}
FILES = {"ifrl": "if", "mathrl": "math", "swerl": "swe"}
FLAGS = {"ifrl": "--max_refill_rounds=2 ", "mathrl": "", "swerl": "--min_prompt_tokens=0 "}


def text_of(world, stages=STEPS):
    parts = []
    for stage in stages:
        parts.append(
            f"{stage} --data={world}/{FILES[stage]}_rl.jsonl {FLAGS[stage]}"
            f"--reward_workers=1 --num_steps={STEPS[stage]}"
        )
    return "; ".join(parts)


@pytest.fixture(scope="module")
def joint(world, tokenizer):
    """(Config, encoded rows) of three domains."""
    cfg = jointrl.Config(init_from=str(world / "base"), data=text_of(world), **SHARED)
    return cfg, encode_prompts(jointrl.load_rows(cfg), tokenizer, cfg)


# ---- Data ----------------------------------------------------------------------------------------
def test_rows_and_prompts_are_those_of_the_stages(joint, tokenizer):
    cfg, rows = joint
    for stage, stage_cfg in jointrl.domains_of(cfg).items():
        own = importlib.import_module(stage).load_rows(stage_cfg)
        own = encode_prompts(own, tokenizer, stage_cfg)
        ours = [row for row in rows if row["domain"] == stage]
        without = [{k: v for k, v in row.items() if k not in ("domain", "index")} for row in ours]
        assert without == [{k: v for k, v in row.items() if k != "index"} for row in own]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    # The head of the rows, which the held-out metric takes, has all domains.
    assert {row["domain"] for row in rows[:6]} == set(STEPS)


def test_every_batch_has_all_domains_and_each_its_stage_s_prompts_in_their_order(joint):
    cfg, rows = joint
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}}
    taken = []
    for _ in range(40):
        batch = next_prompts(rows, state, cfg, jointrl.select_rows)
        counts = Counter(rows[index]["domain"] for index in batch)
        # 12 prompts are one epoch of 3 + 5 + 4.
        assert counts == STEPS
        taken += batch
    for stage, stage_cfg in jointrl.domains_of(cfg).items():
        alone = [row for row in rows if row["domain"] == stage]
        numbered = [row | {"index": number} for number, row in enumerate(alone)]
        module = importlib.import_module(stage)
        ours = [index for index in taken if rows[index]["domain"] == stage]
        wanted, epoch = [], 0
        while len(wanted) < len(ours):
            wanted += module.select_rows(numbered, epoch, {}, stage_cfg)
            epoch += 1
        assert epoch > 1
        assert ours == [alone[number]["index"] for number in wanted[: len(ours)]]


def test_a_domain_whose_prompts_are_all_too_long_is_one_sentence(joint, capsys):
    cfg, rows = joint
    rows = [row for row in rows if row["domain"] != "swerl"]
    with pytest.raises(SystemExit):
        jointrl.select_rows(rows, 0, {}, cfg)
    assert "swerl has no prompt of at most 256 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data, sentence",
    [
        ("", "does not begin with a stage"),
        ("sft --data=x", "does not begin with a stage"),
        ("mathrl --data=x; mathrl --data=y", "does not begin with a stage that is not there yet"),
        ("mathrl --data=x --lr=1e-6", "mathrl cannot have its own --lr"),
        ("mathrl --data=x --max-new-tokens=9", "mathrl cannot have its own --max_new_tokens"),
        ("mathrl --data=x --learning=1", "unrecognized arguments"),
        ("rlhf --data=x --sequence_level=true", "has no place in a loss over tokens"),
    ],
)
def test_bad_domains_are_one_sentence(data, sentence, capsys):
    with pytest.raises(SystemExit):
        jointrl.parse_domains(data)
    assert sentence in capsys.readouterr().err


# ---- Reward --------------------------------------------------------------------------------------
def graded(collect, rows, texts):
    rollouts = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        r = Rollout(row, number, row["prompt_ids"], number)
        r.text, r.finish_reason, r.completion_ids = text, "stop", [1]
        rollouts.append(r)
    collect(rollouts)
    return [(r.reward, r.status) for r in rollouts]


def test_every_rollout_earns_what_its_own_stage_pays(joint):
    cfg, rows = joint
    _, collect = jointrl.make_reward(cfg)
    mixed, texts = [], []
    for stage in STEPS:
        for row in [row for row in rows if row["domain"] == stage][:4]:
            right = {
                "mathrl": f"<think>\n</think>\\boxed{{{row.get('answer')}}}",
                "ifrl": "Some blue rain are early.",
                "swerl": "</think> no patch",
            }[stage]
            mixed += [row, row]
            texts += [right, "</think>\\boxed{-7151623.5}"]
    together = graded(collect, mixed, texts)
    for stage, stage_cfg in jointrl.domains_of(cfg).items():
        _, collect_one = importlib.import_module(stage).make_reward(stage_cfg)
        chosen = [i for i, row in enumerate(mixed) if row["domain"] == stage]
        alone = graded(collect_one, [mixed[i] for i in chosen], [texts[i] for i in chosen])
        assert [together[i] for i in chosen] == alone
    assert {1, 0, -1} <= {reward for reward, _ in together}


# ---- One domain alone is its stage ---------------------------------------------------------------
def one_rollout(module, rows, cfg, world, tokenizer):
    model = Qwen3.from_pretrained(world / "base")
    engine = make_engine("torch", model, tokenizer)
    state = {"epoch": 0, "position": 0, "pool": [], "history": {}}
    indices = next_prompts(rows, state, cfg, module.select_rows)
    hook = module.make_reward(cfg)
    for_update, sampled = module.rollout(engine, rows, indices, 1, state, cfg, hook, 0, 1)

    def seen(rollouts):
        rollouts = sorted(rollouts, key=lambda r: (r.group, r.sample))
        return [(r.row["messages"], r.group, r.seed, r.text, r.advantage) for r in rollouts]

    return seen(for_update), seen(sampled)


@pytest.mark.parametrize("stage", ["ifrl", "mathrl"])
def test_the_rollout_of_one_domain_is_its_stage_s(stage, world, tokenizer):
    """With the dynamic sampling of IF-RL, which replaces flat groups by fresh prompts."""
    cfg = jointrl.Config(init_from=str(world / "base"), data=text_of(world, [stage]), **SHARED)
    rows = encode_prompts(jointrl.load_rows(cfg), tokenizer, cfg)
    module = importlib.import_module(stage)
    (stage_cfg,) = jointrl.domains_of(cfg).values()
    own_rows = encode_prompts(module.load_rows(stage_cfg), tokenizer, stage_cfg)
    ours = one_rollout(jointrl, rows, cfg, world, tokenizer)
    theirs = one_rollout(module, own_rows, stage_cfg, world, tokenizer)
    assert ours == theirs


def test_the_loss_is_math_rl_s_and_on_rows_with_a_reference_rlhf_s(monkeypatch):
    torch.manual_seed(0)
    logprobs_T = -torch.rand(9)
    reference_T = -torch.rand(9)
    batch = {
        "loss_index": torch.tensor([2, 3, 4, 7, 8]),
        "advantages_T": torch.randn(9),
        "sampler_logprobs_T": logprobs_T.clone(),
        "teacher_logprobs_T": reference_T,
    }
    counts = {"tokens": 5, "sequences": 2}
    cfg = jointrl.Config(data="rlhf --data=x --kl_coef=0.3; mathrl --data=y")
    monkeypatch.setattr(rlhf, "reference_logprobs", lambda batch, cfg: reference_T)

    def loss_and_gradient(module, cfg, batch):
        leaf_T = logprobs_T.clone().requires_grad_()
        loss = module.grpo_loss(leaf_T, leaf_T.detach(), batch, counts, cfg)
        loss.backward()
        return torch.cat([loss.detach()[None], leaf_T.grad])

    all_chat = loss_and_gradient(jointrl, cfg, batch)
    theirs = loss_and_gradient(rlhf, rlhf.Config(kl_coef=0.3), batch)
    error = (all_chat - theirs).abs().max().item()
    print(f"rows with a reference: max difference {error:.1e}, tolerance 1e-7")
    assert error < 1e-7
    no_chat = batch | {"teacher_logprobs_T": torch.zeros(9)}
    ours = loss_and_gradient(jointrl, cfg, no_chat)
    error = (ours - loss_and_gradient(mathrl, mathrl.Config(), batch)).abs().max().item()
    print(f"rows without: max difference {error:.1e}, tolerance 1e-7")
    assert error < 1e-7 and (all_chat - ours).abs().max() > 0.01


# ---- Whole runs ----------------------------------------------------------------------------------
def run_joint(world, taught, out, ranks=1, **changes):
    flags = SHARED | {"init_from": taught, "out_dir": out, "data": text_of(world), "lr": 1e-4}
    flags |= {"num_steps": 4, "save_every": 2, "sample_every": 0, "eval_every": 0} | changes
    run_python("extras/jointrl.py", *(f"--{k}={v}" for k, v in flags.items()), ranks=ranks)
    return load_file(out / "final" / "model.safetensors")


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one_and_two_ranks_are_one(world, taught, tmp_path):
    straight = run_joint(world, taught, tmp_path / "straight")
    run_joint(world, taught, tmp_path / "resumed", num_steps=2, final_lr=1.0)
    resumed = run_joint(world, taught, tmp_path / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    before = load_file(taught / "model.safetensors")
    moved = max((straight[name] - before[name]).abs().max().item() for name in straight)
    two = run_joint(world, taught, tmp_path / "two", ranks=2)
    error = max((straight[name] - two[name]).abs().max().item() for name in straight)
    print(f"two ranks against one: {error:.1e}, tolerance 1e-5; weights moved by {moved:.1e}")
    assert error < 1e-5 and moved > 1e-4
