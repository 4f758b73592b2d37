"""Checkers for LiveCodeBench's questions with more than one right answer.

The official harness compares with one of the right answers and rejects the others: some of these
questions are in its errata, some we found in release v6. Each checker here reads the answer as the
statement defines it, and takes from the expected output only what is the same in all right answers
(whether there is one, and the optimum).

What is checked was printed by an untrusted program: words are parsed as ASCII integers of bounded
length, nothing else.

They do not find out what the optimum is, or whether there is an answer. Questions with several
right answers that have no checker here are left out (:mod:`.livecodebench`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlrf.sandbox import CallCase, Case, Checker, RawRun, StdinCase, Tokens
from rlrf_environments.code.explain import value_text

_INTEGER = re.compile(r"-?[0-9]{1,30}", re.ASCII)


@dataclass(frozen=True)
class AnyRight:
    """Accepts an output if ``right(words, expected_words, input_words)`` says so."""

    right: Callable[[list[str], list[str], list[str]], bool]

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`rlrf.sandbox.Checker`."""
        assert isinstance(case, StdinCase)
        try:
            return self.right(raw.text.split(), case.expected.split(), case.stdin.split())
        except _NotInteger:
            return False


@dataclass(frozen=True)
class AnyOrder:
    """Accepts a returned list with the expected elements in any order."""

    def accepts(self, raw: RawRun, case: Case) -> bool:
        """See :class:`rlrf.sandbox.Checker`."""
        assert isinstance(case, CallCase)
        got, wanted = raw.result, case.expected
        if not isinstance(got, (list, tuple)) or len(got) != len(wanted):
            return False
        return sorted(map(_plain, got)) == sorted(map(_plain, wanted))


def _plain(value: Any) -> str:
    # Not by hash or order: values may collide, or have neither.
    return value_text(list(value) if isinstance(value, tuple) else value)


class _NotInteger(ValueError):
    pass


def _integers(words: list[str]) -> list[int]:
    if not all(_INTEGER.fullmatch(w) for w in words):
        raise _NotInteger
    return list(map(int, words))


def _three_summands(got: list[str], wanted: list[str], given: list[str]) -> bool:
    """arc185_c: indices i < j < k with A_i + A_j + A_k = X, or -1."""
    if wanted == ["-1"] or len(got) != 3:
        return got == wanted
    i, j, k = _integers(got)
    n, x, *a = map(int, given)
    return 1 <= i < j < k <= n and a[i - 1] + a[j - 1] + a[k - 1] == x


def _cubes(got: list[str], wanted: list[str], given: list[str]) -> bool:
    """abc397_d: positive x, y with x^3 - y^3 = N, or -1."""
    if wanted == ["-1"] or len(got) != 2:
        return got == wanted
    x, y = _integers(got)
    return x > 0 and y > 0 and x**3 - y**3 == int(given[0])


def _xor_sequence(got: list[str], wanted: list[str], given: list[str]) -> bool:
    """abc396_e: A >= 0 with A_x xor A_y = z for every (x, y, z), of the least sum, or -1."""
    if wanted == ["-1"]:
        return got == wanted
    n, m, *triples = map(int, given)
    a = _integers(got)
    if len(a) != n or min(a) < 0 or sum(a) != sum(map(int, wanted)):
        return False
    parts = zip(triples[: 3 * m : 3], triples[1 : 3 * m : 3], triples[2 : 3 * m : 3], strict=True)
    return all(a[x - 1] ^ a[y - 1] == z for x, y, z in parts)


def _cover(got: list[str], wanted: list[str], given: list[str]) -> bool:
    """arc190_a: an operation (0 none, 1 inside, 2 outside) per interval, to cover 1..N, or -1."""
    if wanted == ["-1"]:
        return got == wanted
    n, m, *ends = map(int, given)
    if len(got) != m + 1 or got[0] != wanted[0] or set(got[1:]) - {"0", "1", "2"}:
        return False
    if m - got[1:].count("0") != int(wanted[0]):
        return False
    steps = [0] * (n + 2)
    for operation, left, right in zip(got[1:], ends[::2], ends[1::2], strict=True):
        if operation == "1":
            steps[left] += 1
            steps[right + 1] -= 1
        elif operation == "2":
            steps[1] += 1
            steps[left] -= 1
            steps[right + 1] += 1  # and all that follows
    covered = 0
    for i in range(1, n + 1):
        covered += steps[i]
        if covered <= 0:
            return False
    return True


def _orders(got: list[str], wanted: list[str], given: list[str]) -> bool:
    """arc191_c: per N, integers A, M in 1..10^18 such that the order of A modulo M is N."""
    numbers = _integers(got)
    cases = [int(w) for w in given[1:]]
    if len(numbers) != 2 * len(cases) or not all(1 <= v <= 10**18 for v in numbers):
        return False
    return all(
        _has_order(a, m, n) for a, m, n in zip(numbers[::2], numbers[1::2], cases, strict=True)
    )


