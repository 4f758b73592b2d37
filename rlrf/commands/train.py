"""``rlrf train``: one run, from its configuration to its report."""

from __future__ import annotations

import datetime
import inspect
import itertools
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import rlrf
from rlrf import _interrupt, runs
from rlrf._files import reason
from rlrf.commands.common import is_main, wrapped
from rlrf.commands.report import make_report
from rlrf.config import TrainConfig, build_trainer_config, load_train_config, to_toml
from rlrf.console import TrainProgress
from rlrf.env import Env
from rlrf.errors import RlrfError, UsageError, describe
from rlrf.progress import phase
from rlrf.trainer import accepted, make_trainer, trainers


def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Configuration file.")
    ] = None,
    trainer: Annotated[str | None, typer.Option(help="Trainer; see `rlrf list`.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or name.")] = None,
    env: Annotated[str | None, typer.Option(help="Environment id.")] = None,
    run_dir: Annotated[str | None, typer.Option(help="Where the run is written.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key, e.g. trainer.learning_rate=1e-5; repeatable."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the run directory.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html at the end.")
    ] = True,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with this run from its last checkpoint."),
    ] = None,
) -> None:
    """Train a model on an environment."""
    # A run is ours before anything is read of it, and until all of it is written.
    owned: runs.Ownership | None = None
    if resume is not None:
        owned = context.with_resource(runs.own(resume, resume=True)) if is_main() else None
        config, run_dir = _to_resume(resume, config, run_dir, overwrite), str(resume)
    overrides = {"trainer.name": trainer, "model": model, "env.id": env, "run.dir": run_dir}
    settings = load_train_config(config, set_ or (), overrides)
    if resume is not None and (told := _finished(resume, settings)):
        if is_main():
            print(told)
        return
    # From here on it may take a while: to import torch, for one.
    progress = context.with_resource(TrainProgress()) if is_main() else None
    with phase(f"loading the trainer {settings.trainer.name!r}"):
        name, options = settings.trainer.name, settings.trainer.options
        trainer_config = build_trainer_config(name, options, prefix="trainer.")
    if settings.model and (folder := Path(os.path.expanduser(settings.model))).is_dir():
        settings.model = os.path.abspath(folder)  # a run may be gone on with from elsewhere
    path = _run_dir(settings)
    if resume is None and is_main():
        path, owning = _own_free(path, named=settings.run.dir is not None)
        owned = context.with_resource(owning)
        runs.check_free(path, overwrite=overwrite)
    if (path / "config.toml").exists() and not runs.is_run(path):
        raise UsageError(
            f"{str(path)!r} is no run but holds a config.toml, which the run's would replace; "
            "choose another run directory (--run-dir)"
        )
    with phase(f"loading the environment {settings.env.id!r}"):
        environment = wrapped(rlrf.make(settings.env.id, **settings.env.options), settings.env.wrap)
    held_out: Env | None = None
    try:
        if settings.eval_env is not None or "eval" in environment.splits:
            section = settings.held_out()
            held_out = wrapped(rlrf.make(section.id, **section.options), section.wrap)
        len(environment.tasks())  # an empty task set is an error before the model is loaded
        settings.run.dir = str(path)
        if owned is not None:
            text = to_toml(settings.model_dump(exclude_none=True))
            owned.let(overwrite=overwrite, config_toml=text)
        if is_main():
            print(f"run directory: {path}", flush=True)
        if progress is not None:
            progress.total = getattr(trainer_config, "max_steps", None)
            later = getattr(trainer_config, "evaluations_after", None)
            progress.evaluations_after = later if callable(later) else None
        resumes = resume is not None
        _train(settings, trainer_config, environment, held_out, path, report, resumes, progress)
    finally:
        environment.close()
        if held_out is not None:
            held_out.close()


def _to_resume(run: Path, config: Path | None, run_dir: str | None, overwrite: bool) -> Path:
    """The configuration of the run to go on with.

    Raises:
        UsageError: there is no such run, it is done, or other arguments contradict it.
    """
    for name, given in (
        ("CONFIG.toml", config),
        ("--run-dir", run_dir),
        ("--overwrite", overwrite),
    ):
        if given:
            raise UsageError(
                f"--resume goes on with the configuration in {str(run)!r}; leave out {name} "
                "(--set may still change keys, trainer.max_steps for one)"
            )
    found = runs.Run.open(run)
    if is_main():
        found.settle()
    if not (run / "config.toml").exists():
        raise UsageError(f"{str(run)!r} has no config.toml: it was not made by `rlrf train`")
    return run / "config.toml"


