"""Results of an evaluation in a file, written rollout by rollout: a killed one is continued.

While an evaluation runs, ``NAME.json.partial`` holds its settings and, a line each, the rollouts
that have finished. At the end ``NAME.json`` holds the report, and the partial file goes; unless
some rollouts are unscored, which the same command then tries again.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrf._files import (
    Claim,
    InUse,
    Unwritable,
    append,
    open_text,
    parse_json,
    reason,
    refused,
    write_whole,
)
from rlrf._interrupt import same_command
from rlrf._run_folder import check_output_of
from rlrf.errors import UsageError
from rlrf.evaluate import EvalReport
from rlrf.rollout import Rollout


@dataclass
class Results:
    """A file of results, read.

    Attributes:
        path: the file that was read.
        partial: whether it is of an evaluation that has not come to its end.
        settings: what decided the rollouts.
        about: what else was noted: ``lock``, ``warnings``.
        rollouts: :meth:`rlrf.Rollout.to_dict` of each; not checked.
        broken: how many lines could not be read.
    """

    path: Path
    partial: bool
    settings: dict[str, Any]
    about: dict[str, Any]
    rollouts: list[dict[str, Any]]
    broken: int = 0


def current(path: Path | str) -> Path:
    """The file to read for results ``path``: of itself and its partial file what is newer.

    Either may be named; the other takes its place when an evaluation begins again, or ends.
    """
    path = Path(path)
    whole = path.with_name(path.name.removesuffix(".partial"))
    there = [p for p in (whole, whole.with_name(whole.name + ".partial")) if p.is_file()]
    return max(there, key=lambda p: p.stat().st_mtime_ns, default=path)


def read_results(path: Path | str) -> Results:
    """Read what an evaluation found, or has found so far; see :func:`current`.

    Raises:
        UsageError: there is no such file, or it holds no results.
    """
    file = current(path)
    partial = file.name.endswith(".partial")
    try:
        with open_text(file) as opened:
            if partial:
                return _read_partial(file, opened)
            data = parse_json(opened.read())
    except FileNotFoundError:
        raise UsageError(f"there is no file {str(path)!r}") from None
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{str(file)!r} holds no results of `rlrf eval`: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("rollouts"), list):
        raise UsageError(f"{str(file)!r} holds no results of `rlrf eval`")
    rollouts = [r for r in data["rollouts"] if isinstance(r, dict)]
    known = {*EvalReport.of(()).to_dict(), "rollouts", "lock", "warnings"}
    return Results(
        file,
        False,
        {k: v for k, v in data.items() if k not in known or k == "n_tasks"},
        {k: data[k] for k in ("lock", "warnings") if k in data},
        rollouts,
        len(data["rollouts"]) - len(rollouts),
    )


def _read_partial(file: Path, lines: Iterable[str]) -> Results:
    found = Results(file, True, {}, {}, [])
    for number, line in enumerate(lines):
        if not line.endswith("\n"):
            break  # still being written
        try:
            data = parse_json(line)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            found.broken += 1
        elif number:
            found.rollouts.append(data)
        else:
            found.settings = data
    if not found.settings or "task_id" in found.settings:
        raise UsageError(f"{str(file)!r} holds no results of `rlrf eval`")
    return found


class Taken(UsageError):
    """There are results of that name already."""


class ResultsFile:
    """The file of one evaluation.

    Args:
        path: where the report goes.
        settings: all that decides what the rollouts are; JSON data.
        overwrite: replace what is there.

    Attributes:
        done: what an evaluation that was cut off has scored.

    Raises:
        UsageError: there is a report already, or rollouts made with other settings; the place is
            none that can be written.
    """

    def __init__(
        self, path: Path | str, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        check_output_of(self.path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
        self.overwrite = overwrite
        self._claim: Claim | None = None
        self._begun = False
        self.done: list[Any] = []
        self._look()

    @classmethod
    def named(cls, folder: Path | str, name: str, settings: Mapping[str, Any]) -> ResultsFile:
        """The first of ``name.json``, ``name-2.json``, ... that is free or can be continued.

        It is claimed; see :meth:`claim`.
        """
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:200]
        for number in itertools.count(1):
            suffix = f"-{number}" if number > 1 else ""
            try:
                found = cls(Path(folder) / f"{stem}{suffix}.json", settings)
                found.claim()
                break
            except (Taken, InUse):
                continue
        return found

    def claim(self) -> None:
        """Make the file ours, until :meth:`__exit__`: two evaluations must not write to it.

        Raises:
            InUse: another evaluation writes to it.
            UsageError: as the class; now it is sure.
            Unwritable: the disk is full.
        """
        if self._claim is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(f"cannot make the folder {str(self.path.parent)!r}", error) from None
        lock = self.path.with_name(f".{self.path.name}.lock")
        self._claim = Claim(lock, f"the results file {str(self.path)!r}")
        try:
            self._look()  # another may have written since
        except BaseException:
            self._let_go()
            raise

    def _look(self) -> None:
        """Whether the place is ours to write to, and what is there to go on from."""
        try:
            if not self.path.name or self.path.is_dir():
                raise UsageError(f"{str(self.path)!r} is a folder; name a file for the results")
            for file in (self.path, self.partial):
                if file.is_symlink():
                    raise UsageError(
                        f"{str(file)!r} is a link, and results are not written through links; "
                        "name the file it points to"
                    )
                if file.exists() and not file.is_file():
                    raise UsageError(f"{str(file)!r} is no file; name another for the results")
            if self.path.exists() and not self.partial.exists() and not self.overwrite:
                raise Taken(
                    f"{self.path} exists; --overwrite replaces it, another --out leaves it alone"
                )
        except OSError as error:
            raise UsageError(f"{str(self.path)!r} cannot be used: {error.strerror}") from None
        self.done = [] if self.overwrite else self._read()

    def _lines(self) -> Iterator[tuple[int, Any]]:
        """Number and content of the whole lines that are there; one that was cut off is none."""
        try:
            opened = open_text(self.partial)
        except FileNotFoundError:
            return
        with opened as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    return
                try:
                    yield number, parse_json(line)
                except ValueError:  # the machine died while it was written
                    yield number, None

    def _read(self) -> list[Any]:
        """The scored rollouts of an evaluation that was cut off."""
        rollouts = []
        for number, data in self._lines():
            if number == 1:
                self._compare(data)
                continue
            if data is None:
                continue
            try:
                rollout = Rollout.from_dict(data)
                if not (isinstance(rollout.task_id, str) and _is_number(rollout.reward, none=True)):
                    raise TypeError(f"task_id={rollout.task_id!r}, reward={rollout.reward!r}")
                if not all(_is_number(value) for value in rollout.metrics.values()):
                    raise TypeError(f"metrics={rollout.metrics!r}")
            except Exception as error:  # whatever a line may hold
                raise self._damaged(number, "rollout", error) from None
            if rollout.scored:  # what the machinery failed at is tried again
                rollouts.append(rollout)
        return rollouts

    def _damaged(self, number: int, what: str, error: Exception) -> UsageError:
        return UsageError(
            f"{self.partial}, line {number}, is no {what} ({error!r}); --overwrite starts anew"
        )

    def _compare(self, there: Any) -> None:
        if not isinstance(there, dict):
            raise UsageError(f"{self.partial} is damaged; --overwrite starts anew")
        for key in {**there, **self.settings}:
            if there.get(key) != self.settings.get(key):
                raise Taken(
                    f"{self.partial} holds rollouts made with {key}={there.get(key)!r}, not "
                    f"{self.settings.get(key)!r}; --overwrite starts anew, another --out leaves "
                    "them alone"
                )

    def __enter__(self) -> ResultsFile:
        self.claim()
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def add(self, rollout: Any) -> None:
        """Keep a rollout that has finished; nothing is written before the first.

        Raises:
            Unwritable: the disk is full; what was kept stays.
        """
        assert self._claim is not None
        try:
            if not self._begun:
                # Written anew: without unscored rollouts, and without a line that was cut off.
                lines = (self.settings, *(r.to_dict() for r in self.done))
                write_whole(self.partial, "".join(map(_line, lines)))
                self._begun = True
            append(self.partial, _line(rollout.to_dict()))
        except OSError as error:
            raise self._unwritable(error) from None

    def kept(self, done: int, total: int, what: str, rest: str = "") -> list[str]:
        """What an interrupted command says of it: what is kept here, and how to go on.

        Args:
            done: how many were kept, by this command and before it.
            total: of how many.
            what: what they are: ``rollouts``.
            rest: what becomes of the others, if there is anything to say.
        """
        if not done:  # nothing is written before the first; what is there is of an earlier one
            again = same_command(*(["--overwrite"] if self.overwrite else ()))
            return [f"kept: none of {total} {what}, as none had ended", f"to begin again: {again}"]
        return [
            f"kept: {done} of {total} {what}, in {self.partial}{rest}",
            f"to go on: {same_command()}",
        ]

    def finish(self, report: EvalReport, about: Mapping[str, Any]) -> None:
        """Write the report, whole or not at all, with settings, ``about`` and all rollouts.

        Raises:
            Unwritable: the disk is full; the partial file stays.
        """
        data = self.settings | dict(about) | report.to_dict(rollouts=True)
        text = json.dumps(data, indent=1, default=str)
        try:
            write_whole(self.path, text + "\n")
            if not report.n_unscored:
                self.partial.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        self._let_go()

    def _unwritable(self, error: OSError) -> Unwritable:
        return Unwritable(
            f"the results cannot be written: {reason(error)}. Mend that; the same command, with "
            f"--out {self.path}, goes on from what is kept in {self.partial}"
        )


def _is_number(value: Any, *, none: bool = False) -> bool:
    if isinstance(value, (bool, int, float)):
        return abs(value) <= sys.float_info.max
    return none and value is None


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, default=str) + "\n"
