"""The code environments' common ground: task files, feedback, memory, data sets, benchmarks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import httpx
import pytest

import rlrf
from rlrf import UsageError
from rlrf.sandbox import (
    MISSING,
    AssertCase,
    CallCase,
    Exact,
    Limits,
    Lines,
    ProgramError,
    RawRun,
    Returns,
    StdinCase,
    Text,
    Tokens,
    Verdict,
)
from rlrf_environments.code import sdpo_compat, sources
from rlrf_environments.code.answers import MANY_ANSWERS
from rlrf_environments.code.explain import Failure, Test, explain
from rlrf_environments.code.extract import Attempt, extract, missing_entry
from rlrf_environments.code.humaneval import Oracle, assert_cases, typed_inputs
from rlrf_environments.code.sources import DataSet, locate
from tests import code_data
from tests.code_data import code_tasks, write_jsonl

needs_sandbox = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")


def block(code: str) -> str:
    return f"```python\n{code}\n```\n"


# --- task files -------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path):
    def write(*changes, **options):
        rows = [{**code_tasks()[i], **change} for i, change in enumerate(changes or ({},))]
        return rlrf.make("code-v0", data=write_jsonl(tmp_path / "t.jsonl", rows), **options)

    return write


ONE = {"stdin": "1\n", "expected": "2\n"}
CALL = {"args": [1], "expected": 2}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"id": 3}, "line 1: id: Input should be a valid string"),
        ({"prompt": ""}, "line 1: prompt: "),
        ({"tests": []}, "line 1: tests: "),
        ({"tests": [{"stdin": "1"}]}, r"line 1: tests\.0\.expected: Field required"),
        ({"tests": [ONE, {"expected": 1}]}, r"tests\.1: give either 'stdin' or 'args'"),
        ({"tests": [{**ONE, "args": [1]}]}, r"tests\.0: give either"),
        ({"tests": [{"stdin": "1", "expected": 2}]}, "'expected' is 2; .* must be a string"),
        ({"tests": [CALL]}, r"tests\.0 has 'args', which needs an 'entry_point'"),
        ({"entry_point": "f"}, r"tests\.0 has 'stdin', which needs no 'entry_point'"),
        ({"tests": [{**ONE, "pubic": True}]}, r"tests\.0\.pubic: Extra inputs"),
        ({"soluton": ""}, "line 1: soluton: Extra inputs"),
        ({"split": "dev"}, "line 1: split: "),
        ({"limits": {"cpu": 1}}, r"limits\.cpu: unknown; limits are cpu_s, "),
        ({"limits": {"cpu_s": -1}}, r"line 1: Limits\.cpu_s is -1"),
        ({"checker": "returns"}, "line 1: checker: 'returns' is unknown for a stdin task"),
        ({"checker": {"name": "exact", "tolerance": 0.1}}, "'exact' takes no tolerance"),
        ({"checker": {"name": "tokens", "tolerance": -1}}, r"checker\.tolerance: .*greater"),
        ({"limits": {"memory_mb": 1.5}}, r"Limits\.memory_mb is 1\.5; it must be a whole"),
        ({"limits": {"memory_mb": float("inf")}}, r"Limits\.memory_mb is inf"),
        ({"limits": {"cpu_s": True}}, r"Limits\.cpu_s is True"),
        ({"entry_point": "1 bad", "tests": [CALL]}, r"line 1: Program\.entry is '1 bad'"),
        ({"entry_point": "a.b.c", "tests": [CALL]}, r"Program\.entry is 'a\.b\.c'"),
        ({"id": " "}, "line 1: id: must be printable and not blank"),
        ({"id": "a\nb"}, "line 1: id: must be printable"),
    ],
)
def test_a_wrong_task_is_told_by_file_line_and_field(tasks, change, why):
    with pytest.raises(UsageError, match=r"t\.jsonl.*" + why):
        len(tasks(change).tasks("all"))


def test_files_that_are_no_task_files(tmp_path):
    file = tmp_path / "t.jsonl"
    for text, why in (
        ("", "holds no task"),
        ("\n\n[1]", "line 3: a JSON object is expected"),
        ("{", "line 1: no JSON"),
        (json.dumps(code_tasks()[0]) + "\n" + json.dumps(code_tasks()[0]), "is taken by line 1"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=why):
            len(rlrf.make("code-v0", data=file).tasks())
    file.write_text("[" * 100_000)
    with pytest.raises(UsageError, match="line 1: no JSON"):
        len(rlrf.make("code-v0", data=file).tasks())
    file.write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03corrupt")
    with pytest.raises(UsageError, match="cannot read"):
        len(rlrf.make("code-v0", data=file).tasks())
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read"):
        len(rlrf.make("code-v0", data=file).tasks())
    with pytest.raises(UsageError, match="there is no such file"):
        rlrf.make("code-v0", data=tmp_path / "no")
    with pytest.raises(UsageError, match="needs data=FILE"):
        rlrf.make("code-v0")


def test_a_split_without_tasks_says_how_tasks_come_into_splits(tasks, tmp_path):
    env = tasks({"id": "c"})  # by its hash: eval
    with pytest.raises(UsageError) as error:
        env.tasks()[0]
    assert "no task in split 'train' (of its tasks: train 0, eval 1, all 1)" in str(error.value)
    for remedy in ("field 'split'", "20% to eval", "split='all'"):
        assert remedy in str(error.value)
    with pytest.raises(UsageError, match=r"eval 0, all 1.*field 'split'"):
        len(tasks({"split": "train"}).tasks("eval"))
    file = code_data.write_jsonl(tmp_path / "m.jsonl", [code_data.mbpp(11)])
    with pytest.raises(UsageError, match=r"train 0, eval 0, test 1.*601 to 974 train"):
        len(rlrf.make("mbpp-v0", data=file).tasks("train"))


def test_splits_by_word_and_by_hash(tasks):
    env = tasks(*({"split": "eval" if i < 3 else "train"} for i in range(12)))
    assert [len(env.tasks(s)) for s in env.splits] == [9, 3, 12]
    env = tasks(*({} for _ in range(12)))
    train, held_out = set(env.tasks("train").ids()), set(env.tasks("eval").ids())
    assert train
    assert held_out
    assert not train & held_out
    assert len(train | held_out) == 12


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tests": "hidden"}, "tests is 'hidden'"),
        ({"renderer": "x"}, "renderer is 'x'; it must be one of rlrf, sdpo-compat"),
        ({"explain_failures": 0}, "explain_failures is 0"),
        ({"explain_failures": 2}, "set run_all=True"),
        ({"remember": -1}, "remember is -1"),
        ({"limits": {"cpu_s": 0}}, r"Limits\.cpu_s is 0"),
        ({"limits": {"cpu": 1}}, r"limits\.cpu: unknown; limits are cpu_s"),
        ({"limits": 5}, "limits is 5; it must be a mapping"),
        ({"explain_failures": "2"}, "explain_failures is '2'"),
        ({"slots": 0}, "slots is 0; it must be a whole number from 1 to 4096"),
        ({"slots": 10**11}, "slots is 100000000000; it must be a whole number from 1 to 4096"),
        ({"quote": "no"}, "quote is 'no'; it must be true or false"),
        ({"checkers": 5}, "checkers is 5; it must be a mapping of names to checkers"),
        ({"checkers": {"even": 5}}, "checkers is {'even': 5}; it must be a mapping"),
    ],
)
def test_wrong_options(tasks, options, why):
    with pytest.raises(UsageError, match=why):
        tasks(**options)


@pytest.mark.slow
@needs_sandbox
def test_own_checkers_limits_and_starter_code(tasks, caplog):
    env = tasks(
        {"checker": "even", "starter_code": "n = int(input())"},
        {"checker": {"name": "tokens", "tolerance": 0.1}},
        {"limits": {"cpu_s": 1, "processes": 4}},
        {
            "tests": [{"args": [1], "expected": 1.5}],
            "entry_point": "f",
            "checker": {"name": "returns", "tolerance": 0.01},
        },
        {"tests": [CALL], "entry_point": "f", "checker": "near"},
        checkers={
            "even": lambda text, case: int(text) % 2 == 0,
            "near": lambda result, case: abs(result - case.expected) < 5,
        },
    )
    assert "n = int(input())" in env.tasks("all")[0].messages[0]["content"]
    assert env.grade("double-0", block("print(44)")).reward == 1.0
    assert env.grade("double-0", block("print(43)")).reward == 0.0
    assert env.grade("double-1", block("print(2 * int(input()) + 0.05)")).reward == 1.0
    late = env.grade("double-2", block("while True: pass"))
    assert "time limit of 1 s" in late.feedback.text
    assert env.grade("double-3", block("def f(n): return 1.501")).reward == 1.0
    assert env.grade("double-4", block("def f(n): return 6")).reward == 1.0
    for code in ("def f(n): return 'x'", "def f(n):\n    import os\n    os._exit(0)"):
        wrong = env.grade("double-4", block(code))  # what the checker cannot read is wrong
        assert (wrong.reward, wrong.feedback[0].kind) == (0.0, "wrong_answer")
    assert env.grade("double-0", block("print('x')")).reward == 0.0
    assert "raised ValueError" in caplog.text  # "even" could not read it
    env.close()


# --- feedback ---------------------------------------------------------------------------------


def told(
    case,
    verdict=Verdict.WRONG_ANSWER,
    *,
    public=True,
    quote=False,
    code="x = 1\n",
    checker=None,
    **raw,
):
    failure = Failure(1, Test(case, public), verdict, RawRun(**{"cpu_s": 4.0, **raw}))
    return explain(Attempt(code), failure, Limits(), checker, quote=quote)


STDIN, LINES = StdinCase("1\n", "Yes\n"), StdinCase("1", "a b\nc 4 e\n")


@pytest.mark.parametrize(
    ("case", "out", "words"),
    [
        (STDIN, b"YES\n", "only in upper and lower case"),
        (STDIN, b"Y e s", "only in white space"),
        (STDIN, b"Enter:\nYes\n", "there are other lines: print no more"),
        (STDIN, b"Answer: Yes\n", "with other words: print it alone"),
        (StdinCase("1", "0.33333"), b"0.33334", "nearly right: mind rounding"),
        (STDIN, b"", "Output:\n(nothing)"),
        (LINES, b"a b\nc d e\n", "first difference is in line 2 of the output, word 2."),
        (LINES, b"a b\n", "The output has 1 lines, 2 are expected."),
        (LINES, b"x\nc 4 e", "first difference is in line 1 of the output, word 1."),
    ],
)
def test_what_an_output_gets_wrong(case, out, words):
    (segment,) = told(case, stdout=out)
    assert words in segment.text


def test_the_lines_that_differ_are_shown_even_where_the_output_is_cut():
    wanted = "\n".join(map(str, range(1000)))
    (segment,) = told(StdinCase("", wanted), stdout=wanted.replace("\n500\n", "\nx\n").encode())
    assert "in line 501 of the output.\nThat line: x\nExpected: 500" in segment.text
    assert len(segment.text) < 1400


@pytest.mark.parametrize(
    ("wanted", "got", "out", "words"),
    [
        (7, None, b"", "returned None: a path through it has no return"),
        (7, None, b"7\n", "prints the right answer instead of returning it"),
        (7, "7", b"", "returned as a string, not as an int"),
        (7, [7], b"", "returned a list, not an int"),
        ([1, 2], [2, 1], b"", "elements are right, but their order is not"),
        ("Ab", "aB", b"", "only in upper and lower case"),
        (0.5, 0.50001, b"", "nearly right: mind rounding"),
        ([[1], [2, 3]], [[1], [2, 4]], b"", "The first difference is at [1][1] of the result."),
        ([1, 2, 3], [1, 2], b"", "at [2] of the result"),
        ({"a": 1}, {"a": 2}, b"", "at ['a'] of the result"),
        ({"a": 1}, {}, b"", "at ['a'] of the result"),
        (7, MISSING, b"x", "(nothing: the program ended early)"),
        pytest.param(10**5000, 1, b"", "Expected:\n0x", id="huge"),
        ({3, 1}, {2}, b"", "Expected:\n{1, 3}"),
    ],
)
def test_what_a_result_gets_wrong(wanted, got, out, words):
    (segment,) = told(CallCase((1,), wanted), result=got, stdout=out)
    assert words in segment.text


def test_hidden_tests_are_hinted_at_but_not_shown():
    case = StdinCase("1", "a secret answer of some length")
    first, last = told(case, public=False, stdout=b"A SECRET ANSWER OF SOME LENGTH")
    assert first.text == (
        "The answer is wrong on a hidden test. It differs from the right answer only in upper "
        "and lower case."
    )
    assert last.reveals == "expected"
    assert "a secret answer" in last.text


def test_lines_are_quoted_only_when_asked():
    code = "def f(n):\n    return g(n)\n\n\nf(1)\n"
    error = ProgramError("NameError", "no g", ((5, "<module>"), (2, "f")), 2)
    for quote in (False, True):
        what, where = told(
            STDIN, Verdict.RUNTIME_ERROR, code=code, quote=quote, error=error, exit_code=1
        )
        assert "return g" not in what.text
        assert where.text.startswith("Line 2 in f of the program, called from line 5.")
        assert ("\n  return g(n)\n  f(1)" in where.text) is quote
    error = ProgramError("SyntaxError", "invalid syntax", (), 2, 12)
    _, where = told(
        STDIN, Verdict.COMPILE_ERROR, code=code, quote=True, error=error, compile_error=True
    )
    assert where.text == "Line 2 of the program, column 12.\n    return g(n)\n           ^"


@pytest.mark.parametrize(
    ("case", "verdict", "words"),
    [
        (StdinCase("1 2\n3\n", ""), Verdict.TIME_LIMIT, "Its input has 6 characters in 2 lines."),
        (CallCase(([1, 2],), 3), Verdict.MEMORY_LIMIT, "Its input has 6 characters."),
        (AssertCase("assert f(1)"), Verdict.TIME_LIMIT, "CPU time was exceeded on a public test."),
    ],
)
def test_limits_tell_the_size_of_the_input(case, verdict, words):
    (segment,) = told(case, verdict)
    assert words in segment.text


def test_too_much_output_shows_how_it_begins():
    (segment,) = told(STDIN, Verdict.OUTPUT_LIMIT, stdout=b"again\n" * 99999)
    assert "The output begins:\nagain\nagain" in segment.text


def test_of_asserts_the_failing_one_is_told():
    case = AssertCase("assert f(1) == 2")
    (segment,) = told(case, assertion=ProgramError("AssertionError", ""))
    assert segment.text == "The answer is wrong on a public test.\nThe test:\nassert f(1) == 2"
    (segment,) = told(case, assertion=ProgramError("TypeError", "None < 1"))
    assert "the test's own code raised TypeError: None < 1." in segment.text


def test_addresses_and_control_characters_are_made_plain():
    (segment,) = told(STDIN, stdout=b"<map object at 0x7f78b8d109d0>\x00")
    assert "Output:\n<map object at 0x...>\\x00\nExpected" in segment.text
    assert "0x7f78" not in sdpo((STDIN, WRONG, {"stdout": b"<x at 0x7f78b8d109d0>"})).text
    (segment,) = told(CallCase((), 1), result="<f at 0x7f78b8d109d0>")
    assert "at 0x...>" in segment.text
    (segment,) = told(CallCase((), {"b": {3, "c"}}), result=[({"c", 3},)])
    assert "Returned:\n[({'c', 3},)]\nExpected:\n{'b': {'c', 3}}" in segment.text
    (segment,) = told(STDIN, stdout=b"0x7f78b8d109d0")  # an answer, not an address
    assert "0x7f78b8d109d0" in segment.text


def test_what_an_exit_said_and_what_could_not_be_called():
    (segment,) = told(STDIN, Verdict.RUNTIME_ERROR, exit_code=1, stderr=b"no more\n")
    assert "exited with 1 on a public test. It wrote to standard error:\nno more" in segment.text
    error = ProgramError("NameError", "name 'f' is not defined")
    (segment,) = told(CallCase((), 1), Verdict.RUNTIME_ERROR, error=error, exit_code=1)
    assert "could not be called on a public test: NameError: name 'f'" in segment.text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def F(x): ...\ndef zzz(): ...", "'F'; rename it"),
        ("def zzz(): ...\ndef helper(): ...", "function 'f'."),
        ("def solve(x): ...", "'solve'; rename it"),
    ],
)
def test_only_what_may_be_meant_is_named(code, words):
    assert words in missing_entry(Attempt(code), "f").text


def test_who_waits_is_not_told_to_be_faster():
    (segment,) = told(STDIN, Verdict.TIME_LIMIT, cpu_s=0.01)
    assert "did not end within 12 s" in segment.text
    assert "it waits for something" in segment.text


def test_a_result_that_cannot_travel_is_told_as_that():
    error = ProgramError("TypeError", "a value of the type Fraction cannot be compared")
    (segment,) = told(CallCase((1,), 1), Verdict.RUNTIME_ERROR, error=error, exit_code=1)
    assert "a value of the type Fraction cannot be compared. Return plain numbers" in segment.text
    assert "raised" not in segment.text


@pytest.mark.parametrize(
    ("checker", "out", "wanted", "where"),
    [
        (Lines(), "1.0\n 2\n4", "1\n2\n3", "in line 3"),
        (Tokens(0.01), "1.001\n2.0\n4", "1.0\n2.0\n3.0", "in line 3"),
        (Text(), "1.0\n2", "1\n2", "in line 1"),
        (Exact(), "1 \n2", "1\n2", "in line 1"),
        (MANY_ANSWERS["arc185_c"], "1\n2", "3\n4", None),
    ],
)
def test_the_first_difference_is_by_the_rule_that_judged(checker, out, wanted, where):
    (segment,) = told(StdinCase("", wanted), stdout=out.encode(), checker=checker)
    assert ("first difference" in segment.text) is (where is not None)
    assert where is None or f"The first difference is {where} of the output" in segment.text
    assert ("One right answer:" in segment.text) is (where is None)


@pytest.mark.parametrize(
    ("checker", "got", "wanted", "where"),
    [
        (None, [(1, 2), (3, 5)], [[1, 2], [3, 4]], "[1][1]"),
        (Returns(0.01), [1.001, 3.0], [1.0, 2.0], "[1]"),
        (None, [[True, 2]], [[1, 2]], "[0][0]"),
        (MANY_ANSWERS["find-the-peaks"], [1], [2], None),
    ],
)
def test_the_first_element_that_differs_is_by_the_rule_that_judged(checker, got, wanted, where):
    (segment,) = told(CallCase((), wanted), result=got, checker=checker)
    assert ("first difference" in segment.text) is (where is not None)
    assert where is None or f"first difference is at {where} of the result" in segment.text


def test_only_white_space_at_the_end():
    (segment,) = told(StdinCase("", "4\n"), stdout=b"4", checker=Exact())
    assert "only in white space" in segment.text
    assert "upper" not in segment.text
    assert "lines" not in segment.text.partition("Expected")[2]


def test_blocks():
    two = "```python\nlong one\n```\n```\nx\n```"
    assert extract(two, "last").code == "x\n"
    assert extract(two).blocks == 2
    assert extract("").span is None
    assert extract("").kind == extract("", "last").kind == "format_error"
    assert extract("so ```python\nx", "last").kind == "truncated_attempt"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("Answer: ```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```python\nprint(1)```", "print(1)"),
        ("1. code\n   ```python\n   if 1:\n       x\n   ```\n", "if 1:\n    x\n"),
        ("use ``` as a fence:\n```\nx\n```", "x\n"),
        ("~~~python\ny\n~~~", "y\n"),
        ("```python\ns = '```'\n```\n", "s = '```'\n"),
        ("```python\na\x0cb\u2028c\n```", "a\x0cb\u2028c\n"),
        ("```\r\nx\r\n```\r\n", "x\r\n"),
        ("I reply in a block fenced by ```python and ```.\n\n```python\nx = 1\n```", "x = 1\n"),
        ("It starts with ```\n```python\nx = 1\n```", "x = 1\n"),
        ("about ~~~\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\n# ends in ```\nx = 1\n```", "# ends in ```\nx = 1\n"),
    ],
)
def test_fences_as_models_write_them(completion, code):
    attempt = extract(completion)
    assert attempt.code == code
    line = attempt.line(1)
    assert completion[slice(*attempt.line_span(1))] == line.strip()


def test_lines_are_counted_as_python_counts_them():
    code = "x = 1\n\x0c\ny = 2 # \u2028 \x85 \x1c\nraise ValueError\n"
    assert Attempt(code).line(4) == "raise ValueError"
    assert code[slice(*Attempt(code).line_span(4))] == "raise ValueError"
    indented = extract("- so:\n  ```\n  a = 1\n    b\n  ```")
    assert indented.code == "a = 1\n  b\n"
    assert "- so:\n  ```\n  a = 1\n    b\n  ```"[slice(*indented.line_span(2))] == "b"


def test_programs_with_any_kind_of_definition_are_run():
    dynamic = ("exec('def f(x): pass')", "globals()['f'] = 1", "setattr(x, 'f', 1)")
    assert all(missing_entry(Attempt(code), "f") is None for code in dynamic)
    assert missing_entry(Attempt("g = 1"), "f") is not None


def test_what_the_compiler_warns_of_in_a_program_is_not_said():
    code = (
        "from rlrf_environments.code.extract import Attempt, missing_entry\n"
        "missing_entry(Attempt(\"def f(): return '\\\\d' is 3\"), 'f')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""


@needs_sandbox
def test_several_blocks_are_warned_of(tasks):
    env = tasks(feedback="explained")
    text = "First:\n```\nx\n```\nthen\n" + block("raise ValueError(1)")
    feedback = env.grade("double-0", text).feedback
    assert feedback[-1].severity == "warning"
    assert "2 code blocks; the longest was graded" in feedback[-1].text
    cut = env.grade("double-0", block("print(3)") + "better:\n```python\nprint(2").feedback
    assert "is never closed; one before it was graded" in cut[-1].text
    assert text[slice(*feedback[0].span)] == "raise ValueError(1)"
    right = text.replace("raise ValueError(1)", "print(2 * int(input()))")
    assert not env.grade("double-0", right).feedback
    env.close()


@needs_sandbox
def test_all_failures_are_explained_when_asked(tasks):
    four = [{**ONE, "expected": f"{i}\n", "public": True} for i in (2, 3, 4, 5)]
    env = tasks({"tests": four}, run_all=True, explain_failures=2)
    outcome = env.grade("double-0", block("print(2 * int(input()))"))
    assert outcome.metrics == {"compiles": 1.0, "tests_passed": 0.25}
    assert [s.text[-1] for s in outcome.feedback if s.kind == "wrong_answer"] == ["3", "4"]
    env.close()
    env = tasks({"tests": four})
    assert env.grade("double-0", block("print(2)")).metrics == {"compiles": 1.0}
    env.close()


# --- SDPO's words -----------------------------------------------------------------------------


def sdpo(*failures, code="x = 1\nprint(1/0)\n"):
    listed = [
        Failure(i, Test(case, public=False), verdict, RawRun(**raw))
        for i, (case, verdict, raw) in enumerate(failures, 1)
    ]
    return sdpo_compat.render(Attempt(code), listed)


WRONG = Verdict.WRONG_ANSWER


def test_sdpo_shows_the_two_shortest_wrong_answers():
    long = "1\n" * 12
    segment = sdpo(
        (StdinCase(long, "a" * 300), WRONG, {"stdout": b"b" * 300}),
        (StdinCase("2", "3"), WRONG, {"stdout": b"4\n"}),
        (StdinCase("22", "3"), WRONG, {"stdout": b"5\n"}),
    )
    assert segment.text == (
        "Test Case 2: Wrong Answer\nInput\n2\nOutput\n4\nExpected\n3\n\n"
        "Test Case 3: Wrong Answer\nInput\n22\nOutput\n5\nExpected\n3"
    )
    assert (segment.kind, segment.reveals) == ("wrong_answer", "expected")
    alone = sdpo((StdinCase(long, "a" * 300), WRONG, {"stdout": b"b" * 300})).text
    assert "\n... (4 more lines)\nOutput\n" + "b" * 250 + "...\nExpected\n" in alone
    returned = sdpo((CallCase((1, "a"), [2]), WRONG, {"result": None})).text
    assert returned == "Test Case 1: Wrong Answer\nInput\n1\n'a'\nOutput\nNone\nExpected\n[2]"


def test_sdpo_tells_a_crash_before_a_time_out_before_the_rest():
    wrong = (StdinCase("2", "3"), WRONG, {"stdout": b"4\n"})
    slow = (StdinCase("7", "3"), Verdict.TIME_LIMIT, {})
    error = ProgramError("ZeroDivisionError", "division by zero", ((2, "<module>"),), 2)
    crash = (StdinCase("8", "3"), Verdict.RUNTIME_ERROR, {"error": error})
    assert sdpo(wrong, slow).text == "Time Limit Exceeded\nLast Executed Input\n7"
    segment = sdpo(wrong, slow, crash)
    assert segment.text == (
        "Runtime Error\nZeroDivisionError: division by zero\nprint(1/0)\n"
        "Line 2 in <module> (Solution.py)\n\nLast Executed Input\n8"
    )
    assert (segment.kind, segment.span) == ("runtime_error", (6, 16))
    syntax = ProgramError("SyntaxError", "invalid syntax", (), 1, 3)
    text = sdpo((StdinCase("8", ""), Verdict.COMPILE_ERROR, {"error": syntax})).text
    assert (
        text
        == "Runtime Error\nSyntaxError: invalid syntax\nx = 1\nLine 1 in <module> (Solution.py)"
    )
    assert "MemoryError" in sdpo((StdinCase("8", ""), Verdict.MEMORY_LIMIT, {})).text


@needs_sandbox
def test_sdpo_style_runs_all_tests_and_shows_what_is_expected(tasks):
    env = tasks(renderer="sdpo-compat")
    assert env.feedback_level == rlrf.Level.expected
    outcome = env.grade("double-0", block("print(3)"))
    assert outcome.feedback[0].text.startswith("Test Case 1: Wrong Answer\nInput\n1\nOutput\n3\n")
    assert outcome.metrics["tests_passed"] == 0.0
    assert env.grade("double-0", "no").feedback.text.startswith("Incorrect Format: There is no")
    cut = env.grade("double-0", "```python\nx").feedback.text
    assert cut.startswith("Truncated Attempt: ")
    env.close()
    env = tasks(renderer="sdpo-compat", feedback="explained")
    hidden = env.grade("double-0", block("print(3)"))
    assert hidden.feedback.text == "The answer is wrong."
    env.close()


# --- memory -----------------------------------------------------------------------------------


@needs_sandbox
def test_the_same_program_is_not_run_twice(tasks):
    env = tasks()
    code = "raise ValueError('x')"
    first = env.grade("double-0", "Well.\n" + block(code))
    pool = env._open_pool()
    done = pool.stats().programs
    longer = "Let me think about it.\n" + block(code)
    second = env.grade("double-0", longer)
    assert pool.stats().programs == done
    assert env.memory.hits == 1
    assert first.feedback.text == second.feedback.text
    assert longer[slice(*second.feedback[0].span)] == code
    env.style = type(env.style)(Limits(cpu_s=1))
    env.grade("double-0", longer)
    assert pool.stats().programs == done + 1
    env.close()
    env = tasks(remember=0)
    done = env._open_pool().stats().programs
    for _ in range(2):
        env.grade("double-0", block(code))
    assert env._open_pool().stats().programs == done + 2
    env.close()


def test_memory_forgets_the_oldest():
    from rlrf_environments.code.grading import Memory

    memory = Memory(2)
    for key in "abac":
        memory.put(key, rlrf.Outcome(1.0))
    assert memory.get("b") is None
    assert memory.get("a") is not None


# --- data sets --------------------------------------------------------------------------------

SET = DataSet("Some Set", "some.jsonl", "RLRF_SOME_SET", "http://127.0.0.1:9/some.jsonl")


def test_where_a_data_set_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("RLRF_HOME", str(tmp_path))
    monkeypatch.delenv("RLRF_SOME_SET", raising=False)
    with pytest.raises(UsageError, match=r"Some Set is not here .*data=FILE or RLRF_SOME_SET=FILE"):
        locate(SET)
    assert list((tmp_path / "data").iterdir()) == []  # nothing half fetched stays
    other = tmp_path / "other"
    other.write_text("o")
    elsewhere = DataSet(**{**vars(SET), "elsewhere": (str(other),)})
    assert locate(elsewhere) == other
    installed = DataSet(**{**vars(SET), "installed": ("rlrf", "py.typed")})
    assert locate(installed).name == "py.typed"
    cached = tmp_path / "data" / "some.jsonl"
    cached.write_text("c")
    assert locate(elsewhere) == cached
    monkeypatch.setenv("RLRF_SOME_SET", str(other))
    assert locate(SET) == other
    assert locate(SET, cached) == cached


@pytest.mark.parametrize("right", [True, False])
def test_what_is_fetched_is_checked(tmp_path, monkeypatch, right):
    import hashlib

    monkeypatch.setenv("RLRF_HOME", str(tmp_path))
    monkeypatch.delenv("RLRF_SOME_SET", raising=False)
    answer = httpx.MockTransport(lambda request: httpx.Response(200, content=b"data"))
    client = httpx.Client(transport=answer)
    monkeypatch.setattr(
        sources.httpx, "stream", lambda *a, **k: client.stream(a[0], a[1], timeout=k["timeout"])
    )
    digest = hashlib.sha256(b"data" if right else b"other").hexdigest()
    data_set = DataSet(**{**vars(SET), "sha256": digest})
    if right:
        assert locate(data_set).read_bytes() == b"data"
        found = tmp_path / "data" / "some.jsonl"
        assert locate(data_set) == found
        (tmp_path / "plain").touch()  # others may use the cache, if the umask lets them
        assert found.stat().st_mode == (tmp_path / "plain").stat().st_mode
    else:
        with pytest.raises(UsageError, match="it was not kept"):
            locate(data_set)
        assert list((tmp_path / "data").iterdir()) == []


# --- HumanEval and MBPP -----------------------------------------------------------------------


@needs_sandbox
@pytest.mark.parametrize(
    "name",
    [
        "humaneval-v0",
        "mbpp-v0",
        *(pytest.param(f"{x}-plus-v0", marks=pytest.mark.slow) for x in ("humaneval", "mbpp")),
    ],
)
def test_canonical_solutions_pass_and_none_does_not(name, published_code_data):
    env = rlrf.make(name, feedback="expected")
    nothing = "def half(n):\n    return None\n\ndef swap(p):\n    return None"
    for task in env.tasks(env.eval_split):
        assert env.grade(task, env.reference_solution(task)).reward == 1.0
        reward, feedback = env.grade(task, block(nothing))
        assert (reward, feedback[0].kind) == (0.0, "wrong_answer")
    env.close()


def test_mbpp_splits_are_the_papers_and_leave_out_what_cannot_be_graded(published_code_data):
    env = rlrf.make("mbpp-v0")
    assert env.tasks("test").ids() == ["mbpp-11", "mbpp-12"]
    assert env.tasks("eval").ids() == ["mbpp-511"]
    assert env.tasks("train").ids() == ["mbpp-602"]


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("assert f(1) == 2\nassert candidate([1], 'a') == [2]\nassert True", [CallCase] * 2),
        ("assert f(1) == 2\nassert f(2)", [AssertCase] * 2),
        ("assert f(1) == 2\nassert set(f(2)) == {3}", [AssertCase] * 2),
        ("assert f(1) == g(1)", [AssertCase]),
        ("assert f(x=1) == 2", [AssertCase]),
        ("for i in range(3):\n    assert f(i) == i\nassert f(9) == 9", [AssertCase]),
        ("", []),
    ],
)
def test_asserts_become_calls_where_that_is_the_same(source, kinds):
    cases = assert_cases(source, "f")
    assert [type(c) for c in cases] == kinds
    if kinds and kinds[0] is CallCase:
        assert cases[1] == CallCase(([1], "a"), [2])


def test_types_that_json_lost_are_read_from_the_asserts():
    def inputs(assertion, base, plus):
        row = {"base_input": base, "plus_input": plus, "assertion": assertion, "entry_point": "f"}
        return typed_inputs(row)[1]

    assert inputs("assert f((1, 2), [3]) == 1", [[[1, 2], [3]]], [[[4], [5]]]) == [[(4,), [5]]]
    assert inputs("assert f([(1, 2)]) == 1", [[[[1, 2]]]], [[[[4], []]]]) == [[[(4,), ()]]]
    nested = inputs("assert f((1, (2, 3))) == 1", [[[1, [2, 3]]]], [[[1, [2, [3, [4]]]]]])
    assert nested == [[(1, (2, (3, (4,))))]]
    assert inputs("assert f(0, 1j) == 1", [["0", "1j"]], [["2", "(1+2j)"]]) == [[2.0, 1 + 2j]]
    assert inputs("assert f('a') == 1", [["a"]], [["1"]]) == [["1"]]
    assert inputs("assert f({'a': (1,)}) == 1", [[{"a": [1]}]], [[{"b": [2]}]]) == [[{"b": (2,)}]]
    assert inputs("assert f({1}) == 1", [[[1]]], [[[2, 2]]]) == [[{2}]]


@pytest.mark.parametrize(
    ("oracle", "got", "wanted", "right"),
    [
        (Oracle("f", 0), 1.0000001, 1.0, True),
        (Oracle("f", 0), 1.1, 1.0, False),
        (Oracle("f", 0), 2, 1, False),
        (Oracle("f", 1e-4), [1.00001, 2], [1.0, 2], True),
        (Oracle("f", 1e-4), [1.0], [1.0, 2], False),
        (Oracle("f", 1e-4), "a", 1.0, False),
        (Oracle("f", 1e-4), float("nan"), float("nan"), True),
        (Oracle("f", 0, "set"), [1, 2, 2], [2, 1], True),
        (Oracle("f", 0, "sorted"), [1, 2, 2], [2, 1], False),
        (Oracle("f", 0, "set"), [[1]], [1], False),
        (Oracle("f", 0), MISSING, None, False),
        (Oracle("f", 0), None, None, True),
    ],
)
def test_evalplus_oracle(oracle, got, wanted, right):
    assert oracle.accepts(RawRun(result=got), CallCase((1,), wanted)) is right


def test_any_root_is_right():
    case = CallCase(([-6, 11, -6, 1],), 1.0)
    oracle = Oracle("find_zero", 1e-4)
    assert oracle.accepts(RawRun(result=2.0), case)
    for wrong in (2.5, True, "2", None, 1e300):
        assert not oracle.accepts(RawRun(result=wrong), case)


def test_a_file_of_another_format_is_told_every_time(tmp_path):
    good, bad = code_data.humaneval(1), code_data.mbpp(11)
    broken = {**good, "test": "def check(candidate"}
    for row, why in ((bad, "KeyError"), (broken, "SyntaxError")):
        env = rlrf.make("humaneval-v0", data=write_jsonl(tmp_path / "x.jsonl", [good, row]))
        for _ in range(2):
            match = rf"line 2: not in the format of HumanEval: {why}"
            with pytest.raises(UsageError, match=match):
                len(env.tasks("all"))


def test_a_reference_solution_may_hold_fences(tasks):
    solution = "s = '''\n```\n'''\nprint(2 * int(input()))"
    env = tasks({"solution": solution})
    assert extract(env.reference_solution(env.tasks("all")[0])).code.strip() == solution


def test_what_python_warns_of_in_data_is_not_said(tmp_path):
    row = {**code_data.mbpp(11), "code": "def swap(p):\n  '\\w'\n  return (p[1], p[0])"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = rlrf.make("mbpp-v0", data=write_jsonl(tmp_path / "x.jsonl", [row]))
        assert len(env.tasks("test")) == 1
