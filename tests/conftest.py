"""Tiny models of litgpt's families, and checkpoint directories made from them.

Heavy packages are imported where they are used: the process of pytest-xdist that only hands out
the tests loads this file before the others start.
"""

import gc
import inspect
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "9")

import pytest
from hypothesis import settings

from whittle_nas.assets import bundled_checkpoint
from whittle_nas.space import SubNetwork
from whittle_nas.space.subnetwork import SIZES

# The same examples in every run and on every machine, and none kept from an earlier one.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

_SMALL = {"n_layer": 3, "n_embd": 48, "padded_vocab_size": 96, "block_size": 64}
_MHA = {"n_head": 4, "n_query_groups": 4, "head_size": 16}
_GQA = {"n_head": 8, "n_query_groups": 4, "head_size": 8}
FAMILIES = {
    "pythia-160m": {**_MHA, "intermediate_size": 80},
    "Llama-2-7b-hf": {**_MHA, "intermediate_size": 72},
    "Llama-3.1-8B": {**_GQA, "intermediate_size": 72},
    "Llama-3.2-1B": {**_GQA, "intermediate_size": 72},
    "phi-1_5": {**_MHA, "intermediate_size": 80},
    "phi-2": {"n_head": 4, "n_query_groups": 4, "head_size": 20, "intermediate_size": 80},
    "Phi-3-mini-4k-instruct": {**_MHA, "intermediate_size": 72},
    "Gemma-2b": {"n_head": 4, "n_query_groups": 1, "head_size": 16, "intermediate_size": 72},
    "Gemma-2-2b": {**_GQA, "intermediate_size": 72, "sliding_window_size": 8},
    "Gemma-3-1b-it": {
        "n_head": 4, "n_query_groups": 1, "head_size": 16, "intermediate_size": 72,
        "sliding_window_size": 8,
    },
    "Qwen2.5-0.5B": {**_GQA, "intermediate_size": 72},
    "Qwen3-0.6B": {**_GQA, "intermediate_size": 72},
    "OLMo-2-1124-7B": {**_MHA, "intermediate_size": 72},
    "Mistral-7B-v0.1": {**_GQA, "intermediate_size": 72, "sliding_window_size": 8},
    "falcon-7b": {"n_head": 6, "n_query_groups": 1, "head_size": 8, "intermediate_size": 80},
    "stablelm-base-alpha-3b": {**_MHA, "intermediate_size": 80},
    "SmolLM2-135M": {**_GQA, "intermediate_size": 72},
    "tiny-llama-1.1b": {**_GQA, "intermediate_size": 72},
    "OLMo-1B-hf": {**_MHA, "intermediate_size": 72},
    "falcon-40b": {**_GQA, "intermediate_size": 80},
}  # fmt: skip
# LayerNorm with biases and parallel blocks, grouped queries that rotate, norms on both sides, norms
# of queries and keys. Slow tests try all.
QUICK = (
    "pythia-160m", "pythia-14m", "Llama-3.1-8B", "Gemma-2-2b", "Qwen3-0.6B",
)  # fmt: skip


