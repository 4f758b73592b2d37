"""What rlrf takes for granted of transformers, held against every version and family it supports.

Three promises: the common families keep their fast paths; a model that cannot have one is right
all the same; and whatever falls back says so.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from torch.nn.functional import cosine_similarity  # noqa: E402

import rlrf  # noqa: E402
from rlrf import SamplingParams, UsageError, notices, user  # noqa: E402
from rlrf.notices import SlowPathWarning, notice  # noqa: E402
from rlrf.policy import Prompt  # noqa: E402
from rlrf.report import write_report  # noqa: E402
from rlrf_trainers.config import SDPOConfig  # noqa: E402
from rlrf_trainers.core.optimizer import MasterAdamW, trainable  # noqa: E402
from rlrf_trainers.engines.hf import HFPolicy  # noqa: E402
from rlrf_trainers.model import backbone, sampler  # noqa: E402
from rlrf_trainers.model.head import Head  # noqa: E402
from rlrf_trainers.model.prefix import Layout, can_share, completion_logits  # noqa: E402
from tests.model_zoo import OTHER, PLAIN, RECURRENT, SLIDING  # noqa: E402
from tests.test_trainers import CountA, sdpo  # noqa: E402
from tests.tiny_model import tiny_model, tiny_tokenizer  # noqa: E402

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], [5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
COMPLETIONS = [[21, 22, 23, 24], [31], [41, 42, 43, 44, 45, 46, 47], [51, 52]]
FLAT = [token for completion in COMPLETIONS for token in completion]
GREEDY = SamplingParams(temperature=0, max_tokens=6)


def one_by_one(model):
    """Logits ``[N, V]`` of plain forward passes, one sequence at a time, nothing padded."""
    rows = zip(PROMPTS, COMPLETIONS, strict=True)
    return torch.cat(
        [
            model(input_ids=torch.tensor([p + c]), use_cache=False).logits[0, len(p) - 1 : -1]
            for p, c in rows
        ]
    )


def gradient(model, logits):
    model.zero_grad()
    ids = torch.tensor(FLAT)
    logits.log_softmax(-1).gather(1, ids[:, None]).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_right(model):
    """Ragged batches of training, scoring and sampling against one sequence at a time."""
    expected = one_by_one(model)
    found = completion_logits(model, PROMPTS, Layout(COMPLETIONS))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    a, b = gradient(model, expected), gradient(model, found)
    assert cosine_similarity(a, b, 0).item() == pytest.approx(1, abs=1e-4)
    assert (a - b).norm() <= 1e-4 * a.norm()
    logps = expected.detach().log_softmax(-1)
    scored = [x for s in sampler.score(model, PROMPTS, COMPLETIONS) for x in s.logprobs]
    assert scored == pytest.approx(logps[range(len(FLAT)), FLAT].tolist(), abs=1e-4)
    seeds = [(0, i) for i in range(len(PROMPTS))]
    params = SamplingParams(max_tokens=6)
    out = sampler.sample(model, PROMPTS, params, end_ids=range(40), seeds=seeds)
    for prompt, o in zip(PROMPTS, out, strict=True):
        ids = torch.tensor([prompt + o.token_ids])
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        picked = plain.log_softmax(-1)[range(len(o.token_ids)), o.token_ids]
        assert o.logprobs == pytest.approx(picked.tolist(), abs=2e-4)


def told(model):
    """What the two fast paths say of a model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached, shared = sampler.can_cache(model), can_share(model)
        again = sampler.can_cache(model), can_share(model)
    assert again == (cached, shared)
    messages = [str(w.message) for w in caught if issubclass(w.category, SlowPathWarning)]
    return cached, shared, messages


# --- families ---------------------------------------------------------------------------------


def few(names: Iterable[str], fast: int) -> Iterator[Any]:
    """The names as parameters, of which all but the first few are slow tests."""
    for n, name in enumerate(names):
        yield pytest.param(name, marks=[] if n < fast else [pytest.mark.slow])


@pytest.mark.parametrize("name", PLAIN)
def test_the_common_families_are_cached_and_share_their_prompts(name):
    model = tiny_model(config=PLAIN[name]())
    assert told(model) == (True, True, [])
    check_right(model)
    assert Head.of(model).module is not None


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_windows_are_cached_and_say_that_prompts_are_not_shared(name):
    model = tiny_model(config=SLIDING[name]())
    cached, shared, (message,) = told(model)
    assert (cached, shared) == (True, False)
    assert "whole prompt of every rollout" in message
    check_right(model)


