"""Wrappers that ablate feedback: same tasks, same rewards, less (or wrong) text.

A wrapper is an :class:`rlrf.Env` around another. It changes only what the feedback says, on every
path: ``step``, ``grade`` and :func:`rlrf.rollout`.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlrf._async import call_hook, run_sync
from rlrf.env import Env, Outcome, SingleTurnEnv, Task, TaskSequence, Turn
from rlrf.errors import UsageError, check_whole
from rlrf.feedback import KINDS, Feedback, Level, Segment, shorten
from rlrf.messages import Action, action_message
from rlrf.rollout import Rollout


class FeedbackWrapper(Env):
    """Base: delegates everything to ``env`` and rewrites its feedback in :meth:`transform`."""

    def __init__(self, env: Env) -> None:
        super().__init__(
            feedback=env.feedback_level,
            split=env.split,
            tokenizer=env.tokenizer,
            max_feedback_tokens=env.max_feedback_tokens,
        )
        self.env = env
        self.splits = env.splits  # type: ignore[misc]  # a class's constant, but an inner env's here
        self.split = env.split
        self.reads_reasoning = env.reads_reasoning
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.reward_range = env.reward_range
        self.success_threshold = env.success_threshold
        self.concurrency = env.concurrency
        self.spec = env.spec

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:  # type: ignore[override]  # an attribute there
        """The inner environment's."""
        return self.env.tools

    @abc.abstractmethod
    async def transform(
        self, feedback: Feedback, task: Task, action: Action, rng: np.random.Generator
    ) -> Feedback:
        """The feedback to show instead of ``feedback``."""

    def _check_split(self, split: str) -> str:
        inner = getattr(self, "env", None)
        return split if inner is None else inner._check_split(split)

    def load_tasks(self, split: str) -> Sequence[Task]:
        """The inner environment's tasks."""
        return self.env._full_tasks(split)

    def _full_tasks(self, split: str | None = None) -> TaskSequence:
        return self.env._full_tasks(split or self.split)

    def _find_task(self, task: str | Task, split: str | None = None) -> Task:
        return self.env._find_task(task, split)

    def reference_solution(self, task: Task) -> str | None:
        """The inner environment's."""
        return self.env.reference_solution(task)

    def render_html(self, task: Task, rollout: Rollout) -> Any:
        """The inner environment's card; awaitable if that is ``async def``."""
        return self.env.render_html(task, rollout)

    def secrets(self, task: Task) -> Any:
        """The inner environment's."""
        return self.env.secrets(task)

    async def _start(self, task: Task, rng: np.random.Generator) -> Any:
        return await self.env._start(task, rng)

    async def _advance(
        self, task: Task, state: Any, action: Action, rng: np.random.Generator
    ) -> Turn:
        turn = await self.env._advance(task, state, action, rng)
        shown = self.env._shown(turn.feedback)
        feedback: Feedback = await call_hook(self.transform, shown, task, action, rng)
        return Turn(
            turn.messages, turn.reward, feedback, turn.terminated, turn.truncated, turn.metrics
        )

    def _shown(self, feedback: Feedback) -> Feedback:
        # Masked once already, by the inner environment; a wrapper may show what it likes of that.
        return feedback

    async def agrade(self, task: str | Task, completion: Action) -> Outcome:
        """Async twin of :meth:`grade`.

        Raises:
            UsageError: the inner environment is not one-shot.
        """
        full = self._find_task(task)
        rng = np.random.default_rng(0)
        turn = await self._advance(full, await self._start(full, rng), completion, rng)
        if not (turn.terminated or turn.truncated):
            raise UsageError(f"{self.env!r} takes several turns; use reset() and step()")
        return Outcome(turn.reward, turn.feedback, turn.metrics)

    def grade(self, task: str | Task, completion: Action) -> Outcome:
        """Grade a completion of a one-shot environment; see :meth:`SingleTurnEnv.grade`."""
        return run_sync(self.agrade(task, completion))

    def close(self) -> None:
        """Close the inner environment."""
        self.env.close()

    async def aclose(self) -> None:
        """Close the inner environment."""
        await self.env.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.env!r})"


