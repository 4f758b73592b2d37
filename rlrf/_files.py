"""Files that a kill, a full disk, another process or another user may come upon at any moment.

A :class:`Claim` is the one way to say that a file or folder is ours; :func:`write_whole`,
:func:`append` and :func:`put_folder` are the ways to write. None of them follows a link, and what
each leaves behind, wherever it is cut off, is the old or the new.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlrf.errors import RlrfError, UsageError

SURROGATES = "backslashreplace"
"""A lone surrogate is no UTF-8; as ``\\udc80`` it is the JSON escape of itself."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Unwritable(RlrfError):
    """What was to be kept could not be written: no room, no permission, no such folder any more."""


class InUse(UsageError):
    """Another process, or another part of this one, has it."""


def reason(error: OSError) -> str:
    """What went wrong and where, without Python's brackets."""
    place = f": {os.fsdecode(error.filename)!r}" if error.filename is not None else ""
    return (error.strerror or str(error) or type(error).__name__) + place


def refused(what: str, error: OSError) -> RlrfError:
    """The error for a place that cannot be written: a wrong place, or one without room."""
    kind = Unwritable if error.errno in _NO_ROOM else UsageError
    return kind(f"{what}: {reason(error)}")


def check_name(path: Path) -> Path:
    """Refuse a path that could not be written down anywhere.

    Raises:
        UsageError: it is no UTF-8, or holds a NUL.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{str(path)!r} is no UTF-8; give a path that is") from None
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r} holds a NUL; give a path without")
    return path


# --- whose it is --------------------------------------------------------------------------


class Claim:
    """A lock file, held by this process until it is closed, at the latest until the process ends.

    The kernel drops the lock of a process that dies, so what it leaves binds nobody. The file says
    who holds it, for those that come second. Two claims of one process exclude each other, too.

    Args:
        path: the lock file; its folder must be there. It goes when the claim is closed.
        what: what is claimed, for messages: ``the run 'runs/a'``.

    Raises:
        InUse: another claim holds it.
        UsageError: the folder cannot be written.
        Unwritable: the disk is full.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        try:
            descriptor = _locked(path, what)
        except OSError as error:
            raise refused(f"{what} cannot be claimed", error) from None
        _descriptors.add(descriptor)
        self.close: Callable[[], Any] = weakref.finalize(self, _let_go, path, descriptor)


_descriptors: set[int] = set()


def _locked(path: Path, what: str) -> int:
    while True:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        made = True
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            made = False
            try:
                descriptor = os.open(path, flags)
            except FileNotFoundError:
                continue  # let go of in between
        try:
            there = "" if made else _holder(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                for _ in range(50):  # it may have come an instant before, and not said who it is
                    if holder is not None:
                        break
                    time.sleep(0.01)
                    holder = _holder(descriptor)
                raise InUse(
                    f"{what} is in use, by {_told(holder)}; wait for it, or stop it"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _judge(path, what, made, there)
            else:
                if not _is_at(descriptor, path):  # its holder has let go of it, and removed it
                    os.close(descriptor)
                    continue
                _say_where_it_was(path, what, there)
            # Who it is helps others only; a full disk does not make the claim less ours.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_me()).encode() + b"\n", 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _let_go(path: Path, descriptor: int) -> None:
    if descriptor not in _descriptors:  # a fork: the claim is its parent's
        return
    _descriptors.remove(descriptor)
    with contextlib.suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


def _forget_claims() -> None:
    """In a forked child: the parent's locks must not outlive the parent in it."""
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_forget_claims)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now()}


def _holder(descriptor: int) -> Any:
    try:
        return json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # it is writing it just now, or its disk is full
        return None


def _told(holder: Any) -> str:
    if not isinstance(holder, dict):
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _judge(path: Path, what: str, made: bool, holder: Any) -> None:
    """Whose a lock file is on a file system without locks: its maker's, while that may live.

    Raises:
        InUse: another's.
    """
    if not made:
        gone = False
        if isinstance(holder, dict) and holder.get("host") == socket.gethostname():
            try:
                os.kill(int(holder["pid"]), 0)
            except (ProcessLookupError, LookupError, TypeError, ValueError, OverflowError):
                gone = True
            except OSError:
                pass  # it is another user's
        if not gone:
            raise InUse(
                f"{what} is in use, by {_told(holder)}, as far as can be known: its file system "
                f"has no locks. If that has ended, delete {str(path)!r}"
            )
    warnings.warn(
        f"the file system of {str(path.parent)!r} has no locks: nothing but {path.name!r} keeps "
        "two processes apart, and after a kill it must be deleted where another machine made it",
        RuntimeWarning,
        stacklevel=2,
    )


