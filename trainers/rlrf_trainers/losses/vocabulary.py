"""From hidden states to a loss over the vocabulary, without ever holding its logits.

A loss over 150,000 logits per token is what runs out of memory in RL for language models: at 512
tokens one fp32 copy is 310 MB, and a divergence between two distributions, left to autograd,
keeps eight or more. :func:`vocabulary_loss` walks the tokens in chunks of a fixed number of
bytes. In each it makes the logits of student and teacher, the loss and, at once, its gradient in
hidden states and head; then the logits are gone. The backward pass only scales. This works
because a token's loss depends on its own logits and on numbers known before (advantages, old
log-probabilities, masks).

What the loss *is* is said by an objective in plain torch on ``[n]`` numbers::

    def objective(tokens, rows):        # rows: which of the N tokens
        ratio = importance_weights(tokens.logps, old_logps[rows], clip=2.0)
        return (tokens.divergence * ratio * weights[rows]).sum()

    loss, metrics = vocabulary_loss(hidden, head, ids, objective, divergence, teacher)
    loss.backward()

Autograd runs through the objective; what lies below it (log-probability and divergence of logits)
has its gradient written down in :mod:`rlrf_trainers.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlrf_trainers.losses.divergence import _LOG_ZERO, _METRICS, Divergence

if TYPE_CHECKING:
    from rlrf_trainers.model.head import Head

# Buffers of [n, V] numbers alive at the worst moment of a chunk (the divergence of Jensen and
# Shannon over the full vocabulary); measured, rounded up.
_BUFFERS = 6


def wide(x: Tensor) -> torch.dtype:
    """The dtype of ``x``, or float32 where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


class Tokens(NamedTuple):
    """What an objective sees of a chunk of n tokens; all ``[n]``.

    ``logps`` and ``divergence`` carry gradients, the others do not; ``divergence`` and
    ``teacher_entropy`` are None without a teacher.
    """

    logps: Tensor  # of the sampled tokens
    divergence: Tensor | None
    entropy: Tensor
    teacher_entropy: Tensor | None


Objective = Callable[[Tokens, slice], Tensor]
"""``(tokens, rows) -> scalar``: a chunk's share of the loss."""

Logits = Callable[[slice], Tensor]
"""``rows -> [n, V]``: a fresh tensor of logits, wide, at the sampling temperature."""

TeacherLogits = Callable[[slice, Tensor], Tensor]
"""``(rows, student_logits [n, V]) -> [n, V]``: a fresh tensor of the teacher's logits, wide."""


