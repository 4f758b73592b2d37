"""A run directory made from nothing, as a real SDPO run leaves one: curves, rollouts, heat maps.

``python -m tests.fake_run FOLDER`` writes one to look at (with ``--hostile`` texts that attack the
page). The numbers are invented; only their shape is meant to be lifelike.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from pathlib import Path
from typing import Any

from rlrf import EvalReport, Rollout
from rlrf.runs import Run

HOSTILE = (
    '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
    "<!-- <svg onload=window.pwned=1> ]]> \u2028 javascript:window.pwned=1 &lt;b&gt; 🙂"
    '" onmouseover="window.pwned=1" \' x=\'` \u202edesrever\u202c \x1b[31m\x07 \u2066'
)

_TASKS = (
    ("squares", "Write a Python function `squares(n)` that returns the first n square numbers."),
    ("is-palindrome", "Write a Python function `is_palindrome(text)`; ignore case and spaces."),
    ("run-length", "Write a Python function `encode(text)` that run-length encodes a string."),
    ("merge-sorted", "Write a Python function `merge(a, b)` that merges two sorted lists."),
    ("roman", "Write a Python function `roman(n)` for 1 <= n <= 3999."),
    ("digits", "Write a Python function `digit_sum(n)`; n may be negative."),
)

_GOOD = """\
The squares start at 1, so I count from one to n.

```python
def squares(n):
    return [i * i for i in range(1, n + 1)]
```
"""
_BAD = """\
I loop over the numbers and collect the squares. 🙂

