"""The rollout collector: order, tokens, failures, deadlines, batches."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import threading
from dataclasses import replace

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlrf
from rlrf import (
    Completion,
    Feedback,
    InfraError,
    MissingDependencyError,
    Outcome,
    PromptTooLongError,
    Rollout,
    SamplingParams,
    ScriptedPolicy,
    Task,
    Turn,
    UsageError,
)
from rlrf._async import _DaemonThreads
from rlrf._batcher import Batcher
from rlrf.errors import UnavailableError
from tests.environments_for_tests import AsyncRecorder, Bytewise, Echo, Gate, Guess, Recorder


class Words(rlrf.SingleTurnEnv):
    """Say the word; what grading does besides is the test's."""

    def __init__(self, before=None, **kwargs):
        super().__init__(**kwargs)
        self.before = before

    def load_tasks(self, split):
        return [Task(w, f"Say {w}.", hidden=w) for w in ("one", "two", "three", "four")]

    async def grade(self, task, completion):
        if self.before is not None:
            await self.before(task)
        right = completion == task.hidden
        told = Feedback() if right else Feedback.of("wrong_answer", "No.", span=(0, 2))
        return Outcome(float(right), told, {"length": len(completion)})


class Count(rlrf.MultiTurnEnv):
    """Three turns."""

    def load_tasks(self, split):
        return [Task("count", "Count.")]

    def start(self, task):
        return []

    def respond(self, state, action):
        state.append(action["content"])
        done = len(state) == 3
        return Turn("More." if not done else (), 1.0, Feedback.of("hint", str(len(state))), done)


def parrot(text="one"):
    return Bytewise(lambda messages: text)


def last_word(messages):
    return messages[-1]["content"].split()[-1].rstrip(".")


# --- what comes back --------------------------------------------------------------------------


def test_rollouts_come_in_order_with_their_groups():
    done = rlrf.rollout(Words(), ScriptedPolicy(last_word), ["two", "one", "two"], group_size=2)
    assert [r.task_id for r in done] == ["two", "two", "one", "one", "two", "two"]
    assert [r.group_id for r in done] == ["0:two"] * 2 + ["1:one"] * 2 + ["2:two"] * 2
    assert all(r.reward == 1.0 and r.solved and r.scored for r in done)
    assert done[0].metrics == {"length": 3}


def test_ids_masks_and_spans():
    (rollout,) = rlrf.rollout(
        Words(), with_offsets(parrot("nope")), ["one"], params=SamplingParams(max_tokens=9)
    )
    assert bytes(rollout.prompt_ids).decode() == "Say one."
    assert bytes(rollout.completion_ids[:-1]).decode() == "nope"
    assert rollout.completion_mask == (1,) * 5
    assert len(rollout.logprobs) == 5
    assert rollout.feedback == (Feedback.of("wrong_answer", "No.", span=(0, 2)),)
    assert rollout.spans == (((0, 2),),)
    assert rollout.finish_reason == "terminated"
    assert rollout.text == "nope"


def with_offsets(policy):
    real = policy.generate

    def generate(prompts, params):
        return [
            replace(c, offsets=tuple((i, i + 1) for i in range(len(c.token_ids))))
            for c in real(prompts, params)
        ]

    policy.generate = generate
    return policy


def test_turns_are_appended_and_never_rendered_again():
    (rollout,) = rlrf.rollout(Count(), parrot("ab"))
    text = "".join(chr(i) if i < 256 else "|" for i in rollout.completion_ids)
    assert text == "ab|More.ab|More.ab|"
    assert "".join(map(str, rollout.completion_mask)) == "111" + "00000" + "111" + "00000" + "111"
    assert rollout.reward == 3.0
    assert [f.text for f in rollout.feedback] == ["1", "2", "3"]
    assert [m["role"] for m in rollout.messages] == [
        "user",
        *["assistant", "user"] * 2,
        "assistant",
    ]


def test_a_policy_that_rewrites_the_past_is_refused():
    class Rewriter(Bytewise):
        def generate(self, prompts, params):
            done = super().generate(prompts, params)
            return [replace(c, prompt_ids=(1, 2, 3)) for c in done]

    with pytest.raises(UsageError, match="rewrote earlier tokens"):
        rlrf.rollout(Count(), Rewriter(lambda m: "x"))


