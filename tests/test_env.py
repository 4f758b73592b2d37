"""Environments: both faces, hooks of every kind, the registry, and Gymnasium's own checks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import rlrf
from rlrf import Feedback, InfraError, Outcome, Task, Turn, UsageError


class Echo(rlrf.SingleTurnEnv):
    """Say the word."""

    def __init__(self, *, shout: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.shout = shout

    def load_tasks(self, split):
        return [Task(f"{split}-{w}", f"Say {w}.", {"n": 1}, hidden=w) for w in ("yes", "no", "so")]

    def grade(self, task, completion):
        if completion == task.hidden:
            return Outcome(1.0, metrics={"length": len(completion)})
        return Outcome(0.0, Feedback.of("wrong_answer", "Say the word alone."))


class AsyncEcho(Echo):
    """The same with ``async def``, through ``super()``."""

    async def grade(self, task, completion):
        await asyncio.sleep(0)
        return super().grade(task, completion)


class Guess(rlrf.MultiTurnEnv):
    """Guess a number that the episode's generator draws."""

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", "Guess.") for i in range(3)]

    def start(self, task, rng):
        return {"number": int(rng.integers(10)), "tries": 0}

    async def respond(self, state, action):
        state["tries"] += 1
        right = action["content"] == str(state["number"])
        told = Feedback() if right else Feedback.of("hint", f"Not it: try {state['tries'] + 1}.")
        return Turn("Again." if not right else (), float(right), told, terminated=right)


@pytest.fixture(autouse=True, scope="module")
def registered():
    rlrf.register("test-echo-v0", Echo)
    rlrf.register("test-guess-v0", Guess, kwargs={"max_turns": 4})
    yield
    for name in ("rlrf/test-echo-v0", "rlrf/test-guess-v0"):
        gymnasium.registry.pop(name)


@pytest.mark.parametrize("cls", [Echo, AsyncEcho])
def test_one_shot_episode_and_grade(cls):
    env = cls()
    observation, info = env.reset(seed=0, options={"task_id": "train-no"})
    assert observation == ({"role": "user", "content": "Say no."},)
    assert info == {"task_id": "train-no", "feedback": Feedback(), "metrics": {}}
    observation, reward, terminated, truncated, info = env.step("no")
    assert (observation, reward, terminated, truncated) == ((), 1.0, True, False)
    assert info["metrics"] == {"length": 2}
    reward, feedback = env.grade("eval-yes", "no")
    assert (reward, feedback.kinds) == (0.0, ("wrong_answer",))
    assert env.grade("eval-yes", {"role": "assistant", "content": "yes"}).reward == 1.0


def test_async_face_inside_a_running_loop():
    async def go():
        env = AsyncEcho()
        await env.areset(seed=1)
        result = await env.astep("x")
        assert result.reward == 0.0
        assert (await env.agrade("train-so", "so")).reward == 1.0
        assert env.grade("train-so", "so").reward == 1.0  # sync, from inside a loop
        await env.aclose()

    asyncio.run(go())


def test_feedback_level_is_applied_on_every_path():
    env = Echo(feedback="category")
    assert env.grade("train-no", "x").feedback.text == "The answer is wrong."
    env.reset(seed=0)
    assert env.step("x")[4]["feedback"].text == "The answer is wrong."
    assert not Echo(feedback="none").grade("train-no", "x").feedback


def test_hidden_data_is_never_handed_out():
    env = Echo()
    for task in env.tasks():
        assert task.hidden is None
    assert "hidden" not in repr(env._find_task("train-no"))
    assert env.tasks("eval").ids() == ["eval-yes", "eval-no", "eval-so"]
    assert env.tasks()[1:] == [env.tasks()[1], env.tasks()[2]]
    assert env.grade(env.tasks()[1], "no").reward == 1.0  # a public task will do


