"""The program in a completion: found, located, and complained about when it is not there.

It does not mend a program (what is chosen runs as it stands, the indentation of its fence apart),
and runs none.
"""

from __future__ import annotations

import ast
import difflib
import functools
import itertools
import re
import threading
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlrf import Segment

Take = Literal["program", "longest", "last"]

# Every pattern here meets what a model wrote: none may try a character more than a few times.

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
        chosen: which of several blocks it is, in words.
    """

    code: str
    start: int = 0
    blocks: int = 1
    cut: bool = False
    raw: str = ""
    chosen: str = "the longest"

    def line(self, number: int | None) -> str | None:
        """Line ``number`` (from 1), without its end; None if there is none."""
        lines = _LINE.findall(self.code)
        if number is None or not 1 <= number <= len(lines):
            return None
        return str(lines[number - 1]).rstrip("\r\n")

    def line_span(self, number: int | None) -> tuple[int, int] | None:
        """The characters of the completion that are line ``number``, indentation apart."""
        own = self.line(number)
        if own is None or number is None:
            return None
        lines = _LINE.findall(self.raw or self.code)
        before = sum(map(len, lines[: number - 1]))
        # A line of the source is the end of the line it was taken from.
        skipped = len(lines[number - 1].rstrip("\r\n")) - len(own.lstrip())
        return self.start + before + skipped, self.start + before + skipped + len(own.strip())

    def function(self, number: int) -> str:
        """The function that line ``number`` is in, by the source alone; "" if in none."""
        inside = [f for f in self._functions if f[0] <= number <= f[1]]
        return max(inside)[2] if inside else ""

    @functools.cached_property
    def _functions(self) -> list[tuple[int, int, str]]:
        """First and last line of every function's body, and its name."""
        tree = parse_attempt(self.code)
        found = [] if tree is None else [n for n in ast.walk(tree) if isinstance(n, _FUNCTIONS)]
        return [(n.body[0].lineno, n.end_lineno or 0, n.name) for n in found]


def extract(completion: str, take: Take = "program", entry: str | None = None) -> Attempt | Segment:
    """The code block of a completion that is its program.

    Blocks are those of CommonMark, with lists and quotes around them. Where CommonMark's reading
    gives no block, or leaves one open, or its program is no Python, a closing fence may have other
    text after it (``</answer>``, ``That is all.``). Only where there is still none, a fence may
    also follow words on its line, and a closing one the last line of code, as models write them.
    And where no reading gives Python, one word may stand directly behind a closing fence
    (```` ```Done ````), if that gives some.

    Args:
        completion: the policy's reply.
        take: ``program``: of the blocks that define ``entry`` (of all, if none does) those marked
            as Python, else those without a mark; of these the longest that seems to be a program,
            not data or output. ``longest``: of all, as the official SDPO grader has it. ``last``:
            what stands between the last two lines that hold a fence, as LiveCodeBench has it.
        entry: what the program has to define: ``"f"``, ``"Solution.f"``, or None.

    Returns:
        The program, or the segment that says why there is none.
    """
    if take == "last":
        blocks, opened = _between_last(completion)
    else:
        blocks, opened = _read(completion, lambda found: _choose(found, take, entry)[0])
    if blocks:
        block, chosen = _choose(blocks, take, entry)
        raw = completion[block.start : block.end]
        raw = "" if raw == block.code else raw
        return Attempt(block.code, block.start, len(blocks), opened is not None, raw, chosen)
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


# --- blocks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """A closed code block: where its content stands, what it is marked as, and the content."""

    start: int
    end: int
    info: str
    code: str


_Found = tuple[list[_Block], int | None]  # the closed blocks; where one begins that is never closed


def _read(completion: str, choose: Callable[[list[_Block]], _Block]) -> _Found:
    """The blocks by the strictest reading that makes sense of the completion."""
    if "```" not in completion and "~~~" not in completion:
        return [], None
    lines = _LINE.findall(completion)
    strict = blocks, opened = _blocks(lines)
    readings = [strict, _blocks(lines, trailing=True)]
    if opened is not None or not blocks:
        loose = _loose_blocks(lines)
        readings.append(loose if loose[0] else _loose_blocks(lines, indented=True))
    some = [reading for reading in readings if reading[0]] or [strict]
    right = [reading for reading in some if reading[0] and _is_python(choose(reading[0]).code)]
    if right:
        return next((r for r in right if r[1] is None), right[0])
    # A fence with one word directly behind looks as if it opened a block: here it ends one.
    for reading in (_blocks(lines, trailing=True, word=True), _loose_blocks(lines, word=True)):
        code = choose(reading[0]).code if reading[0] else ""
        if _is_python(code) and _does_something(code):
            return reading
    return some[0]


