from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

import rlrf
from rlrf import Feedback, InfraError, Outcome, ScriptedPolicy, Segment, SingleTurnEnv, Task, cli
from rlrf.console import RolloutProgress, TrainProgress
from rlrf.notices import notice
from rlrf.runs import Run
from rlrf.testing import CheckReport, CheckResult
from rlrf.trainer import TrainResult


class Cities(SingleTurnEnv):
    """Name the capital.

    Args:
        accent: which accent to ask in.
    """

    def __init__(self, *, accent: str = "none", broken: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accent, self.broken = accent, broken

    def load_tasks(self, split: str) -> list[Task]:
        if self.accent == "empty":
            return []
        names = {"France": "Paris", "Peru": "Lima", "Japan": "Tokyo"}
        return [
            Task(f"{split}-{k}", f"Capital of {k}? [plain]", hidden=v) for k, v in names.items()
        ]

    def grade(self, task: Task, completion: str) -> Outcome:
        if self.broken:
            raise InfraError("no sandbox", kind="sandbox_died", retryable=False)
        if completion == task.hidden:
            return Outcome(1.0)
        return Outcome(
            0.0,
            Feedback(
                [
                    Segment("wrong_answer", "That is no capital."),
                    Segment("reference", f"It is {task.hidden}.", reveals="reference"),
                ]
            ),
        )


class OnlyTrain(Cities):
    """Has no held-out split."""

    splits = ("train",)


class NothingHeldOut(Cities):
    """Own data: its split "eval" is empty."""

    def load_tasks(self, split: str) -> list[Task]:
        return [] if split == "eval" else super().load_tasks(split)


class FakeConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    max_steps: int = Field(3, ge=1)
    learning_rate: float = Field(0.1, gt=0)
    fail: str = ""


class Odd(Exception):
    """Of another library: not even its text can be had."""

    def __str__(self) -> str:
        raise ValueError


class FakeTrainer:
    """Learns nothing, but leaves a run."""

    config_class = FakeConfig
    made: list[FakeTrainer] = []

    def __init__(
        self,
        model: Any,
        env: rlrf.Env,
        config: FakeConfig,
        *,
        run_dir: Path,
        eval_env: rlrf.Env | None = None,
        on_step: Callable[[dict[str, float]], None],
    ) -> None:
        self.model, self.env, self.config, self.eval_env = model, env, config, eval_env
        self.on_step = on_step
        self.run = Run.create(run_dir, config=config.model_dump(), env=env)
        FakeTrainer.made.append(self)

    def train(self) -> TrainResult:
        history: list[dict[str, float]] = []
        for step in range(self.config.max_steps + 1):
            if step == 2 and self.config.fail == "interrupt":
                raise KeyboardInterrupt
            if step == 2 and self.config.fail == "odd":
                raise Odd
            if step == 2 and self.config.fail == "infra":
                raise InfraError("the sampler died")
            line = {"step": float(step), "reward": step / 10, "loss": 1 / (step + 1)}
            if step in (0, self.config.max_steps):
                line["eval/pass_rate"] = step / 10
            self.run.log(step, line)
            self.on_step(line)
            history.append(line)
        if self.config.fail != "quiet":
            self.run.finish("done")
        return TrainResult(history, self.run.path, self.run.path / "model")


class LooseTrainer:
    """Has no config_class: takes what it is given."""

    def __init__(self, model: Any, env: Any, config: Any, **kwargs: Any) -> None:
        self.config = config

    def train(self) -> TrainResult:
        return TrainResult([{"loss": float(self.config["anything"])}])


class PlainTrainer:
    """Knows nothing of runs."""

    def __init__(self, model: Any, env: Any, config: Any) -> None:
        self.how = config.get("how")

    def train(self) -> Any:
        lines: list[Any] = [{"step": i, "reward": i / 4, "note": "x"} for i in range(3)]
        if self.how == "fails":
            raise ValueError("no")
        return {"nothing": None, "odd": TrainResult([3])}.get(self.how, TrainResult(lines))  # type: ignore[list-item]  # wrong on purpose


class ListeningTrainer(PlainTrainer):
    """Tells its steps."""

    def __init__(self, model: Any, env: Any, config: Any, *, on_step: Any) -> None:
        super().__init__(model, env, config)
        self.on_step = on_step

    def train(self) -> Any:
        result = super().train()
        for line in result.history:
            self.on_step(line)
        return result


class OddTrainer:
    """Takes something else."""

    def __init__(self, policy: Any) -> None:
        pass


def scripted(answer: str = "Paris", *, model: str | None = None) -> ScriptedPolicy:
    """Says one thing."""
    return ScriptedPolicy(lambda messages: answer)


def needs_model(model: str) -> ScriptedPolicy:
    """Needs a model."""
    return ScriptedPolicy(lambda messages: model)


def slow_path() -> ScriptedPolicy:
    """Says that it is slow, at every reply."""

    def reply(messages: Any) -> str:
        notice("cli/slow", "the replies are slow, because they are old; send them by air")
        return "Paris"

    return ScriptedPolicy(reply)


rlrf.register("cli-cities-v0", Cities)
rlrf.register("cli-onlytrain-v0", OnlyTrain)
rlrf.register("cli-nothing-held-out-v0", NothingHeldOut)
rlrf.policies.register("cli-scripted", scripted)
rlrf.policies.register("cli-needs-model", needs_model)
rlrf.policies.register("cli-slow", slow_path)
rlrf.trainers.register("cli-fake", FakeTrainer)
rlrf.trainers.register("cli-loose", LooseTrainer)
rlrf.trainers.register("cli-plain", PlainTrainer)
rlrf.trainers.register("cli-listening", ListeningTrainer)
rlrf.trainers.register("cli-odd", OddTrainer)

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rlrf_cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Invoke]:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("RLRF_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    before = list(cli.app.registered_commands)
    FakeTrainer.made.clear()

    def invoke(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlrf", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return exit.value.code, captured.out, captured.err

    yield invoke
    cli.app.registered_commands[:] = before


EVAL = ("eval", "--env", "cli-cities-v0", "--policy", "cli-scripted")
TRAIN = ("train", "--trainer", "cli-fake", "--model", "m", "--env", "cli-cities-v0")


# --- the outside --------------------------------------------------------------------------


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['rlrf', '--help']\n"
        "from rlrf.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'docker', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("list", "info", "eval", "probe", "train", "report", "view", "check"):
        assert command in done.stdout


def test_version(rlrf_cli: Invoke) -> None:
    assert rlrf_cli("--version") == (0, f"rlrf {rlrf.__version__}\n", "")


@pytest.mark.parametrize("arguments", [("nonsense",), ("eval",), ("list", "--what"), ()])
def test_wrong_usage_exits_with_2(rlrf_cli: Invoke, arguments: tuple[str, ...]) -> None:
    assert rlrf_cli(*arguments)[0] == 2


def test_debug_shows_the_traceback(rlrf_cli: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = rlrf_cli("info", "cli-citys-v0")
    assert code == 2
    assert error.count("\n") == 1
    assert "Traceback" not in error
    monkeypatch.setenv("RLRF_DEBUG", "1")
    assert "Traceback" in rlrf_cli("info", "cli-citys-v0")[2]


# --- list, info ---------------------------------------------------------------------------


def test_list_names_everything_with_its_first_line(rlrf_cli: Invoke) -> None:
    code, out, _ = rlrf_cli("list")
    assert code == 0
    for name, doc in (
        ("cli-cities-v0", "Name the capital."),
        ("cli-fake", "Learns nothing, but leaves a run."),
        ("cli-scripted", "Says one thing."),
    ):
        assert any(name in line and doc in line for line in out.splitlines())


def test_list_reads_documentation_without_importing(
    rlrf_cli: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "clidocs"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "sub" / "thing.py").write_text(
        '"""The module."""\nimport os\nimport vllm.extra\n\n'
        'class Thing:\n    """The thing.\n\n    More."""\n'
    )
    (package / "sub" / "__init__.py").write_text(
        '"""The sub package."""\nfrom torch import nn as Renamed\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, target in (
        ("cli-thing", "clidocs.sub.thing:Thing"),
        ("cli-module", "clidocs.sub:Renamed"),
        ("cli-absent", "clidocs_absent.x:Y"),
        ("cli-top", "json:loads"),
    ):
        monkeypatch.setitem(rlrf.policies._added, name, target)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, find=importlib.util.find_spec: None if name == "vllm" else find(name),
    )
    out = rlrf_cli("list")[1]
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "The thing." in rows["cli-thing"]
    assert "needs: pip install 'rlrf[vllm]'" in rows["cli-thing"]
    assert "The sub package." in rows["cli-module"]
    assert "(not importable: there is no module 'clidocs_absent.x')" in rows["cli-absent"]
    assert "Deserialize" in rows["cli-top"]
    assert "clidocs" not in sys.modules


def test_info_shows_options_splits_a_task_and_every_level(rlrf_cli: Invoke) -> None:
    code, out, _ = rlrf_cli("info", "cli-cities-v0")
    assert code == 0
    assert "Name the capital." in out
    assert any(line.split()[:2] == ["accent", "'none'"] for line in out.splitlines())
    assert any(line.split()[:1] == ["max_feedback_tokens"] for line in out.splitlines())
    assert "train 3 tasks, eval 3 tasks" in out
    assert "Capital of France? [plain]" in out  # brackets are no markup
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "(nothing)" in rows["none"]
    assert "That is no capital." in rows["explained"]
    assert "Paris" not in rows["expected"]
    assert "Paris" in out.split("reference ", 1)[1]


def test_info_takes_options_and_a_split(rlrf_cli: Invoke) -> None:
    out = rlrf_cli("info", "cli-cities-v0", "--split", "eval", "-o", "accent=x")[1]
    assert "eval-France" in out


def test_info_of_an_environment_without_held_out_tasks(rlrf_cli: Invoke) -> None:
    code, out, error = rlrf_cli("info", "cli-nothing-held-out-v0")
    assert (code, error) == (0, "")
    assert "eval 0 tasks" in out
    assert "Example task" in out


def test_info_survives_a_grader_that_cannot_run_here(rlrf_cli: Invoke) -> None:
    code, out, _ = rlrf_cli("info", "cli-cities-v0", "--option", "broken=true")
    assert code == 0
    assert "could not be graded here: no sandbox" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("info", "cli-citys-v0"), "unknown environment 'cli-citys-v0'. Did you mean 'cli-cities"),
        (
            ("info", "cli-cities-v0", "-o", "acent=x"),
            "has no option 'acent'; did you mean 'accent'",
        ),
        (("info", "cli-cities-v0", "-o", "accent"), "'accent' is no assignment"),
        (("info", "cli-cities-v0", "--split", "dev"), "unknown split 'dev'"),
        (("info", "cli-cities-v0", "-o", "accent=empty"), "has no task in split 'train'"),
        (("eval", "--env", "cli-cities-v0", "--policy", "cli-scriptd"), "unknown policy"),
        (
            (*EVAL, "--feedback", "loud"),
            "unknown feedback level 'loud'",
        ),
        (
            (*EVAL, "--limit", "0"),
            "limit is 0",
        ),
        (
            (*EVAL, "--max-tokens", "0"),
            "--max-tokens is 0",
        ),
        (("eval", "--policy", "cli-scripted"), "no environment is given: rlrf eval ENV"),
        ((*EVAL, "cli-citys-v0"), "two environments are given, 'cli-citys-v0' and --env"),
        (("eval", "cli-cities-v0", "--policy", "scripted:"), "scripted:module:function"),
        (("eval", "cli-cities-v0", "--policy", "scripted:no_such:say"), "cannot be imported"),
        (("eval", "cli-cities-v0", "--policy", "scripted:json:decoder"), "is <module"),
        (
            ("eval", "cli-cities-v0", "--policy", "scripted:os:getpid", "--model", "m"),
            "its options are max_batch_size",
        ),
        (("eval", "--env", "cli-cities-v0", "--policy", "cli-needs-model"), "give --model"),
        (
            (
                "eval",
                "--env",
                "cli-cities-v0",
                "--policy",
                "cli-scripted",
                "--policy-option",
                "b=1",
            ),
            "its options are answer, model",
        ),
        (
            (*EVAL, "--out", "no/x.json"),
            "there is no folder 'no'",
        ),
        (("report", "absent"), "there is nothing at 'absent'"),
        (("train", "absent.toml"), "cannot read the configuration 'absent.toml'"),
        (("train", "--env", "cli-cities-v0"), "model is missing"),
        ((*TRAIN, "--trainer", "sdpoo"), "unknown trainer 'sdpoo'. Did you mean 'sdpo'"),
        ((*TRAIN, "--set", "trainer.learning_rat=1"), "did you mean 'learning_rate'?"),
        ((*TRAIN, "--set", "learning_rate=1"), "did you mean 'trainer.learning_rate'?"),
        ((*TRAIN, "--set", "trainer.feedback_kinds=[]"), "it is a key of the trainer 'sdpo'"),
        (
            (*TRAIN, "--trainer", "sdpo", "--set", 'trainer.feedback_kinds=["wrong-answer"]'),
            "did you mean 'wrong_answer'?",
        ),
        ((*EVAL, "--feedback", "explain"), "did you mean 'explained'?"),
        ((*TRAIN, "--set", "trainer.max_steps=0"), "trainer.max_steps is 0; it must be greater"),
        ((*TRAIN, "--set", "env.acent=1"), "has no option 'acent'"),
        ((*TRAIN, "--set", "env.accent=empty"), "has no task"),
        ((*TRAIN, "--env", "cli-citys-v0"), "unknown environment"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    rlrf_cli: Invoke, arguments: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    code, _, error = rlrf_cli(*arguments)
    assert code == 2
    assert expected in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("status.json"))


def test_a_missing_extra_says_what_to_install(
    rlrf_cli: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cliheavy.py").write_text("import vllm\nclass P: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(rlrf.policies._added, "cli-heavy", "cliheavy:P")
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, error = rlrf_cli("eval", "--env", "cli-cities-v0", "--policy", "cli-heavy")
    assert code == 2
    assert "pip install 'rlrf[vllm]'" in error
    assert rlrf_cli("list")[0] == 0


# --- plug-in commands ---------------------------------------------------------------------


def _plug_in(monkeypatch: pytest.MonkeyPatch, name: str, target: str) -> None:
    monkeypatch.setitem(cli.commands._added, name, target)


def test_plug_in_commands_get_their_arguments_and_are_loaded_late(
    rlrf_cli: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cliplug.py").write_text(
        '"""Tools of the plug-in."""\n'
        "import typer\nimport rlrf\n\napp = typer.Typer()\n\n"
        "@app.command()\ndef fetch(name: str, size: int = 1):\n"
        '    """Fetch a thing."""\n'
        "    if name == 'bad':\n        raise rlrf.UsageError('no such thing')\n"
        "    print(f'fetched {name} {size}')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    _plug_in(monkeypatch, "cliplug", "cliplug:app")
    code, out, _ = rlrf_cli("--help")
    assert code == 0
    assert "Tools of the plug-in." in out
    assert "cliplug" not in sys.modules
    assert rlrf_cli("cliplug", "fetch", "x", "--size", "3") == (0, "fetched x 3\n", "")
    code, out, _ = rlrf_cli("cliplug", "fetch", "--help")
    assert code == 0
    assert "Fetch a thing." in out
    assert rlrf_cli("cliplug", "fetch", "bad") == (2, "", "error: no such thing\n")
    assert rlrf_cli("cliplug", "fetch")[0] == 2


@pytest.mark.slow
def test_a_plug_in_that_cannot_be_imported_breaks_only_itself(
    rlrf_cli: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "clibroken.py").write_text("import vllm\napp = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "vllm", None)
    _plug_in(monkeypatch, "clibroken", "clibroken:app")
    assert rlrf_cli("list")[0] == 0
    code, _, error = rlrf_cli("clibroken", "x")
    assert code == 2
    assert "pip install 'rlrf[vllm]'" in error
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    code, _, error = rlrf_cli("clibroken")
    assert code == 2
    assert "is a typer.Typer" in error


def test_commands_of_the_distribution_are_entry_points() -> None:
    assert {p.name for p in metadata.entry_points(group="rlrf.commands")} <= set(cli.commands)


# --- eval ---------------------------------------------------------------------------------


def test_eval_prints_and_writes_the_report(rlrf_cli: Invoke, tmp_path: Path) -> None:
    code, out, error = rlrf_cli(
        *(*EVAL, "--samples", "2"),
        *("--policy-option", "answer=Lima", "--limit", "2", "--out", "r.json", "--seed", "3"),
    )
    assert code == 0
    assert "pass rate" in out
    assert "50.0%" in out
    assert "pass@2" in out
    assert "wrong_answer 2" in out
    assert "4/4 rollouts" in error  # progress does not mix with the results
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["pass_rate"] == 0.5
    assert data["split"] == "eval"  # the held-out split, unless told otherwise
    assert data["env"] == "cli-cities-v0"
    assert data["seed"] == 3
    assert [r["task_id"] for r in data["rollouts"]] == ["eval-France"] * 2 + ["eval-Peru"] * 2


def test_eval_plays_a_script_of_the_current_folder(
    rlrf_cli: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "a_script_here.py").write_text("async def say(messages):\n    return 'Lima'\n")
    asked = ("eval", "cli-cities-v0", "--policy", "scripted:a_script_here:say", "--limit", "2")
    assert rlrf_cli(*asked)[0] == 0
    (written,) = (tmp_path / "runs" / "eval").glob("*.json")
    assert written.name == "cli-cities-v0-scripted-a_script_here-say.json"
    data = json.loads(written.read_text())
    assert (data["policy"], data["pass_rate"], data["mean_length"]) == (asked[3], 0.5, None)


def test_eval_tells_of_a_slow_path_once_and_in_its_report(rlrf_cli: Invoke, tmp_path: Path) -> None:
    asked = ("eval", "--env", "cli-cities-v0", "--policy", "cli-slow", "--limit", "2")
    _, _, error = rlrf_cli(*asked, "--out", "r.json")
    assert error.count("warning: the replies are slow, because they are old") == 1
    (told,) = json.loads((tmp_path / "r.json").read_text())["warnings"]
    assert told.startswith("the replies are slow")
    rlrf_cli(*asked, "--out", "again.json")
    assert json.loads((tmp_path / "again.json").read_text())["warnings"] == [told]
    assert rlrf_cli(*EVAL, "--out", "fast.json")[0] in (0, 1)
    assert json.loads((tmp_path / "fast.json").read_text())["warnings"] == []


def test_eval_takes_the_split_feedback_and_model(rlrf_cli: Invoke, tmp_path: Path) -> None:
    code, _, _ = rlrf_cli(
        *("eval", "--env", "cli-cities-v0", "--policy", "cli-needs-model", "--model", "Tokyo"),
        *("--split", "train", "--feedback", "none", "--out", "r.json"),
    )
    assert code == 0
    data = json.loads((tmp_path / "r.json").read_text())
    assert (data["split"], data["feedback"], data["model"]) == ("train", "none", "Tokyo")
    assert data["feedback_kinds"] == {}
    assert data["pass_rate"] == pytest.approx(1 / 3)


def test_eval_of_an_environment_without_held_out_tasks(rlrf_cli: Invoke) -> None:
    assert rlrf_cli("eval", "--env", "cli-onlytrain-v0", "--policy", "cli-scripted")[0] == 0


def test_eval_that_scores_nothing_fails(rlrf_cli: Invoke) -> None:
    code, out, error = rlrf_cli(
        "eval", "--env", "cli-cities-v0", "--policy", "cli-scripted", "-o", "broken=true"
    )
    assert code == 1
    assert "no rollout could be scored" in error
    assert "3 (left out of every number): sandbox_died 3" in out


# --- train --------------------------------------------------------------------------------


def test_train_runs_and_leaves_a_run_a_config_and_a_report(
    rlrf_cli: Invoke, tmp_path: Path
) -> None:
    code, out, error = rlrf_cli(
        *TRAIN, "--run-dir", "runs/a", "--set", "trainer.learning_rate=1e-4"
    )
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "run directory: runs/a"
    assert lines[1].startswith("step 0/3  reward 0.000  eval 0.0%")
    assert lines[4].startswith("step 3/3  reward 0.300  eval 30.0%  loss 0.25")
    assert "report: runs/a/report.html" in out
    assert "held-out pass rate: 0.0% before, 30.0% after" in out
    assert "model: runs/a/model" in out
    run = Run.open(tmp_path / "runs" / "a")
    assert run.status == "done"
    assert len(run.metrics) == 4
    assert (run.path / "report.html").is_file()
    (trainer,) = FakeTrainer.made
    assert trainer.model == "m"
    assert trainer.config.learning_rate == 1e-4
    assert trainer.eval_env is not None
    assert (trainer.env.split, trainer.eval_env.split) == ("train", "eval")


@pytest.mark.parametrize("name", ["cli-plain", "cli-listening"])
def test_a_trainer_that_knows_of_no_run_gets_one(
    rlrf_cli: Invoke, name: str, tmp_path: Path
) -> None:
    command = (
        "train",
        "--model",
        "m",
        "--env",
        "cli-cities-v0",
        "--trainer",
        name,
        "--run-dir",
        "a",
    )
    code, _, error = rlrf_cli(*command)
    assert code == 0, error
    run = Run.open(tmp_path / "a")
    assert run.status == "done"
    assert [(m["step"], m["reward"]) for m in run.metrics] == [(0, 0), (1, 0.25), (2, 0.5)]
    assert (run.path / "report.html").is_file()
    assert (run.path / "config.toml").is_file()
    assert run.config["trainer"]["name"] == name
    code, _, error = rlrf_cli(*command)
    assert (code, "already holds a run" in error) == (2, True)
    assert rlrf_cli(*command, "--overwrite", "--no-report")[0] == 0
    assert len(Run.open(tmp_path / "a").metrics) == 3


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("cli-odd", [], "trainer 'cli-odd' cannot be built: too many positional"),
        ("cli-plain", ["--set", "trainer.how=nothing"], "returned None; it must return rlrf.Train"),
        ("cli-plain", ["--set", "trainer.how=odd"], "whose line 0 is 3; each must be a mapping"),
        ("cli-plain", ["--set", "trainer.how=fails"], "ValueError"),
    ],
)
def test_a_wrong_trainer_is_one_line(
    rlrf_cli: Invoke, name: str, more: list[str], told: str
) -> None:
    command = (
        "train",
        "--model",
        "m",
        "--env",
        "cli-cities-v0",
        "--trainer",
        name,
        "--run-dir",
        "a",
    )
    code, _, error = rlrf_cli(*command, *more)
    assert code in (1, 2)
    (line, *_) = error.splitlines()
    assert told in line


def test_a_run_can_be_repeated_from_its_own_config(rlrf_cli: Invoke) -> None:
    rlrf_cli(*TRAIN, "--run-dir", "a", "--set", "trainer.max_steps=1", "--set", "env.accent=é")
    code, _, _ = rlrf_cli("train", "a/config.toml", "--run-dir", "b", "--no-report")
    assert code == 0
    first, second = FakeTrainer.made
    assert first.config == second.config
    assert isinstance(second.env, Cities)
    assert second.env.accent == "é"
    assert not Path("b/report.html").exists()
    assert Path("a/report.html").exists()


def test_a_run_directory_is_only_overwritten_when_asked(rlrf_cli: Invoke) -> None:
    assert rlrf_cli(*TRAIN, "--run-dir", "a")[0] == 0
    code, _, error = rlrf_cli(*TRAIN, "--run-dir", "a")
    assert code == 2
    assert "already holds a run" in error
    for option in ("--resume a", "--overwrite", "--run-dir"):
        assert option in error
    assert len(FakeTrainer.made) == 1
    assert rlrf_cli(*TRAIN, "--run-dir", "a", "--overwrite", "--set", "trainer.max_steps=1")[0] == 0
    assert len(Run.open("a").metrics) == 2


def test_the_default_run_directory_tells_what_ran(rlrf_cli: Invoke) -> None:
    out = rlrf_cli(*TRAIN, "--no-report")[1]
    assert out.startswith("run directory: runs/cli-cities-v0-cli-fake-2")


def test_an_environment_without_held_out_tasks_trains(rlrf_cli: Invoke) -> None:
    assert rlrf_cli(*TRAIN, "--env", "cli-onlytrain-v0", "--run-dir", "a")[0] == 0
    assert FakeTrainer.made[0].eval_env is None


def test_own_data_without_held_out_tasks_leaves_no_folder(rlrf_cli: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.tiny_model import save_tiny

    save_tiny(tmp_path / "tiny")
    given = ("train", "--env", "cli-nothing-held-out-v0", "--model", "tiny", "--run-dir", "a")
    for _ in range(2):  # the second is not refused for what the first left
        code, _, error = rlrf_cli(*given)
        assert code == 2
        assert "has no task in split 'eval'" in error
        assert "eval_env.split" in error
        assert [line.startswith("error: ") for line in error.splitlines()][-1:] == [True]
        assert not (tmp_path / "a").exists()
    sets = {"max_steps": 1, "prompts_per_step": 1, "num_generations": 2, "probe_tasks": 0}
    sets |= {"max_completion_length": 2, "eval_tasks": 1}
    code, _, error = rlrf_cli(
        *(*given, "--set", "eval_env.split=train", "--no-report"),
        *(f"--set=trainer.{k}={v}" for k, v in sets.items()),
    )
    assert code == 0, error


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("eval_env.id=5", "eval_env.id is 5; it must be a string"),
        ("eval_env=5", "eval_env is 5; it must be a table"),
        ("eval_env.split=dev", "unknown split 'dev'"),
    ],
)
def test_a_wrong_held_out_environment(rlrf_cli: Invoke, assignment: str, expected: str) -> None:
    code, _, error = rlrf_cli(*TRAIN, "--run-dir", "a", "--set", assignment)
    assert code == 2
    assert expected in error
    assert not Path("a").exists()


def test_the_held_out_environment_can_be_another(rlrf_cli: Invoke) -> None:
    code, _, _ = rlrf_cli(
        *(*TRAIN, "--run-dir", "a", "--set", "eval_env.id=cli-onlytrain-v0"),
        *("--set", "eval_env.split=train"),
    )
    assert code == 0
    assert isinstance(FakeTrainer.made[0].eval_env, OnlyTrain)


def test_ctrl_c_marks_the_run_interrupted(rlrf_cli: Invoke) -> None:
    code, out, error = rlrf_cli(*TRAIN, "--run-dir", "a", "--set", "trainer.fail=interrupt")
    assert code == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert (Run.open("a").status, Run.open("a").info["message"]) == ("interrupted",) * 2
    assert "report: a/report.html" in out


def test_an_error_without_a_text_is_told_like_any_other(rlrf_cli: Invoke) -> None:
    code, _, error = rlrf_cli(*TRAIN, "--run-dir", "a", "--set", "trainer.fail=odd")
    told = "Odd: (its text cannot be had: __str__ raised ValueError)"
    assert code == 1
    assert error.splitlines()[-2:] == [f"error: {told}", "(RLRF_DEBUG=1 shows where)"]
    run = Run.open("a")
    assert (run.status, run.info["message"]) == ("failed", told)


def test_a_run_that_fails_says_so_and_exits_with_1(rlrf_cli: Invoke) -> None:
    code, _, error = rlrf_cli(*TRAIN, "--run-dir", "a", "--set", "trainer.fail=infra")
    assert (code, error) == (1, "error: the sampler died\n")
    run = Run.open("a")
    assert (run.status, run.info["message"]) == ("failed", "InfraError: the sampler died")


def test_a_trainer_that_does_not_close_its_run_has_it_closed(rlrf_cli: Invoke) -> None:
    assert rlrf_cli(*TRAIN, "--run-dir", "a", "--set", "trainer.fail=quiet")[0] == 0
    assert Run.open("a").status == "done"


def test_a_trainer_without_config_class_gets_the_table(rlrf_cli: Invoke) -> None:
    arguments = (*TRAIN, "--trainer", "cli-loose", "--run-dir", "a")
    assert rlrf_cli(*arguments, "--set", "trainer.anything=3")[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX does")
def test_a_real_interrupt_ends_a_real_process_with_130(tmp_path: Path) -> None:
    script = tmp_path / "go.py"
    script.write_text(
        "import sys, threading\n"
        "import tests.test_cli as t\n"
        "from rlrf import cli\n"
        "def train(self):\n"
        "    self.on_step({'step': 0})\n"
        "    sys.stdout.flush()\n"
        "    threading.Event().wait(60)\n"
        "t.FakeTrainer.train = train\n"
        f"sys.argv = ['rlrf', *{TRAIN!r}, '--run-dir', 'a']\n"
        "cli.main()\n"
    )
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that was started in the background ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step 0"):
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert Run.open(tmp_path / "a").status == "interrupted"


# --- wrappers -----------------------------------------------------------------------------


def test_eval_in_wrappers_says_so_and_goes_on_only_in_the_same(rlrf_cli: Invoke) -> None:
    wrap = ("--wrap", "FeedbackLevel:level=binary", "--wrap", "TruncateFeedback:max_chars=9")
    code, out, _ = rlrf_cli(*EVAL, *wrap, "--out", "eval.json")
    assert code == 0
    assert "FeedbackLevel(level='binary'), TruncateFeedback(max_chars=9)" in out
    data = json.loads(Path("eval.json").read_text())
    told = [
        {"name": "FeedbackLevel", "level": "binary"},
        {"name": "TruncateFeedback", "max_chars": 9},
    ]
    assert data["wrappers"] == data["lock"]["env"]["wrappers"] == told
    assert (data["feedback"], data["split"]) == ("binary", "eval")
    texts = {s["text"] for r in data["rollouts"] for f in r["feedback"] for s in f}
    assert texts == {"not correct."[-9:]}
    settings = {k: data[k] for k in EVAL_SETTINGS}
    Path("other.json.partial").write_text(json.dumps(settings) + "\n")
    code, _, err = rlrf_cli(*EVAL, "--out", "other.json", "--feedback", "binary")
    assert code == 2
    assert "made with wrappers=[{'name': 'FeedbackLevel'" in err
    assert rlrf_cli(*EVAL, *wrap, "--out", "other.json")[0] == 0


EVAL_SETTINGS = (
    "env env_options split feedback n_tasks policy model policy_options samples_per_task "
    "temperature top_p max_tokens seed wrappers"
).split()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        ("FeedbackLevl:level=binary", "unknown wrapper 'FeedbackLevl'. Did you mean"),
        ("FeedbackLevel:level=reference", "shows no more than 'explained'"),
        ("FeedbackLevel:binary", "is no wrapper; write NAME"),
        ("FeedbackLevel:lvl=binary", "its arguments are level"),
    ],
)
@pytest.mark.parametrize("command", [EVAL, ("check", "cli-cities-v0")])
def test_wrong_wrappers_are_wrong_usage(
    rlrf_cli: Invoke, command: tuple[str, ...], wrap: str, message: str
) -> None:
    code, _, err = rlrf_cli(*command, "--wrap", wrap)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_info_shows_wrappers_and_what_they_leave(rlrf_cli: Invoke) -> None:
    code, out, _ = rlrf_cli("info", "cli-cities-v0", "--wrap", "DropFeedback:kinds=['reference']")
    assert code == 0
    assert "DropFeedback(kinds=['reference'], probability=1.0, seed=0)" in out
    assert "Cities\nName the capital." in out
    assert "It is Paris" not in out
    assert "FeedbackLevel" in rlrf_cli("list")[1]


