"""CPU per program: rlrf's sandboxes beside what people use instead.

The same programs and tests for every system, in rounds: all systems once, then all again, so that
what else the machine does hits all. Every system lives in a process of its own and starts before
the clock does; a run with one wrong verdict is an error, not a figure. What each system is:

    rlrf-docker, rlrf-bubblewrap, rlrf-process   rlrf's backends, as many slots as programs at once
    docker-run     a container per program; the Docker SDK, no CLI; one fork per test inside
    docker-exec    one exec per program in a warm container; the Docker SDK; one fork per test
    llm-sandbox    its container pool, a session per program; one fork per test inside
    python         `python3 -I` per test: no sandbox at all
    livecodebench  its own harness in the ProcessPoolExecutor that its codegen_metrics uses, kept
                   warm: no sandbox either

    python benchmarks/sandbox.py --quick          all that is installed, under a minute
    python benchmarks/sandbox.py                  everything at 1, 2, 4 and 8 programs at once
    python benchmarks/sandbox.py --profile        where the CPU time of rlrf's own backends goes

CPU time is everything that a program costs: the client with all its children, the Docker daemon,
containerd, shims and runc, and the containers. It is read from cgroups, which also count what has
already ended. For that, as root, the client and the daemons (if they share their cgroup with
others) are put into cgroups that only account. Without that right the daemons' own times are read
from /proc, which misses runc and shims that ended: the docker figures of the others, above all,
are then too low, and "accounting" in the result says "proc".

Interpreters differ by more than some of these systems do (a shared library or none, how it was
built). So everything on the host, rlrf's client too, runs on the system's Python, which is the one
that bubblewrap and an image made by `rlrf sandbox import --from-host` hold; --python takes another.

The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import importlib
import json
import os
import platform
import random
import statistics
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

GROUP = "rlrf-benchmark"
LABEL = "org.rlrf.benchmark"
DAEMONS = ("dockerd", "containerd", "containerd-shim")
TICK = 1 / os.sysconf("SC_CLK_TCK")
CONTAINER_LIFE_S = 3600
"""A container of ours ends by itself, should this benchmark be killed."""


# --- programs ---------------------------------------------------------------------------------

TRIVIAL = "print(sum(map(int, input().split())))\n"

TYPICAL = """\
import heapq
from collections import Counter

n = int(input())
numbers = list(map(int, input().split()))

counts = Counter(numbers)
heap = [(-count, value) for value, count in counts.items()]
heapq.heapify(heap)
often = [heapq.heappop(heap)[1] for _ in range(len(heap))]

take = skip = 0
for x in numbers:
    take, skip = skip + x, max(skip, take)

ends = [0] * 201
for i, x in enumerate(numbers):
    ends[x % 201] = max(ends[x % 201], ends[(x + 1) % 201]) + 1

window, costs = 12, [0]
for i, x in enumerate(numbers):
    costs.append(x + min(costs[max(0, i - window) :]))

print(sum(often[:100]), costs[-1], max(take, skip), max(ends))
"""


@dataclass(frozen=True)
class Task:
    """A program with its tests."""

    code: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def tasks() -> dict[str, Task]:
    """The measured programs, and wrong ones that every system must reject."""
    rng = random.Random(0)
    lists = [[rng.randrange(1000) for _ in range(2000)] for _ in range(10)]
    typical = tuple(f"{len(a)}\n{' '.join(map(str, a))}\n" for a in lists)
    found = {
        name: Task(code, inputs, tuple(_expected(code, i) for i in inputs))
        for name, code, inputs in (
            ("trivial", TRIVIAL, ("2 3\n",)),
            ("typical10", TYPICAL, typical),
        )
    }
    wrong = {
        f"{name}-wrong": Task(task.code.replace("print(", "print(1 + "), task.inputs, task.outputs)
        for name, task in found.items()
    }
    return found | wrong


def _expected(code: str, stdin: str) -> str:
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


# --- systems: what runs in a worker -----------------------------------------------------------


class Unavailable(Exception):
    """A system that cannot run here; the message says why, and how to get it."""


# In containers of the others: one fork per test, the cheapest form that keeps tests apart.
FORKS = """
import json, os, sys
def outputs(code, inputs):
    code = compile(code, "program.py", "exec")
    for text in inputs:
        given = os.memfd_create("stdin")
        os.write(given, text.encode())
        os.lseek(given, 0, 0)
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(given, 0)
            os.dup2(theirs, 1)
            sys.stdin, sys.stdout = open(0), open(1, "w")
            try:
                exec(code, {"__name__": "__main__"})
                sys.stdout.flush()
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(given)
        os.close(theirs)
        with open(ours, "rb") as pipe:
            said = pipe.read()
        status = os.waitpid(child, 0)[1]
        yield None if status else said.decode()
