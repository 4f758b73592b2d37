"""Commands in forked children, into which a fault is put at a given file operation.

Forked, so that importing torch is paid for once; nothing is computed before a fork. Started in a
process of its own by test_run_faults.py: ``python -m tests.fault_driver FOLDER JOBS``, where JOBS
is a JSON list of [function, arguments], prints a JSON line: what did not hold, of how many cases.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import rlrf
from rlrf import cli
from rlrf.runs import Run, is_run
from rlrf_trainers.run.checkpoints import Checkpoints
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


class Started:
    """A command under way in a fork."""

    def __init__(self, pid: int, pipe: int, out: Path, err: Path) -> None:
        self.pid, self.pipe, self.out, self.err = pid, pipe, out, err

    def wait(self) -> Ended:
        with os.fdopen(self.pipe) as pipe:
            told = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
        ended = Ended(code, self.out.read_text(), self.err.read_text(), json.loads(told or "null"))
        self.out.unlink()
        self.err.unlink()
        return ended


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


def start(*arguments: str, cwd: Path, faults: Faults | None = None, gate: int = -1) -> Started:
    """Run ``rlrf`` with arguments in a fork.

    Args:
        arguments: after ``rlrf``.
        cwd: where.
        faults: what goes wrong.
        gate: a descriptor whose end of file is waited for before anything is done.
    """
    read, write = os.pipe()
    number = next(_numbers)
    out, err = cwd / f".out-{number}", cwd / f".err-{number}"
    pid = os.fork()
    if pid == 0:
        code: Any = 70
        try:
            os.chdir(cwd)
            for name, descriptor in ((out, 1), (err, 2)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
            # The text streams of the parent may hold what it has not yet written.
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)
            sys.argv = ["rlrf", *arguments]
            put = os.write
            if gate >= 0:
                os.read(gate, 1)
            if faults is not None:
                faults.install()
            code = _main()
            sys.stdout.flush()
            sys.stderr.flush()
            if faults is not None:
                told = {"names": faults.names, "modules": sorted(sys.modules)}
                put(write, json.dumps(told).encode())
        finally:
            os._exit(code if isinstance(code, int) else 71)
    os.close(write)
    return Started(pid, read, out, err)


_numbers = itertools.count()


def _main() -> Any:
    try:
        cli.main()
    except SystemExit as end:
        return 0 if end.code is None else end.code
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


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
        rlrf.policies.register("faults-scripted", lambda: rlrf.ScriptedPolicy(lambda _: "aa"))
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
        return start(*arguments, cwd=self.folder, faults=faults).wait()

    def names(self, *arguments: str) -> list[str]:
        """The file operations of a command that is left alone."""
        notes = self.run(*arguments, faults=Faults(self.path, 0, "kill")).notes
        for module in notes["modules"]:  # so that no other child needs to import them
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        found: list[str] = notes["names"]
        return found

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


def sweep(bench: Bench, scenario: str, fault: str | int, stride: int, start: int) -> None:
    """Put a fault at every ``stride``-th operation of a scenario.

    Args:
        bench: where.
        scenario: ``fresh``; ``overwrite`` of a run that is done; ``resume`` of one that was killed.
        fault: as of :class:`Faults`.
        stride: every so many.
        start: from this one on.
    """
    arguments: tuple[str, ...] = bench.train(NEW)
    whole, new, old, begin = bench.names(*arguments), bench.state(), None, ""
    bench.put("")
    if scenario == "overwrite":
        bench.good("old", *bench.train(OLD))
        old, begin = bench.state(), "old"
        shutil.copytree(bench.path, bench.folder / begin)
        arguments = bench.train(NEW, "--overwrite")
        whole = bench.names(*arguments)
    elif scenario == "resume":
        at = 1 + max(i for i, n in enumerate(whole) if n.startswith("os.mkdir checkpoints/.st"))
        bench.run(*arguments, faults=Faults(bench.path, at, "kill"))
        begin = "cut"
        shutil.copytree(bench.path, bench.folder / begin)
        arguments = ("train", "--resume", bench.name)
        whole = bench.names(*arguments)
    for n in range(1 + start, len(whole) + 1, stride):
        bench.put(begin)
        ended = bench.run(*arguments, faults=Faults(bench.path, n, fault))
        where = f"{scenario}, {fault} at {n}: {whole[n - 1]}"
        if fault == "kill" and not ended.killed:
            bench.say(where, f"not killed: {ended.code} {ended.err[-300:]}")
        bench.cases += 1
        after(bench, where, ended, new, old, n)
    bench.put("")
    if begin:
        shutil.rmtree(bench.folder / begin)


@contextlib.contextmanager
def mounted(place: Path, room: str) -> Iterator[Callable[[], None]]:
    """A small disk, and what makes it a large one."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", str(place)], check=True)
    try:
        more = ["mount", "-o", "remount,size=64m,nr_inodes=10k", str(place)]
        yield lambda: subprocess.run(more, check=True) and None
    finally:
        subprocess.run(["umount", str(place)], check=True)