def test_train_takes_wrappers_and_keeps_them(rlrf_cli: Invoke) -> None:
    Path("c.toml").write_text(
        'model = "m"\n[trainer]\nname = "cli-fake"\n[env]\nid = "cli-cities-v0"\n'
        '[env.wrap]\nFeedbackLevel = {level = "category"}\n'
    )
    set_ = ("--set", "env.wrap.DropFeedback.seed=1")
    code, _, err = rlrf_cli("train", "c.toml", *set_, "--run-dir", "run")
    assert code == 0, err
    (trainer,) = FakeTrainer.made
    assert str(trainer.env).startswith("DropFeedback(")
    assert str(trainer.eval_env).startswith("DropFeedback(")
    assert trainer.eval_env is not None
    assert trainer.eval_env.split == "eval"
    kept = Run.open("run").lock["env"]["wrappers"]
    assert [w["name"] for w in kept] == ["FeedbackLevel", "DropFeedback"]
    again = rlrf_cli("train", "run/config.toml", "--run-dir", "again")
    assert again[0] == 0
    assert str(FakeTrainer.made[-1].env) == str(trainer.env)
    page = Path("run/report.html").read_text()
    assert "cli-cities-v0 in FeedbackLevel(level='category') in DropFeedback(" in page


# --- report, check ------------------------------------------------------------------------


