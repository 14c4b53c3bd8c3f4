"""Run untrusted programs, fast enough for reinforcement learning.

Needs Linux 5.4 or later on x86_64 or aarch64, and nothing but Python's standard library.

    run("print(int(input()) + 1)", stdin="41")              -> Result("ok", "42\\n", None, 0.001)
    run("def f(a, b): return a + b", call=("f", [40, 2]))   -> Result("ok", "", 42, 0.001)

Three kinds of processes:

    caller    Holds the expected outputs and compares. The two below never see an expected output,
              so no program can find one. A forged answer would still have to be the right answer.
    zygote    One small interpreter per caller, with the usual modules imported, but without torch,
              environment, network or any file except the libraries. It forks a leaf per program,
              kills the leaf when the caller hangs up, and reports how the leaf ended.
    leaf      The program. It is process 1 of its own user, PID, mount and IPC namespaces. It has no
              capability, may not fork, exec, open sockets, send signals or ptrace (seccomp), has
              resource limits, and an empty /tmp of its own. All that it had vanishes at its end.

Choices:
  1. Limits are CPU seconds, read from outside, so a busy machine turns no right answer into a
     timeout. A wall limit of WALL_FACTOR * timeout + WALL_EXTRA seconds ends programs that sleep.
     SLOTS programs run at once, two for each core; the others queue.
  2. Every test, a call included, gets its own leaf, so no test can leave anything to the next.
     LiveCodeBench's runner makes all calls of a program in one process: there, a list that a
     function never empties fails a right program.
  3. A leaf is one process; threads are allowed. A fork bomb cannot start, and memory_mb bounds the
     whole program. Programs that start other processes fail, as in LiveCodeBench's runner.
  4. The (empty) network namespace belongs to the zygote. One per leaf would add 1.2 ms, and no leaf
     can open a socket anyway.
  5. The hash seed and `random` are fixed: a program gets the same verdict in every run.
  6. Any exit() is a normal end. An uncaught exception is a crash, whatever was printed before it.
  7. Most plain containers refuse namespaces. There a leaf is held by another user id (if the caller
     is root), Landlock, seccomp and resource limits, and one line on stderr says so. There is then
     no folder to write to, and the zygote imports the usual modules before it forks, because a
     leaf may not find them. Without Landlock (before Linux 5.13) seccomp lets a leaf open no path
     at all, and nothing runs unless the environment has SANDBOX_ALLOW_WEAK=1.
  8. A failure that no program can cause (zygote gone, fork refused, pipe broken) is tried three
     times, each time with a fresh zygote, then reported as "infra", never as a wrong answer.
  9. All tests of a task together may wait no longer than one test alone, plus IDLE_SECONDS each.
     Waiting is the wall time beyond WALL_FACTOR times the CPU time, so no computing counts.
"""

import atexit
import builtins
import collections
import ctypes
import gc
import io
import json
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import types

# Outcome of one test. status: "ok", "timeout", "memory", "crash", "output" (too much output) or
# "infra" (not the program's fault). value: result of a call. seconds: CPU time.
Result = collections.namedtuple("Result", "status stdout value seconds")

