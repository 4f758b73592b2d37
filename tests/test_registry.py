"""Ids to environments: Gymnasium's own checks on each, what is refused, and vector environments."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match

import rlrf
from rlrf import ConfigError, Feedback, MissingDependencyError, UnknownIdError, UsageError
from rlrf.plugins import Registry, load_object
from rlrf.registry import accepted_options
from rlrf.spaces import Chat
from rlrf.trainer import trainers
from tests.environments_for_tests import INSTALLED, Echo, Guess

NAMES = sorted({*INSTALLED, "test-echo-v0", "test-guess-v0"})


def made(name, **kwargs):
    """The environment with Gymnasium's wrappers, or a skip where its extra or sandbox is absent."""
    if name in INSTALLED and name != "format-rules-v0" and not shutil.which("bwrap"):
        pytest.skip(f"{name} needs the sandbox bubblewrap, which is not installed")
    try:
        return gymnasium.make("rlrf/" + name, **kwargs)
    except MissingDependencyError as error:
        pytest.skip(str(error))


# --- Gymnasium ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("registered")
def test_every_environment_passes_gymnasiums_checks(name, published_code_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # To Gymnasium the releases of a data set are versions that went out of date.
        warnings.filterwarnings("ignore", ".*livecodebench-v[1-5] is out of date")
        env = made(name)
        check_env(env.unwrapped, skip_render_check=True)
        assert isinstance(env.unwrapped, rlrf.Env)
        env.close()
        # The passive checker, which `register` turns off for speed, has nothing to say either.
        checked = made(name, disable_env_checker=False)
        observation, _ = checked.reset(seed=1)
        assert observation in checked.observation_space
        checked.step("x")
        checked.close()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("registered")
@pytest.mark.filterwarnings("ignore:.*livecodebench-v[1-5] is out of date")
def test_every_environment_repeats_itself(name, published_code_data):
    one, other = made(name), made(name)
    check_environments_match(one, other, num_steps=3, seed=5, skip_render=True)
    for env in (one, other):
        env.reset(seed=3)
    answers = [env.step("x") for env in (one, other)]
    assert pickle.dumps(answers[0]) == pickle.dumps(answers[1])
    one.close()
    other.close()


@pytest.mark.parametrize("name", INSTALLED)
def test_specs_survive_json(name):
    spec = rlrf.spec(name)
    assert EnvSpec.from_json(spec.to_json()) == spec
    assert json.loads(spec.to_json())["id"] == "rlrf/" + name


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.slow)])
def test_every_environment_makes_vectors(name, mode, published_code_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = rlrf.make_vec(name, 2, mode)
        observations, infos = envs.reset(seed=3)
        alone = [rlrf.make(name).reset(seed=s) for s in (3, 4)]
        assert tuple(observations) == tuple(o for o, _ in alone)
        assert list(infos["task_id"]) == [i["task_id"] for _, i in alone]
        _, rewards, terminated, _, infos = envs.step(["x", "y"])
        assert not any(rewards)
        assert all(terminated)
        assert all(infos["feedback"])
        envs.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments(mode, registered):
    # A loop that already runs must not keep the processes of "async" from starting theirs.
    Echo().grade("train-no", "x")
    envs = rlrf.make_vec("test-echo-v0", 2, mode, shout=True)
    observations, infos = envs.reset(seed=3)
    alone = [rlrf.make("test-echo-v0").reset(seed=s) for s in (3, 4)]
    assert tuple(observations) == tuple(o for o, _ in alone)
    assert list(infos["task_id"]) == [i["task_id"] for _, i in alone]
    word = str(infos["task_id"][0]).rpartition("-")[2]
    _, rewards, terminated, _, infos = envs.step([word.upper(), "y"])
    assert list(rewards) == [1.0, 0.0]
    assert all(terminated)
    assert not infos["feedback"][0]
    assert isinstance(infos["feedback"][1], Feedback)
    envs.close()


def test_chat_spaces():
    observations, actions = Chat("observation", seed=1), Chat("action", seed=1)
    for space in (observations, actions):
        samples = [space.sample() for _ in range(5)]
        assert all(s in space for s in samples)
        assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(samples)))) == samples
        assert not space.is_np_flattenable
        assert eval(repr(space)) == space
    assert [Chat("action", seed=4).sample() for _ in range(2)] == [
        Chat("action", seed=4).sample() for _ in range(2)
    ]
    assert observations != actions
    assert len({observations, Chat("observation"), actions}) == 2
    assert {"role": "assistant", "content": None, "tool_calls": []} in actions
    for wrong in ({"role": "user", "content": "x"}, 3, None, b"x"):
        assert wrong not in actions
    for wrong in ("text", [{"role": "user", "content": "x"}], ({"role": "x", "content": "y"},)):
        assert wrong not in observations
    with pytest.raises(UsageError, match="'observation' or 'action'"):
        Chat("both")  # type: ignore[arg-type]  # that is the test


