"""Nothing is chosen from noise, and nothing is begun that cannot work."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from rlrf import Feedback, InfraError, Outcome, Task, UsageError, assistant, system, user  # noqa: E402
from rlrf.runs import Run  # noqa: E402
from rlrf.wrappers import DropFeedback  # noqa: E402
from rlrf_trainers.algorithms.grpo import GRPOTrainer  # noqa: E402
from rlrf_trainers.algorithms.sdpo import SDPOTrainer  # noqa: E402
from rlrf_trainers.commands.export import export_model  # noqa: E402
from rlrf_trainers.config import GRPOConfig, SDPOConfig  # noqa: E402
from rlrf_trainers.core import preflight  # noqa: E402
from rlrf_trainers.core.optimizer import MasterAdamW  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.model.distributed import World  # noqa: E402
from tests.test_resume import with_evaluations  # noqa: E402
from tests.test_trainers import NO_PROBE, SMALL, CountA, grpo, policy, sdpo  # noqa: E402
from tests.tiny_model import save_tiny, tiny_model, tiny_tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
KEPT = {"eval_steps": 1, "load_best_model_at_end": True}


# --- which evaluation is the best ---------------------------------------------------------------


class Still(CountA):
    """Teaches GRPO nothing, so the policy stays as it is; held-out rewards differ by the reply."""

    splits = ("train", "eval")

    def grade(self, task, completion):
        return Outcome(0.7) if task.id.startswith("train") else super().grade(task, completion)


def test_a_model_that_does_not_move_fares_the_same_at_every_evaluation(tmp_path):
    trainer = grpo(Still(), tmp_path / "run", max_steps=4, eval_samples=2, **KEPT)
    result = trainer.train()
    assert len({line["eval/reward"] for line in result.history}) == 1
    assert result.model_step == 0
    records = list(Run.open(tmp_path / "run").rollouts())
    said = [
        [r["completion_ids"] for r in records if r["step"] == step and r["split"] == "eval"]
        for step in range(5)
    ]
    assert all(of_step == said[0] for of_step in said)
    assert len({tuple(ids) for ids in said[0]}) > len(said[0]) / 2  # yet not one for all


def test_evaluations_do_not_depend_on_how_many_tasks_there_are_beside():
    found = []
    for tasks in (3, 8):
        trainer = grpo(eval_tasks=tasks)
        trainer.loop.evaluation.if_due()
        found.append(trainer.loop.evaluation._scores)
    few, many = found
    assert len(few) == 3
    assert few.items() <= many.items()


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_weights_before_the_first_step_may_be_the_best(lora_r, resumed, tmp_path):
    save_tiny(tmp_path / "model")

    def made(steps, **kwargs):
        config = GRPOConfig(
            **SMALL | KEPT | {"max_steps": steps, "lora_r": lora_r, "save_steps": 1}
        )
        model = str(tmp_path / "model")
        return GRPOTrainer(model, CountA(), config, run_dir=tmp_path / "run", **kwargs)

    if resumed:
        with_evaluations(made(1), [0.9, 0.2]).train()
        trainer = with_evaluations(made(3, resume=True), [0.9, 0.3])
    else:
        trainer = with_evaluations(made(2), [0.9, 0.2, 0.9])  # as good as the first is no better
    result = trainer.train()
    assert result.model_step == 0
    assert trainer.loop.evaluation.best == {"step": 0.0, "value": 0.9, "model_digest": ANY}
    if lora_r:
        left = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
        assert not any(t.any() for n, t in left.items() if "lora_B" in n)  # adds nothing
        assert any(t.any() for t in left.values())
        return
    left = load_file(tmp_path / "run" / "model" / "model.safetensors")
    given = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(given[n], t) for n, t in left.items())


class _Any:
    def __eq__(self, other):
        return True

    __hash__ = None


ANY: Any = _Any()


class Flaky(Still):
    """Cannot grade the hard half of the held-out tasks for a while."""

    broken = False

    def grade(self, task, completion):
        if task.id.startswith("train"):
            return Outcome(0.7)
        hard = int(task.id.rpartition("-")[2]) % 2
        if hard and self.broken:
            raise InfraError("gone", kind="sandbox_died", retryable=False)
        return Outcome(0.0 if hard else 1.0)


def test_an_evaluation_without_its_hard_tasks_is_no_better_one(tmp_path):
    env = Flaky()
    trainer = grpo(env, tmp_path / "run", max_steps=2, **KEPT | {"eval_tasks": 0})
    log_step = trainer.loop.log_step

    def then_break():
        line = log_step()
        env.broken = True
        return line

    trainer.loop.log_step = then_break
    result = trainer.train()
    assert [line["eval/reward"] for line in result.history] == [0.5, 1.0, 1.0]
    assert result.model_step == 0
    assert trainer.loop.evaluation.evaluations_since_best == 2


def test_means_that_rounding_sets_apart_are_no_choice():
    evaluation = grpo().loop.evaluation
    evaluation.best = {"step": 0.0, "value": 0.1}
    evaluation._best_scores = dict.fromkeys("abc", 0.1)
    evaluation._scores = dict.fromkeys("abc", 0.1 + 1e-17) | {"c": 0.30000000000000004 - 0.2}
    assert not evaluation._better(0.1 + 1e-16)
    evaluation._scores["a"] = 0.11
    assert evaluation._better(0.104)


def test_another_evaluation_is_not_compared_with_the_old_one(tmp_path):
    common = {"save_steps": 1, **KEPT}
    with_evaluations(grpo(run_dir=tmp_path / "run", max_steps=1, **common), [0.9, 0.1]).train()
    config = GRPOConfig(**SMALL | common | {"max_steps": 2, "eval_samples": 2})
    trainer = GRPOTrainer(policy(), CountA(), config, run_dir=tmp_path / "run", resume=True)
    assert with_evaluations(trainer, [0.2]).train().model_step == 2
    told = [e["message"] for e in Run.open(tmp_path / "run").events]
    assert any("the evaluation is another one than before" in message for message in told)


# --- as many processes as there are -------------------------------------------------------------


@dataclass(frozen=True)
class Pretended(World):
    """One of several processes, whose others say what it says."""

    said: dict[str, Any] = field(default_factory=dict)

    def gather(self, value):
        return [value] * self.size

    def broadcast(self, value):
        return value


def as_process(monkeypatch, rank, size):
    world = Pretended(rank, size, torch.device("cpu"))
    monkeypatch.setattr(World, "start", classmethod(lambda cls: world))


@pytest.mark.parametrize("demonstration", ["first", "random"])
def test_processes_sample_and_show_what_one_would(demonstration, monkeypatch):
    def found(rank, size):
        as_process(monkeypatch, rank, size)
        made = sdpo(
            model=HFPolicy(tiny_model().double(), tiny_tokenizer()),
            demonstration=demonstration,
            success_reward_threshold=0.0,  # every sibling may be shown
            prompts_per_step=5,
        )
        made.learner.step = 3
        rollouts = made.source.next()
        shown = {
            (t.rollout.group_id, t.rollout.sample): t.reprompt and t.reprompt.messages
            for t in made.prepare(rollouts)
        }
        made.learner.step = 0
        made.loop.evaluation.if_due()
        scores = made.loop.evaluation._scores
        return {(r.group_id, r.sample): r for r in rollouts}, shown, scores

    whole, hints, scores = found(0, 1)
    assert len(whole) == 5 * 4
    parts = [found(rank, 3) for rank in range(3)]
    assert sum(len(p[0]) for p in parts) == len(whole)
    assert {k: r.completion_ids for p in parts for k, r in p[0].items()} == {
        k: r.completion_ids for k, r in whole.items()
    }
    assert {k: v for p in parts for k, v in p[1].items()} == hints
    assert {k: v for p in parts for k, v in p[2].items()} == scores


def test_the_same_task_twice_in_a_batch_is_sampled_anew():
    source = grpo().source
    task = source.tasks[0]
    one, other = (
        [r.completion_ids for r in source.sample([task, task]) if r.group_id.startswith(n)]
        for n in "01"
    )
    assert len(one) == len(other) == 4
    assert one != other


class Differing(World):
    def gather(self, value):
        return [value, {**value, "tasks": '"another"', "more": "1"}]


def test_processes_that_were_not_started_alike_are_told_what_differs():
    world = Differing(0, 2, torch.device("cpu"))
    with pytest.raises(UsageError, match='tasks is "7" on process 0 and "another" on process 1'):
        preflight.check_alike(world, {"model": "m", "tasks": "7"})
    with pytest.raises(UsageError, match="more is missing on process 0"):
        preflight.check_alike(world, {"tasks": "another"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"env": lambda: Still()}, "env.id"),
        ({"env": lambda: CountA(feedback="located")}, "env.feedback"),
        ({"config": {"learning_rate": 3e-3}}, "trainer.learning_rate"),
        ({"env": lambda: alike(Fewer)}, "tasks"),
        ({"env": lambda: alike(Worded)}, "their prompts"),
        ({"model": lambda: HFPolicy(tiny_model(hidden_size=16), tiny_tokenizer())}, "weight is"),
    ],
    ids=["env", "feedback", "config", "tasks", "prompts", "model"],
)
def test_what_is_compared(change, told, monkeypatch):
    """The other process's word is recorded first, then put in the place of an echo."""
    said: list[Any] = []

    class Recording(Pretended):
        def gather(self, value):
            said.append(value)
            return [value] * self.size

    class Against(Pretended):
        def gather(self, value):
            return [said.pop(0), value]

    def make(cls, rank, env=CountA, config=(), model=policy):
        world = cls(rank, 2, torch.device("cpu"))
        monkeypatch.setattr(World, "start", classmethod(lambda _: world))
        return GRPOTrainer(model(), env(), GRPOConfig(**SMALL | dict(config)))

    make(Recording, 0)
    with pytest.raises(UsageError, match="not started alike: .*" + told):
        make(Against, 1, **change)


