"""A Llama whose layers have key-value heads and neurons of their own, or lack a part.

A part can also be a matrix from what it reads to what it gives.

`nas export --format hf` puts this file beside such a model, so that
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads it. The names and
`block_configs` are those of DeciLM, which other engines have built in.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralModel,
    MistralPreTrainedModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)


class BlockPart(dict):
    """One entry of `block_configs`: a dictionary, which JSON takes, that is read by attributes."""

    def __getattr__(self, name):
        """An entry; inner dictionaries too."""
        if name.startswith("__") or name not in self:
            raise AttributeError(name)
        value = self[name]
        return BlockPart(value) if isinstance(value, dict) else value


class DeciLMConfig(MistralConfig):
    """Mistral's configuration, whose heads may be of any size, with one entry per layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **settings):
        """Keep the entries beside Mistral's settings."""
        self.block_configs = [BlockPart(block) for block in block_configs]
        super().__init__(**settings)


class NoAttention(nn.Module):
    """In place of attention: adds zero and has no cache."""

    def forward(self, hidden_states, *_, **__):
        """(B, T, D) to (B, T, D)."""
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """In place of the MLP: adds zero."""

    def forward(self, hidden_states):
        """(B, T, D) to (B, T, D)."""
        return torch.zeros_like(hidden_states)


class LinearAttention(nn.Module):
    """In place of attention: a matrix, which has no cache."""

    def __init__(self, config: Any) -> None:
        """Make it of (hidden_size, hidden_size)."""
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, *_, **__):
        """(B, T, D) to (B, T, D)."""
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """In place of the MLP: a matrix."""

    def __init__(self, config: Any) -> None:
        """Make it of (hidden_size, hidden_size)."""
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states):
        """(B, T, D) to (B, T, D)."""
        return self.linear_mlp(hidden_states)


class DeciLMDecoderLayer(MistralDecoderLayer):
    """A layer with the sizes of its entry."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        """Caches are numbered by attention: their first one must be there, and knows the length."""
        blocks = config.block_configs
        attention, ffn = blocks[layer_idx].attention, blocks[layer_idx].ffn
        own = copy.copy(config)
        if attention.n_heads_in_group:
            own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
        if "intermediate_size" in ffn:
            own.intermediate_size = ffn.intermediate_size
        before = sum(bool(block.attention.n_heads_in_group) for block in blocks[:layer_idx])
        super().__init__(own, before)
        if attention.no_op:
            self.self_attn, self.input_layernorm = NoAttention(), nn.Identity()
        elif attention.replace_with_linear:
            self.self_attn = LinearAttention(config)
        else:
            self.self_attn.config = config  # which implementation runs may be changed there
        if ffn.no_op:
            self.mlp, self.post_attention_layernorm = NoMLP(), nn.Identity()
        elif ffn.replace_with_linear:
            self.mlp = LinearMLP(config)


class DeciLMModel(MistralModel):
    """Mistral's model, with such layers."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]

    def __init__(self, config: Any) -> None:
        """As the parent, which would build layers of one size first."""
        MistralPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DeciLMDecoderLayer(config, layer) for layer in layers)
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(MistralForCausalLM):
    """The model with its head."""

    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]

    def __init__(self, config: Any) -> None:
        """As the parent, with the model above."""
        MistralPreTrainedModel.__init__(self, config)
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def tie_weights(self, *args, **how):
        """As the parent; for remote code transformers 5.3 forgets that no file holds the head."""
        missing = how.get("missing_keys")
        if missing is not None and self.config.tie_word_embeddings:
            missing.add("lm_head.weight")
        return super().tie_weights(*args, **how)
