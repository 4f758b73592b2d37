"""``format-rules-v0``: easy questions under a hidden, shared output rule.

Every question is one line that a small model can answer. What it cannot know is the rule that all
replies must obey ("only a JSON object with the single key answer"): the questions never state it,
the feedback does. A reply passes if it obeys the rule *and* holds the right answer.

So a policy starts at a pass rate of zero. A method that learns from rewards alone sees groups that
all fail alike, hence no gradient; one that reads the feedback has all it needs.

Questions are enumerated, not sampled: the same ids and splits everywhere, without a seed. What is
split are *facts* ("4 + 9"), not phrasings, so no fact stands in two splits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlrf import Feedback, Outcome, Segment, SingleTurnEnv, Task, UnknownIdError

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


@dataclass(frozen=True)
class Fault:
    """How a reply breaks the rule: in words that do not quote it, and the characters at fault."""

    words: str
    span: tuple[int, int]


@dataclass(frozen=True)
class Rule:
    """An output rule.

    Attributes:
        demand: what a reply must be, as the feedback states it.
        parse: the answer a reply holds, or how it breaks the rule.
        write: a reply that obeys, for an answer.
    """

    demand: str
    parse: Callable[[str], str | Fault]
    write: Callable[[str], str]


def _trimmed(reply: str) -> tuple[int, int]:
    """The span of the reply without surrounding white space."""
    start = len(reply) - len(reply.lstrip())
    return start, max(start, len(reply.rstrip()))


_FENCE = re.compile(r"```(?:json)?[ \t]*\n?(.*?)\n?[ \t]*```", re.DOTALL)


def _parse_json(reply: str) -> str | Fault:
    # A code fence around the object is allowed: it is how models write JSON, and asking them not
    # to was measured to make the self-teacher worse at everything else.
    start, end = _trimmed(reply)
    if start == end:
        return Fault("the reply is empty", (0, len(reply)))
    fenced = _FENCE.fullmatch(reply, start, end)
    inner = fenced.span(1) if fenced else (start, end)
    text = reply[inner[0] : inner[1]]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _broken_json(reply, start, end)
    if not isinstance(value, dict):
        return Fault("the reply is JSON, but not an object", inner)
    if list(value) != ["answer"]:
        return _wrong_keys(value, reply, inner)
    answer = value["answer"]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return Fault("the value is neither a string nor a number", inner)
    return str(answer)


def _broken_json(reply: str, start: int, end: int) -> Fault:
    """Tell prose from an object with text around it from an object that does not parse."""
    opening = reply.find("{", start, end)
    if opening < 0:
        return Fault("the reply is plain text", (start, end))
    try:
        _, closing = json.JSONDecoder().raw_decode(reply, opening)
    except (ValueError, RecursionError):
        return Fault("the JSON object cannot be parsed", (opening, end))
    fence = _FENCE.search(reply, start, end)
    if fence and fence.start() <= opening and closing <= fence.end():
        opening, closing = fence.span()
    if opening > start:
        return Fault("there is other text before the JSON object", (start, opening))
    return Fault("there is other text after the JSON object", (closing, end))


def _wrong_keys(value: dict[str, Any], reply: str, inner: tuple[int, int]) -> Fault:
    extra = [key for key in value if key != "answer"]
    if not extra:
        return Fault("the object has no key", inner)
    found = reply.find(json.dumps(extra[0]), *inner)
    span = (found, found + len(json.dumps(extra[0]))) if found >= 0 else inner
    name = f" {extra[0]!r}" if re.fullmatch(r"\w{1,20}", extra[0]) else ""
    what = "has a further key" if "answer" in value else 'has no key "answer", but a key'
    return Fault(f"the object {what}{name}", span)


def _between(opening: str, closing: str) -> Callable[[str], str | Fault]:
    """Replies of the form ``opening answer closing``, with nothing around it."""

    def parse(reply: str) -> str | Fault:
        start, end = _trimmed(reply)
        if start == end:
            return Fault("the reply is empty", (0, len(reply)))
        first = reply.find(opening, start, end)
        last = reply.rfind(closing, first + len(opening), end) if first >= 0 else -1
        if first < 0 or last < 0:
            return Fault("the answer is not enclosed", (start, end))
        if first > start:
            return Fault("there is other text before the answer", (start, first))
        if last + len(closing) < end:
            return Fault("there is other text after the answer", (last + len(closing), end))
        answer = reply[first + len(opening) : last].strip()
        if not answer:
            return Fault("there is no answer between the marks", (start, end))
        return answer

    return parse


def _parse_bare(reply: str) -> str | Fault:
    start, end = _trimmed(reply)
    text = reply[start:end]
    if not text:
        return Fault("the reply is empty", (0, len(reply)))
    mark = re.search(r"[^\w\s]", text)
    if len(text.split()) > 2 or "\n" in text:
        return Fault("the reply is more than the answer", (start, end))
    if mark:
        return Fault("the reply has punctuation", (start + mark.start(), start + mark.end()))
    return text


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

    Metrics: ``obeys_rule`` and ``right_answer`` (the value inside is right), 0 or 1.

    Raises:
        UnknownIdError: an unknown rule or family.
    """

    splits = SPLITS

    def __init__(
        self, *, rule: str = "json", families: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if rule not in RULES:
            raise UnknownIdError("rule of format-rules", rule, RULES)
        for family in families or ():
            if family not in FAMILIES:
                raise UnknownIdError("question family of format-rules", family, FAMILIES)
        self.rule = rule
        self.families = tuple(FAMILIES if families is None else families)
        self._rule = RULES[rule]

    def load_tasks(self, split: str) -> list[Task]:
        """The questions of a split, families mixed, in an order that never changes."""
        chosen = [
            q for q in _questions() if q.family in self.families and _split_of(q.fact) == split
        ]
        # Round robin over the families: the first N tasks are balanced, whatever N is.
        seen: dict[str, int] = {}
        turns = []
        for question in sorted(chosen, key=lambda q: _rank(q.text)):
            turns.append((seen.get(question.family, 0), _rank(question.text), question))
            seen[question.family] = seen.get(question.family, 0) + 1
        return [
            Task(
                id=f"{q.family}-{re.sub(r'[^a-z0-9]+', '-', q.text.lower()).strip('-')}",
                messages=q.text,  # type: ignore[arg-type]  # Task turns a string into messages
                metadata={"family": q.family},
                hidden=q,
            )
            for _, _, q in sorted(turns, key=lambda t: t[:2])
        ]

    def grade(self, task: Task, completion: str) -> Outcome:
        """Check the rule, then the answer."""
        rule, question = self._rule, task.hidden
        parsed = rule.parse(completion)
        if isinstance(parsed, Fault):
            why = Segment(
                "format_error",
                f"The output format is wrong: {parsed.words}. {rule.demand}",
                source="rule",
                span=parsed.span,
                priority=2,
            )
            reference = self._reference(question)
            return Outcome(
                0.0, Feedback((why, reference)), {"obeys_rule": 0.0, "right_answer": 0.0}
            )
        if _same(parsed, question.answers):
            return Outcome(1.0, metrics={"obeys_rule": 1.0, "right_answer": 1.0})
        found = completion.find(parsed)
        why = Segment(
            "wrong_answer",
            f"The output format is right, but the value is wrong. {rule.demand}",
            source="answer",
            span=(found, found + len(parsed)) if found >= 0 and parsed else None,
            priority=2,
        )
        right = Segment(
            "wrong_answer",
            f"The right answer is {question.answers[0]}.",
            source="answer",
            reveals="expected",
            priority=1,
        )
        return Outcome(
            0.0,
            Feedback((why, right, self._reference(question))),
            {"obeys_rule": 1.0, "right_answer": 0.0},
        )

    def _reference(self, question: Question) -> Segment:
        return Segment(
            "reference",
            f"A correct reply: {self._rule.write(question.answers[0])}",
            severity="info",
            source="answer",
            reveals="reference",
        )

    def reference_solution(self, task: Task) -> str | None:
        """A reply that obeys the rule and is right."""
        question = self._find_task(task).hidden
        return self._rule.write(question.answers[0])


def _same(given: str, accepted: Sequence[str]) -> bool:
    """Whether an answer is one of the accepted: case and spaces do not count, 7.0 is 7."""

    def plain(text: str) -> str:
        text = " ".join(text.casefold().split())
        try:
            number = float(text)
        except ValueError:
            return text
        return f"{number:g}" if re.fullmatch(r"[-+.\d]+", text) else text

    return plain(given) in {plain(a) for a in accepted}
