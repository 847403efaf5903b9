"""Running statistics of activations, from hooks on an unmodified litgpt model.

Per sequence an activation (B, T, C) is reduced to (B, C); per calibration batch to (C,); these are
averaged over the batches, weighted by their number of sequences. No activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from whittle_nas.errors import ConfigError
from whittle_nas.importance import criteria
from whittle_nas.importance.bases import Covariances
from whittle_nas.importance.options import Aggregation, HeadActivation, NeuronActivation
from whittle_nas.importance.scores import Scores
from whittle_nas.progress import Progress, no_progress
from whittle_nas.weights import axes
from whittle_nas.weights.supernet import without_head


@dataclass(frozen=True)
class Place:
    """What is measured, and where."""

    kind: str
    module: str


class RunningScores:
    """Scores of every place, batch by batch."""

    def __init__(self, aggregation: Aggregation, device: torch.device) -> None:
        self._aggregation, self._device = aggregation, device
        self._pending: dict[Place, list[Tensor]] = {}
        self._totals: dict[Place, Tensor] = {}
        self._sequences = 0
        self._batches = 0

    def add(self, kind: str, module: str, activation: Tensor) -> None:
        """Reduce an activation (B, T, C) over its tokens."""
        how = "mean" if kind == "layers" else self._aggregation.sequence
        reduced = criteria.REDUCTIONS[how](activation, 1).to(self._device)  # (B, C)
        self._pending.setdefault(Place(kind, module), []).append(reduced)

    def end_batch(self) -> None:
        """Reduce the sequences since the last call.

        Raises:
            ConfigError: if an activation was not finite, naming the first module.
        """
        sequences = 0
        for place, parts in self._pending.items():
            reduced = torch.cat(parts)  # (B, C)
            sequences = len(reduced)
            how = "mean" if place.kind == "layers" else self._aggregation.batch
            score = criteria.REDUCTIONS[how](reduced, 0) * sequences
            total = self._totals.get(place)
            self._totals[place] = score if total is None else total + score
        self._pending = {}
        self._sequences += sequences
        self._batches += 1
        self._check_finite()

    def scores(self, kind: str) -> list[Tensor]:
        """Scores (C,) of one kind on the CPU, in the order of the forward pass."""
        found = [total for place, total in self._totals.items() if place.kind == kind]
        return [(total / self._sequences).cpu() for total in found]

    def _check_finite(self) -> None:
        places = list(self._totals)
        # one transfer per batch, whatever the number of places
        sums = torch.stack([self._totals[place].sum() for place in places])
        broken = (~sums.isfinite()).nonzero()
        if len(broken):
            raise ConfigError(
                f"activations at {places[int(broken[0])].module} are not finite in calibration "
                f"batch {self._batches}: use a dtype with more range (--dtype float32), or check "
                "that layer's weights"
            )


def collect(
    model: Any,
    tokens: Tensor,
    *,
    aggregation: Aggregation = Aggregation.mean_mean,
    neuron_activation: NeuronActivation = NeuronActivation.down_input,
    head_activation: HeadActivation = HeadActivation.contribution,
    batch_size: int = 4,
    micro_batch_size: int | None = None,
    covariances: Covariances | None = None,
    progress: Progress = no_progress,
) -> Scores:
    """Score every entry of a model by forward passes; the output head is not computed.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T) token ids.
        aggregation: how a score is reduced.
        neuron_activation: where neurons are measured.
        head_activation: whether heads count by their output or by what becomes of it.
        batch_size: sequences per calibration batch, part of the definition of all but `mean_*`.
        micro_batch_size: sequences per forward pass; the scores do not depend on it.
        covariances: what to add the passes' covariances to.
        progress: shows the passes.

    Raises:
        ConfigError: if an activation is not finite.
    """
    device = model.lm_head.weight.device
    running = RunningScores(aggregation, device)
    body = without_head(model)
    batches = tokens.split(batch_size)
    with (
        torch.inference_mode(),
        _hooked(model, running, neuron_activation, head_activation, covariances),
    ):
        for batch in progress(batches, "scoring", len(batches)):
            for part in batch.split(micro_batch_size or batch_size):
                body(part.to(device))
            running.end_batch()
    if covariances is not None:
        covariances.tokens += tokens.numel()
    return _gather(running, model.config)


@contextmanager
def _hooked(
    model: Any,
    running: RunningScores,
    neurons: NeuronActivation,
    heads: HeadActivation,
    found: Covariances | None,
) -> Iterator[None]:
    """All hooks of the program: what is measured in which module."""
    config = model.config
    with ExitStack() as stack:

        def after(module: nn.Module, hook: Callable[..., None]) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        def before(module: nn.Module, hook: Callable[..., None]) -> None:
            stack.callback(module.register_forward_pre_hook(hook).remove)

        for module, hook in _covariance_hooks(model, found) if found else ():
            before(module, hook)
        for layer, block in enumerate(model.transformer.h):
            name = f"transformer.h.{layer}"
            for norm in ("norm_1", "norm_2"):
                if getattr(block, norm) is not None:
                    after(getattr(block, norm), _output(running, "embd", f"{name}.{norm}"))
            if config.rope_n_elem < config.head_size:
                after(block.attn.qkv, _qkv(running, f"{name}.attn.qkv", config))
            gains = None
            if heads is HeadActivation.contribution:
                gains = criteria.head_gains(block.attn.proj.weight, config)
            before(block.attn.proj, _attention(running, f"{name}.attn.proj", config, gains))
            if neurons is NeuronActivation.fc:
                first = "fc" if hasattr(block.mlp, "fc") else "fc_1"
                after(getattr(block.mlp, first), _output(running, "neurons", f"{name}.mlp.{first}"))
            else:
                before(block.mlp.proj, _input(running, "neurons", f"{name}.mlp.proj"))
            after(block, _stream(running, name))
        after(model.transformer.ln_f, _output(running, "embd", "transformer.ln_f"))
        yield


def _output(running: RunningScores, kind: str, name: str) -> Callable[..., None]:
    return lambda _module, _inputs, output: running.add(kind, name, output)


def norm_shares(
    model: Any, tokens: Tensor, *, batch_size: int = 4, progress: Progress = no_progress
) -> Tensor:
    """What the first channels hold of every norm's input: (N, D) in float32, on the CPU.

    For each norm, in the order of `axes.norms`, and k = 1..D the mean of |x_(1..k)| / |x|.

    Args:
        model: `litgpt.GPT`, in evaluation mode.
        tokens: (N, T) token ids.
        batch_size: sequences per forward pass.
        progress: shows the passes.
    """
    names, device = axes.norms(model.config), model.cos.device
    totals = torch.zeros(len(names), model.config.n_embd, dtype=torch.float64, device=device)
    body, batches = without_head(model), tokens.split(batch_size)

    def adding(row: int) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            energies = inputs[0].flatten(0, -2).float().square().cumsum(-1)  # (B * T, D)
            whole = energies[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)
            totals[row] += (energies / whole).sqrt_().sum(0).to(device)

        return hook

    with torch.inference_mode(), ExitStack() as stack:
        for row, name in enumerate(names):
            norm = model.get_submodule(name.removesuffix(".weight"))
            stack.callback(norm.register_forward_pre_hook(adding(row)).remove)
        for batch in progress(batches, "measuring norms", len(batches)):
            body(batch.to(device))
    return (totals / tokens.numel()).float().cpu()


def _covariance_hooks(
    model: Any, found: Covariances
) -> Iterator[tuple[nn.Module, Callable[..., None]]]:
    for name in axes.norms(model.config):
        norm = model.get_submodule(name.removesuffix(".weight"))
        yield norm, lambda _module, inputs: found.add_stream(inputs[0])
    for layer, block in enumerate(model.transformer.h):
        yield (
            block.attn.proj,
            lambda _module, inputs, layer=layer: found.add_values(layer, inputs[0]),
        )


def _input(running: RunningScores, kind: str, name: str) -> Callable[..., None]:
    return lambda _module, inputs: running.add(kind, name, inputs[0])


def _qkv(running: RunningScores, name: str, config: Any) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        running.add("qk_channels", name, criteria.qk_channels(output, config))

    return hook


def _attention(
    running: RunningScores, name: str, config: Any, gains: Tensor | None
) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        norms = criteria.heads(inputs[0], config)  # (B, T, H)
        norms = norms if gains is None else norms * gains
        running.add("heads", name, norms)
        running.add("groups", name, criteria.groups(norms, config))
        running.add("value_channels", name, criteria.value_channels(inputs[0], config))

    return hook


def _stream(running: RunningScores, name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        running.add("layers", name, criteria.turn(inputs[0], output).unsqueeze(-1))

    return hook


def _gather(running: RunningScores, config: Any) -> Scores:
    groups = config.n_query_groups

    def per_layer(kind: str, *shape: int) -> Tensor:
        return torch.stack(running.scores(kind)).unflatten(-1, shape)

    free = config.head_size - config.rope_n_elem
    return Scores(
        embd=torch.stack(running.scores("embd")).sum(0),
        neurons=per_layer("neurons", config.intermediate_size),
        groups=per_layer("groups", groups),
        heads=per_layer("heads", groups, config.n_head // groups),
        value_channels=per_layer("value_channels", groups, config.head_size),
        qk_channels=per_layer("qk_channels", groups, free)
        if free
        else torch.zeros(config.n_layer, groups, 0),
        block_importance=torch.cat(running.scores("layers")),
    )
