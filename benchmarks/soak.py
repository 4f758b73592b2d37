"""Thousands of programs, good and bad, through one pool: does anything grow?

Runs a mixture (right, wrong, crashing, too slow, too big, leaving files and daemons behind) and
watches the processes, descriptors and memory of the sandboxes and of this process, before and
after. Sandboxes are not recycled meanwhile, so that a leak has nowhere to hide.

    python benchmarks/soak.py --backend docker                  5,000 programs
    python benchmarks/soak.py --backend bubblewrap --quick      300 programs

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from typing import Any

from rlrf.sandbox import Limits, Program, SandboxPool, StdinCase, Verdict, sandboxes

LIMITS = Limits(cpu_s=0.3, wall_s=2, memory_mb=128, output_kb=64)
RIGHT = Program("print(sum(map(int, input().split())))")
CASES = [StdinCase("2 3", "5"), StdinCase("20 30", "50")]
MIXTURE = (
    (RIGHT, Verdict.ACCEPTED),
    (Program("print(4)"), Verdict.WRONG_ANSWER),
    (Program("1 / 0"), Verdict.RUNTIME_ERROR),
    (Program("def"), Verdict.COMPILE_ERROR),
    (Program("x = bytearray(10**9)"), Verdict.MEMORY_LIMIT),
    (Program("print('x' * 10**6)"), Verdict.OUTPUT_LIMIT),
    (RIGHT, Verdict.ACCEPTED),
    (
        Program(
            "import os\nos.makedirs('a/b/c')\nopen('a/b/c/d', 'w').write('x' * 100000)\n"
            "os.symlink('/usr', 'a/link')\nos.mkfifo('fifo')\nos.chmod('a', 0)\n"
            "print(sum(map(int, input().split())))"
        ),
        Verdict.ACCEPTED,
    ),
    (
        Program(
            "import os, sys, time\nprint(sum(map(int, input().split())), flush=True)\n"
            "if os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)"
        ),
        Verdict.ACCEPTED,
    ),
    (Program("import os\nos.abort()"), Verdict.RUNTIME_ERROR),
)
RARE = (Program("while True: pass"), Verdict.TIME_LIMIT)  # one program in a hundred: it is slow


def footprint() -> dict[str, float]:
    """Processes, descriptors and resident MB of this process and of all sandboxes."""
    mine = os.getpid()
    stats: dict[int, tuple[int, int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            with open(f"/proc/{name}/cmdline", "rb") as file:
                runner = b"runner.py" in file.read()
        except OSError:
            continue
        stats[int(name)] = (runner, int(fields[21]) * 4096)
    sandboxed = [rss for runner, rss in stats.values() if runner]
    return {
        "sandbox_processes": len(sandboxed),
        "sandbox_mb": round(sum(sandboxed) / 1e6, 1),
        "client_fds": len(os.listdir("/proc/self/fd")),
        "client_mb": round(stats[mine][1] / 1e6, 1),
    }


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Run them all; what was there before and after."""
    options = {"allow_unsafe": True} if args.backend == "process" else {}
    backend = sandboxes.load(args.backend)
    pool = SandboxPool(
        lambda: backend(**options), args.slots, recycle_programs=10**9, recycle_s=1e9
    )
    await pool.start()
    wrong: list[str] = []

    async def one(number: int) -> None:
        program, expected = RARE if number % 100 == 99 else MIXTURE[number % len(MIXTURE)]
        report = await pool.run(program, CASES, limits=LIMITS, stop="first_failure")
        if report.verdict is not expected:
            wrong.append(f"{number}: {report.verdict} instead of {expected}")

    async def batch(first: int, last: int) -> None:
        for begin in range(first, last, 8 * args.slots):
            await asyncio.gather(*(one(n) for n in range(begin, min(last, begin + 8 * args.slots))))

    await batch(0, 100)  # everything has happened once
    before, start = footprint(), time.perf_counter()
    await batch(100, args.programs)
    seconds = time.perf_counter() - start
    after = footprint()
    stats = pool.stats()
    await pool.aclose()
    return {
        "benchmark": "soak",
        "backend": args.backend,
        "programs": args.programs,
        "slots": args.slots,
        "wrong": wrong[:5],
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
        "sandboxes_started": stats.started,
        "sandboxes_replaced": stats.replaced,
        "retries": stats.retries,
        "starved": stats.starved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="docker", choices=["docker", "bubblewrap", "process"])
    parser.add_argument("--programs", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="300 programs")
    args = parser.parse_args()
    if args.quick:
        args.programs = 300
    print(json.dumps(asyncio.run(soak(args))))


if __name__ == "__main__":
    main()
