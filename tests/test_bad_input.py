"""Guards: user errors end in one clear sentence and exit code 2, before any training.

That is so for errors in flags, data, models, tokenizers, checkpoints, folders and ports. The files
that were in the folder of the run stay as they were.

Every row runs a script's own main in a process of its own, and its standard error is read back. The
processes are forked from one that has imported the scripts (SERVER), so that no row waits for an
import. Rows on two ranks are two processes on gloo.
"""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from lib import check, checkpoint
from lib.common import num_threads
from sft import Config

SERVER = """
import sys; sys.path.insert(0, '.')
import importlib, json, os, signal
import coderl, evaluate, ifrl, mathrl, rlhf, sft, swerl, toy, model
from evals import report, scaling
from extras import decontaminate, mopd
from lib import estimate
from lib.flags import parse_config
import fsspec, pyarrow.parquet, torch
# The first call of memory_plan, and of an optimizer, imports for a second.
estimate.memory_plan(model.Qwen3Config(), 1, 1, 1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
def run(script, args, env, err):
    os.environ.update(env)
    os.setpgid(0, 0)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    out = os.path.join(os.path.dirname(err), "." + os.path.basename(err))
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    sys.argv = [script, *args]
    module = importlib.import_module(script[:-3].replace('/', '.'))
    code = 0
    try:
        main = module.write_decontaminated if "decontaminate" in script else module.main
        main(parse_config(module.Decontamination if "decontaminate" in script else module.Config))
    except SystemExit as e:
        code = e.code
    except BaseException:
        code = 1
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as e:
            code = e.code
    os._exit(code or 0)
for line in sys.stdin:
    jobs, pids = json.loads(line), []
    for job in jobs:
        pids.append(os.fork() or run(*job))
        # The child does this itself, too. But another rank may end before the child has come to it,
        # and then killpg below would miss the child.
        os.setpgid(pids[-1], pids[-1])
    first, status = os.wait()  # the rank that ends first: the others may wait for it
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)  # what torchrun does to the others
        except ProcessLookupError:
            pass
    for pid in set(pids) - {first}:
        os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), pids.index(first), flush=True)
"""
SHORT = {"num_steps": 1, "micro_batch_tokens": 512}
RL = {
    **SHORT,
    "prompts_per_step": 2,
    "group_size": 2,
    "max_prompt_tokens": 256,
    "max_new_tokens": 8,
    "reward_workers": 1,
    "rope_factor": 0,
}
BASE = {
    "sft.py": dict(SHORT, data="W/sft_stage1.jsonl", samples_per_step=2, max_seq_len=512),
    "mathrl.py": dict(RL, data="W/math_dev.jsonl"),
    "ifrl.py": dict(RL, data="W/if_dev.jsonl"),
    "coderl.py": dict(RL, data="W/code_dev.jsonl"),
    "swerl.py": dict(RL, data="W/swe_dev.jsonl", min_prompt_tokens=0),
    "rlhf.py": dict(
        RL, data="W/chat_dev.jsonl", rm_data="W/preference_dev.jsonl", rm_samples_per_step=2
    ),
    "extras/mopd.py": {k: v for k, v in RL.items() if k != "reward_workers"},
}


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    yield process
    process.stdin.close()
    process.wait()


