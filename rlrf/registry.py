"""``register``, ``make``, ``make_vec``, ``spec``: ids to environments, on Gymnasium's registry.

Every environment is an entry of Gymnasium's own registry under the namespace ``rlrf``, so
``gymnasium.make("rlrf/" + id)`` works too. Entry points of the group ``rlrf.environments`` are
entered by name when :mod:`rlrf` is imported; their modules are imported by ``make``.

Why: design/gymnasium.md.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from rlrf.env import Env
from rlrf.errors import ConfigError, UnknownIdError, UsageError
from rlrf.plugins import Registry, is_built_in, load_object, warn_once

NAMESPACE = "rlrf"
_ID = re.compile(r"[a-z0-9][a-z0-9._+]*(?:-[a-z0-9._+]+)*-v\d+")
_environments = Registry("rlrf.environments", "environment")


def register(id: str, entry_point: Callable[..., Env] | str, **spec: Any) -> None:
    """Register an environment.

    Args:
        id: ``name-vN``, lower case.
        entry_point: the class (or a callable) or ``"pkg.mod:MyEnv"``, imported on first use.
        spec: further fields of :class:`gymnasium.envs.registration.EnvSpec`, e.g. ``kwargs``,
            ``reward_threshold``, ``nondeterministic``.

    Raises:
        UsageError: the id is malformed or taken by something else.
    """
    name = id.removeprefix(NAMESPACE + "/")
    if not _ID.fullmatch(name):
        raise UsageError(
            f"environment id {id!r} is malformed; ids are lower case name-vN, e.g. 'my-env-v0'"
        )
    full = f"{NAMESPACE}/{name}"
    present = gymnasium.registry.get(full)
    if present is not None:
        if present.entry_point == entry_point and present.kwargs == spec.get("kwargs", {}):
            return
        raise UsageError(
            f"environment id {name!r} is already registered for {present.entry_point!r}; "
            "choose another name or raise its version"
        )
    # rlrf.Env enforces the order of calls itself, and `check_env` is stricter than the passive
    # checker, whose per-step work would be paid on every rollout.
    spec = {"order_enforce": False, "disable_env_checker": True, **spec}
    gymnasium.register(id=full, entry_point=entry_point, **spec)


def load_entry_points() -> None:
    """Enter the installed environments into the registry; imports none of them."""
    for name, point in _environments.entry_points().items():
        module = point.value.partition(":")[0].partition(".")[0].strip()
        if not is_built_in(point) and not _exists(module):
            warn_once(
                f"the environment {name!r} of {_environments.origin(name)} cannot be imported: it "
                f"is {point.value!r}, and there is no module {module!r}; install that "
                "distribution anew, or uninstall it"
            )
        if f"{NAMESPACE}/{name}" in gymnasium.registry:
            continue
        try:
            register(name, point.value)
        except UsageError as error:  # one bad distribution must not break `import rlrf`
            warnings.warn(
                f"an environment of {_environments.origin(name)} is left out: {error}",
                stacklevel=2,
            )


def _exists(module: str) -> bool:
    """Whether a module may be imported; it is not."""
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def origins() -> dict[str, str]:
    """The distributions, with their versions, that bring the environments which any does."""
    return {
        name: of
        for name, target, of in _environments.items()
        if (known := gymnasium.registry.get(f"{NAMESPACE}/{name}")) and known.entry_point == target
    }


class _RegistryView(Mapping[str, EnvSpec]):
    """The registered rlrf environments: id (without namespace) to its Gymnasium spec."""

    def _names(self) -> list[str]:
        prefix = NAMESPACE + "/"
        return sorted(k[len(prefix) :] for k in gymnasium.registry if k.startswith(prefix))

    def __getitem__(self, id: str) -> EnvSpec:
        return spec(id)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and f"{NAMESPACE}/{id}" in gymnasium.registry

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __repr__(self) -> str:
        return f"registry({', '.join(self._names())})"


registry = _RegistryView()


def spec(id: str) -> EnvSpec:
    """The Gymnasium spec of an environment; ``"pkg.mod:my-env-v0"`` imports ``pkg.mod`` first.

    Raises:
        UnknownIdError: no such environment; near matches are listed.
        UsageError: ``pkg.mod`` cannot be imported.
    """
    module, _, name = id.rpartition(":")
    if module:
        load_object(module, f"environment {id!r}")
    name = name.removeprefix(NAMESPACE + "/")
    found = gymnasium.registry.get(f"{NAMESPACE}/{name}")
    if found is None:
        load_entry_points()  # a distribution may have been installed since rlrf was imported
        found = gymnasium.registry.get(f"{NAMESPACE}/{name}")
    if found is None:
        raise UnknownIdError(
            "environment", name, registry, "`rlrf list` shows all; rlrf.register() adds yours."
        )
    return found


def make(id: str | EnvSpec, **kwargs: Any) -> Env:
    """Make an environment: ``rlrf.make("format-rules-v0", feedback="explained")``.

    Args:
        id: a registered id, ``"pkg.mod:id"``, or a spec.
        kwargs: options of the environment; every environment takes ``feedback``, ``split``,
            ``tokenizer`` and ``max_feedback_tokens``.

    Returns:
        The environment itself, without Gymnasium's wrappers (``gymnasium.make("rlrf/" + id)``
        adds them).

    Raises:
        UnknownIdError: no such environment.
        ConfigError: an option it does not have.
        MissingDependencyError: it needs an extra that is not installed.
    """
    env_spec = id if isinstance(id, EnvSpec) else spec(id)
    name = env_spec.id.removeprefix(NAMESPACE + "/")
    _check_options(env_spec, kwargs)
    env = gymnasium.make(env_spec, **kwargs).unwrapped
    if not isinstance(env, Env):
        raise UsageError(
            f"environment {name!r} made a {type(env).__name__}, which is no rlrf.Env; subclass "
            "rlrf.SingleTurnEnv or rlrf.MultiTurnEnv"
        )
    return env


def _check_options(env_spec: EnvSpec, options: Mapping[str, Any]) -> None:
    accepted = accepted_options(_factory(env_spec))
    for key in options:
        if accepted is not None and key not in accepted:
            near = difflib.get_close_matches(key, sorted(accepted), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            name = env_spec.id.removeprefix(NAMESPACE + "/")
            raise ConfigError(
                f"environment {name!r} has no option {key!r}; {hint}options are "
                + ", ".join(sorted(accepted))
            )


def _factory(env_spec: EnvSpec) -> Any:
    """The class, or the callable, that makes an environment."""
    entry_point = env_spec.entry_point
    if not isinstance(entry_point, str):
        return entry_point
    name = env_spec.id.removeprefix(NAMESPACE + "/")
    of = f" of {found}" if (found := origins().get(name)) else ""
    return load_object(entry_point, f"environment {name!r}{of}")


def options_of(id: str) -> set[str]:
    """The options that :func:`make` takes for an environment, as far as they are known.

    Raises:
        UnknownIdError: no such environment.
        UsageError: its module cannot be imported.
    """
    return accepted_options(_factory(spec(id))) or set()


def accepted_options(factory: Any) -> set[str] | None:
    """The keyword options of an environment class, following ``**kwargs`` up its bases.

    None when that cannot be known (a plain callable that takes ``**kwargs``).
    """
    if not isinstance(factory, type):
        parameters = inspect.signature(factory).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        return {p.name for p in parameters}
    names: set[str] = set()
    for base in factory.__mro__:
        init = base.__dict__.get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {"self"}


def make_vec(
    id: str, num_envs: int = 1, vectorization_mode: str = "sync", **kwargs: Any
) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """``num_envs`` copies as a Gymnasium vector environment.

    Args:
        id: as for :func:`make`.
        num_envs: copies.
        vectorization_mode: ``"sync"`` or ``"async"`` (one process each).
        kwargs: options of the environment; ``vector_kwargs`` goes to the vector class.

    Raises:
        UnknownIdError: no such environment.
        ConfigError: an option it does not have.
    """
    env_spec = spec(id)
    vector_kwargs = dict(kwargs.pop("vector_kwargs", {}))
    if vectorization_mode == "async":
        # Gymnasium's shared memory holds fixed-size arrays; text in it is stale or refused.
        vector_kwargs.setdefault("shared_memory", False)
    _check_options(env_spec, kwargs)
    return gymnasium.make_vec(
        env_spec,
        num_envs=num_envs,
        vectorization_mode=vectorization_mode,
        vector_kwargs=vector_kwargs,
        **kwargs,
    )


def pprint_registry() -> str:
    """Print the registered environments, one a line, and return the text."""
    lines = [f"{name:<28} {registry[name].entry_point}" for name in registry]
    text = "\n".join(lines)
    print(text)
    return text
