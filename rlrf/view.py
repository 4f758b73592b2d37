"""The report, served on this machine's loopback, which follows what is still being written.

A page that is open asks every two seconds whether its sources have changed, and draws what is new
in place; filters, scrolling and what is unfolded stay. Nothing is written, and nothing of the
network is read or reached. It is for one's own eyes: whoever is logged in on this machine can open
it; another machine cannot, nor can a page of another site that the browser shows.
"""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rlrf._report.records import MALFORMED
from rlrf._run_folder import GROWING
from rlrf.errors import UsageError, describe
from rlrf.report import embed, page_data, render
from rlrf.results import current

PORT = 8765
"""Where a page is served unless that port is taken."""
_IDLE = 4.0
"""Sources that take a second to read are read again after so many, at the earliest."""


class Book:
    """What there is to show, read anew when a source has changed; for any number of threads.

    Args:
        paths: run directories and files of results.
        cards: whether environments draw their cards; see :func:`rlrf.report.write_report`.
        clock: seconds, for tests.

    Raises:
        UsageError: a path holds neither a run nor results.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        cards: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.paths, self.cards, self._clock = list(paths), cards, clock
        self._lock = threading.Lock()
        self._rest_until = 0.0
        self._state = self._stamp()
        self._good = self._data = self._read()

    def _read(self) -> dict[str, Any]:
        began = self._clock()
        try:
            return page_data(self.paths, cards=self.cards)
        finally:
            ended = self._clock()
            self._rest_until = ended + _IDLE * (ended - began)

    def _stamp(self) -> str:
        """Changes when a file does."""
        files = []
        for path in self.paths:
            path = current(path)
            inside = (
                [path / name for name in ("status.json", *GROWING)] if path.is_dir() else [path]
            )
            for file in inside:
                try:
                    stat = file.stat()
                except OSError:
                    continue
                files.append((file.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return f"{hash(tuple(files)) & (1 << 64) - 1:016x}"

    def now(self) -> tuple[str, dict[str, Any]]:
        """The state of the sources, and what a page says of it.

        What cannot be read just now, since it is being replaced, is told beside what was there.
        """
        with self._lock:
            if self._clock() >= self._rest_until:
                state = self._state
                try:
                    state = self._stamp()
                    if state != self._state:
                        self._good = self._data = self._read()
                except (*MALFORMED, OSError) as error:
                    state += "!"  # and so it is tried again
                    first, *others = self._good["sources"]
                    told = ("error", f"what is shown was there before: {describe(error)}")
                    first = {**first, "warnings": [told, *first["warnings"]]}
                    self._data = {**self._good, "sources": [first, *others]}
                self._state = state
            return self._state, self._data


class Server(http.server.ThreadingHTTPServer):
    """Serves one :class:`Book`, on loopback only.

    Args:
        book: it.
        port: which; 0 for any that is free.

    Raises:
        UsageError: the port is taken.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, book: Book, port: int = 0) -> None:
        self.book = book
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UsageError(
                f"port {port} of 127.0.0.1 cannot be had: {error.strerror}; name another with "
                "--port, or none"
            ) from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 30
    server_version, sys_version = "rlrf", ""

    def do_GET(self) -> None:
        # A page of another site can have its name lead here (DNS rebinding), but not this header.
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost", "[::1]"):
            self._send(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", f"This is {self.server.url}\n")
            return
        asked = urlsplit(self.path)
        if asked.path not in ("/", "/data"):
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "There are / and /data.\n")
            return
        state, data = self.server.book.now()
        if asked.path == "/":
            self._send(HTTPStatus.OK, "text/html", render(data, live=state))
        elif parse_qs(asked.query).get("state") == [state]:
            self._send(HTTPStatus.NO_CONTENT, "", "")
        else:
            said = f'{{"state":{json.dumps(state)},"data":{embed(data)}}}'
            self._send(HTTPStatus.OK, "application/json", said)

    do_HEAD = do_GET

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        if status is not HTTPStatus.NO_CONTENT:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        for name, value in (
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A page that asks every two seconds is no news."""
