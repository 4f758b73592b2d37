"""Where a reply's reasoning ends and its answer begins.

One function, :func:`split_reasoning`, for every policy and every environment. The rule:

1. A section opens where the reply begins, whitespace apart (or the chat template has opened it at
   the end of the prompt), and reaches to its closing mark; sections may follow each other and be
   nested. What follows is the answer. A section that is never closed has none.
2. A closing mark that nothing opens ends a section that the chat template opened: what stands
   before the last such mark is reasoning. Likewise a later section, if it begins a line or if the
   reply began with one: what stands before its end is reasoning (vLLM's and SGLang's parsers read
   both so). A later section that is never closed is text.
3. A mark that is quoted is text: between quotes or backticks on its line, or within a closed block
   of code. A fence that is open in the reasoning hides no mark: such a block is not closed.
4. gpt-oss channels: the answer is the ``final`` one; a reply in channels without it has none.

The marks are those that vLLM's and SGLang's reasoning parsers know (looked at 2026-11). Granite 3.2
(plain sentences for marks) is not among them. One pass over the text and one over its marks.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

# What opens a section, and what closes it.
_PAIRS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Kimi K2, Nemotron, MiniMax M2, Olmo, Hunyuan
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|channel>", "<channel|>"),  # Gemma 4, with the label "thought"
    ("<unused94>", "<unused95>"),  # MedGemma, with the same label
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi K3
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|start_think|>", "<|end_think|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_FAMILY = {
    mark.casefold(): (i, side == 1)
    for i, pair in enumerate(_PAIRS)
    for side, mark in enumerate(pair)
}
_CASE = re.IGNORECASE | re.ASCII
_MARK = re.compile("|".join(re.escape(m) for pair in _PAIRS for m in pair), _CASE)
_OPENS = re.compile("|".join(re.escape(o) for o, _ in _PAIRS), _CASE)
_LONGEST = max(map(len, _FAMILY))
_SPACE = re.compile(r"\s*")
_LABELLED = ("<|channel>", "<unused94>")
_LABEL = re.compile(r"^thought(?:\s+|$)")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})(.*)$", re.MULTILINE)
_QUOTES = "\"'`"
# An apostrophe within a word is none, nor is a fence.
_QUOTE = re.compile(r"\"|(?<!\w)'|'(?!\w)|(?<!`)`{1,2}(?!`)")

_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
# The same where a server has left out the special tokens.
_BARE_FINAL = "assistantfinal"


class Reply(NamedTuple):
    """A reply, taken apart.

    Attributes:
        reasoning: what stands before the answer, without its marks; None where there is none.
        start: where the answer begins, in characters.
        end: and where it ends.
    """

    reasoning: str | None
    start: int
    end: int


class _Mark(NamedTuple):
    start: int
    end: int
    family: int
    closes: bool
    quoted: bool  # between quotes on its line
    begins: bool  # its line
    alone: bool  # on its line
    mentioned: bool  # within a sentence: "the <think> tag"


def split_reasoning(text: str, opened: str = "", *, strays: bool = True) -> Reply:
    """Take a reply apart, as the module describes.

    Args:
        text: the reply.
        opened: the mark with which the prompt ended, see :func:`opened_by`; "" for none.
        strays: whether rule 2 holds; not for what has been taken apart once already.
    """
    reply = _split(text, opened, strays)
    while reply.reasoning is not None and reply.start < reply.end:
        more = _split(text[reply.start : reply.end], "", strays)  # another way of marking it
        if more.reasoning is None:
            break
        reasoning = "\n\n".join(filter(None, (reply.reasoning, more.reasoning)))
        reply = Reply(reasoning, reply.start + more.start, reply.start + more.end)
    return reply


def _split(text: str, opened: str, strays: bool) -> Reply:
    if opened.startswith(_CHANNEL) or (text.lstrip().startswith(_CHANNEL) and _MESSAGE in text):
        return _channels(text, opened)
    if text.startswith("analysis") and _BARE_FINAL in text:
        at = text.rindex(_BARE_FINAL)
        return Reply(text[len("analysis") : at].strip(), at + len(_BARE_FINAL), len(text))
    marks = list(_marks(text))
    if not marks and not opened:
        return Reply(None, 0, len(text))
    start = _sections(text, marks, 0, opened)
    if start is not None and strays:
        thinks = start > 0 or bool(opened)
        start = _sections(text, marks, _stray(text, marks, start, thinks), "")
    if start is None:
        return Reply(_plain(text), len(text), len(text))
    if not start:
        return Reply(None, 0, len(text))
    return Reply(_plain(text[:start]), _skip(text, start), len(text))


def opened_by(prompt: str) -> str:
    """The mark with which a prompt ends, so that its reply begins inside a section; "" if none."""
    tail = prompt[-200:].rstrip()
    if tail.endswith(_MESSAGE) and _CHANNEL in tail:
        return tail[tail.rindex(_CHANNEL) :]
    return next((o for o, _ in _PAIRS if tail.endswith((o, o + "thought"))), "")


def _skip(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _plain(text: str) -> str:
    """Reasoning without its marks at either end."""
    text = text.strip()
    while (found := _OPENS.match(text)) is not None:
        text = text[found.end() :].lstrip()
        if found[0] in _LABELLED:
            text = _LABEL.sub("", text, count=1)
    *_, closing = (None, *_MARK.finditer(text, max(0, len(text) - _LONGEST)))
    if closing is not None and closing.end() == len(text):
        text = text[: closing.start()]
    return text.strip()


def _marks(text: str) -> Iterator[_Mark]:
    """Every mark of a text, with what its line says about it."""
    line_end = -1
    line_start = at = 0
    odd: dict[str, bool] = {}
    last: dict[str, int] = {}
    for found in _MARK.finditer(text):
        start, end = found.span()
        if start > line_end:
            line_start = at = text.rfind("\n", 0, start) + 1
            line_end = text.find("\n", start)
            line_end = len(text) if line_end < 0 else line_end
            odd = dict.fromkeys(_QUOTES, False)
            last = dict.fromkeys(_QUOTES, -1)
            for quote in _QUOTE.finditer(text, line_start, line_end):
                last[quote[0][0]] = quote.start()
        for quote in _QUOTE.finditer(text, at, start):  # from mark to mark: a line is read once
            odd[quote[0][0]] ^= True
        at = start
        family, closes = _FAMILY[found[0].casefold()]
        begins = not text[line_start:start].strip() if start - line_start < 80 else False
        follows = text[end : end + 1]
        yield _Mark(
            start,
            end,
            family,
            closes,
            any(odd[q] and last[q] >= end for q in _QUOTES),
            begins,
            begins and line_end - end < 80 and not text[end:line_end].strip(),
            not begins and (not follows or not (follows.isalnum() or follows in "\n<`[{(")),
        )


def _sections(text: str, marks: list[_Mark], start: int, opened: str) -> int | None:
    """Where the sections end that follow each other from ``start``; None if the last has no end."""
    while True:
        begin = _skip(text, start)
        index = _first(marks, begin)
        here = marks[index] if index < len(marks) and marks[index].start == begin else None
        family = _FAMILY[opened.casefold()][0] if opened else -1
        opens = here is not None and not here.closes and family in (-1, here.family)
        if not (opened or opens):
            return start
        end = _closing(marks, index + opens, here.family if here and opens else family)
        if end is None:
            return None
        start, opened = end, ""


def _first(marks: list[_Mark], position: int) -> int:
    """The index of the first mark at or after a position."""
    return bisect_right(marks, position - 1, key=lambda m: m.start)


def _closing(marks: list[_Mark], index: int, family: int) -> int | None:
    """Where the section ends in which ``marks[index]`` is the first mark; None if nowhere."""
    depth, quoted = 1, None
    for mark in map(marks.__getitem__, range(index, len(marks))):  # no copy of the rest
        if mark.family != family:
            continue
        if mark.quoted:
            quoted = mark.end if mark.closes and quoted is None else quoted
        elif mark.closes:
            depth -= 1
            if depth == 0:
                return mark.end
        elif not mark.mentioned:
            depth += 1
    return quoted if depth == 1 else None


def _stray(text: str, marks: list[_Mark], start: int, thinks: bool) -> int:
    """The end of the last section that does not open what begins at ``start``; else ``start``.

    ``thinks``: whether the reply has had a section already.
    """
    index = _first(marks, start)
    if index == len(marks):
        return start
    blocks = _blocks(text, start)
    ends = [b for _, b in blocks]

    def in_code(position: int) -> bool:
        i = bisect_right(ends, position)
        return i < len(blocks) and blocks[i][0] <= position

    open_: dict[int, list[_Mark]] = {}
    end = start
    for mark in map(marks.__getitem__, range(index, len(marks))):  # no copy of the rest
        others = open_.setdefault(mark.family, [])
        if not mark.closes:
            if not mark.mentioned or mark.quoted:
                others.append(mark)
        elif others:
            opener = others.pop()
            if (opener.begins or thinks) and not opener.quoted and not in_code(opener.start):
                end = mark.end
        elif mark.alone or not (mark.quoted or in_code(mark.start)):
            end = mark.end
    return end


def _blocks(text: str, start: int) -> list[tuple[int, int]]:
    """The closed blocks of code.

    A fence with words after it closes none: the block before was never closed, as where a draft
    breaks off.
    """
    blocks: list[tuple[int, int]] = []
    fence, opened = "", 0
    # A mark ends a line: "```</think>" closes a block, "</think>```python" opens one.
    lines = _MARK.sub(lambda found: "\n" * len(found[0]), text)
    for found in _FENCE.finditer(lines, start):
        if fence and found[1].startswith(fence) and not found[2].strip():
            blocks.append((opened, found.end()))
            fence = ""
        elif not fence or found[2].strip():
            fence, opened = found[1], found.start()
    return blocks


def _channels(text: str, opened: str) -> Reply:
    """gpt-oss: ``<|channel|>NAME<|message|>...``; the last ``final`` channel is the answer."""
    reasoning: list[str] = []
    answer = (len(text), len(text))
    # What the prompt has opened goes on at once.
    name, body = (opened[len(_CHANNEL) : -len(_MESSAGE)], 0) if opened else ("", -1)
    position = 0
    while True:
        if body < 0:
            header = text.find(_CHANNEL, position)
            begin = text.find(_MESSAGE, header) if header >= 0 else -1
            if begin < 0:
                break
            name, body = text[header + len(_CHANNEL) : begin], begin + len(_MESSAGE)
        found = _CHANNEL_END.search(text, body)
        end = found.start() if found else len(text)
        if name.split()[:1] == ["final"]:
            answer = (_skip(text, body) if body < end else body, end)
        else:
            reasoning.append(text[body:end].strip())
        position, body = end, -1
    return Reply("\n\n".join(filter(None, reasoning)), *answer)
