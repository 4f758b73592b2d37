"""What programs may do and what becomes of them, on every backend; and the checkers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from rlrf import UsageError, run_sync
from rlrf.sandbox import (
    MISSING,
    AssertCase,
    CallCase,
    Exact,
    Limits,
    Lines,
    Program,
    RawRun,
    Returns,
    StdinCase,
    Text,
    Tokens,
    Verdict,
    start_sandbox,
)
from tests.backends import BACKENDS, WALLED, options

LIMITS = Limits(cpu_s=1, wall_s=5, memory_mb=256, output_kb=64)
BRIEFLY = Limits(cpu_s=0.4, wall_s=5, memory_mb=256, output_kb=64)  # for what never ends


def opened(backend):
    made = run_sync(start_sandbox(backend, slots=2, **options(backend)))
    yield made
    run_sync(made.aclose())


@pytest.fixture(scope="module", params=BACKENDS)
def pool(request):
    yield from opened(request.param)


@pytest.fixture(scope="module", params=WALLED)
def walled(request):
    yield from opened(request.param)


def run(pool, code, cases=None, entry=None, **options):
    cases = cases or [StdinCase("", "ok\n")]
    return pool.run_sync(Program(code, entry), cases, **{"limits": LIMITS, **options})


def healthy(pool):
    return run(pool, "print('ok')").verdict is Verdict.ACCEPTED


# --- what programs may do -------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "print('ok')",
        "import sys\nsys.stdout.write('ok')",
        "if __name__ == '__main__':\n    print('ok')",
        "print('ok')\nexit(0)",
        "import sys, os\nprint('ok')\nsys.stdout.flush()\nos._exit(0)",
        "import sys\nprint('noise', file=sys.stderr)\nprint('ok')",
        "def f(n):\n    return 0 if n == 0 else f(n - 1)\nf(5000)\nprint('ok')",
        "# coding: utf-16\nprint('ok')",
        "print('ok  ')\nprint()",
        "import heapq, collections, math, itertools, re\nprint('ok')",
    ],
)
def test_ordinary_programs_are_accepted(pool, code):
    assert run(pool, code).verdict is Verdict.ACCEPTED


def test_standard_input_arrives_whole(pool):
    big = "x" * 300_000 + "\n"
    code = "import sys\nt = sys.stdin.read()\nprint(len(t))"
    assert run(pool, code, [StdinCase(big, "300001\n")]).verdict is Verdict.ACCEPTED
    code = "print(input()[:1] + 'k')"  # leaves the rest unread
    assert run(pool, code, [StdinCase("o" + big, "ok\n")]).verdict is Verdict.ACCEPTED


def test_functions_return_their_exact_values(pool):
    code = "def f(x):\n    return [x, (x, 2.5), {'k': None}, True]"
    case = CallCase((7,), [7, [7, 2.5], {"k": None}, True])
    assert run(pool, code, [case], "f").verdict is Verdict.ACCEPTED
    method = "class Solution:\n    def f(self, a, b):\n        return a * b"
    assert run(pool, method, [CallCase((3, 4), 12)], "Solution.f").verdict is Verdict.ACCEPTED


def test_every_case_starts_afresh(pool):
    code = "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)"
    report = run(pool, code, [CallCase((1,), 1), CallCase((2,), 1)], "f")
    assert report.verdict is Verdict.ACCEPTED


def test_every_case_finds_an_empty_folder(pool):
    look = "import os\nprint('ok' if not os.listdir('.') else 'no')\n"
    code = look + "os.makedirs('a/b')\nos.chmod('a', 0)"
    report = run(pool, code, [StdinCase("", "ok")] * 3)
    assert report.verdict is Verdict.ACCEPTED


def test_random_is_the_same_every_time(pool):
    code = "import random\nprint(random.random())"
    assert len({run(pool, code).cases[0].raw.stdout for _ in range(3)}) == 1


def test_what_happens_at_exit_and_in_threads_counts(pool):
    code = """
import atexit, threading, time
atexit.register(lambda: print('k'))
def late():
    time.sleep(0.01)
    print('o', end='')
