"""The policy `openai` against a server on this machine; and evaluations that go on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import stamina

import rlrf
from rlrf import ConfigError, InfraError, UsageError
from rlrf.cli import main
from rlrf.errors import PromptTooLongError
from rlrf.evaluate import EvalReport
from rlrf.policy import Prompt, SamplingParams
from rlrf.results import ResultsFile
from rlrf.rollout import Rollout
from rlrf_trainers.engines.openai import OpenAIPolicy


class Server:
    """Chat completions from a function ``(request) -> (status, answer, headers)``."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer: Any = lambda body: (200, completion("hello"), {})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append(dict(self.headers))
                status, answer, headers = outer.answer(body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status if self.path == "/v1/chat/completions" else 404)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def completion(text: str, **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **choice.pop("message", {})}
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}]}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with stamina.set_testing(True, attempts=4):
        yield made
    made.close()


def ask(
    server: Server, params: SamplingParams | None = None, tools: Any = (), **options: Any
) -> Any:
    policy = OpenAIPolicy("m", base_url=server.url, **options)
    prompt = Prompt(({"role": "user", "content": "hi"},), tools=tools)
    try:
        (reply,) = rlrf.run_sync(policy.generate([prompt], params or SamplingParams()))
    finally:
        policy.close()
    return reply


def test_the_request_and_the_reply(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    server.answer = lambda body: (
        200,
        completion("yes", finish_reason="length", message={"reasoning_content": "hm"}),
        {},
    )
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, max_tokens=9, stop=("x",), seed=3)
    reply = ask(server, params, extra_body={"n": 1}, max_tokens_field="max_completion_tokens")
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_completion_tokens": 9,
            "top_k": 7,
            "stop": ["x"],
            "seed": 3,
            "n": 1,
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer k"
    assert (reply.text, reply.finish_reason, reply.token_ids) == ("yes", "length", ())
    assert reply.message["reasoning_content"] == "hm"
    ask(server)
    assert "top_k" not in server.requests[1]


def test_whom_it_asks_is_said_once_and_openai_wants_a_key(server, monkeypatch, caplog):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    server.answer = lambda body: (200, completion("yes"), {})
    policy = OpenAIPolicy("m", base_url=server.url.replace("//", "//user:secret@"))
    prompt = Prompt(({"role": "user", "content": "hi"},))
    with caplog.at_level("INFO", "rlrf"):
        for _ in range(2):
            rlrf.run_sync(policy.generate([prompt], SamplingParams()))
    policy.close()
    (said,) = [r.getMessage() for r in caplog.records if r.name == "rlrf.policies"]
    assert said.startswith(f"asking {policy.base_url} for 'm'")
    assert "secret" not in said
    for url in (None, "https://API.openai.com/v1/"):
        with pytest.raises(UsageError, match=r"would ask https://.*set OPENAI_API_KEY, or give ba"):
            OpenAIPolicy("m", base_url=url)
    assert "OPENAI_BASE_URL is given" in OpenAIPolicy("m", api_key="k")._by_default
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert OpenAIPolicy("m").base_url == server.url


def test_calls_that_a_server_leaves_in_its_text(server):
    tools = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    call = '{"name": "f", "arguments": {"n": 1}}'

    def told(text, tools=tools, **options):
        given = options.pop("message", {})
        server.answer = lambda body: (200, completion(text, message=given), {})
        return ask(server, tools=tools, **options).message

    hermes = f"Ok.\n<tool_call>{call}</tool_call><tool_call>{{</tool_call>"
    message = told(hermes)
    assert [c["function"] for c in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"n": 1}'}
    ]
    (invalid,) = message["invalid_tool_calls"]
    assert message["content"] == "Ok.<tool_call>{</tool_call>"
    assert message["content"][slice(*invalid["span"])] == invalid["text"]
    assert told(f"```json\n{call}\n```", tool_format="json")["content"] is None
    # Reasoning that the server has taken out is not looked for again.
    thought = {"reasoning_content": f"<tool_call>{call}</tool_call>"}
    message = told(f"<tool_call>{call}</tool_call>\n</think>\nSo.", message=thought)
    assert (len(message["tool_calls"]), message["content"]) == (1, "\n</think>\nSo.")
    # What the server has read is not read again; and without tools it is only text.
    own = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    assert told(hermes, message={"tool_calls": own})["tool_calls"] == own
    assert told(hermes, ()) == {"role": "assistant", "content": hermes}
    with pytest.raises(
        UsageError, match=r"unknown format of tool calls 'jsn'\. Did you mean 'json'"
    ):
        OpenAIPolicy("m", base_url=server.url, tool_format="jsn")
    with pytest.raises(UsageError, match=r"tool 0 is 'f'"):
        OpenAIPolicy("m", base_url=server.url).check_tools(["f"])


