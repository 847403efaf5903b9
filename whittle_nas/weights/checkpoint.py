"""litgpt checkpoint directories, in and out."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt import Config

from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress
from whittle_nas.reading import read_yaml
from whittle_nas.space.rules import check_supported
from whittle_nas.weights import axes
from whittle_nas.weights.assembly import build, renew_tables
from whittle_nas.weights.config import config_of, stored
from whittle_nas.weights.files import RUN_FILE, WEIGHTS
from whittle_nas.weights.info import FILE_NAME, SupernetInfo
from whittle_nas.weights.norms import IMPORTANCE
from whittle_nas.weights.placement import Device, place
from whittle_nas.weights.shortcuts import check_no_shortcuts, model_class
from whittle_nas.weights.supernet import SuperNetwork
from whittle_nas.weights.tying import HEAD, TABLE, found_in, tie_head

MODEL_CONFIG = "model_config.yaml"
_CHECKED = 4096  # rows that are looked at at a time
# Everything that litgpt and Hugging Face read beside the weights, copied as it is.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "generation_config.json", "prompt_style.yaml",
)  # fmt: skip
# The largest that are taken: beyond them a file is wrong, and would cost hours or all memory.
_SIZES = {
    "n_embd": 10**6, "n_head": 10**5, "n_query_groups": 10**5, "head_size": 10**5,
    "intermediate_size": 10**7, "n_layer": 2000, "block_size": 2**25, "padded_vocab_size": 10**8,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that was found valid; of its weights, names and shapes.

    Attributes:
        path: the directory.
        config: of the model; it says if its head is its token table.
        info: content of `supernet.yaml`.
    """

    path: Path
    config: Config
    info: SupernetInfo

    @property
    def tied(self) -> bool:
        """Whether the head is the token table: they share memory, or hold the same values."""
        return axes.is_tied(self.config)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, mapped from the file and not copied.

        Raises:
            ConfigError: if the file is corrupt, holds more than tensors, or if names or shapes are
                not those of the model.
        """
        tensors = _read_tensors(self.path / WEIGHTS)
        _check_tensors(tensors, self.config, self.path / WEIGHTS)
        return tensors


def open_checkpoint(
    path: Path | str, *, shortcuts: bool = False, per_layer: bool = False
) -> Checkpoint:
    """Check a litgpt checkpoint directory, with or without `supernet.yaml`.

    Args:
        path: the directory.
        shortcuts: take a model with shortcut matrices, too, which is more than a litgpt model.
        per_layer: take a model whose layers have sizes of their own, too, which is more as well.

    Raises:
        ConfigError: naming the directory, and what is missing or malformed.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(
            f"--checkpoint_dir {path} is not a directory; give a litgpt or Hugging Face directory, "
            "or an id of the hub, such as EleutherAI/pythia-160m"
        )
    missing = [name for name in (WEIGHTS, MODEL_CONFIG) if not (path / name).is_file()]
    if missing and is_unfinished(path):
        raise ConfigError(
            f"--checkpoint_dir {path} is an unfinished training: finish it with the command that "
            "began it and --resume true"
        )
    if missing and (alone := _trained_alone(path)):
        raise ConfigError(
            f"--checkpoint_dir {path} holds networks that were trained alone; give one of them, "
            f"such as {alone[0]}"
        )
    if missing:
        raise ConfigError(
            f"--checkpoint_dir {path} is not a litgpt checkpoint: {' and '.join(missing)} missing"
        )
    config = read_model_config(path / MODEL_CONFIG)
    check_supported(config)
    if not shortcuts:
        check_no_shortcuts(config, path)
    if not per_layer and getattr(config, "blocks", None) is not None:
        raise ConfigError(
            f"--checkpoint_dir {path} has layers of different sizes, which nas evaluate, export, "
            "generate and profile run as it is; here give the checkpoint that it was cut from, or "
            "export it with --pad true"
        )
    found = Checkpoint(path, config, SupernetInfo.read(path, config))
    return replace(found, config=found_in(config, found.state_dict()))