def test_evaluations_of_other_tasks_are_told(monkeypatch):
    said: list[Any] = []

    class Recording(Pretended):
        def gather(self, value):
            said.append(value)
            return [value] * self.size

    class Against(Pretended):
        def gather(self, value):
            return [said[0], value]

    loop = grpo().loop
    loop.world = Recording(0, 2, torch.device("cpu"))
    loop.check_evaluation()
    loop.world = Against(1, 2, torch.device("cpu"))
    loop.check_evaluation()
    loop.evaluation.env = alike(Worded)
    with pytest.raises(UsageError, match="not started alike: evaluation tasks is"):
        loop.check_evaluation()


def alike(cls):
    """An environment of the same name as the other process's."""
    return type("CountA", (cls,), {})()


class Fewer(CountA):
    def load_tasks(self, split):
        return super().load_tasks(split)[1:]


class Worded(CountA):
    def load_tasks(self, split):
        return [
            replace(t, messages=(user(f"Please say {t.id}."),)) for t in super().load_tasks(split)
        ]


# --- what is refused before anything is paid for -----------------------------------------------


class Asked(CountA):
    """Prompts of one's own, of the split that is asked for."""

    splits = ("train", "eval")

    def __init__(self, messages, only="train", **kwargs):
        super().__init__(**kwargs)
        self.given, self.only = messages, only

    def load_tasks(self, split):
        tasks = super().load_tasks(split)
        if split == self.only:
            tasks[7] = Task("odd", self.given)
        return tasks

    def grade(self, task, completion):
        raise AssertionError("a rollout was paid for")


