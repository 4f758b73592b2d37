"""The policy protocol's plain data."""

from __future__ import annotations

import pytest

import rlrf
from rlrf import Completion, Prompt, SamplingParams, ScriptedPolicy, UnknownIdError, UsageError
from rlrf.policy import policies


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
    assert (done.text, done.prompt_ids, done.token_ids) == ("ö", (195, 182), (195, 182, 256))
    with pytest.raises(UnknownIdError, match="unknown policy 'scriptd'"):
        rlrf.make_policy("scriptd")


def test_a_script_is_a_function():
    for odd in ("a", ["a", "b"], None):
        with pytest.raises(UsageError, match="give a function of the messages"):
            ScriptedPolicy(odd)
