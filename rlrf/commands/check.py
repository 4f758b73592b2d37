"""``rlrf check``: does an environment keep the rules."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from rlrf.commands.common import EnvOptions, make_env, new_console
from rlrf.console import Display
from rlrf.progress import phase


def check(
    context: typer.Context,
    env: Annotated[list[str], typer.Argument(metavar="ENV...", help="Environment ids.")],
    option: EnvOptions = None,
) -> None:
    """Check that environments keep the rules; exits with 1 if one does not."""
    from rlrf.testing import check_env

    console = new_console()
    context.with_resource(Display())
    ok = True
    for id in env:
        found = make_env(id, option, {})
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
