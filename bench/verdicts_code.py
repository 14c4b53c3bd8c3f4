"""Verdicts on public tasks: every reference solution is paid, and no empty answer is.

    python bench/verdicts_code.py --humaneval=HumanEval.jsonl.gz --mbpp=sanitized-mbpp.json

The tests of both sets are assertions. They become rows of Code RL here: the reference solution runs
under them, and each of its calls is recorded as arguments and result. The rows then go the way of
all rows: `coderl.normalize`, then `coderl.reward`. Some tasks are no rows, because JSON cannot hold
their calls: the result is a set, or the solution needs a tuple where JSON has a list. Their
assertions run behind the answer in one program.
"""

import argparse
import copy
import gzip
import json
import os
import re
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import coderl
from lib.data import BadRow
from verifiers import programs

# Some tasks of HumanEval try a hundred random inputs.
MOST_TESTS = 32


def humaneval_tasks(path):
    """Yield (id, problem, solution, source of the tests, name) of each task of HumanEval."""
    with gzip.open(path, "rt") as file:
        for line in file:
            task = json.loads(line)
            solution = task["prompt"] + task["canonical_solution"]
            tests = f"{task['test']}\ncheck({task['entry_point']})\n"
            yield task["task_id"], task["prompt"], solution, tests, task["entry_point"]


def mbpp_tasks(path):
    """Yield the same of each task of MBPP, whose assertions name their function."""
    with open(path) as file:
        tasks = json.load(file)
    for task in tasks:
        called = re.findall(r"(\w+) ?\(", task["test_list"][0])
        defined = re.findall(r"^def (\w+)", task["code"], re.M)
        name = next(name for name in defined if name in called)
        tests = "\n".join(task["test_imports"] + task["test_list"])
        yield f"MBPP/{task['task_id']}", task["prompt"], task["code"], tests, name


def record(solution, tests, name):
    """Run the tests on the solution; return [(arguments, result)] of its calls from outside."""
    scope = {"__name__": "solution"}
    exec(solution, scope)  # noqa: S102
    function = scope[name]
    calls = []
    depth = 0

    def recorded(*arguments):
        nonlocal depth
        given = copy.deepcopy(arguments)
        depth += 1
        try:
            result = function(*arguments)
        finally:
            depth -= 1
        if depth == 0:  # not a call that the function makes of itself
            calls.append((given, copy.deepcopy(result)))
        return result

    scope[name] = recorded
    exec(tests, scope)  # noqa: S102
    return calls[:MOST_TESTS]


def as_row(problem, solution, tests, name):
    """A row of Code RL whose tests are the recorded calls; None where JSON cannot hold them."""
    calls = record(solution, tests, name)
    scope = {"__name__": "solution"}
    exec(solution, scope)  # noqa: S102
    inputs, outputs = [], []
    for arguments, result in calls:
        try:
            lines = [json.dumps(programs.encode_keys(value)) for value in arguments]
            output = json.dumps(result)
            # The same call with what the program will be given.
            given = [json.loads(line, object_hook=programs.sandbox.decode_keys) for line in lines]
            again = json.dumps(scope[name](*given))
        except Exception:  # noqa: BLE001  not JSON, or the solution needs another type
            return None
        if not programs.same_value(json.loads(again), json.loads(output)):
            return None
        # Literals, as a public set has them: json.dumps would lose keys that are no text.
        inputs.append("\n".join(map(repr, arguments)))
        outputs.append(output)
    return {
        "problem": problem,
        "tests": {"inputs": inputs, "outputs": outputs, "fn_name": name},
    }


def assertions_hold(code, tests):
    """Whether the tests of a task pass in the sandbox as one program, behind the answer."""
    program = f"{code}\n{tests}\nprint('passed')\n"
    return programs.run_tests(program, {"inputs": [""], "outputs": ["passed"]}) == ["ok"]


def verdicts(tasks):
    """Counts and names for one set."""
    result = {"tasks": 0, "rows": 0, "tests": 0, "as_assertions": [], "dropped": {}}
    result |= {"reference_refused": {}, "empty_paid": []}
    for task_id, problem, solution, tests, name in tasks:
        result["tasks"] += 1
        raw = as_row(problem, solution, tests, name)
        # No function, a function of another name, one that does nothing, the prelude's modules.
        empty = ["pass", "def other(*a): return a", f"def {name}(*a): pass", "import math"]
        if raw is None:
            result["as_assertions"].append(task_id)
            if not assertions_hold(solution, tests):
                result["reference_refused"][task_id] = "assertions"
            result["empty_paid"] += [[task_id, e] for e in empty if assertions_hold(e, tests)]
            continue
        try:
            row = coderl.normalize(raw, task_id)
        except BadRow as reason:
            result["dropped"][task_id] = str(reason)
            continue
        result["rows"] += 1
        result["tests"] += len(row["tests"]["inputs"])
        _, status, _ = coderl.verdict(programs.fenced(solution), row["tests"])
        if status != "ok":
            result["reference_refused"][task_id] = status
        for code in empty:
            if coderl.reward(programs.fenced(code), row["tests"]):
                result["empty_paid"].append([task_id, code])
    return result


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--humaneval", required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--mbpp", required=True, help="sanitized-mbpp.json")
    parser.add_argument("--out", default="bench/verdicts_code.json")
    args = parser.parse_args()
    start = time.process_time()
    table = {
        "HumanEval": verdicts(humaneval_tasks(args.humaneval)),
        "MBPP sanitized": verdicts(mbpp_tasks(args.mbpp)),
    }
    for name, result in table.items():
        paid = result["tasks"] - len(result["dropped"]) - len(result["reference_refused"])
        print(
            f"{name}: {result['tasks']} tasks, {result['rows']} rows, {result['tests']} tests; "
            f"references paid {paid}, empty answers paid {len(result['empty_paid'])}; "
            f"as assertions {len(result['as_assertions'])}, dropped {result['dropped']}, "
            f"refused {result['reference_refused']}, empty {result['empty_paid']}"
        )
    print(f"{time.process_time() - start:.1f} s of CPU here")
    with open(args.out, "w") as file:
        json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
