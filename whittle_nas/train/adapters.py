"""What a training has left of its adapters: their losses by rank, and another rank than was merged.

The rank of an adapter is no size of a sub-network: merged, every rank is the same dense model. So
it is chosen here, when the training is over, and search and evaluation never meet it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.train import lora
from whittle_nas.train.batches import Sample
from whittle_nas.train.options import LoraOptions
from whittle_nas.train.prepare import ADAPTERS, load_trainable
from whittle_nas.train.run import Trained
from whittle_nas.train.sampling import mean_loss
from whittle_nas.weights.checkpoint import Checkpoint, load_torch, open_checkpoint
from whittle_nas.weights.supernet import SuperNetwork
from whittle_nas.weights.tying import untied


def losses_by_rank(
    trained: Trained, ranks: Sequence[int], samples: Sequence[Sample]
) -> dict[int, dict[str, float]]:
    """Nats per label of the validated networks with adapters of every rank, where they trained."""
    if not ranks:
        return {}
    networks, model = trained.networks.validated, trained.supernet.model
    if trained.supernet.sharding is None:  # Lightning brings the model back to the host at its end
        model.to(trained.trainer.strategy.root_device)
    with trained.trainer.precision_plugin.val_step_context():
        found = {
            rank: {
                name: mean_loss(trained.supernet.at_rank(rank), sub, samples)
                for name, sub in networks.items()
            }
            for rank in ranks
        }
    if trained.supernet.sharding is None:
        model.cpu()
    return found


@dataclass(frozen=True)
class Adapted(Checkpoint):
    """A trained checkpoint at one rank of its adapters, a checkpoint in memory.

    Attributes:
        supernet: the weights that it was trained from, with its adapters of that rank.
        options: of the adapters.
    """

    supernet: SuperNetwork = field(kw_only=True)
    options: LoraOptions = field(kw_only=True)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The merged weights, in the number formats of the base."""
        return dict(lora.MergedTensors(self.supernet.standalone(self.supernet.full)))


def summary(options: LoraOptions, base: Checkpoint, *, keep_zeros: bool) -> dict[str, object]:
    """What `open_adapted` needs to know, for `supernet.yaml`."""
    given = {one.name: getattr(options, one.name) for one in fields(options)}
    return {**given, "keep_zeros": keep_zeros, "base": str(base.path.resolve())}


def open_adapted(checkpoint: Checkpoint, rank: int | None) -> Adapted:
    """A checkpoint of `nas finetune` at another rank of its adapters.

    Args:
        checkpoint: the trained one.
        rank: None for the whole rank.

    Raises:
        ConfigError: if it has no adapters or not so many ranks, or if the checkpoint that it was
            trained from is gone or is another one.
    """
    path = checkpoint.path / ADAPTERS
    known = (checkpoint.info.training or {}).get("lora")
    if not isinstance(known, dict) or not path.is_file():
        raise ConfigError(
            f"{checkpoint.path} has no adapters of nas finetune ({ADAPTERS} and what supernet.yaml "
            "says of them): choose a rank of a super-network that was trained with adapters"
        )
    given = dict(known)
    keep_zeros, base_dir = given.pop("keep_zeros"), Path(given.pop("base"))
    options = LoraOptions(**given)
    rank = options.r if rank is None else rank
    if not 1 <= rank <= options.r:
        raise ConfigError(f"--lora_r {rank} must be at least 1 and at most the trained {options.r}")
    if not base_dir.is_dir():
        raise ConfigError(
            f"{checkpoint.path} was trained from {base_dir}, which is not there: its weights are "
            "needed to merge another rank"
        )
    base = open_checkpoint(base_dir)
    if base.tied and not checkpoint.tied:
        base = replace(base, config=untied(base.config))
    supernet = load_trainable(base, options, precision="bf16-mixed", keep_zeros=keep_zeros)
    adapters = load_torch(path)["model"]
    missing = supernet.model.load_state_dict(adapters, strict=False)
    if missing.unexpected_keys or lora.adapter_state_dict(supernet.model).keys() - adapters.keys():
        raise ConfigError(f"{path} holds other adapters than {checkpoint.path} was trained with")
    supernet.model.eval()
    _check_base(lora.MergedTensors(supernet.model), checkpoint, base_dir)
    return Adapted(
        checkpoint.path,
        checkpoint.config,
        checkpoint.info,
        supernet=supernet.at_rank(rank),
        options=options,
    )


def _check_base(merged: Mapping[str, torch.Tensor], checkpoint: Checkpoint, base_dir: Path) -> None:
    """Refuse a base whose weights and whole adapters are not the trained checkpoint's."""
    stored = checkpoint.state_dict()
    for name in ("transformer.h.0.attn.qkv.weight", "transformer.h.0.mlp.proj.weight"):
        if name in stored:
            found, expected = merged[name].float(), stored[name].float()
            if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.std())):
                raise ConfigError(
                    f"{base_dir} is not what {checkpoint.path} was trained from: its weights and "
                    "the adapters do not make the merged ones"
                )
