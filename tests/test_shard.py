"""Guards: a model trains in every layout as in one process, and ranks get equal work.

The layouts are those of --shard: weights sharded over all ranks, sharded inside a node and
replicated across nodes, kept in host memory, or whole on every rank. Equal work means about as many
tokens on every rank. Four gloo processes play two nodes of two ranks.
"""

import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import json, os, random, torch
import mathrl
from lib import common, packing
from lib.common import all_gather, average_gradients, finish, init_distributed, print0, shard
from conftest import make_tiny
from engine import Rollout, whole_parameters

rank, world, device = init_distributed(0)
common.SMALLEST_SHARE = 1000  # layers are groups of their own, as at real sizes
ids_BT = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(1))
for how in ("full", "hybrid", "offload", "replicate", "replicate as on GPUs"):
    if "GPUs" in how:
        # Every rank is a node of its own to the mesh, as --shard=replicate makes it on GPUs.
        os.environ["LOCAL_WORLD_SIZE"], how = "1", "hybrid"
    one, many = make_tiny(), shard(make_tiny(), device, how)
    for step in range(3):
        for model, rows in ((one, ids_BT), (many, ids_BT[rank::world])):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            model(rows).square().mean().backward()
            if model is many:
                average_gradients(model)
            optimizer.step()
    pairs = zip(one.parameters(), make_tiny().parameters())
    moved = max((p - q).abs().max().item() for p, q in pairs)
    # Each is valid until the next is asked for, hence the clone.
    whole = {name: p.clone() for name, p in whole_parameters(many)}
    error = max((p - whole[name]).abs().max().item() for name, p in one.named_parameters())
    places = str(getattr(next(many.parameters()), "placements", "whole"))
    print0(
        f"{how} {places}: weights moved by up to {moved:.1e}, off one process by {error:.1e}, "
        "tolerance 1e-6"
    )
    assert error < 1e-6 < 1e-3 < moved
    assert ("Replicate" in places) == (how == "hybrid")

draw = random.Random(rank)


def num_tokens(rollouts):
    # A rank computes a prompt once, for all its completions.
    prompts = {tuple(r.prompt_ids) for r in rollouts}
    return sum(len(r.completion_ids) for r in rollouts) + sum(map(len, prompts))


def seeds(parts):
    return sorted(r.seed for part in parts for r in part)


for length in (20, 2000):
    # Lengths with long tails, and a third of the rollouts without a gradient.
    mine = [
        Rollout(
            row={"big": "row"},
            group=i // 8,
            prompt_ids=[rank, i // 8] * (length // 2),
            seed=1000 * rank + i,
            advantage=float(i % 3),
            completion_ids=[2] * int(draw.paretovariate(1.2) * 30 % 1500),
        )
        for i in range(48)
    ]
    kept = [[r for r in part if r.advantage] for part in all_gather(mine)]
    dealt = all_gather(mathrl.balance(mine, world))
    assert seeds(dealt) == seeds(kept), "each rollout once, on some rank"
    tokens, before = [num_tokens(part) for part in dealt], [num_tokens(part) for part in kept]
    # The least there could be: no prompt on two ranks, and all ranks equal.
    least = num_tokens([r for part in dealt for r in part]) / world
    print0(
        f"prompts of {length}: tokens of the ranks before {before}, dealt out {tokens}; the "
        f"longest wait is {max(tokens) / least - 1:.1%} over the least there is, "
        f"before {max(before) / least - 1:.1%}"
    )
    assert max(tokens) < 1.1 * least and max(tokens) <= max(before)
finish()
"""


@pytest.mark.slow
def test_hybrid_offloaded_and_whole_copies_train_as_one_process_and_ranks_have_as_many_tokens(
    tmp_path,
):
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=2",
        "--master-addr=localhost",
        f"--master-port={port}",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    nodes = [
        subprocess.Popen(
            [*launch, f"--node-rank={i}", tmp_path / "program.py"],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (0, 1)
    ]
    printed = [node.communicate(timeout=200) for node in nodes]
    print(printed[0][0])
    errors = "".join(err[-2000:] for _, err in printed)
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert printed[0][0].count("tolerance") == 5
