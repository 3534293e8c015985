"""The backward passes that FastLayer writes by hand, against autograd through their forward functions.

A program of its own, for what Megatron needs on a CPU changes its whole process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlloop.trainer.megatron.layer import _Norm, _SplitAndRotate, _SwiGLU, add_norm, split_and_rotate, swiglu

T, K, H, D = 7, 2, 6, 8


def check(found: Sequence[Tensor], expected: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Outputs, and gradients of a random combination of them."""
    weights = [torch.randn_like(output) for output in expected]
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)
    gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in (found, expected)]
    for got, right in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-5)


def check_split_and_rotate(num_rotated: int) -> None:
    grouped = torch.randn(T, K, H // K + 2, D, requires_grad=True)
    angles = torch.randn(T, num_rotated // 2)
    rotation = angles.cos(), angles.sin()
    expected = split_and_rotate(grouped, *rotation, None, None, 0.0)
    check(_SplitAndRotate.apply(grouped, *rotation), expected, [grouped])


def check_add_norm() -> None:
    x, y = torch.randn(2, T, D, requires_grad=True).unbind()
    weight = torch.rand(D)
    check(_Norm.apply(x, y, weight, 1e-5), add_norm(x, y, weight, 1e-5), [x, y])


def check_swiglu() -> None:
    x = torch.randn(T, 2 * D, requires_grad=True)
    check([_SwiGLU.apply(x)], [swiglu(x)], [x])


if __name__ == "__main__":
    torch.manual_seed(0)
    for num_rotated in (D, D // 2):
        check_split_and_rotate(num_rotated)
    check_add_norm()
    check_swiglu()
