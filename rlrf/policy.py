"""Policies: what samples completions and scores them, behind one small protocol.

A policy owns its tokenizer. rlrf hands it chat messages once, at the start of an episode; from
then on ids are only appended to (:attr:`Prompt.prefix_ids`), never rendered again, so what a
trainer sees is what was sampled.

Why: design/token-ids.md.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import math
import numbers
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, Protocol, runtime_checkable

from rlrf.errors import (
    MAX_COUNT,
    InfraError,
    ReturnTypeError,
    UsageError,
    brief,
    check_takes,
    check_whole,
)
from rlrf.messages import (
    Message,
    Messages,
    action_message,
    action_text,
    answer_range,
    spoken,
    whole_text,
)
from rlrf.plugins import Registry, load_object
from rlrf.script import Script, as_player

FinishReason = Literal["stop", "length", "abort"]

# Beyond these a softmax in fp32 is greedy or uniform, or not a number.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
MIN_TOP_P = 1e-6

# Field, types, condition, and the condition in words.
_ACCEPTED: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    (
        "temperature",
        Real,
        lambda x: x == 0 or MIN_TEMPERATURE <= x <= MAX_TEMPERATURE,
        f">= 0: 0 (greedy), or from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
    ),
    ("top_p", Real, lambda x: MIN_TOP_P <= x <= 1, f"in (0, 1], and at least {MIN_TOP_P:g}"),
    ("top_k", Integral, lambda x: -1 <= x <= MAX_COUNT, ">= 0 (0 keeps every token), below 2**31"),
    ("max_tokens", Integral, lambda x: 1 <= x <= MAX_COUNT, ">= 1 and below 2**31"),
    (
        "stop",
        tuple,
        lambda x: all(isinstance(text, str) and text for text in x),
        "a tuple of texts, none of them empty",
    ),
    (
        "seed",
        (Integral, type(None)),
        lambda x: x is None or 0 <= x < 2**63,
        "None, or a whole number >= 0 and below 2**63",
    ),
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. The defaults sample the model's own distribution, as on-policy RL needs.

    Attributes:
        temperature: softmax temperature, from 1e-3 to 1e3; 0 is greedy.
        top_p: nucleus mass kept, from 1e-6; 1.0 keeps all.
        top_k: tokens kept; 0 keeps all (also -1, vLLM's spelling).
        max_tokens: sampled tokens per completion, end token included.
        stop: texts that end a completion, besides the model's own end tokens; none is empty.
        seed: seed of the call, below 2**63; the same prompts, weights and seed give the same
            completions.

    Raises:
        UsageError: a value out of range, or of another type.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, types, ok, accepted in _ACCEPTED:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, types) or not ok(value):
                raise UsageError(f"SamplingParams.{name} is {value!r}; must be {accepted}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to complete.

    Attributes:
        messages: the whole chat so far.
        prefix_ids: ids of everything up to the last sampled completion, or None on the first
            turn. The policy must return ``prompt_ids`` that start with them.
        new_messages: with ``prefix_ids``, the messages the environment added since.
        tools: tool schemas for the chat template (OpenAI wire), if the environment has tools.
        group: prompts of equal ``group`` are samples of one task (the policy may share work).
        seed: of this completion, so that it does not depend on what is sampled beside it; a policy
            that can only seed a whole call goes by :attr:`SamplingParams.seed`.
        turn: how many completions the episode has had.
    """

    messages: Messages
    prefix_ids: tuple[int, ...] | None = None
    new_messages: Messages = ()
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    seed: int | None = None
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        prompt_ids: the ids it continues, exactly as the model saw them.
        token_ids: the sampled ids, the end token included where one was sampled.
        logprobs: log-probability of each sampled token under the distribution it was sampled
            from (after temperature, top_p and top_k), nats; same length as ``token_ids``; empty
            when a server does not return them.
        text: the decoded reply without special tokens, reasoning included.
        finish_reason: ``stop`` (an end token or stop text) or ``length`` (cut off).
        message: the assistant message, with parsed ``tool_calls`` if there are any; None to have
            it made of ``text``. Its content is the answer, without the reasoning.
        offsets: characters of ``text`` that each token stands for, or empty if unknown.
        ranges: characters of ``text`` that the content of ``message`` is made of, in order; None
            to have them found.
        weight_version: of the weights it was sampled with, as ``update_weights`` was told; None
            where the policy does not know.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason = "stop"
    message: Message | None = None
    offsets: tuple[tuple[int, int], ...] = ()
    ranges: tuple[tuple[int, int], ...] | None = None
    weight_version: int | None = None

    @property
    def assistant_message(self) -> Message:
        """:attr:`message`, or one made of the text; its reasoning is beside the content."""
        return action_message(self.text if self.message is None else self.message)

    @property
    def whole_message(self) -> Message:
        """The same with the whole text for content, reasoning and all."""
        if self.message is None:
            return spoken(self.text)
        message: Message = {**self.message, "content": self.text}
        if "invalid_tool_calls" in message:
            message["invalid_tool_calls"] = list(map(self._in_text, message["invalid_tool_calls"]))
        if self.text != action_text(self.message) and _holds(
            self.text, message.get("reasoning_content") or ""
        ):
            message.pop("reasoning_content", None)
        return spoken(message)

    @property
    def content_offsets(self) -> tuple[tuple[int, int], ...]:
        """Characters of the message's content that each token stands for; empty if unknown.

        A token of the reasoning stands for none of it: ``(-1, -1)``.
        """
        if not self.offsets:
            return ()
        ranges = self._content_ranges()
        if ranges == ((0, len(self.text)),):
            return self.offsets
        if not ranges:
            return ()
        starts = [a for a, _ in ranges]
        before = [0, *itertools.accumulate(b - a for a, b in ranges)]

        def within(position: int) -> int:
            i = bisect_right(starts, position) - 1
            return before[i] + min(position, ranges[i][1]) - starts[i] if i >= 0 else 0

        def mapped(a: int, b: int) -> tuple[int, int]:
            i = bisect_right(starts, a) - 1
            begins = i >= 0 and a < ranges[i][1]
            c, d = within(a), within(b)
            return (c, d) if begins or c < d else (-1, -1)

        return tuple(mapped(a, b) for a, b in self.offsets)

    def _in_text(self, call: Any) -> Any:
        """A call that could not be read, its span counted in the text and not in the content."""
        span: Any = call.get("span") if isinstance(call, Mapping) else None
        if not _is_span(span):
            return call
        found = []
        for place, end in zip(span, (0, 1), strict=True):  # the end of a range ends within it
            before, at = 0, len(self.text)
            for a, b in self._content_ranges():
                if place < before + b - a + end:
                    at = a + place - before
                    break
                before += b - a
            found.append(at)
        return {**call, "span": found}

    def _content_ranges(self) -> tuple[tuple[int, int], ...]:
        if self.ranges is not None:
            return self.ranges
        content = action_text(self.assistant_message)
        start, end = answer_range(self.text)
        if self.text[start:end] != content:  # a policy's own reading of its text
            start = self.text.rfind(content) if content else -1
            end = start + len(content)
        return ((start, end),) if start >= 0 else ()


