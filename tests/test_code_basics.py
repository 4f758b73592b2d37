"""code-basics-v0: its tasks are sound, and its feedback says what is wrong and where."""

from __future__ import annotations

import ast
import json
import shutil

import pytest

import rlrf
from rlrf import Segment
from rlrf.sandbox import Limits
from rlrf_environments.code.extract import Attempt, extract
from rlrf_environments.code.grading import Style, grade_completion

if not shutil.which("bwrap"):
    pytest.skip("bubblewrap is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def env():
    made = rlrf.make("code-basics-v0", feedback="reference")
    yield made
    made.close()


def block(code: str) -> str:
    return f"Here you are.\n\n```python\n{code}\n```\n"


def every_task():
    env = rlrf.make("code-basics-v0")
    return [t for split in env.splits for t in env._full_tasks(split)]


TASKS = every_task()


def test_there_are_enough_tasks_and_all_are_well_formed():
    assert len(TASKS) >= 60
    assert sum(t.hidden.entry is None for t in TASKS) >= 20
    for task in TASKS:
        tests = task.hidden.tests()
        assert sum(t.public for t in tests) >= 2, task.id
        assert sum(not t.public for t in tests) >= 4, task.id
        assert len({json.dumps(t.case.expected) for t in tests}) > 1, task.id
        ast.parse(task.hidden.solution)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.id)
def test_the_reference_passes_and_doing_nothing_fails(env, task):
    entry = task.hidden.entry
    solved = env.grade(task.id, env.reference_solution(task))
    assert solved.reward == 1.0
    assert not solved.feedback
    assert solved.metrics["tests_passed"] == 1.0
    nothing = "pass" if entry is None else f"def {entry}(*args):\n    return None"
    failed = env.grade(task.id, block(nothing))
    assert failed.reward == 0.0
    assert failed.feedback.kinds[0] == "wrong_answer"


def explained(outcome):
    return outcome.feedback.at_level("explained")


def blamed(completion, segment):
    return completion[slice(*segment.span)]


def test_a_wrong_answer_on_a_public_test_shows_it(env):
    completion = block("def fold_digits(n):\n    return n")
    (why,) = explained(env.grade("fold-digits", completion))
    assert why.kind == "wrong_answer"
    assert "Input:\n942\nReturned:\n942\nExpected:\n6" in why.text


def test_a_wrong_answer_on_a_hidden_test_shows_only_what_the_level_allows(env):
    completion = block("def fold_digits(n):\n    return 6 if n == 942 else 7")
    outcome = env.grade("fold-digits", completion)
    (why,) = explained(outcome)
    assert why.text == "The answer is wrong on a hidden test."
    shown = outcome.feedback.at_level("expected").text
    assert "Input:\n0\nReturned:\n7\nExpected:\n0" in shown
    assert "while n > 9" not in shown
    assert "while n > 9" in outcome.feedback.at_level("reference").text


def test_stdin_programs_show_input_output_and_the_first_difference(env):
    completion = block("for i in range(int(input())):\n    print('#')")
    (why,) = explained(env.grade("stairs", completion))
    assert "Input:\n3\nOutput:\n#\n#\n#\nExpected:\n#\n #\n  #" in why.text
    assert "The first difference is in line 2 of the output." in why.text
    assert why.kind == "wrong_answer"
    completion = block("print(input())")
    (why,) = explained(env.grade("multiplication-row", completion))
    assert "The first difference is in line 1 of the output." in why.text


def test_a_runtime_error_is_located_and_its_line_blamed_but_not_quoted(env):
    completion = block("def fold_digits(n):\n    m = n\n    return helper(m) // 0")
    why, where = explained(env.grade("fold-digits", completion))
    assert why.kind == where.kind == "runtime_error"
    assert "NameError: name 'helper' is not defined" in why.text
    assert where.text == "Line 3 in fold_digits of the program."
    assert where.reveals == "location"
    assert blamed(completion, why) == "return helper(m) // 0"
    assert "helper(m)" not in why.text
    assert why.untrusted


def test_a_compile_error_has_line_and_column(env):
    completion = block("def fold_digits(n):\n    if n\n        return n")
    why, where = explained(env.grade("fold-digits", completion))
    assert why.kind == "compile_error"
    assert why.text == "The program does not compile: SyntaxError: expected ':'."
    assert where.text == "Line 2 of the program, column 9."
    assert blamed(completion, why) == "if n"
    assert env.grade("fold-digits", completion).metrics["compiles"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("    while True:\n        pass", "time_limit", "time limit of 2 s"),
        ("    return bytearray(10**10)", "memory_limit", "memory limit of 256 MB"),
        ("    while True:\n        print('x' * 9999)", "output_limit", "more than 64 kB"),
    ],
)
def test_limits_are_named_with_their_value(env, body, kind, words):
    outcome = env.grade("fold-digits", block("def fold_digits(n):\n" + body))
    first = outcome.feedback[0]
    assert (outcome.reward, first.kind) == (0.0, kind)
    assert words in first.text


