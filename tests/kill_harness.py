"""Kill the cascade at random instants, start it again, and compare its end with an undisturbed run.

    python tests/kill_harness.py --kills=30 --log=bench/kill.log

The command is the real run_cascade.sh: toy data, SFT in two parts, five RL stages, held-out scores,
gates, report. It runs on a copy of the repository whose .venv/bin/python adds flags that make
everything small (MINI): model, steps and rows shrink, the code is the same.

Every kill is SIGKILL to all processes of the run, and the next start follows at once. Two of three
kills come at an instant that is drawn uniformly from zero to a few start-up times. Every third
kill, and the first one of a cascade, waits until something half-written lies on the disk (*.tmp, or
data without data/done). When a cascade comes to its end before there were enough kills, it is
compared, and another cascade begins.

In the log, "scoring" a stage means that the stage is final, and that its scores are not complete
and the next stage has written nothing yet.

Compared byte for byte: the data, the final weights of all stages and of the reward model. Compared
value for value: metrics.jsonl without time/ and memory/, the cursors that say which rows come next
(run.json), and the last score of every cell of results.jsonl.
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
# The files that a run needs, as patterns below the root of the repository.
FILES = (
    "*.py",
    "*.sh",
    "*.jinja",
    "requirements.txt",
    "kernels/*.py",
    "lib/*.py",
    "verifiers/*.py",
    "evals/*.py",
    "evals/*.html",
    "extras/*.py",
)
# Stands as .venv/bin/python in the copy. PYTHON becomes the real interpreter.
MINI = """#!/usr/bin/env bash
rl="--prompts_per_step=4 --group_size=4 --num_steps=6 --save_every=2 --eval_every=3 --eval_rows=4
    --max_new_tokens=48 --micro_batch_tokens=1024"
case "${1##*/}" in
    toy.py)
        exec PYTHON -c "$MAKE_WORLD" "${@:2}" --vocab_size=640 --hidden_size=48 --num_layers=2 ;;
    sft.py)
        set -- "$@" --samples_per_step=32 --num_steps=100 --schedule_steps=200 --warmup_steps=10 \\
            --save_every=20 ;;
    rlhf.py)
        set -- "$@" $rl --rm_samples_per_step=8 ;;
    ifrl.py)
        set -- "$@" $rl ;;
    mathrl.py|coderl.py|swerl.py)
        skill=${1%rl.py}
        set -- "$@" $rl --data="$OUT/data/${skill##*/}_sft.jsonl" ;;
    evaluate.py)
        set -- "$@" --tasks=math,chat --limit=4 --samples=1 --max_new_tokens=16 --modes=no_think ;;
esac
exec PYTHON "$@"
"""


def make_copy(folder):
    """Copy the repository's files of this moment, with a .venv that makes them run small."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(MINI.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    # The same text that setup() of run_cascade.sh writes, so that it installs nothing.
    gpus = subprocess.run("nvidia-smi -L 2>/dev/null | grep -q GPU", shell=True, check=False)
    has_gpu = 1 if gpus.returncode == 0 else 0
    installed = (folder / "requirements.txt").read_text() + f"gpus: {has_gpu}\n"
    (folder / ".venv" / "installed").write_text(installed)
    return folder


def start(folder):
    """Start the cascade in a process group of its own; its output is appended to `printed`."""
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
    """Name something that lies on the disk and is not finished; "" if there is nothing."""
    run = folder / "out" / "run"
    if run.exists() and not (run / "data" / "done").exists():
        return "data"
    for stage in STAGES:
        for path in (run / stage).glob("*.tmp"):
            return str(path.relative_to(run))
    return ""


def where(folder):
    """Say how far the run had come when it was killed."""
    run = folder / "out" / "run"
    begun = [stage for stage in STAGES if (run / stage).exists()]
    if not begun:
        return "making the data" if run.exists() else "before the first file"
    stage = begun[-1]
    if stage == "rlhf" and not (run / stage / "rm").exists():
        return "rlhf, training the reward model"
    if (run / stage / "scored").exists():
        return f"between {stage} and what comes next"
    if (run / stage / "final").exists():
        return f"scoring {stage}"
    path = run / stage / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    num_lines = text.count("\n")
    saved = [path for path in (run / stage).glob("step_*") if path.suffix != ".tmp"]
    torn = ""
    if text and not text.endswith("\n"):
        torn = ", a line of metrics.jsonl torn"
    return f"{stage}, {num_lines} steps logged, {len(saved)} checkpoints{torn}"


