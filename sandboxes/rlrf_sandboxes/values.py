"""What came out of a sandbox, read at a cost that is linear in its length.

All of it may be forged by a program. Two things in Python are not linear: an integer of very many
digits, and sets and dicts whose members hash alike (numbers hash without a secret, so a program can
choose such numbers). The first are refused, the second are filled a few members at a time, as long
as that takes the time it takes.

It does not say whether a value is right, nor whether a program came by it honestly.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

_MOST_DIGITS = 4300
"""Python's own limit, which a process may have lifted."""
_FEW = 64
_PIECE = 16
_GRACE_S = 0.02
_MEMBER_S = 2e-6
"""CPU seconds that a member of a set may take; ordinary ones take a twentieth of it."""


def read_json(data: bytes | bytearray) -> Any:
    """A JSON text.

    Raises:
        ValueError: it is none, or is nested too deeply, or has an integer of too many digits.
    """
    try:
        return _loads(str(data, "utf-8", "surrogatepass"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


_loads = json.JSONDecoder(parse_int=_integer).decode


def decode(value: Any) -> Any:
    """The value that the runner's ``encode`` wrote.

    Raises:
        ValueError: it is not of that form, or its sets and dicts cost more than linear time.
    """
    try:
        return _Decoder().decode(value)
    except (TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError("not an encoded value") from error


class _Decoder:
    """Decodes one value; its sets and dicts share an allowance."""

    def __init__(self) -> None:
        self._left_s = _GRACE_S

    def decode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError("not an encoded value")
        ((kind, inner),) = value.items()
        if kind == "int":
            return int(inner, 16)
        if kind == "float":
            return float(inner)
        if kind == "complex":
            return complex(float(inner[0]), float(inner[1]))
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray)(inner, "latin-1")
        if not isinstance(inner, list):
            raise ValueError("not an encoded value")
        if kind == "dict":
            made: dict[Any, Any] = {}
            self._fill(made.update, [(self.decode(k), self.decode(v)) for k, v in inner])
            return made
        members = [self.decode(v) for v in inner]
        if kind in ("set", "frozenset"):
            found: set[Any] = set()
            self._fill(found.update, members)
            return found if kind == "set" else frozenset(found)
        return {"list": list, "tuple": tuple}[kind](members)

    def _fill(self, update: Callable[[list[Any]], None], members: list[Any]) -> None:
        if len(members) <= _FEW:  # however they collide
            update(members)
            return
        start = time.thread_time()
        self._left_s += _MEMBER_S * len(members)
        for i in range(0, len(members), _PIECE):
            update(members[i : i + _PIECE])
            if time.thread_time() - start > self._left_s:
                raise ValueError("members of a set, or keys of a dict, that hash alike")
        self._left_s -= time.thread_time() - start
