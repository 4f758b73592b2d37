"""Whether arguments fit a tool's schema, and what is wrong where they do not: :func:`validate`.

JSON Schema, draft 2020-12, by jsonschema; ``format`` only describes, as the draft has it by
default. Arguments come from a model, so what the standard checks would cost more than linear work
on, or would fetch, is done otherwise:

- a ``pattern`` is matched by an engine that never goes back (Rust's regex, which pydantic brings),
  so one with look-around or back-references is refused;
- a ``$ref`` leads within its schema or to the standard's own; nothing is fetched. How many are
  followed is bounded by the size of the arguments;
- ``unevaluatedProperties``, ``unevaluatedItems`` and ``$dynamicRef`` are refused;
- of what a branch of ``anyOf`` or ``oneOf`` finds wrong, no more than is told is kept.

It does not change arguments (no default is filled in, no type converted), and does not say whether
a schema is the one that its author meant.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlrf.errors import UsageError
from rlrf.tools.specs import parameters_of, type_of
from rlrf.tools.told import accepted, counted, near, shown, shown_name
from rlrf.tools.values import MAX_DEPTH, MAX_DIGITS

MAX_FAULTS = 20
"""Of one call: as many are told."""

_REFUSED = ("unevaluatedProperties", "unevaluatedItems", "$dynamicRef")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong in one place of the arguments.

    Attributes:
        pointer: the place, as a JSON pointer (RFC 6901); of a property that there may not be, its
            own; of one that is missing, that of its object.
        keyword: of the schema, which it violates; ``depth`` or ``value`` where the arguments are
            nothing that can be checked.
        message: the value and what is accepted, for the model; at most some hundred characters.
    """

    pointer: str
    keyword: str
    message: str


def validate(schema: Mapping[str, Any], arguments: Any) -> tuple[Fault, ...]:
    """What is wrong with the arguments of a call; empty if nothing is.

    Args:
        schema: of the tool's parameters.
        arguments: JSON data.

    Raises:
        UsageError: the schema is none.
    """
    checker = _checker(schema)
    values, fault = _unfit(arguments)
    if fault is not None:
        return (fault,)
    _left.references = 1_000 + 100 * values
    try:
        errors = list(itertools.islice(checker.iter_errors(arguments), MAX_FAULTS))
        found = itertools.chain.from_iterable(map(_faults, errors))
        return tuple(itertools.islice(found, MAX_FAULTS))
    except _TooMuchError:
        return (Fault("", "$ref", "the arguments are nested so that it takes too long to check"),)
    except RecursionError:
        raise UsageError(
            f"the schema {json.dumps(schema)[:200]} refers to itself without end; a $ref must lead "
            "to another schema, or to this one for a part of the value"
        ) from None


def check_specs(tools: Sequence[Mapping[str, Any]]) -> None:
    """See that tools are described as on the OpenAI wire, with schemas that can be checked.

    Raises:
        UsageError: a tool is not, or its schema is none.
    """
    for name, schema in parameters_of(tools).items():
        try:
            _checker(schema)
        except UsageError as error:
            raise UsageError(f"the tool {name!r:.80}: {error}") from None


# --- schemas ----------------------------------------------------------------------------------


def _checker(schema: Mapping[str, Any]) -> Any:
    """The validator of a schema, made once."""
    try:
        return _compiled(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"a schema is no JSON data: {error}") from None


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import SPECIFICATIONS

    schema, checker = json.loads(text), _checker_class()
    try:
        checker.check_schema(schema, format_checker=None)
    except SchemaError as error:
        place = _pointer(error.absolute_path) or "its root"
        raise UsageError(
            f"the schema {text:.200} is no JSON schema (draft 2020-12): at {place}: "
            f"{error.message:.200}"
        ) from None
    made = checker(schema, registry=SPECIFICATIONS)
    _check_supported(made, text)
    return made


def _check_supported(checker: Any, text: str) -> None:
    """Refuse what is not checked here: see the module."""
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    seen: set[int] = set()
    left = [(checker.schema, checker._resolver)]
    while left:
        schema, resolver = left.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        for keyword in _REFUSED:
            if keyword in schema:
                raise UsageError(
                    f"the schema {text:.200} has {keyword!r}, which is not checked here; say it "
                    "with properties, additionalProperties and $ref"
                )
        for pattern in (schema.get("pattern"), *schema.get("patternProperties", ())):
            if pattern is not None:
                _matcher(pattern)
        if "$ref" in schema:
            try:
                target = resolver.lookup(schema["$ref"])
            except Unresolvable:
                raise UsageError(
                    f"the schema {text:.200} refers to {schema['$ref']!r:.200}, which is not in "
                    "it; nothing is fetched, so put it under $defs"
                ) from None
            left.append((target.contents, target.resolver))
        resource = DRAFT202012.create_resource(schema)
        left += [(r.contents, resolver.in_subresource(r)) for r in resource.subresources()]


