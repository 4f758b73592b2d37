"""One broken distribution breaks only itself: it is named, in every registry, and no more."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import rlrf
from rlrf import UsageError, cli
from rlrf._plugin_source import describe_target, read_signature
from rlrf.plugins import Registry
from rlrf.registry import load_entry_points

GROUPS = ("environments", "trainers", "policies", "sandboxes", "commands")
SOURCES = {
    "syntax": "class Thing:\n    def broken(:\n",
    "exits": "import sys\nThing = 1\nsys.exit('not today')\n",
    "raises": "class Thing(BaseException):\n"
    "    def __str__(self):\n        raise ValueError\nraise Thing\n",
    "lacks": "class Others:\n    Thing = 1\n    def f(self):\n        Thing = 2\n",
    "nulls": "x = 1\0\n",
    "latin": b"x = 'caf\xe9'\n",
    "absent": None,
    "deep": "x = " + "(" * 500 + ")" * 500 + "\n",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a distribution, as pip would leave it."""
    before = set(gymnasium.registry)
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, entry_points: str | bytes, **modules: str | bytes | None) -> None:
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        data = entry_points if isinstance(entry_points, bytes) else entry_points.encode()
        (info / "entry_points.txt").write_bytes(data)
        for module, source in modules.items():
            if source is not None:
                data = source if isinstance(source, bytes) else source.encode()
                (tmp_path / f"{module}.py").write_bytes(data)

    yield install
    for name in set(gymnasium.registry) - before:
        gymnasium.registry.pop(name)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["rlrf", *arguments])
    before = list(cli.app.registered_commands)
    with pytest.raises(SystemExit) as end:
        cli.main()
    cli.app.registered_commands[:] = before
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return end.value.code, captured.out, captured.err


def points(name: str, module: str) -> str:
    lines = ""
    for group in GROUPS:
        id = f"{name}-v0" if group == "environments" else name
        lines += f"[rlrf.{group}]\n{id} = {module}:Thing\n"
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [f if f in ("absent", "raises") else pytest.param(f, marks=pytest.mark.slow) for f in SOURCES],
)
def test_a_module_that_cannot_be_imported(fault, installed, monkeypatch, capsys) -> None:
    name, module = f"bad-{fault}", f"bad_{fault}_module"
    installed(f"broken-{fault}", points(name, module), **{module: SOURCES[fault]})
    load_entry_points()
    code, out, _ = run(monkeypatch, capsys, "list")
    assert code == 0
    rows = [line for line in out.splitlines() if line.split()[:1] in ([name], [f"{name}-v0"])]
    assert len(rows) == 4
    if fault not in ("exits", "raises"):  # which is not seen without importing them
        assert all(f"of broken-{fault} 1.2" in row and "not importable" in row for row in rows)
    assert "sdpo" in out
    for arguments in (
        ("info", f"{name}-v0"),
        ("check", f"{name}-v0"),
        ("eval", "--env", "format-rules-v0", "--policy", name),
        ("train", "--env", "format-rules-v0", "--model", "m", "--trainer", name),
        (name, "x"),
    ):
        code, _, error = run(monkeypatch, capsys, *arguments)
        assert code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert f"of broken-{fault} 1.2 points to" in error, error
    with pytest.raises(UsageError, match=f"broken-{fault} 1.2"):
        Registry("rlrf.sandboxes", "sandbox").load(name)
    code, out, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    assert name in out


@pytest.mark.parametrize(
    ("source", "there"),
    [
        ("def Thing(): 'It is.'", True),
        ("if 1:\n try:\n  from json import load as Thing\n except ImportError:\n  pass", True),
        ("(a, Thing), b = (1, 2), 3", True),
        ("for Thing in 'x': pass", True),
        ("import a.b as Thing", True),
        ("from .Thing import x", True),
        ("from json import *", True),  # which cannot be known
        ("def __getattr__(name): return 1", True),
        ("globals()['Th' + 'ing'] = 1", True),
        ("def f():\n global Thing\n Thing = 1", True),
        ("", True),  # as of a module that is compiled
        ("print(Thing)", False),
        ("import Thing.x as y", False),
        ("x = [Thing for y in z]", False),
    ],
)
def test_whether_a_module_has_what_is_asked_of_it_is_read(source, there, installed) -> None:
    installed("read", "", read_module=source)
    told = describe_target("read_module:Thing", "read 1.2")[0]
    broken = "(not importable: the module 'read_module' has no 'Thing', of read 1.2)"
    assert (told == broken) == (not there)


@pytest.mark.parametrize(
    "source",
    [
        "def Thing(a, /, b, c=1, *rest, d, e=2, **more): 0",
        "async def Thing(*, only): 0",
        "class Thing:\n def __init__(self, model, *, device=None): 0",
        "def Thing(): 0",
    ],
)
def test_how_something_may_be_called_is_read_from_its_source(source, installed) -> None:
    installed("read", "", called_module=source + "\nraise RuntimeError('imported')")
    there: dict[str, Any] = {}
    exec(source, there)
    real = inspect.signature(there["Thing"]).parameters.values()
    read = read_signature("called_module:Thing [extra]")
    assert [(p.name, p.kind, p.default is p.empty) for p in real] == [
        (p.name, p.kind, p.default is p.empty) for p in (read.parameters.values() if read else ())
    ]
    assert read_signature(there["Thing"]) == inspect.signature(there["Thing"])


