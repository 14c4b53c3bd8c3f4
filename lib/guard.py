"""How a run ends: at once, and with one sentence.

User errors end with one sentence and exit code 2 (fail). Everything else that breaks a run ends
with a sentence that names rank, step and phase:

    mathrl.py: rank 1, step 7, rollout: ValueError: boom. Run it again: it goes on from the last
    checkpoint.

The position is read off the stack of the main thread: the phase is the function that `main` has
called, and the step is the local variable `step`. No stage has to announce anything. When one rank
has ended, torchrun sends SIGTERM to the others, and each of them says where the signal met it.
"""

import contextlib
import errno
import faulthandler
import importlib.util
import json
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

from lib.progress import break_silence, count_under_way

# Set once an exception is reported, which says more than a SIGTERM that comes after it.
exception_is_reported = threading.Event()
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---- User errors ---------------------------------------------------------------------------------
def fail(message, note="Nothing was trained.", code=2):
    """Print one sentence and exit with code 2. For every error that the user can correct.

    Another code, 3, is that of a run that learns nothing (lib/health.py).
    """
    script = os.path.basename(sys.argv[0])
    if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) > 0:
        let_the_first_rank_speak()
    last_words(f"{script}: {message} {note}", sys.stderr)
    if dist.is_initialized():
        # An orderly exit would wait for the other ranks.
        os._exit(code)
    sys.exit(code)


def let_the_first_rank_speak():
    """Wait, as the first rank of a node meets most user errors, too, and says them once for all.

    When it has ended, torchrun ends this process. An error of this rank alone is said afterwards.
    """
    exception_is_reported.set()
    # Only the main thread may set a handler; another one is ended with its process.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(3)


def last_words(sentence, stream):
    """Print a last sentence, and leave it to torchrun, which repeats it below its own traceback."""
    print(sentence, file=stream, flush=True)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError), open(path, "w") as f:
            json.dump({"message": sentence, "timestamp": int(time.time())}, f)


def engine_name(flag):
    """The sampler that --engine means, "torch" or "vllm". "auto" is vLLM where it is installed
    beside a GPU."""
    if flag not in ("auto", "torch", "vllm"):
        fail(f"--engine={flag}: expected auto, torch or vllm.")
    if flag == "auto":
        return "vllm" if vllm_is_installed() and torch.cuda.is_available() else "torch"
    return flag


def vllm_is_installed():
    return importlib.util.find_spec("vllm") is not None


def first_line(error):
    """Return the first line of an exception's text, with its type unless that is ValueError."""
    text = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    if type(error) is ValueError:
        return text
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def one_sentence(subject, note="Nothing was trained."):
    """Turn any exception inside the block into a user error about `subject`, like a flag."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  libraries raise whatever they like
        fail(f"{subject}: {first_line(error)}.", note)


def file_trouble(kind, error, trace):
    """A sys.excepthook: report file errors as user errors, and leave the rest to Python.

    A full disk, missing rights, or a file where a folder should be can be met by any line of code.
    """
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_FULL):
        fail(f"{first_line(error)}.", note="What was finished before is whole.")
    sys.__excepthook__(kind, error, trace)


# ---- Where a process is --------------------------------------------------------------------------
def repository_frames(frames):
    """List the frames that belong to this repository or to the script that runs, in their order."""
    # The running script counts wherever it stands: a user's copy of a stage (an ablation like
    # my_idea.py) may lie outside the repository, and its errors name rank, step and phase, too.
    script = os.path.abspath(getattr(sys.modules["__main__"], "__file__", ""))
    ours = []
    for frame in frames:
        path = os.path.abspath(frame.f_code.co_filename)
        # A virtual environment may lie inside the repository, but its packages are not ours.
        in_repository = path.startswith(ROOT + os.sep) and "site-packages" not in path
        if in_repository or path == script:
            ours.append(frame)
    return ours


def main_thread_frames():
    """The repository's frames on the stack of the main thread, outermost first."""
    while True:
        try:
            return repository_frames(main_thread_stack())[::-1]
        except AttributeError:
            # The main thread runs on while its stack is read. Python 3.11 can then hand out an
            # object that has taken the place of a frame. It is rare: look again.
            time.sleep(0.01)


