"""The monitor: silent on healthy runs, and each warning on its side of its threshold."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("torch")

import rlrf
from rlrf import Feedback, Outcome, Task
from rlrf_trainers.algorithms.grpo import GRPOTrainer
from rlrf_trainers.algorithms.sdpo import SDPOTrainer
from rlrf_trainers.config import GRPOConfig, SDPOConfig
from rlrf_trainers.engines.hf import HFPolicy
from rlrf_trainers.run.health import _CHECKS, TOPICS, Monitor
from tests.tiny_model import tiny_model, tiny_tokenizer

SD = "self_distillation/"
HEALTHY_SDPO = {
    "unscored_fraction": 0.0,
    "masked_fraction": 0.3,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.1,
    "entropy": 0.5,
    "reward": 0.3,
    "frac_reward_zero_std": 0.2,
    "loss": 0.1,
    "grad_norm": 0.5,
    f"{SD}success_sample_fraction": 0.3,
    f"{SD}feedback_available_fraction": 0.7,
    f"{SD}feedback_used_fraction": 0.5,
    f"{SD}reprompt_sample_fraction": 0.7,
    f"{SD}reprompt_truncated_fraction": 0.0,
    f"{SD}teacher_student_kl": 0.3,
    "sampling/sampling_logp_difference/mean": 0.01,
    "sampling/sampling_logp_difference/max": 0.3,
    "eval/reward": 0.5,
    "eval/pass_rate": 0.5,
}
HEALTHY_GRPO = {
    **{k: v for k, v in HEALTHY_SDPO.items() if not k.startswith(SD)},
    "masked_fraction": 0.0,
    "kl": 0.01,
}


def healthy(config):
    return HEALTHY_SDPO if isinstance(config, SDPOConfig) else HEALTHY_GRPO


def told(monitor, lines, start=1):
    """``(line number, topic, message)`` of every warning."""
    found = []
    for step, line in enumerate(lines, start):
        found += [(step, *warning) for warning in monitor.observe({"step": step, **line})]
    return found


def baseline(config):
    """A monitor that has seen ten healthy lines, and had nothing to say."""
    monitor = Monitor(config)
    assert told(monitor, [healthy(config)] * 10) == []
    return monitor


NONE_LEFT = {f"{SD}reprompt_sample_fraction": 0.0, f"{SD}feedback_used_fraction": 0.0}
MUTE = {**NONE_LEFT, f"{SD}feedback_available_fraction": 0.0, f"{SD}success_sample_fraction": 0.0}
FLAT = {"frac_reward_zero_std": 1.0, f"{SD}feedback_used_fraction": 0.0}
MEAN_GAP = "sampling/sampling_logp_difference/mean"

# topic, configuration, what makes it sick, what (on top of that) keeps it healthy, words
CASES = [
    (
        "flat_rewards",
        GRPOConfig(),
        {"frac_reward_zero_std": 0.96, "reward": 0.0},
        {"frac_reward_zero_std": 0.94},
        ["96%", "num_generations (now 8)", "sdpo", "harder"],
    ),
    (
        "flat_rewards",
        GRPOConfig(beta=0.04),
        {"frac_reward_zero_std": 1.0},
        {"frac_reward_zero_std": 0.5},
        ["beta (now 0.04)"],
    ),
    (
        "flat_rewards",
        SDPOConfig(include_environment_feedback=False),
        FLAT,
        {f"{SD}feedback_used_fraction": 0.02},
        ["include_environment_feedback (now false)"],
    ),
    (
        "no_reprompts",
        SDPOConfig(loss_aggregation="token_mean"),
        {**MUTE, "reward": 0.0},
        {f"{SD}reprompt_sample_fraction": 0.02},
        ["gives no feedback", "feedback level", "num_generations (now 8)", "nothing is learnt"],
    ),
    (
        "no_reprompts",
        SDPOConfig(include_environment_feedback=False),
        NONE_LEFT,
        {f"{SD}success_sample_fraction": 0.91},  # nearly all solved: rightly nothing
        ["70% have feedback", "set include_environment_feedback (now false) to true"],
    ),
    (
        "no_reprompts",
        SDPOConfig(feedback_kinds=["hint"], distillation_weight=0.5),
        NONE_LEFT,
        {f"{SD}success_sample_fraction": 1.0},
        ["feedback_kinds (now ['hint'])", "nothing but what GRPO teaches"],
    ),
    (
        "no_reprompts",
        SDPOConfig(use_successful_as_teacher=False),
        NONE_LEFT,
        {f"{SD}reprompt_sample_fraction": 0.5},
        ["does not reach the teacher", "use_successful_as_teacher (now false)"],
    ),
    (
        "no_reprompts",
        SDPOConfig(success_reward_threshold=1.0),
        {**MUTE, "reward": 0.4},
        {f"{SD}reprompt_sample_fraction": 0.5},
        ["mean reward is 0.4", "set success_reward_threshold (now 1) to a reward worth showing"],
    ),
    (
        "low_active",
        SDPOConfig(),
        {f"{SD}reprompt_sample_fraction": 0.05},
        {f"{SD}reprompt_sample_fraction": 0.11},
        ["20 times smaller", "sequence_mean_active", "loss_aggregation (now sequence_mean)"],
    ),
    (
        "low_active",
        SDPOConfig(feedback_kinds=["hint"]),
        {f"{SD}reprompt_sample_fraction": 0.05},
        {f"{SD}success_sample_fraction": 0.76},  # little left to learn
        ["feedback_kinds (now ['hint'])"],
    ),
    (
        "reprompt_truncated",
        SDPOConfig(max_reprompt_len=512),
        {f"{SD}reprompt_truncated_fraction": 0.11},
        {f"{SD}reprompt_truncated_fraction": 0.09},
        ["11%", "max_reprompt_len (now 512)"],
    ),
    (
        "teacher_gap",
        SDPOConfig(),
        {f"{SD}teacher_gap": 0.0},
        {f"{SD}teacher_gap": 0.01},
        ["+0", "2605.30070", "feedback level", "probe_tasks (now 8)", "grpo"],
    ),
    (
        "few_probed",
        SDPOConfig(probe_tasks=2),
        {f"{SD}teacher_gap": 0.5, f"{SD}probe_tasks": 2},
        {f"{SD}probe_tasks": 5},
        ["+0.5", "2 tasks", "promises nothing", "probe_tasks (now 2)"],
    ),
    (
        "unscored",
        GRPOConfig(),
        {"unscored_fraction": 0.21},
        {"unscored_fraction": 0.19},
        ["21%", "rollout_deadline_s (now 120)", "max_concurrency (now 256)"],
    ),
    (
        "masked",
        GRPOConfig(mask_truncated_completions=True),
        {"masked_fraction": 0.6},
        {"unscored_fraction": 0.15},  # explains some of them
        ["60%", "mask_truncated_completions (now true)", "max_completion_length (now 256)"],
    ),
    (
        "masked",
        SDPOConfig(),
        {"masked_fraction": 0.7, f"{SD}success_sample_fraction": 0.1},
        {f"{SD}success_sample_fraction": 0.25},
        ["60%", "feedback level", "num_generations (now 8)"],
    ),
    (
        "clipped",
        GRPOConfig(max_completion_length=64),
        {"completions/clipped_ratio": 0.51},
        {"completions/clipped_ratio": 0.49},
        ["51%", "max_completion_length (now 64)"],
    ),
    (
        "grad_norm",
        SDPOConfig(),
        {"grad_norm": 9e-5},
        {"grad_norm": 1.1e-4},
        ["9e-05", "teacher_student_kl is 0.3", "loss_aggregation (now sequence_mean)"],
    ),
    (
        "grad_norm",
        GRPOConfig(),
        {"grad_norm": 0.0},
        {"grad_norm": 0.01},
        ["loss_type (now dapo)", "scale_rewards (now group)"],
    ),
    (
        "entropy_collapse",
        GRPOConfig(),
        {"entropy": 0.09},
        {"entropy": 0.11},
        ["0.090", "0.500 at first", "learning_rate (now 1e-06)", "beta (now 0)", "temperature"],
    ),
    (
        "entropy_collapse",
        SDPOConfig(),
        {"entropy": 0.09},
        {f"{SD}success_sample_fraction": 0.96, "eval/pass_rate": 0.9},
        ["teacher_regularization (now ema) to frozen", "teacher_update_rate (now 0.01)"],
    ),
    (
        "entropy_collapse",
        GRPOConfig(),
        {"entropy": 0.01},
        {"eval/pass_rate": 0.96},
        ["the same"],
    ),
    (
        "entropy_explosion",
        SDPOConfig(distillation_add_tail=False),
        {"entropy": 2.1},
        {"entropy": 1.9},
        ["2.10", "0.50 at first", "distillation_add_tail (now false) to true", "learning_rate"],
    ),
    (
        "length_drift",
        GRPOConfig(),
        {"completions/mean_length": 201.0, "reward": 0.2},
        {"completions/mean_length": 199.0},
        ["201 tokens", "100 at first", "reward 0.2, 0.3 at first", "padding"],
    ),
    (
        "length_drift",
        SDPOConfig(),
        {"completions/mean_length": 49.0},
        {"completions/mean_length": 51.0},
        ["no fault while the held-out reward holds", "2603.24472", "distillation_kl_clip (now 0)"],
    ),
    (
        "length_drift",
        GRPOConfig(),
        {"completions/mean_length": 49.0},
        {"completions/mean_length": 51.0},
        ["cutting its reasoning short"],
    ),
    (
        "sampler_mismatch",
        SDPOConfig(),
        {MEAN_GAP: 0.11},
        {MEAN_GAP: 0.09, "sampling/sampling_logp_difference/max": 9.0},
        ["0.11 nats on average", "rollout_is_threshold (now 2)", "temperature (now 1)"],
    ),
    (
        "sampler_mismatch",
        SDPOConfig(),
        {MEAN_GAP: None, "sampling/sampling_logp_difference/max": 3.1},
        {"sampling/sampling_logp_difference/max": 2.9},
        ["3.1 nats at worst"],
    ),
    (
        "teacher_divergence",
        SDPOConfig(),
        {f"{SD}teacher_student_kl": 0.91},
        {f"{SD}teacher_student_kl": 0.89},
        ["0.91", "0.30 at first", "teacher_regularization (now ema)", "distillation_kl_clip"],
    ),
    (
        "reference_divergence",
        GRPOConfig(beta=0.04),
        {"kl": 2.1},
        {"kl": 1.9},
        ["2.10 nats", "beta (now 0.04)"],
    ),
    (
        "eval_collapse",
        SDPOConfig(eval_tasks=400),
        {"eval/reward": 0.37},
        {"eval/reward": 0.38},
        [
            "eval/reward is 0.37, and was 0.5 at step 1",
            "load_best_model_at_end (now false) to true",
            "early_stopping_patience (now 0)",
            "learning_rate (now 1e-06)",
            "teacher_regularization (now ema)",
        ],
    ),
    (
        "eval_collapse",  # 25 % would be within chance
        GRPOConfig(
            eval_tasks=64,
            eval_steps=1,
            metric_for_best_model="eval/pass_rate",
            load_best_model_at_end=True,
        ),
        {"eval/pass_rate": 0.23},
        {"eval/pass_rate": 0.24},
        ["eval/pass_rate is 0.23", "Set early_stopping_patience"],
    ),
]
LINES = {check.topic: check.lines for check in _CHECKS}
IDS = [f"{case[0]}-{type(case[1]).__name__}-{i}" for i, case in enumerate(CASES)]


def test_every_topic_has_a_case():
    assert {case[0] for case in CASES} == set(TOPICS)


@pytest.mark.parametrize(("topic", "config", "sick", "cure", "words"), CASES, ids=IDS)
def test_a_check_speaks_on_its_side_of_the_threshold(topic, config, sick, cure, words):
    line = {**healthy(config), **sick}
    n = LINES[topic]
    ((step, said, message),) = told(baseline(config), [line] * 30, start=11)
    assert (step, said) == (10 + n, topic)  # after n lines, and once
    assert message.startswith("step 11: " if n == 1 else f"steps 11 to {step}: ")
    for word in words:
        assert word in message
    assert message.endswith("(Said once; again only if it recovers and comes back.)")
    assert told(baseline(config), [{**line, **cure}] * 30, start=11) == []


@pytest.mark.parametrize(("topic", "config", "sick"), [case[:3] for case in CASES], ids=IDS)
def test_a_line_in_between_starts_the_count_anew(topic, config, sick):
    n, well, ill = LINES[topic], healthy(config), {**healthy(config), **sick}
    if topic in ("teacher_gap", "few_probed"):
        well = {**well, f"{SD}teacher_gap": 0.1, f"{SD}probe_tasks": 8}
    if n > 1:
        assert told(baseline(config), ([ill] * (n - 1) + [well]) * 5) == []
    # It comes back after as many healthy lines as it took sick ones; with fewer it never left.
    again = told(baseline(config), [*[ill] * n, *[well] * n, *[ill] * n])
    assert [(step, said) for step, said, _ in again] == [(n, topic), (3 * n, topic)]
    if n > 1:
        flickers = told(baseline(config), [*[ill] * n, *[well] * (n - 1), *[ill] * n])
        assert len(flickers) == 1


@pytest.mark.parametrize(("topic", "config", "sick"), [case[:3] for case in CASES], ids=IDS)
def test_lines_without_the_metric_count_for_nothing(topic, config, sick):
    line = {**healthy(config), **sick}
    nothing = {"time/step": 1.0, "loss": None, "grad_norm": math.nan}
    lines = [x for _ in range(LINES[topic]) for x in (nothing, line, nothing)]
    ((step, said, _),) = told(baseline(config), lines)
    assert (step, said) == (3 * LINES[topic] - 1, topic)
    assert told(Monitor(config), [{}, {"eval/reward": 0.0, "eval/pass_rate": 0.0}] * 20) == []
    wild = dict.fromkeys(line, math.nan) | {"entropy": math.inf, "grad_norm": None}
    assert told(Monitor(config), [wild] * 20) == []


@pytest.mark.parametrize(("topic", "config", "sick"), [case[:3] for case in CASES], ids=IDS)
@pytest.mark.parametrize("cut", [0, 2, 11, 13, 16, 24])
def test_a_resumed_run_warns_as_if_it_had_not_stopped(topic, config, sick, cut):
    well, ill = healthy(config), {**healthy(config), **sick}
    lines = [*[well] * 10, *[ill] * 8, *[well] * 8, *[ill] * 8]
    whole = told(Monitor(config), lines)
    assert [said for _, said, _ in whole].count(topic) >= 1
    first, second = Monitor(config), Monitor(config)
    before = told(first, lines[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + told(second, lines[cut:], start=cut + 1) == whole
    uncut = Monitor(config)
    told(uncut, lines)
    assert second.state_dict() == uncut.state_dict()


def test_a_state_of_another_version_is_taken_as_far_as_it_goes():
    monitor = baseline(GRPOConfig())
    state = monitor.state_dict()
    state["alarms"]["gone"] = dict(state["alarms"].pop("clipped"))
    state["early"]["gone"] = state["early"].pop("entropy")
    fresh = Monitor(GRPOConfig())
    fresh.load_state_dict(state)
    assert set(fresh.state_dict()["alarms"]) == set(TOPICS)
    ((step, topic, _),) = told(fresh, [{"completions/clipped_ratio": 1.0}] * 4)
    assert (step, topic) == (3, "clipped")


def test_a_configuration_of_another_trainer_will_do():
    class Theirs:
        learning_rate = 1e-5

    monitor = Monitor(Theirs())
    told(monitor, [HEALTHY_GRPO] * 10)
    sick = {"entropy": 0.0, "completions/clipped_ratio": 1.0, "kl": 9.0, "grad_norm": 0.0}
    sick |= {"unscored_fraction": 1.0, "eval/reward": -5.0, "completions/mean_length": 999.0}
    topics = {t for _, t, _ in told(monitor, [{**HEALTHY_GRPO, **sick}] * 6)}
    assert topics >= {"entropy_collapse", "clipped", "grad_norm", "unscored", "eval_collapse"}


# --- what must not be said --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "line"),
    [
        # sdpo learns from feedback where all rewards are equal
        (SDPOConfig(), {"frac_reward_zero_std": 1.0}),
        # everything is solved: there is rightly nothing to distil
        (SDPOConfig(), {**NONE_LEFT, f"{SD}success_sample_fraction": 1.0, "masked_fraction": 1.0}),
        # few active rows, but they are not divided by all
        (
            SDPOConfig(loss_aggregation="sequence_mean_active"),
            {f"{SD}reprompt_sample_fraction": 0.05},
        ),
        # no gradient, because the rewards are flat: said of them (here they are not flat enough)
        (GRPOConfig(beta=0.1), {"frac_reward_zero_std": 0.94, "grad_norm": 0.1}),
        # a low entropy that was low from the start
        (GRPOConfig(), {"entropy": 0.2}),
    ],
)
def test_what_looks_odd_and_is_not(config, line):
    assert told(baseline(config), [{**healthy(config), **line}] * 20) == []


def test_one_fault_is_said_once():
    """No feedback and all failing: not also flat rewards, masked rows and a missing gradient."""
    line = {**HEALTHY_SDPO, **MUTE, "frac_reward_zero_std": 1.0, "masked_fraction": 1.0}
    line |= {"reward": 0.0, "grad_norm": 0.0}
    assert {t for _, t, _ in told(Monitor(SDPOConfig()), [line] * 20)} == {"no_reprompts"}
    line = {**HEALTHY_GRPO, "frac_reward_zero_std": 1.0, "grad_norm": 0.0}
    assert {t for _, t, _ in told(Monitor(GRPOConfig(beta=0.1)), [line] * 20)} == {"flat_rewards"}


def test_lengths_of_a_few_tokens_may_double():
    config = GRPOConfig()
    lines = [{**HEALTHY_GRPO, "completions/mean_length": n} for n in [4.0] * 10 + [11.0] * 20]
    assert told(Monitor(config), lines) == []


def test_a_better_evaluation_is_the_new_best():
    config = SDPOConfig(eval_tasks=400)
    monitor = Monitor(config)
    assert told(monitor, [{"eval/reward": r} for r in (0.1, 0.5, 0.9, 0.8)]) == []
    ((_, _, message),) = told(monitor, [{"eval/reward": 0.6}], start=9)
    assert "was 0.9 at step 3" in message


# Two SDPO runs of SmolLM2-135M-Instruct (LoRA) on format-rules-v0, 24 steps: what they recorded.
RECORDED = {
    "reprompt_sample_fraction": (
        "1 1 1 1 .875 .438 .406 .188 .344 .25 .188 .125 .0938 .219 .0312 .25 .25 .219 .125 .0938 "
        ".312 .0938 .0625 .125",
        "1 1 .969 1 .906 .656 .469 .219 .312 .156 .125 .219 .0938 .219 .219 .312 .188 .344 .219 "
        ".156 .156 .219 .125 .156",
    ),
    "success_sample_fraction": (
        "0 0 0 0 .0938 .406 .375 .469 .562 .656 .562 .656 .719 .594 .75 .625 .562 .5 .719 .75 "
        ".344 .656 .844 .781",
        "0 0 .0312 0 .0625 .219 .438 .656 .5 .531 .562 .594 .594 .406 .344 .5 .469 .375 .594 "
        ".469 .656 .531 .562 .625",
    ),
    "teacher_student_kl": (
        ".923 .885 .85 .763 .754 .444 .352 .338 .277 .229 .243 .21 .45 .199 .189 .154 .209 .171 "
        ".128 .212 .187 .0896 .194 .236",
        ".843 .753 .668 .645 .805 .549 .365 .209 .146 .212 .23 .0936 .289 .304 .253 .214 .242 "
        ".331 .135 .177 .2 .295 .176 .218",
    ),
    "entropy": (
        ".387 .721 1.16 1.46 1.03 .823 .637 .82 .88 .573 .548 .479 .377 .773 .304 .818 .517 .607 "
        ".391 .492 .667 .473 .391 .489",
        ".616 .806 1.51 1.29 1.26 1.67 .942 .354 .53 .622 .381 .626 .678 .862 .551 1.02 .604 "
        "1.05 .5 .491 .508 .587 .348 .44",
    ),
    "completions/mean_length": (
        "13.8 12.7 10.6 19.9 17.4 14.7 13.5 14.3 14.9 14 13.2 12.9 11.4 14.2 11.8 13.7 12.8 13.8 "
        "12.3 13.1 13.6 12.8 12.6 13.9",
        "12.7 13.9 11.5 21.9 21.9 14.4 14 12.8 13.6 13.3 13.1 12.2 12.5 11.5 11.9 13.2 12.6 14.5 "
        "13.7 13.6 14.2 13.4 13.6 13",
    ),
    "completions/clipped_ratio": (
        ".156 .0625 .188 .469 .188 .156 .0625 .0938 .156 .0312 .0625 .0312 0 .125 0 .0625 .0312 "
        ".0938 .0312 .0312 .0312 .0312 .0312 .0938",
        ".0625 .125 .0625 .594 .469 .125 .0625 .0312 .0312 .0312 0 0 0 .0312 .0312 .125 .0625 "
        ".156 .0312 .0625 .0625 .0312 .0312 .0938",
    ),
    "grad_norm": (
        "6.98 4.96 13.9 4.61 4.47 1.24 .615 .455 .411 .515 .187 .374 .406 .194 .0712 .359 .313 "
        ".371 2.89 .17 .466 .263 .0959 .236",
        "6.63 5.8 6.74 3.79 3.64 1.84 1.14 .299 .31 .445 .268 .217 .228 .388 .533 1.06 .276 1.93 "
        ".291 .203 .519 .275 .379 .202",
    ),
    "frac_reward_zero_std": (
        "1 1 1 1 .75 .125 .125 .25 0 0 0 .25 .375 .25 .25 .25 .25 0 .125 .25 .25 .25 .625 .375",
        "1 1 .875 1 .75 .375 .25 .125 0 0 .25 .125 .375 .25 .5 .125 .25 .25 .375 .375 .375 .375 "
        "0 .25",
    ),
    "sampling/sampling_logp_difference/max": (
        ".181 .119 .0971 .186 .165 .176 .125 .0916 .0955 .124 .125 .124 .108 .18 .0539 .102 .1 "
        ".124 .0418 .095 .122 .161 .0891 .141",
        ".177 .136 .169 .189 .162 .156 .124 .088 .122 .133 .125 .155 .105 .215 .11 .123 .0966 "
        ".124 .183 .123 .122 .109 .137 .125",
    ),
}
EVALUATIONS = ((0, 0.24, 0.96, 0.94, 0.92, 0.91, 0.95), (0, 0.09, 0.84, 0.82, 0.79, 0.86, 0.82))


@pytest.mark.parametrize("run", [0, 1])
def test_runs_that_learnt_are_left_alone(run):
    lines = [{"eval/reward": EVALUATIONS[run][0]}, *({} for _ in range(24))]
    for name, runs in RECORDED.items():
        full = name if "/" in name or name in HEALTHY_GRPO else SD + name
        for step, value in enumerate(runs[run].split(), 1):
            lines[step][full] = float(value)
    for line in lines[1:]:
        success = line[f"{SD}success_sample_fraction"]
        line |= {"reward": success, "unscored_fraction": 0.0}
        line[f"{SD}feedback_available_fraction"] = 1 - success
        line[f"{SD}feedback_used_fraction"] = line[f"{SD}reprompt_sample_fraction"]
        line["masked_fraction"] = 1 - line[f"{SD}reprompt_sample_fraction"]
    for i, value in enumerate(EVALUATIONS[run]):
        lines[4 * i]["eval/reward"] = value
    config = SDPOConfig(eval_tasks=100, num_generations=4, max_completion_length=28)
    assert told(Monitor(config), lines, start=0) == []


# --- the trainers' own numbers ----------------------------------------------------------------


class CountA(rlrf.SingleTurnEnv):
    """Reward: the share of the reply that is "a"; feedback asks for it."""

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"Say {i}.") for i in range(12)]

    def grade(self, task, completion):
        reward = completion.count("a") / max(1, len(completion))
        return Outcome(reward, Feedback.of("wrong_answer", "Say a.") if reward < 1 else Feedback())


class Mute(CountA):
    """Always wrong, never told why."""

    def grade(self, task, completion):
        return Outcome(0.0)


@pytest.fixture(scope="module")
def history():
    """``history(kind, environment)``: the lines of a run of a tiny model, and its configuration."""
    kept = {}

    def run(kind, env_class, **options):
        if (kind, env_class) not in kept:
            trainer_class, config_class = {
                "sdpo": (SDPOTrainer, SDPOConfig),
                "grpo": (GRPOTrainer, GRPOConfig),
            }[kind]
            config = config_class(
                max_steps=10,
                prompts_per_step=3,
                num_generations=4,
                max_completion_length=6,
                eval_tasks=4,
                learning_rate=1e-2,
                **options,
            )
            trainer = trainer_class(HFPolicy(tiny_model(), tiny_tokenizer()), env_class(), config)
            kept[kind, env_class] = trainer.train().history, config
        return kept[kind, env_class]

    return run


def topics_of(lines, config):
    return {topic for _, topic, _ in told(Monitor(config), lines, start=0)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_real_runs_of_a_tiny_model(history):
    # Its replies are six random bytes, cut off, and it learns at a rate of 1e-2: no false alarm.
    assert topics_of(*history("sdpo", CountA)) <= {"clipped", "teacher_gap"}
    assert topics_of(*history("grpo", CountA, beta=0.01)) <= {"clipped", "reference_divergence"}
    # Nothing can be learnt from these.
    assert "no_reprompts" in topics_of(*history("sdpo", Mute))
    assert "flat_rewards" in topics_of(*history("grpo", Mute))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_trainers_record_what_the_monitor_looks_for(history):
    recorded = {
        name
        for lines, _ in (history("sdpo", CountA), history("grpo", CountA, beta=0.01))
        for line in lines
        for name in line
    }
    looked_for = {check.metric or "eval/reward" for check in _CHECKS} | set(HEALTHY_SDPO)
    assert looked_for <= recorded
