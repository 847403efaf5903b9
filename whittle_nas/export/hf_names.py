"""Where every litgpt parameter lives in a Hugging Face model: one map, read in both directions.

Letters: H `n_head`, G `n_query_groups`, K `head_size`, F `intermediate_size`, D `n_embd`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from whittle_nas.export.hf_features import has_unit_offset
from whittle_nas.space.rules import of_layer
from whittle_nas.weights import axes

Modules = Mapping[str, str]  # litgpt module(s) -> Hugging Face module(s), joined by "+"

_LLAMA: Modules = {
    "lm_head": "lm_head",
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.qkv": "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj",
    "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm",
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
    "attn.map": "self_attn.linear_attn",  # DeciLM's
    "mlp.map": "mlp.linear_mlp",
}
_GEMMA_2: Modules = {  # its post_attention_layernorm is what the name says, Llama's is not
    **_LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_PHI: Modules = {
    **_LLAMA,
    "transformer.ln_f": "model.final_layernorm",
    "attn.proj": "self_attn.dense",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}
_PHI_3: Modules = {
    **{name: to for name, to in _LLAMA.items() if name not in ("mlp.fc_1", "mlp.fc_2")},
    "attn.qkv": "self_attn.qkv_proj",
    "mlp.fc_1+mlp.fc_2": "mlp.gate_up_proj",
}
_GPT_NEOX: Modules = {
    "lm_head": "embed_out",
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.proj": "attention.dense",
    "mlp.fc": "mlp.dense_h_to_4h",
    "mlp.proj": "mlp.dense_4h_to_h",
}
_FALCON: Modules = {  # falcon-7b: one norm for attention and MLP
    **_GPT_NEOX,
    "lm_head": "lm_head",
    "transformer.wte": "transformer.word_embeddings",
    "transformer.ln_f": "transformer.ln_f",
    "attn.qkv": "self_attention.query_key_value",
    "attn.proj": "self_attention.dense",
}
_FALCON_TWO_NORMS: Modules = {**_FALCON, "norm_1": "ln_attn", "norm_2": "ln_mlp"}
_MODULES: Mapping[str, Modules] = {
    "falcon": _FALCON,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "gpt_neox": _GPT_NEOX,
    "olmo2": _GEMMA_2,
    "phi": _PHI,
    "phi3": _PHI_3,
}
_BLOCKS: Mapping[str, str] = {"falcon": "transformer.h", "gpt_neox": "gpt_neox.layers"}
_ROWS_BY_GROUP = ("gpt_neox", "falcon")  # q..q k v of group 0, then of group 1, ...


@dataclass(frozen=True)
class Row:
    """Litgpt parameters that, stacked, hold the same rows as some Hugging Face parameters."""

    lit: tuple[str, ...]
    hf: tuple[str, ...]


def name_map(config: Any, model_type: str) -> list[Row]:
    """All rows of the map for one model, in litgpt's order of parameters.

    Args:
        config: litgpt config.
        model_type: Hugging Face's name of the architecture.

    Raises:
        KeyError: with the name of a litgpt parameter that the architecture has no place for.
    """
    modules = _MODULES.get(model_type, _LLAMA)
    if model_type == "falcon" and not config.shared_attention_norm:
        modules = _FALCON_TWO_NORMS
    blocks = _BLOCKS.get(model_type, "model.layers")
    rows: dict[Row, None] = {}  # a set that keeps its order
    for name in axes.parameter_names(config):
        layer, rest = axes.split_layer(name)
        module, _, kind = rest.rpartition(".")
        lit = next((key for key in modules if module in key.split("+")), None)
        if lit is None:
            raise KeyError(name)
        lit_block, hf_block = (
            ("", "") if layer is None else (f"transformer.h.{layer}.", f"{blocks}.{layer}.")
        )
        row = Row(
            tuple(f"{lit_block}{part}.{kind}" for part in lit.split("+")),
            tuple(f"{hf_block}{part}.{kind}" for part in modules[lit].split("+")),
        )
        rows[row] = None
    return list(rows)


def to_hf(
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    model_type: str,
    query_scale: float = 1.0,
    tied: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face parameters of a litgpt model, one by one, in a fixed order.

    Args:
        config: litgpt config.
        tensors: parameters by litgpt name, on any device, also `meta`; each is asked for once.
        model_type: Hugging Face's name of the architecture.
        query_scale: what queries are multiplied by (see `hf_config.HFTarget`).
        tied: leave the head out, because the embedding serves as head.

    Yields:
        Hugging Face name and tensor; views wherever nothing has to be rearranged.
    """
    assert set(tensors) == set(axes.parameter_names(config))
    for row in name_map(config, model_type):
        if tied and row.lit == ("lm_head.weight",):
            continue
        own = of_layer(config, axes.split_layer(row.lit[0])[0])
        stacked = _cat([_scaled(name, tensors[name], own, query_scale) for name in row.lit])
        if _is_qkv(row) and model_type in _ROWS_BY_GROUP:
            stacked = _group_rows(stacked, config)
        sizes = _qkv_rows(own) if len(row.hf) == 3 else [stacked.shape[0]]
        yield from zip(row.hf, stacked.split(sizes), strict=True)


def from_hf(
    config: Any, tensors: Mapping[str, torch.Tensor], *, model_type: str, query_scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """The inverse of `to_hf`: litgpt's state dict; a shared table is given under both names."""
    found: dict[str, torch.Tensor] = {}
    for row in name_map(config, model_type):
        if row.lit == ("lm_head.weight",) and row.hf[0] not in tensors:
            continue
        stacked = _cat([tensors[name] for name in row.hf])
        if _is_qkv(row) and model_type in _ROWS_BY_GROUP:
            stacked = _ungroup_rows(stacked, config)
        parts = stacked.split([axes.shape(name, config)[0] for name in row.lit])
        for name, part in zip(row.lit, parts, strict=True):
            found[name] = _scaled(name, part, config, 1 / query_scale)
    found.setdefault("lm_head.weight", found["transformer.wte.weight"])
    return found


def _scaled(name: str, tensor: torch.Tensor, config: Any, scale: float) -> torch.Tensor:
    """Multiply what makes the queries: their norm where there is one, else their projection."""
    owner = "attn.norm_q" if config.norm_qk else "attn.qkv"
    if scale == 1.0 or f".{owner}." not in name:
        return tensor
    rows = _qkv_rows(config)[0] if owner == "attn.qkv" else tensor.shape[0]
    offset = 1.0 if config.norm_qk and has_unit_offset(config) else 0.0
    factor = torch.ones(tensor.shape[0], device=tensor.device)
    factor[:rows] = scale
    scaled = (tensor.float() + offset) * factor.view(-1, *[1] * (tensor.dim() - 1)) - offset
    return scaled.to(tensor.dtype)


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _is_qkv(row: Row) -> bool:
    return ".attn.qkv." in row.lit[0]


def _qkv_rows(config: Any) -> list[int]:
    groups = config.n_query_groups * config.head_size
    return [config.n_head * config.head_size, groups, groups]


def _group_rows(qkv: torch.Tensor, config: Any) -> torch.Tensor:
    """All queries, all keys, all values -> queries, key and value of each group."""
    groups = config.n_query_groups
    parts = [part.unflatten(0, (groups, -1)) for part in qkv.split(_qkv_rows(config))]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _ungroup_rows(qkv: torch.Tensor, config: Any) -> torch.Tensor:
    """Inverse of `_group_rows`."""
    groups = config.n_query_groups
    sizes = [rows // groups for rows in _qkv_rows(config)]
    parts = qkv.unflatten(0, (groups, -1)).split(sizes, dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])
