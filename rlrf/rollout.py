"""Collecting rollouts: an environment, a policy, groups, and nothing lost.

What holds for every rollout that comes back:

- its token ids are the sampler's; environment turns are appended, nothing is rendered twice;
- its reward is what the *policy* caused, or it is unscored and :attr:`Rollout.failure` says why;
- its feedback is there for every step, the last one included;
- a stuck environment costs that rollout its own deadline and nobody else's.

Why: design/unscored.md, design/token-ids.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlrf import progress
from rlrf._async import lost, run_sync
from rlrf._batcher import Batcher, mix
from rlrf._clock import Clock, tell_of_blocker, watchdog
from rlrf.env import Env, Episode, StepResult, Task, as_tasks, check_is_env
from rlrf.errors import (
    InfraError,
    LoopLostError,
    MissingDependencyError,
    OutcomeError,
    PromptError,
    PromptTooLongError,
    ReturnTypeError,
    UnavailableError,
    UsageError,
    check_whole,
    describe,
)
from rlrf.messages import Messages
from rlrf.policy import Policy, PolicyLike, Prompt, SamplingParams, as_policy
from rlrf.records import Draft, PolicyMisuse, Rollout

__all__ = ["MAX_AT_ONCE", "Rollout", "arollout", "rollout"]

log = logging.getLogger("rlrf.rollout")

MAX_AT_ONCE = 100_000
"""Samples of a task, and episodes under way."""


async def arollout(
    env: Env,
    policy: PolicyLike,
    tasks: str | Task | Iterable[str | Task] | None = None,
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
    """Async twin of :func:`rollout`.

    It runs on the caller's own event loop, which cannot be given up when an ``async def`` hook
    blocks it: nothing goes on until the hook returns, and a watchdog says where it stands. From
    then on the environment's episodes run in threads, and its hooks hold up nobody.
    """
    batch = _Batch(
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
    with batch:
        return await batch.collect()


def rollout(
    env: Env,
    policy: PolicyLike,
    tasks: str | Task | Iterable[str | Task] | None = None,
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
        policy: what replies, or a function ``(messages) -> text or message``.
        tasks: ids or tasks, or one; None for the whole split. A task given twice makes two groups.
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
        UsageError: no tasks, a number out of range, or the policy or environment was used wrongly.
        UnknownIdError: no task has a given id.
    """
    batch = _Batch(
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
    with batch:
        while True:
            try:
                return run_sync(batch.collect())
            except LoopLostError as error:  # what was under way is begun again, on another loop
                log.info("%s", error)


class _Batch:
    """What one call wants, and what there is of it; see :func:`rollout` for the arguments."""

    def __init__(
        self,
        env: Env,
        policy: PolicyLike,
        tasks: str | Task | Iterable[str | Task] | None,
        *,
        group_size: int,
        max_concurrency: int,
        params: SamplingParams | None,
        deadline_s: float | None,
        retries: int,
        seed: int | Sequence[int],
        on_rollout: Callable[[Rollout], None] | None,
        done: Iterable[Rollout],
    ) -> None:
        check_is_env(env, "rollout()")
        check_whole("group_size", group_size, most=MAX_AT_ONCE)
        check_whole("max_concurrency", max_concurrency, most=MAX_AT_ONCE)
        check_whole("retries", retries, least=0)
        if min([seed] if isinstance(seed, int) else seed, default=0) < 0:
            raise UsageError(f"seed is {seed}; it must be >= 0")
        chosen: Sequence[str | Task] = env.tasks() if tasks is None else as_tasks(tasks)
        if not len(chosen):
            raise UsageError("rollout() was given no tasks; pass ids, Tasks, or None for the split")
        self.tasks = [env._find_task(task) for task in chosen]
        if not isinstance(seed, int) and len(seed) != len(self.tasks):
            raise UsageError(
                f"there are {len(seed)} seeds for {len(self.tasks)} tasks; give one for each"
            )
        self.env, self.policy = env, as_policy(policy)
        self.group_size, self.max_concurrency = group_size, max_concurrency
        self.params, self.seed = params or SamplingParams(), seed
        self.deadline_s, self.retries, self.on_rollout = deadline_s, retries, on_rollout
        self.groups = [f"{i}:{task.id}" for i, task in enumerate(self.tasks)]
        self.wanted = [(group, k) for group in self.groups for k in range(group_size)]
        self.refusals, self.mistakes = _Refusals(env), _Refusals(None)
        self.finished: dict[tuple[str, int], Rollout] = {}
        known = set(self.wanted)
        for rollout in done:
            if rollout.scored and (rollout.group_id, rollout.sample) in known:
                self.finished[rollout.group_id, rollout.sample] = rollout
        self.under_way: dict[int, tuple[Clock, Draft]] = {}
        self.blocked: dict[int, Rollout] = {}  # to be reported

    def __enter__(self) -> None:
        self.shown = progress.begin("", len(self.wanted), "rollouts", done=len(self.finished))

    def __exit__(self, *_: object) -> None:
        progress.end(self.shown)

    async def collect(self) -> list[Rollout]:
        """Make what is still missing, on this event loop; again, if the last one was lost."""
        for number, (clock, draft) in self.under_way.items():
            if clock.blocked:
                self.blocked[number] = draft.failed(_failure(clock.error()))
                self.anything_else()
        self.under_way = {}
        tell_of_blocker(self.env)
        batcher = Batcher(
            self.policy,
            self.params,
            self.seed if isinstance(self.seed, int) else self.seed[0],
            self.max_concurrency,
            len(self.wanted) - len(self.finished),
        )
        collector = _Collector(self, batcher)
        collector.check_tools(self.policy)
        slots = asyncio.Semaphore(self.max_concurrency)

        async def one(number: int) -> Rollout:
            key = self.wanted[number]
            known = self.finished.get(key)
            if known is not None:
                return known
            async with slots:
                rollout = self.blocked.get(number) or await collector.collect(number)
            if lost():
                raise asyncio.CancelledError
            rollout = self.finished[key] = replace(rollout, sample=key[1])
            batcher.one_less()
            self.shown.advance()
            if self.on_rollout is not None:
                self.on_rollout(rollout)
            return rollout

        jobs = [asyncio.ensure_future(one(number)) for number in range(len(self.wanted))]
        try:
            with watchdog(self.deadline_s):
                rollouts = list(await asyncio.gather(*jobs))
            for refusals in (self.refusals, self.mistakes):
                refusals.check(len({task.id for task in self.tasks}))
            return rollouts
        except BaseException:
            for job in jobs:
                job.cancel()
            batcher.stop()
            await asyncio.gather(*jobs, return_exceptions=True)
            raise

    def anything_else(self) -> None:
        """A rollout has ended otherwise than by being refused."""
        self.refusals.anything_else = self.mistakes.anything_else = True

    def seeds(self, number: int) -> tuple[int, int]:
        """Of a rollout's episode, and of what is sampled for it."""
        position, k = divmod(number, self.group_size)
        own, k = (self.seed, number) if isinstance(self.seed, int) else (self.seed[position], k)
        sampling = self.params.seed
        return own + k, mix(own, k) if sampling is None else mix(sampling, number)


_proven: weakref.WeakSet[Env] = weakref.WeakSet()
"""Environments that have scored a rollout: what one refuses after that is the one task's."""

_STRIKES = 3


class _Refusals:
    """The tasks that were refused with a UsageError: their own fault, or the caller's?

    Args:
        env: who refused them; None for the policy.
    """

    def __init__(self, env: Env | None) -> None:
        self.env = env
        self.refused: dict[str, tuple[UsageError, str]] = {}  # per task: what, and in which words
        self.anything_else = False  # whether a rollout ended otherwise than by being refused

    def note(self, task: Task, error: UsageError) -> None:
        """A task was refused. Is it this task's fault, or the caller's and so every task's?

        Raises:
            UsageError: the latter: the same words for several tasks, and no task that works.
        """
        words = describe(error)
        self.refused[task.id] = error, words
        if self.anything_else or self.env in _proven:  # None never is
            return
        if sum(said == words for _, said in self.refused.values()) >= _STRIKES:
            raise error

    def check(self, tasks: int) -> None:
        """See that not every task was refused: then the caller has to hear of it.

        Raises:
            UsageError: every one was.
        """
        if not self.anything_else and self.env not in _proven and len(self.refused) == tasks > 0:
            raise next(iter(self.refused.values()))[0]


class _Collector:
    """Runs one episode to its end, again after infrastructure failures."""

    def __init__(self, batch: _Batch, batcher: Batcher) -> None:
        self.batch, self.env, self.batcher = batch, batch.env, batcher
        self.refusals, self.under_way = batch.refusals, batch.under_way
        # An environment that can only do so much at once lets the others wait here, off the
        # clock: slow attempts must not use up the deadline of those queued behind them.
        self.turn: contextlib.AbstractAsyncContextManager[Any] = (
            contextlib.nullcontext()
            if self.env.concurrency is None
            else asyncio.Semaphore(self.env.concurrency)
        )

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

    async def collect(self, number: int) -> Rollout:
        position = number // self.batch.group_size
        task, failure = self.batch.tasks[position], ""
        for attempt in range(self.batch.retries + 1):
            draft = Draft(task.id, self.batch.groups[position])
            try:
                with Clock(self.batch.deadline_s, task.id, self.env) as clock:
                    self.under_way[number] = clock, draft
                    rollout = await self._run(task, number, draft, clock, attempt > 0)
            except UnavailableError:
                raise
            except InfraError as error:
                failure = _failure(error)
                if not error.retryable or attempt == self.batch.retries:
                    break
                log.info("retrying %s after %s", task.id, failure)
            except PromptError as error:
                kind = (
                    "prompt_too_long" if isinstance(error, PromptTooLongError) else "prompt_refused"
                )
                failure = f"{kind}: {describe(error).partition(': ')[2]}"
                warnings.warn(f"task {task.id!r} is left unscored: {failure}", stacklevel=2)
                if not isinstance(error, PromptTooLongError):
                    self.refusals.note(task, error)
                    return draft.failed(failure)
                break
            except PolicyMisuse as misuse:
                if isinstance(misuse.error, ReturnTypeError):
                    self.batch.mistakes.note(task, misuse.error)
                    return draft.failed(f"policy_error: {misuse.error}")
                raise misuse.error from None
            except MissingDependencyError:
                raise
            except Exception as error:
                # A bug in the environment: this rollout's, not the batch's.
                failure = f"env_error: {describe(error)}"
                short = len(failure) < 2000  # a traceback would print it whole
                log.warning("task %s: the environment raised", task.id, exc_info=short)
                if isinstance(error, UsageError) and not isinstance(error, OutcomeError):
                    self.refusals.note(task, error)
                    return draft.failed(failure)
                break
            else:
                self.batch.anything_else()
                if rollout.scored:
                    _proven.add(self.env)
                return rollout
        self.batch.anything_else()
        return draft.failed(failure)

    async def _run(
        self, task: Task, number: int, draft: Draft, clock: Clock, alone: bool
    ) -> Rollout:
        seed, sample_seed = self.batch.seeds(number)
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
                turn=len(draft.steps),
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
                raise PolicyMisuse(error) from error
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


def _failure(error: InfraError) -> str:
    return f"{error.kind}: {describe(error).partition(': ')[2]}"


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
