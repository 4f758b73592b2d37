"""How good is a policy on an environment: pass rate with its uncertainty, pass@k, feedback kinds.

Rollouts that the infrastructure failed are counted (:attr:`EvalReport.n_unscored`) and left out of
every number; they are never a failed attempt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlrf.env import Env, Task, as_tasks, check_is_env
from rlrf.errors import UsageError, check_whole
from rlrf.policy import PolicyLike, SamplingParams
from rlrf.rollout import MAX_AT_ONCE, Rollout, arollout, rollout


@dataclass(frozen=True)
class EvalReport:
    """What an evaluation found.

    Attributes:
        pass_rate: mean over tasks of the fraction of scored attempts that solved the task (that
            is pass@1); None when nothing was scored.
        pass_rate_ci: 95 % confidence interval of :attr:`pass_rate` over the choice of tasks and
            of samples; see :func:`pass_rate_interval`.
        mean_reward: mean over tasks of the mean reward; None when nothing was scored.
        pass_at_k: k to the unbiased pass@k (Chen et al. 2021, arXiv 2107.03374, eq. 1), averaged
            over the tasks with at least k scored attempts.
        pass_at_k_ci: 95 % confidence interval of each, over the choice of tasks and of samples.
        n_tasks: tasks attempted.
        n_rollouts: attempts, the unscored ones included.
        n_unscored: attempts without a reward, for a fault of the infrastructure.
        failures: why they are unscored: kind of fault to count.
        feedback_kinds: kind of feedback to the number of attempts that got it.
        finish_reasons: how attempts ended, to count.
        mean_length: mean tokens the policy sampled per scored attempt; None where it does not
            report tokens.
        metrics: the environment's own numbers, mean over the scored attempts that have each.
        rollouts: every attempt; samples of a task together.
    """

    pass_rate: float | None
    pass_rate_ci: tuple[float, float] | None
    mean_reward: float | None
    pass_at_k: Mapping[int, float]
    n_tasks: int
    n_rollouts: int
    n_unscored: int
    failures: Mapping[str, int] = field(default_factory=dict)
    feedback_kinds: Mapping[str, int] = field(default_factory=dict)
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    mean_length: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    pass_at_k_ci: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    rollouts: tuple[Rollout, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, rollouts: Iterable[Rollout]) -> EvalReport:
        """The report of rollouts that are already there; those of one ``group_id`` are a task's."""
        rollouts = tuple(rollouts)
        groups: dict[str, list[Rollout]] = {}
        for r in rollouts:
            groups.setdefault(r.group_id, []).append(r)
        scored = [r for r in rollouts if r.scored]
        counts: list[tuple[int, int]] = []  # (scored, solved) of each task with a scored attempt
        rewards: list[float] = []
        for group in groups.values():
            earned = [r.reward for r in group if r.reward is not None]
            if earned:
                counts.append((len(earned), sum(r.solved for r in group if r.scored)))
                rewards.append(math.fsum(earned) / len(earned))
        numbers: dict[str, list[float]] = {}
        for r in scored:
            for name, value in r.metrics.items():
                numbers.setdefault(name, []).append(float(value))
        lengths = [float(sum(r.completion_mask)) for r in scored if r.completion_mask]
        at_k = _pass_at_ks(counts)
        return cls(
            pass_rate=_mean([c / n for n, c in counts]),
            pass_rate_ci=pass_rate_interval(counts) if counts else None,
            mean_reward=_mean(rewards),
            pass_at_k={k: value for k, (value, _) in at_k.items()},
            pass_at_k_ci={k: interval for k, (_, interval) in at_k.items()},
            n_tasks=len(groups),
            n_rollouts=len(rollouts),
            n_unscored=len(rollouts) - len(scored),
            failures=_count((r.failure or "").partition(":")[0] for r in rollouts if not r.scored),
            feedback_kinds=_count(
                kind
                for r in rollouts
                for kind in dict.fromkeys(s.kind for step in r.feedback for s in step)
            ),
            finish_reasons=_count(r.finish_reason for r in rollouts),
            mean_length=_mean(lengths),
            metrics={name: _average(v) for name, v in sorted(numbers.items())},
            rollouts=rollouts,
        )

    def to_dict(self, *, rollouts: bool = False) -> dict[str, Any]:
        """The report as JSON data; with the rollouts, if asked (they may be large)."""
        data: dict[str, Any] = {
            "pass_rate": self.pass_rate,
            "pass_rate_ci": list(self.pass_rate_ci) if self.pass_rate_ci else None,
            "mean_reward": self.mean_reward,
            "pass_at_k": {str(k): v for k, v in self.pass_at_k.items()},
            "pass_at_k_ci": {str(k): list(v) for k, v in self.pass_at_k_ci.items()},
            "n_tasks": self.n_tasks,
            "n_rollouts": self.n_rollouts,
            "n_unscored": self.n_unscored,
            "failures": dict(self.failures),
            "feedback_kinds": dict(self.feedback_kinds),
            "finish_reasons": dict(self.finish_reasons),
            "mean_length": self.mean_length,
            "metrics": dict(self.metrics),
        }
        if rollouts:
            data["rollouts"] = [r.to_dict() for r in self.rollouts]
        return data

    def __str__(self) -> str:
        if self.pass_rate is None or self.pass_rate_ci is None:
            why = "".join(f"; the first: {r.failure}" for r in self.rollouts[:1])
            counts = dict(self.failures)
            return f"nothing scored: all {self.n_rollouts} rollouts failed ({counts}){why}"
        low, high = self.pass_rate_ci
        text = (
            f"pass rate {self.pass_rate:.1%} (95 % CI {low:.1%} to {high:.1%}), "
            f"mean reward {self.mean_reward:.3f}, {self.n_tasks} tasks, {self.n_rollouts} rollouts"
        )
        return text + (f", {self.n_unscored} unscored" if self.n_unscored else "")


