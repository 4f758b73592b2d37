"""Arguments against schemas: what is told, what is never fetched, and what becomes of a call."""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from rlrf import UsageError, tools
from rlrf.tools import MAX_DEPTH, MAX_FAULTS, STATUSES, Call, InvalidCall, check, validate
from tests.test_tools import BROKEN, VALUES

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "child": {"$ref": "#/$defs/person"}},
    "required": ["name"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2, "maxLength": 20, "pattern": "^[A-Z]"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 3},
        "who": {"$ref": "#/$defs/person"},
        "v": {"const": 2},
        "step": {"type": "number", "multipleOf": 0.5, "exclusiveMaximum": 5},
        "shape": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": k}, "size": {"type": "integer"}},
                    "required": ["kind", "size"],
                }
                for k in ("circle", "square")
            ]
        },
        "either": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        "never": False,
        "meta": {
            "type": "object",
            "patternProperties": {"^x-": {"type": "integer"}},
            "additionalProperties": {"type": "string"},
            "propertyNames": {"maxLength": 5},
            "minProperties": 1,
        },
        "has": {"contains": {"type": "integer"}},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"person": PERSON},
}
CITY = {"city": "Bonn"}


@pytest.mark.parametrize(
    ("arguments", "pointer", "keyword", "message"),
    [
        ([], "", "type", "[]; accepted: object"),
        (None, "", "type", "null; accepted: object"),
        ({}, "", "required", 'the property "city" is missing'),
        ({"city": 3}, "/city", "type", "3 is of type integer; accepted: string"),
        ({"city": "B"}, "/city", "minLength", '"B" has 1 character; accepted: at least 2'),
        ({"city": "b" * 3}, "/city", "pattern", '"bbb" does not match the pattern ^[A-Z]'),
        (
            {**CITY, "citty": 1},
            "/citty",
            "additionalProperties",
            'there is no property "citty"; did you mean "city"?; accepted: "city", "unit", "days", '
            '"tags", "who", "v", "step", "shape", "either", "never", "meta", "has"',
        ),
        (
            {**CITY, "unit": "Celsius"},
            "/unit",
            "enum",
            '"Celsius" is not accepted; did you mean "celsius"?; accepted: "celsius", "fahrenheit"',
        ),
        (
            {**CITY, "unit": 5},
            "/unit",
            "enum",
            '5 is not accepted; accepted: "celsius", "fahrenheit"',
        ),
        ({**CITY, "v": 3}, "/v", "const", "3 is not accepted; accepted: 2"),
        ({**CITY, "v": True}, "/v", "const", "true is not accepted; accepted: 2"),
        ({**CITY, "days": 0}, "/days", "minimum", "0; accepted: at least 1"),
        ({**CITY, "days": "3"}, "/days", "anyOf", '"3" is not accepted; accepted: integer, null'),
        ({**CITY, "days": True}, "/days", "anyOf", "true is not accepted; accepted: integer, null"),
        ({**CITY, "tags": ["a", 1]}, "/tags/1", "type", "1 is of type integer; accepted: string"),
        (
            {**CITY, "tags": ["a", "b", "a"]},
            "/tags",
            "uniqueItems",
            "an array of 3 items, two of which are equal; accepted: different ones",
        ),
        (
            {**CITY, "tags": list("abcd")},
            "/tags",
            "maxItems",
            "an array of 4 items; accepted: at most 3",
        ),
        (
            {**CITY, "who": {"name": "x", "child": {}}},
            "/who/child",
            "required",
            'the property "name" is missing',
        ),
        ({**CITY, "step": 0.3}, "/step", "multipleOf", "0.3; accepted: multiples of 0.5"),
        ({**CITY, "step": 5}, "/step", "exclusiveMaximum", "5; accepted: less than 5"),
        (
            {**CITY, "shape": {"kind": "square", "size": "big"}},
            "/shape/size",
            "type",
            '"big" is of type string; accepted: integer',
        ),
        (
            {**CITY, "shape": {"kind": "cube"}},
            "/shape/kind",
            "const",
            '"cube" is not accepted; accepted: "circle", "square"',
        ),
        ({**CITY, "shape": 1}, "/shape", "oneOf", "1 is not accepted; accepted: object"),
        (
            {**CITY, "either": 1},
            "/either",
            "oneOf",
            "1 fits more than one of the forms of oneOf; accepted: exactly one",
        ),
        ({**CITY, "never": 1}, "/never", "false", "1 stands where nothing is accepted"),
        (
            {**CITY, "meta": {"x-a": "1"}},
            "/meta/x-a",
            "type",
            '"1" is of type string; accepted: integer',
        ),
        (
            {**CITY, "meta": {"a~/b": 1}},
            "/meta/a~0~1b",
            "type",
            "1 is of type integer; accepted: string",
        ),
        (
            {**CITY, "meta": {"toolong": "1"}},
            "/meta",
            "maxLength",
            '"toolong" has 7 characters; accepted: at most 5',
        ),
        ({**CITY, "meta": {}}, "/meta", "minProperties", "{}; accepted: at least 1"),
        (
            {**CITY, "has": ["a"]},
            "/has",
            "contains",
            'an array of 1 item does not meet contains: {"type": "integer"}',
        ),
    ],
)
def test_a_fault_tells_the_place_the_value_and_what_is_accepted(
    arguments, pointer, keyword, message
):
    (fault,) = validate(SCHEMA, arguments)
    assert (fault.pointer, fault.keyword, fault.message) == (pointer, keyword, message)