def test_token_ids_of_a_server_that_gives_them(server):
    logprobs = {"content": [{"logprob": -0.5}, {"logprob": -1.5}]}
    answer = completion("ab", token_ids=[5, 6], logprobs=logprobs) | {"prompt_token_ids": [1, 2]}
    server.answer = lambda body: (200, answer, {})
    reply = ask(server, token_ids=True)
    assert server.requests[0]["return_token_ids"] is True
    assert (reply.prompt_ids, reply.token_ids, reply.logprobs) == ((1, 2), (5, 6), (-0.5, -1.5))


def test_a_reply_in_parts_and_tokens_nobody_asked_for(server):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    answer = completion("", message={"content": parts}, logprobs={"content": [{"token": "a"}]})
    server.answer = lambda body: (200, answer, {})
    assert ask(server).text == "ab"
    with pytest.raises(InfraError, match="sent no chat completion"):
        ask(server, token_ids=True)
    server.answer = lambda body: (200, completion("", message={"content": 7}), {})
    with pytest.raises(InfraError, match="sent no chat completion"):
        ask(server)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(server, status):
    answers = [(status, {"error": {"message": "busy"}}, {"Retry-After": "0"})] * 2
    server.answer = lambda body: answers.pop() if answers else (200, completion("at last"), {})
    assert ask(server).text == "at last"
    assert len(server.requests) == 3


