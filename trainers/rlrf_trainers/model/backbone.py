"""How a transformers model is called, whatever its version and family.

The one place that knows what versions of transformers differ in. What cannot be known is guessed
(what an argument is called, that the rows of a cache can be chosen, that padding on the left is
harmless), and a guess is compared once per model with the plain forward pass, numerically:
:func:`fault`. Where it is wrong the plain pass is taken, and :func:`rlrf.notices.notice` says so.

Why: design/forward.md.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from rlrf.errors import MissingDependencyError, RlrfError, UsageError
from rlrf.notices import notice
from rlrf_trainers.model.fetch import resolve_model

_CACHE_NAMES = ("cache", "past_key_values")
"""What forward passes call their key-value cache: since transformers 5.24, and before."""

TESTED = "5.17 to 5.24"
"""The versions of transformers that the contract tests have run on (tests/test_backbone.py)."""


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Arguments:
    """Keyword arguments of a module's forward pass, by what they mean.

    Args:
        module: a transformers model, or its decoder.
    """

    def __init__(self, module: Any) -> None:
        parameters = inspect.signature(module.forward).parameters
        self.names = frozenset(parameters)
        named = [name for name in _CACHE_NAMES if name in parameters]
        # What a later version may call it, it will still annotate.
        typed = [n for n, p in parameters.items() if "Cache" in str(p.annotation)]
        self.cache: str | None = next(iter(named or typed), None)

    @classmethod
    def of(cls, module: Any) -> Arguments:
        """Those of ``module``, found out once."""
        known = _arguments.get(module)
        if known is None:
            known = _arguments[module] = cls(module)
        return known

    def __call__(self, *, cache: Any = None, **wanted: Any) -> dict[str, Any]:
        """Those of ``wanted`` that the forward pass takes and that are not None.

        Args:
            cache: to be filled; None for a pass without one.
            wanted: ``attention_mask``, ``position_ids``, ``logits_to_keep``, which mean the same
                in all versions.
        """
        found = {k: v for k, v in wanted.items() if k in self.names and v is not None}
        if "use_cache" in self.names:
            found["use_cache"] = cache is not None
        if cache is not None:
            assert self.cache is not None
            found[self.cache] = cache
        return found


_arguments: WeakKeyDictionary[Any, Arguments] = WeakKeyDictionary()
_faults: WeakKeyDictionary[Any, dict[tuple[str, Any], str | None]] = WeakKeyDictionary()


def fault(model: Any, guess: str, agrees: Callable[[], bool], *, sliding: bool) -> str | None:
    """Why a fast path must not be taken with a model; None where it may. Found out once.

    Args:
        model: a causal LM of transformers, PEFT-wrapped or not.
        guess: which path.
        agrees: runs it beside the plain one on a few tokens, with caches of :func:`new_cache`;
            may raise whatever a forward pass raises.
        sliding: whether the path is right where some layers see only a window.
    """
    base = base_model(model)
    known = _faults.setdefault(base, {})
    key = guess, attention(base)  # it can be changed while we look elsewhere
    if key not in known:
        known[key] = _fault(model, agrees, sliding)
    return known[key]


def _fault(model: Any, agrees: Callable[[], bool], sliding: bool) -> str | None:
    base = base_model(model)
    if Arguments.of(base).cache is None:
        return "its forward pass has no argument that rlrf knows for a key-value cache"
    try:
        kinds = {type(layer) for layer in new_cache(base).layers}
        # Exactly these: others (recurrent states, say) keep more than chosen rows would carry, and
        # a few tokens do not fill a window. The cache knows its model best.
        plain = {DynamicLayer, DynamicSlidingWindowLayer} if sliding else {DynamicLayer}
        others = sorted(kind.__name__ for kind in kinds - plain)
        if others or not kinds:
            return (
                f"what its layers remember cannot be chosen by row ({', '.join(others) or 'none'})"
            )
        # Twice: in 16 bits a router between experts may take another turn by chance.
        with evaluating(model):
            same = agrees() or agrees()
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever a model or another version raises: the plain path is right
        return f"its forward pass with a cache fails ({type(error).__name__}: {_first_line(error)})"
    return None if same else "its forward pass gives other numbers with a cache than without"


def new_cache(model: Any) -> Any:
    """An empty :class:`transformers.DynamicCache` for a model."""
    return DynamicCache(config=base_model(model).config)


def agree(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Whether two tensors are the same up to rounding, measured against their size.

    Args:
        found: of any shape.
        expected: of the same.
        tolerance: of the relative error in the Euclidean norm; None: what ways of computing
            differ by in this dtype. A wrong mask, position or cache is an error of order one.
    """
    if tolerance is None:
        tolerance = 1e-2 if expected.dtype.itemsize >= 4 else 0.1
    if found.shape != expected.shape:
        return False
    error = torch.linalg.vector_norm(found.float() - expected.float())
    return bool(error <= tolerance * torch.linalg.vector_norm(expected.float()))  # False for NaN


def say(model: Any, path: str, slow: str, why: str, remedy: str = "") -> None:
    """Notice that a model does not take a fast path.

    Args:
        model: which.
        path: the fast one, in a word.
        slow: what is done instead.
        why: a clause, such as :func:`fault` gives.
        remedy: what to do; None known: other versions of transformers.
    """
    name = type(base_model(model)).__name__
    version = f"transformers {transformers.__version__} (rlrf is tested with {TESTED})"
    remedy = remedy or f"Another architecture, or another version than {version}, may be faster"
    notice(f"{path}/{name}", f"{name}: {slow}, because {why}. {remedy}")


