"""From hidden states to logits: the output layer, with what a family does to its logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlrf_trainers.losses.vocabulary import wide
from rlrf_trainers.model import backbone
from rlrf_trainers.model.backbone import base_model
from rlrf_trainers.model.distributed import reshard
from rlrf_trainers.model.prefix import Layout, completion_hidden, plain_logits


@dataclass(frozen=True)
class Head:
    """The map from hidden states ``[n, H]`` to logits ``[n, V]`` at the sampling temperature.

    ``logits = cap * tanh(scale * (h W^T + b) / cap) / temperature``, without the tanh where there
    is no cap.

    Attributes:
        module: the output layer; None: hidden states *are* logits (see :meth:`of`).
        scale: what the model multiplies its logits by (Cohere, Granite, Falcon-H1).
        cap: soft cap (Gemma 2).
        temperature: divides the logits.
        weight: ``[V, H]``, if not the module's own: a teacher's.
        bias: ``[V]``, likewise.
    """

    module: Any
    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0
    weight: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, model: Any, temperature: float = 1.0) -> Head:
        """The head of a causal LM, compared with the model's own logits once.

        A model that does something else to its logits gets a head without a module; its "hidden
        states" must then be the model's logits, and memory is not bounded.
        """
        base = base_model(model)
        config = base.config.get_text_config()
        module = base.get_output_embeddings()
        scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
            scale *= float(getattr(config, name, None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        plain = type(module) is torch.nn.Linear
        head = cls(module if plain else None, scale, float(cap) if cap else None, temperature)
        agrees = plain and head._agrees(model)
        reshard(model)
        return head if agrees else cls(None, temperature=temperature)

    @torch.no_grad()
    def _agrees(self, model: Any) -> bool:
        """Whether the logits of two tokens are the model's own."""
        layout = Layout([[1, 2]])
        expected = plain_logits(model, [[1]], layout)
        try:
            hidden = completion_hidden(model, [[1]], layout)
            found = replace(self, temperature=1.0).logits(hidden)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what it calls its decoder gives no hidden states, or none of that size
            return False
        # One product of the same numbers: in 16 bits, too, only its rounding may differ.
        return backbone.agree(found, expected, 1e-2)

    @property
    def own_weight(self) -> Tensor:
        """``[V, H]``: the weight in use."""
        found: Tensor = self.module.weight if self.weight is None else self.weight
        return found

    @property
    def own_bias(self) -> Tensor | None:
        """``[V]`` or None."""
        found: Tensor | None = self.module.bias if self.weight is None else self.bias
        return found

    @property
    def vocabulary(self) -> int | None:
        """V, where there is a module."""
        return None if self.module is None else int(self.module.weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, V]`` in float32 or better, a fresh tensor."""
        if self.module is None:
            z = hidden.to(wide(hidden), copy=True)
        else:
            z = torch.nn.functional.linear(hidden, self.own_weight, self.own_bias)
            z = z.to(wide(z))
        if self.cap is not None:
            return z.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)
        factor = self.scale / self.temperature
        return z if factor == 1.0 else z.mul_(factor)