ODD = [
    (user("Hi."), assistant("Hello.")),
    (user("Hi."), system("Be brief.")),
    (system("Be brief."),),
]


@pytest.mark.parametrize("messages", ODD)
@pytest.mark.parametrize("only", ["train", "eval"])
@pytest.mark.parametrize("make", [sdpo, grpo])
def test_a_prompt_with_nothing_to_answer_is_refused_at_the_start(make, only, messages):
    with pytest.raises(UsageError, match=r"1 of the \d+ tasks.* 'odd' is '(assistant|system)'"):
        make(Asked(messages, only), eval_tasks=0).train()


def test_a_tool_may_be_answered_but_cannot_be_reprompted():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = (
        user("Hi."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    )
    grpo(Asked(messages))
    with pytest.raises(UsageError, match="of the user: the last one of task 'odd' is 'tool'"):
        sdpo(Asked(messages))


def test_prompts_that_fill_the_context_are_refused_if_all_do():
    with pytest.raises(UsageError, match=r"no prompt leaves room.*context is 8"):
        grpo(model=policy(max_position_embeddings=8))
    short = policy(max_position_embeddings=40)
    long = Asked((user("x" * 200),))
    grpo(long, model=short)  # that one costs itself alone


def test_a_model_without_a_chat_template_is_refused():
    without = tiny_tokenizer()
    without.chat_template = None
    with pytest.raises(UsageError, match="chat template"):
        grpo(model=HFPolicy(tiny_model(), without))


@pytest.mark.parametrize("config", [{"num_generations": 1}, {"use_successful_as_teacher": False}])
def test_a_teacher_to_whom_nothing_can_be_said_is_refused(config):
    with pytest.raises(UsageError, match=r"says nothing \(feedback='none'\)"):
        sdpo(CountA(feedback="none"), **config)
    sdpo(CountA(), **config)


# --- what is trained ----------------------------------------------------------------------------


class Varied(CountA):
    """Rewards that differ within most groups."""

    def grade(self, task, completion):
        return Outcome(len(set(completion)) / 10, Feedback.of("hint", "Say more."))


def frozen_half(dtype=torch.float32):
    model = tiny_model(tie_word_embeddings=False).to(dtype)
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    return HFPolicy(model, tiny_tokenizer())


@pytest.mark.parametrize(
    ("cls", "checkpointing", "dtype"),
    [
        (SDPOTrainer, False, torch.float32),
        (GRPOTrainer, True, torch.bfloat16),
        *(
            pytest.param(cls, checkpointing, dtype, marks=pytest.mark.slow)
            for cls, checkpointing, dtype in (
                (SDPOTrainer, True, torch.float32),
                (SDPOTrainer, False, torch.bfloat16),
                (GRPOTrainer, False, torch.float32),
            )
        ),
    ],
)
def test_what_is_frozen_stays_frozen(cls, checkpointing, dtype, tmp_path):
    given = frozen_half(dtype)
    before = {n: p.detach().clone() for n, p in given.model.named_parameters()}
    frozen = {n for n, p in given.model.named_parameters() if not p.requires_grad}
    assert frozen
    extra = NO_PROBE if cls is SDPOTrainer else {"beta": 0.1}
    config = SMALL | extra | {"save_steps": 1, "gradient_checkpointing": checkpointing}
    trainer = cls(given, Varied(), cls.config_class(**config), run_dir=tmp_path / "run")
    trainer.train()
    for name, parameter in trainer.learner.model.named_parameters():
        assert parameter.requires_grad == (name not in frozen)
        assert name not in frozen or torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in trainer.learner.model.named_parameters())
    state = trainer.state_dict()
    assert not frozen & state.part("master").keys()
    assert set(trainer.learner.optimizer.masters) == before.keys() - frozen

    resumed = cls(
        frozen_half(dtype), CountA(), cls.config_class(**config | {"max_steps": 3}),
        run_dir=tmp_path / "run", resume=True,
    )  # fmt: skip
    assert resumed.train().history[-1]["step"] == 3


