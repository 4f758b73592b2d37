"""Hostile programs against what the kernel keeps: beyond a process, a program, a test.

The rows of design/isolation.md, as data; see tests/hostile.py for how to read them. In rows of
several cases the first one plants, and the others look.
"""

from __future__ import annotations

import textwrap

from rlrf.sandbox import CallCase, Case, Limits, StdinCase
from tests.hostile import BREACH, LONGER, OK, PLAIN, RE, SYSCALL, TL, WA, pair, row

THEN: tuple[Case, ...] = (
    StdinCase("plant\n", "done\n"),
    StdinCase("look\n", "done\n"),
    StdinCase("look\n", "done\n"),
)
THEN_CALL: tuple[Case, ...] = tuple(CallCase((what,), "done") for what in ("plant", "look", "look"))

TRY = """
import os, sys
def works(f):
    try:
        f()
        return True
    except (OSError, ValueError, AttributeError):
        return False
def verdict(attempts):
    worked = [name for name, f in attempts.items() if works(f)]
    print("breached" if worked else "denied")
    print(worked, file=sys.stderr)
"""

# Puts descriptors in flight in a cycle of sockets, which only the kernel's collector ends, a level
# at a time: each socket is in the queue of the next one.
IN_FLIGHT = """
import array, os, socket
def send(to, fd):
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    try:  # not Python's own, in the place of which the runner may have put another
        super(socket.socket, to).sendmsg([b"x"], rights)
    except OSError:
        pass
def in_flight(fds):
    near, far = socket.socketpair()
    for fd in fds:
        send(near, fd if isinstance(fd, int) else fd.fileno())
    for _ in range(40):
        before = far
        near, far = socket.socketpair()
        send(near, before.fileno())
    send(near, far.fileno())
def deleted_files():
    fds = []
    for n in range(4):
        fd = os.open("f%d" % n, os.O_RDWR | os.O_CREAT)
        os.unlink("f%d" % n)
        for _ in range(15):
            os.write(fd, bytes(1 << 20))
        fds.append(fd)
    return fds
def room():
    for n in range(4):
        with open("g%d" % n, "wb") as file:
            for _ in range(15):
                file.write(bytes(1 << 20))
def listeners():
    made = []
    for n in range(3):
        s = socket.socket(socket.AF_UNIX)
        s.bind("\\0left-behind-%d" % n)
        s.listen()
        made.append(s)
    return made
def heard():
    for n in range(3):
        name = "\\0left-behind-%d" % n
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(1)
            try:
                s.connect(name)
                return True
            except OSError:
                pass
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(name)
    return "left-behind" in open("/proc/net/unix").read()
"""

HEARD = """
try:
    print("found" if heard() else "not found")
except OSError:
    print("found")
"""
ROOM = """
try:
    room()
    print("not found")
except OSError:
    print("found")
"""

# --- between programs -----------------------------------------------------------------------------

