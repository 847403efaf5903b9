"""w * dL/dw of the weights of the blocks, for first-order Taylor scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from whittle_nas.calibration import first_overflow
from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress


def block_products(
    model: Any, tokens: Tensor, *, progress: Progress = no_progress
) -> Callable[[int], dict[str, Tensor]]:
    """Run the model forward and backward over calibration text.

    Args:
        model: `litgpt.GPT`, in evaluation mode; its parameters keep their values.
        tokens: (N, T + 1) token ids; L is the mean loss per token.
        progress: shows the sequences.

    Returns:
        For a layer, w * dL/dw in float32 of every parameter by its name in the block.

    Raises:
        ConfigError: if an activation or a gradient is not finite, naming the layer.
    """
    device = model.lm_head.weight.device
    for parameter in model.transformer.h.parameters():
        parameter.requires_grad_(True)
    try:
        for row in progress(tokens, "gradients", len(tokens)):  # one by one: logits are large
            ids = row[None].to(device)
            logits = model(ids[:, :-1])[0].float()  # (T, V)
            loss = F.cross_entropy(logits, ids[0, 1:])
            if not loss.isfinite():
                raise first_overflow(model, ids[:, :-1], otherwise="what lm_head gives is")
            (loss / len(tokens)).backward()
        found = {n: p.grad.cpu() for n, p in model.transformer.h.named_parameters()}
    finally:
        for parameter in model.transformer.h.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    for name, gradient in reversed(found.items()):  # as they came: the later ones follow from it
        if not gradient.isfinite().all():
            raise ConfigError(
                f"the gradient of transformer.h.{name} is not finite: use a dtype with more range "
                "(--dtype float32)"
            )

    def products(layer: int) -> dict[str, Tensor]:
        return {
            name: parameter.detach().cpu().float() * found[f"{layer}.{name}"].float()
            for name, parameter in model.transformer.h[layer].named_parameters()
        }

    return products
