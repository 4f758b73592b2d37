"""Where a reply's reasoning ends and its answer begins.

One function, :func:`split_reasoning`, for every policy and every environment. The rule:

1. A section opens where the reply begins, whitespace and marks of a beginning apart (or the chat
   template has opened it at the end of the prompt), and reaches to its closing mark; to one of
   another kind where its own does not come. Sections may follow each other and be nested. What
   follows is the answer. A section that is never closed has none.
2. A closing mark that nothing opens ends a section that the chat template opened (Qwen3, R1,
   DeepSeek V3.1): what stands before the last such mark is reasoning. Likewise a later section:
   what stands before its end is reasoning (vLLM's and SGLang's parsers read both so, but split at
   the first mark). Where nothing stands behind either, the answer is what came before it, after an
   earlier section's end. A later section that begins a line or follows a sentence and is never
   closed leaves no answer, whatever came before. Elsewhere such a mark is text.
3. A mark that is quoted is text: between quotes or backticks on its line, within triple quotes, or
   within a closed block of code. So is a closing mark that nothing opens and a sentence mentions:
   "I cut at the </think> tag." Models write the mark on a line of its own or, as DeepSeek V3.1,
   straight behind the reasoning. A fence that is open in the reasoning hides no mark: such a block
   is not closed, or the fences behind the mark pair up without it.
4. gpt-oss channels: the answer is the ``final`` one; a reply in channels without it has none.

The marks are those that vLLM's and SGLang's reasoning parsers know (looked at 2026-11). Granite 3.2
(plain sentences for marks) and Inkling (messages of typed content) are not among them. One pass
over the text and one over its marks.
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
    ("<longcat_think>", "</longcat_think>"),
    ("<think:opensource>", "</think:opensource>"),  # Hunyuan 3
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
# What may stand before the first word of a reply and is none of it.
_BEGIN = re.compile(
    r"(?:\s|[\ufeff\u200b]|<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>"
    r"|<\|start\|>assistant(?=<\|channel\|>)|assistant(?=analysis))*"
)
_LABELLED = ("<|channel>", "<unused94>")
_LABEL = re.compile(r"^thought(?:\s+|$)")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})(.*)$", re.MULTILINE)
# Directly behind a fence: it opens a block, also within another, say in a docstring.
_WORD = re.compile(r"[A-Za-z][\w.+#-]*")
_QUOTES = "\"'`"
# An apostrophe within a word is none, nor is a fence.
_QUOTE = re.compile(r"\"|(?<!\w)'|'(?!\w)|(?<!`)`{1,2}(?!`)")
_TRIPLES = (re.compile('"""'), re.compile("'''"))
# What stands before and behind a closing mark in a sentence that mentions it.
_WORDS_BEFORE = re.compile(r"[^\W_][,;:]? |.?\(")
_WORDS_BEHIND = re.compile(r"[ \t]+[a-z]|[.,;:!?)]")

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
    quoted: bool  # between quotes on its line, or triple ones
    surely: bool  # that with a quote that opens directly before it
    begins: bool  # its line
    alone: bool  # on its line
    follows: bool  # the end of a sentence, or of a block of code
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
    begin = _skip(text, 0)
    if opened.startswith(_CHANNEL) or (text.startswith(_CHANNEL, begin) and _MESSAGE in text):
        return _channels(text, opened)
    if text.startswith("analysis", begin) and _BARE_FINAL in text:
        at = text.rindex(_BARE_FINAL)
        return Reply(text[begin + len("analysis") : at].strip(), at + len(_BARE_FINAL), len(text))
    marks = list(_marks(text))
    if not marks and not opened:
        return Reply(None, 0, len(text))
    start, end = _sections(text, marks, opened), len(text)
    if start is not None and strays:
        start, end = _strays(text, marks, start)
    if start is None:
        return Reply(_plain(text), len(text), len(text))
    if end < len(text):  # the answer came before the last section
        reasoning = "\n\n".join(filter(None, (_plain(text[:start]), _plain(text[end:]))))
        return Reply(reasoning, _skip(text, start) if start else 0, end)
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
    found = (_SPACE if start else _BEGIN).match(text, start)
    return found.end() if found else start


def _plain(text: str) -> str:
    """Reasoning without its marks at either end."""
    text = text[_skip(text, 0) :].rstrip()
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
    triples = [[found.start() for found in quote.finditer(text)] for quote in _TRIPLES]
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
        before, behind = text[max(start - 2, line_start) : start], text[end : end + 1]
        if closes:
            mentioned = bool(_WORDS_BEFORE.fullmatch(before) and _WORDS_BEHIND.match(text, end))
        else:
            mentioned = not (behind.isalnum() or (behind and behind in "\n<`[{("))
        quoted = any(odd[q] and last[q] >= end for q in _QUOTES)
        yield _Mark(
            start,
            end,
            family,
            closes,
            quoted or any(len(t) % 2 == 0 and bisect_right(t, start) % 2 for t in triples),
            quoted and odd.get(before[-1:], False),
            begins,
            begins and line_end - end < 80 and not text[end:line_end].strip(),
            before.rstrip()[-1:] in tuple(".!?`"),
            not begins and mentioned,
        )