def main_thread_stack():
    """All frames on the stack of the main thread, innermost first, read as fast as can be."""
    stack, frame = [], sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def describe_position(frames):
    """Say where a process is, like "rank 1, step 7, rollout". Frames come outermost first."""
    functions = [frame.f_code.co_name for frame in frames]
    # The phase is the function that main has called. Without main it is the outermost function.
    if "main" in functions:
        below_main = functions.index("main") + 1
        phase = functions[below_main : below_main + 1]
    else:
        phase = functions[:1]
    step = "start"
    for frame in frames:
        if "step" in frame.f_locals:
            step = f"step {frame.f_locals['step']}"
            break
    return ", ".join([f"rank {os.environ.get('RANK', '0')}", step, *phase])


def without_rank(position):
    """ "step 7, rollout" of "rank 1, step 7, rollout"."""
    return position.partition(", ")[2]


def never_silent():
    """For a script without `guard`: no minute passes without a line (lib/progress.py)."""

    def look():
        began = time.monotonic()
        while True:
            time.sleep(1)
            position = describe_position(main_thread_frames())
            break_silence(without_rank(position), time.monotonic() - began)

    threading.Thread(target=look, daemon=True).start()


# ---- Runs that break -----------------------------------------------------------------------------
def end_process(frames, reason, code=1):
    """Print position and reason, then exit without interpreter teardown.

    A teardown would wait for the other ranks and for the reward workers.
    """
    script = os.path.basename(sys.argv[0])
    note = "Run it again: it goes on from the last checkpoint."
    sentence = f"{script}: {describe_position(frames)}: {reason}. {note}"
    if code == 128 + signal.SIGTERM:
        # Another rank has the reason: torchrun should repeat the sentence of that one.
        print(sentence, file=sys.__stderr__, flush=True)
    else:
        last_words(sentence, sys.__stderr__)
    os._exit(code)


def uncaught(kind, error, trace):
    """The sys.excepthook of a run: print the traceback and end the process with a sentence.

    torch.distributed wraps sys.excepthook and swallows what is written to sys.stderr meanwhile.
    sys.__stderr__ passes it by.
    """
    exception_is_reported.set()
    frames = repository_frames(frame for frame, _ in traceback.walk_tb(trace))
    # A full disk needs no traceback, whether a log, a sample or a checkpoint was being written.
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        end_process(frames, f"the disk is full ({first_line(error)})", 2)
    if kind is KeyboardInterrupt:
        end_process(frames, "interrupted", 128 + signal.SIGINT)
    traceback.print_exception(error, file=sys.__stderr__)
    text, _, _ = str(error).partition("\n")
    reason = f"{kind.__name__}: {text}" if text else kind.__name__
    end_process(frames, reason.rstrip("."))


def watch(signal_pipe, limit_s):
    """End the process on SIGTERM, or when one phase of one step takes more than limit_s seconds.

    Runs in a thread of its own, so that it works while the main thread waits for a collective or
    for a reward.
    """
    position, since = "", 0.0
    micro_batch, since_micro_batch = 0, 0.0
    while True:
        # C code in the main thread may hold the interpreter lock, and then no line of this loop
        # runs again. faulthandler has a C thread: it prints the stacks and exits the process
        # unless the next round of this loop restarts its clock.
        faulthandler.dump_traceback_later(limit_s + 30, exit=True)

        # Sleep for a second, or until a signal arrives.
        readable, _, _ = select.select([signal_pipe], [], [], 1)
        signal_number = os.read(signal_pipe, 1)[0] if readable else None

        frames = main_thread_frames()
        if signal_number == signal.SIGTERM and not exception_is_reported.is_set():
            reason = "ended by SIGTERM: another rank had ended, or the job was stopped"
            end_process(frames, reason, 128 + signal_number)

        # The clock restarts whenever the main thread is in another phase or another step.
        new_position = describe_position(frames)
        if new_position != position:
            position, since = new_position, time.monotonic()
            micro_batch, since_micro_batch = 0, since

        # No phase passes in silence.
        break_silence(without_rank(position), time.monotonic() - since)

        # An update is shorter than the longest rollouts, for which the limit is meant: between two
        # of its micro-batches, and in a sync, a small part of it may pass.
        allowed_s, what, began = limit_s, "--phase_timeout", since
        if is_update(frames):
            count = count_under_way()
            if count and count.done != micro_batch:
                micro_batch, since_micro_batch = count.done, time.monotonic()
            allowed_s, began = update_limit(limit_s), since_micro_batch
            if allowed_s < limit_s:
                what = "of the --phase_timeout, without a micro-batch more"
        # A rank that waits in a collective gets 5 seconds more. The rank that it waits for then
        # ends first, and the sentence of that rank names the phase that is stuck.
        waits = bool(frames) and frames[-1].f_code.co_name in ("all_reduce", "all_gather")
        if time.monotonic() - began > allowed_s + 5 * waits:
            traceback.print_stack(frames[-1])
            function = frames[-1].f_code.co_name
            end_process(frames, f"not done after {allowed_s:g} s ({what}), now in {function}")


