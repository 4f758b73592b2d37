"""A run's model as a plain folder, at its end or at a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlrf._files import Claim, Unwritable, check_name, put_folder, refused, standing
from rlrf.errors import UsageError
from rlrf.runs import Run


def export_model(
    run_dir: Path | str, out: Path | str, *, checkpoint: str = "final", merge: bool = True
) -> Path:
    """Write a run's model as a folder that transformers loads without rlrf or peft.

    Args:
        run_dir: a run of the trainers ``sdpo`` or ``grpo``.
        out: the folder to make.
        checkpoint: ``final``, ``best``, or the number of a step.
        merge: for a LoRA run, merge the adapter into the model; else write the adapter alone.

    Raises:
        UsageError: no such run or checkpoint; no adapter to write; ``out`` is there already, or
            cannot be made.
        Unwritable: the disk is full; nothing is left of it.
    """
    run = Run.open(run_dir)
    with new_folder(out) as write_out:
        return _exported(run, checkpoint, merge, write_out)


def _exported(
    run: Run, checkpoint: str, merge: bool, write_out: Callable[[Callable[[Path], Any]], Path]
) -> Path:
    from rlrf.config import build_config
    from rlrf_trainers.config import GRPOConfig, SDPOConfig
    from rlrf_trainers.core.loop import IN_MEMORY
    from rlrf_trainers.core.optimizer import trainable
    from rlrf_trainers.core.preflight import digest_of_weights, kept_weights
    from rlrf_trainers.engines.hf import HFPolicy
    from rlrf_trainers.model.backbone import quiet_transformers
    from rlrf_trainers.run.checkpoints import Checkpoints

    written = run.config.get("trainer", {})
    base = str(run.config.get("model", ""))
    if not isinstance(written, dict) or "lora_r" not in written or not base:
        raise UsageError(f"{str(run.path)!r} is no run of the trainers sdpo or grpo")
    no_adapter = UsageError(
        f"the run {str(run.path)!r} trained all weights (lora_r = 0), so there is no adapter to "
        "export; leave out --adapter"
    )
    final, tensors = standing(run.path / "model"), {}
    digest = run.config.get("model_digest") or {}
    if checkpoint == "final":
        if not (final.is_dir() and run.info.get("model")):
            raise UsageError(
                f"the run {str(run.path)!r} left no model/; export a checkpoint instead "
                "(--checkpoint best, or a step)"
            )
        adapter = (final / "adapter_config.json").exists()
        if not (merge or adapter):
            raise no_adapter
        if not (merge and adapter):
            return write_out(lambda folder: shutil.copytree(final, folder, dirs_exist_ok=True))
    else:
        state = Checkpoints(run.path).load(int(checkpoint) if checkpoint.isdigit() else checkpoint)
        tensors = state.part("master") or state.tensors
        digest = state.data.get("model_digest") or {}
    if base == IN_MEMORY:
        raise UsageError(
            f"the run {str(run.path)!r} began with a model that was loaded in memory, which cannot "
            "be loaded again; only its final model can be exported, an adapter with --adapter"
        )
    if tensors:
        cls = SDPOConfig if "distillation_alpha" in written else GRPOConfig
        policy = HFPolicy(base, device="cpu")
        model = trainable(policy.model, build_config(cls, written))
        parameters = dict(model.named_parameters())
        if digest.get("frozen") and not hasattr(model, "peft_config"):
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in tensors)
        trained = {n for n, p in parameters.items() if p.requires_grad}
        for name in sorted(trained | tensors.keys()):
            here, there = parameters.get(name), tensors.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise UsageError(
                    f"the model {base!r} is not the one the run began with: {name!r} is "
                    f"{_shape(here)} there, and {_shape(there)} in the checkpoint"
                )
            here.data.copy_(there)
    else:
        policy = HFPolicy(final, device="cpu")
        model = policy.model
    same_dtype = digest.get("dtype") == str(next(model.parameters()).dtype)
    if same_dtype and digest_of_weights(kept_weights(model)) != digest.get("kept"):
        raise UsageError(
            f"the model {base!r} is not the one the run began with: the weights that were not "
            "trained, to which the trained ones belong, are others; put it back as it was"
        )
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload() if merge else model
    elif not merge:
        raise no_adapter

    def write(folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)

    return write_out(write)


def _shape(tensor: Any) -> str:
    return "missing" if tensor is None else f"of the shape {list(tensor.shape)}"


@contextlib.contextmanager
def new_folder(out: Path | str) -> Iterator[Callable[[Callable[[Path], Any]], Path]]:
    """Make sure of a folder that is to be made, and give what fills it: whole or not at all.

    Raises:
        UsageError: it is there already; it cannot be made.
        Unwritable: the disk is full.
    """
    out = check_name(Path(out))
    there = UsageError(f"{str(out)!r} is there already; remove it or name another folder")
    if not out.name:  # "." or "/"
        raise there
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(f"{str(out)!r} cannot be written", error) from None

    def fill(write: Callable[[Path], Any]) -> Path:
        try:
            put_folder(out, write)
        except OSError as error:
            raise refused(f"{str(out)!r} cannot be written", error) from None
        except Exception as error:  # safetensors' and tokenizers' for a full disk are their own
            raise Unwritable(f"{str(out)!r} cannot be written: {error}") from error
        return out

    claim = Claim(out.with_name(f".{out.name}.lock"), f"the folder {str(out)!r}")
    try:
        if os.path.lexists(out):
            raise there
        yield fill
    finally:
        claim.close()