def _sections(text: str, marks: list[_Mark], opened: str) -> int | None:
    """Where the sections end with which the text begins; None if the last has no end."""
    start = 0
    last = {mark.family: mark.start for mark in marks if mark.closes and not mark.quoted}
    while True:
        begin = _skip(text, start)
        index = _first(marks, begin)
        here = marks[index] if index < len(marks) and marks[index].start == begin else None
        family = _FAMILY[opened.casefold()][0] if opened else -1
        opens = here is not None and not here.closes and family in (-1, here.family)
        if not (opened or opens):
            return start
        family = here.family if here and opens else family
        end = _closing(marks, index + opens, family, last.get(family, -1))
        if end is None:
            return None
        start, opened = end, ""


def _first(marks: list[_Mark], position: int) -> int:
    """The index of the first mark at or after a position."""
    return bisect_right(marks, position - 1, key=lambda m: m.start)


def _closing(marks: list[_Mark], index: int, family: int, last: int) -> int | None:
    """Where the section ends in which ``marks[index]`` is the first mark; None if nowhere.

    ``last``: where the last mark stands that closes the family; behind it any that closes will do.
    """
    depth, quoted = 1, None
    others: dict[int, int] = {}  # open sections of other families
    for mark in map(marks.__getitem__, range(index, len(marks))):  # no copy of the rest
        if mark.family != family:
            if mark.quoted or (not mark.closes and mark.mentioned):
                continue
            open_ = others.get(mark.family, 0)
            if mark.closes and not open_ and last < mark.start:
                return mark.end
            others[mark.family] = max(0, open_ - 1) if mark.closes else open_ + 1
        elif mark.quoted:
            if mark.closes and not mark.surely and quoted is None:
                quoted = mark.end
        elif mark.closes:
            depth -= 1
            if depth == 0:
                return mark.end
        elif not mark.mentioned:
            depth += 1
    return quoted if depth == 1 else None


def _strays(text: str, marks: list[_Mark], start: int) -> tuple[int | None, int]:
    """The answer in what begins at ``start`` and may have sections further on.

    Where it begins and ends: None if there is none.
    """
    index = _first(marks, start)
    if index == len(marks):
        return start, len(text)
    blocks, fences = _blocks(text, start)
    ends, written = [b for _, b in blocks], len(text.rstrip())

    def in_code(position: int) -> bool:
        i = bisect_right(ends, position)
        return i < len(blocks) and blocks[i][0] <= position

    open_: dict[int, list[_Mark]] = {}
    sections: list[tuple[int, int]] = []  # those behind ``start``, none within another
    for mark in map(marks.__getitem__, range(index, len(marks))):  # no copy of the rest
        others = open_.setdefault(mark.family, [])
        if not mark.closes:
            if not mark.mentioned or mark.quoted:
                others.append(mark)
        elif others:
            opener = others.pop()
            if opener.quoted or in_code(opener.start):
                continue
            while sections and sections[-1][0] > opener.start:
                sections.pop()
            if opener.start < start:
                start = mark.end
            else:
                sections.append((opener.start, mark.end))
        elif mark.quoted or mark.mentioned:
            continue
        elif in_code(mark.start) and not (
            mark.alone and (len(fences) - bisect_right(fences, mark.start)) % 2 == 0
        ):
            continue  # else the block was open in the reasoning, and the fences behind pair up
        elif start and mark.end >= written and text[start : mark.start].strip():
            sections.append((mark.start, len(text)))
        else:
            start = mark.end
            sections.clear()
    answered = sections[-1][1] if sections else start
    if any(
        mark.start >= answered
        and (mark.begins or (mark.follows and not mark.mentioned))
        and not (mark.quoted or in_code(mark.start))
        for left in open_.values()
        for mark in left
    ):
        return None, len(text)
    stop = len(text)
    while sections:
        begin, end = sections.pop()
        if text[end:stop].strip():
            return end, stop
        stop = begin
    if stop < len(text) and not text[start:stop].strip():
        return None, len(text)
    return start, stop


def _blocks(text: str, start: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The closed blocks of code, and where all fences stand.

    A fence with a word directly behind it closes none: the block before was never closed, as where
    a draft breaks off.
    """
    blocks: list[tuple[int, int]] = []
    fences: list[int] = []
    fence, opened = "", 0
    # A mark ends a line: "```</think>" closes a block, "</think>```python" opens one.
    lines = _MARK.sub(lambda found: "\n" * len(found[0]), text)
    for found in _FENCE.finditer(lines, start):
        behind = found[2].rstrip()
        fences.append(found.start())
        if fence and found[1].startswith(fence) and not _WORD.fullmatch(behind):
            blocks.append((opened, found.end()))
            fence = ""
        elif not fence or behind:
            fence, opened = found[1], found.start()
    return blocks, fences


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
