"""Hostile programs, as data: what each does, and what must become of it.

A program that attacks prints ``breached`` (or the needle it searched for) when it got through,
and that is what its test expects: so a breach is an accepted program, and a failed test.
``@PORT@`` and ``@ABSTRACT@`` stand for sockets that the test opens on the host.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from rlrf.sandbox import AssertCase, CallCase, Case, Limits, StdinCase, Verdict

OK, WA, RE = Verdict.ACCEPTED, Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR
CE, TL = Verdict.COMPILE_ERROR, Verdict.TIME_LIMIT
ML, OL = Verdict.MEMORY_LIMIT, Verdict.OUTPUT_LIMIT

NEEDLE = "NEEDLE-" + "".join(reversed("9d4c2b1a7f"))
PLANTED = "PLANTED-" + "".join(reversed("3e8f6a5d0c"))

SMALL = Limits(cpu_s=1, wall_s=4, memory_mb=256)
BRIEFLY = Limits(cpu_s=0.4, wall_s=4, memory_mb=256)  # for what will use it up anyway
LONGER = Limits(cpu_s=4, wall_s=12, memory_mb=256)

SECRET: tuple[Case, ...] = (StdinCase("7\n", NEEDLE + "\n"),)
SECRET_CALL: tuple[Case, ...] = (CallCase((7,), NEEDLE),)
BREACH: tuple[Case, ...] = (StdinCase("", "breached\n"),)
PLAIN: tuple[Case, ...] = (StdinCase("7\n", "ok\n"),)
ASSERTS: tuple[Case, ...] = (AssertCase("assert candidate(1) == 2"),)

BOTH = ("docker", "bubblewrap")


@dataclass(frozen=True)
class Row:
    """A program, and the verdicts it may get."""

    name: str
    code: str
    expected: frozenset[Verdict]
    cases: tuple[Case, ...] = SECRET
    entry: str | None = None
    limits: Limits | None = None
    backends: tuple[str, ...] = BOTH
    note: str = ""
    slow: bool = False


@dataclass(frozen=True)
class Pair:
    """A program that leaves something behind, and one that must not find it."""

    name: str
    plant: str
    look: str
    times: int = 1  # that it is tried, where it takes luck


def row(name, code, *expected, **options) -> Row:
    return Row(name, textwrap.dedent(code).strip("\n") + "\n", frozenset(expected), **options)


def pair(name, plant, look, **options) -> Pair:
    plant, look = (textwrap.dedent(code).strip("\n") for code in (plant, look))
    return Pair(name, plant, look, **options)


# Shared by programs that make raw system calls; raises OSError as Python's own would.
SYSCALL = """
import ctypes, os, sys, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    got = libc.syscall(ctypes.c_long(number), *words)
    if got < 0:
        n = ctypes.get_errno()
        raise OSError(n, os.strerror(n))
    return got
"""

# Reads all of its own memory that can be read; calls `see` with every piece.
OWN_MEMORY = """
import ctypes, re
def own_memory(pattern):
    hits = set()
    with open("/proc/self/maps") as maps:
        lines = maps.read().splitlines()
    for line in lines:
        place, rights = line.split()[:2]
        if rights[0] != "r" or line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
            continue
        at, end = (int(x, 16) for x in place.split("-"))
        while at < end:
            size = min(1 << 20, end - at)
            try:
                piece = ctypes.string_at(at, size)
            except Exception:
                piece = b""
            hits.update(re.findall(pattern, piece))
            at += size
    return hits
