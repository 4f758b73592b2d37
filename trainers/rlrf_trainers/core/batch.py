"""Rollouts on their way through an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from rlrf import Rollout
from rlrf_trainers.losses import Aggregation, BatchCounts, aggregation_weights
from rlrf_trainers.model.prefix import Layout


@dataclass
class Sample:
    """A scored rollout on its way through an update; trainers add what they need."""

    rollout: Rollout
    old_logps: Tensor | None = None
    """``[S]`` of the sampled tokens, before the first of several optimizer steps; else None."""

    @property
    def tokens(self) -> int:
        """How many tokens the policy sampled."""
        return sum(self.rollout.completion_mask)

    @property
    def matters(self) -> bool:
        """Whether it can move a weight."""
        return self.tokens > 0

    @classmethod
    def of_nothing(cls, **more: Any) -> Self:
        """One sampled token that stands for nothing; see :attr:`Batch.blank`."""
        rollout = Rollout("", "", (0,), (0,), (1,), (0.0,), reward=0.0)
        return cls(rollout, **more)


S = TypeVar("S", bound=Sample)


class Batch(Generic[S]):
    """Samples that share a forward, with their sampled tokens in the order of a :class:`Layout`.

    Attributes:
        samples: ``[B]``.
        layout: the order of the ``N`` tokens.
        ids: ``[N]`` the sampled tokens.
        prompts: ``[B]`` the student's prompts.
        hidden: ``[N, H]`` the student's hidden states, once they have been made.
        blank: whether it stands for nothing: what a process computes while others have samples
            left, since with sharded weights every forward is a common one. Its weights are zero.
    """

    hidden: Tensor

    def __init__(self, samples: Sequence[S], device: torch.device, *, blank: bool = False) -> None:
        self.samples = list(samples)
        rollouts = [s.rollout for s in samples]
        self.prompts = [r.prompt_ids for r in rollouts]
        self.layout = Layout(
            [r.completion_ids for r in rollouts], [r.completion_mask for r in rollouts]
        )
        self.ids = self.layout.flat(self.layout.completions, device)
        self.device, self.blank = device, blank

    def per_row(self, values: Sequence[float]) -> Tensor:
        """``[N]``: each row's value at each of its tokens."""
        return torch.tensor(values, device=self.device)[self.layout.rows.to(self.device)]

    def split(self, per_token: Tensor) -> list[Tensor]:
        """``[N]`` cut into rows."""
        return list(torch.split(per_token, self.layout.counts))

    def row_means(self, per_token: Tensor) -> Tensor:
        """``[N]``: at each token the mean over its row."""
        rows = self.split(per_token)
        return torch.cat([row.mean().expand(len(row)) for row in rows])

    @property
    def old_logps(self) -> Tensor | None:
        """``[N]``, or None when this is the only optimizer step."""
        rows = [s.old_logps for s in self.samples if s.old_logps is not None]
        return torch.cat(rows) if len(rows) == len(self.samples) else None

    @property
    def sampler_logps(self) -> Tensor | None:
        """``[N]`` what the sampler said it drew from, or None where it says nothing."""
        rows = [s.rollout.logprobs for s in self.samples]
        return self.layout.flat(rows, self.device) if all(rows) else None

    def weights(
        self, mode: Aggregation, counts: BatchCounts, max_completion_length: int | None = None
    ) -> Tensor:
        """``[N]``: each token's weight in the loss of the whole optimizer step."""
        if self.blank:
            return torch.zeros(len(self.ids), device=self.device)
        mask = self.layout.mask(self.device)
        return self.layout.unpadded(
            aggregation_weights(
                mask, mode, counts=counts, max_completion_length=max_completion_length
            )
        )
