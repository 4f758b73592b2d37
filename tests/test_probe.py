from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import rlrf
from rlrf import (
    Completion,
    Feedback,
    InfraError,
    Messages,
    MultiTurnEnv,
    Outcome,
    Prompt,
    SamplingParams,
    ScriptedPolicy,
    Segment,
    SingleTurnEnv,
    Task,
    Turn,
    UsageError,
    cli,
)
from rlrf.probe import ARMS, BINARY, ProbeReport, probe

ASKED = "Correctly solve the original question."


class Rule(SingleTurnEnv):
    """Say the number, in brackets; the rule is told by the feedback alone."""

    n = 24
    told = "Put it in brackets."

    def load_tasks(self, split: str) -> list[Task]:
        return [Task(f"t{i}", f"Say {i}.", hidden=f"[{i}]") for i in range(self.n)]

    def grade(self, task: Task, completion: str) -> Outcome:
        if completion == task.hidden:
            return Outcome(1.0)
        return Outcome(0.0, Feedback.of("format_error", self.told) if self.told else Feedback())

    def reference_solution(self, task: Task) -> str | None:
        return str(task.hidden)


def number(messages: Messages) -> str:
    return str(messages[0]["content"])[4:-1]


def obedient(messages: Messages) -> str:
    """Follows a rule it is told, copies a solution it is shown, solves every sixth by itself."""
    n = number(messages)
    last = str(messages[-1]["content"])
    right = "brackets" in last or "Correct solution" in last or int(n) % 6 == 0
    return f"[{n}]" if right else n


def rates(report: ProbeReport) -> dict[str, float | None]:
    return {arm.shown: arm.pass_rate for arm in report.arms}


def test_the_arms_are_told_apart() -> None:
    report = probe(Rule(), ScriptedPolicy(obedient), samples=2)
    assert (report.n_tasks, report.n_solved, report.n_failed) == (24, 4, 20)
    assert rates(report) == {"nothing": 0.0, "binary": 0.0, "feedback": 1.0, "reference": 1.0}
    assert [arm.shown for arm in report.arms] == list(ARMS)
    feedback = report.arms[2]
    assert (feedback.n_tasks, feedback.n_attempts, feedback.n_unscored) == (20, 40, 0)
    assert feedback.over_nothing is not None
    assert feedback.over_nothing.verdict == "better"
    assert feedback.over_binary is not None
    assert report.arms[0].over_nothing is report.arms[1].over_binary is None
    assert report.advice.startswith(
        "The feedback helps: a second attempt shown it passes 100 points"
    )
    assert not report.warnings
    assert str(report) == report.advice
    assert report.to_dict()["arms"][2]["over_nothing"]["verdict"] == "better"


def test_what_a_second_attempt_is_shown() -> None:
    seen: list[Messages] = []

    def reply(messages: Messages) -> str:
        seen.append(messages)
        return number(messages)

    class One(Rule):
        n = 1

    probe(One(), ScriptedPolicy(reply), samples=1)
    first, nothing, binary, feedback, reference = seen
    assert nothing == first
    for shown, told in ((binary, BINARY), (feedback, "Put it in brackets.")):
        assert [m["role"] for m in shown] == ["user", "assistant", "user"]
        assert shown[:2] == (*first, rlrf.assistant("0"))
        assert shown[2]["content"] == (
            "The following is feedback from your unsuccessful earlier attempt:\n\n"
            f"{told}\n\n{ASKED}"
        )
    assert reference[2]["content"] == f"Correct solution:\n\n[0]\n\n{ASKED}"


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({}, "nor that the reference does"),
        ({"Correct solution"}, "say more in the feedback"),
        ({BINARY, "brackets"}, "that the words add to a mere 'wrong' does not show"),
    ],
)
def test_the_advice_names_what_was_found(says: set[str], expected: str) -> None:
    def reply(messages: Messages) -> str:
        n = number(messages)
        return f"[{n}]" if any(s in str(messages[-1]["content"]) for s in says) else n

    assert expected in probe(Rule(), ScriptedPolicy(reply), samples=1).advice


def test_feedback_that_hurts() -> None:
    again: dict[str, int] = {}

    def reply(messages: Messages) -> str:
        n = number(messages)
        again[n] = again.get(n, 0) + 1
        return f"[{n}]" if len(messages) == 1 and again[n] > 1 else n  # luckier the second time

    report = probe(Rule(), ScriptedPolicy(reply), samples=1)
    assert report.advice.startswith(
        "The feedback hurts: a second attempt shown it passes 100 points less"
    )


def test_too_few_tasks_are_said_to_be_too_few() -> None:
    report = probe(Rule(), ScriptedPolicy(obedient), limit=10)
    assert report.n_tasks == 10
    assert any("too few to tell" in w for w in report.warnings)

    def lucky(messages: Messages) -> str:  # now and then, whatever it is shown
        n = number(messages)
        return f"[{n}]" if len(messages) > 1 and int(n) % 10 == 0 else n

    assert any(
        "cannot rule out" in w for w in probe(Rule(), ScriptedPolicy(lucky), samples=1).warnings
    )


