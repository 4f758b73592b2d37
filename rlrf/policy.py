"""Policies: what samples completions and scores them, behind one small protocol.

A policy owns its tokenizer. rlrf hands it chat messages once, at the start of an episode; from
then on ids are only appended to (:attr:`Prompt.prefix_ids`), never rendered again, so what a
trainer sees is what was sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from rlrf.errors import UsageError
from rlrf.messages import Message, Messages, assistant
from rlrf.plugins import Registry

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. The defaults sample the model's own distribution, as on-policy RL needs.

    Attributes:
        temperature: softmax temperature; 0 is greedy.
        top_p: nucleus mass kept; 1.0 keeps all.
        top_k: tokens kept; 0 keeps all (also -1, vLLM's spelling).
        max_tokens: sampled tokens per completion, end token included.
        stop: texts that end a completion, besides the model's own end tokens.
        seed: seed of the call; the same prompts, weights and seed give the same completions.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, ">= 0 (0 keeps every token)"),
            ("max_tokens", self.max_tokens >= 1, ">= 1"),
        ):
            if not ok:
                raise UsageError(
                    f"SamplingParams.{name} is {getattr(self, name)}; must be {accepted}"
                )


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
    """

    messages: Messages
    prefix_ids: tuple[int, ...] | None = None
    new_messages: Messages = ()
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        prompt_ids: the ids it continues, exactly as the model saw them.
        token_ids: the sampled ids, the end token included where one was sampled.
        logprobs: log-probability of each sampled token under the distribution it was sampled
            from (after temperature, top_p and top_k), nats; same length as ``token_ids``; empty
            when a server does not return them.
        text: the decoded reply without special tokens.
        finish_reason: ``stop`` (an end token or stop text) or ``length`` (cut off).
        message: the assistant message, with parsed ``tool_calls`` if there are any.
        offsets: characters of ``text`` that each token stands for, or empty if unknown.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason = "stop"
    message: Message | None = None
    offsets: tuple[tuple[int, int], ...] = ()

    @property
    def assistant_message(self) -> Message:
        """:attr:`message`, or the text as one."""
        return self.message if self.message is not None else assistant(self.text)


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


def make_policy(name: str, **kwargs: Any) -> Policy:
    """A policy by name: ``make_policy("hf", model="...")``.

    Raises:
        UnknownIdError: no such policy.
        MissingDependencyError: its extra is not installed.
    """
    policy: Policy = policies.load(name)(**kwargs)
    return policy


@dataclass
class ScriptedPolicy:
    """A policy that replies from a function; for tests, baselines and dry runs.

    Tokens are the UTF-8 bytes of the text, with 256 as the end token; every log-probability is 0.

    Args:
        reply: ``(messages) -> text``.
    """

    reply: Any
    max_batch_size: int = 64
    calls: int = field(default=0, init=False)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """See :class:`Policy`."""
        self.calls += 1
        out = []
        for prompt in prompts:
            text = str(self.reply(prompt.messages))
            before = b"".join((m["content"] or "").encode() for m in prompt.messages)
            if prompt.prefix_ids is None:
                ids = tuple(before)
            else:
                new = b"".join((m["content"] or "").encode() for m in prompt.new_messages)
                ids = prompt.prefix_ids + tuple(new)
            sampled = (*text.encode(), 256)[: params.max_tokens]
            cut = sampled[-1] != 256
            text = bytes(b for b in sampled if b < 256).decode(errors="replace")
            out.append(
                Completion(ids, sampled, (0.0,) * len(sampled), text, "length" if cut else "stop")
            )
        return out

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
