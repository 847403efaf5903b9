"""Which sub-networks a user wants to have evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from whittle_nas.cli.fronts import is_front, open_front
from whittle_nas.cli.options import Sizes
from whittle_nas.errors import ConfigError
from whittle_nas.reading import read_json, read_yaml
from whittle_nas.space import SubNetwork
from whittle_nas.space.front import Front


@dataclass(frozen=True)
class Candidate:
    """A sub-network with a name for files and tables.

    Attributes:
        label: its name, different from all others.
        subnetwork: its sizes.
        metrics: what a search already measured.
        library: directory of the candidates that it is made of; None: plain slices.
    """

    label: str
    subnetwork: SubNetwork
    metrics: Mapping[str, float] = field(default_factory=dict)
    library: str | None = None


def choose_candidates(
    checkpoint: Any,
    *,
    sizes: Sizes | None = None,
    front: Path | None = None,
    index: Sequence[int] = (),
    subnetworks: Path | None = None,
    include_full: bool = False,
) -> list[Candidate]:
    """The sub-networks that the options name; without any, the whole model.

    Args:
        checkpoint: `weights.checkpoint.Checkpoint` of the super-network.
        sizes: one sub-network; missing sizes are the whole model's.
        front: `front.json` of a search.
        index: entries of the front; none: all.
        subnetworks: YAML or JSON file with a list of sizes, or a front as well.
        include_full: add the whole model.

    Raises:
        ConfigError: if more than one way of choosing is given, if a file can't be read or belongs
            to another checkpoint, or if sizes do not fit.
    """
    ways = {
        "--subnetwork": sizes is not None and sizes.given(),
        "--front": front is not None,
        "--subnetworks": subnetworks is not None,
    }
    given = [way for way, used in ways.items() if used]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both given: choose the sub-networks one way")
    if index and front is None:
        raise ConfigError(f"--index {list(index)} needs --front")
    found: list[Candidate] = []
    if front is not None:
        found = _from_front(open_front(checkpoint, front), index)
    elif subnetworks is not None:
        found = _from_file(checkpoint, subnetworks)
    elif sizes is not None and sizes.given():
        sub = sizes.resolve(checkpoint)
        found = [Candidate("subnetwork", sub)]
    if include_full or not found:
        full = SubNetwork.from_config(checkpoint.config)
        if all(candidate.subnetwork != full for candidate in found):
            found.append(Candidate("full", full))
    return found


@dataclass(frozen=True)
class FileLibrary:
    """A library for the networks of a file, of which some are plain slices.

    Attributes:
        library: `candidates.library.Library` that the others are made of.
        plain: networks that name no library.
    """

    library: Any
    plain: frozenset[SubNetwork]

    @property
    def path(self) -> Path:
        """Directory of the library."""
        return self.library.path

    def identity(self) -> str:
        """That of the library."""
        return self.library.identity()

    def patch(self, sub: SubNetwork) -> Any:
        """What candidates change in a network; nothing in a plain slice."""
        from whittle_nas.weights.patch import Patch

        return Patch() if sub in self.plain else self.library.patch(sub)


def library_of(
    checkpoint: Any,
    *,
    front: Path | None = None,
    subnetworks: Path | None = None,
    name: str | None = None,
) -> Any:
    """The library of candidates that the networks of a file are made of; None for plain slices.

    Args:
        checkpoint: `weights.checkpoint.Checkpoint` of the super-network.
        front: `front.json` of a search.
        subnetworks: file of named sizes, such as `picks.yaml`.
        name: the one of `subnetworks` that is meant; None: all.

    Returns:
        A library, or a `FileLibrary` where the file has plain slices as well.

    Raises:
        ConfigError: if it is not there, or if there are several.
    """
    option, file = ("--front", front) if front is not None else ("--subnetworks", subnetworks)
    if file is None:
        return None
    found = choose_candidates(checkpoint, front=front, subnetworks=subnetworks)
    found = [one for one in found if name in (None, one.label)]
    names = sorted({one.library for one in found if one.library is not None})
    if not names:
        return None
    if len(names) > 1:
        raise ConfigError(f"{option} {file} has networks of several libraries: {', '.join(names)}")
    from whittle_nas.candidates.library import open_library

    library = open_library(Path(names[0]), checkpoint, option=f"{option} {file}: its candidates")
    made = {one.subnetwork for one in found if one.library is not None}
    plain = frozenset(one.subnetwork for one in found) - made
    return FileLibrary(library, plain) if plain else library


def _from_front(front: Front, index: Sequence[int]) -> list[Candidate]:
    known = {entry.index: entry for entry in front.entries}
    if missing := [number for number in index if number not in known]:
        raise ConfigError(
            f"--index {missing[0]} is not in {front.path}; it has {min(known)} to {max(known)}"
        )
    return [
        Candidate(
            f"front-{number}",
            known[number].subnetwork,
            known[number].metrics,
            front.candidates or None,
        )
        for number in index or known
    ]


def _from_file(checkpoint: Any, path: Path) -> list[Candidate]:
    content = _read(path)
    if is_front(content):
        return _from_front(open_front(checkpoint, path, option="--subnetworks"), ())
    rows = _rows(content, path)
    found: list[Candidate] = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"--subnetworks {path}: entry {number} is {row!r}, not sizes")
        sizes = dict(row.get("subnetwork", row))
        label = str(sizes.pop("name", row.get("name", f"sub-{number}")))
        library = sizes.pop("candidates", row.get("candidates"))
        for note in ("cost", "score"):  # what grid.yaml says beside the sizes
            sizes.pop(note, None)
        try:
            sub = Sizes(**sizes).resolve(checkpoint)
        except (TypeError, ConfigError) as error:
            reason = str(error).replace("Sizes.__init__() got an unexpected", "unknown")
            raise ConfigError(f"--subnetworks {path}: entry {number}: {reason}") from None
        if not re.fullmatch(r"\w[\w.+=-]*", label) or label == "pairs":
            raise ConfigError(
                f"--subnetworks {path}: name {label!r} becomes a folder: use letters, "
                "digits and _.+=-, and not `pairs`"
            )
        found.append(Candidate(label, sub, library=library and str(library)))
    labels = [candidate.label for candidate in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"--subnetworks {path}: name {twice[0]!r} stands there twice")
    return found


def _read(path: Path) -> Any:
    read = read_json if path.suffix == ".json" else read_yaml
    return read(path, label=f"--subnetworks {path}")


def _rows(content: Any, path: Path) -> list[Any]:
    if isinstance(content, dict):  # profile.json and grid.yaml
        content = content.get("subnetworks") or content.get("members")
    if not isinstance(content, list) or not any(content):
        raise ConfigError(f"--subnetworks {path} holds no list of sizes, such as [{{n_layer: 2}}]")
    return content
