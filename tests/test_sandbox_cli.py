"""``rlrf sandbox doctor | build | import | gc``: the diagnoses, and the commands for real."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rlrf import UsageError
from rlrf_sandboxes import daemon, doctor, images
from rlrf_sandboxes.cli import app
from rlrf_sandboxes.doctor import Facts, Finding, choice, diagnose
from tests.backends import needs_bwrap, options

INFO = {"ServerVersion": "28.0", "CgroupVersion": "2", "Driver": "overlay2", "Runtimes": {}}


def found(backend, **facts):
    return next(f for f in diagnose(Facts(**facts)) if f.backend == backend)


def test_a_sound_machine_has_no_problems():
    facts = {"docker": INFO, "image": images.runner_hash(), "bwrap": "0.8.0"}
    assert [f.problem for f in diagnose(Facts(**facts))] == [None, None, None]


def test_no_daemon_is_explained_by_the_connection():
    finding = found("docker", docker_error="there is no docker daemon at X; start it")
    assert finding.problem == "there is no docker daemon at X; start it"


@pytest.mark.parametrize(("image", "why"), [(None, "there is no image"), ("", "something else")])
def test_a_missing_or_foreign_image_is_to_be_imported(image, why):
    finding = found("docker", docker=INFO, image=image)
    assert why in finding.problem
    assert "rlrf sandbox import --from-host" in finding.remedy


def test_a_kernel_that_enforces_nothing_is_named():
    finding = found("docker", docker={**INFO, "PidsLimit": False}, image=images.runner_hash())
    assert any("does not enforce PidsLimit" in line for line in finding.details)


@pytest.mark.parametrize(
    ("sysctls", "remedy"),
    [
        ({"kernel.apparmor_restrict_unprivileged_userns": "1"}, "apparmor_parser -r"),
        ({"kernel.unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"),
        ({"user.max_user_namespaces": "0"}, "user.max_user_namespaces=15000"),
        ({}, "seccomp=unconfined"),
    ],
)
def test_forbidden_namespaces_get_the_command_that_allows_them(sysctls, remedy):
    finding = found("bubblewrap", bwrap="0.9", bwrap_error="Permission denied", sysctls=sysctls)
    assert "Permission denied" in finding.problem
    assert remedy in finding.remedy


def test_what_auto_takes():
    docker, bwrap = Finding("docker", "", []), Finding("bubblewrap", "", [], works=True)
    assert choice([docker, bwrap], None) == "bubblewrap"
    docker.works = True
    assert choice([docker, bwrap], None) == "docker"
    assert choice([docker, bwrap], "process") == "process, as RLRF_SANDBOX says"
    assert "nothing safe works here" in choice([Finding("process", "", [], works=True)], None)


@needs_bwrap
def test_the_doctor_runs_programs():
    pytest.importorskip("docker", reason="needs the extra 'docker'")
    ran = CliRunner().invoke(app, ["doctor", "--json", "--docker-host", "unix:///nonexistent"])
    assert ran.exit_code == 0
    told = json.loads(ran.stdout)
    assert told["auto"] == "bubblewrap"
    by_name = {b["backend"]: b for b in told["backends"]}
    assert "no docker daemon" in by_name["docker"]["problem"]
    assert by_name["bubblewrap"]["works"]
    assert "a program ran: accepted" in by_name["process"]["trial"]


def test_the_doctor_fails_where_nothing_safe_works(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    ran = CliRunner().invoke(app, ["doctor", "--docker-host", "unix:///nonexistent"])
    assert ran.exit_code == 1
    assert "bubblewrap: does not work" in ran.stdout
    assert "to mend: sudo apt-get install bubblewrap" in ran.stdout
    assert "nothing safe works here" in ran.stdout


@pytest.mark.docker
def test_the_doctor_says_what_docker_lacks_and_has(monkeypatch):
    options("docker")
    assert found("docker", **vars(doctor.gather())).problem is None
    monkeypatch.setattr(images, "tag", lambda: "rlrf-sandbox:none-such")
    assert "no image rlrf-sandbox:none-such" in found("docker", **vars(doctor.gather())).problem


@pytest.mark.docker
def test_a_build_without_a_registry_says_what_to_do_instead():
    options("docker")
    ran = CliRunner().invoke(app, ["build", "--base", "localhost:1/none@sha256:" + "0" * 64])
    assert ran.exit_code != 0
    assert "rlrf sandbox import --from-host" in str(ran.exception)


@pytest.mark.docker
def test_gc_with_nothing_to_do_says_nothing():
    options("docker")
    assert CliRunner().invoke(app, ["gc"]).stdout == "nothing to remove\n"


def test_import_wants_one_source():
    for args in ([], ["--from-host", "--rootfs", "/x"]):
        ran = CliRunner().invoke(app, ["import", *args])
        assert isinstance(ran.exception, UsageError)
    assert daemon.CONCURRENT_CALLS == 4
