"""The checks, each a function that may be called alone; where OpenEnv has one, it has its name.

A fault is reported by one check: what follows from it (episodes that differ from run to run differ
among concurrent ones, too) is skipped, and says because of what.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import math
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gymnasium.utils.env_checker import check_env as gymnasium_check_env

from rlrf._async import run_sync
from rlrf.env import Env
from rlrf.errors import describe
from rlrf.feedback import MAX_SEGMENT_CHARS, MAX_SEGMENTS, Feedback, Level, Segment, special_tokens
from rlrf.policy import ScriptedPolicy
from rlrf.rollout import rollout
from rlrf.testing.leaks import feedback_leaks, public_leaks
from rlrf.testing.play import (
    CANARIES,
    HOSTILE,
    MAX_STEPS,
    NO_OPS,
    Doubt,
    Play,
    Skip,
    Stuck,
    Trace,
    at,
    difference,
)
from rlrf.testing.report import CheckResult
from rlrf.wrappers import FeedbackWrapper

MAX_FEEDBACK_CHARS = 16 * MAX_SEGMENT_CHARS
"""No attempt, however long, may get more feedback than this."""


@dataclass(frozen=True)
class Check:
    """A check; called with an environment it raises where that breaks the rule.

    Attributes:
        id: ``family.name``.
        what: what must hold, in a sentence or two.
        function: does it; raises AssertionError where it does not hold.
        after: checks whose faults this one would only find again.
    """

    id: str
    what: str
    function: Callable[[Play], None]
    after: tuple[str, ...] = ()

    def __call__(self, env: Env | str, **options: Any) -> CheckResult:
        """Run this check alone.

        Args:
            env: an environment, or an id for :func:`rlrf.make`.
            options: of :func:`check_env`, but for ``strict``.

        Returns:
            The result: that it holds, that it warns, or why it was skipped.

        Raises:
            AssertionError: it does not hold; says what is wrong and where.
        """
        with Play(env, **options) as play:
            result = self.run(play)
        if result.status == "fail":
            raise AssertionError(f"{self.id}: {result.detail}")
        return result

    def run(self, play: Play) -> CheckResult:
        """The result, whatever it is."""
        begun = time.monotonic()

        def result(status: Any, detail: str = "") -> CheckResult:
            return CheckResult(self.id, status, detail, duration_s=time.monotonic() - begun)

        if play.over is not None:
            return result("skip", f"not looked at: {describe(play.over)}")
        try:
            self.function(play)
        except Skip as why:
            return result("skip", str(why))
        except Doubt as why:
            return result("warn", str(why))
        except Stuck as why:
            return result("fail", str(why))
        except AssertionError as error:
            return result("fail", str(error) or "assertion failed")
        except Exception as error:
            if play.faulty and self is not check_hooks_return:
                return result("skip", f"not looked at: {describe(error)}")
            return result("fail", describe(error))
        return result("pass")


_all: list[Check] = []


def _check(id: str, *, after: tuple[str, ...] = ()) -> Callable[[Callable[[Play], None]], Check]:
    def make(function: Callable[[Play], None]) -> Check:
        check = Check(id, inspect.getdoc(function) or "", function, after)
        object.__setattr__(check, "__doc__", check.what)
        _all.append(check)
        return check

    return make


def run_all(play: Play) -> Iterator[CheckResult]:
    """Run them in order."""
    failed: set[str] = set()
    raised: dict[str, str] = {}
    for check in _all:
        if known := [id for id in check.after if id in failed]:
            yield CheckResult(check.id, "skip", f"not looked at, as {' and '.join(known)} fails")
            continue
        result = check.run(play)
        by = raised.setdefault(result.detail, check.id) if result.status == "fail" else check.id
        if by != check.id:
            result = replace(result, status="skip", detail=f"not looked at, for what {by} tells")
        if result.status == "fail":
            failed.add(check.id)
        yield result


_REPEATS = (
    "semantic.verifier_determinism",
    "feedback.deterministic",
    "runtime.episode_determinism",
)

# --- runtime --------------------------------------------------------------------------------------


@_check("runtime.tasks_unique_ids")
def check_unique_ids(play: Play) -> None:
    """No two tasks of a split have one id."""
    for split in play.env.splits:
        play.timed("load_tasks", play.env.tasks(split).ids, hooks=10)  # raises, and names it


@_check("runtime.hooks_return")
def check_hooks_return(play: Play) -> None:
    """Every hook comes back in time, and raises nothing."""
    for task in play.tasks:
        for action in play.attempts(task):
            found = play.try_(task, action)
            if isinstance(found, Stuck):
                raise found
            assert isinstance(found, Trace), at(task, action) + describe(found)


@_check("runtime.split_disjoint")
def check_split_disjoint(play: Play) -> None:
    """No id and no prompt stands in two splits; one named ``all`` may hold the others."""
    if play.env.overlapping_splits:
        raise Skip("the environment says that its splits overlap on purpose")
    splits = [split for split in play.env.splits if split != "all"]
    if len(splits) < 2:
        raise Skip("the environment has one split")
    ids: dict[str, str] = {}
    prompts: dict[str, str] = {}
    for split in splits:
        for task in play.env.tasks(split):
            text = json.dumps(task.messages, default=repr)
            for what, key, known in (("task", task.id, ids), ("prompt", text, prompts)):
                assert known.setdefault(key, split) == split, (
                    f"the {what} {key[:80]!r} is in the splits {known[key]!r} and {split!r}"
                )


@_check("runtime.seed_control")
def check_seed_control(play: Play) -> None:
    """The seed of reset() decides the task and the observation."""
    reset = functools.partial(play.timed, "reset()")
    first, info = reset(lambda: play.env.reset(seed=7))
    again, info_again = reset(lambda: play.env.reset(seed=7))
    assert info["task_id"] == info_again["task_id"], "reset(seed=7) drew two different tasks"
    assert first == again, "reset(seed=7) gave two different observations"
    if len(play.env.tasks()) > 8:
        drawn = {
            reset(functools.partial(play.env.reset, seed=seed))[1]["task_id"] for seed in range(16)
        }
        assert len(drawn) > 1, "16 seeds all drew the same task"


@_check("semantic.verifier_determinism")
def check_verifier_determinism(play: Play) -> None:
    """The same attempt earns the same reward, three times."""
    for task, action, traces, raised in play.again(runs=2):
        for error in raised:
            raise AssertionError(
                at(task, action) + f"tried again it raises {describe(error)}, and did not before"
            )
        rewards = [t.rewards for t in traces]
        assert all(r == rewards[0] for r in rewards), (
            at(task, action) + f"three runs earn {rewards}"
        )


@_check("feedback.deterministic")
def check_feedback_determinism(play: Play) -> None:
    """The same attempt gets the same feedback, byte for byte."""
    for task, action, (trace, *others), _ in play.again():
        for other in others:
            assert other.said() == trace.said(), (
                at(task, action)
                + f"two runs say {difference(trace.feedback, other.feedback)}; normalise paths, "
                "addresses and timings"
            )


@_check("runtime.episode_determinism")
def check_episode_determinism(play: Play) -> None:
    """The same task, seed and action: the same observations, metrics and ends."""
    for task, action, (trace, *others), _ in play.again():
        assert all(other.shown() == trace.shown() for other in others), (
            at(task, action) + "two runs differ in observation, metrics or how they end; normalise "
            "paths, addresses and timings"
        )


@_check("runtime.episode_isolation", after=_REPEATS)
def check_episode_isolation(play: Play) -> None:
    """Concurrent, interleaved episodes give what they give alone."""

    async def all_at_once() -> list[Trace]:
        return await asyncio.gather(*(play.episode(t, a) for t, a, _ in pairs))

    def key(trace: Trace) -> tuple[Any, ...]:
        return trace.rewards, trace.said(), trace.shown()

    pairs = list(play.everything())
    for (task, action, alone), crowded in zip(pairs, run_sync(all_at_once()), strict=True):
        assert key(alone) == key(crowded), (
            at(task, action) + "concurrent episodes change the result; keep an episode's state in "
            "the episode"
        )


@_check("runtime.gymnasium_check_env", after=("runtime.seed_control", *_REPEATS))
def check_gymnasium(play: Play) -> None:
    """Gymnasium's own checker, and no warning."""

    def check() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gymnasium_check_env(play.env, skip_render_check=True, skip_close_check=True)

    play.timed("a hook that Gymnasium's checker calls", check, hooks=20)