"""

# --- must be accepted -----------------------------------------------------------------------------

CONTROLS = [
    row("ok", "print('ok')", OK, cases=PLAIN),
    row(
        "stdin_buffer_readline",
        """
        import sys
        assert sys.stdin.buffer.readline() == b"7\\n"
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "main_guard_and_open_0",
        """
        def main():
            text = open(0).read()
            print("ok" if text == "7\\n" else text)
        if __name__ == "__main__":
            main()
        """,
        OK,
        cases=PLAIN,
    ),
    row("function", "def f(x):\n    return x * 2", OK, cases=(CallCase((7,), 14),), entry="f"),
    row("exit_after_answer", "print('ok')\nexit(0)", OK, cases=PLAIN),
    row(
        "os_exit_after_flush",
        "import os\nprint('ok', flush=True)\nos._exit(0)",
        OK,
        cases=PLAIN,
    ),
    row(
        "recursion_20000",
        """
        import sys
        sys.setrecursionlimit(100000)
        def f(n):
            return n if n == 0 else f(n - 1)
        f(20000)
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "thread_stack_64mb",
        """
        import sys, threading
        sys.setrecursionlimit(10**6)
        threading.stack_size(64 << 20)
        def f(n):
            return 0 if n == 0 else f(n - 1)
        def main():
            f(15000)
            print("ok")
        t = threading.Thread(target=main)
        t.start()
        t.join()
        """,
        OK,
        cases=PLAIN,
    ),
    row("close_stdout", "import sys\nprint('ok')\nsys.stdout.close()", OK, cases=PLAIN),
    row(
        "daemon_left",
        """
        import os, time
        print("ok", flush=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.wait()
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "stopped_child",
        """
        import os, signal, time
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(pid, os.WUNTRACED)
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row("trailing_spaces", "print('ok   ')\nprint('  ')", OK, cases=PLAIN),
    row("no_newline", "import sys\nsys.stdout.write('ok')", OK, cases=PLAIN),
    row(
        "stderr_noise",
        "import sys\nprint('x' * 5000, file=sys.stderr)\nprint('ok')",
        OK,
        cases=PLAIN,
    ),
    row("utf16_cookie", "# -*- coding: utf-16 -*-\nprint('ok')", OK, cases=PLAIN),
    row(
        "hash_order",
        "import random\nprint(hash('a') == hash('a') and 'ok')\nrandom.random()",
        OK,
        cases=PLAIN,
    ),
    row(
        "locale",
        """
        import locale, sys
        sys.stdout.flush()
        assert sys.stdout.encoding.lower() == "utf-8" and sys.stdin.encoding.lower() == "utf-8"
        assert sys.getfilesystemencoding() == "utf-8" and sys.getdefaultencoding() == "utf-8"
        assert "%.1f" % 1.5 == "1.5" and locale.localeconv()["decimal_point"] == "."
        open("\\u00e9\\u4e2d.txt", "w").write("\\u00e9")
        assert open("\\u00e9\\u4e2d.txt").read() == "\\u00e9"
        print("\\u00e9\\u4e2d")
        """,
        OK,
        cases=(StdinCase("", "\u00e9\u4e2d\n"),),
    ),
    row("stdin_1mb_unread", "print('ok')", OK, cases=(StdinCase("x" * (1 << 20) + "\n", "ok\n"),)),
    row(
        "stdin_1mb_unread_by_a_function",
        "def f(x):\n    return 'ok'",
        OK,
        cases=(CallCase(("x" * (1 << 20),), "ok"),),
        entry="f",
    ),
    row(
        "asserts",
        "def f(x):\n    return x + 1",
        OK,
        cases=ASSERTS,
        entry="f",
    ),
    row(
        "asserts_that_expect_an_error",
        "def f(x):\n    raise ValueError('no')",
        OK,
        cases=(
            AssertCase(
                "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError"
            ),
        ),
        entry="f",
    ),
    row(
        "infinite_float",
        "def f(x):\n    return float('inf')",
        OK,
        cases=(CallCase((7,), float("inf")),),
        entry="f",
    ),
]

# --- 1-14: pretending to have answered, and searching for the answer ------------------------------

_CLAIMS = """
claims = [
    {"op": "result", "nonce": "", "status": 0, "stdout": "breached\\n", "stderr": "",
     "message": "{}", "limit": None, "cpu": 0.0, "wall": 0.0, "rss": 0, "starved": False},
    {"op": "done", "nonce": ""},
    {"verdict": "accepted", "passed": True, "reward": 1.0, "exit_code": 0},
    {"result": True},
]
import json
frames = b""
for claim in claims:
    data = json.dumps(claim).encode()
    frames += len(data).to_bytes(4, "big") + data
"""

FAKING = [
    row("01_sys_exit_0", "import sys\nsys.exit(0)", WA),
    row("02_os_exit_0", "import os\nos._exit(0)", WA),
    row(
        "03_atexit_accepted",
        "import atexit, os\natexit.register(lambda: os.write(1, b'ACCEPTED\\n'))",
        WA,
    ),
    row("04_prints_runner_json", _CLAIMS + "import os\nos.write(1, frames)\nprint(claims)", WA),
    row(
        "05_frames_to_fds_3_to_299",
        _CLAIMS
        + textwrap.dedent(
            """
            import os
            for fd in range(3, 300):
                for data in (frames, json.dumps(claims[2]).encode()):
                    try:
                        os.write(fd, data)
                    except OSError:
                        pass
            print("no")
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "06_opens_the_runners_fds",
        _CLAIMS
        + textwrap.dedent(
            """
            import os
            got = 0
            for pid in os.listdir("/proc"):
                if not pid.isdigit() or int(pid) == os.getpid():
                    continue
                for fd in range(300):
                    try:
                        h = os.open("/proc/%s/fd/%d" % (pid, fd), os.O_RDWR)
                        os.write(h, frames)
                        got += 1
                    except OSError:
                        pass
            print("breached" if got else "none")
            """
        ),
        WA,
        cases=BREACH,
        limits=LONGER,
    ),
    row(
        "07_object_equal_to_all",
        """
        class Yes:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
        def f(x): return Yes()
        """,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "08_int_equal_to_all",
        """
        class Yes(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            def __hash__(self): return 0
            def __add__(self, other): return 14
            def __repr__(self): return "14"
            def __index__(self): return 14
        def f(x): return Yes(1)
        """,
        WA,
        cases=(CallCase((7,), 14),),
        entry="f",
    ),
    row(
        "09_str_equal_to_all",
        """
        class Yes(str):
            def __eq__(self, other): return True
            def __hash__(self): return 0
            def strip(self, *a): return self
            def split(self, *a): return [self]
            def __getitem__(self, i): return "right"
            def encode(self, *a): return b"right"
        def f(x): return Yes("wrong")
        """,
        WA,
        cases=(CallCase((7,), "right"),),
        entry="f",
    ),
    row(
        "10_patches_json_dumps",
        """
        import json, sys
        json.dumps = lambda *a, **k: '{"result": 14}'
        json.JSONEncoder.encode = json.dumps
        json.loads = lambda *a, **k: {"result": 14}
        def f(x): raise ValueError("no")
        """,
        RE,
        WA,
        cases=(CallCase((7,), 14),),
        entry="f",
    ),
    row(
        "11_patches_builtins",
        """
        import builtins
        builtins.all = builtins.any = lambda *a: True
        builtins.zip = lambda *a: []
        builtins.print = lambda *a, **k: None
        builtins.isinstance = lambda *a: True
        builtins.type = lambda *a: int
        builtins.len = lambda *a: 0
        builtins.print("x")
        """,
        WA,
        RE,
    ),
    row(
        "12_searches_frames_and_gc",
        """
        import gc, re, sys
        wanted = re.compile(r"NEEDLE-[0-9a-f]{10}")
        seen, found, todo = set(), set(), []
        frame = sys._getframe()
        while frame is not None:
            todo += [frame.f_globals, frame.f_locals, frame.f_builtins, frame.f_code.co_consts]
            frame = frame.f_back
        todo += gc.get_objects() + [vars(m) for m in list(sys.modules.values()) if m]
        while todo:
            thing = todo.pop()
            if id(thing) in seen:
                continue
            seen.add(id(thing))
            if type(thing) in (str, bytes, bytearray):
                text = thing if type(thing) is str else bytes(thing).decode("latin-1")
                found.update(wanted.findall(text))
            elif thing is not seen and thing is not todo and len(seen) < 400000:
                todo += gc.get_referents(thing)
        print(*found)
        """,
        WA,
        limits=LONGER,
    ),
    row(
        "13_searches_own_memory",
        OWN_MEMORY
        + "found = own_memory(rb'NEEDLE-[0-9a-f]{10}')\nprint(*(f.decode() for f in found))",
        WA,
        limits=LONGER,
    ),
    row(
        "13_searches_proc_self_mem",
        """
        import re
        found = set()
        try:
            mem = open("/proc/self/mem", "rb", 0)
            for line in open("/proc/self/maps"):
                place, rights = line.split()[:2]
                a, b = (int(x, 16) for x in place.split("-"))
                while rights[0] == "r" and a < b:
                    try:
                        mem.seek(a)
                        found.update(re.findall(rb"NEEDLE-[0-9a-f]{10}", mem.read(1 << 20)))
                    except (OSError, ValueError, OverflowError):
                        pass
                    a += 1 << 20
        except OSError:
            pass
        print(*(f.decode() for f in found))
        """,
        WA,
        limits=LONGER,
    ),
    row(
        "14_searches_files",
        """
        import os, re, time
        wanted, found, end = re.compile(rb"NEEDLE-[0-9a-f]{10}"), set(), time.process_time() + 2.5
        tops = ["/tmp", "/var", "/run", "/dev/shm", "/home", "/root", "/work", "/sandbox", "/rlrf",
                "/etc", "/opt", "/srv", "/mnt", "/proc/self", "/"]
        for top in tops:
            for folder, names, files in os.walk(top):
                names[:] = [n for n in names if os.path.join(folder, n) not in ("/proc", "/sys")]
                for name in files:
                    try:
                        path = os.path.join(folder, name)
                        if not os.path.isfile(path) or name in ("kmsg", "kcore", "pagemap"):
                            continue
                        with open(path, "rb") as file:
                            found.update(wanted.findall(file.read(1 << 18)))
                    except OSError:
                        pass
                if time.process_time() > end:
                    break
        for fd in range(256):
            try:
                found.update(wanted.findall(os.pread(fd, 1 << 18, 0)))
            except OSError:
                pass
        print(*(f.decode() for f in found))
        """,
        WA,
        limits=LONGER,
        slow=True,
    ),
]

# --- 15-21: never coming to an end ----------------------------------------------------------------

