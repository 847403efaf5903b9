"""Sub-network weights as slices of the super-network's, and the sub-network's own config."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.space.rules import check, check_supported, of_layer
from whittle_nas.space.subnetwork import LINEAR, PARTS, Block, HeadChannels, SubNetwork
from whittle_nas.weights import axes
from whittle_nas.weights.config import extended
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.norms import NormTable

Index = int | torch.Tensor | None  # first entries | these entries | all


@dataclass(frozen=True)
class Cut:
    """How to take a slice out of a full tensor; ready to run thousands of times.

    Attributes:
        narrows: (dimension, length): keep the first entries, as a view.
        gathers: (dimension, ids): keep these entries, as a copy.
        strip: (count, step, length) if the only gather keeps the first `length` of every `step`
            entries, `count` times, as grouped heads do: a view with one more dimension.
        factor: what the slice is multiplied with, None for 1.
        shift: what is added then.
    """

    narrows: tuple[tuple[int, int], ...]
    gathers: tuple[tuple[int, torch.Tensor], ...]
    strip: tuple[int, int, int] | None = None
    factor: float | None = None
    shift: float = 0.0

    @property
    def copies(self) -> bool:
        """Whether a view of the full tensor does not do."""
        return bool(self.gathers) or self.factor is not None


@dataclass(frozen=True)
class BlockPlan:
    """One block of a sub-network.

    Attributes:
        layer: id of the super-network's layer that it is a part of.
        shape: its sizes.
        config: litgpt config of a model of this block alone; a part that the block lacks has the
            sizes of the whole model there.
        selection: the entries that it keeps.
    """

    layer: int
    shape: Block
    config: Any
    selection: axes.Selection


@dataclass(frozen=True)
class SlicePlan:
    """Everything that running or extracting one sub-network needs besides the weights.

    Attributes:
        sub: the sub-network.
        config: its litgpt config. Where blocks differ, the sizes of blocks in it are those of the
            whole model, but for a head size that all have in common.
        blocks: its blocks; block i of the sub-network is `blocks[i]`.
        selection: what is kept outside the blocks.
        full_config: the super-network's config.
        norms: factors of the norms of narrower networks, None if there are none.
    """

    sub: SubNetwork
    config: Any
    blocks: tuple[BlockPlan, ...]
    selection: axes.Selection
    full_config: Any
    norms: NormTable | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Ids of the kept layers, ascending."""
        return tuple(block.layer for block in self.blocks)

    def factor(self, name: str) -> float | None:
        """What the slice of a tensor is multiplied with, None for 1."""
        return self.norms and self.norms(self.source_name(name), self.sub.n_embd)

    def source_name(self, name: str) -> str:
        """The super-network's name of a parameter of the sub-network."""
        layer, rest = axes.split_layer(name)
        return name if layer is None else f"transformer.h.{self.blocks[layer].layer}.{rest}"

    def kept_name(self, name: str) -> str | None:
        """The sub-network's name of a parameter of the super-network; None if it is dropped."""
        layer, rest = axes.split_layer(name)
        if layer is None:
            return name
        at = next((at for at, block in enumerate(self.blocks) if block.layer == layer), None)
        if at is None or not axes.is_in(self.blocks[at].shape, rest, self.full_config):
            return None
        return f"transformer.h.{at}.{rest}"

    def info_of(self, info: SupernetInfo) -> SupernetInfo:
        """How smaller sub-networks are cut from the extracted one, as they are from the whole."""
        order = tuple(self.layers.index(at) for at in info.layer_order if at in self.layers)
        norms = {name: self.source_name(name) for name in self.parameter_names()}
        return SupernetInfo(
            layer_order=order,
            head_channels=info.head_channels,
            norms=info.norms and info.norms.of_slice(norms, self.sub.n_embd),
        )

    def parameter_names(self) -> list[str]:
        """Names of all parameters of the sub-network as a plain litgpt model."""
        return axes.parameter_names(self.own_config)

    def maps(self) -> list[str]:
        """Names of its matrices in place of parts that the super-network has."""
        found = []
        for at, block in enumerate(self.blocks):
            whole = self.whole(block)
            known = ("", "") if whole is None else whole.forms
            for part, form, own in zip(PARTS, block.shape.forms, known, strict=True):
                if form == LINEAR != own:
                    names = axes.block_parameter_names(self.full_config, block.shape)
                    prefix = f"{part}.map."
                    found += [f"transformer.h.{at}.{n}" for n in names if n.startswith(prefix)]
        return found

    def indices(self, name: str, device: torch.device | None = None) -> tuple[Index, ...]:
        """For each dimension of a parameter: which entries it keeps."""
        return tuple(_index(entries, device) for entries in self._entries(name))

    def _entries(self, name: str) -> list[Sequence[int] | None]:
        """For each dimension of a parameter the entries that it keeps, None for all."""
        layer, _ = axes.split_layer(name)
        selection = self.selection if layer is None else self.blocks[layer].selection
        full = self._full(name)
        return [
            axes.kept_entries(dim, selection, full) for dim in axes.dims(name, self.full_config)
        ]

    def _full(self, name: str) -> Any:
        """The super-network's config, with the sizes of the layer that a parameter came from."""
        return of_layer(self.full_config, axes.split_layer(self.source_name(name))[0])

    def cut(self, name: str, device: torch.device | None = None) -> Cut:
        """How to slice the full parameter; dimensions that stay whole need no step."""
        narrows, gathers, strips = [], [], []
        full = self._full(name)
        sizes = [axes.dim_size(dim, full) for dim in axes.dims(name, self.full_config)]
        for dim, entries in enumerate(self._entries(name)):
            index = _index(entries, device)
            if isinstance(index, torch.Tensor):
                gathers.append((dim, index))
                strips.append(_strip(entries or (), sizes[dim]))  # no device is waited for
            elif index is not None and index != sizes[dim]:
                narrows.append((dim, index))
        strip = strips[0] if len(strips) == 1 else None
        factor = self.factor(name)
        # A norm that multiplies by 1 + w has (1 + w) c = 1 + (w c + c - 1).
        shift = factor - 1 if factor and axes.has_unit_offset(self.full_config) else 0.0
        return Cut(tuple(narrows), tuple(gathers), strip, factor, shift)

    def cuts(self, device: torch.device | None = None) -> Callable[[str], Cut]:
        """As `cut`, computed once for all layers of one shape."""
        known: dict[Any, Cut] = {}

        def cut(name: str) -> Cut:
            layer, rest = axes.split_layer(name)
            block = None if layer is None else self.blocks[layer]
            key = (rest, block and (block.shape, self.whole(block)), self.factor(name))
            if key not in known:
                known[key] = self.cut(name, device)
            return known[key]

        return cut

    def whole(self, block: BlockPlan) -> Block | None:
        """The block of the super-network, where its layers have sizes of their own."""
        own = getattr(self.full_config, "blocks", None)
        return None if own is None else own[block.layer]

    @property
    def own_config(self) -> Any:
        """As `config`, with the sizes of every layer where they differ: for its own checkpoint."""
        blocks = tuple(block.shape.plain for block in self.blocks)
        if SubNetwork(self.sub.n_embd, blocks).sizes() is not None:
            return self.config
        return extended(self.config, blocks=blocks)

    @property
    def is_uniform(self) -> bool:
        """Whether all blocks have the same modules, those of litgpt's config."""
        return getattr(self.own_config, "blocks", None) is None