threading.Thread(target=late).start()
"""
    assert run(pool, code).verdict is Verdict.ACCEPTED


def test_the_same_program_gives_the_same_bytes(pool):
    code = "print({'a', 'b', 'c', 'd'}, hash('x'))\nprint(object())"
    first, second = (run(pool, code).cases[0].raw.stdout for _ in range(2))
    assert first.splitlines()[0] == second.splitlines()[0]
    errors = [run(pool, "raise ValueError(object())").cases[0].raw.error for _ in range(2)]
    assert errors[0] == errors[1]
    assert "0x..." in errors[0].message


# --- verdicts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("print('no')", Verdict.WRONG_ANSWER),
        ("", Verdict.WRONG_ANSWER),
        ("1 / 0", Verdict.RUNTIME_ERROR),
        ("import sys\nsys.exit(3)", Verdict.RUNTIME_ERROR),
        ("import os\nos.kill(os.getpid(), 11)", Verdict.RUNTIME_ERROR),
        ("print('ok'", Verdict.COMPILE_ERROR),
        ("x = '\0'", Verdict.COMPILE_ERROR),
        ("while True:\n    pass", Verdict.TIME_LIMIT),
        pytest.param(
            "import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True:\n    pass",
            "time_limit",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "while True:\n    try:\n        pass\n    except BaseException:\n        pass",
            "time_limit",
            marks=pytest.mark.slow,
        ),
        ("x = bytearray(10**10)", Verdict.MEMORY_LIMIT),
        ("x = []\nwhile True:\n    x.append('y' * 10**6)", Verdict.MEMORY_LIMIT),
        ("while True:\n    print('x' * 10000)", Verdict.OUTPUT_LIMIT),
    ],
)
def test_verdicts(pool, code, verdict):
    # Memory takes time to fill on a machine that is busy or short of it.
    patient = Limits(cpu_s=10, wall_s=30, memory_mb=256, output_kb=64)
    limits = {Verdict.TIME_LIMIT: BRIEFLY, Verdict.MEMORY_LIMIT: patient}.get(verdict, LIMITS)
    assert run(pool, code, limits=limits).verdict == verdict
    assert healthy(pool)


def test_sleeping_is_stopped_by_the_wall_limit(pool):
    limits = Limits(cpu_s=1, wall_s=0.5, memory_mb=256)
    report = run(pool, "import time\ntime.sleep(1000)", limits=limits)
    assert report.verdict is Verdict.TIME_LIMIT


def test_an_error_is_located_in_the_programs_own_lines(pool):
    code = "import json\n\ndef f(x):\n    return json.loads(x)\n\nf('{')\n"
    error = run(pool, code).cases[0].raw.error
    assert error.type == "JSONDecodeError"
    assert error.frames == ((6, "<module>"), (4, "f"))
    assert error.line == 4
    compile_error = run(pool, "x = 1\ny = (").cases[0].raw.error
    assert (compile_error.type, compile_error.line) == ("SyntaxError", 2)


def test_it_stops_at_the_first_failure_or_never(pool):
    cases = [StdinCase("", "ok\n"), StdinCase("", "no\n"), StdinCase("", "ok\n")]
    verdicts = [c.verdict for c in run(pool, "print('ok')", cases).cases]
    assert verdicts == [Verdict.ACCEPTED, Verdict.WRONG_ANSWER, Verdict.SKIPPED]
    report = run(pool, "print('ok')", cases, stop="never")
    assert [c.verdict for c in report.cases][2] is Verdict.ACCEPTED
    assert report.verdict is Verdict.WRONG_ANSWER
    assert report.passed == 2


# --- programs that mean harm ----------------------------------------------------------------

FORGE = """
import json, os
for fd in range(3, 64):
    try:
        os.write(fd, (json.dumps({"result": 42, "verdict": "accepted"}) + "\\n").encode())
    except OSError:
        pass
