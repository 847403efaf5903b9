"""The block-by-block pass: equal to the whole model's, on any family."""

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.calibration import Gram, Moments, SquareSums, Stream, fetch_block, walk
from whittle_nas.errors import ConfigError

TOKENS = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(1))


def inputs_of(model, name):
    """What enters a module of the model in one plain forward pass, as rows."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def test_unchanged_blocks_give_the_models_own_hidden_states(tiny_gpt):
    stream = Stream(tiny_gpt, TOKENS, batch_size=2)
    walk(tiny_gpt, stream, lambda _layer, block, _seen: block, watch=lambda _block: {})
    with torch.no_grad():
        logits = tiny_gpt.lm_head(tiny_gpt.transformer.ln_f(torch.cat(stream.states)))
        cap = tiny_gpt.config.final_logit_softcapping
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        torch.testing.assert_close(logits, tiny_gpt(TOKENS), atol=1e-4, rtol=1e-4)


def test_no_text_is_no_batch():
    model = GPT(tiny_config("SmolLM2-135M"))
    assert not Stream(model, TOKENS[:0]).states
    assert [len(x) for x in Stream(model, TOKENS, batch_size=2).states] == [2, 2, 1]


@pytest.mark.parametrize("sequential", [True, False])
def test_statistics_are_of_what_the_compressed_or_the_whole_model_gives(sequential):
    model = fill_random(GPT(tiny_config("Llama-3.1-8B"))).eval()
    seen = []

    def halve(_layer, block, statistics):
        seen.append(statistics)
        block.mlp.proj.weight.mul_(0.5)
        return block

    def watch(_block):
        return {"attn.proj": Gram(), "mlp.proj": Moments(), "mlp.fc_1": SquareSums()}

    walk(model, Stream(model, TOKENS, batch_size=2), halve, watch=watch, sequential=sequential)
    for layer, found in enumerate(seen):
        compressed = fill_random(GPT(model.config)).eval()
        with torch.no_grad():
            for earlier in compressed.transformer.h[: layer if sequential else 0]:
                earlier.mlp.proj.weight.mul_(0.5)
        where = f"transformer.h.{layer}."
        x = inputs_of(compressed, where + "attn.proj")
        torch.testing.assert_close(found["attn.proj"].value(), x.T @ x, atol=1e-3, rtol=1e-4)
        x = inputs_of(compressed, where + "mlp.proj")
        torch.testing.assert_close(found["mlp.proj"].mean, x.mean(0), atol=1e-5, rtol=1e-4)
        variance = x.var(0, correction=0)
        torch.testing.assert_close(found["mlp.proj"].variance(), variance, atol=1e-5, rtol=1e-4)
        x = inputs_of(compressed, where + "mlp.fc_1")
        torch.testing.assert_close(found["mlp.fc_1"].norms(), x.norm(dim=0), atol=1e-4, rtol=1e-4)
    assert torch.equal(  # the model itself is left alone
        model.transformer.h[0].mlp.proj.weight,
        fill_random(GPT(model.config)).transformer.h[0].mlp.proj.weight,
    )


def test_finished_blocks_are_taken_and_not_made_again():
    model = fill_random(GPT(tiny_config("Llama-3.1-8B"))).eval()
    walked = {}
    for start in (0, 2):
        made = []

        def double(layer, block, _seen, made=made):
            made.append(layer)
            block.mlp.proj.weight.mul_(2)
            return block

        def earlier(layer, block, start=start):
            return double(0, block, None, []) if layer < start else None

        stream = Stream(model, TOKENS)
        walk(model, stream, double, watch=lambda _block: {}, finished=earlier)
        assert made == [0, 1, 2][start:]
        walked[start] = torch.cat(stream.states)
    assert torch.equal(walked[0], walked[2])


def test_an_activation_that_is_not_finite_names_its_module():
    model = fill_random(GPT(tiny_config("Llama-3.1-8B"))).eval()
    stream = Stream(model, TOKENS)
    block = fetch_block(model, 1, "cpu")
    block.mlp.fc_2.weight.fill_(1e38)
    with pytest.raises(ConfigError, match=r"transformer\.h\.1\.mlp\.proj are not finite"):
        stream.run(block, 1, watch={"mlp.proj": Moments()})
