"""Environments: both faces, hooks of every kind, and what each mistake is told."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import numpy as np
import pytest

import rlrf
from rlrf import Feedback, InfraError, Outcome, Task, Turn, UsageError
from tests.environments_for_tests import AsyncEcho, Echo, Guess


@pytest.mark.parametrize("cls", [Echo, AsyncEcho])
def test_one_shot_episode_and_grade(cls):
    env = cls()
    observation, info = env.reset(seed=0, options={"task_id": "train-no"})
    assert observation == ({"role": "user", "content": "train: say no."},)
    assert info == {"task_id": "train-no", "feedback": Feedback(), "metrics": {}}
    observation, reward, terminated, truncated, info = env.step("no")
    assert (observation, reward, terminated, truncated) == ((), 1.0, True, False)
    assert info["metrics"] == {"length": 2}
    reward, feedback = env.grade("eval-yes", "no")
    assert (reward, feedback.kinds) == (0.0, ("wrong_answer", "lint"))
    assert env.grade("eval-yes", {"role": "assistant", "content": "yes"}).reward == 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokenizer": 5}, r"tokenizer is 5 \(int\); it must be a tokenizer"),
        ({"tokenizer": "gpt2"}, "tokenizer is 'gpt2'"),
        ({"max_feedback_tokens": -5}, "max_feedback_tokens is -5; it must be a whole number >= 0"),
        ({"max_feedback_tokens": "x"}, "max_feedback_tokens is 'x'"),
    ],
)
def test_options_of_every_environment_are_checked(options, told):
    with pytest.raises(UsageError, match=told):
        Echo(**options)


@pytest.mark.parametrize("turns", [0, "x", 1.5])
def test_turns_are_a_whole_number(turns):
    with pytest.raises(UsageError, match=r"max_turns is .*; it must be a whole number >= 1"):
        Guess(max_turns=turns)


def test_async_face_inside_a_running_loop():
    async def go():
        env = AsyncEcho()
        await env.areset(seed=1)
        result = await env.astep("x")
        assert result.reward == 0.0
        assert (await env.agrade("train-so", "so")).reward == 1.0
        assert env.grade("train-so", "so").reward == 1.0  # sync, from inside a loop
        await env.aclose()

    asyncio.run(go())


def test_feedback_level_is_applied_on_every_path():
    env = Echo(feedback="category")
    assert env.grade("train-no", "x").feedback.text == "The answer is wrong."
    env.reset(seed=0)
    assert env.step("x")[4]["feedback"].text == "The answer is wrong."
    assert not Echo(feedback="none").grade("train-no", "x").feedback


def test_hidden_data_is_never_handed_out():
    env = Echo()
    for task in env.tasks():
        assert task.hidden is None
    assert "hidden" not in repr(env._find_task("train-no"))
    assert env.tasks("eval").ids() == ["eval-yes", "eval-no", "eval-so"]
    assert env.tasks()[1:] == [env.tasks()[1], env.tasks()[2]]
    assert env.grade(env.tasks()[1], "no").reward == 1.0  # a public task will do


def test_observations_do_not_share_memory():
    env = Echo()
    first, _ = env.reset(seed=0)
    first[0]["content"] = "spoilt"
    assert env.reset(seed=0)[0][0]["content"] != "spoilt"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.step("x"), "before reset"),
        (lambda e: e.reset(options={"task_id": "train-yess"}), "'train-yes'"),
        (lambda e: e.reset(options={"tsk": 1}), "'task_id', 'split'"),
        (lambda e: e.reset(options={"split": "test"}), "'train', 'eval'"),
        (lambda e: (e.reset(seed=0), e.step("x"), e.step("x")), "has ended"),
        (lambda e: (e.reset(seed=0), e.step(3)), "an action is"),
        (lambda e: Echo(split="dev"), "splits are"),
        (lambda e: Echo(feedback="loud"), "levels are"),
        (lambda e: Outcome(float("nan")), "InfraError"),
        (lambda e: Outcome(None), "finite"),
        (lambda e: Task("", "x"), "non-empty"),
        (lambda e: Task("x", [{"role": "nobody", "content": "x"}]), "role"),
    ],
)
def test_wrong_use_is_named_with_its_remedy(call, words):
    with pytest.raises(UsageError, match=words):
        call(Echo())


def test_duplicate_and_missing_tasks():
    class Twice(Echo):
        def load_tasks(self, split):
            return [Task("a", "x"), Task("a", "y")]

    with pytest.raises(UsageError, match="two tasks have the id 'a'"):
        Twice().tasks().ids()

    class Nothing(Echo):
        def load_tasks(self, split):
            return []

    with pytest.raises(UsageError, match="no task in split 'train'"):
        Nothing().reset(seed=0)


def test_a_grader_must_return_an_outcome():
    class Bare(Echo):
        def grade(self, task, completion):
            return 1.0

    with pytest.raises(UsageError, match=r"rlrf\.Outcome"):
        Bare().grade("train-no", "x")

    class NoGrade(rlrf.SingleTurnEnv):
        def load_tasks(self, split):
            return [Task("a", "x")]

    with pytest.raises(UsageError, match=r"NoGrade must define grade\(self, task, completion\)"):
        NoGrade()


def test_several_turns():
    env = Guess(max_turns=3)
    env.reset(seed=3, options={"task_id": "train-0"})
    results = [env.step("x") for _ in range(3)]
    assert [r[3] for r in results] == [False, False, True]
    assert [r[4]["feedback"][0].text for r in results] == [f"Not it ({i})." for i in (1, 2, 3)]
    assert results[0][0] == ({"role": "user", "content": "Again."},)

    def number(seed):
        episode = asyncio.run(env.aepisode("train-0", seed=seed))
        return episode._state.inner["number"]

    assert number(5) == number(5)
    assert len({number(s) for s in range(12)}) > 1
    with pytest.raises(UsageError, match="max_turns"):
        Guess(max_turns=0)


def test_an_episode_that_is_cut_is_told_so_and_what_was_left():
    class Left(Guess):
        async def truncation_feedback(self, state):
            return Feedback.of("hint", f"After {state['tries']} tries the number is open.")

    def last(env):
        env.reset(seed=3, options={"task_id": "train-0"})
        while not (result := env.step("x")).truncated:
            assert "truncated_attempt" not in result.info["feedback"].kinds
        return result.info["feedback"]

    assert last(Guess(max_turns=2)).kinds == ("wrong_answer", "truncated_attempt")
    assert "after 2 turns" in last(Guess(max_turns=2))[1].text
    assert last(Left(max_turns=2))[2].text == "After 2 tries the number is open."
    assert last(Guess())[0].text == "Not it (32)."  # none runs on for ever
    assert Guess(max_turns=None).max_turns is None

    class Says(Guess):
        def truncation_feedback(self, state):
            return "Hurry."

    with pytest.raises(UsageError, match=r"truncation_feedback returned 'Hurry.'"):
        last(Says(max_turns=1))


def test_an_episode_that_is_solved_or_ended_is_not_said_to_be_cut():
    class Pays(Guess):
        def respond(self, state, action):
            return Turn("More?", 1.0)

    class Gives(Guess):
        def respond(self, state, action):
            return Turn("No more.", truncated=True)

    for env in (Pays(max_turns=1), Gives(max_turns=1)):
        env.reset(seed=0)
        result = env.step("x")
        assert result.truncated
        assert not result.info["feedback"]


def test_infrastructure_failures_pass_through():
    class Broken(Echo):
        def grade(self, task, completion):
            raise InfraError("the judge is away", kind="judge_unavailable")

    with pytest.raises(InfraError, match="judge is away"):
        Broken().grade("train-no", "x")


def test_feedback_tokens():
    pytest.importorskip("transformers")
    from tests.tiny_model import tiny_tokenizer

    env = Echo(tokenizer=tiny_tokenizer(), max_feedback_tokens=12)
    env.reset(seed=0)
    tokens = env.step("x")[4]["feedback_tokens"]
    assert 0 < len(tokens) <= 12
    assert tokens.truncated


def test_grading_touches_no_episode():
    env = Echo()
    env.reset(seed=0, options={"task_id": "train-no"})
    env.grade("train-yes", "x")
    assert env.step("no").reward == 1.0


def test_metadata_is_public_and_the_public_task_is_enough_to_act_on():
    env = Echo(split="eval")
    (task, *_) = env.tasks()
    assert task.metadata == {"n": 1}
    assert env.reset(options={"task_id": task.id})[1]["task_id"] == "eval-yes"
    # An id of another split is found too; the environment's own comes first.
    assert env.reset(options={"task_id": "train-no"})[1]["task_id"] == "train-no"
    assert env.reset(seed=0, options={"split": "train"})[1]["task_id"].startswith("train-")
    assert env.reset(seed=0)[1]["task_id"].startswith("eval-")


def test_tasks_are_loaded_once_and_late():
    loads = []

    class Counted(Echo):
        def load_tasks(self, split):
            loads.append(split)
            return super().load_tasks(split)

    env = Counted()
    tasks = env.tasks()
    assert loads == []
    assert "not loaded" in repr(tasks)
    assert len(tasks) == 3
    assert "3 tasks" in repr(tasks)
    env.grade("train-no", "x")
    env.tasks().get("train-no")
    assert loads == ["train"]
    assert env.tasks().get("nobody") is None


def test_an_ad_hoc_task_is_graded_with_what_it_hides():
    class Sync(rlrf.SingleTurnEnv):
        def load_tasks(self, split):
            return [Task("a", "x")]

        def grade(self, task, completion):
            return Outcome(float(completion == task.hidden))

    (rollout,) = rlrf.rollout(
        Sync(), rlrf.ScriptedPolicy(lambda m: "ho"), [Task("new", "Say ho.", hidden="ho")]
    )
    assert (rollout.task_id, rollout.reward) == ("new", 1.0)


def test_the_reset_seed_decides_the_task_and_the_episode():
    env = Guess()

    def opened(seed):
        _, info = env.reset(seed=seed)
        return info["task_id"], env._episode._state.inner["number"]

    assert [opened(s) for s in range(12)] == [opened(s) for s in range(12)]
    assert len({opened(s)[0] for s in range(12)}) == 3
    assert len({opened(s)[1] for s in range(12)}) > 3


def test_a_failed_reset_leaves_no_old_episode():
    env = Echo()
    env.reset(seed=0)
    with pytest.raises(rlrf.UnknownIdError):
        env.reset(options={"task_id": "nobody"})
    with pytest.raises(UsageError, match="before reset"):
        env.step("x")


def test_hooks_may_come_from_a_mixin_a_decorator_or_a_parent():
    class Grader:
        def grade(self, task, completion):
            return Outcome(0.5)

    class Mixed(Grader, Echo):
        pass

    env = Mixed()
    env.reset(seed=0)
    assert env.grade("train-no", "x").reward == env.step("x").reward == 0.5
    assert asyncio.run(env.agrade("train-no", "x")).reward == 0.5

    class Doubled(AsyncEcho):
        async def grade(self, task, completion):
            outcome = await super().grade(task, completion.lower())
            return Outcome(outcome.reward / 2, outcome.feedback)

    assert Doubled(feedback="binary").grade("train-no", "NO").reward == 0.5
    assert Doubled(feedback="binary").grade("train-no", "X").feedback.text == (
        "The attempt is not correct."
    )


@pytest.mark.parametrize("make", [Echo, AsyncEcho])
def test_grade_is_the_users_also_with_a_task_of_his_own(make):
    """Never a coroutine, never unmasked: whole tasks are the user's too."""
    env = make(feedback="binary")
    outcome = env.grade(Task("mine", "Say ho.", hidden="ho"), {"content": "hu"})
    assert outcome.feedback.text == "The attempt is not correct."
    assert env.grade(Task("mine", "Say ho.", hidden="ho"), "ho").reward == 1.0