"""
FORKS_FROM_STDIN = (
    FORKS
    + """
size = int.from_bytes(sys.stdin.buffer.read(4), "big")
job = json.loads(sys.stdin.buffer.read(size))
print(json.dumps(list(outputs(*job))))
"""
)


class System:
    """One way to run programs; `start` before the clock, `judge` on it."""

    slow = 1
    """By how much fewer programs it gets, as a whole batch of them would take too long."""

    def __init__(self, slots: int, image: str) -> None:
        self.slots, self.image = slots, image

    def start(self) -> None:
        """Get ready; raises `Unavailable`."""

    def judge(self, task: Task) -> bool:
        """Whether a program passes all its tests."""
        raise NotImplementedError

    def judge_all(self, task: Task, programs: int) -> list[bool]:
        """Judge a program many times, at most `slots` at once."""
        return list(self.threads.map(self.judge, [task] * programs))

    @functools.cached_property
    def threads(self) -> ThreadPoolExecutor:
        """As many as programs at once."""
        return ThreadPoolExecutor(self.slots)

    def close(self) -> None:
        """End everything that was started."""


def same(outputs: list[str | None], task: Task) -> bool:
    """Whether the outputs are those expected, white space at the end aside."""
    return len(outputs) == len(task.outputs) and all(
        got is not None and got.rstrip() == wanted.rstrip()
        for got, wanted in zip(outputs, task.outputs, strict=True)
    )


class Rlrf(System):
    """rlrf's pool on one of its backends."""

    backend = ""
    options: ClassVar[dict[str, Any]] = {}

    def start(self) -> None:
        """See `System`."""
        from rlrf import sandbox
        from rlrf.errors import RlrfError

        self.api = sandbox
        self.runner = asyncio.Runner()
        try:
            self.pool = self.runner.run(
                sandbox.start_sandbox(self.backend, slots=self.slots, **self.options)
            )
        except (RlrfError, ImportError) as why:
            raise Unavailable(str(why)) from why

    def judge_all(self, task: Task, programs: int) -> list[bool]:
        """See `System`."""
        program = self.api.Program(task.code)
        cases = [self.api.StdinCase(i, o) for i, o in zip(task.inputs, task.outputs, strict=True)]
        left = iter(range(programs))

        async def client() -> list[bool]:
            return [
                (await self.pool.run(program, cases)).verdict is self.api.Verdict.ACCEPTED
                for _ in left
            ]

        async def all_clients() -> list[list[bool]]:
            return await asyncio.gather(*(client() for _ in range(self.slots)))

        return [v for verdicts in self.runner.run(all_clients()) for v in verdicts]

    def close(self) -> None:
        """See `System`."""
        self.runner.run(self.pool.aclose())
        self.runner.close()


class RlrfDocker(Rlrf):
    """rlrf in containers."""

    backend = "docker"

    def start(self) -> None:
        """See `System`."""
        if self.image:
            self.options = {"image": self.image}  # type: ignore[misc]
        super().start()


class RlrfBubblewrap(Rlrf):
    """rlrf in namespaces."""

    backend = "bubblewrap"


class RlrfProcess(Rlrf):
    """rlrf in plain processes."""

    backend = "process"
    options: ClassVar = {"allow_unsafe": True}


class Docker(System):
    """What those on the Docker SDK share."""

    hardening: ClassVar[dict[str, Any]] = {
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "pids_limit": 64,
        "mem_limit": "1g",
    }

    def start(self) -> None:
        """See `System`."""
        import docker

        try:
            self.client = docker.from_env(timeout=60)
            self.client.images.get(self.image)
        except docker.errors.DockerException as why:
            raise Unavailable(f"needs dockerd and the image {self.image!r}: {why}") from why

    @functools.cached_property
    def parent(self) -> str:
        """The cgroup of our containers, as this daemon wants it written."""
        systemd = self.client.info().get("CgroupDriver") == "systemd"
        return f"{GROUP}.slice" if systemd else f"/{GROUP}"

    def create(self, command: list[str], **options: Any) -> str:
        """A container, not yet started."""
        host = self.client.api.create_host_config(
            auto_remove=True,
            cgroup_parent=self.parent,
            log_config={"Type": "none"},
            **self.hardening,
        )
        made = self.client.api.create_container(
            self.image,
            entrypoint=command,
            command=[],
            labels={LABEL: str(os.getpid())},
            host_config=host,
            **options,
        )
        return str(made["Id"])

    @staticmethod
    def talk(stream: Any, task: Task) -> bool:
        """Send a job over a hijacked connection, and judge what comes back."""
        from docker.utils.socket import (
            consume_socket_output,
            frames_iter,
        )

        job = json.dumps([task.code, task.inputs]).encode()
        with contextlib.closing(stream):
            stream._sock.sendall(struct.pack(">I", len(job)) + job)
            frames = frames_iter(stream, tty=False)
            said, _ = consume_socket_output(((d, None) for n, d in frames if n == 1), demux=True)
        return said is not None and same(json.loads(said), task)


