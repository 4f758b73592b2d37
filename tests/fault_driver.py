"""Commands in forked children, into which a fault is put at a given file operation.

Forked, so that importing torch is paid for once; nothing is computed before a fork. Started in a
process of its own by test_run_faults.py: ``python -m tests.fault_driver FOLDER SCENARIO JSON``
prints one JSON line with what did not hold, and how many cases there were.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rlrf
from rlrf import cli
from rlrf.runs import Run, is_run
from rlrf_trainers.checkpoints import Checkpoints
from tests.resume_driver import CountA
from tests.tiny_model import save_tiny

_EVENTS = {"open": 0, "os.rename": 0, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0}
_EVENTS |= {"os.truncate": 0, "os.link": 0, "os.symlink": 0}


class Faults:
    """Counts the writing file operations below a folder, and makes a fault of one of them.

    Args:
        folder: where.
        at: the number of the operation, from 1; 0: none.
        fault: ``kill``, or the number of the error that it and all after it raise.
    """

    def __init__(self, folder: Path, at: int, fault: str | int) -> None:
        self.folder, self.at, self.fault = os.path.realpath(folder), at, fault
        self.count = 0
        self.names: list[str] = []

    def install(self) -> None:
        sys.addaudithook(self._audit)
        for name in ("write", "fsync", "ftruncate"):
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._meet(event, os.fsdecode(path))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(descriptor: int, *arguments: Any) -> Any:
            try:
                path = os.readlink(f"/proc/self/fd/{descriptor}")
            except OSError:
                return call(descriptor, *arguments)
            due = self.count + 1 == self.at and self.fault == "kill" and name == "write"
            if due and self._below(path):  # half of it is there
                call(descriptor, arguments[0][: len(arguments[0]) // 2])
            self._meet(name, path)
            return call(descriptor, *arguments)

        return wrapped

    def _below(self, path: str) -> bool:
        return os.path.abspath(path).startswith(self.folder)

    def _meet(self, what: str, path: str) -> None:
        if not self._below(path):
            return
        self.count += 1
        self.names.append(f"{what} {os.path.relpath(path, self.folder)}")
        if self.at and self.count == self.at and self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at and self.count >= self.at and isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault), path)


class Ended:
    """How a command ended."""

    def __init__(self, code: int | None, out: str, err: str, notes: Any) -> None:
        self.code, self.out, self.err, self.notes = code, out, err, notes

    @property
    def killed(self) -> bool:
        return self.code is None

    @property
    def problem(self) -> str:
        """What is wrong with how it ended; empty for a clear end."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if "Traceback" in self.err or "Exception ignored" in self.err:
            return f"a traceback: {self.err[-600:]}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}: {self.err[-300:]}"
        if (self.code != 0) != (len(errors) == 1):
            return f"exit code {self.code} with {len(errors)} errors: {self.err[-600:]}"
        return ""


