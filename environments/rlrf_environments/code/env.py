"""The base of the code environments, and ``code-v0``: your own tasks from a JSONL file.

It does not grade style, or speed within the limits, or how an answer was come by. A wrong program
that the tests do not catch has reward 1.
"""

from __future__ import annotations

import abc
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from rlrf import Outcome, SingleTurnEnv, Task, UsageError
from rlrf._async import run_steady
from rlrf.env import EmptySplitError
from rlrf.errors import check_whole
from rlrf.sandbox import Limits, SandboxPool, start_sandbox
from rlrf.sandbox.pool import MAX_SLOTS
from rlrf_environments.code.extract import Take
from rlrf_environments.code.grading import Memory, Problem, Renderer, Style, grade_completion
from rlrf_environments.code.sources import named_file
from rlrf_environments.code.tasks import (
    EVAL_SHARE,
    CheckerLike,
    CodeTask,
    as_limits,
    of_split,
    read_tasks,
)

VARIABLE = "RLRF_CODE"
FENCE = "Reply with the whole program in one code block fenced by ```python and ```."
BY_HASH = f"ids are dealt by their hash, {EVAL_SHARE:.0%} to eval and the others to train"


class CodeEnv(SingleTurnEnv, abc.ABC):
    """Programs, run on tests in a sandbox. Reward 1 if every test passes, else 0.

    Feedback shows public tests with input, output and expected output; of hidden tests it says
    what happened, and from level ``expected`` up their input and expected output too.

    Args:
        sandbox: a backend for :func:`rlrf.sandbox.open_sandbox`, or a pool that is already open
            (then the caller closes it).
        tests: ``all``, or ``public`` to run only those.
        run_all: run all tests even after one has failed. Slower, with the same reward; gives the
            metric ``tests_passed`` and lets ``explain_failures`` show more than one.
        explain_failures: how many failing tests feedback explains.
        quote: quote the faulty lines of an attempt. Off, as a teacher that reads a wrong line
            again finds it likelier (by 13 to 18 nats for a 0.5B model).
        renderer: ``rlrf``, or ``sdpo-compat`` for the words of SDPO's official environment, which
            show expected outputs (so the default of ``feedback`` is then ``expected``).
        limits: per test; None for the environment's own.
        allow_unsafe: let programs run without a sandbox where there is none. Only for programs
            you trust.
        slots: programs at once; None for one per core.
        remember: outcomes of so many programs are remembered; 0 for none.
        kwargs: see :class:`rlrf.Env`.

    Metrics: ``compiles`` and, with ``run_all``, ``tests_passed`` (a share).

    Raises:
        UsageError: an unknown value of an option.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "eval", "all")
    eval_split: ClassVar[str] = "all"
    max_tokens: ClassVar[int] = 2048
    default_limits: ClassVar[Limits] = Limits(cpu_s=4, wall_s=12, memory_mb=512, output_kb=256)
    instruction: ClassVar[str] = FENCE
    starter: ClassVar[str] = "program"
    dealt: ClassVar[str] = f"{BY_HASH}; take split='all', or data with more tasks"
    """How tasks come into splits, and what helps where one is empty."""

    def __init__(
        self,
        *,
        sandbox: str | SandboxPool = "auto",
        tests: str = "all",
        run_all: bool = False,
        explain_failures: int = 1,
        quote: bool = False,
        renderer: Renderer = "rlrf",
        limits: Limits | Mapping[str, float] | None = None,
        allow_unsafe: bool = False,
        slots: int | None = None,
        remember: int = 4096,
        **kwargs: Any,
    ) -> None:
        if renderer not in get_args(Renderer):
            raise UsageError(
                f"renderer is {renderer!r}; it must be one of {', '.join(get_args(Renderer))}"
            )
        if renderer == "sdpo-compat" and kwargs.get("feedback") is None:
            kwargs["feedback"] = "expected"
        super().__init__(**kwargs)
        if tests not in ("all", "public"):
            raise UsageError(f"tests is {tests!r}; it must be 'all' or 'public'")
        for name, flag in (("run_all", run_all), ("quote", quote), ("allow_unsafe", allow_unsafe)):
            if not isinstance(flag, bool):
                raise UsageError(f"{name} is {flag!r}; it must be true or false")
        check_whole("explain_failures", explain_failures)
        check_whole("remember", remember, least=0)
        check_whole("slots", 1 if slots is None else slots, most=MAX_SLOTS)
        if explain_failures > 1 and not run_all:
            raise UsageError(
                f"explain_failures is {explain_failures}, but tests stop at the first failure; "
                "set run_all=True"
            )
        self.limits = as_limits(limits, self.default_limits)
        self.style = Style(
            self.limits,
            public_only=tests == "public",
            run_all=run_all,
            explain_failures=explain_failures,
            quote=quote,
            renderer=renderer,
            take=self._take(renderer),
        )
        # The official harnesses take what they find in the whole reply, reasoning included.
        self.reads_reasoning = renderer == "sdpo-compat" or self.style.take == "last"
        self.memory = Memory(remember)
        self._sandbox, self._allow_unsafe = sandbox, allow_unsafe
        self._slots = slots or os.cpu_count() or 1
        self.concurrency = sandbox.slots if isinstance(sandbox, SandboxPool) else self._slots
        self._pool: SandboxPool | None = sandbox if isinstance(sandbox, SandboxPool) else None
        self._lock = threading.Lock()

    def _take(self, renderer: Renderer) -> Take:
        """Which code block of a reply is its program."""
        return "longest" if renderer == "sdpo-compat" else "program"

    @abc.abstractmethod
    def load_code_tasks(self, split: str) -> Sequence[CodeTask]:
        """The tasks of ``split``. Called once per split."""

    def load_tasks(self, split: str) -> list[Task]:
        """The tasks of ``split``, with their prompts.

        Raises:
            EmptySplitError: it has none, and why.
        """
        tasks = self.load_code_tasks(split)
        if not tasks:
            sizes = ", ".join(f"{s} {len(self.load_code_tasks(s))}" for s in self.splits)
            raise EmptySplitError(
                f"{type(self).__name__} has no task in split {split!r} (of its tasks: {sizes}): "
                + self.dealt
            )
        return [
            Task(
                id=task.problem.id,
                messages=self.pose(task),  # type: ignore[arg-type]  # Task makes messages of it
                metadata=dict(task.metadata or {}),
                hidden=task.problem,
                aliases=task.aliases,
            )
            for task in tasks
        ]

    def pose(self, task: CodeTask) -> str:
        """The prompt."""
        parts = [task.prompt.strip()]
        if task.starter_code.strip():
            parts.append(
                f"Complete this {self.starter}; keep the names in it:\n"
                f"```python\n{task.starter_code.rstrip()}\n```"
            )
        return "\n\n".join([*parts, self.instruction])

    def grade(self, task: Task, completion: str) -> Outcome:
        """Run the program on the task's tests."""
        problem: Problem = task.hidden
        memory = self.memory if self.memory.size else None
        return grade_completion(completion, problem, self._open_pool, self.style, memory)

    def reference_solution(self, task: Task) -> str | None:
        """The author's program, as a completion; None if there is none."""
        solution = self._find_task(task).hidden.solution
        if solution is None:
            return None
        longest = max(map(len, re.findall(r"`{3,}", solution)), default=2)
        fence = "`" * (longest + 1)
        return f"{fence}python\n{solution.strip()}\n{fence}"

    def secrets(self, task: Task) -> Any:
        """The hidden tests and the solution."""
        problem: Problem = task.hidden
        return {"tests": problem.tests(), "solution": problem.solution}

    def _open_pool(self) -> SandboxPool:
        # Opened by the first program, so that looking at tasks needs no sandbox. On the steady
        # loop whichever loop the caller has: there nobody's hook can block it.
        with self._lock:
            if self._pool is None:
                assert isinstance(self._sandbox, str)
                options = {"allow_unsafe": True} if self._allow_unsafe else {}
                self._pool = run_steady(start_sandbox(self._sandbox, slots=self._slots, **options))
            return self._pool

    def close(self) -> None:
        """Close the sandbox, if this environment opened it."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None and pool is not self._sandbox:
                run_steady(pool.aclose())
            elif pool is not None:
                self._pool = pool
        super().close()


class Code(CodeEnv):
    """Your own tasks: one JSON object a line, as described in the documentation.

    Args:
        data: the file (``.jsonl``, or ``.jsonl.gz``); None for the one that ``RLRF_CODE`` names.
        checkers: checkers that tasks may name, each a :class:`rlrf.sandbox.Checker` or a function
            ``(answer, case) -> bool``, for tasks with several right answers.
        kwargs: see :class:`CodeEnv`.

    Raises:
        UsageError: no data, or a line of it is wrong; names file, line and field.
    """

    dealt: ClassVar[str] = (
        f"a task's field 'split' says 'train' or 'eval', and without it {BY_HASH}; write that "
        "field into the file, add tasks, or take split='all'"
    )

    def __init__(
        self,
        *,
        data: str | os.PathLike[str] | None = None,
        checkers: Mapping[str, CheckerLike] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        found = named_file("code-v0", VARIABLE, data)
        if found is None:
            raise UsageError(
                f"code-v0 needs data=FILE (or {VARIABLE}=FILE), a JSONL file of tasks; its fields "
                "are described in the documentation of code environments"
            )
        self.data = found
        if not isinstance(checkers or {}, Mapping) or not all(
            callable(c) or hasattr(c, "accepts") for c in dict(checkers or {}).values()
        ):
            raise UsageError(
                f"checkers is {checkers!r:.200}; it must be a mapping of names to checkers, each "
                "a rlrf.sandbox.Checker or a function (answer, case) -> bool"
            )
        self._checkers = dict(checkers or {})
        self._all: list[CodeTask] | None = None

    def load_code_tasks(self, split: str) -> list[CodeTask]:
        """The tasks of the file."""
        if self._all is None:
            self._all = read_tasks(self.data, limits=self.limits, checkers=self._checkers)
        return of_split(self._all, split)
