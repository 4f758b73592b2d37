"""``rlrf check``: does an environment keep the rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlrf._files import refused, write_whole
from rlrf.commands.common import EnvOptions, Wraps, make_env, new_console
from rlrf.config import check_output
from rlrf.console import Display
from rlrf.errors import ConfigError
from rlrf.progress import phase

if TYPE_CHECKING:
    from rlrf.testing import CheckReport


def check(
    context: typer.Context,
    env: Annotated[list[str], typer.Argument(metavar="ENV...", help="Environment ids.")],
    option: EnvOptions = None,
    wrap: Wraps = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Try this task (its id); repeatable.")
    ] = None,
    action: Annotated[
        list[str] | None,
        typer.Option(help="A further attempt; a wrong one in the right form tells most."),
    ] = None,
    deadline: Annotated[float, typer.Option(help="Seconds that a hook may take.")] = 120.0,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail.")] = False,
    eval_: Annotated[
        Path | None,
        typer.Option(
            "--eval", metavar="FILE", help="A file of `rlrf eval`: can that policy learn here?"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the report there, as JSON in OpenEnv's words.")
    ] = None,
) -> None:
    """Check that environments keep the rules; exits with 1 if one does not."""
    from rlrf.testing import CheckReport, check_env, check_eval
    from rlrf.testing.statistics import read_eval

    check_output("out", out)
    if not deadline > 0:
        raise ConfigError(f"--deadline is {deadline:g}; it must be positive")
    if eval_ is not None and len(env) > 1:
        raise ConfigError("--eval is of one environment; name that one alone")
    evaluation = None if eval_ is None else read_eval(eval_, env[0])
    console = new_console()
    context.with_resource(Display())
    ok, reports = True, []
    for id in env:
        found = make_env(id, option, {}, wraps=wrap)
        try:
            with phase(f"checking {id}"):
                outcome = check_env(
                    found, tasks=task or 3, actions=action or (), deadline_s=deadline
                )
        finally:
            found.close()
        more = () if evaluation is None else check_eval(evaluation)
        outcome = CheckReport(outcome.env, (*outcome.results, *more))
        ok &= outcome.ok and not (strict and outcome.warnings)
        reports.append(outcome)
        _print(console, id, outcome)
    if out is not None:
        data = [r.to_dict() for r in reports]
        try:
            write_whole(out, json.dumps(data[0] if len(data) == 1 else data, indent=1) + "\n")
        except OSError as error:
            raise refused(f"cannot write the report {str(out)!r}", error) from None
    if not ok:
        raise typer.Exit(1)


def _print(console: Console, id: str, outcome: CheckReport) -> None:
    table = Table(title=escape(id), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)
    table.add_column("status")
    table.add_column("detail")
    colours = {"pass": "green", "warn": "magenta", "fail": "red", "skip": "yellow"}
    for result in outcome.results:
        table.add_row(
            escape(result.id),
            f"[{colours[result.status]}]{result.status}[/]",
            escape(result.detail),
        )
    console.print(table)
