"""Hidden states of given completions after given prompts, with shared prompts computed once.

Why: design/forward.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlrf_trainers.model import backbone
from rlrf_trainers.model.backbone import Arguments, base_model
from rlrf_trainers.model.distributed import decoder_forward, is_sharded

Ids = Sequence[int]


class Layout:
    """The order in which the sampled tokens of a batch lie in a flat ``[N, ...]`` tensor.

    Completions differ in length; as ``[B, T, ...]`` much of a batch would be padding. So what is
    per token is flat: row after row, each row's sampled tokens in their order. Tokens that the
    environment put between turns are attended to, and are not among the ``N``. The order depends
    on the masks alone, so student and teacher share it even where the teacher's rows hold more
    text between the turns.

    Args:
        completions: ``[B]`` token ids, non-empty each.
        masks: ``[B]`` 1 where the policy sampled the token; None: everywhere.

    Attributes:
        rows: ``[N]`` the row of each token.
        positions: ``[N]`` its position in the completion.
        ranks: ``[N]`` how many sampled tokens stand before it in its row.
        counts: sampled tokens per row.
    """

    def __init__(
        self, completions: Sequence[Ids], masks: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.completions, self.masks = completions, masks
        self.lengths = [len(c) for c in completions]
        sampled = [
            [t for t in range(n) if masks is None or masks[i][t]]
            for i, n in enumerate(self.lengths)
        ]
        self.counts = [len(ts) for ts in sampled]
        self.rows = torch.tensor([i for i, ts in enumerate(sampled) for _ in ts], dtype=torch.long)
        self.positions = torch.tensor([t for ts in sampled for t in ts], dtype=torch.long)
        self.ranks = torch.tensor([k for ts in sampled for k in range(len(ts))], dtype=torch.long)

    def after(self, prefixes: Sequence[Ids]) -> Layout:
        """The same tokens, with tokens that were not sampled before each completion."""
        masks = self.masks or [(1,) * n for n in self.lengths]
        return Layout(
            [(*p, *c) for p, c in zip(prefixes, self.completions, strict=True)],
            [(*(0,) * len(p), *m) for p, m in zip(prefixes, masks, strict=True)],
        )

    def rows_of(self, rows: slice) -> Layout:
        """The layout of some rows alone."""
        masks = None if self.masks is None else self.masks[rows]
        return Layout(self.completions[rows], masks)

    def flat(self, values: Sequence[Sequence[Any]], device: torch.device) -> Tensor:
        """Per completion token (ids, log-probabilities), as ``[N]`` of the sampled ones."""
        pairs = zip(self.rows.tolist(), self.positions.tolist(), strict=True)
        return torch.tensor([values[i][t] for i, t in pairs], device=device)

    def padded(self, flat: Tensor) -> Tensor:
        """``[N]`` as ``[B, S]``, S the longest row's count, zeros behind the others."""
        out = flat.new_zeros(len(self.counts), max(self.counts))
        return out.index_put((self.rows.to(flat.device), self.ranks.to(flat.device)), flat)

    def unpadded(self, padded: Tensor) -> Tensor:
        """``[B, S]`` as ``[N]``: the inverse of :meth:`padded`."""
        return padded[self.rows.to(padded.device), self.ranks.to(padded.device)]

    def mask(self, device: torch.device) -> Tensor:
        """``[B, S]``: 1 where there is a token."""
        return self.padded(torch.ones(len(self.rows), device=device))


def completion_hidden(
    model: Any, prompts: Sequence[Ids], layout: Layout, *, logits: bool = False
) -> Tensor:
    """Hidden states from which the head predicts each sampled token.

    What prompts have in common runs through the model once and its cache is repeated: a group of
    ``G`` rollouts costs ``P + G * T`` tokens instead of ``G * (P + T)``, and so do the question
    of its teacher's prompts, which differ in the feedback behind it. Gradients flow through.

    Args:
        model: a causal LM of transformers (PEFT-wrapped or not).
        prompts: ``[B]`` token ids, non-empty each.
        layout: of the ``[B]`` completions.
        logits: give the model's own logits instead, ``[N, V]``: for models whose head
            :class:`rlrf_trainers.losses.vocabulary.Head` does not know.

    Returns:
        ``[N, H]`` in the order of ``layout``, in the model's dtype.
    """
    decoder = _Decoder(model, logits)
    if not can_share(model, logits=logits):
        return _plain(decoder, prompts, layout)
    return _shared_prefix(decoder, *_split_prefixes(prompts, layout))


