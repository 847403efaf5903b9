"""Tiny random models of every litgpt family that Hugging Face has, too."""

from litgpt import GPT, Config

from tests.conftest import fill_random, resized
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.slicing import plan_slices, slice_state_dict

SIZES = {
    "n_layer": 3, "n_embd": 64, "n_head": 4, "intermediate_size": 96, "vocab_size": 90,
    "padded_vocab_size": 96, "block_size": 64,
}  # fmt: skip
GROUPED = {"n_query_groups": 2}
SCALED_ROPE = {**GROUPED, "block_size": 16384}
GEMMA = {
    "n_query_groups": 2,
    "head_size": 24,
    "attention_scores_scalar": 24,
    "sliding_window_size": 8,
}
# litgpt model -> what is changed to make it tiny, and the architecture that its own authors use
FAMILIES = {
    "pythia-14m": ({}, "gpt_neox"),
    "stablecode-completion-alpha-3b": ({}, "gpt_neox"),
    "Llama-2-7b-hf": ({}, "llama"),
    "LLaMA-2-7B-32K": ({}, "llama"),
    "Llama-3.1-8B": (SCALED_ROPE, "llama"),
    "Llama-3.2-1B": (SCALED_ROPE, "llama"),
    "SmolLM2-135M": (GROUPED, "llama"),
    "tiny-llama-1.1b": (GROUPED, "llama"),
    "Falcon3-1B-Base": (GROUPED, "llama"),
    "Mistral-7B-v0.1": ({**GROUPED, "sliding_window_size": 8}, "mistral"),
    "Mistral-7B-v0.3": (GROUPED, "mistral"),
    "phi-1_5": ({}, "phi"),
    "phi-2": ({"n_embd": 80, "head_size": 20}, "phi"),
    "Phi-3-mini-4k-instruct": ({"sliding_window_size": 8}, "phi3"),
    "Phi-4-mini-instruct": (GROUPED, "phi3"),
    "phi-4": (GROUPED, "phi3"),
    "Gemma-2b": ({"n_query_groups": 1}, "gemma"),
    "Gemma-7b": ({"head_size": 24}, "gemma"),
    "Gemma-2-2b": (GEMMA, "gemma2"),
    "Gemma-2-27b": ({**GEMMA, "attention_scores_scalar": 16}, "gemma2"),
    "Gemma-3-1b-it": ({**GEMMA, "n_query_groups": 1, "n_layer": 7}, "gemma3_text"),
    "Gemma-3-4b-it": ({**GEMMA, "n_layer": 7}, "gemma3_text"),
    "Qwen2.5-0.5B": (GROUPED, "qwen2"),
    "Qwen3-0.6B": ({**GROUPED, "head_size": 24}, "qwen3"),
    "OLMo-1B-hf": ({}, "olmo"),
    "OLMo-2-1124-7B": ({"n_query_groups": 4}, "olmo2"),
    "falcon-7b": ({"n_query_groups": 1}, "falcon"),
    "falcon-40b": (GROUPED, "falcon"),
    "stablelm-3b-4e1t": (GROUPED, "stablelm"),
}


def tiny_config(name: str, **changes) -> Config:
    return Config.from_name(name, **{**SIZES, **FAMILIES[name][0], **changes})


def tiny(name: str, **changes) -> GPT:
    return fill_random(GPT(tiny_config(name, **changes))).requires_grad_(False).eval()


def part(model: GPT, **sizes: int) -> GPT:
    """A sub-network of `model` as a stand-alone one."""
    sub = resized(SubNetwork.from_config(model.config), **sizes)
    plan = plan_slices(sub, model.config)
    small = GPT(plan.config).eval()
    small.load_state_dict(slice_state_dict(plan, model.state_dict()), strict=True, assign=True)
    return small.requires_grad_(False)
