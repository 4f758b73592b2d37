"""Grading real LiveCodeBench programs: ours, sandboxed, beside LiveCodeBench's own harness.

The programs are the solutions and mutations of ``tests/livecodebench``, on the public tests of the
questions that a file of yours holds (``RLRF_LIVECODEBENCH``, or ``--data``). Both graders get the
same programs and tests, the same number of workers and 2 s per test; the rounds are interleaved.
Mutants without an end are compared, but not timed: their time is the limit.

The peer is the package ``nvidia-livecodebench``, a copy of the official harness
(``pip install --no-deps nvidia-livecodebench``, with numpy and tqdm); its processes are kept warm,
as it does. The last line of output is JSON.

    python benchmarks/grading.py --data problems.jsonl [--quick]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlrf

FILES = Path(__file__).parent.parent / "tests" / "livecodebench"
LIMIT_S = 2
HARNESS = "livecodebench.evaluation.compute_code_generation_metrics"


@dataclass(frozen=True)
class Case:
    """A program for a question, and what is known of it."""

    name: str
    question: str
    code: str
    kind: str
    sample: dict[str, str]


def cases(data: Path, quick: bool) -> list[Case]:
    """The programs, with the questions' public tests in the harness's own form."""
    questions = {}
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        tests = json.loads(row["public_test_cases"])
        questions[row["question_id"]] = {
            "input_output": json.dumps(
                {
                    "inputs": [t["input"] for t in tests],
                    "outputs": [t["output"] for t in tests],
                    "fn_name": json.loads(row["metadata"]).get("func_name"),
                }
            )
        }
    found = []
    for path in sorted(FILES.glob("*.toml"))[:: 6 if quick else 1]:
        if path.stem not in questions:
            continue
        held = tomllib.loads(path.read_text(encoding="utf-8"))
        programs = [("solution", held["solution"], "accepted")] + [
            (m["name"], held["solution"].replace(m["old"], m["new"]), m["kind"])
            for m in held["mutation"]
        ]
        found += [
            Case(f"{path.stem} {name}", path.stem, code, kind, questions[path.stem])
            for name, code, kind in programs
        ]
    return found


def harness() -> Callable[..., Any] | None:
    """The peer's entry point, or None where it is not installed."""
    try:
        run: Callable[..., Any] = importlib.import_module(HARNESS).evaluate_generations_by_problem
    except ImportError:
        return None
    return run


def theirs(run: Callable[..., Any], pool: ProcessPoolExecutor, items: list[Case]) -> list[bool]:
    """The official harness's verdicts."""
    jobs = [([c.code], c.sample, False, LIMIT_S) for c in items]
    return [all(r is True or r == 1 for r in done[0][0]) for done in pool.map(run, jobs)]


def ours(env: rlrf.Env, threads: ThreadPoolExecutor, items: list[Case]) -> list[bool]:
    """Our verdicts, feedback included in the work."""

    def grade(case: Case) -> bool:
        outcome = env.grade(case.question, f"```python\n{case.code}\n```")  # type: ignore[attr-defined]  # a one-shot environment
        return bool(outcome.reward == 1)

    return list(threads.map(grade, items))


def cpu() -> float:
    """CPU seconds of this process and its ended children."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("RLRF_LIVECODEBENCH"))
    parser.add_argument("--quick", action="store_true", help="an eighth of the programs, 2 rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--sandbox", default="auto")
    args = parser.parse_args()
    if not args.data:
        parser.error("name a file of LiveCodeBench questions: --data or RLRF_LIVECODEBENCH")
    everything = cases(Path(args.data), args.quick)
    timed = [c for c in everything if c.kind != "time_limit"]
    limits = {"cpu_s": LIMIT_S, "wall_s": 10, "memory_mb": 1024, "output_kb": 1024}
    options = {"data": args.data, "sandbox": args.sandbox, "tests": "public", "remember": 0}
    env = rlrf.make("livecodebench-v6", slots=args.workers, limits=limits, **options)
    run = harness()
    threads, processes = ThreadPoolExecutor(2 * args.workers), ProcessPoolExecutor(args.workers)
    walls: dict[str, list[float]] = {"rlrf": [], "livecodebench": []}
    verdicts: dict[str, list[bool]] = {}
    ours(env, threads, timed[:2])
    for _ in range(args.rounds or (2 if args.quick else 3)):
        started = time.perf_counter()
        verdicts["rlrf"] = ours(env, threads, timed)
        walls["rlrf"].append(time.perf_counter() - started)
        if run is not None:
            started = time.perf_counter()
            verdicts["livecodebench"] = theirs(run, processes, timed)
            walls["livecodebench"].append(time.perf_counter() - started)
    endless = [c for c in everything if c.kind == "time_limit"]
    verdicts["rlrf"] += ours(env, threads, endless)
    if run is not None:
        verdicts["livecodebench"] += theirs(run, processes, endless)
    env.close()
    ordered = timed + endless
    wrong = [
        c.name
        for c, v in zip(ordered, verdicts["rlrf"], strict=True)
        if v != (c.kind == "accepted")
    ]
    result: dict[str, Any] = {
        "programs": len(ordered),
        "questions": len({c.question for c in ordered}),
        "timed_programs": len(timed),
        "workers": args.workers,
        "sandbox": args.sandbox,
        "not_as_expected": wrong,
    }
    for name, seconds in walls.items():
        if seconds:
            best = statistics.median(seconds)
            result[f"{name}_programs_per_s"] = round(len(timed) / best, 1)
            result[f"{name}_ms_per_program"] = round(1e3 * best / len(timed), 2)
            result[f"{name}_rounds_s"] = [round(s, 2) for s in seconds]
    if run is None:
        print(f"{HARNESS} is not installed: only rlrf is measured", file=sys.stderr)
    else:
        differ = [
            {"program": c.name, "kind": c.kind, "rlrf": a, "livecodebench": b}
            for c, a, b in zip(ordered, verdicts["rlrf"], verdicts["livecodebench"], strict=True)
            if a != b
        ]
        result["disagreements"] = differ
        result["speedup"] = round(
            statistics.median(walls["livecodebench"]) / statistics.median(walls["rlrf"]), 2
        )
        for item in differ:
            print(item)
    for key, value in result.items():
        print(f"{key:<28} {value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
