"""The errors of rlrf, in one place.

Two families, and the difference between them is the most important line in the package:

- :class:`UsageError` and its children: the caller gave something wrong. The message names the
  thing, the value and the remedy. Nothing is retried.
- :class:`InfraError`: the machinery failed (a sandbox died, a judge did not answer, a deadline
  struck). The *policy* did not cause it, so it is never a reward: :func:`rlrf.rollout` retries
  it and, when it persists, returns the rollout unscored.

What a policy causes (its program loops, its JSON does not parse) is no error at all: it is a
reward with feedback.

Why: design/unscored.md.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any


class RlrfError(Exception):
    """Base of every error rlrf raises on purpose."""


class UsageError(RlrfError, ValueError):
    """The caller gave a wrong id, value or combination; the message says what to do instead."""


class OutcomeError(UsageError):
    """What an environment answered is malformed: a reward that is not finite, an unknown kind.

    A mistake in the environment, which may show on few attempts only: :func:`rlrf.rollout` leaves
    these unscored and goes on.
    """


class ReturnTypeError(UsageError):
    """An environment's hook, or a policy, returned what is of another type than it must be.

    A mistake in its code: :func:`rlrf.rollout` raises it where that is so from the start, and else
    leaves the rollout unscored and goes on.
    """


_LISTED = 30  # names in a message; a data set has thousands


class UnknownIdError(UsageError, LookupError):
    """A name that is not registered.

    Args:
        what: the noun, e.g. ``"environment"``.
        name: what was asked for.
        known: the names that exist; near matches are listed in the message.
        remedy: one more sentence on what to do.
    """

    def __init__(self, what: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        self.what, self.name, self.known = what, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        if near:
            hint = "Did you mean " + " or ".join(repr(n) for n in near) + "?"
        elif self.known:
            more = len(self.known) - _LISTED
            hint = "Known: " + ", ".join(self.known[:_LISTED])
            hint += f" and {more} more." if more > 0 else "."
        else:
            hint = f"No {what} is registered."
        super().__init__(" ".join(s for s in (f"unknown {what} {name!r}.", hint, remedy) if s))


class ConfigError(UsageError):
    """A wrong configuration key or value; names the key, the value and what is accepted."""


class MissingDependencyError(UsageError, ImportError):
    """A feature needs a package that is not installed.

    Args:
        feature: what was asked for.
        package: the module that could not be imported.
        extra: the extra of rlrf that brings it; empty if none does.
    """

    def __init__(self, feature: str, package: str, extra: str) -> None:
        self.feature, self.package, self.extra = feature, package, extra
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed. "
            "Install it with: pip install " + (f"'rlrf[{extra}]'" if extra else package)
        )


class PromptError(UsageError):
    """One prompt cannot be completed; others may: its rollouts are unscored, the rest goes on."""


class PromptTooLongError(PromptError):
    """A prompt leaves no room for a completion in the policy's context.

    Args:
        length: tokens of the prompt.
        max_tokens: tokens asked for.
        context: tokens the policy can attend to.
    """

    def __init__(self, length: int, max_tokens: int, context: int) -> None:
        self.length, self.max_tokens, self.context = length, max_tokens, context
        super().__init__(
            f"the prompt has {length} tokens and {max_tokens} more were asked for, but the "
            f"policy's context is {context}; shorten the task, lower max_tokens, or use a model "
            "with a longer context"
        )


class InfraError(RlrfError, RuntimeError):
    """The infrastructure failed; no reward may be drawn from it.

    Args:
        message: what failed.
        kind: a short, low-cardinality name for counting, e.g. ``sandbox_died``, ``deadline``,
            ``judge_unavailable``, ``policy_error``.
        retryable: False when trying again cannot help.
    """

    def __init__(
        self, message: str, *, kind: str = "infrastructure", retryable: bool = True
    ) -> None:
        self.kind, self.retryable = kind, retryable
        super().__init__(message)


class LoopLostError(InfraError):
    """What was under way on the event loop behind the sync methods has been lost with the loop.

    A hook blocked it. The next call gets a new loop; :func:`rlrf.rollout` and
    :func:`rlrf.evaluate` go on by themselves.

    Args:
        blocker: whose hook it was.
    """

    def __init__(self, blocker: str) -> None:
        super().__init__(
            f"the event loop behind the sync methods was given up: it was blocked by {blocker}. "
            "Call again, there is a new one; and let that hook await, or make it a plain `def`",
            kind="loop_lost",
        )


class UnavailableError(InfraError):
    """What all work depends on is gone: :func:`rlrf.rollout` ends with it instead of going on.

    Every further attempt would fail alike, after as long a wait. What has been done is kept.
    """


MAX_COUNT = 2**31 - 1
"""No count of anything is larger; what is has slipped, and would be waited for, or fill memory."""


def check_whole(name: str, value: Any, *, least: int = 1, most: int = MAX_COUNT) -> None:
    """Refuse the value of an option of that name if it is no whole number, or is out of range.

    Raises:
        UsageError: it is.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        bounded = most < MAX_COUNT or (whole and value > most)
        limits = f"from {least} to {most}" if bounded else f">= {least}"
        raise UsageError(f"{name} is {value!r:.80}; it must be a whole number {limits}")


def close_match(name: Any, known: Iterable[str]) -> str:
    """The nearest of ``known``, or an empty string where none is near."""
    if not isinstance(name, str) or len(name) > 100:
        return ""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), "")


def nearest(name: Any, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``known``, or an empty string."""
    found = close_match(name, known)
    return f"; did you mean {found!r}?" if found else ""


def check_takes(function: Callable[..., Any], what: str, *names: str) -> None:
    """See that a function can be called with arguments of these names, in order.

    Raises:
        UsageError: it cannot.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C: who calls it will see
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise UsageError(
            f"{what} is called as ({', '.join(names)}), but takes {signature}: {error}"
        ) from None


def describe(error: BaseException) -> str:
    """An error as ``Type: text``, whatever it is: its ``str()`` may raise or be a megabyte."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    try:
        text = str(error)
    except Exception as inner:
        text = f"(its text cannot be had: __str__ raised {type(inner).__name__})"
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")  # no lone surrogates in a record
    if len(text) > _DESCRIBED:
        text = f"{text[:_DESCRIBED]} [... {len(text) - _DESCRIBED} characters cut ...]"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_DESCRIBED = 2000


def brief(value: Any) -> str:
    """Any value for a message: short, even where its ``repr`` is long or raises."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"(its repr raised {type(error).__name__})"
    return f"{text[:200]} ({type(value).__name__})"
