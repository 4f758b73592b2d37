"""Every knob at every extreme: it works, or one line names it, its value and what it may be."""

from __future__ import annotations

import inspect
import math
from functools import partial

import pytest
from pydantic import BaseModel

import rlrf
from rlrf import ConfigError, RlrfError, SamplingParams, UsageError, config
from rlrf.config import build_config, load_train_config

torch = pytest.importorskip("torch")

from rlrf_trainers import config as trainer_config  # noqa: E402
from rlrf_trainers.commands.discover import discover  # noqa: E402
from rlrf_trainers.config import GRPOConfig, SDPOConfig  # noqa: E402
from tests.test_trainers import SMALL, CountA, policy  # noqa: E402

EXTREMES = [
    *(0, 1, -1, 10**18, 2**64, 10**400, 1e18, 1e300, -1e300, 1e-45, 1e-9, 1 - 1e-9, 0.5),
    *(math.inf, -math.inf, math.nan, True, None, "", "none", "x" * 300, "\x00", "\ud800"),
    *([], [""], ["x"], [0], {}, {"a": 1}, b"x"),
]
CLASSES = [SDPOConfig, GRPOConfig]


def every_class(module):
    return {c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, BaseModel)}


def test_no_class_of_knobs_is_forgotten():
    own = every_class(trainer_config) | every_class(config)
    looked_at = {*CLASSES, trainer_config.TrainerConfig, config.TrainConfig, config.EnvSection}
    looked_at.add(trainer_config.RepromptConfig)  # all of its are SDPOConfig's
    assert own - {BaseModel} == looked_at | {config.TrainerSection, config.RunSection}


def refusal(of, make):
    """What ``make()`` gives and None, or None and why it is refused."""
    try:
        return make(), None
    except of as error:
        return None, str(error)


def accepted(cls, name, value):
    """The configuration, or None; what refuses it must say so well."""
    made, text = refusal(ConfigError, lambda: build_config(cls, {name: value}, prefix="trainer."))
    if text is not None:
        assert name in text
        assert any(
            word in text for word in ("must", "needs", "keys are", "has the", "is no ", "set ")
        ), text
        assert "\n" not in text
        assert len(text) < 500
        assert "pydantic" not in text
        shown = repr(value)[:40]
        told = shown in text or str(value)[:40] in text
        assert told or f"{name}=" in text, (shown, text)  # as a rule between knobs shows it
    return made


@pytest.mark.parametrize("cls", CLASSES)
def test_every_knob_takes_an_extreme_or_says_what_it_takes(cls):
    refused = 0
    for name in cls.model_fields:
        for value in EXTREMES:
            made = accepted(cls, name, value)
            refused += made is None
            for number in () if made is None else [getattr(made, name)]:
                assert not (isinstance(number, int) and abs(number) > 2**63), (name, number)
                if isinstance(number, float) and name != "success_reward_threshold":
                    assert abs(number) <= 1e7 or name == "max_grad_norm", (name, number)
                    # A beta of next to nothing is one of nothing.
                    assert number == 0 or abs(number) >= 1e-12 or "adam" in name, (name, number)
    assert refused > 20 * len(cls.model_fields)


ENDS = {
    "temperature": [1e-3, 1e3],
    "top_p": [1e-6],
    "rollout_deadline_s": [1e7],
    "learning_rate": [1e-12, 10],
    "weight_decay": [10],
    "adam_beta1": [0.999999],
    "adam_beta2": [0.0, 0.999999],
    "max_grad_norm": [1e-6, 1e300],
    "rollout_is_threshold": [1e6],
    "epsilon": [1e-6, 0.999],
    "epsilon_high": [1e-6, 1e6],
    "eval_temperature": [1e-3, 1e3],
    "eval_top_p": [1e-6],
    "micro_batch_tokens": [1, 2**31 - 1],
    "loss_chunk_mb": [1, 2**20],
    "max_completion_length": [1],
    "top_k": [2**31 - 1],
    "seed": [2**63 - 1],
    "distillation_alpha": [1e-3, 0.999],
    "distillation_topk": [2**31 - 1],
    "distillation_is_clip": [0.01, 1e6],
    "distillation_kl_clip": [1e-6, 1e6],
    "distillation_advantage_clip": [1e-6, 1e6],
    "distillation_weight": [1e-6, 1 - 1e-6],
    "teacher_entropy_beta": [1000],
    "teacher_update_rate": [1e-6],
    "beta": [1e-9, 1e6],
    "ref_model_mixup_alpha": [1e-6],
    "delta": [1.3, 1e6],
}


