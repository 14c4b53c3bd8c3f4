"""sandbox.py: runs code nobody trusts, fast enough for reinforcement learning.

    run("print(int(input()) + 1)", stdin="41")              -> Result("ok", "42\n", None, 0.0004)
    run("def f(a, b): return a + b", call=("f", [40, 2]))   -> Result("ok", "", 42, 0.0004)

Four processes, each trusted less than the one before:

    caller    holds the expected outputs, compares, decides. Nothing below ever sees an expected output, so no
              program can find it, and a forged result is only another answer that has to be right.
    zygote    one small interpreter per caller, with the usual modules imported, no torch, no environment and no file
              but the standard library: forks a keeper per program, kills it when the caller hangs up.
    keeper    process 1 of the program's own user, PID, mount and IPC namespaces: compiles the source once, forks a
              leaf per test, judges its time and memory from outside; when it dies the kernel kills all it held.
    leaf      one test: no capability, no fork, exec, socket, signal or ptrace (seccomp), rlimits, a private /tmp, the
              input as file 0, output in memory files of bounded size. Nothing of it is left for the next test.

Choices, each with its reason:
  1. Time is CPU seconds of the leaf: a busy machine must not turn right answers into time-outs. A wall limit
     of WALL_FACTOR * timeout + WALL_EXTRA ends sleepers. At most SLOTS programs run at once, the rest queue.
  2. One keeper per program, one leaf per test: a namespace set costs about as much as three forks.
  3. The network namespace (empty) is the zygote's, made once: an own one would cost 1.2 of about 3 ms a program, and
     seccomp refuses sockets anyway. Where seccomp is missing every program gets its own.
  4. Leaves are single processes (threads are free): programs that start others fail, as in LiveCodeBench's runner.
     So a fork bomb cannot start, and memory_mb is the memory of the whole program.
  5. Hash seed and `random` are fixed: the same program gets the same verdict in every run.
  6. Where namespaces are refused (most plain containers) the same leaf runs under another user id (as root), Landlock,
     seccomp and rlimits; one line on stderr says so, once. /proc is out of reach either way.
  7. What cannot be blamed on the program (zygote gone, fork refused, pipe broken) is retried twice with a fresh
     zygote, then reported as "infra": callers mask it, it is never a wrong answer.
"""

import atexit
import builtins
import collections
import contextlib
import ctypes
import json
import math
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

Result = collections.namedtuple("Result", "status stdout value seconds")  # value: JSON value; seconds: CPU of the leaf
STATUS = ("ok", "timeout", "memory", "crash", "output", "infra")  # the codes a keeper sends
OUTPUT_BYTES = 16 << 20  # of standard output, of the result, and of any file a program writes
TMP = b"nr_inodes=256,size=%d" % (2 * OUTPUT_BYTES)
WALL_FACTOR, WALL_EXTRA = 4, 2.0  # wall limit of one test = factor * timeout + extra seconds
SLOTS = 2 * len(os.sched_getaffinity(0))  # programs running at once in this process; more would only wait for a core
NOBODY = 65534  # user and group id of everything below a caller that is root
PACKAGES = ("numpy", "numpy.libs")  # third-party packages a program may import, where the caller has them


# ---- 1. Caller ----

_lock, _slots = threading.Lock(), threading.BoundedSemaphore(SLOTS)
_zygote, _mode, _retired = None, "full", []  # _zygote: (Popen, control socket)


def run(source, stdin="", call=None, timeout=6.0, memory_mb=1024):
    """Run one program on one input; call = (function or Solution method, [JSON arguments]). Thread-safe."""
    return next(run_each(source, [call if call is not None else stdin], timeout, memory_mb))


