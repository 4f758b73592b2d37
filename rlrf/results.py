"""Results of an evaluation in a file, written rollout by rollout: a killed one is continued.

While an evaluation runs, ``NAME.json.partial`` holds its settings and, a line each, the rollouts
that have finished. At the end ``NAME.json`` holds the report, and the partial file goes; unless
some rollouts are unscored, which the same command then tries again.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rlrf.errors import UsageError
from rlrf.evaluate import EvalReport
from rlrf.rollout import Rollout


class ResultsFile:
    """The file of one evaluation.

    Args:
        path: where the report goes.
        settings: all that decides what the rollouts are; JSON data.
        overwrite: replace what is there.

    Raises:
        UsageError: there is a report already, or rollouts made with other settings.
    """

    def __init__(
        self, path: Path | str, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        if not self.path.name or self.path.is_dir():
            raise UsageError(f"{str(path)!r} is a folder; name a file for the results")
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
        self._file: TextIO | None = None
        if overwrite:
            self.partial.unlink(missing_ok=True)
        elif self.path.exists() and not self.partial.exists():
            raise UsageError(
                f"{self.path} exists; --overwrite replaces it, another --out leaves it alone"
            )
        self.done = self._read()

    @classmethod
    def named(cls, folder: Path | str, name: str, settings: Mapping[str, Any]) -> ResultsFile:
        """The first of ``name.json``, ``name-2.json``, ... that is free or can be continued."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")
        number = 1
        while True:
            try:
                suffix = f"-{number}" if number > 1 else ""
                return cls(Path(folder) / f"{stem}{suffix}.json", settings)
            except UsageError:
                number += 1

    def _read(self) -> list[Rollout]:
        """The scored rollouts of an evaluation that was cut off."""
        if not self.partial.exists():
            return []
        rollouts = []
        for number, line in enumerate(self.partial.read_text(encoding="utf-8").splitlines()):
            try:
                data = json.loads(line)
            except ValueError:
                break  # cut off while it was written
            if number == 0:
                self._compare(data)
            else:
                try:
                    rollout = Rollout.from_dict(data)
                except (LookupError, TypeError, AttributeError) as error:
                    raise UsageError(
                        f"{self.partial}, line {number + 1}, is no rollout ({error!r}); "
                        "--overwrite starts anew"
                    ) from None
                if rollout.scored:  # what the machinery failed at is tried again
                    rollouts.append(rollout)
        return rollouts

    def _compare(self, there: Any) -> None:
        if not isinstance(there, dict):
            raise UsageError(f"{self.partial} is damaged; --overwrite starts anew")
        for key in {**there, **self.settings}:
            if there.get(key) != self.settings.get(key):
                raise UsageError(
                    f"{self.partial} holds rollouts made with {key}={there.get(key)!r}, not "
                    f"{self.settings.get(key)!r}; --overwrite starts anew, another --out leaves "
                    "them alone"
                )

    def __enter__(self) -> ResultsFile:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        before = self._claimed()
        # Written anew: without unscored rollouts, and without a line that was cut off.
        fresh = self.partial.with_name(self.partial.name + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            for line in (self.settings, *(r.to_dict() for r in self.done)):
                file.write(_line(line))
        fresh.replace(self.partial)
        self._file = self._claimed()
        before.close()
        return self

    def _claimed(self) -> TextIO:
        """The partial file, open and ours: two evaluations must not write to it."""
        file = self.partial.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UsageError(
                f"another evaluation writes to {self.partial}; wait for it, or give another --out"
            ) from None
        return file

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, rollout: Rollout) -> None:
        """Keep a rollout that has finished."""
        assert self._file is not None
        self._file.write(_line(rollout.to_dict()))
        self._file.flush()

    def finish(self, report: EvalReport, about: Mapping[str, Any]) -> None:
        """Write the report, whole or not at all, with settings, ``about`` and all rollouts."""
        data = self.settings | dict(about) | report.to_dict(rollouts=True)
        fresh = self.path.with_name(self.path.name + f".{os.getpid()}")
        text = json.dumps(data, indent=1, default=str)
        fresh.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        fresh.replace(self.path)
        self.__exit__()
        if not report.n_unscored:
            self.partial.unlink(missing_ok=True)


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, default=str) + "\n"
