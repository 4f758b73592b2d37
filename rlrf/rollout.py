"""Collecting rollouts: an environment, a policy, groups, and nothing lost.

What holds for every rollout that comes back:

- its token ids are the sampler's; environment turns are appended, nothing is rendered twice;
- its reward is what the *policy* caused, or it is unscored and :attr:`Rollout.failure` says why;
- its feedback is there for every step, the last one included;
- a stuck environment costs that rollout its own deadline and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlrf import progress
from rlrf._async import run_sync
from rlrf._batcher import Batcher, mix
from rlrf._clock import Clock, watchdog
from rlrf.env import Env, Episode, StepResult, Task
from rlrf.errors import (
    InfraError,
    MissingDependencyError,
    OutcomeError,
    PromptError,
    PromptTooLongError,
    UnavailableError,
    UsageError,
    describe,
)
from rlrf.feedback import Feedback, span_to_tokens
from rlrf.messages import Message, Messages
from rlrf.policy import Completion, Policy, Prompt, SamplingParams, as_policy

log = logging.getLogger("rlrf.rollout")


@dataclass(frozen=True)
class Rollout:
    """One episode, as a trainer needs it.

    Attributes:
        task_id: the task.
        group_id: rollouts of equal ``group_id`` are samples of one task in one batch.
        prompt_ids: ids the first completion continues.
        completion_ids: everything after that: sampled turns and, between them, what the
            environment said.
        completion_mask: 1 where the policy sampled the token, 0 where the environment put it.
        logprobs: sampled log-probability of each completion token (0.0 where the mask is 0), or
            empty when the policy does not report them.
        messages: the whole chat, replies included; what the policy thought before a reply is in
            that message's ``reasoning_content``, unless the environment reads it.
        reward: sum of the step rewards; None when unscored.
        feedback: one :class:`Feedback` per step, the last step included.
        metrics: the environment's named numbers (of the last step that has each).
        finish_reason: ``terminated``, ``truncated``, ``length`` (the last reply was cut off) or
            ``failed``.
        failure: why it is unscored: ``kind: message``; None when scored.
        spans: per step, the completion-token range ``(start, end)`` of each segment's blamed
            characters, or None where it blames none.
        solved: whether the reward reached the environment's success threshold.
        sample: which sample of its group it is, from 0.
    """

    task_id: str
    group_id: str
    prompt_ids: tuple[int, ...] = ()
    completion_ids: tuple[int, ...] = ()
    completion_mask: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    messages: Messages = ()
    reward: float | None = None
    feedback: tuple[Feedback, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    finish_reason: str = "terminated"
    failure: str | None = None
    spans: tuple[tuple[tuple[int, int] | None, ...], ...] = ()
    solved: bool = False
    sample: int = 0

    @property
    def scored(self) -> bool:
        """Whether :attr:`reward` is there; no trainer may read an unscored rollout as 0."""
        return self.reward is not None

    @property
    def text(self) -> str:
        """The last reply of the policy: its answer, without the reasoning."""
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                return message["content"] or ""
        return ""

    @property
    def last_feedback(self) -> Feedback:
        """Feedback of the last step that had something to say; empty if none had."""
        for feedback in reversed(self.feedback):
            if feedback:
                return feedback
        return Feedback()

    def to_dict(self) -> dict[str, Any]:
        """The rollout as JSON data; :meth:`from_dict` reads it back."""
        return {
            "task_id": self.task_id,
            "group_id": self.group_id,
            "prompt_ids": list(self.prompt_ids),
            "completion_ids": list(self.completion_ids),
            "completion_mask": list(self.completion_mask),
            "logprobs": list(self.logprobs),
            "messages": [dict(m) for m in self.messages],
            "reward": self.reward,
            "feedback": [f.to_dicts() for f in self.feedback],
            "metrics": dict(self.metrics),
            "finish_reason": self.finish_reason,
            "failure": self.failure,
            "spans": [[list(s) if s else None for s in step] for step in self.spans],
            "solved": self.solved,
            "sample": self.sample,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rollout:
        """The rollout :meth:`to_dict` wrote."""
        fields = dict(data)
        for name in ("prompt_ids", "completion_ids", "completion_mask", "logprobs", "messages"):
            fields[name] = tuple(fields[name])
        fields["feedback"] = tuple(Feedback.from_dicts(f) for f in fields["feedback"])
        fields["spans"] = tuple(
            tuple(tuple(s) if s else None for s in step) for step in fields["spans"]
        )
        return cls(**fields)


async def arollout(
    env: Env,
    policy: Policy,
    tasks: Iterable[str | Task] | None = None,
    *,
    group_size: int = 1,
    max_concurrency: int = 64,
    params: SamplingParams | None = None,
    deadline_s: float | None = 120.0,
    retries: int = 2,
    seed: int | Sequence[int] = 0,
    on_rollout: Callable[[Rollout], None] | None = None,
    done: Iterable[Rollout] = (),
) -> list[Rollout]:
    """Async twin of :func:`rollout`."""
    if group_size < 1 or max_concurrency < 1 or retries < 0:
        raise UsageError(
            f"group_size={group_size}, max_concurrency={max_concurrency}, retries={retries}: "
            "the first two must be >= 1, retries >= 0"
        )
    if min([seed] if isinstance(seed, int) else seed, default=0) < 0:
        raise UsageError(f"seed is {seed}; it must be >= 0")
    chosen: Sequence[str | Task] = env.tasks() if tasks is None else list(tasks)
    if not len(chosen):
        raise UsageError("rollout() was given no tasks; pass ids, Tasks, or None for the split")
    found = [env._find_task(task) for task in chosen]
    if not isinstance(seed, int) and len(seed) != len(found):
        raise UsageError(f"there are {len(seed)} seeds for {len(found)} tasks; give one for each")
    groups = [f"{i}:{task.id}" for i, task in enumerate(found)]
    wanted = {(group, k) for group in groups for k in range(group_size)}
    kept = {(r.group_id, r.sample): r for r in done if r.scored}
    kept = {key: r for key, r in kept.items() if key in wanted}
    unfinished = len(wanted) - len(kept)
    params = params or SamplingParams()
    of_calls = seed if isinstance(seed, int) else seed[0]
    policy = as_policy(policy)
    batcher = Batcher(policy, params, of_calls, max_concurrency, unfinished)
    slots = asyncio.Semaphore(max_concurrency)
    collector = _Collector(env, batcher, deadline_s, retries)
    collector.check_tools(policy)

    async def one(position: int, task: Task, sample: int) -> Rollout:
        number, group = position * group_size + sample, groups[position]
        known = kept.get((group, sample))
        if known is not None:
            return known
        async with slots:
            own, k = (seed, number) if isinstance(seed, int) else (seed[position], sample)
            of_samples = mix(own, k) if params.seed is None else mix(params.seed, number)
            rollout = await collector.collect(task, group, number, own + k, of_samples)
        rollout = replace(rollout, sample=sample)
        batcher.one_less()
        shown.advance()
        if on_rollout is not None:
            on_rollout(rollout)
        return rollout

    shown = progress.begin("", len(wanted), "rollouts", done=len(kept))
    jobs = [
        asyncio.ensure_future(one(i, task, k))
        for i, task in enumerate(found)
        for k in range(group_size)
    ]
    try:
        with watchdog():
            rollouts = list(await asyncio.gather(*jobs))
        collector.check_refusals(len({task.id for task in found}))
        return rollouts
    except BaseException:
        for job in jobs:
            job.cancel()
        batcher.stop()
        await asyncio.gather(*jobs, return_exceptions=True)
        raise
    finally:
        progress.end(shown)


def rollout(
    env: Env,
    policy: Policy,
    tasks: Iterable[str | Task] | None = None,
    *,
    group_size: int = 1,
    max_concurrency: int = 64,
    params: SamplingParams | None = None,
    deadline_s: float | None = 120.0,
    retries: int = 2,
    seed: int | Sequence[int] = 0,
    on_rollout: Callable[[Rollout], None] | None = None,
    done: Iterable[Rollout] = (),
) -> list[Rollout]:
    """Run ``group_size`` episodes of every task.

    Args:
        env: the environment; its episodes run concurrently on the one object.
        policy: what replies.
        tasks: ids or tasks; None for the whole split. A task given twice makes two groups.
        group_size: samples per task.
        max_concurrency: episodes under way at once.
        params: how to sample.
        deadline_s: seconds of *environment* time an episode may use (time spent waiting for the
            policy does not count); None for no limit. A rollout that runs into it is unscored.
        retries: fresh attempts after an infrastructure failure, before a rollout is unscored.
        seed: seeds sampling and episodes; one for all, or one per task, whose rollouts then do not
            depend on which others there are.
        on_rollout: called with each rollout as it finishes, e.g. for progress.
        done: rollouts of an earlier call with the same tasks, ``group_size`` and ``seed``, which
            was cut off: those that are scored are returned as they are and not run again.

    Returns:
        ``len(tasks) * group_size`` rollouts, in the order of the tasks, samples of a task
        together. None is ever missing: what failed is there, unscored.

    Raises:
        UsageError: no tasks, a seed below 0, or the policy or environment was used wrongly.
        UnknownIdError: no task has a given id.
    """
    return run_sync(
        arollout(
            env,
            policy,
            tasks,
            group_size=group_size,
            max_concurrency=max_concurrency,
            params=params,
            deadline_s=deadline_s,
            retries=retries,
            seed=seed,
            on_rollout=on_rollout,
            done=done,
        )
    )


_proven: weakref.WeakSet[Env] = weakref.WeakSet()
"""Environments that have scored a rollout: what one refuses after that is the one task's."""

