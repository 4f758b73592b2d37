"""An ``async def`` hook that blocks the event loop costs its own episode, and nobody else's."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings

import pytest

import rlrf
from rlrf import InfraError, Outcome, Rollout, ScriptedPolicy, Task, Turn, _async, _clock, progress
from rlrf.notices import SlowPathWarning
from rlrf.rollout import _Batch
from rlrf.sandbox import CallCase, Program, StdinCase, start_sandbox
from rlrf.wrappers import DropFeedback
from rlrf_environments.code import env as code_env
from tests.environments_for_tests import AsyncEcho, Guess, Recorder

DEADLINE_S = 0.3
pytestmark = pytest.mark.filterwarnings("ignore::rlrf.notices.SlowPathWarning")


@pytest.fixture
def release():
    """Ends what blocks, once the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def said(monkeypatch):
    """Set when the watchdog has named somebody; its words are in ``said.words``."""
    event = threading.Event()
    event.words = []

    def error(words, *args):
        event.words.append(words % args)
        event.set()

    monkeypatch.setattr(_clock.log, "error", error)
    return event


class Tasks(rlrf.SingleTurnEnv):
    """Six tasks; those that are named block the event loop. Counts how often each was graded."""

    def __init__(self, block, *stuck, **kwargs):
        super().__init__(**kwargs)
        self.block, self.stuck, self.graded = block, stuck, []

    def load_tasks(self, split):
        return [Task(f"t{i}", f"task {i}") for i in range(6)]

    async def grade(self, task, completion):
        await asyncio.sleep(0)
        self.graded.append(task.id)
        if task.id in self.stuck:
            self.block()
        return Outcome(1.0)


class Turns(rlrf.MultiTurnEnv):
    """Three turns; the state is bound to the loop it was made on. Blocks in ``start`` or later."""

    def __init__(self, block, where, **kwargs):
        super().__init__(**kwargs)
        self.block, self.where = block, where

    def load_tasks(self, split):
        return [Task(f"t{i}", f"task {i}") for i in range(4)]

    async def start(self, task):
        if task.id == "t1" and self.where == 0:
            self.block()
        return [task.id, 0, asyncio.get_running_loop()]

    async def respond(self, state, action):
        assert asyncio.get_running_loop() is state[2]
        state[1] += 1
        if state[:2] == ["t1", self.where]:
            self.block()
        return Turn("More.", 1.0, terminated=state[1] == 3)


def spinning(event):
    def spin():
        while not event.is_set():
            pass

    return spin


def policy():
    return ScriptedPolicy(lambda messages: "x")


def unscored(rollouts):
    assert all(r.scored or r.failure.startswith("deadline: the environment") for r in rollouts)
    return [r.task_id for r in rollouts if not r.scored]


@pytest.mark.parametrize("how", [lambda e: e.wait, spinning], ids=["wait", "spin"])
def test_one_that_blocks_for_ever_costs_itself(release, how):
    seen, shown = [], []

    def on_rollout(rollout):
        seen.append(rollout.task_id)
        shown.extend(p.done for p in progress.under_way())

    env = Tasks(how(release), "t2")
    found = rlrf.rollout(env, policy(), deadline_s=DEADLINE_S, on_rollout=on_rollout)
    assert [r.task_id for r in found] == [f"t{i}" for i in range(6)]
    assert unscored(found) == ["t2"]
    assert "t2" in found[2].failure
    assert "blocked the event loop" in found[2].failure
    assert found[2].text == "x"  # what there was of it is kept
    assert sorted(seen) == [f"t{i}" for i in range(6)]  # each once
    assert shown == [1, 2, 3, 4, 5, 6]
    assert not progress.under_way()
    assert env.graded.count("t2") == 1  # it is not tried again


def test_the_others_are_begun_again_for_nothing_and_sample_the_same(release):
    def sampled(env, **options):
        found = rlrf.rollout(
            env, Recorder(lambda p: str(p.seed)), group_size=2, retries=0, seed=3, **options
        )
        return {(r.group_id, r.sample): r.text for r in found if r.scored}

    healthy = sampled(Tasks(None))
    left = sampled(Tasks(release.wait, "t2"), deadline_s=DEADLINE_S)
    assert set(healthy) - set(left) == {("2:t2", 0), ("2:t2", 1)}
    assert left.items() <= healthy.items()


@pytest.mark.slow
def test_several_cost_one_deadline_side_by_side(release):
    blocked, when_told = [], []

    def block():
        blocked.append(1)
        release.wait()

    def on_rollout(rollout):
        if not rollout.scored:
            when_told.append(len(blocked))

    env = Tasks(block, "t0", "t2", "t5")
    found = rlrf.rollout(env, policy(), group_size=4, deadline_s=DEADLINE_S, on_rollout=on_rollout)
    assert unscored(found) == ["t0"] * 4 + ["t2"] * 4 + ["t5"] * 4
    assert when_told[1:] == [12] * 11  # but for the first, by which the environment was found out


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, 1, 2])
def test_several_turns(release, where):
    env = Turns(release.wait, where)
    for _ in range(2):  # the second time each episode has a loop of its own
        found = rlrf.rollout(env, policy(), deadline_s=DEADLINE_S)
        assert unscored(found) == ["t1"]
        assert [r.reward for r in found] == [3.0, None, 3.0, 3.0]


