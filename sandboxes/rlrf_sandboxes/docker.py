"""Programs in Docker: one warm, hardened container per slot.

It does not defend against holes in the kernel (``runtime="runsc"`` puts another one between) nor
against other users of the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from rlrf.errors import InfraError, UsageError
from rlrf.sandbox import Job, RawRun, SandboxInfo
from rlrf_sandboxes import daemon, images
from rlrf_sandboxes.slot import (
    ENVIRONMENT,
    PYTHON_FLAGS,
    Link,
    Settings,
    Slot,
    forks,
    not_for_children,
)

MEMORY_HEADROOM_MB = 64
"""What the runner and the files in memory need beside the programs."""
MAX_PROCESSES = 80
"""The most that ``Limits.processes`` may be."""


class DockerSandbox:
    """A runner in a container with no network, no rights and a read-only file system.

    Every program gets a uid of its own; nothing it leaves behind outlives it. The runner is root
    *inside*, with four capabilities (SETUID, SETGID, KILL, CHOWN); programs have none. When the
    process that made it dies, the container ends by itself.

    Args:
        image: None for the one that ``rlrf sandbox build`` or ``import`` made for this version.
        runtime: ``runc``, or ``runsc`` (gVisor) where adversaries are real.
        docker_host: the daemon; None for the usual one.
        memory_mb: of all processes of a program together. ``Limits.memory_mb`` is per process.
        tmp_mb: size of the folder a program may write.
        inodes: files and folders in it.
    """

    def __init__(
        self,
        *,
        image: str | None = None,
        runtime: str = "runc",
        docker_host: str | None = None,
        memory_mb: int = 1024,
        tmp_mb: int = 64,
        inodes: int = 4096,
    ) -> None:
        self._image, self._runtime, self._docker_host = image, runtime, docker_host
        self._memory_mb, self._tmp_mb, self._inodes = memory_mb, tmp_mb, inodes
        self._slot = Slot(self._launch, Settings("uid", tmp_mb, inodes))
        self._cut_off: list[tuple[asyncio.Future[None], _Container]] = []

    @property
    def info(self) -> SandboxInfo:
        """Name and guarantee."""
        kernel = (
            "a kernel of its own in user space (gVisor)"
            if self._runtime == "runsc"
            else "the kernel is shared: no defence against its own holes, so use a machine of its "
            "own or runtime='runsc' against real adversaries"
        )
        return SandboxInfo(
            "docker",
            "a container without network, rights or a writable system, with limits on memory, "
            f"processes and files, and a uid per program; {kernel}",
            self._slot.warnings,
        )

    async def start(self) -> None:
        """Start a container.

        Raises:
            InfraError: no daemon, no permission, no image; says what to do.
        """
        await self._slot.start()

    async def ping(self) -> None:
        """See :class:`rlrf.sandbox.Sandbox`."""
        await self._slot.ping()

    def execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """See :class:`rlrf.sandbox.Sandbox`.

        Raises:
            UsageError: the limits allow more memory or processes than the container has.
        """
        if job.limits.processes > MAX_PROCESSES:
            raise UsageError(
                f"Limits.processes is {job.limits.processes}; the containers allow at most "
                f"{MAX_PROCESSES}"
            )
        if job.limits.memory_mb > self._memory_mb:
            raise UsageError(
                f"Limits.memory_mb is {job.limits.memory_mb}, but the containers have "
                f"{self._memory_mb} MB; open the sandbox with memory_mb={job.limits.memory_mb}"
            )
        return self._slot.execute(job)

    async def aclose(self) -> None:
        """See :class:`rlrf.sandbox.Sandbox`."""
        await self._slot.aclose()
        while self._cut_off:
            starting, container = self._cut_off[-1]
            await asyncio.wait([starting])
            if not starting.cancelled():
                starting.exception()  # no news: nobody wants it
            await daemon.limited(container.remove)
            container.hang_up()
            self._cut_off.pop()

    async def _launch(self) -> Link:
        container = _Container()
        starting = asyncio.ensure_future(daemon.limited(self._start_container, container))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Its thread is still at it, and stops when it can; `aclose` sees to what it has made.
            container.unwanted.set()
            self._cut_off.append((starting, container))
            raise

        async def end() -> None:
            await daemon.limited(container.remove)

        assert container.sock is not None
        return Link(container.sock, end, strip=_Demultiplexer(container), last_words=container.said)

    def _start_container(self, container: _Container) -> None:
        container.check()
        client = container.client = daemon.connect(self._docker_host)
        try:
            _tidy(client, self._docker_host)
            image = images.find(client, self._image)
            if image is None:
                raise InfraError(
                    f"docker has no image {self._image or images.tag()!r}; make it with `rlrf "
                    "sandbox build`, or without a registry `rlrf sandbox import --from-host`",
                    kind="sandbox_image_missing",
                    retryable=False,
                )
            # The SDK has no names for the read-only and the masked paths.
            host_config = client.create_host_config(**self.hardening()) | self.paths()
            container.check()
            container.id = client.create_container(
                image,
                entrypoint=["python3", *PYTHON_FLAGS, "/rlrf/runner.py"],
                command=[],
                environment={**ENVIRONMENT, "HOME": "/sandbox/run", "TMPDIR": "/sandbox/run"},
                hostname="sandbox",
                user="0:0",
                working_dir="/",
                stdin_open=True,
                labels=daemon.labels(),
                host_config=host_config,
                network_disabled=True,
            )["Id"]
            # Attached before the start, or its first words would be lost. `stdin_open` without
            # `detach` sets StdinOnce: when this line is cut, its input ends, and it with it.
            before = forks()
            container.attach()
            if forks() != before:  # then a child may have a copy of the line
                raise InfraError("the process forked meanwhile", kind="sandbox_start")
            container.check()
            client.start(container.id)
            container.check()
        except BaseException as error:
            container.hang_up()
            with contextlib.suppress(InfraError):  # which would hide why the start failed
                container.remove()
            if isinstance(error, InfraError) or not isinstance(error, Exception):
                raise
            raise InfraError(
                f"docker could not start a sandbox: {error}", kind="sandbox_start"
            ) from error

    def hardening(self) -> dict[str, Any]:
        """The arguments of docker's ``create_host_config``."""
        memory = (self._memory_mb + MEMORY_HEADROOM_MB) << 20
        return {
            "network_mode": "none",
            "read_only": True,
            "cap_drop": ["ALL"],
            "cap_add": ["SETUID", "SETGID", "KILL", "CHOWN"],
            "security_opt": ["no-new-privileges"],
            "ipc_mode": "none",
            "pids_limit": MAX_PROCESSES + 16,  # the runner must be able to fork, come what may
            "mem_limit": memory,
            "memswap_limit": memory,
            "nano_cpus": 1_000_000_000,
            "ulimits": [
                {"name": "core", "soft": 1, "hard": 1},  # 0 would let pipes of core files run
                {"name": "nofile", "soft": 512, "hard": 512},
                {"name": "stack", "soft": 256 << 20, "hard": -1},
            ],
            "tmpfs": {
                "/sandbox": f"rw,nosuid,nodev,noexec,size={self._tmp_mb}m,"
                f"nr_inodes={self._inodes},mode=0755",
                "/dev/mqueue": "ro,size=4k",  # docker's own is writable for all
                "/dev/pts": "ro,size=4k",  # there are so many terminals on the machine
            },
            "auto_remove": True,
            "log_config": {"Type": "none", "Config": {}},
            "runtime": self._runtime,
        }

    @staticmethod
    def paths() -> dict[str, list[str]]:
        """What else the container cannot write or read: docker's own lists, and more."""
        return {
            # The times of a device can be set by all who may write it.
            "ReadonlyPaths": [
                *("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"),
                "/dev",
            ],
            "MaskedPaths": [
                *("/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys"),
                *("/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats"),
                *("/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
                *("/sys/devices/virtual/powercap", "/proc/pressure"),
            ],
        }


_tidied: set[str | None] = set()


def _tidy(client: Any, docker_host: str | None) -> None:
    """Remove, once per process, what owners have left that were killed before a container ran."""
    if docker_host not in _tidied:
        _tidied.add(docker_host)
        with contextlib.suppress(InfraError):
            images.gc(client)


class _Container:
    """A container, from its making to its end; used in threads."""

    def __init__(self) -> None:
        self.client: Any = None
        self.id: str | None = None
        self.sock: socket.socket | None = None
        self.errors = bytearray()
        self.unwanted = threading.Event()

    def check(self) -> None:
        """Go no further when nobody wants it any more."""
        if self.unwanted.is_set():
            raise InfraError("the sandbox is no longer wanted", kind="sandbox_closed")

    def attach(self) -> None:
        """Open its standard streams as one non-blocking socket."""
        params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
        stream = self.client.attach_socket(self.id, params=params)
        # What the SDK hands out is the inside of an HTTP response. It is the response that has to
        # be closed: one that is collected after its inside was closed complains (Python 3.13).
        response = getattr(stream, "_response", stream)
        inner = getattr(stream, "_sock", stream)
        if type(inner) is socket.socket:
            self.sock = socket.socket(fileno=os.dup(inner.fileno()))
            not_for_children(self.sock)
            response.close()
        else:  # TLS or ssh: the event loop cannot read these
            if isinstance(inner, socket.socket):
                not_for_children(inner)
            self.sock = _bridge(inner, response.close)
        self.sock.setblocking(False)

    def hang_up(self) -> None:
        """Close the line of a container that never became a sandbox."""
        if self.sock is not None:
            self.sock.close()

    def said(self) -> str:
        """The end of its standard error."""
        return bytes(self.errors[-2000:]).decode(errors="replace")

    def remove(self) -> None:
        """End and remove it; that it is gone already is no error."""
        try:
            if self.id is not None:
                self.client.remove_container(self.id, force=True)
            self.id = None
        except daemon.sdk().errors.APIError as error:
            if error.status_code not in (404, 409):  # gone, or going
                raise InfraError(
                    f"container {self.id} could not be removed: {error}", kind="sandbox_remove"
                ) from error
        except OSError as error:  # the daemon is away; the container ends by itself
            raise InfraError(
                f"container {self.id} could not be removed: {error}", kind="sandbox_remove"
            ) from error
        finally:
            if self.client is not None:
                self.client.close()


class _Demultiplexer:
    """Takes docker's framing off: 8 bytes of stream number and length before each piece."""

    def __init__(self, container: _Container) -> None:
        self._container = container
        self._buffer = bytearray()

    def __call__(self, data: bytes) -> bytes:
        """What of the received is standard output."""
        self._buffer += data
        out = bytearray()
        while len(self._buffer) >= 8:
            size = int.from_bytes(self._buffer[4:8], "big")
            if len(self._buffer) < 8 + size:
                break
            piece = self._buffer[8 : 8 + size]
            if self._buffer[0] == 1:
                out += piece
            else:
                self._container.errors += piece
                del self._container.errors[:-4000]
            del self._buffer[: 8 + size]
        return bytes(out)


def _bridge(stream: Any, close: Callable[[], Any]) -> socket.socket:
    """A plain socket that two threads connect with a stream that is none, and close in the end."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        not_for_children(end)

    def pump(read: Callable[[int], bytes], write: Callable[[bytes], Any]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := read(1 << 16):
                write(data)
        for one in (theirs, stream):
            with contextlib.suppress(OSError, ValueError):
                one.shutdown(socket.SHUT_RDWR)

    def forth() -> None:
        pump(theirs.recv, stream.sendall)
        back.join()
        theirs.close()
        with contextlib.suppress(OSError, ValueError):
            close()

    back = threading.Thread(
        target=pump, args=(stream.recv, theirs.sendall), name="rlrf-docker", daemon=True
    )
    back.start()
    threading.Thread(target=forth, name="rlrf-docker", daemon=True).start()
    return ours