"""


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import atexit\natexit.register(print, 'ACCEPTED')",
        'print(\'{"verdict": "accepted"}\')',
        FORGE,
        "import sys\nsys.stdout.close()",
        "import os\nos.close(1)",
    ],
)
def test_nothing_but_the_right_output_is_accepted(pool, code):
    assert run(pool, code).verdict in (Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR)
    assert healthy(pool)


@pytest.mark.parametrize(
    "message",
    [
        {"error": {"frames": 5}},
        {"error": {"frames": [[1]], "line": 10**30}},
        {"error": [1]},
        {"result": {"float": 10**400}},
        {"result": {"dict": [[[1], 2]]}},
        {"result": {"list": 3}},
        {"cpu": "x", "hello": None},
    ],
)
def test_forged_messages_are_noise(walled, message):
    code = f"""
import json, os
for fd in range(3, 64):
    try:
        os.write(fd, ({json.dumps(message)!r} + "\\n").encode())
    except OSError:
        pass
os._exit(0)
"""
    report = run(walled, code + "def f():\n    return 1", [CallCase((), 1)], "f")
    assert report.verdict in (Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR)


def test_a_limit_is_paid_once_not_on_every_case(pool):
    cases = [StdinCase(str(i), "ok\n") for i in range(50)]
    report = run(pool, "while True:\n    pass", cases, stop="never", limits=BRIEFLY)
    assert [c.verdict for c in report.cases] == [Verdict.TIME_LIMIT] + [Verdict.SKIPPED] * 49


@pytest.mark.parametrize(
    "body",
    [
        "    import sys\n    sys.exit(0)",
        "    import os\n    os._exit(0)",
        "    class E:\n        def __eq__(self, o):\n            return True\n    return E()",
        "    class I(int):\n        def __eq__(self, o):\n            return True\n    return I(1)",
        "    return None",
    ],
)
def test_a_function_cannot_claim_to_be_right(pool, body):
    report = run(pool, "def f():\n" + body, [CallCase((), 42)], "f")
    assert report.verdict in (Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR)


def test_expected_values_are_not_in_the_sandbox(walled):
    code = """
import glob, os
def f():
    found = []
    for path in glob.glob('/rlrf/*') + glob.glob('/proc/self/*') + glob.glob('/tmp/*'):
        try:
            found.append(open(path, 'rb').read())
        except OSError:
            pass
    return b'needle-in-hay'.replace(b'-', b'_') in b''.join(found)
