"""An environment's own cards of rollouts: :meth:`rlrf.Env.render_html`, asked for afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rlrf
from rlrf._async import call_hook, run_sync
from rlrf._report import records
from rlrf.env import Env
from rlrf.errors import UsageError, describe


class Cards:
    """The cards of one environment, made of what a run or an evaluation noted of it.

    A card that cannot be drawn is missing, and :attr:`faults` says why: the page is worth more
    than its cards.
    """

    def __init__(self, noted: Any, options: Mapping[str, Any] | None = None) -> None:
        self.faults: dict[str, None] = {}
        self.env: Env | None = None
        noted = noted if isinstance(noted, Mapping) else {}
        id = str(noted.get("id") or "")
        try:
            if not id:
                raise UsageError("it is not noted which environment it was")
            given = dict(noted.get("options") or {})
            self.env = rlrf.make(id, **(given | dict(options or {})))
            if noted.get("split") in self.env.splits:
                self.env.split = str(noted["split"])
        except Exception as error:  # of anybody's environment
            self._fault(f"the environment {id!r} cannot be made: {describe(error)}")

    def _fault(self, told: str) -> None:
        if len(self.faults) < 5:
            self.faults[f"no cards: {told}"] = None

    def draw(self, record: Mapping[str, Any]) -> str | None:
        """The card of a rollout, or None."""
        if self.env is None:
            return None
        try:
            rollout = records.whole(record)
            task = self.env._find_task(rollout.task_id)
            card = run_sync(call_hook(self.env.render_html, task, rollout))
        except Exception as error:
            self._fault(f"render_html: {describe(error)}")
            return None
        if card is not None and not isinstance(card, str):
            self._fault(f"render_html gave a {type(card).__name__}, not a string")
            return None
        return records.plain_card(card) if card else None

    def __enter__(self) -> Cards:
        return self

    def __exit__(self, *_: object) -> None:
        if self.env is not None:
            self.env.close()