_STRIKES = 3


class _Collector:
    """Runs one episode to its end, again after infrastructure failures."""

    def __init__(self, env: Env, batcher: Batcher, deadline_s: float | None, retries: int) -> None:
        self.env, self.batcher = env, batcher
        self.deadline_s, self.retries = deadline_s, retries
        # An environment that can only do so much at once lets the others wait here, off the
        # clock: slow attempts must not use up the deadline of those queued behind them.
        self.turn: contextlib.AbstractAsyncContextManager[Any] = (
            contextlib.nullcontext()
            if env.concurrency is None
            else asyncio.Semaphore(env.concurrency)
        )
        self.refused: dict[str, tuple[UsageError, str]] = {}  # per task: what, and in which words
        self.anything_else = False  # whether a rollout ended otherwise than by being refused

    def check_tools(self, policy: Policy) -> None:
        """Refuse a policy that cannot call the environment's tools, if it says so."""
        check = getattr(policy, "check_tools", None)
        if check is None:
            return
        try:
            tools = _tools(self.env)
        except Exception:
            return  # each rollout says so
        if tools:
            check(tools)

    async def collect(
        self, task: Task, group_id: str, number: int, seed: int, sample_seed: int
    ) -> Rollout:
        failure = ""
        for attempt in range(self.retries + 1):
            draft = _Draft(task.id, group_id)
            try:
                rollout = await self._run(task, number, seed, sample_seed, draft, attempt > 0)
            except UnavailableError:
                raise
            except InfraError as error:
                failure = f"{error.kind}: {describe(error).partition(': ')[2]}"
                if not error.retryable or attempt == self.retries:
                    break
                log.info("retrying %s after %s", task.id, failure)
            except PromptError as error:
                kind = (
                    "prompt_too_long" if isinstance(error, PromptTooLongError) else "prompt_refused"
                )
                failure = f"{kind}: {describe(error).partition(': ')[2]}"
                warnings.warn(f"task {task.id!r} is left unscored: {failure}", stacklevel=2)
                if not isinstance(error, PromptTooLongError):
                    self._note_refusal(task, error)
                    return draft.failed(failure)
                break
            except _PolicyMisuse as misuse:
                raise misuse.error from None
            except MissingDependencyError:
                raise
            except Exception as error:
                # A bug in the environment: this rollout's, not the batch's.
                failure = f"env_error: {describe(error)}"
                short = len(failure) < 2000  # a traceback would print it whole
                log.warning("task %s: the environment raised", task.id, exc_info=short)
                if isinstance(error, UsageError) and not isinstance(error, OutcomeError):
                    self._note_refusal(task, error)
                    return draft.failed(failure)
                break
            else:
                self.anything_else = True
                if rollout.scored:
                    _proven.add(self.env)
                return rollout
        self.anything_else = True
        return draft.failed(failure)

    def _note_refusal(self, task: Task, error: UsageError) -> None:
        """A task was refused. Is it this task's fault, or the caller's and so every task's?

        Raises:
            UsageError: the latter: the same words for several tasks, and no task that works.
        """
        words = describe(error)
        self.refused[task.id] = error, words
        if self.anything_else or self.env in _proven:
            return
        if sum(said == words for _, said in self.refused.values()) >= _STRIKES:
            raise error

    def check_refusals(self, tasks: int) -> None:
        """See that not every task was refused: then the caller has to hear of it.

        Raises:
            UsageError: every one was.
        """
        if not self.anything_else and self.env not in _proven and len(self.refused) == tasks > 0:
            raise next(iter(self.refused.values()))[0]

    async def _run(
        self, task: Task, number: int, seed: int, sample_seed: int, draft: _Draft, alone: bool
    ) -> Rollout:
        clock = Clock(self.deadline_s, task.id)
        episode: Episode = await clock.run(self.env.aepisode(task, seed=seed))
        draft.messages = list(episode.messages)
        new: Messages = ()
        while not episode.done:
            prompt = Prompt(
                tuple(draft.messages),
                draft.prefix_ids(),
                new,
                _tools(self.env),
                draft.group_id,
                seed=mix(sample_seed, len(draft.steps)),
            )
            try:
                completion = await self.batcher.generate(prompt, number, alone)
            except PromptTooLongError:
                if not draft.steps:
                    raise
                return draft.out_of_context(self.env)
            except PromptError:
                raise
            except UsageError as error:
                raise _PolicyMisuse(error) from error
            if completion.finish_reason == "abort":  # the engine gave up, not the policy
                raise InfraError("the engine aborted the completion", kind="policy_aborted")
            whole = self.env.reads_reasoning
            said = completion.whole_message if whole else completion.assistant_message
            draft.add_completion(completion, said)
            async with self.turn:
                result: StepResult = await clock.run(episode.astep(said))
            draft.add_step(result, completion.offsets if whole else completion.content_offsets)
            new = result.observation
        return draft.scored(self.env)


