"""Images of the docker sandbox: built from Python's, packed from the host, or from a folder.

An image is a Python with rlrf's runner at ``/rlrf/runner.py`` as entry point. Its tag and its label
``org.rlrf.runner`` name the runner by hash, so an image of another version is never used by
mistake. :func:`import_from_host` needs no network and takes seconds: it packs this machine's own
Python, its standard library and the shared libraries they need, and nothing else (no shell).

It does not vet what a base image, a root file system or a named package holds, except that packages
which bring environments are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rlrf.errors import InfraError, UsageError
from rlrf_sandboxes import daemon, runner
from rlrf_sandboxes.host import (
    PACKAGES_PATH,
    Python,
    brings_answers,
    declares_environments,
    distributions,
    files,
    left_out,
    libraries,
    output,
)

REPOSITORY = "rlrf-sandbox"
RUNNER = Path(__file__).with_name("runner.py")
DOCKERFILE = Path(__file__).with_name("images") / "Dockerfile"
RUNNER_PATH = "/rlrf/runner.py"
IMAGE_LABEL = daemon.PREFIX + "image"
RUNNER_LABEL = daemon.PREFIX + "runner"
OFFLINE_REMEDY = "use `rlrf sandbox import --from-host`"

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROBE = "import json, math, heapq, decimal, re, collections, bisect, random; print(6 * 7)"


def runner_hash() -> str:
    """SHA-256 of the runner that this installation speaks to."""
    return hashlib.sha256(RUNNER.read_bytes()).hexdigest()


def tag() -> str:
    """The name of the image that holds this runner."""
    return f"{REPOSITORY}:{runner_hash()[:12]}"


def find(client: Any, image: str | None = None) -> str | None:
    """The image to run.

    Args:
        client: a ``docker.APIClient``.
        image: an image that was asked for; None for this runner's own.

    Returns:
        Its name; None if the daemon does not have it, or it holds another runner.
    """
    name = image or tag()
    return name if runner_of(client, name) == runner_hash() else None


def runner_of(client: Any, image: str) -> str | None:
    """The hash of the runner in an image: "" if it is not one of ours, None if it is not there."""
    docker = daemon.sdk()
    try:
        about = client.inspect_image(image)
    except docker.errors.NotFound:
        return None
    found = ((about.get("Config") or {}).get("Labels") or {}).get(RUNNER_LABEL, "")
    return str(found)


# --- building from Python's image -------------------------------------------------------------


def build(client: Any, packages: Sequence[str] = (), base: str | None = None) -> str:
    """Build the image with ``docker build``; needs a registry, and PyPI for packages.

    Args:
        client: a ``docker.APIClient``.
        packages: pip requirements to install, e.g. ``("numpy",)``.
        base: the image to start from; None for the one that is pinned in the Dockerfile.

    Returns:
        The name of the image.

    Raises:
        UsageError: a package is no plain requirement.
        InfraError: the build failed.
    """
    docker = daemon.sdk()
    args = {"PACKAGES": " ".join(_requirement(p) for p in packages)}
    if base is not None:
        args["BASE"] = base
    said: list[str] = []
    try:
        with tempfile.TemporaryFile() as context:
            write_context(context)
            context.seek(0)
            for line in client.build(
                fileobj=context,
                custom_context=True,
                tag=tag(),
                buildargs=args,
                labels=_image_labels(),
                rm=True,
                forcerm=True,
                decode=True,
            ):
                if "error" in line:
                    raise _build_error(str(line["error"]), said)
                said += str(line.get("stream") or "").split("\n")
    except (docker.errors.DockerException, OSError) as error:
        raise _build_error(str(error), said) from error
    return _proven(client, tag())


def _requirement(package: str) -> str:
    if re.match(r"rlrf\b", package, re.IGNORECASE):
        raise brings_answers(f"package {package!r}")
    # It ends up in a shell command and before pip, so no options, paths, addresses, or quotes.
    if not re.fullmatch(
        r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?(==[A-Za-z0-9.+!]+)?", package
    ):
        raise UsageError(
            f"package {package!r} must be a plain name or name==version, e.g. numpy==2.1.0"
        )
    return package


def _build_error(why: str, said: list[str]) -> InfraError:
    last = [line for line in said if re.search(r"error", line, re.IGNORECASE)][-1:]
    told = "; ".join(" ".join(part.split()) for part in (why, *last))
    return InfraError(
        f"the image could not be built: {told}. Is a registry reachable? If not, {OFFLINE_REMEDY}",
        kind="image_build",
        retryable=False,
    )


def write_context(out: IO[bytes]) -> None:
    """Write the build context, a tar archive that is the same every time."""
    with _Archive(out) as archive:
        archive.file("Dockerfile", DOCKERFILE)
        archive.file("runner.py", RUNNER)


# --- packing the host's Python ----------------------------------------------------------------


def import_from_host(client: Any, packages: Sequence[str] = (), python: str | None = None) -> str:
    """Make the image of a Python of this machine; needs no network.

    Args:
        client: a ``docker.APIClient``.
        packages: names of distributions that are installed beside rlrf, packed with what they
            require.
        python: the interpreter; None for the system's, else the one that rlrf runs on.

    Returns:
        The name of the image.

    Raises:
        UsageError: no interpreter fits, or a package is not installed, or brings environments.
        InfraError: the daemon did not take the image, or it does not run.
    """
    with tempfile.TemporaryFile() as out:
        inside = pack_host(out, packages, python)
        return _import(client, out, inside)


def pack_host(out: IO[bytes], packages: Sequence[str] = (), python: str | None = None) -> str:
    """Write the root filesystem of :func:`import_from_host` as a tar archive.

    The same host gives the same bytes.

    Returns:
        The path of the interpreter inside.
    """
    found = _host_python(python, packages)
    dists = distributions(packages)
    with _Archive(out) as archive:
        _skeleton(archive)
        inside = _pack_python(archive, found)
        objects = found.extensions() + _pack_distributions(archive, dists)
        _pack_libraries(archive, found, objects)
        _pack_bytecode(archive, found)
    return inside


def _host_python(python: str | None, packages: Sequence[str]) -> Python:
    own: str = getattr(sys, "_base_executable", sys.executable)
    tried = []
    for path in [python] if python else ["/usr/bin/python3", own]:
        try:
            found = Python(path)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            tried.append(f"{path}: {error}")
            continue
        version = f"{found.version[0]}.{found.version[1]}"
        if not found.usable:
            tried.append(f"{path}: no CPython >= 3.8 with a whole standard library")
        elif packages and found.version != sys.version_info[:2]:
            # Compiled packages fit one version of Python only.
            mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
            tried.append(f"{path}: Python {version}, but the packages here are for {mine}")
        else:
            return found
    raise UsageError("no Python of this machine can be packed: " + "; ".join(tried))


def _skeleton(archive: _Archive) -> None:
    archive.data(
        "etc/passwd", b"root:x:0:0:root:/:/bin/false\nnobody:x:65534:65534::/:/bin/false\n"
    )
    archive.data("etc/group", b"root:x:0:\nnogroup:x:65534:\n")
    archive.data("etc/nsswitch.conf", b"passwd: files\ngroup: files\nhosts: files\n")
    for folder in ("dev", "proc", "sys", "sandbox", PACKAGES_PATH[1:], "usr/local/bin"):
        archive.folder(folder)
    archive.folder("tmp", 0o1777)
    archive.file(RUNNER_PATH[1:], RUNNER)
    utf8 = Path("/usr/lib/locale/C.utf8")  # C libraries older than 2.35 have it in files only
    for path in sorted(utf8.rglob("*")):
        if path.is_file():
            archive.file(f"usr/lib/locale/C.utf8/{path.relative_to(utf8)}", path)


def _pack_python(archive: _Archive, python: Python) -> str:
    # Where the interpreter finds it from where it lies itself.
    home = f"usr/{python.platlibdir}/{python.name}"
    for path, name in files(python.stdlib, left_out):
        if python.standard(PurePosixPath(name).parts[0]):
            archive.file(f"{home}/{name}", path)
    for path, name in files(python.dynload, left_out):
        archive.file(f"{home}/lib-dynload/{name}", path)
    executable = f"usr/bin/{python.name}"
    archive.file(executable, python.executable, 0o755)
    archive.link("usr/bin/python3", python.name)
    archive.link("usr/bin/python", python.name)
    return f"/{executable}"


def _pack_libraries(archive: _Archive, python: Python, objects: Sequence[Path]) -> None:
    """Pack the shared libraries that the interpreter and compiled modules need.

    Those that lie in odd places go where the C library lies, which is searched without
    ``ld.so.cache`` (making one for another root takes root's rights).
    """
    own = {os.path.realpath(path) for path in objects}
    found, loader = libraries(python.executable, objects)
    if loader is not None:
        archive.file(loader[1:], Path(loader), 0o755)  # it is found by its full path
    system = os.path.dirname(found.get("libc.so.6", "/usr/lib/libc.so"))
    for name, path in sorted(found.items()):
        if os.path.realpath(path) not in own:
            archive.file(f"{system[1:]}/{os.path.basename(name)}", Path(path), 0o755)


_COMPILE = """
import json, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
for source, target, name in json.load(sys.stdin):
    try:
        py_compile.compile(source, target, name, True, invalidation_mode=mode)
    except Exception:
        pass  # some files of lib2to3 and of packages are broken on purpose
"""


def _pack_bytecode(archive: _Archive, python: Python) -> None:
    """Compile what was packed: the image is read-only, and starting must not take long.

    "unchecked-hash", as the times of the files inside say nothing.
    """
    tag = f"cpython-{python.version[0]}{python.version[1]}"
    sources = {n: p for n, p in archive.packed.items() if n.endswith(".py") and n[:4] != "rlrf"}
    sources |= {n: p for n, p in archive.packed.items() if n.startswith(PACKAGES_PATH[1:] + "/")}
    names = sorted(n for n in sources if n.endswith(".py"))
    with tempfile.TemporaryDirectory(prefix="rlrf-") as scratch:
        jobs = [
            (str(sources[name]), str(Path(scratch, f"{i}.pyc")), f"/{name}")
            for i, name in enumerate(names)
        ]
        output([str(python.executable), "-I", "-S", "-B", "-c", _COMPILE], stdin=json.dumps(jobs))
        for name, (_, compiled, _) in zip(names, jobs, strict=True):
            if os.path.exists(compiled):
                path = PurePosixPath(name)
                archive.file(f"{path.parent}/__pycache__/{path.stem}.{tag}.pyc", Path(compiled))


# --- distributions ----------------------------------------------------------------------------


def _pack_distributions(archive: _Archive, dists: Sequence[metadata.Distribution]) -> list[Path]:
    """Pack installed distributions; returns their shared objects."""
    objects = []
    for dist in dists:
        if dist.files is None:
            raise UsageError(
                f"package {dist.name!r} does not say which files it has, so it cannot be packed"
            )
        if _is_editable(dist):
            raise UsageError(f"package {dist.name!r} is installed as editable; install it plainly")
        for file in sorted(dist.files, key=str):
            path, name = Path(str(file.locate())), str(file)
            # "..": scripts and headers, which lie outside of site-packages.
            if name.startswith(("..", "/")) or name.endswith(".pyc") or not path.is_file():
                continue
            archive.file(f"{PACKAGES_PATH[1:]}/{name}", path)
            if re.search(r"\.so(\.|$)", name):
                objects.append(path)
    return objects


def _is_editable(dist: metadata.Distribution) -> bool:
    about = json.loads(dist.read_text("direct_url.json") or "{}")
    return bool(about.get("dir_info", {}).get("editable"))


# --- a root filesystem in a folder ------------------------------------------------------------


def import_rootfs(client: Any, folder: str | os.PathLike[str]) -> str:
    """Make the image of a root filesystem in a folder, e.g. debootstrap's.

    Args:
        client: a ``docker.APIClient``.
        folder: the root; must hold a Python 3 with its standard library.

    Returns:
        The name of the image.

    Raises:
        UsageError: it is no such folder, or there are environments in it.
        InfraError: the daemon did not take the image, or it does not run.
    """
    with tempfile.TemporaryFile() as out:
        inside = pack_rootfs(out, Path(folder))
        return _import(client, out, inside)


_LEFT_OUT = re.compile(
    r"(dev|proc|sys|run|tmp|rlrf|var/cache/apt|var/lib/apt/lists|usr/share/(doc|man|locale|info))/"
)


def pack_rootfs(out: IO[bytes], folder: Path) -> str:
    """Write the archive of :func:`import_rootfs`; returns the interpreter's path inside."""
    inside = _rootfs_python(folder)
    with _Archive(out) as archive:
        for name in ("dev", "proc", "sys", "run", "sandbox", PACKAGES_PATH[1:]):
            archive.folder(name)
        archive.folder("tmp", 0o1777)
        archive.file(RUNNER_PATH[1:], RUNNER)
        for root, folders, names in os.walk(folder, onerror=_unreadable):
            at = Path(root).relative_to(folder)
            about = at.name.endswith((".dist-info", ".egg-info")) and Path(root, "entry_points.txt")
            if about and declares_environments(about):
                raise brings_answers(f"{root!r}")
            for name in sorted(folders + names):
                archive.entry(str(at / name), Path(root, name))
            folders[:] = sorted(f for f in folders if not _LEFT_OUT.match(f"{at / f}/"))
    return inside


def _unreadable(error: OSError) -> None:
    raise UsageError(f"{error.filename}: {error.strerror}; run this as the owner of the folder")


def _rootfs_python(folder: Path) -> str:
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is no folder; give the root of a filesystem")
    for prefix in ("usr/local", "usr"):
        if os.path.lexists(folder / prefix / "bin/python3") and any(
            folder.glob(f"{prefix}/lib*/python3*/json/__init__.py")
        ):
            return f"/{prefix}/bin/python3"
    raise UsageError(
        f"{str(folder)!r} has no Python 3 with its whole standard library; make it e.g. with "
        "`debootstrap --variant=minbase --include=python3 bookworm DIR` (python3-minimal is too "
        "little)"
    )


# --- importing --------------------------------------------------------------------------------


def _image_labels() -> dict[str, str]:
    return {IMAGE_LABEL: "1", RUNNER_LABEL: runner_hash()}


def _import(client: Any, archive: IO[bytes], python: str) -> str:
    """Hand a root filesystem to the daemon, and prove that it runs."""
    docker = daemon.sdk()
    archive.seek(0)
    entry = json.dumps([python, *runner.FLAGS, RUNNER_PATH])
    changes = [
        f"ENV PATH={_PATH}",
        "ENV LANG=C.UTF-8",
        "ENV PYTHONDONTWRITEBYTECODE=1",
        f"ENV PYTHONPATH={PACKAGES_PATH}",
        *(f"LABEL {key}={value}" for key, value in _image_labels().items()),
        f"ENTRYPOINT {entry}",
    ]
    try:
        told = client.import_image_from_data(
            archive, repository=REPOSITORY, tag=tag().partition(":")[2], changes=changes
        )
    except (docker.errors.DockerException, OSError) as error:
        raise InfraError(f"the daemon did not take the image: {error}", kind="image") from error
    for line in str(told).splitlines():
        with contextlib.suppress(ValueError):
            if "error" in (answer := json.loads(line)):
                raise InfraError(f"the daemon did not take the image: {answer['error']}")
    return _proven(client, tag())


def _proven(client: Any, image: str) -> str:
    """The image, whose Python has run; else the image is removed.

    Raises:
        InfraError: it does not run.
    """
    docker = daemon.sdk()
    try:
        code, said = run_python(client, image, _PROBE)
    except docker.errors.DockerException as error:
        code, said = -1, str(error)
    if code == 0 and said.strip() == "42":
        return image
    with contextlib.suppress(docker.errors.DockerException):
        client.remove_image(image)
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    raise InfraError(
        f"the Python of the new image does not run (exit code {code}): {last[0]}",
        kind="image",
        retryable=False,
    )


def run_python(client: Any, image: str, code: str) -> tuple[int, str]:
    """Run a line of Python in an image, without a network; returns exit code and output."""
    docker = daemon.sdk()
    made = client.create_container(
        image,
        entrypoint=["python3"],
        command=[*runner.FLAGS, "-c", code],
        labels=daemon.labels(),
        # Not the host's default: one that keeps no logs (or ships them away) could not be read.
        host_config=client.create_host_config(
            network_mode="none", log_config={"type": "json-file"}, mem_limit="256m", pids_limit=32
        ),
    )["Id"]
    try:
        client.start(made)
        ended = client.wait(made, timeout=60)["StatusCode"]
        return int(ended), client.logs(made).decode(errors="replace")
    finally:
        with contextlib.suppress(docker.errors.APIError):
            client.remove_container(made, force=True)


# --- containers that were left behind ---------------------------------------------------------


def gc(client: Any) -> list[str]:
    """Remove the containers that dead processes of this host have left behind.

    Containers of living processes, of other hosts, and of others than rlrf are never touched.

    Returns:
        The ids of those that were removed.

    Raises:
        InfraError: the daemon failed.
    """
    docker = daemon.sdk()
    removed = []
    with daemon.calls("containers cannot be listed"):
        found = client.containers(all=True, filters={"label": f"{daemon.MANAGED}=1"})
    for container in found:
        labels = container.get("Labels") or {}
        if labels.get(daemon.MANAGED) != "1" or daemon.owner_is_alive(labels) is not False:
            continue
        try:
            client.remove_container(container["Id"], force=True, v=True)
        except docker.errors.APIError as error:
            # Gone already, or on its way: somebody else was faster.
            if error.status_code not in (404, 409):
                raise InfraError(
                    f"container {container['Id'][:12]} cannot be removed: {error}", kind="gc"
                ) from error
            continue
        removed.append(str(container["Id"]))
    return removed


# --- archives ---------------------------------------------------------------------------------


class _Archive:
    """A tar archive whose bytes depend on names and contents only.

    Entries are written in the order of the calls, which must not depend on chance; parents come
    by themselves, and a name that is there already is left as it is.
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._tar = tarfile.TarFile(fileobj=out, mode="w", format=tarfile.PAX_FORMAT)
        self._names: set[str] = set()
        self.packed: dict[str, Path] = {}

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def file(self, name: str, source: Path, mode: int | None = None) -> None:
        """A regular file with a file's contents; 0755 if it is executable, else 0644."""
        if mode is None:
            mode = 0o755 if source.stat().st_mode & 0o111 else 0o644
        self.packed.setdefault(name, source)
        with source.open("rb") as content:
            self._add(name, tarfile.REGTYPE, mode, content, os.fstat(content.fileno()).st_size)

    def data(self, name: str, content: bytes) -> None:
        """A regular file with these contents."""
        self._add(name, tarfile.REGTYPE, 0o644, io.BytesIO(content), len(content))

    def folder(self, name: str, mode: int = 0o755) -> None:
        """A folder."""
        self._add(name, tarfile.DIRTYPE, mode)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._add(name, tarfile.SYMTYPE, 0o777, target=target)

    def entry(self, name: str, source: Path) -> None:
        """Whatever lies there, but no devices, sockets and pipes, and no setuid bits."""
        about = source.lstat()
        mode = stat.S_IMODE(about.st_mode) & ~0o6000
        if stat.S_ISLNK(about.st_mode):
            self.link(name, os.readlink(source))
        elif stat.S_ISDIR(about.st_mode):
            self.folder(name, mode)
        elif stat.S_ISREG(about.st_mode):
            try:
                self.file(name, source, mode)
            except PermissionError as error:
                _unreadable(error)

    def _add(
        self,
        name: str,
        kind: bytes,
        mode: int,
        content: IO[bytes] | None = None,
        size: int = 0,
        target: str = "",
    ) -> None:
        if name in self._names:
            return
        parent = str(PurePosixPath(name).parent)
        if parent != ".":
            self._add(parent, tarfile.DIRTYPE, 0o755)
        self._names.add(name)
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.size, info.linkname = kind, mode, size, target
        self._tar.addfile(info, content)
