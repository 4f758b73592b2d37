from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

import rlrf
from rlrf import (
    EvalReport,
    Feedback,
    InfraError,
    Outcome,
    Rollout,
    SamplingParams,
    ScriptedPolicy,
    Segment,
    SingleTurnEnv,
    Task,
    UnknownIdError,
    UsageError,
)
from rlrf.evaluate import aevaluate, pass_at_k, pass_rate_interval
from tests.environments_for_tests import Bytewise


class Words(SingleTurnEnv):
    """Say the word; the task 'broken' has no grader, 'half' is half right."""

    words = ("yes", "no", "broken", "half")

    def load_tasks(self, split: str) -> list[Task]:
        return [Task(w, f"Say {w}.", hidden=w) for w in self.words]

    def grade(self, task: Task, completion: str) -> Outcome:
        if task.hidden == "broken":
            raise InfraError("the grader is gone", kind="sandbox_died", retryable=False)
        if completion == task.hidden:
            return Outcome(1.0, metrics={"letters": len(completion)})
        return Outcome(
            0.5 if task.hidden == "half" else 0.0,
            Feedback(
                [
                    Segment("wrong_answer", "Say the word."),
                    Segment("wrong_answer", "Only the word."),
                    Segment("hint", "It is short.", severity="info"),
                ]
            ),
        )


def echo(messages: rlrf.Messages) -> str:
    return str(messages[-1]["content"])[4:-1]


def test_one_task_may_be_given_as_it_is() -> None:
    policy = ScriptedPolicy(echo)
    for one in ("yes", Words().tasks()[0]):
        assert [r.task_id for r in rlrf.rollout(Words(), policy, one, group_size=2)] == ["yes"] * 2
        assert rlrf.evaluate(Words(), policy, tasks=one).n_tasks == 1
    none: Any = 5
    with pytest.raises(UsageError, match=r"tasks is 5.*give a task or its id, several, or None"):
        rlrf.rollout(Words(), policy, none)
    with pytest.raises(UsageError, match=r"splits is 'train'; .* e\.g\. \('train',\)"):
        type("Odd", (Words,), {"splits": "train"})()


def test_counts_have_bounds() -> None:
    policy = ScriptedPolicy(echo)
    for name, value in (("group_size", 10**6), ("max_concurrency", 10**9), ("retries", 10**10)):
        with pytest.raises(UsageError, match=f"{name} is {value}; .* whole number from [01] to"):
            rlrf.rollout(Words(), policy, **{name: value})
    for name, value in (("samples_per_task", 10**6), ("limit", 2**31), ("limit", 1.5)):
        with pytest.raises(UsageError, match=f"{name} is {value}; it must be a whole number"):
            rlrf.evaluate(Words(), policy, **{name: value})
    with pytest.raises(UsageError, match="max_batch_size is 0"):
        ScriptedPolicy(echo, max_batch_size=0)


def test_unscored_rollouts_are_counted_and_never_fail_the_policy() -> None:
    report = rlrf.evaluate(Words(), Bytewise(echo), samples_per_task=2)
    assert report.pass_rate == 1.0
    assert report.mean_reward == 1.0
    assert (report.n_tasks, report.n_rollouts, report.n_unscored) == (4, 8, 2)
    assert report.failures == {"sandbox_died": 2}
    assert report.pass_at_k == {1: 1.0, 2: 1.0}
    assert report.finish_reasons == {"terminated": 6, "failed": 2}
    assert report.metrics == {"letters": pytest.approx((3 + 2 + 4) / 3)}
    assert report.mean_length == pytest.approx((4 + 3 + 5) / 3)  # the end token counts
    assert len(report.rollouts) == 8
    assert "2 unscored" in str(report)


def test_kinds_count_rollouts_not_segments() -> None:
    report = rlrf.evaluate(Words(), ScriptedPolicy(lambda m: "?"), tasks=["yes", "half"])
    assert report.feedback_kinds == {"wrong_answer": 2, "hint": 2}
    assert report.pass_rate == 0.0
    assert report.mean_reward == 0.25


def test_nothing_scored_is_no_number() -> None:
    report = rlrf.evaluate(Words(), ScriptedPolicy(echo), tasks=["broken"])
    assert (report.pass_rate, report.pass_rate_ci, report.mean_reward) == (None, None, None)
    assert (report.mean_length, report.pass_at_k) == (None, {})
    assert "nothing scored" in str(report)


def test_limit_takes_the_first_tasks_and_a_task_given_twice_counts_once() -> None:
    policy = ScriptedPolicy(echo)
    assert rlrf.evaluate(Words(), policy, limit=2).n_tasks == 2
    repeated = rlrf.evaluate(Words(), policy, tasks=["yes", "yes", Task("yes", "Say yes.")])
    assert (repeated.n_tasks, repeated.n_rollouts) == (1, 1)


