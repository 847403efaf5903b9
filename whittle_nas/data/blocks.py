"""Packing documents into blocks of tokens. N blocks, T tokens per block."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whittle_nas.data.options import MixSource, Part, TextData
from whittle_nas.data.sources import Document, Reader, documents
from whittle_nas.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from litgpt import Config
    from litgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenBlocks:
    """Packed text.

    Args:
        tokens: Long tensor (N, T + 1): inputs are `[:, :-1]`, targets `[:, 1:]`. The first column
            is either a BOS, or the last target of the block before: so every token of the text
            is a target exactly once, but for the first, or for a BOS that heads a block.
        num_bytes: Long tensor (N,): UTF-8 bytes of text that the targets of each block cover.
        about: Where the text comes from and how it was cut, as plain values for files; see
            `load_blocks`.
    """

    tokens: "torch.Tensor"
    num_bytes: "torch.Tensor"
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, N."""
        return self.tokens.shape[0]

    @property
    def block_size(self) -> int:
        """Targets per block, T."""
        return self.tokens.shape[1] - 1

    def __str__(self) -> str:
        """What it is, in words."""
        sources = self.about.get("sources", ["text"])
        splits = self.about.get("splits", ["all of it"] * len(sources))
        named = [f"{source} ({split})" for source, split in zip(sources, splits, strict=True)]
        bos = ", BOS before each" if self.about.get("block_bos") else ""
        return f"{', '.join(named)}: {self.num_blocks} blocks of {self.block_size} tokens{bos}"


def load_tokenizer(checkpoint_dir: Path, config: "Config") -> "Tokenizer":
    """Load the tokenizer of a checkpoint and check that it fits the model.

    Raises:
        ConfigError: There is none, it can't be read, or its tokens exceed the model's vocabulary.
    """
    from litgpt.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer(checkpoint_dir)
    except (NotImplementedError, NotADirectoryError):
        raise ConfigError(
            f"checkpoint_dir={checkpoint_dir} has no tokenizer.json or tokenizer.model"
        ) from None
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ConfigError(
            f"the tokenizer in {checkpoint_dir} can't be read ({type(error).__name__}: {error})"
        ) from error
    if tokenizer.backend == "huggingface":
        # some tokenizer.json files carry the truncation of the script that wrote them
        tokenizer.processor.no_truncation()
        tokenizer.processor.no_padding()
    vocab_size = config.padded_vocab_size or 0
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer in {checkpoint_dir} has {tokenizer.vocab_size} tokens and does not fit "
            f"the model's vocabulary of {vocab_size}"
        )
    tokenizer.use_bos = _begins_texts(tokenizer, checkpoint_dir)
    if tokenizer.use_bos and tokenizer.bos_id is None:
        raise ConfigError(
            f"{checkpoint_dir / 'tokenizer_config.json'} asks for a BOS token and names none"
        )
    return tokenizer


def _begins_texts(tokenizer: "Tokenizer", checkpoint_dir: Path) -> bool:
    """Whether texts begin with BOS, by what the files say.

    litgpt goes by the name of the directory for Llama 3 and SmolLM2, so that a copy of a checkpoint
    would read other tokens than its source.
    """
    path = checkpoint_dir / "tokenizer_config.json"
    settings: Any = {}
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    if (wanted := settings.get("add_bos_token")) is not None:
        return bool(wanted)
    if tokenizer.backend == "huggingface" and tokenizer.bos_id is not None:
        processor: Any = tokenizer.processor
        if processor.encode("a").ids[:1] == [tokenizer.bos_id]:
            return True
    return settings.get("tokenizer_class") == "LlamaTokenizer"


