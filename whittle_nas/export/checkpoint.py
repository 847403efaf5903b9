"""A sub-network of a super-network's checkpoint as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.export.engines import engine_notes
from whittle_nas.export.hf import HFTarget, hf_target, write_hf, write_hf_config
from whittle_nas.export.model_card import model_card
from whittle_nas.export.packed import Packing, packing_notes, pruned_sentences, read_packing
from whittle_nas.progress import Progress, no_progress
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import Checkpoint, write_checkpoint
from whittle_nas.weights.patch import Patch, patched
from whittle_nas.weights.slicing import SlicePlan, plan_slices, take


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
    """

    source: Checkpoint
    slices: SlicePlan
    to_hf: bool
    target: HFTarget | None
    notes: tuple[str, ...] = ()
    patch: Patch = Patch()
    after: str = ""
    packing: Packing | None = None


def plan_export(
    source: Checkpoint, sub: SubNetwork, *, to_hf: bool = False, quantize: str | None = None
) -> ExportPlan:
    """Resolve an export.

    Args:
        source: the super-network's checkpoint.
        sub: what is taken of it.
        to_hf: write it for transformers.
        quantize: write packed integers, by a scheme of `packed.SCHEMES`; for transformers only.

    Raises:
        ConfigError: if the sizes do not fit the model, no Hugging Face architecture has them, or
            the weights are not quantised that way.
    """
    info = source.info
    slices = plan_slices(sub, source.config, head_channels=info.head_channels, norms=info.norms)
    if sub.sizes() is None:
        raise ConfigError(
            f"--format {'hf' if to_hf else 'litgpt'}: its config has one size for all blocks, and "
            f"those of this sub-network differ ({sub}); nas evaluate runs it as it is"
        )
    after, pruned = pruned_sentences(source.path)
    if to_hf:
        target = hf_target(slices.config)
        notes = engine_notes(target.model_type, slices.config, tied=source.tied)
        packing = None if quantize is None else _packing(source, slices, target, quantize)
        if packing is not None:
            notes += packing_notes(packing, source.config)
        notes = (*target.notes, *notes, *pruned)
        return ExportPlan(source, slices, True, target, notes, after=after, packing=packing)
    target = _described(slices)
    notes = () if target else ("there is no config.json, which `litgpt evaluate` asks for",)
    return ExportPlan(source, slices, False, target, (*notes, *pruned), after=after)


def _packing(source: Checkpoint, slices: SlicePlan, target: HFTarget, scheme: str) -> Packing:
    if slices.sub != SubNetwork.from_config(source.config):
        raise ConfigError(
            f"--quantize {scheme} packs a whole checkpoint: export the sub-network first, quantise "
            "that with nas prune, and export the result"
        )
    return read_packing(source.path, source.config, target, scheme)


def _described(slices: SlicePlan) -> HFTarget | None:
    try:
        target = hf_target(slices.config)
    except ConfigError:
        return None  # litgpt needs no config.json, so sizes that transformers lacks may pass
    # With a folded query scale config.json would describe other weights than these.
    return target if target.query_scale == 1 else None


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
    source, config = planned.source.path, planned.slices.config
    stored = planned.source.state_dict()
    tensors = LazySlices(planned.slices, stored, None if planned.to_hf else dtype)
    tensors = patched(tensors, planned.patch)
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
        library="transformers" if planned.to_hf else "litgpt",
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

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = take(self._tensors[self._plan.source_name(name)], self._plan.cut(name))
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
