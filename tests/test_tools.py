"""Calls in text: each format reads what its family writes, and whatever else looks like a call is
told of and never executed."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrf import UsageError, tools
from rlrf.messages import is_message
from rlrf.policy import Completion
from rlrf.tools import FORMATS, INVALID, MAX_CALLS, MAX_DEPTH, parse

# --- how each family writes calls: as its chat template does -----------------------------------


def dumped(name, arguments, key="arguments"):
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


def xml(name, arguments):
    def text(value):
        return json.dumps(value) if isinstance(value, (dict, list)) else str(value)

    inner = "".join(f"<parameter={k}>\n{text(v)}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def pythonic(name, arguments):
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


WRITERS = {
    "hermes": (
        "hermes_json",
        lambda calls: "\n".join(f"<tool_call>\n{dumped(*c)}\n</tool_call>" for c in calls),
    ),
    "qwen3-coder": ("qwen3_coder_xml", lambda calls: "\n".join(xml(*c) for c in calls)),
    "llama-3": ("llama_json", lambda calls: "; ".join(dumped(*c, "parameters") for c in calls)),
    "llama-3 tag": (
        "llama_json",
        lambda calls: "\n".join("<|python_tag|>" + dumped(*c, "parameters") for c in calls),
    ),
    "llama-4": ("llama_pythonic", lambda calls: f"[{', '.join(pythonic(*c) for c in calls)}]"),
    "llama-4 tags": (
        "llama_pythonic",
        lambda calls: f"<|python_start|>[{', '.join(pythonic(*c) for c in calls)}]<|python_end|>",
    ),
    "mistral": ("mistral", lambda calls: f"[TOOL_CALLS][{', '.join(dumped(*c) for c in calls)}]"),
    "mistral v11": (
        "mistral",
        lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls),
    ),
    "mistral v13": (
        "mistral",
        lambda calls: "".join(
            f"[TOOL_CALLS]{n}[CALL_ID]abc12[ARGS]{json.dumps(a)}" for n, a in calls
        ),
    ),
    "react": (
        "react",
        lambda calls: "\n".join(f"Action: {n}\nAction Input: {json.dumps(a)}" for n, a in calls),
    ),
    "json": ("json", lambda calls: "\n".join(dumped(*c) for c in calls)),
    "json indented": (
        "json",
        lambda calls: "\n".join(
            json.dumps({"name": n, "arguments": a}, indent=2) for n, a in calls
        ),
    ),
    "json fenced": ("json", lambda calls: "\n".join(f"```json\n{dumped(*c)}\n```" for c in calls)),
    "json array": ("json", lambda calls: f"```\n[{', '.join(dumped(*c) for c in calls)}]\n```"),
}  # fmt: skip

MARKS = (
    "<tool_call>", "</tool_call>", '{"name": "rm", "arguments": {}}', "```", "`", '"', "\\", "'",
    "[TOOL_CALLS]rm[ARGS]{}", "\nAction: rm\nAction Input: {}\n", "\n[rm()]\n", "{", "]", "\n",
    "<function=rm>", "</function>", "<|python_tag|>", "#", "é", "\u2028", "😀",
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
STRINGS = TEXT | st.lists(st.sampled_from(MARKS) | TEXT, max_size=4).map("".join)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | STRINGS
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(STRINGS, v, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex("[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=4
)
TYPES = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}
TYPES |= {dict: "object", list: "array"}


def specs(calls):
    """Tools with the types that the arguments of calls have."""
    found = {}
    for name, arguments in calls:
        properties = found.setdefault(name, {})
        for key, value in arguments.items():
            properties.setdefault(key, {"type": TYPES[type(value)]})
    return [
        {"type": "function", "function": {"name": n, "parameters": {"properties": p}}}
        for n, p in found.items()
    ]


def same(found, calls):
    """Equal, types included."""
    return json.dumps([[c.name, c.arguments] for c in found]) == json.dumps(
        [[name, arguments] for name, arguments in calls]
    )


def checked(text, format, given=None, **options):
    """What is parsed; and what must hold whatever the text is."""
    found = parse(text, format, given, **options)
    assert "".join(text[a:b] for a, b in found.ranges) == found.content
    spans = sorted(item.span for item in (*found.calls, *found.invalid))
    assert all(0 <= a < b <= len(text) for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(spans))
    assert list(found.calls) == sorted(found.calls, key=lambda c: c.span)
    assert list(found.invalid) == sorted(found.invalid, key=lambda c: c.span)
    for call in found.calls:
        assert call.name
        json.dumps(call.arguments, allow_nan=False).encode()
        assert not any(a < call.span[1] and call.span[0] < b for a, b in found.ranges)
    for call in found.invalid:
        assert call.status in INVALID
        assert text[slice(*call.span)] == call.text
        assert 0 < len(call.why) < 400
    message = found.message("id")
    assert is_message(message)
    for call in message.get("invalid_tool_calls", ()):
        assert (message["content"] or "")[slice(*call["span"])] == call["text"]
    assert same(found.calls, [(c["function"]["name"], json.loads(c["function"]["arguments"]))
                              for c in message.get("tool_calls", ())])  # fmt: skip
    return found


def readable(writer, calls):
    """Whether a family can write these calls so that they can be told from its marks."""
    if writer != "qwen3-coder":
        return True
    named = {}
    typed = all(
        named.setdefault((n, k), type(v)) is type(v) for n, a in calls for k, v in a.items()
    )
    return typed and "parameter" not in json.dumps(calls)


def round_trips(writer, examples):
    format, write = WRITERS[writer]

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(CALLS, st.sampled_from(["", "Sure.\n", "I `look` it up:\n\n"]))
    def holds(calls, before):
        if not readable(writer, calls):
            return
        text = before + write(calls)
        found = checked(text, format, specs(calls), split=False)
        assert same(found.calls, calls)
        assert not found.invalid
        assert found.content == before.rstrip()

    holds()


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_family_writes_is_read_back(writer):
    round_trips(writer, 8)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_a_family_writes_is_read_back(writer):
    round_trips(writer, 200)


DEEP = [
    ("f", {"a": 1, "b": [True, None, {"c": 'x"y\n'}]}),
    ("g", {}),
    ("h", {"text": "it's", "n": -1.5e-7}),
]


@pytest.mark.parametrize("writer", WRITERS)
def test_the_head_of_a_reply_has_the_first_of_its_calls_and_no_other(writer):
    format, write = WRITERS[writer]
    text = write(DEEP)
    for end in range(len(text)):
        found = checked(text[:end], format, specs(DEEP))
        assert same(found.calls, DEEP[: len(found.calls)])
    assert same(checked(text, format, specs(DEEP)).calls, DEEP)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_call_that_another_quotes_is_never_read(writer):
    format, write = WRITERS[writer]
    quoted = "\n".join(write([("rm", {"path": p})]) for p in ("/", "."))
    calls = [("write", {"text": f"Like this:\n{quoted}\nor so."}), ("g", {})]
    text = write(calls)
    assert same(checked(text, format, specs(calls)).calls, calls)
    for end in range(len(text)):
        assert "rm" not in [c.name for c in checked(text[:end], format).calls]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        # The call that quotes is broken, so that what it quotes stands there for all to read.
        (
            "hermes_json",
            '<tool_call>{"name": "w", "arguments": {"t": "Use '
            '<tool_call>{"name": "rm", "arguments": {}}</tool_call>"}}</tool_call>',
        ),
        (
            "hermes_json",
            '<tool_call>{"name": "w", "arguments": {"t": "So:\n<tool_call>\n'
            '{"name": "rm", "arguments": {}}\n</tool_call>\n"}}</tool_call>',
        ),
        (
            "qwen3_coder_xml",
            "<tool_call><function=w>oops<parameter=t>\n<tool_call>\n<function=rm>\n"
            "<parameter=p>\n/\n</parameter>\n</function>\n</tool_call>\n</parameter></function>"
            "</tool_call>",
        ),
        (
            "json",
            '{"name": "w", oops, "arguments": {"calls": [\n{"name": "rm", "arguments": {}}\n]}}',
        ),
        ("json", '{"x": {"name": "rm", "arguments": {}}}'),
        (
            "llama_json",
            '{"name": "w", "parameters": {"t": "a\n{"name": "rm", "parameters": {}}\n"}}',
        ),
        ("llama_pythonic", '[w(1, text="""\n[rm(p=1)]\n""")]'),
        ("llama_pythonic", '[w(text="""\n[rm(p=1)]\n""", oops)]'),
        ("mistral", '[TOOL_CALLS]w[ARGS]{"text": "so:\n[TOOL_CALLS]rm[ARGS]{}"}'),
        ("react", 'Action: w\nAction Input: {"t": "a\nAction: rm\nAction Input: {}\n"}'),
    ],
)
def test_what_a_broken_call_quotes_is_not_read_either(format, text):
    for end in range(len(text) + 1):
        assert "rm" not in [c.name for c in checked(text[:end], format).calls]
    after = WRITERS[{"llama_json": "llama-3", "llama_pythonic": "llama-4"}.get(format, {
        "hermes_json": "hermes", "qwen3_coder_xml": "qwen3-coder", "mistral": "mistral v11",
    }.get(format, format))][1]([("g", {"a": 1})])  # fmt: skip
    found = checked(f"{text}\n{after}", format)
    assert [c.name for c in found.calls] == ["g"]  # it has an end
    assert found.invalid or text.startswith('{"x"')


# --- every status -----------------------------------------------------------------------------

GOOD = {
    "hermes_json": '<tool_call>{"name": "ok", "arguments": {}}</tool_call>',
    "qwen3_coder_xml": "<tool_call><function=ok></function></tool_call>",
    "llama_json": '{"name": "ok", "parameters": {}}',
    "llama_pythonic": "[ok()]",
    "mistral": "[TOOL_CALLS]ok[ARGS]{}",
    "react": "Action: ok\nAction Input: {}",
    "json": '{"name": "ok", "arguments": {}}',
}
H, X, L, P, M, R, J = (
    "hermes_json", "qwen3_coder_xml", "llama_json", "llama_pythonic", "mistral", "react", "json",
)  # fmt: skip
F = "<tool_call><function=f>"
E = "</function></tool_call>"
BROKEN = [
    (H, '<tool_call>{"name": "f", "arguments": {"n": 1}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"n": 1}}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {}} so</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {}}\u2028</tool_call>', "invalid_json"),
    (H, "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>", "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 1}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": "\\q"}}</tool_call>', "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', "invalid_json"),
    (H, f'<tool_call>{{"name": "f", "arguments": [{"9" * 309}]}}</tool_call>', "invalid_json"),
    (H, f'<tool_call>{{"name": "f", "arguments": {{"a": {"[" * 99}</tool_call>', "invalid_json"),
    (H, "<tool_call></tool_call>", "invalid_json"),
    (H, '<tool_call>{"name": "f", "arguments": {}}', "unclosed"),
    (H, "<tool_call>", "unclosed"),
    (H, '<tool_call>{"arguments": {}}</tool_call>', "missing_name"),
    (H, '<tool_call>{"name": "", "arguments": {}}</tool_call>', "missing_name"),
    (H, '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>', "missing_name"),
    (H, '<tool_call>{"name": "f"}</tool_call>', "malformed"),
    (H, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "malformed"),
    (H, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "malformed"),
    (H, '<tool_call>{"name": "f", "parameters": {}}</tool_call>', "malformed"),
    (H, '<tool_call>["f"]</tool_call>', "malformed"),
    (H, "</tool_call>", "malformed"),
    (X, f"{F}<parameter=a>\n1\n</parameter></function>", "unclosed"),
    (X, f"{F}<parameter=a>\n1", "unclosed"),
    (X, f"{F}<parameter=a>\n1{E}", "malformed"),
    (X, f"{F}<parameter=a>1<parameter=b>2</parameter>{E}", "malformed"),
    (X, f"{F}<parameter=a>1</parameter><parameter=a>1</parameter>{E}", "malformed"),
    (X, f"{F}<parameter=>1</parameter>{E}", "malformed"),
    (X, f"{F}a=1{E}", "malformed"),
    (X, f"{F}</tool_call>", "malformed"),
    (X, '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "malformed"),
    (X, "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>", "malformed"),
    (X, f"<function=f>{E}", "malformed"),
    (X, "</tool_call>", "malformed"),
    (X, f"<tool_call><function= >{E}", "missing_name"),
    (L, '{"name": "f", "parameters": {"a": }}', "invalid_json"),
    (L, '<|python_tag|>{name: "f"}', "malformed"),
    (L, '<|python_tag|>{"x" 1}', "invalid_json"),
    (L, '{"name": "f", "parameters": {}}}', "invalid_json"),
    (L, '{"name": "f", "parameters": {}', "unclosed"),
    (L, '{"parameters": {}}', "missing_name"),
    (L, '{"type": "function", "function": {"name": "f", "parameters": {}}}', "missing_name"),
    (L, '{"name": "f"}', "malformed"),
    (L, '{"name": "f", "parameters": "a=1"}', "malformed"),
    (L, '{"name": "f", "parameters": {}, "arguments": {}}', "malformed"),
    (L, "<|python_tag|>print(1)", "malformed"),
    (P, "[f(1)]", "malformed"),
    (P, "[f(a=1, a=2)]", "malformed"),
    (P, "[f(a=true)]", "malformed"),
    (P, "[f(a=b)]", "malformed"),
    (P, "[f(a=1) g()]", "malformed"),
    (P, "[f(a=__import__('os').system('true'))]", "malformed"),
    (P, "[f(a=[x for x in y])]", "malformed"),
    (P, "[f(a={1, 2})]", "malformed"),
    (P, "[f(a={1: 2})]", "malformed"),
    (P, "[f(a=1e999)]", "malformed"),
    (P, "[f(a=007)]", "malformed"),
    (P, "[f(a='x\n')]", "malformed"),
    (P, "[f(a=f'x')]", "malformed"),
    (P, "[f(**{'a': 1})]", "malformed"),
    (P, f"[f(a={'[' * 99}{']' * 99})]", "malformed"),
    (P, "<|python_start|>f(a=1)<|python_end|>", "malformed"),
    (P, "[f(a=1", "unclosed"),
    (P, "[f(a='x", "unclosed"),
    (P, "[f(a=1)", "unclosed"),
    (P, "[(a=1)]", "missing_name"),
    (M, "[TOOL_CALLS]f[ARGS]{a}", "invalid_json"),
    (M, "[TOOL_CALLS] I mean", "invalid_json"),
    (M, '[TOOL_CALLS][{"name": "f", "arguments": {}},]', "invalid_json"),
    (M, "[TOOL_CALLS][]", "invalid_json"),
    (M, '[TOOL_CALLS]f[ARGS]{"a": 1', "unclosed"),
    (M, '[TOOL_CALLS][{"name": "f", "arguments": {}}', "unclosed"),
    (M, "[TOOL_CALLS]f", "unclosed"),
    (M, "[TOOL_CALLS][ARGS]{}", "missing_name"),
    (M, '[TOOL_CALLS]{"name": "f", "arguments": {}}', "missing_name"),
    (M, '[TOOL_CALLS][{"arguments": {}}]', "missing_name"),
    (M, "[TOOL_CALLS]f[ARGS][1]", "malformed"),
    (M, '[TOOL_CALLS][{"name": "f"}]', "malformed"),
    (M, "[TOOL_CALLS][3]", "malformed"),
    (R, "Action: f\nAction Input: a=1", "invalid_json"),
    (R, 'Action: f\nAction Input: {"a": 1} now', "invalid_json"),
    (R, 'Action: f\nAction Input: {"a": 1', "unclosed"),
    (R, "Action: f", "unclosed"),
    (R, "Action: f\nThought: hm", "malformed"),
    (R, "Action: f\nAction Input: [1]", "malformed"),
    (R, "Action Input: {}", "missing_name"),
    (R, "Action:\nAction Input: {}", "missing_name"),
    (J, '{"name": "f", "arguments": {"a": }}', "invalid_json"),
    (J, '{"name": "f", "arguments": {}}}', "invalid_json"),
    (J, '{"name": "f", "arguments": {"a": {"name": "g", "arguments": {}}', "unclosed"),
    (J, '```json\n{"name": "f", "arguments": {}}}\n```', "invalid_json"),
    (J, '[{"name": "f", "arguments": {}},]', "invalid_json"),
    (J, '{\n"name": "f",\n"arguments": {"x": 5"\n}\n}', "invalid_json"),
    (J, '{"name": "f", "arguments": {', "unclosed"),
    (J, '```json\n{"name": "f", "arguments": {"a": 1}\n```', "unclosed"),
    (J, '{"arguments": {}}', "missing_name"),
    (J, '{"function": {"name": "f", "arguments": {}}}', "missing_name"),
    (J, '{"name": "f"}', "malformed"),
    (J, '{"name": "f", "parameters": {}}', "malformed"),
    (J, '```json\n{"name": "f", "arguments": {}}\nprint(1)\n```', "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "status"), BROKEN)
def test_what_cannot_be_read_is_told_of(format, text, status):
    found = checked(text, format)
    assert [c.status for c in found.invalid] == [status]
    assert not found.calls
    assert found.content == text
    assert found.invalid[0].text.strip("`json\n") == text.strip("`json\n") or status == "malformed"
    # Beside good calls; one before it, and, where it has an end, one behind.
    before = checked(f"{GOOD[format]}\n{text}", format)
    assert [c.name for c in before.calls] == ["ok"]
    assert [c.status for c in before.invalid] == [status]
    if status != "unclosed" and not text.startswith(("<|python_tag|>", "[f(a='x\n")):
        after = checked(f"{text}\n{GOOD[format]}", format)
        assert [c.name for c in after.calls] == ["ok"]
        assert after.invalid[0].status == status
    # The same for who checks a call.
    outcome = tools.check(found.invalid[0], ())
    assert (outcome.status, outcome.ok) == ("parse_error", False)
    assert found.invalid[0].why in outcome.message


def test_every_status_of_every_format_is_tested():
    assert set(INVALID) == {status for _, _, status in BROKEN}
    for format in FORMATS:
        statuses = {status for f, _, status in BROKEN if f == format}
        assert statuses >= {"unclosed", "missing_name", "malformed"}


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (H, 'plain {"name": "f", "arguments": {}}'),
        (X, "plain </parameter>"),
        (L, '{"name": "Bob", "age": 3} and {x} and [1, {"a": 2}]'),
        (L, '```json\n{"name": "f", "parameters": {}}\n```'),
        (P, "see [f(a=1)] and [text](url)\n[1, 2]\n[(1, 2)]"),
        (M, "plain [TOOL] [ARGS]{}"),
        (R, "My Action: f\nInaction: 3"),
        (J, '{"name": "Bob", "age": 3} {"answer": 4} {} [{"a": 1}] {"x": {"name": "f"}}'),
        (J, '```python\n{"name": "f", "arguments": {}}\n```'),
        (J, '```json\n{"answer": 1}\n{"name": "f", "arguments": {}}\n```'),
        (J, '`{"name": "f", "arguments": {}}`'),
    ],
)
def test_what_is_no_call_is_text(format, text):
    found = checked(text, format)
    assert (found.calls, found.invalid, found.content) == ((), (), text)


# --- where no call is -------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "<think>\n{}\n</think>\nSo.",
        "{}\n</think>\nSo.",
        "<think>\n{}",
        "[THINK]{}[/THINK]",
        "So:\n```python\n{}\n```\n",
        "~~~text\n{}\n~~~",
        "1. a\n\n   ````xml\n{}\n```\n   ````",
    ],
)
def test_no_call_is_read_in_reasoning_and_in_shown_code(format, text):
    text = text.replace("{}", GOOD[format])
    for shown in (text, text.replace("ok", "")):  # nor is what is no call
        found = checked(shown, format)
        assert (found.calls, found.invalid) == ((), ())
    found = checked(f"{text}</think>\n{GOOD[format]}", format)
    assert [c.name for c in found.calls] == ["ok"]


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {P, R}))  # these begin a line
def test_no_call_is_read_between_backticks(format):
    good = GOOD[format]
    for text in (
        f"As `{good}` does.",
        f"As `` ` {good} `` does.",
        "A `<tool_call>` or `[TOOL_CALLS]`",
    ):
        found = checked(text, format)
        assert (found.calls, found.invalid, found.content) == ((), (), text)
        assert len(checked(f"{text} Now: {good}", format).calls) == 1
    # A backtick that nothing closes on its line hides nothing.
    assert len(checked(f"a ` {good}\nb ` c", format).calls) == 1
    assert len(checked(f"```\n{good}", format).calls) == 1


def test_a_call_that_is_not_wholly_in_code_is_no_code():
    call = '<tool_call>{"name": "f", "arguments": {"t": "a ` b"}}</tool_call>'
    assert len(checked(f"The ` of {call}", H).calls) == 1
    x = f"{F}<parameter=t>\n```\n{GOOD[X]}\n```\n</parameter>{E}"
    found = checked(f"{x}\n{x}\n```\n{GOOD[X]}\n```", X)
    assert [c.arguments for c in found.calls] == [{"t": f"```\n{GOOD[X]}\n```"}] * 2
    assert found.content == f"\n```\n{GOOD[X]}\n```"
    half = f"{F}<parameter=t>\n```\n</parameter>{E}"  # opens a block that the last would close
    assert len(checked(f"{half}\n{GOOD[X]}\n{half}\n{GOOD[X]}", X).calls) == 4
    assert not checked(f"```text\n```python\n{GOOD[X]}\n```", X).calls


def test_the_reasoning_may_have_been_taken_out_already():
    text = f"{GOOD[H]}\n</think>\nSo."
    assert not parse(text, H).calls
    assert len(parse(text, H, split=False).calls) == 1
    found = checked(f"<think>x</think> So:\n{GOOD[H]}", H)
    assert (found.content, found.ranges) == ("So:", ((17, 20),))


# --- what is read -----------------------------------------------------------------------------


def test_parameters_without_types_get_those_of_the_schema():
    properties = {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "n": {"type": "number"},
        "b": {"type": "boolean"},
        "o": {"type": "object"},
        "a": {"type": "array"},
        "on": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "os": {"type": ["string", "null"]},
        "e": {"enum": [1, 2]},
        "c": {"const": True},
        "r": {"$ref": "#/$defs/p~1q"},
        "loop": {"$ref": "#/$defs/loop"},
        "odd": {"$ref": "#/nowhere/at/all"},
        "any": {},
        "bad": 3,
    }
    defs = {"p/q": {"type": "array"}, "loop": {"$ref": "#/$defs/loop"}}
    schema = {"type": "object", "properties": properties, "$defs": defs}
    given = [{"type": "function", "function": {"name": "f", "parameters": schema}}]

    def value(key, text, tools=given):
        (call,) = checked(f"{F}<parameter={key}>\n{text}\n</parameter>{E}", X, tools).calls
        return call.arguments[key]

    for key, text, wanted in [
        ("s", "5", "5"), ("s", "null", "null"), ("s", "  x\n", "  x\n"), ("s", "", ""),
        ("i", "5", 5), ("i", " -5 ", -5), ("i", "5.0", 5.0), ("i", "5.5", "5.5"), ("i", "x", "x"),
        ("i", "5 6", "5 6"), ("i", "1e3", 1000.0), ("i", "True", "True"), ("i", '"5"', '"5"'),
        ("i", "9" * 400, "9" * 400), ("i", "NaN", "NaN"),
        ("n", "5", 5), ("n", "0.5", 0.5), ("n", "1e999", "1e999"), ("n", "Infinity", "Infinity"),
        ("b", "true", True), ("b", "False", False), ("b", "yes", "yes"), ("b", "1", "1"),
        ("o", '{"a": [1, null]}', {"a": [1, None]}), ("o", "{'a': 1}", "{'a': 1}"),
        ("o", "[]", "[]"),
        ("o", '{"a": 1, "a": 2}', '{"a": 1, "a": 2}'), ("o", "null", "null"),
        ("a", "[1]", [1]), ("a", "(1,)", "(1,)"),
        ("on", "None", None), ("on", "null", None), ("on", "3", 3), ("on", "", ""),
        ("os", "None", None), ("os", "nothing", "nothing"), ("os", "3", "3"),
        ("e", "2", 2), ("e", "x", "x"), ("c", "True", True), ("r", "[]", []),
        ("loop", "1", "1"), ("odd", "1", "1"), ("any", "1", "1"), ("bad", "1", "1"),
        ("new", "1", "1"),
    ]:  # fmt: skip
        found = value(key, text)
        assert (found, type(found)) == (wanted, type(wanted)), (key, text)
    assert value("i", "5", None) == "5"
    assert value("i", "5", [{"function": {"name": "other"}}]) == "5"
    # What does not convert is told by the schema.
    for odd in ("bad", "odd", "loop"):  # no schemas
        del properties[odd]
    (call,) = parse(f"{F}<parameter=i>\nfive\n</parameter>{E}", X, given).calls
    assert "integer" in tools.check(call, given).message


def test_python_is_read_as_python_has_it():
    text = (
        "[f(a=\"it's\", b='say \"x\"', c='\\x41\\u00e9\\101\\n\\\\', d='''a\n'b' ''',"
        ' e="""x"y""",'
        " f=(1, 2,), g=(1), h=(1,), i=[], j={}, k=-0.5, l=+3, m=.5, n=2., o=1e3, p=None,"
        " q={'x': True,}, r='\\d', s='a\\\nb',), g.h()]"
    )
    first, second = checked(text, P).calls
    assert first.arguments == {
        "a": "it's", "b": 'say "x"', "c": "Aé" + "A\n\\", "d": "a\n'b' ", "e": 'x"y',
        "f": [1, 2], "g": 1, "h": [1], "i": [], "j": {}, "k": -0.5, "l": 3, "m": 0.5, "n": 2.0,
        "o": 1000.0, "p": None, "q": {"x": True}, "r": "\\d", "s": "ab",
    }  # fmt: skip
    assert (second.name, text[slice(*second.span)]) == ("g.h", "g.h()")


