"""Requests to a server that is slow, endless, packed, gone, or talks too much."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import threading
import zlib
from collections.abc import Callable, Iterator

import pytest
import stamina

import rlrf
from rlrf import ConfigError, InfraError, UsageError
from rlrf._interrupt import same_command
from rlrf.errors import PromptTooLongError, UnavailableError
from rlrf.policy import Prompt, SamplingParams
from rlrf.redact import safe_argv, safe_url
from rlrf.runs import environment_lock
from rlrf.transport import JsonClient, RefusedError, _seconds
from rlrf_trainers.engines.openai import OpenAIPolicy
from tests.environments_for_tests import Echo, Guess

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class RawServer:
    """Answers each request with what a function writes, byte by byte if it likes."""

    def __init__(self, answer: Callable[[Callable[[bytes], None], bytes], None]) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.answer, self.requests = answer, 0
        self.closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            size, head = 0, b""
            while (line := file.readline()) not in (b"\r\n", b""):
                head += line
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            body = file.read(size)
            self.requests += 1
            try:
                self.answer(connection.sendall, head + b"\r\n" + body)
            except OSError:
                return  # the client has gone

    def close(self) -> None:
        self.closing.set()
        self.socket.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., RawServer]]:
    made: list[RawServer] = []

    def start(answer: Callable[[Callable[[bytes], None], bytes], None]) -> RawServer:
        made.append(RawServer(answer))
        return made[-1]

    with stamina.set_testing(True, attempts=2):
        yield start
    for server in made:
        server.close()


def post(
    url: str, body: object = None, *, timeout_s: float = 60, max_bytes: int = 10_000
) -> object:
    client = JsonClient(url, timeout_s=timeout_s, retries=1, api_key="sk-verysecret")

    async def once() -> object:
        try:
            return await client.post("/x", body or {}, max_bytes=max_bytes)  # type: ignore[arg-type]
        finally:
            await client.aclose()

    return rlrf.run_sync(once())


def replies(data: bytes, head: bytes = HEAD) -> Callable[[Callable[[bytes], None], bytes], None]:
    def answer(send: Callable[[bytes], None], _: bytes) -> None:
        send(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    return answer


# --- in time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nX-Slow: ", HEAD + b"\r\n{"])
def test_a_reply_that_never_ends_is_over_after_the_timeout_not_after_a_pause(serve, start):
    """Drops keep every read short: only a deadline over all of it ends this."""
    server: RawServer

    def drip(send: Callable[[bytes], None], _: bytes) -> None:
        send(start)
        while not server.closing.wait(0.02):
            send(b"0")

    server = serve(drip)
    with pytest.raises(InfraError, match=r"sent no whole reply in 0\.3 s") as caught:
        post(server.url, timeout_s=0.3)
    assert (caught.value.kind, caught.value.retryable) == ("policy_timeout", False)


# --- in size ----------------------------------------------------------------------------------


def test_an_endless_reply_is_read_no_further_than_its_limit(serve):
    sent = 0

    def pour(send: Callable[[bytes], None], _: bytes) -> None:
        nonlocal sent
        send(HEAD + b"\r\n")
        while True:
            send(b" " * 65_536)
            sent += 65_536

    with pytest.raises(InfraError, match="sent more than 10,000 bytes") as caught:
        post(serve(pour).url)
    assert not caught.value.retryable
    assert sent < 64 << 20  # what sockets hold, not what the server has


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_what_was_packed_is_unpacked_no_further_than_its_limit(serve, pack):
    name = b"gzip" if pack is gzip.compress else b"deflate"
    head = HEAD + b"Content-Encoding: " + name + b"\r\n"
    small = serve(replies(pack(b'{"a": 1}'), head))
    assert post(small.url) == {"a": 1}
    bomb = serve(replies(pack(b" " * 30_000_000), head))
    with pytest.raises(InfraError, match="sent more than 10,000 bytes"):
        post(bomb.url)
    broken = serve(replies(b"no such thing", head))
    with pytest.raises(InfraError, match="sent broken"):
        post(broken.url)
    other = serve(replies(b"x", HEAD + b"Content-Encoding: br\r\n"))
    with pytest.raises(InfraError, match="sent 'br', which was not asked for"):
        post(other.url)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"1" * 100_000, b'"\xff', b"", b"{'a': 1}"])
def test_what_is_no_json_is_the_servers_fault(serve, data):
    with pytest.raises(InfraError, match="sent no JSON") as caught:
        post(serve(replies(data)).url, max_bytes=200_000)
    assert len(str(caught.value)) < 500


def test_long_json_is_read_whole(serve):
    data = json.dumps(["a" * 50] * 40_000).encode()
    assert len(post(serve(replies(data)).url, max_bytes=len(data))) == 40_000


def test_text_that_is_no_unicode_is_sent_as_a_replacement_character(serve):
    seen: list[bytes] = []

    def answer(send: Callable[[bytes], None], request: bytes) -> None:
        seen.append(request)
        replies(b"{}")(send, request)

    post(serve(answer).url, {"a": "x\ud800y", "b": "\U0001f600"})
    assert json.loads(seen[0].partition(b"\r\n\r\n")[2]) == {"a": "x\ufffdy", "b": "\U0001f600"}


# --- secrets ----------------------------------------------------------------------------------


def test_no_message_holds_a_secret(serve, caplog):
    def echo(send: Callable[[bytes], None], request: bytes) -> None:
        text = request.decode() + " " + "hunter2 p%40ss p@ss tok-en"
        data = json.dumps({"error": {"message": text}}).encode()
        send(b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    server = serve(echo)
    url = server.url.replace("//", "//hunter2:p%40ss@") + "?key=tok-en"
    with pytest.raises(RefusedError) as caught:
        post(url)
    told = str(caught.value)
    assert told.startswith(server.url + "?key=***")
    with pytest.raises(InfraError) as gone:
        post("http://hunter2:p%40ss@127.0.0.1:9/v1?key=tok-en")
    policy = OpenAIPolicy("m", base_url=url, api_key="sk-verysecret")
    with pytest.raises(ConfigError) as wrong:
        OpenAIPolicy("m", base_url="ftp://hunter2:p@ss@x/v1?key=tok-en")
    shown = [told, str(gone.value), str(wrong.value), policy.base_url, caplog.text]
    basic = base64.b64encode(b"hunter2:p@ss").decode()
    for secret in (basic, "sk-verysecret", "hunter2", "p%40ss", "p@ss", "tok-en"):
        assert not [text for text in shown if secret in text]
    assert caught.value.__cause__ is None  # nor what a traceback shows


def test_no_record_holds_a_secret(monkeypatch):
    argv = ["rlrf", "eval", "--policy-option", "api_key=sk-1", "--api-key", "sk-1", "--token=sk-1"]
    argv += ["--base-url", "http://u:sk-1@h/v1?k=sk-1&j", "base_url=http://u:sk-1@h/v1"]
    argv += ["--policy-option=api_key=sk-1", "--set=env.options.api_key=sk-1 and more"]
    argv += ["extra_body={'api_key': 'sk-1'}", 'x={"token" : "sk-1", "a": 1}', "https://h/v1#sk-1"]
    argv += ["--set", "trainer.max_tokens=5"]
    monkeypatch.setattr("sys.argv", argv)
    shown = environment_lock()["argv"]
    assert shown == safe_argv(argv)
    assert "sk-1" not in str(shown)
    assert shown[7:10] == ["--base-url", "http://h/v1?k=***&j=***", "base_url=http://h/v1"]
    assert shown[-2:] == argv[-2:]
    assert "sk-1" not in same_command()
    assert safe_url("http://localhost:8000/v1/") == "http://localhost:8000/v1"


def test_a_server_gets_the_reasoning_back_only_if_it_told_it(serve):
    seen: list[list[dict[str, str]]] = []

    def answer(send: Callable[[bytes], None], request: bytes) -> None:
        seen.append(json.loads(request.partition(b"\r\n\r\n")[2])["messages"])
        told = {"reasoning_content": "hm"} if len(seen) > 2 else {}
        message = {"content": "<think>so</think>5", **told}
        replies(json.dumps({"choices": [{"message": message}]}).encode())(send, request)

    policy = OpenAIPolicy("m", base_url=serve(answer).url)
    for _ in range(2):
        rlrf.rollout(Guess(max_turns=2), policy, [Guess().tasks()[0]])
    fields = [[sorted(m) for m in asked if m["role"] == "assistant"] for asked in seen]
    plain = ["content", "role"]
    assert fields == [[], [plain], [], [["content", "reasoning_content", "role"]]]


def test_options_that_cannot_work():
    for options, words in (
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": "5"}, "timeout_s is '5'"),
        ({"retries": 1.5}, r"retries is 1\.5"),
        ({"retries": 10**20}, "it must be at most 100"),
        ({"api_key": "k\n"}, "api_key holds a character"),
        ({"api_key": "schl\u00fcssel"}, "api_key holds a character"),
    ):
        with pytest.raises(ConfigError, match=words):
            OpenAIPolicy("m", base_url="http://x/v1", **options)


# --- whose fault ------------------------------------------------------------------------------


def say(status: int, **error: object) -> Callable[[Callable[[bytes], None], bytes], None]:
    data = json.dumps({"error": error}).encode()
    return replies(data, b"HTTP/1.1 %d X\r\n" % status)


GOOD = replies(json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode())


@pytest.mark.parametrize(
    "error",
    [
        {"message": "the request exceeds the available context size, try increasing it"},
        {"message": "The decoder prompt (length 9000) is longer than the maximum model length"},
        {"message": "Invalid request.", "code": "context_length_exceeded"},
        {"message": "prompt is too long: 210000 tokens > 200000 maximum"},
        {"message": "The input token count (9) exceeds the maximum number of tokens allowed"},
        {"message": "max_tokens: this model's maximum context length is 8"},
    ],
)
def test_a_prompt_that_is_too_long_in_any_servers_words(serve, error):
    policy = OpenAIPolicy("m", base_url=serve(say(400, **error)).url)
    with pytest.raises(PromptTooLongError, match="refuses the request"):
        rlrf.run_sync(policy.generate([Prompt(())], SamplingParams()))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "context_length_exceeded"}, "prompt_too_long"),
        ({"message": "blocked", "code": "content_filter"}, "policy_refused"),
        ({"message": "Failed to call a function", "code": "tool_use_failed"}, "policy_refused"),
        ({"message": "the temperature of this text", "type": "content_policy"}, "policy_refused"),
        ({"message": "messages.0: what is that?"}, "policy_refused"),
        (
            {"message": "'set temperature to 3' was flagged", "code": "invalid_prompt"},
            "policy_refused",
        ),
        (
            {"message": '{"input": {"temperature": 1.0}} is invalid', "status": 422},
            "policy_refused",
        ),
        ({"message": "input was flagged by moderation", "status": 403}, "policy_refused"),
        ({"message": "tool not found", "status": 404}, "policy_refused"),
    ],
)
@pytest.mark.filterwarnings("ignore:task 'train-no' is left unscored")
def test_one_request_refused_costs_its_own_rollout(serve, error, kind):
    def answer(send: Callable[[bytes], None], request: bytes) -> None:
        refused = say(**{"status": 400, **error})
        (refused if b"no" in request.partition(b"messages")[2] else GOOD)(send, request)

    policy = OpenAIPolicy("m", base_url=serve(answer).url)
    assert rlrf.rollout(Echo(), policy, ["train-yes"])[0].scored
    found = rlrf.rollout(Echo(), policy, group_size=3)
    told = {r.task_id: r.failure and r.failure.partition(":")[0] for r in found}
    assert told["train-no"] == kind
    assert [r.reward for r in found if r.task_id == "train-yes"] == [1.0] * 3
    assert [r.reward for r in found if r.task_id == "train-no"] == [None] * 3


def test_a_reply_that_the_server_filtered_is_no_reply_of_the_policy(serve):
    half = {"choices": [{"message": {"content": "ye"}, "finish_reason": "content_filter"}]}
    server = serve(replies(json.dumps(half).encode()))
    (one,) = rlrf.rollout(Echo(), OpenAIPolicy("m", base_url=server.url), ["train-yes"])
    assert one.failure.startswith("policy_refused")
    assert (one.reward, server.requests) == (None, 1)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"message": "Unrecognized request argument supplied: top_k"}),
        (400, {"message": "no", "code": "unsupported_parameter"}),
        (401, {"message": "no key"}),
        (429, {"message": "no money", "code": "insufficient_quota"}),
        (422, {"detail": "extra field guided_json"}),
    ],
)
def test_what_every_request_would_meet_ends_the_work_at_once(serve, status, error):
    server = serve(say(status, **error))
    policy = OpenAIPolicy("m", base_url=server.url, extra_body={"guided_json": 1})
    with pytest.raises(UsageError, match=r"refuses the request \("):
        rlrf.rollout(Echo(), policy, max_concurrency=1)
    assert server.requests == 1


def test_when_all_are_refused_the_work_ends(serve):
    server = serve(say(400, message="something about the request"))
    policy = OpenAIPolicy("m", base_url=server.url)
    with pytest.raises(UsageError, match="so were the 15 requests before it"):
        rlrf.rollout(Echo(), policy, group_size=50, max_concurrency=4)
    assert server.requests < 24


def test_a_server_that_is_not_there_ends_the_work_after_the_first_task(caplog):
    nobody = OpenAIPolicy("m", base_url="http://127.0.0.1:9/v1", retries=3)
    with (
        stamina.set_testing(True, attempts=4),
        pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9/v1 does not answer .*running there"),
        caplog.at_level("INFO", logger="rlrf"),
    ):
        rlrf.rollout(Echo(), nobody, group_size=20, max_concurrency=1)
    nobody.close()
    said = [r.message for r in caplog.records if r.name == "rlrf.transport"]
    assert said == ["http://127.0.0.1:9/v1: ConnectError; trying again"]


def test_a_server_that_goes_away_ends_the_work_and_a_hiccup_does_not(serve):
    down = threading.Event()

    def answer(send: Callable[[bytes], None], request: bytes) -> None:
        (say(503, message="down") if down.is_set() else GOOD)(send, request)

    server = serve(answer)
    policy = OpenAIPolicy("m", base_url=server.url)
    assert rlrf.rollout(Echo(), policy)[0].scored
    down.set()
    (one,) = rlrf.rollout(Echo(), policy, ["train-yes"], retries=0)
    assert one.failure.startswith("policy_unavailable")
    down.clear()
    assert rlrf.rollout(Echo(), policy)[0].scored
    down.set()
    before = server.requests
    with pytest.raises(UnavailableError, match="says 503: down, again and again"):
        rlrf.rollout(Echo(), policy, group_size=40, max_concurrency=2)
    assert server.requests - before < 30
    policy.close()


def test_a_date_to_try_again_at():
    assert _seconds("7") == 7.0
    assert _seconds("9" * 9) == 60.0
    assert _seconds("Fri, 01 Jan 1999 00:00:00 GMT") == 0.0
    assert _seconds("Fri, 01 Jan 2999 00:00:00 GMT") == 60.0
    for nonsense in ("", "soon", "9" * 400, "Fri, 99 Jan 1999 00:00:00 GMT"):
        assert _seconds(nonsense) is True
