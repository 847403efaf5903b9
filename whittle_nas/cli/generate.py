"""`nas generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from whittle_nas.cli.options import DType, Sizes
from whittle_nas.errors import ConfigError


def generate(
    *,
    checkpoint_dir: Path,
    prompt: str,
    subnetwork: Sizes = Sizes(),
    front: Path | None = None,
    subnetworks: Path | None = None,
    name: str | None = None,
    index: int | None = None,
    pick: str | None = None,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    device: str = "auto",
    dtype: DType = DType.stored,
    seed: int = 1337,
) -> None:
    """Continue a text, with a whole model or one of its sub-networks.

    It does what `litgpt generate` does, which can't read a directory whose layers differ in size,
    nor a sub-network that has not been exported yet.

    Args:
        checkpoint_dir: What `nas export` or `nas finetune` wrote, or any litgpt checkpoint.
        prompt: The text; it is put into the checkpoint's own prompt style.
        subnetwork: Sizes; without any, and without a file, the whole model runs.
        front: `front.json` of a search.
        subnetworks: `picks.yaml` of `nas search --budgets`, or another list of sizes.
        name: Which of its sub-networks, where there are several.
        index: Which entry of the front.
        pick: Best entry of the front under budgets, as in "num_params <= 60%, latency_ms <= 40".
        max_new_tokens: At most this many tokens.
        temperature: Of sampling; 0 takes the most probable token.
        top_k: Sample among the k most probable tokens.
        top_p: Sample among the most probable tokens that together reach this probability.
        device: `auto`, `cpu`, `cuda`, `cuda:1`; `cuda:0,cuda:1` shares the blocks of the model out
            between several, also `cuda:0,cpu`.
        dtype: Number format of the weights; `stored` is that of the checkpoint.
        seed: Seed of sampling.
    """
    import torch
    from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style

    from whittle_nas.cli.candidates import library_of
    from whittle_nas.cli.common import (
        check_least,
        resolve_devices,
        resolve_dtype,
        seed_everything,
    )
    from whittle_nas.cli.selection import choose_subnetwork
    from whittle_nas.data.blocks import load_tokenizer
    from whittle_nas.space import SubNetwork
    from whittle_nas.weights.checkpoint import load_supernet, open_checkpoint

    check_least(1, max_new_tokens=max_new_tokens, top_k=top_k)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"--temperature {temperature} must be at least 0, and --top_p {top_p} above 0 and at "
            "most 1"
        )
    placed_on = resolve_devices(device)
    checkpoint = open_checkpoint(checkpoint_dir, shortcuts=True, per_layer=True)
    sub = SubNetwork.from_config(checkpoint.config)
    if subnetwork.given() or front is not None or subnetworks is not None:
        sub = choose_subnetwork(
            checkpoint,
            sizes=subnetwork,
            front=front,
            subnetworks=subnetworks,
            name=name,
            index=index,
            pick=pick,
        )
    library = library_of(checkpoint, front=front, subnetworks=subnetworks, name=name)
    patch = None if library is None else library.patch(sub)
    supernet = load_supernet(checkpoint_dir, device=placed_on, dtype=resolve_dtype(dtype))
    style = PromptStyle.from_config(checkpoint.config)
    if has_prompt_style(checkpoint_dir):
        style = load_prompt_style(checkpoint_dir)
    tokenizer = load_tokenizer(checkpoint_dir, checkpoint.config)
    ids = tokenizer.encode(style.apply(prompt), device=placed_on[0])
    seed_everything(seed)
    if len(ids) + max_new_tokens > checkpoint.config.block_size:
        raise ConfigError(
            f"--max_new_tokens {max_new_tokens} and a prompt of {len(ids)} tokens are more than "
            f"the model's context of {checkpoint.config.block_size}"
        )
    with torch.inference_mode():
        made = _continued(
            supernet.standalone(sub, patch),
            ids,
            max_returned_tokens=len(ids) + max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_id=tokenizer.eos_id,
        )
    print(tokenizer.decode(made))


def _continued(model: Any, ids: Any, **how: Any) -> Any:
    """The prompt and what follows, with litgpt's own loop and cache."""
    from litgpt.generate.base import generate as litgpt_generate

    length = how["max_returned_tokens"]
    model.max_seq_length = length
    model.set_kv_cache(batch_size=1, device=ids.device, dtype=model.lm_head.weight.dtype)
    return litgpt_generate(model, ids, **how)