KERNEL_PAIRS = [
    pair(
        "deleted_files_in_flight",
        IN_FLIGHT + "in_flight(deleted_files())\nprint('planted')",
        IN_FLIGHT + ROOM,
        times=4,
    ),
    pair(
        "abstract_sockets_in_flight",
        IN_FLIGHT + "in_flight(listeners())\nprint('planted')",
        IN_FLIGHT + HEARD,
        times=4,
    ),
    pair(
        "abstract_sockets_of_killed_processes",
        IN_FLIGHT
        + textwrap.dedent(
            """
            made = listeners()
            for _ in range(8):
                if os.fork() == 0:
                    os.setsid()
                    while True:
                        pass
            print("planted", flush=True)
            os._exit(0)
            """
        ),
        IN_FLIGHT + HEARD,
    ),
    pair(
        "deleted_files_of_killed_processes",
        IN_FLIGHT
        + textwrap.dedent(
            """
            import mmap
            kept = [mmap.mmap(fd, 15 << 20) for fd in deleted_files()]
            for _ in range(8):
                if os.fork() == 0:
                    os.setsid()
                    while True:
                        pass
            print("planted", flush=True)
            os._exit(0)
            """
        ),
        IN_FLIGHT + ROOM,
    ),
    pair(
        "aio_contexts",
        SYSCALL
        + textwrap.dedent(
            """
            for n in range(2000):
                try:
                    call(206, 1000, ctypes.create_string_buffer(8))
                except OSError:
                    break
            print("planted")
            """
        ),
        "text = open('/proc/sys/fs/aio-nr').read()\n"
        "print('not found' if int(text) < 60000 else 'found')",
    ),
    pair(
        "locks_and_leases",
        """
        import fcntl, os
        for path in (os.__file__, "/dev/null", "/rlrf/runner.py"):
            fd = os.open(path, os.O_RDONLY)
            for f in (lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
                      lambda: fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
                      lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)):
                try:
                    f()
                except OSError:
                    pass
            if os.fork() == 0:
                os.setsid()
                while True:
                    pass
        """,
        """
        import fcntl, os, struct
        got = 0
        for path in (os.__file__, "/dev/null", "/rlrf/runner.py"):
            fd = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                got = 1
            try:  # who would be in the way of a writer; somebody of the host's, of its /dev/null
                if path == "/dev/null":
                    continue
                asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
                got |= struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] != 2
            except OSError:
                pass
        print("found" if got else "not found")
        """,
    ),
    pair(
        "timers_and_signals",
        """
        import os, signal, time
        signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 65))
        for _ in range(2000):
            os.kill(os.getpid(), 40)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        """,
        """
        import signal, time
        got = bool(signal.sigpending()) or signal.getitimer(signal.ITIMER_REAL)[0]
        got = got or signal.pthread_sigmask(signal.SIG_BLOCK, [])
        got = got or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL
        print("found" if got else "not found")
        """,
    ),
    pair(
        "times_and_attributes_of_its_folder",
        """
        import os
        os.utime(".", (4242, 4242))
        for name in ("user.left",):
            try:
                os.setxattr(".", name, b"x")
            except OSError:
                pass
        os.chmod(".", 0o711)
        """,
        """
        import os
        got = os.stat(".").st_mtime == 4242 or os.listxattr(".")
        print("found" if got or os.stat(".").st_mode & 0o777 != 0o700 else "not found")
        """,
    ),
    pair(
        "accounting",
        "x = bytearray(200 << 20)\nprint(len(x))",
        """
        import os
        got = 0
        for folder, _, names in os.walk("/sys/fs/cgroup"):
            for name in names:
                try:
                    got += len(open(os.path.join(folder, name), "rb").read(1))
                except OSError:
                    pass
        print("found" if got else "not found")
        """,
    ),
]

# --- of the whole machine, or of an account -------------------------------------------------------

