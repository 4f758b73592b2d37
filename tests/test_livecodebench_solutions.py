"""LiveCodeBench on real questions: own solutions are accepted, their mutants told what is wrong.

The questions are not ours: name a file of them in RLRF_LIVECODEBENCH. Each file in
``tests/livecodebench`` holds a solution and mutations of it, with the kind of feedback each must
get and the line it must blame.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

import pytest

import rlrf
from rlrf_environments.code.livecodebench import VARIABLE

FILES = sorted((Path(__file__).parent / "livecodebench").glob("*.toml"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no file of LiveCodeBench questions"
    ),
    pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed"),
]


@pytest.fixture(scope="module")
def env():
    # Public tests only, and limits that a mutant without end reaches soon.
    limits = {"cpu_s": 2, "wall_s": 20, "memory_mb": 512}
    made = rlrf.make("livecodebench-v6", feedback="explained", limits=limits, tests="public")
    yield made
    made.close()


def read(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def block(code: str) -> str:
    return f"Let me think.\n\n```python\n{code}```\n"


def mutant(solution: str, mutation: dict) -> str:
    assert solution.count(mutation["old"]) == 1, mutation["name"]
    return solution.replace(mutation["old"], mutation["new"])


def test_there_are_enough_of_every_sort():
    assert len(FILES) >= 40
    mutations = [read(path)["mutation"] for path in FILES]
    assert min(map(len, mutations)) >= 5
    for sort in ("wrong_answer", "runtime_error", "time_limit", "memory_limit"):
        assert all(any(m["kind"] == sort for m in ms) for ms in mutations), sort


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_solution_is_accepted_and_its_mutants_are_told_why(env, path: Path):
    data = read(path)
    accepted = env.grade(path.stem, block(data["solution"]))
    assert (accepted.reward, str(accepted.feedback)) == (1.0, "")
    for mutation in data["mutation"]:
        code = mutant(data["solution"], mutation)
        completion = block(code)
        reward, feedback = env.grade(path.stem, completion)
        told = f"{mutation['name']}: {feedback}"
        assert reward == 0.0, told
        assert feedback[0].kind == mutation["kind"], told
        located = [s for s in feedback if s.reveals == "location"]
        if "line" in mutation:
            number = int(re.search(r"[Ll]ine (\d+)", located[0].text)[1])
            assert number == mutation["line"], told
            blamed = completion[slice(*located[0].span)]
            assert blamed == code.split("\n")[number - 1].strip(), told
        if "error" in mutation:
            assert f"{mutation['error']}" in feedback[0].text, told
        elif mutation["kind"] == "wrong_answer":
            assert "\nExpected:\n" in feedback[0].text, told
