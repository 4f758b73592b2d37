"""SDPO and GRPO on a tiny model: the algorithm, its switches, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import pytest

torch = pytest.importorskip("torch")

import rlrf  # noqa: E402
from rlrf import Feedback, InfraError, Outcome, RlrfError, Task, UsageError  # noqa: E402
from rlrf_trainers.algorithms.grpo import GRPOTrainer  # noqa: E402
from rlrf_trainers.algorithms.sdpo import SDPOTrainer  # noqa: E402
from rlrf_trainers.config import GRPOConfig, SDPOConfig  # noqa: E402
from rlrf_trainers.core.batch import Batch, Sample  # noqa: E402
from rlrf_trainers.core.optimizer import MasterAdamW, trainable  # noqa: E402
from rlrf_trainers.core.teacher import Teacher  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.model.head import Head  # noqa: E402
from tests.tiny_model import save_tiny, tiny_model, tiny_tokenizer  # noqa: E402


class CountA(rlrf.SingleTurnEnv):
    """Reward: the share of the reply that is "a"; feedback asks for it."""

    feedback_text = "Say a."

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"Say {i}.") for i in range(12)]

    def grade(self, task, completion):
        reward = completion.count("a") / max(1, len(completion))
        told = Feedback.of("wrong_answer", self.feedback_text) if reward < 1 else Feedback()
        return Outcome(reward, told if self.feedback_text else Feedback())


class Mute(CountA):
    feedback_text = ""

    def grade(self, task, completion):
        return Outcome(0.0)


SMALL = {
    "max_steps": 2,
    "prompts_per_step": 3,
    "num_generations": 4,
    "max_completion_length": 6,
    "eval_tasks": 4,
    "learning_rate": 1e-2,
    "seed": 1,  # rewards differ within the groups of every step
}
NO_PROBE = {"probe_tasks": 0}


def policy(seed=0, **overrides):
    return HFPolicy(tiny_model(seed, **overrides), tiny_tokenizer())


def sdpo(env=None, run_dir=None, model=None, **config):
    return SDPOTrainer(
        model or policy(),
        env or CountA(),
        SDPOConfig(**{**SMALL, **NO_PROBE, **config}),
        run_dir=run_dir,
    )


def grpo(env=None, run_dir=None, model=None, **config):
    return GRPOTrainer(
        model or policy(), env or CountA(), GRPOConfig(**{**SMALL, **config}), run_dir=run_dir
    )


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.learner.model.named_parameters()}


def moved(before, trainer):
    return any(not torch.equal(before[n], p) for n, p in trainer.learner.model.named_parameters())


# --- learning -------------------------------------------------------------------------------


def test_grpo_raises_the_reward():
    history = grpo(max_steps=12, prompts_per_step=4, num_generations=8).train().history
    assert history[-1]["eval/reward"] > history[0]["eval/reward"] + 0.2


@pytest.mark.parametrize(
    ("alpha", "teacher"),
    [
        pytest.param(alpha, teacher, marks=[] if i == j else [pytest.mark.slow])
        for i, alpha in enumerate((0.0, 0.5, 1.0))
        for j, teacher in enumerate(("frozen", "ema", "trust_region"))
    ],
)
def test_sdpo_moves_the_student_to_its_teacher(alpha, teacher):
    trainer = sdpo(
        max_steps=8,
        distillation_alpha=alpha,
        distillation_topk=0,
        teacher_regularization=teacher,
    )
    history = trainer.train().history
    kl = [line["self_distillation/teacher_student_kl"] for line in history[1:]]
    assert kl[-1] < 0.7 * kl[0]
    assert all(line["self_distillation/reprompt_sample_fraction"] == 1 for line in history[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"distillation_topk": 5},
        {"distillation_topk": 5, "distillation_add_tail": False},
        {"distillation_level": "token"},
        {"distillation_level": "sequence", "num_iterations": 2},
        {"distillation_advantage_clip": 0.5, "distillation_topk": 5},
        {"distillation_weight": 0.5},
        {"distillation_weight": 0.0},
        {"route_to_grpo": True, "teacher_entropy_beta": 1.0},
        {"baseline": "control"},
        {"probe_tasks": 3},
        {"rollout_is": "sequence_mask"},
        {"rollout_is": "token_mask"},
        {"rollout_is": "none"},
        {"teacher_regularization": "live"},
        {"num_iterations": 2, "mini_batch_prompts": 1},
        {"loss_aggregation": "token_mean", "distillation_kl_clip": 1.0},
        {"lora_r": 4},
        {"temperature": 0.7},
        {"gradient_checkpointing": True},
    ],
)
def test_sdpo_switches_train(config):
    trainer = sdpo(**config)
    before = weights(trainer)
    history = trainer.train().history
    assert moved(before, trainer)
    assert all(math.isfinite(v) for line in history for v in line.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_type": "bnpo", "scale_rewards": "batch"},
        {"importance_sampling_level": "sequence", "num_iterations": 2, "epsilon_high": 0.28},
        {"mini_batch_prompts": 1, "delta": 3.0},
        {"mask_truncated_completions": True, "max_completion_length": 60},
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"rollout_is": "sequence_truncate", "num_iterations": 2},
        {"lora_r": 4, "lora_target_modules": ["q_proj"]},
    ],
)
def test_grpo_switches_train(config):
    trainer = grpo(**config)
    before = weights(trainer)
    history = trainer.train().history
    assert moved(before, trainer)
    assert all(math.isfinite(v) for line in history for v in line.values())


def test_lora_trains_the_adapter_alone():
    trainer = sdpo(lora_r=4)
    before = weights(trainer)
    trainer.train()
    for name, parameter in trainer.learner.model.named_parameters():
        changed = not torch.equal(before[name], parameter)
        assert changed == ("lora_B" in name or "lora_A" in name), name


# --- exactness ------------------------------------------------------------------------------


def gradients(cls, config, micro):
    """The gradient of one update, with the forward split into pieces of ``micro`` tokens."""
    model = HFPolicy(tiny_model().double(), tiny_tokenizer())
    trainer = cls(
        model,
        CountA(),
        cls.config_class(**{**SMALL, "micro_batch_tokens": micro, **config}),
    )
    caught = {}
    take = trainer.learner.optimizer_step

    def spy():
        caught.update(
            {
                n: p.grad.clone()
                for n, p in trainer.learner.model.named_parameters()
                if p.grad is not None
            }
        )
        take()

    trainer.learner.optimizer_step = spy
    trainer.learner.step = 1
    rollouts = trainer.source.next()
    trainer.improve(trainer.prepare(rollouts))
    loss = trainer.learner._loss
    spy()
    return loss, caught


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (SDPOTrainer, {"loss_aggregation": "sequence_mean_active"}),
        (SDPOTrainer, {"loss_aggregation": "token_mean", "distillation_alpha": 0.5}),
        (GRPOTrainer, {"loss_type": "grpo", "beta": 0.05}),
        (SDPOTrainer, {"distillation_weight": 0.3}),
        (SDPOTrainer, {"teacher_regularization": "trust_region", "loss_chunk_mb": 1}),
        *(
            pytest.param(cls, config, marks=pytest.mark.slow)
            for cls, config in [
                (SDPOTrainer, {}),
                (GRPOTrainer, {"loss_type": "dapo"}),
                (GRPOTrainer, {"loss_type": "dr_grpo"}),
                (GRPOTrainer, {"loss_type": "bnpo"}),
                (GRPOTrainer, {"importance_sampling_level": "sequence"}),
                (SDPOTrainer, {"distillation_level": "sequence"}),
                (SDPOTrainer, {"baseline": "control"}),
                (SDPOTrainer, {"rollout_is": "sequence_truncate"}),
            ]
        ),
    ],
)
def test_the_gradient_does_not_depend_on_the_micro_batches(cls, config):
    loss, whole = gradients(cls, config, 10_000)
    loss_of_pieces, pieces = gradients(cls, config, 1)
    assert loss == pytest.approx(loss_of_pieces, rel=1e-6, abs=1e-12)
    assert whole.keys() == pieces.keys()
    scale = max(g.abs().max() for g in whole.values())
    assert scale > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient / scale, pieces[name] / scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [sdpo, grpo])
def test_the_sampler_is_told_of_every_batch_that_was_learnt_from(make):
    trainer = make()
    versions = []
    for _ in range(3):
        rollouts = trainer.source.next()
        versions.append({r.weight_version for r in rollouts})
        trainer.learn(rollouts)
    assert versions == [{0}, {1}, {2}]
    again = make()
    again.load_state_dict(trainer.state_dict())
    assert {r.weight_version for r in again.source.next()} == {3}  # as if it had gone on


def test_the_same_seed_gives_the_same_run():
    first, second = sdpo().train().history, sdpo().train().history
    third = sdpo(seed=2).train().history

    def curve(history):
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in history]

    assert curve(first) == curve(second)
    assert curve(first) != curve(third)


def test_sampled_and_recomputed_logprobs_agree():
    history = sdpo().train().history
    for line in history[1:]:
        assert line["sampling/sampling_logp_difference/max"] < 1e-4


def test_inactive_rows_shrink_the_step_unless_told_otherwise():
    """Half the rows have no feedback: the official mean counts them, `_active` does not."""

    class Half(CountA):
        def grade(self, task, completion):
            talks = int(task.id.split("-")[1]) % 2 == 0
            return Outcome(0.0, Feedback.of("hint", "Say a.") if talks else Feedback())

    def loss(mode):
        trainer = SDPOTrainer(
            policy(),
            Half(),
            SDPOConfig(**{**SMALL, "prompts_per_step": 12, "loss_aggregation": mode}),
        )
        trainer.learner.step = 1
        trainer.improve(trainer.prepare(trainer.source.next()))
        return trainer.learner._loss

    assert loss("sequence_mean_active") == pytest.approx(2 * loss("sequence_mean"), rel=1e-5)


def test_bf16_weights_take_small_steps_through_fp32_masters():
    model = tiny_model().to(torch.bfloat16)
    model.requires_grad_(True)
    optimizer = MasterAdamW(model, SDPOConfig(weight_decay=0.0))
    name, parameter = next(iter(optimizer.parameters.items()))
    start = parameter.detach().float().clone()
    for _ in range(200):
        parameter.grad = torch.ones_like(parameter)
        optimizer.clip(1e9)
        optimizer.step(1e-5)
        optimizer.zero_grad()
    drop = (start - optimizer.masters[name]).mean().item()
    assert drop == pytest.approx(200 * 1e-5, rel=0.05)
    assert parameter.dtype == torch.bfloat16
    assert (start - parameter.float()).mean().item() == pytest.approx(drop, rel=0.2)


def test_a_second_trainer_of_the_same_bf16_model_gets_its_gradients():
    model = HFPolicy(tiny_model().to(torch.bfloat16), tiny_tokenizer())
    grpo(model=model, max_steps=1).train()
    second = sdpo(model=model, max_steps=1)
    before = weights(second)
    history = second.train().history
    assert history[1]["grad_norm"] > 0
    assert moved(before, second)


def test_an_adapter_of_another_rank_is_refused():
    model = policy()
    sdpo(model=model, lora_r=2, max_steps=1)
    with pytest.raises(rlrf.UsageError, match=r"lora_r is 4, .* whose is 2"):
        sdpo(model=model, lora_r=4)


def test_checkpointing_drops_nothing_even_in_layers_that_drop_by_themselves():
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=272,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.5,
        attention_dropout=0.5,
    )
    trainer = sdpo(
        model=HFPolicy(tiny_model(config=config), tiny_tokenizer()), gradient_checkpointing=True
    )
    rollouts = trainer.source.sample(trainer.source.tasks[:2])
    batch = Batch([Sample(r) for r in rollouts], trainer.learner.device)
    one, two = (trainer.learner.hidden(batch.prompts, batch.layout) for _ in range(2))
    assert one.requires_grad
    assert torch.equal(one, two)


# --- the teacher ----------------------------------------------------------------------------


def test_ema_takes_the_rate_of_the_new_weights_in_fp32():
    model = torch.nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    teacher = Teacher(model, "ema", rate=0.01)
    start = teacher.weights["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    teacher.update()
    assert teacher.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(
        teacher.weights["weight"], 0.99 * start + 0.01 * model.weight.float()
    )


def test_each_teacher_uses_its_own_weights_and_leaves_the_students_alone():
    def after_a_move(kind, rate=0.25):
        model = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        teacher = Teacher(model, kind, rate)
        with torch.no_grad():
            model.weight.fill_(2.0)
        teacher.update()
        seen = teacher.read([lambda: model(torch.ones(1, 1))], Head(None))[0](slice(0, 1))
        assert model.weight.item() == 2.0
        return seen.item()

    assert after_a_move("live") == 2.0
    assert after_a_move("frozen") == 1.0
    assert after_a_move("ema") == pytest.approx(1.25)
    assert after_a_move("trust_region") == pytest.approx(1.25)


def bf16():
    return HFPolicy(tiny_model().to(torch.bfloat16), tiny_tokenizer())


@pytest.mark.parametrize("kind", ["teacher", "reference"])
def test_an_average_of_bf16_weights_follows_their_fp32_masters(kind):
    """Steps of 1e-5 seldom change a bf16 weight: an average of those would stand still."""
    small = {"learning_rate": 1e-5, "max_steps": 1}
    if kind == "teacher":
        trainer = sdpo(model=bf16(), teacher_update_rate=0.25, **small)
        average = trainer.teacher
    else:
        synced = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}
        trainer = grpo(model=bf16(), ref_model_mixup_alpha=0.25, **synced, **small)
        average = trainer.reference
    start = {n: w.clone() for n, w in average.weights.items()}
    trainer.train()
    masters = trainer.learner.optimizer.masters
    for name, weight in average.weights.items():
        expected = 0.75 * start[name] + 0.25 * masters[name]
        torch.testing.assert_close(weight, expected, atol=0, rtol=1e-6)
    model = dict(trainer.learner.model.named_parameters())
    assert any(not torch.equal(model[n].float(), w) for n, w in masters.items())


def test_the_ema_moves_once_per_generation_batch(monkeypatch):
    trainer = sdpo(num_iterations=2, mini_batch_prompts=1)
    calls = []
    update = trainer.teacher.update
    monkeypatch.setattr(trainer.teacher, "update", lambda w=None: (calls.append(1), update(w)))
    trainer.train()
    assert len(calls) == SMALL["max_steps"]


# --- when things go wrong -------------------------------------------------------------------


def test_all_fail_groups_without_feedback_warn_and_change_nothing(tmp_path):
    for make in (sdpo, grpo):
        trainer = make(Mute(feedback="none"), run_dir=tmp_path / make.__name__, max_steps=5)
        before = weights(trainer)
        with pytest.warns(RuntimeWarning, match="are all equal|teacher prompt"):
            history = trainer.train().history
        assert not moved(before, trainer)
        assert len(history) == 5 + 1
        events = (tmp_path / make.__name__ / "events.jsonl").read_text()
        assert "warning" in events


def test_unscored_rollouts_never_count_as_zero(tmp_path):
    class Flaky(CountA):
        def grade(self, task, completion):
            if int(task.id.split("-")[1]) % 2:
                raise InfraError("the sandbox died", kind="sandbox_died", retryable=False)
            return Outcome(1.0)

    trainer = grpo(Flaky(), prompts_per_step=12, max_steps=1)
    with pytest.warns(RuntimeWarning, match="sandbox_died"):
        history = trainer.train().history
    assert history[1]["reward"] == 1.0
    assert history[1]["unscored_fraction"] == pytest.approx(0.5)
    assert history[0]["eval/reward"] == 1.0
    assert 0 < history[0]["eval/unscored_fraction"] < 1


def test_a_held_out_rollout_that_is_unscored_is_told_of():
    class NoEval(CountA):
        def grade(self, task, completion):
            if task.id.startswith("eval"):
                raise InfraError("the judge is down", kind="judge_unavailable", retryable=False)
            return super().grade(task, completion)

    with pytest.warns(RuntimeWarning, match=r"4 of 4 held-out .* step 0 .*the judge is down"):
        history = sdpo(NoEval(), max_steps=1).train().history
    assert history[0]["eval/unscored_fraction"] == 1.0
    assert "eval/pass_rate" not in history[0]


def test_a_run_in_which_nothing_could_be_scored_goes_to_its_end_and_fails(tmp_path):
    class Dead(CountA):
        def grade(self, task, completion):
            raise InfraError("no sandbox", kind="sandbox_died", retryable=False)

    for make in (sdpo, grpo):
        trainer = make(Dead(), tmp_path / make.__name__)
        before = weights(trainer)
        with (
            pytest.warns(RuntimeWarning, match="no sandbox"),
            pytest.raises(RlrfError, match="no rollout of all 2 steps"),
        ):
            trainer.train()
        assert not moved(before, trainer)
        assert trainer.loop.run.status == "failed"


def test_a_nan_loss_stops_before_it_reaches_a_weight(tmp_path, monkeypatch):
    trainer = sdpo(run_dir=tmp_path / "run")
    before = weights(trainer)
    import rlrf_trainers.algorithms.sdpo as module

    monkeypatch.setattr(
        module, "importance_weights", lambda logps, *_, **__: logps.detach() * float("nan")
    )
    with pytest.raises(RlrfError, match="loss of step 1 is nan"):
        trainer.train()
    assert not moved(before, trainer)
    run = tmp_path / "run"
    assert (run / "model" / "config.json").exists()
    assert "nan" in (run / "events.jsonl").read_text()
    assert len((run / "rollouts.jsonl").read_text().splitlines()) > 0
    assert "failed" in (run / "status.json").read_text()


def test_a_gradient_that_is_not_finite_skips_the_step():
    trainer = sdpo(max_steps=1)
    before = weights(trainer)
    backward = trainer.learner.backward

    def poison(loss):
        backward(loss)
        next(p for p in trainer.learner.model.parameters()).grad.fill_(float("inf"))

    trainer.learner.backward = poison
    trainer.teacher.weights = {n: w + 1 for n, w in trainer.teacher.weights.items()}
    teacher = {n: w.clone() for n, w in trainer.teacher.weights.items()}
    with pytest.warns(RuntimeWarning, match="grad_norm is inf"):
        trainer.train()
    assert not moved(before, trainer)
    # nor does the teacher follow a student that did not move
    assert all(torch.equal(teacher[n], w) for n, w in trainer.teacher.weights.items())


def test_an_empty_task_set_is_an_error_before_anything_runs():
    class Empty(CountA):
        def load_tasks(self, split):
            return []

    with pytest.raises(rlrf.UsageError, match="no task in split 'train'"):
        sdpo(Empty())


def test_a_prompt_longer_than_the_context_is_left_out_with_a_warning():
    class OneLong(CountA):
        def load_tasks(self, split):
            return [Task(f"{split}-{i}", "x" * (4000 if i == 0 else 3)) for i in range(4)]

    trainer = grpo(OneLong(), prompts_per_step=4, max_steps=1)
    with pytest.warns((RuntimeWarning, UserWarning), match="context"):
        history = trainer.train().history
    assert history[1]["unscored_fraction"] == pytest.approx(0.25)


def test_a_model_without_a_chat_template_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(rlrf.UsageError, match="chat template"):
        SDPOTrainer(HFPolicy(tiny_model(), tokenizer), CountA(), SDPOConfig(**SMALL)).train()


# --- the record -----------------------------------------------------------------------------


def test_the_run_directory_tells_everything(tmp_path):
    lines = []
    trainer = SDPOTrainer(
        policy(), CountA(), SDPOConfig(**SMALL), run_dir=tmp_path / "run", on_step=lines.append
    )
    result = trainer.train()
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert result.history == lines
    assert set(lines[0]) >= {"eval/pass_rate", "eval/reward"}
    assert "loss" not in lines[0]
    assert "eval/pass_rate" in lines[-1]
    records = [
        json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    ]
    train = [r for r in records if r["split"] == "train"]
    assert len(train) == 2 * 3 * 4
    assert len([r for r in records if r["split"] == "eval"]) == 2 * 4
    first = train[0]
    assert "Say a." in first["teacher_prompt"]
    assert len(first["token_kl"]) == len(first["tokens"]) == len(first["completion_ids"])
    assert sum(map(bool, first["token_kl"])) > 0
    # the model can be loaded again
    loaded = HFPolicy(str(result.model_dir))
    prompt = rlrf.Prompt((rlrf.user("hi"),))
    params = rlrf.SamplingParams(max_tokens=4, seed=0)
    assert (
        loaded.generate([prompt], params)[0].token_ids
        == trainer.learner.policy.generate([prompt], params)[0].token_ids
    )


@pytest.mark.slow
def test_a_trained_adapter_can_be_loaded_for_evaluation(tmp_path):
    save_tiny(tmp_path / "base")
    trainer = SDPOTrainer(
        str(tmp_path / "base"), CountA(), SDPOConfig(**SMALL, lora_r=4), run_dir=tmp_path / "run"
    )
    result = trainer.train()
    prompt = rlrf.Prompt((rlrf.user("Say 1."),))
    params = rlrf.SamplingParams(max_tokens=6, temperature=0)

    def reply(policy):
        return policy.generate([prompt], params)[0].token_ids

    loaded = HFPolicy(str(result.model_dir))
    assert reply(loaded) == reply(trainer.learner.policy)
    scores = [
        p.score([[1, 2, 3]], [[4, 5]])[0].logprobs
        for p in (loaded, HFPolicy(str(tmp_path / "base")))
    ]
    assert scores[0] != pytest.approx(scores[1], abs=1e-4)


def test_make_trainer_takes_ids_and_mappings(tmp_path):
    trainer = rlrf.make_trainer(
        "grpo", model=policy(), env=CountA(), config={"max_steps": 1, "num_generations": 2}
    )
    assert isinstance(trainer, GRPOTrainer)
    assert isinstance(trainer, rlrf.Trainer)
    with pytest.raises(rlrf.ConfigError, match="num_generations"):
        rlrf.make_trainer("grpo", model=policy(), env=CountA(), config={"num_generation": 2})
    with pytest.raises(rlrf.ConfigError, match="at least 2"):
        rlrf.make_trainer("grpo", model=policy(), env=CountA(), config={"num_generations": 1})
    with pytest.raises(rlrf.UnknownIdError, match="sdpo"):
        rlrf.make_trainer("sdop", model=policy(), env=CountA())


def test_schedules():
    trainer = sdpo(max_steps=10, lr_scheduler_type="linear", warmup_steps=2, learning_rate=1.0)
    rates = []
    for trainer.learner.step in range(1, 11):
        rates.append(trainer.learner.learning_rate())
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert rates[-1] > 0


class Tennis(rlrf.MultiTurnEnv):
    """Two turns, feedback on each."""

    def load_tasks(self, split):
        return [Task(f"{split}-{i}", f"Serve {i}.") for i in range(6)]

    def start(self, task):
        return []

    def respond(self, state, action):
        state.append(action)
        last = len(state) == 2
        return rlrf.Turn(
            "Again." if not last else (),
            0.0,
            Feedback.of("hint", f"turn {len(state)}: say a"),
            terminated=last,
        )


def test_multi_turn_rollouts_train_on_sampled_tokens_only(tmp_path):
    trainer = sdpo(Tennis(), run_dir=tmp_path / "run", max_steps=1)
    trainer.train()
    records = [
        json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    ]
    record = next(r for r in records if r["split"] == "train")
    assert 0 in record["completion_mask"]
    kl = record["token_kl"]
    assert [v is not None for v in kl] == [bool(m) for m in record["completion_mask"]]
    assert "turn 1" in record["teacher_prompt"]
    assert "turn 2" in record["teacher_prompt"]


@pytest.mark.parametrize("modules", [["nope"], ["q_proj", "nope"], []])
def test_modules_for_lora_that_the_model_does_not_have_are_named(modules):
    # peft itself passes over the wrong name in the second list.
    config = SDPOConfig(lora_r=2, lora_target_modules=modules)
    with pytest.raises(UsageError, match=r"linear layers are .*q_proj"):
        trainable(tiny_model(), config)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("lm_head", "one matrix"),
        ("embed_tokens", "one matrix"),
        ("input_layernorm", "cannot be adapted"),
    ],
)
def test_modules_that_an_adapter_cannot_be_merged_into_are_refused(module, message):
    config = SDPOConfig(lora_r=2, lora_target_modules=["q_proj", module])
    with pytest.raises(UsageError, match=message):
        trainable(tiny_model(), config)
    if module == "lm_head":
        trainable(tiny_model(tie_word_embeddings=False), config)


def test_an_evaluation_on_what_is_trained_on_is_told_of():
    class OneSplit(CountA):
        splits = ("train",)

    with pytest.warns(RuntimeWarning, match="12 of the 12 tasks of the evaluation are trained on"):
        sdpo(OneSplit(), max_steps=1).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tasks of the evaluation.*")
        sdpo(max_steps=1).train()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", math.inf),
        ("success_reward_threshold", math.nan),
        ("weight_decay", math.inf),
        ("feedback_kinds", []),
        ("metric_for_best_model", "reward"),
        ("seed", -1),
    ],
)
def test_values_that_would_train_nonsense_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        SDPOConfig(**{key: value})
    SDPOConfig(max_grad_norm=math.inf)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_feedback_for_which_there_is_no_room_is_not_counted_as_used():
    with pytest.raises(UsageError, match="max_reprompt_len=1 leaves no room for a hint"):
        sdpo(max_reprompt_len=1)  # none at all
    trainer = sdpo(max_steps=1)
    trainer.reprompter.config = trainer.config.model_copy(update={"max_reprompt_len": 1})
    line = trainer.train().history[1]
    assert line["self_distillation/feedback_available_fraction"] > 0
    assert line["self_distillation/feedback_used_fraction"] == 0
    assert line["self_distillation/reprompt_sample_fraction"] == 0


# --- knobs that reach what they are about -----------------------------------------------------

from collections import Counter  # noqa: E402

from tests.by_hand import (  # noqa: E402
    apart,
    assert_near,
    double_policy,
    model_parameters,
    with_weights,
)
from tests.by_hand import gradient as gradient_in  # noqa: E402


def adamw_by_hand(parameters, gradients, **knobs):
    """Two steps with torch's own optimizer, each on a gradient that is no longer than allowed."""
    # The defaults that docs/sdpo.md tells of.
    made = {"max_grad_norm": 1.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.01}
    made |= {"learning_rate": SMALL["learning_rate"], **knobs}
    tensors = [p.detach().clone().requires_grad_() for p in parameters]
    adamw = torch.optim.AdamW(
        tensors,
        lr=made["learning_rate"],
        betas=(made["adam_beta1"], made["adam_beta2"]),
        weight_decay=made["weight_decay"],
    )
    for parts in gradients:
        norm = torch.cat([g.flatten() for g in parts]).norm()
        for tensor, g in zip(tensors, parts, strict=True):
            tensor.grad = g * min(1.0, made["max_grad_norm"] / norm.item())
        adamw.step()
    return torch.cat([t.detach().flatten() for t in tensors])


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"max_grad_norm": 0.05},
        {"max_grad_norm": 3.0},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.3},
        {"weight_decay": 0.5},
        {"learning_rate": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [sdpo, grpo])
