"""The program that runs programs, inside a sandbox. Standard library only, Python 3.8+.

Three kinds of process share this file:

- the **supervisor** talks with the host over its standard input and output (frames: 4 bytes of
  length, big-endian, then JSON), sets the deadlines and cleans up;
- the **zygote**, forked before anything of a program arrived, forks a clean **leader** for every
  program; it sees descriptors, never what is in them;
- the leader gives up its rights, compiles the program, and forks a child for every test (it runs
  the last one itself where nothing speaks against it).

Programs are kept apart in one of three ways, chosen by the host: ``uid`` (a fresh uid for each, in
a container whose root is the supervisor), ``ns`` (fresh pid, mount and ipc namespaces for each),
``plain`` (neither: for trusted programs).

A test reads and writes files in memory: standard input, output, error, and a ``channel`` on which
it finds its arguments and leaves its result. So nobody reads along while it runs, and nothing that
it leaves behind can hold up the end. What is on the channel may be forged by the program; all it
can forge is its own answer. What would be right is not in this sandbox.

It does not judge, and does not wall a program off alone: the container or the namespaces around it
do, and with ``plain`` there are none.

Why: design/verdicts.md.
"""

from __future__ import annotations

import array
import atexit
import builtins
import ctypes
import errno
import fcntl
import gc
import hashlib
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from typing import Any, Callable  # noqa: UP035  # 3.8 inside

PROTOCOL = 1
FILENAME = "solution.py"
RUN_DIR = "/sandbox/run"
MAX_FRAME = 64 << 20
IDLE_S = 600.0
FLUSH_S = 0.02  # results that come quicker than this travel together: waking the host is not free
UIDS = 20_000  # of one container, one per program and one for the supervisor's helpers
# What programs import most, loaded once for all; a program then finds it in memory.
PRELOAD = (
    "bisect collections copy datetime decimal fractions functools heapq io itertools linecache "
    "math operator random statistics string threading traceback typing"
).split()

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_loads = json.JSONDecoder().decode


# --- values ---------------------------------------------------------------------------------------


_BASES = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)


def encode(value: Any, depth: int = 0) -> Any:
    """A value as JSON that keeps the builtin types.

    An instance of a subclass (a namedtuple, a Counter, an int with an ``__eq__`` of its own) is
    taken for what the builtin base stores, whatever its methods say. Other types are refused.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -(1 << 53) < value < 1 << 53 else {"int": hex(value)}
    if depth > 200:
        raise TypeError("the value is nested too deeply to be compared")
    depth += 1
    if kind is float:
        return {"float": repr(value)}
    if kind is list:
        return {"list": [encode(v, depth) for v in value]}
    if kind is tuple:
        return {"tuple": [encode(v, depth) for v in value]}
    if kind is dict:
        return {"dict": [[encode(k, depth), encode(v, depth)] for k, v in value.items()]}
    if kind is set or kind is frozenset:
        items = [encode(v, depth) for v in value]
        items.sort(key=_dumps)
        return {kind.__name__: items}
    if kind is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if kind is bytes or kind is bytearray:
        return {kind.__name__: value.decode("latin-1")}
    for base in _BASES[1:]:
        if issubclass(kind, base):
            return encode(_base_value(base, value), depth)
    name = str(getattr(kind, "__name__", "?"))[:100]
    raise TypeError("a value of the type " + name + " cannot be compared")


def _base_value(base: Any, value: Any) -> Any:
    """What the builtin base of an instance stores; no method of its own class is asked."""
    if base is int:
        return int.__add__(value, 0)
    if base is float:
        return float.__pos__(value)
    if base is complex:
        return complex.__pos__(value)
    if base is str:
        return str.__getitem__(value, slice(None))
    if base is dict:
        return dict(dict.items(value))
    return base(base.__iter__(value))


def decode(value: Any) -> Any:
    """The value that :func:`encode` wrote.

    Raises:
        ValueError: it is not of that form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("not an encoded value")
    ((kind, inner),) = value.items()
    try:
        if kind == "int":
            return int(inner, 16)
        if kind == "float":
            return float(inner)
        if kind == "complex":
            return complex(float(inner[0]), float(inner[1]))
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray)(inner, "latin-1")
        if kind == "dict":
            return {decode(k): decode(v) for k, v in inner}
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return make([decode(v) for v in inner])
    except (TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError("not an encoded value") from error


# --- the kernel -----------------------------------------------------------------------------------

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x08000000, 0x20000000
_NEW_NAMESPACES = 0x7E020080

# The system calls that are refused to a program, by their numbers on x86_64 and aarch64, with the
# error it gets (0: it is told that all went well). Why, kernel object by kernel object, and what
# becomes of those that are not refused: design/isolation.md.
_REFUSED = (
    # SysV ipc and message queues; keyrings
    (errno.EPERM, "29-31 64-71 220 240-245", "180-197"),
    (errno.EPERM, "248-250", "217-219"),
    # namespaces, mounts, handles of files
    (errno.EPERM, "155 161 166 272 303 304 308", "39 41 51 97 264 265 268"),
    # tracing, bpf, perf, userfaultfd; memory and scheduling of other processes
    (errno.EPERM, "101 256 279 298 310-312 321 323", "117 238 239 241 270-272 280 282"),
    (errno.EPERM, "142 144 251 314", "30 118 119 274"),
    # what is of the whole machine: modules, kexec, swap, quota, log, names, clocks, fanotify
    (
        errno.EPERM,
        "103 135 153 154 159 163 164 167-176 179 212 227 246 300 301 305 313 320",
        "18 58 60 89 92 104-106 112 116 142 161 162 170 171 224 225 262 263 266 273 294",
    ),
    # Memory files count for no process: not for its limit, and not when memory runs out.
    (errno.EPERM, "319", "279"),
    # sendmsg: descriptors in flight outlive every process, until the kernel happens to collect
    # them, and keep alive what they are of: deleted files, sockets with their names.
    (errno.EPERM, "46 307", "211 269"),
    # aio contexts and inotify: there are so many on the machine or for an account, and a watch
    # tells what others do with a file.
    (errno.ENOSYS, "206-210 333", "0-4 292"),
    (errno.EPERM, "253-255 294", "26-28"),
    # What of a file is cached, which says what others read (mincore, preadv2); and its eviction,
    # and writing back for everybody (fadvise, readahead, sync), which a program can do without.
    (errno.ENOSYS, "27 327 328", "232 286 287"),
    (0, "162 187 221 306", "81 213 223 267"),
)
# From here on the numbers are those of newer kernels, the same everywhere, and unknown to a
# program but for close_range, openat2, faccessat2, epoll_pwait2, the futex calls, fchmodat2,
# map_shadow_stack, mseal, and landlock_restrict_self, which the leader calls. So is clone3: it
# takes its flags from memory, where no filter sees them, and libc falls back to clone.
_NEWER = 335
_NEWER_ALLOWED = (436, 437, 439, 441, 446, 449, 452, 453, 454, 455, 456, 462)
# Those that are allowed or not by their arguments; and mount, which the leader itself needs.
_BY_NAME = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "setpriority": (141, 140),
    "fcntl": (72, 25),
    "clone": (56, 220),
    "mount": (165, 40),
}
_MACHINES = ("x86_64", "aarch64")
_ALLOW = ((0x06, 0, 0, 0x7FFF0000),)


