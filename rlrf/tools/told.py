"""Values and names as messages tell them: short, whatever they are.

It does not make a text safe for a prompt: a feedback segment does so when it is built.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

_LONGEST = 60
_LISTED = 12
_COMPARED = 100


def shown(value: Any) -> str:
    """A JSON value: as JSON if that is short, else the head of a string, or how much there is."""
    if isinstance(value, str):
        return shown_name(value)
    if isinstance(value, dict) and value:
        return f"an object with {counted(len(value), 'property', 'properties')}"
    if isinstance(value, (list, tuple)) and value:
        return f"an array of {counted(len(value), 'item')}"
    return json.dumps(value)[:_LONGEST]


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def shown_name(text: str) -> str:
    """A string in quotes, without its tail if it is long."""
    cut = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return json.dumps(cut, ensure_ascii=False)


def accepted(values: Sequence[Any]) -> str:
    """The first of the values that are accepted, and how many more there are."""
    if not values:
        return "none"
    more = len(values) - _LISTED
    listed = ", ".join(shown(v) for v in values[:_LISTED])
    return f"{listed} and {more} more" if more > 0 else listed


def near(value: Any, known: Sequence[str]) -> str:
    """``"; did you mean "x"?"`` for the nearest of ``known``; empty if none is near."""
    if not isinstance(value, str) or len(value) > _LONGEST:  # comparing costs more than linear work
        return ""
    short = [name for name in known[:_COMPARED] if len(name) <= _LONGEST]
    found = difflib.get_close_matches(value, short, n=1)
    return f"; did you mean {shown_name(found[0])}?" if found else ""
