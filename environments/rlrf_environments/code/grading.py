"""From a completion to a reward and the reasons: extract, run, explain.

Shared by the code environments. Nothing hardware-dependent gets into a feedback (no timings, no
addresses), so the same attempt always gets the same words. The faulty line is located and blamed
by its characters, but not quoted: a teacher that reads a wrong line again finds it likelier.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from rlrf import Feedback, Outcome, Segment
from rlrf.feedback import Kind, shorten
from rlrf.sandbox import (
    MISSING,
    CallCase,
    CaseResult,
    Checker,
    Limits,
    Program,
    ProgramError,
    RawRun,
    SandboxPool,
    StdinCase,
    Verdict,
)

SHOWN_CHARS = 400
"""A test's input, output or expected value is shown up to this many characters."""

_FENCE_LINE = re.compile(r"[ \t]*(`{3,}|~{3,})([^\n]*)\n?")


@dataclass(frozen=True)
class Test:
    """One test of a task; a public one may be shown, a hidden one only as the level allows."""

    case: StdinCase | CallCase
    public: bool


@dataclass(frozen=True)
class Attempt:
    """The program in a completion.

    Attributes:
        code: the source.
        start: where it begins in the completion, in characters.
    """

    code: str
    start: int

    def line_span(self, line: int | None) -> tuple[int, int] | None:
        """The characters of the completion that are line ``line`` (from 1), indentation apart."""
        lines = self.code.splitlines(keepends=True)
        if line is None or not 1 <= line <= len(lines):
            return None
        before = sum(map(len, lines[: line - 1]))
        text = lines[line - 1].rstrip()
        indent = len(text) - len(text.lstrip())
        return self.start + before + indent, self.start + before + len(text)


def extract(completion: str) -> Attempt | Segment:
    """The longest fenced code block of a completion, as the official SDPO grader takes it.

    Returns:
        The program, or the segment that says why there is none.
    """
    blocks: list[Attempt] = []
    fence, opened, start, position = "", 0, 0, 0
    for line in completion.splitlines(keepends=True):  # one pass: an attempt may be huge
        found = _FENCE_LINE.fullmatch(line)
        if found and not fence and not (found[1][0] == "`" and "`" in found[2]):
            fence, opened, start = found[1], position, position + len(line)
        elif found and fence and found[1].startswith(fence) and not found[2].strip():
            blocks.append(Attempt(completion[start:position], start))
            fence = ""
        position += len(line)
    if blocks:
        return max(blocks, key=lambda block: len(block.code))
    if fence:
        return Segment(
            "truncated_attempt",
            "The code block is never closed: the reply was cut off, or the closing ``` is "
            "missing. Reply with one complete code block.",
            source="extractor",
            span=(opened, len(completion)),
            priority=3,
        )
    return Segment(
        "format_error",
        "There is no code block in the reply. Put the whole program into one block fenced by "
        "```python and ```.",
        source="extractor",
        span=(0, len(completion)),
        priority=3,
    )


def grade_program(
    completion: str,
    tests: Sequence[Test],
    pool: SandboxPool,
    *,
    entry: str | None,
    limits: Limits,
    solution: str,
    checker: Checker | None = None,
    group: Hashable = None,
) -> Outcome:
    """Grade a completion on all tests: reward 1 if every test passes, else 0.

    Args:
        completion: the policy's reply.
        tests: public ones first are run first.
        pool: where to run.
        entry: the function to call, or None for standard input and output.
        limits: per test.
        solution: the reference, for feedback at level ``reference``.
        checker: None for the default of the kind of test.
        group: of this attempt; attempts of different groups take turns in the pool.

    Returns:
        The outcome, with metrics ``tests_passed`` (a share) and ``compiles``.

    Raises:
        InfraError: the sandbox failed; there is no grade.
    """
    reference = Segment(
        "reference",
        f"A correct program:\n{solution.rstrip()}",
        severity="info",
        source="author",
        reveals="reference",
    )
    attempt = extract(completion)
    if isinstance(attempt, Segment):
        metrics = {"tests_passed": 0.0, "compiles": 0.0}
        return Outcome(0.0, Feedback((attempt, reference)), metrics)
    unnamed = _missing_entry(attempt, entry)
    if unnamed is not None:
        metrics = {"tests_passed": 0.0, "compiles": 1.0}
        return Outcome(0.0, Feedback((unnamed, reference)), metrics)
    order = sorted(tests, key=lambda t: not t.public)
    report = pool.run_sync(
        Program(attempt.code, entry=entry),
        [t.case for t in order],
        limits=limits,
        checker=checker,
        stop="never",
        group=group,
    )
    metrics = {
        "tests_passed": report.passed / len(order),
        "compiles": float(report.verdict is not Verdict.COMPILE_ERROR),
    }
    if report.verdict is Verdict.ACCEPTED:
        return Outcome(1.0, metrics=metrics)
    first = report.failed[0]  # public tests ran first, so a failing one is shown if there is one
    why = _explain(attempt, first, order[first.index], limits)
    return Outcome(0.0, Feedback((*why, reference)), metrics)


