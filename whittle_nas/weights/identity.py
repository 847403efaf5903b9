"""Which checkpoint a result belongs to: by content, so that directories may move."""

from hashlib import sha256
from pathlib import Path

import torch

from whittle_nas.weights.checkpoint import COMPANIONS, MODEL_CONFIG, WEIGHTS
from whittle_nas.weights.info import FILE_NAME

# Read whole up to 256 MiB; of more, 256 pieces of 1 MiB: training changes all weights.
WHOLE = 2**28
PIECE = 2**20


def fingerprint(checkpoint_dir: Path) -> str:
    """A short hash of the weights, the model's configuration, its layer order and its tokenizer.

    Args:
        checkpoint_dir: A valid litgpt checkpoint directory.
    """
    digest = sha256()
    for name in (MODEL_CONFIG, FILE_NAME, *COMPANIONS):
        path = checkpoint_dir / name
        if path.is_file():
            digest.update(name.encode())
            digest.update(path.read_bytes())
    with (checkpoint_dir / WEIGHTS).open("rb") as file:
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        step = PIECE if size <= WHOLE else size * PIECE // WHOLE
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def tokens_id(tokens: torch.Tensor) -> str:
    """A short name for text in blocks (N, T + 1)."""
    digest = sha256(tokens.contiguous().numpy().tobytes()).hexdigest()[:16]
    return f"{digest}, {tokens.shape[0]} blocks of {tokens.shape[1] - 1} tokens"
