"""Why a program failed a test, in words.

Nothing hardware-dependent gets into a feedback (no timings, no addresses), so the same attempt
always gets the same words. The faulty line is located and blamed by its characters, but not
quoted unless asked: a teacher that reads a wrong line again finds it likelier.

It does not judge: the verdict is the checker's. Nor does it run anything, or look further for the
cause than the failed tests and the source tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlrf import Segment
from rlrf.feedback import Kind, shorten
from rlrf.sandbox import (
    MISSING,
    AssertCase,
    CallCase,
    Case,
    Checker,
    Limits,
    Lines,
    ProgramError,
    RawRun,
    Returns,
    StdinCase,
    Verdict,
    accepted,
)
from rlrf_environments.code.extract import Attempt

SHOWN_CHARS = 400
"""A test's input, output or expected value is shown up to this many characters."""

_LINE_CHARS = 120
_COMPARED_CHARS = 200_000  # beyond, finding what two outputs have in common costs too much


@dataclass(frozen=True)
class Test:
    """One test of a task; a public one may be shown, a hidden one only as the level allows."""

    __test__: ClassVar[bool] = False  # not pytest's
    case: Case
    public: bool


@dataclass(frozen=True)
class Failure:
    """A test that a program did not pass.

    Attributes:
        number: of the test in the order they ran, from 1.
        test: the test.
        verdict: what became of the program.
        raw: what it did.
    """

    number: int
    test: Test
    verdict: Verdict
    raw: RawRun


def explain(
    attempt: Attempt,
    failure: Failure,
    limits: Limits,
    checker: Checker | None = None,
    *,
    quote: bool = False,
) -> list[Segment]:
    """The segments for one failing test.

    Args:
        attempt: the program; spans count in the completion it stands in.
        failure: the test it failed.
        limits: what it was given.
        checker: who judged; None for the default of the kind of test.
        quote: whether to quote the faulty lines of the attempt.

    Returns:
        What is wrong (``reveals="nothing"``), where, if that is known (``"location"``), and for a
        hidden test its input and expected answer (``"expected"``).
    """
    raw, test, verdict = failure.raw, failure.test, failure.verdict
    where = _Where.of(attempt, raw.error, compiled=verdict is not Verdict.COMPILE_ERROR)
    span = attempt.line_span(where.lines[0][0]) if where.lines else None
    kind, text, untrusted = _what_happened(failure, limits)
    # A program that does not compile fails without any test.
    tested = verdict is not Verdict.COMPILE_ERROR
    if verdict is Verdict.WRONG_ANSWER:
        by_rule = checker is None or getattr(checker, "partwise", False)
        hint = _hint(test.case, raw) if by_rule else _missing_return(test.case, raw)
        text += f" {hint}" if hint else ""
    if tested and test.public:
        text += f"\n{_input(test.case)}"
        if verdict is Verdict.WRONG_ANSWER:
            compared = _compared(test.case, raw, checker)
            text, untrusted = f"{text}\n{compared}".rstrip("\n"), True
    segments = [Segment(kind, text, source="tests", span=span, priority=3, untrusted=untrusted)]
    if where.lines:
        segments.append(
            Segment(
                kind,
                where.quoted(attempt) if quote else where.text,
                source="tests",
                reveals="location",
                span=span,
                priority=2,
                untrusted=quote or any(name for _, name in where.lines),
            )
        )
    if tested and not test.public:
        shown = f"The hidden test:\n{_input(test.case)}\n{_compared(test.case, raw, checker)}"
        if raw.assertion is not None and raw.assertion.type != "AssertionError":
            shown = f"{shown.rstrip()}\nIts own code raised {_named(raw.assertion)}."
        segments.append(
            Segment(
                kind,
                shown,
                source="tests",
                reveals="expected",
                priority=1,
                untrusted=True,
            )
        )
    return segments


