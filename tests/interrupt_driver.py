"""Interrupts the command ``rlrf`` at chosen moments; started by test_interrupts.py.

    python -m tests.interrupt_driver MODEL ARGUMENTS_JSON SHARES_JSON SIGNAL

A moment is a number of functions that the interpreter has called, in any thread, as a share of
those that the whole command calls: no clock is asked. "{}" in an argument is the number of the
try. Prints a JSON line for the whole command, and one for each try: exit status, standard output,
standard error. Forked children save importing torch each time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

sys.argv[0] = "rlrf"  # we are the command

import torch  # noqa: E402

import rlrf  # noqa: E402
import rlrf.cli  # noqa: E402
import rlrf.report  # noqa: E402
import rlrf.testing  # noqa: E402
import rlrf_trainers.commands.discover  # noqa: E402, F401
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from tests.resume_driver import CountA  # noqa: E402


class Calls:
    """Counts the functions that are called, and sends a signal at one of them."""

    def __init__(self, at: int, number: int) -> None:
        self.count, self.at, self.number = 0, at, number

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            self.count += 1
            if self.count == self.at:
                os.write(2, b"\nsent\n")
                os.kill(os.getpid(), self.number)


def run(arguments: list[str], calls: Calls) -> None:
    """The command, in a fork; never returns."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.argv = ["rlrf", *arguments]
    threading.setprofile(calls)
    sys.setprofile(calls)
    code: Any = 99
    try:
        rlrf.cli.main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        if not calls.at:
            os.write(2, f"\ncalls {calls.count}\n".encode())
        sys.stdout.flush()
        os._exit(code)


def fork(arguments: list[str], at: int = 0, number: int = 0) -> tuple[int, str, str]:
    """Exit status (negative for a signal), standard output and error of the command."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            run(arguments, Calls(at, number))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return status, texts[0], texts[1]


def main() -> None:
    folder, given, shares, number = sys.argv[1:]
    rlrf.register("count-a-v0", CountA)
    torch.set_num_threads(1)  # others do not survive a fork
    HFPolicy(Path(folder))  # what is imported late, and compiled once

    def arguments(attempt: int) -> list[str]:
        return [text.replace("{}", str(attempt)) for text in json.loads(given)]

    whole = fork(arguments(-1))
    print(json.dumps(whole), flush=True)
    total = int(whole[2].rpartition("\ncalls ")[2])
    for attempt, share in enumerate(json.loads(shares)):
        print(json.dumps(fork(arguments(attempt), 1 + int(share * total), int(number))), flush=True)


if __name__ == "__main__":
    main()
