"""The host's side of a run: start, feed, read with caps, stop in time, clean up.

Shared by the backends that start one process per case; they differ in the command line only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrf._async import call_hook
from rlrf.errors import InfraError
from rlrf.sandbox import MISSING, Job, Limit, Limits, ProgramError, RawRun

RUNNER = Path(__file__).with_name("runner.py")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of sets must not differ between runs
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONIOENCODING": "utf-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# -I would ignore PYTHONHASHSEED; these leave out user and site packages as it does.
PYTHON_FLAGS = ("-s", "-S", "-B")
MAX_CHANNEL_BYTES = 8 * 1024 * 1024
GRACE_S = 0.05
"""How long output is still read after the program ended, from what it left behind."""


@dataclass(frozen=True)
class Launch:
    """How to start one run.

    Attributes:
        command: argument vector.
        pass_fds: descriptors the child inherits.
        popen: further arguments of :class:`subprocess.Popen`.
    """

    command: list[str]
    pass_fds: tuple[int, ...]
    popen: dict[str, Any] = field(default_factory=dict)


Prepare = Callable[[bytes, int], contextlib.AbstractContextManager[Launch]]
"""Given the request and the result descriptor, how to start; cleans up on exit."""


async def execute(job: Job, prepare: Prepare) -> AsyncGenerator[RawRun, None]:
    """Run a job's inputs one after another, each in a fresh process."""
    for case_input in job.inputs:
        run = _Run(job, case_input, prepare)
        try:
            yield await call_hook(run)
        finally:
            run.kill()  # a cancelled caller must not leave the program behind


class _Run:
    """One process, from start to end, in the calling thread."""

    def __init__(self, job: Job, case_input: str | tuple[Any, ...], prepare: Prepare) -> None:
        self.job, self.input, self.prepare = job, case_input, prepare
        self.process: subprocess.Popen[bytes] | None = None
        self.cancelled = threading.Event()

    def kill(self) -> None:
        """End the process and all it started; safe at any time and twice."""
        self.cancelled.set()
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def __call__(self) -> RawRun:
        called = self.job.program.entry is not None
        request = json.dumps(
            {
                "code": self.job.program.code,
                "entry": self.job.program.entry,
                "args": list(self.input) if called else [],
                "limits": _rlimits(self.job.limits),
            }
        ).encode("utf-8", "surrogatepass" if not called else "strict")
        stdin = b"" if called else str(self.input).encode("utf-8", "replace")
        ours, theirs = os.pipe()
        try:
            with self.prepare(request, theirs) as launch:
                try:
                    self.process = subprocess.Popen(
                        launch.command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        env=ENVIRONMENT,
                        pass_fds=(theirs, *launch.pass_fds),
                        start_new_session=True,
                        **launch.popen,
                    )
                except OSError as error:
                    raise InfraError(
                        f"the sandbox could not be started: {error}", kind="sandbox_start"
                    ) from error
                finally:
                    os.close(theirs)
                if self.cancelled.is_set():
                    self.kill()
                return self._watch(stdin, ours)
        finally:
            self.kill()
            os.close(ours)

    def _watch(self, stdin: bytes, channel: int) -> RawRun:
        """Feed and read until the process ends or must be ended."""
        process, limits = self.process, self.job.limits
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        caps = {
            process.stdout.fileno(): limits.output_kb * 1024,
            process.stderr.fileno(): limits.stderr_kb * 1024,
            channel: MAX_CHANNEL_BYTES,
        }
        got: dict[int, bytearray] = {fd: bytearray() for fd in caps}
        limit: Limit | None = None
        start = time.monotonic()
        deadline = start + limits.wall_s
        ended: tuple[int, Any] | None = None
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            stack.callback(process.stdin.close)
            stack.callback(process.stdout.close)
            stack.callback(process.stderr.close)
            for fd in caps:
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            os.set_blocking(process.stdin.fileno(), False)
            unsent = memoryview(stdin)
            if stdin:
                selector.register(process.stdin.fileno(), selectors.EVENT_WRITE)
            else:
                process.stdin.close()
            while True:
                # A pidfd would tell of the end at once; Python 3.11 on old kernels has none, and
                # what ends a run is nearly always the end of its output.
                pause = 0.02 if selector.get_map() else 0.002
                for key, _ in selector.select(max(0.0, min(pause, deadline - time.monotonic()))):
                    fd = key.fd
                    if fd in caps:
                        room = caps[fd] + 1 - len(got[fd])
                        data = _read(fd)
                        if data == b"":
                            selector.unregister(fd)
                        got[fd] += (data or b"")[: max(0, room)]
                        if fd == process.stdout.fileno() and len(got[fd]) > caps[fd]:
                            limit = "output"
                    else:
                        unsent = _write(fd, unsent)
                        if not unsent:
                            selector.unregister(fd)
                            process.stdin.close()
                if ended is None:
                    ended = _reap(process)
                    if ended is not None:
                        deadline = min(deadline, time.monotonic() + GRACE_S)
                if limit == "output" or (ended is None and time.monotonic() >= deadline):
                    limit = limit or "time"
                    break
                readable = any(fd in caps for fd in (k.fd for k in selector.get_map().values()))
                if ended is not None and (not readable or time.monotonic() >= deadline):
                    break
            self._kill_group(process)
            if ended is None:
                ended = _reap(process, wait=True)
        assert ended is not None
        status, usage = ended
        stdout, stderr, messages = got.values()
        wall_s = time.monotonic() - start
        return self._result(stdout, stderr, messages, status, usage, limit, wall_s)

    @staticmethod
    def _kill_group(process: subprocess.Popen[bytes]) -> None:
        # The group outlives its leader when the program left something behind.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def _result(
        self,
        stdout: bytearray,
        stderr: bytearray,
        channel: bytearray,
        status: int,
        usage: Any,
        limit: Limit | None,
        wall_s: float,
    ) -> RawRun:
        limits = self.job.limits
        messages = list(_messages(bytes(channel)))
        code = os.waitstatus_to_exitcode(status)
        # bwrap reports a signal of its child as 128 + number.
        killed = -code if code < 0 else code - 128 if code > 128 else None
        if not any("hello" in m for m in messages):
            if limit == "time" or self.cancelled.is_set():
                why = f"it did not start within {limits.wall_s:g} s"
            else:
                said = bytes(stderr[-500:]).decode(errors="replace").strip()
                why = f"it ended with {code} before the program began: {said or 'no message'}"
            raise InfraError(f"the sandbox failed: {why}", kind="sandbox_died")
        # Of a process in its own pid namespace the kernel tells us nothing; the runner does.
        reported = [m["cpu"] for m in messages if isinstance(m.get("cpu"), float)]
        cpu_s = max(usage.ru_utime + usage.ru_stime, *reported, 0.0)
        out_of_time = killed == signal.SIGKILL and wall_s >= _rlimits(limits)["cpu"]
        if limit is None and (killed == signal.SIGXCPU or out_of_time):
            limit = "time"
        error = next((m for m in messages if "error" in m), None)
        result = next((m for m in messages if "result" in m), None)
        return RawRun(
            exit_code=None if killed else code,
            signal=killed,
            stdout=bytes(stdout[: limits.output_kb * 1024]),
            stderr=bytes(stderr[: limits.stderr_kb * 1024]),
            result=MISSING if result is None else _decode(result["result"]),
            error=None if error is None else _program_error(error["error"]),
            compile_error=error is not None and error.get("compile") is True,
            limit=limit,
            cpu_s=cpu_s,
            wall_s=wall_s,
        )


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "cpu": math.ceil(limits.cpu_s),
        "memory_mb": limits.memory_mb,
        "file_mb": limits.file_mb,
        "open_files": limits.open_files,
        "processes": limits.processes,
    }