ENDLESS = [
    row("15_busy_loop", "while True:\n    pass", TL),
    row("16_sleep", "import time\ntime.sleep(1000)", TL, limits=Limits(1, 0.6, memory_mb=256)),
    row(
        "17_ignores_all_signals",
        """
        import signal
        for s in range(1, 65):
            try:
                signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            pass
        """,
        TL,
    ),
    row(
        "18_catches_everything",
        """
        while True:
            try:
                while True:
                    pass
            except BaseException:
                continue
        """,
        TL,
    ),
    row("19_huge_power", "x = 10\nprint(len(str(x ** x ** 8)))", TL, ML),
    row("20_regex_bomb", "import re\nre.match(r'(a|a|aa)*$', 'a' * 60 + 'b')", TL),
    row(
        "21_huge_int_to_str",
        "import sys\nsys.set_int_max_str_digits(0)\nx = 3\nprint(len(str(x ** 3000000)))\n"
        "print(len(str(x ** 9000000)))",
        TL,
    ),
    row(
        "sigxcpu_handler",
        """
        import signal
        signal.signal(signal.SIGXCPU, lambda *a: None)
        while True:
            pass
        """,
        TL,
    ),
    row(
        "compile_of_a_large_source",
        "x = [" + "[1, {2: (3, 4)}, lambda a, b=5: a[b] + 6], " * 40000 + "]\nprint('no')",
        TL,
        ML,
        CE,
        WA,
        limits=Limits(1, 4, compile_s=1, memory_mb=256),
    ),
    row(
        "compile_hang",
        "".join(f"{' ' * i}try:\n{' ' * i} x\n{' ' * i}finally:\n" for i in range(19))
        + f"{' ' * 19}pass\n",
        TL,
        ML,
        limits=Limits(1, 4, compile_s=1, memory_mb=256),
        note="CPython compiles every finally twice: 2**19 copies",
    ),
    row(
        "compile_past_the_nesting_limit",
        "".join(f"{' ' * i}while x:\n" for i in range(60)) + f"{' ' * 60}pass\n",
        CE,
    ),
]

# --- 22-35: using up memory, files, output, processes ---------------------------------------------

EATING = [
    row("22_list_growth", "x = []\nwhile True:\n    x.append('y' * 100000)", ML),
    row("23_bytearray_8g", "x = bytearray(8 << 30)", ML),
    row(
        "24_touched_mmap",
        """
        import mmap
        kept = []
        while True:
            m = mmap.mmap(-1, 64 << 20)
            for i in range(0, len(m), 4096):
                m[i] = 1
            kept.append(m)
        """,
        ML,
    ),
]
_CHILDREN = """
    import mmap, os, time
    for _ in range(12):
        if os.fork() == 0:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000
            m = mmap.mmap(-1, 150 << 20, flags=flags)
            time.sleep(100)
            os._exit(0)
    for _ in range(12):
        os.wait()
    """
EATING += [
    row(
        "25_children_12_by_150_mb",
        _CHILDREN,
        ML,
        backends=("docker",),
        limits=Limits(8, 8, memory_mb=256),
        slow=True,
    ),
    row("25_children_12_by_150_mb", _CHILDREN, TL, backends=("bubblewrap",), slow=True),
    row(
        "26_fills_a_memfd",
        """
        import os
        fd = os.memfd_create("x")
        while True:
            os.write(fd, b"x" * (1 << 20))
        """,
        RE,
    ),
    row(
        "27_fills_the_folder",
        """
        n = 0
        while True:
            n += 1
            with open("f%d" % n, "wb") as f:
                f.write(b"x" * (4 << 20))
        """,
        RE,
        ML,
        note="ENOSPC; a container whose memory is smaller than its folder is out of memory",
    ),
    row(
        "28_inode_bomb",
        """
        n = 0
        while True:
            n += 1
            open("f%d" % n, "w").close()
        """,
        RE,
        limits=LONGER,
    ),
    row("29_file_of_1_tb", "import os\nf = open('f', 'wb')\nos.ftruncate(f.fileno(), 1 << 40)", RE),
    row("30_endless_stdout", "while True:\n    print('x' * 10000)", OL),
    row(
        "31_endless_stderr",
        "import sys\nwhile True:\n    sys.stderr.write('x' * 10000)",
        OL,
        TL,
        RE,
        note="what is too much is dropped; writing beyond file_mb is EFBIG",
    ),
    row("32_single_bytes", "import os\nwhile True:\n    os.write(1, b'x')", OL, TL),
    row(
        "33_fork_bomb",
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        TL,
    ),
    row(
        "34_thread_bomb",
        """
        import threading, time
        threading.stack_size(32768 * 4)
        while True:
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        """,
        RE,
    ),
    row("35_fd_bomb", "import os\nwhile True:\n    os.open('/dev/null', os.O_RDONLY)", RE),
    row(
        "result_over_the_output_limit",
        "def f(x):\n    return 'x' * (2 << 20)",
        OL,
        cases=SECRET_CALL,
        entry="f",
    ),
    row("line_over_the_output_limit", "print('x' * (2 << 20))", OL),
    row(
        "dev_full",
        """
        import os
        f = os.open("/dev/full", os.O_WRONLY)
        os.dup2(f, 1)
        print("ok", flush=True)
        """,
        RE,
    ),
    row(
        "dev_full_at_exit",
        "import os\nos.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nprint('ok')",
        RE,
        WA,
        cases=PLAIN,
    ),
    row(
        "raises_its_own_limits",
        """
        import resource
        raised = 0
        # Not the stack: it may grow as far as the address space, which is limited.
        for name in ("AS", "CPU", "FSIZE", "NPROC", "NOFILE", "CORE"):
            what = getattr(resource, "RLIMIT_" + name)
            soft, hard = resource.getrlimit(what)
            for value in (hard * 2 + 1, resource.RLIM_INFINITY):
                try:
                    resource.setrlimit(what, (value, value))
                    raised += 1
                except (OSError, ValueError):
                    pass
        print("breached" if raised else "denied")
        """,
        WA,
        cases=BREACH,
    ),
    row(
        "raises_its_memory_limit_then_takes_it",
        """
        import resource
        try:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        except (OSError, ValueError):
            pass
        x = bytearray(1 << 30)
        print("breached")
        """,
        ML,
        cases=BREACH,
    ),
    row(
        "mmap_of_deleted_files",
        """
        import mmap, os
        kept = []
        while True:
            with open("f", "w+b") as f:
                os.ftruncate(f.fileno(), 8 << 20)
                m = mmap.mmap(f.fileno(), 8 << 20)
                for i in range(0, len(m), 4096):
                    m[i] = 1
                kept.append(m)
            os.unlink("f")
        """,
        RE,
        ML,
        limits=LONGER,
        note="SIGBUS when the folder is full, MemoryError before",
    ),
]

# --- 36-43: the interpreter's own limits ----------------------------------------------------------

