"""Tools: from the text of a reply to calls."""

from rlrf.tools.formats import ParsedCalls, parse_hermes, wire_calls

__all__ = ["ParsedCalls", "parse_hermes", "wire_calls"]
