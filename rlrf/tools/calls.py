"""What a text holds of calls: those that are, and those that cannot be read.

A :class:`Call` has been read and not checked: it does not say whether there is such a tool, or
whether the arguments fit.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlrf.messages import Message

InvalidStatus = Literal["invalid_json", "unclosed", "missing_name", "malformed"]

INVALID: Mapping[InvalidStatus, str] = {
    "invalid_json": "where JSON must stand there is none, or JSON that rlrf.tools.values refuses",
    "unclosed": "the text ends before the call does, or the mark that closes it is missing",
    "missing_name": "the call names no tool: no name, an empty one, or one that is no string",
    "malformed": "anything else about its form: no arguments, or none that are an object; a mark "
    "or a parameter out of its place; more calls than are read",
}
"""Why something that looks like a call is none."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a text holds.

    Attributes:
        name: of the tool.
        arguments: by name; strict JSON data.
        span: its characters in the text, its marks included.
    """

    name: str
    arguments: dict[str, Any]
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class InvalidCall:
    """What looks like a call and cannot be read as one.

    Attributes:
        status: which of :data:`INVALID`.
        text: as it stands in the text.
        span: its characters there.
        why: what is wrong, in a sentence for the model; characters count from the start of
            ``text``.
    """

    status: InvalidStatus
    text: str
    span: tuple[int, int]
    why: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What :func:`parse` finds.

    Attributes:
        calls: in order.
        invalid: what looks like a call and is none, in order.
        content: the text without its reasoning and its calls, and without the space before these.
            What is invalid stays in it.
        ranges: the characters of the text that are the content.
    """

    calls: tuple[Call, ...]
    invalid: tuple[InvalidCall, ...]
    content: str
    ranges: tuple[tuple[int, int], ...]

    def message(self, call_id: str = "call") -> Message:
        """As an assistant message, on the OpenAI wire.

        ``tool_calls`` have the ids ``{call_id}_0`` and on; ``invalid_tool_calls`` are
        ``{"text", "span", "status", "why"}``, whose ``span`` counts in the message's content.
        """
        message: Message = {"role": "assistant", "content": self.content}
        if self.calls:
            message["content"] = self.content or None
            message["tool_calls"] = wire_calls(self.calls, call_id)
        if self.invalid:
            starts = [a for a, _ in self.ranges]
            message["invalid_tool_calls"] = [
                {
                    "text": call.text,
                    "span": [self._in_content(at, starts) for at in call.span],
                    "status": call.status,
                    "why": call.why,
                }
                for call in self.invalid
            ]
        return message

    def _in_content(self, at: int, starts: Sequence[int]) -> int:
        i = bisect_right(starts, at) - 1
        before = sum(b - a for a, b in self.ranges[:i])
        return before + at - starts[i] if i >= 0 else 0


def wire_calls(calls: Sequence[Call], call_id: str = "call") -> list[dict[str, Any]]:
    """Calls as they are on the OpenAI wire: arguments as a JSON string, numbered ids."""
    return [
        {
            "id": f"{call_id}_{i}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for i, call in enumerate(calls)
    ]
