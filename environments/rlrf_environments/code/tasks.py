"""Tasks as JSONL, one object a line: what ``code-v0`` reads.

``id``, ``prompt`` and ``tests`` are required. A test is ``{"stdin": ..., "expected": ...}``, or
``{"args": [...], "expected": ...}`` for a task with an ``entry_point``; ``"public": true`` lets
feedback show it. ``entry_point``, ``starter_code``, ``solution``, ``checker``, ``limits``,
``split`` and ``metadata`` are optional.

It does not try whether a solution passes the tests, or whether these fit the prompt: ``rlrf check``
runs the solutions.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlrf import UsageError
from rlrf.sandbox import (
    MISSING,
    CallCase,
    Case,
    Checker,
    Exact,
    Limits,
    Lines,
    Program,
    RawRun,
    Returns,
    StdinCase,
    Text,
    Tokens,
)
from rlrf_environments.code.explain import Test
from rlrf_environments.code.grading import Problem

CheckerLike = Checker | Callable[[Any, Case], bool]
"""A :class:`rlrf.sandbox.Checker`, or a function ``(answer, case) -> bool``.

``answer`` is the standard output as text, or what the function returned.
"""


class _Strict(BaseModel):
    """A row, as people and as exports of pandas and datasets write it.

    There a field that is left out stands as null, and what is nested may be a JSON string.
    """

    model_config = ConfigDict(extra="forbid")
    nested: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _exported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        row = {
            name: value
            for name, value in data.items()
            if value is not None or name not in cls.model_fields or name == "expected"
        }
        for name in cls.nested:
            if isinstance(row.get(name), str):
                row[name] = _sound(name, nested_json(row[name]))
        return row


class TestRow(_Strict):
    """A test in a task file."""

    __test__ = False  # not pytest's
    nested = ("args",)

    expected: Any = Field(description="The right output, or the right result.")
    stdin: str | None = Field(None, description="Standard input.")
    args: list[Any] | None = Field(None, description="Arguments of the entry point.")
    public: bool = Field(False, description="Feedback may show it.")

    @model_validator(mode="after")
    def _one_kind(self) -> TestRow:
        if (self.stdin is None) == (self.args is None):
            raise ValueError("give either 'stdin' or 'args'")
        if self.stdin is not None and not isinstance(self.expected, str):
            raise ValueError(f"'expected' is {self.expected!r}; with 'stdin' it must be a string")
        return self


class CheckerRow(_Strict):
    """A checker with its options in a task file."""

    name: str
    tolerance: float = Field(0.0, ge=0, allow_inf_nan=False)


class TaskRow(_Strict):
    """A line of a task file."""

    nested = ("tests", "limits", "metadata")

    id: str = Field(min_length=1, description="Unique in the file.")
    prompt: str = Field(min_length=1, description="The problem, as the policy reads it.")
    tests: list[TestRow] = Field(min_length=1, description="At least one.")
    entry_point: str | None = Field(
        None, description="The function `args` are for: `f`, or `Solution.f`."
    )
    starter_code: str = Field("", description="Shown after the prompt.")
    solution: str | None = Field(None, description="A correct program.")
    checker: CheckerRow | None = Field(
        None, description="Who compares: a name, or {name, tolerance}."
    )
    limits: dict[str, Any] = Field(
        default_factory=dict, description="Fields of rlrf.sandbox.Limits."
    )
    split: Literal["train", "eval"] | None = Field(
        None, description="Without it, ids are dealt to train and eval by their hash."
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description="What anyone may know.")

    @field_validator("checker", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("tests", mode="before")
    @classmethod
    def _one_by_one(cls, value: Any) -> Any:
        return _sound("tests", list_of_rows(value))

    @field_validator("limits", mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: limit for name, limit in value.items() if limit is not None}
        return value

    @field_validator("id", "prompt")
    @classmethod
    def _says_something(cls, value: str, info: ValidationInfo) -> str:
        if not value.strip() or (info.field_name == "id" and not value.isprintable()):
            raise ValueError("must be printable and not blank")
        return value

    @model_validator(mode="after")
    def _fits(self) -> TaskRow:
        for i, test in enumerate(self.tests):
            if (test.args is None) != (self.entry_point is None):
                has, needs = (
                    ("'stdin'", "no 'entry_point'")
                    if test.args is None
                    else ("'args'", "an 'entry_point'")
                )
                raise ValueError(f"tests.{i} has {has}, which needs {needs}")
        return self


@dataclass(frozen=True)
class CodeTask:
    """A task for a policy, and the problem for the grader.

    Attributes:
        problem: id, tests, limits: what only the grader knows.
        prompt: the statement.
        starter_code: shown after it.
        metadata: what anyone may know.
        split: the one it was written down for, or None.
        aliases: see :class:`rlrf.Task`.
    """

    problem: Problem
    prompt: str
    starter_code: str = ""
    metadata: Mapping[str, Any] | None = None
    split: str | None = None
    aliases: tuple[str, ...] = ()


def read_tasks(
    path: Path | str,
    text: str | None = None,
    *,
    limits: Limits | None = None,
    checkers: Mapping[str, CheckerLike] | None = None,
) -> list[CodeTask]:
    """The tasks of a JSONL file (``.gz`` too).

    Args:
        path: the file; names it in errors.
        text: its content, if the caller has it.
        limits: what a task's own ``limits`` start from.
        checkers: further checkers that tasks may name.

    Raises:
        UsageError: names the file, the line and the field that is wrong.
    """
    tasks: list[CodeTask] = []
    seen: dict[str, int] = {}
    for number, data in read_jsonl(path, text):
        try:
            row = TaskRow.model_validate(data)
            task = _task(row, limits or Limits(), checkers or {})
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, UsageError):  # names the field itself
                raise UsageError(f"{path}, line {number}: {cause}") from None
            place = ".".join(map(str, first["loc"])) or "the task"
            problem = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"{path}, line {number}: {place}: {problem}") from None
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        if row.id in seen:
            raise UsageError(
                f"{path}, line {number}: id: {row.id!r} is taken by line {seen[row.id]}; "
                "ids must be unique"
            )
        seen[row.id] = number
        tasks.append(task)
    if not tasks:
        raise UsageError(f"{path} holds no task")
    return tasks


def read_jsonl(path: Path | str, text: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a JSONL file, blank lines apart.

    A byte order mark is no part of the text. NaN may stand among a function's arguments only:
    elsewhere it is a value that an export has lost, and no answer equals it.

    Raises:
        UsageError: the file cannot be read, a line is no JSON object, or holds NaN.
    """
    if text is None:
        try:
            raw = Path(path).read_bytes()
            text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise UsageError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            yield number, read_object(f"{path}, line {number}", line)


