"""Feedback as SDPO's official code environment words it, for comparisons with published runs.

The format is described in the SDPO paper (arXiv 2601.20802, appendix) and its code release: one
text in the manner of LeetCode, about the failing tests only, at most :data:`MAX_CHARS` characters.
A runtime error goes before a time-out, both before wrong answers, of which the two shortest are
shown. It always shows expected outputs, and quotes the faulty line.

It does not reproduce the official verdicts, only the words: programs are run and judged as in every
code environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlrf import Segment
from rlrf.feedback import Kind
from rlrf.sandbox import MISSING, AssertCase, CallCase, Case, ProgramError, StdinCase, Verdict
from rlrf_environments.code.explain import Failure, value_text, visible
from rlrf_environments.code.extract import Attempt

MAX_CHARS = 2000
_INPUT_LINES, _FIELD_CHARS, _FRAMES, _WRONG_ANSWERS = 8, 250, 3, 2

_CRASHED = (Verdict.RUNTIME_ERROR, Verdict.COMPILE_ERROR, Verdict.MEMORY_LIMIT)
_SLOW = (Verdict.TIME_LIMIT, Verdict.OUTPUT_LIMIT)


def render(attempt: Attempt, failures: Sequence[Failure]) -> Segment:
    """The one segment that tells of all failures.

    Args:
        attempt: the program.
        failures: every test it failed, at least one.
    """
    crashed = [f for f in failures if f.verdict in _CRASHED]
    slow = [f for f in failures if f.verdict in _SLOW]
    span = None
    if crashed:
        first = crashed[0]
        error = first.raw.error
        span = attempt.line_span(error.line if error else None)
        text = _crash(attempt, first)
    elif slow:
        first = slow[0]
        text = f"Time Limit Exceeded\nLast Executed Input\n{_input(first.test.case)}"
    else:
        first = failures[0]
        shortest = sorted(failures, key=_length)[:_WRONG_ANSWERS]
        text = "\n\n".join(map(_wrong, sorted(shortest, key=lambda f: f.number)))
    return Segment(
        _KINDS[first.verdict],
        text[:MAX_CHARS],
        source="tests",
        reveals="expected",
        span=span,
        priority=3,
        untrusted=True,
    )


def unreadable(segment: Segment) -> Segment:
    """What is said of a reply without a program."""
    title = "Truncated Attempt" if segment.kind == "truncated_attempt" else "Incorrect Format"
    return replace(segment, text=f"{title}: {segment.text}"[:MAX_CHARS])


_KINDS: dict[Verdict, Kind] = {
    Verdict.RUNTIME_ERROR: "runtime_error",
    Verdict.COMPILE_ERROR: "compile_error",
    Verdict.MEMORY_LIMIT: "memory_limit",
    Verdict.TIME_LIMIT: "time_limit",
    Verdict.OUTPUT_LIMIT: "output_limit",
    Verdict.WRONG_ANSWER: "wrong_answer",
}


def _crash(attempt: Attempt, failure: Failure) -> str:
    error = failure.raw.error or ProgramError(
        "MemoryError" if failure.verdict is Verdict.MEMORY_LIMIT else "SystemExit",
        "" if failure.raw.exit_code is None else str(failure.raw.exit_code),
    )
    lines = ["Runtime Error", f"{error.type}: {error.message}".removesuffix(": ")]
    quoted = attempt.line(error.line)
    if quoted is not None:
        lines.append(quoted.strip()[:_FIELD_CHARS])
    places = error.frames[-_FRAMES:] or (((error.line, "<module>"),) if error.line else ())
    lines += [f"Line {line} in {name} (Solution.py)" for line, name in places]
    if failure.verdict is not Verdict.COMPILE_ERROR:
        lines += ["", "Last Executed Input", _input(failure.test.case)]
    return "\n".join(lines)


def _wrong(failure: Failure) -> str:
    case, raw = failure.test.case, failure.raw
    if isinstance(case, CallCase):
        got = "" if raw.result is MISSING else value_text(raw.result)
    else:
        got = visible(raw.text.rstrip("\n"))
    return (
        f"Test Case {failure.number}: Wrong Answer\nInput\n{_input(case)}\n"
        f"Output\n{_field(got)}\nExpected\n{_field(_expected(case))}"
    )


def _input(case: Case) -> str:
    if isinstance(case, StdinCase):
        text = case.stdin.rstrip("\n")
    elif isinstance(case, CallCase):
        text = "\n".join(map(value_text, case.args))
    else:
        text = case.code.strip()
    lines = text.split("\n")
    shown = [_field(line) for line in lines[:_INPUT_LINES]]
    if len(lines) > _INPUT_LINES:
        shown.append(f"... ({len(lines) - _INPUT_LINES} more lines)")
    return "\n".join(shown)


def _expected(case: Case) -> str:
    if isinstance(case, StdinCase):
        return case.expected.rstrip("\n")
    return "" if isinstance(case, AssertCase) else value_text(case.expected)


def _field(text: str) -> str:
    return text if len(text) <= _FIELD_CHARS else text[:_FIELD_CHARS] + "..."


def _length(failure: Failure) -> int:
    return len(_input(failure.test.case)) + len(_expected(failure.test.case))
