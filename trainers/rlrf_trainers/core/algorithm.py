"""What an algorithm has to say: what it learns from, and by which loss. The rest is here.

    for each batch of questions x:
        sample y ~ pi(. | x), get reward r and feedback f         source.next
        decide what each rollout learns from                      prepare
        for each optimizer step, micro-batch by micro-batch:
            what other weights or other prompts say of y          read
            add up the gradient of the loss                       objective
        whatever follows the policy follows it                    after_batch
        the engine samples from the new weights                   source.publish

A trainer is a subclass. With ``prepare`` and ``objective`` alone it has evaluation, the best
weights, checkpoints, resumption, export and several processes; docs/tutorials/trainer.md has two.

Why: design/algorithm.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from rlrf import Env, Rollout, TrainResult
from rlrf_trainers.config import TrainerConfig
from rlrf_trainers.core.batch import Batch, S, Sample
from rlrf_trainers.core.loop import Loop
from rlrf_trainers.core.teacher import Teacher
from rlrf_trainers.losses import BatchCounts, Divergence
from rlrf_trainers.losses.vocabulary import Objective, TeacherLogits
from rlrf_trainers.run.checkpoints import State, prefixed

C = TypeVar("C", bound=TrainerConfig)


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch.

    Attributes:
        objective: of the tokens of a chunk, see :data:`Objective`.
        divergence: from the teacher, where the objective reads one over the vocabulary.
        teacher: whose logits those are.
        told: is given the micro-batch's metrics, ``[N]`` each.
    """

    objective: Objective
    divergence: Divergence | None = None
    teacher: TeacherLogits | None = None
    told: Callable[[dict[str, Tensor]], None] | None = None


class Algorithm(ABC, Generic[C, S]):
    """A trainer: an algorithm, and all that goes on around it.

    Args:
        model: a folder or name, a loaded transformers model, or an :class:`HFPolicy`.
        env: the environment.
        config: an instance of ``config_class``; None: its defaults.
        run_dir: where to write; None writes nothing.
        eval_env: held-out environment; None: ``env``'s ``eval`` split.
        on_step: called with every line of metrics.
        resume: go on with the run in ``run_dir``.

    Attributes:
        loop: steps, evaluations, checkpoints.
        learner: the model and its updates.
        source: of rollouts.

    Raises:
        UsageError: see :class:`Loop`.
    """

    config_class: ClassVar[type[TrainerConfig]] = TrainerConfig
    sample_class: ClassVar[type[Sample]] = Sample
    answers: ClassVar[Sequence[str]] = ("user", "tool")
    """From whom the last message of a prompt may be."""

    def __init__(
        self,
        model: Any,
        env: Env,
        config: C | None = None,
        *,
        run_dir: str | Path | None = None,
        eval_env: Env | None = None,
        on_step: Callable[[dict[str, float]], None] | None = None,
        resume: bool = False,
    ) -> None:
        self.config: C = config or self.config_class()  # type: ignore[assignment]  # the class's own C
        self.loop = Loop(
            model,
            env,
            self.config,
            run_dir=run_dir,
            eval_env=eval_env,
            on_step=on_step,
            resume=resume,
            answers=self.answers,
        )
        self.learner, self.source = self.loop.learner, self.loop.source
        self.setup()

    def train(self) -> TrainResult:
        """Run all steps.

        Raises:
            RlrfError: the loss is not finite. The run directory keeps everything up to the step
                before, the model included.
        """
        with self.loop.guarded():
            for _ in self.loop.steps(
                self, self.before_training
            ):  # evaluation, metrics, checkpoints
                self.learn(self.source.next())  # y ~ pi(. | x), r, f
            return self.loop.finish()

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from one generation batch."""
        samples = self.prepare(rollouts)
        moved = False
        for update in self.learner.updates(samples):  # mini-batches, num_iterations times over
            self.improve(update)
            moved |= self.learner.optimizer_step()
        self.after_batch(moved)
        self.source.publish()
        record, notes = self.learner.record, {id(s.rollout): self.notes(s) for s in samples}
        record.rewards([r for r in rollouts if r.scored])
        extra = [notes.get(id(r), {}) for r in rollouts]
        record.rollouts(rollouts, self.learner.step, extra=extra)

    def improve(self, samples: Sequence[S]) -> None:
        """Add up the gradient of one optimizer step."""
        learner, counts = self.learner, self.counts(samples)
        for name, part in self.parts(samples).items():
            for window in learner.windows(part, partial(self.blank, name)):
                for batch, said in zip(window, self.read(window, name), strict=True):
                    with learner.clock("update"), learner.record.without(batch.blank):
                        batch.hidden = learner.hidden(batch.prompts, batch.layout)  # [N, H]
                        loss = self.objective(batch, said, counts)
                        metrics = learner.loss(
                            batch, loss.objective, divergence=loss.divergence, teacher=loss.teacher
                        )
                        learner.record.sampling(batch, metrics["logps"])
                        if loss.told is not None:
                            loss.told(metrics)

    # --- what an algorithm says ---------------------------------------------------------------

    @abstractmethod
    def prepare(self, rollouts: Sequence[Rollout]) -> list[S]:
        """What is learnt from, in the order of the rollouts; unscored ones are left out."""

    @abstractmethod
    def objective(self, batch: Batch[S], said: Any, counts: Any) -> Loss:
        """The loss of a micro-batch.

        Args:
            batch: its samples, with ``hidden`` states ``[N, H]`` of the student.
            said: what :meth:`read` found for it.
            counts: what :meth:`counts` found for the optimizer step.
        """

    def setup(self) -> None:  # a hook: most have nothing to do
        """What else is needed, once the model is there."""

    def before_training(self) -> None:
        """What is measured before the first step of a run."""

    def counts(self, samples: Sequence[S]) -> Any:
        """What the loss of an optimizer step is divided by; all processes come here."""
        found: BatchCounts = self.learner.counts(samples, samples)
        return found

    def parts(self, samples: Sequence[S]) -> Mapping[str, list[S]]:
        """Samples that are read in one way each, by a name; what cannot move a weight is in none.

        All processes have the same names.
        """
        return {"all": [sample for sample in samples if sample.matters]}

    def blank(self, name: str) -> S:
        """A sample of a part for a process that has none left: its gradient is zero."""
        return self.sample_class.of_nothing()  # type: ignore[return-value]  # the class's own S

    def read(self, window: Sequence[Batch[S]], name: str) -> Sequence[Any]:
        """What other weights or other prompts say of some micro-batches of a part."""
        return [None] * len(window)

    def after_batch(self, moved: bool) -> None:
        """What follows the policy follows it.

        Args:
            moved: whether a weight may have changed.
        """

    def notes(self, sample: S) -> Mapping[str, Any]:
        """What the run's file of rollouts says of a sample beside the rollout; JSON data."""
        return {}

    def followers(self) -> Mapping[str, Teacher]:
        """Weights beside the policy's that a checkpoint must hold, by a name."""
        return {}

    # --- state ------------------------------------------------------------------------------

    def state_dict(self, *, copy: bool = True) -> State:
        """Everything the next step depends on; see :meth:`Loop.state_dict`."""
        state = self.loop.state_dict(copy=copy)
        for name, follower in self.followers().items():
            state.tensors |= prefixed(name, follower.state_dict(copy=copy))
        return state

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave.

        Raises:
            UsageError: it is of another model or configuration.
        """
        self.loop.load_state_dict(state)
        for name, follower in self.followers().items():
            follower.load_state_dict(state.part(name))
