"""Verdicts on instructions: how their time grows with the reply, and what the guards of training
refuse of answers that people and models wrote.

    python bench/verdicts_if.py --data=alpaca_en_demo.json --out=bench/verdicts_if.json

Growth: every constraint gets floods, one unit repeated to 10,000 characters, and the slowest flood
again at 100,000 and at 1,000,000. Seconds are CPU seconds of this process. Refused: pairs of an
answer (Alpaca's form: instruction, input, output) and a constraint of tests/test_ifrl.py that the
answer follows by the references' rules; the answer was written without knowing the constraint.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_ifrl import EXAMPLES, FLOODS  # noqa: E402

from verifiers import constraint_guards as guards  # noqa: E402
from verifiers import constraints  # noqa: E402

LENGTHS = (10_000, 100_000, 1_000_000)


def seconds_of(decide, text):
    """CPU seconds of one verdict."""
    constraints.tokens.cache_clear()
    start = time.process_time()
    decide(text)
    return time.process_time() - start


def growth(decide):
    """{"unit", "seconds"} of the flood that is slowest at the smallest length."""

    def flood(unit, length):
        return (unit * (length // len(unit) + 1))[:length] + "x"

    slowest = max(FLOODS, key=lambda unit: seconds_of(decide, flood(unit, LENGTHS[0])))
    seconds = [round(seconds_of(decide, flood(slowest, length)), 4) for length in LENGTHS]
    return {"unit": slowest, "seconds": seconds}


def measure_growth():
    """The growth of each check, and of the guards with that constraint."""
    result = {}
    for name, kwargs in EXAMPLES.items():

        def decide(text, name=name, kwargs=kwargs):
            constraints.check(name, kwargs, text)

        def guard(text, name=name, kwargs=kwargs):
            guards.objection([name], [kwargs], text, text[:4000])
            guards.is_meant(name, kwargs, text)

        result[name] = {"check": growth(decide), "guards": growth(guard)}
        print(name, *result[name].values(), flush=True)
    return result


def measure_refusals(path, num_pairs):
    """Counts over real answers: what the general guards refuse, and the guards of a constraint."""
    rows = [row for row in json.loads(Path(path).read_text()) if row["output"].strip()]
    data = [(f"{row['instruction']} {row['input']}".strip(), row["output"]) for row in rows]
    usable = [pair for pair in EXAMPLES.items() if not constraints.unusable(*pair)]
    rng = random.Random(0)
    followed, refused = Counter(), Counter()
    for _ in range(num_pairs):
        name, kwargs = rng.choice(usable)
        prompt, answer = rng.choice(data)
        if constraints.check(name, kwargs, answer):
            followed[name] += 1
            refused[name] += guards.objection([name], [kwargs], answer, prompt) is not None
    return {
        "answers": len(data),
        "repeat themselves": sum(guards.repeats_itself(answer) for _, answer in data),
        "copies of their prompt": sum(guards.copies(answer, prompt) for prompt, answer in data),
        "without a word": sum(not guards.has_word(answer) for _, answer in data),
        "followed": dict(followed),
        "refused": {name: count for name, count in refused.items() if count},
    }


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", default="bench/verdicts_if.json")
    parser.add_argument("--pairs", type=int, default=20_000)
    args = parser.parse_args()
    result = {"real": measure_refusals(args.data, args.pairs), "growth": measure_growth()}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
