"""What long work is under way: told by who does it, shown by who listens to it.

::

    with progress.phase("evaluation", total=100, unit="rollouts") as phase:
        ...
        phase.advance()

Whoever works need not know whether anybody listens: where nobody does it costs an append and a
remove. A command's display (:mod:`rlrf.console`) shows what is under way at least every ten
seconds, whatever takes them: a download, an import, a forward pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Phase:
    """A piece of work under way.

    Attributes:
        what: its name; may be empty where ``unit`` says it all.
        total: how many ``unit`` there are, or None.
        unit: what is counted, or empty.
        done: how many are done.
        at_most: whether it may end with fewer than ``total``.
    """

    __slots__ = ("at_most", "done", "total", "unit", "what")

    def __init__(
        self, what: str, total: int | None, unit: str, done: int = 0, at_most: bool = False
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.at_most = at_most

    def advance(self, n: int = 1) -> None:
        """Count ``n`` more."""
        self.done += n

    def __str__(self) -> str:
        if not self.unit:
            return self.what
        of = "" if self.total is None else f" of {'at most ' * self.at_most}{self.total:,}"
        counted = f"{self.done:,}{of} {self.unit}"
        return f"{self.what}: {counted}" if self.what else counted


_lock = threading.Lock()
_phases: list[Phase] = []
_listener: Callable[[str], None] | None = None


def begin(
    what: str, total: int | None = None, unit: str = "", *, done: int = 0, at_most: bool = False
) -> Phase:
    """Tell that something is under way, until :func:`end` is called with it; see :class:`Phase`."""
    here = Phase(what, total, unit, done, at_most)
    with _lock:
        _phases.append(here)
    return here


def end(phase: Phase) -> None:
    """It is not under way any more."""
    with _lock:
        _phases.remove(phase)


@contextlib.contextmanager
def phase(
    what: str, total: int | None = None, unit: str = "", *, at_most: bool = False
) -> Iterator[Phase]:
    """:func:`begin`, and :func:`end` when it is left."""
    here = begin(what, total, unit, at_most=at_most)
    try:
        yield here
    finally:
        end(here)


def under_way() -> list[Phase]:
    """What is under way, the longest first."""
    with _lock:
        return list(_phases)


def say(message: str) -> None:
    """Tell something worth a line of its own, e.g. what is about to be done and how long it takes.

    Nobody hears it where nobody listens: a library does not print.
    """
    if _listener is not None:
        _listener(message)


def heard() -> bool:
    """Whether somebody listens: only then is it worth finding out what there is to say."""
    return _listener is not None


@contextlib.contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Hand what is said to ``listener`` while this is entered."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def duration(seconds: float) -> str:
    """A length of time as one says it: ``40 s``, ``9 min``, ``2 h 10 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds)):d} s" if seconds < 20 else f"{round(seconds / 10) * 10} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, left = divmod(round(minutes / 10) * 10, 60)
    return f"{hours} h" if not left or hours > 9 else f"{hours} h {left} min"
