"""What an environment answers: a grader's outcome, a turn of a conversation; checked when made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rlrf.errors import OutcomeError, UsageError, brief
from rlrf.feedback import MAX_SEGMENTS, Feedback
from rlrf.messages import Messages, as_messages


@dataclass(frozen=True)
class Outcome:
    """A grader's answer; unpacks to ``reward, feedback``.

    Attributes:
        reward: what the *policy* earned; finite. When the machinery failed, raise
            :class:`rlrf.InfraError` instead.
        feedback: why; empty when there is nothing to say.
        metrics: named finite numbers beside the reward, e.g. the fraction of tests passed.

    Raises:
        OutcomeError: the reward is not a finite number, the feedback no :class:`Feedback`, or the
            metrics are no mapping of names to finite numbers.
    """

    reward: float
    feedback: Feedback = field(default_factory=Feedback)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_answer(self)

    def __iter__(self) -> Iterator[Any]:
        yield self.reward
        yield self.feedback


@dataclass(frozen=True)
class Turn:
    """An environment's answer to one action.

    Attributes:
        messages: the new chat messages the policy gets to see.
        reward: reward of this step; finite.
        feedback: why; belongs to this step, also when it is the last.
        terminated: the task has ended (solved, failed, given up).
        truncated: the episode was cut short (turn limit).
        metrics: named finite numbers.

    Raises:
        OutcomeError: as for :class:`Outcome`; also messages that are none, and ends that are
            neither true nor false.
    """

    messages: Messages = ()
    reward: float = 0.0
    feedback: Feedback = field(default_factory=Feedback)
    terminated: bool = False
    truncated: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_answer(self)
        for name in ("terminated", "truncated"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise OutcomeError(f"Turn.{name} is {brief(value)}; it must be true or false")
            object.__setattr__(self, name, bool(value))
        try:
            object.__setattr__(self, "messages", as_messages(self.messages))
        except UsageError as error:
            raise OutcomeError(f"Turn.messages: {error}") from None


MAX_REWARD = 1e15
"""Larger rewards have no variance in single precision: one would spoil its whole batch."""


def _check_answer(answer: Outcome | Turn) -> None:
    """See that an answer is one, whole, and bring its numbers into plain form."""
    what = type(answer).__name__
    reward = _number(answer.reward)
    if reward is None or abs(reward) > MAX_REWARD:
        raise OutcomeError(
            f"{what}.reward is {brief(answer.reward)}; it must be a finite number of at most "
            f"{MAX_REWARD:g} in size. If the grader "
            "could not decide, raise rlrf.InfraError: the rollout is then retried or left unscored"
        )
    if not isinstance(answer.feedback, Feedback):
        raise OutcomeError(
            f"{what}.feedback is {brief(answer.feedback)}; it must be a Feedback, e.g. "
            "Feedback.of('wrong_answer', 'text')"
        )
    if not isinstance(answer.metrics, Mapping):
        raise OutcomeError(
            f"{what}.metrics is {brief(answer.metrics)}; it must be a mapping of names to numbers"
        )
    metrics: dict[str, float] = {}
    for name, value in answer.metrics.items():
        number = _number(value)
        if not isinstance(name, str) or number is None:
            raise OutcomeError(
                f"{what}.metrics[{brief(name).removesuffix(' (str)')}] is {brief(value)}; "
                "metrics are finite numbers by name (a string). Leave out what is not known"
            )
        metrics[name] = number
    object.__setattr__(answer, "reward", reward)
    object.__setattr__(answer, "metrics", metrics)
    if len(answer.feedback) > MAX_SEGMENTS:
        object.__setattr__(answer, "feedback", answer.feedback.capped())


def _number(value: Any) -> float | None:
    """A finite number as a float; None for what is none. NumPy's scalars are numbers."""
    if isinstance(value, np.complexfloating) or not isinstance(
        value, (int, float, np.number, np.bool_)
    ):
        return None
    try:
        number = float(value)
    except OverflowError:  # 10**400
        return None
    return number if math.isfinite(number) else None


class StepResult(NamedTuple):
    """Gymnasium's five-tuple, with names."""

    observation: Messages
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