def run_each(source, tests, timeout=6.0, memory_mb=1024):
    """Yield one Result per test, a stdin string or a (name, [arguments]) call; stop iterating to stop running.

    All tests run in one keeper, each in a fresh leaf. Thread-safe; blocks while SLOTS others run.
    """
    keeper, alive = None, True
    with _slots:
        try:
            for test in tests:
                result, tries = Result("crash", "", None, 0.0), 0  # of every test after the one that killed the keeper
                while alive:
                    try:
                        keeper = keeper or _start_keeper(source, timeout, memory_mb)
                        result, alive = _ask(keeper, test, timeout)
                        break
                    except (OSError, EOFError, struct.error):  # nothing the program can cause: see _ask
                        keeper = _hang_up(keeper)
                        if tries == 2:
                            result = Result("infra", "", None, 0.0)
                            break
                        tries += 1
                        _retire()
                        time.sleep(0.1 * tries)
                yield result
        finally:
            _hang_up(keeper)


def close():
    """End this process's zygote and everything under it; the next run() starts a new one."""
    _retire()
    for process in _retired:
        process.wait()
    _retired.clear()


def _start_keeper(source, timeout, memory_mb):
    """A socket to a fresh keeper that holds the source, and the zygote process it belongs to."""
    global _zygote
    with _lock:
        if _zygote is None or _zygote[0].poll() is not None:
            _zygote = _start_zygote()
        process, control = _zygote
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(control, [b"k"], [theirs.fileno()])
    try:
        ours.settimeout(30)
        if ours.recv(1) != b"r":  # sent before the keeper has read anything of the program
            raise EOFError("no keeper")
        _send(ours, json.dumps([timeout, memory_mb]).encode())
        _send(ours, source.encode("utf-8", "replace"))
    except BaseException:
        ours.close()
        raise
    return ours, process


def _ask(keeper, test, timeout):
    """(Result, keeper still usable). Raises only if the zygote is gone; a dead or silent keeper is the program's."""
    sock, process = keeper
    start, stdin, call = time.monotonic(), b"", b""
    if isinstance(test, str):
        stdin = test.encode("utf-8", "replace")
    else:
        call = json.dumps(list(test)).encode()
    try:
        sock.settimeout(WALL_FACTOR * timeout + WALL_EXTRA + 5)  # the keeper ends a leaf before this
        _send(sock, call)
        _send(sock, stdin)
        code, seconds, num_out, num_value = struct.unpack("!BdII", _recv_exactly(sock, 17))
        if code >= len(STATUS) or max(num_out, num_value) > OUTPUT_BYTES:
            raise EOFError("not a keeper's answer")
        out, value = _recv_exactly(sock, num_out), _recv_exactly(sock, num_value)
        status, parsed = STATUS[code], None
    except TimeoutError:
        return Result("timeout", "", None, time.monotonic() - start), False
    except (OSError, EOFError):
        time.sleep(0.05)
        if process.poll() is not None:
            raise EOFError("the zygote died")
        return Result("crash", "", None, time.monotonic() - start), False
    if status == "infra":
        raise EOFError("the keeper could not fork or mount")
    if status == "ok" and call:
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):  # left by os._exit, or wrote something else there
            status = "crash"
    return Result(status, out.decode("utf-8", "replace"), parsed, seconds), True


