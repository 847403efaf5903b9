"""Where parameters go, and what is refused: nothing here needs transformers."""

import pytest
import torch
from litgpt.config import Config, name_to_config
from litgpt.scripts import convert_lit_checkpoint as litgpt_convert

from tests.export.families import FAMILIES, tiny, tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.export.hf import write_hf
from whittle_nas.export.hf_config import hf_target
from whittle_nas.export.hf_names import from_hf, name_map, to_hf


def test_every_dense_model_of_litgpts_list_has_a_counterpart():
    for name in name_to_config:
        config = Config.from_name(name)
        if config.mlp_class_name != "LLaMAMoE":
            target = hf_target(config)
            assert not target.notes, name
            assert name_map(config, target.model_type), name  # each parameter has its place


def test_a_changed_architecture_is_noted():
    config = tiny_config("Llama-2-7b-hf", n_embd=58, head_size=8, attention_scores_scalar=16)
    architecture, scale = hf_target(config).notes
    assert architecture.startswith("written as mistral, because n_embd=58 with n_head=4")
    assert "sqrt(8/16)" in scale


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "pythia-14m",
            {"n_embd": 58, "head_size": 16},
            r"nearest: n_embd=64, or use --format litgpt",
        ),
        ("pythia-14m", {"n_embd": 48, "head_size": 16}, r"nearest: n_embd=64 or n_head=3, or"),
        (
            "pythia-14m",
            {"n_embd": 45, "head_size": 16},
            r"n_embd=45 with n_head=4 and head_size=16: gpt_neox needs "
            r"n_embd = n_head \* head_size; nearest: n_embd=64 or n_head=3 with n_embd=48",
        ),
        ("pythia-14m", {"n_query_groups": 2}, r"nearest: n_query_groups=4 or n_head=2"),
        (
            "Gemma-2-2b",
            {"n_embd": 58},
            r"gemma2 needs n_embd divisible .*; nearest n_embd: 56 or 60",
        ),
        ("Gemma-3-1b-it", {"n_embd": 3}, r"nearest n_embd: 4, or"),
        (
            "falcon-7b",
            {"n_embd": 58, "head_size": 16},
            r"falcon needs n_embd = n_head \* head_size",
        ),
        ("Phi-4-mini-instruct", {"head_size": 20}, r"head_size=20 has 15 rotary channels"),
        (
            "Llama-2-7b-hf",
            {"bias": True},
            r"nearest, llama, has no bias='all'; use --format litgpt",
        ),
        ("Llama-2-7b-hf", {"mlp_class_name": "LLaMAMoE", "n_expert": 2}, "mixture of experts"),
        (
            "Llama-2-7b-hf",
            {"rope_adjustments": {"factor": 2.0, "beta_fast": 32, "beta_slow": 1}},
            "has no rope='yarn'",
        ),
        ("Gemma-3-4b-it", {"rope_indices": [1] * 7}, "has no local_rope='other layers'"),
    ],
)
def test_what_has_no_counterpart_is_refused_before_any_work(name, changes, message, tmp_path):
    config = tiny_config(name, **changes)
    with pytest.raises(ConfigError, match=message):
        write_hf(tmp_path, config, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_name_map_in_both_directions(family):
    model = tiny(family)
    weights, way = model.state_dict(), {"model_type": FAMILIES[family][1]}
    back = from_hf(model.config, dict(to_hf(model.config, weights, **way)), **way)
    assert back.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize(
    "family", ["Llama-2-7b-hf", "Qwen2.5-0.5B", "Qwen3-0.6B", "OLMo-2-1124-7B", "Gemma-3-4b-it"]
)
def test_query_scale_in_both_directions(family):
    model = tiny(family)
    weights, way = model.state_dict(), {"model_type": FAMILIES[family][1], "query_scale": 0.7}
    written = dict(to_hf(model.config, weights, **way))
    back = from_hf(model.config, written, **way)
    for key, tensor in weights.items():
        torch.testing.assert_close(back[key], tensor)
    changed = {"q_norm"} if model.config.norm_qk else {"q_proj"}
    plain = dict(to_hf(model.config, weights, model_type=FAMILIES[family][1]))
    assert {
        key.split(".")[-2] for key in plain if not torch.equal(plain[key], written[key])
    } == changed


LITGPTS_CONVERTERS = {
    "pythia-14m": litgpt_convert.copy_weights_gpt_neox,
    "falcon-7b": litgpt_convert.copy_weights_falcon,
    "falcon-40b": litgpt_convert.copy_weights_falcon,
    "Llama-3.1-8B": litgpt_convert.copy_weights_llama,
    "Mistral-7B-v0.1": litgpt_convert.copy_weights_llama,
    "OLMo-1B-hf": litgpt_convert.copy_weights_llama,
    "stablelm-3b-4e1t": litgpt_convert.copy_weights_llama,
    "phi-2": litgpt_convert.copy_weights_phi,
    "Phi-3-mini-4k-instruct": litgpt_convert.copy_weights_phi,
    "Gemma-2-2b": litgpt_convert.copy_weights_gemma_2,
    "Gemma-3-1b-it": litgpt_convert.copy_weights_gemma_3,
    "Qwen2.5-0.5B": litgpt_convert.copy_weights_qwen_2_5,
    "Qwen3-0.6B": litgpt_convert.copy_weights_qwen_3,
}  # litgpt 0.5.13's own map for OLMo-2 raises a KeyError on post_attention_norm


@pytest.mark.parametrize("family", LITGPTS_CONVERTERS)
def test_name_map_is_litgpts(family):
    model = tiny(family)
    weights, expected = model.state_dict(), {}
    LITGPTS_CONVERTERS[family](model.config, expected, weights)
    found = dict(to_hf(model.config, weights, model_type=FAMILIES[family][1]))
    if family.startswith("Gemma"):  # litgpt assumes that these are tied
        del found["lm_head.weight"]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