def _holds(text: str, reasoning: str) -> bool:
    """Whether a text has the reasoning in it, whose sections may stand apart there."""
    position = 0
    for section in reasoning.split("\n\n"):
        position = text.find(section, position)
        if position < 0:
            return False
        position += len(section)
    return True


def check_completion(completion: Any) -> None:
    """See that what a policy gave is a completion.

    Raises:
        InfraError: it holds what cannot be: ids that are none, log-probabilities that are no finite
            number <= 0, texts that are none. No reward may be drawn from it.
        ReturnTypeError: it is no completion, or its message is none: the policy's own code made it.
    """
    said = "the policy gave a completion that is none: "
    if not isinstance(completion, Completion):
        raise ReturnTypeError(f"{said}{type(completion).__name__} is no rlrf.Completion")
    fault = _fault(completion)
    if fault is not None:
        raise InfraError(said + fault, kind="policy_error")
    try:
        completion.assistant_message  # noqa: B018  # reads the message
    except UsageError as error:
        raise ReturnTypeError(f"{said}{error}") from error


_MAX_ID = 2**31
_MAX_LOGPROB = 1e-4  # rounding may take a sure token a little above 0


def _fault(completion: Completion) -> str | None:
    for name in ("prompt_ids", "token_ids"):
        ids: Any = getattr(completion, name)
        if not isinstance(ids, (tuple, list)):
            return f"{name} is a {type(ids).__name__}, not a tuple"
        for i in ids:
            if not _is_id(i):
                return f"{name} has {i!r}, which is no token id"
    logprobs: Any = completion.logprobs
    if not isinstance(logprobs, (tuple, list)):
        return f"logprobs is a {type(logprobs).__name__}, not a tuple (empty if there are none)"
    if logprobs and len(logprobs) != len(completion.token_ids):
        return f"{len(logprobs)} logprobs for {len(completion.token_ids)} token_ids"
    for x in logprobs:
        if not _is_logprob(x):
            return f"logprobs has {x!r}; it must be a finite number <= 0"
    if not isinstance(completion.text, str):
        return f"text is a {type(completion.text).__name__}, not a string"
    if completion.finish_reason not in ("stop", "length", "abort"):
        return f"finish_reason is {completion.finish_reason!r}"
    for name in ("offsets", "ranges"):
        spans: Any = getattr(completion, name)
        if name == "ranges" and spans is None:
            continue
        if not isinstance(spans, (tuple, list)):
            return f"{name} is a {type(spans).__name__}, not a tuple"
        for span in spans:
            if not _is_span(span):
                return f"{name} has {span!r}, which is no pair of positions in the text"
    if completion.offsets and len(completion.offsets) != len(completion.token_ids):
        return f"{len(completion.offsets)} offsets for {len(completion.token_ids)} token_ids"
    return None


def _is_span(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(x, numbers.Integral) for x in value)
    )


def _is_id(value: Any) -> bool:
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and 0 <= int(value) < _MAX_ID
    )


