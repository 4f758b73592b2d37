"""Calls of tools as models write them in text.

A call that cannot be read is never repaired into one and never dropped: it stays where it is in the
text and is told of beside the others, with its place and what is wrong with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["unclosed", "invalid_json", "malformed", "too_many"]

MAX_CALLS = 128
"""More blocks in one reply are not read: an error costs JSON's decoder the text before it."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ParsedCalls:
    """What a text holds of calls.

    Attributes:
        calls: ``{"name", "arguments"}`` of each, the arguments as an object.
        invalid: ``{"text", "span", "status", "why"}`` of what was meant for a call; ``span`` counts
            in the text without the calls, which is :attr:`ranges` of it.
        ranges: the characters that belong to no call, in order.
    """

    calls: tuple[dict[str, Any], ...]
    invalid: tuple[dict[str, Any], ...]
    ranges: tuple[tuple[int, int], ...]


def parse_hermes(text: str) -> ParsedCalls:
    """Read the calls of Hermes and Qwen: an object with ``name`` and ``arguments`` in its tags.

    At most :data:`MAX_CALLS` blocks are read; what follows is one that is invalid. So the work is
    linear in the text.
    """
    calls: list[dict[str, Any]] = []
    invalid: list[dict[str, Any]] = []
    ranges: list[tuple[int, int]] = []
    removed = position = kept = 0
    while (start := text.find(_OPEN, position)) >= 0:
        body = start + len(_OPEN)
        read = len(calls) + len(invalid)
        if read > MAX_CALLS:
            break
        try:
            if read == MAX_CALLS:
                raise _Fault("too_many", f"a reply has at most {MAX_CALLS} calls")
            value, end = _DECODER.raw_decode(text, _skip(text, body))
            end = _skip(text, end)
            if not text.startswith(_CLOSE, end):
                raise _Fault("unclosed" if end == len(text) else "invalid_json", _NO_CLOSE)
            calls.append(_call(value))
        except (ValueError, RecursionError, _Fault) as error:
            end = _end_of_block(text, body) if read < MAX_CALLS else len(text)
            fault = error if isinstance(error, _Fault) else _json_fault(text, body, end, error)
            invalid.append(
                {
                    "text": text[start:end],
                    "span": [start - removed, end - removed],
                    "status": fault.status,
                    "why": fault.why,
                }
            )
            position = end
            continue
        position = end + len(_CLOSE)
        before = len(text[kept:start].rstrip()) + kept  # a call swallows the space before it
        ranges.append((kept, before))
        kept = position if _skip(text, position) < len(text) else len(text)
        removed += kept - before
    ranges.append((kept, len(text)))
    return ParsedCalls(tuple(calls), tuple(invalid), tuple((a, b) for a, b in ranges if a < b))


def wire_calls(calls: Sequence[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """Calls as they are on the OpenAI wire: arguments as a JSON string, ids ``prefix_0`` and on."""
    return [
        {
            "id": f"{prefix}_{i}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
        }
        for i, call in enumerate(calls)
    ]


class _Fault(Exception):
    def __init__(self, status: Status, why: str) -> None:
        self.status, self.why = status, why


_NO_CLOSE = f"after the JSON object there must be {_CLOSE}"


def _call(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Fault("malformed", 'a call is a JSON object with "name" and "arguments"')
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name:
        raise _Fault("malformed", 'the call has no "name", which is a string')
    if not isinstance(arguments, dict):
        raise _Fault("malformed", 'the call has no "arguments", which are a JSON object')
    return {"name": name, "arguments": arguments}


def _json_fault(text: str, body: int, end: int, error: Exception) -> _Fault:
    if not text.startswith(_CLOSE, end - len(_CLOSE)):
        return _Fault("unclosed", f"the call is never closed by {_CLOSE}")
    if isinstance(error, json.JSONDecodeError):
        return _Fault("invalid_json", f"{error.msg} at character {error.pos - body} of the call")
    return _Fault("invalid_json", str(error)[:200] or type(error).__name__)


def _end_of_block(text: str, body: int) -> int:
    """Where a block ends that is no call: after its closing mark, else before the next opening."""
    following = text.find(_OPEN, body)
    limit = len(text) if following < 0 else following
    close = text.find(_CLOSE, body, limit)
    return limit if close < 0 else close + len(_CLOSE)


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_object)