def _refuse(code: int) -> tuple[Any, ...]:
    return ((0x06, 0, 0, 0x00050000 | code),)


def _argument(index: int) -> tuple[int, int, int, int]:
    return (0x20, 0, 0, 16 + 8 * index)


def _by_arguments() -> dict[str, tuple[Any, ...]]:
    """BPF for the calls of which it depends; a program is a tuple of its lines."""
    no = _refuse(errno.EPERM)
    # There is no network but a loopback, and what is left of a connection there outlives
    # a program: a port that the next one cannot bind, a number that it can read.
    unix = (_argument(0), (0x15, 0, 1, socket.AF_UNIX), *_ALLOW, *_refuse(errno.EAFNOSUPPORT))
    # Only itself: what is done to the leader, a later test would inherit.
    itself = (_argument(0), (0x15, 0, 1, 0), *_ALLOW, *no)
    return {
        "socket": unix,
        "socketpair": unix,
        "prlimit64": itself,
        "sched_setaffinity": itself,
        "setpriority": (_argument(0), (0x15, 0, 3, 0), _argument(1), (0x15, 0, 1, 0), *_ALLOW, *no),
        # Beyond POSIX are leases, word of changes in a folder, the size of a pipe (its pages are
        # counted per account), hints, and what will come; three are harmless.
        "fcntl": (
            _argument(1),
            (0x35, 0, 3, 1024),
            (0x15, 2, 0, 1030),  # F_DUPFD_CLOEXEC
            (0x15, 1, 0, 1032),  # F_GETPIPE_SZ
            (0x15, 0, 1, 1034),  # F_GET_SEALS
            *_ALLOW,
            *no,
        ),
        "clone": (_argument(0), (0x45, 0, 1, _NEW_NAMESPACES), *no, *_ALLOW),
        "mount": no,
    }


def _seccomp_programs(machine: str) -> list[bytes]:
    """Two BPF filters: what no program needs, and the rest, which the leader does; none elsewhere.

    A filter is a tree that halves the numbers: a call takes a few steps of it, and the kernel can
    check the whole quickly, which it does whenever one is installed.
    """
    if machine not in _MACHINES:
        return []
    which = _MACHINES.index(machine)
    everything: dict[int, tuple[Any, ...]] = {
        number: _ALLOW if number in _NEWER_ALLOWED else _refuse(errno.ENOSYS)
        for number in range(_NEWER, 512)  # and so on: what holds for the last one holds beyond
    }
    for code, *texts in _REFUSED:
        for part in str(texts[which]).split():
            low, _, high = part.partition("-")
            everything.update(dict.fromkeys(range(int(low), int(high or low) + 1), _refuse(code)))
    leaders: dict[int, tuple[Any, ...]] = {}
    for name, lines in _by_arguments().items():
        part_of = leaders if name in ("clone", "mount") else everything
        part_of[_BY_NAME[name][which]] = lines

    def tree(steps: list[tuple[int, tuple[Any, ...]]]) -> tuple[Any, ...]:
        if len(steps) == 1:
            return steps[0][1]
        half = len(steps) // 2
        low, high = tree(steps[:half]), tree(steps[half:])
        return ((0x35, len(low), 0, steps[half][0]), *low, *high)

    def program(calls: dict[int, tuple[Any, ...]]) -> bytes:
        steps = [(0, _ALLOW)]
        for number in range(max(calls) + 1 + (calls is leaders)):
            lines = calls.get(number, _ALLOW)
            if lines is not steps[-1][1] and lines != steps[-1][1]:
                steps.append((number, lines))
        start = (
            (0x20, 0, 0, 4),  # the processor: calls of another one are not in our list
            (0x15, 1, 0, (0xC000003E, 0xC00000B7)[which]),
            (0x06, 0, 0, 0x80000000),  # kills
            (0x20, 0, 0, 0),  # the number
        )
        return b"".join(struct.pack("=HBBI", *line) for line in (*start, *tree(steps)))

    return [program(everything), program(leaders)]


class Kernel:
    """The calls Python has no name for, with their arguments made ready beforehand."""

    def __init__(self) -> None:
        self.libc = ctypes.PyDLL(None, use_errno=True)
        self.clone_number = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine)
        self.filters = []
        for program in _seccomp_programs(os.uname().machine):
            text = ctypes.create_string_buffer(program)
            head = struct.pack("@HP", len(program) // 8, ctypes.addressof(text))
            self.filters.append((ctypes.create_string_buffer(head), text))
        self.cap_head = struct.pack("=Ii", 0x20080522, 0)
        self.cap_none = b"\0" * 24

    def prctl(self, option: int, *values: Any) -> None:
        """Call prctl."""
        words = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
        if self.libc.prctl(option, *words) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "prctl " + str(option))

    def no_new_privileges(self) -> None:
        """Whatever is executed from here on gains no rights."""
        self.prctl(38, 1)

    def dumpable(self, value: int) -> None:
        """0: nobody of the same uid may trace this process or read its memory."""
        self.prctl(4, value)

    def die_with_parent(self) -> None:
        """SIGKILL when the parent ends."""
        self.prctl(1, signal.SIGKILL)

    def adopt_orphans(self) -> None:
        """Become the parent of descendants whose own parent ended."""
        self.prctl(36, 1)

    def install_filter(self, which: int) -> None:
        """Install the first or the second seccomp filter."""
        if self.filters:
            self.prctl(22, 2, ctypes.addressof(self.filters[which][0]))

    def call(self, number: int, *values: Any) -> int:
        """A system call by its number."""
        got: int = self.libc.syscall(ctypes.c_long(number), *values)
        if got < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return got

    def has_landlock(self) -> bool:
        """Whether there is one that lets files be moved between folders, and knows truncate."""
        try:
            return self.call(444, None, ctypes.c_size_t(0), 1) >= 3
        except OSError:
            return False

    def landlock(self, folder: str) -> int:
        """A ruleset: files in a folder may be written, and all but /sys/fs may be read."""
        write, read, refer, truncate = 1 << 1, 1 << 2, 1 << 13, 1 << 14
        everything = write | read | refer | truncate
        rules = self.call(444, struct.pack("=Q", everything), ctypes.c_size_t(8), 0)
        rights = dict.fromkeys(("/" + name for name in os.listdir("/") if name != "sys"), read)
        rights["/sys/devices"] = read
        rights.update(dict.fromkeys(("/dev/null", "/dev/zero", "/dev/full"), write | truncate))
        rights[folder] = everything
        for name, allowed in rights.items():
            place = os.open(name, os.O_PATH)
            self.call(445, rules, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
        return rules

    def drop_capabilities(self) -> None:
        """Give up all of them."""
        self.prctl(47, 4)  # the ambient ones
        if self.libc.capset(self.cap_head, self.cap_none) < 0:
            raise OSError(ctypes.get_errno(), "capset")

    def mount(self, source: bytes, target: bytes, kind: Any, flags: int, data: Any) -> None:
        """Call mount."""
        if self.libc.mount(source, target, kind, flags, data) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), target.decode())

    def fork_into(self, namespaces: int) -> int:
        """``os.fork`` into new namespaces."""
        api = ctypes.pythonapi
        api.PyOS_BeforeFork()
        flags = namespaces | signal.SIGCHLD
        pid: int = self.libc.syscall(self.clone_number, flags, 0, 0, 0, 0)
        if pid == 0:
            api.PyOS_AfterFork_Child()
            return 0
        number = ctypes.get_errno()
        api.PyOS_AfterFork_Parent()
        if pid < 0:
            raise OSError(number, os.strerror(number), "clone")
        return pid


