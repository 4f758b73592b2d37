"""What every trainer here needs around its algorithm: a model, its sampler, an optimizer, a record.

:class:`Learner` keeps a trainer's ``train()`` down to the algorithm. It loads the model, draws
tasks, collects rollouts, steps the optimizer on fp32 master weights, evaluates, writes the run
directory and its checkpoints. Started on several processes it gives each its share of the tasks
and adds up what they find.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import rlrf
from rlrf import Env, Rollout, SamplingParams, Task, progress
from rlrf._files import Unwritable, put_folder, reason, settle_folder
from rlrf.errors import RlrfError, UsageError, describe
from rlrf.notices import notice
from rlrf.runs import Run, environment_lock, is_run, own, unwritten
from rlrf_trainers.commands.models import IN_MEMORY
from rlrf_trainers.config import TrainerConfig
from rlrf_trainers.core import preflight
from rlrf_trainers.core.batch import Batch, S, Sample
from rlrf_trainers.core.estimate import estimate, plan
from rlrf_trainers.core.optimizer import MasterAdamW, trainable
from rlrf_trainers.engines.hf import HFPolicy, quiet_transformers
from rlrf_trainers.losses import (
    BatchCounts,
    Divergence,
    reward_deviation,
    rollout_importance_weights,
)
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
from rlrf_trainers.run.checkpoints import BEST, Checkpoints, Damaged, State, prefixed
from rlrf_trainers.run.record import Clock, Record
from rlrf_trainers.run.trackers import check_trackers


class Stateful(Protocol):
    """A trainer that can be put back to where it was."""

    def state_dict(self, *, copy: bool = True) -> State:
        """Everything the next step depends on; without ``copy`` it may change with that step."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave."""
        ...


