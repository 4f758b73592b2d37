"""How each family of models writes its calls: a reader for each format of :func:`rlrf.tools.parse`.

A reader is given the text and what may begin a call in it. It gives the :class:`Unit` that stands
there, or the place to go on from if nothing there looks like a call.

Where a call cannot be read, the hard question is where it ends: too late, and the next call is lost
in it; too early, and a call that it quotes in an argument is executed. So what was read before the
fault belongs to it, and what follows up to where its brackets or parameters close. Where they never
do, the next mark of a call is taken for one only if nothing that is open could quote it.

A reader does not guess the family, which is the caller's to say, and does not check names or
arguments.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlrf.tools.calls import Call, InvalidCall, InvalidStatus
from rlrf.tools.quoted import Shown
from rlrf.tools.specs import Converter
from rlrf.tools.values import JSON, Python, ValueFault, read_json, skip


@dataclass(slots=True)
class Unit:
    """What stands in one place: calls that belong together, and what of it is invalid."""

    start: int
    end: int
    calls: list[Call] = field(default_factory=list)
    invalid: list[InvalidCall] = field(default_factory=list)

    def removed(self) -> Iterator[tuple[int, int]]:
        """What is not in the content: all of it, or the calls only if something must stay."""
        if not self.invalid:
            yield self.start, self.end
        else:
            yield from (call.span for call in self.calls)


Reader = Callable[["Source", "re.Match[str]"], "Unit | int"]


@dataclass(frozen=True, slots=True)
class Format:
    """A format: what may begin a call, what reads it there, what may stand between two calls.

    A reader gives an int where nothing looks like a call: the place to go on from.
    """

    opens: re.Pattern[str]
    read: Reader
    between: re.Pattern[str] = re.compile(r"\s*")
    fenced: bool = False  # a block of code may be a call


_LOOKS = 16
"""Times that a text is looked through in vain for the end of what cannot be read."""


class Source:
    """The text that is read, up to ``stop``, and the tools there are."""

    def __init__(self, text: str, stop: int, tools: Mapping[str, Any]) -> None:
        self.text, self.stop, self.tools = text, stop, tools
        self.patience = _LOOKS * stop  # characters that are still looked through in vain

    def skip(self, at: int) -> int:
        """The place after whitespace."""
        return skip(self.text, at, self.stop)

    def stripped(self, start: int, end: int) -> int:
        """The end of ``text[start:end]`` without whitespace behind it."""
        return start + len(self.text[start:end].rstrip())

    def until(self, following: re.Pattern[str], start: int, value: int, fault: ValueFault) -> int:
        """The end of what begins at ``start`` and whose value has a fault: before what follows it.

        In brackets that do not close something follows only where it is the fault itself; what
        comes later may be quoted there, and so it may in a string.
        """
        found = None
        if self.text.startswith(("[", "{", "("), value, self.stop):
            found = None if fault.in_string else following.match(self.text, fault.at, self.stop)
        else:
            found = following.search(self.text, fault.at, self.stop)
        return self.stripped(start, found.start() if found else self.stop)

    def closes(self, brackets: re.Pattern[str], start: int, fault: int) -> int | None:
        """Where the brackets that open at a place close, behind a fault in them; None: nowhere."""
        depth = 0
        if not self.text.startswith(("[", "{", "("), start, self.stop):
            return None
        if self.patience < 0:
            return self.stop
        for found in brackets.finditer(self.text, start, self.stop):
            if found[0] in "[{(":
                depth += 1
            elif found[0] in "]})":
                depth -= 1
                if depth <= 0:
                    return found.end() if found.end() > fault else None
        self.patience -= self.stop - start
        return None

    def invalid(self, status: InvalidStatus, why: str, start: int, end: int) -> Unit:
        """What is invalid, alone in its place."""
        call = InvalidCall(status, self.text[start:end], (start, end), why)
        return Unit(start, end, invalid=[call])

    def faulty(
        self, fault: ValueFault, start: int, end: int, status: InvalidStatus = "invalid_json"
    ) -> Unit:
        """What has a fault in its values; ``status`` if it is not that the text ends."""
        if fault.unfinished and end == self.stripped(start, self.stop):
            return self.invalid("unclosed", fault.why, start, end)
        return self.invalid(status, f"{fault.why} at character {fault.at - start}", start, end)


class _Refused(Exception):
    """What stands there is no call; it has been read up to ``at``."""

    def __init__(self, status: InvalidStatus, why: str, at: int = 0) -> None:
        self.status, self.why, self.at = status, why, at


def _as_call(value: Any, span: tuple[int, int], keys: Sequence[str] = ("arguments",)) -> Call:
    """The call that a JSON value is; one of ``keys`` holds its arguments."""
    told = " or ".join(f'"{key}"' for key in keys)
    if not isinstance(value, dict):
        raise _Refused("malformed", f'a call is a JSON object with "name" and {told}')
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise _Refused("missing_name", 'the call has no "name", which is a string')
    given = [key for key in keys if key in value]
    if len(given) > 1:
        raise _Refused("malformed", f"the call has both {' and '.join(given)}; it takes one")
    arguments = value[given[0]] if given else None
    if not isinstance(arguments, dict):
        raise _Refused("malformed", f"the call has no {told}, which are a JSON object")
    return Call(name, arguments, span)


_Items = list[tuple[Any, tuple[int, int]]]


def _items(source: Source, at: int) -> tuple[_Items, int]:
    """The values of an array with their places, or the one that stands alone."""
    reader = JSON(source.text, source.stop)
    if source.text[at] != "[":
        value, end = reader.value(at)
        return [(value, (at, end))], end
    found: _Items = []
    at, more = reader.skip(at + 1), True
    while more:
        value, end = reader.value(at, 1)
        found.append((value, (at, end)))
        at, more = reader.following(end, "]")
    return found, at


def _of_items(source: Source, items: _Items, place: tuple[int, int], keys: Sequence[str]) -> Unit:
    """The calls that values are, which fill a place."""
    unit = Unit(*place)
    for item, span in items:
        span = place if len(items) == 1 else span
        try:
            unit.calls.append(_as_call(item, span, keys))
        except _Refused as refused:
            unit.invalid += source.invalid(refused.status, refused.why, *span).invalid
    return unit


_S = r"[ \t\n\r]*"  # JSON's space
# Brackets and strings. A string that nothing closes is one up to the end of its line, or of the
# text: so no character is looked at twice.
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_BRACKET_OF_LINE = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|[\[\]{}]')
_PYTHON_BRACKET = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*+(?:""")?|\'\'\'(?:[^\'\\]|\\.|\'(?!\'\'))*+(?:\'\'\')?'
    r'|"(?:[^"\\\n]|\\.)*+"?|\'(?:[^\'\\\n]|\\.)*+\'?|[\[\](){}]',
    re.DOTALL,
)

