"""What isolation costs: the same programs through the sandbox, through plain `subprocess`, and in
bare interpreters.

    python bench/sandbox.py [--programs=200] [--out=out/bench_sandbox.json]

The ways are interleaved in rounds, so that a busy machine hurts all alike. Each program is a stdin
test whose output is compared. Printed are the median milliseconds per program, CPU included, and
the ratio to plain subprocess. Two claims have to hold: full isolation costs at most 1.5 times plain
subprocess, and the zygote is at least 2 times faster than a fresh interpreter.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from side_by_side import machine

from verifiers import sandbox

# Typical short solutions (source, stdin, output): reading, a loop, a sort, the usual imports.
PROGRAMS = [
    ("n = int(input())\nprint(sum(i * i for i in range(n)))", "100\n", "328350"),
    (
        (
            "import sys\nfrom collections import Counter\n"
            "print(Counter(sys.stdin.read().split()).most_common(1)[0][0])"
        ),
        "a b a\n",
        "a",
    ),
    (
        (
            "import heapq\nx = list(map(int, input().split()))\nheapq.heapify(x)\n"
            "print(*[heapq.heappop(x) for _ in range(3)])"
        ),
        "5 3 9 1\n",
        "1 3 5",
    ),
    (
        (
            "from functools import lru_cache\n@lru_cache(None)\n"
            "def f(n): return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(int(input())))"
        ),
        "80\n",
        "23416728348467685",
    ),
]


def plain_subprocess(source, stdin):
    """Run a program as most reward functions do.

    That is a fresh interpreter with site packages, a file and a time limit, and nothing else.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source)
        file.flush()
        return subprocess.run(
            [sys.executable, file.name],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout


def bare_interpreter(source, stdin):
    """The fastest fresh interpreter: isolated, without the site module."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", source],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    ).stdout


def in_sandbox(source, stdin):
    return sandbox.run(source, stdin).stdout


def usage():
    """CPU seconds of this process and of its children that have ended."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def timed(way, jobs, workers):
    """Return (wall, CPU of this process and its children) milliseconds per program.

    The output of each program is checked.
    """
    if way is in_sandbox:
        sandbox.run("pass")
    cpu, start = usage(), time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        outputs = list(pool.map(lambda job: way(job[0], job[1]).strip(), jobs))
    wall = time.perf_counter() - start
    if way is in_sandbox:
        sandbox.close()  # its CPU time counts once it has been reaped
    assert outputs == [job[2] for job in jobs], "a verdict was lost"
    return 1e3 * wall / len(jobs), 1e3 * (usage() - cpu) / len(jobs)


def calls_per_program(jobs, calls=5):
    """Return (wall, CPU) milliseconds of one function-style program with five calls.

    Each call runs in a process of its own: the load of the toy Code RL stage.
    """
    source = "def f(x):\n    x = sorted(x)\n    return [i * 2 for i in x]\n"
    sandbox.run("pass")
    cpu, start = usage(), time.perf_counter()
    for _ in range(jobs):
        assert all(
            r.value == [2, 4, 6] for r in sandbox.run_each(source, [("f", [[3, 1, 2]])] * calls)
        )
    wall = time.perf_counter() - start
    sandbox.close()
    return 1e3 * wall / jobs, 1e3 * (usage() - cpu) / jobs


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--programs", type=int, default=100, help="per way and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="out/bench_sandbox.json")
    args = parser.parse_args()
    jobs = (PROGRAMS * args.programs)[: args.programs]
    ways = {
        "plain subprocess": plain_subprocess,
        "bare interpreter": bare_interpreter,
        "sandbox": in_sandbox,
    }
    table = {}
    for workers in (1, 16):
        times = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                times[name].append(timed(way, jobs, workers))
        plain = statistics.median(wall for wall, _ in times["plain subprocess"])
        print(f"{workers} in flight   ms per program   CPU ms   of plain subprocess")
        for name, rounds in times.items():
            wall, cpu = (statistics.median(column) for column in zip(*rounds))
            table[f"{name}, {workers} in flight"] = {
                "wall_ms": wall,
                "cpu_ms": cpu,
                "ratio": wall / plain,
                "rounds": rounds,
            }
            print(f"  {name:18} {wall:10.2f} {cpu:13.2f} {wall / plain:13.2f}")
    calls, calls_cpu = calls_per_program(args.programs)
    cores, load = os.cpu_count(), os.getloadavg()[0]
    print(
        f"one program with 5 calls: {calls:.2f} ms, {calls_cpu:.2f} of CPU; "
        f"mode: {sandbox._mode}; {cores} cores, load {load:.1f}"
    )
    ratio, speedup = (
        table["sandbox, 1 in flight"]["ratio"],
        table["bare interpreter, 1 in flight"]["wall_ms"]
        / table["sandbox, 1 in flight"]["wall_ms"],
    )
    print(f"full isolation / plain subprocess: {ratio:.2f} (at most 1.5)")
    print(f"bare interpreter / sandbox: {speedup:.2f} (at least 2)")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out, "w") as f:
        host = {
            "python": sys.version.split()[0],
            "kernel": platform.release(),
            "machine": machine(),
            "mode": sandbox._mode,
            "load": load,
        }
        json.dump(
            {"host": host, "ways": table, "five_calls_ms": calls, "five_calls_cpu_ms": calls_cpu},
            f,
            indent=1,
        )


if __name__ == "__main__":
    main()
