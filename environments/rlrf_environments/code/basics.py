"""``code-basics-v0``: small Python tasks, graded by tests in a sandbox."""

from __future__ import annotations

import os
import threading
from importlib import resources
from typing import Any

from rlrf import Outcome, SingleTurnEnv, Task, UsageError, run_sync
from rlrf.sandbox import Limits, SandboxPool, Text, start_sandbox
from rlrf_environments.code.grading import grade_program, parse_tests, read_jsonl

INSTRUCTION = "Reply with one Python program in a code block fenced by ```python and ```."


class CodeBasics(SingleTurnEnv):
    """Small Python tasks: functions, and programs over standard input and output.

    Every task has a reference solution, public tests (feedback shows them) and hidden tests
    (feedback shows them from level ``expected`` up). Reward 1 if all tests pass, else 0.

    Args:
        sandbox: a backend for :func:`rlrf.sandbox.open_sandbox`, or a pool that is already open
            (then the caller closes it).
        tests: ``all``, or ``public`` to run only those.
        limits: per test; None for 2 s of CPU time and 256 MB.
        allow_unsafe: let programs run without a sandbox where there is none. Only for programs
            you trust.
        slots: programs at once; None for one per core.
        kwargs: see :class:`rlrf.Env`.

    Metrics: ``tests_passed`` (a share) and ``compiles``.

    Raises:
        UsageError: an unknown value of ``tests``.
    """

    def __init__(
        self,
        *,
        sandbox: str | SandboxPool = "auto",
        tests: str = "all",
        limits: Limits | None = None,
        allow_unsafe: bool = False,
        slots: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if tests not in ("all", "public"):
            raise UsageError(f"tests is {tests!r}; it must be 'all' or 'public'")
        self.tests = tests
        self.limits = limits or Limits(cpu_s=2, wall_s=8, memory_mb=256, output_kb=64)
        self._sandbox, self._allow_unsafe = sandbox, allow_unsafe
        self._slots = slots or os.cpu_count() or 1
        self.concurrency = sandbox.slots if isinstance(sandbox, SandboxPool) else self._slots
        self._pool: SandboxPool | None = sandbox if isinstance(sandbox, SandboxPool) else None
        self._lock = threading.Lock()

    def load_tasks(self, split: str) -> list[Task]:
        """The tasks that ship with the package."""
        text = resources.files(__package__).joinpath("tasks.jsonl").read_text(encoding="utf-8")
        return [
            Task(
                id=row["id"],
                messages=f"{row['prompt']}\n\n{INSTRUCTION}",  # type: ignore[arg-type]  # Task makes messages of it
                metadata={
                    "category": row["category"],
                    "kind": "stdin" if row["entry_point"] is None else "function",
                },
                hidden=row,
            )
            for row in read_jsonl(text)
            if row["split"] == split
        ]

    def grade(self, task: Task, completion: str) -> Outcome:
        """Run the program on the task's tests."""
        row = task.hidden
        tests = parse_tests(row["tests"], row["entry_point"])
        return grade_program(
            completion,
            [t for t in tests if t.public or self.tests == "all"],
            self._open_pool(),
            entry=row["entry_point"],
            limits=self.limits,
            solution=row["solution"],
            checker=Text() if row["entry_point"] is None else None,
            group=task.id,
        )

    def reference_solution(self, task: Task) -> str | None:
        """The author's program, as a completion."""
        return f"```python\n{self._find_task(task).hidden['solution'].rstrip()}\n```"

    def _open_pool(self) -> SandboxPool:
        # Opened by the first program, so that looking at tasks needs no sandbox. The pool lives
        # on the background loop whichever loop the caller has: grade() runs in a thread.
        with self._lock:
            if self._pool is None:
                assert isinstance(self._sandbox, str)
                options = {"allow_unsafe": True} if self._allow_unsafe else {}
                self._pool = run_sync(start_sandbox(self._sandbox, slots=self._slots, **options))
            return self._pool

    def close(self) -> None:
        """Close the sandbox, if this environment opened it."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None and pool is not self._sandbox:
                run_sync(pool.aclose())
            elif pool is not None:
                self._pool = pool
        super().close()
