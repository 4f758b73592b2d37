"""The update: a model under training, from samples to optimizer steps.

What a trainer's loss needs: hidden states of the sampled tokens, their log-probabilities, the
chunked loss over the vocabulary, weights for what the sampler drew, mini- and micro-batches, and
steps on fp32 master weights. Where rollouts come from is :mod:`rlrf_trainers.core.source`; what
happens between steps is :mod:`rlrf_trainers.core.loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlrf.errors import RlrfError
from rlrf.notices import notice
from rlrf_trainers.config import TrainerConfig
from rlrf_trainers.core import preflight
from rlrf_trainers.core.batch import Batch, S, Sample
from rlrf_trainers.core.optimizer import MasterAdamW, trainable
from rlrf_trainers.engines.hf import HFPolicy
from rlrf_trainers.losses import BatchCounts, Divergence, rollout_importance_weights
from rlrf_trainers.losses.vocabulary import (
    Logits,
    Objective,
    TeacherLogits,
    vocabulary_logps,
    vocabulary_loss,
)
from rlrf_trainers.model import distributed
from rlrf_trainers.model.backbone import base_model
from rlrf_trainers.model.distributed import World
from rlrf_trainers.model.head import Head
from rlrf_trainers.model.prefix import Layout, can_share, completion_hidden, micro_batches
from rlrf_trainers.run.checkpoints import State, prefixed
from rlrf_trainers.run.record import Clock, Record


class Learner:
    """The machinery of the optimizer steps.

    Args:
        policy: the model, which from here on is trained.
        config: see :class:`TrainerConfig`.
        world: the processes.
        digest: whether to find out which model it is (:attr:`identity`), which takes reading it.

    Attributes:
        step: the step under way; 0 before the first.
        record: where metrics go; given by who makes the learner.
        identity: digests of what the model was given as, and of what training leaves as it is.

    Raises:
        UsageError: processes whose models differ; what the optimizer refuses.
    """

    record: Record

    def __init__(
        self, policy: HFPolicy, config: TrainerConfig, world: World, *, digest: bool = False
    ) -> None:
        self.policy, self.config, self.world = policy, config, world
        as_given = self._digest(policy.model) if digest else None
        self.model: Any = trainable(policy.model, config)
        policy.model = self.model
        preflight.check_alike(
            world, {n: f"{p.dtype} {list(p.shape)}" for n, p in self.model.named_parameters()}
        )
        distributed.sync_weights(self.model)
        self.identity = self._identify(as_given)
        if config.fsdp:
            distributed.shard(self.model)
        self.device = next(self.model.parameters()).device
        self.tokenizer = policy.tokenizer
        self.head = Head.of(self.model, config.temperature)
        self.optimizer = MasterAdamW(self.model, config)
        self.step = 0
        self.clock = Clock()
        self._loss = 0.0

    def _digest(self, model: Any) -> str:
        return preflight.digest_of_weights(model.named_parameters()) if self.world.is_main else ""

    def _identify(self, as_given: str | None) -> dict[str, Any] | None:
        """Digests of what the model was, and of what of it training leaves as it is."""
        if as_given is None:
            return None
        mine = None
        if self.world.is_main:
            mine = {
                "given": as_given,
                "kept": preflight.digest_of_weights(preflight.kept_weights(self.model)),
                "dtype": str(next(self.model.parameters()).dtype),
                "frozen": sum(not p.requires_grad for p in self.model.parameters()),
                "tokenizer": preflight.digest_of_tokenizer(self.policy.tokenizer),
            }
        return self.world.broadcast(mine)

    # --- the shape of an update -------------------------------------------------------------

    def mini_batches(self, samples: Sequence[S]) -> list[list[S]]:
        """The samples of each optimizer step: whole groups, ``mini_batch_prompts`` at a time.

        Several processes take as many steps as the one that needs most; a list may be empty.
        """
        groups: dict[str, list[S]] = {}
        for sample in samples:
            groups.setdefault(sample.rollout.group_id, []).append(sample)
        whole = list(groups.values())
        size = self.config.mini_batch_prompts // self.world.size or max(1, len(whole))
        batches = [
            [sample for group in whole[start : start + size] for sample in group]
            for start in range(0, len(whole), size)
        ]
        return batches + [[] for _ in range(self.world.max(len(batches)) - len(batches))]

    def anywhere(self, here: bool) -> bool:
        """Whether it is so on any process; to be asked on every one."""
        return bool(self.world.max(int(here)))

    def updates(self, samples: Sequence[S]) -> Iterator[list[S]]:
        """The samples of each optimizer step to take, ``num_iterations`` times over.

        Where there are several, the log-probabilities before the first are remembered.
        """
        steps = [
            mini_batch
            for _ in range(self.config.num_iterations)
            for mini_batch in self.mini_batches(samples)
            if self.anywhere(any(s.matters for s in mini_batch))
        ]
        if len(steps) > 1:  # the later ones are off-policy
            self.remember_old_logps([s for s in samples if s.matters])
        yield from steps

    def windows(self, samples: Sequence[S], blank: Callable[[], S]) -> Iterator[list[Batch[S]]]:
        """The micro-batches, so many at a time as a teacher reads at once."""
        batches = self.micro_batches(samples, blank)
        for start in range(0, len(batches), _WINDOW):
            yield batches[start : start + _WINDOW]

    def micro_batches(self, samples: Sequence[S], blank: Callable[[], S]) -> list[Batch[S]]:
        """The samples of each forward; how they are split does not change the loss.

        With sharded weights every process must run as many forwards as the others: who has no
        samples left gets batches of ``blank()``, which weigh nothing.
        """
        rows = micro_batches(
            [s.rollout.prompt_ids for s in samples],
            [s.rollout.completion_ids for s in samples],
            self.config.micro_batch_tokens,
            share=can_share(self.model, logits=self.head.module is None),
        )
        found = [Batch([samples[i] for i in some], self.device) for some in rows]
        if distributed.is_sharded(self.model):  # to be agreed on before the first forward
            for _ in range(self.world.max(len(found)) - len(found)):
                found.append(Batch([blank()], self.device, blank=True))
        return found

    def counts(self, samples: Sequence[Sample], active: Sequence[Sample]) -> BatchCounts:
        """What the loss of an optimizer step is divided by, over all processes."""
        tokens = float(sum(s.tokens for s in active))
        rows, active_rows, all_tokens = self.world.sum([len(samples), len(active), tokens])
        return BatchCounts(rows, active_rows, all_tokens, tokens, self.world.size)

    # --- passes over a micro-batch ------------------------------------------------------------

    def hidden(self, prompts: Sequence[Sequence[int]], layout: Layout) -> Tensor:
        """``[N, H]`` hidden states of the sampled tokens.

        Without gradients, in forwards of at most four times ``micro_batch_tokens``, as they keep
        no activations; in one where the weights are sharded.
        """
        naive = self.head.module is None
        if naive:
            name = type(base_model(self.model)).__name__
            notice(
                f"head/{name}",
                f"{name} makes its logits in a way that rlrf does not know, so the loss holds them "
                "all at once: loss_chunk_mb has no effect. Lower micro_batch_tokens if memory runs "
                "out",
            )
        if torch.is_grad_enabled() or distributed.is_sharded(self.model):
            return completion_hidden(self.model, prompts, layout, logits=naive)
        budget, parts, start = 4 * self.config.micro_batch_tokens, [], 0
        while start < len(prompts):
            end, tokens = start, 0
            while end < len(prompts):
                tokens += len(prompts[end]) + layout.lengths[end]
                if end > start and tokens > budget:
                    break
                end += 1
            rows = slice(start, end)
            parts.append(
                completion_hidden(self.model, prompts[rows], layout.rows_of(rows), logits=naive)
            )
            start = end
        return torch.cat(parts)

    def reader(
        self,
        batch: Batch[Any],
        prompts: Sequence[Sequence[int]] | None = None,
        layout: Layout | None = None,
    ) -> Callable[[], Tensor]:
        """What a teacher runs on a micro-batch, after other prompts if they are given."""
        return partial(self.hidden, prompts or batch.prompts, layout or batch.layout)

    def loss(
        self,
        batch: Batch[Any],
        objective: Objective,
        *,
        divergence: Divergence | None = None,
        teacher: TeacherLogits | None = None,
    ) -> dict[str, Tensor]:
        """A micro-batch's share of the loss: its gradient is added up; metrics ``[N]``."""
        loss, metrics = vocabulary_loss(
            batch.hidden,
            self.head,
            batch.ids,
            objective,
            divergence,
            teacher,
            chunk_bytes=self.config.loss_chunk_mb << 20,
        )
        self.backward(loss)
        return metrics

    def logps(self, logits: Logits, ids: Tensor) -> Tensor:
        """``[N]`` log-probabilities, detached, of given tokens under logits made in chunks."""
        vocabulary = self.head.vocabulary or self.model.config.get_text_config().vocab_size
        return vocabulary_logps(logits, ids, vocabulary, self.config.loss_chunk_mb << 20)

    @torch.no_grad()
    def remember_old_logps(self, samples: Sequence[Sample]) -> None:
        """Log-probabilities before the first of several optimizer steps."""
        for batch in self.micro_batches(samples, Sample.of_nothing):
            batch.hidden = self.hidden(batch.prompts, batch.layout)
            for sample, row in zip(
                batch.samples, batch.split(self.student_logps(batch)), strict=True
            ):
                sample.old_logps = row

    def student_logps(self, batch: Batch[Any]) -> Tensor:
        """``[N]`` the student's log-probabilities, detached, before its loss is computed."""
        fixed = batch.hidden.detach()
        return self.logps(lambda rows: self.head.logits(fixed[rows]), batch.ids)

    def row_log_ratios(self, batch: Batch[Any]) -> Tensor:
        """``[N]``: the mean of ``logp - old logp`` over each token's row, detached (GSPO)."""
        old = batch.old_logps
        if old is None:
            return torch.zeros(len(batch.ids), device=self.device)
        return batch.row_means(self.student_logps(batch) - old)

    def sampler_correction(
        self, batch: Batch[Any], *, by_row: bool = False
    ) -> Callable[[Tensor, slice], Tensor]:
        """Weights for the sampler's distribution not being ours.

        With ``by_row`` every token has the mean weight of its row, as TRL has it where the
        policy's ratio is one per row. All ones when switched off, when the policy reports no
        log-probabilities, and under top_p or top_k, where the sampled distribution is another one
        by design.

        Returns:
            ``(old_logps [n] of a chunk, rows) -> weights [n]``.
        """
        c, sampled = self.config, batch.sampler_logps
        if c.rollout_is == "none" or sampled is None:
            return lambda old, _: torch.ones_like(old)
        if c.top_p < 1 or c.top_k > 0:
            self.record.warn(
                "rollout_is",
                "rollout_is is off: under top_p < 1 or top_k > 0 the sampled distribution is "
                "not the policy's, and the ratio would be biased by the mass that was cut",
            )
            return lambda old, _: torch.ones_like(old)
        clip, mode = c.rollout_is_threshold, c.rollout_is
        if mode in ("token_truncate", "token_mask") and not by_row:
            return lambda old, rows: rollout_importance_weights(
                old, sampled[rows].to(old), clip, mode
            )
        # One weight for a whole reply: its log-probabilities must be known before its loss is.
        old = batch.old_logps
        if old is None:
            old = self.student_logps(batch)
        layout = batch.layout
        weights = layout.unpadded(
            rollout_importance_weights(
                layout.padded(old),
                layout.padded(sampled.to(old)),
                clip,
                mode,
                layout.mask(batch.device),
            )
        )
        if by_row:
            weights = batch.row_means(weights)
        return lambda _, rows: weights[rows]

    # --- optimizer ------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a micro-batch's share of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._loss += loss.item()

    def optimizer_step(self) -> bool:
        """Clip, step on the fp32 masters, and forget the gradients; whether weights have moved.

        A gradient that is not finite skips the step and says so.

        Raises:
            RlrfError: the loss is not finite, on any process; no weight has changed.
        """
        loss, self._loss = self.world.sum([self._loss])[0], 0.0
        if not math.isfinite(loss):  # decided together: one process must not leave the others
            self.optimizer.zero_grad()
            raise RlrfError(
                f"the loss of step {self.step} is {loss}; the weights are those of the step "
                "before. Lower learning_rate or max_grad_norm, or the size of the rewards"
            )
        norm = self.optimizer.clip(self.config.max_grad_norm)
        rate = self.learning_rate()
        self.record("loss", loss)
        self.record("grad_norm", norm)
        self.record("learning_rate", rate)
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step(rate)
        else:
            self.record.warn("grad_norm", f"step {self.step}: grad_norm is {norm}; step skipped")
        self.optimizer.zero_grad()
        return finite

    def learning_rate(self) -> float:
        """The scheduled learning rate of this step."""
        c = self.config
        if self.step <= c.warmup_steps:
            return c.learning_rate * self.step / (c.warmup_steps + 1)
        done = (self.step - 1 - c.warmup_steps) / max(1, c.max_steps - c.warmup_steps)
        factor = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }[c.lr_scheduler_type]
        return c.learning_rate * factor

    # --- state ------------------------------------------------------------------------------

    def weights(self) -> Iterable[tuple[str, Tensor]]:
        """All of the model's, whole, under the names of its ``state_dict()``."""
        own: dict[str, Tensor] = self.model.state_dict()
        return (
            distributed.full_state(own.items()) if distributed.is_sharded(self.model) else own
        ).items()

    def state_dict(self, *, copy: bool = True) -> State:
        """Weights, optimizer, random numbers of torch; whole tensors, on the main process only.

        Args:
            copy: False lets tensors share memory with the live ones, to be written at once.
        """
        masters = distributed.full_state(self.optimizer.masters.items(), copy=copy)
        tensors = prefixed("master", masters)
        tensors |= prefixed("adamw", distributed.full_state(self.optimizer.state(), copy=copy))
        tensors["rng.torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        data = {"step": self.step, "trained_s": self.clock.trained}
        return State(tensors, data | {"adamw": len(self.optimizer.state())})

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            UsageError: it is of another model.
        """
        self.optimizer.load(state.part("master"), state.part("adamw"))
        torch.set_rng_state(state.tensors["rng.torch"])
        if torch.cuda.is_available() and "rng.cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["rng.cuda"])
        self.step = state.data["step"]
        self.clock.trained = state.data["trained_s"]


_WINDOW = 8
"""Micro-batches whose teacher's hidden states are kept at once: to swap the teacher's weights in
takes time, their hidden states take memory, a few kilobytes a token."""
