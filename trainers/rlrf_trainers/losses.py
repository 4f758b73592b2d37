"""The losses of SDPO and GRPO: pure functions on tensors.

Everything here is per token; nothing reduces over a batch except :func:`aggregate`. A training
step composes them in the order of the paper's algorithm box::

    per_token, metrics = self_distillation_loss(student_logits, teacher_logits, alpha=1.0, topk=20)
    per_token = per_token * importance_weights(logps, old_logps, clip=2.0)
    per_token = per_token * rollout_importance_weights(old_logps, rollout_logps, clip=2.0)
    loss = aggregate(per_token, mask, "sequence_mean", counts=BatchCounts.of(whole_batch_mask))

Every weight on a token's loss (importance ratios, mask, normaliser) is detached, so the loss is
linear in the per-token losses. :mod:`rlrf_trainers.vocabulary` uses that to compute the same loss
without ever holding the ``[N, V]`` logits.

Symbols: B rows (sampled completions), T completion positions, V vocabulary, K top-K size,
N any number of selected tokens. p is the student (the policy being trained), q the teacher.

Sources: SDPO, arXiv 2601.20802 (eq. 1, prop. 2.1, Table 12) and the behaviour of its official
implementation where the paper is silent; GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783;
DAPO, arXiv 2503.14476; GSPO, arXiv 2507.18071. Names follow TRL.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlrf.errors import ConfigError, UsageError

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "BatchCounts",
    "Divergence",
    "ImportanceSamplingLevel",
    "Measured",
    "RolloutCorrection",
    "ScaleRewards",
    "aggregate",
    "aggregation_weights",
    "clipped_surrogate",
    "entropy",
    "group_advantages",
    "importance_weights",
    "k3_kl",
    "masked_mean",
    "policy_gradient_loss",
    "reward_deviation",
    "reward_statistics",
    "rollout_importance_weights",
    "sampled_token_loss",
    "selected_logps",
    "self_distillation_loss",
]

Aggregation = Literal[
    "token_mean", "sequence_mean", "sequence_mean_active", "grpo", "dr_grpo", "dapo", "bnpo"
]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
ScaleRewards = Literal["group", "batch", "none"]
ImportanceSamplingLevel = Literal["token", "sequence"]
RolloutCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# The tail's log-probability is log(1 - exp(S)) with S, the log-mass of the top-K, capped at -1e-7
# (official implementation). Said of the tail itself: its probability is never below this.
_TAIL_FLOOR = -math.expm1(-1e-7)
# Stands in for log(0) when a vocabulary entry is masked with -inf: exp() of it is exactly 0 in
# every floating type, and 0 * _LOG_ZERO is 0 where 0 * -inf would be NaN.
_LOG_ZERO = -1e4
# exp(20) ~ 5e8: far above any clip anyone sets, far below overflow in float32.
_MAX_LOG_RATIO = 20.0
# TRL's constant in (r - mean) / (std + eps).
_ADVANTAGE_EPS = 1e-4
# Units in the last place by which equal rewards may differ: that of a sum in another order.
_SAME_REWARD = 8


# ------------------------------------------------------------------------------ distillation


@dataclass(frozen=True)
class Divergence:
    """Which divergence between student and teacher; see :func:`self_distillation_loss`.

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


