"""w * dL/dw of the weights of the blocks, for first-order Taylor scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from whittle_nas.calibration import embed, first_overflow, give_back, head, run_block
from whittle_nas.errors import ConfigError
from whittle_nas.progress import Progress, no_progress

# Logits that exist at a time, in elements; 2^23 in float32 are 32 MiB.
_LOGITS = 2**23


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
    with _gradients(model):
        _run(model, tokens, progress)
        parameters: dict[str, Any] = dict(model.transformer.h.named_parameters())
        found = {name: parameter.grad.cpu() for name, parameter in parameters.items()}
    _check(found)

    def products(layer: int) -> dict[str, Tensor]:
        return {
            name: parameter.detach().cpu().float() * found[f"{layer}.{name}"].float()
            for name, parameter in model.transformer.h[layer].named_parameters()
        }

    return products


def reduced_products(
    model: Any,
    tokens: Tensor,
    reduce: Callable[[str, Tensor], Tensor],
    *,
    progress: Progress = no_progress,
) -> Callable[[int], dict[str, Tensor]]:
    """As `block_products`, for scores that are sums: the gradient of one weight exists at a time.

    Args:
        model: see there.
        tokens: see there.
        reduce: linear; makes of a parameter's name in the block and of its w * dL/dw what is kept.
        progress: see there.
    """
    totals: dict[str, Tensor] = {}

    def taking(name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            product = parameter.detach().float() * parameter.grad.float()
            part = reduce(name.partition(".")[2], product).cpu()
            totals[name] = totals[name] + part if name in totals else part
            parameter.grad = None

        return take

    with _gradients(model), ExitStack() as stack:
        for name, parameter in model.transformer.h.named_parameters():
            hook = parameter.register_post_accumulate_grad_hook(taking(name))
            stack.callback(hook.remove)
        _run(model, tokens, progress)
    names = [name for name, _ in model.transformer.h.named_parameters()]
    _check({name: totals[name] for name in names})
    inside = [[n for n in names if n.startswith(f"{at}.")] for at in range(model.config.n_layer)]
    return lambda layer: {name.partition(".")[2]: totals[name] for name in inside[layer]}


@contextmanager
def _gradients(model: Any) -> Iterator[None]:
    """Let the weights of the blocks have gradients while the block lasts."""
    for parameter in model.transformer.h.parameters():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in model.transformer.h.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        give_back()


def _run(model: Any, tokens: Tensor, progress: Progress) -> None:
    for row in progress(tokens, "gradients", len(tokens)):  # one by one: activations are large
        ids = row[None].to(model.lm_head.weight.device)
        if not math.isfinite(_backward(model, ids, 1 / len(tokens))):
            raise first_overflow(model, ids[:, :-1], otherwise="what lm_head gives is")


def _check(found: Mapping[str, Tensor]) -> None:
    for name in reversed(list(found)):  # as they came: the later ones follow from it
        if not found[name].isfinite().all():
            raise ConfigError(
                f"the gradient of transformer.h.{name} is not finite: use a dtype with more range "
                "(--dtype float32)"
            )


def _backward(model: Any, ids: Tensor, factor: float) -> float:
    """Add the gradients of the mean loss of a sequence (1, T + 1), times a factor; the loss.

    Of the forward pass the inputs of the blocks are kept, and blocks run again for their gradients.
    """
    x = embed(model, ids[:, :-1])
    for layer in range(model.config.n_layer):
        x = checkpoint(run_block, model, x, layer, use_reentrant=False)
    states, labels, total = x.detach().requires_grad_(True), ids[0, 1:], 0.0
    rows = max(1, _LOGITS // model.config.padded_vocab_size)
    for at in range(0, len(labels), rows):  # what a token gives is its own affair from here on
        logits = head(model, model.transformer.ln_f(states[:, at : at + rows]))[0].float()
        loss = F.cross_entropy(logits, labels[at : at + rows], reduction="sum") / len(labels)
        (loss * factor).backward()
        total += loss.item()
    x.backward(states.grad)
    return total
