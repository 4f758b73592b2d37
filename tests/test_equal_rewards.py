"""Equal rewards move nothing, whatever rounding does to their mean; promise 12."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from rlrf_trainers.losses import (  # noqa: E402
    group_advantages,
    reward_deviation,
    reward_statistics,
)
from tests.test_trainers import grpo, policy, sdpo, weights  # noqa: E402

HARD = [
    *(0.7, 0.1, 0.3, 0.43, 0.9, 1 / 3, 123456.7, 1e-9, -0.7, -123456.7, 0.0, -0.0, 5e-324),
    *(3.4e38, -3.4e38, 1e-45, 2.0**53 + 1),
]
SCALES = ["group", "batch", "none"]
rewards = st.one_of(
    st.sampled_from(HARD), st.floats(-3.4e38, 3.4e38), st.floats(-2, 2, allow_subnormal=False)
)


@given(
    groups=st.lists(st.tuples(rewards, st.integers(1, 33)), min_size=1, max_size=5),
    scale=st.sampled_from(SCALES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    std=st.sampled_from([None, 0.0, 1e-7, 0.3]),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_group_of_equal_rewards_has_no_advantage(groups, scale, dtype, std):
    values = torch.tensor([r for r, n in groups for _ in range(n)], dtype=torch.float64).to(dtype)
    ids = [i for i, (_, n) in enumerate(groups) for _ in range(n)]
    found = group_advantages(values, ids, scale_rewards=scale, batch_std=std)
    assert not found.any()
    told = reward_statistics(values, ids)
    assert (told["reward_std"], told["frac_reward_zero_std"]) == (0, 1)
    assert math.isfinite(told["reward"])
    if len(groups) == 1:
        assert told["reward"] == values[0]
        assert reward_deviation(values) == 0


@given(
    flat=rewards,
    other=st.lists(rewards, min_size=2, max_size=9),
    scale=st.sampled_from(SCALES),
    n=st.integers(2, 9),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_nor_has_it_beside_others_whose_advantages_are_finite(flat, other, scale, n):
    values = torch.tensor([flat] * n + other, dtype=torch.float64)
    found = group_advantages(values, [0] * n + [1] * len(other), scale_rewards=scale)
    assert not found[:n].any()
    assert found.isfinite().all()
    if scale == "group":
        assert found.abs().max() <= math.sqrt(len(other))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("of_size", [1.0, 123456.7, 1e-9])
def test_what_rounding_may_have_done_to_rewards_is_no_difference(scale, of_size):
    almost = torch.tensor([0.3, 0.1 + 0.2, 0.3, 0.30000000000000016], dtype=torch.float64)
    assert len(set(almost.tolist())) == 3
    assert not group_advantages(almost * of_size, [0] * 4, scale_rewards=scale).any()
    assert reward_statistics(almost * of_size, [0] * 4)["frac_reward_zero_std"] == 1
    single = (almost * of_size).float()
    single[1] = torch.nextafter(single[0], torch.tensor(math.inf))
    assert not group_advantages(single, [0] * 4, scale_rewards=scale).any()


def test_a_real_difference_is_one_however_small():
    values = torch.tensor([0.3, 0.3 + 1e-12, 0.3, 0.3], dtype=torch.float64)
    found = group_advantages(values, [0] * 4)
    assert found[1] > 0 > found[0]
    assert found.abs().max() < 1e-7  # the deviation is nothing beside the 1e-4 that is added
    assert reward_statistics(values, [0] * 4)["frac_reward_zero_std"] == 0
    small = group_advantages(values.new_tensor([1e-9, 2e-9]), [0, 0], scale_rewards="none")
    assert small.tolist() == pytest.approx([-5e-10, 5e-10])


def test_unscored_rows_do_not_make_a_difference():
    values = torch.tensor([0.7, math.nan, 0.7, 0.1, math.nan, 0.7])
    found = group_advantages(values, [0] * 6, scored=torch.tensor([1, 1, 1, 0, 1, 1]).bool())
    assert not found.any()


def test_huge_rewards_are_compared_without_an_overflow():
    values = torch.tensor([1.7e308, -1.7e308, 1.7e308, 1e308], dtype=torch.float64)
    found = group_advantages(values, [0] * 4)
    assert found.tolist() == pytest.approx([0.634, -1.468, 0.634, 0.201], abs=1e-3)
    assert group_advantages(values, [0] * 4, scale_rewards="none").isfinite().all()


# --- the trainers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollouts():
    return grpo().source.next()


def rewarded(rollouts, reward):
    return [replace(r, reward=reward) for r in rollouts]


@pytest.mark.parametrize("reward", [0.7, 0.1, 0.43, 123456.7, 1e-9, 1e300])
@pytest.mark.parametrize("scale", SCALES)
def test_grpo_does_not_move_a_single_weight(reward, scale, rollouts):
    trainer = grpo(scale_rewards=scale, mini_batch_prompts=1, num_iterations=2, weight_decay=0.1)
    before = weights(trainer)
    trainer.learner.step = 1
    trainer.learn(rewarded(rollouts, reward))
    # Not even by weight decay: a step in which nothing matters is none.
    assert all(torch.equal(before[n], p) for n, p in trainer.learner.model.named_parameters())
    assert not trainer.learner.optimizer.state()
    line = trainer.loop.log_step()
    assert (line["reward"], line["frac_reward_zero_std"]) == (reward, 1)
    assert "loss" not in line


def gradient(trainer, rollouts):
    trainer.learner.step = 1
    trainer.improve(trainer.prepare(rollouts))
    return {n: p.grad for n, p in trainer.learner.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reward", [0.7, 0.1, 123456.7])
@pytest.mark.parametrize("level", ["logit", "token"])
def test_a_hybrid_moves_by_its_distillation_alone(reward, level, rollouts):
    equal = rewarded(rollouts, reward)
    alone = gradient(sdpo(distillation_level=level), equal)
    mixed = gradient(sdpo(distillation_level=level, distillation_weight=0.5), equal)
    assert alone.keys() == mixed.keys() != set()
    for name, of_distillation in alone.items():
        assert torch.equal(2 * mixed[name], of_distillation), name


@pytest.mark.parametrize("config", [{"distillation_weight": 0.0}, {"route_to_grpo": True}])
def test_a_hybrid_without_distillation_does_not_move(config, rollouts):
    trainer = sdpo(**config, include_environment_feedback=False)
    before = weights(trainer)
    trainer.learner.step = 1
    trainer.learn([replace(r, reward=0.7, solved=False) for r in rollouts])
    assert all(torch.equal(before[n], p) for n, p in trainer.learner.model.named_parameters())


def test_a_gap_of_nothing_is_nothing(monkeypatch):
    """A leave-one-out mean by subtraction had left 1e-16 of it, with a sign that is told of."""
    from rlrf import Feedback, Outcome
    from tests.test_trainers import CountA

    class Constant(CountA):
        def grade(self, task, completion):
            return Outcome(0.7, Feedback.of("wrong_answer", "Say a."))

    trainer = sdpo(Constant(), probe_tasks=4, model=policy())
    trainer.before_training()
    gaps = trainer.learner.record.metrics["self_distillation/teacher_gap"]
    assert gaps
    assert {gap for gap, _ in gaps} == {0}
