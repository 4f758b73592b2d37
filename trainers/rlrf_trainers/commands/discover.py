"""Test-time SDPO: learn on one task until a rollout solves it; against two baselines.

`rlrf discover` does what section 5 of the SDPO paper (arXiv 2601.20802) does::

    sdpo         sample 16 rollouts; stop if one solves; else one SDPO step on their feedback
    best_of_k    sample and never learn
    multi_turn   one rollout at a time, shown the question and the feedback on all before it

Every rollout counts. The *discovery time* of a run is the 1-based index of its first success among
all its rollouts in the order they were sampled, and ``discovery@k`` the chance that it is at most
``k``. Rollouts the infrastructure failed are no attempts: they are sampled anew and reported.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import rlrf
from rlrf import Env, Feedback, Messages, Policy, Rollout, Task, notices
from rlrf._interrupt import keeping
from rlrf.config import build_config, check_output, in_range, load_train_config, parse_assignment
from rlrf.console import Display
from rlrf.env import as_tasks
from rlrf.errors import ConfigError, UnknownIdError, UsageError, check_whole
from rlrf.progress import phase
from rlrf.reprompt import choose_hints, multi_turn_prompt
from rlrf.results import ResultsFile
from rlrf.runs import environment_lock
from rlrf.wrappers import wrap, wrappers_of
from rlrf_trainers.algorithms.sdpo import SDPOTrainer
from rlrf_trainers.config import SDPOConfig
from rlrf_trainers.core.preflight import check_questions
from rlrf_trainers.engines.hf import HFPolicy

METHODS = ("sdpo", "best_of_k", "multi_turn")
BATCH = 16
"""Rollouts per SDPO step; [P] table 12: 16."""
ADVANTAGE_CLIP = 5.0
"""[P] table 12, of section 5 alone."""
MAX_PROMPT_LEN = 32_768
"""Tokens of a multi-turn prompt before the oldest feedback is dropped; [P] section 5: 32k."""
WITHOUT_EFFECT = (
    *("max_steps", "prompts_per_step", "probe_tasks", "eval_steps", "eval_on_start", "eval_tasks"),
    *("eval_samples", "eval_temperature", "eval_top_p", "early_stopping_patience"),
    *("metric_for_best_model", "load_best_model_at_end", "save_steps", "save_total_limit"),
    *("log_rollouts", "save_model", "report_to", "project"),
)
CONFIDENCE = 0.9
"""Of every interval here; [P] section 5: 90 %."""
REPLICATES = 2000
MOST_ATTEMPTS = 1_000_000
MOST_SEEDS = 100_000
"""Of a run: a curve has a number for each. [P]'s baselines take 2944."""

_Array = NDArray[np.float64]


