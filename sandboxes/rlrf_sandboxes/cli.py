"""The commands ``rlrf sandbox build | import | gc``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from rlrf.errors import UsageError
from rlrf_sandboxes import daemon, images

app = typer.Typer(help="Prepare and look after sandboxes.", no_args_is_help=True)

_DockerHost = Annotated[
    str | None, typer.Option("--docker-host", help="The daemon; default: DOCKER_HOST.")
]
_Packages = Annotated[
    list[str] | None, typer.Option("--package", help="Put a package in, too; repeatable.")
]


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
        for container in images.gc(client):
            print(f"removed {container[:12]}")
