from __future__ import annotations

import math
import random

import pytest

from rlrf.paired import compare, difference_interval, sign_test


def test_tasks_are_compared_with_themselves() -> None:
    before = {"a": (2, 0), "b": (2, 1), "c": (2, 2), "only": (2, 2), "unscored": (0, 0)}
    after = {"a": (4, 2), "b": (4, 2), "c": (4, 1), "unscored": (4, 4)}
    found = compare(before, after)
    assert found is not None
    assert (found.n_tasks, found.better, found.worse) == (3, 1, 1)
    assert found.before == pytest.approx(0.5)
    assert found.after == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert found.difference == pytest.approx(found.after - found.before)
    assert found.interval[0] < found.difference < found.interval[1]
    assert found.verdict == "unclear"
    assert found.to_dict()["interval"] == list(found.interval)
    assert compare(before, {"z": (1, 1)}) is None


def test_mcnemars_exact_test() -> None:
    # Fay 2010, exact McNemar: 10 against 2 discordant pairs
    assert sign_test(10, 2) == pytest.approx(2 * sum(math.comb(12, i) for i in range(3)) / 4096)
    assert sign_test(0, 0) == sign_test(3, 3) == 1.0
    assert sign_test(0, 1) == 1.0
    assert sign_test(6, 0) == pytest.approx(2 / 64)
    assert sign_test(540, 460) == pytest.approx(sign_test(541, 461), rel=0.02)  # another way
    assert sign_test(60_000, 40_000) < 1e-12


def test_many_tasks_give_bonett_and_prices_interval() -> None:
    # n12 = 40 better, n21 = 20 worse of 1000: their formula by hand, with z for Student's t
    low, high = difference_interval([1.0] * 40 + [-1.0] * 20 + [0.0] * 940)
    p, q = 41 / 1002, 21 / 1002
    half = 1.96 * math.sqrt((p + q - (p - q) ** 2) / 1002)
    assert (low, high) == pytest.approx((p - q - half, p - q + half), rel=0.01)


def test_the_interval_has_a_width_where_nothing_changed() -> None:
    low, high = difference_interval([0.0] * 20)
    assert low == -high < -0.1
    few = difference_interval([0.0] * 20, attempts=8)
    assert 0.01 < few[1] < high  # more attempts know more
    assert difference_interval([1.0])[1] == 1.0


@pytest.mark.parametrize("attempts", [1, 4])
def test_the_interval_covers_what_it_says(attempts: int) -> None:
    rng = random.Random(3)
    covered = 0
    for _ in range(300):
        differences = []
        for _ in range(24):
            p = rng.random()  # and 0.2 more where there is room: 0.18 in the mean
            q = min(1.0, p + 0.2)
            a, b = (sum(rng.random() < r for _ in range(attempts)) for r in (p, q))
            differences.append((b - a) / attempts)
        low, high = difference_interval(differences, attempts)
        covered += low <= 0.18 <= high
    assert 0.92 <= covered / 300 <= 1.0
