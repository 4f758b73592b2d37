"""How long a run will take on this machine, before it starts: a few forward passes, timed.

The rest is arithmetic on the configuration, right within about a factor of 1.5: every pass that a
run makes over its tokens is counted, a backward pass as two, and as one where what it goes through
is frozen (LoRA). What replies and feedback will be like is not known: see the numbers below. Not
counted is what is not the model's: grading, and files. Once steps have been taken, their own pace
says it better (:class:`rlrf.console.TrainProgress`).

Beside a whole run (the demo's model and environment in fp32, two steps of 4 tasks, evaluations of
16), in CPU seconds of one core: 55 told, 51 and 44 taken a step; 23 told, 18 and 20 taken an
evaluation; 231 told, 194 taken in all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlrf import Prompt, SamplingParams, Task
from rlrf.progress import duration
from rlrf_trainers.config import SDPOConfig, TrainerConfig
from rlrf_trainers.model import sampler

if TYPE_CHECKING:
    from rlrf_trainers.core.learner import Learner
    from rlrf_trainers.core.loop import Loop

FILLED = 0.5
"""How much of its longest length a reply has on average; one of a batch has all of it."""

FEEDBACK_TOKENS = 64
"""How long feedback is."""

DIFFER = 0.5
"""Of the ``n`` hints of a task's attempts, ``n ** DIFFER`` differ; those that do not are shared."""

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
    times = config.evaluations_after(0)
    return f"{text}; {times} evaluations on {eval_tasks} held-out tasks"


def estimate(loop: Loop) -> str:
    """How long what is left of a run takes, in a line, by timing its model."""
    began = time.perf_counter()
    work = forecast(loop, _paced(loop))
    c, step = loop.config, loop.learner.step
    seconds = work.probe + (c.max_steps - step) * work.step
    seconds += c.evaluations_after(step) * work.evaluation
    spent = time.perf_counter() - began
    return (
        f"about {duration(seconds)} on this machine, by a warm-up of {duration(spent)}: "
        f"{duration(work.step)} a step, {duration(work.evaluation)} an evaluation, grading apart"
    )


@dataclass(frozen=True)
class Pace:
    """What was measured.

    Attributes:
        prefill: seconds of a token of a prompt.
        decode: seconds of a further token of ``rows`` replies at once.
        rows: how many replies that was timed with.
    """

    prefill: float
    decode: float
    rows: int


@dataclass(frozen=True)
class Forecast:
    """Seconds of the parts of a run.

    Attributes:
        probe: what SDPO measures before the first step; 0 where it does not.
        step: of a step, its evaluation apart.
        evaluation: of an evaluation.
    """

    probe: float
    step: float
    evaluation: float


def forecast(loop: Loop, pace: Pace) -> Forecast:
    """Seconds of the parts of a run at a pace: every pass over tokens that it makes."""
    learner = loop.learner
    c, share = learner.config, learner.world.size
    most, longest = learner.policy.max_batch_size, c.max_completion_length
    prompt = _tokens(learner, loop.tasks)

    def sampled(distinct: float, each: float, length: float) -> float:
        """Of ``each`` replies to ``distinct`` prompts of so many tokens."""
        whole = distinct * each
        batch = min(whole, most)
        # Rows that have ended leave the batch; part of a token's cost is not theirs.
        decoding = longest * pace.decode * (0.3 + 0.7 * FILLED * batch / pace.rows)
        return distinct * length * pace.prefill + math.ceil(whole / batch) * decoding

    prompts = c.prompts_per_step / share
    replies = prompts * c.num_generations
    tokens = replies * longest * FILLED
    # A vocabulary of probabilities for each sampled token, which a prefill does not make.
    tokens *= 1 + _head_share(learner)
    shared = 1 if c.gradient_checkpointing or c.fsdp else c.num_generations
    read = tokens + replies * prompt / shared
    updates = c.num_iterations * math.ceil(c.prompts_per_step / (c.mini_batch_prompts or math.inf))
    passes = c.num_iterations * (3 - (c.lora_r > 0) + c.gradient_checkpointing) + (updates > 1)
    step = sampled(prompts, c.num_generations, prompt) + passes * read * pace.prefill
    probe = 0.0
    if isinstance(c, SDPOConfig):
        hint, differ = _hint_tokens(learner, c), c.num_generations**DIFFER
        teachers = (1 + (c.teacher_regularization == "trust_region")) * (
            1 + (c.baseline == "control")
        )
        hints = prompts * (differ if shared > 1 else c.num_generations) * hint
        step += c.num_iterations * teachers * (read + hints) * pace.prefill
        if c.probe_tasks and not learner.step:
            probed = min(c.probe_tasks, len(loop.tasks)) / share
            differ = c.probe_samples**DIFFER
            probe = sampled(probed, c.probe_samples, prompt)  # and again with hints, all of them
            probe += sampled(probed * differ, c.probe_samples / differ, prompt + hint)
    elif getattr(c, "beta", 0):
        step += c.num_iterations * read * pace.prefill
    tasks = loop.evaluation.env.tasks(loop.evaluation.split)
    held_out = min(c.eval_tasks or math.inf, len(tasks)) / share
    return Forecast(probe, step, sampled(held_out, c.eval_samples, _tokens(learner, tasks)))


def _paced(loop: Loop) -> Pace:
    """Time the model on some of the prompts that it is about to answer."""
    learner = loop.learner
    c, policy = learner.config, learner.policy
    tasks = [loop.tasks[i] for i in range(min(len(loop.tasks), _MOST_PROMPTS))]
    tasks = tasks[: max(1, c.prompts_per_step // learner.world.size)]
    ids = [policy.chat.prompt_ids(Prompt(task.messages)) for task in tasks]
    rows = [row for row in ids for _ in range(c.num_generations)][: policy.max_batch_size]
    few = rows[: c.num_generations]
    prefill, decode = _timed(learner, few)
    if prefill + _TIMED_TOKENS * decode < _QUICK_S and len(rows) > len(few):
        prefill, decode = _timed(learner, rows)  # what is quick is told better by more of it
    else:
        rows = few
    return Pace(prefill / sum(map(len, {tuple(row) for row in rows})), decode, len(rows))


def _tokens(learner: Learner, tasks: Sequence[Task]) -> float:
    """The mean length of a prompt."""
    some = [tasks[i] for i in range(min(len(tasks), _MOST_PROMPTS))]
    chat = learner.policy.chat
    return sum(len(chat.prompt_ids(Prompt(task.messages))) for task in some) / len(some)


def _hint_tokens(learner: Learner, config: SDPOConfig) -> int:
    """What a teacher reads beside the question: the template's words, and feedback."""
    shown = config.feedback_template.format(feedback_raw="")
    words = config.reprompt_template.format(prompt="", solution="", feedback=shown)
    return min(len(learner.tokenizer.encode(words)) + FEEDBACK_TOKENS, config.max_reprompt_len)


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
