"""Verdicts on constraints in worker processes, which can be killed when a verdict takes too long.

    submit, wait = in_processes(num_workers, function, arguments)

A verdict takes milliseconds, and about two seconds for the worst flood in a long answer. But a
keyword of a constraint is used as a regular expression, and some expressions take exponential time
on some texts. Python cannot stop a thread that is inside such a match, but it can kill a
process.
"""

import atexit
import ctypes
import multiprocessing
import signal
import time

from verifiers.pool import timed

# How long wait() waits for the next verdict before it gives up.
VERDICT_SECONDS = 60
# The option of Linux's prctl by which a process gets a signal when its parent dies.
PR_SET_PDEATHSIG = 1


def start_processes(num_workers):
    """Pool of forked processes. They die with this process, however it ends."""
    die_with_parent = (PR_SET_PDEATHSIG, signal.SIGKILL)
    context = multiprocessing.get_context("fork")
    pool = context.Pool(num_workers, ctypes.CDLL(None).prctl, die_with_parent)
    atexit.register(pool.terminate)
    return pool


def in_processes(num_workers, function, arguments):
    """Make two functions, (submit, wait): they call function(*arguments(rollout)) in processes.

    submit(rollout) starts the call and returns at once. The engine calls it for every completion
    that ends, so verdicts are found while other completions still decode.
    wait(rollouts) returns the results in the order of the rollouts, with None for a call that was
    not done VERDICT_SECONDS after the one before it, and notes in each rollout the seconds its call
    took (verify_s). So many slow calls are waited for, and one that is stuck costs VERDICT_SECONDS.
    A rollout that was never submitted is submitted first. An exception in a call is raised again.

    With num_workers = 0 (tests) all calls run in this process, without a time limit.
    """
    pool = start_processes(num_workers) if num_workers else None

    def submit(rollout):
        """Start the call for a rollout."""
        if pool is None:
            rollout.pending = timed(function, *arguments(rollout))
        else:
            rollout.pending = pool.apply_async(timed, (function, *arguments(rollout)))
        return rollout.pending

    def wait(rollouts):
        """Collect the results; after a timeout, replace the processes."""
        nonlocal pool
        for rollout in rollouts:
            if rollout.pending is None:
                submit(rollout)
        deadline = time.monotonic() + VERDICT_SECONDS
        results = []
        timed_out = False
        for rollout in rollouts:
            result, seconds = None, VERDICT_SECONDS
            try:
                if pool is None:
                    result, seconds = rollout.pending
                else:
                    seconds_left = max(0.0, deadline - time.monotonic())
                    result, seconds = rollout.pending.get(seconds_left)
                    # Verdicts still arrive. Once a call is stuck, no more time is given.
                    if not timed_out:
                        deadline = time.monotonic() + VERDICT_SECONDS
            except multiprocessing.TimeoutError:
                timed_out = True
            results.append(result)
            rollout.verify_s = seconds
            rollout.pending = None
        if timed_out:
            # A process that is stuck would be missing in the next step.
            pool.terminate()
            pool = start_processes(num_workers)
        return results

    return submit, wait