# Most bytes that a program may print, return, or write into one file.
OUTPUT_BYTES = 16 << 20
# If the caller tells the size of the expected reply, a reply of REPLY_FACTOR times as many bytes,
# plus REPLY_EXTRA, is too long to be read: if it were right, it would be nearly all blanks.
REPLY_FACTOR = 16
REPLY_EXTRA = 1 << 16
# Most digits of an integer that a program reads, prints or returns.
MAX_DIGITS = 50_000
# Digits of an integer that every Python converts at once.
DIGITS_AT_ONCE = 4000
# The wall limit of a test is WALL_FACTOR * timeout + WALL_EXTRA seconds. Only sleepers meet it.
WALL_FACTOR = 4
WALL_EXTRA = 10.0
# Wall seconds of each test that do not count against the wall limit of the tests behind it.
IDLE_SECONDS = 1.0
# Most threads of a program, its main thread included.
MAX_THREADS = 64
# Seconds between two counts of a program's threads, where the zygote has to count them.
COUNT_EVERY = 0.02
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
# Programs running at once under this caller. The ranks of a node share its cores.
SLOTS = max(2, 2 * CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
# User and group id of the zygote and its leaves if the caller is root.
NOBODY = 65534
# Third-party packages that a program may import, if the caller has them.
PACKAGES = ("numpy", "numpy.libs", "sortedcontainers")
# Exit code of a leaf that ran into its memory limit.
OUT_OF_MEMORY = 86


# ---- 1. Caller -----------------------------------------------------------------------------------

# process: the zygote's Popen. control: the caller's end of the socket that carries fork requests.
Zygote = collections.namedtuple("Zygote", "process control")
# sock: the caller's end of the leaf's socket. process: the Popen of its zygote. pid: the leaf's.
# output: the memory file that is the leaf's stdout and outlives it. is_call: a call, not a script?
# most_bytes: of its reply.
Leaf = collections.namedtuple("Leaf", "sock process pid output is_call most_bytes")
# A program and its limits. source: bytes. timeout: CPU seconds of one test.
Job = collections.namedtuple("Job", "source timeout memory_mb")


class Slots:
    """A semaphore whose waiters go in the order in which they came; used as `with slots:`."""

    def __init__(self, number):
        self.free = number
        self.lock = threading.Lock()
        # One locked lock for each waiter, the first comer's first. Unlocking it hands a slot over.
        self.waiters = collections.deque()

    def __enter__(self):
        with self.lock:
            if self.free > 0:
                self.free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self.waiters.append(turn)
        try:
            turn.acquire()
        except BaseException:
            # Interrupted: leave the queue, or pass on the slot that has just been handed over.
            with self.lock:
                if turn in self.waiters:
                    self.waiters.remove(turn)
                    raise
            self.__exit__()
            raise

    def __exit__(self, *_):
        with self.lock:
            if self.waiters:
                self.waiters.popleft().release()
            else:
                self.free += 1


# The lock guards _zygote, _mode and _retired.
_lock = threading.Lock()
_slots = Slots(SLOTS)
# The current Zygote, or None.
_zygote = None
# How leaves are held, from the strongest mode to the weakest. "full": namespaces. "landlock":
# neither namespaces nor a root of their own. "bare": no Landlock either. A host that refuses one
# gets the next.
MODES = ("full", "landlock", "bare")
_mode = "full"
# {mode: why the host refused it}
_refusals = {}
_announced = False
# Popens of earlier zygotes that have not been reaped yet.
_retired = []


def run(source, stdin="", call=None, timeout=6.0, memory_mb=1024):
    """Run one program on one input and return its Result. Thread-safe.

    call: (name of a function or Solution method, [JSON arguments]), or None to run a script.
    """
    test = stdin if call is None else call
    return next(run_each(source, [test], timeout, memory_mb))


def run_each(source, tests, timeout=6.0, memory_mb=1024, sizes=None):
    """Yield one Result per test: all stdin strings, or all (name, [arguments]) calls.

    Close the generator to stop early. Thread-safe; blocks while SLOTS other programs run.
    timeout: CPU seconds per test. sizes: bytes of the expected reply of each test, if known. A
    reply that is much longer (REPLY_FACTOR) gets status "output" and is not read.
    """
    if MACHINE is None:
        raise RuntimeError("the sandbox needs Linux on x86_64 or aarch64")
    job = Job(source.encode("utf-8", "replace"), timeout, memory_mb)
    sizes = iter(sizes or ())
    wall_left = WALL_FACTOR * timeout + WALL_EXTRA
    with _slots:
        for test in tests:
            most_bytes = OUTPUT_BYTES
            size = next(sizes, None)
            if size is not None:
                most_bytes = min(most_bytes, REPLY_FACTOR * size + REPLY_EXTRA)
            if wall_left > 0:
                result, waited = _run_test(job, test, wall_left, most_bytes)
            else:
                result, waited = Result("timeout", "", None, 0.0), 0.0
            # Only what no computing explains counts against the tests that follow.
            wall_left -= max(0.0, waited - WALL_FACTOR * result.seconds - IDLE_SECONDS)
            yield result


def _run_test(job, test, wall_s, most_bytes):
    """Run one test. Returns its Result and the wall seconds that the program took."""
    for tries in range(3):
        zygote = _zygote
        leaf = None
        try:
            leaf = _start_leaf(job, test, wall_s, most_bytes)
            started = time.monotonic()
            result = _finish(leaf, job.timeout)
            return result, time.monotonic() - started
        except (OSError, EOFError):
            # No program can cause this (see _finish). Try again with a fresh zygote.
            _retire(zygote)
            time.sleep(0.1 * tries)
        finally:
            _hang_up(leaf)
    return Result("infra", "", None, 0.0), 0.0


def close():
    """End this process's zygote and everything under it; the next run() starts a new one."""
    _retire(_zygote)
    for process in _retired:
        process.wait()
    _retired.clear()


def killable(function, limit_s, wall_s=None):
    """Return call(*args), which runs function(*args) in a child process that can be killed.

    call returns None if the child used more than limit_s CPU seconds or died. After wall_s seconds
    of waiting it raises TimeoutError, since then the machine is to blame; without wall_s it waits
    limit_s seconds and returns None. Every calling thread has its own child, forked by call.start()
    (best before a model exists) or by the first call, and reused.
    This is for our own code on hostile input (mathrl.py: sympy on any LaTeX), hence no namespaces.
    """
    import multiprocessing  # imported here because no leaf wants it

    # The calling thread's own pipe, child (its pid) and owner (the pid of the process that forked).
    mine = threading.local()
    forking = threading.Lock()
    # The parent's ends of the pipes of all threads.
    parent_ends = []

    def start():
        """Fork the calling thread's child."""
        with forking:
            mine.pipe, child_end = multiprocessing.Pipe()
            parent_ends.append(mine.pipe)
            mine.owner = os.getpid()
            mine.child = os.fork()
            if mine.child == 0:
                try:
                    # The child keeps only the far end of its own pipe, so that either side sees
                    # the other one die.
                    for end in parent_ends:
                        end.close()
                    _serve_calls(function, limit_s, child_end, mine.owner)
                finally:
                    os._exit(0)
            child_end.close()

    def replace_child():
        """Kill the thread's child and fork another. Returns the exit code, -N for signal N."""
        os.kill(mine.child, signal.SIGKILL)
        _, wait_status = os.waitpid(mine.child, 0)
        mine.pipe.close()
        parent_ends.remove(mine.pipe)
        start()
        return os.waitstatus_to_exitcode(wait_status)

    def call(*args):
        # Start a child at this thread's first call, also in a process forked from the owner.
        if getattr(mine, "owner", None) != os.getpid():
            start()
        for _ in range(2):
            try:
                mine.pipe.send(args)
                if not mine.pipe.poll(wall_s or limit_s):
                    raise TimeoutError
                return mine.pipe.recv()
            except TimeoutError:
                late = True
            except (EOFError, OSError):  # the child died
                late = False
            exit_code = replace_child()
            if late and wall_s:
                raise TimeoutError(f"no answer from a child process after {wall_s} s")
            if late or exit_code not in (-signal.SIGKILL, 0):
                return None
            # Somebody killed the child (SIGKILL), or it had grown and left (0). Neither is the
            # input's doing: try once more.
        return None

    call.start = start
    return call


def _serve_calls(function, limit_s, pipe, parent):
    """Answer calls in a child of killable() until the parent dies or this child has grown too big.

    pipe: the child's end. parent: the parent's pid.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # At most 2 GiB more than now. A child that has grown by 1 GiB leaves after its answer.
    most_bytes = _address_space() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    # Polling for a second at a time lets an orphan end by itself, at the latest after a second.
    while os.getppid() == parent and _address_space() < most_bytes - (1 << 30):
        if pipe.poll(1):
            args = pipe.recv()  # EOFError if the parent has gone
            # The timer's signal has its default action: it ends even a hang in C, whether the
            # parent still lives or not.
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            result = function(*args)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send(result)


def _address_space():
    """Bytes of address space that this process uses now."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    return pages * resource.getpagesize()


def load_json(text):
    """json.loads, but integers may have MAX_DIGITS digits instead of Python's 4,300."""
    try:
        return json.loads(text)
    except ValueError:
        # No JSON, or a long integer. The reader with a function of its own is slower.
        return json.loads(text, parse_int=_long_int)


def _long_int(text):
    """int(text), in pieces that Python takes."""
    if len(text) > MAX_DIGITS:
        raise ValueError("an integer of too many digits")
    digits = text.removeprefix("-")
    value = 0
    for start in range(0, len(digits), DIGITS_AT_ONCE):
        piece = digits[start : start + DIGITS_AT_ONCE]
        value = value * 10 ** len(piece) + int(piece)
    return value if digits == text else -value


def dump_json(value):
    """json.dumps of a value made of JSON types, whose integers may have any number of digits."""
    try:
        return json.dumps(value)
    except ValueError:
        pass  # there is a long integer in it
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(dump_json, value))}]"
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(key))}: {dump_json(item)}" for key, item in value.items()]
        return f"{{{', '.join(pairs)}}}"
    # An integer, in pieces that Python takes. The last piece comes first.
    pieces = []
    rest = abs(value)
    while rest:
        rest, piece = divmod(rest, 10**DIGITS_AT_ONCE)
        pieces.append(str(piece).zfill(DIGITS_AT_ONCE))
    digits = "".join(reversed(pieces)).lstrip("0")
    return digits if value > 0 else f"-{digits}"


