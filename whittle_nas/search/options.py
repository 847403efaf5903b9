"""Choices of a search. Light: the command line reads this before torch is needed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from whittle_nas.errors import ConfigError


class Method(str, Enum):
    """Who proposes the next sub-network."""

    surrogate = "surrogate"
    random = "random"
    stratified = "stratified"
    nsga2 = "nsga2"
    local_search = "local_search"
    evolution = "evolution"
    scalarization = "scalarization"


@dataclass(frozen=True)
class CostOptions:
    """The load for which costs are computed and measured.

    Args:
        batch_size: Sequences that are processed together.
        tokens: Prompt tokens per sequence, and tokens in the key-value cache; by default the
            model's context, at most 512.
        latency_table: File with block times; by default in `out_dir`. Times are added to it as they
            are measured.
    """

    batch_size: int = 2
    tokens: int | None = None
    latency_table: str | None = None

    def resolve_tokens(self, context: int) -> int:
        """Tokens per sequence for a model with this context.

        Raises:
            ConfigError: if they exceed the context.
        """
        if self.batch_size < 1:
            raise ConfigError(f"--costs.batch_size={self.batch_size} must be at least 1")
        tokens = min(context, 512) if self.tokens is None else self.tokens
        if not 1 <= tokens <= context:
            raise ConfigError(f"--costs.tokens={tokens} must lie in 1..{context}, the context")
        return tokens