def test_cut_replies_say_so():
    (rollout,) = rlrf.rollout(
        Words(), parrot("abcdef"), ["one"], params=SamplingParams(max_tokens=3)
    )
    assert rollout.finish_reason == "length"
    assert rollout.text == "abc"


def test_a_rollout_round_trips_through_json():
    for rollout in rlrf.rollout(Count(), parrot()) + rlrf.rollout(Words(), parrot()):
        assert Rollout.from_dict(rollout.to_dict()) == rollout


def test_logprobs_are_absent_as_a_whole_when_a_server_gives_none():
    class Silent(Bytewise):
        def generate(self, prompts, params):
            return [replace(c, logprobs=()) for c in super().generate(prompts, params)]

    (rollout,) = rlrf.rollout(Count(), Silent(lambda m: "x"))
    assert rollout.logprobs == ()


# --- failures ---------------------------------------------------------------------------------


def failing(times, error):
    left = {"n": times}

    async def before(task):
        if task.id == "one" and left["n"]:
            left["n"] -= 1
            raise error

    return before


def test_infrastructure_failures_are_retried_then_unscored():
    died = InfraError("the slot died", kind="sandbox_died")
    (fine,) = rlrf.rollout(Words(failing(2, died)), parrot(), ["one"], retries=2)
    assert fine.reward == 1.0
    lost, other = rlrf.rollout(Words(failing(9, died)), parrot(), ["one", "two"], retries=2)
    assert lost.reward is None
    assert not lost.scored
    assert lost.failure == "sandbox_died: the slot died"
    assert lost.finish_reason == "failed"
    assert other.reward == 0.0


def test_what_cannot_be_cured_is_not_retried():
    seen = []

    async def before(task):
        seen.append(task.id)
        raise InfraError("no licence", retryable=False)

    (lost,) = rlrf.rollout(Words(before), parrot(), ["one"], retries=5)
    assert lost.reward is None
    assert seen == ["one"]


def test_a_bug_in_the_environment_costs_its_own_rollout(caplog):
    lost, fine = rlrf.rollout(
        Words(failing(1, ZeroDivisionError("oops"))), ScriptedPolicy(last_word), ["one", "two"]
    )
    assert lost.reward is None
    assert "ZeroDivisionError: oops" in lost.failure
    assert fine.reward == 1.0


def test_policy_failures_are_infrastructure():
    class Fragile(ScriptedPolicy):
        def generate(self, prompts, params):
            if self.calls == 0:
                self.calls += 1
                raise ConnectionError("gone")
            return super().generate(prompts, params)

    (rollout,) = rlrf.rollout(Words(), Fragile(lambda m: "one"), ["one"])
    assert rollout.reward == 1.0


def test_one_prompt_too_long_leaves_the_others_scored():
    class Narrow(ScriptedPolicy):
        def generate(self, prompts, params):
            for p in prompts:
                if "three" in p.messages[-1]["content"]:
                    raise PromptTooLongError(99, params.max_tokens, 50)
            return super().generate(prompts, params)

    with pytest.warns(UserWarning, match="99 tokens"):
        done = rlrf.rollout(Words(), Narrow(last_word))
    assert [r.reward for r in done] == [1.0, 1.0, None, 1.0]
    assert done[2].failure.startswith("prompt_too_long")


def test_a_conversation_that_outgrows_the_context_is_scored_and_told():
    class Narrow(ScriptedPolicy):
        def generate(self, prompts, params):
            if len(prompts[0].messages) > 3:
                raise PromptTooLongError(99, params.max_tokens, 50)
            return super().generate(prompts, params)

    (rollout,) = rlrf.rollout(Count(), Narrow(lambda m: "x"))
    assert rollout.reward == 2.0
    assert rollout.finish_reason == "truncated"
    assert rollout.feedback[-1].kinds == ("hint", "truncated_attempt")