def warnings(attempt: Attempt) -> list[Segment]:
    """Words of warning: which of the reply's code blocks was graded."""
    told: list[tuple[Kind, str]] = []
    if attempt.cut:
        text = "The last code block of the reply is never closed; one before it was graded."
        told.append(("truncated_attempt", text))
    if attempt.blocks > 1:
        text = f"The reply has {attempt.blocks} code blocks; {attempt.chosen} was graded."
        told.append(("format_error", f"{text} Put the whole program into a single block."))
    return [
        Segment(kind, text, severity="warning", source="extractor", priority=0)
        for kind, text in told
    ]


def reference(solution: str) -> Segment:
    """The segment of the reference solution."""
    return Segment(
        "reference",
        f"A correct program:\n{solution.rstrip()}",
        severity="info",
        source="author",
        reveals="reference",
    )


# --- what happened ----------------------------------------------------------------------------


def _what_happened(failure: Failure, limits: Limits) -> tuple[Kind, str, bool]:
    """Kind, words, and whether the words quote the program."""
    raw, verdict, error = failure.raw, failure.verdict, failure.raw.error
    which = "a public test" if failure.test.public else "a hidden test"
    if verdict is Verdict.COMPILE_ERROR:
        assert error is not None
        return "compile_error", f"The program does not compile: {_named(error)}.", True
    if verdict is Verdict.TIME_LIMIT:
        text = f"The time limit of {limits.cpu_s:g} s of CPU time was exceeded on {which}."
        if raw.cpu_s < 0.8 * limits.cpu_s:  # the wall clock ended it
            text = (
                f"The program did not end within {limits.wall_s:g} s on {which}, though it used "
                f"less than its {limits.cpu_s:g} s of CPU time: it waits for something."
            )
        return "time_limit", text + _size(failure.test.case), False
    if verdict is Verdict.MEMORY_LIMIT:
        text = f"The memory limit of {limits.memory_mb} MB was exceeded on {which}."
        return "memory_limit", text + _size(failure.test.case), False
    if verdict is Verdict.OUTPUT_LIMIT:
        text = f"The program printed more than {limits.output_kb} kB on {which}."
        head = visible(raw.text[:_LINE_CHARS]).strip()
        text += f" The output begins:\n{head}" if head else ""
        return "output_limit", text, bool(head)
    if verdict is Verdict.RUNTIME_ERROR:
        if error is not None and not error.frames and "cannot be compared" in error.message:
            message = shorten(error.message, SHOWN_CHARS).rstrip(".")
            text = f"The result on {which} is of no use: {message}. Return "
            text += "plain numbers, strings, lists, tuples, dicts or sets."
            return "runtime_error", text, True
        if error is not None and not error.frames:
            text = f"The program could not be called on {which}: {_named(error)}."
            return "runtime_error", text, True
        if error is not None:
            text = f"The program raised an error on {which}: {_named(error)}."
            return "runtime_error", text, True
        how = f"was ended by signal {raw.signal}" if raw.signal else f"exited with {raw.exit_code}"
        text = f"The program {how} on {which}."
        words = visible(raw.stderr.decode("utf-8", errors="replace")).strip()[-_LINE_CHARS:]
        text += f" It wrote to standard error:\n{words}" if words else ""
        return "runtime_error", text, True  # the number, too, is the program's own
    if not isinstance(failure.test.case, AssertCase) and _nothing(raw):
        return "wrong_answer", f"The program ended without an answer on {which}.", False
    raised = raw.assertion
    if raised is not None and raised.type != "AssertionError":
        # The message of a hidden test's exception may say what it expects.
        said = _named(raised) if failure.test.public else shorten(raised.type, _LINE_CHARS)
        text = f"The answer is wrong on {which}: the test's own code raised {said}."
        return "wrong_answer", text, True
    return "wrong_answer", f"The answer is wrong on {which}.", False


def _nothing(raw: RawRun) -> bool:
    return raw.result is MISSING and raw.exit_code == 0 and not raw.stdout