def test_two_steps_are_those_of_adamw_on_clipped_gradients(make, knobs):
    trainer = make(model=double_policy(), **knobs)
    parameters, gradients = model_parameters(trainer.learner.model), []
    generator = torch.Generator().manual_seed(0)
    for norm in (5.0, 0.5):  # one above the default's limit, one below
        parts = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        whole = torch.cat([g.flatten() for g in parts]).norm()
        gradients.append([g * norm / whole for g in parts])
    expected = adamw_by_hand(parameters, gradients, **knobs)
    if knobs:
        assert apart(expected, adamw_by_hand(parameters, gradients))
    for parts in gradients:
        for parameter, g in zip(parameters, parts, strict=True):
            parameter.grad = g.clone()
        trainer.learner.step += 1
        trainer.learner.optimizer_step()
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)
    # What is told of is the gradient as it was.
    assert [norm for norm, _ in trainer.learner.record.metrics["grad_norm"]] == pytest.approx(
        [5.0, 0.5]
    )


@pytest.mark.parametrize(("alpha", "scale"), [(0, 2.0), (3, 1.5), (8, 4.0)])
def test_an_adapter_is_added_alpha_over_r_times(alpha, scale):
    model = grpo(model=double_policy(), lora_r=2, lora_alpha=alpha).learner.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model_parameters(model):  # a fresh adapter adds nothing
            p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        ids = torch.tensor([[5, 6, 7, 8]])
        adapter = {n: p for n, p in model.named_parameters() if p.requires_grad}
        expected = with_weights(adapter, lora_scale=scale)(ids).logits
        assert apart(expected, with_weights({})(ids).logits)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("make", [sdpo, grpo])
