"""The sandbox gives every program its verdict, and nothing of a program outlives that verdict.

Guarded: honest programs pass whatever their style. No trick turns a wrong answer into a right one,
stalls the caller, or leaves a process, a file or a variable behind. The same table runs with
namespaces and in the degraded mode.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
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


@pytest.fixture(scope="module", params=["full", "degraded"])
def mode(request):
    """The whole table with namespaces (where this host has them) and without."""
    sandbox.close()
    sandbox._mode = "full" if request.param == "full" else "degraded for the test"
    sandbox.WALL_EXTRA = 1.5
    sandbox.run("pass")
    if request.param == "full" and sandbox._mode != "full":
        pytest.skip("this host refuses namespaces")
    yield request.param
    sandbox.close()
    sandbox._mode, sandbox.WALL_EXTRA = "full", 10.0


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
    if mode != "full":
        pytest.skip("numpy is shown to programs by a mount namespace only")
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


@pytest.mark.parametrize("mode_name", ["full", "degraded"])
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
        "import sandbox\n"
        f"sandbox._mode = {mode_name!r}\n"
        "for s in ('print(6 * 7)', 'while 1: pass', 'import os; os.fork()',\n"
        "          'open(\"/etc/passwd\")', 'import socket; socket.socket()'):\n"
        "    print(sandbox.run(s, timeout=0.3).status)\n"
        "print(sandbox.run('def f(a): return a', call=('f', [[1]])).value)"
    )
    done = subprocess.run(
        [python, "-c", code],
        cwd=folder,
        user=12345,
        group=12345,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["ok", "timeout", "crash", "crash", "crash", "[1]"], done.stderr
    assert ("DEGRADED" in done.stderr) == (mode_name == "degraded") or mode_name == "full"


def test_the_degraded_mode_is_announced_once(capfd):
    sandbox.close()
    sandbox._mode = "refused for the test"
    sandbox.run("pass")
    sandbox.close()
    sandbox.run("pass")
    sandbox.close()
    sandbox._mode = "full"
    assert capfd.readouterr().err.count("DEGRADED") == 1


@pytest.mark.exhaustive
def test_two_thousand_programs_under_load_lose_no_verdict():
    loop, bomb, good = "while True: pass", BAD["fork bomb"][0], "print(int(input()) * 2)"
    jobs = [
        (loop, "timeout") if i % 20 == 0 else (bomb, "timeout") if i % 100 == 1 else (good, "ok")
        for i in range(2000)
    ]
    limit = 0.5

    def usage():
        """CPU seconds of this process and its children."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime

    sandbox.close()
    cpu, started = usage(), time.monotonic()
    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(lambda job: sandbox.run(job[0], "21\n", timeout=limit), jobs))
    took = time.monotonic() - started
    sandbox.close()
    assert leaves() == []
    cpu, num_bounded = usage() - cpu, sum(job[1] == "timeout" for job in jobs)
    most_cpu = num_bounded * limit
    most_wall = num_bounded * (sandbox.WALL_FACTOR * limit + sandbox.WALL_EXTRA) / sandbox.SLOTS
    print(
        f"{len(jobs)} programs, 64 in flight: {took:.1f} s, {cpu:.1f} s of CPU; the limits of "
        f"those that must be stopped: {most_cpu:.1f} s of CPU, {most_wall:.1f} s of wall over "
        f"{sandbox.SLOTS} slots; load {os.getloadavg()[0]:.0f} on {sandbox.CORES} cores"
    )
    assert [r.status for r in results] == [job[1] for job in jobs]
    assert all(r.stdout == "42\n" for r, job in zip(results, jobs) if job[1] == "ok")
    assert cpu < 1.2 * most_cpu + 0.03 * len(jobs) and took < most_wall + 0.05 * len(jobs), (
        "CPU counts what a busy machine does not change"
    )
