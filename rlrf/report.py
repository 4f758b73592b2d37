"""One self-contained HTML page about one or several runs.

The page holds everything it needs: no network, no library. Text in rollouts is attacker-controlled
(a completion may contain ``</script>``), so it reaches the page as JSON whose ``<``, ``>`` and
``&`` are escaped, the page's script only ever sets it as text, and a content security policy
allows no script but that one, by its hash.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import itertools
import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import rlrf
from rlrf._files import refused, write_whole
from rlrf._run_folder import check_output_of
from rlrf.config import read_config
from rlrf.errors import ConfigError, UsageError
from rlrf.evaluate import pass_rate_interval
from rlrf.runs import Run

MAX_ROLLOUTS = 480
"""Rollouts on a page, all runs together; beyond it they are sampled, whole groups at a time."""
MAX_BYTES = 16_000_000
"""Characters of rollouts on a page, all runs together."""
MAX_TEXT = 20_000
"""Characters of a message, a feedback segment or a teacher prompt; the middle is cut."""
MAX_TOKENS = 4096
"""Tokens of a heat map."""
MAX_POINTS = 3000
"""Points of a curve; beyond it every n-th is drawn."""


def write_report(runs: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write a page about ``runs``, overlaid if there are several.

    Args:
        runs: run directories, or one.
        out: the file; None for ``report.html`` in the run directory, or beside the first of
            several.

    Returns:
        Where the page is.

    Raises:
        UsageError: no runs, a folder without a run, or an ``out`` that cannot be written or that
            a run needs (its ``status.json``, a file of its model).
        Unwritable: the disk is full; an older page stays.
    """
    runs = (runs,) if isinstance(runs, (str, Path)) else runs
    if not runs:
        raise UsageError("a report needs at least one run directory")
    opened = [Run.open(path) for path in runs]
    if out is None:
        first = opened[0].path
        out = (first if len(opened) == 1 else first.absolute().parent) / "report.html"
        if out.is_symlink():
            raise UsageError(
                f"{str(out)!r} is a link, and the report is not written through it; delete it, or "
                "name a file with --out"
            )
    out = Path(out)
    check_output_of(out)
    names = _names([run.path for run in opened])
    budget = MAX_ROLLOUTS // len(opened), MAX_BYTES // len(opened)
    data = {
        "runs": [_run(run, name, *budget) for run, name in zip(opened, names, strict=True)],
        "version": rlrf.__version__,
        "written": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }
    page = _page(data, ", ".join(names))
    try:
        if _is_special(out):
            out.write_text(page, encoding="utf-8")
        else:  # the run's own process may be writing it, too
            write_whole(Path(os.path.realpath(out)), page, beside=f".{os.getpid()}")
    except OSError as error:
        raise refused(f"cannot write the report {str(out)!r}", error) from None
    return out


def _is_special(out: Path) -> bool:
    """Whether it is a pipe or a terminal, say, which no other file may take the place of."""
    try:
        return not stat.S_ISREG(out.stat().st_mode)
    except OSError:
        return False


