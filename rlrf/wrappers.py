"""Wrappers that ablate feedback: same tasks, same rewards, less (or wrong) text.

A wrapper is an :class:`rlrf.Env` around another. It changes only what the feedback says, on every
path: ``step``, ``grade`` and :func:`rlrf.rollout`. It is part of what an environment is: ``spec``,
``str()`` and what is written of a run or an evaluation name it with its arguments.

:func:`wrap` makes wrappers by name, as ``--wrap`` and ``[env.wrap]`` do. Names are those of the
classes here, of the entry points of the group ``rlrf.wrappers``, or ``pkg.mod:Class``.

Why: design/gymnasium.md.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import difflib
import enum
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec

from rlrf._async import call_hook, run_sync
from rlrf.env import Env, Outcome, SingleTurnEnv, Task, TaskSequence, Turn
from rlrf.errors import ConfigError, UsageError, check_whole, nearest
from rlrf.feedback import KINDS, Feedback, Level, Segment, shorten
from rlrf.messages import Action, action_message
from rlrf.plugins import Registry, load_object
from rlrf.rollout import Rollout
from rlrf.script import Script


class FeedbackWrapper(Env):
    """Base: delegates everything to ``env`` and rewrites its feedback in :meth:`transform`.

    What a subclass is made with is noted by itself: nothing has to be said again.
    """

    _given: Mapping[str, Any] = MappingProxyType({})
    _spec: EnvSpec | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments."""
        self = super().__new__(cls)
        # What does not fit, __init__ will say; a copy is made without any.
        with contextlib.suppress(TypeError):
            bound = _signature(cls).bind(*args, **kwargs)
            bound.apply_defaults()
            _, *given = bound.arguments.items()  # the first is the environment
            self._given = dict(given)
        return self

    def __init__(self, env: Env) -> None:
        super().__init__(
            feedback=env.feedback_level,
            split=env.split,
            tokenizer=env.tokenizer,
            max_feedback_tokens=env.max_feedback_tokens,
        )
        self.env = env
        # A class's constants, but an inner environment's here.
        self.splits, self.eval_split = env.splits, env.eval_split  # type: ignore[misc]
        self.max_tokens = env.max_tokens  # type: ignore[misc]
        self.overlapping_splits = env.overlapping_splits
        self.split = env.split
        self.reads_reasoning = env.reads_reasoning
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.reward_range = env.reward_range
        self.success_threshold = env.success_threshold
        self.concurrency = env.concurrency

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was made with, defaults included, as JSON data."""
        # What it has made of an argument says more: an iterator is used up.
        return {name: _data(getattr(self, name, value)) for name, value in self._given.items()}

    @property
    def spec(self) -> EnvSpec | None:
        """The inner environment's, with this wrapper as one of its ``additional_wrappers``."""
        inner = self.env.spec
        if self._spec is not None or inner is None:
            return self._spec
        cls = type(self)
        mine = WrapperSpec(cls.__name__, f"{cls.__module__}:{cls.__qualname__}", self.arguments)
        found = copy.copy(inner)
        found.additional_wrappers = (*inner.additional_wrappers, mine)
        return found

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = spec  # of an environment that is registered with its wrappers

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

    def reference_solution(self, task: Task) -> Script | None:
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
        arguments = [repr(self.env), *(f"{k}={v!r}" for k, v in self.arguments.items())]
        return f"{type(self).__name__}({', '.join(arguments)})"

    __str__ = __repr__


class FeedbackLevel(FeedbackWrapper):
    """Show feedback at ``level``.

    Raises:
        UsageError: the environment itself shows less.
    """

    def __init__(self, env: Env, level: Level | str | int) -> None:
        super().__init__(env)
        self.level = Level.parse(level)
        if self.level > env.feedback_level:
            raise UsageError(
                f"FeedbackLevel shows level {self.level.name!r}, but {env} shows no more than "
                f"{env.feedback_level.name!r}; make it with feedback={self.level.name!r}, or wrap "
                "it with a lower level"
            )
        self.feedback_level = self.level

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
            raise UsageError(
                f"unknown feedback kind {unknown[0]!r}; kinds are {', '.join(KINDS)}"
                + nearest(unknown[0], KINDS)
            )
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


