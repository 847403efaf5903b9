"""From a checkpoint to a super-network that can be trained, and back to checkpoint files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from litgpt import GPT, Config
from torch import Tensor, nn

from whittle_nas.errors import ConfigError
from whittle_nas.train import lora
from whittle_nas.train.options import LoraOptions
from whittle_nas.weights.assembly import build, renew_tables
from whittle_nas.weights.checkpoint import Checkpoint, check_finite
from whittle_nas.weights.pages import release
from whittle_nas.weights.sharding import Prepare, nothing
from whittle_nas.weights.supernet import SuperNetwork
from whittle_nas.weights.tying import tie_head

ADAPTERS = "lit_model.pth.lora"


def load_trainable(
    found: Checkpoint,
    options: LoraOptions | None,
    *,
    precision: str = "32-true",
    sharded: bool = False,
    keep_zeros: bool = False,
) -> SuperNetwork:
    """Load a checkpoint on the CPU with the parameters to train marked and in their format.

    A tied head stays one parameter with the token table, unless `found` was `untied`.

    Args:
        found: the checkpoint.
        options: adapters; None trains all weights.
        precision: `32-true` and `bf16-true` convert everything; with `bf16-mixed` what is trained
            is float32 and what is frozen stays as stored, float16 as bfloat16: the arithmetic's
            own format, into which it would be cast, and saved, in every forward pass.
        sharded: leave the weights mapped from the file as they are stored, for `part_loader`.
        keep_zeros: adapters add nothing where a weight is zero.

    Raises:
        ConfigError: for everything that can be wrong with the weights, and for all weights in
            bfloat16, which loses steps that are small against a weight.
    """
    if options is None and precision == "bf16-true":
        raise ConfigError(
            "trainer.precision=bf16-true with lora=null: bfloat16 has 8 bits, and a step below "
            "1/256 of a weight leaves it as it is, so most of the training would be lost; use "
            "bf16-mixed, or adapters"
        )
    config: Config = found.config
    if options is not None:
        sparse = lora.sparse_modules(found.state_dict()) if keep_zeros else frozenset()
        config = lora.lora_config(found.config, options, sparse=sparse)
    with torch.device("meta"):
        model: nn.Module = build(config, GPT if options is None else lora.GPT)
    model.load_state_dict(found.state_dict(), strict=options is None, assign=True)
    if options is None and not sharded:
        # Own memory: the weights were mapped from the file of the checkpoint.
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    elif options is not None:
        _make_adapters(model)
    tie_head(model)
    renew_tables(model)
    if not sharded:
        _convert(model, precision, adapted=options is not None)
        for name, parameter in model.named_parameters():
            check_finite(name, parameter)
            release(parameter.detach())  # read, and not used yet
    model.requires_grad_(True)
    if options is not None:
        lora.freeze_base(model)
    return SuperNetwork(model.train(), found.info)


def _make_adapters(model: nn.Module) -> None:
    """Real, freshly drawn adapters in place of those on the meta device."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            for name in ("lora_A", "lora_B"):
                empty = torch.empty_like(getattr(module, name), device="cpu", dtype=torch.float32)
                setattr(module, name, nn.Parameter(empty))
            lora.reset_adapter(module)


def part_loader(found: Checkpoint, *, precision: str, adapted: bool) -> Prepare:
    """Loads a part of a model of `load_trainable` with `sharded`, just before it is shared out.

    The file is mapped anew for each part, so that its pages go with it.

    Args:
        found: the checkpoint.
        precision: of the training.
        adapted: whether the model has adapters; a frozen teacher's number formats are those of
            the frozen weights beside adapters.
    """

    def load(part: nn.Module, prefix: str) -> None:
        stored = found.state_dict()
        for name, parameter in part.named_parameters(prefix=prefix.rstrip(".")):
            if not lora.is_adapter(name):
                parameter.data = stored[lora.plain_name(name)].contiguous()
        _convert(part, precision, adapted=adapted)
        for name, parameter in part.named_parameters(prefix=prefix.rstrip(".")):
            check_finite(name, parameter)

    return load


def _convert(model: nn.Module, precision: str, *, adapted: bool) -> None:
    """Give the parameters of a model, or of a part of it, their number formats."""
    if precision != "bf16-mixed":
        dtype = torch.float32 if precision == "32-true" else torch.bfloat16
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return
    for name, parameter in model.named_parameters():
        if lora.is_adapter(name) or not adapted:
            parameter.data = parameter.data.float()
        elif parameter.dtype is torch.float16:
            parameter.data = parameter.data.bfloat16()


class TrainedTensors(Mapping[str, Tensor]):
    """Plain litgpt state dict of a trained model, adapters merged, made tensor by tensor.

    With sharding a part is whole while its tensors are asked for, and all processes ask for the
    same ones.
    """

    def __init__(self, supernet: SuperNetwork, like: Mapping[str, Tensor]) -> None:
        """Wrap a model; `like` holds tensors in the number formats that are wanted."""
        self._merged, self._like = lora.MergedTensors(supernet.model, gathering(supernet)), like
        self._copied = supernet.sharding is not None  # a gathered part is freed for the next one

    def __getitem__(self, name: str) -> Tensor:
        like = self._like[name]
        return self._merged[name].to(device="cpu", dtype=like.dtype, copy=self._copied)

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)


def gathering(supernet: SuperNetwork) -> Callable[[str], None]:
    """Makes the part of a parameter whole; nothing to do without sharding."""
    return nothing if supernet.sharding is None else supernet.sharding.gather


def adapters(supernet: SuperNetwork) -> Iterator[tuple[str, Tensor]]:
    """The adapters by name, on the CPU; with sharding all processes go through them."""
    found = lora.Parameters(supernet.model, gathering(supernet))
    for name in found:
        if lora.is_adapter(name):
            yield name, found[name].detach().cpu().clone()


def save_adapters(supernet: SuperNetwork, path: Path) -> None:
    """Write the adapters in litgpt's form, `{"model": {name: tensor}}`."""
    torch.save({"model": dict(adapters(supernet))}, path)


def follow(supernet: SuperNetwork, like: Mapping[str, Tensor]) -> None:
    """What the other processes do while the first one writes: they give their shares."""
    for _ in TrainedTensors(supernet, like).values():
        pass
    for _ in adapters(supernet):
        pass
    supernet.rest()
