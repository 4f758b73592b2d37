"""The docker backend: how its containers are locked up, and what happens when the daemon fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from rlrf import InfraError, UsageError, run_sync
from rlrf.sandbox import Limits, Program, SandboxPool, StdinCase, Verdict, open_sandbox
from rlrf_sandboxes import daemon, images
from rlrf_sandboxes.docker import DockerSandbox, _Container
from tests.backends import options
from tests.test_sandbox_pool import OWNER, eventually, start_time

pytestmark = pytest.mark.docker
CASE = [StdinCase("", "ok")]
OK = Program("print('ok')")


@pytest.fixture(scope="module", autouse=True)
def image():
    options("docker")
    client = daemon.connect()
    yield images.find(client)
    client.close()


@pytest.fixture
def client():
    made = daemon.connect()
    yield made
    made.close()


def ours(client, pid=None):
    """Containers made by a process, this one unless told."""
    label = f"{daemon.PREFIX}owner_pid={pid or os.getpid()}"
    return client.containers(all=True, filters={"label": label})


async def container_of(pool, client):
    """The container of a pool's first slot."""
    slot = pool._slots[0].sandbox._slot
    (one,) = [c for c in ours(client) if c["Id"] == slot._link._end.__closure__[0].cell_contents.id]
    return one


# --- how it is locked up --------------------------------------------------------------------


def test_the_container_has_no_rights_network_or_writable_system(client):
    async def go():
        async with open_sandbox("docker", slots=1) as pool:
            return client.inspect_container((await container_of(pool, client))["Id"])

    about = run_sync(go())
    host, config = about["HostConfig"], about["Config"]
    assert host["Privileged"] is False
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    caps = {c.removeprefix("CAP_") for c in host["CapAdd"]}
    assert caps == {"SETUID", "SETGID", "KILL", "CHOWN"}
    assert any(o.startswith("no-new-privileges") for o in host["SecurityOpt"])
    assert not any("unconfined" in o for o in host["SecurityOpt"])
    assert host["IpcMode"] == "none"
    assert (host["PidMode"], host["UTSMode"], host["UsernsMode"]) == ("", "", "")
    assert 0 < host["PidsLimit"] <= 128
    assert host["Memory"] == host["MemorySwap"] == (1024 + 64) << 20
    assert host["NanoCpus"] == 1_000_000_000
    assert not host["Binds"]
    assert not host.get("Mounts")
    assert not about["Mounts"]
    assert not host["Devices"]
    assert not host["VolumesFrom"]
    assert host["AutoRemove"] is True
    assert host["LogConfig"]["Type"] == "none"
    assert set(host["Tmpfs"]) == {"/sandbox", "/dev/mqueue", "/dev/pts"}
    for flag in ("nosuid", "nodev", "noexec", "size=64m", "nr_inodes=4096"):
        assert flag in host["Tmpfs"]["/sandbox"]
    assert host["Tmpfs"]["/dev/mqueue"].startswith("ro")
    assert host["Tmpfs"]["/dev/pts"].startswith("ro")
    assert {"/dev", "/proc/sys", "/proc/sysrq-trigger", "/proc/irq"} <= set(host["ReadonlyPaths"])
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(host["MaskedPaths"])
    limits = {u["Name"]: (u["Soft"], u["Hard"]) for u in host["Ulimits"]}
    assert limits["core"] == (1, 1)
    assert config["OpenStdin"] is True
    assert config["StdinOnce"] is True  # the dead-man switch: its input ends with our line
    secrets = [e for e in config["Env"] if e.partition("=")[0] in os.environ]
    assert {e.partition("=")[0] for e in secrets} <= {"PATH", "HOME", "LANG", "TMPDIR", *os.environ}
    assert not [e for e in config["Env"] if "KEY" in e or "TOKEN" in e]


