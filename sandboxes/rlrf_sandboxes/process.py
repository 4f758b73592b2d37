"""Programs in plain processes: limits and a deadline, but no walls.

They do not keep a program from your files, rlrf's own answers among them, from the network, or from
your other processes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path

from rlrf.errors import UsageError
from rlrf.sandbox import Job, RawRun, SandboxInfo
from rlrf_sandboxes.local import spawn
from rlrf_sandboxes.slot import PYTHON_FLAGS, RUNNER, Link, Settings, Slot


class ProcessSandbox:
    """A runner beside you. NOT a sandbox: for programs you trust.

    Args:
        allow_unsafe: must be True, or :meth:`start` refuses.
        python: the interpreter, 3.8 or later; None for the running one.
        instead_of: why nothing better was chosen, for the message.
    """

    def __init__(
        self, *, allow_unsafe: bool = False, python: str | None = None, instead_of: str = ""
    ) -> None:
        self._python = python or sys.executable
        self._allow_unsafe, self._instead_of = allow_unsafe, instead_of
        self._slot = Slot(self._launch, Settings("plain"))
        self._folders: list[Path] = []

    @property
    def info(self) -> SandboxInfo:
        """Name and guarantee."""
        return SandboxInfo(
            "process",
            "NOT a sandbox: limits and timeouts only; programs can read your files, use the "
            "network and end your processes",
            self._slot.warnings,
        )

    async def start(self) -> None:
        """Refuse, unless told that the programs are trusted.

        Raises:
            UsageError: without ``allow_unsafe=True``.
            InfraError: the runner does not start.
        """
        if not self._allow_unsafe:
            why = f" Nothing safer could be used: {self._instead_of}." if self._instead_of else ""
            raise UsageError(
                "the process backend is no sandbox: a program in it can read your files, use "
                f"the network and end your processes.{why} Install bubblewrap or Docker "
                "(`rlrf sandbox doctor` says what is missing), or pass allow_unsafe=True if you "
                "trust every program that will run"
            )
        await self._slot.start()

    async def ping(self) -> None:
        """See :class:`rlrf.sandbox.Sandbox`."""
        await self._slot.ping()

    def execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """See :class:`rlrf.sandbox.Sandbox`."""
        return self._slot.execute(job)

    async def aclose(self) -> None:
        """See :class:`rlrf.sandbox.Sandbox`."""
        await self._slot.aclose()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        self._folders.clear()

    async def _launch(self) -> Link:
        folder = Path(tempfile.mkdtemp(prefix="rlrf-"))
        self._folders.append(folder)
        work = str(folder / "run")
        return await spawn(
            [self._python, *PYTHON_FLAGS, str(RUNNER)],
            cwd=folder,
            environment={"HOME": work, "TMPDIR": work},
        )