def answer(server, folder, script, flags, ranks=1, **env):
    """(exit code, standard error) of the rank that ends first, of a script with these flags."""
    args, jobs = [f"--{k}={v}" for k, v in flags.items()], []
    port = env.pop("MASTER_PORT", None) or str(free_port())
    for rank in range(ranks):
        if ranks > 1:
            env |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
        jobs.append([script, args, dict(env), str(folder / f"err{rank}")])
    server.stdin.write(json.dumps(jobs) + "\n")
    server.stdin.flush()
    code, rank = map(int, server.stdout.readline().split())
    return code, (folder / f"err{rank}").read_text()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def contents(folder):
    """{path: (bytes, date)} of all files; hidden ones are a lock and a cache."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# ---- Flags and data ------------------------------------------------------------------------------
# (script, flags, part of the sentence). W is the folder of the toy data, T the test's own folder.
FLAGS = [
    ("mathrl.py", {"lrr": 3}, "unrecognized arguments: --lrr=3"),
    ("mathrl.py", {"group": 3}, "unrecognized arguments: --group=3"),
    ("mathrl.py", {"num_steps": "many"}, "--num_steps: invalid int value: 'many'"),
    ("mathrl.py", {"group_size": 2.5}, "--group_size: invalid int value: '2.5'"),
    (
        "mathrl.py",
        {"overlong_filter": "maybe"},
        "--overlong_filter: invalid boolean value: 'maybe'",
    ),
    ("mathrl.py", {"group_size": 0}, "--group_size=0: expected a number above 0"),
    ("mathrl.py", {"group_size": -8}, "--group_size=-8: expected a number above 0"),
    ("mathrl.py", {"prompts_per_step": 0}, "--prompts_per_step=0: expected"),
    ("mathrl.py", {"num_steps": 0}, "--num_steps=0: expected"),
    ("mathrl.py", {"max_new_tokens": 0}, "--max_new_tokens=0: expected"),
    ("mathrl.py", {"micro_batch_tokens": 0}, "--micro_batch_tokens=0: expected"),
    ("mathrl.py", {"save_every": 0}, "--save_every=0: expected"),
    ("mathrl.py", {"reward_workers": 0}, "--reward_workers=0: expected"),
    ("mathrl.py", {"eval_every": -5}, "--eval_every=-5: expected a number from 0"),
    ("mathrl.py", {"seed": -1}, "--seed=-1: expected a number from 0"),
    ("mathrl.py", {"seed": 10**20}, "--seed=100000000000000000000: expected"),
    ("mathrl.py", {"lr": "nan"}, "--lr=nan: expected a number above 0"),
    ("mathrl.py", {"lr": "inf"}, "--lr=inf: expected"),
    ("mathrl.py", {"lr": "1e30"}, "--lr=1e+30: expected a number above 0 to 9.22e+18"),
    ("mathrl.py", {"lr": -1e-6}, "--lr=-1e-06: expected"),
    ("mathrl.py", {"temperature": 0}, "--temperature=0.0: expected a number above 0"),
    ("mathrl.py", {"temperature": -1}, "--temperature=-1.0: expected"),
    ("mathrl.py", {"top_p": 0}, "--top_p=0.0: expected a number above 0 to 1"),
    ("mathrl.py", {"top_p": 1.5}, "--top_p=1.5: expected a number above 0 to 1"),
    ("mathrl.py", {"top_k": -1}, "--top_k=-1: expected"),
    ("mathrl.py", {"importance_limit": "nan"}, "--importance_limit=nan: expected"),
    ("mathrl.py", {"grad_clip": 0}, "--grad_clip=0.0: expected"),
    ("mathrl.py", {"beta2": 1}, "--beta2=1.0: expected a number from 0 to 0.9999"),
    ("mathrl.py", {"max_infra": 2}, "--max_infra=2.0: expected a number from 0 to 1"),
    ("rlhf.py", {"think_share": -0.5}, "--think_share=-0.5: expected a number from 0 to 1"),
    ("sft.py", {"samples_per_step": -1}, "--samples_per_step=-1: expected"),
    ("sft.py", {"schedule_steps": 0}, "--schedule_steps=0: expected"),
    ("mathrl.py", {"engine": "warp"}, "--engine=warp: expected auto, torch or vllm"),
    ("sft.py", {"max_seq_len": 5000}, "base: lower it. Nothing was trained."),
    (
        "mathrl.py",
        {"max_new_tokens": 5000},
        "--max_prompt_tokens + --max_new_tokens is 5256, over the 1024 positions",
    ),
    ("toy.py", {"vocab_size": 10}, "--vocab_size at least 512"),
    ("toy.py", {"num_heads": 3}, "--num_heads and --head_dim have to be even"),
    (
        "evaluate.py",
        {"model": "W/base", "tasks": "math,maths"},
        "--tasks: maths unknown (has: chat, if, if_hard, math",
    ),
    ("evaluate.py", {"model": "W/base", "modes": "thinking"}, "--modes: thinking unknown"),
    ("evaluate.py", {"model": "nowhere"}, "--model=nowhere: no such folder"),
    (
        "evaluate.py",
        {"model": "W/base", "max_new_tokens": 4096, "tasks": "math"},
        "4096 new tokens, but",
    ),
    ("evaluate.py", {"gates": "T"}, "no results.jsonl there"),
    ("evaluate.py", {"keep_best": "T"}, "no candidates.jsonl with scores"),
    ("evaluate.py", {"same_compute": "T/a,T/b"}, "T/a/metrics.jsonl"),
    ("evals/report.py", {"run": "T/none"}, "no results.jsonl there"),
    ("evals/scaling.py", {"model": "W/base"}, "one of --vote=file, --ioi=file"),
    ("extras/mopd.py", {"data": "W/math_dev.jsonl"}, "is not STAGE:DATA:TEACHER"),
    (
        "extras/mopd.py",
        {"data": "mathrl:W/math_dev.jsonl:nowhere"},
        "math_dev.jsonl: no such folder. Nothing was trained.",
    ),
]
GOOD = {"problem": "What is 1 + 1?", "answer": "2"}
FILES = {  # name: what is in it
    "empty.jsonl": "",
    "torn.jsonl": json.dumps(GOOD) + '\n{"problem": "What is',
    "list.jsonl": "[1, 2]\n",
    "bare.jsonl": '{"problem": "What is 1 + 1?"}\n',
    "kind.jsonl": '{"problem": 7, "answer": "2"}\n',
    "nested.jsonl": '{"problem": "What is 1 + 1?", "answer": ["2"]}\n',
    "blank.jsonl": '{"problem": "", "answer": ""}\n',
    "unsound.jsonl": '{"problem": "What is x?", "answer": "\\\\frac{"}\n',
    "good.txt": json.dumps(GOOD) + "\n",
    "binary.jsonl": bytes(range(256)) * 8,
    "text.parquet": "no parquet\n",
    "text.jsonl.gz": "no gzip\n",
    "user.jsonl": '{"messages": [{"role": "user", "content": "Hi"}]}\n',
}
DATA = [
    ("mathrl.py", {"data": "T/none.jsonl"}, "T/none.jsonl: no such file or folder"),
    ("mathrl.py", {"data": "T/good.txt"}, "T/good.txt: expected a file that ends in .jsonl"),
    ("mathrl.py", {"data": "T/nothing"}, "T/nothing: no file that ends in .jsonl"),
    ("mathrl.py", {"data": "T/empty.jsonl"}, "no usable row (the file is empty)"),
    ("mathrl.py", {"data": "T/torn.jsonl"}, "T/torn.jsonl row 2: not valid JSON"),
    (
        "mathrl.py",
        {"data": "T/list.jsonl"},
        "T/list.jsonl row 1: a row is list, expected an object",
    ),
    ("mathrl.py", {"data": "T/bare.jsonl"}, 'T/bare.jsonl row 1: no "answer" field (has: problem)'),
    (
        "mathrl.py",
        {"data": "T/kind.jsonl"},
        'T/kind.jsonl row 1: field "problem" is int, expected str or list',
    ),
    (
        "mathrl.py",
        {"data": "T/nested.jsonl"},
        'no usable row (1 x field "answer" is neither text nor a number)',
    ),
    ("mathrl.py", {"data": "T/blank.jsonl"}, "no usable row (1 x empty problem or answer)"),
    ("mathrl.py", {"data": "T/unsound.jsonl"}, "no answer that the verifier can read"),
    ("mathrl.py", {"data": "T/binary.jsonl"}, "T/binary.jsonl row"),
    ("mathrl.py", {"data": "T/text.parquet"}, "T/text.parquet row 0: ArrowInvalid"),
    ("mathrl.py", {"data": "T/text.jsonl.gz"}, "T/text.jsonl.gz row 0: BadGzipFile"),
    ("mathrl.py", {"eval_data": "T/none.jsonl"}, "T/none.jsonl: no such file or folder"),
    ("mathrl.py", {"max_prompt_tokens": 3}, "every prompt is longer than max_prompt_tokens=3"),
    ("sft.py", {"data": "T/bare.jsonl"}, 'no usable row (1 x no "messages" field'),
    ("sft.py", {"data": "T/user.jsonl"}, "the last turn is not the assistant's"),
    ("sft.py", {"max_seq_len": 3}, "every conversation is longer than max_seq_len=3"),
    ("ifrl.py", {"data": "T/bare.jsonl"}, "T/bare.jsonl"),
    ("coderl.py", {"data": "T/bare.jsonl"}, "T/bare.jsonl"),
    ("swerl.py", {"data": "T/bare.jsonl"}, "T/bare.jsonl"),
    ("rlhf.py", {"rm_data": "T/bare.jsonl"}, 'T/bare.jsonl row 1: no "chosen" field'),
    (
        "extras/decontaminate.py",
        {"data": "W/math_rl.jsonl", "eval_data": "T/none.jsonl", "out": "T/clean.jsonl"},
        "T/none.jsonl: no such file",
    ),
    (
        "extras/decontaminate.py",
        {"data": "W/math_rl.jsonl", "eval_data": "W/math_dev.jsonl", "out": "T/none/clean.jsonl"},
        "T/none/clean.jsonl.tmp",
    ),
]


def place(text, world, folder):
    text = str(text)
    return (
        text.replace("W/", f"{world}/").replace("T/", f"{folder}/") if text != "T" else str(folder)
    )


def refused(server, world, tmp_path, script, flags, message, ranks=1, **env):
    """Run one row; check the sentence, the exit code, and that the run's folder is as it was."""
    out = tmp_path / "out"
    if not os.path.lexists(out):
        out.mkdir()
        (out / "metrics.jsonl").write_text('{"step": 1}\n')
    trains = script in BASE
    flags = {
        **({"init_from": "W/base", "out_dir": "T/out"} if trains else {}),
        **BASE.get(script, {}),
        **flags,
    }
    before = contents(tmp_path)
    code, said = answer(
        server,
        tmp_path,
        script,
        {k: place(v, world, tmp_path) for k, v in flags.items()},
        ranks,
        **env,
    )
    print(said)
    sentence = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said, said[-2000:]
    assert (
        sentence.startswith(f"{Path(script).name}: ")
        and message.replace("T/", f"{tmp_path}/") in sentence
        and len(said.strip().splitlines()) == 1
    )
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("err")} == before, (
        "something was written"
    )


