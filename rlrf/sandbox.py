"""Running programs that nobody trusts: the protocol, the checkers, and the pool.

A backend (``bubblewrap``, ``process``, any entry point of ``rlrf.sandboxes``) runs a program on
inputs and reports what came out. It never sees an expected output: verdicts are computed here, on
the host, by a :class:`Checker`. What comes out of a sandbox is data, never code: it is parsed as
JSON and capped, nothing is unpickled or evaluated.

::

    async with open_sandbox("auto") as pool:
        report = await pool.run(Program(code), [StdinCase("2 3", "5")])
    report.verdict          # Verdict.ACCEPTED

A failure of the machinery is no verdict: it is retried and then raised as
:class:`rlrf.InfraError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Protocol, runtime_checkable

from rlrf._async import run_sync
from rlrf.errors import InfraError, UsageError
from rlrf.plugins import Registry


class Verdict(enum.StrEnum):
    """What became of a program, on one case or on all."""

    ACCEPTED = "accepted"
    WRONG_ANSWER = "wrong_answer"
    RUNTIME_ERROR = "runtime_error"
    COMPILE_ERROR = "compile_error"
    TIME_LIMIT = "time_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use, per case.

    Attributes:
        cpu_s: CPU seconds; rounded up to whole seconds by backends that use rlimits.
        wall_s: wall seconds, a stop for what sleeps; several times ``cpu_s``, so that a busy
            machine does not turn right programs into slow ones.
        memory_mb: address space.
        output_kb: standard output; more is :attr:`Verdict.OUTPUT_LIMIT`.
        stderr_kb: standard error that is kept; the rest is dropped.
        file_mb: size of a file it writes.
        processes: processes and threads at once.
        open_files: file descriptors.
    """

    cpu_s: float = 4.0
    wall_s: float = 12.0
    memory_mb: int = 512
    output_kb: int = 256
    stderr_kb: int = 64
    file_mb: int = 16
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not value > 0:
                raise UsageError(f"Limits.{name} is {value!r}; it must be > 0")


@dataclass(frozen=True, slots=True)
class Program:
    """Source code.

    Attributes:
        code: the source.
        entry: the function (``"f"``, or ``"Solution.f"`` for a method of an instance) that
            :class:`CallCase` calls; None for programs that talk over standard input and output.
        language: ``"python"``.
    """

    code: str
    entry: str | None = None
    language: str = "python"


@dataclass(frozen=True, slots=True)
class StdinCase:
    """A test over standard input and output."""

    stdin: str
    expected: str


@dataclass(frozen=True, slots=True)
class CallCase:
    """A test that calls a function with JSON values and compares what it returns."""

    args: tuple[Any, ...]
    expected: Any


Case = StdinCase | CallCase


@dataclass(frozen=True, slots=True)
class ProgramError:
    """An exception of the program, as the sandbox reports it (so: untrusted words).

    Attributes:
        type: the exception's class name.
        message: its text.
        frames: ``(line, function)`` of the program's own frames, outermost first; lines count
            from 1.
        line: where a syntax error stands, else the innermost own frame; None if unknown.
        column: where a syntax error stands, from 1; None if unknown.
    """

    type: str
    message: str
    frames: tuple[tuple[int, str], ...] = ()
    line: int | None = None
    column: int | None = None


class _Missing(enum.Enum):
    MISSING = "missing"


MISSING = _Missing.MISSING
"""No result came back: the program ended before its function returned."""


Limit = Literal["time", "memory", "output"]