def _named(error: ProgramError) -> str:
    message = shorten(error.message, SHOWN_CHARS).rstrip(".")
    return f"{error.type}: {message}" if message else error.type


def _size(case: Case) -> str:
    """How large an input is: what a program that is too slow or too big should know."""
    if isinstance(case, StdinCase):
        lines, chars = case.stdin.rstrip("\n").count("\n") + 1, len(case.stdin)
    elif isinstance(case, CallCase):
        lines, chars = 1, sum(map(value_size, case.args))
    else:
        return ""
    in_lines = f" in {lines} lines" if lines > 1 else ""
    return f" Its input has {chars} characters{in_lines}."


@dataclass(frozen=True)
class _Where:
    """Where an error stands, as far as the attempt itself bears it out.

    Lines and names of frames are the program's to choose (``code.replace(co_name=...)``), and it
    has read the hidden input. So of a frame only a line that the attempt has is taken, and the
    name of the function from the attempt.

    Attributes:
        lines: ``(line, function)`` innermost first; "" for a line outside all functions.
        column: of a syntax error, from 1; None if it is not known.
    """

    lines: tuple[tuple[int, str], ...] = ()
    column: int | None = None

    @classmethod
    def of(cls, attempt: Attempt, error: ProgramError | None, *, compiled: bool) -> _Where:
        """What an error says of its place; nothing if there is nothing to believe."""
        if error is None:
            return cls()
        if not compiled:  # the compiler's word: no line of the program has run
            line = attempt.line(error.line)
            if line is None or error.line is None:
                return cls()
            column = error.column if error.column and error.column <= len(line) + 1 else None
            return cls(((error.line, ""),), column)
        numbers = [n for n in (*(line for line, _ in reversed(error.frames)), error.line) if n]
        known = [n for n in numbers[: len(error.frames) or 1] if attempt.line(n) is not None]
        return cls(tuple((n, attempt.function(n)) for n in known[:4]))

    @property
    def text(self) -> str:
        """The place in words."""
        places = [f"line {n}" + (f" in {name}" if name else "") for n, name in self.lines]
        first, *callers = places
        column = f", column {self.column}" if self.column else ""
        called = f", called from {', '.join(callers)}" if callers else ""
        return f"{first[0].upper()}{first[1:]} of the program{column}{called}."

    def quoted(self, attempt: Attempt) -> str:
        """The same with the lines it names, the innermost first, as a traceback has them."""
        lines = [attempt.line(n) or "" for n, _ in self.lines]
        if self.column:
            caret = "\n" + " " * (self.column - 1) + "^" if len(lines[0]) < _LINE_CHARS else ""
            return f"{self.text}\n{shorten(lines[0], _LINE_CHARS)}{caret}"
        return "\n".join([self.text, *(f"  {shorten(x.strip(), _LINE_CHARS)}" for x in lines)])


# --- tests in words ---------------------------------------------------------------------------


def _input(case: Case) -> str:
    if isinstance(case, StdinCase):
        return f"Input:\n{_cut(case.stdin.rstrip(chr(10)))}"
    if isinstance(case, CallCase):
        return f"Input:\n{_cut(chr(10).join(value_text(a) for a in case.args))}"
    return f"The test:\n{_cut(case.code.strip())}"


def _compared(case: Case, raw: RawRun, checker: Checker | None) -> str:
    """What came out, what should have, and the first place where they part."""
    if isinstance(case, AssertCase):
        return ""
    if isinstance(case, CallCase):
        early = "(nothing: the program ended early)"
        got = early if raw.result is MISSING else value_text(raw.result)
        judge = checker or Returns()
        told = f"Returned:\n{_cut(got)}\n{_wanted(judge)}\n{_cut(value_text(case.expected))}"
        known = raw.result is not MISSING and getattr(judge, "partwise", False)

        def agree(a: Any, b: Any) -> bool:
            return accepted(judge, RawRun(result=a), CallCase((), b))

        path = _path(raw.result, case.expected, agree) if known else ""
        return told + (f"\nThe first difference is at {path} of the result." if path else "")
    got, wanted = raw.text.rstrip("\n"), case.expected.rstrip("\n")
    judge = checker or Lines()
    told = f"Output:\n{_cut(visible(got)) or '(nothing)'}\n{_wanted(judge)}\n{_cut(wanted)}"
    if not getattr(judge, "partwise", False):
        return told
    return told + _line_difference(got, wanted, judge)


