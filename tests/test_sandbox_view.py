"""What of this machine a program sees: a Python, and never a tree in which answers may lie."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import rlrf_environments
from rlrf import UsageError, run_sync
from rlrf.sandbox import Limits, Program, StdinCase, open_sandbox
from rlrf_sandboxes import bubblewrap, host, images
from tests.backends import WALLED, needs_bwrap, options

LOOK = """
import os, sys
found = []
for top, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(top, f) not in ("/proc", "/sys", "/dev")]
    for name in files:
        path = os.path.join(top, name)
        try:
            with open(path, "rb") as file:
                if name == "tasks.jsonl" or NEEDLE in file.read(1 << 20):
                    found.append(path)
        except OSError:
            pass
    if os.path.basename(top).startswith("rlrf_") and folders + files:
        found.append(top)
for name in ("environ", "cmdline", "maps", "mountinfo", "status"):
    for who in os.listdir("/proc"):
        try:
            if NEEDLE in open("/proc/" + who + "/" + name, "rb").read():
                found.append("/proc/" + who + "/" + name)
        except OSError:
            pass
print(found, "needle" in str(os.environ).lower())
"""
LOOK = "NEEDLE = bytes([110, 101, 101, 100, 108, 101, 45, 52, 50])\n" + LOOK
"""Looks for the word of NEEDLE, which stands in no program and no library."""
NEEDLE = "needle-42"


def private_usr(script: str, *args: str, cwd: Path | None = None) -> str:
    """Run a Python script where ``/usr`` may be written without anybody else seeing it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a private /usr takes root and unshare")
    prepare = """
        set -e
        mount -t tmpfs tmpfs /mnt
        mkdir /mnt/up /mnt/work
        mount -t overlay overlay -o lowerdir=/usr,upperdir=/mnt/up,workdir=/mnt/work /usr
        touch /usr/here
    """
    private = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    possible = subprocess.run([*private, prepare], capture_output=True, text=True, check=False)
    if possible.returncode:
        pytest.skip(f"/usr cannot be made private here: {possible.stderr.strip()}")
    ran = subprocess.run(
        [*private, f'{prepare}\nexec "$0" -c "$@"', sys.executable, textwrap.dedent(script), *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "NEEDLE_KEY": NEEDLE, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


INSTALLED = """
    import io, json, os, shutil, sys
    from rlrf import run_sync
    from rlrf.sandbox import Limits, Program, StdinCase, open_sandbox
    from rlrf_sandboxes import host, images

    source, look, python = sys.argv[1:]
    stdlib = host.Python(python).stdlib
    version = stdlib.name
    for place in (
        "/usr/lib/python3/dist-packages", f"/usr/local/lib/{version}/dist-packages",
        f"/usr/local/lib/{version}/site-packages", f"/usr/lib/{version}/site-packages",
        str(stdlib), str(stdlib / "site-packages"), f"/usr/local/venv/lib/{version}/site-packages",
        "/usr/share", "/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib/locale",
    ):
        shutil.copytree(source, place + "/rlrf_environments", dirs_exist_ok=True)
        shutil.copy(source + "/code/tasks.jsonl", place)
        with open(place + "/needle.txt", "w") as file:
            file.write("needle-42")
    os.environ["HOME"] = os.getcwd()

    async def go():
        async with open_sandbox("bubblewrap", slots=1, python=python) as pool:
            patient = Limits(cpu_s=60, wall_s=200)
            return await pool.run(Program(look), [StdinCase("", "")], limits=patient)

    raw = run_sync(go()).cases[0].raw
    with images._Archive(io.BytesIO()) as archive:  # what `import --from-host` puts in
        images._pack_python(archive, host.Python(python))
    assert len(archive._names) > 500
    names = [n for n in archive._names if "rlrf_" in n or "needle" in n or "tasks.j" in n]
    print(json.dumps([raw.text, str(raw.error), names]))
"""


# An interpreter below a prefix of its own, as pyenv and conda have it, where everybody may read it.
READABLE = """
    import os, pathlib, sys
    own = sys.base_prefix
    os.mkdir("/mnt/own"), os.mkdir("/mnt/up2"), os.mkdir("/mnt/work2")
    assert not os.system(f"mount --bind {own} /mnt/own")
    assert not os.system(f"mount -t tmpfs -o mode=755 tmpfs /{pathlib.Path(own).parts[1]}")
    os.makedirs(own)
    layers = "lowerdir=/mnt/own,upperdir=/mnt/up2,workdir=/mnt/work2"
    assert not os.system(f"mount -t overlay overlay -o {layers} {own}")
"""


@pytest.mark.slow
@needs_bwrap
@pytest.mark.parametrize(
    "whose", ["the system's", pytest.param("one with a prefix", marks=pytest.mark.slow)]
)
def test_what_is_installed_under_usr_is_in_no_sandbox(whose, tmp_path):
    (tmp_path / "needle.txt").write_text(NEEDLE)
    source = Path(rlrf_environments.__file__).parent
    script, python = textwrap.dedent(INSTALLED), "/usr/bin/python3"
    if whose == "one with a prefix":
        script = textwrap.dedent(READABLE) + script
        python = f"{sys.base_prefix}/bin/python3"
        top = Path(sys.base_prefix).parts[1]
        if top in ("usr", *(path.parts[1] for path in (source, tmp_path, Path(sys.prefix)))):
            pytest.skip("this Python lies where the tests do")
    elif not os.path.exists(python):
        pytest.skip("this system has no Python of its own")
    said = private_usr(script, str(source), LOOK, python, cwd=tmp_path)
    assert json.loads(said) == ["[] False\n", "None", []]


@pytest.mark.parametrize("backend", WALLED)
def test_nothing_of_the_owner_is_in_a_sandbox(backend, tmp_path, monkeypatch):
    (tmp_path / "needle.txt").write_text(NEEDLE)
    monkeypatch.setenv("NEEDLE_KEY", NEEDLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    async def go():
        async with open_sandbox(backend, slots=1, **options(backend)) as pool:
            patient = Limits(cpu_s=60, wall_s=200)
            return await pool.run(Program(LOOK), [StdinCase("", "")], limits=patient)

    assert run_sync(go()).cases[0].raw.text == "[] False\n"


NUMPY = """
    import os, shutil, sys
    from pathlib import Path
    from rlrf import run_sync
    from rlrf.sandbox import Program, StdinCase, open_sandbox

    source, look, version = sys.argv[1:]
    place = Path(f"/usr/local/lib/{version}/dist-packages")
    for path in Path(source).parent.glob("numpy*"):
        shutil.copytree(path, place / path.name)
    shutil.copytree(source, place / "stranger")

    async def go():
        async with open_sandbox("bubblewrap", slots=1) as pool:
            return await pool.run(Program(look), [StdinCase("", "")])

    print(run_sync(go()).cases[0].raw)
"""


@needs_bwrap
@pytest.mark.slow
def test_numpy_can_be_imported_where_the_sandboxs_python_has_it():
    numpy = pytest.importorskip("numpy")
    try:
        system = host.Python("/usr/bin/python3")
    except OSError:
        pytest.skip("this system has no Python of its own")
    if system.version != sys.version_info[:2]:
        pytest.skip("numpy is compiled for another Python than the system's")
    look = """
        import numpy as np
        print(int((np.eye(300) @ np.arange(300)).sum()), np.linalg.inv(np.eye(2)).sum())
        try:
            import stranger
        except ImportError:
            print("and nothing else")
    """
    folder = str(Path(numpy.__file__).parent)
    said = private_usr(NUMPY, folder, textwrap.dedent(look), system.name)
    assert "44850 2.0\\nand nothing else" in said


# --- the allow-list -------------------------------------------------------------------------


def test_the_standard_library_is_told_from_what_lies_beside_it():
    python = host.Python(sys.executable)
    assert all(map(python.standard, ("json", "os.py", "lib-dynload", "__pycache__", "_thread.py")))
    assert not any(map(python.standard, ("site-packages", "rlrf_environments", "tasks.jsonl")))
    python._modules = frozenset()  # as before 3.10
    assert python.standard("json")
    assert not python.standard("dist-packages")


def test_bubblewrap_binds_files_and_named_trees_only():
    python, binds = bubblewrap._view(sys.executable, ())
    bound = {binds[i + 1] for i, word in enumerate(binds) if word == "--ro-bind"}
    trees = {path for path in bound if os.path.isdir(path)}
    assert trees - set(bubblewrap._DATA) == {os.path.realpath(python.stdlib)}
    assert any(path.endswith("libc.so.6") for path in bound)
    hidden = bubblewrap._masks(python)
    inside = python.stdlib / "site-packages"
    assert str(inside) in hidden or not inside.exists()


def environment_package(folder: Path) -> Path:
    """An installed distribution that brings environments."""
    about = folder / "answers-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: answers\nVersion: 1.0\n")
    (about / "RECORD").write_text("answers/__init__.py,,\n")
    (about / "entry_points.txt").write_text("[rlrf.environments]\na-v0 = answers:A\n")
    return folder


@pytest.mark.parametrize("name", ["rlrf", "answers", "on-answers"])
def test_a_package_that_brings_environments_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(environment_package(tmp_path))
    needs = tmp_path / "on_answers-1.0.dist-info"
    needs.mkdir()
    (needs / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: on-answers\nVersion: 1.0\nRequires-Dist: answers\n"
    )
    with pytest.raises(UsageError, match="environments of rlrf and with them their answers"):
        host.distributions([name])
    if name == "rlrf":
        with pytest.raises(UsageError, match="their answers"):
            images._requirement("rlrf==0.1.0")


def test_a_package_of_the_sandboxs_python_that_brings_environments_is_refused(tmp_path):
    python = host.Python(sys.executable)
    environment_package(tmp_path / "site-packages")
    located = host._LOCATE.replace(
        "found = {}", f"places = [{str(tmp_path / 'site-packages')!r}]\nfound = {{}}"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "_LOCATE", located)
        with pytest.raises(UsageError, match="'answers' brings environments"):
            host.located(python, ["answers"])
        with pytest.raises(UsageError, match="'no-such' is not installed for the sandbox's"):
            host.located(python, ["no-such"])
        assert host.located(python, ["no-such"], optional=True) == {}


def test_a_root_filesystem_with_environments_is_refused(tmp_path):
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3").touch()
    (tmp_path / "usr/lib/python3.11/json").mkdir(parents=True)
    (tmp_path / "usr/lib/python3.11/json/__init__.py").touch()
    images.pack_rootfs(io.BytesIO(), tmp_path)
    environment_package(tmp_path / "usr/lib/python3/dist-packages")
    with pytest.raises(UsageError, match="their answers"):
        images.pack_rootfs(io.BytesIO(), tmp_path)


def test_one_package_may_be_given_as_it_is():
    from rlrf_sandboxes.bubblewrap import BubblewrapSandbox

    assert BubblewrapSandbox(packages="numpy")._packages == ("numpy",)
