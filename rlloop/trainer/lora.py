"""PEFT's LoRA layer with fused products, for a frozen base.

PEFT runs `W x`, `A x`, `B (A x)`, the scaling and the sum as separate operations on [T, out], in the adapter's fp32 when
the base is bf16 (on a CPU, fp32 products are several times slower). Here the low-rank product is accumulated into the
output of W, and backward into the gradient of x, in the base's dtype; A and B stay fp32, and so do their gradients.

Shapes: T tokens, I / O features in and out, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn


class _LoraProduct(torch.autograd.Function):
    """x [T, I], weight [O, I] and bias [O] frozen, a [r, I], b [O, r] -> W x + bias + scale * B A x: [T, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
        shrunk = x @ low_a.t()
        ctx.save_for_backward(x, shrunk, weight, low_a, low_b)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(shrunk, low_b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x, shrunk, weight, a, b = ctx.saved_tensors
        d_shrunk = (d_y @ b).mul_(ctx.scale)
        d_x = (d_y @ weight).addmm_(d_shrunk, a) if ctx.needs_input_grad[0] else None
        d_a = (d_shrunk.t() @ x).float()
        d_b = (d_y.t() @ shrunk).float().mul_(ctx.scale)
        return d_x, None, None, d_a, d_b, None


class FusedLinear(lora.Linear):
    """A linear layer with named adapters of which one, or none, is active."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        (name,) = active
        dropout = self.lora_dropout[name]
        dropout.train(torch.is_grad_enabled())
        if name in self.lora_variant or (dropout.training and isinstance(dropout, nn.Dropout)):
            return super().forward(x, *args, **kwargs)  # DoRA, dropout
        base = self.base_layer
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        return _LoraProduct.apply(x.flatten(0, -2), base.weight, base.bias, a, b, scale).unflatten(0, x.shape[:-1])