def _wanted(judge: Checker) -> str:
    return "Expected:" if getattr(judge, "partwise", False) else "One right answer:"


def _line_difference(got: str, wanted: str, judge: Checker) -> str:
    """The first line, and the first word in it, where two outputs part by the rule of ``judge``."""

    def agree(x: str, y: str) -> bool:
        return x == y or accepted(judge, RawRun(stdout=x.encode()), StdinCase("", y))

    a, b = got.split("\n"), wanted.split("\n")
    pairs = enumerate(zip(a, b, strict=False), 1)
    part = next((i for i, (x, y) in pairs if not agree(x, y)), None)
    if part is None:
        lengths = got and len(a) != len(b)
        return f"\nThe output has {len(a)} lines, {len(b)} are expected." if lengths else ""
    if len(b) == 1:
        return ""
    told = f"\nThe first difference is in line {part} of the output"
    x, y = a[part - 1].split(), b[part - 1].split()
    words = enumerate(zip(x, y, strict=False), 1)
    word = next((i for i, (p, q) in words if not agree(p, q)), None)
    if word is not None and max(len(x), len(y)) > 1:
        told += f", word {word}"
    told += "."
    if max(len(got), len(wanted)) > SHOWN_CHARS:  # the two lines themselves may have been cut away
        told += (
            f"\nThat line: {shorten(visible(a[part - 1]), _LINE_CHARS)}"
            f"\nExpected: {shorten(b[part - 1], _LINE_CHARS)}"
        )
    return told


def _path(got: Any, wanted: Any, agree: Callable[[Any, Any], bool]) -> str:
    """Where two nested values part first, as indices; "" when already at the top."""
    if isinstance(got, (list, tuple)) and isinstance(wanted, (list, tuple)):
        for i, (a, b) in enumerate(zip(got, wanted, strict=False)):
            if not agree(a, b):
                return f"[{i}]{_path(a, b, agree)}"
        return f"[{min(len(got), len(wanted))}]" if len(got) != len(wanted) else ""
    if isinstance(got, dict) and isinstance(wanted, dict):
        for key in wanted:
            if key not in got:
                return f"[{value_text(key)}]"
            if not agree(got[key], wanted[key]):
                return f"[{value_text(key)}]{_path(got[key], wanted[key], agree)}"
    return ""


def _cut(text: str) -> str:
    return shorten(text, SHOWN_CHARS)


