"""Chat messages: OpenAI chat dicts, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from rlrf.errors import UsageError

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


Messages = tuple[Message, ...]
Action = str | Mapping[str, Any]
"""What a policy does: the text of its reply, or a whole assistant message with ``tool_calls``."""


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A user message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant message."""
    return {"role": "assistant", "content": content}


def is_message(value: object) -> bool:
    """Whether ``value`` is a well-formed chat message."""
    if not isinstance(value, Mapping):
        return False
    content = value.get("content")
    return value.get("role") in ROLES and (
        isinstance(content, str) or (content is None and value.get("role") == "assistant")
    )


def as_messages(value: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Messages:
    """Turn a string (a user message), one message or several into a tuple of messages.

    Raises:
        UsageError: a message has no known role or no text.
    """
    if isinstance(value, str):
        return (user(value),)
    items = (value,) if isinstance(value, Mapping) else tuple(value)
    for i, item in enumerate(items):
        if not is_message(item):
            raise UsageError(
                f"message {i} is {item!r}, not a chat message: it needs a 'role' out of {ROLES} "
                "and a 'content' string (None only for an assistant that calls tools)"
            )
    return tuple(dict(m) for m in items)  # type: ignore[misc]  # checked by is_message above


def action_text(action: Action) -> str:
    """The text of an action: the string itself, or the content of the assistant message."""
    return action if isinstance(action, str) else str(action.get("content") or "")


def action_message(action: Action) -> Message:
    """The action as an assistant message.

    Raises:
        UsageError: the action is neither text nor an assistant message.
    """
    if isinstance(action, str):
        return assistant(action)
    if (
        not isinstance(action, Mapping)
        or action.get("role", "assistant") != "assistant"
        or not isinstance(action.get("content"), str | None)
    ):
        raise UsageError(
            f"an action is a string or an assistant message, got {action!r}; "
            'pass "text" or {"role": "assistant", "content": "text"}'
        )
    message: Message = {"role": "assistant", "content": action.get("content")}
    if action.get("tool_calls"):
        message["tool_calls"] = list(action["tool_calls"])
    if action.get("reasoning_content"):
        message["reasoning_content"] = action["reasoning_content"]
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message
