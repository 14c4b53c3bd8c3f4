"""sandbox.py: runs code nobody trusts, fast enough for reinforcement learning. Linux 5.4 or later, x86_64 or aarch64.

    run("print(int(input()) + 1)", stdin="41")              -> Result("ok", "42\n", None, 0.001)
    run("def f(a, b): return a + b", call=("f", [40, 2]))   -> Result("ok", "", 42, 0.001)

    caller    holds the expected outputs and compares. Nothing below ever sees an expected output, so no program can
              find one, and whatever a program forges is only another answer that would have to be right.
    zygote    one small interpreter per caller, the usual modules imported, without torch, environment, network or any
              file but the libraries. Forks a leaf per program, kills it when the caller hangs up, reports its end.
    leaf      the program: process 1 of its own user, PID, mount and IPC namespaces, with no capability, no fork, exec,
              socket, signal or ptrace (seccomp), rlimits, an empty /tmp of its own. When it ends, all it had is gone.

Choices:
  1. Limits are CPU seconds, read from outside: a busy machine turns no right answer into a time-out. A wall limit of
     WALL_FACTOR * timeout + WALL_EXTRA ends sleepers. SLOTS programs run at once, two for each core; the rest queue.
  2. Every test, a call included, gets its own leaf, so that no test can leave anything to the next. LiveCodeBench's runner
     makes all calls of a program in one process: there a list that a function never empties fails a right program.
  3. A leaf is one process, threads are free: a fork bomb cannot start, memory_mb bounds the whole program. Programs
     that start others fail, as in LiveCodeBench's runner.
  4. The network namespace (empty) belongs to the zygote: one per leaf would add 1.2 ms, and no leaf can open a socket.
  5. Hash seed and `random` are fixed: the same program gets the same verdict in every run.
  6. Any exit() is a normal end; an uncaught exception is a crash, whatever was printed before it.
  7. Where namespaces are refused (most plain containers) a leaf has another user id (below root), Landlock, seccomp and
     rlimits; one line on stderr says so. A folder to write to, numpy and some modules may then be missing.
  8. What no program can cause (zygote gone, fork refused, pipe broken) is tried three times, each with a fresh zygote,
     then reported as "infra", never as a wrong answer.
"""

import atexit
import builtins
import collections
import ctypes
import gc
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import types