def test_report_writes_one_page_about_several_runs(rlrf_cli: Invoke) -> None:
    for name in "ab":
        rlrf_cli(*TRAIN, "--run-dir", name, "--no-report")
    assert rlrf_cli("report", "a", "b", "--out", "both.html") == (0, "report: both.html\n", "")
    assert Path("both.html").is_file()


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("skip", 0), ("warn", 0), ("fail", 1)])
def test_check_prints_every_result_and_fails_if_one_does(
    rlrf_cli: Invoke, monkeypatch: pytest.MonkeyPatch, status: Any, code: int
) -> None:
    given = []

    def check_env(env: object, **options: object) -> CheckReport:
        given.append(options)
        return CheckReport("x", (CheckResult("semantic.floor_gap", status, "[all] the same"),))

    monkeypatch.setattr("rlrf.testing.check_env", check_env)
    found, out, _ = rlrf_cli("check", "cli-cities-v0", "cli-onlytrain-v0")
    assert found == code
    assert out.count("semantic.floor_gap") == 2
    assert f"{status}" in out
    assert "[all] the same" in out
    assert given == [{"tasks": 3, "actions": (), "deadline_s": 120.0}] * 2
    more = ("--task", "a", "--task", "b", "--action", "x", "--deadline", "9", "--strict")
    strict = rlrf_cli("check", "cli-cities-v0", *more, "--out", "report.json")[0]
    assert strict == (1 if status in ("warn", "fail") else 0)
    assert given[-1] == {"tasks": ["a", "b"], "actions": ["x"], "deadline_s": 9.0}
    written = json.loads(Path("report.json").read_text())
    assert written["results"][0]["check_id"] == "semantic.floor_gap"
    assert written["verdict"] == {"skip": "pass"}.get(status, status)


