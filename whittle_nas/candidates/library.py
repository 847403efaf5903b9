"""The library as files: `library.json`, and the tensors of each layer in a file of its own."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from whittle_nas.candidates.parts import (
    ATTENTION,
    KINDS,
    MLP,
    Part,
    Sizes,
    form_of,
    label,
    sizes_of,
    with_sizes,
)
from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_json
from whittle_nas.space.subnetwork import Block, SubNetwork
from whittle_nas.weights.files import PARTIAL, atomic_file, atomic_write_text
from whittle_nas.weights.identity import fingerprint
from whittle_nas.weights.patch import Patch, flat, unflat

FILE_NAME = "library.json"
LAYER_FILES = re.compile(r"layer-\d+\.safetensors")
# What a process that was killed leaves of one: see `atomic_file`.
PARTS_OF_FILES = re.compile(rf"\.{LAYER_FILES.pattern}\.\d+{re.escape(PARTIAL)}")
FORMAT = 1
Solution = tuple[int, ...]  # the chosen candidate of every part


@dataclass(frozen=True)
class Candidate:
    """One way to have a part of the model; the first one of every part is the original.

    Attributes:
        sizes: of the attention or of the MLP.
        loss: by how much the loss of the whole model rises with it, nats per token.
        error: squared error of its output as a share of the output's square (SquareHead).
        ridge: of its fit, None where nothing was fitted.
        steps: of its training.
    """

    sizes: Sizes
    loss: float = 0.0
    error: float = 0.0
    ridge: float | None = None
    steps: int = 0


@dataclass(frozen=True)
class Library:
    """Candidates for every part of one checkpoint.

    Attributes:
        path: its directory.
        checkpoint_dir: the checkpoint that it was made from.
        checkpoint: `identity.fingerprint` of that.
        n_embd: channels of the residual stream, which all networks keep.
        parts: every attention and MLP, in the order of the layers.
        candidates: of every part; the first one is the original.
        about: how it was made, for people.
    """

    path: Path
    checkpoint_dir: str
    checkpoint: str
    n_embd: int
    parts: tuple[Part, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> str:
        """A short hash of `library.json`."""
        return sha256((self.path / FILE_NAME).read_bytes()).hexdigest()[:16]

    @property
    def original(self) -> Solution:
        """The whole model."""
        return (0,) * len(self.parts)

    def space(self) -> dict[str, Any]:
        """The sizes as a search space that `load_space` reads."""
        found: dict[str, set[Block]] = {kind: set() for kind in KINDS}
        for part, choices in self._pairs():
            found[part.kind] |= {with_sizes(None, part.kind, one.sizes) for one in choices}

        def values(kind: str, name: str) -> list[int]:
            return sorted({getattr(block, name) for block in found[kind]})

        # With several groups whole ones go, and then their number says how many heads there are.
        several = max(values(ATTENTION, "n_query_groups")) > 1
        heads = "n_query_groups" if several else "n_head"
        domains = {
            heads: values(ATTENTION, heads),
            "head_size": [size for size in values(ATTENTION, "head_size") if size],
            "intermediate_size": values(MLP, "intermediate_size"),
        }
        varied = [name for name in domains if len(domains[name]) > 1 or self.forms]
        return {**domains, "per_layer": varied}

    @functools.cached_property
    def forms(self) -> frozenset[str]:
        """What makes some candidates more than sizes."""
        found = {form_of(one.sizes) for choices in self.candidates for one in choices}
        return frozenset(found - {""})

    @property
    def is_product(self) -> bool:
        """Whether every member of its space is made of its candidates, and the other way round."""
        return len(self.space()["head_size"]) == 1 and not self.forms

    def _pairs(self) -> Iterator[tuple[Part, tuple[Candidate, ...]]]:
        return zip(self.parts, self.candidates, strict=True)

    @functools.cached_property
    def _places(self) -> dict[tuple[Part, Sizes], int]:
        return {
            (part, one.sizes): at
            for part, choices in zip(self.parts, self.candidates, strict=True)
            for at, one in enumerate(choices)
        }

    def subnetwork(self, solution: Solution) -> SubNetwork:
        """The network of one candidate per part."""
        blocks: list[Block | None] = [None] * (len(self.parts) // len(KINDS))
        for part, choices, j in zip(self.parts, self.candidates, solution, strict=True):
            blocks[part.layer] = with_sizes(blocks[part.layer], part.kind, choices[j].sizes)
        return SubNetwork(self.n_embd, tuple(blocks))

    def solution(self, sub: SubNetwork) -> Solution:
        """Inverse of `subnetwork`.

        Raises:
            ConfigError: if the library has no such parts.
        """
        found = []
        for part in self.parts:
            sizes = sizes_of(sub.blocks[part.layer], part.kind)
            at = self._places.get((part, sizes))
            if at is None or sub.n_embd != self.n_embd:
                raise ConfigError(
                    f"the library {self.path} has no candidate {label(sizes)} for {part.kind} "
                    f"of layer {part.layer}"
                )
            found.append(at)
        return tuple(found)

    def block_patch(self, layer: int, block: Block) -> Patch:
        """What its candidates change in one block, by names in the block."""
        patches = self._layers[layer]
        kinds = (patches.get((kind, sizes_of(block, kind)), Patch()) for kind in KINDS)
        return functools.reduce(Patch.__or__, kinds)

    def patch(self, sub: SubNetwork) -> Patch:
        """What its candidates change in a network, by the network's own names.

        Raises:
            ConfigError: if the library has no such parts, or a file can't be read.
        """
        self.solution(sub)
        found = Patch()
        for at, layer in enumerate(sub.layers):
            block = sub.blocks[layer]
            assert block is not None
            found = found | self.block_patch(layer, block).under(f"transformer.h.{at}.")
        return found

    @functools.cached_property
    def _layers(self) -> list[dict[tuple[str, Sizes], Patch]]:
        return [read_layer(self.path, layer)[2] for layer in range(len(self.parts) // len(KINDS))]


def layer_file(library: Path, layer: int) -> Path:
    """Where the candidates of a layer are."""
    return library / f"layer-{layer:03d}.safetensors"


def write_layer(
    library: Path,
    layer: int,
    candidates: Mapping[str, Sequence[tuple[Candidate, Patch]]],
    *,
    key: Mapping[str, Any],
) -> None:
    """Write the candidates of a layer, at once and under a temporary name first.

    Args:
        library: directory, which exists.
        layer: which.
        candidates: by the kind of part.
        key: everything that they depend on, as plain values.
    """
    tensors, rows = {}, {}
    for kind, choices in candidates.items():
        rows[kind] = [asdict(one) for one, _ in choices]
        for at, (_, patch) in enumerate(choices):
            tensors |= {f"{kind}/{at}/{name}": tensor for name, tensor in flat(patch).items()}
    tensors = tensors or {"nothing": torch.zeros(1)}  # readers of other programs expect one
    metadata = {"key": json.dumps(key), "candidates": json.dumps(rows)}
    with atomic_file(layer_file(library, layer)) as partial:
        save_file(tensors, partial, metadata)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no part of a library of nas candidates: {error!r}") from None


def read_made(library: Path, layer: int) -> tuple[dict[str, Any], dict[str, list[Candidate]]]:
    """The key and the candidates by kind of what `write_layer` wrote, without their tensors.

    Raises:
        ConfigError: if the file is not there or can't be read.
    """
    with _reading(layer_file(library, layer)) as file:
        about = file.metadata() or {}
        rows = json.loads(about["candidates"])
        return json.loads(about["key"]), {k: [_candidate(row) for row in rows[k]] for k in KINDS}


def read_layer(
    library: Path, layer: int
) -> tuple[dict[str, Any], dict[str, list[Candidate]], dict[tuple[str, Sizes], Patch]]:
    """What `write_layer` wrote: its key, the candidates by kind, the patches by kind and sizes.

    Raises:
        ConfigError: if the file is not there or can't be read.
    """
    path = layer_file(library, layer)
    key, candidates = read_made(library, layer)
    with _reading(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    patches = {}
    for kind in KINDS:
        for at, one in enumerate(candidates[kind]):
            prefix = f"{kind}/{at}/"
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            patches[kind, one.sizes] = unflat(own, path)
    return key, candidates, patches


def write_library(library: Library, costs: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Write `library.json`.

    Args:
        library: all of it.
        costs: for each named cost, by how much every candidate changes that of the whole model.
    """
    rows = []
    for at, (part, choices) in enumerate(zip(library.parts, library.candidates, strict=True)):
        listed = [
            {**asdict(one), "costs": {name: costs[name][at][j] for name in costs}}
            for j, one in enumerate(choices)
        ]
        rows.append({"layer": part.layer, "part": part.kind, "candidates": listed})
    spec = {
        "format": FORMAT,
        "checkpoint_dir": library.checkpoint_dir,
        "checkpoint": library.checkpoint,
        "n_embd": library.n_embd,
        **library.about,
        "parts": rows,
    }
    atomic_write_text(library.path / FILE_NAME, json.dumps(spec, indent=1) + "\n")


