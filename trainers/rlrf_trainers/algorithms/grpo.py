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
from rlrf_trainers.core.batch import Batch, Sample
from rlrf_trainers.core.learner import Learner
from rlrf_trainers.core.teacher import Kind, Teacher
from rlrf_trainers.losses import (
    BatchCounts,
    clipped_surrogate,
    group_advantages,
    k3_kl,
)
from rlrf_trainers.losses.vocabulary import Objective, Tokens
from rlrf_trainers.run.checkpoints import State, prefixed


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
        resume: go on with the run in ``run_dir``.
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
        resume: bool = False,
    ) -> None:
        self.config = c = config or GRPOConfig()
        self.learner = Learner(
            model, env, c, run_dir=run_dir, eval_env=eval_env, on_step=on_step, resume=resume
        )
        kind: Kind = "live" if not c.beta else "ema" if c.sync_ref_model else "frozen"
        self.reference = Teacher(self.learner.model, kind, c.ref_model_mixup_alpha)

    def train(self) -> TrainResult:
        """Run all steps; see the module's algorithm box.

        Raises:
            RlrfError: the loss is not finite. The run directory keeps everything up to the step
                before, the model included.
        """
        learner = self.learner
        with learner.guarded():
            for _ in learner.steps(self):
                self.learn(learner.collect())  # y ~ pi(. | x), r
            return learner.finish()

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from one generation batch: its optimizer steps, then what the reference does."""
        learner, config = self.learner, self.config
        samples = self.advantages(rollouts)  # A
        steps = [
            mini_batch
            for _ in range(config.num_iterations)
            for mini_batch in learner.mini_batches(samples)
            if learner.anywhere(any(self.matters(s) for s in mini_batch))
        ]
        if len(steps) > 1:  # the later ones are off-policy
            learner.remember_old_logps([s for s in samples if self.matters(s)])
        for mini_batch in steps:
            self.improve(mini_batch)
            learner.optimizer_step()
        if learner.step % config.ref_model_sync_steps == 0:
            self.reference.update(learner.optimizer.masters)
        learner.record.rollouts(rollouts, learner.step)

    def advantages(self, rollouts: Sequence[Rollout]) -> list[Attempt]:
        """Group-relative advantages; unscored rollouts are in no baseline and in no loss."""
        learner, config = self.learner, self.config
        scored = [r for r in rollouts if r.scored]
        rewards = torch.tensor([float(r.reward or 0.0) for r in scored], dtype=torch.float64)
        groups = [r.group_id for r in scored]
        values = group_advantages(
            rewards,
            groups,
            scale_rewards=config.scale_rewards,
            batch_std=learner.standard_deviation(rewards),
        )
        learner.record.rewards(scored)
        masks_cut = config.mask_truncated_completions
        samples = [
            Attempt(
                rollout,
                advantage=advantage,
                counts=not (masks_cut and rollout.finish_reason == "length"),
            )
            for rollout, advantage in zip(scored, values.tolist(), strict=True)
        ]
        if rollouts:
            masked = 1 - sum(s.counts for s in samples) / len(rollouts)
            learner.record("masked_fraction", masked, len(rollouts))
        return samples

    def matters(self, sample: Attempt) -> bool:
        """Whether a sample can move a weight (others are only counted in the normaliser)."""
        moves = bool(sample.advantage) or self.config.beta > 0
        return moves and sample.counts and sample.tokens > 0

    # --- the update -------------------------------------------------------------------------

    def improve(self, samples: Sequence[Attempt]) -> None:
        """Accumulate the gradient of one optimizer step."""
        learner = self.learner
        counts = learner.counts(samples, [s for s in samples if s.counts])
        for window in learner.windows([s for s in samples if self.matters(s)]):
            references = self.reference_logps(window)
            for batch, reference in zip(window, references, strict=True):
                with learner.clock("update"):
                    if batch is None:
                        learner.idle()
                        continue
                    hidden = learner.hidden(batch.prompts, batch.layout)  # [N, H]
                    objective = self.objective(batch, hidden, counts, reference)
                    metrics = learner.loss(batch, objective, hidden=hidden)
                learner.record.sampling(batch, metrics["logps"])

    def objective(
        self, batch: Batch[Attempt], hidden: Tensor, counts: BatchCounts, reference: Tensor | None
    ) -> Objective:
        """The clipped surrogate, corrected for the sampler, with the KL to the reference."""
        learner, config = self.learner, self.config
        weights = batch.weights(config.loss_type, counts, config.max_completion_length)  # [N]
        advantages = batch.per_row([s.advantage for s in batch.samples])
        old, whole = batch.old_logps, None
        by_row = config.importance_sampling_level == "sequence"
        if by_row:
            whole = learner.row_log_ratios(batch, hidden)
        correction = learner.sampler_correction(batch, hidden, by_row=by_row)

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
            if reference is not None:
                kl = k3_kl(logps, reference[rows])
                learner.record("kl", kl.detach().mean().item(), len(kl))
                loss = loss + config.beta * kl
            return (loss * weights[rows]).sum()

        return objective

    def reference_logps(self, window: Sequence[Batch[Attempt] | None]) -> list[Tensor | None]:
        """``[N]`` per micro-batch: the reference policy's log-probabilities of what was sampled."""
        learner = self.learner
        if not self.config.beta:
            return [None] * len(window)
        with learner.clock("reference"):
            read = self.reference.read([learner.reader(b) for b in window], learner.head)
            return [
                None if batch is None else learner.logps(logits, batch.ids)
                for batch, logits in zip(window, read, strict=True)
            ]

    # --- state ------------------------------------------------------------------------------

    def state_dict(self, *, copy: bool = True) -> State:
        """Everything the next step depends on; see :meth:`Learner.state_dict`."""
        state = self.learner.state_dict(copy=copy)
        state.tensors |= prefixed("reference", self.reference.state_dict(copy=copy))
        return state

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            UsageError: it is of another model or configuration.
        """
        self.learner.load_state_dict(state)
        self.reference.load_state_dict(state.part("reference"))