def plan_slices(
    sub: SubNetwork,
    config: Any,
    *,
    head_channels: HeadChannels = HeadChannels.rope,
    norms: NormTable | None = None,
    rank: int | None = None,
) -> SlicePlan:
    """Resolve a sub-network of the model of `config`.

    Args:
        sub: the sub-network.
        config: the super-network's `litgpt.Config` (or `litgpt.lora.Config`).
        head_channels: how a smaller head chooses its query and key channels.
        norms: factors of the norms of narrower networks.
        rank: of its adapters, for a `litgpt.lora.Config`; None for all that there is.

    Raises:
        ConfigError: if it does not fit, naming each violated rule.
    """
    check_supported(config)
    check(sub, config, head_channels)
    whole = getattr(config, "blocks", None)
    known: dict[Any, BlockPlan] = {}
    blocks = []
    for layer in sub.layers:
        shape = sub.blocks[layer]
        assert shape is not None
        kinds = (values and values[layer] for values in per_layer(config).values())
        key = (shape, whole and whole[layer], *kinds)
        if key not in known:
            full = of_layer(config, layer)
            alone = sub_config(SubNetwork(sub.n_embd, (shape,)), full, [layer], rank=rank)
            selection = axes.prefix_selection(sub.n_embd, shape, full, head_channels, rank=rank)
            known[key] = BlockPlan(layer, shape, alone, selection)
        blocks.append(replace(known[key], layer=layer))
    return SlicePlan(
        sub=sub,
        config=sub_config(sub, config, sub.layers, rank=rank),
        blocks=tuple(blocks),
        selection=blocks[0].selection,
        full_config=config,
        norms=norms,
    )


def sub_config(
    sub: SubNetwork, config: Any, layers: Sequence[int], *, rank: int | None = None
) -> Any:
    """The litgpt config of a sub-network.

    The name stays, since litgpt chooses Gemma's and OLMo's norms, converters and prompt styles by
    it. The attention scale stays 1/sqrt(full head size); per-layer settings are re-indexed. An
    adapter of a smaller rank keeps the scale alpha / r, too, so that its update is a part of the
    whole one.
    """
    changed: dict[str, Any] = {"n_embd": sub.n_embd, "n_layer": len(layers)}
    if rank is not None:
        changed |= {"lora_r": rank, "lora_alpha": config.lora_alpha * rank / config.lora_r}
    if hasattr(config, "blocks"):
        changed["blocks"] = None
    with_heads = {shape[:3] for shape in sub.shapes if shape.n_head}
    widths = {shape.intermediate_size for shape in sub.shapes} - {0}
    if len({heads[2] for heads in with_heads}) == 1:
        changed["head_size"] = next(iter(with_heads))[2]
    if len(with_heads) == 1:
        changed["n_head"], changed["n_query_groups"], _ = next(iter(with_heads))
    if len(widths) == 1:
        changed["intermediate_size"] = next(iter(widths))
    smaller_heads = any(heads[2] != config.head_size for heads in with_heads)
    if smaller_heads and config.attention_scores_scalar is None:
        changed["attention_scores_scalar"] = config.head_size
    for name, values in per_layer(config).items():
        if values is not None:
            changed[name] = [values[layer] for layer in layers]
    return replace(config, **changed)


