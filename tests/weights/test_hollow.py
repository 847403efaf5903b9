"""Passes block by block over a file of which one layer is mapped at a time."""

import gc
import weakref

import torch

from whittle_nas.calibration import Stream, walk
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint
from whittle_nas.weights.hollow import Remapped, load_hollow


def test_a_layer_is_let_go_when_the_next_one_is_read(checkpoint_dir):
    checkpoint = open_checkpoint(checkpoint_dir)
    whole, mappings = checkpoint.state_dict(), []

    def load():
        found = checkpoint.state_dict()
        mappings.append(weakref.ref(next(iter(found.values())).untyped_storage()))
        return found

    tensors = Remapped(load)
    for name in tensors:
        torch.testing.assert_close(tensors[name], whole[name], atol=0, rtol=0)
    gc.collect()
    assert len(mappings) <= checkpoint.config.n_layer + 3
    assert sum(mapping() is not None for mapping in mappings) <= 1


def test_blocks_that_are_fetched_from_the_file_are_the_models(checkpoint_dir):
    checkpoint = open_checkpoint(checkpoint_dir)
    hollow, whole = load_hollow(checkpoint), load_supernet(checkpoint_dir).model
    assert all(parameter.is_meta for parameter in hollow.transformer.h.parameters())
    ids, states = torch.arange(24).view(2, 12), []
    for model, tensors in ((whole, None), (hollow, Remapped(checkpoint.state_dict))):
        stream = Stream(model, ids)
        changes = lambda _layer, block, _seen: block  # noqa: E731
        walk(model, stream, changes, watch=lambda _block: {}, tensors=tensors)
        states.append(stream.states[0])
    assert torch.equal(*states)
