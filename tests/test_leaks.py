"""Plain leaks are caught, whatever is hidden and however it is written; honest texts are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rlrf
from rlrf import Feedback, Outcome, Segment, Task, Turn
from rlrf.testing import check_env
from rlrf.testing.texts import Hidden, Secret, Text

CAPITALS = {"Norway": "Oslo", "Australia": "Canberra", "Canada": "Ottawa", "Kenya": "Nairobi"}
SUMS = {"3 + 4": 7, "2 + 9": 11, "20 - 8": 12, "5 * 5": 25}
CODE = (
    "```python\ndef double(number):\n    result = number + number\n"
    "    check = abs(result) - 2 * abs(number)\n    return result * 1.0 + check\n```"
)


@dataclasses.dataclass
class Row:
    """A data set's row."""

    question: str
    answer: Any
    tests: list[dict[str, Any]]


class Quiz(rlrf.SingleTurnEnv):
    """Questions and answers; every part is a function of both, so that one of them may leak."""

    splits = ("train",)
    facts: dict[str, Any] = CAPITALS
    pose = staticmethod(lambda q, a: f"Say it: {q}?")
    hide = staticmethod(lambda q, a: a)
    about = staticmethod(lambda q, a: {})
    say = staticmethod(lambda q, a, reply: "That is not it.")
    reveals = "nothing"
    source = staticmethod(lambda a: "quiz")
    metric = staticmethod(lambda q, a: {})
    refer: Callable[..., Any] | None = staticmethod(str)

    def load_tasks(self, split):
        return [
            Task(f"t{i}", self.pose(q, a), self.about(q, a), hidden=self.hide(q, a))
            for i, (q, a) in enumerate(self.facts.items())
        ]

    def fact(self, task):
        return list(self.facts.items())[int(task.id[1:])]

    def grade(self, task, completion):
        q, a = self.fact(task)
        if completion == (str(a) if self.refer is None else self.refer(a)):
            return Outcome(1.0)
        told = [Segment("wrong_answer", "No.")]
        if self.say is not None:
            text, source = self.say(q, a, completion), self.source(a)
            told.append(Segment("wrong_answer", text, reveals=self.reveals, source=source))
        return Outcome(0.0, Feedback(told), self.metric(q, a))

    def reference_solution(self, task):
        return None if self.refer is None else self.refer(self.fact(task)[1])


def quiz(**parts: Any) -> rlrf.Env:
    """A quiz of which these parts are otherwise."""
    plain = {k: staticmethod(v) if callable(v) else v for k, v in parts.items()}
    return type("Quiz", (Quiz,), plain)()


class Chat(rlrf.MultiTurnEnv):
    """Answers with a message."""

    splits = ("train",)

    def load_tasks(self, split):
        return [Task(f"t{i}", f"Where? {q}", hidden=a) for i, (q, a) in enumerate(CAPITALS.items())]

    def start(self, task):
        return task.hidden

    def respond(self, state, action):
        told = Feedback.of("wrong_answer", "No.")
        return Turn(f"Sorry! It would have been {state}.", 0.0, told, terminated=True)


def options(right: str) -> str:
    return "Which one?\nA) red\nB) mitochondria\nC) ribosome\nD) golgi\nFor " + right


