"""What goes on around a trainer's steps: the run, evaluations, checkpoints, how it ends.

Started on several processes it sees that they were started alike, and gives each its share.

Why: design/algorithm.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import rlrf
from rlrf import Env, Task, progress
from rlrf._files import Unwritable, put_folder, reason
from rlrf.errors import RlrfError, UsageError, describe
from rlrf.runs import Run, environment_lock, is_run, own, unwritten
from rlrf_trainers.config import TrainerConfig
from rlrf_trainers.core import preflight
from rlrf_trainers.core.estimate import estimate, plan
from rlrf_trainers.core.evaluation import Evaluation
from rlrf_trainers.core.learner import Learner
from rlrf_trainers.core.resume import Resumption
from rlrf_trainers.core.source import RolloutSource
from rlrf_trainers.engines.hf import HFPolicy
from rlrf_trainers.model import distributed
from rlrf_trainers.model.backbone import quiet_transformers
from rlrf_trainers.model.distributed import World
from rlrf_trainers.run.checkpoints import BEST, Checkpoints, State, Stateful
from rlrf_trainers.run.record import Record
from rlrf_trainers.run.trackers import check_trackers

IN_MEMORY = "in memory"
"""What a run's configuration has for the model if it came from no folder."""


class Loop:
    """The course of one training run.

    Args:
        model: a folder or name, a loaded model, or an :class:`HFPolicy`.
        env: the training environment.
        config: see :class:`TrainerConfig`.
        run_dir: where to write metrics, rollouts, checkpoints and the model; None writes nothing.
        eval_env: the held-out environment; None: ``env``'s ``eval`` split if it has one.
        on_step: called with every line of metrics.
        resume: go on with the run in ``run_dir`` from its last checkpoint.
        answers: from whom the last message of a prompt may be.

    Attributes:
        learner: of the updates.
        source: of the rollouts.
        evaluation: the held-out one.

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
        held_out = eval_env if eval_env is not None else env
        split = held_out.split if eval_env is not None or "eval" not in env.splits else "eval"
        try:
            if run_dir is not None:  # before anything is written
                len(held_out.tasks(split))
        except UsageError as error:
            raise UsageError(
                f"no evaluation is possible: {error} (eval_env.split; or eval_env.id, for another "
                "environment)"
            ) from error
        self._check_alike(model, held_out, run_dir, resume)
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
            self._load(model, run_dir, held_out, split, on_step, resume)
        except BaseException:
            self._let_go()
            raise

    def _load(
        self,
        model: Any,
        run_dir: str | Path | None,
        held_out: Env,
        split: str,
        on_step: Callable[[dict[str, float]], None] | None,
        resume: bool,
    ) -> None:
        config, env = self.config, self.env
        if self._owned is not None:
            self._owned.check_idle()
            self._check_place(model if isinstance(model, (str, Path)) else IN_MEMORY, run_dir)
        if progress.heard() and run_dir is not None:
            name = env.spec.id.removeprefix("rlrf/") if env.spec else type(env).__name__
            n = len(held_out.tasks(split))
            progress.say(plan(config, name, min(config.eval_tasks or n, n)))
        policy = model if isinstance(model, HFPolicy) else HFPolicy(model)
        # What could be loaded again: not a model with an adapter whose folder we do not know.
        known = "" if hasattr(policy.model, "peft_config") else policy.model.name_or_path
        self._model_name = str(policy.source or known or IN_MEMORY)
        _check_prompts(policy, env, self.tasks)
        self.learner = learner = Learner(policy, config, self.world, digest=run_dir is not None)
        self.source = RolloutSource(env, self.tasks, policy, learner)
        self.evaluation = Evaluation(self.source, held_out, split)
        self._first_step = 0
        run: Run | None = None
        if run_dir is not None and self.world.is_main:
            run = self._open_run(run_dir, resume)
        learner.record = Record(self.world, config, run, learner.tokenizer.decode, on_step)
        self.resume_from: Path | None = Path(run_dir) if run_dir is not None and resume else None

    @property
    def run(self) -> Run | None:
        """The run directory, on the main process."""
        return self.learner.record.run

    @property
    def description(self) -> dict[str, Any]:
        """What the run is configured with."""
        identity = self.learner.identity
        return {
            "trainer": self.config.model_dump(),
            "model": self._model_name,
            **({"model_digest": identity} if identity else {}),
            "env": self.settings["env"],
            "eval_env": self.settings["eval_env"],
        }

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What a resumed run may have otherwise than before; JSON data."""
        held_out = self.evaluation
        found: dict[str, dict[str, Any]] = preflight.plain(
            {
                "trainer": self.config.model_dump(),
                "env": _about(self.env),
                "eval_env": {**_about(held_out.env), "split": held_out.split},
            }
        )
        return found

    # --- what is checked at the start -------------------------------------------------------

    def _check_alike(
        self, model: Any, held_out: Env, run_dir: str | Path | None, resume: bool
    ) -> None:
        if self.world.size == 1:
            return
        facts = {f"trainer.{key}": value for key, value in self.config.model_dump().items()}
        path = model.source if isinstance(model, HFPolicy) else model
        facts |= {
            "trainer": type(self.config).__name__,
            "model": str(path) if isinstance(path, (str, Path)) else IN_MEMORY,
            "a run directory": run_dir is not None,
            "resume": resume,
            "tasks": self.task_set,
            "their prompts": preflight.digest_of_tasks(self.tasks),
        }
        for name, env in (("env", self.env), ("eval_env", held_out)):
            facts |= {f"{name}.{key}": value for key, value in _about(env).items()}
        preflight.check_alike(self.world, facts)

    def check_evaluation(self) -> None:
        """That it can be made; not before a run begins, as others use a trainer without one.

        Raises:
            UsageError: a prompt that cannot be answered, or processes with other tasks.
        """
        tasks = self.evaluation.tasks()
        digest = preflight.digest_of_tasks(tasks)
        preflight.check_alike(self.world, {"evaluation tasks": digest})
        preflight.check_questions(tasks, self._answers, "tasks of the evaluation")
        _check_prompts(self.learner.policy, self.evaluation.env, tasks)
        keys = ("metric_for_best_model", "eval_samples", "eval_temperature", "eval_top_p")
        settings = {k: getattr(self.config, k) for k in (*keys, "max_completion_length")}
        self.evaluation.compared = settings | {"eval_tasks": digest}

    # --- the run ------------------------------------------------------------------------------

    @staticmethod
    def _check_place(model: str | Path, run_dir: str | Path | None) -> None:
        source, target = Path(model), Path(run_dir or "") / "model"
        if source.is_dir() and target.is_dir() and source.samefile(target):
            raise UsageError(
                f"the model {str(source)!r} lies where this run will leave its own; choose "
                "another run directory (--run-dir), or move the model"
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

    @cached_property
    def task_set(self) -> str:
        """How many tasks, and which: another data set may have as many."""
        ids = "\n".join(self.tasks.ids())
        return f"{len(self.tasks)} (sha256 {hashlib.sha256(ids.encode()).hexdigest()[:12]})"

    # --- from step to step ----------------------------------------------------------------

    def steps(self, trainer: Stateful, first: Callable[[], None] | None = None) -> Iterator[int]:
        """The steps to take: 1, 2, ..., or from the last checkpoint on.

        Before the first come ``first`` and an evaluation; after each, what is due: evaluation,
        the line of metrics, a checkpoint with the state of ``trainer``.
        """
        learner, evaluation, most = self.learner, self.evaluation, self.config.max_steps
        self.check_evaluation()
        resumed = self.resumed(trainer)
        self._say_how_long()
        if not resumed:
            if first is not None:
                first()
            evaluation.if_due()
            evaluation.note(self.log_step())
        while learner.step < most and not evaluation.stops_early:
            learner.step += 1
            with progress.phase(f"step {learner.step} of {most}"):
                yield learner.step
                evaluation.if_due()
                evaluation.note(self.log_step())
                self._checkpoint_if_due(trainer)
        if evaluation.stops_early and evaluation.best is not None:
            learner.record.note(
                f"stopped after step {learner.step}: {evaluation.evaluations_since_best} "
                f"evaluations without more {self.config.metric_for_best_model} than at step "
                f"{evaluation.best['step']:.0f}"
            )

    def _say_how_long(self) -> None:
        """Time the model a little, where somebody waits to hear how long the run will take."""
        if (
            not progress.heard()
            or not self.world.is_main
            or distributed.is_sharded(self.learner.model)
        ):
            return
        if self.learner.step >= self.config.max_steps or self.evaluation.stops_early:
            more = "early_stopping_patience" if self.evaluation.stops_early else "max_steps"
            progress.say(
                f"all {self.learner.step} steps have been taken; raise {more} to take more"
            )
            return
        try:
            with progress.phase("timing the model"):
                told = estimate(self)
        except Exception as error:  # what is wrong with a prompt or a model shows where it is used
            told = f"how long it takes cannot be said: {describe(error)}"
        progress.say(told)

    def resumed(self, trainer: Stateful) -> bool:
        """Put the run back to its last checkpoint, where it was asked for; whether there is one.

        Raises:
            UsageError: there is none that can be used, or it is of another model or configuration.
        """
        folder, self.resume_from = self.resume_from, None
        try:
            found = folder is not None and Resumption(self, trainer, folder).restore()
        except BaseException:
            # It is not ours: neither its status nor anything in it changes.
            self.learner.record.run = None
            raise
        self._first_step = self.learner.step
        step = self.learner.step + 1 if found else None
        self.learner.record.start_trackers(type(self.env).__name__, step)
        return found

    def _checkpoint_if_due(self, trainer: Stateful) -> None:
        every, step = self.config.save_steps, self.learner.step
        last = step == self.config.max_steps or self.evaluation.stops_early
        if not every or (step % every and not last):
            return
        with self.learner.clock("checkpoint"):
            state = trainer.state_dict(copy=False)
            state.data["trainer"] = type(trainer).__name__
            if self.run is not None:
                state.data["position"] = self.run.position()  # before a checkpoint relies on it
                Checkpoints(self.run.path).save_step(step, state, self.config.save_total_limit)

    def log_step(self) -> dict[str, float]:
        """Close the step: its line of metrics."""
        if self.learner.device.type == "cpu":
            _give_back_memory()
        return self.learner.record.close_step(self.learner.step, self.learner.clock.take())

    def state_dict(self, *, copy: bool = True) -> State:
        """Everything the next step depends on: weights, optimizer, random numbers, task order.

        Whole tensors on the CPU, whatever the number of processes; on the main one only.

        Args:
            copy: False lets tensors share memory with the live ones, to be written at once.
        """
        state = self.learner.state_dict(copy=copy)
        state.data |= self.source.state_dict()
        state.data |= self.evaluation.state_dict()
        state.data |= {
            "record": self.learner.record.state_dict(),
            "config": self.config.model_dump(),
            "model": self._model_name,
            "model_digest": self.learner.identity,
            "tasks": self.task_set,
            "prompts": preflight.digest_of_tasks(self.tasks)[:12],
            "settings": self.settings,
        }
        return state

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            UsageError: it is of another model.
        """
        self.learner.load_state_dict(state)
        self.source.load_state_dict(state.data)
        self.evaluation.load_state_dict(state.data)
        self.learner.record.load_state_dict(state.data["record"])

    # --- how it ends ------------------------------------------------------------------------

    def finish(self) -> rlrf.TrainResult:
        """Save the model and close the record.

        Raises:
            RlrfError: no rollout of any step could be scored, so nothing was trained.
        """
        step = self.learner.step
        taken = [line for line in self.learner.record.history if line["step"]]
        if taken and all(line.get("unscored_fraction") == 1 for line in taken):
            raise RlrfError(
                f"no rollout of all {len(taken)} steps could be scored, so nothing was learnt; the "
                "warnings say why"
            )
        if self.config.load_best_model_at_end and self.evaluation.best is not None:
            step = int(self.evaluation.best["step"])
            if step != self.learner.step:
                self._load_best()
        model_dir = self._save_model()
        self.learner.optimizer.release()
        self.learner.record.stop_trackers()
        if self.run is None:
            return rlrf.TrainResult(self.learner.record.history)
        self.run.finish("done", model=model_dir is not None)
        return rlrf.TrainResult(self.learner.record.history, self.run.path, model_dir, step)

    def _load_best(self) -> None:
        state = State()
        if self.run is not None:
            state = Checkpoints(self.run.path).load(BEST)
            self.evaluation.best = (
                state.data
            )  # after a kill it may be newer than the checkpoint's word
        distributed.load_full(self.learner.optimizer.masters.items(), state.tensors)
        self.learner.optimizer.publish()
        self.learner.record.note(
            f"model/ holds the weights of step {(self.evaluation.best or {}).get('step', 0):.0f}"
        )

    def _save_model(self) -> Path | None:
        if not self.config.save_model or (self.run is None and self.world.size == 1):
            return None
        # peft picks the adapter out of a state dict of the whole model by itself.
        sharded = distributed.is_sharded(self.learner.model)
        state = distributed.full_state(self.learner.model.state_dict().items()) if sharded else {}
        if self.run is None:
            return None
        path: Path = self.run.path / "model"

        def write(fresh: Path) -> None:
            with quiet_transformers():
                self.learner.model.save_pretrained(
                    fresh, **({"state_dict": state} if sharded else {})
                )
                self.learner.tokenizer.save_pretrained(fresh)

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
            self.learner.optimizer.release()
            self.learner.record.stop_trackers(failed=True)
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
                "Mend that and train anew (--overwrite): without checkpoints (save_steps > 0) "
                "there is nothing to resume from"
            )
        return "Mend that; --resume goes on from the last checkpoint, if there is one"

    def _close(self, run: Run, error: BaseException) -> None:
        """Keep what can be kept of a run that fails; what cannot must not hide why it failed."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        # A sharded model takes all processes to save; one that has not moved is not worth it.
        moved = self.world.size == 1 and self.learner.step > self._first_step
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


def _check_prompts(policy: HFPolicy, env: Env, tasks: Sequence[Task]) -> None:
    encode = partial(policy.encode, tools=tuple(getattr(env, "tools", ()) or ()))
    preflight.check_prompts(tasks, encode, policy.context)


def _about(env: Env) -> dict[str, Any]:
    """Which environment it is, with its options."""
    found: dict[str, Any] = environment_lock(env)["env"]
    return found
