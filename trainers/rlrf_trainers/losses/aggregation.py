"""From per-token losses to one number: what a token weighs in the loss of an optimizer step.

Sources: GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783; DAPO, arXiv 2503.14476; the official
SDPO implementation. Names follow TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlrf.errors import ConfigError

Aggregation = Literal[
    "token_mean", "sequence_mean", "sequence_mean_active", "grpo", "dr_grpo", "dapo", "bnpo"
]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


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