def _missing_entry(attempt: Attempt, entry: str | None) -> Segment | None:
    """The fault of a program that does not define the function it was asked for."""
    if entry is None:
        return None
    try:
        tree = ast.parse(attempt.code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the compiler will say it better
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    functions = {n.name: n.lineno for n in ast.walk(tree) if isinstance(n, kinds)}
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    names |= {
        a.asname or a.name
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    if entry in functions or entry in names or "*" in names:
        return None
    nearest = difflib.get_close_matches(entry, functions, n=1, cutoff=0.0)
    there = f" There is a function {nearest[0]!r}; rename it." if nearest else ""
    return Segment(
        "format_error",
        f"The program does not define the function {entry!r}.{there}",
        source="extractor",
        span=attempt.line_span(functions[nearest[0]]) if nearest else None,
        priority=3,
    )


def _explain(attempt: Attempt, result: CaseResult, test: Test, limits: Limits) -> list[Segment]:
    """The segments for one failing test."""
    raw = result.raw
    assert raw is not None
    error = raw.error
    line = error.line if error is not None else None
    span = attempt.line_span(line)
    which = "a public test" if test.public else "a hidden test"
    kind, text, untrusted = _what_happened(result.verdict, raw, which, limits)
    # A program that does not compile fails without any test.
    tested = result.verdict is not Verdict.COMPILE_ERROR
    if tested and test.public:
        text += f"\nInput:\n{_input(test.case)}"
        if result.verdict is Verdict.WRONG_ANSWER:
            text, untrusted = f"{text}\n{_compared(test.case, raw)}", True
    segments = [Segment(kind, text, source="tests", span=span, priority=3, untrusted=untrusted)]
    if error is not None and line is not None:
        segments.append(
            Segment(
                kind, _location(error), source="tests", reveals="location", span=span, priority=2
            )
        )
    if tested and not test.public:
        segments.append(
            Segment(
                kind,
                f"The hidden test:\nInput:\n{_input(test.case)}\n{_compared(test.case, raw)}",
                source="tests",
                reveals="expected",
                priority=1,
                untrusted=True,
            )
        )
    return segments


def _what_happened(
    verdict: Verdict, raw: RawRun, which: str, limits: Limits
) -> tuple[Kind, str, bool]:
    """Kind, words, and whether the words quote the program."""
    error = raw.error
    if verdict is Verdict.COMPILE_ERROR:
        assert error is not None
        return "compile_error", f"The program does not compile: {_named(error)}.", True
    if verdict is Verdict.TIME_LIMIT:
        text = f"The time limit of {limits.cpu_s:g} s of CPU time was exceeded on {which}."
        return "time_limit", text, False
    if verdict is Verdict.MEMORY_LIMIT:
        text = f"The memory limit of {limits.memory_mb} MB was exceeded on {which}."
        return "memory_limit", text, False
    if verdict is Verdict.OUTPUT_LIMIT:
        text = f"The program printed more than {limits.output_kb} kB on {which}."
        return "output_limit", text, False
    if verdict is Verdict.RUNTIME_ERROR:
        if error is not None:
            return (
                "runtime_error",
                f"The program raised an error on {which}: {_named(error)}.",
                True,
            )
        how = f"was ended by signal {raw.signal}" if raw.signal else f"exited with {raw.exit_code}"
        return "runtime_error", f"The program {how} on {which}.", False
    if raw.result is MISSING and raw.exit_code == 0 and not raw.stdout:
        return "wrong_answer", f"The program ended without an answer on {which}.", False
    return "wrong_answer", f"The answer is wrong on {which}.", False


def _named(error: ProgramError) -> str:
    message = shorten(error.message, SHOWN_CHARS).rstrip(".")
    return f"{error.type}: {message}" if message else error.type


def _location(error: ProgramError) -> str:
    """Where, in the program's own lines, innermost first."""
    if not error.frames:
        column = f", column {error.column}" if error.column else ""
        return f"Line {error.line} of the program{column}."
    places = [
        f"line {line}" + ("" if name == "<module>" else f" in {name}")
        for line, name in reversed(error.frames)
    ]
    first, *callers = places[:4]
    called = f", called from {', '.join(callers)}" if callers else ""
    return f"{first[0].upper()}{first[1:]} of the program{called}."


def _input(case: StdinCase | CallCase) -> str:
    if isinstance(case, StdinCase):
        return shorten(case.stdin.rstrip("\n"), SHOWN_CHARS)
    return shorten("\n".join(_value(a) for a in case.args), SHOWN_CHARS)


def _compared(case: StdinCase | CallCase, raw: RawRun) -> str:
    """What came out, what should have, and the first line where they part."""
    if isinstance(case, CallCase):
        got = "(nothing: the program ended early)" if raw.result is MISSING else _value(raw.result)
        wanted = _value(case.expected)
        return f"Returned:\n{_cut(got)}\nExpected:\n{_cut(wanted)}"
    got, wanted = raw.text.rstrip("\n"), case.expected.rstrip("\n")
    lines = zip(got.split("\n"), wanted.split("\n"), strict=False)
    part = next((i for i, (a, b) in enumerate(lines, 1) if a.rstrip() != b.rstrip()), None)
    several = "\n" in wanted and part is not None
    difference = f"\nThe first difference is in line {part} of the output." if several else ""
    return f"Output:\n{_cut(got) or '(nothing)'}\nExpected:\n{_cut(wanted)}{difference}"


def _cut(text: str) -> str:
    return shorten(text, SHOWN_CHARS)


def _value(value: Any) -> str:
    """A value as Python writes it, sets in a fixed order."""
    if isinstance(value, set):
        return "{" + ", ".join(sorted(map(repr, value))) + "}" if value else "set()"
    return repr(value)


def parse_tests(rows: Sequence[dict[str, Any]], entry: str | None) -> tuple[Test, ...]:
    """Tests from their JSON form: ``{stdin, expected, public}`` or ``{args, expected, public}``."""
    tests = []
    for row in rows:
        case: StdinCase | CallCase
        if entry is None:
            case = StdinCase(row["stdin"], row["expected"])
        else:
            case = CallCase(tuple(row["args"]), row["expected"])
        tests.append(Test(case, bool(row.get("public"))))
    return tuple(tests)


def read_jsonl(text: str) -> list[dict[str, Any]]:
    """The objects of a JSONL text, blank lines apart."""
    return [json.loads(line) for line in text.splitlines() if line.strip()]
