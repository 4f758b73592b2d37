"""``format-rules-v0``: easy questions under a hidden, shared output rule.

Every question is one line that a small model can answer. What it cannot know is the rule that all
replies must obey ("only a JSON object with the single key answer"): the questions never state it,
the feedback does. A reply passes if it obeys the rule *and* holds the right answer.

So a policy starts at a pass rate of zero. A method that learns from rewards alone sees groups that
all fail alike, hence no gradient; one that reads the feedback has all it needs.

Questions are enumerated, not sampled: the same ids and splits everywhere, without a seed. What is
split are *facts* ("4 + 9"), not phrasings, so no fact stands in two splits.

It does not judge in words or by meaning: an answer is compared with a short list, case, spaces and
the form of a number apart. Nor does it measure what a model knows: the questions are easy, and what
is to be learnt is the rule.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NoReturn

from rlrf import Feedback, Outcome, Segment, SingleTurnEnv, Task, UnknownIdError, UsageError
from rlrf.messages import as_messages

# --- the questions ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question and the answers that are right, the first of which is the model answer."""

    family: str
    fact: str
    text: str
    answers: tuple[str, ...]


_OPPOSITES = {
    "hot": "cold", "big": "small little", "fast": "slow", "up": "down", "day": "night",
    "happy": "sad unhappy", "open": "closed close shut", "full": "empty", "high": "low",
    "long": "short", "rich": "poor", "strong": "weak", "wet": "dry", "early": "late",
    "good": "bad evil", "clean": "dirty", "near": "far", "loud": "quiet silent soft",
    "thick": "thin", "wide": "narrow", "deep": "shallow", "black": "white", "true": "false",
    "love": "hate", "inside": "outside", "push": "pull", "heavy": "light", "tall": "short",
    "easy": "hard difficult", "cold": "hot warm", "slow": "fast quick", "empty": "full",
    "low": "high", "poor": "rich wealthy", "weak": "strong", "dry": "wet", "late": "early",
    "bad": "good", "dirty": "clean", "far": "near close", "north": "south", "east": "west",
    "male": "female", "top": "bottom", "buy": "sell", "young": "old",
}  # fmt: skip
_LANGUAGES = {
    "France": "French", "Germany": "German", "Italy": "Italian", "Spain": "Spanish",
    "Japan": "Japanese", "China": "Chinese|Mandarin|Mandarin Chinese", "Russia": "Russian",
    "Portugal": "Portuguese", "Brazil": "Portuguese", "Mexico": "Spanish", "Poland": "Polish",
    "Greece": "Greek", "Sweden": "Swedish", "Norway": "Norwegian", "Denmark": "Danish",
    "Turkey": "Turkish", "Hungary": "Hungarian", "Thailand": "Thai", "Vietnam": "Vietnamese",
    "Egypt": "Arabic", "Argentina": "Spanish", "Austria": "German", "England": "English",
    "Cuba": "Spanish", "Finland": "Finnish", "Chile": "Spanish", "Peru": "Spanish",
    "Colombia": "Spanish", "Australia": "English",
}  # fmt: skip
_CONTINENTS = {
    "France": "Europe", "Germany": "Europe", "Italy": "Europe", "Japan": "Asia", "China": "Asia",
    "India": "Asia", "Egypt": "Africa", "Kenya": "Africa", "Nigeria": "Africa",
    "Brazil": "South America", "Peru": "South America", "Chile": "South America",
    "Canada": "North America", "Mexico": "North America", "Spain": "Europe", "Poland": "Europe",
    "Thailand": "Asia", "Vietnam": "Asia", "Ghana": "Africa", "Morocco": "Africa",
    "Argentina": "South America", "Colombia": "South America", "Greece": "Europe",
    "Sweden": "Europe", "Norway": "Europe", "South Korea": "Asia", "Nepal": "Asia",
    "Ethiopia": "Africa", "Portugal": "Europe",
}  # fmt: skip
_SYMBOLS = {
    "hydrogen": "H", "oxygen": "O", "carbon": "C", "nitrogen": "N", "helium": "He", "iron": "Fe",
    "gold": "Au", "silver": "Ag", "sodium": "Na", "calcium": "Ca", "copper": "Cu", "zinc": "Zn",
    "lead": "Pb", "potassium": "K", "chlorine": "Cl", "neon": "Ne", "lithium": "Li",
    "sulfur": "S", "aluminium": "Al", "magnesium": "Mg",
}  # fmt: skip
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
_WORDS = (
    "cat dog sun tree house river apple table bread chair music paper water stone light green "
    "smile dance horse cloud plant garden winter summer orange silver yellow rabbit pencil "
    "window bridge castle forest island market rocket tiger zebra lemon queen king"
).split()


