"""What `nas importance` shows: the proof that sorting helped, and pictures.

Apart from the command's own file, which must not import torch even for type checking: jsonargparse
runs those imports to read the signature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT

from whittle_nas.cli.common import progress_bar
from whittle_nas.cli.selection import space_for
from whittle_nas.data import Part, TextData, TokenBlocks, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.importance.options import LayerCriterion, SweepOptions
from whittle_nas.importance.pipeline import Measured, Settled
from whittle_nas.importance.report import Report, draw_subnetworks, make_report, perplexities
from whittle_nas.importance.sorting import SortedTensors
from whittle_nas.importance.sweep import sweep
from whittle_nas.plots import plot_before_after, plot_importance, plot_sweep
from whittle_nas.repair.engine import repair
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import Checkpoint
from whittle_nas.weights.info import FILE_NAME, SupernetInfo
from whittle_nas.weights.norms import NormTable
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.placement import Device, place
from whittle_nas.weights.supernet import SuperNetwork
from whittle_nas.weights.tying import tie_head

_SWEPT = 256  # tokens of a block that the sweep looks at: many texts say more than long ones


@dataclass(frozen=True)
class Trial:
    """The sub-networks and the text of a report; the first sub-network is the whole model."""

    subnetworks: list[SubNetwork]
    text: TokenBlocks
    conditions: dict[str, Any]
    layer_order: Sequence[int]

    def run(
        self, supernet: SuperNetwork, label: str, calibration: torch.Tensor | None = None
    ) -> list[float]:
        """Perplexity of every sub-network; the layers that it keeps follow the order of now.

        With calibration text (N, T + 1) every sub-network is repaired on it first.
        """
        now = supernet.info.layer_order

        def repaired(sub: SubNetwork) -> Patch | None:
            if calibration is None or sub == supernet.full:
                return None
            return repair(supernet, sub, calibration).patch

        return perplexities(
            supernet,
            [sub.reordered(self.layer_order, now) for sub in self.subnetworks],
            lambda model: nats_per_token(model, self.text.tokens),
            patch_of=repaired,
            label=label,
            progress=progress_bar,
        )

    def other_norms(self, settled: Settled, final: SuperNetwork) -> dict[str, list[float]]:
        """Perplexities of the sorted model with the norm factors the other way, if it has norms."""
        if settled.norm_shares is None:
            return {}
        table = NormTable.of(settled.norm_shares, final.config)
        name = "without norm factors" if final.info.norms else "with norm factors"
        other = replace(final.info, norms=None if final.info.norms else table)
        return {name: self.run(SuperNetwork(final.model, other), name)}

    def permuted(
        self,
        checkpoint: Checkpoint,
        measured: Measured,
        info: SupernetInfo,
        *,
        device: Device,
        dtype: torch.dtype | None,
    ) -> dict[str, list[float]]:
        """Perplexities without the matrices of the sorted model, if it has any.

        Args:
            checkpoint: before sorting.
            measured: what it was sorted by.
            info: of the sorted model.
            device: where this model is put beside no other: one, or several.
            dtype: of its parameters; None: as stored.
        """
        if measured.orders is measured.bases:
            return {}
        with torch.device("meta"):
            model = GPT(checkpoint.config)
        tensors = SortedTensors(checkpoint.state_dict, measured.orders, checkpoint.config)
        model.load_state_dict(dict(tensors), assign=True)
        tie_head(model)
        model.cos, model.sin = model.rope_cache()
        place(model, device, dtype).requires_grad_(False).eval()
        return {"permuted": self.run(SuperNetwork(model, replace(info, norms=None)), "permuted")}

    def write(
        self,
        out_dir: Path,
        before: list[float],
        after: list[float],
        steps: Mapping[str, list[float]],
        config: Any,
    ) -> None:
        """Write `rpd.json` and `rpd.png`, and print the figures.

        Sizes are counted by the `config` of the sorted model, whose head may be untied.
        """

        def report_of(perplexities: list[float]) -> Report:
            return make_report(self.subnetworks[1:], before, perplexities, config)

        report = report_of(after)
        means = {name: report_of(other).improvement.mean for name, other in steps.items()}
        text = json.dumps({**self.conditions, **report.to_dict(), "steps": means}, indent=2)
        (out_dir / "rpd.json").write_text(text + "\n", encoding="utf-8")
        found = report.improvement
        plot_before_after(
            out_dir / "rpd.png",
            num_params=report.num_params,
            before=report.before,
            after=report.after,
            full_perplexity=report.full_before,
            title=f"{found.num_subnetworks} random sub-networks, RPD {found.mean:.2f}",
        )
        print(
            f"RPD {found.mean:.3f} (median {found.median:.3f}, 10 % to 90 %: "
            f"{found.quantile_10:.3f} to {found.quantile_90:.3f}), "
            f"{found.share_improved:.0%} of {found.num_subnetworks} sub-networks improved"
        )
        for name, mean in means.items():
            print(f"RPD {mean:.3f} {name}")
        print(f"whole model: perplexity {report.full_before:.4f} -> {report.full_after:.4f}")
        print(f"measured on {self.text}")


def plan_trial(
    checkpoint: Checkpoint, *, space: str, count: int, text: TextData, seed: int
) -> Trial:
    """Find the sub-networks and the held-out text, before the long part starts."""
    config = checkpoint.config
    blocks = load_blocks(text, checkpoint.path, config=config, part=Part.VALID)
    found = space_for(checkpoint, space)
    drawn = draw_subnetworks(found, count, seed=seed)
    conditions = {"search_space": found.to_dict(), "seed": seed, "data": dict(blocks.about)}
    subs = [SubNetwork.from_config(config), *drawn]
    return Trial(subs, blocks, conditions, checkpoint.info.layer_order)


def draw_scores(
    out_dir: Path, measured: Measured, settled: Settled, criterion: LayerCriterion
) -> None:
    """Write `importance.png`."""
    labels = {
        LayerCriterion.greedy: "loss when it was dropped (nats/token)",
        LayerCriterion.block_drop: "loss without it (nats/token)",
        LayerCriterion.block_importance: "block importance",
    }
    by_angle = criterion is LayerCriterion.block_importance
    layers = measured.scores.block_importance.tolist() if by_angle else settled.layer_losses
    plot_importance(
        out_dir / "importance.png",
        layers=layers,
        layer_label=labels[criterion],
        layer_order=settled.layer_order,
        heads=measured.scores.heads.flatten(1).tolist(),
        neurons=measured.scores.neurons.tolist(),
    )


def sweep_sizes(
    out_dir: Path, supernet: SuperNetwork, blocks: TokenBlocks, options: SweepOptions
) -> None:
    """Measure how far each dimension can shrink; it goes to `supernet.yaml` and `sweep.png`."""
    tokens = blocks.tokens[:, : _SWEPT + 1]
    tokens = tokens[: max(1, options.num_tokens // (tokens.shape[1] - 1))]
    found = sweep(
        supernet,
        lambda model: nats_per_token(model, tokens),
        bound=options.bound,
        bounds=options.bounds,
        progress=progress_bar,
    )
    info = replace(supernet.info, sweep=found.to_dict())
    (out_dir / FILE_NAME).write_text(info.dump(), encoding="utf-8")
    plot_sweep(out_dir / "sweep.png", losses=found.losses, limit=found.limit)
    sizes = ", ".join(f"{name} {spec['min']}" for name, spec in found.space.items())
    limits = ", ".join(f"{limit:.2f} of {name}" for name, limit in found.limits.items())
    reached = f"{found.limit:.2f} nats{f' ({limits})' if limits else ''}"
    print(f"space `fitted`: down to {sizes}, where a dimension alone costs {reached}")
