"""Does this feedback help this model? Asked in minutes, before any training.

The policy attempts each task once. What it failed it attempts again, shown in turn nothing, the
word "wrong", the feedback, or the reference solution:

=============  ==================================================================================
``nothing``    the question alone once more; a second try is often luckier, whatever it is shown
``binary``     the question, the failed attempt, and that it is not correct
``feedback``   the question, the failed attempt, and the environment's feedback on it
``reference``  the question, the failed attempt, and the environment's reference solution
=============  ==================================================================================

SDPO moves a policy towards itself-with-the-feedback, so what that one gains over nothing bounds
what there is to learn; its gain over ``binary`` is what the *words* are worth, and ``reference``
says whether the model can use a hint at all. A policy only needs ``generate``. This is not the
bench: no control with another task's feedback, no levels, no scores of tokens.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlrf._async import call_hook, run_sync
from rlrf.env import Env, Task, as_tasks
from rlrf.errors import check_whole
from rlrf.evaluate import pass_rate_interval
from rlrf.feedback import Feedback
from rlrf.messages import Message, Messages, action_text, assistant, user
from rlrf.paired import Comparison, Counts, compare
from rlrf.policy import Completion, Policy, Prompt, SamplingParams, as_policy
from rlrf.progress import phase
from rlrf.reprompt import FEEDBACK_TEMPLATE, REPROMPT_TEMPLATE, SOLUTION_TEMPLATE
from rlrf.rollout import MAX_AT_ONCE, Rollout, rollout

ARMS = ("nothing", "binary", "feedback", "reference")
BINARY = "The attempt is not correct."
"""What :attr:`rlrf.Level.binary` says."""
FEW = 20
"""Failed tasks below which hardly any difference can be told from chance."""
MAX_FEEDBACK_CHARS = 8000
"""What does not fit goes, the least important segments first."""


@dataclass(frozen=True)
class Arm:
    """What second attempts achieve that were shown one thing.

    Attributes:
        shown: which of :data:`ARMS`.
        n_tasks: failed tasks with a scored second attempt.
        n_attempts: scored second attempts.
        n_unscored: those left out, for a fault of the infrastructure or for want of room.
        pass_rate: mean over the tasks of the share of second attempts that solved it.
        pass_rate_ci: 95 % confidence interval of it; see :func:`rlrf.evaluate.pass_rate_interval`.
        over_nothing: the arm against ``nothing``, task by task; None for ``nothing`` itself.
        over_binary: the arm against ``binary``; None for ``nothing`` and ``binary``.
    """

    shown: str
    n_tasks: int
    n_attempts: int
    n_unscored: int
    pass_rate: float | None
    pass_rate_ci: tuple[float, float] | None
    over_nothing: Comparison | None = None
    over_binary: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """The arm as JSON data."""
        return {
            "shown": self.shown,
            "n_tasks": self.n_tasks,
            "n_attempts": self.n_attempts,
            "n_unscored": self.n_unscored,
            "pass_rate": self.pass_rate,
            "pass_rate_ci": list(self.pass_rate_ci) if self.pass_rate_ci else None,
            "over_nothing": self.over_nothing.to_dict() if self.over_nothing else None,
            "over_binary": self.over_binary.to_dict() if self.over_binary else None,
        }


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found.

    Attributes:
        n_tasks: tasks attempted a first time.
        n_solved: tasks solved at the first attempt; they have no second.
        n_unscored: tasks whose first attempt is unscored; left out.
        n_silent: tasks that were failed without any feedback; left out.
        n_failed: tasks of the second attempts.
        arms: one for each of :data:`ARMS` that could be tried.
        advice: one sentence.
        warnings: what to know before it is believed.
    """

    n_tasks: int
    n_solved: int
    n_unscored: int
    n_silent: int
    n_failed: int
    arms: tuple[Arm, ...]
    advice: str
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        names = ("n_tasks", "n_solved", "n_unscored", "n_silent", "n_failed", "advice")
        return {
            **{name: getattr(self, name) for name in names},
            "warnings": list(self.warnings),
            "arms": [arm.to_dict() for arm in self.arms],
        }

    def __str__(self) -> str:
        return self.advice


