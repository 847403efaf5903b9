import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config, Tokenizer
from torch.nn import functional as F

from whittle_nas.assets import bundled_checkpoint

TEXTS = ("train", "calibration", "valid", "test")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    lines = {key: (bundled_checkpoint() / f"{key}.jsonl").read_text().splitlines() for key in TEXTS}
    return {key: [json.loads(line)["text"] for line in value] for key, value in lines.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(bundled_checkpoint())


def load_model() -> GPT:
    path = bundled_checkpoint()
    model = GPT(Config.from_file(path / "model_config.yaml"))
    model.load_state_dict(torch.load(path / "lit_model.pth", weights_only=True), strict=True)
    return model.eval()


def eight_word_runs(texts: list[str]) -> set[str]:
    words = [re.findall(r"[a-z0-9]+", line.lower()) for text in texts for line in text.split("\n")]
    return {" ".join(line[i : i + 8]) for line in words for i in range(len(line) - 7)}


def stream(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    return torch.cat([tokenizer.encode(text, eos=True) for text in texts]).long()


def test_is_small_enough_for_a_repository():
    sizes = {path.name: path.stat().st_size for path in bundled_checkpoint().iterdir()}
    assert sum(sizes.values()) <= 3_000_000, sizes


def test_is_a_grouped_query_llama_of_a_million_parameters():
    model = load_model()
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    assert model.config.n_query_groups < model.config.n_head
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_huggingface_config_has_the_sizes_of_the_litgpt_config():
    config = Config.from_file(bundled_checkpoint() / "model_config.yaml")
    other = json.loads((bundled_checkpoint() / "config.json").read_text())
    pairs = {
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "vocab_size": config.padded_vocab_size,
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
    }
    assert {name: other[name] for name in pairs} == pairs


def test_tokenizer_marks_both_ends_and_loses_nothing(tokenizer, texts):
    assert (tokenizer.use_bos, tokenizer.bos_id, tokenizer.eos_id) == (True, 1, 2)
    config = Config.from_file(bundled_checkpoint() / "model_config.yaml")
    assert tokenizer.processor.get_vocab_size() == config.vocab_size
    ids = tokenizer.encode("Return the number.", eos=True).tolist()
    assert (ids[0], ids[-1]) == (1, 2)
    assert 1 not in tokenizer.encode("Return the number.", bos=False).tolist()
    for text in [*texts["valid"], "\t  naïve – 中文 😀\n\n", "<b>x</b>"]:
        assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text


def test_no_text_is_in_two_splits(texts):
    assert all(min(map(len, texts[key])) >= 200 for key in TEXTS)
    for i, first in enumerate(TEXTS):
        for second in TEXTS[i + 1 :]:
            assert not set(texts[first]) & set(texts[second])
    seen = eight_word_runs(texts["train"] + texts["calibration"])
    assert not eight_word_runs(texts["valid"] + texts["test"]) & seen
    assert not eight_word_runs(texts["valid"]) & eight_word_runs(texts["test"])


@pytest.mark.slow
@torch.no_grad()
def test_the_bundled_model_is_far_better_than_unigrams(tokenizer, texts):
    model = load_model()
    ids = stream(tokenizer, texts["valid"])
    blocks = ids.unfold(0, model.max_seq_length + 1, model.max_seq_length)
    logits = torch.cat([model(batch[:, :-1]) for batch in blocks.split(16)])
    nats = F.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    counts = torch.bincount(
        stream(tokenizer, texts["train"] + texts["calibration"]), minlength=1024
    )
    unigram = -((counts + 1) / (counts + 1).sum()).log()[ids[1:]].mean().item()
    assert math.exp(unigram - nats) > 8
    figures = json.loads((bundled_checkpoint() / "figures.json").read_text())
    assert nats == pytest.approx(figures["held_out"]["valid"]["nats_per_token"], abs=1e-3)


def stdlib_text():
    path = Path(__file__).parents[1] / "scripts" / "bundled_model" / "stdlib_text.py"
    spec = importlib.util.spec_from_file_location("stdlib_text", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prose_is_told_from_code():
    as_prose = stdlib_text().as_prose
    text = "Return the sum of all\n    numbers in  the given list."
    assert as_prose(text) == "Return the sum of all numbers in the given list."
    assert as_prose("for i in range(n): x = f(i) + g[i] * 2; print(x == y)") is None
    assert as_prose("See also the other one.") is None


def test_comments_are_read_block_by_block():
    source = "x = 1  # beside code\n# one\n# two\ny = 2\n    # three\n"
    assert list(stdlib_text().comments(source))[1:] == [(2, "one\ntwo"), (5, "three")]


def test_held_out_text_is_dropped_from_the_training_text():
    text = stdlib_text()
    shared = "The very same sentence of ten words stands in both."
    own = [f"Number {i}: " + " ".join(f"w{i}x{j}" for j in range(60)) + "." for i in range(400)]
    sources = {f"module{i}.py": [shared, paragraph] for i, paragraph in enumerate(own)}
    splits = text.make_splits(sources)
    counts = {key: sum(doc.count(shared) for doc in splits[key]) for key in splits}
    assert counts["valid"] == 1
    assert counts["pretrain"] == counts["test"] == 0
    assert len(splits["pretrain"]) + len(splits["valid"]) + len(splits["test"]) == 400
    assert not set(splits["train"]) & set(splits["calibration"])