def _questions() -> Iterator[Question]:
    """Every question. The fact names what is asked; phrasings of one fact share it."""

    def ask(family: str, fact: str, text: str, *answers: object) -> Question:
        return Question(family, fact, text, tuple(str(a) for a in answers))

    for a in range(2, 13):
        for b in range(2, 13):
            fact = f"{a}+{b}"
            yield ask("add", fact, f"What is {a} + {b}?", a + b)
            yield ask("plus", fact, f"What is {a} plus {b}?", a + b)
            fact = f"{a + b}-{b}"
            yield ask("subtract", fact, f"What is {a + b} - {b}?", a)
            yield ask("minus", fact, f"What is {a + b} minus {b}?", a)
            if max(a, b) <= 10:
                yield ask("times", f"{a}*{b}", f"What is {a} times {b}?", a * b)
                yield ask("divide", f"{a * b}/{b}", f"Divide {a * b} by {b}.", a)
    for n in range(1, 21):
        yield ask("half", f"half-{2 * n}", f"What is half of {2 * n}?", n)
    for n in range(3, 99, 2):
        yield ask("after", f"after-{n}", f"Which number comes right after {n}?", n + 1)
    for low in range(3, 95, 3):
        high = low + 5 + low % 4
        first, second = (low, high) if low % 2 else (high, low)
        fact = f"{low}<{high}"
        yield ask("larger", fact, f"Which number is larger, {first} or {second}?", high)
    for word, opposite in _OPPOSITES.items():
        text = f"What is the opposite of {word}?"
        yield ask("opposite", f"opposite-{word}", text, *opposite.split())
    for country, language in _LANGUAGES.items():
        text = f"Which language is spoken in {country}?"
        yield ask("language", f"language-{country}", text, *language.split("|"))
    for country, continent in _CONTINENTS.items():
        text = f"On which continent is {country}?"
        yield ask("continent", f"continent-{country}", text, continent)
    for element, symbol in _SYMBOLS.items():
        text = f"What is the chemical symbol of {element}?"
        yield ask("symbol", f"symbol-{element}", text, symbol)
    for number, name in enumerate(_NUMBERS):
        yield ask("digits", f"digits-{name}", f"Write the number {name} in digits.", number)
    for word in _WORDS:
        text = f"What is the first letter of the word {word}?"
        yield ask("first-letter", f"first-{word}", text, word[0])


FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(q.family for q in _questions()))
SPLITS = ("train", "validation", "eval")


def _rank(fact: str) -> int:
    return int.from_bytes(hashlib.sha256(fact.encode()).digest()[:4], "big")


def _split_of(fact: str) -> str:
    share = _rank(fact) % 100
    return "eval" if share < 20 else "validation" if share < 30 else "train"


# --- the rules --------------------------------------------------------------------------------

Span = tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """The answer a reply that obeys the rule holds, and the characters it stands in."""

    text: str
    span: Span


@dataclass(frozen=True)
class Fault:
    """How a reply breaks the rule.

    Attributes:
        words: what is wrong. They quote nothing of the reply, a short key apart: in a teacher's
            prompt, a quoted reply is copied.
        span: the characters at fault; None if the reply has none.
        quotes: whether the words name a key of the reply.
    """

    words: str
    span: Span | None
    quotes: bool = False


@dataclass(frozen=True)
class Rule:
    """An output rule.

    Attributes:
        demand: what a reply must be, as the feedback states it.
        parse: the answer a reply holds, or how it breaks the rule (the first fault found).
        write: a reply that obeys, for an answer.
    """

    demand: str
    parse: Callable[[str], Answer | Fault]
    write: Callable[[str], str]


