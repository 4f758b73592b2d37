"""No slow path is silent: what falls back from a fast path says so, once, with the remedy.

Who falls back calls :func:`notice`, each time it does. It is said once on the console (by
:mod:`warnings`, as :class:`SlowPathWarning`), and is handed to whoever keeps a record of what is
under way: a trainer for its run, ``rlrf eval`` for its report. A listener that joins late hears of
it at the next use, so it need not be there at the first.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import MethodType

Listener = Callable[[str, str], bool]
"""Told ``(topic, message)``, possibly many times; True if it says it on the console itself."""

_lock = threading.Lock()
_said: set[tuple[str, str]] = set()
_listeners: list[Callable[[], Listener | None]] = []


class SlowPathWarning(RuntimeWarning):
    """Something works, and is right, but slower or weaker than it should be."""


def notice(topic: str, message: str) -> None:
    """Say that a slow or weaker path is taken; to be called at every use, and cheap.

    Args:
        topic: which path, and of what: told once per topic in each record.
        message: what is slow, why, and what to do about it.
    """
    listeners = [listener for listening in tuple(_listeners) if (listener := listening())]
    heard = [listener(topic, message) for listener in listeners]
    with _lock:
        new = (topic, message) not in _said
        _said.add((topic, message))
    if new and not any(heard):
        warnings.warn(message, SlowPathWarning, stacklevel=3)


def listen(listener: Listener) -> Callable[[], None]:
    """Have every notice told to ``listener`` until the function returned is called.

    A method is listened with only as long as its object lives.
    """
    listening = (
        weakref.WeakMethod(listener) if isinstance(listener, MethodType) else lambda: listener
    )
    _listeners.append(listening)

    def stop() -> None:
        if listening in _listeners:
            _listeners.remove(listening)

    return stop


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """The messages of all notices inside, one per topic, in order; the console has them too."""
    found: dict[str, str] = {}
    messages: list[str] = []

    def keep(topic: str, message: str) -> bool:
        if topic not in found:
            found[topic] = message
            messages.append(message)
        return False

    stop = listen(keep)
    try:
        yield messages
    finally:
        stop()
