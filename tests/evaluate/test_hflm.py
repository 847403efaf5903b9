"""The harness model gives what lm-eval's own Hugging Face model gives on the exported directory."""

import logging
import math
import random
from pathlib import Path

import pytest
import torch
from litgpt import GPT

from tests.conftest import fill_random, resized, tiny_config
from whittle_nas.data import load_tokenizer
from whittle_nas.errors import ConfigError
from whittle_nas.evaluate.encoding import TextEncoder
from whittle_nas.evaluate.harness import LitGPTHarness
from whittle_nas.evaluate.presets import choose_tasks
from whittle_nas.evaluate.running import RunOptions, run_task
from whittle_nas.evaluate.tasks import TaskOptions, load_tasks
from whittle_nas.export.checkpoint import plan_export, write_export
from whittle_nas.space import SubNetwork
from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint, write_checkpoint

# sizes that Hugging Face's architectures can express, too
FAMILIES = {
    "pythia-160m": {"n_embd": 64},
    "Llama-3.1-8B": {},
    "Gemma-2-2b": {},
    "Qwen2.5-0.5B": {},
}
SUB = {"n_embd": 48, "n_layer": 4, "intermediate_size": 120}


def harness_of(directory: Path, sub: SubNetwork | None = None, **options) -> LitGPTHarness:
    supernet = load_supernet(directory)
    encoder = TextEncoder(load_tokenizer(directory, supernet.config), directory)
    model = supernet.standalone(sub or supernet.full)
    return LitGPTHarness(model, encoder, **{"batch_size": 8, **options})


def export(directory: Path, out_dir: Path, sub: SubNetwork | None = None, *, hf: bool) -> Path:
    checkpoint = open_checkpoint(directory)
    sub = sub or SubNetwork.from_config(checkpoint.config)
    out_dir.mkdir()
    write_export(out_dir, plan_export(checkpoint, sub, to_hf=hf))
    return out_dir


def reference_of(directory: Path, **options):
    """lm-eval's own model, on the CPU in float32."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options = {"dtype": "float32", "device": "cpu", "batch_size": 8, **options}
    return HFLM(pretrained=str(directory), **options)


def instances(kind: str, arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("task", i, 1))
        for i, a in enumerate(arguments)
    ]


@pytest.fixture(scope="module", params=FAMILIES)
def random_model(request, tmp_path_factory, bundled) -> tuple[Path, Path]:
    """A tiny random model of a family as a litgpt and as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("family")
    source = open_checkpoint(bundled).config
    config = tiny_config(
        request.param,
        vocab_size=source.vocab_size,
        padded_vocab_size=source.padded_vocab_size,
        block_size=64,
        **FAMILIES[request.param],
    )
    (folder / "litgpt").mkdir()
    state = fill_random(GPT(config)).state_dict()
    write_checkpoint(folder / "litgpt", state, config=config, source=bundled)
    return folder / "litgpt", export(folder / "litgpt", folder / "hf", hf=True)


def choices() -> list[tuple[str, str]]:
    """Questions with shared and unshared contexts, some without, some too long for the model."""
    rng = random.Random(3)
    words = ["class", "def", "return", "import", "value", "list", "the", "(self)", "None", "x = 1"]

    def text(n: int) -> str:
        return " ".join(rng.choice(words) for _ in range(n))

    found = []
    for number in range(12):
        context = text(rng.randrange(1, 20)) + (" " if number % 3 == 0 else "")
        found += [(context, " " + text(rng.randrange(1, 4))) for _ in range(3)]
    found += [("", text(3)), ("", text(4)), (text(90), " " + text(3)), ("<s>" + text(3), " x")]
    return found


def compare(ours, reference) -> None:
    for (log_prob, greedy), (expected, expected_greedy) in zip(ours, reference, strict=True):
        assert log_prob == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def test_families_loglikelihood(random_model):
    litgpt_dir, hf_dir = random_model
    requests = instances("loglikelihood", choices())
    compare(
        harness_of(litgpt_dir).loglikelihood(requests),
        reference_of(hf_dir).loglikelihood(requests, disable_tqdm=True),
    )


def test_families_rolling(random_model):
    litgpt_dir, hf_dir = random_model
    texts = [(" ".join(c for c, _ in choices()[i : i + 6]),) for i in (0, 6, 20)] + [("x",)]
    requests = instances("loglikelihood_rolling", texts)
    # with its own BOS, lm-eval's model would read every document as <s> <s> text
    reference = reference_of(hf_dir, add_bos_token=False)
    found = harness_of(litgpt_dir).loglikelihood_rolling(requests)
    expected = reference.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("until", [["\n\n"], [" the", "x"]])
@pytest.mark.slow
def test_families_generation(random_model, until):
    litgpt_dir, hf_dir = random_model
    options = {"until": until, "max_gen_toks": 20, "do_sample": False}
    # lm-eval's model looks for a BOS in the first prompt of a batch only, so none begins with it
    prompts = [c for c, _ in choices()[::3] if c and not c.startswith("<s>")]
    requests = instances("generate_until", [(prompt, options) for prompt in prompts])
    found = harness_of(litgpt_dir).generate_until(requests)
    assert found == reference_of(hf_dir).generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 1


@pytest.fixture(scope="module")
def stories(shared_data) -> Path:
    return shared_data / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def stories_hf(stories, tmp_path_factory) -> Path:
    return export(stories, tmp_path_factory.mktemp("hf") / "stories", hf=True)


