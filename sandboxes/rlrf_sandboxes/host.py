"""What of this machine's Python goes into a sandbox: an allow-list, for images and for bubblewrap.

An interpreter, its standard library, the shared libraries they need, and packages that were named.
Never a tree that packages are installed into: rlrf's environments bring their answers along, and
where those lie a program could read them.

It does not vet the packages that are named, except that those which bring environments are refused:
what else they hold, programs can read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from rlrf.errors import UsageError

PACKAGES_PATH = "/rlrf/packages"
"""Where packages lie inside; on ``PYTHONPATH``, as the runner starts without ``site``."""
OLDEST_PYTHON = (3, 8)
ENVIRONMENTS = "rlrf.environments"
"""The group of entry points that says that a distribution brings environments."""

_FACTS = """
import json, os, sys, sysconfig
print(json.dumps([
    os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
    sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), list(sys.version_info[:2]),
    getattr(sys, "platlibdir", "lib"), sys.implementation.name,
    sorted(getattr(sys, "stdlib_module_names", ())),
]))
"""


class Python:
    """An interpreter of this machine.

    Attributes:
        executable: the real binary.
        stdlib: its standard library.
        dynload: the compiled part of it.
        version: e.g. ``(3, 11)``.
        platlibdir: ``lib``, or ``lib64`` on some systems.
        usable: whether the runner works in it.

    Raises:
        OSError, subprocess.CalledProcessError, ValueError: it is none.
    """

    def __init__(self, path: str) -> None:
        # -I: whatever folder rlrf was started in must not be imported from.
        told = output([path, "-I", "-S", "-c", _FACTS])
        executable, stdlib, platstdlib, version, self.platlibdir, name, modules = json.loads(told)
        self.executable, self.stdlib = Path(executable), Path(stdlib)
        self.dynload = Path(platstdlib) / "lib-dynload"
        self.version = (int(version[0]), int(version[1]))
        self.usable = (
            name == "cpython"
            and self.version >= OLDEST_PYTHON
            and (self.stdlib / "json" / "__init__.py").is_file()
        )
        self.name = f"python{self.version[0]}.{self.version[1]}"
        self._modules = frozenset(modules)

    def standard(self, name: str) -> bool:
        """Whether an entry of the folder :attr:`stdlib` is a part of the standard library.

        Packages are installed into a folder in there, and somebody may have put more beside it.
        """
        stem = name.partition(".")[0]
        if not self._modules:  # before 3.10 it cannot say
            return stem not in _PACKAGES
        return stem in self._modules or stem in _STANDARD or stem.startswith(_STANDARD_PREFIXES)

    def extensions(self) -> list[Path]:
        """The compiled modules of the standard library, without those that are left out."""
        return [path for path, name in files(self.dynload, left_out) if ".so" in name]


_PACKAGES = ("site-packages", "dist-packages")
_STANDARD = frozenset(("lib-dynload", "__pycache__", "LICENSE", "EXTERNALLY-MANAGED", "test"))
_STANDARD_PREFIXES = ("config-", "_sysconfigdata", "__hello__", "__phello__", "_distutils_system")
_LEFT_OUT = frozenset(
    "test tests idlelib ensurepip lib2to3 tkinter turtledemo site-packages dist-packages "
    "__pycache__ lib-dynload sitecustomize.py usercustomize.py".split()
)


def left_out(name: str) -> bool:
    """Parts of the standard library that no program needs, by the name of file or folder."""
    if name in _LEFT_OUT or name.startswith("config-"):
        return True
    return re.match(r"_test|_ctypes_test|_xxtest|xxlimited|_tkinter|nis\.", name) is not None


def files(folder: Path, skip: Callable[[str], bool]) -> Iterator[tuple[Path, str]]:
    """Regular files below a folder and their relative names; links are followed to files."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not skip(f))
        for name in sorted(names):
            path = Path(root, name)
            if not skip(name) and not name.endswith(".pyc") and path.is_file():
                yield path, str(path.relative_to(folder))


def libraries(executable: Path, objects: Sequence[Path]) -> tuple[dict[str, str], str | None]:
    """The shared libraries that an executable and compiled modules need.

    Returns:
        The path of each by the name it is asked for, and the path of the loader.
    """
    found: dict[str, str] = {}
    loader = None
    for start in range(0, max(1, len(objects)), 64):
        # What `ldd` does, for all of them at once: it takes a process for each.
        preload = ":".join(map(str, objects[start : start + 64]))
        trace = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": preload, "OPENBLAS_NUM_THREADS": "1"}
        told = output([str(executable)], check=False, environment=trace)
        for name, path in re.findall(r"^\s+(\S+) => (/\S+) \(0x", told, re.MULTILINE):
            found.setdefault(name, path)
        for path in re.findall(r"^\s+(/\S*/ld[^/\s]*\.so\S*) \(0x", told, re.MULTILINE):
            loader = path
    if "libc.so.6" in found:
        unwinder = os.path.join(os.path.dirname(found["libc.so.6"]), "libgcc_s.so.1")
        if os.path.exists(unwinder):  # the C library loads it by name when a thread ends early
            found.setdefault("libgcc_s.so.1", unwinder)
    return found, loader


