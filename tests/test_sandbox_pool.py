"""The pool: turns, retries, replacements, refusals; and choosing a backend."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import pytest

from rlrf import InfraError, UsageError, notices, run_sync
from rlrf.notices import SlowPathWarning
from rlrf.sandbox import (
    CallCase,
    Limits,
    Program,
    ProgramError,
    RawRun,
    SandboxInfo,
    SandboxPool,
    StdinCase,
    Verdict,
    open_sandbox,
    start_sandbox,
)
from rlrf.sandbox import pool as pool_module
from rlrf.sandbox.pool import _Slot, _Turns
from rlrf_sandboxes import runner
from tests.backends import BACKENDS, options

CASE = [StdinCase("", "ok")]
OK = RawRun(stdout=b"ok")
DIED = InfraError("died", kind="sandbox_died")


class Fakes:
    """Makes sandboxes of scripted outcomes, and remembers what became of them."""

    def __init__(self, *outcomes, dead_on_arrival=0):
        self.outcomes, self.dead_on_arrival = list(outcomes), dead_on_arrival
        self.running = self.most = self.alive = self.pings = 0
        self.order = []
        self.hold = None  # an event that programs wait for

    def __call__(self):
        return Fake(self)


class Fake:
    info = SandboxInfo("fake", "none")

    def __init__(self, all_):
        self.all = all_

    async def start(self):
        if self.all.dead_on_arrival:
            self.all.dead_on_arrival -= 1
            raise InfraError("does not start", kind="sandbox_start")
        self.all.alive += 1

    async def ping(self):
        self.all.pings += 1
        if self.all.outcomes and self.all.outcomes[0] == "silent":
            raise self.all.outcomes.pop(0) and DIED

    async def execute(self, job):
        self.all.running += 1
        self.all.most = max(self.all.most, self.all.running)
        self.all.order.append(job.program.code)
        try:
            if self.all.hold is not None:
                await self.all.hold.wait()
            for _ in job.inputs:
                await asyncio.sleep(0)
                outcome = self.all.outcomes.pop(0) if self.all.outcomes else OK
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            self.all.running -= 1

    async def aclose(self):
        self.all.alive -= 1


async def started(fakes, slots, **options):
    """A pool whose first programs are not eaten by the probe."""
    outcomes, fakes.outcomes = fakes.outcomes, [RawRun(stdout=b"42")]
    pool = SandboxPool(fakes, slots, **options)
    await pool.start()
    fakes.outcomes = outcomes
    fakes.order.clear()
    return pool


def test_infrastructure_failures_are_retried_elsewhere_and_never_a_verdict():
    async def go():
        fakes = Fakes(DIED, DIED)
        pool = await started(fakes, 1)
        assert (await pool.run(Program("x"), CASE)).verdict is Verdict.ACCEPTED
        assert (pool.stats().retries, pool.stats().replaced) == (2, 2)
        fakes.outcomes = [DIED] * 3
        with pytest.raises(InfraError, match="died"):
            await pool.run(Program("x"), CASE)
        await pool.aclose()
        assert fakes.alive == 0

    asyncio.run(go())


def test_a_failure_that_no_retry_helps_is_not_retried():
    async def go():
        pool = await started(Fakes(InfraError("no", retryable=False)), 1)
        with pytest.raises(InfraError, match="no"):
            await pool.run(Program("x"), CASE)
        assert pool.stats().retries == 0

    asyncio.run(go())


def test_too_few_results_are_a_failure_not_a_pass():
    class Short(Fake):
        async def execute(self, job):
            yield OK

    async def go():
        fakes = Fakes()
        pool = await started(fakes, 1)
        pool._slots[0].sandbox.__class__ = Short
        fakes.outcomes = []
        report = await pool.run(Program("x"), CASE * 2)  # a retry gets a sound sandbox
        assert report.verdict is Verdict.ACCEPTED
        assert pool.stats().retries == 1

    asyncio.run(go())


@pytest.mark.parametrize("slots", [0, -1, 10**11, 1.5, "2"])
def test_slots_are_a_number_that_a_machine_may_have(slots):
    with pytest.raises(UsageError, match=r"slots is .*whole number from 1 to 4096"):
        SandboxPool(lambda: None, slots)


def test_no_more_run_at_once_than_there_are_slots():
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 3)
        await asyncio.gather(*(pool.run(Program("x"), CASE) for _ in range(20)))
        assert fakes.most == 3

    asyncio.run(go())


def test_groups_take_turns_and_a_group_keeps_its_order():
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 1)
        fakes.hold = asyncio.Event()
        jobs = [("first", None), ("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b")]
        runs = [
            asyncio.ensure_future(pool.run(Program(code), CASE, group=group))
            for code, group in jobs
        ]
        while not fakes.running:
            await asyncio.sleep(0)
        fakes.hold.set()
        await asyncio.gather(*runs)
        assert fakes.order == ["first", "a1", "b1", "a2", "b2", "a3"]

    asyncio.run(go())


def test_a_cancelled_program_costs_its_sandbox_and_nobody_elses_turn():
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 1)
        fakes.hold = asyncio.Event()
        running = asyncio.ensure_future(pool.run(Program("x"), CASE))
        waiting = asyncio.ensure_future(pool.run(Program("y"), CASE))
        third = asyncio.ensure_future(pool.run(Program("z"), CASE))
        while not fakes.running:
            await asyncio.sleep(0)
        waiting.cancel()
        running.cancel()
        fakes.hold.set()
        assert (await third).verdict is Verdict.ACCEPTED
        assert fakes.order == ["x", "z"]
        assert pool.stats().replaced == 1
        await pool.aclose()
        assert fakes.alive == 0

    asyncio.run(go())


def test_a_program_that_the_machine_starved_runs_again_alone():
    async def go():
        starved = RawRun(limit="time", starved=True)
        fakes = Fakes(starved)
        pool = await started(fakes, 4)
        reports = await asyncio.gather(*(pool.run(Program(str(i)), CASE) for i in range(8)))
        assert {r.verdict for r in reports} == {Verdict.ACCEPTED}
        assert pool.stats().starved == 1
        fakes.outcomes = [starved, starved]
        report = await pool.run(Program("slow"), CASE)  # the second time counts
        assert report.verdict is Verdict.TIME_LIMIT

    asyncio.run(go())


def test_after_failures_in_a_row_it_refuses_and_then_tries_again():
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 1, cooldown_s=0.0)
        pool._cooldown_s = 1000.0
        fakes.outcomes, fakes.dead_on_arrival = [DIED], 1000
        for _ in range(3):
            with pytest.raises(InfraError, match="does not start"):
                await pool.run(Program("x"), CASE)
        tried = fakes.dead_on_arrival
        for _ in range(2):
            with pytest.raises(InfraError, match="for 3 programs in a row, last: does not start"):
                await pool.run(Program("x"), CASE)
            assert fakes.dead_on_arrival == tried - 1  # once, then not even that
        fakes.dead_on_arrival, pool._refuse_until = 0, 0.0
        fakes.outcomes = [RawRun(stdout=b"42")]  # for the probe
        assert (await pool.run(Program("x"), CASE)).verdict is Verdict.ACCEPTED

    asyncio.run(go())


def test_programs_that_break_their_sandbox_do_not_stop_the_others():
    async def go():
        pool = await started(fakes := Fakes(*[DIED] * 9), 1)
        for _ in range(3):
            with pytest.raises(InfraError):
                await pool.run(Program("breaks"), CASE)
        fakes.outcomes = [RawRun(stdout=b"42")]  # a fresh sandbox proves to work
        assert (await pool.run(Program("x"), CASE)).verdict is Verdict.ACCEPTED

    asyncio.run(go())


def test_a_failure_while_alone_is_retried_too():
    async def go():
        starved = RawRun(limit="time", starved=True)
        pool = await started(Fakes(starved, DIED), 1)
        assert (await pool.run(Program("slow"), CASE)).verdict is Verdict.ACCEPTED
        assert (pool.stats().starved, pool.stats().retries) == (1, 1)

    asyncio.run(go())


def test_one_who_wanted_to_be_alone_and_left_keeps_nobody_waiting():
    async def go():
        turns = _Turns(deque([_Slot(), _Slot()]), 2)
        first = await turns.take(None)
        alone = asyncio.ensure_future(turns.take(None, alone=True))
        other = asyncio.ensure_future(turns.take(None))
        await asyncio.sleep(0)
        assert not other.done()
        alone.cancel()
        turns.give(await asyncio.wait_for(other, 5))
        turns.give(first)

    asyncio.run(go())


def test_who_runs_alone_is_alone_and_does_not_hold_up_those_who_wait():
    async def go():
        turns = _Turns(deque([_Slot(), _Slot()]), 2)

        def asks(**how):
            return asyncio.ensure_future(turns.take(None, **how))

        async def settled():
            for _ in range(5):
                await asyncio.sleep(0)

        first = asks(alone=True)
        beside = asks()
        await settled()
        assert (first.done(), beside.done()) == (True, False)
        turns.give(first.result())
        await settled()
        assert beside.done()
        # It took its time; now those who wait have theirs, however many there are.
        turns.rest_until = time.monotonic() + 1000
        again, others = asks(alone=True), [asks() for _ in range(4)]
        await settled()
        assert [o.done() for o in others] == [True, False, False, False]
        for task in (beside, *others):
            assert not again.done()
            turns.give(await task)
            await settled()
        assert again.done()  # nobody waits
        third, other = asks(alone=True), asks()
        turns.rest_until = 0.0
        await settled()
        turns.give(again.result())
        await settled()
        assert other.done()  # as long as it had been held up before, and more
        assert turns.rest_until > time.monotonic()
        turns.give(other.result())
        turns.give(await third)
        assert len(turns.free) == 2

    asyncio.run(go())


def test_a_prelude_that_fails_is_its_authors_mistake():
    async def go():
        pool = await started(fakes := Fakes(), 1)
        with pytest.raises(UsageError, match="does not compile"):
            await pool.run(Program("x", prelude="def ("), CASE)
        error = ProgramError("ZeroDivisionError", "division by zero")
        for _ in range(2):  # asked again each time
            fakes.outcomes = [RawRun(exit_code=1, error=error)]
            with pytest.raises(UsageError, match=r"fails by itself: ZeroDivisionError: division"):
                await pool.run(Program("x", prelude="1/0"), CASE)
        fakes.outcomes = [RawRun()]
        for _ in range(2):
            report = await pool.run(Program("x", prelude="y = 1"), CASE)
            assert report.verdict is Verdict.ACCEPTED
        assert fakes.order.count("") == 3

    asyncio.run(go())


def test_a_program_may_print_what_is_expected_of_it():
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 1)
        seen = []
        real = Fake.execute
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Fake, "execute", lambda self, job: seen.append(job) or real(self, job))
            limits = Limits(output_kb=1)
            await pool.run(Program("x"), [StdinCase("", "a" * 4096)], limits=limits)
            await pool.run(Program("x", entry="f"), [CallCase((), ["a" * 9999])], limits=limits)
            await pool.run(Program("x"), CASE, limits=limits)
        assert [job.limits.output_kb for job in seen] == [6, 25, 1]
        with pytest.raises(UsageError, match="has 4000 kB, but no program may print more"):
            await pool.run(Program("x"), [StdinCase("", "a" * 4_096_000)])

    asyncio.run(go())


def test_sandboxes_are_recycled_by_age_and_checked_when_idle():
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 1, recycle_programs=3, heartbeat_s=0.0)
        for _ in range(6):
            await pool.run(Program("x"), CASE)
        assert (pool.stats().recycled, pool.stats().replaced) == (2, 0)
        await pool.run(Program("x"), CASE)
        await pool._check_idle()
        assert (fakes.pings, pool.stats().replaced) == (1, 0)
        fakes.outcomes = ["silent"]
        await pool._check_idle()
        assert pool.stats().replaced == 1
        await pool.aclose()
        assert fakes.alive == 0

    asyncio.run(go())


def test_a_sandbox_that_gives_wrong_answers_is_not_used():
    async def go():
        fakes = Fakes(RawRun(stdout=b"41"))
        with pytest.raises(InfraError, match="gives wrong_answer for a program that is right"):
            await SandboxPool(fakes, 1).start()
        assert fakes.alive == 0

    asyncio.run(go())


def test_closing_cuts_off_what_runs_and_refuses_what_waits():
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 2)
        fakes.hold = asyncio.Event()
        runs = [asyncio.ensure_future(pool.run(Program("x"), CASE)) for _ in range(5)]
        while fakes.running < 2:
            await asyncio.sleep(0)
        fakes.outcomes = [DIED, DIED]  # as a sandbox that is closed under a program
        await pool.aclose()
        fakes.hold.set()
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        assert {type(o) for o in outcomes} == {UsageError}
        assert fakes.alive == 0

    asyncio.run(go())


class SlowFake(Fake):
    """Takes its time to start, and more to undo a start that was cut off."""

    async def start(self):
        self.all.alive += 1
        self.all.starting.set()
        await self.all.hold.wait()

    async def aclose(self):
        for _ in range(20):
            await asyncio.sleep(0)
        self.all.alive -= 1


@pytest.mark.parametrize("cancelled", [True, False])
def test_closing_waits_until_starts_that_were_cut_off_are_undone(cancelled):
    async def go():
        fakes = Fakes()
        pool = await started(fakes, 3)
        fakes.hold, fakes.starting = asyncio.Event(), asyncio.Event()
        pool._make = lambda: SlowFake(fakes)
        runs = [asyncio.ensure_future(pool.run(Program("x"), CASE)) for _ in range(3)]
        await fakes.starting.wait()
        await asyncio.sleep(0)
        assert fakes.alive == 3  # the first runs, two start
        if cancelled:
            for run in runs:
                run.cancel()
            await asyncio.sleep(0)
        await pool.aclose()
        assert fakes.alive == 0
        fakes.hold.set()
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        wanted = asyncio.CancelledError if cancelled else UsageError
        assert {type(o) for o in outcomes[1:]} == {wanted}

    asyncio.run(go())


def test_a_start_that_is_cut_off_while_it_proves_itself_leaves_nothing():
    async def go():
        fakes = Fakes()
        fakes.hold = asyncio.Event()
        starting = asyncio.ensure_future(SandboxPool(fakes, 1).start())
        while not fakes.running:
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert fakes.alive == 0

    asyncio.run(go())


def test_what_is_large_is_judged_off_the_event_loop():
    class Threads:
        def accepts(self, raw, case):
            self.thread = threading.current_thread()
            return True

    async def go():
        seen, here = [], threading.current_thread()
        pool = await started(fakes := Fakes(), 1)
        with pytest.MonkeyPatch.context() as patch:
            real = pool_module._verdict
            patch.setattr(
                pool_module,
                "_verdict",
                lambda *a: seen.append(threading.current_thread() is here) or real(*a),
            )
            for raw in (OK, RawRun(stdout=b"1 " * 5000), OK):
                fakes.outcomes = [raw]
                await pool.run(Program("x"), CASE)
            await pool.run(Program("x"), CASE, checker=Threads())
            deep = RawRun(result=[[{1: "x" * 5000}]])
            for raw in (RawRun(result=[1, [2], {3: {4, 5}}]), deep, RawRun(result=10**9999)):
                fakes.outcomes = [raw]
                await pool.run(Program("x", "f"), [CallCase((), 1)])
        assert seen == [True, False, True, False, True, False, False]

    asyncio.run(go())


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_under_running_programs_leaves_nothing(backend):
    async def go():
        async with open_sandbox(backend, slots=2, **options(backend)) as pool:
            runs = [
                asyncio.ensure_future(pool.run(Program("while True: pass"), CASE)) for _ in range(4)
            ]
            while pool._turns.free:
                await asyncio.sleep(0)
        outcomes = await asyncio.gather(*runs, return_exceptions=True)
        assert {type(o) for o in outcomes} == {UsageError}
        assert all(slot.sandbox is None for slot in pool._slots)

    asyncio.run(go())


def test_it_may_be_used_from_any_loop_and_any_thread():
    pool = run_sync(start_sandbox("process", slots=2, allow_unsafe=True))
    program = Program("print('ok')")
    reports = [pool.run_sync(program, CASE), asyncio.run(pool.run(program, CASE))]
    thread = threading.Thread(target=lambda: reports.append(pool.run_sync(program, CASE)))
    thread.start()
    thread.join()
    assert [r.verdict for r in reports] == [Verdict.ACCEPTED] * 3

    async def inside():
        with pytest.raises(UsageError, match="await run"):
            pool.run_sync(program, CASE)

    run_sync(inside())
    asyncio.run(pool.aclose())
    with pytest.raises(UsageError, match="closed"):
        pool.run_sync(program, CASE)


# --- real backends --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancelling_ends_the_program(backend, tmp_path):
    async def go():
        async with open_sandbox(backend, slots=1, **options(backend)) as pool:
            limits = Limits(cpu_s=1000, wall_s=1000, memory_mb=256)
            task = asyncio.ensure_future(pool.run(Program("while True: pass"), CASE, limits=limits))
            while pool._turns.free:  # any moment after that will do
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await pool.run(Program("print('ok')"), CASE)).verdict is Verdict.ACCEPTED
            assert pool.stats().replaced == 1

    asyncio.run(go())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_a_program_that_wanted_the_processor_gets_a_second_run(backend):
    async def go():
        async with open_sandbox(backend, slots=1, **options(backend)) as pool:
            busy = Limits(cpu_s=10, wall_s=0.3)
            for code, retried in (("import time\ntime.sleep(100)", 0), ("while True: pass", 1)):
                report = await pool.run(Program(code), CASE, limits=busy)
                assert report.verdict is Verdict.TIME_LIMIT
                assert pool.stats().starved == retried

    asyncio.run(go())


def test_processes_that_wait_for_each_other_are_not_starved(monkeypatch):
    """Fifteen that wake together: each stands in line a little, and all of them a lot."""
    waited = {str(pid): (30_000_000, 70_000_000) for pid in range(100, 115)}

    def read(path, mode):
        return io.BytesIO(b"%d %d 15\n" % waited[path.split("/")[-2]])

    supervisor = runner.Supervisor.__new__(runner.Supervisor)
    supervisor.descendants = lambda: [(int(pid), 1, "S", 0.03) for pid in waited]
    monkeypatch.setattr(runner.os, "listdir", lambda path: [path.split("/")[-3]])
    monkeypatch.setattr(runner, "open", read, raising=False)
    assert supervisor.usage() == (pytest.approx(0.45), pytest.approx(0.1))
    waited["114"] = (30_000_000, 970_000_000)  # one that could not run
    assert supervisor.usage()[1] == pytest.approx(1.0)


def test_a_runner_that_is_left_before_it_has_begun_ends_nobody(monkeypatch):
    """It has no zygote yet, and what is below "process 0" is everything on the machine."""
    ended = []
    supervisor = runner.Supervisor.__new__(runner.Supervisor)
    supervisor.mode, supervisor.zygote_pid = "plain", 0
    monkeypatch.setattr(runner.os, "kill", lambda *args: ended.append(args))
    assert supervisor.descendants() == []
    supervisor.kill_tree()
    assert ended == []


OWNER = """
import asyncio, os, sys
from rlrf.sandbox import *
async def go():
    async with open_sandbox(sys.argv[1], slots=2, **eval(sys.argv[2])) as pool:
        limits = Limits(cpu_s=1000, wall_s=1000, memory_mb=256)
        code = "import os\\nos.fork()\\nos.setsid() if os.fork() == 0 else 0\\nwhile True: pass"
        runs = [asyncio.ensure_future(pool.run(Program(code), [StdinCase("", "")], limits=limits))
                for _ in range(2)]
        if len(sys.argv) > 3:  # a child that shares all that is open
            while pool._turns.free:
                await asyncio.sleep(0)
            if os.fork() == 0:
                os.write(1, b"%d\\n" % os.getpid())
                os.read(0, 1)
                os._exit(0)
        await asyncio.gather(*runs)
