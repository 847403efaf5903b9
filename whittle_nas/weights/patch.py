"""What is special to one sub-network: a few tensors that differ from the slices.

R rows, C columns, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from whittle_nas.errors import ConfigError
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.files import atomic_file

_FORMAT = "patch of a sub-network, 1"
_REPLACED, _UP, _DOWN = "replaced", "up", "down"


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank to add to a weight.

    Attributes:
        up: (R, r).
        down: (r, C).
    """

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Patch:
    """Changes of a sub-network's slices, by the sub-network's own tensor names.

    Attributes:
        replaced: tensors that take the place of the slices.
        added: what is added to them, to a replaced one as well.
    """

    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[str, LowRank] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return bool(self.replaced or self.added)

    def names(self) -> set[str]:
        """Names of the tensors that it changes."""
        return {*self.replaced, *self.added}

    def under(self, prefix: str) -> Patch:
        """The same of a model in which these tensors have longer names."""
        return Patch(
            {f"{prefix}{name}": tensor for name, tensor in self.replaced.items()},
            {f"{prefix}{name}": change for name, change in self.added.items()},
        )

    def __or__(self, other: Patch) -> Patch:
        """Both patches; of tensors that both change, the other's."""
        return Patch({**self.replaced, **other.replaced}, {**self.added, **other.added})


class PatchSource(Protocol):
    """Where the patches of sub-networks come from, such as a library of candidates."""

    def identity(self) -> str:
        """A short hash of its content."""
        ...

    def patch(self, sub: SubNetwork) -> Patch:
        """What is special to a sub-network, by its own tensor names."""
        ...


def patched(tensors: Mapping[str, Tensor], patch: Patch) -> Mapping[str, Tensor]:
    """A state dict of slices with a patch; every tensor is changed when it is asked for.

    Args:
        tensors: a sub-network's tensors by name; they stay as they are, and what is not patched is
            passed on, views as views.
        patch: of the same sub-network. Its tensors take the number format and device of those
            that they change.

    Raises:
        ConfigError: if it changes tensors that are not there, or of another shape (the latter when
            the tensor is asked for).
    """
    if unknown := sorted(patch.names() - set(tensors)):
        raise ConfigError(f"the patch changes {unknown[0]!r}, which the sub-network does not have")
    return _Patched(tensors, patch) if patch else tensors


class _Patched(Mapping[str, Tensor]):
    def __init__(self, tensors: Mapping[str, Tensor], patch: Patch) -> None:
        self._tensors, self._patch = tensors, patch

    def __getitem__(self, name: str) -> Tensor:
        tensor, patch = self._tensors[name], self._patch
        if name in patch.replaced:
            tensor = _fit(patch.replaced[name], tensor, name)
        if name in patch.added:
            change = patch.added[name]
            product = change.up.float() @ change.down.float()
            tensor = (tensor.float() + _fit(product, tensor.float(), name)).to(tensor.dtype)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _fit(new: Tensor, old: Tensor, name: str) -> Tensor:
    if new.shape != old.shape:
        raise ConfigError(
            f"the patch has {name!r} of shape {tuple(new.shape)}, the sub-network "
            f"{tuple(old.shape)}"
        )
    return new.to(device=old.device, dtype=old.dtype)


def write_patch(
    path: Path, patch: Patch, *, checkpoint: str, sub: SubNetwork, how: Mapping[str, Any]
) -> None:
    """Write a patch as safetensors, under a temporary name first.

    Args:
        path: file to write.
        patch: what to write.
        checkpoint: `identity.fingerprint` of the super-network.
        sub: the sub-network that it belongs to.
        how: how it was made, plain values.
    """
    metadata = {
        "format": _FORMAT,
        "checkpoint": checkpoint,
        "subnetwork": json.dumps(sub.to_dict()),
        "how": json.dumps(how),
    }
    with atomic_file(path) as partial:
        save_file(flat(patch), partial, metadata)


def flat(patch: Patch) -> dict[str, Tensor]:
    """The tensors of a patch by names that `unflat` reads, ready for a file."""
    tensors = {f"{_REPLACED}/{name}": tensor for name, tensor in patch.replaced.items()}
    for name, change in patch.added.items():
        tensors |= {f"{_UP}/{name}": change.up, f"{_DOWN}/{name}": change.down}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_patch(path: Path, *, checkpoint: str, sub: SubNetwork) -> tuple[Patch, dict[str, Any]]:
    """A patch, and how it was made.

    Args:
        path: file of `write_patch`.
        checkpoint: `identity.fingerprint` of the super-network that it has to belong to.
        sub: the sub-network that it has to belong to.

    Raises:
        ConfigError: if the file is no patch, or that of another checkpoint or sub-network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a patch that can be read: {error}") from None
    if about.get("format") != _FORMAT:
        raise ConfigError(f"{path} is not a patch of a sub-network")
    if about["checkpoint"] != checkpoint:
        raise ConfigError(
            f"{path} belongs to checkpoint {about['checkpoint']}, and this one is {checkpoint}"
        )
    if (other := json.loads(about["subnetwork"])) != json.loads(json.dumps(sub.to_dict())):
        raise ConfigError(f"{path} belongs to the sub-network {other}, and this one is {sub}")
    return unflat(tensors, path), json.loads(about["how"])


def unflat(tensors: Mapping[str, Tensor], path: Path) -> Patch:
    """Inverse of `flat`.

    Raises:
        ConfigError: naming the file, if these are not the tensors of a patch.
    """
    kinds: dict[str, dict[str, Tensor]] = {_REPLACED: {}, _UP: {}, _DOWN: {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind not in kinds:
            raise ConfigError(f"{path} has an unknown tensor {key!r}")
        kinds[kind][name] = tensor
    ups, downs = kinds[_UP], kinds[_DOWN]
    if set(ups) != set(downs):
        raise ConfigError(f"{path} has only one half of the addition to some tensor")
    return Patch(kinds[_REPLACED], {name: LowRank(ups[name], downs[name]) for name in ups})
