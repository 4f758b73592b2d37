from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import rlrf
from rlrf import Outcome, SingleTurnEnv, Task, UsageError
from rlrf.runs import Run, check_free, clear, is_run


class Tiny(SingleTurnEnv):
    def load_tasks(self, split: str) -> list[Task]:
        return [Task("a", "Say a.")]

    def grade(self, task: Task, completion: str) -> Outcome:
        return Outcome(1.0)


def make(path: Path, **kwargs: object) -> Run:
    return Run.create(path, config={"trainer": {"seed": 1}}, **kwargs)  # type: ignore[arg-type]


def test_a_run_reads_back_what_was_written(tmp_path: Path) -> None:
    run = make(tmp_path / "deep" / "run")
    run.log(0, {"eval/pass_rate": 0.5})
    run.log(1, {"loss": np.float32(0.25), "step": 99})
    run.log_rollouts(1, [{"task_id": "a", "text": "é\u2028🙂\ud800", "step": 7}, {"task_id": "b"}])
    run.event("warning", "careful")
    run.finish("done")
    back = Run.open(tmp_path / "deep" / "run")
    assert back.config == {"trainer": {"seed": 1}}
    assert back.metrics == [{"step": 0, "eval/pass_rate": 0.5}, {"step": 1, "loss": 0.25}]
    rollouts = list(back.rollouts())
    assert [r["task_id"] for r in rollouts] == ["a", "b"]
    assert rollouts[0]["step"] == 1
    assert rollouts[0]["text"] == "é\u2028🙂\ud800"
    assert [(e["level"], e["message"]) for e in back.events] == [("warning", "careful")]
    assert back.status == "done"
    assert back.info["started"] <= back.info["finished"]
    assert "done" in repr(back)


def test_every_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.log(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    assert Run.open(tmp_path).status == "running"


def test_a_torn_last_line_is_skipped_and_a_resumed_run_starts_on_its_own_line(
    tmp_path: Path,
) -> None:
    run = make(tmp_path)
    run.log(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    resumed = Run.open(tmp_path)
    assert [m["step"] for m in resumed.metrics] == [1]
    resumed.log(2, {"loss": 0.5})
    assert resumed.metrics == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_file_that_is_one_torn_line_is_emptied(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "rollouts.jsonl").write_text("x" * 200_000)
    run = Run.open(tmp_path)
    run.log_rollouts(1, [{"task_id": "a"}])
    assert list(run.rollouts()) == [{"task_id": "a", "step": 1}]


def test_a_corrupt_line_in_the_middle_costs_only_itself(tmp_path: Path) -> None:
    run = make(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe{\n[1]\n{"step": 2}\n')
    assert [m["step"] for m in run.metrics] == [1, 2]


def test_numbers_that_are_not_finite_become_null_and_a_warning(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.log(3, {"loss": math.nan, "grad_norm": math.inf, "reward": 0.5})
    strict = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda c: pytest.fail(c)
    )
    assert strict == {"step": 3, "loss": None, "grad_norm": None, "reward": 0.5}
    assert run.events[0]["message"] == "step 3: grad_norm is inf, loss is nan"
    assert run.events[0]["level"] == "warning"


def test_values_json_does_not_know_are_written_plainly(tmp_path: Path) -> None:
    run = Run.create(
        tmp_path, config={"path": Path("a/b"), "set": {2, 1}, "array": np.array([1.0, np.nan])}
    )
    assert run.config == {"path": "a/b", "set": [1, 2], "array": [1.0, None]}
    run.log_rollouts(1, [{"logprobs": [1.0, math.nan], "t": (1, {"x": math.inf})}])
    assert next(run.rollouts())["logprobs"] == [1.0, None]


def test_a_run_directory_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.log(1, {"loss": 1.0})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        UsageError, match=r"already holds a run; .*--resume .*, in Python resume=Tru"
    ):
        make(tmp_path)
    with pytest.raises(UsageError, match="already holds a run"):
        check_free(tmp_path)
    assert Run.open(tmp_path).metrics
    assert make(tmp_path, overwrite=True).metrics == []
    assert (tmp_path / "notes.txt").read_text() == "mine"
    clear(tmp_path)
    assert not is_run(tmp_path)


def test_a_folder_of_other_things_may_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("")
    make(tmp_path)
    assert (tmp_path / "config.toml").exists()


def test_wrong_places_and_words_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        Run.open(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds no run"):
        Run.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the run directory"):
        make(tmp_path / "file" / "run")
    run = make(tmp_path / "run")
    with pytest.raises(UsageError, match="info, warning, error"):
        run.event("fatal", "x")
    with pytest.raises(UsageError, match="running, done, failed, interrupted"):
        run.finish("finished")
    (run.path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        _ = run.config


def test_missing_files_read_as_empty(tmp_path: Path) -> None:
    run = make(tmp_path)
    for name in ("metrics.jsonl", "rollouts.jsonl", "events.jsonl", "config.json"):
        (tmp_path / name).unlink()
    assert (run.metrics, list(run.rollouts()), run.events, run.config) == ([], [], [], {})


def test_the_lock_names_versions_and_the_environment(tmp_path: Path) -> None:
    rlrf.register("runs-tiny-v0", Tiny)
    env = rlrf.make("runs-tiny-v0", feedback="located")
    lock = make(tmp_path, env=env).lock
    assert lock["env"] == {
        "id": "runs-tiny-v0",
        "options": {"feedback": "located"},
        "feedback": "located",
        "split": "train",
        "wrappers": [],
    }
    assert lock["versions"]["rlrf"] == rlrf.__version__
    assert lock["versions"]["gymnasium"]
    assert lock["python"].startswith("3.")


def test_the_lock_of_an_unregistered_environment(tmp_path: Path) -> None:
    assert make(tmp_path, env=Tiny()).lock["env"]["id"] == "Tiny"


def test_how_a_run_ended_is_kept(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.finish("failed", "boom")
    assert (run.status, run.info["message"]) == ("failed", "boom")
    run.rewind(run.position())
    assert run.status == "running"
    assert not {"message", "finished"} & run.info.keys()
    run.finish("failed", "boom")
    run.finish("running")
    assert run.status == "running"
    assert "message" not in run.info
