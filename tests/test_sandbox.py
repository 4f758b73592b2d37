"""The sandbox protocol, both backends, and programs that mean harm."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading

import pytest

from rlrf import InfraError, UsageError
from rlrf._async import run_sync
from rlrf.sandbox import (
    MISSING,
    CallCase,
    Exact,
    Limits,
    Lines,
    Program,
    RawRun,
    Returns,
    SandboxInfo,
    SandboxPool,
    StdinCase,
    Text,
    Tokens,
    Verdict,
    open_sandbox,
    start_sandbox,
)

LIMITS = Limits(cpu_s=1, wall_s=5, memory_mb=256, output_kb=64)
needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
BACKENDS = [
    pytest.param(("bubblewrap", {}), id="bubblewrap", marks=needs_bwrap),
    pytest.param(("process", {"allow_unsafe": True}), id="process"),
]


@pytest.fixture(scope="module", params=BACKENDS)
def pool(request):
    name, options = request.param
    made = run_sync(start_sandbox(name, slots=2, **options))
    yield made
    run_sync(made.aclose())


@pytest.fixture(scope="module")
def walled():
    if not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    made = run_sync(start_sandbox("bubblewrap", slots=2))
    yield made
    run_sync(made.aclose())


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
        ("import signal\nsignal.signal(24, signal.SIG_IGN)\nwhile True:\n    pass", "time_limit"),
        (
            "while True:\n    try:\n        pass\n    except BaseException:\n        pass",
            "time_limit",
        ),
        ("x = bytearray(10**10)", Verdict.MEMORY_LIMIT),
        ("x = []\nwhile True:\n    x.append('y' * 10**6)", Verdict.MEMORY_LIMIT),
        ("while True:\n    print('x' * 10000)", Verdict.OUTPUT_LIMIT),
    ],
)
def test_verdicts(pool, code, verdict):
    assert run(pool, code).verdict == verdict
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
    report = run(pool, "while True:\n    pass", cases, stop="never")
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
    assert run(walled, code).verdict is Verdict.WRONG_ANSWER
    assert healthy(walled)


def test_files_of_one_run_are_gone_in_the_next(walled):
    run(walled, "open('/tmp/left', 'w').write('x')")
    assert run(walled, "import os\nprint(os.listdir('/tmp'))").cases[0].raw.text == "[]\n"


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


# --- the pool -------------------------------------------------------------------------------


class Fake:
    """A backend of scripted outcomes."""

    info = SandboxInfo("fake", "none")

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.running = self.most = 0

    async def start(self):
        pass

    async def execute(self, job):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in job.inputs:
                await asyncio.sleep(0)
                outcome = self.outcomes.pop(0) if self.outcomes else RawRun(stdout=b"ok")
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            self.running -= 1

    async def aclose(self):
        pass


CASE = [StdinCase("", "ok")]


def test_infrastructure_failures_are_retried_and_never_a_verdict():
    async def go():
        died = InfraError("died", kind="sandbox_died")
        pool = SandboxPool(Fake(died, died), 1)
        assert (await pool.run(Program("x"), CASE)).verdict is Verdict.ACCEPTED
        with pytest.raises(InfraError, match="died"):
            await SandboxPool(Fake(died, died, died), 1).run(Program("x"), CASE)

    asyncio.run(go())


def test_no_more_run_at_once_than_there_are_slots():
    async def go():
        fake = Fake()
        pool = SandboxPool(fake, 3)
        await asyncio.gather(*(pool.run(Program("x"), CASE) for _ in range(20)))
        assert fake.most == 3

    asyncio.run(go())


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancelling_ends_the_program(backend):
    name, options = backend

    async def go():
        async with open_sandbox(name, slots=1, **options) as pool:
            code = "import time\ntime.sleep(1000)"
            limits = Limits(cpu_s=1, wall_s=1000, memory_mb=256)
            task = asyncio.ensure_future(pool.run(Program(code), CASE, limits=limits))
            while not [t for t in threading.enumerate() if t.name == "rlrf-hook"]:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # the one slot is free again
            assert (await pool.run(Program("print('ok')"), CASE)).verdict is Verdict.ACCEPTED

    asyncio.run(go())


def test_the_process_backend_refuses_untrusted_programs():
    with pytest.raises(UsageError, match="allow_unsafe=True"):
        run_sync(start_sandbox("process"))


def test_auto_falls_back_to_a_refusal_that_says_why(monkeypatch):
    monkeypatch.delenv("RLRF_SANDBOX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageError, match="bubblewrap is not installed"):
        run_sync(start_sandbox("auto"))
    pool = run_sync(start_sandbox("auto", allow_unsafe=True))
    assert pool.info.backend == "process"
    assert "NOT a sandbox" in pool.info.guarantee


def test_the_environment_variable_overrides_auto(monkeypatch):
    monkeypatch.setenv("RLRF_SANDBOX", "process")
    with pytest.raises(UsageError, match="process backend"):
        run_sync(start_sandbox("auto"))


@pytest.mark.parametrize(
    ("cases", "entry"),
    [([], None), ([CallCase((), 1)], None), ([StdinCase("", "")], "f")],
)
def test_cases_must_fit_the_program(cases, entry):
    with pytest.raises(UsageError, match="CallCases"):
        SandboxPool(Fake(), 1).run_sync(Program("x", entry), cases)


def test_limits_must_be_positive():
    with pytest.raises(UsageError, match=r"Limits\.cpu_s is 0"):
        Limits(cpu_s=0)
