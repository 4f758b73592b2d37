"""GRPO: Group Relative Policy Optimization (arXiv 2402.03300), the baseline without feedback.

    for each batch of questions x:
        sample G replies y_i ~ pi(. | x), get rewards r_i                            source.next
        A_i = (r_i - mean r) / std r                                                 prepare
        maximise min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL(pi || pi_ref)   objective

A group whose rewards are all equal has no advantage, hence no gradient: where a model always
fails, GRPO has nothing to learn from.

GRPO's own knobs have TRL's defaults. Differs from the paper in: no KL (``beta`` is 0, 0.04 there);
the loss is a mean over all tokens of the step, not of each reply and then of replies
(``loss_type="grpo"`` is that); tokens are weighted for a sampler that is not quite the trainer
(``rollout_is``); the deviation is the unbiased one plus 1e-4, and rewards that only rounding sets
apart are equal; rollouts without a reward are in no mean; the rewards of an episode's steps are
added up, not told apart as in its process supervision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrf import Rollout
from rlrf_trainers.config import GRPOConfig
from rlrf_trainers.core.algorithm import Algorithm, Loss
from rlrf_trainers.core.batch import Batch, Sample
from rlrf_trainers.core.teacher import Kind, Teacher
from rlrf_trainers.losses import BatchCounts, clipped_surrogate, group_advantages, k3_kl
from rlrf_trainers.losses.vocabulary import Tokens


@dataclass
class Attempt(Sample):
    """A rollout with its advantage."""

    advantage: float = 0.0
    counts: bool = True  # False: a cut-off reply under mask_truncated_completions
    pulled: bool = False  # towards the reference, whatever the advantage

    @property
    def matters(self) -> bool:
        """Whether it can move a weight; others are only counted in the normaliser."""
        return (bool(self.advantage) or self.pulled) and self.counts and self.tokens > 0


class GRPOTrainer(Algorithm[GRPOConfig, Attempt]):
    """Trains a policy with GRPO; of the environment only the rewards are used."""

    config_class, sample_class = GRPOConfig, Attempt

    def setup(self) -> None:
        """The reference policy."""
        c = self.config
        kind: Kind = "live" if not c.beta else "ema" if c.sync_ref_model else "frozen"
        self.reference = Teacher(self.learner.model, kind, c.ref_model_mixup_alpha)

    def followers(self) -> Mapping[str, Teacher]:
        """The reference policy."""
        return {"reference": self.reference}

    def after_batch(self, moved: bool) -> None:
        """The reference takes its share of the policy, where it is synced."""
        if self.learner.step % self.config.ref_model_sync_steps == 0:
            self.reference.update(self.learner.optimizer.masters)

    def prepare(self, rollouts: Sequence[Rollout]) -> list[Attempt]:
        """Group-relative advantages; unscored rollouts are in no baseline and in no loss."""
        learner, config = self.learner, self.config
        scored = [r for r in rollouts if r.scored]
        rewards = torch.tensor([float(r.reward or 0.0) for r in scored], dtype=torch.float64)
        groups = [r.group_id for r in scored]
        values = group_advantages(
            rewards,
            groups,
            scale_rewards=config.scale_rewards,
            batch_std=self.source.standard_deviation(rewards),
        )
        masks_cut = config.mask_truncated_completions
        samples = [
            Attempt(
                rollout,
                advantage=advantage,
                counts=not (masks_cut and rollout.finish_reason == "length"),
                pulled=config.beta > 0,
            )
            for rollout, advantage in zip(scored, values.tolist(), strict=True)
        ]
        if rollouts:
            masked = 1 - sum(s.counts for s in samples) / len(rollouts)
            learner.record("masked_fraction", masked, len(rollouts))
        return samples

    # --- the update -------------------------------------------------------------------------

    def counts(self, samples: Sequence[Attempt]) -> BatchCounts:
        """Cut-off replies that are masked are not divided by either."""
        return self.learner.counts(samples, [s for s in samples if s.counts])

    def objective(self, batch: Batch[Attempt], said: Tensor | None, counts: BatchCounts) -> Loss:
        """The clipped surrogate, corrected for the sampler, with the KL to the reference."""
        learner, config = self.learner, self.config
        weights = batch.weights(config.loss_type, counts, config.max_completion_length)  # [N]
        advantages = batch.per_row([s.advantage for s in batch.samples])
        old, whole = batch.old_logps, None
        by_row = config.importance_sampling_level == "sequence"
        if by_row:
            whole = learner.row_log_ratios(batch)
        correction = learner.sampler_correction(batch, by_row=by_row)

        def objective(tokens: Tokens, rows: slice) -> Tensor:
            logps = tokens.logps
            before = logps.detach() if old is None else old[rows]
            log_ratio = logps - (before if whole is None else logps.detach() - whole[rows])
            loss, metrics = clipped_surrogate(
                log_ratio,
                advantages[rows],
                epsilon=config.epsilon,
                epsilon_high=config.epsilon_high,
                delta=config.delta,
            )
            for name in ("clip_ratio/low", "clip_ratio/high", "clip_ratio/region"):
                learner.record(name, metrics[name].mean().item(), len(loss))
            loss = loss * correction(before, rows)
            if said is not None:
                kl = k3_kl(logps, said[rows])
                learner.record("kl", kl.detach().mean().item(), len(kl))
                loss = loss + config.beta * kl
            return (loss * weights[rows]).sum()

        return Loss(objective)

    def read(self, window: Sequence[Batch[Attempt]], name: str) -> Sequence[Tensor | None]:
        """``[N]`` per micro-batch: the reference policy's log-probabilities of what was sampled."""
        learner = self.learner
        if not self.config.beta:
            return [None] * len(window)
        with learner.clock("reference"):
            read = self.reference.read([learner.reader(b) for b in window], learner.head)
            return [learner.logps(q, b.ids) for b, q in zip(window, read, strict=True)]