asyncio.run(go())
"""


def descendants(session):
    """Processes that carry a mark in their environment or command line, and their children."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        found[int(name)] = int(fields[1])
    below, level = set(), {session}
    while level:
        level = {pid for pid, parent in found.items() if parent in level} - below
        below |= level
    return below


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != "docker"])
def test_nothing_outlives_an_owner_that_is_killed(backend, tmp_path):
    command = [sys.executable, "-c", OWNER, backend, repr(options(backend))]
    owner = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)})
    # Two sandboxes, each with a runner, a zygote and four processes of a program.
    assert eventually(lambda: len(descendants(owner.pid)) >= 12, 60)
    born = {pid: start_time(pid) for pid in descendants(owner.pid)}
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert eventually(lambda: not any(start_time(p) == start for p, start in born.items()), 10)
    assert eventually(lambda: not list(tmp_path.iterdir()), 10)  # its folders neither


@pytest.mark.slow
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] != "docker"])
def test_a_child_of_the_owner_keeps_no_runner_alive(backend, tmp_path):
    """It has a copy of all that was open, unless it closes it."""
    command = [sys.executable, "-c", OWNER, backend, repr(options(backend)), "with a child"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, **pipes) as owner:
        try:
            child = int(owner.stdout.readline())
            born = {pid: start_time(pid) for pid in descendants(owner.pid)}
        finally:
            owner.kill()
        owner.wait()
        left = lambda: [p for p, start in born.items() if start and start_time(p) == start]  # noqa: E731
        assert len(born) >= 3
        assert eventually(lambda: left() == [child], 10)  # it waits for our word