def test_check_reads_an_evaluation_of_that_environment(rlrf_cli: Invoke) -> None:
    assert rlrf_cli(*EVAL, "--samples", "2", "--out", "eval.json")[0] == 0
    _, out, _ = rlrf_cli("check", EVAL[2], "--eval", "eval.json")
    assert "statistical.headroom" in out
    code, _, err = rlrf_cli("check", "cli-onlytrain-v0", "--eval", "eval.json")
    assert code == 2
    assert "'eval.json' is an evaluation of" in err
    code, _, err = rlrf_cli("check", "a-v0", "b-v0", "--eval", "eval.json")
    assert (code, err) == (2, "error: --eval is of one environment; name that one alone\n")
    assert rlrf_cli("check", EVAL[2], "--deadline", "0")[0] == 2


# --- progress -----------------------------------------------------------------------------


def test_a_terminal_shows_a_live_table() -> None:
    console = Console(force_terminal=True, width=120, height=40, record=True)
    with TrainProgress(2, console=console) as progress:
        progress({"step": 0, "eval/pass_rate": 0.25})
        progress({"step": 1, "reward": 0.5, "self_distillation/teacher_student_kl": 0.0123})
    text = console.export_text()
    assert "25.0%" in text
    assert "0.0123" in text
    assert "1/2" in text