ATTEMPTS = [
    row(
        "sends_descriptors",
        SYSCALL
        + TRY
        + textwrap.dedent(
            """
            import array, socket
            a, b = socket.socketpair()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
            message = ctypes.create_string_buffer(64)
            verdict({
                "python": lambda: a.sendmsg([b"x"], rights),
                "its base": lambda: super(socket.socket, a).sendmsg([b"x"], rights),
                "no rights": lambda: super(socket.socket, a).sendmsg([b"x"]),
                "sendmsg": lambda: call(46, a.fileno(), message, 0),
                "sendmmsg": lambda: call(307, a.fileno(), message, 1, 0),
            })
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "quotas_of_the_machine",
        SYSCALL
        + TRY
        + textwrap.dedent(
            """
            import fcntl, mmap
            page, here = ctypes.create_string_buffer(4096), os.open(".", os.O_RDONLY)
            own = os.open("own", os.O_RDWR | os.O_CREAT)
            r, w = os.pipe()
            verdict({
                "io_setup": lambda: call(206, 1, page),
                "inotify_init": lambda: call(253),
                "inotify_init1": lambda: call(294, 0),
                "fanotify": lambda: call(300, 0x200, 0),
                "io_uring": lambda: call(425, 4, page),
                "ptmx": lambda: os.open("/dev/ptmx", os.O_RDWR),
                "openpty": os.openpty,
                "dnotify": lambda: fcntl.fcntl(here, fcntl.F_NOTIFY, 2),
                "read lease": lambda: fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK),
                "write lease": lambda: fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_WRLCK),
                "pipe": lambda: fcntl.fcntl(r, 1031, 1 << 17),
                "smaller pipe": lambda: fcntl.fcntl(r, 1031, 4096),
                "write hint": lambda: call(72, own, 1036, page),
                "delegation": lambda: call(72, here, 1040, page),
                "memfd": lambda: os.memfd_create("x"),
                "memfd_secret": lambda: call(447, 0),
                "keyring": lambda: call(250, 0, -3, 1),
                "mq": lambda: call(240, b"x", 0o102, 0o600, 0),
                "shm": lambda: call(29, 0, 4096, 0o1600),
                "sem": lambda: call(64, 0, 1, 0o1600),
                "msg": lambda: call(68, 0, 0o1600),
                "inet": lambda: __import__("socket").socket(2, 1),
                "tipc pair": lambda: __import__("socket").socketpair(30, 1),
                "landlock": lambda: call(444, struct.pack("Q", 1), 8, 0),
                "quotactl_fd": lambda: call(443, here, 0, 0, 0),
                "listmount": lambda: call(458, page, page, 1, 0),
                "not yet made": lambda: call(510),
            })
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "what_is_in_the_page_cache",
        SYSCALL
        + TRY
        + textwrap.dedent(
            """
            import mmap
            fd = os.open(os.__file__, os.O_RDONLY)
            size, page = os.fstat(fd).st_size, ctypes.create_string_buffer(4096)
            at = ctypes.c_void_p.from_buffer
            libc.mmap.restype = ctypes.c_void_p
            mapped = libc.mmap(None, ctypes.c_size_t(size), 1, 1, fd, ctypes.c_long(0))
            iov = struct.pack("QQ", ctypes.addressof(page), 100)
            verdict({
                "mincore": lambda: call(27, ctypes.c_void_p(mapped), size, page),
                "preadv2": lambda: call(327, fd, iov, 1, 0, 0, 8),
                "os.preadv": lambda: os.preadv(fd, [bytearray(9)], 0, os.RWF_NOWAIT),
                "cachestat": lambda: call(451, fd, struct.pack("QQ", 0, size), page, 0),
            })
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "other_processes",
        SYSCALL
        + TRY
        + textwrap.dedent(
            """
            import resource
            boss, page = os.getppid(), ctypes.create_string_buffer(4096)
            one = {sorted(os.sched_getaffinity(0))[0]}
            child = os.fork()
            if child == 0:
                import time
                time.sleep(100)
            attempts = {}
            for pid in (boss, child, 1):
                lower = lambda pid=pid: resource.prlimit(pid, resource.RLIMIT_NOFILE, (20, 20))
                attempts.update({
                    "nice %d" % pid: lambda pid=pid: os.setpriority(os.PRIO_PROCESS, pid, 15),
                    "limit %d" % pid: lower,
                    "processors %d" % pid: lambda pid=pid: os.sched_setaffinity(pid, one),
                    "class %d" % pid: lambda pid=pid: call(144, pid, 3, struct.pack("i", 0)),
                    "ioprio %d" % pid: lambda pid=pid: call(251, 1, pid, 3 << 13),
                    "pages %d" % pid: lambda pid=pid: call(256, pid, 64, page, page),
                    "move %d" % pid: lambda pid=pid: call(279, pid, 0, 0, 0, 0, 0),
                    "pidfd %d" % pid: lambda pid=pid: call(434, pid, 0),
                })
            attempts["group"] = lambda: os.setpriority(os.PRIO_PGRP, 0, 15)
            attempts["user"] = lambda: os.setpriority(os.PRIO_USER, 0, 15)
            attempts["class of its own"] = lambda: call(144, 0, 3, struct.pack("i", 0))
            verdict(attempts)
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "more_signals_than_its_share",
        """
        import os, signal
        signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 65))
        import ctypes
        libc, sent, value = ctypes.CDLL(None), 0, ctypes.c_void_p(0)
        while sent < 2000 and libc.sigqueue(os.getpid(), 40, value) == 0:
            sent += 1
        print("breached" if sent > 500 else "denied")
        """,
        WA,
        cases=BREACH,
    ),
    row(
        "more_pipes_than_its_share",
        """
        import fcntl, os
        kept, size = [], 0
        try:
            while True:
                r, w = os.pipe()
                os.close(w)
                kept.append(r)
                try:
                    fcntl.fcntl(r, 1031, 1 << 20)
                except OSError:
                    pass
                size += fcntl.fcntl(r, 1032)
        except OSError:
            pass
        print("breached" if size > len(kept) << 16 else "denied")
        """,
        WA,
        cases=BREACH,
    ),
    row(
        "last_to_go_when_memory_is_short",
        SYSCALL
        + textwrap.dedent(
            """
            libc.prctl(4, 1, 0, 0, 0)
            import subprocess
            tries = '''
            for name, value in (("oom_score_adj", "0"), ("oom_adj", "0")):
                try:
                    open("/proc/self/" + name, "w").write(value)
                except OSError:
                    pass
            import os
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
            print(open("/proc/self/oom_score_adj").read().strip(), flush=True)
            '''.replace("\\n            ", "\\n")
            exec(tries)
            if pid == 0:
                os._exit(0)
            os.execv(sys.executable, [sys.executable, "-S", "-c", tries])
            """
        ),
        OK,
        cases=(StdinCase("", "1000\n1000\n1000\n1000\n"),),
    ),
    row(
        "writes_about_its_processes",
        SYSCALL
        + TRY
        + textwrap.dedent(
            """
            libc.prctl(4, 1, 0, 0, 0)
            attempts = {}
            for pid in ("self", str(os.getppid()), "1"):
                for name in os.listdir("/proc/self"):
                    path = "/proc/%s/%s" % (pid, name)
                    if os.path.isfile(path) and name not in ("exe", "mem"):
                        attempts[path] = lambda path=path: os.close(os.open(path, os.O_WRONLY))
            verdict(attempts)
            """
        ),
        WA,
        cases=BREACH,
        note="nice of the session (autogroup), what is dumped, the slack of timers, uid maps",
    ),
    row(
        "times_of_what_is_shared",
        TRY
        + textwrap.dedent(
            """
            attempts = {}
            for top in ("/dev", "/sandbox", "/tmp", "/rlrf", "/proc", "/sys", "/etc", "/"):
                for name in [""] + (os.listdir(top) if os.path.isdir(top) else []):
                    path = os.path.join(top, name)
                    if name.isdigit() or os.path.realpath(path).startswith(
                            (os.getcwd(), "/proc/self", "/proc/%d" % os.getpid(), "/dev/shm",
                             "/memfd:")):
                        continue
                    attempts[path] = lambda path=path: os.utime(path)
                    attempts[path + " x"] = lambda path=path: os.setxattr(path, "user.x", b"x")
                    attempts[path + " m"] = lambda path=path: os.chmod(path, 0o777)
            verdict(attempts)
            """
        ),
        WA,
        cases=BREACH,
    ),
    row(
        "core_files",
        "import resource\nprint(resource.getrlimit(resource.RLIMIT_CORE))",
        OK,
        cases=(StdinCase("", "(1, 1)\n"),),
        note="at 0 the kernel still starts the helper of a host that pipes them to one",
    ),
]

