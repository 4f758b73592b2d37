"""``rlrf report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlrf.config import check_output


def report(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    check_output("out", out)
    make_report(run, out)


def make_report(run: list[Path], out: Path | None) -> None:
    """Write the page and say where it is."""
    from rlrf.report import write_report

    print(f"report: {write_report(run, out)}")