_EMPTY = Fault("the reply is empty", None)


def _trimmed(text: str, start: int, end: int) -> Span:
    """The span from ``start`` to ``end`` without surrounding white space."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, max(start, end - len(part) + len(part.rstrip()))


def _outside(reply: str, bounds: Span, part: Span, what: str) -> Fault | None:
    """The fault of a reply with text between ``bounds`` and ``part``; blames what comes first."""
    before = _trimmed(reply, bounds[0], part[0])
    after = _trimmed(reply, part[1], bounds[1])
    wrong = {
        where: span for where, span in (("before", before), ("after", after)) if span[0] < span[1]
    }
    if not wrong:
        return None
    return Fault(f"there is other text {' and '.join(wrong)} {what}", next(iter(wrong.values())))


# JSON is read by hand where the json module falls short: it says neither where a member stands
# nor that a key occurs twice.

_MAX_BRACKETS = 100
"""A reply with more is not parsed: how deep the parser can recurse depends on who calls it."""

_FENCE = "```"
_SPACE = re.compile(r"[ \t\n\r]*")


class _Number(str):
    """A JSON number as it was written: a float would lose digits or be infinite."""


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_refuse)


def _decode(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins at ``at`` and where it ends, or None."""
    try:
        return _DECODER.raw_decode(text, at)
    except ValueError:
        return None


def _parse_json(reply: str) -> Answer | Fault:
    start, end = _trimmed(reply, 0, len(reply))
    if start == end:
        return _EMPTY
    if reply.count("{") + reply.count("[") > _MAX_BRACKETS:
        return Fault("the reply has too many brackets to be read as JSON", (start, end))
    # A code fence around the object is allowed: it is how models write JSON, and asking them not
    # to was measured to make the self-teacher worse at everything else.
    first, last = _inside_fence(reply, start, end)
    body = reply[:last]
    whole = _decode(body, first)
    if whole and whole[1] == last and not isinstance(whole[0], dict):
        return Fault("the reply is JSON, but not an object", (first, last))
    opening = body.find("{", first)
    if opening < 0:
        return Fault("the reply is plain text", (start, end))
    found = _decode(body, opening)
    if found is None:
        return Fault("the JSON object cannot be parsed", (opening, last))
    part, unclosed = _with_fence(reply, (first, last), (opening, found[1]))
    if unclosed:
        return unclosed
    outside = _outside(reply, (first, last), part, "the JSON object")
    return outside or _read_object(reply, (opening, found[1]))


def _inside_fence(reply: str, start: int, end: int) -> Span:
    """What a code fence that wraps everything holds; without one, everything."""
    opened = reply.startswith(_FENCE, start) and reply.endswith(_FENCE, start, end)
    if not opened or end - start < 2 * len(_FENCE):
        return start, end
    start += len(_FENCE)
    if reply.startswith("json", start):
        start += len("json")
    return _trimmed(reply, start, end - len(_FENCE))


def _with_fence(reply: str, bounds: Span, found: Span) -> tuple[Span, Fault | None]:
    """``found`` with the code fence directly around it; the fault of a fence that never ends."""
    opening, _ = _trimmed(reply, bounds[0], found[0])
    closing, end = _trimmed(reply, found[1], bounds[1])
    before = reply[opening : found[0]].rstrip()
    for mark in (_FENCE + "json", _FENCE):
        if before.endswith(mark):
            start = opening + len(before) - len(mark)
            if reply.startswith(_FENCE, closing):
                return (start, closing + len(_FENCE)), None
            if before == mark and closing == end:
                return found, Fault("the code fence is not closed", (start, start + len(mark)))
    return found, None


def _members(text: str, at: int) -> Iterator[tuple[str, Span, Any, Span]]:
    """Key, its span, value, its span of every member of the valid JSON object at ``at``."""

    def skip(at: int) -> int:
        match = _SPACE.match(text, at)
        return match.end() if match else at

    at = skip(at + 1)
    while text[at] != "}":
        key, key_end = _DECODER.raw_decode(text, at)
        value_at = skip(skip(key_end) + 1)
        value, value_end = _DECODER.raw_decode(text, value_at)
        yield key, (at, key_end), value, (value_at, value_end)
        at = skip(value_end)
        if text[at] == ",":
            at = skip(at + 1)


