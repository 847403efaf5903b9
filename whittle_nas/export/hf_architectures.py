"""What the Hugging Face architectures compute, in litgpt's words, and their `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from whittle_nas.export.hf_features import LLAMA, features, rope_scaling, sliding_window


class Sizes(Enum):
    """What an architecture asks of the sizes, in any of transformers 5.3 to 5.23."""

    FREE = "nothing: it has its own head_dim"
    DIVIDES = "n_embd % n_head == 0"
    PRODUCT = "n_embd == n_head * head_size"


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        class_name: in transformers.
        settings: the part of `config.json` that not all architectures share.
        computes: features (see `hf_features`) in which it differs from Llama, and the values that
            each can have.
        sizes: what it asks of the sizes.
        grouped: it has grouped queries.
        prefixes: litgpt models whose names begin so are written in it where possible.
        divisor: what its attention scores are divided by the root of.
    """

    class_name: str
    settings: Callable[[Any], dict[str, Any]]
    computes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    sizes: Sizes = Sizes.FREE
    grouped: bool = True
    prefixes: tuple[str, ...] = ()
    divisor: Callable[[Any], int] = lambda config: config.head_size


def differences(architecture: Architecture, config: Any) -> dict[str, Any]:
    """Features of a litgpt model that an architecture can't compute."""
    can = {**LLAMA, **architecture.computes}
    return {name: value for name, value in features(config).items() if value not in can[name]}


# --- config.json of each family; keys of transformers 4, which transformers 5 reads as well and
# which for gpt_neox are the only ones that 5.3 obeys (it overwrites a partial_rotary_factor).


def _rope(config: Any) -> dict[str, Any]:
    return {
        "rope_theta": float(config.rope_base),
        "rope_scaling": rope_scaling(config),
        "partial_rotary_factor": config.rotary_percentage,
    }


def _llama(config: Any) -> dict[str, Any]:
    settings = _rope(config) | {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
    }
    del settings["partial_rotary_factor"]
    return settings


def _mistral(config: Any) -> dict[str, Any]:
    window = config.sliding_window_size if sliding_window(config) else None
    return _llama(config) | {"sliding_window": window}


def _phi3(config: Any) -> dict[str, Any]:
    return _mistral(config) | _rope(config)


def _phi(config: Any) -> dict[str, Any]:
    act = {"none": "gelu", "tanh": "gelu_new"}[config.gelu_approximate]
    return _phi3(config) | {"hidden_act": act, "layer_norm_eps": config.norm_eps}


def _stablelm(config: Any) -> dict[str, Any]:
    return _rope(config) | {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.n_query_groups,
        "hidden_act": "silu",
        "layer_norm_eps": config.norm_eps,
        "use_qkv_bias": config.attn_bias,
    }


def _gpt_neox(config: Any) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "hidden_act": {"none": "gelu", "tanh": "gelu_new"}[config.gelu_approximate],
        "layer_norm_eps": config.norm_eps,
        "rotary_emb_base": float(config.rope_base),
        "rotary_pct": config.rotary_percentage,
        "rope_scaling": rope_scaling(config),
        "use_parallel_residual": config.parallel_residual,
    }


def _falcon(config: Any) -> dict[str, Any]:
    as_7b = config.shared_attention_norm and config.n_query_groups == 1
    return {
        "ffn_hidden_size": config.intermediate_size,
        "layer_norm_epsilon": config.norm_eps,
        "rope_theta": float(config.rope_base),
        "rope_scaling": rope_scaling(config),
        "new_decoder_architecture": not as_7b,
        "num_ln_in_parallel_attn": 1 if config.shared_attention_norm else 2,
        "num_kv_heads": config.n_query_groups,
        "multi_query": as_7b,
    }


def _gemma(config: Any) -> dict[str, Any]:
    return _llama(config) | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma2_divisor(config: Any, *, layers_of_27b: int = 46) -> int:
    # llama.cpp has no query_pre_attn_scalar and goes by the number of layers. transformers obeys
    # it, so what llama.cpp does is written there, and both compute the same.
    return config.n_embd // config.n_head if config.n_layer == layers_of_27b else config.head_size


def _gemma3_divisor(config: Any) -> int:
    return _gemma2_divisor(config, layers_of_27b=62)


