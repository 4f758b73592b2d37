"""Finding one text in another although it is written otherwise, and what a hidden value is worth.

Texts are compared by their words and numbers: case, white space, quotes, punctuation and how a
number is written (``7,391``, ``7391.0``) make no difference. Everything is linear in the texts.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import functools
import itertools
import json
import math
import re
import unicodedata
import uuid
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

_SIGN, _REST = r"(?:(?<![\w)\]])-)?", r"(?:\.\d+)?(?:[eE][+-]?\d{1,4})?"
_NUMBER = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}}){{1,6}}(?![\d,])|\d+){_REST}"
_PLAIN_NUMBER = rf"{_SIGN}\d+{_REST}"
_LETTERS = (
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"  # written without spaces
    r"|(?:(?![\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af])[^\W\d_])+"
)
_WORDS = re.compile(f"{_NUMBER}|{_LETTERS}")
_SPLIT_WORDS = re.compile(f"{_PLAIN_NUMBER}|{_LETTERS}")  # [1,234,567] may be a list
_THOUSANDS = re.compile(r"\d,\d{3}")


def words(text: str, *, split: bool = False) -> Iterator[tuple[str, int, int]]:
    """The words and numbers of a text in one way of writing, with where they stand.

    Args:
        text: any text.
        split: whether a comma between digits parts two numbers.
    """
    for match in (_SPLIT_WORDS if split else _WORDS).finditer(text):
        yield _canonical(match[0]), match.start(), match.end()


def _canonical(word: str) -> str:
    if word[-1].isdigit() and (word[0] == "-" or word[0].isdigit()):
        digits = word.replace(",", "")
        if len(digits) > 24:  # more than a Decimal keeps
            return digits
        number = decimal.Decimal(digits).normalize()
        return str(number if number else abs(number))
    if word.isascii():
        return word.casefold()
    # One sign may stand for several words; a word here has no space in it.
    return "".join(unicodedata.normalize("NFKC", word).casefold().split())


class _Runs:
    """The runs of tokens in a text: what stands there is found without a search for each."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._found: dict[int, dict[int, int]] = {}

    def of(self, length: int) -> dict[int, int]:
        """Those of a length, by their hash, with where they begin first."""
        if length not in self._found:
            found = self._found[length] = {}
            for i in range(len(self._tokens) - length + 1):
                found.setdefault(hash(tuple(self._tokens[i : i + length])), i)
        return self._found[length]

    def hold(self, tokens: list[str]) -> bool:
        """Whether these stand there in a row; of many, all their runs."""
        length = min(len(tokens), _RUN)
        runs, last = self.of(length), len(tokens) - length
        return all(hash(tuple(tokens[i : i + length])) in runs for i in range(last + 1))


_RUN = 10


class Text:
    """A text to search in."""

    def __init__(self, raw: str) -> None:
        self.raw = raw
        self.forms = tuple(
            " " + "".join(word + " " for word, _, _ in words(raw, split=split))
            for split in ((False, True) if _THOUSANDS.search(raw) else (False,))
        )

    @functools.cached_property
    def _runs(self) -> list[_Runs]:
        return [_Runs(form.split()) for form in self.forms]

    @functools.cached_property
    def _squeezed(self) -> str:
        return "".join(self.raw.split())

    def holds(self, secret: Secret) -> bool:
        """Whether a hidden value stands in it, however it is written."""
        if secret.symbols:
            return secret.symbols in self._squeezed
        return any(runs.hold(there) for there in secret.tokens for runs in self._runs)

    def is_only(self, secret: Secret) -> bool:
        """Whether it is a hidden value and nothing else."""
        if secret.symbols:
            return secret.symbols == self._squeezed
        return any(there == form for there in secret.forms for form in self.forms)

    def where(self, secret: Secret) -> tuple[int, int]:
        """The characters at which a hidden value stands first."""
        for split in (False, True):
            found = list(words(self.raw, split=split))
            form = " " + "".join(word + " " for word, _, _ in found)
            for there in secret.forms:
                if (start := form.find(there)) >= 0:
                    first = form.count(" ", 0, start + 1) - 1
                    last = first + there.count(" ") - 2
                    return found[first][1], found[last][2]
        exact = self.raw.find(secret.text.strip())
        return (0, len(self.raw)) if exact < 0 else (exact, exact + len(secret.text.strip()))

    def before(self, secret: Secret) -> Iterator[tuple[list[str], str]]:
        """For its first occurrences: the five words before one, in order, and the one after."""
        for form in self.forms:
            for there in secret.forms:
                start = -1
                for _ in range(50):
                    if (start := form.find(there, start + 1)) < 0:
                        break
                    after = form[start + len(there) : start + len(there) + 40].split(" ", 1)[0]
                    yield form[max(0, start - 80) : start].split()[-5:], after


