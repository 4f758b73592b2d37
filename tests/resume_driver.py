"""Trains, dies of SIGKILL at given moments, resumes; started by test_resume.py.

    python -m tests.resume_driver FOLDER TRAINER CONFIG_JSON SEED KILLS

The first run is left alone, and counted: how many functions the interpreter calls. Then a run is
killed at KILLS random counts, each time resumed in a process of its own. Both runs must leave the
same. Forked children save importing torch each time; nothing is computed before a fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from rlrf import Feedback, Outcome, SingleTurnEnv, Task, make_trainer
from rlrf.runs import is_run
from rlrf_trainers.engines.hf import HFPolicy
from tests.tiny_model import tiny_model, tiny_tokenizer


class CountA(SingleTurnEnv):
    """Reward: whether half of the reply is "a"."""

    splits = ("train", "eval")

    def load_tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{i}", f"Say {i}.") for i in range(7)]

    def grade(self, task: Task, completion: str) -> Outcome:
        good = 2 * completion.count("a") >= len(completion) > 0
        return Outcome(float(good), Feedback() if good else Feedback.of("hint", f"Say a{task.id}."))


def train(run_dir: Path, trainer: str, config: dict[str, Any], resume: bool) -> None:
    torch.set_num_threads(1)
    dtype = getattr(torch, config.pop("_dtype", "float32"))
    model = HFPolicy(tiny_model().to(dtype), tiny_tokenizer())
    make_trainer(
        trainer, model=model, env=CountA(), config=config, run_dir=run_dir, resume=resume
    ).train()


class Calls:
    """Counts the functions that are called, and dies at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.count, self.kill_at = 0, kill_at

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def in_child(run_dir: Path, trainer: str, config: dict[str, Any], kill_at: int) -> int | None:
    """Train in a fork; how many calls it took, or None if it was killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        calls = Calls(kill_at)
        sys.setprofile(calls)
        train(run_dir, trainer, dict(config), resume=is_run(run_dir))
        sys.setprofile(None)
        os.write(write, str(calls.count).encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert os.waitstatus_to_exitcode(status) == 0
    return int(told)


def main(folder: Path, trainer: str, config: dict[str, Any], seed: int, kills: int) -> None:
    rng = random.Random(seed)
    calls = in_child(folder / "whole", trainer, config, kill_at=0)
    assert calls is not None
    moments = []
    while len(moments) < kills:
        # Later runs begin at a checkpoint, so they make fewer calls than a whole one.
        moment = rng.randrange(1, calls)
        if in_child(folder / "killed", trainer, config, moment) is not None:
            break
        moments.append(moment)
    else:
        assert in_child(folder / "killed", trainer, config, kill_at=0) is not None
    print(json.dumps({"calls": calls, "killed_at": moments}))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    )
