"""What every trainer here needs around its algorithm: a model, its sampler, an optimizer, a record.

:class:`Learner` keeps a trainer's ``train()`` down to the algorithm. It loads the model, draws
tasks, collects rollouts, steps the optimizer on fp32 master weights, evaluates and writes the run
directory.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import rlrf
from rlrf import Env, Rollout, SamplingParams, Task
from rlrf.errors import MissingDependencyError, RlrfError, UsageError
from rlrf.runs import Run
from rlrf_trainers.config import TrainerConfig
from rlrf_trainers.forward import Layout, completion_logits, micro_batches
from rlrf_trainers.losses import rollout_importance_weights, selected_logps
from rlrf_trainers.policies.hf import HFPolicy, quiet_transformers


@dataclass
class Sample:
    """A scored rollout on its way through an update; trainers add what they need."""

    rollout: Rollout
    old_logps: Tensor | None = None
    """``[T]`` before the first of several optimizer steps; None when there is but one."""

    @property
    def tokens(self) -> int:
        """How many tokens the policy sampled."""
        return sum(self.rollout.completion_mask)


S = TypeVar("S", bound=Sample)


class Learner:
    """The machinery of one training run.

    Args:
        model: a folder or name, a loaded model, or an :class:`HFPolicy`.
        env: the training environment.
        config: see :class:`TrainerConfig`.
        run_dir: where to write metrics, rollouts and the model; None writes nothing.
        eval_env: the held-out environment; None: ``env``'s ``eval`` split if it has one.
        on_step: called with every line of metrics.

    Raises:
        UsageError: an empty task set, a model without a chat template.
    """

    def __init__(
        self,
        model: Any,
        env: Env,
        config: TrainerConfig,
        *,
        run_dir: str | Path | None = None,
        eval_env: Env | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.env, self.on_step = config, env, on_step
        self.tasks = env.tasks()
        len(self.tasks)  # an empty task set is an error before the model is loaded
        self.eval_env = eval_env if eval_env is not None else env
        self.eval_split = (
            self.eval_env.split if eval_env is not None or "eval" not in env.splits else "eval"
        )
        self.policy = model if isinstance(model, HFPolicy) else HFPolicy(model)
        self.model: Any = self._trainable(self.policy.model)
        self.policy.model = self.model
        self.tokenizer = self.policy.tokenizer
        self.optimizer = MasterAdamW(self.model, config)
        self.rng = random.Random(config.seed)
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.history: list[dict[str, float]] = []
        self.step = 0
        self.clock = Clock()
        self._order: list[int] = []
        self._warned: set[str] = set()
        self.run = (
            None
            if run_dir is None
            else Run.create(
                run_dir,
                config={
                    "trainer": config.model_dump(),
                    "model": str(getattr(self.model.config, "_name_or_path", "") or "in memory"),
                },
                env=env,
            )
        )

    def _trainable(self, model: Any) -> Any:
        """The model with what is to be trained set to require gradients."""
        if self.config.lora_r and not hasattr(model, "peft_config"):
            try:
                from peft import LoraConfig, get_peft_model
            except ModuleNotFoundError as error:
                raise MissingDependencyError("lora_r > 0", "peft", "train") from error
            adapter = LoraConfig(
                r=self.config.lora_r,
                lora_alpha=self.config.lora_alpha or 2 * self.config.lora_r,
                lora_dropout=self.config.lora_dropout,
                target_modules=self.config.lora_target_modules,
                task_type="CAUSAL_LM",
            )
            with warnings.catch_warnings():
                # peft asks transformers >= 5.23 by a name that is deprecated there.
                warnings.simplefilter("ignore", FutureWarning)
                model = get_peft_model(model, adapter)
        elif not self.config.lora_r and not hasattr(model, "peft_config"):
            model.requires_grad_(True)
        if self.config.gradient_checkpointing:
            # Renamed in transformers 5.23; the old name warns there.
            name = "activation_checkpointing_enable"
            getattr(model, name, model.gradient_checkpointing_enable)()
        # Dropout would make the scored distribution another one than the sampled; train() mode
        # is only needed where checkpointing asks for it.
        model.train(self.config.gradient_checkpointing)
        return model

    # --- data -----------------------------------------------------------------------------

    def next_tasks(self, n: int) -> list[Task]:
        """``n`` tasks, each task once per shuffled pass over the split."""
        chosen: list[Task] = []
        while len(chosen) < n:
            if not self._order:
                self._order = list(range(len(self.tasks)))
                self.rng.shuffle(self._order)
            chosen.append(self.tasks[self._order.pop()])
        return chosen

    def collect(self) -> list[Rollout]:
        """One generation batch: ``prompts_per_step * num_generations`` rollouts."""
        c = self.config
        with self.clock("rollout"):
            rollouts = rlrf.rollout(
                self.env,
                self.policy,
                self.next_tasks(c.prompts_per_step),
                group_size=c.num_generations,
                max_concurrency=c.max_concurrency,
                deadline_s=c.rollout_deadline_s,
                params=SamplingParams(
                    temperature=c.temperature,
                    top_p=c.top_p,
                    top_k=c.top_k,
                    max_tokens=c.max_completion_length,
                ),
                seed=c.seed * 1_000_003 + self.step * 65_537,
            )
        self._record_rollouts(rollouts)
        return rollouts

    def _record_rollouts(self, rollouts: Sequence[Rollout]) -> None:
        scored = [r for r in rollouts if r.scored]
        self.record("unscored_fraction", 1 - len(scored) / len(rollouts))
        if not scored:
            failures = sorted({r.failure or "" for r in rollouts})
            self.warn(
                "unscored",
                f"no rollout of step {self.step} could be scored; nothing is learnt from it. "
                f"First failure: {failures[0]}",
            )
            return
        if len(scored) < len(rollouts):
            self.warn(
                "unscored",
                f"{len(rollouts) - len(scored)} of {len(rollouts)} rollouts of step {self.step} "
                f"are unscored and left out: {next(r.failure for r in rollouts if not r.scored)}",
            )
        lengths = [float(sum(r.completion_mask)) for r in scored]
        self.record("completions/mean_length", sum(lengths) / len(lengths))
        logprobs = [
            logp
            for r in scored
            for logp, sampled in zip(r.logprobs, r.completion_mask, strict=False)
            if sampled
        ]
        if logprobs:  # -log pi of a sample from pi estimates the entropy without bias
            self.record("entropy", -sum(logprobs) / len(logprobs))
        self.record("completions/min_length", min(lengths))
        self.record("completions/max_length", max(lengths))
        cut = sum(r.finish_reason == "length" for r in scored)
        self.record("completions/clipped_ratio", cut / len(scored))
        for name in sorted({name for r in scored for name in r.metrics}):
            values = [r.metrics[name] for r in scored if name in r.metrics]
            self.record(f"env/{name}", sum(values) / len(values))

    # --- the shape of an update -------------------------------------------------------------

    def mini_batches(self, samples: Sequence[S]) -> list[list[S]]:
        """The samples of each optimizer step: whole groups, ``mini_batch_prompts`` at a time."""
        groups: dict[str, list[S]] = {}
        for sample in samples:
            groups.setdefault(sample.rollout.group_id, []).append(sample)
        whole = list(groups.values())
        size = self.config.mini_batch_prompts or max(1, len(whole))
        return [
            [sample for group in whole[start : start + size] for sample in group]
            for start in range(0, len(whole), size)
        ]

    def micro_batches(self, samples: Sequence[S]) -> list[list[S]]:
        """The samples of each forward; how they are split does not change the loss."""
        rows = micro_batches(
            [s.rollout.prompt_ids for s in samples],
            [s.rollout.completion_ids for s in samples],
            self.config.micro_batch_tokens,
        )
        return [[samples[i] for i in row] for row in rows]

    def logits(self, prompts: Sequence[Sequence[int]], layout: Layout) -> Tensor:
        """``[N, V]`` logits of the completions' tokens at the sampling temperature."""
        return completion_logits(self.model, prompts, layout, self.config.temperature)

    def student(self, batch: Sequence[Sample], layout: Layout) -> tuple[Tensor, Tensor]:
        """The student's logits ``[N, V]`` and the sampled ids ``[N]``."""
        logits = self.logits([s.rollout.prompt_ids for s in batch], layout)
        return logits, layout.flat(layout.completions, logits.device)

    @torch.no_grad()
    def remember_old_logps(self, samples: Sequence[Sample]) -> None:
        """Log-probabilities before the first of several optimizer steps."""
        for batch in self.micro_batches(samples):
            layout = layout_of(batch)
            logps = layout.padded(selected_logps(*self.student(batch, layout)))
            for sample, row in zip(batch, logps, strict=True):
                sample.old_logps = row[: len(sample.rollout.completion_ids)]

    def old_logps(self, batch: Sequence[Sample], logps: Tensor) -> Tensor:
        """``[B, T]`` detached: the remembered ones, or ``logps`` when this is the only step."""
        rows = [s.old_logps for s in batch if s.old_logps is not None]
        return stack_rows(rows, logps) if len(rows) == len(batch) else logps.detach()

    def sampler_weights(self, batch: Sequence[Sample], old_logps: Tensor) -> Tensor:
        """Detached per-token weights ``[B, T]`` for the sampler's distribution not being ours.

        All ones when switched off, when the policy reports no log-probabilities, and under top_p
        or top_k, where the sampled distribution is another one by design.
        """
        c = self.config
        rows = [torch.tensor(s.rollout.logprobs) for s in batch if s.rollout.logprobs]
        if not c.rollout_is or len(rows) < len(batch):
            return torch.ones_like(old_logps)
        if c.top_p < 1 or c.top_k > 0:
            self.warn(
                "rollout_is",
                "rollout_is is off: under top_p < 1 or top_k > 0 the sampled distribution is "
                "not the policy's, and the ratio would be biased by the mass that was cut",
            )
            return torch.ones_like(old_logps)
        sampled = stack_rows(rows, old_logps)
        gap = (old_logps - sampled).abs() * completion_mask(batch, old_logps.device)
        self.record("sampling/sampling_logp_difference/max", gap.max().item())
        return rollout_importance_weights(old_logps, sampled, clip=c.rollout_is_threshold)

    # --- optimizer ------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of a micro-batch's share of the loss.

        A loss that is not finite is refused before it can reach a weight.
        """
        if not torch.isfinite(loss):
            raise RlrfError(
                f"the loss of step {self.step} is {loss.item()}; the weights are those of the "
                "step before. Lower learning_rate or max_grad_norm"
            )
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.metrics["_loss"].append(loss.item())

    def optimizer_step(self) -> None:
        """Clip, step on the fp32 masters, and forget the gradients.

        A gradient that is not finite skips the step and says so.
        """
        norm = self.optimizer.clip(self.config.max_grad_norm)
        rate = self.learning_rate()
        self.record("loss", sum(self.metrics.pop("_loss", [0.0])))
        self.record("grad_norm", norm)
        self.record("learning_rate", rate)
        if math.isfinite(norm):
            self.optimizer.step(rate)
        else:
            self.warn("grad_norm", f"step {self.step}: grad_norm is {norm}; step skipped")
        self.optimizer.zero_grad()

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

    # --- evaluation -----------------------------------------------------------------------

    def evaluate_if_due(self) -> None:
        """Evaluate before the first step, after the last, and every ``eval_steps``."""
        c = self.config
        last = self.step == c.max_steps
        due = self.step == 0 or last or (c.eval_steps and self.step % c.eval_steps == 0)
        if not due:
            return
        with self.clock("eval"):
            tasks = self.eval_env.tasks(self.eval_split)
            n = min(c.eval_tasks or len(tasks), len(tasks))
            # A fixed draw, the same at every evaluation and in every run of any seed.
            chosen = random.Random(0).sample(range(len(tasks)), n)
            rollouts = rlrf.rollout(
                self.eval_env,
                self.policy,
                [tasks[i] for i in chosen],
                group_size=c.eval_samples,
                max_concurrency=c.max_concurrency,
                deadline_s=c.rollout_deadline_s,
                params=SamplingParams(
                    temperature=c.eval_temperature,
                    top_p=c.eval_top_p,
                    max_tokens=c.max_completion_length,
                ),
                seed=self.step,
            )
        scored = [r for r in rollouts if r.reward is not None]
        if scored:
            self.record("eval/pass_rate", sum(r.solved for r in scored) / len(scored))
            self.record("eval/reward", sum(r.reward or 0.0 for r in scored) / len(scored))
            lengths = [sum(r.completion_mask) for r in scored]
            self.record("eval/mean_length", sum(lengths) / len(lengths))
        self.log_rollouts(rollouts, split="eval")

    # --- the record -----------------------------------------------------------------------

    def record(self, name: str, value: float) -> None:
        """Add a value to this step's metric; several are averaged."""
        self.metrics[name].append(float(value))

    def log_step(self) -> dict[str, float]:
        """Close the step: average its metrics, write the line, tell the caller."""
        line: dict[str, float] = {"step": self.step}
        line |= {k: sum(v) / len(v) for k, v in self.metrics.items() if v}
        line |= {f"time/{k}": v for k, v in self.clock.take().items()}
        line["time/train_total"] = self.clock.trained
        self.metrics.clear()
        self.history.append(line)
        if self.run is not None:
            self.run.log(self.step, {k: v for k, v in line.items() if k != "step"})
        if self.on_step is not None:
            self.on_step(line)
        return line

    def log_rollouts(
        self,
        rollouts: Sequence[Rollout],
        *,
        split: str = "train",
        extra: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write rollouts, with what the teacher saw and thought where ``extra`` says it."""
        if self.run is None or not self.config.log_rollouts:
            return
        empty: dict[str, Any] = {"teacher_prompt": None, "token_kl": None}
        self.run.log_rollouts(
            self.step,
            (
                {
                    **r.to_dict(),
                    "step": self.step,
                    "split": split,
                    "tokens": [self.tokenizer.decode([t]) for t in r.completion_ids],
                    **empty,
                    **(extra[i] if extra else {}),
                }
                for i, r in enumerate(rollouts)
            ),
        )

    def warn(self, topic: str, message: str) -> None:
        """Warn once per topic on the console, and always in the run's record."""
        if self.run is not None:
            self.run.event("warning", message)
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def finish(self) -> rlrf.TrainResult:
        """Save the model and close the record."""
        model_dir = self._save_model()
        if self.run is None:
            return rlrf.TrainResult(self.history)
        self.run.finish("done")
        return rlrf.TrainResult(self.history, self.run.path, model_dir)

    def _save_model(self) -> Path | None:
        if self.run is None or not self.config.save_model:
            return None
        path: Path = self.run.path / "model"
        with quiet_transformers():
            self.model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        return path

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Close the record of a run that fails; nothing is lost, the model included."""
        try:
            yield
        except BaseException as error:
            if self.run is not None:
                stopped = isinstance(error, KeyboardInterrupt)
                self.run.event("error", f"{type(error).__name__}: {error}")
                self._save_model()
                self.run.finish("interrupted" if stopped else "failed")
            raise


class MasterAdamW:
    """AdamW on fp32 masters of whatever dtype the model computes in.

    A bf16 weight of 0.02 cannot take a step of 1e-5: the next bf16 number is 1e-4 away. So every
    parameter that is not fp32 gets an fp32 master; gradients are copied up, weights copied down.
    fp32 parameters (LoRA adapters) are their own masters.
    """

    def __init__(self, model: Any, config: TrainerConfig) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise UsageError(
                "the model has no trainable parameter; set lora_r, or unfreeze some weights"
            )
        self.masters: dict[str, Tensor] = {
            n: p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
            for n, p in self.parameters.items()
        }
        self.adamw = torch.optim.AdamW(
            self.masters.values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def clip(self, max_norm: float) -> float:
        """Scale the gradients to ``max_norm`` and return their norm before."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            return 0.0
        norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients])
        norm = float(torch.linalg.vector_norm(norms))
        if math.isfinite(norm) and norm > max_norm:
            for g in gradients:
                g.mul_(max_norm / norm)
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One AdamW step at ``learning_rate``."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self.adamw.step()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None


class Clock:
    """Seconds spent per phase of a step, and on training in all (evaluation apart)."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._step_start = time.perf_counter()
        self.trained = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what happens inside as ``phase``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[phase] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The phases of the step that ends now, with its total."""
        now = time.perf_counter()
        spent = {**self._spent, "step": now - self._step_start}
        self.trained += spent["step"] - spent.get("eval", 0.0)
        self._spent.clear()
        self._step_start = now
        return spent


def layout_of(batch: Sequence[Sample]) -> Layout:
    """The layout of a batch's completions."""
    return Layout([s.rollout.completion_ids for s in batch])


def completion_mask(batch: Sequence[Sample], device: torch.device) -> Tensor:
    """``[B, T]``: 1 where the policy sampled the token, 0 elsewhere and behind the ends."""
    layout = layout_of(batch)
    return layout.padded(layout.flat([s.rollout.completion_mask for s in batch], device))


def stack_rows(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows of different length as ``[B, T]`` of ``like``'s width and dtype, zeros behind ends."""
    out = torch.zeros(len(rows), like.shape[1], dtype=like.dtype, device=like.device)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row.to(out)
    return out
