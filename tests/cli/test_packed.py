"""`nas prune --method gptq`, then `nas export --quantize`: integers that engines load."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_main import nas
from tests.conftest import bundled_checkpoint, fill_random, first_of, tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.export.packed import Packing
from whittle_nas.prune.options import Grid
from whittle_nas.prune.rtn import rtn
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint, write_checkpoint

pytest.importorskip("compressed_tensors.compressors.pack_quantized")
TEXT = "The quick brown fox jumps over the lazy dog and asks why it was so lazy today. " * 60


@pytest.fixture
def quantised(tmp_path, request):
    """A grouped-query model in bfloat16 or float32, quantised by GPTQ with passes in either."""
    from litgpt import GPT, Config

    family, dtype, symmetric, bits, passes = request.param
    source = bundled_checkpoint()
    vocabulary = Config.from_file(source / "model_config.yaml").padded_vocab_size
    sizes = {"n_embd": 64, "intermediate_size": 96, "head_size": 16, "block_size": 64}
    config = tiny_config(family, **sizes, vocab_size=vocabulary, padded_vocab_size=vocabulary)
    (tmp_path / "dense").mkdir()
    tensors = fill_random(GPT(config)).to(dtype).state_dict()
    write_checkpoint(tmp_path / "dense", tensors, config=config, source=source)
    (tmp_path / "text.txt").write_text(TEXT)
    data = ("--data.files", tmp_path / "text.txt", "--data.num_blocks", 4, "--data.block_size", 32)
    out = tmp_path / "gptq"
    grid = ("--bits", bits, "--group_size", 32, "--symmetric", str(symmetric).lower())
    words = ("prune", "--checkpoint_dir", tmp_path / "dense", "--out_dir", out, *data)
    assert nas(*words, "--method", "gptq", *grid, "--dtype", passes) == 0
    return out


CASES = [
    ("Llama-3.1-8B", torch.float32, True, 8, "bfloat16"),
    ("Llama-3.1-8B", torch.float32, True, 4, "float32"),
    ("Llama-3.1-8B", torch.bfloat16, False, 4, "float32"),
    ("Phi-3-mini-4k-instruct", torch.float32, False, 4, "float32"),
    ("Llama-3.1-8B", torch.bfloat16, True, 8, "float32"),
    ("Llama-3.1-8B", torch.bfloat16, False, 8, "float32"),
]
NAMES = [
    "llama float32 in bfloat16 8 bits",
    "llama float32",
    "llama bfloat16 zero points",
    "phi3 zero points",
    "llama bfloat16 8 bits",
    "llama bfloat16 8 bits zero points",
]


@pytest.mark.parametrize("quantised", first_of(CASES), ids=NAMES, indirect=True)
def test_packed_weights_are_the_rounded_ones(quantised, tmp_path):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    bits = json.loads((quantised / "prune.json").read_text())["bits"]
    words = ("export", "--checkpoint_dir", quantised, "--format", "hf")
    assert nas(*words, "--out_dir", tmp_path / "plain") == 0
    assert nas(*words, "--out_dir", tmp_path / "packed", "--quantize", f"w{bits}a16") == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    described = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert described["quantization_config"]["format"] == "pack-quantized"
    scheme = QuantizationConfig(**described["quantization_config"]).config_groups["group_0"]
    linears = {name.removesuffix("_packed") for name in packed if name.endswith("_packed")}
    assert linears == {n for n, t in plain.items() if t.dim() == 2 and ".layers." in n}
    for name in plain:
        if name not in linears:
            assert torch.equal(packed[name], plain[name])
            continue
        parts = {n.removeprefix(name[:-6]): t for n, t in packed.items() if n.startswith(name)}
        found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert found.dtype == plain[name].dtype
        assert torch.equal(found, plain[name])
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("plain", "packed")]
    assert sizes[1] < sizes[0]
    card = (tmp_path / "packed" / "README.md").read_text()
    assert f"gptq, {bits} bits in groups of 32" in card


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_scales_are_on_their_grid_once_rounded_and_others_are_not(dtype, symmetric):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = rtn(weight, Grid(8, 32, symmetric))
    zeros = {"one": found.zeros}
    packing = Packing(8, 32, symmetric, {"one": found.scales}, zeros)
    assert "one_packed" in dict(packing.pack("one", found.weight))
    scaled = Packing(8, 32, symmetric, {"one": found.scales.float() * 0.7}, zeros)
    assert "one_packed" in dict(scaled.pack("one", 0.7 * found.weight))  # as queries may be
    with pytest.raises(ConfigError, match="one is not on the grid"):
        dict(packing.pack("one", weight + 0.01))


@pytest.mark.parametrize("quantised", CASES[1:2], ids=NAMES[1:2], indirect=True)
@pytest.mark.slow
def test_transformers_loads_packed_weights(quantised, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "packed"
    words = ("export", "--checkpoint_dir", quantised, "--format", "hf", "--out_dir", out)
    assert nas(*words, "--quantize", "w4a16") == 0
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits, load_supernet(quantised).model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantised", CASES[1:2], ids=NAMES[1:2], indirect=True)
@pytest.mark.slow
def test_what_can_not_be_packed_is_one_sentence(quantised, tmp_path, capsys):
    dense, hf = quantised.parent / "dense", ("--format", "hf")
    for source, options, sentence in (
        (quantised, ("--quantize", "w4a16"), "has no meaning with --format litgpt"),
        (quantised, (*hf, "--quantize", "w8a16"), "is for weights of 8 bits, and those of"),
        (quantised, (*hf, "--quantize", "w4a16", "--subnetwork.n_layer", 2), "packs a whole"),
        (dense, (*hf, "--quantize", "w4a16"), "has no quantization.safetensors; quantise it with"),
    ):
        out = tmp_path / "out"
        assert nas("export", "--checkpoint_dir", source, "--out_dir", out, *options) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
        assert not out.exists()
    tensors = {n: t.clone() for n, t in open_checkpoint(quantised).state_dict().items()}
    tensors["transformer.h.1.mlp.proj.weight"] += 0.01
    (quantised / "lit_model.pth").unlink()
    torch.save(tensors, quantised / "lit_model.pth")
    words = ("export", "--checkpoint_dir", quantised, *hf, "--out_dir", tmp_path / "out")
    assert nas(*words, "--quantize", "w4a16") == 2
    assert "model.layers.1.mlp.down_proj.weight is not on the grid" in capsys.readouterr().err