@dataclass(frozen=True)
class Secret:
    """A hidden value.

    Attributes:
        path: where in what is hidden it stands.
        key: the name it has there, or "".
        text: as it is.
        forms: its words between spaces, in the ways they may be read.
        symbols: what it consists of, where it has no words.
        bits: how unlikely it is that it stands somewhere by chance.
        answer: whether it is what a reply should be, by its name or because it is all there is.
    """

    path: str
    key: str
    text: str
    forms: tuple[str, ...]
    symbols: str
    bits: float
    answer: bool

    @classmethod
    def of(cls, path: str, key: str, text: str, answer: bool) -> Secret | None:
        """The value of that text; None if there is nothing to find."""
        forms = tuple(dict.fromkeys(f for f in Text(text).forms if f.strip()))
        symbols = "" if forms else "".join(text.split())
        if not forms and len(symbols) < 4:
            return None
        bits = _bits(forms[0].split()) if forms else 4.0 * len(set(symbols))
        return cls(path, key, text, forms, symbols, bits, answer)

    @functools.cached_property
    def tokens(self) -> list[list[str]]:
        """Its forms, word by word."""
        return [form.split() for form in self.forms]

    @property
    def same(self) -> Any:
        """Equal for values that differ only in how they are written."""
        return self.forms or self.symbols


def _bits(found: Sequence[str]) -> float:
    total = 0.0
    for word in found:
        if word in COMMON:
            total += 3
        elif word[-1].isdigit():
            digits = word.lstrip("-").partition("E")[0].replace(".", "")
            total += 3.32 * len(digits.strip("0") or "0")
        elif word.isascii():
            total += 3 * min(len(word), 8)
        else:
            total += 8 if len(word) == 1 else 4 * min(len(word), 8)
    return total


# --- what is hidden -------------------------------------------------------------------------------

_ANSWER = re.compile(
    r"(?:\w*_)?(?:answers?|solutions?|expected|targets?|labels?|gold|golden|truth|correct"
    r"|references?|secrets?|password|flag|gt)(?:_(?!(?:type|format|kind|lang|language|len|length|size"
    r"|count|source|unit|units|range|rule|level|id|ids|tokens?)$)\w+)?",
    re.IGNORECASE,
)
_TESTS = re.compile(
    r"(?:\w*_)?(?:tests?|test_cases?|test_list|cases|asserts?|rubrics?|criteria)", re.IGNORECASE
)
_PROGRAM = re.compile(r"(?:\w*_)?(?:solutions?|code|programs?|references?)", re.IGNORECASE)
_NAME = 80
"""What is longer names nothing."""


def is_answer(key: str) -> bool:
    """Whether what has that name is what a reply should be."""
    return len(key) <= _NAME and _ANSWER.fullmatch(key) is not None


def is_tests(key: str) -> bool:
    """Whether what has that name is what a reply is tried with."""
    return len(key) <= _NAME and _TESTS.fullmatch(key) is not None


def is_program(key: str) -> bool:
    """Whether what has that name is a program that solves a task."""
    return len(key) <= _NAME and _PROGRAM.fullmatch(key) is not None


