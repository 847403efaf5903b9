"""Weights of `nas prune --method rtn|gptq` in packed integers, as vLLM loads them.

The format is `pack-quantized` of compressed-tensors, whose library packs. R rows, C columns of a
matrix, N groups of columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.export.hf_config import HFTarget
from whittle_nas.export.hf_names import to_hf
from whittle_nas.reading import read_json
from whittle_nas.weights import axes
from whittle_nas.weights.files import GRIDS, PRUNE_REPORT

SCHEMES = {"w4a16": 4, "w8a16": 8}  # what vLLM's kernels for integer weights read
_VLLM_GROUPS = (32, 64, 128)
_VLLM_COLUMNS, _VLLM_ROWS = 128, 64  # of a matrix, for Marlin before it padded


@dataclass(frozen=True)
class Packing:
    """How the matrices of a model are packed.

    Attributes:
        bits: of a weight.
        group_size: columns that share a scale.
        symmetric: whether there are no zero points.
        scales: (R, N) by Hugging Face name of the weight.
        zeros: (R, N) zero points, whole numbers, by the same names.
    """

    bits: int
    group_size: int
    symmetric: bool
    scales: Mapping[str, Tensor]
    zeros: Mapping[str, Tensor]

    def config(self) -> dict[str, Any]:
        """`quantization_config` of a `config.json`."""
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
            QuantizationStrategy,
        )

        weights = QuantizationArgs(
            num_bits=self.bits,
            symmetric=self.symmetric,
            strategy=QuantizationStrategy.GROUP,
            group_size=self.group_size,
        )
        found = QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            format="pack-quantized",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=["lm_head", "embed_out"],
        )
        return found.model_dump(mode="json", exclude_none=True)

    def pack(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is stored in place of a parameter; itself, if it is not on a grid.

        Args:
            name: of Hugging Face.
            tensor: its values; on the meta device, so is what comes out.

        Raises:
            ConfigError: if it has other values than its grid.
        """
        if name not in self.scales:
            yield name, tensor
            return
        scale, zero = self.scales[name], self.zeros[name]
        packed, zeros = self._packed(name, tensor, scale, zero)
        yield f"{name}_packed", packed
        yield f"{name}_scale", scale.to(device=tensor.device, dtype=tensor.dtype)
        shape = torch.tensor(tensor.shape)
        yield f"{name}_shape", shape.to("meta") if tensor.is_meta else shape
        if not self.symmetric:
            yield f"{name}_zero_point", zeros

    def _packed(
        self, name: str, tensor: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Integers of a matrix, and its zero points, in words of 32 bits."""
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        if tensor.is_meta:
            rows, columns = tensor.shape
            words = (rows, -(-columns * self.bits // 32)), (-(-rows * self.bits // 32), len(zero.T))
            first, second = (torch.empty(*x, dtype=torch.int32, device="meta") for x in words)
            return first, second
        groups = tensor.float().unflatten(1, (-1, self.group_size))  # (R, N, group_size)
        grid = {"scale": scale.float().unsqueeze(-1), "zero": zero.unsqueeze(-1)}
        whole, fits = _on_grid(groups, self.bits, tensor.dtype, **grid)
        if not fits:
            raise ConfigError(
                f"--quantize: {name} is not on the grid of {GRIDS}; quantise the weights as they "
                "are now, with nas prune"
            )
        integers = whole.flatten(1).to(torch.int8)
        return (
            pack_to_int32(integers, self.bits),
            pack_to_int32(zero.to(torch.int8), self.bits, packed_dim=0),
        )


def _on_grid(
    groups: Tensor, bits: int, kind: torch.dtype, *, scale: Tensor, zero: Tensor
) -> tuple[Tensor, bool]:
    """The integers whose multiples of a scale come nearest to weights, and whether all are near.

    In bfloat16 a large multiple of a scale is rounded by up to one scale, so the level of a weight
    may be nearer to the integer beside its own. Neighbours in the number format count as equal:
    where queries are scaled they have been rounded a second time.
    """
    levels, half = groups / scale + zero, 2 ** (bits - 1)

    def distance(integers: Tensor) -> Tensor:
        return ((scale * (integers - zero)).to(kind).float() - groups).abs()

    whole = levels.round().clamp(-half, half - 1)
    for beside in ((whole - 1).clamp(min=-half), (whole + 1).clamp(max=half - 1)):
        whole = torch.where(distance(beside) < distance(whole), beside, whole)
    near = distance(whole) <= torch.finfo(kind).eps * groups.abs()
    return whole, bool((near | ((levels - whole).abs() <= 0.1)).all())


def read_packing(source: Path, config: Any, target: HFTarget, scheme: str) -> Packing:
    """The grids of a checkpoint of `nas prune`.

    Args:
        source: its directory.
        config: litgpt config of the model.
        target: what it is written as.
        scheme: a key of `SCHEMES`.

    Raises:
        ConfigError: if it was not quantised with that many bits, or a package is missing.
    """
    try:
        import compressed_tensors.compressors.pack_quantized  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--quantize needs compressed-tensors 0.20 or newer: pip install 'whittle-nas[pack]'"
        ) from None
    if not (source / GRIDS).is_file():
        raise ConfigError(
            f"--quantize {scheme}: {source} has no {GRIDS}; quantise it with nas prune --method "
            "gptq (or rtn), and export what that writes"
        )
    report = read_json(source / PRUNE_REPORT)
    if report["bits"] != SCHEMES[scheme]:
        raise ConfigError(
            f"--quantize {scheme} is for weights of {SCHEMES[scheme]} bits, and those of {source} "
            f"have {report['bits']}: make it with nas prune --bits {SCHEMES[scheme]}"
        )
    scales, zeros = _by_hf_name(source / GRIDS, config, target)
    return Packing(report["bits"], report["group_size"], report["symmetric"], scales, zeros)


def _by_hf_name(path: Path, config: Any, target: HFTarget) -> tuple[dict[str, Tensor], ...]:
    """Scales and zero points under the names of the weights that they belong to."""
    from safetensors.torch import load_file

    stored, found = load_file(path), []
    for kind, query_scale in (("scales", target.query_scale), ("zeros", 1.0)):
        tensors = {
            name: stored.get(f"{name}.{kind}", torch.empty(axes.shape(name, config), device="meta"))
            for name in axes.parameter_names(config)
        }
        way = {"model_type": target.model_type, "query_scale": query_scale}
        pairs = to_hf(config, tensors, **way)  # rows are split and moved as those of the weights
        found.append({name: t.contiguous() for name, t in pairs if not t.is_meta})
    return tuple(found)


def packing_notes(packing: Packing, config: Any) -> list[str]:
    """What vLLM may ask of packed weights beyond their format, one sentence each.

    Args:
        packing: of the model.
        config: litgpt config.
    """
    notes = []
    if packing.group_size not in _VLLM_GROUPS:
        notes.append(
            f"vLLM's kernels take groups of 32, 64 or 128 weights, not of {packing.group_size}"
        )
    shapes = {name: axes.shape(name, config) for name in axes.parameter_names(config)}
    inner = {rest: shapes[n] for n in shapes for at, rest in [axes.split_layer(n)] if at == 0}
    for name, shape in inner.items():
        if len(shape) == 2 and (shape[0] % _VLLM_ROWS or shape[1] % _VLLM_COLUMNS):
            notes.append(
                f"older kernels of vLLM take matrices of multiples of {_VLLM_ROWS} rows and "
                f"{_VLLM_COLUMNS} columns; {name} has {shape[0]} x {shape[1]}"
            )
            break
    return notes


def pruned_sentences(source: Path) -> tuple[str, tuple[str, ...]]:
    """What `nas prune` did to a checkpoint, for its model card, and what to know of that.

    Args:
        source: a checkpoint directory; empty values if that command did not make it.
    """
    if not (source / PRUNE_REPORT).is_file():
        return "", ()
    report = read_json(source / PRUNE_REPORT)
    how = (
        f"{report['bits']} bits in groups of {report['group_size']}"
        if report["bits"]
        else f"sparsity {report['sparsity']}"
    )
    return f"It was compressed with `nas prune`: {report['method']}, {how}.", tuple(report["notes"])
