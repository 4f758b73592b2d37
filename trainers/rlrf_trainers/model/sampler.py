"""Sampling and scoring token ids with a transformers model, exactly.

:func:`sample` is an autoregressive sampler made for reinforcement learning, where every prompt is
sampled several times and the log-probabilities matter as much as the tokens:

- equal prompts are run through the model once, and their key-value cache is repeated;
- a row that has ended leaves the batch and the cache, so the tail of a ragged batch is cheap;
- each row draws from its own random stream, so what it samples does not depend on its neighbours;
- the log-probability returned is that of the distribution the token was drawn from.

:func:`score` is its counterpart: log-probabilities of given completions. There is no text here;
see :mod:`rlrf_trainers.model.chat` for that.

Why: design/forward.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rlrf import progress
from rlrf.errors import RlrfError
from rlrf.policy import FinishReason, SamplingParams, TokenScores
from rlrf_trainers.model import backbone
from rlrf_trainers.model.backbone import Arguments, base_model

PREFILL_TOKENS = 32_768
"""Prompt tokens, padding included, in one forward pass of a prefill."""

SCORE_TOKENS = 16_384
"""Tokens, padding included, in one forward pass of :func:`score`."""

SCORE_LOGITS = 2**28
"""Logits in one forward pass of :func:`score` (1 GiB in fp32), unless one row alone has more."""


@dataclass(slots=True)
class Sampled:
    """What was sampled after one prompt.

    Attributes:
        token_ids: ``[n]`` sampled ids, an end token included.
        logprobs: ``[n]`` log-probability of each under the distribution it was drawn from, nats.
        finish_reason: ``stop`` or ``length``.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


@torch.inference_mode()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    end_ids: Collection[int],
    seeds: Sequence[tuple[int, ...]],
    max_batch_size: int = 64,
    context: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[Sampled]:
    """One sampled continuation of every prompt, in order.

    Row ``i`` draws one uniform number per step from the stream of ``seeds[i]`` and inverts the
    cumulative distribution with it. So the sample of a row depends on the rows beside it only
    through floating-point noise, and ``max_tokens`` cuts it without changing it.

    Args:
        model: a causal language model, PEFT-wrapped or not; its training flags are left as found.
        prompts: token ids, at least one each; equal ones share their prefill.
        params: temperature, nucleus and length.
        end_ids: any of these ends a row, and is kept as its last token.
        seeds: non-negative numbers, some for each prompt.
        max_batch_size: rows that decode at once; the longest prompts share a batch.
        context: positions the model can attend to; a row is cut off there. Each prompt must be
            shorter.
        stop: called with a row's ids after each token; True ends the row.

    Raises:
        RlrfError: the model's logits are not finite.
    """
    sampled = [Sampled() for _ in prompts]
    streams = [np.random.default_rng(seed) for seed in seeds]
    limits = [min(params.max_tokens, (context or math.inf) - len(p)) for p in prompts]
    tokens_to_come = progress.phase("", int(sum(limits)), "tokens", at_most=True)
    with (
        backbone.evaluating(model),
        backbone.contiguous_head_input(model),
        tokens_to_come as shown,
    ):
        backbone.say_kernels(model)
        cached = can_cache(model)
        for live in _batches(prompts, max_batch_size, equal_lengths=not cached):
            start = _CachedRows if cached else _RecomputedRows
            rows = start(model, [tuple(prompts[i]) for i in live])
            while True:
                if not bool(rows.logits.amax(-1).isfinite().all()):
                    raise RlrfError(
                        "the model's logits are not finite: its weights have diverged or its "
                        "dtype overflows; lower the learning rate or use bfloat16"
                    )
                logprobs = next_token_logprobs(rows.logits, params)  # [B, V]
                tokens = draw(logprobs, [1.0 - streams[i].random() for i in live])  # [B]
                chosen = logprobs.gather(-1, tokens[:, None])[:, 0]  # [B]
                shown.advance(len(live))
                unfinished = []
                for row, (i, token, logprob) in enumerate(
                    zip(live, tokens.tolist(), chosen.tolist(), strict=True)
                ):
                    out = sampled[i]
                    out.token_ids.append(token)
                    out.logprobs.append(logprob)
                    if token in end_ids or (stop is not None and stop(out.token_ids)):
                        out.finish_reason = "stop"
                    elif len(out.token_ids) < limits[i]:
                        unfinished.append(row)
                if not unfinished:
                    break
                if len(unfinished) < len(live):
                    keep = torch.tensor(unfinished, device=tokens.device)
                    rows.keep(keep)
                    tokens, live = tokens[keep], [live[row] for row in unfinished]
                rows.append(tokens)
    return sampled


