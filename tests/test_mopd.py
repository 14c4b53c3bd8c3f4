"""Guards: the distillation loss of Cascade 2 (2603.19220, 4.4) by hand and against the exact
reverse KL; teachers, data, resume.
"""

import json
import shutil

import pytest
import torch
from conftest import run_python
from safetensors.torch import load_file

from engine import Rollout, make_engine
from extras import mopd
from model import Qwen3, load_tokenizer, render_chat, save_tokenizer


def config(**changes):
    return mopd.Config(**{"micro_batch_tokens": 1000, "temperature": 1.0, **changes})


def test_the_loss_by_hand():
    """Three completion tokens stand after one prompt token.

    The third one's ratio to the sampler is outside [0.5, 2], so it leaves the sum.
    """
    logprobs_T = torch.tensor([0.0, -1.0, -2.0, -1.0]).requires_grad_()
    batch = {
        "loss_index": torch.tensor([1, 2, 3]),
        "teacher_logprobs_T": torch.tensor([0.0, -0.5, -3.0, -0.1]),
        "sampler_logprobs_T": torch.tensor([0.0, -1.0, -2.2, -2.0]),
    }
    loss = mopd.grpo_loss(logprobs_T, logprobs_T.detach(), batch, {"tokens": 5}, config())
    loss.backward()
    weight = 2.718281828**0.2
    assert loss.item() == pytest.approx(-(0.5 * -1.0 + weight * -1.0 * -2.0) / 5)
    assert logprobs_T.grad.tolist() == pytest.approx([0.0, -0.5 / 5, weight / 5, 0.0])


def test_the_expected_gradient_is_that_of_the_reverse_kl():
    """One token, five words: sum over y of pi(y) grad loss(y) equals grad KL(pi || teacher)."""
    torch.manual_seed(0)
    logits_V, teacher_V = (
        torch.randn(5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64).log_softmax(0),
    )
    logprobs_V = logits_V.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - teacher_V)).sum(), logits_V)
    expected = 0.0
    for y, p in enumerate(logprobs_V.detach().exp()):
        token = torch.stack([torch.zeros((), dtype=torch.float64), logits_V.log_softmax(0)[y]])
        batch = {
            "loss_index": torch.tensor([1]),
            "teacher_logprobs_T": torch.stack([torch.zeros(()), teacher_V[y]]),
            "sampler_logprobs_T": token.detach(),
        }
        expected = (
            expected
            + p
            * torch.autograd.grad(
                mopd.grpo_loss(token, token.detach(), batch, {"tokens": 1}, config()), logits_V
            )[0]
        )
    error = (expected - exact).abs().max().item()
    print(f"max difference {error:.1e}, tolerance 1e-12")
    assert error < 1e-12


