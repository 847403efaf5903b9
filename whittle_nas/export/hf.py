"""Write a litgpt model as a directory that `AutoModelForCausalLM.from_pretrained` loads.

Nothing here imports transformers: the directory is plain JSON and safetensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from whittle_nas import assets
from whittle_nas.errors import ConfigError
from whittle_nas.export.hf_config import HFTarget, hf_target
from whittle_nas.export.hf_names import to_hf
from whittle_nas.export.packed import Packing
from whittle_nas.progress import Progress, no_progress
from whittle_nas.weights.checkpoint import check_finite, copy_companions
from whittle_nas.weights.tying import HEAD, TABLE, same_table

SHARD_BYTES = 5 * 10**9
# Which transformers the layout was checked with. Without it, a tokenizer beside a `mistral` config
# is reported as having Mistral's old, wrong regular expression.
TRANSFORMERS_VERSION = "5.3.0"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_COPIED = ("generation_config.json", "prompt_style.yaml")
_DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


def write_hf(
    out_dir: Path,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    packing: Packing | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = no_progress,
) -> HFTarget:
    """Fill an empty directory with a Hugging Face model.

    Weights are converted and written one by one, so memory stays near one copy of the largest.

    Args:
        out_dir: existing directory; make it with `weights.files.atomic_directory`.
        config: litgpt config.
        tensors: litgpt state dict of its model; views are fine, and so is a mapping that makes
            each tensor when it is asked for.
        source: checkpoint directory that tokenizer, special token ids, generation settings and
            licence come from.
        dtype: of the written weights; default: as they are.
        packing: of quantised weights, to write their integers.
        shard_bytes: largest size of one weights file, unless a single tensor is larger.
        progress: shows the tensors that are written.

    Returns:
        What the model was written as.

    Raises:
        ConfigError: before anything is written, if no architecture can express the model (see
            `hf_target`) or a JSON file of the source is malformed.
    """
    target = hf_target(config)
    if target.code is not None:
        shutil.copyfile(str(files(assets) / "deci" / target.code), out_dir / target.code)
    generation = _read_json(source, "generation_config.json")
    content = _config_json(target, tensors, source, dtype)
    if packing is not None:
        content["quantization_config"] = packing.config()
    _write_json(out_dir / "config.json", content)
    ids = {key: content[key] for key in _SPECIAL_IDS if content[key] is not None}
    _write_json(out_dir / "generation_config.json", {**ids, **generation})
    if source is not None:
        copy_companions(source, out_dir, leave=_NOT_COPIED)
    tied = content["tie_word_embeddings"]
    # The sizes come first in the file, so the map is run on empty tensors before the real ones.
    empty = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in tensors.items()
    }
    layout = dict(_converted(config, empty, target, tied, dtype, packing))
    converted = _converted(config, tensors, target, tied, dtype, packing)
    shown = progress(converted, "writing weights", len(layout))
    _write_weights(out_dir, layout, shown, shard_bytes)
    return target


def write_hf_config(
    out_dir: Path,
    target: HFTarget,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write `config.json` alone.

    Where `target.query_scale` is not 1, it describes the weights that `write_hf` writes, but not
    those of a litgpt checkpoint, whose config holds the scale.

    Args:
        out_dir: existing directory.
        target: what `hf_target` found.
        tensors: litgpt state dict, whose head and embedding are compared.
        source: checkpoint directory that special token ids come from.
        dtype: of the weights; default: that of the embedding.
    """
    _write_json(out_dir / "config.json", _config_json(target, tensors, source, dtype))


def _config_json(
    target: HFTarget,
    tensors: Mapping[str, torch.Tensor],
    source: Path | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    embedding, head = tensors[TABLE], tensors[HEAD]
    return {
        **target.config_json,
        **_special_ids(source, target.config_json["vocab_size"]),
        "tie_word_embeddings": same_table(embedding, head),
        "torch_dtype": str(dtype or embedding.dtype).removeprefix("torch."),
        "transformers_version": TRANSFORMERS_VERSION,
    }


def _converted(
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    target: HFTarget,
    tied: bool,
    dtype: torch.dtype | None,
    packing: Packing | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    way = {"model_type": target.model_type, "query_scale": target.query_scale}
    for name, tensor in to_hf(config, tensors, **way, tied=tied):
        for stored, part in packing.pack(name, tensor) if packing else [(name, tensor)]:
            yield stored, part.to(dtype) if dtype and part.is_floating_point() else part


def _write_weights(
    out_dir: Path,
    layout: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_bytes: int,
) -> None:
    """`model.safetensors`, or several files and their index, tensor by tensor.

    The libraries' own writers need all tensors of a file in memory.

    Args:
        out_dir: existing directory.
        layout: empty tensors with the names, shapes and dtypes of all tensors, in order.
        tensors: the same with their values.
        shard_bytes: largest size of one file, unless a single tensor is larger.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(layout),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((out_dir / name).open("wb"))
            for name in split.filename_to_tensors
        }
        for name, members in split.filename_to_tensors.items():
            files[name].write(_header({member: layout[member] for member in members}))
        for name, tensor in tensors:  # within each file they come in the order of its header
            assert tensor.shape == layout[name].shape
            check_finite(name, tensor)
            raw = tensor.detach().cpu().contiguous().view(torch.uint8)
            # not tofile, which hides that a disk is full
            files[split.tensor_to_filename[name]].write(raw.numpy().data)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(out_dir / "model.safetensors.index.json", index)


def _header(layout: Mapping[str, torch.Tensor]) -> bytes:
    """The beginning of a file of https://github.com/huggingface/safetensors#format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in layout.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _special_ids(source: Path | None, vocab_size: int) -> dict[str, int | list[int] | None]:
    """Token ids from the source's generation settings, else from its `config.json`.

    Each key is set, also to None: the defaults in transformers are those of another vocabulary.
    """
    generation = _read_json(source, "generation_config.json")
    config = _read_json(source, "config.json")
    config = {**config.get("text_config", {}), **config}
    found: dict[str, int | list[int] | None] = {}
    for key in _SPECIAL_IDS:
        value = generation.get(key, config.get(key))
        ids = value if isinstance(value, list) else [value]
        known = all(isinstance(item, int) and 0 <= item < vocab_size for item in ids)
        found[key] = value if known else None
    return found


def _read_json(source: Path | None, name: str) -> dict[str, Any]:
    """A JSON file of the source, empty if there is none."""
    from litgpt.utils import fix_and_load_json

    if source is None or not (source / name).is_file():
        return {}
    try:
        text = (source / name).read_text(encoding="utf-8")
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = fix_and_load_json(text)  # Llama 3.2 came with a comma too many
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source / name} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{source / name} must hold a JSON object")
    return found


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
