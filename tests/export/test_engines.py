"""What other engines can't load is said after an export, and what they can is not."""

import pytest

from tests.export.families import tiny_config
from whittle_nas.export.engines import engine_notes
from whittle_nas.export.hf_config import hf_target


def notes(name, *, tied=True, **sizes):
    config = tiny_config(name, **sizes)
    return " ".join(engine_notes(hf_target(config).model_type, config, tied=tied))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Llama-3.1-8B", {"n_embd": 50, "head_size": 8}),
        ("Mistral-7B-v0.3", {"n_embd": 50, "head_size": 8}),
        ("Qwen2.5-0.5B", {"n_embd": 64, "head_size": 16}),
        ("Qwen3-0.6B", {"n_embd": 50}),
        ("phi-2", {"intermediate_size": 320}),
        ("Gemma-2-2b", {"n_embd": 60}),
        ("pythia-14m", {}),
    ],
)
def test_no_note_where_every_engine_reads_it(name, sizes):
    assert not notes(name, **sizes)


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("Qwen2.5-0.5B", {"n_embd": 50, "head_size": 8}, ["vLLM", "qwen2", "n_head * head_size"]),
        ("OLMo-1B-hf", {"head_size": 8}, ["llama.cpp", "n_head * head_size"]),
        ("phi-2", {"intermediate_size": 100}, ["llama.cpp", "4 * n_embd"]),
        ("falcon-7b", {"intermediate_size": 100}, ["llama.cpp", "4 * n_embd"]),
        ("Gemma-2-2b", {"tied": False}, ["llama.cpp and vLLM", "head"]),
    ],
)
def test_a_note_names_the_engine_and_what_it_lacks(name, sizes, words):
    said = notes(name, **sizes)
    assert all(word in said for word in words), said
