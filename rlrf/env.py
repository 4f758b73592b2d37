"""Environments, as authors write them.

Subclass :class:`SingleTurnEnv` (``load_tasks``, ``grade``) or :class:`MultiTurnEnv`
(``load_tasks``, ``start``, ``respond``). Hooks may be ``def`` (they run in a thread) or
``async def``. :class:`Env` itself is in :mod:`rlrf.base_env`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import numpy as np

from rlrf._async import call_hook, run_sync
from rlrf.base_env import Env, Episode, check_is_env
from rlrf.errors import (
    ReturnTypeError,
    brief,
    check_whole,
)
from rlrf.feedback import Feedback, Segment
from rlrf.messages import (
    Action,
    Message,
)
from rlrf.outcome import Outcome, StepResult, Turn
from rlrf.task import EmptySplitError, Task, TaskSequence, as_tasks


class SingleTurnEnv(Env):
    """One prompt, one completion, one grade. An author writes ``load_tasks`` and ``grade``.

    Example::

        class Echo(SingleTurnEnv):
            def load_tasks(self, split):
                return [Task(w, f"Say {w}.", hidden=w) for w in ("yes", "no")]

            def grade(self, task, completion):
                if completion == task.hidden:
                    return Outcome(1.0)
                return Outcome(0.0, Feedback.of("wrong_answer", "Say the word alone."))
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._check_hook("grade", "task", "completion", of=SingleTurnEnv)
        # One name, two faces: the class's `grade` is the author's hook, which `super().grade`
        # reaches as it is; an environment's own is the user's method, as documented there.
        self.grade = self._graded  # type: ignore[method-assign]  # see above

    def grade(self, task: Any, completion: Any) -> Any:
        """Grade a completion.

        Authors override it as ``grade(self, task: Task, completion: str) -> Outcome`` (or
        ``async def``). Users call it with a task's id (or a task) and get an :class:`Outcome` at
        the environment's feedback level: ``reward, feedback = env.grade(id, text)``; no episode is
        needed and none is touched.

        Raises:
            UnknownIdError: no task has that id.
            InfraError: the machinery failed; there is no grade.
        """
        raise NotImplementedError

    def _graded(self, task: str | Task, completion: Action) -> Outcome:
        return run_sync(self.agrade(task, completion))

    async def agrade(self, task: str | Task, completion: Action) -> Outcome:
        """Async twin of :meth:`grade` as users call it."""
        outcome = await self._grade(self._find_task(task), completion)
        return replace(outcome, feedback=self._shown(outcome.feedback))

    async def _grade(self, task: Task, completion: Action) -> Outcome:
        """The author's grade, at full feedback."""
        heard = self._heard(completion)
        hook = MethodType(type(self).grade, self)
        outcome = await call_hook(hook, task, heard["content"] or "")
        if not isinstance(outcome, Outcome):
            raise ReturnTypeError(
                f"{type(self).__name__}.grade returned {brief(outcome)}; return "
                "rlrf.Outcome(reward, feedback)"
            )
        return replace(outcome, feedback=self._told(outcome.feedback, completion, heard))

    async def _start(self, task: Task, rng: np.random.Generator) -> Any:
        return None

    async def _advance(
        self, task: Task, state: Any, action: Action, rng: np.random.Generator
    ) -> Turn:
        outcome = await self._grade(task, action)
        return Turn(
            reward=outcome.reward,
            feedback=outcome.feedback,
            terminated=True,
            metrics=outcome.metrics,
        )


class MultiTurnEnv(Env):
    """A conversation. An author writes ``load_tasks``, ``start`` and ``respond``.

    Args:
        max_turns: actions after which an episode is truncated; None for no limit. The last
            :class:`Turn` of an episode that is not solved by then also has a
            ``truncated_attempt`` in its feedback, and what :meth:`truncation_feedback` says.
        kwargs: see :class:`Env`.
    """

    def __init__(self, *, max_turns: int | None = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_turns is not None:
            check_whole("max_turns", max_turns)
        self.max_turns = max_turns
        self._start_takes_rng = "rng" in inspect.signature(self.start).parameters
        rng = ("rng",) if self._start_takes_rng else ()
        self._check_hook("start", "task", *rng, of=MultiTurnEnv)
        self._check_hook("respond", "state", "action", of=MultiTurnEnv)
        self._check_hook("truncation_feedback", "state")

    def start(self, task: Task) -> Any:
        """A fresh state for an episode of ``task``.

        Take a second parameter named ``rng`` to get the episode's own
        :class:`numpy.random.Generator`. May be ``async def``.
        """
        raise NotImplementedError

    def respond(self, state: Any, action: Message) -> Any:
        """Answer an assistant message with a :class:`Turn`. May be ``async def``.

        ``action["content"]`` is the answer; beside it may be ``tool_calls``, those of them that
        could not be read (``invalid_tool_calls``), and ``reasoning_content``.
        """
        raise NotImplementedError

    def truncation_feedback(self, state: Any) -> Any:
        """More :class:`Feedback` where ``max_turns`` ends an episode: what was still to be done.

        May be ``async def``.
        """
        return Feedback()

    async def _start(self, task: Task, rng: np.random.Generator) -> Any:
        args = (task, rng) if self._start_takes_rng else (task,)
        return _Counted(await call_hook(self.start, *args))

    async def _advance(
        self, task: Task, state: Any, action: Action, rng: np.random.Generator
    ) -> Turn:
        heard = self._heard(action)
        turn = await call_hook(self.respond, state.inner, heard)
        if not isinstance(turn, Turn):
            raise ReturnTypeError(
                f"{type(self).__name__}.respond returned {brief(turn)}; return rlrf.Turn(...)"
            )
        turn = replace(turn, feedback=self._told(turn.feedback, action, heard))
        state.turns, state.reward = state.turns + 1, state.reward + turn.reward
        ended = turn.terminated or turn.truncated
        if self.max_turns is None or state.turns < self.max_turns or ended:
            return turn
        if state.reward >= self.success_threshold:  # cut, but nothing was left to do
            return replace(turn, truncated=True)
        more = await call_hook(self.truncation_feedback, state.inner)
        if not isinstance(more, Feedback):
            raise ReturnTypeError(
                f"{type(self).__name__}.truncation_feedback returned {brief(more)}; return a "
                "rlrf.Feedback, e.g. Feedback.of('state_mismatch', 'The order is still open.')"
            )
        cut = Segment(
            "truncated_attempt",
            f"The conversation was cut off after {state.turns} turns, before the task was done.",
            source="rlrf",
            priority=1,
        )
        return replace(turn, truncated=True, feedback=Feedback((*turn.feedback, cut, *more)))


@dataclass
class _Counted:
    """An author's state, with the number of actions taken and what they earned."""

    inner: Any
    turns: int = 0
    reward: float = 0.0


__all__ = [
    "EmptySplitError",
    "Env",
    "Episode",
    "MultiTurnEnv",
    "Outcome",
    "SingleTurnEnv",
    "StepResult",
    "Task",
    "TaskSequence",
    "Turn",
    "as_tasks",
    "check_is_env",
]