# --- register and make ----------------------------------------------------------------------------


def test_make(registered):
    env = rlrf.make("test-echo-v0", shout=True, feedback="category", split="eval")
    assert isinstance(env, Echo)
    assert env.shout
    assert env.feedback_level is rlrf.Level.category
    assert rlrf.make("rlrf/test-echo-v0").spec.id == "rlrf/test-echo-v0"
    assert rlrf.make(rlrf.spec("test-guess-v0")).max_turns == 4
    assert rlrf.make("test-guess-v0", max_turns=2).max_turns == 2
    assert "test-echo-v0" in rlrf.registry
    assert 3 not in rlrf.registry
    assert rlrf.registry["test-echo-v0"].entry_point is Echo
    assert len(rlrf.registry) == len(list(rlrf.registry)) >= 3
    assert "test-echo-v0" in repr(rlrf.registry)


def test_a_module_may_be_named_with_the_id(tmp_path, monkeypatch, registered):
    (tmp_path / "named_env.py").write_text(
        "import rlrf\nfrom tests.environments_for_tests import Echo\n"
        "rlrf.register('test-named-v0', Echo)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownIdError):
        rlrf.make("test-named-v0")
    assert isinstance(rlrf.make("named_env:test-named-v0"), Echo)
    sys.modules.pop("named_env")
    with pytest.raises(UsageError, match="no_such_module"):
        rlrf.make("no_such_module:test-named-v0")


def test_unknown_ids_name_near_ones():
    for asked in ("format-rule-v0", "format-rules", "rlrf/format-rules-v1"):
        with pytest.raises(UnknownIdError, match="Did you mean 'format-rules-v0'") as caught:
            rlrf.make(asked)
        assert isinstance(caught.value, LookupError)
    with pytest.raises(UnknownIdError, match="rlrf list"):
        rlrf.make("zzzzzzzzzzzzz")
    with pytest.raises(UnknownIdError):
        rlrf.make_vec("zzzzzzzzzzzzz")


@pytest.mark.parametrize(
    "id", ["No Version", "name", "Name-v0", "name-v", "-v0", "a--b-v0", "a/b-v0"]
)
def test_malformed_ids_are_refused(id):
    with pytest.raises(UsageError, match="name-vN"):
        rlrf.register(id, Echo)
    assert id not in rlrf.registry


def test_duplicates(registered):
    rlrf.register("test-echo-v0", Echo)  # the same again is no error
    rlrf.register("rlrf/test-echo-v0", Echo)
    for entry_point, kwargs in ((Guess, {}), (Echo, {"shout": True})):
        with pytest.raises(UsageError, match="already registered"):
            rlrf.register("test-echo-v0", entry_point, kwargs=kwargs)


def test_unknown_options_name_the_near_one(registered):
    for make in (rlrf.make, rlrf.make_vec):
        with pytest.raises(ConfigError, match="did you mean 'shout'"):
            make("test-echo-v0", shuot=True)
    with pytest.raises(ConfigError, match="options are feedback, max_feedback_tokens, max_turns"):
        rlrf.make("test-guess-v0", zzz=1)


def test_options_follow_the_bases_and_the_callables(registered):
    base = {"feedback", "split", "tokenizer", "max_feedback_tokens"}
    assert accepted_options(Echo) == base | {"shout"}
    assert accepted_options(Guess) == base | {"max_turns"}

    class Closed(Echo):
        def __init__(self, *, only=1):
            super().__init__()

    assert accepted_options(Closed) == {"only"}
    assert accepted_options(lambda a, b=1: None) == {"a", "b"}
    assert accepted_options(lambda **kwargs: None) is None
    rlrf.register("test-factory-v0", lambda **kwargs: Echo(**kwargs))
    assert rlrf.make("test-factory-v0", shout=True).shout


def test_what_is_no_rlrf_environment_is_refused(registered):
    class Plain(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Discrete(2)

    rlrf.register("test-plain-v0", Plain)
    with pytest.raises(UsageError, match=r"Plain, which is no rlrf\.Env"):
        rlrf.make("test-plain-v0")


def test_broken_entry_points_name_the_remedy(registered):
    rlrf.register("test-lost-v0", "no_such_module:Env")
    with pytest.raises(UsageError, match="'no_such_module' cannot be imported"):
        rlrf.make("test-lost-v0")
    rlrf.register("test-empty-v0", "rlrf.messages:NoSuchEnv")
    with pytest.raises(UsageError, match="has no 'NoSuchEnv'"):
        rlrf.make("test-empty-v0")


def test_one_badly_named_distribution_does_not_break_the_rest(monkeypatch, registered):
    from importlib.metadata import EntryPoint

    from rlrf import registry

    points = {
        "Bad Name": EntryPoint("Bad Name", "x:Y", "rlrf.environments"),
        "test-good-v0": EntryPoint(
            "test-good-v0", "tests.environments_for_tests:Echo", "rlrf.environments"
        ),
    }
    monkeypatch.setattr(sys.modules["rlrf.registry"]._environments, "entry_points", lambda: points)
    with pytest.warns(UserWarning, match="Bad Name"):
        rlrf.load_entry_points()
    assert isinstance(rlrf.make("test-good-v0"), Echo)
    assert "Bad Name" not in registry


def test_pprint(capsys, registered):
    text = rlrf.pprint_registry()
    assert "test-echo-v0" in text
    assert capsys.readouterr().out.strip() == text


def test_reset_draws_every_task_of_the_split(registered):
    env = rlrf.make("test-echo-v0")
    drawn = {env.reset(seed=int(s))[1]["task_id"] for s in np.arange(40)}
    assert drawn == set(env.tasks().ids())


# --- the registries of policies, trainers, sandboxes ----------------------------------------------


def test_a_plugin_registry():
    registry = Registry("rlrf.no-such-group", "gadget")
    with pytest.raises(UnknownIdError, match="No gadget is registered"):
        registry.load("x")
    registry.register("echo", Echo)
    registry.register("lazy", "tests.environments_for_tests:Guess")
    registry.register("echo", Echo)
    with pytest.raises(UsageError, match="already registered"):
        registry.register("echo", Guess)
    assert registry.names() == list(registry) == ["echo", "lazy"]
    assert "lazy" in registry
    assert registry.target("lazy") == "tests.environments_for_tests:Guess"
    assert (registry.load("echo"), registry.load("lazy")) == (Echo, Guess)
    with pytest.raises(UnknownIdError, match="Did you mean 'lazy'"):
        registry.load("lasy")


def test_an_installed_name_is_taken():
    with pytest.raises(UsageError, match="trainer 'sdpo' is already registered"):
        trainers.register("sdpo", Echo)
    assert trainers.target("sdpo") != Echo


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rlrf\[docker\]'") as caught:
        load_object("docker:from_env", "sandbox 'docker'")
    assert isinstance(caught.value, ImportError)
    with pytest.raises(UsageError, match="'no_such' cannot be imported"):
        load_object("no_such.part:X", "thing")
    assert load_object("rlrf.spaces:Chat.sample", "thing") is Chat.sample