def eventually(holds, seconds):
    """Whether it holds before so many seconds have passed."""
    pause = threading.Event()
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.01)
    return True


def start_time(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else fields[19]


# --- opening --------------------------------------------------------------------------------


def test_the_process_backend_refuses_untrusted_programs():
    with pytest.raises(UsageError, match="allow_unsafe=True"):
        run_sync(start_sandbox("process"))


@pytest.fixture
def nothing_safe(monkeypatch):
    monkeypatch.delenv("RLRF_SANDBOX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")


def test_auto_falls_back_to_a_refusal_that_says_why(nothing_safe):
    with pytest.raises(UsageError, match=r"docker: .*bubblewrap: bubblewrap is not installed"):
        run_sync(start_sandbox("auto"))
    pool = run_sync(start_sandbox("auto", allow_unsafe=True))
    assert pool.info.backend == "process"
    assert "NOT a sandbox" in pool.info.guarantee
    with pytest.warns(SlowPathWarning):
        pool.run_sync(Program("print('ok')"), [StdinCase("", "ok")])
    with notices.collected() as told:
        pool.run_sync(Program("print('ok')"), [StdinCase("", "ok")])
    run_sync(pool.aclose())
    (message,) = told  # once, though it was there before the one who listens
    assert "runs programs in process, and not in what it prefers (docker: " in message
    assert "rlrf sandbox doctor" in message


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_auto_takes_the_best_there_is_and_says_so(backend, monkeypatch, caplog):
    options(backend)
    monkeypatch.delenv("RLRF_SANDBOX", raising=False)
    if backend != "docker":
        monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with caplog.at_level("INFO", logger="rlrf.sandbox"):
        pool = run_sync(start_sandbox("auto", slots=1))
    assert pool.info.backend == backend
    assert [r.message.split(",")[0] for r in caplog.records] == [f"sandbox: {backend}"]
    assert bool(pool.instead_of) == (backend != "docker")
    run_sync(pool.aclose())


def test_the_environment_variable_overrides_auto(monkeypatch):
    monkeypatch.setenv("RLRF_SANDBOX", "process")
    with pytest.raises(UsageError, match="process backend"):
        run_sync(start_sandbox("auto"))


def test_an_unknown_option_is_named():
    with pytest.raises(UsageError, match=r"sandbox 'bubblewrap': .*'memory'"):
        run_sync(start_sandbox("bubblewrap", memory=3))
    with pytest.raises(UsageError, match=r"'memory_mb'.* with sandbox 'auto'"):
        run_sync(start_sandbox("auto", memory_mb=3))


@pytest.mark.parametrize(
    ("cases", "entry"),
    [
        ([], None),
        ([CallCase((), 1)], None),
        ([StdinCase("", "")], "f"),
        ([CallCase((), 1), StdinCase("", "")], "f"),
    ],
)
def test_cases_must_fit_the_program(cases, entry):
    with pytest.raises(UsageError, match="CallCases"):
        SandboxPool(Fakes(), 1).run_sync(Program("x", entry), cases)


def test_limits_must_be_positive():
    with pytest.raises(UsageError, match=r"Limits\.cpu_s is 0"):
        Limits(cpu_s=0)
    with pytest.raises(UsageError, match=r"Limits\.output_kb is 4000; it must be <= 3072"):
        Limits(output_kb=4000)
