"""The divergence between a student's and a teacher's distributions, per token (SDPO, eq. 1).

Closed forms of loss and gradient over the whole vocabulary or its top K and a tail; nothing here
reduces over a batch. :mod:`rlrf_trainers.losses.vocabulary` runs them chunk by chunk.

Symbols: V vocabulary, K top-K size, N any number of selected tokens. p is the student (the policy
being trained), q the teacher. Sources: SDPO, arXiv 2601.20802 (eq. 1, prop. 2.1, Table 12), and
its official implementation where the paper is silent. Names follow TRL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlrf.errors import ConfigError

# The tail's log-probability is log(1 - exp(S)) with S, the log-mass of the top-K, capped at -1e-7
# (official implementation). Said of the tail itself: its probability is never below this.
_TAIL_FLOOR = -math.expm1(-1e-7)
# Stands in for log(0) when a vocabulary entry is masked with -inf: exp() of it is exactly 0 in
# every floating type, and 0 * _LOG_ZERO is 0 where 0 * -inf would be NaN.
_LOG_ZERO = -1e4


@dataclass(frozen=True)
class Divergence:
    """Which divergence between student and teacher; see :meth:`measure`.

    Attributes:
        alpha: 0 forward KL, 1 reverse KL, else the generalised Jensen-Shannon divergence.
        topk: the student's K likeliest tokens, or None for the whole vocabulary.
        add_tail: one bucket for all other tokens.
        advantage_clip: bound of ``|log q - log p|``, the advantage of every bucket; alpha 1 only.

    Raises:
        ConfigError: a value out of range or a combination that has no meaning.
    """

    alpha: float = 0.5
    topk: int | None = 100
    add_tail: bool = True
    advantage_clip: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(
                f"distillation_alpha={self.alpha!r}: must be in [0, 1] (0 forward KL, 1 reverse KL)"
            )
        if 0 < min(self.alpha, 1 - self.alpha) < 1e-3:
            raise ConfigError(
                f"distillation_alpha={self.alpha!r}: the Jensen-Shannon divergence tends to 0 with "
                "alpha and with 1 - alpha, so this would teach nothing; give 0, 1, or from 0.001 "
                "to 0.999"
            )
        if self.topk is not None and self.topk < 1:
            raise ConfigError(
                f"distillation_topk={self.topk!r}: must be at least 1, or None for the full "
                "vocabulary"
            )
        if self.advantage_clip is not None:
            if not self.advantage_clip > 0:
                raise ConfigError(
                    f"distillation_advantage_clip={self.advantage_clip!r}: must be above 0, or "
                    "None for no clipping"
                )
            if self.alpha != 1.0:
                raise ConfigError(
                    f"distillation_advantage_clip={self.advantage_clip!r} needs "
                    f"distillation_alpha=1, got {self.alpha!r}: only the gradient of the reverse "
                    "KL is a policy gradient with the advantage log q - log p"
                )

    def measure(self, student_logits: Tensor, teacher_logits: Tensor) -> Measured:
        """The divergence of every row, with its gradient in the student's logits.

        Both arguments are overwritten: over a large vocabulary every temporary counts.

        Args:
            student_logits: ``[N, V]``, float32 or float64, divided by the sampling temperature.
            teacher_logits: likewise.
        """
        if self.topk is None or self.topk >= student_logits.shape[-1]:
            return _full_vocabulary(student_logits, teacher_logits, self)
        return _top_k(student_logits, teacher_logits, self, self.topk)


class Measured(NamedTuple):
    """What :meth:`Divergence.measure` finds per token; every tensor is detached."""

    loss: Tensor  # [N]
    student_lse: Tensor  # [N] logsumexp of the logits
    teacher_lse: Tensor  # [N]
    entropy: Tensor  # [N] of the student over the full vocabulary, nats
    teacher_entropy: Tensor  # [N]
    teacher_student_kl: Tensor  # [N] reverse KL over the buckets, never clipped
    topk_coverage: Tensor  # [N] the student's mass on its own top K; 1 over the full vocabulary
    teacher_topk_coverage: Tensor  # [N] the teacher's mass on them
    grad: Tensor  # [N, V] d loss / d student_logits


_METRICS = Measured._fields[3:-1]
"""The fields of :class:`Measured` that are metrics."""


def _full_vocabulary(student: Tensor, teacher: Tensor, divergence: Divergence) -> Measured:
    """Divergence over all V tokens; overwrites both logits."""
    student_lse = torch.logsumexp(student, -1)  # [N]
    teacher_lse = torch.logsumexp(teacher, -1)
    log_q = teacher.sub_(teacher_lse.unsqueeze(-1)).clamp_(min=_LOG_ZERO)  # [N, V]
    teacher_entropy = -log_q.exp().mul_(log_q).sum(-1)
    log_p = student.sub_(student_lse.unsqueeze(-1)).clamp_(min=_LOG_ZERO)
    p = log_p.exp()
    student_entropy = -(p * log_p).sum(-1)
    loss, kl, g = _divergence(log_p, log_q, p, divergence)
    one = torch.ones_like(loss)
    return Measured(
        loss,
        student_lse,
        teacher_lse,
        student_entropy,
        teacher_entropy,
        kl,
        one,
        one.clone(),
        # Through log-softmax: dL/dz = g - p * sum(g).
        g.sub_(p.mul_(g.sum(-1, keepdim=True))),
    )


def _top_k(student_logits: Tensor, teacher_logits: Tensor, d: Divergence, topk: int) -> Measured:
    """Divergence over the student's top-K (+ tail); overwrites both logits."""
    indices = student_logits.topk(topk, dim=-1, sorted=False).indices  # [N, K]
    teacher = _split(teacher_logits, indices)._replace(tail_exps=None)  # frees its buffer
    student = _split(student_logits, indices)
    if d.add_tail:
        log_p, log_q = (
            torch.cat([x.log_head, x.tail.clamp(min=_TAIL_FLOOR).log().unsqueeze(-1)], -1)
            for x in (student, teacher)
        )  # [N, K+1]
    else:
        log_p, log_q = (
            x.log_head - x.log_head.logsumexp(-1, keepdim=True) for x in (student, teacher)
        )  # [N, K]
    p = log_p.exp()
    loss, kl, g = _divergence(log_p, log_q, p, d)

    # Chain rule from the buckets' log-probabilities to the logits. For a top-K token
    # d log p_k / dz_j = [j = k] - p_j; for the tail d log p_tail / dz_j = [j in tail] p_j/p_tail
    # - p_j. A tail at its floor is a constant. Renormalised, tokens outside have no influence.
    dense = student.tail_exps  # [N, V]
    assert dense is not None
    if d.add_tail:
        g_head, g_tail = g[:, :-1], g[:, -1] * (student.tail > _TAIL_FLOOR)
        total = g_head.sum(-1) + g_tail  # [N]
        head_grad = g_head - p[:, :-1] * total.unsqueeze(-1)
        per_probability = g_tail / student.tail.clamp(min=_TAIL_FLOOR) - total
        dense.mul_((per_probability / student.norm).unsqueeze(-1))
    else:
        head_grad = g - p * g.sum(-1, keepdim=True)
        dense.zero_()
    return Measured(
        loss,
        student.lse,
        teacher.lse,
        student.entropy,
        teacher.entropy,
        kl,
        1 - student.tail,
        1 - teacher.tail,
        dense.scatter_(-1, indices, head_grad),
    )