def test_what_fits_has_no_faults():
    whole = {
        **CITY,
        "unit": "celsius", "days": None, "tags": ["1", "true"], "v": 2.0, "step": 1.5,
        "who": {"name": "x", "child": {"name": "y"}}, "shape": {"kind": "circle", "size": 1.0},
        "either": 1.5, "meta": {"x-a": 1, "b": "c"}, "has": ["a", 1],
    }  # fmt: skip
    assert validate(SCHEMA, whole) == ()
    assert validate({}, {"anything": [1]}) == ()
    assert validate({"uniqueItems": True}, [1, True, "1", [1], [True], {"a": 1}, None]) == ()
    assert validate({"uniqueItems": True}, [{"a": 1, "b": [2.0]}, {"b": [2], "a": 1.0}])


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(VALUES)
def test_the_verdict_is_that_of_jsonschema(value):
    arguments = {"city": value, "tags": value, "who": value, "meta": value, "days": value}
    for schema in (SCHEMA, {"properties": {"tags": {"uniqueItems": True}}}):
        fits = Draft202012Validator(schema).is_valid(arguments)
        assert (validate(schema, arguments) == ()) == fits


def test_faults_are_bounded_in_number_and_length():
    long = "x" * 10**4
    wrong = {"city": 1, "tags": [1] * 1000, **{f"k{i}": long for i in range(99)}, long: long}
    faults = validate(SCHEMA, wrong)
    assert len(faults) == MAX_FAULTS
    assert all(len(f.message) <= 400 for f in faults)
    every = {
        "enum": [long + "!", *map(str, range(100))],
        "anyOf": [{"const": long}] * 20,
        "pattern": "a" * 500,
    }
    for value in (long, [long] * 99, {long: long}):
        for schema in (
            every,
            {"anyOf": [every] * 20},
            {"properties": {long: every}, "required": [long]},
        ):
            faults = validate({**schema, "additionalProperties": False}, value)
            assert len(faults) <= MAX_FAULTS
            assert all(len(f.message) <= 400 for f in faults)
    outcome = check(Call(long, {}), [spec("f")])
    assert len(outcome.message) < 500
    assert len(check(Call("f", wrong), [spec("f", SCHEMA)]).message) < 2000


