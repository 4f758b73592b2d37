"""An environment as other libraries take it: a reward function, and a data set.

Both are TRL's: ``GRPOTrainer(reward_funcs=env.as_reward_func(), train_dataset=env.to_dataset())``.
Feedback does not come through this door; :func:`rlrf.rollout` has it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rlrf._async import run_sync
from rlrf.errors import (
    InfraError,
    MissingDependencyError,
    OutcomeError,
    UnavailableError,
    UsageError,
    brief,
    check_whole,
    describe,
)
from rlrf.messages import Action
from rlrf.outcome import Outcome
from rlrf.script import is_action
from rlrf.task import Task

log = logging.getLogger("rlrf.interop")

Grade = Callable[[str, Action], Awaitable[Outcome]]
RewardFunc = Callable[..., list[float | None]]


def reward_func(
    grade: Grade, name: str, *, max_concurrency: int, deadline_s: float | None, retries: int
) -> RewardFunc:
    """See :meth:`rlrf.Env.as_reward_func`.

    Args:
        grade: grades a completion of the task of an id.
        name: what the function is called; trainers log rewards under it.
        max_concurrency: grades under way at once.
        deadline_s: seconds for each; None for no limit.
        retries: further tries where the machinery failed.
    """
    check_whole("max_concurrency", max_concurrency)
    check_whole("retries", retries, least=0)

    async def score(task_id: str, completion: Action) -> float | None:
        for attempt in range(retries + 1):
            try:
                outcome = await asyncio.wait_for(grade(task_id, completion), deadline_s)
                return outcome.reward
            except UnavailableError:
                raise
            except Exception as error:
                if isinstance(error, UsageError) and not isinstance(error, OutcomeError):
                    raise
                log.warning("task %s is left without a reward: %s", task_id, describe(error))
                if not isinstance(error, InfraError) or not error.retryable:
                    break
                if attempt < retries:
                    log.info("task %s is tried again", task_id)
        return None

    async def all_of(ids: Sequence[str], answers: Sequence[Action]) -> list[float | None]:
        slots = asyncio.Semaphore(max_concurrency)

        async def one(task_id: str, answer: Action) -> float | None:
            async with slots:
                return await score(task_id, answer)

        return list(await asyncio.gather(*map(one, ids, answers)))

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        task_id: Sequence[str] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if task_id is None:
            raise UsageError(
                "the reward function was given no column task_id, so it cannot tell the tasks; "
                "train on env.to_dataset(), which has it"
            )
        if not len(prompts) == len(completions) == len(task_id):
            raise UsageError(
                f"there are {len(prompts)} prompts, {len(completions)} completions and "
                f"{len(task_id)} task ids; give one of each"
            )
        return run_sync(all_of(task_id, [_answer(completion) for completion in completions]))

    reward.__name__ = name
    return reward


def _answer(completion: Any) -> Action:
    """The action of a completion: a text, a message, or the last of several of the assistant's."""
    if is_action(completion):
        return completion  # type: ignore[no-any-return]  # whoever hears it says what is wrong
    for message in reversed(completion if isinstance(completion, Sequence) else ()):
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            return message
    raise UsageError(
        f"a completion is {brief(completion)}; it must be a text, or chat messages with one of the "
        "assistant's"
    )


def to_dataset(tasks: Sequence[Task]) -> Any:
    """See :meth:`rlrf.Env.to_dataset`."""
    try:
        from datasets import Dataset  # type: ignore[import-not-found, unused-ignore]  # may be
    except ImportError as error:
        raise MissingDependencyError("env.to_dataset()", "datasets", "") from error
    keys = {tuple(task.metadata) for task in tasks}
    alike = len(keys) == 1 and keys != {()}
    rows = [
        {
            "prompt": [dict(message) for message in task.messages],
            "task_id": task.id,
            "metadata": dict(task.metadata) if alike else _text(task.metadata),
        }
        for task in tasks
    ]
    try:
        return Dataset.from_list(rows)
    except (TypeError, ValueError):  # of pyarrow: the values of one key have several types
        texts = [{**row, "metadata": _text(t.metadata)} for row, t in zip(rows, tasks, strict=True)]
        return Dataset.from_list(texts)


def _text(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), default=str)
