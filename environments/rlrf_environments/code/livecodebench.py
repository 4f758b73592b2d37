"""``livecodebench-v1`` ... ``-v6``: LiveCodeBench (arXiv 2403.07974), code generation.

The data set (``livecodebench/code_generation_lite`` on the hub) is some gigabytes of JSONL, nearly
all of it hidden tests. So a file is read once to learn where each question stands, and the hidden
tests of a question are read when its first program is graded.

It does not have interactive questions, nor measure wall time as the official harness does (CPU time
here). It does not leave out what a model may have been trained on: ``contest_start`` does.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import functools
import hashlib
import json
import os
import pickletools
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from rlrf import MissingDependencyError, UsageError
from rlrf._files import write_whole
from rlrf.fetch import cache_dir, hub_answers
from rlrf.sandbox import CallCase, Case, Checker, Limits, Lines, RawRun, Returns, StdinCase
from rlrf_environments.code.answers import MANY_ANSWERS, tolerance
from rlrf_environments.code.env import CodeEnv
from rlrf_environments.code.explain import Test
from rlrf_environments.code.extract import Take
from rlrf_environments.code.grading import Problem, Renderer
from rlrf_environments.code.sources import named_file
from rlrf_environments.code.tasks import (
    LOST,
    CodeTask,
    in_split,
    list_of_rows,
    read_object,
    where_nan,
)

HUB_ID = "livecodebench/code_generation_lite"
VARIABLE = "RLRF_LIVECODEBENCH"
RELEASES = 6

Protocol = Literal["disjoint", "sdpo"]

_MAX_TESTS_BYTES = 1 << 30  # one question's tests, unpacked; the largest published has 0.2 GB
_WHOLE_FILE_BYTES = 32 << 20  # a smaller file is read anew each time; no index is kept of it

# What the official harness puts before every program: a LeetCode solution says `List` without
# importing it. The order matters: later modules hide names of earlier ones, and builtins win.
_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json builtins typing"
).split()
PRELUDE = "\n".join(
    [f"from {m} import *" for m in _MODULES]
    + [f"import {m}" for m in _MODULES if m not in ("builtins", "typing")]
)

INTERACTIVE = ("abc337_e", "abc355_e")
"""Questions that need an interactive judge (the data set's errata)."""

WRONG_TESTS = ("abc350_c", "apply-operations-to-make-string-empty", "most-frequent-ids")
"""Questions with wrong tests (the data set's errata)."""

UNCHECKED = ("abc311_c", "abc326_d", "abc327_b", "abc333_e", "abc343_a", "abc343_e", "abc362_c")
"""Questions with several right answers (the data set's errata) that have no checker here."""


@dataclass(frozen=True)
class Row:
    """A question without its hidden tests, and where they are.

    Attributes:
        fields: the published fields but ``private_test_cases``.
        path: the file it stands in.
        offset: where its line begins in the file, in bytes; -1 if it has no hidden tests.
        length: bytes of its line.
    """

    fields: dict[str, Any]
    path: str
    offset: int = -1
    length: int = 0

    def hidden(self) -> Any:
        """The published ``private_test_cases``, read from the file; a list in some exports."""
        if self.offset < 0:
            return ""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return json.loads(file.read(self.length)).get("private_test_cases")


class LiveCodeBench(CodeEnv):
    """LiveCodeBench: contest problems of LeetCode, AtCoder and Codeforces, by date.

    The version in the id is the release (1 to 6, each holds those before it).

    Args:
        data: a JSONL file in the published format, or a folder of ``test.jsonl``,
            ``test2.jsonl``, ... None for the file that ``RLRF_LIVECODEBENCH`` names, else the hub.
            A file without ``private_test_cases`` is graded on its public tests.
        contest_start: only contests from that day on, ``"2025-02-01"``.
        contest_end: only contests up to that day.
        difficulty: ``easy``, ``medium``, ``hard``, or several.
        platform: ``leetcode``, ``atcoder``, ``codeforces``, or several.
        subset: ``sdpo`` for the 131 questions of the SDPO paper (February to April 2025).
        protocol: ``disjoint``: ``train`` and ``eval`` are different questions (4/5 and 1/5), the
            split ``all`` has both and is what ``rlrf eval`` takes. ``sdpo``: all three are all
            questions; ``train`` grades on a random half of the hidden tests, the others on all
            tests. So it measures fitting the questions that were trained on, as the paper does.
        errata: ``exclude`` leaves out the questions that cannot be graded rightly (interactive,
            wrong tests, several right answers without a checker); ``keep`` keeps them.
        compat: grade as the official harness does, quirks included, so that scores compare: its
            choice of code block (the last), its comparison, its standard input, no checkers for
            several right answers. Also keeps the errata unless told otherwise.
        kwargs: see :class:`CodeEnv`.

    Raises:
        UsageError: an unknown value of an option, a broken file.
        MissingDependencyError: the hub is needed, but ``huggingface_hub`` is not installed.
    """

    release: ClassVar[int] = RELEASES
    starter: ClassVar[str] = "code"
    # The official harness allows 6 s of wall time per test, on a quiet machine.
    default_limits: ClassVar[Limits] = Limits(
        cpu_s=6, wall_s=20, memory_mb=1024, output_kb=1024, stack_mb=256
    )

    def __init__(
        self,
        *,
        data: str | os.PathLike[str] | None = None,
        contest_start: str | None = None,
        contest_end: str | None = None,
        difficulty: str | Sequence[str] | None = None,
        platform: str | Sequence[str] | None = None,
        subset: str | None = None,
        protocol: Protocol = "disjoint",
        errata: Literal["exclude", "keep"] | None = None,
        compat: bool = False,
        **kwargs: Any,
    ) -> None:
        self.compat = compat
        super().__init__(**kwargs)
        errata = errata or ("keep" if compat else "exclude")
        for name, value, known in (
            ("subset", subset, (None, "sdpo")),
            ("protocol", protocol, get_args(Protocol)),
            ("errata", errata, ("exclude", "keep")),
            ("compat", compat, (False, True)),
        ):
            if value not in known:
                raise UsageError(
                    f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}"
                )
        self.protocol, self.errata = protocol, errata
        self.overlapping_splits = protocol == "sdpo"
        self.difficulty = _several("difficulty", difficulty, ("easy", "medium", "hard"))
        self.platform = _several("platform", platform, ("leetcode", "atcoder", "codeforces"))
        starts = [_day("contest_start", contest_start)]
        ends = [_day("contest_end", contest_end)]
        if subset == "sdpo":
            starts.append("2025-02-01")
            ends.append("2025-04-30")
        self.contest_start = max(d for d in starts if d) if any(starts) else None
        self.contest_end = min(d for d in ends if d) if any(ends) else None
        self._data = data
        self._rows: list[Row] | None = None

    def _take(self, renderer: Renderer) -> Take:
        return "last" if self.compat else super()._take(renderer)

    # --- tasks ----------------------------------------------------------------------------

    def load_code_tasks(self, split: str) -> list[CodeTask]:
        """The questions of ``split`` that the filters let through."""
        if self._rows is None:
            self._rows = read_rows(self._data, self.release)
        rows = [r for r in self._rows if self._wanted(r.fields)]
        if not self._rows:
            raise UsageError(f"there is no question of release v{self.release} in the data")
        if not rows:
            raise UsageError(
                f"none of {len(self._rows)} questions is left: contest_start="
                f"{self.contest_start}, contest_end={self.contest_end}, difficulty="
                f"{self.difficulty}, platform={self.platform}; widen the filters"
            )
        if self.protocol == "disjoint":
            rows = [r for r in rows if in_split(str(r.fields["question_id"]), split)]
        half = self.protocol == "sdpo" and split == "train"
        return [self._code_task(row, half=half) for row in rows]

    def _wanted(self, question: dict[str, Any]) -> bool:
        day = question["contest_date"][:10]
        if self.errata == "exclude" and _names(question) & _EXCLUDED:
            return False
        return (
            (self.contest_start is None or day >= self.contest_start)
            and (self.contest_end is None or day <= self.contest_end)
            and (self.difficulty is None or question["difficulty"] in self.difficulty)
            and (self.platform is None or question["platform"] in self.platform)
        )

    def _code_task(self, row: Row, *, half: bool) -> CodeTask:
        question = row.fields
        task_id = str(question["question_id"])
        metadata = _json(question.get("metadata"), {}, task_id)
        function = metadata.get("func_name") if isinstance(metadata, dict) else None
        entry = f"Solution.{function}" if function else None
        return CodeTask(
            problem=Problem(
                task_id,
                functools.partial(load_tests, row, half=half),
                entry=entry,
                prelude=PRELUDE + (_OFFICIAL_STDIN if self.compat and entry is None else ""),
                checker=self._checker(question, entry),
            ),
            prompt=str(question["question_content"]),
            starter_code=str(question.get("starter_code") or ""),
            metadata={
                "title": question["question_title"],
                "platform": question["platform"],
                "difficulty": question["difficulty"],
                "contest_id": question["contest_id"],
                "contest_date": question["contest_date"][:10],
                "kind": "stdin" if entry is None else "function",
            },
            aliases=tuple(name for name in (*_names(question), _title(question)) if name),
        )

    def _checker(self, question: dict[str, Any], entry: str | None) -> Checker | None:
        if self.compat:
            return OfficialLines() if entry is None else OfficialReturns()
        for name in _names(question):
            if name in MANY_ANSWERS:
                return MANY_ANSWERS[name]
        if entry is not None:
            return Results()
        return tolerance(str(question["question_content"])) or Lines()

    def pose(self, task: CodeTask) -> str:
        """The prompt: statement, how to answer, starter code."""
        how = (
            "Write a Python 3 program that reads the input from standard input and prints the "
            "answer to standard output."
            if task.problem.entry is None
            else "Write a Python 3 solution."
        )
        limits = (
            "Use only the standard library. Each test may take "
            f"{self.limits.cpu_s:g} s and {self.limits.memory_mb} MB."
        )
        return super().pose(replace(task, prompt=f"{task.prompt.strip()}\n\n{how} {limits}"))


