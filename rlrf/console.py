"""Progress of long work: live on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlrf.rollout import Rollout

# Heading, metric, format; in the order shown.
_COLUMNS = (
    ("reward", "reward", ".3f"),
    ("eval", "eval/pass_rate", ".1%"),
    ("loss", "loss", ".4g"),
    ("kl", "self_distillation/teacher_student_kl", ".3g"),
    ("length", "completions/mean_length", ".0f"),
    ("entropy", "entropy", ".2f"),
    ("seconds", "time/step", ".2f"),
)


class Display:
    """Something drawn live on a terminal while it is entered; elsewhere it has nothing to draw."""

    _live: Live | Progress | None = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()


class TrainProgress(Display):
    """Shows a training run; call it with each step's metrics.

    Args:
        total: steps of the whole run, or None if unknown.
        console: where to; the default is standard output.
        rows: how many past steps a terminal shows.
    """

    def __init__(
        self, total: int | None = None, *, console: Console | None = None, rows: int = 10
    ) -> None:
        self.total = total
        self.console = console or Console()
        self._rows: deque[list[str]] = deque(maxlen=rows)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task("training", total=total)
            self._live = Live(self._view(), console=self.console, refresh_per_second=4)

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Show one step."""
        step = int(metrics.get("step", 0))
        values = {name: _number(metrics.get(key), form) for name, key, form in _COLUMNS}
        if self._live is None:
            told = "  ".join(f"{name} {value}" for name, value in values.items() if value)
            of = f"/{self.total}" if self.total else ""
            # soft_wrap: a line per step stays one line, however narrow the log is thought to be
            self.console.print(
                f"step {step}{of}  {told}", markup=False, highlight=False, soft_wrap=True
            )
            return
        self._rows.append([str(step), *values.values()])
        self._bar.update(self._task, completed=step)
        self._live.update(self._view())

    def _view(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("step", justify="right")
        for name, _, _ in _COLUMNS:
            table.add_column(name, justify="right", min_width=7)
        for row in self._rows:
            table.add_row(*row)
        return Group(table, self._bar)


class RolloutProgress(Display):
    """Counts rollouts of an evaluation, with the share solved so far.

    Args:
        total: rollouts, those already there included.
        done: those already there.
        console: where to; the default is standard error, so that results can be piped.
    """

    def __init__(
        self, total: int, done: Sequence[Rollout] = (), *, console: Console | None = None
    ) -> None:
        self.total, self.done = total, len(done)
        self.scored = sum(r.scored for r in done)
        self.solved = sum(r.solved for r in done)
        self.console = console or Console(stderr=True)
        self._live: Progress | None = None
        if self.console.is_terminal:
            self._live = _bar(self.console)
            self._task = self._live.add_task("evaluating", total=total, completed=self.done)

    def __call__(self, rollout: Rollout) -> None:
        """Count one rollout."""
        self.done += 1
        self.scored += rollout.scored
        self.solved += rollout.solved
        rate = f"{self.solved / self.scored:.1%} solved" if self.scored else "nothing scored"
        if self._live is not None:
            self._live.update(self._task, completed=self.done, description=rate)
        elif self.done * 10 // self.total > (self.done - 1) * 10 // self.total:  # each tenth
            self.console.print(
                f"{self.done}/{self.total} rollouts  {rate}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=True,
    )


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(float(value), form)