def test_numbers_and_strings_are_exact():
    big = 10**307 + 1
    text = json.dumps({"name": "f", "arguments": {"a": big, "b": "\ud83d\ude00 \u2028", "c": -0.0}})
    (call,) = checked(text, J).calls
    assert call.arguments["a"] == big
    assert call.arguments["b"] == "😀 \u2028"
    deep = ok = 1
    for _ in range(MAX_DEPTH - 2):
        ok = [ok]
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert len(checked(json.dumps({"name": "f", "arguments": {"a": ok}}), J).calls) == 1
    assert checked(json.dumps({"name": "f", "arguments": {"a": deep}}), J).invalid
    for bomb in ("[" * 10**4, "{" * 10**4, '{"a":' * 10**4, "(" * 10**4, "-" * 10**4):
        for format, text in (
            (J, f'{{"name": "f", "arguments": {bomb}'),
            (P, f"[f(a={bomb}"),
            (X, f"{F}<parameter=a>{bomb}</parameter>{E}"),
        ):
            given = [
                {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "array"}}}}}
            ]
            assert len([*checked(text, format, given).invalid, *parse(text, format).calls]) == 1


def test_lone_surrogates_are_replaced_in_place():
    text = f"a\ud800 {GOOD[H]} \udc00"
    found = parse(text, H)
    assert found.content == "a\ufffd \ufffd"
    assert [text[slice(*c.span)] for c in found.calls] == [GOOD[H]]


