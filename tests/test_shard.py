"""Guards: a model trains in every layout as in one process, and ranks get equal work.

The layouts are those of --shard: weights sharded over all ranks, sharded inside a node and
replicated across nodes, kept in host memory, or whole on every rank. Equal work means that the
micro-batches of all ranks cost about the same. Four gloo processes play two nodes of two ranks.
"""

import os
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import json, os, random, torch
from torch.utils._python_dispatch import TorchDispatchMode
import mathrl
from lib import common, packing
from lib.common import all_gather, average_gradients, finish, init_distributed, micro_batches
from lib.common import print0, shard
from conftest import make_tiny
from engine import Rollout, whole_parameters

rank, world, device = init_distributed(0, timeout_s=77)
assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
common.SMALLEST_SHARE = 1000  # layers are groups of their own, as at real sizes
ids_BT = torch.randint(61, (8, 12), generator=torch.Generator().manual_seed(1))


class Collectives(TorchDispatchMode):
    # How many collectives of these kinds are called inside.
    def __init__(self):
        super().__init__()
        self.calls = {"reduce_scatter": 0, "allreduce": 0}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for kind in self.calls:
            self.calls[kind] += kind in op.__name__
        return op(*args, **(kwargs or {}))


# Groups of parameters are reduced for each of two micro-batches, or once: two layers and the root.
layouts = {
    "full": (6, 0),
    "full, reduced once": (3, 0),
    "hybrid": (6, 3),
    "hybrid, reduced once": (3, 3),
    "offload": (6, 0),
    "replicate": (0, 1),
    "replicate as on GPUs": (0, 3),
}
for name, collectives in layouts.items():
    how, _, once = name.partition(", ")
    if "GPUs" in how:
        # Every rank is a node of its own to the mesh, as --shard=replicate makes it on GPUs.
        os.environ["LOCAL_WORLD_SIZE"], how = "1", "hybrid"
    one, many = make_tiny(), shard(make_tiny(), device, how, once != "")
    if how == "hybrid":
        # The groups of a mesh wait as long as the group of all ranks.
        for group in next(many.parameters()).device_mesh.get_all_groups():
            assert group._get_backend(device).options._timeout.total_seconds() == 77
    for step in range(3):
        for model, rows in ((one, ids_BT), (many, ids_BT[rank::world])):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.zero_grad()
            with Collectives() as seen:
                for batch in micro_batches(rows.chunk(2), model):
                    model(batch).square().mean().backward()
                if model is many:
                    average_gradients(model)
                    assert tuple(seen.calls.values()) == collectives, (name, seen.calls)
            optimizer.step()
    pairs = zip(one.parameters(), make_tiny().parameters())
    moved = max((p - q).abs().max().item() for p, q in pairs)
    # Each is valid until the next is asked for, hence the clone.
    whole = {name: p.clone() for name, p in whole_parameters(many)}
    error = max((p - whole[name]).abs().max().item() for name, p in one.named_parameters())
    places = str(getattr(next(many.parameters()), "placements", "whole"))
    print0(
        f"{name} {places}: weights moved by up to {moved:.1e}, off one process by {error:.1e}, "
        "tolerance 1e-6"
    )
    assert error < 1e-6 < 1e-3 < moved
    assert ("Replicate" in places) == (how == "hybrid")

draw = random.Random(rank)


def costs(batches, num_real):
    # Cost of this rank's micro-batches in order. A prompt counts once in each.
    found = []
    for i, batch in enumerate(batches):
        lengths = batch["cu_seqlens"].diff().tolist()
        computed = len(batch["shared"][0]) if batch["shared"] else sum(lengths)
        cost = computed + sum(packing.attention_cost(n) for n in lengths)
        found.append(cost if i < num_real else 0.0)
    return found


for length in (20, 2000):
    # Lengths with long tails, and a third of the rollouts without a gradient.
    mine = [
        Rollout(
            row={"big": "row"},
            group=i // 8,
            prompt_ids=[rank, i // 8] * (length // 2),
            seed=1000 * rank + i,
            advantage=float(1000 * rank + i if i % 3 else 0),
            # The first token is the rollout's own, so that the prompt alone is shared.
            completion_ids=[1000 * rank + i] + [2] * int(draw.paretovariate(1.2) * 30 % 1500),
        )
        for i in range(48)
    ]
    for r in mine:
        r.sampler_logprobs = [0.0] * len(r.completion_ids)
    kept = [r.advantage for part in all_gather(mine) for r in part if r.advantage]
    cfg = mathrl.Config(micro_batch_tokens=10000)
    batches, num_real = mathrl.collate(mine, cfg, device)
    seen = []
    for batch in batches[:num_real]:
        seen += batch["advantages_T"][batch["cu_seqlens"][1:].long() - 1].tolist()
    seen = [advantage for part in all_gather(seen) for advantage in part]
    assert sorted(seen) == sorted(kept), "each rollout once, on some rank"
    cost_RB = all_gather(costs(batches, num_real))
    assert len({len(row) for row in cost_RB}) == 1, "as many micro-batches on every rank"
    # FSDP ties the ranks together, so every micro-batch takes as long as the costliest rank's.
    waited = sum(max(column) for column in zip(*cost_RB))
    least = sum(map(sum, cost_RB)) / world
    print0(
        f"prompts of {length}: {len(batches)} micro-batches a rank, {waited / least - 1:.1%} over "
        "the least there is, tolerance 10%"
    )
    assert waited < 1.1 * least
finish()
"""


@pytest.mark.slow
def test_hybrid_offloaded_and_whole_copies_train_as_one_process_and_ranks_have_equal_work(
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
    assert printed[0][0].count("tolerance") == 9
