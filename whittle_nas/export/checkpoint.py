"""A sub-network of a super-network's checkpoint as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.export.deci import Engine, check_engines, is_llama, with_equal_heads
from whittle_nas.export.engines import engine_notes
from whittle_nas.export.hf import HFTarget, hf_target, write_hf, write_hf_config
from whittle_nas.export.model_card import Use, model_card
from whittle_nas.export.packed import Packing, packing_notes, pruned_sentences, read_packing
from whittle_nas.export.padding import Padded, Padding, alike, plan_padding
from whittle_nas.progress import Progress, no_progress
from whittle_nas.space import SubNetwork
from whittle_nas.space.subnetwork import COMPRESSED
from whittle_nas.weights.axes import num_params
from whittle_nas.weights.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.pages import release
from whittle_nas.weights.patch import Patch, patched
from whittle_nas.weights.slicing import SlicePlan, blank, check_forms, plan_slices, take


@dataclass(frozen=True)
class ExportPlan:
    """What will be written; made before any work, so that refusals come first.

    Attributes:
        source: the super-network's checkpoint.
        slices: which of its entries stay.
        to_hf: whether it is written for transformers, or for litgpt.
        target: what `config.json` will say; None if it would not describe litgpt's weights.
        notes: what a user may want to know, one sentence each.
        patch: tensors that differ from the slices.
        after: what was done to the sub-network after the cut, a sentence for the model card.
        packing: of quantised weights, where their integers are written.
        padding: how its layers are filled up with zeros to one size, None if they stay.
    """

    source: Checkpoint
    slices: SlicePlan
    to_hf: bool
    target: HFTarget | None
    notes: tuple[str, ...] = ()
    patch: Patch = Patch()
    after: str = ""
    packing: Packing | None = None
    padding: Padding | None = None

    @property
    def config(self) -> Any:
        """litgpt's config of what is written."""
        return self.slices.own_config if self.padding is None else self.padding.config

    @property
    def use(self) -> Use:
        """What reads it."""
        if self.to_hf:
            return Use.remote if self.target and self.target.code else Use.transformers
        equal = self.padding is not None or self.slices.is_uniform
        return Use.litgpt if equal else Use.nas


def plan_export(
    source: Checkpoint,
    sub: SubNetwork,
    *,
    to_hf: bool = False,
    quantize: str | None = None,
    pad: bool = False,
    targets: Collection[Engine] = (),
) -> ExportPlan:
    """Resolve an export.

    Args:
        source: the super-network's checkpoint.
        sub: what is taken of it.
        to_hf: write it for transformers.
        quantize: write packed integers, by a scheme of `packed.SCHEMES`; for transformers only.
        pad: fill layers of different sizes up with zeros, as far as the format needs it.
        targets: what must run it, where layers differ in size and it is for transformers.

    Raises:
        ConfigError: if the sizes do not fit the model, no Hugging Face architecture has them, or
            the weights are not quantised that way.
    """
    info = source.info
    slices = plan_slices(sub, source.config, head_channels=info.head_channels, norms=info.norms)
    padding = None
    if pad and not slices.is_uniform:
        by_layer = to_hf and is_llama(slices.config)
        enlarge = (
            partial(with_equal_heads, n_embd=sub.n_embd, engines=targets) if by_layer else alike
        )
        padding = plan_padding(slices, enlarge)
        if padding.outer.blocks == tuple(block.shape.plain for block in slices.blocks):
            padding = None  # they are what the format wants
    after, pruned = pruned_sentences(source.path)
    plan = ExportPlan(source, slices, to_hf, None, after=after, padding=padding)
    shape = _shape_notes(slices, padding)
    if to_hf:
        target = hf_target(plan.config)
        check_engines(plan.config, targets, padded=padding is not None)
        notes = engine_notes(target.model_type, plan.config, tied=source.tied)
        packing = None if quantize is None else _packing(source, slices, target, quantize)
        if packing is not None:
            notes += packing_notes(packing, source.config)
        notes = (*shape, *target.notes, *notes, *pruned)
        return replace(plan, target=target, notes=notes, packing=packing)
    if plan.use is Use.nas:
        return replace(plan, notes=(*shape, *pruned))
    target = _described(plan.config)
    notes = () if target else ("there is no config.json, which `litgpt evaluate` asks for",)
    return replace(plan, target=target, notes=(*shape, *notes, *pruned))


