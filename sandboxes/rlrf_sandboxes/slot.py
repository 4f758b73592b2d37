"""The host's side of one sandbox: frames to and from a resident runner.

Every backend is this, over a link of its own (:class:`Launch`). Nothing that comes out is trusted:
frames are JSON, checked field by field; what does not fit ends the slot as an
:class:`rlrf.InfraError`, never as a verdict.

It does not judge what comes out, and does not try again: the pool throws a slot that failed away.

Why: design/verdicts.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import socket
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlrf._async import call_hook
from rlrf.errors import InfraError, UsageError
from rlrf.sandbox import MISSING, AssertCase, Job, Limit, Program, ProgramError, RawRun
from rlrf_sandboxes import runner, values

T = TypeVar("T")
RUNNER = Path(runner.__file__)
PYTHON_FLAGS = runner.FLAGS
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of sets must not differ between runs
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "MALLOC_ARENA_MAX": "2",  # each is 64 MB of address space, which is what is limited
    "OMP_NUM_THREADS": "1",  # OpenBLAS would take an address space of its own per core
    "OPENBLAS_NUM_THREADS": "1",
}
START_S = 30.0
GRACE_S = 15.0
"""How long the runner may be silent beyond the limits before it counts as broken."""
QUICK_BYTES = 4096
"""What is read on the event loop itself, where everybody waits for it."""
WINDOW_BYTES = 256 * 1024
"""Inputs sent ahead of their results, so that the runner never waits for us."""


@functools.cache
def runner_hash() -> str:
    """SHA-256 of the runner this version brings."""
    return hashlib.sha256(RUNNER.read_bytes()).hexdigest()


_lines: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_forks = 0


def not_for_children(line: socket.socket) -> None:
    """Close a line to a runner in children that this process forks.

    A runner ends when its line does, and so whatever becomes of this process; unless a child has
    the other copy of it.
    """
    _lines.add(line)


def forks() -> int:
    """How often this process has forked so far."""
    return _forks


def _count_fork() -> None:
    global _forks
    _forks += 1


def _close_lines() -> None:
    for line in list(_lines):
        with contextlib.suppress(OSError):
            line.close()  # no `shutdown`: the line itself is the parent's


os.register_at_fork(after_in_parent=_count_fork, after_in_child=_close_lines)


class Link:
    """A byte stream to a runner, and the end of whatever it runs in.

    Args:
        sock: non-blocking.
        end: ends the process or container and waits for its end.
        strip: takes the transport's framing off what was received; None for none.
        last_words: what the other side wrote to its standard error, for messages.
    """

    def __init__(
        self,
        sock: socket.socket,
        end: Callable[[], Awaitable[None]],
        *,
        strip: Callable[[bytes], bytes] | None = None,
        last_words: Callable[[], str] = str,
    ) -> None:
        not_for_children(sock)
        self.sock, self.last_words = sock, last_words
        self._end, self._strip = end, strip
        self._buffer = bytearray()

    async def send(self, frame: bytes) -> None:
        """Send one or more frames as made by :func:`pack`."""
        await asyncio.get_running_loop().sock_sendall(self.sock, frame)

    async def receive(self) -> dict[str, Any]:
        """The next frame.

        Raises:
            EOFError: the other side has ended.
            ValueError: what came is no frame.
        """
        loop = asyncio.get_running_loop()
        while (found := self._next()) is None:
            data = await loop.sock_recv(self.sock, 1 << 18)
            if not data:
                raise EOFError
            self._buffer += self._strip(data) if self._strip else data
        frame = await _off_the_loop(len(found), values.read_json, found)
        if not isinstance(frame, dict):
            raise ValueError("a frame that is no object")
        return frame

    def _next(self) -> bytes | None:
        if len(self._buffer) < 4:
            return None
        size = int.from_bytes(self._buffer[:4], "big")
        if size > runner.MAX_FRAME:
            raise ValueError(f"a frame of {size} bytes")
        if len(self._buffer) < 4 + size:
            return None
        data = bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        return data

    async def aclose(self) -> None:
        """Hang up, which ends the runner and all that is in it, and see that it has ended."""
        # Shut down first and closed last: who still waits for a frame must hear of the end.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        try:
            await self._end()
        finally:
            self.sock.close()


async def _off_the_loop(size: int, function: Callable[..., T], *args: Any) -> T:
    """Work on what a program gave: in a thread, unless it is so little that a thread costs more."""
    if size <= QUICK_BYTES:
        return function(*args)
    result: T = await call_hook(function, *args)
    return result


Launch = Callable[[], Awaitable[Link]]


def pack(frame: dict[str, Any]) -> bytes:
    """A frame as bytes."""
    data = json.dumps(frame, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    if len(data) > runner.MAX_FRAME:
        raise UsageError(
            f"a program or test of {len(data) >> 20} MiB is too large; the most is "
            f"{runner.MAX_FRAME >> 20} MiB"
        )
    return len(data).to_bytes(4, "big") + data


@dataclass(frozen=True)
class Settings:
    """How a runner keeps programs apart; see :mod:`rlrf_sandboxes.runner`."""

    mode: Literal["uid", "ns", "plain"]
    tmp_mb: int = 64
    inodes: int = 4096


class Slot:
    """One resident runner: runs one program at a time.

    Args:
        launch: starts what the runner lives in.
        settings: how programs are kept apart.
    """

    def __init__(self, launch: Launch, settings: Settings) -> None:
        self._launch, self._settings = launch, settings
        self._link: Link | None = None
        self._judge: Slot | None = None  # runs assert scripts, far from the program
        self._ending: asyncio.Future[None] | None = None
        self.warnings: tuple[str, ...] = ()

    async def start(self) -> None:
        """Launch the runner and hear it answer.

        Raises:
            InfraError: it does not.
        """
        self._ending = None
        self._link = await self._launch()
        try:
            hello = await self._hello(START_S)
        except BaseException:
            await self.aclose()
            raise
        if hello.get("runner") != runner_hash():
            await self.aclose()
            raise InfraError(
                "the runner in the sandbox is not this version's; rebuild the image with "
                "`rlrf sandbox build` or `rlrf sandbox import --from-host`",
                kind="sandbox_outdated",
                retryable=False,
            )
        if hello.get("seccomp") is not True:
            self.warnings = ("no system-call filter for this processor",)
        if hello.get("landlock") is not True:
            self.warnings += (
                "the kernel of the containers has no Landlock (5.19 or later, and docker 23 or "
                "later lets it through): a program can undo that it is the first to go when "
                "memory is short, and read the container's accounting",
            )

    async def ping(self) -> None:
        """Hear the runner answer.

        Raises:
            InfraError: it does not.
        """
        await self._hello(GRACE_S)

    async def _hello(self, timeout: float) -> dict[str, Any]:
        nonce = secrets.token_hex(8)
        settings = {f.name: getattr(self._settings, f.name) for f in fields(self._settings)}
        with self._trouble():
            async with asyncio.timeout(timeout):
                await self._connected.send(pack({"op": "hello", "nonce": nonce, **settings}))
                frame = await self._connected.receive()
            if frame.get("op") != "hello" or frame.get("nonce") != nonce:
                raise ValueError("an answer to something else")
            return frame

    @property
    def _connected(self) -> Link:
        if self._link is None:
            raise InfraError("the sandbox is not running", kind="sandbox_closed")
        return self._link

    @contextlib.contextmanager
    def _trouble(self) -> Any:
        """Whatever goes wrong on the line is the machinery's fault."""
        try:
            yield
        except UsageError:
            raise
        except (
            EOFError,
            OSError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            RecursionError,
        ) as error:
            said = self._link.last_words().strip()[-500:] if self._link is not None else ""
            why = {EOFError: "it ended", TimeoutError: "it does not answer"}.get(type(error))
            raise InfraError(
                f"the sandbox failed: {why or error or type(error).__name__}"
                + (f"; it said: {said}" if said else ""),
                kind="sandbox_died",
            ) from error

    async def aclose(self) -> None:
        """End the runner; goes on when cancelled, and can be waited for again."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        await asyncio.shield(self._ending)

    async def _end(self) -> None:
        link, self._link = self._link, None
        judge, self._judge = self._judge, None
        try:
            if judge is not None:
                await judge.aclose()
        finally:
            if link is not None:
                await link.aclose()

    # --- programs -----------------------------------------------------------------------------

    def execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """See :class:`rlrf.sandbox.Sandbox`."""
        if job.inputs and isinstance(job.inputs[0], AssertCase):
            return self._execute_asserts(job)
        return self._execute(job)

    async def _execute(self, job: Job) -> AsyncGenerator[RawRun, None]:
        called = job.program.entry is not None
        inputs = [_input(i, called) for i in job.inputs]
        async with self._session(job, "call" if called else "stdin") as session:
            sent = received = ahead = 0
            while received < len(inputs):
                frames = []
                while sent < len(inputs) and (
                    ahead + len(inputs[sent]) <= WINDOW_BYTES or sent <= received + 1
                ):
                    ahead += len(inputs[sent])
                    frames.append(session.case(inputs[sent], last=sent == len(inputs) - 1))
                    sent += 1
                raw = await session.result(b"".join(frames))
                yield raw
                ahead -= len(inputs[received])
                received += 1
                if session.ended:
                    return

    async def _execute_asserts(self, job: Job) -> AsyncGenerator[RawRun, None]:
        """The program serves calls here; the asserts make them in a sandbox beside this one."""
        for case in job.inputs:
            assert isinstance(case, AssertCase)
            if self._judge is None:
                judge = Slot(self._launch, self._settings)
                await judge.start()
                self._judge = judge
            script = Job(_script(case, job), (), job.limits)
            async with (
                self._session(job, "serve") as program,
                self._judge._session(script, "script") as judging,
            ):
                yield await _converse(program, judging)

    @contextlib.asynccontextmanager
    async def _session(self, job: Job, kind: str) -> AsyncIterator[_Session]:
        """A program in the runner, until it and its leavings are gone."""
        session = _Session(self._connected, job, kind)
        with self._trouble():
            try:
                yield session
            except GeneratorExit:
                await session.finish()  # the caller has seen enough
                raise
            except UsageError:
                await session.finish()
                raise
            else:
                await session.finish()


class _Session:
    """One program in a runner, from its first frame to ``done``."""

    def __init__(self, link: Link, job: Job, kind: str) -> None:
        self.link, self.job, self.kind = link, job, kind
        self.nonce = secrets.token_hex(8)
        limits = {f.name: getattr(job.limits, f.name) for f in fields(job.limits)}
        self._opening = pack(
            {
                "op": "run",
                "nonce": self.nonce,
                "code": job.program.code,
                "prelude": job.program.prelude,
                "entry": job.program.entry or "",
                "kind": kind,
                "limits": limits,
            }
        )
        self.over = self.ended = self._begun = False
        limit = job.limits
        self._patience = limit.wall_s + 3 * limit.compile_s + GRACE_S

    def case(self, text: str, *, last: bool) -> bytes:
        """The frame for one more test."""
        return pack({"op": "case", "nonce": self.nonce, "input": text, "last": last})

    async def send(self, frames: bytes) -> None:
        """Send frames, before the first ones the program."""
        if not self._begun:
            frames, self._begun = self._opening + frames, True
        if frames:
            async with asyncio.timeout(self._patience):
                await self.link.send(frames)

    async def receive(self) -> dict[str, Any]:
        """The next frame of this program."""
        async with asyncio.timeout(self._patience):
            frame = await self.link.receive()
        if frame.get("nonce") != self.nonce:
            raise ValueError("an answer to something else")
        if frame["op"] == "broken":
            raise ValueError(str(frame.get("why"))[:200])
        if frame["op"] == "done":
            self.over = True
        return frame

    async def result(self, frames: bytes) -> RawRun:
        """Send frames and wait for the next result."""
        await self.send(frames)
        while True:
            frame = await self.receive()
            if frame["op"] == "result":
                raw = await _read(frame, self.kind)
                # Nothing comes after these: the runner has stopped by itself.
                self.ended = bool(frame.get("compile") or frame["limit"])
                return raw
            if self.over:
                raise ValueError("a result is missing")

    async def rpc(self, data: str, *, end: bool = False) -> None:
        """Pass on a part of a conversation."""
        await self.send(pack({"op": "rpc", "nonce": self.nonce, "data": data, "end": end}))

    async def stop(self) -> None:
        """Ask for the end; whatever it gives until then has to be taken still."""
        await self.send(pack({"op": "stop", "nonce": self.nonce}))

    async def finish(self) -> None:
        """Stop what still runs, and wait until all is clean."""
        if not self._begun or self.over:
            return
        await self.stop()
        while not self.over:
            await self.receive()


_LAST_REPLY = 1 << 16


class _Replies:
    """What a program answers to the asserts' calls, of which only the last whole line is read."""

    def __init__(self) -> None:
        self.last = self._begun = ""
        self._allowed = 64

    def asked(self, data: str) -> None:
        """There were calls, so there will be answers."""
        self._allowed += 16 * data.count("\n")

    def add(self, data: str) -> bool:
        """Take a piece; False if they are too many: each costs the host more than the program."""
        done, end, begun = data.rpartition("\n")
        if end:
            self.last = (self._begun + done).rpartition("\n")[2][-_LAST_REPLY:]
            self._begun = ""
        if len(self._begun) <= _LAST_REPLY:
            self._begun += begun
        self._allowed += (len(data) >> 12) - 1
        return self._allowed >= 0


