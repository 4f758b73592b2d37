"""Configuration: TOML files, ``--set a.b=c``, and errors that say what to write instead.

A training configuration has a model, an environment, a trainer and a run directory::

    model = "Qwen/Qwen2.5-0.5B-Instruct"

    [env]
    id = "format-rules-v0"
    feedback = "explained"          # every other key is an option of the environment

    [env.wrap]                      # but for this one: wrappers, the innermost first
    DropFeedback = {probability = 0.5}

    [trainer]
    name = "sdpo"
    learning_rate = 1e-6            # every other key is a field of the trainer's config_class

    [run]
    dir = "runs/first"

What is for one trainer only may stand in a table of its name, ``[trainer.sdpo]``: it applies where
that is the trainer, over ``[trainer]``. So one file serves several trainers.

Where a field accepts None, TOML (which has no null) and ``--set`` write the string ``"none"``.
"""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlrf.errors import MAX_COUNT, ConfigError, close_match, nearest
from rlrf.plugins import trainers

ModelT = TypeVar("ModelT", bound=BaseModel)
DEFAULT_TRAINER = "sdpo"


class EnvSection(BaseModel):
    """``[env]``: an id for :func:`rlrf.make`, options of that environment, and its wrappers."""

    model_config = ConfigDict(extra="allow")

    id: str = Field(min_length=1)
    wrap: dict[str, dict[str, Any]] | list[dict[str, Any]] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Every key but the id and the wrappers."""
        return dict(self.model_extra or {})


class TrainerSection(BaseModel):
    """``[trainer]``: a registered name, and fields of that trainer's ``config_class``."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(DEFAULT_TRAINER, min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """Every key but the name."""
        return dict(self.model_extra or {})


class RunSection(BaseModel):
    """``[run]``: where the run is written; None for ``runs/<env>-<trainer>-<time>``."""

    model_config = ConfigDict(extra="forbid")

    dir: str | None = Field(None, min_length=1)


class TrainConfig(BaseModel):
    """What ``rlrf train`` reads.

    Attributes:
        model: a model folder or name.
        env: the environment to train on.
        eval_env: the held-out environment; the keys it leaves out are those of ``env``, with
            ``split = "eval"``. None for just that.
        trainer: which trainer, and its knobs.
        run: where the run is written.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    env: EnvSection
    eval_env: dict[str, Any] | None = None
    trainer: TrainerSection = Field(default_factory=lambda: TrainerSection(name=DEFAULT_TRAINER))
    run: RunSection = Field(default_factory=RunSection)

    def held_out(self) -> EnvSection:
        """The held-out environment: ``[eval_env]`` over ``[env]`` with ``split = "eval"``.

        Raises:
            ConfigError: its id is none.
        """
        given = self.eval_env or {}
        base: dict[str, Any] = {"id": self.env.id}
        if given.get("id", self.env.id) == self.env.id:
            # Of another environment they would not fit.
            base |= {"wrap": self.env.wrap, **self.env.options}
        return build_config(EnvSection, {**base, "split": "eval", **given}, prefix="eval_env.")


def load_train_config(
    path: Path | str | None = None,
    assignments: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Read a configuration file and lay the command line over it.

    Args:
        path: a TOML file (or JSON, by its suffix); None to start from nothing.
        assignments: ``"a.b=c"`` strings, applied in order.
        overrides: dotted keys to values, applied before ``assignments``; None values are skipped.

    Raises:
        ConfigError: no such file, not TOML, a wrong key or value; one line for each.
    """
    data = {} if path is None else read_config(path)
    for key, value in (overrides or {}).items():
        if value is not None:
            set_key(data, key, value)
    for text in assignments:
        key, value = parse_assignment(text)
        set_key(data, key, value)
        table, _, name = key.partition(".")
        if table == "trainer" and name not in trainers:  # what is said last holds
            for section in _sections(data).values():
                section.pop(name, None)
    if sections := _sections(data):
        common = {k: v for k, v in data["trainer"].items() if k not in sections}
        data["trainer"] = common | sections.get(common.get("name", DEFAULT_TRAINER), {})
    return build_config(TrainConfig, data, elsewhere=lambda: _in_tables(data))


