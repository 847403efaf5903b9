"""SliceGPT: turn the residual stream to its principal directions, keep the first (Ashkboos 2024).

D channels, k of them stay, L layers. A basis B is (D, k): x ~ z B^T with z = x B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import litgpt
import torch
from torch import Tensor, nn

from whittle_nas.calibration import Stream, fetch_block
from whittle_nas.errors import ConfigError
from whittle_nas.importance.bases import Covariances, principal_directions
from whittle_nas.importance.statistics import collect
from whittle_nas.progress import Progress, no_progress
from whittle_nas.prune.store import BlockStore
from whittle_nas.weights import axes
from whittle_nas.weights.bases import Bases, LayerBasis, rotates_exactly
from whittle_nas.weights.config import extended
from whittle_nas.weights.shortcuts import ShortcutBlock


def check_slices(config: Any, share: float) -> int:
    """How many channels stay: (1 - share) D, rounded to a multiple of 8.

    Raises:
        ConfigError: if the model can't be turned, or nothing or everything would stay.
    """
    if not rotates_exactly(config) or config.parallel_residual:
        raise ConfigError(
            f"{config.name!r} can't be sliced: SliceGPT needs an RMSNorm before every part of a "
            "block and none after it, one part after the other"
        )
    width = 8 * round((1 - share) * config.n_embd / 8)
    if not 0 < width < config.n_embd:
        raise ConfigError(
            f"--sparsity {share:g} of {config.n_embd} channels keeps {width}, to a multiple of 8; "
            "some must go, and some must stay"
        )
    return width


def global_basis(
    model: Any, tokens: Tensor, *, batch_size: int = 4, progress: Progress = no_progress
) -> Bases:
    """One basis for the whole stream: principal directions of what enters the norms, first first.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T) token ids.
        batch_size: sequences per forward pass.
        progress: shows the passes.
    """
    config = model.config
    found = Covariances(config, stream=True, device=model.cos.device)
    collect(model, tokens, batch_size=batch_size, covariances=found, progress=progress)
    assert found.stream is not None
    _, directions = principal_directions(found.stream)
    groups, size = range(config.n_query_groups), config.head_size
    layer = LayerBasis(
        neurons=range(config.intermediate_size),
        groups=groups,
        heads=[range(config.n_head // config.n_query_groups)] * len(groups),
        qk_channels=[range(size)] * len(groups),
        value_channels=[range(size)] * len(groups),
    )
    return Bases(directions.float().cpu(), [layer] * config.n_layer)


def narrow_sizes(config: Any, n_embd: int) -> dict[str, Any]:
    """What changes in the config with k channels.

    A mean of squares over k channels is D / k times the sum over D, and so is what is added to it;
    norms of queries and keys share that constant and keep it.
    """
    ratio = 1 if config.norm_qk else config.n_embd / n_embd
    return {"n_embd": n_embd, "norm_eps": config.norm_eps * ratio}


def slicegpt(
    model: Any,
    stream: Stream,
    store: BlockStore,
    *,
    n_embd: int,
    progress: Progress = no_progress,
) -> tuple[Any, dict[str, Tensor]]:
    """A basis for every norm, each found on what the sliced parts before it give.

    Args:
        model: `litgpt.GPT` for which `check_slices` passes; it stays as it is.
        stream: calibration text at its first block.
        store: where finished blocks are kept.
        n_embd: channels that stay, k.
        progress: shows the blocks.

    Returns:
        The config, with shortcut matrices, and the state dict.

    Raises:
        ConfigError: if an activation is not finite, naming the layer and its part.
    """
    plain = {field.name: getattr(model.config, field.name) for field in fields(litgpt.Config)}
    config = extended(
        litgpt.Config(**{**plain, **narrow_sizes(model.config, n_embd)}), shortcuts=True
    )
    basis = _directions(stream, n_embd)
    stream.map(lambda x: x @ basis.to(x.dtype))
    table = model.transformer.wte.weight
    ratio = model.config.n_embd / n_embd
    tensors = {"transformer.wte.weight": _to(table.double() @ basis.to(table.device), table)}
    if config.scale_embeddings:  # by the root of its own width
        tensors["transformer.wte.weight"] *= ratio**0.5
    count = config.n_layer
    for layer in progress(range(count), "slicing blocks", count):
        kept = store.get(layer)
        if kept is None:
            weights, after = _slice_block(model, stream, layer, basis, config)
            kept = {"weights": {n: t.cpu() for n, t in weights.items()}, "basis": after.cpu()}
            store.put(layer, kept)
        else:
            with torch.device("meta"):
                block = ShortcutBlock(config, layer)
            block.load_state_dict(kept["weights"], assign=True)
            stream.run(block.to(stream.device, stream.dtype), layer)
        tensors |= {f"transformer.h.{layer}.{name}": t for name, t in kept["weights"].items()}
        basis = kept["basis"].to(basis.device)
    norm = model.transformer.ln_f.weight
    tensors["transformer.ln_f.weight"] = _norm_weight(norm, model.config, n_embd)
    head = model.lm_head
    turned = _read(head.weight, _scale(norm, model.config), basis.to(head.weight.device))
    tensors["lm_head.weight"] = turned
    if head.bias is not None:
        tensors["lm_head.bias"] = head.bias
    return config, {name: tensors[name].cpu() for name in axes.parameter_names(config)}


def _slice_block(
    model: Any, stream: Stream, layer: int, basis: Tensor, config: Any
) -> tuple[Mapping[str, Tensor], Tensor]:
    """New weights of a block whose input has a basis, and the basis of its output.

    The states go with it: (B, T, k) before and after.
    """
    block = fetch_block(model, layer, stream.device, stream.dtype)
    sliced: dict[str, Tensor] = {}
    parts = (("norm_1", ("attn.qkv",), "attn.proj"), ("norm_2", _readers(block), "mlp.proj"))
    for at, (norm_name, readers, writer) in enumerate(parts, start=1):
        norm = block.get_submodule(norm_name)
        scale = _scale(norm.weight, model.config)
        narrow = config.norm_class(config.n_embd, eps=config.norm_eps).to(norm.weight)
        narrow.weight = _frozen(_norm_weight(norm.weight, model.config, config.n_embd))
        setattr(block, norm_name, narrow)
        sliced[f"{norm_name}.weight"] = narrow.weight
        for name in readers:
            linear = block.get_submodule(name)
            linear.weight = _frozen(_read(linear.weight, scale, basis))
        half = _Half(block, basis.to(norm.weight), attention=at == 1)
        stream.run(half, layer, part=writer.partition(".")[0])  # (B, T, D)
        after = _directions(stream, config.n_embd)
        stream.map(lambda x, after=after: x @ after.to(x.dtype))
        linear = block.get_submodule(writer)
        linear.weight = _frozen(_to(after.T @ linear.weight.double(), linear.weight))
        if linear.bias is not None:
            linear.bias = _frozen(_to(after.T @ linear.bias.double(), linear.bias))
        sliced[f"shortcut_{at}.weight"] = _to(after.T @ basis, linear.weight)
        basis = after
    stored = model.transformer.wte.weight.dtype
    weights = {**block.state_dict(), **sliced}
    return {name: tensor.to(stored) for name, tensor in weights.items()}, basis


class _Half(nn.Module):
    """One part of a block with a sliced input; what leaves it has all D channels."""

    def __init__(self, block: Any, basis: Tensor, *, attention: bool) -> None:
        super().__init__()
        self._block, self._basis, self._attention = (block,), basis, attention

    def forward(self, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        block = self._block[0]
        if self._attention:
            return block.attn(block.norm_1(z), cos, sin) + z @ self._basis.T
        return block.mlp(block.norm_2(z)) + z @ self._basis.T


def _readers(block: Any) -> tuple[str, ...]:
    return tuple(f"mlp.{name}" for name, _ in block.mlp.named_children() if name.startswith("fc"))


def _directions(stream: Stream, count: int) -> Tensor:
    """The first principal directions (D, k) of the states, every token with the same weight."""
    total: Tensor | None = None
    for state in stream.states:
        rows = state.to(stream.device).flatten(0, -2)
        wide = torch.promote_types(rows.dtype, torch.float32)
        unit = nn.functional.normalize(rows.to(wide), dim=-1)
        part = (unit.T @ unit).double()
        total = part if total is None else total + part
    assert total is not None
    return principal_directions(total)[1][:count].T.contiguous()


def _scale(norm: Tensor, config: Any) -> Tensor:
    """What a norm multiplies with, float64."""
    return norm.double() + 1 if axes.has_unit_offset(config) else norm.double()


def _norm_weight(norm: Tensor, config: Any, n_embd: int) -> Tensor:
    """Norm over k channels that divides by the root mean square over all D, as before."""
    factor = (config.n_embd / n_embd) ** 0.5
    return norm.new_full((n_embd,), factor - 1 if axes.has_unit_offset(config) else factor)


def _read(weight: Tensor, scale: Tensor, basis: Tensor) -> Tensor:
    """What reads the stream (R, D) after a norm, in a basis: (R, k)."""
    return _to((weight.double() * scale) @ basis, weight)


def _to(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def sliced_tensors(tensors: Mapping[str, Tensor], config: Any, n_embd: int) -> dict[str, Tensor]:
    """The first channels of a model in `global_basis`, with norms as `slicegpt` has them.

    Args:
        tensors: state dict in that basis; its norms have no scales.
        config: its litgpt config.
        n_embd: channels that stay, k.
    """
    narrow = replace(config, n_embd=n_embd)
    norms = axes.norms(config)
    found = {}
    for name in axes.parameter_names(narrow):
        tensor = tensors[name]
        if name in norms:
            tensor = _norm_weight(tensor, config, n_embd)
        for at, dim in enumerate(axes.dims(name, config)):
            if dim == (axes.Axis.EMBD,):
                tensor = tensor.narrow(at, 0, min(n_embd, tensor.shape[at]))
        found[name] = tensor
    if config.scale_embeddings:
        table = "transformer.wte.weight"
        found[table] = found[table] * (config.n_embd / n_embd) ** 0.5
    return found
