"""Checkpoints: everything the next step depends on, whole or not at all.

``RUN/checkpoints/step-00000040/`` holds ``state.safetensors`` (tensors by name) and ``state.json``
(the rest). Nothing is pickled. A folder is written beside, flushed to the disk and renamed, so
what has the name of a checkpoint is one, whenever the process or the machine dies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlrf._files import (
    Unwritable,
    hidden_target,
    parse_json,
    put_folder,
    reason,
    remove_folder,
    settle_folder,
    standing,
)
from rlrf._run_folder import BEST, checkpoint_steps, clear_checkpoints
from rlrf.errors import UsageError

__all__ = ["BEST", "Checkpoints", "Damaged", "State", "newest", "prefixed"]


class Damaged(UsageError):
    """A checkpoint whose files are there, but do not say what they should."""


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
            Unwritable: the disk is full or the folder cannot be written; what was there stays.
        """
        target = self.folder / name

        def write(fresh: Path) -> None:
            # A copy of what is not contiguous; views of one storage are refused by safetensors.
            tensors = {n: t.detach().contiguous() for n, t in state.tensors.items()}
            save_file(tensors, fresh / "state.safetensors")
            (fresh / "state.json").write_text(json.dumps(state.data), encoding="utf-8")

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            put_folder(target, write)
        except (OSError, SafetensorError) as error:
            told = reason(error) if isinstance(error, OSError) else error
            raise Unwritable(
                f"the checkpoint {str(target)!r} could not be written: {told}"
            ) from error
        return target

    def save_step(self, step: int, state: State, keep: int) -> Path:
        """Write the checkpoint of ``step`` and delete all but the ``keep`` newest.

        Raises:
            Unwritable: as :meth:`save`.
        """
        path = self.save(f"step-{step:08d}", state)
        for old in self.steps()[:-keep]:
            try:
                remove_folder(self.path(old))
            except OSError as error:
                raise Unwritable(
                    f"the checkpoint of step {old} could not be deleted: {reason(error)}"
                ) from error
        return path

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, oldest first."""
        return checkpoint_steps(self.folder.parent)

    def path(self, step: int | str) -> Path:
        """The folder of a step, or of a name."""
        return self.folder / (step if isinstance(step, str) else f"step-{step:08d}")

    def load(self, step: int | str) -> State:
        """Read the checkpoint of a step, or of a name.

        Raises:
            UsageError: there is none; it cannot be read.
            Damaged: what is in it is no checkpoint.
        """
        folder = standing(self.path(step))
        if not folder.is_dir():
            there = [f"step {s}" for s in self.steps()]
            there += [BEST] if standing(self.folder / BEST).is_dir() else []
            raise UsageError(
                f"there is no checkpoint {folder.name!r} in {str(self.folder)!r}; "
                f"there {'are ' + ', '.join(there) if there else 'is none at all'}"
            )
        try:
            data = parse_json((folder / "state.json").read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("state.json holds no table")
            return State(load_file(folder / "state.safetensors"), data)
        except (FileNotFoundError, ValueError, SafetensorError) as error:
            raise Damaged(
                f"the checkpoint {str(folder)!r} cannot be read ({error}); delete it to use an "
                "older one"
            ) from None
        except OSError as error:  # mended, it may be as good as ever
            raise UsageError(
                f"the checkpoint {str(folder)!r} cannot be read: {reason(error)}"
            ) from None

    def clear(self) -> None:
        """Delete all of them: a new run begins. What is no checkpoint of ours is left alone."""
        clear_checkpoints(self.folder.parent)

    def settle(self) -> None:
        """Remove what a kill left half done, and put back what it had put aside."""
        if self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                if target := hidden_target(path):
                    settle_folder(target)

    def set_aside(self, after: int) -> list[Path]:
        """Rename the steps ``after`` one, so that the run can go on from it; the new places."""
        moved = []
        for step in self.steps():
            if step > after:
                place = self.folder / f"damaged-{self.path(step).name}"
                if place.exists():
                    remove_folder(place)
                moved.append(self.path(step).rename(place))
        return moved


def newest(run_dir: Path | str) -> State | None:
    """The last checkpoint of a run, or None if it wrote none."""
    checkpoints = Checkpoints(run_dir)
    checkpoints.settle()
    steps = checkpoints.steps()
    return checkpoints.load(steps[-1]) if steps else None


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix.``; :meth:`State.part` takes it off again."""
    return {f"{prefix}.{n}": t for n, t in tensors.items()}


class Stateful(Protocol):
    """A trainer that can be put back to where it was."""

    def state_dict(self, *, copy: bool = True) -> State:
        """Everything the next step depends on; without ``copy`` it may change with that step."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave."""
        ...
