"""What a run directory may be found like, and whose it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from rlrf import UsageError  # noqa: E402
from rlrf._files import Unwritable  # noqa: E402
from rlrf.commands import train as train_command  # noqa: E402
from rlrf.report import write_report  # noqa: E402
from rlrf.runs import InUse, Run, is_run, own  # noqa: E402
from rlrf_trainers.commands.export import export_model  # noqa: E402
from rlrf_trainers.run.checkpoints import Checkpoints, State, newest  # noqa: E402
from tests.test_resume import everything, lines, trainer  # noqa: E402

# --- one owner ----------------------------------------------------------------------------


def test_a_run_is_held_before_its_model_is_loaded(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=1).train()
    before = everything(run_dir)
    code = "import sys, rlrf.runs as r\nwith r.own(sys.argv[1]): print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        import rlrf_trainers.core.learner as module

        monkeypatch.setattr(module, "trainable", lambda *_: pytest.fail("the model was touched"))
        for resume in (True, False):
            with pytest.raises(InUse, match=f"in use, by process {other.pid} on"):
                trainer(run_dir, resume=resume)
        with pytest.raises(InUse):
            Run.create(run_dir, config={}, overwrite=True)
        write_report([run_dir])  # reading needs nothing
        assert newest(run_dir).data["step"] == 1
        (run_dir / "report.html").unlink()
        (run_dir / ".lock").unlink()
        assert everything(run_dir) == before
        other.stdin.write(b"\n")


def test_a_trainer_that_was_made_in_vain_holds_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"is not a folder"):
        trainer(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path / "run", max_steps=-1)
    made = trainer(tmp_path / "run", max_steps=1)
    assert (tmp_path / "run" / ".lock").exists()
    made.train()
    assert not (tmp_path / "run" / ".lock").exists()
    Run.create(tmp_path / "other", config={}).finish("done")
    assert not (tmp_path / "other" / ".lock").exists()


def test_a_second_trainer_of_this_process_does_not_train_a_run_that_is_being_trained(tmp_path):
    first = trainer(tmp_path / "run", max_steps=1)
    found = []

    def second(line):
        with pytest.raises(InUse, match="by another trainer of this process") as refused:
            trainer(tmp_path / "run", max_steps=1, resume=True)
        found.append(refused.value)

    first.learner.record.on_step = second
    first.train()
    assert len(found) == 2
    assert Run.open(tmp_path / "run").status == "done"


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with own(tmp_path / "a" / "b") as one, own(tmp_path / "a" / "b"):
        one.close()
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with own(tmp_path / "a"):
        pass
    assert (tmp_path / "a").exists()


def test_two_runs_without_a_name_get_two_folders(tmp_path):
    path, first = train_command._own_free(tmp_path / "x", named=False)
    other, second = train_command._own_free(tmp_path / "x", named=False)
    assert path == other == tmp_path / "x"  # of one process: nothing has begun
    Run.create(path, config={})
    third, _ = train_command._own_free(tmp_path / "x", named=False)
    assert third == tmp_path / "x-2"
    first.close()
    second.close()


# --- the beginning ------------------------------------------------------------------------


def test_a_run_begins_in_one_step(tmp_path, monkeypatch):
    """A kill right after the rename of status.json: all that the run is is known."""
    old = Run.create(tmp_path, config={"trainer": {"seed": 1}})
    old.log(1, {"loss": 1.0})
    old.finish("done", model=True)
    Checkpoints(tmp_path).save_step(1, State({"x": torch.ones(1)}, {}), keep=1)
    (tmp_path / "config.toml").write_text("seed = 1\n")
    (tmp_path / "trackers.json").write_text("{}")
    with own(tmp_path) as owned:
        owned.let(overwrite=True, config_toml="seed = 2\n")
        with monkeypatch.context() as patch:
            patch.setattr(Run, "settle", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                Run.create(tmp_path, config={"trainer": {"seed": 2}})
    run = Run.open(tmp_path)
    assert run.config == {"trainer": {"seed": 2}}  # and nothing of the old one
    assert (run.metrics, run.events, run.info.get("model")) == ([], [], None)
    assert run.begins_anew
    write_report([tmp_path])
    with pytest.raises(UsageError, match="already holds a run"):
        Run.create(tmp_path, config={})
    run.settle()
    assert (tmp_path / "config.toml").read_text() == "seed = 2\n"
    assert run.config == {"trainer": {"seed": 2}}
    assert "beginning" not in run.info
    assert not Checkpoints(tmp_path).steps()
    assert not (tmp_path / "trackers.json").exists()
    run.settle()


@pytest.mark.slow
def test_a_run_that_was_killed_as_it_began_is_gone_on_with(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    trainer(tmp_path / "whole", max_steps=2).train()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "settle", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer(run_dir, max_steps=2)
    trainer(run_dir, max_steps=2, resume=True).train()
    assert "beginning" not in Run.open(run_dir).info
    assert lines(run_dir, "metrics.jsonl") == lines(tmp_path / "whole", "metrics.jsonl")


def test_an_old_run_is_whole_until_a_new_one_begins(tmp_path, monkeypatch):
    Run.create(tmp_path, config={"n": 1}).finish("done")
    before = everything(tmp_path)
    import rlrf.runs as module

    def full(*_, **__):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(Unwritable, match=r"cannot begin a run in .*No space left"):
        Run.create(tmp_path, config={"n": 2}, overwrite=True)
    assert everything(tmp_path) == before


def test_what_a_run_was_told_before_does_not_hold_for_one_begun_from_python(tmp_path):
    with own(tmp_path) as owned:
        owned.let(config_toml="seed = 1\n")
        Run.create(tmp_path, config={}).finish("done")
    assert (tmp_path / "config.toml").exists()
    Run.create(tmp_path, config={}, overwrite=True)
    assert not (tmp_path / "config.toml").exists()


# --- checkpoints --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_first_checkpoint_that_fails_is_gone_on_from(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    trainer(tmp_path / "whole", max_steps=4).train()
    import rlrf_trainers.run.checkpoints as module

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(Unwritable, match=r"No space left.*go on with --resume") as failed:
            trainer(run_dir, max_steps=4, eval_steps=0).train()
    assert str(failed.value).count("No space left") == 1
    assert (run_dir / "model").is_dir()
    assert Run.open(run_dir).status == "failed"
    with pytest.warns(RuntimeWarning, match="the model it had left after step 2 is kept in"):
        trainer(run_dir, max_steps=4, eval_steps=0, resume=True).train()
    trainer(tmp_path / "same", max_steps=4, eval_steps=0).train()
    assert lines(run_dir, "metrics.jsonl") == lines(tmp_path / "same", "metrics.jsonl")
    assert (run_dir / "model-step-2" / "model.safetensors").exists()


def test_without_checkpoints_nothing_false_is_promised(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    made = trainer(tmp_path / "run", max_steps=3, save_steps=0)
    monkeypatch.setattr(Run, "finish", full)
    with pytest.raises(Unwritable, match=r"train anew \(--overwrite\): without") as failed:
        made.train()
    assert "--resume" not in str(failed.value)


@pytest.mark.parametrize("lost", [("event",), ("_save_model",), ("finish",), ("event", "finish")])
def test_what_cannot_be_kept_does_not_hide_why_a_run_failed(lost, tmp_path, monkeypatch):
    made = trainer(tmp_path / "run", max_steps=3, save_steps=0)

    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "x"))

    def fail(line):
        if line["step"] == 1:
            for name in lost:
                whose = made.loop if name == "_save_model" else Run
                monkeypatch.setattr(whose, name, full)
            raise RuntimeError("boom")

    made.learner.record.on_step = fail
    with pytest.raises(RuntimeError, match=r"^boom$"):
        made.train()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["weights", "state", "json", "lines", "half"])
def test_an_older_checkpoint_is_used_where_the_newest_cannot_be(harm, tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=4).train()
    whole = lines(run_dir, "metrics.jsonl")
    path = Checkpoints(run_dir).path(4)
    if harm == "weights":
        os.truncate(path / "state.safetensors", 1000)
    elif harm == "state":
        data = json.loads((path / "state.json").read_text())
        del data["rng"]
        (path / "state.json").write_text(json.dumps(data))
    elif harm == "json":
        os.truncate(path / "state.json", 0)
    elif harm == "half":
        (path / "state.json").unlink()
    else:  # the machine died: of step 4 only some lines came to the disk
        kept = (run_dir / "rollouts.jsonl").read_text().splitlines(keepends=True)
        (run_dir / "rollouts.jsonl").write_text("".join(kept[:-3]))
    Run.open(run_dir).finish("running")
    resumed = trainer(run_dir, max_steps=4, resume=True)
    if harm == "half":  # no checkpoint at all
        resumed.train()
    else:
        with pytest.warns(RuntimeWarning, match="cannot be used; the run goes on from .*step 2"):
            resumed.train()
        assert (run_dir / "checkpoints" / "damaged-step-00000004").is_dir()
    assert lines(run_dir, "metrics.jsonl") == whole
    assert Checkpoints(run_dir).steps() == [2, 4]


def test_a_checkpoint_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=4).train()
    import rlrf_trainers.run.checkpoints as module

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "load_file", refuse)
    before = everything(run_dir)
    with pytest.raises(UsageError, match=r"step-00000004' cannot be read: Permission denied"):
        trainer(run_dir, max_steps=5, resume=True).train()
    assert everything(run_dir) == before


def test_lines_are_on_the_disk_before_a_checkpoint_relies_on_them(tmp_path, monkeypatch):
    run = Run.create(tmp_path, config={})
    run.log(1, {"loss": 1.0})
    flushed = []
    import rlrf.runs as module

    monkeypatch.setattr(module, "flush", lambda path: flushed.append(path.name))
    run.position()
    grown = {"metrics.jsonl", "rollouts.jsonl", "events.jsonl"}
    assert set(flushed) >= grown
    save = Checkpoints.save_step
    relied = []

    def relies(*arguments):
        relied.append(set(flushed))
        flushed.clear()
        return save(*arguments)

    monkeypatch.setattr(Checkpoints, "save_step", relies)
    flushed.clear()
    trainer(tmp_path / "run", max_steps=4).train()
    assert len(relied) == 2
    assert all(names >= grown for names in relied)


def test_half_a_checkpoint_is_none(tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=2).train()
    half = Checkpoints(run_dir).path(7)
    half.mkdir()
    (half / "state.json").write_text("{}")
    assert Checkpoints(run_dir).steps() == [2]
    assert newest(run_dir).data["step"] == 2
    with pytest.raises(UsageError, match="cannot be read"):
        export_model(run_dir, tmp_path / "out", checkpoint="7")
    Checkpoints(run_dir).clear()
    assert not list((run_dir / "checkpoints").glob("step-*"))


def test_a_kill_while_a_model_takes_anothers_place_loses_neither(tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=2, save_steps=0).train()
    (run_dir / "model").rename(run_dir / ".model.old")
    assert export_model(run_dir, tmp_path / "out").is_dir()


# --- the end ------------------------------------------------------------------------------


def test_an_interrupted_run_says_that_it_was_and_no_more(tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt("")

    made = trainer(tmp_path / "run")
    made.learner.record.on_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.train()
    run = Run.open(tmp_path / "run")
    assert (run.status, run.info["message"]) == ("interrupted", "interrupted")
    assert [(e["level"], e["message"]) for e in run.events][-1] == ("info", "interrupted")


@pytest.mark.parametrize(
    ("error", "at", "config", "leaves"),
    [
        (RuntimeError, 0, {}, False),  # nothing was trained
        (RuntimeError, 1, {}, True),
        (RuntimeError, 1, {"save_model": False}, False),
        (KeyboardInterrupt, 1, {}, False),  # its checkpoints are there
        (KeyboardInterrupt, 1, {"save_steps": 0}, True),
    ],
)
def test_which_runs_that_do_not_end_well_leave_a_model(error, at, config, leaves, tmp_path):
    def fail(line):
        if line["step"] == at:
            raise error

    made = trainer(tmp_path / "run", **config)
    made.learner.record.on_step = fail
    with pytest.raises(error):
        made.train()
    assert (tmp_path / "run/model").exists() is leaves
    assert Run.open(tmp_path / "run").info.get("model", False) is leaves


def test_a_resumed_run_that_ends_well_has_not_failed(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    made = trainer(run_dir, max_steps=4)

    def fail(line):
        if line["step"] == 3:
            raise RuntimeError("boom")

    made.learner.record.on_step = fail
    with pytest.raises(RuntimeError, match="boom"):
        made.train()
    assert Run.open(run_dir).info["message"] == "RuntimeError: boom"
    trainer(run_dir, max_steps=5, learning_rate=2e-2, resume=True).train()
    run = Run.open(run_dir)
    assert run.status == "done"
    assert "message" not in run.info
    assert run.info["model"]
    told = [e["message"] for e in run.events]
    assert "trainer.max_steps was 4 before, and is 5 from here on" in told
    assert "trainer.learning_rate was 0.01 before, and is 0.02 from here on" in told
    page = write_report([run_dir]).read_text()
    assert '"message":""' in page.split('"facts":')[1][:80]


# --- a folder that is not as it should be ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["status.json", "metrics.jsonl", "model", "checkpoints", "checkpoints/best", "config.toml"],
)
def test_links_are_refused_at_the_start_and_not_followed(name, tmp_path):
    run_dir, theirs = tmp_path / "run", tmp_path / "theirs"
    trainer(run_dir, max_steps=2, eval_steps=1).train()
    (run_dir / "config.toml").write_text("")
    (run_dir / name).rename(theirs)
    (run_dir / name).symlink_to(theirs)
    before = everything(tmp_path)
    for again in (
        lambda: trainer(run_dir, max_steps=3, resume=True),
        lambda: Run.create(run_dir, config={}, overwrite=True),
    ):
        with pytest.raises(UsageError, match=rf"{Path(name).name}' is a link"):
            again()
    assert everything(tmp_path) == before


def test_a_run_directory_may_itself_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    trainer(tmp_path / "run", max_steps=1).train()
    assert is_run(tmp_path / "real")


def test_a_report_is_not_written_through_a_link(tmp_path):
    Run.create(tmp_path / "run", config={}).finish("done")
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "run" / "report.html").symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match="is a link"):
        write_report([tmp_path / "run"])
    assert (tmp_path / "theirs").read_text() == "theirs"
    (tmp_path / "named").symlink_to(tmp_path / "page.html")  # which was asked for
    write_report([tmp_path / "run"], tmp_path / "named")
    assert (tmp_path / "named").is_symlink()
    assert (tmp_path / "page.html").exists()
    assert write_report([tmp_path / "run"], "/dev/null") == Path("/dev/null")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: (p / "model").write_text(""), "model' is no folder"),
        (lambda p: (p / "checkpoints").write_text(""), "checkpoints' is no folder"),
        (lambda p: (p / "status.json").mkdir(), "status.json' is no file"),
        (lambda p: (p / "events.jsonl").mkdir(), "events.jsonl' is no file"),
        (lambda p: os.mkfifo(p / "metrics.jsonl"), "metrics.jsonl' is no file"),
    ],
)
def test_what_would_be_found_at_the_end_is_told_at_the_start(make, told, tmp_path):
    make(tmp_path)
    with pytest.raises(UsageError, match=told):
        own(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_places_that_are_none(tmp_path):
    long = tmp_path / ("n" * 256)
    for place, told in (
        (long, "File name too long"),
        (tmp_path / "a\udcff", "is no UTF-8"),
        (tmp_path / "a\0b", "holds a NUL"),
        (Path("/proc/nope/run"), "cannot make the run directory"),
    ):
        for call in (own, lambda p: Run.create(p, config={})):
            with pytest.raises(UsageError, match=told) as refused:
                call(place)
            assert "\n" not in str(refused.value)
    for place in (long, tmp_path / "a\udcff", tmp_path / "a\0b"):
        with pytest.raises(UsageError):
            Run.open(place)
        with pytest.raises(UsageError):
            write_report([place])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot make the run directory .*file"):
        own(tmp_path / "file" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which root alone can")
def test_a_run_of_another_user_is_refused_at_the_start():
    script = (
        "import os, sys\nimport rlrf.runs as r\nfrom rlrf import UsageError\n"
        "os.setgid(12345); os.setuid(12345)\n"
        "for call in (lambda p: r.own(p, resume=True), lambda p: print(r.Run.open(p).status)):\n"
        "    try: call(sys.argv[1])\n"
        "    except UsageError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        Run.create(folder / "run", config={}).finish("done")

        def told():
            command = [sys.executable, "-c", script, str(folder / "run")]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        first, second = told().splitlines()
        assert "cannot be claimed: Permission denied" in first
        assert second == "done"
        (folder / "run").chmod(0o777)
        assert "config.json' cannot be written: Permission denied" in told().splitlines()[0]
        (folder / "run").chmod(0o700)
        lines = told().splitlines()
        assert len(lines) == 2
        assert all("cannot be looked at: Permission denied" in line for line in lines)


# --- what its lines may be ------------------------------------------------------------------

LINES = [
    b'{"step": 1e999, "reward": 1}',
    b'{"step": -1e999}',
    b'{"step": ' + b"9" * 400 + b"}",
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": NaN}',
    b'{"step": "x"}',
    b'{"step": null, "reward": null}',
    b'{"step": true}',
    b"[" * 100_000 + b"]" * 100_000,
    b'{"step": 1, "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"step": 1, "reward": ' + b"9" * 400 + b', "loss": 1e999, "x": "y", "z": [1]}',
    b"7",
    b"null",
    b'"text"',
    b"\xff\xfe\x00",
    b"{" * 5,
    b'{"step": 1, "feedback": 3, "messages": 4, "completion_mask": 5, "metrics": 6}',
    b'{"step": 1, "feedback": [[3]], "reward": 1}',
    b'{"step": 1, "feedback": [[{"span": [1e999, {}], "text": {}}]], "reward": 1}',
    b'{"step": 1, "tokens": {"a": 1}, "token_kl": "ab", "completion_mask": ["x", 1e999]}',
    b'{"step": 1, "split": [], "group_id": {}, "task_id": null, "reward": "x", "solved": []}',
    b'{"step": 1, "split": "eval", "reward": {}, "metrics": {"a": 1e999, "b": []}}',
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "events.jsonl"])
def test_a_malformed_line_costs_itself(name, tmp_path):
    run = Run.create(tmp_path, config={})
    run.log(3, {"reward": 0.5})
    run.log_rollouts(3, [{"task_id": "good-task", "reward": 1.0, "split": "train"}])
    run.event("info", "good-event")
    path = tmp_path / name
    path.write_bytes(b"\n".join(LINES) + b"\n" + path.read_bytes())
    page = write_report([tmp_path]).read_text()
    for good in ("good-task", "good-event", '"reward":[[3,0.5]]' if name[0] != "m" else "0.5"):
        assert good in page
    data = page.split('id="data">')[1].split("</script>")[0]
    json.loads(data, parse_constant=lambda c: pytest.fail(c))
    assert all(isinstance(line["step"], int) for line in run.metrics)
    assert run.last_step == 3


@pytest.mark.parametrize("text", [b"[" * 200_000, b"\xff", b"", b"[1]", b'{"a": ' * 5])
@pytest.mark.parametrize("name", ["status.json", "config.json", "lock.json", "config.toml"])
def test_a_broken_file_is_one_clear_line_or_none(name, text, tmp_path):
    Run.create(tmp_path, config={"trainer": {}}).finish("done")
    (tmp_path / name).write_bytes(text)
    refused = None
    try:
        write_report([tmp_path])
    except UsageError as error:
        refused = str(error)
    assert refused is None or (name in refused and "\n" not in refused)


def test_a_report_is_whole_while_the_run_goes_on(tmp_path):
    """Read while lines are written, and written while another writes it."""
    run = Run.create(tmp_path, config={})
    stop = threading.Event()

    def work():
        step = 0
        while not stop.is_set():
            step += 1
            run.log(step, {"reward": 0.5})
            run.log_rollouts(step, [{"task_id": "t", "reward": 1.0}])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            assert write_report([tmp_path]).read_text().endswith("</html>\n")
    finally:
        stop.set()
        thread.join()