def test_mistakes_of_the_caller_are_raised_at_once():
    class Mute(ScriptedPolicy):
        def generate(self, prompts, params):
            raise UsageError("no chat template")

    with pytest.raises(UsageError, match="no chat template"):
        rlrf.rollout(Words(), Mute(lambda m: ""))
    with pytest.raises(rlrf.UnknownIdError, match="'three'"):
        rlrf.rollout(Words(), parrot(), ["thre"])
    with pytest.raises(UsageError, match="no tasks"):
        rlrf.rollout(Words(), parrot(), [])
    with pytest.raises(UsageError, match="group_size"):
        rlrf.rollout(Words(), parrot(), group_size=0)
    with pytest.raises(UsageError, match="seed is -1"):
        rlrf.rollout(Words(), parrot(), seed=-1)

    class Short(ScriptedPolicy):
        def generate(self, prompts, params):
            return []

    with pytest.raises(UsageError, match="one per prompt"):
        rlrf.rollout(Words(), Short(lambda m: ""))


# --- deadlines and concurrency ----------------------------------------------------------------


def test_a_stuck_async_hook_costs_its_own_episode_its_own_deadline():
    async def before(task):
        if task.id == "two":
            await asyncio.Event().wait()  # for ever

    done = rlrf.rollout(Words(before), ScriptedPolicy(last_word), deadline_s=0.4)
    assert [r.reward for r in done] == [1.0, None, 1.0, 1.0]
    assert done[1].failure.startswith("deadline")


def test_a_stuck_plain_hook_holds_up_nobody():
    release = threading.Event()

    class Stuck(Words):
        def grade(self, task, completion):
            if task.id == "two":
                release.wait()
            return Outcome(1.0)

    try:
        done = rlrf.rollout(Stuck(), ScriptedPolicy(last_word), deadline_s=0.4)
    finally:
        release.set()
    assert [r.reward for r in done] == [1.0, None, 1.0, 1.0]


def test_waiting_for_the_policy_is_not_the_environments_time():
    gate = threading.Event()

    class Slow(ScriptedPolicy):
        def generate(self, prompts, params):
            gate.wait(0.5)
            return super().generate(prompts, params)

    (rollout,) = rlrf.rollout(Words(), Slow(lambda m: "one"), ["one"], deadline_s=0.2)
    assert rollout.reward == 1.0


def test_no_more_episodes_at_once_than_allowed():
    running = {"now": 0, "most": 0}

    async def before(task):
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        for _ in range(3):
            await asyncio.sleep(0)
        running["now"] -= 1

    rlrf.rollout(Words(before), parrot(), group_size=5, max_concurrency=3)
    assert running["most"] == 3


def test_a_local_policy_gets_full_batches():
    class Local(ScriptedPolicy):
        sizes: list[int] = []

        def generate(self, prompts, params):
            self.sizes.append(len(prompts))
            return super().generate(prompts, params)

    policy = Local(lambda m: "x", max_batch_size=6)
    policy.sizes = []
    rlrf.rollout(Words(), policy, group_size=5)
    assert sorted(policy.sizes, reverse=True)[:3] == [6, 6, 6]
    assert sum(policy.sizes) == 20


def test_batches_and_seeds_depend_on_the_seed_alone():
    def seeds(seed):
        seen = []

        class Local(ScriptedPolicy):
            def generate(self, prompts, params):
                seen.append((params.seed, [p.group for p in prompts]))
                return super().generate(prompts, params)

        rlrf.rollout(Words(), Local(lambda m: "x", max_batch_size=8), group_size=4, seed=seed)
        return seen

    assert seeds(3) == seeds(3)
    assert seeds(3) != seeds(4)
    assert len({s for s, _ in seeds(3)}) == 2


def test_an_async_policy_and_a_caller_with_a_loop():
    class Remote:
        async def generate(self, prompts, params):
            await asyncio.sleep(0)
            (prompt,) = prompts  # without max_batch_size each prompt is its own call
            return [Completion((1,), (2,), (0.0,), last_word(prompt.messages))]

    async def go():
        seen = []
        done = await rlrf.arollout(Words(), Remote(), on_rollout=seen.append)
        assert sorted(r.task_id for r in seen) == sorted(r.task_id for r in done)
        sync = rlrf.rollout(Words(), Remote())  # as in a notebook
        return done, sync

    done, sync = asyncio.run(go())
    assert [r.reward for r in done] == [r.reward for r in sync] == [1.0] * 4


