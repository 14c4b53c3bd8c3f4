"""What several test files share: the repository root on sys.path, the markers `slow` and
`exhaustive`, and a toy world small enough for tests.

`world` is what toy.py makes, with two dozen problems a skill. `taught` is that world's base model
after a few seconds of SFT, so that its completions earn some rewards and not others. Both are made
once a run.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

MAKE_WORLD = """
import toy
from lib.common import finish
from lib.flags import parse_config
toy.KEYS = {skill: (4, 6, 4, 8) if "hard" in skill else (24, 16, 8, 8) for skill in toy.KEYS}
toy.main(parse_config(toy.Config))
finish()
"""


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "slow: runs whole stages or an interpreter, seconds each; "
        "left out by `bash tests/run.sh fast`",
    )
    config.addinivalue_line(
        "markers",
        "exhaustive: minutes each (20,000 random inputs, 2,000 programs); "
        "only in `bash tests/run.sh all`",
    )


@pytest.fixture(autouse=True)
def nothing_known():
    """Forget the verdicts of programs, which tests may share: each test runs its own."""
    if "verifiers.programs" in sys.modules:
        sys.modules["verifiers.programs"]._known.clear()


def run_python(*args, ranks=1, check=True, timeout=300, **environment):
    """Run a Python script of the repository in a process of its own, under torchrun if ranks > 1.
    Returns (exit code, stdout, stderr)."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [*launch, *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, (
        f"{args} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the data of every stage and the base model (2 layers, width 48, 0.1M
    parameters)."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    run_python(
        "-c",
        MAKE_WORLD,
        f"--out={folder}",
        "--vocab_size=640",
        "--hidden_size=48",
        "--num_layers=2",
        "--num_heads=4",
    )
    return folder


@pytest.fixture(scope="session")
def taught(world):
    """The checkpoint folder of the base model after 200 steps of SFT on all skills (about 10 s)."""
    out = world.parent / "taught"
    run_python(
        "sft.py",
        f"--init_from={world}/base",
        f"--data={world}/sft_stage2.jsonl",
        f"--out_dir={out}",
        "--samples_per_step=32",
        "--num_steps=200",
        "--lr=5e-3",
        "--warmup_steps=10",
        "--schedule_steps=220",
        "--micro_batch_tokens=4096",
        "--max_seq_len=512",
    )
    return out / "final"


@pytest.fixture(scope="session")
def tokenizer(world):
    from model import load_tokenizer

    return load_tokenizer(world / "base")


@pytest.fixture()
def tiny():
    """A random Qwen3 for formulas: 2 layers, 4 query heads on 2 kv heads, a vocabulary of 61."""
    return make_tiny()


def make_tiny(seed=0, std=0.25, **changes):
    """A std of 0.25 makes the distribution peaked, so that an error shows in its log-probs."""
    from model import Qwen3, Qwen3Config

    shape = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = Qwen3.from_config(Qwen3Config(**{**shape, **changes}), seed=seed, std=std)
    generator = torch.Generator().manual_seed(seed + 1)
    # Norm weights of 1 would hide that an implementation forgets the norm weight.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5, generator=generator)
    return model
