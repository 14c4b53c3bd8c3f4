"""The sandbox gives every program its verdict, and nothing of a program outlives that verdict.

Guarded: honest programs pass whatever their style. No trick turns a wrong answer into a right one,
stalls the caller, or leaves a process, a file or a variable behind. The same table runs with
namespaces and in the degraded mode. What reaches beyond a program is tried without Landlock, too.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

import coderl
from verifiers import sandbox

SECRET = "7351928460"  # the expected output of every program that tries to find it
SUM = "3\n1 2 3\n"  # stdin of the honest programs; they print 6

HONEST = {  # style: source; every one reads SUM and prints 6
    "input": "n = int(input())\nprint(sum(map(int, input().split())))",
    "stdin iteration": (
        "import sys\nlines = [line for line in sys.stdin]\nprint(sum(map(int, lines[1].split())))"
    ),
    "open(0)": "data = open(0).read().split()\nprint(sum(map(int, data[1:])))",
    "/dev/stdin": "data = open('/dev/stdin').read().split()\nprint(sum(map(int, data[1:])))",
    "buffer": (
        "import sys\n"
        "data = sys.stdin.buffer.read().split()\n"
        "sys.stdout.buffer.write(b'%d\\n' % sum(map(int, data[1:])))"
    ),
    "os.read": "import os\nprint(sum(map(int, os.read(0, 10**6).split()[1:])))",
    "global counter": (
        "total = 0\n"
        "def add(x):\n"
        "    global total\n"
        "    total += x\n"
        "input()\n"
        "for x in input().split(): add(int(x))\n"
        "print(total)"
    ),
    "main guard": (
        "def main():\n"
        "    input()\n"
        "    print(sum(map(int, input().split())))\n"
        "if __name__ == '__main__':\n"
        "    main()"
    ),
    "prelude names": (
        "input()\nprint(reduce(lambda a, b: a + b, map(int, input().split()), Counter()['x']))"
    ),
    "exit after print": "input()\nprint(sum(map(int, input().split())))\nexit()",
    "sys.exit(1) after print": (
        "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.exit(1)"
    ),
    "thread with a big stack": (
        "import sys, threading\n"
        "sys.setrecursionlimit(10**6)\n"
        "threading.stack_size(1 << 27)\n"
        "def main():\n"
        "    input()\n"
        "    x = list(map(int, input().split()))\n"
        "    def f(i): return 0 if i == 30000 else f(i + 1)\n"
        "    print(sum(x) + f(0))\n"
        "threading.Thread(target=main).start()"
    ),
    "recursion through C": (
        "import functools, sys\n"
        "sys.setrecursionlimit(10**6)\n"
        "@functools.lru_cache(None)\n"
        "def f(i):\n"
        "    return 0 if i == 0 else f(i - 1)\n"
        "input()\n"
        "print(sum(map(int, input().split())) + f(20000))"
    ),
    "output at exit": (
        "import atexit, io, os, sys\n"
        "out = io.StringIO()\n"
        "sys.stdout = out\n"
        "atexit.register(lambda: os.write(1, out.getvalue().encode()))\n"
        "input()\n"
        "print(sum(map(int, input().split())))"
    ),
    "own file": (
        "input()\n"
        "open('x.txt', 'w').write(input())\n"
        "print(sum(map(int, open('x.txt').read().split())))"
    ),
    "modules": (
        "import bisect, cmath, copy, datetime, decimal, enum, fractions, heapq, "
        "queue, statistics, string, struct, typing\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class P:\n"
        "    x: int\n"
        "    y: 'int'\n"
        "input()\n"
        "print(sum(map(int, input().split())) + P(0, 0).x + decimal.Decimal(0))"
    ),
    "noise on stderr": (
        "import sys\n"
        "print('debug', file=sys.stderr)\n"
        "input()\n"
        "print(sum(map(int, input().split())))"
    ),
    "unicode and blanks": (
        "s = 'na\xefve \u4f60\u597d'\n"
        "input()\n"
        "print('  ', sum(map(int, input().split())), ' \\n\\n')"
    ),
    "arguments": (
        "import sys\n"
        "if len(sys.argv) > 1: sys.stdin = open(sys.argv[1])\n"
        "input()\n"
        "print(sum(map(int, input().split())) + 0 * len(__file__))"
    ),
    "closed at the end": (
        "import sys\ninput()\nprint(sum(map(int, input().split())))\nsys.stdout.close()"
    ),
    "float for int": "input()\nprint(float(sum(map(int, input().split()))))",
}

# {name: (source, verdicts of which it must get one)}; the expected output is SECRET.
BAD = {
    "wrong": ("print(SECRET := 1)", {"wrong"}),
    "nothing": ("pass", {"wrong"}),
    "one line too many": (f"print({SECRET[:-1]})\nprint(0)", {"wrong"}),
    "syntax error": ("def f(:\n  pass", {"crash"}),
    "exception": ("1 / 0", {"crash"}),
    "null byte": ("print(1)\0", {"crash"}),
    "deep nesting": ("x = " + "(" * 5000 + ")" * 5000, {"crash", "memory"}),
    "exit before output": ("import os\nos._exit(0)", {"wrong"}),
    "sys.exit(0) before output": ("import sys\nsys.exit(0)", {"wrong"}),
    "endless loop": ("while True: pass", {"timeout"}),
    "endless loop in C": ("sum(iter(int, 1))", {"timeout"}),
    "sleep": ("import time\ntime.sleep(1000)", {"timeout"}),
    "sleep, signals ignored": (
        (
            "import signal, time\n"
            "for s in range(1, 65):\n"
            "    try: signal.signal(s, signal.SIG_IGN)\n"
            "    except: pass\n"
            "while True: time.sleep(0.1)"
        ),
        {"timeout"},
    ),
    "loop, timers and limits tampered": (
        (
            "import resource, signal\n"
            "for t in (0, 1, 2): signal.setitimer(t, 0)\n"
            "try: resource.setrlimit(resource.RLIMIT_CPU, (-1, -1))\n"
            "except Exception: pass\n"
            "while True: pass"
        ),
        {"timeout"},
    ),
    "catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"timeout"},
    ),
    "time bomb in the compiler": (
        "x = " + "-" * 3000 + "1\n" + "y = (" + "1 +" * 200000 + "1)",
        {"crash", "memory", "timeout", "wrong"},
    ),
    "power bomb": ("print(len(str(9 ** 9 ** 9)))", {"timeout", "memory", "crash"}),
    "regex bomb": ("import re\nre.match('(a+)+$', 'a' * 50 + 'b')", {"timeout"}),
    "thread that never ends": (
        "import threading\ndef f():\n    while True: pass\nthreading.Thread(target=f).start()",
        {"timeout"},
    ),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"timeout"},
    ),
    "fork": ("import os\nos.fork()\nprint(1)", {"crash"}),
    "fork by ctypes": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nwhile libc.fork() < 0: pass",
        {"timeout"},
    ),
    "vfork, clone, clone3 by number": (
        (
            "import ctypes\n"
            "libc = ctypes.CDLL(None)\n"
            "print([libc.syscall(n, 17, 0, 0, 0, 0) for n in (56, 57, 58, 435, 220)])"
        ),
        {"wrong", "crash"},
    ),
    "thread bomb": (
        (
            "import threading, time\n"
            "while True:\n"
            "    try: threading.Thread(target=time.sleep, args=(1000,)).start()\n"
            "    except Exception: pass"
        ),
        {"timeout", "memory"},
    ),
    "double fork survivor": (
        (
            "import os, time\n"
            "if os.fork() == 0:\n"
            "    os.setsid()\n"
            "    if os.fork() == 0:\n"
            "        time.sleep(60)\n"
            "print(1)"
        ),
        {"crash"},
    ),
    "daemon survivor": (
        "import subprocess\nsubprocess.Popen(['sleep', '61'], start_new_session=True)",
        {"crash"},
    ),
    "exec": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo 1'])", {"crash"}),
    "multiprocessing": (
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        {"crash"},
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(1 << 24))", {"memory"}),
    "one big list": ("x = [0] * 10**11", {"memory"}),
    "memory bomb that catches": (
        "x = []\nwhile True:\n    try: x.append(bytearray(1 << 20))\n    except MemoryError: pass",
        {"timeout", "memory"},
    ),
    "own CPU limit": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True: pass",
        {"memory", "timeout", "crash"},
    ),
    "memory in /tmp": (
        "i = 0\nwhile True:\n    open(f'f{i}', 'wb').write(b'x' * (1 << 22))\n    i += 1",
        {"crash"},
    ),
    "many files": ("for i in range(10**6): open(f'f{i}', 'w')", {"crash"}),
    "memory files": (
        "import os\nwhile True: os.write(os.memfd_create('x'), b'x' * (1 << 20))",
        {"crash"},
    ),
    "shared memory": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.shmget(0, 1 << 30, 0o1600) >= 0",
        {"crash"},
    ),
    "endless output": ("while True: print('x' * 1000)", {"output"}),
    "endless output that catches": (
        "import os\nwhile True:\n    try: os.write(1, b'x' * 65536)\n    except OSError: pass",
        {"output", "timeout"},
    ),
    "segfault": ("import ctypes\nctypes.string_at(0)", {"crash"}),
    "abort": ("import os\nos.abort()", {"crash"}),
    "stack overflow in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: [*map(lambda _: f(), [0])]\nf()",
        {"crash", "memory", "timeout"},
    ),
    "equal to everything": (
        "class A:\n    __eq__ = lambda s, o: True\n    __str__ = lambda s: ''\nprint(A())",
        {"wrong"},
    ),
    "patched json and builtins": (
        (
            "import builtins, json, sys\n"
            "json.dumps = json.loads = lambda *a, **k: True\n"
            "builtins.all = builtins.any = lambda *a: True\n"
            "builtins.str = type('S', (str,), {'__eq__': lambda s, o: True})\n"
            "print(str('x'))"
        ),
        {"wrong"},
    ),
    "patched os._exit and sandbox": (
        (
            "import os, sys\n"
            "os._exit = lambda c: None\n"
            "m = sys.modules.get('sandbox')\n"
            "for n in list(vars(m) if m else ()):\n"
            "    if callable(getattr(m, n)): setattr(m, n, lambda *a, **k: 0)\n"
            "print(0)"
        ),
        {"wrong", "crash"},
    ),
    "closes every descriptor": ("import os\nos.closerange(0, 100)", {"wrong", "crash"}),
    "writes to every descriptor": (
        (
            "import os\n"
            "for fd in range(1, 64):\n"
            "    for text in (b'ok', b'{\"status\": \"ok\"}', b'e' + bytes(12), b'v\\0\\0\\0\\1' "
            "+ b'1'):\n"
            "        try: os.write(fd, text)\n"
            "        except OSError: pass"
        ),
        {"wrong"},
    ),
    "cuts its lines": (
        (
            "import os, socket\n"
            "for fd in range(64):\n"
            "    try: socket.socket(fileno=fd).shutdown(2)\n"
            "    except OSError: pass"
        ),
        {"wrong", "crash"},
    ),
    "kill parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", {"crash"}),
    "kill -1": ("import os\nos.kill(-1, 9)", {"crash"}),
    "kill by ctypes": (
        (
            "import ctypes\n"
            "libc = ctypes.CDLL(None)\n"
            "assert [libc.kill(p, 9) for p in (-1, 0, 1, 2)] != [-1] * 4"
        ),
        {"crash"},
    ),
    "renice and limit others": (
        "import os, resource\nresource.prlimit(os.getppid() or 1, resource.RLIMIT_NOFILE, (1, 1))",
        {"crash"},
    ),
    "network": ("import socket\ns = socket.create_connection(('1.1.1.1', 53), 2)", {"crash"}),
    "local network": ("import socket\ns = socket.socket(socket.AF_UNIX)", {"crash"}),
    "new namespaces": (
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
        {"crash"},
    ),
    "mount": (
        "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
        {"crash"},
    ),
    "ptrace": ("import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0", {"crash"}),
}

# Programs that look for SECRET and print the first one they find. None may find it.
THIEVES = {
    "stack walk": (
        "import sys\n"
        "f = sys._getframe()\n"
        "while f:\n"
        "    found.append(repr(f.f_locals) + repr(f.f_globals))\n"
        "    f = f.f_back"
    ),
    "gc walk": (
        "import gc\n"
        "for o in gc.get_objects():\n"
        "    try: found.append(repr(o)[:10**5])\n"
        "    except Exception: pass"
    ),
    "modules": (
        "import sys\nfor m in list(sys.modules.values()): found.append(repr(vars(m))[:10**6])"
    ),
    "environment": (
        "import os\n"
        "found.append(repr(os.environ))\n"
        "for p in ('self', '1', str(os.getppid())):\n"
        "    try: found.append(open(f'/proc/{p}/environ').read())\n"
        "    except OSError: pass"
    ),
    "memory of every process": (
        "import os\n"
        "for p in os.listdir('/proc'):\n"
        "    try:\n"
        "        for line in open(f'/proc/{p}/maps'):\n"
        "            a, b = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "            f = open(f'/proc/{p}/mem', 'rb')\n"
        "            f.seek(a)\n"
        "            found.append(f.read(b - a).decode('latin1'))\n"
        "    except OSError: pass"
    ),
    "memory by process_vm_readv": (
        "import ctypes, os, struct\n"
        "libc = ctypes.CDLL(None)\n"
        "b = ctypes.create_string_buffer(4096)\n"
        "for pid in range(1, 2000):\n"
        "    v = struct.pack('QQ', ctypes.addressof(b), 4096)\n"
        "    r = struct.pack('QQ', id(b), 4096)\n"
        "    if libc.process_vm_readv(pid, v, 1, r, 1, 0) > 0 and pid != "
        "os.getpid(): found.append(b.raw.decode('latin1'))"
    ),
    "own memory": "for line in open('/proc/self/maps'): pass",
    "files": (
        "import os\n"
        "for top in ('/tmp', '/root', '/home', '/work', '/etc', '/dev/shm', '/proc', "
        "'.'):\n"
        "    for d, _, fs in os.walk(top):\n"
        "        for f in fs[:50]:\n"
        "            try: found.append(open(os.path.join(d, f), "
        "errors='replace').read(10**5))\n"
        "            except OSError: pass"
    ),
    "descriptors": (
        "import os\n"
        "for fd in range(64):\n"
        "    try: found.append(os.pread(fd, 10**6, 0).decode('latin1'))\n"
        "    except OSError: pass"
    ),
    "parent's socket": (
        "import os\n"
        "for fd in range(3, 64):\n"
        "    try: found.append(os.read(fd, 10**6).decode('latin1'))\n"
        "    except OSError: pass"
    ),
}
SEARCH = (
    "import re\n"
    "for text in found:\n"
    "    for hit in re.findall(r'735192[0-9]+', text): print(hit); raise SystemExit"
)

# {name: (source, function, argument lines, expected JSON, verdicts of which it must get one)}
CALLS = {
    "function": ("def f(a, b): return a + b", "1\n2", "3", {"ok"}),
    "Solution method": (
        "class Solution:\n    def f(self, a: List[int], b: Optional[int]) -> int: return a[0] + b",
        "[1]\n2",
        "3",
        {"ok"},
    ),
    "tuple for list": ("def f(a, b): return (a, (b,))", "1\n2", "[1, [2]]", {"ok"}),
    "float within tolerance": ("def f(a, b): return a / 3", "1\n2", "0.333333", {"ok"}),
    "int for float": ("def f(a, b): return 3", "1\n2", "3.0", {"ok"}),
    "True for 1": ("def f(a, b): return True", "1\n2", "1", {"wrong"}),
    "text for number": ("def f(a, b): return '3'", "1\n2", "3", {"wrong"}),
    "nan": ("def f(a, b): return float('nan')", "1\n2", "3.0", {"wrong"}),
    "infinity": ("def f(a, b): return float('inf')", "1\n2", "3.0", {"wrong"}),
    "prints a lot": ("def f(a, b):\n    print('x' * 100000)\n    return 3", "1\n2", "3", {"ok"}),
    "long result": ("def f(a, b): return [0] * 500000", "1\n2", json.dumps([0] * 500000), {"ok"}),
    "equal to everything": (
        (
            "class A(int):\n"
            "    __eq__ = lambda s, o: True\n"
            "    __hash__ = int.__hash__\n"
            "def f(a, b): return A(7)"
        ),
        "1\n2",
        "3",
        {"wrong"},
    ),
    "no JSON": (
        "class A:\n    __eq__ = lambda s, o: True\ndef f(a, b): return A()",
        "1\n2",
        "3",
        {"crash"},
    ),
    "item that lies": (
        "class A:\n    def tolist(self): return self\ndef f(a, b): return A()",
        "1\n2",
        "3",
        {"crash"},
    ),
    "missing function": ("def g(a, b): return 3", "1\n2", "3", {"crash"}),
    "too few arguments": ("def f(a): return 3", "1\n2", "3", {"crash"}),
    "exit in call": ("import os\ndef f(a, b): os._exit(0)", "1\n2", "3", {"crash"}),
    "sys.exit in call": ("import sys\ndef f(a, b): sys.exit(0)", "1\n2", "3", {"crash"}),
    "forged frames": (
        "import os\ndef f(a, b):\n    os.write(3, b'e' + bytes(12))\n    return 3",
        "1\n2",
        "3",
        {"crash"},
    ),
    "forged garbage": (
        "import os\ndef f(a, b):\n    os.write(3, b'v\\xff\\xff\\xff\\xff')\n    return 3",
        "1\n2",
        "3",
        {"output"},
    ),
    "promises and stalls": (
        "import os, time\ndef f(a, b):\n    os.write(3, b'v\\0\\0\\1\\0x')\n    time.sleep(1000)",
        "1\n2",
        "3",
        {"timeout"},
    ),
    "shuts the line": (
        "import socket\ndef f(a, b): socket.socket(fileno=3).shutdown(2)",
        "1\n2",
        "3",
        {"crash"},
    ),
    "floods the line": (
        "import os\ndef f(a, b):\n    while True: os.write(3, b'x' * 65536)",
        "1\n2",
        "3",
        {"crash", "timeout"},
    ),
    "endless": ("def f(a, b):\n    while True: pass", "1\n2", "3", {"timeout"}),
    "deep result": (
        "def f(a, b):\n    x = []\n    for _ in range(900): x = [x]\n    return x",
        "1\n2",
        "[[]]",
        {"wrong", "crash"},
    ),
    "huge int": ("def f(a, b): return 10 ** 5000", "1\n2", "3", {"wrong", "crash"}),
    "recursive result": (
        "def f(a, b):\n    x = []\n    x.append(x)\n    return x",
        "1\n2",
        "3",
        {"crash"},
    ),
}


def stdin_tests(stdin, expected):
    return {"inputs": [stdin], "outputs": [expected], "fn_name": None}


def leaves():
    """Processes of this caller's sandbox, its zygote included, and orphans under process 1."""
    commands, parents = {}, {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as command, open(f"/proc/{pid}/stat") as stat:
                command_line = command.read()
                parent = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            continue  # the process has ended
        commands[int(pid)] = command_line
        parents[int(pid)] = parent

    def top(pid):
        """The first ancestor that is no process of a sandbox."""
        parent = parents[pid]
        if b"/sandbox.py\0" in commands.get(parent, b""):
            return top(parent)
        return parent

    mine = [
        pid
        for pid, command in commands.items()
        if b"/sandbox.py\0" in command and top(pid) in (1, os.getpid())
    ]
    return mine + [pid for pid, command in commands.items() if command.startswith(b"sleep\x0061")]


# The sandbox's name of each mode that the tests below name.
MODES = {"full": "full", "degraded": "landlock", "bare": "bare"}


@pytest.fixture(scope="module", params=["full", "degraded"])
def mode(request):
    """The whole table with namespaces and without."""
    return request.param


@pytest.fixture(scope="module", params=MODES)
def any_mode(request):
    """With namespaces, with Landlock alone, and without Landlock."""
    return request.param


ONLY_DEGRADED = pytest.mark.parametrize("any_mode", ["degraded"], indirect=True)
ONLY_BARE = pytest.mark.parametrize("any_mode", ["bare"], indirect=True)


@pytest.fixture(autouse=True)
def sandbox_mode(request, monkeypatch):
    """Switch the sandbox to the mode of the test, where this host has it."""
    named = {"mode", "any_mode"} & set(request.fixturenames)
    wanted = "full"
    for name in named:
        wanted = MODES[request.getfixturevalue(name)]
        # a shorter wall limit for the programs that sleep
        monkeypatch.setattr(sandbox, "WALL_EXTRA", 1.5)
    if wanted == "bare":
        monkeypatch.setenv("SANDBOX_ALLOW_WEAK", "1")
    if sandbox._mode != wanted:
        sandbox.close()
        sandbox._mode = wanted
    if named:
        sandbox.run("pass")
        if sandbox._mode != wanted:
            pytest.skip(f"this host has no mode {wanted!r}")


@pytest.mark.parametrize("style", HONEST)
def test_an_honest_program_passes_whatever_its_style(mode, style):
    # Without a mount namespace a program has no folder to write to.
    possible = mode == "full" or style != "own file"
    assert coderl.run_tests(HONEST[style], stdin_tests(SUM, "6\n"), 5.0) == [
        "ok" if possible else "crash"
    ]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_program_gets_the_verdict_it_deserves(mode, name):
    source, verdicts = BAD[name]
    before, started = sandbox._zygote[0].pid, time.monotonic()
    # The first use of memory can be slow in a virtual machine.
    seconds = 3.0 if verdicts == {"memory"} else 0.3
    got = coderl.run_tests(source, stdin_tests("1\n", SECRET), seconds, memory_mb=96)
    took = time.monotonic() - started
    print(f"{name}: {got} in {took:.2f} s")
    assert set(got) <= verdicts and took < 6
    assert sandbox._zygote[0].pid == before and sandbox._zygote[0].poll() is None, (
        "it brought the zygote down"
    )


@pytest.mark.parametrize("name", THIEVES)
def test_the_expected_output_is_nowhere_to_be_found(mode, name):
    source = (
        "found = []\ntry:\n"
        + "".join(f"    {line}\n" for line in THIEVES[name].split("\n"))
        + "except Exception: pass\n"
        + SEARCH
    )
    assert coderl.run_tests(source, stdin_tests("1\n", SECRET), 5.0)[0] in (
        "wrong",
        "timeout",
        "crash",
        "memory",
    )


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_compared_as_json_values_of_exact_types(mode, name):
    source, given, expected, verdicts = CALLS[name]
    got = coderl.run_tests(source, {"inputs": [given], "outputs": [expected], "fn_name": "f"}, 0.3)
    assert set(got) <= verdicts, got


def test_numpy_results_count_as_json(mode):
    pytest.importorskip("numpy")
    source = "import numpy as np\ndef f(a): return np.array(a) * 2"
    assert coderl.run_tests(
        source, {"inputs": ["[1, 2]"], "outputs": ["[2, 4]"], "fn_name": "f"}, 5.0
    ) == ["ok"]


def test_nothing_outlives_its_verdict(mode):
    folders = [name for name in ("/tmp", "/var/tmp", "/dev/shm", ".", "/") if os.path.isdir(name)]
    litter = (
        f"for d in {folders}:\n"
        f"    try: open(d + '/litter-{os.getpid()}', 'w').close()\n"
        "    except OSError: pass"
    )
    assert sandbox.run(litter).status == "ok"
    for name in (
        "double fork survivor",
        "daemon survivor",
        "endless loop",
        "thread bomb",
        "memory in /tmp",
        "sleep, signals ignored",
    ):
        coderl.run_tests(BAD[name][0], stdin_tests("", SECRET), 0.2, memory_mb=256)
    deadline = time.monotonic() + 5
    while len(leaves()) > 1 and time.monotonic() < deadline:  # 1: the zygote
        time.sleep(0.02)
    assert leaves() == [sandbox._zygote[0].pid]
    left = {"f0", "stdin", "x.txt", f"litter-{os.getpid()}"}
    assert not any(left & set(os.listdir(name)) for name in folders)


def test_a_program_sees_no_variable_and_no_folder_of_the_host(mode, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    sandbox.close()
    seen = sandbox.run("import os\nprint(sorted(os.environ))").stdout
    assert "HF_TOKEN" not in seen and "HOME" not in seen and "USER" not in seen
    listing = sandbox.run(
        "import os\n"
        "for d in ('/root', '/home', '/etc', '/proc', os.getcwd()):\n"
        "    try: print(d, os.listdir(d))\n"
        "    except OSError: print(d)"
    )
    print(listing.stdout)
    assert "passwd" not in listing.stdout and "sandbox.py" not in listing.stdout


def test_leaves_share_nothing(mode):
    first = "import os\nopen('left.txt', 'w').write('x')\nprint(1)"
    second = "import os\nprint(os.path.exists('left.txt'), os.listdir('.'))"
    assert sandbox.run(first).status == ("ok" if mode == "full" else "crash")
    assert sandbox.run(second).stdout == ("False ['stdin']\n" if mode == "full" else "")


def test_every_call_of_a_program_is_judged_and_a_failure_does_not_spoil_the_next():
    source = "def f(x):\n    if x == 1: 1 / 0\n    while x == 2: pass\n    return x"
    tests = {
        "inputs": ["0", "1", "2", "3", "4"],
        "outputs": ["0", "1", "2", "3", "5"],
        "fn_name": "f",
    }
    assert coderl.run_tests(source, tests, 0.3) == ["ok", "crash", "timeout", "ok", "wrong"]
    assert coderl.run_tests(source, tests, 0.3, stop=True) == ["ok", "crash"]


@pytest.mark.parametrize(
    "source, expected",
    [
        # The list is never emptied, but each call of the tests runs in a process of its own.
        ("seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)", "1"),
        ("def f(x, seen=[]):\n    seen.append(x)\n    return len(seen)", "1"),
        (
            (
                "class Solution:\n"
                "    n = 0\n"
                "    def f(self, x):\n"
                "        Solution.n += 1\n"
                "        return self.n"
            ),
            "1",
        ),
        (
            (
                "import os\n"
                "def f(x):\n"
                "    os.environ['X'] = os.environ.get('X', '') + 'x'\n"
                "    return len(os.environ['X'])"
            ),
            "1",
        ),
        (
            (
                "import json\n"
                "def f(x):\n"
                "    old = getattr(json, 'old', 0)\n"
                "    json.old = old + 1\n"
                "    return json.old"
            ),
            "1",
        ),
        (
            (
                "import os\n"
                "def f(x):\n"
                "    try: open('n', 'a').write('x')\n"
                "    except OSError: return 1\n"
                "    return os.path.getsize('n')"
            ),
            "1",
        ),
    ],
)
def test_no_test_leaves_anything_to_the_next(mode, source, expected):
    tests = {"inputs": ["5"] * 3, "outputs": [expected] * 3, "fn_name": "f"}
    assert coderl.run_tests(source, tests, 5.0) == ["ok"] * 3


def test_the_same_program_gets_the_same_verdict_in_every_run():
    source = "import random\nprint(hash('x'), random.random())"
    first = sandbox.run(source).stdout
    sandbox.close()
    assert sandbox.run(source).stdout == first


def test_limits_are_cpu_seconds_and_memory_counts():
    burn = (
        "import time\n"
        "end = time.process_time() + {}\n"
        "while time.process_time() < end: pass\n"
        "print(1)"
    )
    assert sandbox.run(burn.format(0.2), timeout=0.5).status == "ok"
    assert sandbox.run(burn.format(0.6), timeout=0.5).status == "timeout"
    assert sandbox.run("x = bytearray(100 << 20)", memory_mb=200).status == "ok"
    assert sandbox.run("x = bytearray(300 << 20)", memory_mb=200).status == "memory"
    assert (
        sandbox.run("print('x' * (10 << 20))").status == "ok"
        and sandbox.run("print('x' * (17 << 20))").status == "output"
    )


def test_big_inputs_arrive_whole():
    text = "0123456789\n" * 4_000_000  # 44 MB
    assert sandbox.run("import sys\nprint(len(sys.stdin.read()))", text).stdout == f"{len(text)}\n"


def test_a_killed_zygote_costs_no_verdict():
    sandbox.run("pass")
    killer = threading.Timer(0.3, lambda: os.kill(sandbox._zygote[0].pid, signal.SIGKILL))
    killer.start()
    result = sandbox.run("import time\ntime.sleep(0.6)\nprint(1)")
    assert (result.status, result.stdout) == ("ok", "1\n")


def test_what_no_program_can_cause_is_infra(monkeypatch):
    sandbox.close()
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    assert sandbox.run("print(1)").status == "infra"
    assert coderl.reward("</think>\n```python\nprint(1)\n```", stdin_tests("", "1")) == 0
    assert coderl.verdict("</think>\n```python\nprint(1)\n```", stdin_tests("", "1"))[1] == "infra"


def test_a_forked_caller_gets_its_own_zygote():
    sandbox.run("pass")
    mine = sandbox._zygote[0].pid
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        ok = sandbox.run("print(1)").stdout == "1\n" and sandbox._zygote[0].pid != mine
        sandbox.close()
        os.write(write, b"y" if ok else b"n")
        os._exit(0)
    assert os.read(read, 1) == b"y" and os.waitpid(child, 0)[1] == 0
    assert sandbox.run("print(2)").stdout == "2\n" and sandbox._zygote[0].pid == mine


def test_the_zygote_ends_with_a_killed_caller():
    code = (
        "import sandbox, time\n"
        "sandbox.run('pass')\n"
        "print(sandbox._zygote[0].pid, flush=True)\n"
        "sandbox.run('import time; time.sleep(99)', timeout=50)"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=os.path.dirname(sandbox.__file__)
    )
    zygote = int(caller.stdout.readline())
    time.sleep(0.3)
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 5
    while zygote in leaves() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert zygote not in leaves()


@pytest.mark.parametrize("mode_name", MODES)
def test_an_ordinary_user_has_the_same_sandbox(tmp_path, mode_name):
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if os.geteuid() != 0 or not python:
        pytest.skip(
            "needs root, to become somebody else, and a system interpreter that everybody can read"
        )
    folder = tmp_path / "open"
    folder.mkdir()
    for path in (folder, *list(folder.parents)[:3]):
        if os.stat(path).st_uid == 0 and str(path) not in ("/", "/tmp"):
            path.chmod(0o755)
    shutil.copy(sandbox.__file__, folder / "sandbox.py")
    code = (
        "import os, sandbox\n"
        f"sandbox._mode = {MODES[mode_name]!r}\n"
        "me = os.getpid()\n"
        "for s in ('print(6 * 7)', 'while 1: pass', 'import os; os.fork()',\n"
        "          'open(\"/etc/passwd\")', 'import socket; socket.socket()',\n"
        '          f\'open("/proc/{me}/mem", "rb")\',\n'
        "          f'import os; os.sched_setscheduler({me}, os.SCHED_IDLE, os.sched_param(0))'):\n"
        "    print(sandbox.run(s, timeout=0.3).status)\n"
        "print(sandbox.run('def f(a): return a', call=('f', [[1]])).value)"
    )
    done = subprocess.run(
        [python, "-c", code],
        cwd=folder,
        user=12345,
        group=12345,
        extra_groups=[],
        env={"PATH": os.environ["PATH"], "SANDBOX_ALLOW_WEAK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["ok", "timeout", *["crash"] * 5, "[1]"], done.stderr
    assert mode_name == "full" or "DEGRADED" in done.stderr


def test_the_degraded_mode_is_announced_once(capfd):
    sandbox.close()
    sandbox._mode, sandbox._announced = "landlock", False
    sandbox.run("pass")
    sandbox.close()
    sandbox.run("pass")
    assert capfd.readouterr().err.count("DEGRADED") == 1


# ---- What reaches beyond a program, in every mode ------------------------------------------------
# Every one of these has to raise an exception or to print something else than "done".
BEYOND = {
    "affinity of the zygote": "os.sched_setaffinity(zygote, {min(os.sched_getaffinity(0))})",
    "affinity of itself": "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
    "scheduler of the zygote": "os.sched_setscheduler(zygote, os.SCHED_IDLE, os.sched_param(0))",
    "scheduler of the caller": "os.sched_setscheduler(caller, os.SCHED_IDLE, os.sched_param(0))",
    "scheduling attributes": "check(libc.syscall(314, 0, bytes([48]) + bytes(47), 0))",
    "I/O priority of the user": "check(libc.syscall(251, 3, os.getuid(), 3 << 13))",
    "I/O priority of the zygote": "check(libc.syscall(251, 1, zygote, 3 << 13))",
    "pages of the caller": "check(libc.syscall(256, caller, 64, b'1' + bytes(7), b'1' + bytes(7)))",
    "the host's AIO slots": "check(libc.syscall(206, 1, ctypes.byref(ctypes.c_ulong())))",
    "signals by a pipe": (
        "import fcntl\nread, write = os.pipe()\nfcntl.fcntl(read, fcntl.F_SETOWN, zygote)\n"
    ),
    "signals by a pipe, extended": (
        "import fcntl, struct\n"
        "read, write = os.pipe()\n"
        "fcntl.fcntl(read, 15, struct.pack('ii', 1, zygote))\n"
    ),
    "signals by ioctl": (
        "import fcntl, struct\n"
        "read, write = os.pipe()\n"
        "fcntl.ioctl(read, 0x8901, struct.pack('i', zygote))\n"
    ),
    "a message to a socket of the host": (
        "import socket\n"
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', data + '.sock')\n"
    ),
    "shared memory of others": "check(libc.shmat(0, None, 0))",
    "watching folders": "check(libc.inotify_init1(0))",
    "segment tables": "check(libc.syscall(154, 0, ctypes.create_string_buffer(16), 16))",
    "its memory for others": "check(libc.prctl(4, 1, 0, 0, 0))",
    "a core": "resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))",
    "locked memory": "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))",
    "a call of a newer kernel": "libc.syscall(463, 0, 0, 0, 0, 0); assert ctypes.get_errno() != 38",
    "mode of a data file": "os.chmod(data, 0)",
    "times of a data file": "os.utime(data)",
    "owner of a data file": "os.chown(data, os.getuid(), os.getgid())",
    "size of a data file": "os.truncate(data, 0)",
    "attributes of a data file": "os.setxattr(data, 'user.x', b'x')",
    "a data file": "check(0 if open(data).read() else -1)",
    "a data file by another root": "check(0 if open(f'/proc/{zygote}/root' + data).read() else -1)",
    "a data file by ctypes": "check(libc.open(data.encode(), 0))",
    "a data file by its folder": (
        "fd = os.open(os.path.dirname(data), os.O_RDONLY)\n"
        "os.open(os.path.basename(data), os.O_RDONLY, dir_fd=fd)\n"
    ),
    "memory of the zygote": "open(f'/proc/{zygote}/mem', 'rb')",
    "memory of the zygote, to write": "open(f'/proc/{zygote}/mem', 'r+b')",
    "memory of the caller": "open(f'/proc/{caller}/mem', 'rb')",
    "the caller's environment": "check(0 if open(f'/proc/{caller}/environ').read() else -1)",
    "a file in shared memory": "open('/dev/shm/left', 'w')",
    "a file in the temporary folder": "open('/var/tmp/left', 'w')",
    "a link to a data file": "os.symlink(data, '/var/tmp/left'); os.link(data, '/var/tmp/left2')",
}
BEYOND_START = (
    "import ctypes, os, resource\n"
    "libc = ctypes.CDLL(None, use_errno=True)\n"
    "zygote, caller, data = {zygote}, {caller}, {data!r}\n"
    "def check(result):\n"
    "    if result < 0: raise OSError(ctypes.get_errno(), 'refused')\n"
)


def beyond(name, data):
    """The program that tries one of BEYOND."""
    start = BEYOND_START.format(zygote=sandbox._zygote[0].pid, caller=os.getpid(), data=data)
    return f"{start}{BEYOND[name]}\nprint('done')"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """A data file that everybody may read and write, with a socket beside it.

    Both belong to the user of the programs if the caller is root, as they do if it is not.
    """
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(SECRET)
    path.chmod(0o666)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(f"{path}.sock")
    os.chmod(f"{path}.sock", 0o666)
    if os.geteuid() == 0:
        os.chown(path, sandbox.NOBODY, sandbox.NOBODY)
    for folder in path.parents:
        if str(folder) not in ("/", "/tmp"):
            folder.chmod(0o755)
    yield str(path)
    listener.close()


@pytest.mark.parametrize("name", BEYOND)
def test_nothing_beyond_a_program_is_in_its_reach(any_mode, data_file, name):
    if "syscall" in BEYOND[name] and os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    before = sandbox._zygote[0].pid
    result = sandbox.run(beyond(name, data_file), timeout=2.0)
    assert (result.status, result.stdout) == ("crash", "")
    assert sandbox._zygote[0].pid == before and sandbox._zygote[0].poll() is None
    assert os.sched_getaffinity(before) == os.sched_getaffinity(0)
    assert os.sched_getscheduler(before) == os.sched_getscheduler(0)
    with open(data_file) as file:
        assert file.read() == SECRET


def test_reading_the_training_data_earns_nothing(any_mode, data_file):
    source = f"print(open({data_file!r}).read())"
    assert coderl.reward(f"</think>\n```python\n{source}\n```", stdin_tests("1\n", SECRET)) == 0


@ONLY_BARE
@pytest.mark.parametrize("style", HONEST)
def test_an_honest_program_that_opens_no_file_passes_without_landlock(any_mode, style):
    verdict = coderl.run_tests(HONEST[style], stdin_tests(SUM, "6\n"), 5.0)
    assert verdict == ["crash" if style in ("own file", "/dev/stdin") else "ok"]


@pytest.mark.slow
@ONLY_BARE
@pytest.mark.parametrize("name", THIEVES)
def test_the_expected_output_is_nowhere_to_be_found_without_landlock(any_mode, name):
    body = "".join(f"    {line}\n" for line in THIEVES[name].split("\n"))
    source = f"found = []\ntry:\n{body}except Exception: pass\n{SEARCH}"
    assert coderl.run_tests(source, stdin_tests("1\n", SECRET), 5.0) != ["ok"]


def test_the_usual_modules_are_there_in_every_mode(any_mode):
    modules = (
        "abc array ast asyncio base64 binascii bisect calendar cmath collections copy csv ctypes "
        "dataclasses datetime decimal difflib enum fractions functools hashlib heapq io itertools "
        "json logging math operator pickle pprint queue random re secrets statistics string struct "
        "tempfile textwrap threading time typing unicodedata uuid zlib"
    )
    source = f"from __future__ import annotations\nimport {', '.join(modules.split())}\nprint(1)"
    assert sandbox.run(source).stdout == "1\n"


@ONLY_DEGRADED
def test_a_folder_that_programs_may_not_enter_is_named(any_mode, capfd):
    sandbox.close()
    sandbox._announced = False
    sandbox.run("pass")
    said = capfd.readouterr().err
    print(said)
    parents = [os.path.dirname(os.__file__)]
    while parents[-1] != "/":
        parents.append(os.path.dirname(parents[-1]))
    closed = os.geteuid() == 0 and not all(os.stat(path).st_mode & 1 for path in parents)
    assert ("can import the usual modules only" in said) == closed


@ONLY_DEGRADED
def test_a_program_may_have_threads_whatever_others_have(any_mode):
    many = (
        "import threading, time\n"
        "threading.stack_size(1 << 16)\n"
        "for _ in range(62): threading.Thread(target=time.sleep, args=(1,)).start()"
    )
    one = "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()"
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(sandbox.run, many)
        time.sleep(0.3)
        verdicts = [sandbox.run(one).status for _ in range(5)]
        assert not busy.done()
    assert (busy.result().status, verdicts) == ("ok", ["ok"] * 5)


@ONLY_DEGRADED
def test_threads_are_counted_where_the_kernel_counts_a_user(any_mode):
    bomb = (
        "import threading, time\n"
        "threading.stack_size(1 << 15)\n"
        "for i in range(10**6): threading.Thread(target=time.sleep, args=(9,)).start()"
    )
    most, done = 0, threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.run, bomb, timeout=5.0)
        running.add_done_callback(lambda _: done.set())
        while not done.is_set():
            counts = [num_threads(pid) for pid in leaves()]
            most = max([most, *counts])
    print(f"{most} threads at most, {running.result().seconds:.2f} s of CPU")
    assert running.result().status == "memory" and most < 4000


@pytest.mark.parametrize(
    "release, counts", [("4.18.0", False), ("5.13.19-x", False), ("5.14.0-1", True), ("6.1", True)]
)
def test_old_kernels_count_a_user_in_every_namespace(monkeypatch, release, counts):
    name = types.SimpleNamespace(release=release)
    monkeypatch.setattr(sandbox.os, "uname", lambda: name)
    assert sandbox._threads_are_per_namespace() == counts


def num_threads(pid):
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def test_the_host_kills_programs_first_when_its_memory_is_full(any_mode):
    with open(f"/proc/{sandbox._zygote[0].pid}/oom_score_adj") as file:
        assert file.read() == "1000\n"


def test_a_crash_writes_no_core(any_mode):
    source = (
        "import ctypes, resource\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    assert sandbox.run(source).stdout == "(0, 0) 0\n"


# ---- The filter of system calls, on both architectures -------------------------------------------
def filtered(machine, tables, number, *arguments):
    """What a kernel of this architecture answers to a call, by running the filter."""
    arguments = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<iIQ6Q", number, machine.audit_arch, 0, *arguments)
    code = sandbox._seccomp_filter(machine, *tables)
    rows = [struct.unpack_from("HBBI", code, 8 * i) for i in range(len(code) // 8)]
    at, value = 0, 0
    while True:
        operation, if_true, if_false, constant = rows[at]
        at += 1
        if operation == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
            continue
        if operation == 0x06:
            return constant
        holds = {0x15: value == constant, 0x35: value >= constant, 0x45: value & constant != 0}
        at += if_true if holds[operation] else if_false


ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50001, 0x50026
# (number on x86_64, number on aarch64), arguments, answer in each of the three modes
CALLS_BY_NUMBER = {
    "read": ((0, 63), (), (ALLOW, ALLOW, ALLOW)),
    "futex": ((202, 98), (), (ALLOW, ALLOW, ALLOW)),
    "mmap": ((9, 222), (), (ALLOW, ALLOW, ALLOW)),
    "exit_group": ((231, 94), (), (ALLOW, ALLOW, ALLOW)),
    "sched_yield": ((24, 124), (), (ALLOW, ALLOW, ALLOW)),
    "sched_getaffinity": ((204, 123), (), (ALLOW, ALLOW, ALLOW)),
    "a thread": ((56, 220), (0x3D0F00,), (ALLOW, ALLOW, ALLOW)),
    "a process": ((56, 220), (17,), (EPERM, EPERM, EPERM)),
    "clone3": ((435, 435), (), (ENOSYS, ENOSYS, ENOSYS)),
    "own limits": ((302, 261), (0,), (ALLOW, ALLOW, ALLOW)),
    "limits of others": ((302, 261), (7,), (EPERM, EPERM, EPERM)),
    "PR_SET_NAME": ((157, 167), (15,), (ALLOW, ALLOW, ALLOW)),
    "PR_SET_DUMPABLE": ((157, 167), (4,), (EPERM, EPERM, EPERM)),
    "F_GETFL": ((72, 25), (0, 3), (ALLOW, ALLOW, ALLOW)),
    "F_SETOWN": ((72, 25), (0, 8), (EPERM, EPERM, EPERM)),
    "F_SETOWN_EX": ((72, 25), (0, 15), (EPERM, EPERM, EPERM)),
    "TIOCGWINSZ": ((16, 29), (0, 0x5413), (ALLOW, ALLOW, ALLOW)),
    "TIOCSTI": ((16, 29), (0, 0x5412), (EPERM, EPERM, EPERM)),
    "a pair of streams": ((53, 199), (1, 0x80001), (ALLOW, ALLOW, ALLOW)),
    "a pair of datagram sockets": ((53, 199), (1, 0x80002), (EPERM, EPERM, EPERM)),
    "sched_setscheduler": ((144, 119), (), (EPERM, EPERM, EPERM)),
    "ioprio_set": ((251, 30), (), (EPERM, EPERM, EPERM)),
    "io_setup": ((206, 0), (), (EPERM, EPERM, EPERM)),
    "fchmodat": ((268, 53), (), (ALLOW, EPERM, EPERM)),
    "fchownat": ((260, 54), (), (ALLOW, EPERM, EPERM)),
    "utimensat": ((280, 88), (), (ALLOW, EPERM, EPERM)),
    "setxattr": ((188, 5), (), (ALLOW, EPERM, EPERM)),
    "openat": ((257, 56), (), (ALLOW, ALLOW, EPERM)),
    "openat2": ((437, 437), (), (ALLOW, ALLOW, EPERM)),
    "file_setattr": ((469, 469), (), (ENOSYS, ENOSYS, ENOSYS)),
}


@pytest.mark.parametrize("architecture", sandbox.MACHINES)
def test_the_filter_answers_every_call_as_it_should(architecture):
    machine = sandbox.MACHINES[architecture]
    for name, (numbers, arguments, answers) in CALLS_BY_NUMBER.items():
        number = numbers[machine.column]
        tables = sandbox.REFUSED_IN_MODE.values()
        got = tuple(filtered(machine, calls, number, *arguments) for calls in tables)
        assert got == answers, name


def test_the_numbers_of_calls_are_those_of_the_kernels_headers():
    headers = ("x86_64-linux-gnu/asm/unistd_64.h", "asm-generic/unistd.h")
    tables = {}
    for table in sandbox.REFUSED_IN_MODE["bare"]:
        tables.update(table)
    num_checked = 0
    for column, header in enumerate(headers):
        try:
            with open(f"/usr/include/{header}") as file:
                text = file.read()
        except OSError:
            pytest.skip("no headers of the kernel here")
        known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text))
        for name, numbers in tables.items():
            if name in known:
                assert int(known[name]) == numbers[column], name
                num_checked += 1
    print(f"{num_checked} numbers checked")
    assert num_checked > 150


# ---- Hosts that refuse namespaces, Landlock, or both ---------------------------------------------
HOST = """
import ctypes, struct, sys
sys.path.insert(0, {root!r})
from verifiers import sandbox
libc = ctypes.CDLL(None)
rows = [(0x20, 0, 0, 0)]
for number in {refused}:
    rows += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50001)]
rows.append((0x06, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
program = struct.pack("HxxxxxxQ", len(rows), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
{then}
"""


def on_a_host_without(calls, then, **environment):
    """Run Python where the kernel refuses these system calls. Returns the finished process."""
    refused = [{"unshare": (272, 97), "landlock": (444, 444)}[name] for name in calls]
    refused = [numbers[sandbox.MACHINE.column] for numbers in refused]
    root = os.path.dirname(os.path.dirname(sandbox.__file__))
    return subprocess.run(
        [sys.executable, "-c", HOST.format(root=root, refused=refused, then=then)],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_without_namespaces_and_landlock_nothing_runs_unless_a_flag_says_so():
    print_one = "print(sandbox.run('print(1)').status, sandbox._mode)"
    first = on_a_host_without(["unshare"], print_one)
    assert (first.returncode, first.stdout) == (0, "ok landlock\n") and "DEGRADED" in first.stderr

    refused = on_a_host_without(["unshare", "landlock"], print_one)
    print(refused.stderr)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "-c: the sandbox has neither namespaces ([Errno 1] Operation not permitted) nor Landlock "
        "on this host to hold untrusted code; SANDBOX_ALLOW_WEAK=1 runs it all the same. "
        "Nothing was trained.\n"
    )

    allowed = on_a_host_without(["unshare", "landlock"], print_one, SANDBOX_ALLOW_WEAK="1")
    assert (allowed.returncode, allowed.stdout) == (0, "ok bare\n")
    assert "DEGRADED" in allowed.stderr and "can open no file" in allowed.stderr


@pytest.mark.slow
def test_code_rl_and_benchmarks_end_with_the_same_sentence(monkeypatch, capfd, tmp_path):
    from evals import benchmarks

    data = tmp_path / "lcb.jsonl"
    tests = json.dumps([{"input": "1", "output": "1"}])
    problem = {
        "question_id": "1",
        "contest_date": "2024-09-01",
        "question_content": "Echo.",
    }
    problem = {**problem, "public_test_cases": tests, "private_test_cases": tests}
    data.write_text(json.dumps(problem))
    monkeypatch.delenv("SANDBOX_ALLOW_WEAK", raising=False)
    sandbox.close()
    sandbox._mode = "bare"
    said = []
    (tmp_path / "tests.json").write_text(json.dumps(stdin_tests("", "1")))
    row = {"think": False, "tests": str(tmp_path / "tests.json")}
    submit, collect = benchmarks.hook(benchmarks.score_code)
    rollout = types.SimpleNamespace(row=row, text="```python\nprint(1)\n```")
    starts = (
        lambda: coderl.make_reward(coderl.Config()),
        lambda: collect([rollout]),
        lambda: benchmarks.BENCHMARKS["lcb_v5"]["load"](str(data), {"data": str(tmp_path)}),
    )
    for start in starts:
        with pytest.raises(SystemExit) as ended:
            start()
        assert ended.value.code == 2
        said.append(capfd.readouterr().err)
    assert said[0] == said[1] and said[2].endswith(said[0]) and "SANDBOX_ALLOW_WEAK=1" in said[0]


def test_a_mount_below_the_library_folders_costs_no_namespaces(tmp_path):
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    tools = shutil.which("unshare") and shutil.which("setpriv") and shutil.which("mount")
    folders = [path for path in os.scandir("/usr/lib") if path.is_dir(follow_symlinks=False)]
    if os.geteuid() != 0 or not python or not tools or not folders:
        pytest.skip("needs root, to mount a file system and to become somebody else")
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        if os.stat(path).st_uid == 0 and str(path) not in ("/", "/tmp"):
            path.chmod(0o755)
    shutil.copy(sandbox.__file__, tmp_path / "sandbox.py")
    place = min(path.path for path in folders)
    program = (
        "import os\\n"
        f"print(os.listdir({place!r}))\\n"
        f"try: open({place + '/x'!r}, 'w')\\n"
        "except OSError as error: print(error.strerror)"
    )
    (tmp_path / "try.py").write_text(
        f'import sandbox\nprint(sandbox.run("{program}").stdout + sandbox._mode)'
    )
    command = (
        f"mount -t tmpfs none {place} && touch {place}/driver.so && chmod 777 {place} && exec "
        f"setpriv --reuid 12345 --regid 12345 --clear-groups {python} try.py"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert done.stdout == "['driver.so']\nRead-only file system\nfull\n", done.stderr


# ---- What a task may take ------------------------------------------------------------------------
@pytest.mark.parametrize("expected", ["6", "x" * 20_000])
def test_a_reply_far_beyond_the_expected_size_is_not_read(expected):
    longest = 16 * len(expected) + (1 << 16)
    for size, verdict in ((longest - 100, "wrong"), (longest + 100, "output")):
        printed = coderl.run_tests(f"print('y' * {size})", stdin_tests("", expected), 5.0)
        call = {"inputs": [""], "outputs": [json.dumps(expected)], "fn_name": "f"}
        # two brackets and two bytes an item
        returned = coderl.run_tests(f"def f(): return [[]] * {size // 4}", call, 5.0)
        assert (printed, returned) == ([verdict], [verdict])
    padded = f"print(' ' * 1000 + '{expected}' + ' ' * 1000 + '\\n' * 1000)"
    assert coderl.run_tests(padded, stdin_tests("", expected), 5.0) == ["ok"]


def test_a_hostile_reply_costs_the_caller_little_memory(monkeypatch):
    tests = {"inputs": [""], "outputs": ["[]"], "fn_name": "f"}
    seen = []
    monkeypatch.setattr(sandbox, "load_json", lambda text: seen.append(len(text)) or [])
    for length in (10_000, 4_000_000):
        coderl.run_tests(f"def f(): return [[]] * {length}", tests, 5.0)
    print(f"the caller reads replies of {seen} bytes")
    assert seen[0] == 40_000 and max(seen) < 100_000


@pytest.mark.slow
def test_all_tests_of_a_task_share_the_time_for_sleeping(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_EXTRA", 0.4)
    monkeypatch.setattr(sandbox, "IDLE_SECONDS", 0.1)
    sleepy = "import time\ntime.sleep(float(input()))\nprint(1)"
    # 0.8 s of wall for one test; each lets 0.4 s of its 0.5 s count
    results = list(sandbox.run_each(sleepy, ["0.5"] * 3, timeout=0.1))
    assert [result.status for result in results] == ["ok", "timeout", "timeout"]
    # sleeping a little, and computing as long as the limit allows, count for nothing
    busy = "import time\nwhile time.process_time() < 0.08: pass\ntime.sleep(0.05)\nprint(1)"
    results = list(sandbox.run_each(busy, [""] * 8, timeout=0.2))
    assert [result.status for result in results] == ["ok"] * 8


def test_slots_go_to_those_who_came_first():
    slots, order, hold = sandbox.Slots(1), [], threading.Event()

    def work(number):
        with slots:
            if number == 0:
                hold.wait()
            order.append(number)

    threads = []
    for number in range(20):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        while len(slots.waiters) < number:
            time.sleep(0.001)
    hold.set()
    # a newcomer does not overtake them
    work(20)
    for thread in threads:
        thread.join()
    assert order == list(range(21)) and slots.free == 1


def test_a_waiter_that_is_interrupted_leaves_the_queue():
    slots = sandbox.Slots(1)
    slots.__enter__()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            slots.__enter__()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    slots.__exit__()
    assert (slots.free, len(slots.waiters)) == (1, 0)


@pytest.mark.parametrize("digits", [4_000, 4_400, 49_000])
def test_integers_of_many_digits_are_values_like_others(digits):
    text = "7" * digits
    tests = {"inputs": [text], "outputs": [text], "fn_name": "f"}
    assert coderl.run_tests("def f(x): return x", tests, 5.0) == ["ok"]
    assert coderl.run_tests("def f(x): return x + 1", tests, 5.0) == ["wrong"]
    nested = {
        "inputs": ['{"a": [' + text + ', "b", null, 0.5]}'],
        "outputs": ["[" + text + "]"],
        "fn_name": "f",
    }
    assert coderl.run_tests("def f(x): return x['a'][:1]", nested, 5.0) == ["ok"]


def test_a_result_of_too_many_digits_is_a_crash():
    tests = {"inputs": [""], "outputs": ["7"], "fn_name": "f"}
    source = "import sys\nsys.set_int_max_str_digits(0)\ndef f(): return 10 ** 60_000"
    assert coderl.run_tests(source, tests, 5.0) == ["crash"]


def test_a_memory_bomb_that_ends_late_is_still_a_memory_bomb():
    # it uses up its CPU seconds while it meets its memory limit, between two looks of the caller
    leaf = types.SimpleNamespace(output=os.memfd_create("x"), is_call=False, most_bytes=100)
    result = sandbox._result_of_end(leaf, sandbox.OUT_OF_MEMORY << 8, 0.31, 0.3)
    os.close(leaf.output)
    assert result.status == "memory"


def cpu_seconds():
    """CPU seconds of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# A bomb ends by itself, at its memory limit. A busy machine takes longer to find it the memory.
BOMB = {"timeout": 20.0, "memory_mb": 64}
GOOD = ("print(int(input()) * 2)", "ok", {"timeout": 0.5})
# The program at each place of a hundred: (source, status, limits). The other places are GOOD.
MIXED = {
    **dict.fromkeys((0, 20, 40, 60, 80), ("while True: pass", "timeout", {"timeout": 0.5})),
    1: (BAD["fork bomb"][0], "timeout", {"timeout": 0.5}),
    11: ("x = []\nwhile True: x.append(b'x' * (1 << 20) + bytes(1))", "memory", BOMB),
    31: (BAD["memory bomb"][0], "memory", BOMB),
    51: ("x = [[]]\nwhile True: x.append([x[-1]] * 1000)", "memory", BOMB),
    71: (BAD["one big list"][0], "memory", BOMB),
}


@pytest.mark.exhaustive
def test_two_thousand_programs_under_load_lose_no_verdict():
    jobs = [MIXED.get(i % 100, GOOD) for i in range(2000)]
    sandbox.close()
    cpu, started = cpu_seconds(), time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(lambda job: sandbox.run(job[0], "21\n", **job[2]), jobs))
    took = time.monotonic() - started
    sandbox.close()
    assert leaves() == []
    cpu = cpu_seconds() - cpu

    # CPU counts what a busy machine does not change.
    stopped = [limits["timeout"] for _, status, limits in jobs if status == "timeout"]
    bombs = [result.seconds for result, job in zip(results, jobs) if job[1] == "memory"]
    most_cpu = sum(stopped) + sum(bombs)
    wall_limits = [sandbox.WALL_FACTOR * seconds + sandbox.WALL_EXTRA for seconds in stopped]
    most_wall = sum(wall_limits) / sandbox.SLOTS
    print(
        f"{len(jobs)} programs, 64 in flight: {took:.1f} s, {cpu:.1f} s of CPU; the limits of "
        f"those that must be stopped: {sum(stopped):.1f} s of CPU, {most_wall:.1f} s of wall over "
        f"{sandbox.SLOTS} slots; {len(bombs)} bombs took {sum(bombs):.1f} s, at most "
        f"{max(bombs):.2f}; load {os.getloadavg()[0]:.0f} on {sandbox.CORES} cores"
    )
    assert [result.status for result in results] == [status for _, status, _ in jobs]
    good = [result for result, job in zip(results, jobs) if job[1] == "ok"]
    assert all(result.stdout == "42\n" for result in good)
    assert cpu < 1.2 * most_cpu + 0.03 * len(jobs) and took < most_wall + 0.05 * len(jobs)
