"""Sub-networks and search spaces as plain values. Pure Python, no torch."""

from whittle_nas.space.rules import check_supported, violations
from whittle_nas.space.searchspace import SearchSpace, load_space
from whittle_nas.space.subnetwork import Block, HeadChannels, SubNetwork

__all__ = [
    "Block",
    "HeadChannels",
    "SearchSpace",
    "SubNetwork",
    "check_supported",
    "load_space",
    "violations",
]
