"""The teacher gap: how much more often the policy is right when it is shown the hint.

SDPO moves the policy towards itself-with-the-hint, so what that one can do bounds what is to be
gained; over models and tasks the final gain is about linear in the gap before training (arXiv
2605.30070). It costs one more generation batch.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import rlrf
from rlrf import Completion, Prompt, SamplingParams
from rlrf.reprompt import Reprompt, Reprompter, choose_hints
from rlrf_trainers.config import SDPOConfig
from rlrf_trainers.core.source import RolloutSource, seed_of
from rlrf_trainers.engines.hf import HFPolicy
from rlrf_trainers.model import distributed


class _Shown:
    """The policy, which reads the reprompt of its group in place of the question."""

    def __init__(self, policy: HFPolicy, reprompts: dict[str, Reprompt]) -> None:
        self.policy, self.reprompts = policy, reprompts
        self.max_batch_size = policy.max_batch_size
        self.score, self.update_weights = policy.score, policy.update_weights

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        read = [
            replace(p, messages=self.reprompts[p.group or ""].messages)
            if p.prefix_ids is None
            else p
            for p in prompts
        ]
        return self.policy.generate(read, params)


def measure_gap(source: RolloutSource, reprompter: Reprompter, config: SDPOConfig) -> None:
    """Record ``self_distillation/teacher_gap``, its two sides, and of how many tasks it is.

    On ``probe_tasks`` training tasks the policy tries a few times. For each failed attempt that
    gets a hint, it tries once more with the hint. The gap is the mean reward of these less the
    mean reward of the failed attempt's siblings: to be compared with the failure itself would
    count a mere second try as a gain.

    Recorded only where an attempt failed and could be given a hint.
    """
    learner, tasks = source.learner, source.tasks
    # Of its own seed: whether there is a probe must not change what is trained on.
    rng = random.Random(config.seed)
    chosen = rng.sample(range(len(tasks)), min(config.probe_tasks, len(tasks)))
    probed = [tasks[i] for i in chosen]
    with distributed.whole(learner.model):
        rollouts = source.sample(probed, config.probe_samples)
        scored = [r for r in rollouts if r.scored]
        rewards: dict[str, list[float]] = defaultdict(list)
        for r in scored:
            rewards[r.group_id].append(r.reward or 0.0)
        hinted = [
            (r, hint)
            for r, hint in zip(scored, choose_hints(scored, config, config.seed), strict=True)
            if hint and not r.solved and len(rewards[r.group_id]) > 1
        ]
        if not hinted:
            return
        built = [(r, reprompter.build(r, hint)) for r, hint in hinted]
        shown = [(r, reprompt) for r, reprompt in built if reprompt is not None]
        if not shown:
            return
        by_id = {task.id: task for task in probed}
        again = [by_id[r.task_id] for r, _ in shown]
        reprompts = {f"{i}:{r.task_id}": reprompt for i, (r, reprompt) in enumerate(shown)}
        retries = rlrf.rollout(
            source.env,
            _Shown(learner.policy, reprompts),
            again,
            max_concurrency=config.max_concurrency,
            deadline_s=config.rollout_deadline_s,
            params=config.sampling_params,
            seed=[seed_of(f"retry {config.seed} {r.task_id} {r.sample}") for r, _ in shown],
        )
    told = set()
    for (failed, _), retry in zip(shown, retries, strict=True):
        if retry.reward is None:
            continue
        told.add(failed.group_id)
        siblings = rewards[failed.group_id].copy()
        siblings.remove(failed.reward or 0.0)
        without = mean(siblings)  # of equal numbers it is that number, to the last bit
        learner.record("self_distillation/probe_teacher_reward", retry.reward)
        learner.record("self_distillation/probe_student_reward", without)
        learner.record("self_distillation/teacher_gap", retry.reward - without)
    learner.record("self_distillation/probe_tasks", len(told), how=sum)