# --- one run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscoveryRun:
    """One method on one task under one seed.

    Attributes:
        task_id: the task.
        seed: of sampling and episodes.
        method: one of :data:`METHODS`.
        budget: most attempts allowed.
        rewards: of each attempt (scored rollout), in the order sampled.
        successes: 1-based indices of the attempts that solved the task.
        unscored: rollouts that the infrastructure failed; no attempts.
        updates: batches that SDPO learnt from; fewer than it sampled where feedback was missing.
        dropped: feedback that had left the multi-turn prompt by the end, oldest first.
        solution: the first reply that solved the task.
        failure: why the run was given up, ``kind: message``; None for one that is complete.
    """

    task_id: str
    seed: int
    method: str
    budget: int
    rewards: tuple[float, ...] = ()
    successes: tuple[int, ...] = ()
    unscored: int = 0
    updates: int = 0
    dropped: int = 0
    solution: str | None = None
    failure: str | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells it from other runs: task, seed, method."""
        return self.task_id, self.seed, self.method

    @property
    def time(self) -> int | None:
        """The discovery time in attempts, or None if censored at the budget."""
        return self.successes[0] if self.successes else None

    @property
    def attempts(self) -> int:
        """Attempts made; the rest of the batch in which the first success fell included."""
        return len(self.rewards)

    def curve(self) -> _Array:
        """``[budget]`` discovery@k of this run, k = 1 to the budget.

        For ``best_of_k``, whose attempts are independent, the unbiased pass@k (Chen et al. 2021,
        arXiv 2107.03374, eq. 1) from all of them; else 0 before the discovery time, 1 from it on.
        """
        k = np.arange(1, self.budget + 1)
        if self.method == "best_of_k":
            n, failed = self.attempts, self.attempts - len(self.successes)
            # Drawing without replacement, all k fail with prod_{i<k} (failed - i) / (n - i).
            missed = np.cumprod(np.maximum(0, failed - k + 1) / (n - k + 1), dtype=np.float64)
            return np.subtract(1.0, missed)
        return (k >= (self.time or math.inf)).astype(np.float64)

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON data, with ``time`` and ``attempts``; :meth:`from_dict` reads it."""
        return asdict(self) | {"time": self.time, "attempts": self.attempts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DiscoveryRun:
        """The run that :meth:`to_dict` wrote.

        Raises:
            LookupError: a field is missing.
        """
        own = {f.name: data[f.name] for f in fields(cls)}
        own["rewards"], own["successes"] = tuple(own["rewards"]), tuple(own["successes"])
        return cls(**own)


# --- the report ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """discovery@k with its uncertainty, or the difference of two.

    Attributes:
        values: ``[budget]`` at k = 1 to the budget: mean over tasks of the mean over seeds.
        low: ``[budget]`` lower end of the 90 % interval.
        high: ``[budget]`` upper end.
        mean_attempts: mean discovery time in attempts, unsolved runs counted as the budget (so it
            understates how slow a method is that often fails).
        mean_attempts_ci: its 90 % interval.
    """

    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mean_attempts: float
    mean_attempts_ci: tuple[float, float]

    def at(self, k: int) -> tuple[float, float, float]:
        """``(value, low, high)`` at k attempts."""
        return self.values[k - 1], self.low[k - 1], self.high[k - 1]


@dataclass(frozen=True)
class MethodReport:
    """How one method did.

    Attributes:
        curve: discovery@k; None when no run is complete.
        n_runs: complete runs, (task, seed) pairs.
        n_solved: of these, those with a success.
        n_tasks: tasks with a complete run.
        n_tasks_solved: of these, those with a success under any seed.
        attempts: attempts made in the complete runs.
        unscored: rollouts that the infrastructure failed, in all runs.
        failures: why the other runs were given up; they are left out of every other number.
    """

    curve: Curve | None
    n_runs: int
    n_solved: int
    n_tasks: int
    n_tasks_solved: int
    attempts: int
    unscored: int
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class DiscoveryReport:
    """What a discovery found.

    Attributes:
        budget: most attempts of a run.
        methods: method to its report.
        sdpo_minus: baseline to discovery@k of ``sdpo`` minus its own, over the runs both
            completed. Their intervals are paired: tasks are as hard for the one as for the other,
            which the intervals of the methods cannot show.
        runs: every run.
    """

    budget: int
    methods: Mapping[str, MethodReport]
    sdpo_minus: Mapping[str, Curve] = field(default_factory=dict)
    runs: tuple[DiscoveryRun, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, runs: Iterable[DiscoveryRun], budget: int) -> DiscoveryReport:
        """The report of runs that are already there, all with this ``budget``."""
        runs = tuple(runs)
        complete: dict[str, dict[tuple[str, int], _Array]] = {}
        for run in runs:
            curves = complete.setdefault(run.method, {})
            if run.failure is None:
                curves[run.task_id, run.seed] = run.curve()
        methods = {}
        for method, curves in complete.items():
            own = [r for r in runs if r.method == method]
            done = [r for r in own if r.failure is None]
            methods[method] = MethodReport(
                curve=_estimate(curves, censored=budget) if curves else None,
                n_runs=len(done),
                n_solved=sum(r.time is not None for r in done),
                n_tasks=len({r.task_id for r in done}),
                n_tasks_solved=len({r.task_id for r in done if r.time is not None}),
                attempts=sum(r.attempts for r in done),
                unscored=sum(r.unscored for r in own),
                failures=tuple(r.failure for r in own if r.failure is not None),
            )
        sdpo, differences = complete.get("sdpo", {}), {}
        for method, curves in complete.items():
            both = {key: sdpo[key] - curve for key, curve in curves.items() if key in sdpo}
            if method != "sdpo" and both:
                differences[method] = _estimate(both, censored=0)
        return cls(budget, methods, differences, runs)

    @property
    def ks(self) -> list[int]:
        """1, 4, 16, 64, ... and the budget."""
        ks = [4**i for i in range(self.budget.bit_length()) if 4**i < self.budget]
        return [*ks, self.budget]

    @property
    def n_failed(self) -> int:
        """Runs that were given up."""
        return sum(len(m.failures) for m in self.methods.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data, curves and runs included."""
        methods: dict[str, Any] = {}
        for name, method in self.methods.items():
            methods[name] = asdict(method) | {
                "curve": self._curve(method.curve) if method.curve else None
            }
        return {
            "budget": self.budget,
            "confidence": CONFIDENCE,
            "methods": methods,
            "sdpo_minus": {name: self._curve(c) for name, c in self.sdpo_minus.items()},
            "runs": [r.to_dict() for r in self.runs],
        }

    def _curve(self, curve: Curve) -> dict[str, Any]:
        return {"discovery_at_k": {str(k): list(curve.at(k)) for k in self.ks}} | asdict(curve)


def _estimate(curves: Mapping[tuple[str, int], _Array], *, censored: int) -> Curve:
    """Mean and bootstrap interval of runs' curves, by ``(task, seed)``.

    Tasks are drawn with replacement and, of each task drawn, its seeds: attempts at one task are
    alike, so tasks are the units. A replicate is a mean of the runs with other weights. The
    generator is seeded: the same runs give the same interval.

    Args:
        curves: ``[budget]`` each.
        censored: attempts of a run that finds nothing; 0 for differences of runs.
    """
    rng = np.random.default_rng(0)
    tasks: dict[str, list[_Array]] = {}
    for (task_id, _), curve in sorted(curves.items(), key=lambda item: item[0]):
        tasks.setdefault(task_id, []).append(curve)
    n = len(tasks)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=REPLICATES)  # [R, n] times each task
    columns, plain = [], []
    for i, own in enumerate(tasks.values()):
        seeds = len(own)
        often = rng.multinomial(drawn[:, i] * seeds, np.full(seeds, 1 / seeds))  # [R, seeds]
        columns.append(often / (seeds * n))
        plain.append(np.full(seeds, 1 / (seeds * n)))
    weights = np.concatenate(columns, axis=1)  # [R, runs]
    stacked = np.stack([curve for own in tasks.values() for curve in own])  # [runs, budget]
    # E min(T, budget) = sum over k from 0 to budget - 1 of P(T > k), and P(T > 0) = 1.
    attempts = censored - stacked[:, :-1].sum(axis=1)
    mean: _Array = np.concatenate(plain)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(weights @ stacked, [tail, 1 - tail], axis=0)
    fewest, most = np.quantile(weights @ attempts, [tail, 1 - tail])
    return Curve(
        values=_floats(mean @ stacked),
        low=_floats(low),
        high=_floats(high),
        mean_attempts=float(mean @ attempts),
        mean_attempts_ci=(float(fewest), float(most)),
    )


