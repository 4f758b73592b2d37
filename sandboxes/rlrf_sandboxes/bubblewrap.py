"""Programs in bubblewrap: unprivileged namespaces, no network, a read-only system.

It does not limit the memory of all processes of a program together, and does not defend against
holes in the kernel, which is the one that your account runs on.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from rlrf._async import call_hook
from rlrf.errors import InfraError
from rlrf.sandbox import Job, RawRun, SandboxInfo
from rlrf_sandboxes import host
from rlrf_sandboxes.local import spawn
from rlrf_sandboxes.runner import free_uids
from rlrf_sandboxes.slot import PYTHON_FLAGS, RUNNER, Link, Settings, Slot


class BubblewrapSandbox:
    """A runner in fresh user, pid, mount, network, ipc and uts namespaces.

    Inside, every program gets namespaces of its own again: it sees no other process, an empty
    ``/tmp`` in memory, and, read-only, an interpreter, its standard library, the shared libraries
    they need, and packages that are named here. Nothing else of this machine is in there: no other
    package (environments bring their answers along), no shell. When started as root, all of it runs
    as a user that is nobody's.

    Args:
        python: the interpreter inside; None finds one that works.
        packages: distributions installed for that interpreter that programs may import, with what
            they require; None for numpy if it is there.
        tmp_mb: size of ``/tmp``.
        inodes: files and folders in it.
    """

    def __init__(
        self,
        *,
        python: str | None = None,
        packages: str | Sequence[str] | None = None,
        tmp_mb: int = 64,
        inodes: int = 4096,
    ) -> None:
        self._python = python
        packages = (packages,) if isinstance(packages, str) else packages
        self._packages = None if packages is None else tuple(packages)
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
            UsageError: a package is not there, or brings environments.
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
        python, binds = await call_hook(_view, self._python, self._packages)
        environment = {"HOME": "/tmp", "TMPDIR": "/tmp"}
        if any(b.startswith(host.PACKAGES_PATH) for b in binds):
            environment["PYTHONPATH"] = host.PACKAGES_PATH
        # The runner goes in by descriptor: another user could not read it where it lies.
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
                    *(*binds, *_masks(python)),
                    *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
                    # There are so many terminals on the machine.
                    *("--tmpfs", "/dev/pts", "--remount-ro", "/dev/pts"),
                    *("--perms", "0444", "--ro-bind-data", str(source), "/rlrf/runner.py"),
                    *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"),
                    *(str(python.executable), *PYTHON_FLAGS, "/rlrf/runner.py"),
                ],
                pass_fds=[source],
                environment=environment,
                # Nobody's: what the kernel counts by account, each sandbox has for itself.
                user=free_uids() if os.geteuid() == 0 else None,
            )
        finally:
            os.close(source)


_working_python: str | None = None


def _remember(python: str) -> None:
    """The next sandbox need not try again."""
    global _working_python
    _working_python = python


@functools.cache
def _view(path: str, packages: tuple[str, ...] | None) -> tuple[host.Python, tuple[str, ...]]:
    """An interpreter, and what of this machine it needs, as bubblewrap's arguments.

    Raises:
        InfraError: it is no interpreter that the runner works in.
        UsageError: a package is not there, or brings environments.
    """
    try:
        python = host.Python(path)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise InfraError(f"it does not run: {error}", kind="sandbox_python") from error
    if not python.usable:
        raise InfraError("no CPython >= 3.8 with a whole standard library", kind="sandbox_python")
    wanted = ("numpy",) if packages is None else packages
    chosen = host.located(python, wanted, optional=packages is None)
    objects = python.extensions()
    for place in chosen.values():
        if os.path.isdir(place):
            objects += [p for p, name in host.files(Path(place), host.left_out) if ".so" in name]
        elif ".so" in place:
            objects.append(Path(place))
    found, loader = host.libraries(python.executable, objects)

    trees = [python.stdlib, *([] if python.dynload.parent == python.stdlib else [python.dynload])]
    inside = (*map(str, trees), *chosen.values())
    single = {str(python.executable), "/etc/ld.so.cache", *([loader] if loader else [])}
    for library in found.values():
        real = os.path.realpath(library)
        if not any(os.path.commonpath((real, tree)) == tree for tree in inside):
            single.add(library)

    binds: list[str] = []
    tops = sorted({"/" + p.split("/")[1] for p in (*single, *map(str, trees))} | {"/lib64"})
    links = {top: os.path.realpath(top) for top in tops if os.path.islink(top)}
    for top, target in links.items():
        binds += ["--symlink", target, top]
    for place in (*map(str, trees), *sorted(single), *_DATA):
        if os.path.exists(place):
            first = "/" + place.split("/")[1]
            seen = links.get(first, first) + place[len(first) :]
            binds += ["--ro-bind", os.path.realpath(place), seen]
    if str(python.executable) != "/usr/bin/python3":
        binds += ["--symlink", str(python.executable), "/usr/bin/python3"]
    for name, place in sorted(chosen.items()):
        binds += ["--ro-bind", os.path.realpath(place), f"{host.PACKAGES_PATH}/{name}"]
    return python, tuple(binds)


_DATA = ("/usr/share/zoneinfo", "/usr/lib/locale/C.utf8")
"""What the standard library and the C library read: time zones, the locale."""


def _masks(python: host.Python) -> list[str]:
    """Arguments that hide what lies in the folder of the standard library without being of it."""
    hidden = []
    for entry in sorted(os.scandir(python.stdlib), key=lambda e: e.name):
        if python.standard(entry.name) or entry.is_symlink():  # a link leads nowhere in there
            continue
        if entry.is_dir():
            hidden += ["--tmpfs", entry.path, "--remount-ro", entry.path]
        else:
            hidden += ["--ro-bind", "/dev/null", entry.path]
    return hidden


def _interpreters() -> list[str]:
    """Pythons to try: the system's own first, as it lies where everybody may read."""
    own = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info[1]}")
    found = ["/usr/bin/python3", "/usr/local/bin/python3", own]
    return [p for p in dict.fromkeys(found) if os.path.exists(p)] or [sys.executable]