@_check("runtime.reward_well_formed")
def check_rewards(play: Play) -> None:
    """Every reward is a finite number within ``reward_range``."""
    low, high = play.env.reward_range
    assert -math.inf < low < high < math.inf, (
        f"reward_range is {play.env.reward_range}; it must be two finite numbers, low < high"
    )
    for task, action, trace in play.everything():
        assert not trace.ended or low <= trace.reward <= high, (
            at(task, action) + f"reward {trace.reward} is outside reward_range "
            f"{play.env.reward_range}"
        )


# --- semantic -------------------------------------------------------------------------------------


@_check("semantic.oracle_max", after=("runtime.reward_well_formed",))
def check_oracle_max(play: Play) -> None:
    """The reference solution earns the highest reward and is not faulted."""
    references = play.references()
    for task in play.tasks:
        if task.id not in references:
            continue
        trace = play.seen(task, references[task.id])
        assert trace.reward == play.env.reward_range[1], (
            f"task {task.id!r}: its reference solution earns {trace.reward}, not "
            f"{play.env.reward_range[1]}"
        )
        errors = [s for s in trace.feedback if s.severity == "error"]
        assert not errors, f"task {task.id!r}: the reference solution is faulted: {errors[0]}"


@_check("semantic.floor_gap")
def check_floor_gap(play: Play) -> None:
    """Doing nothing earns the lowest reward."""
    for task in play.tasks:
        for action in NO_OPS:
            trace = play.seen(task, action)
            assert not trace.ended or trace.reward == play.env.reward_range[0], (
                f"task {task.id!r}: the no-op {action!r} earns {trace.reward}, not "
                f"{play.env.reward_range[0]}"
            )