async def _converse(program: _Session, judging: _Session) -> RawRun:
    """Let the asserts call the program; what came of it."""
    await program.send(program.case("", last=True))
    await judging.send(judging.case("", last=True))
    pending = {
        asyncio.ensure_future(program.receive()): program,
        asyncio.ensure_future(judging.receive()): judging,
    }
    results: dict[_Session, dict[str, Any]] = {}
    replies, flooded = _Replies(), False
    try:
        while pending:
            ready, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in ready:
                mine = pending.pop(task)
                frame = task.result()
                other = judging if mine is program else program
                if frame["op"] == "rpc" and not flooded:
                    data = str(frame["data"])
                    if mine is judging:
                        replies.asked(data)
                    elif not replies.add(data):
                        flooded = True
                        await program.stop()
                        data = ""
                    if not other.over and other not in results:
                        await other.rpc(data, end=flooded)
                elif frame["op"] == "result":
                    results[mine] = frame
                    if other not in results:  # nobody is there any more to talk with
                        await other.rpc("", end=True)
                if not mine.over:
                    pending[asyncio.ensure_future(mine.receive())] = mine
    finally:
        for task in pending:
            task.cancel()
    if flooded:
        return RawRun(limit="output")
    raw = await _read(results[program], "serve")
    judged = await _read(results[judging], "script")
    if judged.compile_error:
        raise UsageError(f"the asserts do not compile: {judged.error}")
    passed = judged.exit_code == 0 and judged.error is None and judged.limit is None
    assertion = judged.error or ProgramError("RuntimeError", "the asserts did not come to an end")
    last_reply = _message(replies.last).get("error")
    raised = None
    if isinstance(last_reply, dict) and not passed and assertion.type != "AssertionError":
        raised = program_error(last_reply)  # the asserts fell over what the program had raised
    return RawRun(
        exit_code=raw.exit_code,
        signal=raw.signal,
        stdout=raw.stdout,
        stderr=raw.stderr,
        result=True if passed else MISSING,
        error=raw.error or raised,
        compile_error=raw.compile_error,
        limit=raw.limit or judged.limit,
        assertion=None if passed else assertion,
        starved=raw.starved or judged.starved,
        cpu_s=raw.cpu_s,
        wall_s=raw.wall_s,
        max_rss_kb=raw.max_rss_kb,
    )


