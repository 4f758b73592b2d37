"""How long a run will take on this machine, before it starts: a few forward passes, timed.

The rest is arithmetic on the configuration, right within about a factor of 1.5: replies are taken
for three quarters of their longest, a backward pass for two forward passes. Once steps have been
taken their own pace says it better.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from rlrf import Prompt, SamplingParams
from rlrf.progress import duration
from rlrf_trainers.config import SDPOConfig, TrainerConfig
from rlrf_trainers.policies import sampler

if TYPE_CHECKING:
    from rlrf_trainers.learner import Learner

FILLED = 0.75
"""How much of its longest length a reply is taken to have."""

_TIMED_TOKENS = 4
_MOST_PROMPTS = 16
_QUICK_S = 5.0
_LONGEST_S = 10.0


def plan(config: TrainerConfig, env: str, eval_tasks: int) -> str:
    """What a run will do, in a line."""
    name = type(config).__name__.removesuffix("Config").lower()
    text = (
        f"{name} on {env}: {config.max_steps} steps of {config.prompts_per_step} tasks x "
        f"{config.num_generations} attempts of at most {config.max_completion_length} tokens"
    )
    times = evaluations(config)
    return f"{text}; {times} evaluations on {eval_tasks} held-out tasks"


def evaluations(config: TrainerConfig, after: int = 0) -> int:
    """How many evaluations there are to come after a step; 0 counts the one at the start."""
    every, last = config.eval_steps, config.max_steps
    due = sum(s == last or (every > 0 and s % every == 0) for s in range(after + 1, last + 1))
    return due + (config.eval_on_start and not after)


def estimate(learner: Learner) -> str:
    """How long what is left of a run takes, in a line, by timing its model."""
    began = time.perf_counter()
    c, policy = learner.config, learner.policy
    share = learner.world.size
    tasks = [learner.tasks[i] for i in range(min(len(learner.tasks), _MOST_PROMPTS))]
    tasks = tasks[: max(1, c.prompts_per_step // share)]
    ids = [policy.chat.prompt_ids(Prompt(task.messages)) for task in tasks]
    rows = [row for row in ids for _ in range(c.num_generations)][: policy.max_batch_size]
    few = rows[: c.num_generations]
    prefill, decode = _timed(learner, few)
    if prefill + _TIMED_TOKENS * decode < _QUICK_S and len(rows) > len(few):
        prefill, decode = _timed(learner, rows)  # what is quick is told better by more of it
    else:
        rows = few
    prompt = sum(map(len, ids)) / len(ids)  # tokens
    per_token = prefill / sum(map(len, {tuple(row) for row in rows}))

    def sampled(distinct: float, each: int, longest: int) -> float:
        """Seconds to sample ``each`` replies to ``distinct`` prompts."""
        whole = distinct * each
        batch = min(whole, policy.max_batch_size)
        a_token = decode * (0.3 + 0.7 * batch / len(rows))
        return distinct * prompt * per_token + math.ceil(whole / batch) * longest * FILLED * a_token

    prompts = c.prompts_per_step / share
    replies = prompts * c.num_generations
    tokens = replies * c.max_completion_length * FILLED
    # A vocabulary of probabilities for each sampled token, which a prefill does not make.
    head = tokens * _head_share(learner)
    learned = 3 * (prompts * prompt + tokens + head)
    if isinstance(c, SDPOConfig):  # the teacher reads the question, the feedback and the reply
        learned += replies * (1.4 * prompt) + tokens + head
    step = sampled(prompts, c.num_generations, c.max_completion_length)
    step += c.num_iterations * learned * per_token
    held_out = min(c.eval_tasks or math.inf, len(learner.eval_env.tasks(learner.eval_split)))
    evaluation = sampled(held_out / share, c.eval_samples, c.max_completion_length)
    seconds = (c.max_steps - learner.step) * step
    seconds += evaluations(c, learner.step) * evaluation
    spent = time.perf_counter() - began
    return (
        f"about {duration(seconds)} on this machine, by a warm-up of {duration(spent)}: "
        f"{duration(step)} a step, {duration(evaluation)} an evaluation"
    )


def _timed(learner: Learner, rows: list[list[int]]) -> tuple[float, float]:
    """Seconds of the prefill of some prompts, and of each token of all of them after it."""
    times = [time.perf_counter()]

    def token(ids: list[int]) -> bool:
        if len(ids) == len(times):  # the first row's
            times.append(time.perf_counter())
        return times[-1] - times[0] > _LONGEST_S

    def run(some: list[list[int]], tokens: int) -> None:
        del times[1:]
        times[0] = time.perf_counter()
        sampler.sample(
            learner.policy.model,
            some,
            SamplingParams(max_tokens=tokens),
            end_ids=(),
            seeds=[(i,) for i in range(len(some))],
            max_batch_size=len(some),
            context=learner.policy.context,
            stop=token,
        )

    run(rows[:1], 2)  # the first time a GPU compiles, and a CPU reads the weights from the disk
    run(rows, _TIMED_TOKENS)
    if len(times) < 3:  # prompts that fill the context, or a slow machine: as for the prompt
        spent = times[-1] - times[0]
        return spent, spent * len(rows) / sum(map(len, rows))
    return times[1] - times[0], (times[-1] - times[1]) / (len(times) - 2)


def _head_share(learner: Learner) -> float:
    """What the output layer and its loss cost beside the layers below it, a token."""
    weights = sum(p.numel() for p in learner.model.parameters())
    head = int(learner.model.get_input_embeddings().weight.numel())
    return float(2 * head / max(1, weights - head))