@pytest.fixture
def _at_root(monkeypatch):
    """The task files name their data relative to the project."""
    monkeypatch.chdir(Path(__file__).parents[2])


def ask(harness, name: str, shared_data: Path, limit: int):
    """Results and answers of one local task."""
    (task,) = load_tasks(
        choose_tasks([name]),
        TaskOptions(limit=limit),
        include_path=shared_data / "lm_eval_tasks",
    )
    return run_task(harness, task, TaskOptions(limit=limit), RunOptions(0, log_samples=True))


def check_task(name: str, limit: int, stories: Path, stories_hf: Path, shared_data: Path) -> None:
    ours = ask(harness_of(stories), name, shared_data, limit)
    reference = ask(reference_of(stories_hf), name, shared_data, limit)
    assert ours.results["results"] == reference.results["results"]
    assert ours.samples is not None
    assert reference.samples is not None
    for one, other in zip(ours.samples[name], reference.samples[name], strict=True):
        assert one["arguments"] == other["arguments"]
        compare([r[0] for r in one["resps"]], [r[0] for r in other["resps"]])


@pytest.mark.slow
@pytest.mark.usefixtures("_at_root")
@pytest.mark.parametrize("name", ["local_story_next", "local_arc_easy"])
def test_12_items_of_stories_have_hflms_scores(name, stories, stories_hf, shared_data):
    check_task(name, 12, stories, stories_hf, shared_data)


@pytest.mark.slow
@pytest.mark.usefixtures("_at_root")
@pytest.mark.parametrize("name", ["local_story_next", "local_arc_easy"])
def test_300_items_of_stories_have_hflms_scores(name, stories, stories_hf, shared_data):
    check_task(name, 300, stories, stories_hf, shared_data)


@pytest.mark.slow
@pytest.mark.usefixtures("_at_root")
def test_rolling_perplexity_without_a_doubled_bos(stories, stories_hf, shared_data):
    ours = ask(harness_of(stories), "local_tinystories", shared_data, 40)
    metrics = ours.results["results"]["local_tinystories"]
    assert metrics["bits_per_byte,none"] == pytest.approx(0.909, abs=5e-4)
    reference = reference_of(stories_hf, add_bos_token=False)
    expected = ask(reference, "local_tinystories", shared_data, 40)
    reference_metrics = expected.results["results"]["local_tinystories"]
    assert metrics["bits_per_byte,none"] == pytest.approx(reference_metrics["bits_per_byte,none"])
    doubled = ask(reference_of(stories_hf), "local_tinystories", shared_data, 40)
    doubled_metrics = doubled.results["results"]["local_tinystories"]
    assert doubled_metrics["bits_per_byte,none"] == pytest.approx(0.925, abs=1e-3)


def test_generation_equals_hugging_face_generate(stories, stories_hf):
    from transformers import AutoModelForCausalLM

    prompts = ["Once upon a time", "Lily and Tom went to the park. They", "The dog was"]
    options = {"until": ["\n\n\n"], "max_gen_toks": 60, "do_sample": False}
    harness = harness_of(stories)
    found = harness.generate_until(instances("generate_until", [(p, options) for p in prompts]))
    model = AutoModelForCausalLM.from_pretrained(stories_hf).eval()
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([harness.tok_encode(prompt)])
        new = model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)[0]
        assert text == harness.encoder.decode(new[ids.shape[1] :].tolist())
        assert len(text) > 100


@pytest.mark.slow
def test_in_place_equals_exported(stories, tmp_path):
    sub = resized(load_supernet(stories).full, **SUB)
    requests = instances("loglikelihood", choices())
    in_place = harness_of(stories, sub).loglikelihood(requests)
    litgpt_dir = export(stories, tmp_path / "litgpt", sub, hf=False)
    exported = harness_of(litgpt_dir).loglikelihood(requests)
    compare(in_place, exported)
    assert in_place == exported  # the same numbers in the same order of operations
    hf_dir = export(stories, tmp_path / "hf", sub, hf=True)
    compare(in_place, reference_of(hf_dir).loglikelihood(requests, disable_tqdm=True))


def test_a_continuation_longer_than_the_context_is_cut(stories, caplog):
    """lm-eval's own model stops here; ours scores what fits and says so."""
    harness = harness_of(stories, max_length=16)
    request = instances("loglikelihood", [("Once", " upon a time there was a dog" * 4)])
    ((log_prob, _),) = harness.loglikelihood(request)
    assert -math.inf < log_prob < 0
    assert "1 of them inside the scored continuation" in caplog.text


def test_a_continuation_without_tokens_is_certain(stories):
    harness = harness_of(stories)
    pairs = [("Once upon", ""), ("Once upon", " a time"), ("", "")]
    found = harness.loglikelihood(instances("loglikelihood", pairs))
    assert found[0] == found[2] == (0.0, True)
    assert found[1] == harness.loglikelihood(instances("loglikelihood", pairs[1:2]))[0]
    assert found[1][0] < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_gen_toks": 512}, "context is 512"),
        ({"num_beams": 4}, "num_beams"),
    ],
)
def test_generation_options_that_can_not_be_met(stories, options, message):
    with pytest.raises(ConfigError, match=message):
        harness_of(stories).generate_until(instances("generate_until", [("a", options)]))


def test_sampled_answers_repeat_with_the_seed(stories):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20}
    requests = instances("generate_until", [("Once upon a time", options)])
    texts = [harness_of(stories, seed=seed).generate_until(requests) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