def test_cancelling_stops_everything():
    started = asyncio.Event()

    async def before(task):
        started.set()
        await asyncio.Event().wait()

    async def go():
        task = asyncio.ensure_future(rlrf.arollout(Words(before), parrot(), deadline_s=None))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others

    asyncio.run(go())


# --- whose fault it is --------------------------------------------------------------------------


def word_of(prompt):
    return prompt.messages[0]["content"].rpartition(" ")[2].strip(".")


class Flaky(Echo):
    """Raises for ``train-no``, as often as told."""

    def __init__(self, error, times=10**9, **kwargs):
        super().__init__(**kwargs)
        self.error, self.times, self.tries = error, times, 0

    def grade(self, task, completion):
        if task.id == "train-no":
            self.tries += 1
            if self.tries <= self.times:
                raise self.error
        return super().grade(task, completion)


class AsyncFlaky(Flaky):
    async def grade(self, task, completion):
        return super().grade(task, completion)


def others_are_fine(found):
    return [r.reward for r in found if r.task_id != "train-no"] == [1.0, 1.0]


@pytest.mark.parametrize(
    "answer",
    [lambda: Outcome(float("nan")), lambda: Feedback.of("no_such_kind", "text")],
    ids=["reward", "kind"],
)
def test_a_malformed_answer_costs_its_own_rollout(answer):
    async def before(task):
        if task.id == "two":
            answer()

    found = rlrf.rollout(Words(before), Recorder(word_of))
    assert found[1].failure.startswith("env_error: OutcomeError: ")
    assert [r.scored for r in found] == [True, False, True, True]