BREAKING = [
    row(
        "36_unbounded_recursion",
        "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(n):\n    return f(n + 1) + 1\nf(0)",
        TL,
        RE,
        ML,
        note="MemoryError where the frames fill memory before the stack",
    ),
    row("37_segfault", "import ctypes\nctypes.string_at(0)", RE),
    row("38_abort", "import os\nos.abort()", RE),
    row(
        "39_repr_of_a_deep_list",
        """
        x = []
        for _ in range(10**6):
            x = [x]
        repr(x)
        """,
        RE,
        limits=LONGER,
        slow=True,
    ),
    row(
        "39_repr_of_a_deep_list_without_a_limit",
        """
        import sys
        sys.setrecursionlimit(1 << 30)
        x = []
        for _ in range(10**6):
            x = [x]
        repr(x)
        """,
        RE,
        ML,
        TL,
        note="overflows the stack; CPython looks each level up in a list, so it may take for ever",
    ),
    row(
        "43_constant_folding_of_powers",
        "x = " + " + ".join(["(7 ** 1000 ** 2)"] * 30),
        TL,
        ML,
        RE,
        WA,
    ),
    row(
        "deeply_nested_result",
        "def f(x):\n    y = []\n    for _ in range(100000):\n        y = [y]\n    return y",
        RE,
        ML,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "circular_result",
        "def f(x):\n    y = []\n    y.append(y)\n    return y",
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "forged_depth_bomb",
        """
        import os
        bomb = b'{"result":' + b'{"list":[' * 200000 + b']}' * 200000 + b'}'
        def f(x):
            for fd in range(3, 64):
                try:
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, bomb, 0)
                except OSError:
                    pass
            os._exit(0)
        """,
        OL,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "forged_depth_bomb_within_the_output_limit",
        """
        import os
        bomb = b'{"result":' + b'{"list":[' * 10000 + b']}' * 10000 + b'}'
        def f(x):
            for fd in range(3, 64):
                try:
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, bomb, 0)
                except OSError:
                    pass
            os._exit(0)
        """,
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "forged_json_of_all_kinds",
        """
        import os
        def f(x):
            for fd in range(3, 64):
                try:
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, b'{"result":{"int":"zz"},"error":[1],"limit":"none"}', 0)
                except OSError:
                    pass
            os._exit(0)
        """,
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "forged_huge_integer",
        """
        import os
        def f(x):
            for fd in range(3, 64):
                try:
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, b'{"result":' + b'9' * 200000 + b'}', 0)
                except OSError:
                    pass
            os._exit(0)
        """,
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "nan_result",
        "def f(x):\n    return float('nan')",
        WA,
        cases=(CallCase((7,), 14.0),),
        entry="f",
    ),
    row(
        "inf_result",
        "def f(x):\n    return [float('-inf')]",
        WA,
        cases=(CallCase((7,), [float("inf")]),),
        entry="f",
    ),
    row("prints_nan", "print('nan')", WA, cases=(StdinCase("", "1.0\n"),)),
]

# --- 44-50: other processes -----------------------------------------------------------------------

