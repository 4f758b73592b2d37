"""Feedback: why an attempt failed, as typed, tokenizable text.

An environment answers every step with a reward and a :class:`Feedback`: an immutable tuple of
:class:`Segment`. A segment says what kind of fault it reports, how much of the hidden answer it
gives away (``reveals``), and which characters of the attempt it blames (``span``). From that,
everything downstream follows without parsing text: :meth:`Feedback.at_level` masks what a level
must not show, :meth:`Feedback.tokenize` gives ids with a segment index for each, and
:func:`span_to_tokens` maps a blamed span to the sampled tokens.

Text in feedback may be the output of an attacker's program. It is made safe when a segment is
built (control, ANSI and bidirectional characters go, length is capped at head and tail) and once
more when it meets a tokenizer (special tokens are never produced).

Why: design/feedback.md.
"""

from __future__ import annotations

import enum
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args, overload

from rlrf.errors import OutcomeError, UsageError, nearest
from rlrf.messages import whole_text

Kind = Literal[
    "compile_error",
    "runtime_error",
    "wrong_answer",
    "time_limit",
    "memory_limit",
    "output_limit",
    "format_error",
    "truncated_attempt",
    "tool_error",
    "state_mismatch",
    "critique",
    "rubric",
    "lint",
    "hint",
    "reference",
]
Severity = Literal["error", "warning", "info"]
Reveals = Literal["nothing", "location", "expected", "reference"]

KINDS: tuple[str, ...] = get_args(Kind)
SEVERITIES: tuple[str, ...] = get_args(Severity)
REVEALS: tuple[str, ...] = get_args(Reveals)

MAX_SEGMENT_CHARS = 8192
"""A segment longer than this keeps its head and tail; the middle becomes a truncation mark."""


MAX_SEGMENTS = 256
"""What an environment answers keeps so many segments; a note stands for the others."""


class Level(enum.IntEnum):
    """How much of the feedback is shown, from nothing to the reference solution.

    ``none`` shows nothing; ``binary`` that the attempt failed; ``category`` the kinds of fault;
    ``located`` adds where; ``explained`` the full text, short of hidden answers; ``expected``
    adds expected values; ``reference`` adds reference solutions.
    """

    none = 0
    binary = 1
    category = 2
    located = 3
    explained = 4
    expected = 5
    reference = 6

    @classmethod
    def parse(cls, value: Level | str | int) -> Level:
        """The level named by ``value``.

        Raises:
            UsageError: no level has that name or number.
        """
        try:
            return cls[value] if isinstance(value, str) else cls(value)
        except (KeyError, ValueError):
            raise UsageError(
                f"unknown feedback level {value!r}; levels are {', '.join(m.name for m in cls)}"
                + nearest(value, [m.name for m in cls])
            ) from None


# The lowest level at which a segment's own text is shown.
_SHOWN_FROM: dict[str, Level] = {
    "location": Level.located,
    "nothing": Level.explained,
    "expected": Level.expected,
    "reference": Level.reference,
}

_TITLES: dict[str, str] = {
    "compile_error": "The program does not compile.",
    "runtime_error": "The program raised an error.",
    "wrong_answer": "The answer is wrong.",
    "time_limit": "The time limit was exceeded.",
    "memory_limit": "The memory limit was exceeded.",
    "output_limit": "The output limit was exceeded.",
    "format_error": "The format of the reply is wrong.",
    "truncated_attempt": "The attempt was cut off before its end.",
    "tool_error": "A tool call failed.",
    "state_mismatch": "The final state is not the one asked for.",
    "critique": "A reviewer found a fault.",
    "rubric": "A criterion is not met.",
    "lint": "The code has a style fault.",
    "hint": "There is a hint.",
    "reference": "There is a reference solution.",
}

# ECMA-48: control sequences; control strings (title, link), which end at the line at the latest so
# that one without an end cannot swallow what follows; all shorter escapes.
_ANSI = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]"
)


