"""An exported directory on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from whittle_nas.errors import ConfigError
from whittle_nas.weights.files import RUN_FILE

_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def check_push(name: str, *, is_hf: bool) -> None:
    """Refuse before any work what can't be uploaded after it.

    Raises:
        ConfigError: if the name is none of a repository, nobody is logged in, or the layout is
            not the one that the hub's readers expect.
    """
    from huggingface_hub import get_token

    if not is_hf:
        raise ConfigError(f"--push_to_hub {name} uploads a model for transformers: add --format hf")
    if not _NAME.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(f"--push_to_hub {name} must be a repository, such as me/my-model")
    if get_token() is None:
        raise ConfigError(f"--push_to_hub {name} needs a token: `hf auth login`, or set HF_TOKEN")


def push(directory: Path, name: str) -> str:
    """Upload a directory to a model repository, which is made if it is not there.

    Args:
        directory: what to upload; the note how it was made stays here, because it names paths.
        name: of the repository; without an owner it is the user's.

    Returns:
        Address of the model.

    Raises:
        ConfigError: with the command that uploads what is written already.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    # The hub's library answers with errors of several network libraries and of its own.
    try:
        repo = hub.create_repo(name, exist_ok=True)
        hub.upload_folder(
            repo_id=repo.repo_id,
            folder_path=directory,
            ignore_patterns=[RUN_FILE, ".*"],
            commit_message="Sub-network exported by nas",
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"--push_to_hub {name}: the model is in {directory}, but the hub did not take it "
            f"({reason}); try again with `hf upload {name} {directory}`"
        ) from error
    return str(repo)
