"""Trackers: a run's numbers in TensorBoard, Weights & Biases or trackio as well.

The run directory always has every number (``metrics.jsonl``); a tracker is a copy for people who
like their curves elsewhere. So a tracker may fail in any way and training goes on:

- a name that is unknown or a package that is not installed is an error *before* training starts;
- a tracker that fails to start (no network, not logged in), to log or to close is warned of once
  and dropped;
- a tracker that hangs delays nobody: each has its own daemon thread, which makes all calls into
  its package, and an inbox of bounded length. When that is full, lines are left out of that
  tracker, which is warned of; closing waits a bounded time.

=============== ==================================== =============================================
tracker         where it writes                      a resumed run
=============== ==================================== =============================================
``tensorboard`` ``tensorboard/`` in the run          hides what was logged from ``resume_step``
                directory                            on (``purge_step``), then goes on
``wandb``       its server, or offline below the     the same run: its id is kept in
                run directory (``WANDB_MODE``)       ``trackers.json`` in the run directory;
                                                     steps done twice are logged twice
``trackio``     ``TRACKIO_DIR``, or the Space in     the last run of that name in the project;
                ``TRACKIO_SPACE_ID``                 steps done twice are logged twice
=============== ==================================== =============================================
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlrf._files import write_whole
from rlrf.errors import ConfigError, MissingDependencyError, nearest

Warn = Callable[[str, str], None]
"""``warn(topic, message)``; called on the thread that opens, logs or closes, on no other."""


def check_trackers(report_to: Sequence[str], folder: Path | None) -> dict[str, Exception | None]:
    """Whether these trackers can be had at all; to be asked before anything is written.

    Returns:
        Per tracker what is wrong with its installed package, or None.

    Raises:
        ConfigError: an unknown name, or TensorBoard without a folder.
        MissingDependencyError: a tracker's package is not installed.
    """
    names = list(dict.fromkeys([report_to] if isinstance(report_to, str) else report_to))
    for tracker in names:
        if tracker not in _BACKENDS:
            raise ConfigError(
                f"report_to has {tracker!r}; it may hold {', '.join(TRACKERS)} "
                f"(metrics.jsonl is always written){nearest(tracker, TRACKERS)}"
            )
    if "tensorboard" in names and folder is None:
        raise ConfigError(
            "report_to has 'tensorboard', which writes into the run directory, and this run has "
            "none; give one (run_dir=...)"
        )
    return {tracker: _import(tracker) for tracker in names}


def open_trackers(
    report_to: Sequence[str],
    *,
    project: str,
    name: str,
    config: Mapping[str, Any],
    warn: Warn,
    folder: Path | None = None,
    resume_step: int | None = None,
    start_timeout: float = 10.0,
    close_timeout: float = 30.0,
    inbox_size: int = 1000,
) -> Trackers:
    """Start the trackers named in ``report_to``.

    Args:
        report_to: names out of :data:`TRACKERS`; empty: none.
        project: what groups runs at a service; ``WANDB_PROJECT`` goes before it.
        name: of this run.
        config: what the run was configured with; values that are no JSON go as their text.
        warn: told what failed, as ``("tracker/NAME", message)``. What it raises is swallowed.
        folder: the run directory; None: the run writes nothing, so TensorBoard cannot either.
        resume_step: the first step that this process will log, when it goes on with the run in
            ``folder``; None: a new run.
        start_timeout: seconds to wait for the trackers to be up, so that what fails at once is
            told at once. A slower one goes on starting beside the training.
        close_timeout: seconds that :meth:`Trackers.close` waits for all trackers together.
        inbox_size: lines a tracker may lag behind before it misses some.

    Raises:
        ConfigError: an unknown name, or TensorBoard without a folder.
        MissingDependencyError: a tracker's package is not installed.
    """
    found = check_trackers(report_to, folder)
    names = list(found)
    broken = {tracker: error for tracker, error in found.items() if error is not None}
    session = _Session(
        project=project,
        name=name,
        config=json.loads(json.dumps(dict(config), default=str)),
        folder=folder,
        resume_step=resume_step,
    )
    workers = [_Worker(n, session, inbox_size) for n in names if n not in broken]
    trackers = Trackers(workers, warn, close_timeout)
    for tracker, error in broken.items():
        trackers._warn(tracker, _failure(tracker, "be imported", error))
    deadline = time.monotonic() + start_timeout
    for worker in workers:
        worker.up.wait(max(0.0, deadline - time.monotonic()))
    trackers._pass_on_warnings()
    return trackers


class Trackers:
    """The trackers of one run; made by :func:`open_trackers`. Nothing here raises or blocks."""

    def __init__(self, workers: Sequence[_Worker], warn: Warn, close_timeout: float) -> None:
        self._workers, self._tell, self._close_timeout = list(workers), warn, close_timeout
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one line of numbers to every tracker; NaN and infinities go as they are.

        ``step`` among the metrics and values that are no numbers are left out.
        """
        if self._closed:
            return
        line = _numbers(metrics)
        for worker in self._workers:
            if not worker.offer((step, line)) and worker.missed == 1:
                self._warn(
                    worker.name,
                    f"{worker.name} does not keep up: step {step} and {worker.inbox_size} lines "
                    "before it wait. Until it does, lines are left out of it; how many is said "
                    "at the end. metrics.jsonl has them all",
                )
        self._pass_on_warnings()

    def close(self, *, failed: bool = False) -> None:
        """Let the trackers finish, for ``close_timeout`` seconds at most; a second call is none.

        Args:
            failed: the run ended with an error; wandb shows it.
        """
        if self._closed:
            return
        self._closed = True
        for worker in self._workers:
            worker.end(failed)
        deadline = time.monotonic() + self._close_timeout
        for worker in self._workers:
            worker.thread.join(max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            if worker.thread.is_alive():
                self._warn(
                    worker.name,
                    f"{worker.name} did not finish within {self._close_timeout:g} s and is "
                    f"abandoned with about {worker.waiting} lines; metrics.jsonl has them all",
                )
            if worker.missed:
                self._warn(
                    worker.name,
                    f"{worker.name} did not keep up and misses {worker.missed} lines; "
                    "metrics.jsonl has them all",
                )
        self._pass_on_warnings()

    def _pass_on_warnings(self) -> None:
        """Say what workers ran into; here, because ``warn`` belongs to the caller's thread."""
        for worker in list(self._workers):
            if worker.failure is not None:
                self._workers.remove(worker)
                self._warn(worker.name, worker.failure)

    def _warn(self, tracker: str, message: str) -> None:
        # Under `-W error` a warning raises; a tracker must not stop training even then.
        with contextlib.suppress(Exception):
            self._tell(f"tracker/{tracker}", message)


# --- one tracker, one thread ------------------------------------------------------------------

Line = tuple[int, dict[str, float]]


class _Worker:
    """A tracker's thread: the only one that calls into its package.

    Attributes:
        up: set once the tracker has started or failed to.
        failure: what went wrong, for the user; the tracker is gone then.
        missed: lines that found the inbox full.
    """

    def __init__(self, name: str, session: _Session, inbox_size: int) -> None:
        self.name, self.inbox_size = name, inbox_size
        self.up = threading.Event()
        self.failure: str | None = None
        self.missed = 0
        self._session = session
        self._inbox: queue.SimpleQueue[Line | bool] = queue.SimpleQueue()  # a bool: the end
        self.thread = threading.Thread(target=self._work, name=f"rlrf-tracker-{name}", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        """Lines in the inbox."""
        return self._inbox.qsize()

    def offer(self, line: Line) -> bool:
        """Put a line into the inbox; False: it is full."""
        if self.waiting >= self.inbox_size:
            self.missed += 1
            return False
        self._inbox.put(line)
        return True

    def end(self, failed: bool) -> None:
        """Nothing comes after this; fits into a full inbox too."""
        self._inbox.put(failed)

    def _work(self) -> None:
        backend: _Backend | None = None
        task = "start"
        try:
            backend = _BACKENDS[self.name].start(self._session)
            self.up.set()
            task = "log"
            while not isinstance(item := self._inbox.get(), bool):
                backend.log(*item)
            task = "finish"
            backend.close(item)
        except BaseException as error:  # SystemExit too: this thread is all there is to end
            self.failure = _failure(self.name, task, error)
            self.up.set()
            if backend is not None and task == "log":
                with contextlib.suppress(BaseException):
                    backend.close(True)


def _failure(tracker: str, task: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        f"{tracker} could not {task}: {type(error).__name__}: {text[:500]}. The run goes on "
        "without it; metrics.jsonl has every number"
    )


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    line = {}
    for name, value in metrics.items():
        with contextlib.suppress(Exception):
            if name != "step":
                line[name] = float(value)
    return line


# --- the packages -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Session:
    """What a backend is started with; see :func:`open_trackers`."""

    project: str
    name: str
    config: dict[str, Any]
    folder: Path | None
    resume_step: int | None

    @property
    def resumed(self) -> bool:
        return self.resume_step is not None


class _Backend(Protocol):
    """A package behind its tracker. Everything may raise and block."""

    module: str

    @classmethod
    def start(cls, session: _Session) -> _Backend: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    module = "torch.utils.tensorboard"

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    @classmethod
    def start(cls, session: _Session) -> _TensorBoard:
        assert session.folder is not None
        # A folder that is written anew may hold the events of the run it had before: step 0
        # purges those too.
        writer = importlib.import_module(cls.module).SummaryWriter(
            str(session.folder / "tensorboard"), purge_step=session.resume_step or 0
        )
        if not session.resumed:
            text = json.dumps(session.config, indent=2)
            writer.add_text("config", f"```json\n{text}\n```", 0)
        return cls(writer)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # its own interval is two minutes: a killed run would lose them

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    module = "wandb"

    def __init__(self, run: Any) -> None:
        self.run = run

    @classmethod
    def start(cls, session: _Session) -> _Wandb:
        wandb = importlib.import_module(cls.module)
        offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        # init() would ask on the terminal, from this thread. (A run that is open is logged in.)
        if not offline and wandb.run is None and not wandb.login(prompt=False, verify=False):
            raise PermissionError("not logged in; run `wandb login` or set WANDB_MODE=offline")
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or session.project,
            name=session.name,
            id=_wandb_id(session),
            resume="allow",
            config=session.config,
            dir=None if session.folder is None else str(session.folder),
            reinit="create_new",  # a run that the user has open stays the user's
            # Without a limit, wandb's exit hook would wait for the network for ever. The console
            # is left alone: the progress display redraws it many times a second.
            settings=wandb.Settings(console="off", finish_timeout=_WANDB_FINISH_S),
        )
        # wandb's own step only grows; a run that resumes from a checkpoint goes back a little.
        run.define_metric("step")
        run.define_metric("*", step_metric="step", step_sync=True)
        return cls(run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, "step": step})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class _Trackio:
    module = "trackio"

    def __init__(self, run: Any) -> None:
        self.run = run

    @classmethod
    def start(cls, session: _Session) -> _Trackio:
        return cls(
            importlib.import_module(cls.module).init(
                project=session.project,
                name=session.name,
                config=session.config,
                resume="allow" if session.resumed else "never",
            )
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish()


_BACKENDS: dict[str, type[_Backend]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
TRACKERS = tuple(_BACKENDS)
"""The names ``report_to`` may hold; each is also its package and the extra of rlrf with it."""

_WANDB_FINISH_S = 30.0


def _import(tracker: str) -> Exception | None:
    """Import a tracker's package; returns what is wrong with an installed one.

    Raises:
        MissingDependencyError: it is not installed.
    """
    drawn = random.getstate()  # importing trackio draws; with or without it, a seed is a seed
    try:
        importlib.import_module(_BACKENDS[tracker].module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if (missing or "").partition(".")[0] == tracker:
            raise MissingDependencyError(f"report_to={tracker!r}", tracker, tracker) from error
        return error
    finally:
        random.setstate(drawn)
    return None


def _wandb_id(session: _Session) -> str:
    """The run's id at wandb: a new one for a new run, the one in ``trackers.json`` after that."""
    if session.folder is None:
        return _new_id()
    path = session.folder / "trackers.json"
    if session.resumed:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(path.read_text(encoding="utf-8"))["wandb"])
    run_id = _new_id()
    write_whole(path, json.dumps({"wandb": run_id}) + "\n")
    return run_id


def _new_id() -> str:
    return uuid.uuid4().hex[:12]
