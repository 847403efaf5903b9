"""The commands of `nas`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

# command: (module, function, what it does). Only the chosen module is imported.
COMMANDS = {
    "init": ("init", "init", "write a commented recipe for a checkpoint, a device and a budget"),
    "run": ("run", "run", "run all stages of a recipe: nas run recipe.yaml"),
    "importance": ("importance", "importance", "sort the weights of a checkpoint by importance"),
    "finetune-supernet": ("finetune", "finetune", "train all sub-networks of a checkpoint at once"),
    "finetune": ("finetune", "finetune", "alias of finetune-supernet"),
    "candidates": ("library", "candidates", "make cheaper versions of every attention and MLP"),
    "search": ("search", "search", "find the Pareto front of quality against cost"),
    "evaluate": ("evaluate", "evaluate", "score sub-networks with the LM Evaluation Harness"),
    "export": ("export", "export", "write a sub-network as a litgpt or Hugging Face checkpoint"),
    "generate": ("generate", "generate", "continue a text with a model or a sub-network of it"),
    "prune": ("prune", "prune", "make a checkpoint smaller with another published method"),
    "profile": ("profile", "profile", "parameters, FLOPs, memory and latency of sub-networks"),
}

# Commands whose `--dry_run` is a `Plan`; `run` has those of its stages, `init` only writes recipes.
PLANNED = (
    "importance", "finetune-supernet", "finetune", "candidates", "search", "evaluate", "export",
    "generate", "prune", "profile",
)  # fmt: skip
PLAN = (
    "Only say what would be read and written, and the memory, arithmetic and time that it takes on "
    "this machine. A checkpoint_dir with a model_config.yaml is enough, or a name of litgpt's list."
)


def function_of(name: str) -> Callable[..., None]:
    """The function of a command, whose signature is its options."""
    module, function, _ = COMMANDS[name]
    return getattr(importlib.import_module(f"whittle_nas.cli.{module}"), function)