def clean_text(text: str, max_chars: int = MAX_SEGMENT_CHARS) -> str:
    """Make untrusted program output plain: no ANSI, control, bidi or zero-width characters.

    Line ends become newlines; lone surrogates become U+FFFD. Text over ``max_chars`` keeps its head
    and its tail around a mark that says how many characters are gone.
    """
    text = _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    # Cc control, Cf format (bidi, zero-width), Cs lone surrogates: none may reach a prompt.
    if not text.isascii() or any(c < " " and c not in "\n\t" for c in text) or "\x7f" in text:
        kept = []
        for c in text:
            category = unicodedata.category(c)
            if category == "Cs":
                kept.append("�")
            elif c in "\n\t" or category not in ("Cc", "Cf"):
                kept.append(c)
        text = "".join(kept)
    return shorten(text, max_chars)


def shorten(text: str, max_chars: int) -> str:
    """Keep the head and the tail of ``text`` within ``max_chars`` (the end says most: 2/3 tail).

    A mark between them says how many characters are gone; where there is no room for it, the tail
    alone stays.
    """
    if len(text) <= max_chars:
        return text
    mark = "\n[... {} characters cut ...]\n"
    room = max_chars - len(mark.format(len(text)))
    if room < 0:
        return text[len(text) - max_chars :]
    head = room // 3
    tail = room - head
    return text[:head] + mark.format(len(text) - room) + text[len(text) - tail :]


