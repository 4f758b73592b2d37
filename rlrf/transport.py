"""A JSON request over HTTP that ends: in time, in size, and with an error that says whose fault.

For whatever asks a server that is not ours (the policy ``openai``; judges). What holds for every
request:

- it is over after ``timeout_s``, its retries included, however slowly the server sends;
- a reply is read up to ``max_bytes``, unpacked, and no further;
- what may pass (429, 5xx, a broken connection) is tried again, with growing pauses or as
  ``Retry-After`` says; what is refused is not;
- a server that is gone ends the work at once, with its address and the cause, not after every
  task has gone through all retries;
- no message holds a secret: not the key, nor what stands in the address.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import logging
import re
import time
import weakref
import zlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
import stamina

from rlrf._async import call_hook
from rlrf.errors import ConfigError, InfraError, UnavailableError
from rlrf.redact import safe_url

log = logging.getLogger("rlrf.transport")

_SHOWN = 300  # characters of what a server said
_OFF_LOOP = 1 << 20  # bytes of JSON that are read in a thread
_GIVES_UP = 3  # waves of requests that failed for good, one after the other, before all is over


class RefusedError(InfraError):
    """The server refuses this request; another one it may take.

    Args:
        message: what it said, without secrets.
        status: the HTTP status.
        said: the bare words, lower case, with the error's code and type.
    """

    def __init__(self, message: str, status: int, said: str) -> None:
        super().__init__(message, kind="policy_refused", retryable=False)
        self.status, self.said = status, said


class JsonClient:
    """Posts JSON to one server and returns the JSON it answers.

    Args:
        base_url: ``http(s)://host...``; credentials and query in it are used and never shown.
        api_key: sent as a bearer token; "" for none.
        timeout_s: seconds until a reply must be there, retries and pauses included.
        retries: further attempts of a request.

    Raises:
        ConfigError: ``base_url``, ``timeout_s`` or ``retries`` is unusable.
    """

    def __init__(self, base_url: str, *, api_key: str = "", timeout_s: float, retries: int) -> None:
        try:
            url = httpx.URL(base_url)
        except (httpx.InvalidURL, TypeError, ValueError):
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(
                f"base_url is {safe_url(str(base_url))!r}; it must be like http://localhost:8000/v1"
            )
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ConfigError(f"retries is {retries!r}; it must be a whole number >= 0")
        if retries > _MOST_RETRIES:
            raise ConfigError(f"retries is {retries}; it must be at most {_MOST_RETRIES}")
        if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s <= _LONGEST:
            raise ConfigError(f"timeout_s is {timeout_s!r}; it must be in (0, {_LONGEST}]")
        if not all(" " <= c <= "~" for c in api_key):
            raise ConfigError("api_key holds a character that no HTTP header can; check it")
        self.url, self.where = url, safe_url(base_url)
        self.timeout_s, self.retries = timeout_s, retries
        self._auth = httpx.BasicAuth(url.username, url.password) if url.userinfo else None
        self._headers = {"Accept-Encoding": "identity"}  # what is unpacked may be a bomb
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        secrets = {api_key, url.username, url.password, *url.params.values()}
        secrets |= {quote(secret, safe="") for secret in secrets}
        if url.userinfo:
            secrets.add(base64.b64encode(f"{url.username}:{url.password}".encode()).decode())
        self._secrets = sorted((s for s in secrets if len(s) >= 4), key=len, reverse=True)
        # A client belongs to the event loop it was first used on.
        self._clients: weakref.WeakKeyDictionary[Any, httpx.AsyncClient] = (
            weakref.WeakKeyDictionary()
        )
        self._answered = False  # whether the server ever was there
        self._strikes, self._last_strike = 0, 0.0
        self._told = False  # of the trouble that goes on

    async def post(self, path: str, body: Mapping[str, Any], *, max_bytes: int) -> Any:
        """The JSON that ``POST {base_url}{path}`` answers to ``body``.

        Text that is no Unicode (lone surrogates) is sent with U+FFFD in its place.

        Args:
            path: appended to the base URL, before its query.
            body: JSON data.
            max_bytes: of the reply, unpacked.

        Raises:
            RefusedError: the server takes no such request (4xx).
            InfraError: it failed again and again (``policy_unavailable``), took too long
                (``policy_timeout``), or sent something else (``policy_error``).
            UnavailableError: it never answered, or no longer does.
        """
        begun = time.monotonic()
        url = self.url.copy_with(
            path=self.url.path.rstrip("/") + path, username=None, password=None
        )
        content = json.dumps(body, ensure_ascii=False, allow_nan=False).encode(
            "utf-8", "surrogatepass"
        )
        content = _LONE.sub("\N{REPLACEMENT CHARACTER}".encode(), content)
        try:
            async with asyncio.timeout(self.timeout_s):
                data = await self._attempts(url, content, max_bytes)
        except TimeoutError:
            why = f"sent no whole reply in {self.timeout_s:g} s"
            raise self._failure(begun, why, "policy_timeout") from None
        except _Status as error:
            if not error.passing:
                self._answered, self._strikes = True, 0
                raise RefusedError(
                    f"{self.where} refuses the request ({error.status}): {self.shown(error.text)}",
                    error.status,
                    error.text.lower(),
                ) from None
            self._answered = True
            why = f"says {error.status}: {self.shown(error.text)}"
            raise self._failure(begun, why) from None
        except httpx.HTTPError as error:
            cause = self.shown(f"{type(error).__name__}: {error}".removesuffix(": "))
            raise self._failure(begun, f"does not answer ({cause})", gone=True) from None
        self._answered, self._strikes, self._told = True, 0, False
        try:
            # Whole, off the loop where it is long; deep nesting and endless digits are no JSON.
            return json.loads(data) if len(data) < _OFF_LOOP else await call_hook(json.loads, data)
        except (ValueError, RecursionError):
            raise InfraError(
                f"{self.where} sent no JSON: {self.shown(data.decode(errors='replace'))!r}",
                kind="policy_error",
            ) from None

    def shown(self, text: str) -> str:
        """What somebody else said, short and without our secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:_SHOWN]

    async def aclose(self) -> None:
        """Close the connections that were opened on this event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    # --- one request ----------------------------------------------------------------------

    async def _attempts(self, url: httpx.URL, content: bytes, max_bytes: int) -> bytes:
        async for attempt in stamina.retry_context(
            on=self._again, attempts=self.retries + 1, timeout=None, wait_max=30.0
        ):
            with attempt:
                return await self._once(url, content, max_bytes)
        raise AssertionError("stamina raises what the last attempt raised")

    async def _once(self, url: httpx.URL, content: bytes, max_bytes: int) -> bytes:
        request = self._client().stream(
            "POST", url, content=content, headers={"Content-Type": "application/json"}
        )
        async with request as answer:
            refused = answer.status_code >= 300
            limit = 64 * 1024 if refused else max_bytes
            data = await self._read(answer, limit, cut=refused)
            if refused:
                raise _Status(answer, data)
            return data

    async def _read(self, answer: httpx.Response, limit: int, *, cut: bool) -> bytes:
        """The body, unpacked; at most ``limit`` bytes, of which more is an error unless cut."""
        packing = answer.headers.get("Content-Encoding", "identity").strip().lower()
        unpack = None
        if packing in ("gzip", "x-gzip", "deflate"):  # though nobody asked for it
            unpack = zlib.decompressobj(wbits=47)
        elif packing not in ("", "identity"):
            raise InfraError(
                f"{self.where} sent {packing!r}, which was not asked for", kind="policy_error"
            )
        data = bytearray()
        async for chunk in answer.aiter_raw():
            try:
                data += chunk if unpack is None else unpack.decompress(chunk, limit + 1 - len(data))
            except zlib.error:
                raise InfraError(
                    f"{self.where} sent broken {packing}", kind="policy_error"
                ) from None
            if len(data) > limit:
                if cut:
                    break
                raise InfraError(
                    f"{self.where} sent more than {limit:,} bytes; a reply as long as was asked "
                    "for has less",
                    kind="policy_error",
                    retryable=False,
                )
        return bytes(data[:limit])

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = httpx.AsyncClient(
                headers=self._headers,
                auth=self._auth,
                timeout=httpx.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s)),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            )
            self._clients[loop] = client
        return client

    # --- whether to go on -----------------------------------------------------------------

    def _again(self, error: Exception) -> bool | float:
        """Whether to try again, or after how many seconds."""
        if isinstance(error, _Status):
            # Older stamina takes 0 seconds for False.
            again: bool | float = error.passing and (error.wait or 1e-3)
        else:
            again = isinstance(error, httpx.TransportError)
        if again is not False and not self._told:
            self._told = True
            why = error.status if isinstance(error, _Status) else type(error).__name__
            log.info("%s: %s; trying again", self.where, why)
        return again

    def _failure(
        self, begun: float, why: str, kind: str = "policy_unavailable", *, gone: bool = False
    ) -> InfraError:
        """What to raise for a request that has failed for good, like others perhaps.

        Args:
            begun: when it did.
            why: what the server did.
            kind: of the failure.
            gone: whether there is no server at all.
        """
        if begun >= self._last_strike:  # those that were under way together count once
            self._strikes, self._last_strike = self._strikes + 1, time.monotonic()
        if gone and not self._answered:
            return UnavailableError(f"{self.where} {why}; is a server running there?", kind=kind)
        if self._strikes >= _GIVES_UP:
            return UnavailableError(f"{self.where} {why}, again and again", kind=kind)
        # Who has waited so long need not wait as long again.
        return InfraError(f"{self.where} {why}", kind=kind, retryable=kind != "policy_timeout")


_LONGEST = 86_400 * 7
_MOST_RETRIES = 100
_LONE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")  # surrogates, as "surrogatepass" writes them


class _Status(Exception):
    """An answer that is none: its status, and what it says."""

    def __init__(self, answer: httpx.Response, data: bytes) -> None:
        self.status, self.text = answer.status_code, _said(data)
        # A spent quota does not come back by waiting.
        spent = "insufficient_quota" in self.text.lower()
        self.passing = (self.status in (408, 409, 425, 429) and not spent) or self.status >= 500
        self.wait = _seconds(answer.headers.get("Retry-After", ""))
        super().__init__(f"HTTP {self.status}")


def _said(data: bytes) -> str:
    """What a server says is wrong: the message, then code and type where it has them."""
    text = data.decode(errors="replace")
    try:
        found = json.loads(data)
        error = found.get("error", found) if isinstance(found, dict) else found
        if isinstance(error, dict):
            found = (error.get(key) for key in ("message", "detail", "code", "type"))
            first, *more = [str(p) for p in found if isinstance(p, (str, int))] or [text]
            text = first + "".join(f" [{p}]" for p in more if p not in first)
        elif isinstance(error, str):
            text = error
    except (ValueError, RecursionError):
        pass
    return text


def _seconds(after: str) -> bool | float:
    """``Retry-After``, in seconds or as a date; True where there is none."""
    if after.isdecimal() and len(after) < 10:
        return min(float(after), 60.0)
    try:
        date = email.utils.parsedate_to_datetime(after)
        return min(max(date.timestamp() - time.time(), 0.0), 60.0)
    except (ValueError, TypeError, OverflowError):
        return True
