"""Chat messages: what is one, and how strings, messages and actions become each other."""

from __future__ import annotations

import pytest

from rlrf import UsageError, assistant, system, user
from rlrf.messages import action_message, action_text, as_messages, is_message

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_strings_messages_and_sequences_become_tuples():
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
