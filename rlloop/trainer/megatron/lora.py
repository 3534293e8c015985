"""Megatron's parallel linear layers with a place for a LoRA adapter, as one autograd function.

The adapter's products are accumulated into those of the frozen weight, and no adapter needs a collective of its own. With
tensor parallelism over ranks i, and s = alpha / rank:

    column   y_i = x W_i^T + (x A^T) (s B_i)^T          A whole on every rank, B cut like W
    row      y = sum_i [x_i W_i^T + (x_i A_i^T) (s B)^T]      A cut like W, B whole on every rank

Both sums over ranks (of y, and backward of dx) are the ones that the layer has anyway. The gradient of what is whole on
every rank comes out as one summand a rank; `Adapter.reduce_gradient` adds them up once an optimizer step.

Projections that Megatron fuses (q, k, v; gate, up) keep an A each, stacked, and the rows of B that belong to another
projection's A are zero: that is PEFT's LoRA, in the same two products.

Gradients of A and B do not go through autograd: they are added to fp32 buffers, so many microbatches lose nothing, and
the base's dtype serves the products. Shapes: T tokens, I / O features in and out (of this rank), R stacked rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlloop.trainer.megatron import compat  # noqa: F401  (before anything under megatron)

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear  # isort: skip


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One layer's share of the adapter that is active."""

    a: Tensor
    """[R, I] in the base's dtype."""
    scaled_b: Tensor
    """[O, R] in the base's dtype, times s."""
    a_gradient: Tensor
    """[R, I] fp32; the backward pass adds to it."""
    b_gradient: Tensor
    """[O, R] fp32, of s B."""
    dropout: float
    """Of what A is multiplied with, in training."""
    gain: Tensor | None
    """[O] in the base's dtype, of DoRA: y is multiplied with it before the bias is added."""
    gain_gradient: Tensor | None
    """[O] fp32; the backward pass adds to it."""


class _Product(torch.autograd.Function):
    """x [T, I] -> [T, O]. Under sequence parallelism a column layer gets, and a row layer gives, T / ranks.

    Where W lies beside B or A in one buffer (see `LoraLinear`), one product serves both."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: LoraLinear, lora: LoraWeights, bias: Tensor | None, dropout: float
    ) -> Tensor:
        whole = _gather(x, layer) if layer.is_column and layer.sequence_parallel else x
        is_partial = not layer.is_column and layer.tp_group.size() > 1
        own_bias = None if is_partial else bias
        sampled, ctx.kept = torch.native_dropout(whole, dropout, True) if dropout else (whole, None)
        h = sampled @ lora.a.t()
        if layer.w_and_b is not None:
            y = _linear(torch.cat([whole, h], dim=1), layer.w_and_b, own_bias)
        else:
            y = _linear(whole, layer.weight, own_bias).addmm_(h, lora.scaled_b.t())
        ctx.save_for_backward(sampled if dropout else x, h)
        ctx.layer, ctx.lora, ctx.dropout = layer, lora, dropout
        if not is_partial:
            return y
        y = _reduce(y, layer)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, h = ctx.saved_tensors
        layer, lora = ctx.layer, ctx.lora
        if not layer.is_column and layer.sequence_parallel:
            dy = _gather(dy, layer)
        _accumulate(lora.b_gradient, dy, h)
        if layer.w_and_b is not None:
            num_inputs = layer.weight.shape[1]
            both = dy @ layer.w_and_b
            dh = both[:, num_inputs:]
            dx = both[:, :num_inputs]
        else:
            dh = dy @ lora.scaled_b
            if layer.w_and_a is not None and not ctx.dropout:
                dx = torch.cat([dy, dh], dim=1) @ layer.w_and_a
            else:
                dx = dy @ layer.weight
        if ctx.dropout:
            dx = torch.addcmul(dx, dh @ lora.a, ctx.kept.to(dx.dtype), value=1 / (1 - ctx.dropout))
        elif layer.w_and_a is None:
            dx.addmm_(dh, lora.a)
        if layer.is_column:
            dx = _reduce(dx, layer)
            if layer.sequence_parallel and not ctx.dropout:
                dh = _reduce(dh, layer)  # x is this rank's tokens
        _accumulate(lora.a_gradient, dh, x)
        return dx, None, None, None, None


class _Scaled(torch.autograd.Function):
    """y [T, O] -> y * gain, DoRA's; the norm in it counts as a constant (Liu et al. 2024, section 4.3)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, layer: LoraLinear, lora: LoraWeights) -> Tensor:
        assert lora.gain is not None
        ctx.save_for_backward(y)
        ctx.layer, ctx.lora = layer, lora
        return y * lora.gain

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        layer, lora = ctx.layer, ctx.lora
        # Of a row layer every rank has all of y, unless each has its own tokens.
        if layer.is_column or layer.sequence_parallel or layer.tp_group.rank() == 0:
            lora.gain_gradient.add_((dy.float() * y.float()).sum(0))
        return dy * lora.gain, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _accumulate(gradient: Tensor, left: Tensor, right: Tensor) -> None:
    """gradient [P, Q] += left [T, P]^T right [T, Q], summed in fp32."""
    if left.dtype == gradient.dtype:
        gradient.addmm_(left.t(), right)
    elif left.is_cuda:
        torch.addmm(gradient, left.t(), right, out_dtype=gradient.dtype, out=gradient)
    else:  # a CPU's product has no other type than its factors
        gradient.add_(left.t() @ right)


