"""The main job on the real model, cut short: it must begin to learn the rule from feedback.

Needs Qwen2.5-Coder-0.5B-Instruct in the folder named by RLRF_TEST_MODEL; takes a few minutes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import rlrf
from rlrf.config import load_train_config

MODEL = os.environ.get("RLRF_TEST_MODEL", "")
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not Path(MODEL, "config.json").is_file() or not MODEL,
        reason="RLRF_TEST_MODEL names no model folder",
    ),
]


def train(name: str, run_dir: Path, **overrides):
    config = load_train_config(EXAMPLES / f"demo_{name}.toml")
    trainer = rlrf.make_trainer(
        config.trainer.name,
        model=MODEL,
        env=rlrf.make(config.env.id),
        config={**config.trainer.options, **overrides},
        run_dir=run_dir,
    )
    return trainer.train()


def test_sdpo_learns_a_rule_that_no_attempt_obeyed(tmp_path):
    result = train("sdpo", tmp_path / "run", max_steps=9, eval_steps=0, eval_tasks=32)
    first, *steps = result.history
    last = steps[-1]
    assert first["eval/pass_rate"] < 0.1
    assert steps[0]["reward"] == 0.0
    assert steps[0]["frac_reward_zero_std"] == 1.0  # all-fail groups: GRPO would have nothing
    assert steps[0]["self_distillation/feedback_used_fraction"] == 1.0
    assert last["env/obeys_rule"] >= 0.4
    assert last["eval/pass_rate"] >= 0.3
    # the sampler and the trainer see one distribution, up to bf16
    assert all(s["sampling/sampling_logp_difference/max"] < 0.5 for s in steps)
    # and the trained adapter can be loaded for evaluation
    assert (result.model_dir / "adapter_model.safetensors").is_file()


def test_grpo_has_no_gradient_there(tmp_path):
    result = train("grpo", tmp_path / "run", max_steps=1, eval_tasks=8)
    assert result.history[1]["frac_reward_zero_std"] == 1.0
    assert "grad_norm" not in result.history[1]
