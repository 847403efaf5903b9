"""Every method of `nas prune` on an exported sub-network: search first, compress then."""

import pytest
import torch
from litgpt import GPT

from tests.cli.test_main import nas
from tests.cli.test_prune import SMALLER, TEXT, report, run
from tests.conftest import bundled_checkpoint, fill_random, tiny_config
from whittle_nas.prune.options import MASKS, QUANTISERS, Method
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint, write_checkpoint

WHOLE = {"n_embd": 64, "n_head": 8, "n_query_groups": 4, "head_size": 8, "intermediate_size": 96}
SIZES = {"n_embd": 48, "n_head": 4, "n_query_groups": 2, "intermediate_size": 64, "n_layer": 4}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A grouped-query model with fewer channels, heads, groups, neurons and layers."""
    from litgpt import Config

    folder = tmp_path_factory.mktemp("exported")
    source = bundled_checkpoint()
    vocabulary = Config.from_file(source / "model_config.yaml").padded_vocab_size
    more = {"vocab_size": vocabulary, "padded_vocab_size": vocabulary, "block_size": 64}
    config = tiny_config("Llama-3.1-8B", **WHOLE, n_layer=5, **more)
    (folder / "whole").mkdir()
    tensors = fill_random(GPT(config)).state_dict()
    write_checkpoint(folder / "whole", tensors, config=config, source=source)
    (folder / "text.txt").write_text(TEXT)
    sizes = [word for name, size in SIZES.items() for word in (f"--subnetwork.{name}", size)]
    words = ("export", "--checkpoint_dir", folder / "whole", "--out_dir", folder / "small")
    assert nas(*words, *sizes) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", Method, ids=lambda method: method.value)
def test_methods_run_on_exported_subnetworks(method, exported, tmp_path):
    options = ("--sparsity", "2:4") if method in MASKS else ("--sparsity", "0.3")
    if method in QUANTISERS:
        options = ("--bits", 4, "--group_size", 16)
    options += SMALLER.get(method.value, ())
    out, small = tmp_path / "out", load_supernet(exported / "small")
    assert (
        run(exported / "small", out, exported / "text.txt", "--method", method.value, *options) == 0
    )
    found, after = report(out), load_supernet(out)
    assert found["num_params_before"] == sum(p.numel() for p in small.model.parameters())
    assert found["bytes_before"] == 2 * found["num_params_before"]
    assert found["bytes"] < found["bytes_before"]
    ids = torch.arange(12)[None]
    logits, before = after.model(ids), small.model(ids)
    assert logits.isfinite().all()
    assert not torch.allclose(logits, before)
    if method in (*MASKS, *QUANTISERS):
        assert after.full.sizes() == {**SIZES, "head_size": 8}
        changed = {n for n, t in open_checkpoint(out).state_dict().items()
                   if not torch.equal(t, small.model.state_dict()[n])}  # fmt: skip
        assert changed == {
            n for n, t in small.model.state_dict().items() if t.dim() == 2 and ".h." in n
        }
