"""Programs, tests, limits, and what came of a run.

These are values: they do not run or judge anything, and a :class:`RawRun` holds a program's own
words, which may be forged.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from rlrf.errors import UsageError


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


MAX_OUTPUT_KB = 3072
"""The most that may be kept of what a program prints."""


_MOST = 1_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use, per case.

    Attributes:
        cpu_s: CPU seconds of the program and all it starts.
        wall_s: wall seconds, a stop for what sleeps; several times ``cpu_s``, so that a busy
            machine does not turn right programs into slow ones.
        compile_s: CPU seconds for compiling, once per program.
        memory_mb: address space of each process, beyond what an empty program has; with docker
            also the memory of all of them together (see the backend).
        output_kb: standard output, and what a function returns; more is
            :attr:`Verdict.OUTPUT_LIMIT`.
        stderr_kb: standard error that is kept; the rest is dropped.
        file_mb: size of a file it writes, standard error among them.
        processes: processes and threads at once.
        stack_mb: stack of the main thread.
        open_files: file descriptors.
    """

    cpu_s: float = 4.0
    wall_s: float = 12.0
    compile_s: float = 4.0
    memory_mb: int = 512
    output_kb: int = 256
    stderr_kb: int = 64
    file_mb: int = 16
    processes: int = 16
    stack_mb: int = 256
    open_files: int = 64

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            whole = not name.endswith("_s")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                kind = "a whole number" if whole else "a number"
                raise UsageError(f"Limits.{name} is {value!r}; it must be {kind}")
            if not 0 < value <= _MOST:  # also no NaN, no infinity
                raise UsageError(f"Limits.{name} is {value!r}; it must be > 0 and <= {_MOST}")
        if self.open_files < 16:
            raise UsageError(f"Limits.open_files is {self.open_files}; it must be >= 16")
        for name in ("output_kb", "stderr_kb"):  # all of it travels in one message
            if getattr(self, name) > MAX_OUTPUT_KB:
                raise UsageError(
                    f"Limits.{name} is {getattr(self, name)!r}; it must be <= {MAX_OUTPUT_KB}"
                )


@dataclass(frozen=True, slots=True)
class Program:
    """Source code.

    Attributes:
        code: the source.
        entry: the function (``"f"``, or ``"Solution.f"`` for a method of an instance) that
            :class:`CallCase` and :class:`AssertCase` call; None for programs that talk over
            standard input and output.
        language: ``"python"``.
        prelude: source that runs before the program, in its namespace: what a judge provides,
            such as imports. Trusted; lines of the program count without it.
    """

    code: str
    entry: str | None = None
    language: str = "python"
    prelude: str = ""

    def __post_init__(self) -> None:
        parts = [] if self.entry is None else self.entry.split(".")
        if len(parts) > 2 or not all(part.isidentifier() for part in parts):
            raise UsageError(
                f"Program.entry is {self.entry!r}; it must be a name, 'Class.method', or None"
            )


@dataclass(frozen=True, slots=True)
class StdinCase:
    """A test over standard input and output."""

    stdin: str
    expected: str


@dataclass(frozen=True, slots=True)
class CallCase:
    """A test that calls a function with builtin values and compares what it returns."""

    args: tuple[Any, ...]
    expected: Any


@dataclass(frozen=True, slots=True)
class AssertCase:
    """Asserts about a function, as HumanEval and MBPP have them.

    They run in a sandbox of their own, which the program never enters; what they call there is a
    stand-in that asks the program in *its* sandbox, and gets plain builtin values back. So
    a program that exits early, or returns objects equal to everything, does not pass.

    Attributes:
        code: statements that raise if the program is wrong. The function goes by its own name and
            by ``candidate``.
        setup: statements before them: imports, helpers, a ``def check(candidate)``.
    """

    code: str
    setup: str = ""


Case = StdinCase | CallCase | AssertCase


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
        assertion: what the asserts of an :class:`AssertCase` raised, its line counted in their own
            code (setup first); None if nothing.
        starved: it was ended by the wall clock with less than half its CPU time used, and one of
            its threads ran or stood in line for a processor most of the time: the machine's fault,
            so the pool runs it again, alone.
        cpu_s: CPU seconds used.
        wall_s: wall seconds used.
        max_rss_kb: the most memory one of its processes held.
    """

    exit_code: int | None = 0
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    result: Any = MISSING
    error: ProgramError | None = None
    compile_error: bool = False
    limit: Limit | None = None
    assertion: ProgramError | None = None
    starved: bool = False
    cpu_s: float = 0.0
    wall_s: float = 0.0
    max_rss_kb: int = 0

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


@dataclass(frozen=True, slots=True)
class Job:
    """What a backend gets: a program and inputs, never an expected output.

    Attributes:
        program: what to run.
        inputs: per case its standard input, its arguments, or its asserts (which a backend keeps
            out of the program's sandbox).
        limits: per case.
    """

    program: Program
    inputs: tuple[str | tuple[Any, ...] | AssertCase, ...]
    limits: Limits


@dataclass(frozen=True, slots=True)
class SandboxInfo:
    """What a backend is.

    Attributes:
        backend: its name.
        guarantee: in a sentence, what it does and does not protect from.
        warnings: what is weaker here than it should be.
    """

    backend: str
    guarantee: str
    warnings: tuple[str, ...] = ()


@runtime_checkable
class Sandbox(Protocol):
    """One sandbox, which runs one program at a time; a pool makes as many as it has slots.

    The pool throws a sandbox away after an error or a cancellation and makes another, so neither
    needs handling here.
    """

    @property
    def info(self) -> SandboxInfo:
        """Name and guarantee."""
        ...

    async def start(self) -> None:
        """Get ready.

        Raises:
            InfraError: the backend does not work here; the message says what to do.
            UsageError: the backend refuses (the process backend, without ``allow_unsafe``).
        """
        ...

    def execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """Run the program on each input; one result each, in order.

        A result with ``limit`` or ``compile_error`` may be the last. Closing the iterator early
        stops the rest.

        Raises:
            InfraError: the machinery failed.
        """
        ...

    async def ping(self) -> None:
        """Make sure that it still answers.

        Raises:
            InfraError: it does not.
        """
        ...

    async def aclose(self) -> None:
        """End everything that was started; also after an error, and twice."""
        ...
