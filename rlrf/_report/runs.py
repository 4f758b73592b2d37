"""A run directory as the page shows it: facts, curves, held-out tasks, a sample of rollouts."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlrf._report import records
from rlrf._report.records import MALFORMED, cut, number
from rlrf._report.tables import Table, Tally, flat
from rlrf.config import read_config
from rlrf.errors import ConfigError
from rlrf.evaluate import pass_rate_interval
from rlrf.runs import Run
from rlrf.wrappers import in_words

MAX_POINTS = 3000
"""Points of a curve; beyond it every n-th is drawn."""
MAX_EVENTS = 500
"""Events told, the last ones."""

Card = Callable[[Mapping[str, Any]], str | None]


def read_run(
    run: Run, name: str, max_rollouts: int, max_bytes: int, card: Card | None = None
) -> tuple[dict[str, Any], list[Table]]:
    """What the page shows of a run, and its first and last evaluation."""
    survey = _Survey(run.rollouts())
    metrics = run.metrics
    series = _series(metrics)
    rollouts = _chosen(run, survey, max_rollouts, max_bytes, card)
    events = [_event(event) for event in run.events[-MAX_EVENTS:]]
    if survey.broken:
        told = (
            f"{len(survey.broken)} lines of rollouts.jsonl are no rollouts and are not on this page"
        )
        events.append(_event({"level": "warning", "message": told}))
    facts = _facts(run, series)
    settings = {"env": facts["env"], "feedback": facts["feedback"]}
    return {
        "kind": "run",
        "name": name,
        "facts": facts,
        "series": series,
        "ci": survey.intervals(),
        "kinds": survey.kind_series(),
        "config": flat(run.config),
        "lock": flat(run.lock),
        "events": events,
        "warnings": list(_warnings(facts, events)),
        "rollouts": rollouts,
        "total_rollouts": survey.total,
        "thinned": len(metrics) > MAX_POINTS,
    }, survey.evaluations(settings)


def _warnings(
    facts: Mapping[str, Any], events: Iterable[Mapping[str, str]]
) -> Iterable[tuple[str, str]]:
    """``(level, message)``: what is to be known before the numbers are believed."""
    if facts["message"]:
        yield "error", f"{facts['status']}: {facts['message']}"
    heard = Counter(
        (e["level"], e["message"]) for e in events if e["level"] in ("warning", "error")
    )
    for (level, message), times in heard.items():
        yield level, message + (f" ({times} times)" if times > 1 else "")


def _event(event: Mapping[str, Any]) -> dict[str, str]:
    return {key: cut(event.get(key) or "") for key in ("time", "level", "message")}


def _environment(env: Mapping[str, Any]) -> str:
    """Its id, and its wrappers."""
    around = env.get("wrappers")
    named = [w for w in around if isinstance(w, Mapping)] if isinstance(around, list) else []
    return cut(" in ".join([str(env.get("id", "")), *(in_words([w]) for w in named)]))


def _facts(run: Run, series: Mapping[str, list[list[float | None]]]) -> dict[str, Any]:
    info, lock, config = run.info, run.lock, run.config
    launched = _launched(run)
    env = _table(lock.get("env"))
    trainer = launched.get("trainer") or {}
    model = launched.get("model") or config.get("model")
    return {
        "status": run.status,
        "message": cut(info.get("message", "")),
        "model": model if isinstance(model, str) else "",
        "env": _environment(env),
        "feedback": str(env.get("feedback", "")),
        "trainer": trainer.get("name", "") if isinstance(trainer, Mapping) else "",
        "started": str(info.get("started", "")),
        "finished": str(info.get("finished", "")),
        "steps": max((int(p[0] or 0) for points in series.values() for p in points), default=0),
    }


def _launched(run: Run) -> dict[str, Any]:
    """What ``rlrf train`` was told; empty for a run that was started from Python."""
    try:
        return read_config(run.path / "config.toml")
    except ConfigError:
        return {}


def _series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float | None]]]:
    """Metric name to ``[step, value]`` points; None where a value was not finite."""
    series: dict[str, list[list[float | None]]] = {}
    for line in metrics:
        step = line.get("step")
        if not isinstance(step, (int, float)):
            continue
        for name, value in line.items():
            if name != "step" and (value is None or isinstance(value, (int, float))):
                series.setdefault(name, []).append([step, number(value)])
    return {name: _thin(points) for name, points in sorted(series.items())}


def _thin(points: list[list[float | None]]) -> list[list[float | None]]:
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# --- rollouts -----------------------------------------------------------------------------


class _Survey:
    """What is to be known of all rollouts before a few are chosen; one pass, little memory."""

    def __init__(self, found: Iterable[Mapping[str, Any]]) -> None:
        self.groups: dict[tuple[int, str, str], int] = {}  # (step, split, group) -> rollouts
        self._evals: dict[int, dict[str, Tally]] = {}  # step -> task -> what became of it
        self._kinds: dict[int, dict[str, int]] = {}  # step -> kind -> train rollouts with it
        self._trained: dict[int, int] = {}
        self.total = 0
        self.broken: set[int] = set()  # positions of what is no rollout
        for position, record in enumerate(found):
            self.total += 1
            key = records.key(record)
            step, split, _ = key
            try:
                names = {str(s.get("kind")) for f in record.get("feedback") or () for s in f}
            except MALFORMED:
                self.broken.add(position)
                continue
            self.groups[key] = self.groups.get(key, 0) + 1
            if split == "eval":
                tasks = self._evals.setdefault(step, {})
                tasks.setdefault(str(record.get("task_id")), Tally()).add(record)
            elif record.get("reward") is not None:
                self._trained[step] = self._trained.get(step, 0) + 1
                kinds = self._kinds.setdefault(step, {})
                for kind in names:
                    kinds[kind] = kinds.get(kind, 0) + 1

    def intervals(self) -> list[list[float]]:
        """``[step, low, high]``: confidence intervals of the held-out pass rates."""
        found = []
        for step, tasks in sorted(self._evals.items()):
            counts = [(t.scored, t.solved) for t in tasks.values() if t.scored]
            if counts:
                low, high = pass_rate_interval(counts)
                found.append([step, round(low, 5), round(high, 5)])
        return found

    def evaluations(self, settings: Mapping[str, str]) -> list[Table]:
        """The first and the last evaluation, as far as there are two."""
        ends = sorted({min(self._evals), max(self._evals)}) if self._evals else []
        return [Table("", 0, step, self._evals[step], settings) for step in ends]

    def kind_series(self) -> dict[str, list[list[float | None]]]:
        """Kind of feedback to ``[step, share of the scored training rollouts]``."""
        names = sorted({kind for kinds in self._kinds.values() for kind in kinds})
        return {
            name: _thin(
                [
                    [step, number(self._kinds.get(step, {}).get(name, 0) / n)]
                    for step, n in sorted(self._trained.items())
                ]
            )
            for name in names
        }

    def choose(self, limit: int) -> list[tuple[int, str, str]]:
        """Groups to show, at most ``limit`` rollouts: the first and last steps, then between.

        The groups come in the order of their worth, so that a byte budget can stop anywhere.
        """
        steps = sorted({step for step, _, _ in self.groups})
        by_step: dict[int, list[tuple[int, str, str]]] = {}
        for key in self.groups:
            by_step.setdefault(key[0], []).append(key)
        order = [steps[i] for i in _ends_first(len(steps))]
        deepest = max(map(len, by_step.values()), default=0)
        chosen: dict[tuple[int, str, str], None] = {}
        used = 0
        # The ends first, but they may not use up what is there for the middle.
        for some, cap in ((order[:2], limit // 2), (order, limit)):
            for rank, step in itertools.product(range(deepest), some):
                for key in by_step[step][rank : rank + 1]:
                    if key not in chosen and used + self.groups[key] <= cap:
                        chosen[key] = None
                        used += self.groups[key]
        return list(chosen)


def _ends_first(n: int) -> list[int]:
    """``0..n-1`` with the ends first, then the middle, the quarters, and so on."""
    order = [0, n - 1][:n]
    spans = [(0, n - 1)]
    while spans:
        wider = []
        for low, high in spans:
            middle = (low + high) // 2
            if low < middle < high:
                order.append(middle)
                wider += [(low, middle), (middle, high)]
        spans = wider
    return order


def _chosen(
    run: Run, survey: _Survey, limit: int, max_bytes: int, card: Card | None
) -> list[dict[str, Any]]:
    rank = {key: i for i, key in enumerate(survey.choose(limit))}
    found: list[tuple[int, int, dict[str, Any]]] = []
    for position, record in enumerate(run.rollouts()):
        key = records.key(record)
        if key in rank and position not in survey.broken:
            try:
                shown = records.shown(record)
                if card is not None and (drawn := card(record)):
                    shown["card"] = drawn
                found.append((rank[key], position, shown))
            except MALFORMED:
                survey.broken.add(position)
    used, kept = 0, []
    for _, position, record in sorted(found, key=lambda f: f[:2]):
        used += len(json.dumps(record, ensure_ascii=False))
        if used > max_bytes:
            break
        kept.append((position, record))
    return [record for _, record in sorted(kept, key=lambda k: k[0])]
