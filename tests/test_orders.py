"""Guards: bench/orders.py compares equals. Every arm has the cascade's flags, the same steps and
prompts of every domain and the same reward model; weights and intervals are what they say."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from conftest import make_tiny, run_python
from safetensors.torch import load_file

from bench import orders
from extras import jointrl
from lib.flags import parse_config
from model import Qwen3, save_tokenizer

ARMS_OF_STAGES = ("paper", "backward", "rlhf_last", "specialists")


@pytest.fixture(scope="module")
def planned():
    planned = orders.World(1, False, orders.Config(out="out/no_such_run"))
    planned.plan(orders.ARMS)
    return planned


def parsed(words):
    module = words[1].removesuffix(".py").replace("/", ".")
    return parse_config(importlib.import_module(module).Config, words[2:])


def flags_of(words):
    return dict(word.removeprefix("--").split("=", 1) for word in words[2:])


@pytest.fixture(scope="module")
def found(planned):
    """{(arm, stage): Config} of everything that is trained after SFT."""
    found = {}
    for piece in planned.pieces.values():
        arm, stage, _ = piece.done.parts[-3:]
        if piece.kind in (*orders.STAGES, "joint", "mopd"):
            found[arm, stage] = parsed(piece.words)
    return found


# ---- The commands --------------------------------------------------------------------------------
def test_every_arm_differs_from_the_cascade_in_where_its_stages_start_alone(planned, found):
    assert {arm for arm, _ in found} == {*ARMS_OF_STAGES, "joint", "joint_2x", "repair"}
    paper = planned.folder / "paper"
    for (arm, stage), cfg in found.items():
        if arm not in ARMS_OF_STAGES or stage == "mopd":
            continue
        own = vars(cfg).copy()
        cascade = vars(found["paper", stage]).copy()
        for values in (own, cascade):
            for name in ("init_from", "out_dir", "rm"):
                values.pop(name, None)
        assert own == cascade, (arm, stage)
        # One reward model for all arms: the one that the paper's order trained.
        if stage == "rlhf" and arm != "paper":
            assert cfg.rm == str(paper / "rlhf" / "rm")
    assert found["paper", "rlhf"].rm == ""

    # Each stage starts where the one before it ended.
    sft = str(paper / "sft2" / "final")
    for arm, order in orders.ORDERS.items():
        before = sft
        for stage in order:
            assert found[arm, stage].init_from == before
            before = f"{found[arm, stage].out_dir}/final"
    for stage in orders.STAGES[1:]:
        assert found["specialists", stage].init_from == sft
    assert found["joint", "joint"].init_from == found["joint_2x", "joint"].init_from == sft
    assert all(cfg.seed == 1 for cfg in found.values())


def test_joint_rl_has_the_steps_prompts_and_rewards_of_the_stages(found):
    joint = found["joint", "joint"]
    domains = jointrl.domains_of(joint)
    assert list(domains) == list(orders.STAGES)
    steps = sum(found["paper", stage].num_steps for stage in orders.STAGES)
    assert joint.num_steps == steps == sum(cfg.num_steps for cfg in domains.values())
    lrs = [found["paper", stage].lr for stage in orders.STAGES]
    assert min(lrs) < joint.lr < max(lrs)
    twice = found["joint_2x", "joint"]
    assert twice.lr == pytest.approx(2 * joint.lr, rel=0.01)
    for name in ("data", "num_steps", "prompts_per_step", "group_size"):
        assert getattr(twice, name) == getattr(joint, name)
    for stage, cfg in domains.items():
        alone = vars(found["paper", stage])
        own = vars(cfg)
        differ = {name for name in own if own[name] != alone[name]}
        free = {"init_from", "out_dir", "lr", "eval_every", "eval_data", "rm"}
        assert differ <= free, (stage, differ - free)


def test_the_teachers_of_mopd_are_the_specialists_and_in_the_repair_the_cascade_s(planned, found):
    for arm, start in (("specialists", "sft2"), ("repair", "swerl")):
        cfg = found[arm, "mopd"]
        assert cfg.init_from == str(planned.folder / "paper" / start / "final")
        for domain in cfg.data.split(","):
            stage, data, teacher = domain.split(":")
            assert data.startswith(str(planned.folder / "paper" / "data"))
            folder = "paper" if arm == "repair" or stage == "rlhf" else "specialists"
            assert teacher == str(planned.folder / folder / stage / "final")


def test_every_end_and_every_specialist_is_scored(planned):
    scored = set()
    for piece in planned.pieces.values():
        if piece.kind == "score":
            flags = flags_of(piece.words)
            arm = piece.done.parts[-3]
            assert flags["results"] == str(planned.folder / arm / "results.jsonl")
            scored.add((arm, flags["stage"]))
    wanted = {*orders.ENDS.values(), *orders.SPECIALISTS.values()}
    assert wanted <= scored
    # And of the rest the stages of the paper's order, for its gains and losses.
    assert scored - wanted == {("paper", stage) for stage in ("ifrl", "mathrl", "coderl")}


def test_a_world_without_tensions_is_another_one(planned):
    (words,) = [piece.words for piece in planned.pieces.values() if piece.kind == "data"]
    assert "--tensions=false" in words and "--seed=1" in words


def test_the_clock_times_the_arms_own_commands(planned):
    whole, slices = {}, []
    for piece in planned.pieces.values():
        arm, stage, _ = piece.done.parts[-3:]
        if piece.kind == "clock":
            slices.append((stage, flags_of(piece.words)))
        elif piece.kind in orders.STAGES and arm in ("specialists", "backward"):
            whole[stage] = flags_of(piece.words)
        elif piece.kind in ("joint", "mopd") and arm in ("joint", "repair"):
            whole[stage] = flags_of(piece.words)
    assert len(slices) == orders.CLOCK_ROUNDS * len(orders.CLOCK_STEPS)
    free = dict.fromkeys(("init_from", "out_dir", "num_steps", "eval_every"))
    for stage, flags in slices:
        assert flags | free == whole[stage] | free, stage


def test_the_clock_weighs_a_step_by_the_steps_of_its_stage(tmp_path):
    """Stages of 1 s a step, Code RL of 3 s, joint RL of 2 s; first steps are not counted."""
    world = orders.World(0, True, orders.Config(out=str(tmp_path)))
    for stage in orders.CLOCK_STEPS:
        assert orders.clocked(world) == []
        folder = world.folder / "clock0" / stage
        folder.mkdir(parents=True)
        seconds = {"coderl": 3, "joint": 2}.get(stage, 1)
        lines = [{"time/gen": 50, "time/train": 9}, {"time/gen": seconds - 0.5, "time/train": 0.5}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "final").touch()
    (seconds,) = orders.clocked(world)
    assert orders.seconds_of({"rlhf": 10, "coderl": 4}, seconds) == pytest.approx(10 + 4 * 3)
    assert orders.seconds_of({"joint": 14}, seconds) == pytest.approx(28)


# ---- Running -------------------------------------------------------------------------------------
def piece_of(folder, code):
    words = [sys.executable, "-c", code]
    return orders.Piece("score", folder / "done", words, folder / "logs" / "piece.log")


def test_a_piece_is_done_once_and_a_failure_names_its_log(tmp_path):
    world = orders.World(0, True, orders.Config(out=str(tmp_path)))
    good = piece_of(tmp_path, "print('hello')")
    world.pieces = {good.done: good}
    assert orders.run_world(world) == ""
    assert good.done.exists() and "hello" in good.log.read_text()
    assert world.open_pieces() == []

    bad = piece_of(tmp_path / "bad", "raise SystemExit(3)")
    world.pieces = {bad.done: bad}
    assert f"ended with 3: see {bad.log}" in orders.run_world(world)
    assert world.open_pieces() == [bad]


def test_the_mean_of_weights_is_the_mean_of_every_number(world, tmp_path):
    folders = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        make_tiny(seed).save_pretrained(folder)
        folders.append(folder)
    save_tokenizer(world / "base", folders[0])
    orders.average(folders, tmp_path / "mean" / "final")
    files = [load_file(folder / "model.safetensors") for folder in folders]
    mean = load_file(tmp_path / "mean" / "final" / "model.safetensors")
    assert mean.keys() == files[0].keys()
    worst = 0.0
    for name, tensor in mean.items():
        # Number by number, in Python's double precision.
        columns = zip(*(file[name].flatten().tolist() for file in files), strict=True)
        twin = [sum(numbers) / 3 for numbers in columns]
        worst = max(worst, np.abs(np.array(twin) - tensor.flatten().numpy()).max())
    print(f"mean of weights: max difference {worst:.1e}, tolerance 2e-7")
    assert worst < 2e-7
    Qwen3.from_pretrained(tmp_path / "mean" / "final")


@pytest.mark.slow
def test_with_the_reward_model_that_it_trained_rlhf_is_the_same_to_the_bit(world, tmp_path):
    """So the arm paper, which trains the reward model, and the others have the same RLHF."""
    flags = {"init_from": world / "base", "data": world / "chat_rl.jsonl", "num_steps": 2}
    flags |= {"rm_data": world / "preference_dev.jsonl", "rm_samples_per_step": 8, "rm_lr": 3e-3}
    flags |= {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 12, "lr": 1e-3}
    flags |= {"max_prompt_tokens": 128, "rm_max_len": 512}
    weights = []
    for number in range(2):
        if number == 1:
            flags["rm"] = tmp_path / "0" / "rm"
        words = [f"--{k}={v}" for k, v in (flags | {"out_dir": tmp_path / str(number)}).items()]
        run_python("rlhf.py", *words)
        weights.append(load_file(tmp_path / str(number) / "final" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    before = load_file(world / "base" / "model.safetensors")
    assert max((weights[0][name] - before[name]).abs().max() for name in before) > 1e-4


# ---- Scores --------------------------------------------------------------------------------------
def test_the_interval_has_the_width_of_both_levels():
    """Against the variance of the two-level bootstrap in closed form."""
    rng = np.random.default_rng(1)
    scores_SP = rng.random((3, 200)) + np.array([[0.0], [0.1], [0.3]])
    mean, low, high = orders.two_level([scores_SP], resamples=8000)
    within = np.mean([np.var(scores) / scores.size for scores in scores_SP]) / 3
    between = np.var(scores_SP.mean(axis=1)) / 3
    exact = 2 * 1.96 * np.sqrt(within + between)
    print(f"width {high - low:.4f}, in closed form {exact:.4f}, tolerance 5%")
    assert mean == pytest.approx(scores_SP.mean())
    assert high - low == pytest.approx(exact, rel=0.05)
    # One seed leaves the interval over problems.
    _, low, high = orders.two_level([scores_SP[:1]], resamples=8000)
    exact = 2 * 1.96 * np.std(scores_SP[0]) / np.sqrt(200)
    assert high - low == pytest.approx(exact, rel=0.05)


def test_a_verdict_asks_that_all_seeds_agree():
    of = {"of": (0.1, 0.05, 0.2), "means": [0.1, 0.2, 0.05]}
    assert orders.direction(of) == "up"
    assert orders.direction(of | {"means": [0.2, 0.2, -0.01]}) == "level"
    assert orders.direction(of | {"of": (0.1, -0.01, 0.2)}) == "level"
    assert orders.direction({"of": (-0.1, -0.2, -0.05), "means": [-0.1, -0.1]}) == "down"
    assert orders.direction(None) == ""


def test_falls_are_those_of_skills_that_a_stage_before_had_taught(monkeypatch):
    """IF-RL takes all of chat on both seeds, Math RL some of IF on one of them."""
    scores = {("sft", "chat"): 0.5, ("rlhf", "chat"): 0.9, ("ifrl", "chat"): 0.2}

    def scores_of(world, end, column, decoding):
        (_, stage), skill = end, column[0].removesuffix("_hard")
        score = scores.get((stage, skill), 0.2 if skill == "chat" else 0.5)
        if stage == "mathrl" and skill == "if" and world == "first":
            score = 0.1
        return np.full(50, score)

    monkeypatch.setattr(orders, "scores_of", scores_of)
    fell, cells = orders.falls(["first", "second"])
    # IF-RL after one stage, Math RL after two, Code RL after three, SWE RL after four.
    assert len(cells) == 1 + 2 + 3 + 4
    assert cells["ifrl", "chat"] == 2 * 3 and cells["swerl", "math"] == 2 * 3
    assert list(fell) == [("ifrl", "chat")] and len(fell["ifrl", "chat"]) == 6
    assert fell["ifrl", "chat"][0] == "chat think paper -70.0 [-70.0, -70.0]"


@pytest.mark.parametrize("flag", ["--tensions=yes", "--seeds=", "--seeds=0,x"])
def test_bad_worlds_are_one_sentence(flag, capsys):
    with pytest.raises(SystemExit):
        orders.main(parse_config(orders.Config, [flag]))
    assert "expected whole numbers, and true or false" in capsys.readouterr().err


def test_a_claim_that_needs_the_tensions_says_so(monkeypatch, capsys):
    verdicts = {"tense": "holds", "plain": "does not hold"}
    monkeypatch.setattr(orders, "claims", lambda kind: {"order matters": (verdicts[kind], [])})
    orders.print_claims({"with tensions": "tense", "without tensions": "plain"})
    assert (
        "'holds' is so only with the tensions: without them 'does not hold'"
        in capsys.readouterr().out
    )
    verdicts["plain"] = "holds"
    orders.print_claims({"with tensions": "tense", "without tensions": "plain"})
    assert "only with" not in capsys.readouterr().out
    verdicts |= {"tense": "does not hold"}
    orders.print_claims({"with tensions": "tense", "without tensions": "plain"})
    assert "'does not hold' is so only with the tensions" in capsys.readouterr().out
