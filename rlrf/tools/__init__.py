"""Tools: from the text of a reply to calls, and whether they can be executed.

:func:`parse` reads the calls in a text, in the format of a family of models; :func:`validate` says
what is wrong with arguments; :func:`check` says what becomes of a call, in the words of
:data:`STATUSES`. Nothing is repaired, and nothing is dropped::

    found = rlrf.tools.parse(reply, "hermes_json", tools)
    for call in (*found.calls, *found.invalid):
        outcome = rlrf.tools.check(call, tools)
        if not outcome.ok:
            print(outcome.status, outcome.message)

It does not execute calls: that is the environment's.

Why: design/tool-calls.md.
"""

from rlrf.tools.calls import INVALID, Call, InvalidCall, InvalidStatus, Parsed, wire_calls
from rlrf.tools.families import FORMATS
from rlrf.tools.formats import MAX_CALLS, check_format, parse
from rlrf.tools.outcomes import STATUSES, CallOutcome, Status, check
from rlrf.tools.schema import MAX_FAULTS, Fault, check_specs, validate
from rlrf.tools.specs import parameters_of
from rlrf.tools.values import MAX_DEPTH, MAX_DIGITS

__all__ = [
    "FORMATS",
    "INVALID",
    "MAX_CALLS",
    "MAX_DEPTH",
    "MAX_DIGITS",
    "MAX_FAULTS",
    "STATUSES",
    "Call",
    "CallOutcome",
    "Fault",
    "InvalidCall",
    "InvalidStatus",
    "Parsed",
    "Status",
    "check",
    "check_format",
    "check_specs",
    "parameters_of",
    "parse",
    "validate",
    "wire_calls",
]