# --- <tool_call> ------------------------------------------------------------------------------

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_CLOSES = re.compile(rf"{_S}{_CLOSE}")
_TOOL_CALL_MARK = re.compile("</?tool_call>")


def _unread(
    source: Source, start: int, at: int, status: InvalidStatus, why: str, quoted: bool
) -> Unit:
    """A block that could be read up to ``at``: it ends with its mark, else before the next one.

    ``quoted``: ``at`` is in a string or a parameter, where the next one may stand, too.
    """
    mark = _TOOL_CALL_MARK.search(source.text, at, source.stop)
    if mark is not None and mark[0] == _CLOSE:
        return source.invalid(status, why, start, mark.end())
    end = source.stripped(start, mark.start() if mark and not quoted else source.stop)
    return source.invalid("unclosed", f"{_CLOSE} is missing", start, end)


def _stray_close(source: Source, found: re.Match[str]) -> Unit:
    why = f"{_CLOSE} closes nothing: {_OPEN} is missing"
    return source.invalid("malformed", why, *found.span())


def _hermes(source: Source, found: re.Match[str]) -> Unit | int:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen 2.5, Qwen 3."""
    start, body = found.span()
    if found[0] == _CLOSE:
        return _stray_close(source, found)
    try:
        value, end = read_json(source.text, body, source.stop)
        close = _CLOSES.match(source.text, end, source.stop)
        if close is None:
            raise ValueFault(f"after the JSON object there must be {_CLOSE}", source.skip(end))
    except ValueFault as fault:
        whole = source.closes(_BRACKET, source.skip(body), fault.at)
        at = whole if whole and _CLOSES.match(source.text, whole, source.stop) else fault.at
        why = f"{fault.why} at character {fault.at - start}"
        return _unread(source, start, at, "invalid_json", why, at == fault.at and fault.in_string)
    try:
        return Unit(start, close.end(), [_as_call(value, (start, close.end()))])
    except _Refused as refused:
        return source.invalid(refused.status, refused.why, start, close.end())


_FUNCTION = re.compile(rf"{_S}<function=([^>\n]*)>{_S}")
_FUNCTION_END = re.compile(rf"</function>{_S}</tool_call>")
_FUNCTION_CLOSE = re.compile(rf"</function>(?:{_S}</tool_call>)?")
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>")
_VALUE_MARK = re.compile(r"<parameter=[^>\n]*>|</parameter>")
_AFTER_VALUE = re.compile(rf"{_S}(?=<parameter=|</function>)")
_BLOCK_MARK = re.compile(r"<parameter=[^>\n]*>|</?tool_call>")


def _qwen_xml(source: Source, found: re.Match[str]) -> Unit | int:
    """``<tool_call><function=f><parameter=x>``: Qwen3-Coder, Qwen 3.5, Nemotron 3.

    A value is the text between its marks, without a line break at either end. It ends where
    ``</parameter>`` is followed by another parameter or the end of the function; a whole parameter
    within it is part of it. Its type is that of the tool's schema: what does not convert stays
    text.
    """
    start = found.start()
    if found[0] == _CLOSE:
        return _stray_close(source, found)
    if found[0] != _OPEN:
        following = source.text.find(_OPEN, found.end(), source.stop)
        limit = source.stop if following < 0 else following
        close = _FUNCTION_CLOSE.search(source.text, found.end(), limit)
        why = f"a function must stand within {_OPEN} and {_CLOSE}"
        return source.invalid("malformed", why, start, close.end() if close else found.end())
    try:
        name, texts, end = _function(source, found.end())
    except _Refused as refused:
        at, quoted = _after_parameters(source, refused.at)
        return _unread(source, start, at, refused.status, refused.why, quoted)
    convert = Converter(source.tools.get(name))
    arguments = {key: convert(key, value) for key, value in texts.items()}
    return Unit(start, end, [Call(name, arguments, (start, end))])


def _function(source: Source, at: int) -> tuple[str, dict[str, str], int]:
    """The name, the texts of the parameters, and the end of a function."""
    text, stop = source.text, source.stop
    head = _FUNCTION.match(text, at, stop)
    if head is None:
        raise _Refused("malformed", f"behind {_OPEN} there must be <function=name>", at)
    name, at, texts = head[1].strip(), head.end(), {}
    if not name:
        raise _Refused("missing_name", "the function has no name: <function=name>", at)
    while parameter := _PARAMETER.match(text, at, stop):
        key = parameter[1].strip()
        end = _end_of_value(source, parameter.end())
        if end is None:
            why = f"the parameter {key[:80]!r} is not closed by </parameter>"
            raise _Refused("malformed", why, at)
        at = source.skip(end + len("</parameter>"))
        if not key:
            raise _Refused("malformed", "a parameter has no name: <parameter=name>", at)
        if key in texts:
            raise _Refused("malformed", f"the parameter {key[:80]!r} stands twice", at)
        texts[key] = text[parameter.end() : end].removeprefix("\n").removesuffix("\n")
    tail = _FUNCTION_END.match(text, at, stop)
    if tail is None:
        why = f"after the parameters there must be </function>{_CLOSE}, with nothing between"
        raise _Refused("malformed", why, at)
    return name, texts, tail.end()


def _end_of_value(source: Source, at: int) -> int | None:
    """Where the mark stands that closes a value; None if none does."""
    within = 0
    if source.patience < 0:
        return None
    for mark in _VALUE_MARK.finditer(source.text, at, source.stop):
        if mark[0] != "</parameter>":
            within += 1
        elif within:
            within -= 1
        elif _AFTER_VALUE.match(source.text, mark.end(), source.stop):
            return mark.start()
    source.patience -= source.stop - at
    return None


def _after_parameters(source: Source, at: int) -> tuple[int, bool]:
    """Behind the values in the rest of a function; or in the one that does not end."""
    while mark := _BLOCK_MARK.search(source.text, at, source.stop):
        if mark[0] in (_OPEN, _CLOSE):
            break
        end = _end_of_value(source, mark.end())
        if end is None:
            return mark.end(), True
        at = end + len("</parameter>")
    return at, False


# --- bare JSON --------------------------------------------------------------------------------

_OBJECT = rf"(?:\{{(?={_S}\")|\[(?={_S}\{{))"
_HEAD = rf'(?:\[{_S})?\{{{_S}"(?:name|arguments|parameters|type"{_S}:{_S}"function)"{_S}[:,]'
_CALL_HEAD = re.compile(_HEAD)
_LINE_HEAD = re.compile(rf"^{_HEAD}", re.MULTILINE)
_TAG = "<|python_tag|>"


def _bare(keys: tuple[str, ...]) -> Reader:
    """Reads objects with a name and arguments, one by one or in an array.

    An object is meant for a call if it has arguments, or a name and nothing else, or the name of
    one of the tools; one that cannot be read, if it begins with the name or the arguments.
    """

    def read(source: Source, found: re.Match[str]) -> Unit | int:
        text, start, at = source.text, found.start(), found.end() - 1  # of the bracket
        tagged = found[0].startswith(_TAG)
        if found[0] == _TAG:
            why = f"behind {_TAG} there must be a JSON object"
            return source.invalid("malformed", why, start, source.stripped(start, source.stop))
        try:
            items, end = _items(source, at)
        except ValueFault as fault:
            if not tagged and not _CALL_HEAD.match(text, at, source.stop):
                return fault.at
            whole = source.closes(_BRACKET, at, fault.at)
            whole = whole or source.closes(_BRACKET_OF_LINE, at, fault.at)
            return source.faulty(fault, start, whole or source.until(_LINE_HEAD, start, at, fault))
        if not tagged and not any(_is_meant(item, source.tools) for item, _ in items):
            return end
        after = source.skip(end)
        if text.startswith(("}", "]"), after, source.stop):
            why = f"{text[after]!r} at character {after - start} closes nothing"
            return source.invalid("invalid_json", why, start, after + 1)
        return _of_items(source, items, (start, end), keys)

    return read


def _is_meant(item: Any, tools: Mapping[str, Any]) -> bool:
    if not isinstance(item, dict):
        return False
    if item.keys() & {"arguments", "parameters"} or isinstance(item.get("function"), dict):
        return True
    name = item.get("name")
    return isinstance(name, str) and (item.keys() <= {"name", "type", "id"} or name in tools)


def block_of_calls(source: Source, form: Format, shown: Shown, at: int) -> Unit | None:
    """The calls that a block of code is, the first of which is at ``at``; None if it is code."""
    start, end = shown.body
    if shown.language is None or shown.language.lower() not in ("", "json"):
        return None
    if source.text[start:at].strip():
        return None
    inner = Source(source.text, end, source.tools)
    unit = Unit(shown.start, shown.end)
    while at < end:
        found = form.opens.match(source.text, at, end)
        part = form.read(inner, found) if found else at
        if isinstance(part, int):
            if not unit.calls:
                return None
            why = f"a block has calls and nothing else; not so at character {at - shown.start}"
            return source.invalid("malformed", why, shown.start, shown.end)
        unit.calls += part.calls
        unit.invalid += part.invalid
        at = end if part.invalid and not part.calls else inner.skip(part.end)
    if len(unit.calls) == 1 and not unit.invalid:
        unit.calls = [dataclasses.replace(unit.calls[0], span=(unit.start, unit.end))]
    return unit


# --- Python -----------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
_KEYWORD = re.compile(r"([A-Za-z_]\w*)\s*=(?!=)", re.ASCII)
_LIST = r"\[\s*(?:[A-Za-z_][\w.]*\s*\(|\(\s*[A-Za-z_]\w*\s*=)"
_LINE_LIST = re.compile(rf"^{_LIST}", re.MULTILINE | re.ASCII)
_PYTHON_START, _PYTHON_END = "<|python_start|>", "<|python_end|>"


def _pythonic(source: Source, found: re.Match[str]) -> Unit | int:
    """``[f(a=1), g(b="x")]`` at the start of a line: Llama 3.2, Llama 4, ToolACE.

    Arguments are literals, given by name. Llama 4's ``<|python_start|>`` may stand before the
    list, and ``<|python_end|>`` after it.
    """
    text, stop = source.text, source.stop
    tagged = found[0] == _PYTHON_START
    start = found.start() if tagged else text.index("[", found.start())
    begin = source.skip(found.end()) if tagged else start
    reader, at = Python(text, stop), begin
    unit = Unit(start, begin)
    try:
        if not text.startswith("[", begin, stop):
            raise reader.expected("'[', which begins a list of calls", begin)
        at, more = reader.skip(begin + 1), True
        while more:
            call, after = _python_call(reader, at)
            unit.calls.append(call)
            at, more = reader.following(after, "]")
    except ValueFault as fault:
        end = source.closes(_PYTHON_BRACKET, begin, fault.at)
        end = max(end or source.until(_LINE_LIST, start, begin, fault), found.end())
        if fault.at == at and text.startswith("(", at, stop):
            return source.invalid("missing_name", "a call has no name before '('", start, end)
        return source.faulty(fault, start, end, "malformed")
    tail = source.skip(at)
    closed = tagged and text.startswith(_PYTHON_END, tail, stop)
    unit.end = tail + len(_PYTHON_END) if closed else at
    if len(unit.calls) == 1:
        unit.calls = [dataclasses.replace(unit.calls[0], span=(start, unit.end))]
    return unit


def _python_call(reader: Python, at: int) -> tuple[Call, int]:
    name = _NAME.match(reader.text, at, reader.stop)
    if name is None:
        raise reader.expected("the name of a tool", at)
    start, at = at, reader.skip(name.end())
    if not reader.text.startswith("(", at, reader.stop):
        raise reader.expected("'('", at)
    arguments: dict[str, Any] = {}
    at = reader.skip(at + 1)
    more = not reader.text.startswith(")", at, reader.stop)
    at += not more
    while more:
        keyword = _KEYWORD.match(reader.text, at, reader.stop)
        if keyword is None:
            raise reader.expected("an argument by its name (name=value)", at)
        if keyword[1] in arguments:
            raise ValueFault(f"the argument {keyword[1][:80]!r} stands twice", at)
        arguments[keyword[1]], at = reader.value(keyword.end(), 2)
        at, more = reader.following(at, ")")
    return Call(name[0], arguments, (start, at)), at


# --- Mistral ----------------------------------------------------------------------------------

_TOOL_CALLS = "[TOOL_CALLS]"
_MISTRAL_OPENS = re.compile(re.escape(_TOOL_CALLS))
_MISTRAL_HEAD = re.compile(
    rf"{_S}([^\s\[\]{{}}]*)[ \t]*(?:\[CALL_ID\][ \t]*[^\s\[\]{{}}]*[ \t]*)?(\[ARGS\])?{_S}"
)


def _mistral(source: Source, found: re.Match[str]) -> Unit | int:
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}]``, or ``[TOOL_CALLS]name[ARGS]{...}``.

    The second since version 11 of the tokenizer; ``[ARGS]`` may be missing, as where special
    tokens are left out, and ``[CALL_ID]`` with an id may stand before it.
    """
    start = found.start()
    head = _MISTRAL_HEAD.match(source.text, found.end(), source.stop)
    assert head  # every part of it may be missing
    name, at = head[1], head.end()
    try:
        if not name and not head[2] and source.text.startswith("[", at, source.stop):
            items, end = _items(source, at)
            return _of_items(source, items, (start, end), ("arguments",))
        value, end = read_json(source.text, at, source.stop)
    except ValueFault as fault:
        whole = source.closes(_BRACKET, at, fault.at)
        end = whole or source.until(_MISTRAL_OPENS, start, at, fault)
        return source.faulty(fault, start, max(end, found.end()))
    if not name:
        why = f"between {_TOOL_CALLS} and [ARGS] there must be the name of a tool"
        return source.invalid("missing_name", why, start, end)
    if not isinstance(value, dict):
        return source.invalid("malformed", "the arguments must be a JSON object", start, end)
    return Unit(start, end, [Call(name, value, (start, end))])