@pytest.mark.parametrize("env", [Flaky, AsyncFlaky])
@pytest.mark.parametrize(
    "error",
    [
        KeyError("oops"),
        SystemExit(3),
        KeyboardInterrupt(),
        TimeoutError("the hook's own, not the deadline's"),
        asyncio.CancelledError(),
        StopIteration(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_whatever_a_hook_raises_costs_its_own_rollout(env, error):
    env = env(error)
    found = rlrf.rollout(env, Recorder(word_of))
    assert found[1].failure.startswith("env_error: ")
    assert not found[1].scored
    assert env.tries == 1
    assert others_are_fine(found)
    assert Echo().grade("train-no", "no").reward == 1.0  # the loop behind the sync face is alive


def test_a_retry_starts_afresh():
    env = Flaky(InfraError("a hiccup"), times=2)
    found = rlrf.rollout(env, Recorder(word_of), retries=2)
    assert [r.reward for r in found] == [1.0] * 3
    assert found[1].completion_ids == (*b"no", 256)
    assert len(found[1].messages) == 2


def test_an_aborted_completion_is_not_scored():
    policy = Recorder(finish_reason="abort")
    (found,) = rlrf.rollout(Echo(), policy, ["train-no"], retries=1)
    assert found.reward is None
    assert found.failure.startswith("policy_aborted")
    assert len(policy.calls) == 2


def test_a_hook_that_swallows_its_cancellation_holds_up_nobody():
    async def go():
        release = asyncio.Event()

        class Stubborn(Gate):
            async def grade(self, task, completion):
                while task.id == "t1" and not release.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await release.wait()
                return Outcome(1.0)

        found = await rlrf.arollout(Stubborn(), Recorder(), deadline_s=0.4)
        release.set()
        return found

    found = asyncio.run(go())
    assert [r.scored for r in found] == [True, False, True, True, True, True]
    assert found[1].failure.startswith("deadline: the environment took more than 0.4 s")


def test_a_sync_method_inside_an_async_hook_is_refused_and_not_stuck():
    class Nested(Echo):
        async def grade(self, task, completion):
            return rlrf.rollout(Echo(), Recorder(), ["train-no"])

    (found,) = rlrf.rollout(Nested(), Recorder(), ["train-no"])
    assert "async twin" in found.failure


def test_a_callback_that_raises_ends_the_batch():
    def stop(rollout):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        rlrf.rollout(Echo(), Recorder(), on_rollout=stop)


def test_a_policy_may_answer_with_lists():
    class Lists(Recorder):
        def complete(self, prompt):
            done = super().complete(prompt)
            return replace(done, prompt_ids=list(done.prompt_ids), token_ids=list(done.token_ids))

    (found,) = rlrf.rollout(Guess(max_turns=2), Lists(), ["train-0"])
    assert found.scored
    assert found.completion_ids == (*b"x", 256, *b"Again.", *b"x", 256)


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "concurrency", "sizes"),
    [(64, 64, [12]), (5, 64, [5, 5, 2]), (64, 5, [5, 5, 2]), (4, 6, [4, 4, 4]), (1, 64, [1] * 12)],
)
def test_batches_are_as_full_as_they_can_be(batch, concurrency, sizes):
    policy = Recorder(batch=batch)
    rlrf.rollout(Gate(tasks=12), policy, max_concurrency=concurrency)
    assert [len(c) for c in policy.calls] == sizes


class Picky(Recorder):
    """Fails over some prompts, and so over every batch that has one of them."""

    def __init__(self, bad, error, **kwargs):
        super().__init__(lambda p: error() if p.messages[0]["content"] in bad else "x", **kwargs)


HICCUPS = {
    "raised": lambda: InfraError("a hiccup", kind="hiccup"),
    "final": lambda: InfraError("a hiccup", kind="hiccup", retryable=False),
    "other": lambda: ValueError("a hiccup"),
    "refused": lambda: PromptTooLongError(9, 9, 9),
}


@pytest.mark.filterwarnings("ignore:task 't:UserWarning")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 15)), st.sampled_from([1, 3, 4, 8, 16]), st.integers(0, 2), st.data())
def test_a_prompt_over_which_the_policy_fails_costs_its_own_rollout(bad, batch, retries, data):
    error = data.draw(st.sampled_from(sorted(HICCUPS)))
    policy = Picky({f"task {i}" for i in bad}, HICCUPS[error], batch=batch)
    found = rlrf.rollout(Gate(tasks=16), policy, retries=retries)
    lost = {i for i, r in enumerate(found) if not r.scored}
    assert lost >= bad
    few = all(len(bad & set(range(at, at + batch))) <= 3 for at in range(0, 16, batch))
    if few or retries or error == "refused":
        assert lost == bad
    assert all("a hiccup" in found[i].failure for i in lost if error != "refused")
    if few and error in ("raised", "other"):
        for i in range(16):  # nobody but the bad is tried again
            alone = policy.calls.count([f"task {i}"])
            assert alone >= 1 + retries if i in bad else alone <= 1


@pytest.mark.parametrize("error", [HICCUPS["raised"], HICCUPS["other"]])
def test_a_policy_that_is_broken_is_not_asked_for_every_prompt(error):
    policy = Picky({f"task {i}" for i in range(32)}, error, batch=32)
    found = rlrf.rollout(Gate(tasks=32), policy, retries=0)
    assert [len(c) for c in policy.calls] == [32, 16, 16, 8, 8, 8, 8]
    assert all("7 calls in a row failed" in r.failure for r in found)


@pytest.mark.parametrize(
    "error",
    [UnavailableError("gone"), UsageError("wrong"), MissingDependencyError("it", "torch", "all")],
)
def test_what_concerns_every_prompt_is_not_looked_for_in_one(error):
    policy = Picky({"task 3"}, lambda: error)
    with pytest.raises(type(error)):
        rlrf.rollout(Gate(tasks=8), policy)
    assert len(policy.calls) == 1


@pytest.mark.parametrize("kind", [Recorder, AsyncRecorder])
def test_a_server_gets_one_call_per_prompt_with_a_seed_of_the_rollouts_own(kind):
    def seeds(**kwargs):
        policy = kind(batch=None)
        rlrf.rollout(Gate(tasks=4), policy, **kwargs)
        assert [len(c) for c in policy.calls] == [1] * 4
        pairs = zip(policy.calls, policy.seeds, strict=True)
        return {call[0]: seed for call, seed in pairs}

    assert seeds() == seeds(max_concurrency=2)
    assert len(set(seeds().values())) == 4
    assert set(seeds().values()).isdisjoint(seeds(seed=1).values())


