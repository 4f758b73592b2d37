"""Standard output and error that never stop the work: a closed pipe, a full disk, a narrow charset.

``rlrf train | head`` trains to its end. What cannot be shown is dropped; :func:`lost` says why.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable
from typing import Any


class _Stream:
    """A text stream whose writes do not fail; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a charset that does not have it all
            self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError) as error:
            self._failed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: OSError | ValueError) -> None:
        if not isinstance(error, OSError):  # closed by somebody
            error = OSError(errno.EBADF, str(error))
        self.error = self.error or error
        if error.errno in (errno.EPIPE, errno.EBADF):  # for good: else there may be room again
            self.give_up()

    def give_up(self) -> None:
        """Let what is still buffered go nowhere, or Python fails when it flushes at its end."""
        with contextlib.suppress(OSError, ValueError):
            if (number := self._stream.fileno()) in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect(*, descriptors: bool) -> None:
    """Put streams that do not fail in the place of the standard ones.

    Args:
        descriptors: also fill 0, 1 and 2 where they are closed: the next file that is opened
            would get such a number, and whatever is printed.
    """
    if descriptors:
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for good
        if isinstance(stream, _Stream):
            continue
        if descriptors:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        setattr(sys, name, _Stream(stream))


def restore() -> None:
    """Put the streams back that :func:`protect` replaced."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Stream):
            setattr(sys, name, stream._stream)


def lost() -> OSError | None:
    """Why standard output did not get all, or None: who reads a pipe may stop when they like."""
    stream = sys.stdout
    sys.stdout.flush()
    error = stream.error if isinstance(stream, _Stream) else None
    for each in (sys.stdout, sys.stderr):
        if isinstance(each, _Stream) and each.error is not None:
            each.give_up()
    return None if error is None or error.errno == errno.EPIPE else error
