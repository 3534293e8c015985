"""One named LoRA adapter of a Megatron model: this rank's share of its weights, gradients and optimizer, in flat buffers.

Flat (see `slots`), because then a step, a sum over ranks and an export are a few operations however many layers there are.
Data-parallel ranks hold one slice each of the fp32 weights and of AdamW's moments (ZeRO-1, Rajbhandari et al. 2020), and all of
the rest.

m are DoRA's magnitudes: y = m / |W + s B A| (W + s B A) x, with the norm of each row.

Shapes: r rank of the adapter, R stacked rank of a layer, n parameters of this rank, filled up to a multiple of the slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlloop.recorded import Recorded
from rlloop.trainer import Head
from rlloop.trainer.adapter_files import MOMENTS, VALUE_HEAD, initial_a
from rlloop.trainer.head import token_values
from rlloop.trainer.megatron.lora import LoraWeights
from rlloop.trainer.megatron.parallel import Groups
from rlloop.trainer.megatron.slots import AdaptableLayer, Projection, Slot, lay_out
from rlloop.types import AdamConfig, LoraConfig


class _Values(torch.autograd.Function):
    """`token_values` of hidden [N, C] by the weights [C + 1] of a head, whose gradient is added to a buffer, if to any."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, gradient: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weights)
        ctx.gradient = gradient
        return token_values(hidden, weights[None, :-1], weights[-1:])

    @staticmethod
    def backward(ctx: Any, d_values: Tensor) -> tuple[Tensor, None, None]:
        hidden, weights = ctx.saved_tensors
        if ctx.gradient is not None:
            ctx.gradient[:-1].addmv_(hidden.float().t(), d_values)
            ctx.gradient[-1].add_(d_values.sum())
        return torch.outer(d_values, weights[:-1]).to(hidden.dtype), None, None


