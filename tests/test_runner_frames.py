"""Whatever arrives in place of a runner's frames: a failure of the machinery, never a verdict."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrf import InfraError, run_sync
from rlrf.sandbox import (
    MISSING,
    CallCase,
    Job,
    Limits,
    Program,
    RawRun,
    StdinCase,
    Verdict,
    start_sandbox,
)
from rlrf_sandboxes import runner
from rlrf_sandboxes.docker import _bridge, _Container, _Demultiplexer
from rlrf_sandboxes.slot import (
    Link,
    Settings,
    Slot,
    _message,
    _raw_run,
    pack,
    program_error,
    runner_hash,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
GOOD = {
    "op": "result",
    "index": 0,
    "status": 0,
    "stdout": "ok",
    "stderr": "",
    "message": "",
    "limit": None,
    "starved": False,
    "cpu": 0.01,
    "wall": 0.01,
    "rss": 1,
}


async def answered(reply, *, hello=True):
    """A slot whose other side answers a program with ``reply(nonce) -> bytes`` and hangs up."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()

    async def end():
        theirs.close()

    async def launch():
        return Link(ours, end)

    async def play():
        buffer = bytearray()
        while True:
            buffer += await loop.sock_recv(theirs, 1 << 16)
            while len(buffer) >= 4 + int.from_bytes(buffer[:4], "big"):
                size = int.from_bytes(buffer[:4], "big")
                frame = json.loads(bytes(buffer[4 : 4 + size]))
                del buffer[: 4 + size]
                if frame["op"] == "hello":
                    about = {"runner": runner_hash(), "seccomp": True}
                    data = pack({"op": "hello", "nonce": frame["nonce"], **about})
                else:
                    data = reply(frame["nonce"])
                await loop.sock_sendall(theirs, data)
                if frame["op"] != "hello":
                    theirs.shutdown(socket.SHUT_WR)
                    return

    player = asyncio.ensure_future(play())
    slot = Slot(launch, Settings("plain"))
    await slot.start()
    got = []
    try:
        async for raw in slot.execute(Job(Program("x"), ("",), Limits())):
            got.append(raw)
    finally:
        player.cancel()
        await slot.aclose()
    return got


def test_the_stand_in_is_believed_when_it_does_it_right():
    def reply(nonce):
        return pack({**GOOD, "nonce": nonce}) + pack({"op": "done", "nonce": nonce})

    (raw,) = asyncio.run(answered(reply))
    assert raw.stdout == b"ok"


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=64))
def test_bytes_that_are_no_frames(data):
    with pytest.raises(InfraError):
        asyncio.run(answered(lambda nonce: data))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(GOOD)), json_values)
def test_frames_with_a_wrong_field(field, value):
    def reply(nonce):
        frame = {**GOOD, "nonce": nonce, field: value}
        return pack(frame) + pack({"op": "done", "nonce": nonce})

    try:
        runs = asyncio.run(answered(reply))
    except InfraError:
        return
    # Believed, so every field must have its type.
    (raw,) = runs
    assert type(raw) is RawRun
    assert isinstance(raw.stdout, bytes)
    assert raw.limit in (None, "time", "memory", "output")
    assert (raw.exit_code is None) != (raw.signal is None)
    assert raw.cpu_s == raw.cpu_s < float("inf")


@pytest.mark.parametrize(
    "reply",
    [
        lambda nonce: pack({**GOOD, "nonce": "another"}),
        lambda nonce: pack({"op": "done", "nonce": nonce}),
        lambda nonce: pack({"op": "broken", "nonce": nonce, "why": "x"}),
        lambda nonce: pack({**GOOD, "nonce": nonce}),  # and no `done`
        lambda nonce: b"\xff\xff\xff\xff",
        lambda nonce: b"\x00\x00\x00\x02[]",
        lambda nonce: (100_000).to_bytes(4, "big") + b"[" * 100_000,
    ],
)
def test_answers_to_something_else_and_half_answers(reply):
    with pytest.raises(InfraError, match="the sandbox failed"):
        asyncio.run(answered(reply))


@settings(max_examples=300, deadline=None)
@given(
    st.binary() | json_values.map(lambda v: json.dumps(v).encode()),
    st.sampled_from([0, 1 << 8, 255 << 8, 9, 11 | 128]),
)
def test_what_a_program_leaves_on_its_channel(data, status):
    frame = {**GOOD, "message": data.decode("latin-1"), "status": status}
    raw = _raw_run(frame, "call")
    assert raw.error is None or isinstance(raw.error.message, str)
    assert raw.result is MISSING or raw.exit_code == 0


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_errors_that_a_program_reports(value):
    keys = ("type", "message", "frames", "line", "column")
    for key in keys:
        error = program_error({key: value})
        assert error.line is None or 0 < error.line < 10**6
        assert error.column is None or 0 < error.column < 10**6
        assert len(error.frames) <= 20
    assert isinstance(_message(json.dumps(value)), dict)