class Hidden:
    """The values in what is hidden, whatever it is made of.

    Attributes:
        secrets: them, each once.
        public: those below something that says ``public: true`` of itself, as one text.
    """

    def __init__(self, value: Any, name: str = "hidden") -> None:
        self._found: dict[Any, Secret] = {}
        public: list[str] = []
        top = _is_scalar(value) or (_is_list(value) and len(value) <= 10)
        alone = len(_fields(value)) == 1  # then it needs no name to be the answer
        # Not recursive: what is hidden may be nested deeply.
        stack: list[tuple[Any, str, str, bool, bool, bool]] = [(value, name, "", top, False, False)]
        seen: dict[int, Any] = {}
        while stack:
            item, path, key, answer, many, shown = stack.pop()
            if _is_scalar(item):
                text = _text(item)
                public.append(text) if shown else self._add(path, key, text, answer)
                if isinstance(item, str) and item.lstrip()[:1] in ("{", "["):
                    inner = _parsed(item)
                    if inner is not None:
                        stack.append((inner, path, key, answer, many, shown))
                continue
            if id(item) in seen:
                continue
            seen[id(item)] = item
            if _is_list(item):
                items = list(item)
                scalars = all(_is_scalar(i) for i in items)
                if scalars and items and not shown:
                    self._add(path, key, " ".join(map(_text, items)), answer)
                few = answer and scalars and len(items) <= 10
                stack += [
                    (child, f"{path}[{i}]", key, few, many or not scalars, shown)
                    for i, child in reversed(list(enumerate(items)))
                ]
                continue
            fields = _fields(item)
            if fields.get("public") is True:
                shown = True
            if fields and all(_is_scalar(v) for v in fields.values()) and not shown:
                self._add(path, key, " ".join(f"{k} {_text(v)}" for k, v in fields.items()), answer)
            stack += [
                (
                    child,
                    f"{path}.{k}",
                    k,
                    not many and (is_answer(k) or (alone and not is_tests(k))),
                    many,
                    shown,
                )
                for k, child in reversed(fields.items())
            ]
        # Short values that say nothing alone may say it together: all tests, a whole call.
        wholes = {"": value, **_fields(value)}
        for key, item in wholes.items():
            if not _is_scalar(item) and item is not None:
                path = f"{name}.{key}" if key else name
                self._add(
                    path, key, " ".join(itertools.islice(_flat(item), 10_000)), is_answer(key)
                )
        self.secrets = tuple(self._found.values())
        self.public = Text("\n".join(public))

    def _add(self, path: str, key: str, text: str, answer: bool) -> None:
        secret = Secret.of(path, key, text, answer)
        if secret is None:
            return
        known = self._found.get(secret.same)
        if known is None or (answer and not known.answer):
            self._found[secret.same] = secret


def _flat(value: Any) -> Iterator[str]:
    """Names and values in order, as they would be printed."""
    stack, seen = [value], set[int]()
    while stack:
        item = stack.pop()
        if _is_scalar(item):
            yield _text(item)
        elif id(item) not in seen:
            seen.add(id(item))
            if _is_list(item):
                stack += reversed(list(item))
            else:
                fields = _fields(item)
                if fields.get("public") is True:
                    continue
                stack += [part for pair in reversed(fields.items()) for part in reversed(pair)]


def names(value: Any) -> Text:
    """The names of all that something holds."""
    stack, found, seen = [value], list[str](), set[int]()
    while stack:
        item = stack.pop()
        if _is_scalar(item) or id(item) in seen:
            continue
        seen.add(id(item))
        fields = {} if _is_list(item) else _fields(item)
        found += fields
        stack += list(item) if _is_list(item) else list(fields.values())
    return Text("\n".join(found))


def _is_scalar(value: Any) -> bool:
    plain = (str, bytes, int, float, complex, decimal.Decimal)
    return isinstance(value, (*plain, datetime.date, uuid.UUID, PurePath)) or (
        type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0
    )


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else str(value)


def _is_list(value: Any) -> bool:
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        return True
    return hasattr(value, "tolist") and not isinstance(value, type)