def _floats(values: _Array) -> tuple[float, ...]:
    return tuple(values.round(12).tolist())  # weights sum to 1 but for the last bits


# --- the methods --------------------------------------------------------------------------


def discovery_config(
    env: Env, options: Mapping[str, Any] | None = None, *, prefix: str = ""
) -> SDPOConfig:
    """``options`` over the defaults of test-time SDPO.

    These are :class:`SDPOConfig`'s own (reverse KL, K = 20, learning rate 1e-6, EMA 0.01,
    temperature 1: the paper's, which are for full weights; LoRA wants about 1e-4), 16 rollouts per
    step, advantages clipped at 5, and replies as long as the environment suggests.
    ``max_steps`` follows the budget, and nothing is drawn from the split: ``prompts_per_step`` is
    not used.

    Args:
        env: suggests ``max_completion_length``.
        options: fields of :class:`SDPOConfig`.
        prefix: put before every key in messages.

    Raises:
        ConfigError: a wrong key or value.
    """
    defaults: dict[str, Any] = {
        "num_generations": BATCH,
        "max_completion_length": env.max_tokens,
    }
    given = dict(options or {})
    if given.get("distillation_alpha", 1) == 1:  # it belongs to the reverse KL
        defaults["distillation_advantage_clip"] = ADVANTAGE_CLIP
    return build_config(SDPOConfig, {**defaults, **given}, prefix=prefix)