def evaluate(
    env: Env,
    policy: PolicyLike,
    *,
    tasks: str | Task | Iterable[str | Task] | None = None,
    samples_per_task: int = 1,
    params: SamplingParams | None = None,
    seed: int = 0,
    limit: int | None = None,
    max_concurrency: int = 64,
    deadline_s: float | None = 120.0,
    on_rollout: Callable[[Rollout], None] | None = None,
    done: Iterable[Rollout] = (),
) -> EvalReport:
    """Attempt every task and report.

    Args:
        env: the environment; ``env.split`` says which split.
        policy: what replies, or a function ``(messages) -> text or message``.
        tasks: ids or tasks, or one; None for the whole split. A task counts once, however often
            given.
        samples_per_task: attempts per task.
        params: how to sample; the default samples the policy's own distribution, and lets a reply
            have the environment's ``max_tokens``.
        seed: seeds sampling and episodes.
        limit: take only the first so many tasks; None for all.
        max_concurrency: episodes under way at once.
        deadline_s: seconds of environment time per episode.
        on_rollout: called with each rollout as it finishes.
        done: rollouts of an evaluation that was cut off, not to be made again; see
            :func:`rlrf.rollout`.

    Raises:
        UsageError: no tasks, a number out of range.
        UnknownIdError: no task has a given id.
    """
    rollouts = rollout(
        env,
        policy,
        _chosen(env, tasks, samples_per_task, limit),
        group_size=samples_per_task,
        max_concurrency=max_concurrency,
        params=params or SamplingParams(max_tokens=env.max_tokens),
        deadline_s=deadline_s,
        seed=seed,
        on_rollout=on_rollout,
        done=done,
    )
    return EvalReport.of(rollouts)