def load_supernet(
    path: Path | str, *, device: Device | None = "cpu", dtype: torch.dtype | None = None
) -> SuperNetwork:
    """Load a checkpoint as a super-network.

    Args:
        path: checkpoint directory.
        device: where to put the model: `cuda:0`, or `cuda:0,cuda:1` for one whose blocks are
            shared out between several; see `placement`. None: the CPU.
        dtype: of the parameters; default: as stored.

    Raises:
        ConfigError: for everything that can be wrong with the directory, and for weights that are
            not finite.
    """
    return supernet_of(
        open_checkpoint(path, shortcuts=True, per_layer=True), device=device, dtype=dtype
    )


def is_unfinished(path: Path) -> bool:
    """Whether a training stopped here: of one checkpoint, or of networks in folders of theirs."""
    files = [file for where in ("", "*/") for file in path.glob(f"{where}checkpoints/*.ckpt")]
    begun = {file.parents[1] for file in files}
    between = bool(_trained_alone(path)) and not (path / RUN_FILE).is_file()
    return between or any(not (directory / WEIGHTS).is_file() for directory in begun)


def _trained_alone(path: Path) -> list[Path]:
    """Folders of networks that one training has made: other checkpoints have no losses beside."""
    folders = sorted(file.parent for file in path.glob(f"*/{WEIGHTS}"))
    return [folder for folder in folders if (folder / "losses.yaml").is_file()]


def supernet_of(
    found: Checkpoint,
    *,
    device: Device | None = "cpu",
    dtype: torch.dtype | None = None,
) -> SuperNetwork:
    """As `load_supernet`, of a checkpoint that is open already."""
    with torch.device("meta"):
        model = build(found.config, model_class(found.config))
    model.load_state_dict(found.state_dict(), strict=True, assign=True)
    tie_head(model)
    renew_tables(model)
    model = place(model, device, dtype).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)
    return SuperNetwork(model, found.info)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinity, which come out as accuracies at chance and not as an error.

    Raises:
        ConfigError: naming the parameter and its number format.
    """
    # A sum is not finite if one value isn't; of parts, since torch sums a float32 copy of bfloat16.
    sums = [part.sum(dtype=torch.float32) for part in tensor.split(_CHECKED)]
    if sums and not torch.stack(sums).sum().isfinite():
        number_format = str(tensor.dtype).removeprefix("torch.")
        raise ConfigError(
            f"parameter {name!r} of the checkpoint has values that are not finite "
            f"in {number_format}"
        )


def write_checkpoint(
    out_dir: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Config,
    source: Path,
    info: SupernetInfo | None = None,
    progress: Progress = no_progress,
) -> None:
    """Fill an empty directory with a whole litgpt checkpoint.

    Tensors are written one by one, so memory stays near one copy of the largest; a token table
    that is also the head is stored once.

    Args:
        out_dir: existing directory; make it with `files.atomic_directory`.
        tensors: parameters by litgpt name; views are fine.
        config: litgpt config of the model.
        source: directory whose tokenizer, prompt style, generation settings and licence go along.
        info: content of `supernet.yaml`; none is written for an ordinary checkpoint.
        progress: shows the tensors that are written.
    """
    save_tensors(out_dir / WEIGHTS, tensors, progress)
    text = yaml.safe_dump(_plain(stored(config)))
    (out_dir / MODEL_CONFIG).write_text(text, encoding="utf-8")
    copy_companions(source, out_dir)
    if info is not None:
        (out_dir / FILE_NAME).write_text(info.dump(), encoding="utf-8")
        if info.norms is not None:  # its table is in there
            shutil.copyfile(source / IMPORTANCE, out_dir / IMPORTANCE)


def copy_companions(source: Path, out_dir: Path, *, leave: Container[str] = ()) -> None:
    """Copy what a checkpoint directory holds beside the weights and their description.

    Args:
        source: checkpoint directory.
        out_dir: existing directory.
        leave: names that are not copied.
    """
    for path in [*(source / name for name in COMPANIONS), *licences(source)]:
        if path.name not in leave and path.is_file():
            shutil.copyfile(path, out_dir / path.name)


def licences(source: Path) -> list[Path]:
    """Files that go wherever a checkpoint's weights go."""
    names = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
    return sorted({path for name in names for path in source.glob(name) if path.is_file()})


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], progress: Progress = no_progress
) -> None:
    """Write a file that `torch.load(mmap=True, weights_only=True)` reads, tensor by tensor.

    Raises:
        ConfigError: if a value is not finite.
    """
    from litgpt.utils import incremental_save

    with incremental_save(path) as writer:
        proxies: dict[str, Any] = {}
        tables: dict[bytes, Any] = {}  # head and table; hashed, since two of them are a lot to hold
        for name in progress(tensors, "writing weights", len(tensors)):
            # not in a variable, which would hold one tensor while the next one is made
            proxies[name] = _store(writer, name, tensors[name], tables)
        writer.save(proxies)