def load_blocks(
    data: TextData, checkpoint_dir: Path, *, config: "Config", part: Part = Part.TRAIN
) -> TokenBlocks:
    """Read, tokenise and pack the text that `data` describes.

    Documents are joined into one stream (BOS + text + EOS by the tokenizer's convention) and cut
    without padding; only as much text is tokenised as `num_blocks` needs. With weights, each source
    gives its share of the blocks, and the mix shrinks to what the scarcest source can give. The
    same arguments give the same blocks.

    Args:
        data: Sources, sizes and seed.
        checkpoint_dir: Directory with the tokenizer.
        config: The model's configuration: bounds block size and token ids.
        part: What it is for: `VALID` for everything that is scored.

    Returns:
        The blocks; `about` has `sources` and their `splits`, `num_blocks`, `block_size`,
        `block_bos` and `seed`.

    Raises:
        ConfigError: Bad options, no text, less than one block, a tokenizer that does not fit.
    """
    block_size = data.check(config.block_size)
    sources = data.parts()
    shares = _shares(sources, data.num_blocks)
    tokenizer = load_tokenizer(checkpoint_dir, config)
    bos = _block_bos(data, tokenizer, checkpoint_dir)
    seed = data.seed if data.shuffle else None
    step = block_size + (bos is not None)  # tokens that a block may take from the stream
    found = [
        documents(
            source,
            tokenizer,
            part=part,
            valid_fraction=data.valid_fraction,
            seed=seed,
            block_size=block_size,
            max_tokens=None if share is None else share * step + 1,
        )
        for source, share in zip(sources, shares, strict=True)
    ]
    if sources[0].weight is None:
        label = ", ".join(source.label for source in sources)
        packed = [
            pack(
                _pooled(found, data),
                block_size,
                num_blocks=data.num_blocks,
                label=label,
                seed=seed,
                bos=bos,
            )
        ]
    else:
        packed = [
            pack(
                (read() for read in docs),
                block_size,
                num_blocks=share,
                label=source.label,
                seed=seed,
                bos=bos,
            )
            for docs, share, source in zip(found, shares, sources, strict=True)
        ]
        packed = _weighted(packed, shares, [source.weight or 0.0 for source in sources])
    blocks = _join(packed, data)
    highest = int(blocks.tokens.max())
    if highest >= (config.padded_vocab_size or 0):
        raise ConfigError(
            f"the tokenizer in {checkpoint_dir} made token {highest} and does not fit "
            f"the model's vocabulary of {config.padded_vocab_size}"
        )
    about = {
        "sources": [source.label for source in sources],
        "splits": [source.split(part, data.valid_fraction) for source in sources],
        "num_blocks": blocks.num_blocks,
        "block_size": block_size,
        "block_bos": bos is not None,
        "seed": data.seed,
    }
    return replace(blocks, about=about)


def _block_bos(data: TextData, tokenizer: "Tokenizer", checkpoint_dir: Path) -> int | None:
    """The token that stands before every block, None if there is none."""
    wanted = tokenizer.use_bos if data.block_bos == "auto" else data.block_bos
    if wanted and tokenizer.bos_id is None:
        raise ConfigError(
            f"data.block_bos=true: the tokenizer in {checkpoint_dir} names no BOS token; use auto"
        )
    return tokenizer.bos_id if wanted else None


def _pooled(found: Sequence[Sequence[Reader]], data: TextData) -> Iterator[Document]:
    """All documents of all sources, mixed with each other where `shuffle` asks for it."""
    readers = [reader for docs in found for reader in docs]
    if data.shuffle and len(found) > 1:
        random.Random(data.seed).shuffle(readers)
    return (read() for read in readers)


def _shares(sources: Sequence[MixSource], num_blocks: int | None) -> list[int | None]:
    """Blocks that each source may give: by largest remainder, so that they sum to `num_blocks`."""
    if num_blocks is None or sources[0].weight is None:
        return [num_blocks] * len(sources)
    weights = [source.weight or 0.0 for source in sources]
    exact = [num_blocks * w / sum(weights) for w in weights]
    shares = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: num_blocks - sum(shares)]:
        shares[i] += 1
    if not all(shares):
        starved = sources[shares.index(0)].label
        raise ConfigError(
            f"data.num_blocks={num_blocks} leaves no block for {starved}: raise it, or its weight"
        )
    return list(shares)