def _choose(blocks: list[_Block], take: Take, entry: str | None) -> tuple[_Block, str]:
    """The block that is the program, and which one that is, in words."""

    def length(block: _Block) -> int:
        return len(block.code)

    longest = max(blocks, key=length)
    if take != "program" or len(blocks) == 1:
        return longest, "the longest"
    defining = [b for b in blocks if _defines(b.code, entry)] if entry else []
    best = min(map(_mark, defining or blocks))
    marked = [b for b in defining or blocks if _mark(b) == best]
    doing = [b for b in marked if _does_something(b.code)] if len(marked) > 1 else []
    found = max(doing or marked, key=length)
    if length(found) == length(longest):
        return found, "the longest"
    if length(found) == max(map(length, defining), default=-1):
        return found, "the one that defines what is asked for"
    if doing and len(doing) < len(marked):
        return found, "the longest of those that do something"
    return found, "the longest of those that are marked as Python" if best == 0 else "the first"


_PYTHON = re.compile(r"(?:python|py|ipython)[0-9.]{0,8}", re.IGNORECASE)


def _mark(block: _Block) -> int:
    """0 for a block that is marked as Python, 1 for one without a mark, 2 for any other."""
    if not block.info:
        return 1
    word = re.match(r"\{?\.?([\w+#.-]{0,32})", block.info)
    return 0 if word is not None and _PYTHON.fullmatch(word[1]) else 2


def _defines(code: str, entry: str) -> bool:
    """Whether a source seems to define a function or a method; it may be no Python at all."""
    indent = ""
    for name in map(re.escape, entry.split(".")):
        bound = (
            rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b"
            rf"|^{indent}{name}[ \t]*(?::[^=\r\n]*)?=(?!=)"
            rf"|^[ \t]*(?:from[ \t]+[\w.]+[ \t]+)?import\b[^\r\n]*\bas[ \t]+{name}\b"
        )
        if not re.search(bound, code, re.MULTILINE):
            return False
        indent = r"[ \t]*"  # what a class holds
    return True


_STATEMENT = re.compile(
    r"^[ \t]*(?:(?:async[ \t]+)?(?:def|class)[ \t]+\w|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b"
    r"|\w[\w.]*(?:\(|[ \t]*=(?!=)))",
    re.MULTILINE,
)


def _does_something(code: str) -> bool:
    """Whether a source has statements, unlike what is shown of data: numbers, words, literals.

    It may be no Python at all: then a line that begins as one of a program's decides.
    """
    tree = parse_attempt(code)
    if tree is None:
        return _STATEMENT.search(code) is not None
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value is None:  # a label, as in "total: 5"
            continue
        if not isinstance(node, ast.Expr) or any(isinstance(n, ast.Call) for n in ast.walk(node)):
            return True
    return False


# CommonMark's block structure, as far as it decides where fences stand: lists, quotes, paragraphs
# (which go on lazily). HTML is none here: a reply may well be wrapped in <answer>.

_FENCE = re.compile(r"(`{3,})([^`]*)$|(~{3,})(.*)$")
_MARKER = re.compile(r"([-+*]|[0-9]{1,9}[.)])(?=[ \t]|$)")
_RULE = re.compile(r"([-_*])[ \t]*(?:\1[ \t]*){2,}$")
_HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
_UNDERLINE = re.compile(r"(?:=+|-+)[ \t]*$")
_WORD = re.compile(r"[A-Za-z][\w.+#-]*")
_QUOTE = 0  # a container: a quote, or a list's item by the columns its content is indented
_DEEPEST = 32


def _skip(line: str, at: int, column: int) -> tuple[int, int]:
    """Where white space ends that begins ``at``, and the column there."""
    while at < len(line) and line[at] in " \t":
        column += 4 - column % 4 if line[at] == "\t" else 1
        at += 1
    return at, column


def _strip(line: str, at: int, column: int, width: int) -> tuple[int, int]:
    """Skip white space of up to ``width`` columns; that may end inside a tab."""
    target = column + width
    while column < target and at < len(line) and line[at] in " \t":
        step = 4 - column % 4 if line[at] == "\t" else 1
        if column + step > target:
            return at, target
        at, column = at + 1, column + step
    return at, column


