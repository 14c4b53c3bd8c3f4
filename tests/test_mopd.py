"""Guards: the distillation loss of Cascade 2 (arXiv 2603.19220, 4.4), by hand and against the exact
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


def make_rollout(tokenizer, teacher, text, number):
    """A rollout in no_think mode, with nothing sampled yet."""
    messages = [{"role": "user", "content": text}]
    row = {"messages": messages, "think": False, "teacher": str(teacher)}
    prompt_ids = render_chat(tokenizer, messages, False)[0]
    return Rollout(row=row, group=number, prompt_ids=prompt_ids, seed=number)


def naive_logprobs(model, rollout, temperature=1.0):
    """Log-probs of the completion tokens from the whole logits, [number of completion tokens]."""
    ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
    logits_TV = model(ids)[0] / temperature
    # The logits at a position are about the token that follows.
    logprobs_TV = logits_TV.log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
    return logprobs_TV.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]


# ---- The loss ------------------------------------------------------------------------------------
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
    """One token, five words: the sum over words of pi(y) grad loss(y) is grad KL(pi || teacher)."""
    torch.manual_seed(0)
    logits_V = torch.randn(5, dtype=torch.float64, requires_grad=True)
    teacher_V = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logprobs_V = logits_V.log_softmax(0)
    kl = (logprobs_V.exp() * (logprobs_V - teacher_V)).sum()
    (exact,) = torch.autograd.grad(kl, logits_V)

    # The same as an expectation over the token that is drawn. Token 0 is the prompt.
    expected = 0.0
    for word, probability in enumerate(logprobs_V.detach().exp()):
        prompt = torch.zeros((), dtype=torch.float64)
        logprobs_T = torch.stack([prompt, logits_V.log_softmax(0)[word]])
        batch = {
            "loss_index": torch.tensor([1]),
            "teacher_logprobs_T": torch.stack([prompt, teacher_V[word]]),
            "sampler_logprobs_T": logprobs_T.detach(),
        }
        loss = mopd.grpo_loss(logprobs_T, logprobs_T.detach(), batch, {"tokens": 1}, config())
        (gradient,) = torch.autograd.grad(loss, logits_V)
        expected = expected + probability * gradient
    error = (expected - exact).abs().max().item()
    print(f"max difference {error:.1e}, tolerance 1e-12")
    assert error < 1e-12


# ---- Teachers ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teachers(world, tmp_path_factory):
    """Folder of two random checkpoints of the same shape as the world's base model, the student."""
    folder = tmp_path_factory.mktemp("teachers")
    base_config = Qwen3.from_pretrained(world / "base").config
    for seed in (1, 2):
        path = str(folder / f"teacher{seed}")
        Qwen3.from_config(base_config, seed=seed, std=0.1).save_pretrained(path)
        save_tokenizer(world / "base", path)
    return folder


def test_each_rollout_is_scored_by_its_own_teacher_and_no_other(world, teachers):
    tokenizer = load_tokenizer(world / "base")
    student = Qwen3.from_pretrained(world / "base")
    rollouts = []
    for n in range(4):
        teacher = teachers / f"teacher{1 + n % 2}"
        rollouts.append(make_rollout(tokenizer, teacher, f"say {n}", n))
    make_engine("torch", student, tokenizer).generate(rollouts, 6, 1.0)
    _, collect = mopd.make_reward(config())
    collect(rollouts)
    for r in rollouts:
        naive = naive_logprobs(Qwen3.from_pretrained(r.row["teacher"]), r)
        error = (torch.tensor(r.teacher_logprobs) - naive).abs().max().item()
        print(f"teacher log-probs: max difference {error:.1e}, tolerance 1e-5")
        assert error < 1e-5
        minus_kl = (naive - torch.tensor(r.sampler_logprobs)).mean().item()
        assert r.reward == pytest.approx(minus_kl, abs=1e-5)


def test_the_teacher_reads_at_the_student_s_temperature_and_rope_factor(world, teachers):
    """The teacher's log-probs are those of its logits / T over the whole vocabulary.

    A teacher that was never stretched is stretched as the student is.
    """
    tokenizer = load_tokenizer(world / "base")
    r = make_rollout(tokenizer, teachers / "teacher1", "say", 0)
    r.completion_ids, r.sampler_logprobs = [7, 8, 9], [0.0] * 3
    _, collect = mopd.make_reward(mopd.Config(temperature=0.5, rope_factor=4.0))
    collect([r])
    teacher = Qwen3.from_pretrained(r.row["teacher"], rope_factor=4.0)
    naive = naive_logprobs(teacher, r, temperature=0.5)
    assert r.teacher_logprobs == pytest.approx(naive.tolist(), abs=1e-5)


