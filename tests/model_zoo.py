"""Tiny configurations of many architectures, for what must hold of each.

``ZOO[name]()`` makes a configuration; :func:`tests.tiny_model.tiny_model` makes the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Wide enough that a wrong mask, position or state shows in the logits.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _config(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{name}Config")(**{**SIZES, **fields})


PLAIN = {
    "qwen2": _config("Qwen2"),
    "qwen3": _config("Qwen3", head_dim=8),
    "llama": _config("Llama"),
    "smollm2": _config("Llama", tie_word_embeddings=True, num_key_value_heads=4),
    "smollm3": _config("SmolLM3", num_hidden_layers=4),
    "mistral": _config("Mistral", sliding_window=None, head_dim=8),
    "phi": _config("Phi", num_key_value_heads=4),
    "phi3": _config("Phi3", sliding_window=None),
    "gemma": _config("Gemma", head_dim=8),
    "granite": _config("Granite"),
    "olmo2": _config("Olmo2"),
    "qwen3-moe": _config(
        "Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
"""Every layer attends to everything: cached, and prompts are shared."""

GEMMA3 = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
SLIDING = {
    "gemma3": _config("Gemma3Text", **GEMMA3, layer_types=["sliding_attention", "full_attention"]),
    "mistral, sliding": _config("Mistral", sliding_window=4, head_dim=8),
    "phi3, sliding": _config("Phi3", sliding_window=4),
    "qwen2, sliding": _config(
        "Qwen2",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    ),
}
"""Some layers see a window: cached, and prompts are not shared."""

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"state_size": 4, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}
RECURRENT = {
    "rwkv": _config("Rwkv", attention_hidden_size=32),
    "xlstm": _config("xLSTM", num_heads=4, chunkwise_kernel="chunkwise--native_autograd"),
    "mamba": _config("Mamba", state_size=4),
    "mamba2": _config("Mamba2", state_size=4, num_heads=4, head_dim=16, n_groups=1, chunk_size=8),
    "falcon-mamba": _config("FalconMamba", state_size=4),
    "recurrent-gemma": _config(
        "RecurrentGemma",
        block_types=["recurrent", "attention"],
        lru_width=32,
        attention_window_size=8,
        w_init_variance_scale=1.0,
    ),
    "qwen3-next": _config(
        "Qwen3Next",
        layer_types=["linear_attention", "full_attention"],
        num_experts=0,
        head_dim=8,
        **LINEAR,
    ),
    "jamba": _config(
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "bamba": _config(
        "Bamba",
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
    "lfm2": _config("Lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "falcon-h1": _config(
        "FalconH1",
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=8,
        head_dim=8,
    ),
    "zamba2": _config(
        "Zamba2",
        layers_block_type=["mamba", "hybrid"],
        hybrid_layer_ids=[1],
        num_mem_blocks=1,
        mamba_d_state=4,
        mamba_ngroups=1,
        n_mamba_heads=4,
        chunk_size=8,
        attention_head_dim=16,
        attention_hidden_size=64,
        num_key_value_heads=4,
        adapter_rank=4,
    ),
    "minimax": _config(
        "MiniMax",
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=2,
        head_dim=8,
        block_size=8,
    ),
    "granite-hybrid": _config(
        "GraniteMoeHybrid",
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=4,
        mamba_chunk_size=8,
        shared_intermediate_size=64,
    ),
    "olmo-hybrid": _config(
        "OlmoHybrid", layer_types=["linear_attention", "full_attention"], **LINEAR
    ),
}
"""Some layers have a state that padding on the left would enter."""
OTHER = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=272,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=272,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    ),
    "mpt": lambda: transformers.MptConfig(
        vocab_size=272, d_model=32, n_layers=2, n_heads=4, initializer_range=0.3
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=272,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        init_std=0.3,
        pad_token_id=1,
    ),
    "gpt-neox": _config("GPTNeoX"),
    "falcon": _config("Falcon"),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=272, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, init_std=0.3
    ),
}
