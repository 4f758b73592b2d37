"""Values as models write them in calls: JSON, and the literals of Python.

Strict, because what is read is executed. Refused, and never made into something else: what RFC 8259
has not (``NaN``, ``Infinity``, comments, a comma too many, a raw line break in a string), an
object that has a key twice, a number of more than 308 digits or beyond a float, half a surrogate
pair, more than :data:`MAX_DEPTH` arrays and objects within each other.

One pass, as long as the value; recursion no deeper than :data:`MAX_DEPTH`; nothing is evaluated.

It does not know schemas: what is well formed may still be of the wrong type.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

MAX_DEPTH = 32
"""Arrays and objects within each other. What validates and writes them recurses."""
MAX_DIGITS = 308
"""Of a whole number: as many as a float can have, so that every library can work with it."""

_SPACE = re.compile(r"[ \t\n\r]*")
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)(?![0-9.eE])")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![0-9.eE])")
_PYTHON_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?![\w.])")
_PYTHON_NUMBER = re.compile(
    r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?(?![\w.])"
)
_NUMERIC = re.compile(r"[\w.+-]+")
_WORD = re.compile(r"[A-Za-z_]\w*")
_STRING = re.compile(r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+')
_CUT_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
# A string of Python without its closing mark, for each mark that may open one.
_PYTHON_STRINGS = {
    mark: re.compile(
        rf"{mark}(?:[^\\{mark[0]}{end}]++|\\.{alone})*+",
        re.DOTALL,
    )
    for mark, end, alone in (
        ('"""', "", r'|"(?!"")'),
        ("'''", "", r"|'(?!'')"),
        ('"', r"\n", ""),
        ("'", r"\n", ""),
    )
}
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|N\{|.)", re.DOTALL
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_SURROGATE = re.compile("[\ud800-\udfff]")

JSON_CONSTANTS = {"true": True, "false": False, "null": None}
PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}


class ValueFault(Exception):
    """What stands at :attr:`at` is no value.

    Attributes:
        why: what is wrong with it.
        at: the character of the text.
        unfinished: whether the text ended in the middle of a value.
        in_string: whether it is in a string, whose end is not known then.
    """

    def __init__(
        self, why: str, at: int, unfinished: bool = False, in_string: bool = False
    ) -> None:
        self.why, self.at, self.unfinished, self.in_string = why, at, unfinished, in_string
        super().__init__(why)


def read_json(text: str, at: int, stop: int) -> tuple[Any, int]:
    """The JSON value at a place of a text, after whitespace, and where it ends.

    Raises:
        ValueFault: there is none.
    """
    return JSON(text, stop).value(at)


def skip(text: str, at: int, stop: int) -> int:
    """The place after whitespace."""
    found = _SPACE.match(text, at, stop)
    return found.end() if found else at