def _has_order(a: int, modulus: int, n: int) -> bool:
    if pow(a, n, modulus) != 1 % modulus:
        return False
    return all(pow(a, n // p, modulus) != 1 % modulus for p in _prime_factors(n))


@functools.lru_cache(1 << 14)
def _prime_factors(n: int) -> tuple[int, ...]:
    """The primes that divide ``n``, at most 10^9."""
    found = []
    for p in _small_primes():
        if p * p > n:
            break
        if n % p == 0:
            found.append(p)
            while n % p == 0:
                n //= p
    return (*found, n) if n > 1 else tuple(found)


@functools.cache
def _small_primes() -> tuple[int, ...]:
    """The primes up to the root of 10^9."""
    root = 31_623
    prime = bytearray([1]) * (root + 1)
    for p in range(2, math.isqrt(root) + 1):
        if prime[p]:
            prime[p * p :: p] = bytes(len(range(p * p, root + 1, p)))
    return tuple(p for p in range(2, root + 1) if prime[p])


def _ring(got: list[str], wanted: list[str], given: list[str]) -> bool:
    """arc195_c: a closed tour; a red piece steps to a side, a blue one to a corner."""
    at, want = 0, 0
    for i in range(int(given[0])):
        red, blue = int(given[1 + 2 * i]), int(given[2 + 2 * i])
        count = red + blue
        possible = wanted[want] == "Yes"
        want += 1 + 3 * count if possible else 1
        if at >= len(got) or got[at] != ("Yes" if possible else "No"):
            return False
        at += 1
        if not possible:
            continue
        words = got[at : at + 3 * count]
        at += 3 * count
        colours, rows, columns = words[::3], _integers(words[1::3]), _integers(words[2::3])
        if colours.count("R") != red or colours.count("B") != blue:
            return False
        if not len(colours) == len(rows) == len(columns) == count:
            return False
        if not all(1 <= v <= 10**9 for v in (*rows, *columns)):
            return False
        if len(set(zip(rows, columns, strict=True))) != count:
            return False
        for j in range(count):
            down = abs(rows[j] - rows[(j + 1) % count])
            across = abs(columns[j] - columns[(j + 1) % count])
            if (down, across) not in (((0, 1), (1, 0)) if colours[j] == "R" else ((1, 1),)):
                return False
    return at == len(got)


def _confused(got: list[str], wanted: list[str], given: list[str]) -> bool:
    """arc188_c: who is confused, such that the testimonies fit some choice of liars, or -1.

    Villager A says C of B: liar(A) xor confused(A) xor liar(B) = C. So one has to find liars with
    given xors, which exist if no cycle of testimonies contradicts itself.
    """
    if wanted == ["-1"] or len(got) != 1:
        return got == wanted
    n, m, *said = map(int, given)
    confused = got[0]
    if len(confused) != n or set(confused) - {"0", "1"}:
        return False
    parent, differs = list(range(n)), [0] * n

    def root(i: int) -> tuple[int, int]:
        path, side = [], 0
        while parent[i] != i:
            path.append(i)
            i = parent[i]
        for j in reversed(path):
            side ^= differs[j]
            parent[j], differs[j] = i, side
        return i, side

    for a, b, c in zip(said[: 3 * m : 3], said[1 : 3 * m : 3], said[2 : 3 * m : 3], strict=True):
        (x, side_a), (y, side_b) = root(a - 1), root(b - 1)
        apart = c ^ (confused[a - 1] == "1")
        if x == y:
            if side_a ^ side_b != apart:
                return False
        else:
            parent[x], differs[x] = y, side_a ^ side_b ^ apart
    return True


MANY_ANSWERS: Mapping[str, Checker] = {
    # In the errata:
    "arc185_c": AnyRight(_three_summands),
    "find-words-containing-character": AnyOrder(),
    "find-the-peaks": AnyOrder(),
    "generate-binary-strings-without-adjacent-zeros": AnyOrder(),
    # Not in the errata; their statements accept any of several answers:
    "abc396_e": AnyRight(_xor_sequence),
    "abc397_d": AnyRight(_cubes),
    "arc188_c": AnyRight(_confused),
    "arc190_a": AnyRight(_cover),
    "arc191_c": AnyRight(_orders),
    "arc195_c": AnyRight(_ring),
}
"""The checker of each question with several right answers, by its id or LeetCode's name."""

_TOLERANCE = re.compile(
    r"(?:absolute or relative|relative or absolute) error.{0,80}?10\^\{?-(\d+)\}?", re.DOTALL
)


def tolerance(statement: str) -> Checker | None:
    """The checker of a question whose statement allows an error, as AtCoder words it.

    The official harness wants all printed digits to agree; the judge that the question comes from
    does not.
    """
    found = _TOLERANCE.search(statement)
    return Tokens(10.0 ** -int(found[1])) if found else None