def test_what_persists_is_no_reward(server):
    server.answer = lambda body: (503, b"<html>down</html>", {})
    with pytest.raises(InfraError, match="503: <html>down") as caught:
        ask(server)
    assert caught.value.kind == "policy_unavailable"
    assert len(server.requests) == 4
    nobody = OpenAIPolicy("m", base_url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(InfraError, match="does not answer"):
        rlrf.run_sync(
            nobody.generate([Prompt(({"role": "user", "content": "hi"},))], SamplingParams())
        )
    nobody.close()


@pytest.mark.parametrize(
    ("status", "said", "error", "words"),
    [
        (401, {"error": {"message": "no key"}}, UsageError, "no key; set OPENAI_API_KEY"),
        (404, {"error": "no such model"}, UsageError, "is 'm' served there"),
        (400, {"error": {"message": "bad top_k"}}, UsageError, r"\(400\): bad top_k"),
        (
            400,
            {"error": {"message": "This model's maximum context length is 8"}},
            PromptTooLongError,
            "maximum context length is 8",
        ),
    ],
)
def test_what_the_server_refuses_is_said_at_once(server, status, said, error, words):
    server.answer = lambda body: (status, said, {})
    with pytest.raises(error, match=words):
        ask(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("answer", [b"not json", {}, {"choices": []}, {"choices": [{}]}, []])
def test_what_is_no_completion_is_the_servers_fault(server, answer):
    server.answer = lambda body: (200, answer, {})
    with pytest.raises(InfraError, match=r"sent no (chat completion|JSON)"):
        ask(server)


def test_wrong_options():
    with pytest.raises(ConfigError, match="base_url is 'localhost:8000'"):
        OpenAIPolicy("m", base_url="localhost:8000")
    for url in ("http://[::1", "http://", "ftp://x/v1"):
        with pytest.raises(ConfigError, match="base_url is"):
            OpenAIPolicy("m", base_url=url)
    with pytest.raises(ConfigError, match="retries is -1"):
        OpenAIPolicy("m", retries=-1)
    policy = OpenAIPolicy("m", base_url="http://x/v1")
    with pytest.raises(UsageError, match="cannot score"):
        policy.score([], [])
    with pytest.raises(UsageError, match="takes no weights"):
        policy.update_weights([])


def test_it_needs_no_torch():
    code = (
        "import sys, rlrf; rlrf.policies.load('openai')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- rlrf eval --------------------------------------------------------------------------------


def asked(server: Server) -> list[str]:
    words = ["eval", "--env", "format-rules-v0", "--limit", "12", "--samples", "2"]
    return [*words, "--policy", "openai", "--model", "m", "--base-url", server.url]


def evaluate(server: Server, folder: Path, *more: str, **options: Any) -> Any:
    command = [sys.executable, "-c", "from rlrf.cli import main; main()"]
    return subprocess.Popen(
        [*command, *asked(server), *more],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_grades_nothing_twice(server, tmp_path):
    seen, gate = threading.Semaphore(0), threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        seen.release()
        if len(server.requests) > 8:
            gate.wait(60)
        return 200, completion('{"answer": 7}'), {}

    server.answer = answer
    first = evaluate(server, tmp_path, "--max-concurrency", "4")
    for _ in range(9):
        assert seen.acquire(timeout=60)
    partial = tmp_path / "runs" / "eval" / "format-rules-v0-openai-m.json.partial"
    while len(partial.read_text().splitlines()) < 9:  # settings, and eight rollouts
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    gate.set()
    before = [json.dumps([r["messages"], r["seed"]]) for r in server.requests[:8]]
    with partial.open("a") as torn:
        torn.write('{"task_id": "torn')
    server.requests.clear()
    second = evaluate(server, tmp_path)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert "8 done" in err
    assert len(server.requests) == 24 - 8
    again = [json.dumps([r["messages"], r["seed"]]) for r in server.requests]
    assert not set(before) & set(again)
    report = json.loads(partial.with_suffix("").read_text())
    assert (report["n_tasks"], report["n_rollouts"], report["n_unscored"]) == (12, 24, 0)
    assert set(report["pass_at_k_ci"]) == {"1", "2"}
    assert "pass@2" in out
    assert "95 % CI" in out
    assert not partial.exists()


@pytest.mark.slow
def test_results_are_not_overwritten_and_settings_are_compared(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def run(*more: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["rlrf", *asked(server), "--out", "r.json", *more])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    code, err = run()
    assert code == 0
    assert "24/24 rollouts  0.0% solved" in err  # plain lines, where there is no terminal
    code, err = run()
    assert (code, "r.json exists; --overwrite replaces it" in err) == (2, True)
    (tmp_path / "r.json").rename(tmp_path / "old.json")
    settings = json.loads((tmp_path / "old.json").read_text())
    partial = tmp_path / "r.json.partial"
    partial.write_text(json.dumps({"env": settings["env"], "seed": 7}) + "\n")
    code, err = run()
    assert code == 2
    assert "rollouts made with seed=7, not 0; --overwrite starts anew" in err
    code, _ = run("--overwrite")
    assert code == 0
    assert not partial.exists()
    assert os.path.exists(tmp_path / "r.json")


def test_what_the_server_failed_at_is_tried_again(tmp_path):
    settings = {"seed": 0}
    done = Rollout("a", "0:a", reward=0.0)
    failed = Rollout("b", "1:b", finish_reason="failed", failure="policy_unavailable: down")
    with ResultsFile(tmp_path / "r.json", settings) as results:
        results.add(done)
        results.add(failed)
        results.finish(EvalReport.of([done, failed]), {})
    again = ResultsFile(tmp_path / "r.json", settings)
    assert [r.task_id for r in again.done] == ["a"]
    with again:
        again.add(Rollout("b", "1:b", reward=1.0))
        again.finish(EvalReport.of([done, Rollout("b", "1:b", reward=1.0)]), {})
    with pytest.raises(UsageError, match="exists; --overwrite"):
        ResultsFile(tmp_path / "r.json", settings)


def test_damaged_results_are_told(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        ResultsFile(tmp_path, {})
    partial = tmp_path / "r.json.partial"
    for text, why in (("[]\n", "is damaged"), ('{"seed": 0}\n{"a": 1}\n', "line 2, is no rollout")):
        partial.write_text(text)
        with pytest.raises(UsageError, match=why):
            ResultsFile(tmp_path / "r.json", {"seed": 0})


def test_two_evaluations_do_not_write_to_one_file(tmp_path):
    first = ResultsFile(tmp_path / "r.json", {"seed": 0})
    second = ResultsFile(tmp_path / "r.json", {"seed": 0})
    with first, pytest.raises(UsageError, match="in use, by process"), second:
        pass
    with second:
        pass
