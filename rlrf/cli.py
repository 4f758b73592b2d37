"""The command line: ``rlrf list | info | eval | train | report | check``, and plug-in commands.

Exit codes: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted. Every error rlrf raises on
purpose is one line on standard error; ``RLRF_DEBUG=1`` shows the traceback as well.

Further commands come from the entry-point group ``rlrf.commands`` (each a ``typer.Typer``), which
are imported when they are called, not before: ``rlrf --help`` needs no extra.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import inspect
import itertools
import logging
import math
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import rlrf
from rlrf import _interrupt, _streams, notices, runs
from rlrf._async import run_sync
from rlrf._files import reason
from rlrf._plugin_source import describe_target, plain, read_signature
from rlrf.config import (
    TrainConfig,
    TrainerSection,
    build_config,
    check_output,
    in_range,
    load_train_config,
    parse_assignment,
    to_toml,
)
from rlrf.console import Display, RolloutProgress, TrainProgress
from rlrf.env import EmptySplitError, Env, StepResult, Task
from rlrf.errors import ConfigError, RlrfError, UsageError, describe
from rlrf.evaluate import EvalReport, evaluate
from rlrf.feedback import Level
from rlrf.messages import Messages
from rlrf.plugins import Registry
from rlrf.policy import SamplingParams, make_policy, policies
from rlrf.progress import phase
from rlrf.registry import accepted_options, origins
from rlrf.results import ResultsFile
from rlrf.rollout import MAX_AT_ONCE, Rollout
from rlrf.sandbox import sandboxes
from rlrf.trainer import make_trainer, trainers

app = typer.Typer(
    name="rlrf",
    help="Reinforcement learning with rich feedback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands = Registry("rlrf.commands", "command")


def main() -> None:
    """Run the command line; the console script ``rlrf``."""
    code = 0
    if _interrupt.IS_COMMAND:
        # The last thing that Python does for us: while it shuts down, a thread that is still in
        # C++ code (a model samples on after an error) aborts the process.
        atexit.register(lambda: os._exit(code))
    _streams.protect(descriptors=_interrupt.IS_COMMAND)
    interrupts = _interrupt.Interrupts()
    try:
        with interrupts:
            code = _run(sys.argv[1:])
    except KeyboardInterrupt:
        code = interrupts.code
        interrupts.say()
        if interrupts.signal is not None:
            sys.stdout.flush()
            os._exit(code)
    if (error := _streams.lost()) is not None and code == 0 and not _interrupt.kept():
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        code = 1
    _streams.restore()
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """The exit code of a command line; whatever is raised becomes lines on standard error."""
    log = _ToStderr()
    logging.getLogger("rlrf").setLevel(logging.INFO)
    logging.getLogger("rlrf").addHandler(log)
    logging.getLogger("stamina").setLevel(logging.ERROR)  # rlrf.transport says it once
    shown, warnings.showwarning = warnings.showwarning, _show_warning
    try:
        for argument in arguments:
            if not _is_text(argument):
                raise UsageError(f"{argument!r} is not UTF-8 text; rename what it names")
        _add_plugin_commands()
        command = typer.main.get_command(app)
        if "_RLRF_COMPLETE" in os.environ:
            command()  # answers the shell
        _invoke(command, arguments, "rlrf")
        return 0
    except KeyboardInterrupt:
        raise
    except typer.Exit as end:
        return end.exit_code
    except SystemExit as end:  # of a plug-in
        if end.code is None or isinstance(end.code, int):
            return int(end.code or 0)
        print(f"error: {end.code}", file=sys.stderr)
        return 1
    except BaseException as error:  # also what libraries in other languages panic with
        if os.environ.get("RLRF_DEBUG"):
            traceback.print_exc()
        return _say_error(error)
    finally:
        logging.getLogger("rlrf").removeHandler(log)
        warnings.showwarning = shown


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _invoke(command: Any, arguments: Sequence[str], name: str) -> None:
    # Not command(): it takes a broken pipe of the work itself for one of standard output.
    with command.make_context(name, list(arguments)) as context:
        command.invoke(context)


def _say_error(error: BaseException) -> int:
    """Tell an error in a line of its own each, and return the exit code."""
    usage = isinstance(error, UsageError)
    if isinstance(error, _ClickError):  # an unknown option, a value of another type
        usage, told = True, error.format_message()
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return 2
        if context is not None:
            told = f"{told.rstrip()} See: {context.command_path} --help"
    elif isinstance(error, RlrfError):
        told = str(error) or type(error).__name__
    else:
        told = describe(error)
        if isinstance(error, OSError):
            if error.strerror:
                told = f"{error.filename or type(error).__name__}: {error.strerror}"
        else:
            told += "\n(RLRF_DEBUG=1 shows where)"
    for line in told.splitlines():
        if len(line) > _LONGEST_LINE:  # it names what was given, and that may be anything
            line = line[: _LONGEST_LINE // 2] + " ... " + line[-_LONGEST_LINE // 2 :]
        print(line if line.startswith("(") else f"error: {line}", file=sys.stderr)
    return 2 if usage else 1


_LONGEST_LINE = 2000

# What typer, which brings its own click or takes the installed one, raises for wrong usage.
_ClickError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _ToStderr(logging.Handler):
    """Prints what the library has to say, above a progress display if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        # Looked up each time: a progress display puts itself in the place of standard error.
        print(self.format(record), file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    # Where in the source it was raised is nothing to who reads a command's output.
    told = f"{category.__name__}: {message}" if issubclass(category, FutureWarning) else message
    print(f"warning: {told}", file=sys.stderr)


def _console() -> Console:
    # Made when it is used: standard output may have been redirected since the import.
    return Console()


# --- plug-in commands ---------------------------------------------------------------------


def _add_plugin_commands() -> None:
    present = {command.name for command in app.registered_commands}
    for name, target, of in commands.items():
        if name not in present:
            app.command(
                name,
                help=describe_target(target, of)[0] or f"Commands of the {name!r} plug-in.",
                # All arguments, --help included, are for the command that is loaded below.
                context_settings={
                    "allow_extra_args": True,
                    "ignore_unknown_options": True,
                    "help_option_names": [],
                },
            )(_plugin_command(name))


def _plugin_command(name: str) -> Callable[[typer.Context], None]:
    def call(ctx: typer.Context) -> None:
        plugin = commands.load(name)
        if not isinstance(plugin, typer.Typer):
            raise UsageError(f"command {name!r} is {plugin!r}; a plug-in command is a typer.Typer")
        # A group even with a single command: `rlrf model fetch` must not become `rlrf model`.
        _invoke(typer.main.get_group(plugin), ctx.args, f"rlrf {name}")

    return call


# --- options shared by commands -----------------------------------------------------------

_EnvOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="Option of the environment, name=value; repeatable."),
]
_EnvId = Annotated[str, typer.Argument(metavar="ENV", help="Environment id; see `rlrf list`.")]