SLOW = {  # parameter of a test -> whether this value of it is slow
    "family": lambda family: family not in QUICK,
    "method": lambda method: method == "surrogate",
    "directory": lambda tokenizer: tokenizer == "neox20b",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is tried with a value of `SLOW`, and let what takes long begin first."""
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if any(name in given and slow(given[name]) for name, slow in SLOW.items()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not (item.get_closest_marker("long") or _is_notebook(item)))


def _is_notebook(item: pytest.Item) -> bool:
    return item.path.suffix == ".ipynb"


def first_of(values: Iterable[Any], every: int | None = None) -> list[Any]:
    """Values of a parameter: the first is tried by the fast tests, the others by the slow ones.

    With `every` the first of so many in turn; values are then tuples of several parameters.
    """
    found = list(values)
    step, several = every or len(found), every is not None
    return [
        pytest.param(*(value if several else (value,)), marks=[pytest.mark.slow] * (at % step > 0))
        for at, value in enumerate(found)
    ]


def tiny_config(family: str, **changes) -> Any:
    """A family of litgpt's list, scaled down."""
    from litgpt import Config

    return Config.from_name(family, **{**_SMALL, **FAMILIES[family], **changes})


def uniform(*sizes: int, of: int = 3, order: Sequence[int] | None = None) -> SubNetwork:
    """Equal blocks in the first layers of a model, or the most important ones.

    Args:
        *sizes: n_embd, n_head, n_query_groups, head_size, intermediate_size, n_layer.
        of: layers of the model.
        order: layer ids, most important first.
    """
    return SubNetwork.uniform(order or range(of), **dict(zip(SIZES, sizes, strict=True)))


def resized(sub: SubNetwork, *, order: Sequence[int] | None = None, **sizes: int) -> SubNetwork:
    """A uniform sub-network with other sizes, in the first or the most important layers."""
    layers = order or range(len(sub.blocks))
    return SubNetwork.uniform(layers, **{**(sub.sizes() or {}), **sizes})


def fill_random(model: Any, seed: int = 0) -> Any:
    """Random values everywhere, also in norms, biases and LoRA's B, so that every slice counts."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "norm" in name or "ln_f" in name:
                parameter.add_(1.0)
    return model


def pytest_collection_finish() -> None:
    """What was imported stays: libraries that collect garbage need not walk through it each time.

    litgpt's converter does so after every file, which takes a third of a second with all modules.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_state():
    """The same seeds for every test, and nothing left changed by the one before."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True, scope="session")
def _few_pictures() -> Iterator[Any]:
    """Half of the time of a small command goes into its pictures: most tests draw none."""
    from whittle_nas import plots
    from whittle_nas.weights.files import atomic_file

    def save(_figure: Any, path: Path) -> None:
        with atomic_file(path) as partial:
            partial.write_bytes(b"\x89PNG")

    drawing = plots._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", save)
        yield drawing


@pytest.fixture
def pictures(_few_pictures) -> Iterator[pytest.MonkeyPatch]:
    """For tests that look at pictures, one at least for each kind; `undo` ends the drawing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whittle_nas.plots._save", _few_pictures)
        yield patch


@pytest.fixture(autouse=True)
def _slow_tests_draw(request) -> None:
    if request.node.get_closest_marker("slow"):
        request.getfixturevalue("pictures")


@pytest.fixture(autouse=True, scope="session")
def _callers_without_their_sources() -> Iterator[None]:
    """jsonargparse looks up who calls it for every line that it parses.

    It asks for the whole stack with the sources of all frames. Under pytest, with fifty frames and
    thousands of modules, that is two thirds of a wrong command's time; it needs two frames.
    """
    import jsonargparse._core

    def stack() -> list[tuple[Any, ...]]:
        return [(sys._getframe(1),), (sys._getframe(2),)]

    seen = SimpleNamespace(**{**vars(inspect), "stack": stack})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonargparse._core, "inspect", seen)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_estimate_of_each_model() -> Iterator[None]:
    """Most trainings here are of the same model; what they need follows from the sizes alone."""
    from whittle_nas.train import memory

    measure, known = memory._saved_bytes, {}

    def saved_bytes(*sizes: Any) -> int:
        key = repr(sizes)
        if key not in known:
            known[key] = measure(*sizes)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_saved_bytes", saved_bytes)
        yield


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def tiny_gpt(family) -> Any:
    from litgpt import GPT

    return fill_random(GPT(tiny_config(family))).eval()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints and data beside the project; tests that need them skip without."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def bundled() -> Path:
    return bundled_checkpoint()


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, bundled) -> Path:
    """A small random checkpoint with a real tokenizer, quick to run; for reading only."""
    from litgpt import GPT, Config

    from whittle_nas.weights.checkpoint import write_checkpoint

    source = Config.from_file(bundled / "model_config.yaml")
    config = tiny_config(
        "Llama-3.1-8B",
        vocab_size=source.vocab_size,
        padded_vocab_size=source.padded_vocab_size,
        block_size=128,
    )
    model = fill_random(GPT(config))
    made = tmp_path_factory.mktemp("small") / "checkpoint"
    made.mkdir()
    write_checkpoint(made, model.state_dict(), config=config, source=bundled)
    return made


@pytest.fixture
def checkpoint_dir(tmp_path, small_checkpoint) -> Path:
    """A copy of it, which a test may change: making one takes ten times as long."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
