"""A run killed at any moment goes on as if it had not been: promise 5."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from rlrf import RlrfError, Task, UsageError  # noqa: E402
from rlrf.runs import Run  # noqa: E402
from rlrf_trainers.algorithms.grpo import GRPOTrainer  # noqa: E402
from rlrf_trainers.algorithms.sdpo import SDPOTrainer  # noqa: E402
from rlrf_trainers.commands.export import export_model  # noqa: E402
from rlrf_trainers.config import GRPOConfig, SDPOConfig  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.run.checkpoints import BEST, Checkpoints, State, newest  # noqa: E402
from tests.resume_driver import CountA  # noqa: E402
from tests.tiny_model import save_tiny, tiny_model, tiny_tokenizer  # noqa: E402

COMMON = {
    "max_steps": 6,
    "prompts_per_step": 2,
    "num_generations": 3,
    "max_completion_length": 5,
    "eval_tasks": 2,
    "eval_steps": 3,
    "learning_rate": 1e-2,
    "save_steps": 2,
}
RUNS = {
    "sdpo": ("sdpo", {"teacher_update_rate": 0.1, "demonstration": "random", "probe_tasks": 2}),
    "sdpo-lora": ("sdpo", {"lora_r": 2, "num_iterations": 2}),
    "sdpo-bf16": ("sdpo", {"_dtype": "bfloat16", "distillation_weight": 0.5}),
    "grpo": ("grpo", {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}),
}


def lines(run_dir, name):
    records = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def assert_same(a: Path, b: Path) -> None:
    """The same steps, the same rollouts, the same weights, to the last bit."""
    assert lines(a, "metrics.jsonl") == lines(b, "metrics.jsonl")
    assert lines(a, "rollouts.jsonl") == lines(b, "rollouts.jsonl")
    for file in ("model/model.safetensors", "model/adapter_model.safetensors"):
        assert (a / file).exists() == (b / file).exists()
        if (a / file).exists():
            assert (a / file).read_bytes() == (b / file).read_bytes()
    states = [newest(x) for x in (a, b)]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, tensor in states[0].tensors.items():
        assert torch.equal(tensor, states[1].tensors[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments(name, tmp_path):
    trainer, config = RUNS[name]
    seed = 7 + list(RUNS).index(name)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.resume_driver", str(tmp_path), trainer),
            *(json.dumps({**COMMON, **config}), str(seed), "3"),
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["killed_at"]
    assert len(lines(tmp_path / "whole", "metrics.jsonl")) == COMMON["max_steps"] + 1
    assert_same(tmp_path / "whole", tmp_path / "killed")


def trainer(run_dir, cls=SDPOTrainer, resume=False, dtype=torch.float32, **config):
    model = HFPolicy(tiny_model().to(dtype), tiny_tokenizer())
    extra = {"probe_tasks": 0} if cls is SDPOTrainer else {}
    made = cls.config_class(**{**COMMON, **extra, **config})
    return cls(model, CountA(), made, run_dir=run_dir, resume=resume)


@pytest.mark.parametrize("cls", [SDPOTrainer, GRPOTrainer])
def test_a_state_puts_everything_back(cls, tmp_path):
    config = {"beta": 0.1, "sync_ref_model": True} if cls is GRPOTrainer else {}
    made = trainer(None, cls, **config)

    def one_step():
        made.learner.step += 1
        made.learn(made.source.next())
        return {n: p.detach().clone() for n, p in made.learner.model.named_parameters()}

    one_step()
    state = made.state_dict()
    first = one_step()
    one_step()
    made.load_state_dict(state)
    again = one_step()
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_a_resumed_run_takes_more_steps_and_keeps_its_history(tmp_path):
    trainer(tmp_path / "run", max_steps=4).train()
    result = trainer(tmp_path / "run", max_steps=6, resume=True).train()
    assert [line["step"] for line in result.history] == [0, 1, 2, 3, 4, 5, 6]
    run = Run.open(tmp_path / "run")
    assert run.status == "done"
    assert any("resumed from the checkpoint of step 4" in e["message"] for e in run.events)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, save_steps=2, max_steps=2, save_model=False).train()
    first = lines(run_dir, "metrics.jsonl")
    Checkpoints(run_dir).clear()
    Run.open(run_dir).finish("running")
    trainer(run_dir, save_steps=2, max_steps=2, resume=True).train()
    assert lines(run_dir, "metrics.jsonl") == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"save_steps": 0}, {"max_steps": 9}, "no checkpoint .* with save_steps=0"),
        ({"save_steps": 0}, {"max_steps": 9, "save_steps": 1}, "no checkpoint"),  # as it was
        ({}, {"max_steps": 1}, "last checkpoint is of step 2"),
        ({}, {"lora_r": 2}, "lora_r=0"),
        ({}, {"teacher_regularization": "live"}, "teacher_regularization='ema'"),
    ],
)
def test_a_resume_that_is_refused_touches_nothing(then, now, message, tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=2, **then).train()
    before = everything(run_dir)
    with pytest.raises(UsageError, match=message):
        trainer(run_dir, **{"max_steps": 2, **then, **now}, resume=True).train()
    assert everything(run_dir) == before


def everything(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("status", "every", "model"),
    [
        ("done", 2, False),  # to its end
        ("running", 1, False),  # past where a checkpoint was
        ("running", 0, False),
        ("failed", 1, True),
    ],
)
def test_a_run_that_would_lose_what_it_has_does_not_begin_again(status, every, model, tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=2, save_steps=every, save_model=model).train()
    Checkpoints(run_dir).clear()
    Run.open(run_dir).finish(status)
    before = everything(run_dir)
    with pytest.raises(
        UsageError, match=f"took 2 steps, with save_steps={every}.*--overwrite"
    ) as refused:
        trainer(run_dir, save_steps=2, max_steps=3, resume=True).train()
    assert ("run/model' if you like" in str(refused.value)) is model
    assert everything(run_dir) == before


@pytest.mark.parametrize("harm", ["state", "optimizer", "rollouts"])
def test_what_was_damaged_is_named_and_nothing_else_is_touched(harm, tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=2).train()
    if harm == "state":
        path = Checkpoints(run_dir).path(2) / "state.json"
        data = json.loads(path.read_text())
        del data["rng"]
        path.write_text(json.dumps(data))
        message = "damaged, or of another version"
    elif harm == "optimizer":
        path = Checkpoints(run_dir).path(2) / "state.safetensors"
        tensors = load_file(path)
        save_file({n: t for n, t in tensors.items() if not n.startswith("adamw.step")}, path)
        message = "of the optimizer's .* tensors"
    else:
        (run_dir / "rollouts.jsonl").write_text("")
        message = r"rollouts\.jsonl' is shorter"
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3}\n')
    before = (run_dir / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match=message):
        trainer(run_dir, max_steps=4, resume=True).train()
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_another_trainer_or_task_set_is_refused(tmp_path):
    trainer(tmp_path / "run", max_steps=2).train()
    with pytest.raises(UsageError, match=r"trainer='SDPOTrainer'.*--overwrite"):
        trainer(tmp_path / "run", GRPOTrainer, max_steps=3, resume=True).train()

    class Other(CountA):
        def load_tasks(self, split):  # as many, but others
            return [Task(f"other-{i}", f"Say {i}.") for i in range(7)]

    resumed = trainer(tmp_path / "run", max_steps=3, resume=True)
    resumed.loop.tasks = Other().tasks()
    with pytest.raises(UsageError, match=r"tasks='7 \(sha256"):
        resumed.train()


def test_steps_without_a_checkpoint_are_taken_anew_and_that_is_said(tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=2).train()
    trainer(run_dir, max_steps=3, save_steps=0, resume=True).train()
    with pytest.warns(RuntimeWarning, match=r"had taken 3 steps, but .* of step 2"):
        history = trainer(run_dir, max_steps=4, resume=True).train().history
    assert [line["step"] for line in history] == [0, 1, 2, 3, 4]


def test_a_disk_that_is_full_is_named_with_the_run(tmp_path, monkeypatch):
    def full(self, step, metrics):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = trainer(tmp_path / "run", max_steps=2)
    monkeypatch.setattr(Run, "log", full)
    with pytest.raises(RlrfError, match=r"run' could not be written: .*No space left.*--resume"):
        made.train()


def test_the_last_step_is_always_kept(tmp_path):
    trainer(tmp_path / "run", max_steps=3, save_steps=2, eval_steps=0).train()
    assert Checkpoints(tmp_path / "run").steps() == [2, 3]


def test_resuming_another_model_is_refused(tmp_path):
    trainer(tmp_path / "run").train()
    other = HFPolicy(tiny_model(hidden_size=16), tiny_tokenizer())
    config = SDPOConfig(**{**COMMON, "probe_tasks": 0})
    resumed = SDPOTrainer(other, CountA(), config, run_dir=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="same model"):
        resumed.train()


def test_the_model_of_an_overwritten_run_is_not_that_of_the_new_one(tmp_path):
    run_dir = tmp_path / "run"
    trainer(run_dir, max_steps=1).train()
    Checkpoints(run_dir).clear()
    config = {"model": "tiny", "trainer": {"save_steps": 3, "lora_r": 0}}
    fresh = Run.create(run_dir, config=config, overwrite=True)
    fresh.log(0, {})
    fresh.log(1, {})  # and killed, before its first checkpoint
    assert (run_dir / "model").is_dir()
    with pytest.raises(UsageError, match="left no model/"):
        export_model(run_dir, tmp_path / "out")
    history = trainer(run_dir, max_steps=2, resume=True).train().history
    assert [line["step"] for line in history] == [0, 1, 2]
    assert Run.open(run_dir).info["model"]


def test_a_model_that_has_moved_is_the_same_model(tmp_path):
    made = {**COMMON, "probe_tasks": 0, "max_steps": 2}

    def sdpo(folder, resume):
        config = SDPOConfig(**(made | {"max_steps": 2 + resume}))
        return SDPOTrainer(
            str(folder), CountA(), config, run_dir=tmp_path / "run", resume=resume
        ).train()

    save_tiny(tmp_path / "here")
    sdpo(tmp_path / "here", False)
    save_tiny(tmp_path / "there", seed=1)
    with pytest.raises(UsageError, match="written with model="):  # it has other weights
        sdpo(tmp_path / "there", True)
    save_tiny(tmp_path / "now")  # the same; whether the old place is still there does not matter
    assert sdpo(tmp_path / "now", True).history[-1]["step"] == 3
    assert any("the model has moved" in e["message"] for e in Run.open(tmp_path / "run").events)


def test_a_new_run_in_the_place_of_an_old_one_leaves_nothing_of_it(tmp_path):
    trainer(tmp_path / "run", max_steps=2).train()
    for name in ("metrics.jsonl", "status.json", "config.json", "rollouts.jsonl", "lock.json"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "events.jsonl").unlink()
    trainer(tmp_path / "run", max_steps=1, lora_r=2, save_steps=0).train()
    assert not Checkpoints(tmp_path / "run").steps()
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()


def test_what_is_not_ours_is_left_alone(tmp_path):
    run_dir = tmp_path / "run"
    theirs = [run_dir / "checkpoints" / "best" / "w.pt", run_dir / "model" / "weights.bin"]
    for file in theirs:
        file.parent.mkdir(parents=True)
        file.write_text("theirs")
    trainer(run_dir, max_steps=1, eval_steps=0, save_steps=0, save_model=False).train()
    assert all(file.read_text() == "theirs" for file in theirs)


def test_a_model_is_not_overwritten_by_what_is_trained_from_it(tmp_path):
    save_tiny(tmp_path / "run" / "model")
    config = SDPOConfig(**{**COMMON, "probe_tasks": 0})
    with pytest.raises(UsageError, match="lies where this run"):
        SDPOTrainer(str(tmp_path / "run" / "model"), CountA(), config, run_dir=tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_only_so_many_checkpoints_are_kept_and_the_best(tmp_path):
    trainer(tmp_path / "run", save_steps=1, save_total_limit=2, eval_steps=1).train()
    kept = Checkpoints(tmp_path / "run")
    assert kept.steps() == [5, 6]
    best = kept.load(BEST)
    rewards = {
        line["step"]: line["eval/reward"] for line in lines(tmp_path / "run", "metrics.jsonl")
    }
    assert best.data["value"] == max(v for s, v in rewards.items() if s)


# --- best, early stop ---------------------------------------------------------------------------


def with_evaluations(made, rewards):
    """Let the evaluations of a trainer give these rewards."""
    values = iter(rewards)

    def evaluate():
        if made.learner.step % made.config.eval_steps == 0:
            made.learner.record("eval/reward", next(values))

    made.loop.evaluation.if_due = evaluate
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # with masters of their own
def test_the_best_weights_are_left_in_model(dtype, tmp_path):
    made = with_evaluations(
        trainer(
            tmp_path / "run",
            dtype=dtype,
            eval_steps=1,
            load_best_model_at_end=True,
            save_steps=1,
            save_total_limit=10,
        ),
        [0.1, 0.2, 0.9, 0.3, 0.9, 0.1, 0.0],
    )
    result = made.train()
    assert result.model_step == 2  # the first of two alike
    at_best = Checkpoints(tmp_path / "run").load(2).part("master")
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, weight in at_best.items():
        if name in saved:
            assert torch.equal(weight.to(dtype), saved[name]), name
    last = Checkpoints(tmp_path / "run").load(6).part("master")
    assert any(not torch.equal(last[n].to(dtype), at_best[n].to(dtype)) for n in last)


def test_patience_ends_a_run(tmp_path):
    made = with_evaluations(
        trainer(tmp_path / "run", eval_steps=1, early_stopping_patience=2),
        [0.1, 0.5, 0.4, 0.5, 0.9],
    )
    result = made.train()
    assert [line["step"] for line in result.history] == [0, 1, 2, 3]
    events = Run.open(tmp_path / "run").events
    assert any("stopped after step 3" in e["message"] for e in events)


@pytest.mark.parametrize("metric", ["eval/rewrad", "eval/unscored_fraction", "eval/mean_length"])
def test_what_the_best_is_to_have_most_of_must_be_good_to_have(metric):
    with pytest.raises(ValueError, match="eval/reward"):
        GRPOConfig(metric_for_best_model=metric)


@pytest.mark.parametrize("key", ["early_stopping_patience", "load_best_model_at_end"])
def test_choosing_the_best_needs_evaluations(key):
    with pytest.raises(ValueError, match="eval_steps"):
        GRPOConfig(**{key: 1 if key.startswith("early") else True})


# --- the files ----------------------------------------------------------------------------------


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_step(1, State({"x": torch.ones(3)}, {"step": 1}), keep=2)
    import rlrf_trainers.run.checkpoints as module

    monkeypatch.setattr(module, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RlrfError, match=r"step-00000002.*disk full"):
        checkpoints.save_step(2, State({"x": torch.zeros(3)}, {}), keep=2)
    assert checkpoints.steps() == [1]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step-00000001"]
    assert newest(tmp_path).data == {"step": 1}


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(BEST, State({}, {"value": 1}))
    (checkpoints.folder / BEST).rename(checkpoints.folder / f".{BEST}.old")
    assert newest(tmp_path) is None
    assert checkpoints.load(BEST).data == {"value": 1}


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save_step(3, State({"x": torch.ones(3)}, {}), keep=1)
    (path / "state.safetensors").write_bytes(b"oops")
    with pytest.raises(UsageError, match="step-00000003"):
        newest(tmp_path)
    with pytest.raises(UsageError, match="there are step 3"):
        checkpoints.load(4)
