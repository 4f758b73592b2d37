"""What an evaluation says of an environment: can this policy learn from it?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rlrf._files import open_text, parse_json
from rlrf.errors import UsageError
from rlrf.evaluate import EvalReport
from rlrf.rollout import Rollout
from rlrf.testing.play import Doubt, Skip
from rlrf.testing.report import CheckResult

_LEAST_SIGNAL = 0.1
_SOLVED = 0.95


def check_eval(evaluation: EvalReport | Path | str) -> tuple[CheckResult, ...]:
    """The statistical checks, on an evaluation of a policy.

    Each warns where the environment has little to teach that policy: it need not be a fault of the
    environment, another policy or other tasks may do.

    ``statistical.reward_reachability``: something is solved. ``statistical.headroom``: not nearly
    everything is. ``statistical.training_signal``: attempts at one task earn different rewards, of
    which an advantage is made; it needs several samples per task.

    Args:
        evaluation: a report of :func:`rlrf.evaluate`, or a file of ``rlrf eval``.

    Raises:
        UsageError: the file is none.
    """
    if not isinstance(evaluation, EvalReport):
        evaluation = read_eval(evaluation)
    return tuple(_run(id, check, evaluation) for id, check in _CHECKS)


def read_eval(path: Path | str, env: str | None = None) -> EvalReport:
    """The evaluation in a file of ``rlrf eval``.

    Args:
        path: the file.
        env: the environment that it must be of.

    Raises:
        UsageError: it cannot be read, is no evaluation, or is one of another environment.
    """
    try:
        with open_text(Path(path)) as file:
            data = parse_json(file.read())
        rollouts = [Rollout.from_dict(r) for r in data["rollouts"]]
    except OSError as error:
        raise UsageError(f"cannot read the evaluation {str(path)!r}: {error.strerror}") from None
    except UsageError:
        raise
    except Exception as error:  # whatever a file may hold
        raise UsageError(
            f"{str(path)!r} is no evaluation ({error!r:.200}); give a file that `rlrf eval` wrote"
        ) from None
    if env is not None and data.get("env") != env:
        raise UsageError(f"{str(path)!r} is an evaluation of {data.get('env')!r}, not of {env!r}")
    return EvalReport.of(rollouts)


def _run(id: str, check: Callable[[EvalReport, dict[str, Any]], None], report: Any) -> CheckResult:
    begun, measured = time.monotonic(), dict[str, Any]()
    status: Any = "pass"
    detail = ""
    try:
        if report.pass_rate is None:
            raise Skip("nothing was scored")
        check(report, measured)
    except Skip as why:
        status, detail = "skip", str(why)
    except Doubt as why:
        status, detail = "warn", str(why)
    return CheckResult(id, status, detail, measured, time.monotonic() - begun)


def _reachable(report: EvalReport, measured: dict[str, Any]) -> None:
    solved = sum(r.solved for r in report.rollouts if r.scored)
    measured |= {"solved": solved, "attempts": report.n_rollouts - report.n_unscored}
    if not solved:
        raise Doubt(
            f"none of {measured['attempts']} attempts solved its task: rewards teach nothing, only "
            "feedback may; try easier tasks, more samples, or a stronger policy"
        )


def _headroom(report: EvalReport, measured: dict[str, Any]) -> None:
    assert report.pass_rate is not None
    assert report.pass_rate_ci is not None
    measured |= {"pass_rate": report.pass_rate, "pass_rate_ci": list(report.pass_rate_ci)}
    if report.pass_rate >= _SOLVED:
        low, high = report.pass_rate_ci
        raise Doubt(
            f"the policy solves {report.pass_rate:.0%} (95 % CI {low:.0%} to {high:.0%}): there "
            "is little left to learn; take harder tasks"
        )


def _signal(report: EvalReport, measured: dict[str, Any]) -> None:
    groups = [g for g in _groups(report.rollouts) if len(g) > 1]
    if not groups:
        raise Skip("one sample per task; rlrf eval --samples 8 tells")
    mixed = sum(len(set(g)) > 1 for g in groups)
    measured |= {"tasks": len(groups), "with_different_rewards": mixed}
    if mixed < _LEAST_SIGNAL * len(groups):
        raise Doubt(
            f"in {mixed} of {len(groups)} tasks do the attempts earn different rewards: the others "
            "give no advantage (GRPO), and no solution to learn from beside a failure"
        )


def _groups(rollouts: Iterable[Rollout]) -> Iterable[list[float]]:
    found: dict[str, list[float]] = {}
    for r in rollouts:
        if r.reward is not None:
            found.setdefault(r.group_id, []).append(r.reward)
    return found.values()


_CHECKS: tuple[tuple[str, Callable[[EvalReport, dict[str, Any]], None]], ...] = (
    ("statistical.reward_reachability", _reachable),
    ("statistical.headroom", _headroom),
    ("statistical.training_signal", _signal),
)