# value: of a call; seconds: CPU
Result = collections.namedtuple("Result", "status stdout value seconds")
# status: ok, timeout, memory, crash, output (too much of it) or infra (not the program's fault)
# most that a program may print, return, or write into one file
OUTPUT_BYTES = 16 << 20
# wall limit of one test = factor * timeout + extra seconds: only sleepers meet it
WALL_FACTOR, WALL_EXTRA = 4, 10.0
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
# programs running at once in this process
SLOTS = max(2, 2 * CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
NOBODY = 65534  # user and group id of everything below a caller that is root
# third-party packages a program may import, where the caller has them
PACKAGES = ("numpy", "numpy.libs")
OUT_OF_MEMORY = 86  # exit code of a leaf


# ---- 1. Caller -----------------------------------------------------------------------------------

# output: a file that outlives the program
Leaf = collections.namedtuple("Leaf", "sock process pid output is_call")
_lock, _slots = threading.Lock(), threading.BoundedSemaphore(SLOTS)
_zygote, _mode, _retired = None, "full", []  # _zygote: (Popen, control socket)


def run(source, stdin="", call=None, timeout=6.0, memory_mb=1024):
    """Run one program on one input; call = (function or Solution method, [JSON arguments]). Thread-safe."""
    return next(run_each(source, [stdin if call is None else call], timeout, memory_mb))


def run_each(source, tests, timeout=6.0, memory_mb=1024):
    """Yield one Result per test: all stdin strings, or all (name, [arguments]) calls. Close the generator to stop.

    Thread-safe; blocks while SLOTS other programs run.
    """
    if NUMBERS is None:
        raise RuntimeError("the sandbox needs Linux on x86_64 or aarch64")
    job = (source.encode("utf-8", "replace"), timeout, memory_mb)
    with _slots:
        for test in tests:
            for tries in range(3):
                zygote, leaf = _zygote, None
                try:
                    leaf = _start_leaf(job, test)
                    result = _finish(leaf, timeout)
                    break
                except (OSError, EOFError):  # nothing a program can cause: see _finish
                    result = Result("infra", "", None, 0.0)
                    _retire(zygote)
                    time.sleep(0.1 * tries)
                finally:
                    _hang_up(leaf)
            yield result


def close():
    """End this process's zygote and everything under it; the next run() starts a new one."""
    _retire(_zygote)
    for process in _retired:
        process.wait()
    _retired.clear()


def killable(function, limit_s):
    """call(*args): function(*args) in the calling thread's own child process; None if it ran past limit_s or died.

    For our own code on hostile input (mathrl.py: sympy on any LaTeX), hence no namespaces. The child is forked by
    call.start(), best before a model exists, and reused.
    """
    import multiprocessing  # not wanted in a leaf

    mine, forking, ends = threading.local(), threading.Lock(), []

    def serve(pipe, parent):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        memory = lambda: int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        most = memory() + (2 << 30)  # 2 GiB more than now
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        # an orphan ends by itself, at the latest after a second
        while os.getppid() == parent and memory() < most - (1 << 30):
            if pipe.poll(1):
                args = pipe.recv()  # EOFError if the parent has gone
                # default action: ends a hang in C, parent or no parent
                signal.setitimer(signal.ITIMER_PROF, limit_s)
                result = function(*args)
                signal.setitimer(signal.ITIMER_PROF, 0)
                pipe.send(result)

    def start():
        # a child holds the far end of its own pipe only, so that either side sees the other die
        with forking:
            mine.pipe, far = multiprocessing.Pipe()
            ends.append(mine.pipe)
            mine.owner = os.getpid()
            mine.child = os.fork()
            if mine.child == 0:
                try:
                    for end in ends:
                        end.close()
                    serve(far, mine.owner)
                finally:
                    os._exit(0)
            far.close()

    def call(*args):
        # first call of this thread, or of a fork of it
        if getattr(mine, "owner", None) != os.getpid():
            start()
        for _ in range(2):
            try:
                mine.pipe.send(args)
                if not mine.pipe.poll(limit_s):
                    raise TimeoutError
                return mine.pipe.recv()
            except (EOFError, OSError) as error:  # the child died, or takes too long
                late = isinstance(error, TimeoutError)
            os.kill(mine.child, signal.SIGKILL)
            ended = os.waitstatus_to_exitcode(os.waitpid(mine.child, 0)[1])
            mine.pipe.close()
            ends.remove(mine.pipe)
            start()
            if late or ended not in (-signal.SIGKILL, 0):
                # else somebody killed the child, or it had grown and left, which is not the input's
                # doing: once more
                return

    call.start = start
    return call


def _start_leaf(job, test):
    """Start a program on its stdin or for its call. Whatever goes wrong in here is infrastructure."""
    global _zygote
    (source, timeout, memory_mb), is_call = job, not isinstance(test, str)
    output = os.memfd_create("output")
    ours, theirs = socket.socketpair()
    try:
        with _lock, theirs:
            if _zygote is None or _zygote[0].poll() is not None:
                _zygote = _start_zygote()
            process, control = _zygote
            socket.send_fds(control, [b"f"], [theirs.fileno(), output])
        ours.settimeout(30)
        ready, pid = struct.unpack("!cI", _read(ours.recv, 5))
        if ready != b"r":
            raise EOFError("a leaf could not be set up")
        given = json.dumps(list(test)).encode() if is_call else test.encode("utf-8", "replace")
        for part in json.dumps([is_call, memory_mb]).encode(), source, given:
            ours.sendall(struct.pack("!I", len(part)) + part)
        ours.settimeout(WALL_FACTOR * timeout + WALL_EXTRA)
    except BaseException:
        ours.close()
        os.close(output)
        raise
    return Leaf(ours, process, pid, output, is_call)


def _finish(leaf, timeout):
    """Result of a test in a leaf just started. Raises only if the zygote is gone."""
    try:
        late = _wait(leaf, timeout)
        if late:
            return Result("timeout", "", None, late)
        if leaf.sock.recv(1) == b"v":
            seconds = _cpu_seconds(leaf)
            (size,) = struct.unpack("!I", _read(leaf.sock.recv, 4))
            if size > OUTPUT_BYTES:
                return Result("output", "", None, seconds)
            return Result("ok", "", json.loads(_read(leaf.sock.recv, size)), seconds)
        ended, seconds = struct.unpack("!id", _read(leaf.sock.recv, 12))
    except TimeoutError:
        return Result("timeout", "", None, 0.0)
    except (ValueError, RecursionError):  # no JSON: nothing that _answer sends
        return Result("crash", "", None, 0.0)
    except (OSError, EOFError):  # cut off without a word from the zygote
        time.sleep(0.05)
        if leaf.process.poll() is not None:
            raise
        return Result("crash", "", None, 0.0)  # the program did it
    code, size, stdout = os.waitstatus_to_exitcode(ended), os.fstat(leaf.output).st_size, ""
    if size >= OUTPUT_BYTES:
        status = "output"
    elif seconds > timeout:
        status = "timeout"
    elif code in (
        OUT_OF_MEMORY,
        -signal.SIGKILL,
    ):  # its own limit, or the host's; a program can bring the signal on itself by RLIMIT_CPU
        status = "memory"
    elif code or leaf.is_call:
        status = "crash"
    else:
        status, stdout = "ok", os.pread(leaf.output, size, 0).decode("utf-8", "replace")
    return Result(status, stdout, None, seconds)


def _wait(leaf, timeout):
    """Wait until the leaf or the zygote has something to say: 0.0, or the CPU seconds at which a limit was passed."""
    start, left, poll = time.monotonic(), timeout, select.poll()
    poll.register(leaf.sock, select.POLLIN)
    while not poll.poll(1000 * left + 1):
        used, waited = _cpu_seconds(leaf), time.monotonic() - start
        left = min(timeout - used, leaf.sock.gettimeout() - waited)
        if left <= 0:
            return max(used, 1e-9)
    return 0.0


def _cpu_seconds(leaf):
    """CPU time of a running leaf: the kernel's clock of another process, as in clock_getcpuclockid(3)."""
    try:
        return time.clock_gettime(~leaf.pid << 3 | 2)
    except OSError:  # it has ended
        return 0.0


def _hang_up(leaf):
    """Close the caller's end: the zygote sees it and kills the leaf."""
    if leaf is not None:
        try:
            # arrives even if a forked child holds a copy of the socket
            leaf.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        leaf.sock.close()
        os.close(leaf.output)


def _start_zygote():
    """Start a zygote in the best mode this host allows: (Popen, control socket)."""
    global _mode
    import importlib.util
    import subprocess

    spec = importlib.util.find_spec(PACKAGES[0])
    packages = os.path.dirname(os.path.dirname(spec.origin)) if spec and spec.origin else ""
    env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    env |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    flags = ["-s", "-S", "-B"] + ["-P"] * (sys.version_info >= (3, 11))
    while True:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [
            sys.executable,
            *flags,
            os.path.abspath(__file__),
            str(theirs.fileno()),
            _mode,
            packages,
        ]
        null = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(
            command, env=env, cwd="/", pass_fds=[theirs.fileno()], start_new_session=True, **null
        )
        theirs.close()
        ours.settimeout(60)
        try:
            answer = ours.recv(1000).decode("utf-8", "replace")
        except OSError:
            process.kill()
            raise
        if answer.startswith("ready"):
            if answer != "ready" and os.environ.get("RANK", "0") == "0" and _mode != "weak":
                print(
                    f"sandbox: DEGRADED, no namespaces for untrusted code ({answer[6:]})",
                    file=sys.stderr,
                )
                _mode = "weak"
            return process, ours
        ours.close()
        # an accident, no refusal
        if _mode != "full" or (process.wait() != -signal.SIGSYS and not answer):
            raise OSError(f"the zygote did not start: {answer}")
        _mode = answer or "refused by seccomp"


def _retire(zygote):
    """Let go of a zygote if it is still the current one: it ends when the programs it still holds have ended."""
    global _zygote
    with _lock:
        if zygote is not None and zygote is _zygote:
            _zygote = None
            zygote[1].close()
            _retired.append(zygote[0])
        _retired[:] = [process for process in _retired if process.poll() is None]


def _forget():
    """After a fork of the caller: the zygote is the parent's, this process gets its own."""
    global _zygote, _lock, _slots, _retired
    if _zygote is not None:
        _zygote[1].close()
        _zygote[0].returncode = 0  # not our child: never wait for it
    _zygote, _retired, _lock, _slots = None, [], threading.Lock(), threading.BoundedSemaphore(SLOTS)


def _read(read, size):
    """Exactly `size` bytes, or EOFError."""
    parts = []
    while size:
        parts.append(read(min(size, 1 << 20)))
        if not parts[-1]:
            raise EOFError("hung up")
        size -= len(parts[-1])
    return b"".join(parts)


# ---- 2. Zygote -----------------------------------------------------------------------------------

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the interpreter lock stays held across clone()
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
# system calls by number: audit arch, clone, clone3, prlimit64, prctl, then what a leaf must not use
NUMBERS = {
    "x86_64": (
        0xC000003E,
        56,
        435,
        302,
        157,
        "29 41 57 58 59 62 64 68 101 109 112 129 141 155 161 165 166 175 200 234 240 246 248 249 250 272 297 "
        "298 303 304 308 310 311 312 313 319 321 322 323 424 425 428 429 430 432 434 438 442 447",
    ),
    "aarch64": (
        0xC00000B7,
        220,
        435,
        261,
        167,
        "39 40 41 51 97 104 105 117 129 130 131 138 140 154 157 180 186 190 194 198 217 218 219 221 240 241 "
        "264 265 268 270 271 272 273 279 280 281 282 424 425 428 429 430 432 434 438 442 447",
    ),
}.get(sys.platform == "linux" and os.uname().machine)
# Refused: fork exec kill ptrace socket process_vm_* kcmp mount umount pivot_root chroot unshare
# setns setsid setpgid
# keyctl bpf perf userfaultfd io_uring memfd shm msg sem mq, file handles, the new mount calls,
# modules, setpriority
STARS = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys"
# names every program starts with: from each of these *, then the modules themselves
STARS += " json builtins typing"
IMPORTS = "array cmath contextlib dataclasses decimal enum fractions numbers os queue struct textwrap threading"
IMPORTS += " time traceback"
NAMESPACES = NEWUSER | NEWPID | NEWNS | NEWIPC  # of every leaf


def _checked(result):
    """The result of a C call, or OSError."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _preload():
    """Import what solutions use, and make the module they run in: LiveCodeBench's star imports, then module names."""
    program = types.ModuleType("__main__")
    for name in STARS.split():
        exec(f"from {name} import *", vars(program))
    exec(f"import {', '.join((STARS + ' ' + IMPORTS).split())}", vars(program))
    vars(program).update(exit=sys.exit, quit=sys.exit, __file__="program.py")
    sys.argv[:] = ["program.py"]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # normally the work of the site module
    sys.modules.update(sandbox=sys.modules["__main__"], __main__=program, solution=program)
    sys.setrecursionlimit(50_000)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(50_000)


def _write_maps(proc, uid, gid):
    """Give this process of a new user namespace the one user id 1000; proc is an open /proc."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"1000 {uid} 1"),
        ("gid_map", f"1000 {gid} 1"),
    ):
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)


def _mount(source, target, kind, flags, data=None):
    _checked(libc.mount(source.encode(), target.encode(), kind, flags, data))


def _isolate(packages):
    """Give this zygote an empty network and a read-only root with libraries only; returns an open /proc."""
    proc, uid, gid = os.open("/proc", os.O_PATH | os.O_DIRECTORY), os.geteuid(), os.getegid()
    _checked(libc.unshare(NEWNS | NEWNET | (NEWUSER if uid else 0)))
    if uid:
        _write_maps(proc, uid, gid)
    stdlib, root = os.path.dirname(os.__file__), "/tmp"
    shown = {
        path: path
        for path in (
            "/lib",
            "/lib64",
            "/usr/lib",
            "/usr/lib64",
            "/dev/null",
            "/dev/urandom",
            stdlib,
        )
    }
    shown |= {f"{packages}/{name}": f"/packages/{name}" for name in PACKAGES} if packages else {}
    shown = {path: shown[path] for path in shown if os.path.exists(path)}
    # /tmp is about to vanish,
    opened = {path: os.open(path, os.O_PATH) for path in shown if not os.path.islink(path)}
    folders = set(filter(os.path.isdir, shown))  # and with it whatever of this project lives there
    _mount("none", "/", None, 0x44000)  # private, recursive: nothing of this reaches the host
    _mount("tmpfs", root, b"tmpfs", 6, b"size=1m,mode=755")
    for path, place in shown.items():
        target = root + place
        if os.path.exists(target):  # a library folder inside another
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if path not in opened:
            os.symlink(os.readlink(path), target)
            continue
        os.mkdir(target) if path in folders else os.close(os.open(target, os.O_CREAT))
        _mount(f"/proc/self/fd/{opened[path]}", target, None, 0x1000)  # bind
        # nosuid, nodev, noexec, noatime, nodiratime may not be dropped
        locked = os.statvfs(target).f_flag & 0xC0E
        _mount("none", target, None, 0x1021 | locked)  # bind, remount, read-only
    if os.path.isdir(f"{root}{stdlib}/site-packages"):
        _mount("tmpfs", f"{root}{stdlib}/site-packages", b"tmpfs", 7)
    os.mkdir(f"{root}/tmp")
    os.symlink("/tmp/stdin", f"{root}/dev/stdin")
    _mount("none", root, None, 0x1027)
    for fd in opened.values():
        os.close(fd)
    os.chdir(root)
    _checked(libc.pivot_root(b".", b"."))
    _checked(libc.umount2(b".", 2))  # detach the host's files
    os.chdir("/")
    sys.path.append("/packages")
    return proc


def _landlock():
    """Without a mount namespace: leave nothing but the libraries readable. Returns what is missing, as words."""
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        return "; no Landlock either: files that this user can read can be read"
    rights = (1 << min(13 + (abi > 1) + (abi > 2) + (abi > 4), 16)) - 1
    size, libc_call = (24 if abi > 5 else 16 if abi > 3 else 8), libc.syscall
    ruleset = _checked(libc_call(444, struct.pack("QQQ", rights, 3 if abi > 3 else 0, 3), size, 0))
    for path in (os.path.dirname(os.__file__), "/usr/lib", "/lib", "/dev/null", "/dev/urandom"):
        fd = os.open(path, os.O_PATH)
        # read (and write) files, list directories
        allowed = 0b1100 if os.path.isdir(path) else 0b110
        _checked(libc_call(445, ruleset, 1, struct.pack("=Qi", allowed, fd), 0))
        os.close(fd)
    _checked(libc_call(446, ruleset, 0))
    os.close(ruleset)
    return ""


def _zygote_main(control, mode, packages):
    """Isolate, report, then serve."""
    control = socket.socket(fileno=control)
    _preload()
    # deep recursion through C needs the stack
    for name, most in ("CORE", 0), ("MEMLOCK", 0), ("STACK", 120 << 20):
        hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
        resource.setrlimit(
            getattr(resource, "RLIMIT_" + name), (most if hard < 0 else min(most, hard), hard)
        )
    try:
        _checked(libc.prctl(38, 1, 0, 0, 0))  # no new privileges, for all below
        proc = _isolate(packages) if mode == "full" else None
        missing = "" if mode == "full" else mode + _landlock()
        if os.geteuid() == 0:  # root escapes RLIMIT_NPROC, and the caller is root too
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            libc.prctl(4, 1, 0, 0, 0)  # dumpable again, else /proc/self belongs to root
        if mode == "full" and os.waitpid(_checked(_fork_leaf(-1, -1, proc)), 0)[1]:
            raise OSError("a leaf could not be set up")
    except OSError as error:
        control.send(str(error).encode())
        return
    gc.collect()
    gc.freeze()  # children share these pages
    control.send(("ready " + missing).strip().encode())
    _serve(control, proc)


def _serve(control, proc):
    """Fork a leaf for each pair of descriptors received; ends when the caller is gone and no leaf is left."""
    # jobs: fd of a leaf's socket, and its pidfd -> (pid, both)
    poll, jobs, listening = select.poll(), {}, True
    poll.register(control, select.POLLIN)
    while jobs or listening:
        events = {fd for fd, _ in poll.poll()}
        for fd in events & jobs.keys():
            if fd not in jobs:  # closed a moment ago, together with its pidfd
                continue
            pid, sock, pidfd = jobs.pop(fd)
            poll.unregister(fd)
            if fd == pidfd:  # the leaf ended
                _, ended, usage = os.wait4(pid, 0)
                try:
                    sock.send(
                        struct.pack("!cid", b"e", ended, usage.ru_utime + usage.ru_stime),
                        socket.MSG_DONTWAIT,
                    )
                except OSError:  # nobody listens
                    pass
                if jobs.pop(sock.fileno(), None):
                    poll.unregister(sock)
                sock.close()
                os.close(pidfd)
            else:  # the caller hung up
                os.kill(pid, signal.SIGKILL)
        # last: a new leaf may get the number of a descriptor just closed
        if control.fileno() in events:
            message, fds, *_ = socket.recv_fds(control, 1, 2)
            if not message:
                poll.unregister(control)
                listening = False
                continue
            pid = _fork_leaf(*fds, proc)
            os.close(fds[1])
            sock = socket.socket(fileno=fds[0])
            if pid < 0:
                sock.close()  # the caller reads: no leaf
                continue
            pidfd = os.pidfd_open(pid)
            jobs[sock.fileno()] = jobs[pidfd] = pid, sock, pidfd
            poll.register(sock, 0)  # 0: only the hang-up
            poll.register(pidfd, select.POLLIN)


def _fork(namespaces):
    """os.fork() by the bare system call, without at-fork hooks, whose page faults cost 0.5 ms; -1 on failure.

    Safe because nothing below the caller has threads; the kernel updates glibc's copy of the thread id.
    """
    where = ctypes.c_void_p()
    # where glibc keeps the id of this thread
    known = libc.prctl(40, ctypes.byref(where), 0, 0, 0) == 0
    if not known and not namespaces:
        return os.fork()
    # set the id in the child, clear it at its end
    flags = namespaces | (0x01200000 if known else 0) | signal.SIGCHLD
    # twice: the order differs between machines
    return libc.syscall(NUMBERS[1], flags, 0, 0, where, where)


def _fork_leaf(sock, output, proc):
    """Fork a leaf, as process 1 of new namespaces if proc (an open /proc) is given; its pid, or -1."""
    uid, gid, keep = os.geteuid(), os.getegid(), 1
    pid = _fork(NAMESPACES if proc is not None else 0)
    if pid == 0:
        try:
            libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the zygote
            if proc is not None:
                _write_maps(proc, uid, gid)
                _mount("tmpfs", "/tmp", b"tmpfs", 6, b"nr_inodes=256,size=%d" % (2 * OUTPUT_BYTES))
                pid = int(os.readlink("self", dir_fd=proc))  # as the caller sees it
            keep = (
                _leaf_main(sock, output, pid or os.getpid(), proc is not None) if sock >= 0 else 0
            )
        finally:
            os._exit(keep)
    return pid


# ---- 3. Leaf -------------------------------------------------------------------------------------


def _leaf_main(sock, output, pid, isolated):
    """Become the program: take over its descriptors and limits, seal this process, run it. Returns the exit code."""
    os.dup2(output, 1)
    os.dup2(sock, 3)
    os.closerange(4, 1 << 12)
    os.write(3, struct.pack("!cI", b"r", pid))
    is_call, memory_mb = json.loads(_receive())
    source, stdin = _receive(), _receive()
    call, stdin = (json.loads(stdin), b"") if is_call else (None, stdin)
    if isolated and len(stdin) > OUTPUT_BYTES:
        _mount("none", "/tmp", None, 0x26, b"size=%d" % (len(stdin) + OUTPUT_BYTES))  # remount
    given = os.open("/tmp/stdin", os.O_CREAT | os.O_RDWR) if isolated else os.memfd_create("stdin")
    with open(given, "wb", closefd=False) as file:
        file.write(stdin)
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    os.close(given)
    if is_call:
        os.dup2(2, 1)  # what a function prints is nobody's business
    else:
        os.close(3)  # who has no socket cannot write to it
    del stdin
    os.chdir("/tmp" if isolated else "/")
    memory = BASE_BYTES + (memory_mb << 20)
    for name, most in ("AS", memory), ("NPROC", 64), ("NOFILE", 64), ("FSIZE", OUTPUT_BYTES):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    _seal()
    random.seed(0)
    return _run_program(source, call)


def _run_program(source, call):
    """Run a script to its end, or define its functions and answer the call."""
    scope = sys.modules["__main__"].__dict__
    scope["__name__"] = "solution" if call else "__main__"
    try:
        try:
            exec(compile(source, "<program>", "exec", dont_inherit=True), scope)
            if call:
                return _answer(scope, *call)
        except SystemExit:
            if call:
                return 1
        threading._shutdown()  # the main thread may end before the thread that does the work
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):
            getattr(stream, "closed", False) or stream.flush()
    except MemoryError:
        return OUT_OF_MEMORY
    except BaseException:
        return 1
    return 0


def _answer(scope, name, args):
    """Make one call, send its result as JSON. Returns the exit code."""
    owner = scope.get("Solution")
    function = getattr(owner(), name) if hasattr(owner, name) else scope[name]
    # numpy scalars and arrays
    result = json.dumps(function(*args), default=lambda item: item.tolist()).encode()
    result = memoryview(b"v" + struct.pack("!I", len(result)) + result)
    while result:
        result = result[os.write(3, result) :]
    return 0


def _receive():
    """One frame from the caller."""
    read = lambda size: os.read(3, size)
    return _read(read, *struct.unpack("!I", _read(read, 4)))


def _seal():
    """Drop every capability, then refuse system calls for good."""
    _checked(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
    _checked(libc.prctl(22, 2, PROGRAM, 0, 0))


def _seccomp_filter(arch, clone, clone3, prlimit64, prctl, refused):
    """BPF: allow all but fork, other processes' limits, and `refused` (EPERM); clone3 is ENOSYS, so libc uses clone."""
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    rows = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, kill), (load, 0, 0, 0)]
    rows += [(at_least, 0, 1, 0x40000000), (end, 0, 0, eperm)]  # the x32 twins of every call
    rows += [(equal, 0, 1, clone3), (end, 0, 0, enosys)]
    rows += [
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (any_bit, 0, 1, 0x10000),
        (end, 0, 0, allow),
        (end, 0, 0, eperm),
    ]
    # own pid; death signal
    for call, value, then, otherwise in (prlimit64, 0, allow, eperm), (prctl, 1, eperm, allow):
        rows += [
            (equal, 0, 4, call),
            (load, 0, 0, 16),
            (equal, 0, 1, value),
            (end, 0, 0, then),
            (end, 0, 0, otherwise),
        ]
    refused = sorted(map(int, refused.split()))
    # jump to the last row
    rows += [(equal, len(refused) - i, 0, call) for i, call in enumerate(refused)]
    return b"".join(
        struct.pack("HBBI", *row) for row in rows + [(end, 0, 0, allow), (end, 0, 0, eperm)]
    )


FILTER = ctypes.create_string_buffer(_seccomp_filter(*NUMBERS) if NUMBERS else b"")
PROGRAM = struct.pack("HxxxxxxQ", len(FILTER) // 8, ctypes.addressof(FILTER))
atexit.register(close)
os.register_at_fork(after_in_child=_forget)

if __name__ == "__main__":
    with open("/proc/self/statm") as file:
        BASE_BYTES = int(file.read().split()[0]) * resource.getpagesize() + (48 << 20)
    _zygote_main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
