"""Kills the cascade at random instants, starts the same command again, and holds the end against a run that nobody disturbed.

    python tests/kill_harness.py --kills=30 --log=bench/kill.log

The command is the real run_cascade.sh: toy data, SFT in two parts, five RL stages, held-out scores, gates, report. It runs on a copy of
the repository whose .venv/bin/python adds flags that make everything small (MINI); model, steps and rows shrink, the code is the same.
Every kill is SIGKILL to all processes of the run, and the next start follows at once. Two of three kills come at an instant drawn
uniformly from zero to a few start-up times; every third, and the first of a cascade, wait until something half-written lies on the
disk (*.tmp, or data without data/done). A cascade that comes to its end before there were enough kills is compared, and another is begun.
In the log, "scoring" a stage: it is final, and what follows it, its scores or the next stage's first file, is not there yet.

Equal, byte for byte: the data, the final weights of all stages and of the reward model. Equal, value for value: metrics.jsonl without
time/ and memory/, the cursors that say which rows come next (run.json), the last score of every cell of results.jsonl.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import time

from conftest import MAKE_WORLD, ROOT

STAGES = ("sft1", "sft2", "rlhf", "ifrl", "mathrl", "coderl", "swerl")
MINI = """#!/usr/bin/env bash
rl="--prompts_per_step=4 --group_size=4 --num_steps=6 --save_every=2 --eval_every=3 --eval_rows=4 --max_new_tokens=48 --micro_batch_tokens=1024"
case "${1##*/}" in
    toy.py) exec PYTHON -c "$MAKE_WORLD" "${@:2}" --vocab_size=640 --hidden_size=48 --num_layers=2 ;;
    sft.py) set -- "$@" --samples_per_step=32 --num_steps=100 --schedule_steps=200 --warmup_steps=10 --save_every=20 ;;
    rlhf.py) set -- "$@" $rl --rm_samples_per_step=8 ;;
    ifrl.py) set -- "$@" $rl ;;
    mathrl.py|coderl.py|swerl.py) skill=${1%rl.py}; set -- "$@" $rl --data="$OUT/data/${skill##*/}_sft.jsonl" ;;
    evaluate.py) set -- "$@" --tasks=math,chat --limit=4 --samples=1 --max_new_tokens=16 --modes=no_think ;;
esac
exec PYTHON "$@"
"""


def make_copy(folder):
    """The repository's files of this moment, with a .venv that makes them run small."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for pattern in ("*.py", "*.sh", "*.html", "requirements.txt", "kernels/*.py"):
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(MINI.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    # as run_cascade.sh's setup
    count = (
        'if nvidia-smi -L 2>/dev/null | grep -q GPU; then echo "gpus: 1"; else echo "gpus: 0"; fi'
    )
    installed = subprocess.run(
        f"cat requirements.txt; {count}",
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / ".venv" / "installed").write_text(installed.stdout)
    return folder


def start(folder):
    env = {
        **os.environ,
        "LAUNCH": ".venv/bin/python",
        "NPROC": "1",
        "OUT": "out/run",
        "KEEP_BEST": "1",
        "OMP_NUM_THREADS": "1",
        "MAKE_WORLD": MAKE_WORLD,
    }
    with open(folder / "printed", "a") as printed:
        return subprocess.Popen(
            ["bash", "run_cascade.sh"],
            cwd=folder,
            env=env,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )


def half_written(folder):
    """What lies there and is not finished, as short text."""
    run = folder / "out" / "run"
    if run.exists() and not (run / "data" / "done").exists():
        return "data"
    found = [path for stage in STAGES for path in (run / stage).glob("*.tmp")]
    return str(found[0].relative_to(run)) if found else ""


def where(folder):
    """How far the run had come when it was killed."""
    run = folder / "out" / "run"
    stage = next((s for s in reversed(STAGES) if (run / s).exists()), "")
    if not stage:
        return "making the data" if run.exists() else "before the first file"
    path, rm = run / stage / "metrics.jsonl", run / stage / "rm"
    text = path.read_text() if path.exists() else ""
    if stage == "rlhf" and not rm.exists():
        return "rlhf, training the reward model"
    if (run / stage / "scored").exists():
        return f"between {stage} and what comes next"
    if (run / stage / "final").exists():
        return f"scoring {stage}"
    saved = [p.name for p in (run / stage).glob("step_*") if p.suffix != ".tmp"]
    torn = ", a line of metrics.jsonl torn" if text and not text.endswith("\n") else ""
    return f"{stage}, {text.count(chr(10))} steps logged, {len(saved)} checkpoints{torn}"


def live(folder, life, aimed):
    """Run until the end (True), or kill after `life` seconds, or, aimed, when something half-written is there (False)."""
    process, began = start(folder), time.time()
    seen = 0.0
    while process.poll() is None:
        if aimed and not seen and (rest := half_written(folder)):
            seen = time.time() + (life % 1) * (3 if rest == "data" else 0.02)
        if seen and time.time() > seen or time.time() - began > life * (4 if aimed else 1):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(
            f"the same command ended with {process.returncode} instead of going on:\n{(folder / 'printed').read_text()[-3000:]}"
        )
    return True


def rows(path, without=("time/", "memory/")):
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(without)}
        for line in path.read_text().splitlines()
    ]


