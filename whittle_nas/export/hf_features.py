"""What a litgpt model's forward pass does, as far as Hugging Face architectures differ in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def features(config: Any) -> dict[str, Any]:
    """What the forward pass of a litgpt model does, as far as architectures differ in it."""
    norm = config.norm_class_name
    if has_unit_offset(config):
        norm = "RMSNorm with 1 + weight"
    elif norm == "LayerNorm" and "OLMo" in config.name:  # litgpt decides by name
        norm = f"LayerNorm without weights, eps {config.norm_eps}"
    mlp = config.mlp_class_name
    residual = "parallel" if config.parallel_residual else "sequential"
    scaling = rope_scaling(config)
    return {
        "norm": norm,
        "norms": (config.norm_1, config.norm_2, config.post_attention_norm, config.post_mlp_norm),
        "mlp": mlp if mlp == "LLaMAMLP" else f"{mlp}, gelu {config.gelu_approximate}",
        "residual": residual + (", shared norm" if config.shared_attention_norm else ""),
        "qk_norm": config.norm_qk_type if config.norm_qk else None,
        "bias": "all" if config.bias else "qkv" if config.attn_bias else "none",
        "lm_head_bias": config.lm_head_bias,
        "rotary": "whole head" if config.rope_n_elem == config.head_size else "part of head",
        "rope": scaling["rope_type"] if scaling else "plain",
        "rope_interleave": config.rope_interleave,
        "local_rope": _local_rope(config),
        "sliding_window": sliding_window(config),
        "scale_embeddings": config.scale_embeddings,
        "attention_softcapping": config.attention_logit_softcapping is not None,
        "final_softcapping": config.final_logit_softcapping is not None,
    }


def has_unit_offset(config: Any) -> bool:
    """Whether norms multiply by 1 + weight; litgpt decides by name."""
    return config.norm_class_name == "RMSNorm" and "Gemma" in config.name


LLAMA: Mapping[str, tuple[Any, ...]] = {
    "norm": ("RMSNorm",),
    "norms": ((True, True, False, False),),
    "mlp": ("LLaMAMLP",),
    "residual": ("sequential",),
    "qk_norm": (None,),
    "bias": ("none",),
    "lm_head_bias": (False,),
    "rotary": ("whole head",),
    "rope": ("plain", "linear", "llama3"),
    "rope_interleave": (False,),
    "local_rope": (None,),
    "sliding_window": (None,),
    "scale_embeddings": (False,),
    "attention_softcapping": (False,),
    "final_softcapping": (False,),
}


def rope_scaling(config: Any) -> dict[str, Any] | None:
    """`rope_scaling` of `config.json`; litgpt's condensed positions are linear scaling."""
    changes = config.rope_adjustments or {}
    if {"beta_fast", "beta_slow"} & set(changes):
        return {"rope_type": "yarn"}  # litgpt blends the frequencies the other way round
    factor = float(changes.get("factor", 1.0))
    if "low_freq_factor" not in changes:
        factor *= config.rope_condense_ratio
        return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    if config.rope_condense_ratio != 1:
        return {"rope_type": "llama3, condensed"}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": float(changes["low_freq_factor"]),
        "high_freq_factor": float(changes["high_freq_factor"]),
        "original_max_position_embeddings": changes["original_max_seq_len"],
    }


def _local_rope(config: Any) -> str | None:
    if config.rope_local_base_freq is None:
        return None
    same = config.sliding_window_size and config.rope_indices == config.sliding_window_indices
    return "sliding layers" if same and config.rope_condense_ratio == 1 else "other layers"


def sliding_window(config: Any) -> str | None:
    """In which layers attention is limited to a window."""
    if config.sliding_window_size is None or not any(config.sliding_window_indices):
        return None
    return "all layers" if all(config.sliding_window_indices) else "some layers"