def test_observations_do_not_share_memory():
    env = Echo()
    first, _ = env.reset(seed=0)
    first[0]["content"] = "spoilt"
    assert env.reset(seed=0)[0][0]["content"] != "spoilt"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.step("x"), "before reset"),
        (lambda e: e.reset(options={"task_id": "train-yess"}), "'train-yes'"),
        (lambda e: e.reset(options={"tsk": 1}), "'task_id', 'split'"),
        (lambda e: e.reset(options={"split": "test"}), "'train', 'eval'"),
        (lambda e: (e.reset(seed=0), e.step("x"), e.step("x")), "has ended"),
        (lambda e: (e.reset(seed=0), e.step(3)), "an action is"),
        (lambda e: Echo(split="dev"), "splits are"),
        (lambda e: Echo(feedback="loud"), "levels are"),
        (lambda e: Outcome(float("nan")), "InfraError"),
        (lambda e: Outcome(None), "finite"),
        (lambda e: Task("", "x"), "non-empty"),
        (lambda e: Task("x", [{"role": "nobody", "content": "x"}]), "role"),
    ],
)
def test_wrong_use_is_named_with_its_remedy(call, words):
    with pytest.raises(UsageError, match=words):
        call(Echo())


def test_duplicate_and_missing_tasks():
    class Twice(Echo):
        def load_tasks(self, split):
            return [Task("a", "x"), Task("a", "y")]

    with pytest.raises(UsageError, match="two tasks have the id 'a'"):
        Twice().tasks().ids()

    class Nothing(Echo):
        def load_tasks(self, split):
            return []

    with pytest.raises(UsageError, match="no task in split 'train'"):
        Nothing().reset(seed=0)


def test_a_grader_must_return_an_outcome():
    class Bare(Echo):
        def grade(self, task, completion):
            return 1.0

    with pytest.raises(UsageError, match=r"rlrf\.Outcome"):
        Bare().grade("train-no", "x")

    class NoGrade(rlrf.SingleTurnEnv):
        def load_tasks(self, split):
            return [Task("a", "x")]

    with pytest.raises(TypeError, match="must define grade"):
        NoGrade().grade("a", "x")


def test_several_turns():
    env = Guess(max_turns=3)
    env.reset(seed=3, options={"task_id": "train-0"})
    results = [env.step("x") for _ in range(3)]
    assert [r[3] for r in results] == [False, False, True]
    assert [r[4]["feedback"].text for r in results] == [f"Not it: try {i}." for i in (2, 3, 4)]
    assert results[0][0] == ({"role": "user", "content": "Again."},)

    def number(seed):
        episode = asyncio.run(env.aepisode("train-0", seed=seed))
        return episode._state.inner["number"]

    assert number(5) == number(5)
    assert len({number(s) for s in range(12)}) > 1
    with pytest.raises(UsageError, match="max_turns"):
        Guess(max_turns=0)


def test_infrastructure_failures_pass_through():
    class Broken(Echo):
        def grade(self, task, completion):
            raise InfraError("the judge is away", kind="judge_unavailable")

    with pytest.raises(InfraError, match="judge is away"):
        Broken().grade("train-no", "x")


def test_feedback_tokens():
    pytest.importorskip("transformers")
    from tests.tiny_model import tiny_tokenizer

    env = Echo(tokenizer=tiny_tokenizer(), max_feedback_tokens=12)
    env.reset(seed=0)
    tokens = env.step("x")[4]["feedback_tokens"]
    assert 0 < len(tokens) <= 12
    assert tokens.truncated


