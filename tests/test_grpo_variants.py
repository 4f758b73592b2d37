"""The variants of GRPO against their definitions, in float64 on a tiny model."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import rlrf  # noqa: E402
from rlrf import Outcome, Rollout, Task  # noqa: E402
from rlrf_trainers.algorithms.grpo import GRPOTrainer  # noqa: E402
from rlrf_trainers.config import GRPOConfig  # noqa: E402
from rlrf_trainers.core.batch import Batch, Sample  # noqa: E402
from rlrf_trainers.model.distributed import World  # noqa: E402
from tests.by_hand import (  # noqa: E402
    advantages,
    apart,
    assert_clipping_is_told,
    assert_near,
    double_policy,
    fixed_logps,
    gradient,
    gradient_of,
    grpo_loss,
    logps,
    steps_of,
    trained,
    with_weights,
)

SMALL = {
    "max_steps": 10,
    "prompts_per_step": 4,
    "num_generations": 3,
    "max_completion_length": 9,
    "micro_batch_tokens": 25,  # several forwards a step
    "rollout_is": "none",
    "learning_rate": 1e-4,
}


class Unused(rlrf.SingleTurnEnv):
    """The rollouts are written by hand."""

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"Say {i}.") for i in range(6)]

    def grade(self, task, completion):
        return Outcome(0.0)


REWARDS = {"a": (1.0, 0.0, 0.25), "b": (0.0, 0.0, 1.0), "c": (0.5, 3.0, 0.0), "d": (1.0, 1.0, 1.0)}
"""Of three groups of unlike deviations, and of one that has nothing to compare."""


@pytest.fixture(scope="module")
def rollouts():
    """Replies of unequal length, one with a turn of the environment, by a sampler that is off."""
    rng, found, model = random.Random(0), [], double_policy().model
    for group, rewards in REWARDS.items():
        prompt = tuple(rng.randrange(200) for _ in range(rng.randint(3, 6)))
        for sample, reward in enumerate(rewards):
            # A small alphabet: what one group is taught, another is taught out of.
            reply = tuple(rng.randrange(8) for _ in range(rng.randint(1, 8)))
            mask = [1] * len(reply)
            if group == "b" and sample == 1:
                reply, mask = (1, 2, 3, 4, 5, 6), [1, 1, 0, 0, 1, 1]
            r = Rollout(
                task_id=group,
                group_id=group,
                prompt_ids=prompt,
                completion_ids=reply,
                completion_mask=tuple(mask),
                reward=reward,
                finish_reason="length" if (group, sample) in {("a", 0), ("c", 2)} else "terminated",
                sample=sample,
            )
            ours = iter(fixed_logps(model, [r])[0].tolist())
            theirs = [next(ours) + rng.uniform(-1, 1) if m else 0.0 for m in mask]
            # Exact in float32, in which trainers keep them.
            found.append(replace(r, logprobs=tuple(torch.tensor(theirs).tolist())))
    assert len({len(r.completion_ids) for r in found}) > 4
    return found


def grpo(**config):
    return GRPOTrainer(double_policy(), Unused(), GRPOConfig(**{**SMALL, **config}))


def assert_honoured(rollouts, config, *unlike):
    """Every optimizer step is that of the definition, and would not be otherwise.

    Args:
        rollouts: of one generation batch.
        config: of the trainer.
        unlike: what the trainer must not do instead; some step would be another one then.
    """
    trainer = grpo(**config)
    temperature = trainer.config.temperature
    steps = steps_of(trainer, rollouts)
    size = trainer.config.mini_batch_prompts
    groups = list(REWARDS)
    parts = [groups[i : i + size] for i in range(0, len(groups), size)] if size else [groups]
    parts = [p for p in parts if p != ["d"]]  # nothing to learn: no step is taken
    parts *= trainer.config.num_iterations
    assert len(steps) == len(parts)
    start = fixed_logps(steps[0].model, rollouts, temperature)
    start = dict(zip(map(id, rollouts), start, strict=True))
    noticed = [False for _ in unlike]
    for step, part in zip(steps, parts, strict=True):
        rows = [r for r in rollouts if r.group_id in part]
        now = logps(step.model, rows, temperature)
        old = [start[id(r)] for r in rows]

        def definition(rows=rows, now=now, old=old, **changes):
            made = GRPOConfig(**{**SMALL, **config, **changes})
            return grpo_loss(rows, made, now, everyone=rollouts, old=old, reference=old)

        loss = definition()
        assert step.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
        assert_near(step.gradient, gradient_of(loss, step.model))
        for i, changes in enumerate(unlike):
            noticed[i] |= apart(gradient_of(loss, now), gradient_of(definition(**changes), now))
    assert all(noticed), [u for u, told in zip(unlike, noticed, strict=True) if not told]


# --- the mean over tokens ---------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
def test_the_loss_is_a_mean_of_its_type(rollouts, loss_type):
    others = {"grpo", "dr_grpo", "dapo"} - {loss_type, "dapo" if loss_type == "bnpo" else ""}
    unlike = [{"loss_type": other} for other in sorted(others)]
    assert_honoured(rollouts, {"loss_type": loss_type}, *unlike)


@pytest.mark.parametrize(
    ("loss_type", "share"), [("grpo", 1 / 3), ("dr_grpo", 1 / 3), ("dapo", 1 / 3), ("bnpo", 1 / 2)]
)
def test_of_several_processes_bnpo_alone_weighs_each_alike(rollouts, loss_type, share):
    class OfTwo(World):
        """The other process has twice as much of everything."""

        def gather(self, value):
            return [value, [2 * v for v in value]]

    def found(world):
        trainer = grpo(loss_type=loss_type)
        trainer.learner.world = world or trainer.learner.world
        trainer.improve(trainer.prepare(rollouts))
        return gradient(trainer.learner.model)

    assert_near(found(OfTwo(0, 2, torch.device("cpu"))), share * found(None))


def test_the_temperature_divides_the_logits(rollouts):
    assert_honoured(rollouts, {"temperature": 0.7, "num_iterations": 2})


# --- which rollouts count ---------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_replies_that_were_cut_off_are_masked_on_demand(rollouts, loss_type):
    for cut in (False, True):
        config = {"loss_type": loss_type, "mask_truncated_completions": cut}
        assert_honoured(rollouts, config, {"mask_truncated_completions": not cut})


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_are_scaled_as_told(rollouts, scale):
    others = sorted({"group", "batch", "none"} - {scale})
    config = {"scale_rewards": scale, "loss_type": "grpo"}
    assert_honoured(rollouts, config, *({"scale_rewards": other} for other in others))


@pytest.mark.parametrize(
    ("scale", "loss_type"), [("group", "grpo"), ("batch", "dapo"), ("none", "dr_grpo")]
)
def test_unscored_rollouts_are_in_no_mean_and_in_no_loss(rollouts, scale, loss_type):
    lost = {("a", 1), ("c", 2)}
    rollouts = [
        replace(r, reward=None, failure="sandbox_died: ...", finish_reason="failed")
        if (r.group_id, r.sample) in lost
        else r
        for r in rollouts
    ]
    config = {"scale_rewards": scale, "loss_type": loss_type}
    assert_honoured(rollouts, config)
    # As zeros they would be something else.
    model, made = double_policy().model.requires_grad_(True), GRPOConfig(**{**SMALL, **config})
    now = logps(model, rollouts)
    zeros = [replace(r, reward=r.reward or 0.0) for r in rollouts]
    found, other = (gradient_of(grpo_loss(rs, made, now), model) for rs in (rollouts, zeros))
    assert apart(found, other)


# --- the ratio --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"epsilon": 0.05},
        {"epsilon_high": 0.6},
        {"epsilon": 0.4, "epsilon_high": 0.1},
        {"delta": 1.3},
        {"delta": 2.0, "epsilon": 0.1, "epsilon_high": 0.5},
    ],
    ids=lambda knobs: "-".join(f"{k}={v}" for k, v in knobs.items()) or "defaults",
)
def test_ratios_are_to_the_policy_that_sampled_and_clipped(rollouts, knobs):
    defaults = {name: GRPOConfig.model_fields[name].default for name in knobs}
    unlike = [{name: default} for name, default in defaults.items()]
    assert_honoured(rollouts, {"num_iterations": 3, **knobs}, *unlike)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_later_mini_batches_are_off_policy_too(rollouts, level):
    config = {"mini_batch_prompts": 1, "importance_sampling_level": level, "epsilon": 0.2}
    assert_honoured(rollouts, config, {"epsilon": 0.9, "epsilon_high": 9.0})


@pytest.mark.parametrize("knobs", [{}, {"epsilon_high": 0.3}, {"delta": 1.22}], ids=str)
def test_the_ratio_of_a_whole_reply_is_its_tokens_geometric_mean(rollouts, knobs):
    config = {
        "num_iterations": 3,
        "importance_sampling_level": "sequence",
        "epsilon": 0.1,
        "epsilon_high": 0.15,
    }
    unlike = [{"importance_sampling_level": "token"}, {"epsilon": 0.5}]
    unlike += [{name: config.get(name)} for name in knobs]
    assert_honoured(rollouts, {**config, **knobs}, *unlike)


def test_metrics_tell_how_much_was_clipped(rollouts):
    trainer = grpo(num_iterations=2, epsilon=0.1, epsilon_high=0.4)
    # Where rewards are equal there is nothing to learn.
    assert_clipping_is_told(trainer, rollouts, [a != 0 for a in advantages(rollouts, "none")])


# --- the sampler ------------------------------------------------------------------------------

MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
def test_the_samplers_own_probabilities_are_corrected_for(rollouts, mode, level):
    config = {
        "rollout_is": mode,
        "rollout_is_threshold": 1.4,
        "importance_sampling_level": level,
        "num_iterations": 2,  # what is compared with the sampler is the policy that sampled
    }
    unlike = [{"rollout_is": other} for other in MODES if other != mode]
    if mode != "none":
        unlike.append({"rollout_is_threshold": 2.0})
    assert_honoured(rollouts, config, *unlike)


@pytest.mark.parametrize("mode", MODES[:-1])
def test_one_step_is_corrected_without_old_logps(rollouts, mode):
    config = {"rollout_is": mode, "rollout_is_threshold": 1.4}
    assert_honoured(rollouts, config, {"rollout_is": "none"})


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_what_top_p_or_top_k_cut_is_not_corrected_for(rollouts, mode, cut):
    whole = {"top_p": 1.0, "top_k": 0}
    with pytest.warns(RuntimeWarning, match="rollout_is is off"):
        assert_honoured(rollouts, {"rollout_is": mode, **cut}, whole)


def test_top_k_of_minus_one_cuts_nothing(rollouts):
    config = {"rollout_is": "token_truncate", "top_k": -1}
    assert_honoured(rollouts, config, {"rollout_is": "none"})


# --- the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_penalty_is_k3_to_where_the_policy_started(rollouts, loss_type, level):
    config = {
        "beta": 0.3,
        "num_iterations": 2,
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "rollout_is": "token_truncate",  # corrects the surrogate, not the penalty
    }
    assert_honoured(rollouts, config, {"beta": 0.0}, {"beta": 0.2}, {"rollout_is": "none"})


def reference_logps(trainer, rollouts):
    batch = Batch([Sample(r) for r in rollouts], trainer.learner.device)
    return trainer.read([batch], "all")[0]


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_synced_reference_takes_its_share_of_the_policy(rollouts, every, alpha):
    trainer = grpo(
        beta=0.1,
        sync_ref_model=True,
        ref_model_sync_steps=every,
        ref_model_mixup_alpha=alpha,
        num_iterations=2,
    )
    expected = trained(trainer.learner.model)
    for step in range(1, 4):
        steps = steps_of(trainer, rollouts)
        model = steps[-1].model
        loss = grpo_loss(
            rollouts,
            trainer.config,
            logps(model, rollouts),
            old=fixed_logps(steps[0].model, rollouts),
            reference=fixed_logps(with_weights(expected), rollouts),
        )
        # The reference's weights are float32.
        assert_near(steps[-1].gradient, gradient_of(loss, model), atol=1e-5)
        if step % every == 0:
            new = trained(trainer.learner.model)
            expected = {n: alpha * new[n] + (1 - alpha) * w for n, w in expected.items()}
    by_hand = torch.cat(fixed_logps(with_weights(expected), rollouts))
    torch.testing.assert_close(reference_logps(trainer, rollouts), by_hand, atol=1e-4, rtol=1e-5)


def test_a_reference_that_is_not_synced_stays_where_it_was(rollouts):
    # The steps between are of no account then.
    trainer = grpo(beta=0.1, ref_model_sync_steps=1)
    start = torch.cat(fixed_logps(trainer.learner.model, rollouts))
    for _ in range(2):
        steps_of(trainer, rollouts)
    assert apart(torch.cat(fixed_logps(trainer.learner.model, rollouts)), start)
    torch.testing.assert_close(reference_logps(trainer, rollouts), start, atol=1e-6, rtol=1e-6)