def test_checkpointing_runs_layers_again_and_changes_no_gradient(make, lora_r):
    rollouts, found, again = None, {}, {}
    for checkpointing in (False, True):
        trainer = make(model=double_policy(), gradient_checkpointing=checkpointing, lora_r=lora_r)
        learner = trainer.learner
        rollouts = rollouts or trainer.source.next()
        calls, backward = [], learner.backward

        def spied(loss, model=learner.model, calls=calls, backward=backward):
            layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
            hook = layer.register_forward_pre_hook(lambda *_: calls.append(1))
            backward(loss)
            hook.remove()

        learner.backward = spied
        trainer.improve(trainer.prepare(rollouts))
        found[checkpointing], again[checkpointing] = gradient_in(learner.model), len(calls)
    assert again[False] == 0
    assert again[True] > 0
    assert_near(found[True], found[False])


@pytest.mark.parametrize(
    ("make", "config"),
    [(sdpo, {}), (sdpo, {"distillation_level": "token"}), (grpo, {"beta": 0.1})],
    ids=["sdpo", "sdpo-token", "grpo"],
)
def test_a_chunk_of_the_loss_holds_no_more_than_it_may(monkeypatch, make, config):
    rollouts, logits = None, Head.logits
    # Six buffers of 4 bytes for each of 272 words.
    for megabytes, most, least in ((1, 160, 1), (256, math.inf, 161)):
        trainer = make(
            **config,
            loss_chunk_mb=megabytes,
            num_iterations=2,
            num_generations=8,
            max_completion_length=12,
            micro_batch_tokens=100_000,
        )
        rollouts, rows = rollouts or trainer.source.next(), []
        assert sum(len(r.completion_ids) for r in rollouts) > 161
        monkeypatch.setattr(
            Head,
            "logits",
            lambda self, hidden, rows=rows: (rows.append(len(hidden)), logits(self, hidden))[1],
        )
        trainer.learner.step = 1
        trainer.learn(rollouts)
        monkeypatch.undo()
        assert least <= min(rows) <= max(rows) <= most