"""
    # The program looks for the expected value, spelt so that its own source does not hold it.
    report = run(walled, code, [CallCase((), "needle_in_hay")], "f")
    assert report.verdict is Verdict.WRONG_ANSWER
    assert report.cases[0].raw.result is False


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
        "open('/etc/shadow').read()",
        "open('/rlrf/runner.py', 'w')",
        "open('/usr/evil', 'w')",
        "open('/evil', 'w')",
        "import os\nos.setuid(0)",
        "import os\nos.mount if hasattr(os, 'mount') else open('/nonexistent')",
    ],
)
def test_the_walls_hold(walled, code):
    assert run(walled, code + "\nprint('ok')").verdict is Verdict.RUNTIME_ERROR


def test_it_does_not_run_as_root_and_sees_no_files(walled):
    code = "import os\nprint(os.getuid() != 0, os.listdir('/tmp'), sorted(os.environ)[:1])"
    out = run(walled, code).cases[0].raw.text
    assert out.startswith("True []")


def test_a_fork_bomb_hurts_nobody(walled):
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run(walled, code).verdict is Verdict.TIME_LIMIT
    assert healthy(walled)


def test_a_daemon_left_behind_does_not_hold_up_the_verdict(pool):
    code = "import os, time\nprint('ok', flush=True)\nif os.fork() == 0:\n    time.sleep(1000)"
    assert run(pool, code, limits=Limits(cpu_s=1, wall_s=60, memory_mb=256)).verdict in (
        Verdict.ACCEPTED,
    )


def test_ending_the_parent_gains_nothing(walled):
    code = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(1, 9)\nprint('no')"
    assert run(walled, code).verdict in (Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR)
    assert healthy(walled)


def test_files_of_one_run_are_gone_in_the_next(pool):
    plant = "import os\nos.makedirs('a/b')\nopen('a/b/left', 'w').write('x')\nos.chmod('a', 0)"
    run(pool, plant)
    assert run(pool, "import os\nprint(os.listdir('.'))").cases[0].raw.text == "[]\n"


def interpreters():
    """Other Pythons of this machine, from 3.8 on."""
    found = {shutil.which(f"python3.{minor}") for minor in range(8, 20)} - {None}
    found |= {str(p) for p in Path.home().glob(".pyenv/versions/3.*/bin/python3")}
    for path in sorted(found):
        told = subprocess.run(
            [path, "-c", "import sys; print(*sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        version = tuple(map(int, told.stdout.split()))
        if version >= (3, 8):
            yield pytest.param(path, id=".".join(map(str, version)))


@pytest.mark.slow  # the one that runs the tests is tried by all others
@pytest.mark.parametrize("python", list(interpreters()))
def test_the_runner_works_in_every_python(python):
    pool = run_sync(start_sandbox("process", slots=1, allow_unsafe=True, python=python))
    code = "def f(x):\n    return {x: (1, [2.5])}"
    assert run(pool, code, [CallCase((7,), {7: [1, [2.5]]})] * 3, "f").verdict == "accepted"
    assert judged(pool, code, "assert f(7)[7] == (1, [2.5])").verdict is Verdict.ACCEPTED
    assert run(pool, "while True: pass").verdict is Verdict.TIME_LIMIT
    assert run(pool, "print('ok'").verdict is Verdict.COMPILE_ERROR
    error = run(pool, "import json\njson.loads('{')").cases[0].raw.error
    assert (error.type, error.line) == ("JSONDecodeError", 2)
    assert healthy(pool)
    assert pool.stats().replaced == 0
    run_sync(pool.aclose())


def test_the_most_output_of_the_worst_kind_still_travels(pool):
    code = "import sys\nfor f in (sys.stdout, sys.stderr):\n    f.write('\\0' * (3072 << 10))"
    limits = Limits(output_kb=3072, stderr_kb=3072)
    raw = run(pool, code, limits=limits).cases[0].raw
    assert (len(raw.stdout), len(raw.stderr), raw.limit) == (3072 << 10, 3072 << 10, None)


# --- asserts --------------------------------------------------------------------------------


def judged(pool, code, asserts, setup="", **options):
    return run(pool, code, [AssertCase(asserts, setup)], "f", **options)


def test_asserts_call_the_program_from_outside(pool):
    code = "def f(x, *, by=1):\n    return [(x, by), {x}, 0.5]"
    asserts = "assert f(1, by=2) == [(1, 2), {1}, 0.5]\nassert candidate(3)[0] == (3, 1)"
    assert judged(pool, code, asserts).verdict is Verdict.ACCEPTED
    setup = "def check(candidate):\n    for i in range(20):\n        assert candidate(i)[0][0] == i"
    assert judged(pool, code, "check(f)", setup).verdict is Verdict.ACCEPTED


def test_a_failing_assert_says_which(pool):
    report = judged(pool, "def f(x):\n    return x", "assert f(1) == 1\nassert f(2) == 3")
    assert report.verdict is Verdict.WRONG_ANSWER
    failure = report.cases[0].raw.assertion
    assert (failure.type, failure.line) == ("AssertionError", 2)


def test_an_exception_of_the_program_is_its_own(pool):
    report = judged(pool, "\ndef f(x):\n    return 1 / x", "assert f(1) == 1\nf(0)")
    assert report.verdict is Verdict.RUNTIME_ERROR
    error = report.cases[0].raw.error
    assert (error.type, error.line) == ("ZeroDivisionError", 3)
    expected = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    assert False"
    assert judged(pool, "def f(x):\n    return 1 / x", expected).verdict is Verdict.ACCEPTED


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import sys\ndef f(x):\n    sys.exit(0)",
        "import os\ndef f(x):\n    os._exit(0)",
        "class E:\n    def __eq__(self, o):\n        return True\ndef f(x):\n    return E()",
        "class I(int):\n    __eq__ = lambda s, o: True\ndef f(x):\n    return I(0)",
        "import builtins\nclass A(Exception):\n    pass\nbuiltins.AssertionError = A\nf = id",
        "def f(x):\n    return (i for i in range(2))",
        "def candidate(x):\n    return 2",
        "def f(x):\n    raise StopIteration",
        "import os\nfor fd in range(3, 60):\n    try:\n        os.write(fd, b'{\"result\":2}\\n')"
        "\n    except OSError:\n        pass\ndef f(x):\n    return 3",
    ],
)
def test_asserts_cannot_be_dodged(pool, code):
    for asserts in ("assert f(1) == 2\nassert f(5) == 6", "assert all(map(f, (1, 0)))"):
        report = judged(pool, code, asserts)
        if "map" not in asserts or "StopIteration" in code:  # these values are true
            assert report.verdict in (Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR)
    assert healthy(pool)


def test_asserts_are_not_in_the_programs_sandbox(walled):
    code = """
