"""What sandboxes work on this machine, what each guarantees, and how to mend what does not work.

Facts are gathered first (:func:`gather`), then judged (:func:`diagnose`) by rules that touch
nothing, so that every rule can be tried with the facts of a machine that is not at hand.

It does not mend anything itself, and does not attack a sandbox to find out: that it holds is what
the tests show.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrf import run_sync
from rlrf.errors import RlrfError
from rlrf.sandbox import Program, StdinCase, start_sandbox
from rlrf.sandbox.pool import PREFERRED, sandboxes
from rlrf_sandboxes import daemon, images

APPARMOR_PROFILE = """\
abi <abi/4.0>,
include <tunables/global>
profile bwrap /usr/bin/bwrap flags=(unconfined) {
  userns,
  include if exists <local/bwrap>
}"""


@dataclass(frozen=True)
class Facts:
    """What was found out about this machine.

    Attributes:
        docker: the daemon's answer to ``info``; None if there was none.
        docker_error: why not, with the remedy.
        image: hash of the runner in our image; "" if another made it, None if there is no image.
        bwrap: the version; None if it is not installed.
        bwrap_error: what it says when it is to make namespaces; None if it can.
        sysctls: those that forbid namespaces, as far as they exist here.
        override: ``RLRF_SANDBOX``.
    """

    docker: dict[str, Any] | None = None
    docker_error: str | None = None
    image: str | None = None
    bwrap: str | None = None
    bwrap_error: str | None = None
    sysctls: dict[str, str] = dataclasses.field(default_factory=dict)
    override: str | None = None


@dataclass
class Finding:
    """One backend.

    Attributes:
        backend: its name.
        guarantee: what it protects from.
        details: what was found, one line each.
        problem: what keeps it from working; None if nothing was found.
        remedy: what to do about it, as commands.
        trial: what came of running a program in it.
        works: whether that was right.
    """

    backend: str
    guarantee: str
    details: list[str]
    problem: str | None = None
    remedy: str | None = None
    trial: str | None = None
    works: bool = False


_SYSCTLS = (
    "kernel.apparmor_restrict_unprivileged_userns",
    "kernel.unprivileged_userns_clone",
    "user.max_user_namespaces",
)


def gather(docker_host: str | None = None) -> Facts:
    """Look at this machine."""
    about: dict[str, Any] = {"override": os.environ.get("RLRF_SANDBOX") or None}
    try:
        connected = contextlib.closing(daemon.connect(docker_host, timeout=10))
        with connected as client, daemon.calls("nothing could be found out"):
            found = client.info(), images.runner_of(client, images.tag())
        about["docker"], about["image"] = found
    except RlrfError as error:
        about["docker_error"] = str(error)
    if shutil.which("bwrap"):
        about["bwrap"] = _say(["bwrap", "--version"])[1].split()[-1]
        code, said = _say(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"])
        about["bwrap_error"] = said.strip() or f"exit code {code}" if code else None
    sysctls = {}
    for name in _SYSCTLS:
        path = Path("/proc/sys", *name.split("."))
        if path.exists():
            sysctls[name] = path.read_text().strip()
    return Facts(**about, sysctls=sysctls)


def _say(command: list[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr


def diagnose(facts: Facts) -> list[Finding]:
    """What the facts mean for each backend, best first."""
    return [_docker(facts), _bubblewrap(facts), _process()]


def _guarantee(backend: str) -> str:
    return str(sandboxes.load(backend)().info.guarantee)


def _docker(facts: Facts) -> Finding:
    finding = Finding("docker", _guarantee("docker"), [])
    if facts.docker is None:
        finding.problem = facts.docker_error or "no daemon"
        return finding
    info = facts.docker
    runtimes = sorted(info.get("Runtimes") or ())
    gvisor = "runsc (gVisor) is there" if "runsc" in runtimes else "no runsc (gVisor)"
    finding.details = [
        f"daemon {info.get('ServerVersion')}, cgroup v{info.get('CgroupVersion', '1')}, "
        f"storage {info.get('Driver')}, {gvisor}",
    ]
    weak = [w for w in ("MemoryLimit", "PidsLimit") if info.get(w) is False]
    finding.details += [f"the kernel does not enforce {w}: programs can exceed it" for w in weak]
    if facts.image is None:
        finding.problem = f"there is no image {images.tag()}"
        finding.remedy = "rlrf sandbox import --from-host   (or, with a registry: build)"
    elif facts.image != images.runner_hash():
        finding.problem = f"image {images.tag()} was made by something else"
        finding.remedy = "rlrf sandbox import --from-host   (or, with a registry: build)"
    else:
        finding.details.append(f"image {images.tag()}")
    return finding


def _bubblewrap(facts: Facts) -> Finding:
    finding = Finding("bubblewrap", _guarantee("bubblewrap"), [])
    if facts.bwrap is None:
        finding.problem = "bubblewrap is not installed"
        finding.remedy = "sudo apt-get install bubblewrap   (or your system's package manager)"
        return finding
    finding.details = [f"bubblewrap {facts.bwrap}"]
    if facts.bwrap_error is None:
        return finding
    finding.problem = f"it may not make namespaces: {facts.bwrap_error}"
    if facts.sysctls.get("kernel.apparmor_restrict_unprivileged_userns") == "1":
        finding.problem += " (AppArmor restricts them, as in Ubuntu 24.04)"
        finding.remedy = (
            "sudo tee /etc/apparmor.d/bwrap <<'END'\n"
            + APPARMOR_PROFILE
            + "\nEND\nsudo apparmor_parser -r /etc/apparmor.d/bwrap"
        )
    elif facts.sysctls.get("kernel.unprivileged_userns_clone") == "0":
        finding.remedy = "sudo sysctl -w kernel.unprivileged_userns_clone=1"
    elif facts.sysctls.get("user.max_user_namespaces") == "0":
        finding.remedy = "sudo sysctl -w user.max_user_namespaces=15000"
    else:
        finding.remedy = (
            "inside a container: run it with --security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined, or use the docker backend from outside"
        )
    return finding


def _process() -> Finding:
    return Finding("process", _guarantee("process"), ["for trusted programs, with allow_unsafe"])


def try_out(finding: Finding, docker_host: str | None = None) -> None:
    """Run a program in the backend and note what came of it."""
    options: dict[str, Any] = {}
    if finding.backend == "process":
        options["allow_unsafe"] = True
    if finding.backend == "docker" and docker_host:
        options["docker_host"] = docker_host

    async def trial() -> str:
        start = time.perf_counter()
        pool = await start_sandbox(finding.backend, slots=1, **options)
        started = time.perf_counter()
        try:
            report = await pool.run(Program("print(input()[::-1])"), [StdinCase("olleh", "hello")])
            took = time.perf_counter() - started
        finally:
            await pool.aclose()
        return (
            f"a program ran: {report.verdict} (start {started - start:.2f} s, "
            f"program {1000 * took:.0f} ms)"
        )

    try:
        finding.trial = run_sync(trial())
        finding.works = "accepted" in finding.trial
    except RlrfError as error:
        finding.trial = f"a program did not run: {error}"
        finding.problem = finding.problem or str(error)


def choice(findings: list[Finding], override: str | None) -> str:
    """What ``auto`` takes, in a line."""
    works = {f.backend for f in findings if f.works}
    best = next((b for b in PREFERRED if b in works), None)
    if override and override != "auto":
        known = sandboxes.names()
        wrong = "" if override in known else f"; but there is no such backend: {', '.join(known)}"
        return f"{override}, as RLRF_SANDBOX says{wrong}"
    if best is None:
        return "process, which refuses untrusted programs: nothing safe works here"
    return best
