"""Test-time SDPO and its baselines: what counts, what is estimated, what is kept."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import threading
import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import rlrf  # noqa: E402
from rlrf import Feedback, InfraError, Outcome, Task, UsageError, cli, user  # noqa: E402
from rlrf.evaluate import pass_at_k  # noqa: E402
from rlrf.notices import notice  # noqa: E402
from rlrf.policy import Completion  # noqa: E402
from rlrf.reprompt import Hint, build_reprompt  # noqa: E402
from rlrf_trainers.algorithms.sdpo import SDPOTrainer  # noqa: E402
from rlrf_trainers.commands import discover as module  # noqa: E402
from rlrf_trainers.commands.discover import (  # noqa: E402
    METHODS,
    DiscoveryReport,
    DiscoveryRun,
    discover,
    discovery_config,
    multi_turn_prompt,
)
from rlrf_trainers.config import SDPOConfig  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from tests.environments_for_tests import Recorder  # noqa: E402
from tests.tiny_model import save_tiny, tiny_model, tiny_tokenizer  # noqa: E402


class Riddle(rlrf.SingleTurnEnv):
    """ "right" is right, "half" is half, "boom" breaks the grader; all else gets feedback."""

    splits = ("train",)

    def load_tasks(self, split):
        return [Task(f"task-{i}", f"Riddle {i}?", hidden="right") for i in range(3)]

    def grade(self, task, completion):
        if completion == "boom":
            raise InfraError("no sandbox", kind="sandbox_died", retryable=False)
        if completion.rstrip("!") == task.hidden:
            return Outcome(1.0)
        reward = 0.5 if completion == "half" else 0.0
        return Outcome(reward, Feedback.of("wrong_answer", f"<{completion}> is wrong."))


class Mute(Riddle):
    """The same without a word."""

    def grade(self, task, completion):
        return Outcome(super().grade(task, completion).reward)


class Letters(rlrf.SingleTurnEnv):
    """A reward that no two replies share; :attr:`wanted` is where success begins."""

    splits = ("train",)
    max_tokens = 6
    wanted = 2.0  # never

    def load_tasks(self, split):
        return [Task(f"task-{i}", f"Say {i}.") for i in range(3)]

    def grade(self, task, completion):
        code = zlib.crc32(completion.encode()) / 2**32
        reward = 1.0 if code > self.wanted else code / 2
        return Outcome(reward, Feedback.of("wrong_answer", f"Not {completion!r}."))


class Script(HFPolicy):
    """A tiny model that says what it is told to, question by question."""

    def __init__(self, replies, **kwargs):
        super().__init__(tiny_model(), tiny_tokenizer(), **kwargs)
        self.replies = replies if callable(replies) else None
        self.queue = None if callable(replies) else iter(replies)
        self.prompts = []

    def generate(self, prompts, params):
        out = []
        for prompt in prompts:
            self.prompts.append(prompt.messages)
            text = self.replies(prompt) if self.replies else next(self.queue)
            ids = (*self.tokenizer.encode(text, add_special_tokens=False), min(self.end_ids))
            encoded = tuple(self.encode(prompt.messages))
            out.append(Completion(encoded, ids, (-1.0,) * len(ids), text))
        return out


def script(*parts):
    """``script((20, "no"), "right")``: "no" twenty times, then "right", then "no" for ever."""
    counted = [p if isinstance(p, tuple) else (1, p) for p in parts]
    return itertools.chain(*([text] * n for n, text in counted), itertools.repeat("no"))


def tiny():
    return HFPolicy(tiny_model(), tiny_tokenizer())


def run(method, *parts, env=None, **kwargs):
    """One run of one method on a script."""
    kwargs = {"budget": 40} | kwargs
    report = discover(env or Riddle(), Script(script(*parts)), "task-0", methods=method, **kwargs)
    return report.runs[0]


def made(method="sdpo", task="t", seed=0, *, time=None, budget=8, **fields):
    """A run that is already there; by default one that stopped in time."""
    successes = (time,) if time else ()
    return DiscoveryRun(task, seed, method, budget, (0.0,) * (time or budget), successes, **fields)


@pytest.mark.parametrize("methods", [("best_of_k", "multi_turn"), "best_of_k", "sdpo"])
def test_a_task_that_asks_nothing_is_refused_before_any_is_tried(methods):
    policy = Script(script())
    last = {"role": "assistant", "content": "and now?"}
    tasks = [Task("good", "?", hidden="right"), Task("bad", [user("?"), last], hidden="right")]
    with pytest.raises(UsageError, match=r"1 of the 2 tasks does not end.*'bad' is 'assistant'"):
        discover(Riddle(), policy, tasks, methods=methods, budget=4)
    assert not policy.prompts


def test_only_best_of_k_goes_on_from_what_a_tool_said():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [
        user("?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "1"},
    ]
    tasks = [Task("t", said, hidden="right")]
    policy = Script(script())
    with pytest.raises(UsageError, match=r"message of the user: .*'t' is 'tool'"):
        discover(Riddle(), policy, tasks, methods="multi_turn", budget=4)
    assert not policy.prompts
    assert discover(Riddle(), policy, tasks, methods="best_of_k", budget=4).runs[0].attempts == 4


# --- what counts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "attempts", "updates"),
    [("sdpo", 32, 1), ("best_of_k", 40, 0), ("multi_turn", 21, 0)],
)
def test_the_time_is_the_index_of_the_first_success_among_all_attempts(method, attempts, updates):
    found = run(method, (20, "no"), "right", (3, "half"), "right!")
    assert found.time == 21
    assert found.attempts == attempts  # the batch of the first success was sampled whole
    assert found.updates == updates
    expected = [0.0] * 20 + [1.0] + [0.5] * 3 + [1.0] + [0.0] * 15
    assert found.rewards == tuple(expected[:attempts])
    assert found.successes == ((21,) if method == "multi_turn" else (21, 25))
    assert found.solution == "right"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("time", [1, 16, 17, 40])
def test_times_at_the_edges_of_batches_and_budget(method, time):
    assert run(method, (time - 1, "no"), "right").time == time


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_censored_at_its_budget_exactly(method):
    found = run(method, (40, "no"), "right")
    assert (found.time, found.attempts, found.solution) == (None, 40, None)
    assert found.updates == (2 if method == "sdpo" else 0)  # 16 + 16 + 8; none after the last
    assert found.failure is None


@pytest.mark.parametrize("method", METHODS)
def test_what_the_infrastructure_fails_is_no_attempt(method):
    found = run(method, "boom", (4, "no"), (5, "boom"), (30, "no"), "boom", "right")
    assert found.unscored == 7
    assert found.time == 35
    assert set(found.rewards) == {0.0, 1.0}
    if method == "best_of_k":
        assert found.attempts == 40


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_the_infrastructure_keeps_failing_is_given_up(method):
    found = run(method, (5, "no"), (100, "boom"))
    assert found.failure.startswith("sandbox_died")
    assert (found.attempts, found.time) == (5, None)
    assert found.unscored >= 16
    report = DiscoveryReport.of([found], 40)
    assert report.methods[method].curve is None
    assert report.n_failed == 1
    assert report.methods[method].unscored == found.unscored


def test_failures_that_are_not_in_a_row_give_nothing_up():
    replies = itertools.chain.from_iterable(["boom"] * 3 + ["no"] for _ in range(9))
    found = run("multi_turn", *replies, budget=9, config={"num_generations": 4})
    assert found.failure is None
    assert (found.attempts, found.unscored) == (9, 27)


def test_success_is_the_environments_word():
    class Lenient(Riddle):
        success_threshold = 0.5

    assert run("sdpo", (3, "no"), "half", env=Lenient()).time == 4
    assert run("sdpo", (3, "no"), "half").time is None
    # and half a success is nothing to learn from as if it were a "Correct solution"
    assert discovery_config(Riddle()).success_reward_threshold is None


def test_defaults_are_the_papers():
    config = discovery_config(Letters())
    assert config.num_generations == 16
    assert (config.distillation_alpha, config.distillation_topk) == (1.0, 20)
    assert (config.learning_rate, config.teacher_update_rate) == (1e-6, 0.01)
    assert config.temperature == 1.0
    assert config.max_completion_length == 6  # the environment's suggestion
    clip = "distillation_advantage_clip"
    if clip in SDPOConfig.model_fields:
        assert getattr(config, clip) == 5.0
        assert getattr(discovery_config(Letters(), {clip: 2.0}), clip) == 2.0
        assert getattr(discovery_config(Letters(), {"distillation_alpha": 0.5}), clip) == 0.0


# --- estimates ------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "solved"), [(6, 0), (6, 1), (6, 2), (5, 5), (1, 0), (1, 1)])
def test_best_of_k_is_the_mean_over_all_orders(n, solved):
    """Brute force: every order in which these attempts could have come."""
    successes = tuple(range(n - solved + 1, n + 1))
    found = DiscoveryRun("t", 0, "best_of_k", n, (0.0,) * n, successes)
    firsts = [
        next((i + 1 for i, s in enumerate(order) if s), math.inf)
        for order in itertools.permutations([True] * solved + [False] * (n - solved))
    ]
    for k in range(1, n + 1):
        chance = statistics.mean(first <= k for first in firsts)
        assert found.curve()[k - 1] == pytest.approx(chance, abs=1e-12)
        assert found.curve()[k - 1] == pytest.approx(pass_at_k(n, solved, k), abs=1e-12)
    report = DiscoveryReport.of([found], n)
    mean = statistics.mean(min(first, n) for first in firsts)
    assert report.methods["best_of_k"].curve.mean_attempts == pytest.approx(mean)


def test_a_long_best_of_k_neither_overflows_nor_drifts():
    found = DiscoveryRun("t", 0, "best_of_k", 2750, (0.0,) * 2750, tuple(range(1, 2001)))
    curve = found.curve()
    assert np.all(np.diff(curve) >= 0)
    assert curve[0] == pytest.approx(2000 / 2750)
    assert curve[-1] == 1.0


def test_other_methods_step_up_at_their_time():
    assert made(time=3, budget=5).curve().tolist() == [0, 0, 1, 1, 1]
    assert made(budget=5).curve().tolist() == [0] * 5


def test_means_are_over_tasks_of_means_over_seeds():
    runs = [made(task="a", time=2), made(task="b", time=4), made(task="b", seed=1)]
    method = DiscoveryReport.of(runs, 8).methods["sdpo"]
    assert method.curve.at(1)[0] == 0
    assert method.curve.at(2)[0] == method.curve.at(3)[0] == 0.5
    assert method.curve.at(4)[0] == method.curve.at(8)[0] == 0.75
    assert method.curve.mean_attempts == pytest.approx((2 + (4 + 8) / 2) / 2)
    assert (method.n_runs, method.n_solved, method.n_tasks, method.n_tasks_solved) == (3, 2, 2, 2)
    assert method.attempts == 2 + 4 + 8


def test_the_interval_is_the_binomials_over_tasks():
    """Half of 20 tasks solved at once under every seed: the mean is Binomial(20, 1/2) / 20."""
    runs = [
        made(task=f"t{i}", seed=s, time=1 if i % 2 else None) for i in range(20) for s in range(3)
    ]
    curve = DiscoveryReport.of(runs, 8).methods["sdpo"].curve
    for k in (1, 8):  # P(X <= 5) = 0.021, P(X <= 6) = 0.058, and symmetric
        assert curve.at(k) == pytest.approx((0.5, 0.3, 0.7))
    assert curve.mean_attempts == pytest.approx(4.5)
    assert curve.mean_attempts_ci == pytest.approx((1 + 7 * 0.3, 1 + 7 * 0.7))


def test_seeds_of_one_task_are_drawn_too():
    """One task, 20 seeds, half of them solve it: again a binomial, now over the seeds."""
    runs = [made(seed=s, time=1 if s % 2 else None) for s in range(20)]
    curve = DiscoveryReport.of(runs, 8).methods["sdpo"].curve
    assert curve.at(8) == pytest.approx((0.5, 0.3, 0.7))


def test_seeds_are_no_independent_tasks():
    """Forty alike seeds of two tasks say no more about tasks than two tasks do."""
    runs = [made(task=f"t{i}", seed=s, time=i or None) for i in (0, 1) for s in range(40)]
    assert DiscoveryReport.of(runs, 8).methods["sdpo"].curve.at(8) == pytest.approx((0.5, 0, 1))


def test_an_interval_is_a_point_where_all_runs_agree():
    runs = [made(task=f"t{i}", time=3) for i in range(7)]
    curve = DiscoveryReport.of(runs, 8).methods["sdpo"].curve
    assert curve.at(2) == (0, 0, 0)
    assert curve.at(3) == (1, 1, 1)
    assert curve.mean_attempts_ci == pytest.approx((3, 3))


def test_differences_are_paired():
    """Tasks differ a lot, methods by one attempt everywhere: the difference is certain."""
    times = [1, 2, 3, 4, 5, 6, 7]
    runs = [made(task=f"t{t}", time=t) for t in times]
    runs += [made("multi_turn", task=f"t{t}", time=t + 1) for t in times]
    report = DiscoveryReport.of(runs, 8)
    low, high = report.methods["sdpo"].curve.mean_attempts_ci
    assert high - low > 1
    difference = report.sdpo_minus["multi_turn"]
    assert difference.mean_attempts == pytest.approx(-1)
    assert difference.mean_attempts_ci == pytest.approx((-1, -1))
    assert difference.at(1)[0] == pytest.approx(1 / 7)
    assert difference.at(8) == (0, 0, 0)


def test_a_run_given_up_is_in_no_number():
    runs = [made(task="a", time=2), made(task="b", failure="sandbox_died: no", unscored=16)]
    runs += [made("multi_turn", task=t, time=3) for t in "ab"]
    report = DiscoveryReport.of(runs, 8)
    assert report.methods["sdpo"].n_runs == 1
    assert report.methods["sdpo"].curve.at(2)[0] == 1
    assert report.methods["sdpo"].failures == ("sandbox_died: no",)
    assert report.sdpo_minus["multi_turn"].mean_attempts == -1  # over task a alone


@pytest.mark.parametrize(
    ("budget", "ks"),
    [(1, [1]), (4, [1, 4]), (5, [1, 4, 5]), (2750, [1, 4, 16, 64, 256, 1024, 2750])],
)
def test_the_ks_end_at_the_budget(budget, ks):
    assert DiscoveryReport.of([made(budget=budget)], budget).ks == ks


def test_a_run_survives_json():
    found = made(time=3, unscored=1, updates=2, dropped=1, solution="ö")
    assert DiscoveryRun.from_dict(json.loads(json.dumps(found.to_dict()))) == found


# --- the start ------------------------------------------------------------------------------

LEARNS = {"learning_rate": 1e-2, "num_generations": 4}
SETTINGS = [LEARNS, LEARNS | {"lora_r": 4}, LEARNS | {"teacher_regularization": "live"}]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SETTINGS)
def test_every_run_starts_from_the_same_weights_bit_for_bit(config, dtype, monkeypatch):
    trainers = []

    class Spy(SDPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(module, "SDPOTrainer", Spy)

    def state():
        (trainer,) = trainers
        weights = {n: p.detach().clone() for n, p in trainer.learner.model.named_parameters()}
        teacher = {n: p.clone() for n, p in trainer.teacher.weights.items()}
        masters = {n: p.detach().clone() for n, p in trainer.learner.optimizer.masters.items()}
        return weights, teacher, masters

    def equal(a, b):
        return all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)

    firsts, lasts = [], []

    def on_batch(found):
        if found.attempts == (4 if found.method == "sdpo" else 1):
            firsts.append(state())
            assert not trainers[0].learner.optimizer.adamw.state
        if found.attempts == 12 and found.method == "sdpo":
            lasts.append(state())

    policy = HFPolicy(tiny_model(), tiny_tokenizer(), dtype=dtype)
    report = discover(
        Letters(), policy, ["task-0", "task-1"], methods=("multi_turn", "sdpo"), budget=12,
        seeds=2, config=config, on_batch=on_batch,
    )  # fmt: skip
    assert [r.updates for r in report.runs] == [0, 2] * 4
    assert len(firsts) == 8
    assert all(equal(firsts[0], other) for other in firsts)
    assert len(lasts) == 4
    assert not any(equal(firsts[0], other) for other in lasts)
    assert equal(firsts[0], state())  # the model is handed back as it came
    if "lora_r" not in config:
        fresh = dict(tiny_model().to(dtype).named_parameters())
        assert all(torch.equal(p, fresh[n]) for n, p in policy.model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("config", SETTINGS)
def test_a_run_does_not_depend_on_those_before_it(config):
    whole = discover(Letters(), tiny(), ["task-0", "task-1"], budget=12, seeds=2, config=config)
    alone = discover(
        Letters(), tiny(), ["task-1"], methods="sdpo", budget=12, seeds=[1], config=config
    )
    (same,) = [r for r in whole.runs if r.key == ("task-1", 1, "sdpo")]
    assert alone.runs == (same,)
    assert len(set(same.rewards)) > 6


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report_and_another_another():
    def report(seeds):
        return discover(Letters(), tiny(), ["task-0"], budget=12, seeds=seeds, config=LEARNS)

    first = report([7])
    assert first == report([7])
    assert json.dumps(first.to_dict()) == json.dumps(report([7]).to_dict())
    assert first.runs[0].rewards != report([8]).runs[0].rewards


def test_all_methods_make_the_same_first_attempts():
    report = discover(Letters(), tiny(), ["task-0"], budget=12, config=LEARNS)
    sdpo, best_of_k, multi_turn = report.runs
    assert sdpo.rewards[:4] == best_of_k.rewards[:4]
    assert sdpo.rewards[0] == multi_turn.rewards[0]
    assert sdpo.rewards[4:] != best_of_k.rewards[4:]  # it has learnt something
    assert multi_turn.rewards[1] != sdpo.rewards[1]  # it has been told something


def test_tasks_and_steps_draw_other_samples():
    report = discover(Letters(), tiny(), methods="best_of_k", budget=8, config=LEARNS)
    assert len({r.rewards for r in report.runs}) == 3
    policy = Recorder(batch=4)
    discover(Letters(), policy, methods="best_of_k", budget=8, seeds=2, config=LEARNS)
    assert len(set(policy.seeds)) == len(policy.seeds) == 3 * 2 * 2  # tasks, seeds, batches


def test_sdpo_learns_from_the_feedback_of_a_task():
    """The same seed with and without learning: only the first batch is the same."""
    still = LEARNS | {"learning_rate": 1e-12}
    moved, stayed = (
        discover(Letters(), tiny(), ["task-0"], methods="sdpo", budget=8, config=c).runs[0]
        for c in (LEARNS, still)
    )
    assert moved.rewards[:4] == stayed.rewards[:4]
    assert moved.rewards[4:] != stayed.rewards[4:]


@pytest.mark.slow
def test_without_feedback_sdpo_warns_once_and_learns_nothing():
    with pytest.warns(RuntimeWarning, match="task 'task-0'.*feedback") as told:
        report = discover(Mute(), tiny(), methods="sdpo", budget=12, config=LEARNS)
    assert len([w for w in told if w.category is RuntimeWarning]) == 1
    assert [r.updates for r in report.runs] == [0, 0, 0]


def test_what_the_trainer_warns_of_is_said_once_not_once_per_run(monkeypatch):
    class Worried(SDPOTrainer):
        def learn(self, rollouts):
            self.learner.record.warn("worry", "I worry")
            super().learn(rollouts)

    monkeypatch.setattr(module, "SDPOTrainer", Worried)
    with pytest.warns(RuntimeWarning, match="I worry") as told:
        discover(Letters(), tiny(), methods="sdpo", budget=12, config=LEARNS)
    assert len([w for w in told if "worry" in str(w.message)]) == 1


def test_the_schedule_of_the_learning_rate_follows_the_budget():
    rates = []

    class Spy(SDPOTrainer):
        def learn(self, rollouts):
            rates.append(self.learner.learning_rate())
            super().learn(rollouts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SDPOTrainer", Spy)
        config = LEARNS | {"lr_scheduler_type": "linear"}
        discover(Letters(), tiny(), ["task-0"], methods="sdpo", budget=16, seeds=2, config=config)
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.5e-2] * 2)


# --- multi-turn -----------------------------------------------------------------------------


def feedback(*texts):
    return [Feedback.of("wrong_answer", text) for text in texts]


def fit(question, told, limit):
    policy = Script(script())
    config = SDPOConfig()
    messages = (rlrf.system("Be brief."), user(question))
    shown, dropped = multi_turn_prompt(
        messages, told, config, policy.encode, policy.tokenizer, limit
    )
    return shown, dropped, len(policy.encode(shown))


def test_a_prompt_has_the_question_and_all_feedback_in_order_but_no_attempt():
    replies = iter(["one", "two", "three", "right"])
    policy = Script(lambda prompt: next(replies))
    discover(Riddle(), policy, ["task-0"], methods="multi_turn", budget=9)
    assert [len(p) for p in policy.prompts] == [1] * 4  # a single user turn, always
    assert policy.prompts[0][0] == user("Riddle 0?")
    last = policy.prompts[3][0]["content"]
    places = [last.index(t) for t in ("Riddle 0?", "<one> is wrong.", "<two> is", "<three> is")]
    assert places == sorted(places)
    assert last.endswith("Correctly solve the original question.")
    assert "one" not in last.replace("<one> is wrong.", "")


def test_one_feedback_is_told_as_sdpo_tells_its_teacher():
    policy, (told,) = Script(script()), feedback("No.")
    messages = (rlrf.system("Be brief."), user("What?"))
    taught = build_reprompt(
        messages, Hint(None, told), SDPOConfig(), policy.encode, policy.tokenizer
    )
    assert fit("What?", [told], 9999)[0] == taught.messages


@pytest.mark.slow
def test_the_oldest_feedback_goes_first_and_the_question_never():
    told = feedback(*(f"Number {i} is {'very ' * 10}wrong." for i in range(9)))
    question = "Is this " + "really " * 20 + "the question?"
    _, _, bare = fit(question, [], 9999)
    _, none, full = fit(question, told, 9999)
    assert none == 0
    dropped_before = 0
    for limit in range(full + 10, 0, -29):
        shown, dropped, length = fit(question, told, limit)
        text = shown[1]["content"]
        assert shown[0] == rlrf.system("Be brief.")
        assert text.startswith(question)
        if text == question:  # not even a piece of the newest fits
            assert limit < bare + 120
            continue
        assert text.endswith("Correctly solve the original question.")
        whole = [i for i in range(9) if f"Number {i} is {'very ' * 10}wrong." in text]
        if dropped < 8:
            assert whole == list(range(dropped, 9))  # the newest, without a gap
        assert dropped >= dropped_before
        dropped_before = dropped
        assert length <= limit
    assert dropped == 9
    assert text == question
    assert "Number 8" not in text  # even of the newest nothing was left


def test_a_run_drops_what_its_prompt_cannot_hold():
    replies = (f"reply {i}" for i in itertools.count())
    policy = Script(lambda prompt: next(replies))
    report = discover(
        Riddle(), policy, ["task-0"], methods="multi_turn", budget=12, max_prompt_len=300
    )
    assert all(p[0]["content"].startswith("Riddle 0?") for p in policy.prompts)
    lengths = [len(policy.encode(p)) for p in policy.prompts]
    assert max(lengths) <= 300
    assert "<reply 10> is wrong." in policy.prompts[11][0]["content"]
    assert "<reply 0> is wrong." not in policy.prompts[11][0]["content"]
    kept = sum(f"<reply {i}>" in policy.prompts[11][0]["content"] for i in range(11))
    assert report.runs[0].dropped == 11 - kept > 0


def test_the_context_leaves_room_for_the_reply():
    replies = (f"reply {i}" for i in itertools.count())
    policy = Script(lambda prompt: next(replies), max_context=400)
    config = {"max_completion_length": 150}
    discover(Riddle(), policy, ["task-0"], methods="multi_turn", budget=12, config=config)
    lengths = [len(policy.encode(p)) for p in policy.prompts]
    assert 150 < max(lengths) <= 250


def test_replies_as_long_as_the_context_leave_the_feedback_half_of_it():
    replies = (f"reply {i}" for i in itertools.count())
    policy = Script(lambda prompt: next(replies), max_context=400)
    config = {"max_completion_length": 400}
    discover(Riddle(), policy, ["task-0"], methods="multi_turn", budget=4, config=config)
    assert "<reply 0> is wrong." in policy.prompts[1][0]["content"]
    assert max(len(policy.encode(p)) for p in policy.prompts) <= 200


def test_multi_turn_runs_go_side_by_side_as_if_alone():
    sizes = []

    class Counting(HFPolicy):
        def generate(self, prompts, params):
            sizes.append(len(prompts))
            return super().generate(prompts, params)

    policy = Counting(tiny_model(), tiny_tokenizer())
    config = {"max_completion_length": 8}

    def rewards(tasks, seeds):
        report = discover(
            Letters(), policy, tasks, methods="multi_turn", budget=4, seeds=seeds, config=config
        )
        return {run.key: (run.rewards, run.time) for run in report.runs}

    both = rewards(["task-0", "task-1"], [0, 1])
    assert max(sizes) == 4
    assert len(sizes) <= 4
    alone = {}
    for task in ("task-0", "task-1"):
        for seed in (0, 1):
            alone |= rewards([task], [seed])
    assert both == alone
    assert len({r for r, _ in both.values()}) > 1


def test_a_partly_right_reply_is_told_too():
    replies = iter(["half", "right"])
    policy = Script(lambda prompt: next(replies))
    config = {"success_reward_threshold": 0.5}
    discover(Riddle(), policy, ["task-0"], methods="multi_turn", budget=9, config=config)
    assert "<half> is wrong." in policy.prompts[1][0]["content"]


def test_an_attempt_without_feedback_adds_nothing():
    policy = Script(script((3, "no"), "right"))
    discover(Mute(), policy, ["task-0"], methods="multi_turn", budget=9)
    assert {p[0]["content"] for p in policy.prompts} == {"Riddle 0?"}


# --- wrong use ------------------------------------------------------------------------------


def test_baselines_need_no_model_of_ours():
    policy = Recorder()
    report = discover(Riddle(), policy, ["task-0"], methods="best_of_k", budget=20)
    assert report.runs[0].attempts == 20
    assert len(policy.calls) == 1  # as many at once as it takes: they do not depend on each other
    with pytest.raises(UsageError, match=r"Recorder.*leave 'sdpo' out"):
        discover(Riddle(), Recorder(), methods=("best_of_k", "sdpo"))
    with pytest.raises(UsageError, match=r"Recorder.*leave 'multi_turn' out"):
        discover(Riddle(), Recorder(), methods="multi_turn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("sdpo", "best_of_n")}, "'best_of_n'.*'best_of_k'"),
        ({"methods": ()}, "no method is given"),
        ({"budget": 0}, "budget is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": ["task-9"]}, "'task-9'.*'task-"),
        ({"config": {"learning_rat": 1}}, "learning_rat.*learning_rate"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        discover(Riddle(), Recorder(), **arguments)


def test_a_task_counts_once_and_runs_that_are_done_are_not_made_again():
    first = discover(Riddle(), Recorder(), ["task-0"], methods="best_of_k", budget=4)
    policy, seen = Recorder(), []
    report = discover(
        Riddle(), policy, ["task-0", "task-1", "task-0"], methods="best_of_k", budget=4,
        done=first.runs, on_run=seen.append,
    )  # fmt: skip
    assert [r.task_id for r in report.runs] == ["task-0", "task-1"]
    assert [r.task_id for r in seen] == ["task-1"]
    assert {text for call in policy.calls for text in call} == {"Riddle 1?"}
    # a run of another budget is another run
    again = discover(Riddle(), policy, ["task-0"], methods="best_of_k", budget=5, done=first.runs)
    assert again.runs[0].attempts == 5


@pytest.mark.parametrize("method", METHODS)
def test_attempts_are_sampled_as_the_configuration_says(method, monkeypatch):
    policy, asked, given = Script(itertools.repeat("no")), [], []
    generate, rollout = policy.generate, rlrf.rollout

    def spied(prompts, params):
        asked.append((params.temperature, params.top_p, params.top_k, params.max_tokens))
        return generate(prompts, params)

    policy.generate = spied
    monkeypatch.setattr(rlrf, "rollout", lambda *a, **k: (given.append(k), rollout(*a, **k))[1])
    config = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "max_completion_length": 9}
    config |= {"num_generations": 2, "rollout_deadline_s": 7.5, "max_concurrency": 3}
    config |= {"load_best_model_at_end": True, "eval_steps": 1}  # which ask for a run directory
    discover(Riddle(), policy, "task-0", methods=method, budget=4, config=config)
    assert set(asked) == {(0.7, 0.8, 5, 9)}
    assert {(k["deadline_s"], k["max_concurrency"]) for k in given} == {(7.5, 3)}


# --- the command ----------------------------------------------------------------------------


class Stoppable(Letters):
    """Counts what it grades."""

    wanted = 0.9
    graded = 0
    lock = threading.Lock()
    broken = False
    slow = ""

    def __init__(self, *, tall: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.tall = tall

    def grade(self, task, completion):
        with Stoppable.lock:
            Stoppable.graded += 1
            if self.slow:
                notice("discover-test/slow", self.slow)
            if self.broken:
                raise InfraError("no sandbox", kind="sandbox_died", retryable=False)
            return super().grade(task, completion)


rlrf.register("discover-test-v0", Stoppable)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("model")))


@pytest.fixture
def command(folder, monkeypatch, capsys, tmp_path):
    """``command("--budget", "8")``: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("RLRF_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stoppable, "graded", 0)
    before = list(cli.app.registered_commands)

    def invoke(*arguments, env="discover-test-v0"):
        start = ["rlrf", "discover", "--env", env, "--model", folder]
        start += ["--set", "trainer.num_generations=4", "--set", "trainer.learning_rate=1e-2"]
        monkeypatch.setattr(sys, "argv", [*start, *arguments])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        out, error = capsys.readouterr()
        return ending.value.code, out, error

    yield invoke
    cli.app.registered_commands[:] = before


def test_the_command_from_one_end_to_the_other(command, tmp_path, folder):
    code, out, error = command(
        "--task", "task-1", "--budget", "12", "--seeds", "2", "--out", "found.json"
    )
    assert code == 0, error
    for name in (*METHODS, "discovery@1", "discovery@4", "discovery@12", "sdpo - best_of_k"):
        assert name in out
    assert "mean attempts" in out
    assert "written to found.json" in out
    assert "6/6 multi_turn task-1 seed " in error
    data = json.loads((tmp_path / "found.json").read_text())
    assert data["env"] == "discover-test-v0"
    assert (data["tasks"], data["seeds"], data["method"]) == (["task-1"], [0, 1], list(METHODS))
    assert data["trainer.learning_rate"] == 1e-2
    assert data["trainer.max_completion_length"] == 6
    assert data["lock"]["env"]["id"] == "discover-test-v0"
    runs = [DiscoveryRun.from_dict(r) for r in data["runs"]]
    assert len(runs) == 6
    same = discover(Stoppable(), folder, ["task-1"], budget=12, seeds=2, config=LEARNS).to_dict()
    assert data["runs"] == json.loads(json.dumps(same["runs"]))
    assert data["methods"] == json.loads(json.dumps(same["methods"]))
    sdpo = data["methods"]["sdpo"]["curve"]
    assert len(sdpo["values"]) == len(sdpo["low"]) == 12
    assert list(sdpo["discovery_at_k"]) == ["1", "4", "12"]
    assert not list(tmp_path.glob("*.partial"))


def test_slow_paths_are_in_the_report(command, tmp_path, monkeypatch):
    words = "the grader is slow, because it is old; get another"
    monkeypatch.setattr(Stoppable, "slow", words)
    code, _, error = command(
        *("--budget", "4", "--limit", "1", "--method", "best_of_k", "--out", "x.json")
    )
    assert code == 0, error
    assert error.count(words) == 1
    assert json.loads((tmp_path / "x.json").read_text())["warnings"] == [words]


def test_a_terminal_shows_bars_and_still_a_line_per_run(command, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, error = command("--limit", "2", "--budget", "4", "--out", "x.json")
    assert code == 0, error
    assert "6/6 multi_turn task-1 seed 0: " in error
    assert "of 4 attempts" not in error  # the bar says it


def test_options_of_the_environment_and_a_configuration_file(command, tmp_path):
    (tmp_path / "run.toml").write_text('[env]\nid = "other-v0"\n[trainer]\ntemperature = 0.5\n')
    code, _, error = command(
        "--config", "run.toml", "-o", "tall=true", "--feedback", "binary", "--budget", "4",
        "--limit", "2", "--method", "best_of_k, multi_turn", "--seed", "3", "--out", "x.json",
    )  # fmt: skip
    assert code == 0, error
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["env_options"] == {"tall": True, "feedback": "binary"}
    assert data["feedback"] == "binary"
    assert data["trainer.temperature"] == 0.5
    assert data["tasks"] == ["task-0", "task-1"]
    assert data["method"] == list(data["methods"]) == ["best_of_k", "multi_turn"]
    assert data["seeds"] == [3]
    assert data["sdpo_minus"] == {}


def test_settings_without_effect_are_named_and_bind_nobody(command, tmp_path, monkeypatch):
    arguments = ("--method", "best_of_k", "--limit", "2", "--budget", "4", "--out", "x.json")

    def stop(self, run, original=module._RunProgress.run):
        original(self, run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._RunProgress, "run", stop)
        code, _, error = command(*arguments, "--set", "trainer.seed=7")
    assert code == 130
    assert "--seed and --seeds are the seeds of the runs" in error
    more = ("trainer.save_model=false", "trainer.eval_samples=2", "trainer.project=x")
    code, _, error = command(
        *arguments, *("--set", "trainer.seed=7"), *(w for m in more for w in ("--set", m))
    )
    assert code == 0, error
    assert "1 runs done" in error
    assert "note: eval_samples, save_model, project of the trainer have no effect" in error
    data = json.loads((tmp_path / "x.json").read_text())
    assert "trainer.save_model" not in data
    assert "trainer.temperature" in data


def test_tasks_from_a_file_in_its_order_each_once(command, tmp_path):
    (tmp_path / "hard.txt").write_text("task-2\n\ntask-0 \ntask-2\n")
    arguments = ("--tasks-file", "hard.txt", "--method", "best_of_k", "--budget", "2")
    assert command(*arguments, "--out", "x.json")[0] == 0
    assert json.loads((tmp_path / "x.json").read_text())["tasks"] == ["task-2", "task-0"]


def test_without_out_it_writes_below_runs(command, tmp_path):
    arguments = ("--task", "task-0", "--method", "best_of_k", "--budget", "2")
    assert command(*arguments)[0] == 0
    assert command(*arguments)[0] == 0
    assert len(list((tmp_path / "runs" / "discover").glob("*.json"))) == 2


ALL = ("--limit", "2", "--budget", "12", "--seeds", "2", "--out")


@pytest.mark.slow
def test_a_killed_discovery_goes_on_where_it_was(command, tmp_path, monkeypatch):
    assert command(*ALL, "whole.json")[0] == 0
    whole = json.loads((tmp_path / "whole.json").read_text())
    graded = Stoppable.graded

    calls = []

    def stop(self, run, original=module._RunProgress.run):
        original(self, run)
        calls.append(run)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._RunProgress, "run", stop)
        code, _, error = command(*ALL, "cut.json")
    assert code == 130
    assert "interrupted" in error
    partial = tmp_path / "cut.json.partial"
    assert not (tmp_path / "cut.json").exists()
    text = partial.read_text()
    assert len(text.splitlines()) == 1 + 5
    partial.write_text(text[: -len(text.splitlines()[-1]) // 2])  # killed while it wrote the fifth

    Stoppable.graded = 0
    code, _, error = command(*ALL, "cut.json")
    assert code == 0, error
    assert "4 runs done" in error
    assert "12/12 " in error
    assert Stoppable.graded == graded - sum(r.attempts for r in calls[:4])
    resumed = json.loads((tmp_path / "cut.json").read_text())
    for name in ("runs", "methods", "sdpo_minus"):
        assert resumed[name] == whole[name]
    assert not partial.exists()


@pytest.mark.slow
def test_other_settings_do_not_continue(command, tmp_path, monkeypatch):
    def stop(self, run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._RunProgress, "run", stop)
        assert command(*ALL, "x.json")[0] == 130
    code, _, error = command(*ALL, "x.json", "--set", "trainer.temperature=0.5")
    assert code == 2
    assert "trainer.temperature=1.0" in error
    assert "0.5" in error
    assert "--overwrite" in error
    assert command(*ALL, "x.json", "--set", "trainer.temperature=0.5", "--overwrite")[0] == 0
    code, _, error = command(*ALL, "x.json")
    assert code == 2
    assert "x.json exists" in error


def test_settings_without_a_run_bind_nobody(command, tmp_path):
    """What a command leaves that was killed, or failed, before its first run was done."""
    (tmp_path / "x.json.partial").write_text('{"env": "other-v0"}\n')
    code, _, error = command(*ALL, "x.json")
    assert code == 0, error
    assert json.loads((tmp_path / "x.json").read_text())["env"] == "discover-test-v0"


def test_nothing_scored_exits_with_1_and_is_tried_again(command, tmp_path, monkeypatch):
    arguments = ("--task", "task-0", "--budget", "4", "--out", "x.json")
    with monkeypatch.context() as patch:
        patch.setattr(Stoppable, "broken", True)
        code, _, error = command(*arguments)
    assert code == 1
    assert "nothing could be scored: sandbox_died" in error
    assert "3 runs were given up" in error
    assert json.loads((tmp_path / "x.json").read_text())["methods"]["sdpo"]["curve"] is None
    code, _, error = command(*arguments)
    assert code == 0, error
    assert "runs done" not in error
    data = json.loads((tmp_path / "x.json").read_text())
    assert all(r["failure"] is None for r in data["runs"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "task-9"), "unknown task 'task-9'. Did you mean 'task-"),
        (("--method", "sdpo,best"), "unknown method 'best'"),
        (("--method", ","), "no method is given"),
        (("--budget", "0"), "--budget is 0"),
        (("--limit", "0"), "--limit is 0"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--tasks-file", "none.txt"), "--tasks-file 'none.txt' cannot be read"),
        (("--tasks-file", "/dev/null"), "names no task"),
        (("--out", "none/x.json"), "there is no folder 'none'"),
        (("--set", "trainer.name=grpo"), "trainer.name is 'grpo'"),
        (("--set", "trainer.learnin_rate=1"), "did you mean 'learning_rate'"),
        (("--feedback", "much"), "much"),
        (("-o", "long=1"), "long"),
        (("extra",), "extra"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_to_do(command, tmp_path, arguments, message):
    code, _, error = command(*arguments)
    assert code == 2
    assert message in error
    assert not list(tmp_path.rglob("*.partial"))
