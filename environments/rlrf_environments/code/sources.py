"""Data sets that do not ship with rlrf: found where users have them, or fetched once.

In this order: the file a caller names, the file an environment variable names, rlrf's cache, an
installed package, another tool's cache, the network. What is fetched is checked against its
published SHA-256 where one is known, and kept in rlrf's cache.

It does not check a file that a caller names or that is here already, and does not read what is in
one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import httpx

from rlrf import UsageError
from rlrf._files import write_whole
from rlrf.fetch import cache_dir

CONNECT_S = 5.0
"""Without a network, a fetch gives up after so many seconds."""


@dataclass(frozen=True)
class DataSet:
    """A data set in one file.

    Attributes:
        name: what it is called in messages.
        file: its name in the cache.
        variable: the environment variable that may name a file of it.
        url: where it is published.
        sha256: of the published file; None where it is not known.
        installed: ``(package, path)``: the file inside an installed package.
        elsewhere: files that other tools leave in the home folder.
    """

    name: str
    file: str
    variable: str
    url: str
    sha256: str | None = None
    installed: tuple[str, str] | None = None
    elsewhere: tuple[str, ...] = ()


def named_file(name: str, variable: str, data: str | os.PathLike[str] | None) -> Path | None:
    """The file (or folder) that the caller or the environment names; None if neither does.

    Raises:
        UsageError: it names nothing that exists.
    """
    if data is not None and not isinstance(data, (str, os.PathLike)):
        raise UsageError(f"data is {data!r}; it must be a path")
    by, value = ("data", os.fspath(data)) if data is not None else (variable, "")
    if data is None:
        value = os.environ.get(variable, "")
        if not value:
            return None
    path = Path(value).expanduser()
    if not path.exists():
        raise UsageError(f"{by} names {value!r} for {name}, but there is no such file")
    return path


def locate(data_set: DataSet, data: str | os.PathLike[str] | None = None) -> Path:
    """The file of a data set.

    Args:
        data_set: which.
        data: a file the caller names.

    Raises:
        UsageError: it cannot be found or fetched; the message says what to do.
    """
    named = named_file(data_set.name, data_set.variable, data)
    if named is not None:
        return named
    cached = cache_dir("data", data_set.file)
    places = [cached]
    if data_set.installed is not None:
        package, inside = data_set.installed
        found = importlib.util.find_spec(package)
        if found is not None and found.origin:
            places.append(Path(found.origin).parent / inside)
    places += [Path(p).expanduser() for p in data_set.elsewhere]
    for place in places:
        if place.is_file():
            return place
    return _fetch(data_set, cached)


def _fetch(data_set: DataSet, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        timeout = httpx.Timeout(30.0, connect=CONNECT_S)
        with httpx.stream("GET", data_set.url, timeout=timeout, follow_redirects=True) as got:
            got.raise_for_status()
            content = got.read()
        digest = hashlib.sha256(content).hexdigest()
        if data_set.sha256 is not None and digest != data_set.sha256:
            raise UsageError(
                f"{data_set.url} has the SHA-256 {digest}, but {data_set.name} is "
                f"published with {data_set.sha256}; it was not kept. If the data set was updated, "
                f"fetch it yourself and name it: data=FILE or {data_set.variable}=FILE"
            )
        write_whole(target, content, beside=f".{os.getpid()}")
        return target
    except (httpx.HTTPError, OSError) as error:
        raise UsageError(
            f"{data_set.name} is not here and cannot be fetched from {data_set.url} "
            f"({type(error).__name__}: {error}). Get the file on another machine and name it: "
            f"data=FILE or {data_set.variable}=FILE"
        ) from None
