"""Find smaller language models inside a pretrained litgpt checkpoint."""

__version__ = "0.1.0"