def test_the_hook_is_what_the_class_says_when_it_is_called(monkeypatch):
    env = Echo()
    monkeypatch.setattr(Echo, "grade", lambda self, task, completion: Outcome(0.25))
    assert env.grade("train-no", "no").reward == 0.25
    assert copy.deepcopy(AsyncEcho(feedback="none")).grade("train-no", "x").feedback == Feedback()


def test_sync_hooks_run_beside_each_other_and_off_the_loop():
    """Two hooks that wait for one another can only end if both run."""
    barrier = threading.Barrier(2, timeout=60)

    class Meet(Echo):
        def grade(self, task, completion):
            barrier.wait()
            return Outcome(1.0)

    async def go():
        env = Meet()
        return await asyncio.gather(env.agrade("train-no", "x"), env.agrade("train-so", "x"))

    assert [o.reward for o in asyncio.run(go())] == [1.0, 1.0]


def test_a_hook_that_exits_is_an_error_and_not_the_end():
    class Exit(Echo):
        def grade(self, task, completion):
            raise SystemExit(3) if completion == "exit" else StopIteration

    for attempt in ("exit", "stop"):
        with pytest.raises(RuntimeError, match=r"SystemExit|StopIteration"):
            Exit().grade("train-no", attempt)
    assert Echo().grade("train-no", "no").reward == 1.0  # the background loop is alive