def _split_prefixes(prompts: Sequence[Ids], layout: Layout) -> tuple[list[Ids], Layout]:
    """Shorten prompts to beginnings worth sharing; their rests precede the completions.

    Sorted prompts with a common beginning are neighbours. Two neighbours (with those that have
    joined them) share one if that makes fewer tokens in all.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(i)
    clusters: list[tuple[tuple[int, ...], list[int]]] = []  # beginning, rows
    for prompt in sorted(rows):
        own = rows[prompt]
        if clusters:
            start, others = clusters[-1]
            common = _common(start, prompt)
            shared_now = len(start) + len(prompt)
            more = len(others) * (len(start) - common) + len(own) * (len(prompt) - common)
            if common and common + more < shared_now:
                clusters[-1] = (prompt[:common], others + own)
                continue
        clusters.append((prompt, own))
    length = {i: len(start) for start, members in clusters for i in members}
    rests = [tuple(p[length[i] :]) for i, p in enumerate(prompts)]
    if not any(rests):
        return list(prompts), layout
    return [p[: length[i]] for i, p in enumerate(prompts)], layout.after(rests)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two prompts begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def plain_logits(model: Any, prompts: Sequence[Ids], layout: Layout) -> Tensor:
    """The model's own logits ``[N, V]``, in one plain forward pass; to hold others against."""
    return _plain(_Decoder(model, True), prompts, layout)


def completion_logits(
    model: Any, prompts: Sequence[Ids], layout: Layout, temperature: float = 1.0
) -> Tensor:
    """Logits that predict each sampled token, all at once: simple, and large.

    Args:
        model: as in :func:`completion_hidden`, as are the others.
        prompts: ``[B]``.
        layout: of the ``[B]`` completions.
        temperature: the logits are divided by it, in fp32.

    Returns:
        ``[N, V]`` in the order of ``layout``, in the model's dtype (fp32 under a temperature).
    """
    logits = completion_hidden(model, prompts, layout, logits=True)
    return logits if temperature == 1.0 else logits.float() / temperature


class _Decoder:
    """The model without its head, or with it."""

    def __init__(self, model: Any, logits: bool) -> None:
        self.model, self.logits = model, logits
        self.base = base_model(model)
        self.device = next(model.parameters()).device
        self._arguments = Arguments.of(self.base if logits else self.base.get_decoder())

    def __call__(self, ids: Tensor, **wanted: Any) -> Tensor:
        """Hidden states (or logits) ``[B, T, ...]``; see :class:`Arguments` for the others."""
        inputs = {"input_ids": ids, **self._arguments(**wanted)}
        if self.logits:
            logits: Tensor = self.model(**inputs).logits
            return logits
        return decoder_forward(self.model, **inputs)


def can_share(model: Any, *, logits: bool = False) -> bool:
    """Whether prompts that begin alike can run through the model once; says so if not.

    Args:
        model: as in :func:`completion_hidden`.
        logits: whether the whole model is to be run, and not its decoder alone.
    """
    remedy = ""
    if is_sharded(model):
        why: str | None = "under FSDP every process must run as many forward passes as the others"
        remedy = "fsdp=False shares, where the model fits on one device"
    elif backbone.checkpoints_activations(model):
        why = "activation checkpointing takes no cache"
        remedy = "gradient_checkpointing=False shares, if memory allows it"
    else:
        which = "prefix of logits" if logits else "prefix"
        why = backbone.fault(model, which, lambda: _prefix_agrees(model, logits), sliding=False)
    if why is not None:
        slow = "training runs the whole prompt of every rollout, also what rollouts have in common"
        backbone.say(model, "prefix", slow, why, remedy)
    return why is None