def _gather(tokens: Tensor, layer: LoraLinear) -> Tensor:
    whole = tokens.new_empty(len(tokens) * layer.tp_group.size(), tokens.shape[1])
    dist.all_gather_into_tensor(whole, tokens.contiguous(), group=layer.tp_group)
    return whole


def _reduce(partial: Tensor, layer: LoraLinear) -> Tensor:
    if layer.tp_group.size() == 1:
        return partial
    if not layer.sequence_parallel:
        partial = partial.contiguous()
        dist.all_reduce(partial, group=layer.tp_group)
        return partial
    mine = partial.new_empty(len(partial) // layer.tp_group.size(), partial.shape[1])
    dist.reduce_scatter_tensor(mine, partial.contiguous(), group=layer.tp_group)
    return mine


class LoraLinear:
    """Mixed into a parallel linear layer of Megatron's."""

    is_column: bool
    weight: Tensor
    bias: Tensor | None
    tp_group: Any
    sequence_parallel: bool
    skip_bias_add: bool
    weights_moved: ClassVar[int] = 0
    """Times that a layer's weight got another place in memory, which a CUDA graph must know."""
    is_training: ClassVar[bool] = False
    """Whether what runs is followed by a backward pass. Not to be told by autograd: with gradient checkpointing layers first run
    without it, and must drop the same inputs then."""
    lora: LoraWeights | None = None
    """The active adapter's; None: the base model."""
    w_and_b: Tensor | None = None
    """[O, I + R], W and s B in one buffer: on a GPU, of layers more than twice as wide in O as in I. Forward and backward,
    it spares a pass over the larger activation."""
    w_and_a: Tensor | None = None
    """[O + R, I], likewise W and A, where I is the larger; for the backward pass."""
    _buffer: Tensor | None = None
    """Of either, with room for the largest R so far."""

    def set_lora(self, lora: LoraWeights | None) -> list[tuple[Tensor, Tensor]]:
        """Make an adapter's weights, or none, the layer's; -> (to, from) of the copies that are due now and after each
        change of the adapter."""
        self.lora, self.w_and_a, self.w_and_b = lora, None, None
        num_outputs, num_inputs = self.weight.shape
        if lora is None or not self.weight.is_cuda or max(num_outputs, num_inputs) <= 2 * min(num_outputs, num_inputs):
            return []
        rank = len(lora.a)
        buffer = self._make_room(rank)
        if num_outputs > num_inputs:
            self.w_and_b = buffer[:, : num_inputs + rank]
            return [(self.w_and_b[:, num_inputs:], lora.scaled_b)]
        self.w_and_a = buffer[: num_outputs + rank]
        return [(self.w_and_a[num_outputs:], lora.a)]

    def product(self, x: Tensor) -> Tensor:
        """[T, I] -> [T, O], the bias added."""
        if self.lora is None:
            y, bias = super().forward(x[:, None])  # type: ignore[misc]
            y = y[:, 0]
            return y if bias is None else y + bias
        return self._adapted(x, self.bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron's interface: [tokens, batch, I] -> [tokens, batch, O], and the bias where the caller adds it."""
        if self.lora is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        own_bias, left_bias = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        return self._adapted(x.flatten(0, 1), own_bias).unflatten(0, (-1, x.shape[1])), left_bias

    def _adapted(self, x: Tensor, bias: Tensor | None) -> Tensor:
        lora = self.lora
        assert lora is not None
        dropout = lora.dropout if self.is_training else 0.0
        if lora.gain is None:
            y: Tensor = _Product.apply(x, self, lora, bias, dropout)
            return y
        y = _Scaled.apply(_Product.apply(x, self, lora, None, dropout), self, lora)
        return y if bias is None else y + bias

    def move_back(self) -> None:
        """The weight into memory of its own, as `set_lora` found it."""
        if self._buffer is not None:
            self.weight.data = self.weight.data.contiguous()
            self._buffer = self.w_and_a = self.w_and_b = None
            LoraLinear.weights_moved += 1

    def _make_room(self, rank: int) -> Tensor:
        """Move the weight, in place, into a buffer with room for the adapter."""
        num_outputs, num_inputs = self.weight.shape
        shape = (num_outputs, num_inputs + rank) if num_outputs > num_inputs else (num_outputs + rank, num_inputs)
        if self._buffer is None or self._buffer.numel() < shape[0] * shape[1]:
            self._buffer = self.weight.new_empty(shape)
            self._buffer[:num_outputs, :num_inputs].copy_(self.weight.data)
            self.weight.data = self._buffer[:num_outputs, :num_inputs]
            LoraLinear.weights_moved += 1
        return self._buffer


class LoraColumnLinear(LoraLinear, ColumnParallelLinear):
    """W cut by outputs."""

    is_column = True


class LoraRowLinear(LoraLinear, RowParallelLinear):
    """W cut by inputs."""

    is_column = False