KILLING = [
    row(
        "44_kills_everybody",
        "import os\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)",
        RE,
        WA,
        note="what is on the same uid dies, itself last",
    ),
    row(
        "45_kills_its_parent",
        "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.2)\nraise SystemExit(1)",
        RE,
    ),
    row(
        "46_kills_1_to_59",
        """
        import os
        for pid in range(1, 60):
            if pid not in (os.getpid(), os.getppid()):
                try:
                    os.kill(pid, 9)
                except OSError:
                    pass
        print("denied")
        """,
        WA,
        RE,
        cases=BREACH,
    ),
    row(
        "47_daemon_holding_stdout",
        """
        import os, time
        print("ok", flush=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "48_stops_itself",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        TL,
        limits=Limits(1, 0.6, memory_mb=256),
    ),
    row(
        "49_traces_others",
        SYSCALL
        + textwrap.dedent(
            """
            got = 0
            for pid in [os.getppid(), 1] + list(range(2, 60)):
                for number, args in ((101, (16, pid, 0, 0)), (310, (pid, 0, 0, 0, 0, 0)),
                                     (101, (0x4206, pid, 0, 0))):
                    try:
                        call(number, *args)
                        got += pid != os.getpid()
                    except OSError:
                        pass
            print("breached" if got else "denied")
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "50_opens_others_memory",
        """
        import os
        got = 0
        for pid in os.listdir("/proc"):
            if pid.isdigit() and int(pid) != os.getpid():
                for name in ("mem", "environ", "maps", "auxv"):
                    try:
                        with open("/proc/%s/%s" % (pid, name), "rb", 0) as file:
                            got += name == "mem" or len(file.read(64)) > 0
                    except OSError:
                        pass
        print("breached" if got else "none opened")
        """,
        WA,
        cases=BREACH,
    ),
    row(
        "parents_command_lines_hold_nothing",
        """
        import os, re
        found = set()
        for pid in os.listdir("/proc"):
            if pid.isdigit():
                for name in ("cmdline", "environ", "comm", "stack", "status"):
                    try:
                        data = open("/proc/%s/%s" % (pid, name), "rb").read()
                        found.update(re.findall(rb"NEEDLE-[0-9a-f]{10}", data))
                    except OSError:
                        pass
        print(*(f.decode() for f in found))
        """,
        WA,
    ),
    row(
        "kills_its_parent_between_cases",
        "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.1)\nprint('ok')",
        RE,
        OK,
        cases=PLAIN * 2,
        note="the parent is process 1 of its namespace and cannot be killed, or its end is ours",
    ),
    row(
        "stops_its_parent_between_cases",
        "import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nprint('ok')",
        TL,
        RE,
        OK,
        cases=PLAIN * 2,
        limits=Limits(1, 0.6, memory_mb=256),
        note="what counts is the next program",
    ),
    row(
        "burns_in_its_children",
        """
        import os
        for _ in range(3):
            if os.fork() == 0:
                while True:
                    pass
        os.wait()
        """,
        TL,
    ),
    row(
        "burns_in_a_daemon",
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True:
                    pass
            os._exit(0)
        os.wait()
        time.sleep(1000)
        """,
        TL,
    ),
    row(
        "executes_a_shell",
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'while :; do :; done'])",
        TL,
        RE,
        note="an image need not have a shell",
    ),
]

# --- 51-67: the network and the kernel ------------------------------------------------------------

_TRY = """
def verdict(results):
    print("breached" if any(results) else "denied")
def works(f):
    try:
        f()
        return True
    except (OSError, ValueError, AttributeError):
        return False
"""

WALLS = [
    row(
        "51_only_loopback",
        """
        with open("/proc/net/dev") as file:
            names = {line.split(":")[0].strip() for line in file if ":" in line}
        # The kernel puts tunnels of its own, idle ones, beside lo.
        idle = {"lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0",
                "ip6_vti0", "ip6gre0"}
        print("breached" if names - idle else "only lo")
        """,
        WA,
        cases=BREACH,
    ),
    row(
        "52_host_loopback_listener",
        "import socket\ns = socket.create_connection(('127.0.0.1', @PORT@), 1)\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "53_host_abstract_socket",
        "import socket\ns = socket.socket(socket.AF_UNIX)\n"
        "s.connect('\\0@ABSTRACT@')\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "54_docker_socket",
        "import socket\nfor p in ('/var/run/docker.sock', "
        "'/run/docker.sock'):\n    s = socket.socket(socket.AF_UNIX)\n    s.connect(p)\n"
        "    print('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "55_vsock",
        "import socket\nsocket.socket(40, socket.SOCK_STREAM)\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "56_packet_netlink_alg_can",
        "import socket\n"
        + _TRY
        + "verdict(works(lambda a=a, t=t: socket.socket(a, t)) for a, t in "
        "((17, 3), (17, 2), (16, 3), (38, 5), (29, 3), (2, 3), (10, 3), (44, 3), (21, 5)))",
        WA,
        cases=BREACH,
    ),
    row(
        "57_reads_shadow", "print(open('/etc/shadow').read())\nprint('breached')", RE, cases=BREACH
    ),
    row(
        "58_environ_of_others",
        """
        import os, re
        found = set(re.findall("NEEDLE-[0-9a-f]{10}", repr(dict(os.environ))))
        for pid in os.listdir("/proc"):
            if pid.isdigit():
                try:
                    data = open("/proc/" + pid + "/environ").read()
                    found.update(re.findall("NEEDLE-[0-9a-f]{10}", data))
                except OSError:
                    pass
        print(*found)
        """,
        WA,
    ),
    row(
        "59_writes_passwd",
        "open('/etc/passwd', 'a').write('x::0:0::/:/bin/sh')\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "60_writes_stdlib",
        "import os\nopen(os.__file__, 'a').write('#')\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "60_writes_the_runner",
        "import os\n" + _TRY + "import sys\n"
        "verdict(works(lambda p=p: open(p, 'ab')) for p in ('/rlrf/runner.py', "
        "'/sandbox/x', '/x', '/usr/x', sys.executable, '/proc/sys/kernel/core_pattern', "
        "'/proc/sysrq-trigger', '/sys/fs/cgroup/x'))",
        WA,
        cases=BREACH,
    ),
    row(
        "61_setuid_0",
        "import os\nos.setuid(0)\nos.setgid(0)\nprint('breached' if "
        "open('/proc/self/status').read().count('CapEff:\\t0000000000000000') == 0 else 'no')",
        RE,
        WA,
        cases=BREACH,
        note="uid 0 of a user namespace without capabilities stays so, and may say so",
    ),
    row(
        "62_mknod",
        "import os, stat\nos.mknod('d', stat.S_IFBLK | 0o666, os.makedev(8, 0))\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "63_mount",
        SYSCALL + "call(165, b'none', b'.', b'tmpfs', 0, 0)\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row("64_unshare", SYSCALL + "call(272, 0x10000000)\nprint('breached')", RE, cases=BREACH),
    row(
        "64_clone_into_namespaces",
        SYSCALL + _TRY + "flags = (0x10000000, 0x20000, 0x40000000, "
        "0x20000000)\ndef new(f):\n    pid = call(56, f | 17, 0, 0, 0, 0)\n    if pid == 0:\n"
        "        os._exit(0)\n    os.waitpid(pid, 0)\n"
        "verdict(works(lambda f=f: new(f)) for f in flags)",
        WA,
        cases=BREACH,
    ),
    row(
        "64_clone3_and_setns",
        SYSCALL + _TRY + "import struct\n"
        "arg = struct.pack('=11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)\n"
        "def new():\n    pid = call(435, arg, 88)\n    if pid == 0:\n        os._exit(0)\n"
        "verdict([works(new), works(lambda: call(308, os.open('/proc/self/ns/net', 0), 0))])",
        WA,
        cases=BREACH,
    ),
    row(
        "65_io_uring",
        SYSCALL + "p = ctypes.create_string_buffer(120)\ncall(425, 4, p)\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "66_bpf",
        SYSCALL + "p = ctypes.create_string_buffer(72)\n"
        "struct.pack_into('=4I', p, 0, 2, 4, 4, 1)\ncall(321, 0, p, 72)\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "67_add_key",
        SYSCALL + "call(248, b'user', b'x', b'y', 1, -4)\nprint('breached')",
        RE,
        cases=BREACH,
    ),
    row(
        "other_kernel_interfaces",
        SYSCALL
        + _TRY
        + textwrap.dedent(
            """
            page = ctypes.create_string_buffer(4096)
            names = dict(userfaultfd=(323, 0), perf=(298, page, 0, -1, -1, 0),
                         swapon=(167, b"x", 0),
                         init_module=(175, page, 16, b""), kexec=(246, 0, 0, 0, 0),
                         pidfd_getfd=(438, 3, 0, 0), open_tree=(428, -100, b"/", 1),
                         fsopen=(430, b"tmpfs", 0), chroot=(161, b"."), pivot=(155, b".", b"."),
                         name_to_handle=(303, -100, b".", page, page, 0), reboot=(169, 1, 2, 3, 0),
                         sethostname=(170, b"x", 1), quotactl=(179, 0, 0, 0, 0),
                         acct=(163, b"x"), iopl=(172, 3), process_vm_readv=(310, 1, 0, 0, 0, 0, 0))
            verdict([works(lambda a=a: call(*a)) for a in names.values()])
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "int_0x80",
        """
        import ctypes, mmap
        # mov eax, 20 (getpid of i386); int 0x80; ret
        code = bytes.fromhex("b814000000cd80c3")
        m = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        m.write(code)
        f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
        got = f()
        print("breached" if got > 0 else "denied")
        """,
        RE,
        WA,
        cases=BREACH,
    ),
    row(
        "x32_calls",
        SYSCALL + _TRY + "verdict([works(lambda n=n: call(0x40000000 + n, 0)) "
        "for n in (39, 272, 57 + 400)])",
        WA,
        cases=BREACH,
    ),
    row(
        "personality",
        SYSCALL + _TRY + "verdict([works(lambda v=v: call(135, v)) for v in (8, 0x40000, "
        "0x400000)])",
        WA,
        cases=BREACH,
    ),
    row(
        "makes_itself_dumpable",
        SYSCALL
        + "libc.prctl(4, 1, 0, 0, 0)\nlibc.prctl(36, 0, 0, 0, 0)\n"
        + "libc.prctl(0x59616d61, -1, 0, 0, 0)\nlibc.prctl(22, 0, 0, 0, 0)\n"
        + "print('breached' if libc.prctl(39, 0, 0, 0, 0) != 1 else 'denied')",
        WA,
        cases=BREACH,
        note="no_new_privs stays, whatever else it sets",
    ),
    row(
        "setuid_programs_give_nothing",
        """
        import os, subprocess
        rich = []
        for folder in ("/bin", "/usr/bin", "/sbin", "/usr/sbin"):
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                try:
                    if os.stat(folder + "/" + name).st_mode & 0o6000:
                        rich.append(folder + "/" + name)
                except OSError:
                    pass
        nnp = "NoNewPrivs:\\t1" in open("/proc/self/status").read()
        print("breached" if rich and not nnp else "denied")
        """,
        WA,
        cases=BREACH,
    ),
]

# --- 68-79: what it says --------------------------------------------------------------------------