@functools.lru_cache(maxsize=1024)
def _matcher(pattern: str) -> Any:
    """What says whether a pattern is found in a string, in linear time."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        matcher = SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True))
    except SchemaError as error:
        raise UsageError(
            f"the pattern {pattern!r:.200} cannot be matched in linear time, or is none "
            f"(look-around and back-references cannot): {str(error).splitlines()[-1]:.200}"
        ) from None
    return matcher.isinstance_python


class _TooMuchError(Exception):
    """More references were followed than arguments of that size call for."""


_left = threading.local()


@functools.cache
def _checker_class() -> Any:
    """Draft 2020-12, with what must cost no more than linear work."""
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend

    follow = Draft202012Validator.VALIDATORS["$ref"]

    def ref(validator: Any, target: Any, instance: Any, schema: Any) -> Any:
        _left.references -= 1
        if _left.references < 0:
            raise _TooMuchError
        return follow(validator, target, instance, schema)

    def pattern(validator: Any, wanted: str, instance: Any, schema: Any) -> Iterator[Any]:
        if isinstance(instance, str) and not _matcher(wanted)(instance):
            yield ValidationError("")

    def pattern_properties(validator: Any, by: Any, instance: Any, schema: Any) -> Iterator[Any]:
        for wanted, inner in by.items() if isinstance(instance, dict) else ():
            for name, value in instance.items():
                if _matcher(wanted)(name):
                    yield from validator.descend(value, inner, path=name, schema_path=wanted)

    def properties(validator: Any, by: Any, instance: Any, schema: Any) -> Iterator[Any]:
        for name, inner in by.items() if isinstance(instance, dict) else ():
            if name in instance and inner is False:  # jsonschema would not say where
                yield ValidationError("", validator="false", path=[name], instance=instance[name])
            elif name in instance:
                yield from validator.descend(instance[name], inner, path=name, schema_path=name)

    def additional(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[Any]:
        known, patterns = schema.get("properties", ()), schema.get("patternProperties", ())
        for name, value in instance.items() if isinstance(instance, dict) else ():
            if name in known or any(_matcher(wanted)(name) for wanted in patterns):
                continue
            if inner is False:
                yield ValidationError("", path=[name])
            else:
                yield from validator.descend(value, inner, path=name)

    def unique(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[Any]:
        if wanted and isinstance(instance, list):
            different = {json.dumps(_plain(item), sort_keys=True) for item in instance}
            if len(different) < len(instance):
                yield ValidationError("")

    def required(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        for name in wanted if isinstance(instance, dict) else ():
            if name not in instance:
                yield ValidationError(name)

    def branches(validator: Any, inner: Any, instance: Any, one: bool) -> Iterator[Any]:
        wrong: list[Any] = []
        fitting = 0
        for i, branch in enumerate(inner):
            errors = validator.descend(instance, branch, schema_path=i)
            told = list(itertools.islice(errors, MAX_FAULTS))
            fitting += not told
            wrong += told
            if fitting == 1 + one:
                break
        if not fitting:
            yield ValidationError("", context=wrong)
        elif fitting > 1:
            yield ValidationError("")

    return extend(
        Draft202012Validator,
        {
            "$ref": ref,
            "properties": properties,
            "pattern": pattern,
            "patternProperties": pattern_properties,
            "additionalProperties": additional,
            "uniqueItems": unique,
            "required": required,
            "anyOf": lambda v, inner, instance, schema: branches(v, inner, instance, False),
            "oneOf": lambda v, inner, instance, schema: branches(v, inner, instance, True),
        },
    )


def _plain(value: Any) -> Any:
    """A JSON value that is written like those that are equal to it: 1.0 as 1."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value


def _unfit(arguments: Any) -> tuple[int, Fault | None]:
    """How many values there are, and what of them cannot be checked."""
    values, left = 0, [(arguments, 0)]
    while left:
        value, depth = left.pop()
        values += 1
        if depth > MAX_DEPTH:
            told = f"more than {MAX_DEPTH} arrays and objects are within each other"
            return values, Fault("", "depth", told)
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            left += [(inner, depth + 1) for inner in value]
        elif value is not None and not isinstance(value, (str, bool)) and not _is_number(value):
            told = f"there is a {type(value).__name__} that is no JSON value"
            return values, Fault("", "value", told)
    return values, None


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < _TOO_LARGE


_TOO_LARGE = 10**MAX_DIGITS


# --- what is told -----------------------------------------------------------------------------


