"""Every hostile program gets the verdict it deserves and leaves the slot as it was."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from rlrf import InfraError, run_sync
from rlrf.sandbox import (
    CallCase,
    Lines,
    Program,
    RawRun,
    Returns,
    SandboxPool,
    StdinCase,
    Tokens,
    Verdict,
    start_sandbox,
)
from tests.backends import WALLED, options
from tests.hostile import (
    BRIEFLY,
    CONTROLS,
    HEALTHY,
    HOSTILE,
    LONGER,
    NEEDLE,
    PAIRS,
    SMALL,
    Pair,
    Row,
)
from tests.hostile_kernel import KERNEL_CONTROLS, KERNEL_HOSTILE, KERNEL_PAIRS

pytestmark = pytest.mark.slow  # 260 tests, on each of two sandboxes


@dataclass(frozen=True)
class Bait:
    """What programs on the host's side of the wall would find."""

    port: int
    abstract: str
    listeners: tuple[socket.socket, ...]


@pytest.fixture(scope="module")
def bait() -> Iterator[Bait]:
    """Listeners on the host, and the needle in its files and its environment."""
    tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    abstract = f"rlrf-hostile-{os.getpid()}"
    unix.bind("\0" + abstract)
    for listener in (tcp, unix):
        listener.listen()
        listener.setblocking(False)
    os.environ["RLRF_TEST_BAIT"] = NEEDLE
    with tempfile.NamedTemporaryFile("w", prefix="rlrf-bait-") as file:
        os.chmod(file.name, 0o644)
        file.write(NEEDLE)
        file.flush()
        yield Bait(tcp.getsockname()[1], abstract, (tcp, unix))
    del os.environ["RLRF_TEST_BAIT"]
    tcp.close()
    unix.close()


class Keeper:
    """One pool for many rows; a new one after a row that broke it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._options = options(backend)
        self._pool: SandboxPool | None = None

    @property
    def pool(self) -> SandboxPool:
        if self._pool is None:
            self._pool = run_sync(start_sandbox(self.backend, slots=1, **self._options))
        return self._pool

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            run_sync(pool.aclose())

    def run(self, code, cases, entry=None, limits=SMALL):
        try:
            return self.pool.run_sync(Program(code, entry), cases, limits=limits)
        except InfraError:
            self.close()  # this row fails; the next ones shall tell their own story
            raise


@pytest.fixture(scope="module", params=WALLED)
def keeper(request, bait) -> Iterator[Keeper]:
    made = Keeper(request.param)
    yield made
    made.close()


def replaced(pool: SandboxPool) -> int:
    """How many sandboxes were thrown away."""
    return pool.stats().replaced


def run(keeper: Keeper, row: Row, bait: Bait):
    code = row.code.replace("@PORT@", str(bait.port)).replace("@ABSTRACT@", bait.abstract)
    ends = Verdict.TIME_LIMIT not in row.expected
    return keeper.run(code, row.cases, row.entry, row.limits or (SMALL if ends else BRIEFLY))


def told(report) -> str:
    """What went on, for the message of a failed test."""
    lines = [f"{report.verdict}"]
    for case in report.cases:
        raw = case.raw
        if raw is not None:
            lines.append(
                f"{case.verdict} exit={raw.exit_code} signal={raw.signal} limit={raw.limit} "
                f"error={raw.error!r:.300} result={raw.result!r:.100} out={raw.stdout[:200]!r} "
                f"err={raw.stderr[:300]!r} cpu={raw.cpu_s:.2f} wall={raw.wall_s:.2f}"
            )
    return "\n".join(lines)


def check_slot(keeper: Keeper, before: int, bait: Bait) -> None:
    after = run(keeper, HEALTHY, bait)
    assert after.verdict in HEALTHY.expected, f"the next program: {told(after)}"
    assert replaced(keeper.pool) == before, "the slot did not survive"


def rows(*lists):
    return [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else [])
        for row in (r for rows in lists for r in rows)
    ]


def for_backend(row: Row, keeper: Keeper) -> Row:
    if keeper.backend not in row.backends:
        pytest.skip("another row says what this backend does")
    return row


@pytest.mark.parametrize("row", rows(CONTROLS, KERNEL_CONTROLS))
def test_honest_programs_are_accepted(keeper, bait, row):
    row, before = for_backend(row, keeper), replaced(keeper.pool)
    report = run(keeper, row, bait)
    assert report.verdict in row.expected, told(report)
    check_slot(keeper, before, bait)


@pytest.mark.parametrize("row", rows(HOSTILE, KERNEL_HOSTILE))
def test_hostile_programs_get_what_they_deserve(keeper, bait, row):
    row, before = for_backend(row, keeper), replaced(keeper.pool)
    report = run(keeper, row, bait)
    assert report.verdict in row.expected, told(report)
    for listener in bait.listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()
    check_slot(keeper, before, bait)


@pytest.mark.parametrize("pair", [pytest.param(p, id=p.name) for p in PAIRS + KERNEL_PAIRS])
def test_nothing_is_left_for_the_next_program(keeper, bait, pair: Pair):
    before = replaced(keeper.pool)
    for _ in range(pair.times):
        keeper.run(pair.plant, [StdinCase("", "planted\n")], limits=LONGER)
        report = keeper.run(pair.look, [StdinCase("", "not found\n")], limits=LONGER)
        assert report.verdict == "accepted", told(report)
    check_slot(keeper, before, bait)


def test_a_set_has_the_same_order_in_every_slot(keeper):
    code = "print({str(n) for n in range(20)}, hash('x'), hash(b'y'))"
    case = [StdinCase("", "")]
    first = keeper.run(code, case).cases[0].raw.stdout
    backend = keeper.backend
    other = run_sync(start_sandbox(backend, slots=1, **options(backend)))
    try:
        assert other.run_sync(Program(code), case).cases[0].raw.stdout == first
    finally:
        run_sync(other.aclose())


@pytest.mark.parametrize("checker", [Lines(), Tokens(), Tokens(1e-6)], ids=repr)
@pytest.mark.parametrize(
    "said", ["sNaN", "-sNaN9", "nan", "1e999999999", "9" * 5000, "\ud800", "\0", "\uff17", "1_0"]
)
def test_no_output_upsets_a_checker(checker, said):
    raw = RawRun(stdout=said.encode("utf-8", "surrogatepass"))
    for expected in ("7", "1.5", "10"):
        assert not checker.accepts(raw, StdinCase("", expected + "\n"))


@pytest.mark.parametrize("checker", [Returns(), Returns(1e-6)], ids=repr)
@pytest.mark.parametrize(
    "result",
    [
        pytest.param(10**400, id="huge"),
        float("nan"),
        float("inf"),
        complex(1, 1),
        {1: 2},
        {(1,): [2]},
        b"1.5",
    ],
)
def test_no_result_upsets_a_checker(checker, result):
    for expected in (1.5, 10**300, [1.5], {"a": 1.5}):
        assert not checker.accepts(RawRun(result=result), CallCase((), expected))