def _start_leaf(job, test, wall_s, most_bytes):
    """Start a program on its stdin or for its call. Any error raised here is infrastructure."""
    global _zygote
    is_call = not isinstance(test, str)
    output = os.memfd_create("output")
    ours, theirs = socket.socketpair()
    try:
        # Hand the leaf's end of the socket and its stdout to the zygote ("f": fork).
        with _lock, theirs:
            if _zygote is None or _zygote.process.poll() is not None:
                _zygote = _start_zygote()
            process, control = _zygote
            socket.send_fds(control, [b"f"], [theirs.fileno(), output])
        ours.settimeout(30)
        # The leaf answers "r" (ready) and its pid.
        ready, pid = struct.unpack("!cI", _read(ours.recv, 5))
        if ready != b"r":
            raise EOFError("a leaf could not be set up")
        # Send three frames, each with its length in front: settings, source, input.
        if is_call:
            test_bytes = dump_json(list(test)).encode()
        else:
            test_bytes = test.encode("utf-8", "replace")
        settings = json.dumps([is_call, job.memory_mb]).encode()
        for frame in (settings, job.source, test_bytes):
            ours.sendall(struct.pack("!I", len(frame)) + frame)
        ours.settimeout(wall_s)
    except BaseException:
        ours.close()
        os.close(output)
        raise
    return Leaf(ours, process, pid, output, is_call, most_bytes)


def _finish(leaf, timeout):
    """Wait for a leaf just started and return its Result. Raises only if the zygote is gone."""
    try:
        seconds = _wait(leaf, timeout)
        if seconds:
            return Result("timeout", "", None, seconds)
        # "v" (value): the leaf answers its call. "e" (end): the zygote says how the leaf ended.
        if leaf.sock.recv(1) == b"v":
            seconds = _cpu_seconds(leaf)
            (size,) = struct.unpack("!I", _read(leaf.sock.recv, 4))
            if size > leaf.most_bytes:
                return Result("output", "", None, seconds)
            value = load_json(_read(leaf.sock.recv, size))
            return Result("ok", "", value, seconds)
        wait_status, seconds = struct.unpack("!id", _read(leaf.sock.recv, 12))
    except TimeoutError:
        return Result("timeout", "", None, 0.0)
    except (ValueError, RecursionError):
        # Not JSON. _answer sends only JSON, so the program wrote to the socket itself.
        return Result("crash", "", None, 0.0)
    except (OSError, EOFError):
        # The line was cut without a word from the zygote. Is the zygote gone?
        time.sleep(0.05)
        if leaf.process.poll() is not None:
            raise
        # It is alive, so the program cut the line.
        return Result("crash", "", None, 0.0)
    return _result_of_end(leaf, wait_status, seconds, timeout)


def _result_of_end(leaf, wait_status, seconds, timeout):
    """Result of a leaf that ended without answering a call. seconds: its CPU time."""
    exit_code = os.waitstatus_to_exitcode(wait_status)
    size = os.fstat(leaf.output).st_size
    stdout = ""
    if size >= leaf.most_bytes:
        status = "output"
    elif exit_code == OUT_OF_MEMORY:
        # It met this limit first, however long it then took to let its memory go.
        status = "memory"
    elif seconds > timeout:
        status = "timeout"
    elif exit_code == -signal.SIGKILL:
        # The host's memory is full, or the program has too many threads. A program can also bring
        # SIGKILL on itself, by RLIMIT_CPU.
        status = "memory"
    elif exit_code != 0 or leaf.is_call:
        # A call has to end with a value.
        status = "crash"
    else:
        status = "ok"
        stdout = os.pread(leaf.output, size, 0).decode("utf-8", "replace")
    return Result(status, stdout, None, seconds)


def _wait(leaf, timeout):
    """Wait until the leaf or the zygote has something to say, or a limit is passed.

    Returns 0.0, or the CPU seconds at which a limit was passed (more than 0).
    """
    start = time.monotonic()
    poll = select.poll()
    poll.register(leaf.sock, select.POLLIN)
    # Look again when the CPU time that is left may be used up. One thread needs at least as much
    # wall time for it.
    left = timeout
    while not poll.poll(1000 * left + 1):  # milliseconds
        used = _cpu_seconds(leaf)
        waited = time.monotonic() - start
        left = min(timeout - used, leaf.sock.gettimeout() - waited)
        if left <= 0:
            return max(used, 1e-9)
    return 0.0


def _cpu_seconds(leaf):
    """CPU time of a running leaf, 0.0 if it has ended.

    The kernel has a CPU clock per process; its number is made as in clock_getcpuclockid(3).
    """
    try:
        return time.clock_gettime(~leaf.pid << 3 | 2)
    except OSError:
        return 0.0


def _hang_up(leaf):
    """Close the caller's end: the zygote sees it and kills the leaf."""
    if leaf is not None:
        try:
            # A shutdown arrives even if a forked child holds a copy of the socket.
            leaf.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        leaf.sock.close()
        os.close(leaf.output)


def _start_zygote():
    """Start a Zygote in the best mode that this host allows."""
    global _mode
    while True:
        if _mode == "bare" and os.environ.get("SANDBOX_ALLOW_WEAK") != "1":
            _refuse()
        process, ours = _launch_zygote()
        ours.settimeout(60)
        # "ready", "ready" and what programs lack, or the reason of a refusal.
        try:
            answer = ours.recv(1000).decode("utf-8", "replace")
        except OSError:
            process.kill()
            raise
        if answer.startswith("ready"):
            _announce(answer[len("ready ") :])
            return Zygote(process, ours)
        ours.close()
        killed_by_seccomp = process.wait() == -signal.SIGSYS
        if _mode == "full" and killed_by_seccomp:
            answer = answer or "refused by seccomp"
        refused = _mode == "full" and answer or answer.startswith("no Landlock")
        if not refused:
            # An accident.
            raise OSError(f"the zygote did not start: {answer}")
        # The host refuses this mode. Try the next one.
        _refusals[_mode] = answer
        _mode = MODES[MODES.index(_mode) + 1]


def _refuse():
    """End the script on a host that cannot hold untrusted code well."""
    from lib.guard import fail  # imported here because no leaf wants torch

    namespaces = _refusals.get("full", "not tried")
    fail(
        f"the sandbox has neither namespaces ({namespaces}) nor Landlock on this host to hold "
        "untrusted code; SANDBOX_ALLOW_WEAK=1 runs it all the same."
    )