# --- ReAct ------------------------------------------------------------------------------------

_ACTION = re.compile(r"^[ \t]*Action(?: Input)?[ \t]*:", re.MULTILINE)
_INPUT = re.compile(r"[ \t]*Action Input[ \t]*:")
_REACT_LINE = re.compile(
    r"^[ \t]*(?:Action|Action Input|Observation|Thought|Final Answer)[ \t]*:", re.MULTILINE
)


def _react(source: Source, found: re.Match[str]) -> Unit | int:
    """``Action: name`` and ``Action Input: {...}``, each on a line of its own: ReAct, ToolAlpaca.

    The object may go on over lines; behind it its line must end.
    """
    text, stop = source.text, source.stop
    start = source.skip(found.start())
    if "Input" in found[0]:
        why = "before Action Input there must be a line with Action: name"
        return source.invalid("missing_name", why, start, _end_of_input(source, found.end()))
    line_end = text.find("\n", found.end(), stop)
    line_end = stop if line_end < 0 else line_end
    name, after = text[found.end() : line_end].strip(), source.skip(line_end)
    given = _INPUT.match(text, after, stop)
    if given is None:
        end = source.stripped(start, line_end)
        if after == stop:
            return source.invalid("unclosed", "Action Input is missing", start, end)
        why = "after the line with Action there must be one with Action Input"
        return source.invalid("malformed", why, start, end)
    try:
        value, end = read_json(text, given.end(), stop)
    except ValueFault as fault:
        place = source.skip(given.end())
        whole = source.closes(_BRACKET, place, fault.at)
        return source.faulty(fault, start, whole or source.until(_REACT_LINE, start, place, fault))
    line_end = text.find("\n", end, stop)
    whole = source.stripped(start, stop if line_end < 0 else line_end)
    if whole > end:
        why = f"the line must end after the JSON object, at character {end - start}"
        return source.invalid("invalid_json", why, start, whole)
    if not name:
        return source.invalid("missing_name", "Action names no tool", start, end)
    if not isinstance(value, dict):
        return source.invalid("malformed", "Action Input must be a JSON object", start, end)
    return Unit(start, end, [Call(name, value, (start, end))])


