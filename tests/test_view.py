from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlrf import UsageError
from rlrf.runs import Run
from rlrf.view import Book, Server
from tests.fake_run import make_fake_eval, make_fake_run
from tests.test_report import CHROMIUM, browser


class Clock:
    """Stands until it is told."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    book = Book([make_fake_eval(tmp_path / "a.json", tasks=3, hostile=True)])
    with Server(book) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        return reply, reply.read()
    finally:
        connection.close()


def test_a_page_and_its_data_are_served_on_loopback(served: Server) -> None:
    assert served.server_address[0] == "127.0.0.1"
    reply, body = ask(served, "/")
    assert reply.status == 200
    text = body.decode()
    (state,) = re.findall(r'<html[^>]* data-live="([^"]*)"', text)
    assert "connect-src 'self'" in text
    assert text.count("</script>") == 3
    assert "<img" not in text
    reply, body = ask(served, f"/data?state={state}")
    assert (reply.status, body) == (204, b"")
    reply, body = ask(served, "/data?state=older")
    assert reply.status == 200
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    found = json.loads(body)
    assert found["state"] == state
    assert found["data"]["sources"][0]["name"] == "a"
    assert b"</script" not in body
    reply, body = ask(served, "/", "HEAD")
    assert (reply.status, body) == (200, b"")


def test_nothing_else_is_served(served: Server) -> None:
    for path in ("/a.json", "/../../etc/passwd", "/data/"):
        assert ask(served, path)[0].status == 404
    assert ask(served, "/", "POST")[0].status == 501


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_the_page_of_another_site_gets_nothing(served: Server, host: str) -> None:
    reply, body = ask(served, "/data", Host=host)
    assert reply.status == 421
    assert b"sources" not in body
    assert ask(served, "/data", Host=f"localhost:{served.server_port}")[0].status == 200


def test_a_run_is_followed(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config={})
    book = Book([run.path], clock=Clock())
    state, data = book.now()
    assert data["sources"][0]["series"] == {}
    assert book.now()[0] == state
    run.log(1, {"reward": 0.5})
    fresh, data = book.now()
    assert fresh != state
    assert data["sources"][0]["series"]["reward"] == [[1, 0.5]]
    run.finish("done")
    assert book.now()[1]["sources"][0]["facts"]["status"] == "done"


def test_an_evaluation_is_followed_to_its_end(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=3, partial=True)
    book = Book([path.with_name("a.json.partial")], clock=Clock())
    assert not book.now()[1]["sources"][0]["facts"]["done"]
    make_fake_eval(path, tasks=3)
    path.with_name("a.json.partial").unlink()
    assert book.now()[1]["sources"][0]["facts"]["done"]


def test_what_is_being_replaced_is_shown_as_it_was(tmp_path: Path) -> None:
    path = make_fake_eval(tmp_path / "a.json", tasks=3)
    book = Book([path], clock=Clock())
    whole, (state, _) = path.read_text(), book.now()
    for text in ("{", None, "{"):
        path.write_text(text) if text else path.unlink()
        fresh, data = book.now()
        assert fresh != state
        level, told = data["sources"][0]["warnings"][0]
        assert level == "error"
        assert "was there before" in told
        assert sum("was there before" in w for _, w in data["sources"][0]["warnings"]) == 1
        assert len(data["sources"][0]["rollouts"]) == 6
    path.write_text(whole)
    assert not any("was there before" in w for _, w in book.now()[1]["sources"][0]["warnings"])


def test_large_sources_are_not_read_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, reads = Clock(), []

    def slow(*_: Any, **__: Any) -> dict[str, Any]:
        reads.append(clock.time)
        clock.time += 3
        return {"sources": []}

    monkeypatch.setattr("rlrf.view.page_data", slow)
    path = make_fake_eval(tmp_path / "a.json", tasks=1)
    book = Book([path], clock=clock)
    path.write_text("other")
    for _ in range(20):
        book.now()
        clock.time += 1
    assert reads == [0, 15]  # 3 seconds to read, 12 to rest


def test_wrong_use_is_told(tmp_path: Path, served: Server) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        Book([tmp_path])
    with pytest.raises(UsageError, match=f"port {served.server_port} of 127.0.0.1 cannot be had"):
        Server(served.book, served.server_port)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    run = make_fake_run(tmp_path / "run", steps=2)
    child = subprocess.Popen(
        [sys.executable, "-m", "rlrf", "view", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    (port,) = re.findall(r"at http://127\.0\.0\.1:(\d+)/ until Ctrl-C", child.stdout.readline())
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
    connection.request("GET", "/")
    assert connection.getresponse().status == 200
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 130


@pytest.mark.slow
@browser
def test_an_open_page_follows(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config={})
    run.log(1, {"reward": 0.25})

    class Moving(Book):
        """The run goes on each time the page asks; the page itself shows its beginning."""

        asked = 0

        def now(self) -> tuple[str, dict[str, Any]]:
            if self.asked == 1:
                run.log(2, {"reward": 0.75})
                run.event("warning", "the second step is there")
            self.asked += 1
            return super().now()

    with Server(Moving([run.path])) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
        thread.start()
        dom = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--virtual-time-budget=8000",
                "--dump-dom",
                server.url,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        server.shutdown()
        thread.join()
    root = re.findall(r"<html[^>]*>", dom)[0]
    assert "data-error" not in root
    assert "data-followed" in root
    assert "the second step is there" in dom
    assert "0.25 → 0.75" in dom
    assert "● live" in dom