def live(folder, life, aimed):
    """Run the cascade until it ends (returns True) or is killed (returns False).

    The kill comes after `life` seconds. If aimed, it comes when something half-written lies on the
    disk: up to 3 s later for the data, up to 0.02 s later for a checkpoint, and after 4 * life
    seconds if nothing was seen.
    """
    process = start(folder)
    began = time.time()
    kill_at = began + life * (4 if aimed else 1)
    seen = False
    while process.poll() is None:
        if aimed and not seen:
            unfinished = half_written(folder)
            if unfinished:
                seen = True
                longest_delay = 3 if unfinished == "data" else 0.02
                kill_at = min(kill_at, time.time() + (life % 1) * longest_delay)
        if time.time() > kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        time.sleep(0.002)
    if process.returncode:
        printed = (folder / "printed").read_text()[-3000:]
        raise SystemExit(
            f"the same command ended with {process.returncode} instead of going on:\n{printed}"
        )
    return True


def rows(path):
    """Rows of a JSONL file, without the values that differ from run to run (time and memory)."""
    found = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.append({k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))})
    return found


def outcome(folder):
    """{name: value} of everything that has to be equal."""
    run = folder / "out" / "run"
    found = {}
    for pattern in ("data/**/*.json*", "data/**/*.safetensors", "rlhf/rm/model.safetensors"):
        for path in run.glob(pattern):
            found[str(path.relative_to(run))] = path.read_bytes()
    for stage in STAGES:
        final = run / stage / "final"
        found[f"{stage} weights"] = (final / "model.safetensors").read_bytes()
        found[f"{stage} metrics"] = rows(run / stage / "metrics.jsonl")
        found[f"{stage} cursor"] = json.loads((final / "run.json").read_text())["state"]
    # A cell that was measured twice counts with its last score.
    scores = {}
    for row in rows(run / "results.jsonl"):
        scores[row["stage"], row["task"], row["mode"], row["decoding"]] = row
    found["scores"] = scores
    return found


def startup_seconds():
    """The time that this machine needs for one start, which sets the scale of the kills."""
    began = time.time()
    command = [sys.executable, "-c", "import torch; print(torch.__version__)"]
    subprocess.run(command, check=True, capture_output=True)
    return time.time() - began


def commit():
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def expected_outcome(folder, process, say):
    """Wait for the undisturbed run, and make sure that every stage trained in it."""
    assert process.wait() == 0, (folder / "printed").read_text()[-3000:]
    expected = outcome(folder)
    learned = {}
    for stage in STAGES:
        learned[stage] = sum(row["grad_norm"] > 0 for row in expected[f"{stage} metrics"])
    steps = ", ".join(f"{stage} {count}" for stage, count in learned.items())
    say(f"the undisturbed run: steps with a gradient {steps}")
    assert all(learned.values()), "no gradient: equal for no reason"
    return expected


def main(flags, log):
    scratch = pathlib.Path(flags.out).resolve()
    rng = random.Random(flags.seed)

    def say(text):
        print(text, flush=True)
        print(text, file=log, flush=True)

    longest = 6 * startup_seconds()
    say(f"python tests/kill_harness.py --kills={flags.kills} --seed={flags.seed}")
    say(
        f"commit {commit()}, python {platform.python_version()}, one process, "
        f"kills up to {longest:.0f} s after a start"
    )
    shutil.rmtree(scratch, ignore_errors=True)
    straight = make_copy(scratch / "straight")
    undisturbed = start(straight)  # runs beside the first cascade that is killed
    expected = None
    kills = cascades = 0
    while kills < flags.kills or not expected:
        folder = make_copy(scratch / f"killed{cascades}")
        done = False
        while not done:
            if kills < flags.kills:
                life = rng.uniform(0, longest)
                # The first kill of a cascade comes while its data are being made.
                aimed = kills % 3 == 2 or not (folder / "out").exists()
            else:
                life, aimed = float("inf"), False
            done = live(folder, life, aimed)
            if not done:
                kills += 1
                unfinished = half_written(folder)
                suffix = f"; half-written: {unfinished}" if unfinished else ""
                say(f"kill {kills:2d}: {where(folder)}{suffix}")
        if not expected:
            expected = expected_outcome(straight, undisturbed, say)
        found = outcome(folder)
        cascades += 1
        names = sorted(found.keys() | expected.keys())
        differ = [name for name in names if found.get(name) != expected.get(name)]
        examples = differ[:5] if differ else ""
        say(f"cascade {cascades}: {len(found)} results compared, {len(differ)} differ {examples}")
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
    arguments = parser.parse_args()
    os.makedirs(os.path.dirname(os.path.abspath(arguments.log)), exist_ok=True)
    with open(arguments.log, "w") as log_file:
        main(arguments, log_file)