def probe(
    env: Env,
    policy: Policy,
    *,
    tasks: str | Task | Iterable[str | Task] | None = None,
    limit: int | None = 40,
    samples: int = 2,
    params: SamplingParams | None = None,
    seed: int = 0,
    max_concurrency: int = 64,
    deadline_s: float | None = 120.0,
) -> ProbeReport:
    """Ask whether the environment's feedback helps a policy; see the module.

    Args:
        env: the environment; its feedback level is what is asked about.
        policy: what replies; only its ``generate`` is used.
        tasks: ids or tasks; None for the environment's split.
        limit: draw so many of them at random; None takes all.
        samples: second attempts at each failed task, for each thing it is shown.
        params: how to sample; greedy second tries shown nothing only repeat the first.
        seed: seeds the draw of tasks, sampling and episodes.
        max_concurrency: episodes under way at once.
        deadline_s: seconds of environment time per episode.

    Raises:
        UsageError: no tasks, a number out of range.
        UnknownIdError: no task has a given id.
    """
    check_whole("samples", samples, most=MAX_AT_ONCE)
    if limit is not None:
        check_whole("limit", limit)
    policy, params = as_policy(policy), params or SamplingParams()
    chosen = _draw(env.tasks() if tasks is None else as_tasks(tasks), limit, seed)
    common: dict[str, Any] = {
        "max_concurrency": max_concurrency,
        "params": params,
        "deadline_s": deadline_s,
    }
    with phase("first attempts"):
        first = rollout(env, policy, chosen, seed=seed, **common)
    unsolved = [r for r in first if r.scored and not r.solved]
    failed = [r for r in unsolved if any(r.feedback)]
    second: dict[str, list[Rollout]] = {}
    if failed:
        by_id = {getattr(task, "id", task): task for task in chosen}
        posed = [
            _Posed(arm, r, told)
            for r in failed
            for arm, told in _hints(env, r, by_id[r.task_id]).items()
        ]
        again = _Again(policy, [p.messages for p in posed])
        with phase("second attempts"):
            found = rollout(
                env, again, [by_id[p.of.task_id] for p in posed], group_size=samples, seed=seed + 1,
                **common,
            )  # fmt: skip
        for i, p in enumerate(posed):
            second.setdefault(p.arm, []).extend(found[i * samples : (i + 1) * samples])
    arms = _arms(second)
    counts = {
        "n_tasks": len(first),
        "n_solved": sum(r.solved for r in first),
        "n_unscored": sum(not r.scored for r in first),
        "n_silent": len(unsolved) - len(failed),
        "n_failed": len(failed),
    }
    cut = sum(r.finish_reason == "length" for r in first)
    return ProbeReport(
        **counts,
        arms=tuple(arms.values()),
        advice=_advice(arms, **counts),
        warnings=tuple(_warnings(arms, failed, second, cut, params, **counts)),
    )


def _draw(tasks: Sequence[str | Task], limit: int | None, seed: int) -> Sequence[str | Task]:
    unique = list({getattr(t, "id", t): t for t in tasks}.values())
    if limit is None or limit >= len(unique):
        return unique
    chosen = random.Random(seed).sample(range(len(unique)), limit)
    return [unique[i] for i in sorted(chosen)]


# --- what a second attempt is shown --------------------------------------------------------


def second_prompt(question: Messages, attempt: str, arm: str, told: str) -> Messages:
    """The chat of a second attempt: the question, the attempt, and what is told of it.

    The words are those of SDPO's reprompt (arXiv 2601.20802, table 2).
    """
    if arm == "nothing":
        return question
    if arm == "reference":
        said = SOLUTION_TEMPLATE.format(successful_previous_attempt=told)
    else:
        said = FEEDBACK_TEMPLATE.format(feedback_raw=told)
    text = REPROMPT_TEMPLATE.format(prompt="", solution=said, feedback="").strip()
    return (*question, assistant(attempt or "(no answer)"), user(text))


