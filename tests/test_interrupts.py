"""Ctrl-C, wherever it strikes: "interrupted", what was kept, how to go on, 130; SIGTERM: 143."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlrf import _interrupt
from rlrf.runs import Run

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}

needs_torch = pytest.mark.skipif(
    not pytest.importorskip("importlib.util").find_spec("torch"), reason="needs the extra 'train'"
)
SETTINGS = {
    "max_steps": 3,
    "prompts_per_step": 2,
    "num_generations": 2,
    "max_completion_length": 4,
    "eval_tasks": 2,
    "probe_tasks": 1,
    "save_steps": 1,
}
MODEL_ENV = ("--model", "tiny", "--env", "count-a-v0")
TRAIN = ("train", *MODEL_ENV, *(f"--set=trainer.{k}={v}" for k, v in SETTINGS.items()))
EVAL = ("eval", *MODEL_ENV, "--samples", "3", "--max-tokens", "6", "--max-concurrency", "4")
DISCOVER = ("discover", *MODEL_ENV, "--limit", "2", "--budget", "4")
DISCOVER += tuple(f"--set=trainer.{k}=2" for k in ("num_generations", "max_completion_length"))
COMMANDS = {
    "train": (*TRAIN, "--run-dir", "run{}"),
    "eval": (*EVAL, "--out", "eval{}.json"),
    "discover": (*DISCOVER, "--out", "found{}.json"),
    "check": ("check", "count-a-v0"),
}


def driven(folder: Path, arguments: Sequence[str], shares: list[float], number: int) -> list:
    """What the command says, left alone and interrupted at each of ``shares`` of its way."""
    words = ["tiny", json.dumps(arguments), json.dumps(shares), str(number)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.interrupt_driver", *words],
        cwd=folder,
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def interrupted(folder: Path, arguments: tuple[str, ...], shares: list[float], number: int = 2):
    """What the command says when it is interrupted at each of ``shares`` of its way."""
    from tests.tiny_model import save_tiny

    save_tiny(folder / "tiny")
    whole, *tries = driven(folder, arguments, shares, number)
    assert whole[0] in (0, 1), whole  # a tiny model that solves nothing is no failure of ours
    assert len(tries) == len(shares)
    return tries


def clear_ending(code: int, error: str, share: float, expected: int = 130) -> None:
    if code in (0, 1) and (share > 0.97 or "\nsent\n" not in error):
        return  # the work was done
    assert code == expected, error
    lines = error.splitlines()
    assert lines.count("interrupted") == 1, error
    told = lines[lines.index("interrupted") + 1 :]
    assert not told or told[-1].startswith("to "), error  # the command that goes on is the last
    for bad in ("Traceback", "KeyboardInterrupt", "policy_error", "retrying", "Exception ignored"):
        assert bad not in error


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tries"), [("train", 45), ("eval", 25), ("discover", 20), ("check", 10)]
)
def test_an_interrupt_at_a_hundred_moments(name: str, tries: int, tmp_path: Path) -> None:
    rng = random.Random(name)
    shares = [rng.random() for _ in range(tries)]
    found = interrupted(tmp_path, COMMANDS[name], shares)
    for share, (code, _, error) in zip(shares, found, strict=True):
        clear_ending(code, error, share)
    if name == "check":
        return
    # What was promised holds: the command that was named goes on, to the same end.
    goes_on = {e.rpartition("to go on: ")[2].strip() for _, _, e in found if "to go on: " in e}
    assert goes_on
    for again in rng.sample(sorted(goes_on), min(3, len(goes_on))):
        ((code, _, error),) = driven(tmp_path, shlex.split(again)[1:], [], 2)
        assert code == 0, (again, error)
        if name == "train":
            run = Run.open(tmp_path / again.split()[-1])
            whole = Run.open(tmp_path / "run-1")
            assert _untimed(run) == _untimed(whole)


def _untimed(run: Run) -> list[dict[str, float]]:
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in run.metrics]


@needs_torch
@pytest.mark.slow
def test_sigterm_is_an_interrupt_too(tmp_path: Path) -> None:
    shares = [0.4, 0.8]
    found = interrupted(tmp_path, COMMANDS["train"], shares, signal.SIGTERM)
    for share, (code, _, error) in zip(shares, found, strict=True):
        clear_ending(code, error, share, 143)


@needs_torch
@pytest.mark.slow
def test_every_process_of_a_run_ends(tmp_path: Path) -> None:
    from tests.tiny_model import save_tiny

    save_tiny(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "import signal, sys\nsys.argv[0] = 'rlrf'\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import rlrf\nfrom tests.resume_driver import CountA\n"
        "rlrf.register('count-a-v0', CountA)\n"
        "from rlrf.cli import main\nmain()\n"
    )
    given = [*TRAIN, "--run-dir", "run", "--no-report", "--set", "trainer.max_steps=100000"]
    env = ENV | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *given],
            cwd=tmp_path,
            env=env | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"error{rank}").open("w"),
            text=True,
        )
        for rank in "01"
    ]
    first = processes[0].stdout
    assert first is not None
    while line := first.readline():
        if line.startswith("step 2"):
            break
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        process.communicate(timeout=120)
    assert [p.returncode for p in processes] == [130, 130]
    told = [(tmp_path / f"error{rank}").read_text() for rank in "01"]
    assert told[0].endswith("to go on: rlrf train --resume run\n")
    assert "interrupted" not in told[1]  # the first one talks
    assert all("Traceback" not in text for text in told)


STUCK = """
import ctypes, signal, sys, threading
sys.argv = ["rlrf", "eval", "--env", "stuck-v0", "--policy", "stuck", "--out", "r.json"]
signal.signal(signal.SIGINT, signal.default_int_handler)
import rlrf
from rlrf import _interrupt, cli

