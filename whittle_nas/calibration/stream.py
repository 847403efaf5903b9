"""The hidden states of all calibration text between two blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from whittle_nas.calibration.blocks import embed, run_block
from whittle_nas.calibration.statistics import Statistic
from whittle_nas.errors import ConfigError

Watch = Mapping[str, Statistic]  # module of the block -> what is kept of its input


class Stream:
    """Hidden states (B, T, D) of all batches, which go through a model block by block.

    Attributes:
        states: one tensor per batch, at the entry of the next block.
        device: where blocks run.
        dtype: number format of the states and of the blocks.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        *,
        batch_size: int = 4,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        home: torch.device | str = "cpu",
    ) -> None:
        """Embed the text.

        Args:
            model: `litgpt.GPT`; only its embedding and rotary tables are read.
            tokens: (N, T) token ids.
            batch_size: sequences per batch; the last one may be smaller.
            device: where blocks run.
            dtype: number format of the states; by default that of the model.
            home: where the states wait: a CPU may have room for them where a device has not.
        """
        self._model = model
        self.device, self._home = torch.device(device), torch.device(home)
        self.dtype = dtype or model.transformer.wte.weight.dtype
        with torch.no_grad():
            self.states = [
                embed(model, batch.to(model.transformer.wte.weight.device)).to(
                    device=self._home, dtype=self.dtype
                )
                for batch in tokens.split(batch_size)
                if len(batch)  # no text at all is one batch of none
            ]
        _check([x.isfinite().all() for x in self.states], "what the embedding gives is")

    def run(
        self,
        block: nn.Module,
        layer: int,
        *,
        watch: Watch | None = None,
        advance: bool = True,
        part: str | None = None,
    ) -> None:
        """Run a block over all batches.

        Args:
            block: called as litgpt's `Block`; on the device and in the number format of this.
            layer: whose place it has: which rotary table it reads, and its name in messages.
            watch: statistics of what enters its modules (`attn.proj`, ...), filled here.
            advance: let the outputs take the place of the states.
            part: `attn` or `mlp` where the block is only that, for messages.

        Raises:
            ConfigError: if a statistic or an output is not finite, naming the module.
        """
        name, finite = f"transformer.h.{layer}", []
        with torch.no_grad(), _watching(block, watch or {}):
            for at, state in enumerate(self.states):
                out = run_block(self._model, state.to(self.device), layer, block)
                finite.append(out.isfinite().all())
                if advance:
                    self.states[at] = out.to(self._home)
        for module, statistic in (watch or {}).items():
            if not statistic.finite():
                raise overflow(f"calibration statistics of {name}.{module} are")
        _check(finite, f"what {name}{f'.{part}' if part else ''} adds to the stream is")

    def move(self, device: torch.device) -> None:
        """Let the states wait, and blocks run, on another device."""
        self.device = self._home = device
        self.states = [x.to(device) for x in self.states]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the states (B, T, D) of every batch, for instance by a change of basis."""
        with torch.no_grad():
            self.states = [change(x.to(self.device)).to(self._home) for x in self.states]


def overflow(what: str) -> ConfigError:
    """What to say of activations that are not finite.

    Args:
        what: begins the sentence, with its verb.
    """
    return ConfigError(
        f"{what} not finite: use a dtype with more range (--dtype float32), or check that layer's "
        "weights"
    )


def _check(finite: list[Tensor], what: str) -> None:
    """Refuse batches that are not finite; flags (,) of all of them, for one transfer."""
    if finite and not torch.stack(finite).all():
        raise overflow(what)


@contextmanager
def _watching(block: nn.Module, watch: Watch) -> Iterator[None]:
    with ExitStack() as stack:
        for name, statistic in watch.items():
            hook = block.get_submodule(name).register_forward_pre_hook(_adding(statistic))
            stack.callback(hook.remove)
        yield


def _adding(statistic: Statistic) -> Callable[..., None]:
    return lambda _module, inputs: statistic.add(inputs[0].flatten(0, -2))
