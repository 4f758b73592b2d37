"""Training on several processes, each started by ``accelerate launch`` or ``torchrun``.

Every process ("rank") runs the same script on its own share of a batch. There are two ways to
hold the weights, and the gradient of a step is the *sum* over ranks in both, so a rank divides
its loss by counts of the whole batch:

- data parallel: every rank has the whole model, and :func:`sum_gradients` runs once per step;
- FSDP2 (:func:`shard`): a rank keeps ``1/size`` of every parameter, gradient and optimizer state
  and gathers a layer when it computes with it. Every forward and backward is then a collective
  operation: all ranks must run the same number of them, in the same order (who has no work left
  runs blank batches), except inside :func:`whole`.

All functions do the obvious local thing when there is only one process.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlrf.errors import UsageError
from rlrf_trainers.model.backbone import base_model

BUCKET = 2**25
"""Numbers that travel in one message of :func:`sum_gradients`."""

T = TypeVar("T")
Named = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class World:
    """The processes of this run, and this one among them.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls, timeout_s: float = 3600.0) -> World:
        """Join the processes that the launcher started; to be called before a model is loaded.

        Under ``torchrun`` and ``accelerate launch`` (which say so in the environment) this
        initialises torch.distributed, unless that has been done already. Otherwise there is one
        process, and nothing is initialised.

        Args:
            timeout_s: how long a rank waits in a collective operation for the others before it
                fails. It must exceed the time by which one rank's rollouts may last longer.

        Raises:
            UsageError: more processes than GPUs on this machine.
            torch.distributed.DistError: the other processes could not be found.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        device = _device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            if size == 1:
                return cls(0, 1, device)
            # Two backends: numbers and objects of the host need no GPU to travel.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
            # A gloo thread that drops its last tensor while Python is shutting down aborts the
            # process, seen at the end of 7 of 21 runs under load: let it end first.
            atexit.register(time.sleep, 0.2)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and talks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks of a few numbers, exactly the same on every rank."""
        return [_sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self.gather(value))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def close(self) -> None:
        """Leave; for the end of a run that succeeded.

        After an exception let the process end instead: leaving waits for ranks which wait for
        this one, and it is by the end of the process that they (and the launcher) learn of it.
        """
        if dist.is_initialized():
            self.barrier()
            dist.destroy_process_group()


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):  # infinities of both signs, or numbers near them
        return math.nan


def _device() -> torch.device:
    """Where this process is to compute."""
    asked_for_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if asked_for_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    gpus, local = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    if local is None:
        return torch.device("cuda", torch.cuda.current_device())
    if int(local) >= gpus:
        raise UsageError(
            f"process {local} of this machine has no GPU: there are {gpus}. Start at most {gpus} "
            "processes (--nproc_per_node, --num_processes), or use the CPU (accelerate launch "
            "--cpu)"
        )
    return torch.device("cuda", int(local))


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


# --- data parallel ----------------------------------------------------------------------------


