"""The conformance suite: it passes what is sound, and every check finds the fault it is for."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import warnings
from collections import Counter

import pytest

import rlrf
from rlrf import Feedback, InfraError, Outcome, Segment, Task, Turn, UsageError
from rlrf.testing import CHECKS, CheckReport, CheckResult, check_env, pytest_suite
from tests.environments_for_tests import INSTALLED, AsyncEcho, Echo, Guess


class Solved(Guess):
    """Solved by the word that every task wants."""

    def start(self, task, rng):
        return {"number": 7, "tries": 0}

    def reference_solution(self, task):
        return "7"


# --- what is sound passes -------------------------------------------------------------------------


@pytest.mark.parametrize("env", [Echo(), AsyncEcho(), Solved(max_turns=3), Echo(feedback="none")])
def test_what_is_sound_passes(env, tokenizer):
    report = check_env(env, tokenizer=tokenizer, actions=["nearly", "yes"])
    assert [r.id for r in report.results] == list(CHECKS)
    assert report.ok, str(report)
    assert not report.warnings, str(report)
    report.raise_if_failed()
    assert [r.id for r in report.results if r.status == "skip"] == ["feedback.infra_is_unscored"]


def test_one_action_may_be_given_as_it_is(tokenizer):
    seen = []

    class Seen(Echo):
        def grade(self, task, completion):
            seen.append(completion)
            return super().grade(task, completion)

    check_env(Seen(), tasks=1, actions="nearly")
    assert "nearly" in seen
    assert "n" not in seen


class Steps(rlrf.MultiTurnEnv):
    """A call of a tool, then the answer."""

    splits = ("train",)
    reference: object = None

    def load_tasks(self, split):
        return [Task("a", "Look it up, then say it.", hidden="it")]

    def start(self, task):
        return [task.hidden]

    def respond(self, state, action):
        state.append(action.get("tool_calls") or action["content"])
        if len(state) == 2 and action.get("tool_calls"):
            return Turn("It is there.")
        if len(state) == 3 and action["content"] == state[0]:
            return Turn(reward=1.0, terminated=True)
        told = Feedback.of("wrong_answer", "No.", span=(0, len(action["content"] or "")))
        return Turn("", 0.0, told, terminated=True)

    def reference_solution(self, task):
        return self.reference


LOOK = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
LOOKS = {"role": "assistant", "content": None, "tool_calls": [LOOK]}


async def plays(messages):
    return LOOKS if len(messages) == 1 else "it"


@pytest.mark.parametrize("reference", [[LOOKS, "it"], (LOOKS, rlrf.assistant("it")), plays])
def test_references_and_actions_may_take_turns(reference):
    env = Steps()
    env.reference = reference
    actions = [LOOKS, ["no", LOOKS], lambda messages: "nearly", [LOOKS, "no"], "it"]
    report = check_env(env, actions=actions)
    assert report.ok, str(report)
    assert "oracle" not in str([r.id for r in report.results if r.status == "skip"])
    for one in (LOOKS, plays, "it"):
        assert check_env(env, actions=one).ok
    env.reference = [LOOKS, "that"]
    failed = {r.id: r.detail for r in check_env(env).failed}
    assert "reference solution earns 0.0" in failed["semantic.oracle_max"]
    for odd in (3, [None], [["a", 3]]):
        with pytest.raises(UsageError, match=r"an action of check_env\(\) is"):
            check_env(env, actions=odd)


def test_spans_lie_within_the_reply_of_their_turn():
    class Wide(Steps):
        def respond(self, state, action):
            told = Feedback.of("wrong_answer", "No.", span=(0, 6))
            return Turn("", 0.0, told, terminated=action["content"] == "b")

    failed = {
        r.id: r.detail for r in check_env(Wide(max_turns=3), actions=[["longer", "b"]]).failed
    }
    assert "leaves the attempt of 0 characters" in failed["feedback.spans_in_range"]


def test_what_does_not_apply_is_skipped_with_the_reason():
    class Bare(Guess):
        splits = ("train",)

    report = check_env(Bare(max_turns=2))
    skipped = {r.id: r.detail for r in report.results if r.status == "skip"}
    assert set(skipped) == {
        "runtime.split_disjoint",
        "semantic.oracle_max",
        "feedback.no_reference_leak",
        "feedback.infra_is_unscored",
    }
    assert "reference_solution" in skipped["semantic.oracle_max"]
    assert "one split" in skipped["runtime.split_disjoint"]
    assert report.ok
    strict = check_env(Bare(max_turns=2), strict=True)
    assert not strict.ok
    with pytest.raises(AssertionError, match=r"oracle_max \(skip\)"):
        strict.raise_if_failed()


def test_an_id_is_made_and_closed(registered):
    closed = []

    class Closing(Echo):
        def close(self):
            closed.append(self)

    rlrf.register("test-closing-v0", Closing)
    report = check_env("test-closing-v0", tasks=1)
    assert report.ok, str(report)
    assert closed
    assert str(report).splitlines()[0] == "test-closing-v0"
    with pytest.raises(UsageError, match="tasks is 0"):
        check_env("test-closing-v0", tasks=0)
    with pytest.raises(rlrf.UnknownIdError):
        check_env("test-closin-v0")


QUICK = ("format-rules-v0", "mbpp-v0", "livecodebench-v6")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in INSTALLED],
)
def test_our_environments_conform(name, tokenizer, published_code_data):
    if name != "format-rules-v0" and not shutil.which("bwrap"):
        pytest.skip(f"{name} needs the sandbox bubblewrap, which is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = rlrf.make(name)
    outage = no_sandbox(env) if hasattr(env, "_open_pool") else None
    try:
        report = check_env(env, tasks=1, actions=[WRONG], tokenizer=tokenizer, outage=outage)
    finally:
        env.close()
    report.raise_if_failed()
    assert not report.warnings, str(report)
    skipped = {r.id for r in report.results if r.status == "skip"}
    # LiveCodeBench publishes no solutions; format-rules has no machinery that could fail.
    missing = {"semantic.oracle_max", "feedback.no_reference_leak", "feedback.infra_is_unscored"}
    assert skipped <= missing
    assert outage is None or "feedback.infra_is_unscored" not in skipped


WRONG = "```python\nclass Solution:\n    def add(self, n):\n        return 0\n\nprint(0)\n```"


def no_sandbox(env):
    @contextlib.contextmanager
    def outage():
        def broken(*args, **kwargs):
            raise InfraError("no slot", kind="sandbox_died")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(env, "_open_pool", broken)
            patch.setattr(env, "memory", type(env.memory)(0))
            yield

    return outage


test_conformance_as_tests = pytest_suite(Echo(), tasks=1)


def test_a_suite_says_what_failed_and_what_was_skipped(monkeypatch):
    asked = []
    results = (CheckResult("a", "fail", "because"), CheckResult("b", "skip", "no need"))

    def check(env, **options):
        asked.append((env, options))
        return CheckReport("x", results)

    monkeypatch.setattr("rlrf.testing.suite.check_env", check)
    test = pytest_suite("x-v0", tasks=2)
    assert not asked
    with pytest.raises(AssertionError, match="because"):
        test("a")
    with pytest.raises(pytest.skip.Exception, match="no need"):
        test("b")
    assert asked == [("x-v0", {"tasks": 2})]


def test_reports():
    results = (CheckResult("a.b", "pass"), CheckResult("a.c", "fail", "because"))
    report = CheckReport("env", results)
    assert str(report) == f"env\npass  a.b\nfail  {'a.c':<34} because"
    with pytest.raises(AssertionError, match=re.escape("a.c (fail): because")):
        report.raise_if_failed()
    assert CheckReport("env", results[:1]).ok


# --- every check finds its fault ------------------------------------------------------------------

count = itertools.count()
FAULTS = []


def fault(*ids):
    """The class below must fail these checks, and no other."""

    def note(cls):
        FAULTS.append((cls, set(ids)))
        return cls

    return note


def wrong(text="No.", **fields):
    return Outcome(0.0, Feedback.of("wrong_answer", text, **fields))


@fault("runtime.gymnasium_check_env")
class Warns(Echo):
    def reset(self, **kwargs):
        import warnings

        warnings.warn("old", DeprecationWarning, stacklevel=1)
        return super().reset(**kwargs)


@fault("runtime.tasks_unique_ids")
class Duplicate(Echo):
    def load_tasks(self, split):
        return [
            *super().load_tasks(split),
            Task(f"{split}-new", split),
            Task(f"{split}-new", split + " y"),
        ]

    def _find_task(self, task, split=None):  # so that only the one check is about it
        return task if isinstance(task, Task) and not task._stripped else self._full_tasks()[0]

    def reference_solution(self, task):
        return None


@fault("runtime.split_disjoint")
class SharedPrompt(Echo):
    def load_tasks(self, split):
        return [Task(t.id, "the same", hidden=t.hidden) for t in super().load_tasks(split)]


@fault("runtime.split_disjoint")
class SharedId(Echo):
    def load_tasks(self, split):
        shared = Task("shared", split + " shared", hidden="yes")
        return [shared, *super().load_tasks(split)]


@fault("runtime.seed_control")
class Unseeded(Echo):
    async def areset(self, *, seed=None, options=None):
        return await super().areset(seed=next(count), options=options)


@fault("runtime.seed_control")
class SameTask(Echo):
    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"{split} {i}", hidden="yes") for i in range(9)]

    async def areset(self, *, seed=None, options=None):
        return await super().areset(seed=seed, options=options or {"task_id": "train-0"})


@fault("runtime.episode_determinism")
class RandomMetric(Echo):
    def grade(self, task, completion):
        outcome = super().grade(task, completion)
        return Outcome(outcome.reward, outcome.feedback, {"time": next(count)})


@fault("runtime.episode_isolation")
class SharedState(Guess):
    """Counts the tries of all episodes together."""

    tries = 0

    def start(self, task, rng):
        self.tries = 0
        return super().start(task, rng)

    async def respond(self, state, action):
        import asyncio

        self.tries += 1
        await asyncio.sleep(0)
        told = Feedback.of("wrong_answer", f"Try {self.tries}.")
        return Turn("Again.", 0.0, told, terminated=self.tries >= 3)


@fault("runtime.reward_well_formed")
class OutOfRange(Echo):
    def grade(self, task, completion):
        outcome = super().grade(task, completion)
        return Outcome(7 * outcome.reward, outcome.feedback)


@fault("semantic.oracle_max")
class WrongReference(Echo):
    def reference_solution(self, task):
        return "never"


@fault("semantic.oracle_max")
class FaultedReference(Echo):
    def grade(self, task, completion):
        outcome = super().grade(task, completion)
        return Outcome(outcome.reward, outcome.feedback or Feedback.of("critique", "Ugly."))


@fault("semantic.floor_gap")
class Consolation(Echo):
    def grade(self, task, completion):
        outcome = super().grade(task, completion)
        return Outcome(max(outcome.reward, 0.1), outcome.feedback)


@fault("semantic.verifier_determinism")
class Moody(Echo):
    """The second time, the same attempt earns more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = Counter()

    def grade(self, task, completion):
        self.seen[task.id, completion] += 1
        outcome = super().grade(task, completion)
        again = self.seen[task.id, completion] > 1 and not outcome.reward
        return Outcome(0.5 if again else outcome.reward, outcome.feedback)