# --- distributions ----------------------------------------------------------------------------


def distributions(names: Sequence[str]) -> list[metadata.Distribution]:
    """Distributions installed beside rlrf by name, and what they require without an extra.

    Raises:
        UsageError: one is not installed, or brings environments.
    """
    found: dict[str, metadata.Distribution] = {}
    todo = [(name, "") for name in names]
    while todo:
        name, of = todo.pop(0)
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = metadata.distribution(name)
        except metadata.PackageNotFoundError as error:
            if of:  # a requirement of another platform; markers are not evaluated here
                continue
            raise UsageError(
                f"package {name!r} is not installed beside rlrf; install it here first: "
                f"{sys.executable} -m pip install {name}"
            ) from error
        if key == "rlrf" or any(e.group == ENVIRONMENTS for e in found[key].entry_points):
            raise brings_answers(f"package {name!r}" + (f", which {of!r} requires," if of else ""))
        for requirement in found[key].requires or ():
            matched = re.match(r"[A-Za-z0-9._-]+", requirement)
            if matched and "extra" not in requirement.partition(";")[2]:
                todo.append((matched[0], key))
    return [found[key] for key in sorted(found)]


def brings_answers(what: str) -> UsageError:
    """The refusal of something that holds environments."""
    return UsageError(
        f"{what} brings environments of rlrf and with them their answers, which must not be where "
        "programs can read them; leave it out"
    )


def declares_environments(entry_points: Path) -> bool:
    """Whether a distribution's ``entry_points.txt`` names environments."""
    try:
        return f"[{ENVIRONMENTS}]" in entry_points.read_text(errors="replace")
    except OSError:
        return False


_LOCATE = """
import json, os, sys
from importlib import metadata
places = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
found = {}
for name in sys.argv[1:]:
    dist = next(iter(metadata.distributions(name=name, path=places)), None)
    if dist is None:
        continue
    place = str(dist.locate_file(""))
    record = dist.read_text("RECORD") or ""
    tops = {line.split(",")[0].strip('"').partition("/")[0] for line in record.splitlines()}
    if not record:  # as Debian's are
        for word in (dist.read_text("top_level.txt") or name).split():
            tops |= {e for e in os.listdir(place) if e.partition(".")[0] == word}
    tops -= {"..", "", "__pycache__"}
    groups = [e.partition("]")[0] for e in (dist.read_text("entry_points.txt") or "").split("[")]
    found[name] = [place, sorted(tops), groups, dist.requires or []]
print(json.dumps(found))
"""


def located(python: Python, names: Sequence[str], *, optional: bool = False) -> dict[str, str]:
    """Where packages of an interpreter's own lie, with what they require: path by name.

    Args:
        python: the interpreter.
        names: of distributions.
        optional: whether they may be missing.

    Raises:
        UsageError: one is missing, or brings environments.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    todo = list(names)
    while todo:
        seen.update(todo)
        # With `site`, which knows where its packages are.
        told = output([str(python.executable), "-I", "-c", _LOCATE, *todo])
        there = json.loads(told.splitlines()[-1])
        for name in names:
            if name in todo and name not in there and not optional:
                raise UsageError(
                    f"package {name!r} is not installed for the sandbox's {python.executable}; "
                    "install it there, or give another `python`"
                )
        todo = []
        for name, (place, tops, groups, requires) in there.items():
            if name.lower() == "rlrf" or ENVIRONMENTS in groups:
                raise brings_answers(f"package {name!r}")
            found |= {top: os.path.join(place, top) for top in tops}
            for requirement in requires:
                matched = re.match(r"[A-Za-z0-9._-]+", requirement)
                if matched and "extra" not in requirement.partition(";")[2]:
                    todo += [matched[0]] if matched[0] not in seen else []
    return {name: path for name, path in found.items() if os.path.exists(path)}


def output(
    command: list[str],
    stdin: str = "",
    check: bool = True,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What a program of this machine prints."""
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]!r} is not there, or cannot be run")
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        check=check,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
    )
    return done.stdout
