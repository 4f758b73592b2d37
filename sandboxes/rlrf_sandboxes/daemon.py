"""The Docker daemon: connecting to it, not overloading it, and knowing whose containers are whose.

Every container of rlrf carries labels that say which process made it. A container whose maker is
dead may be removed by anybody on the same host; no other container is ever touched.

It does not start or set up the daemon, and does not protect it: whoever may use it is root on its
machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import hashlib
import importlib
import os
import re
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rlrf._async import call_hook
from rlrf.errors import InfraError, MissingDependencyError

T = TypeVar("T")

PREFIX = "org.rlrf."
MANAGED = PREFIX + "managed"
CONCURRENT_CALLS = 4
"""Calls that wait on the daemon at once; many more make it slow for everybody, or hang."""

_SYSTEM_SOCKET = "/var/run/docker.sock"
_calls = threading.Semaphore(CONCURRENT_CALLS)


# --- connecting -------------------------------------------------------------------------------


def sdk() -> Any:
    """The module ``docker``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("docker")
    except ModuleNotFoundError as error:
        missing = (error.name or "docker").partition(".")[0]
        raise MissingDependencyError("the docker sandbox", missing, "docker") from error


def connect(docker_host: str | None = None, timeout: float = 30) -> Any:
    """A client of the daemon, which has answered.

    Args:
        docker_host: its address, e.g. ``unix:///run/user/1000/docker.sock``; None for
            ``DOCKER_HOST``, the current docker context, the system's or the user's socket.
        timeout: seconds that a call may take.

    Returns:
        A ``docker.APIClient``; the caller closes it.

    Raises:
        InfraError: there is none to be had; the message says how to mend that.
    """
    try:
        docker = sdk()
    except MissingDependencyError as error:
        raise InfraError(str(error), kind="docker_sdk_missing", retryable=False) from error
    where = docker_host or os.environ.get("DOCKER_HOST") or f"unix://{_SYSTEM_SOCKET}"
    try:
        options = address(docker, docker_host)
        where = str(options.get("base_url") or where)
        return docker.APIClient(version="auto", timeout=timeout, **options)
    except Exception as error:  # with a bad address or configuration, the SDK raises anything
        raise _explained(docker, error, where) from error


@contextlib.contextmanager
def calls(what: str) -> Iterator[None]:
    """Calls of a daemon that may fail between one and the next.

    Raises:
        InfraError: they did; says what could not be done.
    """
    try:
        yield
    except (sdk().errors.DockerException, OSError) as error:
        raise InfraError(
            f"{what}: the docker daemon failed: {_plain(error)}", kind="docker_failed"
        ) from error


def address(docker: Any, docker_host: str | None) -> dict[str, Any]:
    """Where the daemon is, as arguments of ``docker.APIClient``, found the way the CLI does."""
    if docker_host:
        return dict(
            docker.utils.kwargs_from_env(environment={**os.environ, "DOCKER_HOST": docker_host})
        )
    if os.environ.get("DOCKER_HOST"):
        return dict(docker.utils.kwargs_from_env())
    named = os.environ.get("DOCKER_CONTEXT") or docker.context.config.get_current_context_name()
    context = docker.ContextAPI.get_context(named)
    if context is None:
        raise docker.errors.DockerException(f"there is no docker context {named!r}")
    if context.Name != "default" and context.Host:
        return {"base_url": context.Host, "tls": context.TLSConfig or False}
    rootless = Path(os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}"), "docker.sock")
    if not os.path.exists(_SYSTEM_SOCKET) and rootless.exists():
        return {"base_url": f"unix://{rootless}"}
    return {}


