"""What weighs a sampled token's loss: ratios of policies, clips, the KL to a reference.

Pure functions, per token. Every weight on a loss is detached, so that the loss is linear in the
per-token losses; :mod:`rlrf_trainers.losses.vocabulary` relies on it.

Sources: PPO, arXiv 1707.06347; GRPO, arXiv 2402.03300; GSPO, arXiv 2507.18071; dual clip, arXiv
1912.09729; SDPO, arXiv 2601.20802 (A.4). Names follow TRL.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rlrf.errors import ConfigError, UsageError

ImportanceSamplingLevel = Literal["token", "sequence"]
RolloutCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# exp(20) ~ 5e8: far above any clip anyone sets, far below overflow in float32.
_MAX_LOG_RATIO = 20.0


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
        epsilon: lower clip.
        epsilon_high: upper clip (DAPO: 0.28); None: same as `epsilon`.
        delta: dual clip: bounds the ratio where the advantage is negative, so that one token
            whose probability exploded cannot dominate (arXiv 1912.09729, where c = 3).

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