class _PolicyMisuse(Exception):
    """The policy was used wrongly: the same for every rollout, so it is said at once."""

    def __init__(self, error: UsageError) -> None:
        self.error = error


def _tools(env: Env) -> tuple[dict[str, Any], ...]:
    tools = []
    for tool in env.tools or ():
        if not isinstance(tool, Mapping):
            raise OutcomeError(
                f"{type(env).__name__}.tools has {tool!r}; each tool is a mapping, as on the "
                "OpenAI wire"
            )
        tools.append(dict(tool))
    return tuple(tools)


class _Draft:
    """A rollout in the making."""

    def __init__(self, task_id: str, group_id: str) -> None:
        self.task_id, self.group_id = task_id, group_id
        self.messages: list[Message] = []
        self.prompt_ids: tuple[int, ...] = ()
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.logprobs: list[float] = []
        self.has_logprobs = True
        self.steps: list[StepResult] = []
        self.spans: list[tuple[tuple[int, int] | None, ...]] = []
        self.finish_reason = "terminated"
        self._turn_start = 0

    def prefix_ids(self) -> tuple[int, ...] | None:
        return (*self.prompt_ids, *self.ids) if self.steps else None

    def add_completion(self, completion: Completion, said: Message) -> None:
        before = self.prefix_ids()
        if before is None:
            self.prompt_ids = tuple(map(int, completion.prompt_ids))
        else:
            if tuple(completion.prompt_ids[: len(before)]) != before:
                raise _PolicyMisuse(
                    UsageError(
                        "the policy rewrote earlier tokens: Completion.prompt_ids must start with "
                        "Prompt.prefix_ids, or training would see tokens that were never sampled"
                    )
                )
            self._append(completion.prompt_ids[len(before) :], 0, ())
        self._turn_start = len(self.ids)
        self._append(completion.token_ids, 1, completion.logprobs)
        self.messages.append(said)
        self.finish_reason = completion.finish_reason

    def _append(self, ids: Sequence[int], mask: int, logprobs: Sequence[float]) -> None:
        self.ids += map(int, ids)
        self.mask += [mask] * len(ids)
        if mask and len(logprobs) != len(ids):
            self.has_logprobs = False
        self.logprobs += map(float, logprobs) if mask and self.has_logprobs else [0.0] * len(ids)

    def add_step(self, result: StepResult, offsets: Sequence[tuple[int, int]]) -> None:
        """``offsets``: characters of what the environment was told that each token stands for."""
        self.steps.append(result)
        self.messages += result.observation
        spans: list[tuple[int, int] | None] = []
        for segment in result.info["feedback"]:
            if segment.span is None or not offsets:
                spans.append(None)
                continue
            start, end = span_to_tokens(segment.span, offsets)
            spans.append((self._turn_start + start, self._turn_start + end))
        self.spans.append(tuple(spans))

    def scored(self, env: Env) -> Rollout:
        reward = sum(s.reward for s in self.steps)
        if not math.isfinite(reward):
            raise OutcomeError(f"the rewards of the steps sum to {reward}; keep them finite")
        metrics: dict[str, float] = {}
        for step in self.steps:
            metrics.update(step.info["metrics"])
        if self.finish_reason != "length":
            self.finish_reason = "truncated" if self.steps[-1].truncated else "terminated"
        return replace(
            self._rollout(),
            reward=reward,
            metrics=metrics,
            solved=reward >= env.success_threshold,
        )

    def out_of_context(self, env: Env) -> Rollout:
        """The policy filled its own context: that is its doing, so it is scored, and told."""
        told = Feedback.of(
            "truncated_attempt", "The conversation grew beyond the context; be briefer."
        ).at_level(env.feedback_level)
        rollout = self.scored(env)
        return replace(
            rollout,
            feedback=(*rollout.feedback[:-1], rollout.feedback[-1] + told),
            spans=(*rollout.spans[:-1], rollout.spans[-1] + (None,) * len(told)),
            finish_reason="truncated",
        )

    def failed(self, failure: str) -> Rollout:
        return replace(self._rollout(), finish_reason="failed", failure=failure)

    def _rollout(self) -> Rollout:
        return Rollout(
            task_id=self.task_id,
            group_id=self.group_id,
            prompt_ids=self.prompt_ids,
            completion_ids=tuple(self.ids),
            completion_mask=tuple(self.mask),
            logprobs=tuple(self.logprobs) if self.has_logprobs else (),
            messages=tuple(self.messages),
            feedback=tuple(s.info["feedback"] for s in self.steps),
            finish_reason=self.finish_reason,
            spans=tuple(self.spans),
        )
