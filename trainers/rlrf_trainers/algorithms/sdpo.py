"""SDPO: Self-Distillation Policy Optimization (arXiv 2601.20802), algorithm 1.

The policy is its own teacher: shown the environment's feedback on its attempt (or a sibling's
correct one), it scores the same tokens again, and the student moves towards what it says.

    for each batch of questions x:
        sample y ~ pi(. | x), get reward r and feedback f            collect
        build the reprompt (x, f) or (x, sibling's solution)         choose_hints, build_reprompt
        q(. | x, f, y<t) = the teacher's distributions on y          teacher.read
        minimise sum_t D(pi(. | x, y<t) || stopgrad q(. | x, f, y<t))
        teacher follows the student                                  teacher.update

No reward enters the loss: it only decides whose attempt may serve as a demonstration. Unless
``distillation_weight`` or ``route_to_grpo`` mixes GRPO in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlrf import Env, Feedback, Rollout, TrainResult
from rlrf.errors import UsageError
from rlrf.feedback import Level
from rlrf_trainers.algorithms.probe import measure_gap
from rlrf_trainers.config import SDPOConfig
from rlrf_trainers.core.batch import Batch, Sample
from rlrf_trainers.core.learner import Learner
from rlrf_trainers.core.reprompt import (
    Hint,
    Reprompt,
    Reprompter,
    choose_hints,
    other_hint,
    succeeded,
)
from rlrf_trainers.core.teacher import Teacher
from rlrf_trainers.losses import (
    BatchCounts,
    Divergence,
    clipped_surrogate,
    group_advantages,
    importance_weights,
)
from rlrf_trainers.losses.vocabulary import Logits, Objective, TeacherLogits, Tokens
from rlrf_trainers.run.checkpoints import State, prefixed


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


class SDPOTrainer:
    """Trains a policy with SDPO.

    Args:
        model: a folder or name, a loaded transformers model, or an :class:`HFPolicy`.
        env: the environment; its feedback level is what the teacher is shown.
        config: see :class:`SDPOConfig`.
        run_dir: where to write; None writes nothing.
        eval_env: held-out environment; None: ``env``'s ``eval`` split.
        on_step: called with every line of metrics.
        resume: go on with the run in ``run_dir``.
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
        resume: bool = False,
    ) -> None:
        self.config = c = config or SDPOConfig()
        self.learner = Learner(
            model,
            env,
            c,
            run_dir=run_dir,
            eval_env=eval_env,
            on_step=on_step,
            resume=resume,
            answers=("user",),  # into whose message the teacher's hint goes
        )
        self.teacher = Teacher(self.learner.model, c.teacher_regularization, c.teacher_update_rate)
        self.divergence = Divergence(
            c.distillation_alpha,
            c.distillation_topk or None,
            c.distillation_add_tail,
            c.distillation_advantage_clip or None,
        )
        self.reprompter = Reprompter(c, self.learner.policy, env)
        self._check_teacher(env)

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
        some = self.learner.tasks[:_ROOM_CHECKED]
        if not any(self.reprompter.has_room(task.messages, hint) for task in some):
            raise UsageError(
                f"max_reprompt_len={c.max_reprompt_len} leaves no room for a hint beside any of "
                f"the first {len(some)} questions and the template (the model's context is "
                f"{self.learner.policy.context}); raise it, or shorten reprompt_template"
            )

    def train(self) -> TrainResult:
        """Run all steps; see the module's algorithm box.

        Raises:
            RlrfError: the loss is not finite. The run directory keeps everything up to the step
                before, the model included.
        """
        learner = self.learner
        with learner.guarded():
            for _ in learner.steps(self, first=self.probe):
                self.learn(learner.collect())  # y ~ pi(. | x), r, f
            return learner.finish()

    def probe(self) -> None:
        """Measure the teacher gap: what the hint is worth before anything is learnt."""
        if not self.config.probe_tasks:
            return
        with self.learner.clock("probe"):
            measure_gap(self.learner, self.reprompter, self.config)

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from one generation batch: its optimizer steps, then one of the teacher."""
        learner, config = self.learner, self.config
        targets = self.reprompt(rollouts)  # (x, f) or (x, a sibling's solution)
        steps = [
            mini_batch
            for _ in range(config.num_iterations)
            for mini_batch in learner.mini_batches(targets)
            if learner.anywhere(any(t.matters for t in mini_batch))
        ]
        if len(steps) > 1:  # the later ones are off-policy
            learner.remember_old_logps([t for t in targets if t.matters])
        moved = False
        for mini_batch in steps:
            self.improve(mini_batch)
            moved |= learner.optimizer_step()
        if moved:
            self.teacher.update(learner.optimizer.masters)
        self.log(rollouts, targets)

    # --- the reprompt -----------------------------------------------------------------------

    def reprompt(self, rollouts: Sequence[Rollout]) -> list[Target]:
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

    def improve(self, targets: Sequence[Target]) -> None:
        """Accumulate the gradient of one optimizer step."""
        learner = self.learner
        taught = [t for t in targets if t.distil and t.tokens]
        others = [t for t in targets if t.matters and not t.distil]
        # Rows without a hint count as well: see SDPOConfig.loss_aggregation.
        distil_counts = learner.counts(targets, taught)
        reinforce_counts = learner.counts(targets, [t for t in targets if t.reinforce])
        for rows, has_teacher in ((taught, True), (others, False)):
            for window in learner.windows(rows):
                teachers = self.teacher_logits(window) if has_teacher else [None] * len(window)
                for batch, teacher in zip(window, teachers, strict=True):
                    with learner.clock("update"):
                        if batch is None:
                            learner.idle()
                            continue
                        self._distil(batch, teacher, distil_counts, reinforce_counts)

    def _distil(
        self,
        batch: Batch[Target],
        teacher: TeacherLogits | None,
        distil_counts: BatchCounts,
        reinforce_counts: BatchCounts,
    ) -> None:
        learner, config = self.learner, self.config
        hidden = learner.hidden(batch.prompts, batch.layout)  # [N, H]
        distils = teacher is not None
        advantages: Tensor | None = None
        if teacher is not None and config.distillation_level != "logit":
            advantages, teacher = self.advantages(batch, hidden, teacher), None
        objective = self.objective(
            batch, hidden, advantages, distils, distil_counts, reinforce_counts
        )
        metrics = learner.loss(
            batch, objective, hidden=hidden, divergence=self.divergence, teacher=teacher
        )
        learner.record.sampling(batch, metrics["logps"])
        if advantages is not None:
            metrics["teacher_student_kl"] = -advantages
        if distils:
            self._record_divergence(batch, metrics)

    def objective(
        self,
        batch: Batch[Target],
        hidden: Tensor,
        advantages: Tensor | None,
        distils: bool,
        distil_counts: BatchCounts,
        reinforce_counts: BatchCounts,
    ) -> Objective:
        """Divergence from the teacher, and the policy gradient of the rewards where it has weight.

        Args:
            batch: the micro-batch.
            hidden: ``[N, H]`` of the student.
            advantages: ``[N]`` of the sampled tokens, at the token and sequence level.
            distils: whether the rows have a teacher.
            distil_counts: what the distillation is divided by.
            reinforce_counts: what the policy gradient is divided by.
        """
        config = self.config
        rewards = batch.per_row([t.advantage for t in batch.samples])  # [N]
        distil = batch.per_row([t.distil for t in batch.samples])
        distil = distil * batch.weights(config.loss_aggregation, distil_counts)
        reinforce = batch.per_row([t.reinforce for t in batch.samples])
        reinforce = reinforce * batch.weights(config.loss_aggregation, reinforce_counts)
        correction = self.learner.sampler_correction(batch, hidden)
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

    def advantages(self, batch: Batch[Target], hidden: Tensor, teacher: TeacherLogits) -> Tensor:
        """``[N]`` of ``log q(y_t) - log pi(y_t)``, or its mean over the row at sequence level."""
        learner, config = self.learner, self.config
        student = learner.student_logps(batch, hidden)
        fixed = hidden.detach()
        found = (
            learner.logps(lambda rows: teacher(rows, learner.head.logits(fixed[rows])), batch.ids)
            - student
        )
        for clip in (config.distillation_kl_clip, config.distillation_advantage_clip):
            if clip:
                found = found.clamp(-clip, clip)
        return batch.row_means(found) if config.distillation_level == "sequence" else found

    def teacher_logits(self, window: Sequence[Batch[Target] | None]) -> list[TeacherLogits | None]:
        """The teacher's logits of the student's tokens, after the reprompts, per micro-batch.

        With a control, ``log q`` becomes ``log pi + log q_hint - log q_control``: what remains of
        the advantage ``log q - log pi`` is what this hint says and another does not.
        """
        with self.learner.clock("teacher"):
            shown = self._read(window, "reprompt")
            if self.config.baseline == "none":
                return [lambda rows, _, read=read: read(rows) for read in shown]  # type: ignore[misc]  # mypy infers no default
            control = self._read(window, "control")
        return [
            lambda rows, student, a=a, b=b: a(rows).sub_(b(rows)).add_(student)  # type: ignore[misc]  # mypy infers no default
            for a, b in zip(shown, control, strict=True)
        ]

    def _read(self, window: Sequence[Batch[Target] | None], which: str) -> list[Logits]:
        readers = []
        for batch in window:
            prompts = [getattr(t, which) for t in batch.samples] if batch else []
            ids = [p.prompt_ids for p in prompts]
            layout = Reprompt.layout(prompts) if prompts else None
            readers.append(self.learner.reader(batch, ids, layout))
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

    def log(self, rollouts: Sequence[Rollout], targets: Sequence[Target]) -> None:
        """Rewards, and every rollout with what its teacher saw and thought."""
        learner = self.learner
        learner.record.rewards([t.rollout for t in targets])
        extra: dict[int, dict[str, Any]] = {
            id(t.rollout): {
                "teacher_prompt": learner.tokenizer.decode(list(t.reprompt.prompt_ids)),
                "token_kl": t.token_kl or None,
            }
            for t in targets
            if t.reprompt
        }
        shown = [extra.get(id(r), {}) for r in rollouts]
        learner.record.rollouts(rollouts, learner.step, extra=shown)

    # --- state ------------------------------------------------------------------------------

    def state_dict(self, *, copy: bool = True) -> State:
        """Everything the next step depends on; see :meth:`Learner.state_dict`."""
        state = self.learner.state_dict(copy=copy)
        state.tensors |= prefixed("teacher", self.teacher.state_dict(copy=copy))
        return state

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            UsageError: it is of another model or configuration.
        """
        self.learner.load_state_dict(state)
        self.teacher.load_state_dict(state.part("teacher"))