@torch.no_grad()
def sync_weights(model: Any) -> None:
    """Give every rank rank 0's parameters and buffers; before :func:`shard`."""
    if _alone():
        return
    for tensor in (*model.parameters(), *model.buffers()):
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over ranks; once per optimizer step, on every rank.

    A parameter without a gradient on some ranks counts as zero there; without one on all ranks it
    stays without. Gradients of 16 bit are added in fp32. Sharded parameters are left alone: FSDP
    has summed their gradients.
    """
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    if _alone() or not plain:
        return
    used = torch.tensor([p.grad is not None for p in plain], dtype=torch.int32)
    used = used.to(plain[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    bucket: list[Tensor] = []
    for parameter, anywhere in zip(plain, used.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = parameter.grad.contiguous()
        for piece in torch.split(parameter.grad.view(-1), BUCKET):
            same = not bucket or piece.dtype == bucket[0].dtype
            if not same or sum(p.numel() for p in bucket) + piece.numel() > BUCKET:
                _sum_bucket(bucket)
                bucket = []
            bucket.append(piece)
    _sum_bucket(bucket)


def _sum_bucket(pieces: Sequence[Tensor]) -> None:
    if not pieces:
        return
    dtype = torch.promote_types(pieces[0].dtype, torch.float32)
    flat = torch.cat(list(pieces)).to(dtype)
    dist.all_reduce(flat)
    sums = torch.split(flat, [p.numel() for p in pieces])
    for piece, summed in zip(pieces, sums, strict=True):
        piece.copy_(summed)


def grad_norm(parameters: Iterable[Tensor]) -> float:
    """The norm of all gradients as one vector, the same on every rank.

    For summed gradients: those of :func:`sum_gradients` or of FSDP. On every rank, for shards.
    """
    squares = {True: 0.0, False: 0.0}  # by whether a rank has only a shard
    gradients = [p.grad for p in parameters if p.grad is not None]
    for sharded in squares:
        norms = [
            torch.linalg.vector_norm(
                local(g), dtype=torch.promote_types(g.dtype, torch.float32)
            ).double()
            for g in gradients
            if isinstance(g, DTensor) == sharded
        ]
        squares[sharded] = float(torch.stack(norms).square().sum()) if norms else 0.0
    if not _alone():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, squares[True])
        squares[True] = math.fsum(everywhere)
    return math.sqrt(squares[True] + squares[False])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory: the tensor itself unless sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every rank; a collective operation if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


# --- FSDP2 ------------------------------------------------------------------------------------


def shard(model: Any) -> None:
    """Divide a model's parameters among the ranks (FSDP2): each layer, and the rest.

    Parameters become DTensors. To be called when the adapter is on, ``requires_grad`` is set and
    :func:`sync_weights` has run, and before an optimizer or a teacher is made.

    Args:
        model: a causal LM of transformers, PEFT-wrapped or not, the same on every rank. It may
            lie on the CPU: each layer goes to the rank's device as it is sharded.

    Raises:
        UsageError: trainable parameters of several dtypes; a model whose layers are not known.
    """
    if _alone():
        return
    base = base_model(model)
    dtypes = {p.dtype for p in base.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise UsageError(
            f"FSDP needs trainable parameters of one dtype, found {sorted(map(str, dtypes))}; "
            "convert the model with model.to(...)"
        )
    # Private, but what accelerate and transformers shard by too; test_backbone.py holds them to it.
    kinds = set(getattr(base, "_no_split_modules", None) or ())
    layers = [m for m in base.modules() if type(m).__name__ in kinds]
    if not layers:
        raise UsageError(
            f"{type(base).__name__} does not name its layers in _no_split_modules, so FSDP would "
            "gather all of it at once; train it without fsdp"
        )
    mesh = init_device_mesh(_device().type, (dist.get_world_size(),))
    half = any(d.itemsize == 2 for d in dtypes)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
    for module in (*layers, base):
        # The rest stays whole from its forward to its backward: the loss uses lm_head.weight.
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not base, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # sum, not mean
        module.set_force_sum_reduction_for_comms(True)  # which gloo can do


def is_sharded(model: Any) -> bool:
    """Whether :func:`shard` has divided this model."""
    return isinstance(base_model(model), FSDPModule)


def _units(model: Any) -> list[FSDPModule]:
    return [m for m in base_model(model).modules() if isinstance(m, FSDPModule)]


def reshard(model: Any) -> None:
    """Give up gathered parameters, where a forward without gradients has left some."""
    for unit in _units(model):
        unit.reshard()


_whole: WeakSet[Any] = WeakSet()  # models that are inside


@contextlib.contextmanager
def whole(model: Any) -> Iterator[None]:
    """All parameters on every rank: forwards inside are no collective operations.

    For sampling and scoring, where ranks run different numbers of forwards. To be entered on
    every rank, by the thread that trains; forwards inside must not record gradients. Nested ones
    do nothing.
    """
    base, units = base_model(model), _units(model)
    if not units or base in _whole:
        yield
        return
    _whole.add(base)
    try:
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        _whole.discard(base)
        for unit in units:
            unit.set_reshard_after_forward(unit is not base, recurse=False)
            unit.reshard()


def decoder_forward(model: Any, **kwargs: Any) -> Tensor:
    """The last hidden states ``[B, T, H]``, without the logits.

    Under FSDP ``model.get_output_embeddings().weight`` is a whole, plain tensor from here to the
    end of the backward pass, which may be used in any way and reduces its gradient.

    Args:
        model: a causal LM of transformers, PEFT-wrapped or not.
        kwargs: of its decoder: ``input_ids``, ``attention_mask`` ...
    """
    base = base_model(model)
    decoder = base.get_decoder()

    def forward(**kwargs: Any) -> Any:
        return decoder(**kwargs).last_hidden_state

    if not is_sharded(model):
        return forward(**kwargs)  # type: ignore[no-any-return]
    # FSDP acts in hooks of the root, so it is the root that must be called.
    own = base.__dict__.get("forward")
    base.forward = forward
    try:
        return base(**kwargs)  # type: ignore[no-any-return]
    finally:
        del base.forward
        if own is not None:
            base.forward = own


@contextlib.contextmanager
def swapped(model: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other values in its parameters; for forwards without gradients.

    Args:
        model: its parameters get the values; not inside :func:`whole`, which may be inside this.
        weights: by name as in ``model.named_parameters()``, of any dtype, sharded as they are.
    """
    reshard(model)
    parameters = {n: p for n, p in model.named_parameters() if n in weights}
    # FSDP gathers from memory of its own, which a parameter's data is a view of: write in place.
    before = {n: local(p.data) for n, p in parameters.items()}
    if is_sharded(model):
        before = {n: t.clone() for n, t in before.items()}
    try:
        _put(parameters, weights)
        yield
    finally:
        reshard(model)
        _put(parameters, before)


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(local(values[name]))
        else:
            parameter.data = values[name].to(parameter.dtype)


