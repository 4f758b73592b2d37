"""Logits of given completions after given prompts, with shared prompts computed once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Ids = Sequence[int]


def completion_logits(
    model: Any, prompts: Sequence[Ids], completions: Sequence[Ids], temperature: float = 1.0
) -> Tensor:
    """Logits that predict each completion token.

    Equal prompts run through the model once and their cache is repeated: a group of ``G``
    rollouts costs ``P + G * T`` tokens instead of ``G * (P + T)``. Gradients flow through.

    Args:
        model: a causal LM of transformers (PEFT-wrapped or not).
        prompts: ``[B]`` token ids, non-empty each.
        completions: ``[B]`` token ids, non-empty each.
        temperature: the logits are divided by it.

    Returns:
        ``[B, T, V]`` fp32, ``T`` the longest completion; what lies behind a shorter completion's
        end is meaningless and must be masked.
    """
    if _can_share(model):
        logits = _shared_prefix_logits(model, prompts, completions)
    else:
        logits = _plain_logits(model, prompts, completions)
    logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


def _can_share(model: Any) -> bool:
    # Activation checkpointing recomputes layers without the cache, and only a plain growing
    # cache can be repeated over rows.
    if model.training and _checkpoints_activations(model):
        return False
    return not any(
        kind not in ("full_attention", None)
        for kind in (getattr(model.config, "layer_types", None) or ())
    )


def _checkpoints_activations(model: Any) -> bool:
    # Renamed in transformers 5.23; the old name warns there.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        found = getattr(model, name, None)
        if found is not None:
            return bool(found)
    return False


def _shared_prefix_logits(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
    from transformers import DynamicCache

    device = next(model.parameters()).device
    index: dict[tuple[int, ...], int] = {}
    owner = [index.setdefault(tuple(p), len(index)) for p in prompts]  # [B] row -> prompt
    ids, attention = pad_left(list(index), device)  # [U, P]
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    out = model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **_keep(model, 1),
    )
    rows = torch.tensor(owner, device=device)
    first: Tensor = out.logits[:, -1:].index_select(0, rows)  # [B, 1, V] predicts the first token
    longest = max(len(c) for c in completions)
    if longest == 1:
        return first
    cache = out.past_key_values
    cache.batch_select_indices(rows)
    fed, fed_attention = pad_right([c[: longest - 1] for c in completions], device, longest - 1)
    attention = torch.cat([attention[rows], fed_attention], 1)  # [B, P + T - 1]
    positions = attention[:, : -(longest - 1)].sum(1, keepdim=True) + torch.arange(
        longest - 1, device=device
    )
    rest = model(
        input_ids=fed,
        attention_mask=attention,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).logits  # [B, T - 1, V]
    return torch.cat([first, rest], 1)


def _plain_logits(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> Tensor:
    device = next(model.parameters()).device
    longest = max(len(c) for c in completions)
    prompt_ids, prompt_mask = pad_left(prompts, device)
    fed, fed_mask = pad_right([c[: longest - 1] for c in completions], device, longest - 1)
    attention = torch.cat([prompt_mask, fed_mask], 1)
    logits: Tensor = model(
        input_ids=torch.cat([prompt_ids, fed], 1),
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        **_keep(model, longest),
    ).logits
    return logits[:, -longest:]


def _keep(model: Any, n: int) -> dict[str, int]:
    """Ask for the last ``n`` logits only, where the model can."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepts = "logits_to_keep" in inspect.signature(inner.forward).parameters
    return {"logits_to_keep": n} if accepts else {}


def pad_left(rows: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both ``[B, longest]``, padded on the left with id 0."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def pad_right(rows: Sequence[Ids], device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both ``[B, width]`` integers, padded on the right with id 0."""
    ids = torch.tensor([list(r) + [0] * (width - len(r)) for r in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
    return ids.long().view(len(rows), width), mask.long().view(len(rows), width)


def micro_batches(
    prompts: Sequence[Ids], completions: Sequence[Ids], max_tokens: int
) -> Iterator[list[int]]:
    """Row indices in batches of at most ``max_tokens`` padded completion tokens.

    Rows of equal prompt stay together (they share its forward); within that, rows of similar
    length, so that little is padding.
    """
    order = sorted(
        range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), len(completions[i]))
    )
    batch: list[int] = []
    longest = 0
    for i in order:
        longest = max(longest, len(completions[i]))
        if batch and longest * (len(batch) + 1) > max_tokens:
            yield batch
            batch, longest = [], len(completions[i])
        batch.append(i)
    if batch:
        yield batch
