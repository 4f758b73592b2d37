"""``humaneval-v0``, ``mbpp-v0`` and EvalPlus's versions of both.

Papers: arXiv 2107.03374, 2108.07732, 2305.01210. HumanEval and MBPP come as asserts. An assert
that compares a call on literals with a literal becomes a test with arguments and an expected
result, so that feedback can say what came out; any other one runs as it is, in a sandbox of its
own that the program cannot enter. EvalPlus comes as inputs and a canonical solution, which is run
once (in the sandbox, then remembered) for the expected results.

They do not grade what the published tests leave untested, nor see what a program changes in place,
as arguments are copied. Whether a model was trained on the tasks they do not know.
"""

from __future__ import annotations

import abc
import ast
import functools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlrf import InfraError, UsageError
from rlrf.sandbox import (
    MISSING,
    AssertCase,
    CallCase,
    Case,
    Checker,
    Limits,
    Program,
    RawRun,
    SandboxPool,
    Verdict,
)
from rlrf_environments.code.env import CodeEnv
from rlrf_environments.code.explain import Test
from rlrf_environments.code.extract import parse
from rlrf_environments.code.grading import Problem
from rlrf_environments.code.sources import DataSet, locate
from rlrf_environments.code.tasks import CodeTask, in_split, nested_json, read_jsonl

HUMANEVAL = DataSet(
    "HumanEval",
    "HumanEval.jsonl.gz",
    "RLRF_HUMANEVAL",
    "https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    installed=("human_eval", "../data/HumanEval.jsonl.gz"),
)
HUMANEVAL_PLUS = DataSet(
    "HumanEval+",
    "HumanEvalPlus-v0.1.10.jsonl.gz",
    "RLRF_HUMANEVAL_PLUS",
    "https://github.com/evalplus/humanevalplus_release/releases/download/v0.1.10/"
    "HumanEvalPlus.jsonl.gz",
    elsewhere=("~/.cache/evalplus/HumanEvalPlus-v0.1.10.jsonl",),
)
MBPP_DATA = DataSet(
    "MBPP",
    "mbpp.jsonl",
    "RLRF_MBPP",
    "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl",
    sha256="ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
)
MBPP_PLUS = DataSet(
    "MBPP+",
    "MbppPlus-v0.2.0.jsonl.gz",
    "RLRF_MBPP_PLUS",
    "https://github.com/evalplus/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz",
    elsewhere=(
        "~/.cache/evalplus/MbppPlus-v0.2.0.jsonl",
        "~/.cache/evalplus/MbppPlus-v0.1.0.jsonl",
    ),
)


class _Benchmark(CodeEnv):
    """What the four have in common: a data set, read once.

    Args:
        data: a file of the data set as published; None to look where it may be (the environment
            variable, rlrf's cache, an installed package, another tool's cache), then fetch it.
        kwargs: see :class:`CodeEnv`.

    Raises:
        UsageError: the data set cannot be found, or is not in the published format.
    """

    data_set: ClassVar[DataSet]

    def __init__(self, *, data: str | os.PathLike[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._data = data
        self._all: list[CodeTask] | None = None

    def load_code_tasks(self, split: str) -> list[CodeTask]:
        """The tasks of ``split``: ``all`` is the whole benchmark."""
        if self._all is None:
            path = locate(self.data_set, self._data)
            tasks = []
            for number, row in read_jsonl(path):
                try:
                    tasks.append(self._code_task(row))
                except (LookupError, TypeError, AttributeError, ValueError, SyntaxError) as error:
                    raise UsageError(
                        f"{path}, line {number}: not in the format of {self.data_set.name}: "
                        f"{type(error).__name__} {error}"
                    ) from None
            self._all = tasks
        return [t for t in self._all if self._in_split(t, split)]

    def _in_split(self, task: CodeTask, split: str) -> bool:
        return in_split(task.problem.id, split)

    @abc.abstractmethod
    def _code_task(self, row: dict[str, Any]) -> CodeTask:
        """A task from a line of the data set."""


class HumanEval(_Benchmark):
    """HumanEval: 164 functions to complete from their signature and docstring.

    All tests are hidden; the prompt's own examples are part of the docstring.
    """

    data_set = HUMANEVAL
    instruction: ClassVar[str] = (
        "Reply with the whole function, its imports and helpers included, in one code block "
        "fenced by ```python and ```."
    )

    def _code_task(self, row: dict[str, Any]) -> CodeTask:
        entry = _text(row, "entry_point")
        cases = assert_cases(
            _body_of_check(_text(row, "test")), entry, setup=_helpers(_text(row, "prompt"), entry)
        )
        plain = isinstance(cases[0], CallCase)
        tests = [Test(c, public=False) for c in cases]
        return _function_task(row, tests, entry, checker=Equal() if plain else None)


def _function_task(row: dict[str, Any], tests: Any, entry: str, **given: Any) -> CodeTask:
    prompt = _text(row, "prompt")
    load = tests if callable(tests) else (lambda: tests)
    return CodeTask(
        problem=Problem(
            _task_id(row["task_id"]),
            load,
            entry=entry,
            # Names that the signature uses, for programs that leave the given lines out.
            prelude=_imports(prompt),
            solution=prompt + _text(row, "canonical_solution"),
            **given,
        ),
        prompt="Complete this function.",
        starter_code=prompt,
        metadata={"entry_point": entry},
        aliases=_published(row),
    )


def _task_id(value: Any) -> str:
    """``HumanEval/3`` as ``humaneval-3``; MBPP has plain numbers, floats after some exports."""
    if isinstance(value, str) and "/" in value:
        return value.lower().replace("/", "-")
    return f"mbpp-{int(value)}"


def _published(row: dict[str, Any]) -> tuple[str, ...]:
    """The ids that the field calls a task by."""
    name, _, number = _task_id(row["task_id"]).rpartition("-")
    if name == "mbpp":
        return f"Mbpp/{number}", f"MBPP/{number}", f"mbpp/{number}", number
    return f"HumanEval/{number}", f"humaneval/{number}"


def _text(row: dict[str, Any], name: str) -> str:
    """A field that must be text: null would be posed as "None"."""
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r:.50}; it must be a string")
    return value


def _listed(value: Any) -> list[Any]:
    """A list, also where an export wrote null for an empty one, or a JSON string."""
    value = [] if value is None else nested_json(value)
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.50} is no list")
    return value


