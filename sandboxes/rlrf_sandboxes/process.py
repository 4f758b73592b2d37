"""Programs in plain processes: limits and a deadline, but no walls."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from rlrf.errors import UsageError
from rlrf.sandbox import Job, RawRun, SandboxInfo
from rlrf_sandboxes import host


class ProcessSandbox:
    """One process per case. NOT a sandbox: for programs you trust.

    Args:
        allow_unsafe: must be True, or :meth:`start` refuses.
        instead_of: why nothing better was chosen, for the message.
    """

    def __init__(self, *, allow_unsafe: bool = False, instead_of: str = "") -> None:
        self.allow_unsafe, self.instead_of = allow_unsafe, instead_of

    @property
    def info(self) -> SandboxInfo:
        """Name and guarantee."""
        return SandboxInfo(
            "process",
            "NOT a sandbox: limits and timeouts only; programs can read your files, use the "
            "network and end your processes",
        )

    async def start(self) -> None:
        """Refuse, unless told that the programs are trusted.

        Raises:
            UsageError: without ``allow_unsafe=True``.
        """
        if not self.allow_unsafe:
            why = f" Nothing safer could be used: {self.instead_of}." if self.instead_of else ""
            raise UsageError(
                "the process backend is no sandbox: a program in it can read your files, use "
                f"the network and end your processes.{why} Install bubblewrap, or pass "
                "allow_unsafe=True if you trust every program that will run"
            )

    async def execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """See :class:`rlrf.sandbox.Sandbox`."""
        async with contextlib.aclosing(host.execute(job, self._prepare)) as runs:
            async for raw in runs:
                yield raw

    async def aclose(self) -> None:
        """Nothing outlives a run."""

    @contextlib.contextmanager
    def _prepare(self, request: bytes, channel: int) -> Iterator[host.Launch]:
        with tempfile.TemporaryDirectory(prefix="rlrf-", ignore_cleanup_errors=True) as folder:
            path, work = Path(folder) / "request.json", Path(folder) / "work"
            path.write_bytes(request)
            work.mkdir()
            yield host.Launch(
                [sys.executable, *host.PYTHON_FLAGS, str(host.RUNNER), str(path), str(channel)],
                pass_fds=(),
                popen={"cwd": work},
            )
