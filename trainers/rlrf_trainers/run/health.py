"""Warnings that save a run: what its numbers say is going wrong, and which knob to turn.

:class:`Monitor` is fed every step's line of metrics. A check holds when its condition has been met
in so many consecutive lines that have the metric; then it is said, once. It is said again only
after it has recovered, which takes as many lines in a row, and has come back: silence after a
warning does not mean that all is well.

======================== ===== =====================================================================
topic                    lines condition
======================== ===== =====================================================================
``flat_rewards``         5     >= 95 % of groups have equal rewards: GRPO has no gradient. SDPO:
                               only if no feedback is used and yet something is distilled (else it
                               is ``no_reprompts``)
``no_reprompts``         3     <= 1 % of rollouts have a teacher prompt, though >= 10 % fail
``low_active``           5     < 10 % of rollouts have a teacher prompt, though > 25 % fail, under
                               ``loss_aggregation=sequence_mean``: the step shrinks with them
``reprompt_truncated``   3     > 10 % of rollouts had their feedback or demonstration shortened
``teacher_gap``          1     the policy, shown the hint, is no better than without
``few_probed``           1     it is better, but on < 5 tasks: not even if all of them agreed would
                               that be beyond chance (one-sided sign test, 5 %)
``unscored``             3     > 20 % of rollouts could not be scored
``masked``               3     > 50 % of rollouts train nothing although they were scored (SDPO: and
                               failed)
``clipped``              3     > 50 % of completions end at ``max_completion_length``
``grad_norm``            3     < 1e-4 although there is something to learn
``entropy_collapse``     5     < 0.1 nats and < 0.3 of the early mean, the tasks not being solved
``entropy_explosion``    3     > 2 nats and > 2.5 times the early mean
``length_drift``         5     twice or half the early mean, and 8 tokens away from it
``sampler_mismatch``     3     the sampler's log-probabilities are off by > 0.1 nats on average, or
                               by > 3 at worst where there is no average (not under top_p, top_k)
``teacher_divergence``   3     KL to the teacher > 0.5 nats a token and > 3 times the early mean
``reference_divergence`` 3     GRPO: KL to the reference > 2 nats a token
``eval_collapse``        1     an evaluation is 25 % below the best one, and by more than chance
                               (three standard errors)
======================== ===== =====================================================================

The early mean is that of the first five lines with the metric. The thresholds come from healthy
and failed runs (``tests/test_health.py`` has both), reports of others (grad_norm 1e-5,
lasgroup/SDPO#38; collapse after 400 steps, #25) and the papers named at the checks. On small
batches they are noisy: a warning is a reason to look, not to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

_EARLY = 5  # lines that make a baseline
_AGAIN = "(Said once; again only if it recovers and comes back.)"

_REPROMPTED = "self_distillation/reprompt_sample_fraction"
_SUCCESS = "self_distillation/success_sample_fraction"
_AVAILABLE = "self_distillation/feedback_available_fraction"
_USED = "self_distillation/feedback_used_fraction"
_TRUNCATED = "self_distillation/reprompt_truncated_fraction"
_GAP = "self_distillation/teacher_gap"
_PROBED = "self_distillation/probe_tasks"
_TEACHER_KL = "self_distillation/teacher_student_kl"
_MISMATCH = "sampling/sampling_logp_difference"
_LENGTH = "completions/mean_length"
_CLIPPED = "completions/clipped_ratio"
_FLAT = "frac_reward_zero_std"
_BASELINED = ("entropy", "reward", _LENGTH, _TEACHER_KL)


class HealthWarning(NamedTuple):
    """What is wrong, what it means and what to do about it."""

    topic: str
    message: str


class Monitor:
    """Watches one run.

    Args:
        config: the trainer's; its values are named in the messages, and its fields decide which
            checks apply (one with ``teacher_regularization`` is self-distillation).
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._sdpo = hasattr(config, "teacher_regularization")
        self._alarms = {check.topic: _Alarm() for check in _CHECKS}
        self._early: dict[str, list[float]] = {name: [] for name in _BASELINED}
        self._best: tuple[float, float] | None = None  # (value, step) of an evaluation
        self._pass_rate = 0.0  # of the last evaluation

    def observe(self, line: Mapping[str, float | None]) -> list[HealthWarning]:
        """Take a step's metrics; returns what is to be said now.

        Args:
            line: as the trainer records it, with ``step``. Metrics that are absent, None or not
                finite are not judged, so a line with an evaluation alone is fine.
        """
        seen = {k: float(v) for k, v in line.items() if v is not None and math.isfinite(v)}
        step = int(seen.get("step", 0))
        self._pass_rate = seen.get("eval/pass_rate", self._pass_rate)
        for name, values in self._early.items():
            if name in seen and len(values) < _EARLY:
                values.append(seen[name])
        warnings = []
        for check in _CHECKS:
            if self._metric(check) not in seen:
                continue
            problem = check.look(self, seen)
            alarm = self._alarms[check.topic]
            if alarm.rings(problem is not None, step, check.lines):
                when = f"step {step}" if alarm.since == step else f"steps {alarm.since} to {step}"
                warnings.append(HealthWarning(check.topic, f"{when}: {problem} {_AGAIN}"))
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """What the next warnings depend on; JSON data."""
        return {
            "alarms": {topic: asdict(alarm) for topic, alarm in self._alarms.items()},
            "early": {name: list(values) for name, values in self._early.items()},
            "best": None if self._best is None else list(self._best),
            "pass_rate": self._pass_rate,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave; checks it does not know begin anew."""
        for topic, alarm in state["alarms"].items():
            if topic in self._alarms:
                self._alarms[topic] = _Alarm(**alarm)
        for name, values in state["early"].items():
            if name in self._early:
                self._early[name] = list(values)
        best = state["best"]
        self._best = None if best is None else (best[0], best[1])
        self._pass_rate = state["pass_rate"]

    # --- what checks share --------------------------------------------------------------------

    def _metric(self, check: _Check) -> str:
        return check.metric or self._value("metric_for_best_model", "eval/reward")

    def _value(self, knob: str, default: Any) -> Any:
        return getattr(self.config, knob, default)

    def _knob(self, name: str) -> str:
        """``name (now value)``, as the configuration has it."""
        if not hasattr(self.config, name):
            return name
        value = getattr(self.config, name)
        text = f"{value:g}" if isinstance(value, float) else str(value)
        plain = value is None or isinstance(value, bool)  # as in TOML, and after --set
        return f"{name} (now {text.lower() if plain else text})"

    def _knobs(self, *names: str) -> str:
        """Several, as ``a (now 1), b (now 2) or c (now 3)``."""
        told = [self._knob(name) for name in names]
        return " or ".join([", ".join(told[:-1]), told[-1]] if told[1:] else told)

    def _early_mean(self, name: str) -> float | None:
        values = self._early[name]
        return sum(values) / len(values) if len(values) == _EARLY else None

    # --- is there anything to learn from? -----------------------------------------------------

    def _flat_rewards(self, m: dict[str, float]) -> str | None:
        if m[_FLAT] < 0.95:
            return None
        seen = f"the rewards of {m[_FLAT]:.0%} of the groups are all equal"
        if "reward" in m:
            seen += f", {m['reward']:.3g} on average"
        if not self._sdpo:
            kl = f" but that of {self._knob('beta')}" if self._value("beta", 0) else ""
            return (
                f"{seen}, so GRPO has no advantage and no gradient{kl}. If the tasks are too "
                f"hard, use easier ones, raise {self._knob('num_generations')}, or train with "
                "sdpo, which reads the feedback; if they are solved, use harder ones."
            )
        if m.get(_USED, 0.0) > 0.01 or m.get(_REPROMPTED, 0.0) <= 0.01:
            return None
        return (
            f"{seen}, and no feedback is used: only groups that are solved already are distilled, "
            "towards siblings that are no better. Set "
            f"{self._knob('include_environment_feedback')} to true, raise the environment's "
            "feedback level, or use other tasks."
        )

    def _no_reprompts(self, m: dict[str, float]) -> str | None:
        failing = 1 - m.get(_SUCCESS, 0.0)
        if m[_REPROMPTED] > 0.01 or failing < 0.1:
            return None
        hybrid = self._value("distillation_weight", 1.0) < 1 or self._value("route_to_grpo", False)
        only = " but what GRPO teaches" if hybrid else ""
        seen = (
            f"{failing:.0%} of the rollouts fail and {m[_REPROMPTED]:.0%} have a teacher prompt: "
            f"nothing{only} is learnt."
        )
        available = m.get(_AVAILABLE, 0.0) > 0.01
        if available and not self._value("include_environment_feedback", True):
            why = (
                f"{m[_AVAILABLE]:.0%} have feedback, which is not shown: set "
                f"{self._knob('include_environment_feedback')} to true."
            )
        elif available and self._value("feedback_kinds", None) is not None:
            why = (
                f"{m[_AVAILABLE]:.0%} have feedback, but of none of the kinds in "
                f"{self._knob('feedback_kinds')}: name others, or leave it out."
            )
        elif available:
            why = (
                f"{m[_AVAILABLE]:.0%} have feedback, but it does not reach the teacher: see "
                f"teacher_prompt in rollouts.jsonl and raise {self._knob('max_reprompt_len')}."
            )
        else:
            why = "The environment gives no feedback: raise its feedback level."
        if not self._value("use_successful_as_teacher", True):
            why += f" Or set {self._knob('use_successful_as_teacher')} to true."
        elif m.get("reward", 0.0) > 0 and m.get(_SUCCESS, 1.0) == 0:
            why += (
                f" The mean reward is {m['reward']:.3g}, but no rollout counts as solved: "
                f"set {self._knob('success_reward_threshold')} to a reward worth showing."
            )
        else:
            why += f" More rollouts find a correct sibling: raise {self._knob('num_generations')}."
        return f"{seen} {why}"

    def _low_active(self, m: dict[str, float]) -> str | None:
        active, failing = m[_REPROMPTED], 1 - m.get(_SUCCESS, 0.0)
        if self._value("loss_aggregation", "") != "sequence_mean":
            return None
        if not 0.01 < active < 0.1 or failing <= 0.25:
            return None
        return (
            f"{active:.1%} of the rollouts have a teacher prompt though {failing:.0%} fail, and "
            f"{self._knob('loss_aggregation')} divides by all of them: the gradient is "
            f"{1 / active:.0f} times smaller than the distilled ones ask for. Set loss_aggregation "
            f"to sequence_mean_active, or give more rollouts a hint: {self._hints()}."
        )

    def _reprompt_truncated(self, m: dict[str, float]) -> str | None:
        if m[_TRUNCATED] <= 0.1:
            return None
        return (
            f"{m[_TRUNCATED]:.0%} of the rollouts' teacher prompts are too long, and their "
            "feedback or demonstration was shortened: the teacher may not see what matters. "
            f"Raise {self._knob('max_reprompt_len')}, or let the environment say less."
        )

    def _teacher_gap(self, m: dict[str, float]) -> str | None:
        if m[_GAP] > 0:
            return None
        return (
            f"the teacher gap is {m[_GAP]:+.3g}: shown the hint, the policy does no better than "
            "without. What self-distillation gains in the end was found to be linear in this gap "
            "(arXiv 2605.30070), so expect nothing. Raise the environment's feedback level, look "
            f"at what it says (`rlrf info`), change {self._knob('feedback_kinds')}, or train "
            f"with grpo. If {self._knob('probe_tasks')} is too small to tell, raise it."
        )

    def _few_probed(self, m: dict[str, float]) -> str | None:
        if m.get(_GAP, 0.0) <= 0 or m[_PROBED] >= 5:
            return None
        tasks = "one task" if m[_PROBED] == 1 else f"{m[_PROBED]:.0f} tasks"
        return (
            f"the teacher gap of {m[_GAP]:+.3g} is that of {tasks}, which promises nothing: so few "
            "may agree by chance. Only tasks count on which an attempt failed and was given a "
            f"hint. Raise {self._knob('probe_tasks')}."
        )

    def _unscored(self, m: dict[str, float]) -> str | None:
        if m["unscored_fraction"] <= 0.2:
            return None
        return (
            f"{m['unscored_fraction']:.0%} of the rollouts could not be scored and are left out: "
            "steps are smaller, and what is left may be a biased choice. See `failure` in "
            "rollouts.jsonl; if it is the deadline, raise "
            f"{self._knob('rollout_deadline_s')} or lower {self._knob('max_concurrency')}."
        )

    def _masked(self, m: dict[str, float]) -> str | None:
        """SDPO records rollouts without a target, GRPO those of mask_truncated_completions."""
        unscored = m.get("unscored_fraction", 0.0)
        lost = m["masked_fraction"] - unscored
        if self._sdpo:
            lost -= m.get(_SUCCESS, 0.0) * (1 - unscored)
            if lost <= 0.5 or m.get(_REPROMPTED, 1.0) <= 0.1:  # less is said by other checks
                return None
            return (
                f"{lost:.0%} of the rollouts fail and train nothing: they have neither feedback "
                f"that is shown nor a correct sibling. What gives more of them a hint: "
                f"{self._hints()}."
            )
        if lost <= 0.5:
            return None
        return (
            f"{lost:.0%} of the rollouts were scored and train nothing. Replies that are cut off "
            f"are masked by {self._knob('mask_truncated_completions')}: raise "
            f"{self._knob('max_completion_length')}, or set it to false."
        )

    def _clipped(self, m: dict[str, float]) -> str | None:
        if m[_CLIPPED] <= 0.5:
            return None
        return (
            f"{m[_CLIPPED]:.0%} of the completions are cut off at "
            f"{self._knob('max_completion_length')}: their reward is of half an answer. Raise it, "
            "ask for shorter answers, or use a model that does not think at length."
        )

    # --- does it learn? -----------------------------------------------------------------------

    def _grad_norm(self, m: dict[str, float]) -> str | None:
        if m["grad_norm"] >= 1e-4:
            return None
        seen = f"grad_norm is {m['grad_norm']:.2g} although there is something to learn"
        if self._sdpo:
            if m.get(_REPROMPTED, 1.0) <= 0.01:
                return None
            if _TEACHER_KL in m:
                seen += f" (teacher_student_kl is {m[_TEACHER_KL]:.2g})"
            cure = (
                "Is the teacher shown anything that changes its mind (teacher_prompt in "
                "rollouts.jsonl)? Otherwise try "
                f"{self._knob('loss_aggregation')} as sequence_mean_active, or another "
                f"{self._knobs('distillation_alpha', 'distillation_kl_clip')}."
            )
        else:
            if m.get(_FLAT, 0.0) >= 0.95:
                return None  # the rewards are flat: said of them
            cure = (
                f"Try another {self._knob('loss_type')} or {self._knob('scale_rewards')}, and see "
                "whether the rewards differ by more than rounding (reward_std)."
            )
        return (
            f"{seen}: spread over all weights it nears AdamW's epsilon of 1e-8, below which steps "
            f"shrink. {cure}"
        )

    def _entropy_collapse(self, m: dict[str, float]) -> str | None:
        now, early = m["entropy"], self._early_mean("entropy")
        if early is None or now >= 0.1 or now >= 0.3 * early:
            return None
        if max(m.get(_SUCCESS, 0.0), self._pass_rate) >= 0.95:
            return None  # sure of itself, and right
        return (
            f"the entropy is {now:.3f} nats a token, {early:.3f} at first: the rollouts of a group "
            "are nearly the same, and nothing new is found. Lower "
            f"{self._knob('learning_rate')}, {self._tether()}; or sample at a higher "
            f"{self._knob('temperature')}."
        )

    def _entropy_explosion(self, m: dict[str, float]) -> str | None:
        now, early = m["entropy"], self._early_mean("entropy")
        if early is None or now <= 2.0 or now <= 2.5 * early:
            return None
        extra = ""
        if self._sdpo and not self._value("distillation_add_tail", True):
            # Without the tail, mass leaves the top K (arXiv 2608.14728).
            extra = f" Set {self._knob('distillation_add_tail')} to true."
        return (
            f"the entropy is {now:.2f} nats a token, {early:.2f} at first: the policy is turning "
            f"into noise.{extra} Lower {self._knob('learning_rate')}, {self._tether()}."
        )

    def _length_drift(self, m: dict[str, float]) -> str | None:
        now, early = m[_LENGTH], self._early_mean(_LENGTH)
        if early is None or abs(now - early) < 8 or early / 2 < now < early * 2:
            return None
        seen = f"completions have {now:.0f} tokens on average, {early:.0f} at first"
        reward = self._early_mean("reward")
        if reward is not None and "reward" in m:
            seen += f" (reward {m['reward']:.3g}, {reward:.3g} at first)"
        if now > early:
            return (
                f"{seen}. Unless they need it, this is repetition or padding: read some in the "
                f"report. Lower {self._knob('learning_rate')}, {self._tether()}."
            )
        if self._sdpo:
            # Table 3 of the SDPO paper; arXiv 2603.24472 for what it may cost.
            return (
                f"{seen}. Self-distillation does shorten replies, and that is no fault while the "
                "held-out reward holds; on tasks unlike the training ones it has cost up to 40 % "
                "(arXiv 2603.24472). Evaluate on such tasks too; against it: "
                f"{self._slower()}lower "
                f"{self._knobs('teacher_update_rate', 'learning_rate')}, or set "
                f"{self._knob('distillation_kl_clip')} above 0."
            )
        return (
            f"{seen}. Unless the tasks need no more, the policy is cutting its reasoning short: "
            f"read some in the report. Lower {self._knob('learning_rate')}, {self._tether()}."
        )

    def _sampler_mismatch(self, m: dict[str, float]) -> str | None:
        mean, worst = m.get(f"{_MISMATCH}/mean"), m[f"{_MISMATCH}/max"]
        cut = getattr(self.config, "top_p", 1.0) < 1 or getattr(self.config, "top_k", 0) > 0
        if cut:  # another distribution by design
            return None
        if worst <= 3 if mean is None else mean <= 0.1:
            return None
        seen = f"{worst:.2g} nats at worst" if mean is None else f"{mean:.2g} nats on average"
        return (
            f"the sampler's log-probabilities and the trainer's are apart by {seen}: it samples "
            "from other weights (were they updated?), in another precision, or at another "
            f"{self._knob('temperature')}. {self._knob('rollout_is')} corrects "
            f"up to {self._knob('rollout_is_threshold')}, not more."
        )

    def _teacher_divergence(self, m: dict[str, float]) -> str | None:
        now, early = m[_TEACHER_KL], self._early_mean(_TEACHER_KL)
        if early is None or now <= 0.5 or now <= 3 * early:
            return None
        return (
            f"teacher and student are {now:.2f} nats a token apart, {early:.2f} at first: they "
            f"run away from each other instead of meeting. Lower {self._knob('learning_rate')}, "
            f"{self._tether()}, or cap single tokens with {self._knob('distillation_kl_clip')}."
        )

    def _reference_divergence(self, m: dict[str, float]) -> str | None:
        if m["kl"] <= 2:
            return None
        return (
            f"the policy is {m['kl']:.2f} nats a token from the reference: it is another model by "
            f"now. Lower {self._knob('learning_rate')}, {self._tether()}."
        )

    def _eval_collapse(self, m: dict[str, float]) -> str | None:
        metric = self._value("metric_for_best_model", "eval/reward")
        now, step = m[metric], m.get("step", 0.0)
        if self._best is None or now > self._best[0]:
            self._best = (now, step)
        best, at = self._best
        # Three standard errors of the difference of two means of n rewards in [0, 1] (or as wide
        # as the best is high), which are at most sqrt(0.5 / n): the best is a maximum of several.
        n = (self._value("eval_tasks", 0) or 64) * self._value("eval_samples", 1)
        chance = 3 * math.sqrt(0.5 / n) * max(1.0, abs(best))
        if best - now <= max(0.25 * abs(best), chance):
            return None
        keep, stop = "load_best_model_at_end", "early_stopping_patience"
        return (
            f"{metric} is {now:.3g}, and was {best:.3g} at step {at:.0f}: the run is past its "
            "best. "
            + ("" if self._value(keep, False) else f"Set {self._knob(keep)} to true to keep that. ")
            + ("" if self._value(stop, 0) else f"Set {self._knob(stop)} to 2 or 3 to end there. ")
            + f"To go on, lower {self._knob('learning_rate')}, {self._tether()}."
        )

    def _hints(self) -> str:
        """What decides how many rollouts have something to show their teacher."""
        names = ["include_environment_feedback", "use_successful_as_teacher", "num_generations"]
        if self._value("feedback_kinds", None) is not None:
            names.append("feedback_kinds")
        return f"the environment's feedback level, {self._knobs(*names)}"

    def _slower(self) -> str:
        """The teacher that does not move, where it does."""
        if self.config.teacher_regularization == "frozen":
            return ""
        return f"set {self._knob('teacher_regularization')} to frozen, "

    def _tether(self) -> str:
        """What holds the policy near where it was."""
        if self._sdpo:
            slower = self._slower()
            moves = self.config.teacher_regularization in ("ema", "trust_region")
            rate = f"lower {self._knob('teacher_update_rate')}" if moves else ""
            return " or ".join(filter(None, (slower.removesuffix(", "), rate))) or "stop earlier"
        return f"raise {self._knob('beta')}"


@dataclass
class _Alarm:
    """How one check stands."""

    bad: int = 0  # lines in a row that meet the condition
    good: int = 0  # that do not
    since: int = 0  # the first step of `bad`
    said: bool = False

    def rings(self, bad: bool, step: int, lines: int) -> bool:
        """Take one line; True when it is to be said now."""
        if not bad:
            self.bad, self.good = 0, self.good + 1
            self.said = self.said and self.good < lines
            return False
        self.since = self.since if self.bad else step
        self.bad, self.good = self.bad + 1, 0
        if self.said or self.bad < lines:
            return False
        self.said = True
        return True


class _Check(NamedTuple):
    topic: str
    metric: str  # without it there is nothing to judge; empty: the metric of the best model
    lines: int  # in a row, to be said and to be over
    look: Callable[[Monitor, dict[str, float]], str | None]


_CHECKS = (
    _Check("flat_rewards", _FLAT, 5, Monitor._flat_rewards),
    _Check("no_reprompts", _REPROMPTED, 3, Monitor._no_reprompts),
    _Check("low_active", _REPROMPTED, 5, Monitor._low_active),
    _Check("reprompt_truncated", _TRUNCATED, 3, Monitor._reprompt_truncated),
    _Check("teacher_gap", _GAP, 1, Monitor._teacher_gap),
    _Check("few_probed", _PROBED, 1, Monitor._few_probed),
    _Check("unscored", "unscored_fraction", 3, Monitor._unscored),
    _Check("masked", "masked_fraction", 3, Monitor._masked),
    _Check("clipped", _CLIPPED, 3, Monitor._clipped),
    _Check("grad_norm", "grad_norm", 3, Monitor._grad_norm),
    _Check("entropy_collapse", "entropy", 5, Monitor._entropy_collapse),
    _Check("entropy_explosion", "entropy", 3, Monitor._entropy_explosion),
    _Check("length_drift", _LENGTH, 5, Monitor._length_drift),
    _Check("sampler_mismatch", f"{_MISMATCH}/max", 3, Monitor._sampler_mismatch),
    _Check("teacher_divergence", _TEACHER_KL, 3, Monitor._teacher_divergence),
    _Check("reference_divergence", "kl", 3, Monitor._reference_divergence),
    _Check("eval_collapse", "", 1, Monitor._eval_collapse),
)
TOPICS = tuple(check.topic for check in _CHECKS)
"""Every topic, for those who want to silence one."""