def test_the_order_in_which_graders_finish_does_not_show():
    """Two graders run at once; the second lets the first go, or the other way round."""

    class Crossed(Gate):
        def __init__(self, late):
            super().__init__(tasks=6)
            self.late, self.passed = late, [threading.Event() for _ in range(3)]

        def grade(self, task, completion):
            pair, place = divmod(int(task.id[1:]), 2)
            if place == self.late:
                assert self.passed[pair].wait(60)
            return Outcome(1.0)

        def _info(self, task, feedback, metrics):  # called on the loop, as the step ends
            pair, place = divmod(int(task.id[1:]), 2)
            if place != self.late:
                self.passed[pair].set()
            return super()._info(task, feedback, metrics)

    runs = []
    for late in (0, 1):
        policy = Recorder()
        rlrf.rollout(Crossed(late), policy, max_concurrency=2, deadline_s=60, seed=3)
        runs.append((policy.calls, policy.seeds))
    assert runs[0] == runs[1]
    assert runs[0][0] == [["task 0", "task 1"], ["task 2", "task 3"], ["task 4", "task 5"]]
    assert len(set(runs[0][1])) == 3


def test_an_environment_that_takes_long_does_not_keep_the_others_waiting(monkeypatch):
    monkeypatch.setattr(Batcher, "linger_s", 0.01)
    second = threading.Event()

    class Slow(rlrf.MultiTurnEnv):
        splits = ("train",)

        def load_tasks(self, split):
            return [Task("slow", "slow"), Task("fast", "fast")]

        def start(self, task):
            return {"id": task.id, "turns": 0}

        def respond(self, state, action):
            state["turns"] += 1
            if state["id"] == "slow":
                assert second.wait(60)  # until the other has had its second turn
            elif state["turns"] == 2:
                second.set()
            return Turn("On.", terminated=state["turns"] == 2)

    policy = Recorder()
    found = rlrf.rollout(Slow(), policy, deadline_s=60)
    assert all(r.scored for r in found)
    assert policy.calls[:2] == [["slow", "fast"], ["fast"]]


def test_seeds_of_episodes_repeat_and_differ():
    def numbers(seed):
        drawn = []

        class Draw(Guess):
            def start(self, task, rng):
                drawn.append(int(rng.integers(10**6)))
                return {"number": 0, "tries": 0}

        rlrf.rollout(Draw(max_turns=1), Recorder(), ["train-0"], group_size=4, seed=seed)
        return sorted(drawn)

    assert numbers(1) == numbers(1)
    assert len(set(numbers(1))) == 4
    assert set(numbers(1)).isdisjoint(numbers(100))


@pytest.mark.parametrize("batch", [None, 64])
def test_cancelling_leaves_no_work_behind(batch):
    async def go():
        generating, cancelled = asyncio.Event(), asyncio.Event()

        class Endless(Recorder):
            async def generate(self, prompts, params):
                generating.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()

        job = asyncio.ensure_future(rlrf.arollout(Echo(), Endless(batch=batch)))
        await generating.wait()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await asyncio.wait_for(cancelled.wait(), 30)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


def test_a_forked_process_has_a_loop_of_its_own():
    env = Echo()
    assert env.grade("train-no", "no").reward == 1.0  # the parent's loop runs
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(env.grade("train-no", "no").reward))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert answers.get() == 1.0


# --- what comes back ----------------------------------------------------------------------------


def test_spans_of_later_turns_count_from_the_first_completion_token():
    class Blame(Guess):
        async def respond(self, state, action):
            state["tries"] += 1
            told = Feedback.of("critique", "There.", span=(1, 2))
            return Turn("Go on.", 0.0, told, terminated=state["tries"] == 2)

    (found,) = rlrf.rollout(Blame(), Recorder(lambda p: "aéc"), ["train-0"])
    assert found.spans == (((1, 3),), ((12, 14),))
    blamed = [bytes(found.completion_ids[a:b]).decode() for ((a, b),) in found.spans]
    assert blamed == ["é", "é"]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["x", "3", "é漢", ""]), st.integers(1, 3), st.booleans())
