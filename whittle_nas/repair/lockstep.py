"""The whole model's residual stream x and the sub-network's z, which go through text together.

Every matrix that writes into the stream is fitted again so that z follows the first channels of x,
and every matrix that reads a narrower stream so that it gives what it gave with all channels.
B sequences, T tokens, D and k channels of the whole and the narrow stream, C inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from whittle_nas.calibration import Stream, run_block
from whittle_nas.calibration.steps import Step, nats, steps, token_factor, watch_writers
from whittle_nas.errors import ConfigError
from whittle_nas.repair.least_squares import Choice, NormalEquations, best_step
from whittle_nas.repair.options import RepairOptions
from whittle_nas.space.subnetwork import SubNetwork
from whittle_nas.weights.patch import Patch
from whittle_nas.weights.placement import home_of
from whittle_nas.weights.slicing import SlicePlan

Equations = tuple[NormalEquations, NormalEquations]  # of text that is fitted, and held back
SEQUENTIAL, LOCAL, READER = "sequential", "local", "reader"


@dataclass(frozen=True)
class Pair:
    """A step of the sub-network beside the whole model's.

    Attributes:
        layer: id of the whole model's layer.
        at: place of the sub-network's.
        whole: the whole model's step, which may have a part that the sub-network lacks.
        narrow: the sub-network's.
        dropped: layers and steps of the whole model from here to the next pair.
    """

    layer: int
    at: int
    whole: Step
    narrow: Step
    dropped: list[tuple[int, Step]] = field(default_factory=list)


class Lockstep:
    """Both streams, and the sub-network while its weights change.

    Attributes:
        choices: what was chosen, by the name of a writer, or of the norm that readers read.
        most_inputs: columns of the largest least squares so far.
    """

    def __init__(
        self,
        supernet: Any,
        sub: SubNetwork,
        tokens: Tensor,
        options: RepairOptions,
        *,
        follow: bool = True,
    ) -> None:
        self._follow = follow
        self._full, self._model = supernet.model, supernet.standalone(sub)
        self._plan: SlicePlan = supernet.plan(sub)
        self._ridges = options.ridges
        self._device = self._full.lm_head.weight.device
        self._k, self._width = sub.n_embd, self._full.config.n_embd
        self._tied = supernet.tied
        size, self._fitted = options.split(len(tokens))
        self._targets = [batch[:, 1:].to(self._device) for batch in tokens.split(size)]
        ids = tokens[:, :-1]
        at_home = {"batch_size": size, "device": self._device, "home": self._device}
        self._x = Stream(self._full, ids, **at_home)
        self._z = Stream(self._model, ids, **at_home)
        self._changed: set[str] = set()
        self.most_inputs = 0
        self.choices: dict[str, Choice] = {}

    def tokens(self, *, held_back: bool) -> int:
        """How many tokens are held back, or fitted."""
        chosen = self._targets[self._fitted :] if held_back else self._targets[: self._fitted]
        return sum(targets.numel() for targets in chosen)

    def notes(self) -> tuple[str, ...]:
        """What the user may want to know."""
        found = []
        if self._tied and self._k < self._width:
            found.append("the head is the token table and stays as it is")
        if (fitted := self.tokens(held_back=False)) < self.most_inputs:
            found.append(
                f"repair fitted {fitted} calibration tokens to layers of {self.most_inputs} "
                "inputs, where only the ridge decides: more text would repair more"
            )
        if dead := [name for name, choice in self.choices.items() if choice.singular]:
            found.append(
                f"{', '.join(dead)} can't be fitted and stay as they are: their inputs are 0 on "
                "the calibration text"
            )
        return tuple(found)

    def patch(self) -> Patch:
        """The tensors that were changed, by the sub-network's names."""
        parameters = self._model.get_parameter
        return Patch({name: parameters(name).data for name in sorted(self._changed)})

    def plain_loss(self) -> float:
        """Loss of the sub-network as it is, on the text that is held back; before any repair."""
        states, self._z.states = self._z.states, self._z.states[self._fitted :]
        for at, block in enumerate(self._model.transformer.h):
            self._z.run(block, at)
        ends, self._z.states = self._z.states, states
        return self._loss(ends)

    def _loss(self, ends: Sequence[Tensor]) -> float:
        """Nats per held-back token, from what leaves the last block."""
        norm, targets = self._model.transformer.ln_f, self._targets[self._fitted :]
        total = sum(nats(self._model, norm(z), t) for z, t in zip(ends, targets, strict=True))
        return total / self.tokens(held_back=True)

    def pairs(self) -> list[Pair]:
        """All steps of the sub-network. The whole model's stream is brought to the first."""
        places = {layer: at for at, layer in enumerate(self._plan.layers)}
        found: list[Pair] = []
        for layer, block in enumerate(self._full.transformer.h):
            at = places.get(layer)
            narrow = [] if at is None else steps(self._model.transformer.h[at])
            for whole in steps(block):
                step = next((s for s in narrow if s.names() & whole.names()), None)
                if step is not None and at is not None:
                    found.append(Pair(layer, at, whole, step))
                elif found:
                    found[-1].dropped.append((layer, whole))
                else:
                    self._x.run(whole.module, layer)
        return found

    def repair(self, pair: Pair) -> None:
        """The readers, then the writers of one step. Both streams go to the next pair.

        Raises:
            ConfigError: if an activation is not finite.
        """
        self._move(home_of(pair.narrow.module))
        if self._k < self._width:
            for norm in dict.fromkeys(part.norm for part in pair.narrow.parts):
                self._repair_readers(pair, norm)
        own, outputs = self._whole_step(pair)
        for layer, step in pair.dropped:
            self._x.run(step.module, layer)
        self._repair_writers(pair, own, outputs)
        self._z.run(pair.narrow.module, pair.at)

    def _move(self, home: torch.device | None) -> None:
        """Both streams, and the sums over them, to where the next weights are."""
        if home is not None and home != self._device:
            self._device = home
            self._x.move(home)
            self._z.move(home)

    def _repair_readers(self, pair: Pair, norm: str) -> None:
        """All layers behind one norm: its D outputs are predicted from those of the narrow one."""
        names = [n for part in pair.narrow.parts if part.norm == norm for n in part.readers]
        linears = [pair.narrow.get(name) for name in names]
        choice = self._reader_choice(
            pair.whole.get(norm),
            pair.narrow.get(norm),
            bias=all(linear.bias is not None for linear in linears),
            name=f"transformer.h.{pair.at}.{norm}",
        )
        if choice.step is None:
            return
        for name, linear in zip(names, linears, strict=True):
            own = f"transformer.h.{pair.at}.{name}"
            rows = self._plan.indices(f"{own}.weight", self._device)[0]
            weight = _select(pair.whole.get(name).weight.mT, rows).mT  # kept rows, D columns
            self._change(own, linear, *_through(weight, choice.step, self._k))

    def _reader_choice(self, whole: Any, narrow: Any, *, bias: bool, name: str) -> Choice:
        """What to add to the truncation that takes a narrow norm's outputs for the whole one's."""
        fit, held = self._equations(self._k + bias, self._width)
        for batch, (x, z) in enumerate(zip(self._x.states, self._z.states, strict=True)):
            inputs = narrow(z)
            lost = whole(x) - nn.functional.pad(inputs, (0, self._width - self._k))
            _add((fit, held)[batch >= self._fitted], [inputs], lost, bias)
        return self._choose({READER: fit}, held, bias=bias, name=name)

    def _whole_step(self, pair: Pair) -> tuple[Equations, list[Tensor]]:
        """Take x through a step.

        Returns:
            The normal equations of the writers on the whole model's own activations, of fitted and
            of held-back text; and what the writers give in the whole model, one tensor per batch,
            if a norm stands behind them.
        """
        parts = pair.narrow.parts
        writers = [pair.narrow.get(part.writer) for part in parts]
        names = [f"transformer.h.{pair.at}.{part.writer}.weight" for part in parts]
        columns = [self._plan.indices(name, self._device)[1] for name in names]
        own = self._equations(_inputs(writers), self._k)
        loses = self._k < self._width or not _same_shapes(pair)  # else its own error is 0
        outputs: list[Tensor] = []
        with watch_writers(pair.whole) as seen:
            for batch, x in enumerate(self._x.states):
                self._x.states[batch] = run_block(self._full, x, pair.layer, pair.whole.module)
                wanted = _sum([seen.outputs[part.name][..., : self._k] for part in parts])
                if parts[0].post_norm:
                    outputs.append(wanted)
                if not loses:
                    continue
                kept = [
                    _select(seen.inputs[p.name], c) for p, c in zip(parts, columns, strict=True)
                ]
                given = _sum([writer(a) for writer, a in zip(writers, kept, strict=True)])
                scale = token_factor(pair.narrow, wanted, self._x.states[batch][..., : self._k])
                _add(own[batch >= self._fitted], kept, wanted - given, _biased(writers), scale)
        return own, outputs

    def _repair_writers(self, pair: Pair, own: Equations, outputs: list[Tensor]) -> None:
        """The layers that write into the stream, with one least squares where they do so at once.

        With a norm between writer and stream only the step's own output can be aimed at.
        """
        parts = pair.narrow.parts
        names = [f"transformer.h.{pair.at}.{part.writer}" for part in parts]
        writers = [pair.narrow.get(part.writer) for part in parts]
        name, biased = " + ".join(names), _biased(writers)
        fits, held = {LOCAL: own[0]}, own[1]
        if self._follow:
            fit, held = self._followed(pair, writers, outputs)
            fits = {SEQUENTIAL: fit, **fits}
        choice = self._choose(fits, held, bias=biased, name=name)
        if choice.step is None:
            return
        widths = [writer.in_features for writer in writers] + [1] * biased
        pieces = choice.step.split(widths, dim=1)
        for at, (full, writer) in enumerate(zip(names, writers, strict=True)):
            last = biased and at == len(writers) - 1  # one constant for all: it takes one bias
            self._change(full, writer, pieces[at], pieces[-1][:, 0] if last else None)

    def _followed(self, pair: Pair, writers: list[Any], outputs: list[Tensor]) -> Equations:
        """What z lacks of x behind a step, on inputs that the repaired blocks before it give."""
        parts, equations = pair.narrow.parts, self._equations(_inputs(writers), self._k)
        with watch_writers(pair.narrow) as seen:
            for batch, (x, z) in enumerate(zip(self._x.states, self._z.states, strict=True)):
                after = run_block(self._model, z, pair.at, pair.narrow.module)
                if parts[0].post_norm:
                    wanted = outputs[batch] - seen.outputs[parts[0].name]
                else:
                    wanted = x[..., : self._k] - after
                inputs = [seen.inputs[part.name] for part in parts]
                scale = token_factor(
                    pair.narrow, outputs[batch] if outputs else x, x[..., : self._k]
                )
                _add(equations[batch >= self._fitted], inputs, wanted, _biased(writers), scale)
        return equations

    def repair_head(self) -> float:
        """The head, unless it is the token table.

        Returns:
            Loss of the repaired sub-network on the text that is held back.
        """
        self._move(home_of(self._model.transformer.ln_f))
        held_back = self._z.states[self._fitted :]
        loss = self._loss(held_back)
        if self._tied or self._k == self._width:
            return loss
        head, norms = self._model.lm_head, (m.transformer.ln_f for m in (self._full, self._model))
        bias = head.bias is not None
        choice = self._reader_choice(*norms, bias=bias, name="transformer.ln_f")
        if choice.step is None:
            return loss
        before = dict(head.named_parameters())
        weight = self._full.lm_head.weight
        self._change("lm_head", head, *_through(weight, choice.step, self._k))
        repaired = self._loss(held_back)
        if repaired < loss:
            return repaired
        for name, parameter in before.items():
            setattr(head, name, parameter)
            self._changed.discard(f"lm_head.{name}")
        return loss

    def _equations(self, inputs: int, outputs: int) -> Equations:
        """Empty ones, for tokens to fit and tokens that are held back."""
        self.most_inputs = max(self.most_inputs, inputs)
        size = {"tokens": self.tokens(held_back=False), "device": self._device}
        fit, held = (NormalEquations.zeros(inputs, outputs, **size) for _ in range(2))
        return fit, held

    def _choose(
        self,
        fits: dict[str, NormalEquations],
        held: NormalEquations,
        *,
        bias: bool,
        name: str,
    ) -> Choice:
        if not all(equations.finite() for equations in (*fits.values(), held)):
            raise ConfigError(
                f"repair: activations at {name} are not finite on the calibration text: use a "
                "dtype with more range (--dtype float32), or check that layer's weights"
            )
        self.choices[name] = best_step(fits, held, ridges=self._ridges, free=int(bias))
        return self.choices[name]

    def _change(self, name: str, linear: Any, weight: Tensor, bias: Tensor | None = None) -> None:
        """Add to a layer of the sub-network, whose tensors may be views of the whole model's."""
        for kind, change in (("weight", weight), ("bias", bias)):
            if change is not None:
                old = getattr(linear, kind)
                new = (old.double() + change).to(old.dtype)
                setattr(linear, kind, nn.Parameter(new, requires_grad=False))
                self._changed.add(f"{name}.{kind}")


