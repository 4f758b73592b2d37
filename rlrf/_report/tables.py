"""Evaluations, task by task: those of a file, and the first and the last of a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlrf._report.records import number
from rlrf.paired import compare

MAX_TASKS = 20_000
"""Rows of the table of tasks."""
MAX_TABLES = 16
"""Evaluations that are compared in pairs."""


@dataclass
class Tally:
    """How often one task was attempted, and with what success."""

    attempts: int = 0
    scored: int = 0
    solved: int = 0
    reward: float = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one rollout."""
        self.attempts += 1
        reward = number(record.get("reward"))
        if reward is not None:
            self.scored += 1
            self.solved += bool(record.get("solved"))
            self.reward += reward


@dataclass
class Table:
    """One evaluation.

    Attributes:
        name: what tells it apart.
        source: position of the run or the file it is of.
        step: of a run, which.
        tasks: the tally of each.
        settings: what it was made with, as texts.
    """

    name: str
    source: int
    step: int | None = None
    tasks: dict[str, Tally] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Task to attempts and solved ones, of the tasks that have a scored attempt."""
        return {task: (t.scored, t.solved) for task, t in self.tasks.items() if t.scored}

    def to_dict(self) -> dict[str, Any]:
        """For the page: task to ``[attempts, scored, solved, mean reward]``."""
        rows = {
            task: [
                t.attempts,
                t.scored,
                t.solved,
                number(t.reward / t.scored) if t.scored else None,
            ]
            for task, t in itertools.islice(self.tasks.items(), MAX_TASKS)
        }
        return {"name": self.name, "source": self.source, "step": self.step, "tasks": rows}


# What two evaluations of one thing may well differ in.
_UNLIKE = {"policy", "model", "policy_options", "n_tasks", "step"}


def comparisons(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Every pair of evaluations, the earlier first, that have a task in common."""
    found = []
    for (i, a), (j, b) in itertools.combinations(enumerate(tables[:MAX_TABLES]), 2):
        paired = compare(a.counts, b.counts)
        if paired is None:
            continue
        told = {k: (a.settings.get(k), b.settings.get(k)) for k in {**a.settings, **b.settings}}
        found.append(
            {
                "a": i,
                "b": j,
                **paired.to_dict(),
                "only_a": len(a.counts.keys() - b.counts.keys()),
                "only_b": len(b.counts.keys() - a.counts.keys()),
                "differs": [
                    [k, x or "–", y or "–"]
                    for k, (x, y) in told.items()
                    if x != y and k not in _UNLIKE
                ],
            }
        )
    return found


def flat(data: Mapping[str, Any], prefix: str = "", depth: int = 8) -> dict[str, str]:
    """Nested tables as dotted keys and values as text; what is nested too deep is left out."""
    found: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and depth:
            found |= flat(value, f"{prefix}{key}.", depth - 1)
            continue
        try:
            found[prefix + str(key)] = value if isinstance(value, str) else json.dumps(value)
        except RecursionError:
            found[prefix + str(key)] = "(nested too deep)"
    return found
