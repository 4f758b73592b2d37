"""SDPO and GRPO on two processes take the steps that one takes on the same batch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from rlrf import RlrfError, Rollout, SamplingParams, UsageError, rollout  # noqa: E402
from rlrf.runs import Run  # noqa: E402
from rlrf_trainers.algorithms.grpo import GRPOTrainer  # noqa: E402
from rlrf_trainers.algorithms.sdpo import SDPOTrainer  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.model import distributed  # noqa: E402
from rlrf_trainers.run.checkpoints import Checkpoints, newest  # noqa: E402
from tests.resume_driver import CountA  # noqa: E402
from tests.test_distributed import ALONE, both  # noqa: E402
from tests.test_sdpo_variants import Parity  # noqa: E402
from tests.tiny_model import save_tiny, tiny_model, tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft on transformers 5.23

COMMON = {
    "max_steps": 2,
    "prompts_per_step": 4,
    "num_generations": 3,
    "max_completion_length": 5,
    "learning_rate": 1e-2,
    "micro_batch_tokens": 60,  # several micro-batches, more on one rank than on the other
    "eval_tasks": 2,
}
CLASSES = {"sdpo": SDPOTrainer, "grpo": GRPOTrainer}


def made(name, config, dtype=torch.float64, env=None, **kwargs):
    extra = {"probe_tasks": 0} if name == "sdpo" else {}
    cls = CLASSES[name]
    model = HFPolicy(tiny_model().to(dtype), tiny_tokenizer())
    return cls(model, env or Parity(), cls.config_class(**{**COMMON, **extra, **config}), **kwargs)


@pytest.fixture(scope="module")
def records():
    """Two generation batches of four groups, one of which has no usable rollout."""
    policy = HFPolicy(tiny_model().double(), tiny_tokenizer())
    env = Parity()
    batches = []
    for seed in (1, 2):
        found = rollout(
            env,
            policy,
            list(env.tasks())[:4],
            group_size=3,
            params=SamplingParams(max_tokens=5),
            seed=seed,
        )
        batches.append([r.to_dict() for r in found])
    return json.loads(json.dumps(batches))


def learn(world, name, config, batches):
    """Learn from the rank's share of given rollouts; the state and the metrics after."""
    trainer = made(name, config)
    assert distributed.is_sharded(trainer.learner.model) == (world.size > 1 and trainer.config.fsdp)
    lines = []
    for step, batch in enumerate(batches, 1):
        rollouts = [Rollout.from_dict(r) for r in batch]
        groups = list(dict.fromkeys(r.group_id for r in rollouts))
        mine = groups[world.rank :: world.size]
        trainer.learner.step = step
        trainer.learn([r for r in rollouts if r.group_id in mine])
        lines.append(trainer.loop.log_step())
    state = trainer.state_dict()
    return {n: t for n, t in state.tensors.items() if not n.startswith("rng")}, lines


