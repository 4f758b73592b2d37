"""Between chat messages and token ids: rendering, appending, decoding.

What a policy with its own tokenizer needs around a sampler. Three things hold:

- text that comes from an environment never becomes a control token;
- a later turn is *appended* to the ids of the earlier ones; nothing sampled is tokenized again;
- decoding knows which characters each sampled token stands for.

Why: design/token-ids.md.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError

from rlrf.errors import PromptError, UsageError
from rlrf.feedback import defuser, token_offsets
from rlrf.messages import Message, Messages, assistant, joined, user
from rlrf.policy import Prompt
from rlrf.reasoning import opened_by, split_reasoning
from rlrf.tools import FORMATS, Call, Parsed, check_format, check_specs, parse, wire_calls

_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
)
"""End tokens by name: saved configurations often list only one of a model's two."""

_STAND_IN = Call("rlrf_stand_in", {"x": "y"})
_BY_TEMPLATE = (
    "hermes_json",
    "qwen3_coder_xml",
    "mistral",
    "react",
    "llama_pythonic",
    "json",
    "llama_json",
)
"""Formats to try on what a chat template writes; those that read the others' too come last."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class ChatTokenizer:
    """A tokenizer with a chat template, as a policy uses it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        end_ids: end tokens the model's configuration names; those of the tokenizer and of its
            chat template are added.
        enable_thinking: passed to the chat template when not None; templates that have no such
            switch ignore it.
        tool_format: how the model writes calls, one of :data:`rlrf.tools.FORMATS`; None for what
            its chat template writes, or the tokenizer's own ``response_template``.

    Raises:
        UsageError: an unknown ``tool_format``.
    """

    def __init__(
        self,
        tokenizer: Any,
        end_ids: Iterable[int] = (),
        enable_thinking: bool | None = None,
        tool_format: str | None = None,
    ) -> None:
        if tool_format is not None:
            check_format(tool_format)
        self.tokenizer = tokenizer
        self.tool_format = tool_format
        self._name = getattr(tokenizer, "name_or_path", None) or "this model"
        self._template_options = (
            {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        )
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        special = {i: str(token) for i, token in added.items() if token.special}
        self._guard = defuser(tokenizer)
        # What an assistant turn may not contain; its <think> and <tool_call> are its own.
        self._own_guard = defuser(SimpleNamespace(all_special_tokens=list(special.values())))
        self._special = special
        self._invisible = set(special) | set(tokenizer.all_special_ids)
        self._bytes: dict[int, bytes] = {}
        named = {i for i, text in special.items() if text in _END_TOKENS}
        if tokenizer.eos_token_id is not None:
            named.add(tokenizer.eos_token_id)
        self.end_ids: frozenset[int] = frozenset({*end_ids, *named})

    # -- rendering ------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt; they start with its ``prefix_ids`` if it has them."""
        if prompt.prefix_ids is None:
            return self.encode(prompt.messages, prompt.tools)
        return self.extend(prompt.prefix_ids, prompt.new_messages, prompt.tools)

    def encode(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a chat up to where the assistant's next reply begins.

        Raises:
            UsageError: the tokenizer has no chat template.
            PromptError: the template refuses the messages.
        """
        return self._ids(self._render(messages, tools, reply_next=True))

    def extend(
        self,
        prefix_ids: Sequence[int],
        new_messages: Messages,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """``prefix_ids``, the end of that turn, ``new_messages`` and the start of the next reply.

        The end of the turn is added only if the sampled ids lack it (a reply that was cut off, or
        ended by another token). What to add is read off a stand-in conversation, because
        templates may render an earlier turn differently once it is not the last (they drop its
        thinking, for one), and what was sampled must stay as it was.

        Raises:
            UsageError: as :meth:`encode`.
        """
        mark = "rlrf stand-in reply"
        said = str(new_messages)
        if mark in said:  # one point more than anybody writes behind it; in one pass
            mark += "." * (1 + max(len(found) for found in re.findall(r"\.*", said)))
        before = (user("Hello."), _stand_in(mark, new_messages))
        # Both from the end of the reply's text on: alone, and with the new messages after it.
        alone = self._render(before, tools, reply_next=False)
        onward = self._render((*before, *new_messages), tools, reply_next=True)
        if mark not in alone or mark not in onward:
            raise UsageError(
                f"the chat template of {self._name!r} leaves out what the assistant said, so a "
                "turn cannot be appended to it; use a template that renders every message"
            )
        alone, onward = alone.rpartition(mark)[2], onward.rpartition(mark)[2]
        ends = filter(None, (self.tokenizer.decode([i]) for i in self.end_ids))
        # The end of the turn stands in both; one that is only in `onward` ends a new message.
        places = ((onward.find(end), len(end)) for end in ends)
        at = min((p for p, n in places if p >= 0 and alone.startswith(onward[: p + n])), default=0)
        ids = self._ids(onward[at:])
        if ids and prefix_ids and prefix_ids[-1] == ids[0] and ids[0] in self.end_ids:
            ids = ids[1:]
        return [*prefix_ids, *ids]

    def _render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], *, reply_next: bool
    ) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"the tokenizer of {self._name!r} has no chat template, so chat messages cannot "
                "be rendered; use an instruction-tuned model, or set tokenizer.chat_template to a "
                "Jinja template"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(
                [self._safe_message(m) for m in messages],
                tools=[_plain(t, self._guard) for t in tools] or None,
                add_generation_prompt=reply_next,
                tokenize=False,
                **self._template_options,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise PromptError(
                f"the chat template of {self._name!r} refuses "
                f"messages with the roles [{roles}]: {error}; give the environment's messages "
                "roles this model knows, or another chat template"
            ) from error
        return text

    def _safe_message(self, message: Message) -> dict[str, Any]:
        """The message without control tokens in its text, in the form templates expect."""
        guard = self._own_guard if message["role"] == "assistant" else self._guard
        safe: dict[str, Any] = _plain(message, guard)
        if "content" in safe:
            safe["content"] = joined(safe["content"])
        safe.pop("invalid_tool_calls", None)
        for call in safe.get("tool_calls") or ():
            function = call.get("function", call)
            if isinstance(function.get("arguments"), str):
                # A string on the OpenAI wire, an object in chat templates.
                try:
                    arguments = json.loads(function["arguments"])
                    if isinstance(arguments, dict):  # decoding may have uncovered escaped tokens
                        function["arguments"] = _plain(arguments, guard)
                except (ValueError, RecursionError):
                    continue
        return safe

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    # -- decoding -------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def offsets(self, token_ids: Sequence[int], text: str) -> tuple[tuple[int, int], ...]:
        """Characters of ``text``, which :meth:`decode` gave, that each token stands for.

        ``[n]`` half-open ranges. A special token has an empty one; a character of several tokens
        belongs to the one that completes it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last = len(token_ids) - 1
        parts = [decoder.decode(self._piece(i), k == last) for k, i in enumerate(token_ids)]
        if "".join(parts) == text:
            ends = list(itertools.accumulate(map(len, parts)))
            return tuple(zip([0, *ends], ends, strict=False))
        # A tokenizer whose tokens are not simply bytes: the rule that holds for all is slower.
        visible = [i for i in token_ids if i not in self._invisible]
        of_visible = iter(token_offsets(self.tokenizer, visible))
        ranges, end = [], 0
        for i in token_ids:
            start, end = (end, end) if i in self._invisible else next(of_visible)
            ranges.append((min(start, len(text)), min(end, len(text))))
        return tuple(ranges)

    def _piece(self, token_id: int) -> bytes:
        """The bytes a token stands for, if it is of a byte-level or a sentencepiece tokenizer."""
        if token_id not in self._bytes:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if token_id in self._invisible or token is None:
                piece = b""
            elif token_id in self.tokenizer.added_tokens_decoder:
                piece = token.encode()
            elif all(c in _BYTE_LEVEL for c in token):
                piece = bytes(_BYTE_LEVEL[c] for c in token)
            elif len(token) == 6 and token.startswith("<0x"):
                piece = bytes.fromhex(token[3:5])
            else:
                piece = token.replace("▁", " ").encode()
            self._bytes[token_id] = piece
        return self._bytes[token_id]

    # -- reading --------------------------------------------------------------------------------

    def read(
        self,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        text: str,
        offsets: Sequence[tuple[int, int]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[Message, tuple[tuple[int, int], ...]]:
        """The assistant message in sampled ids, and the characters of ``text`` its content is.

        The reasoning is beside the content; a section that the prompt has opened counts, and so do
        marks that are special tokens. Calls of tools are read by :func:`rlrf.tools.parse` where
        the format is given or the chat template writes it; else by the tokenizer's own
        ``response_template``.

        Args:
            prompt_ids: what was completed.
            token_ids: what was sampled.
            text: its text, as from :meth:`decode`, or the head of it.
            offsets: as from :meth:`offsets`, within ``text``.
            tools: the tools that could be called.
        """
        marked, plain = self._marked(token_ids, text, offsets)
        reply = split_reasoning(marked, self._opened(prompt_ids))
        start, end, reasoning = plain(reply.start), plain(reply.end), reply.reasoning
        ranges: tuple[tuple[int, int], ...] = ((start, end),)
        call_id = f"call_{len(prompt_ids)}"
        format = (self.tool_format or self._written_format) if tools else None
        if format is not None:
            found = parse(marked[reply.start : reply.end], format, tools, split=False)
            message, ranges = _in_text(found, text, lambda at: plain(reply.start + at), call_id)
        elif self._has_response_template:
            message, ranges, reasoning = self._by_template(
                prompt_ids, token_ids, text, (start, end), tools, reasoning
            )
        else:
            message = assistant(text[start:end])
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        return message, ranges

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """See that this model can be told of tools and that its calls can be read.

        Raises:
            UsageError: it cannot, or they cannot; a tool is none, or its schema is.
        """
        check_specs(tools)
        question = (user("Hello."),)
        if self._render(question, tools, reply_next=True) == self._render(
            question, (), reply_next=True
        ):
            raise UsageError(
                f"the chat template of {self._name!r} does not show tools, which the environment "
                "has; use a model that was trained to call tools, or another chat template"
            )
        if self.tool_format is None and self._written_format is None and not self._round_trips:
            also = (
                "its tokenizer's response_template does not read"
                if self._has_response_template
                else "its tokenizer has no response_template for"
            )
            raise UsageError(
                f"the environment has tools, but calls of {self._name!r} cannot be read: {also} "
                "what its chat template writes, which is in none of the formats known here; give "
                f"tool_format (one of {', '.join(FORMATS)}), or set tokenizer.response_template"
            )

    def _by_template(
        self,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        text: str,
        answer: tuple[int, int],
        tools: Sequence[Mapping[str, Any]],
        reasoning: str | None,
    ) -> tuple[Message, tuple[tuple[int, int], ...], str | None]:
        """What the tokenizer's own ``response_template`` reads: message, ranges and reasoning."""
        start, end = answer
        message, ranges = assistant(text[start:end]), (answer,)
        try:
            parsed = self._parsed(prompt_ids, token_ids, tools)
            calls = [
                _wire_call(call, f"call_{len(prompt_ids)}_{i}")
                for i, call in enumerate(parsed.get("tool_calls") or ())
            ]
        except Exception as error:  # whatever a model wrote must not end the batch
            if tools and start < end:
                why = f"the markup of the reply cannot be read: {type(error).__name__}"
                message["invalid_tool_calls"] = [_invalid(text[start:end], why)]
            return message, ranges, reasoning
        thought = _thought(parsed) if reasoning is None else None
        if (start == end and reasoning is not None) or not (calls or thought):
            return message, ranges, reasoning  # what it thought of calling is no call
        content = parsed.get("content") or ""
        at = text.rfind(content) if content else -1
        message["content"] = content
        if calls:
            message["tool_calls"] = calls
            message["content"] = content or None
        return message, ((at, at + len(content)),) if at >= 0 else (), reasoning or thought

    @property
    def _has_response_template(self) -> bool:
        return getattr(self.tokenizer, "response_template", None) is not None

    @functools.cached_property
    def _written(self) -> tuple[str, str, str]:
        """How the chat template writes a call: before it, the call itself, and after it."""
        mark = "rlrf stand-in reply"
        call: Message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**wire_calls((_STAND_IN,))[0], "id": "rlrfcall1"}],  # as Mistral has it
        }
        try:
            said, written = (
                self._render((user("Hello."), reply), (), reply_next=False)
                for reply in (assistant(mark), call)
            )
        except UsageError:
            return "", "", ""
        start = _common(said.partition(mark)[0], written)
        rest = written[start:]
        end = len(rest) - _common(said.rpartition(mark)[2][::-1], rest[::-1])
        return written[:start], rest[:end], rest[end:]

    @functools.cached_property
    def _written_format(self) -> str | None:
        """The format in which the chat template writes a call and nothing beside it, if known."""
        for format in _BY_TEMPLATE:
            found = parse(self._written[1], format, split=False)
            calls = [(call.name, call.arguments) for call in found.calls]
            if calls == [(_STAND_IN.name, _STAND_IN.arguments)] and not found.content.strip():
                return format
        return None

    @functools.cached_property
    def _round_trips(self) -> bool:
        """Whether ``response_template`` reads what the chat template writes."""
        before, call, behind = self._written
        if not self._has_response_template or not call:
            return False
        try:
            parsed = self.tokenizer.parse_response(call + behind, prefix=before)
            calls = [_wire_call(found, "")["function"] for found in parsed["tool_calls"]]
        except Exception:  # the author's patterns, which may fail in any way
            return False
        return calls == [wire_calls((_STAND_IN,))[0]["function"]]

    def _marked(
        self, token_ids: Sequence[int], text: str, offsets: Sequence[tuple[int, int]]
    ) -> tuple[str, Callable[[int], int]]:
        """``text`` with its special tokens, by which some families think and call.

        And where in ``text`` a character of it stands.
        """
        marks = [
            "" if i in self.end_ids else self._special.get(i, text[a:b])
            for i, (a, b) in zip(token_ids, offsets, strict=True)
        ]
        marked = "".join(marks)
        if marked == text:
            return text, lambda at: at
        starts = [0, *itertools.accumulate(map(len, marks))]

        def plain(position: int) -> int:
            i = bisect_right(starts, position) - 1
            if i >= len(offsets):
                return len(text)
            inside = 0 if token_ids[i] in self._special else position - starts[i]
            return offsets[i][0] + inside

        return marked, plain

    def _opened(self, prompt_ids: Sequence[int]) -> str:
        """The mark of reasoning with which the prompt ends, if it does."""
        return opened_by(self.tokenizer.decode(list(prompt_ids[-32:])))

    def _parsed(
        self,
        prompt_ids: Sequence[int],
        token_ids: Sequence[int],
        tools: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        parsed: dict[str, Any] = self.tokenizer.parse_response(
            list(token_ids), prefix=list(prompt_ids), tools=list(tools) or None
        )
        return parsed


def _plain(value: Any, guard: Callable[[str], str]) -> Any:
    """Plain data without control tokens: in its strings, and in the keys of its mappings."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {_plain(key, guard): _plain(item, guard) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, guard) for item in value]
    return value


def _thought(parsed: Mapping[str, Any]) -> str | None:
    """The reasoning in what a response template has read; None if there is none."""
    return parsed.get("reasoning_content") or parsed.get("thinking") or None


def _common(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _in_text(
    found: Parsed, text: str, plain: Callable[[int], int], call_id: str
) -> tuple[Message, tuple[tuple[int, int], ...]]:
    """The message of what was read in a reply, and its ranges; ``plain`` has the places."""
    ranges = tuple((plain(a), plain(b)) for a, b in found.ranges)
    ranges = tuple((a, b) for a, b in ranges if a < b)
    moved = dataclasses.replace(
        found,
        content="".join(text[a:b] for a, b in ranges),
        ranges=ranges,
        invalid=tuple(
            dataclasses.replace(call, span=(plain(call.span[0]), plain(call.span[1])))
            for call in found.invalid
        ),
    )
    return moved.message(call_id), ranges


def _invalid(text: str, why: str) -> dict[str, Any]:
    return {"text": text, "span": [0, len(text)], "status": "malformed", "why": why}


def _stand_in(mark: str, new_messages: Messages) -> Message:
    """An assistant turn ending in ``mark`` that ``new_messages`` may follow."""
    results = []
    for message in new_messages:
        if message["role"] != "tool":
            break
        results.append(message)
    if not results:
        return assistant(mark)
    arguments = json.dumps({"x": mark})
    # Templates refuse the result of a tool that nobody called.
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": result.get("tool_call_id", f"call{i}"),
                "type": "function",
                "function": {"name": result.get("name", "f"), "arguments": arguments},
            }
            for i, result in enumerate(results)
        ],
    }


def _wire_call(call: Mapping[str, Any], call_id: str) -> dict[str, Any]:
    """A parsed tool call as it is on the OpenAI wire."""
    function = call.get("function", call)
    arguments = function["arguments"]
    return {
        "id": call.get("id") or call_id,
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
        },
    }


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, reversed.

    Printable bytes stand for themselves; the others are numbered from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
