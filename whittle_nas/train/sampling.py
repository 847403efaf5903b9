"""From the sampler's options to a sampler: grids by parameters, magnitude or perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from whittle_nas.reading import read_yaml
from whittle_nas.space import SearchSpace, SubNetwork
from whittle_nas.space.pareto import ParetoSampler
from whittle_nas.space.rules import check
from whittle_nas.space.samplers import Grid, GridSampler, RandomSampler, Sampler, build_grid
from whittle_nas.train.batches import Sample, collate
from whittle_nas.train.choices import SamplerKind, SamplerOptions, Strategy
from whittle_nas.train.forward import labels_of
from whittle_nas.train.run import Networks
from whittle_nas.train.step import loss_sums
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.magnitude import Magnitudes, plain_tensors
from whittle_nas.weights.supernet import SuperNetwork

CALIBRATION_BATCH = 4


def make_sampler(
    options: SamplerOptions,
    space: SearchSpace,
    supernet: SuperNetwork,
    *,
    seed: int,
    samples: Sequence[Sample] = (),
) -> tuple[Sampler, Grid | None]:
    """The sampler that the options ask for, and its grid if it has one.

    Args:
        options: the kind of sampler and its numbers.
        space: where sub-networks come from.
        supernet: gives costs and scores.
        seed: of the grid.
        samples: calibration data for `calibrate_ppl`.

    Raises:
        ConfigError: if the grid's file is missing, malformed or does not fit the model.
    """
    if options.kind is SamplerKind.random:
        return RandomSampler(space), None
    cost = parameter_counter(supernet.config)
    if options.kind is SamplerKind.fixed:
        assert options.file is not None
        grid = read_grid(options.file, cost, supernet.info.layer_order)
        for sub in grid.subs:
            check(sub, supernet.config, supernet.info.head_channels)
        return GridSampler(grid.subs), grid
    if options.kind is SamplerKind.pareto:
        return ParetoSampler.start(space, cost, options.num_bins), None
    grid = build_grid(
        space,
        cost,
        seed=seed,
        num_bins=options.num_bins,
        trials_per_bin=options.trials_per_bin,
        score=_score(options, space, supernet, samples),
        candidates_per_bin=options.candidates_per_bin,
    )
    return GridSampler(grid.subs), grid


def validation_networks(
    space: SearchSpace,
    supernet: SuperNetwork,
    num_bins: int,
    *,
    strategy: Strategy = Strategy.sandwich,
    fixed: Grid | None = None,
) -> dict[str, SubNetwork]:
    """The networks that are validated, by name: those that the training is for, and the full one.

    Where the whole space is trained these are the smallest and a grid over the parameters with a
    seed of its own, so that runs with different samplers and seeds are compared on the same
    networks.

    Args:
        space: that is trained.
        supernet: gives the costs.
        num_bins: of the grid.
        strategy: `standard` trains the full network alone.
        fixed: the members of `sampler.kind fixed`, which alone are trained.
    """
    if strategy is Strategy.standard:
        return {"full": supernet.full}
    if fixed is not None:
        named = {f"member_{number}": sub for number, sub in enumerate(fixed.subs)}
        return {**named, "full": supernet.full}
    cost = parameter_counter(supernet.config)
    grid = build_grid(space, cost, seed=0, num_bins=num_bins, trials_per_bin=2000)
    named = {"smallest": space.smallest}
    named |= {f"grid_{number}": sub for number, sub in enumerate(grid.subs)}
    return {**named, "full": supernet.full}


def choose_networks(
    sampler: SamplerOptions,
    space: SearchSpace,
    supernet: SuperNetwork,
    *,
    strategy: Strategy,
    num_validated: int,
    chosen: Mapping[str, SubNetwork],
    samples: Sequence[Sample],
    seed: int,
    device: torch.device | None = None,
) -> Networks:
    """Which networks of a super-network a training is about.

    Args:
        sampler: which are drawn, unless they are chosen.
        space: where they come from.
        supernet: gives costs and scores.
        strategy: of the training.
        num_validated: bins of the grid that is validated.
        chosen: sub-networks by name that alone are trained; none: those of `sampler`.
        samples: training samples, for samplers that score.
        seed: of the grid.
        device: where sub-networks are run to be scored, and the model stays; None: where it is.
    """
    if chosen:
        drawn = GridSampler(tuple(chosen.values()))
        return Networks(space.smallest, drawn, {**chosen, "full": supernet.full})
    if sampler.kind is SamplerKind.calibrate_ppl and device is not None:
        supernet.model.to(device)  # Lightning moves it there anyway
    drawn, grid = make_sampler(sampler, space, supernet, seed=seed, samples=samples)
    fixed = grid if sampler.kind is SamplerKind.fixed else None
    validated = validation_networks(space, supernet, num_validated, strategy=strategy, fixed=fixed)
    return Networks(space.smallest, drawn, validated, grid)


def read_grid(path: Path, cost: Callable[[SubNetwork], float], layer_order: Sequence[int]) -> Grid:
    """Read `grid.yaml`, or a YAML list of sub-network sizes.

    Raises:
        ConfigError: naming the file.
    """
    label = f"sampler.file={path}"
    spec = read_yaml(path, label=label)
    return Grid.from_dict(spec, cost=cost, layer_order=layer_order, source=label)


def _score(
    options: SamplerOptions,
    space: SearchSpace,
    supernet: SuperNetwork,
    samples: Sequence[Sample],
) -> Callable[[SubNetwork], float] | None:
    """What the candidates of a bin compete by: higher is better."""
    if options.kind is SamplerKind.grid_params:
        return None
    if options.kind is SamplerKind.calibrate_mag:
        return Magnitudes(
            plain_tensors(supernet.model.state_dict()),
            supernet.config,
            space,
            head_channels=supernet.info.head_channels,
        )
    chosen = list(samples)[: options.calibration_samples]
    return lambda sub: -mean_loss(supernet, sub, chosen)


def mean_loss(supernet: SuperNetwork, sub: SubNetwork, samples: Sequence[Sample]) -> float:
    """Cross entropy of a sub-network in nats per label; ranks like its perplexity.

    It runs where the model is.
    """
    was_training, device = supernet.model.training, supernet.model.cos.device
    supernet.model.eval()
    total, count = torch.zeros(1, device=device), 0
    for start in range(0, len(samples), CALIBRATION_BATCH):
        batch = collate(samples[start : start + CALIBRATION_BATCH]).to(device)
        total += loss_sums(supernet, batch, [sub])
        count += len(labels_of(batch))
    supernet.model.train(was_training)
    return float(total) / max(count, 1)
