"""The super-network: an unmodified litgpt model, run at any of its sub-networks' sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from litgpt.model import do_softcapping
from torch import nn
from torch.utils.checkpoint import checkpoint

from whittle_nas.space.rules import check_supported
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.axes import split_layer
from whittle_nas.weights.info import SupernetInfo
from whittle_nas.weights.slicing import (
    Cut,
    SlicePlan,
    copied,
    plan_slices,
    slice_state_dict,
    take,
    view_of,
)

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
    """

    def __init__(
        self,
        model: Any,
        info: SupernetInfo | None = None,
        *,
        build: Callable[[Any], Any] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: a litgpt model.
            info: which layers go first; default: the order of the layers.
            build: makes the model of a config; needed only where `type(model)(config)` does not,
                for instance after a layer was replaced.
        """
        check_supported(model.config)
        self.model = model
        self.info = info or SupernetInfo.default(model.config)
        self.full = SubNetwork.from_config(model.config)
        self._build = build or type(model)
        self._skeletons: dict[Any, Any] = {}
        self._rope: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def config(self) -> Any:
        """The litgpt config of the whole model."""
        return self.model.config

    @property
    def tied(self) -> bool:
        """Whether head and token table are one parameter."""
        head = self.model.lm_head
        return getattr(head, "linear", head).weight is self.model.transformer.wte.weight

    def plan(self, sub: SubNetwork) -> SlicePlan:
        """The sub-network's config, layers and slices.

        Raises:
            ConfigError: if the sizes do not fit, naming each violated rule.
        """
        return plan_slices(
            sub,
            self.config,
            layer_order=self.info.layer_order,
            head_channels=self.info.head_channels,
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
        self._skeletons[key] = found  # the latest stands last
        if len(self._skeletons) > MAX_SKELETONS:
            del self._skeletons[next(iter(self._skeletons))]
        return found

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
        names = [name for name in tensors if _kept_name(name, plan) is not None]
        renamed = [str(_kept_name(name, plan)) for name in names]
        return slice_state_dict(plan, tensors, renamed)

    def standalone(self, sub: SubNetwork) -> Any:
        """The sub-network as an ordinary litgpt model for inference.

        Its parameters are views of the super-network's and everything litgpt has works: KV cache,
        `generate`, hooks. It is in evaluation mode and its parameters need no gradient.
        """
        plan = self.plan(sub)
        model = self._empty(plan)
        model.load_state_dict(self.slices(sub), strict=True, assign=True)
        return model.requires_grad_(False).eval()

    def _placement(self) -> tuple[Any, ...]:
        """What makes a skeleton stale: the model moved or changed its sequence length."""
        cos = self.model.cos
        return cos.device, cos.dtype, self.model.max_seq_length

    def _empty(self, plan: SlicePlan) -> Any:
        """A litgpt model on the meta device with real rotary tables."""
        with torch.device("meta"):
            model = self._build(plan.config)
        model.cos, model.sin = self._rotary_tables(model)
        # The setter would compute the tables again (on meta) if the lengths differed.
        model._max_seq_length = self.model.max_seq_length
        return model

    def _rotary_tables(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if model.config.rope_n_elem == self.config.rope_n_elem:
            return self.model.cos, self.model.sin
        key = (model.config.rope_n_elem, *self._placement())
        if key not in self._rope:
            model._max_seq_length = self.model.max_seq_length
            tables = model.rope_cache(device=self.model.cos.device)
            cos, sin = (table.to(self.model.cos.dtype) for table in tables)
            self._rope[key] = cos, sin
        return self._rope[key]

    def _make_skeleton(self, sub: SubNetwork, checkpoint_blocks: bool) -> Any:
        plan = self.plan(sub)
        model = self._empty(plan)
        cuts = _Cuts(plan, self.model.cos.device)
        model.lm_head = _Sliced(model.lm_head, self.model.lm_head, "lm_head", cuts)
        transformer, full = model.transformer, self.model.transformer
        transformer.wte = _Sliced(transformer.wte, full.wte, "transformer.wte", cuts)
        transformer.ln_f = _Sliced(transformer.ln_f, full.ln_f, "transformer.ln_f", cuts)
        for at, layer in enumerate(plan.layers):
            transformer.h[at] = _Sliced(
                transformer.h[at],
                full.h[layer],
                f"transformer.h.{at}",
                cuts,
                recompute=checkpoint_blocks,
            )
        return model


class _Cuts:
    """The cut of every kind of parameter, computed once for all layers."""

    def __init__(self, plan: SlicePlan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._known: dict[str, Cut] = {}

    def __call__(self, name: str) -> Cut:
        kind = split_layer(name)[1]
        if kind not in self._known:
            self._known[kind] = self._plan.cut(name, self._device)
        return self._known[kind]


class _Sliced(nn.Module):
    """One part of a skeleton (a block, the embedding, ...), run with slices of the full part.

    A call puts the slices into the skeleton and takes them out again. This is what
    `torch.func.functional_call` does; but that looks every parameter up by its dotted name twice
    per call, 38 us for a block with LoRA where this needs 3, a tenth of a short step.

    All of it sits inside the checkpointed function: recomputation in the backward pass must slice
    again, because by then the skeleton's own parameters are back on the meta device.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        source: nn.Module,
        prefix: str,
        cuts: Callable[[str], Cut],
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.skeleton = skeleton
        self.recompute = recompute
        # In a tuple, so that the full part is not registered as a child of the skeleton.
        self._source = (source,)
        homes = dict(skeleton.named_modules())
        self._slots = [
            _Slot(module._parameters, homes[path]._parameters, key, cuts(_join(prefix, path, key)))
            for path, module in source.named_modules()
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    def forward(self, *args: Any) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._call, *args, use_reentrant=False)
        return self._call(*args)

    def _call(self, *args: Any) -> torch.Tensor:
        source = self._source[0]
        if self.skeleton.training != source.training:
            self.skeleton.train(source.training)
        tracked = torch.is_grad_enabled()
        try:
            for slot in self._slots:
                slot.fill(tracked)
            return self.skeleton(*args)
        finally:
            for slot in self._slots:
                slot.empty()


class _Slot:
    """Where one parameter of a skeleton's part comes from and goes to.

    A view that no gradient flows through stays right until its tensor moves, so it is kept: most
    parameters are frozen or run without gradients, and making a view costs more than checking.
    What a gather copies is never kept.
    """

    __slots__ = ("cut", "full", "hole", "home", "key", "place", "seen", "view")

    def __init__(self, full: dict[str, Any], home: dict[str, Any], key: str, cut: Cut) -> None:
        self.full, self.home, self.key, self.cut = full, home, key, cut
        self.hole = home[key]
        self.seen: torch.Tensor | None = None
        self.place = 0
        self.view: Any = None

    def fill(self, tracked: bool) -> None:
        tensor = self.full[self.key]
        if tracked and tensor.requires_grad:
            self.home[self.key] = take(tensor, self.cut)
            return
        if self.seen is not tensor or self.place != tensor.data_ptr():
            self.seen, self.place = tensor, tensor.data_ptr()
            self.view = view_of(tensor.detach(), self.cut)
        self.home[self.key] = copied(self.view, self.cut) if self.cut.gathers else self.view

    def empty(self) -> None:
        self.home[self.key] = self.hole


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def without_head(model: Any) -> Any:
    """A second face of a litgpt model whose forward pass ends after the last norm.

    It shares all modules with `model`, which stays as it is.
    """
    twin = copy.copy(model)
    twin._modules = {**model._modules, "lm_head": nn.Identity()}
    twin.config = replace(model.config, final_logit_softcapping=None)
    return twin


def _kept_name(name: str, plan: SlicePlan) -> str | None:
    """The sub-network's name of a parameter of the super-network; None if its layer is dropped."""
    layer, rest = split_layer(name)
    if layer is None:
        return name
    if layer not in plan.layers:
        return None
    return f"transformer.h.{plan.layers.index(layer)}.{rest}"