def _announce(lacks):
    """Say once, on rank 0, that leaves are not held by namespaces. lacks: what programs lack."""
    global _announced
    if _mode == "full" or _announced or os.environ.get("RANK", "0") != "0":
        return
    _announced = True
    reasons = [_refusals.get("full", "not tried")]
    if _mode == "bare":
        reasons.append("no Landlock either: programs can open no file")
    if lacks:
        reasons.append(lacks)
    reasons = "; ".join(reasons)
    print(
        f"sandbox: DEGRADED, no namespaces for untrusted code ({reasons})",
        file=sys.stderr,
    )


def _launch_zygote():
    """Start this file as a zygote in _mode; its Popen and the caller's end of its socket."""
    # Imported here because no leaf wants them.
    import importlib.util
    import subprocess

    packages = ""  # the folder that holds PACKAGES
    spec = importlib.util.find_spec(PACKAGES[0])
    if spec and spec.origin:
        packages = os.path.dirname(os.path.dirname(spec.origin))
    environment = {
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    # No user site, no site module, no .pyc files, no folder of the script on sys.path.
    flags = ["-s", "-S", "-B", "-P"]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    arguments = [str(theirs.fileno()), _mode, packages]
    process = subprocess.Popen(
        [sys.executable, *flags, os.path.abspath(__file__), *arguments],
        env=environment,
        cwd="/",
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    return process, ours


def _retire(zygote):
    """Let go of a zygote if it is the current one; it ends when its last program has ended."""
    global _zygote
    with _lock:
        if zygote is not None and zygote is _zygote:
            _zygote = None
            zygote.control.close()
            _retired.append(zygote.process)
        _retired[:] = [process for process in _retired if process.poll() is None]


def _forget():
    """After a fork of the caller: the zygote is the parent's, this process gets its own."""
    global _zygote, _lock, _slots, _retired
    if _zygote is not None:
        _zygote.control.close()
        _zygote.process.returncode = 0  # not our child: never wait for it
    _zygote = None
    _retired = []
    _lock = threading.Lock()
    _slots = Slots(SLOTS)


def _read(read, size):
    """Read exactly `size` bytes with read(size), which may return fewer. EOFError if cut off."""
    parts = []
    while size:
        part = read(min(size, 1 << 20))
        if not part:
            raise EOFError("hung up")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# ---- 2. Zygote -----------------------------------------------------------------------------------

# PyDLL, not CDLL: the interpreter lock stays held across clone().
libc = ctypes.PyDLL(None, use_errno=True)

# Constants of the kernel, under their names in its headers.
CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_THREAD = 0x00010000
CLONE_CHILD_CLEARTID = 0x00200000
CLONE_CHILD_SETTID = 0x01000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2

F_SETOWN = 8
F_SETOWN_EX = 15
FIOSETOWN = 0x8901
SIOCSPGRP = 0x8902
TIOCSTI = 0x5412
TIOCLINUX = 0x541C
SOCK_STREAM = 1
SOCK_NONBLOCK = 0x800
SOCK_CLOEXEC = 0x80000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
PR_GET_TID_ADDRESS = 40

SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_EPERM = 0x00050001
SECCOMP_RET_ENOSYS = 0x00050026
SECCOMP_RET_KILL_PROCESS = 0x80000000

CAPABILITY_VERSION_3 = 0x20080522

# Landlock has no functions in libc. Its system calls have these numbers on every architecture.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1  # a flag: return the version of the interface
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_WRITE_FILE = 0b0010
LANDLOCK_READ_FILE = 0b0100
LANDLOCK_READ_DIR = 0b1000

# The namespaces of every leaf.
LEAF_NAMESPACES = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC

# seccomp knows system calls by their numbers, which differ between architectures. audit_arch is the
# kernel's name of the architecture; column is its place in the tables of calls below.
Machine = collections.namedtuple("Machine", "audit_arch clone clone3 column")
MACHINES = {
    "x86_64": Machine(0xC000003E, clone=56, clone3=435, column=0),
    "aarch64": Machine(0xC00000B7, clone=220, clone3=435, column=1),
}
# This machine's entry, or None where the sandbox cannot run.
MACHINE = MACHINES.get(os.uname().machine) if sys.platform == "linux" else None

# The newest call of Linux 6.10, for which the tables below were made. A leaf may use no newer one:
# libc then does without.
NEWEST_CALL = 462

# System calls that a leaf must not use: (number on x86_64, number on aarch64). None stands where an
# architecture has no such call. This table counts where a leaf sees the host's files. Landlock lets
# these calls through: they change mode, owner, times and size of files by their paths.
REFUSED_BESIDE_LANDLOCK = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "truncate": (76, 45),
}

# This table counts where there is no Landlock: a leaf then can open no path at all, neither a data
# file nor the memory of another process under /proc, and can leave none behind.
REFUSED_WITHOUT_LANDLOCK = {
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "creat": (85, None),
    "uselib": (134, None),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rmdir": (84, None),
}

# Calls that one argument decides: (number on x86_64, number on aarch64, which argument, is the call
# refused for these values or allowed for these alone, values). The kernel reads all these arguments
# as 32 bits.
DECIDED_BY_ARGUMENT = (
    # prlimit64 may change the limits of process 0 alone, which means the calling one.
    (302, 261, 0, "allowed", (0,)),
    # prctl may do all but keep a leaf alive after its zygote, or open its memory to others.
    (157, 167, 0, "refused", (PR_SET_PDEATHSIG, PR_SET_DUMPABLE)),
    # fcntl and ioctl may not choose another process to be signalled, nor type on a terminal.
    (72, 25, 1, "refused", (F_SETOWN, F_SETOWN_EX)),
    (16, 29, 1, "refused", (FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX)),
    # socketpair may make streams, which cannot be sent to another socket's address.
    (
        53,
        199,
        1,
        "allowed",
        (
            SOCK_STREAM,
            SOCK_STREAM | SOCK_CLOEXEC,
            SOCK_STREAM | SOCK_NONBLOCK,
            SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK,
        ),
    ),
)

# This table counts in every mode.
REFUSED_CALLS = {
    # They start processes.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    # They signal, trace, read or regroup other processes.
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # They reach the network, or a socket of the host.
    "socket": (41, 198),
    "bind": (49, 200),
    "connect": (42, 203),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    # They change namespaces and mounts, or open files around them.
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # They hold memory that outlives a process or escapes its limits.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgctl": (71, 187),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # They open large parts of the kernel that no solution needs.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
}

# Every program finds the names of `from M import *` for each of these modules, then the modules
# themselves, these and more, under their own names.
STAR_IMPORTS = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json builtins typing"
)
MORE_IMPORTS = (
    "array cmath contextlib dataclasses decimal enum fractions numbers os queue struct textwrap "
    "threading time traceback"
)
# Modules that programs import themselves. Where they cannot, the zygote does it for them.
USUAL_MODULES = (
    "__future__ abc argparse ast asyncio base64 binascii calendar collections.abc "
    "concurrent.futures csv ctypes difflib email encodings.ascii encodings.latin_1 gc getpass glob "
    "hashlib html inspect locale logging pathlib pickle platform pprint secrets select selectors "
    "shutil signal socket subprocess tempfile timeit unicodedata unittest urllib.parse uuid "
    "warnings weakref zlib"
)