def outcome(folder):
    """{name: everything that has to be equal}."""
    run, found = folder / "out" / "run", {}
    for path in [
        *run.glob("data/**/*.json*"),
        *run.glob("data/**/*.safetensors"),
        *run.glob("rlhf/rm/model.safetensors"),
    ]:
        found[str(path.relative_to(run))] = path.read_bytes()
    for stage in STAGES:
        found[f"{stage} weights"] = (run / stage / "final" / "model.safetensors").read_bytes()
        found[f"{stage} metrics"] = rows(run / stage / "metrics.jsonl")
        found[f"{stage} cursor"] = json.loads((run / stage / "final" / "run.json").read_text())[
            "state"
        ]
    found["scores"] = {
        (r["stage"], r["task"], r["mode"], r["decoding"]): r for r in rows(run / "results.jsonl")
    }
    return found


def main(flags):
    os.makedirs(os.path.dirname(os.path.abspath(flags.log)), exist_ok=True)
    scratch, rng, log = (
        pathlib.Path(flags.out).resolve(),
        random.Random(flags.seed),
        open(flags.log, "w"),
    )

    def say(text):
        print(text, flush=True)
        print(text, file=log, flush=True)

    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    clock = time.time()
    subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"],
        check=True,
        capture_output=True,
    )
    # seconds: a few start-ups, whatever this machine needs for one
    longest = 6 * (time.time() - clock)
    say(
        f"python tests/kill_harness.py --kills={flags.kills} --seed={flags.seed}\ncommit {git}, python {platform.python_version()}, one process, "
        f"kills up to {longest:.0f} s after a start"
    )
    shutil.rmtree(scratch, ignore_errors=True)
    straight = make_copy(scratch / "straight")
    # beside the first that is killed
    undisturbed, kills, cascades, expected = start(straight), 0, 0, None
    while kills < flags.kills or not expected:
        folder, done = make_copy(scratch / f"killed{cascades}"), False
        while not done:
            life = rng.uniform(0, longest) if kills < flags.kills else float("inf")
            # the first of a cascade: while its data are being made
            aimed = kills % 3 == 2 or not (folder / "out").exists()
            done = live(folder, life, aimed and kills < flags.kills)
            if not done:
                kills, rest = kills + 1, half_written(folder)
                say(
                    f"kill {kills:2d}: {where(folder)}"
                    + (f"; half-written: {rest}" if rest else "")
                )
        if not expected:
            assert undisturbed.wait() == 0, (straight / "printed").read_text()[-3000:]
            expected = outcome(straight)
            learned = {s: sum(r["grad_norm"] > 0 for r in expected[f"{s} metrics"]) for s in STAGES}
            say(
                "the undisturbed run: steps with a gradient "
                + ", ".join(f"{s} {n}" for s, n in learned.items())
            )
            assert all(learned.values()), "no gradient: equal for no reason"
        found, cascades = outcome(folder), cascades + 1
        differ = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        say(
            f"cascade {cascades}: {len(found)} results compared, {len(differ)} differ {differ[:5] if differ else ''}"
        )
        if differ:
            sys.exit(1)
    say(f"{kills} kills, {cascades} cascades, every one equal to the undisturbed run bit for bit")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="out/kill")
    parser.add_argument("--log", default="out/kill.log")
    main(parser.parse_args())