class DockerRun(Docker):
    """A container per program."""

    slow = 6
    command: ClassVar = ["python3", "-I", "-S", "-B", "-c", FORKS_FROM_STDIN]

    def judge(self, task: Task) -> bool:
        """See `System`."""
        api = self.client.api
        container = self.create(self.command, stdin_open=True, detach=False)
        stream = api.attach_socket(container, {"stdin": 1, "stdout": 1, "stream": 1})
        api.start(container)
        return self.talk(stream, task)


class DockerExec(Docker):
    """An exec per program, in a container that sleeps."""

    slow = 2

    def start(self) -> None:
        """See `System`."""
        super().start()
        sleeper = ["python3", "-I", "-c", f"import time; time.sleep({CONTAINER_LIFE_S})"]
        self.containers = [self.create(sleeper) for _ in range(self.slots)]
        for container in self.containers:
            self.client.api.start(container)
        self.free = list(self.containers)

    def judge(self, task: Task) -> bool:
        """See `System`."""
        container = self.free.pop()  # as many as threads
        try:
            api = self.client.api
            made = api.exec_create(container, DockerRun.command, stdin=True, stderr=False)
            return self.talk(api.exec_start(made["Id"], socket=True), task)
        finally:
            self.free.append(container)

    def close(self) -> None:
        """See `System`."""
        for container in self.containers:
            self.client.api.remove_container(container, force=True)


class LlmSandbox(Docker):
    """llm-sandbox's pool of containers."""

    slow = 3
    python = "/sandbox/.sandbox-venv/bin/python"
    # Its pool runs programs with the Python of a virtual environment, which it would make with
    # pip from the network; the image's own Python takes that place.
    prepare = f"""
import os, sys, time
os.makedirs({os.path.dirname(python)!r}, exist_ok=True)
os.symlink(sys.executable, {python!r})
time.sleep({CONTAINER_LIFE_S})
"""

    def start(self) -> None:
        """See `System`."""
        super().start()
        try:
            self.api = importlib.import_module("llm_sandbox.pool")
        except ImportError as why:
            raise Unavailable("not installed: pip install 'llm-sandbox[docker]'") from why
        limits = {k: self.hardening[k] for k in ("network_mode", "pids_limit", "mem_limit")}
        self.pool = self.api.create_pool_manager(
            client=self.client,
            config=self.api.PoolConfig(
                max_pool_size=self.slots, enable_prewarming=False, health_check_interval=1e6
            ),
            image=self.image,
            skip_environment_setup=True,
            runtime_configs={
                **limits,
                "user": None,  # the image may have no passwd file to find "root" in
                "entrypoint": ["python3", "-c", self.prepare],
                "labels": {LABEL: str(os.getpid())},
                "cgroup_parent": self.parent,
                "auto_remove": True,
                "stop_signal": "SIGKILL",
            },
        )
        with contextlib.ExitStack() as stack:
            for _ in range(self.slots):
                session = self.api.PooledSandboxSession(pool_manager=self.pool)
                stack.enter_context(session)
                deadline = time.monotonic() + 30
                while session.run("pass").exit_code:  # until `prepare` is done
                    if time.monotonic() > deadline:
                        raise RuntimeError("llm-sandbox: the container does not get ready")

    def judge(self, task: Task) -> bool:
        """See `System`."""
        job = json.dumps([task.code, task.inputs])
        code = f"{FORKS}\nprint(json.dumps(list(outputs(*json.loads({job!r})))))\n"
        for _ in range(3):
            with self.api.PooledSandboxSession(pool_manager=self.pool) as session:
                result = session.run(code)
            if result.exit_code:
                raise RuntimeError(f"llm-sandbox: exit code {result.exit_code}: {result.stderr}")
            if result.stdout:
                return same(json.loads(result.stdout), task)
            # Seen with several at once: success with no output. A user would ask again, too.
            print("llm-sandbox: a run's output was lost; once more", file=sys.stderr)
        return False

    def close(self) -> None:
        """See `System`."""
        listed = self.client.api.containers(all=True, filters={"label": f"{LABEL}={os.getpid()}"})
        self.pool._shutdown_event.set()
        for container in listed:  # its own way stops them one after another
            self.client.api.remove_container(container["Id"], force=True)