def discover(
    env: Env,
    model: Any,
    tasks: str | Task | Iterable[str | Task] | None = None,
    *,
    methods: str | Sequence[str] = METHODS,
    budget: int = 256,
    seeds: int | Sequence[int] = 1,
    config: SDPOConfig | Mapping[str, Any] | None = None,
    max_prompt_len: int = MAX_PROMPT_LEN,
    on_batch: Callable[[DiscoveryRun], None] | None = None,
    on_run: Callable[[DiscoveryRun], None] | None = None,
    done: Iterable[DiscoveryRun] = (),
) -> DiscoveryReport:
    """Run every method on every task under every seed, and report.

    All start from the same weights, sample with the same parameters, and share the seeds: their
    first attempts at a task are the same.

    Args:
        env: the environment; a rollout that reaches its ``success_threshold`` is a discovery.
        model: a folder or name, a loaded model, or an :class:`HFPolicy`; without ``sdpo`` any
            :class:`Policy` (``multi_turn`` needs its ``encode`` and ``tokenizer``). Afterwards it
            has the weights it came with.
        tasks: ids or tasks, or one; None for the environment's split. A task counts once.
        methods: one or several of :data:`METHODS`.
        budget: most attempts per task, seed and method; [P] 2750.
        seeds: how many, from 0, or which; [P] 5.
        config: of SDPO and of the sampling of all methods; a mapping is laid over
            :func:`discovery_config`.
        max_prompt_len: tokens of a multi-turn prompt; the context less ``max_completion_length``
            where that is smaller.
        on_batch: called with the run so far after each batch of rollouts.
        on_run: called with each run as it ends.
        done: runs of an earlier call that was cut off: those that are complete are not made again.

    Raises:
        UsageError: no tasks, methods or seeds; a budget below 1; a policy the methods cannot use.
        UnknownIdError: no such task or method.
        RlrfError: SDPO's loss is not finite.
    """
    wanted = _methods([methods] if isinstance(methods, str) else methods)
    if isinstance(seeds, int):
        check_whole("seeds", seeds, most=MOST_SEEDS)
    chosen_seeds = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not chosen_seeds:
        raise UsageError(f"seeds is {seeds!r}; it must be at least 1, or name one")
    check_whole("budget", budget, most=MOST_ATTEMPTS)
    given: Iterable[str | Task] = env.tasks() if tasks is None else as_tasks(tasks)
    found = [env._find_task(t) for t in given]
    if not found:
        raise UsageError("discover() was given no tasks; pass ids, Tasks, or None for the split")
    # A reprompt is built around the user's question; best-of-k builds none.
    answers = ("user",) if {"sdpo", "multi_turn"} & set(wanted) else ("user", "tool")
    check_questions(found, answers, "tasks")
    if not isinstance(config, SDPOConfig):
        config = discovery_config(env, config)
    steps = math.ceil(budget / config.num_generations)
    config = config.model_copy(
        update={
            "max_steps": steps,  # for the learning rate's schedule
            # What has no effect must not ask for a run directory either.
            **{"report_to": [], "load_best_model_at_end": False, "early_stopping_patience": 0},
        }
    )
    kept = {run.key: run for run in done if run.failure is None and run.budget == budget}

    searcher = _Searcher(env, model, config, wanted, max_prompt_len, on_batch)
    pairs = [(task, s) for s in chosen_seeds for task in {task.id: task for task in found}.values()]
    try:
        for method in wanted:
            searches = [
                _Search(task, DiscoveryRun(task.id, s, method, budget))
                for task, s in pairs
                if (task.id, s, method) not in kept
            ]
            for run in searcher.run(method, searches):
                kept[run.key] = run
                if on_run is not None:
                    on_run(run)
    finally:
        searcher.restart()
    runs = [kept[task.id, s, method] for task, s in pairs for method in wanted]
    return DiscoveryReport.of(runs, budget)


def _methods(names: Iterable[str]) -> list[str]:
    wanted = list(dict.fromkeys(names))
    if not wanted:
        raise UsageError(f"no method is given; methods are {', '.join(METHODS)}")
    for name in wanted:
        if name not in METHODS:
            raise UnknownIdError("method", name, METHODS)
    return wanted


