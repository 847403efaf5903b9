"""Log-likelihoods and generated text equal those of litgpt's plain forward pass."""

import random

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, tiny_config
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.forward import hidden_states
from whittle_nas.evaluate.generation import Decoding, choose, generate
from whittle_nas.evaluate.packing import Query
from whittle_nas.evaluate.scoring import score
from whittle_nas.space import Block, SubNetwork
from whittle_nas.weights.supernet import SuperNetwork


def questions(vocab_size: int, max_length: int) -> list[Query]:
    rng = random.Random(0)

    def words(n: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(n)]

    found = []
    for _ in range(5):
        context = words(rng.randrange(3, 40))
        found += [Query.of(context, words(rng.randrange(1, 6)), max_length) for _ in range(3)]
        found += [Query.of(context, [token], max_length) for token in (5, 6)]
        found.append(Query.of(context[: len(context) // 2] + [7], [8, 9], max_length))
    found.append(Query.of(words(90), words(4), max_length))
    return found


def reference(model: GPT, query: Query) -> tuple[float, bool]:
    with torch.no_grad():
        log_probs = model(torch.tensor([query.inputs]))[0].log_softmax(-1)[-len(query.targets) :]
    targets = torch.tensor(query.targets)
    found = log_probs.gather(1, targets[:, None])
    return float(found.sum()), bool((log_probs.argmax(-1) == targets).all())


def check(model: GPT, queries: list[Query], scores: list[tuple[float, bool]]) -> None:
    for query, (log_prob, greedy) in zip(queries, scores, strict=True):
        expected, expected_greedy = reference(model, query)
        assert log_prob == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_scores_of_every_family(tiny_gpt):
    queries = questions(tiny_gpt.config.vocab_size, tiny_gpt.max_seq_length)
    check(tiny_gpt, queries, score(tiny_gpt, queries, batch_size=3))


def test_plain_rows_of_every_family(tiny_gpt):
    ids = torch.randint(96, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            tiny_gpt.lm_head(hidden_states(tiny_gpt, ids)),
            _without_cap(tiny_gpt)(ids),
            rtol=0,
            atol=1e-4,
        )


def _without_cap(model: GPT) -> GPT:
    model.config.final_logit_softcapping = None
    return model


def test_greedy_generation_of_every_family(tiny_gpt):
    prompts = [[random.randrange(96) for _ in range(length)] for length in (3, 11, 25)]
    found = generate(tiny_gpt, prompts, Decoding(12, eos_ids=(7,)))
    for prompt, new in zip(prompts, found, strict=True):
        text = list(prompt)
        for token in new:
            with torch.no_grad():
                assert tiny_gpt(torch.tensor([text]))[0, -1].argmax() == token
            text.append(token)
        assert len(new) == 12 or new[-1] == 7
        assert 7 not in new[:-1]


@pytest.fixture
def small() -> GPT:
    return fill_random(GPT(tiny_config("Llama-3.1-8B"))).eval()


@pytest.mark.parametrize("batch_size", [1, 2, 100, None])
def test_scores_do_not_depend_on_the_batch_size(small, batch_size):
    queries = questions(96, 64)
    check(small, queries, score(small, queries, batch_size=batch_size))


def limit_memory(model: GPT, tokens: int, error: BaseException) -> list[int]:
    """Let the model fail as a device does when a batch is too large; returns sizes that passed."""
    passed: list[int] = []

    def check_size(_, arguments):
        if arguments[0].numel() > tokens:
            raise error
        passed.append(arguments[0].numel())

    model.transformer.wte.register_forward_pre_hook(check_size)
    return passed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(small, caplog, error):
    queries = questions(96, 64)
    expected = score(small, queries, batch_size=50)
    passed = limit_memory(small, 150, error)
    found = score(small, queries, batch_size=50)
    assert [log_prob for log_prob, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert max(passed) <= 150
    assert "out of memory" in caplog.text
    assert "at most" in caplog.text


def test_a_single_text_that_does_not_fit_is_a_clear_error(small):
    limit_memory(small, 10, MemoryError())
    with pytest.raises(ConfigError, match="one sequence of 20 tokens does not fit"):
        score(small, [Query.of(range(20), [3], 64)], batch_size=4)


def test_other_errors_are_not_taken_for_memory(small):
    limit_memory(small, 10, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        score(small, [Query.of(range(20), [3], 64)], batch_size=4)


def test_generation_leaves_no_cache_behind(small):
    before = small(torch.arange(9)[None])
    generate(small, [[1, 2], [3]], Decoding(4, eos_ids=()))
    torch.testing.assert_close(small(torch.arange(9)[None]), before)


def test_generation_ends_at_a_stop_sequence(small):
    (free,) = generate(small, [[1, 2, 3]], Decoding(10, eos_ids=()))
    (cut,) = generate(small, [[1, 2, 3]], Decoding(10, ()), stopped=lambda new: free[4] in new)
    assert cut == free[: free.index(free[4]) + 1]


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**options) -> list[float]:
        chosen = choose(logits, Decoding(1, (), **options), generator)
        return (torch.bincount(chosen, minlength=4) / len(chosen)).tolist()

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.02)
    cold = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert shares(temperature=0.5) == pytest.approx((cold / cold.sum()).tolist(), abs=0.02)
    assert shares(temperature=0.0) == [1, 0, 0, 0]


@pytest.mark.parametrize("family", ["Llama-3.1-8B", "Gemma-3-1b-it"])
def test_blocks_without_attention_generate_too(family):
    """They keep no cache, and have no window."""
    model = SuperNetwork(fill_random(GPT(tiny_config(family))).eval())
    whole = model.full.blocks[0]
    sub = SubNetwork(48, (Block(0, 0, 0, 30), whole, whole._replace(intermediate_size=0)))
    small = model.standalone(sub)
    prompts = [[5, 6, 7, 8, 9], [11], [3, 4]]
    found = generate(small, prompts, Decoding(6, eos_ids=(7, 20)))
    for prompt, new in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.inference_mode():
            for token in new:
                assert small(torch.tensor([ids]))[0, -1].argmax() == token
                ids.append(token)