class Python(System):
    """A Python per test."""

    slow = 2

    def judge(self, task: Task) -> bool:
        """See `System`."""
        command = [sys.executable, "-I", "-c", task.code]
        outputs: list[str | None] = []
        for text in task.inputs:
            ended = subprocess.run(
                command, input=text, capture_output=True, text=True, check=False, timeout=60
            )
            outputs.append(None if ended.returncode else ended.stdout)
        return same(outputs, task)


class LiveCodeBench(System):
    """LiveCodeBench's harness."""

    slow = 2

    def start(self) -> None:
        """See `System`."""
        name = "livecodebench.evaluation.compute_code_generation_metrics"
        try:
            self.run = importlib.import_module(name).evaluate_generations_by_problem
        except ImportError as why:
            how = "pip install --no-deps nvidia-livecodebench, and numpy and tqdm"
            raise Unavailable(f"not installed ({why}): {how}") from why
        self.processes = ProcessPoolExecutor(self.slots)

    def judge_all(self, task: Task, programs: int) -> list[bool]:
        """See `System`."""
        tests = json.dumps({"inputs": task.inputs, "outputs": task.outputs, "fn_name": None})
        job = ([task.code], {"input_output": tests}, False, 6)
        done = self.processes.map(self.run, [job] * programs)
        return [all(r is True for r in results[0]) for results, _ in done]

    def close(self) -> None:
        """See `System`."""
        self.processes.shutdown()


SYSTEMS: dict[str, type[System]] = {
    "rlrf-docker": RlrfDocker,
    "rlrf-bubblewrap": RlrfBubblewrap,
    "rlrf-process": RlrfProcess,
    "docker-run": DockerRun,
    "docker-exec": DockerExec,
    "llm-sandbox": LlmSandbox,
    "python": Python,
    "livecodebench": LiveCodeBench,
}


def work(name: str, slots: int, image: str) -> int:
    """A worker: one system, told over standard input what to run, until that ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the systems print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    system = SYSTEMS[name](slots, image)
    try:
        system.start()
    except Unavailable as why:
        answer(unavailable=str(why))
        return 0
    try:
        answer(ready=True)
        known = tasks()
        for line in sys.stdin:
            order = json.loads(line)
            start = time.perf_counter()
            verdicts = system.judge_all(known[order["task"]], order["programs"])
            answer(wall_s=time.perf_counter() - start, accepted=sum(verdicts), of=len(verdicts))
    finally:
        system.close()
    return 0


# --- CPU time ---------------------------------------------------------------------------------


def hierarchy() -> Path | None:
    """Where cgroups account CPU time: cgroup v1's cpuacct, else v2."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for _, where, kind, options, *_ in mounts:
        if kind == "cgroup" and "cpuacct" in options.split(","):
            return Path(where)
    return next((Path(m[1]) for m in mounts if m[2] == "cgroup2"), None)


def usage(group: Path) -> float:
    """CPU seconds of a cgroup, with all that ended in it."""
    try:
        return int((group / "cpuacct.usage").read_text()) / 1e9
    except FileNotFoundError:
        stat = (group / "cpu.stat").read_text().split()
        return int(stat[stat.index("usage_usec") + 1]) / 1e6


def group_of(pid: int, root: Path) -> Path:
    """The cgroup of a process in a hierarchy."""
    v1 = (root / "cpuacct.usage").exists()
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("cpuacct" in controllers.split(",")) if v1 else not controllers:
            return root / path.lstrip("/")
    raise LookupError(f"process {pid} is in no cgroup of {root}")


@dataclass(frozen=True)
class Process:
    """A line of /proc."""

    pid: int
    parent: int
    name: str
    own_s: float
    reaped_s: float