def names(table):
    """Ids of the rows: the script and its flags."""
    return [
        " ".join([script, *(f"--{k}={v}" for k, v in flags.items())]) for script, flags, _ in table
    ]


@pytest.mark.parametrize("script, flags, message", FLAGS, ids=names(FLAGS))
def test_flags(script, flags, message, server, world, tmp_path):
    refused(server, world, tmp_path, script, flags, message)


@pytest.mark.parametrize("script, flags, message", DATA, ids=names(DATA))
def test_data(script, flags, message, server, world, tmp_path):
    (tmp_path / "nothing").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(server, world, tmp_path, script, flags, message)


# ---- Models, tokenizers, reward models -----------------------------------------------------------
def edit_json(name, **changes):
    def edit(folder):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | changes))

    return edit


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def cut(name, size=1000):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def rename_token(folder):
    (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|end|>")
    )


def narrow(folder):
    edit_json("config.json", vocab_size=600)(folder)
    edit_tensors(
        lambda t: t.update(
            {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:600].clone()}
        )
    )(folder)


MODELS = {
    "no_folder": (shutil.rmtree, "T/model: no such folder"),
    "no_config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config_is_no_json": (cut("config.json", 20), "JSONDecodeError"),
    "another_architecture": (
        edit_json("config.json", model_type="llama"),
        "model_type is 'llama', expected 'qwen3'",
    ),
    "attention_bias": (
        edit_json("config.json", attention_bias=True),
        "attention_bias True is not supported",
    ),
    "another_rope": (
        edit_json("config.json", rope_scaling={"rope_type": "llama3"}),
        "rope_type 'llama3' is not supported",
    ),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "no weights there"),
    "weights_of_pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is no safetensors file",
    ),
    "two_sets_of_weights": (
        lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors"),
        "two sets of weights",
    ),
    "weights_cut_off": (cut("model.safetensors", 50_000), "SafetensorError"),
    "weights_are_no_safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"pickle" * 100),
        "SafetensorError",
    ),
    "a_tensor_is_missing": (
        edit_tensors(lambda t: t.pop("model.norm.weight")),
        "1 tensors are missing, first model.norm.weight",
    ),
    "a_tensor_too_many": (
        edit_tensors(lambda t: t.update({"model.extra": torch.zeros(1)})),
        "unknown tensor model.extra",
    ),
    "a_tensor_of_another_shape": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
        "norm.weight is (3,), expected (48,)",
    ),
    "another_width": (edit_json("config.json", hidden_size=64), "expected"),
    "no_tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "tokenizer_is_no_json": (cut("tokenizer.json"), "Exception"),
    "tokenizer_without_chat_tokens": (rename_token, "no token <|im_end|>"),
    "more_tokens_than_rows_of_the_embedding": (narrow, "tokens, the model only 600"),
    "a_run_json_of_something_else": (
        lambda f: (f / "run.json").write_text("[]"),
        "run.json cannot be read",
    ),
}


