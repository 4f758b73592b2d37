"""The conformance suite: what an environment promises, as checks you run in your own CI.

::

    import rlrf.testing

    def test_my_environment():
        rlrf.testing.check_env("my-env-v0").raise_if_failed()

or ``rlrf check my-env-v0`` on the command line. Every check has a name and is a function of its
own, :func:`check_oracle_max` for one; one that does not apply (an environment without a reference
solution, say) is skipped with the reason. Where OpenEnv has the check, its name in the families
``runtime``, ``semantic`` and ``statistical`` is OpenEnv's.

How each check tries an environment: on a few tasks of every split it plays whole episodes, each
with one action that it repeats until the episode ends (a one-shot environment ends at once). The
actions are :data:`NO_OPS`, :data:`HOSTILE`, the reference solution, another task's, and those you
add. What they lead to is looked at *before* the feedback level masks it, so one run covers every
level.
"""

from rlrf.testing.checks import (
    ALL,
    CHECKS,
    MAX_FEEDBACK_CHARS,
    Check,
    check_bounded,
    check_canary_floor,
    check_empty_at_none,
    check_episode_determinism,
    check_episode_isolation,
    check_feedback_determinism,
    check_floor_gap,
    check_gymnasium,
    check_hooks_return,
    check_infra_is_unscored,
    check_levels,
    check_no_reference_leak,
    check_no_solution_leakage,
    check_oracle_max,
    check_present_on_failure,
    check_present_on_terminal,
    check_rewards,
    check_seed_control,
    check_spans,
    check_split_disjoint,
    check_template_safe,
    check_unique_ids,
    check_verifier_determinism,
)
from rlrf.testing.play import CANARIES, DEADLINE_S, HOSTILE, NO_OPS
from rlrf.testing.report import CheckReport, CheckResult, Status
from rlrf.testing.statistics import check_eval
from rlrf.testing.suite import check_env, pytest_suite

__all__ = [
    "ALL",
    "CANARIES",
    "CHECKS",
    "DEADLINE_S",
    "HOSTILE",
    "MAX_FEEDBACK_CHARS",
    "NO_OPS",
    "Check",
    "CheckReport",
    "CheckResult",
    "Status",
    "check_bounded",
    "check_canary_floor",
    "check_empty_at_none",
    "check_env",
    "check_episode_determinism",
    "check_episode_isolation",
    "check_eval",
    "check_feedback_determinism",
    "check_floor_gap",
    "check_gymnasium",
    "check_hooks_return",
    "check_infra_is_unscored",
    "check_levels",
    "check_no_reference_leak",
    "check_no_solution_leakage",
    "check_oracle_max",
    "check_present_on_failure",
    "check_present_on_terminal",
    "check_rewards",
    "check_seed_control",
    "check_spans",
    "check_split_disjoint",
    "check_template_safe",
    "check_unique_ids",
    "check_verifier_determinism",
    "pytest_suite",
]
