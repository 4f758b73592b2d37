"""``rlrf report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlrf.config import check_output

Paths = Annotated[
    list[Path],
    typer.Argument(metavar="PATH...", help="Run directories, and files of `rlrf eval`."),
]
Cards = Annotated[
    bool,
    typer.Option(
        "--cards",
        help="Make the environments they name, to draw their own cards. Only for files you trust.",
    ),
]


def report(
    run: Paths,
    out: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
    cards: Cards = False,
) -> None:
    """Write one self-contained HTML page about runs and evaluations, one or several."""
    check_output("out", out)
    make_report(run, out, cards=cards)


def make_report(run: list[Path], out: Path | None, *, cards: bool = False) -> None:
    """Write the page and say where it is."""
    from rlrf.report import write_report

    print(f"report: {write_report(run, out, cards=cards)}")