def _hang_up(keeper):
    """Close the caller's end: the zygote sees it and kills the keeper with all it holds."""
    if keeper is not None:
        try:
            keeper[0].shutdown(socket.SHUT_RDWR)  # reaches the zygote even if a forked child holds a copy
        except OSError:
            pass
        keeper[0].close()


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
        command = [sys.executable, *flags, os.path.abspath(__file__), str(theirs.fileno()), _mode, packages]
        process = subprocess.Popen(command, env=env, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        ours.settimeout(60)
        answer = ours.recv(1000).decode("utf-8", "replace")
        if answer.startswith("ready"):
            if answer != "ready" and os.environ.get("RANK", "0") == "0" and _mode != "weak":
                print(f"sandbox: DEGRADED, untrusted code runs without namespaces: {answer[6:]}", file=sys.stderr)
                _mode = "weak"
            return process, ours
        ours.close()
        process.wait()
        if _mode != "full":
            raise OSError(f"the zygote did not start: {answer}")
        _mode = "degraded: " + (answer or "it died")


def _retire():
    """Let go of the current zygote: it ends when the programs it still holds have ended."""
    global _zygote
    with _lock:
        if _zygote is not None:
            _zygote[1].close()
            _retired.append(_zygote[0])
        _retired[:] = [process for process in _retired if process.poll() is None]
        _zygote = None


def _forget():
    """After a fork of the caller: the zygote is the parent's, this process gets its own."""
    global _zygote, _lock, _slots, _retired
    if _zygote is not None:
        _zygote[1].close()
        _zygote[0].returncode = 0  # not our child: never wait for it
    _zygote, _retired, _lock, _slots = None, [], threading.Lock(), threading.BoundedSemaphore(SLOTS)


def _send(sock, data):
    """One frame: length, then bytes."""
    sock.sendall(struct.pack("!I", len(data)) + data)


def _recv(sock):
    """One frame, or EOFError."""
    return _recv_exactly(sock, *struct.unpack("!I", _recv_exactly(sock, 4)))


def _recv_exactly(sock, size):
    """Exactly `size` bytes, or EOFError."""
    parts = []
    while size:
        parts.append(sock.recv(min(size, 1 << 20)))
        if not parts[-1]:
            raise EOFError("hung up")
        size -= len(parts[-1])
    return b"".join(parts)


# ---- 2. Zygote ----

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL: the interpreter lock stays held across clone()
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
NUMBERS = {  # system calls by number: what glibc has no function for, then what a leaf must not use
    "x86_64": (0xC000003E, 56, 435, 302, "57 58 59 322 101 62 200 234 129 297 424 434 438 41 310 311 312 165 166 155 161 "
               "272 308 250 248 249 321 298 323 425 319 447 29 68 64 304 303 428 429 430 432 442 175 313 246 141 240 112 109"),
    "aarch64": (0xC00000B7, 220, 435, 261, "221 281 117 129 130 131 138 240 424 434 438 198 270 271 272 40 39 41 51 "
                "97 268 219 217 218 280 241 282 425 279 447 194 186 190 265 264 428 429 430 432 442 105 273 104 140 180 157 154"),
}.get(os.uname().machine)  # (audit arch, clone, clone3, prlimit64, refused)
NAMESPACES = NEWUSER | NEWPID | NEWNS | NEWIPC | (0 if NUMBERS else NEWNET)  # of every keeper; choice 3

def _checked(result):
    """The result of a C call, or OSError."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _preload():
    """Import what solutions use, and make the module they run in: LiveCodeBench's star imports, then module names."""
    program = types.ModuleType("__main__")
    stars = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io " \
            "sys json builtins typing"
    others = "array cmath contextlib dataclasses decimal enum fractions numbers os queue struct textwrap threading time " \
             "traceback"
    for name in stars.split():
        exec(f"from {name} import *", vars(program))
    exec(f"import {', '.join((stars + ' ' + others).split())}", vars(program))
    vars(program).update(exit=sys.exit, quit=sys.exit)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # normally the work of the site module
    sys.modules.update(sandbox=sys.modules["__main__"], __main__=program, solution=program)
    sys.setrecursionlimit(50_000)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(50_000)


def _write_maps(proc, uid, gid):
    """Give this process of a new user namespace the one user id 1000; proc is an open /proc."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
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
    shown = {path: path for path in (stdlib, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/null", "/dev/urandom")}
    shown |= {f"{packages}/{name}": f"/packages/{name}" for name in PACKAGES} if packages else {}
    shown = {path: shown[path] for path in shown if os.path.exists(path)}
    opened = {path: os.open(path, os.O_PATH) for path in shown if not os.path.islink(path)}  # /tmp is about to vanish
    _mount("none", "/", None, 0x44000)  # private, recursive: nothing of this reaches the host
    _mount("tmpfs", root, b"tmpfs", 6, b"size=1m,mode=755")
    for path, place in shown.items():
        target = root + place
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if path not in opened:
            os.symlink(os.readlink(path), target)
            continue
        os.mkdir(target) if os.path.isdir(path) else os.close(os.open(target, os.O_CREAT))
        _mount(f"/proc/self/fd/{opened[path]}", target, None, 0x1000)  # bind
        locked = os.statvfs(target).f_flag & 0xC0E  # nosuid, nodev, noexec, noatime, nodiratime may not be dropped
        _mount("none", target, None, 0x1021 | locked)  # bind, remount, read-only
        os.close(opened[path])
    if os.path.isdir(f"{root}{stdlib}/site-packages"):
        _mount("tmpfs", f"{root}{stdlib}/site-packages", b"tmpfs", 7)
    os.mkdir(f"{root}/tmp")
    os.symlink("/tmp/stdin", f"{root}/dev/stdin")
    _mount("none", root, None, 0x1027)
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
        return "no Landlock, files readable by this user are readable"
    rights = (1 << min(13 + (abi > 1) + (abi > 2) + (abi > 4), 16)) - 1
    size, libc_call = (24 if abi > 5 else 16 if abi > 3 else 8), libc.syscall
    ruleset = _checked(libc_call(444, struct.pack("QQQ", rights, 3 if abi > 3 else 0, 3), size, 0))
    for path in (os.path.dirname(os.__file__), "/usr/lib", "/lib", "/dev/null", "/dev/urandom"):
        fd = os.open(path, os.O_PATH)
        allowed = 0b1100 if os.path.isdir(path) else 0b110  # read (and write) files, list directories
        _checked(libc_call(445, ruleset, 1, struct.pack("=Qi", allowed, fd), 0))
        os.close(fd)
    libc.prctl(38, 1, 0, 0, 0)
    _checked(libc_call(446, ruleset, 0))
    os.close(ruleset)
    return ""


def _zygote_main(control, mode, packages):
    """Isolate, report, then serve: one keeper per socket received, dead when its socket hangs up."""
    control = socket.socket(fileno=control)
    _preload()
    try:
        proc = None
        if mode == "full":
            proc = _isolate(packages)
        if os.geteuid() == 0:  # a root user escapes RLIMIT_NPROC and owns the caller
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            libc.prctl(4, 1, 0, 0, 0)  # dumpable again, else /proc/self belongs to root
        missing = "" if mode == "full" else mode + "; " + _landlock()
        if mode == "full":
            probe = _fork_keeper(None, proc)
            if os.waitpid(probe, 0)[1]:
                raise OSError("a keeper could not be set up")
    except OSError as error:
        control.send(f"failed: {error}".encode())
        return
    import gc
    gc.collect()
    gc.freeze()  # children share these pages
    control.send(("ready " + missing).strip().encode())
    _serve(control, proc)


def _serve(control, proc):
    """The zygote's loop; ends when the caller has closed its control socket and no keeper is left."""
    libc.prctl(36, 1, 0, 0, 0)  # without a PID namespace the leaf of a killed keeper comes here to be reaped
    poll, jobs, listening = select.poll(), {}, True  # jobs: fd of a keeper's socket, and its pidfd -> (pid, both)
    poll.register(control, select.POLLIN)
    while jobs or listening:
        events = {fd for fd, _ in poll.poll()}
        for fd in events & jobs.keys():
            if fd not in jobs:  # its twin came first
                continue
            pid, *both = jobs[fd]  # the caller hung up, or the keeper died
            for kill in (os.kill, os.killpg):  # with process 1 the kernel kills its whole namespace
                with contextlib.suppress(ProcessLookupError):
                    kill(pid, signal.SIGKILL)
            for which in (pid, -pid):  # -pid: its process group
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(which, 0):
                        pass
            for fd in both:
                poll.unregister(fd)
                os.close(fd)
                del jobs[fd]
        if control.fileno() in events:  # last: a new job may get the number of a descriptor just closed
            message, fds, *_ = socket.recv_fds(control, 1, 1)
            pid = _fork_keeper(fds[0], proc) if message else -1
            if not message:
                poll.unregister(control)
                listening = False
            elif pid < 0:
                os.close(fds[0])  # the caller reads: no keeper
            else:
                pidfd = os.pidfd_open(pid)
                jobs[fds[0]] = jobs[pidfd] = pid, fds[0], pidfd
                poll.register(fds[0], 0)  # 0: only the hang-up
                poll.register(pidfd, select.POLLIN)


def _fork(namespaces=0):
    """os.fork() by the bare system call: -1 on failure, and no at-fork hooks, whose page faults cost 0.5 ms.

    Safe because nothing below the caller has threads; glibc's copy of the thread id is set by the kernel.
    """
    where = ctypes.c_void_p()
    if libc.prctl(40, ctypes.byref(where), 0, 0, 0) or not NUMBERS:  # where glibc keeps the id of this thread
        raise OSError("no way to fork")
    flags = namespaces | 0x01200000 | signal.SIGCHLD  # set the id in the child, clear it when it ends
    return libc.syscall(NUMBERS[1], flags, 0, 0, where, where)  # twice: the order differs between machines


def _fork_keeper(sock, proc):
    """Fork a keeper on a socket, as process 1 of new namespaces if proc (an open /proc) is given; its pid, or -1."""
    uid, gid = os.geteuid(), os.getegid()
    pid = _fork(NAMESPACES if proc is not None else 0)
    if pid == 0:
        code = 1
        try:
            os.setsid()
            libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the zygote
            if proc is not None:
                _write_maps(proc, uid, gid)
                _mount("tmpfs", "/tmp", b"tmpfs", 6, TMP)
            if sock is None:
                _judge(compile("", "probe", "exec"), b"", b"", 1.0, True)
            else:
                _keeper_main(sock, proc is not None)
            code = 0
        finally:
            os._exit(code)
    return pid


# ---- 3. Keeper and leaf ----


def _keeper_main(sock, isolated):
    """Compile one program, run it on each input that arrives, report what came of it."""
    os.dup2(sock, 3)
    os.closerange(4, 1 << 12)
    sock = socket.socket(fileno=3)
    sock.sendall(b"r")
    timeout, memory_mb = json.loads(_recv(sock))
    source = _recv(sock).decode()
    for name, most in ("AS", BASE_BYTES + (memory_mb << 20)), ("NPROC", 64), ("CORE", 0), ("MEMLOCK", 0), ("NOFILE", 64):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    code, fault = None, "crash"
    try:
        code = compile(source, "<program>", "exec", dont_inherit=True)
    except MemoryError:
        fault = "memory"
    except BaseException:
        pass
    while True:
        call, stdin, out, value = _recv(sock), _recv(sock), -1, -1
        status, seconds = fault, 0.0
        if code is not None:
            try:
                status, seconds, out, value = _judge(code, call, stdin, timeout, isolated)
            except OSError:
                status = "infra"
        sizes = [os.fstat(fd).st_size if status == "ok" else 0 for fd in (out, value)]
        sock.sendall(struct.pack("!BdII", STATUS.index(status), seconds, *sizes))
        for fd, size in zip((out, value), sizes):
            sent = 0
            while sent < size:
                sent += os.sendfile(3, fd, sent, size - sent)
        os.closerange(4, 64)


def _judge(code, call, stdin, timeout, isolated):
    """Run one test in a fresh leaf: (status, CPU seconds, file of its output, file of its result)."""
    if isolated:
        if len(stdin) > OUTPUT_BYTES:
            _mount("none", "/tmp", None, 0x26, b"size=%d" % (len(stdin) + OUTPUT_BYTES))  # remount
        given = os.open("/tmp/stdin", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    else:
        given = os.memfd_create("stdin")
    out, value = os.memfd_create("out"), os.memfd_create("value")
    with open(given, "wb", closefd=False) as file:
        file.write(stdin)
    os.lseek(given, 0, os.SEEK_SET)
    pid = _checked(_fork())
    if pid == 0:
        os._exit(_leaf(code, call, timeout, (given, out, value)))
    pidfd, poll = os.pidfd_open(pid), select.poll()
    poll.register(pidfd, select.POLLIN)
    late = not poll.poll(1000 * (WALL_FACTOR * timeout + WALL_EXTRA))
    os.kill(pid, signal.SIGKILL)
    _, ended, usage = os.wait4(pid, 0)
    if isolated:
        _empty_tmp()
    seconds, by = usage.ru_utime + usage.ru_stime, os.WTERMSIG(ended)
    if by == signal.SIGXFSZ or max(os.fstat(fd).st_size for fd in (out, value)) >= OUTPUT_BYTES:
        status = "output"
    elif late or by in (signal.SIGPROF, signal.SIGXCPU) or seconds > timeout:
        status = "timeout"
    elif by == signal.SIGKILL or os.WEXITSTATUS(ended) == 86:  # the host's memory, or the program's own
        status = "memory"
    else:
        status = "crash" if ended else "ok"
    return status, seconds, out, value


def _empty_tmp():
    """Leave nothing for the next test: remove its input, or, where there is more, all of /tmp by a new mount."""
    try:
        os.unlink("/tmp/stdin")
        if not os.listdir("/tmp"):
            return
    except OSError:
        pass
    _checked(libc.umount2(b"/tmp", 2))
    _mount("tmpfs", "/tmp", b"tmpfs", 6, TMP)


def _leaf(code, call, timeout, files):
    """Seal this process, then run the program as a script, or call one function of it. Returns the exit code."""
    for target, fd in enumerate(files):
        os.dup2(fd, (0, 1, 3)[target])
    os.closerange(4, 1 << 12)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT_BYTES, OUTPUT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(timeout) + 1, math.ceil(timeout) + 2))
    signal.setitimer(signal.ITIMER_PROF, timeout)  # the exact limit; who tampers with it meets RLIMIT_CPU
    stack = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (min(120 << 20, stack) if stack >= 0 else 120 << 20, stack))
    os.chdir("/tmp" if os.path.isdir("/tmp") else "/")
    _seal()
    random.seed(0)
    name = "solution" if call else "__main__"
    scope = sys.modules["__main__"].__dict__
    scope["__name__"] = name
    failed = 0
    try:
        try:
            exec(code, scope)
            if call:
                function, args = json.loads(call)
                owner = scope.get("Solution")
                found = getattr(owner(), function) if hasattr(owner, function) else scope[function]
                result = json.dumps(found(*args), default=lambda item: item.tolist())  # numpy scalars and arrays
                with open(3, "w") as file:
                    file.write(result)
        except SystemExit:  # any exit() is a normal end, as in LiveCodeBench's runner
            pass
        threading._shutdown()  # a main thread may end before the thread that does the work
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.__stdout__.flush()
    except MemoryError:
        failed = 86
    except BaseException:
        failed = 1
    return failed