def self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    topk: int | None = 100,
    add_tail: bool = True,
    full_logit_distillation: bool = True,
    completion_ids: Tensor | None = None,
    per_token_kl_clip: float | None = None,
    advantage_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence between student and teacher at every token (SDPO eq. 1).

    Both distributions are taken over the same buckets: the whole vocabulary (``topk=None``), or
    the student's current top-K tokens, plus one bucket for all the others (``add_tail=True``) or
    renormalised over the K (``add_tail=False``). With p the student and q the teacher:

    - ``alpha == 0``: forward KL, ``sum q (log q - log p)``;
    - ``alpha == 1``: reverse KL, ``sum p (log p - log q)``, the paper's eq. 1;
    - otherwise the generalised Jensen-Shannon divergence
      ``(1 - alpha) KL(p || m) + alpha KL(q || m)`` with ``m = (1 - alpha) p + alpha q``.

    The endpoints are special cases, not limits: the JSD tends to 0 there, so ``alpha=0.01`` is
    *not* close to forward KL (and near ``p = q`` it is about ``alpha (1 - alpha)`` times the KL).

    The tail is what keeps top-K reverse KL honest: without it the loss also falls when the
    student moves probability out of its own top-K.

    The teacher never receives a gradient. The gradient in the student's logits is the closed
    form ``p * (r - E_p[r])`` (prop. 2.1, with ``r = log p - log q`` for reverse KL), computed in
    the forward pass and differentiable once. It is the reference for
    :func:`rlrf_trainers.vocabulary.vocabulary_loss`, which is what a trainer should use: this one
    holds several buffers of the size of the logits.

    Args:
        student_logits: ``[N, V]`` or ``[B, T, V]``, already divided by the sampling temperature.
        teacher_logits: same shape, same temperature, at the same completion tokens.
        alpha: in [0, 1], see above.
        topk: K, or None for the full vocabulary; ``K >= V`` is the full vocabulary.
        add_tail: see above; without effect on the full vocabulary.
        full_logit_distillation: False takes the single-sample surrogate of
            :func:`sampled_token_loss` instead; needs ``alpha=1`` and `completion_ids`.
        completion_ids: the sampled tokens, ``[N]`` or ``[B, T]``. When given, the metrics hold
            the log-probabilities of these tokens (for :func:`importance_weights`).
        per_token_kl_clip: a token's loss is capped here *before* any importance weight; a capped
            token has no gradient. The few tokens whose divergence is an order of magnitude above
            the rest are mostly style (arXiv 2601.18734, released code). In the sampled-token
            surrogate the log-ratio is clamped to ``[-clip, clip]``. None: no cap.
        advantage_clip: bounds every bucket's advantage ``log q - log p`` in the gradient ``sum p
            * (log p - log q) * grad log p`` (and in the value); the paper's test-time runs name a
            clip of 5. Needs ``alpha=1``.

    Returns:
        ``(loss, metrics)``. The loss is per token, ``[N]`` or ``[B, T]``, at least float32. The
        metrics are detached, of the same shape: ``entropy`` and ``teacher_entropy`` (of the full
        vocabulary, nats), ``teacher_student_kl`` (reverse KL over the buckets; in the surrogate
        ``log p - log q`` of the sampled token, an unbiased estimate), ``topk_coverage`` and
        ``teacher_topk_coverage`` (the probability each puts on the student's top-K, 1 on the full
        vocabulary; absent in the surrogate), and with `completion_ids` ``student_logps`` and
        ``teacher_logps``.

    Raises:
        ConfigError: a value out of range or a combination that has no meaning.
        UsageError: shapes that do not match.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.ndim < 2:
        raise UsageError(
            f"student_logits {list(student_logits.shape)} and teacher_logits "
            f"{list(teacher_logits.shape)} must have one shape [..., V]: score the same completion "
            "tokens under both prompts"
        )
    divergence = Divergence(alpha, topk, add_tail, advantage_clip)
    if per_token_kl_clip is not None and not per_token_kl_clip > 0:
        raise ConfigError(
            f"per_token_kl_clip={per_token_kl_clip!r}: must be above 0, or None for no clipping"
        )
    *lead, vocab = student_logits.shape
    if completion_ids is not None and list(completion_ids.shape) != lead:
        raise UsageError(
            f"completion_ids {list(completion_ids.shape)} must have the shape of the logits "
            f"without the vocabulary, {lead}"
        )

    if not full_logit_distillation:
        if alpha != 1.0:
            raise ConfigError(
                f"distillation_alpha={alpha!r}: the sampled-token surrogate "
                "(full_logit_distillation=False) estimates reverse KL only; set it to 1.0"
            )
        if completion_ids is None:
            raise UsageError("full_logit_distillation=False needs completion_ids")
        student_logps = selected_logps(student_logits, completion_ids)
        teacher_logps = selected_logps(teacher_logits.detach(), completion_ids)
        loss = sampled_token_loss(student_logps, teacher_logps, per_token_kl_clip=per_token_kl_clip)
        return loss, {
            "entropy": entropy(student_logits),
            "teacher_entropy": entropy(teacher_logits),
            "teacher_student_kl": student_logps.detach() - teacher_logps,
            "student_logps": student_logps.detach(),
            "teacher_logps": teacher_logps,
        }

    loss, student_lse, teacher_lse, *per_token = _TokenDivergence.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        student_logits.reshape(-1, vocab), teacher_logits.detach().reshape(-1, vocab), divergence
    )
    metrics = {name: x.view(lead) for name, x in zip(_METRICS, per_token, strict=True)}
    if completion_ids is not None:
        for name, logits, lse in (
            ("student_logps", student_logits, student_lse),
            ("teacher_logps", teacher_logits, teacher_lse),
        ):
            picked = logits.detach().gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
            metrics[name] = picked.to(lse.dtype) - lse.view(lead)
    loss = loss.view(lead)
    if per_token_kl_clip is not None:
        loss = loss.clamp(max=per_token_kl_clip)
    return loss, metrics