def read_object(place: str, line: str) -> dict[str, Any]:
    """The object of a line of JSONL; see :func:`read_jsonl`. ``place`` names it in errors."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: no JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{place}: a JSON object is expected")
    lost = where_nan(data) if "NaN" in line else None
    if lost is not None:
        raise UsageError(f"{place}: {LOST.format(lost)}")
    return data


LOST = "{} is NaN, which equals nothing; write null, or leave it out"
"""The fault of data whose :func:`where_nan` is the ``{}``."""


def _sound(name: str, value: Any) -> Any:
    """What stood as a JSON string in a field; :func:`read_object` could not look into that."""
    lost = where_nan({name: value})
    if lost is not None:
        raise UsageError(LOST.format(lost))
    return value


_ARGUMENTS = ("args", "base_input", "plus_input")


def where_nan(value: Any) -> str | None:
    """The path of the first NaN in JSON data, arguments of functions apart; None without one."""
    if isinstance(value, float):
        return "" if value != value else None
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inside = ((k, v) for k, v in value.items() if k not in _ARGUMENTS)
    elif isinstance(value, list):
        inside = enumerate(value)
    for name, item in inside:
        found = where_nan(item)
        if found is not None:
            return f"{name}.{found}".rstrip(".")
    return None


def nested_json(value: Any) -> Any:
    """What an export may have written as a JSON string; what is no JSON stays as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def list_of_rows(value: Any) -> Any:
    """A list of objects, also where an export wrote it as an object of lists."""
    value = nested_json(value)
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        columns = list(value.values())
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value


