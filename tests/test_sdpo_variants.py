"""The variants of SDPO against their definitions, in float64 on a tiny model."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

import rlrf  # noqa: E402
from rlrf import Feedback, Outcome, Task, UsageError  # noqa: E402
from rlrf.reprompt import Hint, Reprompt, choose_hints, other_hint  # noqa: E402
from rlrf_trainers.algorithms.grpo import GRPOTrainer  # noqa: E402
from rlrf_trainers.algorithms.sdpo import SDPOTrainer  # noqa: E402
from rlrf_trainers.config import GRPOConfig, SDPOConfig  # noqa: E402
from rlrf_trainers.core.batch import Batch  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from tests.by_hand import (  # noqa: E402
    apart,
    assert_clipping_is_told,
    assert_near,
    divergence,
    double_policy,
    gradient,
    gradient_of,
    logps_of,
    sdpo_loss,
    steps_of,
    teacher_logits,
    trained,
    with_weights,
)
from tests.tiny_model import tiny_model, tiny_tokenizer  # noqa: E402

SMALL = {
    "max_steps": 1,
    "prompts_per_step": 3,
    "num_generations": 4,
    "max_completion_length": 5,
    "micro_batch_tokens": 100,
    "rollout_is": "none",
}


class Parity(rlrf.SingleTurnEnv):
    """Replies of even length are right; feedback names the task."""

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"Say {i}.") for i in range(6)]

    def grade(self, task, completion):
        if len(completion) % 2 == 0:
            return Outcome(1.0)
        return Outcome(0.0, Feedback.of("hint", f"Say something even about {task.id}."))


def sdpo(env=None, **config):
    made = SDPOConfig(**{**SMALL, "probe_tasks": 0, **config})
    trainer = SDPOTrainer(double_policy(), env or Parity(), made)
    trainer.learner.step = 1
    return trainer


def sdpo_gradient(rollouts, **config):
    trainer = sdpo(**config)
    trainer.improve(trainer.prepare(rollouts))
    return gradient(trainer.learner.model)


@pytest.fixture(scope="module")
def rollouts():
    collected = sdpo().source.next()
    rewards = {r.group_id: set() for r in collected}
    for r in collected:
        rewards[r.group_id].add(r.reward)
    assert {0.0, 1.0} in rewards.values()  # else half of what follows would test nothing
    return collected


def test_the_mix_of_rewards_and_feedback_is_linear(rollouts):
    ends = {w: sdpo_gradient(rollouts, distillation_weight=w) for w in (0.0, 0.3, 1.0)}
    assert ends[0.0].abs().max() > 0
    assert ends[1.0].abs().max() > 0
    assert_near(ends[0.3], 0.3 * ends[1.0] + 0.7 * ends[0.0])


def test_weight_zero_is_grpo_without_scaling(rollouts):
    config = GRPOConfig(**SMALL, loss_type="grpo", scale_rewards="none")
    grpo = GRPOTrainer(double_policy(), Parity(), config)
    grpo.learner.step = 1
    grpo.improve(grpo.prepare(rollouts))
    found = sdpo_gradient(rollouts, distillation_weight=0.0)
    assert_near(found, gradient(grpo.learner.model))


def test_routing_distils_failures_and_reinforces_the_rest(rollouts):
    trainer = sdpo(route_to_grpo=True)
    targets = trainer.prepare(rollouts)
    assert {(t.rollout.solved, t.distil, t.reinforce) for t in targets if t.reprompt} <= {
        (False, 1.0, 0.0),
        (True, 0.0, 1.0),
    }
    assert all(t.reinforce == 1.0 for t in targets if not t.reprompt)
    assert any(t.distil for t in targets)
    assert any(t.matters and t.reinforce for t in targets)


def by_hand(rollouts, per_token=None, **config):
    """The gradient of the first step's loss; see :func:`tests.by_hand.sdpo_loss`."""
    trainer = sdpo(**config)
    targets, model = trainer.prepare(rollouts), trainer.learner.model
    return gradient_of(sdpo_loss(model, targets, trainer.config, per_token=per_token), model)