@pytest.mark.parametrize("name", [*few(RECURRENT, 4)])
def test_padding_never_enters_a_recurrent_state(name):
    model = tiny_model(config=RECURRENT[name]())
    cached, shared, messages = told(model)
    assert (cached, shared) == (False, False)
    assert len(messages) == 2  # each slow path, once
    assert any("whole of every reply again" in m for m in messages)
    check_right(model)


@pytest.mark.parametrize("name", [*few(OTHER, 2)])
def test_older_families_are_fast_too(name):
    model = tiny_model(config=OTHER[name]())
    assert told(model) == (True, True, [])
    check_right(model)


def test_lora_and_bf16_keep_the_fast_paths():
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(tiny_model(), adapter)
    assert told(wrapped) == (True, True, [])
    check_right(wrapped)
    assert told(tiny_model().bfloat16()) == (True, True, [])
    experts = tiny_model(config=PLAIN["qwen3-moe"]()).bfloat16()
    assert told(experts) == (True, True, [])


# --- drift: what another version may do -------------------------------------------------------


def drifted(change):
    """A model whose forward pass has been changed as a release of transformers might."""
    model = tiny_model()
    inner = type(model).forward

    class Drifted(type(model)):
        pass

    Drifted.forward = change(inner, backbone.Arguments(model).cache)
    model.__class__ = Drifted
    return model


def renamed_and_annotated(inner, name):
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        kv: transformers.Cache | None = None,
        use_cache=None,
        logits_to_keep=0,
    ):
        return inner(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{name: kv},
        )

    return forward


def renamed(inner, name):
    def forward(self, input_ids=None, kv=None, **kwargs):
        return inner(self, input_ids=input_ids, **{name: kv}, **kwargs)

    return forward


def swallowed(inner, name):
    """The old name is taken and forgotten, as ``**kwargs`` of many models do."""

    def forward(self, input_ids=None, cache: transformers.Cache | None = None, **kwargs):
        return inner(self, input_ids=input_ids, **kwargs)

    return forward


def unmasked(inner, name):
    """Padding is not hidden any more."""

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None, **kwargs
    ):
        return inner(self, input_ids=input_ids, use_cache=use_cache, **{name: past_key_values})

    return forward


def raising(inner, name):
    def forward(self, input_ids=None, cache=None, use_cache=None, **kwargs):
        if cache is not None:
            raise TypeError("DynamicCache is gone; use KVStore")
        return inner(self, input_ids=input_ids, use_cache=use_cache, **kwargs)

    return forward


def test_an_argument_with_another_name_is_found_by_what_it_takes():
    model = drifted(renamed_and_annotated)
    assert sampler.can_cache(model)
    check_right(model)


@pytest.mark.filterwarnings("ignore::rlrf.notices.SlowPathWarning")
@pytest.mark.parametrize("change", [renamed, swallowed, unmasked, raising])
def test_what_cannot_be_found_is_slow_and_loud_and_right(change):
    model = drifted(change)
    cached, _, messages = told(model)
    assert not cached
    (message,) = [m for m in messages if "sampler" in m]
    assert message.startswith("Drifted: ")
    assert f"transformers {transformers.__version__}" in message
    assert backbone.TESTED in message
    if change is raising:
        assert "DynamicCache is gone" in message
    check_right(model)


def broken_decoder(monkeypatch, change):
    """A model whose decoder passes on other keys and values than it should."""
    model = tiny_model()
    attention = type(model.model.layers[0].self_attn)
    inner = attention.forward
    name = next(n for n in ("cache", "past_key_values") if n in backbone.Arguments(model).names)

    def forward(self, *args, **kwargs):
        cache = kwargs.get(name)
        if cache is not None:
            kwargs[name] = change(cache)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    return model


