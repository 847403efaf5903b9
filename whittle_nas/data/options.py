"""What the user says about data: plain values for flags and YAML, pure Python."""

import inspect
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from whittle_nas.errors import ConfigError

_Class = TypeVar("_Class", bound=type)


class Part(Enum):
    """What text is taken for; every source has its own answer, see `TextSource.split`.

    `VALID` is what is scored. Where nothing is held out, files and data sets are taken whole for
    both: they were named for the one or the other.
    """

    TRAIN = "train"
    VALID = "valid"


@dataclass(frozen=True)
class TextSource:
    """One source of text: exactly one of `files`, `hub` and `module`.

    Args:
        files: Text files on disk. `.jsonl` and `.json` hold one document per row, all others are
            plain text.
        hub: Name of a data set on the Hugging Face hub, or a local folder in the layout of one.
        hub_config: Configuration of that data set, where it has several.
        hub_split: Split of that data set.
        hub_revision: Branch, tag or commit of that data set; `refs/convert/parquet` is the hub's
            own conversion of data sets that still come as a script.
        module: Class name in `litgpt.data`, e.g. `Alpaca` or `JSON`.
        module_args: Arguments of that class.
        column: Column with the text; several columns are joined by a line break.
        separator: Cuts plain text into documents; without it a file is one document.
        num_documents: Use at most this many documents.
    """

    files: list[Path] | Path | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"
    hub_revision: str | None = None
    module: str | None = None
    module_args: dict[str, Any] = field(default_factory=dict)
    column: list[str] | str = "text"
    separator: str | None = None
    num_documents: int | None = None

    @property
    def paths(self) -> list[Path]:
        """The files as a list, whichever way they were given."""
        files = self.files or []
        return [Path(f) for f in (files if isinstance(files, list) else [files])]

    @property
    def columns(self) -> list[str]:
        """The text columns as a list, whichever way they were given."""
        return self.column if isinstance(self.column, list) else [self.column]

    @property
    def label(self) -> str:
        """How messages name this source."""
        return self.hub or self.module or ", ".join(map(str, self.paths))

    def is_given(self) -> bool:
        """Whether any of the three kinds of source is named."""
        return bool(self.paths or self.hub or self.module)

    def split(self, part: Part, valid_fraction: float) -> str:
        """Which of its texts this source gives, in words."""
        if self.module:
            return "training split" if part is Part.TRAIN else "validation split"
        if not valid_fraction:
            return "all of it"
        held_out = f"held-out {100 * valid_fraction:.3g} %"
        return held_out if part is Part.VALID else f"all but the {held_out}"


def _with_inherited_help(cls: _Class) -> _Class:
    """Add the options of the base class to the docstring, from which `--help` is made."""
    inherited = inspect.cleandoc(cls.__base__.__doc__ or "").partition("Args:\n")[2]
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n{inherited}"
    return cls


@_with_inherited_help
@dataclass(frozen=True)
class MixSource(TextSource):
    """One source of a mix.

    Args:
        weight: Share of the blocks that come from here, relative to the other weights. Either all
            sources of a mix have one or none; without weights all documents are pooled.
    """

    weight: float | None = None


@_with_inherited_help
@dataclass(frozen=True)
class TextData(TextSource):
    """Text for calibration, training or evaluation, packed into blocks without padding.

    Args:
        sources: A mix of several sources, in place of `files`, `hub` and `module`.
        block_size: Tokens per block; by default the model's context, at most 1024.
        num_blocks: Use at most this many blocks.
        valid_fraction: Share of the documents of each source that is held out for validation.
        shuffle: Take documents in random order; otherwise in the order in which they stand.
        seed: Seed of that order, and so of what is held out.
        block_bos: `true` puts the token that begins a text in front of every block, as an input
            that is no target: models that were trained with one rest their attention on it.
            `auto` does so where the tokenizer begins its texts with one.
    """

    sources: list[MixSource] = field(default_factory=list)
    block_size: int | None = None
    num_blocks: int | None = None
    valid_fraction: float = 0.0
    shuffle: bool = True
    seed: int = 42
    block_bos: bool | str = "auto"

    def parts(self) -> list[MixSource]:
        """The sources of the mix; a single source is a mix of one.

        Raises:
            ConfigError: No source, two kinds of source at once, or weights that make no mix.
        """
        if self.sources and self.is_given():
            raise ConfigError(
                f"data.sources and {self.label!r} are both given: list all sources in data.sources"
            )
        single = {name: getattr(self, name) for name in TextSource.__dataclass_fields__}
        parts = list(self.sources) or [MixSource(**single)]
        for part in parts:
            _check_source(part)
        weights = [part.weight for part in parts if part.weight is not None]
        if weights and (len(weights) < len(parts) or min(weights) <= 0):
            raise ConfigError("data.sources: give every source a positive weight, or none of them")
        return parts

    def check(self, context: int) -> int:
        """Check the numbers against a model and return the block size.

        Args:
            context: The model's `block_size`, in tokens.

        Raises:
            ConfigError: A number that is out of range.
        """
        block_size = min(context, 1024) if self.block_size is None else self.block_size
        if not 1 <= block_size <= context:
            raise ConfigError(
                f"data.block_size={block_size} must lie in 1..{context}, the model's context"
            )
        if self.num_blocks is not None and self.num_blocks < 1:
            raise ConfigError(f"data.num_blocks={self.num_blocks} must be at least 1")
        if not 0 <= self.valid_fraction < 1:
            raise ConfigError(
                f"data.valid_fraction={self.valid_fraction} must be at least 0 and below 1"
            )
        if self.block_bos not in (True, False, "auto"):
            raise ConfigError(f"data.block_bos={self.block_bos!r} must be auto, true or false")
        return block_size

    def holds_out(self) -> bool:
        """Whether every source keeps something back for validation."""
        return bool(self.valid_fraction) or all(source.module for source in self.parts())


def _check_source(source: TextSource) -> None:
    kinds = [bool(source.paths), bool(source.hub), bool(source.module)]
    if sum(kinds) == 0:
        raise ConfigError(
            "data: name a source with data.files, data.hub, data.module or data.sources"
        )
    if sum(kinds) > 1:
        raise ConfigError(f"data: {source.label!r} needs exactly one of files, hub and module")
    if source.num_documents is not None and source.num_documents < 1:
        raise ConfigError(f"data.num_documents={source.num_documents} must be at least 1")