@pytest.mark.slow
def test_the_same_faults_whatever_the_hash_seed():
    code = (
        "from rlrf.tools import validate; schema = {'additionalProperties': False}\n"
        "print(validate(schema, {f'k{i}': i for i in range(9)}))\n"
        "schema = {'additionalProperties': {'type': 'string'}}\n"
        "print(validate(schema, {f'k{i}': i for i in range(9)}))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            env={"PYTHONHASHSEED": seed},
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "no JSON schema.* at /type: 'strin'"),
        ({"properties": {"a": 3}}, "at /properties/a: 3"),
        ({"required": "a"}, "at /required"),
        ({"pattern": "(?=a)b"}, "linear time.*look-around"),
        ({"properties": {"a": {"pattern": r"(a)\1"}}}, "linear time.*backreferences"),
        ({"patternProperties": {"(": {}}}, r"the pattern '\('.*unclosed group"),
        ({"$defs": {"a": {"items": {"pattern": "("}}}}, "unclosed group"),
        (
            {"$ref": "https://example.com/s.json"},
            "'https://example.com/s.json', which is not in it",
        ),
        ({"$ref": "#/$defs/none"}, "'#/.defs/none', which is not in it; nothing is fetched"),
        ({"allOf": [{"properties": {"a": {"$ref": "other"}}}]}, "'other', which is not in it"),
        ({"unevaluatedProperties": False}, "'unevaluatedProperties', which is not checked here"),
        ({"items": {"unevaluatedItems": False}}, "'unevaluatedItems'"),
        ({"$dynamicRef": "#a"}, "'.dynamicRef'"),
        ({"$ref": "#"}, "refers to itself without end"),
        ({"allOf": [{"$ref": "#"}]}, "refers to itself without end"),
        ({"a": object()}, "no JSON data"),
        ({"default": math.nan}, "no JSON data"),
    ],
)
def test_a_bad_schema_is_its_authors(schema, message, monkeypatch):
    def no_network(*_):
        raise AssertionError("the network is not asked")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        validate(schema, {"a": [1]})
    with pytest.raises(UsageError, match=f"(?s)the tool 'f': .*{message}"):
        check(Call("f", {"a": [1]}), [spec("f", schema)])
    if "without end" not in message:  # which shows only on a value
        with pytest.raises(UsageError, match=f"(?s)the tool 'f': .*{message}"):
            tools.check_specs([spec("f", schema)])


def test_no_arguments_make_a_check_take_long():
    bombs = {"^(a+)+$": "a" * 9_000 + "!", "(x+x+)+y": "x" * 9_000, "^(.*)*$\n": "y" * 9_000}
    for pattern, text in bombs.items():
        assert validate({"properties": {"a": {"pattern": pattern}}}, {"a": text})
        by_name = {"patternProperties": {pattern: {}}, "additionalProperties": False}
        assert validate(by_name, {text: 1})
    assert not validate({"uniqueItems": True}, [{"a": i} for i in range(9_000)])
    # Two branches at each level, each of which looks at all below it.
    ref = {"properties": {"a": {"$ref": "#"}}}
    value = {}
    for _ in range(MAX_DEPTH):
        value = {"a": value}
    (fault,) = validate({"anyOf": [{**ref, "required": ["b"]}, {**ref, "required": ["c"]}]}, value)
    assert fault.keyword == "$ref"
    # A schema that refers to itself is no trouble as such, in any thread.
    list_of = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    found = []
    thread = threading.Thread(target=lambda: found.append(validate(list_of, value)))
    thread.start()
    thread.join()
    assert found == [()]
    assert validate(list_of, {"a": {"a": {"b": 1}}})[0].pointer == "/a/a/b"


def test_arguments_that_are_no_json_are_told_of():
    deep = 1
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    for bad, keyword in (
        (deep, "depth"),
        (math.nan, "value"),
        (10**400, "value"),
        ((1,), "value"),
        ({1: 2}, "value"),
        (object(), "value"),
    ):
        (fault,) = validate({}, {"a": bad})
        assert (fault.pointer, fault.keyword) == ("", keyword)