# --- how is sampled ---------------------------------------------------------------------------


def asked_of(trainer, do):
    """``(temperature, top_p, top_k, max_tokens)`` of what a policy is asked for, and how much."""
    policy, asked = trainer.learner.policy, Counter()
    generate = policy.generate

    def spied(prompts, params):
        how = (params.temperature, params.top_p, params.top_k, params.max_tokens)
        asked[how] += len(prompts)
        return generate(prompts, params)

    policy.generate = spied
    do()
    return dict(asked)


@pytest.mark.parametrize("make", [sdpo, grpo])
@pytest.mark.parametrize(
    ("knobs", "how"),
    [
        ({}, (1.0, 1.0, 0, 6)),
        ({"temperature": 0.7}, (0.7, 1.0, 0, 6)),
        ({"top_p": 0.8}, (1.0, 0.8, 0, 6)),
        ({"top_k": 5}, (1.0, 1.0, 5, 6)),
        ({"max_completion_length": 3}, (1.0, 1.0, 0, 3)),
        ({"num_generations": 2, "prompts_per_step": 2}, (1.0, 1.0, 0, 6)),
    ],
    ids=str,
)
def test_training_samples_as_it_is_told(make, knobs, how):
    trainer = make(eval_temperature=0.1, eval_top_p=0.2, **knobs)
    c = {**SMALL, **knobs}
    asked = asked_of(trainer, trainer.source.next)
    assert asked == {how: c["prompts_per_step"] * c["num_generations"]}


