"""The results of ``rlrf eval`` as the page shows them, those of one that still goes on, too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlrf._report import records
from rlrf._report.records import MALFORMED, cut
from rlrf._report.tables import Table, Tally, flat
from rlrf.evaluate import EvalReport
from rlrf.results import Results
from rlrf.rollout import Rollout

MAX_ROWS = 20_000
"""Rollouts of evaluations on a page, all files together; their texts as far as there is room."""

Card = Callable[[Mapping[str, Any]], str | None]


def read_eval(
    results: Results, name: str, max_rows: int, max_bytes: int, card: Card | None = None
) -> tuple[dict[str, Any], list[Table]]:
    """What the page shows of an evaluation, and its tasks."""
    whole: list[Rollout] = []
    good: list[Mapping[str, Any]] = []
    tasks: dict[str, Tally] = {}
    broken = results.broken
    for record in results.rollouts:
        try:
            whole.append(records.whole(record))
            records.shown(record, texts=False)
        except MALFORMED:
            del whole[len(good) :]
            broken += 1
            continue
        good.append(record)
        tasks.setdefault(whole[-1].task_id, Tally()).add(record)
    report = EvalReport.of(whole)
    lock = results.about.get("lock")
    lock = lock if isinstance(lock, Mapping) else {}
    settings = flat(results.settings)
    facts = {
        **{k: settings.get(k, "") for k in ("env", "feedback", "policy", "model", "split")},
        "done": not results.partial,
        "wanted": _wanted(results.settings),
    }
    shown = {
        "kind": "eval",
        "name": name,
        "facts": facts,
        "report": report.to_dict(),
        "series": {},
        "ci": [],
        "kinds": {},
        "config": settings,
        "lock": flat(lock),
        "events": [],
        "warnings": [("warning", cut(w)) for w in _warnings(results, report, whole, broken)],
        "rollouts": _rows(good, max_rows, max_bytes, card),
        "total_rollouts": len(good),
        "thinned": False,
    }
    return shown, [Table("", 0, None, tasks, settings)]


def _wanted(settings: Mapping[str, Any]) -> int:
    n, m = settings.get("n_tasks"), settings.get("samples_per_task")
    return n * m if isinstance(n, int) and isinstance(m, int) else 0


def _rows(
    good: Sequence[Mapping[str, Any]], max_rows: int, max_bytes: int, card: Card | None
) -> list[dict[str, Any]]:
    """Rollouts in order; the texts go first to one sample of each task, then to the next."""
    good = good[:max_rows]
    rows = [records.shown(record, texts=False) for record in good]
    left = max_bytes
    for i in sorted(range(len(rows)), key=lambda i: (rows[i]["sample"], i)):
        row = records.shown(good[i])
        if card is not None and (drawn := card(good[i])):
            row["card"] = drawn
        left -= len(json.dumps(row, ensure_ascii=False))
        if left < 0:
            break
        rows[i] = row
    return rows


def _warnings(
    results: Results, report: EvalReport, whole: Sequence[Rollout], broken: int
) -> Iterable[str]:
    """What is to be known before the numbers are believed."""
    wanted = _wanted(results.settings)
    if results.partial:
        of = f" of {wanted}" if wanted else ""
        yield f"not at its end: {report.n_rollouts}{of} rollouts so far, the quick ones first"
    if report.n_unscored:
        why = ", ".join(f"{kind} {n}" for kind, n in report.failures.items())
        yield (
            f"{report.n_unscored} of {report.n_rollouts} rollouts are unscored and left out of "
            f"every number: {why}"
        )
    cut_off = report.finish_reasons.get("length", 0)
    if 10 * cut_off > report.n_rollouts:
        limit = results.settings.get("max_tokens")
        yield (
            f"{cut_off} of {report.n_rollouts} replies were cut off at {limit} tokens; raise "
            "--max-tokens"
        )
    failed = [r for r in whole if r.scored and not r.solved]
    silent = sum(not any(r.feedback) for r in failed)
    if silent and results.settings.get("feedback") != "none":
        yield f"{silent} of {len(failed)} failed attempts got no feedback"
    unread = sum(any(m.get("invalid_tool_calls") for m in r.messages) for r in whole)
    if unread:
        yield f"{unread} of {report.n_rollouts} rollouts have calls of tools that could not be read"
    if broken:
        yield f"{broken} entries are no rollouts and are not on this page"
    noted = results.about.get("warnings")
    for told in noted if isinstance(noted, list) else ():
        yield str(told)
