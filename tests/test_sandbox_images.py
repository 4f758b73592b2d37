"""Images of the docker sandbox, and whose containers are whose."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile

import pytest

from rlrf import InfraError, run_sync
from rlrf.sandbox import Program, StdinCase, Verdict, open_sandbox
from rlrf_sandboxes import daemon, images, runner
from tests.backends import options


@pytest.fixture
def client():
    options("docker")
    made = daemon.connect()
    yield made
    made.close()


@pytest.fixture
def own_tag(monkeypatch):
    """A tag that no other test uses, gone after the test."""
    name = f"rlrf-sandbox:test-{os.getpid()}"
    monkeypatch.setattr(images, "tag", lambda: name)
    yield name
    other = daemon.connect()
    if images.runner_of(other, name) is not None:
        other.remove_image(name, force=True)
    other.close()


def a_container(client, labels):
    """A container that would sleep, not started."""
    image = images.find(client)
    made = client.create_container(image, entrypoint=["python3"], command=["-c", ""], labels=labels)
    return made["Id"]


# --- packing --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_host_packs_to_the_same_bytes_and_brings_the_runner():
    first, second = io.BytesIO(), io.BytesIO()
    images.pack_host(first)
    images.pack_host(second)
    assert first.getvalue() == second.getvalue()
    first.seek(0)
    with tarfile.open(fileobj=first) as archive:
        names = {m.name.removeprefix("./") for m in archive}
        packed = archive.extractfile(next(m for m in archive if m.name.endswith("rlrf/runner.py")))
        assert packed.read() == images.RUNNER.read_bytes()
        assert not [m for m in archive if m.mode & 0o6000]  # setuid, setgid
    assert not [n for n in names if n.startswith(("root/", "home/", "etc/shadow"))]


def test_the_entry_point_has_the_runners_flags():
    source = images.DOCKERFILE.read_text()
    for flag in runner.FLAGS:
        assert f'"{flag}"' in source


@pytest.mark.parametrize("name", ["numpy; rm -rf /", "--index-url=x", "git+https://x/y", ""])
def test_packages_are_plain_requirements(name):
    with pytest.raises((InfraError, ValueError)):
        images._requirement(name)


# --- importing ------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.slow
def test_an_imported_image_runs_programs(client, own_tag):
    images.import_from_host(client)
    assert images.find(client) == own_tag

    async def go():
        async with open_sandbox("docker", slots=1, image=own_tag) as pool:
            return await pool.run(Program("print('ok')"), [StdinCase("", "ok")])

    assert run_sync(go()).verdict is Verdict.ACCEPTED


@pytest.mark.docker
@pytest.mark.slow
def test_a_root_filesystem_becomes_an_image(client, own_tag, tmp_path):
    packed = tmp_path / "host.tar"
    with packed.open("wb") as out:
        images.pack_host(out)
    root = tmp_path / "root"
    with tarfile.open(packed) as archive:
        # As an attribute, because Python below 3.11.4 knows no filters.
        archive.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
        archive.extractall(root)
    (root / "rlrf" / "runner.py").write_text("an old one")
    images.import_rootfs(client, root)

    async def go():
        async with open_sandbox("docker", slots=1, image=own_tag) as pool:
            return await pool.run(Program("print('ok')"), [StdinCase("", "ok")])

    assert run_sync(go()).verdict is Verdict.ACCEPTED


def test_a_folder_without_a_python_is_refused(tmp_path):
    with pytest.raises(ValueError, match="python3"):
        images.pack_rootfs(io.BytesIO(), tmp_path)


@pytest.mark.docker
def test_an_image_of_another_version_is_not_used(client, own_tag):
    image = images.find(client, "rlrf-sandbox:" + images.runner_hash()[:12])
    assert image is not None
    made = client.create_container(image, command=[])
    client.commit(
        made["Id"],
        *own_tag.split(":"),
        changes=[f"LABEL {images.RUNNER_LABEL}=another"],
    )
    client.remove_container(made["Id"])
    assert images.runner_of(client, own_tag) == "another"
    assert images.find(client) is None
    with pytest.raises(InfraError, match="rlrf sandbox import --from-host"):
        run_sync(_opened(own_tag))


async def _opened(image):
    async with open_sandbox("docker", slots=1, image=image):
        pass


# --- whose containers -----------------------------------------------------------------------


def test_labels_say_who_made_a_container():
    mine = daemon.labels()
    assert daemon.owner_is_alive(mine) is True
    assert daemon.owner_is_alive({**mine, "org.rlrf.owner_start": "1"}) is False  # a pid reused
    assert daemon.owner_is_alive({**mine, "org.rlrf.host": "another"}) is None
    assert daemon.owner_is_alive({}) is None
    dead = subprocess.Popen([sys.executable, "-c", ""])
    started = daemon.start_time(dead.pid) or "1"
    dead.wait()
    gone = {**mine, "org.rlrf.owner_pid": str(dead.pid), "org.rlrf.owner_start": started}
    assert daemon.owner_is_alive(gone) is False


@pytest.mark.docker
def test_gc_removes_what_the_dead_left_and_nothing_else(client):
    mine = daemon.labels()
    containers = {
        "dead": a_container(client, {**mine, "org.rlrf.owner_start": "1"}),
        "alive": a_container(client, mine),
        "elsewhere": a_container(client, {**mine, "org.rlrf.host": "x", "org.rlrf.owner_pid": "1"}),
        "not ours": a_container(client, {"org.rlrf.owner_start": "1"}),
        "no labels": a_container(client, {}),
    }
    try:
        removed = images.gc(client)
        assert containers["dead"] in removed
        left = {c["Id"] for c in client.containers(all=True)}
        assert {n for n, i in containers.items() if i in left} == set(containers) - {"dead"}
        assert images.gc(client) == []
    finally:
        for name, container in containers.items():
            if name != "dead":
                client.remove_container(container, force=True)


class Racing:
    """A daemon whose container goes while it is being removed."""

    def __init__(self, status):
        self.status = status

    def containers(self, **_):
        dead = {**daemon.labels(), "org.rlrf.owner_start": "1"}
        return [{"Id": "a", "Labels": dead}]

    def remove_container(self, *_, **__):
        errors = pytest.importorskip("docker").errors

        class Response:
            status_code = self.status
            reason = "so"
            url = ""

            def json(self):
                return {"message": "so"}

        raise errors.APIError("so", response=Response())


@pytest.mark.parametrize("status", [404, 409])
def test_a_container_that_is_going_already_is_no_error(status):
    pytest.importorskip("docker", reason="needs the extra 'docker'")
    images.gc(Racing(status))