CASES = {
    "sdpo": ("sdpo", {"teacher_update_rate": 0.3}),
    "sdpo-mixed": (
        "sdpo",
        {"distillation_weight": 0.5, "mini_batch_prompts": 2},
    ),
    "sdpo-trust-lora": ("sdpo", {"teacher_regularization": "trust_region", "lora_r": 2}),
    "sdpo-live": ("sdpo", {"teacher_regularization": "live", "loss_aggregation": "token_mean"}),
    "grpo": ("grpo", {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    "grpo-batch-std": ("grpo", {"scale_rewards": "batch", "prompts_per_step": 3}),
    "grpo-off-policy": ("grpo", {"num_iterations": 2, "importance_sampling_level": "sequence"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, fsdp, records):
    name, config = CASES[case]
    config = {**config, "fsdp": fsdp}
    expected, expected_lines = learn(ALONE, name, config, records)
    (found, lines), (nothing, same) = both(learn, name=name, config=config, batches=records)
    assert lines == same
    assert not {n for n in nothing if n.startswith("master")}
    assert found.keys() == expected.keys()
    for kind in {n.partition(".")[0] for n in expected}:
        # Norms in the model round to fp32, and AdamW divides by gradients that are nearly zero: so
        # all tensors of a kind as one vector, beside how far two steps have moved it.
        pairs = [(found[n], t) for n, t in expected.items() if n.startswith(kind)]
        error = math.sqrt(sum((a - b).square().sum().item() for a, b in pairs))
        moved = 1e-2 * math.sqrt(sum(b.numel() for _, b in pairs))
        assert error < 1e-3 * moved, (kind, error, moved)
    for line, wanted in zip(lines, expected_lines, strict=True):
        shared = {k for k in wanted if not k.startswith("time/")} - {"step"}
        assert shared == {k for k in line if not k.startswith("time/")} - {"step"}
        for metric in shared:
            assert line[metric] == pytest.approx(wanted[metric], rel=1e-5, abs=1e-6), metric


def sampled(world, fsdp):
    """What is replied in a step of training and in an evaluation, by group and sample."""
    trainer = made("sdpo", {"fsdp": fsdp, "prompts_per_step": 5})
    trainer.learner.step = 2
    replies = {(r.group_id, r.sample): r.completion_ids for r in trainer.source.next()}
    trainer.learner.step = 0
    trainer.loop.evaluation.if_due()
    return replies, trainer.loop.evaluation._scores


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
def test_two_processes_get_the_replies_of_one(fsdp):
    replies, scores = sampled(ALONE, fsdp)
    (mine, both_scores), (theirs, same) = both(sampled, fsdp=fsdp)
    assert len(replies) == 15
    assert mine | theirs == replies
    assert not mine.keys() & theirs.keys()
    assert both_scores == same == scores


def differing(world):
    class Fewer(Parity):
        def load_tasks(self, split):
            return super().load_tasks(split)[world.rank :]

    Fewer.__name__ = Fewer.__qualname__ = "Same"
    with pytest.raises(UsageError, match=r"not started alike: tasks is .* on process 1"):
        made("grpo", {}, env=Fewer())
    return True


@pytest.mark.slow
def test_two_processes_with_different_tasks_do_not_begin():
    assert both(differing) == [True, True]


UNEQUAL = {
    "ema": ("sdpo", {}),
    "trust_region": ("sdpo", {"teacher_regularization": "trust_region"}),
    "live": ("sdpo", {"teacher_regularization": "live"}),
    "control": ("sdpo", {"baseline": "control", "distillation_weight": 0.5}),
    "grpo": ("grpo", {"beta": 0.1}),
    "off-policy": ("grpo", {"num_iterations": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
@pytest.mark.parametrize("case", UNEQUAL)
@pytest.mark.parametrize("left", [0, 3])
def test_a_rank_with_little_or_nothing_to_do_takes_part(case, fsdp, left, records):
    """The second rank has no scored rollout, or three of twelve; all still take the same step."""
    name, config = UNEQUAL[case]
    batch = [dict(r) for r in records[0]]
    groups = list(dict.fromkeys(r["group_id"] for r in batch))
    theirs = [r for r in batch if r["group_id"] in groups[1::2]]
    for r in theirs[left:]:
        r |= {"reward": None, "failure": "sandbox_died: gone"}
    config = {**config, "fsdp": fsdp}
    if config.get("baseline") != "control":  # controls come from the rank's own rollouts
        expected, _ = learn(ALONE, name, config, [batch])
    (found, lines), (_, same) = both(learn, name=name, config=config, batches=[batch])
    assert lines == same
    if config.get("baseline") != "control":
        error = sum((found[n] - t).square().sum().item() for n, t in expected.items())
        moved = 1e-4 * sum(t.numel() for t in expected.values())
        assert error < 1e-6 * moved


def poisoned(world, batches, fsdp):
    trainer = made("sdpo", {"fsdp": fsdp})
    rollouts = [Rollout.from_dict(r) for r in batches[0]]
    groups = list(dict.fromkeys(r.group_id for r in rollouts))
    trainer.learner.step = 1
    before = trainer.state_dict().part("master")
    if world.rank == 1:
        trainer.divergence = _Poison(trainer.divergence)
    with pytest.raises(RlrfError, match="loss of step 1 is nan"):
        trainer.learn([r for r in rollouts if r.group_id in groups[world.rank :: 2]])
    after = trainer.state_dict().part("master")
    return all(torch.equal(before[n], after[n]) for n in before)


class _Poison:
    def __init__(self, divergence):
        self.divergence = divergence

    def measure(self, student, teacher):
        return self.divergence.measure(student * math.nan, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_with_the_reason(fsdp, records):
    assert both(poisoned, batches=records, fsdp=fsdp) == [True, True]


def train(world, folder, config, resume):
    trainer = made("sdpo", config, torch.float32, CountA(), run_dir=folder, resume=resume)
    return trainer.train().history


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data-parallel", "fsdp"])
def test_a_whole_run_its_checkpoints_and_its_resumption(fsdp, tmp_path):
    config = {"fsdp": fsdp, "save_steps": 1, "eval_steps": 1, "save_total_limit": 5}
    (history, same) = both(
        train, folder=tmp_path / "run", config={**config, "max_steps": 3}, resume=False
    )
    assert history == same
    assert [line["step"] for line in history] == [0, 1, 2, 3]
    run = Run.open(tmp_path / "run")
    assert run.status == "done"
    rollouts = [r for r in run.rollouts() if r["split"] == "train"]
    assert len(rollouts) == 3 * 4 * 3  # of both ranks
    whole = newest(tmp_path / "run")
    model = HFPolicy(str(tmp_path / "run" / "model")).model
    for tensor_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, whole.part("master")[tensor_name])

    # The last step again, from the checkpoint before it, and then by one process.
    import shutil

    shutil.rmtree(Checkpoints(tmp_path / "run").path(3))
    both(train, folder=tmp_path / "run", config={**config, "max_steps": 3}, resume=True)
    again = newest(tmp_path / "run")
    for tensor_name, tensor in whole.tensors.items():
        torch.testing.assert_close(again.tensors[tensor_name], tensor, atol=1e-6, rtol=1e-5)
    history = train(ALONE, tmp_path / "run", {**config, "max_steps": 4}, True)
    assert history[-1]["step"] == 4


@pytest.mark.slow
def test_torchrun_trains_from_the_command_line(tmp_path):
    model = save_tiny(tmp_path / "tiny")
    settings = {
        "max_steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 8,
        "eval_tasks": 2,
        "probe_tasks": 0,
        "save_steps": 1,
        "fsdp": "true",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "rlrf", "train", "--env", "format-rules-v0", "--trainer", "sdpo"]
    command += ["--model", str(model), "--run-dir", str(tmp_path / "run"), "--no-report"]
    for key, value in settings.items():
        command += ["--set", f"trainer.{key}={value}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("run directory:") == 1  # one process talks
    run = Run.open(tmp_path / "run")
    assert run.status == "done"
    assert [line["step"] for line in run.metrics] == [0, 1, 2]
    rollouts = [r for r in run.rollouts() if r["split"] == "train" and r["step"] == 2]
    assert len({r["task_id"] for r in rollouts}) == 2  # a task each
    assert Checkpoints(run.path).steps() == [1, 2]