LEAKS = {
    # in the prompt
    "prompt, called the answer": quiz(pose=lambda q, a: f"Where is {q}? The answer is {a}."),
    "prompt, other case": quiz(pose=lambda q, a: f"Where is {q}? (answer: {a.upper()})"),
    "prompt, a small number": quiz(facts=SUMS, pose=lambda q, a: f"What is {q}? Answer: {a}"),
    "prompt, yes or no": quiz(
        facts={"fire": "yes", "ice": "no", "lava": "yes", "snow": "no"},
        pose=lambda q, a: f"Is {q} hot? The correct answer is {a}.",
    ),
    "prompt, a program": quiz(
        facts={"a": CODE, "b": CODE}, pose=lambda q, a: f"Write double ({q}).\n{a}"
    ),
    "prompt, the end of a program": quiz(
        facts={"a": CODE, "b": CODE},
        pose=lambda q, a: f"{q}: write double. Hint:\n" + "\n".join(a.splitlines()[2:5]),
    ),
    "prompt, a sentence": quiz(
        facts={"a": "the answer to all questions is forty-two"}, pose=lambda q, a: f"Psst: {a}!"
    ),
    "prompt, in a template": quiz(
        facts={"Norway": "plover-93", "Chad": "auk-4711", "Peru": "heron-17"},
        pose=lambda q, a: f"Where is {q}? [the grader will look for {a} in there]",
    ),
    "prompt, a number once": quiz(
        facts={"6 * 7": 42}, pose=lambda q, a: f"What is {q}? The answer is {a}."
    ),
    # in the metadata
    "metadata, a name": quiz(about=lambda q, a: {"seen": {a: True}}),
    "metadata, by its name": quiz(about=lambda q, a: {"answer": a}),
    "metadata, another name": quiz(about=lambda q, a: {"note": {"city": [a]}}),
    "metadata, yes or no by its name": quiz(
        facts={"fire": "yes", "ice": "no"}, about=lambda q, a: {"label": a}
    ),
    "metadata, small numbers": quiz(facts=SUMS, about=lambda q, a: {"n": a}),
    "metadata, as another type": quiz(facts=SUMS, about=lambda q, a: {"n": f"{a}.0"}),
    "metadata, JSON": quiz(
        hide=lambda q, a: {"answer": {"city": a, "inhabitants": [1234567, 89]}},
        about=lambda q, a: {"raw": json.dumps({"city": a, "inhabitants": [1234567, 89]})},
    ),
    "metadata, the tests": quiz(
        hide=lambda q, a: {"tests": [{"args": [k], "expected": k + len(q)} for k in range(9)]},
        about=lambda q, a: {"cases": [{"args": [k], "expected": k + len(q)} for k in range(9)]},
    ),
    "metrics": quiz(facts=SUMS, metric=lambda q, a: {"target": a}),
    "metrics, another name": quiz(facts=SUMS, metric=lambda q, a: {"x": a}),
    # in what the environment says
    "feedback, a number once": quiz(facts={"6 * 7": 42}, say=lambda q, a, r: f"Expected {a}."),
    "feedback, hidden under any name": quiz(
        hide=lambda q, a: {"value": a},
        refer=None,
        facts={"6 * 7": 42, "8 * 8": 64},
        say=lambda q, a, r: f"The right result would be {a}",
    ),
    "feedback, a short name once": quiz(facts={"a": "fox"}, say=lambda q, a, r: f"The {a}, no?"),
    "feedback, a letter that the first tasks share": quiz(
        facts=dict(zip("abcdef", "BBBBCA", strict=True)),
        pose=lambda q, a: options(q),
        say=lambda q, a, r: f"You want {a}.",
    ),
    "feedback, in the source": quiz(source=lambda a: f"tests/{a}"),
    "feedback": quiz(say=lambda q, a, r: f"It is {a}."),
    "feedback, lower case": quiz(say=lambda q, a, r: f"It is {a.lower()}."),
    "feedback, spaced and quoted": quiz(
        facts={"x": "New  South Wales", "y": "Cape Verde"},
        say=lambda q, a, r: f'"{a.replace(" ", chr(10))}" was wanted',
    ),
    "feedback, at level located": quiz(reveals="location", say=lambda q, a, r: f"It is {a}."),
    "feedback, a small number": quiz(facts=SUMS, say=lambda q, a, r: f"The right answer is {a}."),
    "feedback, a small number in other words": quiz(
        facts=SUMS, say=lambda q, a, r: f"Psst, try {a} for once."
    ),
    "feedback, a number": quiz(
        facts={"a": 73914, "b": 2048.5}, say=lambda q, a, r: f"Not {a:,.2f} then?"
    ),
    "feedback, the letter of an option": quiz(
        facts={"i": "B", "ii": "C", "iii": "A"},
        pose=lambda q, a: options(q),
        say=lambda q, a, r: f"The right option is {a}.",
    ),
    "feedback, an option": quiz(
        facts={"i": "mitochondria", "ii": "ribosome"},
        pose=lambda q, a: f"What makes {q}?",
        say=lambda q, a, r: f"Wrong: {a} it is",
    ),
    "feedback, a hidden test": quiz(
        hide=lambda q, a: Row(q, a, [{"args": ["zebra crossing " + q, 17], "expected": 90210}]),
        say=lambda q, a, r: f"For 'Zebra Crossing {q}' you gave something else.",
    ),
    "feedback, JSON spaced otherwise": quiz(
        hide=lambda q, a: {"calls": json.dumps({"name": "book", "to": [a, 1500, 37]})},
        say=lambda q, a, r: json.dumps(
            {"name": "book", "to": [a, 1500, 37]}, separators=(",", ":")
        ),
        refer=None,
    ),
    "feedback, a list of numbers": quiz(
        facts={"a": [31, 41, 59, 26], "b": [27, 18, 28, 18]},
        say=lambda q, a, r: "want " + ";".join(map(str, a)),
    ),
    "feedback, an array": quiz(
        hide=lambda q, a: {"grid": np.array([31, 41, 59, len(q)])},
        say=lambda q, a, r: f"want 31 41 59 {len(q)}",
    ),
    "feedback, half a program": quiz(
        facts={"a": CODE, "b": CODE},
        pose=lambda q, a: f"{q}: def double(number):",
        say=lambda q, a, r: "Try:\n" + a.replace("    ", "\t").partition("\n")[2],
    ),
    "feedback, a program at level expected": quiz(
        facts={"a": CODE, "b": CODE}, reveals="expected", say=lambda q, a, r: f"Right:\n{a}"
    ),
    "feedback, Japanese": quiz(
        facts={"a": "東京都庁", "b": "名古屋市"}, say=lambda q, a, r: f"答えは{a}です。"
    ),
    "feedback, symbols": quiz(facts={"a": ">>+<<[-]"}, say=lambda q, a, r: "want >> +<< [-]"),
    "observation": Chat(),
}