def command(*arguments: str, cwd: Path, faults: Faults | None = None) -> Ended:
    """Run ``rlrf`` with arguments in a fork."""
    read, write = os.pipe()
    out, err = cwd / ".out", cwd / ".err"
    pid = os.fork()
    if pid == 0:
        code: Any = 70
        try:
            os.chdir(cwd)
            for name, number in ((out, 1), (err, 2)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            torch.set_num_threads(1)
            sys.argv = ["rlrf", *arguments]
            # The text streams of the parent may hold what it has not yet written.
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            put = os.write
            if faults is not None:
                faults.install()
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = 0 if end.code is None else end.code
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            if faults is not None:
                put(write, json.dumps([faults.count, faults.names]).encode())
        finally:
            os._exit(code if isinstance(code, int) else 71)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    ended = Ended(code, out.read_text(), err.read_text(), json.loads(told) if told else None)
    out.unlink()
    err.unlink()
    return ended


CONFIG = {
    "trainer.max_steps": 2,
    "trainer.prompts_per_step": 1,
    "trainer.num_generations": 2,
    "trainer.max_completion_length": 2,
    "trainer.eval_tasks": 1,
    "trainer.eval_steps": 1,
    "trainer.probe_tasks": 0,
    "trainer.save_steps": 1,
    "trainer.save_total_limit": 1,
    "trainer.learning_rate": 0.01,
}


class Bench:
    """A folder with a model, and the commands that train it in ``run``."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.name = "run"
        self.config = CONFIG | (config or {})
        rlrf.register("faults-count-v0", CountA)
        if not (folder / "base").exists():
            save_tiny(folder / "base", hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        self.problems: list[str] = []
        self.cases = 0

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def train(self, seed: int, *more: str, run: str = "") -> tuple[str, ...]:
        sets = [f"--set={k}={v}" for k, v in self.config.items()]
        return (
            *("train", "--trainer", "sdpo", "--env", "faults-count-v0", "--model", "base"),
            *("--run-dir", run or self.name, f"--set=trainer.seed={seed}", *sets, *more),
        )

    def run(self, *arguments: str, faults: Faults | None = None) -> Ended:
        return command(*arguments, cwd=self.folder, faults=faults)

    def good(self, where: str, *arguments: str) -> Ended:
        """A command that must do what it is told."""
        ended = self.run(*arguments)
        if ended.code != 0 or ended.problem:
            self.say(where, f"{' '.join(arguments)[:60]}: rc {ended.code}: {ended.err[-600:]}")
        return ended

    def clear(self, where: str, *arguments: str) -> Ended:
        """A command that must do it, or say in a line why not."""
        ended = self.run(*arguments)
        if ended.problem:
            self.say(where, f"{' '.join(arguments)[:60]}: {ended.problem}")
        return ended

    def say(self, where: str, problem: str) -> None:
        self.problems.append(f"{where}: {problem}")

    def state(self, run: str = "") -> dict[str, Any]:
        """What must be the same of two runs: numbers, rollouts, weights."""
        path = self.folder / (run or self.name)
        found: dict[str, Any] = {}
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            records = [json.loads(line) for line in (path / name).read_text().splitlines()]
            found[name] = [
                {k: v for k, v in r.items() if not k.startswith("time/")} for r in records
            ]
        found["model"] = _digest(path / "model" / "model.safetensors")
        found["steps"] = Checkpoints(path).steps()[-1:]  # a kill may leave one more
        found["litter"] = sorted(
            p.name for p in path.rglob(".*") if not p.name.startswith(".report.html.")
        )
        found["status"] = {"message": "", **Run.open(path).info}
        found["status"] = [found["status"][k] for k in ("status", "message", "model")]
        return found

    def put(self, name: str) -> None:
        """Have the run be what was kept under a name; nothing if it is empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        if name:
            shutil.copytree(self.folder / name, self.path, symlinks=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


OLD, NEW = 5, 1
"""Seeds, by which a run is known."""


def after(bench: Bench, where: str, ended: Ended, new: dict[str, Any], old: Any, n: int) -> None:
    """Every command must understand what a fault left, do what was promised, and lose nothing."""
    run = bench.path
    if not ended.killed and ended.problem:
        bench.say(where, ended.problem)
    begun = is_run(run)
    if begun:
        bench.good(where, "report", bench.name)
    else:
        told = bench.clear(where, "report", bench.name)
        if told.code != 2:
            bench.say(where, f"a report of no run: {told.out}")
    if n % 4 == 0:
        bench.clear(where, "model", "export", bench.name, f"out-{n}")
        shutil.rmtree(bench.folder / f"out-{n}", ignore_errors=True)
    if n % 4 == 1 and run.is_dir():  # from here on with a copy
        shutil.copytree(run, bench.folder / "copy", symlinks=True)
        bench.good(where, *bench.train(NEW, "--overwrite", run="copy"))
        compare(bench, f"{where}, overwritten", bench.state("copy"), new)
        shutil.rmtree(bench.folder / "copy")
    if not begun:
        if "--resume" in ended.err:
            bench.say(where, f"there is no run to resume: {ended.err}")
        bench.good(where, *bench.train(NEW))
    else:
        seed = Run.open(run).config["trainer"]["seed"]
        if seed == OLD:
            old = {key: value for key, value in old.items() if key != "litter"}  # of the fault
            compare(bench, f"{where}, the old run", bench.state(), old)
            return
        bench.good(where, "train", "--resume", bench.name)
    compare(bench, where, bench.state(), new)


def compare(bench: Bench, where: str, got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if got[key] != value:
            bench.say(where, f"{key} is {str(got[key])[:200]}, not {str(value)[:200]}")


def sweep(folder: Path, scenario: str, fault: str | int, stride: int, start: int) -> Bench:
    """Put a fault at every ``stride``-th operation of a scenario."""
    bench = Bench(folder)
    bench.good("new", *bench.train(NEW))
    new, old = bench.state(), None
    bench.put("")
    arguments: tuple[str, ...] = bench.train(NEW)
    begin = ""
    if scenario == "overwrite":
        bench.good("old", *bench.train(OLD))
        old = bench.state()
        (folder / "run").rename(folder / "old")
        arguments, begin = bench.train(NEW, "--overwrite"), "old"
    elif scenario == "resume":
        first = Faults(folder / "run", 0, "kill")
        whole = bench.run(*arguments, faults=first).notes[1]
        bench.put("")
        at = 1 + max(
            i for i, name in enumerate(whole) if name.startswith("os.mkdir checkpoints/.st")
        )
        bench.run(*arguments, faults=Faults(folder / "run", at, "kill"))
        (folder / "run").rename(folder / "cut")
        arguments, begin = ("train", "--resume", "run"), "cut"
    bench.put(begin)
    faults = Faults(folder / "run", 0, fault)
    names = bench.run(*arguments, faults=faults).notes[1]
    for n in range(1 + start, len(names) + 1, stride):
        bench.put(begin)
        ended = bench.run(*arguments, faults=Faults(folder / "run", n, fault))
        where = f"{scenario}, {fault} at {n}: {names[n - 1]}"
        if fault == "kill" and not ended.killed:
            bench.say(where, f"not killed: {ended.code} {ended.err[-300:]}")
        bench.cases += 1
        after(bench, where, ended, new, old, n)
    return bench


def disk(folder: Path, sizes: list[int], unit: str) -> Bench:
    """Train on a disk with room for so many pages (``size``) or files (``nr_inodes``)."""
    bench = Bench(folder)
    bench.good("new", *bench.train(NEW))
    new = bench.state()
    bench.name = "disk/run"
    mount = folder / "disk"
    mount.mkdir()
    for size in sizes:
        room = f"size={4 * size}k,nr_inodes=1k" if unit == "size" else f"nr_inodes={size},size=64m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", str(mount)], check=True)
        try:
            where = f"{unit} {size}"
            ended = bench.run(*bench.train(NEW))
            bench.cases += 1
            # Also while there is still no room.
            bench.clear(where, "report", bench.name)
            again = bench.clear(where, "train", "--resume", bench.name)
            if again.code == 1 and "No space left" not in again.err:
                bench.say(where, f"resumed without room: {again.err}")
            more = "remount,size=64m,nr_inodes=10k"
            subprocess.run(["mount", "-o", more, str(mount)], check=True)
            after(bench, where, ended, new, None, size)
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    return bench


if __name__ == "__main__":
    place, name, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    bench = {"sweep": sweep, "disk": disk}[name](place, **options)
    print(json.dumps({"cases": bench.cases, "problems": bench.problems}))
