"""The presets of one card, rehearsed: run_cascade.sh itself, every stage, file and hand-over.

The base is a Qwen3 with random weights, two layers of width 64 and the vocabulary of the real ones,
151,936. Small files in the schemas of the public sets stand for the hub. Steps, lengths and batches
are made small by the flags that a user has for that: FLAGS, SFT_FLAGS, IFRL_FLAGS and so on.
"""

import json
import math
import os
import resource
import subprocess

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from model import Qwen3, Qwen3Config, load_tokenizer, save_tokenizer

VOCABULARY = 151936
STAGES = ("sft", "ifrl", "mathrl", "coderl")
TASKS = ("gsm8k", "math500", "humaneval", "ifeval")


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A folder like Qwen/Qwen3-0.6B-Base but for its size."""
    folder = tmp_path_factory.mktemp("models") / "Qwen3-tiny-Base"
    # The toy's tokenizer, and words up to the size of Qwen3's: a random model samples them all, and
    # half of its replies have a comma.
    path = world / "base" / "tokenizer.json"
    described = json.loads(path.read_text())
    for n in range(load_tokenizer(path.parent).get_vocab_size(), VOCABULARY):
        comma = "," if n % 16 == 0 else ""
        described["model"]["vocab"][f"Ġword{n}{comma}"] = n
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(described))
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    Qwen3.from_config(config, seed=0).save_pretrained(folder)
    save_tokenizer(folder, folder)
    assert load_tokenizer(folder).get_vocab_size() == VOCABULARY
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a file for each public set that the presets and their measurements read."""
    folder = tmp_path_factory.mktemp("sets")

    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def conversation(n, thinks):
        answer = f"It is {n + n}."
        if thinks:
            answer = f"<think>\nTwice {n}.\n</think>\n\n{answer}"
        kwargs = {"custom_instructions": "Be brief.", "enable_thinking": thinks}
        turns = [{"role": "user", "content": f"{n} + {n}?"}]
        turns.append({"role": "assistant", "content": answer})
        return {"messages": turns, "chat_template_kwargs": kwargs, "source": "smoltalk"}

    write("smoltalk", [conversation(n, n % 2 == 0) for n in range(16)])
    rule = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rules = [
        {"prompt": f"Describe the {name}.", **rule} for name in ("sea", "lake", "hill", "wood")
    ]
    write("if", rules[:2])
    write("ifeval", [{"key": n, **rule} for n, rule in enumerate(rules)])
    problems = [
        {"question": f"{n} and {n}?", "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>.\n#### {2 * n}"}
        for n in range(1, 9)
    ]
    write("gsm8k_train", problems[:4])
    write("gsm8k", problems[4:])
    write("math500", [{"problem": "Find $1/2 + 1$.", "answer": "\\frac{3}{2}", "level": 1}] * 4)
    double = "def double(x):\n    return 2 * x\n"
    tests = ["assert double(2) == 4", "assert double(-3) == -6"]
    mbpp = {"task_id": 1, "text": "Write a function that doubles.", "code": double}
    write("mbpp", [{**mbpp, "test_list": tests, "test_setup_code": ""}] * 4)
    check = "def check(candidate):\n    assert candidate(2) == 4\n"
    head = 'def double(x):\n    """Twice x."""\n'
    human = {"task_id": "x/0", "prompt": head, "entry_point": "double", "test": check}
    write("humaneval", [human] * 4)
    return folder


def rehearse(preset, base, files, out, tasks):
    """Run a preset for two steps a stage; (exit code, what it printed, CPU seconds)."""
    rl = "--prompts_per_step=2 --group_size=2 --max_prompt_tokens=512 --max_new_tokens=12"
    environment = {
        "BASE": str(base),
        "OUT": str(out),
        "NPROC": "1",
        "TASKS": tasks,
        "EVAL_DATA": str(files),
        "EVAL_FLAGS": "--max_new_tokens=12",
        "LIMIT": "4",
        "FLAGS": "--num_steps=2 --micro_batch_tokens=1024",
        "SFT_FLAGS": f"--data={files}/smoltalk.jsonl --samples_per_step=4 --max_seq_len=256",
        "IFRL_FLAGS": f"--data={files}/if.jsonl {rl} --group_size=4",
        "MATHRL_FLAGS": f"--data={files}/gsm8k_train.jsonl --reward_workers=1 {rl}",
        "CODERL_FLAGS": f"--data={files}/mbpp.jsonl --reward_workers=1 {rl}",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["bash", "run_cascade.sh", preset],
        cwd=ROOT,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout + done.stderr, seconds


def check_stages(out, base, rank):
    """Two steps a stage, each from the one before, weights that moved, and adapters with LoRA."""
    previous = str(base)
    weights = load_file(base / "model.safetensors")
    for stage in STAGES:
        run = json.loads((out / stage / "run.json").read_text())
        assert run["config"]["init_from"] == previous and run["config"]["lora_rank"] == rank
        lines = (out / stage / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [step["step"] for step in steps] == [1, 2]
        assert all(math.isfinite(step["loss"]) for step in steps)
        final = out / stage / "final"
        assert (final / "adapter").exists() == (rank > 0)
        now = load_file(final / "model.safetensors")
        assert now.keys() == weights.keys()
        moved = any(not now[name].equal(weights[name]) for name in now)
        print(f"{stage}: gradients {[step['grad_norm'] for step in steps]}, moved: {moved}")
        # Random text solves no problem. Where all rewards are equal, nothing moves.
        assert moved == any(step["grad_norm"] > 0 for step in steps)
        assert moved or stage in ("mathrl", "coderl")
        previous, weights = str(final), now


@pytest.mark.slow
def test_4b_1gpu_trains_every_stage_with_lora(base, files, tmp_path):
    out = tmp_path / "run"
    code, printed, seconds = rehearse("4b-1gpu", base, files, out, tasks="")
    assert code == 0, printed[-3000:]
    print(f"4b-1gpu without measurements: {seconds:.0f} CPU s")
    check_stages(out, base, rank=32)


@pytest.mark.exhaustive
def test_0_6b_1gpu_trains_and_measures_every_stage_and_goes_on_where_it_was(base, files, tmp_path):
    out = tmp_path / "run"
    code, printed, seconds = rehearse("0.6b-1gpu", base, files, out, ",".join(TASKS))
    assert code == 0, printed[-3000:]
    print(f"0.6b-1gpu: {seconds:.0f} CPU s")
    check_stages(out, base, rank=0)
    assert "every task can be measured: gsm8k, math500, humaneval, ifeval" in printed
    measured = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    expected = [(stage, task) for stage in STAGES for task in TASKS]
    assert [(line["stage"], line["task"]) for line in measured] == expected
    assert all(line["n"] == 4 and line["samples"] == 1 for line in measured)
    assert (out / "report.html").exists()

    # The same command again has nothing to do.
    code, printed, _ = rehearse("0.6b-1gpu", base, files, out, ",".join(TASKS))
    assert code == 0
    assert [f"== {stage}: done" for stage in STAGES] == [
        line for line in printed.splitlines() if line.startswith("==")
    ]
