"""Other methods for one of litgpt's modules, which keeps its weights and its place in the model."""

from __future__ import annotations

from functools import cache
from typing import Any


def mix_in(module: Any, methods: type) -> None:
    """Let the methods of a class go before a module's own; `super()` reaches those.

    Copies and pickles take them along. A method in an attribute of the module would refer back to
    it: such a cycle keeps weights in memory until the garbage collector runs.

    Args:
        module: a module whose class can be looked up by its name.
        methods: a class without fields; a second time it changes nothing.
    """
    plain, mixed = getattr(type(module), "_made_of", (type(module), ()))
    if methods not in mixed:
        module.__class__ = _class(plain, (*mixed, methods))


@cache
def _class(plain: type, mixed: tuple[type, ...]) -> type:
    own = {"_made_of": (plain, mixed), "__reduce__": _reduce}
    return type(plain.__name__, (*reversed(mixed), plain), own)


def _reduce(module: Any) -> tuple[Any, ...]:
    """For `pickle` and `copy`, which can't look the class up."""
    return _empty, module._made_of, module.__dict__


def _empty(plain: type, mixed: tuple[type, ...]) -> Any:
    return object.__new__(_class(plain, mixed))