def test_sync_from_inside_an_async_hook_is_refused():
    class Nested(Echo):
        async def grade(self, task, completion):
            return Echo().grade("train-no", "no")

    with pytest.raises(RuntimeError, match="async twin"):
        Nested().grade("train-no", "x")


def test_closing_twice_is_fine():
    env = Echo()
    env.close()
    env.close()
    asyncio.run(env.aclose())


def test_a_task_that_is_neither_id_nor_task():
    with pytest.raises(UsageError, match="given by its id"):
        Echo().reset(options={"task_id": 3})


@pytest.mark.parametrize("wrong", [None, "text", [Feedback()]])
def test_feedback_must_be_feedback(wrong):
    with pytest.raises(UsageError, match=r"Feedback\.of"):
        Outcome(0.0, wrong)
    with pytest.raises(UsageError, match=r"Feedback\.of"):
        Turn("x", 0.0, wrong)


@pytest.mark.parametrize(
    ("base", "hook", "told"),
    [
        (Echo, {"grade": lambda self, completion: 1}, r"grade is called as \(task, completion\)"),
        (Echo, {"load_tasks": lambda self: []}, r"load_tasks is called as \(split\), but takes"),
        (Echo, {"reference_solution": lambda self: ""}, "reference_solution is called as"),
        (Guess, {"start": lambda self, rng: 1}, r"start is called as \(task, rng\)"),
        (Guess, {"respond": lambda self, state: 1}, r"respond is called as \(state, action\)"),
        (Guess, {"truncation_feedback": lambda self: 1}, r"is called as \(state\)"),
    ],
)
def test_a_hook_that_cannot_be_called_is_told_when_the_environment_is_made(base, hook, told):
    with pytest.raises(UsageError, match=told):
        type("Odd", (base,), hook)()