def test_tasks_are_drawn_at_random_and_once() -> None:
    seen: list[str] = []

    def reply(messages: Messages) -> str:
        seen.append(number(messages))
        return f"[{number(messages)}]"

    report = probe(Rule(), ScriptedPolicy(reply), limit=5, seed=1)
    assert len(set(seen)) == len(seen) == 5
    assert seen != ["0", "1", "2", "3", "4"]
    assert not report.arms
    assert report.advice == "All 5 scored tasks were solved at once: take harder ones."
    assert probe(Rule(), ScriptedPolicy(reply), tasks=["t3", "t3"]).n_tasks == 1


def test_failures_without_feedback_and_of_the_machinery_are_left_out_and_told() -> None:
    class Silent(Rule):
        told = ""

    report = probe(Silent(), ScriptedPolicy(number), samples=1)
    assert (report.n_silent, report.n_failed, report.arms) == (24, 0, ())
    assert "None of the 24 failed attempts got any feedback" in report.advice

    class Broken(Rule):
        def grade(self, task: Task, completion: str) -> Outcome:
            if task.hidden == "[3]" or (task.hidden == "[4]" and completion == "[4]"):
                raise InfraError("gone", kind="sandbox_died", retryable=False)
            return super().grade(task, completion)

    report = probe(Broken(), ScriptedPolicy(obedient), samples=1)
    assert (report.n_unscored, report.n_failed) == (1, 19)
    assert [arm.n_unscored for arm in report.arms] == [0, 0, 1, 1]
    assert report.arms[2].n_tasks == 18
    assert any("first attempt is unscored" in w for w in report.warnings)
    assert any("2 second attempts" in w and "sandbox_died" in w for w in report.warnings)

    class Gone(Rule):
        def grade(self, task: Task, completion: str) -> Outcome:
            raise InfraError("gone", kind="sandbox_died", retryable=False)

    assert "No attempt could be scored" in probe(Gone(), ScriptedPolicy(number), samples=1).advice


def test_a_missing_reference_and_a_mere_wrong_are_told() -> None:
    class Bare(Rule):
        def reference_solution(self, task: Task) -> str | None:
            return None

    report = probe(Bare(feedback="binary"), ScriptedPolicy(number), samples=1)
    assert [arm.shown for arm in report.arms] == ["nothing", "binary", "feedback"]
    assert any("no reference solution" in w for w in report.warnings)
    assert any("no more than 'wrong'" in w for w in report.warnings)
    assert report.advice.startswith("That the feedback helps does not show: ")


class Twice(MultiTurnEnv):
    """Two turns; the second reply must be the word of the task."""

    tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)

    def load_tasks(self, split: str) -> list[Task]:
        return [Task("a", "Look, then say it.", hidden="yes")]

    def start(self, task: Task) -> dict[str, Any]:
        return {"word": task.hidden, "turn": 0}

    def respond(self, state: dict[str, Any], action: rlrf.Message) -> Turn:
        state["turn"] += 1
        if state["turn"] == 1:
            return Turn(
                (rlrf.user("go on"),), feedback=Feedback.of("hint", "Well?", severity="info")
            )
        right = action["content"] == state["word"]
        return Turn(
            (rlrf.user("bye"),),
            float(right),
            Feedback() if right else Feedback([Segment("wrong_answer", "Say yes.")]),
            terminated=True,
        )


def test_episodes_of_several_turns() -> None:
    seen: list[Messages] = []

    def reply(messages: Messages) -> Any:
        seen.append(messages)
        if messages[-1]["content"] == "go on":
            return "yes" if any("Say yes." in str(m["content"]) for m in messages) else "no"
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    report = probe(Twice(), ScriptedPolicy(reply), samples=1)
    assert rates(report) == {"nothing": 0.0, "binary": 0.0, "feedback": 1.0}
    (shown,) = (m for m in seen if len(m) == 3 and "Say yes." in str(m[2]["content"]))
    assert shown[1]["content"] == "assistant: look({})\n\nuser: go on\n\nassistant: no"
    assert "Well?" in str(shown[2]["content"])


def test_an_async_policy_with_nothing_but_generate() -> None:
    class Mine:
        async def generate(
            self, prompts: Sequence[Prompt], params: SamplingParams
        ) -> list[Completion]:
            return ScriptedPolicy(obedient).generate(prompts, params)

    assert rates(probe(Rule(), Mine(), samples=1))["feedback"] == 1.0  # type: ignore[arg-type]  # no score()


def test_wrong_use_is_told() -> None:
    for wrong in ({"samples": 0}, {"limit": 0}):
        with pytest.raises(UsageError):
            probe(Rule(), ScriptedPolicy(number), **wrong)  # type: ignore[arg-type]  # on purpose


rlrf.register("probe-rule-v0", Rule)
rlrf.policies.register("probe-obedient", lambda model: ScriptedPolicy(obedient))


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "probe.json"
    given = ("probe", "probe-rule-v0", "--policy", "probe-obedient", "--model", "m")
    assert cli._run([*given, "--limit", "12", "--samples", "1", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "12 tasks: " in said.out
    assert "The feedback helps" in said.out
    assert "+100 [" in said.out
    assert "too few to tell" in said.err
    data = json.loads(out.read_text())
    assert data["model"] == "m"
    assert [arm["shown"] for arm in data["arms"]] == list(ARMS)
    assert cli._run(["probe", "probe-rule-v0", "--limit", "0"]) == 2
