"""A tiny chat model made from nothing: random weights, a byte-level tokenizer, a ChatML template.

Everything a test of a policy or a trainer needs, in milliseconds and without a network::

    model, tokenizer = tiny_model(), tiny_tokenizer()
    folder = save_tiny(tmp_path)            # the same as a folder, for `model="..."`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Added tokens that are not special: they stay in decoded text, as Qwen's do."""

CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- (tool | tojson) + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + ({"name": call.function.name, "arguments": call.function.arguments} | tojson) }}
{{- '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "a"), ("o", "n"), ("e", "r"))


def tiny_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 256 bytes, a few merges and ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(a + b for a, b in MERGES)]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", **kwargs
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(seed: int = 0, config: Any = None, **overrides: Any) -> PreTrainedModel:
    """A random causal language model in fp32, the same for the same ``seed``.

    Args:
        seed: of the weights.
        config: another architecture's config; default is a Qwen2 of 2 layers, hidden 32.
        overrides: fields of the default config.
    """
    if config is None:
        fields: dict[str, Any] = {
            "vocab_size": 272,  # a little more than the tokenizer has, as real models do
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            # Wide enough that attention and logits are far from uniform: a wrong mask shows.
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        config = Qwen2Config(**{**fields, **overrides})
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def save_tiny(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write :func:`tiny_model` and :func:`tiny_tokenizer` to ``folder``; returns it."""
    tiny_model(seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