@pytest.mark.parametrize("wrong", MODELS)
def test_models_and_tokenizers(wrong, server, world, tmp_path):
    change, message = MODELS[wrong]
    shutil.copytree(world / "base", tmp_path / "model")
    change(tmp_path / "model")
    script = "mathrl.py" if wrong.startswith("a_run_json") else "sft.py"
    refused(server, world, tmp_path, script, {"init_from": "T/model"}, message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"init_from": "nowhere"}, "reward model from nowhere"),
        ({"rm_init_from": "nowhere"}, "reward model from nowhere: no such folder"),
        (
            {"init_from": "Qwen/Qwen3-0.6B"},
            "hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B",
        ),
        ({"rm": "nowhere"}, "--rm=nowhere: no such folder"),
        ({"rm": "W/base"}, "Qwen3ForCausalLM is no sequence classifier"),
        ({"rm": "T/rm"}, "--rm=T/rm: "),
        pytest.param(  # it asks again after pauses
            {"rm": "http://127.0.0.1:9/score", "reward_workers": 24},
            "reward model self test: scores [None",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_reward_models(flags, message, server, world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "rm")
    # but it has no score head
    edit_json("config.json", architectures=["Qwen3ForSequenceClassification"])(tmp_path / "rm")
    refused(server, world, tmp_path, "rlhf.py", flags, message)


# ---- Folders, checkpoints, ports -----------------------------------------------------------------
def test_an_output_folder_that_is_a_file(server, world, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(server, world, tmp_path, "sft.py", {}, "T/out: no folder to write into (File exists)")


def test_an_output_folder_below_a_file(server, world, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(
        server,
        world,
        tmp_path,
        "sft.py",
        {"out_dir": "T/file/out"},
        "T/file/out: no folder to write into (Not a directory)",
    )


def test_an_output_folder_without_rights(server, world, tmp_path):
    refused(
        server,
        world,
        tmp_path,
        "sft.py",
        {"out_dir": "/proc/out"},
        "/proc/out: no folder to write into",
    )


def test_toy_data_where_a_file_is(server, world, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(server, world, tmp_path, "toy.py", {"out": "T/file"}, "T/file")


def test_results_that_are_a_folder(server, world, tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    refused(
        server,
        world,
        tmp_path,
        "evaluate.py",
        {"model": "W/base", "tasks": "math", "results": "T/results.jsonl"},
        "Is a directory",
    )


def test_a_log_of_something_else(server, world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("step,loss\n1,2\n")
    refused(server, world, tmp_path, "sft.py", {}, "metrics.jsonl is not the log of a run")


@pytest.mark.parametrize("script, ranks", [("sft.py", 1), ("mathrl.py", 2), ("evaluate.py", 1)])
def test_a_folder_that_another_run_holds(script, ranks, server, world, tmp_path):
    (tmp_path / "out").mkdir()
    flags = (
        {"model": "W/base", "tasks": "math", "results": "T/out/results.jsonl"}
        if script == "evaluate.py"
        else {}
    )
    with open(tmp_path / "out" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(server, world, tmp_path, script, flags, "another run is writing here", ranks)


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (
            "mathrl.py",
            {"prompts_per_step": 1, "group_size": 1},
            "less than a rollout for each of 2 ranks",
        ),
        (
            "sft.py",
            {"samples_per_step": 1},
            "--samples_per_step=1 is less than one for each of 2 ranks",
        ),
    ],
)
def test_batches_that_the_ranks_cannot_share(script, flags, message, server, world, tmp_path):
    refused(server, world, tmp_path, script, flags, message, ranks=2)


def test_a_port_in_use(server, world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused(
            server,
            world,
            tmp_path,
            "sft.py",
            {},
            f"rank 0 of 2 at MASTER_PORT={port}",
            ranks=2,
            MASTER_PORT=port,
        )


def saved(world, out, changes):
    """A checkpoint of step 1 in a run's folder, whole but for the changes in its run.json."""
    from model import Qwen3

    model = Qwen3.from_pretrained(world / "base")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    optimizer.step()
    out.mkdir()
    folder = checkpoint.save_checkpoint(
        str(out), 1, model, optimizer, Config(init_from=str(world / "base")), {}
    )
    edit_json("run.json", **changes)(Path(folder))


CURSOR = {"epoch": 1, "position": 0, "skipped": 0}


@pytest.mark.parametrize(
    "script, changes, message",
    [
        (
            "sft.py",
            {"state": {**CURSOR, "block": 0, "seen": {}, "files": {"other.jsonl": [0, 0, 0.0]}}},
            "its files are not those",
        ),
        (
            "mathrl.py",
            {"state": {**CURSOR, "pool": [], "history": {}, "data": 1}},
            "not those that T/out/step_000001 was trained on",
        ),
    ],
)
def test_checkpoints_of_another_run(script, changes, message, server, world, tmp_path):
    saved(world, tmp_path / "out", changes)
    refused(server, world, tmp_path, script, {"num_steps": 3}, message)


@pytest.mark.parametrize(
    "args, environment, message",
    [
        (["9b"], {}, "usage: bash run_cascade.sh"),
        (["8b"], {"BASE": ""}, "set BASE to the folder of a Qwen3 base model"),
    ],
)
def test_run_cascade(args, environment, message, tmp_path):
    env = {**os.environ, "DRY_RUN": "1", "OUT": str(tmp_path / "out"), **environment}
    done = subprocess.run(
        ["bash", "run_cascade.sh", *args],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()


def test_the_table_has_at_least_fifty_rows():
    count = len(FLAGS) + len(DATA) + len(MODELS)
    print(f"{count} rows in the three tables alone, at least 50 wanted")
    assert count >= 50


@pytest.mark.parametrize("threads", ["abc", "0", "-1", "0,1", "1.5"])
def test_odd_numbers_of_threads(threads, server, world, tmp_path):
    message = f"OMP_NUM_THREADS={threads}: expected a whole number above 0"
    refused(server, world, tmp_path, "sft.py", {}, message, OMP_NUM_THREADS=threads)


def test_of_nested_numbers_of_threads_the_outermost_counts(monkeypatch):
    for given, threads in (("2,1", 2), (" 3 ", 3), ("4", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert num_threads(world=8) == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert num_threads(world=10**6) == 1


# ---- --check, and a stage that is done -----------------------------------------------------------
def run(server, world, tmp_path, script, **flags):
    """(exit code, standard output, standard error) of a script with the flags of BASE and these."""
    flags = {"init_from": "W/base", "out_dir": "T/out", **BASE[script], **flags}
    placed = {k: place(v, world, tmp_path) for k, v in flags.items()}
    code, said = answer(server, tmp_path, script, placed)
    return code, (tmp_path / ".err0").read_text(), said


@pytest.mark.parametrize("script", BASE)
def test_check_shows_ten_prompts_and_costs_and_leaves_nothing(script, server, world, tmp_path):
    # The training sets, which have more than ten rows.
    flags = {"data": str(BASE[script].get("data")).replace("_dev", "_rl")}
    if script == "extras/mopd.py":
        flags["data"] = "mathrl:W/math_rl.jsonl:W/base"
    if script == "sft.py":
        flags["samples_per_step"] = 12
    code, printed, said = run(server, world, tmp_path, script, check=True, **flags)
    assert (code, said) == (0, "")
    # Ten prompts as the model reads them, and the plan.
    assert len(re.findall(r"^--- \d+ of \d+: \d+ tokens", printed, re.M)) == 10
    assert printed.count("<|im_start|>system\n") >= 10 and "time: a step takes at most" in printed
    if script == "sft.py":
        trained = re.findall(r"are trained ---\n(.*?<\|im_end\|>)\n", printed, re.S)
        assert len(trained) == 10 and not any("<|im_start|>" in text for text in trained)
    else:
        assert printed.count("<|im_end|>\n<|im_start|>assistant\n") == 10
        assert "a step samples 2 x 2 completions, at most 32 tokens" in printed
    assert "check: a checkpoint has about" in printed and "Nothing was trained." in printed
    left = {p.name for p in (tmp_path / "out").rglob("*") if not p.name.startswith(".")}
    assert not left, "neither a log, nor a checkpoint, nor a reward model"


@pytest.mark.parametrize(
    "wrong, message",
    [({"data": "T/none.jsonl"}, "no such file or folder"), ({"engine": "warp"}, "--engine=warp")],
)
def test_check_ends_with_the_sentence_of_what_is_wrong(wrong, message, server, world, tmp_path):
    refused(server, world, tmp_path, "mathrl.py", {"check": True, **wrong}, message)


def test_check_says_that_the_disk_is_too_small(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1e9)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda path: usage)
    with torch.device("meta"):
        models = [torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 10**5)]
    small, large = [check.cost_of_disk(model, Config(out_dir=str(tmp_path))) for model in models]
    assert "about 0.012 GB" in small and "not enough" not in small
    assert "about 1.2 GB" in large and large.endswith(": not enough")
    # Frozen weights have no moments, as beside an adapter.
    frozen = models[1].requires_grad_(False)
    assert "about 0.4 GB" in check.cost_of_disk(frozen, Config(out_dir=str(tmp_path)))


def test_a_stage_that_is_done_says_so_and_stays_as_it_is(server, world, tmp_path):
    assert run(server, world, tmp_path, "mathrl.py")[0] == 0
    # As if it had been killed between its last checkpoint and the link.
    (tmp_path / "out" / "final").unlink()
    before = contents(tmp_path / "out")
    code, printed, said = run(server, world, tmp_path, "mathrl.py")
    assert (code, said) == (0, "")
    assert "step_000001 is step 1 of --num_steps=1" in printed and "steps 2..1" not in printed
    assert (tmp_path / "out" / "final").resolve().name == "step_000001"
    assert contents(tmp_path / "out").items() >= before.items()


def test_a_save_that_fails_says_what_is_whole(world, tmp_path, capsys, monkeypatch):
    from model import Qwen3

    model = Qwen3.from_pretrained(world / "base")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    cfg = Config(init_from=str(world / "base"))
    (tmp_path / "out").mkdir()

    def no_room(*args):
        raise OSError(28, "No space left on device")

    for step, note in ((1, "None was saved before it."), (3, "step_000002 before it is whole.")):
        with monkeypatch.context() as broken, pytest.raises(SystemExit):
            broken.setattr(model, "save_pretrained", no_room)
            checkpoint.save_checkpoint(str(tmp_path / "out"), step, model, optimizer, cfg, {})
        assert note in capsys.readouterr().err
        checkpoint.save_checkpoint(str(tmp_path / "out"), step + 1, model, optimizer, cfg, {})


def test_a_good_row_is_not_refused(server, world, tmp_path):
    """The same way of running, with nothing wrong: exit code 0 and a finished stage."""
    clock = time.time()
    flags = {"init_from": "W/base", "out_dir": "T/out", **BASE["sft.py"]}
    code, said = answer(
        server, tmp_path, "sft.py", {k: place(v, world, tmp_path) for k, v in flags.items()}
    )
    assert code == 0 and (tmp_path / "out" / "final").exists(), said
    print(f"{time.time() - clock:.1f} s")
