"""RAFT (arXiv 2304.06767): fine-tune on the best of each group, if it solves the task."""

from rlrf_trainers.core.algorithm import Algorithm, Loss
from rlrf_trainers.core.batch import Sample


class Raft(Algorithm):
    """Sample, keep what is best, imitate it."""

    def prepare(self, rollouts):
        """The best reply of each group that has one that solves its task."""
        best = {}
        for rollout in rollouts:
            if rollout.solved:
                kept = best.setdefault(rollout.group_id, rollout)
                if rollout.reward > kept.reward:
                    best[rollout.group_id] = rollout
        return [Sample(rollout) for rollout in best.values()]

    def objective(self, batch, said, counts):
        """-log pi(y), a mean over all tokens of the optimizer step."""
        weights = batch.weights("token_mean", counts)  # [N]
        return Loss(lambda tokens, rows: -(weights[rows] * tokens.logps).sum())
