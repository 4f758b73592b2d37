"""Ablations: the same tasks and rewards, another feedback, on every path."""

from __future__ import annotations

import asyncio

import pytest

import rlrf
from rlrf import Feedback, Outcome, Segment, Task, UsageError
from rlrf.wrappers import (
    DropFeedback,
    FeedbackLevel,
    FeedbackWrapper,
    ShuffleFeedback,
    TruncateFeedback,
)
from tests.environments_for_tests import Echo, Recorder


class Sums(rlrf.SingleTurnEnv):
    """Feedback that names its own task."""

    def load_tasks(self, split):
        return [Task(f"{split}-{n}", f"({split}) What is {n} + 1?", hidden=n) for n in range(6)]

    def grade(self, task, completion):
        if completion == str(task.hidden + 1):
            return Outcome(1.0)
        span = (0, min(1, len(completion)))
        return Outcome(
            0.0,
            Feedback(
                (
                    Segment("wrong_answer", f"Task {task.hidden} wants another.", span=span),
                    Segment("hint", "Count up."),
                )
            ),
        )


class Chat(rlrf.MultiTurnEnv):
    """Never ends by itself."""

    def load_tasks(self, split):
        return [Task("t", "Hi.")]

    def start(self, task):
        return None

    def respond(self, state, action):
        return rlrf.Turn("Go on.", 0.0, Feedback.of("hint", "Say more, please."))


def paths(env, attempt="wrong", task="train-2"):
    """The feedback of one attempt by grade, by step and by rollout."""
    env.reset(options={"task_id": task})
    stepped = env.step(attempt)
    graded = env.grade(task, attempt)
    (rolled,) = rlrf.rollout(env, rlrf.ScriptedPolicy(lambda m: attempt), [task])
    assert stepped[1] == graded.reward == rolled.reward
    assert stepped[4]["feedback"] == graded.feedback == rolled.feedback[-1]
    return graded.reward, graded.feedback


def test_level():
    assert paths(FeedbackLevel(Sums(), "category"))[1].text == (
        "The answer is wrong.\n\nThere is a hint."
    )
    lower = Sums(feedback="none")
    assert not paths(FeedbackLevel(lower, "explained"))[1]  # a wrapper never shows more


def test_drop():
    assert paths(DropFeedback(Sums())) == (0.0, Feedback())
    for kinds in ("hint", ["hint"]):
        assert paths(DropFeedback(Sums(), kinds=kinds))[1].kinds == ("wrong_answer",)
    assert paths(DropFeedback(Sums(), probability=0.0))[1].kinds == ("wrong_answer", "hint")
    half = DropFeedback(Sums(), probability=0.5)
    kept = [bool(half.grade("train-2", f"attempt {i}").feedback) for i in range(60)]
    assert 15 < sum(kept) < 45
    assert kept == [bool(half.grade("train-2", f"attempt {i}").feedback) for i in range(60)]
    with pytest.raises(UsageError, match="unknown feedback kind 'oops'"):
        DropFeedback(Sums(), kinds=["oops"])
    with pytest.raises(UsageError, match="probability"):
        DropFeedback(Sums(), probability=2)


def test_shuffle_shows_another_tasks_feedback():
    shuffled = ShuffleFeedback(Sums())
    told = paths(shuffled)[1]
    assert told.kinds == ("wrong_answer", "hint")
    assert "Task 2 " not in told.text
    assert told.spans == ()
    assert told == paths(ShuffleFeedback(Sums()))[1]
    assert paths(shuffled, "3") == (1.0, Feedback())  # what passes has nothing to shuffle
    others = {ShuffleFeedback(Sums(), seed=s).grade("train-2", "x").feedback.text for s in range(9)}
    assert len(others) > 2
    with pytest.raises(UsageError, match="one-shot"):
        ShuffleFeedback(Chat())


def test_truncate():
    told = paths(TruncateFeedback(Sums(), 10))[1]
    assert all(len(s.text) <= 10 for s in told)
    with pytest.raises(UsageError, match="max_chars"):
        TruncateFeedback(Sums(), 0)