def test_every_rollout_survives_json(reply, turns, fails):
    say = OSError("gone") if fails else reply
    (found,) = rlrf.rollout(Guess(max_turns=turns), Recorder(lambda p: say), ["train-0"], retries=0)
    assert found.scored != fails
    assert Rollout.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.last_feedback == (found.feedback[-1] if found.feedback else Feedback())
    assert found.text == ("" if fails else reply)


# --- seeds ----------------------------------------------------------------------------------


def seeds_of(*args, env=None, **kwargs):
    """Each rollout's sampling seeds, turn by turn, in the order of the rollouts."""
    policy = Recorder(lambda m: "x")
    rlrf.rollout(env or Words(), policy, *args, **kwargs)
    found = {}
    for prompt in policy.prompts:
        found.setdefault(prompt.group, []).append(prompt.seed)
    return found


def test_every_reply_has_a_seed_of_its_own():
    found = seeds_of(group_size=3, seed=5, env=Count())
    assert len(found["0:count"]) == 9
    assert len(set(found["0:count"])) == 9
    assert seeds_of(group_size=3, seed=5, env=Count()) == found
    assert not set(seeds_of(group_size=3, seed=6, env=Count())["0:count"]) & set(found["0:count"])


def test_the_sampling_seed_is_that_of_the_parameters_where_they_have_one():
    fixed = SamplingParams(seed=9)
    found = seeds_of(group_size=3, seed=5, params=fixed)
    assert found == seeds_of(group_size=3, seed=6, params=fixed)
    assert found != seeds_of(group_size=3, seed=5, params=SamplingParams(seed=10))
    assert found != seeds_of(group_size=3, seed=5)
    replies = [seed for seeds in found.values() for seed in seeds]
    assert len(set(replies)) == len(replies)  # one each all the same


def test_seeds_do_not_depend_on_what_is_done_or_runs_beside():
    every = rlrf.rollout(Words(), Recorder(lambda m: "x"), seed=5)
    missing = seeds_of(seed=5, done=[every[0], every[2]])
    assert missing == {g: s for g, s in seeds_of(seed=5).items() if g[0] in "13"}
    one = seeds_of(["three"], group_size=2, seed=[7])
    both = seeds_of(["one", "three"], group_size=2, seed=[3, 7])
    assert both["1:three"] == one["0:three"] != both["0:one"]
    with pytest.raises(UsageError, match="2 seeds for 1 tasks"):
        rlrf.rollout(Words(), parrot(), ["one"], seed=[1, 2])


# --- the thread that samples ------------------------------------------------------------------


class InThread(Recorder):
    def __init__(self):
        super().__init__(lambda m: "x", batch=2)
        self.threads = set()

    def generate(self, prompts, params):
        self.threads.add(threading.get_ident())
        return super().generate(prompts, params)


def test_a_local_policy_samples_in_the_thread_that_waits():
    policy = InThread()
    rlrf.rollout(Words(), policy)
    rlrf.rollout(Words(), policy)
    assert policy.threads == {threading.get_ident()}
    found = set()

    def elsewhere():
        other = InThread()
        rlrf.rollout(Words(), other)
        found.add((threading.get_ident(), *other.threads))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    ((own, sampled),) = found
    assert own == sampled


def test_where_nothing_waits_it_is_one_thread_all_the_same():
    policy = InThread()
    for _ in range(3):
        asyncio.run(rlrf.arollout(Words(), policy, group_size=8))
    assert len(policy.threads) == 1
    assert threading.get_ident() not in policy.threads


def test_a_thread_is_free_again_before_its_outcome_is_told():
    """Else whoever is told and calls again may get another thread."""
    threads, idle = _DaemonThreads(), []

    async def call():
        loop = asyncio.get_running_loop()
        tell = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *a: (idle.append(len(threads._idle)), tell(*a))[1]
        return await threads.run(int, "3")

    assert asyncio.run(call()) == 3
    assert idle[0] == 1


