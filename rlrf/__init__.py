"""rlrf: reinforcement learning with rich feedback.

An environment answers a language model's attempt with a reward *and* with the reason, as typed,
tokenizable text; trainers turn that text into credit. Start with :func:`make`::

    import rlrf

    env = rlrf.make("format-rules-v0")
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("Paris")
    print(reward, info["feedback"])
"""

from rlrf import _interrupt  # noqa: F401  # first of all: see there
from rlrf._async import run_sync
from rlrf.env import (
    Env,
    Episode,
    MultiTurnEnv,
    Outcome,
    SingleTurnEnv,
    StepResult,
    Task,
    TaskSequence,
    Turn,
)
from rlrf.errors import (
    ConfigError,
    InfraError,
    MissingDependencyError,
    OutcomeError,
    PromptError,
    PromptTooLongError,
    RlrfError,
    UnknownIdError,
    UsageError,
)
from rlrf.evaluate import EvalReport, aevaluate, evaluate
from rlrf.feedback import (
    Feedback,
    Level,
    Segment,
    TokenizedFeedback,
    clean_text,
    defuse,
    span_to_tokens,
    token_offsets,
)
from rlrf.messages import Action, Message, Messages, assistant, system, user
from rlrf.policy import (
    Completion,
    Policy,
    Prompt,
    SamplingParams,
    ScriptedPolicy,
    TokenScores,
    make_policy,
    policies,
)
from rlrf.registry import (
    load_entry_points,
    make,
    make_vec,
    pprint_registry,
    register,
    registry,
    spec,
)
from rlrf.rollout import Rollout, arollout, rollout
from rlrf.trainer import Trainer, TrainResult, make_trainer, trainers

__version__ = "0.1.0"

load_entry_points()

__all__ = [
    "Action",
    "Completion",
    "ConfigError",
    "Env",
    "Episode",
    "EvalReport",
    "Feedback",
    "InfraError",
    "Level",
    "Message",
    "Messages",
    "MissingDependencyError",
    "MultiTurnEnv",
    "Outcome",
    "OutcomeError",
    "Policy",
    "Prompt",
    "PromptError",
    "PromptTooLongError",
    "RlrfError",
    "Rollout",
    "SamplingParams",
    "ScriptedPolicy",
    "Segment",
    "SingleTurnEnv",
    "StepResult",
    "Task",
    "TaskSequence",
    "TokenScores",
    "TokenizedFeedback",
    "TrainResult",
    "Trainer",
    "Turn",
    "UnknownIdError",
    "UsageError",
    "aevaluate",
    "arollout",
    "assistant",
    "clean_text",
    "defuse",
    "evaluate",
    "load_entry_points",
    "make",
    "make_policy",
    "make_trainer",
    "make_vec",
    "policies",
    "pprint_registry",
    "register",
    "registry",
    "rollout",
    "run_sync",
    "span_to_tokens",
    "spec",
    "system",
    "token_offsets",
    "trainers",
    "user",
]
