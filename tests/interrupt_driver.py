"""Interrupts ``rlrf`` at chosen moments: one fork of this process for each.

A moment is a number of calls that Python has made, in any thread: no clock is asked. It is given
as a share of those that the whole command makes. Run with a JSON list of arguments ("{}" in them is
the number of the try), one of shares, and the signal; prints a JSON line for the whole command and
one for each moment: exit status, and what was written to standard output and error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from typing import Any


def calls_until(count: int, then: Any) -> None:
    """Call ``then`` once Python has made so many calls."""
    made = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        if event != "call":
            return
        made += 1
        if made == count:
            sys.setprofile(None)
            then()

    threading.setprofile(profile)
    sys.setprofile(profile)


def run(arguments: list[str], count: int, number: int) -> None:
    """In a fork: the command, interrupted after ``count`` calls; never returns."""
    import torch

    torch.set_num_threads(1)
    from rlrf.cli import main

    sys.argv = ["rlrf", *arguments]
    if count:
        calls_until(count, lambda: os.kill(os.getpid(), number))
    main()


def measure(arguments: list[str]) -> None:
    """In a fork: the command, and how many calls it takes, on standard error."""
    made = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event == "call"

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        run(arguments, 0, 0)
    finally:
        sys.setprofile(None)
        os.write(2, f"\ncalls {made}\n".encode())


def fork(function: Any, *arguments: Any) -> tuple[int, str, str]:
    """Exit status (negative for a signal), standard output and error of a fork."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = 99
            try:
                function(*arguments)
            except SystemExit as end:
                code = end.code
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return status, texts[0], texts[1]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given, moments, sent = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    sys.argv = ["rlrf"]
    import rlrf.testing  # noqa: F401  # all that a command imports, but nothing is computed yet
    import rlrf_trainers.sdpo  # noqa: F401

    def arguments_of(index: int) -> list[str]:
        return [text.replace("{}", str(index)) for text in given]

    whole = fork(measure, arguments_of(-1))
    print(json.dumps(whole), flush=True)
    total = int(whole[2].rpartition("\ncalls ")[2])
    for index, share in enumerate(moments):
        moment = 1 + int(share * total)
        print(json.dumps(fork(run, arguments_of(index), moment, sent)), flush=True)
