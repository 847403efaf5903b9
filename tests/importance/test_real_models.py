"""Sorting helps the sub-networks of models that were really trained (slow)."""

from dataclasses import replace

import pytest
import torch
from litgpt import GPT

from whittle_nas.data import TextData, load_blocks
from whittle_nas.evaluate.perplexity import nats_per_token
from whittle_nas.importance.pipeline import MeasureOptions, measure, settle
from whittle_nas.importance.report import draw_subnetworks, make_report, perplexities
from whittle_nas.importance.sorting import SortedTensors
from whittle_nas.space import load_space
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.supernet import SuperNetwork
from whittle_nas.weights.tying import untied

# checkpoint, calibration text, held-out text, fewest layers, RPD that the default reaches
MODELS = {
    "stories260K": ("tinystories/train.jsonl", "tinystories/valid.jsonl", 2, 0.65),
    "babyllama-char361": ("tinystories/train.jsonl", "tinystories/valid.jsonl", 2, 0.25),
    "pydoc-1m": ("calibration.jsonl", "valid.jsonl", 3, 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_rpd_between_half_and_full_size(name, request):
    calibration, heldout, layers, wanted = MODELS[name]
    if name == "pydoc-1m":
        path = texts = request.getfixturevalue("bundled")
    else:
        texts = request.getfixturevalue("shared_data")
        path = texts / "checkpoints" / name
    config = open_checkpoint(path).config
    data = TextData(files=texts / calibration, num_blocks=128)
    tokens = load_blocks(data, path, config=config).tokens
    text = TextData(files=texts / heldout, num_blocks=16, block_size=256)
    other = load_blocks(text, path, config=config).tokens
    half = {"min": "half", "max": "full"}
    spec = {
        "n_embd": half,
        "n_head": half,
        "intermediate_size": half,
        "n_layer": {"min": layers, "max": "full"},
    }
    subs = draw_subnetworks(load_space(spec, config), 100, seed=1337)

    def quality(supernet) -> list[float]:
        order = supernet.info.layer_order
        return perplexities(
            supernet,
            [supernet.full, *(s.reordered(before.info.layer_order, order) for s in subs)],
            lambda model: nats_per_token(model, other),
        )

    before = load_supernet(path, dtype=torch.float32)
    measured = measure(before.model, tokens, MeasureOptions())
    model = GPT(untied(config)).eval()
    model.load_state_dict(dict(SortedTensors(before.model.state_dict, measured.bases, config)))
    settled = settle(SuperNetwork(model), tokens, measured.scores, MeasureOptions())
    info = replace(before.info, layer_order=settled.layer_order)
    report = make_report(subs, quality(before), quality(SuperNetwork(model, info)), config)
    assert report.full_after == pytest.approx(report.full_before, rel=1e-4)
    assert report.improvement.mean >= wanted