class LiveCodeBenchV1(LiveCodeBench):
    """Release v1 of :class:`LiveCodeBench`."""

    release = 1


class LiveCodeBenchV2(LiveCodeBench):
    """Release v2 of :class:`LiveCodeBench`."""

    release = 2


class LiveCodeBenchV3(LiveCodeBench):
    """Release v3 of :class:`LiveCodeBench`."""

    release = 3


class LiveCodeBenchV4(LiveCodeBench):
    """Release v4 of :class:`LiveCodeBench`."""

    release = 4


class LiveCodeBenchV5(LiveCodeBench):
    """Release v5 of :class:`LiveCodeBench`."""

    release = 5


class LiveCodeBenchV6(LiveCodeBench):
    """Release v6 of :class:`LiveCodeBench`."""

    release = 6


def _several(name: str, value: str | Sequence[str] | None, known: tuple[str, ...]) -> Any:
    if value is None:
        return None
    values = tuple(value) if isinstance(value, (list, tuple, set)) else (value,)
    for one in values:
        if one not in known:
            raise UsageError(f"{name} is {one!r}; it must be one of {', '.join(known)}")
    return values


def _day(name: str, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return datetime.datetime.fromisoformat(str(value)).date().isoformat()
    except ValueError:
        raise UsageError(f"{name} is {value!r}; it must be a day, like '2025-02-01'") from None


def _names(question: dict[str, Any]) -> set[str]:
    """What the errata may call a question: its id, or LeetCode's name for its title."""
    title = _title(question).lower()
    return {str(question["question_id"]), re.sub(r"[^a-z0-9]+", "-", title).strip("-")} - {""}


def _title(question: dict[str, Any]) -> str:
    return str(question.get("question_title") or "")


_EXCLUDED = frozenset({*INTERACTIVE, *WRONG_TESTS, *UNCHECKED})


# --- files ------------------------------------------------------------------------------------


def read_rows(data: str | os.PathLike[str] | None, release: int) -> list[Row]:
    """The questions of a release.

    Args:
        data: file or folder; None for the one ``RLRF_LIVECODEBENCH`` names, else the hub.
        release: 1 to 6.

    Raises:
        UsageError: a file is missing or broken.
        MissingDependencyError: the hub is needed, but ``huggingface_hub`` is not installed.
    """
    named = named_file("LiveCodeBench", VARIABLE, data)
    names = [f"test{n if n > 1 else ''}.jsonl" for n in range(1, release + 1)]
    if named is None:
        paths = [_from_hub(name) for name in names]
    elif named.is_dir():
        paths = [named / name for name in names]
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise UsageError(f"{named} holds no {missing[0].name}, which release v{release} needs")
    else:
        paths = [named]
    rows: dict[str, Row] = {}
    for path in paths:
        for row in _index(path):
            rows.setdefault(str(row.fields["question_id"]), row)
    # Collections of several releases in one file mark each question with its own.
    return [r for r in rows.values() if _release_of(r.fields) <= release]


def _release_of(question: dict[str, Any]) -> int:
    found = re.fullmatch(r"v(\d)", str(question.get("_version", "")))
    return int(found[1]) if found else 1


def _from_hub(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependencyError(
            f"LiveCodeBench (without data= or {VARIABLE})", "huggingface_hub", "data"
        ) from None
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {"repo_id": HUB_ID, "filename": name, "repo_type": "dataset"}
    try:
        return Path(huggingface_hub.hf_hub_download(**options, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        if not hub_answers():
            raise ConnectionError("the hub does not answer")
        return Path(huggingface_hub.hf_hub_download(**options))
    except Exception as error:  # the hub's client raises whatever its transport raises
        raise UsageError(
            f"{name} of {HUB_ID} is not in the hub's cache and cannot be fetched "
            f"({type(error).__name__}: {error}). With a network: hf download {HUB_ID} "
            f"--repo-type dataset. Without: name a copy, data=FOLDER or {VARIABLE}=FOLDER"
        ) from None


def _index(path: Path) -> list[Row]:
    """The questions of a file; of a large one an index is kept, so that it is read once."""
    stat = path.stat()
    if stat.st_size < _WHOLE_FILE_BYTES:
        return list(_scan(path))
    real = path.resolve()
    mark = f"2\0{real}\0{stat.st_size}\0{stat.st_mtime_ns}"  # 2: the form of the index
    kept = cache_dir("livecodebench", hashlib.sha256(mark.encode()).hexdigest()[:32] + ".json")
    if kept.is_file():
        return [Row(**item) for item in json.loads(kept.read_text(encoding="utf-8"))]
    rows = list(_scan(path))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps([asdict(r) for r in rows]), beside=f".{os.getpid()}")
    return rows


_FIELDS = (
    "question_title question_content platform question_id contest_id contest_date difficulty "
    "public_test_cases"
).split()
_REQUIRED = "question_id question_content contest_date platform difficulty".split()


def as_day(value: Any) -> str | None:
    """The day (and time) of a published date, or of an export's count since 1970; None of neither.

    pandas counts milliseconds unless told otherwise; seconds, micro- and nanoseconds are told by
    their size.
    """
    if isinstance(value, str) and value.strip().isdecimal() and value.strip().isascii():
        value = int(value[:20])
    if isinstance(value, str):
        try:
            return datetime.datetime.fromisoformat(value.strip()).isoformat()
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e19:
        return None
    for per_second in (1, 1e3, 1e6, 1e9):
        if value / per_second < 1e11 / 25:  # the year 2096
            at = datetime.datetime.fromtimestamp(value / per_second, datetime.UTC)
            return at.replace(tzinfo=None).isoformat()
    return None


def _scan(path: Path) -> Iterator[Row]:
    """The questions of a file, one line at a time; the hub's own checksum is verified."""
    digest, offset = hashlib.sha256(), 0
    real = str(path.resolve())
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UsageError(
                        f"{path}, line {number}: no UTF-8; if the file is compressed, unpack it"
                    ) from None
                data = read_object(f"{path}, line {number}", text)
                missing = [f for f in _FIELDS if f not in data]
                empty = [f for f in _REQUIRED if data.get(f) is None]
                if missing or empty:
                    raise UsageError(
                        f"{path}, line {number}: {(missing + empty)[0]} is "
                        f"{'missing' if missing else 'null'}; it must be in the format of {HUB_ID}"
                    )
                question_id, day = data["question_id"], as_day(data["contest_date"])
                if day is None:
                    raise UsageError(
                        f"{path}, line {number}: contest_date is {data['contest_date']!r:.50}; it "
                        "must be a date, like 2025-02-01T00:00:00, or milliseconds since 1970"
                    )
                data["contest_date"] = day
                if (
                    isinstance(question_id, float) and question_id.is_integer()
                ):  # LeetCode's ids are numbers
                    data["question_id"] = str(int(question_id))
                private = data.pop("private_test_cases", None)
                yield Row(data, real, offset if private else -1, len(line))
            offset += len(line)
    # The hub's cache names a large file by its SHA-256.
    published = Path(real).name
    if re.fullmatch(r"[0-9a-f]{64}", published) and published != digest.hexdigest():
        raise UsageError(
            f"{path} is damaged: its SHA-256 is {digest.hexdigest()}, published is {published}; "
            f"delete it and fetch it again"
        )


# --- tests ------------------------------------------------------------------------------------


def load_tests(row: Row, *, half: bool = False) -> list[Test]:
    """The tests of a question.

    Args:
        row: the question.
        half: only a random half of the hidden tests (at least one), always the same one, and no
            public ones. SDPO trains on that; its authors draw theirs in another way.

    Raises:
        UsageError: the tests cannot be read.
    """
    task_id = str(row.fields["question_id"])
    public = _cases(_json(row.fields["public_test_cases"], [], task_id), task_id)
    hidden = _cases(unpack_tests(row.hidden(), task_id), task_id)
    if half and hidden:
        draw = random.Random(f"sdpo {task_id}")
        chosen = sorted(draw.sample(range(len(hidden)), max(1, len(hidden) // 2)))
        return [Test(hidden[i], public=False) for i in chosen]
    tests = [Test(c, public=True) for c in public] + [Test(c, public=False) for c in hidden]
    if not tests:
        raise UsageError(f"question {task_id} of LiveCodeBench has no test in {row.path}")
    return tests


def _cases(items: Any, task_id: str) -> list[Case]:
    cases: list[Case] = []
    try:
        items = list_of_rows(items) or []
        lost = where_nan(items)
        if lost is not None:
            raise ValueError(LOST.format(lost))
        for item in items:
            if item["input"] is None or item["output"] is None:
                raise ValueError("its input or output is null")
            if item["testtype"] == "stdin":
                cases.append(StdinCase(str(item["input"]), str(item["output"])))
            else:
                args = tuple(json.loads(line) for line in item["input"].split("\n"))
                expected = json.loads(item["output"])
                if where_nan(expected) is not None:
                    raise ValueError("its output is NaN, which equals nothing")
                cases.append(CallCase(args, expected))
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"question {task_id} of LiveCodeBench has a broken test: {type(error).__name__} {error}"
        ) from None
    return cases


def unpack_tests(packed: Any, task_id: str = "") -> list[Any]:
    """Hidden tests as published: JSON, or base64 of zlib of a pickle of JSON; or a list by now.

    The pickle is not loaded. It may hold a single string and nothing else, which is read from its
    opcodes; so no file can make this run or build anything.

    Raises:
        UsageError: it is none of that.
    """
    packed = list_of_rows(packed)
    if not packed or isinstance(packed, list):
        return packed or []
    try:
        if not isinstance(packed, str):
            raise ValueError(f"a {type(packed).__name__}")
        if packed.lstrip().startswith("["):
            tests = json.loads(packed)
        else:
            stream = zlib.decompressobj()
            raw = stream.decompress(base64.b64decode(packed), _MAX_TESTS_BYTES)
            if not stream.eof:
                raise ValueError("it is cut off, or larger than 1 GB")
            tests = json.loads(_pickled_string(raw))
        if not isinstance(tests, list):
            raise ValueError("no list")
    except (ValueError, binascii.Error, zlib.error, RecursionError) as error:
        raise UsageError(
            f"the hidden tests of question {task_id!r} cannot be read: {error}"
        ) from None
    return tests


_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_AROUND = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def _pickled_string(raw: bytes) -> str:
    found: list[str] = []
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in _STRINGS:
            found.append(str(argument))
        elif opcode.name not in _AROUND:
            raise ValueError(f"its pickle holds {opcode.name}, but only a string is accepted")
    if len(found) != 1:
        raise ValueError(f"its pickle holds {len(found)} strings, one is expected")
    return found[0]


def _json(value: Any, default: Any, task_id: str) -> Any:
    if not isinstance(value, str):
        return default if value is None else value
    try:
        return json.loads(value) if value.strip() else default
    except ValueError as error:
        raise UsageError(f"question {task_id} of LiveCodeBench is broken: {error}") from None


@dataclass(frozen=True)
class Results:
    """Equal results; where floats are expected, within 1e-5, as LeetCode has it.

    Lists and tuples are alike, ``True`` is not 1 (:class:`rlrf.sandbox.Returns`).
    """

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`rlrf.sandbox.Checker`."""
        assert isinstance(case, CallCase)
        return Returns(1e-5 if _has_float(case.expected) else 0.0).accepts(raw, case)


def _has_float(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_float, value))
    return isinstance(value, float)


# --- the official harness, quirks included ----------------------------------------------------


@dataclass(frozen=True)
class OfficialLines:
    """The official comparison of outputs, quirks included.

    As :class:`rlrf.sandbox.Lines`, but everything that Python's ``Decimal`` reads is a number:
    ``1_000``, digits of other scripts, ``Infinity``. How a program exits does not matter there,
    which :data:`_OFFICIAL_STDIN` takes care of.
    """

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`rlrf.sandbox.Checker`."""
        assert isinstance(case, StdinCase)
        got, wanted = (_stripped(text) for text in (raw.text, case.expected))
        if len(got) != len(wanted):
            return False
        try:
            return all(
                a == b or [Decimal(w) for w in a.split()] == [Decimal(w) for w in b.split()]
                for a, b in zip(got, wanted, strict=True)
            )
        except InvalidOperation:
            return False


def _stripped(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


@dataclass(frozen=True)
class OfficialReturns:
    """The official comparison of results: Python's ``==``, a tuple being a list only outermost.

    So ``True`` passes for ``1``, and a list of tuples fails where a list of lists is expected.
    """

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`rlrf.sandbox.Checker`."""
        assert isinstance(case, CallCase)
        got = list(raw.result) if isinstance(raw.result, tuple) else raw.result
        return bool(got == case.expected)


# In the official harness standard input is a StringIO with a few methods replaced: `read` gives
# everything every time, `readline` ends with StopIteration, there is no `buffer`; `exit` of any
# code is no failure, and the `exit` and `quit` of `site` are None.
_OFFICIAL_STDIN = """
def _official():
    import builtins, io, sys

    text = sys.stdin.read()
    lines = iter(text.split("\\n"))

    class Input(io.StringIO):
        def read(self, *_):
            return text

        def readline(self, *_):
            return next(lines)

        def readlines(self, *_):
            return text.split("\\n")

    def leave(code=None):
        raise SystemExit(0)

    sys.stdin = Input(text)
    sys.exit = leave
    builtins.exit = builtins.quit = None


_official()
exit = quit = None
del _official
"""