@pytest.mark.parametrize(("topk", "tail"), [(0, True), (1, True), (5, True), (5, False)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_logit_level(rollouts, alpha, topk, tail):
    config = {
        "distillation_alpha": alpha,
        "distillation_topk": topk,
        "distillation_add_tail": tail,
    }
    found = sdpo_gradient(rollouts, **config)
    assert_near(found, by_hand(rollouts, **config))
    if topk > 1:  # of one token, renormalised, nothing is left to be learnt
        assert apart(found, by_hand(rollouts, **{**config, "distillation_add_tail": not tail}))


@pytest.mark.parametrize("clip", [0.0, 0.4])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_token_and_sequence_level(rollouts, level, clip):
    def per_token(student, teacher, r):
        logps, taught = logps_of(student, r), logps_of(teacher, r)
        advantage = (taught - logps).detach()
        if clip:
            assert (advantage.abs() > clip).sum() > 0
            advantage = advantage.clamp(-clip, clip)
        if level == "sequence":
            advantage = advantage.mean().expand(len(logps))
        return -advantage * logps

    expected = by_hand(rollouts, per_token)
    for knob in ("distillation_kl_clip", "distillation_advantage_clip"):
        found = sdpo_gradient(rollouts, distillation_level=level, **{knob: clip})
        assert_near(found, expected)


@pytest.mark.parametrize("clip", [0.5, 0.8])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_divergence_above_its_cap_teaches_nothing(rollouts, alpha, clip):
    config = {"distillation_alpha": alpha, "distillation_topk": 0, "distillation_kl_clip": clip}
    found = sdpo_gradient(rollouts, **config)
    assert_near(found, by_hand(rollouts, **config))
    assert apart(found, by_hand(rollouts, **{**config, "distillation_kl_clip": 0.0}))


def test_advantages_are_clipped_in_the_gradient(rollouts):
    def clipped(student, teacher, r):
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        advantage = (log_q - log_p).clamp(-0.1, 0.1).detach()
        return -(advantage * log_p.exp()).sum(-1)

    found = sdpo_gradient(rollouts, distillation_advantage_clip=0.1, distillation_topk=0)
    assert_near(found, by_hand(rollouts, clipped))
    unclipped = sdpo_gradient(rollouts, distillation_topk=0)
    assert not torch.allclose(found, unclipped, atol=1e-6)


def test_the_teachers_entropy_weighs_its_tokens(rollouts):
    def weighed(student, teacher, r):
        entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
        return divergence(student, teacher, SDPOConfig()) * (-2.0 * entropy).exp()

    assert_near(sdpo_gradient(rollouts, teacher_entropy_beta=2.0), by_hand(rollouts, weighed))


# --- several steps, and another sampler -------------------------------------------------------


@pytest.fixture(scope="module")
def strange(rollouts):
    """The rollouts, of replies of unequal length, by a sampler that is off."""
    rng, found = random.Random(0), []
    for i, r in enumerate(rollouts):
        keep = slice(0, max(1, len(r.completion_ids) - i % 4))
        r = replace(
            r,
            completion_ids=r.completion_ids[keep],
            completion_mask=r.completion_mask[keep],
            logprobs=r.logprobs[keep],
        )
        off = torch.tensor([logp + rng.uniform(-1, 1) for logp in r.logprobs])
        found.append(replace(r, logprobs=tuple(off.tolist())))
    assert all(all(r.completion_mask) for r in found)
    return found


def assert_honoured(rollouts, config, *unlike):
    """Every optimizer step is that of the definition, and the last would not be otherwise."""
    trainer = sdpo(**config)
    targets = trainer.prepare(rollouts)
    steps = steps_of(trainer, rollouts)
    assert len(steps) == trainer.config.num_iterations

    def definition(step, **changes):
        made = trainer.config.model_copy(update=changes)
        start = steps[0].model
        loss = sdpo_loss(step.model, targets, made, old=start, teacher=start)
        return loss, gradient_of(loss, step.model)

    for step in steps:
        loss, expected = definition(step)
        assert step.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
        assert_near(step.gradient, expected)
    for changes in unlike:
        assert apart(expected, definition(steps[-1], **changes)[1]), changes


TWICE = {"num_iterations": 2, "learning_rate": 1e-4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]
)
def test_the_samplers_own_probabilities_are_corrected_for(strange, mode):
    config = {
        **TWICE,
        "rollout_is": mode,
        "rollout_is_threshold": 1.4,
        "distillation_weight": 0.5,  # of both losses
    }
    others = [{"rollout_is": m} for m in ("token_truncate", "sequence_mask", "none") if m != mode]
    if mode != "none":
        others.append({"rollout_is_threshold": 2.5})
    assert_honoured(strange, config, *others)


def test_what_top_p_cuts_is_not_corrected_for(strange):
    with pytest.warns(RuntimeWarning, match="rollout_is is off"):
        assert_honoured(strange, {"rollout_is": "token_truncate", "top_p": 0.9}, {"top_p": 1.0})


@pytest.mark.parametrize("clip", [0.0, 1.1, 2.0])
def test_later_steps_weigh_tokens_by_how_likely_they_have_become(strange, clip):
    others = [{"distillation_is_clip": c} for c in (0.0, 1.1, 2.0) if c != clip]
    assert_honoured(strange, {**TWICE, "distillation_is_clip": clip}, *others)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_temperature_divides_both_logits(strange, temperature):
    config = {**TWICE, "temperature": temperature, "distillation_weight": 0.5}
    assert_honoured(strange, config, {"temperature": 1.0})


@pytest.mark.parametrize(
    "knobs",
    [{"epsilon": 0.05}, {"epsilon_high": 0.9}, {"epsilon": 0.6, "epsilon_high": 0.05}],
    ids=str,
)
def test_the_reward_beside_feedback_is_clipped(strange, knobs):
    defaults = {name: SDPOConfig.model_fields[name].default for name in knobs}
    unlike = [{name: default} for name, default in defaults.items()]
    assert_honoured(strange, {**TWICE, "distillation_weight": 0.5, **knobs}, *unlike)


def test_metrics_tell_how_much_of_the_reward_was_clipped(strange):
    trainer = sdpo(**TWICE, distillation_weight=0.5, epsilon=0.1, epsilon_high=0.4)
    matters = [t.matters for t in trainer.prepare(strange)]
    assert_clipping_is_told(trainer, strange, matters)


# --- teachers ---------------------------------------------------------------------------------


def mean_of(a, b, share):
    """Weights of which `b` is a share."""
    return {n: (1 - share) * a[n] + share * b[n] for n in a}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "frozen", "ema", "trust_region"])