builtin_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=4)
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
        | st.sets(st.integers() | st.text(), max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(builtin_values)
def test_values_come_back_as_they_went(value):
    back = runner.decode(json.loads(json.dumps(runner.encode(value))))
    assert back == value
    assert type(back) is type(value)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_values_that_are_forged_decode_or_are_refused(value):
    with contextlib.suppress(ValueError):
        runner.decode(value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=50))), st.data())
def test_dockers_framing_comes_off_however_it_is_cut(pieces, data):
    class Container:
        errors = bytearray()

    container = Container()
    container.errors = bytearray()
    take = _Demultiplexer(container)
    stream = b"".join(bytes([n, 0, 0, 0]) + len(p).to_bytes(4, "big") + p for n, p in pieces)
    out = b""
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        out += take(stream[:cut])
        stream = stream[cut:]
    assert out == b"".join(p for n, p in pieces if n == 1)
    assert container.errors == b"".join(p for n, p in pieces if n == 2)[-4000:]


def test_the_runner_needs_no_more_than_python_3_8():
    source = Path(runner.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert imported <= sys.stdlib_module_names
    newer = ("removeprefix", "waitstatus_to_exitcode", "pidfd_open", "is_relative_to", "strict=")
    assert not [name for name in newer if name in source]


def test_a_stream_that_is_no_plain_socket_is_bridged():
    near, far = socket.socketpair()

    class Tls:  # what docker's SDK gives for a daemon behind TLS: the methods, not the descriptor
        recv, sendall, shutdown = near.recv, near.sendall, near.shutdown

    closed = threading.Event()
    bridged = _bridge(Tls(), closed.set)
    bridged.sendall(b"there")
    assert far.recv(5) == b"there"
    far.sendall(b"back")
    assert bridged.recv(4) == b"back"
    far.close()
    assert bridged.recv(1) == b""
    bridged.close()
    assert closed.wait(10)  # by its owner, not by chance
    near.close()


def test_the_response_that_a_line_came_in_is_closed_by_its_owner():
    """Else it complains when it is collected: what it reads from was closed before it."""
    near, far = socket.socketpair()

    class Response:
        closed = False

        def close(self):
            self.closed = True
            near.close()

    class Stream:  # as the SDK hands it out
        _sock, _response = near, Response()

    class Client:
        def attach_socket(self, name, params):
            return Stream()

    container = _Container()
    container.client = Client()
    container.attach()
    assert Stream._response.closed
    container.sock.send(b"still there")
    assert far.recv(11) == b"still there"
    container.hang_up()
    assert far.recv(1) == b""
    far.close()


# --- from inside ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    made = run_sync(start_sandbox("process", slots=1, allow_unsafe=True))
    yield made
    run_sync(made.aclose())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()), st.booleans())
def test_a_program_that_writes_to_everything_it_can_reach(pool, data, leave):
    code = f"""
import os
for fd in range(3, 64):
    try:
        os.write(fd, {data!r})
        os.pwrite(fd, {data!r}, 0)
    except OSError:
        pass
{"os._exit(0)" if leave else ""}
def f():
    return 1
"""
    limits = Limits(cpu_s=1, wall_s=5, memory_mb=256)
    report = pool.run_sync(Program(code, "f"), [CallCase((), "right")], limits=limits)
    assert report.verdict in (Verdict.WRONG_ANSWER, Verdict.RUNTIME_ERROR, Verdict.MEMORY_LIMIT)
    healthy = pool.run_sync(Program("print('ok')"), [StdinCase("", "ok")], limits=limits)
    assert healthy.verdict is Verdict.ACCEPTED
    assert pool.stats().replaced == 0


def test_a_syntax_error_is_told_though_its_leader_ended_before_it_was_heard(monkeypatch):
    supervisor = object.__new__(runner.Supervisor)
    monkeypatch.setattr(supervisor, "sweep", lambda outcome: None, raising=False)
    monkeypatch.setattr(supervisor, "forget_leader", lambda: None, raising=False)
    channel = os.memfd_create("channel")
    os.write(channel, b'{"error": {"type": "SyntaxError"}}')
    supervisor.files = [channel]
    outcome = {"kind": "X", "status": 0, "cpu": 0.0}
    assert "SyntaxError" in supervisor.not_compiled(outcome)["message"]
    # Of a compiler that crashed, what is on the channel is not believed.
    assert supervisor.not_compiled({**outcome, "status": 11})["message"] == ""
    os.close(channel)