def test_plain_progress_is_one_line_per_step_however_narrow(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TrainProgress(None, console=Console(width=20)) as progress:
        progress({"step": 7, "reward": 0.5, "loss": 1.0, "entropy": 0.3, "time/step": 2.5})
    assert capsys.readouterr().out == ("step 7  reward 0.500  loss 1  entropy 0.30  seconds 2.50\n")


def test_rollout_progress_on_a_terminal_and_off_it(capsys: pytest.CaptureFixture[str]) -> None:
    done = rlrf.Rollout("a", "a", reward=1.0, solved=True)
    failed = rlrf.Rollout("a", "a", failure="deadline: slow")
    with RolloutProgress(2, console=Console()) as progress:
        progress(failed)
        progress(done)
    assert capsys.readouterr().out == (
        "1/2 rollouts  nothing scored\n2/2 rollouts  100.0% solved\n"
    )
    console = Console(force_terminal=True, width=100, record=True)
    with RolloutProgress(1, console=console) as live:
        live(done)
    assert "100.0% solved" in console.export_text()


# --- resume -------------------------------------------------------------------------------


@pytest.mark.slow
def test_resume_goes_on_with_what_the_run_was_configured_with(
    rlrf_cli: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from tests.tiny_model import save_tiny

    model = save_tiny(Path("tiny"))
    sets = {
        "max_steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 3,
        "eval_tasks": 2,
        "probe_tasks": 0,
        "save_steps": 1,
    }
    code, _, error = rlrf_cli(
        *("train", "--env", "cli-cities-v0", "--model", str(model), "--run-dir", "a"),
        *(f"--set=trainer.{k}={v}" for k, v in sets.items()),
        "--no-report",
    )
    assert code == 0, error
    more = ("train", "--resume", "a", "--set", "trainer.max_steps=3")
    code, out, error = rlrf_cli(*more)
    assert code == 0, error
    assert "step 3/3" in out
    assert "step 2/3" not in out
    run = Run.open("a")
    assert [m["step"] for m in run.metrics] == [0, 1, 2, 3]
    assert run.config["trainer"]["max_steps"] == 3
    before = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
    for same in ((), ("--set", "trainer.max_steps=3")):
        assert rlrf_cli("train", "--resume", "a", *same) == (
            0,
            "the run 'a' is finished, nothing is left to do: it took 3 steps\n"
            "to take more, up to step N: rlrf train --resume a --set trainer.max_steps=N\n",
            "",
        )
    assert before == {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
    code, out, _ = rlrf_cli("train", "--resume", "a", "--set", "trainer.save_steps=2")
    assert (code, "all 3 steps have been taken; raise max_steps" in out) == (0, True)
    for given in (("--run-dir", "b"), ("--overwrite",), ("a/config.toml",)):
        code, _, error = rlrf_cli(*more, *given)
        assert (code, "leave out" in error) == (2, True)
    before = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
    code, _, error = rlrf_cli(*more, "--set", "trainer.lora_r=2")
    assert code == 2
    assert "lora_r=0" in error
    after = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
    assert after == before
    Path("elsewhere").mkdir()  # the model was given by a path from here
    monkeypatch.chdir("elsewhere")
    code, _, error = rlrf_cli(
        "train", "--resume", "../a", "--set", "trainer.max_steps=4", "--model", "../tiny"
    )
    assert code == 0, error
    code, _, error = rlrf_cli("train", "--resume", "../a", "--set", "trainer.max_steps=5")
    assert code == 0, error
    assert Run.open("../a").metrics[-1]["step"] == 5


@pytest.mark.parametrize(
    ("trainer", "model", "told"),
    [
        ({"max_steps": 9}, False, "it took 3 steps of 9 and stopped early; it has no checkpoint"),
        ({"max_steps": 3}, True, "\nto train on: rlrf train r/config.toml --model r/model --run"),
        ({}, False, "it took 3 steps\n"),
    ],
)
def test_a_run_that_is_finished_says_what_more_can_be_done(
    rlrf_cli: Invoke, trainer: dict[str, int], model: bool, told: str
) -> None:
    run = Run.create("r", config={"trainer": trainer})
    Path("r/config.toml").write_text('model = "m"\n[env]\nid = "cli-cities-v0"\n')
    run.log(3, {"loss": 1.0})
    run.finish("done", model=model)
    code, out, error = rlrf_cli("train", "--resume", "r")
    assert (code, error) == (0, "")
    assert told in out
    if trainer.get("max_steps") == 9:
        for step in ("state.json", "state.safetensors"):
            folder = Path("r/checkpoints/step-00000003")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / step).touch()
        again = "to go on: rlrf train --resume r --set trainer.early_stopping_patience=0\n"
        assert rlrf_cli("train", "--resume", "r")[1].endswith(again)


def test_resume_needs_a_run_that_stands_still_and_a_trainer_that_can(rlrf_cli: Invoke) -> None:
    code, _, error = rlrf_cli("train", "--resume", "nowhere")
    assert code == 2
    assert "'nowhere' is not a folder" in error
    assert rlrf_cli(*TRAIN, "--run-dir", "a", "--no-report")[0] == 0
    code, out, _ = rlrf_cli("train", "--resume", "a")
    assert (code, "is finished, nothing is left to do: it took 3 steps\n" in out) == (0, True)
    code, _, error = rlrf_cli("train", "--resume", "a", "--set", "trainer.max_steps=4")
    assert code == 2
    assert "'cli-fake' cannot resume" in error
    assert Run.open("a").status == "done"
    holder = (
        "import sys, rlrf.runs as r\n"
        "with r.own('a'):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as alive:  # it ends with its standard input
        assert alive.stdout is not None
        assert alive.stdout.readline() == b"held\n"
        before = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
        for args in (
            ("train", "--resume", "a"),
            (*TRAIN, "--run-dir", "a", "--overwrite"),
            (*TRAIN, "--run-dir", "a"),
        ):
            code, _, error = rlrf_cli(*args)
            assert code == 2
            assert f"the run 'a' is in use, by process {alive.pid} on " in error
            assert error.count("\n") == 1
        assert rlrf_cli("report", "a")[0] == 0  # reading needs nothing
        Path("a/report.html").unlink()
        assert {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()} == before
    assert not Path("a/.lock").exists()
    Path("a/config.toml").unlink()
    code, _, error = rlrf_cli("train", "--resume", "a")
    assert code == 2
    assert "no config.toml" in error