def _texts(value: Any) -> list[str]:
    """A list of strings: null or NaN in it would be run as a program's line."""
    found = _listed(value)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"test {i} is {text!r:.50}; it must be a string")
    return found


class MBPP(_Benchmark):
    """MBPP: 974 small functions, each told in a sentence and three asserts.

    The asserts are in the prompt, as in the paper, and public; ``challenge_test_list`` is hidden.
    Four tasks are left out (:data:`UNGRADABLE`): their asserts hand the program objects that cannot
    leave its sandbox.
    Splits are the paper's: ``test`` ids 11 to 510, ``eval`` 511 to 600, ``train`` 601 to 974.
    """

    splits = ("train", "eval", "test")
    eval_split = "test"
    data_set = MBPP_DATA
    dealt = "ids 11 to 510 are test, 511 to 600 eval, 601 to 974 train; take another split, or file"

    def _in_split(self, task: CodeTask, split: str) -> bool:
        number = int(task.problem.id.rpartition("-")[2])
        if number in UNGRADABLE:
            return False
        first, last = {"test": (11, 510), "eval": (511, 600), "train": (601, 974)}[split]
        return first <= number <= last

    def _code_task(self, row: dict[str, Any]) -> CodeTask:
        asserts = [t.strip() for t in _texts(row["test_list"])]
        challenge = _texts(row.get("challenge_test_list"))
        code = _text(row, "code").replace("\r\n", "\n")
        entry = called(asserts, _defined(code))
        setup = "import sys\n" + str(row.get("test_setup_code") or "")
        tests = []
        for source, public in ((asserts, True), (challenge, False)):
            for case in assert_cases("\n".join(source), entry, setup=setup):
                tests.append(Test(case, public=public))
        if len({type(t.case) for t in tests}) > 1:  # a program runs one kind of test
            tests = [
                Test(case, public=public)
                for source, public in ((asserts, True), (challenge, False))
                for case in assert_cases("\n".join(source), entry, setup=setup, plain=False)
            ]
        shown = "\n".join(asserts)
        return CodeTask(
            problem=Problem(
                _task_id(row["task_id"]),
                lambda: tests,
                entry=entry,
                solution=code,
                checker=Equal() if isinstance(tests[0].case, CallCase) else None,
            ),
            prompt=f"{_text(row, 'text')}\n\nThe program must pass these tests:\n"
            f"```python\n{shown}\n```",
            metadata={"entry_point": entry},
            aliases=_published(row),
        )


UNGRADABLE = (367, 533, 601, 927)
"""MBPP's tasks whose asserts build objects of the program's own classes, or hand it a type."""


