"""Where the docker daemon is said to be: whatever is wrong with that is one clear failure."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from rlrf import InfraError
from rlrf.sandbox import start_sandbox
from rlrf_sandboxes import daemon, doctor

pytest.importorskip("docker", reason="needs the extra 'docker'")

BAD = [
    "tcp://localhost:port",
    "tcp://localhost:99999",
    "tcp://localhost:-1",
    "tcp://localhost:0x50",
    "tcp://localhost:1:1",
    "tcp://127.0.0.1:٣",
    "tcp://",
    "tcp://:",
    "tcp://[::1",
    "http://[::1",
    "tcp://exa mple:80",
    "tcp://127.0.0.1:1/a?b#c",
    "tcp://127.0.0.1:1",
    "tcp://" + "a" * 300 + ":80",
    "ssh://user@localhost:port",
    "ftp://localhost",
    "fd://",
    "npipe:////./pipe/docker",
    "unix:///no/such/socket",
    "unix:///etc/passwd",
    "unix:///" + "a" * 300,
    "nonsense",
    " ",
]


def refused(docker_host=None, kind="docker_unreachable"):
    with pytest.raises(InfraError) as caught:
        daemon.connect(docker_host, timeout=2).close()
    assert caught.value.kind == kind
    assert not caught.value.retryable
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("DOCKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(daemon, "_SYSTEM_SOCKET", str(tmp_path / "none.sock"))


@pytest.mark.parametrize("address", [*BAD, "tcp://local\nhost:80", "tcp://\x00:1", "\ud800"])
def test_a_bad_address_is_a_daemon_that_cannot_be_reached(address, monkeypatch):
    told = refused(address)
    assert "docker daemon" in told
    if address in BAD:
        monkeypatch.setenv("DOCKER_HOST", address)
        assert refused() == told
        assert "DOCKER_HOST" in told


def test_a_sandbox_and_the_doctor_say_it_too(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://localhost:port")
    with pytest.raises(InfraError, match="tcp://localhost:port") as caught:
        asyncio.run(start_sandbox("docker", slots=1))
    assert caught.value.kind == "docker_unreachable"
    assert "tcp://localhost:port" in str(doctor.gather().docker_error)


def test_a_password_in_an_address_is_not_repeated():
    assert "secret" not in refused("tcp://user:secret@localhost:1")


@pytest.mark.parametrize("config", ["[]", '{"currentContext": 5}', '{"currentContext": "no/such"}'])
def test_a_broken_configuration(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    refused()


def test_a_context_that_is_not_there_is_not_passed_over(monkeypatch):
    monkeypatch.setenv("DOCKER_CONTEXT", "no-such")
    assert "there is no docker context 'no-such'" in refused()


@pytest.mark.parametrize("path", [None, "/no/such/folder"])
def test_tls_without_certificates(path, monkeypatch):
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_HOST", "tcp://localhost:1")
    if path:
        monkeypatch.setenv("DOCKER_CERT_PATH", path)
    refused()


def test_a_proxy_that_is_none(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://[x")
    refused("tcp://localhost:1")


@pytest.mark.slow
def test_a_daemon_that_says_nothing_sensible(tmp_path):
    path = str(tmp_path / "a.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert "does not answer" in refused(f"unix://{path}")


def test_a_socket_that_may_not_be_used(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    assert "usermod" in refused(f"unix://{tmp_path}/a.sock", "docker_forbidden")


def test_calls_that_fail_between_are_failures_too():
    told = pytest.raises(InfraError, match="not listed: the docker daemon failed")
    with told, daemon.calls("not listed"):
        raise ConnectionResetError(104, "Connection reset by peer")
