"""From a completion to a reward and the reasons: extract, run, judge, explain, remember.

It does not give a part of the reward for a part of the tests; that share is a metric. Nor does it
see how a program comes by its answers: one that is fitted to the tests passes.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlrf import Feedback, Outcome, Segment, UsageError
from rlrf.sandbox import (
    CallCase,
    Case,
    Checker,
    Limits,
    Program,
    RunReport,
    SandboxPool,
    StdinCase,
    Verdict,
)
from rlrf_environments.code import sdpo_compat
from rlrf_environments.code.explain import Failure, Test, explain, reference, value_size, warnings
from rlrf_environments.code.extract import Attempt, Take, extract, missing_entry

Renderer = Literal["rlrf", "sdpo-compat"]


@dataclass(frozen=True, eq=False)
class Problem:
    """What the grader knows of a task; it is a task's ``hidden``.

    Attributes:
        id: of the task.
        load_tests: gives the tests; called when they are first needed (they may be large).
        entry: the function to call, ``"Solution.f"`` for a method; None for programs over
            standard input and output.
        prelude: source that is run before the program, in its namespace.
        solution: a correct program, or None.
        checker: None for the default of the kind of test.
        limits: per test; None for the environment's.
    """

    id: str
    load_tests: Callable[[], Sequence[Test]] = field(repr=False)
    entry: str | None = None
    prelude: str = field(default="", repr=False)
    solution: str | None = field(default=None, repr=False)
    checker: Checker | None = None
    limits: Limits | None = None
    loading: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def tests(self) -> tuple[Test, ...]:
        """Public ones first, in their order; then the hidden ones, small inputs first.

        So a wrong program is told of a test it may see if there is one, and found out cheaply.
        """
        return _TESTS.of(self)


class _Tests:
    """The tests of the problems that are being graded; all of them at once may not fit memory."""

    MOST = 256 << 20  # characters

    def __init__(self) -> None:
        self._items: OrderedDict[Problem, tuple[int, tuple[Test, ...]]] = OrderedDict()
        self._lock = threading.Lock()
        self._size = 0

    def of(self, problem: Problem) -> tuple[Test, ...]:
        with self._lock:
            found = self._items.get(problem)
            if found is not None:
                self._items.move_to_end(problem)
                return found[1]
        with problem.loading:  # of many attempts at one problem, the first loads the tests
            with self._lock:
                found = self._items.get(problem)
            if found is not None:
                return found[1]
            tests = problem.load_tests()
            hidden = sorted((t for t in tests if not t.public), key=lambda t: _cost(t.case))
            ordered = (*(t for t in tests if t.public), *hidden)
            size = sum(_cost(t.case) for t in ordered)
            with self._lock:
                self._items[problem] = size, ordered
                self._size += size
                while self._size > self.MOST and len(self._items) > 1:
                    self._size -= self._items.popitem(last=False)[1][0]
            return ordered


_TESTS = _Tests()


def _cost(case: Case) -> int:
    if isinstance(case, StdinCase):
        return len(case.stdin)
    return value_size(case.args) if isinstance(case, CallCase) else 0


@dataclass(frozen=True)
class Style:
    """How an environment grades and words its feedback.

    Attributes:
        limits: per test, for problems without their own.
        public_only: run only public tests.
        run_all: run all tests even after one has failed; then the share that passed is known.
        explain_failures: how many failing tests to explain; more than one needs ``run_all``.
        quote: quote the faulty lines.
        renderer: whose words.
        take: which code block of a reply is the program.
    """

    limits: Limits
    public_only: bool = False
    run_all: bool = False
    explain_failures: int = 1
    quote: bool = False
    renderer: Renderer = "rlrf"
    take: Take = "program"

    @property
    def whole(self) -> bool:
        """Whether every test is run whatever the others say."""
        return self.run_all or self.renderer == "sdpo-compat"


class Memory:
    """Remembers outcomes by problem, program, limits and style, the latest ``size`` of them.

    A policy that has converged writes the same programs again and again. Only outcomes are kept,
    never a failure of the machinery.
    """

    def __init__(self, size: int = 4096) -> None:
        self.size, self.hits = size, 0
        self._items: OrderedDict[Any, Outcome] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Outcome | None:
        """The outcome of that key, or None."""
        with self._lock:
            found = self._items.get(key)
            if found is not None:
                self._items.move_to_end(key)
                self.hits += 1
            return found

    def put(self, key: Any, outcome: Outcome) -> None:
        """Remember an outcome."""
        with self._lock:
            self._items[key] = outcome
            self._items.move_to_end(key)
            while len(self._items) > self.size:
                self._items.popitem(last=False)


def grade_completion(
    completion: str,
    problem: Problem,
    pool: Callable[[], SandboxPool],
    style: Style,
    memory: Memory | None = None,
) -> Outcome:
    """Grade a completion: reward 1 if its program passes every test, else 0.

    Args:
        completion: the policy's reply.
        problem: what it replies to.
        pool: gives the pool to run in; not called when nothing has to run.
        style: how.
        memory: of earlier outcomes; None for none.

    Returns:
        The outcome, with metrics ``compiles`` and, where the style runs all tests,
        ``tests_passed`` (a share).

    Raises:
        InfraError: the sandbox failed; there is no grade.
    """
    attempt = extract(completion, style.take, problem.entry)
    if isinstance(attempt, Segment):
        if style.renderer == "sdpo-compat":
            attempt = sdpo_compat.unreadable(attempt)
        return _failed([attempt], problem, compiles=False, passed=0.0 if style.whole else None)
    code = hashlib.sha256(attempt.code.encode("utf-8", "surrogatepass")).digest()
    key = (problem, code, problem.limits or style.limits, style)
    outcome = memory.get(key) if memory is not None else None
    if outcome is None:
        outcome = _grade_attempt(replace(attempt, start=0), problem, pool, style)
        if memory is not None:
            memory.put(key, outcome)
    return _moved(outcome, attempt)


def _grade_attempt(
    attempt: Attempt, problem: Problem, pool: Callable[[], SandboxPool], style: Style
) -> Outcome:
    unnamed = missing_entry(attempt, problem.entry)
    if unnamed is not None and style.renderer == "rlrf":
        return _failed([unnamed], problem, compiles=True, passed=0.0 if style.whole else None)
    limits = problem.limits or style.limits
    tests = [t for t in problem.tests() if t.public or not style.public_only]
    if not tests:
        raise UsageError(
            f"task {problem.id!r} has no public test, and tests='public' runs no other"
        )
    report = pool().run_sync(
        Program(attempt.code, entry=problem.entry, prelude=problem.prelude),
        [t.case for t in tests],
        limits=limits,
        checker=problem.checker,
        stop="never" if style.whole else "first_failure",
        group=problem.id,
    )
    if report.verdict is Verdict.ACCEPTED:
        return Outcome(1.0, metrics=_metrics(compiles=True, passed=1.0 if style.whole else None))
    failures = _failures(report, tests)
    if style.renderer == "sdpo-compat":
        segments = [sdpo_compat.render(attempt, failures)]
    else:
        segments = []
        for failure in failures[: style.explain_failures]:
            segments += explain(attempt, failure, limits, problem.checker, quote=style.quote)
    compiles = report.verdict is not Verdict.COMPILE_ERROR
    passed = report.passed / len(tests) if style.whole else None
    return _failed(segments, problem, compiles=compiles, passed=passed)


def _failures(report: RunReport, tests: Sequence[Test]) -> list[Failure]:
    found = []
    for case in report.failed:
        assert case.raw is not None  # only skipped cases have none
        found.append(Failure(case.index + 1, tests[case.index], case.verdict, case.raw))
    return found


def _failed(
    segments: Sequence[Segment], problem: Problem, *, compiles: bool, passed: float | None
) -> Outcome:
    told = [*segments, *([reference(problem.solution)] if problem.solution else [])]
    return Outcome(0.0, Feedback(told), _metrics(compiles=compiles, passed=passed))


def _metrics(*, compiles: bool, passed: float | None) -> dict[str, float]:
    # Without all tests run, a share would only be known of the programs that pass.
    share = {} if passed is None else {"tests_passed": passed}
    return {"compiles": float(compiles), **share}


def _moved(outcome: Outcome, attempt: Attempt) -> Outcome:
    """The outcome of a program, for the completion that the program stands in."""
    if not outcome.feedback:
        return outcome
    moved = [
        replace(s, span=(s.span[0] + attempt.start, s.span[1] + attempt.start)) if s.span else s
        for s in outcome.feedback
    ]
    moved += warnings(attempt)
    return replace(outcome, feedback=Feedback(moved))
