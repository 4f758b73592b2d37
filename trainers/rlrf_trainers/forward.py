"""Logits of given completions after given prompts, with shared prompts computed once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Ids = Sequence[int]


class Layout:
    """The order in which the tokens of a batch of completions lie in a flat ``[N, ...]`` tensor.

    Completions differ in length; as ``[B, T, V]`` much of a batch would be padding, at a hundred
    thousand logits a token. So logits are flat, ``N`` the number of real tokens: first every
    row's first token, then the rest in buckets of rows of similar length. The order depends on
    the lengths alone, so student and teacher share it.

    Attributes:
        rows: ``[N]`` the row of each token.
        positions: ``[N]`` its position in the row.
        buckets: per bucket the rows, longest first, that have more than one token.
    """

    def __init__(self, completions: Sequence[Ids]) -> None:
        self.completions = completions
        self.lengths = [len(c) for c in completions]
        longer = sorted(
            (i for i, n in enumerate(self.lengths) if n > 1), key=lambda i: -self.lengths[i]
        )
        self.buckets: list[list[int]] = []
        for i in longer:
            # A bucket's shortest row is at least 3/4 of its longest: little padding, few calls.
            if not self.buckets or 4 * self.lengths[i] < 3 * self.lengths[self.buckets[-1][0]]:
                self.buckets.append([])
            self.buckets[-1].append(i)
        order = [(i, 0) for i in range(len(completions))]
        order += [(i, t) for rows in self.buckets for i in rows for t in range(1, self.lengths[i])]
        self.rows = torch.tensor([i for i, _ in order])
        self.positions = torch.tensor([t for _, t in order])

    def flat(self, values: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
        """Per-row sequences (ids, masks, log-probabilities) as one ``[N]`` tensor."""
        pairs = zip(self.rows.tolist(), self.positions.tolist(), strict=True)
        return torch.tensor([values[i][t] for i, t in pairs], device=device)

    def padded(self, flat: Tensor) -> Tensor:
        """``[N]`` as ``[B, T]``, zeros behind the ends of rows; differentiable."""
        out = flat.new_zeros(len(self.lengths), max(self.lengths))
        return out.index_put((self.rows.to(flat.device), self.positions.to(flat.device)), flat)


def completion_logits(
    model: Any, prompts: Sequence[Ids], layout: Layout, temperature: float = 1.0
) -> Tensor:
    """Logits that predict each completion token.

    Equal prompts run through the model once and their cache is repeated: a group of ``G``
    rollouts costs ``P + G * T`` tokens instead of ``G * (P + T)``. Gradients flow through.

    Args:
        model: a causal LM of transformers (PEFT-wrapped or not).
        prompts: ``[B]`` token ids, non-empty each.
        layout: of the ``[B]`` completions, non-empty each.
        temperature: the logits are divided by it, in fp32.

    Returns:
        ``[N, V]`` in the order of ``layout``, in the model's dtype (fp32 under a temperature).
    """
    if _can_share(model):
        logits = _shared_prefix_logits(model, prompts, layout)
    else:
        logits = _plain_logits(model, prompts, layout)
    return logits if temperature == 1.0 else logits.float() / temperature


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


def _shared_prefix_logits(model: Any, prompts: Sequence[Ids], layout: Layout) -> Tensor:
    from transformers import DynamicCache

    device = next(model.parameters()).device
    index: dict[tuple[int, ...], int] = {}
    owner = torch.tensor([index.setdefault(tuple(p), len(index)) for p in prompts])  # [B]
    ids, attention = pad_left(list(index), device)  # [U, P]
    out = model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
        **_keep(model, 1),
    )
    prefix = out.past_key_values
    pieces = [out.logits[:, -1].index_select(0, owner.to(device))]  # [B, V] the first tokens'
    for rows in layout.buckets:
        width = layout.lengths[rows[0]] - 1
        owners = owner[rows].to(device)
        cache = DynamicCache(config=model.config)
        for i, layer in enumerate(prefix.layers):
            cache.update(layer.keys[owners], layer.values[owners], i)
        fed, mask = pad_right([layout.completions[i][:-1] for i in rows], device, width)
        seen = attention[owners]
        logits = model(
            input_ids=fed,
            attention_mask=torch.cat([seen, mask], 1),
            position_ids=seen.sum(1, keepdim=True) + torch.arange(width, device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits  # [rows, width, V]
        pieces.append(logits[mask.bool()])
    return torch.cat(pieces)


def _plain_logits(model: Any, prompts: Sequence[Ids], layout: Layout) -> Tensor:
    device = next(model.parameters()).device
    longest = max(layout.lengths)
    prompt_ids, prompt_mask = pad_left(prompts, device)
    fed, fed_mask = pad_right([c[:-1] for c in layout.completions], device, longest - 1)
    attention = torch.cat([prompt_mask, fed_mask], 1)
    logits: Tensor = model(
        input_ids=torch.cat([prompt_ids, fed], 1),
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        **_keep(model, longest),
    ).logits
    return logits[:, -longest:][layout.rows.to(device), layout.positions.to(device)]


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
    """Row indices in batches of at most ``max_tokens`` completion tokens (or one row).

    Rows of equal prompt stay together, because they share its forward.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))
    batch: list[int] = []
    tokens = 0
    for i in order:
        if batch and tokens + len(completions[i]) > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += len(completions[i])
    if batch:
        yield batch