def test_freezing_more_or_less_than_before_is_no_resumption(tmp_path):
    config = {"save_steps": 1, "max_steps": 1}
    grpo(run_dir=tmp_path / "run", **config).train()
    made = GRPOConfig(**SMALL | config | {"max_steps": 2})
    more = GRPOTrainer(
        HFPolicy(half := tiny_model(), tiny_tokenizer()), CountA(), made, run_dir=tmp_path / "run",
        resume=True,
    )  # fmt: skip
    assert half is more.learner.model
    other = tiny_model()
    other.model.layers[0].requires_grad_(False)
    frozen = GRPOTrainer(
        HFPolicy(other, tiny_tokenizer()), CountA(), made, run_dir=tmp_path / "run", resume=True
    )
    with pytest.raises(UsageError, match=r"not trained|frozen now"):
        frozen.train()


def test_a_model_that_is_frozen_altogether_is_refused():
    given = policy()
    given.model.requires_grad_(False)
    with pytest.raises(UsageError, match=r"nothing to train.*model.requires_grad_\(True\)"):
        grpo(model=given)
    assert grpo(model=given, lora_r=2).learner.optimizer.masters  # an adapter is another thing


def test_a_checkpoint_of_half_a_model_is_exported_whole(tmp_path):
    folder = save_tiny(tmp_path / "model")
    given = HFPolicy(str(folder))
    given.model.model.layers[0].requires_grad_(False)
    config = GRPOConfig(**SMALL | {"save_steps": 1, "max_steps": 1})
    GRPOTrainer(given, CountA(), config, run_dir=tmp_path / "run").train()
    out = export_model(tmp_path / "run", tmp_path / "out", checkpoint="1")
    expected = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(expected[n], t) for n, t in load_file(out / "model.safetensors").items())
    save_tiny(folder, seed=5)
    with pytest.raises(UsageError, match="not the one the run began with"):
        export_model(tmp_path / "run", tmp_path / "other", checkpoint="1")


