"""A second device with real values on a machine that has one: tensors that say they are on `meta`.

Whatever mixes tensors of both devices fails, as it does between two GPUs, also where one has no
dimensions. Only copies cross.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
_MAY_CROSS = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class MixedDevices(Exception):
    """An operation got tensors of both devices."""


class _Elsewhere(torch.Tensor):
    """Holds its values in a tensor of the CPU."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "_Elsewhere":
        like: Any = {"strides": values.stride(), "dtype": values.dtype, "device": ELSEWHERE}
        found = torch.Tensor._make_wrapper_subclass(cls, values.size(), **like)
        found.inside = values
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[None]:
    """While it lasts, `ELSEWHERE` is a device with memory."""
    with _Operations(), _Literals():
        yield


class _Literals(TorchFunctionMode):
    """`torch.tensor` is no operation: what it makes on `meta` has no values from the beginning."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") == ELSEWHERE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(ELSEWHERE)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [isinstance(x, _Elsewhere) for x in tensors]
    if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
        return not any(there)  # else `Module.to` would set the values of a tensor of the CPU
    if any(there) and not all(there) and func not in _MAY_CROSS:
        raise MixedDevices(f"{func} got tensors of two devices")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    goes_there = any(there) if asked is None else torch.device(asked) == ELSEWHERE
    result = func(*tree_map(_values, args), **tree_map(_values, kwargs))
    if func._schema.name.endswith("_") and tensors:  # in place: what was given comes back
        return args[0]
    return tree_map(_wrapped, result) if goes_there else result


def _values(x: Any) -> Any:
    return x.inside if isinstance(x, _Elsewhere) else x


def _wrapped(x: Any) -> Any:
    with torch.inference_mode(False):  # views of parameters are made in there, too
        return _Elsewhere(x) if isinstance(x, torch.Tensor) else x
