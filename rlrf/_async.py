"""The bridge between sync and async: event loops and threads that may be left behind.

Everybody's ``async def`` hooks run on one *background loop*: a hook that blocks it (``time.sleep``,
``requests.get``) holds up everybody, and no thread can be made to stop. Therefore:

- every step of a coroutine that may hold an author's code is :class:`Held`: one can see from
  another thread who has the loop, and for how long;
- :func:`abandon` leaves the loop to whoever blocks it. The next call starts another; the calls that
  were on it get a :class:`LoopLostError`, and :func:`rlrf.rollout` begins again what it had under
  way. If the hook ever comes back, what was on the loop is cancelled, and nobody hears of it;
- what must survive that and runs no author's code (sandbox pools) lives on the *steady loop*.

Why: design/blocked-loop.md.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import inspect
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rlrf.errors import LoopLostError

T = TypeVar("T")
Job = Callable[[], Callable[[], None]]
"""A call to make; what it returns is to be called to tell its outcome."""

# --- who has an event loop ------------------------------------------------------------------------

LONG_S = 0.05
"""A step that takes as long blocks its loop."""


class Holder:
    """Whose coroutine it is that has an event loop at the moment.

    Args:
        name: in messages.

    Attributes:
        left: seconds it may take, or None.
        held: seconds for which it has blocked its loop.
        told: whether the watchdog has named it.
    """

    left: float | None = None

    def __init__(self, name: str) -> None:
        self.name, self.held, self.told = name, 0.0, False


@dataclass(slots=True, eq=False)
class Step:
    """From when a coroutine gets its loop until it awaits."""

    holder: Holder
    thread: int
    begun: float
    call: _Call | None

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self.begun


_steps: dict[int, Step] = {}
"""By thread: the step that has its event loop."""
_blocked: dict[int, float] = {}
"""By thread: seconds for which steps have blocked its event loop, since ever."""


def steps() -> dict[int, Step]:
    """By thread: the steps under way."""
    return _steps.copy()


def blocked_s(thread: int) -> float:
    """Seconds for which steps have blocked the event loop of a thread, since ever."""
    return _blocked.get(thread, 0.0)


class Held(Coroutine[Any, Any, T]):
    """A coroutine whose steps can be seen from other threads while they run, and are timed.

    It ends when its call has lost the loop.
    """

    def __init__(self, inner: Coroutine[Any, Any, T], holder: Holder) -> None:
        self.inner, self.holder, self._ended = inner, holder, False

    def _step(self, step: Callable[..., Any], *args: Any) -> Any:
        thread, call = threading.get_ident(), _waiting.get()
        if call is not None and call.lost_to and not self._ended:
            self._ended = True  # its loop has come back: what was due there is not done twice
            step, args = self.inner.throw, (asyncio.CancelledError(),)
        here = _steps[thread] = Step(self.holder, thread, time.monotonic(), call)
        try:
            return step(*args)
        finally:
            with _lock:  # from here on it cannot be abandoned any more, or it has been
                _steps.pop(thread, None)
            taken = here.seconds
            if taken >= LONG_S:
                self.holder.held += taken
                _blocked[thread] = blocked_s(thread) + taken

    def send(self, value: Any) -> Any:
        return self._step(self.inner.send, value)

    def throw(self, *args: Any) -> Any:
        return self._step(self.inner.throw, *args)

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self.send(None)


# --- loops ----------------------------------------------------------------------------------------


class Loop(threading.Thread):
    """An event loop in a daemon thread of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.loop = asyncio.new_event_loop()
        self.calls: set[_Call] = set()
        self.abandoned = self._over = False
        self.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on it, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def leave(self) -> None:
        """End it, as soon as nothing blocks it; what is still on it is cancelled."""
        self._over = True
        self.loop.call_soon_threadsafe(self.loop.stop)

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            loop = runner.get_loop()
            while not self._over:
                # A callback may sys.exit(): its own call hears of it, the others go on.
                with contextlib.suppress(SystemExit, KeyboardInterrupt):
                    loop.run_forever()
            loop.set_exception_handler(lambda *_: None)  # nobody waits for any of it