async def aevaluate(
    env: Env,
    policy: PolicyLike,
    *,
    tasks: str | Task | Iterable[str | Task] | None = None,
    samples_per_task: int = 1,
    params: SamplingParams | None = None,
    seed: int = 0,
    limit: int | None = None,
    max_concurrency: int = 64,
    deadline_s: float | None = 120.0,
    on_rollout: Callable[[Rollout], None] | None = None,
    done: Iterable[Rollout] = (),
) -> EvalReport:
    """Async twin of :func:`evaluate`."""
    rollouts = await arollout(
        env,
        policy,
        _chosen(env, tasks, samples_per_task, limit),
        group_size=samples_per_task,
        max_concurrency=max_concurrency,
        params=params or SamplingParams(max_tokens=env.max_tokens),
        deadline_s=deadline_s,
        seed=seed,
        on_rollout=on_rollout,
        done=done,
    )
    return EvalReport.of(rollouts)


def _chosen(
    env: Env,
    tasks: str | Task | Iterable[str | Task] | None,
    samples_per_task: int,
    limit: int | None,
) -> list[str | Task]:
    check_is_env(env, "evaluate()")
    check_whole("samples_per_task", samples_per_task, most=MAX_AT_ONCE)
    if limit is not None:
        check_whole("limit", limit)
    chosen: Iterable[str | Task] = env.tasks() if tasks is None else as_tasks(tasks)
    # Twice the same task would be two groups of samples, and pose as two independent tasks.
    unique = {getattr(t, "id", t): t for t in chosen}
    return list(unique.values())[:limit]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of ``k`` attempts solves a task, from ``c`` solved of ``n``.

    ``1 - C(n-c, k) / C(n, k)``, as a product that does not overflow (Chen et al. 2021, eq. 1).

    Raises:
        UsageError: not ``0 <= c <= n`` and ``1 <= k <= n``.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UsageError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def pass_rate_interval(
    counts: Sequence[tuple[int, int]], z: float = 1.959963984540054
) -> tuple[float, float]:
    """Confidence interval of the mean pass rate of tasks.

    Wilson's interval (1927) at the effective sample size. Attempts at one task are alike, so
    ``T`` tasks with ``m`` attempts each are worth between ``T`` and ``T * m`` independent ones;
    the spread of the tasks' own rates says how many (``p (1 - p) / (s^2 / T)``, Kish's design
    effect). Unlike the bootstrap it is not empty when every task fares the same.

    Args:
        counts: per task ``(attempts, solved)``, attempts >= 1.
        z: normal quantile; the default gives 95 %.

    Raises:
        UsageError: no tasks.
    """
    if not counts:
        raise UsageError("pass_rate_interval() was given no tasks")
    return _interval([c / n for n, c in counts], sum(n for n, _ in counts), z)


def _interval(
    rates: Sequence[float], attempts: int, z: float = 1.959963984540054
) -> tuple[float, float]:
    """:func:`pass_rate_interval` of the tasks' own chances, from so many attempts in all."""
    tasks = len(rates)
    p = math.fsum(rates) / tasks
    effective = float(tasks)
    if attempts > tasks > 1:
        variance = math.fsum((r - p) ** 2 for r in rates) / (tasks - 1)
        if variance > 0:
            effective = min(max(p * (1 - p) * tasks / variance, tasks), attempts)
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = (
        z
        / (1 + z * z / effective)
        * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def _pass_at_ks(
    counts: Sequence[tuple[int, int]],
) -> dict[int, tuple[float, tuple[float, float]]]:
    most = max((n for n, _ in counts), default=0)
    ks = {1 << i for i in range(most.bit_length())} | {most}
    found = {}
    for k in sorted(k for k in ks if 1 <= k <= most):
        enough = [(n, c) for n, c in counts if n >= k]
        values = [pass_at_k(n, c, k) for n, c in enough]
        # k attempts at a task are one draw of "any of them solves it".
        draws = max(len(values), sum(n // k for n, _ in enough))
        found[k] = math.fsum(values) / len(values), _interval(values, draws)
    return found


def _mean(values: Sequence[float]) -> float | None:
    return _average(values) if values else None


def _average(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum(v / len(values) for v in values)


def _count(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
