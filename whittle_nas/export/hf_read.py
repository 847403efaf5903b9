"""The litgpt config of a Hugging Face `config.json`: the table of the export, read backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from litgpt import Config

from whittle_nas.errors import ConfigError
from whittle_nas.export.hf_architectures import ARCHITECTURES, differences
from whittle_nas.export.hf_config import settings_of
from whittle_nas.space.rules import check_supported

# A member of each family in litgpt's list; what `config.json` says replaces its sizes.
_BASES = {
    "llama": "Llama-2-7b-hf",
    "mistral": "Mistral-7B-v0.1",
    "phi3": "Phi-3-mini-4k-instruct",
    "qwen2": "Qwen2.5-0.5B",
    "qwen3": "Qwen3-0.6B",
    "olmo": "OLMo-1B-hf",
    "olmo2": "OLMo-2-1124-7B",
    "stablelm": "stablelm-3b-4e1t",
    "gpt_neox": "pythia-14m",
    "phi": "phi-1_5",
    "falcon": "falcon-7b",
    "gemma": "Gemma-7b",
    "gemma2": "Gemma-2-2b",
    "gemma3_text": "Gemma-3-1b-it",
}
# litgpt tells these apart from others by the name of the model, which therefore stays the base's.
_BY_NAME = ("falcon", "gemma", "phi", "qwen", "qwq", "olmo")
_SIZES = (
    "n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size",
    "padded_vocab_size",
)  # fmt: skip
# What a config.json may say in another way than ours without computing something else: litgpt
# scales attention scores by a setting of its own.
_NOT_COMPARED = ("architectures", "query_pre_attn_scalar", "_attn_implementation")


def litgpt_config(directory: Path) -> tuple[Config, str]:
    """The litgpt config of a Hugging Face directory, and a listed model of its family.

    A model of litgpt's list keeps its name there. Any other is described by its family and sizes,
    and refused unless the description, written back as a `config.json`, says the same.

    Raises:
        ConfigError: if `config.json` can't be read, or describes a model that litgpt has not.
    """
    hf = _read_config(directory)
    model_type = hf.model_type
    if model_type not in _BASES:
        raise ConfigError(
            f"{directory / 'config.json'} is of a {model_type!r} model; those that are converted "
            f"are {', '.join(_BASES)}"
        )
    base = _BASES[model_type]
    if model_type == "falcon" and hf.new_decoder_architecture and hf.num_ln_in_parallel_attn != 1:
        base = "falcon-40b"  # litgpt's converter tells by the name how many norms there are
    try:
        changes = _common(hf) | _SPECIAL.get(model_type, lambda _: {})(hf)
        config = Config.from_name(base, **changes)
        assert config is not None
    except (AttributeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{directory / 'config.json'} does not describe a model of litgpt: {error!r}"
        ) from None
    check_supported(config)
    _check_same(hf, config, directory)
    return _named(config, directory.name, model_type), base


def says_tied(directory: Path) -> bool:
    """Whether the `config.json` of a Hugging Face directory ties the head to the token table."""
    return bool(_read_config(directory).tie_word_embeddings)


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,  # or it asks on the terminal
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{directory / 'config.json'} can't be read: {reason}") from None


def _common(hf: Any) -> dict[str, Any]:
    """Sizes and positions, which every family has under one of a few names."""
    head_size = _first(hf, "head_dim") or hf.hidden_size // hf.num_attention_heads
    rope, scaling = _rope(hf)
    return {
        "n_embd": hf.hidden_size,
        "n_layer": hf.num_hidden_layers,
        "n_head": hf.num_attention_heads,
        "n_query_groups": _first(hf, "num_key_value_heads") or hf.num_attention_heads,
        "head_size": head_size,
        "intermediate_size": _first(hf, "intermediate_size") or 4 * hf.hidden_size,
        "block_size": hf.max_position_embeddings,
        "vocab_size": hf.vocab_size,
        "padded_vocab_size": hf.vocab_size,
        "norm_eps": _first(hf, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") or 1e-5,
        **rope,
        **scaling,
    }


def _rope(hf: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Base and share of rotary positions, and how they are stretched."""
    found = getattr(hf, "rope_parameters", None) or {
        **(getattr(hf, "rope_scaling", None) or {}),
        "rope_theta": _first(hf, "rope_theta", "rotary_emb_base"),
    }
    found = found.get("full_attention", found)
    share = found.get("partial_rotary_factor") or _first(hf, "partial_rotary_factor", "rotary_pct")
    base = {
        "rope_base": int(found.get("rope_theta") or 10_000),
        "rotary_percentage": 1.0 if share is None else share,
    }
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return base, {"rope_adjustments": None, "rope_condense_ratio": 1}
    if kind == "linear":
        return base, {"rope_adjustments": None, "rope_condense_ratio": found["factor"]}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        adjusted = {name: found[name] for name in names}
        adjusted["original_max_seq_len"] = found["original_max_position_embeddings"]
        return base, {"rope_adjustments": adjusted, "rope_condense_ratio": 1}
    raise ValueError(f"rope_type {kind!r}")