@dataclass(frozen=True, slots=True)
class RawRun:
    """What one run of a program gave, before anyone judged it.

    Attributes:
        exit_code: of the process; None if a signal ended it.
        signal: that signal, or None.
        stdout: bytes, at most the output limit.
        stderr: bytes, at most the limit.
        result: what the function returned, or :data:`MISSING`.
        error: the exception it raised, or None.
        compile_error: the program did not even compile; ``error`` says why.
        limit: the limit it ran into, or None.
        cpu_s: CPU seconds used.
        wall_s: wall seconds used.
    """

    exit_code: int | None = 0
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    result: Any = MISSING
    error: ProgramError | None = None
    compile_error: bool = False
    limit: Limit | None = None
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @property
    def text(self) -> str:
        """Standard output as text; what is not UTF-8 becomes U+FFFD."""
        return self.stdout.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case with its verdict."""

    index: int
    verdict: Verdict
    case: Case
    raw: RawRun | None = None


@dataclass(frozen=True, slots=True)
class RunReport:
    """A program judged on all its cases.

    Attributes:
        verdict: accepted if every case is; else that of the first case that is not.
        cases: one result per case, in order; those after a stop are ``SKIPPED``.
    """

    verdict: Verdict
    cases: tuple[CaseResult, ...]

    @property
    def failed(self) -> tuple[CaseResult, ...]:
        """The cases that ran and were not accepted."""
        passed = (Verdict.ACCEPTED, Verdict.SKIPPED)
        return tuple(c for c in self.cases if c.verdict not in passed)

    @property
    def passed(self) -> int:
        """How many cases were accepted."""
        return sum(c.verdict is Verdict.ACCEPTED for c in self.cases)


# --- checkers ---------------------------------------------------------------------------------


class Checker(Protocol):
    """Decides whether what came out is right; called only if the program ended well."""

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """Whether the run answers the case."""
        ...


@dataclass(frozen=True)
class Lines:
    """LiveCodeBench's rule for standard output: equal line by line, or equal as numbers.

    The output is stripped, split into lines, each line stripped. Lines agree when they are equal,
    or when both are whole lists of decimals with equal values (no tolerance).
    """

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        got, wanted = _lines(raw.text), _lines(_stdin_case(case).expected)
        return len(got) == len(wanted) and all(
            a == b or (_decimals(a) is not None and _decimals(a) == _decimals(b))
            for a, b in zip(got, wanted, strict=True)
        )


@dataclass(frozen=True)
class Text:
    """Equal text; white space at the ends of lines and blank lines at the end do not count."""

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        return self._plain(raw.text) == self._plain(_stdin_case(case).expected)

    @staticmethod
    def _plain(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]


@dataclass(frozen=True)
class Tokens:
    """Equal as lists of words; numbers may differ by ``tolerance``, relative or absolute.

    ``tolerance`` 0 compares text.
    """

    tolerance: float = 0.0

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        got, wanted = raw.text.split(), _stdin_case(case).expected.split()
        return len(got) == len(wanted) and all(
            a == b or self._close(a, b) for a, b in zip(got, wanted, strict=True)
        )

    def _close(self, a: str, b: str) -> bool:
        if not self.tolerance:
            return False
        try:
            x, y = float(a), float(b)
        except ValueError:
            return False
        return math.isclose(x, y, rel_tol=self.tolerance, abs_tol=self.tolerance)


@dataclass(frozen=True)
class Exact:
    """Equal to the last byte."""

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        return raw.stdout == _stdin_case(case).expected.encode()


@dataclass(frozen=True)
class Returns:
    """The returned value equals the expected: lists and tuples alike, 1 is 1.0, True is not 1.

    Args:
        tolerance: for floats, relative or absolute; 0 compares exactly.
    """

    tolerance: float = 0.0

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        assert isinstance(case, CallCase)
        return raw.result is not MISSING and self._equal(raw.result, case.expected)

    def _equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, bool) or isinstance(b, bool):
            return isinstance(a, bool) and isinstance(b, bool) and a is b
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            if self.tolerance and (isinstance(a, float) or isinstance(b, float)):
                return math.isclose(a, b, rel_tol=self.tolerance, abs_tol=self.tolerance)
            return a == b
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(self._equal, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self._equal(a[k], b[k]) for k in a)
        return type(a) is type(b) and bool(a == b)


def _stdin_case(case: Case) -> StdinCase:
    if not isinstance(case, StdinCase):
        raise UsageError("this checker compares standard output; use Returns() for call cases")
    return case


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _decimals(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None


# --- backends and the pool --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """What a backend gets: a program and inputs, never an expected output."""

    program: Program
    inputs: tuple[str | tuple[Any, ...], ...]
    limits: Limits


@dataclass(frozen=True, slots=True)
class SandboxInfo:
    """What a backend is.

    Attributes:
        backend: its name.
        guarantee: in a sentence, what it does and does not protect from.
    """

    backend: str
    guarantee: str


@runtime_checkable
class Sandbox(Protocol):
    """A backend; made with its options, then started once."""

    @property
    def info(self) -> SandboxInfo:
        """Name and guarantee."""
        ...

    async def start(self) -> None:
        """Get ready and prove it by running a program.

        Raises:
            InfraError: the backend does not work here; the message says what to do.
            UsageError: the backend refuses (the process backend, without ``allow_unsafe``).
        """
        ...

    def execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """Run the program on each input; one result each, in order.

        Closing the iterator early stops the rest; cancellation kills what runs.

        Raises:
            InfraError: the machinery failed.
        """
        ...

    async def aclose(self) -> None:
        """End everything that was started."""
        ...


sandboxes = Registry("rlrf.sandboxes", "sandbox")


@dataclass
class SandboxPool:
    """Runs programs on a backend, at most ``slots`` at once; made by :func:`open_sandbox`."""

    sandbox: Sandbox
    slots: int
    retries: int = 2
    _free: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UsageError(f"slots is {self.slots}; it must be >= 1")
        self._free = asyncio.Semaphore(self.slots)

    @property
    def info(self) -> SandboxInfo:
        """What runs the programs."""
        return self.sandbox.info

    async def run(
        self,
        program: Program,
        cases: Sequence[Case],
        *,
        limits: Limits | None = None,
        checker: Checker | None = None,
        stop: Literal["first_failure", "never"] = "first_failure",
    ) -> RunReport:
        """Run a program on its cases and judge it.

        Args:
            program: what to run.
            cases: all :class:`StdinCase` or all :class:`CallCase`.
            limits: per case; None for the defaults.
            checker: None for :class:`Lines` (stdin cases) or :class:`Returns` (call cases).
            stop: whether to skip the cases after the first failure; those after a compile
                error or a limit are always skipped.

        Raises:
            UsageError: no cases, or cases that do not fit the program.
            InfraError: the machinery failed again and again; there is no verdict.
        """
        called = program.entry is not None
        if not cases or any(isinstance(c, CallCase) is not called for c in cases):
            raise UsageError(
                f"{len(cases)} cases for a program with entry={program.entry!r}: give CallCases "
                "with an entry, StdinCases without, and at least one"
            )
        if program.language != "python":
            raise UsageError(f"language {program.language!r} is not supported; use 'python'")
        check = checker or (Returns() if called else Lines())
        job = Job(
            program,
            tuple(c.args if isinstance(c, CallCase) else c.stdin for c in cases),
            limits or Limits(),
        )
        async with self._free:
            for attempt in range(self.retries + 1):
                try:
                    return await self._judge(job, cases, check, stop)
                except InfraError as error:
                    if attempt == self.retries or not error.retryable:
                        raise
        raise AssertionError("unreachable")

    async def _judge(
        self, job: Job, cases: Sequence[Case], checker: Checker, stop: str
    ) -> RunReport:
        results: list[CaseResult] = []
        async with contextlib.aclosing(self.sandbox.execute(job)) as runs:
            async for raw in runs:
                case = cases[len(results)]
                verdict = _verdict(raw, case, checker)
                results.append(CaseResult(len(results), verdict, case, raw))
                # A program that does not compile fails all cases alike, and one that ran into a
                # limit would cost that limit again on every further case.
                if verdict in _FINAL or (
                    stop == "first_failure" and verdict is not Verdict.ACCEPTED
                ):
                    break
        skipped = [
            CaseResult(i, Verdict.SKIPPED, cases[i]) for i in range(len(results), len(cases))
        ]
        bad = next((r.verdict for r in results if r.verdict is not Verdict.ACCEPTED), None)
        return RunReport(bad or Verdict.ACCEPTED, (*results, *skipped))

    def run_sync(self, program: Program, cases: Sequence[Case], **options: Any) -> RunReport:
        """Sync twin of :meth:`run`."""
        return run_sync(self.run(program, cases, **options))

    async def aclose(self) -> None:
        """End the backend."""
        await self.sandbox.aclose()


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
    if raw.error is not None and raw.error.type == "MemoryError":
        return Verdict.MEMORY_LIMIT
    if raw.error is not None or raw.signal is not None or raw.exit_code:
        return Verdict.RUNTIME_ERROR
    return Verdict.ACCEPTED if checker.accepts(raw, case) else Verdict.WRONG_ANSWER


@contextlib.asynccontextmanager
async def open_sandbox(
    backend: str = "auto", *, slots: int | None = None, **options: Any
) -> AsyncIterator[SandboxPool]:
    """A pool on a backend that has proved it works here.

    Args:
        backend: a name, or ``"auto"``: the environment variable ``RLRF_SANDBOX`` if set, else
            bubblewrap if a program really runs in it, else process (which refuses unless
            ``allow_unsafe=True``).
        slots: programs at once; None for one per core.
        options: of the backend, e.g. ``allow_unsafe=True`` for ``process``.

    Raises:
        UnknownIdError: no such backend.
        InfraError: the backend does not work here.
        UsageError: the backend refuses.
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
        sandbox: Sandbox = sandboxes.load(name)(**options)
        await sandbox.start()
        return SandboxPool(sandbox, slots)
    own = {k: v for k, v in options.items() if k != "allow_unsafe"}  # process alone has it
    try:
        sandbox = sandboxes.load("bubblewrap")(**own)
        await sandbox.start()
    except InfraError as why:
        sandbox = sandboxes.load("process")(**options, instead_of=str(why))
        await sandbox.start()
    return SandboxPool(sandbox, slots)