class Adapter:
    """A is drawn by parameter name, B is zero, and so is a value head. `hidden_size`: C of the model."""

    def __init__(
        self,
        lora: LoraConfig,
        head: Head,
        layers: Sequence[AdaptableLayer],
        hidden_size: int,
        groups: Groups,
        dtype: torch.dtype,
    ) -> None:
        self.lora = lora
        self.head = head
        self.loss_was_finite = True
        """Of all that is in the gradient."""
        self._groups = groups
        self._scale = lora.alpha / lora.rank
        num_head = hidden_size + 1 if head == "value" and groups.is_last_stage else 0
        layout = lay_out(lora, layers, groups.tp_size, num_head)
        self._slots, self._num_whole, self._b_slices = layout.slots, layout.num_whole, layout.b_slices
        self._norms: list[Tensor] = []
        """Of each slot, for DoRA: those of the rows of W + s B A."""
        num_slices, device = groups.dp_size, groups.device
        self._n = -(-layout.num_parameters // num_slices) * num_slices
        self._gradient = torch.zeros(self._n, device=device)
        self._weights = torch.empty(self._n, device=device, dtype=dtype)
        self._head_weights = torch.empty(num_head, device=device)
        """In fp32: values are sums over all of C, and what a bf16 one rounds off is as large as an advantage."""
        self._mask = self._own_entries()
        self._master = torch.nn.Parameter(torch.zeros(self._n // num_slices, device=device))
        self._exported = Recorded[dict[str, Tensor]](device)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._optimizer = torch.optim.AdamW([self._master], fused=True)
        shapes = dict(self._shapes())
        self._shapes_of_stages: list[dict[str, tuple[int, ...]]] = [{}] * groups.pp_size
        dist.all_gather_object(self._shapes_of_stages, shapes, group=groups.pp)
        initial = {
            name: initial_a(name, lora.seed, shape) if ".lora_A." in name else torch.zeros(shape)
            for name, shape in shapes.items()
        }
        self.load(initial, {})
        if lora.dora:
            self._take_norms_as_magnitudes()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole adapter, by PEFT's names."""
        return {name: shape for shapes in self._shapes_of_stages for name, shape in shapes.items()}

    def activate(self, layers: Sequence[AdaptableLayer]) -> None:
        """Make it the adapter of the model."""
        weights = {slot.layer: self._layer_weights(slot) for slot in self._slots}
        self._copies = [pair for adaptable in layers for pair in adaptable.layer.set_lora(weights.get(adaptable.layer))]
        self._copy()

    def deactivate(self) -> None:
        """Another one, or none, is the adapter of the model."""
        self._copies = []

    def values(self, hidden: Tensor) -> Tensor:
        """Of a value adapter, on the last stage: hidden states [N, C] -> [N] in fp32."""
        gradient = self._gradient[: len(self._head_weights)]
        # Tensor-parallel ranks all have the same hidden states: one of them counts.
        values: Tensor = _Values.apply(hidden, self._head_weights, gradient if self._groups.tp_rank == 0 else None)
        return values

    def discard_gradient(self) -> None:
        """Of all microbatches since the last step."""
        self._gradient.zero_()
        self.loss_was_finite = True

    @torch.no_grad()
    def reduce_gradient(self) -> float:
        """Sum it over the ranks; -> its norm over the whole adapter."""
        groups = self._groups
        for b in self._b_slices:
            self._gradient[b].mul_(self._scale)  # from that of s B
        for slot, norm in zip(self._slots, self._norms, strict=False):  # none but for DoRA
            self._gradient[slot.m].div_(norm)  # from that of m / norm
        if self._mask is not None:
            self._gradient.mul_(self._mask)
        if groups.dp_size > 1:
            dist.all_reduce(self._gradient, group=groups.dp)
        whole, cut = self._gradient[: self._num_whole], self._gradient[self._num_whole :]
        if self._num_whole:
            dist.all_reduce(whole, group=groups.tp)
        square = cut.square().sum()
        if groups.tp_rank == 0:
            square += whole.square().sum()
        if groups.model.size() > 1:
            dist.all_reduce(square, group=groups.model)
        total = float(square)
        return math.sqrt(total) if math.isfinite(total) else math.nan

    @torch.no_grad()
    def step(self, adam: AdamConfig, grad_norm: float) -> None:
        """Clip the gradient, which `reduce_gradient` has summed, and step."""
        self._gradient.mul_(min(1.0, adam.max_grad_norm / (grad_norm + 1e-6)))
        self._master.grad = self._slice(self._gradient)
        for group in self._optimizer.param_groups:
            group.update(lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=adam.weight_decay)
        self._optimizer.step()
        self._master.grad = None
        self._refresh()

    def export(self) -> dict[str, Tensor]:
        """The whole adapter on rank 0 in fp32, by PEFT's names; elsewhere {}. Every rank must call it. What it returns changes
        with the next step or call."""
        if dist.get_world_size() == 1:
            return self._exported(lambda: self._export(self._master.detach()))
        return self._export(self._join(self._master.detach()))

    def export_moments(self) -> dict[str, Tensor]:
        """As `export`, AdamW's state: `<name>.<moment>`; {} before the first step."""
        state = self._optimizer.state.get(self._master)
        if not state:
            return {}
        *tensors, step = MOMENTS
        moments = {
            f"{name}.{moment}": tensor
            for moment in tensors
            for name, tensor in self._export(self._join(state[moment])).items()
        }
        names = self.shapes if self._groups.rank == 0 else ()
        return moments | {f"{name}.{step}": state[step].clone() for name in names}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Take this rank's share of an adapter given whole (names of other stages are passed over)."""
        self._master.copy_(self._slice(self._import(weights)))
        self._optimizer.state.clear()
        *tensors, step = MOMENTS
        if moments:
            state = {
                moment: self._slice(
                    self._import({name: moments[f"{name}.{moment}"] for name, _ in self._shapes()})
                ).clone()
                for moment in tensors
            }
            steps = next(value for name, value in moments.items() if name.endswith(f".{step}"))
            self._optimizer.state[self._master] = state | {step: steps.to(self._master.device)}
        self._refresh()

    def _layer_weights(self, slot: Slot) -> LoraWeights:
        return LoraWeights(
            a=self._weights[slot.a].view(slot.a_shape),
            scaled_b=self._weights[slot.b].view(slot.b_shape),
            a_gradient=self._gradient[slot.a].view(slot.a_shape),
            b_gradient=self._gradient[slot.b].view(slot.b_shape),
            dropout=self.lora.dropout,
            gain=self._weights[slot.m] if self.lora.dora else None,
            gain_gradient=self._gradient[slot.m] if self.lora.dora else None,
        )

    def _refresh(self) -> None:
        """The weights that the layers compute with, from the fp32 ones; B times s in fp32, as an engine gets it."""
        whole = self._join(self._master.detach())
        if self._groups.dp_size == 1:
            whole = whole.clone()
        for b in self._b_slices:
            whole[b].mul_(self._scale)
        self._weights.copy_(whole)
        self._head_weights.copy_(whole[: len(self._head_weights)])
        if self.lora.dora:
            self._norms = [self._measure_norm(slot) for slot in self._slots]
            for slot, norm in zip(self._slots, self._norms, strict=True):
                gain = whole[slot.m] / norm
                if self._mask is not None:
                    gain = gain.where(self._mask[slot.m], 1)
                self._weights[slot.m] = gain.to(self._weights.dtype)
        self._copy()

    def _measure_norm(self, slot: Slot) -> Tensor:
        a, b = self._weights[slot.a].view(slot.a_shape), self._weights[slot.b].view(slot.b_shape)
        squares = torch.addmm(slot.layer.weight, b, a).float().square().sum(1)
        if not slot.layer.is_column and self._groups.tp_size > 1:
            dist.all_reduce(squares, group=self._groups.tp)
        return squares.sqrt()

    @torch.no_grad()
    def _take_norms_as_magnitudes(self) -> None:
        """While B is zero: the model is the base."""
        flat = self._join(self._master.detach()).clone()
        for slot, norm in zip(self._slots, self._norms, strict=True):
            flat[slot.m] = norm
        if self._mask is not None:
            flat.mul_(self._mask)
        self._master.copy_(self._slice(flat))
        self._refresh()

    def _copy(self) -> None:
        """What layers keep beside their own weights."""
        if self._copies:
            targets, sources = zip(*self._copies, strict=True)
            torch._foreach_copy_(targets, sources)

    def _slice(self, flat: Tensor) -> Tensor:
        """[n] -> this data-parallel rank's part."""
        return flat.chunk(self._groups.dp_size)[self._groups.dp_rank]

    def _join(self, part: Tensor) -> Tensor:
        """A data-parallel rank's part -> [n]"""
        if self._groups.dp_size == 1:
            return part
        flat = part.new_empty(self._n)
        dist.all_gather_into_tensor(flat, part.contiguous(), group=self._groups.dp)
        return flat

    def _own_entries(self) -> Tensor | None:
        """[n] false where a row of B belongs to no projection, or to one that has another A; None where there is none."""
        mask = torch.ones(self._n, device=self._groups.device, dtype=torch.bool)
        for slot in self._slots:
            b = mask[slot.b].view(slot.b_shape)
            b.fill_(False)
            mask[slot.m] = False
            for projection, columns in self._columns(slot):
                b[projection.own_rows, columns] = True
                if self.lora.dora:
                    mask[slot.m][projection.own_rows] = True
        return None if bool(mask.all()) else mask

    def _columns(self, slot: Slot) -> Iterator[tuple[Projection, slice]]:
        rank = self.lora.rank
        for index, projection in enumerate(slot.projections):
            yield projection, slice(index * rank, (index + 1) * rank)

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of this stage's part, over all tensor-parallel ranks."""
        tp = self._groups.tp_size
        if num_head := len(self._head_weights):
            yield from zip(VALUE_HEAD, ((1, num_head - 1), (1,)), strict=True)
        for slot in self._slots:
            (_, num_inputs), (num_outputs, _) = slot.a_shape, slot.b_shape
            for projection in slot.projections:
                rows = num_outputs if projection.rows is None else len(projection.rows)
                is_column = slot.layer.is_column
                yield f"{projection.name}.lora_A.weight", (self.lora.rank, num_inputs * (1 if is_column else tp))
                whole_rows = rows * (tp if is_column else 1)
                yield f"{projection.name}.lora_B.weight", (whole_rows, self.lora.rank)
                if self.lora.dora:
                    yield f"{projection.name}.lora_magnitude_vector", (whole_rows,)

    def _export(self, flat: Tensor) -> dict[str, Tensor]:
        """[n] of every rank -> all of it by PEFT's names on rank 0."""
        groups = self._groups
        flats = [flat]
        if groups.tp_size > 1:
            flats = list(flat.new_empty(groups.tp_size, self._n).unbind())
            dist.all_gather(flats, flat, group=groups.tp)
        mine = dict(self._name(flats)) if groups.tp_rank == 0 and groups.dp_rank == 0 else {}
        if groups.pp_size == 1 or not mine:
            return mine if groups.rank == 0 else {}
        if groups.pp_rank > 0:
            dist.send(torch.cat([tensor.flatten() for tensor in mine.values()]), groups.first_stage, group=groups.pp)
            return {}
        for stage in range(1, groups.pp_size):
            shapes = self._shapes_of_stages[stage]
            sizes = [math.prod(shape) for shape in shapes.values()]
            received = flat.new_empty(sum(sizes))
            dist.recv(received, dist.get_global_rank(groups.pp, stage), group=groups.pp)
            for (name, shape), part in zip(shapes.items(), received.split(sizes), strict=True):
                mine[name] = part.view(shape)
        return mine

    def _name(self, flats: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """[n] of each tensor-parallel rank -> this stage's tensors, in the order of `_shapes`."""
        if num_head := len(self._head_weights):
            yield from zip(VALUE_HEAD, (flats[0][None, : num_head - 1], flats[0][num_head - 1 : num_head]), strict=True)
        for slot in self._slots:
            a_parts = [flat[slot.a].view(slot.a_shape) for flat in flats]
            b_parts = [flat[slot.b].view(slot.b_shape) for flat in flats]
            m_parts = [flat[slot.m] for flat in flats]
            is_column = slot.layer.is_column
            a = a_parts[0] if is_column else torch.cat(a_parts, dim=1)
            for projection, columns in self._columns(slot):
                b = [part[:, columns] for part in (b_parts if is_column else b_parts[:1])]
                if projection.rows is not None:
                    b = [part.index_select(0, projection.rows) for part in b]
                yield f"{projection.name}.lora_A.weight", a[columns]
                yield f"{projection.name}.lora_B.weight", b[0] if len(b) == 1 else torch.cat(b)
                if self.lora.dora:
                    m = [part[projection.own_rows] for part in (m_parts if is_column else m_parts[:1])]
                    yield f"{projection.name}.lora_magnitude_vector", torch.cat(m)

    def _import(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors by PEFT's names, whole -> [n]"""
        flat = torch.zeros_like(self._gradient)
        tp, rank = self._groups.tp_size, self._groups.tp_rank
        if num_head := len(self._head_weights):
            flat[:num_head] = torch.cat([tensors[name].flatten() for name in VALUE_HEAD]).to(flat)
        for slot in self._slots:
            a, b = flat[slot.a].view(slot.a_shape), flat[slot.b].view(slot.b_shape)
            for projection, columns in self._columns(slot):
                whole_a = tensors[f"{projection.name}.lora_A.weight"]
                whole_b = tensors[f"{projection.name}.lora_B.weight"]
                whole_m = tensors[f"{projection.name}.lora_magnitude_vector"] if self.lora.dora else None
                if slot.layer.is_column:
                    whole_b = whole_b.chunk(tp)[rank]
                    whole_m = None if whole_m is None else whole_m.chunk(tp)[rank]
                else:
                    whole_a = whole_a.chunk(tp, dim=1)[rank]
                a[columns] = whole_a.to(flat)
                b[projection.own_rows, columns] = whole_b.to(flat)
                if whole_m is not None:
                    flat[slot.m][projection.own_rows] = whole_m.to(flat)
        return flat