class _Searcher:
    """The methods, on one model."""

    def __init__(
        self,
        env: Env,
        model: Any,
        config: SDPOConfig,
        methods: Sequence[str],
        max_prompt_len: int,
        on_batch: Callable[[DiscoveryRun], None] | None,
    ) -> None:
        # A transformers model has `generate` too, but neither `score` nor `update_weights`.
        self.policy: Any = model if isinstance(model, Policy) else HFPolicy(model)
        self.trainer: SDPOTrainer | None = None
        self.restart: Callable[[], None] = lambda: None
        if "sdpo" in methods:
            if not isinstance(self.policy, HFPolicy):
                raise UsageError(
                    f"method 'sdpo' trains the model, which {type(self.policy).__name__} does not "
                    "hold; give a model's folder or name, or leave 'sdpo' out"
                )
            self.trainer = SDPOTrainer(self.policy, env, config)
            self.trainer.learner.record.warned.add("empty_target_batch")  # we say it, with the task
            self.restart = _restart(self.trainer)
        if "multi_turn" in methods and not hasattr(self.policy, "encode"):
            raise UsageError(
                f"method 'multi_turn' counts the tokens of its prompts, and "
                f"{type(self.policy).__name__} has no encode(messages); give a model's folder or "
                "name, or leave 'multi_turn' out"
            )
        self.env, self.config, self.on_batch = env, config, on_batch
        context = getattr(self.policy, "context", None)
        room = max_prompt_len
        if context is not None:  # a reply may be as long as the context: half of it is the prompt's
            room = max(context - config.max_completion_length, context // 2)
        self.max_prompt_len = min(max_prompt_len, room)
        self._warned = False

    def run(self, method: str, searches: Sequence[_Search]) -> Iterator[DiscoveryRun]:
        """Runs of one method, each from the initial weights; they come as they end."""
        if method == "multi_turn":  # one attempt at a time each: side by side, or it takes forever
            size = self.config.max_concurrency
            for start in range(0, len(searches), size):
                self.restart()
                yield from self.multi_turn(searches[start : start + size])
            return
        for search in searches:
            self.restart()
            getattr(self, method)(search)
            yield search.run

    def sdpo(self, search: _Search) -> None:
        """Sample a batch, learn from it, until a rollout solves the task."""
        trainer = self.trainer
        assert trainer is not None
        size, step = self.config.num_generations, 0
        while True:
            step += 1
            rollouts = self.sample([search], min(size, search.left))[0]
            if search.solved or not search.left:
                return
            trainer.learner.step = step
            trainer.learner.record.metrics.clear()
            trainer.learn(rollouts)
            if "loss" in trainer.learner.record.metrics:
                search.update(updates=search.run.updates + 1)
            else:
                self._warn_once(search.task)

    def best_of_k(self, search: _Search) -> None:
        """Spend the whole budget: pass@k is estimated from all of it."""
        # Independent of each other, so as many at once as the policy takes.
        size = max(self.config.num_generations, getattr(self.policy, "max_batch_size", 0))
        while search.left:
            self.sample([search], min(size, search.left))

    def multi_turn(self, searches: Sequence[_Search]) -> Iterator[DiscoveryRun]:
        """One rollout at a time; its prompt is the question with the feedback on all before."""
        # Here no reply is a demonstration, whatever its reward: each gets its feedback.
        rules = self.config.model_copy(update={"success_reward_threshold": math.inf})
        while searches:
            posed = [self._question(search, rules) for search in searches]
            for search, rollouts in zip(searches, self.sample(searches, 1, posed), strict=True):
                scored = [r for r in rollouts if r.scored]
                hints = choose_hints(scored, rules)
                search.told += [hint.feedback for hint in hints if hint]
                if search.solved or not search.left:
                    yield search.run
            searches = [s for s in searches if s.left and not s.solved]

    def _question(self, search: _Search, rules: SDPOConfig) -> Messages:
        tools = tuple(getattr(self.env, "tools", ()) or ())
        messages, dropped = multi_turn_prompt(
            search.task.messages,
            search.told,
            rules,
            partial(self.policy.encode, tools=tools) if tools else self.policy.encode,
            self.policy.tokenizer,
            self.max_prompt_len,
        )
        del search.told[:dropped]  # what is dropped stays so: the prompt only grows
        search.update(dropped=search.run.dropped + dropped)
        return messages

    def sample(
        self, searches: Sequence[_Search], n: int, posed: Sequence[Messages] | None = None
    ) -> list[list[Rollout]]:
        """``n`` rollouts for each search, posed by other messages if given; all are counted.

        What is sampled for a search does not depend on those beside it.
        """
        config = self.config
        tasks = [s.task for s in searches]
        if posed is not None:
            tasks = [replace(t, messages=m) for t, m in zip(tasks, posed, strict=True)]
        rollouts = rlrf.rollout(
            self.env,
            self.policy,
            tasks,
            group_size=n,
            max_concurrency=config.max_concurrency,
            deadline_s=config.rollout_deadline_s,
            params=config.sampling_params,
            seed=[s.next_seed() for s in searches],
        )
        groups = [rollouts[i * n : (i + 1) * n] for i in range(len(searches))]
        for search, group in zip(searches, groups, strict=True):
            for rollout in group:
                search.count(rollout, patience=config.num_generations)
            if self.on_batch is not None:
                self.on_batch(search.run)
        return groups

    def _warn_once(self, task: Task) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"task {task.id!r}: no attempt of a batch got feedback, so SDPO learnt nothing "
                "from it. Raise the environment's feedback level, set "
                "include_environment_feedback=true, or choose tasks whose failures get feedback",
                RuntimeWarning,
                stacklevel=2,
            )


