"""The ``openai`` policy: any server with OpenAI's chat completions, asked over HTTP.

For evaluation, and for environments that need a second model. A server gives text; token ids and
log-probabilities only where it can (vLLM: ``token_ids=True``), so a trainer that needs them takes
a policy that runs here. Needs nothing but httpx and stamina: no torch.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import httpx
import stamina

from rlrf import run_sync
from rlrf.errors import ConfigError, InfraError, PromptTooLongError, UsageError
from rlrf.messages import Message
from rlrf.policy import Completion, FinishReason, Prompt, SamplingParams, TokenScores

DEFAULT_URL = "https://api.openai.com/v1"
_TOO_LONG = ("context length", "context_length", "maximum context", "too many tokens")
_SHOWN = 300


class OpenAIPolicy:
    """Replies come from ``POST {base_url}/chat/completions``, one request per prompt.

    Rate limits (429), server errors (5xx) and broken connections are tried again, with growing
    pauses or as ``Retry-After`` says; what persists is an :class:`rlrf.InfraError`, so the rollout
    is left unscored.

    Args:
        model: the name the server knows it by.
        base_url: up to and including ``/v1``; None for ``$OPENAI_BASE_URL``, else OpenAI's own.
        api_key: None for ``$OPENAI_API_KEY``. A server on this machine mostly needs none.
        timeout_s: seconds until a reply must be there.
        retries: further attempts of a request.
        token_ids: ask for token ids and log-probabilities (vLLM's ``return_token_ids``).
        extra_body: further fields of each request, e.g.
            ``{"chat_template_kwargs": {"enable_thinking": False}}``.
        max_tokens_field: ``max_tokens``, or ``max_completion_tokens`` for models that insist.

    Raises:
        ConfigError: an unusable ``base_url``, or negative ``retries``.
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
    ) -> None:
        self.model = model
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        try:
            url = httpx.URL(self.base_url)
        except (httpx.InvalidURL, TypeError):
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(
                f"base_url is {self.base_url!r}; it must be like http://localhost:8000/v1"
            )
        if retries < 0:
            raise ConfigError(f"retries is {retries}; it must be >= 0")
        self._api_key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")
        self.timeout_s, self.retries, self.token_ids = timeout_s, retries, token_ids
        self.extra_body = dict(extra_body or {})
        self.max_tokens_field = max_tokens_field
        # A client belongs to the event loop it was first used on.
        self._clients: weakref.WeakKeyDictionary[Any, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )

    # --- Policy ---------------------------------------------------------------------------

    async def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion per prompt, in order; see :class:`rlrf.Policy`.

        Raises:
            InfraError: the server did not answer, again and again.
            PromptTooLongError: a prompt leaves no room for a reply in the model's context.
            UsageError: the server refuses the request: key, model name, an option.
        """
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

    async def aclose(self) -> None:
        """Close the connections that were opened on this event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def close(self) -> None:
        """Close the connections that the sync faces of rlrf have opened."""
        run_sync(self.aclose())

    # --- requests -------------------------------------------------------------------------

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
            client = httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s)),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            )
            self._clients[loop] = client
        return client

    def _body(self, prompt: Prompt, params: SamplingParams) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(m) for m in prompt.messages],
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
        body = self._body(prompt, params)
        try:
            async for attempt in stamina.retry_context(
                on=_pause, attempts=self.retries + 1, timeout=None, wait_max=30.0
            ):
                with attempt:
                    answer = await self._client().post(
                        f"{self.base_url}/chat/completions", json=body
                    )
                    answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            self._refused(error.response, params)
        except httpx.HTTPError as error:
            raise InfraError(
                f"{self.base_url} does not answer ({type(error).__name__}: {error})",
                kind="policy_unavailable",
            ) from error
        return self._read(answer)

    def _refused(self, answer: httpx.Response, params: SamplingParams) -> NoReturn:
        status, said = answer.status_code, _message(answer)
        if _is_passing(answer):
            raise InfraError(f"{self.base_url} says {status}: {said}", kind="policy_unavailable")
        if status in (400, 413, 422) and any(words in said.lower() for words in _TOO_LONG):
            error = PromptTooLongError(0, params.max_tokens, 0)
            error.args = (f"{self.base_url} says: {said}",)
            raise error
        remedies = {
            401: "; set OPENAI_API_KEY, or give api_key=",
            403: "; set OPENAI_API_KEY, or give api_key=",
            404: f"; is {self.model!r} served there, and does base_url end in /v1?",
        }
        remedy = remedies.get(status, "")
        raise UsageError(f"{self.base_url} refuses the request ({status}): {said}{remedy}")

    def _read(self, answer: httpx.Response) -> Completion:
        try:
            data = answer.json()
            choice = data["choices"][0]
            raw = choice["message"]
            text = _text(raw.get("content"))
            message: Message = {"role": "assistant", "content": text}
            if raw.get("tool_calls"):
                message["tool_calls"] = list(raw["tool_calls"])
            thought = raw.get("reasoning_content") or raw.get("reasoning")
            if thought:
                message["reasoning_content"] = str(thought)
            sampled, prompt_ids, logprobs = self._tokens(data, choice)
            reason = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InfraError(
                f"{self.base_url} sent no chat completion: {answer.text[:_SHOWN]!r}",
                kind="policy_error",
            ) from error
        finish: FinishReason = reason if reason in ("length", "abort") else "stop"
        return Completion(
            prompt_ids,
            sampled,
            logprobs,
            text,
            finish,
            message,
        )

    def _tokens(
        self, data: Mapping[str, Any], choice: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
        """Sampled ids, prompt ids and log-probabilities, as far as they were asked for."""
        if not self.token_ids:
            return (), (), ()
        sampled = tuple(int(i) for i in choice.get("token_ids") or ())
        prompt = data.get("prompt_token_ids") or choice.get("prompt_token_ids") or ()
        listed = (choice.get("logprobs") or {}).get("content") or ()
        logprobs = tuple(float(item["logprob"]) for item in listed)
        if len(logprobs) != len(sampled):
            logprobs = ()
        return sampled, tuple(int(i) for i in prompt), logprobs


def _text(content: Any) -> str:
    """A reply's text; some servers send it in parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in content if part.get("type") == "text")


def _is_passing(answer: httpx.Response) -> bool:
    """Whether the same request may do better later."""
    return answer.status_code in (408, 409, 425, 429) or answer.status_code >= 500


def _pause(error: Exception) -> bool | float:
    """Whether to try again, or after how many seconds."""
    if isinstance(error, httpx.HTTPStatusError):
        if not _is_passing(error.response):
            return False
        wait = error.response.headers.get("Retry-After", "")
        return min(float(wait), 60.0) if wait.isdecimal() else True
    return isinstance(error, httpx.TransportError)


def _message(answer: httpx.Response) -> str:
    """What a server says is wrong."""
    try:
        said = answer.json()["error"]
        text = said["message"] if isinstance(said, dict) else said
    except (ValueError, LookupError, TypeError):
        text = answer.text
    return str(text)[:_SHOWN]
