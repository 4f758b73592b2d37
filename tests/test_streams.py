"""A display never stops the work: closed pipes, full disks, closed descriptors, narrow charsets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlrf.runs import Run

ROOT = Path(__file__).parent.parent
CODE = "import sys\nsys.argv[0] = 'rlrf'\nfrom tests import test_cli\ntest_cli.cli.main()\n"
TRAIN = ("train", "--trainer", "cli-fake", "--model", "m", "--env", "cli-cities-v0")


def started(folder: Path, arguments: tuple[str, ...], **options: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    env |= options.pop("env", {})  # type: ignore[arg-type]  # a dict
    command = [sys.executable, "-c", CODE, *arguments, "--run-dir", "run"][
        : None if "train" in arguments else -2
    ]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, **options)  # type: ignore[call-overload]


def has_trained(folder: Path) -> None:
    run = Run.open(folder / "run")
    assert run.status == "done"
    assert len(run.metrics) == 4


def test_a_reader_that_stops_reading_stops_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # `| head`, once it has seen enough
    process = started(tmp_path, TRAIN, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    has_trained(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_both_streams_stops_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = started(tmp_path, TRAIN, stdout=full, stderr=full)
        assert process.wait(60) == 0
        has_trained(tmp_path)
        # Where what is printed is all there is, it is missed.
        process = started(tmp_path, ("list",), stdout=full, stderr=subprocess.PIPE)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error == "error: standard output cannot be written: No space left on device\n"


def test_closed_descriptors_are_not_taken_by_the_run_s_files(tmp_path: Path) -> None:
    process = started(tmp_path, TRAIN, preexec_fn=lambda: [os.close(n) for n in (0, 1, 2)])
    assert process.wait(60) == 0
    has_trained(tmp_path)
    assert "step 1/3" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    # Nor does a file get the number to which libraries in other languages print.
    code = (
        "import os, sys\nfor n in range(3): os.close(n)\nfrom rlrf import _streams\n"
        "_streams.protect(descriptors=True)\nn = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "os.write(n, str(n).encode())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "n")], check=True)
    assert int((tmp_path / "n").read_text()) > 2


def test_a_charset_that_has_not_all_letters(tmp_path: Path) -> None:
    process = started(
        tmp_path,
        ("info", "cli-cities-v0", "-o", "accent=é🦊"),
        env={"PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