def _shape_notes(slices: SlicePlan, padding: Padding | None) -> tuple[str, ...]:
    forms = {form for block in slices.blocks for form in block.shape.forms}
    dense = (f"weights that are {' or '.join(sorted(forms & {*COMPRESSED}))} are stored dense",)
    notes = dense if forms & {*COMPRESSED} else ()
    if slices.is_uniform:
        return notes
    if padding is None:
        return (*notes, "its layers differ in size")
    own, whole = parameter_counter(slices.full_config)(slices.sub), num_params(padding.config)
    equal = padding.outer.sizes() is not None
    return (
        *notes,
        f"its layers are filled up with zeros to {padding.outer}: {whole:,} parameters are stored "
        f"and computed with for {own:,}"
        f"{', so nothing is saved' if equal else ''}",
    )


def _packing(source: Checkpoint, slices: SlicePlan, target: HFTarget, scheme: str) -> Packing:
    if slices.sub != SubNetwork.from_config(source.config):
        raise ConfigError(
            f"--quantize {scheme} packs a whole checkpoint: export the sub-network first, quantise "
            "that with nas prune, and export the result"
        )
    return read_packing(source.path, source.config, target, scheme)


def _described(config: Any) -> HFTarget | None:
    try:
        target = hf_target(config)
    except ConfigError:
        return None  # litgpt needs no config.json, so sizes that transformers lacks may pass
    # With a folded query scale config.json would describe other weights than these.
    return target if target.query_scale == 1 else None


def describe(folder: Path) -> None:
    """Write `config.json` beside a litgpt checkpoint, where an architecture has such a model.

    Raises:
        ConfigError: if the folder holds no checkpoint.
    """
    found = open_checkpoint(folder, per_layer=True)
    uniform = getattr(found.config, "blocks", None) is None
    if uniform and (target := _described(found.config)) is not None:
        write_hf_config(folder, target, found.state_dict(), source=folder)


def write_export(
    out_dir: Path,
    planned: ExportPlan,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> None:
    """Fill an empty directory with the exported model.

    Args:
        out_dir: existing directory.
        planned: what to write.
        dtype: number format of the weights; default: as stored.
        progress: shows the tensors that are written.

    Raises:
        ConfigError: if the checkpoint's weights are corrupt.
    """
    source, config = planned.source.path, planned.config
    check_forms(planned.slices, planned.patch.names())
    stored = planned.source.state_dict()
    tensors = LazySlices(planned.slices, stored, None if planned.to_hf else dtype)
    tensors = patched(tensors, planned.patch)
    if planned.padding is not None:
        tensors = Padded(planned.padding, tensors)
    if planned.to_hf:
        way = {"source": source, "dtype": dtype, "packing": planned.packing}
        write_hf(out_dir, config, tensors, **way, progress=progress)
    else:
        write_checkpoint(out_dir, tensors, config=config, source=source, progress=progress)
        if planned.target is not None:
            write_hf_config(out_dir, planned.target, tensors, source=source)
    card = model_card(
        planned.slices,
        planned.source.info,
        source=source,
        use=planned.use,
        notes=planned.notes,
        after=planned.after,
    )
    (out_dir / "README.md").write_text(card, encoding="utf-8")


class LazySlices(Mapping[str, torch.Tensor]):
    """A sub-network's state dict that slices a mapped file when a tensor is asked for."""

    def __init__(
        self,
        plan: SlicePlan,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._plan, self._tensors, self._dtype = plan, tensors, dtype
        self._names = plan.parameter_names()
        self._read: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if self._read is not None:
            release(self._read)  # who writes the tensors one by one is done with it
        self._read = self._tensors.get(self._plan.source_name(name))
        if self._read is None:
            tensor = blank(self._plan, self._tensors, name)
        else:
            tensor = take(self._read, self._plan.cut(name))
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