def test_afterwards_everything_works(release):
    env = Tasks(release.wait, "t2")
    rlrf.rollout(env, policy(), deadline_s=DEADLINE_S)
    env.stuck = ()
    assert [r.reward for r in rlrf.rollout(env, policy())] == [1.0] * 6
    assert env.grade("t2", "x").reward == 1.0
    assert rlrf.rollout(AsyncEcho(), Recorder(), ["train-no"])[0].scored
    guess = Guess()
    guess.reset(seed=0)
    assert guess.step("11").reward == 0.0


def test_an_evaluation(release):
    report = rlrf.evaluate(Tasks(release.wait, "t2"), policy(), deadline_s=DEADLINE_S)
    assert (report.n_unscored, report.pass_rate, report.failures) == (1, 1.0, {"deadline": 1})


@pytest.mark.slow
def test_a_wrapped_environment(release, said):
    env = DropFeedback(Tasks(release.wait, "t2", "t4"))
    assert unscored(rlrf.rollout(env, policy(), deadline_s=DEADLINE_S)) == ["t2", "t4"]
    assert unscored(rlrf.rollout(env.env, policy(), deadline_s=DEADLINE_S)) == ["t2", "t4"]
    assert len(said.words) == 1  # what is inside has been found out, too


def test_it_is_said_once_with_the_remedy(release, said):
    env = Tasks(release.wait, "t2")
    with pytest.warns(SlowPathWarning, match="make it a plain `def`"):
        rlrf.rollout(env, policy(), deadline_s=DEADLINE_S)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rlrf.rollout(env, policy(), deadline_s=DEADLINE_S)
    (words,) = said.words
    assert "hook of task 't2' has had the event loop" in words
    assert "threading.py" in words  # where it stands


def test_one_that_comes_back_reports_nothing_and_its_loop_ends(release):
    seen, loops = [], set()

    class Watched(Tasks):
        async def grade(self, task, completion):
            loops.add(threading.current_thread())
            return await super().grade(task, completion)

    env = Watched(release.wait, "t2")
    before = set(threading.enumerate())
    rlrf.rollout(env, policy(), deadline_s=DEADLINE_S, on_rollout=lambda r: seen.append(r.task_id))
    graded = len(env.graded)
    release.set()
    for thread in loops - before:
        if thread.name in ("rlrf-loop", "rlrf-episode"):
            thread.join(10)
            assert not thread.is_alive()
    assert sorted(seen) == [f"t{i}" for i in range(6)]
    assert len(env.graded) == graded


def test_what_was_found_out_before_is_not_reported_by_a_loop_that_was_lost():
    """Rollouts that blocked the loop before this one are reported at once, without an episode."""
    seen = []
    options = {"group_size": 1, "max_concurrency": 8, "params": None, "deadline_s": 1.0}
    options |= {"retries": 0, "seed": 0, "done": (), "on_rollout": seen.append}
    batch = _Batch(Tasks(None), policy(), None, **options)
    batch.blocked = {n: Rollout(f"t{n}", key[0]) for n, key in enumerate(batch.wanted)}
    call = _async._Call("a call")
    call.lost_to = "another"

    async def lost():
        _async._waiting.set(call)
        await batch.collect()

    with batch, pytest.raises(asyncio.CancelledError):
        asyncio.run(lost())
    assert seen == []


def test_other_threads_go_on(release):
    """A rollout of another thread loses nothing; a single call is told, and may be tried again."""
    entered, results = threading.Event(), {}

    class Waits(Tasks):
        async def grade(self, task, completion):
            self.graded.append(task.id)
            if len(self.graded) == 6:
                entered.set()
            if loop is asyncio.get_running_loop():
                await asyncio.Event().wait()  # until its loop is lost
            return Outcome(1.0)

    async def running():
        return asyncio.get_running_loop()

    loop = rlrf.run_sync(running())
    waits, single = Waits(None), Waits(None)

    def other_rollout():
        results["rollout"] = rlrf.rollout(waits, policy(), deadline_s=None)

    def other_call():
        try:
            single.grade("t0", "x")
        except InfraError as error:
            results["call"] = error
        results["again"] = single.grade("t0", "x")

    threads = [threading.Thread(target=t) for t in (other_rollout, other_call)]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    found = rlrf.rollout(Tasks(release.wait, "t2"), policy(), deadline_s=DEADLINE_S)
    for thread in threads:
        thread.join(10)
    assert unscored(found) == ["t2"]
    assert [r.reward for r in results["rollout"]] == [1.0] * 6
    assert results["call"].retryable
    assert "task 't2'" in str(results["call"])
    assert results["again"].reward == 1.0


