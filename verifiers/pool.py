"""Verdicts in the background: a completion is judged while others still decode."""

import time


def timed(function, *args):
    """(function(*args), its seconds): what a verifier worker runs."""
    clock = time.perf_counter()
    return function(*args), time.perf_counter() - clock


def in_background(pool, judge, names):
    """The reward hook of a verifier: submit(rollout) starts judge(rollout) in the pool, collect(rollouts) waits for the verdicts and sets
    `names`. Equal completions of a prompt have one verdict, which is worked out once."""
    running = {}

    def work(rollout):
        verdict, rollout.verify_s = timed(judge, rollout)
        return verdict

    def submit(rollout):
        same = id(rollout.row), rollout.text, rollout.finish_reason
        if same not in running:
            running[same] = pool.submit(work, rollout)
        rollout.pending = running[same]
        return rollout.pending

    def collect(rollouts):
        for r in rollouts:
            vars(r).update(zip(names, (r.pending or submit(r)).result(), strict=True), pending=None)
        running.clear()

    return submit, collect
