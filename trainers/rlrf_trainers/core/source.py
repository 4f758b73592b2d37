"""Where rollouts come from: the tasks in their order, and the engine that answers them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rlrf
from rlrf import Env, Policy, Rollout, SamplingParams, Task
from rlrf.env import TaskSequence
from rlrf_trainers.core.learner import Learner
from rlrf_trainers.losses import reward_deviation
from rlrf_trainers.model import distributed


class RolloutSource:
    """Draws tasks, and lets a policy answer them.

    Args:
        env: the environment.
        tasks: what is trained on.
        engine: the policy that samples.
        learner: whose weights the engine gets, and whose step it is.

    Attributes:
        version: of the weights that the engine has: how often they were published.
    """

    def __init__(self, env: Env, tasks: TaskSequence, engine: Policy, learner: Learner) -> None:
        self.env, self.engine, self.learner = env, engine, learner
        self.config = learner.config
        self.tasks = tasks
        self.rng = random.Random(self.config.seed)
        self.version = 0
        self._order: list[int] = []

    def next_tasks(self, n: int) -> list[Task]:
        """``n`` tasks, each task once per shuffled pass over the split."""
        chosen: list[Task] = []
        while len(chosen) < n:
            if not self._order:
                self._order = list(range(len(self.tasks)))
                self.rng.shuffle(self._order)
            chosen.append(self.tasks[self._order.pop()])
        return chosen

    def next(self) -> list[Rollout]:
        """One generation batch: ``num_generations`` rollouts of each of ``prompts_per_step`` tasks.

        Of several processes each collects the groups of its share of the tasks.
        """
        rollouts = self.sample(self.next_tasks(self.config.prompts_per_step))
        self.learner.record.collected(rollouts, self.learner.step)
        return rollouts

    def sample(self, tasks: Sequence[Task], group_size: int | None = None) -> list[Rollout]:
        """Rollouts of some tasks by the policy as it is, at the training temperature.

        Of several processes each gets the groups of its share of them. What is sampled for a task
        depends on the configured seed, the step and its place among the tasks, not on how many
        processes there are.
        """
        c = self.config
        mine = range(self.learner.world.rank, len(tasks), self.learner.world.size)
        with self.learner.clock("rollout"), distributed.whole(self.learner.model):
            rollouts = self.rollouts(
                self.env,
                [tasks[i] for i in mine],
                group_size or c.num_generations,
                c.sampling_params,
                [f"{c.seed} {self.learner.step} {i}" for i in mine],
            )
        groups = dict(zip(dict.fromkeys(r.group_id for r in rollouts), mine, strict=True))
        return [replace(r, group_id=f"{groups[r.group_id]}:{r.task_id}") for r in rollouts]

    def rollouts(
        self,
        env: Env,
        tasks: Sequence[Task],
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[str],
    ) -> list[Rollout]:
        """``group_size`` rollouts of each task, each task with a seed of its own."""
        if not tasks:  # of this process
            return []
        return rlrf.rollout(
            env,
            self.engine,
            tasks,
            group_size=group_size,
            max_concurrency=self.config.max_concurrency,
            deadline_s=self.config.rollout_deadline_s,
            params=params,
            seed=[seed_of(text) for text in seeds],
        )

    def standard_deviation(self, rewards: Tensor) -> float:
        """The unbiased deviation of all processes' rewards; 0 for fewer than two."""
        everyone = [r for part in self.learner.world.gather(rewards.tolist()) for r in part]
        return reward_deviation(torch.tensor(everyone, dtype=torch.float64))

    def publish(self) -> None:
        """Give the engine the weights that have been learnt; the next rollouts say so.

        An engine that samples from the very module that is trained has them.
        """
        self.version += 1
        same = getattr(self.engine, "model", None) is self.learner.model
        weights = () if same else self.learner.weights()
        self.engine.update_weights(weights, self.version)

    def state_dict(self) -> dict[str, Any]:
        """The order of the tasks, and how often weights were published; JSON data."""
        return {
            "rng": self.rng.getstate(),
            "order": list(self._order),
            "weight_version": self.version,
        }

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        self.rng.setstate(as_rng_state(data["rng"]))
        self._order = list(data["order"])
        self.version = data.get("weight_version", data["step"])
        self.engine.update_weights((), self.version)


def seed_of(text: str) -> int:
    """A seed for what ``text`` names; far apart for texts that are alike."""
    return random.Random(text).getrandbits(31)


def as_rng_state(data: Any) -> Any:
    """A state of :class:`random.Random` that has been JSON."""
    version, internal, gauss = data
    return version, tuple(internal), gauss
