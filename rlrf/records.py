"""What an episode leaves: a :class:`Rollout`, and one in the making."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlrf.env import Env, StepResult
from rlrf.errors import OutcomeError, UsageError
from rlrf.feedback import Feedback, span_to_tokens
from rlrf.messages import Message, Messages
from rlrf.policy import Completion


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
        weight_version: of the weights that sampled it, the oldest of several turns; None where the
            policy does not say.
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
    weight_version: int | None = None

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
            "weight_version": self.weight_version,
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


class PolicyMisuse(Exception):
    """The policy was used wrongly, or returns what is none: so for every rollout, as a rule."""

    def __init__(self, error: UsageError) -> None:
        self.error = error


class Draft:
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
        self.weight_version: int | None = None
        self._turn_start = 0

    def prefix_ids(self) -> tuple[int, ...] | None:
        """All ids so far, which the next prompt must begin with; None before the first step."""
        return (*self.prompt_ids, *self.ids) if self.steps else None

    def add_completion(self, completion: Completion, said: Message) -> None:
        """What the policy sampled, and what it said by that."""
        before = self.prefix_ids()
        if before is None:
            self.prompt_ids = tuple(map(int, completion.prompt_ids))
        else:
            if tuple(completion.prompt_ids[: len(before)]) != before:
                raise PolicyMisuse(
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
        versions = (self.weight_version, completion.weight_version)
        self.weight_version = min((v for v in versions if v is not None), default=None)

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
        """The rollout of an episode that came to its end."""
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
        """The rollout, unscored."""
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
            weight_version=self.weight_version,
        )
