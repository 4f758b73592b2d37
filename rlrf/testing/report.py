"""What the checks found, in the vocabulary of OpenEnv's validation reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        id: the name of the check, ``family.name``.
        status: ``pass``, ``warn`` (most likely wrong, and not for sure), ``fail`` or ``skip``.
        detail: what is wrong and where, or why the check was skipped.
        measured: the numbers behind it, if there are any.
        duration_s: seconds it took.
    """

    id: str
    status: Status
    detail: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)
    duration_s: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as OpenEnv writes one, with its severity beside it."""
        # There a check passes or fails, and a policy says how bad that is.
        return {
            "check_id": self.id,
            "status": "fail" if self.status == "warn" else self.status,
            "severity": "warn" if self.status == "warn" else "fail",
            "measured": dict(self.measured),
            "evidence": self.detail.splitlines(),
            "duration_s": self.duration_s,
        }


@dataclass(frozen=True)
class CheckReport:
    """The outcome of all checks on one environment.

    Attributes:
        env: the environment's id, or its ``repr``.
        results: one per check, in the order they ran.
        strict: whether warnings and skipped checks count as failed.
    """

    env: str
    results: tuple[CheckResult, ...]
    strict: bool = False

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """The checks that failed; with ``strict`` also those that warn and those skipped."""
        bad = ("fail", "warn", "skip") if self.strict else ("fail",)
        return tuple(r for r in self.results if r.status in bad)

    @property
    def warnings(self) -> tuple[CheckResult, ...]:
        """The checks that warn."""
        return tuple(r for r in self.results if r.status == "warn")

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def verdict(self) -> Literal["pass", "warn", "fail"]:
        """OpenEnv's word for it all."""
        return "fail" if self.failed else "warn" if self.warnings else "pass"

    def raise_if_failed(self) -> None:
        """Raise if a check failed.

        Raises:
            AssertionError: names every failed check and why.
        """
        if self.failed:
            lines = "\n".join(f"  {r.id} ({r.status}): {r.detail}" for r in self.failed)
            raise AssertionError(f"{self.env} fails {len(self.failed)} checks:\n{lines}")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data: OpenEnv's ``target``, ``verdict`` and ``results``."""
        return {
            "target": self.env,
            "verdict": self.verdict,
            "results": [r.to_dict() for r in self.results],
        }

    def __str__(self) -> str:
        lines = [f"{r.status:<5} {r.id:<34} {r.detail}".rstrip() for r in self.results]
        return "\n".join([self.env, *lines])