def per_layer(config: Any) -> dict[str, Any]:
    """Settings that have one value per layer."""
    return {name: getattr(config, name) for name in ("sliding_window_indices", "rope_indices")}


def take(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The entries of `tensor` that a cut keeps: a view, unless one dimension needs a gather."""
    for dim, length in cut.narrows:
        tensor = tensor.narrow(dim, 0, length)
    for dim, index in cut.gathers:  # after narrowing, so that less is copied
        tensor = tensor.index_select(dim, index)
    return _scaled(tensor, cut)


def view_of(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    """The part of `take` that copies nothing; `copied` is the rest."""
    for dim, length in cut.narrows:
        tensor = tensor.narrow(dim, 0, length)
    if cut.strip is not None:
        dim, (count, step, length) = cut.gathers[0][0], cut.strip
        tensor = tensor.narrow(dim, 0, count * step).unflatten(dim, (count, step))
        tensor = tensor.narrow(dim + 1, 0, length)
    return tensor


def copied(view: torch.Tensor, cut: Cut) -> torch.Tensor:
    """What `take` gives, from `view_of`: one strided copy where the entries are regular.

    Half the time of `index_select` for the columns of grouped heads; with a gradient it is the
    other way round, so `take` does not use it.
    """
    if cut.strip is not None:
        view = view.flatten(cut.gathers[0][0], cut.gathers[0][0] + 1)
    else:
        for dim, index in cut.gathers:
            view = view.index_select(dim, index)
    return _scaled(view, cut)


def _scaled(tensor: torch.Tensor, cut: Cut) -> torch.Tensor:
    if cut.factor is None:
        return tensor
    return tensor * cut.factor + cut.shift if cut.shift else tensor * cut.factor


def slice_state_dict(
    plan: SlicePlan, tensors: Mapping[str, torch.Tensor], names: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """State dict of a sub-network, as views of `tensors` wherever possible.

    Args:
        plan: the resolved sub-network.
        tensors: the super-network's parameters by litgpt name.
        names: parameters of the sub-network; default: those of a plain `litgpt.GPT`.
    """
    names = plan.parameter_names() if names is None else names
    cuts: dict[torch.device, Callable[[str], Cut]] = {}
    found = {}
    for name in names:
        tensor = tensors.get(plan.source_name(name))
        if tensor is None:
            found[name] = blank(plan, tensors, name)
            continue
        cut = cuts.setdefault(tensor.device, plan.cuts(tensor.device))
        found[name] = take(tensor, cut(name))
    return found


def blank(plan: SlicePlan, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Zeros for a matrix in place of a part that the super-network has: a patch gives its values.

    Raises:
        KeyError: for any other parameter that is not there.
    """
    if name not in plan.maps():
        raise KeyError(plan.source_name(name))
    block = plan.source_name(name).removesuffix(axes.split_layer(name)[1])
    like = tensors[next(known for known in tensors if known.startswith(block))]  # on its device
    return like.new_zeros(axes.shape(name, plan.own_config))


def check_forms(plan: SlicePlan, given: Collection[str]) -> None:
    """Refuse a network whose parts have other forms than the super-network's, without weights.

    Args:
        plan: of the network.
        given: names of the tensors that its patch gives.

    Raises:
        ConfigError: naming one, and where they are found.
    """
    for at, block in enumerate(plan.blocks):
        whole = plan.whole(block)
        known = ("", "") if whole is None else whole.forms
        for part, form, own in zip(PARTS, block.shape.forms, known, strict=True):
            prefix = f"transformer.h.{at}.{part}."
            if form not in ("", own) and not any(name.startswith(prefix) for name in given):
                raise ConfigError(
                    f"layer {block.layer} has a {form} {part}, which only a library of candidates "
                    "holds: name the network by a file of the search that chose it, and do not "
                    "repair it"
                )


def _index(entries: Sequence[int] | None, device: torch.device | None) -> Index:
    if entries is None:
        return None
    length = axes.prefix_length(entries)
    return torch.tensor(entries, device=device) if length is None else length


def _strip(entries: Sequence[int], size: int) -> tuple[int, int, int] | None:
    """(count, step, length) of entries 0..length-1, step..step+length-1, ...; None if irregular.

    Also None if the last of the strips is not whole: query and value rows of a single group can
    look regular although the dimension ends after the value rows.
    """
    length = next((at for at, entry in enumerate(entries) if entry != at), len(entries))
    if not 0 < length < len(entries) or len(entries) % length:
        return None
    step, count = entries[length], len(entries) // length
    regular = [at * step + entry for at in range(count) for entry in range(length)]
    return (count, step, length) if list(entries) == regular and count * step <= size else None