# --- messages between supervisor, zygote and leader -----------------------------------------------

START = struct.Struct("=cI6q")  # kind, uid, limits as in `Leader.settle`
ENDED = struct.Struct("=cidq?")  # kind, wait status, CPU seconds, resident kB, leftovers
GO, GO_LAST = b"g", b"l"


def send_fds(to: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send a message with descriptors, or without."""
    rights = array.array("i", fds).tobytes()
    to.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else [])


def receive_fds(source: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a message with descriptors."""
    data, control, _, _ = source.recvmsg(256, socket.CMSG_SPACE(64))
    fds = array.array("i")
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content)
    return data, list(fds)


def memory_file(name: str, *, append: bool = False) -> int:
    """An empty file in memory."""
    fd = os.memfd_create(name)
    if append:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    return fd


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_all(fd: int, cap: int) -> bytes:
    """From the start, at most ``cap`` bytes."""
    size = min(os.fstat(fd).st_size, cap)
    return os.pread(fd, size, 0) if size else b""


# --- the program's own process --------------------------------------------------------------------


class Zygote:
    """Forks clean leaders; runs until the supervisor goes away."""

    def __init__(self, kernel: Kernel, boss: socket.socket, mode: str, tmp: bytes) -> None:
        self.kernel, self.boss, self.mode, self.tmp = kernel, boss, mode, tmp
        self.rules: int | None = None
        self.devices: list[bytes] = []

    def main(self) -> None:
        """Serve until the supervisor goes away."""
        self.prepare()
        while True:
            data, fds = receive_fds(self.boss)
            if not data:
                os._exit(0)
            if data[:1] == b"R":
                self.reap_all()
                self.boss.send(ENDED.pack(b"R", 0, 0.0, 0, False))
                continue
            try:
                if self.mode == "ns":
                    pid = self.kernel.fork_into(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC)
                else:
                    pid = os.fork()
            except OSError:
                pid = -1
            if pid == 0:
                Leader(self, START.unpack(data), fds).main()
            for fd in fds:
                os.close(fd)
            if pid < 0:
                self.boss.send(ENDED.pack(b"F", 0, 0.0, 0, False))
                continue
            _, status, usage = os.wait4(pid, 0)
            used = usage.ru_utime + usage.ru_stime
            self.boss.send(ENDED.pack(b"X", status, used, usage.ru_maxrss, self.leftovers()))

    def prepare(self) -> None:
        """Make ready all that a leader would otherwise do for itself, once and for all."""
        kernel = self.kernel
        kernel.dumpable(1)  # or it may not write its own memory where it is not root
        kernel.die_with_parent()
        kernel.adopt_orphans()
        kernel.no_new_privileges()
        if self.mode == "uid":
            os.setgroups([])
        elif self.mode == "ns":
            places = (b"/dev/" + name.encode() for name in os.listdir("/dev"))
            self.devices = [p for p in places if os.path.ismount(p) and not os.path.isdir(p)]
        os.closerange(3, self.boss.fileno())
        os.closerange(self.boss.fileno() + 1, 256)
        # Standard streams over seekable files, as the ones that leaders put in their place.
        for number in (0, 1, 2):
            fd = memory_file("none")
            os.dup2(fd, number)
            os.close(fd)
        sys.stdin = sys.__stdin__ = open(0, newline="\n", encoding="utf-8", closefd=False)  # type: ignore[misc]
        sys.stdout = sys.__stdout__ = open(1, "w", newline="\n", encoding="utf-8", closefd=False)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = open(  # type: ignore[misc]
            2,
            "w",
            buffering=1,
            newline="\n",
            encoding="utf-8",
            errors="backslashreplace",
            closefd=False,
        )
        # What modules want done after a fork costs more than the fork: new locks where no other
        # thread is, a new seed where the same one every time is better.
        register, os.register_at_fork = os.register_at_fork, lambda **_: None
        for name in PRELOAD:
            __import__(name)
        os.register_at_fork = register
        sys.modules["random"].seed(0)
        sys.modules["threading"].stack_size(8 << 20)  # else RLIMIT_STACK, of address space
        here = os.path.dirname(os.path.abspath(__file__))
        sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here] + site_packages()
        sys.argv[:] = [FILENAME]
        for name in ("exit", "quit"):  # what `site`, left out for speed, would add
            setattr(builtins, name, sys.exit)
        if kernel.filters:
            socket.socket.sendmsg = send_without_descriptors  # type: ignore[method-assign,assignment]
        sys.setrecursionlimit(50_000)
        self.base_memory = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        self.module = types.ModuleType("__main__")
        self.module.__dict__.update(__builtins__=builtins, __file__=FILENAME)
        self.runner = sys.modules["__main__"]
        sys.modules["__main__"] = self.module
        compile("print(1)", FILENAME, "exec")
        if self.mode != "ns":  # where every test is two forks away, copying them costs more
            share_page_tables()
        if self.mode == "uid" and kernel.has_landlock():
            self.rules = kernel.landlock(os.path.dirname(RUN_DIR))
        kernel.dumpable(0)
        kernel.install_filter(0)
        if self.mode != "ns":
            kernel.install_filter(1)
        gc.collect()
        gc.freeze()
        os.closerange(256, 512)  # where what failed until here was to be told

    @staticmethod
    def leftovers() -> bool:
        """Whether anything of the program still runs: all orphans are our children."""
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return True

    @staticmethod
    def reap_all() -> None:
        """Wait for what the supervisor has killed."""
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            return


def send_without_descriptors(
    self: socket.socket, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None
) -> int:
    """``socket.sendmsg`` where the call is refused: asyncio (3.12) writes by it what is left."""
    if list(ancdata):
        raise PermissionError(errno.EPERM, "descriptors cannot be sent in a sandbox")
    data = b"".join(buffers)
    return self.send(data, flags) if address is None else self.sendto(data, flags, address)


def share_page_tables() -> None:
    """Let forked children find the interpreter's code already mapped.

    fork() copies page tables only of mappings that hold a page of their own; of all others the
    child faults in every page anew. So give each mapped file one: its first byte, written over
    with itself. Saves a quarter of what a small program costs.
    """
    try:
        with open("/proc/self/mem", "r+b", 0) as memory, open("/proc/self/maps") as maps:
            for line in maps.read().splitlines():
                place, rights, _, _, inode = line.split()[:5]
                if inode != "0" and rights[0] == "r" and rights[1] == "-" and rights[3] == "p":
                    start = int(place.partition("-")[0], 16)
                    memory.seek(start)
                    byte = memory.read(1)
                    memory.seek(start)
                    memory.write(byte)
    except OSError:
        pass  # a kernel that forbids it is only slower


