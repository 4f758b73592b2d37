"""Whatever is typed: an exit code of ours, lines that begin with "error:", and no traceback."""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlrf import cli
from tests.test_cli import FakeTrainer, scripted  # noqa: F401  # which registers what is used here

Invoke = Callable[..., tuple[int, str, str]]

EVAL = ("eval", "--env", "cli-cities-v0", "--policy", "cli-scripted")
TRAIN = ("train", "--trainer", "cli-fake", "--model", "m", "--env", "cli-cities-v0", "--no-report")
DISCOVER = ("discover", "--env", "cli-cities-v0", "--model", "m")

LONG = "x" * 300
PLACES = {
    "empty": "",
    "here": ".",
    "pipe": "pipe",
    "absent": "no/such/place",
    "below a file": "text/below",
    "line break": "a\nb",
    "long": LONG,
    "very long": f"{LONG}/" * 20,
    "not text": os.fsdecode(b"caf\xe9"),
    "folder": "folder",
    "dangling": "dangling",
    "loop": "loop",
    "binary": "binary",
    "home": "~nobody-at-all/x",
    "option": "--",
    "emoji": "🦊",
    "markup": "[red]x[/blue]",
}
TAKES_A_PLACE = {
    "info": ("info", "{}"),
    "info option": ("info", "cli-cities-v0", "-o", "accent={}"),
    "info split": ("info", "cli-cities-v0", "--split", "{}"),
    "eval env": ("eval", "--env", "{}", "--policy", "cli-scripted"),
    "eval out": (*EVAL, "--out", "{}"),
    "eval overwrite": (*EVAL, "--out", "{}", "--overwrite"),
    "eval model": (*EVAL, "--model", "{}", "--limit", "1"),
    "eval hf": ("eval", "--env", "cli-cities-v0", "--policy", "hf", "--model", "{}"),
    "train": ("train", "{}"),
    "train run-dir": (*TRAIN, "--run-dir", "{}"),
    "train overwrite": (*TRAIN, "--run-dir", "{}", "--overwrite"),
    "train resume": ("train", "--resume", "{}"),
    "train model": ("train", "--env", "cli-cities-v0", "--run-dir", "run", "--model", "{}"),
    "report": ("report", "{}"),
    "report out": ("report", "run0", "--out", "{}"),
    "check": ("check", "{}"),
    "discover config": (*DISCOVER, "--config", "{}"),
    "discover tasks": (*DISCOVER, "--tasks-file", "{}"),
    "discover out": (*DISCOVER, "--out", "{}"),
    "model fetch": ("model", "fetch", "{}"),
    "model fetch out": ("model", "fetch", "smollm2-135m-instruct", "--out", "{}"),
    "model export": ("model", "export", "{}", "out"),
    "model export out": ("model", "export", "run0", "{}"),
    "sandbox gc": ("sandbox", "gc", "--docker-host", "{}"),
    "sandbox build": ("sandbox", "build", "--docker-host", "unix:///no/{}"),
    "command": ("{}",),
}
WRITES = ("eval out", "eval overwrite", "report out", "discover out")
NEEDS_TORCH = ("eval hf", "train model", "discover config", "discover tasks", "discover out")
HUGE = "9" * 40
VALUES = ("", "x", "-1", "0", "1e400", "nan", HUGE, "9" * 5000, "true", "[1]", "\u0663")
TAKES_A_NUMBER = [
    (*EVAL, f"--{name}={{}}", "--limit=1", "--out=r.json", "--overwrite")
    for name in (
        "limit",
        "samples",
        "temperature",
        "top-p",
        "max-tokens",
        "seed",
        "max-concurrency",
    )
]
TAKES_A_NUMBER += [
    (*TRAIN, "--run-dir", "run", "--overwrite", "--set", f"{key}={{}}")
    for key in ("trainer.learning_rate", "env", "env.id", "trainer", "run")
]
TAKES_A_NUMBER += [
    (*TRAIN, "--run-dir", "run", "--overwrite", "--set", f"{key}={{}}")
    for key in ("run.dir", "eval_env", "eval_env.id", "model", "", "a.b", "{}", "trainer.name")
]
CONFIGS: dict[str, bytes] = {
    "nothing": b"",
    "binary": b"\x00\xff\xfe",
    "utf-16": "model = 'm'".encode("utf-16"),
    "not toml": b"model = ",
    "deep": b"model = " + b"[" * 5000,
    "digits": b"model = " + b"9" * 5000,
    "types": b"model = 1\nenv = 2\ntrainer = [3]\nrun = 1979-05-27\neval_env = true\n",
    "nested": b"model = 'm'\n[env]\nid = {a = 1}\n[trainer.name]\nx = 1\n[run]\ndir = []\n",
    "names": b"model = 'm'\n'' = 1\n[env]\nid = 'cli-cities-v0'\n'' = 1\nself = 2\nid2 = 3\n",
    "null": b"model = 'a\\u0000b'\n[env]\nid = 'cli-cities-v0'\n[run]\ndir = 'a\\u0000b'\n",
    "self": b"model = 'm'\n[env]\nid = 'cli-cities-v0'\nself = 1\n",
    "kwargs": b"model = 'm'\n[env]\nid = 'cli-cities-v0'\nkwargs = 1\nfeedback = 5\nsplit = []\n",
    "huge split": b"model = 'm'\n[env]\nid = 'cli-cities-v0'\nsplit = '" + b"x" * 10**6 + b"'\n",
}
OURS = (0, 1, 2, 130)


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Invoke:
    """The command in a folder of odd files, where no hub and no package index can be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLRF_DEBUG", raising=False)
    monkeypatch.setenv("RLRF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "text").write_text("hello\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = list(cli.app.registered_commands)

    def invoke(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlrf", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        cli.app.registered_commands[:] = before
        out, err = capfd.readouterr()
        return end.value.code, out, err

    return invoke


def is_clear(code: int, error: str, arguments: tuple[str, ...]) -> None:
    shown = (arguments, code, error[-2000:])
    assert code in OURS, shown
    assert "Traceback" not in error, shown
    assert "RLRF_DEBUG=1 shows where" not in error, shown  # nobody had thought of it
    if code:
        assert re.search(r"^error: \S", error, re.M), shown
    assert len(error) < 5000, shown


HOW_MANY = [pytest.param(1, id="few"), pytest.param(8, id="many", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("many", HOW_MANY)
@pytest.mark.parametrize("name", TAKES_A_PLACE)
def test_odd_places(name: str, many: int, typed: Invoke) -> None:
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    if "run0" in TAKES_A_PLACE[name]:
        assert typed(*TRAIN, "--run-dir", "run0")[0] == 0
    for place in random.Random(f"{name} {many}").sample(list(PLACES.values()), many):
        if name == "sandbox gc" and place in ("", "[red]x[/blue]"):
            continue  # the daemon that is there; what docker's own address parser says
        arguments = tuple(a.replace("{}", place) for a in TAKES_A_PLACE[name])
        if place == "pipe" and name not in WRITES:
            continue  # to read from a pipe may take as long as its writer likes
        code, _, error = typed(*arguments)
        is_clear(code, error, arguments)
        assert Path("pipe").is_fifo()


@pytest.mark.parametrize("many", HOW_MANY)
@pytest.mark.parametrize("template", TAKES_A_NUMBER, ids=lambda t: t[-1])
def test_odd_values(template: tuple[str, ...], many: int, typed: Invoke) -> None:
    for value in random.Random(f"{template} {many}").sample(VALUES, many):
        arguments = tuple(a.replace("{}", value) for a in template)
        code, _, error = typed(*arguments)
        is_clear(code, error, arguments)


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_configurations(name: str, typed: Invoke) -> None:
    for suffix in (".toml", ".json"):
        Path(f"c{suffix}").write_bytes(CONFIGS[name])
        run = f"run{suffix}"
        code, _, error = typed("train", f"c{suffix}", "--trainer", "cli-fake", "--run-dir", run)
        is_clear(code, error, ("train", name))
        assert code == 2 or name == "null"  # which is a name like another to a trainer
        assert code == 0 or not Path(run).exists()


def test_a_byte_order_mark_is_nothing(typed: Invoke) -> None:
    text = "\ufeffmodel = 'm'\n[env]\nid = 'cli-cities-v0'\n[trainer]\nname = 'cli-fake'\n"
    Path("c.toml").write_text(text, encoding="utf-8")
    assert typed("train", "c.toml", "--run-dir", "run", "--no-report")[0] == 0