class _Search:
    """The attempts of a run under way."""

    def __init__(self, task: Task, run: DiscoveryRun) -> None:
        self.task, self.run = task, run
        self.told: list[Feedback] = []  # what a multi-turn prompt shows, oldest first
        self._batches = self._failed_in_a_row = 0

    @property
    def left(self) -> int:
        """Attempts left; 0 also when the run was given up."""
        return 0 if self.run.failure else self.run.budget - self.run.attempts

    @property
    def solved(self) -> bool:
        """Whether an attempt has solved the task."""
        return bool(self.run.successes)

    def update(self, **changes: Any) -> None:
        """Note changes of the run."""
        self.run = replace(self.run, **changes)

    def next_seed(self) -> int:
        """Of the next batch; far apart between tasks and batches."""
        seed = random.Random(f"{self.run.seed}/{self._batches}/{self.task.id}").getrandbits(31)
        self._batches += 1
        return seed

    def count(self, rollout: Rollout, patience: int) -> None:
        """Take an attempt; after ``patience`` in a row that are none the run is given up."""
        run = self.run
        if rollout.reward is None:
            self._failed_in_a_row += 1
            # The collector has already tried each one again: more of the same will not help.
            hopeless = self._failed_in_a_row >= patience
            self.update(
                unscored=run.unscored + 1, failure=rollout.failure if hopeless else run.failure
            )
            return
        self._failed_in_a_row = 0
        self.update(rewards=(*run.rewards, rollout.reward))
        if rollout.solved:
            first = run.solution if run.successes else rollout.text
            self.update(successes=(*run.successes, self.run.attempts), solution=first)


def _restart(trainer: SDPOTrainer) -> Callable[[], None]:
    """Remember the trainer as it is; the function returned brings it back to that, bit for bit."""
    learner, start = trainer.learner, trainer.state_dict()

    def restart() -> None:
        warned = learner.record.warned
        trainer.load_state_dict(start)
        learner.record.warned = warned  # once is once, whatever the run
        learner.optimizer.zero_grad()

    return restart


# --- the command --------------------------------------------------------------------------

app = typer.Typer(help="Test-time SDPO on single tasks, against best-of-k and multi-turn.")


