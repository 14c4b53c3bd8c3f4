"""How a run ends: at once, and with one sentence. What is the user's to mend ends with code 2 (fail). What broke names rank, step and phase:

    mathrl.py: rank 1, step 7, rollout: ValueError: boom. Run it again: it goes on from the last checkpoint.

Where it was is read off the stack of the main thread: what `main` has called is the phase, its variable `step` is the step. So no stage
has to announce anything. torchrun ends the other ranks when one has ended; they get SIGTERM and say where that met them.
"""

import contextlib
import errno
import faulthandler
import math
import os
import select
import signal
import sys
import threading
import time
import traceback

import torch
import torch.distributed as dist

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---- The user's to mend --------------------------------------------------------------------------
def fail(message, note="Nothing was trained."):
    """One sentence and exit code 2, for everything that is the user's to mend."""
    print(f"{os.path.basename(sys.argv[0])}: {message} {note}", file=sys.stderr, flush=True)
    os._exit(2) if dist.is_initialized() else sys.exit(2)


def first_line(error):
    """What an exception says, in one line."""
    text = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def one_sentence(what, note="Nothing was trained."):
    """Whatever goes wrong inside is wrong with `what`, in the library's words."""
    try:
        yield
    except Exception as e:
        fail(f"{what}: {first_line(e)}.", note)


def file_trouble(kind, error, trace):
    """sys.excepthook: a full disk, missing rights, a file where a folder should be are the user's to mend, whoever met them."""
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_FULL):
        fail(f"{first_line(error)}.", note="What was finished before is whole.")
    sys.__excepthook__(kind, error, trace)


# ---- What broke ----------------------------------------------------------------------------------
def ours(walk):
    """The frames of this repository's scripts, and of the script that runs, in what a traceback.walk_... function gives."""
    script = os.path.abspath(getattr(sys.modules["__main__"], "__file__", ""))
    below = lambda path: path.startswith(ROOT + os.sep) and "site-packages" not in path
    return [
        f
        for f, _ in walk
        if below(os.path.abspath(f.f_code.co_filename))
        or os.path.abspath(f.f_code.co_filename) == script
    ]


def where(frames):
    """Where it was, "rank 1, step 7, rollout", from frames, outermost first."""
    names = [f.f_code.co_name for f in frames]
    phase = names[names.index("main") :][1:2] if "main" in names else names[:1]
    step = next((f"step {f.f_locals['step']}" for f in frames if "step" in f.f_locals), "start")
    return ", ".join([f"rank {os.environ.get('RANK', 0)}", step, *phase])


def end(frames, reason, code=1):
    """Hard: a teardown would wait for the other ranks and for reward workers."""
    note = "Run it again: it goes on from the last checkpoint."
    print(
        f"{os.path.basename(sys.argv[0])}: {where(frames)}: {reason}. {note}",
        file=sys.__stderr__,
        flush=True,
    )
    os._exit(code)


def uncaught(kind, error, trace):
    """For sys.excepthook. torch.distributed wraps it and catches what goes to sys.stderr, hence sys.__stderr__."""
    # whatever was being written: a log, a sample, a checkpoint
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        end(ours(traceback.walk_tb(trace)), f"the disk is full ({first_line(error)})", 2)
    traceback.print_exception(error, file=sys.__stderr__)
    end(ours(traceback.walk_tb(trace)), f"{kind.__name__}: {error}".partition("\n")[0].rstrip("."))


def watch(signals, limit_s):
    """Runs in a thread of its own, so that it still works while the main thread waits for a collective or a reward."""
    place, since = "", 0.0
    while True:
        # for C code in the main thread that never lets this one run again
        faulthandler.dump_traceback_later(limit_s + 30, exit=True)
        told = select.select([signals], [], [], 1)[0] and os.read(signals, 1)[0]
        frames = ours(traceback.walk_stack(sys._current_frames()[threading.main_thread().ident]))[
            ::-1
        ]
        if told == signal.SIGTERM:
            end(
                frames,
                "ended by SIGTERM: another rank had ended, or the job was stopped",
                128 + told,
            )
        place, since = (
            (place, since) if where(frames) == place else (where(frames), time.monotonic())
        )
        # for a rank that can say more: it goes first
        waits = any(f.f_code.co_name in ("all_reduce", "all_gather") for f in frames[-1:])
        if time.monotonic() - since > limit_s + 5 * waits:
            traceback.print_stack(frames[-1])
            end(
                frames,
                f"not done after {limit_s:g} s (--phase_timeout), now in {frames[-1].f_code.co_name}",
            )


def guard(limit_s):
    """From here on: exceptions, SIGTERM, and phases of more than limit_s seconds end this process with a sentence."""
    signals, writer = os.pipe()
    os.set_blocking(writer, False)
    # gets the number of a signal at once, whatever the main thread does
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Reward workers just end. SIGTERM waits while one is forked: in its first moment it still has
    # this process's pipe.
    mask, term = signal.pthread_sigmask, {signal.SIGTERM}
    release = lambda: mask(signal.SIG_UNBLOCK, term)
    in_child = lambda: (signal.signal(signal.SIGTERM, signal.SIG_DFL), release())
    os.register_at_fork(
        before=lambda: mask(signal.SIG_BLOCK, term),
        after_in_parent=release,
        after_in_child=in_child,
    )
    sys.excepthook = uncaught
    threading.Thread(target=watch, args=(signals, limit_s), daemon=True).start()


# ---- What learns nothing, or the wrong thing -----------------------------------------------------
def check_step(step, metrics, state, cfg):
    """Ends a run whose rewards, gradients or rollouts are broken. A loss or gradient that is not finite was not applied (train_step); three in a row
    end it. Sampler and trainer differ by rounding: 1e-6 nats a token in fp32, 0.01 in bf16; an engine that missed an update differs by more."""
    stop, gpu = (
        lambda reason: fail(f"step {step}, {reason}.", note="The last checkpoint is whole."),
        torch.cuda.is_available(),
    )
    if (share := metrics.get("status/infra", 0)) and share > cfg.max_infra:
        stop(
            f"rollout: {share:.1%} of the rewards are infrastructure failures (--max_infra={cfg.max_infra:g})"
        )
    if hasattr(cfg, "max_timeout") and metrics["status/timeout"] > cfg.max_timeout:
        stop(
            f"rollout: {metrics['status/timeout']:.1%} of the verifications were cut off (--max_timeout={cfg.max_timeout:g})"
        )
    finite = math.isfinite(metrics["grad_norm"] + metrics["loss"])
    metrics["skipped"] = state["skipped"] = 0 if finite else state["skipped"] + 1
    if state["skipped"] >= 3:
        stop(
            f"train_step: loss ({metrics['loss']}) or gradient ({metrics['grad_norm']}) was not finite three times in a row (lr {cfg.lr})"
        )
    if finite and "gap" in metrics:
        limit = 0.05 if gpu else 1e-3
        # its log-probs are of what top_p and top_k leave; it has a gate of its own
        if cfg.engine == "vllm" or cfg.engine == "auto" and gpu:
            limit += math.inf if cfg.top_k > 0 else -math.log(cfg.top_p)
        if not metrics["gap"] <= limit:
            stop(
                f"rollout: the sampler's log-probs are {metrics['gap']:.1e} a token off the trainer's (limit {limit:.1e}): it draws from another policy"
            )