@pytest.mark.parametrize("lora", [{}, {"lora_r": 2, "lora_alpha": 6}], ids=["full", "lora"])
def test_a_teacher_is_what_it_is_said_to_be_after_two_steps(rollouts, kind, lora):
    share = 0.25
    trainer = sdpo(
        **lora, teacher_regularization=kind, teacher_update_rate=share, learning_rate=1e-2
    )
    targets = [t for t in trainer.prepare(rollouts) if t.reprompt]
    start = trained(trainer.learner.model)
    steps_of(trainer, rollouts)
    one = trained(trainer.learner.model)
    steps_of(trainer, rollouts)
    two = trained(trainer.learner.model)

    @torch.no_grad()
    def logits(weights):
        model = with_weights(weights, lora_scale=3.0 if lora else 0.0)
        return torch.cat([teacher_logits(model, t.reprompt) for t in targets])

    expected = {
        "live": logits(two),
        "frozen": logits(start),
        "ema": logits(mean_of(mean_of(start, one, share), two, share)),
        # Of logits, and it is where it was after the first step.
        "trust_region": torch.lerp(logits(start), logits(two), share),
        "trust_region that moves": torch.lerp(
            logits(mean_of(start, one, share)), logits(two), share
        ),
    }
    batch = Batch(targets, trainer.learner.device)
    found = trainer.read([batch], "taught")[0](slice(None), None)
    # The teachers' weights are float32.
    torch.testing.assert_close(found, expected.pop(kind), atol=1e-4, rtol=1e-5)
    assert all(apart(found, other) for other in expected.values())


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_a_trust_region_teaches_a_mixture_of_logits(rollouts, rate):
    """Told apart from the mixture of the weights by the gradient."""
    config = {"teacher_regularization": "trust_region", "teacher_update_rate": rate}
    trainer = sdpo(**config)
    start = trained(trainer.learner.model)
    steps_of(trainer, rollouts)
    (step,) = steps_of(trainer, rollouts)
    targets = trainer.prepare(rollouts)

    def definition(teacher):
        return gradient_of(
            sdpo_loss(step.model, targets, trainer.config, teacher=teacher), step.model
        )

    class Mixed(torch.nn.Module):
        def forward(self, *args, **kwargs):
            made = [m(*args, **kwargs) for m in (with_weights(start), step.model)]
            made[0].logits = torch.lerp(made[0].logits, made[1].logits, rate)
            return made[0]

    now = dict(step.model.named_parameters())
    assert_near(step.gradient, definition(Mixed()), atol=1e-5)
    assert apart(step.gradient, definition(with_weights(mean_of(start, now, rate))))


# --- the control ------------------------------------------------------------------------------