import gc, glob
def f(x):
    needle = 'needle-in-hay'.replace('-', '_')
    texts = [o for o in gc.get_objects() if isinstance(o, str)]
    for path in glob.glob('/proc/[0-9]*/*') + glob.glob('/rlrf/*') + glob.glob('/tmp/*'):
        try:
            texts.append(open(path, errors='replace').read())
        except OSError:
            pass
    return any(needle in t for t in texts)
"""
    report = judged(walled, code, "assert f(1) == 'needle_in_hay'")
    assert report.verdict is Verdict.WRONG_ANSWER


def test_asserts_that_never_end_cost_their_limit_only(pool):
    stuck = "def f(x):\n    while True:\n        pass"
    assert judged(pool, stuck, "assert f(1) == 2", limits=BRIEFLY).verdict is Verdict.TIME_LIMIT
    assert healthy(pool)


def test_asserts_that_do_not_compile_are_the_authors_mistake(pool):
    with pytest.raises(UsageError, match="the asserts do not compile"):
        judged(pool, "def f(x):\n    return x", "assert f(1 ==")
    assert healthy(pool)


def test_values_of_every_builtin_kind_travel_both_ways(pool):
    values = (
        1 << 80,
        -1.5,
        float("inf"),
        1 + 2j,
        "\ud800é\0",
        b"\xff",
        (1, [2]),
        {3},
        {(1,): None},
    )
    case = CallCase((values,), values)
    assert run(pool, "def f(x):\n    return x", [case], "f").verdict is Verdict.ACCEPTED
    subclasses = """
import collections
P = collections.namedtuple('P', 'x y')
def f():
    return [P(1, 2), collections.Counter('aab'), collections.OrderedDict(a=1)]
