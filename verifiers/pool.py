"""Verdicts in the background: finished completions are judged while others still decode."""

import math
import numbers
import time

from lib.logs import STATUSES


def timed(function, *args):
    """Call function(*args) in a verifier worker. Returns its result and the seconds it took."""
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def check_verdict(verdict, names):
    """ValueError unless a judge returned a value for each name, a finite reward and a known status.

    Another form would end the step in odd words, or would train and be counted nowhere.
    """
    if not isinstance(verdict, tuple) or len(verdict) != len(names):
        raise ValueError(f"the judge returned {verdict!r}, expected ({', '.join(names)})")
    values = dict(zip(names, verdict, strict=True))
    status = values.get("status", "ok")
    if status not in STATUSES:
        raise ValueError(f"the judge's status is {status!r}, expected one of {STATUSES}")
    # Without a verdict there is no reward, and the rollout is masked.
    reward = values.get("reward", 0.0)
    is_number = isinstance(reward, numbers.Real) and math.isfinite(reward)
    if status != "infra" and not is_number:
        raise ValueError(f"the judge's reward is {reward!r}, expected a finite number")


def in_background(pool, judge, names):
    """Make the reward hook of a stage: the functions (submit, collect).

    submit(rollout) starts judge(rollout) in the pool and returns its future at once. The engine
    calls it for every completion that ends, so the verifier works while others still decode.
    collect(rollouts) waits for all verdicts and writes them into the rollouts. A rollout that was
    never submitted is submitted first.

    pool: a thread pool. judge(rollout) returns a verdict, which has one value for each of `names`.
    names: the attributes of a rollout that collect sets, for instance ("reward", "status").

    Equal completions of a prompt are judged once and share the verdict. The time of that one
    judgement (verify_s) is counted only in the rollout submitted first. An exception in judge is
    raised again by collect.
    """
    # The future of each different completion since the last collect.
    futures = {}

    def work(rollout):
        """Judge a rollout in a worker thread."""
        verdict, rollout.verify_s = timed(judge, rollout)
        return verdict

    def submit(rollout):
        """Start the verdict of a rollout, or join the equal one that is under way."""
        # All rollouts of a prompt share one row object. The finish reason counts because a
        # completion that was cut off can deserve another verdict than one that ended by itself.
        key = (id(rollout.row), rollout.text, rollout.finish_reason)
        if key not in futures:
            futures[key] = pool.submit(work, rollout)
        rollout.pending = futures[key]
        return rollout.pending

    def collect(rollouts):
        """Wait for the verdicts and write them into the rollouts."""
        for rollout in rollouts:
            if rollout.pending is None:
                submit(rollout)
            verdict = rollout.pending.result()
            check_verdict(verdict, names)
            for name, value in zip(names, verdict, strict=True):
                setattr(rollout, name, value)
            rollout.pending = None
        # A later row may get the id of a row that is gone, so forget this step's verdicts.
        futures.clear()

    return submit, collect
