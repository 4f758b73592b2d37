"""Spell a word backwards: an environment in 40 lines."""

from rlrf import Feedback, Outcome, Segment, SingleTurnEnv, Task

WORDS = {"train": ("stone", "river", "lamp", "green"), "eval": ("cloud", "paper")}


class Backwards(SingleTurnEnv):
    """Reply with a word spelt backwards."""

    def load_tasks(self, split):
        return [
            Task(w, f"Spell {w!r} backwards. Reply with the word alone.", hidden=w[::-1])
            for w in WORDS[split]
        ]

    def grade(self, task, completion):
        reply, right = completion.strip(), task.hidden
        if reply == right:
            return Outcome(1.0)
        if len(reply.split()) != 1:
            everything = (0, len(completion))
            words = "Reply with one word, nothing else."
            return Outcome(0.0, Feedback.of("format_error", words, span=everything))
        same = sum(a == b for a, b in zip(reply, right))
        start = completion.index(reply)
        told = Segment(
            "wrong_answer",
            f"{same} of {len(right)} letters are in the right place.",
            span=(start, start + len(reply)),
        )
        answer = Segment("wrong_answer", f"The word is {right!r}.", reveals="expected")
        return Outcome(0.0, Feedback((told, answer)), metrics={"letters": same / len(right)})

    def reference_solution(self, task):
        return task.id[::-1]
