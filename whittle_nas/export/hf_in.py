"""Hugging Face checkpoints in: a directory, or an id of the hub, becomes a litgpt checkpoint."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path

from whittle_nas.errors import ConfigError
from whittle_nas.weights.files import PARTIAL, WEIGHTS

_MODEL_CONFIG = "model_config.yaml"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DOWNLOADS = Path("checkpoints")  # where `litgpt download` puts them
_UNFINISHED = f".download{PARTIAL}"  # in a directory whose download has not ended


def litgpt_directory(given: Path, say: Callable[[str], None]) -> Path:
    """The litgpt checkpoint that a user means.

    Args:
        given: a litgpt directory, which is returned as it is; a Hugging Face directory, which
            litgpt's converter gives a `lit_model.pth` once; or an id of the hub, which litgpt's own
            download puts into `checkpoints/<id>`. Anything else is left to `open_checkpoint`.
        say: takes one sentence before each of these works begins.

    Raises:
        ConfigError: if the model is none that litgpt has, if a file is corrupt, or if the hub can't
            be reached or does not have it.
    """
    if given.is_dir():
        return _converted(given, say) if _is_hf(given) else given
    if given.exists() or not _HUB_ID.fullmatch(str(given)):
        return given
    directory = _DOWNLOADS / given
    unfinished = directory / _UNFINISHED
    there = _is_hf(directory) or (directory / WEIGHTS).is_file()
    if not there or unfinished.is_file():
        say(f"{given} is no directory here: downloading it from the hub to {directory}")
        _download(str(given), unfinished)
    return _converted(directory, say) if _is_hf(directory) else directory


def _is_hf(directory: Path) -> bool:
    """Whether there is a Hugging Face model that has not been converted."""
    if (directory / WEIGHTS).is_file() or not (directory / "config.json").is_file():
        return False
    return bool(_weight_files(directory))


def _weight_files(directory: Path) -> list[Path]:
    found = [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
    return sorted(path for path in found if path.name != "training_args.bin")


def _converted(directory: Path, say: Callable[[str], None]) -> Path:
    """Give a Hugging Face directory litgpt's two files; half a conversion leaves nothing."""
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from safetensors import SafetensorError

    from whittle_nas.export.hf_read import litgpt_config
    from whittle_nas.weights.checkpoint import open_checkpoint

    config, base = litgpt_config(directory)
    say(f"{directory} is a Hugging Face model ({config.name}): converting it once to {WEIGHTS}")
    for old in directory.glob(f".litgpt.*{PARTIAL}"):
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    partial = Path(tempfile.mkdtemp(PARTIAL, ".litgpt.", directory))
    try:
        for path in [*_weight_files(directory), *directory.glob("*.index.json")]:
            (partial / path.name).symlink_to(path.resolve())
        known = {field.name: getattr(config, field.name) for field in fields(config)}
        # It chooses the family by the name, where it takes Gemma-2b for a Gemma 2.
        with _listed(base, known), redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its progress bar complains of its own steps
            convert_hf_checkpoint(partial.resolve(), model_name=base)
        open_checkpoint(partial)  # names and shapes
        for name in (_MODEL_CONFIG, WEIGHTS):  # the weights last: with them it is converted
            (partial / name).replace(directory / name)
    except (KeyError, ValueError, RuntimeError, EOFError, AttributeError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"--checkpoint_dir {directory}: litgpt can't convert it as {config.name}: {reason}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


@contextmanager
def _listed(name: str, settings: dict[str, object]) -> Iterator[None]:
    """litgpt's converter looks a model up in its list by name: for the block it is there."""
    from litgpt.config import name_to_config

    before = name_to_config[name]
    name_to_config[name] = {key: value for key, value in settings.items() if key != "rope_n_elem"}
    try:
        yield
    finally:
        name_to_config[name] = before


def _download(repo_id: str, unfinished: Path) -> None:
    """litgpt's own download, without its conversion, which would leave half a file."""
    from huggingface_hub import constants
    from litgpt.scripts.download import download_from_hub

    # litgpt 0.5.13 reads a setting that the hub's library has dropped in version 1.
    if not hasattr(constants, "HF_HUB_ENABLE_HF_TRANSFER"):
        setattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", False)  # noqa: B010
    made = [path for path in (unfinished.parent, *unfinished.parents) if not path.exists()]
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    unfinished.touch()
    try:
        with redirect_stdout(io.StringIO()):
            download_from_hub(
                repo_id,
                access_token=os.environ.get("HF_TOKEN"),
                convert_checkpoint=False,
                checkpoint_dir=_DOWNLOADS,
                model_name=repo_id.rpartition("/")[2],
            )
    # The hub's library answers with errors of several network libraries and of its own.
    except Exception as error:
        if not any(path != unfinished for path in unfinished.parent.iterdir()):
            unfinished.unlink()
            for path in dict.fromkeys(made):
                path.rmdir()
        raise ConfigError(_refusal(repo_id, error)) from error
    unfinished.unlink()


def _refusal(repo_id: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    start = f"--checkpoint_dir {repo_id} is no directory, and "
    if "not found" in text.lower() or "401" in text:
        return f"{start}the hub has no model of that name that you may read (HF_TOKEN names you)"
    if "authentication" in text or "gated" in text.lower():
        return f"{start}the hub asks for permission: accept its licence there and set HF_TOKEN"
    if "weight files" in text:
        return f"{start}its repository on the hub has no weights"
    return (
        f"{start}the hub can't be reached ({type(error).__name__}); get it on a machine that can, "
        f"`hf download {repo_id} --local-dir {_DOWNLOADS / repo_id}`, and give the directory"
    )