LONG = "the answer to all questions is forty-two"


@fault("semantic.canary_floor")
class Gullible(Echo):
    def grade(self, task, completion):
        if "passed" in completion:
            return Outcome(1.0)
        return super().grade(task, completion)


@fault("runtime.hooks_return")
class Raises(Echo):
    def grade(self, task, completion):
        if "know" in completion:
            raise KeyError("know")
        return super().grade(task, completion)


@fault("semantic.no_solution_leakage")
class InPrompt(Echo):
    def load_tasks(self, split):
        return [Task(split, f"{split}? Psst: {LONG}.", hidden=LONG)]


@fault("semantic.no_solution_leakage")
class InMetadata(Echo):
    def load_tasks(self, split):
        return [Task(split, split, {"note": LONG}, hidden=LONG)]


@fault("semantic.no_solution_leakage")
class HandsOut(Echo):
    def tasks(self, split=None):
        return self._full_tasks(split)


@fault("feedback.present_on_failure")
class Silent(Echo):
    def grade(self, task, completion):
        return Outcome(super().grade(task, completion).reward)


@fault("feedback.present_on_failure")
class OnlyHints(Echo):
    def grade(self, task, completion):
        told = Feedback.of("hint", "Hm.", severity="info", reveals="reference")
        right = super().grade(task, completion).reward
        return Outcome(right, Feedback() if right else told)


