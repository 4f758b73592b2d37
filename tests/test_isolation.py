"""One bad item costs itself: at every stage, under every policy."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import rlrf
from rlrf import (
    Completion,
    Feedback,
    InfraError,
    MissingDependencyError,
    Outcome,
    PromptError,
    SamplingParams,
    ScriptedPolicy,
    Segment,
    Task,
    Turn,
    UsageError,
)
from rlrf.errors import ReturnTypeError, describe
from rlrf.feedback import MAX_SEGMENTS
from rlrf.policy import check_completion
from rlrf.wrappers import FeedbackLevel

torch = pytest.importorskip("torch", reason="needs the extra 'train'")
from rlrf.reprompt import Hint, Reprompter  # noqa: E402
from rlrf_trainers.config import SDPOConfig  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.engines.openai import OpenAIPolicy  # noqa: E402
from tests.test_openai_policy import Server, completion  # noqa: E402
from tests.tiny_model import CHATML, tiny_model, tiny_tokenizer  # noqa: E402


class Wordless(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class Huge(Exception):
    def __str__(self):
        return "x\ud800" * 1_000_000


def raises(error):
    def act():
        raise error

    return act


OUTCOMES = {
    "metric_none": lambda: Outcome(0.0, metrics={"a": None}),
    "metric_text": lambda: Outcome(0.0, metrics={"a": "1"}),
    "metric_array": lambda: Outcome(0.0, metrics={"a": np.ones(2)}),
    "metric_huge": lambda: Outcome(0.0, metrics={"a": 10**400}),
    "metric_nan": lambda: Outcome(0.0, metrics={"a": math.nan}),
    "metric_complex": lambda: Outcome(0.0, metrics={"a": np.complex64(1)}),
    "metric_key": lambda: Outcome(0.0, metrics={1: 1.0}),
    "metrics_list": lambda: Outcome(0.0, metrics=[("a", 1.0)]),
    "metrics_none": lambda: Outcome(0.0, metrics=None),
    "reward_nan": lambda: Outcome(math.nan),
    "reward_inf": lambda: Outcome(np.float32("inf")),
    "reward_huge": lambda: Outcome(10**400),
    "reward_large": lambda: Outcome(1e300),
    "reward_text": lambda: Outcome("1"),
    "reward_array": lambda: Outcome(np.ones(1)),
    "reward_none": lambda: Outcome(None),
    "feedback_text": lambda: Outcome(0.0, "no"),
    "feedback_items": lambda: Outcome(0.0, Feedback(["no"])),
    "segment_kind": lambda: Outcome(0.0, Feedback.of("oops", "no")),
    "segment_text": lambda: Outcome(0.0, Feedback.of("hint", None)),
    "segment_source": lambda: Outcome(0.0, Feedback.of("hint", "x", source=3)),
    "segment_priority": lambda: Outcome(0.0, Feedback.of("hint", "x", priority="high")),
    "segment_span": lambda: Outcome(0.0, Feedback.of("hint", "x", span=("a", "b"))),
    "pair": lambda: (1.0, Feedback()),
    "none": lambda: None,
    "turn": lambda: Turn(),
    "wordless": raises(Wordless()),
    "huge": raises(Huge()),
    "stop": raises(StopIteration()),
    "key": raises(KeyError("x")),
    "usage": raises(UsageError("this task is wrong")),
    "recursion": lambda: deep(),
    "unnamed": raises(ValueError()),
}
"""What an environment may do wrong with one task; each costs that task's rollout."""


def deep():
    return deep()


SCORED = {
    "scalar": lambda: Outcome(np.float64(0.5), metrics={"a": np.int8(1), "b": np.bool_(True)}),
    "bool": lambda: Outcome(True, metrics={"a": True}),
    "flood": lambda: Outcome(0.0, Feedback(Segment("lint", str(i)) for i in range(10_000))),
    "surrogate": lambda: Outcome(0.0, Feedback.of("hint", "x\ud800y")),
}


class Plain(rlrf.SingleTurnEnv):
    """Tasks do what their id says; ``good-N`` are fine."""

    def __init__(self, ids, **kwargs):
        super().__init__(**kwargs)
        self.ids = ids

    def load_tasks(self, split):
        return [Task(i, PROMPTS.get(i, f"Do {i}.")) for i in self.ids]

    def grade(self, task, completion):
        json.dumps(completion).encode()
        act = OUTCOMES.get(task.id) or SCORED.get(task.id)
        return act() if act else Outcome(1.0, Feedback.of("hint", task.id))


