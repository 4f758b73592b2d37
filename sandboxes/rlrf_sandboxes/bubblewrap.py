"""Programs in bubblewrap: unprivileged namespaces, no network, a read-only system."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from rlrf.errors import InfraError
from rlrf.sandbox import Job, RawRun, SandboxInfo
from rlrf_sandboxes.local import spawn
from rlrf_sandboxes.slot import PYTHON_FLAGS, RUNNER, Link, Settings, Slot

NOBODY = 65534


class BubblewrapSandbox:
    """A runner in fresh user, pid, mount, network, ipc and uts namespaces.

    Inside, every program gets namespaces of its own again: it sees no other process, an empty
    ``/tmp`` in memory, ``/usr`` and a Python, read-only. When started as root, all of it runs as
    ``nobody``.

    Args:
        python: the interpreter inside; None finds one that works.
        tmp_mb: size of ``/tmp``.
        inodes: files and folders in it.
    """

    def __init__(self, *, python: str | None = None, tmp_mb: int = 64, inodes: int = 4096) -> None:
        self._python = python
        self._slot = Slot(self._launch, Settings("ns", tmp_mb, inodes))

    @property
    def info(self) -> SandboxInfo:
        """Name and guarantee."""
        return SandboxInfo(
            "bubblewrap",
            "unprivileged namespaces and a system-call filter, no network, a read-only system; "
            "memory is limited per process, not in all, and the kernel is shared with your account",
            self._slot.warnings,
        )

    async def start(self) -> None:
        """Start the runner, in the first interpreter that works.

        Raises:
            InfraError: bubblewrap is missing or not permitted here; says what to do.
        """
        if shutil.which("bwrap") is None:
            raise InfraError(
                "bubblewrap is not installed; get it with `apt-get install bubblewrap` (or your "
                "system's package manager)",
                kind="sandbox_missing",
                retryable=False,
            )
        if self._python is None:
            self._python = _working_python
        tried = []
        for python in [self._python] if self._python else _interpreters():
            self._python = python
            try:
                await self._slot.start()
            except InfraError as error:
                tried.append(f"{python}: {error}")
                continue
            _remember(python)
            return
        raise InfraError(
            "bubblewrap is installed but runs no Python here: "
            + "; ".join(tried)
            + ". `rlrf sandbox doctor` finds out why and what to do",
            kind="sandbox_forbidden",
            retryable=False,
        )

    async def ping(self) -> None:
        """See :class:`rlrf.sandbox.Sandbox`."""
        await self._slot.ping()

    def execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """See :class:`rlrf.sandbox.Sandbox`."""
        return self._slot.execute(job)

    async def aclose(self) -> None:
        """See :class:`rlrf.sandbox.Sandbox`."""
        await self._slot.aclose()

    async def _launch(self) -> Link:
        assert self._python is not None
        # The runner goes in by descriptor: `nobody` could not read it where it lies.
        source = os.memfd_create("runner", 0)
        try:
            os.write(source, RUNNER.read_bytes())
            os.lseek(source, 0, os.SEEK_SET)
            return await spawn(
                [
                    "bwrap",
                    *("--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session"),
                    # The runner makes namespaces for its programs, within its own.
                    *("--uid", "1000", "--gid", "1000"),
                    *("--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"),
                    *("--hostname", "sandbox"),
                    *_binds(self._python),
                    *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
                    *("--perms", "0444", "--ro-bind-data", str(source), "/rlrf/runner.py"),
                    *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"),
                    *(self._python, *PYTHON_FLAGS, "/rlrf/runner.py"),
                ],
                pass_fds=[source],
                environment={"HOME": "/tmp", "TMPDIR": "/tmp"},
                user=NOBODY if os.geteuid() == 0 else None,
            )
        finally:
            os.close(source)


_working_python: str | None = None


def _remember(python: str) -> None:
    """The next sandbox need not try again."""
    global _working_python
    _working_python = python


def _binds(python: str) -> list[str]:
    """The parts of the system a Python needs, read-only."""
    binds = []
    for path in ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache"):
        if os.path.islink(path):
            binds += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            binds += ["--ro-bind", path, path]
    prefix = _prefix(python)
    if not prefix.startswith("/usr/"):
        binds += ["--ro-bind", prefix, prefix]
    return binds


@functools.cache
def _prefix(python: str) -> str:
    """The folder an interpreter and its library lie below."""
    if python.startswith("/usr/"):
        return "/usr/"
    return str(Path(python).resolve().parents[1])


def _interpreters() -> list[str]:
    """Pythons to try: the system's own first, as it lies where everybody may read."""
    own = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}")
    found = ["/usr/bin/python3", "/usr/local/bin/python3", own]
    return [p for p in dict.fromkeys(found) if os.path.exists(p)] or [sys.executable]
