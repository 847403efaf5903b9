"""Which dimension every axis of every parameter runs over: the one table of the project.

Slicing, permuting, counting and magnitudes are loops over it. Letters as in litgpt: D `n_embd`,
H `n_head`, G `n_query_groups`, K `head_size`, F `intermediate_size`, V `padded_vocab_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from whittle_nas.errors import ConfigError
from whittle_nas.space.rules import of_layer, rope_n_elem
from whittle_nas.space.subnetwork import LINEAR, PARTS, Block, HeadChannels


class Axis(Enum):
    """What the entries of one stretch of one tensor dimension are."""

    EMBD = "residual stream channels, D"
    MLP = "neurons, F"
    QUERY = "query rows, heads x head channels, H * K"
    KEY = "key rows, groups x head channels, G * K"
    VALUE = "value rows, groups x head channels, G * K"
    HEADS = "attention output, heads x value channels, H * K"
    CHANNEL = "query/key channels that all heads share, K"
    VOCAB = "tokens, V"
    RANK = "rank of an adapter"


Dim = tuple[Axis, ...]  # the stretches of one tensor dimension, one after the other
Dims = tuple[Dim, ...]

_D, _F, _V, _R = (Axis.EMBD,), (Axis.MLP,), (Axis.VOCAB,), (Axis.RANK,)
_QKV = (Axis.QUERY, Axis.KEY, Axis.VALUE)

_MODEL: Mapping[str, Dims] = {
    "lm_head.weight": (_V, _D),
    "lm_head.bias": (_V,),
    "transformer.wte.weight": (_V, _D),
    "transformer.ln_f.weight": (_D,),
    "transformer.ln_f.bias": (_D,),
}
_BLOCK: Mapping[str, Dims] = {
    **{
        f"{norm}.{kind}": (_D,)
        for norm in ("norm_1", "norm_2", "post_attention_norm", "post_mlp_norm")
        for kind in ("weight", "bias")
    },
    "attn.qkv.weight": (_QKV, _D),
    "attn.qkv.bias": (_QKV,),
    "attn.proj.weight": (_D, (Axis.HEADS,)),
    "attn.proj.bias": (_D,),
    **{f"mlp.{name}.weight": (_F, _D) for name in ("fc", "fc_1", "fc_2")},
    **{f"mlp.{name}.bias": (_F,) for name in ("fc", "fc_1", "fc_2")},
    "mlp.proj.weight": (_D, _F),
    "mlp.proj.bias": (_D,),
    **{f"shortcut_{at}.weight": (_D, _D) for at in (1, 2)},
    **{f"{part}.map.weight": (_D, _D) for part in PARTS},
    **{f"{part}.map.bias": (_D,) for part in PARTS},
}
_WHOLE = Block(1, 1, 1, 1)
_QK_NORM: Mapping[str, Mapping[str, Dim]] = {
    "default": {"norm_q": (Axis.CHANNEL,), "norm_k": (Axis.CHANNEL,)},
    "olmo2": {"norm_q": (Axis.QUERY,), "norm_k": (Axis.KEY,)},
}


@dataclass(frozen=True)
class Selection:
    """Which entries of one layer are kept, in which order.

    Attributes:
        embd: residual stream channels.
        neurons: MLP neurons.
        groups: query groups.
        heads: for each kept group, its heads counted inside the group, 0..H/G-1.
        qk_channels: for each kept group, channels of query and key.
        value_channels: for each kept group, channels of value and attention output.
        rank: rank of the adapters, whose first entries are kept; None for all.
    """

    embd: Sequence[int]
    neurons: Sequence[int]
    groups: Sequence[int]
    heads: Sequence[Sequence[int]]
    qk_channels: Sequence[Sequence[int]]
    value_channels: Sequence[Sequence[int]]
    rank: int | None = None


def split_layer(name: str) -> tuple[int | None, str]:
    """`transformer.h.3.attn.proj.weight` -> (3, `attn.proj.weight`), others -> (None, name)."""
    if name.startswith("transformer.h."):
        layer, _, rest = name[len("transformer.h.") :].partition(".")
        if layer.isdigit() and rest:
            return int(layer), rest
    return None, name


def dims(name: str, config: Any) -> Dims:
    """The axes of a parameter, also of litgpt's LoRA layers.

    Args:
        name: parameter name as in `litgpt.GPT.state_dict()`.
        config: `litgpt.Config` or `litgpt.lora.Config`.

    Raises:
        ConfigError: for a parameter that the table does not hold.
    """
    layer, rest = split_layer(name)
    return _dims(rest, layer is not None, config, name)


def _dims(rest: str, in_block: bool, config: Any, name: str) -> Dims:
    table = _BLOCK if in_block else _MODEL
    if rest in table:
        return table[rest]
    owner, _, kind = rest.rpartition(".")
    if in_block and owner in ("attn.norm_q", "attn.norm_k"):
        return (_QK_NORM[config.norm_qk_type][owner[len("attn.") :]],)
    if owner.endswith(".linear"):  # LoRALinear keeps the frozen weight one level deeper
        return _dims(f"{owner[: -len('.linear')]}.{kind}", in_block, config, name)
    weight = table.get(f"{owner}.weight")
    if weight and kind == "lora_A":  # one below the other for query, key and value
        return (_R * len(_enabled(weight[0], config)), weight[1])
    if weight and kind == "lora_B":
        return (_enabled(weight[0], config), _R)
    raise ConfigError(f"parameter {name!r} of model {config.name!r} is not in the axes table")


def _enabled(rows: Dim, config: Any) -> Dim:
    """Rows of lora_B: litgpt leaves out the parts of qkv that are not adapted."""
    if rows != _QKV:
        return rows
    switches = (config.lora_query, config.lora_key, config.lora_value)
    return tuple(axis for axis, on in zip(rows, switches, strict=True) if on)


def axis_size(axis: Axis, config: Any) -> int:
    """Number of entries of an axis in the model of `config`."""
    rows = config.head_size * (
        config.n_head if axis in (Axis.QUERY, Axis.HEADS) else config.n_query_groups
    )
    return {
        Axis.EMBD: config.n_embd,
        Axis.MLP: config.intermediate_size,
        Axis.CHANNEL: config.head_size,
        Axis.VOCAB: config.padded_vocab_size,
        Axis.RANK: getattr(config, "lora_r", 0),
    }.get(axis, rows)


def dim_size(dim: Dim, config: Any) -> int:
    """Number of entries of one tensor dimension in the model of `config`."""
    return sum(axis_size(axis, config) for axis in dim)


def shape(name: str, config: Any) -> tuple[int, ...]:
    """Shape of a parameter of `litgpt.GPT(config)`, from sizes alone."""
    own = of_layer(config, split_layer(name)[0])
    return tuple(dim_size(dim, own) for dim in dims(name, config))


def parameter_names(config: Any) -> list[str]:
    """Names of all parameters of `litgpt.GPT(config)`, without building it."""
    blocks = getattr(config, "blocks", None) or (_WHOLE,) * config.n_layer
    held = {block: block_parameter_names(config, block) for block in set(blocks)}
    names = _linear("lm_head", config.lm_head_bias) + ["transformer.wte.weight"]
    for layer, block in enumerate(blocks[: config.n_layer]):
        names += [f"transformer.h.{layer}.{name}" for name in held[block]]
    return names + [f"transformer.ln_f.{kind}" for kind in _norm_kinds(config)]


def is_gated(config: Any) -> bool:
    """Whether the MLPs of a litgpt config have two matrices that read, not one."""
    return config.mlp_class_name in ("LLaMAMLP", "GemmaMLP")


def block_parameter_names(config: Any, shape: Block = _WHOLE) -> list[str]:
    """Names of the parameters of one block of `litgpt.GPT(config)`.

    Args:
        config: litgpt config.
        shape: says which parts it has, and of which form.
    """
    norm = _norm_kinds(config)
    block = [f"norm_1.{kind}" for kind in norm if config.norm_1]
    block += _linear("attn.qkv", config.bias or config.attn_bias)
    block += _linear("attn.proj", config.bias)
    if config.norm_qk:
        block += [f"attn.{name}.{kind}" for name in ("norm_q", "norm_k") for kind in norm]
    if config.post_attention_norm:
        block += [f"post_attention_norm.{kind}" for kind in norm]
    if config.norm_2 and not config.shared_attention_norm:
        block += [f"norm_2.{kind}" for kind in norm]
    for part in ("fc_1", "fc_2", "proj") if is_gated(config) else ("fc", "proj"):
        block += _linear(f"mlp.{part}", config.bias)
    if config.post_mlp_norm:
        block += [f"post_mlp_norm.{kind}" for kind in norm]
    if has_shortcuts(config):
        block += ["shortcut_1.weight", "shortcut_2.weight"]
    block += [*_linear("attn.map", config.bias), *_linear("mlp.map", config.bias)]
    return [name for name in block if is_in(shape, name, config)]


def is_in(block: Block, name: str, config: Any) -> bool:
    """Whether a block has a module or parameter, such as `attn.qkv.weight`.

    Without attention its norms are gone with it, so that the residual stream stays exactly what it
    was: a norm with a bias would add that. A norm that attention and MLP share stays for either.
    A matrix in place of a part stands between the same norms.
    """
    owner, _, rest = name.partition(".")
    if owner == "norm_1" and config.shared_attention_norm:
        return any(block)
    if owner in ("norm_1", "attn", "post_attention_norm"):
        size, form = block.n_head, block.attn
    else:
        size, form = block.intermediate_size, block.mlp
    if owner in PARTS and rest:
        return form == LINEAR if rest.startswith("map.") else bool(size)
    return bool(size) or form == LINEAR


def norms(config: Any) -> list[str]:
    """Weights of all norms over residual stream channels, in the order of the forward pass."""
    kinds = ("norm_1", "post_attention_norm", "norm_2", "post_mlp_norm")
    named = set(parameter_names(config))
    ordered = [f"transformer.h.{n}.{kind}.weight" for n in range(config.n_layer) for kind in kinds]
    return [name for name in [*ordered, "transformer.ln_f.weight"] if name in named]


def norm_before(name: str, config: Any) -> str | None:
    """Weight of the norm whose output a weight multiplies; None where it reads something else."""
    layer, rest = split_layer(name)
    if name == "lm_head.weight":
        return "transformer.ln_f.weight"
    if layer is None or not rest.endswith(".weight"):
        return None
    part = rest.removesuffix(".weight")
    if part in ("attn.qkv", "attn.map"):
        return f"transformer.h.{layer}.norm_1.weight"
    if part in ("mlp.fc", "mlp.fc_1", "mlp.fc_2", "mlp.map"):
        norm = "norm_1" if config.shared_attention_norm else "norm_2"
        return f"transformer.h.{layer}.{norm}.weight"
    return None


def has_unit_offset(config: Any) -> bool:
    """Whether a norm multiplies by 1 + its weight, as litgpt's Gemma does."""
    return config.norm_class_name == "RMSNorm" and "Gemma" in config.name