# --- by name --------------------------------------------------------------------------------------

wrappers = Registry(
    "rlrf.wrappers",
    "wrapper",
    {c.__name__: c for c in (FeedbackLevel, DropFeedback, ShuffleFeedback, TruncateFeedback)},
)

Wrap = Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]]
"""Wrappers by name, the innermost first: ``{"FeedbackLevel": {"level": "binary"}}``.

Where one stands twice: ``[{"name": "FeedbackLevel", "level": "binary"}, ...]``.
"""


def wrap(env: Env, wrap: Wrap | None) -> Env:
    """An environment in the wrappers of these names, with these arguments.

    Args:
        env: the environment.
        wrap: names and arguments, the innermost first.

    Raises:
        UnknownIdError: nothing has that name; near matches are listed.
        ConfigError: an argument that the wrapper does not have, or lacks.
        UsageError: the wrapper refuses the environment or a value.
    """
    for name, arguments in _named(wrap or ()):
        path, _, attribute = name.partition(":")
        found = load_object(name, f"wrapper {name!r}") if attribute else wrappers.load(path)
        if not isinstance(found, type) or not issubclass(found, FeedbackWrapper):
            raise UsageError(f"wrapper {name!r} is {found!r}; it must be a FeedbackWrapper")
        try:
            _signature(found).bind(env, **arguments)
        except TypeError as error:
            _, *options = _signature(found).parameters
            unknown = next((k for k in arguments if k not in options), "")
            near = difflib.get_close_matches(unknown, options, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"wrapper {name!r}: {error}; {hint}its arguments are "
                + (", ".join(options) or "none")
            ) from None
        env = found(env, **arguments)
    return env


def _named(wrap: Wrap) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(wrap, Mapping):
        wrap = [{"name": name, **_table(name, arguments)} for name, arguments in wrap.items()]
    found = []
    for item in wrap:
        arguments = dict(_table("wrap", item))
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f'env.wrap: {item!r:.80} has no name; write name = "FeedbackLevel"')
        found.append((name, arguments))
    return found


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise ConfigError(
        f"env.wrap: {name} is {value!r:.80}; it must be a table of its arguments, like "
        'FeedbackLevel = {level = "binary"}'
    )


def _signature(cls: type[FeedbackWrapper]) -> inspect.Signature:
    whole = inspect.signature(cls.__init__)
    _, *parameters = whole.parameters.values()
    return whole.replace(parameters=parameters)


def innermost(env: Env) -> Env:
    """An environment without its wrappers."""
    while isinstance(inner := getattr(env, "env", None), Env):
        env = inner
    return env


def wrappers_of(env: Env) -> list[dict[str, Any]]:
    """The wrappers of an environment, the innermost first: ``name`` and arguments, as JSON data."""
    found: list[dict[str, Any]] = []
    while isinstance(inner := getattr(env, "env", None), Env):
        found.insert(0, _description(env))
        env = inner
    return found


def _description(env: Env) -> dict[str, Any]:
    return {"name": type(env).__name__, **(getattr(env, "arguments", None) or {})}


def in_words(wrappers: Iterable[Mapping[str, Any]]) -> str:
    """Wrappers in a line: ``DropFeedback(kinds=['hint'], probability=0.5)``."""
    parts = []
    for wrapper in wrappers:
        arguments = ", ".join(f"{k}={v!r}" for k, v in wrapper.items() if k != "name")
        parts.append(f"{wrapper.get('name')}({arguments})")
    return ", ".join(parts)


def _data(value: Any) -> Any:
    """A value as JSON data, the same whenever it is made so."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _data(v) for k, v in value.items()}
    if isinstance(value, Set):
        return sorted((_data(v) for v in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_data(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return _data(value.item())  # of numpy
    # Not its repr, which may hold an address.
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"