def _explained(docker: Any, error: BaseException, where: str) -> InfraError:
    """What is wrong and how to mend it."""
    causes = list(_causes(error))
    kind = "docker_unreachable"
    if any(isinstance(c, docker.errors.InvalidVersion) for c in causes):
        kind = "docker_too_old"
        message = f"the docker daemon at {where} is too old: {error}. Update it"
    elif any(isinstance(c, PermissionError) for c in causes):
        kind = "docker_forbidden"
        message = (
            f"you may not use the docker daemon at {where}; run "
            "`sudo usermod -aG docker $USER` and log in again"
        )
    elif any(isinstance(c, FileNotFoundError) for c in causes):
        message = (
            f"there is no docker daemon at {where}; install Docker and start it "
            "(`sudo systemctl start docker`), or say where it is with DOCKER_HOST"
        )
    elif any(isinstance(c, ConnectionRefusedError) for c in causes):
        message = (
            f"no docker daemon listens at {where}; start it (`sudo systemctl start docker`), "
            "or say where it is with DOCKER_HOST"
        )
    elif any(isinstance(c, TimeoutError) or "timed out" in str(c).lower() for c in causes):
        message = (
            f"the docker daemon at {where} does not answer; look at it with `docker info`, "
            "restart it with `sudo systemctl restart docker`"
        )
    else:
        message = (
            f"the docker daemon at {where} cannot be used: {type(error).__name__}: {error}. Its "
            "address comes from DOCKER_HOST, else from the docker context "
            "(`docker context ls`); mend that, e.g. DOCKER_HOST=unix:///var/run/docker.sock"
        )
    return InfraError(_plain(message), kind=kind, retryable=False)


def _plain(said: object) -> str:
    """A message without passwords of addresses, and in characters that can be printed."""
    text = re.sub(r"//[^/@\s]*:[^/@\s]*@", "//...@", str(said))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that is behind it; requests and urllib3 hide errors in arguments."""
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        one = todo.pop()
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [one.__cause__, one.__context__, *one.args, getattr(one, "reason", None)]


# --- calling ----------------------------------------------------------------------------------


async def limited(function: Callable[..., T], *args: Any) -> T:
    """Run a blocking call of the daemon in a thread, with at most four in this process at once.

    When the caller is cancelled, a call that still waits for its turn is not made; one that has
    begun runs to its end.
    """
    abandoned = threading.Event()

    def call() -> T | None:
        with _calls:
            return None if abandoned.is_set() else function(*args)

    try:
        result: T = await call_hook(call)
    except asyncio.CancelledError:
        abandoned.set()
        raise
    return result


def _after_fork() -> None:
    global _calls
    _calls = threading.Semaphore(CONCURRENT_CALLS)  # the parent's threads will not give theirs back


os.register_at_fork(after_in_child=_after_fork)


# --- whose container --------------------------------------------------------------------------


def labels() -> dict[str, str]:
    """Labels for a container that this process makes."""
    pid = os.getpid()
    return {
        MANAGED: "1",
        PREFIX + "host": host_id(),
        PREFIX + "owner_pid": str(pid),
        PREFIX + "owner_start": start_time(pid) or "",
        PREFIX + "session": _session(pid),
        PREFIX + "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        PREFIX + "version": metadata.version("rlrf"),
    }


def owner_is_alive(labels: Mapping[str, str]) -> bool | None:
    """Whether the process that made a container still lives; None if that cannot be told here."""
    pid, started = labels.get(PREFIX + "owner_pid", ""), labels.get(PREFIX + "owner_start", "")
    if labels.get(PREFIX + "host") != host_id() or not pid.isdecimal() or not started:
        return None
    return start_time(int(pid)) == started


@functools.cache
def host_id() -> str:
    """Where a process id of ours means the same process: this boot, this pid namespace.

    The boot counts because copies of one virtual machine share a machine id.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = hex(uuid.getnode())
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]


def start_time(pid: int) -> str | None:
    """When a process began, in the kernel's own units; None if it is dead, or a zombie."""
    if os.path.exists("/proc/self/stat"):
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The name, in parentheses, may hold anything; what follows starts with field 3.
        fields = stat[stat.rindex(b")") + 2 :].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    with contextlib.suppress(OSError):  # macOS
        told = subprocess.run(
            ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        return told.stdout.strip() or None
    return None


@functools.cache
def _session(pid: int) -> str:
    # By pid: a forked child is an owner of its own.
    return str(uuid.uuid4())