"""
    case = CallCase((), [(1, 2), {"a": 2, "b": 1}, {"a": 1}])
    assert run(pool, subclasses, [case], "f").verdict is Verdict.ACCEPTED


# --- checkers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checker", "got", "expected", "right"),
    [
        (Lines(), "1 2 \n3\n\n", "1 2\n3", True),
        (Lines(), "1.0 2", "1 2.00", True),
        (Lines(), "1.0001", "1", False),
        (Lines(), "a\nb", "a b", False),
        (Lines(), "", "x", False),
        (Exact(), "a\n", "a\n", True),
        (Exact(), "a", "a\n", False),
        (Text(), "a \n b\n\n", "a\n b", True),
        (Text(), "a\nb", "a\n b", False),
        (Tokens(), "a\n b", "a b", True),
        (Tokens(), "1.0", "1", False),
        (Tokens(1e-6), "0.3333333", "0.33333331", True),
        (Tokens(1e-6), "0.34", "0.33", False),
    ],
)
def test_output_checkers(checker, got, expected, right):
    assert checker.accepts(RawRun(stdout=got.encode()), StdinCase("", expected)) is right


@pytest.mark.parametrize(
    ("got", "expected", "right"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (1, True, False),
        ((1, [2]), [1, (2,)], True),
        ({"a": (1,)}, {"a": [1]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ("1", 1, False),
        (None, None, True),
        (MISSING, None, False),
        ([1, 2], [1], False),
        (0.1 + 0.2, 0.3, False),
    ],
)
def test_returned_values(got, expected, right):
    assert Returns().accepts(RawRun(result=got), CallCase((), expected)) is right
    if got == 0.1 + 0.2:
        assert Returns(1e-9).accepts(RawRun(result=got), CallCase((), expected))


# --- one program and the next, one slot and the other -----------------------------------------


def test_a_program_has_no_descriptors_but_its_own(pool):
    code = (
        "import os\n"
        "names = []\n"
        "for n in os.listdir('/proc/self/fd'):\n"
        "    try:\n        names.append(os.readlink('/proc/self/fd/' + n))\n"
        "    except FileNotFoundError:\n        pass  # listdir's own\n"
        "print(sorted(n.partition(':')[2].split()[0] if 'memfd' in n else n for n in names))"
    )
    report = run(pool, code)
    assert report.cases[0].raw.text == "['channel', 'stderr', 'stdin', 'stdout']\n"


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK"])
def test_there_is_no_network_not_even_a_loopback(walled, family):
    code = (
        f"import socket\ntry:\n    socket.socket(socket.{family})\nexcept OSError:\n    print('ok')"
    )
    assert run(walled, code).verdict is Verdict.ACCEPTED
    own = "import socket\na, b = socket.socketpair()\na.send(b'ok')\nprint(b.recv(2).decode())"
    assert run(walled, own).verdict is Verdict.ACCEPTED


def test_memory_files_are_refused(walled):
    code = "import os\ntry:\n    os.memfd_create('x')\nexcept PermissionError:\n    print('ok')"
    assert run(walled, code).verdict is Verdict.ACCEPTED


@pytest.mark.docker
def test_slots_do_not_use_up_each_others_processes():
    limits = Limits(cpu_s=4, wall_s=30, processes=12)
    forks = (
        "import os, time\npids = []\nfor _ in range(10):\n    pid = os.fork()\n"
        "    if not pid:\n        time.sleep(0.5)\n        os._exit(0)\n    pids.append(pid)\n"
        "for pid in pids:\n    os.waitpid(pid, 0)\nprint('ok')"
    )
    pool = run_sync(start_sandbox("docker", slots=4, **options("docker")))

    async def go():
        import asyncio

        case = [StdinCase("", "ok\n")]
        some = [pool.run(Program(forks), case, limits=limits) for _ in range(8)]
        return await asyncio.gather(*some)

    try:
        assert [r.verdict for r in run_sync(go())] == [Verdict.ACCEPTED] * 8
    finally:
        run_sync(pool.aclose())


@pytest.mark.docker
def test_a_program_cannot_signal_what_ends_it():
    """The helper that ends a program's processes has its effective uid only."""
    code = (
        "import os, signal, time\n"
        "for _ in range(3):\n    if os.fork() == 0:\n        break\n"
        "own = os.getpid()\n"
        "while True:\n"
        "    for pid in range(own + 1, own + 40):\n"
        "        try:\n            os.kill(pid, signal.SIGSTOP)\n"
        "        except OSError:\n            pass\n"
    )
    pool = run_sync(start_sandbox("docker", slots=1, **options("docker")))
    try:
        for _ in range(2):
            report = run(pool, code, limits=Limits(cpu_s=30, wall_s=0.4, processes=8))
            assert report.verdict is Verdict.TIME_LIMIT
            assert healthy(pool)
        assert pool.stats().replaced == 0
    finally:
        run_sync(pool.aclose())