# The least that is allowed between two micro-batches of an update: kernels are compiled first.
LEAST_UPDATE_S = 300


def update_limit(limit_s):
    """Seconds that may pass in an update without a micro-batch more, or in a sync: a 20th of
    --phase_timeout, which has to last for the longest rollouts."""
    return min(limit_s, max(limit_s / 20, LEAST_UPDATE_S))


def is_update(frames):
    """Whether the main thread trains or gives its sampler the new weights."""
    functions = {frame.f_code.co_name for frame in frames}
    return bool(functions & {"train_step", "sync"})


def guard(limit_s):
    """Watch this process from here on.

    Exceptions, SIGTERM, and phases of more than limit_s seconds end it with a sentence.
    """
    # Python writes the number of every signal into this pipe at once, even while the main thread
    # is busy in C code, where no Python handler could run. The watch thread reads the other end.
    signal_pipe, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    # A handler has to be set for the pipe to be used. This one does nothing.
    signal.signal(signal.SIGTERM, lambda *_: None)

    # Block SIGTERM across a fork: a newborn child still shares the pipe, so a signal to the child
    # would end this process. Reward workers simply die of SIGTERM, as is the default.
    def block_sigterm():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def unblock_sigterm():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def die_of_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unblock_sigterm()

    os.register_at_fork(
        before=block_sigterm, after_in_parent=unblock_sigterm, after_in_child=die_of_sigterm
    )
    sys.excepthook = uncaught
    threading.Thread(target=watch, args=(signal_pipe, limit_s), daemon=True).start()


# ---- Training that has gone wrong ----------------------------------------------------------------
def check_step(step, metrics, state, cfg):
    """End a run whose rewards, gradients or rollouts are broken.

    metrics: of this step; "skipped" is added to them. state["skipped"] counts the steps in a row
    whose loss or gradient was not finite. train_step did not apply these, and the third ends the
    run.
    """

    def stop(reason, note="The last checkpoint is whole."):
        fail(f"step {step}, {reason}.", note=note)

    # Rewards that failed for a reason outside the completion. SFT has none, and no such flag.
    infra = metrics.get("status/infra", 0)
    if infra > 0 and infra > cfg.max_infra:
        stop(
            f"rollout: {infra:.1%} of the rewards are infrastructure failures "
            f"(--max_infra={cfg.max_infra:g})"
        )

    # Losses and gradients that are not finite, three times in a row.
    finite = math.isfinite(metrics["grad_norm"] + metrics["loss"])
    state["skipped"] = 0 if finite else state["skipped"] + 1
    metrics["skipped"] = state["skipped"]
    if state["skipped"] >= 3:
        stop(
            f"train_step: loss ({metrics['loss']}) or gradient ({metrics['grad_norm']}) "
            f"was not finite three times in a row (lr {cfg.lr})",
            # The last step that was applied may have broken the weights.
            note="The last checkpoint is whole. If this comes again, lower --lr and remove those "
            f"from step {step - 3} on.",
        )

    if finite and "gap" in metrics:
        check_gap(metrics["gap"], cfg, stop)


def check_gap(gap, cfg, stop):
    """Call stop(reason) if the sampler draws from another policy than the one that is trained.

    gap: mean difference between the log-probs of sampler and trainer, in nats a token. They differ
    by rounding alone: 1e-6 in fp32, 0.01 in bf16. An engine that missed an update differs by more.
    """
    limit = 0.05 if torch.cuda.is_available() else 1e-3
    if engine_name(cfg.engine) == "vllm":
        # vLLM normalizes its log-probs over the tokens that top_p and top_k leave. Top-p raises
        # each by at most -log(top_p). Top-k has no such bound, so there nothing is checked here;
        # the vLLM engine has a gate of its own.
        limit += math.inf if cfg.top_k > 0 else -math.log(cfg.top_p)
    # A gap of nan has to stop the run, hence no `gap > limit`.
    if not gap <= limit:
        stop(
            f"rollout: the sampler's log-probs are {gap:.1e} a token off the trainer's "
            f"(limit {limit:.1e}): it draws from another policy"
        )
