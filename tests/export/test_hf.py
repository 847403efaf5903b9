"""An exported directory loads in transformers, unmodified, and computes what litgpt computes."""

import json
import logging

import pytest
import tokenizers
import torch
from litgpt import Config
from litgpt.tokenizer import Tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import SHARED_DATA
from tests.export.families import FAMILIES, part, tiny
from tests.weights.test_bases import ROTATING, moved, random_bases
from tests.weights.test_norms import scaled
from whittle_nas.errors import ConfigError
from whittle_nas.export.hf import write_hf
from whittle_nas.export.hf_config import hf_target
from whittle_nas.export.hf_names import from_hf, to_hf
from whittle_nas.importance.narrowing import narrowed_stream
from whittle_nas.weights.checkpoint import load_supernet


def exported(model, out_dir, **options):
    """Write `model`, load it with transformers, and compare everything."""
    target = write_hf(out_dir, model.config, model.state_dict(), **options)
    loaded, info = AutoModelForCausalLM.from_pretrained(out_dir, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded).__name__ == target.architecture
    idx = torch.randint(model.config.vocab_size, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(loaded(idx).logits, model(idx), atol=1e-4, rtol=0)
    return target, loaded


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_litgpts(family, tmp_path):
    target, _ = exported(tiny(family), tmp_path)
    assert target.model_type == FAMILIES[family][1]
    if family != "Gemma-2-27b":  # see below
        assert (target.query_scale, target.notes) == (1.0, ())


@pytest.mark.parametrize(
    ("name", "sizes", "model_type"),
    [
        # 58 channels, 4 heads: no Llama has that, but a Mistral without a window computes the same.
        ("Llama-2-7b-hf", {"n_embd": 58, "head_size": 8}, "mistral"),
        ("Llama-3.2-1B", {"n_embd": 33, "n_head": 2, "n_query_groups": 1}, "mistral"),
        ("Llama-3.1-8B", {"n_embd": 60, "head_size": 8, "intermediate_size": 41}, "llama"),
        ("Mistral-7B-v0.1", {"n_embd": 30, "head_size": 4, "n_layer": 1}, "mistral"),
        ("phi-1_5", {"n_embd": 31, "n_head": 3, "n_query_groups": 3, "head_size": 8}, "phi"),
        ("Phi-3-mini-4k-instruct", {"n_embd": 50, "head_size": 8}, "phi3"),
        ("Qwen2.5-0.5B", {"n_embd": 37, "head_size": 8}, "qwen2"),
        ("Qwen3-0.6B", {"n_embd": 50, "head_size": 12}, "qwen3"),
        ("OLMo-1B-hf", {"n_embd": 50, "head_size": 8}, "olmo"),
        ("OLMo-2-1124-7B", {"n_embd": 50, "head_size": 4}, "olmo2"),
        ("Gemma-7b", {"n_embd": 50, "head_size": 12}, "gemma"),
        ("Gemma-2-2b", {"n_embd": 60, "head_size": 12, "n_layer": 1}, "gemma2"),
        ("Gemma-3-1b-it", {"n_embd": 60, "head_size": 8, "n_layer": 6}, "gemma3_text"),
        ("pythia-14m", {"n_embd": 32, "head_size": 8}, "gpt_neox"),
        ("pythia-14m", {"n_embd": 48, "n_head": 3, "n_query_groups": 3}, "gpt_neox"),
        ("falcon-7b", {"n_embd": 16, "n_head": 2, "head_size": 8}, "falcon"),
        ("falcon-40b", {"n_embd": 32, "n_head": 2, "n_query_groups": 1}, "falcon"),
        ("stablelm-3b-4e1t", {"n_embd": 32, "head_size": 8}, "stablelm"),
    ],
)
def test_logits_of_a_sub_network(name, sizes, model_type, tmp_path):
    small = part(tiny(name), **sizes)
    target, _ = exported(small, tmp_path)
    assert target.model_type == model_type
    keeps_scale = small.config.attention_scores_scalar in (None, small.config.head_size)
    assert (target.query_scale == 1.0) == keeps_scale


@pytest.mark.parametrize("family", sorted(ROTATING & FAMILIES.keys()))
def test_a_rotated_model_is_an_ordinary_one(family, tmp_path):
    """Its sub-networks with norm factors too: nothing in the files says that it was rotated."""
    plain = tiny(family)
    turned = moved(plain, random_bases(plain.config))
    target, _ = exported(turned, tmp_path)
    assert target.model_type == FAMILIES[family][1]
    narrow = scaled(turned).standalone(narrowed_stream(plain.config, 0.75))
    exported(narrow, tmp_path)


@pytest.mark.parametrize(
    ("name", "n_layer", "divisor"),
    [
        ("Gemma-2-27b", 46, 144),
        ("Gemma-2-27b", 45, 128),
        ("Gemma-2-9b", 42, 256),
        ("Gemma-3-27b-it", 62, 168),
        ("Gemma-3-27b-it", 46, 128),
        ("Gemma-3-1b-it", 26, 256),
    ],
)
def test_attention_is_scaled_as_in_llama_cpp(name, n_layer, divisor):
    """It knows the 27B models by their layers, and takes n_embd / n_head there, else head_size."""
    config = Config.from_name(name)
    fields = ("sliding_window_indices", "rope_indices")
    lists = {field: getattr(config, field) for field in fields if getattr(config, field)}
    cut = {field: values[:n_layer] for field, values in lists.items()}
    target = hf_target(Config.from_name(name, n_layer=n_layer, **cut))
    assert target.config_json["query_pre_attn_scalar"] == divisor
    expected = (divisor / config.attention_scores_scalar) ** 0.5
    assert target.query_scale == pytest.approx(expected)


@pytest.mark.parametrize("family", ["Llama-3.2-1B", "Gemma-2b", "pythia-14m", "falcon-7b", "phi-2"])
def test_equal_tables_are_stored_once(family, tmp_path):
    model = tiny(family)
    model.lm_head.weight.copy_(model.transformer.wte.weight)
    exported(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    everything = dict(to_hf(model.config, model.state_dict(), model_type=FAMILIES[family][1]))
    assert everything.keys() - written.keys() <= {"lm_head.weight", "embed_out.weight"}
    assert len(everything) - len(written) == 1
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    back = from_hf(model.config, written, model_type=FAMILIES[family][1])
    assert torch.equal(back["lm_head.weight"], model.lm_head.weight)


def test_shards_and_their_index_hold_every_tensor_once(tmp_path):
    model = tiny("pythia-14m")
    exported(model, tmp_path, shard_bytes=60_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {key: (file.name, tensor) for file in files for key, tensor in load_file(file).items()}
    assert {key: name for key, (name, _) in stored.items()} == index["weight_map"]
    assert sum(t.nbytes for _, t in stored.values()) == index["metadata"]["total_size"]
    assert all(file.stat().st_size < 60_000 + 5_000 for file in files)
    expected = dict(to_hf(model.config, model.state_dict(), model_type="gpt_neox"))
    assert {key: tensor.tolist() for key, (_, tensor) in stored.items()} == {
        key: tensor.tolist() for key, tensor in expected.items()
    }


def test_transformers_loads_shards_of_a_tied_model(tmp_path):
    """Some tensors are larger than a shard and stand alone, in the middle of the others."""
    model = tiny("Llama-3.2-1B")
    model.lm_head.weight.copy_(model.transformer.wte.weight)
    _, theirs = exported(model, tmp_path, shard_bytes=10_000)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert max(sizes) > 15_000 > 10_000 > min(sizes)
    assert theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_and_config_have_the_asked_dtype(dtype, tmp_path):
    model = part(tiny("Llama-2-7b-hf"), head_size=8, n_embd=50)
    target = write_hf(tmp_path, model.config, model.state_dict(), dtype=dtype)
    expected = dict(
        to_hf(
            model.config,
            model.state_dict(),
            model_type=target.model_type,
            query_scale=target.query_scale,
        )
    )
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, expected[key].to(dtype)), key
    stored = json.loads((tmp_path / "config.json").read_text())["torch_dtype"]
    assert stored == str(dtype).removeprefix("torch.")


def test_soft_capping_is_not_lost():
    """The default attention of transformers 5.3 leaves it out without a word."""
    assert hf_target(tiny("Gemma-2-2b").config).config_json["_attn_implementation"] == "eager"


def write_source(path, **files):
    path.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / f"{name}.json").write_text(text)
    return path


def test_tokenizer_and_special_tokens_come_from_the_source(tmp_path):
    source = write_source(
        tmp_path / "source",
        generation_config={"eos_token_id": [3, 4], "temperature": 0.6},
        config={"text_config": {"bos_token_id": 2, "eos_token_id": 1}, "pad_token_id": 32000},
        tokenizer={"model": {}},
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    )
    (source / "prompt_style.yaml").write_text("litgpt's own")
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    target, loaded = exported(tiny("Phi-3-mini-4k-instruct"), out_dir, source=source)
    assert target.model_type == "phi3"
    config = json.loads((out_dir / "config.json").read_text())
    # An id outside the vocabulary is dropped: transformers would not build the embedding.
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert ids == {"bos_token_id": 2, "eos_token_id": [3, 4], "pad_token_id": None}
    assert loaded.generation_config.eos_token_id == [3, 4]
    assert loaded.generation_config.temperature == 0.6
    assert {file.name for file in out_dir.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_large_vocabulary_is_not_taken_for_an_old_mistrals(tmp_path, caplog, monkeypatch):
    """transformers warns of a wrong regular expression unless config.json names its version."""
    words = {f"w{index}": index for index in range(100_001)}
    source = write_source(tmp_path / "source", tokenizer_config={"unk_token": "w0"})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    model = tiny("Mistral-7B-v0.3")
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", model.config, model.state_dict(), source=source)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("w7 w100000")["input_ids"] == [7, 100_000]
    assert "regex" not in caplog.text


def test_broken_json_of_the_source(tmp_path):
    model = tiny("Llama-2-7b-hf")
    mended = write_source(tmp_path / "mended", generation_config='{"bos_token_id": 5,\n}')
    (tmp_path / "out").mkdir()
    write_hf(tmp_path / "out", model.config, model.state_dict(), source=mended)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 5
    broken = write_source(tmp_path / "broken", config="{")
    with pytest.raises(ConfigError, match=r"broken/config.json is not valid JSON"):
        write_hf(tmp_path, model.config, model.state_dict(), source=broken)


STORIES = SHARED_DATA / "checkpoints" / "stories260K"


@pytest.mark.skipif(not STORIES.is_dir(), reason="no shared checkpoint")
@pytest.mark.parametrize("sizes", [{}, {"n_embd": 62, "head_size": 4}])
def test_a_real_checkpoint_writes_the_same_story(sizes, tmp_path):
    model = part(load_supernet(STORIES).model, **sizes)
    target, loaded = exported(model, tmp_path, source=STORIES)
    assert target.model_type == ("mistral" if sizes else "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = Tokenizer(STORIES).encode("Once upon a time", bos=True)
    assert tokenizer("Once upon a time")["input_ids"] == prompt.tolist()
    story = loaded.generate(prompt[None], max_length=40, do_sample=False, eos_token_id=-1)
    expected = prompt[None]
    while expected.shape[1] < 40:
        following = model(expected)[:, -1:].argmax(dim=-1)
        expected = torch.cat([expected, following], dim=1)
    assert tokenizer.decode(story[0]) == tokenizer.decode(expected[0])