def _checked(result):
    """Return the result of a C call, or raise the OSError that it stands for."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _preload():
    """Import what solutions use, and make the names that they find without an import.

    These names are LiveCodeBench's star imports and the modules. They are builtins here, not names
    of the program: a call finds only a function that the program itself defined or imported.
    """
    prelude = {}
    for name in STAR_IMPORTS.split():
        exec(f"from {name} import *", prelude)  # noqa: S102
    modules = STAR_IMPORTS.split() + MORE_IMPORTS.split()
    exec(f"import {', '.join(modules)}", prelude)  # noqa: S102
    del prelude["__builtins__"]
    # The site module, which is not loaded here, usually adds exit and quit.
    prelude.update(exit=sys.exit, quit=sys.exit)
    vars(builtins).update(prelude)
    sys.argv[:] = ["program.py"]
    sys.modules["sandbox"] = sys.modules["__main__"]
    sys.setrecursionlimit(50_000)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(MAX_DIGITS)


def _preload_for_leaves(packages):
    """Import USUAL_MODULES and PACKAGES, for leaves that cannot import them themselves.

    Without a mount namespace a leaf may be unable to read them: the interpreter can live in a
    folder that only root may enter, and without Landlock no leaf opens any file.
    packages: the folder with PACKAGES, or "".
    """
    statements = [f"import {name}" for name in USUAL_MODULES.split()]
    path = sys.path[:]
    if packages:
        # The star also loads the modules that a package would load later.
        statements += [f"from {name} import *" for name in PACKAGES]
        sys.path.append(packages)
    for statement in statements:
        try:
            exec(statement, {})  # noqa: S102
        except ImportError:
            continue  # this interpreter lacks it, and programs do without
    sys.path[:] = path


def _write_maps(proc, uid, gid):
    """Give this process, in a new user namespace, the one user id 1000. proc: an open /proc."""
    settings = {"setgroups": "deny", "uid_map": f"1000 {uid} 1", "gid_map": f"1000 {gid} 1"}
    for name, text in settings.items():
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)


def _mount(source, target, kind, flags, data=None):
    _checked(libc.mount(source.encode(), target.encode(), kind, flags, data))


def _isolate(packages):
    """Give this zygote an empty network and a read-only root that holds libraries only.

    packages: the folder with PACKAGES, or "". Returns an open /proc of the host, because the new
    root has none.
    """
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    uid = os.geteuid()
    gid = os.getegid()
    # Root may unshare as it is. Everybody else needs a user namespace first.
    new_user = CLONE_NEWUSER if uid else 0
    _checked(libc.unshare(CLONE_NEWNS | CLONE_NEWNET | new_user))
    if uid:
        _write_maps(proc, uid, gid)

    stdlib = os.path.dirname(os.__file__)
    places = _visible_places(stdlib, packages)
    # Open all of them now: the new root is built in /tmp, and its mount hides whatever lives there,
    # perhaps this project.
    opened = {path: os.open(path, os.O_PATH) for path in places if not os.path.islink(path)}
    folders = {path for path in places if os.path.isdir(path)}
    root = "/tmp"
    # No mount made from here on reaches the host.
    _mount("none", "/", None, MS_PRIVATE | MS_REC)
    _mount("tmpfs", root, b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for path, place in places.items():
        target = root + place
        if os.path.exists(target):
            continue  # a library folder inside another one
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if path in opened:
            _bind(opened[path], target, path in folders)
        else:
            os.symlink(os.readlink(path), target)
    _make_read_only(root, proc)
    # Hide the installed packages with an empty folder.
    if os.path.isdir(f"{root}{stdlib}/site-packages"):
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV
        _mount("tmpfs", f"{root}{stdlib}/site-packages", b"tmpfs", flags)
    os.mkdir(f"{root}/tmp")  # every leaf mounts its own here
    os.symlink("/tmp/stdin", f"{root}/dev/stdin")
    _mount("none", root, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for fd in opened.values():
        os.close(fd)

    # Make it the root, and let go of the host's files.
    os.chdir(root)
    _checked(libc.pivot_root(b".", b"."))
    _checked(libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    sys.path.append("/packages")
    return proc


def _visible_places(stdlib, packages):
    """What an isolated zygote sees of the host, {path on the host: place under the new root}."""
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/null", "/dev/urandom", stdlib]
    places = {path: path for path in libraries}
    if packages:
        for name in PACKAGES:
            places[f"{packages}/{name}"] = f"/packages/{name}"
    return {path: place for path, place in places.items() if os.path.exists(path)}


def _bind(fd, target, is_folder):
    """Show an open file or folder of the host at a path under the new root.

    The host may have mounts of its own below the folder (GPU containers mount driver libraries).
    They come along: the kernel lets nobody but root bind a folder without them.
    """
    if is_folder:
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    _mount(f"/proc/self/fd/{fd}", target, None, MS_BIND | MS_REC)


def _make_read_only(root, proc):
    """Make every mount below the new root read-only. proc: an open /proc."""
    with open(os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc), "rb") as file:
        places = [line.split()[4] for line in file]
    # The kernel writes blanks and backslashes in paths as octal numbers, such as \040.
    places = [place.decode("unicode_escape").encode("latin-1") for place in places]
    places = [place for place in places if place.startswith(root.encode() + b"/")]
    for place in places:
        try:
            # A second mount makes it read-only. The kernel lets no one drop these flags if the
            # host's own mount has them.
            locked = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME
            kept = os.statvfs(place).f_flag & locked
            flags = MS_BIND | MS_REMOUNT | MS_RDONLY | kept
            _checked(libc.mount(b"none", place, None, flags, None))
        except OSError:
            continue  # perhaps another mount hides this one
    for place in places:
        try:
            writable = not os.statvfs(place).f_flag & MS_RDONLY
        except OSError:
            continue  # nobody gets there
        if writable:
            raise OSError(f"{os.fsdecode(place)} cannot be made read-only")


def _landlock_ruleset(packages):
    """Landlock's rules for leaves without a mount namespace, as an open ruleset.

    They leave the libraries readable and refuse all other files. packages: the folder with
    PACKAGES, or "". Raises OSError("no Landlock...") where the kernel has none.
    """
    abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 1:
        raise OSError("no Landlock on this host")

    # Refuse all that this version of the interface can refuse. It knows 13 rights to files in
    # version 1; versions 2, 3 and 5 each added one.
    num_rights = 13
    for version in (2, 3, 5):
        if abi >= version:
            num_rights += 1
    file_rights = (1 << num_rights) - 1
    # Version 4 added a field for the network (bind, connect), version 6 one for scopes (abstract
    # sockets, signals).
    network_rights = 3 if abi >= 4 else 0
    scopes = 3
    if abi >= 6:
        size = 24
    elif abi >= 4:
        size = 16
    else:
        size = 8
    attributes = struct.pack("QQQ", file_rights, network_rights, scopes)
    ruleset = _checked(libc.syscall(LANDLOCK_CREATE_RULESET, attributes, size, 0))

    # Allow to read folders, and to read and write the two devices.
    places = [os.path.dirname(os.__file__), "/usr/lib", "/lib", "/dev/null", "/dev/urandom"]
    if packages:
        places += [f"{packages}/{name}" for name in PACKAGES]
    for path in places:
        if not os.path.exists(path):
            continue
        fd = os.open(path, os.O_PATH)
        allowed = LANDLOCK_READ_FILE
        if os.path.isdir(path):
            allowed |= LANDLOCK_READ_DIR
        elif path.startswith("/dev/"):
            allowed |= LANDLOCK_WRITE_FILE
        rule = struct.pack("=Qi", allowed, fd)
        _checked(libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0))
        os.close(fd)
    return ruleset


# What the zygote prepares for its leaves. proc: an open /proc, to make leaves process 1 of new
# namespaces (mode "full"); None in the other modes. ruleset: Landlock's rules, or None. rows: the
# filter for system calls, in memory that C can read. counted: does the zygote have to count the
# threads of its leaves?
Cell = collections.namedtuple("Cell", "proc ruleset rows counted")


def _zygote_main(control_fd, mode, packages):
    """Isolate this process, report to the caller, then serve."""
    global BASE_BYTES
    control = socket.socket(fileno=control_fd)
    if mode != "full":
        _preload_for_leaves(packages)
    BASE_BYTES = _address_space() + (48 << 20)
    _preload()
    try:
        # If the host runs out of memory, programs are killed first, and not the trainer.
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # /proc is read-only here
    # Hard limits, which no program can raise.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    # Deep recursion through C needs a large stack.
    _lower_limit(resource.RLIMIT_STACK, 120 << 20)
    lacks = ""
    try:
        # Nothing below this process can gain privileges by an exec.
        _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        proc = _isolate(packages) if mode == "full" else None
        ruleset = _landlock_ruleset(packages) if mode == "landlock" else None
        if os.geteuid() == 0:
            # Root escapes limits, and the caller is root too: become somebody else.
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        # In namespaces, every leaf has to write its user id into /proc/self, which belongs to root
        # unless this process is dumpable. Without them, programs of the same user would then be
        # able to open the memory of this process.
        libc.prctl(PR_SET_DUMPABLE, int(mode == "full"), 0, 0, 0)
        if mode == "landlock" and not os.access(os.__file__, os.R_OK):
            folder = os.path.dirname(os.__file__)
            lacks = f"programs can import the usual modules only: {folder} is closed to them"
        code = _seccomp_filter(MACHINE, *REFUSED_IN_MODE[mode])
        rows = (ctypes.c_char * len(code)).from_buffer_copy(code)
        counted = mode != "full" or not _threads_are_per_namespace()
        cell = Cell(proc, ruleset, rows, counted)
        # Fork a leaf that ends at once, to see whether this host lets us.
        pid = _checked(_fork_leaf(-1, -1, cell))
        _, wait_status = os.waitpid(pid, 0)
        if wait_status != 0:
            raise OSError("a leaf could not be set up")
    except OSError as error:
        control.send(str(error).encode())
        return
    # Children share the pages of all objects made so far: the collector leaves them alone.
    gc.collect()
    gc.freeze()
    control.send(f"ready {lacks}".strip().encode())
    _serve(control, cell)


def _lower_limit(limit, value):
    """Set the soft limit of this process to value, or to its hard limit if that is lower."""
    _, hard = resource.getrlimit(limit)
    unlimited = hard < 0
    soft = value if unlimited else min(value, hard)
    resource.setrlimit(limit, (soft, hard))


# A leaf that runs. sock: the zygote's copy of the leaf's end of its socket. pidfd: becomes readable
# when the leaf ends.
RunningLeaf = collections.namedtuple("RunningLeaf", "pid sock pidfd")


def _serve(control, cell):
    """Fork a leaf for each pair of descriptors received from the caller.

    Ends when the caller is gone and no leaf is left.
    """
    # Every running leaf is here twice: under the descriptor of its socket, until the caller hangs
    # up, and under its pidfd.
    leaves = {}
    listening = True
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while leaves or listening:
        if cell.counted and leaves:
            ready = {fd for fd, _ in poll.poll(1000 * COUNT_EVERY)}
            for fd, leaf in leaves.items():
                if fd == leaf.pidfd and _num_threads(leaf.pid, cell.proc) > MAX_THREADS:
                    os.kill(leaf.pid, signal.SIGKILL)
        else:
            ready = {fd for fd, _ in poll.poll()}
        for fd in ready & leaves.keys():
            if fd not in leaves:
                continue  # closed a moment ago, together with its pidfd
            leaf = leaves.pop(fd)
            poll.unregister(fd)
            if fd == leaf.pidfd:
                _reap(leaf)
                if leaf.sock.fileno() in leaves:
                    del leaves[leaf.sock.fileno()]
                    poll.unregister(leaf.sock)
                leaf.sock.close()
                os.close(leaf.pidfd)
            else:  # the caller hung up
                os.kill(leaf.pid, signal.SIGKILL)
        # Requests come last, because a new leaf may get the number of a descriptor just closed.
        if control.fileno() in ready:
            message, fds, *_ = socket.recv_fds(control, 1, 2)
            if message:
                leaf = _new_leaf(*fds, cell)
                if leaf is not None:
                    leaves[leaf.sock.fileno()] = leaf
                    leaves[leaf.pidfd] = leaf
                    poll.register(leaf.sock, 0)  # 0: report only that the caller hung up
                    poll.register(leaf.pidfd, select.POLLIN)
            else:  # the caller is gone
                poll.unregister(control)
                listening = False


def _num_threads(pid, proc):
    """Threads of a process, 0 if it cannot be told. proc: an open /proc, or None."""
    try:
        path = f"/proc/{pid}/stat" if proc is None else f"{pid}/stat"
        fd = os.open(path, os.O_RDONLY, dir_fd=proc)
        line = os.read(fd, 4096)
        os.close(fd)
        # The name of the process comes first, in brackets, and may hold anything.
        return int(line.rpartition(b")")[2].split()[17])
    except OSError:
        return 0


def _threads_are_per_namespace():
    """True if the kernel's limit of processes counts those of the leaf's user namespace alone.

    Before Linux 5.14 it counts all processes of the user, whatever their namespace.
    """
    major, minor = re.match(r"(\d+)\.(\d+)", os.uname().release).groups()
    return (int(major), int(minor)) >= (5, 14)


def _reap(leaf):
    """Collect a leaf that ended; tell the caller how it ended and its CPU seconds ("e": end)."""
    _, wait_status, usage = os.wait4(leaf.pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    try:
        leaf.sock.send(struct.pack("!cid", b"e", wait_status, seconds), socket.MSG_DONTWAIT)
    except OSError:  # nobody listens
        pass


def _new_leaf(sock_fd, output_fd, cell):
    """Fork a leaf on the caller's descriptors; None if that failed."""
    pid = _fork_leaf(sock_fd, output_fd, cell)
    os.close(output_fd)
    sock = socket.socket(fileno=sock_fd)
    if pid < 0:
        sock.close()  # the caller, waiting for "r", reads the end of the stream
        return None
    return RunningLeaf(pid, sock, os.pidfd_open(pid))