class FeedbackLevel(FeedbackWrapper):
    """Show feedback at ``level``, or at the environment's own level if that is lower."""

    def __init__(self, env: Env, level: Level | str | int) -> None:
        super().__init__(env)
        self.level = Level.parse(level)

    async def transform(
        self, feedback: Feedback, task: Task, action: Action, rng: np.random.Generator
    ) -> Feedback:
        """See :class:`FeedbackWrapper`."""
        return feedback.at_level(self.level)


class DropFeedback(FeedbackWrapper):
    """Drop feedback: all of it, only some kinds, or the whole text with a probability.

    Args:
        env: the environment.
        kinds: drop only segments of these kinds; None drops all.
        probability: chance to drop, drawn per task and attempt from ``seed``, so that the same
            attempt always fares the same.
        seed: seed of that draw.

    Raises:
        UsageError: an unknown kind, or a probability outside [0, 1].
    """

    def __init__(
        self,
        env: Env,
        kinds: str | Iterable[str] | None = None,
        *,
        probability: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(env)
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        self.kinds = None if kinds is None else frozenset(kinds)
        unknown = sorted((self.kinds or frozenset()) - set(KINDS))
        if unknown:
            raise UsageError(f"unknown feedback kind {unknown[0]!r}; kinds are {', '.join(KINDS)}")
        if not 0 <= probability <= 1:
            raise UsageError(f"probability is {probability}; it must be in [0, 1]")
        self.probability, self.seed = probability, seed

    async def transform(
        self, feedback: Feedback, task: Task, action: Action, rng: np.random.Generator
    ) -> Feedback:
        """See :class:`FeedbackWrapper`."""
        if _uniform(self.seed, task.id, action) >= self.probability:
            return feedback
        if self.kinds is None:
            return Feedback()
        return Feedback(s for s in feedback if s.kind not in self.kinds)


class ShuffleFeedback(FeedbackWrapper):
    """Show the feedback that *another task's* grader gives to the same attempt: the control.

    It has the style and the length of feedback and what is common to all tasks, but nothing about
    this one. The other task is fixed by ``seed`` and this task's id, so the result is
    deterministic. Attempts with no feedback keep none.

    Raises:
        UsageError: the environment takes several turns, or has a single task.
    """

    def __init__(self, env: Env, *, seed: int = 0) -> None:
        super().__init__(env)
        self.seed = seed
        inner = env
        while isinstance(inner, FeedbackWrapper):
            inner = inner.env
        if not isinstance(inner, SingleTurnEnv):
            raise UsageError(
                f"ShuffleFeedback needs a one-shot environment (SingleTurnEnv), got {env!r}"
            )

    async def transform(
        self, feedback: Feedback, task: Task, action: Action, rng: np.random.Generator
    ) -> Feedback:
        """See :class:`FeedbackWrapper`."""
        if not feedback:
            return feedback
        tasks = self._full_tasks()
        if len(tasks) < 2:
            raise UsageError("ShuffleFeedback needs at least two tasks to swap feedback between")
        start = int(_uniform(self.seed, task.id, "") * len(tasks))
        for k in range(min(len(tasks), 8)):
            other = tasks[(start + k) % len(tasks)]
            if other.id == task.id:
                continue
            turn = await self.env._advance(other, await self.env._start(other, rng), action, rng)
            if turn.feedback:
                shown = self.env._shown(turn.feedback)
                # A span points into the attempt by *this* task's lights; here it would mislead.
                return Feedback(_without_span(s) for s in shown)
        return Feedback()


def _without_span(segment: Segment) -> Segment:
    return Segment.from_dict({**segment.to_dict(), "span": None})


class TruncateFeedback(FeedbackWrapper):
    """Cut every segment's text to ``max_chars``, head and tail kept.

    Raises:
        UsageError: ``max_chars`` is not positive.
    """

    def __init__(self, env: Env, max_chars: int) -> None:
        super().__init__(env)
        check_whole("max_chars", max_chars)
        self.max_chars = max_chars

    async def transform(
        self, feedback: Feedback, task: Task, action: Action, rng: np.random.Generator
    ) -> Feedback:
        """See :class:`FeedbackWrapper`."""
        return Feedback(
            Segment.from_dict({**s.to_dict(), "text": shorten(s.text, self.max_chars)})
            for s in feedback
        )


def _uniform(seed: int, task_id: str, action: Action) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    # As a message: step() is given "x" where rollout() gives {"role": "assistant", "content": "x"}.
    text = json.dumps([seed, task_id, action_message(action)], sort_keys=True, default=repr)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
