"""What of the hidden values is told where it must not be.

A value that is too unlikely to stand somewhere by chance is a leak wherever it does. One that is
not (``7``, ``yes``, the letter of an option) is a leak if it is called the answer, or if every task
tells its own there and no other's: by what it happens in several tasks chance is told from habit.

What everybody knows gives nothing away: the prompt, the attempt itself, hidden values that say of
themselves that they are public, and settings that all tasks share.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from rlrf.env import Task
from rlrf.feedback import Feedback
from rlrf.script import Script
from rlrf.testing.play import NO_OPS, Doubt, Play, Trace, at
from rlrf.testing.texts import (
    Hidden,
    Program,
    Secret,
    Text,
    is_answer,
    is_program,
    is_tests,
    names,
)

_BITS = 12.0
"""A value of fewer may well stand in a text by chance."""
_SURE_BITS = 30.0
"""A value of as many stands in a prompt only because it was put there."""
_CHANCE = 0.04
_LIKELY_BITS = 6.0
"""A value of as many (a number of two digits) stands where an answer is named by little chance."""
_SAID_BITS = 9.0
"""A value of as many (a number of three digits, a short name) is said to an attempt by none."""
_LOOKED_AT = 20
"""Tasks of a split whose prompts and metadata are looked at."""
_TOLD = 3
"""Findings in a message."""

_CALLED = frozenset("answer answers solution expected truth gold psst secret".split())
"""What calls the next value the answer, in a prompt; others stand in many a passage."""
_CUES = _CALLED | frozenset("correct right result target label should option key hint".split())
_CUES |= frozenset("want wanted wants looking".split())
_FILLERS = frozenset(
    "is was are be the a an of to for have been equal equals value output option answer number "
    "word letter choice one here being would".split()
)
_COPY = frozenset(
    "say repeat copy echo write type print output reply respond spell recite quote".split()
)
_TELLING = 200
"""Of more hidden values that stand in metadata, the others are not looked at one by one."""
_ANSWERS = 8
"""Of more answers to one task, the others are not looked at one by one."""
_UNNAMED = 8
"""Of more values that are hidden under names that tell nothing, none is taken for the answer."""
_FEW = 3
"""Of more tasks, a leak is in more than one."""
_PASSAGE = 40
"""A prompt of as many words may hold an answer that is to be read out of it."""
_BETWEEN = r"(?:[,;/|]|\bor\b|\band\b)"
_SEVERAL = rf"(?:{_BETWEEN}[^,;/|.:\n]{{1,40}}{_BETWEEN}|\bor\b|[/|])"
_LIST_BEFORE = re.compile(rf"{_SEVERAL}\s*[\"'`]?$")
_LIST_AFTER = re.compile(rf"[\"'`]?\s*{_SEVERAL}")
_LIST_AROUND = re.compile(r"[,;]\s*[\"'`]?$"), re.compile(r"[\"'`]?\s*(?:[,;]|or\b|and\b)")
_CHOICE = re.compile(r"^[ \t]*(?:[-*•]|\(?[A-Za-z0-9]{1,2}[.):])[ \t]+(.+)$", re.MULTILINE)


@dataclass
class Leaks:
    """What was found."""

    sure: dict[str, None] = field(default_factory=dict)
    doubtful: dict[str, None] = field(default_factory=dict)
    said: set[tuple[str, str, str]] = field(default_factory=set)

    def first(self, k: _Known, what: str, place: str) -> bool:
        """Whether it is the first time that this is told of a task: other attempts get it, too."""
        key = (k.task.id, what, place)
        if key in self.said:
            return False
        self.said.add(key)
        return True

    def check(self, remedy: str) -> None:
        """Raise if there is anything, and say what to do about it.

        Raises:
            AssertionError: a leak; a :class:`Doubt` if none is sure.
        """
        for found, kind in ((self.sure, AssertionError), (self.doubtful, Doubt)):
            if found:
                more = len(found) - _TOLD
                told = list(found)[:_TOLD] + [f"and {more} more"] * (more > 0)
                raise kind("\n".join([*told, remedy]))


class _Known:
    """What is hidden of a task, and who may know it.

    Attributes:
        telling: the values that stand nowhere by chance.
    """

    def __init__(self, play: Play, task: Task) -> None:
        self.task = task
        self.prompt = Text(_chat(task.messages))
        self.hidden = Hidden(play.secrets(task))
        solution = play.reference(task)
        played = None if solution is None else play.try_(task, solution)
        # A text as it is; of what is acted out, what it says.
        acted = played.attempt if isinstance(played, Trace) else ""
        self.solution = solution if isinstance(solution, str) else acted
        self.program = Program(self.solution) if len(self.solution.split()) > 3 else None
        secrets = {s.same: s for s in self.hidden.secrets}
        self._guessed: set[Any] = set()
        self._shared: Set[Any] = frozenset()
        whole = Program(self.solution).text
        if whole and (told := Secret.of("the reference solution", "", whole, answer=True)):
            secrets[told.same] = replace(secrets.get(told.same, told), answer=True)
        if not any(s.answer for s in secrets.values()) and len(secrets) <= _UNNAMED:
            # A small row, of which no name tells the answer: it may be any value that is not posed.
            for same, s in secrets.items():
                if "." in s.path and not self.prompt.holds(s) and not is_tests(s.key):
                    secrets[same] = replace(s, answer=True)
                    self._guessed.add(same)
        self.secrets = tuple(secrets.values())
        least = _BITS + math.log2(max(1, sum(not s.answer for s in self.secrets)))
        self._telling = [s for s in self.secrets if s.bits >= (_BITS if s.answer else least)]
        self.telling: list[Secret] = self._telling

    @cached_property
    def answers(self) -> list[Secret]:
        """The values that a reply should be, as far as one can tell."""
        right = Text(self.solution)
        found = (
            s for s in self.secrets if s.answer and (not self.solution or s.key or right.holds(s))
        )
        return list(itertools.islice(found, _ANSWERS))

    def leave_out(self, shared: Set[Any]) -> None:
        """Settings that all tasks share tell nothing of this one."""
        self._shared = shared - {
            s.same for s in self.secrets if s.answer and s.same not in self._guessed
        }
        self.telling = [s for s in self._telling if s.same not in self._shared]

    def vague(self) -> list[Secret]:
        """The answers that may."""
        return [s for s in self.answers if s.bits < _BITS and s.same not in self._shared]


def _known(play: Play, tasks: Iterable[Task]) -> dict[str, _Known]:
    found = {t.id: play.once(("known", t.id), partial(_Known, play, t)) for t in tasks}
    if len(found) > 1:
        shared = set.intersection(*({s.same for s in k.secrets} for k in found.values()))
        for known in found.values():
            known.leave_out(shared)
    return found


def public_leaks(play: Play) -> Leaks:
    """Of prompts, metadata, infos and observations."""
    leaks = Leaks()
    asked = {t.id: t for t in play.tasks}
    more = {t.id: t for t in (play.first(_LOOKED_AT) if play.looks_further else [])}
    known = _known(play, (more | asked).values())
    prompts, fields, templates = _Habit(known), _Habit(known), _Templates(len(known))
    for k in known.values():
        where = f"task {k.task.id!r}: the prompt"
        _prompt(leaks, templates, k, where)
        prompts.note("prompt", k, k.prompt, where, cued=True, known=Text(""))
        _fields(leaks, fields, k, "metadata", dict(k.task.metadata))
        if k.task.id in asked:
            for name, info in _infos(play, k.task):
                _fields(leaks, fields, k, name, info)
    for task, action, trace in play.everything():
        k = known[task.id]
        own = Text(k.prompt.raw + "\n" + trace.attempt)
        for n, turn in enumerate(trace.turns, 1):
            where = at(task, action) + f"the observation of step {n}"
            text = Text(_chat(turn.messages))
            if text.raw:
                _prose(leaks, k, text, own, where)
                prompts.note("observation", k, text, where, cued=True, known=Text(trace.attempt))
                prompts.note("observations", k, text, where, cued=False, known=Text(trace.attempt))
            _fields(leaks, fields, k, "metrics", dict(turn.metrics), attempt=trace.attempt)
    templates.judge(leaks)
    prompts.judge(leaks)
    fields.judge(leaks)
    return leaks


def feedback_leaks(play: Play) -> Leaks:
    """Of feedback, at every level."""
    leaks = Leaks()
    further = _further(play)
    known = _known(play, [*play.tasks, *further])
    if not any(k.secrets for k in known.values()):
        play.skip("the environment has no reference_solution and hides nothing")
    habit = _Habit(known)
    for task, action, trace in itertools.chain(play.everything(), _played(play, further)):
        k = known[task.id]
        own = Text("\n".join((k.prompt.raw, trace.attempt, k.hidden.public.raw)))
        for n, turn in enumerate(trace.turns, 1):
            for segment in turn.feedback:
                # What the lower levels put in the place of a text is ours.
                level = {"location": "located", "nothing": "explained"}.get(segment.reveals)
                what = f"step {n} says ({segment.kind}), at level {level or 'expected'!r},"
                where, text = at(task, action) + what, Text(segment.text)
                if level is None:
                    if segment.reveals == "expected" and _is_program(k):
                        _program(leaks, k, text, own, where)
                    continue
                _prose(leaks, k, text, own, where)
                # The lower levels keep it.
                by = at(task, action) + f"the source of a segment of step {n}, at every level,"
                _prose(leaks, k, Text(segment.source), own, by)
                habit.note("feedback", k, text, where, cued=True, known=Text(trace.attempt))
                habit.note("feedbacks", k, text, where, cued=False, known=Text(trace.attempt))
    habit.judge(leaks)
    return leaks


def _further(play: Play) -> list[Task]:
    """Tasks with other answers, where those that are played have all the same small one."""
    if not play.looks_further:
        return []
    mine = _known(play, play.tasks)
    answers = {s.same for k in mine.values() for s in k.vague()}
    if len(answers) != 1:
        return []
    others = (t for t in play.first(_LOOKED_AT) if t.id not in mine)
    differ = [t for t in others if {s.same for s in _known(play, [t])[t.id].vague()} - answers]
    return differ[:2]


def _played(play: Play, tasks: Iterable[Task]) -> Iterator[tuple[Task, Script, Trace]]:
    """Tasks with a no-op, and with the solution of another."""
    wrong = play.reference(play.tasks[0])
    for task in tasks:
        for action in (NO_OPS[-1], wrong):
            if action is not None and isinstance(found := play.try_(task, action), Trace):
                yield task, action, found


def _is_program(k: _Known) -> bool:
    return "```" in k.solution or any(
        s.text.strip() in k.solution for s in k.secrets if is_program(s.key)
    )


# --- one text -------------------------------------------------------------------------------------


def _prose(leaks: Leaks, k: _Known, text: Text, own: Text, where: str) -> None:
    """What the environment says to an attempt."""
    for secret in k.telling:
        if text.holds(secret) and not own.holds(secret):
            if leaks.first(k, secret.path, where.rpartition(": ")[2]):
                leaks.sure[_told(where, secret, text)] = None
            return
    _program(leaks, k, text, own, where)


def _program(leaks: Leaks, k: _Known, text: Text, own: Text, where: str) -> None:
    if k.program is None:
        return
    share, line = k.program.quoted(text.raw, own.raw)
    if line and leaks.first(k, line, where.rpartition(": ")[2]):
        found = leaks.sure if share >= 0.5 else leaks.doubtful
        found[f"{where} {share:.0%} of the reference solution: {line[:80]!r}"] = None


def _prompt(leaks: Leaks, templates: _Templates, k: _Known, where: str) -> None:
    there = [s for s in k.answers if k.prompt.holds(s)]
    # What is to be sorted or rewritten stands there piece by piece.
    pieces = len(k.answers) > 1 and sum("[" in s.path for s in k.answers if s in there) > 1
    most = max((s.bits for s in k.answers), default=0.0)
    for secret in there:
        part = (pieces and "[" in secret.path) or (k.solution and secret.bits < most / 2)
        if part or _is_choice(k.prompt, secret):
            continue
        if secret.bits < _BITS:
            templates.note_vague(k, secret, _told(where, secret, k.prompt))
            continue
        told = _told(where, secret, k.prompt)
        if _is_cued(k.prompt, secret, _CALLED):
            leaks.sure[told] = None
        else:
            templates.note(k, secret, told)
    tests = (s for s in k.secrets if not s.answer and s.bits >= 2 * _SURE_BITS)
    shown = (s for s in tests if k.prompt.holds(s) and not k.hidden.public.holds(s))
    for secret in itertools.islice(filter(_is_test, shown), _TOLD + 1):
        leaks.doubtful[_told(where, secret, k.prompt)] = None
    if k.program is not None and k.program.is_told(k.prompt.raw):
        leaks.sure[f"{where} holds the reference solution: {k.program.lines[-1][:80]!r}"] = None


def _is_test(secret: Secret) -> bool:
    return any(map(is_tests, secret.path.replace("[", ".").split(".")))


def _fields(
    leaks: Leaks,
    habit: _Habit,
    k: _Known,
    name: str,
    data: Any,
    attempt: str = "",
) -> None:
    """What stands under a name: metadata, an info, metrics."""
    own, called = Text(k.prompt.raw + "\n" + attempt), names(data)
    for secret in k.telling:
        if called.holds(secret) and not own.holds(secret):
            leaks.sure[f"task {k.task.id!r}: a name in {name} holds {secret.path}"] = None
            return
    # All of it is left out, of which each is looked at.
    every = [
        f for f in Hidden(data, name).secrets if f.path != name or not isinstance(data, Mapping)
    ]
    values = [(f, Text(f.text), f"task {k.task.id!r}: {f.path}") for f in every]
    together = Text("\n".join(f.text for f in every))
    told = itertools.islice((s for s in k.telling if together.holds(s)), _TELLING)
    for secret, (field_, value, where) in itertools.product(told, values):
        known = own.holds(secret) and not (is_answer(field_.key) and secret.answer)
        published = (
            secret.key
            and secret.key == field_.key
            and not (is_answer(secret.key) or is_tests(secret.key))
        )
        if not known and not published and value.holds(secret):
            leaks.sure[_told(where, secret, value)] = None
            return
    for field_, value, where in values:
        if k.program is not None and k.program.is_told(field_.text):
            leaks.sure[f"{where} holds the reference solution"] = None
            return
        if is_answer(field_.key):
            for secret in k.answers:
                if value.is_only(secret):
                    leaks.sure[_told(where, secret, value)] = None
                    return
        habit.note(
            field_.path,
            k,
            value,
            where,
            cued=False,
            known=Text(attempt),
            whole=True,
            name=field_.key,
        )


def _told(where: str, secret: Secret, text: Text) -> str:
    start, end = text.where(secret)
    there = text.raw[start:end]
    how = "" if there == secret.text.strip() else f" (written {there[:60]!r})"
    return (
        f"{where} holds {secret.path}, {secret.text.strip()[:60]!r}{how}, "
        f"at characters {start} to {end}"
    )


def _is_cued(text: Text, secret: Secret, cues: Set[str] = _CUES) -> bool:
    """Whether a text calls a value the answer."""
    for before, after in text.before(secret):
        if after in ("or", "and"):
            continue
        for word in reversed(before):
            if word in cues:
                return not _is_choice(text, secret)
            if word not in _FILLERS:
                break
    return False


def _is_choice(text: Text, secret: Secret) -> bool:
    """Whether a value is one of the items of a list, which does not tell which is right."""
    items = [Text(item) for item in _CHOICE.findall(text.raw)]
    if len(items) > 1 and any(item.is_only(secret) for item in items):
        return True
    start, end = text.where(secret)
    before, after = text.raw[max(0, start - 60) : start], text.raw[end : end + 60]
    left, right = _LIST_AROUND
    around = left.search(before) and right.match(after)
    return bool(around or _LIST_BEFORE.search(before) or _LIST_AFTER.match(after))


class _Templates:
    """Answers in prompts, which may be there by right (a passage to read, a word to repeat).

    What surrounds them tells: where it is the same in task after task, they were put there.
    """

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        self._found: dict[tuple[str, ...], list[tuple[_Known, Secret, str]]] = {}
        self._vague: dict[tuple[str, ...], dict[str, tuple[Secret, str]]] = {}

    def note(self, k: _Known, secret: Secret, told: str) -> None:
        """An answer that stands in the prompt of its task."""
        before = next((tuple(words[-2:]) for words, _ in k.prompt.before(secret)), ())
        self._found.setdefault(before, []).append((k, secret, told))

    def note_vague(self, k: _Known, secret: Secret, told: str) -> None:
        """One that may stand there by chance."""
        for words, _ in k.prompt.before(secret):
            if len(words) > 1 and not _COPY & set(words):
                self._vague.setdefault(tuple(words[-2:]), {})[k.task.id] = secret, told

    def judge(self, leaks: Leaks) -> None:
        """Which of them were put there."""
        for before, found in self._found.items():
            k, secret, told = found[0]
            copied = any(_COPY & set(words) for words, _ in k.prompt.before(secret))
            tasks = {k.task.id for k, _, _ in found} | self._vague.get(before, {}).keys()
            several = len(tasks) >= max(2, self._tasks / 2)
            passage = self._tasks > _FEW or len(k.prompt.raw.split()) >= _PASSAGE
            if passage and not several and self._tasks > 1:
                continue
            sure = (several or secret.bits >= _SURE_BITS) and not copied
            more = f", and after {' '.join(before)!r} in {len(tasks)} prompts" if several else ""
            (leaks.sure if sure else leaks.doubtful)[told + more] = None
        for before, vague in self._vague.items():
            distinct = len({secret.same for secret, _ in vague.values()})
            secret, told = next(iter(vague.values()))
            if self._tasks == 1 and secret.bits >= _LIKELY_BITS:
                leaks.doubtful[told] = None
            elif distinct > 1 and len(vague) >= 0.8 * self._tasks:
                leaks.sure[f"{told}, and after {' '.join(before)!r} in {len(vague)} prompts"] = None


class _Habit:
    """Values that may stand anywhere by chance, told in task after task: each its own."""

    def __init__(self, known: Mapping[str, _Known]) -> None:
        self._known = known
        self._places: dict[tuple[str, bool], dict[str, tuple[Secret, str]]] = {}
        self._vague = {id: k.vague() for id, k in known.items()}
        self._seen: dict[tuple[str, bool], set[str]] = {}

    def note(
        self,
        place: str,
        k: _Known,
        text: Text,
        where: str,
        *,
        cued: bool,
        known: Text,
        whole: bool = False,
        name: str = "",
    ) -> None:
        """A text in which the answer of a task may stand.

        Args:
            place: what sort of text; tasks are compared within one.
            k: the task.
            text: the text.
            where: how a message about it begins.
            cued: whether only what is called the answer counts.
            known: what else may have put the answer there.
            whole: whether the text must be the answer and no more.
            name: what it is called; what is hidden by the same name may be published by it.
        """
        mine = [s for s in self._vague[k.task.id] if not s.key or s.key != name or is_answer(name)]
        if not mine:
            return
        self._seen.setdefault((place, cued), set()).add(k.task.id)

        def tells(secret: Secret) -> bool:
            if whole:
                return text.is_only(secret)
            return text.holds(secret) and (not cued or _is_cued(text, secret))

        for secret in mine:
            if known.holds(secret) or not tells(secret):
                continue
            own = {s.same for s in mine}
            others = (s for id in list(self._vague)[:50] for s in self._vague[id])
            if not any(s.same not in own and tells(s) for s in others):
                told = self._places.setdefault((place, cued), {})
                told.setdefault(k.task.id, (secret, _told(where, secret, text)))

    def judge(self, leaks: Leaks) -> None:
        """Which of it is no chance."""
        for (place, cued), told in self._places.items():
            of = len(self._seen[place, cued])
            distinct = len({secret.same for secret, _ in told.values()})
            secret, first = next(iter(told.values()))
            # By chance, each has its own with a probability of one in as many as there are.
            chance = distinct ** -len(told)
            if len(told) >= 0.8 * of and distinct > 1 and (cued or chance <= _CHANCE):
                leaks.sure[f"{first}, and so in {len(told)} of {of} tasks"] = None
            elif len(told) == of:
                likely = secret.bits >= _LIKELY_BITS
                if cued:
                    (leaks.sure if likely else leaks.doubtful)[first] = None
                elif likely or distinct > 1:
                    said = place in ("feedbacks", "observations")
                    found = said and secret.bits >= _SAID_BITS
                    (leaks.sure if found else leaks.doubtful)[first] = None


# --- what is public -------------------------------------------------------------------------------


def _chat(messages: Iterable[Mapping[str, Any]]) -> str:
    parts = []
    for message in messages:
        parts.append(str(message.get("content") or ""))
        if calls := message.get("tool_calls"):
            parts.append(json.dumps(calls, ensure_ascii=False, default=str))
    return "\n".join(parts)


def _infos(play: Play, task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """The infos of an episode through the Gymnasium face, but for what is looked at elsewhere."""

    def plain(info: Mapping[str, Any]) -> dict[str, Any]:
        apart = ("task_id", "feedback", "feedback_tokens", "metrics")
        return {k: v for k, v in info.items() if k not in apart and not isinstance(v, Feedback)}

    options = {"task_id": task.id}
    _, info = play.timed("reset()", lambda: play.env.reset(seed=0, options=options))
    yield "info of reset()", plain(info)
    result = play.timed("step()", lambda: play.env.step(NO_OPS[-1]))
    yield "info of step()", plain(result.info)
