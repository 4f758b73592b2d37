"""What a program may say of itself is read at linear cost, and not on the event loop."""

# ruff: noqa: UP031  # JSON is full of braces

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time

import pytest
from hypothesis import given, settings

from rlrf import run_sync
from rlrf.sandbox import (
    MISSING,
    AssertCase,
    CallCase,
    Job,
    Limits,
    Program,
    Verdict,
    start_sandbox,
)
from rlrf_sandboxes import runner, slot, values
from rlrf_sandboxes.slot import _raw_run, _Replies
from tests.test_runner_frames import GOOD, builtin_values, json_values

SIZE = 1 << 18
P = 2**61 - 1
"""The hash of a number is its remainder by this."""


def many(item, size=SIZE):
    """Items, different each, that fill so many characters."""
    out, length, i = [], 0, 0
    while length < size:
        i += 1
        out.append(item(i))
        length += len(out[-1]) + 1
    return ",".join(out)


def of(kind, item):
    """A container of many items that hash alike."""
    return '{"%s":[%s]}' % (kind, many(item))


def hexadecimal(i):
    return '{"int":"%x"}' % (i * P)


def one(kind):
    return lambda i: '{"%s":[%d]}' % (kind, i * P)


HOSTILE = {
    "set": lambda: of("set", hexadecimal),
    "set of decimals": lambda: of("set", lambda i: str(i * P)),
    "negative": lambda: of("set", lambda i: str(-i * P - 1)),
    "frozenset": lambda: of("frozenset", hexadecimal),
    "dict": lambda: of("dict", lambda i: f"[{i * P},0]"),
    "complex": lambda: of("set", lambda i: '{"complex":["%d","%d"]}' % (1000003 * i, -i)),
    "tuples": lambda: of("set", one("tuple")),
    "frozensets": lambda: of("set", one("frozenset")),
    "alike but for the end": lambda: of("set", lambda i: '{"tuple":[%s%d]}' % ("1," * 500, i * P)),
    "many sets": lambda: of("list", lambda i: '{"set":[%s]}' % many(hexadecimal, 9999)),
    "a set as a key": lambda: '{"dict":[[{"tuple":[%s]},0]]}' % of("frozenset", hexadecimal),
    "digits": lambda: '{"list":[%s]}' % ("1" * SIZE),
    "float of digits": lambda: '{"float":"0.%s"}' % ("1" * SIZE),
    "half way": lambda: '{"float":"%d.%s1"}' % (2**53 + 1, "0" * SIZE),
    "exponent": lambda: '{"list":[1e%s]}' % ("1" * SIZE),
    "hexadecimal digits": lambda: '{"int":"%s"}' % ("f" * SIZE),
    "depth": lambda: '{"list":[' * (SIZE // 9),
    "brackets": lambda: "[" * SIZE,
    "open quotes": lambda: '"' + '\\"' * (SIZE // 2),
    "escapes": lambda: '"%s"' % ("\\ud800" * (SIZE // 6)),
    "keys": lambda: "{%s}" % many(lambda i: '"%d":0' % i),
    "characters": lambda: '{"list":"%s"}' % ("x" * SIZE),
}


def cpu_s(message):
    gc.disable()  # a collection goes through all objects of all tests so far
    try:
        start = time.thread_time()
        raw = _raw_run({**GOOD, "message": f'{{"result":{message}}}'}, "call")
        return time.thread_time() - start, raw
    finally:
        gc.enable()


@pytest.fixture
def digits(request):
    before = sys.get_int_max_str_digits()
    if request.param != "usual":
        sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(before)


def _limits(name):
    """With the usual limit of digits and without; that matters most where many digits are."""
    marks = (
        () if name in ("set of decimals", "digits", "half way", "exponent") else pytest.mark.slow
    )
    yield pytest.param(name, "usual", id=name)
    yield pytest.param(name, "none", id=f"{name}, no limit of digits", marks=marks)


@pytest.mark.parametrize(
    ("name", "digits"), [case for name in HOSTILE for case in _limits(name)], indirect=["digits"]
)
def test_the_worst_result_costs_what_an_honest_one_of_its_length_costs(name, digits):
    message = HOSTILE[name]()
    honest = '{"list":[%s]}' % many(lambda i: '{"tuple":[%d,"x"]}' % i, len(message))
    linear, raw = cpu_s(honest)
    assert raw.result[0] == (1, "x")
    worst, raw = cpu_s(message)
    assert worst < 5 * linear + 0.2
    if name in ("set", "dict", "tuples", "frozenset"):
        assert raw.result is MISSING  # given up, and so no answer


@pytest.mark.slow
def test_honest_sets_and_dicts_are_read_however_large():
    for value in (
        set(range(50_000)),
        {i * 0.37: i for i in range(8_000)},
        {(i, -i) for i in range(8_000)},
        {f"{i}" for i in range(8_000)},
        [{i, -i - 1, float(i) / 3} for i in range(2_000)],
        {frozenset({i, i + 1}): {i: {i}} for i in range(2_000)},
        {1.0, 2**61, P, -1, -2},
    ):
        text = json.dumps({"result": runner.encode(value)})
        back = _raw_run({**GOOD, "message": text}, "call").result
        assert back == value
        assert type(back) is type(value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(builtin_values)
def test_values_come_back_as_they_went(value):
    back = values.decode(values.read_json(json.dumps(runner.encode(value)).encode()))
    assert back == value
    assert type(back) is type(value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(json_values)
def test_values_that_are_forged_decode_or_are_refused(value):
    try:
        values.decode(value)
    except ValueError:
        return


def test_an_error_whose_parts_are_no_texts_is_still_the_programs_own():
    deep = "[" * 900 + "]" * 900
    for part in ("type", "message"):
        frame = {**GOOD, "message": f'{{"error":{{"{part}":{deep}}}}}', "status": 1 << 8}
        raw = _raw_run(frame, "call")
        assert (raw.error.type, raw.error.message) == ("Error", "")


# --- where it is done -----------------------------------------------------------------------

FORGE = """
import os
def f():
    text = {text}
    for fd in range(3, 64):
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, text, 0)
        except OSError:
            pass
    os._exit(0)
"""
COLLIDING = (
    'b\'{"result":{"set":[\' + b\',\'.join(b\'{"int":"%x"}\' % (i * (2**61 - 1))'
    " for i in range(1, 30000)) + b']}}'"
)


@pytest.fixture(scope="module")
def pool():
    made = run_sync(start_sandbox("process", slots=1, allow_unsafe=True))
    yield made
    run_sync(made.aclose())


def test_a_forged_result_does_not_hold_up_the_event_loop(pool, monkeypatch):
    seen = []
    real = values.read_json

    def noted(data):
        seen.append((len(data), threading.current_thread().name))
        return real(data)

    monkeypatch.setattr(values, "read_json", noted)
    limits = Limits(cpu_s=4, wall_s=30, memory_mb=512, output_kb=1024)
    before = time.process_time()
    report = pool.run_sync(
        Program(FORGE.format(text=COLLIDING), "f"), [CallCase((), {1})], limits=limits
    )
    assert time.process_time() - before < 3  # 20 s when all were put into the set
    assert report.verdict is Verdict.WRONG_ANSWER
    assert report.cases[0].raw.result is MISSING
    large = {thread for size, thread in seen if size > slot.QUICK_BYTES}
    assert large == {"rlrf-hook"}
    assert "rlrf-steady" in {thread for size, thread in seen if size <= slot.QUICK_BYTES}


def test_only_the_last_whole_answer_of_a_program_is_kept():
    replies = _Replies()
    replies.asked("call\n" * 100)
    for piece in ("first\nsec", "ond", "\nthird\nfou", "rth"):
        assert replies.add(piece)
    assert replies.last == "third"
    assert replies.add("x" * (1 << 20))
    assert replies.add("\n{}\n")
    assert replies.last == "{}"


def test_answers_in_crumbs_are_more_output_than_allowed(pool):
    code = """
import os
for fd in range(3, 64):
    try:
        for _ in range(10**5):
            os.write(fd, b"x")
    except OSError:
        pass
def f(x):
    return x
"""
    limits = Limits(cpu_s=4, wall_s=20, memory_mb=256)
    case = AssertCase("assert f(1) == 1")
    report = pool.run_sync(Program(code, "f"), [case], limits=limits)
    assert report.verdict in (Verdict.OUTPUT_LIMIT, Verdict.TIME_LIMIT)
    fine = Program("def f(x):\n    return 'y' * 300000 if x else x", "f")
    many = AssertCase("for i in range(300):\n    assert f(0) == 0\nassert len(f(1)) == 300000")
    report = pool.run_sync(fine, [many], limits=limits)
    assert report.verdict is Verdict.ACCEPTED
    assert pool.stats().replaced == 0


def test_a_flood_of_crumbs_is_cut_short(monkeypatch):
    """However many a program sends, the host handles a bounded number for each call."""

    async def go():
        asked, stopped = [], asyncio.Event()

        class Session:
            over = False

            def __init__(self, name, frames):
                self.name, self.frames = name, frames

            async def send(self, frames):
                pass

            def case(self, text, *, last):
                return b""

            async def receive(self):
                await asyncio.sleep(0)
                frame = next(self.frames)
                self.over = frame["op"] == "done"
                return frame

            async def rpc(self, data, *, end=False):
                asked.append((self.name, data, end))

            async def stop(self):
                stopped.set()

        def crumbs():
            while not stopped.is_set():
                yield {"op": "rpc", "data": "x"}
            yield {"op": "done"}

        def judging():
            yield {"op": "rpc", "data": "call\n"}
            while not stopped.is_set():
                yield {"op": "ping"}
            yield {**GOOD, "op": "result"}
            yield {"op": "done"}

        raw = await slot._converse(Session("program", crumbs()), Session("judge", judging()))
        assert raw.limit == "output"
        assert len(asked) < 200
        assert ("judge", "", True) in asked

    asyncio.run(go())


def test_a_job_is_no_place_for_answers():
    assert set(Job.__slots__) == {"program", "inputs", "limits"}