# --- between the cases of one program -------------------------------------------------------------

_FILES = """
import fcntl, os, stat
def mine():  # its open files; how it reads and writes them is not told apart
    found = []
    for fd in range(64):
        try:
            if "memfd" in os.readlink("/proc/self/fd/%d" % fd):
                found.append(fd)
        except OSError:
            pass
    assert len(found) == 4, found
    return found
def mark():
    for fd in mine():
        for f in (lambda: os.setxattr(fd, "user.left", b"x"),
                  lambda: os.fchmod(fd, 0o701),
                  lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_NOATIME),
                  lambda: fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid()),
                  lambda: fcntl.fcntl(fd, fcntl.F_SETSIG, 40),
                  lambda: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK),
                  lambda: fcntl.flock(fd, fcntl.LOCK_EX),
                  lambda: fcntl.fcntl(fd, 1033, 8),
                  lambda: fcntl.ioctl(fd, 0x40086602, (0xc0).to_bytes(8, "little")),
                  lambda: os.utime(fd, (4242, 4242)),
                  lambda: os.pwrite(fd, b"left" * 1000, 1 << 20) if fd == 0 else None,
                  lambda: os.lseek(fd, 1 << 19, 0) if fd in (0, 2) else None):
            try:
                f()
            except (OSError, AttributeError):
                pass
def marked():
    got = []
    for fd in mine():
        s, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
        got += os.listxattr(fd)
        got += [stat.S_IMODE(s.st_mode)] if s.st_mode & 0o777 != 0o777 else []
        got += ["flags"] if flags & (os.O_NONBLOCK | os.O_NOATIME) else []
        got += ["append"] if bool(flags & os.O_APPEND) != (fd in (1, 2)) else []
        got += ["owner"] if fcntl.fcntl(fd, fcntl.F_GETOWN) or fcntl.fcntl(fd, 11) else []
        got += ["seals"] if fcntl.fcntl(fd, 1034) & 8 else []
        got += ["times"] if s.st_mtime == 4242 else []
        got += ["size"] if s.st_size > 1000 else []
        got += ["place"] if fd == 2 and os.lseek(fd, 0, 1) else []
        inode = bytearray(8)
        try:
            fcntl.ioctl(fd, 0x80086601, inode)
            got += ["inode flags"] if any(inode) else []
        except OSError:
            pass
        other = os.open("/proc/self/fd/%d" % fd, os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(other)
        except OSError:
            got.append("lock")
    return got
"""