def _fork(namespaces):
    """Fork by the bare system call; returns as os.fork() does, or -1 on failure.

    os.fork() runs at-fork hooks, whose page faults cost 0.5 ms. Going without them is safe because
    no process below the caller has threads, and the kernel updates glibc's copy of the thread id.
    """
    # Where glibc keeps the id of this thread.
    tid_address = ctypes.c_void_p()
    tid_known = libc.prctl(PR_GET_TID_ADDRESS, ctypes.byref(tid_address), 0, 0, 0) == 0
    if not tid_known and not namespaces:
        return os.fork()
    flags = namespaces | signal.SIGCHLD
    if tid_known:
        # Set the id in the child, clear it at its end.
        flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID
    # The address stands twice because machines differ in the order of the last two arguments. The
    # other one (tls) is ignored.
    return libc.syscall(MACHINE.clone, flags, 0, 0, tid_address, tid_address)


def _fork_leaf(sock, output, cell):
    """Fork a leaf and return its pid, or -1.

    sock, output: descriptors for _leaf_main; sock -1: end at once, with exit code 0 if all is well.
    """
    uid = os.geteuid()
    gid = os.getegid()
    isolated = cell.proc is not None
    pid = _fork(LEAF_NAMESPACES if isolated else 0)
    if pid == 0:
        exit_code = 1
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # die with the zygote
            if isolated:
                _write_maps(cell.proc, uid, gid)
                options = b"nr_inodes=256,size=%d" % (2 * OUTPUT_BYTES)
                _mount("tmpfs", "/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, options)
                # This process calls itself 1. The host's /proc has the pid that the caller sees.
                visible_pid = int(os.readlink("self", dir_fd=cell.proc))
            else:
                visible_pid = os.getpid()
            # Every leaf gets Landlock's rules for itself, so that it can reach no other leaf.
            if cell.ruleset is not None:
                _checked(libc.syscall(LANDLOCK_RESTRICT_SELF, cell.ruleset, 0))
            if sock >= 0:
                exit_code = _leaf_main(sock, output, visible_pid, cell)
            else:
                exit_code = 0
        finally:
            os._exit(exit_code)
    return pid


# ---- 3. Leaf -------------------------------------------------------------------------------------

# The leaf's socket to the caller, until it is closed.
SOCKET_FD = 3
# A leaf's memory limit is memory_mb on top of this: what the interpreter holds, and 48 MiB.
BASE_BYTES = 48 << 20


def _leaf_main(sock, output, pid, cell):
    """Become the program: take over descriptors and limits, seal this process, run the program.

    pid: as the caller sees it. Returns the exit code.
    """
    isolated = cell.proc is not None
    os.dup2(output, 1)
    os.dup2(sock, SOCKET_FD)
    os.closerange(SOCKET_FD + 1, 1 << 12)
    os.write(SOCKET_FD, struct.pack("!cI", b"r", pid))  # "r": ready
    is_call, memory_mb = json.loads(_receive())
    source = _receive()
    test = _receive()
    if is_call:
        call = CALL_DECODER.decode(test.decode())
        stdin = b""
    else:
        call = None
        stdin = test
    del test

    # Put stdin into a file: programs may open /dev/stdin or seek.
    if isolated and len(stdin) > OUTPUT_BYTES:
        options = b"size=%d" % (len(stdin) + OUTPUT_BYTES)
        _mount("none", "/tmp", None, MS_REMOUNT | MS_NOSUID | MS_NODEV, options)
    if isolated:
        stdin_fd = os.open("/tmp/stdin", os.O_CREAT | os.O_RDWR)
    else:
        stdin_fd = os.memfd_create("stdin")
    with open(stdin_fd, "wb", closefd=False) as file:
        file.write(stdin)
    del stdin
    os.lseek(stdin_fd, 0, os.SEEK_SET)
    os.dup2(stdin_fd, 0)
    os.close(stdin_fd)
    if is_call:
        os.dup2(2, 1)  # nobody reads what a function prints
    else:
        os.close(SOCKET_FD)  # a program without the socket cannot write to it
    os.chdir("/tmp" if isolated else "/")

    memory_bytes = BASE_BYTES + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if not cell.counted:
        resource.setrlimit(resource.RLIMIT_NPROC, (MAX_THREADS, MAX_THREADS))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT_BYTES, OUTPUT_BYTES))
    _seal(cell.rows)
    random.seed(0)
    return _run_program(source, call)


