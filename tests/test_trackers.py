"""Trackers: numbers arrive, and a tracker that fails or hangs never stops a run."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import random
import subprocess
import sys
import threading
import types

import pytest

pytest.importorskip("torch")

from rlrf.errors import ConfigError, MissingDependencyError
from rlrf_trainers.run.trackers import TRACKERS, open_trackers

WAIT_S = 30  # a bound for what happens at once; nothing is measured by it


class Service:
    """What a fake package was told; ``on[call]`` runs inside that call and may raise or block."""

    def __init__(self):
        self.calls, self.lines, self.threads, self.on = [], [], set(), {}

    def did(self, call, **details):
        self.threads.add(threading.current_thread())
        if call in self.on:
            self.on[call]()
        self.calls.append((call, details))

    def of(self, call):
        return [details for name, details in self.calls if name == call]


def fake_tensorboard(service):
    """``torch.utils.tensorboard``."""

    class SummaryWriter:
        def __init__(self, log_dir=None, comment="", purge_step=None):
            service.did("start", log_dir=log_dir, purge_step=purge_step)

        def add_text(self, tag, text_string, global_step=None):
            service.did("config", text=text_string)

        def add_scalar(self, tag, scalar_value, global_step=None):
            if not service.lines or service.lines[-1][0] != global_step:
                service.did("log")
                service.lines.append((global_step, {}))
            service.lines[-1][1][tag] = scalar_value

        def flush(self):
            service.did("flush")

        def close(self):
            service.did("close", exit_code=None)

    return {"SummaryWriter": SummaryWriter}


def fake_wandb(service):
    class Run:
        def define_metric(self, name, step_metric=None, step_sync=None):
            service.did("define", name=name, step_metric=step_metric)

        def log(self, data):
            service.did("log")
            data = dict(data)
            service.lines.append((data.pop("step"), data))

        def finish(self, exit_code=None):
            service.did("close", exit_code=exit_code)

    def init(*, project, name, id, resume, config, dir, reinit, settings):
        service.did("start", project=project, id=id, resume=resume, config=config, dir=dir)
        return Run()

    def login(*, prompt, verify):
        service.did("login", prompt=prompt)
        return service.logged_in

    service.mode, service.logged_in = "online", True
    return {
        "run": None,
        "setup": lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=service.mode)),
        "Settings": types.SimpleNamespace,
        "login": login,
        "init": init,
    }


def fake_trackio(service):
    class Run:
        def log(self, metrics, step=None):
            service.did("log")
            service.lines.append((step, metrics))

        def finish(self):
            service.did("close", exit_code=None)

    def init(*, project, name, config, resume):
        service.did("start", project=project, name=name, config=config, resume=resume)
        return Run()

    return {"init": init}


FAKES = {
    "tensorboard": ("torch.utils.tensorboard", fake_tensorboard),
    "wandb": ("wandb", fake_wandb),
    "trackio": ("trackio", fake_trackio),
}


@pytest.fixture
def services(monkeypatch):
    """Every tracker's package replaced by a fake of its shape."""
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    found = {}
    for name, (module_name, make) in FAKES.items():
        module = types.ModuleType(module_name)
        found[name] = Service()
        vars(module).update(make(found[name]))
        monkeypatch.setitem(sys.modules, module_name, module)
    return found


class Warned(list):
    """The callback: (topic, message), and the threads that called it."""

    def __init__(self):
        super().__init__()
        self.threads = set()

    def __call__(self, topic, message):
        self.threads.add(threading.current_thread())
        self.append((topic, message))


@pytest.fixture
def warned():
    return Warned()


def start(report_to, warned, folder=None, **options):
    options = {"project": "proj", "name": "run", "config": {"lr": 1e-6}, **options}
    return open_trackers(
        report_to, warn=warned, folder=folder, start_timeout=options.pop("wait", WAIT_S), **options
    )


# --- numbers arrive -------------------------------------------------------------------------


