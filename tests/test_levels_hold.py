"""Levels hold: whatever strings and numbers a program controls, they say no more than a level may.

A program reads the hidden input, so it can put it into everything it has a say in: messages, names
of classes and functions, files, modules, lines, columns, exit codes. It never has the expected
answer, but a hidden assert's own exception may hold it. Below ``explained`` nothing of that is
shown; at ``explained`` the program's own words are, marked untrusted, and no expected answer.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlrf
from rlrf import Level
from rlrf.sandbox import (
    CaseResult,
    ProgramError,
    RawRun,
    RunReport,
    SandboxPool,
    StdinCase,
    Verdict,
)
from rlrf.sandbox.pool import _verdict
from rlrf_environments.code.explain import Test
from rlrf_environments.code.humaneval import _Anything
from tests import code_data
from tests.code_data import write_jsonl

GIVEN, NUMBER = "zephyr735173", 735173  # the hidden input, as text and as a number
ANSWER, SUM = "quartz916491", 916491  # the expected answer
KEPT = "obsidian"  # in the reference solution
SECRETS = {GIVEN, str(NUMBER), hex(NUMBER)[2:]}
ANSWERS = {ANSWER, str(SUM)}


class Forged(SandboxPool):
    """A pool whose programs do whatever a test says on hidden cases, and pass the public ones."""

    def __init__(self):
        super().__init__(lambda: None, 1)
        self.raw = RawRun()

    def run_sync(self, program, cases, *, checker, **options):
        results = []
        for i, case in enumerate(cases):
            secret = GIVEN in repr(case) or str(NUMBER) in repr(case)
            if isinstance(checker, _Anything):  # EvalPlus asks the canonical solution
                raw = RawRun(result=SUM if secret else 1)
                verdict = Verdict.ACCEPTED
            elif not secret:
                raw, verdict = RawRun(), Verdict.ACCEPTED
            else:
                raw, verdict = self.raw, _verdict(self.raw, case, checker or _Never())
            results.append(CaseResult(i, verdict, case, raw))
        bad = [r.verdict for r in results if r.verdict is not Verdict.ACCEPTED]
        return RunReport(bad[0] if bad else Verdict.ACCEPTED, tuple(results))


class _Never:
    def accepts(self, raw, case):
        return False


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """Of every code environment one with a hidden test that holds the secrets."""
    folder = tmp_path_factory.mktemp("data")

    def write(name, *rows):
        return write_jsonl(folder / name, list(rows))

    shown = {"stdin": "1\n", "expected": "2\n", "public": True}
    stdin = {
        "id": "stdin",
        "prompt": "Add.",
        "tests": [shown, {"stdin": f"{GIVEN}\n{NUMBER}\n", "expected": f"{ANSWER} {SUM}\n"}],
        "solution": f"# {KEPT}",
    }
    call = {**stdin, "id": "call", "entry_point": "f"}
    call["tests"] = [
        {"args": [1], "expected": 2, "public": True},
        {"args": [GIVEN, NUMBER], "expected": [ANSWER, SUM]},
    ]
    plain = code_data.humaneval(1)
    plain |= {"entry_point": "f", "prompt": "def f(n):\n    'Half.'\n"}
    plain["test"] = f"def check(candidate):\n    assert candidate({NUMBER}) == {SUM}\n"
    asserts = {**plain, "task_id": "HumanEval/2"}
    asserts["test"] = (
        f"def check(candidate):\n    assert candidate({NUMBER}) - {SUM} < 1e-6\n"
        f"    assert {{'{ANSWER}': 1}}[candidate('{GIVEN}')] == 1\n"
    )
    mbpp = {**code_data.mbpp(11), "code": "def f(n):\n    return n"}
    mbpp |= {
        "test_list": ["assert f(1) == 1"],
        "challenge_test_list": [f"assert f({NUMBER})=={SUM}"],
    }
    plus = {**plain, "base_input": [[1]], "plus_input": [[NUMBER]], "atol": 0}
    del plus["test"]
    mbpp_plus = {**plus, "task_id": "Mbpp/3", "assertion": "assert f(1) == 1"}
    lcb = code_data.question(0)
    lcb["private_test_cases"] = [
        {"input": f"{GIVEN} {NUMBER}", "output": f"{ANSWER} {SUM}", "testtype": "stdin"}
    ]
    leet = code_data.question(1)
    leet["private_test_cases"] = [
        {
            "input": f'"{GIVEN}"\n{NUMBER}',
            "output": f'["{ANSWER}", {SUM}]',
            "testtype": "functional",
        }
    ]
    files = {
        "code-v0": write("code.jsonl", stdin, call),
        "humaneval-v0": write("he.jsonl", plain, asserts),
        "mbpp-v0": write("mbpp.jsonl", mbpp),
        "humaneval-plus-v0": write("hep.jsonl", plus),
        "mbpp-plus-v0": write("mbppp.jsonl", mbpp_plus),
        "livecodebench-v6": write("lcb.jsonl", lcb, leet),
    }
    made = []
    pool = Forged()
    for name, file in files.items():
        for renderer in ("rlrf", "sdpo-compat"):
            for quote in (False, True):
                options = {"feedback": "reference", "renderer": renderer, "quote": quote}
                env = rlrf.make(name, data=file, sandbox=pool, remember=0, **options)
                made.append((env, [t for split in env.splits for t in _tasks(env, split)]))
    basics = rlrf.make("code-basics-v0", sandbox=pool, remember=0, feedback="reference")
    own = next(t for t in _tasks(basics, "train") if t.hidden.entry is None)
    secret = Test(StdinCase(f"{GIVEN} {NUMBER}", f"{ANSWER} {SUM}"), public=False)
    hidden = replace(own.hidden, load_tests=lambda: [secret], solution=KEPT)
    made.append((basics, [replace(own, hidden=hidden)]))
    return pool, made


def _tasks(env, split):
    try:
        return [env._find_task(t) for t in env.tasks(split)]
    except rlrf.UsageError:
        return []  # a split without tasks


CODE = (
    "class Solution:\n    def add(self, n):\n        return n\n\n\ndef f(n, m=0):\n    return n\n"
)
COMPLETION = f"So:\n\n```python\n{CODE}```\n"


def check(feedback, level):
    """That feedback at a level holds no more than it may."""
    for segment in feedback:
        text = segment.text
        assert segment.span is None or segment.span[1] <= len(COMPLETION)
        if level < Level.reference:
            assert KEPT not in text
        if level < Level.expected:
            assert not any(answer in text for answer in ANSWERS), (level, text)
        told = any(secret in text for secret in SECRETS)
        assert not told or level >= Level.explained, (level, text)
        told |= "exited with 37" in text  # a number that it chose
        assert not told or segment.untrusted, (level, text)


WORDS = st.sampled_from([GIVEN, f"{GIVEN}(", f"\x1b[1m{GIVEN}\x1b[0m", f"f\n{NUMBER}", hex(NUMBER)])
LINES = st.sampled_from([1, 2, 3, 7, 8, 9, 500, NUMBER, 0, -1])
FRAMES = st.lists(st.tuples(LINES, st.one_of(WORDS, st.just("f"))), max_size=6).map(tuple)
WRITTEN = st.sampled_from([b"", GIVEN.encode(), f"{NUMBER}\n".encode() * 3])
ERRORS = st.builds(
    ProgramError,
    type=st.one_of(WORDS, st.sampled_from(["KeyError", "SyntaxError"])),
    message=st.one_of(WORDS, st.just(f"a value of the type {GIVEN} cannot be compared")),
    frames=FRAMES,
    line=st.one_of(st.none(), LINES),
    column=st.one_of(st.none(), LINES),
)
ASSERTIONS = st.sampled_from(["KeyError", "TypeError", "AssertionError"]).map(
    lambda name: ProgramError(name, f"{ANSWER} {SUM}", ((1, "check"),), 1)
)
RESULTS = st.sampled_from([None, GIVEN, [NUMBER], {GIVEN: 1}, {NUMBER}, NUMBER])
RUNS = st.one_of(
    st.builds(RawRun, stdout=WRITTEN, result=RESULTS, assertion=ASSERTIONS),
    st.builds(RawRun, stdout=WRITTEN, stderr=WRITTEN, exit_code=st.sampled_from([1, 37])),
    st.builds(RawRun, stderr=WRITTEN, exit_code=st.none(), signal=st.just(9)),
    st.builds(RawRun, stdout=WRITTEN, exit_code=st.just(1), error=ERRORS, assertion=ASSERTIONS),
    st.builds(
        RawRun,
        stdout=WRITTEN,
        error=st.one_of(st.none(), ERRORS),
        limit=st.sampled_from(["time", "memory", "output"]),
        cpu_s=st.sampled_from([0.0, 4.0]),
    ),
)


def shows_no_more_than_it_may(environments, raw):
    pool, made = environments
    pool.raw = raw
    graded = 0
    for env, tasks in made:
        for task in tasks:
            outcome = env.grade(task, COMPLETION)  # made at level reference
            graded += outcome.reward == 0
            for level in Level:
                check(outcome.feedback.at_level(level), level)
    assert graded or raw.assertion is None


@settings(max_examples=15, derandomize=True, deadline=None)
@given(RUNS)
def test_whatever_a_program_says_no_level_shows_too_much(environments, raw):
    shows_no_more_than_it_may(environments, raw)


@pytest.mark.slow
@settings(max_examples=120, derandomize=True, deadline=None)
@given(RUNS)
def test_whatever_many_programs_say_no_level_shows_too_much(environments, raw):
    shows_no_more_than_it_may(environments, raw)


def test_a_public_test_is_shown_and_a_hidden_one_is_not(environments):
    pool, made = environments
    pool.raw = RawRun(result=None)
    for env, tasks in made:
        for task in tasks:
            feedback = env.grade(task, COMPLETION).feedback
            assert not any(a in feedback.at_level("explained").text for a in ANSWERS)
            assert any(a in feedback.at_level("expected").text for a in ANSWERS), str(env)


def test_places_are_those_of_the_attempt(environments):
    pool, made = environments
    env, (stdin, *_) = made[0]
    frames = ((7, "<module>"), (NUMBER, "g"), (3, GIVEN))
    pool.raw = RawRun(exit_code=1, error=ProgramError("E", "m", frames, 3))
    located = env.grade(stdin, COMPLETION).feedback.at_level("located").text
    assert located.endswith("Line 3 in add of the program, called from line 7 in f.")


# --- the real thing ---------------------------------------------------------------------------

STEAL = "import sys\ns = sys.stdin.read().split()[0] if sys.stdin.readable() else ''\n"
PROGRAMS = {
    "the name of a function": "def f(): raise ValueError\n"
    "f.__code__ = f.__code__.replace(co_name=s, co_qualname=s)\nf()",
    "a line": "def f(): raise ValueError\n"
    "f.__code__ = f.__code__.replace(co_firstlineno=735173)\nf()",
    "the name of a class": "raise type(s, (Exception,), {})(s)",
    "a note": "e = ValueError(s)\ne.add_note(s)\ne.__cause__ = KeyError(s)\nraise e",
    "a file": "exec(compile('raise ValueError', s, 'exec'))",
    "our own file": "exec(compile('\\n' * 735172 + 'raise ValueError', __import__('sys')"
    "._getframe().f_code.co_filename, 'exec'))",
    "fields of a syntax error": "e = SyntaxError(s, (__import__('sys')._getframe().f_code"
    ".co_filename, 735173, 735173, s))\nraise e",
    "a warning": "import warnings\nwarnings.warn_explicit(s, UserWarning, s, 735173, s)\n1 / 0",
    "a module": "__name__ = s\nclass E(Exception): __module__ = s\nE.__qualname__ = s\nraise E(s)",
    "a group": "raise ExceptionGroup(s, [ValueError(s)])",
    "an exit": "print(s)\nprint(s, file=sys.stderr)\nsys.exit(s)",
    "a repr": "class E(Exception):\n    def __repr__(self): return s\n    __str__ = __repr__\n"
    "raise E",
    "too much output": "while True: print(s)",
    "its channel": "import os\nfor n in os.listdir('/proc/self/fd'):\n    try:\n"
    "        fd = int(n)\n        if 'channel' in os.readlink('/proc/self/fd/' + n):\n"
    '            os.pwrite(fd, b\'{"error": {"type": "%s", "message": "%s", "frames": '
    '[[735173, "%s"]], "line": 735173, "column": 735173}}\' % ((s.encode(),) * 3), 0)\n'
    "    except OSError: pass\nos._exit(1)",
}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_real_program_shows_no_more(name, tmp_path):
    row = {
        "id": "x",
        "prompt": "Read.",
        "tests": [{"stdin": f"{GIVEN}\n", "expected": f"{ANSWER}\n"}],
        "limits": {"cpu_s": 2, "wall_s": 30},
    }
    with rlrf.make("code-v0", data=write_jsonl(tmp_path / "t.jsonl", [row]), slots=1) as env:
        completion = f"```python\n{STEAL}{PROGRAMS[name]}\n```\n" + " " * len(COMPLETION)
        outcome = env.grade(env._find_task("x"), completion)
    assert outcome.reward == 0.0
    for level in Level:
        for segment in outcome.feedback.at_level(level):
            told = any(secret in segment.text for secret in SECRETS)
            assert not told or (level >= Level.explained and segment.untrusted), (level, segment)
            assert ANSWER not in segment.text or level >= Level.expected
    assert json.dumps(outcome.feedback.to_dicts())
