"""Long work is told of: before it starts, and at least every ten seconds."""

from __future__ import annotations

import io
import itertools
import re
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

import rlrf
from rlrf import Completion, Outcome, Prompt, SamplingParams, ScriptedPolicy, SingleTurnEnv, Task
from rlrf import progress as under_way
from rlrf.console import SILENCE_S, Display, RolloutProgress, TrainProgress
from rlrf.progress import duration


class Clock:
    """Seconds that pass when they are told to; a display is asked each second, as its thread is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.displays: list[Display] = []

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1
            for display in self.displays:
                display.tick()


class Lines(io.StringIO):
    """Lines, and when each was written."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.times, self.text = clock, [0.0], ""

    def write(self, text: str) -> int:
        if text.strip():
            self.times.append(self.clock.now)
        self.text += text
        return len(text)

    def longest_silence(self) -> float:
        times = [*self.times, self.clock.now]
        return max(b - a for a, b in itertools.pairwise(times))


class Slow(SingleTurnEnv):
    def load_tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{i}", f"Say {i}.") for i in range(40)]

    def grade(self, task: Task, completion: str) -> Outcome:
        return Outcome(1.0)


class SlowPolicy(ScriptedPolicy):
    """Takes 137 seconds for a batch, token by token."""

    clock: Clock

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        with under_way.phase("", 137 * len(prompts), "tokens", at_most=True) as phase:
            for _ in range(137):
                self.clock.passes(1)
                phase.advance(len(prompts))
        return super().generate(prompts, params)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(Display, "_pulse", lambda self: None)  # the clock asks in its place
    return Clock()


def test_a_long_evaluation_is_never_silent_for_ten_seconds(clock: Clock) -> None:
    lines = Lines(clock)
    policy = SlowPolicy(lambda messages: "x", max_batch_size=8)
    policy.clock = clock
    with RolloutProgress(console=Console(file=lines), clock=clock) as display:
        clock.displays.append(display)
        with under_way.phase("loading the policy 'slow'"):
            clock.passes(25)
        display.begin(40)
        rlrf.evaluate(Slow(), policy, on_rollout=display, limit=40)
    assert clock.now == 25 + 5 * 137
    assert lines.longest_silence() <= SILENCE_S
    told = lines.text.splitlines()
    assert told[0] == "[0:01] loading the policy 'slow'"  # from the first second
    assert any(
        re.fullmatch(r"\[\S+\] 0 of 40 rollouts, \d+ of at most 1,096 tokens", t) for t in told
    )
    assert any(re.search(r" \d+ of 40 rollouts.*; about \d+ min left", t) for t in told)
    assert "40/40 rollouts  100.0% solved" in told


def test_a_training_run_says_what_is_left(clock: Clock) -> None:
    lines = Lines(clock)
    with TrainProgress(4, console=Console(file=lines), clock=clock) as display:
        clock.displays.append(display)
        for step in range(5):
            with under_way.phase(f"step {step} of 4"), under_way.phase("learning"):
                clock.passes(60)
            display({"step": step, "loss": 1.0})
    assert lines.longest_silence() <= SILENCE_S
    assert "step 1 of 4, learning" in lines.text
    assert "about 2 min left" in lines.text
    assert "step 4/4  loss 1\n" in lines.text
    before, after = lines.text.split("step 0/4")
    assert "left" not in before  # not known yet
    assert "left" in after


def test_what_is_left_of_a_run_is_its_steps_and_its_evaluations(clock: Clock) -> None:
    """A first step that warms up, evaluations that are as long as steps, and one at the end."""
    pace, held, due = [90, 20, 20, 20, 20, 20], 50, {0, 3, 6}
    with TrainProgress(6, console=Console(file=io.StringIO()), clock=clock) as display:
        display.evaluations_after = lambda step: len([s for s in due if s > step])
        told = []
        for step, seconds in enumerate([0, *pace]):
            evaluated = held * (step in due)
            clock.passes(seconds + evaluated)
            display(
                {"step": step, "time/step": seconds + evaluated, "time/eval": evaluated or None}
            )
            told.append(display.remaining())
            clock.passes(1)  # it is counted down meanwhile
            assert told[-1] is None or display.remaining() == max(0, told[-1] - 1)
    assert told[0] is None
    assert told[1] == 5 * 90 + 2 * 50  # all that is known
    assert told[2:] == [4 * 20 + 2 * 50, 3 * 20 + 50, 2 * 20 + 50, 20 + 50, 0]


