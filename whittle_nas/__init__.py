"""Find smaller language models inside a pretrained litgpt checkpoint.

From Python: `import whittle_nas as nas`, then `nas.load`, `nas.importance`, `nas.finetune`,
`nas.candidates`, `nas.search`, `nas.evaluate`, `nas.prune` and `nas.export`; see `whittle_nas.api`.
Nothing is loaded before it is used.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.2.0"

_FUNCTIONS = (
    "load", "importance", "finetune", "candidates", "search", "evaluate", "prune", "export",
)  # fmt: skip
_VALUES = ("Checkpoint", "Front", "Choice", "SubNetwork")


class _Command(ModuleType):
    """A package that bears the name of a command, and is called like the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """As the function of the same name in `whittle_nas.api`, whose help is the one to read."""
        api = importlib.import_module("whittle_nas.api")
        return getattr(api, self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    """Importing `whittle_nas.search` must not hide the function `search`: it becomes both."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value.__class__ = _Command
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in (*_FUNCTIONS, *_VALUES):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("whittle_nas.api"), name)


def __dir__() -> list[str]:
    return [*_FUNCTIONS, *_VALUES, "__version__"]
