"""The policy protocol's plain data."""

from __future__ import annotations

import asyncio

import pytest

import rlrf
from rlrf import (
    Completion,
    Prompt,
    SamplingParams,
    ScriptedPolicy,
    Task,
    UnknownIdError,
    UsageError,
)
from rlrf.policy import policies
from tests.environments_for_tests import Echo, Guess


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("max_tokens", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=rf"SamplingParams\.{name} is {value}; must be"):
        SamplingParams(**{name: value})


def test_edges_are_accepted():
    assert SamplingParams(temperature=0, top_p=1.0, top_k=-1, max_tokens=1).temperature == 0
    assert SamplingParams() == SamplingParams(temperature=1.0, top_p=1.0, top_k=0)


def test_a_completion_is_a_message():
    plain = Completion((1,), (2,), (0.0,), "hi")
    assert plain.assistant_message == {"role": "assistant", "content": "hi"}
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert Completion((1,), (2,), (), "", message=message).assistant_message == message


def test_policies_come_from_the_registry(monkeypatch):
    monkeypatch.setattr(policies, "_added", {})
    policies.register("scripted", ScriptedPolicy)
    policy = rlrf.make_policy("scripted", reply=lambda messages: messages[-1]["content"])
    (done,) = policy.generate([Prompt(({"role": "user", "content": "ö"},))], SamplingParams())
    assert done.text == "ö"
    with pytest.raises(UnknownIdError, match="unknown policy 'scriptd'"):
        rlrf.make_policy("scriptd")


def test_a_script_counts_and_cuts_nothing():
    params = SamplingParams(max_tokens=1)
    (done,) = ScriptedPolicy("€uro").generate([Prompt(())], params)
    assert (done.text, done.finish_reason) == ("€uro", "stop")
    assert (done.prompt_ids, done.token_ids, done.logprobs) == ((), (), ())
    report = rlrf.evaluate(Echo(), ScriptedPolicy("yes"), params=params)
    assert (report.mean_length, report.finish_reasons) == (None, {"terminated": 3})


CALL = {"id": "1", "type": "function", "function": {"name": "guess", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


async def awaited(messages):
    await asyncio.sleep(0)
    return said(messages)


def said(messages):
    return ["a", "b", "c"][sum(m["role"] == "assistant" for m in messages)]


@pytest.mark.parametrize(
    ("script", "contents"),
    [
        ("a", ["a", "a", "a"]),
        ([{"type": "text", "text": "a"}], ["a", "a", "a"]),
        (CALLS, [None] * 3),
        (("a", CALLS), ["a", None, None]),
        (["a", [{"type": "text", "text": "b"}], rlrf.assistant("c")], ["a", "b", "c"]),
        (["a", "b", "c", "d"], ["a", "b", "c"]),
        (said, ["a", "b", "c"]),
        (awaited, ["a", "b", "c"]),
    ],
)
def test_a_script_plays_an_episode(script, contents):
    for rollout in rlrf.rollout(Guess(max_turns=3), ScriptedPolicy(script), group_size=2):
        told = [m["content"] for m in rollout.messages if m["role"] == "assistant"]
        assert (told, rollout.failure) == (contents, None)


def test_few_shot_prompts_do_not_move_a_sequence_on():
    class Shown(Guess):
        def load_tasks(self, split):
            return [Task("a", (rlrf.user("x"), rlrf.assistant("y"), rlrf.user("z")))]

    (rollout,) = rlrf.rollout(Shown(max_turns=2), ScriptedPolicy(["1", "2"]))
    assert [m["content"] for m in rollout.messages if m["role"] == "assistant"] == ["y", "1", "2"]


@pytest.mark.parametrize("collect", [rlrf.rollout, rlrf.evaluate])
@pytest.mark.parametrize("reply", [said, awaited])
def test_a_bare_function_is_a_policy(collect, reply):
    done = collect(Echo(), reply)
    assert {r.text for r in getattr(done, "rollouts", done)} == {"a"}
    twin = {rlrf.rollout: rlrf.arollout, rlrf.evaluate: rlrf.aevaluate}[collect]
    assert asyncio.run(twin(Echo(), reply)) == done


@pytest.mark.parametrize(
    "odd", [None, 3, [], ["a", None], ScriptedPolicy, [said], {"role": "tool"}]
)
def test_what_is_no_script(odd):
    with pytest.raises(UsageError, match="an assistant message"):
        ScriptedPolicy(odd)


class OneArgument:
    def generate(self, prompts):
        return []


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (lambda: "x", r"is called as \(messages\), but takes \(\)"),
        (lambda messages, params: "x", "missing a required argument: 'params'"),
        (ScriptedPolicy, "was given as its class, ScriptedPolicy; make one"),
        (
            type("Odd", (), {"generate": lambda self, prompts: []})(),
            r"generate\(\) of Odd .*params",
        ),
        ("hf", r"got 'hf' \(str\)\. rlrf\.make_policy"),
    ],
)
def test_what_cannot_be_called_as_a_policy_is_refused_at_the_start(policy, told):
    with pytest.raises(UsageError, match=told):
        rlrf.rollout(Echo(), policy)


def test_a_script_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "a_script_of_mine.py").write_text("def say(m):\n    return 'yes'\nlist = ['no']\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reply in (("say", "yes"), ("list", "no")):
        policy = rlrf.make_policy(f"scripted:a_script_of_mine:{name}", max_batch_size=1)
        assert {r.text for r in rlrf.rollout(Echo(), policy)} == {reply}
    for name in ("scripted:a_script_of_mine", "scripted:a_script_of_mine:", "scripted::say"):
        with pytest.raises(UsageError, match="scripted:module:function"):
            rlrf.make_policy(name)
    with pytest.raises(UsageError, match="has no 'sya'"):
        rlrf.make_policy("scripted:a_script_of_mine:sya")
