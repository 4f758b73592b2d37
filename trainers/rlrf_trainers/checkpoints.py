"""Checkpoints: everything the next step depends on, whole or not at all.

``RUN/checkpoints/step-00000040/`` holds ``state.safetensors`` (tensors by name) and ``state.json``
(the rest). Nothing is pickled. A folder is written beside, flushed to the disk and renamed, so
what has the name of a checkpoint is one, whenever the process or the machine dies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrf.errors import RlrfError, UsageError

_STEP = re.compile(r"step-(\d{8})")
BEST = "best"


@dataclass
class State:
    """What a checkpoint holds.

    Attributes:
        tensors: by name.
        data: JSON data.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix.``, without it."""
        return {
            n.removeprefix(f"{prefix}."): t
            for n, t in self.tensors.items()
            if n.startswith(f"{prefix}.")
        }


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: the run directory.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.folder = Path(run_dir) / "checkpoints"

    def save(self, name: str, state: State) -> Path:
        """Write ``name``, replacing an older one of that name.

        Raises:
            RlrfError: the disk is full or the folder cannot be written; what was there stays.
        """
        target, fresh = self.folder / name, self.folder / f".{name}.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            fresh.mkdir()
            # A copy of what is not contiguous; views of one storage are refused by safetensors.
            tensors = {n: t.detach().contiguous() for n, t in state.tensors.items()}
            save_file(tensors, fresh / "state.safetensors")
            (fresh / "state.json").write_text(json.dumps(state.data), encoding="utf-8")
            for path in (*fresh.iterdir(), fresh):
                _flush(path)
            if target.exists():  # a folder cannot be renamed onto one that holds something
                target.rename(self.folder / f".{name}.old")
            fresh.rename(target)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            raise RlrfError(
                f"the checkpoint {str(target)!r} could not be written: {error}. Make room or set "
                "save_steps=0, and go on with --resume"
            ) from error
        finally:
            self._sweep()
        return target

    def save_step(self, step: int, state: State, keep: int) -> Path:
        """Write the checkpoint of ``step`` and delete all but the ``keep`` newest."""
        path = self.save(f"step-{step:08d}", state)
        for old in self.steps()[:-keep]:
            shutil.rmtree(self.path(old))
        return path

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, oldest first."""
        names = (p.name for p in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted(int(m[1]) for n in names if (m := _STEP.fullmatch(n)))

    def path(self, step: int | str) -> Path:
        """The folder of a step, or of a name."""
        return self.folder / (step if isinstance(step, str) else f"step-{step:08d}")

    def load(self, step: int | str) -> State:
        """Read the checkpoint of a step, or of a name.

        Raises:
            UsageError: there is none; it cannot be read.
        """
        folder = self.path(step)
        if not folder.is_dir():
            there = [f"step {s}" for s in self.steps()]
            there += [BEST] if (self.folder / BEST).is_dir() else []
            raise UsageError(
                f"there is no checkpoint {folder.name!r} in {str(self.folder)!r}; "
                f"there {'are ' + ', '.join(there) if there else 'is none at all'}"
            )
        try:
            data = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return State(load_file(folder / "state.safetensors"), data)
        except (OSError, ValueError, SafetensorError) as error:
            raise UsageError(
                f"the checkpoint {str(folder)!r} cannot be read ({error}); delete it to use an "
                "older one"
            ) from None

    def clear(self) -> None:
        """Delete all of them: a new run begins. What is no checkpoint of ours is left alone."""
        for path in self.folder.glob("*"):
            if {"state.json", "state.safetensors"} <= {p.name for p in path.glob("*")}:
                shutil.rmtree(path)

    def _sweep(self) -> None:
        """Remove what a kill left half done, and put back what it had put aside."""
        for path in self.folder.glob(".*.new"):
            shutil.rmtree(path)
        for path in self.folder.glob(".*.old"):
            target = self.folder / path.name[1:].removesuffix(".old")
            if target.exists():
                shutil.rmtree(path)
            else:
                path.rename(target)


def newest(run_dir: Path | str) -> State | None:
    """The last checkpoint of a run, or None if it wrote none."""
    checkpoints = Checkpoints(run_dir)
    if checkpoints.folder.is_dir():
        checkpoints._sweep()
    steps = checkpoints.steps()
    return checkpoints.load(steps[-1]) if steps else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix.``; :meth:`State.part` takes it off again."""
    return {f"{prefix}.{n}": t for n, t in tensors.items()}
