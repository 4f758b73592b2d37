"""The ``openai`` policy: any server with OpenAI's chat completions, asked over HTTP.

For evaluation, and for environments that need a second model. A server gives text; token ids and
log-probabilities only where it can (vLLM: ``token_ids=True``), so a trainer that needs them takes
a policy that runs here. Needs nothing but httpx and stamina: no torch.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlrf import run_sync
from rlrf.errors import ConfigError, InfraError, PromptTooLongError, UsageError
from rlrf.messages import Message, action_message
from rlrf.policy import (
    Completion,
    FinishReason,
    Prompt,
    SamplingParams,
    TokenScores,
    check_completion,
)
from rlrf.tools import check_format, check_specs, parse
from rlrf.transport import JsonClient, RefusedError

log = logging.getLogger("rlrf.policies")

_OPENAI = "api.openai.com"
DEFAULT_URL = f"https://{_OPENAI}/v1"
_TOO_LONG = re.compile(
    r"context[ _-]?(length|size|window)|maximum (context|model|prompt|input) length"
    r"|max_model_len|(prompt|input|messages?|request)\b.{0,40} (is |are )?too (long|large)"
    r"|too many (input )?tokens|(input|prompt) token count|reduce the length"
    r"|string_above_max_length"
)
"""How servers (OpenAI, vLLM, SGLang, llama.cpp, Azure, Gemini, Anthropic) say so."""
_OF_ONE = re.compile(
    r"content_filter|content_policy|responsibleai|tool_use_failed|invalid_prompt|moderation|flagged"
    r"|usage polic|safety"
)
"""Codes of refusals that are about this prompt, or this reply, whatever else they mention."""
_REFUSED_IN_A_ROW = 16


def _of_all(extra_body: Mapping[str, Any]) -> re.Pattern[str]:
    """Words in a refusal that tell of what every request holds."""
    names = ["temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed"]
    names += ["logprobs", "return_token_ids", "api key", "api_key", "quota", *extra_body]
    names += ["model_not_found", "unsupported_parameter", "unknown_parameter"]
    return re.compile("|".join(rf"\b{re.escape(n.lower())}\b" for n in names))


class OpenAIPolicy:
    """Replies come from ``POST {base_url}/chat/completions``, one request per prompt.

    Rate limits (429), server errors (5xx) and broken connections are tried again, with growing
    pauses or as ``Retry-After`` says; what persists is an :class:`rlrf.InfraError`, so the rollout
    is left unscored.

    Args:
        model: the name the server knows it by.
        base_url: up to and including ``/v1``; None for ``$OPENAI_BASE_URL``, else OpenAI's own:
            prompts then leave this machine. Whom it asks is logged before the first request.
        api_key: None for ``$OPENAI_API_KEY``. A server on this machine mostly needs none.
        timeout_s: seconds until a reply must be there whole, retries included.
        retries: further attempts of a request.
        token_ids: ask for token ids and log-probabilities (vLLM's ``return_token_ids``).
        extra_body: further fields of each request, e.g.
            ``{"chat_template_kwargs": {"enable_thinking": False}}``.
        max_tokens_field: ``max_tokens``, or ``max_completion_tokens`` for models that insist.
        tool_format: how the model writes calls of tools, one of :data:`rlrf.tools.FORMATS`, for
            servers that leave them in the text; None for ``hermes_json``.

    Raises:
        ConfigError: an unusable ``base_url``, or negative ``retries``; no key for OpenAI's own.
        UsageError: an unknown ``tool_format``.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 5,
        token_ids: bool = False,
        extra_body: Mapping[str, Any] | None = None,
        max_tokens_field: str = "max_tokens",
        tool_format: str | None = None,
    ) -> None:
        self.tool_format = "hermes_json" if tool_format is None else tool_format
        check_format(self.tool_format)
        self.model = model
        named = base_url or os.environ.get("OPENAI_BASE_URL")
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")
        self._server = JsonClient(
            (named or DEFAULT_URL).rstrip("/"), api_key=key, timeout_s=timeout_s, retries=retries
        )
        self.base_url = self._server.where
        self._by_default = "" if named else ", as no base_url and no OPENAI_BASE_URL is given"
        if not key and self._server.url.host == _OPENAI:
            raise ConfigError(
                f"the policy 'openai' would ask {self.base_url}{self._by_default}, and that needs "
                "a key: set OPENAI_API_KEY, or give base_url=http://localhost:8000/v1 (--base-url) "
                "for a server of your own"
            )
        self._said = False
        self.token_ids, self.extra_body = token_ids, dict(extra_body or {})
        self.max_tokens_field = max_tokens_field
        self._refused = 0  # requests in a row
        self._worked = False  # whether the server has taken any
        # Fields of ours. What could not be read of a call is in the content, too; reasoning goes
        # back to servers that tell it themselves: others may refuse a field they do not know.
        self._not_for_servers = {"invalid_tool_calls", "reasoning_content"}

    # --- Policy ---------------------------------------------------------------------------

    async def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion per prompt, in order; see :class:`rlrf.Policy`.

        Raises:
            InfraError: the server did not answer, again and again.
            PromptTooLongError: a prompt leaves no room for a reply in the model's context.
            UsageError: the server refuses the request: key, model name, an option.
        """
        if not self._said:
            self._said = True
            log.info("asking %s for %r%s", self.base_url, self.model, self._by_default)
        return list(await asyncio.gather(*(self._complete(p, params) for p in prompts)))

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None = None,
    ) -> list[TokenScores]:
        """Not possible over this protocol.

        Raises:
            UsageError: always.
        """
        raise UsageError("the policy 'openai' cannot score tokens; use 'hf'")

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int = 0) -> None:
        """Not possible over this protocol.

        Raises:
            UsageError: always.
        """
        raise UsageError("the policy 'openai' takes no weights; train with 'hf'")

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """See that tools are ones; whether the model can call them, its server knows.

        Raises:
            UsageError: a tool is none, or its schema is.
        """
        check_specs(tools)

    async def aclose(self) -> None:
        """Close the connections that were opened on this event loop."""
        await self._server.aclose()

    def close(self) -> None:
        """Close the connections that the sync faces of rlrf have opened."""
        run_sync(self.aclose())

    # --- requests -------------------------------------------------------------------------

    def _body(self, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {k: v for k, v in m.items() if k not in self._not_for_servers}
                for m in prompt.messages
            ],
            "temperature": params.temperature,
            "top_p": params.top_p,
            self.max_tokens_field: params.max_tokens,
        }
        if params.top_k > 0:
            body["top_k"] = params.top_k
        if params.stop:
            body["stop"] = list(params.stop)
        if params.seed is not None:
            body["seed"] = params.seed
        if prompt.tools:
            body["tools"] = list(prompt.tools)
        if self.token_ids:
            body |= {"return_token_ids": True, "logprobs": True}
        return body | self.extra_body

    async def _complete(self, prompt: Prompt, params: SamplingParams) -> Completion:
        try:
            # A token is a few bytes of text; beside each may stand its log-probability.
            most = (1 << 20) + 2048 * params.max_tokens
            answer = await self._server.post(
                "/chat/completions", self._body(prompt, params), max_bytes=most
            )
        except RefusedError as error:
            raise self._refusal(error, params) from None
        return self._read(answer, prompt)

    def _refusal(self, error: RefusedError, params: SamplingParams) -> Exception:
        """Whose fault it is: this prompt's alone, or the caller's, which every prompt will meet."""
        if error.status in (400, 413, 422) and _TOO_LONG.search(error.said):
            told = PromptTooLongError(0, params.max_tokens, 0)
            told.args = (str(error),)
            return told
        remedy = {
            401: "; set OPENAI_API_KEY, or give api_key=",
            403: "; set OPENAI_API_KEY, or give api_key=",
            404: f"; is {self.model!r} served there, and does base_url end in /v1?",
            429: "; raise the account's quota",
        }.get(error.status, "")
        # A server that has taken other requests has nothing against what all of them hold.
        of_all = error.status in (401, 429) or (
            not self._worked
            and not _OF_ONE.search(error.said)
            and bool(remedy or _of_all(self.extra_body).search(error.said))
        )
        if of_all:
            return UsageError(f"{error}{remedy}")
        # Of one prompt, as far as one can tell; where it is of all, they are many.
        self._refused += 1
        if self._refused >= _REFUSED_IN_A_ROW:
            return UsageError(f"{error}; so were the {self._refused - 1} requests before it")
        return error

    def _read(self, data: Any, prompt: Prompt) -> Completion:
        self._refused, self._worked = 0, True
        try:
            choice = data["choices"][0]
            raw = choice["message"]
            text, thought = _text(raw.get("content")), _thought(raw)
            if "reasoning_content" in raw:
                self._not_for_servers.discard("reasoning_content")
            message: Message = {"role": "assistant", "content": text}
            if raw.get("tool_calls"):
                message["tool_calls"] = list(raw["tool_calls"])
            if thought is not None:
                message["reasoning_content"] = thought
            message = action_message(message)
            sampled, prompt_ids, logprobs = self._tokens(data, choice)
            reason = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InfraError(
                f"{self.base_url} sent no chat completion: {self._server.shown(str(data))!r}",
                kind="policy_error",
            ) from error
        if reason == "content_filter":  # the server's doing, not the policy's
            raise InfraError(
                f"{self.base_url} has filtered the reply (finish_reason 'content_filter')",
                kind="policy_refused",
                retryable=False,
            )
        message = _with_calls(message, prompt, self.tool_format)
        finish: FinishReason = reason if reason in ("length", "abort") else "stop"
        completion = Completion(prompt_ids, sampled, logprobs, text, finish, message)
        check_completion(completion)
        return completion

    def _tokens(
        self, data: Mapping[str, Any], choice: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
        """Sampled ids, prompt ids and log-probabilities, as far as they were asked for."""
        if not self.token_ids:
            return (), (), ()
        sampled = tuple(choice.get("token_ids") or ())
        prompt = data.get("prompt_token_ids") or choice.get("prompt_token_ids") or ()
        listed = (choice.get("logprobs") or {}).get("content") or ()
        logprobs = tuple(float(item["logprob"]) for item in listed)
        if len(logprobs) != len(sampled):
            logprobs = ()
        return sampled, tuple(prompt), logprobs


def _text(content: Any) -> str:
    """A reply's text; some servers send it in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in content if part.get("type") == "text")


def _thought(message: Mapping[str, Any]) -> str | None:
    """The reasoning that a server has taken out of a reply; None if it has taken none."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name]:
            return str(message[name])
    parts = message.get("content")
    if not isinstance(parts, list):
        return None
    thinking = (part["thinking"] for part in parts if part.get("type") == "thinking")
    return "".join(map(_text, thinking)) or None


def _with_calls(message: Message, prompt: Prompt, format: str) -> Message:
    """The message with the calls that a server has left in its text."""
    if not prompt.tools or message.get("tool_calls"):
        return message
    found = parse(message["content"] or "", format, prompt.tools, split=False)
    return {**message, **found.message(f"call_{len(prompt.messages)}")}