class JSON:
    """Reads JSON values in the head of a text, up to ``stop``."""

    constants: ClassVar[Mapping[str, Any]] = JSON_CONSTANTS
    integer, number = _INTEGER, _NUMBER
    quotes = '"'
    arrays: ClassVar[Mapping[str, str]] = {"[": "]"}
    trailing_comma = False

    def __init__(self, text: str, stop: int) -> None:
        self.text, self.stop = text, stop

    def value(self, at: int, depth: int = 0) -> tuple[Any, int]:
        """The value at a place, and where it ends."""
        at = self.skip(at)
        first = self.text[at] if at < self.stop else ""
        if first and first in self.quotes:
            return self.string(at)
        if first == "{" or first in self.arrays:
            if depth == MAX_DEPTH:
                raise ValueFault(f"more than {MAX_DEPTH} arrays and objects within each other", at)
            return self.object(at, depth + 1) if first == "{" else self.array(at, depth + 1)
        if first and first in "+-.0123456789":
            return self._number(at)
        word = _WORD.match(self.text, at, self.stop)
        if word and word[0] in self.constants:
            return self.constants[word[0]], word.end()
        if word and word.end() == self.stop and any(c.startswith(word[0]) for c in self.constants):
            raise ValueFault("the text ends within a value", at, unfinished=True)
        raise self.expected("a value", at)

    def object(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        """The object that begins at a place."""
        found: dict[str, Any] = {}
        at = self.skip(at + 1)
        if self._is("}", at):
            return found, at + 1
        while True:
            if not (at < self.stop and self.text[at] in self.quotes):
                raise self.expected("a key in quotes", at)
            place = at
            key, at = self.string(at)
            if key in found:
                raise ValueFault(f"the key {key[:80]!r} stands twice in one object", place)
            at = self.skip(at)
            if not self._is(":", at):
                raise self.expected("':'", at)
            found[key], at = self.value(at + 1, depth)
            at, more = self.following(at, "}")
            if not more:
                return found, at

    def array(self, at: int, depth: int) -> tuple[Any, int]:
        """The array that begins at a place."""
        close = self.arrays[self.text[at]]
        found: list[Any] = []
        at = self.skip(at + 1)
        if self._is(close, at):
            return found, at + 1
        while True:
            item, at = self.value(at, depth)
            found.append(item)
            at, more = self.following(at, close)
            if not more:
                return found, at

    def string(self, at: int) -> tuple[str, int]:
        """The string that begins at a place."""
        found = _STRING.match(self.text, at, self.stop)
        assert found  # it begins with a quote
        end = found.end()
        if not self._is('"', end):
            raise self._broken_string(end)
        raw = self.text[at : end + 1]
        return self._whole(json.loads(raw) if "\\" in raw else raw[1:-1], at), end + 1

    def skip(self, at: int) -> int:
        """The place after whitespace."""
        return skip(self.text, at, self.stop)

    def following(self, at: int, close: str) -> tuple[int, bool]:
        """After an item: where the next begins, or the whole ends."""
        at = self.skip(at)
        if self._is(close, at):
            return at + 1, False
        if not self._is(",", at):
            raise self.expected(f"',' or {close!r}", at)
        at = self.skip(at + 1)
        if self.trailing_comma and self._is(close, at):
            return at + 1, False
        return at, True

    def expected(self, what: str, at: int) -> ValueFault:
        """The fault that something else stands at a place."""
        if at >= self.stop:
            return ValueFault(f"expected {what}, but the text ends", at, unfinished=True)
        found = self.text[at : min(at + 12, self.stop)].split("\n")[0] or "\n"
        return ValueFault(f"expected {what}, found {found!r}", at)

    def _is(self, mark: str, at: int) -> bool:
        return self.text.startswith(mark, at, self.stop)

    def _number(self, at: int) -> tuple[int | float, int]:
        integer = self.integer.match(self.text, at, self.stop)
        if integer:
            if len(integer[0]) > MAX_DIGITS:
                raise ValueFault(f"a number of more than {MAX_DIGITS} digits", at)
            return int(integer[0]), integer.end()
        found = self.number.match(self.text, at, self.stop)
        if not found:
            written = _NUMERIC.match(self.text, at, min(at + 40, self.stop))
            assert written  # it begins like a number
            raise ValueFault(f"{written[0]!r} is no number", at, written.end() == self.stop)
        number = float(found[0])
        if not math.isfinite(number):
            raise ValueFault("a number that is too large for a float", at)
        return number, found.end()

    def _broken_string(self, at: int) -> ValueFault:
        escape = _CUT_ESCAPE.match(self.text, at, self.stop)
        if at >= self.stop or (escape and escape.end() == self.stop):
            why = "the text ends within a string"
        elif escape:
            why = f"{self.text[at : at + 2]!r} is no escape of JSON"
        else:
            escaped = json.dumps(self.text[at])[1:-1]
            why = f"{self.text[at]!r} must be escaped in a string, as {escaped}"
        return ValueFault(why, at, why.startswith("the text ends"), in_string=True)

    def _whole(self, value: str, at: int) -> str:
        if not value.isascii() and _SURROGATE.search(value):
            raise ValueFault("a string with half a surrogate pair", at)
        return value


class Python(JSON):
    """Reads literals of Python of the types that JSON has; tuples become arrays."""

    constants: ClassVar[Mapping[str, Any]] = PYTHON_CONSTANTS
    integer, number = _PYTHON_INTEGER, _PYTHON_NUMBER
    quotes = "\"'"
    arrays: ClassVar[Mapping[str, str]] = {"[": "]", "(": ")"}
    trailing_comma = True

    def array(self, at: int, depth: int) -> tuple[Any, int]:
        """The list or tuple that begins at a place; ``(1)`` is none, but 1."""
        found, end = super().array(at, depth)
        bare = self.text[at] == "(" and len(found) == 1
        if bare and not self.text[at : end - 1].rstrip().endswith(","):
            return found[0], end
        return found, end

    def string(self, at: int) -> tuple[str, int]:
        """The string that begins at a place."""
        mark = self.text[at]
        if self._is(mark * 3, at):
            mark *= 3
        found = _PYTHON_STRINGS[mark].match(self.text, at, self.stop)
        assert found  # it begins with the mark
        end = found.end()
        if not self._is(mark, end):
            if end >= self.stop or self.text[end] == "\\":
                raise ValueFault("the text ends within a string", end, True, in_string=True)
            raise ValueFault(f"the line ends within a string that {mark} opens", end, False, True)
        raw = self.text[at + len(mark) : end]
        if "\\" in raw:
            raw = _ESCAPE.sub(lambda found: _unescaped(found[0], at), raw)
        return self._whole(raw, at), end + len(mark)


def _unescaped(escape: str, at: int) -> str:
    kind, digits = escape[1], escape[2:]
    if kind in "xuU" and digits:
        number = int(digits, 16)
        if number > 0x10FFFF:
            raise ValueFault(f"{escape!r} is no character", at)
        return chr(number)
    if kind in "01234567":
        return chr(int(escape[1:], 8))
    if kind == "N" or kind in "xuU":
        raise ValueFault(f"{escape!r} is no escape that is read", at)
    if kind in "\\'\"":
        return kind
    return _ESCAPES.get(kind, escape)
