"""Small environments and policies that several tests share."""

from __future__ import annotations

import asyncio
import threading

import rlrf
from rlrf import Completion, Feedback, Outcome, Segment, Task, Turn
from rlrf.plugins import Registry

# What is installed, not what other tests registered for themselves meanwhile.
INSTALLED = sorted(Registry("rlrf.environments", "environment").entry_points())


class Echo(rlrf.SingleTurnEnv):
    """Say the word. Feedback at every level, with the span of what was said instead."""

    def __init__(self, *, shout: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.shout = shout

    def load_tasks(self, split):
        return [Task(f"{split}-{w}", f"{split}: say {w}.", {"n": 1}, hidden=w) for w in WORDS]

    def grade(self, task, completion):
        word = task.hidden.upper() if self.shout else task.hidden
        if completion == word:
            return Outcome(1.0, metrics={"length": len(completion)})
        told = (
            Segment("wrong_answer", "Say the word alone.", span=(0, len(completion)), priority=1),
            Segment("wrong_answer", f"The word is {word}.", reveals="expected"),
            Segment("lint", f"You said {completion!r}.", severity="warning", untrusted=True),
        )
        return Outcome(0.0, Feedback(told), {"length": len(completion)})

    def reference_solution(self, task):
        return self._find_task(task).hidden


WORDS = ("yes", "no", "so")


class AsyncEcho(Echo):
    """The same with ``async def``, through ``super()``."""

    async def grade(self, task, completion):
        await asyncio.sleep(0)
        return super().grade(task, completion)


class Guess(rlrf.MultiTurnEnv):
    """Guess a number that the episode's generator draws."""

    tools = ({"type": "function", "function": {"name": "guess"}},)

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"{split} {i}: guess.") for i in range(3)]

    def start(self, task, rng):
        return {"number": int(rng.integers(10)), "tries": 0}

    async def respond(self, state, action):
        state["tries"] += 1
        right = action["content"] == str(state["number"])
        told = Feedback() if right else Feedback.of("wrong_answer", f"Not it ({state['tries']}).")
        again = () if right else "Again."
        return Turn(again, float(right), told, terminated=right, metrics={"tries": state["tries"]})


class Gate(rlrf.SingleTurnEnv):
    """Grades wait for :attr:`open`; ``stuck`` tasks wait for ever. Counts what runs at once."""

    splits = ("train",)

    def __init__(self, *, stuck=(), tasks=6, **kwargs):
        super().__init__(**kwargs)
        self.stuck, self.count = stuck, tasks
        self.never = threading.Event()
        self.running = self.most = 0
        self.lock = threading.Lock()

    def load_tasks(self, split):
        return [Task(f"t{i}", f"task {i}") for i in range(self.count)]

    def grade(self, task, completion):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if task.id in self.stuck:
                self.never.wait()
            return Outcome(1.0)
        finally:
            with self.lock:
                self.running -= 1

    def close(self):
        self.never.set()


class Recorder:
    """A policy that replies from a function and remembers its calls; tokens are UTF-8 bytes."""

    def __init__(self, reply=lambda prompt: "x", *, batch=64, logprob=-0.5, **fields):
        self.reply, self.logprob, self.fields = reply, logprob, fields
        self.calls: list[list[str]] = []
        self.seeds: list[int | None] = []
        self.prompts: list[rlrf.Prompt] = []
        if batch is not None:
            self.max_batch_size = batch

    def generate(self, prompts, params):
        self.calls.append([p.messages[0]["content"] for p in prompts])
        self.seeds.append(params.seed)
        self.prompts += prompts
        return [self.complete(p) for p in prompts]

    def complete(self, prompt):
        text = self.reply(prompt)
        if isinstance(text, Exception):
            raise text
        new = prompt.messages if prompt.prefix_ids is None else prompt.new_messages
        before = (prompt.prefix_ids or ()) + tuple("".join(m["content"] for m in new).encode())
        sampled = tuple(text.encode())
        offsets = tuple(rlrf.token_offsets(Bytes(), sampled))
        return Completion(
            before,
            (*sampled, 256),
            (self.logprob,) * (len(sampled) + 1),
            text,
            offsets=(*offsets, (len(text), len(text))),
            **self.fields,
        )

    def score(self, prompt_ids, completion_ids, top_k=None):
        return []

    def update_weights(self, weights, version=0):
        return None


class AsyncRecorder(Recorder):
    """The same with ``async def generate``."""

    async def generate(self, prompts, params):
        await asyncio.sleep(0)
        return super().generate(prompts, params)


class Bytewise(rlrf.ScriptedPolicy):
    """A script whose tokens are UTF-8 bytes, with 256 as the end token; ``max_tokens`` cuts it."""

    def generate(self, prompts, params):
        scripted = super().generate(prompts, params)
        return [self.tokens(p, c.text, params) for p, c in zip(prompts, scripted, strict=True)]

    def tokens(self, prompt, text, params):
        new = prompt.messages if prompt.prefix_ids is None else prompt.new_messages
        before = (prompt.prefix_ids or ()) + tuple("".join(m["content"] for m in new).encode())
        sampled = (*text.encode(), 256)[: params.max_tokens]
        text = bytes(b for b in sampled if b < 256).decode(errors="replace")
        reason = "stop" if sampled[-1] == 256 else "length"
        return Completion(before, sampled, (0.0,) * len(sampled), text, reason)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    all_special_tokens = ("<|im_end|>",)

    def encode(self, text, *, add_special_tokens=True):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode(errors="replace")
