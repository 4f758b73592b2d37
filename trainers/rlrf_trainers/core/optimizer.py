"""What of a model is trained, and the optimizer that trains it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlrf.errors import UsageError
from rlrf.notices import notice
from rlrf_trainers.config import TrainerConfig
from rlrf_trainers.model import backbone, distributed


def trainable(model: Any, config: TrainerConfig) -> Any:
    """The model, ready to be trained: with an adapter, if one is asked for, else as it is.

    Without an adapter of its own what requires gradients is trained: all of a model that was
    loaded from a folder, and of one that its owner has frozen in part, the rest.
    """
    if config.lora_r and not hasattr(model, "peft_config"):
        wanted, r = config.lora_target_modules, config.lora_r
        _check_targets(model, wanted)
        try:
            model = backbone.with_lora(model, r, config.lora_alpha or 2 * r, wanted)
        except ValueError as error:
            raise UsageError(
                f"lora_target_modules={wanted!r} cannot be adapted: {error}"
            ) from error
    elif not hasattr(model, "peft_config"):
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(config, name) != type(config).model_fields[name].default:
                raise UsageError(
                    f"{name}={getattr(config, name)!r} shapes an adapter, and there is none: "
                    "lora_r is 0 and the model has none of its own; set lora_r, or leave it out"
                )
    else:
        _check_adapter(model.active_peft_config, config)
    # Dropout would make the scored distribution another one than the sampled.
    model.eval()
    if config.gradient_checkpointing:
        backbone.checkpoint_activations(model)
    return model


def _check_adapter(adapter: Any, config: TrainerConfig) -> None:
    """What is asked of an adapter must be as the model's own is; defaults ask nothing."""
    wanted = config.lora_target_modules
    for name, value, own in (
        ("lora_r", config.lora_r or adapter.r, adapter.r),
        ("lora_alpha", config.lora_alpha or adapter.lora_alpha, adapter.lora_alpha),
        (
            "lora_target_modules",
            adapter.target_modules if isinstance(wanted, str) else set(wanted),
            adapter.target_modules,
        ),
    ):
        if value != own:
            raise UsageError(
                f"{name} is {value!r}, but the model has an adapter already, whose is {own!r}; "
                f"leave {name} out to train that one, or give the model without it"
            )