def test_they_compose_and_leave_the_rest_alone():
    inner = Sums(split="eval")
    wrapped = DropFeedback(FeedbackLevel(inner, "explained"), kinds=["hint"])
    assert wrapped.tasks().ids() == inner.tasks().ids()
    assert wrapped.split == "eval"
    assert wrapped.grade("eval-1", "2").reward == 1.0
    assert wrapped.grade("eval-1", "x").feedback.kinds == ("wrong_answer",)
    wrapped.close()


def test_several_turns():
    env = DropFeedback(Chat(max_turns=2))
    env.reset(seed=0)
    assert not env.step("x")[4]["feedback"]
    assert env.step("x")[3] is True
    with pytest.raises(UsageError, match="several turns"):
        env.grade("t", "x")


def test_a_wrapper_is_its_environment_in_all_but_feedback():
    class Tools(Chat):
        tools = ({"type": "function", "function": {"name": "f"}},)
        splits = ("train", "validation", "test")
        reward_range = (-1.0, 2.0)
        success_threshold = 0.5
        closed = 0

        async def aclose(self):
            self.closed += 1

    inner = Tools(max_turns=1, split="validation", feedback="category")
    wrapped = TruncateFeedback(DropFeedback(inner, probability=0.0), 50)
    assert wrapped.splits == inner.splits
    assert (wrapped.reward_range, wrapped.success_threshold) == ((-1.0, 2.0), 0.5)
    assert wrapped.split == "validation"
    assert wrapped.feedback_level == inner.feedback_level
    assert wrapped.observation_space == inner.observation_space
    policy = Recorder()
    (rollout,) = rlrf.rollout(wrapped, policy, ["t"])
    assert policy.prompts[0].tools == Tools.tools
    assert rollout.feedback[0].text == "There is a hint." or not rollout.feedback[0]
    with pytest.raises(UsageError, match="'validation'"):
        wrapped.reset(options={"split": "eval"})
    assert "DropFeedback" in repr(wrapped)
    asyncio.run(wrapped.aclose())
    assert inner.closed == 1


def test_text_and_message_are_one_attempt():
    half = DropFeedback(Sums(), probability=0.5)
    for i in range(30):
        paths(half, f"attempt {i}")  # grade and step are given text, rollout gives a message


@pytest.mark.parametrize("level", list(rlrf.Level))
@pytest.mark.parametrize("inner", list(rlrf.Level))
def test_a_level_wrapper_shows_the_lower_level(inner, level):
    shown = paths(FeedbackLevel(Echo(feedback=inner), level), attempt="wrong", task="train-no")[1]
    assert shown == Echo(feedback=min(inner, level)).grade("train-no", "wrong").feedback


def test_shuffling_needs_two_tasks_and_something_to_say():
    class Lone(Sums):
        def load_tasks(self, split):
            return super().load_tasks(split)[:1]

    with pytest.raises(UsageError, match="at least two tasks"):
        ShuffleFeedback(Lone()).grade("train-0", "x")

    class Quiet(Sums):
        def grade(self, task, completion):
            return super().grade(task, completion) if task.id == "train-2" else Outcome(0.0)

    assert not ShuffleFeedback(Quiet()).grade("train-2", "x").feedback


def test_tokens_are_those_of_what_is_shown(tokenizer):
    env = FeedbackLevel(Sums(tokenizer=tokenizer), "category")
    env.reset(options={"task_id": "train-1"})
    assert env.step("x").info["feedback_tokens"].text.endswith("wrong.\n\nThere is a hint.")


def test_the_reference_solution_is_the_inner_one():
    wrapped = DropFeedback(Echo())
    assert wrapped.reference_solution(wrapped.tasks()[1]) == "no"
    wrapped.reset(seed=0)
    with pytest.raises(UsageError, match="an action is"):
        wrapped.step(3)


def test_a_transform_that_exits_costs_its_own_rollout():
    class Exits(FeedbackWrapper):
        async def transform(self, feedback, task, action, rng):
            if task.id == "train-2":
                raise SystemExit(3)
            return feedback

    found = rlrf.rollout(Exits(Sums()), Recorder())
    assert [r.scored for r in found] == [True, True, False, True, True, True]
    assert found[2].failure == "env_error: RuntimeError: a hook raised SystemExit(3)"