_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{5,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def visible(text: str) -> str:
    """What a program printed, such that two runs print the same and nothing is invisible.

    Addresses, as in ``<map object at 0x7f...>``, differ from run to run; control characters would
    be dropped from feedback, and with them the reason why an output is wrong.
    """
    text = _ADDRESS.sub("at 0x...", text)
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


_DEEPEST = 100  # levels of a value; what is inside is only shown


def value_text(value: Any, depth: int = 0) -> str:
    """A value as Python writes it, sets in a fixed order, addresses left out. Raises nothing."""
    if depth > _DEEPEST:
        return "..."
    if isinstance(value, (set, frozenset)):
        inner = ", ".join(sorted(value_text(v, depth + 1) for v in value))
        text = "{" + inner + "}" if value else "set()"
        return text if isinstance(value, set) else f"frozenset({text if value else ''})"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(value_text(v, depth + 1) for v in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        items = (
            f"{value_text(k, depth + 1)}: {value_text(v, depth + 1)}" for k, v in value.items()
        )
        return "{" + ", ".join(items) + "}"
    try:
        text = repr(value)
        return _ADDRESS.sub("at 0x...", text) if "at 0x" in text else text
    except ValueError:  # an integer beyond Python's limit of digits
        return hex(value) if isinstance(value, int) else "(a value too large to print)"


def value_size(value: Any) -> int:
    """How long a value is, written, in characters."""
    try:
        return len(repr(value))
    except (ValueError, RecursionError):
        return len(value_text(value))


# --- nearly right -----------------------------------------------------------------------------


def _hint(case: Case, raw: RawRun) -> str:
    """What an answer that is nearly right gets wrong, without saying what would be right."""
    if isinstance(case, StdinCase):
        if max(len(case.expected), len(raw.stdout)) > _COMPARED_CHARS:
            return ""
        return _output_hint(raw.text.strip(), case.expected.strip())
    if isinstance(case, CallCase):
        return _result_hint(raw, case.expected)
    return ""


def _missing_return(case: Case, raw: RawRun) -> str:
    """Of answers that a rule of its own judges, only this can be said."""
    returned = isinstance(case, CallCase) and raw.result is None and case.expected is not None
    return "The function returned None: a path through it has no return." if returned else ""


def _output_hint(got: str, wanted: str) -> str:
    if not got or not wanted:
        return ""
    if got != wanted and got.casefold() == wanted.casefold():
        return "It differs from the right answer only in upper and lower case."
    if "".join(got.split()) == "".join(wanted.split()):
        return "It differs from the right answer only in white space and line breaks."
    lines = iter([line.strip() for line in got.split("\n")])
    if all(line.strip() in lines for line in wanted.split("\n")):
        return "The right answer stands in the output, but there are other lines: print no more."
    a, b = got.split("\n"), wanted.split("\n")
    if len(a) == len(b) and all(_ends_with(x, y) for x, y in zip(a, b, strict=True)):
        return "The right answer stands in the output, but with other words: print it alone."
    if _nearly(got.split(), wanted.split()):
        return "The numbers are nearly right: mind rounding and the number of digits."
    return ""


def _ends_with(line: str, wanted: str) -> bool:
    words, last = line.split(), wanted.split()
    return bool(last) and words[-len(last) :] == last


def _nearly(a: Sequence[str], b: Sequence[str]) -> bool:
    if len(a) != len(b):
        return False
    try:
        return all(
            p == q
            or ("." in p + q and math.isclose(float(p), float(q), rel_tol=1e-4, abs_tol=1e-4))
            for p, q in zip(a, b, strict=True)
        )
    except ValueError:
        return False


def _result_hint(raw: RawRun, wanted: Any) -> str:
    got = raw.result
    if got is MISSING:
        return ""
    if got is None and wanted is not None:
        printed = raw.text.strip()
        if printed and printed in (_as_printed(wanted), value_text(wanted)):
            return "The function prints the right answer instead of returning it."
        return "The function returned None: a path through it has no return."
    a, b = _type_name(got), _type_name(wanted)
    if a != b:
        if isinstance(got, str) and got == _as_printed(wanted):
            return f"The right value was returned as a string, not as {b}."
        return f"The function returned {a}, not {b}."
    if isinstance(got, (list, tuple)) and _sorted(got) == _sorted(wanted):
        return "The elements are right, but their order is not."
    if isinstance(got, str) and got.casefold() == wanted.casefold():
        return "It differs from the right answer only in upper and lower case."
    if isinstance(got, float) and math.isclose(got, wanted, rel_tol=1e-4, abs_tol=1e-4):
        return "The number is nearly right: mind rounding."
    return ""


def _as_printed(value: Any) -> str:
    return value if isinstance(value, str) else value_text(value)


def _sorted(values: Sequence[Any]) -> list[str]:
    return sorted(map(value_text, values))


def _type_name(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "a list"
    names = {"int": "an int", "float": "a float", "str": "a string", "NoneType": "None"}
    name = type(value).__name__
    return names.get(name, f"a {name}")
