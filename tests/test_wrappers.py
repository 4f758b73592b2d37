"""Ablations: the same tasks and rewards, another feedback, on every path."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import tomllib

import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

import rlrf
from rlrf import Feedback, Outcome, Segment, Task, UsageError
from rlrf.config import TrainConfig, build_config, load_train_config, parse_wrapper, to_toml
from rlrf.runs import environment_lock
from rlrf.wrappers import (
    DropFeedback,
    FeedbackLevel,
    FeedbackWrapper,
    ShuffleFeedback,
    TruncateFeedback,
    wrap,
    wrappers,
    wrappers_of,
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
    with pytest.raises(UsageError, match=r"shows level 'explained', but .* no more than 'none'"):
        FeedbackLevel(Sums(feedback="none"), "explained")
    with pytest.raises(UsageError, match="no more than 'category'"):
        FeedbackLevel(FeedbackLevel(Sums(), "category"), "located")
    assert FeedbackLevel(Sums(), "category").feedback_level == rlrf.Level.category


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
        eval_split = "test"
        max_tokens = 77
        overlapping_splits = True
        closed = 0

        async def aclose(self):
            self.closed += 1

    inner = Tools(max_turns=1, split="validation", feedback="category")
    wrapped = TruncateFeedback(DropFeedback(inner, probability=0.0), 50)
    assert wrapped.splits == inner.splits
    assert (wrapped.reward_range, wrapped.success_threshold) == ((-1.0, 2.0), 0.5)
    assert wrapped.split == "validation"
    assert (wrapped.eval_split, wrapped.max_tokens) == ("test", 77)
    assert wrapped.overlapping_splits
    assert wrapped.feedback_level == inner.feedback_level
    assert wrapped.observation_space == inner.observation_space
    policy = Recorder()
    (rollout,) = rlrf.rollout(wrapped, policy, ["t"])
    assert policy.prompts[0].tools == Tools.tools
    assert rollout.feedback[0].text.startswith("There is a hint.")
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
def test_a_level_wrapper_shows_that_level(inner, level):
    if level > inner:
        with pytest.raises(UsageError, match=f"make it with feedback='{level.name}'"):
            FeedbackLevel(Echo(feedback=inner), level)
        return
    shown = paths(FeedbackLevel(Echo(feedback=inner), level), attempt="wrong", task="train-no")[1]
    assert shown == Echo(feedback=level).grade("train-no", "wrong").feedback


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


# --- part of what an environment is ---------------------------------------------------------------


class Suffix(FeedbackWrapper):
    """A third party's, that says nothing of its arguments."""

    def __init__(self, env, text="!", *, words=(), **more):
        super().__init__(env)
        self.more, self.words = more, list(words)

    async def transform(self, feedback, task, action, rng):
        return feedback


class Plain(FeedbackWrapper):
    """One without a constructor of its own."""

    async def transform(self, feedback, task, action, rng):
        return feedback


def test_an_environment_names_its_wrappers_with_their_arguments(registered):
    env = FeedbackLevel(rlrf.make("test-echo-v0", shout=True), "located")
    env = DropFeedback(env, kinds=(k for k in ("lint", "hint")), probability=0.5)
    told = wrappers_of(env)
    assert told == [
        {"name": "FeedbackLevel", "level": "located"},
        {"name": "DropFeedback", "kinds": ["hint", "lint"], "probability": 0.5, "seed": 0},
    ]
    assert json.loads(json.dumps(told)) == told
    assert str(env) == repr(env)
    inner = "FeedbackLevel(<rlrf/test-echo-v0 feedback=explained split=train>, level='located')"
    assert str(env) == f"DropFeedback({inner}, kinds=['hint', 'lint'], probability=0.5, seed=0)"
    lock = environment_lock(env)["env"]
    assert lock["wrappers"] == told
    assert (lock["id"], lock["options"]) == ("test-echo-v0", {"shout": True})
    assert lock["feedback"] == "located"
    assert wrappers_of(Echo()) == []
    assert environment_lock(FeedbackLevel(Echo(), "binary"))["env"]["id"] == "Echo"


def test_an_environment_is_made_anew_from_its_spec(registered):
    env = DropFeedback(rlrf.make("test-echo-v0", shout=True), kinds="lint", seed=3)
    assert [w.name for w in env.spec.additional_wrappers] == ["DropFeedback"]
    assert env.env.spec.additional_wrappers == ()
    again = rlrf.make(env.spec)
    assert str(again) == str(env)
    assert again.grade("train-no", "x").feedback == env.grade("train-no", "x").feedback
    ours = FeedbackLevel(rlrf.make("format-rules-v0"), "binary").spec
    again = rlrf.make(EnvSpec.from_json(ours.to_json()))
    assert str(again).startswith("FeedbackLevel(<rlrf/format-rules-v0 ")
    assert DropFeedback(Echo()).spec is None