def test_what_the_control_says_too_is_not_taught(rollouts, monkeypatch):
    import rlrf_trainers.algorithms.sdpo as module

    assert sdpo_gradient(rollouts, baseline="control").abs().max() > 1e-6
    monkeypatch.setattr(module, "other_hint", lambda rollout, hint, *_: hint)
    assert sdpo_gradient(rollouts, baseline="control").abs().max() < 1e-12


def test_the_control_is_another_tasks_hint(rollouts):
    config = SDPOConfig(use_successful_as_teacher=False)
    hints = choose_hints(rollouts, config)
    for rollout, hint in zip(rollouts, hints, strict=True):
        if not hint:
            continue
        other = other_hint(rollout, hint, rollouts, hints)
        assert other.feedback.text != hint.feedback.text
        assert rollout.task_id not in other.feedback.text


def test_where_all_feedback_is_one_rule_the_control_is_one_bit(rollouts):
    rule = Feedback.of("format_error", "Reply in JSON.")
    hints = [Hint(None, rule, (rule,)) for _ in rollouts]
    assert other_hint(rollouts[0], hints[0], rollouts, hints).feedback.text == (
        "The attempt was not correct."
    )


# --- several turns ----------------------------------------------------------------------------


class Tennis(rlrf.MultiTurnEnv):
    """Three turns, feedback on the first and the last."""

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"Serve {i}.") for i in range(6)]

    def start(self, task):
        return []

    def respond(self, state, action):
        state.append(action)
        turn = len(state)
        told = Feedback() if turn == 2 else Feedback.of("hint", f"hint {turn}")
        over = turn == 3
        return rlrf.Turn(() if over else f"Back {turn}.", 0.0, told, terminated=over)


def test_feedback_stands_beside_the_turn_it_is_about():
    trainer = sdpo(Tennis(), feedback_placement="turn")
    decode = trainer.learner.tokenizer.decode
    for target in trainer.prepare(trainer.source.next()):
        r, shown = target.rollout, target.reprompt
        question, rest = decode(list(shown.prompt_ids)), decode(list(shown.completion_ids))
        assert "hint 1" in question
        assert "hint 3" not in question
        assert rest.count("hint") == 1
        before, _, after = rest.partition("hint 3")
        assert "Back 2." in before  # what the third reply answers
        assert "Back 2." not in after
        sampled = [t for t, m in zip(r.completion_ids, r.completion_mask, strict=True) if m]
        theirs = [t for t, m in zip(shown.completion_ids, shown.completion_mask, strict=True) if m]
        assert theirs == sampled
        # A turn without feedback is what it was.
        start = r.completion_mask.index(0)
        assert shown.completion_ids[: start + 1] == r.completion_ids[: start + 1]


def test_teacher_and_student_score_the_same_tokens_of_every_turn():
    trainer = sdpo(Tennis(), feedback_placement="turn", teacher_regularization="live")
    targets = trainer.prepare(trainer.source.next())
    batch = trainer.learner.micro_batches(targets, trainer.blank)[0]
    logits = trainer.read([batch], "taught")[0](slice(None), None)
    ids = batch.ids
    start = 0
    for target in batch.samples:
        shown = target.reprompt
        whole = torch.tensor([[*shown.prompt_ids, *shown.completion_ids]])
        alone = trainer.learner.model(whole).logits[0, len(shown.prompt_ids) - 1 : -1]
        alone = alone[torch.tensor(shown.completion_mask).bool()]
        part = slice(start, start + len(alone))
        torch.testing.assert_close(logits[part], alone.detach(), atol=1e-8, rtol=1e-6)
        sampled = zip(target.rollout.completion_ids, target.rollout.completion_mask, strict=True)
        assert ids[part].tolist() == [t for t, m in sampled if m]
        start += len(alone)


def test_a_long_turns_feedback_is_shortened_not_the_turn():
    class Chatty(Tennis):
        def respond(self, state, action):
            turn = super().respond(state, action)
            long = Feedback.of("hint", "blah " * 400 + f"END {len(state)}")
            return rlrf.Turn(turn.messages, 0.0, long, terminated=turn.terminated)

    trainer = sdpo(Chatty(), feedback_placement="turn", max_reprompt_len=300)
    (target, *_) = trainer.prepare(trainer.source.next())
    shown: Reprompt = target.reprompt
    assert shown.truncated
    assert len(shown.prompt_ids) <= 300
    text = trainer.learner.tokenizer.decode(list(shown.completion_ids))
    assert "Back 1." in text
    assert "Back 2." in text
    added = len(shown.completion_ids) - len(target.rollout.completion_ids)
    assert added < 300


