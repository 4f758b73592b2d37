"""``rlrf view``: the report, served here, which follows what is still being written."""

from __future__ import annotations

import sys
import webbrowser
from typing import Annotated

import typer

from rlrf.commands.report import Cards, Paths
from rlrf.config import in_range
from rlrf.errors import UsageError


def view(
    paths: Paths,
    port: Annotated[
        int | None, typer.Option(help="Port of 127.0.0.1; 8765 or any that is free by default.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in a browser.")] = False,
    cards: Cards = False,
) -> None:
    """Show runs and evaluations in a browser, and follow those that still go on.

    Served on this machine's loopback only, until Ctrl-C.
    """
    from rlrf.view import PORT, Book, Server

    in_range("port", port, most=65535)
    book = Book(paths, cards=cards)
    try:
        server = Server(book, port or PORT)
    except UsageError:
        if port is not None:
            raise
        server = Server(book, 0)
    with server:
        print(f"at {server.url} until Ctrl-C")
        sys.stdout.flush()
        if browser:
            webbrowser.open(server.url)
        server.serve_forever()