def config_class_of(trainer: str) -> Any:
    """The pydantic model of a trainer's configuration, or None if it declares none.

    Raises:
        UnknownIdError: no such trainer.
        MissingDependencyError: the ``train`` extra is not installed.
    """
    return getattr(trainers.load(trainer), "config_class", None)


def build_trainer_config(
    trainer: str, options: Mapping[str, Any] | None, *, prefix: str = ""
) -> Any:
    """The configuration of a trainer; the options as they are where it declares no class for it.

    Args:
        trainer: its name.
        options: fields of its ``config_class``; None for the defaults.
        prefix: put before every key in messages, e.g. ``"trainer."``.

    Raises:
        UnknownIdError: no such trainer.
        ConfigError: a wrong key or value; a key of another trainer is said to be one.
    """
    config_class = config_class_of(trainer)
    if config_class is None:
        return options
    return build_config(
        config_class, options or {}, prefix=prefix, elsewhere=lambda: _keys_of_others(trainer)
    )


def _keys_of_others(trainer: str) -> dict[str, str]:
    """The keys of the other trainers, and what to say of each."""
    known: dict[str, str] = {}
    for other in trainers:
        with contextlib.suppress(Exception):  # it is not the one that was asked for
            for key in config_class_of(other).model_fields if other != trainer else ():
                known.setdefault(
                    key,
                    f"; it is a key of the trainer {other!r}, and this is {trainer!r} (a file for "
                    f"both may hold it in [trainer.{other}])",
                )
    return known


def _sections(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables ``[trainer.<name>]``."""
    table = data.get("trainer")
    inner = table.items() if isinstance(table, dict) else ()
    return {name: value for name, value in inner if isinstance(value, dict) and name in trainers}


def _in_tables(data: Mapping[str, Any]) -> dict[str, str]:
    """The keys that are known within tables, and how each is written there."""
    from rlrf.registry import options_of

    known = {"run": [*RunSection.model_fields], "trainer": ["name"], "env": ["id"]}
    with contextlib.suppress(Exception):  # what is wrong with it is for another message
        name = data.get("trainer", {}).get("name", DEFAULT_TRAINER)
        known["trainer"] += config_class_of(name).model_fields
    with contextlib.suppress(Exception):
        known["env"] += options_of(data["env"]["id"])
    return {
        name: f"; did you mean {f'{table}.{name}'!r}?"
        for table, names in known.items()
        for name in names
    }


def read_config(path: Path | str) -> dict[str, Any]:
    """The tables of a TOML (or ``.json``) file; a byte order mark before them is nothing.

    Raises:
        ConfigError: the file is not there or cannot be parsed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {reason}") from None
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, 1,000 brackets
        what = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{str(path)!r} is not valid {what}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} holds a {type(data).__name__}; it must hold tables")
    return data


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"a.b=c"`` as ``("a.b", value)``; see :func:`parse_value`.

    Raises:
        ConfigError: there is no ``=``, or a part of the key is empty.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"{text!r} is no assignment; write key=value, e.g. trainer.learning_rate=1e-6"
        )
    return key, parse_value(value.strip())


def parse_wrapper(text: str) -> dict[str, Any]:
    """``"DropFeedback:kinds=['hint'],probability=0.5"`` as a name and arguments.

    The name may be ``pkg.mod:Class``. Values are read as by :func:`parse_value`.

    Raises:
        ConfigError: it is none.
    """
    name, _, rest = text.partition(":")
    if "." in name:
        attribute, _, rest = rest.partition(":")
        name += f":{attribute}"
    found: dict[str, Any] = {}
    try:
        for part in _PARTS.findall(rest):
            key, value = parse_assignment(part)
            found[key] = value
    except ConfigError:
        name = ""
    if not name:
        raise ConfigError(
            f"--wrap {text!r} is no wrapper; write NAME or NAME:argument=value,..., e.g. "
            "FeedbackLevel:level=binary"
        )
    return {"name": name.strip(), **found}