@_check("semantic.canary_floor", after=("semantic.floor_gap",))
def check_canary_floor(play: Play) -> None:
    """An attempt that claims success, instead of earning it, solves nothing."""
    for task in play.tasks:
        for action in CANARIES:
            trace = play.seen(task, action)
            assert not trace.ended or trace.reward < play.env.success_threshold, (
                at(task, action) + f"it only claims success, and earns {trace.reward}"
            )


@_check("semantic.no_solution_leakage")
def check_no_solution_leakage(play: Play) -> None:
    """What is hidden is in no prompt, no observation, no metadata, no info and no public task."""
    for split in play.env.splits:
        handed = play.env.tasks(split)
        for i in range(min(3, len(handed))):
            assert handed[i].hidden is None, f"tasks() hands out {handed[i].id!r} whole"
    public_leaks(play).check(
        "keep it in Task.hidden alone; if it is public on purpose, let secrets(task) leave it out"
    )


# --- feedback -------------------------------------------------------------------------------------


@_check("feedback.no_reference_leak")
def check_no_reference_leak(play: Play) -> None:
    """At every level, feedback says no more of what is hidden than that level may."""
    feedback_leaks(play).check(
        "give a segment that says it reveals='expected', or 'reference' if it solves the task"
    )


@_check("feedback.present_on_failure")
def check_present_on_failure(play: Play) -> None:
    """A failed episode says why, at the lowest level and at the default one."""
    for task, action, trace in play.failures():
        for level in (Level.binary, Level.explained):
            assert trace.feedback.at_level(level), (
                at(task, action) + f"it failed, but there is no feedback at level {level.name!r}; "
                "give a segment of severity 'error'"
            )


@_check("feedback.present_on_terminal")
def check_present_on_terminal(play: Play) -> None:
    """The last step of a failed episode has feedback, and every info has the key."""
    for task, action, trace in play.failures():
        assert trace.turns[-1].feedback or not trace.feedback, (
            at(task, action) + "the last step of a failed episode has no feedback"
        )
    for feedback in _infos(play):
        assert isinstance(feedback, Feedback), f"info['feedback'] is {feedback!r}"


@_check("feedback.empty_at_none")
def check_empty_at_none(play: Play) -> None:
    """At level ``none`` no info has feedback: on reset, on steps, at the end."""
    env: Env = play.env
    while isinstance(env, FeedbackWrapper):
        env = env.env
    level, env.feedback_level = env.feedback_level, Level.none
    try:
        for feedback in _infos(play):
            assert feedback == Feedback(), f"level 'none' shows {feedback!r}"
    finally:
        env.feedback_level = level