def _store(writer: Any, name: str, tensor: torch.Tensor, tables: dict[bytes, Any]) -> Any:
    """Write a tensor, or find the table that is equal to it among those that are written."""
    check_finite(name, tensor)
    if name not in (HEAD, TABLE):
        return writer.store_early(_compact(tensor.detach()))
    key = _digest(tensor)
    if key not in tables:
        tables[key] = writer.store_early(_compact(tensor.detach()))
    return tables[key]


def _digest(tensor: torch.Tensor) -> bytes:
    """What is the same for equal tables, and for no others."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for rows in tensor.detach().split(_CHECKED):
        digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that fills its storage: pickling a view would write all that it looks into."""
    fills = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if fills and tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def read_model_config(path: Path) -> Config:
    """Read `model_config.yaml`.

    Raises:
        ConfigError: if it is not YAML, has unknown keys, or sizes that make no model.
    """
    spec = read_yaml(path)
    try:
        config = config_of(spec)
        sizes = {name: getattr(config, name) for name in _SIZES}
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} does not describe a litgpt model: {error!r}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= _SIZES[name]:
            raise ConfigError(f"{path}: {name}={value!r} must be between 1 and {_SIZES[name]}")
    if not isinstance(config.rotary_percentage, (int, float)) or not (
        0 <= config.rotary_percentage <= 1
    ):
        raise ConfigError(
            f"{path}: rotary_percentage={config.rotary_percentage!r} must be between 0 and 1"
        )
    if config.norm_class_name not in ("LayerNorm", "RMSNorm"):
        raise ConfigError(
            f"{path}: norm_class_name={config.norm_class_name!r} must be LayerNorm or RMSNorm"
        )
    return config


def load_torch(path: Path) -> Any:
    """Values of a file of `torch.save`, tensors mapped from it; nothing in it is run.

    Raises:
        ConfigError: if it is corrupt, or holds objects that could run code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{path} holds more than tensors, which could run code when loaded; save a state dict"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is corrupt or not a torch file: {reason}") from None


def _plain(value: Any) -> Any:
    """Tuples and enums as YAML's own types."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    loaded = load_torch(path)
    tensors = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in tensors.values()
    ):
        raise ConfigError(f"{path} must hold a dictionary of tensors, as litgpt saves it")
    return tensors


def _check_tensors(tensors: Mapping[str, torch.Tensor], config: Config, path: Path) -> None:
    names = axes.parameter_names(config)
    if missing := sorted(set(names) - set(tensors)):
        raise ConfigError(f"{path} lacks {_some(missing)} of model {config.name!r}")
    if unknown := sorted(set(tensors) - set(names)):
        raise ConfigError(f"{path} has unknown {_some(unknown)} for model {config.name!r}")
    for name in names:
        expected = axes.shape(name, config)
        if tuple(tensors[name].shape) != expected:
            raise ConfigError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, "
                f"{MODEL_CONFIG} says {expected}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"parameter {names[0]!r}{more}"