def _hints(env: Env, failed: Rollout, task: str | Task) -> dict[str, str]:
    """Arm to what it tells of a failed attempt."""
    said = Feedback(s for step in failed.feedback for s in step)
    told = {
        "nothing": "",
        "binary": BINARY,
        "feedback": said.render(MAX_FEEDBACK_CHARS),
    }
    solution: Any = run_sync(call_hook(env.reference_solution, env._find_task(task)))
    if isinstance(solution, Mapping):
        solution = action_text(solution)
    if isinstance(solution, str) and solution.strip():  # what is acted out cannot be told
        told["reference"] = solution
    return told


@dataclass(frozen=True)
class _Posed:
    """A failed task that is attempted again."""

    arm: str
    of: Rollout
    told: str

    @property
    def messages(self) -> Messages:
        start = _question_length(self.of)
        attempt = _as_text(self.of.messages[start:])
        return second_prompt(self.of.messages[:start], attempt, self.arm, self.told)


def _question_length(of: Rollout) -> int:
    """How many messages stood before the policy's first reply."""
    replies = [i for i, m in enumerate(of.messages) if m["role"] == "assistant"]
    own = replies[-len(of.feedback) :]  # a question may quote an assistant
    return own[0] if own else len(of.messages)


def _as_text(turns: Sequence[Message]) -> str:
    """An attempt as one message: a reply as it is, of several turns each after its role."""
    while turns and turns[-1]["role"] != "assistant":  # what came after the last reply
        turns = turns[:-1]
    texts = []
    for turn in turns:
        calls = [
            f"{f.get('name')}({_plain(f.get('arguments', ''))})"
            for f in (call.get("function", call) for call in turn.get("tool_calls") or ())
        ]
        text = "\n".join(part for part in (turn["content"] or "", *calls) if part.strip())
        texts.append(f"{turn['role']}: {text}" if len(turns) > 1 else text)
    return "\n\n".join(text for text in texts if text)


def _plain(arguments: Any) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


class _Again:
    """A policy whose prompts open with other messages, those of their group.

    The task itself stays as it was: a grader may read its question.
    """

    def __init__(self, policy: Policy, openings: Sequence[Messages]) -> None:
        self.policy, self.openings = policy, openings
        self._question: dict[str, int] = {}  # group to the length of its question

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """What the policy says to the other prompts; awaitable if that is."""
        return self.policy.generate([self._posed(prompt) for prompt in prompts], params)

    def _posed(self, prompt: Prompt) -> Prompt:
        group = prompt.group or ""
        if prompt.prefix_ids is None:
            self._question[group] = len(prompt.messages)
        opening = self.openings[int(group.partition(":")[0])]
        rest = prompt.messages[self._question[group] :]
        return replace(prompt, messages=(*opening, *rest))


# --- what it amounts to --------------------------------------------------------------------


def _arms(second: Mapping[str, Sequence[Rollout]]) -> dict[str, Arm]:
    counts = {arm: _counts(rollouts) for arm, rollouts in second.items()}
    arms: dict[str, Arm] = {}
    for name in (arm for arm in ARMS if arm in second):
        own = counts[name]
        scored = sum(n for n, _ in own.values())
        against = ARMS[: min(2, ARMS.index(name))]  # nothing, binary
        over = {f"over_{a}": compare(counts[a], own) for a in against}
        arms[name] = Arm(
            shown=name,
            n_tasks=len(own),
            n_attempts=scored,
            n_unscored=len(second[name]) - scored,
            pass_rate=sum(c / n for n, c in own.values()) / len(own) if own else None,
            pass_rate_ci=pass_rate_interval(list(own.values())) if own else None,
            **over,
        )
    return arms


def _counts(rollouts: Iterable[Rollout]) -> Counts:
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for r in rollouts:
        if r.scored:
            n, c = found[r.task_id]
            found[r.task_id] = n + 1, c + r.solved
    return dict(found)