# --- which model it is ------------------------------------------------------------------------


def altered(folder, how):
    if how == "another":
        save_tiny(folder, seed=1)
        return
    if how == "template":
        file = folder / "chat_template.jinja"
        file.write_text(file.read_text().replace("assistant", "Assistant"))
        return
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] += 1e-3  # one number among thousands
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "lora_r"),
    [
        ("one number", 2),
        ("template", 0),
        pytest.param("another", 0, marks=pytest.mark.slow),
        pytest.param("another", 2, marks=pytest.mark.slow),
        pytest.param("one number", 0, marks=pytest.mark.slow),
        pytest.param("template", 2, marks=pytest.mark.slow),
    ],
)
def test_weights_replaced_in_place_are_noticed(how, lora_r, tmp_path):
    folder, run_dir = save_tiny(tmp_path / "model"), tmp_path / "run"

    def made(steps, model=folder, **kwargs):
        config = SDPOConfig(
            **SMALL | NO_PROBE | {"max_steps": steps, "save_steps": 1, "lora_r": lora_r}
        )
        return SDPOTrainer(str(model), CountA(), config, run_dir=run_dir, **kwargs)

    made(1).train()
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert made(2, tmp_path / "elsewhere", resume=True).train().history[-1]["step"] == 2
    altered(tmp_path / "elsewhere", how)
    resumed = made(3, tmp_path / "elsewhere", resume=True)
    if not lora_r and how != "template":  # all weights are in the checkpoint
        assert resumed.train().history[-1]["step"] == 3
        return
    with pytest.raises(UsageError, match=r"'.*elsewhere' are not those that the run began with"):
        resumed.train()
    if how != "template":
        for checkpoint in ("final", "2"):
            with pytest.raises(UsageError, match="not the one the run began with"):
                export_model(run_dir, tmp_path / "out", checkpoint=checkpoint)


def test_large_weights_are_told_apart_by_blocks_of_all_tensors(monkeypatch):
    monkeypatch.setattr(preflight, "WHOLE", 0)
    tensors = {"a": torch.randn(300_000), "b": torch.zeros(3, dtype=torch.bfloat16)}
    first = preflight.digest_of_weights(tensors.items())
    assert first == preflight.digest_of_weights(tensors.items())
    for name, change in (
        ("a", lambda t: t + 1e-3),
        ("a", lambda t: t.reshape(600, 500)),
        ("b", lambda t: t + 1),
        ("b", lambda t: t.half()),
    ):
        other = tensors | {name: change(tensors[name])}
        assert preflight.digest_of_weights(other.items()) != first
    last = tensors["a"].clone()
    last[-1] += 1
    assert preflight.digest_of_weights((tensors | {"a": last}).items()) != first


# --- what a resumed run does otherwise ----------------------------------------------------------


