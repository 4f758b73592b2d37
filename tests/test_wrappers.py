"""Ablations: the same tasks and rewards, another feedback, on every path."""

from __future__ import annotations

import pytest

import rlrf
from rlrf import Feedback, Outcome, Segment, Task, UsageError
from rlrf.wrappers import DropFeedback, FeedbackLevel, ShuffleFeedback, TruncateFeedback


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


def paths(env, attempt="wrong"):
    """The feedback of one attempt by grade, by step and by rollout."""
    env.reset(options={"task_id": "train-2"})
    stepped = env.step(attempt)
    graded = env.grade("train-2", attempt)
    (rolled,) = rlrf.rollout(env, rlrf.ScriptedPolicy(lambda m: attempt), ["train-2"])
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
    assert paths(DropFeedback(Sums(), kinds=["hint"]))[1].kinds == ("wrong_answer",)
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


def test_the_conformance_suite_finds_faults():
    from rlrf.testing import check_env

    class Moody(Sums):
        calls = 0

        def grade(self, task, completion):
            Moody.calls += 1
            return Outcome(0.0, Feedback.of("hint", f"call {Moody.calls}"))

    class Silent(Sums):
        def grade(self, task, completion):
            return Outcome(0.0)

    class Generous(Sums):
        def grade(self, task, completion):
            return Outcome(2.0)

    class Loose(Sums):
        def grade(self, task, completion):
            return Outcome(0.0, Feedback.of("hint", "x", span=(0, 10**6)))

    class Leaky(Sums):
        def reference_solution(self, task):
            return f"the answer is without doubt {task.hidden + 1}"

        def grade(self, task, completion):
            right = completion == self.reference_solution(task)
            told = Feedback.of("hint", "Say: " + self.reference_solution(task))
            return Outcome(float(right), Feedback() if right else told)

    class Shared(Sums):
        def load_tasks(self, split):
            return [Task("same", "x", hidden=1)]

    for cls, failing in (
        (Moody, {"runtime.episode_determinism"}),
        (Silent, {"feedback.present_on_failure", "feedback.present_on_terminal"}),
        (Generous, {"runtime.reward_well_formed", "semantic.floor_gap"}),
        (Loose, {"feedback.spans_in_range"}),
        (Leaky, {"feedback.no_reference_leak"}),
        (Shared, {"runtime.split_disjoint"}),
    ):
        report = check_env(cls())
        failed = {r.id for r in report.results if r.status == "fail"}
        assert failing <= failed, (cls.__name__, failed)
        assert not report.ok
        with pytest.raises(AssertionError, match=sorted(failing)[0].replace(".", r"\.")):
            report.raise_if_failed()


def test_the_conformance_suite_passes_what_is_sound():
    from rlrf.testing import check_env

    class Sound(Sums):
        def reference_solution(self, task):
            return str(self._find_task(task).hidden + 1)

    report = check_env(Sound())
    assert report.ok, str(report)
    assert not [r for r in report.results if r.status == "skip" and "infra" not in r.id]
    assert "feedback.infra_is_unscored" in str(report)
    chat = check_env(Chat(max_turns=3))
    assert {r.id for r in chat.results if r.status == "fail"} <= {"runtime.split_disjoint"}


@pytest.mark.parametrize("name", ["format-rules-v0", "code-basics-v0"])
def test_our_environments_conform(name):
    import shutil

    from rlrf.testing import check_env

    if name.startswith("code") and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    tokenizer = None
    if pytest.importorskip("transformers"):
        from tests.tiny_model import tiny_tokenizer

        tokenizer = tiny_tokenizer()
    env = rlrf.make(name)
    check_env(env, tasks=2, tokenizer=tokenizer).raise_if_failed()
    env.close()
