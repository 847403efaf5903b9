"""The small checkpoint and the text that ship with `nas`, for trying it out and for tests."""

from importlib.resources import files
from pathlib import Path


def bundled_checkpoint() -> Path:
    """The litgpt checkpoint directory of `pydoc-1m`, a Llama of 1.1 million parameters.

    Beside the weights and the tokenizer lie `train.jsonl`, `calibration.jsonl`, `valid.jsonl` and
    `test.jsonl`, one `{"text": ...}` a line. Its README.md says how it was made and what it can do.
    """
    return Path(str(files(__name__) / "pydoc-1m"))