def open_library(path: Path, checkpoint: Any, *, option: str = "--candidates") -> Library:
    """Read a library that belongs to a checkpoint.

    Args:
        path: directory that `nas candidates` wrote.
        checkpoint: `weights.checkpoint.Checkpoint` of the whole model.
        option: names the flag in messages.

    Raises:
        ConfigError: if it is no library, is not finished, or belongs to another checkpoint.
    """
    file = path / FILE_NAME
    if not file.is_file():
        begun = "it is not finished, call nas candidates again to go on"
        reason = begun if layer_file(path, 0).is_file() else "run nas candidates"
        raise ConfigError(f"{option} {path} has no {FILE_NAME}: {reason}")
    spec = read_json(file, label=f"{option} {file}")
    try:
        if spec["format"] != FORMAT:
            raise ValueError(f"format {spec['format']!r}")
        parts = tuple(Part(int(row["layer"]), str(row["part"])) for row in spec["parts"])
        candidates = tuple(
            tuple(
                _candidate({k: v for k, v in one.items() if k != "costs"})
                for one in row["candidates"]
            )
            for row in spec["parts"]
        )
        depth = checkpoint.config.n_layer
        if {part.kind for part in parts} > set(KINDS) or not all(candidates):
            raise ValueError("parts without candidates")
        about = {k: spec[k] for k in ("made", "text") if k in spec}
        found = Library(
            path, str(spec["checkpoint_dir"]), str(spec["checkpoint"]), int(spec["n_embd"]),
            parts, candidates, about,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{option} {file} is no library of nas candidates: {error!r}") from None
    expected = tuple(Part(layer, kind) for layer in range(depth) for kind in KINDS)
    if fingerprint(checkpoint.path) != found.checkpoint or parts != expected:
        raise ConfigError(
            f"{option} {path} belongs to another checkpoint ({found.checkpoint_dir}) than "
            f"--checkpoint_dir {checkpoint.path}: run nas candidates on this one"
        )
    return found


def _candidate(row: Mapping[str, Any]) -> Candidate:
    sizes = (size if isinstance(size, str) else int(size) for size in row["sizes"])
    return Candidate(**{**row, "sizes": tuple(sizes)})