def _version(value: bool) -> None:
    if value:
        print(f"rlrf {rlrf.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# --- list ---------------------------------------------------------------------------------


@app.command("list")
def list_() -> None:
    """List environments, trainers, policies and sandboxes."""
    console = _console()
    for title, registry in (
        ("Environments", None),
        ("Trainers", trainers),
        ("Policies", policies),
        ("Sandboxes", sandboxes),
    ):
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        table.show_header = False
        if registry is None:
            brings = origins()
            rows = [(n, s.entry_point, brings.get(n, "")) for n, s in rlrf.registry.items()]
        else:
            rows = registry.items()
        for name, target, of in rows:
            doc, missing = describe_target(target, of)
            needs = f"  (needs: pip install 'rlrf[{missing}]')" if missing else ""
            table.add_row(escape(name), escape(doc + needs))
        if not table.row_count:
            table.add_row("-", "none installed")
        console.print(table)
        console.print()


# --- info ---------------------------------------------------------------------------------


@app.command()
def info(
    env: _EnvId,
    option: _EnvOptions = None,
    split: Annotated[str | None, typer.Option(help="Split of the example task.")] = None,
) -> None:
    """Show what an environment is: options, splits, a task, and its feedback at every level."""
    console = _console()
    found = _make_env(env, option, {"split": split, "feedback": "reference"})
    try:
        doc = plain(inspect.getdoc(type(found)) or "")
        console.print(f"[bold cyan]{escape(env)}[/]  {type(found).__qualname__}")
        console.print(doc, markup=False, highlight=False)
        console.print()
        _print_options(console, type(found))
        sizes = {name: _size(found, name) for name in found.splits}
        told = ", ".join(f"{name} {size} tasks" for name, size in sizes.items())
        console.print(f"[bold]Splits[/]  {told}")
        low, high = found.reward_range
        console.print(
            f"[bold]Reward[/]  {low:g} to {high:g}, solved at {found.success_threshold:g}\n",
            highlight=False,
        )
        shown = next((n for n in (found.split, *found.splits) if sizes[n]), found.split)
        task = found.tasks(shown)[0]
        console.print(f"[bold]Example task[/]  {escape(task.id)} ({shown})")
        _print_messages(console, task.messages)
        console.print()
        _print_levels(console, found, task)
    finally:
        found.close()


def _size(env: Env, split: str) -> int:
    """Tasks of a split; 0 where the environment has none."""
    try:
        return len(env.tasks(split))
    except EmptySplitError:
        return 0


def _print_options(console: Console, cls: type[Env]) -> None:
    table = Table(title="Options", title_justify="left", title_style="bold", box=None)
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("default")
    table.add_column("type")
    accepted = accepted_options(cls) or set()
    seen: set[str] = set()
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or not issubclass(base, Env):
            continue
        for p in inspect.signature(init).parameters.values():
            if p.name in accepted and p.name not in seen:
                seen.add(p.name)
                default = "(required)" if p.default is p.empty else repr(p.default)
                kind = "" if p.annotation is p.empty else inspect.formatannotation(p.annotation)
                table.add_row(p.name, escape(default), escape(kind.strip("'")))
    console.print(table)
    console.print()


def _print_messages(console: Console, messages: Messages) -> None:
    for message in messages:
        console.print(f"[dim]{message['role']}:[/]")
        console.print(message["content"] or "", markup=False, highlight=False)


def _print_levels(console: Console, env: Env, task: Task) -> None:
    """What the environment says to an empty reply, at each level."""

    async def attempt() -> StepResult:
        episode = await env.aepisode(task, seed=0)
        return await episode.astep("")

    try:
        result = run_sync(attempt())
    except RlrfError as error:
        console.print(f"An empty attempt could not be graded here: {error}", markup=False)
        return
    console.print(f"[bold]Feedback to an empty attempt[/]  reward {result.reward:g}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("level", style="cyan", no_wrap=True)
    table.add_column("kinds", no_wrap=True)
    table.add_column("text")
    for level in Level:
        shown = result.info["feedback"].at_level(level)
        table.add_row(level.name, ", ".join(shown.kinds), escape(shown.text) or "(nothing)")
    console.print(table)


# --- eval ---------------------------------------------------------------------------------


@app.command("eval")
def eval_(
    context: typer.Context,
    env: Annotated[str, typer.Option(help="Environment id.")],
    policy: Annotated[str, typer.Option(help="Policy; see `rlrf list`.")] = "hf",
    model: Annotated[str | None, typer.Option(help="Model folder or name.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split; the environment's own for evaluation by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many tasks.")] = None,
    samples: Annotated[int, typer.Option(help="Attempts per task.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass.")] = 1.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens per reply; the environment's suggestion by default.")
    ] = None,
    feedback: Annotated[str | None, typer.Option(help="Feedback level.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds sampling and episodes.")] = 0,
    max_concurrency: Annotated[int, typer.Option(help="Episodes under way at once.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(help="The JSON file for report and rollouts; runs/eval/... by default."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace --out, and start anew.")] = False,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Server of the policy 'openai', up to and including /v1; else $OPENAI_BASE_URL, "
            "else OpenAI's own."
        ),
    ] = None,
    option: _EnvOptions = None,
    policy_option: Annotated[
        list[str] | None,
        typer.Option("--policy-option", help="Option of the policy, name=value; repeatable."),
    ] = None,
) -> None:
    """Measure a policy on an environment. A run that was cut off is continued."""
    in_range("limit", limit)
    in_range("samples", samples, most=MAX_AT_ONCE)
    in_range("max-concurrency", max_concurrency, most=MAX_AT_ONCE)
    in_range("max-tokens", max_tokens, most=100_000_000)
    in_range("seed", seed, least=0, most=2**63 - 1)
    check_output("out", out)
    given = {"split": split, "feedback": feedback}
    policy_options = _assignments(policy_option)
    policy_options |= {
        name: value for name, value in (("model", model), ("base_url", base_url)) if value
    }
    signature = read_signature(policies.target(policy))
    if signature is not None:  # before anything is imported
        _check_call(policy, signature, policy_options)
    progress = context.with_resource(RolloutProgress())
    with phase(f"loading the environment {env!r}"):
        found = _make_env(env, option, given, held_out=True)
    max_tokens = found.max_tokens if max_tokens is None else max_tokens
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    with contextlib.ExitStack() as stack:
        stack.callback(found.close)
        n_tasks = min(limit or sys.maxsize, len(found.tasks()))
        settings = {
            "env": env,
            "env_options": _assignments(option),
            "split": found.split,
            "feedback": found.feedback_level.name,
            "n_tasks": n_tasks,
            "policy": policy,
            "model": model,
            "policy_options": {
                k: v for k, v in policy_options.items() if k not in ("api_key", "base_url")
            },
            "samples_per_task": samples,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        if out is not None:
            results = ResultsFile(out, settings, overwrite=overwrite)
        else:
            name = "-".join((env, policy, *([Path(model).name] if model else [])))
            results = ResultsFile.named(Path("runs", "eval"), name, settings)
        stack.enter_context(results)
        if results.done:
            print(f"continuing {results.partial}: {len(results.done)} done", file=sys.stderr)
        with phase(f"loading the policy {policy!r}"):  # once the results are ours
            player = _make_policy(policy, policy_options)
        stack.callback(getattr(player, "close", lambda: None))
        n_rollouts = n_tasks * samples
        progress.begin(n_rollouts, results.done)

        def kept() -> list[str]:
            return results.kept(progress.done, n_rollouts, "rollouts")

        with notices.collected() as slow, _interrupt.keeping(kept):

            def finished(rollout: Rollout) -> None:
                results.add(rollout)
                progress(rollout)

            report = evaluate(
                found,
                player,
                samples_per_task=samples,
                params=params,
                seed=seed,
                limit=limit,
                max_concurrency=max_concurrency,
                on_rollout=finished,
                done=results.done,
            )
        _print_eval(_console(), report, found.split)
        cut = report.finish_reasons.get("length", 0)
        if 2 * cut > report.n_rollouts:
            print(
                f"warning: {cut} of {report.n_rollouts} replies were cut off at {max_tokens} "
                "tokens; raise --max-tokens",
                file=sys.stderr,
            )
        results.finish(report, {"lock": runs.environment_lock(found), "warnings": slow})
        print(f"written to {results.path}")
        if report.n_unscored:
            print(
                f"{report.n_unscored} rollouts are unscored; the same command, with --out "
                f"{results.path}, tries them again",
                file=sys.stderr,
            )
    if report.pass_rate is None:
        why = "".join(f". The first failed with {r.failure}" for r in report.rollouts[:1])
        print(f"error: no rollout could be scored{why}", file=sys.stderr)
        raise typer.Exit(1)


def _print_eval(console: Console, report: EvalReport, split: str) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    rows: dict[str, str] = {
        "split": split,
        "tasks": str(report.n_tasks),
        "rollouts": str(report.n_rollouts),
    }
    if report.pass_rate is not None and report.pass_rate_ci is not None:
        low, high = report.pass_rate_ci
        rows["pass rate"] = f"{report.pass_rate:.1%}  (95 % CI {low:.1%} to {high:.1%})"
        for k, chance in report.pass_at_k.items():
            low, high = report.pass_at_k_ci[k]
            if k > 1:
                rows[f"pass@{k}"] = f"{chance:.1%}  (95 % CI {low:.1%} to {high:.1%})"
        rows["mean reward"] = f"{report.mean_reward:.4f}"
        if report.mean_length is not None:
            rows["mean length"] = f"{report.mean_length:.1f} tokens"
    if report.n_unscored:
        rows["unscored"] = f"{report.n_unscored} (left out of every number): " + _counts(
            report.failures
        )
    if report.feedback_kinds:
        rows["feedback"] = _counts(report.feedback_kinds)
    rows["ended"] = _counts(report.finish_reasons)
    rows |= {name: f"{value:.4g}" for name, value in report.metrics.items()}
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    console.print(table)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _make_env(
    id: str,
    option: list[str] | None,
    given: Mapping[str, Any],
    *,
    held_out: bool = False,
) -> Env:
    options = _assignments(option)
    options |= {name: value for name, value in given.items() if value is not None}
    env = rlrf.make(id, **options)
    if held_out and env.eval_split in env.splits and "split" not in options:
        env.split = env.eval_split
    return env


def _make_policy(name: str, options: dict[str, Any]) -> Any:
    _check_call(name, inspect.signature(policies.load(name)), options)
    return make_policy(name, **options)


def _check_call(name: str, signature: inspect.Signature, options: dict[str, Any]) -> None:
    """See that a policy takes its options.

    Raises:
        ConfigError: it lacks one, or does not know one.
    """
    try:
        signature.bind(**options)
    except TypeError as error:
        parameters = [p for p in signature.parameters if p not in ("args", "kwargs")]
        remedy = (
            "give --model"
            if "'model'" in str(error) and "model" not in options
            else ("its options are " + (", ".join(parameters) or "none"))
        )
        raise ConfigError(f"policy {name!r}: {error}; {remedy}") from None


def _assignments(texts: list[str] | None) -> dict[str, Any]:
    return dict(parse_assignment(text) for text in texts or ())


# --- train --------------------------------------------------------------------------------


@app.command()
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
        owned = context.with_resource(runs.own(resume, resume=True)) if _is_main() else None
        config, run_dir = _to_resume(resume, config, run_dir, overwrite), str(resume)
    overrides = {"trainer.name": trainer, "model": model, "env.id": env, "run.dir": run_dir}
    settings = load_train_config(config, set_ or (), overrides)
    if resume is not None and (told := _finished(resume, settings)):
        if _is_main():
            print(told)
        return
    # From here on it may take a while: to import torch, for one.
    progress = context.with_resource(TrainProgress()) if _is_main() else None
    with phase(f"loading the trainer {settings.trainer.name!r}"):
        trainer_config = _trainer_config(settings.trainer)
    if settings.model and (folder := Path(os.path.expanduser(settings.model))).is_dir():
        settings.model = os.path.abspath(folder)  # a run may be gone on with from elsewhere
    path = _run_dir(settings)
    if resume is None and _is_main():
        path, owning = _own_free(path, named=settings.run.dir is not None)
        owned = context.with_resource(owning)
        runs.check_free(path, overwrite=overwrite)
    if (path / "config.toml").exists() and not runs.is_run(path):
        raise UsageError(
            f"{str(path)!r} is no run but holds a config.toml, which the run's would replace; "
            "choose another run directory"
        )
    with phase(f"loading the environment {settings.env.id!r}"):
        environment = rlrf.make(settings.env.id, **settings.env.options)
    held_out: Env | None = None
    try:
        if settings.eval_env is not None or "eval" in environment.splits:
            section = settings.held_out()
            held_out = rlrf.make(section.id, **section.options)
        len(environment.tasks())  # an empty task set is an error before the model is loaded
        settings.run.dir = str(path)
        if owned is not None:
            text = to_toml(settings.model_dump(exclude_none=True))
            owned.let(overwrite=overwrite, config_toml=text)
        if _is_main():
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
    if _is_main():
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


def _is_main() -> bool:
    """Whether this process talks: the first of those that a launcher starts, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _trainer_config(section: TrainerSection) -> Any:
    config_class = getattr(trainers.load(section.name), "config_class", None)
    if config_class is None:
        return section.options
    return build_config(config_class, section.options, prefix="trainer.")


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
    try:
        with _interrupt.keeping(partial(_kept, path, before)):
            with phase("preparing"):
                built = make_trainer(
                    settings.trainer.name,
                    model=settings.model,
                    env=env,
                    config=trainer_config,
                    run_dir=path,
                    eval_env=eval_env,
                    on_step=progress,
                    **more,
                )
            result = built.train()
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
        if _is_main():
            _close_run(path, before, status, message, report)
    if not _is_main():
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
            _report([path], None)
    except (OSError, RlrfError) as error:
        if status == "done":
            print(
                f"warning: {error}; the run is done, `rlrf report {path}` writes its report",
                file=sys.stderr,
            )


# --- report, check ------------------------------------------------------------------------


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    check_output("out", out)
    _report(run, out)


def _report(run: list[Path], out: Path | None) -> None:
    from rlrf.report import write_report

    print(f"report: {write_report(run, out)}")


@app.command()
def check(
    context: typer.Context,
    env: Annotated[list[str], typer.Argument(metavar="ENV...", help="Environment ids.")],
    option: _EnvOptions = None,
) -> None:
    """Check that environments keep the rules; exits with 1 if one does not."""
    from rlrf.testing import check_env

    console = _console()
    context.with_resource(Display())
    ok = True
    for id in env:
        found = _make_env(id, option, {})
        try:
            with phase(f"checking {id}"):
                outcome = check_env(found)
        finally:
            found.close()
        ok &= outcome.ok
        table = Table(title=id, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("check", no_wrap=True)
        table.add_column("status")
        table.add_column("detail")
        colours = {"pass": "green", "fail": "red", "skip": "yellow"}
        for result in outcome.results:
            table.add_row(
                escape(result.id),
                f"[{colours[result.status]}]{result.status}[/]",
                escape(result.detail),
            )
        console.print(table)
    if not ok:
        raise typer.Exit(1)