@pytest.mark.parametrize(
    ("knobs", "how", "n"),
    [
        ({}, (0.6, 0.95, 0, 6), 4),
        ({"eval_temperature": 0.0}, (0.0, 0.95, 0, 6), 4),
        ({"eval_top_p": 0.5}, (0.6, 0.5, 0, 6), 4),
        ({"eval_samples": 3, "eval_tasks": 2}, (0.6, 0.95, 0, 6), 6),
        ({"eval_tasks": 0, "max_completion_length": 3}, (0.6, 0.95, 0, 3), 12),
    ],
    ids=str,
)
def test_evaluation_samples_as_it_is_told(knobs, how, n):
    trainer = grpo(temperature=1.5, top_p=0.7, top_k=7, **knobs)
    assert asked_of(trainer, trainer.loop.evaluation.if_due) == {how: n}
    assert len(trainer.learner.record.metrics["eval/reward"]) == n


class Graded(CountA):
    """Keeps the tasks that are graded."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.graded = Counter()

    def grade(self, task, completion):
        self.graded[task.id] += 1
        return super().grade(task, completion)


class WithoutEval(Graded):
    splits = ("train", "test")


@pytest.mark.filterwarnings("ignore:.*are trained on:RuntimeWarning")
@pytest.mark.parametrize(
    ("env", "eval_env", "split"),
    [
        (Graded, None, "eval"),
        (lambda: Graded(split="eval"), None, "eval"),
        (WithoutEval, None, "train"),  # there is no other that is known to be held out
        (lambda: WithoutEval(split="test"), None, "test"),
        (Graded, lambda: WithoutEval(split="test"), "test"),
        (Graded, Graded, "train"),  # as it is given
        (Graded, lambda: Graded(split="eval"), "eval"),
    ],
)
def test_evaluation_is_on_held_out_tasks_or_on_the_environment_for_it(env, eval_env, split):
    env, eval_env = env(), eval_env and eval_env()
    config = GRPOConfig(**{**SMALL, "eval_samples": 2})
    trainer = GRPOTrainer(policy(), env, config, eval_env=eval_env)
    trainer.loop.evaluation.if_due()
    graded = (eval_env or env).graded
    assert len(graded) == SMALL["eval_tasks"]
    assert set(graded.values()) == {2}
    assert {name.partition("-")[0] for name in graded} == {split}
    if eval_env is not None:
        assert not env.graded


@pytest.mark.parametrize("make", [sdpo, grpo])
def test_episodes_get_the_deadline_and_the_company_they_are_given(monkeypatch, make):
    rollout, given = rlrf.rollout, []
    monkeypatch.setattr(rlrf, "rollout", lambda *a, **k: (given.append(k), rollout(*a, **k))[1])
    trainer = make(rollout_deadline_s=7.5, max_concurrency=3)
    trainer.source.next()
    trainer.loop.evaluation.if_due()
    assert [k["deadline_s"] for k in given] == [7.5, 7.5]
    assert [k["max_concurrency"] for k in given] == [3, 3]


def test_every_seed_is_evaluated_on_the_same_tasks():
    drawn = []
    for seed in (0, 1, 2):
        env = Graded()
        grpo(env, seed=seed).loop.evaluation.if_due()
        drawn.append(set(env.graded))
    assert drawn[0] == drawn[1] == drawn[2]


def test_the_probe_samples_as_training_does():
    trainer = sdpo(Mumbling(), temperature=0.7, top_p=0.8, top_k=5, probe_tasks=2)
    asked = asked_of(trainer, trainer.before_training)
    assert list(asked) == [(0.7, 0.8, 5, 6)]
    assert asked[0.7, 0.8, 5, 6] == 2 * 4 + 2 * 4  # each attempt failed and is tried again


class Mumbling(CountA):
    """Nothing is right."""

    def grade(self, task, completion):
        return Outcome(0.0, Feedback.of("wrong_answer", "Say a."))


@pytest.mark.parametrize("on_start", [True, False])
def test_the_evaluation_before_training_can_be_left_out(on_start):
    history = sdpo(eval_on_start=on_start, max_steps=1).train().history
    assert ("eval/pass_rate" in history[0]) is on_start
    assert "eval/pass_rate" in history[1]