def test_a_line_of_its_own_puts_the_next_off(clock: Clock) -> None:
    lines = Lines(clock)
    with Display(console=Console(file=lines), clock=clock) as display:
        clock.displays.append(display)
        for _ in range(20):
            clock.passes(3)
            under_way.say("news")
    assert lines.text.count("news") == 20
    assert lines.text.count("working") == 1  # of the first second
    under_way.say("nobody listens")
    assert "nobody" not in lines.text


def test_the_thread_of_a_display_asks_by_itself() -> None:
    asked = threading.Event()

    class Asked(Display):
        def tick(self) -> None:
            asked.set()

    with Asked(console=Console(file=io.StringIO())):
        assert asked.wait(60)


def test_a_terminal_shows_what_is_under_way() -> None:
    console = Console(force_terminal=True, width=120, height=40, file=io.StringIO(), record=True)
    with Display(console=console) as display, under_way.phase("sampling", 30, "tokens") as phase:
        phase.advance(12)
        console.print(display._view())
    assert "sampling: 12 of 30 tokens" in console.export_text()


def test_what_a_display_cannot_format_does_not_stop_it(capsys: pytest.CaptureFixture[str]) -> None:
    odd: Any = {"step": 1, "reward": "good", "loss": [1, 2], "entropy": 10**400}
    with TrainProgress(None, console=Console()) as display:
        display(odd)
    assert "reward good" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        *((0.2, "1 s"), (19, "19 s"), (44, "40 s"), (89, "90 s"), (95, "2 min")),
        *((3000, "50 min"), (5400, "1 h 30 min"), (7170, "2 h"), (40000, "11 h")),
    ],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_run_says_first_what_it_does_and_how_long_it_takes(tmp_path, monkeypatch) -> None:
    pytest.importorskip("torch")
    from rlrf_trainers.algorithms.sdpo import SDPOTrainer
    from rlrf_trainers.core import estimate
    from tests.resume_driver import CountA
    from tests.tiny_model import save_tiny

    config = SDPOTrainer.config_class(
        max_steps=3, prompts_per_step=2, num_generations=2, max_completion_length=3,
        eval_steps=2, eval_tasks=2, probe_tasks=0,
    )  # fmt: skip
    said: list[str] = []
    lines: list[Any] = []
    model = str(save_tiny(tmp_path / "tiny"))

    def run(name: str) -> Any:
        return SDPOTrainer(
            model, CountA(), config, run_dir=tmp_path / name, on_step=lines.append
        ).train()

    with under_way.listening(lambda text: said.append(f"{len(lines)} {text}")):
        heard = run("a")
    assert said[0] == (
        "0 sdpo on CountA: 3 steps of 2 tasks x 2 attempts of at most 3 tokens; 3 evaluations on "
        "2 held-out tasks"
    )
    assert re.fullmatch(
        r"0 about \d+ \S+ on this machine, by a warm-up of 1 s: 1 s a step, 1 s an evaluation, "
        r"grading apart",
        said[1],
    )
    # Nobody listens: nothing is timed, and what is learnt does not depend on it.
    monkeypatch.setattr(estimate, "_timed", None)
    for one, other in zip(heard.history, run("b").history, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith("time/")} == {
            k: v for k, v in other.items() if not k.startswith("time/")
        }
    # What cannot be timed is said, and stops nothing.
    with under_way.listening(said.append):
        run("c")
    assert "cannot be said" in said[-1]
