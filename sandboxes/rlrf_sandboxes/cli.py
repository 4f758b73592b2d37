"""The commands ``rlrf sandbox doctor | build | import | gc``.

They do not install Docker or bubblewrap, change no setting of the machine, and remove no container
that is not rlrf's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from rlrf.errors import UsageError
from rlrf_sandboxes import daemon, images
from rlrf_sandboxes import doctor as doctor_

app = typer.Typer(help="Prepare and look after sandboxes.", no_args_is_help=True)

_DockerHost = Annotated[
    str | None, typer.Option("--docker-host", help="The daemon; default: DOCKER_HOST.")
]
_Packages = Annotated[
    list[str] | None, typer.Option("--package", help="Put a package in, too; repeatable.")
]


@app.command("doctor")
def doctor(
    docker_host: _DockerHost = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which sandboxes work here, what they guarantee, and how to mend the others.

    Ends with 0 if one that is safe works, else with 1.
    """
    logging.getLogger("rlrf.sandbox").setLevel(logging.WARNING)  # it would say it all twice
    facts = doctor_.gather(docker_host)
    findings = doctor_.diagnose(facts)
    for finding in findings:
        if finding.problem is None:
            doctor_.try_out(finding, docker_host)
    chosen = doctor_.choice(findings, facts.override)
    if as_json:
        rows = [dataclasses.asdict(f) for f in findings]
        print(json.dumps({"auto": chosen, "backends": rows}, indent=2))
    else:
        _print_findings(findings, chosen)
    if not any(f.works for f in findings if f.backend != "process"):
        raise typer.Exit(1)


def _print_findings(findings: list[doctor_.Finding], chosen: str) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        mark = "[green]works[/]" if finding.works else "[red]does not work[/]"
        console.print(f"[bold]{finding.backend}[/]: {mark}")
        for line in (*finding.details, finding.trial):
            if line:
                console.print(f"  {escape(line)}")
        if finding.problem:
            console.print(f"  [yellow]problem:[/] {escape(finding.problem)}")
        if finding.remedy:
            first, *more = finding.remedy.splitlines()
            console.print(f"  [yellow]to mend:[/] {escape(first)}")
            for line in more:
                console.print(f"    {escape(line)}")
        console.print(f"  guarantee: {escape(finding.guarantee)}")
    console.print(f"[bold]auto[/] takes: {escape(chosen)}")


@app.command("build")
def build(
    package: _Packages = None,
    base: Annotated[str | None, typer.Option(help="Start from this image.")] = None,
    docker_host: _DockerHost = None,
) -> None:
    """Build the docker image from Python's; needs a registry."""
    with contextlib.closing(daemon.connect(docker_host)) as client:
        print(images.build(client, package or (), base))


@app.command("import")
def import_(
    from_host: Annotated[
        bool, typer.Option("--from-host", help="Pack this machine's own Python.")
    ] = False,
    rootfs: Annotated[
        Path | None, typer.Option(help="Take the root filesystem in this folder.")
    ] = None,
    package: _Packages = None,
    docker_host: _DockerHost = None,
) -> None:
    """Make the docker image without a registry."""
    if from_host == (rootfs is not None):
        raise UsageError("give either --from-host or --rootfs DIR")
    if rootfs is not None and package:
        raise UsageError("--package goes with --from-host; install it into the folder instead")
    with contextlib.closing(daemon.connect(docker_host)) as client:
        if rootfs is not None:
            print(images.import_rootfs(client, rootfs))
        else:
            print(images.import_from_host(client, package or ()))


@app.command("gc")
def gc(docker_host: _DockerHost = None) -> None:
    """Remove containers that dead processes of this host have left behind."""
    with contextlib.closing(daemon.connect(docker_host)) as client:
        removed = images.gc(client)
        for container in removed:
            print(f"removed {container[:12]}")
        if not removed:
            print("nothing to remove")
