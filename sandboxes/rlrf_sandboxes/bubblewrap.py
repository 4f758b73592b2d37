"""Programs in bubblewrap: unprivileged namespaces, no network, a read-only system."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from rlrf.errors import InfraError
from rlrf.sandbox import Job, Limits, Program, RawRun, SandboxInfo
from rlrf_sandboxes import host

NOBODY = 65534


class BubblewrapSandbox:
    """One ``bwrap`` per case: fresh user, pid, mount, network, ipc and uts namespaces.

    The program sees ``/usr`` and a Python, read-only, and an empty ``/tmp`` in memory. When
    started as root, it runs as ``nobody``.

    Args:
        python: the interpreter inside; None finds one that works.
        tmp_mb: size of ``/tmp``.
    """

    def __init__(self, *, python: str | None = None, tmp_mb: int = 64) -> None:
        self.python, self.tmp_mb = python, tmp_mb
        self._bwrap = shutil.which("bwrap")

    @property
    def info(self) -> SandboxInfo:
        """Name and guarantee."""
        return SandboxInfo(
            "bubblewrap",
            "unprivileged namespaces, no network, read-only system, limits per process; the "
            "kernel is shared with your account, and memory is limited per process, not in all",
        )

    async def start(self) -> None:
        """Find an interpreter that runs inside.

        Raises:
            InfraError: bubblewrap is missing or not permitted here; says what to do.
        """
        if self._bwrap is None:
            raise InfraError(
                "bubblewrap is not installed; get it with `apt-get install bubblewrap` (or your "
                "system's package manager)",
                kind="sandbox_missing",
                retryable=False,
            )
        tried = []
        for python in [self.python] if self.python else _interpreters():
            self.python = python
            probe = Job(Program("print(6 * 7)"), ("",), Limits())
            try:
                async with contextlib.aclosing(self.execute(probe)) as runs:
                    async for raw in runs:
                        if raw.stdout == b"42\n":
                            return
                        tried.append(f"{python}: exit code {raw.exit_code}")
            except InfraError as error:
                tried.append(f"{python}: {error}")
        raise InfraError(
            "bubblewrap is installed but runs no Python here: "
            + "; ".join(tried)
            + ". Where unprivileged user namespaces are restricted (Ubuntu 24.04: "
            "`sysctl kernel.apparmor_restrict_unprivileged_userns`), allow them for bwrap",
            kind="sandbox_forbidden",
            retryable=False,
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
        # Both files go in by descriptor: `nobody` could not read them where they lie.
        runner, data = _memory_file(_runner_source()), _memory_file(request)
        try:
            assert self._bwrap is not None
            assert self.python is not None
            yield host.Launch(
                [
                    self._bwrap,
                    *("--unshare-all", "--die-with-parent", "--new-session"),
                    *("--cap-drop", "ALL", "--hostname", "sandbox"),
                    *_binds(self.python),
                    *("--proc", "/proc", "--dev", "/dev"),
                    *("--size", str(self.tmp_mb << 20), "--tmpfs", "/tmp"),
                    *("--perms", "0444", "--ro-bind-data", str(runner), "/rlrf/runner.py"),
                    *("--perms", "0444", "--ro-bind-data", str(data), "/rlrf/request.json"),
                    *("--remount-ro", "/", "--chdir", "/tmp", "--"),
                    self.python,
                    *host.PYTHON_FLAGS,
                    *("/rlrf/runner.py", "/rlrf/request.json", str(channel)),
                ],
                pass_fds=(runner, data),
                popen={"user": NOBODY, "group": NOBODY, "extra_groups": []}
                if os.geteuid() == 0
                else {},
            )
        finally:
            os.close(runner)
            os.close(data)


@functools.cache
def _runner_source() -> bytes:
    return host.RUNNER.read_bytes()


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("rlrf", 0)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


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