def test_every_line_arrives_in_order_on_a_thread_of_its_own(services, warned, tmp_path):
    trackers = start(TRACKERS, warned, tmp_path)
    for step in range(20):
        trackers.log(step, {"step": step, "reward": step / 10, "loss": 1.0})
    trackers.close()
    assert not warned
    threads = [service.threads for service in services.values()]
    assert all(len(found) == 1 for found in threads)
    assert all(thread.daemon for found in threads for thread in found)  # none holds up the exit
    assert len(set.union(*threads) | {threading.current_thread()}) == len(TRACKERS) + 1
    for name, service in services.items():
        assert service.lines == [(s, {"reward": s / 10, "loss": 1.0}) for s in range(20)], name
        assert len(service.of("close")) == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_numbers_that_are_not_finite_go_as_they_are_and_no_numbers_not_at_all(
    name, services, warned, tmp_path
):
    trackers = start([name], warned, tmp_path)
    trackers.log(1, {"a": math.nan, "b": -math.inf, "c": "text", "d": None, "e": [1, 2], "f": 3})
    trackers.log(2, {})
    trackers.log(3, {"a": 1.0})
    trackers.close()
    assert not warned
    first, last = services[name].lines[0], services[name].lines[-1]
    assert set(first[1]) == {"a", "b", "f"}
    assert math.isnan(first[1]["a"])
    assert first[1]["b"] == -math.inf
    assert last == (3, {"a": 1.0})


def test_later_changes_of_the_callers_dictionary_do_not_arrive(services, warned):
    release = threading.Event()
    services["trackio"].on["start"] = lambda: release.wait(WAIT_S)
    trackers = start(["trackio"], warned, wait=0)
    line = {"a": 1.0}
    trackers.log(1, line)
    line["a"] = 2.0
    release.set()
    trackers.close()
    assert services["trackio"].lines == [(1, {"a": 1.0})]


def test_no_tracker_is_fine(warned):
    trackers = start([], warned)
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert not warned


def test_each_is_told_the_configuration_as_json(services, warned, tmp_path):
    start(TRACKERS, warned, tmp_path, config={"lr": 1e-6, "path": tmp_path}).close()
    plain = {"lr": 1e-6, "path": str(tmp_path)}
    assert services["wandb"].of("start")[0]["config"] == plain
    assert services["trackio"].of("start")[0]["config"] == plain
    assert json.dumps(plain, indent=2) in services["tensorboard"].of("config")[0]["text"]


def test_a_name_given_twice_is_one_tracker_and_a_string_is_a_name(services, warned):
    start(["trackio", "trackio"], warned).close()
    start("trackio", warned).close()
    assert len(services["trackio"].of("start")) == 2


def test_the_end_is_told_once_with_how_it_came(services, warned, tmp_path):
    for failed, code in ((False, 0), (True, 1)):
        trackers = start(TRACKERS, warned, tmp_path)
        trackers.close(failed=failed)
        trackers.close()
        trackers.log(9, {"late": 1.0})
        assert services["wandb"].of("close")[-1]["exit_code"] == code
    assert [len(s.of("close")) for s in services.values()] == [2, 2, 2]
    assert [s.lines for s in services.values()] == [[], [], []]


# --- before training ------------------------------------------------------------------------


def test_an_unknown_name_is_an_error_that_lists_the_known(warned):
    with pytest.raises(ConfigError, match="did you mean 'wandb'") as caught:
        start(["wanbd"], warned)
    for name in (*TRACKERS, "wanbd", "metrics.jsonl"):
        assert name in str(caught.value)


def test_tensorboard_needs_a_run_directory(services, warned):
    with pytest.raises(ConfigError, match="run directory"):
        start(["tensorboard"], warned, None)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_an_error_before_any_tracker_starts(
    name, services, warned, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, FAKES[name][0])
    monkeypatch.setitem(sys.modules, name, None)  # what import finds when nothing is installed
    others = [n for n in TRACKERS if n != name]
    with pytest.raises(MissingDependencyError, match=rf"pip install 'rlrf\[{name}\]'"):
        start([*others, name], warned, tmp_path)
    assert not any(services[n].of("start") for n in others)
    assert not warned