_FOLDER = """
import os, struct
def mark():
    try:
        os.setxattr(".", "user.left", b"x")
    except OSError:
        pass
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, rights, who) for tag, rights, who in
        ((1, 7, 0xffffffff), (4, 7, 0xffffffff), (0x10, 7, 0xffffffff), (0x20, 7, 0xffffffff)))
    for name in ("system.posix_acl_default", "system.posix_acl_access"):
        try:
            os.setxattr(".", name, acl)
        except OSError:
            pass
    os.mkdir("d")
    open("d/f", "w").write("x")
    os.link("d/f", "g")
    os.symlink("..", "s")
    os.mkfifo("fifo")
    os.utime(".", (4242, 4242))
    os.chmod(".", 0o1000)
def marked():
    s = os.stat(".")
    got = os.listdir(".") + os.listxattr(".") + [oct(s.st_mode)] * (s.st_mode & 0o7777 != 0o700)
    return got + ["times"] * (4242 in (s.st_mtime, s.st_atime))
"""

_LEADER = """
import os, resource, signal
def mark():
    boss = os.getppid()
    for f in (lambda: os.setpriority(os.PRIO_PROCESS, boss, 12),
              lambda: os.setpriority(os.PRIO_PGRP, 0, 12),
              lambda: os.setpriority(os.PRIO_USER, 0, 12),
              lambda: os.sched_setaffinity(boss, [sorted(os.sched_getaffinity(0))[0]]),
              lambda: resource.prlimit(boss, resource.RLIMIT_NOFILE, (40, 40)),
              lambda: resource.prlimit(boss, resource.RLIMIT_STACK, (1 << 23, 1 << 23)),
              lambda: resource.prlimit(boss, resource.RLIMIT_FSIZE, (1, 1)),
              lambda: open("/proc/self/autogroup", "w").write("19"),
              lambda: open("/proc/%d/oom_score_adj" % boss, "w").write("0"),
              lambda: os.kill(boss, signal.SIGCONT),
              lambda: os.kill(boss, signal.SIGCHLD),
              lambda: os.kill(boss, signal.SIGWINCH),
              lambda: os.setpgid(boss, boss),
              lambda: os.umask(0o111),
              lambda: os.nice(5),
              lambda: os.environ.update(LEFT="x")):
        try:
            f()
        except OSError:
            pass
def marked():
    got = ["LEFT"] if "LEFT" in os.environ else []
    got += ["nice"] if os.nice(0) != os.getpriority(os.PRIO_PROCESS, 1) else []
    got += ["files"] if resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 64 else []
    got += ["size"] if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 16 << 20 else []
    got += ["stack"] if resource.getrlimit(resource.RLIMIT_STACK)[0] < 1 << 27 else []
    got += ["umask"] if os.umask(0o22) == 0o111 else []
    got += ["pending"] if signal.sigpending() else []
    try:
        got += ["session"] if " nice 0" not in open("/proc/self/autogroup").read() else []
    except OSError:
        pass
    return got
"""