def _run_program(source, call):
    """Run a script to its end, or define its functions and answer the call. Returns the exit code.

    call: [name, arguments], or None.
    """
    # The program is a module of its own, which so far holds no name that a call could find.
    program = types.ModuleType("__main__")
    sys.modules.update(__main__=program, solution=program)
    scope = vars(program)
    scope.update(__name__="solution" if call else "__main__", __file__="program.py")
    scope["__builtins__"] = builtins
    try:
        try:
            exec(compile(source, "<program>", "exec", dont_inherit=True), scope)  # noqa: S102
            if call:
                return _answer(scope, *call)
        except SystemExit:
            if call:
                return 1
        # End as the interpreter does. The main thread may end before the thread that does the work.
        threading._shutdown()
        atexit._run_exitfuncs()
        _flush(sys.stdout)
        _flush(sys.__stdout__)
        del program, scope
        _let_go()
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:  # noqa: BLE001
        return 1
    return 0


def _flush(stream):
    """Write what a stream still holds."""
    try:
        stream.flush()
    except ValueError:  # it is closed, or the program put another text layer on its buffer
        pass


def _let_go():
    """Let the program's module go, as the interpreter does at its end.

    Files that the program left open write what they still hold, and its __del__ methods run.
    """
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
    # The collector below may close a file before the buffer in front of it. So every text layer
    # writes first, then every buffer. (The collector does not list the objects of the zygote.)
    objects = gc.get_objects()
    for layer in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom):
        for stream in [item for item in objects if issubclass(type(item), layer)]:
            try:
                _flush(stream)
            except OSError:  # its descriptor was closed
                pass
    objects = stream = None
    for name in ("__main__", "solution"):
        sys.modules.pop(name, None)
    gc.collect()
    _flush(sys.__stdout__)


