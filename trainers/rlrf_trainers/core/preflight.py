"""What is found out before anything is paid for: that a run can work, and what it begins with."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlrf import Task
from rlrf.errors import RlrfError, UsageError
from rlrf_trainers.model.distributed import World

PROMPTS = 32
"""Prompts that are rendered at the start, to see whether they can be."""
WHOLE = 2**30
"""Bytes of weights up to which all of them are read to tell one model from another."""
_BLOCK, _BLOCKS = 1024, 64


# --- several processes ------------------------------------------------------------------------


def check_alike(world: World, facts: Mapping[str, Any]) -> None:
    """See that all processes were started alike; to be called on every one.

    Args:
        world: the processes.
        facts: JSON data by name; of other objects the type counts.

    Raises:
        UsageError: on every process, naming what differs.
    """
    everyone = world.gather({name: _text(value) for name, value in facts.items()})
    for name in dict.fromkeys(name for mine in everyone for name in mine):
        told = [mine.get(name, "missing") for mine in everyone]
        other = next((rank for rank, value in enumerate(told) if value != told[0]), None)
        if other is not None:
            raise UsageError(
                f"the processes of this run were not started alike: {name} is {_cut(told[0])} on "
                f"process 0 and {_cut(told[other])} on process {other}; give all of them the same "
                "configuration, data and model"
            )


def plain(value: Any) -> Any:
    """A value as JSON data; of objects that are none the type, for their text may be an address."""
    return json.loads(_text(value))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=lambda other: f"<{type(other).__name__}>")


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:150] + "..." + text[-40:]


# --- tasks ------------------------------------------------------------------------------------


def digest_of_tasks(tasks: Sequence[Task]) -> str:
    """A digest of the tasks' prompts, in their order."""
    found = hashlib.sha256()
    for task in tasks:
        found.update(f"{_text([task.id, task.messages])}\n".encode())
    return found.hexdigest()


def check_questions(tasks: Sequence[Task], roles: Sequence[str], whose: str) -> None:
    """See that every prompt ends with a message that a policy can answer.

    Args:
        tasks: all of them.
        roles: from whom the last message of a prompt may be.
        whose: what the tasks are called in the message.

    Raises:
        UsageError: naming the first that does not.
    """
    wrong = [t for t in tasks if (t.messages[-1]["role"] if t.messages else "") not in roles]
    if wrong:
        first = wrong[0]
        last = repr(first.messages[-1]["role"]) if first.messages else "missing"
        raise UsageError(
            f"the prompt of {len(wrong)} of the {len(tasks)} {whose} does not end with a message "
            f"of the {' or '.join(roles)}: the last one of task {first.id!r} is {last}. There is "
            "nothing to answer; mend the environment's tasks"
        )


def check_prompts(tasks: Sequence[Task], encode: Any, context: int | None) -> None:
    """See that a policy can be shown the tasks: of some, :data:`PROMPTS` at most.

    One prompt that cannot be shown costs itself alone, when it is its turn.

    Args:
        tasks: some are drawn from them, always the same.
        encode: messages to ids.
        context: of the model, or None for no limit.

    Raises:
        UsageError: no prompt can be rendered, or none leaves room for a reply.
    """
    chosen = random.Random(0).sample(range(len(tasks)), min(PROMPTS, len(tasks)))
    lengths: list[int] = []
    failures: list[Exception] = []
    for task in (tasks[i] for i in chosen):
        try:
            lengths.append(len(encode(task.messages)))
        except (RlrfError, TypeError, ValueError) as error:  # a lone surrogate, say
            failures.append(error)
    if not lengths:
        raise failures[0]
    if context is not None and min(lengths) >= context:
        raise UsageError(
            f"no prompt leaves room for a reply: the shortest of {len(lengths)} that were looked "
            f"at has {min(lengths)} tokens, and the model's context is {context}; take a model "
            "with a longer one, or other tasks"
        )


# --- the model --------------------------------------------------------------------------------


def digest_of_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, dtypes, shapes and contents.

    Up to :data:`WHOLE` bytes in all every number counts (about a second per gigabyte); of more,
    up to 64 blocks of 1024 numbers of each tensor, evenly spread.
    """
    tensors = list(tensors)
    whole = sum(t.numel() * t.itemsize for _, t in tensors) <= WHOLE
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        if not whole and len(flat) > _BLOCK * _BLOCKS:
            step = (len(flat) - _BLOCK) / (_BLOCKS - 1)
            starts = [int(i * step) for i in range(_BLOCKS)]
            flat = torch.cat([flat[start : start + _BLOCK] for start in starts])
        found.update(flat.cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def kept_weights(model: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a model that training leaves as they are: those without a gradient."""
    return [
        (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not tensor.requires_grad
    ]


def digest_of_tokenizer(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary and chat template."""
    about = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(_text(about).encode()).hexdigest()