@pytest.mark.parametrize(
    ("completion", "kind", "words"),
    [
        ("I do not know.", "format_error", "no code block"),
        ("", "format_error", "no code block"),
        ("```python\ndef fold_digits(n):\n    ret", "truncated_attempt", "never closed"),
        (block("def fold_digit(n):\n    return n"), "format_error", "function 'fold_digit'"),
        (block("x = 1"), "format_error", "does not define the function 'fold_digits'."),
    ],
)
def test_format_faults(env, completion, kind, words):
    outcome = env.grade("fold-digits", completion)
    assert outcome.reward == 0.0
    assert outcome.feedback[0].kind == kind
    assert words in outcome.feedback[0].text
    for segment in outcome.feedback:
        assert segment.span is None or segment.span[1] <= len(completion)


def test_the_longest_block_is_the_program():
    text = "```python\nx = 1\n```\nor better\n```python\nx = 1\ny = 2\n```\n"
    attempt = extract(text)
    assert isinstance(attempt, Attempt)
    assert attempt.code == "x = 1\ny = 2\n"
    assert text[slice(*attempt.line_span(2))] == "y = 2"
    assert attempt.line_span(9) is None
    assert isinstance(extract("~~~\nx\n"), Segment)


def test_feedback_is_the_same_every_time(env):
    completion = block("def fold_digits(n):\n    raise ValueError(object(), {'a', 'b', 'c'})")
    first, second = (env.grade("fold-digits", completion) for _ in range(2))
    assert first.feedback.to_dicts() == second.feedback.to_dicts()


def test_public_tests_alone(env):
    only = rlrf.make("code-basics-v0", tests="public")
    completion = block("def fold_digits(n):\n    return 6 if n == 942 else n")
    assert only.grade("fold-digits", completion).reward == 1.0
    assert env.grade("fold-digits", completion).reward == 0.0
    only.close()
    with pytest.raises(rlrf.UsageError, match="'all' or 'public'"):
        rlrf.make("code-basics-v0", tests="hidden")


def test_hidden_tests_and_solutions_are_nowhere_in_the_open(env):
    for task in env.tasks():
        assert task.hidden is None
        assert "def " not in task.messages[0]["content"]


def test_a_broken_sandbox_is_no_reward():
    class Broken:
        def run_sync(self, *args, **kwargs):
            raise rlrf.InfraError("no slot", kind="sandbox_died")

    completion = block("def fold_digits(n):\n    return n")
    with pytest.raises(rlrf.InfraError):
        grade_completion(completion, TASKS[0].hidden, Broken, Style(Limits()))


def test_rollouts_from_an_async_caller_share_the_pool(env):
    import asyncio

    task = TASKS[0]
    answer = env.reference_solution(task)
    policy = rlrf.ScriptedPolicy(lambda messages: answer)
    rollouts = asyncio.run(rlrf.arollout(env, policy, [task.id], group_size=4))
    assert [r.reward for r in rollouts] == [1.0] * 4


@pytest.mark.slow
def test_waiting_for_a_slot_is_not_charged_to_the_deadline():
    """Slow attempts must not use up the deadline of those queued behind them."""
    env = rlrf.make("code-basics-v0", slots=1, limits=Limits(cpu_s=1, wall_s=3, memory_mb=256))
    loops = block("def fold_digits(n):\n    while True:\n        pass")
    policy = rlrf.ScriptedPolicy(lambda messages: loops)
    rollouts = rlrf.rollout(env, policy, ["fold-digits"], group_size=4, deadline_s=3.5)
    env.close()
    assert [r.reward for r in rollouts] == [0.0] * 4
    assert {r.feedback[-1].kinds[0] for r in rollouts} == {"time_limit"}


def test_fences_are_found_in_one_pass():
    text = ("~" * 50 + "a\n") * 20_000
    assert isinstance(extract(text), (Attempt, Segment))
    nested = "````python\nx = 1\n```\ny = 2\n````\n"
    assert extract(nested).code == "x = 1\n```\ny = 2\n"


def test_a_function_may_be_defined_inside_a_statement(env):
    solution = "if True:\n    def fold_digits(n):\n        return 1 + (n - 1) % 9 if n else 0"
    assert env.grade("fold-digits", block(solution)).reward == 1.0
