"""`--repair true` of several commands: calibration text in, sentences out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from whittle_nas.data.options import TextData
from whittle_nas.errors import ConfigError


def repair_text(repair: bool, given: TextData | None, *, option: str, checkpoint: Any) -> Any:
    """Calibration text of a repair, (N, T + 1) tokens; None without repair.

    Args:
        repair: whether it is asked for.
        given: where the text is.
        option: the option that `given` comes from.
        checkpoint: the super-network's `Checkpoint`.

    Raises:
        ConfigError: if there is none, or too little.
    """
    if not repair:
        return None
    if given is None or not (given.is_given() or given.sources):
        raise ConfigError(
            f"--repair true needs calibration text: give --{option}.files"
            + ("" if option == "data" else ", or --data.valid_fraction 0.1")
        )
    from whittle_nas.data import load_blocks
    from whittle_nas.repair.options import RepairOptions

    tokens = load_blocks(given, checkpoint.path, config=checkpoint.config).tokens
    RepairOptions().split(len(tokens))
    return tokens


def check_plain(
    repair: bool, library: Any, *, front: Path | None = None, subnetworks: Path | None = None
) -> None:
    """Refuse to repair networks whose parts are fitted already.

    Args:
        repair: whether it is asked for.
        library: `candidates.library_of` of the two files; None for plain slices.
        front: `front.json` of a search.
        subnetworks: file of named sizes.

    Raises:
        ConfigError: naming the file.
    """
    if repair and library is not None:
        option, file = ("--front", front) if front else ("--subnetworks", subnetworks)
        raise ConfigError(
            f"--repair true fits plain slices and {option} {file} has networks of the candidates "
            f"{library.path}, which are fitted already: leave --repair out, or the lines "
            "`candidates:` of a picks.yaml, whose shapes are repaired then"
        )


def rest_of(data: TextData) -> TextData | None:
    """What is not held out of the text that scores, at most 128 blocks; None if all of it is."""
    if not data.valid_fraction:
        return None
    return replace(data, num_blocks=min(data.num_blocks or 128, 128))


def sentences(found: Any) -> tuple[str, list[str]]:
    """What a `Repaired` says in a model card, and what in the terminal."""
    losses = f"{found.before:.3f} to {found.after:.3f} nats per token on {found.held_back:,} others"
    if not found.patch:
        still = (
            f"repair on {found.tokens:,} calibration tokens did not lower the loss on "
            f"{found.held_back:,} others, so the weights are the plain slices"
        )
        return "", [still, *found.notes]
    card = (
        f"Its projections were then fitted again by least squares on {found.tokens:,} calibration "
        f"tokens, without training (`--repair true`): {losses}."
    )
    line = f"repaired on {found.tokens:,} calibration tokens in {found.seconds:.1f} s: {losses}"
    return card, [line, *found.notes]