def _is_logprob(value: Any) -> bool:
    return isinstance(value, numbers.Real) and -math.inf < float(value) <= _MAX_LOGPROB


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of given tokens.

    Attributes:
        logprobs: ``[n]`` log-probability of each completion token, nats.
        top_ids: ``[n, top_k]`` most likely ids at each position, or empty.
        top_logprobs: ``[n, top_k]`` their log-probabilities, or empty.
    """

    logprobs: tuple[float, ...]
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()


@runtime_checkable
class Policy(Protocol):
    """What samples and scores. ``generate`` may also be ``async def``.

    A policy may set ``max_batch_size`` (int): the collector then gathers up to so many prompts
    for one call. Without it each prompt is its own call, which suits servers.
    """

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion per prompt, in order.

        Raises:
            InfraError: the engine failed; the collector retries.
            UsageError: a prompt cannot be completed (longer than the context, no template).
        """
        ...

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None = None,
    ) -> list[TokenScores]:
        """Log-probabilities, at temperature 1, of given completions after given prompts."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int = 0) -> None:
        """Take new weights; a no-op for a policy that shares its module with the trainer."""
        ...


policies = Registry("rlrf.policies", "policy")


SCRIPTED = "scripted:"


def make_policy(name: str, **kwargs: Any) -> Policy:
    """A policy by name: ``make_policy("hf", model="...")``.

    ``"scripted:pkg.mod:reply"`` is a :class:`ScriptedPolicy` of what ``pkg.mod`` calls ``reply``.

    Raises:
        UnknownIdError: no such policy.
        MissingDependencyError: its extra is not installed.
        UsageError: there is no such script.
    """
    policy: Policy = policy_class(name)(**kwargs)
    return policy


def policy_class(name: str) -> Callable[..., Any]:
    """What makes the policies of a name; raises as :func:`make_policy`."""
    if not name.startswith(SCRIPTED):
        return policies.load(name)  # type: ignore[no-any-return]  # whatever is registered
    path = name.removeprefix(SCRIPTED)
    if not all(path.partition(":")):
        raise UsageError(f"the policy {name!r} is no scripted:module:function")
    return partial(ScriptedPolicy, load_object(path, f"policy {name!r}"))


@dataclass
class ScriptedPolicy:
    """A policy that plays a script; for tests, baselines and dry runs.

    It samples no tokens, so its completions have none: nothing is counted, and nothing cut.

    Args:
        reply: a text or an assistant message, said at every turn; a sequence of them, one a turn
            and the last from then on; or a function ``(messages) -> text or message``, which may
            be ``async def``.
        max_batch_size: see :class:`Policy`.
    """

    reply: Script
    max_batch_size: int = 64
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._next = as_player(self.reply, "the script of a ScriptedPolicy")
        check_whole("max_batch_size", self.max_batch_size)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> Any:
        """See :class:`Policy`; what can be awaited where the script is ``async def``."""
        self.calls += 1
        replies = [self._next(prompt.messages, prompt.turn) for prompt in prompts]
        if any(map(inspect.isawaitable, replies)):
            return _all_scripted(replies)
        return [_scripted(reply) for reply in replies]

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None = None,
    ) -> list[TokenScores]:
        """See :class:`Policy`: a scripted reply is certain."""
        return [TokenScores((0.0,) * len(c)) for c in completion_ids]

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int = 0) -> None:
        """A script has no weights."""


async def _all_scripted(replies: Sequence[Any]) -> list[Completion]:
    return [_scripted(reply) for reply in await asyncio.gather(*replies)]


def _scripted(reply: Any) -> Completion:
    """A reply as a completion without tokens; also what is none, of which whoever looks says so."""
    if isinstance(reply, str):
        return Completion((), (), (), whole_text(reply))
    try:
        message = spoken(reply)
    except UsageError:
        told: Any = _Nothing() if reply is None else reply
        return Completion((), (), (), "", message=told)
    return Completion((), (), (), message["content"] or "", message=action_message(message))


class _Nothing:
    """What a function gave that forgot its return: None would mean the message of the text."""

    def __repr__(self) -> str:
        return "None (does the function return?)"


PolicyLike = Policy | Callable[[Messages], Any]
"""A policy, or a function ``(messages) -> text or assistant message``, ``def`` or ``async def``."""


def as_policy(policy: Any) -> Policy:
    """``policy``, or one that replies from the function ``(messages) -> text``.

    Raises:
        UsageError: it is neither, or cannot be called as such.
    """
    if isinstance(policy, type):
        raise UsageError(
            f"a policy was given as its class, {policy.__name__}; make one: {policy.__name__}(...)"
        )
    generate = getattr(policy, "generate", None)
    if callable(generate):
        check_takes(generate, f"generate() of {type(policy).__name__}", "prompts", "params")
        return policy  # type: ignore[no-any-return]  # by its protocol
    if callable(policy):
        return ScriptedPolicy(policy)
    raise UsageError(
        f"a policy has generate(), or is a function (messages) -> text; got {brief(policy)}. "
        'rlrf.make_policy("hf", model=...) makes one; rlrf.ScriptedPolicy(...) plays texts'
    )