@pytest.fixture(scope="module")
def teachers(world, tmp_path_factory):
    """Folder of two random checkpoints beside the world's base model, the student."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (1, 2):
        path = str(folder / f"teacher{seed}")
        Qwen3.from_config(
            Qwen3.from_pretrained(world / "base").config, seed=seed, std=0.1
        ).save_pretrained(path)
        save_tokenizer(world / "base", path)
    return folder


def test_each_rollout_is_scored_by_its_own_teacher_and_no_other(world, teachers):
    tokenizer, student = load_tokenizer(world / "base"), Qwen3.from_pretrained(world / "base")
    rollouts = []
    for n in range(4):
        row = {
            "messages": [{"role": "user", "content": f"say {n}"}],
            "think": False,
            "teacher": str(teachers / f"teacher{1 + n % 2}"),
        }
        rollouts.append(
            Rollout(
                row=row,
                group=n,
                prompt_ids=render_chat(tokenizer, row["messages"], False)[0],
                seed=n,
            )
        )
    make_engine("torch", student, tokenizer).generate(rollouts, 6, 1.0)
    _, collect = mopd.make_reward(config())
    collect(rollouts)
    for r in rollouts:
        logits_TV = Qwen3.from_pretrained(r.row["teacher"])(
            torch.tensor([r.prompt_ids + r.completion_ids])
        )[0]
        P = len(r.prompt_ids)
        naive = logits_TV.log_softmax(-1)[P - 1 : -1].gather(
            1, torch.tensor(r.completion_ids)[:, None]
        )[:, 0]
        error = (torch.tensor(r.teacher_logprobs) - naive).abs().max().item()
        print(f"teacher log-probs: max difference {error:.1e}, tolerance 1e-5")
        assert error < 1e-5
        assert r.reward == pytest.approx(
            (naive - torch.tensor(r.sampler_logprobs)).mean().item(), abs=1e-5
        )


def run_flags(world, taught, teachers, out, **changes):
    data = (
        f"rlhf:{world}/chat_rl.jsonl:{taught},"
        f"mathrl:{world}/math_rl.jsonl:{taught},"
        f"ifrl:{world}/if_rl.jsonl:{teachers}/teacher1"
    )
    flags = {
        "data": data,
        "eval_data": data,
        "prompts_per_step": 16,
        "group_size": 2,
        "num_steps": 16,
        "max_prompt_tokens": 128,
        "max_new_tokens": 12,
        "lr": 5e-3,
        "warmup_steps": 1,
        "micro_batch_tokens": 1024,
        "eval_every": 4,
        "eval_rows": 200,
        "save_every": 4,
        "sample_every": 0,
    } | changes
    return [
        "extras/mopd.py",
        f"--init_from={world}/base",
        f"--out_dir={out}",
        *(f"--{k}={v}" for k, v in flags.items()),
    ]


@pytest.mark.slow
def test_the_student_comes_nearer_and_a_resumed_run_is_the_straight_one(
    world, taught, teachers, tmp_path
):
    """Two teachers at once; the KL to them falls. Resumed: bit for bit."""

    def read(out):
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    run_python(*run_flags(world, taught, teachers, tmp_path / "a"))
    logged = read(tmp_path / "a")
    print("eval (minus KL): " + " ".join(f"{r['eval']:.3f}" for r in logged if "eval" in r))
    assert logged[-1]["eval"] > logged[0]["eval"] + 0.1
    run_python(*run_flags(world, taught, teachers, tmp_path / "b", num_steps=4))
    run_python(*run_flags(world, taught, teachers, tmp_path / "b"))
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.slow
def test_two_ranks_are_one(world, taught, teachers, tmp_path):
    # Adam moves a weight by a whole lr even if its gradient is all rounding, so lr is small.
    gentle = {"lr": 2e-5, "num_steps": 4}
    run_python(*run_flags(world, taught, teachers, tmp_path / "one", **gentle))
    run_python(*run_flags(world, taught, teachers, tmp_path / "two", **gentle), ranks=2)
    one, two = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two")
    )
    error = max((two[k] - one[k]).abs().max().item() for k in two)
    before = load_file(world / "base" / "model.safetensors")
    moved = max((one[k] - before[k]).abs().max().item() for k in one)
    print(
        f"two ranks against one: max weight difference {error:.1e}, tolerance 1e-5; "
        f"weights moved by up to {moved:.1e}"
    )
    assert error < 1e-5 and moved > 2e-5


@pytest.mark.parametrize(
    "data, sentence",
    [
        ("nonsense", "is not STAGE:DATA:TEACHER"),
        ("sft:{world}/chat_rl.jsonl:{teachers}/teacher1", "is not STAGE:DATA:TEACHER"),
        ("rlhf:{world}/chat_rl.jsonl:{teachers}/nobody", "is no checkpoint"),
        ("rlhf:{world}/chat_rl.jsonl.missing.jsonl:{teachers}/teacher1", "no such file"),
    ],
)
def test_a_bad_domain_is_one_sentence(data, sentence, world, teachers, capsys):
    with pytest.raises(SystemExit) as stop:
        mopd.load_rows(config(data=data.format(world=world, teachers=teachers)))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer_is_refused(world, teachers, tmp_path, capsys):
    stranger = tmp_path / "stranger"
    shutil.copytree(teachers / "teacher1", stranger)
    text = json.loads((stranger / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (stranger / "tokenizer.json").write_text(json.dumps(text))
    mopd.self_test([{"teacher": str(teachers / "teacher1")}], config(init_from=str(world / "base")))
    with pytest.raises(SystemExit):
        mopd.self_test([{"teacher": str(stranger)}], config(init_from=str(world / "base")))
    assert "another tokenizer" in capsys.readouterr().err


def test_the_teacher_reads_at_the_student_s_temperature_and_rope_factor(
    world, teachers, monkeypatch
):
    """The teacher's log-probs are those of its logits / T over the whole vocabulary.

    A teacher that was never stretched is stretched as the student is.
    """
    tokenizer = load_tokenizer(world / "base")
    row = {
        "messages": [{"role": "user", "content": "say"}],
        "think": False,
        "teacher": str(teachers / "teacher1"),
    }
    r = Rollout(
        row=row, group=0, prompt_ids=render_chat(tokenizer, row["messages"], False)[0], seed=0
    )
    r.completion_ids, r.sampler_logprobs = [7, 8, 9], [0.0] * 3
    mopd.make_reward(mopd.Config(temperature=0.5, rope_factor=4.0))[1]([r])
    teacher = Qwen3.from_pretrained(row["teacher"], rope_factor=4.0)
    logits_TV = teacher(torch.tensor([r.prompt_ids + r.completion_ids]))[0] / 0.5
    naive = logits_TV.log_softmax(-1)[len(r.prompt_ids) - 1 : -1].gather(
        1, torch.tensor(r.completion_ids)[:, None]
    )[:, 0]
    assert r.teacher_logprobs == pytest.approx(naive.tolist(), abs=1e-5)
