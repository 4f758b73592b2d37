"""Tools as the OpenAI wire describes them, and values for a schema out of bare text.

It does not check arguments, nor whether a schema is one: :mod:`rlrf.tools.schema` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlrf.errors import UsageError
from rlrf.tools.values import ValueFault, read_json, skip

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "additionalProperties": False}
"""The schema of a tool that has none: on the OpenAI wire it takes no argument."""

_DEEPEST_REF = 8


def parameters_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schema of each tool's parameters, by its name.

    Args:
        tools: ``{"type": "function", "function": {"name", "parameters", ...}}`` each, or what
            stands under ``function`` alone.

    Raises:
        UsageError: a tool has another form, or two have one name.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise UsageError(
                f"tool {i} is {tool!r:.200}; a tool is "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
            )
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, Mapping):
            raise UsageError(
                f"the parameters of the tool {name!r} are {schema!r:.80}; they must be a JSON "
                "schema, as a mapping"
            )
        if name in found:
            raise UsageError(f"two tools have the name {name!r:.80}; each needs its own")
        found[name] = NO_PARAMETERS if schema is None else schema
    return found


class Converter:
    """Makes the texts of a call's parameters into what the schema of its tool asks for.

    A text becomes what it says as JSON (``True``, ``False`` and ``None`` too, which chat templates
    write) if the schema takes a value of that type. Otherwise it stays as it is, and so it does
    where the schema takes a string, is not known, or says nothing of types. ``null`` and ``None``
    are null wherever the schema takes that.
    """

    def __init__(self, schema: Mapping[str, Any] | None) -> None:
        self._root = schema or {}
        properties = self._root.get("properties")
        self._properties = properties if isinstance(properties, Mapping) else {}

    def __call__(self, name: str, text: str) -> Any:
        """The value of a parameter."""
        types = set(self._types(self._properties.get(name), _DEEPEST_REF))
        bare = text.strip()
        if "null" in types and bare in ("null", "None"):
            return None
        if not types or "string" in types:
            return text
        if "boolean" in types and bare in ("True", "False"):
            return bare == "True"
        try:
            value, end = read_json(text, 0, len(text))
        except ValueFault:
            return text
        fits = skip(text, end, len(text)) == len(text) and _is_of(value, types)
        return value if fits else text

    def _types(self, schema: Any, depth: int) -> Iterator[str]:
        """The types that a schema takes, as far as it says so."""
        if not isinstance(schema, Mapping) or not depth:
            return
        declared = schema.get("type")
        if isinstance(declared, str):
            yield declared
        elif isinstance(declared, Sequence):
            yield from (t for t in declared if isinstance(t, str))
        else:
            values = schema.get("enum", [schema["const"]] if "const" in schema else [])
            if isinstance(values, Sequence):
                yield from map(type_of, values)
            if isinstance(schema.get("$ref"), str):
                yield from self._types(self._target(schema["$ref"]), depth - 1)
            for key in ("anyOf", "oneOf", "allOf"):
                members = schema.get(key)
                for member in members if isinstance(members, Sequence) else ():
                    yield from self._types(member, depth - 1)

    def _target(self, ref: str) -> Any:
        """What a reference within the schema points to."""
        found: Any = self._root
        for part in ref.removeprefix("#").split("/")[1:] if ref.startswith("#") else ():
            part = part.replace("~1", "/").replace("~0", "~")
            found = found.get(part) if isinstance(found, Mapping) else None
        return found


def _is_of(value: Any, types: set[str]) -> bool:
    of = type_of(value)
    if of == "integer" and "number" in types:
        return True
    return of in types or (of == "number" and "integer" in types and float(value).is_integer())


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    for kind, name in _TYPES:
        if isinstance(value, kind):
            return name
    return "object"


_TYPES: tuple[tuple[Any, str], ...] = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    ((list, tuple), "array"),
)
