"""Guards: layers as wide as Qwen3-8B's train under FSDP2 with activation checkpointing.

Their gradients are those of one process, and the sampler is handed, layer by layer, what was
sharded.
"""

import pytest
from conftest import run_python

PROGRAM = '''
import torch
from lib.common import finish, init_distributed, shard
from engine import whole_parameters
from model import Checkpointing, Qwen3, Qwen3Config, packed_batch

rank, world, device = init_distributed(0)
# Width, heads and feed-forward of Qwen3-8B; 2 of its 36 layers, a small vocabulary.
config = Qwen3Config(
    vocab_size=512,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=1e6,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)
lengths = [[24, 9], [17, 1, 14]]  # sequences of rank 0 and of rank 1
generator = torch.Generator().manual_seed(1)
ids = [torch.randint(512, (sum(part),), generator=generator) for part in lengths]

def make():
    """A million random numbers, repeated: 390 million draws would take most of the test."""
    with torch.device("meta"):
        model = Qwen3(config)
    block = 0.02 * torch.randn(999983, generator=torch.Generator().manual_seed(0))
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        repeats = -(-p.numel() // len(block))
        values = block.repeat(repeats)[: p.numel()].view_as(p).clone()
        # The weights of norms lie around 1.
        p.data = values + 1 if p.dim() == 1 else values
    return model

def backward(model, parts, scale):
    flat = [n for part in parts for n in lengths[part]]
    cu = torch.tensor([0, *torch.tensor(flat).cumsum(0)], dtype=torch.int32)
    index = torch.cat([torch.arange(a + 1, b) for a, b in zip(cu.tolist(), cu.tolist()[1:])])
    batch = packed_batch(torch.cat([ids[part] for part in parts]), cu, max(flat), index)
    logprobs_T, _ = model.token_logprobs(batch)
    (-logprobs_T.sum() * scale).backward()

whole = {}
if rank == 0:  # the twin: one process, no sharding, no checkpointing
    model = make()
    backward(model, [0, 1], 1.0)
    whole = {name: p.grad for name, p in model.named_parameters()}
    del model
model = make()
model.checkpointing = Checkpointing(2)
sums = {name: p.sum().item() for name, p in model.named_parameters()}
shard(model, device)
backward(model, [rank], world)  # FSDP2 averages over ranks
worst = 0.0
for name, p in model.named_parameters():
    grad = p.grad.full_tensor()
    if rank == 0:
        worst = max(worst, ((grad - whole[name]).norm() / whole[name].norm()).item())
if rank == 0:
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{size:.0f}M parameters, {world} ranks: relative difference of gradients {worst:.1e}, "
        "tolerance 1e-5"
    )
    assert worst < 1e-5
handed_over = {name: p.sum().item() for name, p in whole_parameters(model)}
assert handed_over == sums, "the sampler would not get the trained weights"
assert all(hasattr(p, "full_tensor") for p in model.parameters())
finish()
'''


@pytest.mark.slow
def test_8b_wide_layers_train_sharded_and_checkpointed_as_in_one_process(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    _, printed, _ = run_python(tmp_path / "program.py", ranks=2, PYTHONPATH=".")
    print(printed)
    assert "tolerance" in printed