def _windowed(hf: Any) -> dict[str, Any]:
    return {"sliding_window_size": _first(hf, "sliding_window")}


def _gelu(hf: Any) -> dict[str, Any]:
    return {"gelu_approximate": "none" if hf.hidden_act == "gelu" else "tanh"}


def _gpt_neox(hf: Any) -> dict[str, Any]:
    return _gelu(hf) | {"parallel_residual": hf.use_parallel_residual}


def _falcon(hf: Any) -> dict[str, Any]:
    new = hf.new_decoder_architecture
    groups = hf.num_kv_heads if new or not hf.multi_query else 1
    return {
        "n_query_groups": groups,
        "intermediate_size": hf.ffn_hidden_size or 4 * hf.hidden_size,
        "shared_attention_norm": not new or hf.num_ln_in_parallel_attn == 1,
    }


def _stablelm(hf: Any) -> dict[str, Any]:
    return {"attn_bias": hf.use_qkv_bias}


def _gemma2(hf: Any) -> dict[str, Any]:
    windows = [int(kind == "sliding_attention") for kind in hf.layer_types]
    return {
        "sliding_window_size": hf.sliding_window,
        "sliding_window_indices": windows,
        "attention_scores_scalar": hf.query_pre_attn_scalar,
        "attention_logit_softcapping": hf.attn_logit_softcapping,
        "final_logit_softcapping": hf.final_logit_softcapping,
    }


def _gemma3(hf: Any) -> dict[str, Any]:
    found = _gemma2(hf)
    local = getattr(hf, "rope_parameters", None) or {}
    freq = local.get("sliding_attention", {}).get("rope_theta") or hf.rope_local_base_freq
    scaled = (local.get("full_attention") or {}).get("factor")
    return found | {
        "rope_indices": found["sliding_window_indices"],
        "rope_local_base_freq": int(freq),
        "rope_condense_ratio": 1,
        "rope_adjustments": {"factor": scaled} if scaled else None,
    }


_SPECIAL: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "mistral": _windowed,
    "phi3": _windowed,
    "phi": _gelu,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "stablelm": _stablelm,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
}


def _check_same(hf: Any, config: Config, directory: Path) -> None:
    """Refuse a model of which the litgpt config would compute something else."""
    from transformers import AutoConfig

    differing = list(differences(ARCHITECTURES[hf.model_type], config))
    ours = settings_of(hf.model_type, config)
    back = AutoConfig.for_model(**ours).to_dict()
    said = hf.to_dict()
    names = [*ours, "rope_parameters"]
    differing += [
        f"{name}={said[name]!r}"
        for name in names
        if name in said and name not in _NOT_COMPARED and said[name] != back.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{directory / 'config.json'} asks for what litgpt's {config.name} has not: "
            f"{', '.join(dict.fromkeys(differing))}"
        )


def _named(config: Config, directory: str, model_type: str) -> Config:
    """The model of litgpt's list if it is one, which then has its own prompt style."""
    from litgpt.config import name_to_config

    for name in (
        directory,
        *(name for name in name_to_config if name.lower() == directory.lower()),
    ):
        listed = name_to_config.get(name)
        if listed is not None and _same_sizes(Config(**listed), config):
            return Config(**listed)
    if model_type in ("llama", "mistral", "gpt_neox", "stablelm"):
        plain = not any(word in directory.lower() for word in _BY_NAME)
        config.name = directory if plain else f"{model_type}-model"
    config.hf_config = {"org": "", "name": config.name}
    return config


def _same_sizes(one: Config, other: Config) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in _SIZES)


def _first(hf: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(hf, name, None)) is not None), None)
