"""Entry-point registries: how the wings and third parties meet ``rlrf`` without being imported.

A distribution declares ``[project.entry-points."rlrf.policies"] mine = "pkg.mod:Mine"`` and
``rlrf.make_policy("mine")`` finds it. Built-ins come in by the same door. Nothing is imported
before it is asked for.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from rlrf.errors import MissingDependencyError, UnknownIdError, UsageError


class Registry:
    """Names of one entry-point group, loaded on demand.

    Args:
        group: the entry-point group, e.g. ``"rlrf.trainers"``.
        what: the noun in messages, e.g. ``"trainer"``.
        added: what is registered from the start.
    """

    def __init__(self, group: str, what: str, added: Mapping[str, Any] | None = None) -> None:
        self.group, self.what = group, what
        self._added: dict[str, Any] = dict(added or {})

    def register(self, name: str, target: Any) -> None:
        """Add ``target``, an object or a ``"pkg.mod:attr"`` string, under ``name``.

        Raises:
            UsageError: another target already has that name.
        """
        point = self.entry_points().get(name)
        taken = self._added.get(name, point.value if point else target)
        if taken != target:
            raise UsageError(f"{self.what} {name!r} is already registered; choose another name")
        self._added[name] = target

    def entry_points(self) -> dict[str, metadata.EntryPoint]:
        """The installed entry points of the group by name.

        Where several distributions bring one of a name it is rlrf's, else the first that is found;
        a warning names the others.
        """
        found: dict[str, metadata.EntryPoint] = {}
        for point in sorted(_entry_points(self.group), key=lambda p: not is_built_in(p)):
            taken = found.setdefault(point.name, point)
            if taken.value != point.value:
                warn_once(
                    f"the {self.what} {point.name!r} of {_distribution(point)} ({point.value}) is "
                    f"left out: {_distribution(taken)} brings one of that name. Rename the entry "
                    "point, or uninstall one of the two"
                )
        return found

    def origin(self, name: str) -> str:
        """The distribution that brings ``name``, with its version; empty if it was registered."""
        point = None if name in self._added else self.entry_points().get(name)
        return "" if point is None else _distribution(point)

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted({*self._added, *self.entry_points()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def items(self) -> list[tuple[str, Any, str]]:
        """Every name with its :meth:`target` and its :meth:`origin`, sorted."""
        found = {n: (p.value, _distribution(p)) for n, p in self.entry_points().items()}
        found |= {name: (target, "") for name, target in self._added.items()}
        return [(name, *found[name]) for name in sorted(found)]

    def target(self, name: str) -> Any:
        """What ``name`` stands for, not imported: the object, or its ``"pkg.mod:attr"``.

        Raises:
            UnknownIdError: nothing has that name; near matches are listed.
        """
        if name in self._added:
            return self._added[name]
        point = self.entry_points().get(name)
        if point is None:
            raise UnknownIdError(self.what, name, self.names())
        return point.value

    def load(self, name: str) -> Any:
        """The object registered under ``name``.

        Raises:
            UnknownIdError: nothing has that name; near matches are listed.
            MissingDependencyError: its module needs a package that is not installed.
            UsageError: its module cannot be imported; the distribution is named.
        """
        target = self.target(name)
        if not isinstance(target, str):
            return target
        origin = self.origin(name)
        return load_object(target, f"{self.what} {name!r}" + (f" of {origin}" if origin else ""))


trainers = Registry("rlrf.trainers", "trainer")


def _entry_points(group: str) -> list[metadata.EntryPoint]:
    try:
        return list(metadata.entry_points(group=group))
    except Exception:  # the metadata of one distribution is damaged, and it takes all with it
        points: list[metadata.EntryPoint] = []
        for distribution in metadata.distributions():
            try:
                points += distribution.entry_points.select(group=group)
            except Exception as error:
                warnings.warn(
                    f"the entry points of {_name(distribution)} cannot be read ({error!r}); "
                    "install it anew",
                    stacklevel=2,
                )
        return points


def is_built_in(point: metadata.EntryPoint) -> bool:
    """Whether rlrf itself brings an entry point."""
    return _distribution(point).partition(" ")[0] == "rlrf"


def warn_once(text: str) -> None:
    """Warn of a distribution that is not as it should be, once in a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


_warned: set[str] = set()


def _distribution(point: metadata.EntryPoint) -> str:
    """The distribution of an entry point, as ``name version``; empty if it says none."""
    return "" if point.dist is None else _name(point.dist)


def _name(distribution: metadata.Distribution) -> str:
    try:
        return f"{distribution.metadata['Name']} {distribution.version}"
    except Exception:  # damaged as well: where it lies is all there is
        return str(getattr(distribution, "_path", "a distribution"))


EXTRAS = {
    "torch": "train",
    "transformers": "train",
    "peft": "train",
    "accelerate": "train",
    "safetensors": "train",
    "gguf": "train",
    "docker": "docker",
    "vllm": "vllm",
}
"""Packages whose absence has a known cure: the extra of rlrf that brings each."""


def load_object(path: str, what: str) -> Any:
    """Import ``"pkg.mod:attr"``.

    Raises:
        MissingDependencyError: a package of one of our extras is missing.
        UsageError: the module or the attribute does not exist, or the module raises.
    """
    module_name, _, attr = path.partition("[")[0].replace(" ", "").partition(":")  # no extras
    try:
        target = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRAS:
            raise MissingDependencyError(what, missing, EXTRAS[missing]) from error
        raise UsageError(
            f"{what} points to {path!r}, but module {error.name!r} cannot be imported; "
            "is the distribution that brings it installed?"
        ) from error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # it is not ours: a syntax error, an exit, whatever it raises
        raise UsageError(
            f"{what} points to {path!r}, which cannot be imported: {import_failure(error)}"
        ) from error
    for part in attr.split(".") if attr else ():
        if not hasattr(target, part):
            raise UsageError(f"{what} points to {path!r}, but {module_name!r} has no {part!r}")
        target = getattr(target, part)
    return target


def import_failure(error: BaseException) -> str:
    """Why an import failed, in a line: the error, and where a syntax error stands."""
    try:
        told = str(error)
    except Exception:
        told = ""
    if isinstance(error, SyntaxError) and error.filename:
        told = f"{error.msg} ({error.filename}, line {error.lineno})"
    name = type(error).__name__
    return " ".join(f"{name}: {told}".split()) if told else name