def site_packages() -> list[str]:
    """Where installed packages lie; ``site`` is left out for speed."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    places = (
        os.path.join(sys.prefix, "lib", version, "site-packages"),
        "/usr/local/lib/" + version + "/dist-packages",
        "/usr/lib/python3/dist-packages",
    )
    return [p for p in places if os.path.isdir(p)]


class Leader:
    """One program: gives up its rights, compiles, runs tests."""

    def __init__(self, zygote: Zygote, start: tuple[Any, ...], fds: list[int]) -> None:
        self.zygote, self.kernel = zygote, zygote.kernel
        _, self.uid, *self.limits = start
        self.boss = socket.socket(fileno=fds[0])
        self.code, self.channel, *self.streams = fds[1:6]
        self.rpc = fds[6] if len(fds) > 6 else -1

    def main(self) -> None:
        """From fork to exit; never returns."""
        try:
            self.settle()
            request = _loads(read_all(self.code, MAX_FRAME).decode("utf-8", "surrogatepass"))
            os.close(self.code)
            self.prelude = request["prelude"] and compile(
                request["prelude"], "<prelude>", "exec", dont_inherit=True
            )
            self.program = self.compile(request["code"])
            self.entry, self.kind = request["entry"], request["kind"]
            self.boss.send(ENDED.pack(b"C", 0, time.process_time(), 0, False))
            while True:
                word, fds = receive_fds(self.boss)
                if not word:
                    os._exit(0)
                if fds:
                    self.tidy()
                    os.dup2(fds[0], self.channel)
                    os.close(fds[0])
                    self.take_streams(fds[1:])
                if word == GO_LAST and self.zygote.mode != "ns":
                    self.boss.close()
                    self.test()
                pid = os.fork()
                if pid == 0:
                    self.boss.close()
                    self.test()
                _, status, usage = os.wait4(pid, 0)
                left = Zygote.leftovers()
                if left:
                    self.end_all()
                used = usage.ru_utime + usage.ru_stime
                self.boss.send(ENDED.pack(b"T", status, used, usage.ru_maxrss, left))
        except BaseException as error:
            os.pwrite(self.channel, (type(error).__name__ + ": " + str(error)).encode(), 0)
            os._exit(70)

    def settle(self) -> None:
        """Give up every right and set the limits."""
        kernel, mode = self.kernel, self.zygote.mode
        self.zygote.boss.close()
        self.take_streams(self.streams)
        os.setsid()
        kernel.die_with_parent()
        kernel.adopt_orphans()
        # Out of memory is this program's fault, not its neighbours'. It cannot take that back:
        # Landlock forbids it, or /proc is read-only.
        kernel.dumpable(1)  # or the file is root's, which this may not be; nobody else is here yet
        try:
            fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(fd, b"1000")
            os.close(fd)
        except OSError:
            if mode != "plain":
                raise
        if mode == "ns":
            kernel.mount(b"none", b"/", None, 0x44000, None)  # private, all of it
            for place in self.zygote.devices:  # the machine's: a writer could set their times
                kernel.mount(b"none", place, None, 0x1023, None)
            kernel.mount(b"tmpfs", b"/tmp", b"tmpfs", 6, self.zygote.tmp)
            kernel.mount(b"/tmp", b"/dev/shm", None, 0x1000, None)  # the locks of multiprocessing
            kernel.mount(b"proc", b"/proc", b"proc", 15, None)
            os.chdir("/tmp")
            kernel.drop_capabilities()
        elif mode == "uid":
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
            kernel.die_with_parent()  # forgotten by the kernel at the change of uid
            os.chdir(RUN_DIR)
        else:
            os.chdir(RUN)
        if self.zygote.rules is not None:
            kernel.call(446, self.zygote.rules, 0)
            os.close(self.zygote.rules)
        kernel.dumpable(0)
        memory, file, processes, stack, files, cpu = self.limits
        limit(resource.RLIMIT_AS, self.zygote.base_memory + memory)
        limit(resource.RLIMIT_FSIZE, file)
        if mode != "plain":  # it would count everything this user runs
            limit(resource.RLIMIT_NPROC, processes + (3 if mode == "ns" else 1))
        # Only the soft one: many a program asks for a stack without end, as recursion needs it, and
        # the address space is limited anyway.
        ceiling = resource.getrlimit(resource.RLIMIT_STACK)[1]
        soft = stack if ceiling == resource.RLIM_INFINITY else min(stack, ceiling)
        resource.setrlimit(resource.RLIMIT_STACK, (soft, ceiling))
        limit(resource.RLIMIT_NOFILE, files)
        limit(resource.RLIMIT_CORE, 1)  # at 0, a host that pipes core files to a helper still does
        limit(resource.RLIMIT_SIGPENDING, 256)  # queued signals, timers: counted per account
        limit(resource.RLIMIT_CPU, cpu)
        if mode == "ns":
            kernel.install_filter(1)

    @staticmethod
    def take_streams(fds: list[int]) -> None:
        """Make these the standard streams."""
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)

    def tidy(self) -> None:
        """Remove what the test before has written, and what it has made of its folder."""
        folder = {"uid": RUN_DIR, "ns": "/tmp"}.get(self.zygote.mode, RUN)
        os.chmod(folder, 0o700)  # it may have locked itself out
        if os.listdir(folder):
            empty(folder)
        if self.zygote.mode == "plain":
            return
        for name in os.listxattr(folder):
            if name.startswith(("user.", "system.")):  # those that a program can set
                os.removexattr(folder, name)
        os.utime(folder)

    def compile(self, source: str) -> Any:
        """The program as a code object; what does not compile ends here."""
        try:
            return compile(source, FILENAME, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            message = {"error": describe(error)}
        os.ftruncate(self.channel, 0)
        os.pwrite(self.channel, _dumps(message).encode("utf-8", "backslashreplace"), 0)
        self.boss.send(ENDED.pack(b"E", 0, time.process_time(), 0, False))
        os._exit(0)

    def end_all(self) -> None:
        """End what a test left running, before the next one; the leader itself is spared."""
        if self.zygote.mode == "plain":
            return  #: kill(-1) would end the user's own processes
        try:
            os.kill(-1, signal.SIGKILL)
            while True:
                os.waitpid(-1, 0)
        except (ProcessLookupError, ChildProcessError, PermissionError):
            pass

    def test(self) -> None:
        """Run the program on what the supervisor has laid ready; never returns."""
        code, message = 0, None  # type: int, Any
        # `flush` and the rest are taken now: what the program replaces is its own affair.
        streams, finish, leave = (sys.stdout, sys.stderr), atexit._run_exitfuncs, os._exit
        truncate, write = os.ftruncate, os.pwrite
        try:
            code, message = self.attempt()
        except MemoryError:
            code, message = 1, {"error": {"type": "MemoryError", "memory": True}}
        except BaseException as error:
            code, message = 1, {"error": {"type": type(error).__name__, "frames": []}}
        try:
            threads = sys.modules.get("threading")
            if threads is not None:
                threads._shutdown()  # what a thread prints after the main one counts too
            finish()
        except BaseException:
            pass
        for stream in (sys.stdout, sys.stderr, *streams):
            try:
                if stream is not None and not stream.closed:
                    stream.flush()
            except BaseException:
                code = code or 120
        try:
            if message is not None:
                text = _dumps(message).encode("utf-8", "backslashreplace")
                truncate(self.channel, 0)
                view = memoryview(text)
                while view:
                    view = view[write(self.channel, view, len(text) - len(view)) :]
        except BaseException as error:
            big = isinstance(error, (MemoryError, OSError))
            truncate(self.channel, 0)
            write(
                self.channel, b'{"error":{"type":"MemoryError","output":true}}' if big else b"", 0
            )
            code = code or 1
        leave(code & 0xFF)

    def attempt(self) -> tuple[int, Any]:
        """Run the program; exit code and what to tell the host."""
        scope = self.zygote.module.__dict__
        # What `prepare` kept off, for the program's own forks.
        os.register_at_fork(after_in_child=sys.modules["threading"]._after_fork)
        args: list[Any] = []
        if self.kind in ("call", "serve"):  # imported, as it were, not run
            scope["__name__"] = "solution"
            sys.modules["solution"] = self.zygote.module
        if self.kind == "call":
            args = decode(_loads(read_all(self.channel, MAX_FRAME).decode()))
            os.ftruncate(self.channel, 0)
        try:
            if self.kind == "script":
                scope.update(proxies(self.rpc, self.entry))
            if self.prelude:
                exec(self.prelude, scope)
            exec(self.program, scope)
            if self.kind == "call":
                return 0, {"result": encode(find(scope, self.entry)(*args))}
            if self.kind == "serve":
                serve(scope, self.entry, self.rpc)
        except SystemExit as stop:
            code = stop.code
            if code is None or isinstance(code, int):
                return int(code or 0), None
            sys.stderr.write(str(code) + "\n")
            return 1, None
        except BaseException as error:
            # The frames hold what the program held: without this, MemoryError stays.
            told = describe(error)
            error.__traceback__ = None
            return 1, {"error": told}
        return 0, None


def limit(what: int, value: int) -> None:
    """Set soft and hard limit, never above what is there."""
    ceiling = resource.getrlimit(what)[1]
    if ceiling != resource.RLIM_INFINITY:
        value = min(value, ceiling)
    resource.setrlimit(what, (value, value))


def find(scope: dict[str, Any], entry: str) -> Any:
    """The function ``f``, or the method of a fresh instance for ``Solution.f``."""
    holder, _, name = entry.rpartition(".")
    if holder:
        if holder not in scope:
            raise NameError("name '" + holder + "' is not defined")
        return getattr(scope[holder](), name)
    if entry not in scope:
        raise NameError("name '" + entry + "' is not defined")
    return scope[entry]


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as data: type, message, the program's own frames, addresses removed."""
    frames: list[Any] = []
    deep: list[Any] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == FILENAME:
            place = [trace.tb_lineno, code.co_name]
            if len(frames) < 5:
                frames.append(place)
            else:  # a deep recursion: where it began, and where it ended
                deep.append(place)
                if len(deep) > 5:
                    del deep[0]
        trace = trace.tb_next
    about: dict[str, Any] = {"type": type(error).__name__, "frames": frames + deep}
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        about["memory"] = True
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        about["length"] = len(message)
        message = re.sub(r"0x[0-9a-fA-F]{4,}", "0x...", str.__getitem__(message, slice(2000)))
    except BaseException:
        message = "(its message cannot be read)"
    about["message"] = message
    if isinstance(error, SyntaxError) and error.filename == FILENAME:
        about["line"], about["column"] = error.lineno, error.offset
    return about


