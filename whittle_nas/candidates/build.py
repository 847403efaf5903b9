"""A library from a checkpoint: all candidates of a layer are fitted and scored on one stream."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whittle_nas.calibration import Stream
from whittle_nas.calibration.steps import Step, steps
from whittle_nas.candidates.fitting import (
    Fitted,
    Goal,
    Text,
    fit_writer,
    run_equations,
    run_whole,
    slice_equations,
)
from whittle_nas.candidates.library import (
    Candidate,
    Library,
    layer_file,
    read_made,
    write_layer,
)
from whittle_nas.candidates.options import PartTraining
from whittle_nas.candidates.parts import (
    ATTENTION,
    KINDS,
    MLP,
    GridOptions,
    Part,
    Sizes,
    form_of,
    grid,
    is_nothing,
    with_sizes,
)
from whittle_nas.candidates.scoring import alone, blank_maps, block_of, loss_behind
from whittle_nas.candidates.training import train_part
from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.linears import compress_block, watched
from whittle_nas.prune.options import Grid, Method, Sparsity
from whittle_nas.repair.options import RepairOptions
from whittle_nas.space.subnetwork import COMPRESSED, LINEAR
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.identity import fingerprint, tokens_id
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.placement import home_of

Choices = dict[str, list[tuple[Candidate, Patch]]]
Made = dict[str, list[Candidate]]
_LEAST_GROUP = 32  # weights that share a scale; costs count none, which in groups of 4 is far off


@dataclass(frozen=True)
class BuildOptions:
    """How candidates are made.

    Attributes:
        grid: their sizes.
        rank: of the changes of weights; None: any.
        score_blocks: blocks of held-back text on which losses are measured.
        repair: how much text is held back, ridges, sequences per batch.
        train: how parts are trained after their fit.
    """

    grid: GridOptions = field(default_factory=GridOptions)
    rank: int | None = 32
    score_blocks: int = 8
    repair: RepairOptions = field(default_factory=RepairOptions)
    train: PartTraining = field(default_factory=PartTraining)


def compression(form: str, config: Any) -> dict[str, Any]:
    """How `compress_block` makes a form: SparseGPT or GPTQ, of the largest groups that fit.

    Raises:
        ConfigError: if the matrices have no columns for it.
    """
    columns = (config.n_embd, config.n_head * config.head_size, config.intermediate_size)
    least = 4 if form == "2:4" else _LEAST_GROUP
    if unfit := [count for count in columns if count % least]:
        raise ConfigError(
            f"--grid.compressed: {form} needs matrices whose columns are a multiple of {least}, "
            f"and this model has some of {unfit[0]}; leave it out"
        )
    if form == "2:4":
        return {"method": Method.sparsegpt, "sparsity": Sparsity(0.5, (2, 4))}
    bits = int(form.removesuffix("bit"))
    return {"method": Method.gptq, "grid": Grid(bits, group_size=math.gcd(128, *columns))}


def checked_grid(
    checkpoint: Checkpoint, options: BuildOptions, blocks: int
) -> Mapping[str, Sequence[Sizes]]:
    """The sizes of every attention and MLP, and whether they can be made; no weights are read.

    Args:
        checkpoint: of the super-network.
        options: how.
        blocks: of calibration text.

    Raises:
        ConfigError: for sizes that do not fit the model, or too little text.
    """
    found = grid(checkpoint.config, options.grid, checkpoint.info.head_channels)
    for form in _forms(found):
        compression(form, checkpoint.config)
    options.repair.split(blocks)
    return found


def _forms(sizes: Mapping[str, Sequence[Sizes]]) -> list[str]:
    """The compressed forms of a grid."""
    return sorted({form_of(one) for one in sizes[MLP]} & {*COMPRESSED})


class Builder:
    """The whole model's stream, which every layer's candidates learn from."""

    def __init__(
        self, supernet: Any, checkpoint: Checkpoint, tokens: Tensor, options: BuildOptions
    ) -> None:
        """Cut the text into what is fitted and what is held back, and embed it.

        Args:
            supernet: the `SuperNetwork` of the checkpoint.
            checkpoint: where it came from.
            tokens: (N, T + 1) calibration text in blocks.
            options: how.

        Raises:
            ConfigError: for sizes that do not fit the model, or too little text.
        """
        self._net, self._checkpoint, self._options = supernet, checkpoint, options
        self._grid = checked_grid(checkpoint, options, len(tokens))
        size, self._fitted = options.repair.split(len(tokens))
        self._key = {
            "checkpoint": fingerprint(checkpoint.path),
            "text": tokens_id(tokens),
            "grid": {kind: [list(sizes) for sizes in self._grid[kind]] for kind in KINDS},
            "rank": options.rank,
            "score_blocks": options.score_blocks,
            "repair": {**asdict(options.repair), "ridges": list(options.repair.ridges)},
            "train": {**asdict(options.train), "loss": options.train.loss.value},
            "dtype": str(supernet.model.lm_head.weight.dtype),
        }
        self._tokens, self._size = tokens, size
        self._scored = slice(self._fitted, self._fitted + max(1, options.score_blocks // size))
        self._targets = tokens[:, 1:].split(size)[self._scored]
        self._begin()
        self._base = self._loss_of(supernet.model.transformer.h, 0)

    def _begin(self) -> None:
        """Let the text stand before the first layer."""
        model = self._net.model
        device, inputs = model.lm_head.weight.device, self._tokens[:, :-1]
        self._at, self._stream = 0, Stream(model, inputs, batch_size=self._size, device=device)

    def _loss_of(self, blocks: Sequence[Any], layer: int) -> float:
        """Loss on the text that scores, from `layer` on, before which the stream stands."""
        entering = self._stream.states[self._scored]
        with torch.no_grad():
            return loss_behind(self._net, blocks, layer, entering, self._targets)

    def run(
        self,
        out_dir: Path,
        *,
        about: Mapping[str, Any],
        progress: Progress = no_progress,
        on_resume: Callable[[int], None] = lambda _: None,
    ) -> Library:
        """Make all layers; those that an earlier run got done are not made again.

        Args:
            out_dir: existing directory.
            about: what `library.json` says about the text.
            progress: shows the layers.
            on_resume: told how many layers were there.

        Raises:
            ConfigError: if what is there was made in another way, or an activation is not finite.
        """
        depth = self._net.config.n_layer
        found = self.finished(out_dir)
        if found:
            on_resume(len(found))
        missing = [layer for layer in range(depth) if layer not in found]
        for layer in progress(missing, "making candidates", len(missing)):
            found[layer] = self.make(out_dir, layer)
        parts = tuple(Part(layer, kind) for layer in range(depth) for kind in KINDS)
        return Library(
            path=out_dir,
            checkpoint_dir=str(self._checkpoint.path),
            checkpoint=self._key["checkpoint"],
            n_embd=self._net.config.n_embd,
            parts=parts,
            candidates=tuple(tuple(found[part.layer][part.kind]) for part in parts),
            about={"made": {**self._key, "loss": self._base}, "text": dict(about)},
        )

    @torch.no_grad()
    def make(self, out_dir: Path, layer: int) -> Made:
        """Make and write the candidates of a layer.

        The text goes through the layers between the last one and this one; for one that lies
        behind, it starts again before the first.

        Raises:
            ConfigError: if an activation is not finite.
        """
        if layer < self._at:
            self._begin()
        while self._at < layer:
            self._stream.run(self._net.model.transformer.h[self._at], self._at)
            self._at += 1
        self._at = self._net.config.n_layer  # a part of a layer can't be taken back: begin again
        made = self._layer(layer)
        self._at = layer + 1
        write_layer(out_dir, layer, made, key=self._key)
        return {kind: [one for one, _ in made[kind]] for kind in KINDS}

    def finished(self, out_dir: Path) -> dict[int, Made]:
        """The layers that an earlier run got done.

        Raises:
            ConfigError: if they were made in another way.
        """
        files = {layer: layer_file(out_dir, layer) for layer in range(self._net.config.n_layer)}
        found = {}
        for layer, file in files.items():
            if not file.is_file():
                continue
            key, found[layer] = read_made(out_dir, layer)
            changed = [name for name, value in self._key.items() if key.get(name) != value]
            if changed:
                raise ConfigError(
                    f"--out_dir {out_dir} holds layers of a library with another {changed[0]}; "
                    "call it as before to go on, or give --overwrite true"
                )
        return found

    def _layer(self, layer: int) -> Choices:
        """Fit and score the candidates of a layer, and take the stream through it."""
        whole = self._net.model.transformer.h[layer]
        entering = self._stream.states[self._scored]
        own = self._net.full.blocks[layer]
        fitted = self._fit_layer(layer, whole)
        blocks = list(self._net.model.transformer.h)
        found: Choices = {}
        for kind in KINDS:
            found[kind] = [(Candidate(self._grid[kind][0]), Patch())]
            for sizes in self._grid[kind][1:]:
                fit = fitted.get((kind, sizes), Fitted(Patch(), 1.0, None))
                block = with_sizes(own, kind, sizes)
                blocks[layer] = block_of(self._net, layer, block, fit.patch)
                loss = loss_behind(self._net, blocks, layer, entering, self._targets)
                fixed = is_nothing(sizes) or form_of(sizes) in COMPRESSED
                trained = 0 if fixed else self._options.train.steps
                one = Candidate(sizes, loss - self._base, fit.error, fit.ridge, trained)
                found[kind].append((one, fit.patch))
        return found

    def _fit_layer(self, layer: int, whole: Any) -> dict[tuple[str, Sizes], Fitted]:
        model, found = self._net.model, {}
        compressed = self._compressed(layer, whole)
        for step in steps(whole):
            text = Text(self._stream.states, self._fitted)
            goals, self._stream.states = run_whole(model, layer, step, text)
            for kind in step.names():
                for sizes in self._grid[kind][1:]:
                    patch = compressed.get((kind, form_of(sizes)))
                    if patch is not None:
                        where = {"text": text, "goal": goals[kind]}
                        fit = self._as_it_is(layer, kind, sizes, patch, **where)
                        found[kind, sizes] = fit
                    elif not is_nothing(sizes):
                        found[kind, sizes] = self._fit(layer, step, kind, sizes, text, goals[kind])
        return found

    def _compressed(self, layer: int, whole: Any) -> dict[tuple[str, str], Patch]:
        """What takes the place of the matrices of whole parts, by part and form."""
        if not (forms := _forms(self._grid)):
            return {}
        config = self._net.config
        fitted = copy.copy(self._stream)
        fitted.states = self._stream.states[: self._fitted]
        inputs = watched(config, Method.gptq)
        fitted.run(whole, layer, watch=inputs, advance=False)
        found = {}
        for form in forms:
            block, how = copy.deepcopy(whole), compression(form, config)
            made = compress_block(block, inputs, layer=layer, config=config, **how).weights
            for kind in KINDS:
                names = [name for name in made if name.startswith(f"{kind}.")]
                found[kind, form] = Patch({name: made[name] for name in names})
        return found

    def _as_it_is(
        self, layer: int, kind: str, sizes: Sizes, patch: Patch, *, text: Text, goal: Goal
    ) -> Fitted:
        """A part whose weights nothing is fitted to, and what it gets wrong on held-back text."""
        net = self._net
        block = with_sizes(net.full.blocks[layer], kind, sizes)
        step = next(s for s in steps(block_of(net, layer, block, patch)) if kind in s.names())
        _, held = run_equations(net.model, layer, step, kind, text=text, goal=goal)
        return Fitted(patch, float(held.power) / goal.power if goal.power else 0.0, None)

    def _fit(
        self, layer: int, whole: Step, kind: str, sizes: Sizes, text: Text, goal: Goal
    ) -> Fitted:
        net, options = self._net, self._options
        block = with_sizes(net.full.blocks[layer], kind, sizes)
        linear = form_of(sizes) == LINEAR
        start = blank_maps(net, layer, block)
        step = next(s for s in steps(block_of(net, layer, block, start)) if kind in s.names())
        if linear or (kind == ATTENTION and block.head_size < net.config.head_size):
            fit, held = run_equations(net.model, layer, step, kind, text=text, goal=goal)
        else:
            name = f"transformer.h.0.{kind}.proj.weight"
            device = home_of(net.model.transformer.h[layer]) or net.model.cos.device
            kept = net.plan(alone(net, layer, block)).indices(name, device)[1]
            fit, held = slice_equations(whole, kind, goal, kept)
        fitted = fit_writer(
            step,
            kind,
            fit,
            held,
            power=goal.power,
            ridges=options.repair.ridges,
            rank=None if linear else options.rank,
        )
        fitted = replace(fitted, patch=start | fitted.patch)
        if not (options.train.steps and goal.power):  # what gives nothing teaches nothing
            return fitted
        module = block_of(net, layer, block, fitted.patch)
        step = next(s for s in steps(module) if kind in s.names())
        asked = {"text": text, "goal": goal, "options": options.train}
        return train_part(net.model, layer, step, kind, fitted, **asked)