def test_an_interrupt_while_sampling_is_the_callers():
    class Interrupted(Recorder):
        def generate(self, prompts, params):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rlrf.rollout(Words(), Interrupted())
    assert Echo().grade("train-no", "no").reward == 1.0  # the loop behind the sync face is alive


def test_a_task_may_be_posed_otherwise():
    policy = Recorder(word_of)
    tasks = [replace(t, messages=(rlrf.user(f"Now say {t.id}."),)) for t in Words().tasks()]
    found = rlrf.rollout(Words(), policy, tasks)
    assert [p.messages[0]["content"] for p in policy.prompts] == [f"Now say {t.id}." for t in tasks]
    assert [r.reward for r in found] == [1.0] * 4  # what is hidden is that of the task


# --- what is wrong from the start ----------------------------------------------------------------


@pytest.mark.parametrize("made", [None, 1.0, (1.0, Feedback()), Turn("x")])
def test_a_grade_that_never_returns_an_outcome_is_told_and_not_unscored(made):
    class Wrong(Echo):
        def grade(self, task, completion):
            return made

    with pytest.raises(UsageError, match=r"Wrong\.grade returned .*; return rlrf\.Outcome"):
        rlrf.rollout(Wrong(), lambda m: "yes")


@pytest.mark.parametrize("reply", [None, 7, {"role": "user", "content": "x"}])
def test_a_policy_that_never_returns_a_reply_is_told_and_not_unscored(reply):
    env = Echo()
    rlrf.rollout(env, lambda m: "yes")  # that the environment works is no excuse

    class Bare:
        def generate(self, prompts, params):
            return [reply for _ in prompts]

    if reply is None:
        with pytest.raises(UsageError, match=r"got None \(does the function return\?\)"):
            rlrf.rollout(env, lambda m: reply)
    for policy in (lambda m: reply, Bare()):
        with pytest.raises(UsageError, match="the policy gave a completion that is none"):
            rlrf.rollout(env, policy)


def test_a_reply_that_is_none_costs_its_own_rollout():
    env = Words()
    found = rlrf.rollout(env, lambda m: None if "two" in m[0]["content"] else "one")
    assert [r.scored for r in found] == [True, False, True, True]
    assert found[1].failure.startswith("policy_error: the policy gave a completion that is none")


def test_an_outcome_that_is_none_costs_its_own_rollout():
    class Wrong(Echo):
        def grade(self, task, completion):
            return super().grade(task, completion) if task.id != "train-no" else None

    found = rlrf.rollout(Wrong(), lambda m: "yes")
    assert [r.scored for r in found] == [True, False, True]


def test_what_is_no_environment():
    with pytest.raises(UsageError, match=r"takes an rlrf\.Env, got 'echo' \(str\); rlrf\.make"):
        rlrf.rollout("echo", lambda m: "x")
    with pytest.raises(UsageError, match=r"evaluate\(\) takes an rlrf\.Env"):
        rlrf.evaluate(Echo, lambda m: "x")
    with pytest.raises(UsageError, match=r"give its \.unwrapped"):
        rlrf.rollout(gymnasium.Wrapper(Echo()), lambda m: "x")


def test_a_rollout_says_how_old_the_weights_were_that_sampled_it():
    versions = iter((5, 3, 4))

    class Versioned(Recorder):
        def generate(self, prompts, params):
            return [
                dataclasses.replace(c, weight_version=next(versions))
                for c in super().generate(prompts, params)
            ]

    class Three(rlrf.MultiTurnEnv):
        def load_tasks(self, split):
            return [Task("t", "Go.")]

        def start(self, task):
            return []

        def respond(self, state, action):
            state.append(action)
            return rlrf.Turn(rlrf.user("More."), terminated=len(state) == 3)

    (rollout,) = rlrf.rollout(Three(), Versioned())
    assert rollout.weight_version == 3  # the oldest of three turns
    assert rlrf.Rollout.from_dict(rollout.to_dict()).weight_version == 3
    (rollout,) = rlrf.rollout(Three(), ScriptedPolicy("x"))
    assert rollout.weight_version is None
    old = rollout.to_dict()
    del old["weight_version"]  # of a file that an earlier version has written
    assert rlrf.Rollout.from_dict(old) == rollout