def _page(data: Mapping[str, Any], title: str) -> str:
    assets = resources.files("rlrf") / "_report"
    style = (assets / "report.css").read_text(encoding="utf-8")
    script = (assets / "report.js").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(title),
        "POLICY": (
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "STYLE": style,
        "DATA": _embed(data),
        "SCRIPT": script,
    }
    page = (assets / "report.html").read_text(encoding="utf-8")
    pieces = page.split("@@")  # text, name, text, name, ..., text
    return "".join(p if i % 2 == 0 else parts[p] for i, p in enumerate(pieces))


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _embed(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the ``<script>`` element it stands in, nor begin another thing."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    # A lone surrogate has no UTF-8 form; as an escape it is what it was.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest tails of the paths that tell the runs apart."""
    full = [path.absolute().parts for path in paths]
    for n in range(1, max(map(len, full)) + 1):
        names = ["/".join(parts[-n:]) for parts in full]
        if len(set(names)) == len(names):
            return names
    return [f"{name} #{i}" for i, name in enumerate(names, 1)]


# --- one run ------------------------------------------------------------------------------


def _run(run: Run, name: str, max_rollouts: int, max_bytes: int) -> dict[str, Any]:
    survey = _Survey(run.rollouts())
    metrics = run.metrics
    series = _series(metrics)
    rollouts = _chosen(run, survey, max_rollouts, max_bytes)
    events = [_event(event) for event in run.events[-500:]]
    if survey.broken:
        told = (
            f"{len(survey.broken)} lines of rollouts.jsonl are no rollouts and are not on this page"
        )
        events.append(_event({"level": "warning", "message": told}))
    return {
        "name": name,
        "facts": _facts(run, series),
        "series": series,
        "ci": survey.intervals(),
        "kinds": survey.kind_series(),
        "config": _flat(run.config),
        "lock": _flat(run.lock),
        "events": events,
        "rollouts": rollouts,
        "total_rollouts": survey.total,
        "thinned": len(metrics) > MAX_POINTS,
    }


def _event(event: Mapping[str, Any]) -> dict[str, str]:
    return {key: _cut(event.get(key) or "") for key in ("time", "level", "message")}


def _facts(run: Run, series: Mapping[str, list[list[float | None]]]) -> dict[str, Any]:
    info, lock, config = run.info, run.lock, run.config
    launched = _launched(run)
    env = _table(lock.get("env"))
    trainer = launched.get("trainer") or {}
    model = launched.get("model") or config.get("model")
    return {
        "status": run.status,
        "message": _cut(info.get("message", "")),
        "model": model if isinstance(model, str) else "",
        "env": str(env.get("id", "")),
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
                series.setdefault(name, []).append([step, _round(value)])
    return {name: _thin(points) for name, points in sorted(series.items())}


def _thin(points: list[list[float | None]]) -> list[list[float | None]]:
    stride = math.ceil(len(points) / MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _flat(data: Mapping[str, Any], prefix: str = "", depth: int = 8) -> dict[str, str]:
    """Nested tables as dotted keys and values as text; what is nested too deep is left out."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and depth:
            flat |= _flat(value, f"{prefix}{key}.", depth - 1)
            continue
        try:
            flat[prefix + str(key)] = value if isinstance(value, str) else json.dumps(value)
        except RecursionError:
            flat[prefix + str(key)] = "(nested too deep)"
    return flat


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# --- rollouts -----------------------------------------------------------------------------


class _Survey:
    """What is to be known of all rollouts before a few are chosen; one pass, little memory."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.groups: dict[tuple[int, str, str], int] = {}  # (step, split, group) -> rollouts
        self._evals: dict[int, dict[str, list[int]]] = {}  # step -> group -> [scored, solved]
        self._kinds: dict[int, dict[str, int]] = {}  # step -> kind -> train rollouts with it
        self._trained: dict[int, int] = {}
        self.total = 0
        self.broken: set[int] = set()  # positions of what is no rollout
        for position, record in enumerate(records):
            self.total += 1
            key = _key(record)
            step, split, group = key
            try:
                found = {s.get("kind") for f in record.get("feedback") or () for s in f}
                names = sorted(map(str, found))
            except _MALFORMED:
                self.broken.add(position)
                continue
            self.groups[key] = self.groups.get(key, 0) + 1
            if record.get("reward") is None:
                continue
            if split == "eval":
                count = self._evals.setdefault(step, {}).setdefault(group, [0, 0])
                count[0] += 1
                count[1] += bool(record.get("solved"))
            else:
                self._trained[step] = self._trained.get(step, 0) + 1
                kinds = self._kinds.setdefault(step, {})
                for kind in names:
                    kinds[kind] = kinds.get(kind, 0) + 1

    def intervals(self) -> list[list[float]]:
        """``[step, low, high]``: confidence intervals of the held-out pass rates."""
        found = []
        for step, groups in sorted(self._evals.items()):
            low, high = pass_rate_interval([(n, c) for n, c in groups.values()])
            found.append([step, round(low, 5), round(high, 5)])
        return found

    def kind_series(self) -> dict[str, list[list[float | None]]]:
        """Kind of feedback to ``[step, share of the scored training rollouts]``."""
        names = sorted({kind for kinds in self._kinds.values() for kind in kinds})
        return {
            name: _thin(
                [
                    [step, _round(self._kinds.get(step, {}).get(name, 0) / n)]
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


def _key(record: Mapping[str, Any]) -> tuple[int, str, str]:
    step = record.get("step")
    return (
        int(step) if isinstance(step, (int, float)) and abs(step) < 1 << 53 else 0,
        str(record.get("split") or "train"),
        str(record.get("group_id") or record.get("task_id")),
    )


_MALFORMED = (TypeError, ValueError, AttributeError, LookupError, OverflowError, RecursionError)


def _chosen(run: Run, survey: _Survey, limit: int, max_bytes: int) -> list[dict[str, Any]]:
    rank = {key: i for i, key in enumerate(survey.choose(limit))}
    found: list[tuple[int, int, dict[str, Any]]] = []
    for position, record in enumerate(run.rollouts()):
        key = _key(record)
        if key in rank and position not in survey.broken:
            try:
                found.append((rank[key], position, _record(record)))
            except _MALFORMED:
                survey.broken.add(position)
    used, kept = 0, []
    for _, position, record in sorted(found, key=lambda f: f[:2]):
        used += len(json.dumps(record, ensure_ascii=False))
        if used > max_bytes:
            break
        kept.append((position, record))
    return [record for _, record in sorted(kept, key=lambda k: k[0])]


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a rollout: no ids, bounded texts, rounded numbers."""
    step, split, group = _key(record)
    mask = list(record.get("completion_mask") or ())
    tokens = list(record.get("tokens") or ())
    kl = list(record.get("token_kl") or ())
    return {
        "step": step,
        "split": split,
        "group": group,
        "task": str(record.get("task_id")),
        "reward": _round(record.get("reward")),
        "solved": bool(record.get("solved")),
        "finish": str(record.get("finish_reason") or ""),
        "failure": _cut(record.get("failure") or ""),
        "metrics": {str(k): _round(v) for k, v in (record.get("metrics") or {}).items()},
        "messages": [_message(m) for m in record.get("messages") or ()],
        "feedback": [[_segment(s) for s in step] for step in record.get("feedback") or ()],
        "teacher": _cut(record.get("teacher_prompt") or ""),
        "length": sum(1 for m in mask if m),
        "tokens": [str(t) for t in tokens[:MAX_TOKENS]] if any(k is not None for k in kl) else [],
        "kl": [_round(k) for k in kl[:MAX_TOKENS]] if tokens else [],
        "mask": "".join("1" if m else "0" for m in mask[:MAX_TOKENS]) if 0 in mask else "",
        "cut_tokens": max(0, len(tokens) - MAX_TOKENS),
    }


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    shown = {"role": str(message.get("role")), "content": _cut(message.get("content") or "")}
    if message.get("reasoning_content"):
        shown["reasoning"] = _cut(str(message["reasoning_content"]))
    if message.get("tool_calls"):
        shown["calls"] = _cut(json.dumps(message["tool_calls"], ensure_ascii=False, indent=1))
    return shown


def _segment(segment: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": str(segment.get("kind")),
        "text": _cut(segment.get("text") or ""),
        "severity": str(segment.get("severity") or ""),
        "source": str(segment.get("source") or ""),
        "reveals": str(segment.get("reveals") or ""),
        "span": _span(segment.get("span")),
        "untrusted": bool(segment.get("untrusted")),
    }


def _span(value: Any) -> list[int] | None:
    ends = list(value or ())
    return ends if len(ends) == 2 and all(isinstance(end, int) for end in ends) else None


def _cut(value: Any) -> str:
    """At most MAX_TEXT characters, the end cut: spans count from the start and must stay right."""
    text = str(value)
    if len(text) <= MAX_TEXT:
        return text
    return text[:MAX_TEXT] + f"\n[... {len(text) - MAX_TEXT} characters not on this page ...]"


def _round(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not abs(value) <= sys.float_info.max:
        return None
    return float(f"{value:.5g}")
