"""Tasks: what an environment poses, and what only its grader may know of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from rlrf.errors import UsageError, brief
from rlrf.messages import Messages, as_messages


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        id: unique within the environment.
        messages: the chat that poses it (a string becomes one user message).
        metadata: what anyone may know: difficulty, source, date.
        hidden: what only the grader may know: answers, tests, references. It is left out of
            ``repr``, of equality, and of every task that :meth:`Env.tasks` hands out.
        aliases: other names it answers to, such as the id it is published under. What is another
            task's id, or the alias of several, names none.
    """

    id: str
    messages: Messages
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    hidden: Any = field(default=None, repr=False, compare=False)
    aliases: tuple[str, ...] = field(default=(), repr=False, compare=False)
    _stripped: bool = field(default=False, repr=False, compare=False)
    _split: str | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.id or not isinstance(self.id, str):
            raise UsageError(f"Task.id is {self.id!r}; it must be a non-empty string")
        if not isinstance(self.metadata, Mapping):
            raise UsageError(
                f"Task.metadata of {self.id!r} is {brief(self.metadata)}; it must be a mapping"
            )
        object.__setattr__(self, "messages", as_messages(self.messages))

    def public(self) -> Task:
        """The task without what is hidden."""
        return replace(self, hidden=None, _stripped=True)


class EmptySplitError(UsageError):
    """A split without tasks."""


class TaskSequence(Sequence[Task]):
    """The tasks of one split, loaded on first use; also looks tasks up by id.

    Args:
        load: gives the tasks, hidden data included.
        public: whether to strip hidden data from what is handed out.
        split: the split they are of.
    """

    def __init__(
        self,
        load: Callable[[], Sequence[Task]],
        *,
        public: bool = True,
        split: str | None = None,
    ) -> None:
        self._load, self._public, self._split = load, public, split
        self._items: Sequence[Task] | None = None
        self._index: dict[str, int] | None = None
        self._aliases: dict[str, int] | None = None
        self._lock = threading.Lock()

    @property
    def _tasks(self) -> Sequence[Task]:
        if self._items is None:
            with self._lock:
                if self._items is None:
                    self._items = self._load()
        return self._items

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        task = self._tasks[index]
        return replace(task.public(), _split=self._split) if self._public else task

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        loaded = "not loaded" if self._items is None else f"{len(self)} tasks"
        return f"TaskSequence({loaded})"

    def ids(self) -> list[str]:
        """The ids, in order."""
        return list(self._by_id())

    def get(self, task_id: str) -> Task | None:
        """The task of that id or alias, or None."""
        i = self._by_id().get(task_id)
        if i is None:
            i = self._by_alias().get(task_id)
        return None if i is None else self[i]

    def _by_alias(self) -> dict[str, int]:
        if self._aliases is None:
            found: dict[str, set[int]] = {}
            for i, task in enumerate(self._tasks):
                for alias in task.aliases:
                    found.setdefault(alias, set()).add(i)
            self._aliases = {alias: i for alias, (i, *more) in found.items() if not more}
        return self._aliases

    def _by_id(self) -> dict[str, int]:
        if self._index is None:
            index: dict[str, int] = {}
            for i, task in enumerate(self._tasks):
                if task.id in index:
                    raise UsageError(
                        f"two tasks have the id {task.id!r} (positions {index[task.id]} and {i}); "
                        "ids must be unique"
                    )
                index[task.id] = i
            self._index = index
        return self._index


def as_tasks(tasks: str | Task | Iterable[str | Task]) -> list[str | Task]:
    """Ids or tasks as a list; a single one may be given as it is.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(tasks, (str, Task)):
        return [tasks]
    if not isinstance(tasks, Iterable):
        raise UsageError(f"tasks is {brief(tasks)}; give a task or its id, several, or None")
    return list(tasks)
