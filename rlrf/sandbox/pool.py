"""The pool: many sandboxes, fair turns, and no verdict from a failing machine.

It does not wall programs off (a backend does) or judge them (a checker does), and it does not try
again what a program has brought about itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from rlrf._async import call_hook, lasting_loop, steady_loop
from rlrf.errors import InfraError, RlrfError, UsageError, check_whole
from rlrf.notices import notice
from rlrf.plugins import Registry
from rlrf.sandbox.checkers import Asserts, Checker, Exact, Lines, Returns, Text, Tokens, accepted
from rlrf.sandbox.program import (
    MAX_OUTPUT_KB,
    AssertCase,
    CallCase,
    Case,
    CaseResult,
    Job,
    Limits,
    Program,
    RawRun,
    RunReport,
    Sandbox,
    SandboxInfo,
    StdinCase,
    Verdict,
)

T = TypeVar("T")
log = logging.getLogger("rlrf.sandbox")
sandboxes = Registry("rlrf.sandboxes", "sandbox")

PREFERRED = ("docker", "bubblewrap")
"""What ``auto`` tries, best first; then ``process``, which refuses."""
MAX_SLOTS = 4096
"""Most programs at once in one pool."""


@dataclass
class PoolStats:
    """What a pool has done.

    Attributes:
        programs: programs that got a verdict.
        cases: cases that ran.
        retries: programs run again after the machinery failed.
        starved: programs run again alone, after the machine was too busy for them.
        started: sandboxes started.
        replaced: sandboxes thrown away before their time: after a failure or a cancellation.
        recycled: sandboxes thrown away because of their age.
    """

    programs: int = 0
    cases: int = 0
    retries: int = 0
    starved: int = 0
    started: int = 0
    replaced: int = 0
    recycled: int = 0


@dataclass
class _Slot:
    """A place for one sandbox, which comes and goes."""

    sandbox: Sandbox | None = None
    programs: int = 0
    born: float = 0.0
    used: float = 0.0


@dataclass
class _Turns:
    """Who may run next: free slots, and those who wait, one queue per group, served in turn."""

    free: deque[_Slot]
    size: int
    waiting: OrderedDict[Hashable, deque[asyncio.Future[_Slot]]] = field(
        default_factory=OrderedDict
    )
    alone: deque[asyncio.Future[_Slot]] = field(default_factory=deque)
    rest_until: float = 0.0
    """When, on the monotonic clock, those who wait have had their share after one who was alone."""
    _held_since: float | None = None
    _lonely: _Slot | None = None

    async def take(self, group: Hashable, *, alone: bool = False) -> _Slot:
        future: asyncio.Future[_Slot] = asyncio.get_running_loop().create_future()
        if alone:
            self.alone.append(future)
        else:
            self.waiting.setdefault(group, deque()).append(future)
        self.serve()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # served and cancelled at once
                self.give(future.result())
            else:
                self.serve()  # others may have waited for this one
            raise

    def give(self, slot: _Slot) -> None:
        if slot is self._lonely and self._held_since is not None:
            now = time.monotonic()
            self.rest_until = now + _SHARE * (now - self._held_since)
            self._lonely = self._held_since = None
        self.free.appendleft(slot)  # the warmest goes first
        self.serve()

    def serve(self) -> None:
        if self._lonely is not None:
            return
        while True:
            while self.alone and self.alone[0].cancelled():
                self.alone.popleft()
            now = time.monotonic()
            if self.alone and (not self.waiting or now >= self.rest_until):
                # It wants the machine for itself: nobody else starts before.
                self._held_since = self._held_since or now
                if len(self.free) == self.size:
                    self._lonely = self.free.popleft()
                    self.alone.popleft().set_result(self._lonely)
                return
            self._held_since = None
            if not self.free or not self.waiting:
                return
            group, queue = self.waiting.popitem(last=False)
            future = queue.popleft()
            if queue:
                self.waiting[group] = queue  # to the end: the other groups come first
            if not future.cancelled():
                future.set_result(self.free.popleft())


_SHARE = 3.0
"""As long as programs wait, those that run alone get one part of the time, and they this many."""


class SandboxPool:
    """Runs programs in up to ``slots`` sandboxes; made by :func:`open_sandbox`.

    Programs wait in line for a slot, first come first served within a group and in turn between
    groups. A sandbox that failed, or whose program was cancelled, is replaced. The pool lives on
    the event loop it was started on (started by a sync method of rlrf, on one where no hook can
    block it) and may be used from any other and from any thread.

    Args:
        make: makes a sandbox, not yet started.
        slots: programs at once.
        retries: how often a program is run again, elsewhere, after the machinery failed.
        recycle_programs: programs after which a sandbox is replaced.
        recycle_s: seconds after which it is.
        heartbeat_s: how long a sandbox may be idle before it is asked for a sign of life.
        failures: after failing for so many programs in a row the pool refuses at once, instead of
            starting sandboxes that fail, until ``cooldown_s`` have passed.
        cooldown_s: see ``failures``.
    """

    def __init__(
        self,
        make: Callable[[], Sandbox],
        slots: int,
        *,
        retries: int = 2,
        recycle_programs: int = 2000,
        recycle_s: float = 1800.0,
        heartbeat_s: float = 30.0,
        failures: int = 3,
        cooldown_s: float = 5.0,
    ) -> None:
        check_whole("slots", slots, most=MAX_SLOTS)
        self.slots, self.retries = slots, retries
        self._make = make
        self._recycle_programs, self._recycle_s = recycle_programs, recycle_s
        self._heartbeat_s, self._failures, self._cooldown_s = heartbeat_s, failures, cooldown_s
        self._slots = [_Slot() for _ in range(slots)]
        self._turns = _Turns(deque(self._slots), slots)
        self._stats = PoolStats()
        self._failed, self._refuse_until = 0, 0.0
        self._preludes: set[str] = set()
        self._last_failure: InfraError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._background: list[asyncio.Task[None]] = []  # those that end when the pool is closed
        self._closed = False
        self._info: SandboxInfo | None = None
        self.instead_of = ""  # why nothing stronger was taken, where `auto` would have preferred it

    @property
    def info(self) -> SandboxInfo:
        """What runs the programs."""
        return self._info or self._make().info

    def stats(self) -> PoolStats:
        """What the pool has done so far."""
        return self._stats

    async def start(self) -> None:
        """Start a first sandbox and prove it by running a program; the others start when needed.

        Raises:
            InfraError: the backend does not work here; the message says what to do.
            UsageError: the backend refuses.
        """
        self._loop = lasting_loop()
        await self._here(self._prove())

    async def _prove(self) -> None:
        slot = await self._turns.take(None)
        try:
            try:
                await self._start(slot)
            finally:
                self._turns.give(slot)
            probe = await self._run(*_PROBE, limits=Limits(memory_mb=64))
            if probe.verdict is not Verdict.ACCEPTED:
                raise InfraError(
                    f"the sandbox {self.info.backend} gives {probe.verdict} for a program that is "
                    "right; see `rlrf sandbox doctor`",
                    kind="sandbox_wrong",
                    retryable=False,
                )
        except BaseException:
            await self.aclose()
            raise
        self._background.append(self._spawn(self._heartbeat()))

    async def run(
        self,
        program: Program,
        cases: Sequence[Case],
        *,
        limits: Limits | None = None,
        checker: Checker | None = None,
        stop: Literal["first_failure", "never"] = "first_failure",
        group: Hashable = None,
    ) -> RunReport:
        """Run a program on its cases and judge it.

        Args:
            program: what to run.
            cases: all :class:`StdinCase`, all :class:`CallCase` or all :class:`AssertCase`.
            limits: per case; None for the defaults.
            checker: None for :class:`Lines` (stdin cases) or :class:`Returns` (call cases).
            stop: whether to skip the cases after the first failure; those after a compile
                error or a limit are always skipped.
            group: programs of different groups (say, prompts) take turns.

        Raises:
            UsageError: no cases, or cases that do not fit the program.
            InfraError: the machinery failed again and again; there is no verdict.
        """
        return await self._here(
            self._run(program, cases, limits=limits, checker=checker, stop=stop, group=group)
        )

    def run_sync(self, program: Program, cases: Sequence[Case], **options: Any) -> RunReport:
        """Sync twin of :meth:`run`, for any thread but the event loop's own.

        Raises:
            UsageError: called on an event loop, which would wait for itself; as in an async hook.
        """
        loop = self._loop or steady_loop()
        with contextlib.suppress(RuntimeError):
            if lasting_loop() is loop:
                raise UsageError("run_sync was called on an event loop; await run() there")
        future = asyncio.run_coroutine_threadsafe(self._run(program, cases, **options), loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _here(self, work: Coroutine[Any, Any, T]) -> T:
        """Do the work on the pool's own loop, whichever the caller's is."""
        if self._loop is None or asyncio.get_running_loop() is self._loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    async def _run(
        self,
        program: Program,
        cases: Sequence[Case],
        *,
        limits: Limits | None = None,
        checker: Checker | None = None,
        stop: Literal["first_failure", "never"] = "first_failure",
        group: Hashable = None,
    ) -> RunReport:
        job, check = _job(program, cases, limits or Limits(), checker)
        self._say_weaker()
        if program.prelude and program.prelude not in self._preludes:
            await self._check_prelude(program.prelude, job.limits)
        alone, failed = False, 0
        while True:
            try:
                report = await self._once(job, cases, check, stop, group, alone=alone)
            except InfraError as error:
                failed += 1
                if failed > self.retries or not error.retryable:
                    self._note_failure(error)
                    raise
                self._stats.retries += 1
                continue
            if not alone and any(c.raw is not None and c.raw.starved for c in report.cases):
                # The machine, not the program, was too slow. Once more, with nobody beside it;
                # what comes of that counts.
                self._stats.starved += 1
                alone = True
                continue
            self._stats.programs += 1
            self._stats.cases += sum(c.raw is not None for c in report.cases)
            return report

    def _say_weaker(self) -> None:
        """Notice what is weaker here than it should be."""
        name = self.info.backend
        if self.instead_of:
            notice(
                f"sandbox/{name}",
                f"sandbox 'auto' runs programs in {name}, and not in what it prefers "
                f"({self.instead_of}). `rlrf sandbox doctor` says how to mend that; "
                f"RLRF_SANDBOX={name} chooses it, without this warning",
            )
        for weaker in self.info.warnings:
            notice(f"sandbox/{name}/{weaker}", f"sandbox {name}: {weaker}")

    async def _check_prelude(self, prelude: str, limits: Limits) -> None:
        """Run a prelude alone, once: its faults are its author's, not those of the programs."""
        try:
            compile(prelude, "<prelude>", "exec")
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"Program.prelude does not compile: {error}") from None
        self._preludes.add(prelude)
        try:
            alone = Program("", prelude=prelude)
            report = await self._run(alone, [StdinCase("", "")], limits=limits)
            if report.verdict is not Verdict.ACCEPTED:
                raw = report.cases[0].raw
                told = raw.error if raw is not None else None
                why = f"{told.type}: {told.message}" if told else report.verdict
                raise UsageError(f"Program.prelude fails by itself: {why}")
        except BaseException:
            self._preludes.discard(prelude)
            raise

    async def _once(
        self,
        job: Job,
        cases: Sequence[Case],
        check: Checker,
        stop: str,
        group: Hashable,
        *,
        alone: bool,
    ) -> RunReport:
        slot = await self._turns.take(group, alone=alone)
        try:
            if self._closed:
                raise UsageError("the sandbox pool is closed")
            await self._check_breaker(slot)
            if slot.sandbox is None:
                await self._start(slot)
            assert slot.sandbox is not None
            report = await _judge(slot.sandbox, job, cases, check, stop)
        except UsageError:
            raise
        except BaseException:
            # After a failure nobody knows what is in there; after a cancellation the program is.
            self._discard(slot)
            raise
        else:
            self._failed = 0
            slot.programs += 1
            slot.used = time.monotonic()
            if slot.programs >= self._recycle_programs or slot.used - slot.born >= self._recycle_s:
                self._discard(slot, recycled=True)
            return report
        finally:
            self._turns.give(slot)

    def _note_failure(self, error: InfraError) -> None:
        if error.kind != "sandbox_refused":
            self._failed += 1
            self._last_failure = error

    async def _check_breaker(self, slot: _Slot) -> None:
        """After failures in a row, refuse for a while; unless a fresh sandbox proves to work.

        Programs that know how to break their sandbox must not stop all others.
        """
        if self._failed < self._failures:
            return
        if time.monotonic() >= self._refuse_until:
            self._discard(slot)
            try:
                await self._start(slot)
                assert slot.sandbox is not None
                job, check = _job(*_PROBE, Limits(memory_mb=64), None)
                report = await _judge(slot.sandbox, job, _PROBE[1], check, "never")
                if report.verdict is Verdict.ACCEPTED:
                    self._failed = 0
                    return
            except InfraError as error:
                self._last_failure = error
            self._refuse_until = time.monotonic() + self._cooldown_s
        raise InfraError(
            f"sandboxes failed for {self._failed} programs in a row, last: {self._last_failure}",
            kind="sandbox_refused",
            retryable=False,
        )

    # --- sandboxes come and go --------------------------------------------------------------------

    async def _start(self, slot: _Slot) -> None:
        sandbox = self._make()
        # A task of its own, which whoever closes the pool can end and wait for.
        starting = self._spawn(sandbox.start())
        self._background.append(starting)
        try:
            await starting
        except asyncio.CancelledError:
            self._spawn(self._end(sandbox))  # nobody waits for it here
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise UsageError("the sandbox pool is closed") from None  # by which it was ended
        finally:
            self._background.remove(starting)
        self._stats.started += 1
        if self._closed:  # meanwhile
            await self._end(sandbox)
            raise UsageError("the sandbox pool is closed")
        self._info = sandbox.info
        slot.sandbox, slot.programs = sandbox, 0
        slot.born = slot.used = time.monotonic()

    def _discard(self, slot: _Slot, *, recycled: bool = False) -> None:
        sandbox, slot.sandbox = slot.sandbox, None
        if sandbox is None:
            return
        if recycled:
            self._stats.recycled += 1
        else:
            self._stats.replaced += 1
        self._spawn(self._end(sandbox))

    @staticmethod
    async def _end(sandbox: Sandbox) -> None:
        try:
            await sandbox.aclose()
        except Exception as error:  # what it was closed for counts, not this
            log.warning("a sandbox could not be ended: %s", error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _heartbeat(self) -> None:
        """Ask idle sandboxes for a sign of life, so that the next program finds a living one."""
        while True:
            await asyncio.sleep(self._heartbeat_s)
            await self._check_idle()

    async def _check_idle(self) -> None:
        for slot in list(self._turns.free):
            idle_s = time.monotonic() - slot.used
            if slot.sandbox is None or idle_s < self._heartbeat_s or slot not in self._turns.free:
                continue
            self._turns.free.remove(slot)
            try:
                await slot.sandbox.ping()
                slot.used = time.monotonic()
            except InfraError:
                self._discard(slot)
            finally:
                self._turns.give(slot)

    async def aclose(self) -> None:
        """End all sandboxes; programs that run are cut off, those that wait get an error."""
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            await self._here(self.aclose())
            return
        self._closed = True
        for task in self._background:
            task.cancel()
        for slot in self._slots:
            sandbox, slot.sandbox = slot.sandbox, None
            if sandbox is not None:
                self._spawn(self._end(sandbox))
        while self._tasks:  # a start that was cut off leaves a sandbox to end
            await asyncio.wait(self._tasks)  # not `gather`: cancelled, it would cancel them
            await asyncio.sleep(0)


_PROBE = (Program("print(6 * 7)"), [StdinCase("", "42")])


def _job(
    program: Program, cases: Sequence[Case], limits: Limits, checker: Checker | None
) -> tuple[Job, Checker]:
    """What a backend gets, and who judges what it gives."""
    kinds = {type(c) for c in cases}
    wanted = {StdinCase} if program.entry is None else {CallCase, AssertCase}
    if len(kinds) != 1 or not kinds <= wanted:
        names = sorted(k.__name__ for k in kinds)
        raise UsageError(
            f"{len(cases)} cases {names} for a program with entry={program.entry!r}: give "
            "StdinCases without an entry, CallCases or AssertCases with one, not mixed, and at "
            "least one"
        )
    if program.language != "python":
        raise UsageError(f"language {program.language!r} is not supported; use 'python'")
    inputs: list[str | tuple[Any, ...] | AssertCase] = []
    for case in cases:
        match case:
            case StdinCase():
                inputs.append(case.stdin)
            case CallCase():
                inputs.append(case.args)
            case AssertCase():
                inputs.append(case)
    defaults: dict[type[Case], Checker] = {
        StdinCase: Lines(),
        CallCase: Returns(),
        AssertCase: Asserts(),
    }
    limits = _with_room(limits, cases)
    return Job(program, tuple(inputs), limits), checker or defaults[kinds.pop()]


def _with_room(limits: Limits, cases: Sequence[Case]) -> Limits:
    """The limits, with as much output as the largest right answer needs.

    Raises:
        UsageError: more than any limit can allow.
    """
    largest = 0
    for case in cases:
        if isinstance(case, StdinCase):
            largest = max(largest, len(case.expected.encode("utf-8", "replace")))
        elif isinstance(case, CallCase) and isinstance(case.expected, (str, list, tuple, dict)):
            # An integer beyond Python's limit of digits has no repr; it needs no further room.
            with contextlib.suppress(ValueError):
                largest = max(largest, 2 * len(repr(case.expected)))
    needed = largest // 1024 + 1
    if needed <= limits.output_kb:
        return limits
    if needed > MAX_OUTPUT_KB:
        raise UsageError(
            f"an expected output has {largest >> 10} kB, but no program may print more than "
            f"{MAX_OUTPUT_KB} kB; leave that test out"
        )
    return replace(limits, output_kb=min(needed + needed // 4, MAX_OUTPUT_KB))


_QUICK = (Lines, Text, Tokens, Exact, Returns, Asserts)


async def _judge(
    sandbox: Sandbox, job: Job, cases: Sequence[Case], checker: Checker, stop: str
) -> RunReport:
    results: list[CaseResult] = []
    async with contextlib.aclosing(sandbox.execute(job)) as runs:
        async for raw in runs:
            case = cases[len(results)]
            if isinstance(checker, _QUICK) and _is_small(raw, case):
                verdict = _verdict(raw, case, checker)
            else:  # takes its time, or is somebody's own: the others' deadlines must not wait
                verdict = await call_hook(_verdict, raw, case, checker)
            results.append(CaseResult(len(results), verdict, case, raw))
            # A program that does not compile fails all cases alike, and one that ran into a
            # limit would cost that limit again on every further case.
            if verdict in _FINAL or (stop == "first_failure" and verdict is not Verdict.ACCEPTED):
                break
    bad = next((r.verdict for r in results if r.verdict is not Verdict.ACCEPTED), None)
    if bad is None and len(results) < len(cases):
        raise InfraError("the sandbox gave too few results", kind="sandbox_died")
    skipped = [CaseResult(i, Verdict.SKIPPED, cases[i]) for i in range(len(results), len(cases))]
    return RunReport(bad or Verdict.ACCEPTED, (*results, *skipped))


_SMALL = 4096


def _is_small(raw: RawRun, case: Case) -> bool:
    """Whether it costs less to judge a run than to have a thread do it."""
    left = _SMALL - len(raw.stdout) - (len(case.expected) if isinstance(case, StdinCase) else 0)
    values = [raw.result]
    while values and left >= 0:
        value = values.pop()
        left -= 8
        if isinstance(value, (str, bytes, bytearray)):
            left -= len(value)
        elif isinstance(value, int):
            left -= value.bit_length() >> 3
        elif isinstance(value, (list, tuple, set, frozenset, dict)):
            left -= 8 * len(value)
            if left >= 0:
                values += value
                values += value.values() if isinstance(value, dict) else ()
    return left >= 0


_FINAL = frozenset(
    {
        Verdict.COMPILE_ERROR,
        Verdict.TIME_LIMIT,
        Verdict.MEMORY_LIMIT,
        Verdict.OUTPUT_LIMIT,
    }
)


def _verdict(raw: RawRun, case: Case, checker: Checker) -> Verdict:
    if raw.compile_error:
        return Verdict.COMPILE_ERROR
    if raw.limit is not None:
        return {
            "time": Verdict.TIME_LIMIT,
            "memory": Verdict.MEMORY_LIMIT,
            "output": Verdict.OUTPUT_LIMIT,
        }[raw.limit]
    if raw.error is not None or raw.signal is not None or raw.exit_code:
        return Verdict.RUNTIME_ERROR
    return Verdict.ACCEPTED if accepted(checker, raw, case) else Verdict.WRONG_ANSWER


# --- opening ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_sandbox(
    backend: str = "auto", *, slots: int | None = None, **options: Any
) -> AsyncIterator[SandboxPool]:
    """A pool on a backend that has proved it works here.

    Args:
        backend: a name, or ``"auto"``: the environment variable ``RLRF_SANDBOX`` if set; else
            docker if its daemon answers and has our image; else bubblewrap if a program really
            runs in it; else process (which refuses unless ``allow_unsafe=True``). The choice and
            what it guarantees are logged in one line (logger ``rlrf.sandbox``).
        slots: programs at once; None for one per core.
        options: of the backend, e.g. ``runtime="runsc"`` for ``docker``; with ``"auto"`` only
            ``allow_unsafe``.

    Raises:
        UnknownIdError: no such backend.
        InfraError: the backend does not work here.
        UsageError: the backend refuses, or does not know an option.
    """
    pool = await start_sandbox(backend, slots=slots, **options)
    try:
        yield pool
    finally:
        await pool.aclose()


async def start_sandbox(
    backend: str = "auto", *, slots: int | None = None, **options: Any
) -> SandboxPool:
    """:func:`open_sandbox` without the context manager; the caller closes the pool."""
    name = os.environ.get("RLRF_SANDBOX") or "auto" if backend == "auto" else backend
    slots = slots or os.cpu_count() or 1
    if name != "auto":
        if name != "process":
            options.pop("allow_unsafe", None)  # only the process backend has anything to allow
        return await _started(name, slots, options)
    allowed = {k: options.pop(k) for k in ("allow_unsafe",) if k in options}
    if options:
        raise UsageError(
            f"options {sorted(options)} with sandbox 'auto', whose backend is not known before; "
            "name the backend"
        )
    reasons = []
    for name in PREFERRED:
        try:
            pool = await _started(name, slots, {})
        except RlrfError as why:
            reasons.append(f"{name}: {why}")
            continue
        pool.instead_of = "; ".join(reasons)
        return pool
    instead_of = "; ".join(reasons)
    pool = await _started("process", slots, {**allowed, "instead_of": instead_of})
    pool.instead_of = instead_of
    return pool


async def _started(name: str, slots: int, options: dict[str, Any]) -> SandboxPool:
    backend = sandboxes.load(name)

    def make() -> Sandbox:
        try:
            made: Sandbox = backend(**options)
        except TypeError as error:
            raise UsageError(f"sandbox {name!r}: {error}") from error
        return made

    pool = SandboxPool(make, slots)
    await pool.start()
    weaker = "".join(f"; {w}" for w in pool.info.warnings)
    log.info("sandbox: %s, %d at once: %s%s", name, slots, pool.info.guarantee, weaker)
    return pool
