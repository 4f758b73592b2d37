"""The self-teacher's weights: the policy's own, slowed down (SDPO §2.3, table 4).

Only trainable parameters differ between student and teacher, so a teacher is one fp32 copy of
them, swapped in for the teacher's forward. With LoRA that copy is a few megabytes; with full
fine-tuning it is the model once more. fp32 because an update of rate 0.01 rounds away in bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

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
        self.kind, self.rate = kind, rate
        self._trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = (
            {}
            if kind == "live"
            else {n: p.detach().float().clone() for n, p in self._trainable.items()}
        )

    @torch.no_grad()
    def logits(self, forward: Callable[[], Tensor]) -> Tensor:
        """The teacher's logits; ``forward`` runs the model with whatever weights are in it."""
        if self.kind == "live":
            return forward()
        with self._swapped():
            slow = forward()
        if self.kind == "trust_region":
            return torch.lerp(slow, forward(), self.rate)
        return slow

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

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's own weights; must be saved with a checkpoint."""
        return self.weights

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Take the weights :meth:`state_dict` gave."""
        for name, value in weights.items():
            self.weights[name].copy_(value)

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """The model with the teacher's weights."""
        student = {n: p.data for n, p in self._trainable.items()}
        try:
            for name, parameter in self._trainable.items():
                parameter.data = self.weights[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._trainable.items():
                parameter.data = student[name]