def _read_object(reply: str, found: Span) -> Answer | Fault:
    members = list(_members(reply, found[0]))
    if not members:
        return Fault("the object has no key", found)
    keys = [key for key, *_ in members]
    for i, (key, key_span, _, value_span) in enumerate(members):
        if key != "answer":
            short = re.fullmatch(r"\w{1,20}", key, re.ASCII) is not None
            name = f"key '{key}'" if short else "key of another name"
            known = "answer" in keys
            what = f"has a further {name}" if known else f'has no key "answer", but a {name}'
            return Fault(f"the object {what}", key_span, quotes=short)
        if key in keys[:i]:
            return Fault('the key "answer" occurs more than once', (key_span[0], value_span[1]))
    _, _, value, span = members[0]
    if not isinstance(value, str):  # numbers are _Number, hence str
        return Fault("the value is neither a string nor a number", span)
    return Answer(str(value), span)


def _between(opening: str, closing: str) -> Callable[[str], Answer | Fault]:
    """Replies of the form ``opening answer closing``, with nothing around it."""

    def parse(reply: str) -> Answer | Fault:
        start, end = _trimmed(reply, 0, len(reply))
        if start == end:
            return _EMPTY
        first = reply.find(opening, start, end)
        if first < 0:
            stray = reply.find(closing, start, end)
            if stray < 0:
                return Fault("the reply is plain text", (start, end))
            return Fault(f"there is no {opening}", (stray, stray + len(closing)))
        inner = first + len(opening)
        last = reply.find(closing, inner, end)
        if last < 0:
            return Fault(f"there is no {closing} after {opening}", (first, end))
        part = (first, last + len(closing))
        if outside := _outside(reply, (start, end), part, "the marked answer"):
            return outside
        second = reply.find(opening, inner, last)
        if second >= 0:
            return Fault(f"{opening} occurs more than once", (second, second + len(opening)))
        span = _trimmed(reply, inner, last)
        if span[0] == span[1]:
            return Fault("there is no answer between the marks", part)
        return Answer(reply[span[0] : span[1]], span)

    return parse


def _parse_bare(reply: str) -> Answer | Fault:
    start, end = _trimmed(reply, 0, len(reply))
    text = reply[start:end]
    if not text:
        return _EMPTY
    if _NUMBER.fullmatch(text):  # its point or sign is no punctuation
        return Answer(text, (start, end))
    if len(text.splitlines()) > 1:
        return Fault("the reply has more than one line", (start, end))
    if len(text.split()) > _MAX_WORDS:
        return Fault("the reply is more than the answer", (start, end))
    if mark := re.search(r"[^\w\s]+", text):
        return Fault("the reply has punctuation", (start + mark.start(), start + mark.end()))
    return Answer(text, (start, end))


_MAX_WORDS = 2
"""Words of the longest answer, "South America"."""

_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{0,20})?(?:e[+-]?[0-9]{1,2})?", re.IGNORECASE)


RULES: dict[str, Rule] = {
    "json": Rule(
        'Reply only with a JSON object with the single key "answer".',
        _parse_json,
        lambda answer: json.dumps({"answer": answer}, ensure_ascii=False),
    ),
    "bare": Rule(
        "Reply with the answer only: no sentence, no punctuation.",
        _parse_bare,
        lambda answer: answer,
    ),
    "tag": Rule(
        "Reply only with the answer between <answer> and </answer>.",
        _between("<answer>", "</answer>"),
        lambda answer: f"<answer>{answer}</answer>",
    ),
    "brackets": Rule(
        "Reply only with the answer between [[ and ]].",
        _between("[[", "]]"),
        lambda answer: f"[[{answer}]]",
    ),
}


# --- the environment --------------------------------------------------------------------------


