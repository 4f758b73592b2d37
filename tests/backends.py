"""The sandbox backends that tests run on, and what they need."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
BACKENDS = [
    pytest.param("docker", marks=pytest.mark.docker),
    pytest.param("bubblewrap", marks=needs_bwrap),
    pytest.param("process"),
]
WALLED = BACKENDS[:2]
OPTIONS = {"process": {"allow_unsafe": True}}


@functools.cache
def docker_trouble() -> str | None:
    """Why docker cannot be used here; None if it can. Makes the image if it is not there."""
    from rlrf import InfraError, MissingDependencyError
    from rlrf_sandboxes import daemon, images

    try:
        client = daemon.connect()
    except (InfraError, MissingDependencyError) as error:
        return str(error)
    # The workers of a parallel run share the image; one of them makes it.
    with open(Path(tempfile.gettempdir(), "rlrf-test-image.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if images.find(client) is None:
            images.import_from_host(client)
    client.close()
    return None


def options(backend: str) -> dict[str, object]:
    """Options for a backend, or skip the test where it cannot be had."""
    if backend == "docker":
        trouble = docker_trouble()
        if trouble is not None:
            if os.environ.get("RLRF_REQUIRE_DOCKER"):
                pytest.fail(f"docker is required here: {trouble}")
            pytest.skip(trouble)
    return OPTIONS.get(backend, {})