def _check_targets(model: Any, wanted: Sequence[str] | str) -> None:
    if isinstance(wanted, str):
        return
    # peft leaves out names that match nothing, silently, as long as one matches.
    modules = {f".{name}": module for name, module in model.named_modules()}
    found = {w: [m for name, m in modules.items() if name.endswith(f".{w}")] for w in wanted}
    embeddings = getattr(model.get_input_embeddings(), "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    for name, own in found.items():
        if head is embeddings and any(getattr(m, "weight", None) is head for m in own):
            raise UsageError(
                f"lora_target_modules has {name!r}, but the model's embeddings and its output "
                "layer are one matrix: merging the adapter would change both. Leave it out"
            )
    unknown = [name for name, own in found.items() if not own]
    if unknown or not wanted:
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        missing = f"{', '.join(unknown)} of " if unknown else ""
        raise UsageError(
            f"{missing}lora_target_modules={list(wanted)!r} names no module of the model; its "
            f"linear layers are {', '.join(sorted(linear))}, and 'all-linear' takes all of them "
            "but the output's"
        )


class MasterAdamW:
    """AdamW on fp32 masters of whatever dtype the model computes in.

    A bf16 weight of 0.02 cannot take a step of 1e-5: the next bf16 number is 1e-4 away. So every
    parameter that is not at least fp32 gets an fp32 master, and its gradients are added up there,
    micro-batch after micro-batch. fp32 parameters (LoRA adapters) are their own masters.
    """

    def __init__(self, model: Any, config: TrainerConfig) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UsageError(
                "no weight of the model requires a gradient, so there is nothing to train; set "
                "lora_r, or unfreeze some: model.requires_grad_(True) for all"
            )
        self.masters: dict[str, Tensor] = {}
        # On whichever way we leave, the user's parameters keep none of our hooks.
        self._hooks: list[Any] = []
        self.release = weakref.finalize(self, _remove, self._hooks)
        self.release.atexit = False
        collect = weakref.WeakMethod(self._collect)
        for name, parameter in self.parameters.items():
            if parameter.dtype.itemsize >= 4:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float().requires_grad_()
                # Of an earlier trainer of this model, which would take the gradients away.
                if (stale := getattr(parameter, "_rlrf_hook", None)) is not None:
                    stale.remove()
                hook: Any = partial(_collected, collect, name)
                handle = parameter.register_post_accumulate_grad_hook(hook)
                self._hooks.append((weakref.ref(parameter), handle))
                parameter._rlrf_hook = handle
        # One pass over the numbers, without temporaries of the size of a parameter.
        kinds = {m.device.type for m in self.masters.values()}
        self._not_fused = sorted(kinds - {"cpu", "cuda"})
        self.adamw = torch.optim.AdamW(
            self.masters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=not self._not_fused,
        )

    @torch.no_grad()
    def _collect(self, name: str) -> None:
        """Move a parameter's gradient to its master."""
        parameter, master = self.parameters[name], self.masters[name]
        if master is parameter or parameter.grad is None:
            return
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    def clip(self, max_norm: float) -> float:
        """Add up the gradients of all processes, scale to ``max_norm``, return the norm before."""
        for name in self.parameters:
            self._collect(name)  # FSDP sets gradients without the hook
        masters = list(self.masters.values())
        distributed.sum_gradients(masters)
        norm = distributed.grad_norm(masters)
        if math.isfinite(norm) and norm > max_norm:
            for master in masters:
                if master.grad is not None:
                    master.grad.mul_(max_norm / norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """One AdamW step at ``learning_rate``."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if self._not_fused:
            notice(
                "adamw",
                f"AdamW is not fused on {', '.join(self._not_fused)}, so each step makes several "
                "copies of every parameter; on cpu and cuda it is fused",
            )
        self.adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    def state(self) -> list[tuple[str, Tensor]]:
        """AdamW's tensors, each named ``kind.parameter``."""
        return [
            (f"{kind}.{name}", value)
            for name, master in self.masters.items()
            for kind, value in self.adamw.state.get(master, {}).items()
        ]

    def load(self, masters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take weights and AdamW's tensors, whole ones, on every process.

        Raises:
            UsageError: they are of another model.
        """
        extra = sorted(masters.keys() - self.masters.keys())
        if extra:
            raise UsageError(
                f"the checkpoint has trained weights of {extra[0]!r}, which is frozen now; freeze "
                "what was frozen when it was written, no more"
            )
        distributed.load_full(self.masters.items(), masters)
        self.publish()
        found: dict[int, dict[str, Tensor]] = {}
        for number, (name, master) in enumerate(self.masters.items()):
            kinds = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in state]
            own = {
                k: torch.zeros((), dtype=torch.float32)
                if k == "step"
                else torch.zeros_like(master.detach())
                for k in kinds
            }
            distributed.load_full(own.items(), {k: state[f"{k}.{name}"] for k in kinds})
            if own:
                found[number] = own
        # AdamW knows where it keeps what: a fused one has its step count on the device.
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": found, "param_groups": groups})


def _collected(collect: Callable[[], Callable[[str], None] | None], name: str, _: Tensor) -> None:
    method = collect()  # of an optimizer that lives: a hook must not keep it
    if method is not None:
        method(name)


def _remove(hooks: list[tuple[Callable[[], Any], Any]]) -> None:
    for parameter, handle in hooks:
        handle.remove()
        owner = parameter()
        if owner is not None and getattr(owner, "_rlrf_hook", None) is handle:
            del owner._rlrf_hook
    hooks.clear()
