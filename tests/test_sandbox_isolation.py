"""The system-call filter, number by number, and the decisions it carries out."""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rlrf import run_sync
from rlrf.sandbox import Program, StdinCase, open_sandbox
from rlrf_sandboxes import runner
from tests.backends import needs_bwrap
from tests.hostile import CONTROLS, HOSTILE, LEAVING, PAIRS
from tests.hostile_kernel import KERNEL_CONTROLS, KERNEL_HOSTILE, KERNEL_PAIRS

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, KILLED = "allowed", "killed"


def verdict(program: bytes, arch: int, number: int, args: tuple[int, ...]) -> str | int:
    """What a filter says of a call: an interpreter of the BPF that it uses."""
    args = (*args, *(0,) * (6 - len(args)))
    data = struct.pack("=iIQ6Q", number, arch, 0, *args)
    lines = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            if value & 0x7FFF0000 == 0x00050000:
                return value & 0xFFFF
            return {0x7FFF0000: ALLOWED, 0x80000000: KILLED}[value]
        else:
            test = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            at += yes if test else no


def said(machine: str, number: int, *args: int, arch: int | None = None) -> set[str | int]:
    """What becomes of a program's call: both filters are asked, and a refusal wins."""
    programs = runner._seccomp_programs(machine)
    answers = {verdict(p, ARCH[machine] if arch is None else arch, number, args) for p in programs}
    return answers - {ALLOWED} or {ALLOWED}


@pytest.mark.parametrize("machine", ARCH)
def test_every_number_is_refused_or_allowed_as_the_list_says(machine):
    which = runner._MACHINES.index(machine)
    refused = {}
    for code, *texts in runner._REFUSED:
        for part in texts[which].split():
            low, _, high = part.partition("-")
            refused |= dict.fromkeys(range(int(low), int(high or low) + 1), code)
    by_arguments = {numbers[which] for numbers in runner._BY_NAME.values()}
    assert not by_arguments & set(refused)
    for number in range(700):
        if number in by_arguments:
            continue
        known = number < 335 or number in runner._NEWER_ALLOWED
        wanted = refused.get(number, ALLOWED if known else errno.ENOSYS)
        assert said(machine, number) == {wanted}, number
    assert said(machine, 39 + 0x40000000) == {errno.ENOSYS}  # x32
    assert said(machine, 0xFFFFFFFF - (1 << 32)) == {errno.ENOSYS}


@pytest.mark.parametrize("machine", ARCH)
def test_calls_of_another_processor_end_the_program(machine):
    for arch in (0x40000003, 0x40000028, 0, *(set(ARCH.values()) - {ARCH[machine]})):
        assert said(machine, 1, arch=arch) == {KILLED}