@pytest.mark.parametrize("format", FORMATS)
def test_so_many_calls_are_read_and_no_more(format):
    text = "\n".join([GOOD[format]] * (MAX_CALLS + 3))
    found = checked(text, format)
    assert len(found.calls) == MAX_CALLS
    (rest,) = found.invalid
    assert (rest.status, rest.text.count("ok")) == ("malformed", 3)
    assert str(MAX_CALLS) in rest.why


def test_a_bare_object_is_known_by_the_names_of_tools():
    text = '{"name": "f", "x": 1}'
    assert not checked(text, J).invalid
    (invalid,) = checked(text, J, [{"function": {"name": "f"}}]).invalid
    assert invalid.status == "malformed"


def test_an_array_that_is_broken_in_part_keeps_what_is_not():
    text = f'[{GOOD[J]}, {{"name": 3, "arguments": {{}}}}, 4, {GOOD[J]}]'
    found = checked(text, J)
    assert [c.name for c in found.calls] == ["ok", "ok"]
    assert [(c.status, c.text) for c in found.invalid] == [
        ("missing_name", '{"name": 3, "arguments": {}}'),
        ("malformed", "4"),
    ]


def test_a_wrong_format_or_tool_is_the_callers():
    with pytest.raises(
        UsageError, match=r"unknown format of tool calls 'hermes'.*Did you mean 'hermes_json'"
    ):
        parse("x", "hermes")
    with pytest.raises(UsageError, match=r"Accepted: hermes_json, qwen3_coder_xml, .*, json$"):
        parse("x", None)
    two = [{"function": {"name": "f"}}] * 2
    for bad in (["f"], [{"function": {}}], [{"function": {"name": "f", "parameters": 3}}], two):
        with pytest.raises(UsageError, match="tool"):
            parse("x", J, bad)


