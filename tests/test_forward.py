"""The shared-prefix forward must equal one sequence at a time, in logits and in gradients."""

from __future__ import annotations

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from rlrf_trainers.model.prefix import (  # noqa: E402
    Layout,
    _Decoder,
    _plain,
    _shared_prefix,
    _split_prefixes,
    completion_hidden,
    completion_logits,
    micro_batches,
)
from tests.tiny_model import tiny_model  # noqa: E402


def rows(seed: int = 0):
    rng = random.Random(seed)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (5, 3, 9)]
    prompts = [prompts[i] for i in (0, 0, 1, 2, 0, 1)]
    completions = [[rng.randrange(256) for _ in range(n)] for n in (4, 1, 7, 2, 6, 3)]
    return prompts, completions


def one_by_one(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def rowwise(layout, flat):
    """Flat logits as one ``[T, V]`` tensor per row."""
    return [
        flat[layout.rows == i][layout.positions[layout.rows == i].argsort()]
        for i in range(len(layout.lengths))
    ]


@pytest.mark.parametrize("forward", [_shared_prefix, _plain])
def test_equals_one_sequence_at_a_time(forward):
    model = tiny_model()
    prompts, completions = rows()
    layout = Layout(completions)
    with torch.no_grad():
        logits = rowwise(layout, forward(_Decoder(model, True), prompts, layout))
        for row, prompt, completion in zip(logits, prompts, completions, strict=True):
            expected = one_by_one(model, prompt, completion)
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_prompts_that_only_begin_alike_share_their_beginning():
    rng = random.Random(3)
    question = [rng.randrange(256) for _ in range(20)]
    other = [rng.randrange(256) for _ in range(18)]
    prompts = [question + [rng.randrange(256) for _ in range(n)] for n in (4, 6, 4)]
    prompts += [[*other, 7, 8], other, other]
    completions = [[rng.randrange(256) for _ in range(n)] for n in (3, 1, 4, 2, 5, 3)]
    masks = [[1] * len(c) for c in completions]
    masks[2] = [1, 0, 0, 1]
    layout = Layout(completions, masks)
    starts, longer = _split_prefixes(prompts, layout)
    assert [len(s) for s in starts] == [20, 20, 20, 18, 18, 18]
    assert longer.rows.tolist() == layout.rows.tolist()
    calls = []
    model = tiny_model()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        shared = completion_hidden(model, prompts, layout)
        assert sum(calls) < sum(map(len, prompts)) + sum(map(len, completions))
        plain = _plain(_Decoder(model, False), prompts, layout)
    torch.testing.assert_close(shared, plain, atol=2e-5, rtol=1e-4)


def test_groups_of_equal_prompts_do_not_give_up_their_prompt_for_a_common_system_message():
    system = list(range(10))
    prompts = [system + [50 + i // 4] * 10 for i in range(8)]
    starts, layout = _split_prefixes(prompts, Layout([[1, 2]] * 8))
    assert starts == prompts
    assert layout.completions == [[1, 2]] * 8


def test_gradients_flow_through_the_shared_prefix():
    prompts, completions = rows(1)
    layout = Layout(completions)

    def gradient(forward):
        model = tiny_model()
        model.requires_grad_(True)
        logits = forward(_Decoder(model, True), prompts, layout)
        ids = layout.flat(completions, logits.device)
        logits.log_softmax(-1).gather(1, ids[:, None]).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    shared, plain = gradient(_shared_prefix), gradient(_plain)
    torch.testing.assert_close(shared, plain, atol=1e-3, rtol=1e-3)
    assert shared.abs().max() > 0.1


def test_layouts_hold_every_token_once_and_pad_back():
    _, completions = rows(2)
    layout = Layout(completions)
    flat = layout.flat(completions, torch.device("cpu"))
    assert len(flat) == sum(map(len, completions))
    padded = layout.padded(flat)
    for row, completion in zip(padded.tolist(), completions, strict=True):
        assert row == [*completion, *[0] * (padded.shape[1] - len(completion))]


def test_single_token_completions():
    model = tiny_model()
    with torch.no_grad():
        logits = completion_logits(model, [[1, 2], [3]], Layout([[4], [5]]))
        assert logits.shape[0] == 2
        alone = model(input_ids=torch.tensor([[3]])).logits[0, -1]
    torch.testing.assert_close(logits[1], alone, atol=1e-5, rtol=1e-4)


def test_temperature_divides_the_logits():
    model = tiny_model()
    prompts, completions = rows()
    with torch.no_grad():
        hot = completion_logits(model, prompts, Layout(completions), 2.0)
        plain = completion_logits(model, prompts, Layout(completions))
    torch.testing.assert_close(hot * 2, plain)


def test_activation_checkpointing_takes_the_plain_path():
    model = tiny_model()
    prompts, completions = rows()
    with torch.no_grad():
        expected = completion_logits(model, prompts, Layout(completions))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    logits = completion_logits(model, prompts, Layout(completions))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    logits.sum().backward()


def test_a_full_width_cache_is_not_assumed_of_sliding_windows():
    model = tiny_model(
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=4,
        use_sliding_window=True,
    )
    prompts, completions = rows()
    layout = Layout(completions)
    with torch.no_grad():
        logits = rowwise(layout, completion_logits(model, prompts, layout))
        for row, prompt, completion in zip(logits, prompts, completions, strict=True):
            expected = one_by_one(model, prompt, completion)
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_micro_batches_cover_every_row_once_within_budget():
    prompts, completions = rows()
    for budget in (1, 7, 12, 1000):
        split = list(micro_batches(prompts, completions, budget))
        assert sorted(i for batch in split for i in batch) == list(range(len(prompts)))
        for batch in split:
            assert sum(len(completions[i]) for i in batch) <= budget or len(batch) == 1
    # rows of one prompt stand together, so that its forward is shared
    (batch,) = micro_batches(prompts, completions, 1000)
    order = [tuple(prompts[i]) for i in batch]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes == len(set(order)) - 1


@pytest.mark.parametrize("name", ["Mistral", "Mixtral", "Phi3", "Starcoder2"])
def test_sliding_windows_that_no_layer_type_tells_of(name):
    """Beyond the window a repeated cache would be wrong, and nothing would say so."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        pad_token_id=0,
    )
    model = tiny_model(config=config)
    prompts, completions = rows(4)
    layout = Layout(completions)
    with torch.no_grad():
        logits = rowwise(layout, completion_logits(model, prompts, layout))
        for row, prompt, completion in zip(logits, prompts, completions, strict=True):
            expected = one_by_one(model, prompt, completion)
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)


def test_a_budget_counts_a_prompt_once_only_where_it_is_shared():
    prompts, completions = [[1] * 50] * 8, [[2] * 5] * 8
    assert list(micro_batches(prompts, completions, 100)) == [list(range(8))]
    assert list(micro_batches(prompts, completions, 110, share=False)) == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