def processes() -> dict[int, Process]:
    """All processes that can be seen."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
                name, rest = stat[stat.index("(") + 1 :].rsplit(")", 1)
                f = rest.split()
                own, reaped = int(f[11]) + int(f[12]), int(f[13]) + int(f[14])
                pid = int(entry)
                found[pid] = Process(pid, int(f[1]), name, own * TICK, reaped * TICK)
    return found


def tree(pid: int, known: dict[int, Process]) -> list[Process]:
    """A process and all under it, parents first."""
    children = [p for c in known.values() if c.parent == pid for p in tree(c.pid, known)]
    return [known[pid], *children] if pid in known else []


class Meter:
    """Reads the CPU time of a worker, of the docker daemons and of the worker's containers."""

    def __init__(self, *, move: bool) -> None:
        self.root = hierarchy()
        self.moved: dict[int, Path] = {}
        self.client_group = self._make("client") if move else None
        self.daemon_groups = self._daemon_groups(move)
        self.docker = self._docker()

    @property
    def accounting(self) -> str:
        """How the client's and the daemons' time is read."""
        client, daemon = bool(self.client_group), bool(self.daemon_groups)
        return "cgroup" if client and daemon else "proc" if not daemon else "cgroup, client: proc"

    @staticmethod
    def _docker() -> Any:
        with contextlib.suppress(Exception):
            client = importlib.import_module("docker").from_env(timeout=60)
            client.ping()
            return client
        return None

    def _make(self, name: str) -> Path | None:
        if self.root is None:
            return None
        group = self.root / f"{GROUP}-{name}"
        try:
            group.mkdir(exist_ok=True)
        except OSError:
            return None
        return group

    @staticmethod
    def _daemons() -> list[Process]:
        return [p for p in processes().values() if p.name.startswith(DAEMONS)]

    def _daemon_groups(self, move: bool) -> list[Path]:
        """The cgroups that hold the daemons, their shims and runc, and nothing else."""
        daemons = self._daemons()
        if self.root is None or not daemons:
            return []
        root = self.root
        groups = {group_of(p.pid, root) for p in daemons}
        if root not in groups and group_of(os.getpid(), root) not in groups:
            return sorted(groups)  # services of their own
        # Moving must not change how the daemons are scheduled: only where accounting is alone.
        alone = (root / "cpuacct.usage").exists() and not (root / "cpu.shares").exists()
        group = self._make("daemon") if move and alone else None
        if group is None:
            return []
        for p in daemons:
            with contextlib.suppress(OSError):
                self.moved[p.pid] = group_of(p.pid, root)
                (group / "cgroup.procs").write_text(str(p.pid))
        return [group]

    def adopt(self, pid: int) -> None:
        """Account for a worker, before it starts anything."""
        if self.client_group is not None:
            (self.client_group / "cgroup.procs").write_text(str(pid))

    def containers(self, pid: int) -> dict[str, Path]:
        """The cgroups of a worker's containers; ended ones are in the group all others are in."""
        if self.docker is None or self.root is None:
            return {}
        found = {}
        listed = self.docker.api.containers(filters={"label": f"org.rlrf.owner_pid={pid}"})
        for container in listed:
            state = self.docker.api.inspect_container(container["Id"])["State"]
            found[container["Id"]] = group_of(state["Pid"], self.root)
        shared = (self.root / GROUP, self.root / f"{GROUP}.slice")
        return found | {group.name: group for group in shared if group.exists()}

    def read(self, pid: int, containers: dict[str, Path]) -> dict[str, float]:
        """CPU seconds up to now."""
        known = processes() if not (self.client_group and self.daemon_groups) else {}
        if self.client_group is not None:
            client = usage(self.client_group)
        else:
            client = sum(p.own_s + p.reaped_s for p in tree(pid, known))
        if self.daemon_groups:
            daemon = sum(map(usage, self.daemon_groups))
        else:
            daemon = sum(p.own_s for p in known.values() if p.name.startswith(DAEMONS))
        return {
            "client": client,
            "daemon": daemon,
            "containers": sum(map(usage, containers.values())),
        }

    def close(self) -> None:
        """Put all back where it was."""
        for group in self.daemon_groups if self.moved else []:
            home = next(iter(self.moved.values()))  # also of shims that started meanwhile
            for pid in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):  # ended meanwhile
                    (self.moved.get(int(pid), home) / "cgroup.procs").write_text(pid)
        for pattern in (GROUP, f"{GROUP}-*"):
            for base in ("", "*/"):
                for group in Path("/sys/fs/cgroup").glob(base + pattern):
                    with contextlib.suppress(OSError):
                        group.rmdir()


# --- measuring --------------------------------------------------------------------------------


class Void(Exception):
    """A batch whose CPU time cannot be told."""


class Failed(Exception):
    """A system that judged wrongly or died: none of its figures count."""