def test_a_program_has_no_capability_and_a_uid_of_its_own():
    code = """
import os
status = dict(l.split(':\\t') for l in open('/proc/self/status').read().splitlines() if ':\\t' in l)
print(status['CapEff'], status['CapPrm'], status['CapAmb'], status['NoNewPrivs'], status['Seccomp'])
print(os.getuid(), os.getgroups())
"""

    async def go():
        async with open_sandbox("docker", slots=1) as pool:
            reports = [await pool.run(Program(code), CASE) for _ in range(2)]
            return [r.cases[0].raw.text.split("\n") for r in reports]

    first, second = run_sync(go())
    assert first[0] == "0" * 16 + " " + "0" * 16 + " " + "0" * 16 + " 1 2"
    assert first[1] != second[1]
    assert first[1].endswith("[]")


def test_processes_that_take_too_much_memory_together_are_the_programs_fault():
    code = """
import os, time
for _ in range(12):
    if os.fork() == 0:
        x = bytearray(os.urandom(1)) * (150 << 20)
        time.sleep(30)
        os._exit(0)
for _ in range(12):
    os.wait()
print('ok')
"""

    async def go():
        async with open_sandbox("docker", slots=1, memory_mb=512) as pool:
            limits = Limits(cpu_s=4, wall_s=12, memory_mb=400)
            report = await pool.run(Program(code), CASE, limits=limits)
            assert report.verdict is Verdict.MEMORY_LIMIT
            assert (await pool.run(OK, CASE)).verdict is Verdict.ACCEPTED
            assert pool.stats().replaced == 0  # the runner has survived

    run_sync(go())


# --- when things fail -----------------------------------------------------------------------


def test_a_container_that_is_killed_costs_a_retry_not_a_verdict(client):
    async def go():
        async with open_sandbox("docker", slots=1) as pool:
            limits = Limits(cpu_s=30, wall_s=60)
            code = "import time\nt = time.time()\nwhile time.time() < t + 1: pass\nprint('ok')"
            task = asyncio.ensure_future(pool.run(Program(code), CASE, limits=limits))
            while pool._turns.free:
                await asyncio.sleep(0)
            client.kill((await container_of(pool, client))["Id"])
            report = await task
            assert report.verdict is Verdict.ACCEPTED
            assert (pool.stats().retries, pool.stats().replaced) == (1, 1)

    run_sync(go())
    assert eventually(lambda: not ours(client), 10)


def test_nothing_outlives_an_owner_that_is_killed(client):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, "docker", "{}"])

    def busy():
        found = [c for c in ours(client, owner.pid) if c["State"] == "running"]
        return len(found) == 2 and all(len(client.top(c["Id"])["Processes"]) >= 5 for c in found)

    assert eventually(busy, 60)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert eventually(lambda: not ours(client, owner.pid), 10)