@pytest.mark.parametrize("name", LEAKS)
def test_plain_leaks_are_caught(name):
    report = check_env(LEAKS[name])
    found = {r.id: r for r in report.results if r.status == "fail"}
    told = name.partition(",")[0]
    id = {"feedback": "feedback.no_reference_leak"}.get(told, "semantic.no_solution_leakage")
    assert set(found) == {id}, str(report)
    if name != "feedback, in the source":
        assert {"prompt": "prompt", "feedback": "says"}.get(told, told) in found[id].detail


DOUBTFUL = {
    "prompt, once": quiz(
        facts={"Norway": "Oslo"}, pose=lambda q, a: f"Where is {q}? Think of {a}, say."
    ),
    "prompt, to be repeated": quiz(pose=lambda q, a: f"Repeat after me: {a}! ({q})"),
    "prompt, tests": quiz(
        hide=lambda q, a: {"tests": ["assert largest_word('zebra crossing') == 'crossing'"]},
        pose=lambda q, a: f"{q}: assert largest_word('zebra crossing') == 'crossing'",
    ),
    "feedback, a line of a program": quiz(
        facts={"a": CODE, "b": CODE}, say=lambda q, a, r: "Try result = number + number"
    ),
    "feedback, a number once": quiz(facts={"6 * 7": 42}, say=lambda q, a, r: f"Oh, {a}!"),
    "metadata, yes or no": quiz(
        facts={"fire": "yes", "ice": "no", "lava": "yes"}, about=lambda q, a: {"n": a}
    ),
    "feedback, a small number once": quiz(
        facts={"3 + 4": 7}, say=lambda q, a, r: f"The answer is {a}."
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_is_not_sure_is_a_warning(name):
    report = check_env(DOUBTFUL[name])
    assert report.ok, str(report)
    assert [r.id.partition(".")[2] for r in report.warnings] in (
        ["no_solution_leakage"],
        ["no_reference_leak"],
    )
    assert not check_env(DOUBTFUL[name], strict=True).ok


REST = (
    " Two other cities had quarrelled over it for years, and neither would give way to the other, "
    "so that in the end a third was built for the purpose, far from both. Which city is the "
    "capital of {q}?"
)
PASSAGES = {
    "Norway": "Long ago the seat of government moved to {a}." + REST,
    "Australia": "People say that {a} was chosen for its climate." + REST,
    "Canada": "It is not widely known how {a} came to be what it is." + REST,
    "Kenya": "The railway reached {a} first." + REST,
}
HONEST = {
    "plain": quiz(),
    "no reference": quiz(refer=None),
    "the answer is an expected value": quiz(
        reveals="expected", say=lambda q, a, r: f"The answer is {a}."
    ),
    "the reference at its level": quiz(
        facts={"a": CODE}, reveals="reference", say=lambda q, a, r: f"A program: {a}"
    ),
    "small numbers": quiz(
        facts=SUMS, pose=lambda q, a: f"What is {q}? (7 points)", about=lambda q, a: {"points": 7}
    ),
    "worked example": quiz(
        facts=SUMS, pose=lambda q, a: f"What is 3 + 4? The answer is 7. What is {q}?"
    ),
    "yes or no": quiz(
        facts={"fire": "yes", "ice": "no", "lava": "yes"},
        pose=lambda q, a: f"Is {q} hot? Answer yes or no.",
        say=lambda q, a, r: "The answer must be yes or no.",
    ),
    "options": quiz(
        facts={"i": "mitochondria", "ii": "ribosome"},
        pose=lambda q, a: options(q),
        say=lambda q, a, r: "Wrong. The answer is one of mitochondria, ribosome, golgi.",
    ),
    "letters": quiz(
        facts={"i": "B", "ii": "C", "iii": "A"},
        pose=lambda q, a: options(q),
        say=lambda q, a, r: "Reply with one of A, B, C and D.",
    ),
    "a passage": quiz(pose=lambda q, a: PASSAGES[q].format(q=q, a=a)),
    "a list of options": quiz(
        pose=lambda q, a: f"Which is the capital of {q}: Oslo, Canberra, Ottawa or Nairobi?"
    ),
    "what is expected of the form": quiz(
        facts={"6 * 7": 42, "9 + 1": 10},
        say=lambda q, a, r: "Expected 10 characters at most, one answer, in 2 lines.",
    ),
    "the row is hidden": quiz(
        hide=lambda q, a: Row(f"Say it: {q}?", a, [{"x": 1, "public": True}]),
        about=lambda q, a: {"source": "CapitalsBench 2025", "question": q},
    ),
    "the same in row and metadata": quiz(
        hide=lambda q, a: {"answer": a, "source": "geography-quiz", "id": 90210},
        about=lambda q, a: {"source": "geography-quiz", "id": 90210},
    ),
    "a shared rule": quiz(
        hide=lambda q, a: {"answer": a, "rule": "Reply in one capitalised word, underlined."},
        say=lambda q, a, r: "Reply in one capitalised word, underlined.",
    ),
    "limits": quiz(
        hide=lambda q, a: {"answer": a, "memory_mb": 1536, "cpu_s": 4},
        say=lambda q, a, r: "The memory limit of 1536 MB was exceeded; 4 s were left.",
    ),
    "public tests": quiz(
        hide=lambda q, a: [{"args": ["zebra crossing"], "expected": 90210, "public": True}],
        say=lambda q, a, r: "For 'zebra crossing' 90210 is expected.",
    ),
    "what the attempt says": quiz(say=lambda q, a, r: f"You said {r!r}, which is wrong."),
    "what the prompt says": quiz(
        facts={"stone": "enots", "river": "revir"},
        hide=lambda q, a: {"word": q, "answer": a},
        pose=lambda q, a: f"Spell {q!r} backwards.",
        say=lambda q, a, r: f"{q!r} is not spelt so backwards.",
    ),
    "sorting": quiz(
        facts={"pear, apple, fig": ["apple", "fig", "pear"], "zebra, auk": ["auk", "zebra"]},
        pose=lambda q, a: f"Sort: {q}",
    ),
    "signature and docstring": quiz(
        facts={"a": CODE, "b": CODE},
        pose=lambda q, a: f"{q}. Complete:\n" + "\n".join(a.splitlines()[:2]),
        say=lambda q, a, r: "The program has no function `double(number)`.",
    ),
    "many hidden numbers": quiz(
        hide=lambda q, a: {"tests": [{"args": [k], "expected": k + 1} for k in range(1000)]},
        about=lambda q, a: {"rating": 1843, "year": 2024},
        say=lambda q, a, r: "Line 1017 is 4096 characters long.",
    ),
    "counts": quiz(facts=SUMS, metric=lambda q, a: {"tries": 7}, say=lambda q, a, r: "7 of 12"),
    "nothing to find": quiz(hide=lambda q, a: None, refer=None),
    "functions and locks": quiz(hide=lambda q, a: {"check": len, "seen": threading_lock()}),
}


def threading_lock():
    import threading

    return threading.Lock()


@pytest.mark.parametrize("name", HONEST)
def test_honest_environments_are_left_alone(name):
    report = check_env(HONEST[name])
    leaks = ("semantic.no_solution_leakage", "feedback.no_reference_leak")
    found = [r for r in report.results if r.id in leaks]
    assert {r.status for r in found} <= {"pass", "skip"}, str(report)
    assert report.ok, str(report)


def test_an_author_says_what_must_stay_hidden():
    class Passage(Quiz):
        def load_tasks(self, split):
            return [
                dataclasses.replace(t, messages=f"Where is it? ({t.hidden})")
                for t in super().load_tasks(split)
            ]

    assert not check_env(Passage()).ok

    class Open(Passage):
        def secrets(self, task):
            return None

        def reference_solution(self, task):
            return None

    assert check_env(Open()).verdict == "pass"
    assert rlrf.wrappers.DropFeedback(Open()).secrets(Open().tasks()[0]) is None


def test_where_a_value_stands_is_told():
    report = check_env(LEAKS["feedback, lower case"])
    (leak,) = report.failed
    first, *_ = leak.detail.splitlines()
    assert first == (
        "task 't0', attempt '': step 1 says (wrong_answer), at level 'explained', holds hidden, "
        "'Oslo' (written 'oslo'), at characters 6 to 10"
    )
    assert len(leak.detail.splitlines()) == 3 + 1  # a task each: every attempt hears it
    assert leak.detail.splitlines()[-1].startswith("give a segment that says it reveals='expected'")


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("7,391", "7391.0"),
        ("1e3", "1000"),
        ("-0.50", "-0.5"),
        ("Cape  Verde", '"cape-verde"'),
        ('{"a": [1, 234, 567]}', "{'a':[1,234,567]}"),
        ("ＡＢＣ", "abc"),
        ("007", "7"),
        ("get_weather", "get weather"),
    ],
)
def test_ways_of_writing(a, b):
    for one, other in ((a, b), (b, a)):
        secret = Secret.of("hidden", "", one, answer=True)
        assert Text(f"so: {other}!").holds(secret), (one, other)
        if other.isalnum():
            assert Text(f"so: {other}!").where(secret) == (4, 4 + len(other))