@fault("feedback.present_on_terminal")
class SilentAtTheEnd(Solved):
    async def respond(self, state, action):
        turn = await super().respond(state, action)
        return Turn(turn.messages, turn.reward, terminated=True) if state["tries"] > 1 else turn


@fault("feedback.empty_at_none")
class Loud(Echo):
    def _shown(self, feedback):
        return feedback  # whatever the level


@fault("feedback.deterministic")
class Timing(Echo):
    def grade(self, task, completion):
        outcome = super().grade(task, completion)
        told = Segment("wrong_answer", f"It took {next(count)} ms.")
        return Outcome(outcome.reward, outcome.feedback and Feedback((*outcome.feedback, told)))


@fault("feedback.no_reference_leak")
class Spoiler(Echo):
    def load_tasks(self, split):
        return [Task(split, split, hidden=LONG)]

    def grade(self, task, completion):
        return Outcome(1.0) if completion == LONG else wrong(f"Say: {LONG}.")


class Program(Echo):
    """A reference of several lines; the feedback quotes some of them."""

    quoted = 1
    code = (
        "def double(number):\n    result = number + number\n"
        "    check = abs(result) - 2 * abs(number)\n    return result * 1.0 + check"
    )

    def load_tasks(self, split):
        return [Task(split, split + ": def double(number):", hidden=self.code)]

    def grade(self, task, completion):
        lines = [line.strip() for line in self.code.splitlines()][1 : 1 + self.quoted]
        return Outcome(1.0) if completion == self.code else wrong("Try " + " and ".join(lines))