def install(folder, monkeypatch, name, source):
    """A real module in place of the fake one."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))


def test_a_broken_installation_is_warned_of(services, warned, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "trackio", "import a_module_that_is_not_there")
    trackers = start(["trackio", "wandb"], warned)
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert [topic for topic, _ in warned] == ["tracker/trackio"]
    assert "a_module_that_is_not_there" in warned[0][1]
    assert services["wandb"].lines == [(1, {"a": 1.0})]


def test_importing_a_tracker_draws_no_random_number(services, warned, tmp_path, monkeypatch):
    source = "import random\nrandom.random()\ninit = None\n"
    install(tmp_path, monkeypatch, "trackio", source)
    before = random.getstate()
    start(["trackio"], warned).close()
    assert random.getstate() == before


# --- failures -------------------------------------------------------------------------------


def fail(error):
    def raise_it():
        raise error

    return raise_it


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize(
    ("call", "told"), [("start", "start"), ("log", "log"), ("close", "finish")]
)
@pytest.mark.parametrize("error", [OSError("no\n route"), SystemExit("no route")])
def test_a_tracker_that_fails_is_warned_of_once_and_dropped(
    name, call, told, error, services, warned, tmp_path
):
    other = next(n for n in TRACKERS if n != name)
    services[name].on[call] = fail(error)
    trackers = start([name, other], warned, tmp_path)
    assert len(warned) == (call == "start")  # told at once
    for step in range(5):
        trackers.log(step, {"a": 1.0})
    trackers.close()
    ((topic, message),) = warned
    assert topic == f"tracker/{name}"
    assert f"{name} could not {told}: {type(error).__name__}: no route." in message
    assert "metrics.jsonl" in message
    assert warned.threads == {threading.current_thread()}
    assert len(services[name].lines) == (5 if call == "close" else 0)
    assert len(services[other].lines) == 5
    if call == "log":  # what it has had is not lost
        assert services[name].of("close")


def test_a_warning_that_raises_does_not_get_out(services, tmp_path):
    services["wandb"].on["start"] = fail(OSError())
    services["tensorboard"].on["log"] = fail(OSError())
    services["trackio"].on["close"] = fail(OSError())

    def warn(topic, message):
        raise RuntimeWarning(message)

    trackers = start(TRACKERS, warn, tmp_path)
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert services["trackio"].lines


# --- hanging --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_never_starts_delays_nobody(name, services, warned, tmp_path):
    release, arrived = threading.Event(), threading.Semaphore(0)
    services[name].on["start"] = lambda: release.wait(WAIT_S)
    other = next(n for n in TRACKERS if n != name)
    services[other].on["log"] = arrived.release
    try:
        trackers = start([name, other], warned, tmp_path, wait=0, inbox_size=3, close_timeout=0.2)
        for step in range(5):
            trackers.log(step, {"a": 1.0})
            assert arrived.acquire(timeout=WAIT_S)  # the other's
            assert len(warned) == (step >= 3)
        assert "does not keep up: step 3 and 3 lines" in warned[0][1]
        trackers.close()
    finally:
        release.set()
    messages = [m for topic, m in warned if topic == f"tracker/{name}"]
    assert len(messages) == len(warned) == 3
    assert "did not finish within 0.2 s and is abandoned" in messages[1]
    assert "misses 2 lines" in messages[2]


def test_a_tracker_that_hangs_and_recovers_goes_on(services, warned):
    entered, release = threading.Event(), threading.Event()
    trackio = services["trackio"]

    def hang():
        entered.set()
        release.wait(WAIT_S)

    trackio.on["log"] = hang
    trackers = start(["trackio"], warned, inbox_size=2)
    trackers.log(0, {"a": 0.0})
    assert entered.wait(WAIT_S)
    for step in (1, 2, 3, 4):
        trackers.log(step, {"a": 0.0})
    caught_up = threading.Event()
    trackio.on["log"] = lambda: caught_up.set() if len(trackio.lines) == 2 else None
    release.set()
    assert caught_up.wait(WAIT_S)
    trackers.log(5, {"a": 0.0})
    trackers.close()
    assert [step for step, _ in trackio.lines] == [0, 1, 2, 5]
    assert [("does not keep up" in m, "misses 2 lines" in m) for _, m in warned] == [
        (True, False),
        (False, True),
    ]


def test_closing_waits_for_what_is_under_way(services, warned):
    entered, release = threading.Event(), threading.Event()

    def hang():
        entered.set()
        release.wait(WAIT_S)

    services["trackio"].on["log"] = hang
    trackers = start(["trackio"], warned)
    trackers.log(1, {"a": 1.0})
    trackers.log(2, {"a": 1.0})
    assert entered.wait(WAIT_S)
    closing = threading.Thread(target=trackers.close)
    closing.start()
    release.set()
    closing.join(WAIT_S)
    assert [step for step, _ in services["trackio"].lines] == [1, 2]
    assert services["trackio"].of("close")
    assert not warned


# --- resuming -------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_where_it_was(services, warned, tmp_path):
    start(TRACKERS, warned, tmp_path).close()
    start(TRACKERS, warned, tmp_path, resume_step=7).close()
    first, second = services["wandb"].of("start")
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert [s["purge_step"] for s in services["tensorboard"].of("start")] == [0, 7]
    assert len(services["tensorboard"].of("config")) == 1
    assert [s["resume"] for s in services["trackio"].of("start")] == ["never", "allow"]


def test_a_new_run_in_the_same_folder_is_another(services, warned, tmp_path):
    for _ in range(2):
        start(["wandb", "trackio"], warned, tmp_path).close()
    first, second = services["wandb"].of("start")
    assert first["id"] != second["id"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": second["id"]}
    assert [s["resume"] for s in services["trackio"].of("start")] == ["never", "never"]


@pytest.mark.parametrize("content", [None, "{torn", "[]", "{}"])
def test_without_its_id_a_resumed_run_gets_a_new_one_for_good(content, services, warned, tmp_path):
    if content is not None:
        (tmp_path / "trackers.json").write_text(content)
    for step in (3, 6):
        start(["wandb"], warned, tmp_path, resume_step=step).close()
    first, second = services["wandb"].of("start")
    assert first["id"] == second["id"]
    assert not warned


# --- wandb ----------------------------------------------------------------------------------


def test_wandb_never_asks_on_the_terminal(services, warned):
    services["wandb"].logged_in = False
    start(["wandb"], warned).close()
    assert services["wandb"].of("login") == [{"prompt": False}]
    assert not services["wandb"].of("start")
    assert "wandb login" in warned[0][1]


def test_wandb_needs_no_login_offline_or_beside_an_open_run(services, warned, monkeypatch):
    wandb = services["wandb"]
    wandb.logged_in = False
    wandb.mode = "offline"
    start(["wandb"], warned).close()
    wandb.mode = "online"
    monkeypatch.setattr(sys.modules["wandb"], "run", object())
    start(["wandb"], warned).close()
    assert len(wandb.of("start")) == 2
    assert not warned


def test_wandb_projects_and_folders(services, warned, tmp_path, monkeypatch):
    start(["wandb"], warned, tmp_path).close()
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    start(["wandb"], warned).close()
    told = services["wandb"].of("start")
    assert [(s["project"], s["dir"]) for s in told] == [("proj", str(tmp_path)), ("theirs", None)]


def test_wandb_goes_by_our_steps(services, warned):
    """Its own only grow, and drop what a run that went back to a checkpoint says again."""
    trackers = start(["wandb"], warned)
    for step in (1, 2, 3, 2, 3, 4):
        trackers.log(step, {"a": 1.0})
    trackers.close()
    assert {"name": "*", "step_metric": "step"} in services["wandb"].of("define")
    assert [step for step, _ in services["wandb"].lines] == [1, 2, 3, 2, 3, 4]


# --- the real packages ----------------------------------------------------------------------


def test_tensorboard_reads_back_what_was_logged(warned, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars():
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        found = {
            t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]
        }
        return {tag: values for tag, values in found.items() if values}, events.Tags()["tensors"]

    trackers = start(["tensorboard"], warned, tmp_path)
    for step in range(5):
        trackers.log(step, {"reward": step / 4, "self_distillation/kl": math.nan})
    trackers.close()
    found, texts = scalars()
    assert found["reward"] == [(s, s / 4) for s in range(5)]
    assert all(math.isnan(v) for _, v in found["self_distillation/kl"])
    assert texts == ["config/text_summary"]

    trackers = start(["tensorboard"], warned, tmp_path, resume_step=3)
    for step in (3, 4, 5):
        trackers.log(step, {"reward": 2.0})
    trackers.close()
    assert scalars()[0]["reward"] == [(0, 0), (1, 0.25), (2, 0.5), (3, 2), (4, 2), (5, 2)]

    trackers = start(["tensorboard"], warned, tmp_path)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert scalars()[0] == {"loss": [(1, 1)]}
    assert not warned


def test_tensorboard_lines_are_on_disk_before_the_run_ends(warned, tmp_path):
    """A killed run keeps its curves."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    flushed = threading.Event()
    flush = SummaryWriter.flush

    def spy(self):
        flush(self)
        flushed.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "flush", spy)
        trackers = start(["tensorboard"], warned, tmp_path)
        trackers.log(1, {"reward": 1.0})
        assert flushed.wait(WAIT_S)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("reward")] == [1.0]
    trackers.close()