class FormatRules(SingleTurnEnv):
    """One-line questions whose replies must obey a hidden, shared output rule.

    Args:
        rule: ``json`` (a JSON object with the single key "answer"; a code fence is allowed),
            ``bare`` (the answer alone), ``tag`` or ``brackets``.
        families: kinds of questions to ask; None for all.
        kwargs: see :class:`rlrf.Env`.

    Feedback: ``format_error`` names what breaks the rule, states the rule and blames the
    characters at fault; ``wrong_answer`` says that only the value is wrong, and, at level
    ``expected``, what is right. Reward 1 for a reply that obeys and is right, else 0.

    Metrics: ``obeys_rule`` and ``right_answer`` (0 where the rule is broken), 0 or 1.

    Raises:
        UnknownIdError: an unknown rule or family.
        UsageError: no family at all.
    """

    splits = SPLITS

    def __init__(
        self, *, rule: str = "json", families: str | Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if families is None:
            families = FAMILIES
        elif isinstance(families, str):  # as `--set env.families=add` gives it
            families = (families,)
        if rule not in tuple(RULES):
            raise UnknownIdError("rule of format-rules", str(rule), RULES)
        for family in families:
            if family not in FAMILIES:
                raise UnknownIdError("question family of format-rules", str(family), FAMILIES)
        if not families:
            raise UsageError(f"families is {families!r}; name at least one, or None for all")
        self.rule = rule
        self.families = tuple(families)
        self._rule = RULES[rule]

    def load_tasks(self, split: str) -> list[Task]:
        """The questions of a split, families mixed, in an order that never changes."""
        chosen = [
            q for q in _questions() if q.family in self.families and _split_of(q.fact) == split
        ]
        # Round robin over the families: the first N tasks hold as many of each as there are.
        seen: dict[str, int] = {}
        turns = []
        for question in sorted(chosen, key=lambda q: _rank(q.text)):
            turns.append((seen.get(question.family, 0), _rank(question.text), question))
            seen[question.family] = seen.get(question.family, 0) + 1
        return [
            Task(
                id=_task_id(q),
                messages=as_messages(q.text),
                metadata={"family": q.family},
                hidden=q.answers,
            )
            for _, _, q in sorted(turns, key=lambda t: t[:2])
        ]

    def grade(self, task: Task, completion: str) -> Outcome:
        """Check the rule, then the answer."""
        demand, answers = self._rule.demand, task.hidden
        read = self._rule.parse(completion)
        reference = Segment(
            "reference",
            f"A correct reply: {self._rule.write(answers[0])}",
            severity="info",
            source="answer",
            reveals="reference",
        )
        if isinstance(read, Fault):
            broken = Segment(
                "format_error",
                f"The output format is wrong: {read.words}. {demand}",
                source="rule",
                span=read.span,
                priority=2,
                untrusted=read.quotes,
            )
            metrics = {"obeys_rule": 0.0, "right_answer": 0.0}
            return Outcome(0.0, Feedback((broken, reference)), metrics)
        if any(_plain(read.text) == _plain(answer) for answer in answers):
            return Outcome(1.0, metrics={"obeys_rule": 1.0, "right_answer": 1.0})
        wrong = Segment(
            "wrong_answer",
            f"The output format is right, but the value is wrong. {demand}",
            source="answer",
            span=read.span,
            priority=2,
        )
        right = Segment(
            "wrong_answer",
            f"The right answer is {answers[0]}.",
            source="answer",
            reveals="expected",
            priority=1,
        )
        metrics = {"obeys_rule": 1.0, "right_answer": 0.0}
        return Outcome(0.0, Feedback((wrong, right, reference)), metrics)

    def reference_solution(self, task: Task) -> str:
        """A reply that obeys the rule and is right."""
        return self._rule.write(self._find_task(task).hidden[0])


def _task_id(question: Question) -> str:
    """``add-3-4``, ``language-france``: the family and what the question is about."""
    about = re.sub(r"[^a-z0-9]+", "-", question.fact.lower())
    # Facts that are not bare operands begin with a word that the family says already.
    return f"{question.family}-{about.removeprefix(question.family.partition('-')[0] + '-')}"


_LONGEST = 100


def _plain(text: str) -> str | Decimal:
    """An answer as it is compared: case, spaces and width do not count, and 7.0 is 7."""
    text = " ".join(text.split())
    if len(text) > _LONGEST:  # no answer, and to normalize it may take quadratic time
        return text
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return Decimal(text) if _NUMBER.fullmatch(text) else text