@fault("feedback.no_reference_leak")
class Quotes(Program):
    quoted = 2


@fault("feedback.template_safe")
class Unsafe(Echo):
    def grade(self, task, completion):
        outcome = super().grade(task, completion)
        for segment in outcome.feedback:
            object.__setattr__(segment, "text", segment.text + "\u202e")  # past the cleaning
        return outcome


@fault("feedback.bounded")
class Endless(Echo):
    def grade(self, task, completion):
        if len(completion) < 1000:
            return super().grade(task, completion)
        return Outcome(0.0, Feedback(Segment("lint", f"{i}: long.") for i in range(20_000)))


@fault("feedback.spans_in_range")
class Overshoot(Echo):
    def grade(self, task, completion):
        if super().grade(task, completion).reward:
            return Outcome(1.0)
        return wrong(span=(0, len(completion.encode(errors="replace")) + 1))


@pytest.mark.filterwarnings("default:old:DeprecationWarning")  # what an environment does
@pytest.mark.parametrize(("cls", "ids"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_every_fault_is_found_and_no_other(cls, ids):
    env = cls(max_turns=4) if issubclass(cls, rlrf.MultiTurnEnv) else cls()
    report = check_env(env)
    failed = {r.id: r.detail for r in report.results if r.status == "fail"}
    assert set(failed) == ids, str(report)
    assert not report.ok
    assert all(failed.values())


def test_every_check_but_two_has_a_fault():
    """Levels are :class:`Feedback`'s own doing; outages have tests of their own."""
    found = set().union(*(ids for _, ids in FAULTS))
    assert set(CHECKS) - found == {"feedback.levels_monotonic", "feedback.infra_is_unscored"}


def test_levels_that_hide_what_lower_ones_show_are_found(monkeypatch):
    plain = Feedback.at_level
    monkeypatch.setattr(
        Feedback, "at_level", lambda self, level: Feedback() if level == 5 else plain(self, level)
    )
    report = check_env(Echo())
    assert "feedback.levels_monotonic" in {r.id for r in report.failed}


def test_a_line_of_a_program_or_one_the_prompt_gave_is_no_leak():
    assert check_env(Program()).ok
    # "yes" is too short to be looked for, though Echo's feedback names it at level `expected`.
    assert check_env(Echo()).ok


def test_special_tokens_are_looked_for(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    class Careless:
        all_special_tokens = ("<|im_end|>",)

        def encode(self, text, *, add_special_tokens=True):
            return [end]

        def decode(self, ids, skip_special_tokens=False):
            return ""

        def convert_tokens_to_ids(self, tokens):
            return [end for _ in tokens]

    report = check_env(Echo(), tokenizer=Careless())
    assert [r.id for r in report.failed] == ["feedback.template_safe"]


# --- outages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("swallow", "status"), [(False, "pass"), (True, "fail")], ids=["raises", "scores zero"]
)
def test_outages(swallow, status):
    down = []

    class Judged(Echo):
        def grade(self, task, completion):
            try:
                if down:
                    raise InfraError("the judge is away")
            except InfraError:
                if not swallow:
                    raise
                return wrong()
            return super().grade(task, completion)

    @contextlib.contextmanager
    def outage():
        down.append(True)
        yield
        down.clear()

    report = check_env(Judged(), outage=outage)
    (result,) = [r for r in report.results if r.id == "feedback.infra_is_unscored"]
    assert result.status == status, str(report)
    assert report.ok == (status == "pass")
    if swallow:
        assert "scored 0.0" in result.detail