class Async(Plain):
    async def grade(self, task, completion):
        return super().grade(task, completion)


class Turns(rlrf.MultiTurnEnv):
    """The same in two turns, the fault in the first answer."""

    def __init__(self, ids, **kwargs):
        super().__init__(**kwargs)
        self.ids = ids

    load_tasks = Plain.load_tasks

    def start(self, task):
        if task.id == "start":
            raise Wordless
        return {"task": task.id, "turn": 0}

    def respond(self, state, action):
        state["turn"] += 1
        act = TURNS.get(state["task"])
        if act and state["turn"] == 1:
            return act()
        return Turn("Go on.", 1.0, terminated=state["turn"] == 2)


TURNS = {
    "start": None,
    "content": lambda: Turn(({"role": "user", "content": 5},)),
    "content_list": lambda: Turn(({"role": "user", "content": [{"type": "text"}]},)),
    "role": lambda: Turn(({"role": "nobody", "content": "x"},)),
    "messages": lambda: Turn(5),
    "no_json": lambda: Turn(({"role": "user", "content": "x", "extra": object()},)),
    "nan_json": lambda: Turn(({"role": "user", "content": "x", "extra": math.nan},)),
    "name": lambda: Turn(({"role": "user", "content": "x", "name": 3},)),
    "ended": lambda: Turn("x", terminated="yes"),
    "metric": lambda: Turn("x", metrics={"a": None}),
    "outcome": lambda: Outcome(1.0),
    "raised": raises(Wordless()),
}
PROMPTS = {
    "surrogate_prompt": "x\ud800y",
    "empty": "",
    "refused": "please refuse this",
    "long": "long " * 400,
}


# --- policies -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    made = Server()

    def answer(body):
        text = body["messages"][-1]["content"]
        if "refuse" in text:
            return 200, b'{"choices": 3}', {}
        return 200, completion("ok"), {}

    made.answer = answer
    yield made
    made.close()


def refusing_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{%- for message in messages %}",
        "{%- for message in messages %}{%- if 'refuse' in message.content %}"
        "{{- raise_exception('I refuse') }}{%- endif %}",
    )
    return tokenizer


MODEL, TOKENIZER = tiny_model(), refusing_tokenizer()


def hf_policy(server):
    return HFPolicy(MODEL, TOKENIZER, max_context=900)


def scripted(server):
    def reply(messages):
        text = messages[0]["content"]
        if "refuse" in text:
            raise Wordless
        return "ok\ud800" if "surrogate" in text else "ok"

    return ScriptedPolicy(reply)


def openai(server):
    return OpenAIPolicy("m", base_url=server.url, retries=0)


POLICIES = {"hf": hf_policy, "scripted": scripted, "openai": openai}
few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # each example is small as it is
    suppress_health_check=list(HealthCheck),
)


def collect(env, policy, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"params": SamplingParams(max_tokens=2), "retries": 1, **options}
        done = rlrf.rollout(env, policy, **options)
    for rollout in done:  # what is recorded can be read again
        text = json.dumps(rollout.to_dict(), allow_nan=False)
        text.encode()
        assert rlrf.Rollout.from_dict(json.loads(text)) == rollout
    rlrf.EvalReport.of(done).to_dict(rollouts=True)
    return {r.task_id: r for r in done}


def check(done, unscored, scored=()):
    for name, rollout in done.items():
        if name in unscored:
            assert rollout.reward is None, name
            assert rollout.failure.startswith(unscored[name]), (name, rollout.failure)
            assert len(rollout.failure) < 3000
        else:
            assert rollout.scored, (name, rollout.failure)


@pytest.mark.parametrize("kind", ["hf", "scripted", pytest.param("openai", marks=pytest.mark.slow)])
@few
@given(data=st.data())
def test_exactly_the_bad_item_is_unscored(server, kind, data):
    policy = POLICIES[kind](server)
    refused = {"hf": "prompt_refused: ", "scripted": "policy_error: ", "openai": "policy_error: "}
    stages = {"refused": refused[kind]}
    if kind == "hf":
        stages["long"] = "prompt_too_long: "
    bad = data.draw(st.lists(st.sampled_from(sorted(OUTCOMES)), max_size=4, unique=True))
    bad += data.draw(st.lists(st.sampled_from(sorted(stages)), max_size=2, unique=True))
    good = ["good-1", "good-2", "surrogate_prompt", "empty", *SCORED]
    ids = data.draw(st.permutations([*bad, *good]))
    env = (Plain if data.draw(st.booleans()) else Async)(ids)
    done = collect(env, policy, max_concurrency=data.draw(st.sampled_from([1, 3, 64])))
    assert list(done) == ids
    check(done, {name: stages.get(name, "env_error: ") for name in bad})
    assert len(done["flood"].feedback[0]) == MAX_SEGMENTS


