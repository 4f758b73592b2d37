"""Run directories: what a training run leaves on disk while it goes, and reading it back.

========================  =======================================================================
``config.json``           the resolved configuration
``lock.json``             versions, platform, environment id and options
``metrics.jsonl``         one line of numbers per step: ``{"step": n, "reward": ..., ...}``
``rollouts.jsonl``        one line per rollout: :meth:`rlrf.Rollout.to_dict` and what the trainer
                          adds (``step``, ``split``, ``teacher_prompt``, ``tokens``, ``token_kl``)
``events.jsonl``          warnings and notes: ``{"time", "level", "message"}``
``status.json``           ``running``, ``done``, ``failed`` or ``interrupted``
``checkpoints/``          what a trainer needs to go on, if it writes any
========================  =======================================================================

Every write is one whole line, flushed at once; a run that is killed keeps all lines but the one
it was writing, and reading skips that one.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rlrf.env import Env
from rlrf.errors import UsageError
from rlrf.redact import safe_argv

# A lone surrogate is no UTF-8; as \udc80 it is the JSON escape of itself.
_SURROGATES = "backslashreplace"

STATUSES = ("running", "done", "failed", "interrupted")
LEVELS = ("info", "warning", "error")

_GROWING = ("metrics.jsonl", "rollouts.jsonl", "events.jsonl")
_FILES = (
    "config.json",
    "lock.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "events.jsonl",
    "status.json",
    "report.html",
)
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
        self.path = Path(path)
        self._mended: set[str] = set()

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        config: Mapping[str, Any],
        env: Env | None = None,
        overwrite: bool = False,
    ) -> Run:
        """Start a run directory.

        Args:
            path: the folder; made with its parents. Files of others in it are left alone.
            config: what the run was configured with; JSON data (other values as their text).
            env: the environment, for the lock.
            overwrite: delete an earlier run's files first.

        Raises:
            UsageError: the folder already holds a run, or cannot be made.
        """
        run = cls(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make the run directory {str(run.path)!r}: {error.strerror}"
            ) from None
        check_free(run.path, overwrite=overwrite)
        clear(run.path)
        # First of all, so that what a kill leaves behind from here on is a run that can be resumed.
        run._write("status.json", {"status": "running", "started": _now(), "pid": os.getpid()})
        run.describe(config, env)
        for name in _GROWING:
            (run.path / name).touch()
        return run

    def describe(self, config: Mapping[str, Any], env: Env | None = None) -> None:
        """Write what the run is configured with and runs on; a resumed run may differ in both."""
        self._write("config.json", dict(config))
        self._write("lock.json", environment_lock(env))

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Read a run directory, or go on writing to it.

        Raises:
            UsageError: there is no run in ``path``.
        """
        run = cls(path)
        if not is_run(run.path):
            what = "holds no run (no status.json)" if run.path.is_dir() else "is not a folder"
            raise UsageError(
                f"{str(run.path)!r} {what}; give the run directory that `rlrf train` printed"
            )
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
        self._append("events.jsonl", [{"time": _now(), "level": level, "message": message}])

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
            record["finished"] = _now()
        if message:
            record["message"] = message
        if model:
            record["model"] = True
        self._write("status.json", record)

    def position(self) -> dict[str, int]:
        """How long each of the files that grow is now, for :meth:`rewind`."""
        for name in _GROWING:
            _drop_torn_line(self.path / name)
        return {name: (self.path / name).stat().st_size for name in _GROWING}

    def rewind(self, position: Mapping[str, int]) -> None:
        """Forget what was written after :meth:`position`, and go on: the run is resumed.

        Raises:
            UsageError: a file has become shorter than it was.
        """
        sizes = {self.path / name: position.get(name, 0) for name in _GROWING}
        for path, size in sizes.items():  # all of them, before any is touched
            if (path.stat().st_size if path.exists() else 0) < size:
                raise UsageError(
                    f"{str(path)!r} is shorter than it was when the checkpoint was written; "
                    "it was changed, and the run cannot be resumed"
                )
        for path, size in sizes.items():
            path.touch()
            os.truncate(path, size)
        record = {k: v for k, v in self._read("status.json").items() if k != "finished"}
        resumed = [*record.get("resumed", []), _now()]
        self._write(
            "status.json", {**record, "status": "running", "pid": os.getpid(), "resumed": resumed}
        )

    # --- reading --------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """What the run was configured with."""
        return self._read("config.json")

    @property
    def lock(self) -> dict[str, Any]:
        """Versions, platform, environment; see :func:`environment_lock`."""
        return self._read("lock.json")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a number that was not finite is None."""
        return list(self._lines("metrics.jsonl"))

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

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status})"

    # --- files ----------------------------------------------------------------------------

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        path = self.path / name
        if name not in self._mended:
            _drop_torn_line(path)
            self._mended.add(name)
        text = "".join(_json(record) + "\n" for record in records)
        with path.open("a", encoding="utf-8", errors=_SURROGATES) as file:
            file.write(text)

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        # Written beside and renamed: a kill leaves the old file or the new one, never half.
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(_json(data, indent=2) + "\n", encoding="utf-8", errors=_SURROGATES)
        temporary.replace(self.path / name)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UsageError(f"{str(self.path / name)!r} is not valid JSON: {error}") from None
        return data if isinstance(data, dict) else {}

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.endswith("\n"):
                    return  # still being written, or torn by a kill
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record


def is_run(path: Path | str) -> bool:
    """Whether a folder holds a run."""
    return (Path(path) / "status.json").is_file()


def check_free(path: Path | str, *, overwrite: bool = False) -> None:
    """Refuse a folder that already holds a run, unless it may be overwritten.

    Raises:
        UsageError: it holds one.
    """
    if is_run(path) and not overwrite:
        raise UsageError(
            f"{str(path)!r} already holds a run; choose another run directory or overwrite it"
        )
    foreign = [n for n in _FILES if (Path(path) / n).exists()]
    if foreign and not is_run(path):
        raise UsageError(
            f"{str(path)!r} is no run but holds {foreign[0]!r}, which a run would replace; "
            "choose another run directory"
        )


def clear(path: Path | str) -> None:
    """Delete the files of a run from a folder; whatever else is there (a model) stays."""
    for name in _FILES:
        (Path(path) / name).unlink(missing_ok=True)


@contextlib.contextmanager
def set_aside(path: Path | str) -> Iterator[None]:
    """Make room for a new run in a folder; the old one comes back if no new one begins."""
    path = Path(path)
    old = path / ".overwritten"
    if old.is_dir():  # a kill came in between
        _bring_back(old, path)
    names = [n for n in (*_FILES, "config.toml") if (path / n).exists()]
    if names:
        old.mkdir()
    for name in names:
        (path / name).replace(old / name)
    try:
        yield
    finally:
        if old.is_dir():
            _bring_back(old, path)


def _bring_back(old: Path, path: Path) -> None:
    """Put a run that was set aside back, or drop it where another has begun."""
    if not is_run(path):
        for file in old.iterdir():
            file.replace(path / file.name)
    shutil.rmtree(old)


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
            "id": env.spec.id.removeprefix("rlrf/") if env.spec else type(env).__name__,
            "options": dict(env.spec.kwargs) if env.spec else {},
            "feedback": env.feedback_level.name,
            "split": env.split,
        }
    return lock


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a kill left unfinished, so that what follows starts on its own line."""
    if not path.exists():
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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
