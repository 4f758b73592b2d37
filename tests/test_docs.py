"""The docs' code runs, their commands exist, their tables come from the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rlrf
from rlrf.testing import check_env

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def example(name: str):
    path = DOCS / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_environment_of_the_tutorial_conforms():
    env = example("my_environment").Backwards()
    check_env(env).raise_if_failed()
    reward, feedback = env.grade("stone", "enoty")
    assert (reward, feedback.kinds) == (0.0, ("wrong_answer",))
    assert "4 of 5" in feedback.text


def test_the_trainer_of_the_tutorial_learns_on_public_names_in_sixty_lines():
    pytest.importorskip("torch")
    from rlrf_trainers.policies.hf import HFPolicy
    from tests.tiny_model import tiny_model, tiny_tokenizer

    source = (DOCS / "examples" / "reinforce.py").read_text()
    assert len(source.splitlines()) <= 60
    assert not re.search(r"(?:import|\.)\s*_[a-z]", source)

    class CountA(rlrf.SingleTurnEnv):
        def load_tasks(self, split):
            return [rlrf.Task(f"{split}-{i}", f"Say {i}.") for i in range(8)]

        def grade(self, task, completion):
            return rlrf.Outcome(completion.count("a") / max(1, len(completion)))

    module = example("reinforce")
    rlrf.trainers.register("reinforce-docs", module.Reinforce)
    trainer = rlrf.make_trainer(
        "reinforce-docs",
        model=HFPolicy(tiny_model(), tiny_tokenizer()),
        env=CountA(),
        config={"max_steps": 12, "learning_rate": 1e-2, "max_completion_length": 6},
    )
    assert isinstance(trainer, rlrf.Trainer)
    history = trainer.train().history
    assert history[-1]["reward"] > history[0]["reward"] + 0.2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page, capsys):
    scope: dict[str, object] = {}
    try:
        for language, code in BLOCK.findall(page.read_text()):
            if language == "python" and "--8<--" not in code:
                exec(compile(code, str(page), "exec"), scope)
    finally:
        import gymnasium

        gymnasium.registry.pop("rlrf/echo-v0", None)


def commands():
    for page in PAGES:
        for language, code in BLOCK.findall(page.read_text()):
            if language == "":
                for line in code.splitlines():
                    if line.startswith("rlrf "):
                        yield pytest.param(line.split("#")[0].split(), id=line[:60])


@pytest.mark.parametrize("words", list(commands()))
def test_shown_commands_and_their_options_exist(words):
    from rlrf.cli import _add_plugin_commands, app

    _add_plugin_commands()
    deep = 3 if words[1] == "model" else 2
    shown = CliRunner().invoke(app, [*words[1:deep], "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.output
    for word in words[deep:]:
        if word.startswith("--"):
            assert word in shown.output


def test_the_tables_of_knobs_hold_every_knob():
    pytest.importorskip("torch")
    sys.path.insert(0, str(DOCS))
    try:
        import hooks
    finally:
        sys.path.remove(str(DOCS))
    from rlrf_trainers.config import SDPOConfig

    page = hooks.on_page_markdown((DOCS / "sdpo.md").read_text())
    for name, field in SDPOConfig.model_fields.items():
        assert f"| `{name}` |" in page
        assert field.description is None or field.description.replace("|", "\\|") in page


def test_every_file_a_page_links_to_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
