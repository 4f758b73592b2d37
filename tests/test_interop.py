"""An environment in other libraries: TRL's reward functions and data sets."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import rlrf
from rlrf import InfraError, MissingDependencyError, Outcome, Task, UsageError
from rlrf.wrappers import DropFeedback
from tests.environments_for_tests import AsyncEcho, Echo, Gate, Guess


class Fails(Echo):
    def grade(self, task, completion):
        if completion == "broken":
            raise InfraError("the judge is away", kind="judge_unavailable", retryable=False)
        return super().grade(task, completion)


def said(*texts):
    return [[rlrf.assistant(text)] for text in texts]


@pytest.mark.parametrize("env", [Fails(), DropFeedback(Fails(feedback="none"))])
def test_rewards_are_in_order_and_none_where_nothing_could_be_scored(env):
    reward = env.as_reward_func()
    ids = ["train-no", "train-no", "train-yes", "eval-so", "train-no"]
    texts = ("no", "yes", "yes", "so", "broken")
    columns = {"completion_ids": [[1]] * 5, "metadata": [{}] * 5, "trainer_state": None}
    prompts = [[rlrf.user("x")]] * 5
    wanted = [1.0, 0.0, 1.0, 1.0, None]
    for completions in (list(texts), said(*texts)):
        given = {"prompts": prompts, "completions": completions, "task_id": ids, **columns}
        assert reward(**given) == wanted
    assert reward([], [], task_id=[]) == []


def test_the_last_message_of_the_assistant_is_the_answer():
    told = [rlrf.assistant("no"), rlrf.user("sure?"), {**rlrf.assistant("yes"), "tool_calls": None}]
    assert AsyncEcho().as_reward_func()(["x"], [told], task_id=["train-yes"]) == [1.0]


def test_a_failed_grade_costs_itself_and_is_tried_again(caplog):
    tries = []

    class Odd(Echo):
        def grade(self, task, completion):
            tries.append(completion)
            if (completion == "once" and tries.count("once") == 1) or completion == "gone":
                raise InfraError("the judge is away")
            if completion == "bug":
                raise ZeroDivisionError
            return Outcome(float("nan") if completion == "nan" else 1.0)

    said = ["once", "gone", "bug", "nan", "x"]
    rewards = Odd().as_reward_func(retries=1)(said, said, task_id=["train-no"] * 5)
    assert rewards == [1.0, None, None, None, 1.0]
    assert (tries.count("gone"), tries.count("bug")) == (2, 1)
    assert "task train-no is left without a reward: InfraError: the judge is away" in caplog.text

    env = Gate(stuck=("t1",))
    try:
        reward = env.as_reward_func(deadline_s=0.01, retries=0)
        assert reward(["x"], ["y"], task_id=["t1"]) == [None]
    finally:
        env.close()


def test_what_no_reward_can_be_made_of():
    reward = Echo().as_reward_func(max_concurrency=1)
    assert reward.__name__ == "Echo"
    with pytest.raises(UsageError, match=r"no column task_id.*env\.to_dataset\(\)"):
        reward(["x"], ["y"])
    with pytest.raises(UsageError, match="1 prompts, 2 completions and 1 task ids"):
        reward(["x"], ["y", "z"], task_id=["train-no"])
    with pytest.raises(rlrf.UnknownIdError, match="train-no"):
        reward(["x"], ["y"], task_id=["train-on"])
    for none in ([rlrf.user("x")], 5, []):
        with pytest.raises(UsageError, match="a completion is"):
            reward(["x"], [none], task_id=["train-no"])
    with pytest.raises(UsageError, match="one-shot"):
        Guess().as_reward_func()

    class Wrong(Echo):
        def grade(self, task, completion):
            return None

    with pytest.raises(UsageError, match="returned None"):
        Wrong().as_reward_func()(["x"], ["y"], task_id=["train-no"])


def test_its_name_is_the_environments(registered):
    assert rlrf.make("format-rules-v0").as_reward_func().__name__ == "format-rules-v0"


class Noted(Echo):
    def __init__(self, notes, **kwargs):
        super().__init__(**kwargs)
        self.notes = notes

    def load_tasks(self, split):
        return [
            Task(f"{split}-{i}", f"{split} {i}", note, hidden="secret")
            for i, note in enumerate(self.notes)
        ]


@pytest.fixture
def rows(monkeypatch):
    """A ``datasets`` that hands back its rows; a key of mappings has one type, as in Arrow."""

    def from_list(rows):
        found = [r["metadata"] for r in rows]
        if len({tuple(map(type, m.values())) for m in found if isinstance(m, dict)}) > 1:
            raise TypeError("mixed")
        return rows

    fake = SimpleNamespace(Dataset=SimpleNamespace(from_list=from_list))
    monkeypatch.setitem(sys.modules, "datasets", fake)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("notes", "column"),
    [
        ([{"n": 1}, {"n": 2}], [{"n": 1}, {"n": 2}]),
        ([{"n": 1}, {"n": "two"}], ['{"n": 1}', '{"n": "two"}']),
        ([{"n": 1}, {}], ['{"n": 1}', "{}"]),
        ([{}, {}], ["{}", "{}"]),
    ],
)
def test_a_data_set_has_the_tasks_and_nothing_hidden(notes, column):
    made = Noted(notes).to_dataset("eval")
    assert [row["metadata"] for row in made] == column
    assert [row["task_id"] for row in made] == ["eval-0", "eval-1"]
    assert made[0]["prompt"] == [{"role": "user", "content": "eval 0"}]
    assert set(made[0]) == {"prompt", "task_id", "metadata"}
    assert "secret" not in str(made)
    assert Noted(notes).to_dataset()[0]["task_id"] == "train-0"


def test_a_data_set_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install datasets$"):
        Echo().to_dataset()
