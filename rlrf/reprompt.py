"""The reprompt: feedback, demonstration, attempt -> what a policy is shown, within a token budget.

It is what SDPO's self-teacher reads (arXiv 2601.20802, §2 and table 2), and what anybody needs who
shows a policy its feedback: no torch, only a :class:`Chat` that counts tokens.

One pure function decides, per rollout, between a sibling's correct attempt, the environment's
feedback, both, or nothing; another builds the chat. The student's own failed attempt is never in
the prompt: it is what gets scored (the paper measures -4 points and a collapse of entropy when it
is shown).

Why: design/reprompt.md.
"""

from __future__ import annotations

import itertools
import json
import random
import string
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rlrf.env import Env
from rlrf.errors import PromptError, RlrfError, UsageError, nearest
from rlrf.feedback import KINDS, Feedback, defuse
from rlrf.messages import Message, Messages, action_message, user
from rlrf.rollout import Rollout

REPROMPT_TEMPLATE = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
SOLUTION_TEMPLATE = "\nCorrect solution:\n\n{successful_previous_attempt}"
FEEDBACK_TEMPLATE = (
    "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"
)
_MOST_TOKENS = 10_000_000


class RepromptConfig(BaseModel):
    """What is shown, and in which words; [P] is the SDPO paper, [C] its code, [TRL] TRL 1.16.

    Raises:
        pydantic.ValidationError: an unknown key, or a template without its fields.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True)

    success_reward_threshold: float | None = Field(
        None,
        description="reward from which a rollout may be a demonstration; None: what the "
        "environment calls solved, 1.0 unless it says otherwise; [C] YAML 0.5, its README and "
        "[TRL] 1.0",
    )
    use_successful_as_teacher: bool = Field(
        True, description="show a sibling's correct attempt; [TRL] True"
    )
    dont_reprompt_on_self_success: bool = Field(
        True, description="a rollout is never its own demonstration; [C] True"
    )
    distill_on_success: bool = Field(
        True, description="also distil correct rollouts towards a sibling's; [C] does"
    )
    demonstration: Literal["first", "random"] = Field(
        "first",
        description="which correct sibling of several; [C] first. (The shortest collapses length.)",
    )
    remove_thinking_from_demonstration: bool = Field(True, description="[C] True; [TRL] False")
    include_environment_feedback: bool = Field(True, description="[P] §4 True; [TRL] False")
    feedback_kinds: list[str] | None = Field(
        None,
        min_length=1,
        description="show the teacher only these kinds of feedback; None: all, as in [P]",
    )
    environment_feedback_only_without_solution: bool = Field(
        True, description="feedback only where no demonstration is; [P] §4 True"
    )
    feedback_placement: Literal["question", "turn"] = Field(
        "question",
        description="several turns: all feedback beside the question, or each step's beside the "
        "message the policy answered in that step; [own]; [P] has one turn",
    )
    max_reprompt_len: int = Field(
        10240, ge=1, le=_MOST_TOKENS, description="tokens; [P], [TRL] 10240"
    )
    reprompt_template: str = Field(
        REPROMPT_TEMPLATE, description="the teacher's user turn; [P], [C]"
    )
    solution_template: str = Field(SOLUTION_TEMPLATE, description="its {solution}; [P], [C]")
    feedback_template: str = Field(FEEDBACK_TEMPLATE, description="its {feedback}; [P], [C]")

    @field_validator("feedback_kinds")
    @classmethod
    def _known_kinds(cls, value: list[str] | None) -> list[str] | None:
        for kind in value or ():
            if kind not in KINDS:
                kinds = ", ".join(KINDS) + nearest(kind, KINDS)
                raise ValueError(f"has the kind {kind!r}; kinds are {kinds}")
        return value

    @field_validator("reprompt_template")
    @classmethod
    def _reprompt_fields(cls, value: str) -> str:
        return _needs_fields(value, {"prompt", "solution", "feedback"})

    @field_validator("solution_template")
    @classmethod
    def _solution_fields(cls, value: str) -> str:
        return _needs_fields(value, {"successful_previous_attempt"})

    @field_validator("feedback_template")
    @classmethod
    def _feedback_fields(cls, value: str) -> str:
        return _needs_fields(value, {"feedback_raw"})


class Chat(Protocol):
    """How a policy reads a chat; :class:`rlrf_trainers.engines.hf.HFPolicy` is one."""

    tokenizer: Any
    """Counts and cuts texts: ``encode(text, add_special_tokens=False)`` and ``decode(ids)``."""

    @property
    def context(self) -> int | None:
        """Tokens of prompt and reply; None for no limit."""
        ...

    def encode(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of a chat up to where the assistant's next reply begins."""
        ...

    def extend(
        self,
        prefix_ids: Sequence[int],
        new_messages: Messages,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """``prefix_ids``, the end of that turn, ``new_messages``, the start of the next reply."""
        ...


@dataclass(frozen=True)
class Hint:
    """What the teacher of one rollout is shown beside the question.

    Attributes:
        demonstration: what a correct sibling did, see :func:`demonstrated`, or None.
        feedback: the environment's feedback, empty if it is not shown.
        by_step: the same, one for each of the policy's replies.
    """

    demonstration: str | None = None
    feedback: Feedback = Feedback()  # noqa: RUF009  # immutable
    by_step: tuple[Feedback, ...] = field(default=(), compare=False)

    def __bool__(self) -> bool:
        return self.demonstration is not None or bool(self.feedback)


def choose_hints(
    rollouts: Sequence[Rollout], config: RepromptConfig, seed: int | str = 0
) -> list[Hint]:
    """What each rollout's teacher is shown; an empty :class:`Hint` means no distillation.

    Unscored rollouts neither get a hint nor give a demonstration.

    Args:
        rollouts: ``[B]`` any number of groups. Of them count ``reward``, ``solved``, ``messages``
            and ``feedback``, which has one entry for each reply, empty ones included.
        config: the reprompt rules.
        seed: used when ``demonstration="random"``; what is drawn for a rollout depends on it, the
            group and the sample, not on the other groups.
    """
    solvers: dict[str, dict[int, str]] = defaultdict(dict)
    for i, rollout in enumerate(rollouts if config.use_successful_as_teacher else ()):
        if succeeded(rollout, config) and (shown := demonstrated(rollout, config)):
            solvers[rollout.group_id][i] = shown
    hints = []
    for i, rollout in enumerate(rollouts):
        solved = succeeded(rollout, config)
        if not rollout.scored or (solved and not config.distill_on_success):
            hints.append(Hint())
            continue
        siblings = [
            shown
            for j, shown in solvers[rollout.group_id].items()
            if not (config.dont_reprompt_on_self_success and j == i)
        ]
        demonstration = None
        if siblings:
            drawn = 0
            if config.demonstration == "random":
                rng = random.Random(f"{seed} {rollout.group_id} {rollout.sample}")
                drawn = rng.randrange(len(siblings))
            demonstration = siblings[drawn]
        by_step: tuple[Feedback, ...] = ()
        shows_feedback = config.include_environment_feedback and not (
            demonstration is not None and config.environment_feedback_only_without_solution
        )
        if shows_feedback and not solved:
            by_step = _shown(rollout, config)
        hints.append(Hint(demonstration, Feedback(s for f in by_step for s in f), by_step))
    return hints


def other_hint(
    rollout: Rollout, hint: Hint, rollouts: Sequence[Rollout], hints: Sequence[Hint]
) -> Hint:
    """A control for a hint: that of another task, of the same form but not of the same text.

    Where no other task of the batch has one (all feedback states one rule, say), the control is
    the one bit that the attempt was wrong.
    """

    def text(h: Hint) -> str:
        return h.demonstration or h.feedback.text

    start = next(i for i, h in enumerate(hints) if h is hint)
    for i in (*range(start + 1, len(hints)), *range(start)):
        other: Hint = hints[i]
        same_form = (other.demonstration is None) == (hint.demonstration is None)
        differs = rollouts[i].task_id != rollout.task_id and text(other) != text(hint)
        if other and same_form and differs:
            return other
    wrong = Feedback.of("critique", "The attempt was not correct.")
    return Hint(None, wrong, (wrong,))


def succeeded(rollout: Rollout, config: RepromptConfig) -> bool:
    """Whether a rollout may serve as a demonstration."""
    if config.success_reward_threshold is None:
        return rollout.solved
    return rollout.reward is not None and rollout.reward >= config.success_reward_threshold


def demonstrated(rollout: Rollout, config: RepromptConfig) -> str:
    """What a rollout shows to a sibling's teacher; empty if nothing is left of it.

    Its reply; of an episode of several turns all of them, each after its role, the environment's
    included, as in the official code. A call of a tool is ``name(arguments)``.
    """
    turns = list(rollout.messages[len(prompt_messages(rollout)) :])
    while turns and turns[-1]["role"] != "assistant":  # what came after the last reply
        turns.pop()
    texts = []
    for turn in turns:
        said = turn["content"] or ""
        if turn["role"] == "assistant":
            if config.remove_thinking_from_demonstration:
                said = action_message(turn)["content"] or ""
            elif turn.get("reasoning_content"):
                said = f"<think>{turn['reasoning_content']}</think>\n\n{said}"
        calls = [_call(call) for call in turn.get("tool_calls") or ()]
        text = "\n".join(part for part in (said, *calls) if part.strip())
        texts.append(f"{turn['role']}: {text}" if len(turns) > 1 and text else text)
    return "\n\n".join(text for text in texts if text)


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f"{function.get('name')}({arguments})"


def _shown(rollout: Rollout, config: RepromptConfig) -> tuple[Feedback, ...]:
    """The feedback of every step, in order, of the kinds that are to be shown."""
    kinds = config.feedback_kinds
    return tuple(
        Feedback(s for s in f if kinds is None or s.kind in kinds) for f in rollout.feedback
    )


def prompt_messages(rollout: Rollout) -> Messages:
    """The messages that stood before the policy's first reply."""
    replies = len(rollout.feedback)
    position = len(rollout.messages)
    for i in range(len(rollout.messages) - 1, -1, -1):
        if rollout.messages[i]["role"] == "assistant" and replies:
            position, replies = i, replies - 1
    return rollout.messages[:position]


@dataclass(frozen=True)
class Reprompt:
    """A teacher prompt.

    Attributes:
        messages: the chat; the last is the user turn that carries the hint.
        prompt_ids: its ids, generation prompt included.
        truncated: whether feedback or demonstration had to be shortened.
        completion_ids: what the teacher scores after it: what was sampled, token for token, and
            between the turns what the environment said, with feedback where it is placed there.
        completion_mask: 1 where the policy sampled the token.
    """

    messages: Messages
    prompt_ids: tuple[int, ...]
    truncated: bool
    completion_ids: tuple[int, ...] = ()
    completion_mask: tuple[int, ...] = ()


class Reprompter:
    """Builds the teacher's prompts for an environment and a policy.

    Args:
        config: the reprompt rules.
        policy: renders chats.
        env: its tools, if it has some, are in the teacher's chat as they are in the student's.
    """

    def __init__(self, config: RepromptConfig, policy: Chat, env: Env) -> None:
        self.config, self.policy = config, policy
        self.tools = tuple(env.tools or ())

    def encode(self, messages: Messages) -> list[int]:
        """Ids of a chat up to where the assistant's next reply begins."""
        return self.policy.encode(messages, self.tools)

    def build(self, rollout: Rollout, hint: Hint) -> Reprompt | None:
        """The teacher's view of a rollout; None where there is no room for any of the hint.

        The room is ``max_reprompt_len``, or what the reply leaves of the model's context.

        Also where the chat template refuses it: then a warning says so.

        Raises:
            UsageError: the message before the first reply is not from the user.
        """
        try:
            return self._build(rollout, hint)
        except PromptError as error:
            warnings.warn(f"task {rollout.task_id!r} is not distilled: {error}", stacklevel=2)
            return None

    def _build(self, rollout: Rollout, hint: Hint) -> Reprompt | None:
        room = self.config.max_reprompt_len
        if self.policy.context is not None:
            room = min(room, self.policy.context - len(rollout.completion_ids))
        in_turns = self.config.feedback_placement == "turn" and len(hint.by_step) > 1
        first = Hint(hint.demonstration, hint.by_step[0]) if in_turns else hint
        reprompt = build_reprompt(
            prompt_messages(rollout),
            first,
            self.config,
            self.encode,
            self.policy.tokenizer,
            max_len=room,
        )
        if reprompt is None:
            return None
        ids, mask, truncated = rollout.completion_ids, rollout.completion_mask, reprompt.truncated
        if in_turns:
            left = room - len(reprompt.prompt_ids)
            ids, mask, cut = self._with_feedback(rollout, hint, reprompt.prompt_ids, left)
            truncated |= cut
        return replace(reprompt, completion_ids=ids, completion_mask=mask, truncated=truncated)

    def has_room(self, messages: Messages, hint: Hint) -> bool:
        """Whether a question leaves room for a hint, or cannot be rendered, which is its own fault.

        Room for the reply is not reckoned with: it is not there yet.
        """
        room = self.config.max_reprompt_len
        if self.policy.context is not None:
            room = min(room, self.policy.context)
        encode, tokenizer = self.encode, self.policy.tokenizer
        try:
            found = build_reprompt(messages, hint, self.config, encode, tokenizer, max_len=room)
        except (RlrfError, TypeError, ValueError):
            return True
        return found is not None

    def _with_feedback(
        self, rollout: Rollout, hint: Hint, prompt_ids: tuple[int, ...], room: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """The completion with each later step's feedback beside what that step answered.

        What was sampled stays token for token; a turn of the environment is only rendered anew
        where feedback joins it.
        """
        runs = [
            (bool(sampled), [token for token, _ in run])
            for sampled, run in itertools.groupby(
                zip(rollout.completion_ids, rollout.completion_mask, strict=True),
                key=lambda pair: pair[1],
            )
        ]
        later = [f for f in hint.by_step[1:] if f]
        # What the template takes is reckoned in with each.
        frame = len(_ids(self.policy.tokenizer, self.config.feedback_template))
        room = max(0, room // max(1, len(later)) - frame)
        turns = _turns(rollout)
        ids: list[int] = []
        mask: list[int] = []
        truncated, reply = False, 0
        for sampled, run in runs:
            if sampled:
                reply += 1
            elif reply < len(hint.by_step) and hint.by_step[reply] and reply < len(turns):
                told = hint.by_step[reply].tokenize(self.policy.tokenizer, room)
                truncated |= told.truncated
                if told.text:
                    # An environment that said nothing gets a message to put the feedback in.
                    *before, last = turns[reply] or (user(""),)
                    text = self.config.feedback_template.format(feedback_raw=told.text)
                    extended: Message = {**last, "content": f"{last['content'] or ''}{text}"}
                    prefix = [*prompt_ids, *ids]
                    turn = self.policy.extend(prefix, (*before, extended), self.tools)
                    run = turn[len(prefix) :]
            ids += run
            mask += [int(sampled)] * len(run)
        return tuple(ids), tuple(mask), truncated


def _turns(rollout: Rollout) -> list[Messages]:
    """What the environment said before each reply, the question apart; the first is empty."""
    turns: list[list[Message]] = [[]]
    for message in rollout.messages[len(prompt_messages(rollout)) :]:
        if message["role"] == "assistant":
            turns.append([])
        else:
            turns[-1].append(message)
    return [tuple(turn) for turn in turns]


def build_reprompt(
    messages: Messages,
    hint: Hint,
    config: RepromptConfig,
    encode: Callable[[Messages], Sequence[int]],
    tokenizer: Any,
    *,
    max_len: int | None = None,
) -> Reprompt | None:
    """The teacher's chat: earlier messages, then one user turn with question and hint.

    If it exceeds ``max_reprompt_len``, the demonstration and the feedback are shortened (their
    heads and tails stay), never the question, the instruction or the template.

    Args:
        messages: the student's prompt; its last message must be the user's.
        hint: what to add.
        config: templates and budget.
        encode: chat to ids, the policy's own, so that teacher and student share a template.
        tokenizer: counts and cuts.
        max_len: the budget, if it is less than ``max_reprompt_len``.

    Returns:
        None where the budget leaves no room for any of the hint.

    Raises:
        UsageError: the last message is not from the user.
    """
    if not messages or messages[-1]["role"] != "user":
        raise UsageError(
            "a reprompt is built around the user's question, but the prompt's last message is "
            f"{messages[-1]['role'] if messages else 'missing'!r}"
        )
    question = messages[-1]["content"] or ""

    def chat(demonstration: str | None, feedback: str) -> Messages:
        text = config.reprompt_template.format(
            prompt=question,
            solution=""
            if demonstration is None
            else config.solution_template.format(successful_previous_attempt=demonstration),
            feedback=config.feedback_template.format(feedback_raw=feedback) if feedback else "",
        )
        return (*messages[:-1], user(text))

    budget = config.max_reprompt_len if max_len is None else min(max_len, config.max_reprompt_len)
    demonstration, feedback = hint.demonstration, hint.feedback
    shown = chat(demonstration, feedback.text)
    ids = encode(shown)
    if len(ids) <= budget:
        return Reprompt(shown, tuple(ids), False)

    # What the frame alone takes is spent; the rest is shared evenly, and what the shorter of the
    # two does not need goes to the other.
    frame = len(encode(chat("" if demonstration is not None else None, ".")))
    room = max(0, budget - frame)
    step = 1
    needs = {
        "demonstration": len(_ids(tokenizer, demonstration)) if demonstration else 0,
        "feedback": len(feedback.tokenize(tokenizer)),
    }
    while True:
        share = _share(needs, room)
        cut_demonstration = (
            None
            if demonstration is None
            else cut_tokens(demonstration, tokenizer, share["demonstration"]) or None
        )
        cut_feedback = feedback.tokenize(tokenizer, share["feedback"]).text
        shown = chat(cut_demonstration, cut_feedback)
        ids = encode(shown)
        over = len(ids) - budget
        if cut_demonstration is None and not cut_feedback:
            return None
        if over <= 0:
            return Reprompt(shown, tuple(ids), True)
        # Joining texts can cost a token or two more than their sum; a feedback of thousands of
        # segments as many: growing steps come to an end.
        room = max(0, room - max(over, step))
        step *= 2


def _share(needs: Mapping[str, int], room: int) -> dict[str, int]:
    half = room // 2
    first, second = needs
    if needs[first] <= half:
        return {first: needs[first], second: room - needs[first]}
    if needs[second] <= half:
        return {first: room - needs[second], second: needs[second]}
    return {first: half, second: room - half}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(defuse(text, tokenizer), add_special_tokens=False))


def cut_tokens(text: str, tokenizer: Any, max_tokens: int) -> str:
    """Keep head and tail of ``text`` within ``max_tokens``."""
    return Feedback.of("reference", text).tokenize(tokenizer, max_tokens).text


def multi_turn_prompt(
    messages: Messages,
    told: Sequence[Feedback],
    config: RepromptConfig,
    encode: Callable[[Messages], Sequence[int]],
    tokenizer: Any,
    max_prompt_len: int,
) -> tuple[Messages, int]:
    """The question with all past feedback in one user turn, in the words of the SDPO teacher.

    Feedback only, without the attempts: the better of the paper's two variants. Beyond
    ``max_prompt_len`` the oldest feedback goes first; the newest, if it alone is too long, is
    shortened; the question never.

    Args:
        messages: the task's; the last must be the user's.
        told: the feedback on all attempts so far, oldest first.
        config: the templates.
        encode: chat to ids, the policy's own; counts tokens.
        tokenizer: cuts a feedback that is too long.
        max_prompt_len: tokens, generation prompt included.

    Returns:
        The chat, and how many of ``told`` it leaves out.

    Raises:
        UsageError: the last message is not from the user.
    """
    if not told:
        return messages, 0
    dropped = 0
    while len(told) - dropped > 1:
        parts = [config.feedback_template.format(feedback_raw=f.text) for f in told[dropped:]]
        text = config.reprompt_template.format(
            prompt=messages[-1]["content"] or "", solution="", feedback="\n".join(parts)
        )
        shown = (*messages[:-1], user(text))
        if len(encode(shown)) <= max_prompt_len:
            return shown, dropped
        dropped += 1
    fitting = config.model_copy(update={"max_reprompt_len": max_prompt_len})
    newest = build_reprompt(messages, Hint(None, told[-1]), fitting, encode, tokenizer)
    return (messages, dropped + 1) if newest is None else (newest.messages, dropped)


def _needs_fields(template: str, names: set[str]) -> str:
    try:
        parts = [p for p in string.Formatter().parse(template) if p[1] is not None]
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ValueError("a field must be its bare name in braces")
        found = {field or "" for _, field, _, _ in parts}
    except ValueError as error:
        raise ValueError(f"is no format string: {error}; write {{{{ for a literal brace") from None
    if found != names:
        raise ValueError(
            f"has the fields {sorted(found)}; it must have exactly {sorted(names)} "
            "(write {{ for a literal brace)"
        )
    return template
