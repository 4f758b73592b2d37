"""Two evaluations of the same tasks, compared task by task.

Tasks differ in difficulty far more than two policies do on one task; to compare the pass rates of
two evaluations as if their tasks were others wastes that. What is compared is each task with
itself: the mean of the differences, its interval, and how many tasks fare better or worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Counts = Mapping[str, tuple[int, int]]
"""Task to ``(attempts that are scored, attempts that solved it)``."""


@dataclass(frozen=True)
class Comparison:
    """What the second of two evaluations changes; only of the tasks that both scored.

    Attributes:
        n_tasks: tasks compared.
        before: mean over them of the first one's pass rates.
        after: the same of the second.
        difference: ``after - before``.
        interval: 95 % confidence interval of it; see :func:`difference_interval`.
        better: tasks whose pass rate is higher in the second.
        worse: tasks whose pass rate is lower in the second.
        p_value: exact two-sided sign test of better against worse; with one attempt at each task
            that is McNemar's exact test (1947).
    """

    n_tasks: int
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    better: int
    worse: int
    p_value: float

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, or ``unclear`` where the interval has 0 in it."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "unclear"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON data."""
        return {**asdict(self), "interval": list(self.interval), "verdict": self.verdict}


def compare(before: Counts, after: Counts) -> Comparison | None:
    """Compare two evaluations task by task; None where they have no task in common."""
    pairs = [
        (before[task], after[task])
        for task in before
        if task in after and before[task][0] and after[task][0]
    ]
    if not pairs:
        return None
    n = len(pairs)
    first = math.fsum(c / m for (m, c), _ in pairs) / n
    second = math.fsum(c / m for _, (m, c) in pairs) / n
    # Products of whole numbers: what is equal is equal, whatever the number of attempts.
    better = sum(c2 * m1 > c1 * m2 for (m1, c1), (m2, c2) in pairs)
    worse = sum(c2 * m1 < c1 * m2 for (m1, c1), (m2, c2) in pairs)
    return Comparison(
        n_tasks=n,
        before=first,
        after=second,
        difference=second - first,
        interval=difference_interval(
            [c2 / m2 - c1 / m1 for (m1, c1), (m2, c2) in pairs],
            sum(min(m1, m2) for (m1, _), (m2, _) in pairs) / n,
        ),
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
    )


def difference_interval(differences: list[float], attempts: float = 1.0) -> tuple[float, float]:
    """95 % confidence interval of a mean of paired differences of rates, over the choice of tasks.

    Bonett and Price's (2012) adjusted Wald interval with Student's quantile: the mean and spread of
    the differences and of two more, one attempt better and one worse. With one attempt at each
    task they are 1 and -1, as in the paper. Unlike the bootstrap's it has a width where no task
    changed, and it draws nothing at random.

    Args:
        differences: one for each task, each from -1 to 1; at least one.
        attempts: attempts at each task; of unlike numbers the mean.
    """
    one = 1 / max(1.0, attempts)
    n = len(differences) + 2
    mean = math.fsum(differences) / n
    square = math.fsum([*(d * d for d in differences), 2 * one * one]) / n
    half = _student(max(1, len(differences) - 1)) * math.sqrt(max(0.0, square - mean * mean) / n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion in 1 / ``freedom``."""
    z = 1.959963984540054
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def sign_test(better: int, worse: int) -> float:
    """Chance that a fair coin is at least as one-sided: ``better`` against ``worse`` throws."""
    n, least = better + worse, min(better, worse)
    if 2 * least >= n:
        return 1.0
    if n > 1000:  # whole numbers of thousands of bits; the normal one is right to a percent
        return math.erfc((n - 2 * least - 1) / math.sqrt(2 * n))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2.0**n)