class Tokenizer(Protocol):
    """What rlrf asks of a tokenizer; Hugging Face tokenizers fit."""

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of the special tokens."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Text to ids."""
        ...


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Every text that ``tokenizer`` would turn into a special or added control token."""
    found = set(getattr(tokenizer, "all_special_tokens", ()))
    for token in getattr(tokenizer, "added_tokens_decoder", {}).values():
        # Qwen's <tool_call> is added and not "special", yet a template reads it as markup. A
        # single added character is no markup: some tokenizers add plain letters.
        if len(str(token)) > 1:
            found.add(str(token))
    return tuple(sorted((t for t in found if t.strip()), key=lambda t: (-len(t), t)))


def defuse(text: str, tokenizer: Any) -> str:
    """Break every special token of ``tokenizer`` that stands in ``text`` with a space.

    ``<|im_end|>`` becomes ``< |im_end|>``: still readable, never a control token. Lone surrogates
    become U+FFFD.
    """
    return defuser(tokenizer)(text)


def defuser(tokenizer: Any) -> Callable[[str], str]:
    """:func:`defuse` for one tokenizer, whose tokens are listed once: for many texts."""
    tokens = special_tokens(tokenizer)
    pattern = re.compile("|".join(re.escape(t) for t in tokens)) if tokens else None

    def defused(text: str) -> str:
        text = whole_text(text)
        if pattern is None:
            return text
        previous = None
        while previous != text:  # breaking one token may uncover a shorter one inside it
            previous = text
            text = pattern.sub(_broken, text)
        return text

    return defused


def _broken(match: re.Match[str]) -> str:
    token = match.group()
    broken = token[0] + " " + token[1:]
    return " " if token in broken else broken  # a space cannot break "x" or "x "


@dataclass(frozen=True, slots=True)
class Segment:
    """One thing the environment has to say about an attempt.

    Attributes:
        kind: what sort of fault (one of :data:`KINDS`).
        text: the words; cleaned and capped when the segment is built.
        severity: ``error`` (the attempt failed for this), ``warning`` or ``info``.
        source: who says so: ``"checker"``, ``"compiler"``, ``"judge:gpt"``, a tool's name.
        reveals: how much of the hidden answer the text gives away. ``location`` marks a text that
            says only *where* the fault is; ``nothing`` an explanation that needs no hidden data.
        span: ``(start, end)`` characters of the attempt that are to blame, half open.
        priority: what to keep when there is no room for all; higher stays longer.
        untrusted: the text quotes what the attempt produced (its output, its traceback).

    Raises:
        OutcomeError: an unknown kind, severity or reveals; a span that is no range; a field of
            another type.
    """

    kind: Kind
    text: str
    severity: Severity = "error"
    source: str = "environment"
    reveals: Reveals = "nothing"
    span: tuple[int, int] | None = None
    priority: int = 0
    untrusted: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("severity", self.severity, SEVERITIES),
            ("reveals", self.reveals, REVEALS),
        ):
            if value not in known:
                raise OutcomeError(
                    f"Segment.{name} is {value!r}; it must be one of {', '.join(known)}"
                    + nearest(value, known)
                )
        for name in ("text", "source"):
            if not isinstance(getattr(self, name), str):
                raise OutcomeError(
                    f"Segment.{name} is {getattr(self, name)!r}; it must be a string"
                )
        if self.span is not None:
            object.__setattr__(self, "span", _range(self.span))
        try:
            object.__setattr__(self, "priority", operator.index(self.priority))
        except TypeError:
            raise OutcomeError(
                f"Segment.priority is {self.priority!r}; it must be a whole number"
            ) from None
        object.__setattr__(self, "untrusted", bool(self.untrusted))
        object.__setattr__(self, "text", clean_text(self.text))

    def to_dict(self) -> dict[str, Any]:
        """The segment as JSON data; :meth:`from_dict` reads it back."""
        return {
            "kind": self.kind,
            "text": self.text,
            "severity": self.severity,
            "source": self.source,
            "reveals": self.reveals,
            "span": list(self.span) if self.span else None,
            "priority": self.priority,
            "untrusted": self.untrusted,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Segment:
        """The segment that :meth:`to_dict` wrote."""
        span = data.get("span")
        return cls(**{**data, "span": tuple(span) if span else None})


def _range(span: Any) -> tuple[int, int]:
    try:
        start, end = span
        start, end = int(start), int(end)
    except (TypeError, ValueError, OverflowError):
        start, end = 0, -1
    if not 0 <= start <= end:
        raise OutcomeError(
            f"Segment.span is {span!r}; it must be (start, end) with 0 <= start <= end"
        )
    return start, end


@dataclass(frozen=True, slots=True)
class TokenizedFeedback:
    """Feedback as token ids.

    Attributes:
        input_ids: ``[n]`` token ids of the rendered text; no special token among them.
        segment_ids: ``[n]`` index of the segment each token belongs to.
        offsets: ``[n]`` ``(start, end)`` characters of each token in :attr:`text`.
        truncated: whether something had to go to stay within ``max_tokens``.
        text: the rendered text that was tokenized.
    """

    input_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    truncated: bool
    text: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Feedback(Sequence[Segment]):
    """An immutable tuple of segments; empty when there is nothing to say (and then falsy)."""

    segments: tuple[Segment, ...] = field(default=())

    def __init__(self, segments: Iterable[Segment] | Segment = ()) -> None:
        items = (segments,) if isinstance(segments, Segment) else tuple(segments)
        for item in items:
            if not isinstance(item, Segment):
                raise OutcomeError(
                    f"Feedback holds Segments, got {item!r}; "
                    "write Segment(kind, text) or Feedback.of(kind, text)"
                )
        object.__setattr__(self, "segments", items)

    @classmethod
    def of(cls, kind: Kind, text: str, **fields: Any) -> Feedback:
        """Feedback of one segment."""
        return cls((Segment(kind, text, **fields),))

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Feedback: ...
    def __getitem__(self, index: int | slice) -> Segment | Feedback:
        if isinstance(index, slice):
            return Feedback(self.segments[index])
        return self.segments[index]

    def __len__(self) -> int:
        return len(self.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __add__(self, other: Iterable[Segment]) -> Feedback:
        return Feedback((*self.segments, *other))

    def __str__(self) -> str:
        return self.text

    @property
    def text(self) -> str:
        """The segments' texts in order, a blank line between them."""
        return _SEPARATOR.join(s.text for s in self.segments if s.text)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that occur, each once, in order."""
        return tuple(dict.fromkeys(s.kind for s in self.segments))

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The blamed character ranges of the attempt, in order."""
        return tuple(s.span for s in self.segments if s.span is not None)

    def at_level(self, level: Level | str | int) -> Feedback:
        """The feedback as ``level`` shows it.

        No kind of error is dropped silently: where the level hides every text of a kind, the kind
        is still named (from ``category``) and located (from ``located``). Idempotent, and
        ``f.at_level(a).at_level(b) == f.at_level(min(a, b))``.
        """
        level = Level.parse(level)
        if level is Level.none or not self.segments:
            return Feedback()
        if self.segments == (_BINARY,):
            return self
        spoken = _by_kind(self.segments)
        if level >= Level.explained:
            shown = []
            for segment in self.segments:
                if _SHOWN_FROM[segment.reveals] <= level:
                    shown.append(segment)
                elif spoken.get(segment.kind, (None,))[0] is segment:
                    shown.append(_located_title(spoken[segment.kind]))
            return Feedback(shown)
        # What is no error says nothing below `explained`: it may hint at what is right.
        if not spoken:
            return Feedback()
        if level is Level.binary:
            return Feedback(_BINARY)
        if level is Level.category:
            return Feedback(_title(errors) for errors in spoken.values())
        shown = []
        for errors in spoken.values():
            own = [s for s in errors if s.reveals == "location"]
            shown += [_title(errors), *own] if own else [_located_title(errors)]
        return Feedback(shown)

    def capped(self, most: int = MAX_SEGMENTS) -> Feedback:
        """At most ``most`` segments: the first of each kind, then by priority; a note for the rest.

        In their order, the note last.
        """
        if len(self.segments) <= most:
            return self
        ranked = _by_priority(range(len(self.segments)), self.segments)
        firsts: dict[tuple[str, str], int] = {}
        for i in ranked:
            firsts.setdefault((self.segments[i].kind, self.segments[i].severity), i)
        chosen = dict.fromkeys((*firsts.values(), *ranked))
        kept = sorted(list(chosen)[: most - 1])
        gone = len(self.segments) - len(kept)
        note = Segment(
            "hint",
            f"[... {gone} further remarks are left out ...]",
            severity="info",
            source="rlrf",
            priority=min(s.priority for s in self.segments),
        )
        return Feedback((*(self.segments[i] for i in kept), note))

    def render(self, max_chars: int | None = None) -> str:
        """The text, cut to ``max_chars`` at the cost of the segments that matter least.

        As in :meth:`tokenize`, the first segment that does not fit keeps its head and tail.
        """
        if max_chars is None or len(self.text) <= max_chars:
            return self.text
        left = max_chars
        kept: dict[int, str] = {}
        texts = {i: s.text for i, s in enumerate(self.segments) if s.text}
        for i in _by_priority(texts, self.segments):
            kept[i] = shorten(texts[i], left)
            left -= len(kept[i]) + len(_SEPARATOR)
            if left <= 0 or kept[i] != texts[i]:
                break
        return _SEPARATOR.join(kept[i] for i in sorted(kept))

    def tokenize(self, tokenizer: Any, max_tokens: int | None = None) -> TokenizedFeedback:
        """Token ids with the segment each belongs to; never a special token.

        Segments are taken by descending priority until ``max_tokens`` is used up. The first that
        does not fit keeps its head and tail around a mark; the rest are dropped. They are then
        set in their original order.

        Args:
            tokenizer: a Hugging Face tokenizer (a fast one also gives character offsets that are
                exact; a slow one offsets by decoding).
            max_tokens: the budget; None for no limit.

        Raises:
            UsageError: ``max_tokens`` is negative.
        """
        if max_tokens is not None and max_tokens < 0:
            raise UsageError(f"max_tokens is {max_tokens}; it must be >= 0 or None")
        defused = defuser(tokenizer)
        texts = {i: defused(s.text) for i, s in enumerate(self.segments) if s.text}
        encoded, truncated = _fit(texts, self.segments, tokenizer, max_tokens)
        ids: list[int] = []
        segment_ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        text = ""
        for i in sorted(encoded):
            piece, piece_ids, piece_offsets = encoded[i]
            base = len(text)
            text += piece
            ids += piece_ids
            segment_ids += [i] * len(piece_ids)
            offsets += [(base + a, base + b) for a, b in piece_offsets]
        return TokenizedFeedback(tuple(ids), tuple(segment_ids), tuple(offsets), truncated, text)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The segments as JSON data; :meth:`from_dicts` reads them back."""
        return [s.to_dict() for s in self.segments]

    @classmethod
    def from_dicts(cls, data: Iterable[Mapping[str, Any]]) -> Feedback:
        """The feedback that :meth:`to_dicts` wrote."""
        return cls(Segment.from_dict(d) for d in data)


_SEPARATOR = "\n\n"
# One segment for every failure: its kind and source must not tell failures apart either.
_BINARY = Segment("wrong_answer", "The attempt is not correct.")
_MARK = "\n[... cut ...]\n"

_Piece = tuple[str, list[int], list[tuple[int, int]]]


def _by_kind(segments: Iterable[Segment]) -> dict[str, list[Segment]]:
    """The errors of each kind that speak for it: those that reveal least of it, in order."""
    errors = [s for s in segments if s.severity == "error" and s.kind != "reference"]

    def shown_from(segment: Segment) -> Level:
        return max(_SHOWN_FROM[segment.reveals], Level.explained)

    least: dict[str, Level] = {}
    for s in errors:
        least[s.kind] = min(least.get(s.kind, Level.reference), shown_from(s))
    found: dict[str, list[Segment]] = {}
    for s in errors:
        if shown_from(s) == least[s.kind]:
            found.setdefault(s.kind, []).append(s)
    return found


def _title(errors: Sequence[Segment]) -> Segment:
    """Errors of one kind, reduced to the kind."""
    first = errors[0]
    priority = max(s.priority for s in errors)
    return Segment(first.kind, _TITLES[first.kind], source=first.source, priority=priority)


def _located_title(errors: Sequence[Segment]) -> Segment:
    """Errors of one kind, reduced to the kind and the first place they blame."""
    title = _title(errors)
    span = next((s.span for s in errors if s.span is not None), None)
    if span is None:
        return title
    where = f"{title.text} At characters {span[0]} to {span[1]} of the attempt."
    return replace(title, text=where, span=span)


def _by_priority(texts: Iterable[int], segments: Sequence[Segment]) -> list[int]:
    return sorted(texts, key=lambda i: (-segments[i].priority, i))


def _fit(
    texts: Mapping[int, str],
    segments: Sequence[Segment],
    tokenizer: Any,
    max_tokens: int | None,
) -> tuple[dict[int, _Piece], bool]:
    """Encode the segments that fit, the most important first; see :meth:`Feedback.tokenize`."""
    left = max_tokens
    chosen: dict[int, _Piece] = {}
    last = max(texts, default=-1)
    for i in _by_priority(texts, segments):
        # The separator belongs to the segment before it, so that ids concatenate to the text.
        tail = "" if i == last else _SEPARATOR
        piece = _encode(tokenizer, texts[i] + tail)
        if left is None or len(piece[1]) <= left:
            chosen[i] = piece
            left = None if left is None else left - len(piece[1])
            continue
        cut = _cut_middle(tokenizer, texts[i], tail, left)
        if cut[1]:
            chosen[i] = cut
        return chosen, True
    return chosen, False


def _cut_middle(tokenizer: Any, text: str, tail: str, budget: int) -> _Piece:
    """The longest head + mark + tail of ``text`` within ``budget`` tokens; else just a head."""

    def longest(cut: Callable[[int], str]) -> _Piece:
        best: _Piece = ("", [], [])
        low, high = 1, len(text)
        while low <= high:
            keep = (low + high) // 2
            piece = _encode(tokenizer, cut(keep) + tail)
            if len(piece[1]) <= budget:
                best, low = piece, keep + 1
            else:
                high = keep - 1
        return best

    def around_mark(keep: int) -> str:
        head = keep // 3
        return text[:head] + _MARK + text[len(text) - (keep - head) :]

    best = longest(around_mark)
    return best if best[1] else longest(lambda keep: text[:keep])  # no room for the mark


def _encode(tokenizer: Any, text: str) -> _Piece:
    """Ids and character offsets of ``text``, without special tokens."""
    if getattr(tokenizer, "is_fast", False):
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return text, list(out["input_ids"]), [(int(a), int(b)) for a, b in out["offset_mapping"]]
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return text, ids, token_offsets(tokenizer, ids)


def token_offsets(tokenizer: Any, token_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Characters of the decoded text that each token stands for, ``[n]`` pairs, half open.

    Decoding a growing prefix is the only rule that holds for every tokenizer; a token that ends
    inside a multi-byte character gets an empty range until the character is complete.
    """
    ends: list[int] = []
    for n in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[:n]), skip_special_tokens=False)
        end = len(text.rstrip("�"))
        ends.append(max(end, ends[-1] if ends else 0))
    return list(zip([0, *ends], ends, strict=False))


def span_to_tokens(span: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The half-open range of tokens that overlap the character range ``span``.

    Args:
        span: characters of the attempt, e.g. :attr:`Segment.span`.
        offsets: characters of each sampled token, e.g. from :func:`token_offsets`.
    """
    start, end = span
    hit = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not hit:
        return 0, 0
    first = hit[0]
    # The earlier bytes of a character have empty ranges, right before the one that completes it.
    while first and offsets[first - 1] == (offsets[first][0],) * 2:
        first -= 1
    return first, hit[-1] + 1