@pytest.mark.slow
@pytest.mark.parametrize("kind", POLICIES)
def test_every_fault_of_a_turn_is_that_episodes(server, kind):
    ids = ["good-1", *TURNS, "surrogate_prompt", "good-2"]
    done = collect(Turns(ids), POLICIES[kind](server))
    check(done, dict.fromkeys(TURNS, "env_error: "))


def test_every_fault_of_an_outcome_is_named():
    done = collect(Plain([*OUTCOMES, "good-1"]), lambda messages: "ok")
    check(done, dict.fromkeys(OUTCOMES, "env_error: "))
    assert "Outcome.metrics['a'] is None (NoneType)" in done["metric_none"].failure
    assert "__str__ raised" in done["wordless"].failure
    for name, rollout in done.items():
        if name.startswith(("metric", "reward")):
            assert rollout.failure.startswith("env_error: OutcomeError: Outcome."), name


def test_rewards_that_sum_to_no_number(monkeypatch):
    monkeypatch.setattr("rlrf.outcome.MAX_REWARD", 1e308)

    class Rich(Turns):
        def respond(self, state, action):
            state["turn"] += 1
            reward = 1e308 if state["task"] == "rich" else 1.0
            return Turn("Go on.", reward, terminated=state["turn"] == 2)

    check(collect(Rich(["rich", "good-1"]), lambda m: "ok"), {"rich": "env_error: "})
    large = Outcome(0.0, metrics={"a": 1e308})  # the mean of such is a number
    monkeypatch.setitem(OUTCOMES, "large", lambda: large)
    done = collect(Plain(["large"]), lambda m: "ok", group_size=3)
    assert rlrf.EvalReport.of([done["large"]] * 3).metrics["a"] == pytest.approx(1e308)


def test_a_tokenizer_that_fails_on_one_feedback():
    class Picky:
        all_special_tokens = ()

        def encode(self, text, add_special_tokens=False):
            if "good-1" in text:
                raise Wordless
            return list(text.encode())

        def decode(self, ids, skip_special_tokens=False):
            return bytes(ids).decode()

    env = Plain(["good-1", "good-2"], tokenizer=Picky())
    check(collect(env, lambda m: "ok"), {"good-1": "env_error: "})


def test_tools_that_raise_cost_the_rollouts_and_not_the_run():
    class Broken(Plain):
        @property
        def tools(self):
            raise AttributeError("no tools today")

    class Checking(rlrf.ScriptedPolicy):
        def check_tools(self, tools):
            raise UsageError("no tools here")

    policy = Checking(lambda m: "ok")
    for env in (Broken(["good-1"]), FeedbackLevel(Broken(["good-1"]), "located")):
        done = collect(env, policy)
        assert done["good-1"].failure == "env_error: AttributeError: no tools today"
    env = Plain(["good-1"])
    env.tools = ["f"]
    assert "each tool is a mapping" in collect(env, lambda m: "ok")["good-1"].failure


def test_what_every_task_is_refused_for_is_the_callers_mistake():
    class Misused(Plain):
        def grade(self, task, completion):
            self.graded = getattr(self, "graded", 0) + 1
            raise UsageError("set the option")

    env = Misused([f"good-{i}" for i in range(50)])
    with pytest.raises(UsageError, match="set the option"):
        rlrf.rollout(env, lambda m: "ok", max_concurrency=1)
    assert env.graded == 3  # and at once
    with pytest.raises(UsageError, match="set the option"):
        rlrf.rollout(Misused(["good-1"]), lambda m: "ok")
    proven = Plain(["usage", "good-1"])
    assert collect(proven, lambda m: "ok", tasks=["good-1"])["good-1"].scored
    check(collect(proven, lambda m: "ok", tasks=["usage"]), {"usage": "env_error: "})

    class Bare(Plain):
        def grade(self, task, completion):
            raise MissingDependencyError("it", "nothing", "none")

    with pytest.raises(MissingDependencyError):
        rlrf.rollout(Bare(["good-1", "good-2"]), lambda m: "ok")
    policy = HFPolicy(MODEL, TOKENIZER)
    with pytest.raises(PromptError, match="refuse"):
        collect(Plain(["refused"]), policy)


# --- policies' faults ---------------------------------------------------------------------------