# --- texts that nobody writes -------------------------------------------------------------------

PIECES = (
    *MARKS, "</think>", "<think>", "~~~", "\ud800", "}}", "[", ",", ";", "=", "(", ")",
    "<parameter=a>", "</parameter>", "[ARGS]", "[CALL_ID]", "<|python_start|>", "<|python_end|>",
    '"name"', "NaN", "Action:", "Action Input:", "'''", '"""', "9" * 400, "\\u", "\\", "\t", "\0",
)  # fmt: skip


def mutated(writer, number):
    """A reply of a family, with random damage."""
    chance = random.Random(f"{writer} {number}")
    text = WRITERS[writer][1](chance.sample(DEEP, chance.randint(1, 3)))
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        a, b = sorted(chance.choices(range(len(text) + 1), k=2))
        b = min(b, a + chance.choice((0, 1, 3, 30)))
        other = chance.choice((chance.choice(PIECES), chance.choice(PIECES), text[a:b] * 2, ""))
        at = chance.choice((a, chance.randint(0, len(text))))
        text = text[:at] + other + text[at + b - a :]
    return text


OPENERS = {H: "<tool_call>", X: "<tool_call>", M: "[TOOL_CALLS]"}


def fuzz(writer, numbers):
    format = WRITERS[writer][0]
    given = specs(DEEP)
    for number in numbers:
        text = re.sub("[\ud800-\udfff]", "\ufffd", mutated(writer, number))
        found = checked(text, format, given)
        for item in (*found.calls, *found.invalid):
            assert isinstance(tools.check(item, given).message, str)
        for call in found.calls if format == H else ():
            a, b = call.span
            assert json.loads(text[a:b][11:-12])["arguments"] == call.arguments
        if format in OPENERS and not re.search("`|~|think", text):  # nothing is dropped
            spans = [item.span for item in (*found.calls, *found.invalid)]
            for mark in re.finditer(re.escape(OPENERS[format]), text):
                # The mark of an array that has more than one call is in none of them.
                assert any(a <= mark.start() < b for a, b in spans) or (spans and format == M), text