def _content(line: str, at: int, column: int, width: int) -> str:
    """A line without its indentation of up to ``width`` columns; of a tab, spaces may be left."""
    at, column = _strip(line, at, column, width)
    if line.startswith("\t", at):
        begins = 0
        for c in line[:at]:
            begins += 4 - begins % 4 if c == "\t" else 1
        if column > begins:
            return " " * (4 - column % 4) + line[at + 1 :]
    return line[at:]


def _enter(line: str, containers: Sequence[int]) -> tuple[int, int, int]:
    """How many of the containers a line goes on with; where its own text begins, and the column."""
    at = column = 0
    for n, width in enumerate(containers):
        after, indented = _skip(line, at, column)
        if width == _QUOTE:
            if indented - column > 3 or line[after : after + 1] != ">":
                return n, at, column
            at, column = _strip(line, after + 1, indented + 1, 1)
        elif indented - column >= width or after == len(line):
            at, column = _strip(line, at, column, width)
        else:
            return n, at, column
    return len(containers), at, column


def _blocks(lines: Sequence[str], *, trailing: bool = False, word: bool = False) -> _Found:
    """The fenced blocks of CommonMark; ``trailing`` and ``word`` are those of :func:`_closes`.

    A list's block may hold lines that are not indented as the list is, as models forget that.
    """
    blocks: list[_Block] = []
    containers: list[int] = []
    paragraph, hollow = False, -1  # of the containers, an item that has nothing yet
    fence, info, opened, start, indent, position = "", "", 0, 0, 0, 0
    code: list[str] = []
    plain: list[str] = []
    flush = False  # whether a line of the block is not indented as its list is: then none counts so
    for ended in lines:
        line = ended.rstrip("\r\n")
        if hollow >= 0 and not line.strip(" \t"):
            containers = containers[:hollow]
        hollow = -1
        matched, at, column = _enter(line, containers)
        if fence and _QUOTE in containers[matched:]:  # the quote ends, and with it the block
            blocks.append(_Block(start, position, info, "".join(code)))
            fence, containers = "", containers[:matched]
        if fence:
            first, to = _skip(line, at, column)
            left = matched < len(containers)
            if (left or to - column <= 3) and _closes(
                line, first, fence, trailing=trailing, word=word
            ):
                blocks.append(_Block(start, position, info, "".join(plain if flush else code)))
                fence = ""
            else:
                code.append(_content(ended, at, column, indent))
                plain.append(ended)
                flush = flush or left
            position += len(ended)
            continue
        inside, last = containers[:matched], matched == len(containers)
        while True:
            first, to = _skip(line, at, column)
            if to - column > 3 or len(inside) >= _DEEPEST:
                break
            marker = _MARKER.match(line, first)
            if line.startswith(">", first):
                inside.append(_QUOTE)
                at, column = _strip(line, first + 1, to + 1, 1)
            elif marker is not None and _begins_item(line, marker, in_text=paragraph and last):
                behind = to + marker.end() - first
                content, reached = _skip(line, marker.end(), behind)
                empty, far = content == len(line), reached - behind > 4
                hollow = len(inside) if empty else -1
                inside.append((behind + 1 if empty or far else reached) - column)
                at, column = _strip(line, marker.end(), behind, 1 if empty or far else 4)
            else:
                break
            last, paragraph = False, False
        opening = _FENCE.match(line, first) if to - column <= 3 else None
        text = first < len(line) and (
            (to - column > 3 and paragraph)
            or (
                to - column <= 3
                and not _RULE.match(line, first)
                and not _HEADING.match(line, first)
            )
        )
        if opening is not None:
            fence = opening[1] or opening[3]
            info = (opening[2] or opening[4] or "").strip()
            opened, start, indent = position + first, position + len(ended), to - column
            containers, paragraph, code, plain, flush = inside, False, [], [], False
        elif text and paragraph and not last and len(inside) == matched:
            pass  # a paragraph goes on lazily, and its containers with it
        else:
            underline = last and paragraph and _UNDERLINE.match(line, first)
            containers, paragraph = inside, text and not underline
        position += len(ended)
    return blocks, opened if fence else None


def _begins_item(line: str, marker: re.Match[str], *, in_text: bool) -> bool:
    """Whether what looks like a list's marker is one; ``in_text``: a paragraph stands before it."""
    if _RULE.match(line, marker.start()):
        return False
    empty = not line[marker.end() :].strip(" \t")
    return not in_text or (not empty and (not marker[1][:-1] or int(marker[1][:-1]) == 1))


