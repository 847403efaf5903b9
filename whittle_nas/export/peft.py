"""Adapters as a directory that PEFT's `PeftModel.from_pretrained` loads.

D `n_embd`, V vocabulary, r rank. PEFT adds B A * alpha / r to a linear layer, as litgpt does; to a
token table it adds A^T B^T, with A (r, V) and B (D, r): ours are those of a head of the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from whittle_nas.errors import ConfigError
from whittle_nas.export.hf_config import HFTarget, hf_target
from whittle_nas.export.hf_names import name_map
from whittle_nas.weights.slicing import SlicePlan
from whittle_nas.weights.supernet import SuperNetwork

_TABLE = "transformer.wte"


@dataclass(frozen=True)
class PeftPlan:
    """Adapters of one sub-network; made before any work, so that refusals come first.

    Attributes:
        slices: the sub-network; its config says which modules are adapted.
        target: the Hugging Face model that they belong to.
        modules: litgpt module -> Hugging Face modules that its rows are stacked of.
    """

    slices: SlicePlan
    target: HFTarget
    modules: Mapping[str, tuple[str, ...]]


def plan_peft(slices: SlicePlan) -> PeftPlan:
    """Resolve the export of adapters.

    Raises:
        ConfigError: if transformers has no such model, or joins matrices whose adapters are apart.
    """
    config = slices.config
    target = hf_target(slices.own_config)
    modules = {}
    for row in name_map(slices.own_config, target.model_type):
        if not row.lit[0].endswith(".weight"):
            continue
        module = row.lit[0].removesuffix(".weight")
        joined = len(row.lit) > 1 or (module.endswith("attn.qkv") and len(row.hf) != 3)
        if joined and (config.lora_mlp if len(row.lit) > 1 else config.lora_query):
            raise ConfigError(
                f"--format peft: {target.model_type} of transformers holds {row.hf[0]} as one "
                "matrix, whose parts have adapters of their own here; merge them with --format hf"
            )
        modules[module] = tuple(name.removesuffix(".weight") for name in row.hf)
    return PeftPlan(slices, target, modules)


def write_peft(out_dir: Path, planned: PeftPlan, supernet: SuperNetwork) -> None:
    """Fill an empty directory with `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        out_dir: existing directory.
        planned: from `plan_peft`.
        supernet: the adapted one, at its rank.
    """
    from safetensors.torch import save_file

    config = planned.slices.config
    tensors = dict(_converted(planned, supernet.slices(planned.slices.sub)))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(names),
        "bias": "none",
        "inference_mode": True,
    }
    text = json.dumps(described, indent=2) + "\n"
    (out_dir / "adapter_config.json").write_text(text, encoding="utf-8")
    held = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(held, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})


def _converted(
    planned: PeftPlan, tensors: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for module, homes in planned.modules.items():
        a, b = (tensors.get(f"{module}.lora_{kind}") for kind in "AB")  # (r, D) and (rows, r)
        if a is None or b is None:
            continue
        paths = [f"base_model.model.{home}" for home in homes]
        if module == _TABLE:
            yield f"{paths[0]}.lora_embedding_A", b.T
            yield f"{paths[0]}.lora_embedding_B", a.T
        elif module.endswith("attn.qkv"):
            yield from _queries_keys_values(planned, paths, a, b)
        else:
            yield f"{paths[0]}.lora_A.weight", a
            yield f"{paths[0]}.lora_B.weight", b


def _queries_keys_values(
    planned: PeftPlan, paths: list[str], a: torch.Tensor, b: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """litgpt stacks the adapters of those of the three that have one."""
    config: Any = planned.slices.config
    switches = (config.lora_query, config.lora_key, config.lora_value)
    counts = (config.n_head, config.n_query_groups, config.n_query_groups)
    on = [at for at, switch in enumerate(switches) if switch]
    rows = b.split([counts[at] * config.head_size for at in on])
    scale = 1.0 if config.norm_qk else planned.target.query_scale  # then the norm is scaled
    for at, part, columns in zip(on, rows, a.chunk(len(on)), strict=True):
        yield f"{paths[at]}.lora_A.weight", columns
        yield f"{paths[at]}.lora_B.weight", part * scale if at == 0 else part
