"""How a run ends that something broke: at once, and with a sentence that names rank, step and phase.

    mathrl.py: rank 1, step 7, rollout: ValueError: boom. Run it again: it goes on from the last checkpoint.

Where it was is read off the stack of the main thread: what `main` has called is the phase, its variable `step` is the step. So no stage
has to announce anything. torchrun ends the other ranks when one has ended; they get SIGTERM and say where that met them.
"""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))


def ours(walk):
    """The frames of this repository's scripts in what a traceback.walk_... function gives."""
    return [f for f, _ in walk if os.path.normpath(os.path.dirname(f.f_code.co_filename)) == HERE]


def where(frames):
    """"rank 1, step 7, rollout" from frames, outermost first."""
    names = [f.f_code.co_name for f in frames]
    phase = names[names.index("main") :][1:2] if "main" in names else names[:1]
    step = next((f"step {f.f_locals['step']}" for f in frames if "step" in f.f_locals), "start")
    return ", ".join([f"rank {os.environ.get('RANK', 0)}", step, *phase])


def end(frames, reason, code=1):
    """Hard: a teardown would wait for the other ranks and for reward workers."""
    note = "Run it again: it goes on from the last checkpoint."
    print(f"{os.path.basename(sys.argv[0])}: {where(frames)}: {reason}. {note}", file=sys.__stderr__, flush=True)
    os._exit(code)


def uncaught(kind, error, trace):
    """For sys.excepthook. torch.distributed wraps it and catches what goes to sys.stderr, hence sys.__stderr__."""
    traceback.print_exception(error, file=sys.__stderr__)
    end(ours(traceback.walk_tb(trace)), f"{kind.__name__}: {error}".partition("\n")[0].rstrip("."))


def watch(signals, limit_s):
    """Runs in a thread of its own, so that it still works while the main thread waits for a collective or a reward."""
    place, since = "", 0.0
    while True:
        faulthandler.dump_traceback_later(limit_s + 30, exit=True)  # for C code in the main thread that never lets this one run again
        told = select.select([signals], [], [], 1)[0] and os.read(signals, 1)[0]
        frames = ours(traceback.walk_stack(sys._current_frames()[threading.main_thread().ident]))[::-1]
        if told == signal.SIGTERM:
            end(frames, "ended by SIGTERM: another rank had ended, or the job was stopped", 128 + told)
        place, since = (place, since) if where(frames) == place else (where(frames), time.monotonic())
        if time.monotonic() - since > limit_s:
            traceback.print_stack(frames[-1])
            end(frames, f"not done after {limit_s:g} s (--phase_timeout), now in {frames[-1].f_code.co_name}")


def guard(limit_s):
    """From here on: exceptions, SIGTERM, and phases of more than limit_s seconds end this process with a sentence."""
    signals, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # gets the number of a signal at once, whatever the main thread does
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Reward workers just end. SIGTERM waits while one is forked: in its first moment it still has this process's pipe.
    mask, term = signal.pthread_sigmask, {signal.SIGTERM}
    release = lambda: mask(signal.SIG_UNBLOCK, term)
    in_child = lambda: (signal.signal(signal.SIGTERM, signal.SIG_DFL), release())
    os.register_at_fork(before=lambda: mask(signal.SIG_BLOCK, term), after_in_parent=release, after_in_child=in_child)
    sys.excepthook = uncaught
    threading.Thread(target=watch, args=(signals, limit_s), daemon=True).start()