# --- calls from one sandbox to a program in another -----------------------------------------------


def serve(scope: dict[str, Any], entry: str, fd: int) -> None:
    """Answer calls of the entry until the other side has no more."""
    with socket.socket(fileno=fd) as sock, sock.makefile("rwb") as stream:
        for line in stream:
            call = _loads(line.decode())
            try:
                args, names = decode(call["args"]), decode(call["names"])
                reply = {"result": encode(find(scope, entry)(*args, **names))}
            except Exception as error:
                reply = {"error": describe(error)}
            stream.write(_dumps(reply).encode("utf-8", "backslashreplace") + b"\n")
            stream.flush()


def proxies(fd: int, entry: str) -> dict[str, Callable[..., Any]]:
    """Names under which a test script calls the program in the other sandbox."""
    stream = socket.socket(fileno=fd).makefile("rwb")

    def candidate(*args: Any, **names: Any) -> Any:
        call = {"args": encode(list(args)), "names": encode(names)}
        stream.write(_dumps(call).encode() + b"\n")
        stream.flush()
        line = stream.readline()
        if not line:
            raise RuntimeError("the program ended")
        reply = _loads(line.decode())
        if "error" not in reply:
            return decode(reply["result"])
        kind = getattr(builtins, str(reply["error"].get("type")), None)
        # A StopIteration would quietly end an `all(map(candidate, ...))`, and so pass.
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(
            kind, (StopIteration, StopAsyncIteration)
        ):
            kind = RuntimeError
        try:
            error = kind(str(reply["error"].get("message", "")))
        except TypeError:  # UnicodeError and its like want more
            error = RuntimeError(str(reply["error"].get("message", "")))
        raise error

    return {"candidate": candidate, entry.rpartition(".")[2]: candidate}


# --- the supervisor -------------------------------------------------------------------------------


def free_uids() -> int:
    """Where uids begin that nobody else has: no account, and no other sandbox.

    The kernel counts processes by uid over all containers, so programs of two of them that had
    the same one would use up each other's limit; and so for all that it counts by account.
    """
    with open("/proc/self/uid_map") as file:
        inside, _, count = map(int, file.readline().split())
    low, high = (1 << 20, 1 << 31) if count > 1 << 31 else (inside + 1000, inside + count)
    return low + int.from_bytes(os.urandom(4), "big") % max(1, high - low - UIDS)


class Stop(Exception):
    """The host asks to end the program."""


class Broken(Exception):
    """This slot can no longer be trusted."""