@pytest.mark.parametrize(
    "source",
    [
        "@cached\ndef Thing(a): 0",
        "@dataclass\nclass Thing:\n a: int",
        "class Thing(Base): 0",
        "from x import Thing",
        "if 1:\n def Thing(a): 0",
        "def Thing(a): 0\ndef Thing(b): 0",
        "def Thing(",
    ],
)
def test_what_the_source_does_not_tell_is_not_known(source, installed) -> None:
    installed("read", "", untold_module=source)
    assert read_signature("untold_module:Thing") is None
    assert read_signature("absent_module:Thing") is None
    assert read_signature(3) is None


def test_a_policy_without_a_model_is_told_before_anything_is_imported(
    installed, monkeypatch, capsys
) -> None:
    source = "def Thing(model): 0\nraise RuntimeError('imported')"
    installed("slow", "[rlrf.policies]\nslow = slow_module:Thing\n", slow_module=source)
    given = ("eval", "--env", "no-such-env-v0", "--policy", "slow")
    code, _, error = run(monkeypatch, capsys, *given)
    assert (code, "missing a required argument: 'model'; give --model" in error) == (2, True)
    code, _, error = run(monkeypatch, capsys, *given, "--model", "m", "--policy-option", "x=1")
    assert (code, "unexpected keyword argument 'x'; its options are model" in error) == (2, True)


MALFORMED = [
    "[rlrf.policies]\nno equals sign\n",
    b"\xff\xfe\0binary",
    "[rlrf.policies\nx = y:z\n",
    "[rlrf.environments]\nNot An Id = x:Y\n= x:Y\nodd-v0 = \n",
    "[rlrf.policies]\nodd = :::\nspace name = a b c:d e\nextra = json:loads [some]\n",
    "[rlrf.commands]\nlist = json:loads\n--help = json:loads\n[red = json:loads\n",
]


@pytest.mark.parametrize(
    "entry_points",
    [*MALFORMED[:2], *(pytest.param(text, marks=pytest.mark.slow) for text in MALFORMED[2:])],
)
def test_entry_points_that_are_malformed(entry_points, installed, monkeypatch, capsys) -> None:
    installed("malformed", entry_points)
    with pytest.warns() if "Not An" in str(entry_points) else _nothing():
        load_entry_points()
    code, out, _ = run(monkeypatch, capsys, "list")
    assert code == 0
    assert "sdpo" in out
    assert "format-rules-v0" in out
    assert run(monkeypatch, capsys, "--help")[0] == 0
    if "extra" in str(entry_points):
        assert Registry("rlrf.policies", "policy").load("extra").__name__ == "loads"
        code, _, error = run(
            monkeypatch, capsys, "eval", "--env", "format-rules-v0", "--policy", "odd"
        )
        assert code == 2
        assert "of malformed 1.2" in error


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_a_malformed_id_is_told_with_its_distribution(installed) -> None:
    installed("odd-one", "[rlrf.environments]\nBad Id = x:Y\n")
    with pytest.warns(UserWarning, match=r"of odd-one 1\.2 is left out"):
        load_entry_points()


def test_a_name_that_is_rlrfs_stays_rlrfs_and_the_other_is_named(installed) -> None:
    points = "[rlrf.policies]\nhf = thief:Thing\n[rlrf.environments]\ncode-v0 = thief:Thing\n"
    installed("aaa-thief", points, thief="Thing = 1")
    told = r"policy 'hf' of aaa-thief 1\.2 \(thief:Thing\) is left out: rlrf .* of that name"
    registry = Registry("rlrf.policies", "policy")
    with pytest.warns(UserWarning, match=told):
        assert registry.target("hf") == rlrf.policies.target("hf") != "thief:Thing"
    assert registry.origin("hf").startswith("rlrf ")  # and no second warning
    with pytest.warns(UserWarning, match=r"the environment 'code-v0' of aaa-thief 1\.2"):
        load_entry_points()
    assert rlrf.registry["code-v0"].entry_point != "thief:Thing"


def test_of_two_of_one_name_the_first_that_is_found_is_taken(installed) -> None:
    installed("twin_one", "[rlrf.policies]\ntwin = one:Thing\n")
    installed("twin_two", "[rlrf.policies]\ntwin = two:Thing\n")
    with pytest.warns(UserWarning, match=r"'twin' of twin_... 1\.2 .*: twin_... 1\.2 brings"):
        taken = Registry("rlrf.policies", "policy").target("twin")
    assert taken in ("one:Thing", "two:Thing")


def test_a_command_of_the_name_of_rlrfs_is_named(installed, monkeypatch, capsys) -> None:
    installed("ccc-cmd", "[rlrf.commands]\ninfo = json:loads\n")
    code, out, error = run(monkeypatch, capsys, "info", "format-rules-v0")
    assert (code, "Splits" in out) == (0, True)
    assert "warning: the command 'info' of ccc-cmd 1.2 is left out: rlrf has one" in error


def test_an_environment_without_its_module_is_named_at_the_import(installed, tmp_path) -> None:
    points = "[rlrf.environments]\nlost-v0 = lost_module.inner:Thing\n"
    installed("ddd-lost", points + "here-v0 = here:Thing\n", here="raise SystemExit")
    words = r"'lost-v0' of ddd-lost 1\.2 cannot be imported: .* no module 'lost_module'"
    with pytest.warns(UserWarning, match=words) as told:
        load_entry_points()
    assert len(told) == 1
    assert {"lost-v0", "here-v0"} <= set(rlrf.registry)


def test_damaged_metadata_does_not_break_the_import(installed, tmp_path: Path) -> None:
    installed("damaged", "[rlrf.policies]\nno equals sign\n")
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import rlrf; print(len(rlrf.policies.names()))"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2
    assert "entry points of damaged 1.2 cannot be read" in done.stderr


def test_a_good_one_has_an_origin() -> None:
    assert rlrf.policies.origin("hf").startswith("rlrf ")
    assert Registry("rlrf.nothing", "thing").names() == []