@dataclass
class Worker:
    """The host's end of a worker."""

    name: str
    slots: int
    process: subprocess.Popen[str]
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, slots: int, args: argparse.Namespace, meter: Meter) -> Worker:
        """Start a system and wait until it is ready; raises `Unavailable`."""
        command = [args.python, __file__, "--worker", name, "--slots", str(slots)]
        process = subprocess.Popen(
            [*command, "--image", args.image],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_packages())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        meter.adopt(process.pid)
        worker = cls(name, slots, process)
        said = worker.hear()
        if "unavailable" in said:
            process.wait()
            raise Unavailable(said["unavailable"])
        return worker

    def hear(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"died with exit code {self.process.wait()}; see its traceback")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def order(self, task: str, programs: int) -> dict[str, Any]:
        """Have a batch run; raises `Failed` unless every verdict is right."""
        if self.process.stdin is None or self.process.poll() is not None:
            raise Failed("died")
        print(json.dumps({"task": task, "programs": programs}), file=self.process.stdin, flush=True)
        answer = self.hear()
        right = 0 if task.endswith("-wrong") else programs
        if answer["accepted"] != right or answer["of"] != programs:
            raise Failed(f"accepted {answer['accepted']} of {programs} x {task}")
        return answer

    def measure(self, task: str, programs: int, meter: Meter) -> dict[str, float]:
        """CPU milliseconds per program and programs per second of one batch."""
        containers = meter.containers(self.process.pid)
        before = meter.read(self.process.pid, containers)
        answer = self.order(task, programs)
        try:
            after = meter.read(self.process.pid, containers)
        except FileNotFoundError as why:
            raise Void("a container was replaced meanwhile") from why
        parts = {k: 1000 * (after[k] - before[k]) / programs for k in before}
        return {
            "cpu_ms": sum(parts.values()),
            **{f"{k}_ms": v for k, v in parts.items()},
            "wall_ms": 1000 * answer["wall_s"] / programs,
            "per_s": programs / answer["wall_s"],
        }

    def end(self) -> None:
        """Have it end."""
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def batch(name: str, programs: int, slots: int) -> int:
    """How many programs a system gets: enough for all slots to be busy, twice."""
    return max(2 * slots, programs // SYSTEMS[name].slow)


@dataclass
class Lost:
    """Systems without figures, and why; batches without."""

    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    void: list[str] = field(default_factory=list)

    def skip(self, name: str, why: Exception) -> None:
        """Leave a system out from now on."""
        known = self.failed if isinstance(why, Failed) else self.skipped
        known[name] = str(why)
        say(f"{name}: {'FAILED' if known is self.failed else 'skipped'}: {why}")


@contextlib.contextmanager
def workers(
    names: list[str], slots: int, args: argparse.Namespace, meter: Meter, lost: Lost
) -> Iterator[list[Worker]]:
    """Those systems that can run here, started, warm and proven to judge rightly."""
    started: list[Worker] = []
    try:
        for name in names:
            if name in lost.skipped or name in lost.failed:
                continue
            try:
                worker = Worker.start(name, slots, args, meter)
                started.append(worker)
                for task in tasks():
                    worker.order(task, slots)
            except (Unavailable, Failed) as why:
                lost.skip(name, why)
        yield [w for w in started if w.name not in lost.failed]
    finally:
        for worker in started:
            worker.end()


say: Callable[..., None] = functools.partial(print, flush=True)


def measure_all(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """All systems, programs and concurrencies: `cells[program][concurrency][system]`."""
    lost = Lost()
    cells: dict[str, dict[str, dict[str, Any]]] = {p: {} for p in args.tasks}
    for slots in args.concurrency:
        with workers(args.systems, slots, args, meter, lost) as running:
            for _ in range(args.repeats):
                for task in args.tasks:
                    for worker in running:
                        if worker.name not in lost.failed:
                            sample(
                                worker, task, batch(worker.name, args.programs, slots), meter, lost
                            )
            for task in args.tasks:
                row: dict[str, Any] = dict.fromkeys(args.systems)
                for w in running:
                    if w.name not in lost.failed and w.samples.get(task):
                        row[w.name] = summary(w.samples[task])
                cells[task][str(slots)] = row
                show(task, slots, row)
    return {"cells": cells, **vars(lost)}


def sample(worker: Worker, task: str, programs: int, meter: Meter, lost: Lost) -> None:
    """Measure one batch."""
    try:
        worker.samples.setdefault(task, []).append(worker.measure(task, programs, meter))
    except Void as why:
        lost.void.append(f"{worker.name}, {task}: {why}")
    except Failed as why:
        lost.skip(worker.name, why)


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    """Least and median of the rounds."""
    out = {}
    for key in ("cpu_ms", "client_ms", "daemon_ms", "containers_ms", "wall_ms", "per_s"):
        values = [s[key] for s in samples]
        best = max(values) if key == "per_s" else min(values)
        out[key], out[f"{key}_best"] = (round(statistics.median(values), 3), round(best, 3))
    return out


def show(task: str, slots: int, row: dict[str, Any]) -> None:
    """Print one block of the table."""
    say(f"\n{task}, {slots} at once")
    say(f"  {'CPU ms/program':>35} {'of which: median':>26} {'programs/s':>19}")
    names = ("min", "median", "client", "daemon", "container", "median", "best")
    say(f"  {'':16}" + "".join(f"{n:>10}" for n in names))
    for name, cell in row.items():
        if cell is None:
            say(f"  {name:16}{'-':>10}")
            continue
        keys = ("cpu_ms_best", "cpu_ms", "client_ms", "daemon_ms", "containers_ms")
        text = "".join(f"{cell[k]:10.2f}" for k in keys)
        say(f"  {name:16}{text}{cell['per_s']:10.1f}{cell['per_s_best']:10.1f}")


def ratio(cells: dict[str, Any], above: str, below: str) -> dict[str, dict[str, float | None]]:
    """Of median CPU times, per program and concurrency."""
    out: dict[str, dict[str, float | None]] = {}
    for task, rows in cells.items():
        out[task] = {}
        for slots, row in rows.items():
            a, b = row.get(above), row.get(below)
            out[task][slots] = round(a["cpu_ms"] / b["cpu_ms"], 2) if a and b else None
    return out


# --- where the time goes ----------------------------------------------------------------------


def role(process: Process, chain: list[Process]) -> str:
    """What a resident process of a slot is, from its place in the tree."""
    if process.name in ("bwrap", "docker-init", "tini"):
        return "launcher"
    above = [p for p in chain if p.name not in ("bwrap", "docker-init", "tini")]
    return ("supervisor", "zygote", "deeper")[min(len(above), 2)]


def residents(pid: int, containers: dict[str, Path]) -> dict[int, tuple[str, float]]:
    """Role and CPU seconds of each process that lives in a worker's slots."""
    known = processes()
    roots = [c.pid for c in known.values() if c.parent == pid]
    for name, group in containers.items():
        if not name.startswith(GROUP):
            inside = {int(p) for p in (group / "cgroup.procs").read_text().split()}
            roots += [p for p in inside if p in known and known[p].parent not in inside]
    found: dict[int, tuple[str, float]] = {}

    def walk(process: Process, chain: list[Process]) -> None:
        found[process.pid] = (role(process, chain), run_time(process))
        for child in known.values():
            if child.parent == process.pid:
                walk(child, [*chain, process])

    for root in roots:
        walk(known[root], [])
    return found


def run_time(process: Process) -> float:
    """CPU seconds of a process: to the nanosecond where the kernel tells, else to its tick."""
    try:
        tasks_ = Path(f"/proc/{process.pid}/task").iterdir()
        return sum(int((t / "schedstat").read_text().split()[0]) for t in tasks_) / 1e9
    except OSError:
        return process.own_s


def profile(args: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """CPU milliseconds per program by who spent them, one program at a time."""
    names = [n for n in args.systems if n in ("rlrf-docker", "rlrf-bubblewrap")]
    lost = Lost()
    out: dict[str, Any] = {task: dict.fromkeys(names) for task in args.tasks}
    with workers(names, 1, args, meter, lost) as running:
        for task in args.tasks:
            for worker in running:
                rounds = [
                    profile_batch(worker, task, args.programs, meter) for _ in range(args.repeats)
                ]
                parts = {
                    k: round(statistics.median(r.get(k, 0.0) for r in rounds), 3)
                    for k in dict.fromkeys(k for r in rounds for k in r)
                }
                out[task][worker.name] = parts
                say(f"\n{task}, {worker.name}: CPU ms per program, median of {args.repeats} rounds")
                for name, value in parts.items():
                    say(f"  {name:16}{value:10.3f}")
    return {"profile": out, **vars(lost)}


def profile_batch(worker: Worker, task: str, programs: int, meter: Meter) -> dict[str, float]:
    """One batch by role; what no resident process spent, leaders and tests did."""
    pid = worker.process.pid
    containers = meter.containers(pid)
    before, own, lived = meter.read(pid, containers), processes()[pid], residents(pid, containers)
    worker.order(task, programs)
    still, own_after = residents(pid, containers), processes()[pid]
    after = meter.read(pid, containers)
    parts = {
        "total": sum(after.values()) - sum(before.values()),
        "client": own_after.own_s - own.own_s,
        "daemon": after["daemon"] - before["daemon"],
    }
    for process, (name, spent) in still.items():
        if process in lived:
            parts[name] = parts.get(name, 0.0) + spent - lived[process][1]
    rest = parts["total"] - sum(v for k, v in parts.items() if k != "total")
    parts["leader and tests"] = rest
    return {k: 1000 * v / programs for k, v in parts.items()}


# --- command line -----------------------------------------------------------------------------


def default_python() -> str:
    """The system's Python, if what is installed for ours works on it; else ours."""
    system = "/usr/bin/python3"
    ask = [system, "-I", "-c", "import sys; print(*sys.version_info[:2])"]
    with contextlib.suppress(OSError):
        told = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
        if told.split() == [str(n) for n in sys.version_info[:2]]:
            return system
    return sys.executable


def python_of(path: str) -> str:
    """An interpreter and its version."""
    told = subprocess.run([path, "-V"], capture_output=True, text=True, check=True).stdout
    return f"{path}, {told.strip()}"


def _packages() -> list[str]:
    """Where what is installed for this Python lies; another one has a standard library itself."""
    standard = sysconfig.get_path("stdlib")
    own = (standard, os.path.join(standard, "lib-dynload"), os.path.dirname(__file__))
    return [p for p in sys.path if p and p not in own and not p.endswith(".zip")]


def default_image() -> str:
    """The image that rlrf's docker backend takes; empty where there is none."""
    with contextlib.suppress(Exception):
        return str(importlib.import_module("rlrf_sandboxes.images").tag())
    return ""


def versions(meter: Meter) -> dict[str, str | None]:
    """Of what was compared with; None where it is not installed."""
    found: dict[str, str | None] = {"docker": meter.docker and meter.docker.version()["Version"]}
    for name in ("rlrf", "llm-sandbox", "nvidia-livecodebench"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few programs, at most 2 at once")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument(
        "--tasks", nargs="+", choices=["trivial", "typical10"], default=["trivial", "typical10"]
    )
    parser.add_argument("--programs", type=int, help="per batch; slow systems get fewer")
    parser.add_argument("--repeats", type=int, help="rounds")
    parser.add_argument("--concurrency", nargs="+", type=int)
    parser.add_argument("--python", default="", help="of all that is on the host")
    parser.add_argument("--image", default="", help="default: that of rlrf's docker backend")
    parser.add_argument("--profile", action="store_true", help="rlrf's CPU time by process")
    parser.add_argument("--json", action="store_true", help="print the last line only")
    parser.add_argument("--no-move", action="store_true", help="leave all cgroups alone")
    parser.add_argument("--worker", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    parser.add_argument("--slots", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.programs = args.programs or (8 if args.quick else 48)
    args.repeats = args.repeats or (2 if args.quick else 5)
    args.concurrency = args.concurrency or ([1, 2] if args.quick else [1, 2, 4, 8])
    return args


def main() -> int:
    args = arguments()
    if args.worker:
        return work(args.worker, args.slots, args.image)
    global say
    if args.json:
        say = functools.partial(print, flush=True, file=sys.stderr)
    args.image = args.image or default_image()
    args.python = args.python or default_python()
    meter = Meter(move=not args.no_move)
    try:
        found = (profile if args.profile else measure_all)(args, meter)
    finally:
        meter.close()
    result = {
        "benchmark": "sandbox",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "python": python_of(args.python),
        "versions": versions(meter),
        "image": args.image,
        "accounting": meter.accounting,
        "programs": args.programs,
        "repeats": args.repeats,
        "load": os.getloadavg()[0],
        **found,
    }
    if not args.profile:
        cells = found["cells"]
        result["cpu_ratio_docker_exec"] = ratio(cells, "docker-exec", "rlrf-docker")
        result["cpu_ratio_lcb"] = {
            name.removeprefix("rlrf-"): ratio(cells, "livecodebench", name)
            for name in ("rlrf-docker", "rlrf-bubblewrap")
        }
        for name in ("cpu_ratio_docker_exec", "cpu_ratio_lcb"):
            say(f"{name}: {json.dumps(result[name])}")
    print(json.dumps(result))
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
