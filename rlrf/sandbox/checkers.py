"""Checkers: whether an answer is right, decided on the host."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, ClassVar, Protocol

from rlrf.errors import UsageError
from rlrf.sandbox.program import MISSING, CallCase, Case, RawRun, StdinCase


class Checker(Protocol):
    """Decides on the host whether what came out is right; called if the program ended well.

    One that sets ``partwise = True`` judges a line, a word or an element as it judges the whole; it
    may be asked about them, to say where an answer goes wrong.
    """

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """Whether the run answers the case."""
        ...


@dataclass(frozen=True)
class Lines:
    """LiveCodeBench's rule for standard output: equal line by line, or equal as numbers.

    The output is stripped, split into lines, each line stripped. Lines agree when they are equal,
    or when both are whole lists of decimals with equal values (no tolerance). Unlike there,
    a word like ``010`` is no number, as most often it is a string of digits.
    """

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        got, wanted = _lines(raw.text), _lines(_stdin_case(case).expected)
        return len(got) == len(wanted) and all(
            a == b or (_decimals(a) is not None and _decimals(a) == _decimals(b))
            for a, b in zip(got, wanted, strict=True)
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
    """

    partwise: ClassVar[bool] = True
    tolerance: float = 0.0

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
    """

    partwise: ClassVar[bool] = True
    tolerance: float = 0.0

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


_DIGIT_STRING = re.compile(r"(?<![^\s+-])0[0-9]")


def _decimals(line: str) -> list[Decimal] | None:
    # Decimal would take digits of any script and underscores; and a signalling NaN that a program
    # prints would raise when it is compared.
    if not line.isascii() or "_" in line or _DIGIT_STRING.search(line):
        return None
    try:
        numbers = [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
    return numbers if all(n.is_finite() for n in numbers) else None


@dataclass(frozen=True)
class Asserts:
    """The asserts came to their end without an exception."""

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`Checker`."""
        return raw.assertion is None
