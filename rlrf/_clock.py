"""The deadline of an episode, and who has the event loop meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from rlrf.errors import InfraError

log = logging.getLogger("rlrf.rollout")
T = TypeVar("T")


class Clock:
    """The environment time an episode has left."""

    def __init__(self, seconds: float | None, task_id: str) -> None:
        self.left, self.total, self.task_id = seconds, seconds, task_id
        self.held = 0.0  # seconds for which this episode's hooks have blocked the loop

    def _of_others(self) -> float:
        """Seconds for which hooks of other episodes have blocked this loop, since ever."""
        return _blocked.get(threading.get_ident(), 0.0) - self.held

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        if self.left is None:
            return await work
        loop = asyncio.get_running_loop()
        start, others = loop.time(), self._of_others()
        # Not asyncio.wait_for: it waits for the work to accept its cancellation, which a hook that
        # catches everything never does, and takes the hook's own TimeoutError for the deadline.
        task = asyncio.ensure_future(_Held(work, self))

        def used() -> float:  # what others took of the loop is not this episode's
            return loop.time() - start - (self._of_others() - others)

        try:
            while not task.done() and used() < self.left:
                await asyncio.wait({task}, timeout=max(self.left - used(), 0.001))
            if task.done() and self.held <= self.left:
                return task.result()
            blocked = self.held > self.left
            raise InfraError(
                f"the environment took more than {self.total:g} s for task {self.task_id!r}"
                + (f"; a hook that is `async def` {_BLOCKS}" if blocked else ""),
                kind="deadline",
                retryable=False,
            )
        finally:
            self.left -= used()
            if not task.done():
                task.cancel()
                task.add_done_callback(_forget)
            elif not task.cancelled():
                task.exception()  # it is noted


_LONG = 0.05  # seconds; a step that takes as long blocks the loop
_BLOCKS = "blocked the event loop: let it await, or make it a plain `def`, which gets a thread"


class _Held(Coroutine[Any, Any, T]):
    """A coroutine whose steps are timed, and told to the watchdog while they run."""

    def __init__(self, inner: Coroutine[Any, Any, T], clock: Clock) -> None:
        self.inner, self.clock = inner, clock

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        begun = time.monotonic()
        _holding[threading.get_ident()] = begun, self.clock
        try:
            return step(*args)
        finally:
            _holding.pop(threading.get_ident(), None)
            taken = time.monotonic() - begun
            if taken >= _LONG:
                thread = threading.get_ident()
                self.clock.held += taken
                _blocked[thread] = _blocked.get(thread, 0.0) + taken

    def send(self, value: Any) -> Any:
        return self._step(self.inner.send, value)

    def throw(self, *args: Any) -> Any:
        return self._step(self.inner.throw, *args)

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()


_holding: dict[int, tuple[float, Clock]] = {}
"""By thread: since when a step of an episode has had its event loop, and which."""
_blocked: dict[int, float] = {}
"""By thread: seconds for which steps of episodes have blocked its event loop."""


@contextlib.contextmanager
def watchdog() -> Iterator[None]:
    """Say so while a hook blocks the event loop beyond its deadline: nothing else can."""
    over = threading.Event()

    def watch() -> None:
        told: set[int] = set()
        while not over.wait(1.0):
            for thread, (since, clock) in tuple(_holding.items()):
                seconds = time.monotonic() - since
                if clock.total is None or seconds < clock.total or id(clock) in told:
                    continue
                told.add(id(clock))
                frame = sys._current_frames().get(thread)
                where = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
                log.error(
                    "task %r: a hook that is `async def` has had the event loop for %.0f s, and "
                    "nothing else can go on: it %s. It stands at\n%s",
                    clock.task_id,
                    seconds,
                    _BLOCKS,
                    where,
                )

    threading.Thread(target=watch, name="rlrf-watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _forget(task: asyncio.Future[Any]) -> None:
    """Take note of how abandoned work ended, so that asyncio does not complain about it."""
    if not task.cancelled():
        task.exception()
