"""A run directory as a place: what lies in it, whose it is, and what it may be found like.

:mod:`rlrf.runs` reads and writes runs; this is what must hold before it does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlrf._files import Claim, InUse, Unwritable, check_name, hidden_target, refused, remove_folder
from rlrf.errors import UsageError

GROWING = ("metrics.jsonl", "rollouts.jsonl", "events.jsonl")
FILES = (
    "config.json",
    "lock.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "events.jsonl",
    "status.json",
    "report.html",
)
_STEP = re.compile(r"step-(\d{8})")
BEST = "best"
CHECKPOINT = ("state.json", "state.safetensors")
"""The files of a checkpoint; a folder without both of them is none."""
_FOLDERS = ("checkpoints", "model", "tensorboard")


def is_run(path: Path | str) -> bool:
    """Whether a folder holds a run.

    Raises:
        UsageError: it cannot be looked at.
    """
    try:
        return (check_name(Path(path)) / "status.json").is_file()
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be looked at: {error.strerror}") from None


def check_run(path: Path | str) -> None:
    """Refuse a folder that holds no run.

    Raises:
        UsageError: it holds none, or is no folder.
    """
    if not is_run(path):
        what = "holds no run (no status.json)" if Path(path).is_dir() else "is not a folder"
        raise UsageError(f"{str(path)!r} {what}; give the run directory that `rlrf train` printed")


def check_free(path: Path | str, *, overwrite: bool = False) -> None:
    """Refuse a folder that already holds a run, unless it may be overwritten.

    Raises:
        UsageError: it holds one, or files of others where a run's would be.
    """
    if is_run(path) and not overwrite:
        raise UsageError(
            f"{str(path)!r} already holds a run; go on with it (--resume {path}, in Python "
            "resume=True), replace it (--overwrite), or choose another run directory (--run-dir)"
        )
    foreign = [n for n in FILES if (Path(path) / n).exists()]
    if foreign and not is_run(path):
        raise UsageError(
            f"{str(path)!r} is no run but holds {foreign[0]!r}, which a run would replace; "
            "choose another run directory (--run-dir)"
        )
    if (Path(path) / "status.json").is_dir():
        raise UsageError(f"{str(path)!r} holds a folder 'status.json'; choose another (--run-dir)")


def check_output_of(path: Path | str) -> None:
    """Refuse to write a file over what a run is made of; its ``report.html`` may be.

    Raises:
        UsageError: it is a file of a run, or lies among its checkpoints or in its model.
    """
    place = Path(os.path.realpath(check_name(Path(path))))
    child = place
    for folder in place.parents:
        ours = (hidden_target(child) or child).name
        taken = (
            ours in _FOLDERS
            if child != place
            else ours != "report.html"
            and (
                ours in (*FILES, *_FOLDERS, "trackers.json", ".lock")
                or ours.startswith("config.")
                or ours.endswith(".jsonl")
            )
        )
        if taken and is_run(folder):
            raise UsageError(
                f"{str(path)!r} belongs to the run {str(folder)!r}, which would be spoilt; name "
                "another file"
            )
        child = folder


def clear(path: Path | str) -> None:
    """Delete the files of a run from a folder; whatever else is there (a model) stays."""
    for name in FILES:
        (Path(path) / name).unlink(missing_ok=True)


def checkpoint_steps(path: Path | str) -> list[int]:
    """The steps of which a run has a whole checkpoint, oldest first."""
    return sorted(
        int(m[1])
        for folder in _entries(Path(path) / "checkpoints")
        if (m := _STEP.fullmatch(folder.name)) and all((folder / n).is_file() for n in CHECKPOINT)
    )


def clear_checkpoints(path: Path | str) -> None:
    """Delete the checkpoints of a run, also half ones; what is of others stays."""
    for folder in _entries(Path(path) / "checkpoints"):
        name = (hidden_target(folder) or folder).name
        ours = name == BEST or _STEP.fullmatch(name)
        if ours and folder.is_dir() and {p.name for p in folder.iterdir()} <= {*CHECKPOINT}:
            remove_folder(folder)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


# --- whose it is --------------------------------------------------------------------------


@dataclass(eq=False)
class _Held:
    """A run directory that this process holds, however many in it do."""

    claim: Claim
    made: list[Path]
    """Folders that were made for it, the innermost first."""
    overwrite: bool = False
    config_toml: str | None = None
    holders: int = 0
    training: bool = False
    path: Path = field(default_factory=Path)


_held: dict[str, _Held] = {}
_guard = threading.RLock()


def _forget_held() -> None:
    global _guard
    _held.clear()
    _guard = threading.RLock()


os.register_at_fork(after_in_child=_forget_held)


class Ownership:
    """This process's hold on a run directory; made by :func:`own`, ended by :meth:`close`."""

    def __init__(self, key: str, held: _Held) -> None:
        self._held = held
        held.holders += 1
        self.close = weakref.finalize(self, _release, key, held)
        """Let go of it; the last of this process to do so ends the hold."""

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def overwrite(self) -> bool:
        """Whether :meth:`Run.create` may replace the run that is there."""
        return self._held.overwrite

    @property
    def config_toml(self) -> str | None:
        """What ``config.toml`` shall hold once the run begins, or goes on."""
        return self._held.config_toml

    def let(self, *, overwrite: bool = False, config_toml: str | None = None) -> None:
        """Set them, for whoever creates or resumes the run."""
        self._held.overwrite, self._held.config_toml = overwrite, config_toml

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While it trains, no other trainer of this process may.

        Raises:
            UsageError: one does.
        """
        with _guard:
            self.check_idle()
            self._held.training = True
        try:
            yield
        finally:
            self._held.training = False

    def check_idle(self) -> None:
        """Refuse a run that another trainer of this process is training.

        Raises:
            UsageError: one does.
        """
        if self._held.training:
            raise InUse(
                f"the run {str(self._held.path)!r} is in use, by another trainer of this process; "
                "wait for it, or choose another run directory"
            )


def own(path: Path | str, *, resume: bool = False) -> Ownership:
    """Hold a run directory, so that no other process trains in it or replaces it.

    The folder is made if it is not there, and goes again if nothing came into it. Within the
    process it may be held several times: by the command and by its trainer.

    Args:
        path: the folder.
        resume: there must be a run in it.

    Raises:
        InUse: another process holds it.
        UsageError: it cannot be made or written; something in it is a link, or is no file or
            folder where a run has one.
        Unwritable: the disk is full.
    """
    path = check_name(Path(path))
    if resume:
        check_run(path)
    with _guard:
        key = os.path.realpath(path)
        held = _held.get(key)
        if held is None:
            made = _make(path)
            try:
                held = _Held(Claim(path / ".lock", f"the run {str(path)!r}"), made, path=path)
                _held[key] = held
                _check_ours(path)
            except BaseException:
                if held is not None:
                    held.claim.close()
                    del _held[key]
                _unmake(made)
                raise
        return Ownership(key, held)


def _release(key: str, held: _Held) -> None:
    with _guard:
        held.holders -= 1
        if held.holders or _held.get(key) is not held:
            return
        del _held[key]
        held.claim.close()
        _unmake(held.made)


def held_text(path: Path) -> str | None:
    """What ``config.toml`` shall hold, if this process holds the folder and has said so."""
    held = _held.get(os.path.realpath(path))
    return held.config_toml if held is not None else None


def _make(path: Path) -> list[Path]:
    """Make a folder and its parents; which were made, the innermost first."""
    made: list[Path] = []
    try:
        for folder in reversed((path, *path.parents)):
            try:
                folder.mkdir()
            except FileExistsError:
                if not folder.is_dir():
                    raise
            except OSError:
                if not folder.is_dir():  # EROFS, say, of one that is there
                    raise
            else:
                made.insert(0, folder)
    except OSError as error:
        _unmake(made)
        raise refused(f"cannot make the run directory {str(path)!r}", error) from None
    return made


def _unmake(made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # something is in it
        for folder in made:
            folder.rmdir()


def _check_ours(path: Path) -> None:
    """Refuse, before anything is done, what would be found at the end.

    Raises:
        UsageError: a link, a file in the place of a folder or a folder in that of a file,
            something that may not be written.
    """
    entries = [path / name for name in (*FILES, "config.toml", "trackers.json", *_FOLDERS)]
    for name in _FOLDERS[:2]:
        entries += [e for e in path.glob(f".{name}.*") if hidden_target(e)]
    checkpoints = path / "checkpoints"
    try:
        inner = _entries(checkpoints) if not checkpoints.is_symlink() else []
    except OSError as error:
        raise UsageError(f"{str(checkpoints)!r} cannot be read: {error.strerror}") from None
    entries += [e for e in inner if _STEP.fullmatch((hidden_target(e) or e).name)]
    entries += [e for e in inner if (hidden_target(e) or e).name == BEST]
    for entry in entries:
        if entry.is_symlink():
            raise UsageError(
                f"{str(entry)!r} is a link, and nothing is written through links in a run "
                "directory; put there what it points to, or make the run directory itself the link"
            )
        folder = entry.parent == checkpoints or entry.name in _FOLDERS or hidden_target(entry)
        if not entry.exists():
            continue
        if entry.is_dir() != bool(folder) or not (folder or entry.is_file()):
            what = "no folder" if folder else "no file"
            raise UsageError(f"{str(entry)!r} is {what}; move it, or choose another run directory")
        if not os.access(entry, os.W_OK | (os.X_OK if folder else 0)):
            raise UsageError(f"{str(entry)!r} cannot be written: {os.strerror(errno.EACCES)}")


def unwritten(path: Path, error: BaseException) -> bool:
    """Whether an error is that a run's folder could not be written."""
    if isinstance(error, Unwritable):
        return True
    if not isinstance(error, OSError):
        return False
    if not isinstance(error.filename, (str, bytes)):
        return error.errno in _UNWRITABLE
    place = os.path.realpath(os.fsdecode(error.filename))
    return Path(os.path.realpath(path)) in (Path(place), *Path(place).parents)


_UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ESTALE, errno.EFBIG),
)