class Supervisor:
    """Talks with the host; owns deadlines, kills and cleaning."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.kernel.dumpable(0)
        self.buffer = bytearray()
        self.out: list[bytes] = []
        self.flushed = 0.0
        self.mode = "plain"
        self.uid = self.helper_uid = self.last_uid = 0
        self.compiled = self.resting = False
        self.used = 0.0  # CPU seconds of the present leader, up to its last test
        self.zygote: socket.socket | None = None
        self.zygote_pid = 0
        self.poll = select.poll()
        self.poll.register(0, select.POLLIN)
        self.oom = self.open_oom_counter()

    # frames

    def next_frame(self, timeout: float | None) -> dict[str, Any] | None:
        """The next frame from the host; None when there is none in time."""
        while True:
            if len(self.buffer) >= 4:
                size = int.from_bytes(self.buffer[:4], "big")
                if size > MAX_FRAME:
                    os._exit(71)
                if len(self.buffer) >= 4 + size:
                    data = bytes(self.buffer[4 : 4 + size])
                    del self.buffer[: 4 + size]
                    frame = _loads(data.decode("utf-8", "surrogatepass"))
                    return frame if isinstance(frame, dict) else {}
            if timeout is not None:
                events = self.poll.poll(max(0.0, timeout * 1000))
                if not any(fd == 0 for fd, _ in events):
                    return None
            self.fill()

    def fill(self) -> None:
        """Read from the host; its end is ours."""
        data = os.read(0, 1 << 18)
        if not data:
            self.leave()
        self.buffer += data

    def leave(self) -> None:
        """End everything of ours. As process 1 of its namespace, our end is everybody's."""
        if self.mode == "plain":
            if self.zygote is not None:  # else all would be below it that is below process 0
                self.kill_tree()
            try:  # the host may be dead, and would have removed it
                if os.path.isdir(RUN):
                    empty(RUN)
                    os.rmdir(RUN)
                os.rmdir(os.getcwd())
            except OSError:
                pass
        os._exit(0)

    def send(self, frame: dict[str, Any], *, now: bool = True) -> None:
        """Queue a frame for the host; those of quick tests travel together."""
        data = _dumps(frame).encode("utf-8", "surrogatepass")
        self.out.append(len(data).to_bytes(4, "big") + data)
        if now or len(data) > 1 << 16 or time.monotonic() - self.flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        try:
            write_all(1, b"".join(self.out))
        except OSError:
            self.leave()
        self.out.clear()
        self.flushed = time.monotonic()

    # life

    def main(self) -> None:
        """Serve the host until it goes away."""
        while True:
            frame = self.next_frame(IDLE_S)
            if frame is None:
                self.leave()
            elif frame.get("op") == "hello":
                self.hello(frame)
            elif frame.get("op") == "run":
                self.nonce = frame["nonce"]
                try:
                    self.run(frame)
                except Broken as why:
                    self.send({"op": "broken", "nonce": self.nonce, "why": str(why)})
                    self.leave()
                self.send({"op": "done", "nonce": self.nonce})
            # a case, a call or a stop for a program that has just ended is no error

    def hello(self, frame: dict[str, Any]) -> None:
        """Say who we are; the first time, get ready."""
        if self.zygote is None:
            self.mode = frame["mode"]
            self.uid = self.helper_uid = free_uids()
            self.last_uid = self.uid + UIDS
            tmp = f"size={int(frame['tmp_mb'])}m,nr_inodes={int(frame['inodes'])},mode=0700"
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            pid = os.fork()
            if pid == 0:
                words = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 300)
                try:
                    ours.close()
                    self.poll = None  # type: ignore[assignment]  # it holds nothing we need
                    Zygote(self.kernel, theirs, self.mode, tmp.encode()).main()
                except BaseException as error:
                    write_all(words, ("zygote: " + repr(error)).encode())
                finally:
                    os._exit(72)
            theirs.close()
            self.zygote, self.zygote_pid = ours, pid
            self.poll.register(ours, select.POLLIN)
            if self.mode == "ns":
                self.kernel.drop_capabilities()
        with open(__file__, "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        self.send(
            {
                "op": "hello",
                "nonce": frame["nonce"],
                "protocol": PROTOCOL,
                "runner": digest,
                "python": list(sys.version_info[:3]),
                "seccomp": bool(self.kernel.filters),
                "landlock": self.mode != "uid" or self.kernel.has_landlock(),
                "cgroup": self.oom is not None,
            }
        )

    @staticmethod
    def open_oom_counter() -> int | None:
        """The kernel's count of processes of this container that ran out of memory."""
        if os.getpid() != 1 or os.getuid() != 0:
            return None
        for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
            try:
                return os.open(path, os.O_RDONLY)
            except OSError:
                continue
        return None

    def oom_kills(self) -> int:
        """How many there were so far."""
        if self.oom is None:
            return 0
        found = re.search(rb"oom_kill (\d+)", os.pread(self.oom, 512, 0))
        return int(found.group(1)) if found else 0

    # one program

    def run(self, job: dict[str, Any]) -> None:
        """Run a program on the cases the host sends, until the last or until told to stop."""
        self.job, self.limits = job, job["limits"]
        self.cases: list[dict[str, Any]] = []
        self.leader: socket.socket | None = None
        self.rpc: socket.socket | None = None
        self.files: list[int] = []
        self.pending, self.pending_end, self.relayed = bytearray(), False, 0
        index, last = 0, False
        self.kills = self.oom_kills()
        try:
            while not last:
                case = self.next_case()
                last = bool(case.get("last"))
                result = self.one(case, last)
                result.update(op="result", nonce=self.nonce, index=index)
                over = last or "compile" in result or bool(result["limit"])
                self.send(result, now=False)
                if over:
                    break
                index += 1
        except Stop:
            pass
        self.end_leader()

    def next_case(self) -> dict[str, Any]:
        """The next case; frames of this program that wait in line are taken on the way."""
        self.drain()
        while not self.cases:
            self.flush()
            self.take(self.next_frame(None))
        return self.cases.pop(0)

    def drain(self) -> None:
        """Handle every frame that is there already."""
        frame = self.next_frame(0)
        while frame is not None:
            self.take(frame)
            frame = self.next_frame(0)

    def take(self, frame: dict[str, Any] | None) -> None:
        """Handle a frame that comes while a program runs."""
        if frame is None or frame.get("nonce") != self.nonce:
            return
        if frame["op"] == "stop":
            raise Stop
        if frame["op"] == "case":
            self.cases.append(frame)
        elif frame["op"] == "rpc":  # perhaps before there is anybody to hear it
            self.pending += frame["data"].encode("latin-1")
            self.pending_end = self.pending_end or bool(frame.get("end"))
            self.push_rpc()

    def one(self, case: dict[str, Any], last: bool) -> dict[str, Any]:
        """Run one test; what came of it."""
        if self.leader is None:
            self.start_leader()
        fresh: list[int] = []
        if self.compiled:  # nothing that a test did to its files is there at the next
            self.close_files()
            fresh = self.files = self.new_files()
        channel, stdin = self.files[:2]
        if self.job["kind"] == "call":
            os.pwrite(channel, case["input"].encode(), 0)
        else:
            write_all(stdin, case["input"].encode("latin-1"))
            os.lseek(stdin, 0, os.SEEK_SET)  # the program's own place in it, too
        assert self.leader is not None
        alone = last and self.mode != "ns"  # the leader runs the test itself
        self.resting = False
        try:
            send_fds(self.leader, GO_LAST if alone else GO, fresh)
        except OSError:
            pass  # it has ended: we are about to hear of it
        if not self.compiled:
            outcome = self.wait(self.limits["compile_s"], 3 * self.limits["compile_s"] + 1)
            if outcome["kind"] != "C":
                return self.not_compiled(outcome)
            self.compiled, self.used = True, outcome["cpu"]
        if alone:
            self.poll.unregister(self.leader)  # it hangs up; what counts is its end
        start = time.monotonic()
        outcome = self.wait(self.limits["cpu_s"], self.limits["wall_s"])
        wall = time.monotonic() - start
        if outcome["kind"] == "T":
            self.resting = True
            self.used += outcome["cpu"]
            return self.report(outcome, wall)
        # The leader itself has ended: it was its test, or a test has taken it along.
        outcome["cpu"] = max(0.0, outcome["cpu"] - self.used)
        self.sweep(outcome)
        result = self.report(outcome, wall)
        self.forget_leader()
        return result

    def report(self, outcome: dict[str, Any], wall: float) -> dict[str, Any]:
        """What the host hears of a test."""
        limits = self.limits
        channel, _, stdout, stderr = self.files
        found = outcome.get("limit")
        out_cap, err_cap = limits["output_kb"] << 10, limits["stderr_kb"] << 10
        kills = self.oom_kills()
        if kills > self.kills:
            self.kills, found = kills, "memory"
        sizes = os.fstat(stdout).st_size, os.fstat(stderr).st_size
        if found is None and (sizes[0] > out_cap or sizes[1] >= limits["file_mb"] << 20):
            found = "output"
        if found is None and outcome["cpu"] >= limits["cpu_s"]:
            found = "time"
        answer = b""
        if self.job["kind"] in ("call", "serve", "script"):
            cap = max(out_cap, 1 << 16)
            answer = read_all(channel, cap + 1)
            if len(answer) > cap:
                answer, found = b"", found or "output"
        else:
            answer = read_all(channel, 1 << 16)
        return {
            "status": outcome["status"],
            "stdout": read_all(stdout, out_cap).decode("latin-1"),
            "stderr": read_all(stderr, err_cap).decode("latin-1"),
            "message": answer.decode("latin-1"),
            "limit": found,
            "starved": outcome.get("starved", False),
            "cpu": outcome["cpu"],
            "wall": wall,
            "rss": outcome["rss"],
        }

    def not_compiled(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """A program that does not compile, or that the compiler did not survive."""
        message = read_all(self.files[0], 1 << 16)
        self.resting = outcome["kind"] == "E"
        if outcome["kind"] == "X":
            self.sweep(outcome)
            self.forget_leader()
            if os.WIFEXITED(outcome["status"]) and os.WEXITSTATUS(outcome["status"]) == 70:
                raise Broken("a leader could not be set up: " + message.decode("latin-1"))
            # It may have said why and ended before we listened; only then did it end well.
            message = b"" if outcome["status"] else message
        return {
            "compile": True,
            "status": outcome["status"],
            "message": message.decode("latin-1"),
            "stdout": "",
            "stderr": "",
            "limit": outcome.get("limit"),
            "starved": outcome.get("starved", False),
            "cpu": outcome["cpu"],
            "wall": 0.0,
            "rss": 0,
        }

    # the leader

    def start_leader(self) -> None:
        """Ask the zygote for a leader, with everything it needs as descriptors."""
        assert self.zygote is not None
        job, limits = self.job, self.limits
        if self.mode == "uid":
            self.uid += 1
            if self.uid > self.last_uid:
                raise Broken("all uids are used up")
            os.mkdir(RUN_DIR, 0o700)
            os.chown(RUN_DIR, self.uid, self.uid)
        elif self.mode == "plain":
            os.makedirs(RUN, mode=0o700, exist_ok=True)
        code = {name: job[name] for name in ("code", "prelude", "entry", "kind")}
        text = memory_file("code")
        write_all(text, _dumps(code).encode("utf-8", "surrogatepass"))
        self.files = self.new_files()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        passed = [theirs]
        if job["kind"] in ("serve", "script"):
            self.rpc, other = socket.socketpair()
            self.rpc.setblocking(False)
            self.poll.register(self.rpc, select.POLLIN)
            passed.append(other)
            self.push_rpc()
        cpu = int(limits["cpu_s"] + limits["compile_s"]) + 2
        data = START.pack(
            b"S",
            self.uid if self.mode == "uid" else 0,
            limits["memory_mb"] << 20,
            limits["file_mb"] << 20,
            limits["processes"],
            limits["stack_mb"] << 20,
            limits["open_files"],
            cpu,
        )
        try:
            fds = [theirs.fileno(), text, *self.files, *(s.fileno() for s in passed[1:])]
            send_fds(self.zygote, data, fds)
        except OSError as error:
            raise Broken("the zygote has ended: " + str(error)) from None
        os.close(text)
        for sock in passed:
            sock.close()
        self.leader, self.compiled, self.used = ours, False, 0.0
        self.poll.register(ours, select.POLLIN)

    @staticmethod
    def new_files() -> list[int]:
        """A test's channel, standard input, output and error."""
        return [
            memory_file("channel"),
            memory_file("stdin"),
            memory_file("stdout", append=True),
            memory_file("stderr", append=True),
        ]

    def close_files(self) -> None:
        """Close them."""
        for fd in self.files:
            os.close(fd)
        self.files = []

    def wait(self, cpu_s: float, wall_s: float) -> dict[str, Any]:
        """Wait for word from the leader or of its end; end it when it is over its limits."""
        start = time.monotonic()
        pause, limit_hit, starved, used = 0.05, None, False, 0.0
        assert self.leader is not None
        assert self.zygote is not None
        leader, zygote = self.leader.fileno(), self.zygote.fileno()
        while True:
            now = time.monotonic() - start
            events = self.poll.poll(max(0.0, min(pause, wall_s - now)) * 1000)
            ready = [fd for fd, _ in events]
            if self.rpc is not None and self.rpc.fileno() in ready:
                self.relay()
            if leader in ready:
                outcome = self.hear(self.leader)
                if outcome is not None:
                    if limit_hit is None:
                        return outcome
                    continue  # it was ended a moment later: only that counts
                self.poll.unregister(leader)  # its end is near: the zygote will tell
                leader = -1
            if zygote in ready:
                outcome = self.hear(self.zygote)
                if outcome is None:
                    raise Broken("the zygote has ended")
                if outcome["kind"] == "F":
                    raise Broken("the zygote could not fork")
                if limit_hit is not None:
                    outcome["limit"], outcome["starved"] = limit_hit, starved
                    outcome["cpu"] = max(outcome["cpu"], self.used + used)
                return outcome
            if 0 in ready:
                self.drain()
            now = time.monotonic() - start
            if limit_hit is not None:
                if now > wall_s + 10:
                    raise Broken("a program cannot be ended")
                continue
            if self.too_much_output():
                limit_hit = "output"
            elif self.oom_kills() > self.kills:  # it may be a child that its parent waits for
                limit_hit = "memory"
            elif now >= min(cpu_s, wall_s):
                used, wanted = self.usage()
                used -= self.used
                if used >= cpu_s:
                    limit_hit = "time"
                elif now >= wall_s:
                    # What slept is slow by itself; what stood in line for a processor is not.
                    limit_hit = "time"
                    starved = used < 0.5 * cpu_s and wanted > 0.8 * now
                pause = max(0.02, min(0.25, cpu_s - used))
            elif now >= 0.05:
                pause = min(0.25, max(0.01, cpu_s - now))
            if limit_hit is not None:
                self.kill_program()
                wall_s, pause = now, 0.5

    @staticmethod
    def hear(sock: socket.socket) -> dict[str, Any] | None:
        """A message of leader or zygote; None when it has ended."""
        try:
            data = sock.recv(256)
        except ConnectionResetError:
            # It ended before it read all of ours. The kernel says so once, before the rest.
            data = sock.recv(256)
        if len(data) != ENDED.size:
            return None
        kind, status, cpu, rss, left = ENDED.unpack(data)
        return {"kind": kind.decode(), "status": status, "cpu": cpu, "rss": rss, "left": left}

    def too_much_output(self) -> bool:
        """Whether what is printed so far is over the limit already."""
        most: int = self.limits["output_kb"] << 10
        return os.fstat(self.files[2]).st_size > most

    # calls between sandboxes

    def relay(self) -> None:
        """Pass on what the program says to whom it is connected with."""
        assert self.rpc is not None
        self.push_rpc()
        try:
            data = self.rpc.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.relayed += len(data)
        if not data or self.relayed > MAX_FRAME:
            self.poll.unregister(self.rpc)
            self.rpc.close()
            self.rpc = None
        else:
            self.send({"op": "rpc", "nonce": self.nonce, "data": data.decode("latin-1")})

    def push_rpc(self) -> None:
        """Write what waits for the program, as much as it takes."""
        if self.rpc is None:
            return
        try:
            while self.pending:
                del self.pending[: self.rpc.send(self.pending)]
            if self.pending_end:
                self.rpc.shutdown(socket.SHUT_WR)
                self.pending_end = False
        except BlockingIOError:
            pass
        except OSError:
            self.pending.clear()
        wanted = select.POLLIN | (select.POLLOUT if self.pending else 0)
        self.poll.modify(self.rpc, wanted)

    # ending and cleaning

    def end_leader(self) -> None:
        """End the leader, if there is one, and see that nothing of the program is left."""
        if self.leader is not None:
            if not self.resting:
                self.kill_program()
            self.close_sockets()  # a leader at rest goes when its line is cut
            self.sweep(self.wait_zygote())
            self.forget_leader()

    def forget_leader(self) -> None:
        """Close all that belonged to a leader that has ended, and clean up after it."""
        self.close_sockets()
        self.close_files()
        self.clean()

    def wait_zygote(self) -> dict[str, Any]:
        """The zygote's word that the leader has ended."""
        assert self.zygote is not None
        deadline = time.monotonic() + 10
        while True:
            self.zygote.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                outcome = self.hear(self.zygote)
            except OSError:
                raise Broken("a program cannot be ended") from None
            finally:
                self.zygote.settimeout(None)
            if outcome is None:
                raise Broken("the zygote has ended")
            return outcome

    def close_sockets(self) -> None:
        """Hang up on the leader."""
        for sock in (self.leader, self.rpc):
            if sock is not None:
                try:
                    self.poll.unregister(sock)
                except (KeyError, ValueError):
                    pass
                sock.close()
        self.leader = self.rpc = None

    def sweep(self, outcome: dict[str, Any]) -> None:
        """After a leader's end: end what the program left running."""
        if not outcome["left"]:
            return
        assert self.zygote is not None
        self.kill_program()
        self.zygote.send(b"R")
        if self.wait_zygote()["kind"] != "R":
            raise Broken("a program cannot be ended")

    def kill_program(self) -> None:
        """SIGKILL to everything of the program."""
        if self.mode == "uid":
            self.as_program(self.kill_everybody)
        else:
            self.kill_tree()

    @staticmethod
    def kill_everybody() -> None:
        """All processes of this uid, at once: no fork can slip through."""
        try:
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass

    def as_program(self, function: Callable[[], None]) -> None:
        """Run our own code with the program's rights, in a process of its own.

        Only the effective uid is the program's: that is enough to end its processes and remove its
        files, and not enough for them to signal this one.
        """
        pid = os.fork()
        if pid == 0:
            try:
                os.setresgid(self.helper_uid, self.uid, self.helper_uid)
                os.setresuid(self.helper_uid, self.uid, self.helper_uid)
                function()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    def kill_tree(self) -> None:
        """All descendants of the zygote, found by their parents, until none is left."""
        for _ in range(100):
            tree = self.descendants()
            if self.mode == "ns":  # the end of the first process of a namespace is everybody's
                tree = [p for p in tree if p[1] == self.zygote_pid]
            living = [pid for pid, _, state, _ in tree if state != "Z"]
            if not living:
                return
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in living:
                    try:
                        os.kill(pid, number)
                    except OSError:
                        pass
            if self.mode == "ns":
                return

    def descendants(self) -> list[tuple[int, int, str, float]]:
        """``(pid, parent, state, CPU seconds)`` of all below the zygote."""
        if not self.zygote_pid:  # there is none yet; below 0 is every process of the machine
            return []
        everybody = {}
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            try:
                with open("/proc/" + name + "/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            ticks = sum(int(f) for f in fields[11:15])
            seconds = ticks / os.sysconf("SC_CLK_TCK")
            everybody[int(name)] = (int(name), int(fields[1]), fields[0].decode(), seconds)
        found: list[tuple[int, int, str, float]] = []
        parents = {self.zygote_pid}
        while parents:
            level = [p for p in everybody.values() if p[1] in parents]
            parents = {p[0] for p in level}
            found += level
        return found

    def usage(self) -> tuple[float, float]:
        """Seconds that all of it has run; that its busiest thread has run or stood in line.

        Not all threads together: many that wake at once wait for each other, and that is no fault
        of the machine.
        """
        tree = self.descendants()
        wanted = 0.0
        for pid, _, _, _ in tree:
            threads = "/proc/" + str(pid) + "/task/"
            try:
                for thread in os.listdir(threads):
                    with open(threads + thread + "/schedstat", "rb") as file:
                        ran, waited = file.read().split()[:2]
                    wanted = max(wanted, (int(ran) + int(waited)) / 1e9)
            except (OSError, ValueError):
                pass
        return sum(p[3] for p in tree), wanted

    def clean(self) -> None:
        """Remove what the program wrote; a slot that cannot be cleaned is not used again."""
        if self.mode == "ns":
            return
        path = RUN_DIR if self.mode == "uid" else RUN
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError:
            pass
        try:
            if self.mode == "uid":
                self.as_program(lambda: empty(path))
            else:
                empty(path)
            os.rmdir(path)
        except OSError as error:
            raise Broken("the folder of a program cannot be removed: " + str(error)) from None


RUN = os.path.join(os.getcwd(), "run")


def empty(path: str) -> None:
    """Remove everything in a folder, however it is nested, without following a link.

    Folders are emptied breadth first: what is in a sub-folder is moved up, so no path gets long.
    """
    os.chmod(path, 0o700)
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    name_of_mine, moved = os.urandom(8).hex(), 0  # no program can have a file of that name
    while True:
        names = os.listdir(top)
        if not names:
            break
        for name in names:
            try:
                os.unlink(name, dir_fd=top)
                continue
            except OSError:
                pass
            os.chmod(name, 0o700, dir_fd=top)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
            for child in os.listdir(inner):
                try:
                    os.unlink(child, dir_fd=inner)
                except OSError:
                    os.chmod(child, 0o700, dir_fd=inner)
                    moved += 1
                    os.rename(child, f"{name_of_mine}-{moved}", src_dir_fd=inner, dst_dir_fd=top)
            os.close(inner)
            os.rmdir(name, dir_fd=top)
    os.close(top)


def main() -> None:
    """Give the stack room, which takes a fresh start, then serve."""
    wanted = 256 << 20
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if 0 <= soft < wanted and "--again" not in sys.argv:
        most = hard if hard != resource.RLIM_INFINITY else wanted
        resource.setrlimit(resource.RLIMIT_STACK, (min(wanted, most), hard))
        os.execv(sys.executable, [sys.executable, *FLAGS, __file__, "--again"])
    Supervisor().main()


FLAGS = ("-s", "-S", "-B", "-W", "ignore")

if __name__ == "__main__":
    main()