def _infos(play: Play) -> Iterator[Any]:
    """``info["feedback"]`` of an episode of no-ops through the Gymnasium face."""
    env = play.env
    observation, info = play.timed("reset()", lambda: env.reset(seed=0))
    assert observation, "reset() gave no message"
    assert info["feedback"] == Feedback(), "reset() must give an empty feedback"
    for _ in range(MAX_STEPS):
        result = play.timed("step()", lambda: env.step(NO_OPS[-1]))
        yield result.info["feedback"]
        if result.terminated or result.truncated:
            break


@_check("feedback.levels_monotonic")
def check_levels(play: Play) -> None:
    """A higher level shows all that a lower one shows, and no level more than it may."""
    for task, action, trace in play.everything():
        where = at(task, action)
        for turn in trace.turns:
            full = turn.feedback
            for lower, higher in itertools.pairwise(Level):
                less, more = full.at_level(lower), full.at_level(higher)
                assert bool(less) <= bool(more), where + f"{higher.name} says less than below"
                assert set(_own(less, full)) <= set(_own(more, full)), (
                    where + f"level {higher.name!r} hides what {lower.name!r} shows"
                )
                assert more.at_level(lower) == less, (
                    where + f"{lower.name} of {higher.name} is not {lower.name}"
                )


@_check("feedback.template_safe")
def check_template_safe(play: Play) -> None:
    """Hostile text comes back without control characters and special tokens."""
    for task in play.tasks:
        feedback = play.seen(task, HOSTILE).feedback
        for c in feedback.text:
            bad = unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t"
            assert not bad, f"task {task.id!r}: feedback holds the control character {c!r}"
        if play.tokenizer is not None:
            tokens = list(special_tokens(play.tokenizer))
            special = set(play.tokenizer.convert_tokens_to_ids(tokens))
            ids = feedback.tokenize(play.tokenizer).input_ids
            assert not special & set(ids), f"task {task.id!r}: feedback has special tokens"


@_check("feedback.bounded")
def check_bounded(play: Play) -> None:
    """An attempt of 1 MB does not get as much feedback."""
    for turn in play.seen(play.tasks[0], "x = 1\n" * 170_000).turns:
        assert len(turn.feedback.text) <= MAX_FEEDBACK_CHARS, (
            f"an attempt of 1 MB got feedback of {len(turn.feedback.text)} characters; keep "
            f"it below {MAX_FEEDBACK_CHARS}"
        )
        assert len(turn.feedback) < MAX_SEGMENTS, (
            f"an attempt of 1 MB got so many segments that all but {MAX_SEGMENTS} are left "
            "out; say less, the most important first"
        )


@_check("feedback.spans_in_range")
def check_spans(play: Play) -> None:
    """Spans lie within the attempt they blame."""
    for task, action, trace in play.everything():
        for turn, reply in zip(trace.turns, trace.replies, strict=True):
            length = len(reply["content"] or "")
            for segment in turn.feedback:
                assert segment.span is None or segment.span[1] <= length, (
                    at(task, action) + f"the span {segment.span} of {segment.kind!r} leaves the "
                    f"attempt of {length} characters"
                )


@_check("feedback.infra_is_unscored")
def check_infra_is_unscored(play: Play) -> None:
    """While the machinery is out of order no rollout gets a reward."""
    if play.outage is None:
        raise Skip("no outage was given; pass check_env(..., outage=...) to try one")
    # What reaches the machinery: a reply that is refused before is rightly scored without it.
    task = play.tasks[0]
    reference = play.reference(task)
    policy = ScriptedPolicy(play.replies[-1] if reference is None else reference)
    with play.outage():
        (tried,) = rollout(play.env, policy, [task], retries=0, deadline_s=play.deadline_s)
    assert tried.reward is None, (
        f"a rollout during the outage was scored {tried.reward}; raise rlrf.InfraError"
    )


def _own(shown: Feedback, full: Feedback) -> Iterator[Segment]:
    """The author's segments among those shown; the others stand in for what is masked."""
    return (s for s in shown if s in full.segments)


ALL: tuple[Check, ...] = tuple(_all)
CHECKS: tuple[str, ...] = tuple(check.id for check in ALL)
"""The names of all checks, in the order they run."""