# --- the registry -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*rlrf.registry, "test-echo-v0", "test-guess-v0"}))
def test_every_environment_passes_gymnasiums_checks(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = gymnasium.make("rlrf/" + name)
        check_env(made.unwrapped, skip_render_check=True)
        assert isinstance(made.unwrapped, rlrf.Env)
        spec = rlrf.spec(name)
        if isinstance(spec.entry_point, str):
            assert gymnasium.envs.registration.EnvSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments(mode):
    if mode == "async":
        envs = rlrf.make_vec("format-rules-v0", 2, "async")
    else:
        envs = rlrf.make_vec("test-echo-v0", 2)
    observations, infos = envs.reset(seed=3)
    assert len(observations) == 2
    assert infos["task_id"][0] != infos["task_id"][1] or mode == "sync"
    _, rewards, terminated, _, infos = envs.step(["x", "y"])
    assert list(rewards) == [0.0, 0.0]
    assert all(terminated)
    assert all(isinstance(f, Feedback) and f for f in infos["feedback"])
    envs.close()


def test_make_and_its_errors():
    assert isinstance(rlrf.make("test-echo-v0", shout=True), Echo)
    assert rlrf.make("rlrf/test-echo-v0").spec.id == "rlrf/test-echo-v0"
    assert "test-echo-v0" in rlrf.registry
    assert len(rlrf.registry) >= 4
    with pytest.raises(rlrf.UnknownIdError, match="'format-rules-v0'"):
        rlrf.make("format-rule-v0")
    with pytest.raises(rlrf.ConfigError, match="shout"):
        rlrf.make("test-echo-v0", shuot=True)
    with pytest.raises(UsageError, match="name-vN"):
        rlrf.register("No Version", Echo)
    with pytest.raises(UsageError, match="already registered"):
        rlrf.register("test-echo-v0", Guess)
    rlrf.register("test-echo-v0", Echo)  # the same again is no error
    rlrf.register("test-lost-v0", "no_such_module:Env")
    with pytest.raises(UsageError, match="cannot be imported"):
        rlrf.make("test-lost-v0")
    gymnasium.registry.pop("rlrf/test-lost-v0", None)


def test_what_is_no_rlrf_environment_is_refused():
    class Plain(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Discrete(2)

    rlrf.register("test-plain-v0", Plain)
    try:
        with pytest.raises(UsageError, match=r"no rlrf\.Env"):
            rlrf.make("test-plain-v0")
    finally:
        gymnasium.registry.pop("rlrf/test-plain-v0")


def test_pprint(capsys):
    assert "test-echo-v0" in rlrf.pprint_registry()
    assert "test-echo-v0" in capsys.readouterr().out


THIRD_PARTY = """
import rlrf

class Bell(rlrf.SingleTurnEnv):
    def load_tasks(self, split):
        return [rlrf.Task(split + "-ring", "Ring!", hidden="ding")]

    def grade(self, task, completion):
        right = completion == task.hidden
        told = rlrf.Feedback() if right else rlrf.Feedback.of("hint", "Try ding.")
        return rlrf.Outcome(float(right), told)
"""


def test_an_environment_of_another_distribution_is_found(tmp_path):
    """A separate project, built and installed by pip into a folder of its own."""
    project = tmp_path / "project"
    (project / "bell_env").mkdir(parents=True)
    (project / "bell_env" / "__init__.py").write_text(THIRD_PARTY)
    (project / "pyproject.toml").write_text(
        textwrap.dedent("""
        [build-system]
        requires = ["hatchling"]
        build-backend = "hatchling.build"
        [project]
        name = "bell-env"
        version = "1.0"
        [project.entry-points."rlrf.environments"]
        bell-v0 = "bell_env:Bell"
        """)
    )
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    pip += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    subprocess.run([*pip, str(project)], check=True, capture_output=True, text=True)
    code = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import rlrf
    assert "bell-v0" in rlrf.registry
    assert "bell_env" not in sys.modules
    env = rlrf.make("bell-v0")
    print(env.grade("train-ring", "ding").reward, env.grade("train-ring", "dong").feedback)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(site)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "1.0 Try ding."


def test_importing_rlrf_is_light():
    code = """
    import json, sys
    import gymnasium, pydantic
    before = set(sys.modules)
    import rlrf
    print(json.dumps(sorted(set(sys.modules) - before)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True
    )
    loaded = json.loads(done.stdout)
    roots = {m.partition(".")[0] for m in loaded}
    heavy = {"torch", "transformers", "docker", "peft", "numpy.testing", "typer", "rich", "httpx"}
    wings = {"rlrf_environments", "rlrf_sandboxes", "rlrf_trainers"}
    assert not roots & (heavy | wings)
    assert len(loaded) < 120, loaded


def test_rewards_may_be_numpy_numbers():
    assert type(Outcome(np.float32(0.5)).reward) is float
