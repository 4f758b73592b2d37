"""One rollout, as a line of JSON gives it and as the page shows it: bounded, and never trusted."""

from __future__ import annotations

import contextlib
import json
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

from rlrf.errors import RlrfError
from rlrf.feedback import Feedback, Level
from rlrf.rollout import Rollout

MAX_TEXT = 20_000
"""Characters of a message, a feedback segment or a teacher prompt; the end is cut."""
MAX_TOKENS = 4096
"""Tokens of a heat map."""
MAX_CARD = 50_000
"""Characters of an environment's own card."""

MALFORMED = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    OverflowError,
    RecursionError,
    RlrfError,
)
"""What reading a record raises that is no rollout."""


def key(record: Mapping[str, Any]) -> tuple[int, str, str]:
    """Step, split and group of a record."""
    step = record.get("step")
    return (
        int(step) if isinstance(step, (int, float)) and abs(step) < 1 << 53 else 0,
        str(record.get("split") or "train"),
        str(record.get("group_id") or record.get("task_id")),
    )


def whole(record: Mapping[str, Any]) -> Rollout:
    """A record as a rollout without its ids, whichever version wrote it.

    Raises:
        MALFORMED: it is none.
    """
    reward = record.get("reward")
    if reward is not None and number(reward) is None:
        raise ValueError(f"reward={reward!r}")
    return Rollout(
        task_id=str(record["task_id"]),
        group_id=key(record)[2],
        completion_mask=tuple(record.get("completion_mask") or ()),
        messages=tuple(dict(m) for m in record.get("messages") or ()),  # type: ignore[misc]  # unread
        reward=reward,
        feedback=tuple(Feedback.from_dicts(step) for step in record.get("feedback") or ()),
        metrics={
            str(k): v for k, v in (record.get("metrics") or {}).items() if number(v) is not None
        },
        finish_reason=str(record.get("finish_reason") or ""),
        failure=None if reward is not None else str(record.get("failure") or "unknown: not told"),
        solved=bool(record.get("solved")),
        sample=int(record.get("sample") or 0),
    )


def shown(record: Mapping[str, Any], *, texts: bool = True) -> dict[str, Any]:
    """What the page shows of a record: no ids, bounded texts, rounded numbers.

    Args:
        record: it.
        texts: whether there is room for its texts, or only for its row.
    """
    step, split, group = key(record)
    mask = list(record.get("completion_mask") or ())
    row = {
        "step": step,
        "split": split,
        "group": group,
        "task": str(record.get("task_id")),
        "sample": int(record.get("sample") or 0),
        "reward": number(record.get("reward")),
        "solved": bool(record.get("solved")),
        "finish": str(record.get("finish_reason") or ""),
        "failure": cut(record.get("failure") or ""),
        "metrics": {str(k): number(v) for k, v in (record.get("metrics") or {}).items()},
        "length": sum(1 for m in mask if m),
    }
    if not texts:
        kinds = {s.get("kind") for f in record.get("feedback") or () for s in f}
        return {**row, "bare": True, "kinds": sorted(map(str, kinds))}
    tokens = list(record.get("tokens") or ())
    kl = list(record.get("token_kl") or ())
    feedback = list(record.get("feedback") or ())
    return {
        **row,
        "messages": [_message(m) for m in record.get("messages") or ()],
        "feedback": [[_segment(s) for s in step] for step in feedback],
        "levels": [_levels(step) for step in feedback],
        "teacher": cut(record.get("teacher_prompt") or ""),
        "tokens": [str(t) for t in tokens[:MAX_TOKENS]] if any(k is not None for k in kl) else [],
        "kl": [number(k) for k in kl[:MAX_TOKENS]] if tokens else [],
        "mask": "".join("1" if m else "0" for m in mask[:MAX_TOKENS]) if 0 in mask else "",
        "cut_tokens": max(0, len(tokens) - MAX_TOKENS),
    }


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "role": str(message.get("role")),
        "content": cut(message.get("content") or ""),
    }
    if message.get("reasoning_content"):
        found["reasoning"] = cut(str(message["reasoning_content"]))
    if message.get("tool_calls"):
        found["calls"] = [_call(call) for call in message["tool_calls"]]
    if message.get("invalid_tool_calls"):
        found["invalid"] = [_invalid(call) for call in message["invalid_tool_calls"]]
    if message.get("tool_call_id"):
        found["answers"] = cut(message["tool_call_id"])
    return found


def _call(call: Mapping[str, Any]) -> dict[str, str]:
    function = call.get("function", call)
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, indent=2)
    return {
        "name": cut(function.get("name")),
        "arguments": cut(arguments),
        "id": cut(call.get("id") or ""),
    }


def _invalid(call: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {n: cut(call.get(n) or "") for n in ("status", "text", "why")}
    return {**found, "span": _span(call.get("span"))}


def _segment(segment: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": str(segment.get("kind")),
        "text": cut(segment.get("text") or ""),
        "severity": str(segment.get("severity") or ""),
        "source": str(segment.get("source") or ""),
        "reveals": str(segment.get("reveals") or ""),
        "span": _span(segment.get("span")),
        "untrusted": bool(segment.get("untrusted")),
    }


def _levels(step: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Level to what it shows of a step's feedback, where that is less than what is recorded.

    A segment that it shows as it is stands as its position.
    """
    try:
        feedback = Feedback.from_dicts(step)
    except MALFORMED:
        return {}
    place = {id(segment): i for i, segment in enumerate(feedback)}
    found = {}
    for level in Level:
        at = feedback.at_level(level)
        if len(at) != len(feedback) or any(id(s) not in place for s in at):
            found[level.name] = [place.get(id(s), _segment(s.to_dict())) for s in at]
    return found


def _span(value: Any) -> list[int] | None:
    ends = list(value or ())
    return ends if len(ends) == 2 and all(isinstance(end, int) for end in ends) else None


def cut(value: Any) -> str:
    """At most MAX_TEXT characters, the end cut: spans count from the start and must stay right."""
    text = str(value)
    if len(text) <= MAX_TEXT:
        return text
    return text[:MAX_TEXT] + f"\n[... {len(text) - MAX_TEXT} characters not on this page ...]"


def number(value: Any) -> float | None:
    """A finite number to five digits; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not abs(value) <= sys.float_info.max:
        return None
    return float(f"{value:.5g}")


def plain_card(card: str) -> str:
    """A card without what turns text about or is no character, and not too long."""
    if len(card) > MAX_CARD:
        return f"<p>The card has {len(card)} characters, more than this page takes ({MAX_CARD})."
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd"
        for c in card
    )