def _parsed(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return None if _is_scalar(value) else value


def _fields(value: Any) -> dict[str, Any]:
    """What a mapping or an object holds, by name."""
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    if value is None or callable(value) or isinstance(value, (type, enum.Enum)):
        return {}
    if dataclasses.is_dataclass(value):
        found = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
    else:
        found = dict(getattr(value, "__dict__", {}))
    return {k: v for k, v in found.items() if not k.startswith("_")}


# --- programs -------------------------------------------------------------------------------------

_CODE = re.compile(r"\w+|[^\w\s]")
_FENCE = re.compile(r"^[ \t]*[`~]{3,}.*$", re.MULTILINE)


class Program:
    """A reference solution of which a part tells something, too.

    Attributes:
        lines: those that say something, as they are.
    """

    def __init__(self, text: str) -> None:
        self.text = _FENCE.sub("", text).strip()
        self.lines = [line for line in map(str.strip, self.text.splitlines()) if line]
        self._runs = _Runs(_code(self.text)).of(_RUN)

    def quoted(self, text: str, known: str) -> tuple[float, str]:
        """How much of it another text gives away that is not known, and the longest such line.

        Args:
            text: what may quote it.
            known: what the policy has been shown, or has written itself.
        """
        there, before = _Runs(_code(text)), _Runs(_code(known))
        lines = [x for x in self.lines if len(x) >= 20 and not before.hold(_code(x))]
        found = [x for x in lines if there.hold(_code(x))]
        share = len(found) / len(lines) if lines else 0.0
        known_runs = before.of(_RUN)
        runs = {run: n for run, n in self._runs.items() if run not in known_runs}
        hits = sorted(runs[run] for run in there.of(_RUN) if run in runs)
        if runs:
            share = max(share, len(hits) / len(runs))
        line = max(found, key=len, default="")
        if hits and not line:
            line = " ".join(_code(self.text)[hits[0] : hits[0] + _RUN])
        return share, line

    def is_told(self, text: str) -> bool:
        """Whether a text holds all of it, or its last lines.

        A prompt may well give its beginning: a signature, a docstring.
        """
        there = _Runs(_code(text))
        present = [there.hold(_code(line)) for line in self.lines]
        run = len(present)
        while run and present[run - 1]:
            run -= 1
        last = len(present) - run
        if len(present) < 2:
            return False  # a line is a value like any other
        return last >= 3 or (last == len(present) and math.fsum(map(len, self.lines)) >= 20)


def _code(text: str) -> list[str]:
    return _CODE.findall(text.replace('"', "'"))


COMMON = frozenset(
    """
    a about above after again all also always am an and another any are as ask at away back bad
    be because been before began begin below best better between big black blue book both bottom
    box boy bring brown but by call called can cannot car case change char check choice choose
    city class close code color come common contains correct could count cut day days dead did
    different do does dog done don double down draw each east easy eat eight else empty end english
    enough equal error even ever every example expected eye face fact fail failed fall false far
    fast father few field file find first five float follow food for form found four from full
    function gave get give given go going good got great green group grow had half hand hard has
    have he head hear heard help her here high him his home hour house how i id if image important
    in index input int into invalid is it its json just keep key kind know label land language
    large last later lead learn least leave left length less let letter letters life light like
    line lines list little live long look lot low made main make man many may me mean men might
    mind miss missing more morning most mother move much must my name names near need negative
    never new next night nine no none nor north not note nothing now null number numbers object of
    off often old on once one only open option or order other our out output over own page paper
    part pass passed people per place plain plan play please point positive power print program
    prompt public python question quick quit raise range read real red reply required result
    return right round rule run same saw say says second see seem sentence sequence set seven
    several shall she short should show side sign simple single six size small so some soon sort
    sound south space start state step still stop story string study sum such sure system table
    take task tell ten test text than that the their them then there these they thing think this
    those though thought three through time times to today together too took top town tree true
    try turn two type under unit until up upon us use used user valid value values very wait walk
    want was watch water way we week well went were west what when where which while white who
    whole why will wish with word words work world would write wrong year years yellow yes yet you
    young your zero
    """.split()
)
"""Words that stand in any text: where one does it gives nothing away."""
