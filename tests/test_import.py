"""``import rlrf`` is light: nothing heavy, no wing, and few modules beyond what it is built on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch", "transformers", "tokenizers", "docker", "peft", "accelerate", "datasets", "ray",
    "vllm", "typer", "rich", "httpx", "jinja2", "pandas", "scipy", "matplotlib",
}  # fmt: skip
WINGS = {"rlrf_environments", "rlrf_sandboxes", "rlrf_trainers"}

CODE = """
import json, sys
import gymnasium, pydantic
import gymnasium.vector
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded_by(statement):
    code = CODE.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_rlrf_loads_nothing_heavy_and_no_wing():
    modules = loaded_by("import rlrf")
    roots = {m.partition(".")[0] for m in modules}
    assert "rlrf" in roots
    assert not roots & (HEAVY | WINGS)
    assert len(modules) < 120, modules


@pytest.mark.parametrize("statement", ["import rlrf.testing", "import rlrf; list(rlrf.registry)"])
def test_neither_do_its_tools(statement):
    roots = {m.partition(".")[0] for m in loaded_by(statement)}
    assert not roots & (WINGS | {"torch", "transformers", "docker"})


def test_only_the_environment_that_is_made_is_imported():
    modules = loaded_by("import rlrf; rlrf.make('format-rules-v0')")
    assert "rlrf_environments.format_rules" in modules
    assert not {m.partition(".")[0] for m in modules} & {"torch", "transformers", "rlrf_trainers"}
    assert "rlrf_environments.code.basics" not in modules


def test_every_public_name_exists_and_is_documented():
    import rlrf

    assert sorted(rlrf.__all__) == list(dict.fromkeys(sorted(rlrf.__all__)))
    for name in rlrf.__all__:
        value = getattr(rlrf, name)
        if callable(value):
            assert value.__doc__, name