def _script(case: AssertCase, job: Job) -> Program:
    code = f"{case.setup}\n{case.code}" if case.setup else case.code
    return Program(code, entry=job.program.entry or "candidate")


def _input(value: Any, called: bool) -> str:
    """What travels of a test: bytes as Latin-1, values as the runner's JSON."""
    if not called:
        return str(value).encode("utf-8", "replace").decode("latin-1")
    try:
        return json.dumps(runner.encode(list(value)))
    except TypeError as error:
        raise UsageError(f"the arguments {value!r:.200} cannot be sent: {error}") from error


async def _read(frame: dict[str, Any], kind: str) -> RawRun:
    size = sum(len(v) for v in frame.values() if isinstance(v, str))
    return await _off_the_loop(size, _raw_run, frame, kind)


def _raw_run(frame: dict[str, Any], kind: str) -> RawRun:
    """A result frame, every field checked.

    Raises:
        ValueError, TypeError, KeyError: it is no such frame.
    """
    status, said = int(frame["status"]), _message(frame["message"])
    exit_code = os.waitstatus_to_exitcode(status)
    limit: Limit | None = None
    if frame["limit"] is not None:
        limit = {"time": "time", "memory": "memory", "output": "output"}[frame["limit"]]  # type: ignore[assignment]  # a Literal by any other name
    error = None
    about = said.get("error")
    if isinstance(about, dict) and limit is None:
        error = program_error(about)
        if about.get("memory") is True:
            limit = "memory"
        elif about.get("output") is True or _number(about.get("length")) > 1 << 20:
            limit = "output"
    compile_error = frame.get("compile") is True and limit is None
    if compile_error and error is None and limit is None:
        error = ProgramError("SystemError", "the compiler crashed")
    result: Any = MISSING
    if kind == "call" and exit_code == 0 and "result" in said:
        with contextlib.suppress(ValueError):
            result = values.decode(said["result"])
    return RawRun(
        exit_code=exit_code if exit_code >= 0 else None,
        signal=-exit_code if exit_code < 0 else None,
        stdout=str(frame["stdout"]).encode("latin-1"),
        stderr=str(frame["stderr"]).encode("latin-1"),
        result=result,
        error=error,
        compile_error=compile_error,
        limit=limit,
        starved=frame["starved"] is True,
        cpu_s=_seconds(frame["cpu"]),
        wall_s=_seconds(frame["wall"]),
        max_rss_kb=int(frame["rss"]),
    )


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(f"a time of {seconds} s")
    return seconds


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _message(text: Any) -> dict[str, Any]:
    """What the program's own process left on its channel: anything at all, so far as we know."""
    if not text:
        return {}
    with contextlib.suppress(ValueError):
        message = values.read_json(str(text).encode("latin-1"))
        if isinstance(message, dict):
            return message
    return {}


def program_error(about: dict[str, Any]) -> ProgramError:
    """The error a program reports, every field checked: it may be forged."""
    frames = []
    given = about.get("frames")
    for place in given if isinstance(given, list) else ():
        if isinstance(place, list) and len(place) == 2 and _is_line(place[0]):
            frames.append((place[0], _text(place[1], 100)))
    line, column = about.get("line"), about.get("column")
    return ProgramError(
        type=_text(about.get("type"), 100) or "Error",
        message=_text(about.get("message", ""), 2000),
        frames=tuple(frames[:20]),
        line=line if _is_line(line) else frames[-1][0] if frames else None,
        column=column if _is_line(column) else None,
    )


def _text(value: Any, chars: int) -> str:
    """Text that every encoder takes; what is no text is none."""
    text = value if isinstance(value, str) else ""
    return text[:chars].encode("utf-8", "replace").decode()


def _is_line(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**6
