"""FeedbackEval's wrong programs: none is accepted, and each is told which test or line is wrong.

The programs are not ours: name a folder with ``HumanEval_feedback.jsonl`` of FeedbackEval in
RLRF_FEEDBACKEVAL, and HumanEval in RLRF_HUMANEVAL; or have both in a folder ``shared/data`` beside
the checkout.
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import rlrf
from rlrf.sandbox import Limits

BESIDE = Path(__file__).parents[2] / "shared/data"
FOLDER = Path(os.environ.get("RLRF_FEEDBACKEVAL") or BESIDE / "feedbackeval")
PROGRAMS = FOLDER / "HumanEval_feedback.jsonl"
TASKS = os.environ.get("RLRF_HUMANEVAL") or BESIDE / "humaneval/HumanEval.jsonl.gz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAMS.is_file(), reason="RLRF_FEEDBACKEVAL names no FeedbackEval"),
    pytest.mark.skipif(not Path(TASKS).is_file(), reason="RLRF_HUMANEVAL names no HumanEval"),
    pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed"),
]

ONLY_HEAD_MISSING = {0, 20, 25, 38, 50}
"""Tasks where some programs fault only by an import or a helper that the prompt gives."""


def names_its_fault(segments: list[rlrf.Segment], code: str) -> bool:
    """Whether feedback at level ``expected`` names a failing test, or a line of the program."""
    for segment in segments:
        found = re.search(r"[Ll]ine (\d+)", segment.text) if segment.reveals == "location" else None
        if found and 1 <= int(found[1]) <= code.count("\n") + 1:
            return True
        if segment.reveals == "expected" and "The hidden test:\n" in segment.text:
            return bool(segment.text.partition("The hidden test:\n")[2].strip())
    # What is not there at all has no line.
    return any("does not define the function" in s.text for s in segments)


def test_no_wrong_program_is_accepted_and_each_is_told_why():
    # A loop without end costs all of its limit; the slowest right program here takes 0.3 s.
    limits = Limits(cpu_s=1, wall_s=30, memory_mb=512)
    env = rlrf.make("humaneval-v0", data=TASKS, feedback="expected", limits=limits)
    rows = [json.loads(line) for line in PROGRAMS.read_text(encoding="utf-8").splitlines()]
    programs = [
        (row["task_id"], wrong["generate_code"]) for row in rows for wrong in row["false_results"]
    ]

    def grade(program: tuple[str, str]) -> rlrf.Outcome:
        task_id, code = program
        return env.grade(task_id, f"````python\n{code}\n````")

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(grade, programs))
    env.close()
    accepted = collections.Counter(
        int(task_id.rpartition("/")[2])
        for (task_id, _), outcome in zip(programs, outcomes, strict=True)
        if outcome.reward
    )
    unnamed = [
        (task_id, str(outcome.feedback))
        for (task_id, code), outcome in zip(programs, outcomes, strict=True)
        if not outcome.reward and not names_its_fault(list(outcome.feedback), code)
    ]
    kinds = collections.Counter(o.feedback[0].kind for o in outcomes if not o.reward)
    print(f"{len(programs)} programs; accepted {dict(accepted)}; rejected {dict(kinds)}")
    assert len(programs) == 1233
    assert sum(accepted.values()) == 9
    assert set(accepted) == ONLY_HEAD_MISSING
    assert not unnamed, unnamed[:5]
