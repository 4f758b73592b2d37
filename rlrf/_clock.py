"""The deadline of an episode, and what becomes of one that blocks the event loop beyond it.

Why: design/blocked-loop.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Coroutine, Iterator
from typing import Any, Self, TypeVar

from rlrf._async import Held, Holder, Loop, Step, abandon, blocked_s, lost, steps
from rlrf.env import Env
from rlrf.errors import InfraError
from rlrf.notices import notice

log = logging.getLogger("rlrf.rollout")
T = TypeVar("T")

_REMEDY = "let it await, or make it a plain `def`, which gets a thread"
_BLOCKED = f"blocked the event loop: {_REMEDY}"

_blockers: weakref.WeakSet[Env] = weakref.WeakSet()
"""Environments whose hooks have blocked an event loop beyond a deadline."""


def blocks(env: Env) -> bool:
    """Whether a hook of the environment has once blocked an event loop beyond its deadline."""
    return _innermost(env) in _blockers


def tell_of_blocker(env: Env) -> None:
    """Notice that episodes have threads of their own, if they have."""
    if blocks(env):
        notice(
            f"env/blocks/{type(env).__name__}",
            f"{env}: a hook that is `async def` {_BLOCKED}. Until then each of its episodes runs "
            "on an event loop of its own, in a thread of its own: that is slower, and what "
            "episodes share must not be bound to one loop, as an asyncio.Lock or an HTTP client is",
        )


def _innermost(env: Env) -> Env:
    """An environment without its wrappers."""
    while isinstance(inner := getattr(env, "env", None), Env):
        env = inner
    return env


class Clock(Holder):
    """The environment time an episode has left, and where its hooks run.

    Args:
        seconds: of environment time; None for no limit.
        task_id: the episode's task.
        env: the environment.

    Attributes:
        blocked: whether it has blocked the event loop beyond its deadline.
    """

    def __init__(self, seconds: float | None, task_id: str, env: Env) -> None:
        super().__init__(f"an `async def` hook of task {task_id!r}")
        self.left, self.total, self.task_id, self.env = seconds, seconds, task_id, env
        self.blocked = False
        self._since = self._others = 0.0
        # On a loop of its own it blocks nobody else. One for the episode, not for each hook:
        # what `start` opened there, `respond` may use.
        self._own = Loop("rlrf-episode") if blocks(env) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.leave()

    def _of_others(self, thread: int) -> float:
        """Seconds for which others have blocked the event loop of a thread, since ever."""
        return blocked_s(thread) - self.held

    def used(self, thread: int) -> float:
        """Seconds of what is under way, but for those that others took of its thread's loop."""
        return time.monotonic() - self._since - (self._of_others(thread) - self._others)

    def error(self) -> InfraError:
        """What to raise when there is no time left."""
        return InfraError(
            f"the environment took more than {self.total:g} s for task {self.task_id!r}"
            + (f"; a hook that is `async def` {_BLOCKED}" if self.blocked else ""),
            kind="deadline",
            retryable=False,
        )

    def note_blocked(self) -> None:
        """It has had the event loop beyond its deadline."""
        self.blocked = True
        _blockers.add(_innermost(self.env))

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do a part of the episode.

        Raises:
            InfraError: the time is over; what is still under way is cancelled and not waited for.
        """
        task: asyncio.Future[T]
        # Not asyncio.wait_for: it waits for the work to accept its cancellation, which a hook that
        # catches everything never does, and takes the hook's own TimeoutError for the deadline.
        if self._own is not None:
            task = asyncio.wrap_future(self._own.submit(work))
        elif self.left is None:
            result: T = await Held(work, self)
            return result
        else:
            task = asyncio.ensure_future(Held(work, self))
        thread = threading.get_ident()
        self._since, self._others = time.monotonic(), self._of_others(thread)
        left = float("inf") if self.left is None else self.left
        try:
            while not task.done() and (rest := left - self.used(thread)) > 0:
                await asyncio.wait({task}, timeout=None if self.left is None else max(rest, 0.001))
            if self.held > left:
                self.note_blocked()
            if task.done() and not self.blocked:
                return task.result()
            raise self.error()
        finally:
            if self.left is not None:
                self.left -= self.used(thread)
            if not task.done():
                task.cancel()
                task.add_done_callback(_forget)
            elif not task.cancelled():
                task.exception()  # it is noted


_LONG = 30.0
"""Seconds after which those that have no deadline are named."""


@contextlib.contextmanager
def watchdog(deadline_s: float | None) -> Iterator[None]:
    """Watch who has the event loop: it is abandoned to a hook that blocks it beyond its deadline.

    Where that cannot be, on somebody else's loop, say so: nothing else can.
    """
    over = threading.Event()
    pause = min(1.0, max(0.01, (deadline_s or 10.0) / 10))

    def watch() -> None:
        before: dict[int, Step] = {}
        while not over.wait(pause) and not lost():
            now = steps()
            for step in now.values():
                # Twice the same: when the whole process was stopped, it is not the hook's fault.
                if before.get(step.thread) is step and not step.holder.told:
                    _judge(step)
            before = now

    here = contextvars.copy_context()
    threading.Thread(target=here.run, args=(watch,), name="rlrf-watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _judge(step: Step) -> None:
    """Abandon the loop to a step that has had it for too long, or at least name it."""
    holder, seconds = step.holder, step.seconds
    left_behind = False
    if isinstance(holder, Clock) and holder.left is not None:
        if holder.used(step.thread) < holder.left:
            return
        holder.note_blocked()
        left_behind = abandon(step)
    elif seconds < _LONG:
        return
    if not left_behind and steps().get(step.thread) is not step:
        return  # it has ended meanwhile
    holder.told = True
    frame = sys._current_frames().get(step.thread)
    log.error(
        "%s has had the event loop for %.1f s: %s. It stands at\n%s%s",
        holder.name,
        seconds,
        _REMEDY,
        "".join(traceback.format_stack(frame)[-3:]) if frame else "",
        "It is left behind, all others go on." if left_behind else "Nothing else can go on.",
    )


def _forget(task: asyncio.Future[Any]) -> None:
    """Take note of how abandoned work ended, so that asyncio does not complain about it."""
    if not task.cancelled():
        task.exception()
