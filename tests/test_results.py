"""Results files: whose they are, and what they may be found like."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from rlrf import Rollout, UsageError
from rlrf._files import InUse
from rlrf.evaluate import EvalReport
from rlrf.results import ResultsFile

SETTINGS = {"seed": 0}


def partial(tmp_path: Path, *lines: bytes) -> None:
    text = b"\n".join((json.dumps(SETTINGS).encode(), *lines)) + b"\n"
    (tmp_path / "r.json.partial").write_bytes(text)


def line(id: str, **more: object) -> bytes:
    return json.dumps({**Rollout(id, id, reward=1.0).to_dict(), **more}).encode()


def test_of_two_evaluations_of_one_name_the_second_takes_another(tmp_path: Path) -> None:
    first = ResultsFile.named(tmp_path, "x", SETTINGS)
    second = ResultsFile.named(tmp_path, "x", SETTINGS)
    assert (first.path.name, second.path.name) == ("x.json", "x-2.json")
    third = ResultsFile(tmp_path / "x.json", SETTINGS, overwrite=True)
    with pytest.raises(InUse, match="in use, by process"):
        third.claim()
    with first, second:
        pass
    assert not list(tmp_path.iterdir())  # nothing is written before the first rollout


def test_what_is_kept_is_looked_at_once_it_is_ours(tmp_path: Path) -> None:
    late = ResultsFile(tmp_path / "r.json", SETTINGS)
    with ResultsFile(tmp_path / "r.json", SETTINGS) as early:
        early.add(Rollout("a", "a", reward=1.0))
    with late:
        assert [r.task_id for r in late.done] == ["a"]
    done = ResultsFile(tmp_path / "r.json", SETTINGS)
    with ResultsFile(tmp_path / "r.json", SETTINGS) as other:
        other.finish(EvalReport.of(other.done), {})
    with pytest.raises(UsageError, match="exists; --overwrite"), done:
        pass


def test_who_is_interrupted_is_named_no_file_that_is_not_there(tmp_path, monkeypatch) -> None:
    command = ["rlrf", "eval", "--overwrite", "--out", "r.json"]
    monkeypatch.setattr(sys, "argv", command)
    for overwrite in (False, True):
        results = ResultsFile(tmp_path / "r.json", SETTINGS, overwrite=overwrite)
        kept, again = results.kept(0, 16, "rollouts")
        assert kept == "kept: none of 16 rollouts, as none had ended"
        # Nothing was overwritten yet.
        assert again == "to begin again: rlrf eval --out r.json" + " --overwrite" * overwrite
    with results:
        results.add(Rollout("a", "a", reward=1.0))
    assert results.partial.exists()
    assert results.kept(1, 16, "rollouts", "; rest") == [
        f"kept: 1 of 16 rollouts, in {results.partial}; rest",
        "to go on: rlrf eval --out r.json",
    ]


def test_overwriting_keeps_the_old_results_until_there_are_new_ones(tmp_path: Path) -> None:
    with ResultsFile(tmp_path / "r.json", SETTINGS) as first:
        first.add(Rollout("a", "a", reward=1.0))
        first.finish(EvalReport.of([Rollout("a", "a", reward=1.0)]), {})
    before = (tmp_path / "r.json").read_bytes()
    with ResultsFile(tmp_path / "r.json", {"seed": 1}, overwrite=True) as second:
        second.add(Rollout("b", "b", reward=0.0))
        assert (tmp_path / "r.json").read_bytes() == before


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe", b"{", b"[" * 100_000, b"9" * 5000, b'{"task_id": "torn'], ids=len
)
def test_a_line_that_is_no_json_costs_itself(bad: bytes, tmp_path: Path) -> None:
    partial(tmp_path, line("a"), bad, line("b"))
    assert [r.task_id for r in ResultsFile(tmp_path / "r.json", SETTINGS).done] == ["a", "b"]


@pytest.mark.parametrize(
    "bad",
    [
        b"3",
        b"[]",
        b'{"task_id": 1}',
        line("a", reward="x"),
        line("a", reward=float("inf")),
        line("a", metrics={"x": []}),
        line("a", metrics=3),
        line("a", feedback=3),
        line("a", spans=[3]),
    ],
)
def test_a_line_that_is_no_rollout_is_named(bad: bytes, tmp_path: Path) -> None:
    partial(tmp_path, line("a"), bad)
    with pytest.raises(UsageError, match="line 3, is no rollout"):
        ResultsFile(tmp_path / "r.json", SETTINGS)


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link.json").symlink_to(tmp_path / "theirs")
    (tmp_path / "cut.json.partial").symlink_to(tmp_path / "theirs")
    os.mkfifo(tmp_path / "pipe.json")
    for name, told in (
        ("link.json", "is a link"),
        ("cut.json", "is a link"),
        ("pipe.json", "is no file"),
        ("n" * 255, "File name too long"),
        ("a\udcff", "is no UTF-8"),
        ("a\0b", "holds a NUL"),
        ("none/x.json/y", "cannot|No such|Not a directory"),
    ):
        (tmp_path / "none").mkdir(exist_ok=True)
        (tmp_path / "none" / "x.json").touch()
        with pytest.raises(UsageError, match=told), ResultsFile(tmp_path / name, SETTINGS) as file:
            file.add(Rollout("a", "a", reward=1.0))
    assert (tmp_path / "theirs").read_text() == "theirs"
    with pytest.raises(UsageError, match="cannot make the folder"):
        ResultsFile.named("/proc/nope", "x", SETTINGS)