SAYING = [
    row("68_stdout_is_none", "import sys\nsys.stdout = None\nprint('ok')", WA, cases=PLAIN),
    row("69_all_bytes", "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 20)", WA),
    row("70_lone_surrogate", "print('\\ud800')", RE),
    row("71_ansi_escapes", "print('\\x1b[31mok\\x1b[0m')", WA, cases=PLAIN),
    row("72_full_width_digit", "print('\\uff17')", WA, cases=(StdinCase("7\n", "7\n"),)),
    row("73_zero_width", "print('o\\u200bk')", WA, cases=PLAIN),
    row("74_right_then_exit_1", "print('ok')\nexit(1)", RE, cases=PLAIN),
    row(
        "75_excepthook_exits_0",
        "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\nprint('ok', flush=True)\n"
        "raise ValueError",
        RE,
        cases=PLAIN,
    ),
    row("76_exception_of_100_mb", "raise ValueError('x' * 100_000_000)", ML, OL),
    row(
        "77_exception_whose_str_exits",
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\n"
        "print('ok', flush=True)\nraise E",
        RE,
        cases=PLAIN,
    ),
    row("78_system_exit_of_an_object", "print('ok')\nraise SystemExit(object())", RE, cases=PLAIN),
    row(
        "79_line_of_900_kb",
        "print('x' * 900_000)",
        WA,
        limits=Limits(1, 4, memory_mb=256, output_kb=1024),
    ),
    row(
        "prints_a_signalling_nan",
        "print('sNaN')",
        WA,
        cases=(StdinCase("", "1.0\n"),),
        note="comparing one raises, and must not on the host",
    ),
    row("prints_infinities", "print('1e999999999 Infinity')", WA, cases=(StdinCase("", "1 1\n"),)),
    row("prints_a_number_of_200_kb", "print('9' * 200_000)", WA, cases=(StdinCase("", "1\n"),)),
    row("stretches_its_output", "import os\nos.ftruncate(1, 15 << 20)", OL, RE),
    row(
        "returns_a_huge_integer",
        "def f(x):\n    return 10 ** 100_000",
        WA,
        cases=(CallCase((7,), 1.5),),
        entry="f",
    ),
    row("raises_a_bare_class", "class E(BaseException):\n    pass\nraise E", RE),
    row(
        "exception_with_a_lying_class",
        "class M(type):\n    __name__ = property(lambda c: 1 / 0)\n"
        "class E(Exception, metaclass=M):\n    __class__ = property(lambda s: 1 / 0)\n"
        "    def __str__(self):\n        import os\n        os._exit(0)\n"
        "print('ok', flush=True)\nraise E",
        RE,
        WA,
        note="it leaves while it is being described",
    ),
    row(
        "surrogate_in_the_source",
        "print('\ud800')",
        CE,
        note="an answer in JSON can hold one",
    ),
    row("surrogate_in_the_message", "raise ValueError('\\ud800')", RE),
    row(
        "surrogate_in_the_result",
        "def f(x):\n    return '\\ud800'",
        WA,
        cases=SECRET_CALL,
        entry="f",
    ),
    row("closes_everything", "import os\nos.closerange(0, 300)", WA, RE),
    row(
        "closes_everything_before_the_call",
        "import os\nos.closerange(0, 300)\ndef f(x):\n    return x",
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "closes_everything_before_the_asserts",
        "import os\nos.closerange(0, 300)\ndef f(x):\n    return x",
        WA,
        RE,
        cases=ASSERTS,
        entry="f",
    ),
    row(
        "lowers_the_limits_of_its_parent",
        """
        import os, resource
        for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_AS):
            try:
                resource.prlimit(os.getppid(), what, (1, 1))
            except (OSError, ValueError):
                pass
        print("ok")
        """,
        OK,
        RE,
        TL,
        ML,
        cases=PLAIN * 2,
        note="what counts is the next program",
    ),
]

# --- what it leaves in its folder -----------------------------------------------------------------