def vocabulary_loss(
    hidden: Tensor,
    head: Head,
    ids: Tensor,
    objective: Objective,
    divergence: Divergence | None = None,
    teacher: TeacherLogits | None = None,
    *,
    chunk_bytes: int = 256 << 20,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective summed over all tokens, in bounded memory.

    Args:
        hidden: ``[N, H]`` the student's.
        head: the student's; frozen or trained.
        ids: ``[N]`` the sampled tokens.
        objective: see the module.
        divergence: which, where there is a teacher.
        teacher: gives the teacher's logits.
        chunk_bytes: of all buffers of the size of a chunk's logits together.

    Returns:
        ``(loss, metrics)``: the loss a scalar, in float32 or better; the metrics detached ``[N]``:
        ``logps``, ``entropy``, and with a teacher those of
        :class:`rlrf_trainers.losses.Measured`, and ``teacher_logps``.
    """
    if head.module is None:
        weight = bias = None
    else:
        weight, bias = head.own_weight, head.own_bias
    run = _Run(head, ids, objective, divergence, teacher, chunk_bytes)
    loss: Tensor = _VocabularyLoss.apply(hidden, weight, bias, run)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss, {name: torch.cat(parts) for name, parts in run.metrics.items()}


@torch.no_grad()
def vocabulary_logps(logits: Logits, ids: Tensor, vocabulary: int, chunk_bytes: int) -> Tensor:
    """``[N]``: log-probabilities of given tokens, without a gradient, in bounded memory.

    Args:
        logits: gives the logits of some tokens.
        ids: ``[N]``.
        vocabulary: its size.
        chunk_bytes: as in :func:`vocabulary_loss`.
    """
    found = [torch.zeros(0, device=ids.device)]
    for rows in _chunks(len(ids), vocabulary, chunk_bytes):
        z = logits(rows)
        found.append(z.gather(-1, ids[rows, None])[:, 0] - torch.logsumexp(z, -1))
    return torch.cat(found)


def _chunks(n: int, vocabulary: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of nearly equal size of ``n`` tokens."""
    most = max(1, chunk_bytes // (_BUFFERS * 4 * vocabulary))
    pieces = -(-n // most)
    for k in range(pieces):
        yield slice(k * n // pieces, (k + 1) * n // pieces)


@dataclass
class _Run:
    """The arguments of one loss that are no tensors, and the metrics it leaves."""

    head: Head
    ids: Tensor
    objective: Objective
    divergence: Divergence | None
    teacher: TeacherLogits | None
    chunk_bytes: int

    def __post_init__(self) -> None:
        self.metrics: dict[str, list[Tensor]] = {}

    def chunk(self, rows: slice, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk's loss, and its gradient in ``h W^T + b``."""
        z = self.head.logits(hidden)  # [n, V]
        ids = self.ids[rows, None]  # [n, 1]
        picked = z.gather(-1, ids)[:, 0]
        measured = teacher_entropy = None
        if self.divergence is not None and self.teacher is not None:
            t = self.teacher(rows, z)
            teacher_picked = t.gather(-1, ids)[:, 0]
            found = self.divergence.measure(z, t)  # overwrites both
            del z, t
            lse, grad = found.student_lse, found.grad
            measured, teacher_entropy = found.loss, found.teacher_entropy
            metrics = {name: getattr(found, name) for name in _METRICS}
            metrics["teacher_logps"] = teacher_picked - found.teacher_lse
        else:
            lse = torch.logsumexp(z, -1)
            log_p = z.sub_(lse[:, None]).clamp_(min=_LOG_ZERO)
            grad = log_p.exp()
            metrics = {"entropy": -log_p.mul_(grad).sum(-1)}
            del z, log_p
        metrics["logps"] = picked - lse
        for name, values in metrics.items():
            self.metrics.setdefault(name, []).append(values)

        loss, by_logps, by_divergence = self._slopes(metrics, measured, teacher_entropy, rows)
        if by_divergence is not None:
            grad.mul_(by_divergence[:, None])
            if not bool(by_logps.any()):
                return loss, self._pull(grad, hidden)
            grad.sub_(self._probabilities(hidden, lse).mul_(by_logps[:, None]))
        else:
            grad.mul_(-by_logps[:, None])
        # d log p(y) / dz = onehot(y) - p
        grad.scatter_add_(-1, ids, by_logps[:, None])
        return loss, self._pull(grad, hidden)

    @torch.enable_grad()
    def _slopes(
        self,
        metrics: dict[str, Tensor],
        measured: Tensor | None,
        teacher_entropy: Tensor | None,
        rows: slice,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The objective, and its derivatives in log-probabilities and divergences, ``[n]``."""
        logps = metrics["logps"].detach().clone().requires_grad_()
        leaves = [logps]
        if measured is not None:
            measured = measured.detach().clone().requires_grad_()
            leaves.append(measured)
        loss = self.objective(Tokens(logps, measured, metrics["entropy"], teacher_entropy), rows)
        if not loss.requires_grad:  # a chunk that nothing depends on
            return loss, torch.zeros_like(logps), None if measured is None else measured * 0
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        slopes = [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)
        ]
        return loss.detach(), slopes[0], slopes[1] if measured is not None else None

    def _probabilities(self, hidden: Tensor, lse: Tensor) -> Tensor:
        # Computed again: only objectives that use both signals need them.
        return self.head.logits(hidden).sub_(lse[:, None]).exp_()

    def _pull(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Through scale, cap and temperature, back to ``h W^T + b``."""
        head = self.head
        if head.cap is not None:
            t = head.logits(hidden).mul_(head.temperature / head.cap)
            grad.mul_(t.square_().neg_().add_(1.0))
        factor = head.scale / head.temperature
        return grad if factor == 1.0 else grad.mul_(factor)


class _VocabularyLoss(torch.autograd.Function):
    """The loss of all chunks; the gradient is made in the forward pass and only scaled after."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, run: _Run
    ) -> Tensor:
        needs = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden)
        grad_weight = grad_bias = None
        if weight is not None and needs[1]:
            grad_weight = torch.zeros_like(weight, dtype=wide(weight))
        if bias is not None and needs[2]:
            grad_bias = torch.zeros_like(bias, dtype=wide(bias))
        vocabulary = run.head.vocabulary or hidden.shape[-1]
        total = torch.zeros((), dtype=wide(hidden), device=hidden.device)
        for rows in _chunks(len(hidden), vocabulary, run.chunk_bytes):
            h = hidden[rows].detach()
            loss, g = run.chunk(rows, h)
            total += loss
            if grad_bias is not None:
                grad_bias += g.sum(0)
            g = g.to(hidden.dtype)
            if weight is None:
                grad_hidden[rows] = g
            else:
                torch.mm(g, weight.detach(), out=grad_hidden[rows])
            if grad_weight is not None:
                _add_outer(grad_weight, g, h)
        # Not saved for backward, which would forbid to scale them in place: they may be the
        # largest tensors there are.
        ctx.grads = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [x.dtype if x is not None else None for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("vocabulary_loss() is differentiable once: call it again")
        scaled = (None if g is None else g.mul_(upstream.to(g.dtype)) for g in grads)
        pairs = zip(scaled, ctx.dtypes, strict=True)
        return (*(None if g is None else g.to(dtype) for g, dtype in pairs), None)


def _add_outer(total: Tensor, g: Tensor, h: Tensor) -> None:
    """``total += g^T h`` for ``[n, V]`` and ``[n, H]``; sums in the precision of ``total``."""
    if total.dtype == g.dtype:
        total.addmm_(g.T, h)
        return
    # A half-precision product is summed in float32 but rounded at the end; adding such products
    # in half precision would round at every chunk. A block at a time, so that none is large.
    for a in range(0, len(total), 16_384):
        block = slice(a, a + 16_384)
        total[block] += g[:, block].T @ h