def _finished(path: Path, settings: TrainConfig) -> str | None:
    """What to say of a run that has done all it was to do, and is to do no more; None: it is not.

    Args:
        path: the run.
        settings: what it is to go on with.
    """
    run, same = runs.Run.open(path), {"run"}
    before = load_train_config(path / "config.toml")
    if run.status != "done" or settings.model_dump(exclude=same) != before.model_dump(exclude=same):
        return None
    section = run.config.get("trainer")
    most = section.get("max_steps") if isinstance(section, dict) else None
    taken, again = run.last_step, shlex.join(["rlrf", "train", "--resume", str(path), "--set"])
    told = f"the run {str(path)!r} is finished, nothing is left to do: it took {taken} steps"
    if not isinstance(most, int):
        return told
    if taken < most:
        told += f" of {most} and stopped early"
    if not run.steps:
        told += "; it has no checkpoint to take more from (trainer.save_steps is 0)"
        return f"{told}\nto train on: {_train_on(path)}" if run.info.get("model") else told
    if taken < most:
        return f"{told}\nto go on: {again} trainer.early_stopping_patience=0"
    return f"{told}\nto take more, up to step N: {again} trainer.max_steps=N"


def _train_on(path: Path) -> str:
    """The command that trains a run's model on in a run of its own."""
    words = ["rlrf", "train", str(path / "config.toml"), "--model", str(path / "model")]
    return shlex.join([*words, "--run-dir", f"{path}-2"])


def _run_dir(settings: TrainConfig) -> Path:
    if settings.run.dir is not None:
        return Path(settings.run.dir)
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    env = settings.env.id.rpartition(":")[2]
    return Path("runs") / f"{env}-{settings.trainer.name}-{now}"


def _own_free(path: Path, *, named: bool) -> tuple[Path, runs.Ownership]:
    """The folder for a new run; where none was named, the first that nobody else has taken."""
    for number in itertools.count(1):
        place = path.with_name(f"{path.name}-{number}") if number > 1 else path
        try:
            owned = runs.own(place)
        except runs.InUse:
            if named:
                raise
            continue
        if named or not runs.is_run(place):
            break
        owned.close()
    return place, owned


def _train(
    settings: TrainConfig,
    trainer_config: Any,
    env: Env,
    eval_env: Env | None,
    path: Path,
    report: bool,
    resume: bool,
    progress: TrainProgress | None,
) -> None:
    """Run the trainer; whatever happens, the run directory says how it ended."""
    status, message = "failed", ""
    more = {"resume": True} if resume else {}
    before = runs.Run.open(path).info if runs.is_run(path) else None
    if (
        resume
        and "resume" not in inspect.signature(trainers.load(settings.trainer.name)).parameters
    ):
        raise UsageError(
            f"trainer {settings.trainer.name!r} cannot resume a run: it takes no `resume`"
        )
    lines = _Lines(path, before, settings, env, progress)
    offered = {"run_dir": path, "eval_env": eval_env, "on_step": lines} | more
    try:
        with _interrupt.keeping(partial(_kept, path, before)):
            with phase("preparing"):
                built = make_trainer(
                    settings.trainer.name,
                    model=settings.model,
                    env=env,
                    config=trainer_config,
                    **accepted(trainers.load(settings.trainer.name), offered),
                )
            result = built.train()
            lines.close(result)
        status = "done"
    except KeyboardInterrupt as error:
        status, message = "interrupted", describe(error)
        raise
    except BaseException as error:
        message = describe(error)
        if isinstance(error, OSError) and runs.unwritten(path, error):
            raise RlrfError(
                f"the run {str(path)!r} could not be written: {reason(error)}"
            ) from error
        raise
    finally:
        if is_main():
            _close_run(path, before, status, message, report)
    if not is_main():
        return
    kept = math.inf if result.model_step is None else result.model_step
    rates = {
        m["step"]: m["eval/pass_rate"]
        for m in result.history
        if m.get("eval/pass_rate") is not None and m["step"] <= kept
    }
    if rates:
        start = f"{rates[0]:.1%} before, " if 0 in rates else ""
        best = f" (step {kept}, the best)" if kept < result.history[-1]["step"] else ""
        print(f"held-out pass rate: {start}{rates[max(rates)]:.1%} after{best}")
    if result.model_dir is not None:
        print(f"model: {result.model_dir}")