```python
def squares(n):
    result = []
    for i in range(n):
        result.append(i * i)
    return result
```
"""
_BLAMED = "for i in range(n):"
_CRASH = """\
```python
def squares(n):
    return [i ** 2 for i in rnage(1, n + 1)]
```
"""


def make_fake_run(
    path: Path,
    *,
    steps: int = 60,
    seed: int = 0,
    tasks_per_step: int = 2,
    group_size: int = 4,
    skill: float = 0.75,
    hostile: bool = False,
    status: str = "done",
) -> Path:
    """Write a run of ``steps`` steps into ``path``."""
    rng = random.Random(seed)
    run = Run.create(
        path,
        config={
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            "env": {"id": "code-basics-v0", "feedback": "explained"},
            "trainer": {
                "learning_rate": 1e-5 if seed % 2 == 0 else 3e-5,
                "num_generations": group_size,
                "distillation_alpha": 1.0,
                "distillation_topk": 20,
                "teacher_regularization": "ema",
                "teacher_update_rate": 0.01,
                "lora_target_modules": ["q_proj", "v_proj"],
                "seed": seed,
            },
        },
    )
    train_total = 0.0
    for step in range(steps + 1):
        progress = 1 / (1 + math.exp(-6 * (step / max(steps, 1) - 0.4)))
        rate = 0.18 + (skill - 0.18) * progress
        metrics: dict[str, float] = {}
        if step % max(1, steps // 6) == 0:
            found = [
                _rollout(rng, f"{i}:{task}", task, text, rate, distilled=False, hostile=hostile)
                for i, (task, text) in enumerate(_TASKS * 4)
            ]
            run.log_rollouts(step, [{**r, "split": "eval"} for r in found])
            metrics["eval/pass_rate"] = sum(r["solved"] for r in found) / len(found)
            metrics["eval/reward"] = metrics["eval/pass_rate"]
            metrics["time/eval"] = 4 + rng.random()
        if step > 0:
            chosen = rng.sample(_TASKS, tasks_per_step)
            batch = [
                _rollout(rng, f"{i}:{task}", task, text, rate, distilled=True, hostile=hostile)
                for i, (task, text) in enumerate(chosen)
                for _ in range(group_size)
            ]
            run.log_rollouts(step, [{**r, "split": "train"} for r in batch])
            metrics |= _step_metrics(rng, step, steps, rate, batch)
            train_total += metrics["time/step"]
            metrics["time/train_total"] = train_total
        if step == steps // 2:
            metrics["loss"] = math.nan
        run.log(step, metrics)
    run.event("info", "evaluation uses 24 held-out tasks")
    run.event("warning", "the demonstration of task roman was cut to fit max_reprompt_len=512")
    if hostile:
        run.event("warning", HOSTILE)
    if status != "running":
        run.finish(status, "RlrfError: the loss of step 31 is nan" if status == "failed" else "")
    return path


def make_fake_eval(
    path: Path,
    *,
    tasks: int = 40,
    samples: int = 2,
    seed: int = 0,
    rate: float = 0.4,
    hostile: bool = False,
    partial: bool = False,
    **settings: Any,
) -> Path:
    """Write what ``rlrf eval --out`` does, at ``path`` or, of one under way, beside it."""
    settings = {
        "env": "code-basics-v0",
        "env_options": {},
        "split": "eval",
        "feedback": "explained",
        "n_tasks": tasks,
        "policy": "hf",
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "samples_per_task": samples,
        "temperature": 1.0,
        "max_tokens": 256,
        **settings,
    }
    records = []
    for i in range(tasks):
        task, text = _TASKS[i % len(_TASKS)]
        hard = random.Random(i).random()  # of the task, not of the seed
        for k in range(samples):
            rng = random.Random(f"{seed} {i} {k}")
            r = _rollout(
                rng, f"{i}:{task}-{i}", f"{task}-{i}", text, min(1.0, 2 * rate * hard),
                distilled=False, hostile=hostile,
            )  # fmt: skip
            for name in ("teacher_prompt", "tokens", "token_kl"):
                r.pop(name)
            r["messages"] = (
                _thinking(r["messages"], hostile) if rng.random() < 0.4 else r["messages"]
            )
            records.append({**r, "sample": k})
    if partial:
        lines = [settings, *records[: len(records) * 2 // 3]]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        path.with_name(path.name + ".partial").write_text(text)
        return path
    report = EvalReport.of(Rollout.from_dict(r) for r in records)
    warnings = [HOSTILE] if hostile else []
    data = settings | {"lock": {"python": "3.11"}, "warnings": warnings}
    path.write_text(json.dumps(data | report.to_dict(rollouts=True)))
    return path


def _thinking(messages: list[dict[str, Any]], hostile: bool) -> list[dict[str, Any]]:
    """The same chat with reasoning, a call of a tool, its answer, and a call that is none."""
    attack = HOSTILE if hostile else ""
    if messages[-1]["role"] != "assistant":
        return messages
    call = {"name": f"run_tests{attack}", "arguments": json.dumps({"code": f"squares(3){attack}"})}
    unread = '<tool_call>{"name": run_tests}</tool_call>'
    said = messages[-1]["content"] + "\n" + unread
    told = {
        "text": unread,
        "status": "invalid_json",
        "why": f"expected a value at character 9{attack}",
        "span": [len(said) - len(unread), len(said)],
    }
    return [
        *messages[:-1],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
            "reasoning_content": f"The tests may tell.{attack} Let me run them first.",
        },
        {"role": "tool", "tool_call_id": "call_1", "content": f"3 of 4 passed{attack}"},
        {**messages[-1], "content": said, "invalid_tool_calls": [told]},
    ]


def _step_metrics(
    rng: random.Random, step: int, steps: int, rate: float, batch: list[dict[str, Any]]
) -> dict[str, float]:
    scored = [r for r in batch if r["reward"] is not None]
    lengths = [sum(r["completion_mask"]) for r in scored] or [0]
    available = sum(bool(r["feedback"] and r["feedback"][-1]) for r in scored) / max(1, len(scored))
    decay = math.exp(-2 * step / steps)
    times = {"rollout": 6 + rng.random(), "teacher": 1.4 + 0.2 * rng.random()}
    times["update"] = 3.1 + 0.5 * rng.random()
    return {
        "reward": sum(r["reward"] for r in scored) / max(1, len(scored)),
        "reward_std": 0.4 * rng.random(),
        "frac_reward_zero_std": min(1.0, 0.2 + 0.5 * rate * rng.random()),
        "loss": 0.02 + 0.4 * decay * (0.7 + 0.6 * rng.random()),
        "grad_norm": 0.3 + 1.5 * decay * rng.random(),
        "learning_rate": 1e-5,
        "entropy": 0.25 + 0.5 * decay + 0.05 * rng.random(),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 0.1 * decay * rng.random(),
        "env/tests_passed": min(1.0, rate + 0.2 * rng.random()),
        "self_distillation/success_group_fraction": min(1.0, rate + 0.2),
        "self_distillation/success_sample_fraction": min(1.0, rate),
        "self_distillation/feedback_available_fraction": available,
        "self_distillation/feedback_used_fraction": available * 0.8,
        "self_distillation/reprompt_sample_fraction": min(1.0, 0.3 + available * 0.6),
        "self_distillation/teacher_student_kl": 0.03 + 0.3 * decay * (0.8 + 0.4 * rng.random()),
        **{f"time/{name}": value for name, value in times.items()},
        "time/step": sum(times.values()),
    }


def _rollout(
    rng: random.Random,
    group: str,
    task: str,
    text: str,
    rate: float,
    *,
    distilled: bool,
    hostile: bool,
) -> dict[str, Any]:
    draw = rng.random()
    solved = draw < rate
    failed = not solved and draw > 0.985
    crash = not solved and rng.random() < 0.35
    completion = _GOOD if solved else _CRASH if crash else _BAD
    if hostile:
        text, completion = text + HOSTILE, HOSTILE + completion
    segments = [] if solved or failed else _feedback(completion, crash, hostile)
    tokens = re.findall(r"\s?\w+|\n|[^\w\n]", completion)
    kl: list[float | None] = [rng.expovariate(1 / 0.02) for _ in tokens]
    for i, token in enumerate(tokens):
        if token.strip() in ("n", "range", "rnage", "squares") and not solved:
            kl[i] = rng.expovariate(1 / 1.2)
    if not distilled or (solved and rng.random() < 0.3) or failed:
        kl = []
    system = {"role": "system", "content": "You are a careful programmer. Answer with one block."}
    question = {"role": "user", "content": text}
    return {
        "task_id": task,
        "group_id": group,
        "prompt_ids": [1, 2, 3],
        "completion_ids": list(range(len(tokens))),
        "completion_mask": [1] * len(tokens),
        "logprobs": [-0.1] * len(tokens),
        "messages": [system, question]
        + ([] if failed else [{"role": "assistant", "content": completion}]),
        "reward": None if failed else 1.0 if solved else 0.0 if crash else 0.4,
        "feedback": [] if failed else [segments],
        "metrics": {} if failed else {"tests_passed": 1.0 if solved else 0.4},
        "finish_reason": "failed" if failed else "terminated",
        "failure": "sandbox_died: the container exited with 137" if failed else None,
        "spans": [] if failed else [[None] * len(segments)],
        "solved": solved,
        "teacher_prompt": _teacher(text, segments) if kl else None,
        "tokens": tokens,
        "token_kl": kl or None,
    }


def _feedback(completion: str, crash: bool, hostile: bool) -> list[dict[str, Any]]:
    attack = HOSTILE if hostile else ""
    if crash:
        start = completion.index("rnage")
        return [
            _segment(
                "runtime_error",
                'Traceback (most recent call last):\n  File "attempt.py", line 2, in squares\n'
                f"NameError: name 'rnage' is not defined. Did you mean: 'range'?{attack}",
                (start, start + len("rnage")),
                untrusted=True,
            )
        ]
    start = completion.index(_BLAMED)
    return [
        _segment("wrong_answer", f"squares(3): got [0, 1, 4].{attack}", None, untrusted=True),
        _segment("wrong_answer", "squares(3): expected [1, 4, 9].", None, reveals="expected"),
        _segment(
            "hint",
            "The numbering starts at 1, not at 0.",
            (start, start + len(_BLAMED)),
            severity="info",
            source="judge",
        ),
    ]


def _segment(kind: str, text: str, span: tuple[int, int] | None, **fields: Any) -> dict[str, Any]:
    base = {"severity": "error", "source": "checker", "reveals": "nothing", "untrusted": False}
    return {"kind": kind, "text": text, "span": span, "priority": 0, **base, **fields}


def _teacher(text: str, segments: list[dict[str, Any]]) -> str:
    told = "\n\n".join(s["text"] for s in segments) or "(a sibling's correct attempt)"
    return (
        f"<|im_start|>user\n{text}\nThe following is feedback from your unsuccessful earlier "
        f"attempt:\n\n{told}\n\nCorrectly solve the original question.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skill", type=float, default=0.75)
    parser.add_argument("--hostile", action="store_true")
    given = parser.parse_args()
    make_fake_run(
        given.folder,
        seed=given.seed,
        steps=given.steps,
        skill=given.skill,
        hostile=given.hostile,
    )
