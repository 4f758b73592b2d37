"""SDPO: Self-Distillation Policy Optimization (arXiv 2601.20802), algorithm 1.

The policy is its own teacher: shown the environment's feedback on its attempt (or a sibling's
correct one), it scores the same tokens again, and the student moves towards what it says.

    for each batch of questions x:
        sample y ~ pi(. | x), get reward r and feedback f                 source.next
        build the reprompt (x, f) or (x, sibling's solution)              prepare
        q(. | x, f, y<t) = the teacher's distributions on y               read
        minimise sum_t D(pi(. | x, y<t) || stopgrad q(. | x, f, y<t))     objective
        teacher follows the student                                       after_batch

No reward enters the loss: it only decides whose attempt may serve as a demonstration. Unless
``distillation_weight`` or ``route_to_grpo`` mixes GRPO in.

Defaults are those of the paper's section 4, the experiments with feedback. Differs from the paper
in: a correct attempt is shown a sibling's, never its own (table 2's caption; the released scripts
do as we do); correct is what the environment calls solved; one optimizer step a batch instead of
one a question, and smaller batches and replies; a prompt that is too long loses some of its hint,
not its end; rollouts without a reward are left out; several turns. What is in other papers is off
unless asked for: docs/papers.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlrf import Env, Feedback, Rollout
from rlrf.errors import UsageError
from rlrf.feedback import Level
from rlrf.reprompt import (
    Hint,
    Reprompt,
    Reprompter,
    choose_hints,
    other_hint,
    succeeded,
)
from rlrf_trainers.algorithms.probe import measure_gap
from rlrf_trainers.config import SDPOConfig
from rlrf_trainers.core.algorithm import Algorithm, Loss
from rlrf_trainers.core.batch import Batch, Sample
from rlrf_trainers.core.teacher import Teacher
from rlrf_trainers.losses import (
    BatchCounts,
    Divergence,
    clipped_surrogate,
    group_advantages,
    importance_weights,
)
from rlrf_trainers.losses.vocabulary import Logits, Objective, TeacherLogits, Tokens
from rlrf_trainers.model.prefix import Layout


@dataclass
class Target(Sample):
    """A rollout, what its teacher was shown, and how much of each signal it gets."""

    reprompt: Reprompt | None = None  # None: nothing was shown, so there is no distillation
    control: Reprompt | None = None  # another task's hint, under baseline="control"
    advantage: float = 0.0  # reward minus the group's mean
    distil: float = 0.0  # weight of the distillation
    reinforce: float = 0.0  # weight of the policy gradient
    token_kl: list[float | None] = field(default_factory=list)  # [T], for the report

    @property
    def matters(self) -> bool:
        """Whether it can move a weight."""
        return bool(self.tokens) and bool(self.distil or self.reinforce * self.advantage)


_ROOM_CHECKED = 8
"""Tasks that are looked at to see whether a reprompt has room for a hint."""


class SDPOTrainer(Algorithm[SDPOConfig, Target]):
    """Trains a policy with SDPO; the environment's feedback level is what the teacher is shown."""

    config_class, sample_class = SDPOConfig, Target
    answers = ("user",)  # into whose message the teacher's hint goes

    def setup(self) -> None:
        """The teacher, and what it is shown.

        Raises:
            UsageError: there is nothing a teacher can be shown, or no room for it.
        """
        c = self.config
        self.teacher = Teacher(self.learner.model, c.teacher_regularization, c.teacher_update_rate)
        self.divergence = Divergence(
            c.distillation_alpha,
            c.distillation_topk or None,
            c.distillation_add_tail,
            c.distillation_advantage_clip or None,
        )
        self.reprompter = Reprompter(c, self.learner.policy, self.source.env)
        self._check_teacher(self.source.env)

    def _check_teacher(self, env: Env) -> None:
        """See that there is something a teacher can be shown, and room for it.

        Raises:
            UsageError: there is not.
        """
        c = self.config
        shows_siblings = c.use_successful_as_teacher and (
            c.num_generations > 1 or not c.dont_reprompt_on_self_success
        )
        if env.feedback_level == Level.none and not shows_siblings:
            raise UsageError(
                f"the environment says nothing (feedback='none'), and with "
                f"num_generations={c.num_generations} and "
                f"use_successful_as_teacher={str(c.use_successful_as_teacher).lower()} no teacher "
                "is shown a sibling's attempt either: nothing would be learnt; raise the feedback "
                "level, or num_generations"
            )
        hint = Hint(None, Feedback.of("critique", "."))
        some = self.source.tasks[:_ROOM_CHECKED]
        if not any(self.reprompter.has_room(task.messages, hint) for task in some):
            raise UsageError(
                f"max_reprompt_len={c.max_reprompt_len} leaves no room for a hint beside any of "
                f"the first {len(some)} questions and the template (the model's context is "
                f"{self.learner.policy.context}); raise it, or shorten reprompt_template"
            )

    def before_training(self) -> None:
        """Measure the teacher gap: what the hint is worth before anything is learnt."""
        if self.config.probe_tasks:
            with self.learner.clock("probe"):
                measure_gap(self.source, self.reprompter, self.config)

    def after_batch(self, moved: bool) -> None:
        """The teacher follows the student."""
        if moved:
            self.teacher.update(self.learner.optimizer.masters)

    def followers(self) -> Mapping[str, Teacher]:
        """The teacher."""
        return {"teacher": self.teacher}

    # --- the reprompt -----------------------------------------------------------------------

    def prepare(self, rollouts: Sequence[Rollout]) -> list[Target]:
        """Decide what each rollout learns from, and build its teacher's prompt.

        Unscored rollouts are left out, also of every mean.
        """
        config = self.config
        scored = [r for r in rollouts if r.scored]
        # Of the step, not of what came before: so a resumed run draws what it would have drawn.
        hints = choose_hints(scored, config, f"{config.seed} {self.learner.step}")
        advantages = group_advantages(
            torch.tensor([float(r.reward or 0.0) for r in scored], dtype=torch.float64),
            [r.group_id for r in scored],
            scale_rewards="none",
        ).tolist()
        targets, unshown = [], 0
        for rollout, hint, advantage in zip(scored, hints, advantages, strict=True):
            target = Target(rollout, advantage=advantage)
            if hint and target.tokens:
                target.reprompt = self.reprompter.build(rollout, hint)
                if target.reprompt and config.baseline == "control":
                    other = other_hint(rollout, hint, scored, hints)
                    target.control = self.reprompter.build(rollout, other)
                    if target.control is None:
                        target.reprompt = None
                unshown += target.reprompt is None
            weight = config.distillation_weight
            if config.route_to_grpo:
                weight = float(bool(target.reprompt) and not succeeded(rollout, config))
            target.distil = weight if target.reprompt else 0.0
            target.reinforce = 1.0 - weight
            targets.append(target)
        if unshown:
            self.learner.record.warn(
                "reprompt_room",
                f"step {self.learner.step}: {unshown} rollouts are not distilled, because question "
                "and template leave no room for a hint "
                f"(max_reprompt_len={config.max_reprompt_len}, the model's context is "
                f"{self.learner.policy.context})",
            )
        self._record_reprompts(targets, hints, len(rollouts))
        return targets

    def _record_reprompts(
        self, targets: Sequence[Target], hints: Sequence[Hint], collected: int
    ) -> None:
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
            "feedback_used_fraction": sum(
                bool(h.feedback) and t.reprompt is not None
                for t, h in zip(targets, hints, strict=True)
            )
            / n,
            "reprompt_sample_fraction": active / n,
            "empty_target_batch": float(active == 0),
            "reprompt_truncated_fraction": truncated / n,
        }.items():
            weight = len(groups) if name == "success_group_fraction" else n
            learner.record(f"self_distillation/{name}", value, weight)
        masked = 1 - sum(t.matters for t in targets) / collected
        learner.record("masked_fraction", masked, collected)

    # --- the update -------------------------------------------------------------------------

    def counts(self, samples: Sequence[Target]) -> tuple[BatchCounts, BatchCounts]:
        """What the distillation and what the policy gradient is divided by.

        Rows without a hint count as well: see :attr:`SDPOConfig.loss_aggregation`.
        """
        taught = [t for t in samples if t.distil and t.tokens]
        counts = self.learner.counts
        return counts(samples, taught), counts(samples, [t for t in samples if t.reinforce])

    def parts(self, samples: Sequence[Target]) -> Mapping[str, list[Target]]:
        """Those with a teacher, and those that have their reward alone."""
        return {
            "taught": [t for t in samples if t.distil and t.tokens],
            "others": [t for t in samples if t.matters and not t.distil],
        }

    def blank(self, name: str) -> Target:
        """A target that stands for nothing, with a teacher where the others have one."""
        nothing = Reprompt((), (0,), False, (0,), (1,))
        return Target.of_nothing(reprompt=nothing, control=nothing)

    def objective(
        self,
        batch: Batch[Target],
        said: TeacherLogits | None,
        counts: tuple[BatchCounts, BatchCounts],
    ) -> Loss:
        """Divergence from the teacher, and the policy gradient of the rewards where it has weight.

        Args:
            batch: the micro-batch.
            said: the teacher's logits; None where the rows have none.
            counts: what the distillation, and what the policy gradient is divided by.
        """
        distils, teacher = said is not None, said
        advantages: Tensor | None = None
        if said is not None and self.config.distillation_level != "logit":
            advantages, teacher = self.advantages(batch, said), None

        def told(metrics: dict[str, Tensor]) -> None:
            if advantages is not None:
                metrics["teacher_student_kl"] = -advantages
            if distils:
                self._record_divergence(batch, metrics)

        objective = self._objective(batch, advantages, distils, *counts)
        return Loss(objective, self.divergence, teacher, told)

    def _objective(
        self,
        batch: Batch[Target],
        advantages: Tensor | None,
        distils: bool,
        distil_counts: BatchCounts,
        reinforce_counts: BatchCounts,
    ) -> Objective:
        config = self.config
        rewards = batch.per_row([t.advantage for t in batch.samples])  # [N]
        distil = batch.per_row([t.distil for t in batch.samples])
        distil = distil * batch.weights(config.loss_aggregation, distil_counts)
        reinforce = batch.per_row([t.reinforce for t in batch.samples])
        reinforce = reinforce * batch.weights(config.loss_aggregation, reinforce_counts)
        correction = self.learner.sampler_correction(batch)
        old = batch.old_logps
        reinforces = any(t.reinforce for t in batch.samples)

        def objective(tokens: Tokens, rows: slice) -> Tensor:
            before = tokens.logps.detach() if old is None else old[rows]
            corrected = correction(before, rows)
            loss = tokens.logps.new_zeros(())
            if distils:
                weights = distil[rows] * corrected
                if config.distillation_is_clip:  # paper A.4
                    weights = weights * importance_weights(
                        tokens.logps, before, clip=config.distillation_is_clip
                    )
                if config.teacher_entropy_beta and tokens.teacher_entropy is not None:
                    weights = (
                        weights * (-config.teacher_entropy_beta * tokens.teacher_entropy).exp()
                    )
                if tokens.divergence is None:
                    assert advantages is not None
                    per_token = -advantages[rows] * tokens.logps
                else:
                    per_token = tokens.divergence
                    if config.distillation_kl_clip:
                        per_token = per_token.clamp(max=config.distillation_kl_clip)
                loss = loss + (per_token * weights).sum()
            if reinforces:
                per_token, clipped = clipped_surrogate(
                    tokens.logps - before,
                    rewards[rows],
                    epsilon=config.epsilon,
                    epsilon_high=config.epsilon_high,
                )
                for name in ("clip_ratio/low", "clip_ratio/high", "clip_ratio/region"):
                    self.learner.record(name, clipped[name].mean().item(), len(per_token))
                loss = loss + (per_token * corrected * reinforce[rows]).sum()
            return loss

        return objective

    def advantages(self, batch: Batch[Target], teacher: TeacherLogits) -> Tensor:
        """``[N]`` of ``log q(y_t) - log pi(y_t)``, or its mean over the row at sequence level."""
        learner, config = self.learner, self.config
        fixed = batch.hidden.detach()
        found = learner.logps(
            lambda rows: teacher(rows, learner.head.logits(fixed[rows])), batch.ids
        ) - learner.student_logps(batch)
        for clip in (config.distillation_kl_clip, config.distillation_advantage_clip):
            if clip:
                found = found.clamp(-clip, clip)
        return batch.row_means(found) if config.distillation_level == "sequence" else found

    def read(self, window: Sequence[Batch[Target]], name: str) -> Sequence[TeacherLogits | None]:
        """The teacher's logits of the student's tokens, after the reprompts, per micro-batch.

        With a control, ``log q`` becomes ``log pi + log q_hint - log q_control``: what remains of
        the advantage ``log q - log pi`` is what this hint says and another does not.
        """
        if name == "others":
            return [None] * len(window)
        with self.learner.clock("teacher"):
            shown = self._read(window, "reprompt")
            if self.config.baseline == "none":
                return [lambda rows, _, read=read: read(rows) for read in shown]  # type: ignore[misc]  # mypy infers no default
            control = self._read(window, "control")
        return [
            lambda rows, student, a=a, b=b: a(rows).sub_(b(rows)).add_(student)  # type: ignore[misc]  # mypy infers no default
            for a, b in zip(shown, control, strict=True)
        ]

    def _read(self, window: Sequence[Batch[Target]], which: str) -> list[Logits]:
        readers = []
        for batch in window:
            prompts = [getattr(t, which) for t in batch.samples]
            ids = [p.prompt_ids for p in prompts]
            readers.append(self.learner.reader(batch, ids, _layout(prompts)))
        return self.teacher.read(readers, self.learner.head)

    # --- the record -------------------------------------------------------------------------

    def _record_divergence(self, batch: Batch[Target], metrics: dict[str, Tensor]) -> None:
        for name in (
            "teacher_student_kl",
            "teacher_entropy",
            "topk_coverage",
            "teacher_topk_coverage",
        ):
            if name in metrics:
                value = metrics[name].mean().item()
                self.learner.record(f"self_distillation/{name}", value, len(metrics[name]))
        rows = batch.split(metrics["teacher_student_kl"])
        for target, row in zip(batch.samples, rows, strict=True):
            values = iter(row.tolist())
            target.token_kl = [next(values) if m else None for m in target.rollout.completion_mask]

    def notes(self, sample: Target) -> Mapping[str, Any]:
        """What the teacher saw and thought."""
        if sample.reprompt is None:
            return {}
        prompt = self.learner.tokenizer.decode(list(sample.reprompt.prompt_ids))
        return {"teacher_prompt": prompt, "token_kl": sample.token_kl or None}


def _layout(reprompts: Sequence[Reprompt]) -> Layout:
    """The order of the sampled tokens, which is that of the student."""
    return Layout([r.completion_ids for r in reprompts], [r.completion_mask for r in reprompts])
