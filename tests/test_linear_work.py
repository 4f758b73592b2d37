"""Nothing untrusted costs more than linear work.

Two halves. Every regex, parser and decoder of the four packages stands in :data:`SITES`: with the
probe that reaches it, or with the reason why nothing untrusted does. And every probe is run on
texts made to be expensive, at growing length: its time may grow as the text does.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlrf import Feedback, Segment
from rlrf.feedback import clean_text, defuse
from rlrf.sandbox import (
    CallCase,
    Exact,
    Limits,
    Lines,
    ProgramError,
    RawRun,
    Returns,
    StdinCase,
    Text,
    Tokens,
    Verdict,
    accepted,
)
from rlrf.testing import leaks, texts
from rlrf_environments.code import sdpo_compat
from rlrf_environments.code.answers import MANY_ANSWERS, AnyOrder
from rlrf_environments.code.explain import Failure, Test, explain, value_text
from rlrf_environments.code.extract import Attempt, extract, missing_entry
from rlrf_environments.code.humaneval import Equal, Oracle
from rlrf_environments.code.livecodebench import OfficialLines, OfficialReturns, Results
from rlrf_environments.format_rules import RULES, FormatRules
from rlrf_sandboxes import slot

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "rlrf",
    "environments/rlrf_environments",
    "sandboxes/rlrf_sandboxes",
    "trainers/rlrf_trainers",
)

# --- what there is ----------------------------------------------------------------------------

OURS = "trusted: source, configuration or a name that the user of the command gives"
DATA = "trusted: a data set that the user names"
FILES = "trusted: a file that rlrf has written; one JSON document or line, read once"
HOST = "trusted: the host's own Python, packages and libraries"

SITES: dict[str, dict[str, str]] = {
    "rlrf/_files.py": {"_holder": FILES, "parse_json": FILES},
    "rlrf/_run_folder.py": {"_STEP": OURS},
    "rlrf/_plugin_source.py": {"_tree": OURS, "plain": OURS},
    "rlrf/config.py": dict.fromkeys(("read_config", "parse_value", "nearest", "_PARTS"), OURS),
    "rlrf/errors.py": {"UnknownIdError.__init__": OURS, "close_match": OURS},
    "rlrf/_report/records.py": {"_call": FILES},
    "rlrf/feedback.py": {"_ANSI": "clean_text", "defuse": "defuse", "defuser": "defuse"},
    "rlrf/messages.py": {"_SURROGATE": "clean_text"},
    "rlrf/reasoning.py": dict.fromkeys(
        (
            "_BEGIN _CHANNEL_END _FENCE _LABEL _MARK _OPENS _QUOTE _SPACE _TRIPLES _WORD "
            "_WORDS_BEFORE _WORDS_BEHIND"
        ).split(),
        "split_reasoning",
    ),
    "rlrf/registry.py": {"_ID": OURS, "_check_options": OURS},
    "rlrf/results.py": {
        "ResultsFile.__init__": FILES,
        "ResultsFile.named": OURS,
        "ResultsFile._read": FILES,
    },
    "rlrf/runs.py": {"Run._read": FILES, "Run._lines": FILES},
    "rlrf/sandbox/checkers.py": {"_decimal": "checkers of output"},
    "rlrf/testing/leaks.py": dict.fromkeys(
        ("_CHOICE", "_LIST_AFTER", "_LIST_AROUND", "_LIST_BEFORE"), "leaks"
    ),
    "rlrf/testing/texts.py": dict.fromkeys(
        (
            "_ANSWER _CODE _FENCE _PROGRAM _SPLIT_WORDS _TESTS _THOUSANDS _WORDS _canonical _parsed"
        ).split(),
        "leaks",
    ),
    "rlrf/wrappers.py": {"wrap": OURS},
    "rlrf/tools/families.py": dict.fromkeys(
        (
            "Format _BRACKET _BRACKET_OF_LINE _PYTHON_BRACKET _CLOSES _FUNCTION _FUNCTION_END "
            "_FUNCTION_CLOSE _PARAMETER _VALUE_MARK _AFTER_VALUE _BLOCK_MARK _TOOL_CALL_MARK "
            "_CALL_HEAD _LINE_HEAD _NAME _KEYWORD _LINE_LIST _MISTRAL_HEAD _ACTION _INPUT "
            "_REACT_LINE _MORE _XML_OPENS _LLAMA_OPENS _PYTHONIC_OPENS _MISTRAL_OPENS _JSON_OPENS"
        ).split(),
        "parse calls",
    ),
    "rlrf/tools/formats.py": {"_form": OURS},
    "rlrf/tools/quoted.py": dict.fromkeys(("_FENCE", "_TICKS"), "parse calls"),
    "rlrf/tools/schema.py": {"_compiled": OURS},
    "rlrf/tools/told.py": {"near": "validate"},
    "rlrf/tools/values.py": dict.fromkeys(
        (
            "_SPACE _INTEGER _NUMBER _PYTHON_INTEGER _PYTHON_NUMBER _NUMERIC _WORD _STRING "
            "_CUT_ESCAPE _PYTHON_STRINGS _ESCAPE _SURROGATE JSON.string"
        ).split(),
        "parse calls",
    ),
    "environments/rlrf_environments/code/answers.py": {
        "_INTEGER": "checkers of output",
        "_TOLERANCE": DATA,
    },
    "environments/rlrf_environments/code/env.py": {"CodeEnv.reference_solution": DATA},
    "environments/rlrf_environments/code/explain.py": {
        "_ADDRESS": "explain output",
        "_CONTROL": "explain output",
    },
    "environments/rlrf_environments/code/extract.py": {
        "_LINE": "extract",
        "_PYTHON": "extract",
        "_mark": "extract",
        "_defines": "extract",
        "_STATEMENT": "extract",
        "_FENCE": "extract",
        "_MARKER": "extract",
        "_RULE": "extract",
        "_HEADING": "extract",
        "_UNDERLINE": "extract",
        "_WORD": "extract",
        "_loose_blocks": "extract",
        "_WORDS": "extract",
        "parse": "missing_entry",
        "_takes_long": "missing_entry",
        "_nearest": "missing_entry",
    },
    "environments/rlrf_environments/code/humaneval.py": {
        "MBPPPlus._code_task": DATA,
        "_as_call": DATA,
        "_order": DATA,
        "_assert_arguments": DATA,
    },
    "environments/rlrf_environments/code/livecodebench.py": {
        **dict.fromkeys(
            (
                "Row.hidden", "_names", "_release_of", "_index", "as_day", "_scan", "_cases",
                "unpack_tests", "_pickled_string", "_json",
            ),
            DATA,
        ),
        "_day": OURS,
        "OfficialLines.accepts": "checkers of output",
    },
    "environments/rlrf_environments/code/tasks.py": {
        "read_jsonl": DATA,
        "read_object": DATA,
        "nested_json": DATA,
    },
    "environments/rlrf_environments/format_rules.py": {
        **dict.fromkeys(
            (
                "_SPACE", "_DECODER", "_decode", "_members", "_read_object", "_parse_bare",
                "_NUMBER", "_plain",
            ),
            "format rules",
        ),
        "_task_id": "trusted: our own questions",
    },
    "sandboxes/rlrf_sandboxes/daemon.py": {"_plain": OURS},
    "sandboxes/rlrf_sandboxes/host.py": dict.fromkeys(
        ("Python.__init__", "distributions", "left_out", "libraries", "located"), HOST
    ),
    "sandboxes/rlrf_sandboxes/images.py": {
        **dict.fromkeys(
            (
                "_Python.__init__", "_skipped_module", "_pack_libraries", "_distributions",
                "_pack_distributions", "_is_editable", "_LEFT_OUT", "_import",
            ),
            HOST,
        ),
        "_requirement": OURS,
        "_build_error": "trusted: what the docker daemon says of a build",
    },
    "sandboxes/rlrf_sandboxes/runner.py": {
        "_loads": "trusted: inside the sandbox, under the program's own limits",
        "Zygote.main": "trusted: a struct of fixed size",
        "Leader.main": "trusted: the host's frames",
        "Leader.attempt": "trusted: the host's frames; and the program itself, in its sandbox",
        "describe": "trusted: inside the sandbox, under the program's own limits",
        "serve": "trusted: inside the sandbox, under the program's own limits",
        "proxies.candidate": "trusted: inside the judge's sandbox, under its limits",
        "Supervisor.next_frame": "trusted: the host's frames",
        "Supervisor.oom_kills": "trusted: the kernel's words",
        "Supervisor.hear": "trusted: a struct of fixed size",
    },
    "sandboxes/rlrf_sandboxes/slot.py": {"Link._next": "frames", "_message": "frames"},
    "sandboxes/rlrf_sandboxes/values.py": {"_loads": "frames", "read_json": "frames"},
    "trainers/rlrf_trainers/run/checkpoints.py": {"_STEP": OURS, "Checkpoints.load": FILES},
    "trainers/rlrf_trainers/commands/discover.py": {"_RunsFile._read": FILES},
    "trainers/rlrf_trainers/model/fetch.py": {"_HUB_ID": OURS, "_fetch_part": OURS},
    "trainers/rlrf_trainers/model/chat.py": {
        "ChatTokenizer._safe_message": "chat",
        "ChatTokenizer.extend": "chat",
        "ChatTokenizer.parse": "trusted: the tokenizer's own patterns, as its author wrote them",
        "ChatTokenizer._round_trips": "trusted: what the chat template writes of a call of ours",
        "ChatTokenizer._parsed": "trusted: the tokenizer's own patterns, as its author wrote them",
    },
    "trainers/rlrf_trainers/engines/hf.py": {"HFPolicy.update_weights": OURS},
    "rlrf/redact.py": dict.fromkeys(("_OPTION", "_GIVEN", "_ADDRESS", "safe_url"), OURS),
    "rlrf/transport.py": {
        "JsonClient._read": "trusted: unpacked to a bounded size",
        "JsonClient.post": "server",
        "_LONE": "server",
        "_said": "server",
    },
    "trainers/rlrf_trainers/engines/openai.py": dict.fromkeys(
        ("_TOO_LONG", "_OF_ONE", "_of_all"), "server"
    ),
    "trainers/rlrf_trainers/core/preflight.py": {"plain": OURS},
    "trainers/rlrf_trainers/run/trackers.py": {"open_trackers": FILES, "_wandb_id": FILES},
}  # fmt: skip

PARSERS = {
    "loads", "raw_decode", "JSONDecoder", "literal_eval", "get_close_matches", "SequenceMatcher",
    "Decimal", "genops", "decompress", "decompressobj", "b64decode", "normalize", "fromisoformat",
    "parse_response", "_loads", "fromstring", "unpack", "HTMLParser", "unified_diff", "ndiff",
}  # fmt: skip


def sites() -> Iterator[tuple[str, str]]:
    """``(file, function or global)`` of every regex, parser and decoder."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            yield from ((str(file.relative_to(ROOT)), where) for where in _sites(tree, ()))


