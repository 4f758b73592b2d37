"""How long a run takes is told from what was measured, and no part of the run is left out."""

from __future__ import annotations

import math
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from rlrf import Feedback, Outcome, SingleTurnEnv, Task, progress  # noqa: E402
from rlrf_trainers.algorithms.grpo import GRPOTrainer  # noqa: E402
from rlrf_trainers.algorithms.sdpo import SDPOTrainer  # noqa: E402
from rlrf_trainers.config import SDPOConfig  # noqa: E402
from rlrf_trainers.core import estimate  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.model.backbone import base_model  # noqa: E402
from rlrf_trainers.run import record  # noqa: E402
from tests.tiny_model import tiny_model, tiny_tokenizer  # noqa: E402

FEEDBACK = 24


class Wrong(SingleTurnEnv):
    """Nothing is right; rewards differ so that there is an advantage."""

    success_threshold = 2.0

    def load_tasks(self, split: str) -> list[Task]:
        much = 40 if split == "train" else 80
        return [Task(f"{split}-{i}", f"{i:<{much}}") for i in range(40)]

    def grade(self, task: Task, completion: str) -> Outcome:
        mark = sum(map(ord, completion))
        return Outcome(mark % 97 / 97, Feedback.of("hint", f"{mark:<{FEEDBACK - 1}}."))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that only a model moves: a second a token, and what its backward pass takes."""
    clock = SimpleNamespace(now=0.0, backward=2)
    clock.perf_counter = lambda: clock.now
    for module in (estimate, record):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(estimate, "_head_share", lambda learner: 0.0)
    monkeypatch.setattr(estimate, "FILLED", 1.0)
    monkeypatch.setattr(estimate, "DIFFER", 1.0)
    monkeypatch.setattr(estimate, "FEEDBACK_TOKENS", FEEDBACK)
    monkeypatch.setattr(estimate, "_QUICK_S", math.inf)
    monkeypatch.setattr(estimate, "_LONGEST_S", math.inf)
    return clock


def timed(clock: SimpleNamespace) -> HFPolicy:
    policy = HFPolicy(tiny_model(), tiny_tokenizer())
    policy.end_ids = ()  # every reply is as long as it may be

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        clock.now += ids.numel() * (1 + clock.backward * torch.is_grad_enabled())

    base_model(policy.model).get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    return policy


CONFIG = {
    "max_steps": 3,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_completion_length": 12,
    "eval_steps": 2,
    "eval_tasks": 16,
    "learning_rate": 1e-4,
    "save_model": False,
}
SDPO = {
    "probe_tasks": 4,
    "reprompt_template": "{prompt}{solution}{feedback}",
    "feedback_template": "{feedback_raw}",
    "use_successful_as_teacher": False,
}


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        pytest.param(SDPOTrainer, {}, marks=pytest.mark.slow),
        pytest.param(
            SDPOTrainer,
            {"probe_tasks": 0, "eval_steps": 0, "eval_on_start": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            SDPOTrainer,
            {"mini_batch_prompts": 2, "teacher_regularization": "frozen"},
            marks=pytest.mark.slow,
        ),
        (SDPOTrainer, {"num_iterations": 2, "baseline": "control"}),
        (SDPOTrainer, {"teacher_regularization": "trust_region", "lora_r": 2}),
        pytest.param(GRPOTrainer, {}, marks=pytest.mark.slow),
        (GRPOTrainer, {"beta": 0.1, "num_iterations": 2}),
    ],
)
def test_every_pass_of_a_run_is_counted(cls, config, clock, monkeypatch, tmp_path) -> None:
    found: list[estimate.Forecast] = []
    whole = estimate.forecast
    monkeypatch.setattr(
        estimate, "forecast", lambda *given: found.append(whole(*given)) or found[-1]
    )
    more = SDPO if cls is SDPOTrainer else {}
    clock.backward = 1 if "lora_r" in config else 2  # nothing for weights that are frozen
    made = cls(timed(clock), Wrong(), cls.config_class(**(CONFIG | more | config)))
    with progress.listening(lambda text: None):
        history = made.train().history
    (told,) = found
    spent = [line["time/step"] - line.get("time/eval", 0.0) for line in history[1:]]
    held = [line["time/eval"] for line in history if "time/eval" in line]
    # Not the first: what a step has of its own to find out about a model, it asks once.
    assert told.step == pytest.approx(median(spent[1:]), rel=0.15)
    assert told.evaluation == pytest.approx(median(held), rel=0.05)
    assert told.probe == pytest.approx(history[0].get("time/probe", 0.0), rel=0.15)
    assert len(held) == made.config.evaluations_after(0)
    assert len(spent) == made.config.max_steps


def test_evaluations_to_come() -> None:
    for last, every, start in ((3, 2, True), (4, 2, False), (5, 0, True), (1, 1, True), (9, 4, 0)):
        config = SDPOConfig(max_steps=last, eval_steps=every, eval_on_start=start)
        due = [s for s in range(1, last + 1) if s == last or (every and s % every == 0)]
        for step in range(last + 1):
            expected = len([s for s in due if s > step]) + (bool(start) and not step)
            assert config.evaluations_after(step) == expected
    config = SDPOConfig(max_steps=10_000_000, eval_steps=1)
    assert config.evaluations_after(1) == 9_999_999
