"""Text in, packed blocks of tokens out. Light: torch, litgpt and datasets load when used."""

from whittle_nas.data.blocks import TokenBlocks, load_blocks, load_tokenizer
from whittle_nas.data.options import MixSource, Part, TextData, TextSource

__all__ = [
    "MixSource",
    "Part",
    "TextData",
    "TextSource",
    "TokenBlocks",
    "load_blocks",
    "load_tokenizer",
]
