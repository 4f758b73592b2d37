"""``code-basics-v0``: small Python tasks, graded by tests in a sandbox.

It does not measure how good a policy is: the tasks are few and easy, and are published with their
solutions. They show that everything works.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, ClassVar

from rlrf.sandbox import Limits
from rlrf_environments.code.env import CodeEnv
from rlrf_environments.code.tasks import CodeTask, of_split, read_tasks


class CodeBasics(CodeEnv):
    """Small Python tasks: functions, and programs over standard input and output.

    Every task has a reference solution, public tests and hidden ones.

    Args:
        run_all: see :class:`CodeEnv`; on by default, the tests are few.
        kwargs: see :class:`CodeEnv`.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "eval")
    eval_split: ClassVar[str] = "eval"
    default_limits: ClassVar[Limits] = Limits(cpu_s=2, wall_s=8, memory_mb=256, output_kb=64)
    instruction: ClassVar[str] = (
        "Reply with one Python program in a code block fenced by ```python and ```."
    )

    def __init__(self, *, run_all: bool = True, **kwargs: Any) -> None:
        super().__init__(run_all=run_all, **kwargs)

    def load_code_tasks(self, split: str) -> list[CodeTask]:
        """The tasks that ship with the package."""
        text = resources.files(__package__).joinpath("tasks.jsonl").read_text(encoding="utf-8")
        return of_split(read_tasks("tasks.jsonl", text, limits=self.limits), split)
