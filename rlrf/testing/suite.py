"""All checks on one environment, as a report or as tests of pytest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rlrf import progress
from rlrf.env import Env, Task
from rlrf.script import Script
from rlrf.testing.checks import CHECKS, run_all
from rlrf.testing.play import DEADLINE_S, Play
from rlrf.testing.report import CheckReport, CheckResult


def check_env(
    env: Env | str,
    *,
    tasks: int | str | Task | Sequence[str | Task] = 3,
    actions: Script | Sequence[Script] = (),
    tokenizer: Any = None,
    outage: Callable[[], AbstractContextManager[Any]] | None = None,
    deadline_s: float | None = DEADLINE_S,
    strict: bool = False,
) -> CheckReport:
    """Run the conformance suite.

    Args:
        env: an environment, or an id for :func:`rlrf.make`.
        tasks: so many tasks of every split, or the tasks (or their ids) to try.
        actions: further attempts, beside no-ops, hostile text and reference solutions: each a
            text, an assistant message, a sequence of these (one a turn) or a function of the
            messages. Wrong answers that are well formed are the most telling.
        tokenizer: when given, feedback is also tokenized and searched for special tokens.
        outage: makes a context inside which the environment's machinery (sandbox, judge,
            simulator) is out of order; the environment must then raise, never score. Without it
            ``feedback.infra_is_unscored`` is skipped.
        deadline_s: seconds that a hook may take (``load_tasks`` ten times as many); None for ever.
            One that takes longer is named, and left behind.
        strict: count warnings and skipped checks as failed.

    Returns:
        A report; :meth:`CheckReport.raise_if_failed` turns it into a test.

    Raises:
        UsageError: ``tasks`` or ``deadline_s`` is not positive, or an action is none.
        UnknownIdError: no environment, or no task, has that id.
    """
    played = Play(
        env,
        tasks=tasks,
        actions=actions,
        tokenizer=tokenizer,
        outage=outage,
        deadline_s=deadline_s,
    )
    results: list[CheckResult] = []
    with played as play, progress.phase("", len(CHECKS), "checks") as phase:
        for result in run_all(play):
            results.append(result)
            phase.advance()
    return CheckReport(play.name, tuple(results), strict)


def pytest_suite(env: Env | str, **options: Any) -> Callable[[str], None]:
    """The conformance suite as a test of pytest, with one case per check.

    In a test module: ``test_conformance = rlrf.testing.pytest_suite("my-env-v0", tasks=1)``. Checks
    that do not apply are skipped. The environment is made when the first case runs.

    Args:
        env: an environment, or an id for :func:`rlrf.make`.
        options: of :func:`check_env`; with ``strict`` warnings fail.
    """
    import pytest

    @functools.cache
    def report() -> CheckReport:
        return check_env(env, **options)

    @pytest.mark.parametrize("check", CHECKS)
    def test(check: str) -> None:
        (result,) = (r for r in report().results if r.id == check)
        if result.status == "skip":
            pytest.skip(result.detail)
        assert result not in report().failed, result.detail

    return test