def test_params_seed_and_on_rollout_reach_the_collector() -> None:
    seen: list[Rollout] = []
    report = rlrf.evaluate(
        Words(),
        Bytewise(echo),
        tasks=["yes"],
        params=SamplingParams(max_tokens=2),
        on_rollout=seen.append,
    )
    assert report.rollouts == tuple(seen)
    assert report.finish_reasons == {"length": 1}
    assert report.pass_rate == 0.0


def test_a_reply_may_have_what_the_environment_lets_it() -> None:
    class Short(Words):
        max_tokens = 2

    def cut(params: SamplingParams | None) -> dict[str, int]:
        report = rlrf.evaluate(Short(), Bytewise(echo), tasks=["yes"], params=params)
        return dict(report.finish_reasons)

    assert cut(None) == {"length": 1}
    assert cut(SamplingParams()) == {"terminated": 1}
    assert asyncio.run(aevaluate(Short(), Bytewise(echo), tasks=["yes"])).finish_reasons == {
        "length": 1
    }


def test_wrong_use_is_told() -> None:
    policy = ScriptedPolicy(echo)
    with pytest.raises(UsageError, match="limit is 0"):
        rlrf.evaluate(Words(), policy, limit=0)
    with pytest.raises(UsageError, match="samples_per_task is 0"):
        rlrf.evaluate(Words(), policy, samples_per_task=0)
    with pytest.raises(UsageError, match="no tasks"):
        rlrf.evaluate(Words(), policy, tasks=[])
    with pytest.raises(UnknownIdError, match="'yes'"):
        rlrf.evaluate(Words(), policy, tasks=["yess"])


def test_the_async_twin_gives_the_same() -> None:
    policy = ScriptedPolicy(echo)
    twin = asyncio.run(aevaluate(Words(), policy, tasks=["yes", "no"]))
    assert twin == rlrf.evaluate(Words(), policy, tasks=["yes", "no"])


def test_the_report_is_json() -> None:
    report = rlrf.evaluate(Words(), ScriptedPolicy(lambda m: "yes"), samples_per_task=2)
    data = json.loads(json.dumps(report.to_dict(rollouts=True)))
    assert data["pass_rate"] == pytest.approx(1 / 3)
    assert data["pass_at_k"] == {"1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3)}
    assert len(data["pass_rate_ci"]) == 2
    assert EvalReport.of(Rollout.from_dict(r) for r in data["rollouts"]) == report
    assert "rollouts" not in report.to_dict()


def _brute(n: int, c: int, k: int) -> float:
    draws: Iterator[tuple[int, ...]] = itertools.combinations(range(n), k)
    hits = [any(i < c for i in draw) for draw in draws]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_chance_over_all_draws(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(_brute(n, c, k))


def test_pass_at_k_bounds() -> None:
    assert 0.99 < pass_at_k(2000, 20, 1000) <= 1.0  # no overflow
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(UsageError, match="pass@k needs"):
            pass_at_k(n, c, k)


def test_pass_at_k_uses_only_tasks_with_enough_scored_attempts() -> None:
    def rollout(group: str, reward: float | None) -> Rollout:
        return Rollout(group, group, reward=reward, solved=reward == 1.0)

    report = EvalReport.of(
        [rollout("a", 1.0), rollout("a", 0.0), rollout("b", 0.0), rollout("b", None)]
    )
    assert report.pass_at_k == {1: 0.25, 2: 1.0}
    assert report.pass_rate == 0.25


def test_one_attempt_per_task_gives_wilsons_interval() -> None:
    # Wilson's interval for 8 of 10, as tables give it.
    low, high = pass_rate_interval([(1, 1)] * 8 + [(1, 0)] * 2)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_attempts_at_one_task_are_not_independent() -> None:
    alike = pass_rate_interval([(8, 8)] * 5 + [(8, 0)] * 5)
    mixed = pass_rate_interval([(8, 4)] * 10)
    single = pass_rate_interval([(1, 1)] * 5 + [(1, 0)] * 5)
    assert alike == pytest.approx(single)  # eight copies of an answer tell no more than one
    assert mixed[1] - mixed[0] <= alike[1] - alike[0]
    spread = pass_rate_interval([(8, 3), (8, 5)] * 5)
    assert spread[1] - spread[0] < alike[1] - alike[0]


def test_the_interval_is_never_empty_and_stays_in_range() -> None:
    for counts in ([(4, 0)] * 5, [(4, 4)] * 5, [(1, 1)], [(8, 2)]):
        low, high = pass_rate_interval(counts)
        assert 0.0 <= low < high <= 1.0
        assert math.isfinite(low + high)
    with pytest.raises(UsageError):
        pass_rate_interval([])


def test_the_interval_covers_as_often_as_it_says() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        rates = rng.beta(0.6, 0.6, 30)
        solved = rng.binomial(8, rates)
        low, high = pass_rate_interval([(8, int(c)) for c in solved])
        hits += low <= 0.5 <= high
    assert 0.93 <= hits / 1000 <= 0.97
