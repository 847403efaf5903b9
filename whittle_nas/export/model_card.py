"""`README.md` of an exported model: what it is, and from which model it was cut."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from whittle_nas.space import SubNetwork
from whittle_nas.train.choices import Strategy
from whittle_nas.weights.axes import is_tied
from whittle_nas.weights.checkpoint import licences
from whittle_nas.weights.counting import parameter_counter
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import SlicePlan

_COMMAND = """
```bash
{} generate {}path/to/this/directory --prompt "Once upon a time"
```
"""
_PYTHON = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```
"""


class Use(Enum):
    """How a model is loaded."""

    litgpt = _COMMAND.format("litgpt", "")
    nas = _COMMAND.format("nas", "--checkpoint_dir ")
    transformers = _PYTHON.format("")
    remote = _PYTHON.format(", trust_remote_code=True")


_UNCHANGED = "Its weights were not changed."
_TIED = " The head is the token table, which counts once."


def model_card(
    slices: SlicePlan,
    info: SupernetInfo,
    *,
    source: Path,
    use: Use,
    notes: Sequence[str] = (),
    after: str = "",
) -> str:
    """Markdown with the header that model hubs read.

    Args:
        slices: the sub-network.
        info: how its super-network was sorted and trained.
        source: the super-network's directory, which may hold a licence.
        use: how it is loaded.
        notes: what a user has to know, one sentence each.
        after: what was done to the sub-network after the cut, one sentence.
    """
    full = slices.full_config
    count, whole = map(parameter_counter(full), (slices.sub, SubNetwork.from_config(full)))
    by_transformers = use in (Use.transformers, Use.remote)
    library = "transformers" if by_transformers else "litgpt"
    header = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["pruned"]}
    if base := _base_model(full):
        header["base_model"] = base
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{full.name}`"
    paragraphs = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# A sub-network of {full.name}",
        f"{count:,} of the {whole:,} parameters of {origin}, as a dense model of a smaller shape, "
        f"cut out by `nas export`. {_history(info)}{_TIED if is_tied(full) else ''}",
        after,
        _table(slices),
        f"Layers kept: {', '.join(map(str, slices.layers))}.",
        "\n".join(f"- Note: {note}." for note in notes),
        use.value.strip(),
        _licence(full.name, source),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _base_model(config: Any) -> str | None:
    """Name on the hub, for models of litgpt's list."""
    place = config.hf_config or {}
    return f"{place['org']}/{place['name']}" if {"org", "name"} <= place.keys() else None


def _history(info: SupernetInfo) -> str:
    sorted_first = "sorted by importance" if info.importance else ""
    alone = (info.training or {}).get("strategy") == Strategy.standard.value
    how = "fine-tuned" if alone else "fine-tuned as a super-network"
    trained = how if info.training or info.search_space else ""
    done = " and ".join(filter(None, (sorted_first, trained)))
    untied = (info.training or {}).get("head_untied")
    head = " Its head, which was the token table, was trained apart from it." if untied else ""
    return f"Before the cut its weights were {done}.{head}" if done else _UNCHANGED


def _table(slices: SlicePlan) -> str:
    rows = [
        f"| {name} | {size} | {getattr(slices.full_config, name)} |"
        for name, size in slices.sub.summary().items()
    ]
    return "\n".join(["| size | this model | the whole |", "|---|---|---|", *rows])


def _licence(name: str, source: Path) -> str:
    files = ", ".join(f"`{path.name}`" for path in licences(source))
    beside = f": {files}" if files else ""
    return f"The licence is that of {name}{beside}."
