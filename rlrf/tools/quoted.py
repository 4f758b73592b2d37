"""Which places of a text are code that it shows: a call there is no call.

A block between fences of backticks or tildes, and a span between backticks on one line. What is
never closed shows nothing, as in :mod:`rlrf.reasoning`: a stray backtick must not hide a call.
Blocks are looked for from left to right, so a fence in the argument of a call opens none.

Work is linear: every fence and every line is looked at once.

It does not read the rest of Markdown: indented code, quotes and HTML are text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from typing import NamedTuple

_FENCE = re.compile(r"^[ \t]*(?:(`{3,}+)([^`\n]*)|(~{3,}+)([^\n]*))$", re.MULTILINE)
_TICKS = re.compile(r"`+")


class Shown(NamedTuple):
    """A piece of code.

    Attributes:
        start: where it begins, its marks included.
        end: and where it ends.
        body: the characters of the code itself.
        language: what stands behind the opening fence; None for a span in a line.
    """

    start: int
    end: int
    body: tuple[int, int]
    language: str | None


class _Fence(NamedTuple):
    start: int
    end: int
    mark: str
    info: str


class Quoted:
    """The code in a text, asked for from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self._fences = [
            _Fence(f.start(), f.end(), f[1] or f[3], (f[2] or f[4] or "").strip())
            for f in _FENCE.finditer(text)
        ]
        # The longest that may close a block from each on, for each character.
        self._closing: dict[str, list[int]] = {}
        for mark in "`~":
            longest = [0]
            for fence in reversed(self._fences):
                closes = fence.mark[0] == mark and not fence.info
                longest.append(max(longest[-1], len(fence.mark) if closes else 0))
            self._closing[mark] = longest[::-1]
        self._shown: Shown | None = None
        self._ticks = _TICKS.search(text)
        self._line_end = -1
        self._runs: dict[int, list[int]] = {}  # where those of a length stand in the line

    def covering(self, place: int) -> Shown | None:
        """The code that a place is in; no earlier place may be asked for after it."""
        while self._shown is None or self._shown.end <= place:
            number = bisect_left(self._fences, self.at, key=lambda fence: fence.start)
            fence = self._fences[number] if number < len(self._fences) else None
            if self._ticks is not None and self._ticks.start() < self.at:
                self._ticks = _TICKS.search(self.text, self.at)
            ticks = self._ticks
            if fence is not None and (ticks is None or fence.start <= ticks.start()):
                if fence.start > place:
                    return None
                self._shown = self._block(number)
                self.at = self._shown.end if self._shown else fence.end
            elif ticks is not None and ticks.start() <= place:
                self._shown = self._span(ticks.start(), ticks.end())
                self.at = self._shown.end if self._shown else ticks.end()
            else:
                return None
        return self._shown

    def skip(self, place: int) -> None:
        """What stands before a place has been read as something else."""
        self.at, self._shown = place, None

    def _block(self, number: int) -> Shown | None:
        """The block that a fence opens; None where nothing closes it."""
        opening = self._fences[number]
        length = len(opening.mark)
        if self._closing[opening.mark[0]][number + 1] < length:
            return None
        for fence in map(self._fences.__getitem__, range(number + 1, len(self._fences))):
            if fence.mark.startswith(opening.mark) and not fence.info:
                body = (min(opening.end + 1, fence.start), fence.start)
                return Shown(opening.start, fence.end, body, opening.info)
        return None

    def _span(self, start: int, end: int) -> Shown | None:
        """What a run of backticks opens in its line; None where no run closes it."""
        if start > self._line_end:
            line_end = self.text.find("\n", start)
            self._line_end = len(self.text) if line_end < 0 else line_end
            self._runs = defaultdict(list)
            for run in _TICKS.finditer(self.text, start, self._line_end):
                self._runs[run.end() - run.start()].append(run.start())
        places = self._runs[end - start]
        following = bisect_left(places, end)
        if following == len(places):
            return None
        close = places[following]
        return Shown(start, close + end - start, (end, close), None)