class _Split(NamedTuple):
    """A softmax split into K chosen tokens and the tail, all the others."""

    log_head: Tensor  # [N, K] log-probabilities of the chosen
    tail: Tensor  # [N] probability of the tail, accurate however small
    lse: Tensor  # [N] logsumexp of the logits
    entropy: Tensor  # [N] of the whole distribution
    norm: Tensor  # [N] what tail_exps must be divided by to be probabilities
    tail_exps: Tensor | None  # [N, V] exp(logit - max), 0 at the chosen


def _split(logits: Tensor, indices: Tensor) -> _Split:
    """Split the softmax of ``[N, V]`` at ``[N, K]`` indices; overwrites the logits."""
    top = logits.amax(-1, keepdim=True)  # [N, 1]
    shifted = logits.sub_(top).clamp_(min=_LOG_ZERO)  # [N, V]
    head = shifted.gather(-1, indices)  # [N, K]
    exps = shifted.exp()  # [N, V]
    weighted = shifted.mul_(exps).sum(-1)  # [N]
    tail_sum = exps.scatter_(-1, indices, 0.0).sum(-1)
    norm = head.exp().sum(-1) + tail_sum  # at least 1: the largest entry is e^0
    log_norm = norm.log()
    return _Split(
        log_head=head - log_norm.unsqueeze(-1),
        tail=tail_sum / norm,
        lse=top.squeeze(-1) + log_norm,
        entropy=log_norm - weighted / norm,
        norm=norm,
        tail_exps=exps,
    )


def _divergence(
    log_p: Tensor, log_q: Tensor, p: Tensor, d: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence of p and q over buckets ``[N, J]``, KL(p || q), and ``g = dL/dlog_p``.

    ``g`` leaves out multiples of p: the softmax Jacobian ``g - p * sum(g)`` removes them, and
    written out they would only cancel in rounding. Overwrites ``log_q``: over the full vocabulary
    every temporary counts.
    """
    if d.alpha == 1.0:
        r = log_q.neg_().add_(log_p)
        kl = (r * p).sum(-1)
        if d.advantage_clip is None:
            return kl, kl.clone(), r.mul_(p)
        # The advantage is a weight, so its clip is one too: nothing flows through it.
        g = r.clamp_(-d.advantage_clip, d.advantage_clip).mul_(p)
        return g.sum(-1), kl, g
    kl = (log_p - log_q).mul_(p).sum(-1)
    q = log_q.exp()
    if d.alpha == 0.0:
        return log_q.sub_(log_p).mul_(q).sum(-1), kl, q.neg_()
    log_m = torch.lerp(p, q, d.alpha).log_().clamp_(min=_LOG_ZERO)
    to_teacher = log_q.sub_(log_m).mul_(q).sum(-1)  # KL(q || m)
    g = log_m.neg_().add_(log_p).mul_(p)
    to_student = g.sum(-1)  # KL(p || m)
    return (1 - d.alpha) * to_student + d.alpha * to_teacher, kl, g.mul_(1 - d.alpha)