def _sites(node: ast.AST, where: tuple[str, ...]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        inside = where
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = (*where, child.name)
        elif isinstance(child, ast.Assign) and not where and isinstance(child.targets[0], ast.Name):
            inside = (child.targets[0].id,)
        if isinstance(child, ast.Call):
            called = ast.unparse(child.func)
            module, _, name = called.rpartition(".")
            if (
                (module in ("re", "regex") and name != "escape")
                or name in PARSERS
                or called in ("ast.parse", "difflib.Differ", "shlex.split", "csv.reader")
            ):
                yield ".".join(inside)
        yield from _sites(child, inside)


def test_every_regex_parser_and_decoder_is_listed():
    missing = {f"{file}: {where}" for file, where in sites() if where not in SITES.get(file, {})}
    assert not missing, (
        f"{sorted(missing)} is not in SITES: name the probe that feeds it untrusted text, or why "
        "nothing untrusted reaches it"
    )
    listed = {value for entries in SITES.values() for value in entries.values()}
    unknown = {v for v in listed if v not in PROBES and not v.startswith("trusted: ")}
    assert not unknown


# --- what is expensive ------------------------------------------------------------------------

TWIN = 2**61 - 1  # all its multiples have one hash


def _repeated(*pieces: str) -> dict[str, Callable[[int], str]]:
    return {ascii(p): functools.partial(lambda p, n: p * (n // len(p)), p) for p in pieces}


TEXTS: dict[str, Callable[[int], str]] = {
    **_repeated(
        "`",
        "~",
        "```\n",
        "~~~\n",
        "```python\n",
        "``` a\n",
        "~~~```\n",
        "`~",
        "    ```\n",
        "```",
        "> ",
        "- ",
        "1. ",
        ">\n",
        "- - -\n",
        "* ",
        "#",
        "=\n",
        "|",
        "\t",
        " ",
        " \n",
        "\n",
        "\r\n",
        "\r",
        "\0",
        "\x0c",
        "\u2028",
        "\ud800",
        "\u0300\u0316",
        "\ufdfa",
        "\u202e",
        "\x1b[",
        "\x9b",
        "\x1b]",
        "\x1b[0",
        "[",
        "]",
        "(",
        "{",
        "}",
        '{"a":',
        "[[",
        '"',
        "'",
        "'''\n",
        '"""',
        "\\",
        "\\\n",
        '\\"',
        "<",
        "<a>",
        "</a>",
        "<think>",
        "</think>",
        "<think></think>",
        "<think>\n```\n",
        "<|im_end|>",
        "<tool_call>",
        "<tool_call>{",
        "</tool_call>",
        "<tool_call><function=f><parameter=a>",
        "</parameter>",
        "[TOOL_CALLS]f[ARGS]{",
        "<|python_tag|>{",
        '{"name": "f", "arguments": {',
        '\n{"name": "f", "arguments": {}} ',
        "\n[f(a=[",
        "Action: f\nAction Input: {",
        "</answer>",
        "<answer>",
        "<|channel|>",
        "<|channel|>final<|message|>",
        "9",
        "9 ",
        "0",
        "0.",
        "1e9 ",
        "-",
        "+1",
        "1e999999999 ",
        "sNaN ",
        "nan ",
        "Yes\n",
        "R 1 1\n",
        "at 0x",
        "at 0xfffff ",
        "x",
        "x ",
        "import a.",
        "a.b\n",
        "def f():\n",
        "if 1:\n ",
        "lambda:",
        "f'{",
        "else ",
        "not ",
        "é",
        "_",
        "x = 1\n",
        "answer",
        "rlrf stand-in reply",
        ".",
        "$",
        "%s",
        "{0}",
        "\u200b",
    ),
    "tildes and a backtick": lambda n: "~" * n + "`",
    "a fence at every depth": lambda n: "".join(" " * (i % 90) + "```\n" for i in range(n // 48)),
    "an import": lambda n: "import " + "a." * (n // 2) + "b",
    "a dotted name": lambda n: "a" + ".b" * (n // 2),
    "combining characters": lambda n: "a" + "\u0300\u0316" * (n // 2),
    "combining among spaces": lambda n: "7 " + "\u0316\u0300" * (n // 2) + " 7",
    "an escape without an end": lambda n: "\x1b[" + "0" * (n // 2) + " " * (n // 2),
    "an exponent": lambda n: "1e" + "9" * n,
    "digits and a point": lambda n: "0." + "3" * n,
    "twins": lambda n: " ".join(str(i * TWIN) for i in range(n // 22)),
    "lines of twins": lambda n: "\n".join(str(i * TWIN) for i in range(n // 22)),
    "json twins": lambda n: json.dumps([i * TWIN for i in range(n // 23)]),
    "encoded twins": lambda n: json.dumps(
        {"result": {"set": [{"int": hex(i * TWIN)} for i in range(n // 30)]}}
    ),
    "encoded keys": lambda n: json.dumps(
        {"result": {"dict": [[{"int": hex(i * TWIN)}, 1] for i in range(n // 33)]}}
    ),
    "an object of many keys": lambda n: json.dumps({f"k{i}": i for i in range(n // 14)}),
    "an object of one key": lambda n: "{" + ", ".join(['"answer": 1'] * (n // 13)) + "}",
    "a long key": lambda n: '{"' + "k" * n + '": 1}',
    "a number in json": lambda n: '{"answer": ' + "9" * n + "}",
    "a stand-in and points": lambda n: "rlrf stand-in reply" + "." * n,
    "many functions": lambda n: "".join(f"def g{i}():\n    pass\n" for i in range(n // 24)),
    "a long name": lambda n: "def " + "f" * n + "(): pass",
    "lines of numbers": lambda n: "1.50 2\n" * (n // 7),
}


QUICK = [
    *list(TEXTS)[-24:],
    *map(
        ascii, ("`", "~", "```\n", "> ", "- ", "[", "{", "9 ", "<think>", "\0", "\ud800", "\x1b[")
    ),
    *map(ascii, ("\u0300\u0316", "\\", "import a.", "x ", "\n", "<tool_call>{", "def f():\n", '"')),
    *map(
        ascii, ("<tool_call><function=f><parameter=a>", '{"name": "f", "arguments": {', "\n[f(a=[")
    ),
]


# --- who reads it -----------------------------------------------------------------------------


class _Tokenizer:
    """What defusing asks of a tokenizer."""

    all_special_tokens = ("<|im_end|>", "<|im_start|>", "<s>", "<<s>>", "<think>", "</s>")
    added_tokens_decoder: dict[int, str] = {0: "<tool_call>", 1: "<|channel|>"}
    is_fast = False


def _extract(text: str) -> None:
    for reply in (text, f"```python\n{text}\n```</answer>", f"- a\n  ```\n{text}"):
        extract(reply, entry="Solution.f")
    extract(text, "longest")
    extract(text, "last")


def _missing_entry(text: str) -> None:
    attempt = Attempt(text)
    missing_entry(attempt, "f")
    missing_entry(attempt, "Solution.f")
    attempt.function(1)


OUTPUT_CHECKERS = (Lines(), Text(), Tokens(), Tokens(1e-6), Exact(), OfficialLines())
RESULT_CHECKERS = (
    Returns(),
    Returns(1e-6),
    AnyOrder(),
    Equal(),
    OfficialReturns(),
    Results(),
    *(Oracle("f", 1e-6, order) for order in ("as is", "sorted", "set")),
)


def _output_checkers(text: str) -> None:
    raw = RawRun(stdout=text.encode("utf-8", "surrogatepass"))
    size = len(text.split())
    for checker in OUTPUT_CHECKERS:
        accepted(checker, raw, StdinCase("", raw.text[:-1] + "7"))
    for checker in MANY_ANSWERS.values():
        if not isinstance(checker, AnyOrder):
            given = f"{size} 1 " + "1 2 3 " * 9
            accepted(checker, raw, StdinCase(given, "Yes " + "1 " * size))


def _result(text: str) -> Any:
    words = text.split()
    try:
        return [int(w) if w.isdecimal() and len(w) < 50 else w for w in words]
    except ValueError:
        return words


def _result_checkers(text: str) -> None:
    for result in (text, _result(text), [[w] for w in _result(text)]):
        for checker in RESULT_CHECKERS:
            accepted(checker, RawRun(result=result), CallCase((), [*range(len(result))]))
    value_text([text, {text: (text,)}])


ERROR = ProgramError("E", "m", ((1, "f"),), 1)


def _explained(attempt: str, case: Any, raw: RawRun, checkers: Any, verdict: Verdict) -> None:
    for i, checker in enumerate(checkers):
        failure = Failure(1, Test(case, public=i % 2 == 0), verdict, raw)
        explain(Attempt(attempt), failure, Limits(), checker, quote=True)
    sdpo_compat.render(Attempt(attempt), [failure])


def _explain_output(text: str) -> None:
    printed = text.encode("utf-8", "surrogatepass")
    wanted = text.encode("utf-8", "replace").decode()[::2] + "\n7"
    raw = RawRun(stdout=printed, stderr=printed)
    _explained("x", StdinCase("", wanted), raw, OUTPUT_CHECKERS[::2], Verdict.WRONG_ANSWER)
    crash = RawRun(stdout=printed, stderr=printed, exit_code=1)
    _explained("x", StdinCase("", "7"), crash, [None, None], Verdict.RUNTIME_ERROR)
    _explained("x", StdinCase("", "7"), crash, [None, None], Verdict.OUTPUT_LIMIT)
    error = ProgramError(text, text, ((1, text),) * 20, 1)
    _explained(text, StdinCase("", "7"), RawRun(error=error), [None], Verdict.RUNTIME_ERROR)


def _explain_result(text: str) -> None:
    for result in (text, _result(text)):
        wanted = [*range(len(result))]
        raw = RawRun(result=result, stdout=text.encode("utf-8", "replace"))
        _explained("x", CallCase((), wanted), raw, [None, AnyOrder()], Verdict.WRONG_ANSWER)
    _explained(text, CallCase((), 1), RawRun(error=ERROR), [None], Verdict.RUNTIME_ERROR)


@functools.cache
def _rules() -> list[tuple[FormatRules, Any]]:
    made = [FormatRules(rule=rule) for rule in RULES]
    return [(env, env._find_task(env.tasks()[0])) for env in made]


def _format_rules(text: str) -> None:
    for env, task in _rules():
        env.grade(task, text)
        env.grade(task, RULES[env.rule].write(text.encode("utf-8", "replace").decode()))


def _frames(text: str) -> None:
    for kind in ("call", "stdin", "serve"):
        frame = {
            "status": 0, "message": text.encode("utf-8", "replace").decode("latin-1"),
            "limit": None, "stdout": "", "stderr": "", "starved": False, "cpu": 0.0, "wall": 0.0,
            "rss": 0,
        }  # fmt: skip
        with contextlib.suppress(ValueError, TypeError, KeyError):
            slot._raw_run(frame, kind)
    slot.program_error({"type": text, "message": text, "frames": [[1, text]] * 9, "line": 1})


def _server(text: str) -> None:
    transport = importlib.import_module("rlrf.transport")
    openai = importlib.import_module("rlrf_trainers.engines.openai")
    data = text.encode("utf-8", "surrogatepass")
    transport._LONE.sub(b"", data)
    said = transport._said(data[:65_536]).lower()  # no more is read of what is refused
    openai._TOO_LONG.search(said)
    openai._OF_ONE.search(said)
    openai._of_all({"top_k": 1}).search(said)


def _split_reasoning(text: str) -> None:
    split = importlib.import_module("rlrf.reasoning").split_reasoning
    for reply in (text, f"<think>{text}", f"<think>{text}</think>{text}", f"```\n{text}"):
        split(reply)
    split(text, "<think>")
    split(text, "<|channel|>analysis<|message|>")


PARAMETERS = {
    "type": "object",
    "properties": {
        "a": {"type": ["integer", "array", "null"], "items": {"type": "string"}},
        "b": {"enum": ["x", "y"], "pattern": "^(a+)+$"},
        "c": {"anyOf": [{"items": {"$ref": "#"}, "uniqueItems": True}, {"type": "null"}]},
    },
    "patternProperties": {"^(x+x+)+y$": {"type": "integer"}},
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
WRITTEN = {
    "hermes_json": '<tool_call>{"name": "f", "arguments": {"a": %s}}</tool_call>',
    "qwen3_coder_xml": "<tool_call><function=f><parameter=a>%s</parameter></function></tool_call>",
    "llama_json": '<|python_tag|>{"name": "f", "parameters": {"a": %s}}',
    "llama_pythonic": "[f(a=%s)]",
    "mistral": "[TOOL_CALLS]f[ARGS]{%s}",
    "react": "Action: f\nAction Input: {%s}",
    "json": '```json\n{"name": "f", "arguments": {"a": %s}}\n```',
}


def _parse_calls(text: str) -> None:
    tools = importlib.import_module("rlrf.tools")
    assert WRITTEN.keys() == tools.FORMATS.keys()
    for format, written in WRITTEN.items():
        before, _, behind = written.partition("%s")
        for reply in (text, before + text + behind, before + json.dumps(text) + behind):
            tools.parse(reply, format, TOOLS, split=False)  # the rest is split_reasoning's


def _validate(text: str) -> None:
    tools = importlib.import_module("rlrf.tools")
    words: list[Any] = text.split()
    objects = [{w: i} for i, w in enumerate(words)]
    for name, value in (("a", words), ("b", text), ("c", objects), ("c", [words, text]), (text, 1)):
        call = tools.Call("f", {name: value, "xxxx": 1})
        assert len(tools.check(call, TOOLS).message) < 3000
    assert len(tools.check(tools.Call(text, {w: w for w in words}), TOOLS).message) < 3000


def _turn(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": text}}
    chat = _chat()
    chat._safe_message({"role": "assistant", "content": None, "tool_calls": [call]})
    chat.extend([1, 2], ({"role": "user", "content": text},))


@functools.cache
def _chat() -> Any:
    chat = importlib.import_module("rlrf_trainers.model.chat")
    return chat.ChatTokenizer(importlib.import_module("tests.tiny_model").tiny_tokenizer())


def _feedback(text: str) -> None:
    feedback = Feedback([Segment("wrong_answer", text, span=(0, 1)) for _ in range(3)])
    feedback.at_level("located")
    feedback.render(1000)


def _leaks(text: str) -> None:
    text = text[: len(text) // 2]  # it is read as a value twice, as a key, and twice in a prompt
    texts.is_answer(text)
    texts.is_tests(text)
    texts.is_program(text)
    hidden, there = texts.Hidden({"answer": text, text: [text]}), texts.Text(f"{text} {text}")
    found = [secret for secret in hidden.secrets if there.holds(secret)]
    for secret in found[:2]:  # of at most so many as _ANSWERS each costs a pass
        leaks._told("", secret, there)
        leaks._is_cued(there, secret)
        leaks._is_choice(there, secret)
    program = texts.Program(text)
    program.quoted(text, "")
    program.is_told(text)


PROBES: dict[str, Callable[[str], None]] = {
    "clean_text": lambda text: (clean_text(text, 1 << 30), _feedback(text))[1],
    "defuse": lambda text: (defuse(text, _Tokenizer()), None)[1],
    "extract": _extract,
    "missing_entry": _missing_entry,
    "checkers of output": _output_checkers,
    "checkers of results": _result_checkers,
    "explain output": _explain_output,
    "explain result": _explain_result,
    "format rules": _format_rules,
    "frames": _frames,
    "server": _server,
    "split_reasoning": _split_reasoning,
    "parse calls": _parse_calls,
    "validate": _validate,
    "chat": _turn,
    "leaks": _leaks,
}


def seconds(work: Callable[[str], None], text: str) -> float:
    # A collection looks at the objects of all tests, which is not the probe's work.
    collects = gc.isenabled()
    gc.disable()
    try:
        start = time.thread_time()
        work(text)
        return time.thread_time() - start
    finally:
        if collects:
            gc.enable()


def linear_pass(text: str) -> float:
    """CPU seconds of one look at every character, on this machine, now."""
    start = time.thread_time()
    sum(1 for c in text if c == "\n")
    return max(time.thread_time() - start, 1e-4)


NOISE_S = 0.03  # less than that says nothing of how it grows


def offends(work: Callable[[str], None], make: Callable[[int], str], longest: int) -> str | None:
    """How a probe's time grows too fast; None if it does not."""
    size = longest // 64
    before = seconds(work, make(size))
    while size < longest:
        size *= 4
        text = make(size)
        took = seconds(work, text)
        # Four times the text: 4 times the work, or 5 with a logarithm; 16 is quadratic.
        tries = 2
        while took > NOISE_S and took > 9 * max(before, NOISE_S / 9) and tries:
            tries -= 1
            before = max(before, seconds(work, make(size // 4)))
            took = min(took, seconds(work, text))
        if took > NOISE_S and took > 9 * max(before, NOISE_S / 9):
            return f"{before:.3f} s for {size // 4} characters, {took:.3f} s for {size}"
        before = took
    most = 1000 * linear_pass(text)
    return f"{took:.3f} s for {size} characters, over {most:.3f} s" if took > most else None


def offenders(name: str, longest: int, texts: Iterable[str] = TEXTS) -> dict[str, str]:
    found = {}
    for text, make in ((text, TEXTS[text]) for text in texts):
        told = offends(PROBES[name], make, longest)
        if told is not None:
            found[text] = told
    return found


DEAR = ("chat", "explain result", "explain output", "leaks")


@pytest.mark.parametrize("name", PROBES)
def test_work_on_untrusted_text_is_linear(name):
    try:
        PROBES[name]("x")
    except ImportError:
        pytest.skip(f"{name} is not here")
    # What is slow for every text is given fewer of them here, and all where there is time.
    assert not offenders(name, 6_400, QUICK[::4] if name in DEAR else QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_work_on_100_kb_of_untrusted_text_is_linear(name):
    try:
        PROBES[name]("x")
    except ImportError:
        pytest.skip(f"{name} is not here")
    assert not offenders(name, 102_400, QUICK)
    assert not offenders(name, 12_800)


def test_the_measure_finds_what_is_quadratic():
    def quadratic(text: str) -> None:
        for i in range(0, len(text), 10):
            text[i:].count("never")

    assert offends(quadratic, lambda n: "x" * n, 200_000)
    assert not offends(lambda text: text.count("x") and None, lambda n: "x" * n, 200_000)
