"""What a training run writes down: its numbers, rollouts and warnings, of all processes as of one.

Numbers are given one by one as a step goes (:meth:`Record.__call__`) and become one line at its
end, which goes to the run directory, the trackers, the caller and the health checks.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlrf import Env, Rollout, notices, progress
from rlrf.runs import Run
from rlrf_trainers.config import TrainerConfig
from rlrf_trainers.losses import reward_statistics
from rlrf_trainers.model.distributed import World
from rlrf_trainers.run.health import Monitor
from rlrf_trainers.run.trackers import Trackers, open_trackers

if TYPE_CHECKING:
    from rlrf_trainers.core.batch import Batch


class Record:
    """The record of one training run.

    Args:
        world: the processes; each records its own, the main one writes.
        config: names the trackers.
        run: where to write; None on every process but the main one, or without a run directory.
        decode: token ids to text, for the rollouts.
        on_step: called with every line, on the main process.

    Attributes:
        run: the run directory.
        metrics: of the step under way: name to ``(value, weight)`` pairs of this process.
        history: the lines so far.
    """

    def __init__(
        self,
        world: World,
        config: TrainerConfig,
        run: Run | None,
        decode: Callable[[Sequence[int]], str],
        on_step: Callable[[dict[str, float]], None] | None,
    ) -> None:
        self.world, self.config, self.run = world, config, run
        self.decode, self.on_step = decode, on_step
        self.metrics: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.history: list[dict[str, float]] = []
        self.warned: set[str] = set()
        self.monitor = Monitor(config)
        self._trackers: Trackers | None = None
        self._how: dict[str, Callable[[Sequence[float]], float]] = {}
        self._unsaid: list[tuple[str, str]] = []
        self._noted: set[str] = set()  # topics of this step
        self._slow: set[str] = set()  # topics of notices
        self.stop_listening = notices.listen(self._notice)

    # --- of a step ------------------------------------------------------------------------

    def __call__(
        self,
        name: str,
        value: float,
        weight: float = 1.0,
        *,
        how: Callable[[Sequence[float]], float] | None = None,
    ) -> None:
        """Add a value to this step's metric.

        Several, of micro-batches or processes, become their weighted mean, or what ``how`` makes
        of them.
        """
        self.metrics[name].append((float(value), float(weight)))
        if how is not None:
            self._how[name] = how

    @contextlib.contextmanager
    def without(self, blank: bool) -> Iterator[None]:
        """Forget the metrics given inside, if they are of a batch that stands for nothing."""
        before = {name: list(values) for name, values in self.metrics.items()} if blank else {}
        yield
        if blank:
            self.metrics.clear()
            self.metrics.update(before)

    def collected(self, rollouts: Sequence[Rollout], step: int) -> None:
        """Lengths, entropy and the environment's metrics of a generation batch."""
        scored = [r for r in rollouts if r.scored]
        self("unscored_fraction", 1 - len(scored) / len(rollouts), len(rollouts))
        if not scored:
            failures = sorted({r.failure or "" for r in rollouts})
            whose = f" of process {self.world.rank}" if self.world.size > 1 else ""
            self.warn(
                "unscored",
                f"no rollout{whose} of step {step} could be scored; nothing is learnt from "
                f"them. First failure: {failures[0]}",
            )
            return
        if len(scored) < len(rollouts):
            self.warn(
                "unscored",
                f"{len(rollouts) - len(scored)} of {len(rollouts)} rollouts of step {step} "
                f"are unscored and left out: {next(r.failure for r in rollouts if not r.scored)}",
            )
        lengths = [float(sum(r.completion_mask)) for r in scored]
        self("completions/mean_length", sum(lengths) / len(lengths), len(lengths))
        logprobs = [
            logp
            for r in scored
            for logp, sampled in zip(r.logprobs, r.completion_mask, strict=False)
            if sampled
        ]
        if logprobs:  # -log pi of a sample from pi estimates the entropy without bias
            self("entropy", -sum(logprobs) / len(logprobs), len(logprobs))
        self("completions/min_length", min(lengths), how=min)
        self("completions/max_length", max(lengths), how=max)
        cut = sum(r.finish_reason == "length" for r in scored)
        self("completions/clipped_ratio", cut / len(scored), len(scored))
        for name in sorted({name for r in scored for name in r.metrics}):
            values = [r.metrics[name] for r in scored if name in r.metrics]
            self(f"env/{name}", sum(values) / len(values), len(values))

    def rewards(self, scored: Sequence[Rollout]) -> None:
        """TRL's statistics of the rewards of scored rollouts."""
        if not scored:
            return
        groups = [r.group_id for r in scored]
        rewards = torch.tensor([float(r.reward or 0.0) for r in scored], dtype=torch.float64)
        for name, value in reward_statistics(rewards, groups).items():
            self(name, value, len(scored) if name == "reward" else len(set(groups)))

    def sampling(self, batch: Batch[Any], logps: Tensor) -> None:
        """How far the sampler's log-probabilities are from ours, ``[N]`` before the update."""
        sampled, old = batch.sampler_logps, batch.old_logps
        if sampled is None:
            return
        gap = (logps if old is None else old) - sampled.to(logps)
        n, ratio = len(gap), gap.clamp(-20, 20).exp()
        self("sampling/sampling_logp_difference/mean", gap.abs().mean().item(), n)
        self("sampling/sampling_logp_difference/max", gap.abs().max().item(), how=max)
        self("sampling/importance_sampling_ratio/min", ratio.min().item(), how=min)
        self("sampling/importance_sampling_ratio/mean", ratio.mean().item(), n)
        self("sampling/importance_sampling_ratio/max", ratio.max().item(), how=max)

    def close_step(self, step: int, times: Mapping[str, float]) -> dict[str, float]:
        """Reduce the step's metrics over all processes, write the line, tell of it.

        Args:
            step: its number.
            times: seconds by phase, of this process.
        """
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        parts = self.world.gather((dict(self.metrics), self._unsaid))
        for metrics, _ in parts:
            for name, pairs in metrics.items():
                found[name] += pairs
        for rank, (_, warned) in enumerate(parts):
            for topic, message in warned if self.world.is_main else ():
                self.warn(topic, f"process {rank}: {message}")
        self._unsaid = []
        line: dict[str, float] = {"step": step}
        line |= {name: self._reduced(name, pairs) for name, pairs in found.items()}
        line |= {f"time/{k}": v for k, v in times.items()}
        self.metrics.clear()
        line = self.world.broadcast(line)
        self.history.append(line)
        if self.run is not None:
            self.run.log(step, {k: v for k, v in line.items() if k != "step"})
        if self._trackers is not None:
            self._trackers.log(step, line)
        if self.on_step is not None and self.world.is_main:
            self.on_step(line)
        for topic, message in self.monitor.observe(line) if self.world.is_main else ():
            self.warned.discard(topic)  # the monitor knows when to say a thing again
            self.warn(topic, message)
        self._noted.clear()
        return line

    def _reduced(self, name: str, found: Sequence[tuple[float, float]]) -> float:
        values, weights = zip(*found, strict=True)
        if name in self._how:
            return self._how[name](values)
        total = sum(weights)
        if total and min(values) == max(values):  # their mean, which rounding could make another
            return float(values[0])
        return sum(v * w for v, w in found) / total if total else math.nan

    # --- rollouts and words -----------------------------------------------------------------

    def rollouts(
        self,
        rollouts: Sequence[Rollout],
        step: int,
        *,
        split: str = "train",
        extra: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write rollouts, with what the teacher saw and thought where ``extra`` says it."""
        if not self.config.log_rollouts:
            return
        empty: dict[str, Any] = {"teacher_prompt": None, "token_kl": None}
        records = (
            [
                {
                    **r.to_dict(),
                    "step": step,
                    "split": split,
                    "tokens": [self.decode([t]) for t in r.completion_ids],
                    **empty,
                    **(extra[i] if extra else {}),
                }
                for i, r in enumerate(rollouts)
            ]
            if self.run is not None or self.world.size > 1
            else []
        )
        everywhere = self.world.gather(records)
        if self.run is not None:
            self.run.log_rollouts(step, (r for part in everywhere for r in part))

    def warn(self, topic: str, message: str) -> None:
        """Warn once per topic on the console, and once per topic and step in the run's record."""
        if self.run is not None and topic not in self._noted:
            self._noted.add(topic)
            self.run.event("warning", message)
        if not self.world.is_main:
            self._unsaid.append((topic, message))  # the main process says it
        elif topic not in self.warned:
            self.warned.add(topic)
            warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _notice(self, topic: str, message: str) -> bool:
        """Of a slow path, which is told of at each use: once per run."""
        if topic not in self._slow:
            self._slow.add(topic)
            self.warned.discard(topic)  # a resumed run says it on the console again
            self.warn(topic, message)
        return True

    def note(self, message: str) -> None:
        """Keep a note in the run's record."""
        if self.run is not None:
            self.run.event("info", message)

    # --- from the first step to the last ------------------------------------------------------

    def start_trackers(self, fallback: str, resume_step: int | None) -> None:
        """Open the trackers, on the main process.

        Args:
            fallback: what the run is called if it has no directory.
            resume_step: the first step to come of a run that is resumed.
        """
        if not self.world.is_main:
            return
        self._trackers = open_trackers(
            self.config.report_to,
            project=self.config.project,
            name=fallback if self.run is None else self.run.path.name,
            config=self.config.model_dump(),
            warn=self.warn,
            folder=None if self.run is None else self.run.path,
            resume_step=resume_step,
        )

    def stop_trackers(self, *, failed: bool = False) -> None:
        """Close them, and write down no more notices."""
        self.stop_listening()
        if self._trackers is not None:
            self._trackers.close(failed=failed)

    def rewind(self, position: Mapping[str, int], description: Mapping[str, Any], env: Env) -> None:
        """Forget what the run wrote after a checkpoint's position, and go on from there."""
        if self.run is None:
            return
        self.run.rewind(position)
        self._slow.clear()  # what is rewound is to be noticed again
        self.run.describe(description, env)
        self.history = [
            {k: math.nan if v is None else v for k, v in line.items()} for line in self.run.metrics
        ]

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from step to step, as JSON data."""
        return {"warned": sorted(self.warned), "monitor": self.monitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        self.warned = set(state["warned"])
        self.monitor.load_state_dict(state["monitor"])


_SHOWN = {"rollout": "sampling", "eval": "evaluation", "update": "learning"}
"""Phases as a display calls them, where it does not call them by their name."""


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
            with progress.phase(_SHOWN.get(phase, phase)):
                yield
        finally:
            self._spent[phase] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The phases of the step that ends now, its total, and training's up to now."""
        now = time.perf_counter()
        step = now - self._step_start
        self.trained += step - self._spent.get("eval", 0.0)
        spent = {**self._spent, "step": step, "train_total": self.trained}
        self._spent.clear()
        self._step_start = now
        return spent