def _read(fd: int) -> bytes | None:
    """What is there to read; empty at the end, None if there is nothing yet."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None


def _write(fd: int, data: memoryview) -> memoryview:
    try:
        return data[os.write(fd, data) :]
    except BlockingIOError:
        return data
    except OSError:  # the program closed its input: it has what it wants
        return data[len(data) :]


def _reap(process: subprocess.Popen[bytes], *, wait: bool = False) -> tuple[int, Any] | None:
    """Status and resource usage of the ended process, or None while it runs."""
    pid, status, usage = os.wait4(process.pid, 0 if wait else os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return status, usage


def _messages(data: bytes) -> Iterator[dict[str, Any]]:
    """The well-formed messages on the channel; anything else is the program's noise."""
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(line)
            if isinstance(message, dict):
                yield message


def _decode(value: Any) -> Any:
    """The value that the runner's ``encode`` wrote; forged nonsense becomes MISSING."""
    if not isinstance(value, dict):
        return value if value is None or isinstance(value, (bool, int, str)) else MISSING
    if len(value) != 1:
        return MISSING
    ((kind, inner),) = value.items()
    try:
        if kind == "float":
            return float(inner)
        items = [_decode(v) for v in inner] if kind != "dict" else []
        if kind == "list":
            return items
        if kind == "tuple":
            return tuple(items)
        if kind in ("set", "frozenset"):
            return set(items)
        if kind == "dict":
            return {_decode(k): _decode(v) for k, v in inner}
    except (TypeError, ValueError, OverflowError, RecursionError):
        return MISSING
    return MISSING


def _program_error(about: Any) -> ProgramError:
    """The error a program reports, every field checked: it may be forged."""
    about = about if isinstance(about, dict) else {}
    frames = []
    given = about.get("frames")
    for frame in given if isinstance(given, list) else ():
        if isinstance(frame, list) and len(frame) == 2 and isinstance(frame[0], int):
            frames.append((frame[0], str(frame[1])[:100]))
    line, column = about.get("line"), about.get("column")
    if not isinstance(line, int) or not 0 < line < 10**6:
        line = frames[-1][0] if frames else None
    return ProgramError(
        type=str(about.get("type", "Error"))[:100],
        message=str(about.get("message", ""))[:2000],
        frames=tuple(frames[:20]),
        line=line,
        column=column if isinstance(column, int) else None,
    )
