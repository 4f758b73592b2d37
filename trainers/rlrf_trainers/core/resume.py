"""Going on with a run: which checkpoint can be used, and whether it is of this run's making."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrf._files import settle_folder
from rlrf.errors import RlrfError, UsageError
from rlrf_trainers.core import preflight
from rlrf_trainers.run.checkpoints import Checkpoints, Damaged, State, Stateful

if TYPE_CHECKING:
    from rlrf_trainers.core.loop import Loop


class Resumption:
    """Puts a run back to its last checkpoint.

    Args:
        loop: the run that is to go on, before its first step.
        trainer: takes the state.
        folder: where it was written.
    """

    def __init__(self, loop: Loop, trainer: Stateful, folder: Path) -> None:
        self.loop, self.trainer, self.folder = loop, trainer, folder
        self.world, self.config, self.run = loop.world, loop.config, loop.run
        self.record = loop.learner.record

    def restore(self) -> bool:
        """Do it; False: there is no checkpoint, and the run begins again.

        Raises:
            UsageError: none can be used, or it is of another model or configuration.
        """
        loop, folder, trainer = self.loop, self.folder, self.trainer
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
                f"steps, with save_steps={every}); train anew (--overwrite, or another --run-dir)"
                + (f", from {str(self.run.path / 'model')!r} if you like" if has_model else "")
            )
        step = loop.learner.step
        position = state.data["position"] if state else {}
        if self.run is not None:
            settle_folder(self.run.path / "model")
        aside = self._keep_aside(step, None if state else last)
        self.record.rewind(position, loop.description, loop.env)
        for told in aside:
            self.record.warn("set_aside", told)
        if state is None:
            self.record.note("resumed from the beginning: no checkpoint had been written")
        else:
            self.record.note(f"resumed from the checkpoint of step {step}")
            was, here = state.data["model"], loop.description["model"]
            if was != here:  # or _check_same had refused
                self.record.note(f"the model has moved from {was!r} to {here!r}")
        for key, before, now in changed:
            what = f"{key} was {before!r} before, and is {now!r} from here on"
            if key.endswith(".wrappers"):  # forgotten, most likely
                self.record.warn(key, what)
            else:
                self.record.note(what)
        if (
            state is not None
            and state.data.get("compared", loop.evaluation.compared) != loop.evaluation.compared
        ):
            loop.evaluation.forget()
            self.record.note(
                "the evaluation is another one than before, so what was best is not compared with "
                "what comes: the next evaluation is the first candidate"
            )
        if finished and last > step:
            self.record.warn(
                "taken_anew",
                f"the run had taken {last} steps, but its last checkpoint is of step {step}: "
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
            for part, settings in self.loop.settings.items()
            if isinstance(before := then.get(part), dict)
            for key, value in settings.items()
            if key in before and before[key] != value
        ]

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
        here, identity = self.loop.description["model"], self.loop.learner.identity
        now = self._fixed(trainer, self.config.model_dump())
        then = self._fixed(trainer, state.data["config"])
        for key in ("trainer", "model", "tasks"):
            then[key] = state.data[key]
        now |= {"model": here, "tasks": self.loop.task_set}
        before = state.data.get("model_digest")
        # The content tells: a folder may have moved, or hold other weights than it did.
        if before and identity and before["given"] == identity["given"]:
            del now["model"]
        now |= {"prompts": preflight.digest_of_tasks(self.loop.tasks)[:12]}
        then["prompts"] = state.data.get("prompts", now["prompts"])
        for key, value in now.items():
            if then.get(key) != value:
                raise UsageError(
                    f"the checkpoint was written with {key}={then.get(key)!r}, and now it is "
                    f"{value!r}: the run cannot be resumed so; leave it as it was, or train anew "
                    "(--overwrite, or another --run-dir)"
                )
        if before and identity:
            for part, what in (
                ("kept", "the weights that are not trained, to which what is trained is added,"),
                ("tokenizer", "the vocabulary or the chat template"),
            ):
                if before[part] != identity[part]:
                    raise UsageError(
                        f"{what} of the model {here!r} are not those that the run began with, so "
                        "it cannot be resumed: put back the model as it was, or train anew "
                        "(--overwrite, or another --run-dir)"
                    )

    @staticmethod
    def _fixed(trainer: Stateful, config: Mapping[str, Any]) -> dict[str, Any]:
        # What the names and shapes of tensors follow from.
        keys = ("lora_r", "lora_alpha", "lora_target_modules", "teacher_regularization")
        fixed = {key: config[key] for key in keys if key in config}
        if "beta" in config:
            fixed["beta"] = config["beta"] if not config["beta"] else "above 0"
        return {"trainer": type(trainer).__name__, **fixed}


_IN_A_STATE = {
    *("step", "rng", "order", "trained_s", "best", "evaluations_since_best", "record"),
    *("config", "model", "tasks", "adamw", "trainer", "position"),
}
