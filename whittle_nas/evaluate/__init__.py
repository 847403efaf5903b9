"""Perplexity and the LM Evaluation Harness on litgpt models, sub-networks in place."""
