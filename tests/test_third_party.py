"""Environments of other distributions are found by name, through the door the built-ins use."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import pytest

MODULE = """
import rlrf

class Bell(rlrf.SingleTurnEnv):
    def load_tasks(self, split):
        return [rlrf.Task(split + "-ring", split + ": ring!", hidden="ding")]

    def grade(self, task, completion):
        right = completion == task.hidden
        told = rlrf.Feedback() if right else rlrf.Feedback.of("wrong_answer", "Try again.")
        return rlrf.Outcome(float(right), told)
"""

USE = """
import sys
sys.path.insert(0, sys.argv[1])
import rlrf
assert "bell-v0" in rlrf.registry
assert "bell_env" not in sys.modules
env = rlrf.make("bell-v0")
print(env.grade("train-ring", "ding").reward, env.grade("train-ring", "dong").feedback)
import gymnasium
print(type(gymnasium.make("rlrf/bell-v0").unwrapped).__name__)
import rlrf.testing
rlrf.testing.check_env("bell-v0").raise_if_failed()
"""

LATE = """
import sys
import rlrf
assert "bell-v0" not in rlrf.registry
sys.path.insert(0, sys.argv[1])
print(type(rlrf.make("bell-v0")).__name__)
"""


def run(code, site):
    done = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def site(tmp_path):
    """A folder that holds what an installed distribution leaves there."""
    (tmp_path / "bell_env.py").write_text(MODULE)
    info = tmp_path / "bell_env-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bell-env\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlrf.environments]\nbell-v0 = bell_env:Bell\n")
    return tmp_path


def test_it_is_found_without_being_imported(site):
    assert run(USE, site) == ["1.0 Try again.", "Bell"]


def test_it_is_found_when_it_was_installed_after_the_import(site):
    assert run(LATE, site) == ["Bell"]


@pytest.mark.slow
def test_a_project_that_pip_builds_and_installs(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, the build backend of the project, is not installed")
    project, site = tmp_path / "project", tmp_path / "site"
    (project / "bell_env").mkdir(parents=True)
    (project / "bell_env" / "__init__.py").write_text(MODULE)
    (project / "pyproject.toml").write_text(
        textwrap.dedent("""
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "bell-env"
        version = "1.0"
        [project.entry-points."rlrf.environments"]
        bell-v0 = "bell_env:Bell"
        """)
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    done = subprocess.run([*pip, str(project)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run(USE, site) == ["1.0 Try again.", "Bell"]
