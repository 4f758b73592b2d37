"""Run directories: what a training run leaves on disk while it goes, and reading it back.

========================  =======================================================================
``config.json``           the resolved configuration
``lock.json``             versions, platform, environment id and options
``metrics.jsonl``         one line of numbers per step: ``{"step": n, "reward": ..., ...}``
``rollouts.jsonl``        one line per rollout: :meth:`rlrf.Rollout.to_dict` and what the trainer
                          adds (``step``, ``split``, ``teacher_prompt``, ``tokens``, ``token_kl``)
``events.jsonl``          warnings and notes: ``{"time", "level", "message"}``
``status.json``           ``running``, ``done``, ``failed`` or ``interrupted``
``config.toml``           what ``rlrf train`` was told, where it was started by that
``checkpoints/``          ``step-N/`` and ``best/``: what a trainer needs to go on, if it writes any
========================  =======================================================================

Every write is one whole line, flushed at once; a run that is killed keeps all lines but the one
it was writing, and reading skips that one.

A run begins in one step: the rename of a ``status.json`` that says all that the other files are to
hold. Up to then an earlier run in the folder is whole; from then on it is the new one, and whoever
may write finishes what a kill cut off (:meth:`Run.settle`). Who may write is one process at a time
(:func:`own`); reading needs nothing.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rlrf._files import (
    InUse,
    append,
    check_name,
    flush,
    now,
    open_text,
    parse_json,
    refused,
    write_whole,
)
from rlrf._run_folder import (
    GROWING,
    Ownership,
    check_free,
    check_run,
    checkpoint_steps,
    clear,
    clear_checkpoints,
    held_text,
    is_run,
    own,
    unwritten,
)
from rlrf.env import Env
from rlrf.errors import UsageError
from rlrf.redact import safe_argv
from rlrf.wrappers import innermost, wrappers_of

__all__ = [
    "InUse",
    "Ownership",
    "Run",
    "check_free",
    "clear",
    "environment_lock",
    "is_run",
    "own",
    "unwritten",
]

STATUSES = ("running", "done", "failed", "interrupted")
LEVELS = ("info", "warning", "error")

_LOCKED = (
    "rlrf",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "vllm",
    "gymnasium",
    "numpy",
    "pydantic",
)


class Run:
    """One run directory; made by :meth:`create`, reopened by :meth:`open`.

    Both kinds can write: a resumed run appends to its files.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = check_name(Path(path))
        self._mended: set[str] = set()
        self._owned: Ownership | None = None

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        config: Mapping[str, Any],
        env: Env | None = None,
        overwrite: bool = False,
    ) -> Run:
        """Start a run directory; it is this process's until the run is finished.

        Args:
            path: the folder; made with its parents. Files of others in it are left alone.
            config: what the run was configured with; JSON data (other values as their text).
            env: the environment, for the lock.
            overwrite: replace an earlier run.

        Raises:
            UsageError: the folder already holds a run, is another process's, or cannot be made.
            Unwritable: the disk is full; an earlier run is as it was.
        """
        run = cls(path)
        owned = own(run.path)
        try:
            check_free(run.path, overwrite=overwrite or owned.overwrite)
            beginning = {
                "config.json": dict(config),
                "lock.json": environment_lock(env),
                "config.toml": owned.config_toml,
                "replaces": is_run(run.path),
            }
            status = {"status": "running", "started": now(), "pid": os.getpid()}
            run._write("status.json", {**status, "beginning": beginning})  # here it begins
            run.settle()
        except BaseException as error:
            owned.close()
            if isinstance(error, OSError):
                raise refused(f"cannot begin a run in {str(run.path)!r}", error) from None
            raise
        run._owned = owned
        return run

    def settle(self) -> None:
        """Finish what a kill cut off while the run began; of the one before it nothing is left.

        Raises:
            UsageError: it cannot be written; another try goes on.
            Unwritable: the disk is full; the same.
        """
        try:
            self._settle()
        except OSError as error:
            raise refused(f"cannot begin the run {str(self.path)!r}", error) from None

    def _settle(self) -> None:
        info = self.info
        beginning = info.pop("beginning", None)
        if not isinstance(beginning, dict):
            return
        text = beginning.get("config.toml")
        gone = [*GROWING, "report.html", "trackers.json"]
        if beginning.get("replaces") and text is None:
            gone.append("config.toml")
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
        clear_checkpoints(self.path)
        for name in ("config.json", "lock.json"):
            self._write(name, beginning.get(name) or {})
        if text is not None:
            write_whole(self.path / "config.toml", str(text))
        for name in GROWING:
            (self.path / name).touch()
        info.pop("model", None)
        self._write("status.json", info)

    def describe(self, config: Mapping[str, Any], env: Env | None = None) -> None:
        """Write what the run is configured with and runs on; a resumed run may differ in both."""
        text = held_text(self.path)
        self._write("config.json", dict(config))
        self._write("lock.json", environment_lock(env))
        if text is not None:
            write_whole(self.path / "config.toml", text)

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Read a run directory, or go on writing to it.

        Raises:
            UsageError: there is no run in ``path``.
        """
        run = cls(path)
        check_run(run.path)
        return run

    # --- writing --------------------------------------------------------------------------

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of numbers.

        JSON has no NaN: a number that is not finite is written as null and told as a warning, so
        that a diverged run shows in its report.
        """
        numbers = {name: float(value) for name, value in metrics.items() if name != "step"}
        wild = sorted(name for name, value in numbers.items() if not math.isfinite(value))
        line = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        self._append("metrics.jsonl", [{"step": int(step), **line}])
        if wild:
            told = ", ".join(f"{name} is {numbers[name]}" for name in wild)
            self.event("warning", f"step {step}: {told}")

    def log_rollouts(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per rollout; ``step`` is put into each record."""
        self._append("rollouts.jsonl", [{**record, "step": int(step)} for record in records])

    def event(self, level: str, message: str) -> None:
        """Append a note.

        Raises:
            UsageError: ``level`` is not ``info``, ``warning`` or ``error``.
        """
        if level not in LEVELS:
            raise UsageError(f"event level is {level!r}; it must be one of {', '.join(LEVELS)}")
        self._append("events.jsonl", [{"time": now(), "level": level, "message": message}])

    def finish(self, status: str = "done", message: str = "", *, model: bool = False) -> None:
        """Say how the run ended: ``done``, ``failed`` or ``interrupted``.

        Args:
            status: how it ended.
            message: why.
            model: whether it left its model in ``model/``; that of an earlier run may be there.

        Raises:
            UsageError: an unknown status.
        """
        if status not in STATUSES:
            raise UsageError(f"run status is {status!r}; it must be one of {', '.join(STATUSES)}")
        record = {**self._read("status.json"), "status": status}
        if status != "running":
            record["finished"] = now()
        record.pop("message", None)
        if message:
            record["message"] = message
        if model:
            record["model"] = True
        self._write("status.json", record)
        if status != "running" and self._owned is not None:
            self._owned.close()

    def position(self) -> dict[str, int]:
        """How long each of the files that grow is now, for :meth:`rewind`.

        Up to there they are on the disk, should the machine die.
        """
        for name in GROWING:
            (self.path / name).touch()
            _drop_torn_line(self.path / name)
            flush(self.path / name)
        flush(self.path)
        return {name: (self.path / name).stat().st_size for name in GROWING}

    def check_position(self, position: Mapping[str, int]) -> None:
        """Whether :meth:`rewind` can go there.

        Raises:
            UsageError: a file has become shorter than it was.
        """
        for name in GROWING:
            path, size = self.path / name, position.get(name, 0)
            if (path.stat().st_size if path.exists() else 0) < size:
                raise UsageError(
                    f"{str(path)!r} is shorter than it was when the checkpoint was written; "
                    "it was changed, and the run cannot be resumed from that checkpoint"
                )

    def rewind(self, position: Mapping[str, int]) -> None:
        """Forget what was written after :meth:`position`, and go on: the run is resumed.

        How it had ended is forgotten, too; the events keep it.

        Raises:
            UsageError: a file has become shorter than it was; nothing is touched.
        """
        self.check_position(position)
        for name in GROWING:
            path = self.path / name
            path.touch()
            os.truncate(path, position.get(name, 0))
        record = {k: v for k, v in self.info.items() if k not in ("finished", "message")}
        resumed = [*record.get("resumed", []), now()]
        if not (self.path / "model").is_dir():
            record.pop("model", None)
        self._write(
            "status.json", {**record, "status": "running", "pid": os.getpid(), "resumed": resumed}
        )

    # --- reading --------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """What the run was configured with."""
        return self._described("config.json")

    @property
    def lock(self) -> dict[str, Any]:
        """Versions, platform, environment; see :func:`environment_lock`."""
        return self._described("lock.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a number that was not finite is None.

        A line without a step, and what is no number, is left out.
        """
        return [
            {"step": int(line["step"]), **_numbers(line)}
            for line in self._lines("metrics.jsonl")
            if _is_step(line.get("step"))
        ]

    def rollouts(self) -> Iterator[dict[str, Any]]:
        """The records of ``rollouts.jsonl``, one at a time: the file may be large."""
        return self._lines("rollouts.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The notes, in order."""
        return list(self._lines("events.jsonl"))

    @property
    def status(self) -> str:
        """``running`` (or killed without a word), ``done``, ``failed`` or ``interrupted``."""
        return str(self.info.get("status", "running"))

    @property
    def info(self) -> dict[str, Any]:
        """``status.json``: status, started, finished, message, model."""
        return self._read("status.json")

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, oldest first."""
        return checkpoint_steps(self.path)

    @property
    def last_step(self) -> int:
        """The last step whose metrics are written; 0 before the first."""
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def begins_anew(self) -> bool:
        """Whether to resume a run without a checkpoint by beginning it again is right.

        It is where no more is lost than a kill may cost any run: the steps between two checkpoints.
        """
        config, last = self.config.get("trainer"), self.last_step
        every = config.get("save_steps") if isinstance(config, dict) else 0
        return not last or (self.status != "done" and isinstance(every, int) and 0 < last <= every)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status})"

    # --- files ----------------------------------------------------------------------------

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        path = self.path / name
        text = "".join(_json(record) + "\n" for record in records)
        if name not in self._mended:
            _drop_torn_line(path)
            self._mended.add(name)
        append(path, text)

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        write_whole(self.path / name, _json(data, indent=2) + "\n")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            with open_text(self.path / name) as file:
                data = parse_json(file.read())
        except FileNotFoundError:
            return {}
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f"{str(self.path / name)!r} is not valid JSON: {error}") from None
        return data if isinstance(data, dict) else {}

    def _described(self, name: str) -> dict[str, Any]:
        beginning = self.info.get("beginning")
        if isinstance(beginning, dict):
            data = beginning.get(name)
            return data if isinstance(data, dict) else {}
        return self._read(name)

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        if "beginning" in self.info:
            return  # what is there is of the run before
        try:
            opened = open_text(self.path / name)
        except FileNotFoundError:
            return
        with opened as file:
            for line in file:
                if not line.endswith("\n"):
                    return  # still being written, or torn by a kill
                try:
                    record = parse_json(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


def environment_lock(env: Env | None = None) -> dict[str, Any]:
    """What a run ran on: versions of Python and the packages that matter, platform, environment.

    Versions come from the installed metadata; nothing is imported.
    """
    versions = {}
    for name in _LOCKED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    lock: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "argv": safe_argv(sys.argv),
    }
    if env is not None:
        lock["env"] = {
            "id": env.spec.id.removeprefix("rlrf/") if env.spec else type(innermost(env)).__name__,
            "options": dict(env.spec.kwargs) if env.spec else {},
            "feedback": env.feedback_level.name,
            "split": env.split,
            "wrappers": wrappers_of(env),
        }
    return lock


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a kill left unfinished, so that what follows starts on its own line."""
    if path.is_symlink() or not path.exists():  # appending refuses a link
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _json(data: Mapping[str, Any], indent: int | None = None) -> str:
    try:
        return json.dumps(data, ensure_ascii=False, allow_nan=False, indent=indent, default=_plain)
    except ValueError:
        return json.dumps(_finite(data), ensure_ascii=False, indent=indent, default=_plain)


def _is_step(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < 1 << 53


def _numbers(line: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in line.items():
        if name == "step" or isinstance(value, bool):
            continue
        if value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max):
            found[name] = value
        elif isinstance(value, (int, float)):
            found[name] = None  # infinite, NaN, or beyond what a float holds
    return found


def _plain(value: Any) -> Any:
    """JSON data for numbers of numpy and torch, sets and the rest (as text)."""
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
