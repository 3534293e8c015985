"""Causal attention for packed microbatches on a GPU, in one FlashAttention call (Dao 2023), prefixes shared.

Each segment of `rlloop.batching` is one sequence of queries whose keys are [its prefix; itself]. FlashAttention aligns the
causal mask to the last key, which is just that. Without prefixes, keys and values are read where they lie; with them they
are gathered, so that a prefix stands before each of its segments.

Shapes: T tokens, S segments, U keys, H / K query / key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlloop.batching import IndexArray, Microbatch
from rlloop.trainer.tokens import to_device


@dataclass(frozen=True, slots=True)
class FlashLayout:
    """Where each segment's queries and keys lie. Built once a microbatch, used by every layer."""

    query_ends: Tensor
    """[S + 1] int32"""
    key_ends: Tensor
    """[S + 1] int32"""
    key_index: Tensor | None
    """[U] the packed token of each key; entries from the last of `key_ends` on are not keys. None: the tokens in order."""
    longest: int
    """At least as many keys as any segment has."""

    @staticmethod
    def of(microbatch: Microbatch, device: torch.device) -> FlashLayout:
        """The layout of a microbatch."""
        num_keys = count_keys(microbatch)
        query_ends = to_device(ends(microbatch.segment_lengths), device)
        if (microbatch.segment_prefixes < 0).all():
            return FlashLayout(query_ends, query_ends, None, int(num_keys.max()))
        key_ends, key_index = to_device(ends(num_keys), device), to_device(index_keys(microbatch), device)
        return FlashLayout(query_ends, key_ends, key_index, int(num_keys.max()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [T, H, D], key and value [T, K, D], in half precision -> [T, H, D]."""
        if self.key_index is not None:
            key, value = (_Gather.apply(tensor, self.key_index, self.key_ends) for tensor in (key, value))
        # torch's own varlen_attn hides two things that this has: fewer key heads than query heads, and the scale.
        forward = torch.ops.aten._flash_attention_forward
        ends, longest = (self.query_ends, self.key_ends), (self.longest, self.longest)
        out: Tensor = forward(query, key, value, *ends, *longest, 0.0, True, False, scale=scale)[0]
        return out


class _Gather(torch.autograd.Function):
    """[T, K, D] -> [U, K, D]. FlashAttention leaves the gradient of what is not a key as it found the memory."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, index: Tensor, key_ends: Tensor) -> Tensor:
        ctx.save_for_backward(index, key_ends)
        ctx.num_tokens, ctx.dtype = len(packed), packed.dtype
        return packed.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, d_keys: Tensor) -> tuple[Tensor, None, None]:
        index, key_ends = ctx.saved_tensors
        is_key = torch.arange(len(index), device=index.device) < key_ends[-1]
        d_keys = torch.where(is_key[:, None, None], d_keys, 0).float()  # a prefix has many summands
        d_packed = d_keys.new_zeros(ctx.num_tokens, *d_keys.shape[1:]).index_add_(0, index, d_keys)
        return d_packed.to(ctx.dtype), None, None


def ends(lengths: IndexArray | list[int]) -> NDArray[np.int32]:
    """[S] -> [S + 1] where each one ends, after a zero."""
    return np.cumsum([0, *lengths], dtype=np.int32)


def count_keys(microbatch: Microbatch) -> IndexArray:
    """[S] of each segment, its prefix's included."""
    lengths, prefixes = microbatch.segment_lengths, microbatch.segment_prefixes
    return lengths + np.where(prefixes >= 0, lengths[prefixes], 0)


def index_keys(microbatch: Microbatch) -> IndexArray:
    """[U] the packed token of each key, segment by segment."""
    starts, lengths = microbatch.segment_starts, microbatch.segment_lengths
    spans = [
        np.arange(starts[segment], starts[segment] + lengths[segment])
        for own, prefix in enumerate(microbatch.segment_prefixes)
        for segment in ((prefix, own) if prefix >= 0 else (own,))
    ]
    return np.concatenate(spans)