def _say_where_it_was(path: Path, what: str, holder: Any) -> None:
    if isinstance(holder, dict) and holder.get("host") not in (None, socket.gethostname()):
        warnings.warn(
            f"{what} was left behind by {_told(holder)}; should it still run there, stop one of "
            "the two: not every network file system passes locks on between machines",
            RuntimeWarning,
            stacklevel=2,
        )


# --- writing ------------------------------------------------------------------------------


def write_whole(path: Path, content: str | bytes, *, beside: str = "") -> None:
    """Write a file so that a kill, or the machine's death, leaves the old one or the new one.

    Args:
        path: the file; a link there is replaced, not followed.
        content: what it shall hold.
        beside: tells apart those that may write it at once.

    Raises:
        OSError: it could not be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}{beside}.tmp")
    data = content if isinstance(content, bytes) else content.encode("utf-8", SURROGATES)
    with _named(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:  # a kill came in between
            os.unlink(temporary)
            descriptor = os.open(temporary, flags, 0o666)
        try:
            try:
                _write_all(descriptor, data)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def append(path: Path, text: str) -> None:
    """Append to a file, all of it or nothing.

    Raises:
        OSError: it could not be written; the file is as it was. A link is not followed.
    """
    with _named(path):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, text.encode("utf-8", SURROGATES))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk: a machine may die."""
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a descriptor do not say which file it was; a link is called one."""
    try:
        yield
    except OSError as error:
        link = "it is a link, which is not written through"
        told = link if error.errno == errno.ELOOP else error.strerror
        raise OSError(error.errno, told, str(path)) from error


# --- folders ------------------------------------------------------------------------------


def put_folder(target: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a folder, which then takes the place of ``target``, whole or not at all.

    Wherever a kill comes, :func:`settle_folder` finds the old one or the new one. Its files may be
    read by whom the umask lets, whatever ``write`` made them by.

    Raises:
        OSError: it could not be written; what was there stays.
    """
    fresh, old = _beside(target, "new"), _beside(target, "old")
    try:
        settle_folder(target)
        fresh.mkdir()
        write(fresh)
        # safetensors writes through a temporary file, which nobody but its owner may read.
        shown = fresh.stat().st_mode & 0o666
        for path in (*fresh.rglob("*"), fresh):
            mode = path.stat().st_mode
            if mode & shown != shown:
                path.chmod(stat.S_IMODE(mode) | shown)
            flush(path)
        if target.exists():  # a folder cannot be renamed onto one that holds something
            target.rename(old)
        fresh.rename(target)
        flush(target.parent)
    finally:
        with contextlib.suppress(OSError):  # it must not hide why; the next one sees to it
            settle_folder(target)


def settle_folder(target: Path) -> None:
    """Remove what a kill left half done, and put back what it had put aside."""
    fresh, old, gone = (_beside(target, kind) for kind in ("new", "old", "gone"))
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (fresh, old, gone):
        if path.exists():
            shutil.rmtree(path)


def standing(target: Path) -> Path:
    """Where a folder is that a kill may have put aside; for those that only read."""
    old = _beside(target, "old")
    return old if old.is_dir() and not target.exists() else target


def remove_folder(target: Path) -> None:
    """Delete a folder; no part of it is left under its name."""
    gone = _beside(target, "gone")
    if gone.exists():
        shutil.rmtree(gone)
    target.rename(gone)
    shutil.rmtree(gone)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def hidden_target(path: Path) -> Path | None:
    """The folder that ``path`` was made or put aside for; None: it is no such name."""
    for kind in ("new", "old", "gone"):
        if path.name.startswith(".") and path.name.endswith(f".{kind}"):
            return path.with_name(path.name[1:].removesuffix(f".{kind}"))
    return None


# --- reading ------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """What a text of JSON says.

    Raises:
        ValueError: it is none, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def open_text(path: Path) -> Any:
    """A file of text to read, whatever bytes are in it; what is no plain file is refused.

    Raises:
        FileNotFoundError: there is none.
        UsageError: it cannot be read, or is a folder, a pipe, a device.
    """
    try:
        # A pipe would have us wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{str(path)!r} is no file")
    return os.fdopen(descriptor, encoding="utf-8", errors="replace", newline="\n")


def now() -> str:
    """The time, to the second, as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
