"""Sub-networks as ordinary checkpoints: litgpt's and Hugging Face's."""
