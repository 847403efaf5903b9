"""Which sub-network a user means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whittle_nas.cli.fronts import open_front
from whittle_nas.cli.options import Sizes
from whittle_nas.errors import ConfigError
from whittle_nas.space import SearchSpace, SubNetwork, load_space
from whittle_nas.space.front import pick_entry
from whittle_nas.space.rules import check

FITTED = "fitted"  # the search space that `nas importance` has recorded


def choose_subnetwork(
    checkpoint: Any,
    *,
    sizes: Sizes | None = None,
    front: Path | None = None,
    subnetworks: Path | None = None,
    name: str | None = None,
    index: int | None = None,
    pick: str | None = None,
    extreme: str | None = None,
    search_space: str | None = None,
    whole: bool = False,
) -> SubNetwork:
    """The one sub-network that the options name.

    Args:
        checkpoint: `weights.checkpoint.Checkpoint` of the super-network.
        sizes: sizes; missing ones are the whole model's.
        front: `front.json` of a search, together with `index` or `pick`.
        index: entry of the front.
        subnetworks: file with named sizes, together with `name` if there are several.
        name: which of them.
        pick: budgets, the best entry of the front under them is taken.
        extreme: `smallest` or `largest` member of the search space.
        search_space: preset or file; default: see `space_of`.
        whole: take the whole model where no option names one.

    Raises:
        ConfigError: if no way, or more than one way, of choosing is given, or if it does not fit.
    """
    config, is_largest = checkpoint.config, extreme == "largest"
    chosen = [
        option
        for option, given in (
            ("--subnetwork", sizes is not None and sizes.given()),
            ("--front", front is not None),
            ("--subnetworks", subnetworks is not None),
            ("--extreme", extreme is not None),
        )
        if given
    ]
    # A directory with layers of different sizes is one network, and has no space around it.
    alone = getattr(config, "blocks", None) is not None
    if (not chosen and (whole or alone)) or (chosen == ["--extreme"] and alone and is_largest):
        return SubNetwork.from_config(config)
    if len(chosen) != 1:
        got = " and ".join(chosen) if chosen else "none"
        raise ConfigError(
            f"choose the sub-network by one of --subnetwork.<size>, --front, --subnetworks, "
            f"--extreme; got {got}"
        )
    if front is not None:
        return _of_front(checkpoint, front, index, pick)
    if subnetworks is not None:
        return _named(checkpoint, subnetworks, name)
    if name is not None:
        raise ConfigError(f"--name {name} chooses from --subnetworks, which is not given")
    for option, given in (("--index", index), ("--pick", pick)):
        if given is not None:
            raise ConfigError(f"{option} {given} chooses an entry of --front, which is not given")
    if sizes is not None and sizes.given():
        return sizes.resolve(checkpoint)
    space = space_of(checkpoint, search_space)
    return space.largest if is_largest else space.smallest


def _of_front(checkpoint: Any, path: Path, index: int | None, pick: str | None) -> SubNetwork:
    """One entry of a front."""
    if (index is None) == (pick is None):
        raise ConfigError(f"--front {path} needs either --index or --pick")
    entry = pick_entry(open_front(checkpoint, path), index=index, pick=pick)
    return check(entry.subnetwork, checkpoint.config, checkpoint.info.head_channels)


def _named(checkpoint: Any, path: Path, name: str | None) -> SubNetwork:
    """One of the sub-networks of a file."""
    from whittle_nas.cli.candidates import choose_candidates

    found = choose_candidates(checkpoint, subnetworks=path)
    chosen = [one for one in found if name in (None, one.label)]
    if len(chosen) != 1:
        names = ", ".join(one.label for one in found)
        got = "none" if name is None else repr(name)
        raise ConfigError(f"--subnetworks {path}: give one of {names} as --name; got {got}")
    return chosen[0].subnetwork


def space_of(checkpoint: Any, search_space: str | None) -> SearchSpace:
    """The named search space, else the one that was trained, else as `default_space`."""
    if search_space is None and checkpoint.info.search_space is not None:
        return space_for(checkpoint, checkpoint.info.search_space)
    return space_for(checkpoint, default_space(checkpoint, search_space))


def space_for(checkpoint: Any, source: Any) -> SearchSpace:
    """A search space in any of the forms of `load_space`, for a checkpoint."""
    info = checkpoint.info
    if getattr(checkpoint.config, "blocks", None) is not None:
        raise ConfigError(
            f"{checkpoint.path} has layers of different sizes and no search space: give the "
            "checkpoint that it was cut from"
        )
    return load_space(
        source,
        checkpoint.config,
        layer_order=info.layer_order,
        head_channels=info.head_channels,
    )


def default_space(checkpoint: Any, search_space: str | None) -> Any:
    """The named search space, else `fitted` where `nas importance` has swept, else `aligned`.

    Raises:
        ConfigError: for `fitted` where it is not recorded.
    """
    fitted = checkpoint.info.fitted
    if search_space == FITTED and fitted is None:
        raise ConfigError(
            f"--search_space {FITTED}: {checkpoint.path} has no sweep of its dimensions; run `nas "
            "importance` on it, or name another space"
        )
    if search_space in (None, FITTED):
        return fitted or "aligned"
    return search_space
