"""What is pinned: everything that `make setup` installs, on every Python that is supported."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements", reason="comes with the extra 'dev'")
from packaging.requirements import Requirement  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402
from packaging.version import Version  # noqa: E402

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
OLD_EXTRAS = ("train", "docker", "data", "dev")


def pins(file: str, python: str) -> dict[str, Version]:
    """The versions that pip may take under ``-c file`` on a Linux of one Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.5"}
    environment |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    found: dict[str, Version] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (exact,) = pin.specifier
            assert exact.operator == "==", line
            if pin.marker is None or pin.marker.evaluate(environment):
                assert pin.name not in found, f"{line}: pinned twice on {python}"
                found[canonicalize_name(pin.name)] = Version(exact.version)
    return found


def wanted(*extras: str) -> list[Requirement]:
    """What the project asks for by itself."""
    options = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in options[extra])]
    return [r for r in map(Requirement, lines) if r.name not in ("rlrf", "torch")]


def test_the_pythons_are_those_of_the_readme():
    assert PYTHONS == ["3.11", "3.12", "3.13"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_locked_on_every_python(python):
    locked = pins("requirements.lock", python)
    extras = [e for e in PROJECT["optional-dependencies"] if e != "all"]
    for requirement in wanted(*extras):
        version = locked[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement}; run make lock"


@pytest.mark.parametrize("file", ["requirements.lock", "requirements.oldest"])
def test_torch_and_what_its_builds_bring_is_left_to_the_machine(file):
    brought = re.compile(r"(?m)^(torch|triton|nvidia-|cuda-)")
    assert not brought.search((ROOT / file).read_text())
    assert brought.search((ROOT / "constraints.txt").read_text())


def test_the_oldest_set_is_the_oldest_that_is_allowed():
    oldest = pins("requirements.oldest", "3.11")
    tools = {r.name for r in wanted("dev")} - {"tensorboard", "wandb", "trackio"}
    for requirement in wanted(*OLD_EXTRAS):
        version = oldest[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement}; run make lock"
        if requirement.name not in tools | RAISED:
            (lowest,) = [s.version for s in requirement.specifier if s.operator == ">="]
            assert version.release[:2] == (*Version(lowest).release, 0)[:2], f"{requirement}"


RAISED = {"rich", "safetensors", "huggingface-hub"}
"""Allowed in older versions than can be had beside the others' oldest."""


def test_what_is_installed_by_make_is_what_is_locked():
    """Only in the environment that `make setup` made; elsewhere a user may have what they like."""
    if Path(sys.prefix) != ROOT / ".venv" or not (ROOT / ".venv" / ".ready").exists():
        pytest.skip("not run in the environment of `make setup`")
    from importlib.metadata import version

    python = ".".join(map(str, sys.version_info[:2]))
    locked = pins("requirements.lock", python)
    for requirement in wanted("train", "docker", "data", "docs", "dev"):
        name = canonicalize_name(requirement.name)
        assert Version(version(name)) == locked[name]
