"""Entry-point registries: how the wings and third parties meet ``rlrf`` without being imported.

A distribution declares ``[project.entry-points."rlrf.policies"] mine = "pkg.mod:Mine"`` and
``rlrf.make_policy("mine")`` finds it. Built-ins come in by the same door. Nothing is imported
before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from rlrf.errors import MissingDependencyError, UnknownIdError, UsageError


class Registry:
    """Names of one entry-point group, loaded on demand.

    Args:
        group: the entry-point group, e.g. ``"rlrf.trainers"``.
        what: the noun in messages, e.g. ``"trainer"``.
    """

    def __init__(self, group: str, what: str) -> None:
        self.group, self.what = group, what
        self._added: dict[str, Any] = {}

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
        """The installed entry points of the group by name."""
        return {p.name: p for p in metadata.entry_points(group=self.group)}

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted({*self._added, *self.entry_points()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

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
        """
        target = self.target(name)
        return load_object(target, f"{self.what} {name!r}") if isinstance(target, str) else target


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
        UsageError: the module or the attribute does not exist.
    """
    module_name, _, attr = path.partition(":")
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
    for part in attr.split(".") if attr else ():
        if not hasattr(target, part):
            raise UsageError(f"{what} points to {path!r}, but {module_name!r} has no {part!r}")
        target = getattr(target, part)
    return target