@pytest.mark.parametrize(
    ("a", "b"), [("-5", "5"), ("7", "7.5"), ("Oslo", "Oslofjord"), ("12", "123")]
)
def test_other_values_are_others(a, b):
    assert not Text(f"so {b}!").holds(Secret.of("hidden", "", a, answer=True))


def test_everything_hidden_is_walked():
    class Thing:
        def __init__(self):
            self.name, self._private = "Reykjavik", "Honolulu"

    loop: list[Any] = ["Kathmandu"]
    loop.append(loop)
    hidden = Hidden(
        {
            "thing": Thing(),
            "loop": loop,
            "row": Row("Ulaanbaatar", b"Ouagadougou", []),
            "json": '{"inner": ["Antananarivo"]}',
            "set": {"Tegucigalpa"},
            "array": np.array([[987654, 123987]]),
            "shown": {"public": True, "value": "Bratislava"},
        }
    )
    texts = {s.text for s in hidden.secrets}
    assert {"Reykjavik", "Kathmandu", "Ulaanbaatar", "Ouagadougou", "Antananarivo"} <= texts
    assert {"Tegucigalpa", "987654"} <= texts
    assert not texts & {"Honolulu", "Bratislava"}
    assert "Bratislava" in hidden.public.raw
    deep: Any = "Ljubljana"
    for _ in range(10_000):
        deep = [deep]
    assert "Ljubljana" in {s.text for s in Hidden(deep).secrets}


def test_a_sign_that_stands_for_several_words_is_one_of_them():
    from rlrf.testing.texts import Hidden, Text

    (secret,) = (s for s in Hidden({"answer": "\ufdfa\ufdfa"}).secrets if s.key)
    assert Text("say \ufdfa\ufdfa now").where(secret) == (4, 6)