def one_step(cls, values, model):
    kind, made = "sdpo" if cls is SDPOConfig else "grpo", build_config(cls, values)
    trainer = rlrf.make_trainer(kind, model=model, env=CountA(), config=made)
    steps = trainer.loop.steps(trainer)
    next(steps)
    trainer.learn(trainer.source.next())
    trainer.loop.log_step()
    steps.close()
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_accepted_takes_a_step(cls):
    """Weights stay finite, or the end is one of ours."""
    extra = {"probe_tasks": 1} if cls is SDPOConfig else {"beta": 0.1}
    common = SMALL | extra | {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2}
    common |= {"eval_tasks": 1, "eval_steps": 0}
    model = policy()
    start = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    default, tried = cls(), 0
    for name in cls.model_fields:
        values = [v for v in EXTREMES if accepted(cls, name, v) is not None]
        for value in [*values, *ENDS.get(name, ())]:
            if value == getattr(default, name):
                continue
            mine = policy() if name == "lora_r" else model
            with torch.no_grad():
                for n, p in model.model.named_parameters():
                    p.copy_(start[n])
            trainer, told = refusal(RlrfError, partial(one_step, cls, common | {name: value}, mine))
            if told is not None:
                assert len(told) < 600, (name, value)
                continue
            tried += 1
            parameters = trainer.learner.model.parameters()
            assert all(p.isfinite().all() for p in parameters), (name, value)
    assert tried > 50


# --- rules between knobs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "values", "told"),
    [
        (SDPOConfig, {"num_generations": 1, "include_environment_feedback": False}, "no sibling"),
        (GRPOConfig, {"num_generations": 1}, "at least 2"),
        (SDPOConfig, {"learning_rate": 10, "weight_decay": 0.1}, "product must be below 1"),
        (SDPOConfig, {"distillation_alpha": 1e-9}, "must be 0, 1, or from 0.001 to 0.999"),
        (SDPOConfig, {"distillation_alpha": 1 - 1e-9}, "must be 0, 1, or from 0.001 to 0.999"),
        (SDPOConfig, {"distillation_weight": 1e-12}, "must be 0, 1, or from 1e-06"),
        (GRPOConfig, {"beta": 1e-45}, "must be 0, or from 1e-09"),
        (GRPOConfig, {"temperature": 1e-45}, "greater than or equal to 0.001"),
        (GRPOConfig, {"seed": 2**64}, "less than 9223372036854775808"),
        (GRPOConfig, {"metric_for_best_model": "eval/unscored_fraction"}, "'eval/pass_rate'"),
    ],
)
def test_what_would_teach_nothing_or_break_later_is_refused(cls, values, told):
    with pytest.raises(ConfigError) as caught:
        build_config(cls, values, prefix="trainer.")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"lora_alpha": 16}, {"lora_target_modules": ["q_proj"]}, {"lora_r": 0, "lora_alpha": 4}],
)
@pytest.mark.parametrize("kind", ["sdpo", "grpo"])
def test_the_shape_of_an_adapter_that_is_none_is_refused(kind, values):
    with pytest.raises(UsageError, match=r"shapes an adapter, and there is none.*set lora_r"):
        rlrf.make_trainer(kind, model=policy(), env=CountA(), config=SMALL | values)


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f.name for f in SamplingParams.__dataclass_fields__.values()])
def test_sampling_takes_an_extreme_or_says_what_it_takes(name):
    model = policy()
    prompt = rlrf.Prompt((rlrf.user("Hi."),))
    values = [*EXTREMES, 1e-3, 1e3, 1e-6, 2**31 - 1, 2**63 - 1, (), ("",), ("a",), (1,), "ab"]
    for value in values:
        params, told = refusal(
            UsageError, partial(SamplingParams, **{"max_tokens": 2} | {name: value})
        )
        if told is not None:
            assert told.startswith(f"SamplingParams.{name} is ")
            assert "must be" in told
            continue
        if name == "max_tokens" and value > 2:
            continue  # as long as the context
        (completion,) = model.generate([prompt], params)
        assert 1 <= len(completion.token_ids) <= 2
        assert all(math.isfinite(p) for p in completion.logprobs)


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["model", "env", "env.id", "eval_env", "trainer", "trainer.name", "run", "run.dir"]
)
def test_every_key_of_a_file_takes_an_extreme_or_says_what_it_takes(key):
    base = {"model": "m", "env.id": "a-v0"}
    if key == "env":
        del base["env.id"]
    for value in EXTREMES:
        if value is None:
            continue
        _, told = refusal(
            ConfigError,
            lambda given=base | {key: value}: load_train_config(None, (), given).held_out(),
        )
        if told is not None:
            assert key in told
            assert any(word in told for word in ("must", "missing", "unknown")), told
    with pytest.raises(ConfigError, match=r"eval_env\.id is 3"):
        load_train_config(None, (), base | {"env.id": "a", "eval_env.id": 3}).held_out()


@pytest.mark.parametrize("budget", [0, -1, 10**18])
def test_a_discovery_has_bounds_too(budget):
    with pytest.raises(UsageError, match=f"budget is {budget}; it must be a whole number from 1"):
        discover(CountA(), policy(), budget=budget)
    with pytest.raises(UsageError, match=f"seeds is {budget}; it must be"):
        discover(CountA(), policy(), seeds=budget)
