"""The bridge between sync and async: one background loop, and threads that may be abandoned."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
Job = Callable[[], Callable[[], None]]
"""A call to make; what it returns is to be called to tell its outcome."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop of a daemon thread, started on first use; every sync face runs on it."""
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="rlrf-loop", daemon=True).start()
        return _loop


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from sync code, also where a loop already runs (notebooks).

    Raises:
        RuntimeError: called on the background loop itself, where waiting would never end.
    """
    loop = background_loop()
    try:
        inside = asyncio.get_running_loop() is loop
    except RuntimeError:
        inside = False
    if inside:
        coroutine.close()
        raise RuntimeError(
            "a sync method of rlrf was called from an async hook; call its async twin "
            "(areset, astep, agrade, arollout) there"
        )
    inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    token = _caller.set(inbox)
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    finally:
        _caller.reset(token)
    future.add_done_callback(lambda _: inbox.put(None))
    try:
        while (job := inbox.get()) is not None:
            job()()
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C in the caller must reach the coroutine too
        raise


_caller: contextvars.ContextVar[queue.SimpleQueue[Job | None] | None] = contextvars.ContextVar(
    "rlrf_caller", default=None
)
"""Jobs for the thread that waits in :func:`run_sync`."""


class _DaemonThreads:
    """Threads for plain-``def`` hooks; the one that was busy last is taken first.

    Not ``asyncio.to_thread``: its pool is small, shared, and joined at exit, so one stuck hook
    would hold up its neighbours and the interpreter. Here idle threads are reused, a busy one is
    never waited for, and all are daemons.
    """

    def __init__(self) -> None:
        self._idle: list[queue.SimpleQueue[Job]] = []
        self._lock = threading.Lock()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        future, job = _job(function, *args)
        with self._lock:
            inbox = self._idle.pop() if self._idle else None
        if inbox is None:
            inbox = queue.SimpleQueue()
            threading.Thread(
                target=self._work, args=(inbox,), name="rlrf-hook", daemon=True
            ).start()
        inbox.put(job)
        return await future

    def _work(self, inbox: queue.SimpleQueue[Job]) -> None:
        while True:
            tell = inbox.get()()
            with self._lock:  # first: who is told may have another call to make
                self._idle.append(inbox)
            tell()
            del tell  # what was returned or raised must not live on in an idle thread


_threads, _turns = _DaemonThreads(), _DaemonThreads()


def _job(function: Callable[..., T], *args: Any) -> tuple[asyncio.Future[T], Job]:
    """A call for another thread to make, and the future on this loop that gets its outcome."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def tell(setter: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, setter, value)

    def job() -> Callable[[], None]:
        try:
            return partial(tell, future.set_result, context.run(function, *args))
        except BaseException as error:
            here = threading.current_thread()
            if isinstance(error, KeyboardInterrupt) and here is threading.main_thread():
                # The user's, and no outcome of this call: it ends run_sync(), which cancels all.
                raise
            return partial(tell, future.set_exception, _ordinary(error))

    return future, job


def _ordinary(error: BaseException) -> Exception:
    """What a hook raised, as an exception that ends the hook's own episode and nothing else.

    SystemExit would end the event loop under everybody, a CancelledError would pass for the
    caller's, and StopIteration may not be set on a future.
    """
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    ordinary = RuntimeError(f"a hook raised {error!r}")
    ordinary.__cause__ = error
    return ordinary


async def _await(work: Awaitable[T]) -> T:
    try:
        return await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise _ordinary(error) from error
    except (SystemExit, KeyboardInterrupt) as error:
        raise _ordinary(error) from error


async def call_hook(function: Callable[..., Any], *args: Any) -> Any:
    """Call an author's hook: awaited if it is ``async def``, else in a daemon thread.

    Raises:
        RuntimeError: the hook raised what is no ordinary exception, e.g. ``sys.exit()``.
    """
    return await _call(_threads.run, function, *args)


async def _call(
    run: Callable[..., Awaitable[Any]], function: Callable[..., Any], *args: Any
) -> Any:
    """``function`` awaited if it is ``async def``, else called by ``run``."""
    if inspect.iscoroutinefunction(function):
        return await _await(function(*args))
    result = await run(function, *args)
    # A plain function may still hand back an awaitable (functools.partial, decorators).
    return await _await(result) if isinstance(result, Awaitable) else result


async def call_in_turn(function: Callable[..., Any], *args: Any) -> Any:
    """Call what is called one at a time, in the thread that waits for all of it if there is one.

    A model that samples now in one thread and now in another leaves memory behind in each: C
    libraries allocate per thread and keep what they freed. And Ctrl-C stops it at once.
    """
    return await _call(_turns.run if _caller.get() is None else _in_caller, function, *args)


async def _in_caller(function: Callable[..., T], *args: Any) -> T:
    caller = _caller.get()
    assert caller is not None
    future, job = _job(function, *args)
    caller.put(job)
    return await future


def _after_fork() -> None:
    """A forked child has the parent's loop and idle threads as objects, but nobody runs them."""
    global _lock, _loop, _threads, _turns
    _lock, _loop = threading.Lock(), None
    _threads, _turns = _DaemonThreads(), _DaemonThreads()


os.register_at_fork(after_in_child=_after_fork)