def _closes(line: str, at: int, fence: str, *, trailing: bool, word: bool) -> bool:
    """Whether a closing fence begins ``at``.

    With ``trailing``, text may follow it; with ``word``, that may be one word directly behind it.
    """
    if not line.startswith(fence, at):
        return False
    rest = line[at:].lstrip(fence[0])
    if not rest.strip(" \t"):
        return True
    # Such a word opens a block within the block, say in a docstring.
    return trailing and (word or not _WORD.fullmatch(rest.rstrip()))


def _loose_blocks(lines: Sequence[str], *, indented: bool = False, word: bool = False) -> _Found:
    """Blocks whose fences follow words on their lines; a closing one may be ``indented`` anyhow."""
    blocks: list[_Block] = []
    fence, info, opened, start, indent, position = "", "", 0, 0, 0, 0
    code: list[str] = []
    for ended in lines:
        line = ended.rstrip("\r\n")
        bare = line.strip()
        if fence:
            first, to = _skip(line, 0, 0)
            ends = (indented or to <= indent + 3) and _closes(
                line, first, fence, trailing=True, word=word
            )
            code_before = bare[: -len(fence)] if bare.endswith(fence) else ""
            if ends or (code_before and fence[0] not in code_before):
                end = position if ends else position + line.rindex(fence)
                if not ends:
                    code.append(line[_strip(line, 0, 0, indent)[0] : end - position])
                blocks.append(_Block(start, end, info, "".join(code)))
                fence = ""
            else:
                code.append(_content(ended, 0, 0, indent))
        else:
            # The first run of a fence's characters that no backtick follows.
            after = line.rfind("`") + 1
            runs = re.finditer(r"`{3,}|~{3,}", line)
            opening = next((run for run in runs if run.end() >= after), None)
            if opening is not None and _WORDS.fullmatch(line, opening.end()):
                fence, info = opening[0], line[opening.end() :].strip()
                opened, start = position + opening.start(), position + len(ended)
                before = line[: opening.start()]
                indent, code = _skip(before, 0, 0)[1] if not before.strip() else 0, []
        position += len(ended)
    return blocks, opened if fence else None


_WORDS = re.compile(r"[ \t]*[\w.+#-]*[ \t]*")


def _between_last(completion: str) -> _Found:
    """What stands between the last two lines with a fence, as the one block."""
    position, marks = 0, []
    for line in completion.split("\n"):
        if "```" in line:
            marks.append((position, position + len(line) + 1))
        position += len(line) + 1
    if len(marks) < 2:
        return [], marks[0][0] if marks else None
    start, end = marks[-2][1], marks[-1][0]
    return [_Block(start, end, "", completion[start:end])], None


# --- Python -----------------------------------------------------------------------------------

_PARSING = threading.Lock()  # what is done about warnings is done for all threads


def parse(code: str) -> ast.Module:
    """The syntax tree of somebody's program; what the compiler warns of is no affair of ours.

    Raises:
        SyntaxError: it is no Python; also ValueError, RecursionError or MemoryError.
    """
    with _PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def parse_attempt(code: str) -> ast.Module | None:
    """The syntax tree of an untrusted program; None if it has none, or is not worth the time."""
    if len(code) > _LONGEST or _takes_long(code):
        return None
    try:
        return parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_LONGEST = 200_000  # characters; reading millions takes seconds
_MOST = 200


def _takes_long(code: str) -> bool:
    """Whether a source has what Python's parser needs quadratic time for.

    That is a name of many combining characters (it sorts them by insertion) and ``import`` of a
    name of many parts (it joins them one by one).
    """
    if not code.isascii():
        runs = itertools.groupby(code, lambda c: c > "\x7f" and unicodedata.combining(c) != 0)
        if any(combining and sum(1 for _ in run) > _MOST for combining, run in runs):
            return True
    if "import" not in code or code.count(".") <= _MOST:
        return False
    parts, before = 0, "."
    for token in re.finditer(r"\.|\w+|[^\s\\]", code):
        kind = "." if token[0] == "." else "name" if len(token[0]) > 1 or token[0].isalnum() else ""
        parts = parts + (kind == ".") if kind and kind != before else int(kind == ".")
        before = kind
        if parts > _MOST:
            return True
    return False


def _is_python(code: str) -> bool:
    return len(code) > _LONGEST or parse_attempt(code) is not None


def missing_entry(attempt: Attempt, entry: str | None) -> Segment | None:
    """The fault of a program that does not define what it was asked for; None if it may.

    Args:
        attempt: the program.
        entry: ``"f"``, ``"Solution.f"``, or None where nothing has to be defined.
    """
    tree = parse_attempt(attempt.code) if entry is not None else None
    if entry is None or tree is None:
        return None  # the compiler, or the sandbox, will say it
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
