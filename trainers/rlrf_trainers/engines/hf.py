"""The policy that runs a transformers model in this process."""

from __future__ import annotations

import contextlib
import difflib
import platform
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlrf import progress
from rlrf.errors import (
    PromptError,
    PromptTooLongError,
    RlrfError,
    UsageError,
    check_whole,
    describe,
)
from rlrf.messages import Messages
from rlrf.notices import notice
from rlrf.policy import Completion, Prompt, SamplingParams, TokenScores
from rlrf.tools import check_format
from rlrf_trainers.config import MOST_ROLLOUTS, MOST_TOKENS
from rlrf_trainers.model import backbone, sampler
from rlrf_trainers.model.backbone import base_model
from rlrf_trainers.model.chat import ChatTokenizer, load_tokenizer
from rlrf_trainers.model.fetch import resolve_model


class HFPolicy:
    """Samples and scores with a transformers model, on the very module a trainer may be training.

    It implements :class:`rlrf.policy.Policy`. Calls from several threads take turns.

    Args:
        model: a loaded causal language model, PEFT-wrapped or not, or the folder or the name of
            one.
        tokenizer: its tokenizer; needed with a loaded model, else loaded from the same place.
        device: where to put the model; None leaves a loaded one where it is and puts others on
            the GPU if there is one.
        dtype: a :class:`torch.dtype` or its name; None leaves a loaded model as it is and others
            as they were saved, but float32 where a CPU multiplies 16 bits slowly.
        enable_thinking: the switch of that name of chat templates that have it; None for the
            template's own default.
        tool_format: how the model writes calls of tools, one of :data:`rlrf.tools.FORMATS`; None
            for what its chat template writes, or the tokenizer's own ``response_template``.
        max_batch_size: prompts that decode at once.
        max_context: tokens of prompt and completion together; None for what the model was built
            for.

    Attributes:
        model: the module.
        tokenizer: the tokenizer.
        end_ids: the ids that end a completion: those of the model's configuration, the
            tokenizer's end token and the well-known chat end tokens it has.
        context: tokens of prompt and completion together, or None for no limit.
        weight_version: the version of the last :meth:`update_weights`.

    Raises:
        UsageError: a model without a tokenizer, an unknown dtype, a device that cannot take it, a
            model that is not a causal language model; a number that is none; an unknown
            ``tool_format``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        enable_thinking: bool | None = None,
        tool_format: str | None = None,
        max_batch_size: int = 64,
        max_context: int | None = None,
    ) -> None:
        check_whole("max_batch_size", max_batch_size, most=MOST_ROLLOUTS)
        if max_context is not None:
            check_whole("max_context", max_context, most=MOST_TOKENS)
        device = _device(device)
        if tokenizer is not None and not all(
            callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")
        ):
            raise UsageError(
                f"tokenizer is {tokenizer!r:.200}; it must be a tokenizer of transformers, or None "
                "for the one beside the model"
            )
        if enable_thinking is not None and not isinstance(enable_thinking, bool):
            raise UsageError(
                f"enable_thinking is {enable_thinking!r:.80}; it must be true or false"
            )
        if tool_format is not None:
            check_format(tool_format)
        dtype = _dtype(dtype)
        self.source: Path | None = None  # the folder the model was read from
        if isinstance(model, (str, Path)):
            self.source = resolve_model(str(model))
            try:
                tokenizer = tokenizer or load_tokenizer(self.source)
                with (
                    backbone.quiet_transformers(),
                    progress.phase(f"loading the model {self.source.name}"),
                ):
                    model = backbone.load(self.source, dtype)
            except (OSError, LookupError, TypeError, ValueError, SafetensorError) as error:
                if isinstance(error, RlrfError):
                    raise
                raise UsageError(
                    f"the folder {str(self.source)!r} cannot be loaded as a causal language model "
                    f"with its tokenizer: {error}"
                ) from error
            device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if dtype is None and device.type == "cpu":
                dtype = _fit_for_cpu(base_model(model))
        if tokenizer is None:
            raise UsageError(
                "HFPolicy was given a loaded model but no tokenizer; pass tokenizer=..., or the "
                "model's folder instead of the model"
            )
        base = base_model(model)
        if not backbone.generates(base):
            raise UsageError(
                f"HFPolicy needs a causal language model of transformers, got "
                f"{type(base).__name__}; load it with AutoModelForCausalLM"
            )
        if all(p.is_meta for p in model.parameters()) and not hasattr(model, "hf_device_map"):
            raise UsageError(
                "HFPolicy was given a model on the device meta, which has shapes and no weights; "
                "load it with from_pretrained, on cpu or a GPU"
            )
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UsageError(
                "HFPolicy cannot sample with a prompt-learning PEFT adapter, whose virtual tokens "
                "have no ids; use LoRA"
            )
        if device is not None or dtype is not None:
            try:
                model.to(device=device, dtype=dtype)
            # torch without CUDA asserts it
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                as_dtype = "" if dtype is None else f" as dtype={dtype}"
                raise UsageError(
                    f"the model cannot be put on device={device}{as_dtype}; give device=cpu, or a "
                    "device of this machine that has memory for it, and a floating-point dtype: "
                    f"{describe(error)}"
                ) from error
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size = max_batch_size
        self.context: int | None = max_context or getattr(
            base.config.get_text_config(), "max_position_embeddings", None
        )
        self.chat = ChatTokenizer(
            tokenizer, _configured_end_ids(base), enable_thinking, tool_format
        )
        self.end_ids = self.chat.end_ids
        self.weight_version = 0
        self._lock = threading.RLock()

    def extend(
        self,
        prefix_ids: Sequence[int],
        new_messages: Messages,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """``prefix_ids``, the end of that turn, ``new_messages`` and the start of the next reply.

        Raises:
            UsageError: as :meth:`encode`.
        """
        return self.chat.extend(prefix_ids, new_messages, tools)

    def encode(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a chat, up to where the assistant's next reply begins.

        Raises:
            UsageError: no chat template, or one that refuses the messages.
        """
        with self._lock:
            return self.chat.encode(messages, tools)

    def check_tools(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """See that this model can call tools: see :meth:`ChatTokenizer.check_tools`.

        Raises:
            UsageError: its chat template shows none, or nobody can read its calls.
        """
        with self._lock:
            self.chat.check_tools(tools)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion per prompt, in order; see :func:`rlrf_trainers.model.sampler.sample`.

        A completion ends at any of :attr:`end_ids`, at a stop text (which, as on the OpenAI wire,
        is not part of ``text`` though its tokens are in ``token_ids``), after ``max_tokens`` or
        at the end of the context. Prompts with a ``seed`` of their own are sampled from it; the
        others from ``params.seed``, and without one from torch's global generator, so that
        :func:`torch.manual_seed` governs them.

        Raises:
            PromptTooLongError: a prompt fills the context.
            PromptError: the chat template refuses a prompt's messages, or leaves nothing of them.
            UsageError: no chat template.
            RlrfError: the model's logits are not finite.
        """
        with self._lock:
            prompt_ids = [self.chat.prompt_ids(p) for p in prompts]
            for ids in prompt_ids:
                if not ids:
                    raise PromptError(
                        "the chat template makes no token of the prompt; the first token of a "
                        "completion needs one before it"
                    )
                if self.context is not None and len(ids) >= self.context:
                    raise PromptTooLongError(len(ids), params.max_tokens, self.context)
            of_all = params.seed
            if of_all is None and any(p.seed is None for p in prompts):
                of_all = int(torch.randint(2**62, ()))
            seeds = [
                ((of_all or 0) % 2**64, i) if p.seed is None else (p.seed,)
                for i, p in enumerate(prompts)
            ]
            sampled = sampler.sample(
                self.model,
                prompt_ids,
                params,
                end_ids=self.end_ids,
                seeds=seeds,
                max_batch_size=self.max_batch_size,
                context=self.context,
                stop=self._stop_check(params.stop),
            )
            return [
                self._completion(prompt, ids, out, params.stop)
                for prompt, ids, out in zip(prompts, prompt_ids, sampled, strict=True)
            ]

    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        top_k: int | None = None,
    ) -> list[TokenScores]:
        """Log-probabilities of given completions at temperature 1.

        Args:
            prompt_ids: ids before each completion, at least one each.
            completion_ids: ids to score, as many sequences.
            top_k: most likely tokens to return beside each position.

        Raises:
            UsageError: not as many prompts as completions; an empty prompt; a sequence longer
                than the context.
        """
        if len(prompt_ids) != len(completion_ids):
            raise UsageError(
                f"score() was given {len(prompt_ids)} prompts and {len(completion_ids)} "
                "completions; it takes one of each"
            )
        for i, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            if not prompt:
                raise UsageError(
                    f"prompt {i} is empty; the first token of a completion needs one before it"
                )
            if self.context is not None and len(prompt) + len(completion) > self.context:
                raise UsageError(
                    f"sequence {i} has {len(prompt)} + {len(completion)} tokens but the policy's "
                    f"context is {self.context}; shorten the prompt or the completion"
                )
        with self._lock:
            return sampler.score(self.model, prompt_ids, completion_ids, top_k or 0)

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int = 0) -> None:
        """Copy tensors into the model, in place.

        Not needed by a trainer that trains this very module, and harmless there: a tensor that is
        the model's own is left alone. Tensors that are not given stay as they are.

        Args:
            weights: ``(name, tensor)`` pairs, named as in ``model.state_dict()``.
            version: kept in :attr:`weight_version`.

        Raises:
            UsageError: the model has no tensor of that name or of that shape.
        """
        with self._lock, torch.no_grad():
            own: dict[str, Tensor] = self.model.state_dict()
            for name, tensor in weights:
                if name not in own:
                    near = difflib.get_close_matches(name, own, n=3)
                    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
                    raise UsageError(
                        f"the model has no tensor {name!r}; {hint or 'check its name'}"
                    )
                if own[name].shape != tensor.shape:
                    raise UsageError(
                        f"tensor {name!r} has the shape {tuple(tensor.shape)}, but the model's "
                        f"has {tuple(own[name].shape)}; both sides must be the same architecture"
                    )
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
            self.weight_version = version

    def _completion(
        self, prompt: Prompt, ids: list[int], out: sampler.Sampled, stop: Sequence[str]
    ) -> Completion:
        text = self.chat.decode(out.token_ids)
        offsets = self.chat.offsets(out.token_ids, text)
        cut = min((text.find(s) for s in stop if s in text), default=len(text))
        text = text[:cut]
        offsets = tuple((min(a, cut), min(b, cut)) for a, b in offsets)
        message, ranges = self.chat.read(ids, out.token_ids, text, offsets, prompt.tools)
        return Completion(
            prompt_ids=tuple(ids),
            token_ids=tuple(out.token_ids),
            logprobs=tuple(out.logprobs),
            text=text,
            finish_reason=out.finish_reason,
            message=message,
            offsets=offsets,
            weight_version=self.weight_version,
            ranges=ranges,
        )

    def _stop_check(self, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
        """Whether sampled ids end in a stop text, by decoding no more than could hold one."""
        if not stop:
            return None
        # Every token but a special one stands for at least one byte.
        reach = max(len(s.encode()) for s in stop) + 8

        def stopped(token_ids: list[int]) -> bool:
            tail = self.chat.decode(token_ids[-reach:])
            return any(s in tail for s in stop)

        return stopped


def _device(device: str | int | torch.device | None) -> torch.device | None:
    """The device, if it is one of this machine's.

    Raises:
        UsageError: it is none, or holds no weights (``meta``).
    """
    if device is None:
        return None
    accepted = ["cpu"]
    if (gpu := torch.accelerator.current_accelerator()) is not None:
        count = torch.accelerator.device_count()
        accepted += [gpu.type, *(f"{gpu.type}:{i}" for i in range(count))]
    with contextlib.suppress(RuntimeError, TypeError):
        found = torch.device(device)
        if str(found) in accepted and not isinstance(device, bool):
            return found
    raise UsageError(
        f"device is {device!r}; it must be one of {', '.join(accepted)}, or None for the model's "
        "own, else the GPU if there is one"
    )


def _fit_for_cpu(model: Any) -> torch.dtype | None:
    """float32 for a model of 16 bits on a CPU that multiplies those slowly; else None.

    An x86 CPU without AVX-512 converts each number on its own: a product of bf16 matrices takes
    4.5 times as long as one of float32, and a training step minutes.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    slow = capability in ("DEFAULT", "AVX2") and platform.machine().lower() in ("x86_64", "amd64")
    if not slow or getattr(model, "dtype", None) not in (torch.bfloat16, torch.float16):
        return None
    notice(
        "hf/dtype",
        f"this CPU has no AVX-512 (PyTorch says {capability}) and multiplies 16-bit numbers "
        f"several times slower than float32, so the model is loaded in float32, which takes twice "
        f"the memory; dtype='{str(model.dtype).removeprefix('torch.')}' leaves it as it was saved",
    )
    return torch.float32


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(found, torch.dtype):
        raise UsageError(f"unknown dtype {dtype!r}; use 'float32', 'bfloat16' or 'float16'")
    return found


def _configured_end_ids(model: Any) -> set[int]:
    """The end tokens of a model's generation and model configuration; each holds one or many."""
    found: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return found
