from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

import rlrf
from rlrf import ConfigError
from rlrf.config import (
    build_config,
    build_trainer_config,
    load_train_config,
    parse_assignment,
    parse_value,
    read_config,
    set_key,
    to_toml,
)
from rlrf.trainer import trainers


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = Field(ge=1)


class Knobs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    learning_rate: float = Field(1e-6, gt=0)
    steps: int = 10
    top_k: int | None = 20
    name: str | None = "x"
    mode: Literal["mean", "none"] = "mean"
    modules: list[str] | Literal["all-linear"] = "all-linear"
    flag: bool = False
    template: str = "{a}"
    inner: Inner | None = None

    @field_validator("template")
    @classmethod
    def _braced(cls, value: str) -> str:
        if "{a}" not in value:
            raise ValueError("has no {a}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Knobs:
        if self.steps < 0 and not self.flag:
            raise ValueError(f"steps={self.steps} needs flag=true")
        return self


def build(**data: Any) -> Knobs:
    return build_config(Knobs, data, prefix="trainer.")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"learning_rat": 3},
            "unknown key trainer.learning_rat (given 3); did you mean 'learning_rate'?",
        ),
        (
            {"zzz": 1},
            "unknown key trainer.zzz (given 1); keys are flag, inner, learning_rate, mode, modules,"
            " name, steps, template, top_k",
        ),
        ({"learning_rate": -1}, "trainer.learning_rate is -1; it must be greater than 0"),
        ({"learning_rate": "fast"}, "trainer.learning_rate is 'fast'; it must be a number"),
        ({"steps": 1.5}, "trainer.steps is 1.5; it must be a whole number"),
        ({"steps": True}, "trainer.steps is True; it must be a number"),
        ({"flag": "perhaps"}, "trainer.flag is 'perhaps'; it must be true or false"),
        (
            {"mode": "meen"},
            "trainer.mode is 'meen'; it must be 'mean' or 'none'; did you mean 'mean'?",
        ),
        ({"modules": 3}, "trainer.modules is 3; it must be an array or 'all-linear'"),
        (
            {"modules": "q"},
            "trainer.modules is 'q'; it must be an array, like [\"q\"] or 'all-linear'",
        ),
        ({"template": "x"}, "trainer.template is 'x': has no {a}"),
        ({"steps": -1}, "steps=-1 needs flag=true"),
        ({"inner": {"depth": 0}}, "trainer.inner.depth is 0; it must be greater than or equal to"),
        ({"inner": {"depht": 1, "depth": 1}}, "unknown key trainer.inner.depht (given 1); did you"),
        ({"inner": {}}, "trainer.inner.depth is missing"),
        ({"inner": 3}, "trainer.inner is 3; it must be a table"),
    ],
)
def test_each_error_is_one_line_naming_key_value_and_what_is_accepted(
    data: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**data)
    text = str(caught.value)
    assert text.startswith(expected)
    assert "\n" not in text
    assert "pydantic" not in text


def test_every_wrong_key_gets_its_own_line() -> None:
    with pytest.raises(ConfigError) as caught:
        build(learning_rate=-1, stepz=3)
    assert len(str(caught.value).splitlines()) == 2


def test_long_values_are_shortened() -> None:
    with pytest.raises(ConfigError) as caught:
        build(steps="x" * 5000)
    assert len(str(caught.value)) < 200


def test_none_is_spelled_none_where_a_field_takes_none_and_no_string() -> None:
    assert build(top_k="none").top_k is None
    assert build(top_k="null").top_k is None
    assert build(name="none").name == "none"
    assert build(mode="none").mode == "none"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3", 3),
        ("true", True),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("located", "located"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("2024-08-01", "2024-08-01"),
        ("", ""),
        ("1\nb = 2", "1\nb = 2"),
    ],
)
def test_values_are_toml_or_text(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_assignments_keep_later_equals_signs() -> None:
    assert parse_assignment("a.b = x=y") == ("a.b", "x=y")


@pytest.mark.parametrize("text", ["novalue", "=3", "a..b=3", ".a=1"])
def test_a_malformed_assignment_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignment(text)


def test_set_key_refuses_to_go_through_a_value() -> None:
    data: dict[str, Any] = {"model": "x"}
    with pytest.raises(ConfigError, match="model is 'x'"):
        set_key(data, "model.size", 3)


def test_train_config_lays_flags_and_assignments_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'model = "m"\n[env]\nid = "a-v0"\nfeedback = "located"\n'
        '[trainer]\nname = "sdpo"\nlearning_rate = 1.0\n'
    )
    config = load_train_config(
        file,
        ["trainer.learning_rate=0.5", "env.split=train"],
        {"model": "n", "trainer.name": None, "trainer.learning_rate": 2.0},
    )
    assert config.model == "n"
    assert config.env.id == "a-v0"
    assert config.env.options == {"feedback": "located", "split": "train"}
    assert config.trainer.name == "sdpo"
    assert config.trainer.options == {"learning_rate": 0.5}
    assert config.run.dir is None


