import math

import pytest
import torch
import torch.nn.functional as F

from tests.evaluate.test_scoring import limit_memory
from whittle_nas.data import TextData, TokenBlocks, load_blocks
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.perplexity import nats_per_token, text_quality
from whittle_nas.weights.checkpoint import load_supernet


def test_equals_cross_entropy_of_every_family(tiny_gpt):
    tokens = torch.randint(96, (5, 33))
    with torch.no_grad():
        logits = tiny_gpt(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert nats_per_token(tiny_gpt, tokens, 2) == pytest.approx(float(expected), abs=1e-4)


def test_quality_of_the_bundled_model(bundled):
    supernet = load_supernet(bundled)
    data = TextData(files=bundled / "valid.jsonl", num_blocks=6, block_size=128)
    blocks = load_blocks(data, bundled, config=supernet.config)
    found = text_quality(supernet.model, blocks)
    assert found.num_tokens == 6 * 128
    assert found.nats_per_token == pytest.approx(nats_per_token(supernet.model, blocks.tokens))
    assert found.perplexity == pytest.approx(math.exp(found.nats_per_token))
    bits = found.nats_per_token * found.num_tokens / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / int(blocks.num_bytes.sum()))
    assert 0 < found.nats_per_token_stderr < 0.5
    uniform = math.log(supernet.config.vocab_size)
    assert found.nats_per_token < 0.7 * uniform


def test_one_block_has_no_standard_error(bundled):
    supernet = load_supernet(bundled)
    blocks = TokenBlocks(torch.arange(40)[None], torch.tensor([100]))
    assert math.isnan(text_quality(supernet.model, blocks).nats_per_token_stderr)


@pytest.mark.slow
def test_known_quality_of_stories260k(shared_data):
    """1.305 nats per token, as measured by others on `<s>` + story."""
    import json

    directory = shared_data / "checkpoints" / "stories260K"
    supernet = load_supernet(directory)
    from litgpt.tokenizer import Tokenizer

    tokenizer = Tokenizer(directory)
    lines = (shared_data / "tinystories" / "valid.jsonl").read_text().splitlines()[:200]
    nats = tokens = 0.0
    for line in lines:
        ids = tokenizer.encode(json.loads(line)["text"])[: supernet.config.block_size + 1].long()
        nats += nats_per_token(supernet.model, ids[None]) * (len(ids) - 1)
        tokens += len(ids) - 1
    assert nats / tokens == pytest.approx(1.305, abs=0.001)


def test_blocks_longer_than_the_context(bundled):
    supernet = load_supernet(bundled)
    too_long = torch.zeros(1, supernet.config.block_size + 2, dtype=torch.long)
    with pytest.raises(ConfigError, match="block_size"):
        nats_per_token(supernet.model, too_long)


def test_out_of_memory_halves_the_batch(bundled, caplog):
    model = load_supernet(bundled).model
    tokens = torch.randint(100, (8, 17))
    expected = nats_per_token(model, tokens, 8)
    limit_memory(model, 40, torch.OutOfMemoryError("no"))
    assert nats_per_token(model, tokens, 8) == pytest.approx(expected, abs=1e-5)
    assert "out of memory" in caplog.text