class _Detaching:
    """Numbers as they should be, and no gradient."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, keys, values, *args, **kwargs):
        keys, values = self.cache.update(keys.detach(), values.detach(), *args, **kwargs)
        return keys, values

    def __getattr__(self, name):
        return getattr(self.cache, name)


def test_a_cache_that_loses_the_gradient_is_not_shared(monkeypatch):
    model = broken_decoder(monkeypatch, _Detaching)
    cached, shared, (message,) = told(model)
    assert (cached, shared) == (True, False)
    assert "other numbers with a cache" in message
    check_right(model)


@pytest.mark.filterwarnings("ignore:Drifted. training runs the whole prompt")
def test_a_run_with_a_drifted_library_says_so_in_console_record_and_report(tmp_path):
    policy = HFPolicy(drifted(renamed), tiny_tokenizer())
    with pytest.warns(RuntimeWarning, match=r"sampler computes the whole of every reply") as seen:
        sdpo(model=policy, run_dir=tmp_path / "run", max_steps=2).train()
    assert sum("whole of every reply" in str(w.message) for w in seen) == 1
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if "whole of every reply" in e["message"]]
    assert event["level"] == "warning"
    assert "whole of every reply" in write_report([tmp_path / "run"]).read_text()


def test_a_head_that_is_not_known_is_told_of_in_the_record(tmp_path):
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *a: a[2] + 1.0)
    policy = HFPolicy(model, tiny_tokenizer())
    with pytest.warns(RuntimeWarning, match="loss_chunk_mb has no effect"):
        sdpo(model=policy, run_dir=tmp_path / "run", max_steps=1).train()
    assert "loss_chunk_mb has no effect" in (tmp_path / "run" / "events.jsonl").read_text()


# --- other slow paths ---------------------------------------------------------------------------


def test_kernels_that_are_slower_than_need_be_are_told_of():
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.say_kernels(model)
    model.set_attn_implementation("eager")
    with pytest.warns(SlowPathWarning, match=r"'eager'.*attn_implementation='sdpa'"):
        HFPolicy(model, tiny_tokenizer()).generate([Prompt((user("x"),))], GREEDY)
    assert backbone.attention(tiny_model()) == "sdpa"  # private there: it must stay what it is


def test_a_gpu_that_torch_cannot_use_is_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backbone, "_NVIDIA_DRIVER", tmp_path)
    with pytest.warns(SlowPathWarning, match=r"NVIDIA GPU that torch \S+ cannot use"):
        backbone.say_kernels(tiny_model())


def test_an_optimizer_that_is_not_fused_is_told_of():
    model = tiny_model()
    optimizer = MasterAdamW(model, SDPOConfig())
    optimizer._not_fused = ["mps"]
    with pytest.warns(SlowPathWarning, match="AdamW is not fused on mps"):
        optimizer.step(1e-4)


def test_the_facts_are_found_again_for_another_attention_kernel():
    model = tiny_model()
    assert sampler.can_cache(model)
    model.set_attn_implementation("eager")
    assert sampler.can_cache(model)
    assert len(backbone._faults[model]) == 2


@pytest.mark.parametrize("lora_r", [0, 2])
def test_checkpointing_that_does_nothing_is_told_of(lora_r, monkeypatch):
    monkeypatch.setattr(backbone, "GradientCheckpointingLayer", type("Gone", (), {}))
    config = SDPOConfig(gradient_checkpointing=True, lora_r=lora_r)
    model = trainable(tiny_model(), config)
    with pytest.warns(SlowPathWarning, match="gradient_checkpointing has no effect"):
        backbone.say_kernels(model)


def test_checkpointing_that_cannot_be_is_a_usage_error():
    model = tiny_model(config=RECURRENT["rwkv"]())
    type(model).supports_gradient_checkpointing = False
    try:
        with pytest.raises(UsageError, match="gradient_checkpointing=True"):
            trainable(model, SDPOConfig(gradient_checkpointing=True))
    finally:
        type(model).supports_gradient_checkpointing = True


@pytest.mark.parametrize("name", [*PLAIN, *SLIDING])
def test_families_name_their_layers_for_sharding_and_checkpointing(name):
    """Private names that FSDP and activation checkpointing rest on."""
    model = tiny_model(config=PLAIN.get(name, SLIDING.get(name))())
    kinds = set(model._no_split_modules)
    assert sum(type(m).__name__ in kinds for m in model.modules()) == len(model.model.layers)
    backbone.checkpoint_activations(model)
    assert backbone.checkpoints_activations(model)
    layers = list(backbone._checkpointing_layers(model))
    assert layers == list(model.model.layers)
    runs = []
    # At its beginning: what is run again ends as soon as it has all that the gradient needs.
    layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert len(runs) == 2


# --- what we put on a model ---------------------------------------------------------------------


def hooks(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)
    on_parameters = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    return on_modules + on_parameters


def attributes(model):
    of_parameters = {k for p in model.parameters() for k in vars(p)}
    return of_parameters | {k for m in model.modules() for k in vars(m)}


def test_a_policy_leaves_nothing_on_the_model():
    model = tiny_model()
    before = hooks(model), attributes(model)
    policies = [HFPolicy(model, tiny_tokenizer()) for _ in range(3)]
    for p in policies:
        p.generate([Prompt((user("x"),))], GREEDY)
        p.score([[1, 2]], [[3]])
    assert (hooks(model), attributes(model)) == before
    with pytest.raises(ZeroDivisionError):
        sampler.sample(model, [[1]], GREEDY, end_ids=(), seeds=[(0,)], stop=lambda ids: 1 / 0)
    assert hooks(model) == before[0]


def test_the_head_reads_a_contiguous_input_once_while_sampling():
    model = tiny_model()
    seen = []
    model.lm_head.register_forward_pre_hook(
        lambda m, args: seen.append((args[0].is_contiguous(), len(m._forward_pre_hooks)))
    )
    with backbone.contiguous_head_input(model):
        model(input_ids=torch.ones(3, 4, dtype=torch.long), logits_to_keep=1)
    assert seen == [(False, 2)]  # ours comes after it, and goes
    assert len(model.lm_head._forward_pre_hooks) == 1


def test_training_leaves_no_hook_on_the_parameters():
    model = tiny_model().bfloat16()
    before = hooks(model), attributes(model)
    trainer = sdpo(model=HFPolicy(model, tiny_tokenizer()), max_steps=1)
    assert hooks(model) > before[0]
    trainer.train()
    assert (hooks(model), attributes(model)) == before
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    assert model.model.norm.weight.grad is not None  # it is the user's again
    config = SDPOConfig()
    for _ in range(3):  # optimizers that were dropped without a word
        MasterAdamW(model, config)
    assert hooks(model) == before[0]


# --- notices ------------------------------------------------------------------------------------


def test_a_notice_is_said_once_and_heard_by_whoever_listens():
    gc.collect()  # records that the tracebacks of earlier tests hold
    with notices.collected() as first, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for topic, message in (("topic", "slow"), ("topic", "slow"), ("other", "slower")):
            notice(topic, message)
    with notices.collected() as second, warnings.catch_warnings():
        warnings.simplefilter("error")
        notice("topic", "slow")  # said already, and yet of this record, too
    assert [str(w.message) for w in seen] == first == ["slow", "slower"]
    assert second == ["slow"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stop = notices.listen(lambda *_: True)  # who says it itself
        notice("topic", "new")
        stop()
        stop()
    assert not notices._listeners


def test_a_listener_that_is_gone_hears_nothing():
    class Listens:
        def hear(self, topic, message):
            raise AssertionError

    notices.listen(Listens().hear)
    with pytest.warns(SlowPathWarning):
        notice("topic", "slow")
    notices._listeners.clear()


def test_a_run_that_has_ended_hears_nothing_more(tmp_path):
    trainer = sdpo(run_dir=tmp_path / "run", max_steps=1)
    trainer.train()
    with pytest.warns(SlowPathWarning):
        notice("topic", "slow")
    assert "slow" not in (tmp_path / "run" / "events.jsonl").read_text()


# --- deprecations -------------------------------------------------------------------------------


def test_only_one_warning_of_another_library_is_kept_from_the_user():
    with backbone.quiet_transformers(), pytest.warns(FutureWarning, match="something else"):
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    with backbone.quiet_transformers():
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)


def test_a_deprecation_that_only_a_logger_tells_of_is_heard(request):
    from tests.conftest import _Heard

    heard = _Heard()
    logger = logging.getLogger("rlrf-test.transformers")
    logger.addHandler(heard)
    logger.warning("`%s` is deprecated. Use `cache` instead.", "past_key_values")
    logger.warning("all is well")
    assert heard.messages == [
        "rlrf-test.transformers: `past_key_values` is deprecated. Use `cache` instead."
    ]


def test_agreement_is_measured_against_size():
    x = torch.randn(5, 7) * 1e-4
    assert backbone.agree(x + 1e-9, x)
    assert not backbone.agree(x + 1e-4, x)  # which an absolute tolerance would let pass
    assert not backbone.agree(x[:1], x)
    assert not backbone.agree(x * math.nan, x)
    assert backbone.agree(x.bfloat16(), (x * 1.02).bfloat16())


def test_evaluation_reports_slow_paths(tmp_path):
    with notices.collected() as slow, pytest.warns(SlowPathWarning):
        rlrf.evaluate(CountA(), HFPolicy(drifted(renamed), tiny_tokenizer()), limit=1)
    assert ["whole of every reply" in m for m in slow] == [True]
