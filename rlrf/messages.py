"""Chat messages: OpenAI chat dicts, as plain data.

Wherever a content is given it may also stand in OpenAI's content parts: those of the type ``text``
are joined, and others are refused, since nobody here could read them. What is handed on is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from rlrf.errors import UsageError
from rlrf.reasoning import Reply, split_reasoning

ROLES = ("system", "developer", "user", "assistant", "tool")


class Message(TypedDict):
    """One OpenAI chat message.

    ``content`` is text, or None for an assistant turn that only calls tools. ``tool_calls`` are
    ``{"id", "type": "function", "function": {"name", "arguments"}}`` with ``arguments`` a JSON
    string, as on the OpenAI wire.
    """

    role: str
    content: str | None
    name: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    invalid_tool_calls: NotRequired[list[dict[str, Any]]]


Messages = tuple[Message, ...]
Action = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What a policy does: its reply as text (or parts of it), or an assistant message with
``tool_calls``."""


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": content}


def whole_text(text: str) -> str:
    """``text`` with U+FFFD for each lone surrogate: those no encoder takes. As long as before."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


_SURROGATE = re.compile("[\ud800-\udfff]")


def is_message(value: object) -> bool:
    """Whether ``value`` is a well-formed chat message."""
    return _fault(value) is None


def _fault(value: object) -> str | None:
    """What is wrong with a message; None if nothing is."""
    if not isinstance(value, Mapping):
        return "it is no mapping"
    if value.get("role") not in ROLES:
        return f"its role is {value.get('role')!r}, not one of {', '.join(ROLES)}"
    content = value.get("content")
    if isinstance(content, (list, tuple)):
        fault = _part_fault(content)
        if fault is not None:
            return fault
    elif not isinstance(content, str) and not (
        content is None and value["role"] == "assistant" and "content" in value
    ):
        return "its content is no string (None is only for an assistant that calls tools)"
    if len(value) > 2:
        for name in ("name", "tool_call_id", "reasoning_content"):
            if not isinstance(value.get(name, ""), str):
                return f"its {name!r} is {value[name]!r}, not a string"
        for name in ("tool_calls", "invalid_tool_calls"):
            calls = value.get(name, [])
            if not isinstance(calls, (list, tuple)) or not all(
                isinstance(call, Mapping) for call in calls
            ):
                return f"its {name!r} is no list of mappings"
        try:
            json.dumps(dict(value), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            return f"it is no JSON data ({error})"
    return None


def is_parts(value: object) -> bool:
    """Whether it is a content in parts, and not several messages."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(p, Mapping) and "type" in p and "role" not in p for p in value)
    )


def _part_fault(parts: Sequence[Any]) -> str | None:
    """What is wrong with the parts of a content; None if all of them are text."""
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            return (
                f"part {i} of its content is {part!r:.200}, which cannot be read; give text, as a "
                'string or in parts {"type": "text", "text": "..."}'
            )
    return None if parts else "its content is an empty list of parts"


def joined(content: Any) -> Any:
    """A content as text, where it stands in parts; anything else as it is.

    Raises:
        UsageError: a part is no text.
    """
    if not isinstance(content, (list, tuple)):
        return content
    fault = _part_fault(content)
    if fault is not None:
        raise UsageError(f"a message cannot be read: {fault}")
    return "".join(part["text"] for part in content)


def as_messages(value: str | Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> Messages:
    """Turn a string or its parts (a user message), a message or several into a tuple of messages.

    Lone surrogates become U+FFFD: no tokenizer and no wire takes them.

    Raises:
        UsageError: a message has no known role or no text, or holds what is no JSON data.
    """
    if isinstance(value, str):
        return (user(whole_text(value)),)
    if not isinstance(value, Iterable):
        raise UsageError(f"messages are {value!r}; give a string, a chat message or several")
    items: tuple[Any, ...] = (value,) if isinstance(value, Mapping) else tuple(value)
    if is_parts(items):
        items = ({"role": "user", "content": items},)
    for i, item in enumerate(items):
        fault = _fault(item)
        if fault is not None:
            raise UsageError(
                f"message {i} is {item!r}, not a chat message: {fault}. It needs a 'role' out of "
                f"{ROLES} and a 'content' string"
            )
    return tuple(_whole({**m, "content": joined(m["content"])}) for m in items)


def _whole(value: Any) -> Any:
    """Plain data without lone surrogates, in its keys neither."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, Mapping):
        return {_whole(key): _whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return value


def action_text(action: Action) -> str:
    """The text of an action: the string itself, or the content of the assistant message."""
    if isinstance(action, str):
        return action
    return str(joined(action.get("content") if isinstance(action, Mapping) else action) or "")


def action_message(action: Action) -> Message:
    """The action as an assistant message, its reasoning beside its content.

    Raises:
        UsageError: the action is neither text nor an assistant message.
    """
    message = spoken(action)
    reply = _reply(message)
    return message if reply.reasoning is None else _answered(message, reply)


def spoken(action: Action) -> Message:
    """The action as an assistant message, as it was given: reasoning stays in the content.

    Raises:
        UsageError: the action is neither text nor an assistant message.
    """
    if isinstance(action, str):
        return assistant(whole_text(action))
    if is_parts(action):
        action = {"content": action}
    if (
        not isinstance(action, Mapping)
        or action.get("role", "assistant") != "assistant"
        or not isinstance(action.get("content"), (str, list, tuple, type(None)))
    ):
        raise UsageError(
            f"an action is a string or an assistant message, got {action!r}; "
            'pass "text" or {"role": "assistant", "content": "text"}'
        )
    message: Message = {"role": "assistant", "content": action.get("content")}
    if action.get("tool_calls"):
        message["tool_calls"] = action["tool_calls"]
    if action.get("invalid_tool_calls"):
        message["invalid_tool_calls"] = action["invalid_tool_calls"]
    if action.get("reasoning_content") is not None:
        message["reasoning_content"] = action["reasoning_content"]
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    fault = _fault(message)
    if fault is not None:
        raise UsageError(f"an action is a string or an assistant message, got {action!r}: {fault}")
    message["content"] = joined(message["content"])
    return _whole(message)  # type: ignore[no-any-return]  # a message again


def answer_range(action: Action) -> tuple[int, int]:
    """The characters of :func:`action_text` that are the content of :func:`action_message`."""
    _, start, end = _reply(spoken(action))
    return start, end


def _reply(message: Message) -> Reply:
    # Taken apart already, a mark that nothing opens is the answer's own.
    return split_reasoning(
        message["content"] or "", strays=message.get("reasoning_content") is None
    )


def _answered(message: Message, reply: Reply) -> Message:
    text = message["content"] or ""
    thought = "\n\n".join(filter(None, (message.get("reasoning_content"), reply.reasoning)))
    return {**message, "content": text[reply.start : reply.end], "reasoning_content": thought}


def thought_only(message: Message) -> bool:
    """Whether an assistant message has reasoning and neither an answer nor a call of a tool."""
    return (
        bool(message.get("reasoning_content"))
        and not (message["content"] or "").strip()
        and not message.get("tool_calls")
        and not message.get("invalid_tool_calls")
    )
