"""SDPO: Self-Distillation Policy Optimization (arXiv 2601.20802), algorithm 1.

The policy is its own teacher: shown the environment's feedback on its attempt (or a sibling's
correct one), it scores the same tokens again, and the student moves towards what it says.

    for each batch of questions x:
        sample y ~ pi(. | x), get reward r and feedback f            collect
        build the reprompt (x, f) or (x, sibling's solution)         choose_hints, build_reprompt
        q(. | x, f, y<t) = the teacher's distributions on y          teacher.logits
        minimise sum_t D(pi(. | x, y<t) || stopgrad q(. | x, f, y<t))
        teacher follows the student                                  teacher.update

No reward enters the loss: it only decides whose attempt may serve as a demonstration.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrf import Env, Rollout, TrainResult
from rlrf_trainers.config import SDPOConfig
from rlrf_trainers.forward import Layout
from rlrf_trainers.learner import Learner, Sample, completion_mask, layout_of
from rlrf_trainers.losses import (
    BatchCounts,
    aggregate,
    importance_weights,
    reward_statistics,
    self_distillation_loss,
)
from rlrf_trainers.reprompt import (
    Hint,
    Reprompt,
    build_reprompt,
    choose_hints,
    prompt_messages,
    succeeded,
)
from rlrf_trainers.teacher import Teacher


@dataclass
class Target(Sample):
    """A rollout and what its teacher was shown (``reprompt`` None: nothing, no distillation)."""

    reprompt: Reprompt | None = None
    token_kl: list[float | None] = field(default_factory=list)  # [T], for the report


class SDPOTrainer:
    """Trains a policy with SDPO.

    Args:
        model: a folder or name, a loaded transformers model, or an :class:`HFPolicy`.
        env: the environment; its feedback level is what the teacher is shown.
        config: see :class:`SDPOConfig`.
        run_dir: where to write; None writes nothing.
        eval_env: held-out environment; None: ``env``'s ``eval`` split.
        on_step: called with every line of metrics.
    """

    config_class = SDPOConfig

    def __init__(
        self,
        model: Any,
        env: Env,
        config: SDPOConfig | None = None,
        *,
        run_dir: str | Path | None = None,
        eval_env: Env | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.config = config or SDPOConfig()
        self.learner = Learner(
            model, env, self.config, run_dir=run_dir, eval_env=eval_env, on_step=on_step
        )
        self.teacher = Teacher(
            self.learner.model,
            self.config.teacher_regularization,
            self.config.teacher_update_rate,
        )
        self.rng = random.Random(self.config.seed)

    def train(self) -> TrainResult:
        """Run all steps; see the module's algorithm box.

        Raises:
            RlrfError: the loss is not finite. The run directory keeps everything up to the step
                before, the model included.
        """
        learner = self.learner
        with learner.guarded():
            learner.evaluate_if_due()
            learner.log_step()
            for learner.step in range(1, self.config.max_steps + 1):
                self.learn(learner.collect())  # y ~ pi(. | x), r, f
                learner.evaluate_if_due()
                learner.log_step()
        return learner.finish()

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from one generation batch: its optimizer steps, then one of the teacher."""
        learner, config = self.learner, self.config
        targets = self.reprompt(rollouts)  # (x, f) or (x, a sibling's solution)
        steps = [
            mini_batch
            for _ in range(config.num_iterations)
            for mini_batch in learner.mini_batches(targets)
            if any(t.reprompt for t in mini_batch)
        ]
        if len(steps) > 1:  # the later ones are off-policy
            learner.remember_old_logps([t for t in targets if t.reprompt])
        for mini_batch in steps:
            self.distil(mini_batch)
            learner.optimizer_step()
        if steps:
            self.teacher.update(learner.optimizer.masters)
        self.log(targets)

    # --- the reprompt -----------------------------------------------------------------------

    def reprompt(self, rollouts: Sequence[Rollout]) -> list[Target]:
        """Build every rollout's teacher prompt; unscored rollouts are left out."""
        learner, config = self.learner, self.config
        scored = [r for r in rollouts if r.scored]
        hints = choose_hints(scored, config, self.rng)
        targets = []
        for rollout, hint in zip(scored, hints, strict=True):
            reprompt = None
            if hint and any(rollout.completion_mask):
                reprompt = build_reprompt(
                    prompt_messages(rollout), hint, config, learner.policy.encode, learner.tokenizer
                )
            targets.append(Target(rollout, reprompt=reprompt))
        self._record_reprompts(targets, hints)
        return targets

    def _record_reprompts(self, targets: Sequence[Target], hints: Sequence[Hint]) -> None:
        """The metrics of the official code, under its names."""
        learner, config = self.learner, self.config
        if not targets:
            return
        n = len(targets)
        solved = {t.rollout.group_id for t in targets if succeeded(t.rollout, config)}
        groups = {t.rollout.group_id for t in targets}
        active = sum(t.reprompt is not None for t in targets)
        with_feedback = sum(bool(t.rollout.last_feedback) for t in targets)
        truncated = sum(t.reprompt.truncated for t in targets if t.reprompt)
        for name, value in {
            "success_group_fraction": len(solved) / len(groups),
            "success_sample_fraction": sum(succeeded(t.rollout, config) for t in targets) / n,
            "feedback_available_fraction": with_feedback / n,
            "feedback_used_fraction": sum(bool(h.feedback) for h in hints) / n,
            "reprompt_sample_fraction": active / n,
            "empty_target_batch": float(active == 0),
            "reprompt_truncated_fraction": truncated / n,
        }.items():
            learner.record(f"self_distillation/{name}", value)
        if not active and not solved:  # when all succeed there is rightly nothing to distil
            learner.warn(
                "empty_target_batch",
                f"step {learner.step}: no rollout has feedback or a correct sibling, so there is "
                "nothing to distil and no update. Raise the environment's feedback level, set "
                "include_environment_feedback=true, or raise num_generations",
            )
        if truncated:
            learner.warn(
                "reprompt_truncated",
                f"step {learner.step}: {truncated} of {n} teacher prompts exceed "
                f"max_reprompt_len={config.max_reprompt_len}; their feedback or demonstration "
                "was shortened",
            )

    # --- the update -------------------------------------------------------------------------

    def distil(self, targets: Sequence[Target]) -> None:
        """Accumulate the gradient of one optimizer step."""
        learner, config = self.learner, self.config
        active = [t for t in targets if t.reprompt is not None]
        counts = BatchCounts(
            rows=float(len(targets)),  # inactive rows count: see SDPOConfig.loss_aggregation
            active_rows=float(len(active)),
            tokens=float(sum(t.tokens for t in active)),
        )
        for batch in learner.micro_batches(active):
            layout = layout_of(batch)
            with learner.clock("teacher"):
                teacher_logits = self.teacher_logits(batch, layout)
            with learner.clock("update"):
                student_logits, ids = learner.student(batch, layout)
                divergence, flat_metrics = self_distillation_loss(
                    student_logits,
                    teacher_logits,
                    alpha=config.distillation_alpha,
                    topk=config.distillation_topk or None,
                    add_tail=config.distillation_add_tail,
                    full_logit_distillation=config.full_logit_distillation,
                    completion_ids=ids,
                    per_token_kl_clip=config.distillation_kl_clip or None,
                )
                metrics = {name: layout.padded(x) for name, x in flat_metrics.items()}  # [B, T]
                logps = metrics["student_logps"]
                old_logps = learner.old_logps(batch, logps)
                weights = learner.sampler_weights(batch, old_logps)
                if config.distillation_is_clip:  # paper A.4
                    weights = weights * importance_weights(
                        logps, old_logps, clip=config.distillation_is_clip
                    )
                mask = completion_mask(batch, weights.device)
                per_token = layout.padded(divergence) * weights
                loss = aggregate(per_token, mask, config.loss_aggregation, counts=counts)
                learner.backward(loss)
            self._record_divergence(batch, mask, metrics)

    def teacher_logits(self, batch: Sequence[Target], layout: Layout) -> Tensor:
        """``[N, V]``: the teacher's logits of the student's tokens, after the reprompts."""
        reprompts = [t.reprompt.prompt_ids for t in batch if t.reprompt is not None]
        return self.teacher.logits(lambda: self.learner.logits(reprompts, layout))

    # --- the record -------------------------------------------------------------------------

    def _record_divergence(
        self, batch: Sequence[Target], mask: Tensor, metrics: dict[str, Tensor]
    ) -> None:
        sampled = mask.bool()
        for name in ("teacher_student_kl", "teacher_entropy", "topk_coverage"):
            if name in metrics:
                value = metrics[name][sampled].mean().item()
                self.learner.record(f"self_distillation/{name}", value)
        for target, row in zip(batch, metrics["teacher_student_kl"], strict=True):
            target.token_kl = [
                value if m else None
                for value, m in zip(row.tolist(), target.rollout.completion_mask, strict=False)
            ]

    def log(self, targets: Sequence[Target]) -> None:
        """Rewards, and every rollout with what its teacher saw and thought."""
        learner = self.learner
        if targets:
            stats = reward_statistics(
                torch.tensor([float(t.rollout.reward or 0.0) for t in targets]),
                [t.rollout.group_id for t in targets],
            )
            for name, value in stats.items():
                learner.record(name, value)
        learner.log_rollouts(
            [t.rollout for t in targets],
            extra=[
                {
                    "teacher_prompt": learner.tokenizer.decode(list(t.reprompt.prompt_ids))
                    if t.reprompt
                    else None,
                    "token_kl": t.token_kl or None,
                }
                for t in targets
            ],
        )
