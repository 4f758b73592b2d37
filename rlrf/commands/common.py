"""What several commands share: options, the environment they name, where they print."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

import rlrf
from rlrf.config import parse_assignment, parse_wrapper
from rlrf.env import Env
from rlrf.errors import ConfigError
from rlrf.policy import make_policy, policy_class
from rlrf.wrappers import Wrap, wrap

EnvOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", help="Option of the environment, name=value; repeatable."),
]
Wraps = Annotated[
    list[str] | None,
    typer.Option(
        "--wrap",
        metavar="NAME:ARG=VALUE,...",
        help="Wrapper, e.g. FeedbackLevel:level=binary; repeatable, the innermost first.",
    ),
]
EnvId = Annotated[str, typer.Argument(metavar="ENV", help="Environment id; see `rlrf list`.")]


def new_console() -> Console:
    """Where a command prints what it was asked for."""
    # Made when it is used: standard output may have been redirected since the import.
    return Console()


def is_main() -> bool:
    """Whether this process talks: the first of those that a launcher starts, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def make_env(
    id: str,
    option: list[str] | None,
    given: Mapping[str, Any],
    *,
    held_out: bool = False,
    wraps: list[str] | None = None,
) -> Env:
    """The environment a command names.

    Args:
        id: its id.
        option: ``name=value``, as given on the command line.
        given: further options; None is none.
        held_out: whether it is the split for evaluation that is wanted, where none is named.
        wraps: its wrappers, as given on the command line.
    """
    named = [parse_wrapper(text) for text in wraps or ()]
    if ":" in id:
        import_from_here()
    options = assignments(option)
    options |= {name: value for name, value in given.items() if value is not None}
    env = rlrf.make(id, **options)
    if held_out and env.eval_split in env.splits and "split" not in options:
        env.split = env.eval_split
    return wrapped(env, named)


def wrapped(env: Env, wraps: Wrap | None) -> Env:
    """An environment in its wrappers; it is closed if it cannot be."""
    try:
        return wrap(env, wraps)
    except BaseException:
        env.close()
        raise


def import_from_here() -> None:
    """Let a module that was named be found in the current folder, where it is nowhere else."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def assignments(texts: list[str] | None) -> dict[str, Any]:
    """Of ``name=value``, the names and the values, read as TOML where they can be."""
    return dict(parse_assignment(text) for text in texts or ())


def named_policy(name: str, options: dict[str, Any]) -> Any:
    """The policy a command names.

    Raises:
        ConfigError: it lacks an option, or does not know one.
    """
    check_options(name, inspect.signature(policy_class(name)), options)
    return make_policy(name, **options)


def check_options(name: str, signature: inspect.Signature, options: dict[str, Any]) -> None:
    """See that a policy takes its options.

    Raises:
        ConfigError: it lacks one, or does not know one.
    """
    try:
        signature.bind(**options)
    except TypeError as error:
        parameters = [p for p in signature.parameters if p not in ("args", "kwargs")]
        remedy = (
            "give --model"
            if "'model'" in str(error) and "model" not in options
            else ("its options are " + (", ".join(parameters) or "none"))
        )
        raise ConfigError(f"policy {name!r}: {error}; {remedy}") from None