# --- state ------------------------------------------------------------------------------------


@torch.no_grad()
def full_state(tensors: Named, *, copy: bool = True) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0, whatever the number of ranks; empty on the others.

    To be called on every rank, with the same names in the same order. One tensor at a time is
    whole on the ranks' devices.

    Args:
        tensors: ``(name, tensor)``, sharded or not: ``model.named_parameters()``, optimizer state.
        copy: False lets whole tensors that are on the CPU share their memory.
    """
    main = _alone() or dist.get_rank() == 0
    state = {}
    for name, tensor in tensors:
        full = gathered(tensor)
        if main:
            state[name] = full.to("cpu", copy=copy)
    return state


@torch.no_grad()
def load_full(tensors: Named, state: Mapping[str, Tensor]) -> None:
    """Put rank 0's whole tensors into tensors that may be sharded; the way back of full_state.

    To be called on every rank, with the same names in the same order.

    Args:
        tensors: ``(name, tensor)``, which are written to in place.
        state: whole tensors by name; only rank 0's are used.

    Raises:
        UsageError: on every rank, before anything is written: a name or a shape is missing.
    """
    tensors = list(tensors)
    wrong = [n for n, t in tensors if n not in state or state[n].shape != t.shape]
    if not _alone():
        box = [wrong]
        dist.broadcast_object_list(box, 0)
        wrong = box[0]
    if wrong:
        raise UsageError(
            f"{len(wrong)} of {len(tensors)} tensors are not in the state or have another shape "
            f"there, the first is {wrong[0]!r}; it must be of the same model and optimizer"
        )
    for name, tensor in tensors:
        if _alone():
            tensor.copy_(state[name])
            continue
        part = local(tensor)
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=part.device)
        if dist.get_rank() == 0:
            full.copy_(state[name])
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, tensor.device_mesh, tensor.placements).to_local()
        else:
            dist.broadcast(full, 0)
        part.copy_(full)
