"""Checkers: numbers as numbers, and nothing that a program gives upsets one."""

from __future__ import annotations

import asyncio
import math
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrf import InfraError, UsageError
from rlrf.sandbox import (
    MISSING,
    AssertCase,
    Asserts,
    CallCase,
    Exact,
    Limits,
    Lines,
    Program,
    RawRun,
    Returns,
    StdinCase,
    Text,
    Tokens,
    Verdict,
    accepted,
)
from rlrf_environments.code.answers import MANY_ANSWERS, AnyOrder
from rlrf_environments.code.explain import Failure, Test, explain
from rlrf_environments.code.extract import Attempt
from rlrf_environments.code.humaneval import Equal, Oracle
from rlrf_environments.code.livecodebench import OfficialLines, OfficialReturns, Results
from rlrf_environments.code.tasks import as_checker
from tests.test_sandbox_pool import Fakes, started

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("got", "expected", "right"),
    [
        ("1e-05", "0.00001", True),
        ("1E-05", "1e-5", True),
        ("1E+05", "100000", True),
        ("1.0e-05 2", "0.00001 2.0", True),
        ("-1e-05", "-0.00001", True),
        ("1e05", "100000", True),
        ("+5", "5", True),
        ("-0", "0", True),
        (".5", "0.5", True),
        ("5.", "5", True),
        ("0.10", "0.1", True),
        ("1e-06", "0.00001", False),
        ("010", "10", False),
        ("-05", "-5", False),
        ("010 1.0", "010 1", True),
        ("010 1.0", "10 1", False),
        ("00", "0", False),
        ("inf", "3", False),
        ("inf 1.0", "inf 1", True),
        ("nan", "nan", True),
        ("nan 1.0", "nan 1", True),
        ("nan 1.0", "1 1", False),
        ("sNaN 1.0", "1 1", False),
        ("1e999999999", "1e999999998", False),
        ("1e99999999999999999999", "1", False),
        ("1_0", "10", False),
        ("Yes 1.0", "Yes 1", False),
        ("1 2", "1", False),
    ],
)
def test_lines_compare_decimals_by_value(got, expected, right):
    assert accepted(Lines(), RawRun(stdout=got.encode()), StdinCase("", expected)) is right
    assert accepted(Lines(), RawRun(stdout=expected.encode()), StdinCase("", got)) is right


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30))
def test_every_way_to_write_a_decimal_is_that_decimal(number):
    ways = {str(number), f"{number:e}", f"{number:E}", format(number.normalize(), "g")}
    if number == number.to_integral_value():
        ways.add(str(int(number)))
    exact = [w for w in ways if Decimal(w) == number]
    for a in exact:
        for b in exact:
            assert accepted(Lines(), RawRun(stdout=a.encode()), StdinCase("", b)), (a, b)


@pytest.mark.parametrize(
    ("got", "wanted", "right"),
    [
        (3.0, INF, False),
        (INF, INF, True),
        (-INF, INF, False),
        (INF, 3.0, False),
        (NAN, INF, False),
        (NAN, 3.0, False),
        (10**400, INF, False),
        (INF, 10**400, False),
        (complex(INF, 0), INF, True),
        (complex(1, INF), 1.0, False),
        ([1.0, 3.0], [1.0, INF], False),
        ([1.0, INF], [1.0, INF], True),
        ([[INF], 2.0], [[3.0], 2.0], False),
    ],
)
@pytest.mark.parametrize("atol", [0.0, 1e-6, 0.5])
def test_nothing_is_near_infinity(got, wanted, right, atol):
    case = CallCase((), wanted)
    assert accepted(Oracle("f", atol), RawRun(result=got), case) is right
    for checker in (Results(), Equal(), OfficialReturns(), Returns(atol)):
        same = right and type(got) is type(wanted)  # some tell a complex number from a float
        assert accepted(checker, RawRun(result=got), case) in (same, right)
    for a, b in ((got, wanted),) if isinstance(got, float) and isinstance(wanted, float) else ():
        raw, stdin = RawRun(stdout=str(a).encode()), StdinCase("", str(b))
        assert accepted(Tokens(atol), raw, stdin) is (a == b)


@pytest.mark.parametrize("tolerance", [-1.0, INF, NAN, True, "1e-6", None])
def test_a_tolerance_is_a_finite_number(tolerance):
    for checker in (Tokens, Returns):
        with pytest.raises(UsageError, match="it must be a finite number >= 0"):
            checker(tolerance)


# --- nothing upsets a checker -----------------------------------------------------------------


def deep(levels: int = 3000) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def twins(n: int) -> list[int]:
    """Integers that all have one hash."""
    return [i * (2**61 - 1) for i in range(n)]


class Unfriendly:
    """Not what a sandbox gives, but what a checker of one's own may be handed by mistake."""

    def __eq__(self, other):
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self):
        raise RecursionError


