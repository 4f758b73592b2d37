"""What the backends on this machine share: a runner as a child process, on a socket.

It does not wall anything off: the command that is started does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlrf.errors import InfraError
from rlrf_sandboxes.slot import ENVIRONMENT, Link, not_for_children


async def spawn(
    command: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    user: int | None = None,
) -> Link:
    """Start a runner whose standard input and output are one socket.

    Started from the calling thread, which must be the event loop's: bubblewrap's
    ``--die-with-parent`` means the thread.

    Raises:
        InfraError: it cannot be started.
    """
    ours, theirs = socket.socketpair()
    not_for_children(ours)
    ours.setblocking(False)
    errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
    groups: list[int] | None = None if user is None else []
    try:
        process = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=errors.fileno(),
            env={**ENVIRONMENT, **(environment or {})},
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            cwd=cwd,
            user=user,
            group=user,
            extra_groups=groups,
        )
    except OSError as error:
        ours.close()
        errors.close()
        raise InfraError(
            f"the sandbox could not be started: {error}", kind="sandbox_start"
        ) from error
    finally:
        theirs.close()

    async def end() -> None:
        try:
            # Hung up on, a runner ends within milliseconds, and takes everything along.
            for pause in (0.002, 0.01, 0.05, 0.2, 0.5, 1.0):
                if process.poll() is not None:
                    return
                await asyncio.sleep(pause)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.get_running_loop().run_in_executor(None, process.wait)
        finally:
            errors.close()

    def last_words() -> str:
        with contextlib.suppress(OSError, ValueError):
            return os.pread(errors.fileno(), 2000, 0).decode(errors="replace")
        return ""

    return Link(ours, end, last_words=last_words)
