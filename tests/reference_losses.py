"""The losses written once more, on whole tensors: what those of the trainers are compared with."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlrf.errors import ConfigError, UsageError
from rlrf_trainers.losses import (
    Aggregation,
    BatchCounts,
    Divergence,
    ImportanceSamplingLevel,
    aggregation_weights,
    clipped_surrogate,
    k3_kl,
    selected_logps,
)
from rlrf_trainers.losses.divergence import _LOG_ZERO, _METRICS


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
    :func:`rlrf_trainers.losses.vocabulary.vocabulary_loss`, which trainers use: this one holds
    several buffers of the size of the logits.

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