def _end_of_input(source: Source, at: int) -> int:
    """Where an input ends that cannot be read: before the next line of the format."""
    following = _REACT_LINE.search(source.text, at, source.stop)
    return source.stripped(at, following.start() if following else source.stop)


_MORE = re.compile(r"\s*[;,]?\s*")
_XML_OPENS = re.compile("</?tool_call>|<function=[^>\n]*>")
_LLAMA_OPENS = re.compile(rf"(?:{re.escape(_TAG)}{_S})?{_OBJECT}|{re.escape(_TAG)}")
_PYTHONIC_OPENS = re.compile(rf"{re.escape(_PYTHON_START)}|^[ \t]*{_LIST}", re.MULTILINE | re.ASCII)
_JSON_OPENS = re.compile(_OBJECT)

FORMATS: Mapping[str, Format] = {
    "hermes_json": Format(_TOOL_CALL_MARK, _hermes),
    "qwen3_coder_xml": Format(_XML_OPENS, _qwen_xml),
    "llama_json": Format(_LLAMA_OPENS, _bare(("parameters", "arguments")), _MORE),
    "llama_pythonic": Format(_PYTHONIC_OPENS, _pythonic),
    "mistral": Format(_MISTRAL_OPENS, _mistral),
    "react": Format(_ACTION, _react),
    "json": Format(_JSON_OPENS, _bare(("arguments",)), _MORE, fenced=True),
}
"""The formats by name."""