def next_token_logprobs(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution to sample from, as log-probabilities.

    Temperature first, then ``top_k``, then ``top_p`` of what is left, then renormalised. Tokens
    as likely as the last one kept are kept too. At temperature 0 all mass is on the most likely
    token, so its log-probability is 0.

    Args:
        logits: ``[B, V]`` of any dtype.
        params: how to sample.

    Returns:
        ``[B, V]`` fp32, ``-inf`` for tokens that are never sampled.
    """
    logits = logits.float()
    if params.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, 0.0)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        last_kept = logits.topk(params.top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < last_kept, -math.inf)
    if params.top_p < 1:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < _nucleus_floor(probs, params.top_p), -math.inf)
    return logits.log_softmax(-1)


def _nucleus_floor(probs: Tensor, top_p: float) -> Tensor:
    """Probability of the least likely token of each row's nucleus, ``[B, V] -> [B, 1]``.

    The nucleus is the smallest set of most likely tokens whose mass reaches ``top_p``.
    """
    size, vocabulary = 512, probs.shape[-1]
    top = probs.topk(min(size, vocabulary)).values
    # A nucleus is small; sorting 150k probabilities to find it would cost more than the model.
    while size < vocabulary and bool((top.sum(-1) < top_p).any()):
        size *= 8
        top = probs.topk(min(size, vocabulary)).values
    mass_before = top.cumsum(-1) - top
    kept = (mass_before < top_p).sum(-1, keepdim=True)  # [B, 1], at least 1
    return top.gather(-1, kept - 1)


def draw(logprobs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Draw one token per row by inverting its cumulative distribution.

    Args:
        logprobs: ``[B, V]`` normalised log-probabilities.
        uniforms: ``[B]`` numbers in ``(0, 1]``. The open end is at 0 so that the first token
            whose cumulative mass reaches the number always has mass of its own.

    Returns:
        ``[B]`` token ids.
    """
    # Two steps, a block of tokens and then a token in it: summing 150k numbers one by one is slow
    # in fp64 and shifts mass in fp32. (MPS has no fp64.)
    dtype = torch.float32 if logprobs.device.type == "mps" else torch.float64
    blocks = pad(logprobs.exp(), (0, -logprobs.shape[-1] % _BLOCK))
    blocks = blocks.reshape(len(logprobs), -1, _BLOCK)
    up_to = blocks.sum(-1).cumsum(-1, dtype=dtype)  # [B, V / _BLOCK]
    u = torch.tensor(uniforms, dtype=dtype, device=logprobs.device)[:, None] * up_to[:, -1:]
    block = torch.searchsorted(up_to, u)  # [B, 1], one whose mass reaches u
    before = torch.cat([torch.zeros_like(u), up_to], dim=-1).gather(-1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0]  # [B, _BLOCK]
    within = within.cumsum(-1, dtype=dtype)
    # The two sums of a block may differ in their last bit; u must stay within reach.
    token = torch.searchsorted(within, torch.minimum(u - before, within[:, -1:]))
    return (block * _BLOCK + token)[:, 0]


_BLOCK = 512


class _CachedRows:
    """Rows that continue from a key-value cache.

    Prompts are padded on the left, so that every row's next token goes into the same column; the
    mask hides the padding and positions count real tokens only.
    """

    logits: Tensor  # [B, V], of each row's next token

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]]) -> None:
        self.model, self.cache = model, backbone.new_cache(model)
        self._arguments = Arguments.of(base_model(model))
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        width = max(map(len, distinct))
        device = _device(model)
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in distinct], device=device)
        lengths = torch.tensor([len(p) for p in distinct], device=device)
        columns = torch.arange(width, device=device)
        real = columns >= width - lengths[:, None]  # [D, width]
        positions = (columns - (width - lengths[:, None])).clamp(min=0)
        # None where there is nothing to hide: attention kernels are faster without a mask.
        self.mask: Tensor | None = None if bool(real.all()) else real.long()
        self.lengths = lengths
        chunk = max(1, PREFILL_TOKENS // len(distinct))
        for a in range(0, width, chunk):
            b = min(a + chunk, width)
            seen = None if self.mask is None else self.mask[:, :b]
            self._forward(ids[:, a:b], seen, positions[:, a:b])
        if len(distinct) < len(prompts):
            owner = torch.tensor([distinct[p] for p in prompts], device=device)
            self.keep(owner)
            self.logits = self.logits[owner]

    def keep(self, rows: Tensor) -> None:
        """Take these rows, in this order; a row may be taken several times."""
        self.cache.batch_select_indices(rows)
        self.lengths = self.lengths[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]

    def append(self, tokens: Tensor) -> None:
        """Add one token, ``[B]``, to every row and find :attr:`logits` of the next."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=-1)
        self._forward(tokens[:, None], self.mask, self.lengths[:, None])
        self.lengths = self.lengths + 1

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> None:
        given = self._arguments(
            cache=self.cache, attention_mask=mask, position_ids=positions, logits_to_keep=1
        )
        self.logits = self.model(input_ids=ids, **given).logits[:, -1]  # [B, V]


def can_cache(model: Any) -> bool:
    """Whether rows of this model may continue from a cache; says so where they may not."""
    why = backbone.fault(model, "sampling", lambda: _cache_agrees(model), sliding=True)
    if why is not None:
        slow = "the sampler computes the whole of every reply again for each of its tokens"
        backbone.say(model, "sampler", slow, why)
    return why is None


@torch.inference_mode()
def _cache_agrees(model: Any) -> bool:
    """Whether cached rows have the logits of plain forward passes, through all they do."""
    prompts = [(1, 2, 3, 4), (5,), (1, 2, 3, 4)]  # padded, and one prefill for two rows
    device = _device(model)
    found, rows = [], _CachedRows(model, prompts)
    found.append(rows.logits)
    rows.append(torch.tensor([6, 7, 2], device=device))
    rows.keep(torch.tensor([2, 1], device=device))  # the first row has ended
    rows.append(torch.tensor([3, 4], device=device))
    found.append(rows.logits)
    lengths = {layer.get_seq_length() for layer in rows.cache.layers}
    expected = [
        _plain_logits(model, torch.tensor([list(ids)], device=device))
        for ids in (*prompts, (*prompts[2], 2, 3), (*prompts[1], 7, 4))
    ]
    # An argument that was swallowed leaves the cache empty.
    return 0 not in lengths and backbone.agree(torch.cat(found), torch.cat(expected))


def _plain_logits(model: Any, ids: Tensor) -> Tensor:
    """``[B, V]`` of the token after each of ``ids`` ``[B, T]``, without cache or padding."""
    given = Arguments.of(base_model(model))(logits_to_keep=1)
    logits: Tensor = model(input_ids=ids, **given).logits[:, -1]
    return logits


class _RecomputedRows:
    """Rows of one length, each run from its start at every step.

    Slow, and right for any causal model: recurrent state, hybrid layers and home-made caches have
    no say in it, and rows of one length need no padding.
    """

    logits: Tensor  # [B, V], of each row's next token

    def __init__(self, model: Any, prompts: Sequence[tuple[int, ...]]) -> None:
        self.model = model
        self.ids = torch.tensor(prompts, device=_device(model))  # [B, T]
        self._forward()

    def keep(self, rows: Tensor) -> None:
        """Take these rows, in this order."""
        self.ids = self.ids[rows]

    def append(self, tokens: Tensor) -> None:
        """Add one token, ``[B]``, to every row and find :attr:`logits` of the next."""
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self._forward()

    def _forward(self) -> None:
        self.logits = _plain_logits(self.model, self.ids)


@torch.inference_mode()
def score(
    model: Any,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    top_k: int = 0,
) -> list[TokenScores]:
    """Log-probabilities of given completions at temperature 1.

    Sequences are padded on the right, where a causal model cannot see it, and packed into passes
    of at most :data:`SCORE_TOKENS` tokens; logits are made for completion positions only.

    Args:
        model: a causal language model.
        prompts: ids before each completion, at least one each.
        completions: ids to score; an empty one gives empty scores.
        top_k: most likely tokens to return beside each position; 0 for none.
    """
    scores = [TokenScores(()) for _ in prompts]
    arguments = Arguments.of(base_model(model))
    with backbone.evaluating(model):
        for batch in _score_batches(model, prompts, completions):
            rows = [[*prompts[i], *completions[i]] for i in batch]
            width = max(map(len, rows))
            ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=_device(model))
            # The logits at position t are about token t + 1.
            first = min(len(prompts[i]) for i in batch) - 1
            wanted = torch.arange(first, width - 1, device=ids.device)
            logits = model(input_ids=ids, **arguments(logits_to_keep=wanted)).logits
            if "logits_to_keep" not in arguments.names:
                logits = logits[:, first : width - 1]
            for row, i in enumerate(batch):
                start = len(prompts[i]) - 1 - first
                of_row = logits[row, start : start + len(completions[i])]  # [n, V]
                scores[i] = _token_scores(of_row, completions[i], top_k)
    return scores


def _token_scores(logits: Tensor, token_ids: Sequence[int], top_k: int) -> TokenScores:
    """Scores of ``token_ids`` under ``logits`` ``[n, V]``, a slice at a time to bound memory."""
    logprobs: list[float] = []
    top_ids: list[tuple[int, ...]] = []
    top_logprobs: list[tuple[float, ...]] = []
    ids = torch.tensor(token_ids, device=logits.device)
    for part, part_ids in zip(torch.split(logits, 256), torch.split(ids, 256), strict=True):
        all_logprobs = part.float().log_softmax(-1)
        logprobs += all_logprobs.gather(-1, part_ids[:, None])[:, 0].tolist()
        if top_k:
            top = all_logprobs.topk(min(top_k, part.shape[-1]))
            top_ids += map(tuple, top.indices.tolist())
            top_logprobs += map(tuple, top.values.tolist())
    return TokenScores(tuple(logprobs), tuple(top_ids), tuple(top_logprobs))


def _batches(
    prompts: Sequence[Sequence[int]], size: int, equal_lengths: bool
) -> Iterator[list[int]]:
    """Indices of prompts that decode together: alike in length, equal ones side by side."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    runs = itertools.groupby(order, key=lambda i: len(prompts[i]) if equal_lengths else 0)
    for _, run in runs:
        members = list(run)
        for a in range(0, len(members), size):
            yield members[a : a + size]


def _score_batches(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Indices of sequences for one pass: as many as the budgets allow, alike in length."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    order = sorted(
        (i for i in range(len(prompts)) if completions[i]),
        key=lambda i: (len(prompts[i]), len(completions[i])),
    )
    batch: list[int] = []
    for i in order:
        grown = [*batch, i]
        width = max(len(prompts[j]) + len(completions[j]) for j in grown)
        kept = width - min(len(prompts[j]) for j in grown)
        fits = len(grown) * width <= SCORE_TOKENS and len(grown) * kept * vocabulary <= SCORE_LOGITS
        if batch and not fits:
            yield batch
            grown = [i]
        batch = grown
    if batch:
        yield batch


def _device(model: Any) -> torch.device:
    """Where token ids must be."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device
