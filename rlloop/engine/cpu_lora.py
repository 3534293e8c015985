"""LoRA on vLLM's CPU back end, as one matrix product for each adapter in the batch.

vLLM 0.32 copies A and B for every token, in float32, and multiplies vector by vector: with rank 16 a prompt of 45 tokens costs
more in its adapter than in its model. A batch rarely has more than a few policy versions, so the tokens of each are taken
together instead. Same results, but for the order of sums, and in bfloat16 a product with A that is rounded once more;
`benchmarks/cpu_lora.py` has the gain.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Replace the products of vLLM's CPU wrapper, in a worker, before the first request with an adapter. Idempotent."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if PunicaWrapperCPU._apply_shrink is not _apply_shrink:
        PunicaWrapperCPU._update_base_metadata = _and_groups(PunicaWrapperCPU._update_base_metadata)
        PunicaWrapperCPU._apply_shrink = _apply_shrink
        PunicaWrapperCPU._apply_expand = _apply_expand
        PunicaWrapperCPU.add_lora_logits = _add_lora_logits


def _and_groups(update_base_metadata: Any) -> Any:
    """vLLM calls it when the batch's adapters change, which is the time to sort the tokens by slot."""

    def update(self: Any, *arguments: Any, **named: Any) -> None:
        update_base_metadata(self, *arguments, **named)
        self.rlloop_groups = _groups(self.token_lora_indices)

    return update


def _groups(indices: torch.Tensor) -> list[tuple[int, Any]]:
    """Slot and rows of each adapter in the batch; -1 is none."""
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [(slot, slice(None)) for slot in slots if slot >= 0]
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def _apply_shrink(self: Any, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
    """y[tokens, rank] = scale * x[tokens, in] @ A[slot]^T"""
    for slot, rows in self.rlloop_groups:
        a = w_t_all[slot].squeeze(0)
        y[rows] = (x[rows] @ a.t()).to(y.dtype) * scale


def _apply_expand(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    w_t_all: torch.Tensor,
    y_offset: int,
    y_slice_size: int,
    add_inputs: bool = True,
) -> None:
    """y[tokens, slice] += x[tokens, rank] @ B[slot]^T"""
    part = y[:, y_offset : y_offset + y_slice_size]
    for slot, rows in self.rlloop_groups:
        b = w_t_all[slot].squeeze(0)
        product = x[rows].to(b.dtype) @ b.t()
        if not add_inputs:
            part[rows] = product
        elif isinstance(rows, slice):
            part += product
        else:
            part.index_add_(0, rows, product)


def _add_lora_logits(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
    **_: Any,
) -> None:
    """y[samples, vocabulary] += scale * x @ A[slot]^T @ B[slot]^T, where the adapter has the head at all: it rarely does."""
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for slot, rows in _groups(self.sampler_indices):
        a, b = lora_a_stacked[slot].squeeze(0), lora_b_stacked[slot].squeeze(0)
        if a.any():
            y[rows, : b.shape[0]] += (x[rows] @ a.t() @ b.t()).to(y.dtype) * scale