@app.callback(invoke_without_command=True)
def _discover(
    context: typer.Context,
    env: Annotated[str | None, typer.Option(help="Environment id.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Id of a task; repeatable.")] = None,
    tasks_file: Annotated[Path | None, typer.Option(help="File with a task id per line.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many tasks, of those given or the split.")
    ] = None,
    method: Annotated[str, typer.Option(help="Any of these, by commas.")] = ",".join(METHODS),
    budget: Annotated[
        int, typer.Option(help="Attempts per task, seed and method; the paper's 2750.")
    ] = 256,
    seeds: Annotated[int, typer.Option(help="How many seeds; the paper's 5.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model folder or name.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the tasks.")] = None,
    feedback: Annotated[str | None, typer.Option(help="Feedback level.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="Option of the environment, name=value; repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, as of `rlrf train`.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key, e.g. trainer.learning_rate=1e-4; repeatable."),
    ] = None,
    max_prompt_len: Annotated[
        int, typer.Option(help="Tokens of a multi-turn prompt; beyond, old feedback is dropped.")
    ] = MAX_PROMPT_LEN,
    out: Annotated[
        Path | None,
        typer.Option(help="The JSON file for report and runs; runs/discover/... by default."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace --out, and start anew.")] = False,
) -> None:
    """Learn on a task until it is solved; best-of-k and multi-turn on the same budget.

    A discovery that was cut off is continued.
    """
    in_range("limit", limit)
    in_range("budget", budget, most=MOST_ATTEMPTS)
    in_range("seeds", seeds, most=MOST_SEEDS)
    in_range("seed", seed, least=0, most=2**62)
    in_range("max-prompt-len", max_prompt_len)
    check_output("out", out)
    methods = _methods(name.strip() for name in method.split(",") if name.strip())
    given: dict[str, Any] = {"model": model, "env.id": env}
    given |= {"env.split": split, "env.feedback": feedback}
    given |= {f"env.{key}": value for key, value in map(parse_assignment, option or ())}
    settings = load_train_config(config, set_ or (), given)
    if settings.trainer.name != "sdpo":
        raise ConfigError(f"trainer.name is {settings.trainer.name!r}; discover trains with 'sdpo'")
    progress = context.with_resource(_RunProgress())
    with phase(f"loading the environment {settings.env.id!r}"):
        environment = rlrf.make(settings.env.id, **settings.env.options)
    try:
        environment = wrap(environment, settings.env.wrap)
        options = settings.trainer.options
        trainer_config = discovery_config(environment, options, prefix="trainer.")
        if unused := [key for key in WITHOUT_EFFECT if key in options]:
            print(
                f"note: {', '.join(unused)} of the trainer have no effect here: tasks are given, "
                "--budget ends a run, and --out is all that is written",
                file=sys.stderr,
            )
        if "seed" in options:
            print(
                "note: trainer.seed decides only on an adapter's first weights and on random "
                "demonstrations here; --seed and --seeds are the seeds of the runs",
                file=sys.stderr,
            )
        ids = _task_ids(environment, task, tasks_file)[:limit]
        chosen_seeds = list(range(seed, seed + seeds))
        decides = {
            "env": settings.env.id,
            "env_options": settings.env.options,
            "split": environment.split,
            "feedback": environment.feedback_level.name,
            **({"wrappers": around} if (around := wrappers_of(environment)) else {}),
            "tasks": ids,
            "model": settings.model,
            "method": methods,
            "budget": budget,
            "seeds": chosen_seeds,
            "max_prompt_len": max_prompt_len,
            # One by one, so that a setting that differs is named.
            **{
                f"trainer.{key}": value
                for key, value in trainer_config.model_dump().items()
                if key not in WITHOUT_EFFECT
            },
        }
        if out is not None:
            results = _RunsFile(out, decides, overwrite=overwrite)
            results.claim()  # before the model is loaded
        else:
            name = f"{settings.env.id}-{Path(settings.model).name}"
            results = cast(_RunsFile, _RunsFile.named(Path("runs", "discover"), name, decides))
        if results.done:
            print(f"continuing {results.partial}: {len(results.done)} runs done", file=sys.stderr)
        n_runs = len(ids) * len(chosen_seeds) * len(methods)
        progress.begin(n_runs, len(results.done))

        def kept() -> list[str]:
            return results.kept(progress.done, n_runs, "runs", "; the one under way begins again")

        with (
            results,
            notices.collected() as slow,
            nullcontext(HFPolicy(settings.model)) as policy,
            keeping(kept),
        ):

            def finished(run: DiscoveryRun) -> None:
                results.add(run)
                progress.run(run)

            report = discover(
                environment,
                policy,
                ids,
                methods=methods,
                budget=budget,
                seeds=chosen_seeds,
                config=trainer_config,
                max_prompt_len=max_prompt_len,
                on_batch=progress.batch,
                on_run=finished,
                done=results.done,
            )
            lock = environment_lock(environment)
            results.finish(report, {"lock": lock, "warnings": slow})
    finally:
        environment.close()
    _print_report(Console(), report)
    print(f"written to {results.path}")
    if report.n_failed:
        print(
            f"{report.n_failed} runs were given up; the same command, with --out {results.path}, "
            "tries them again",
            file=sys.stderr,
        )
    if report.n_failed == len(report.runs):
        print(f"error: nothing could be scored: {report.runs[0].failure}", file=sys.stderr)
        raise typer.Exit(1)


def _task_ids(env: Env, task: Sequence[str] | None, tasks_file: Path | None) -> list[str]:
    """The tasks that are asked for, each once; the whole split if none is."""
    ids = list(task or ())
    if tasks_file is not None:
        try:
            lines = tasks_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--tasks-file {str(tasks_file)!r} cannot be read: {error}") from None
        ids += [line.strip() for line in lines if line.strip()]
        if not ids:
            raise UsageError(f"--tasks-file {str(tasks_file)!r} names no task; a line is an id")
    return [env._find_task(id).id for id in dict.fromkeys(ids)] or env.tasks().ids()


class _RunsFile(ResultsFile):
    """A results file whose lines are runs: what is continued is whole runs."""

    def _read(self) -> list[Any]:
        runs: list[DiscoveryRun] = []
        settings: Any = None
        for number, data in self._lines():
            if number == 1:
                settings = data
                continue
            if number == 2:  # settings without a run bind nobody
                self._compare(settings)
            if data is None:
                continue
            try:
                run = DiscoveryRun.from_dict(data)
            except Exception as error:  # whatever a line may hold
                raise self._damaged(number, "run", error) from None
            if run.failure is None:
                runs.append(run)
        return runs

    def finish(self, report: Any, about: Mapping[str, Any]) -> None:
        """Write the report; the partial file stays where runs were given up."""
        as_evaluation: Any = SimpleNamespace(
            to_dict=lambda rollouts: report.to_dict(), n_unscored=report.n_failed
        )
        super().finish(as_evaluation, about)


class _RunProgress(Display):
    """Counts runs, live on a terminal; elsewhere a line per run and per tenth of its budget."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.done = 0
        self._tenths: dict[Any, int] = {}
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        self._bar = Progress(*columns, console=self.console, auto_refresh=False)

    def begin(self, total: int, done: int) -> None:
        """The runs begin: how many there are, and how many are done."""
        self.total, self.done = total, done
        self._runs = self._bar.add_task("runs", total=total, completed=done)
        self._attempts = self._bar.add_task("attempts", total=None)

    def _view(self) -> RenderableType:
        return Group(self._bar, super()._view()) if self.total else super()._view()

    def batch(self, run: DiscoveryRun) -> None:
        """Show a run under way."""
        name = f"{run.method} {run.task_id} seed {run.seed}"
        if self._drawn:
            self._bar.update(
                self._attempts, description=name, completed=run.attempts, total=run.budget
            )
            return
        tenths = 10 * run.attempts // run.budget
        if self._tenths.get(run.key, 0) < tenths < 10:
            solved = len(run.successes)
            self.line(f"{name}: {run.attempts} of {run.budget} attempts, {solved} solve it")
        self._tenths[run.key] = tenths

    def run(self, run: DiscoveryRun) -> None:
        """Count a run that has ended."""
        self.done += 1
        if self._drawn:
            self._bar.update(self._runs, completed=self.done)
        if run.failure is not None:
            ending = f"given up after {run.attempts} attempts: {run.failure}"
        elif run.time is None:
            ending = f"not solved in {run.attempts} attempts"
        else:
            ending = f"solved by attempt {run.time} of {run.attempts} made"
        told = f"{run.method} {run.task_id} seed {run.seed}: {ending}"
        self.line(f"{self.done}/{self.total} {told}")


def _print_report(console: Console, report: DiscoveryReport) -> None:
    rows: dict[str, list[str]] = {f"discovery@{k}": [] for k in report.ks}
    for name in ("mean attempts", "solved runs", "solved tasks", "attempts", "unscored"):
        rows[name] = []
    for method in report.methods.values():
        curve = method.curve
        for k in report.ks:
            rows[f"discovery@{k}"].append(_percent(*curve.at(k)) if curve else "-")
        rows["mean attempts"].append(_attempts(curve) if curve else "-")
        rows["solved runs"].append(f"{method.n_solved} of {method.n_runs}")
        rows["solved tasks"].append(f"{method.n_tasks_solved} of {method.n_tasks}")
        rows["attempts"].append(str(method.attempts))
        rows["unscored"].append(str(method.unscored))
    _print_table(console, list(report.methods), rows)
    if report.sdpo_minus:
        names = [f"sdpo - {baseline}" for baseline in report.sdpo_minus]
        curves = list(report.sdpo_minus.values())
        rows = {f"discovery@{k}": [_percent(*c.at(k), "+") for c in curves] for k in report.ks}
        rows["mean attempts"] = [_attempts(c, "+") for c in curves]
        console.print()
        _print_table(console, names, rows)
    console.print(
        f"Brackets: {CONFIDENCE:.0%} bootstrap intervals over tasks, and seeds within; mean "
        f"attempts count an unsolved run as {report.budget}.",
        highlight=False,
        soft_wrap=True,
    )
    batches = [r for r in report.runs if r.method == "sdpo" and r.failure is None and not r.updates]
    stuck = sorted({r.task_id for r in batches if r.time is None})
    if stuck:
        console.print(
            f"sdpo learnt nothing on {', '.join(stuck)}: no attempt got feedback, or the budget "
            "is a single batch.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _print_table(console: Console, columns: list[str], rows: Mapping[str, list[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", style="cyan", no_wrap=True)
    for name in columns:
        table.add_column(escape(name))
    for name, cells in rows.items():
        table.add_row(name, *map(escape, cells))
    console.print(table)


def _percent(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.1%} [{low:{sign}.1%}, {high:{sign}.1%}]"


def _attempts(curve: Curve, sign: str = "") -> str:
    low, high = curve.mean_attempts_ci
    return f"{curve.mean_attempts:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