class _Lines:
    """Takes a trainer's lines of metrics; of one that writes no run itself, they become one.

    Args:
        path: of the run.
        before: what was there.
        settings: what the run is configured with.
        env: what it trains on.
        shown: is told every line, too.
    """

    def __init__(
        self,
        path: Path,
        before: Mapping[str, Any] | None,
        settings: TrainConfig,
        env: Env,
        shown: Callable[[dict[str, float]], None] | None,
    ) -> None:
        self.path, self.before, self.settings, self.env = path, before, settings, env
        self.shown, self.told, self.theirs = shown, False, False
        self.run: runs.Run | None = None
        self.count = 0

    def __call__(self, line: dict[str, float]) -> None:
        """Keep a line, and show it."""
        self.told = True
        if not self.theirs:
            self._keep(line)
        if self.shown is not None:
            self.shown(line)

    def close(self, result: Any) -> None:
        """See that a trainer has returned what it owes, and keep what it has not told.

        Raises:
            RlrfError: it has not.
        """
        name = self.settings.trainer.name
        if not isinstance(result, rlrf.TrainResult):
            raise RlrfError(
                f"train() of trainer {name!r} returned {result!r:.200}; it must return "
                "rlrf.TrainResult(history), with a mapping of metrics per step"
            )
        for i, line in enumerate(result.history):
            if not isinstance(line, Mapping):
                raise RlrfError(
                    f"train() of trainer {name!r} returned a history whose line {i} is "
                    f"{line!r:.200}; each must be a mapping of numbers by name"
                )
            if not (self.told or self.theirs):
                self._keep(line)

    def _keep(self, line: Mapping[str, float]) -> None:
        if self.run is None:
            written = runs.is_run(self.path) and runs.Run.open(self.path).info != self.before
            self.theirs = self.theirs or written or not is_main()
            if self.theirs:  # the trainer writes it
                return
            config = {
                "trainer": {"name": self.settings.trainer.name, **self.settings.trainer.options},
                "model": self.settings.model,
            }
            self.run = runs.Run.create(self.path, config=config, env=self.env)
        self.count += 1
        numbers = {k: float(v) for k, v in line.items() if isinstance(v, int | float)}
        self.run.log(int(numbers.get("step", self.count)), numbers)


def _kept(path: Path, before: Mapping[str, Any] | None) -> list[str]:
    """What an interrupted run leaves, and how to go on with it; marks it, if nobody has."""
    again = f"to go on: {shlex.join(['rlrf', 'train', '--resume', str(path)])}"
    run = runs.Run.open(path) if runs.is_run(path) else None
    if run is None or run.info == before or not (path / "config.toml").exists():
        return ["nothing had begun", f"to begin: {_interrupt.same_command()}"]
    if run.status == "running":
        run.finish("interrupted", "interrupted")
    last = run.last_step
    told = f"kept: {last} steps in {path}"
    if saved := run.steps:
        return [f"{told}, the last checkpoint of step {saved[-1]}", again]
    if not last:
        return [f"{told}: the first had not ended", again]
    if run.begins_anew:
        return [f"{told}, but no checkpoint yet: it begins again", again]
    if run.info.get("model"):
        return [
            f"{told}, and the model of the last; for checkpoints set trainer.save_steps",
            f"to go on: {_train_on(path)}",
        ]
    return [
        f"{told}, but not the model, as trainer.save_steps is 0",
        f"to begin again: {_interrupt.same_command('--overwrite')}",
    ]


def _close_run(
    path: Path, before: Mapping[str, Any] | None, status: str, message: str, report: bool
) -> None:
    """Say how a run ended, where its trainer has not, and report; a failure hides no other."""
    try:
        if not runs.is_run(path) or runs.Run.open(path).info == before:
            return  # none has begun, or the one that is there did not go on
        run = runs.Run.open(path)
        if run.status == "running":  # else the trainer has said it itself
            run.finish(status, message)
        if report and run.metrics:
            make_report([path], None)
    except (OSError, RlrfError) as error:
        if status == "done":
            print(
                f"warning: {error}; the run is done, `rlrf report {path}` writes its report",
                file=sys.stderr,
            )
