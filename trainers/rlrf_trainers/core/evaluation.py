"""The held-out evaluation, and which weights were the best by it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from rlrf import Env, Task
from rlrf_trainers.core.source import RolloutSource
from rlrf_trainers.model import distributed
from rlrf_trainers.run.checkpoints import BEST, Checkpoints, State


class Evaluation:
    """Evaluates the policy when it is due, always on the same tasks with the same seeds.

    Args:
        source: whose engine answers.
        env: the held-out environment.
        split: the split of it.

    Attributes:
        best: step and value of the best evaluation so far.
        evaluations_since_best: how many have been no better.
        compared: what evaluations must share to be compared.
    """

    def __init__(self, source: RolloutSource, env: Env, split: str) -> None:
        self.source, self.env, self.split = source, env, split
        self.learner, self.config = source.learner, source.config
        self.best: dict[str, float] | None = None
        self.evaluations_since_best = 0
        self.compared: dict[str, Any] = {}
        self._scores: dict[str, float] = {}  # of the last evaluation, by rollout
        self._best_scores: dict[str, float] = {}

    def if_due(self) -> None:
        """Evaluate before the first step, after the last, and every ``eval_steps``."""
        c = self.config
        last = self.learner.step == c.max_steps
        if self.learner.step == 0:
            self.warn_of_overlap()
            due = c.eval_on_start
        else:
            due = last or (c.eval_steps > 0 and self.learner.step % c.eval_steps == 0)
        if not due:
            return
        with self.learner.clock("eval"), distributed.whole(self.learner.model):
            mine = self.tasks()[self.learner.world.rank :: self.learner.world.size]
            rollouts = self.source.rollouts(
                self.env,
                mine,
                c.eval_samples,
                c.eval_sampling_params,
                # The same random numbers at every evaluation: what changes is the policy.
                [f"eval {task.id}" for task in mine],
            )
        unscored = [r for r in rollouts if not r.scored]
        if unscored:
            self.learner.record.warn(
                "eval_unscored",
                f"{len(unscored)} of {len(rollouts)} held-out rollouts of step "
                f"{self.learner.step} are unscored and left out of eval/pass_rate: "
                f"{unscored[0].failure}",
            )
        for rollout in rollouts:
            self.learner.record("eval/unscored_fraction", not rollout.scored)
            if rollout.reward is not None:
                self.learner.record("eval/pass_rate", rollout.solved)
                self.learner.record("eval/reward", rollout.reward)
                self.learner.record("eval/mean_length", sum(rollout.completion_mask))
        self.learner.record.rollouts(rollouts, self.learner.step, split="eval")
        self._scores = {}
        passes = c.metric_for_best_model == "eval/pass_rate"
        scores = {
            f"{r.task_id}/{r.sample}": float(r.solved) if passes else r.reward
            for r in rollouts
            if r.reward is not None
        }
        for part in self.learner.world.gather(scores):
            self._scores |= part

    def tasks(self) -> list[Task]:
        """A fixed draw, the same at every evaluation and in every run of any seed."""
        tasks = self.env.tasks(self.split)
        n = min(self.config.eval_tasks or len(tasks), len(tasks))
        return [tasks[i] for i in random.Random(0).sample(range(len(tasks)), n)]

    def _better(self, value: float) -> bool:
        """Whether the last evaluation is better than the best.

        Compared rollout by rollout, over those that both could score: without a few hard tasks,
        whose sandbox failed, a mean is higher and the policy no better. As much is not better.
        """
        if self.best is None:
            return True
        both = self._scores.keys() & self._best_scores.keys()
        if not both:
            return value > self.best["value"]
        gain = math.fsum(self._scores[k] - self._best_scores[k] for k in both)
        most = max(max(abs(self._scores[k]), abs(self._best_scores[k])) for k in both)
        return gain > 1e-12 * len(both) * most

    def note(self, line: Mapping[str, float]) -> None:
        """Keep the weights of the best evaluation, and count how long ago it was."""
        value = line.get(self.config.metric_for_best_model)
        if value is None or not math.isfinite(value):  # no evaluation, or nothing could be scored
            return
        if not self._better(value):
            self.evaluations_since_best += 1
            return
        self.best = {"step": float(self.learner.step), "value": value}
        self._best_scores = dict(self._scores)
        self.evaluations_since_best = 0
        if self.config.eval_steps:
            weights = distributed.full_state(self.learner.optimizer.masters.items(), copy=False)
            if self.learner.record.run is not None:
                data = {**self.best, "model_digest": self.learner.identity}
                Checkpoints(self.learner.record.run.path).save(BEST, State(weights, data))

    @property
    def stops_early(self) -> bool:
        """Whether ``early_stopping_patience`` is used up."""
        patience = self.config.early_stopping_patience
        return bool(patience) and self.evaluations_since_best >= patience

    def warn_of_overlap(self) -> None:
        """Say so where tasks are trained on and evaluated on."""
        held_out = self.env.tasks(self.split)
        both = [
            task
            for id in set(self.source.tasks.ids()).intersection(held_out.ids())
            if (task := self.source.tasks.get(id)) and (other := held_out.get(id))
            # Splits may count their tasks alike.
            if task.messages == other.messages
        ]
        if both:
            self.learner.record.warn(
                "overlap",
                f"{len(both)} of the {len(held_out)} tasks of the evaluation are trained on, so "
                "eval/* does not show what is learnt beyond them; give an eval_env, or an "
                "environment with a split 'eval'",
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know; JSON data."""
        return {
            "best": dict(self.best) if self.best else None,
            "best_scores": dict(self._best_scores),
            "evaluations_since_best": self.evaluations_since_best,
            "compared": self.compared,
        }

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        self.best = data["best"]
        self._best_scores = data.get("best_scores", {})
        self.evaluations_since_best = data["evaluations_since_best"]

    def forget(self) -> None:
        """What was best: it cannot be compared with what comes."""
        self.best, self.evaluations_since_best, self._best_scores = None, 0, {}
