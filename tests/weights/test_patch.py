"""Patches of a sub-network's slices: applied, written and read."""

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.cli.options import Sizes
from whittle_nas.errors import ConfigError
from whittle_nas.weights.patch import LowRank, Patch, patched, read_patch, write_patch
from whittle_nas.weights.supernet import SuperNetwork

REPLACED, ADDED = "transformer.h.0.mlp.proj.weight", "transformer.h.1.attn.proj.weight"


@pytest.fixture
def net():
    return SuperNetwork(fill_random(GPT(tiny_config("Llama-3.1-8B"))).eval())


@pytest.fixture
def sub(net):
    return Sizes(n_embd=32, intermediate_size=40).resolve(net)


@pytest.fixture
def patch():
    change = LowRank(torch.randn(32, 3), torch.randn(3, 64))
    return Patch({REPLACED: torch.randn(32, 40)}, {ADDED: change, REPLACED: LowRank(
        torch.randn(32, 2), torch.randn(2, 40))})  # fmt: skip


def test_a_patch_replaces_and_adds_and_leaves_the_rest(net, sub, patch):
    slices = net.slices(sub)
    found = patched(slices, patch)
    assert list(found) == list(slices)
    assert found["lm_head.weight"] is slices["lm_head.weight"]
    extra = patch.added[REPLACED]
    torch.testing.assert_close(
        found[REPLACED], patch.replaced[REPLACED] + extra.up @ extra.down, atol=1e-5, rtol=1e-5
    )
    change = patch.added[ADDED]
    wanted = slices[ADDED] + change.up @ change.down
    torch.testing.assert_close(found[ADDED], wanted, atol=1e-5, rtol=1e-5)
    assert patched(slices, Patch()) is slices


def test_a_patch_takes_the_number_format_of_what_it_changes(net, sub, patch):
    slices = {name: tensor.bfloat16() for name, tensor in net.slices(sub).items()}
    assert {tensor.dtype for tensor in patched(slices, patch).values()} == {torch.bfloat16}


def test_a_patch_of_other_tensors_is_refused(net, sub, patch):
    smaller = Sizes(n_embd=32, intermediate_size=24).resolve(net)
    with pytest.raises(ConfigError, match="of shape"):
        dict(patched(net.slices(smaller), patch))
    with pytest.raises(ConfigError, match="does not have"):
        patched(net.slices(sub), Patch({"transformer.h.9.mlp.proj.weight": torch.zeros(1)}))


def test_what_is_written_is_read(tmp_path, sub, patch):
    path = tmp_path / "patch.safetensors"
    write_patch(path, patch, checkpoint="abc", sub=sub, how={"tokens": 12})
    found, how = read_patch(path, checkpoint="abc", sub=sub)
    assert how == {"tokens": 12}
    assert torch.equal(found.replaced[REPLACED], patch.replaced[REPLACED])
    assert set(found.added) == set(patch.added)
    for name, change in patch.added.items():
        assert torch.equal(found.added[name].up, change.up)
        assert torch.equal(found.added[name].down, change.down)


def test_files_of_others_are_refused(tmp_path, net, sub, patch):
    path = tmp_path / "patch.safetensors"
    write_patch(path, patch, checkpoint="abc", sub=sub, how={})
    with pytest.raises(ConfigError, match="belongs to checkpoint abc"):
        read_patch(path, checkpoint="other", sub=sub)
    with pytest.raises(ConfigError, match="belongs to the sub-network"):
        read_patch(path, checkpoint="abc", sub=net.full)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ConfigError, match="can be read"):
        read_patch(path, checkpoint="abc", sub=sub)
