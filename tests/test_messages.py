"""Chat messages: what is one, and how strings, messages and actions become each other."""

from __future__ import annotations

import pytest

import rlrf
from rlrf import UsageError, assistant, system, user
from rlrf.messages import action_message, action_text, as_messages, is_message
from rlrf.spaces import Chat
from tests.environments_for_tests import Echo

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_strings_messages_and_sequences_become_tuples():
    for text in ("a\ud800", {"role": "user", "content": "a\ud800"}):
        assert as_messages(text)[0]["content"].encode() == b"a\xef\xbf\xbd"
    assert as_messages("hi") == (user("hi"),)
    assert as_messages(system("s")) == ({"role": "system", "content": "s"},)
    assert as_messages([system("s"), user("u"), assistant("a")])[2]["role"] == "assistant"
    assert as_messages([]) == ()
    mine = user("u")
    (copied,) = as_messages([mine])
    copied["content"] = "changed"
    assert mine == user("u")


@pytest.mark.parametrize(
    ("value", "good"),
    [
        (user("x"), True),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, True),
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, True),
        ({"role": "user", "content": None}, False),
        ({"role": "nobody", "content": "x"}, False),
        ({"role": "user"}, False),
        ({"content": "x"}, False),
        ("x", False),
        (None, False),
    ],
)
def test_what_a_message_is(value, good):
    assert is_message(value) is good
    if not good and not isinstance(value, str):
        with pytest.raises(UsageError, match="message 1 is"):
            as_messages([user("fine"), value])


PARTS = [{"type": "text", "text": "yes"}, {"type": "text", "text": ", it is"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:,x"}}


def test_text_parts_are_joined_wherever_a_content_is_given():
    for given in (PARTS, tuple(PARTS)):
        whole = {"role": "assistant", "content": given}
        assert as_messages(given) == as_messages([user(given)]) == (user("yes, it is"),)
        assert as_messages(whole) == (assistant("yes, it is"),)
        for action in (given, whole, {"content": given}):
            assert action_message(action) == assistant("yes, it is")
            assert action_text(action) == "yes, it is"
        assert is_message(whole)
        assert whole in Chat("action")
        assert given in Chat("action")
    thinking = [{"type": "text", "text": "<think>hm"}, {"type": "text", "text": "</think>yes"}]
    assert action_message(thinking) == {**assistant("yes"), "reasoning_content": "hm"}
    (told,) = as_messages({"role": "tool", "content": PARTS, "tool_call_id": "1"})
    assert told["content"] == "yes, it is"


@pytest.mark.parametrize(
    "part", [IMAGE, {"type": "text"}, {"type": "text", "text": 3}, "yes", {"type": "refusal"}]
)
def test_parts_that_are_no_text_are_refused(part):
    for read in (as_messages, action_message, action_text):
        with pytest.raises(UsageError, match=r"part 1 of its content is .*; give text"):
            read({"role": "assistant", "content": [PARTS[0], part]})
    assert not is_message(user([part]))
    if part != "yes":
        with pytest.raises(UsageError, match=r"part 0 of its content is .*; give text"):
            action_message([part])
    with pytest.raises(UsageError, match="an empty list of parts"):
        as_messages(user([]))


def test_an_environment_and_a_policy_read_parts():
    env = Echo()
    word = env.tasks()[0].id.removeprefix("train-")
    parts = [{"type": "text", "text": word[:1]}, {"type": "text", "text": word[1:]}]
    for action in (parts, {"role": "assistant", "content": parts}):
        assert env.grade(env.tasks()[0].id, action).reward == 1.0
        assert env.grade(env._full_tasks()[0], action).reward == 1.0
        env.reset(options={"task_id": env.tasks()[0].id})
        assert env.step(action)[1] == 1.0
        (made,) = rlrf.rollout(env, lambda m, action=action: action, env.tasks()[0].id)
        assert (made.reward, made.text) == (1.0, word)
    with pytest.raises(UsageError, match="part 0 of its content"):
        env.grade(env.tasks()[0].id, [IMAGE])


def test_actions():
    assert action_message("hi") == assistant("hi")
    assert action_message({"content": "hi"}) == assistant("hi")
    assert action_message({"role": "assistant", "content": None}) == assistant("")
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert action_message(called) == called
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2", "extra": 1}
    assert action_message(thought) == {k: v for k, v in thought.items() if k != "extra"}
    assert [action_text(a) for a in ("x", assistant("y"), called)] == ["x", "y", ""]


@pytest.mark.parametrize(
    "action", [3, None, user("x"), ["x"], {"content": 3}, {"role": "assistant", "content": ["x"]}]
)
def test_what_is_no_action_is_refused(action):
    with pytest.raises(UsageError, match="a string or an assistant message"):
        action_message(action)