@pytest.mark.parametrize("machine", ARCH)
def test_calls_that_depend_on_their_arguments(machine):
    number = {name: at[runner._MACHINES.index(machine)] for name, at in runner._BY_NAME.items()}
    for name in ("socket", "socketpair"):
        assert said(machine, number[name], 1, 1) == {ALLOWED}
        for family in (0, 2, 10, 16, 17, 38, 40, 0x100000001 << 1):
            assert said(machine, number[name], family, 1) == {errno.EAFNOSUPPORT}, family
    for name in ("prlimit64", "sched_setaffinity"):
        assert said(machine, number[name], 0, 7) == {ALLOWED}
        assert said(machine, number[name], 1, 7) == {errno.EPERM}
        assert said(machine, number[name], (1 << 64) - 1, 7) == {errno.EPERM}
    assert said(machine, number["setpriority"], 0, 0, 9) == {ALLOWED}
    for which, who in ((0, 1), (1, 0), (2, 0)):
        assert said(machine, number["setpriority"], which, who, 9) == {errno.EPERM}
    for command in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 36, 37, 1030, 1032, 1034):
        assert said(machine, number["fcntl"], 3, command) == {ALLOWED}, command
    for command in (1024, 1025, 1026, 1031, 1033, 1036, 1038, 1040, 0xFFFFFFFF):
        assert said(machine, number["fcntl"], 3, command) == {errno.EPERM}, command
    assert said(machine, number["clone"], 0x01200011) == {ALLOWED}  # fork
    assert said(machine, number["clone"], 0x003D0F00) == {ALLOWED}  # a thread
    for namespace in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000):
        assert said(machine, number["clone"], namespace | 17) == {errno.EPERM}
    assert said(machine, number["mount"], 0) == {errno.EPERM}


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").exists(), reason="no headers")
@pytest.mark.parametrize("machine", ARCH)
def test_the_numbers_are_those_of_the_kernels_headers(machine):
    x86 = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    header = {"x86_64": x86, "aarch64": Path("/usr/include/asm-generic/unistd.h")}[machine]
    if not header.exists():
        pytest.skip("the headers are another processor's")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text()))
    number = {name: int(value) for name, value in found.items()}
    which = runner._MACHINES.index(machine)
    for name, at in runner._BY_NAME.items():
        assert number[name] == at[which], name
    refused = """
        sendmsg sendmmsg io_setup io_submit io_pgetevents inotify_init inotify_init1
        inotify_add_watch fanotify_init memfd_create shmget semget msgget mq_open add_key keyctl
        unshare setns umount2 pivot_root chroot open_by_handle_at name_to_handle_at ptrace
        process_vm_readv process_vm_writev kcmp migrate_pages move_pages bpf perf_event_open
        userfaultfd sched_setparam sched_setscheduler sched_setattr ioprio_set personality acct
        quotactl swapon reboot sethostname init_module finit_module kexec_load syslog
        clock_settime mincore preadv2 pwritev2 sync syncfs fadvise64 readahead modify_ldt iopl
    """
    for name in refused.split():
        if name in number:  # not every processor has all of them
            assert ALLOWED not in said(machine, number[name]), name
    allowed = """
        read write openat close mmap munmap brk clone_ execve wait4 exit_group futex sendto recvfrom
        recvmsg pipe2 dup3 flock fsync ftruncate getdents64 epoll_pwait eventfd2 timerfd_create
        kill tgkill rt_sigaction setitimer timer_create sched_getaffinity getpriority
        set_robust_list rseq statx close_range utimensat setxattr fchmodat renameat2 prctl seccomp
        getrandom membarrier copy_file_range splice mlock madvise bind listen accept4 connect
    """
    for name in allowed.split():
        if name in number:
            assert said(machine, number[name]) == {ALLOWED}, name


def test_every_decision_names_a_program_that_exists():
    page = Path(__file__).parents[1] / "design" / "isolation.md"
    if not page.exists():
        pytest.skip("not in a checkout")
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| ")]
    names = {
        r.name
        for rows in (HOSTILE, KERNEL_HOSTILE, CONTROLS, KERNEL_CONTROLS, LEAVING)
        for r in rows
    }
    names |= {p.name for p in (*PAIRS, *KERNEL_PAIRS)}
    for _, what, decision, _, tests, _ in rows[1:]:
        named = set(re.findall(r"`(\w+)`", tests))
        assert named <= names, what
        assert named or "rows" in tests or "**left**" in decision, what


@needs_bwrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has other uids to give")
def test_slots_of_bubblewrap_have_an_account_of_their_own():
    code = "print(open('/proc/mounts').read().partition('tmpfs /tmp')[2].partition('uid=')[2][:12])"

    async def outside() -> str:
        async with open_sandbox("bubblewrap", slots=1) as pool:
            report = await pool.run(Program(code), [StdinCase("", "")])
            return report.cases[0].raw.text

    first, second = run_sync(outside()), run_sync(outside())
    assert first != second
    assert min(int(uid.partition(",")[0]) for uid in (first, second)) not in (0, 65534)


def test_programs_that_use_what_python_has_patched_get_the_systems_errors():
    """The stand-in for `socket.sendmsg`, outside of any sandbox."""
    code = """
import array, socket, sys
sys.path.insert(0, sys.argv[1])
from rlrf_sandboxes import runner
socket.socket.sendmsg = runner.send_without_descriptors
a, b = socket.socketpair()
assert a.sendmsg([b"x", b"y"]) == 2 and b.recv(9) == b"xy"
try:
    a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
except PermissionError as error:
    print(error.errno)
"""
    where = str(Path(runner.__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", code, where], capture_output=True, text=True)
    assert run.stdout == f"{errno.EPERM}\n", run.stderr


def test_a_runner_that_is_left_before_it_has_begun_ends_nobody(monkeypatch):
    """Below a zygote that was never forked, process 0, are all processes of the machine."""
    ended: list[int] = []
    monkeypatch.setattr(runner.os, "kill", lambda pid, number: ended.append(pid))
    monkeypatch.setattr(runner.os, "_exit", lambda code: ended.append(-code))
    monkeypatch.setattr(runner.os, "rmdir", lambda path: None)
    supervisor = object.__new__(runner.Supervisor)
    supervisor.mode, supervisor.zygote, supervisor.zygote_pid = "plain", None, 0
    supervisor.leave()
    assert ended == [0]
    supervisor.kill_tree()
    assert ended == [0]