def _advice(
    arms: Mapping[str, Arm],
    n_tasks: int,
    n_solved: int,
    n_unscored: int,
    n_silent: int,
    n_failed: int,
) -> str:
    if n_unscored == n_tasks:
        return "No attempt could be scored: mend the environment or its sandbox first."
    if n_solved + n_unscored == n_tasks:
        return f"All {n_solved} scored tasks were solved at once: take harder ones."
    if not n_failed:
        return (
            f"None of the {n_silent} failed attempts got any feedback: there is nothing to learn "
            "from but the reward."
        )
    gain = arms["feedback"].over_nothing
    if gain is None:
        return "No second attempt could be scored both with and without the feedback."
    told = f"{_points(gain)} than one shown nothing"
    if gain.verdict == "better":
        words = arms["feedback"].over_binary
        if words is not None and words.verdict != "better":
            return (
                f"It helps to be told: a second attempt passes {told}; that the words add to a "
                f"mere 'wrong' does not show ({_points(words)})."
            )
        return (
            f"The feedback helps: a second attempt shown it passes {told}; there is something for "
            "SDPO to distil."
        )
    if gain.verdict == "worse":
        return (
            f"The feedback hurts: a second attempt shown it passes {told}; do not distil it as it "
            "is."
        )
    reference = arms["reference"].over_nothing if "reference" in arms else None
    if reference is None:
        return f"That the feedback helps does not show: a second attempt shown it passes {told}."
    if reference.verdict == "better":
        return (
            f"That the feedback helps does not show ({_points(gain)}), yet the reference does "
            f"({_points(reference)}): the model can use a hint, so say more in the feedback."
        )
    return (
        f"That the feedback helps does not show ({_points(gain)}), nor that the reference does "
        f"({_points(reference)}): take a larger model or easier tasks before you distil."
    )


def _points(gain: Comparison) -> str:
    low, high = (100 * end for end in gain.interval)
    of = 100 * gain.difference
    return f"{abs(of):.0f} points {'more' if of >= 0 else 'less'} often [{low:+.0f}, {high:+.0f}]"


def _warnings(
    arms: Mapping[str, Arm],
    failed: Sequence[Rollout],
    second: Mapping[str, Sequence[Rollout]],
    cut: int,
    params: SamplingParams,
    n_tasks: int,
    n_solved: int,
    n_unscored: int,
    n_silent: int,
    n_failed: int,
) -> Iterable[str]:
    gain = arms["feedback"].over_nothing if arms else None
    if n_failed and n_failed < FEW:
        yield (
            f"{n_failed} failed tasks are too few to tell: below {FEW} only a very large "
            "difference shows; raise --limit"
        )
    elif gain is not None and gain.verdict == "unclear" and gain.interval[1] > 0.1:
        yield (
            f"{n_failed} failed tasks cannot rule out a gain of {100 * gain.interval[1]:.0f} "
            "points; raise --limit or --samples"
        )
    if n_unscored:
        first = "first attempt is" if n_unscored == 1 else "first attempts are"
        yield f"{n_unscored} {first} unscored and left out"
    lost = sum(arm.n_unscored for arm in arms.values())
    if lost:
        why = next(r.failure for rs in second.values() for r in rs if not r.scored)
        yield f"{lost} second attempts are unscored and left out; one failed with {why}"
    if n_silent:
        yield f"{n_silent} failed attempts got no feedback and are left out"
    if n_failed and "reference" not in arms:
        yield "the environment has no reference solution that can be told; that arm is missing"
    elif n_failed and arms["reference"].n_tasks < arms["nothing"].n_tasks:
        yield f"only {arms['reference'].n_tasks} failed tasks have a reference solution"
    if n_failed and params.temperature == 0:
        yield "at temperature 0 a second attempt shown nothing only repeats the first"
    if 2 * cut > n_tasks:
        yield (
            f"{cut} of {n_tasks} first attempts were cut off at {params.max_tokens} tokens; raise "
            "--max-tokens"
        )
    texts = {s.text for r in failed for step in r.feedback for s in step}
    if texts == {BINARY}:
        yield "the feedback says no more than 'wrong'; a higher --feedback level says more"