def disk(bench: Bench, sizes: list[int], unit: str) -> None:
    """Train on a disk with room for so many pages (``size``) or files (``nr_inodes``)."""
    bench.names(*bench.train(NEW))
    new = bench.state()
    bench.put("")
    bench.name = "disk/run"
    for size in sizes:
        room = f"size={4 * size}k,nr_inodes=1k" if unit == "size" else f"nr_inodes={size},size=64m"
        with mounted(bench.folder / "disk", room) as make_room:
            where = f"{unit} {size}"
            ended = bench.run(*bench.train(NEW))
            bench.cases += 1
            # Also while there is still no room.
            bench.clear(where, "report", bench.name)
            again = bench.clear(where, "train", "--resume", bench.name)
            if again.code == 1 and "No space left" not in again.err:
                bench.say(where, f"resumed without room: {again.err}")
            make_room()
            after(bench, where, ended, new, None, size)
    bench.name = "run"


def together(bench: Bench, rounds: int) -> None:
    """Two that resume one run, or begin one, at the same moment: one trains, one is told who."""
    bench.names(*bench.train(NEW))
    new = bench.state()
    arguments = bench.train(NEW)
    at = 1 + bench.names(*bench.train(NEW, "--overwrite")).index("os.mkdir .model.new")
    for n in range(rounds):
        bench.put("")
        if n % 2:
            bench.run(*bench.train(NEW), faults=Faults(bench.path, at - 30, "kill"))
            arguments = ("train", "--resume", bench.name)
        gate, opens = os.pipe()
        both = [start(*arguments, cwd=bench.folder, gate=gate) for _ in range(2)]
        os.close(gate)
        for descriptor in (opens,):
            os.write(descriptor, b"12")
            os.close(descriptor)
        ended = [one.wait() for one in both]
        where = f"together, {arguments[1]}"
        bench.cases += 1
        for one in ended:
            if one.problem:
                bench.say(where, one.problem)
        if [e.code for e in sorted(ended, key=lambda e: e.code or 0)] != [0, 2]:
            bench.say(where, f"ended with {[e.code for e in ended]}")
        told = "".join(e.err for e in ended if e.code == 2)
        if "is in use, by process" not in told and "already holds a run" not in told:
            bench.say(where, f"nobody is named: {told}")
        compare(bench, where, bench.state(), new)
        arguments = bench.train(NEW)
    bench.put("")


EVAL = ("eval", "--env", "faults-count-v0", "--policy", "faults-scripted", "--out", "run/r.json")
DISCOVER = (
    *("discover", "--env", "faults-count-v0", "--model", "base", "--method", "sdpo,best_of_k"),
    *("--budget", "4", "--limit", "1", "--set", "trainer.max_completion_length=2"),
    *("--set", "trainer.num_generations=2", "--out", "run/r.json"),
)


def results(bench: Bench, name: str, fault: str | int, stride: int, start: int) -> None:
    """The same of an evaluation's and a discovery's results: what is kept is gone on from."""
    arguments = {"eval": EVAL, "discover": DISCOVER}[name]
    file = bench.path / "r.json"

    def fresh() -> None:
        bench.put("")
        bench.path.mkdir()

    def content() -> Any:
        data = json.loads(file.read_text())
        return {k: v for k, v in data.items() if k not in ("lock", "seconds")}

    fresh()
    whole, new = bench.names(*arguments), content()
    for n in range(1 + start, len(whole) + 1, stride):
        fresh()
        ended = bench.run(*arguments, faults=Faults(bench.path, n, fault))
        where = f"{name}, {fault} at {n}: {whole[n - 1]}"
        bench.cases += 1
        if fault == "kill" and not ended.killed:
            bench.say(where, f"not killed: {ended.code} {ended.err[-300:]}")
        if not ended.killed and ended.problem:
            bench.say(where, ended.problem)
        if not file.exists():
            bench.good(where, *arguments)
        if content() != new:
            bench.say(where, f"the results are {str(content())[:500]}")
        again = bench.clear(where, *arguments)  # done, or its partial file is still there
        if again.code == 2 and "exists; --overwrite" not in again.err:
            bench.say(where, again.err)
        if left := [
            p.name
            for p in bench.path.iterdir()
            if p.name not in ("r.json", ".r.json.tmp", ".r.json.lock")
        ]:
            bench.say(where, f"left behind: {left}")
    bench.put("")


def full(bench: Bench, name: str, sizes: list[int], unit: str) -> None:
    """Results on a disk with little room."""
    arguments = {"eval": EVAL, "discover": DISCOVER}[name]
    file = bench.path / "r.json"
    for size in sizes:
        room = f"size={4 * size}k,nr_inodes=1k" if unit == "size" else f"nr_inodes={size},size=64m"
        with mounted(bench.path, room) as make_room:
            where = f"{name}, {unit} {size}"
            ended = bench.run(*arguments)
            bench.cases += 1
            if ended.problem:
                bench.say(where, ended.problem)
            make_room()
            if not file.exists():
                bench.good(where, *arguments)
            if json.loads(file.read_text())["env"] != "faults-count-v0":
                bench.say(where, "other results")
    bench.put("")


JOBS = {f.__name__: f for f in (sweep, disk, together, results, full)}

if __name__ == "__main__":
    bench = Bench(Path(sys.argv[1]))
    for name, arguments in json.loads(sys.argv[2]):
        JOBS[name](bench, **arguments)
    print(json.dumps({"cases": bench.cases, "problems": bench.problems}))