GOOD = {"prompt_ids": (1,), "token_ids": (2, 3), "logprobs": (-0.5, 0.0), "text": "ok"}


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": (-1, 3)},
        {"token_ids": (2**40, 3)},
        {"token_ids": (2.0, 3)},
        {"token_ids": (True, 3)},
        {"token_ids": ("2", 3)},
        {"token_ids": None},
        {"prompt_ids": (-1,)},
        {"logprobs": (math.nan, 0.0)},
        {"logprobs": (0.5, 0.0)},
        {"logprobs": (-math.inf, 0.0)},
        {"logprobs": (None, 0.0)},
        {"logprobs": (0.0,)},
        {"text": None},
        {"text": b"ok"},
        {"finish_reason": "done"},
        {"message": {"role": "user", "content": "x"}},
        {"message": {"role": "assistant", "content": 3}},
        {"message": {"role": "assistant", "content": "x", "tool_calls": 3}},
        {"message": {"role": "assistant", "content": "x", "tool_calls": [{"a": object()}]}},
        {"offsets": ((0, 1),)},
        {"offsets": 5},
        {"offsets": (0, 1)},
        {"logprobs": None},
        {"logprobs": np.array([-0.5, 0.0])},
        {"logprobs": 5},
        {"ranges": 5},
        {"ranges": (0, 1)},
        {"ranges": (("a", "b"),)},
    ],
)
def test_a_completion_that_is_none_is_no_reward(fields):
    bad = Completion(**{**GOOD, **fields})
    kind = ReturnTypeError if "message" in fields else InfraError  # whose doing it is
    with pytest.raises(kind, match="a completion that is none"):
        check_completion(bad)
    check_completion(Completion(**{**GOOD, "token_ids": (np.int64(2), 3)}))

    class Server:
        max_batch_size = 8

        def generate(self, prompts, params):
            return [
                bad if "bad" in p.messages[0]["content"] else Completion(**GOOD) for p in prompts
            ]

    done = collect(Plain(["good-1", "bad", "good-2"]), Server())
    check(done, {"bad": "policy_error: "})


def test_a_completion_that_is_nothing(server):
    class Server:
        max_batch_size = 8

        def generate(self, prompts, params):
            return [
                None if "bad" in p.messages[0]["content"] else Completion(**GOOD) for p in prompts
            ]

    check(collect(Plain(["good-1", "bad"]), Server()), {"bad": "policy_error: "})