@pytest.mark.docker
def test_what_hides_its_memory_is_ended_itself():
    """A program may lower its score with the OOM killer; its memory still counts as its own."""
    child = (
        "open('/proc/self/oom_score_adj', 'w').write('0')\n"
        "hold = []\n"
        "while True: hold.append(bytearray(8 << 20))\n"
    )
    code = (
        f"import subprocess, sys\nkids = [subprocess.Popen([sys.executable, '-c', {child!r}])"
        " for _ in range(4)]\nfor kid in kids:\n    kid.wait()\nraise MemoryError"
    )
    pool = run_sync(start_sandbox("docker", slots=1, memory_mb=512, **options("docker")))
    try:
        limits = Limits(cpu_s=20, wall_s=40, memory_mb=512)
        report = run(pool, code, limits=limits)
        assert report.verdict is Verdict.MEMORY_LIMIT
        assert healthy(pool)
        assert pool.stats().replaced == 0
    finally:
        run_sync(pool.aclose())


# --- as python would ------------------------------------------------------------------------


def test_a_main_guard_does_not_run_in_a_module_that_is_called(pool):
    code = "def f(x):\n    return x + 1\n\nif __name__ == '__main__':\n    f(input())\n"
    assert run(pool, code, [CallCase((1,), 2)], entry="f").verdict is Verdict.ACCEPTED
    asserts = [AssertCase("assert f(1) == 2")]
    assert run(pool, code, asserts, entry="f").verdict is Verdict.ACCEPTED
    assert run(pool, "if __name__ == '__main__':\n    print('ok')").verdict is Verdict.ACCEPTED


def test_a_thread_may_fork(pool):
    code = (
        "import os, threading\n"
        "def work():\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        print(threading.main_thread() is threading.current_thread())\n"
        "        threading._shutdown()\n"
        "        import sys; sys.stdout.flush(); os._exit(0)\n"
        "    print(os.waitpid(pid, 0)[1])\n"
        "t = threading.Thread(target=work)\nt.start()\nt.join()\n"
    )
    report = run(pool, code, [StdinCase("", "True\n0\n")])
    assert report.verdict is Verdict.ACCEPTED, report.cases[0].raw


def test_as_many_threads_start_as_processes_are_allowed(pool):
    code = (
        "import threading\ngate = threading.Event()\n"
        "threads = [threading.Thread(target=gate.wait) for _ in range(12)]\n"
        "for t in threads:\n    t.start()\ngate.set()\nprint('ok')"
    )
    limits = Limits(cpu_s=2, wall_s=10)
    assert run(pool, code, limits=limits).verdict is Verdict.ACCEPTED


def test_a_stack_without_end_may_be_asked_for(pool):
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_STACK, (-1, -1))\n"
        "sys.setrecursionlimit(10**6)\n"
        "def f(n):\n    return 1 + f(n - 1) if n else 0\n"
        "print('ok' if f(20000) == 20000 else '')"
    )
    assert run(pool, code).verdict is Verdict.ACCEPTED


def test_a_file_has_a_name_and_an_exit_a_reason(pool):
    assert run(pool, "print('ok' if __file__ else '')").verdict is Verdict.ACCEPTED
    raw = run(pool, "import sys\nsys.exit('no more')").cases[0].raw
    assert (raw.exit_code, raw.stderr) == (1, b"no more\n")


def test_a_prelude_runs_first_and_its_lines_do_not_count(pool):
    program = Program(
        "print(twice(len(sys.argv)))\n1 / 0",
        prelude="import sys\n\ndef twice(n):\n    return 2 * n",
    )
    raw = pool.run_sync(program, [StdinCase("", "2\n")], limits=LIMITS).cases[0].raw
    assert raw.stdout == b"2\n"
    assert raw.error.line == 2


@pytest.mark.parametrize(
    "limits",
    [
        {"cpu_s": float("inf")},
        {"compile_s": float("nan")},
        {"memory_mb": 1.5},
        {"processes": True},
        {"file_mb": 1 << 45},
        {"open_files": 3},
        {"wall_s": "1"},
    ],
)
def test_limits_that_make_no_sense(limits):
    (name,) = limits
    with pytest.raises(UsageError, match=f"Limits.{name} is "):
        Limits(**limits)


@pytest.mark.parametrize("entry", ["", "a b", "f(", "Solution."])
def test_entries_that_are_no_names(entry):
    with pytest.raises(UsageError, match=r"Program\.entry is"):
        Program("x", entry=entry)