_METRICS = Measured._fields[3:-1]
"""The fields of :class:`Measured` that are metrics."""


class _TokenDivergence(torch.autograd.Function):
    """Per-token divergence of two logit rows, with its gradient written down.

    Written by hand for two reasons. Autograd through log-softmax, gather and ``log1mexp`` keeps
    five or more ``[N, V]`` buffers where one suffices. And ``log(1 - sum of the top-K)`` cancels
    catastrophically in float32 once the tail is small, in value and, multiplied by 1/tail, in
    gradient; summing the tail's own entries does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,  # [N, V]
        teacher_logits: Tensor,  # [N, V]
        divergence: Divergence,
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        found = divergence.measure(
            student_logits.to(dtype, copy=True), teacher_logits.to(dtype, copy=True)
        )
        ctx.save_for_backward(found.grad)
        ctx.logits_dtype = student_logits.dtype
        ctx.mark_non_differentiable(*found[1:-1])
        return found[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors  # [N, V]
        return (grad * grad_loss.unsqueeze(-1)).to(ctx.logits_dtype), None, None


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


def sampled_token_loss(
    student_logps: Tensor, teacher_logps: Tensor, *, per_token_kl_clip: float | None = None
) -> Tensor:
    """Single-sample surrogate of reverse KL: ``stopgrad(log p - log q) * log p``.

    Its gradient is the policy gradient with advantage ``log q - log p`` of the sampled token. Its
    *value* is no divergence (it may be negative); only the gradient means something.

    Args:
        student_logps: log-probabilities of the sampled tokens, any shape.
        teacher_logps: the teacher's, same shape; detached here.
        per_token_kl_clip: clamps the log-ratio to ``[-clip, clip]``.

    Returns:
        The surrogate per token, same shape.
    """
    log_ratio = (student_logps - teacher_logps).detach()
    if per_token_kl_clip is not None:
        log_ratio = log_ratio.clamp(-per_token_kl_clip, per_token_kl_clip)
    return log_ratio * student_logps


# ------------------------------------------------------------------- token log-probabilities


def selected_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each id under its row of logits, in at least float32.

    Args:
        logits: ``[..., V]``, already divided by the temperature.
        ids: ``[...]``.

    Returns:
        ``[...]``. Differentiable.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(logits, -1)


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row's softmax, detached; one buffer of the size of `logits` beside.

    Args:
        logits: ``[..., V]``, already divided by the temperature.

    Returns:
        ``[...]``, in at least float32.
    """
    lse = torch.logsumexp(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    log_p = (logits - lse.unsqueeze(-1)).clamp_(min=_LOG_ZERO)
    return -(log_p.exp().mul_(log_p)).sum(-1)


def importance_weights(logps: Tensor, old_logps: Tensor | None, clip: float | None) -> Tensor:
    """Detached ratio of the current to the behaviour policy, truncated above (``is_clip``).

    ``exp(clamp(logps - old_logps, -20, 20)).clamp(max=clip)``: no lower clip and no PPO minimum.
    SDPO uses ``clip = 2``. With one update per batch the ratio is exactly 1.

    Args:
        logps: current log-probabilities of the sampled tokens, any shape.
        old_logps: the same at the start of the update; None means unchanged.
        clip: upper bound; None turns the correction off (weights of 1), as officially.

    Returns:
        Weights of the shape of `logps`, without gradient.
    """
    if old_logps is None or clip is None:
        return torch.ones_like(logps, requires_grad=False)
    return _truncated_ratio(logps, old_logps, clip, "distillation_is_clip")


def rollout_importance_weights(
    old_logps: Tensor,
    rollout_logps: Tensor | None,
    clip: float | None,
    mode: RolloutCorrection = "token_truncate",
    mask: Tensor | None = None,
) -> Tensor:
    """Importance weight for an inference engine that is not quite the trainer.

    Corrects the difference between the probabilities the engine sampled with and what the
    training model computes for the same weights. It applies even with one update per batch, where
    :func:`importance_weights` is 1. With ``r = old / rollout`` per token, or its product over the
    row in the sequence modes:

    ===================  ======================================================================
    mode                 weight
    ===================  ======================================================================
    token_truncate       ``min(r, clip)`` (SDPO's official code, verl's TIS)
    token_mask           ``r``, or 0 where it exceeds ``clip``
    sequence_truncate    ``min(r, clip)``, one for all tokens of the row
    sequence_mask        ``r``, or 0 for rows where it exceeds ``clip`` (TRL's default)
    ===================  ======================================================================

    Args:
        old_logps: the training model's log-probabilities at the start of the update; any shape,
            ``[B, T]`` in the sequence modes.
        rollout_logps: the sampler's own, same shape; None when sampler and trainer are one.
        clip: upper bound (SDPO: 2); None turns the correction off.
        mode: see above.
        mask: ``[B, T]``, nonzero = sampled token; needed by the sequence modes.

    Returns:
        Weights of the shape of `old_logps`, without gradient.

    Raises:
        ConfigError: a clip out of range, an unknown mode.
        UsageError: a sequence mode without a mask.
    """
    if mode not in get_args(RolloutCorrection):
        raise ConfigError(
            f"rollout_is={mode!r}: must be one of {', '.join(get_args(RolloutCorrection))}"
        )
    if rollout_logps is None or clip is None:
        return torch.ones_like(old_logps, requires_grad=False)
    name = "rollout_is_threshold"
    if mode == "token_truncate":
        return _truncated_ratio(old_logps, rollout_logps, clip, name)
    if mode.startswith("sequence"):
        if mask is None:
            raise UsageError(f"rollout_is={mode!r} needs the mask of the rows")
        gap = (old_logps - rollout_logps).masked_fill(~mask.bool(), 0.0)
        total = gap.sum(-1, keepdim=True).expand(old_logps.shape)
        old_logps, rollout_logps = total, torch.zeros_like(total)
    ratio = _truncated_ratio(old_logps, rollout_logps, math.exp(_MAX_LOG_RATIO), name)
    if mode == "sequence_truncate":
        return ratio.clamp(max=_positive(clip, name))
    return ratio.masked_fill(ratio > _positive(clip, name), 0.0)


def _truncated_ratio(numerator: Tensor, denominator: Tensor, clip: float, name: str) -> Tensor:
    clip = _positive(clip, name)
    log_ratio = (numerator - denominator).detach().clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=clip)


