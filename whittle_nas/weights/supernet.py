"""The super-network: an unmodified litgpt model, run at any of its sub-networks' sizes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from litgpt.model import do_softcapping
from torch import nn

from whittle_nas.space.rules import check_supported
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.assembly import (
    Tables,
    give_tables,
    make_block,
    make_shell,
    needs_tables,
    rotary_tables,
    without_values,
)
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.patch import Patch, patched
from whittle_nas.weights.placement import home_of, run_on
from whittle_nas.weights.sharding import Sharding
from whittle_nas.weights.sliced import Sliced
from whittle_nas.weights.slicing import (
    BlockPlan,
    Cut,
    SlicePlan,
    check_forms,
    plan_slices,
    slice_state_dict,
)

MAX_BLOCKS = 2048
MAX_SKELETONS = 128  # a random sampler meets new shapes at every step of a long training


def positions_per_chunk(vocabulary: int, elements: int | None = None) -> int:
    """Positions at which the last layer runs at a time, so that few logits exist.

    By default 16 MiB of float32 logits: with 64 MiB a step on a CPU took up to 1.3 times as long.
    But at least the 128 positions of litgpt, because every chunk reads the whole matrix, and
    writes its gradient where it is trained.

    Args:
        vocabulary: V.
        elements: the largest number of logits instead.
    """
    return max(1, elements // vocabulary) if elements else max(128, 2**22 // vocabulary)


class SuperNetwork:
    """Sub-networks of one litgpt model, sharing its parameters.

    Attributes:
        model: `litgpt.GPT` or `litgpt.lora.GPT`, never modified.
        info: layer order and the rest of `supernet.yaml`.
        full: sizes of the model.
        rank: of the adapters that its sub-networks have; None for all, or where there are none.
        sharding: the units of a model that is shared out between processes, else None.
    """

    def __init__(
        self,
        model: Any,
        info: SupernetInfo | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: a litgpt model.
            info: which layers go first; default: the order of the layers.
        """
        check_supported(model.config)
        self.model = model
        self.info = info or SupernetInfo.default(model.config)
        self.full = SubNetwork.from_config(model.config)
        self._build = type(model)
        self._skeletons: dict[Any, Any] = {}
        self._blocks: dict[Any, Any] = {}
        self._rope: dict[Any, Tables] = {}
        self._by_rank: dict[int, SuperNetwork] = {}
        self.rank: int | None = None
        self.sharding: Sharding | None = None

    @property
    def config(self) -> Any:
        """The litgpt config of the whole model."""
        return self.model.config

    @property
    def tied(self) -> bool:
        """Whether head and token table are one parameter."""
        head = self.model.lm_head
        return getattr(head, "linear", head).weight is self.model.transformer.wte.weight

    def at_rank(self, rank: int | None) -> SuperNetwork:
        """The same parameters, of whose adapters only the first `rank` count; None for all.

        Rows of every A and columns of every B, so that smaller ranks are parts of larger ones.
        """
        if rank is None or rank == getattr(self.config, "lora_r", rank):
            return self
        if rank not in self._by_rank:
            face = copy.copy(self)
            face.rank, face._skeletons, face._blocks = rank, {}, {}
            self._by_rank[rank] = face
        return self._by_rank[rank]

    def plan(self, sub: SubNetwork) -> SlicePlan:
        """The sub-network's config, layers and slices.

        Raises:
            ConfigError: if the sizes do not fit, naming each violated rule.
        """
        info = self.info
        return plan_slices(
            sub, self.config, head_channels=info.head_channels, norms=info.norms, rank=self.rank
        )

    def subnet(
        self, sub: SubNetwork, *, hidden: bool = False, checkpoint_blocks: bool = False
    ) -> Any:
        """The sub-network as a litgpt model that takes its weights from the super-network.

        Every part is sliced when it is called, so gradients reach the super-network's parameters
        and no part keeps a copy. Use it like litgpt's: `(B, T)` token ids to `(B, T, V)` logits.
        For a KV cache take `standalone`.

        Args:
            sub: sizes.
            hidden: return the output of the last norm, `(B, T, n_embd)`; see `head`.
            checkpoint_blocks: recompute each block in the backward pass instead of keeping its
                activations.
        """
        key = (sub, hidden, checkpoint_blocks, *self._placement())
        found = self._skeletons.pop(key, None)
        if found is None and hidden:
            found = without_head(self.subnet(sub, checkpoint_blocks=checkpoint_blocks))
        elif found is None:
            # Tensors made in inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False):
                found = self._make_skeleton(sub, checkpoint_blocks)
        return _keep(self._skeletons, key, found, MAX_SKELETONS)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function that runs sub-networks, and `head` after it.

        With sharding all processes call it; see `Sharding.root`.
        """
        return function(*args) if self.sharding is None else self.sharding.root(function, *args)

    def rest(self) -> None:
        """Free what passes without gradients have left whole."""
        if self.sharding is not None:
            self.sharding.rest()

    def head(self, sub: SubNetwork) -> Callable[[torch.Tensor], torch.Tensor]:
        """The sub-network's last layer, hidden states `(..., n_embd)` to logits `(..., V)`."""
        model = self.subnet(sub)
        cap = model.config.final_logit_softcapping
        if cap is None:
            return model.lm_head
        return lambda hidden: do_softcapping(model.lm_head(hidden), cap)

    def slices(self, sub: SubNetwork) -> dict[str, torch.Tensor]:
        """The sub-network's state dict; views of the super-network's tensors where possible."""
        plan = self.plan(sub)
        tensors = self.model.state_dict()
        names = [name for name in map(plan.kept_name, tensors) if name is not None]
        return slice_state_dict(plan, tensors, [*names, *plan.maps()])

    def standalone(self, sub: SubNetwork, patch: Patch | None = None) -> Any:
        """The sub-network as an ordinary litgpt model for inference.

        Its parameters are views of the super-network's and everything litgpt has works: KV cache,
        `generate`, hooks. It is in evaluation mode and its parameters need no gradient.

        Args:
            sub: sizes.
            patch: what is special to it.
        """
        plan, patch = self.plan(sub), patch or Patch()
        check_forms(plan, patch.names())
        model = self._shell(plan)
        blocks = [self._block(plan, block, model) for block in plan.blocks]
        model.transformer.h = nn.ModuleList(blocks)
        tensors = dict(patched(self.slices(sub), patch))
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.requires_grad_(False).eval()

    def _placement(self) -> tuple[Any, ...]:
        """What makes a skeleton stale: the model moved or changed its sequence length."""
        cos = self.model.cos
        return cos.device, cos.dtype, self.model.max_seq_length

    def _shell(self, plan: SlicePlan) -> Any:
        """A litgpt model without its blocks on the meta device, with real rotary tables."""
        with without_values():
            model = make_shell(plan, self._build)
        model.cos, model.sin = self._rotary_tables(plan.config, self.model.max_seq_length)
        # The setter would compute the tables again (on meta) if the lengths differed.
        model._max_seq_length = self.model.max_seq_length
        _run_like(model.transformer.ln_f, self.model.transformer.ln_f)
        return model

    def _block(self, plan: SlicePlan, block: BlockPlan, shell: Any) -> Any:
        """litgpt's block on the meta device, with tables where its heads have another size."""
        with without_values():
            module = make_block(block, shell)
        full = self.model.transformer.h[block.layer]
        _run_like(module, full)
        if needs_tables(block, plan):
            tables = self._rotary_tables(block.config, self.config.block_size, home_of(full))
            give_tables(module, block, tables)
        return module

    def _rotary_tables(self, config: Any, length: int, home: torch.device | None = None) -> Tables:
        """cos and sin of a config's head size for `length` positions, on the device of a part."""
        like = self.model
        device = home or like.cos.device
        of_model = (self.config.rope_n_elem, like.max_seq_length, like.cos.device)
        if (config.rope_n_elem, length, device) == of_model:
            return like.cos, like.sin
        key = (config.rope_n_elem, length, device, *self._placement())
        if key not in self._rope:
            cos, sin = rotary_tables(config, device, length)
            self._rope[key] = cos.to(like.cos.dtype), sin.to(like.cos.dtype)
        return self._rope[key]

    def _make_skeleton(self, sub: SubNetwork, checkpoint_blocks: bool) -> Any:
        plan = self.plan(sub)
        check_forms(plan, ())
        model, cuts_on = self._shell(plan), cache(plan.cuts)
        cuts = cuts_on(self.model.cos.device)
        model.lm_head = Sliced(model.lm_head, self.model.lm_head, "lm_head", cuts)
        transformer, full = model.transformer, self.model.transformer
        transformer.wte = Sliced(transformer.wte, full.wte, "transformer.wte", cuts)
        transformer.ln_f = Sliced(transformer.ln_f, full.ln_f, "transformer.ln_f", cuts)
        make = partial(self._sliced_block, plan, model, cuts_on, checkpoint_blocks)
        transformer.h = nn.ModuleList(map(make, range(len(plan.blocks))))
        return model

    def _sliced_block(
        self,
        plan: SlicePlan,
        shell: Any,
        cuts_on: Callable[[torch.device], Callable[[str], Cut]],
        recompute: bool,
        at: int,
    ) -> Any:
        """One block of a skeleton; sub-networks that have it in common share it.

        A random sampler of per-layer sizes never draws a network twice, but the same blocks.
        """
        block, prefix = plan.blocks[at], f"transformer.h.{at}"
        sizes = (plan.sub.n_embd, block.shape, block.layer, plan.config.rope_n_elem)
        key = (*sizes, recompute, *self._placement())
        found = self._blocks.pop(key, None)
        if found is None:
            skeleton, full = self._block(plan, block, shell), self.model.transformer.h[block.layer]
            unit = partial(_unit, weakref.ref(self), block.layer)
            cuts = cuts_on(home_of(full) or self.model.cos.device)
            found = Sliced(skeleton, full, prefix, cuts, recompute=recompute, unit=unit)
        return _keep(self._blocks, key, found, MAX_BLOCKS)


def _unit(supernet: Callable[[], SuperNetwork | None], layer: int) -> Any:
    """What makes a block whole; a weak reference, since the super-network keeps the skeletons."""
    found = supernet()
    return None if found is None or found.sharding is None else found.sharding.blocks[layer]


def _run_like(module: Any, full: Any) -> None:
    """Let a part of a sub-network run on the device of the part that it is a slice of."""
    if (home := home_of(full)) is not None:
        run_on(module, home)


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int) -> Any:
    """Put a value last, and forget what was not used for longest."""
    kept[key] = value
    if len(kept) > most:
        del kept[next(iter(kept))]
    return value


def without_head(model: Any) -> Any:
    """A second face of a litgpt model whose forward pass ends after the last norm.

    It shares all modules with `model`, which stays as it is.
    """
    twin = copy.copy(model)
    twin._modules = {**model._modules, "lm_head": nn.Identity()}
    twin.config = replace(model.config, final_logit_softcapping=None)
    return twin