_interrupt.GRACE_S = 0.05

class Stuck(rlrf.SingleTurnEnv):
    def load_tasks(self, split):
        return [rlrf.Task(f"{split}-{i}", "Say.") for i in range(3)]
    def grade(self, task, completion):
        return rlrf.Outcome(1.0)

calls = 0
def reply(messages):
    global calls
    calls += 1
    if calls == 3:
        libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        libc.pthread_mutex_lock(lock)
        print("sampling", flush=True)
        libc.pthread_mutex_lock(lock)  # no signal gets anyone out of here
    return "x"

rlrf.register("stuck-v0", Stuck)
rlrf.policies.register("stuck", lambda: rlrf.ScriptedPolicy(reply, max_batch_size=1))
cli.main()
"""


def _started(code: str, folder: Path, until: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith(until):
        assert process.poll() is None, process.communicate()[1]
    return process


def test_an_interrupt_inside_c_code_that_hears_no_signal(tmp_path: Path) -> None:
    assert _interrupt.GRACE_S + 0.3 < 2  # and 0.3 s for the words
    process = _started(STUCK, tmp_path, "sampling")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    told = re.search(
        "^interrupted\n"  # the first two may be on their way
        r"kept: (?:none of 3 rollouts, as none had ended\nto begin again:"
        r"|([12]) of 3 rollouts, in r\.json\.partial\nto go on:)"
        r" rlrf eval --env stuck-v0 --policy stuck --out r\.json$",
        error,
        re.M,
    )
    assert told, error
    count = int(told[1] or 0)
    assert not count or (tmp_path / "r.json.partial").exists()
    again = STUCK.replace("calls == 3", "False").replace("cli.main()", "print('go'); cli.main()")
    process = _started(again, tmp_path, "go")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    there = re.search(r"continuing r\.json\.partial: (\d) done", error)
    # What is told was kept; one more may have been written while it was told.
    assert count <= (int(there[1]) if there else 0) <= 2


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    process = _started(STUCK.replace("GRACE_S = 0.05", "GRACE_S = 1000"), tmp_path, "sampling")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # two of one kind could become one
    _, error = process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert error.endswith("interrupted\n")
    assert "kept" not in error


@pytest.mark.parametrize("slow", [False, True])  # whether the main thread is long in telling of it
def test_an_interrupt_that_is_raised_where_it_goes_nowhere_is_raised_again(
    tmp_path: Path, slow: bool
) -> None:
    lost = """print("sampling", flush=True)
        import os, time
        write = os.write
        def slow_write(*args):
            write(*args)
            for _ in range(100): time.sleep(0.001)
        if SLOW: os.write = slow_write
        class Lost:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(10): pass  # here it is raised, and ignored
        Lost()
        while True: time.sleep(0.001)
""".replace("SLOW", str(slow))
    start, _, end = STUCK.partition("libc, lock = ")
    code = start + lost + "    return" + end.partition("    return")[2]
    process = _started(code.replace("GRACE_S = 0.05", "GRACE_S = 1000"), tmp_path, "sampling")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.endswith(": rlrf eval --env stuck-v0 --policy stuck --out r.json\n")
    assert "Exception ignored" not in error


def test_an_interrupt_while_rlrf_is_imported(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['rlrf', 'list']\n"
        "print('go', flush=True)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'gymnasium':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from rlrf.cli import main\n"
        "main()\n"
    )
    process = _started(code, tmp_path, "go")
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.argv = ['rlrf', 'list']\n"
        "from rlrf import cli\n"
        "print('go', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main()\n"
    )
    process = _started(code, tmp_path, "go")
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_what_is_secret_is_not_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["rlrf", "eval", "--overwrite", "--policy-option", "api_key=sk-1", "--out", "a b"]
    monkeypatch.setattr(sys, "argv", given)
    assert _interrupt.same_command("--overwrite").endswith(
        "--overwrite  # with your secrets put back"
    )
    assert _interrupt.same_command() == (
        "rlrf eval --policy-option 'api_key=***' --out 'a b'  # with your secrets put back"
    )
