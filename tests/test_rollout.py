"""The rollout collector: order, tokens, failures, deadlines, batches."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

import rlrf
from rlrf import (
    Completion,
    Feedback,
    InfraError,
    Outcome,
    PromptTooLongError,
    Rollout,
    SamplingParams,
    ScriptedPolicy,
    Task,
    Turn,
    UsageError,
)


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
    return ScriptedPolicy(lambda messages: text)


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
    class Rewriter(ScriptedPolicy):
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
    class Silent(ScriptedPolicy):
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

    done = rlrf.rollout(Words(before), ScriptedPolicy(last_word), deadline_s=1.0)
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
        done = rlrf.rollout(Stuck(), ScriptedPolicy(last_word), deadline_s=1.0)
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


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, ">= 0"),
        ({"top_p": 0}, r"\(0, 1\]"),
        ({"top_k": -2}, "keeps every token"),
        ({"max_tokens": 0}, ">= 1"),
    ],
)
def test_sampling_parameters_are_checked(fields, words):
    with pytest.raises(UsageError, match=words):
        SamplingParams(**fields)