def test_the_held_out_environment_inherits_from_the_training_one() -> None:
    base = ["model=m", "env.id=a-v0", "env.n=3", "env.split=train"]
    plain = load_train_config(None, base).held_out()
    assert (plain.id, plain.options) == ("a-v0", {"n": 3, "split": "eval"})
    some = load_train_config(None, [*base, "eval_env.n=5"]).held_out()
    assert (some.id, some.options) == ("a-v0", {"n": 5, "split": "eval"})
    other = load_train_config(None, [*base, "eval_env.id=b-v0", "eval_env.split=test"]).held_out()
    assert (other.id, other.options) == ("b-v0", {"split": "test"})


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["env.id=a-v0"], "model is missing; set it in the file or with --set model=..."),
        (["model=m"], "env is missing; set it in the file or with --set env.id=..."),
        (["model=m", "env.id=3"], "env.id is 3; it must be a string"),
        (["model=m", "env.id=a", "run.dri=x"], "unknown key run.dri (given 'x'); did you mean 'd"),
        (["model=m", "env.id=a", "trianer.x=1"], "unknown key trianer"),
        (["model=", "env.id=a"], "model is ''; it must be a string that is not empty"),
    ],
)
def test_a_wrong_train_config_names_the_key(assignments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_train_config(None, assignments)
    assert str(caught.value).startswith(expected)


def test_unreadable_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("a = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml' is not valid TOML"):
        read_config(tmp_path / "bad.toml")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must hold tables"):
        read_config(tmp_path / "bad.json")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_config(tmp_path / "latin.toml")


def test_toml_that_is_written_reads_back(tmp_path: Path) -> None:
    data = {
        "model": 'a"b\\c\n\x7f\x00é🙂',
        "rate": 1e-6,
        "big": float("inf"),
        "gone": None,
        "env": {"id": "x", "list": [1, 2.5, True, "a", [1]], "odd key": 1, "table": {"a b": None}},
        "empty": {},
    }
    (tmp_path / "c.toml").write_text(to_toml(data), encoding="utf-8")
    back = read_config(tmp_path / "c.toml")
    expected = json.loads(json.dumps(data))
    del expected["gone"]
    expected["env"]["table"] = {}
    assert back == expected


def test_toml_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        to_toml({"a": object()})


# --- several trainers, and keys that belong elsewhere ---------------------------------------------


class OtherKnobs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    learning_rate: float = 1e-6
    sharpness: float = 1.0


@pytest.fixture
def two_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``knobs`` and ``other``, and none else."""
    made: dict[str, Any] = {"knobs": Knobs, "other": OtherKnobs}
    known = {name: type(name, (), {"config_class": c}) for name, c in made.items()}
    known["broken"] = "no_such_module:Broken"  # type: ignore[assignment]  # a target not imported
    monkeypatch.setattr(trainers, "_added", known)
    monkeypatch.setattr(trainers, "entry_points", dict)


FOR_BOTH = """
model = "m"
[env]
id = "format-rules-v0"
[trainer]
name = "other"
learning_rate = 0.5
[trainer.knobs]
steps = 3
[trainer.other]
sharpness = 2.0
"""


@pytest.mark.usefixtures("two_trainers")
@pytest.mark.parametrize(
    ("given", "overrides", "options"),
    [
        ((), {}, {"learning_rate": 0.5, "sharpness": 2.0}),
        ((), {"trainer.name": "knobs"}, {"learning_rate": 0.5, "steps": 3}),
        (("trainer.name=knobs", "trainer.steps=9"), {}, {"learning_rate": 0.5, "steps": 9}),
        (("trainer.other.learning_rate=0.1",), {}, {"learning_rate": 0.1, "sharpness": 2.0}),
        (
            ("trainer.sharpness=7", "trainer.other.sharpness=8"),
            {},
            {"learning_rate": 0.5, "sharpness": 8},
        ),
    ],
)
def test_one_file_serves_several_trainers(
    tmp_path: Path, given: tuple[str, ...], overrides: dict[str, Any], options: dict[str, Any]
) -> None:
    (tmp_path / "both.toml").write_text(FOR_BOTH)
    config = load_train_config(tmp_path / "both.toml", given, overrides)
    assert config.trainer.options == options
    # What is written into the run is what applied.
    (tmp_path / "run.toml").write_text(to_toml(config.model_dump(exclude_none=True)))
    assert load_train_config(tmp_path / "run.toml") == config


@pytest.mark.usefixtures("two_trainers")
@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("steps", "did you mean 'trainer.steps'?"),
        ("learning_rat", "did you mean 'trainer.learning_rate'?"),
        ("rule", "did you mean 'env.rule'?"),
        ("dir", "did you mean 'run.dir'?"),
        ("modle", "did you mean 'model'?"),
        ("zzz", "keys are env, eval_env, model, run, trainer"),
    ],
)
def test_a_key_outside_of_its_table_is_told_where_it_belongs(key: str, told: str) -> None:
    given = ("model=m", "env.id=format-rules-v0", "trainer.name=knobs", f"{key}=1")
    with pytest.raises(ConfigError, match=rf"unknown key {key} \(given 1\); ") as caught:
        load_train_config(None, given)
    assert told in str(caught.value)
    with pytest.raises(ConfigError, match=r"unknown key nested \(.*keys are env"):
        load_train_config(None, ("nested.steps=1", "model=m", "env.id=x", "trainer.name=nobody"))


@pytest.mark.usefixtures("two_trainers")
def test_a_key_of_another_trainer_is_said_to_be_one() -> None:
    told = r"trainer.sharpness \(given 1\); it is a key of the trainer 'other', and this is 'knobs'"
    with pytest.raises(ConfigError, match=told):
        build_trainer_config("knobs", {"sharpness": 1}, prefix="trainer.")
    with pytest.raises(ConfigError, match=r"\[trainer\.other\]"):
        rlrf.make_trainer("knobs", model="m", env="format-rules-v0", config={"sharpness": 1})
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        build_trainer_config("knobs", {"step": 1})