def _gemma2(config: Any) -> dict[str, Any]:
    kinds = ("full_attention", "sliding_attention")
    windows = config.sliding_window_indices or [0] * config.n_layer
    # The default attention of transformers 5.3 silently leaves out soft-capping.
    capped = config.attention_logit_softcapping is not None
    attention = {"_attn_implementation": "eager"} if capped else {}
    return (
        _gemma(config)
        | attention
        | {
            "query_pre_attn_scalar": _gemma2_divisor(config),
            "sliding_window": config.sliding_window_size or config.block_size,
            "layer_types": [kinds[bool(window)] for window in windows],
            "attn_logit_softcapping": config.attention_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    )


def _gemma3(config: Any) -> dict[str, Any]:
    return _gemma2(config) | {
        "query_pre_attn_scalar": _gemma3_divisor(config),
        "rope_local_base_freq": float(config.rope_local_base_freq),
    }


_WINDOWS = (None, "all layers")
_GEMMA_COMPUTES: Mapping[str, tuple[Any, ...]] = {
    "norm": ("RMSNorm with 1 + weight",),
    "mlp": ("GemmaMLP, gelu tanh",),
    "scale_embeddings": (True,),
}
_GEMMA_2_COMPUTES: Mapping[str, tuple[Any, ...]] = {
    **_GEMMA_COMPUTES,
    "norms": ((True, True, True, True),),
    "sliding_window": (*_WINDOWS, "some layers"),
    "final_softcapping": (False, True),
}
_GELU_MLPS = ("GptNeoxMLP, gelu none", "GptNeoxMLP, gelu tanh")
_ROTARY = ("whole head", "part of head")

# The first row that computes a model and has its sizes is taken.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _llama, sizes=Sizes.DIVIDES),
    "mistral": Architecture(
        "MistralForCausalLM",
        _mistral,
        {"sliding_window": _WINDOWS},
        prefixes=("mistral", "mathstral"),
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        _phi3,
        {"sliding_window": _WINDOWS, "rotary": _ROTARY, "rope": ("plain",)},
        prefixes=("phi-3", "phi-4"),
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", _llama, {"bias": ("qkv",)}),
    "qwen3": Architecture("Qwen3ForCausalLM", _llama, {"qk_norm": ("default",)}),
    "olmo": Architecture(
        "OlmoForCausalLM", _llama, {"norm": ("LayerNorm without weights, eps 1e-05",)}
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        _llama,
        {"norms": ((False, False, True, True),), "qk_norm": ("olmo2",)},
    ),
    "stablelm": Architecture(
        "StableLmForCausalLM",
        _stablelm,
        {"norm": ("LayerNorm",), "bias": ("none", "qkv"), "rotary": _ROTARY},
        sizes=Sizes.PRODUCT,
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM",
        _gpt_neox,
        {
            "norm": ("LayerNorm",),
            "mlp": _GELU_MLPS,
            "residual": ("sequential", "parallel"),
            "bias": ("all",),
            "rotary": _ROTARY,
        },
        sizes=Sizes.PRODUCT,
        grouped=False,
    ),
    "phi": Architecture(
        "PhiForCausalLM",
        _phi,
        {
            "norm": ("LayerNorm",),
            "mlp": _GELU_MLPS,
            "residual": ("parallel, shared norm",),
            "bias": ("all",),
            "lm_head_bias": (True,),
            "rotary": _ROTARY,
        },
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        _falcon,
        {
            "norm": ("LayerNorm",),
            "mlp": ("GptNeoxMLP, gelu none",),
            "residual": ("parallel", "parallel, shared norm"),
        },
        sizes=Sizes.PRODUCT,
    ),
    "gemma": Architecture("GemmaForCausalLM", _gemma, _GEMMA_COMPUTES),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        _gemma2,
        {**_GEMMA_2_COMPUTES, "attention_softcapping": (False, True)},
        sizes=Sizes.DIVIDES,
        divisor=_gemma2_divisor,
    ),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM",
        _gemma3,
        {**_GEMMA_2_COMPUTES, "qk_norm": ("default",), "local_rope": ("sliding layers",)},
        sizes=Sizes.DIVIDES,
        divisor=_gemma3_divisor,
    ),
}


def settings_of(model_type: str, config: Any) -> dict[str, Any]:
    """`config.json` of a litgpt model, without what its weights and tokenizer say."""
    row = ARCHITECTURES[model_type]
    return {
        "architectures": [row.class_name],
        "model_type": model_type,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        **row.settings(config),
    }
