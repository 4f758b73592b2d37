"""Runs one program on one input, inside a sandbox. Standard library only, Python 3.8+.

    python runner.py REQUEST_FILE RESULT_FD

The request is JSON: ``code``, ``entry``, ``args``, ``limits``. Standard input, output and error are
the program's own. What the host needs besides goes to RESULT_FD, one JSON object a line: first
``{"hello": ...}``, before any line of the program runs, then at most one ``error`` or ``result``,
and the CPU seconds it used.

Nothing here is a secret or a judge: the program shares this process and may forge what is written.
All it can forge is its own result; what would be right is not in the sandbox.
"""

from __future__ import annotations

import builtins
import json
import os
import re
import resource
import sys
from typing import Any

FILENAME = "solution.py"


def main() -> None:
    """Read the request, limit this process, run the program."""
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    channel = int(sys.argv[2])
    os.set_inheritable(channel, False)
    set_limits(request["limits"])
    # The folder of this file must not be importable by the program.
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    sys.argv[:] = [FILENAME]
    for name in ("exit", "quit"):  # what `site`, left out for speed, would add
        setattr(builtins, name, sys.exit)
    sys.setrecursionlimit(20_000)
    send(channel, {"hello": sys.version_info[:2]})
    try:
        code = compile(request["code"], FILENAME, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        send(channel, {"compile": True, "error": describe(error)})
        leave(channel, 1)
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    entry = request["entry"]
    try:
        exec(code, scope)
        if entry is not None:
            send(channel, {"result": encode(find(scope, entry)(*request["args"]))})
    except SystemExit as stop:
        leave(channel, stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except BaseException as error:
        send(channel, {"error": describe(error)})
        leave(channel, 1)
    leave(channel, 0)


def set_limits(limits: dict[str, int]) -> None:
    """Limit CPU, memory, files, processes of this process and its children."""
    mb = 1024 * 1024
    cpu = limits["cpu"]
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),  # SIGXCPU, and SIGKILL for who ignores it
        (resource.RLIMIT_AS, limits["memory_mb"] * mb, limits["memory_mb"] * mb),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * mb, limits["file_mb"] * mb),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        ceiling = resource.getrlimit(what)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(what, (soft, hard))


def find(scope: dict[str, Any], entry: str) -> Any:
    """The function ``f``, or the method of a fresh instance for ``Solution.f``."""
    holder, _, name = entry.rpartition(".")
    if holder:
        return getattr(scope[holder](), name)
    if entry not in scope:
        raise NameError(f"name {entry!r} is not defined")
    return scope[entry]


def encode(value: Any, depth: int = 0) -> Any:
    """A value as JSON that keeps the exact builtin types; anything else is refused."""
    kind = type(value)
    if depth > 100:
        raise TypeError("the returned value is nested too deeply")
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"float": repr(value)}
    if kind in (list, tuple, set, frozenset):
        items = [encode(v, depth + 1) for v in value]
        if kind in (set, frozenset):
            items.sort(key=lambda v: json.dumps(v, sort_keys=True))
        return {kind.__name__: items}
    if kind is dict:
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    raise TypeError(f"the returned value has the type {kind.__name__}, which cannot be compared")


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as data: type, message, the program's own frames, addresses removed."""
    frames: list[Any] = []
    trace = error.__traceback__
    while trace is not None and len(frames) < 1000:
        code = trace.tb_frame.f_code
        if code.co_filename == FILENAME:
            frames.append([trace.tb_lineno, code.co_name])
        trace = trace.tb_next
    if len(frames) > 10:  # a deep recursion: where it began, and where it ended
        frames = frames[:5] + frames[-5:]
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except BaseException:
        message = "(its message cannot be read)"
    message = re.sub(r"0x[0-9a-fA-F]{4,}", "0x...", str(message))[:2000]
    about: dict[str, Any] = {"type": type(error).__name__, "message": message, "frames": frames}
    if isinstance(error, SyntaxError) and error.filename == FILENAME:
        about["line"], about["column"] = error.lineno, error.offset
    return about


def send(channel: int, message: dict[str, Any]) -> None:
    """Write one message to the host; a program that closed the channel gets none through."""
    data = (json.dumps(message) + "\n").encode("utf-8", "backslashreplace")
    try:
        while data:
            data = data[os.write(channel, data) :]
    except OSError:
        pass


def leave(channel: int, code: int) -> None:
    """Flush what the program printed and end, without its atexit handlers and threads."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            code = code or 1
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    send(channel, {"cpu": sum(u.ru_utime + u.ru_stime for u in used)})
    os._exit(code & 0xFF)


if __name__ == "__main__":
    main()
