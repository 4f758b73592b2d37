"""Scripts: what plays an episode without a model, be it a text, a message, several, or a function.

A reference solution is one, a :class:`rlrf.ScriptedPolicy` plays one, and so does
:func:`rlrf.testing.check_env`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rlrf.errors import UsageError, brief, check_takes
from rlrf.messages import Action, Messages, is_parts, spoken

Script = Action | Sequence[Action] | Callable[[Messages], Any]
"""An action, done at every turn; a sequence, one a turn and the last from then on; or a function of
the messages so far, ``def`` or ``async def``, that gives the next action."""

Player = Callable[[Messages, int], Any]
"""``(messages so far, turns so far)`` to the next action, or what can be awaited for it."""


def as_player(script: Any, what: str = "a script") -> Player:
    """What a script does next.

    Args:
        script: a :data:`Script`.
        what: the noun in messages.

    Raises:
        UsageError: it is none, or a function that does not take the messages.
    """
    if callable(script) and not isinstance(script, type):
        check_takes(script, what, "messages")
        return partial(_asked, script)
    several = isinstance(script, Sequence) and not is_action(script)
    actions = list(script) if several else [script]
    if not actions or not all(map(is_action, actions)):
        raise UsageError(
            f"{what} is {brief(script)}; give a text, an assistant message, a sequence of them "
            "(one a turn), or a function of the messages, e.g. lambda messages: 'yes'"
        )
    for action in actions:
        spoken(action)  # says what is wrong with it
    return partial(_nth, actions)


def _asked(function: Callable[[Messages], Any], messages: Messages, turn: int) -> Any:
    return function(messages)


def _nth(actions: Sequence[Action], messages: Messages, turn: int) -> Action:
    return actions[min(turn, len(actions) - 1)]


def is_action(value: object) -> bool:
    """Whether it is meant for one action, and not for several."""
    return isinstance(value, (str, Mapping)) or is_parts(value)
