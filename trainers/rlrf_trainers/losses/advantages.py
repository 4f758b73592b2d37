"""Advantages of rewards within their groups; equal rewards have exactly none.

Sources: GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783. Names follow TRL.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlrf.errors import ConfigError, UsageError

ScaleRewards = Literal["group", "batch", "none"]

# TRL's constant in (r - mean) / (std + eps).
_ADVANTAGE_EPS = 1e-4
# Units in the last place by which equal rewards may differ: that of a sum in another order.
_SAME_REWARD = 8


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