class _Call:
    """Somebody waits in :func:`run_sync`."""

    def __init__(self, name: str) -> None:
        self.holder = Holder(name)
        self.inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.begun = False
        self.lost_to = ""  # who has blocked its loop for so long that the loop was abandoned
        self.future: concurrent.futures.Future[Any]

    async def main(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self.begun = True
        return await coroutine


_waiting: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("rlrf_call", default=None)
_lock = threading.RLock()
_background: Loop | None = None
_steady: Loop | None = None


def _background_loop() -> Loop:
    global _background
    if _background is None:
        _background = Loop("rlrf-loop")
    return _background


def _steady_loop() -> Loop:
    global _steady
    if _steady is None:
        _steady = Loop("rlrf-steady")
    return _steady


def steady_loop() -> asyncio.AbstractEventLoop:
    """The loop of ours that no author's code runs on."""
    with _lock:
        return _steady_loop().loop


def lasting_loop() -> asyncio.AbstractEventLoop:
    """The running loop; the steady one instead of another of ours, which may be abandoned."""
    ours = isinstance(threading.current_thread(), Loop)
    return steady_loop() if ours else asyncio.get_running_loop()


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end from sync code, also where a loop already runs (notebooks).

    Raises:
        RuntimeError: called on the background loop itself, where waiting would never end.
        InfraError: somebody else's hook has blocked the loop; it may be tried again.
    """
    return _run(coroutine, _background_loop)


def run_steady(coroutine: Coroutine[Any, Any, T]) -> T:
    """:func:`run_sync` on the steady loop."""
    return _run(coroutine, _steady_loop)


def _run(coroutine: Coroutine[Any, Any, T], loop_of: Callable[[], Loop]) -> T:
    call = _Call(f"a call of {getattr(coroutine, '__qualname__', coroutine)}")
    token = _waiting.set(call)
    try:
        with _lock:
            loop = loop_of()
            if loop is threading.current_thread():
                coroutine.close()
                raise RuntimeError(
                    "a sync method of rlrf was called from an async hook; call its async twin "
                    "(areset, astep, agrade, arollout) there"
                )
            call.future = loop.submit(Held(call.main(coroutine), call.holder))
            loop.calls.add(call)
    finally:
        _waiting.reset(token)
    call.future.add_done_callback(lambda _: call.inbox.put(None))
    seen: Step | None = None
    try:
        while True:
            try:
                job = call.inbox.get(timeout=LOOK_S)
            except queue.Empty:
                seen = _look_around(loop, call, seen)
                continue
            if job is None or call.lost_to:
                return call.future.result()  # type: ignore[no-any-return]  # it is this call's
            job()()
    except concurrent.futures.CancelledError:
        if not call.lost_to:
            raise
        if call.begun:
            raise LoopLostError(call.lost_to) from None
    except BaseException:
        call.future.cancel()  # Ctrl-C in the caller must reach the coroutine too
        raise
    finally:
        with _lock:
            loop.calls.discard(call)
            if loop.abandoned and not loop.calls:
                loop.leave()
    return _run(coroutine, loop_of)


LOOK_S = 1.0
"""How often a call that waits looks who has the loop."""
PATIENCE_S = 60.0
"""How long it waits for another call that blocks the loop and has no deadline."""


def _look_around(loop: Loop, call: _Call, seen: Step | None) -> Step | None:
    """Leave the loop to another call that has blocked it for long, or that nobody waits for."""
    step = _steps.get(loop.ident or 0)
    # Twice the same: when the whole process was stopped, it is nobody's fault.
    if step is not None and step is seen and step.call is not call:
        if step.call not in loop.calls:  # Ctrl-C
            abandon(step)
        elif step.holder.left is None and step.seconds > PATIENCE_S:
            abandon(step, keep=step.call)
    return step


def abandon(step: Step, keep: _Call | None = None) -> bool:
    """Leave the background loop to a step that blocks it, and wake who waits for the loop.

    Args:
        step: who blocks it.
        keep: a call that goes on waiting for it.

    Returns:
        False if the step has ended meanwhile, or blocks another loop.
    """
    global _background
    with _lock:
        loop = _background
        if loop is None or loop.ident != step.thread or _steps.get(step.thread) is not step:
            return False
        _background, loop.abandoned = None, True
        for call in {*loop.calls, step.call}:  # whose caller may have gone
            if call is not None and call is not keep:
                call.lost_to = step.holder.name
                call.future.cancel()
        if not loop.calls:
            loop.leave()
        return True


def lost() -> bool:
    """Whether the call that this runs for has lost its loop: nobody must hear of what it does."""
    call = _waiting.get()
    return call is not None and bool(call.lost_to)


# --- threads --------------------------------------------------------------------------------------


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
        if task is None or task.cancelling() or lost():
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
    return await _call(_turns.run if _waiting.get() is None else _in_caller, function, *args)


async def _in_caller(function: Callable[..., T], *args: Any) -> T:
    call = _waiting.get()
    assert call is not None
    future, job = _job(function, *args)
    call.inbox.put(job)
    return await future


def _after_fork() -> None:
    """A forked child has the parent's loops and idle threads as objects, but nobody runs them."""
    global _lock, _background, _steady, _threads, _turns
    _lock, _background, _steady = threading.RLock(), None, None
    _steps.clear()
    _threads, _turns = _DaemonThreads(), _DaemonThreads()


os.register_at_fork(after_in_child=_after_fork)