def test_turns_are_checked_too():
    with pytest.raises(UsageError, match="InfraError"):
        Turn("x", float("inf"))
    assert Turn("x").messages == ({"role": "user", "content": "x"},)

    class Bare(Guess):
        def respond(self, state, action):
            return "Again."

    env = Bare()
    env.reset(seed=0)
    with pytest.raises(UsageError, match=r"rlrf\.Turn"):
        env.step("x")

    class Nothing(rlrf.MultiTurnEnv):
        def load_tasks(self, split):
            return [Task("a", "x")]

    with pytest.raises(UsageError, match=r"must define start\(self, task\)"):
        Nothing()
    Nothing.start = lambda self, task: None
    with pytest.raises(UsageError, match=r"must define respond\(self, state, action\)"):
        Nothing()


def test_the_last_allowed_turn_may_also_solve():
    env = Guess(max_turns=1)
    env.reset(seed=3)
    number = env._episode._state.inner["number"]
    result = env.step(str(number))
    assert (result.terminated, result.truncated, result.reward) == (True, False, 1.0)


def test_what_an_env_answers_can_be_copied_and_sent():
    env = Echo()
    env.reset(seed=0)
    info = env.step("x").info
    assert copy.deepcopy(info) == info == pickle.loads(pickle.dumps(info))
    outcome = env.grade("train-no", "x")
    assert pickle.loads(pickle.dumps(outcome)) == outcome
    assert "feedback=explained" in repr(env)


def test_unknown_ids_do_not_print_a_whole_data_set():
    class Many(Echo):
        def load_tasks(self, split):
            return [Task(f"{split}-{i:05d}", "x") for i in range(3000)]

    with pytest.raises(rlrf.UnknownIdError, match="and 1970 more") as caught:
        Many().grade("?", "x")
    assert len(str(caught.value)) < 1000


def test_rewards_may_be_numpy_numbers():
    assert type(Outcome(np.float32(0.5)).reward) is float


@pytest.mark.parametrize("made", [{"train": [1]}, {"eval": [1]}])
def test_a_table_of_splits_need_not_have_all(made):
    class Table(rlrf.SingleTurnEnv):
        def load_tasks(self, split):
            return [rlrf.Task(f"{split}-{n}", "Say it.") for n in made[split]]

        def grade(self, task, completion):
            return rlrf.Outcome(1.0)

    env = Table()
    (there,) = made
    (missing,) = {"train", "eval"} - {there}
    assert len(env.tasks(there)) == 1
    assert env.grade(f"{there}-1", "it").reward == 1
    with pytest.raises(UsageError, match=f"has no task in split '{missing}'"):
        len(env.tasks(missing))


def test_another_missing_key_is_a_mistake_of_the_environment():
    class Broken(rlrf.SingleTurnEnv):
        def load_tasks(self, split):
            return {}["tasks"]

        def grade(self, task, completion):
            return rlrf.Outcome(1.0)

    with pytest.raises(KeyError, match="tasks"):
        len(Broken().tasks("train"))