SCRIPT = """
import sys
from pathlib import Path
from rlrf_trainers.run.trackers import open_trackers
warned = []
for steps, resume in (((0, 1, 2), None), ((2, 3), 2)):
    trackers = open_trackers(
        [sys.argv[1]], project="proj", name="run", config={"lr": 1e-6, "names": ["a"]},
        folder=Path(sys.argv[2]), resume_step=resume,
        warn=lambda *words: warned.append(words), start_timeout=60, close_timeout=60,
    )
    for step in steps:
        trackers.log(step, {"reward": step / 2, "loss": float("nan"), "kl": float("inf")})
    trackers.close()
print("WARNED", warned)
"""


def in_a_process(name, folder, **environment):
    """A run and its resumption with the real package, which may leave threads and processes."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, name, str(folder)],
        env={**os.environ, "HOME": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        check=True,
    ).stdout


@pytest.mark.slow
def test_wandb_offline_keeps_the_run(tmp_path):
    wandb = pytest.importorskip("wandb")
    used = {"project", "name", "id", "resume", "config", "dir", "reinit", "settings"}
    assert used <= set(inspect.signature(wandb.init).parameters)
    assert {"prompt", "verify"} <= set(inspect.signature(wandb.login).parameters)
    assert "WARNED []" in in_a_process("wandb", tmp_path, WANDB_MODE="offline")
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert files
    assert {file.stem for file in files} == {f"run-{run_id}"}


@pytest.mark.slow
def test_wandb_without_a_login_is_left_out(tmp_path):
    pytest.importorskip("wandb")
    out = in_a_process("wandb", tmp_path, WANDB_MODE="online", WANDB_API_KEY="")
    assert out.count("not logged in") == 2


@pytest.mark.slow
def test_trackio_keeps_the_run(tmp_path):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("needs trackio")
    import sqlite3

    assert "WARNED []" in in_a_process("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "db"))
    with sqlite3.connect(tmp_path / "db" / "proj.db") as db:
        rows = db.execute("SELECT run_id, run_name, step, metrics FROM metrics").fetchall()
    assert len({row[0] for row in rows}) == 1
    assert {row[1] for row in rows} == {"run"}
    assert [row[2] for row in rows] == [0, 1, 2, 2, 3]
    assert json.loads(rows[1][3])["reward"] == 0.5