def test_a_child_of_the_owner_keeps_no_container_alive(client):
    """It has a copy of all that was open, unless it closes it."""
    command = [sys.executable, "-c", OWNER, "docker", "{}", "with a child"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as owner:
        try:
            child = int(owner.stdout.readline())
            born = start_time(child)
            running = lambda: [c for c in ours(client, owner.pid) if c["State"] == "running"]  # noqa: E731
            assert eventually(lambda: len(running()) == 2, 30)
        finally:
            owner.kill()
        owner.wait()
        assert eventually(lambda: not ours(client, owner.pid), 10)
        assert start_time(child) == born  # it lives on, and waits for our word


def test_a_fork_while_a_container_is_attached_costs_a_retry(client, monkeypatch):
    attach, forked = _Container.attach, []

    def forks(self):
        attach(self)
        if not forked:
            forked.append(os.fork())
            if forked == [0]:
                os._exit(0)
            os.waitpid(forked[0], 0)

    monkeypatch.setattr(_Container, "attach", forks)

    async def go():
        with pytest.raises(InfraError, match="forked meanwhile") as caught:
            await DockerSandbox().start()
        assert caught.value.retryable
        async with open_sandbox("docker", slots=1) as pool:
            assert (await pool.run(OK, CASE)).verdict is Verdict.ACCEPTED

    run_sync(go())
    assert eventually(lambda: not ours(client), 10)


@pytest.mark.parametrize("why", [InfraError("it is full", kind="full"), SystemExit(3)])
def test_a_failed_start_says_why_also_where_its_container_cannot_be_removed(
    why, client, monkeypatch
):
    remove = _Container.remove

    def attach(self):
        raise why

    def unremoved(self):
        remove(self)
        raise InfraError("the daemon is away", kind="sandbox_remove")

    monkeypatch.setattr(_Container, "attach", attach)
    monkeypatch.setattr(_Container, "remove", unremoved)
    with pytest.raises(type(why)) as caught:
        DockerSandbox()._start_container(_Container())
    assert caught.value is why
    assert not ours(client)


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_start_that_is_cut_off_has_been_undone_when_the_pool_has_closed(
    stage, client, monkeypatch
):
    """Before it connects, before there is a container, before that is started, and after."""
    check, reached, go_on, calls = _Container.check, threading.Event(), threading.Event(), []

    def held(self):
        calls.append(self)
        if calls.count(self) == stage:
            reached.set()
            go_on.wait(30)
        check(self)

    async def go():
        async with open_sandbox("docker", slots=2) as pool:
            monkeypatch.setattr(_Container, "check", held)
            runs = [asyncio.ensure_future(pool.run(OK, CASE)) for _ in range(2)]
            assert await asyncio.to_thread(reached.wait, 30)
            for run in runs:
                run.cancel()
            closing = asyncio.ensure_future(pool.aclose())
            await asyncio.gather(*runs, return_exceptions=True)
            assert not closing.done()
            go_on.set()
            await closing
            return [c for c in ours(client) if c["State"] == "running"]

    assert run_sync(go()) == []
    assert eventually(lambda: not ours(client), 10)


def test_a_missing_image_says_how_to_get_it():
    with pytest.raises(InfraError, match="rlrf sandbox import --from-host"):
        run_sync(SandboxPool(lambda: DockerSandbox(image="no-such-image:1"), 1).start())


def test_a_program_with_as_many_processes_as_it_may_have_is_still_ended():
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"

    async def go():
        async with open_sandbox("docker", slots=1) as pool:
            limits = Limits(cpu_s=1, wall_s=4, memory_mb=64, processes=80)
            report = await pool.run(Program(code), CASE, limits=limits)
            assert report.verdict in (Verdict.TIME_LIMIT, Verdict.MEMORY_LIMIT)
            assert (await pool.run(OK, CASE)).verdict is Verdict.ACCEPTED
            assert pool.stats().replaced == 0

    run_sync(go())


def test_the_runtime_is_passed_through():
    assert DockerSandbox(runtime="runsc").hardening()["runtime"] == "runsc"
    assert "gVisor" in DockerSandbox(runtime="runsc").info.guarantee


def test_no_more_than_four_calls_wait_on_the_daemon_at_once():
    lock, pause = threading.Lock(), threading.Event()
    now = most = 0

    def call():
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        pause.wait(0.01)
        with lock:
            now -= 1

    async def go():
        await asyncio.gather(*(daemon.limited(call) for _ in range(20)))

    run_sync(go())
    assert most == 4


def test_more_memory_than_the_container_has_is_refused():
    async def go():
        async with open_sandbox("docker", slots=1, memory_mb=256) as pool:
            with pytest.raises(UsageError, match="open the sandbox with memory_mb=512"):
                await pool.run(OK, CASE, limits=Limits(memory_mb=512))
            with pytest.raises(UsageError, match=r"Limits\.processes is 1000; .* at most 80"):
                await pool.run(OK, CASE, limits=Limits(memory_mb=64, processes=1000))
            report = await pool.run(OK, CASE, limits=Limits(memory_mb=256))
            assert report.verdict is Verdict.ACCEPTED

    run_sync(go())


def test_a_full_folder_is_the_programs_error_and_is_emptied():
    code = """
import os
for i in range({n}):
    with open(str(i), 'wb') as file:
        file.write(b'x' * {size})
print('ok')
"""

    async def go():
        options = {"tmp_mb": 4, "inodes": 64, "memory_mb": 512}
        async with open_sandbox("docker", slots=1, **options) as pool:
            for n, size in ((3, 1 << 21), (100, 1)):
                full = await pool.run(Program(code.format(n=n, size=size)), CASE)
                assert full.verdict is Verdict.RUNTIME_ERROR
                assert full.cases[0].raw.error.type == "OSError"
                fits = await pool.run(Program(code.format(n=1, size=1 << 21)), CASE)
                assert fits.verdict is Verdict.ACCEPTED
            assert pool.stats().replaced == 0

    run_sync(go())


@pytest.mark.slow
def test_numpy_runs_where_the_image_has_it(client):
    images.import_from_host(client, packages=("numpy",))
    code = "import numpy as np\nprint(int((np.eye(300) @ np.arange(300)).sum()))"

    async def go():
        async with open_sandbox("docker", slots=1) as pool:
            report = await pool.run(Program(code), [StdinCase("", "44850")])
            assert report.verdict is Verdict.ACCEPTED, report.cases[0].raw

    run_sync(go())


# --- a daemon that stops --------------------------------------------------------------------


class Daemon:
    """A docker daemon of our own, to be stopped at will."""

    def __init__(self, folder):
        self.folder, self.host = folder, f"unix://{folder}/docker.sock"
        self.process = None

    def start(self):
        self.log = open(self.folder / "log", "ab")  # noqa: SIM115  # closed by stop()
        self.process = subprocess.Popen(
            [
                "dockerd",
                *("--host", self.host, "--data-root", str(self.folder / "data")),
                *("--exec-root", str(self.folder / "exec"), "--bridge", "none"),
                *("--pidfile", str(self.folder / "pid"), "--iptables=false", "--ip6tables=false"),
            ],
            stdout=self.log,
            stderr=self.log,
        )
        assert eventually(self.answers, 60), (self.folder / "log").read_text()[-2000:]

    def answers(self):
        with contextlib.suppress(InfraError):
            daemon.connect(self.host, timeout=2).close()
            return True
        return False

    def stop(self):
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.fixture
def own_daemon():
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("a second docker daemon needs root and dockerd")
    # Not pytest's folder: with it containerd's socket has more than the 107 characters it may have.
    with tempfile.TemporaryDirectory(prefix="rlrf", ignore_cleanup_errors=True) as folder:
        made = Daemon(Path(folder))
        try:
            made.start()
            yield made
        finally:
            if made.process.poll() is None:
                made.stop()


@pytest.mark.slow
def test_a_daemon_that_stops_and_comes_back(own_daemon):
    client = daemon.connect(own_daemon.host)
    images.import_from_host(client)
    client.close()

    async def go():
        async with open_sandbox("docker", slots=2, docker_host=own_daemon.host) as pool:
            pool._cooldown_s = 0.0
            assert (await pool.run(OK, CASE)).verdict is Verdict.ACCEPTED
            limits = Limits(cpu_s=1000, wall_s=1000)
            runs = [
                asyncio.ensure_future(pool.run(Program("while True: pass"), CASE, limits=limits))
                for _ in range(2)
            ]
            while pool._turns.free:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(own_daemon.stop)
            outcomes = await asyncio.gather(*runs, return_exceptions=True)
            assert all(isinstance(o, InfraError) for o in outcomes)  # unscored, never a verdict
            with pytest.raises(InfraError, match="docker daemon"):
                await pool.run(OK, CASE)
            await asyncio.to_thread(own_daemon.start)
            reports = await asyncio.gather(*(pool.run(OK, CASE) for _ in range(8)))
            assert {r.verdict for r in reports} == {Verdict.ACCEPTED}
        left = daemon.connect(own_daemon.host)
        assert eventually(lambda: not ours(left), 10)
        left.close()

    run_sync(go())
