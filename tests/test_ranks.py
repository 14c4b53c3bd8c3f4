"""Guards: two and four ranks do what one process does, in every stage.

The first step has the same prompts, completions, rewards and advantages, though the samples of a
prompt are drawn on different ranks. Then five updates on recorded completions, packed anew over the
ranks each time, give the same losses, gradients and weights. Stages, verifiers and sharding are the
real ones, in the small world of conftest.py.
"""

import json

import pytest
from conftest import ROOT, run_python
from safetensors.torch import load_file

STAGES = ("sft", "rlhf", "ifrl", "mathrl", "coderl", "swerl")

PROGRAM = """
import importlib, itertools, json, os, pickle, sys, torch
import test_stages
from engine import make_engine
from lib import common
from lib.checkpoint import gather_weights
from lib.common import all_gather, finish, init_distributed, shard
from lib.prompts import encode_prompts, next_prompts
from model import Qwen3, load_tokenizer
from safetensors.torch import save_file

stages, world_folder, taught, out = sys.argv[1].split(","), *sys.argv[2:5]
rank, world, device = init_distributed(0)
common.SMALLEST_SHARE = 1000  # layers are gathered one by one, as at real sizes
tokenizer = load_tokenizer(taught)
report = {}


def config(name):
    stage = importlib.import_module(name)
    flags = {**test_stages.LOOP, **test_stages.DATA[name]}
    if name != "sft":
        flags = {**test_stages.LOOP, **test_stages.RL, **test_stages.DATA[name]}
    for flag, value in flags.items():
        if flag.endswith("data"):
            flags[flag] = f"{world_folder}/{value}.jsonl"
    if name == "ifrl":
        flags |= {"max_refill_rounds": 2, "prompts_per_step": 6}
    return stage, stage.Config(init_from=taught, out_dir=f"{out}/{name}", **flags)


def told(rollouts):
    # What is equal whichever rank a rollout was drawn on.
    mine = [
        [r.group, r.seed, r.row["index"], r.completion_ids, r.reward, r.advantage, r.in_loss]
        for r in rollouts
    ]
    return sorted(row for part in all_gather(mine) for row in part)


for name in stages:
    stage, cfg = config(name)
    os.makedirs(cfg.out_dir, exist_ok=True)
    hook = None if name == "sft" else stage.make_reward(cfg)
    model = shard(Qwen3.from_pretrained(taught), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(cfg.beta1, cfg.beta2))
    if name == "sft":
        state = {"skipped": 0, "epoch": 0, "block": 0, "position": 0, "files": {}, "seen": {}}
        steps = list(itertools.islice(stage.stream_steps(tokenizer, state, cfg), 5))
        first = [[i, 0, 0, ids.tolist()] for i, (ids, _, _) in enumerate(steps[0])]
    else:
        rows = encode_prompts(stage.load_rows(cfg), tokenizer, cfg)
        engine = make_engine("torch", model, tokenizer)
        recorded = f"{out}/{name}/recorded"
        state = {"epoch": 0, "position": 0, "pool": [], "history": {}}
        steps = []
        for step in range(1, 6 if world == 1 else 2):
            indices = next_prompts(rows, state, cfg, stage.select_rows)
            trained, sampled = stage.rollout(
                engine, rows, indices, step, state, cfg, hook, rank, world
            )
            steps.append(trained)
            if step == 1:
                first = told(sampled)
        if world == 1:
            with open(recorded, "wb") as f:
                pickle.dump(steps, f)
        with open(recorded, "rb") as f:
            steps = [rollouts[rank::world] for rollouts in pickle.load(f)]
    losses = []
    for trained in steps:
        metrics = stage.train_step(model, optimizer, trained, cfg, device, world)
        losses.append([metrics["loss"], metrics["grad_norm"], metrics["num_tokens"]])
    report[name] = {"first": first, "losses": losses}
    weights = gather_weights(model, rank)
    if rank == 0:
        save_file(weights, f"{out}/{name}/weights{world}.safetensors")
if rank == 0:
    with open(f"{out}/report{world}.json", "w") as f:
        json.dump(report, f)
finish()
"""


def compare_first_steps(one, many):
    """Assert that two lists of rollouts are equal, scores of a reward model to 1e-3. Returns how
    many completions part where rounding decides which of two tokens is drawn."""
    parted = {a[0] for a, b in zip(one, many, strict=True) if a[3] != b[3]}
    for a, b in zip(one, many, strict=True):
        assert a[:3] == b[:3], "another prompt or seed"
        if a[0] not in parted:
            assert a[4:] == pytest.approx(b[4:], rel=1e-3, abs=1e-3)
    return sum(a[3] != b[3] for a, b in zip(one, many, strict=True))


@pytest.mark.slow
def test_two_and_four_ranks_equal_one_process_in_every_stage(world, taught, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    reports = {}
    for ranks in (1, 2, 4):
        run_python(
            program,
            ",".join(STAGES),
            world,
            taught,
            tmp_path,
            ranks=ranks,
            PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
        )
        reports[ranks] = json.loads((tmp_path / f"report{ranks}.json").read_text())
    before = load_file(taught / "model.safetensors")
    for stage in STAGES:
        one = reports[1][stage]
        weights = load_file(tmp_path / stage / "weights1.safetensors")
        moved = max((weights[name] - before[name]).abs().max().item() for name in before)
        assert moved > 1e-4, f"{stage}: no gradient, so equal for no reason"
        for ranks in (2, 4):
            many = reports[ranks][stage]
            parted = compare_first_steps(one["first"], many["first"])
            assert parted <= 1, f"{stage}: {parted} completions of the first step differ"
            for a, b in zip(one["losses"], many["losses"], strict=True):
                assert a == pytest.approx(b, rel=1e-5, abs=1e-5), f"{stage} on {ranks} ranks"
            others = load_file(tmp_path / stage / f"weights{ranks}.safetensors")
            error = max((weights[name] - others[name]).abs().max().item() for name in weights)
            print(
                f"{stage}: five steps moved weights by up to {moved:.1e}; {ranks} ranks are off "
                f"one process by {error:.1e}, tolerance 1e-05"
            )
            assert error < 1e-5