class _Plus(_Benchmark):
    """EvalPlus: inputs, and a canonical solution that says what is right for them."""

    default_limits: ClassVar[Limits] = Limits(cpu_s=4, wall_s=12, memory_mb=512, output_kb=1024)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._known: dict[str, list[Any]] = {}

    def _inputs(self, row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        return _listed(row["base_input"]), _listed(row["plus_input"])

    def _results(self, row: dict[str, Any], public: bool) -> list[Test]:
        base, plus = self._inputs(row)
        inputs = [*base, *plus]
        if row["task_id"] not in self._known:
            known = _expected(row, inputs, self._open_pool, self.limits)
            self._known[row["task_id"]] = known
        expected = self._known[row["task_id"]]
        return [
            Test(CallCase(tuple(args), value), public=public and i < len(base))
            for i, (args, value) in enumerate(zip(inputs, expected, strict=True))
            if value is not MISSING
        ]


NOT_COMPARABLE = ("check_str", "text_match_three", "text_starta_endb")
"""MBPP+'s functions that return a match object."""


class HumanEvalPlus(_Plus):
    """HumanEval+: HumanEval's 164 functions with EvalPlus's many more inputs."""

    data_set = HUMANEVAL_PLUS
    instruction = HumanEval.instruction

    def _code_task(self, row: dict[str, Any]) -> CodeTask:
        entry = _text(row, "entry_point")
        checker: Checker = Oracle(entry, _atol(row))
        load = functools.partial(self._results, row, False)
        return _function_task(row, load, entry, checker=checker)


class MBPPPlus(_Plus):
    """MBPP+: MBPP's functions with EvalPlus's many more inputs. Base inputs are public.

    Three tasks are left out (:data:`NOT_COMPARABLE`): their functions return match objects. Inputs
    on which the canonical solution itself fails within the limits are left out, too.
    """

    data_set = MBPP_PLUS

    def _in_split(self, task: CodeTask, split: str) -> bool:
        left_out = task.problem.entry in NOT_COMPARABLE
        return not left_out and super()._in_split(task, split)

    def _code_task(self, row: dict[str, Any]) -> CodeTask:
        entry = _text(row, "entry_point")
        prompt = _text(row, "prompt")
        return CodeTask(
            problem=Problem(
                _task_id(row["task_id"]),
                functools.partial(self._results, row, True),
                entry=entry,
                solution=_text(row, "canonical_solution"),
                checker=Oracle(entry, _atol(row), _order(prompt, entry)),
            ),
            prompt=re.sub(r'\A"""\n|\n"""\s*\Z', "", prompt),
            metadata={"entry_point": entry},
            aliases=_published(row),
        )

    def _inputs(self, row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        return typed_inputs(row)


# --- asserts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Equal:
    """Python's ``==``, as the benchmarks' own asserts compare."""

    partwise: ClassVar[bool] = True

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`rlrf.sandbox.Checker`."""
        assert isinstance(case, CallCase)
        return raw.result is not MISSING and bool(raw.result == case.expected)


def assert_cases(source: str, entry: str, *, setup: str = "", plain: bool = True) -> list[Case]:
    """Asserts as cases.

    Args:
        source: asserts, or any statements that raise if the program is wrong.
        entry: the function they are about, which they may also call ``candidate``.
        setup: what must run before them.
        plain: turn asserts that compare a call on literals with a literal into
            :class:`rlrf.sandbox.CallCase`; if not all are of that kind, none is.

    Raises:
        ValueError: the source is no Python.
    """
    body = parse(source).body
    if not body:
        return []
    if plain:
        calls = [_as_call(node, entry) for node in body if not _trivial(node)]
        if calls and None not in calls:
            return [call for call in calls if call is not None]
    if all(isinstance(node, ast.Assert) for node in body):
        lines = [ast.unparse(node) for node in body if not _trivial(node)]
        return [AssertCase(line, setup=setup) for line in lines]
    return [AssertCase(ast.unparse(ast.Module(body, [])), setup=setup)]


def _trivial(node: ast.stmt) -> bool:
    """``assert True``, which HumanEval has many of."""
    return (
        isinstance(node, ast.Assert)
        and isinstance(node.test, ast.Constant)
        and node.test.value is True
    )


def _as_call(node: ast.stmt, entry: str) -> CallCase | None:
    """``assert f(literals) == literal`` as a case, or None."""
    if not isinstance(node, ast.Assert):
        return None
    test = node.test
    if isinstance(test, ast.Tuple) and len(test.elts) == 2:  # assert (a == b, "message")
        return None
    call: ast.expr
    try:
        match test:
            case ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[right]):
                expected = ast.literal_eval(right)
            case ast.UnaryOp(op=ast.Not(), operand=ast.Call()):
                return None  # truth, not equality with False
            case _:
                return None
        named = isinstance(call.func, ast.Name) and call.func.id in (entry, "candidate")
        if not named or call.keywords:
            return None
        return CallCase(tuple(ast.literal_eval(a) for a in call.args), expected)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None


def _body_of_check(test: str) -> str:
    """The statements of HumanEval's ``check(candidate)``, and what stands before it."""
    tree = parse(test)
    before: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            return ast.unparse(ast.Module([*before, *node.body], []))
        metadata = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METADATA"
        if not metadata:
            before.append(node)
    raise ValueError("its test defines no check(candidate)")


def _helpers(prompt: str, entry: str) -> str:
    """What a prompt defines beside the function that is asked for; three tests use it."""
    body = [
        n
        for n in parse(prompt + "    pass\n").body
        if not (isinstance(n, ast.FunctionDef) and n.name == entry)
    ]
    return ast.unparse(ast.Module(body, []))


def _imports(prompt: str) -> str:
    try:
        body = parse(prompt + "    pass\n").body
    except SyntaxError:
        return ""
    return "\n".join(ast.unparse(n) for n in body if isinstance(n, (ast.Import, ast.ImportFrom)))


def _defined(code: str) -> list[str]:
    return [n.name for n in parse(code).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]


def called(asserts: Sequence[str], defined: Sequence[str]) -> str:
    """The function of ``defined`` that the asserts call.

    Raises:
        ValueError: they call none of them.
    """
    names = [
        n.func.id
        for source in asserts
        for n in ast.walk(parse(source))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    for name in names:
        if name in defined:
            return name
    raise ValueError(f"its asserts call none of {', '.join(defined)}")


# --- EvalPlus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Oracle:
    """EvalPlus's rule: equal, or for floats close (relative 1e-7, absolute ``atol``).

    HumanEval's ``find_zero`` is right at any root; ``are_equivalent`` and ``sum_div`` of MBPP are
    compared like the rest (EvalPlus also accepts a constant there).

    Attributes:
        entry: the function.
        atol: absolute tolerance; 0 for 1e-6 where floats are expected, else exact.
        order: whether results are compared as they are, sorted, or as sets.
    """

    entry: str
    atol: float
    order: Literal["as is", "sorted", "set"] = "as is"

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`rlrf.sandbox.Checker`."""
        assert isinstance(case, CallCase)
        got, wanted = raw.result, case.expected
        if got is MISSING:
            return False
        if self.entry == "find_zero":
            return _is_root(case.args[0], got, self.atol or 1e-4)
        if self.order != "as is" and isinstance(got, (list, tuple, set)):
            try:
                if self.order == "set":
                    # First, as a set of what came out may be made to collide.
                    known = set(wanted)
                    return all(v in known for v in got) and len(set(got)) == len(known)
                got, wanted = sorted(got), sorted(wanted)
            except TypeError:  # elements that cannot be ordered or hashed
                return False
        if got == wanted:
            return True
        atol = self.atol or (1e-6 if _floats(wanted) else 0.0)
        return bool(atol) and _close(got, wanted, atol)


def _atol(row: dict[str, Any]) -> float:
    value = float(row["atol"] or 0)
    if not 0 <= value < math.inf:
        raise ValueError(f"atol is {value!r}; it must be a finite number >= 0")
    return value


def _order(prompt: str, entry: str) -> Literal["as is", "sorted", "set"]:
    """How the asserts in a prompt of MBPP+ compare: ``set(f(...)) == ...`` means in any order."""
    if re.search(rf"assert\s+set\(\s*{re.escape(entry)}\(", prompt):
        return "set"
    return "sorted" if re.search(rf"assert\s+sorted\(\s*{re.escape(entry)}\(", prompt) else "as is"


def _floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, float) for v in value)
    return isinstance(value, float)


def _close(got: Any, wanted: Any, atol: float) -> bool:
    if isinstance(wanted, (list, tuple)):
        return (
            isinstance(got, (list, tuple))
            and len(got) == len(wanted)
            and all(_close(a, b, atol) for a, b in zip(got, wanted, strict=True))
        )
    if not all(isinstance(v, (int, float, complex)) for v in (got, wanted)):
        return bool(got == wanted)
    try:
        if not (abs(got) < math.inf and abs(wanted) < math.inf):  # near them everything is
            return bool(got == wanted or (got != got and wanted != wanted))
        return bool(abs(got - wanted) <= atol + 1e-7 * abs(wanted))
    except OverflowError:
        return False


def _is_root(coefficients: Any, x: Any, atol: float) -> bool:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return False
    try:
        return bool(abs(sum(c * math.pow(x, i) for i, c in enumerate(coefficients))) <= atol)
    except (OverflowError, ValueError):
        return False


def typed_inputs(row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """MBPP+'s inputs, with the types that JSON has lost.

    The asserts of a task are Python and name the base inputs with their types: tuples, sets,
    complex numbers. Where a value stands as a list in JSON and as a tuple in the assert, it is one
    in all inputs of the task.
    """
    base, plus = _listed(row["base_input"]), _listed(row["plus_input"])
    known = list(_assert_arguments(str(row["assertion"]), str(row["entry_point"])))
    shapes: list[Any] = []
    for i in range(max(map(len, [*base, *plus]), default=0)):
        literal = [args[i] for args in known if i < len(args)]
        shape: Any = None
        for value in literal:
            shape = _merge(_shape(value), shape)
        written = all(len(args) <= i or isinstance(args[i], str) for args in [*base, *plus])
        if literal and written and not any(isinstance(value, str) for value in literal):
            shape = complex  # numbers that JSON cannot hold stand in it as text
        shapes.append(shape)
    return [_cast_all(i, shapes) for i in base], [_cast_all(i, shapes) for i in plus]


def _assert_arguments(source: str, entry: str) -> Iterator[list[Any]]:
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == entry:
            try:
                yield [ast.literal_eval(a) for a in node.args]
            except ValueError:
                continue


# A shape is None (leave the value alone), complex, or (container type, shape inside).


def _shape(value: Any) -> Any:
    if isinstance(value, (list, tuple, set, frozenset)):
        inner: Any = None
        for item in value:
            inner = _merge(_shape(item), inner)
        return type(value), inner
    if isinstance(value, dict):
        inner = key = None
        for k, v in value.items():
            inner, key = _merge(_shape(v), inner), _merge(_shape(k), key)
        return dict, inner, key
    return None


def _merge(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tuple) and isinstance(b, tuple) and a[0] is b[0]:
        return (a[0], *(_merge(x, y) for x, y in zip(a[1:], b[1:], strict=True)))
    return a


def _cast_all(args: list[Any], shapes: list[Any]) -> list[Any]:
    return [_cast(a, shapes[i] if i < len(shapes) else None) for i, a in enumerate(args)]


def _cast(value: Any, shape: Any) -> Any:
    if shape is complex and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return complex(value)
    if not isinstance(shape, tuple):
        return value
    if shape[0] is dict and isinstance(value, dict):
        return {k: _cast(v, shape[1]) for k, v in value.items()}
    if isinstance(value, list) and shape[0] is not dict:
        inner = shape[1]
        if inner is not None and inner[0] is shape[0] and inner[1] is None:
            inner = shape  # nested in its own kind: inputs may go deeper than the asserts do
        return shape[0](_cast(v, inner) for v in value)
    return value


def _expected(row: dict[str, Any], inputs: list[Any], pool: Any, limits: Limits) -> list[Any]:
    """What the canonical solution gives; :data:`MISSING` where it fails."""
    code = str(row["prompt"]) + str(row["canonical_solution"])
    if f"def {row['entry_point']}" in str(row["canonical_solution"]):
        code = str(row["canonical_solution"])
    opened: SandboxPool = pool()
    generous = Limits(
        cpu_s=4 * limits.cpu_s,
        wall_s=4 * limits.wall_s,
        memory_mb=limits.memory_mb,
        output_kb=limits.output_kb,
    )
    report = opened.run_sync(
        Program(code, entry=str(row["entry_point"])),
        [CallCase(tuple(args), None) for args in inputs],
        limits=generous,
        checker=_Anything(),
        stop="never",
    )
    results = [c.raw.result if c.raw is not None else MISSING for c in report.cases]
    if report.verdict is Verdict.COMPILE_ERROR or all(r is MISSING for r in results):
        raise InfraError(
            f"the canonical solution of {row['task_id']} gives no result in the sandbox",
            kind="no_reference",
            retryable=False,
        )
    return results


@dataclass(frozen=True)
class _Anything:
    def accepts(self, raw: RawRun, case: Case) -> bool:
        return True