@pytest.mark.parametrize("saved", [True, False])
def test_settings_that_change_at_a_resumption_are_noted(saved, tmp_path):
    common = {"save_steps": 1 if saved else 2, "max_steps": 1}
    trainer = grpo(run_dir=tmp_path / "run", **common)
    if saved:
        trainer.train()
    config = GRPOConfig(**SMALL | common | {"max_steps": 2, "learning_rate": 5e-3})
    # Said again by one that was killed before it could write a checkpoint.
    for _ in range(1 + saved):
        resumed = GRPOTrainer(
            policy(),
            CountA(feedback="located"),
            config,
            run_dir=tmp_path / "run",
            eval_env=CountA(feedback="none", split="train"),
            resume=True,
        )
        assert resumed.loop.resumed(resumed) is saved
    told = [e["message"] for e in Run.open(tmp_path / "run").events]
    changes = [m for m in told if " was " in m and "from here on" in m]
    assert "trainer.learning_rate was 0.01 before, and is 0.005 from here on" in changes
    assert any(m.startswith("env.feedback was 'explained'") for m in changes)
    assert any(m.startswith("trainer.max_steps was 1 before") for m in changes)
    assert "eval_env.split was 'eval' before, and is 'train' from here on" in changes
    assert "eval_env.feedback was 'explained' before, and is 'none' from here on" in changes
    assert not any("seed" in m for m in changes)


def test_an_ablation_is_resumed_in_its_wrappers_and_told_of_others(tmp_path):
    def ablation(max_steps, **options):
        config = GRPOConfig(**SMALL | {"save_steps": 1, "max_steps": max_steps})
        env = DropFeedback(CountA(), kinds=(k for k in ["lint", "hint"]), **options)
        here = {"run_dir": tmp_path / "run", "resume": max_steps > 1}
        return GRPOTrainer(policy(), env, config, **here)

    ablation(1).train()
    kept = Run.open(tmp_path / "run")
    dropped = {"name": "DropFeedback", "kinds": ["hint", "lint"], "probability": 1.0, "seed": 0}
    assert kept.config["env"]["wrappers"] == kept.lock["env"]["wrappers"] == [dropped]
    ablation(2).train()
    told = [e["message"] for e in Run.open(tmp_path / "run").events]
    assert any("resumed from the checkpoint of step 1" in m for m in told)
    assert not any("wrappers" in m for m in told)
    with pytest.warns(RuntimeWarning, match=r"env\.wrappers was .*'seed': 0.* and is .*'seed': 7"):
        ablation(3, seed=7).train()
    told = {e["message"]: e["level"] for e in Run.open(tmp_path / "run").events}
    assert "warning" in {level for m, level in told.items() if m.startswith("env.wrappers was")}


# --- where the optimizer keeps its state -------------------------------------------------------


def test_the_state_of_a_resumed_optimizer_lies_where_adamw_keeps_it(monkeypatch):
    """On a device that is not the CPU: a fused AdamW has its step count there, too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rlrf_trainers.model import distributed

    def placed(optimizer):
        return {
            (name, kind): (str(value.device), value.dtype, value.shape)
            for name, master in optimizer.masters.items()
            for kind, value in optimizer.adamw.state[master].items()
        }

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.empty(2, 3, device="cuda"))

        def stepped():
            optimizer = MasterAdamW(model, SDPOConfig())
            for master in optimizer.masters.values():
                master.grad = torch.zeros_like(master)
            optimizer.step(1e-3)
            return optimizer

        first = stepped()
        expected = placed(first)
        state = {name: value.to("cpu") for name, value in first.state()}
        masters = {name: value.detach().to("cpu") for name, value in first.masters.items()}
        # A pretended tensor has a place but no numbers, which a torch without CUDA cannot copy.
        monkeypatch.setattr(distributed, "load_full", lambda *_: None)
        again = MasterAdamW(model, SDPOConfig())
        again.load(masters, state)
        assert placed(again) == expected
        assert {device for device, _, _ in expected.values()} == {"cuda:0"}


def test_a_resumed_optimizer_takes_the_same_next_step():
    def stepped(optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for master in optimizer.masters.values():
            master.grad = torch.randn(master.shape, generator=generator)
        optimizer.step(1e-2)

    first, again = (MasterAdamW(tiny_model(), SDPOConfig()) for _ in range(2))
    stepped(first, 0)
    again.load(
        {n: m.detach().clone() for n, m in first.masters.items()},
        {n: v.clone() for n, v in first.state()},
    )
    stepped(first, 1)
    stepped(again, 1)
    assert all(torch.equal(m, again.masters[n]) for n, m in first.masters.items())