@torch.enable_grad()
def _prefix_agrees(model: Any, logits: bool) -> bool:
    """Whether rows after a shared prompt are what they are alone, and so is its gradient."""
    prompts = [(1, 2, 3, 4), (5,), (1, 2, 3, 4)]
    layout = Layout([(6, 7, 2), (3, 5, 1, 2), (2, 6)])
    decoder = _Decoder(model, logits)
    embeddings = decoder.base.get_input_embeddings()
    found = []
    for forward in (_shared_prefix, _plain):
        leaves: list[Tensor] = []  # [rows, T, H], of each pass

        def cut(_: Any, __: Any, out: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(out.detach().requires_grad_())
            return leaves[-1]

        handle = embeddings.register_forward_hook(cut)
        try:
            hidden = forward(decoder, prompts, layout)  # [N, H]
        finally:
            handle.remove()
        slope = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device).to(hidden)
        gradients = torch.autograd.grad((hidden * slope).sum(), leaves)
        # Of the prompt that two rows share: in one place, or in two.
        shared = gradients[0][0, :4] if forward is _shared_prefix else gradients[0][::2, :4].sum(0)
        found.append((hidden.detach(), shared))
    return all(backbone.agree(*pair) for pair in zip(*found, strict=True))


def _shared_prefix(decoder: _Decoder, prompts: Sequence[Ids], layout: Layout) -> Tensor:
    device = decoder.device
    index: dict[tuple[int, ...], int] = {}
    owner = torch.tensor([index.setdefault(tuple(p), len(index)) for p in prompts])  # [B]
    ids, attention = pad_left(list(index), device)  # [U, P]
    prefix = backbone.new_cache(decoder.base)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    hidden = decoder(ids, attention_mask=attention, position_ids=positions, cache=prefix)
    # The first token of each row is predicted by its prompt; later ones, bucket by bucket.
    pieces = [hidden[:, -1].index_select(0, owner.to(device))]  # [B, H]
    places = {(i, 0): i for i in range(len(prompts))}
    for rows in _buckets(layout.lengths):
        width = layout.lengths[rows[0]] - 1
        owners = owner[rows].to(device)
        cache = backbone.new_cache(decoder.base)
        for i, layer in enumerate(prefix.layers):
            cache.update(layer.keys[owners], layer.values[owners], i)
        fed, mask = pad_right([layout.completions[i][:-1] for i in rows], device, width)
        seen = attention[owners]
        hidden = decoder(
            fed,
            attention_mask=torch.cat([seen, mask], 1),
            position_ids=seen.sum(1, keepdim=True) + torch.arange(width, device=device),
            cache=cache,
        )  # [rows, width, H]
        for k, i in enumerate(rows):
            places |= {
                (i, t + 1): len(prompts) + _size(pieces[1:]) + k * width + t
                for t in range(layout.lengths[i] - 1)
            }
        pieces.append(hidden.flatten(0, 1))
    wanted = zip(layout.rows.tolist(), layout.positions.tolist(), strict=True)
    picked = torch.tensor([places[where] for where in wanted], device=device)
    return torch.cat(pieces).index_select(0, picked)


def _size(pieces: Sequence[Tensor]) -> int:
    return sum(len(p) for p in pieces)


def _buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of more than one token, longest first, in groups of similar length."""
    buckets: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(lengths) if n > 1), key=lambda i: -lengths[i]):
        # A bucket's shortest row is at least 3/4 of its longest: little padding, few calls.
        if not buckets or 4 * lengths[i] < 3 * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(i)
    return buckets


def _plain(decoder: _Decoder, prompts: Sequence[Ids], layout: Layout) -> Tensor:
    rows = [(*p, *c[:-1]) for p, c in zip(prompts, layout.completions, strict=True)]
    # Padded on the right, where no causal model can see it: on the left it would enter the state
    # of recurrent ones, whatever the mask says.
    ids, _ = pad_right(rows, decoder.device, max(map(len, rows)))
    hidden = decoder(ids)
    # The last prompt token predicts the first sampled one.
    before = torch.tensor([len(p) - 1 for p in prompts])[layout.rows]
    return hidden[layout.rows.to(decoder.device), (before + layout.positions).to(decoder.device)]


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
    prompts: Sequence[Ids], completions: Sequence[Ids], max_tokens: int, *, share: bool = True
) -> Iterator[list[int]]:
    """Row indices in batches whose forward takes at most ``max_tokens`` tokens (or one row).

    Rows of equal prompt stay together; where its forward is shared, it counts once.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i]), i))
    batch: list[int] = []
    tokens = 0
    for i in order:
        shared = share and bool(batch) and tuple(prompts[i]) == tuple(prompts[batch[-1]])
        cost = len(completions[i]) + (0 if shared else len(prompts[i]))
        if batch and tokens + cost > max_tokens:
            yield batch
            batch, tokens, cost = [], 0, len(prompts[i]) + len(completions[i])
        batch.append(i)
        tokens += cost
    if batch:
        yield batch
