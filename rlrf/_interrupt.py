"""Ctrl-C and SIGTERM: a command says what it kept and how to go on, and ends within two seconds.

Python runs the handler of a signal between two bytecodes of the main thread, and a pass of torch
is one of them that may take many seconds. So two react to a signal:

- the main thread gets a :class:`KeyboardInterrupt` and unwinds: files and containers are closed,
  the run is marked, what can be saved is;
- a watcher, which the signal itself wakes through a pipe, leaves it :data:`GRACE_S` for that. Then
  it says the same words in its stead, and ends the process. A second signal ends it at once.

Either ends by :func:`os._exit`: an interpreter that shuts down while a thread is still in C++ code
is aborted by it (exit code 134).

``rlrf/__init__`` imports this module first of all, so that the command does not answer Ctrl-C
with a traceback while the rest is imported.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from rlrf.redact import safe_argv

GRACE_S = 1.5
"""Seconds the main thread has to unwind."""

_AGAIN = b"\0"
"""What the watcher is told when an interrupt was raised where it went nowhere."""

_AGAIN_S = 0.01
"""Seconds between two tries to raise it where it goes somewhere."""

CODES = {int(signal.SIGINT): 130, int(signal.SIGTERM): 143}
"""Signal to exit code, as shells have it."""


def _is_command() -> bool:
    """Whether this process is the command ``rlrf``, and not a script or test that imports it."""
    if os.path.basename(sys.argv[0] if sys.argv else "") == "rlrf":
        return True
    started = getattr(sys, "orig_argv", [])
    return any(pair == ("-m", "rlrf") for pair in itertools.pairwise(started))


IS_COMMAND = _is_command()

_words: Callable[[], list[str]] | None = None
_kept = False


@contextlib.contextmanager
def keeping(words: Callable[[], list[str]]) -> Iterator[None]:
    """While inside, an interrupt tells ``words()``: what was kept, and the command that goes on.

    They are asked for in any thread, once the work has ended or is about to be ended.
    """
    global _words, _kept
    _words, _kept = words, True
    yield
    _words = None  # but not when it is interrupted: then they are still to be told


def kept() -> bool:
    """Whether the command's work is on disk, and what it prints is not all there is of it."""
    return _kept


def same_command(*more: str) -> str:
    """The command line that goes on with the work: as it was given, but for ``--overwrite``.

    Args:
        more: words that come behind it.
    """
    words = safe_argv(sys.argv[1:])  # what is typed again need not be logged again
    command = shlex.join(["rlrf", *(word for word in words if word != "--overwrite"), *more])
    return command if words == sys.argv[1:] else f"{command}  # with your secrets put back"


class Interrupts:
    """Takes over SIGINT and SIGTERM while it is entered, in the main thread; elsewhere it does not.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._closed = self._raised = self._said = False
        self._saying = threading.Lock()
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """The exit code of who was interrupted."""
        return CODES.get(self.signal or signal.SIGINT, 130)

    def __enter__(self) -> Self:
        global _words, _kept
        _words, _kept = None, False
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, name="rlrf-interrupts", daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._ignored
        for number in CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                self._before[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        if threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            # What is left is to exit, with the code the work has earned.
            signal.signal(number, signal.SIG_IGN if IS_COMMAND else handler)
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._unraisable
        os.close(self._writer)  # ends the watcher

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._closed or self._raised:
            return  # a second one is for the watcher
        self.signal = number
        while frame is not None:
            if frame.f_code is Interrupts._ignored.__code__:
                return  # it would go nowhere here, too; the watcher asks again
            frame = frame.f_back
        self._raised = True
        raise KeyboardInterrupt

    def _ignored(self, unraisable: Any) -> None:
        if self.signal is None or unraisable.exc_type is not KeyboardInterrupt:
            self._unraisable(unraisable)
        elif not self._closed:  # raised in a finalizer, where it goes nowhere
            with contextlib.suppress(OSError):
                os.write(self._writer, _AGAIN)

    def _watch(self) -> None:
        deadline: float | None = None
        own = 0  # signals that are not the user's
        lost = False  # whether the interrupt is still to be raised again
        while True:
            now = time.monotonic()
            if deadline is not None and deadline <= now:
                self._end()
            if lost := lost and not self._raised:
                own += 1
                _thread.interrupt_main(signal.Signals(self.signal or signal.SIGINT))
            left = None if deadline is None else min(deadline - now, _AGAIN_S if lost else 60)
            if not select.select([self._reader], [], [], left)[0]:
                continue
            heard = os.read(self._reader, 64)
            if self._closed:
                os.close(self._reader)
                return
            for number in heard:
                if number == _AGAIN[0]:
                    lost, self._raised = True, False
                elif number not in CODES:
                    continue
                elif own:
                    own -= 1
                elif deadline is not None:
                    self._end(at_once=True)
                else:
                    deadline = time.monotonic() + GRACE_S
                    self.signal = self.signal or number
            if lost:  # the own ones wake this up at once
                time.sleep(_AGAIN_S)

    def _end(self, *, at_once: bool = False) -> None:
        """End the process in the main thread's stead."""
        if not at_once:
            # What it has to do with files may take as long as they like, too.
            teller = threading.Thread(target=self.say, daemon=True)
            teller.start()
            teller.join(0.3)
        if not self._said:
            self._write("interrupted\n")
        os._exit(self.code)

    def say(self) -> None:
        """Tell what was kept and how to go on; once, whoever asks for it."""
        with self._saying:
            if self._said:
                return
            lines = ["interrupted"]
            try:
                lines += _words() if _words is not None else []
            except Exception as error:
                lines.append(f"what was kept cannot be said: {error}")
            self._said = True
            self._write("\n".join(lines) + "\n")

    @staticmethod
    def _write(text: str) -> None:
        """Past the streams of Python, whose locks the main thread may hold."""
        if os.environ.get("RANK", "0") != "0":
            return  # the first process talks
        if not IS_COMMAND:
            print(text, end="", file=sys.stderr)
            return
        with contextlib.suppress(OSError):
            if os.isatty(2):
                text = "\r\x1b[?25h" + text  # a live display hides the cursor
            os.write(2, text.encode(errors="backslashreplace"))


def _early(number: int, _: FrameType | None) -> None:
    """Ctrl-C while rlrf is imported: there is nothing to keep."""
    Interrupts._write("interrupted\n")
    os._exit(CODES[number])


if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _early)