# What stands between commas, but for those in brackets and quotes.
_PARTS = re.compile(r"""(?:[^,\[\]{}"']|\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[\[\]{}"'])+""")


def parse_value(text: str) -> Any:
    """A TOML number, boolean, string, array or inline table; anything else is a plain string.

    Dates stay strings: no option takes one, and ``release=2024-08-01`` means the text.
    """
    if "\n" in text:
        return text
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float, str, list, dict)) else text


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted ``key`` in nested tables, making tables on the way.

    Raises:
        ConfigError: a part of the key is a value, not a table.
    """
    *tables, last = key.split(".")
    for i, name in enumerate(tables):
        inner = data.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"{key} cannot be set to {value!r}: {'.'.join(tables[: i + 1])} is {inner!r}, "
                "a value and not a table"
            )
        data = inner
    data[last] = value


def build_config(
    config_class: type[ModelT],
    mapping: Mapping[str, Any],
    *,
    prefix: str = "",
    elsewhere: Callable[[], Mapping[str, str]] | None = None,
) -> ModelT:
    """Validate ``mapping`` as a ``config_class``.

    Args:
        config_class: a pydantic model.
        mapping: its fields; the string ``"none"`` stands for None where a field accepts None and
            no string.
        prefix: put before every key in messages, e.g. ``"trainer."``.
        elsewhere: gives the keys that belong somewhere else, and what to say of each.

    Raises:
        ConfigError: one line per wrong key or value, naming the key, the value, what is accepted
            and the nearest key.
    """
    data = {key: _none(config_class, key, value) for key, value in mapping.items()}
    for key, value in data.items():
        field = config_class.model_fields.get(key)
        if isinstance(value, bool) and field is not None and _is_number(field.annotation):
            # pydantic reads true as 1; here it is always a slip.
            raise ConfigError(f"{prefix}{key} is {value!r}; it must be a number")
    try:
        return config_class.model_validate(data)
    except ValidationError as error:
        lines = _explain(config_class, data, error, prefix, elsewhere)
        raise ConfigError("\n".join(lines)) from None


def in_range(option: str, value: int | None, *, least: int = 1, most: int = MAX_COUNT) -> None:
    """Refuse the value of ``--option`` if it is out of range.

    Raises:
        ConfigError: it is.
    """
    if value is None or least <= value <= most:
        return
    limits = f"at least {least}" if most == MAX_COUNT > value else f"from {least} to {most}"
    told = str(value) if abs(value) < 10**30 else f"{str(value)[:30]}..."
    raise ConfigError(f"--{option} is {told}; it must be {limits}")


def check_output(option: str, path: Path | None) -> None:
    """Refuse a place for a file where none can be written, or where what is there is no file.

    A file is written beside and renamed: a device or a pipe would be replaced by it.

    Raises:
        ConfigError: the folder is not there, or something that is no regular file is.
    """
    if path is None:
        return
    try:
        if not path.parent.is_dir():
            raise ConfigError(f"--{option} {str(path)!r}: there is no folder {str(path.parent)!r}")
        if path.is_dir() or not path.name:
            raise ConfigError(f"--{option} {str(path)!r} is a folder; name a file")
        if path.exists() and not path.is_file():
            raise ConfigError(f"--{option} {str(path)!r} is a device or a pipe; name a file")
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise ConfigError(f"--{option} {str(path)!r}: {error.strerror}") from None


def _none(config_class: type[BaseModel], key: str, value: Any) -> Any:
    if not isinstance(value, str) or value.lower() not in ("none", "null"):
        return value
    field = config_class.model_fields.get(key)
    if field is None:
        return value
    arms = _arms(field.annotation)
    return None if type(None) in arms and str not in arms else value


def _is_number(annotation: Any) -> bool:
    return set(_arms(annotation)) <= {int, float, type(None)}


def _arms(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _explain(
    config_class: type[BaseModel],
    data: Mapping[str, Any],
    error: ValidationError,
    prefix: str,
    elsewhere: Callable[[], Mapping[str, str]] | None,
) -> list[str]:
    """One line per faulty key; the arms of a union that all failed become one line."""
    lines: dict[str, str] = {}
    accepted: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        key, fields, inner = _locate(config_class, item["loc"])
        name, kind = prefix + key, item["type"]
        value = _at(data, key.split("."), item["input"])
        if kind == "extra_forbidden":
            last = key.rpartition(".")[2]
            others = elsewhere() if elsewhere is not None and key == last else {}
            hint = others.get(last) or nearest(last, fields)
            if not hint and (near := close_match(last, others)):
                hint = others[near]
            if not hint:
                hint = "; keys are " + ", ".join(sorted(fields))
            lines[name] = f"unknown key {name} (given {_short(value)}){hint}"
        elif kind == "missing":
            # A missing table is begun by the field it cannot do without.
            needed = (n for n, f in inner.model_fields.items() if f.is_required()) if inner else ()
            whole = ".".join([name, *list(needed)[:1]])
            lines[name] = f"{name} is missing; set it in the file or with --set {whole}=..."
        elif not key:  # a rule between fields; the message names them
            lines[f"{name}#{len(lines)}"] = _message(item)
        elif kind in ("value_error", "assertion_error"):
            lines[name] = f"{name} is {_short(value)}: {_message(item)}"
        else:
            rules = accepted.setdefault(name, [])
            rule = _message(item)
            if rule not in rules:
                rules.append(rule)
            near = ""
            if kind == "literal_error" and isinstance(value, str):
                near = nearest(value, _literals(item["ctx"]["expected"]))
            lines[name] = f"{name} is {_short(value)}; it must be {' or '.join(rules)}{near}"
    return list(lines.values())


def _locate(
    config_class: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[str, list[str], type[BaseModel] | None]:
    """The dotted key of an error, the keys that exist beside it, and its model if it is a table.

    pydantic appends the name of the union arm it tried; such parts are no keys and end the walk.
    """
    parts: list[str] = []
    model: type[BaseModel] | None = config_class
    fields = list(config_class.model_fields)
    for part in loc:
        if model is None:
            break
        parts.append(str(part))
        fields = list(model.model_fields)
        field = model.model_fields.get(str(part))
        arms = _arms(field.annotation) if field is not None else ()
        model = next((a for a in arms if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return ".".join(parts), fields, model


def _at(data: Any, path: Sequence[str], default: Any) -> Any:
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            return default
        data = data[part]
    return data


# pydantic's words for types, in ours.
_TYPES = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "tuple_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "string_too_short": "a string that is not empty",
}


def _message(item: Any) -> str:
    given = item["input"]
    if item["type"] == "list_type" and isinstance(given, str) and len(given) < 40:
        return f"an array, like {_toml([given])}"
    if item["type"] in _TYPES:
        return _TYPES[item["type"]]
    text = str(item["msg"])
    for opening in ("Value error, ", "Assertion failed, ", "Input should be "):
        text = text.removeprefix(opening)
    return text


def _literals(expected: str) -> list[str]:
    """The strings of pydantic's ``"'a', 'b' or 'c'"``."""
    return expected.split("'")[1::2]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-15:]


def to_toml(data: Mapping[str, Any]) -> str:
    """``data`` as a TOML document that :func:`read_config` reads back; None values are left out.

    Raises:
        ConfigError: a value TOML has no form for.
    """
    lines = [f"{_toml_key(k)} = {_toml(v)}" for k, v in data.items() if not _is_table_or_none(v)]
    for key, value in data.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{_toml_key(key)}]"]
            lines += [f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None]
    return "\n".join(lines).lstrip("\n") + "\n"


def _is_table_or_none(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


def _toml_key(key: str) -> str:
    return (
        key if key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else _toml(key)
    )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)  # also inf and nan, which TOML spells as Python does
    if isinstance(value, (str, Path)):
        # A JSON string is a TOML basic string, once DEL is escaped and surrogate pairs are not.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None)
        return "{" + inner + "}"
    raise ConfigError(f"{value!r} cannot be written to a TOML file")
