"""Gathering the prompts of concurrent episodes into calls of a policy."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from dataclasses import replace
from typing import Any

from rlrf._async import Held, Holder, call_hook, call_in_turn
from rlrf.errors import (
    InfraError,
    PromptError,
    RlrfError,
    UnavailableError,
    UsageError,
    describe,
)
from rlrf.policy import Completion, Policy, Prompt, SamplingParams, check_completion


class Batcher:
    """Gathers the prompts of concurrent episodes into calls of ``policy.generate``.

    A local policy (one with ``max_batch_size``) gets one call at a time, as full as it can be: a
    call starts when every episode that may be under way waits for a reply, or a batch is full.
    Only when an environment keeps the others waiting longer than ``linger_s`` does a call start
    without it. Prompts are taken in the order of their rollouts, not of their arrival. So for
    environments that answer fast the batches depend on the seed alone; the samples do so always
    where the policy heeds :attr:`Prompt.seed`, but for the rounding of other batches.

    Args:
        policy: what replies.
        params: how to sample; each call gets a seed of its own.
        seed: of the calls, where ``params`` has none; prompts have their own.
        concurrency: episodes under way at once.
        unfinished: episodes still to be finished, begun or not; :meth:`one_less` counts down.
    """

    linger_s = 0.2
    most_in_a_row = 7
    """Calls of one batch that may fail in a row: up to three bad prompts are always found."""

    def __init__(
        self, policy: Policy, params: SamplingParams, seed: int, concurrency: int, unfinished: int
    ) -> None:
        self.policy, self.params = policy, params
        self.seed = params.seed if params.seed is not None else seed
        self.limit: int | None = getattr(policy, "max_batch_size", None)
        self.concurrency, self.unfinished = concurrency, unfinished
        self.waiting: list[tuple[bool, int, Prompt, asyncio.Future[Completion]]] = []
        self.calls = 0
        self.holder = Holder(f"generate() of {type(policy).__name__}")
        self.busy = False
        self.timer: asyncio.TimerHandle | None = None
        self.work: set[asyncio.Task[None]] = set()

    def one_less(self) -> None:
        """An episode has finished."""
        self.unfinished -= 1
        self._consider()

    def stop(self) -> None:
        """Start no further call and cancel the one under way."""
        self.busy = True
        for task in self.work:
            task.cancel()
        self._disarm()

    async def generate(self, prompt: Prompt, number: int, alone: bool = False) -> Completion:
        """The reply to ``prompt`` of the rollout ``number``.

        Args:
            prompt: what to complete.
            number: the rollout's place among all.
            alone: in a call of its own: it has failed before, and may be why others failed.
        """
        if self.limit is None:
            (completion,) = await self._call([prompt], number)
        else:
            future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
            self.waiting.append((alone, number, prompt, future))
            self._consider()
            completion = await future
        check_completion(completion)
        return completion

    def _consider(self, late: bool = False) -> None:
        if late:
            self.timer = None
        if self.limit is None or self.busy or not self.waiting:
            return
        enough = min(self.limit, self.concurrency, self.unfinished)
        if len(self.waiting) < enough and not late:
            if self.timer is None:
                loop = asyncio.get_running_loop()
                self.timer = loop.call_later(self.linger_s, self._consider, True)
            return
        self._disarm()
        self.waiting.sort(key=lambda w: w[:2])  # those that go alone last
        together = sum(not alone for alone, *_ in self.waiting[: self.limit])
        taken = together or 1
        batch = [(prompt, future) for *_, prompt, future in self.waiting[:taken]]
        self.waiting = self.waiting[taken:]
        self.busy = True
        task = asyncio.ensure_future(self._serve(batch))
        self.work.add(task)
        task.add_done_callback(self.work.discard)

    def _disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    async def _serve(self, batch: list[tuple[Prompt, asyncio.Future[Completion]]]) -> None:
        await self._deliver(batch)
        self.busy = False
        self._consider()

    async def _deliver(self, batch: list[tuple[Prompt, asyncio.Future[Completion]]]) -> None:
        """Reply to a batch. One that fails is halved: a prompt may be at fault, or the size.

        Level by level, so that what can be completed soon shows that the policy works. A policy
        that nothing shows to work is not called for every prompt: those left have failed together.
        """
        parts, in_a_row = deque([batch]), 0
        while parts:
            part = parts.popleft()
            try:
                completions = await self._call([p for p, _ in part], self.calls)
            except Exception as error:
                of_one = isinstance(error, (PromptError, InfraError))
                if not of_one or isinstance(error, UnavailableError):
                    self._fail([*part, *itertools.chain(*parts)], error)
                    return
                half = len(part) // 2
                if half:
                    parts += (part[:half], part[half:])
                else:
                    self._fail(part, error)
                if isinstance(error, InfraError):  # to refuse a prompt, a policy must work
                    in_a_row += 1
                    if in_a_row == self.most_in_a_row:
                        words = f"{in_a_row} calls in a row failed, the last so: {describe(error)}"
                        told = InfraError(words, kind=error.kind)  # each may be tried again alone
                        self._fail(list(itertools.chain(*parts)), told)
                        return
            else:
                in_a_row = 0
                for (_, future), completion in zip(part, completions, strict=True):
                    if not future.done():
                        future.set_result(completion)

    @staticmethod
    def _fail(batch: list[tuple[Prompt, asyncio.Future[Completion]]], error: Exception) -> None:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)

    async def _call(self, prompts: list[Prompt], key: int) -> list[Completion]:
        params = replace(self.params, seed=mix(self.seed, key))
        self.calls += 1
        try:
            call = call_hook if self.limit is None else call_in_turn
            # What it takes of the loop, if it is `async def`, is no environment's time.
            completions: list[Completion] = await Held(
                call(self.policy.generate, prompts, params), self.holder
            )
        except (UsageError, InfraError):
            raise
        except RlrfError as error:  # on purpose, and so again with the same prompt and seed
            raise PolicyRaised(str(error), kind="policy_error", retryable=False) from error
        except Exception as error:
            raise PolicyRaised(
                f"the policy failed: {describe(error)}", kind="policy_error"
            ) from error
        if not isinstance(completions, (list, tuple)) or len(completions) != len(prompts):
            raise UsageError(
                f"the policy gave {_counted(completions)} for {len(prompts)} prompts; generate() "
                "must return one per prompt, in order"
            )
        return list(completions)


class PolicyRaised(InfraError):
    """A policy raised what is no error of rlrf's: over one prompt, or over all."""


def _counted(completions: Any) -> str:
    if isinstance(completions, (list, tuple)):
        return f"{len(completions)} completions"
    return f"a {type(completions).__name__}"


def mix(seed: int, key: int) -> int:
    """A seed for one call; far apart for neighbouring seeds and keys."""
    return (seed * 1_000_003 + key * 7_919 + 12_345) % (2**31)
