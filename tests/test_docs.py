"""The docs' code runs, their commands exist, their tables come from the code."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import gymnasium
import pytest
from typer.testing import CliRunner

import rlrf
from rlrf.testing import check_env

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


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


class CountA(rlrf.SingleTurnEnv):
    success_threshold = 0.15

    def load_tasks(self, split):
        return [rlrf.Task(f"{split}-{i}", f"Say {i}.") for i in range(8)]

    def grade(self, task, completion):
        return rlrf.Outcome(completion.count("a") / max(1, len(completion)))


def public(name, lines):
    """An example, which is short and takes nothing private."""
    source = (DOCS / "examples" / f"{name}.py").read_text()
    assert len(source.splitlines()) <= lines
    assert not re.search(r"(?:import|\.)\s*_[a-z]", source)
    return example(name)


@pytest.mark.parametrize(("name", "lines"), [("reinforce", 40), ("raft", 30)])
def test_an_algorithm_of_the_tutorial_has_everything_else_for_nothing(name, lines, tmp_path):
    pytest.importorskip("torch")
    from tests.tiny_model import save_tiny

    save_tiny(tmp_path / "tiny")
    cls = getattr(public(name, lines), name.capitalize())
    rlrf.trainers.register(f"{name}-docs", cls)
    config = {
        "learning_rate": 1e-2,
        "max_completion_length": 6,
        "prompts_per_step": 8,
        "max_steps": 8,
        "save_steps": 4,
        "eval_steps": 4,
        "load_best_model_at_end": True,
    }

    def made(**more):
        return rlrf.make_trainer(
            f"{name}-docs",
            model=str(tmp_path / "tiny"),
            env=CountA(),
            config=config | more,
            run_dir=tmp_path / "run",
        )

    trainer = made()
    result = trainer.train()
    first, *_, last = (m["eval/reward"] for m in result.history if "eval/reward" in m)
    assert last > first + 0.1
    assert (result.model_dir / "model.safetensors").is_file()
    assert trainer.source.version == 8
    resumed = rlrf.make_trainer(
        f"{name}-docs",
        model=str(tmp_path / "tiny"),
        env=CountA(),
        config=config | {"max_steps": 10},
        run_dir=tmp_path / "run",
        resume=True,
    )
    assert [m["step"] for m in resumed.train().history] == [*range(11)]


def test_the_loop_of_the_tutorial_learns_on_public_names_in_sixty_lines():
    pytest.importorskip("torch")
    from rlrf_trainers.engines.hf import HFPolicy
    from tests.tiny_model import tiny_model, tiny_tokenizer

    assert len((DOCS / "examples" / "my_environment.py").read_text().splitlines()) <= 40
    module = public("own_loop", 60)
    rlrf.trainers.register("own-loop-docs", module.OwnLoop)
    trainer = rlrf.make_trainer(
        "own-loop-docs",
        model=HFPolicy(tiny_model(), tiny_tokenizer()),
        env=CountA(),
        config={"max_steps": 12, "learning_rate": 1e-2, "max_completion_length": 6},
    )
    assert isinstance(trainer, rlrf.Trainer)
    history = trainer.train().history
    assert history[-1]["reward"] > history[0]["reward"] + 0.2


def blocks(page):
    """(language, code, whether it stands right behind the block before) of every block."""
    text, end = page.read_text(), 0
    for found in BLOCK.finditer(text):
        yield found[1], found[2], not text[end : found.start()].strip()
        end = found.end()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run_and_print_what_the_page_shows(page, capsys):
    scope: dict[str, object] = {"__name__": __name__}  # dataclasses look for it
    before = set(gymnasium.registry)
    printed = ""
    try:
        for language, code, adjoins in blocks(page):
            if language == "python":
                if re.search("rlrf_trainers|examples/|reinforce|raft|own_loop", code):
                    pytest.importorskip("torch")
                code = SNIPPET.sub(lambda m: (DOCS / "examples" / m[1]).read_text(), code)
                capsys.readouterr()
                exec(compile(code, str(page), "exec"), scope)
                printed = capsys.readouterr().out
            elif language == "text" and adjoins:
                assert plain(printed) == plain(code)
    finally:
        for name in set(gymnasium.registry) - before:
            del gymnasium.registry[name]


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


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
    deep = 3 if words[1] in ("model", "sandbox") else 2
    shown = CliRunner().invoke(app, [*words[1:deep], "--help"], env={"COLUMNS": "300"})
    if isinstance(shown.exception, rlrf.MissingDependencyError):
        pytest.skip(str(shown.exception))
    assert shown.exit_code == 0, shown.output
    for word in words[deep:]:
        if word.startswith("--"):
            assert word in shown.output


def test_commands_named_in_the_code_exist():
    """Errors and warnings tell people what to run."""
    from rlrf.cli import _add_plugin_commands, app

    _add_plugin_commands()
    wings = (ROOT / w for w in ("rlrf", "trainers", "environments", "sandboxes"))
    named = {
        tuple(found.split())
        for wing in wings
        for path in wing.rglob("*.py")
        for found in re.findall(r"`rlrf ([a-z-]+(?: [a-z]+)?)", path.read_text())
    }
    assert ("model", "fetch") in named
    for words in named:
        deep = 2 if words[0] in ("model", "sandbox") else 1
        shown = CliRunner().invoke(app, [*words[:deep], "--help"])
        missing = isinstance(shown.exception, rlrf.MissingDependencyError)
        assert missing or shown.exit_code == 0, f"`rlrf {' '.join(words)}`: {shown.output}"


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("hooks")


def test_the_table_of_class_attributes_holds_those_of_env_and_their_defaults():
    page = (DOCS / "environments.md").read_text()
    table = page.partition("## What a class may set")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    shown = {
        name: default
        for names, defaults in rows
        for name, default in zip(
            re.findall("`(.+?)`", names), re.findall("`(.+?)`", defaults), strict=True
        )
    }
    own = {
        name: repr(value).replace("'", '"')
        for name, value in vars(rlrf.Env).items()
        if not name.startswith("_") and not callable(value)
    }
    assert shown == own


def test_the_tables_of_knobs_hold_every_knob(hooks):
    pytest.importorskip("torch")
    from rlrf_trainers.config import GRPOConfig, SDPOConfig

    pages = "".join(
        hooks.on_page_markdown((DOCS / name).read_text()) for name in ("sdpo.md", "grpo.md")
    )
    for name, field in {**SDPOConfig.model_fields, **GRPOConfig.model_fields}.items():
        (row,) = (line for line in pages.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{field.default!r}`" in row
        assert (field.description or "").replace("|", "\\|") in row
        assert re.search(r"\[(P|C|TRL|own)\]|OPSD|SRPO|RLCSD|torch", row), f"{name} has no source"
        for value in hooks.literals(field.annotation):
            assert f"`{value}`" in row


def test_the_table_of_checks_holds_what_the_suite_runs(hooks):
    page = hooks.on_page_markdown((DOCS / "conformance.md").read_text())
    report = check_env("format-rules-v0", tasks=1)
    assert report.results
    for result in report.results:
        assert re.search(rf"^\| `{re.escape(result.id)}` \| .{{10,}} \|$", page, re.MULTILINE)


def test_sphinx_roles_of_docstrings_do_not_reach_the_reader(hooks):
    html = "<p>See :class:<code>Feedback</code>, :func:<code>x</code>: a <code>:class:</code>.</p>"
    assert hooks.on_page_content(html) == (
        "<p>See <code>Feedback</code>, <code>x</code>: a <code>:class:</code>.</p>"
    )


def test_the_table_of_metrics_holds_what_the_trainers_record(tmp_path):
    pytest.importorskip("torch")
    from rlrf_trainers.engines.hf import HFPolicy
    from tests.tiny_model import tiny_model, tiny_tokenizer

    class Half(rlrf.SingleTurnEnv):
        def load_tasks(self, split):
            return [rlrf.Task(f"{split}-{i}", f"Say {i}.") for i in range(4)]

        def grade(self, task, completion):
            told = rlrf.Feedback.of("wrong_answer", "Say a digit.")
            return rlrf.Outcome(float(len(completion) % 2), told, {"length": len(completion)})

    documented = set(re.findall(r"`([\w/]+)`", table_column(DOCS / "report.md")))
    recorded = set()
    for name, knobs in (("sdpo", {}), ("grpo", {"beta": 0.1})):
        trainer = rlrf.make_trainer(
            name,
            model=HFPolicy(tiny_model(), tiny_tokenizer()),
            env=Half(),
            config={"max_steps": 2, "max_completion_length": 6, "save_steps": 1, **knobs},
            run_dir=tmp_path / name,
        )
        for line in trainer.train().history:
            recorded |= set(line) - {"step"}
        files = {p.name for p in (tmp_path / name).iterdir()}
        assert files <= set(re.findall(r"`([\w.]+)/?`", (DOCS / "report.md").read_text()))
    assert {"env/NAME" if k.startswith("env/") else k for k in recorded} == documented


def table_column(page) -> str:
    """The first cells of the rows below the heading ``Metrics``."""
    _, _, text = page.read_text().partition("## Metrics")
    return "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))


def test_every_file_a_page_links_to_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
