"""Kills at every file operation, full disks, lost permissions: every command understands the rest.

The work is done by tests/fault_driver.py, in forks of one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

KILL, ENOSPC, EACCES = "kill", 28, 13


def can_mount(folder: Path) -> bool:
    """Whether small disks can be had: by root, outside most containers."""
    if os.getuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def drive(folder: Path, *jobs: tuple[str, dict[str, Any]]) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fault_driver", str(folder), json.dumps(jobs)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["problems"], "\n".join(told["problems"])
    return int(told["cases"])


def drive_two(folder: Path, *jobs: tuple[str, dict[str, Any]]) -> int:
    """Drive the jobs in two processes at once, each of which takes every second size."""

    def half(n: int) -> int:
        mine = [(name, {**given, "sizes": given["sizes"][n::2]}) for name, given in jobs]
        (folder / str(n)).mkdir()
        return drive(folder / str(n), *mine)

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(half, range(2)))


def sweep(scenario: str, fault: str | int, stride: int, start: int = 0) -> Any:
    return (
        "sweep",
        {"scenario": scenario, "fault": fault, "stride": stride, "start": start},
    )


def results(name: str, fault: str | int, stride: int, start: int = 0) -> Any:
    return "results", {"name": name, "fault": fault, "stride": stride, "start": start}


@pytest.mark.slow
def test_one_of_two_that_start_together_goes_on(tmp_path):
    assert drive(tmp_path, ("together", {"rounds": 1})) >= 1


@pytest.mark.slow
def test_a_disk_without_room_is_said_and_gone_on_from(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("mounting a small disk needs root")
    sizes = {"unit": "size", "sizes": [3, 20]}
    assert drive(tmp_path, ("disk", sizes), ("full", {**sizes, "name": "eval", "sizes": [2]})) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)  # some hundred commands
def test_a_kill_at_every_file_operation_loses_nothing(tmp_path):
    cases = drive(
        tmp_path,
        sweep("fresh", KILL, 2),
        sweep("overwrite", KILL, 5, 1),
        sweep("resume", KILL, 4, 3),
        results("eval", KILL, 1),
        results("discover", KILL, 2),
    )
    assert cases > 100


@pytest.mark.slow
@pytest.mark.timeout(900)  # some hundred commands
def test_an_operation_that_fails_ends_the_run_with_one_line(tmp_path):
    drive(
        tmp_path,
        sweep("fresh", ENOSPC, 6),
        sweep("overwrite", EACCES, 8, 2),
        sweep("resume", EACCES, 6, 1),
        results("eval", ENOSPC, 2),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some hundred commands
def test_disks_of_many_sizes(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("mounting a small disk needs root")
    sizes, inodes = list(range(1, 76)), list(range(2, 58))  # from nothing to more than enough
    cases = drive_two(
        tmp_path,
        ("disk", {"unit": "size", "sizes": sizes}),
        ("disk", {"unit": "nr_inodes", "sizes": inodes}),
        ("full", {"name": "eval", "unit": "size", "sizes": [1, 2, 3, 4]}),
        ("full", {"name": "discover", "unit": "nr_inodes", "sizes": [1, 2, 3, 4]}),
    )
    assert cases == len(sizes) + len(inodes) + 8
