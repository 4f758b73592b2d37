"""The program in a completion: found, located, and complained about when it is not there."""

from __future__ import annotations

import ast
import difflib
import re
import threading
import warnings
from dataclasses import dataclass
from typing import Literal

from rlrf import Segment

Take = Literal["longest", "last"]

_OPENING = re.compile(r"(?P<before>.*?)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)\n?", re.DOTALL)
_TAG = re.compile(r"[ \t]*[\w.+#-]*[ \t]*")
# Where Python ends a line. str.splitlines() also splits at form feeds and Unicode's separators.
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass(frozen=True)
class Attempt:
    """The program in a completion.

    Attributes:
        code: the source, without the indentation of its fence.
        start: where it begins in the completion, in characters.
        blocks: how many code blocks the completion has.
        cut: whether a further block follows that is never closed.
        raw: the source as it stands in the completion; "" if that is the same.
    """

    code: str
    start: int = 0
    blocks: int = 1
    cut: bool = False
    raw: str = ""

    def line(self, number: int | None) -> str | None:
        """Line ``number`` (from 1), without its end; None if there is none."""
        lines = _LINE.findall(self.code)
        if number is None or not 1 <= number <= len(lines):
            return None
        return str(lines[number - 1]).rstrip("\r\n")

    def line_span(self, number: int | None) -> tuple[int, int] | None:
        """The characters of the completion that are line ``number``, indentation apart."""
        lines = _LINE.findall(self.raw or self.code)
        if number is None or not 1 <= number <= len(lines):
            return None
        before = sum(map(len, lines[: number - 1]))
        text = lines[number - 1].rstrip()
        indent = len(text) - len(text.lstrip())
        return self.start + before + indent, self.start + before + len(text)


def extract(completion: str, take: Take = "longest") -> Attempt | Segment:
    """The code block of a completion that is its program.

    Blocks are those of CommonMark. Only where there is none, a fence may also follow words on its
    line, and a closing one the last line of code, as models write them.

    Args:
        completion: the policy's reply.
        take: ``longest`` block, as the official SDPO grader has it, or the ``last``: what stands
            between the last two lines that hold a fence, as LiveCodeBench has it.

    Returns:
        The program, or the segment that says why there is none.
    """
    blocks, opened = _blocks(completion) if take == "longest" else _between_last(completion)
    if not blocks and take == "longest":
        blocks = _blocks(completion, lenient=True)[0]
        opened = None if blocks else opened
    if blocks:
        start, end, indent = max(blocks, key=lambda b: b[1] - b[0])
        raw = completion[start:end]
        code = re.sub(rf"(?m)^ {{1,{indent}}}", "", raw) if indent else raw
        cut = opened is not None
        return Attempt(code, start, len(blocks), cut, raw if code != raw else "")
    if opened is not None:
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
        span=(0, len(completion)) if completion else None,
        priority=3,
    )


_Block = tuple[int, int, int]  # start, end, indentation of the fence


def _blocks(completion: str, *, lenient: bool = False) -> tuple[list[_Block], int | None]:
    """The closed blocks, and where one begins that is never closed."""
    blocks: list[_Block] = []
    fence, opened, start, indent, position = "", 0, 0, 0, 0
    for line in _LINE.findall(completion):  # one pass: an attempt may be huge
        bare = line.strip()
        if fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                blocks.append((start, position, indent))
                fence = ""
            elif lenient and bare.endswith(fence) and fence[0] not in bare[: -len(fence)]:
                blocks.append((start, position + line.rindex(fence), indent))
                fence = ""
        elif "```" in bare or "~~~" in bare:
            found = _OPENING.fullmatch(line.rstrip("\r\n"))
            if found is not None and (
                not found["before"].strip() or (lenient and _TAG.fullmatch(found["info"]))
            ):
                before = found["before"]
                fence, opened = found["fence"], position + len(before)
                indent = len(before) if not before.strip(" ") else 0
                start = position + len(line)
        position += len(line)
    return blocks, opened if fence else None


def _between_last(completion: str) -> tuple[list[_Block], int | None]:
    """What stands between the last two lines with a fence, as the one block."""
    position, marks = 0, []
    for line in completion.split("\n"):
        if "```" in line:
            marks.append((position, position + len(line) + 1))
        position += len(line) + 1
    if len(marks) < 2:
        return [], marks[0][0] if marks else None
    return [(marks[-2][1], marks[-1][0], 0)], None


_PARSING = threading.Lock()  # what is done about warnings is done for all threads


def parse(code: str) -> ast.Module:
    """The syntax tree of somebody's program; what the compiler warns of is no affair of ours.

    Raises:
        SyntaxError: it is no Python; also ValueError, RecursionError or MemoryError.
    """
    with _PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def missing_entry(attempt: Attempt, entry: str | None) -> Segment | None:
    """The fault of a program that does not define what it was asked for; None if it may.

    Args:
        attempt: the program.
        entry: ``"f"``, ``"Solution.f"``, or None where nothing has to be defined.
    """
    if entry is None or len(attempt.code) > _LONGEST:
        return None  # the sandbox will say it, if less well
    try:
        tree = parse(attempt.code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the compiler will say it better
    holder, _, name = entry.rpartition(".")
    if not holder:
        return _undefined(attempt, tree, name, "function", (ast.FunctionDef, ast.AsyncFunctionDef))
    loose = _undefined(attempt, tree, holder, "class", (ast.ClassDef,))
    if loose is not None:
        return loose
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == holder]
    if not classes or classes[-1].bases or classes[-1].decorator_list:
        return None  # its methods may come from elsewhere
    return _undefined(attempt, classes[-1], name, f"method of {holder!r}", _FUNCTIONS)


_LONGEST = 200_000  # characters; reading millions takes seconds
_DYNAMIC = {"*", "exec", "eval", "setattr", "globals", "locals", "vars", "type"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _nearest(name: str, candidates: list[str]) -> list[str]:
    """The candidate that may be meant: one written almost alike, or the only one there is."""
    plain = {c.casefold().replace("_", ""): c for c in reversed(candidates)}
    found = difflib.get_close_matches(name.casefold().replace("_", ""), plain, n=1, cutoff=0.6)
    if found:
        return [plain[found[0]]]
    return candidates if len(candidates) == 1 else []


def _undefined(
    attempt: Attempt, tree: ast.AST, name: str, what: str, kinds: tuple[type[ast.AST], ...]
) -> Segment | None:
    """The fault, unless ``name`` is bound anywhere in ``tree`` in a way that may work."""
    defined = {
        n.name: n.lineno
        for n in ast.walk(tree)
        if isinstance(n, (*_FUNCTIONS, ast.ClassDef)) and n is not tree
    }
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    bound |= {
        a.asname or a.name
        for n in ast.walk(tree)
        if isinstance(n, (ast.Import, ast.ImportFrom))
        for a in n.names
    }
    if name in defined or name in bound or bound & _DYNAMIC:
        return None
    alike = {
        n.name: n.lineno
        for n in ast.walk(tree)
        if isinstance(n, (*_FUNCTIONS, ast.ClassDef)) and isinstance(n, kinds) and n is not tree
    }
    nearest = _nearest(name, [n for n in alike if not n.startswith("__")])
    word = what.partition(" ")[0]
    there = f" There is a {word} {nearest[0]!r}; rename it." if nearest else ""
    return Segment(
        "format_error",
        f"The program does not define the {what.replace(word, f'{word} {name!r}', 1)}.{there}",
        source="extractor",
        span=attempt.line_span(alike[nearest[0]]) if nearest else None,
        priority=3,
        untrusted=bool(nearest),
    )
