"""Small data sets in the published formats, for tests that must not need the real ones."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from pathlib import Path
from typing import Any


def packed(tests: list[dict[str, str]]) -> str:
    """Hidden tests as LiveCodeBench publishes them: base64 of zlib of a pickle of JSON."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def question(i: int, **changes: Any) -> dict[str, Any]:
    """A question of the kind of LiveCodeBench: print or return a number plus ``i``.

    Even ones are over standard input, odd ones functions; public tests are 1 and 2, hidden 9 to
    15.
    """
    stdin = i % 2 == 0

    def test(n: int) -> dict[str, str]:
        kind = "stdin" if stdin else "functional"
        return {"input": str(n), "output": str(n + i), "testtype": kind}

    return {
        "question_title": f"Add {i}",
        "question_content": f"Given an integer, add {i} to it.",
        "platform": "atcoder" if stdin else "leetcode",
        "question_id": f"abc9{i:02}_a" if stdin else f"90{i:02}",
        "contest_id": f"abc9{i:02}" if stdin else "weekly",
        "contest_date": f"2025-{1 + i % 4:02}-1{i % 10}T00:00:00",
        "starter_code": ""
        if stdin
        else "class Solution:\n    def add(self, n: int) -> int:\n        ",
        "difficulty": ("easy", "medium", "hard")[i % 3],
        "public_test_cases": json.dumps([test(1), test(2)]),
        "private_test_cases": packed([test(n) for n in range(15, 8, -1)]),
        "metadata": "{}" if stdin else json.dumps({"func_name": "add"}),
        **changes,
    }


def solution(i: int) -> str:
    """A completion that solves question ``i``."""
    if i % 2 == 0:
        return f"```python\nprint(int(input()) + {i})\n```"
    body = f"class Solution:\n    def add(self, n: int) -> int:\n        return n + {i}"
    return f"```python\n{body}\n```"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows, compressed if the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def humaneval(i: int) -> dict[str, Any]:
    """A task of the kind of HumanEval; of every third, no assert can be made a plain call."""
    close = "    assert abs(candidate(1) - 1.5) < 1e-6\n" if i % 3 == 0 else ""
    return {
        "task_id": f"HumanEval/{i}",
        "prompt": "from typing import List\n\n\ndef half(n: int) -> float:\n"
        f'    """Half of n more than n, number {i}.\n    >>> half(2)\n    3.0\n    """\n',
        "entry_point": "half",
        "canonical_solution": "    return 1.5 * n\n",
        "test": "\n\nMETADATA = {'author': 'me'}\n\n\ndef check(candidate):\n" + close + ""
        "    assert candidate(2) == 3.0\n    assert candidate(4) == 6.0\n    assert True\n",
    }


def humaneval_plus(i: int) -> dict[str, Any]:
    """The same for EvalPlus."""
    row = humaneval(i)
    del row["test"]
    return {**row, "base_input": [[2], [4]], "plus_input": [[0], [7], [-3]], "atol": 0}


def mbpp(i: int) -> dict[str, Any]:
    """A task of the kind of MBPP."""
    return {
        "task_id": i,
        "text": f"Write function number {i} to swap a pair.",
        "code": "def swap(p):\r\n  return (p[1], p[0])",
        "test_setup_code": "",
        "test_list": [
            "assert swap((1, 2)) == (2, 1)",
            "assert swap(('a', 'b')) == ('b', 'a')",
            "assert swap((0, 0)) == (0, 0)",
        ],
        "challenge_test_list": ["assert swap((3, 4)) == (4, 3)"],
    }


def mbpp_plus(i: int) -> dict[str, Any]:
    """The same for EvalPlus; its inputs are lists in JSON, tuples in the asserts."""
    return {
        "task_id": f"Mbpp/{i}",
        "prompt": f'"""\nWrite function {i} to swap a pair.\nassert swap((1, 2)) == (2, 1)\n"""\n',
        "entry_point": "swap",
        "canonical_solution": "\ndef swap(p):\n  assert isinstance(p, tuple)\n"
        "  return (p[1], p[0])\n",
        "base_input": [[[1, 2]], [["a", "b"]]],
        "plus_input": [[[5, 6]], [[[], 1]], [[7, 8]]],
        "atol": 0,
        "assertion": "\nassert swap((1, 2)) == (2, 1)\nassert swap(('a', 'b')) == ('b', 'a')\n",
    }


def write_all(folder: Path) -> dict[str, str]:
    """Write a file of each data set; the environment variables that name them."""
    rows = {
        "RLRF_CODE": ("tasks.jsonl", code_tasks()),
        "RLRF_LIVECODEBENCH": ("lcb.jsonl", [question(i) for i in range(24)]),
        "RLRF_HUMANEVAL": ("HumanEval.jsonl.gz", [humaneval(i) for i in range(12)]),
        "RLRF_HUMANEVAL_PLUS": ("HumanEvalPlus.jsonl.gz", [humaneval_plus(i) for i in range(12)]),
        "RLRF_MBPP": ("mbpp.jsonl", [mbpp(i) for i in (11, 12, 367, 511, 601, 602)]),
        "RLRF_MBPP_PLUS": ("MbppPlus.jsonl", [mbpp_plus(i) for i in range(12)]),
    }
    return {
        name: str(write_jsonl(folder / file, content)) for name, (file, content) in rows.items()
    }


def code_tasks() -> list[dict[str, Any]]:
    """Tasks for ``code-v0``."""
    return [
        {
            "id": f"double-{i}",
            "prompt": f"Print twice the number, for the {i}th time.",
            "tests": [
                {"stdin": "1\n", "expected": "2\n", "public": True},
                {"stdin": "4\n", "expected": "8\n"},
            ],
            "solution": "print(2 * int(input()))",
        }
        for i in range(12)
    ]
