"""REINFORCE with a batch-mean baseline: an algorithm, and rlrf does the rest."""

from dataclasses import dataclass

import torch

from rlrf_trainers.core.algorithm import Algorithm, Loss
from rlrf_trainers.core.batch import Sample
from rlrf_trainers.losses import group_advantages


@dataclass
class Attempt(Sample):
    """A rollout with r - mean r."""

    advantage: float = 0.0

    @property
    def matters(self):
        """Whether it can move a weight."""
        return self.advantage != 0


class Reinforce(Algorithm):
    """Maximise E[r]: the gradient is (r - mean r) * grad log pi(y | x)."""

    sample_class = Attempt

    def prepare(self, rollouts):
        """All that were scored: an unscored rollout has no reward."""
        scored = [r for r in rollouts if r.scored]
        rewards = torch.tensor([r.reward for r in scored], dtype=torch.float64)
        values = group_advantages(rewards, [0] * len(scored), scale_rewards="none").tolist()
        return [Attempt(r, advantage=a) for r, a in zip(scored, values, strict=True)]

    def objective(self, batch, said, counts):
        """-(r - mean r) * log pi(y), summed over the tokens of a reply, a mean over replies."""
        weights = batch.per_row([s.advantage / counts.rows for s in batch.samples])  # [N]
        return Loss(lambda tokens, rows: -(weights[rows] * tokens.logps).sum())
