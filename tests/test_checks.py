"""One check alone, what is tried, hooks that do not come back, reports, what an evaluation says."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest

import rlrf
from rlrf import Outcome, Rollout, UsageError
from rlrf.evaluate import EvalReport
from rlrf.testing import CheckReport, CheckResult, check_env, check_eval
from rlrf.testing.statistics import read_eval
from tests.environments_for_tests import Echo


class Consolation(Echo):
    def grade(self, task, completion):
        outcome = super().grade(task, completion)
        return Outcome(max(outcome.reward, 0.1), outcome.feedback)


# --- time -----------------------------------------------------------------------------------------


class Stuck(Echo):
    """A hook waits for something that never comes."""

    splits = ("train",)
    hook = "grade"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.never = threading.Event()

    def _wait(self, hook):
        if hook == self.hook:
            self.never.wait()

    def load_tasks(self, split):
        self._wait("load_tasks")
        return super().load_tasks(split)

    def grade(self, task, completion):
        self._wait("grade")
        return super().grade(task, completion)

    def reference_solution(self, task):
        self._wait("reference_solution")
        return super().reference_solution(task)


class Blocks(Stuck):
    """It even blocks the event loop."""

    async def grade(self, task, completion):
        self.never.wait(5)
        return Outcome(0.0)


@pytest.mark.parametrize("hook", ["load_tasks", "grade", "reference_solution"])
def test_a_stuck_hook_is_named_once_and_left_behind(hook):
    env = Stuck()
    env.hook = hook
    report = check_env(env, deadline_s=0.02)
    env.never.set()
    (failed,) = report.failed
    assert failed.id in ("runtime.hooks_return", "runtime.tasks_unique_ids")
    assert hook.replace("grade", "a hook of task 'train-yes', attempt ''") in failed.detail
    assert "within 0.02 s" in failed.detail
    later = report.results[report.results.index(failed) + 1 :]
    assert {r.status for r in later} == {"skip"}
    assert all("not looked at" in r.detail for r in later)


def test_a_hook_that_blocks_the_event_loop_is_left_behind_with_the_loop():
    env = Blocks()
    report = check_env(env, tasks=1, deadline_s=0.05)
    env.never.set()
    assert [r.id for r in report.failed] == ["runtime.hooks_return"]
    assert check_env(Echo(), tasks=1).ok


def test_tasks_that_cannot_be_had_are_told_of_once():
    asked = []

    class Away(Echo):
        def load_tasks(self, split):
            asked.append(split)
            raise UsageError("the data is elsewhere")

    report = check_env(Away())
    assert [r.id for r in report.failed] == ["runtime.tasks_unique_ids"]
    assert "the data is elsewhere" in report.failed[0].detail
    assert len(asked) <= 2


def test_a_deadline_is_positive():
    with pytest.raises(UsageError, match="deadline_s is 0"):
        check_env(Echo(), deadline_s=0)


# --- one check alone, what is tried ---------------------------------------------------------------


def test_one_check_may_be_called_alone():
    assert rlrf.testing.check_oracle_max(Echo(), tasks=1).status == "pass"
    with pytest.raises(AssertionError, match=r"semantic.floor_gap: task 'train-yes': the no-op"):
        rlrf.testing.check_floor_gap(Consolation())
    assert rlrf.testing.check_split_disjoint(Stuck()).status == "skip"
    named = {getattr(rlrf.testing, n) for n in rlrf.testing.__all__ if n.startswith("check_")}
    assert {c for c in named if isinstance(c, rlrf.testing.Check)} == set(rlrf.testing.ALL)


def test_tasks_may_be_named():
    seen = set()

    class Seen(Echo):
        def grade(self, task, completion):
            seen.add(task.id)
            return super().grade(task, completion)

    assert check_env(Seen(), tasks=["eval-no", "train-so"]).failed == ()
    # Gymnasium's checker and the checks of info draw their own.
    (isolated,) = {t for t in seen if t.startswith("eval")}
    assert isolated == "eval-no"
    with pytest.raises(rlrf.UnknownIdError, match="eval-nope"):
        check_env(Seen(), tasks="eval-nope")


def test_what_raises_only_the_second_time_is_told():
    class Twice(Echo):
        seen = Counter()

        def grade(self, task, completion):
            self.seen[task.id, completion] += 1
            if self.seen[task.id, completion] == 2:
                raise KeyError("again")
            return super().grade(task, completion)

    failed = check_env(Twice(), tasks=1).failed
    assert [r.id for r in failed] == ["semantic.verifier_determinism"]
    assert "tried again it raises KeyError: 'again'" in failed[0].detail


def test_the_report_is_openenvs():
    report = check_env(Consolation(), tasks=1)
    data = report.to_dict()
    assert (data["verdict"], report.verdict) == ("fail", "fail")
    (gap,) = (r for r in data["results"] if r["check_id"] == "semantic.floor_gap")
    assert gap["status"] == "fail"
    assert "earns 0.1" in gap["evidence"][0]
    warned = CheckReport("x", (CheckResult("a.b", "warn", "hm"),))
    assert warned.ok
    assert warned.verdict == "warn"
    assert warned.to_dict()["results"][0] | {"duration_s": 0} == {
        "check_id": "a.b",
        "status": "fail",
        "severity": "warn",
        "measured": {},
        "evidence": ["hm"],
        "duration_s": 0,
    }
    assert not CheckReport("x", warned.results, strict=True).ok


# --- what an evaluation says ----------------------------------------------------------------------


def evaluated(*groups):
    """A report of tasks whose attempts earned so."""
    rollouts = [
        Rollout(task_id=f"t{i}", group_id=f"t{i}", reward=reward, solved=reward == 1.0)
        for i, rewards in enumerate(groups)
        for reward in rewards
    ]
    return EvalReport.of(rollouts)


@pytest.mark.parametrize(
    ("groups", "statuses"),
    [
        (((0, 1), (1, 1), (0, 0)), ("pass", "pass", "pass")),
        (((0, 0), (0, 0)), ("warn", "pass", "warn")),
        (((0, 0.5), (0, 0)), ("warn", "pass", "pass")),
        (((1, 1),) * 20, ("pass", "warn", "warn")),
        (((0,), (1,)), ("pass", "pass", "skip")),
        (((None, None), (None,)), ("skip", "skip", "skip")),
    ],
)
def test_what_a_policy_can_learn(groups, statuses):
    results = check_eval(evaluated(*groups))
    assert [r.id.partition(".")[2] for r in results] == [
        "reward_reachability",
        "headroom",
        "training_signal",
    ]
    assert tuple(r.status for r in results) == statuses, results
    assert all(r.measured for r in results if r.status in ("pass", "warn"))


def test_an_evaluation_is_read_or_refused_by_name(tmp_path):
    file = tmp_path / "eval.json"
    data = {"env": "a-v0", **evaluated((0, 1)).to_dict(rollouts=True)}
    file.write_text(json.dumps(data))
    assert read_eval(file, "a-v0").pass_rate == 0.5
    assert check_eval(file)[0].status == "pass"
    with pytest.raises(UsageError, match="of 'a-v0', not of 'b-v0'"):
        read_eval(file, "b-v0")
    for text in ("[]", "{", '{"rollouts": [1]}', ""):
        file.write_text(text)
        with pytest.raises(UsageError, match="is no evaluation"):
            read_eval(file)
    with pytest.raises(UsageError, match="cannot read the evaluation"):
        read_eval(tmp_path / "none.json")