def _linear(name: str, bias: bool) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"] if bias else [f"{name}.weight"]


def _norm_kinds(config: Any) -> list[str]:
    """Parameters of a norm: litgpt gives OLMo's LayerNorm none."""
    if config.norm_class_name == "RMSNorm":
        return ["weight"]
    return [] if "OLMo" in config.name else ["weight", "bias"]


def has_shortcuts(config: Any) -> bool:
    """Whether residual connections are matrices; litgpt's own `Config` has no such field."""
    return getattr(config, "shortcuts", False)


def is_tied(config: Any) -> bool:
    """Whether one table is the embedding and the head; litgpt's own `Config` has no such field."""
    return getattr(config, "tie_word_embeddings", False)


def stored_names(config: Any) -> list[str]:
    """Names of all parameters, without the token table where the head is the same table."""
    tied = is_tied(config)
    return [n for n in parameter_names(config) if not (tied and n == "transformer.wte.weight")]


def num_params(config: Any) -> int:
    """Parameters of `litgpt.GPT(config)`; a table that is also the head counts once."""
    return sum(math.prod(shape(name, config)) for name in stored_names(config))


def prefix_selection(
    n_embd: int,
    block: Block,
    config: Any,
    head_channels: HeadChannels = HeadChannels.rope,
    *,
    rank: int | None = None,
) -> Selection:
    """What a block keeps: the first entries of everything.

    Smaller heads keep every s-th rotary pair (base^(-2(js)/n) =
    base^(-2j/n') with s = n / n'), or their first channels with `HeadChannels.first`.
    """
    qk = qk_channels(block.head_size, config, head_channels)
    groups = range(block.n_query_groups)
    return Selection(
        embd=range(n_embd),
        neurons=range(block.intermediate_size),
        groups=groups,
        heads=[range(block.n_head // max(1, len(groups)))] * len(groups),
        qk_channels=[qk] * len(groups),
        value_channels=[range(block.head_size)] * len(groups),
        rank=rank,
    )


def qk_channels(head_size: int, config: Any, head_channels: HeadChannels) -> Sequence[int]:
    """Query and key channels that a head of `head_size` channels keeps."""
    if head_channels is HeadChannels.first or head_size in (0, config.head_size):
        return range(head_size)
    n, kept = config.rope_n_elem, rope_n_elem(config, head_size)
    unrotated = list(range(n, n + head_size - kept))
    if kept == 0:
        return unrotated
    pairs = range(0, n // 2, n // kept)
    # litgpt rotates channel j with channel j + n/2, unless pairs are interleaved.
    if config.rope_interleave:
        return [channel for j in pairs for channel in (2 * j, 2 * j + 1)] + unrotated
    return [*pairs, *(j + n // 2 for j in pairs), *unrotated]


def kept_entries(dim: Dim, selection: Selection, config: Any) -> Sequence[int] | None:
    """Entries of one tensor dimension that a selection keeps, in its order.

    Returns:
        None where all entries stay (vocabulary, and rank unless it is chosen), a `range` where the
        axis says so, else a list of indices into the dimension of the full tensor.
    """
    if dim == _V or (Axis.RANK in dim and selection.rank is None):
        return None
    if len(dim) == 1:
        return _axis_entries(dim[0], selection, config)
    found, offset = [], 0
    for axis in dim:
        found += [offset + entry for entry in _axis_entries(axis, selection, config)]
        offset += axis_size(axis, config)
    return found


def _axis_entries(axis: Axis, selection: Selection, config: Any) -> Sequence[int]:
    if axis is Axis.EMBD:
        return selection.embd
    if axis is Axis.MLP:
        return selection.neurons
    if axis is Axis.RANK:
        return range(selection.rank or 0)
    if axis is Axis.CHANNEL:
        assert len({tuple(channels) for channels in selection.qk_channels}) == 1
        return selection.qk_channels[0]
    by_value = axis in (Axis.VALUE, Axis.HEADS)
    channels = selection.value_channels if by_value else selection.qk_channels
    size = config.head_size
    if axis in (Axis.KEY, Axis.VALUE):
        rows = zip(selection.groups, channels, strict=True)
        return [group * size + channel for group, chosen in rows for channel in chosen]
    per_group = config.n_head // config.n_query_groups
    rows = zip(selection.groups, selection.heads, channels, strict=True)
    return [
        (group * per_group + head) * size + channel
        for group, heads, chosen in rows
        for head in heads
        for channel in chosen
    ]


def prefix_length(entries: Sequence[int]) -> int | None:
    """Length of `entries` if they are exactly the first ones (a view will do), else None."""
    first = range(len(entries))
    return len(entries) if entries == first or list(entries) == list(first) else None
