"""The math reward on labelled pairs of gold and answer: what is paid or refused wrongly.

    python bench/verdicts_math.py [--gsm8k=gsm8k_test.jsonl] [--old=folder of another checkout]
                                  [--rounds=3] [--busy=4] [--out=out/verdicts_math.json]

The pairs are those of tests/math_cases.jsonl: `want` is the right verdict, `before` the verdict of
the reader that this one replaced. --gsm8k loads all golds of that file as Math RL would. --old
takes the CPU seconds of both readers in turns, without child processes, on all pairs that need no
time-out. --busy judges the same pairs again beside so many busy processes and names every pair
whose status differs.
"""

import argparse
import collections
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CASES = os.path.join(ROOT, "tests", "math_cases.jsonl")
# Kinds whose answers are meant to use up the time limit
SLOW_KINDS = ("bomb", "hang")

# Judges all quick pairs in one process and prints the CPU seconds. argv: checkout, cases.
TIMED = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import mathrl
from verifiers import answers
answers.equal_in_child = answers.equal
cases = [json.loads(line) for line in open(sys.argv[2])]
def judge_all():
    start = time.process_time()
    for case in cases:
        mathrl.verdict(mathrl.boxed_response(case["answer"]), case["gold"])
    return time.process_time() - start
judge_all()
print(judge_all())
"""


def read_cases():
    """The rows of math_cases.jsonl."""
    with open(CASES, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_quick(case):
    """True if an answer is not made to use up the time limit."""
    return not any(kind in case["kind"] for kind in SLOW_KINDS)


def judge(case):
    """(reward, status) of one pair."""
    import mathrl

    whole = case["kind"].startswith("whole response")
    response = case["answer"] if whole else mathrl.boxed_response(case["answer"])
    return mathrl.verdict(response, case["gold"])


def by_kind(cases, verdicts):
    """Counts before and after for each kind, and the pairs that are still judged wrongly."""
    kinds = collections.defaultdict(collections.Counter)
    left = []
    for case, (value, status) in zip(cases, verdicts, strict=True):
        counts = kinds[case["kind"]]
        name = "right" if case["want"] else "wrong"
        counts[f"{name} answers"] += 1
        mistake = "refused" if case["want"] else "paid"
        counts[f"{mistake} before"] += case["before"] != case["want"]
        counts[f"{mistake} after"] += value != case["want"]
        if value != case["want"]:
            left.append([case["gold"], case["answer"], case["want"], status])
    return {kind: dict(counts) for kind, counts in sorted(kinds.items())}, left


def totals(kinds):
    """Sum of the counts of all kinds."""
    total = collections.Counter()
    for counts in kinds.values():
        total.update(counts)
    return dict(total)


def spin():
    """Keep a core busy."""
    while True:
        pow(3, 10**5)


def judge_beside_busy_processes(cases, count):
    """Verdicts while `count` processes keep the cores busy."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        return [judge(case) for case in cases]
    finally:
        for process in processes:
            process.kill()


def cpu_seconds(checkout, cases_path):
    """CPU seconds that a checkout needs for all pairs of a file, in a process of its own."""
    command = [sys.executable, "-c", TIMED, checkout, cases_path]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def compare_speed(cases, old, rounds):
    """CPU seconds of the old and of this checkout, in turns."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for case in cases:
            file.write(json.dumps(case) + "\n")
        file.flush()
        seconds = {"old": [], "new": []}
        for _ in range(rounds):
            seconds["old"].append(round(cpu_seconds(old, file.name), 2))
            seconds["new"].append(round(cpu_seconds(ROOT, file.name), 2))
    ratio = statistics.median(seconds["new"]) / statistics.median(seconds["old"])
    return {"pairs": len(cases), **seconds, "new / old": round(ratio, 2)}


def load_golds(path):
    """How many golds of a data file load, and how many are compared as text only."""
    import mathrl

    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    # GSM8K writes its final answer behind "####".
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for row in rows:
            gold = row["answer"].rpartition("####")[2].strip()
            file.write(json.dumps({"problem": row["question"], "answer": gold}) + "\n")
        file.flush()
        start = time.process_time()
        loaded = mathrl.load_rows(mathrl.Config(data=file.name, reward_workers=2))
        seconds = time.process_time() - start
    as_text = sum(row.get("as_text", False) for row in loaded)
    counts = {"rows": len(rows), "loaded": len(loaded), "as text": as_text}
    return {**counts, "CPU seconds": round(seconds, 2)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gsm8k", default="")
    parser.add_argument("--old", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--out", default="out/verdicts_math.json")
    args = parser.parse_args()
    sys.path.insert(0, ROOT)

    cases = read_cases()
    verdicts = [judge(case) for case in cases]
    kinds, left = by_kind(cases, verdicts)
    result = {"total": totals(kinds), "judged wrongly": left}
    if args.gsm8k:
        result["gsm8k"] = load_golds(args.gsm8k)
    quick = [case for case in cases if is_quick(case) and "whole" not in case["kind"]]
    if args.old:
        result["speed"] = compare_speed(quick, args.old, args.rounds)
    if args.busy:
        quiet = [v for case, v in zip(cases, verdicts, strict=True) if case in quick]
        busy = judge_beside_busy_processes(quick, args.busy)
        differ = []
        for case, a, b in zip(quick, quiet, busy, strict=True):
            if a != b:
                differ.append([case["gold"], case["answer"], a[1], b[1]])
        result["beside busy processes"] = {
            "processes": args.busy,
            "pairs": len(quick),
            "differ": differ,
        }
    result["kinds"] = kinds
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    for name, value in result.items():
        if name != "kinds":
            print(name, json.dumps(value))


if __name__ == "__main__":
    main()