# --- what becomes of a call -------------------------------------------------------------------


def spec(name, schema=None):
    function = {"name": name} if schema is None else {"name": name, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [spec("get_weather", SCHEMA), spec("now"), {"name": "bare", "parameters": {}}]


def test_one_call_has_one_outcome():
    good = check(Call("get_weather", CITY), TOOLS)
    assert (good.status, good.ok, good.message, good.name) == ("ok", True, "", "get_weather")
    assert good.arguments == CITY
    assert check(Call("now", {}), TOOLS).ok
    assert check(Call("bare", {"x": 1}), TOOLS).ok
    # Without parameters a tool takes no argument.
    assert check(Call("now", {"x": 1}), TOOLS).status == "schema_error"
    unknown = check(Call("get_wether", CITY), TOOLS)
    assert unknown.status == "unknown_tool"
    assert unknown.message == (
        'there is no tool "get_wether"; did you mean "get_weather"?; '
        'the tools are: "get_weather", "now", "bare"'
    )
    assert check(Call("f", {}), []).message == 'there is no tool "f"; the tools are: none'
    wrong = check(
        Call("get_weather", {"city": 1, "unit": "k", "v": 1, "step": 9, "days": 0}), TOOLS
    )
    assert (wrong.status, len(wrong.faults)) == ("schema_error", 5)
    assert wrong.message == (
        'the arguments of "get_weather" do not fit: '
        "/city: 1 is of type integer; accepted: string; "
        '/unit: "k" is not accepted; accepted: "celsius", "fahrenheit"; '
        "/days: 0; accepted: at least 1; and 2 more"
    )
    assert wrong.arguments["city"] == 1


def test_calls_of_messages_are_checked_as_they_are():
    def wire(name, arguments):
        return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}

    assert check(wire("get_weather", json.dumps(CITY)), TOOLS).arguments == CITY
    assert check(wire("get_weather", CITY), TOOLS).ok
    assert check({"name": "now", "arguments": " {} "}, TOOLS).ok
    for name, arguments, why in (
        ("now", "{", "unclosed"),
        ("now", "{} {}", "invalid_json"),
        ("now", '{"a": NaN}', "invalid_json"),
        ("now", "", "unclosed"),
        ("now", "[]", "malformed"),
        ("now", None, "malformed"),
        ("", "{}", "missing_name"),
        (None, "{}", "missing_name"),
    ):
        outcome = check(wire(name, arguments), TOOLS)
        assert (outcome.status, outcome.arguments) == ("parse_error", None)
        assert f"({why})" in outcome.message
    for format, text, status in BROKEN:
        found = tools.parse(text, format)
        (told,) = found.message()["invalid_tool_calls"]
        assert check(told, TOOLS) == check(found.invalid[0], TOOLS)
        assert f"({status}) and was not executed: {found.invalid[0].why}" in check(told, ()).message
    for bad in ("now", {}, None, {"status": "x"}):
        with pytest.raises(UsageError, match="is no call"):
            check(bad, TOOLS)


def test_the_vocabulary_is_complete_and_told():
    assert list(STATUSES) == [
        "ok", "parse_error", "unknown_tool", "schema_error", "precondition_error", "tool_exception",
        "timeout", "rate_limited", "policy_violation", "repeated_refusal",
    ]  # fmt: skip
    assert all(STATUSES.values())
    assert check(InvalidCall("unclosed", "x", (0, 1), "y"), []).status in STATUSES


def test_the_page_lists_every_format_and_status():
    page = (Path(__file__).parents[1] / "docs" / "tools.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    policies = ["hf", "openai"]
    assert listed == [*tools.FORMATS, *tools.INVALID, *STATUSES, *policies]


def test_tools_need_no_jsonschema_until_arguments_are_checked():
    code = (
        "import sys, rlrf.tools as t; t.parse('x', 'json', [{'name': 'f'}]); "
        "print('jsonschema' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