def _same_shapes(pair: Pair) -> bool:
    """Whether a step keeps all that the whole model's has."""
    names = [n for part in pair.narrow.parts for n in (*part.readers, part.writer)]
    found = [(pair.whole.get(n).weight.shape, pair.narrow.get(n).weight.shape) for n in names]
    return pair.whole.names() == pair.narrow.names() and all(a == b for a, b in found)


def _select(activations: Tensor, entries: int | Tensor | None) -> Tensor:
    """Entries of the last dimension: the first ones, these ones, or all."""
    if entries is None:
        return activations
    if isinstance(entries, int):
        return activations[..., :entries]
    return activations.index_select(-1, entries)


def _add(
    equations: NormalEquations,
    inputs: list[Tensor],
    errors: Tensor,
    bias: bool,
    scale: Tensor | float = 1.0,
) -> None:
    """Tokens of one batch, (B, T, C) each, times a factor (B, T, 1).

    The bias is one more input, which is always 1.
    """
    ones = [torch.ones_like(inputs[0][..., :1])] if bias else []
    scaled = torch.cat([*inputs, *ones], -1) * scale
    equations.add(scaled.flatten(0, 1), (errors * scale).flatten(0, 1))


def _through(weight: Tensor, step: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """What a change of a layer's inputs does to the layer.

    Args:
        weight: (R, D) of the layer.
        step: (D, k), or (D, k + 1) with the change of a constant.
        k: inputs that the narrow layer has.

    Returns:
        Changes of the weight (R, k) and of the bias (R,).
    """
    change = weight.double() @ step
    return change[:, :k], change[:, k] if step.shape[1] > k else None


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _biased(writers: Sequence[Any]) -> bool:
    return all(writer.bias is not None for writer in writers)


def _inputs(writers: Sequence[Any]) -> int:
    """Columns of the least squares: all inputs of all writers, and 1 for a bias."""
    return sum(writer.in_features for writer in writers) + _biased(writers)
