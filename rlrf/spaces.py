"""The Gymnasium space of chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import gymnasium

from rlrf.errors import UsageError
from rlrf.messages import is_message, is_parts


class Chat(gymnasium.Space[Any]):
    """Chat messages, of any length and any Unicode.

    Args:
        side: ``"observation"``: tuples of new chat messages; ``"action"``: a reply, as a string
            or as one assistant message.
        seed: seed of :meth:`sample`.

    Gymnasium's ``Text`` will not do: it needs a charset, and its shared-memory vectorisation
    returns stale text.
    """

    def __init__(
        self, side: Literal["observation", "action"] = "observation", seed: int | None = None
    ) -> None:
        if side not in ("observation", "action"):
            raise UsageError(f"Chat.side is {side!r}; it must be 'observation' or 'action'")
        self.side = side
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """Text has no fixed-size array form."""
        return False

    def contains(self, x: Any) -> bool:
        """Whether ``x`` belongs to this side of the conversation."""
        if self.side == "action":
            if is_parts(x):
                x = {"role": "assistant", "content": x}
            return isinstance(x, str) or (is_message(x) and x["role"] == "assistant")
        return isinstance(x, tuple) and all(is_message(m) for m in x)

    def sample(self, mask: Any = None, probability: Any = None) -> Any:
        """A few random words; masks have no meaning here."""
        words = ("yes", "no", "42", "def", "{}", "x", "\n", "ünïcödé", "print(1)")
        picks = self.np_random.integers(0, len(words), size=int(self.np_random.integers(1, 6)))
        text = " ".join(words[i] for i in picks)
        if self.side == "action":
            return text
        return ({"role": "user", "content": text},)

    def to_jsonable(self, sample_n: Iterable[Any]) -> list[Any]:
        """Samples as JSON data."""
        return [list(s) if isinstance(s, tuple) else s for s in sample_n]

    def from_jsonable(self, sample_n: Iterable[Any]) -> list[Any]:
        """The samples :meth:`to_jsonable` wrote."""
        return [tuple(s) if isinstance(s, list) else s for s in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chat) and other.side == self.side

    def __hash__(self) -> int:
        return hash(("rlrf.Chat", self.side))

    def __repr__(self) -> str:
        return f"Chat({self.side!r})"
