"""Checkers: whether an answer is right, decided on the host.

They do not see how an answer was come by: output that is fitted to the inputs is right. They do not
run anything of the program's, nor guess what was meant: what the rule does not call equal is wrong.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Protocol

from rlrf.errors import RlrfError, UsageError
from rlrf.feedback import clean_text
from rlrf.sandbox.program import MISSING, CallCase, Case, RawRun, StdinCase


class Checker(Protocol):
    """Decides on the host whether what came out is right; called if the program ended well.

    One that sets ``partwise = True`` judges a line, a word or an element as it judges the whole; it
    may be asked about them, to say where an answer goes wrong.
    """

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """Whether the run answers the case."""
        ...


log = logging.getLogger("rlrf.sandbox")
_COMPLAINED: set[tuple[Any, str]] = set()


def accepted(checker: Checker, raw: RawRun, case: Case) -> bool:
    """Whether ``checker`` accepts what came out. Nobody else calls a checker.

    What came out is the program's: where the checker cannot cope with it (an integer of more
    digits than Python prints, values that cannot be hashed or ordered, a word that is no number,
    depth), the answer is not right. As that may also be a fault of the checker, it is logged, once
    per checker and kind of error.

    Raises:
        InfraError: what the checker needs has failed.
        UsageError: the checker does not fit the cases.
    """
    try:
        return bool(checker.accepts(raw, case))
    except RlrfError:
        raise
    except (Exception, SystemExit) as error:
        # Whose fault it may be: a function, or a class of checkers.
        whose: Any = getattr(checker, "function", None)
        whose = whose if hasattr(whose, "__name__") else type(checker)
        if (whose, type(error).__name__) not in _COMPLAINED:
            _COMPLAINED.add((whose, type(error).__name__))
            log.warning(
                "the checker %r raised %s: %s; the answer counts as wrong (said once)",
                whose.__name__,
                type(error).__name__,
                _words(error),
            )
        return False


def _words(error: BaseException) -> str:
    try:
        return clean_text(str(error), 200)
    except Exception:  # whatever a stranger's __str__ does
        return "(its message cannot be read)"


@dataclass(frozen=True)
class Lines:
    """LiveCodeBench's rule for standard output: equal line by line, or equal as numbers.

    The output is stripped, split into lines, each line stripped. Lines agree when they are equal,
    or when both are whole lists of decimals with equal values (no tolerance): ``1e-05`` is
    ``0.00001``. Unlike there, a word like ``010`` must be the same word, as most often it is a
    string of digits, and so must ``inf`` and ``nan``.
    """

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        got, wanted = _lines(raw.text), _lines(_stdin_case(case).expected)
        return len(got) == len(wanted) and all(
            a == b or _same_numbers(a.split(), b.split()) for a, b in zip(got, wanted, strict=True)
        )


@dataclass(frozen=True)
class Text:
    """Equal text; white space at the ends of lines and blank lines at the end do not count."""

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        return self._plain(raw.text) == self._plain(_stdin_case(case).expected)

    @staticmethod
    def _plain(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]


@dataclass(frozen=True)
class Tokens:
    """Equal as lists of words; numbers may differ by ``tolerance``, relative or absolute.

    ``tolerance`` 0 compares text.

    Raises:
        UsageError: the tolerance is negative, infinite or NaN.
    """

    partwise: ClassVar[bool] = True
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        got, wanted = raw.text.split(), _stdin_case(case).expected.split()
        return len(got) == len(wanted) and all(
            a == b or self._close(a, b) for a, b in zip(got, wanted, strict=True)
        )

    def _close(self, a: str, b: str) -> bool:
        if not self.tolerance or not a.isascii() or "_" in a:
            return False
        try:
            x, y = float(a), float(b)
        except ValueError:
            return False
        return _close(x, y, self.tolerance)


@dataclass(frozen=True)
class Exact:
    """Equal to the last byte."""

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        return raw.stdout == _stdin_case(case).expected.encode()


@dataclass(frozen=True)
class Returns:
    """The returned value equals the expected: lists and tuples alike, 1 is 1.0, True is not 1.

    Args:
        tolerance: for floats, relative or absolute; 0 compares exactly.

    Raises:
        UsageError: the tolerance is negative, infinite or NaN.
    """

    partwise: ClassVar[bool] = True
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        _check_tolerance(self.tolerance)

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        assert isinstance(case, CallCase)
        return raw.result is not MISSING and self._equal(raw.result, case.expected)

    def _equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, bool) or isinstance(b, bool):
            return isinstance(a, bool) and isinstance(b, bool) and a is b
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            if self.tolerance and (isinstance(a, float) or isinstance(b, float)):
                return _close(a, b, self.tolerance)
            return a == b
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(self._equal, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self._equal(a[k], b[k]) for k in a)
        return type(a) is type(b) and bool(a == b)


def _check_tolerance(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UsageError(f"tolerance is {value!r}; it must be a finite number >= 0")


def _close(a: float, b: float, tolerance: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer that no float can hold
        return a == b


def _stdin_case(case: Case) -> StdinCase:
    if not isinstance(case, StdinCase):
        raise UsageError("this checker compares standard output; use Returns() for call cases")
    return case


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_numbers(got: list[str], wanted: list[str]) -> bool:
    """Whether two lines are lists of decimals with equal values."""
    if len(got) != len(wanted):
        return False
    for a, b in zip(got, wanted, strict=True):
        x, y = _decimal(a), _decimal(b)
        if x is None or y is None or (a != b and not (_counts(a, x) and _counts(b, y) and x == y)):
            return False
    return True


def _decimal(word: str) -> Decimal | None:
    # Decimal would also take digits of any script, and underscores.
    if not word.isascii() or "_" in word:
        return None
    try:
        return Decimal(word)
    except ArithmeticError:
        return None


def _counts(word: str, number: Decimal) -> bool:
    """Whether a word is compared by its value. A signalling NaN would raise when it is compared."""
    digits = word[1:] if word[0] in "+-" else word
    return number.is_finite() and not (digits[0] == "0" and digits[1:2].isdigit())


@dataclass(frozen=True)
class Asserts:
    """The asserts came to their end without an exception."""

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        return raw.assertion is None