RESULTS = [
    10**5000,
    [10**5000, 1],
    [1, 10**5000],
    {10**5000: 1},
    deep(),
    [deep(), 1],
    [{}, []],
    [{1}, 1],
    [None, 1],
    [1j, 2],
    ["a", 1],
    [NAN, INF],
    "\ud800",
    ["\ud800", 1],
    b"\xff",
    "9" * 5000,
    MISSING,
    None,
    (),
    [Unfriendly(), 1],
]
OUTPUTS = [
    b"",
    b"\xff\xfe",
    b"\x00",
    b"9" * 5000,
    b"-" * 100,
    b"1e999999999 sNaN",
    "\uff11 \u0661 1_0".encode(),
    b"9" * 31 + b" 1 2",
    b"1 1",
    b"Yes\nR 1",
    b"inf nan -inf",
]
WANTED = [[1, 2], [2.5, 1.0], 1, "a", [[1], [2]], {1: 2}, {1, 2}, [10**5000, 2], None, 0.5, 1j, []]
CALLS = [
    Returns(),
    Returns(0.1),
    AnyOrder(),
    Equal(),
    OfficialReturns(),
    Results(),
    *(Oracle(name, atol, order) for name in ("f", "find_zero") for atol in (0, 0.1)
      for order in ("as is", "sorted", "set")),
    as_checker(lambda answer, case: sorted(answer) == sorted(case.expected)),
    as_checker(lambda answer, case: set(answer) == set(case.expected)),
    as_checker(lambda answer, case: answer.index(str(case.expected)) == exit()),
]  # fmt: skip
PRINTS = [
    Lines(),
    Text(),
    Tokens(),
    Tokens(0.1),
    Exact(),
    OfficialLines(),
    *(c for c in MANY_ANSWERS.values() if not isinstance(c, AnyOrder)),
    as_checker(lambda answer, case: int(answer) == 1),
    as_checker(lambda answer, case: 1 / len(answer.split("1"))[1]),
]


def explained(case, verdict, raw, checker):
    for public in (True, False):
        failure = Failure(1, Test(case, public), verdict, raw)
        segments = explain(Attempt("x = 1\n"), failure, Limits(), checker, quote=True)
        assert segments
        assert all(s.text for s in segments)


@pytest.mark.parametrize("checker", CALLS, ids=lambda c: type(c).__name__)
def test_no_result_upsets_a_checker_or_its_explanation(checker):
    for wanted in WANTED:
        case = CallCase(([1, 2], 3), wanted)
        for result in RESULTS:
            raw = RawRun(result=result)
            right = accepted(checker, raw, case)
            assert isinstance(right, bool)
            if not isinstance(result, list) or Unfriendly not in map(type, result):
                explained(case, Verdict.WRONG_ANSWER, raw, checker)


@pytest.mark.parametrize("checker", PRINTS, ids=lambda c: type(c).__name__)
def test_no_output_upsets_a_checker_or_its_explanation(checker):
    for wanted in ("1 2 3", "Yes\nNo", "-1", "0.5", "", "1\n2\n"):
        case = StdinCase("3 6\n1 2 3\n", wanted)
        for output in OUTPUTS:
            raw = RawRun(stdout=output)
            assert isinstance(accepted(checker, raw, case), bool)
            explained(case, Verdict.WRONG_ANSWER, raw, checker)


def test_what_is_right_in_any_order_may_be_huge():
    case = CallCase((), [1, 10**5000])
    assert accepted(AnyOrder(), RawRun(result=[10**5000, 1]), case)
    assert not accepted(AnyOrder(), RawRun(result=[10**5000 + 1, 1]), case)
    assert not accepted(AnyOrder(), RawRun(result=[10**5000, 1]), CallCase((), [1, 2]))


def test_values_of_one_hash_cost_a_checker_no_more():
    def seconds(n: int) -> float:
        case = CallCase((), list(range(n)))
        start = time.thread_time()
        for checker in CALLS:
            if not hasattr(checker, "function"):
                accepted(checker, RawRun(result=twins(n)), case)
        return time.thread_time() - start

    seconds(1000)
    assert seconds(16_000) < 16 * 4 * seconds(1000) + 0.5  # quadratic: 256 times


def test_a_checker_that_raises_says_so_once_and_the_answer_is_wrong(caplog):
    def own(answer, case):
        raise KeyError(answer)

    fakes = Fakes(RawRun(result=[10**5000, 1]), RawRun(result={}), RawRun(result="\x1b[2J\n"))

    async def go():
        pool = await started(fakes, 1)
        for _ in range(3):
            case = CallCase((), [1, 2])
            report = await pool.run(Program("x", entry="f"), [case], checker=as_checker(own))
            assert report.verdict is Verdict.WRONG_ANSWER
        stats = pool.stats()
        assert (stats.retries, stats.replaced, stats.started) == (0, 0, 1)
        await pool.aclose()

    asyncio.run(go())
    said = [r.getMessage() for r in caplog.records if "raised KeyError" in r.getMessage()]
    assert len(said) == 1
    assert "the checker 'own'" in said[0]


def test_what_is_not_the_programs_fault_is_told():
    class Judge:
        def accepts(self, raw, case):
            raise InfraError("the judge is down", kind="judge")

    with pytest.raises(InfraError, match="the judge is down"):
        accepted(Judge(), RawRun(), StdinCase("", ""))
    with pytest.raises(UsageError, match="this checker compares standard output"):
        accepted(Lines(), RawRun(), CallCase((), 1))
    assert accepted(Asserts(), RawRun(), AssertCase("assert f()"))