def test_a_teacher_with_another_tokenizer_is_refused(world, teachers, tmp_path, capsys):
    # The stranger's tokenizer has two words swapped.
    stranger = tmp_path / "stranger"
    shutil.copytree(teachers / "teacher1", stranger)
    text = json.loads((stranger / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (stranger / "tokenizer.json").write_text(json.dumps(text))
    cfg = config(init_from=str(world / "base"))
    mopd.self_test([{"teacher": str(teachers / "teacher1")}], cfg)
    with pytest.raises(SystemExit):
        mopd.self_test([{"teacher": str(stranger)}], cfg)
    assert "another tokenizer" in capsys.readouterr().err


# ---- Data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "data, sentence",
    [
        ("nonsense", "is not STAGE:DATA:TEACHER"),
        ("sft:{world}/chat_rl.jsonl:{teachers}/teacher1", "is not STAGE:DATA:TEACHER"),
        ("rlhf:{world}/chat_rl.jsonl:{teachers}/nobody", "nobody of"),
        ("rlhf:{world}/chat_rl.jsonl.missing.jsonl:{teachers}/teacher1", "no such file"),
    ],
)
def test_a_bad_domain_is_one_sentence(data, sentence, world, teachers, capsys):
    with pytest.raises(SystemExit) as stop:
        mopd.load_rows(config(data=data.format(world=world, teachers=teachers)))
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_head_of_the_rows_is_of_all_domains(world, teachers):
    """The held-out metric measures the first eval_rows of them."""
    parts = [
        f"rlhf:{world}/chat_rl.jsonl:{teachers}/teacher1",
        f"mathrl:{world}/math_rl.jsonl:{teachers}/teacher2",
    ]
    alone = [mopd.load_rows(config(data=part)) for part in parts]
    both = mopd.load_rows(config(data=",".join(parts)))
    assert len(both) == sum(map(len, alone))
    for rows in alone:
        of_domain = [row for row in both if row["teacher"] == rows[0]["teacher"]]
        assert of_domain == rows  # in their own order
        # Each domain has its share of the head, up to one row.
        head = [row for row in both[:10] if row["teacher"] == rows[0]["teacher"]]
        assert len(head) == pytest.approx(10 * len(rows) / len(both), abs=1)


# ---- Whole runs ----------------------------------------------------------------------------------
def run_mopd(world, taught, teachers, out, ranks=1, **changes):
    """A run with three domains and two teachers."""
    domains = (
        f"rlhf:{world}/chat_rl.jsonl:{taught}",
        f"mathrl:{world}/math_rl.jsonl:{taught}",
        f"ifrl:{world}/if_rl.jsonl:{teachers}/teacher1",
    )
    flags = {
        "init_from": world / "base",
        "out_dir": out,
        "data": ",".join(domains),
        "eval_data": ",".join(domains),
        "prompts_per_step": 48,
        "group_size": 2,
        "num_steps": 24,
        "max_prompt_tokens": 128,
        "max_new_tokens": 12,
        "lr": 2e-3,
        "warmup_steps": 1,
        "micro_batch_tokens": 1024,
        "eval_every": 8,
        "eval_rows": 200,
        "save_every": 4,
        "sample_every": 0,
        "max_dead_steps": 0,  # nearly all answers of so few tokens are cut off
        **changes,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    run_python("extras/mopd.py", *words, ranks=ranks)


@pytest.mark.slow
def test_the_student_comes_nearer_and_a_resumed_run_is_the_straight_one(
    world, taught, teachers, tmp_path
):
    """The KL to two teachers falls. A resumed run has the straight run's weights, to the bit."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_mopd(world, taught, teachers, straight)
    lines = (straight / "metrics.jsonl").read_text().splitlines()
    evals = [json.loads(line)["eval"] for line in lines if "eval" in json.loads(line)]
    print("eval (minus KL): " + " ".join(f"{value:.3f}" for value in evals))
    assert evals[-1] > evals[0] + 0.1

    run_mopd(world, taught, teachers, resumed, num_steps=4)
    run_mopd(world, taught, teachers, resumed)
    one = load_file(straight / "final" / "model.safetensors")
    two = load_file(resumed / "final" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_are_one(world, taught, teachers, tmp_path):
    # Adam moves a weight by a whole lr even if its gradient is all rounding, so lr is small.
    gentle = {"lr": 2e-5, "num_steps": 4}
    run_mopd(world, taught, teachers, tmp_path / "one", **gentle)
    run_mopd(world, taught, teachers, tmp_path / "two", ranks=2, **gentle)
    before = load_file(world / "base" / "model.safetensors")
    one = load_file(tmp_path / "one" / "final" / "model.safetensors")
    two = load_file(tmp_path / "two" / "final" / "model.safetensors")
    error = max((two[name] - one[name]).abs().max().item() for name in two)
    moved = max((one[name] - before[name]).abs().max().item() for name in one)
    print(f"two ranks against one: max weight difference {error:.1e}, tolerance 1e-5")
    print(f"weights moved by up to {moved:.1e}")
    assert error < 1e-5 and moved > 2e-5