_ROOM = (
    IN_FLIGHT
    + """
def mark():
    in_flight(deleted_files())
    in_flight(listeners())
    if os.fork() == 0:  # with all that its parent has open
        os.setsid()
        while True:
            pass
def marked():
    try:
        room()
        return heard()
    except OSError as error:
        return [error]
"""
)

_LOOKS = """
if __name__ == "__main__":
    print(f(input()))
"""
_CASE = """
def f(what):
    if what == "plant":
        mark()
    elif marked():
        return repr(marked())
    return "done"
"""

BETWEEN_CASES = [
    row(name + kind, code + _CASE + main, OK, cases=cases, entry=entry, limits=limits)
    for kind, main, cases, entry in (("", _LOOKS, THEN, None), ("_call", "", THEN_CALL, "f"))
    for name, code, limits in (
        ("cases_and_their_files", _FILES, None),
        ("cases_and_their_folder", _FOLDER, None),
        ("cases_and_their_leader", _LEADER, None),
        ("cases_and_their_room", _ROOM, LONGER),
    )
]

# --- what honest programs do, and must go on doing ------------------------------------------------

HONEST = [
    row(
        "asyncio",
        """
        import asyncio, socket, sys
        async def serve(reader, writer):
            data = await reader.readexactly(3 << 20)
            writer.writelines([data[:100], b"!" * (1 << 20)])
            await writer.drain()
            writer.close()
        async def main():
            server = await asyncio.start_unix_server(serve, "s")
            reader, writer = await asyncio.open_unix_connection("s")
            writer.write(b"x" * (3 << 20))
            await writer.drain()
            got = await reader.read(-1)
            assert len(got) == (1 << 20) + 100, len(got)
            writer.close()
            server.close()
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-S", "-c", "print('child')", stdout=asyncio.subprocess.PIPE)
            assert (await process.communicate())[0] == b"child\\n"
            loop = asyncio.get_running_loop()
            assert await loop.run_in_executor(None, sum, [1, 2]) == 3
            return sum(await asyncio.gather(*(asyncio.sleep(0, n) for n in range(5))))
        assert asyncio.run(main()) == 10
        print("ok")
        """,
        OK,
        cases=PLAIN,
        limits=LONGER,
    ),
    row(
        "processes_and_threads",
        """
        import concurrent.futures, multiprocessing, queue, subprocess, sys, threading
        context = multiprocessing.get_context("fork")
        def work(end):
            end.send({"x": [1, 2]})
            end.send_bytes(b"y" * 200000)
            end.close()
        here, there = context.Pipe()
        child = context.Process(target=work, args=(there,))
        child.start()
        there.close()
        assert here.recv() == {"x": [1, 2]} and len(here.recv_bytes()) == 200000
        child.join()
        assert child.exitcode == 0
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda n: n * n, range(4))) == [0, 1, 4, 9]
        done = queue.Queue()
        threading.Thread(target=done.put, args=(1,)).start()
        assert done.get() == 1
        run = subprocess.run([sys.executable, "-S", "-c", "import sys; print(sys.stdin.read())"],
                             input="a" * 100000, capture_output=True, text=True)
        assert run.stdout == "a" * 100000 + "\\n" and run.returncode == 0, run
        print("ok")
        """,
        OK,
        cases=PLAIN,
        limits=LONGER,
    ),
    row(
        "pools_of_processes",
        """
        import concurrent.futures, multiprocessing
        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
        with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
            assert list(pool.map(abs, [-1, -2])) == [1, 2]
        with context.Manager() as manager:
            shared = manager.dict(a=1)
            assert shared["a"] == 1
        lock, value = context.Lock(), context.Value("i", 3)
        with lock:
            assert value.value == 3
        print("ok")
        """,
        OK,
        cases=PLAIN,
        limits=LONGER,
        backends=("bubblewrap",),
        note="in a container there is no /dev/shm for the semaphores",
    ),
    row(
        "files",
        """
        import fcntl, mmap, os, pathlib, shutil, tempfile
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "a")
            path.touch()
            path.write_text("x" * 10)
            shutil.copy2(path, path.with_name("b"))
            os.mkdir(os.path.join(folder, "c"))
            os.rename(path, os.path.join(folder, "c", "d"))
            os.replace(os.path.join(folder, "b"), path)
            os.link(path, os.path.join(folder, "c", "e"))
            os.truncate(path, 5)
            with open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                fcntl.lockf(file, fcntl.LOCK_EX)
                assert fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 9) >= 9
                fcntl.fcntl(file, fcntl.F_SETFL, os.O_NONBLOCK)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                os.fsync(file)
                assert os.preadv(file.fileno(), [bytearray(3)], 0) == 3
                assert os.pwritev(file.fileno(), [b"yy", b"z"], 0) == 3
                with mmap.mmap(file.fileno(), 0) as m:
                    m[0:1] = b"q"
            assert path.read_bytes() == b"qyzxx"
        os.sync()
        with tempfile.TemporaryFile() as file, tempfile.NamedTemporaryFile() as other:
            file.write(b"x")
            shutil.copyfileobj(file, other)
        with open("/dev/null", "wb") as null, open("/dev/urandom", "rb") as noise:
            null.write(noise.read(3))
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "sqlite",
        """
        import sqlite3
        with sqlite3.connect("data.db") as base:
            base.execute("create table t (x)")
            base.executemany("insert into t values (?)", [(n,) for n in range(100)])
        with sqlite3.connect("data.db") as base:
            assert base.execute("select sum(x) from t").fetchone() == (4950,)
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "its_own_limits_and_priorities",
        """
        import os, resource, select, signal, time
        os.nice(1)
        os.setpriority(os.PRIO_PROCESS, 0, 2)
        os.sched_setaffinity(0, os.sched_getaffinity(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))
        assert resource.prlimit(0, resource.RLIMIT_NOFILE) == (50, 60)
        rung = []
        signal.signal(signal.SIGALRM, lambda *a: rung.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while not rung:
            signal.pause()
        with select.epoll() as watch:
            r, w = os.pipe()
            watch.register(r, select.EPOLLIN)
            os.write(w, b"x")
            assert watch.poll(1) == [(r, select.EPOLLIN)]
        if hasattr(os, "eventfd"):
            event = os.eventfd(1)
            assert os.eventfd_read(event) == 1
        assert os.cpu_count() >= 1 and time.get_clock_info("monotonic")
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "sendmsg_of_data",
        """
        import socket
        a, b = socket.socketpair()
        assert a.sendmsg([b"x", bytearray(b"yz")]) == 3 and b.recv(9) == b"xyz"
        assert b.recvmsg.__name__ == "recvmsg"
        a.sendall(b"last")
        assert b.recvmsg(9)[0] == b"last"
        u = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        u.bind("u")
        a = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        assert a.sendmsg([b"to"], (), 0, "u") == 2 and u.recv(9) == b"to"
        print("ok")
        """,
        OK,
        cases=PLAIN,
    ),
    row(
        "numpy_if_there_is_one",
        """
        try:
            import numpy
        except ImportError:
            print("ok")
        else:
            a = numpy.arange(10000.0).reshape(100, 100)
            assert (a @ a).shape == (100, 100)
            numpy.save("a.npy", a)
            assert (numpy.load("a.npy", mmap_mode="r") == a).all()
            print("ok")
        """,
        OK,
        cases=PLAIN,
        limits=Limits(8, 24, memory_mb=512),
    ),
]

KERNEL_HOSTILE = [*ATTEMPTS, *BETWEEN_CASES]
KERNEL_CONTROLS = HONEST
__all__ = ["KERNEL_CONTROLS", "KERNEL_HOSTILE", "KERNEL_PAIRS", "RE", "TL"]