def _answer(scope, name, args):
    """Make one call, send its result as JSON ("v": value). Returns the exit code."""
    owner = scope.get("Solution")
    if hasattr(owner, name):
        function = getattr(owner(), name)
    else:
        function = scope[name]
    # numpy's scalars and arrays have tolist(); other types that JSON lacks make this a crash.
    result = json.dumps(function(*args), default=lambda item: item.tolist()).encode()
    rest = memoryview(b"v" + struct.pack("!I", len(result)) + result)
    while rest:
        written = os.write(SOCKET_FD, rest)
        rest = rest[written:]
    return 0


def decode_keys(pairs):
    """Give a dictionary of a call its keys back: {"": [[1, 2]]} is {1: 2}.

    JSON has text as its only keys. Any other dictionary stays as it is.
    """
    if pairs.keys() != {""}:
        return pairs
    try:
        return dict(pairs[""])
    except (TypeError, ValueError):
        return pairs


# Made once, because a leaf would pay for it with page faults.
CALL_DECODER = json.JSONDecoder(object_hook=decode_keys)


def _receive():
    """Read one frame from the caller: its length, then its bytes."""

    def read(size):
        return os.read(SOCKET_FD, size)

    (size,) = struct.unpack("!I", _read(read, 4))
    return _read(read, size)


def _seal(rows):
    """Drop every capability, then refuse system calls for good. rows: the filter."""
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    _checked(libc.capset(header, bytes(24)))
    # A crash then writes no core, and no other process may open this one's memory.
    _checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    # The kernel's struct sock_fprog: the number of rows (8 bytes each), and where they are.
    program = struct.pack("HxxxxxxQ", len(rows) // 8, ctypes.addressof(rows))
    _checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0))


# Operations of classic BPF: load, if_equal, if_at_least, if_any_bit, end. A jump skips so many rows
# if its test holds, so many (at most 255) if not.
BPF_OPERATIONS = (0x20, 0x15, 0x35, 0x45, 0x06)


def _seccomp_filter(machine, *refused_calls):
    """The leaf's rules for system calls: a program in classic BPF, as bytes.

    refused_calls: tables of calls, as REFUSED_CALLS. Allowed is every call except these, those that
    start a process, the wrong arguments in DECIDED_BY_ARGUMENT (all get EPERM), and calls newer
    than NEWEST_CALL (they get ENOSYS, as on an older kernel). clone3 gets ENOSYS, too, so that libc
    falls back to clone, whose flags BPF can read.
    """
    load, if_equal, if_at_least, if_any_bit, end = BPF_OPERATIONS
    # Offsets in the kernel's struct seccomp_data. An argument is 64 bits, of which the lower half
    # counts here.
    call_number, architecture, arguments = 0, 4, 16

    # One row: (operation, rows to skip if true, rows to skip if false, constant).
    rows = [
        # Kill a process that switches to another architecture, whose numbers mean other calls.
        (load, 0, 0, architecture),
        (if_equal, 1, 0, machine.audit_arch),
        (end, 0, 0, SECCOMP_RET_KILL_PROCESS),
        (load, 0, 0, call_number),
        # On x86_64 every call has an x32 twin with this bit set.
        (if_at_least, 0, 1, 0x40000000),
        (end, 0, 0, SECCOMP_RET_EPERM),
        (if_at_least, 0, 1, NEWEST_CALL + 1),
        (end, 0, 0, SECCOMP_RET_ENOSYS),
        (if_equal, 0, 1, machine.clone3),
        (end, 0, 0, SECCOMP_RET_ENOSYS),
        # clone may start a thread, but no process.
        (if_equal, 0, 4, machine.clone),
        (load, 0, 0, arguments),
        (if_any_bit, 0, 1, CLONE_THREAD),
        (end, 0, 0, SECCOMP_RET_ALLOW),
        (end, 0, 0, SECCOMP_RET_EPERM),
    ]
    for *numbers, argument, rule, values in DECIDED_BY_ARGUMENT:
        if rule == "allowed":
            listed, other = SECCOMP_RET_ALLOW, SECCOMP_RET_EPERM
        else:
            listed, other = SECCOMP_RET_EPERM, SECCOMP_RET_ALLOW
        rows.append((if_equal, 0, len(values) + 3, numbers[machine.column]))
        rows.append((load, 0, 0, arguments + 8 * argument))
        # A listed value jumps over the values behind it, and over the row for all others.
        for i, value in enumerate(values):
            rows.append((if_equal, len(values) - i, 0, value))
        rows.append((end, 0, 0, other))
        rows.append((end, 0, 0, listed))
    refused = []
    for table in refused_calls:
        for numbers in table.values():
            if numbers[machine.column] is not None:
                refused.append(numbers[machine.column])
    rows += _search(sorted(refused))
    return b"".join(struct.pack("HBBI", *row) for row in rows)


def _search(refused):
    """Rows that refuse these numbers of calls, which are sorted, and allow all others.

    A binary search: the kernel runs the filter for every call that exists when a leaf installs it.
    """
    _, if_equal, if_at_least, _, end = BPF_OPERATIONS
    if len(refused) > 8:
        middle = len(refused) // 2
        below = _search(refused[:middle])
        rest = _search(refused[middle:])
        return [(if_at_least, len(below), 0, refused[middle]), *below, *rest]
    rows = []
    # A refused call jumps to the last row: over the refused calls behind it, and over "allow".
    for i, number in enumerate(refused):
        rows.append((if_equal, len(refused) - i, 0, number))
    rows.append((end, 0, 0, SECCOMP_RET_ALLOW))
    rows.append((end, 0, 0, SECCOMP_RET_EPERM))
    return rows


# The calls that are refused in each mode.
REFUSED_IN_MODE = {
    "full": [REFUSED_CALLS],
    "landlock": [REFUSED_CALLS, REFUSED_BESIDE_LANDLOCK],
    "bare": [REFUSED_CALLS, REFUSED_BESIDE_LANDLOCK, REFUSED_WITHOUT_LANDLOCK],
}

atexit.register(close)
os.register_at_fork(after_in_child=_forget)

if __name__ == "__main__":
    _zygote_main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