def test_an_environment_that_says_nothing_gets_a_message_for_its_feedback():
    class Silent(Tennis):
        def respond(self, state, action):
            turn = super().respond(state, action)
            return rlrf.Turn((), 0.0, turn.feedback, terminated=turn.terminated)

    trainer = sdpo(Silent(), feedback_placement="turn")
    targets = trainer.prepare(trainer.source.next())
    assert targets
    for target in targets:
        shown = target.reprompt
        assert "hint 3" in trainer.learner.tokenizer.decode(list(shown.completion_ids))
        sampled = [t for t, m in zip(shown.completion_ids, shown.completion_mask, strict=True) if m]
        theirs = zip(target.rollout.completion_ids, target.rollout.completion_mask, strict=True)
        assert sampled == [t for t, m in theirs if m]


class Verbose(Parity):
    """Feedback of many words."""

    def grade(self, task, completion):
        return Outcome(0.0, Feedback.of("hint", "even " * 300))


def test_the_teachers_prompt_stays_within_the_models_context():
    model = HFPolicy(tiny_model().double(), tiny_tokenizer(), max_context=200)
    trainer = SDPOTrainer(model, Verbose(), SDPOConfig(**SMALL, probe_tasks=0))
    trainer.learner.step = 1
    for target in trainer.prepare(trainer.source.next()):
        assert target.reprompt.truncated
        assert len(target.reprompt.prompt_ids) + len(target.rollout.completion_ids) <= 200


def test_without_room_for_a_hint_nothing_is_distilled():
    with pytest.raises(UsageError, match="max_reprompt_len=40 leaves no room"):  # for any
        sdpo(Verbose(), max_reprompt_len=40)
    trainer = sdpo(Verbose())
    trainer.config = trainer.config.model_copy(update={"max_reprompt_len": 40})
    trainer.reprompter.config = trainer.config
    with pytest.warns(RuntimeWarning, match="max_reprompt_len=40"):
        targets = trainer.prepare(trainer.source.next())
    assert targets
    assert not any(t.distil for t in targets)


@pytest.mark.slow
def test_a_long_teachers_prompts_are_read_in_parts(monkeypatch):
    import rlrf_trainers.core.learner as module

    found, sizes = [], []
    for budget in (100, 10_000):
        trainer = sdpo(Verbose(), micro_batch_tokens=budget)
        targets = trainer.prepare(trainer.source.next())
        batch = Batch(targets, trainer.learner.device)
        hidden = module.completion_hidden
        calls = []
        monkeypatch.setattr(
            module,
            "completion_hidden",
            lambda model, prompts, *a, calls=calls, hidden=hidden, **k: (
                calls.append(len(prompts)),
                hidden(model, prompts, *a, **k),
            )[1],
        )
        found.append(trainer.read([batch], "taught")[0](slice(None), None))
        sizes.append(calls)
        monkeypatch.undo()
    assert len(sizes[0]) == len(targets)
    assert len(sizes[1]) == 1
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)


# --- the teacher gap --------------------------------------------------------------------------


def test_the_teacher_gap_compares_with_siblings_not_with_the_failure(monkeypatch):
    """The hint's reader always succeeds; without it one of four does: a gap of 1 - 1/3."""

    class Once(Parity):
        def grade(self, task, completion):
            return Outcome(float(completion == "right"), Feedback.of("hint", "Say right."))

    trainer = sdpo(Once(), probe_tasks=2)
    policy = trainer.learner.policy
    generate = policy.generate
    calls = []

    def scripted(prompts, params):
        calls.append([p.messages[-1]["content"] for p in prompts])
        out = []
        for i, completion in enumerate(generate(prompts, params)):
            hinted = "right" in (prompts[i].messages[-1]["content"] or "")
            text = "right" if hinted or i % 4 == 0 else "wrong"
            message = {"role": "assistant", "content": text}
            out.append(
                type(completion)(
                    completion.prompt_ids,
                    completion.token_ids,
                    completion.logprobs,
                    text,
                    completion.finish_reason,
                    message,
                )
            )
        return out

    monkeypatch.setattr(policy, "generate", scripted)
    order = list(trainer.source.rng.getstate())
    trainer.before_training()
    found = trainer.learner.record.metrics
    gap = [value for value, _ in found["self_distillation/teacher_gap"]]
    assert len(gap) == 6  # of two tasks three attempts each failed
    assert found["self_distillation/probe_tasks"] == [(2.0, 1.0)]
    assert math.isclose(sum(gap) / 6, 1 - 1 / 3)
    assert list(trainer.source.rng.getstate()) == order  # training is not disturbed
