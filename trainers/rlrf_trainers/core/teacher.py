"""The self-teacher's weights: the policy's own, slowed down (SDPO §2.3, table 4).

Only trainable parameters differ between student and teacher, so a teacher is one fp32 copy of
them, swapped in for the teacher's forward. With LoRA that copy is a second adapter of a few
megabytes (a frozen one: the adapter switched off); with full fine-tuning it is the model once
more. fp32 because an update of rate 0.01 rounds away in bf16.

Why: design/teacher.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from rlrf_trainers.losses.vocabulary import Logits
from rlrf_trainers.model.backbone import base_model
from rlrf_trainers.model.distributed import full_state, gathered, load_full, swapped
from rlrf_trainers.model.head import Head

Kind = Literal["ema", "trust_region", "frozen", "live"]


class Teacher:
    """Gives the teacher's logits and follows the student.

    Args:
        model: the student; its trainable parameters at this moment are the reference.
        kind: ``ema``: an exponential moving average of the student; ``frozen``: the student as
            it was at the start; ``live``: the student itself; ``trust_region``: the geometric
            mixture ``(1 - rate) * reference + rate * live`` of logits, both models shown the
            reprompt (paper eq. 10).
        rate: weight of the new: of the student in the average, of the live model in the mixture.
    """

    def __init__(self, model: Any, kind: Kind = "ema", rate: float = 0.01) -> None:
        self.model, self.kind, self.rate = model, kind, rate
        self._trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        head = getattr(base_model(model), "get_output_embeddings", lambda: None)()
        self._of_head = {
            field: n
            for n, p in self._trainable.items()
            for field in ("weight", "bias")
            if p is getattr(head, field, None)
        }
        self.weights: dict[str, Tensor] = (
            {}
            if kind == "live"
            else {n: p.detach().float().clone() for n, p in self._trainable.items()}
        )

    @torch.no_grad()
    def read(self, forwards: Sequence[Callable[[], Tensor]], head: Head) -> list[Logits]:
        """The teacher's logits of some tokens, made chunk by chunk from its hidden states.

        The weights are swapped once for all forwards.

        Args:
            forwards: each gives hidden states ``[N, H]`` with whatever weights are in the model.
            head: the student's.
        """
        slow: list[Tensor] = []
        slow_head = head
        if self.kind != "live":
            with swapped(self.model, self.weights):
                slow = [forward() for forward in forwards]
            slow_head = self._head(head)
            if self.kind != "trust_region":
                return [partial(_logits, slow_head, hidden) for hidden in slow]
        live = [forward() for forward in forwards]
        if self.kind == "live":
            return [partial(_logits, head, hidden) for hidden in live]
        return [
            partial(_mixture, slow_head, a, head, b, self.rate)
            for a, b in zip(slow, live, strict=True)
        ]

    @torch.no_grad()
    def update(self, student: dict[str, Tensor] | None = None) -> None:
        """Follow the student: ``teacher <- (1 - rate) * teacher + rate * student``.

        Called once per generation batch, after all its optimizer steps, as the official code
        does (TRL updates per optimizer step).

        Args:
            student: fp32 weights by name where the optimizer keeps masters; None reads the model.
        """
        if self.kind != "ema":
            return
        for name, parameter in self._trainable.items():
            new = (student or {}).get(name, parameter).detach().float()
            self.weights[name].lerp_(new, self.rate)

    def state_dict(self, *, copy: bool = True) -> dict[str, Tensor]:
        """The teacher's own weights, whole; must be saved with a checkpoint."""
        return full_state(self.weights.items(), copy=copy)

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Take the weights :meth:`state_dict` gave.

        Raises:
            UsageError: they are of another model.
        """
        load_full(self.weights.items(), weights)

    def _head(self, head: Head) -> Head:
        """The head with the teacher's weights, where the head is trained."""
        own = {  # a collective operation on shards
            field: gathered(self.weights[name]).to(self._trainable[name].dtype)
            for field, name in self._of_head.items()
        }
        if head.module is None or not own:
            return head
        weight, bias = own.get("weight", head.own_weight), own.get("bias", head.own_bias)
        return replace(head, weight=weight, bias=bias)


def _logits(head: Head, hidden: Tensor, rows: slice) -> Tensor:
    return head.logits(hidden[rows])


def _mixture(
    slow_head: Head, slow: Tensor, head: Head, live: Tensor, rate: float, rows: slice
) -> Tensor:
    return torch.lerp(slow_head.logits(slow[rows]), head.logits(live[rows]), rate)
