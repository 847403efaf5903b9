"""Training and validation samples from text or from litgpt's instruction data modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from litgpt import Config

from whittle_nas.data import Part, TextData, TextSource, load_blocks, load_tokenizer
from whittle_nas.data.sources import module_loader
from whittle_nas.errors import ConfigError
from whittle_nas.train.batches import IGNORE, Sample, from_blocks, from_labelled, pack


@dataclass(frozen=True)
class Found:
    """Samples of one part of the data.

    Attributes:
        samples: with at least one label each.
        about: where they come from, in words.
        num_unlabelled: samples that were left out because no label was left.
        num_cut: samples that were longer than the block size and were cut.
    """

    samples: list[Sample]
    about: str = ""
    num_unlabelled: int = 0
    num_cut: int = 0


def load_samples(
    data: TextData,
    checkpoint_dir: Path,
    *,
    config: Config,
    part: Part = Part.TRAIN,
    packing: bool = False,
) -> Found:
    """Samples that `data` describes: blocks of text, or instructions with their labels.

    Args:
        data: text, or `module`s of `litgpt.data`.
        checkpoint_dir: directory with the tokenizer.
        config: the model's configuration.
        part: what it is for: `VALID` for everything that is scored.
        packing: join short instruction samples into rows of the block size; each attends to
            itself only. Text is always packed, as in pre-training.

    Raises:
        ConfigError: for everything that can be wrong with the data, and if nothing has a label.
    """
    parts = data.parts()
    if not any(source.module for source in parts):
        blocks = load_blocks(data, checkpoint_dir, config=config, part=part)
        return Found(from_blocks(blocks.tokens), str(blocks))
    if not all(source.module for source in parts):
        raise ConfigError("data.sources: mix text with text, or modules with modules, not both")
    block_size = data.check(config.block_size)
    tokenizer = load_tokenizer(checkpoint_dir, config)
    if packing and config.sliding_window_size is not None:
        # litgpt replaces the mask that keeps samples apart by the one of the window
        raise ConfigError(
            f"packing=true does not go with the sliding window of model {config.name!r}; use false"
        )
    if tokenizer.eos_id is None:
        raise ConfigError(
            f"the tokenizer in {checkpoint_dir} names no EOS token, which ends every answer: give "
            "it in generation_config.json or tokenizer_config.json"
        )
    items = [item for s in parts for item in _module_items(s, tokenizer, part, block_size)]
    samples = [from_labelled(item["input_ids"], item["labels"]) for item in items]
    kept = [sample for sample in samples if sample.num_labels]
    if not kept:
        raise ConfigError(
            f"data: none of the {len(items)} samples of {data.parts()[0].label} has a label within "
            f"block_size={block_size}; raise it, or set mask_prompt to false"
        )
    cut = sum(len(item["input_ids"]) >= block_size for item in items)
    found = pack(kept, block_size) if packing else kept
    about = ", ".join(f"{s.label} ({s.split(part, data.valid_fraction)})" for s in parts)
    about = f"{about}: {len(kept)} samples"
    return Found(found, about, num_unlabelled=len(samples) - len(kept), num_cut=cut)


def load_both(
    data: TextData,
    valid: TextData | None,
    checkpoint_dir: Path,
    *,
    config: Config,
    packing: bool = False,
) -> tuple[Found, Found]:
    """Training and validation samples; without `valid` a share of `data` is held out.

    Raises:
        ConfigError: as `load_samples`, and if there is nothing to validate on.
    """
    if valid is None and not data.holds_out():
        raise ConfigError(
            "data.valid_fraction=0 and no `valid`: give a share to hold out such as 0.05, or "
            "other text to validate on"
        )
    fitted = data if valid is None else replace(data, valid_fraction=0.0)
    train = load_samples(fitted, checkpoint_dir, config=config, packing=packing)
    return train, load_samples(valid or data, checkpoint_dir, config=config, part=Part.VALID)


def _module_items(
    source: TextSource, tokenizer: Any, part: Part, block_size: int
) -> Sequence[dict[str, Any]]:
    """`input_ids` and `labels` of the samples of one litgpt data module."""
    with module_loader(source, tokenizer, part=part, block_size=block_size) as (module, loader):
        dataset = loader.dataset
        if not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                f"data.module={source.module} streams its data; use an instruction module or "
                "data.files"
            )
        items = [dataset[i] for i in islice(range(len(dataset)), source.num_documents)]
    ignore = getattr(module, "ignore_index", IGNORE)
    for item in items if ignore != IGNORE else ():
        item["labels"] = item["labels"].masked_fill(item["labels"] == ignore, IGNORE)
    return items
