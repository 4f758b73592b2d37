"""Calls of tools as models write them in text: :func:`parse`.

What holds in every format:

1. A call is read as it stands, or it is none. Nothing is repaired into a call, and nothing that
   looks like one is dropped: what cannot be read stays in the content and is in
   :attr:`Parsed.invalid`, with its place, a status of :data:`INVALID` and what is wrong.
2. No call is looked for in reasoning (:mod:`rlrf.reasoning`), in code that the text shows
   (:mod:`rlrf.tools.quoted`), in the arguments of another call, or in what is invalid.
3. Values are strict (:mod:`rlrf.tools.values`); of the keys beside a call's name and arguments
   nothing is read.
4. Work and memory are linear in the text; at most :data:`MAX_CALLS` are read of one.

How each family writes its calls is told by its reader in :mod:`rlrf.tools.families`.

It does not find out which format a text is in, does not say whether a call fits its tool
(:func:`rlrf.tools.check` does), and executes nothing.

Why: design/tool-calls.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rlrf.errors import UsageError
from rlrf.messages import whole_text
from rlrf.reasoning import split_reasoning
from rlrf.tools.calls import Parsed
from rlrf.tools.families import FORMATS, Format, Source, Unit, block_of_calls
from rlrf.tools.quoted import Quoted
from rlrf.tools.specs import parameters_of

MAX_CALLS = 128
"""Calls read of one text, invalid ones and those in shown code included."""


def parse(
    text: str,
    format: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    split: bool = True,
) -> Parsed:
    """Read the calls in a reply.

    Args:
        text: the reply, its special tokens included where the family marks calls by them
            (``mistral``). Lone surrogates count as U+FFFD.
        format: one of :data:`FORMATS`.
        tools: what can be called (OpenAI schemas). ``qwen3_coder_xml``, which has no types, reads
            arguments by them; the formats of bare JSON know a call without arguments by its name.
        split: False where the reasoning has been taken out of the text already.

    Raises:
        UsageError: an unknown format, a tool that is none.
    """
    form = _form(format)
    text = whole_text(text)
    start, stop = 0, len(text)
    if split:
        _, start, stop = split_reasoning(text)
    found = _read(text[start:stop], form, parameters_of(tools or ()))
    return dataclasses.replace(
        found,
        calls=tuple(dataclasses.replace(c, span=_moved(c.span, start)) for c in found.calls),
        invalid=tuple(dataclasses.replace(c, span=_moved(c.span, start)) for c in found.invalid),
        ranges=tuple(_moved(r, start) for r in found.ranges),
    )


def check_format(format: Any) -> None:
    """See that a format is one of :data:`FORMATS`.

    Raises:
        UsageError: it is not.
    """
    _form(format)


def _form(format: Any) -> Format:
    if isinstance(format, str) and format in FORMATS:
        return FORMATS[format]
    near = difflib.get_close_matches(str(format)[:80], FORMATS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(
        f"unknown format of tool calls {format!r:.80}.{hint} Accepted: {', '.join(FORMATS)}"
    )


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by


def _read(text: str, form: Format, tools: Mapping[str, Any]) -> Parsed:
    source, code = Source(text, len(text), tools), None
    units: list[Unit] = []
    at = read = 0
    while found := form.opens.search(text, at):
        unit = form.read(source, found)
        if isinstance(unit, int):
            at = max(unit, found.end())
            continue
        read += 1
        if read > MAX_CALLS:
            why = f"a reply has at most {MAX_CALLS} calls; what follows is not read"
            units.append(source.invalid("malformed", why, unit.start, source.stop))
            break
        code = code or Quoted(text)
        shown = code.covering(found.start())
        if shown is not None and form.fenced:
            block = block_of_calls(source, form, shown, found.start())
            unit, shown = (unit, shown) if block is None else (block, None)
        if shown is not None and (unit.invalid or unit.end <= shown.end):
            at = max(shown.end, found.end())
            continue
        units.append(unit)
        at = max(unit.end, found.end())
        code.skip(at)
    return _parsed(text, form, units)


def _parsed(text: str, form: Format, units: Sequence[Unit]) -> Parsed:
    removed: list[tuple[int, int]] = []
    for start, end in itertools.chain.from_iterable(unit.removed() for unit in units):
        if removed and form.between.fullmatch(text, removed[-1][1], start):
            removed[-1] = (removed[-1][0], end)
        else:
            removed.append((start, end))
    ranges, kept = [], 0
    for start, end in removed:
        ranges.append((kept, kept + len(text[kept:start].rstrip())))
        kept = end
    if not removed or text[kept:].strip():
        ranges.append((kept, len(text)))
    ranges = [(a, b) for a, b in ranges if a < b]
    return Parsed(
        tuple(call for unit in units for call in unit.calls),
        tuple(call for unit in units for call in unit.invalid),
        "".join(text[a:b] for a, b in ranges),
        tuple(ranges),
    )