def _positive(clip: float, name: str) -> float:
    if not clip > 0:
        raise ConfigError(f"{name}={clip!r}: must be above 0, or None to turn the correction off")
    return clip


# ------------------------------------------------------------------------------- aggregation


@dataclass(frozen=True)
class BatchCounts:
    """What a loss is divided by: counts over the whole optimizer step, all processes included.

    Attributes:
        rows: completions, also those without any active token.
        active_rows: completions with at least one active token.
        tokens: active tokens.
        local_tokens: those of this process (``bnpo`` divides by them); None: all.
        processes: how many there are.
    """

    rows: float
    active_rows: float
    tokens: float
    local_tokens: float | None = None
    processes: int = 1

    @classmethod
    def of(cls, mask: Tensor) -> BatchCounts:
        """Count a ``[B, T]`` mask (nonzero = active)."""
        active = mask.bool()
        return cls(
            rows=float(active.shape[0]),
            active_rows=float(active.any(-1).sum()),
            tokens=float(active.sum()),
        )


def aggregation_weights(
    mask: Tensor,
    mode: Aggregation,
    *,
    counts: BatchCounts | None = None,
    max_completion_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of every token in the batch loss; masked tokens get 0.

    ====================== ====================================================================
    mode                   loss
    ====================== ====================================================================
    token_mean, dapo       sum over active tokens / number of active tokens in the whole step
    sequence_mean, grpo    mean over *all* rows of each row's token mean; rows without an active
                           token count as 0 (SDPO's official effective reduction; GRPO eq. 3)
    sequence_mean_active   the same over the rows that have an active token, so the step does not
                           shrink when few rows have a teacher
    dr_grpo                sum / (rows * max_completion_length): no length bias
    bnpo                   token mean over *this process's* share of the step, then the mean over
                           processes; with one process the same as dapo
    ====================== ====================================================================

    With `counts` of the whole optimizer step, the losses of its micro-batches add up to the loss
    of the step computed at once, however it is split. Do not divide by the number of accumulation
    steps again.

    Args:
        mask: ``[B, T]`` of this micro-batch, nonzero = the token counts.
        mode: see above.
        counts: of the whole optimizer step; None takes this mask for the whole.
        max_completion_length: the constant of ``dr_grpo``.
        dtype: of the weights.

    Returns:
        ``[B, T]``, detached.

    Raises:
        ConfigError: an unknown mode, or ``dr_grpo`` without `max_completion_length`.
    """
    if mode not in AGGREGATIONS:
        raise ConfigError(f"loss aggregation {mode!r}: must be one of {', '.join(AGGREGATIONS)}")
    active = mask.bool()
    weights = active.to(dtype)  # [B, T]
    if counts is None:
        counts = BatchCounts.of(active)
    if mode in ("token_mean", "dapo"):
        return weights / max(counts.tokens, 1.0)
    if mode == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise ConfigError(
                f"loss aggregation 'dr_grpo' divides by max_completion_length, which is "
                f"{max_completion_length!r}; give the configured maximum"
            )
        return weights / (max(counts.rows, 1.0) * max_completion_length)
    if mode == "bnpo":
        local = counts.tokens if counts.local_tokens is None else counts.local_tokens
        return weights / (max(local, 1.0) * counts.processes)
    rows = counts.active_rows if mode == "sequence_mean_active" else counts.rows
    return weights / weights.sum(-1, keepdim=True).clamp(min=1.0) / max(rows, 1.0)


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    mode: Aggregation,
    *,
    counts: BatchCounts | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """Reduce per-token losses to the scalar to call ``backward()`` on.

    Args:
        per_token: ``[B, T]``; values at masked positions are ignored, even NaN.
        mask: ``[B, T]``, nonzero = the token counts.
        mode: see :func:`aggregation_weights`, as are the other arguments.
        counts: of the whole optimizer step.
        max_completion_length: the constant of ``dr_grpo``.

    Returns:
        A scalar. Without any active token it is 0 and still attached to the graph, so that
        ``backward()`` works and every process of a distributed step takes part.

    Raises:
        UsageError: shapes that do not match.
        ConfigError: as :func:`aggregation_weights`.
    """
    if per_token.shape != mask.shape or per_token.ndim != 2:
        raise UsageError(
            f"per_token {list(per_token.shape)} and mask {list(mask.shape)} must both be [B, T]"
        )
    weights = aggregation_weights(
        mask,
        mode,
        counts=counts,
        max_completion_length=max_completion_length,
        dtype=torch.promote_types(per_token.dtype, torch.float32),
    )
    return (per_token.masked_fill(~mask.bool(), 0.0) * weights).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is nonzero; 0 when nowhere. For metrics, any shape."""
    active = mask.bool()
    return values.masked_fill(~active, 0.0).sum() / active.sum().clamp(min=1)


# -------------------------------------------------------------------------------------- GRPO


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | Sequence[Hashable],
    *,
    scale_rewards: ScaleRewards = "group",
    scored: Tensor | None = None,
    batch_std: float | None = None,
) -> Tensor:
    """Group-relative advantages (GRPO, arXiv 2402.03300): reward minus the group's mean, scaled.

    A row that was never scored (its sandbox died, its judge did not answer) is not a row with
    reward 0: it is left out of every mean and deviation and its own advantage is 0.

    Args:
        rewards: ``[B]``; NaN means unscored.
        group_ids: ``[B]``; rows with equal ids answer the same question. Any order.
        scale_rewards: divide by the deviation within the ``"group"``, over the ``"batch"``
            (arXiv 2508.08221), or not at all (``"none"``, Dr. GRPO). Deviations are unbiased
            (n - 1) with 1e-4 added, as in TRL.
        scored: ``[B]``, False marks further rows as unscored.
        batch_std: the deviation of the whole batch, where these rewards are a part of it.

    Equal rewards move nothing, and that is decided by comparing them, not by what is left of
    ``r - mean``: eight times 0.7 has a mean of 0.70000005 in fp32, and Adam makes a full step of
    the smallest gradient. Rewards that are apart by no more than what rounding may have done to
    them (8 units in the last place of the largest; 0.1 + 0.2 is not 0.3) count as equal.

    Returns:
        ``[B]``, detached, at least float32, always finite. A group with one scored row, or whose
        scored rows have equal rewards, has the advantage 0, exactly.

    Raises:
        ConfigError: an unknown `scale_rewards`.
        UsageError: lengths that differ, or an infinite reward in a scored row.
    """
    if scale_rewards not in get_args(ScaleRewards):
        raise ConfigError(
            f"scale_rewards={scale_rewards!r}: must be one of {', '.join(get_args(ScaleRewards))}"
        )
    found = _by_group(rewards, group_ids, scored)
    unit = found.unit[found.groups]  # [B]
    if scale_rewards == "none":
        advantages = found.centred * unit
    elif scale_rewards == "group":
        # (r - mean) / (std + eps), top and bottom divided by the unit.
        advantages = found.centred / (found.std[found.groups] + _ADVANTAGE_EPS / unit)
    else:
        std = reward_deviation(found.values[found.valid]) if batch_std is None else batch_std
        advantages = found.centred * (unit / (std + _ADVANTAGE_EPS))
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    most = torch.finfo(dtype).max
    return advantages.clamp(-most, most).to(rewards.device, dtype)


def reward_statistics(
    rewards: Tensor,
    group_ids: Tensor | Sequence[Hashable],
    *,
    scored: Tensor | None = None,
) -> dict[str, float]:
    """TRL's reward metrics over the scored rows.

    Args:
        rewards: as in :func:`group_advantages`.
        group_ids: likewise.
        scored: likewise.

    Returns:
        ``reward`` (mean over rows), ``reward_std`` (mean over groups of the deviation within),
        ``frac_reward_zero_std`` (share of groups whose rewards are all equal, as
        :func:`group_advantages` decides it: they teach GRPO nothing). All NaN when no row was
        scored.
    """
    found = _by_group(rewards, group_ids, scored)
    there = found.sizes > 0
    kept = found.values[found.valid]
    mean = math.nan
    if len(kept):
        unit = _power_of_two(kept.abs().amax())
        # Within what it is the mean of, also where rounding would have it just outside.
        mean = ((kept / unit).mean() * unit).clamp(kept.amin(), kept.amax()).item()
    return {
        "reward": mean,
        "reward_std": (found.std * found.unit)[there].mean().item(),
        "frac_reward_zero_std": found.flat[there].double().mean().item(),
    }


def reward_deviation(rewards: Tensor) -> float:
    """The unbiased standard deviation of rewards ``[B]``; 0 for fewer than two, or equal ones."""
    if len(rewards) < 2:
        return 0.0
    found = _by_group(rewards, [0] * len(rewards), None)
    return (found.std * found.unit).item()


class _Groups(NamedTuple):
    """Rewards by group, in fp64 on the CPU. Where something is in units, nothing overflows."""

    valid: Tensor  # [B] scored rows
    values: Tensor  # [B] rewards, 0 where unscored
    groups: Tensor  # [B] index of the row's group
    sizes: Tensor  # [G] scored rows
    unit: Tensor  # [G] the power of two below the group's largest reward
    flat: Tensor  # [G] whether the rewards are equal
    centred: Tensor  # [B] reward - mean in units; exactly 0 in flat groups and where unscored
    std: Tensor  # [G] unbiased deviation in units; exactly 0 in flat groups


def _by_group(
    rewards: Tensor, group_ids: Tensor | Sequence[Hashable], scored: Tensor | None
) -> _Groups:
    ids = group_ids.tolist() if isinstance(group_ids, Tensor) else list(group_ids)
    if rewards.ndim != 1 or len(ids) != rewards.shape[0]:
        raise UsageError(
            f"rewards {list(rewards.shape)} and {len(ids)} group ids: give one id for each reward"
        )
    index = {key: i for i, key in enumerate(dict.fromkeys(ids))}
    groups = torch.tensor([index[key] for key in ids], dtype=torch.long)
    values = rewards.detach().to("cpu", torch.float64)
    valid = ~values.isnan()
    if scored is not None:
        valid &= scored.to("cpu").bool()
    if values[valid].isinf().any():
        raise UsageError(
            "a scored reward is infinite; rewards must be finite, or NaN for a row nobody scored"
        )
    values = values.masked_fill(~valid, 0.0)
    count = values.new_zeros(len(index)).index_add_(0, groups, valid.double())
    low, high = (
        values.new_full((len(index),), empty).scatter_reduce_(
            0, groups, values.masked_fill(~valid, empty), reduce
        )
        for empty, reduce in ((math.inf, "amin"), (-math.inf, "amax"))
    )
    largest = torch.maximum(low.abs(), high.abs()).masked_fill(count == 0, 1.0)
    eps = torch.finfo(torch.promote_types(rewards.dtype, torch.float32)).eps
    flat = (count < 2) | (high - low <= _SAME_REWARD * eps * largest)
    unit = _power_of_two(largest)
    scaled = values / unit[groups]
    mean = values.new_zeros(len(index)).index_add_(0, groups, scaled) / count.clamp(min=1.0)
    centred = (scaled - mean[groups]).masked_fill(~valid | flat[groups], 0.0)
    squares = torch.zeros_like(count).index_add_(0, groups, centred.square())
    std = (squares / (count - 1).clamp(min=1.0)).sqrt()
    return _Groups(valid, values, groups, count, unit, flat, centred, std)


def _power_of_two(largest: Tensor) -> Tensor:
    """The power of two below positive numbers, to divide by without rounding; 1 for 0."""
    exponent = (torch.frexp(largest).exponent - 1).clamp(min=-1000)
    return torch.ldexp(torch.ones_like(largest), exponent).masked_fill(largest == 0, 1.0)


def policy_gradient_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: ImportanceSamplingLevel = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy-gradient loss, per token (GRPO without its KL term).

    ``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` with ``r = exp(logps - old_logps)``,
    or the length-normalised sequence ratio of GSPO (arXiv 2507.18071), whose gradient reaches
    every token of the row.

    Args:
        logps: ``[B, T]``, differentiable.
        old_logps: ``[B, T]`` at the start of the update; None means ``logps.detach()`` (exact
            with one update per batch).
        advantages: ``[B]`` or ``[B, T]``.
        mask: ``[B, T]``, nonzero = sampled token that counts.
        epsilon: lower clip.
        epsilon_high: upper clip (DAPO: 0.28); None: same as `epsilon`.
        delta: dual clip: bounds the ratio where the advantage is negative, so that one token
            whose probability exploded cannot dominate (arXiv 1912.09729, where c = 3).
            Must exceed ``1 + epsilon_high``.
        importance_sampling_level: ``"token"`` (GRPO) or ``"sequence"`` (GSPO).

    Returns:
        ``(loss, metrics)``: loss ``[B, T]``, 0 where masked; metrics detached, ``[B, T]``, to be
        averaged with :func:`masked_mean`: ``clip_ratio/low``, ``clip_ratio/high``,
        ``clip_ratio/region`` (1 where the clip took the gradient away on that side / either
        side), ``ratio``, and ``approx_kl`` (k3 of old against current).

    Raises:
        ConfigError: a clip out of range or an unknown level.
        UsageError: shapes that do not match.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if not 0.0 <= epsilon < 1.0 or high < 0.0:
        raise ConfigError(
            f"epsilon={epsilon!r}, epsilon_high={epsilon_high!r}: epsilon must be in [0, 1) and "
            "epsilon_high at least 0"
        )
    if delta is not None and not delta > 1.0 + high:
        raise ConfigError(
            f"delta={delta!r}: the dual clip must exceed 1 + epsilon_high = {1.0 + high:g}, or be "
            "None"
        )
    if importance_sampling_level not in get_args(ImportanceSamplingLevel):
        raise ConfigError(
            f"importance_sampling_level={importance_sampling_level!r}: must be 'token' or "
            "'sequence'"
        )
    if logps.ndim != 2 or logps.shape != mask.shape:
        raise UsageError(
            f"logps {list(logps.shape)} and mask {list(mask.shape)} must both be [B, T]"
        )
    active = mask.bool()
    if old_logps is None:
        old_logps = logps.detach()
    if advantages.ndim == 1:
        advantages = advantages.unsqueeze(-1)  # [B, 1]
    advantages = advantages.detach().expand(logps.shape)  # [B, T]

    # Padding may hold anything; filled before exp() so that it can neither overflow nor, times a
    # zero mask, become NaN in the backward pass.
    log_ratio = (logps - old_logps.detach()).masked_fill(~active, 0.0)
    approx_kl = k3_kl(log_ratio.detach(), torch.zeros_like(log_ratio))
    if importance_sampling_level == "sequence":
        lengths = active.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(-1, keepdim=True) / lengths).expand(logps.shape)
    loss, metrics = clipped_surrogate(
        log_ratio,
        advantages.masked_fill(~active, 0.0),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
    )
    return loss.masked_fill(~active, 0.0), {**metrics, "approx_kl": approx_kl}


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)`` with ``r = exp(log_ratio)``.

    Args:
        log_ratio: any shape, differentiable.
        advantages: same shape.
        epsilon: see :func:`policy_gradient_loss`, as for the others.
        epsilon_high: None: same as `epsilon`.
        delta: dual clip.

    Returns:
        The loss and the metrics ``clip_ratio/low``, ``clip_ratio/high``, ``clip_ratio/region`` and
        ``ratio``, all of the same shape.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + high)
    loss = -torch.minimum(bounded * advantages, clipped * advantages)
    detached = ratio.detach()
    low = (detached < 1.0 - epsilon) & (advantages < 0)
    over = (detached > 1.0 + high) & (advantages > 0)
    return loss, {
        "clip_ratio/low": low.to(loss.dtype),
        "clip_ratio/high": over.to(loss.dtype),
        "clip_ratio/region": (low | over).to(loss.dtype),
        "ratio": detached,
    }


def k3_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token, for GRPO's ``beta`` term.

    ``exp(d) - d - 1`` with ``d = ref_logps - logps``: unbiased under the policy's own samples,
    never negative. ``d`` is capped at 20, where the estimate is already 5e8, to stay finite.

    Args:
        logps: log-probabilities of the sampled tokens, any shape, differentiable.
        ref_logps: the reference model's, same shape; detached here.

    Returns:
        The estimate, same shape.
    """
    d = (ref_logps.detach() - logps).clamp(max=_MAX_LOG_RATIO)
    return torch.expm1(d) - d