def attention(base: Any) -> Any:
    """The attention kernel's name, where transformers tells."""
    # Private, and the only way: transformers has a public setter, and no getter.
    return getattr(base.config, "_attn_implementation", None)


def say_kernels(model: Any) -> None:
    """Notice kernels that are slower than the model could have."""
    base = base_model(model)
    name = type(base).__name__
    heads = getattr(base.config.get_text_config(), "num_attention_heads", None)
    if heads and attention(base) == "eager":
        notice(
            f"attention/{name}",
            f"{name} attends with the 'eager' kernel, which holds the attention weights of every "
            "pair of tokens; load it with attn_implementation='sdpa' (the default, where the "
            "architecture has it)",
        )
    has_experts = any(type(m).__name__.endswith("Experts") for m in base.modules())
    if has_experts and getattr(base.config, "_experts_implementation", None) == "eager":
        notice(
            f"experts/{name}",
            f"{name} runs its experts one after the other (experts_implementation='eager'); load "
            "it with 'grouped_mm' (the default, where torch and the architecture have it)",
        )
    if checkpoints_activations(base) and next(_checkpointing_layers(base), None) is None:
        notice(
            f"checkpointing/{name}",
            f"gradient_checkpointing has no effect on {name}, whose layers are of a kind of their "
            "own: activations are kept. Lower micro_batch_tokens if memory runs out",
        )
    on_gpu = next(base.parameters()).device.type == "cuda"
    if not torch.cuda.is_available() and _NVIDIA_DRIVER.exists():
        notice(
            "device",
            f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use, so models "
            "run on the CPU; install a build of torch for its driver (see nvidia-smi)",
        )
    if on_gpu and _is_recurrent(base) and not any(map(importlib.util.find_spec, _RECURRENT)):
        notice(
            f"recurrence/{name}",
            f"the recurrent layers of {name} run in plain torch; one of the packages "
            f"{', '.join(_RECURRENT)} has kernels for them",
        )


_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_RECURRENT = ("fla", "mamba_ssm", "kernels")


def _is_recurrent(base: Any) -> bool:
    return any("inear" in type(layer).__name__ for layer in new_cache(base).layers)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside; each module's own training flag as it was afterwards."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def contiguous_head_input(model: Any) -> Iterator[None]:
    """Keep the output layer off a path of ``torch.matmul`` that copies its weight per row.

    The last position's hidden states are a strided slice ``[B, 1, H]``. For such an input and a
    weight that needs no gradient (LoRA) matmul expands and copies ``[V, H]`` B times: measured on
    a 0.5B model, a prefill of 8 prompts takes 9 CPU-seconds instead of 1.4.
    """
    head = base_model(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def checkpoint_activations(model: Any) -> None:
    """Have the layers forget their activations, though the model does not train.

    Activation checkpointing asks the layer itself, and it alone, whether it trains; so the layers
    do, but nothing in them that drops out.

    Raises:
        UsageError: the architecture cannot do it.
    """
    try:
        # Renamed in transformers 5.23; the old name warns there.
        name = "activation_checkpointing_enable"
        getattr(model, name, getattr(model, "gradient_checkpointing_enable"))()  # noqa: B009
    except ValueError as error:
        raise UsageError(f"gradient_checkpointing=True: {error}") from error
    for layer in _checkpointing_layers(model):
        layer.training = True
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):  # some layers drop by themselves
                setattr(layer, name, 0.0)


def _checkpointing_layers(model: Any) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


def checkpoints_activations(model: Any) -> bool:
    """Whether the model forgets activations and computes them again for the backward pass."""
    # Renamed in transformers 5.23; the old name warns there.
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        found = getattr(base_model(model), name, None)
        if found is not None:
            return bool(found)
    return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


# --- loading and adapting -----------------------------------------------------------------------


def load(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model in a folder; an adapter is put on the model it was trained on, to be trained on.

    Raises:
        UsageError: an adapter whose model cannot be had.
        MissingDependencyError: an adapter, and peft is not installed.
    """
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"the adapter {str(folder)!r}", "peft", "train") from error
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    try:
        base_folder = resolve_model(str(base))
    except RlrfError as error:
        raise UsageError(
            f"{str(folder)!r} holds an adapter of the model {base!r}, which cannot be had: "
            f"{error}. Mend base_model_name_or_path in its adapter_config.json"
        ) from None
    whole = AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype or "auto")
    return PeftModel.from_pretrained(whole, str(folder), is_trainable=True)


def generates(base: Any) -> bool:
    """Whether it is a causal language model of transformers."""
    return isinstance(base, PreTrainedModel) and base.can_generate()


def with_lora(model: Any, r: int, alpha: int, targets: Sequence[str] | str) -> Any:
    """The model with a fresh LoRA adapter, which alone is trained.

    Raises:
        MissingDependencyError: peft is not installed.
        ValueError: peft cannot adapt such modules.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise MissingDependencyError("lora_r > 0", "peft", "train") from error
    modules = targets if isinstance(targets, str) else list(targets)
    adapter = LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM")
    with quiet_transformers():
        return get_peft_model(model, adapter)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own in ours, nor what other libraries use of it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    try:
        with warnings.catch_warnings():
            # peft (0.21) asks transformers >= 5.23 by a name that is deprecated there.
            warnings.filterwarnings(
                "ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning
            )
            yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