def test_what_registers_its_wrappers_names_them_too(registered):
    rlrf.register("test-binary-v0", lambda **options: FeedbackLevel(Echo(**options), "binary"))
    env = rlrf.make("test-binary-v0")
    assert env.spec.id == "rlrf/test-binary-v0"
    assert wrappers_of(env) == [{"name": "FeedbackLevel", "level": "binary"}]


def test_a_third_party_says_nothing_twice():
    env = Suffix(Sums(), words=iter("ab"), how=len, which=Sums(), some=np.int64(3))
    assert wrappers_of(env) == [
        {
            "name": "Suffix",
            "text": "!",
            "words": ["a", "b"],
            "more": {
                "how": "builtins:len",
                "which": "tests.test_wrappers:Sums",
                "some": 3,
            },
        }
    ]
    assert wrappers_of(copy.deepcopy(env)) == wrappers_of(env)
    assert wrappers_of(pickle.loads(pickle.dumps(TruncateFeedback(Echo(), 9)))) == [
        {"name": "TruncateFeedback", "max_chars": 9}
    ]
    assert wrappers_of(Plain(Sums())) == [{"name": "Plain"}]
    with pytest.raises(TypeError, match="level"):
        FeedbackLevel(Sums())


def test_wrappers_by_name(monkeypatch):
    env = wrap(Sums(), {"FeedbackLevel": {"level": "located"}, "DropFeedback": {}})
    assert [w["name"] for w in wrappers_of(env)] == ["FeedbackLevel", "DropFeedback"]
    twice = [{"name": "TruncateFeedback", "max_chars": n} for n in (90, 9)]
    assert wrappers_of(wrap(Sums(), twice)) == twice
    assert wrap(Sums(), None).spec is None
    named = wrap(Sums(), [{"name": "tests.test_wrappers:Suffix", "text": "?"}])
    assert isinstance(named, Suffix)
    monkeypatch.setitem(wrappers._added, "Suffix", "tests.test_wrappers:Suffix")
    assert isinstance(wrap(Sums(), {"Suffix": {}}), Suffix)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"FeedbackLevl": {}}, "unknown wrapper 'FeedbackLevl'. Did you mean 'FeedbackLevel'"),
        ({"FeedbackLevel": {}}, "'FeedbackLevel': missing a required argument: 'level'"),
        ({"FeedbackLevel": {"levl": 1}}, "did you mean 'level'. its arguments are level"),
        ({"FeedbackLevel": {"level": "reference"}}, "shows no more than 'explained'"),
        ({"FeedbackLevel": "binary"}, "FeedbackLevel is 'binary'; it must be a table"),
        ([{"level": "binary"}], "has no name"),
        ({"rlrf.env:SingleTurnEnv": {}}, "it must be a FeedbackWrapper"),
        ({"no.such:Thing": {}}, "cannot be imported"),
        ({"ShuffleFeedback": {"seed": 1, "env": 3}}, "multiple values for argument 'env'"),
    ],
)
def test_wrong_wrappers_are_told(given, message):
    with pytest.raises(UsageError, match=message):
        wrap(Sums(), given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ShuffleFeedback", {}),
        ("FeedbackLevel:level=binary", {"level": "binary"}),
        (
            "DropFeedback:kinds=['a', 'b'],probability=0.5",
            {"kinds": ["a", "b"], "probability": 0.5},
        ),
        ('X:text="a,b=c",n=1', {"text": "a,b=c", "n": 1}),
        ("pkg.mod:Class", {"name": "pkg.mod:Class"}),
        ("pkg.mod:Class:at=2024-08-01", {"name": "pkg.mod:Class", "at": "2024-08-01"}),
    ],
)
def test_wrappers_on_the_command_line(text, expected):
    assert parse_wrapper(text) == {"name": text.partition(":")[0], **expected}


@pytest.mark.parametrize("text", ["", ":", "FeedbackLevel:binary", "X:a=1,b", "X:=1"])
def test_what_is_no_wrapper_on_the_command_line_is_told(text):
    with pytest.raises(UsageError, match="is no wrapper; write NAME"):
        parse_wrapper(text)


def test_they_are_read_from_a_configuration():
    data = {"id": "a-v0", "shout": True, "wrap": {"FeedbackLevel": {"level": "binary"}}}
    config = build_config(TrainConfig, {"model": "m", "env": data})
    assert config.env.wrap == {"FeedbackLevel": {"level": "binary"}}
    assert config.env.options == {"shout": True}
    assert config.held_out().wrap == config.env.wrap
    again = tomllib.loads(to_toml(config.model_dump(exclude_none=True)))
    assert build_config(TrainConfig, again).env.wrap == config.env.wrap
    assert "wrap" not in to_toml(
        build_config(TrainConfig, {"model": "m", "env": {"id": "a"}}).model_dump(exclude_none=True)
    )
    set_ = ["env.id=a-v0", "model=m", "env.wrap.DropFeedback.seed=1"]
    assert load_train_config(None, set_).env.wrap == {"DropFeedback": {"seed": 1}}
    with pytest.raises(UsageError, match=r"env\.wrap"):
        build_config(TrainConfig, {"model": "m", "env": {"id": "a", "wrap": "FeedbackLevel"}})
