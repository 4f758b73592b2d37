"""Locks, whole writes and folders that take another's place: what a kill leaves of each."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest

from rlrf import UsageError
from rlrf import _files as files
from rlrf._files import (
    Claim,
    InUse,
    Unwritable,
    append,
    open_text,
    put_folder,
    settle_folder,
    standing,
    write_whole,
)

HOLD = (
    "import sys; from pathlib import Path; from rlrf._files import Claim\n"
    "claim = Claim(Path(sys.argv[1]), 'it'); print('held', flush=True); sys.stdin.read()\n"
)


def holder(lock: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_one_process_has_it_and_the_other_is_told_who(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with holder(lock) as first:
        with pytest.raises(InUse, match="the run 'a' is in use, by process") as refused:
            Claim(lock, "the run 'a'")
        assert f"process {first.pid} on {socket.gethostname()} since 20" in str(refused.value)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert lock.exists()  # what it leaves binds nobody
        Claim(lock, "the run 'a'").close()
    assert not lock.exists()


def test_two_claims_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    claim = Claim(tmp_path / ".lock", "it")
    with pytest.raises(InUse, match=f"process {os.getpid()} on"):
        Claim(tmp_path / ".lock", "it")
    claim.close()
    claim.close()
    Claim(tmp_path / ".lock", "it")  # goes with the object
    Claim(tmp_path / ".lock", "it").close()


def test_a_claim_does_not_outlive_its_process_in_a_fork(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from rlrf._files import Claim\n"
        "claim = Claim(Path(sys.argv[1]), 'it')\n"
        "if os.fork() == 0:\n"
        "    os.kill(os.getppid(), 9)\n"
        "    print('child', flush=True); sys.stdin.read(); os._exit(0)\n"
        "os.waitpid(-1, 0)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"child\n"
        process.wait()
        Claim(tmp_path / ".lock", "it").close()  # while the child lives on


def test_of_many_that_come_together_one_at_a_time_has_it(tmp_path: Path) -> None:
    """The lock file goes when it is let go of: none may hold one that nobody else sees."""
    inside, most, had = 0, 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most, had
        for _ in range(150):
            try:
                claim = Claim(tmp_path / ".lock", "it")
            except InUse:
                continue
            with lock:
                inside += 1
                had += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            claim.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert had


def test_a_lock_file_that_was_let_go_of_before_it_is_locked_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Claim(tmp_path / ".lock", "it")
    lock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        first.close()  # the file that was opened goes
        lock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        second = Claim(tmp_path / ".lock", "it")
    with pytest.raises(InUse):
        Claim(tmp_path / ".lock", "it")
    second.close()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_file_itself_says_whose_it_is(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with pytest.warns(RuntimeWarning, match="has no locks"):
        claim = Claim(lock, "it")
    with pytest.raises(InUse, match=r"has no locks\. If that has ended, delete"):
        Claim(lock, "it")
    claim.close()
    assert not lock.exists()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": ended.pid, "since": "x"}))
    with pytest.warns(RuntimeWarning, match="has no locks"):
        Claim(lock, "it").close()
    for text in ('{"host": "elsewhere", "pid": 1, "since": "x"}', ""):
        lock.write_text(text)
        with pytest.raises(InUse, match="delete"):
            Claim(lock, "it")
        assert lock.read_text() == text


def test_what_another_machine_left_behind_is_said(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text('{"host": "elsewhere", "pid": 7, "since": "then"}')
    with pytest.warns(RuntimeWarning, match="left behind by process 7 on elsewhere since then"):
        Claim(lock, "it").close()
    lock.write_text("oops")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Claim(lock, "it").close()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".lock").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match="cannot be claimed"):
        Claim(tmp_path / ".lock", "it")
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_full_disk_does_not_make_a_claim_less_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    claim = Claim(tmp_path / ".lock", "it")
    with pytest.raises(InUse, match="by another process"):
        Claim(tmp_path / ".lock", "it")
    claim.close()
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(Unwritable, match="No space left"):
        Claim(tmp_path / ".lock", "it")


# --- writing ------------------------------------------------------------------------------


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    for name in ("a", ".a.tmp", "b"):
        (tmp_path / name).symlink_to(theirs)
    write_whole(tmp_path / "a", "ours")
    assert not (tmp_path / "a").is_symlink()
    with pytest.raises(OSError, match="it is a link"):
        append(tmp_path / "b", "ours")
    assert theirs.read_text() == "theirs"


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_whole(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, at, fail)
        with pytest.raises(OSError, match="No space left") as failed:
            write_whole(path, "new")
    assert failed.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    append(path, "one\n")
    put, calls = os.write, 0

    def half(descriptor: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(descriptor, data[:2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left"):
            append(path, "two\n")
    append(path, "three\n")
    assert path.read_text() == "one\nthree\n"


def test_a_folder_takes_the_place_of_another_or_does_not(tmp_path: Path) -> None:
    target = tmp_path / "model"
    put_folder(target, lambda f: (f / "a").write_text("1"))
    put_folder(target, lambda f: (f / "b").write_text("2"))
    assert [p.name for p in target.iterdir()] == ["b"]

    def fail(folder: Path) -> None:
        (folder / "c").write_text("3")
        raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        put_folder(target, fail)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "b"]
    # A kill between the two renames.
    target.rename(tmp_path / ".model.old")
    assert standing(target) == tmp_path / ".model.old"
    (tmp_path / ".model.new").mkdir()
    settle_folder(target)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "b"]


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_what_is_written_may_be_read_by_whom_the_umask_lets(umask: int, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            descriptor, temporary = tempfile.mkstemp(dir=folder)  # as safetensors does
            os.close(descriptor)
            os.rename(temporary, folder / name)

    before = os.umask(umask)
    try:
        put_folder(tmp_path / "model", write)
        write_whole(tmp_path / "whole", b"1")
        append(tmp_path / "grown", "1")
    finally:
        os.umask(before)
    files = [tmp_path / name for name in ("model/a", "model/inner/b", "whole", "grown")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_a_folder_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flushed = tmp_path / "model", []

    def flush(path: Path) -> None:
        flushed.append((path.name, target.exists()))

    monkeypatch.setattr(files, "flush", flush)
    put_folder(target, lambda f: (f / "a").write_text("1"))
    assert flushed[:2] == [("a", False), (".model.new", False)]


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="is no file"):
            open_text(path)
    with pytest.raises(UsageError, match="cannot be read: File name too long"):
        open_text(tmp_path / ("x" * 300))


def test_json_that_is_nested_too_deep_is_none() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        files.parse_json("[" * 200_000 + "]" * 200_000)
