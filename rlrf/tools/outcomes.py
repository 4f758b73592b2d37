"""What becomes of a call: one vocabulary, and :func:`check`, which gives its first part.

It does not execute a call, and does not know the world: what a tool or the rules of a task make of
a call, its environment says, in these words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlrf.errors import UsageError
from rlrf.tools.calls import Call, InvalidCall
from rlrf.tools.schema import Fault, validate
from rlrf.tools.specs import parameters_of
from rlrf.tools.told import accepted, near, shown_name
from rlrf.tools.values import ValueFault, read_json, skip

Status = Literal[
    "ok",
    "parse_error",
    "unknown_tool",
    "schema_error",
    "precondition_error",
    "tool_exception",
    "timeout",
    "rate_limited",
    "policy_violation",
    "repeated_refusal",
]

STATUSES: Mapping[Status, str] = {
    "ok": "the call can be executed, or has been",
    "parse_error": "it cannot be read as a call; see rlrf.tools.INVALID",
    "unknown_tool": "there is no tool of that name",
    "schema_error": "its arguments do not fit the tool's schema",
    "precondition_error": "the tool cannot be used in this state of the world",
    "tool_exception": "the tool refused, or failed on these arguments",
    "timeout": "the tool took longer than its deadline",
    "rate_limited": "the tool is used too often; trying again later may help",
    "policy_violation": "the tool could do it, but the rules of the task forbid it",
    "repeated_refusal": "the same call was refused before, for the same reason",
}
"""What may become of a call. All are caused by the policy or simulated by the environment, and so
are scored; where the machinery fails there is no outcome, but an :class:`rlrf.InfraError`.
:func:`check` gives the first four; the others are for what executes calls."""

_TOLD = 3  # faults in a message


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What became of a call.

    Attributes:
        status: one of :data:`STATUSES`.
        message: for the model: what is wrong and what is accepted; empty for ``ok``. Bounded.
        name: of the tool, as the call has it; None where none could be read.
        arguments: of the call, JSON data; None where they could not be read.
        faults: with ``schema_error``, what is wrong with the arguments.
    """

    status: Status
    message: str = ""
    name: str | None = None
    arguments: dict[str, Any] | None = None
    faults: tuple[Fault, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the status is ``ok``."""
        return self.status == "ok"


def check(
    call: Call | InvalidCall | Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> CallOutcome:
    """Whether a call can be executed: read, of a known tool, with arguments that fit.

    Args:
        call: from :func:`rlrf.tools.parse`, or from a message: one of its ``tool_calls`` or of its
            ``invalid_tool_calls``.
        tools: what can be called (OpenAI schemas).

    Raises:
        UsageError: the call is none of these; a tool is none, or its schema is.
    """
    schemas = parameters_of(tools)
    read = _read(call)
    if isinstance(read, CallOutcome):
        return read
    if read.name not in schemas:
        known = list(schemas)
        message = (
            f"there is no tool {shown_name(read.name)}{near(read.name, known)}; "
            f"the tools are: {accepted(known)}"
        )
        return CallOutcome("unknown_tool", message, read.name, read.arguments)
    try:
        faults = validate(schemas[read.name], read.arguments)
    except UsageError as error:
        raise UsageError(f"the tool {read.name!r:.80}: {error}") from None
    if not faults:
        return CallOutcome("ok", "", read.name, read.arguments)
    told = [f"{f.pointer[:120]}: {f.message}" if f.pointer else f.message for f in faults[:_TOLD]]
    if len(faults) > _TOLD:
        told.append(f"and {len(faults) - _TOLD} more")
    message = f"the arguments of {shown_name(read.name)} do not fit: {'; '.join(told)}"
    return CallOutcome("schema_error", message, read.name, read.arguments, faults)


def _read(call: Call | InvalidCall | Mapping[str, Any]) -> Call | CallOutcome:
    """The call, or that it cannot be read."""
    if isinstance(call, Call):
        return call
    if isinstance(call, InvalidCall):
        return _unread(call.status, call.why)
    if isinstance(call, Mapping):
        function = call.get("function", call)
        if isinstance(function, Mapping) and "name" in function:
            return _of_wire(function)
        if "status" in call and "why" in call:
            return _unread(str(call["status"])[:40], str(call["why"]))
    raise UsageError(
        f"{call!r:.200} is no call; give one of the calls or of what is invalid of "
        "rlrf.tools.parse(), or of a message's tool_calls or invalid_tool_calls"
    )


def _of_wire(function: Mapping[str, Any]) -> Call | CallOutcome:
    """A call as on the OpenAI wire, whose arguments are JSON text: servers pass on what is none."""
    name, arguments = function["name"], function.get("arguments")
    if not isinstance(name, str) or not name:
        return _unread("missing_name", "the call has no name, which is a string")
    if isinstance(arguments, str):
        text = arguments
        try:
            arguments, end = read_json(text, 0, len(text))
            end = skip(text, end, len(text))
            if end < len(text):
                raise ValueFault("the arguments must end after the JSON object", end)
        except ValueFault as fault:
            status = "unclosed" if fault.unfinished else "invalid_json"
            return _unread(status, f"{fault.why} at character {fault.at} of the arguments", name)
    if not isinstance(arguments, dict):
        return _unread("malformed", "the arguments are no JSON object", name)
    return Call(name, arguments)


def _unread(status: str, why: str, name: str | None = None) -> CallOutcome:
    message = f"the call cannot be read ({status}) and was not executed: {why[:400]}"
    return CallOutcome("parse_error", message, name)
