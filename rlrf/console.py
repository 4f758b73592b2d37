"""Progress of long work: live on a terminal, lines elsewhere; never ten seconds of silence."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table

from rlrf import progress
from rlrf.progress import duration
from rlrf.rollout import Rollout

SILENCE_S = 10.0
"""Without anything else to say, what is under way is told this often."""

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
    """Shows what is under way (:mod:`rlrf.progress`) while it is entered, and hears what is said.

    On a terminal it is drawn live. Elsewhere a line tells of it wherever nothing else has been
    printed for :data:`SILENCE_S`, and after the first second.

    Args:
        console: where to; the default is standard error, so that results can be piped.
        clock: seconds, for tests.
    """

    def __init__(
        self, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self._clock = clock
        self._began = clock()
        self._due = self._began + 1.0
        self._stack = contextlib.ExitStack()
        self._ended = threading.Event()
        self._drawn = self.console.is_terminal
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        self._stack.enter_context(progress.listening(self.line))
        if self._drawn:
            self._stack.enter_context(
                Live(get_renderable=self._view, console=self.console, refresh_per_second=4)
            )
        else:
            threading.Thread(target=self._pulse, name="rlrf-pulse", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._stack.close()

    def line(self, text: str) -> None:
        """Print a line, above what is live."""
        self._due = self._clock() + SILENCE_S - 1
        # soft_wrap: it stays one line, however narrow a log is thought to be
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def remaining(self) -> float | None:
        """Seconds that are left, as far as is known."""
        return None

    def tick(self) -> None:
        """Tell what is under way, if it is time to; to be called at least once a second."""
        phases = [str(phase) for phase in progress.under_way()]
        if self._clock() >= self._due and not self._ended.is_set():
            self.line(f"[{self._elapsed()}] {', '.join(phases) or 'working'}{self._left()}")

    def _pulse(self) -> None:
        while not self._ended.wait(0.5):
            self.tick()

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(self._clock() - self._began), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def _left(self) -> str:
        left = self.remaining()
        return "" if left is None else f"; about {duration(left)} left"

    def _view(self) -> RenderableType:
        phases = ", ".join(map(str, progress.under_way()))
        if self._ended.is_set():
            return ""
        self._spinner.update(text=f"{self._elapsed()}  {phases}{self._left()}")
        return self._spinner


class TrainProgress(Display):
    """Shows a training run; call it with each step's metrics.

    Args:
        total: steps of the whole run, or None if unknown.
        console: where to; the default is standard output.
        rows: how many past steps a terminal shows.
        clock: seconds, for tests.

    Attributes:
        evaluations_after: how many evaluations come after a step, where that is known: they are
            then counted apart from the steps.
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        console: Console | None = None,
        rows: int = 10,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.evaluations_after: Callable[[int], int] | None = None
        self._rows: deque[list[str]] = deque(maxlen=rows)
        self._last: tuple[float, int] | None = None  # when the last line came, and its step
        self._steps: deque[float] = deque(maxlen=100)  # seconds of each, its evaluation apart
        self._evaluations: deque[float] = deque(maxlen=100)
        super().__init__(console=console or Console(), clock=clock)
        self._bar = _bar(self.console)
        self._task = self._bar.add_task("training", total=total, visible=False)

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Show one step."""
        step = int(metrics.get("step", 0))
        self._note_time(step, metrics)
        values = {name: _number(metrics.get(key), form) for name, key, form in _COLUMNS}
        if not self._drawn:
            told = "  ".join(f"{name} {value}" for name, value in values.items() if value)
            of = f"/{self.total}" if self.total else ""
            self.line(f"step {step}{of}  {told}")
            return
        self._rows.append([str(step), *values.values()])
        self._bar.update(self._task, completed=step, total=self.total, visible=True)

    def _note_time(self, step: int, metrics: Mapping[str, Any]) -> None:
        now, spent = self._clock(), _seconds(metrics.get("time/step"))
        if spent is None and self._last is not None:
            spent = now - self._last[0]
        self._last = now, step
        held = 0.0
        if self.evaluations_after is not None and (
            held := _seconds(metrics.get("time/eval")) or 0.0
        ):
            self._evaluations.append(held)
        if step and spent is not None:
            self._steps.append(spent - held)

    def remaining(self) -> float | None:
        """From the pace of the steps and of the evaluations so far.

        The first step is left out once there are others: in it whatever is new warms up.
        """
        if self.total is None or self._last is None or not self._steps:
            return None
        now, step = self._last
        left = (self.total - step) * fmean([*self._steps][1:] or self._steps)
        if self.evaluations_after is not None and self._evaluations:
            left += self.evaluations_after(step) * fmean(self._evaluations)
        return max(0.0, left - (self._clock() - now))

    def _view(self) -> RenderableType:
        if not self._rows:
            return super()._view()
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("step", justify="right")
        for name, _, _ in _COLUMNS:
            table.add_column(name, justify="right", min_width=7)
        for row in list(self._rows):
            table.add_row(*row)
        return Group(table, self._bar, super()._view())


class RolloutProgress(Display):
    """Counts rollouts of an evaluation, with the share solved so far.

    Args:
        total: rollouts, those already there included; 0 until :meth:`begin`.
        done: those already there.
        console: where to; the default is standard error, so that results can be piped.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total: int = 0,
        done: Sequence[Rollout] = (),
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bar: Progress | None = None
        super().__init__(console=console, clock=clock)
        self.begin(total, done)

    def begin(self, total: int, done: Sequence[Rollout] = ()) -> None:
        """The rollouts begin: how many there are, and those already there."""
        self.total, self.done, self._before = total, len(done), len(done)
        self.scored = sum(r.scored for r in done)
        self.solved = sum(r.solved for r in done)
        self._first_at = self._last_at = self._clock()
        if self._drawn and total:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task("evaluating", total=total, completed=self.done)

    def __call__(self, rollout: Rollout) -> None:
        """Count one rollout."""
        self.done += 1
        self._last_at = self._clock()
        self.scored += rollout.scored
        self.solved += rollout.solved
        rate = f"{self.solved / self.scored:.1%} solved" if self.scored else "nothing scored"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=rate)
        elif self.done * 10 // self.total > (self.done - 1) * 10 // self.total:  # each tenth
            self.line(f"{self.done}/{self.total} rollouts  {rate}")

    def remaining(self) -> float | None:
        """From the pace so far, once a tenth is done."""
        new = self.done - self._before
        if new * 10 < self.total - self._before or not new:
            return None
        left = (self._last_at - self._first_at) / new * (self.total - self.done)
        return max(0.0, left - (self._clock() - self._last_at))  # they come in batches

    def _view(self) -> RenderableType:
        return super()._view() if self._bar is None else Group(self._bar, super()._view())


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,  # it is drawn with what is around it
    )


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e12 else None


def _number(value: Any, form: str) -> str:
    if value is None:
        return ""
    try:
        return format(float(value), form)
    except (TypeError, ValueError, OverflowError):  # of a trainer that is not ours
        return str(value)[:12]
