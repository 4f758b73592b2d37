"""Trainers: what turns rollouts with feedback into a better policy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rlrf.errors import UsageError
from rlrf.plugins import trainers


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run leaves behind.

    Attributes:
        history: one mapping of metrics per step, in order; the same lines as ``metrics.jsonl``.
        run_dir: the run directory, or None if nothing was written.
        model_dir: where the trained model lies, or None.
        model_step: the step whose weights those are; None: the last.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    run_dir: Path | None = None
    model_dir: Path | None = None
    model_step: int | None = None


@runtime_checkable
class Trainer(Protocol):
    """What a trainer is: built from (model, env, config), then :meth:`train`.

    Register yours with the entry-point group ``rlrf.trainers`` (or
    ``rlrf.trainers.register("mine", Mine)``) and ``rlrf train --trainer mine`` finds it. A class
    may declare ``config_class``, a pydantic model: configuration files and ``--set`` are then
    validated against it.
    """

    def train(self) -> TrainResult:
        """Run to the end and return the history."""
        ...


def make_trainer(
    name: str,
    *,
    model: Any,
    env: Any,
    config: Any = None,
    **kwargs: Any,
) -> Trainer:
    """A trainer by name.

    Args:
        name: ``"sdpo"``, ``"grpo"`` or a registered one.
        model: a model folder or name, or a policy that is already loaded.
        env: an :class:`rlrf.Env` or an id for :func:`rlrf.make`.
        config: the trainer's config object, a mapping of its fields, or None for the defaults.
        kwargs: passed on, e.g. ``run_dir``, ``eval_env``.

    Raises:
        UnknownIdError: no such trainer.
        ConfigError: a wrong key or value in ``config``.
        MissingDependencyError: the ``train`` extra is not installed.
        UsageError: the class does not take these arguments, or has no ``train()``.
    """
    from rlrf.config import build_trainer_config
    from rlrf.registry import make

    cls = trainers.load(name)
    if config is None or isinstance(config, Mapping):
        config = build_trainer_config(name, config)
    if isinstance(env, str):
        env = make(env)
    try:
        inspect.signature(cls).bind(model, env, config, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"trainer {name!r} cannot be built: {error}. A trainer takes (model, env, config), and "
            f"here {', '.join(kwargs) or 'nothing else'}; this one takes {_takes(cls)}"
        ) from None
    except ValueError:  # a class of another language, which does not say
        pass
    trainer: Trainer = cls(model, env, config, **kwargs)
    if not callable(getattr(trainer, "train", None)):
        raise UsageError(f"trainer {name!r} has no method train(): {type(trainer).__name__}")
    return trainer


__all__ = ["TrainResult", "Trainer", "accepted", "make_trainer", "trainers"]


def _takes(cls: Any) -> str:
    return ", ".join(inspect.signature(cls).parameters) or "nothing"


def accepted(cls: Any, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is offered to a trainer, the keywords that its class takes."""
    try:
        parameters = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):
        return dict(offered)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(offered)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in offered.items() if name in names}
