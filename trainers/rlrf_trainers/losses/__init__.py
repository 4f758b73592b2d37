"""The losses of SDPO and GRPO: pure functions on tensors.

A training step composes them in the order of the paper's algorithm box, per token; nothing
reduces over a batch except the weights of :func:`aggregation_weights`::

    divergence = Divergence(alpha=1.0, topk=20)                   # student beside teacher
    weights = aggregation_weights(mask, "sequence_mean", counts=BatchCounts.of(mask))
    weights = weights * importance_weights(logps, old_logps, clip=2.0)
    weights = weights * rollout_importance_weights(old_logps, rollout_logps, clip=2.0)

and :func:`rlrf_trainers.losses.vocabulary.vocabulary_loss` runs the whole without ever holding the
``[N, V]`` logits.
"""

from rlrf_trainers.losses.advantages import (
    ScaleRewards,
    group_advantages,
    reward_deviation,
    reward_statistics,
)
from rlrf_trainers.losses.aggregation import (
    AGGREGATIONS,
    Aggregation,
    BatchCounts,
    aggregation_weights,
)
from rlrf_trainers.losses.divergence import Divergence, Measured
from rlrf_trainers.losses.surrogate import (
    ImportanceSamplingLevel,
    RolloutCorrection,
    clipped_surrogate,
    importance_weights,
    k3_kl,
    rollout_importance_weights,
    selected_logps,
)

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "BatchCounts",
    "Divergence",
    "ImportanceSamplingLevel",
    "Measured",
    "RolloutCorrection",
    "ScaleRewards",
    "aggregation_weights",
    "clipped_surrogate",
    "group_advantages",
    "importance_weights",
    "k3_kl",
    "reward_deviation",
    "reward_statistics",
    "rollout_importance_weights",
    "selected_logps",
]