def _seal():
    """Drop every capability, then refuse the system calls of NUMBERS for good."""
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges
    _checked(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
    if NUMBERS:
        program = ctypes.create_string_buffer(FILTER, len(FILTER))
        _checked(libc.prctl(22, 2, struct.pack("HxxxxxxQ", len(FILTER) // 8, ctypes.addressof(program)), 0, 0))


def _seccomp_filter(arch, clone, clone3, prlimit64, refused):
    """BPF: allow all but fork, other processes' limits and `refused` (EPERM); clone3 is ENOSYS, so libc uses clone."""
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    rows = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, kill), (load, 0, 0, 0)]
    rows += [(at_least, 0, 1, 0x40000000), (end, 0, 0, eperm)]  # the x32 twins of every call
    for call, test, value in (clone, any_bit, 0x10000), (prlimit64, equal, 0):  # CLONE_THREAD; this process
        rows += [(equal, 0, 4, call), (load, 0, 0, 16), (test, 0, 1, value), (end, 0, 0, allow), (end, 0, 0, eperm)]
    rows += [(equal, 0, 1, clone3), (end, 0, 0, enosys)]
    refused = sorted(map(int, refused.split()))
    rows += [(equal, len(refused) - i, 0, call) for i, call in enumerate(refused)]  # jump to the last row
    return b"".join(struct.pack("HBBI", *row) for row in rows + [(end, 0, 0, allow), (end, 0, 0, eperm)])


FILTER = _seccomp_filter(*NUMBERS) if NUMBERS else b""
atexit.register(close)
os.register_at_fork(after_in_child=_forget)

if __name__ == "__main__":
    with open("/proc/self/statm") as file:
        BASE_BYTES = int(file.read().split()[0]) * resource.getpagesize() + (16 << 20)
    _zygote_main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
