"""GRPO: Group Relative Policy Optimization (arXiv 2402.03300), the baseline without feedback.

    for each batch of questions x:
        sample G replies y_i ~ pi(. | x), get rewards r_i            collect
        A_i = (r_i - mean r) / std r                                 group_advantages
        maximise min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL(pi || pi_ref)

A group whose rewards are all equal has no advantage, hence no gradient: where a model always
fails, GRPO has nothing to learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrf import Env, Rollout, TrainResult
from rlrf_trainers.config import GRPOConfig
from rlrf_trainers.forward import Layout
from rlrf_trainers.learner import Learner, Sample, completion_mask, layout_of
from rlrf_trainers.losses import (
    BatchCounts,
    aggregate,
    group_advantages,
    k3_kl,
    masked_mean,
    policy_gradient_loss,
    reward_statistics,
    selected_logps,
)
from rlrf_trainers.teacher import Teacher


@dataclass
class Attempt(Sample):
    """A rollout with its advantage."""

    advantage: float = 0.0
    counts: bool = True  # False: a cut-off reply under mask_truncated_completions


class GRPOTrainer:
    """Trains a policy with GRPO.

    Args:
        model: a folder or name, a loaded transformers model, or an :class:`HFPolicy`.
        env: the environment; only its rewards are used.
        config: see :class:`GRPOConfig`.
        run_dir: where to write; None writes nothing.
        eval_env: held-out environment; None: ``env``'s ``eval`` split.
        on_step: called with every line of metrics.
    """

    config_class = GRPOConfig

    def __init__(
        self,
        model: Any,
        env: Env,
        config: GRPOConfig | None = None,
        *,
        run_dir: str | Path | None = None,
        eval_env: Env | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.config = config or GRPOConfig()
        self.learner = Learner(
            model, env, self.config, run_dir=run_dir, eval_env=eval_env, on_step=on_step
        )
        self.reference = Teacher(self.learner.model, "frozen" if self.config.beta else "live")

    def train(self) -> TrainResult:
        """Run all steps; see the module's algorithm box.

        Raises:
            RlrfError: the loss is not finite. The run directory keeps everything up to the step
                before, the model included.
        """
        learner, config = self.learner, self.config
        with learner.guarded():
            learner.evaluate_if_due()
            learner.log_step()
            for learner.step in range(1, config.max_steps + 1):
                samples = self.advantages(learner.collect())  # y ~ pi(. | x), r -> A
                steps = [
                    mini_batch
                    for _ in range(config.num_iterations)
                    for mini_batch in learner.mini_batches(samples)
                    if any(self.matters(s) for s in mini_batch)
                ]
                if len(steps) > 1:  # the later ones are off-policy
                    learner.remember_old_logps([s for s in samples if self.matters(s)])
                for mini_batch in steps:
                    self.improve(mini_batch)
                    learner.optimizer_step()
                learner.log_rollouts([s.rollout for s in samples])
                learner.evaluate_if_due()
                learner.log_step()
        return learner.finish()

    def advantages(self, rollouts: Sequence[Rollout]) -> list[Attempt]:
        """Group-relative advantages; unscored rollouts are in no baseline and in no loss."""
        learner, config = self.learner, self.config
        scored = [r for r in rollouts if r.scored]
        if not scored:
            return []
        rewards = torch.tensor([float(r.reward or 0.0) for r in scored])
        groups = [r.group_id for r in scored]
        values = group_advantages(rewards, groups, scale_rewards=config.scale_rewards)
        for name, value in reward_statistics(rewards, groups).items():
            learner.record(name, value)
        masks_cut = config.mask_truncated_completions
        samples = [
            Attempt(
                rollout,
                advantage=advantage,
                counts=not (masks_cut and rollout.finish_reason == "length"),
            )
            for rollout, advantage in zip(scored, values.tolist(), strict=True)
        ]
        if not any(self.matters(s) for s in samples):
            learner.warn(
                "flat_rewards",
                f"step {learner.step}: every group's rewards are all equal, so GRPO has no "
                "gradient and makes no update. Raise num_generations, use easier tasks, or a "
                "trainer that reads the feedback (sdpo)",
            )
        return samples

    def matters(self, sample: Attempt) -> bool:
        """Whether a sample can move a weight (others are only counted in the normaliser)."""
        # bnpo divides by the tokens of the forward it is in, so every row must be in one.
        moves = bool(sample.advantage) or self.config.beta > 0 or self.config.loss_type == "bnpo"
        return moves and sample.counts and sample.tokens > 0

    # --- the update -------------------------------------------------------------------------

    def improve(self, samples: Sequence[Attempt]) -> None:
        """Accumulate the gradient of one optimizer step."""
        learner, config = self.learner, self.config
        counted = [s for s in samples if s.counts]
        counts = BatchCounts(
            rows=float(len(samples)),
            active_rows=float(len(counted)),
            tokens=float(sum(s.tokens for s in counted)),
        )
        for batch in learner.micro_batches([s for s in samples if self.matters(s)]):
            layout = layout_of(batch)
            with learner.clock("update"):
                logits, ids = learner.student(batch, layout)
                logps = layout.padded(selected_logps(logits, ids))  # [B, T]
                mask = completion_mask(batch, logps.device)
                old_logps = learner.old_logps(batch, logps)
                per_token, metrics = policy_gradient_loss(
                    logps,
                    old_logps,
                    torch.tensor([s.advantage for s in batch], device=logps.device),
                    mask,
                    epsilon=config.epsilon,
                    epsilon_high=config.epsilon_high,
                    delta=config.delta,
                    importance_sampling_level=config.importance_sampling_level,
                )
                per_token = per_token * learner.sampler_weights(batch, old_logps)
                if config.beta:
                    reference = selected_logps(self.reference_logits(batch, layout), ids)
                    kl = k3_kl(logps, layout.padded(reference))
                    per_token = per_token + config.beta * kl
                    learner.record("kl", masked_mean(kl.detach(), mask).item())
                loss = aggregate(
                    per_token,
                    mask,
                    config.loss_type,
                    counts=counts,
                    max_completion_length=config.max_completion_length,
                )
                learner.backward(loss)
            for name in ("clip_ratio/low", "clip_ratio/high", "clip_ratio/region"):
                learner.record(name, masked_mean(metrics[name], mask).item())

    def reference_logits(self, batch: Sequence[Attempt], layout: Layout) -> Tensor:
        """``[N, V]``: the initial policy's logits of the sampled tokens."""
        prompts = [s.rollout.prompt_ids for s in batch]
        return self.reference.logits(lambda: self.learner.logits(prompts, layout))