def as_limits(value: Limits | Mapping[str, float] | None, default: Limits) -> Limits:
    """Limits from limits, from a mapping of those that differ from ``default``, or from None.

    Raises:
        UsageError: an unknown name, a wrong value, or something else altogether.
    """
    if value is None or isinstance(value, Limits):
        return value or default
    known = [f.name for f in fields(Limits)]
    if not isinstance(value, Mapping):
        raise UsageError(
            f"limits is {value!r}; it must be a mapping, like {{'cpu_s': 2}}, or "
            "rlrf.sandbox.Limits"
        )
    for name in value:
        if name not in known:
            raise UsageError(f"limits.{name}: unknown; limits are {', '.join(known)}")
    changes: dict[str, Any] = dict(value)
    return replace(default, **changes)


def _task(row: TaskRow, limits: Limits, checkers: Mapping[str, CheckerLike]) -> CodeTask:
    tests = []
    for test in row.tests:
        case: Case
        if test.stdin is not None:
            case = StdinCase(test.stdin, test.expected)
        else:
            case = CallCase(tuple(test.args or ()), test.expected)
        tests.append(Test(case, test.public))
    Program("", entry=row.entry_point)  # complains of what is no name
    own = as_limits(row.limits, limits) if row.limits else None
    return CodeTask(
        problem=Problem(
            row.id,
            lambda: tests,
            entry=row.entry_point,
            solution=row.solution,
            checker=_checker(row, checkers),
            limits=own,
        ),
        prompt=row.prompt,
        starter_code=row.starter_code,
        metadata=row.metadata,
        split=row.split,
    )


_STDIN_CHECKERS: dict[str, Callable[[float], Checker]] = {
    "text": lambda tolerance: Text(),
    "lcb": lambda tolerance: Lines(),
    "tokens": Tokens,
    "exact": lambda tolerance: Exact(),
}
_CALL_CHECKERS: dict[str, Callable[[float], Checker]] = {"returns": Returns}
_TOLERANT = ("tokens", "returns")


def _checker(row: TaskRow, own: Mapping[str, CheckerLike]) -> Checker:
    builtin = _STDIN_CHECKERS if row.entry_point is None else _CALL_CHECKERS
    wanted = row.checker or CheckerRow(name=next(iter(builtin)), tolerance=0.0)
    if wanted.name in own:
        return as_checker(own[wanted.name])
    if wanted.name not in builtin:
        names = ", ".join([*builtin, *own])
        kind = "a stdin task" if row.entry_point is None else "a task with an entry point"
        raise UsageError(
            f"checker: {wanted.name!r} is unknown for {kind}; checkers are {names}. Your own go "
            "into the environment's option `checkers`"
        )
    if wanted.tolerance and wanted.name not in _TOLERANT:
        raise UsageError(f"checker: {wanted.name!r} takes no tolerance; 'tokens' and 'returns' do")
    return builtin[wanted.name](wanted.tolerance)


@dataclass(frozen=True)
class _Function:
    """A checker from a function."""

    function: Callable[[Any, Case], bool]

    def accepts(self, raw: RawRun, case: Case) -> bool:
        answer = raw.text if isinstance(case, StdinCase) else raw.result
        return answer is not MISSING and bool(self.function(answer, case))


def as_checker(value: CheckerLike) -> Checker:
    """A checker from a checker or a function ``(answer, case) -> bool``.

    One that raises could not read the answer, so the answer is wrong; as that may also be its own
    fault, it is logged once (see :func:`rlrf.sandbox.accepted`).
    """
    return value if hasattr(value, "accepts") else _Function(value)


EVAL_SHARE = 0.2
"""The share of ids that are dealt to ``eval``, where tasks name no split."""


def in_split(task_id: str, split: str) -> bool:
    """Whether an id belongs to ``train`` or ``eval``, by its hash; to ``all`` all do.

    So a task is on the same side whatever filters are set and whatever tasks are beside it.
    """
    if split == "all":
        return True
    share = int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:4], "big") / 2**32
    return (share < EVAL_SHARE) == (split == "eval")


def of_split(tasks: Sequence[CodeTask], split: str) -> list[CodeTask]:
    """The tasks of a split: by their own word, else by :func:`in_split`; ``all`` is all."""
    if split == "all":
        return list(tasks)
    return [t for t in tasks if (t.split == split if t.split else in_split(t.problem.id, split))]