class Learner:
    """The machinery of one training run.

    Args:
        model: a folder or name, a loaded model, or an :class:`HFPolicy`.
        env: the training environment.
        config: see :class:`TrainerConfig`.
        run_dir: where to write metrics, rollouts, checkpoints and the model; None writes nothing.
        eval_env: the held-out environment; None: ``env``'s ``eval`` split if it has one.
        on_step: called with every line of metrics.
        resume: go on with the run in ``run_dir`` from its last checkpoint.
        answers: from whom the last message of a prompt may be.

    Raises:
        UsageError: an empty task set, a prompt with nothing to answer, a model without a chat
            template or too short a context, processes that were not started alike, no run to
            resume, or one that another process has.
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
        resume: bool = False,
        answers: Sequence[str] = ("user", "tool"),
    ) -> None:
        self.world = World.start()
        torch.manual_seed(config.seed)
        self.config, self.env = config, env
        self.tasks = env.tasks()
        len(self.tasks)  # an empty task set is an error before the model is loaded
        self.eval_env = eval_env if eval_env is not None else env
        self.eval_split = (
            self.eval_env.split if eval_env is not None or "eval" not in env.splits else "eval"
        )
        try:
            if run_dir is not None:  # before anything is written
                len(self.eval_env.tasks(self.eval_split))
        except UsageError as error:
            raise UsageError(
                f"no evaluation is possible: {error} (eval_env.split; or eval_env.id, for another "
                "environment)"
            ) from error
        self._check_alike(model, run_dir, resume)
        preflight.check_questions(self.tasks, answers, "tasks")
        self._answers = answers
        if config.prompts_per_step < self.world.size:
            raise UsageError(
                f"prompts_per_step={config.prompts_per_step} leaves some of the "
                f"{self.world.size} processes without a task; give each at least one"
            )
        if config.mini_batch_prompts % self.world.size:
            raise UsageError(
                f"mini_batch_prompts={config.mini_batch_prompts} cannot be divided among "
                f"{self.world.size} processes; make it a multiple of that, or 0 for all"
            )
        if config.load_best_model_at_end and run_dir is None:
            raise UsageError(
                "load_best_model_at_end=True needs a run directory to keep the best weights in; "
                "give run_dir=..."
            )
        check_trackers(config.report_to, None if run_dir is None else Path(run_dir))
        # Before the model is loaded, and until training has ended.
        mine = run_dir is not None and self.world.is_main
        self._owned = own(run_dir or "", resume=resume) if mine else None
        try:
            self._load(model, run_dir, on_step, resume)
        except BaseException:
            self._let_go()
            raise

    def _load(
        self,
        model: Any,
        run_dir: str | Path | None,
        on_step: Callable[[dict[str, float]], None] | None,
        resume: bool,
    ) -> None:
        config, env = self.config, self.env
        if self._owned is not None:
            self._owned.check_idle()
            self._check_place(model if isinstance(model, (str, Path)) else IN_MEMORY, run_dir)
        if progress.heard() and run_dir is not None:
            name = env.spec.id.removeprefix("rlrf/") if env.spec else type(env).__name__
            n = len(self.eval_env.tasks(self.eval_split))
            progress.say(plan(config, name, min(config.eval_tasks or n, n)))
        self.policy = model if isinstance(model, HFPolicy) else HFPolicy(model)
        # What could be loaded again: not a model with an adapter whose folder we do not know.
        known = "" if hasattr(self.policy.model, "peft_config") else self.policy.model.name_or_path
        self._model_name = str(self.policy.source or known or IN_MEMORY)
        self._check_prompts(env, self.tasks)
        as_given = self._digest(self.policy.model) if run_dir is not None else None
        self.model: Any = trainable(self.policy.model, config)
        self.policy.model = self.model
        preflight.check_alike(
            self.world,
            {n: f"{p.dtype} {list(p.shape)}" for n, p in self.model.named_parameters()},
        )
        distributed.sync_weights(self.model)
        self._identity = self._identify(as_given)
        if config.fsdp:
            distributed.shard(self.model)
        self.device = next(self.model.parameters()).device
        self.tokenizer = self.policy.tokenizer
        self.head = Head.of(self.model, config.temperature)
        self.optimizer = MasterAdamW(self.model, config)
        self.rng = random.Random(config.seed)
        self.step = 0
        self.best: dict[str, float] | None = None
        self.evaluations_since_best = 0
        self._scores: dict[str, float] = {}  # of the last evaluation, by rollout
        self._best_scores: dict[str, float] = {}
        self._compared: dict[str, Any] = {}  # what evaluations must share to be compared
        self.clock = Clock()
        self._order: list[int] = []
        self._loss = 0.0
        self._first_step = 0
        run: Run | None = None
        if run_dir is not None and self.world.is_main:
            run = self._open_run(run_dir, resume)
        self.record = Record(self.world, config, run, self.tokenizer.decode, on_step)
        self.resume_from: Path | None = Path(run_dir) if run_dir is not None and resume else None

    @property
    def run(self) -> Run | None:
        """The run directory, on the main process."""
        return self.record.run

    @property
    def description(self) -> dict[str, Any]:
        """What the run is configured with."""
        return {
            "trainer": self.config.model_dump(),
            "model": self._model_name,
            **({"model_digest": self._identity} if self._identity else {}),
            "env": self._settings["env"],
            "eval_env": self._settings["eval_env"],
        }

    # --- what is checked at the start -------------------------------------------------------

    def _check_alike(self, model: Any, run_dir: str | Path | None, resume: bool) -> None:
        if self.world.size == 1:
            return
        facts = {f"trainer.{key}": value for key, value in self.config.model_dump().items()}
        path = model.source if isinstance(model, HFPolicy) else model
        facts |= {
            "trainer": type(self.config).__name__,
            "model": str(path) if isinstance(path, (str, Path)) else IN_MEMORY,
            "a run directory": run_dir is not None,
            "resume": resume,
            "tasks": self._task_set,
            "their prompts": preflight.digest_of_tasks(self.tasks),
        }
        for name, env in (("env", self.env), ("eval_env", self.eval_env)):
            facts |= {f"{name}.{key}": value for key, value in _about(env).items()}
        preflight.check_alike(self.world, facts)

    def _check_prompts(self, env: Env, tasks: Sequence[Task]) -> None:
        tools = tuple(getattr(env, "tools", ()) or ())
        encode = partial(self.policy.encode, tools=tools)
        preflight.check_prompts(tasks, encode, self.policy.context)

    def _check_evaluation(self) -> None:
        """That it can be made; not before a run begins, as others use a trainer without one."""
        tasks = self._eval_tasks()
        preflight.check_alike(self.world, {"evaluation tasks": preflight.digest_of_tasks(tasks)})
        preflight.check_questions(tasks, self._answers, "tasks of the evaluation")
        self._check_prompts(self.eval_env, tasks)
        keys = ("metric_for_best_model", "eval_samples", "eval_temperature", "eval_top_p")
        settings = {k: getattr(self.config, k) for k in (*keys, "max_completion_length")}
        self._compared = settings | {"eval_tasks": preflight.digest_of_tasks(tasks)}

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

    # --- the run ------------------------------------------------------------------------------

    @staticmethod
    def _check_place(model: str | Path, run_dir: str | Path | None) -> None:
        source, target = Path(model), Path(run_dir or "") / "model"
        if source.is_dir() and target.is_dir() and source.samefile(target):
            raise UsageError(
                f"the model {str(source)!r} lies where this run will leave its own; choose "
                "another run directory, or move the model"
            )

    def _open_run(self, run_dir: str | Path, resume: bool) -> Run:
        self._check_place(self.description["model"], run_dir)
        if not resume:
            return Run.create(run_dir, config=self.description, env=self.env)
        run = Run.open(run_dir)
        run.settle()
        return run

    def _let_go(self) -> None:
        if self._owned is not None:
            self._owned.close()

    def _warn_of_overlap(self) -> None:
        held_out = self.eval_env.tasks(self.eval_split)
        both = [
            task
            for id in set(self.tasks.ids()).intersection(held_out.ids())
            if (task := self.tasks.get(id)) and (other := held_out.get(id))
            # Splits may count their tasks alike.
            if task.messages == other.messages
        ]
        if both:
            self.record.warn(
                "overlap",
                f"{len(both)} of the {len(held_out)} tasks of the evaluation are trained on, so "
                "eval/* does not show what is learnt beyond them; give an eval_env, or an "
                "environment with a split 'eval'",
            )

    @cached_property
    def _task_set(self) -> str:
        """How many tasks, and which: another data set may have as many."""
        ids = "\n".join(self.tasks.ids())
        return f"{len(self.tasks)} (sha256 {hashlib.sha256(ids.encode()).hexdigest()[:12]})"

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
        """One generation batch: ``num_generations`` rollouts of each of ``prompts_per_step`` tasks.

        Of several processes each collects the groups of its share of the tasks.
        """
        rollouts = self.sample(self.next_tasks(self.config.prompts_per_step))
        self.record.collected(rollouts, self.step)
        return rollouts

    def sample(self, tasks: Sequence[Task], group_size: int | None = None) -> list[Rollout]:
        """Rollouts of some tasks by the policy as it is, at the training temperature.

        Of several processes each gets the groups of its share of them. What is sampled for a task
        depends on the configured seed, the step and its place among the tasks, not on how many
        processes there are.
        """
        c = self.config
        mine = range(self.world.rank, len(tasks), self.world.size)
        with self.clock("rollout"), distributed.whole(self.model):
            rollouts = self._rollouts(
                self.env,
                [tasks[i] for i in mine],
                group_size or c.num_generations,
                c.sampling_params,
                [f"{c.seed} {self.step} {i}" for i in mine],
            )
        groups = dict(zip(dict.fromkeys(r.group_id for r in rollouts), mine, strict=True))
        return [replace(r, group_id=f"{groups[r.group_id]}:{r.task_id}") for r in rollouts]

    def _rollouts(
        self,
        env: Env,
        tasks: Sequence[Task],
        group_size: int,
        params: SamplingParams,
        seeds: Sequence[str],
    ) -> list[Rollout]:
        if not tasks:  # of this process
            return []
        return rlrf.rollout(
            env,
            self.policy,
            tasks,
            group_size=group_size,
            max_concurrency=self.config.max_concurrency,
            deadline_s=self.config.rollout_deadline_s,
            params=params,
            seed=[seed_of(text) for text in seeds],
        )

    def standard_deviation(self, rewards: Tensor) -> float:
        """The unbiased deviation of all processes' rewards; 0 for fewer than two."""
        everyone = [r for part in self.world.gather(rewards.tolist()) for r in part]
        return reward_deviation(torch.tensor(everyone, dtype=torch.float64))

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

    def windows(self, samples: Sequence[S]) -> Iterator[list[Batch[S] | None]]:
        """The micro-batches, so many at a time as a teacher reads at once."""
        batches = self.micro_batches(samples)
        for start in range(0, len(batches), _WINDOW):
            yield batches[start : start + _WINDOW]

    def micro_batches(self, samples: Sequence[S]) -> list[Batch[S] | None]:
        """The samples of each forward; how they are split does not change the loss.

        With sharded weights every process must run as many forwards as the others: one that has
        no samples left gets None, and calls :meth:`idle`.
        """
        batches = micro_batches(
            [s.rollout.prompt_ids for s in samples],
            [s.rollout.completion_ids for s in samples],
            self.config.micro_batch_tokens,
            share=can_share(self.model, logits=self.head.module is None),
        )
        found: list[Batch[S] | None] = [
            Batch([samples[i] for i in rows], self.device) for rows in batches
        ]
        if distributed.is_sharded(self.model):  # to be agreed on before the first forward
            found += [None] * (self.world.max(len(found)) - len(found))
        return found

    def idle(self) -> None:
        """What a process without samples runs while others have some."""
        distributed.idle(self.model).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def counts(self, samples: Sequence[Sample], active: Sequence[Sample]) -> BatchCounts:
        """What the loss of an optimizer step is divided by, over all processes."""
        tokens = float(sum(s.tokens for s in active))
        rows, active_rows, all_tokens = self.world.sum([len(samples), len(active), tokens])
        return BatchCounts(rows, active_rows, all_tokens, tokens, self.world.size)

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
        batch: Batch[Any] | None,
        prompts: Sequence[Sequence[int]] | None = None,
        layout: Layout | None = None,
    ) -> Callable[[], Tensor]:
        """What a teacher runs on a micro-batch, after other prompts if they are given."""
        if batch is None:  # takes part in what the others do
            return partial(distributed.idle, self.model)
        return partial(self.hidden, prompts or batch.prompts, layout or batch.layout)

    def loss(
        self,
        batch: Batch[Any],
        objective: Objective,
        *,
        hidden: Tensor,
        divergence: Divergence | None = None,
        teacher: TeacherLogits | None = None,
    ) -> dict[str, Tensor]:
        """A micro-batch's share of the loss: its gradient is added up; metrics ``[N]``."""
        loss, metrics = vocabulary_loss(
            hidden,
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

    def remember_old_logps(self, samples: Sequence[Sample]) -> None:
        """Log-probabilities before the first of several optimizer steps."""
        for batch in self.micro_batches(samples):
            with torch.no_grad():
                if batch is None:
                    distributed.idle(self.model)
                    continue
                logps = self.student_logps(batch, self.hidden(batch.prompts, batch.layout))
                for sample, row in zip(batch.samples, batch.split(logps), strict=True):
                    sample.old_logps = row

    def student_logps(self, batch: Batch[Any], hidden: Tensor) -> Tensor:
        """``[N]`` the student's log-probabilities, detached, before its loss is computed."""
        fixed = hidden.detach()
        return self.logps(lambda rows: self.head.logits(fixed[rows]), batch.ids)

    def row_log_ratios(self, batch: Batch[Any], hidden: Tensor) -> Tensor:
        """``[N]``: the mean of ``logp - old logp`` over each token's row, detached (GSPO)."""
        old = batch.old_logps
        if old is None:
            return torch.zeros(len(batch.ids), device=self.device)
        return batch.row_means(self.student_logps(batch, hidden) - old)

    def sampler_correction(
        self, batch: Batch[Any], hidden: Tensor, *, by_row: bool = False
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
            old = self.student_logps(batch, hidden)
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

    # --- evaluation -----------------------------------------------------------------------

    def evaluate_if_due(self) -> None:
        """Evaluate before the first step, after the last, and every ``eval_steps``."""
        c = self.config
        last = self.step == c.max_steps
        if self.step == 0:
            self._warn_of_overlap()
            due = c.eval_on_start
        else:
            due = last or (c.eval_steps > 0 and self.step % c.eval_steps == 0)
        if not due:
            return
        with self.clock("eval"), distributed.whole(self.model):
            mine = self._eval_tasks()[self.world.rank :: self.world.size]
            rollouts = self._rollouts(
                self.eval_env,
                mine,
                c.eval_samples,
                c.eval_sampling_params,
                # The same random numbers at every evaluation: what changes is the policy.
                [f"eval {task.id}" for task in mine],
            )
        unscored = [r for r in rollouts if not r.scored]
        if unscored:
            self.record.warn(
                "eval_unscored",
                f"{len(unscored)} of {len(rollouts)} held-out rollouts of step {self.step} are "
                f"unscored and left out of eval/pass_rate: {unscored[0].failure}",
            )
        for rollout in rollouts:
            self.record("eval/unscored_fraction", not rollout.scored)
            if rollout.reward is not None:
                self.record("eval/pass_rate", rollout.solved)
                self.record("eval/reward", rollout.reward)
                self.record("eval/mean_length", sum(rollout.completion_mask))
        self.record.rollouts(rollouts, self.step, split="eval")
        self._scores = {}
        passes = c.metric_for_best_model == "eval/pass_rate"
        scores = {
            f"{r.task_id}/{r.sample}": float(r.solved) if passes else r.reward
            for r in rollouts
            if r.reward is not None
        }
        for part in self.world.gather(scores):
            self._scores |= part

    def _eval_tasks(self) -> list[Task]:
        """A fixed draw, the same at every evaluation and in every run of any seed."""
        tasks = self.eval_env.tasks(self.eval_split)
        n = min(self.config.eval_tasks or len(tasks), len(tasks))
        return [tasks[i] for i in random.Random(0).sample(range(len(tasks)), n)]

    def _better(self, value: float) -> bool:
        """Whether the last evaluation is better than the best.

        Compared rollout by rollout, over those that both could score: without a few hard tasks,
        whose sandbox failed, a mean is higher and the policy no better. As much is not better.
        """
        if self.best is None:
            return True
        both = self._scores.keys() & self._best_scores.keys()
        if not both:
            return value > self.best["value"]
        gain = math.fsum(self._scores[k] - self._best_scores[k] for k in both)
        most = max(max(abs(self._scores[k]), abs(self._best_scores[k])) for k in both)
        return gain > 1e-12 * len(both) * most

    def _note_evaluation(self, line: Mapping[str, float]) -> None:
        """Keep the weights of the best evaluation, and count how long ago it was."""
        value = line.get(self.config.metric_for_best_model)
        if value is None or not math.isfinite(value):  # no evaluation, or nothing could be scored
            return
        if not self._better(value):
            self.evaluations_since_best += 1
            return
        self.best = {"step": float(self.step), "value": value}
        self._best_scores = dict(self._scores)
        self.evaluations_since_best = 0
        if self.config.eval_steps:
            weights = distributed.full_state(self.optimizer.masters.items(), copy=False)
            if self.run is not None:
                data = {**self.best, "model_digest": self._identity}
                Checkpoints(self.run.path).save(BEST, State(weights, data))

    @property
    def stops_early(self) -> bool:
        """Whether ``early_stopping_patience`` is used up."""
        patience = self.config.early_stopping_patience
        return bool(patience) and self.evaluations_since_best >= patience

    # --- from step to step ----------------------------------------------------------------

    def steps(self, trainer: Stateful, first: Callable[[], None] | None = None) -> Iterator[int]:
        """The steps to take: 1, 2, ..., or from the last checkpoint on.

        Before the first come ``first`` and an evaluation; after each, what is due: evaluation,
        the line of metrics, a checkpoint.
        """
        self._check_evaluation()
        resumed = self.resumed(trainer)
        self._say_how_long()
        if not resumed:
            if first is not None:
                first()
            self.evaluate_if_due()
            self._note_evaluation(self.log_step())
        while self.step < self.config.max_steps and not self.stops_early:
            self.step += 1
            with progress.phase(f"step {self.step} of {self.config.max_steps}"):
                yield self.step
                self.evaluate_if_due()
                self._note_evaluation(self.log_step())
                self._checkpoint_if_due(trainer)
        if self.stops_early and self.best is not None:
            message = (
                f"stopped after step {self.step}: {self.evaluations_since_best} evaluations "
                f"without more {self.config.metric_for_best_model} than at step "
                f"{self.best['step']:.0f}"
            )
            self.record.note(message)

    def _say_how_long(self) -> None:
        """Time the model a little, where somebody waits to hear how long the run will take."""
        if not progress.heard() or not self.world.is_main or distributed.is_sharded(self.model):
            return
        if self.step >= self.config.max_steps or self.stops_early:
            more = "early_stopping_patience" if self.stops_early else "max_steps"
            progress.say(f"all {self.step} steps have been taken; raise {more} to take more")
            return
        try:
            with progress.phase("timing the model"):
                told = estimate(self)
        except Exception as error:  # what is wrong with a prompt or a model shows where it is used
            told = f"how long it takes cannot be said: {describe(error)}"
        progress.say(told)

    def resumed(self, trainer: Stateful) -> bool:
        """Put the run back to its last checkpoint, where it was asked for; whether there is one."""
        folder, self.resume_from = self.resume_from, None
        try:
            found = folder is not None and self._restore(folder, trainer)
        except BaseException:
            self.record.run = None  # it is not ours: neither its status nor anything in it changes
            raise
        self.record.start_trackers(type(self.env).__name__, self.step + 1 if found else None)
        return found

    def _restore(self, folder: Path, trainer: Stateful) -> bool:
        state = self._newest_usable(folder) if self.world.is_main else None
        if state is not None and self.world.size > 1:
            # The others need the names; the main process hands out the tensors.
            names = {
                n: t if n.startswith("rng") else t.to("meta") for n, t in state.tensors.items()
            }
            mine = self.world.broadcast(State(names, state.data))
            state = state if self.world.is_main else mine
        else:
            state = self.world.broadcast(state)
        written = self.run.metrics if self.run is not None else []
        last = int(written[-1]["step"]) if written else 0
        finished = self.run is not None and self.run.status == "done"
        changed = self._changed(state)
        # Nothing of the run is touched before all that may fail has not.
        if state is not None:
            try:
                self._check_same(state, trainer)
                trainer.load_state_dict(state)
            except (LookupError, TypeError, ValueError) as error:
                if isinstance(error, RlrfError):
                    raise
                raise UsageError(
                    f"the last checkpoint in {str(folder)!r} is damaged, or of another version of "
                    f"rlrf ({error!r}); delete it to go on from an older one"
                ) from error
        elif self.run is not None and not self.run.begins_anew:
            config = self.run.config.get("trainer")
            every = config.get("save_steps", 0) if isinstance(config, dict) else 0
            has_model = self.run.info.get("model", False)
            raise UsageError(
                f"the run {str(folder)!r} has no checkpoint to go on from (it took {last} "
                f"steps, with save_steps={every}); train anew in another run directory"
                + (f", from {str(self.run.path / 'model')!r} if you like" if has_model else "")
            )
        self._first_step = self.step
        position = state.data["position"] if state else {}
        if self.run is not None:
            settle_folder(self.run.path / "model")
        aside = self._keep_aside(self.step, None if state else last)
        self.record.rewind(position, self.description, self.env)
        for told in aside:
            self.record.warn("set_aside", told)
        if state is None:
            self.record.note("resumed from the beginning: no checkpoint had been written")
        else:
            self.record.note(f"resumed from the checkpoint of step {self.step}")
            was, here = state.data["model"], self.description["model"]
            if was != here:  # or _check_same had refused
                self.record.note(f"the model has moved from {was!r} to {here!r}")
        for key, before, now in changed:
            self.record.note(f"{key} was {before!r} before, and is {now!r} from here on")
        if state is not None and state.data.get("compared", self._compared) != self._compared:
            self.best, self.evaluations_since_best, self._best_scores = None, 0, {}
            self.record.note(
                "the evaluation is another one than before, so what was best is not compared with "
                "what comes: the next evaluation is the first candidate"
            )
        if finished and last > self.step:
            self.record.warn(
                "taken_anew",
                f"the run had taken {last} steps, but its last checkpoint is of step {self.step}: "
                "those after it are taken anew. With save_steps > 0 none would be",
            )
        return state is not None

    def _changed(self, state: State | None) -> list[tuple[str, Any, Any]]:
        """The settings that are not those of the checkpoint, or of the run: key, then, now."""
        if self.run is None:
            return []
        then = self.run.config if state is None else state.data.get("settings", {})
        return [
            (f"{part}.{key}", before[key], value)
            for part, settings in self._settings.items()
            if isinstance(before := then.get(part), dict)
            for key, value in settings.items()
            if key in before and before[key] != value
        ]

    @property
    def _settings(self) -> dict[str, dict[str, Any]]:
        """What a resumed run may have otherwise than before; JSON data."""
        found: dict[str, dict[str, Any]] = preflight.plain(
            {
                "trainer": self.config.model_dump(),
                "env": _about(self.env),
                "eval_env": {**_about(self.eval_env), "split": self.eval_split},
            }
        )
        return found

    def _newest_usable(self, folder: Path) -> State | None:
        """The newest checkpoint that is whole and whose lines are there; None: there is none.

        Raises:
            Damaged: there are some, and none can be used.
        """
        checkpoints, first = Checkpoints(folder), None
        checkpoints.settle()
        for step in reversed(checkpoints.steps()):
            try:
                state = checkpoints.load(step)
                self._check_whole(state, checkpoints.path(step))
                return state
            except Damaged as error:
                first = first or error
        if first is not None:
            raise first
        return None

    def _check_whole(self, state: State, folder: Path) -> None:
        missing = sorted(_IN_A_STATE - state.data.keys())
        if missing:
            raise Damaged(
                f"the checkpoint {str(folder)!r} is damaged, or of another version of rlrf (it has "
                f"no {missing[0]!r}); delete it to go on from an older one"
            )
        optimizer = len(state.part("adamw"))
        if optimizer != state.data["adamw"]:
            raise Damaged(
                f"the checkpoint of step {state.data['step']} has {optimizer} of the "
                f"optimizer's {state.data['adamw']} tensors; delete it to go on from an older one"
            )
        if self.run is not None:
            try:
                self.run.check_position(state.data["position"])
            except UsageError as error:
                raise Damaged(str(error)) from None

    def _keep_aside(self, step: int, begins_after: int | None) -> list[str]:
        """Move what the run cannot go on from, but holds work, out of its way; what was moved."""
        if self.run is None:
            return []
        told = [
            f"{str(path)!r} cannot be used; the run goes on from the one of step {step}"
            for path in Checkpoints(self.run.path).set_aside(step)
        ]
        model = self.run.path / "model"
        if begins_after and self.run.info.get("model") and model.is_dir():
            place, n = model.with_name(f"model-step-{begins_after}"), 1
            while place.exists():
                n += 1
                place = model.with_name(f"model-step-{begins_after}-{n}")
            model.rename(place)
            told.append(
                f"the run begins again, as it has no checkpoint; the model it had left after "
                f"step {begins_after} is kept in {str(place)!r}"
            )
        return told

    def _check_same(self, state: State, trainer: Stateful) -> None:
        """What a checkpoint's tensors depend on must be as it was; its model may have moved.

        Raises:
            UsageError: it is not.
        """
        if self.config.max_steps < state.data["step"]:
            raise UsageError(
                f"max_steps={self.config.max_steps}, but the run's last checkpoint is of step "
                f"{state.data['step']}; give at least that to resume it"
            )
        now = self._fixed(trainer, self.config.model_dump())
        then = self._fixed(trainer, state.data["config"])
        for key in ("trainer", "model", "tasks"):
            then[key] = state.data[key]
        now |= {"model": self.description["model"], "tasks": self._task_set}
        before = state.data.get("model_digest")
        # The content tells: a folder may have moved, or hold other weights than it did.
        if before and self._identity and before["given"] == self._identity["given"]:
            del now["model"]
        now |= {"prompts": preflight.digest_of_tasks(self.tasks)[:12]}
        then["prompts"] = state.data.get("prompts", now["prompts"])
        for key, value in now.items():
            if then.get(key) != value:
                raise UsageError(
                    f"the checkpoint was written with {key}={then.get(key)!r}, and now it is "
                    f"{value!r}: the run cannot be resumed so; leave it as it was, or train anew"
                )
        if before and self._identity:
            for part, what in (
                ("kept", "the weights that are not trained, to which what is trained is added,"),
                ("tokenizer", "the vocabulary or the chat template"),
            ):
                if before[part] != self._identity[part]:
                    raise UsageError(
                        f"{what} of the model {self._model_name!r} are not those that the run "
                        "began with, so it cannot be resumed: put back the model as it was, or "
                        "train anew"
                    )

    @staticmethod
    def _fixed(trainer: Stateful, config: Mapping[str, Any]) -> dict[str, Any]:
        # What the names and shapes of tensors follow from.
        keys = ("lora_r", "lora_alpha", "lora_target_modules", "teacher_regularization")
        fixed = {key: config[key] for key in keys if key in config}
        if "beta" in config:
            fixed["beta"] = config["beta"] if not config["beta"] else "above 0"
        return {"trainer": type(trainer).__name__, **fixed}

    def _checkpoint_if_due(self, trainer: Stateful) -> None:
        every = self.config.save_steps
        last = self.step == self.config.max_steps or self.stops_early
        if not every or (self.step % every and not last):
            return
        with self.clock("checkpoint"):
            state = trainer.state_dict(copy=False)
            state.data["trainer"] = type(trainer).__name__
            if self.run is not None:
                state.data["position"] = self.run.position()  # before a checkpoint relies on it
                Checkpoints(self.run.path).save_step(self.step, state, self.config.save_total_limit)

    def state_dict(self, *, copy: bool = True) -> State:
        """Everything the next step depends on: weights, optimizer, random numbers, task order.

        Whole tensors on the CPU, whatever the number of processes; on the main one only.

        Args:
            copy: False lets tensors share memory with the live ones, to be written at once.
        """
        masters = distributed.full_state(self.optimizer.masters.items(), copy=copy)
        tensors = prefixed("master", masters)
        tensors |= prefixed("adamw", distributed.full_state(self.optimizer.state(), copy=copy))
        tensors["rng.torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        data = {
            "step": self.step,
            "rng": self.rng.getstate(),
            "order": list(self._order),
            "trained_s": self.clock.trained,
            "best": dict(self.best) if self.best else None,
            "best_scores": dict(self._best_scores),
            "evaluations_since_best": self.evaluations_since_best,
            "record": self.record.state_dict(),
            "config": self.config.model_dump(),
            "model": self._model_name,
            "model_digest": self._identity,
            "tasks": self._task_set,
            "prompts": preflight.digest_of_tasks(self.tasks)[:12],
            "settings": self._settings,
            "compared": self._compared,
            "adamw": len(self.optimizer.state()),
        }
        return State(tensors, data)

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            UsageError: it is of another model.
        """
        self.optimizer.load(state.part("master"), state.part("adamw"))
        torch.set_rng_state(state.tensors["rng.torch"])
        if torch.cuda.is_available() and "rng.cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["rng.cuda"])
        data = state.data
        self.step = data["step"]
        self.rng.setstate(as_rng_state(data["rng"]))
        self._order = list(data["order"])
        self.clock.trained = data["trained_s"]
        self.best = data["best"]
        self._best_scores = data.get("best_scores", {})
        self.evaluations_since_best = data["evaluations_since_best"]
        self.record.load_state_dict(data["record"])

    # --- the record -----------------------------------------------------------------------

    def log_step(self) -> dict[str, float]:
        """Close the step: its line of metrics."""
        if self.device.type == "cpu":
            _give_back_memory()
        return self.record.close_step(self.step, self.clock.take())

    def finish(self) -> rlrf.TrainResult:
        """Save the model and close the record.

        Raises:
            RlrfError: no rollout of any step could be scored, so nothing was trained.
        """
        step = self.step
        taken = [line for line in self.record.history if line["step"]]
        if taken and all(line.get("unscored_fraction") == 1 for line in taken):
            raise RlrfError(
                f"no rollout of all {len(taken)} steps could be scored, so nothing was learnt; the "
                "warnings say why"
            )
        if self.config.load_best_model_at_end and self.best is not None:
            step = int(self.best["step"])
            if step != self.step:
                self._load_best()
        model_dir = self._save_model()
        self.optimizer.release()
        self.record.stop_trackers()
        if self.run is None:
            return rlrf.TrainResult(self.record.history)
        self.run.finish("done", model=model_dir is not None)
        return rlrf.TrainResult(self.record.history, self.run.path, model_dir, step)

    def _load_best(self) -> None:
        state = State()
        if self.run is not None:
            state = Checkpoints(self.run.path).load(BEST)
            self.best = state.data  # after a kill it may be newer than the checkpoint's word
        distributed.load_full(self.optimizer.masters.items(), state.tensors)
        self.optimizer.publish()
        self.record.note(f"model/ holds the weights of step {(self.best or {}).get('step', 0):.0f}")

    def _save_model(self) -> Path | None:
        if not self.config.save_model or (self.run is None and self.world.size == 1):
            return None
        # peft picks the adapter out of a state dict of the whole model by itself.
        sharded = distributed.is_sharded(self.model)
        state = distributed.full_state(self.model.state_dict().items()) if sharded else {}
        if self.run is None:
            return None
        path: Path = self.run.path / "model"

        def write(fresh: Path) -> None:
            with quiet_transformers():
                self.model.save_pretrained(fresh, **({"state_dict": state} if sharded else {}))
                self.tokenizer.save_pretrained(fresh)

        try:
            put_folder(path, write)
        except Exception as error:  # safetensors' and tokenizers' for a full disk are their own
            told = reason(error) if isinstance(error, OSError) else error
            raise Unwritable(f"the model could not be saved in {str(path)!r}: {told}") from error
        return path

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Close the record of a run that fails; nothing is lost, the model included."""
        alone = contextlib.nullcontext() if self._owned is None else self._owned.training()
        with alone, self._closing():
            yield

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.optimizer.release()
            self.record.stop_trackers(failed=True)
            if self.run is None:
                raise
            self._close(self.run, error)
            if unwritten(self.run.path, error):
                told = reason(error) if isinstance(error, OSError) else error
                raise Unwritable(
                    f"the run {str(self.run.path)!r} could not be written: {told}. "
                    + self._remedy(self.run)
                ) from error
            raise
        finally:
            self._let_go()

    @staticmethod
    def _remedy(run: Run) -> str:
        """What goes on after a run could not be written: no more than holds."""
        with contextlib.suppress(OSError, RlrfError):
            if is_run(run.path) and (run.steps or run.begins_anew):
                return "Mend that and go on with --resume"
            return (
                "Mend that and train anew: without checkpoints (save_steps > 0) there is nothing "
                "to resume from"
            )
        return "Mend that; --resume goes on from the last checkpoint, if there is one"

    def _close(self, run: Run, error: BaseException) -> None:
        """Keep what can be kept of a run that fails; what cannot must not hide why it failed."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        # A sharded model takes all processes to save; one that has not moved is not worth it.
        moved = self.world.size == 1 and self.step > self._first_step
        if status == "interrupted" and self.config.save_steps:
            moved = False  # its checkpoints are there to go on from, and there is little time
        told = describe(error)
        saved = None
        with contextlib.suppress(OSError):
            run.event("info" if status == "interrupted" else "error", told)
        with contextlib.suppress(OSError, Unwritable):
            saved = self._save_model() if moved else None
        with contextlib.suppress(OSError, RlrfError):
            run.finish(status, told, model=saved is not None)


_IN_A_STATE = {
    *("step", "rng", "order", "trained_s", "best", "evaluations_since_best", "record"),
    *("config", "model", "tasks", "adamw", "trainer", "position"),
}
_WINDOW = 8
"""Micro-batches whose teacher's hidden states are kept at once: to swap the teacher's weights in
takes time, their hidden states take memory, a few kilobytes a token."""


def _give_back_memory() -> None:
    """Return what is free in the C library's heap to the system, where it is glibc.

    Tensors of a few megabytes come from that heap, and one small one alive keeps all below it: a
    0.5B model that samples, evaluates and trains held 9 to 12 GB after a few steps on a CPU, of
    which it needed 2 between them.
    """
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


try:
    _libc: Any = ctypes.CDLL("libc.so.6")
except OSError:  # not a Linux with glibc
    _libc = None


def seed_of(text: str) -> int:
    """A seed for what ``text`` names; far apart for texts that are alike."""
    return random.Random(text).getrandbits(31)


def _about(env: Env) -> dict[str, Any]:
    """Which environment it is, with its options."""
    found: dict[str, Any] = environment_lock(env)["env"]
    return found


def as_rng_state(data: Any) -> Any:
    """A state of :class:`random.Random` that has been JSON."""
    version, internal, gauss = data
    return version, tuple(internal), gauss
