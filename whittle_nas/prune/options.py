"""What a user chooses about pruning. No heavy import: the command line reads this."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

from whittle_nas.errors import ConfigError


class Method(str, Enum):
    """How the model is made smaller.

    Zeros in matrices: `magnitude`, `wanda`, `sparsegpt`. Fewer bits: `rtn` (rounding to nearest),
    `gptq`. Fewer channels of the residual stream: `slicegpt` (a basis per block), `slicegpt_global`
    (one basis). Fewer layers: `shortgpt` (block importance), `shortened_llama` (perplexity),
    `shortened_llama_taylor` (Taylor+), `laco` (the paper's sum of differences), `laco_notebook`
    (what its published notebook computes). Fewer heads and neurons: `llm_pruner`, `flap`,
    `minitron`.
    """

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    rtn = "rtn"
    gptq = "gptq"
    slicegpt = "slicegpt"
    slicegpt_global = "slicegpt_global"
    shortgpt = "shortgpt"
    shortened_llama = "shortened_llama"
    shortened_llama_taylor = "shortened_llama_taylor"
    laco = "laco"
    laco_notebook = "laco_notebook"
    llm_pruner = "llm_pruner"
    flap = "flap"
    minitron = "minitron"


MASKS = (Method.magnitude, Method.wanda, Method.sparsegpt)
QUANTISERS = (Method.rtn, Method.gptq)
WITHOUT_DATA = (Method.magnitude, Method.rtn)
BY_BLOCK = (Method.wanda, Method.sparsegpt, Method.gptq)  # calibrated sequentially, or not
BITS = (3, 4, 8)
_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Sparsity:
    """How much goes.

    Attributes:
        share: of the weights, channels, layers or parameters that go, in (0, 1).
        pattern: (n, m) if of every m consecutive weights of a row exactly n stay.
    """

    share: float
    pattern: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.share:g}" if self.pattern is None else "{}:{}".format(*self.pattern)


@dataclass(frozen=True)
class Grid:
    """Integers that weights are rounded to.

    Attributes:
        bits: of one weight.
        group_size: consecutive weights of a row that share a scale.
        symmetric: whether zero is the middle of the grid; else every group has a zero point.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True


@dataclass(frozen=True)
class LaCoOptions:
    """The constants of the paper's algorithm 1.

    Args:
        threshold: A merge stays if the cosine of the last hidden states is above this.
        merge_layers: Layers that become one, C.
        interval: How far to move down after a merge, I.
        lowest: First layer that may take in others, L.
        highest: The end of the range, H; by default the number of layers.
        sentences: Calibration blocks that are compared.
    """

    threshold: float = 0.65
    merge_layers: int = 4
    interval: int = 2
    lowest: int = 1
    highest: int | None = None
    sentences: int = 5


def parse_sparsity(given: float | str, method: Method) -> Sparsity:
    """`0.5`, or `2:4` where the method makes masks.

    Raises:
        ConfigError: for anything else.
    """
    right = "must be a share above 0 and below 1, such as 0.5"
    if found := _PATTERN.fullmatch(str(given)):
        kept, of = int(found[1]), int(found[2])
        if method not in MASKS:
            raise ConfigError(f"--sparsity {given}: {method.value} {right}; masks can be 2:4")
        if not 0 < kept < of or 128 % of:
            raise ConfigError(f"--sparsity {given} must keep n of 2, 4, 8, ... 128, such as 2:4")
        return Sparsity(1 - kept / of, (kept, of))
    try:
        share = float(given)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        more = ', or a pattern such as "2:4" (in quotes in a file)' if method in MASKS else ""
        raise ConfigError(f"--sparsity {given} {right}{more}")
    return Sparsity(share)


def check_sequential(given: bool | None, method: Method) -> bool | None:
    """Whether blocks are calibrated on what the compressed ones before them give.

    Args:
        given: by the user; None for the default.
        method: what is run.

    Returns:
        None for methods that leave no choice.

    Raises:
        ConfigError: if one of these was given a choice.
    """
    if method in BY_BLOCK:
        return given is not False
    if given is not None:
        *others, last = (method.value for method in BY_BLOCK)
        raise ConfigError(
            f"--sequential {str(given).lower()} has no meaning for {method.value}; it is an option "
            f"of {', '.join(others)} and {last}"
        )
    return None


def check_grid(grid: Grid) -> Grid:
    """Refuse grids that nobody packs.

    Raises:
        ConfigError: naming the option.
    """
    if grid.bits not in BITS:
        raise ConfigError(f"--bits {grid.bits} must be {', '.join(map(str, BITS[:-1]))} or 8")
    if grid.group_size < 1:
        raise ConfigError(f"--group_size {grid.group_size} must be at least 1")
    return grid


def check_columns(columns: int, *, grid: Grid | None, sparsity: Sparsity | None, name: str) -> None:
    """Whether groups and patterns fit a matrix.

    Raises:
        ConfigError: naming the matrix and what would fit.
    """
    if grid is not None and columns % grid.group_size:
        fits = [size for size in (128, 64, 32, 16, 8) if columns % size == 0]
        raise ConfigError(
            f"--group_size {grid.group_size} does not divide the {columns} columns of {name}; "
            f"{fits[0] if fits else columns} does"
        )
    if sparsity is not None and sparsity.pattern and columns % sparsity.pattern[1]:
        raise ConfigError(
            f"--sparsity {sparsity} does not fit the {columns} columns of {name}, which are no "
            f"multiple of {sparsity.pattern[1]}"
        )