def test_one_without_a_deadline_holds_up_its_own_caller_only(release, monkeypatch):
    monkeypatch.setattr(_async, "LOOK_S", 0.02)
    monkeypatch.setattr(_async, "PATIENCE_S", 0.05)
    entered, results = threading.Event(), []

    def block():
        entered.set()
        release.wait()

    blocking = Tasks(block, "t0")
    thread = threading.Thread(target=lambda: results.append(blocking.grade("t0", "x").reward))
    thread.start()
    assert entered.wait(10)
    assert AsyncEcho().grade("train-no", "no").reward == 1.0
    release.set()
    thread.join(10)
    assert results == [1.0]  # its own caller has waited for it


@pytest.mark.slow
def test_on_the_callers_own_loop_it_is_named_and_then_kept_apart(release, said):
    env = Tasks(lambda: said.wait(60), "t2", "t4")

    async def twice():
        first = await rlrf.arollout(env, policy(), ["t1", "t2"], deadline_s=DEADLINE_S)
        env.block = release.wait  # for ever: on this loop nothing would come of it any more
        return first, await rlrf.arollout(env, policy(), deadline_s=DEADLINE_S)

    first, second = asyncio.run(twice())
    assert unscored(first) == ["t2"]
    assert unscored(second) == ["t2", "t4"]
    assert len(said.words) == 1
    assert "hook of task 't2'" in said.words[0]
    assert said.words[0].endswith("Nothing else can go on.")


@pytest.mark.slow
def test_an_async_policy_that_blocks_is_named_and_nobodys_time(said, monkeypatch):
    monkeypatch.setattr(_clock, "_LONG", 1.5 * DEADLINE_S)

    class Slow:
        async def generate(self, prompts, params):
            if prompts[0].messages[0]["content"] == "task 3":
                said.wait(60)
            return await asyncio.to_thread(policy().generate, prompts, params)

    class Waits(Tasks):
        async def grade(self, task, completion):
            await asyncio.sleep(0.1)
            return Outcome(1.0)

    found = rlrf.rollout(Waits(None), Slow(), deadline_s=DEADLINE_S)
    assert unscored(found) == []
    assert said.words[0].startswith("generate() of Slow has had the event loop")


def test_ctrl_c_ends_a_rollout_whose_loop_is_blocked(release, monkeypatch):
    monkeypatch.setattr(_async, "LOOK_S", 0.02)

    def block():
        os.kill(os.getpid(), signal.SIGINT)
        release.wait()

    # What nohup started ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            rlrf.rollout(Tasks(block, "t2"), policy(), deadline_s=None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert AsyncEcho().grade("train-no", "no").reward == 1.0  # nobody waits for the blocked one


def test_a_callback_that_exits_ends_its_call_and_not_the_loop():
    def leave(rollout):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        rlrf.rollout(Tasks(None), policy(), on_rollout=leave)
    assert AsyncEcho().grade("train-no", "no").reward == 1.0


def test_a_sandbox_works_on_when_the_loop_is_lost(release):
    pool = rlrf.run_sync(start_sandbox("process", slots=2, allow_unsafe=True))

    class Programs(Tasks):
        concurrency = 2

        async def grade(self, task, completion):
            await super().grade(task, completion)
            report = await pool.run(Program("def f(n): return n", "f"), [CallCase((1,), 1)])
            return Outcome(float(report.verdict == "accepted"))

    try:
        found = rlrf.rollout(Programs(release.wait, "t2"), policy(), deadline_s=3 * DEADLINE_S)
        assert unscored(found) == ["t2"]
        assert [r.reward for r in found if r.scored] == [1.0] * 5
        assert pool.run_sync(Program("print(1)"), [StdinCase("", "1")]).passed == 1
    finally:
        rlrf.run_sync(pool.aclose())


def test_a_code_environment_works_on_when_the_loop_is_lost(release):
    env = rlrf.make("code-basics-v0", sandbox="process", allow_unsafe=True, slots=1)
    first, second = env.tasks()[:2]
    try:
        assert env.grade(first, env.reference_solution(first)).reward == 1.0
        rlrf.rollout(Tasks(release.wait, "t2"), policy(), deadline_s=DEADLINE_S)
        assert env.grade(second, env.reference_solution(second)).reward == 1.0
    finally:
        env.close()


def test_no_hook_can_cut_off_the_opening_of_a_code_environments_sandbox(monkeypatch):
    loops = []

    async def start_sandbox(backend, *, slots, **options):
        loops.append(asyncio.get_running_loop())

    monkeypatch.setattr(code_env, "start_sandbox", start_sandbox)
    rlrf.make("code-basics-v0")._open_pool()
    assert loops == [_async.steady_loop()]
