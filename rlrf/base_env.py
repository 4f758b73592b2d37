"""What every environment is: a Gymnasium face over async, re-entrant episodes.

An :class:`Env` holds what is shared (tasks, sandboxes, judges); an :class:`Episode` holds what is
not. The Gymnasium methods (``reset``, ``step``) drive one built-in episode; the rollout collector
opens as many as it likes on the same object. Every sync method has an async twin.

:mod:`rlrf.env` has what authors subclass.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
import numpy as np

from rlrf import interop
from rlrf._async import call_hook, run_sync
from rlrf.errors import (
    UnknownIdError,
    UsageError,
    brief,
    check_takes,
    check_whole,
)
from rlrf.feedback import Feedback, Level, Segment
from rlrf.messages import (
    Action,
    Message,
    Messages,
    action_message,
    answer_range,
    spoken,
    thought_only,
)
from rlrf.outcome import StepResult, Turn
from rlrf.script import Script
from rlrf.spaces import Chat
from rlrf.task import EmptySplitError, Task, TaskSequence

if TYPE_CHECKING:
    from rlrf.rollout import Rollout


class Episode:
    """One run of one task; made by :meth:`Env.aepisode`.

    Attributes:
        task: the task, hidden data stripped.
        messages: the opening messages.
        done: whether the episode has ended.
    """

    def __init__(self, env: Env, task: Task, state: Any, rng: np.random.Generator) -> None:
        self._env, self._task, self._state, self._rng = env, task, state, rng
        self.task = task.public()
        self.messages: Messages = tuple(_copy(m) for m in task.messages)
        self.done = False

    async def astep(self, action: Action) -> StepResult:
        """Act once.

        Raises:
            UsageError: the episode has ended, or the action is no chat action.
            InfraError: the machinery failed; the step has no reward.
        """
        if self.done:
            raise UsageError(f"the episode of task {self.task.id!r} has ended; call reset() first")
        spoken(action)  # rejects what is no action, before anything runs
        turn = await self._env._advance(self._task, self._state, action, self._rng)
        self.done = turn.terminated or turn.truncated
        return StepResult(
            tuple(_copy(m) for m in turn.messages),
            turn.reward,
            turn.terminated,
            turn.truncated,
            self._env._info(self._task, self._env._shown(turn.feedback), turn.metrics),
        )


def _copy(message: Message) -> Message:
    # Callers append to and edit what they get; the task must not change under them.
    return message.copy()


class Env(gymnasium.Env[Any, Any], abc.ABC):
    """Base of all environments. Subclass :class:`SingleTurnEnv` or :class:`MultiTurnEnv`.

    Args:
        feedback: how much feedback to show, a :class:`rlrf.Level` or its name; None for the
            class's default.
        split: the split that :meth:`reset` draws from.
        tokenizer: when given, every step's info also holds ``"feedback_tokens"``.
        max_feedback_tokens: budget of ``"feedback_tokens"``.

    Attributes:
        splits: the names that ``load_tasks`` is asked for. Like those below it is an author's to
            set on the class.
        eval_split: the one that ``rlrf eval`` takes unless told otherwise.
        overlapping_splits: whether tasks stand in several splits on purpose.
        max_tokens: what :func:`rlrf.evaluate` and ``rlrf eval`` let a reply have unless told
            otherwise.
        default_feedback_level: the level where ``feedback`` is None.
        reward_range: lowest and highest reward of a task.
        success_threshold: a reward at or above it counts as solved.
        concurrency: steps it can work on at once; the collector lets further ones wait without
            charging their deadline. None for no limit.
        tools: schemas of the tools a policy may call, as on the OpenAI wire.
        reads_reasoning: whether the hooks are given a reply whole. As a rule they get the answer:
            what a policy thinks before it is cut off and, in an action that is a message, stands in
            ``reasoning_content``. A reply that ends within its reasoning is an empty answer and
            gets a ``truncated_attempt`` beside its feedback.
        metadata: Gymnasium's own.
        render_mode: Gymnasium's own; there is nothing to render.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # Gymnasium's own attribute
    splits: ClassVar[tuple[str, ...]] = ("train", "eval")
    eval_split: ClassVar[str] = "eval"
    overlapping_splits: bool = False
    max_tokens: ClassVar[int] = 256
    default_feedback_level: ClassVar[str] = "explained"
    reward_range: tuple[float, float] = (0.0, 1.0)
    success_threshold: float = 1.0
    concurrency: int | None = None
    reads_reasoning: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    render_mode: str | None = None

    def __init__(
        self,
        *,
        feedback: Level | str | None = None,
        split: str = "train",
        tokenizer: Any = None,
        max_feedback_tokens: int = 2048,
    ) -> None:
        self.feedback_level = Level.parse(
            self.default_feedback_level if feedback is None else feedback
        )
        if isinstance(self.splits, str):
            raise UsageError(
                f"{type(self).__name__}.splits is {self.splits!r}; it must be a tuple of names, "
                f"e.g. ({self.splits!r},)"
            )
        self.split = self._check_split(split)
        if tokenizer is not None and (
            isinstance(tokenizer, str) or not callable(getattr(tokenizer, "encode", None))
        ):
            raise UsageError(
                f"tokenizer is {brief(tokenizer)}; it must be a tokenizer, with a method encode"
            )
        check_whole("max_feedback_tokens", max_feedback_tokens, least=0)
        self._check_hook("load_tasks", "split")
        self._check_hook("reference_solution", "task")
        self.tokenizer = tokenizer
        self.max_feedback_tokens = max_feedback_tokens
        self.observation_space = Chat("observation")
        self.action_space = Chat("action")
        self._episode: Episode | None = None
        self._task_cache: dict[str, TaskSequence] = {}

    # --- what an author gives -------------------------------------------------------------

    def _check_hook(self, name: str, *arguments: str, of: type | None = None) -> None:
        """See that a hook can be called, and that an author has written it, where ``of`` has not.

        Raises:
            UsageError: it cannot, or he has not.
        """
        where = f"{type(self).__name__}.{name}"
        if of is not None and getattr(type(self), name) is getattr(of, name):
            signature = ", ".join(("self", *arguments))
            raise UsageError(f"{type(self).__name__} must define {name}({signature})")
        check_takes(getattr(self, name), where, *arguments)

    @abc.abstractmethod
    def load_tasks(self, split: str) -> Sequence[Task]:
        """The tasks of ``split``, hidden data included. Called once per split."""

    @abc.abstractmethod
    async def _start(self, task: Task, rng: np.random.Generator) -> Any:
        """The state of a new episode."""

    @abc.abstractmethod
    async def _advance(
        self, task: Task, state: Any, action: Action, rng: np.random.Generator
    ) -> Turn:
        """What the environment answers to ``action``, with feedback at every level."""

    def render_html(self, task: Task, rollout: Rollout) -> str | None:
        """A card about a rollout for ``rlrf report --cards`` and ``rlrf view --cards``, or None.

        Authors override it, to draw a board or a table; it may be ``async def``. Put what the
        policy or a program said through :func:`html.escape`. The card stands in a frame without
        scripts, network and links. The task is whole, hidden data included.
        """
        return None

    def secrets(self, task: Task) -> Any:
        """What the leak checks look for where a policy may read it: ``task.hidden``.

        Override it where that is not what must stay hidden: values that are loaded later, or ones
        that a prompt gives on purpose (the passage that holds the answer). What says
        ``public: true`` of itself may be shown.
        """
        return task.hidden

    def reference_solution(self, task: Task) -> Script | None:
        """What earns the highest reward, or None if the author has none.

        A text, an assistant message, a sequence of them (one a turn) or a function of the messages
        so far: whatever :class:`rlrf.ScriptedPolicy` plays.
        """
        return None

    # --- tasks ----------------------------------------------------------------------------

    def _check_split(self, split: str) -> str:
        if split not in self.splits:
            raise UsageError(
                f"unknown split {split!r} of {type(self).__name__}; splits are "
                + ", ".join(map(repr, self.splits))
            )
        return split

    def tasks(self, split: str | None = None) -> TaskSequence:
        """The tasks of ``split`` (the environment's own by default), hidden data stripped."""
        full = self._full_tasks(split)
        return TaskSequence(lambda: full._tasks, split=split or self.split)

    def _full_tasks(self, split: str | None = None) -> TaskSequence:
        split = self._check_split(split or self.split)
        if split not in self._task_cache:
            self._task_cache[split] = TaskSequence(lambda: self._load(split), public=False)
        return self._task_cache[split]

    def _load(self, split: str) -> Sequence[Task]:
        try:
            tasks: Any = self.load_tasks(split)
        except KeyError as error:
            if error.args != (split,):
                raise
            tasks = []  # a table of splits that has no such one
        where = f"{type(self).__name__}.load_tasks({split!r})"
        if isinstance(tasks, Iterable) and not isinstance(tasks, (Sequence, Mapping, Set, str)):
            tasks = list(tasks)  # a generator gives its tasks once
        if not isinstance(tasks, Sequence) or isinstance(tasks, (str, bytes)):
            raise UsageError(
                f"{where} returned {brief(tasks)}; it must return the tasks in order, e.g. a list "
                "of rlrf.Task"
            )
        if isinstance(tasks, (list, tuple)):  # another sequence may load them one by one
            for i, task in enumerate(tasks):
                if not isinstance(task, Task):
                    raise UsageError(
                        f"{where}: task {i} is {brief(task)}; it must be a rlrf.Task, e.g. "
                        "Task('my-id', 'the question', hidden='the answer')"
                    )
        if not len(tasks):
            raise EmptySplitError(
                f"{type(self).__name__} has no task in split {split!r}; "
                "check the data source, the filters, or choose another split"
            )
        return tasks

    def _find_task(self, task: str | Task, split: str | None = None) -> Task:
        """The full task of an id: of ``split``, else of whichever has it, our own first."""
        if isinstance(task, Task) and not task._stripped:
            return task
        task_id = task.id if isinstance(task, Task) else task
        if not isinstance(task_id, str):
            raise UsageError(f"a task is given by its id (a string) or as a Task, got {task_id!r}")
        known: list[str] = []
        if split is not None:
            own = [self._check_split(split)]
        else:
            first = task._split if isinstance(task, Task) else None
            own = [s for s in (first, self.split, *self.splits) if s in self.splits]
        for name in dict.fromkeys(own):
            try:
                tasks = self._full_tasks(name)
                found = tasks.get(task_id)
            except EmptySplitError:
                continue
            if found is not None:
                if isinstance(task, Task):  # it may be posed otherwise, replace(task, messages=...)
                    found = replace(found, messages=task.messages, metadata=task.metadata)
                return found
            known = known or tasks.ids()[:2000]
        raise UnknownIdError("task", task_id, known)

    # --- episodes -------------------------------------------------------------------------

    async def aepisode(self, task: str | Task, *, seed: int | None = None) -> Episode:
        """Open an episode of ``task``; any number may run at once.

        Args:
            task: a task or its id.
            seed: seed of the episode's own random generator.
        """
        return await self._open(self._find_task(task), np.random.default_rng(seed))

    async def _open(self, task: Task, rng: np.random.Generator) -> Episode:
        return Episode(self, task, await self._start(task, rng), rng)

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Messages, dict[str, Any]]:
        """Async twin of :meth:`reset`."""
        super().reset(seed=seed)
        self._episode = None  # a reset that fails must not leave the last episode to step on
        options = dict(options or {})
        unknown = set(options) - {"task_id", "split"}
        if unknown:
            raise UsageError(
                f"unknown reset option {sorted(unknown)[0]!r}; options are 'task_id', 'split'"
            )
        if options.get("task_id") is not None:
            task = self._find_task(options["task_id"], options.get("split"))
        else:
            tasks = self._full_tasks(options.get("split"))
            task = tasks[int(self.np_random.integers(len(tasks)))]
        rng = np.random.default_rng(int(self.np_random.integers(2**63)))
        self._episode = await self._open(task, rng)
        return self._episode.messages, self._info(task, Feedback(), {})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Messages, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seeds the choice of the task and the episode.
            options: ``task_id`` picks the task, ``split`` the split to draw from or to find it in.

        Returns:
            The opening chat messages, and an info with ``task_id``, ``feedback`` (empty) and
            ``metrics``.

        Raises:
            UnknownIdError: no task has that id.
            UsageError: an unknown option, or no tasks.
        """
        return run_sync(self.areset(seed=seed, options=options))

    async def astep(self, action: Action) -> StepResult:
        """Async twin of :meth:`step`."""
        if self._episode is None:
            raise UsageError("step() was called before reset()")
        return await self._episode.astep(action)

    def step(self, action: Action) -> StepResult:
        """Act once: ``observation, reward, terminated, truncated, info``.

        ``observation`` holds only the new messages; ``info["feedback"]`` is always there.

        Raises:
            UsageError: before :meth:`reset`, after the end, or no chat action.
            InfraError: the machinery failed; there is no reward.
        """
        return run_sync(self.astep(action))

    def _shown(self, feedback: Feedback) -> Feedback:
        return feedback.at_level(self.feedback_level)

    def _info(self, task: Task, feedback: Feedback, metrics: Mapping[str, float]) -> dict[str, Any]:
        info: dict[str, Any] = {
            "task_id": task.id,
            "feedback": feedback,
            "metrics": dict(metrics),
        }
        if self.tokenizer is not None:
            info["feedback_tokens"] = feedback.tokenize(self.tokenizer, self.max_feedback_tokens)
        return info

    def _heard(self, action: Action) -> Message:
        """An action as the hooks get it."""
        return spoken(action) if self.reads_reasoning else action_message(action)

    def _told(self, feedback: Feedback, action: Action, heard: Message) -> Feedback:
        """Feedback on what was heard, as feedback on the action: spans count in its own text."""
        if self.reads_reasoning:
            return feedback
        if thought_only(heard):
            # What the form of an answer should be is no news to one who never came to it.
            rest = (s for s in feedback if s.kind != "format_error" or s.severity != "error")
            return Feedback((_NO_ANSWER, *rest))
        start, _ = answer_range(action)
        if not start:
            return feedback
        return Feedback(
            s if s.span is None else replace(s, span=(s.span[0] + start, s.span[1] + start))
            for s in feedback
        )

    # --- in other libraries ---------------------------------------------------------------

    def as_reward_func(
        self, *, max_concurrency: int = 64, deadline_s: float | None = 120.0, retries: int = 2
    ) -> Callable[..., list[float | None]]:
        """A reward function as TRL's trainers take it, of a one-shot environment.

        It is called with ``prompts``, ``completions`` (texts, or chat messages) and the columns of
        the data set, of which it needs ``task_id``; see :meth:`to_dataset`. It gives a reward for
        each, or None for what the machinery failed to score: TRL leaves that out.

        Args:
            max_concurrency: completions graded at once.
            deadline_s: seconds that a grade may take; None for no limit.
            retries: further tries where the machinery failed.

        Raises:
            UsageError: the environment takes several turns.
        """
        grade = getattr(self, "agrade", None)
        if grade is None:
            raise UsageError(
                f"a reward function needs a one-shot environment (SingleTurnEnv), got {self!r}; "
                "rlrf.rollout() plays the others"
            )
        return interop.reward_func(
            grade,
            self.spec.id.rpartition("/")[2] if self.spec else type(self).__name__,
            max_concurrency=min(max_concurrency, self.concurrency or max_concurrency),
            deadline_s=deadline_s,
            retries=retries,
        )

    def to_dataset(self, split: str | None = None) -> Any:
        """The tasks of a split as a ``datasets.Dataset``, in TRL's conversational format.

        Its columns are ``prompt`` (chat messages), ``task_id`` and ``metadata``: a mapping where
        that of all tasks has one form, else JSON text. Nothing hidden is in it.

        Args:
            split: the environment's own by default.

        Raises:
            MissingDependencyError: the package ``datasets`` is not installed.
        """
        return interop.to_dataset(self.tasks(split))

    # --- the end --------------------------------------------------------------------------

    def close(self) -> None:
        """Free what the environment holds; may be called twice. Authors extend it."""

    async def aclose(self) -> None:
        """Async twin of :meth:`close`."""
        await call_hook(self.close)

    def __repr__(self) -> str:
        name = self.spec.id if self.spec is not None else type(self).__name__
        return f"<{name} feedback={self.feedback_level.name} split={self.split}>"

    __str__ = __repr__


_NO_ANSWER = Segment(
    "truncated_attempt",
    "There is no answer: the reply ended within its reasoning, or with it. Think less, end the "
    "reasoning, and answer after it.",
    source="rlrf",
    priority=3,
)


def check_is_env(env: Any, what: str) -> None:
    """Refuse what is no environment.

    Raises:
        UsageError: it is none.
    """
    if isinstance(env, Env):
        return
    inner = getattr(env, "unwrapped", None)
    remedy = "give its .unwrapped" if isinstance(inner, Env) else "rlrf.make(id) makes one"
    raise UsageError(f"{what} takes an rlrf.Env, got {brief(env)}; {remedy}")