LEAVING = [
    row(
        "symlinks_out_of_the_folder",
        """
        import os
        for n, to in enumerate(("/usr", "/", "..", "/sandbox", "/rlrf", "/proc/self/cwd", ".")):
            os.symlink(to, "link%d" % n)
        os.mkdir("d")
        for n, to in enumerate(("/usr", "..", "../..", "/etc/passwd")):
            os.symlink(to, "d/link%d" % n)
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "its_folder_becomes_a_symlink",
        """
        import os
        here = os.getcwd()
        done = 0
        try:
            os.rename(here, here + "x")
            os.symlink("/usr", here)
            done = 1
        except OSError:
            pass
        try:
            os.rmdir(here)
            os.symlink("/usr", here)
            done = 1
        except OSError:
            pass
        print("ok")
        """,
        OK,
        cases=PLAIN,
        note="in a folder it may not write, it cannot; else the sweep must not follow",
    ),
    row(
        "hard_links",
        """
        import os
        open("a", "w").write("x")
        for n in range(200):
            os.link("a", "b%d" % n)
        for path in ("/etc/passwd", "/usr/bin/env", "/rlrf/runner.py"):
            try:
                os.link(path, "stolen")
                raise SystemExit("linked " + path)
            except OSError:
                pass
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "folders_of_mode_0",
        """
        import os
        os.makedirs("a/b/c")
        for name in ("a/b/c/f", "a/f"):
            open(name, "w").close()
            os.chmod(name, 0)
        for name in ("a/b/c", "a/b", "a", "."):
            os.chmod(name, 0)
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "folders_1500_deep",
        """
        import os
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        print("ok")
        """,
        OK,
        cases=PLAIN,
        note="as deep as the inodes allow, paths beyond PATH_MAX",
    ),
    row(
        "folders_10000_deep",
        """
        import os
        try:
            for _ in range(10000):
                os.mkdir("d" * 200)
                os.chdir("d" * 200)
        except OSError:
            pass
        print("ok")
        """,
        OK,
        cases=PLAIN,
        limits=LONGER,
        note="until the inodes are used up",
        slow=True,
    ),
    row(
        "fifos_and_sockets",
        """
        import os, socket
        for n in range(50):
            try:
                os.mkfifo("fifo%d" % n)
            except PermissionError:
                pass
            s = socket.socket(socket.AF_UNIX)
            s.bind("socket%d" % n)
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "strange_names",
        """
        import os
        for name in (b"\\xff\\xfe", b"a\\nb", b"-rf", b" ", b"*", b"." * 3, b"x" * 255,
                     b".moved-1", b".moved-2", b"\\x1b[2J"):
            os.mkdir(name)
            os.mkdir(name + b"/.moved-1" if len(name) < 200 else name + b"/y")
            os.mkdir((name + b"/.moved-1" if len(name) < 200 else name + b"/y") + b"/z")
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "writes_while_it_is_swept",
        """
        import os
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                n = 0
                while True:
                    n += 1
                    try:
                        os.mkdir("d%d" % n)
                        open("d%d/f" % n, "w").close()
                    except OSError:
                        pass
            os._exit(0)
        os.wait()
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "leaves_a_crowd",
        """
        import os, signal, time
        for _ in range(8):
            if os.fork() == 0:
                os.setsid()
                for s in range(1, 65):
                    try:
                        signal.signal(s, signal.SIG_IGN)
                    except (OSError, ValueError):
                        pass
                while True:
                    time.sleep(1000)
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
]

# --- hacks of graders -----------------------------------------------------------------------------

HACKS = [
    row(
        "exit_inside_the_call",
        "import sys\ndef f(x):\n    sys.exit(0)",
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "os_exit_inside_the_call",
        "import os\ndef f(x):\n    os._exit(0)",
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "exit_at_import",
        "import sys\nsys.exit(0)\ndef f(x):\n    return 1",
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "none_expected_and_exit",
        "import os\ndef f(x):\n    os._exit(0)",
        WA,
        RE,
        cases=(CallCase((7,), None),),
        entry="f",
        note="no result is not the result None",
    ),
    row(
        "kill_9_inside_the_call",
        "import os\ndef f(x):\n    os.kill(os.getpid(), 9)",
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "stdout_markers",
        """
        for line in ("ACCEPTED", "PASSED", "1 passed in 0.01s", "OK", "Ran 3 tests", "test ok",
                     "<<<RESULT>>> true", "##SCORE=1.0##", "{\\"passed\\": true}", "exit code: 0",
                     "----- expected output -----"):
            print(line)
        """,
        WA,
    ),
    row(
        "operator_overloading",
        """
        class Any(list):
            def __eq__(self, o): return True
            def __ne__(self, o): return False
            def __lt__(self, o): return True
            def __contains__(self, o): return True
            def __iter__(self): return iter([14])
            def __len__(self): return 1
            def __getitem__(self, i): return 14
        def f(x): return Any([1])
        """,
        WA,
        cases=(CallCase((7,), [14]),),
        entry="f",
    ),
    row(
        "dict_overloading",
        """
        class Any(dict):
            def __eq__(self, o): return True
            def items(self): return [("a", 14)]
            def __iter__(self): return iter(["a"])
        def f(x): return Any(b=1)
        """,
        WA,
        cases=(CallCase((7,), {"a": 14}),),
        entry="f",
    ),
    row(
        "pretends_to_be_another_class",
        """
        class Fake:
            @property
            def __class__(self): return int
            def __eq__(self, o): return True
            def __index__(self): return 14
            def __int__(self): return 14
        def f(x): return Fake()
        """,
        RE,
        WA,
        cases=(CallCase((7,), 14),),
        entry="f",
    ),
    row(
        "metaclass_tricks",
        """
        class Meta(type):
            def __eq__(cls, o): return True
            def __hash__(cls): return hash(int)
            def __instancecheck__(cls, i): return True
            def __subclasscheck__(cls, c): return True
        class Fake(metaclass=Meta):
            def __eq__(self, o): return True
        def f(x): return Fake()
        """,
        RE,
        WA,
        cases=(CallCase((7,), 14),),
        entry="f",
    ),
    row(
        "patches_the_runner_through_modules",
        """
        import gc, os, sys, types
        changed = 0
        for module in list(sys.modules.values()) + [o for o in gc.get_objects()
                                                    if type(o) is types.ModuleType]:
            for name in ("encode", "decode", "describe", "find", "_dumps", "verdict", "judge"):
                if hasattr(module, name) and module is not os:
                    try:
                        setattr(module, name, lambda *a, **k: 14)
                        changed += 1
                    except Exception:
                        pass
        def f(x): raise ValueError("not solved")
        """,
        RE,
        WA,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "patches_the_runner_through_frames",
        """
        import sys
        frame = sys._getframe()
        while frame is not None:
            for scope in (frame.f_globals, frame.f_locals):
                for name in list(scope):
                    if name in ("encode", "describe", "find", "decode", "limit"):
                        scope[name] = lambda *a, **k: 14
            for value in list(frame.f_locals.values()):
                if hasattr(value, "__dict__") and not isinstance(value, type(sys)):
                    try:
                        value.expected = value.passed = value.verdict = True
                        value.kind = "stdin"
                    except Exception:
                        pass
            frame = frame.f_back
        def f(x): raise ValueError("not solved")
        """,
        RE,
        WA,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "reads_ahead_in_the_other_cases",
        """
        import os, re
        found = set()
        for fd in range(64):
            try:
                found.update(re.findall(rb"NEEDLE-[0-9a-f]{10}", os.pread(fd, 1 << 20, 0)))
            except OSError:
                pass
        def f(x):
            return next((f.decode() for f in found), None)
        """,
        WA,
        RE,
        cases=SECRET_CALL,
        entry="f",
    ),
    row(
        "remembers_between_cases",
        """
        import builtins, sys
        def f(x):
            seen = hasattr(builtins, "seen") or "seen" in sys.modules
            builtins.seen = True
            sys.modules["seen"] = sys
            if seen:
                return "breached"
        """,
        WA,
        cases=(CallCase((1,), None), CallCase((2,), "breached")),
        entry="f",
    ),
    row(
        "leaves_a_child_that_answers_the_next_case",
        """
        import os, time
        def f(x):
            if x == 1:
                if os.fork() == 0:
                    while True:
                        for fd in range(3, 64):
                            try:
                                os.pwrite(fd, b'{"result": "breached"}', 0)
                            except OSError:
                                pass
                return None
            return "no"
        """,
        WA,
        cases=(CallCase((1,), None), CallCase((2,), "breached")),
        entry="f",
    ),
    # --- and of asserts
    row(
        "asserts_exit_early",
        "import sys\ndef f(x):\n    sys.exit(0)",
        RE,
        WA,
        cases=ASSERTS,
        entry="f",
    ),
    row(
        "asserts_os_exit", "import os\ndef f(x):\n    os._exit(0)", RE, WA, cases=ASSERTS, entry="f"
    ),
    row("asserts_exit_at_import", "import os\nos._exit(0)", RE, WA, cases=ASSERTS, entry="f"),
    row(
        "asserts_object_equal_to_all",
        "class Y:\n    def __eq__(s, o): return True\ndef f(x):\n    return Y()",
        RE,
        WA,
        cases=ASSERTS,
        entry="f",
    ),
    row(
        "asserts_int_equal_to_all",
        "class Y(int):\n    def __eq__(s, o): return True\n    def __hash__(s): return 0\n"
        "def f(x):\n    return Y(7)",
        WA,
        RE,
        cases=ASSERTS,
        entry="f",
    ),
    row(
        "asserts_redefine_assertion_error",
        "import builtins\nbuiltins.AssertionError = type('A', (SystemExit,), {})\n"
        "AssertionError = builtins.AssertionError\ndef f(x):\n    raise AssertionError(0)",
        RE,
        WA,
        cases=ASSERTS,
        entry="f",
    ),
    row("asserts_generator", "def f(x):\n    yield 2", RE, WA, cases=ASSERTS, entry="f"),
    row("asserts_function", "def f(x):\n    return lambda *a: 2", RE, WA, cases=ASSERTS, entry="f"),
    row("asserts_raise", "def f(x):\n    raise KeyError(x)", RE, WA, cases=ASSERTS, entry="f"),
    row(
        "asserts_raise_system_exit_by_name",
        "SystemExit_ = type('SystemExit', (Exception,), {})\ndef f(x):\n    raise SystemExit_(0)",
        RE,
        WA,
        cases=ASSERTS,
        entry="f",
        note="an exception named like one that ends the asserts with 0",
    ),
    row(
        "asserts_raise_stop_iteration",
        "def f(x):\n    raise StopIteration",
        RE,
        WA,
        cases=(AssertCase("for _ in iter(lambda: f(1), 3):\n    break\nassert f(1) == 2"),),
        entry="f",
    ),
    row(
        "asserts_forged_replies",
        """
        import os
        def f(x):
            for fd in range(3, 64):
                for line in (b'{"result": 2}\\n' * 50, b'{"op": "done"}\\n',
                             b'{"result": {"list": [' + b"1," * 10 + b'\\n'):
                    try:
                        os.write(fd, line)
                    except OSError:
                        pass
            os._exit(0)
        """,
        WA,
        RE,
        cases=(AssertCase("assert candidate(1) == 3"),),
        entry="f",
    ),
    row(
        "asserts_endless_reply",
        """
        import os
        def f(x):
            while True:
                for fd in range(3, 64):
                    try:
                        os.write(fd, b"x" * 65536)
                    except OSError:
                        pass
        """,
        TL,
        OL,
        RE,
        ML,
        cases=ASSERTS,
        limits=Limits(1, 0.8, memory_mb=256),
        entry="f",
        slow=True,
    ),
    row(
        "asserts_never_answered",
        "def f(x):\n    while True:\n        pass",
        TL,
        cases=ASSERTS,
        entry="f",
    ),
    row(
        "asserts_sleep",
        "import time\ndef f(x):\n    time.sleep(1000)",
        TL,
        cases=ASSERTS,
        entry="f",
        limits=Limits(1, 0.6, memory_mb=256),
        slow=True,
    ),
    row(
        "asserts_searched_for",
        OWN_MEMORY
        + textwrap.dedent(
            """
            def f(x):
                found = own_memory(rb"NEEDLE-[0-9a-f]{10}")
                return next((f.decode() for f in found), None)
            """
        ),
        WA,
        RE,
        cases=(AssertCase(f"assert candidate(1) == {NEEDLE!r}"),),
        entry="f",
        limits=LONGER,
        note="the asserts are in another sandbox",
    ),
]

HOSTILE = [
    *FAKING,
    *ENDLESS,
    *EATING,
    *BREAKING,
    *KILLING,
    *WALLS,
    *SAYING,
    *LEAVING,
    *HACKS,
]

# --- what one program leaves for the next ---------------------------------------------------------

_PLACES = """
import os
places = [os.getcwd(), os.path.dirname(os.getcwd()), "/tmp", "/var/tmp", "/dev/shm", "/run",
          "/run/lock", "/sandbox", "/dev/mqueue", "/home", "/root", "/",
          os.environ.get("HOME", "."),
          os.environ.get("TMPDIR", "."), "/usr/lib/python3/dist-packages"]
"""

PAIRS = [
    pair(
        "P1_cwd",
        "open('left.txt', 'w').write('x')\nimport os\nos.mkdir('left')",
        "import os\nprint('found' if os.listdir('.') else 'not found')",
    ),
    pair(
        "P2_other_places",
        _PLACES
        + textwrap.dedent(
            """
            for place in places:
                try:
                    open(os.path.join(place, "left-behind"), "w").write("x")
                except OSError:
                    pass
            """
        ),
        _PLACES
        + "print('found' if any(os.path.exists(os.path.join(p, 'left-behind')) for p in places) "
        "else 'not found')",
    ),
    pair(
        "P3_sysv_shm",
        SYSCALL + "try:\n    call(29, 0x524c, 4096, 0o1666)\nexcept OSError:\n    pass",
        SYSCALL + "try:\n    call(29, 0x524c, 4096, 0)\n    print('found')\nexcept OSError:\n"
        "    p = '/proc/sysvipc/shm'\n"
        "    text = open(p).read() if os.path.exists(p) else ''\n"
        "    print('found' if str(0x524c) in text else 'not found')",
    ),
    pair(
        "P4_sysv_msg_and_sem",
        SYSCALL + "for n, a in ((68, (0x524c, 0o1666)), (64, (0x524c, 1, 0o1666))):\n    try:\n"
        "        call(n, *a)\n    except OSError:\n        pass",
        SYSCALL + "got = 0\nfor n, a in ((68, (0x524c, 0)), (64, (0x524c, 1, 0))):\n    try:\n"
        "        call(n, *a)\n        got = 1\n    except OSError:\n        pass\n"
        "print('found' if got else 'not found')",
    ),
    pair(
        "P5_posix_mq",
        SYSCALL + "for f in (lambda: call(240, b'left', 0o102, 0o666, 0),\n"
        "          lambda: open('/dev/mqueue/left', 'w'),\n"
        "          lambda: open('/dev/shm/sem.left', 'w')):\n"
        "    try:\n        f()\n    except OSError:\n        pass",
        SYSCALL
        + "got = os.path.exists('/dev/mqueue/left') or os.path.exists('/dev/shm/sem.left')\n"
        "try:\n    call(240, b'left', 0, 0, 0)\n    got = 1\nexcept OSError:\n    pass\n"
        "print('found' if got else 'not found')",
    ),
    pair(
        "P6_daemon_and_abstract_socket",
        """
        import os, socket, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                s = socket.socket(socket.AF_UNIX)
                s.bind("\\0left-behind")
                s.listen()
                try:
                    t = socket.socket()
                    t.bind(("127.0.0.1", 45678))
                    t.listen()
                except OSError:
                    pass
                while True:
                    time.sleep(1000)
            os._exit(0)
        os.wait()
        time.sleep(0.3)
        """,
        """
        import os, socket
        got = 0
        for family, to in ((socket.AF_UNIX, "\\0left-behind"),
                           (socket.AF_INET, ("127.0.0.1", 45678))):
            try:
                s = socket.socket(family)
                s.settimeout(1)
                s.connect(to)
                got = 1
            except OSError:
                pass
        mine = os.getuid()
        for pid in os.listdir("/proc"):
            try:
                name = open("/proc/%s/stat" % pid).read().split()
                if pid.isdigit() and name[2] == "S" and os.stat("/proc/" + pid).st_uid not in (
                        0, mine, 65534):
                    got = 1
            except (OSError, IndexError):
                pass
        print("found" if got else "not found")
        """,
    ),
    pair(
        "P7_keyring",
        SYSCALL + "for ring in (-1, -2, -3, -4, -5):\n    try:\n"
        "        call(248, b'user', b'left', b'secret', 6, ring)\n"
        "    except OSError:\n        pass",
        SYSCALL + "got = 0\nfor ring in (-1, -2, -3, -4, -5):\n    try:\n"
        "        call(250, 10, ring, b'user', b'left', 0)\n        got = 1\n"
        "    except OSError:\n        pass\n"
        "try:\n    call(249, b'user', b'left', 0, 0)\n    got = 1\nexcept OSError:\n    pass\n"
        "print('found' if got else 'not found')",
    ),
    pair(
        "P8_module_state",
        """
        import builtins, collections, json, math, random, string, sys
        builtins.left = sys.left = json.left = math.left = collections.left = 1
        sys.modules["left"] = sys
        string.digits = "left"
        random.seed(424242)
        sys.path.append("left")
        sys.setrecursionlimit(77777)
        import gc, threading
        gc.callbacks.append(lambda *a: None)
        """,
        """
        import builtins, collections, gc, json, math, string, sys
        got = any(hasattr(m, "left") for m in (builtins, sys, json, math, collections))
        got = got or "left" in sys.modules or string.digits == "left" or "left" in sys.path
        got = got or sys.getrecursionlimit() == 77777 or gc.callbacks
        print("found" if got else "not found")
        """,
    ),
    pair(
        "P9_environment_nice_umask",
        """
        import os, resource, signal, sys
        os.environ["LEFT"] = "x"
        os.putenv("LEFT", "x")
        os.nice(5)
        os.umask(0o177)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[0]])
        try:
            open("/proc/self/oom_score_adj", "w").write("999")
        except OSError:
            pass
        """,
        """
        import os, resource, signal
        got = "LEFT" in os.environ or b"LEFT" in open("/proc/self/status", "rb").read()
        # Relative to the parent: the whole suite may run niced.
        got = got or os.nice(0) != os.getpriority(os.PRIO_PROCESS, os.getppid())
        got = got or os.umask(0) == 0o177
        got = got or signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        got = got or signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        got = got or resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 20
        print("found" if got else "not found")
        """,
    ),
    pair(
        "P10_code_and_output_in_memory",
        f"""
        secret = {PLANTED!r}
        print(secret * 50, flush=True)
        import sys
        sys.stderr.write(secret * 50)
        kept = [secret + str(n) for n in range(5000)]
        """,
        OWN_MEMORY + "print('found' if own_memory(rb'PLANTED-[0-9a-f]{10}') else 'not found')",
    ),
]

HEALTHY = row("healthy", "print(int(input()) * 6)", OK, cases=(StdinCase("7\n", "42\n"),))
