"""One pass over calibration text, block by block: what pruning, repair and candidates share."""

from whittle_nas.calibration.blocks import embed, fetch_block, head, rotary, run_block
from whittle_nas.calibration.memory import give_back
from whittle_nas.calibration.statistics import (
    Gram,
    Moments,
    SquareSums,
    Statistic,
    Sums,
    UnitGram,
)
from whittle_nas.calibration.stream import Stream, overflow
from whittle_nas.calibration.walk import first_overflow, walk

__all__ = [
    "Gram",
    "Moments",
    "SquareSums",
    "Statistic",
    "Stream",
    "Sums",
    "UnitGram",
    "embed",
    "fetch_block",
    "first_overflow",
    "give_back",
    "head",
    "overflow",
    "rotary",
    "run_block",
    "walk",
]