def _pointer(path: Iterable[str | int]) -> str:
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def _faults(error: Any) -> Iterator[Fault]:
    """What an error of jsonschema tells; for a choice of forms, what is wrong in the nearest."""
    pointer, keyword = _pointer(error.absolute_path), error.validator
    if keyword in ("anyOf", "oneOf") and error.context:
        branches = _branches(error)
        nearest = _nearest(branches, len(error.absolute_path))
        told = _told_apart(branches) if nearest is None else None
        for inner in nearest or ():
            yield from _faults(inner)
        if told is not None:
            yield told
        if told is not None or nearest is not None:
            return
    yield Fault(pointer, keyword or "false", _message(error)[:400])  # None: of the schema false


def _branches(error: Any) -> list[list[Any]]:
    """What each branch of a choice finds wrong."""
    found: dict[Any, list[Any]] = {}
    for inner in error.context:
        branch = next(iter(inner.relative_schema_path), None)  # none of the schema false
        found.setdefault(branch, []).append(inner)
    return list(found.values())


def _nearest(branches: list[list[Any]], depth: int) -> list[Any] | None:
    """The errors of the only branch that the value may have been meant for; None if none is."""
    meant = [
        errors
        for errors in branches
        if not any(
            inner.validator in ("type", "enum", "const") and len(inner.absolute_path) == depth
            for inner in errors
        )
    ]
    if len(meant) > 1:  # forms that a property tells apart
        meant = [errors for errors in meant if all(e.validator != "const" for e in errors)]
    return meant[0] if len(meant) == 1 else None


def _told_apart(branches: list[list[Any]]) -> Fault | None:
    """That a property has none of the values by which the branches are told apart."""
    named = [next((e for e in errors if e.validator == "const"), None) for errors in branches]
    first = named[0]
    if first is None or any(e is None or e.absolute_path != first.absolute_path for e in named):
        return None
    told = _not_accepted(first.instance, [e.validator_value for e in named if e is not None])
    return Fault(_pointer(first.absolute_path), "const", told[:400])


def _not_accepted(value: Any, values: Sequence[Any]) -> str:
    hint = near(value, [v for v in values if isinstance(v, str)])
    return f"{shown(value)} is not accepted{hint}; accepted: {accepted(values)}"


def _message(error: Any) -> str:
    value, keyword, wanted = error.instance, error.validator, error.validator_value
    if keyword in ("anyOf", "oneOf"):
        return _of_choice(error)
    if keyword == "type":
        types = [wanted] if isinstance(wanted, str) else wanted
        of = f" is of type {type_of(value)}" if isinstance(value, (str, int, float)) else ""
        return f"{shown(value)}{of}; accepted: {', '.join(types)}"
    if keyword == "required":
        return f"the property {shown_name(error.message)} is missing"
    if keyword == "additionalProperties":
        name, known = str(error.path[-1]), list(error.schema.get("properties", ()))
        hint = near(name, known)
        return f"there is no property {shown_name(name)}{hint}; accepted: {accepted(known)}"
    if keyword in ("enum", "const"):
        return _not_accepted(value, wanted if keyword == "enum" else [wanted])
    if keyword == "pattern":
        return f"{shown(value)} does not match the pattern {str(wanted)[:120]}"
    if keyword == "uniqueItems":
        return f"{shown(value)}, two of which are equal; accepted: different ones"
    if keyword in _LIMITS:
        has = f" has {counted(len(value), 'character')}" if isinstance(value, str) else ""
        return f"{shown(value)}{has}; accepted: {_LIMITS[keyword]} {wanted}"
    if keyword in (None, "false"):
        return f"{shown(value)} stands where nothing is accepted"
    return f"{shown(value)} does not meet {keyword}: {json.dumps(wanted)[:120]}"


_LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "more than",
    "exclusiveMaximum": "less than",
    "multipleOf": "multiples of",
    "minLength": "at least",
    "maxLength": "at most",
    "minItems": "at least",
    "maxItems": "at most",
    "minProperties": "at least",
    "maxProperties": "at most",
}


def _of_choice(error: Any) -> str:
    """Why a value fits none of several forms, or several where it may fit one."""
    value = shown(error.instance)
    if not error.context:
        return f"{value} fits more than one of the forms of oneOf; accepted: exactly one"
    forms: list[str] = []
    for inner in error.context:
        at_root = len(inner.absolute_path) == len(error.absolute_path)
        if inner.validator == "type" and at_root:
            types = inner.validator_value
            forms += [types] if isinstance(types, str) else types
        elif inner.validator in ("enum", "const") and at_root:
            values = inner.validator_value if inner.validator == "enum" else [inner.validator_value]
            forms.append(accepted(values))
    if forms:
        return f"{value} is not accepted; accepted: {', '.join(dict.fromkeys(forms))}"
    first = next(_faults(error.context[0]))
    return f"{value} fits none of the forms of {error.validator}; of the first: {first.message}"