@pytest.mark.parametrize("writer", WRITERS)
def test_damaged_replies_are_read_or_told_of(writer):
    fuzz(writer, range(80))


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_ten_thousand_damaged_replies_are_read_or_told_of(writer):
    fuzz(writer, range(10_000))


@pytest.mark.parametrize("format", FORMATS)
def test_any_text_is_read(format):
    @settings(max_examples=20, deadline=None, database=None, derandomize=True)
    @given(st.lists(st.sampled_from(PIECES) | TEXT, max_size=12).map("".join))
    def holds(text):
        checked(re.sub("[\ud800-\udfff]", "\ufffd", text), format, specs(DEEP))

    holds()


def test_the_places_of_what_cannot_be_read_follow_the_text():
    """A completion's whole message has the whole text for content; so the spans count there."""
    text = f"<think>a</think>b {GOOD[H]} c <tool_call>x</tool_call> d"
    found = parse(text, H)
    message = {**found.message(), "reasoning_content": "a"}
    completion = Completion((), (), (), text, message=message, ranges=found.ranges)
    for said in (completion.assistant_message, completion.whole_message):
        (invalid,) = said["invalid_tool_calls"]
        assert (
            said["content"][slice(*invalid["span"])]
            == invalid["text"]
            == "<tool_call>x</tool_call>"
        )
    odd = {**message, "invalid_tool_calls": [{"span": "x"}, {}]}
    told = Completion((), (), (), text, message=odd, ranges=found.ranges).whole_message
    assert told["invalid_tool_calls"] == [{"span": "x"}, {}]