@pytest.mark.parametrize(
    "choice",
    [
        {"token_ids": [-5, 6]},
        {"token_ids": [5.5, 6]},
        {"token_ids": [2**40, 6]},
        {"token_ids": "ab"},
        {"logprobs": {"content": [{"logprob": math.nan}, {"logprob": -1.0}]}},
        {"logprobs": {"content": [{"logprob": "NaN"}, {"logprob": -1.0}]}},
        {"logprobs": {"content": [{"logprob": 3.0}, {"logprob": -1.0}]}},
        {"logprobs": {"content": [{"logprob": -math.inf}, {"logprob": -1.0}]}},
    ],
)
def test_ids_and_logprobs_of_a_server_are_looked_at(choice):
    good = {"token_ids": [5, 6], "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.0}]}}
    server = Server()

    def answer(body):
        bad = "bad" in body["messages"][0]["content"]
        reply = completion("ab", **{**good, **(choice if bad else {})})
        return 200, reply | {"prompt_token_ids": [1, 2]}, {}

    server.answer = answer
    try:
        policy = OpenAIPolicy("m", base_url=server.url, retries=0, token_ids=True)
        done = collect(Plain(["good-1", "bad"]), policy)
    finally:
        server.close()
    check(done, {"bad": "policy_error: "})
    assert done["good-1"].completion_ids == (5, 6)


@pytest.mark.parametrize(
    "reply",
    [
        {"content": 5},
        {"role": "user", "content": "a"},
        {"content": "x", "tool_calls": "z"},
        {"content": "x", "reasoning_content": 5},
        {"content": None, "tool_calls": [{"x": math.nan}]},
        None,
        5,
        b"ok",
    ],
)
def test_a_reply_that_is_no_message_costs_its_own_rollout(reply):
    asked = []

    def answer(messages):
        bad = "bad" in messages[-1]["content"]
        asked.append(bad)
        return reply if bad else "ok"

    for policy in (answer, ScriptedPolicy(answer)):
        asked.clear()
        done = collect(Plain(["good-1", "bad", "good-2"]), policy, retries=2)
        check(done, {"bad": "policy_error: "})
        assert sum(asked) == 1  # not retried


@pytest.mark.parametrize("spoilt", ["one", "all"])
def test_logits_that_are_not_finite_cost_their_own_prompt(spoilt):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    (bad,) = tokenizer("Z", add_special_tokens=False)["input_ids"]

    def spoil(module, inputs, embedded):  # no weight: the head has the same ones
        return torch.where((inputs[0] == bad)[..., None] | (spoilt == "all"), math.nan, embedded)

    model.get_input_embeddings().register_forward_hook(spoil)

    class Ask(Plain):
        def load_tasks(self, split):
            return [Task(i, "Z" if i == "bad" else "q") for i in self.ids]

    ids = ["good-1", "good-2", "bad", "good-3"]
    done = collect(Ask(ids), HFPolicy(model, tokenizer))
    lost = "policy_error: the model's logits are not finite: its weights have diverged"
    check(done, dict.fromkeys(["bad"] if spoilt == "one" else ids, lost))
    if spoilt == "all":
        assert lost in str(rlrf.EvalReport.of(done.values()))


def test_one_engine_failure_does_not_fail_its_neighbours_for_ever():
    class Engine(ScriptedPolicy):
        def generate(self, prompts, params):
            if any("bad" in p.messages[0]["content"] for p in prompts):
                raise InfraError("the engine died", kind="engine")
            return super().generate(prompts, params)

    ids = ["good-1", "bad", *(f"good-{i}" for i in range(2, 9))]
    check(collect(Plain(ids), Engine(lambda m: "ok")), {"bad": "engine: "})


# --- the reprompt -------------------------------------------------------------------------------


def test_a_reprompt_that_the_template_refuses_is_none():
    policy = HFPolicy(MODEL, TOKENIZER)
    env = Plain(["good-1"])
    (rollout,) = rlrf.rollout(env, lambda m: "ok")
    reprompter = Reprompter(SDPOConfig(), policy, env)
    assert reprompter.build(rollout, Hint("right")) is not None
    with pytest.warns(UserWarning, match="'good-1' is not distilled: .*I refuse"):
        assert reprompter.build(rollout, Hint("refuse")) is None
    # Thousands of segments, and no room: it comes to an end.
    many = Feedback(Segment("lint", f"{i}") for i in range(3000))
    config = SDPOConfig(max_reprompt_len=300)
    built = Reprompter(config, policy, env).build(rollout, Hint(None, many))
    assert built is not None
    assert len(built.prompt_ids) <= 300


# --- tasks --------------------------------------------------------------------------------------


def loading(tasks):
    class Env(Plain):
        def load_tasks(self, split):
            return tasks

    return Env([])


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (None, "returned None"),
        (5, r"returned 5 \(int\)"),
        ("abc", "returned 'abc'"),
        (b"abc", "returned b'abc'"),
        ({"a": Task("a", "x")}, "returned {'a'"),
        ({Task("a", "x").id}, "returned {'a'}"),
        (["a", "b"], r"task 0 is 'a' \(str\)"),
        ([Task("a", "x"), None], "task 1 is None"),
        ([Task("a", "x"), Task("a", "y")], "two tasks have the id 'a'"),
        ([], "no task in split"),
        (iter(()), "no task in split"),
    ],
)
def test_tasks_that_are_none_are_refused(tasks, words):
    with pytest.raises(UsageError, match=words):
        rlrf.rollout(loading(tasks), lambda m: "ok")


def test_tasks_may_come_from_a_generator():
    env = loading(Task(f"t{i}", "x") for i in range(3))
    assert list(collect(env, lambda m: "ok")) == ["t0", "t1", "t2"]
    assert list(collect(env, lambda m: "ok")) == ["t0", "t1", "t2"]
    with pytest.raises(UsageError, match="metadata"):
        Task("a", "x", metadata=None)


def test_any_error_has_words():
    assert describe(Wordless()).startswith("Wordless: (its text cannot be had")
    assert describe(ValueError()) == "ValueError"
    assert describe(KeyboardInterrupt()) == "interrupted"
    assert len(describe(Huge())) < 2100
    describe(Huge()).encode()


def test_capped_feedback_says_so_and_keeps_every_kind():
    many = [Segment("lint", str(i), priority=5) for i in range(1000)]
    told = Outcome(0.0, Feedback([*many, Segment("wrong_answer", "No.")])).feedback
    assert len(told) == MAX_SEGMENTS
    assert set(told.kinds) == {"lint", "wrong_answer", "hint"}
    assert told[-1].text == "[... 746 further remarks are left out ...]"
    assert told.at_level("binary")
    assert Outcome(0.0, told).feedback == told