def _weighted(
    packed: Sequence[TokenBlocks], shares: list[int | None], weights: list[float]
) -> list[TokenBlocks]:
    """Trim the packed sources so that their numbers of blocks stand in the ratio of the weights."""
    if all(blocks.num_blocks == share for blocks, share in zip(packed, shares, strict=True)):
        return list(packed)
    unit = min(blocks.num_blocks / weight for blocks, weight in zip(packed, weights, strict=True))
    counts = [max(1, int(unit * weight + 1e-9)) for weight in weights]
    return [TokenBlocks(b.tokens[:n], b.num_bytes[:n]) for b, n in zip(packed, counts, strict=True)]


def _join(packed: Sequence[TokenBlocks], data: TextData) -> TokenBlocks:
    """Put the blocks of several sources into one random order, which repeats for the same seed."""
    import torch

    tokens = torch.cat([blocks.tokens for blocks in packed])
    num_bytes = torch.cat([blocks.num_bytes for blocks in packed])
    if data.shuffle and len(packed) > 1:
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(data.seed))
        tokens, num_bytes = tokens[order], num_bytes[order]
    return TokenBlocks(tokens, num_bytes)


def pack(
    docs: Iterable[Document],
    block_size: int,
    *,
    num_blocks: int | None,
    label: str,
    seed: int | None,
    bos: int | None = None,
) -> TokenBlocks:
    """Join documents into one stream and cut it into blocks; a rest that fills none is left out.

    Args:
        docs: Tokenised documents; read only as far as `num_blocks` needs.
        block_size: Targets per block, T.
        num_blocks: At most this many blocks.
        label: Names the source in errors.
        seed: Draws the `num_blocks` at random where a long document gave more; None: the first.
        bos: Token that heads every block; where the stream has one there, it is not doubled.
    """
    import torch

    taken, length = [], 0
    step = block_size + (bos is not None)
    for doc in docs:
        taken.append(doc)
        length += len(doc.ids)
        if num_blocks is not None and length > num_blocks * step:
            break
    if not length:
        raise ConfigError(f"data: {label} holds no text")
    stream = torch.cat([doc.ids for doc in taken]).long()
    firsts = _first_targets(stream, block_size, bos)
    if not firsts:
        raise ConfigError(
            f"data: {label} gives {length} tokens, and one block needs {block_size + 1}: "
            "add text or lower data.block_size"
        )
    tokens = stream[torch.tensor(firsts)[:, None] + torch.arange(-1, block_size)]  # (N, T + 1)
    if bos is not None:
        tokens[:, 0] = bos
    num_bytes = _bytes_before(taken, torch.tensor([*firsts, firsts[-1] + block_size])).diff()
    if num_blocks is not None and len(tokens) > num_blocks:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        pick = (
            torch.arange(len(tokens))
            if seed is None
            else torch.randperm(len(tokens), generator=generator)
        )
        tokens, num_bytes = tokens[pick[:num_blocks]], num_bytes[pick[:num_blocks]]
    return TokenBlocks(tokens.contiguous(), num_bytes)


def _first_targets(stream: "torch.Tensor", block_size: int, bos: int | None) -> list[int]:
    """Positions of the first target of every block: one behind what stands before it."""
    if bos is None:
        return list(range(1, len(stream) - block_size + 1, block_size))
    heads = (stream == bos).tolist()
    firsts, at = [], 0
    while (first := at + (at < len(heads) and heads[at])) + block_size <= len(stream):
        firsts.append(first)
        at = first + block_size
    return firsts


def _bytes_before(docs: Sequence[Document], positions: "torch.Tensor") -> "torch.Tensor":
    """Bytes of text before stream positions (P,): exact at document ends, pro rata within one."""
    import torch

    lengths, lead, content, size = (
        torch.tensor(column)
        for column in zip(
            *[(len(d.ids), d.lead, d.content, d.num_bytes) for d in docs], strict=True
        )
    )
    ends = lengths.cumsum(0)
    at = torch.searchsorted(ends, positions, right=True).clamp(max=len(docs) - 1)
    inside = (positions - (ends - lengths)[at] - lead[at]).clamp(min=0).minimum(content[at])
    return (size.cumsum(0) - size)[at] + size[at] * inside // content[at].clamp(min=1)
