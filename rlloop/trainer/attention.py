"""Exact causal attention for packed microbatches whose segments share prefixes (see `rlloop.batching`), for transformers.

Importing this module registers the attention implementation `rlloop_packed`; a model that uses it is called with
`packed_layout=PackedLayout(...)` and builds no [T, T] mask. Everything outside attention works on the T packed tokens.
Inside, segments of like lengths are padded to one length and attended as a batch: one for those without a prefix, and
one whose keys are [prefix; own tokens]. Keys and values of a prefix are computed once and read by each of its segments,
so their gradients are the sums over those.

Shapes: T tokens, R rows (segments) of one batch, L its padded length, P its longest prefix, H / K query / key-value
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from rlloop.batching import IndexArray, Microbatch
from rlloop.errors import TrainerError

IMPLEMENTATION = "rlloop_packed"
_LONGEST_PLAIN = 512
"""Keys up to which, on a CPU, two matrix products beat torch's flash kernel (5x with backward at 64 keys in bf16; at
1,024 they lose, and the probabilities that they keep for the backward pass would fill the memory)."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Segments of like length, with or without prefixes, that are attended as one batch."""

    shape: tuple[int, int]
    """(R, L)"""
    prefix_tokens: Tensor | None
    """[distinct prefixes * P] packed index of each padded slot of the prefixes."""
    prefix_slots: Tensor
    """Which of those slots are real ..."""
    prefix_targets: Tensor
    """... and the packed index of the token that each of them holds."""
    prefix_of_row: Tensor
    """[R] index into the distinct prefixes."""
    longest_prefix: int
    """P"""
    mask: Tensor | None
    """[R, 1, L, P + L] 0 or -inf, added to the scores; None where the kernel knows the causal mask itself."""


class PackedLayout:
    """Where each packed token sits in the padded batches. Built once a microbatch, used by every layer.

    `dtype` is that of queries and keys."""

    def __init__(self, microbatch: Microbatch, *, device: torch.device, dtype: torch.dtype) -> None:
        self.num_tokens = len(microbatch.tokens)
        self.rows: list[_Rows] = []
        slots, padded = np.empty(self.num_tokens, dtype=np.int64), 0
        own: list[IndexArray] = []
        for segments in _like_lengths(microbatch):
            tokens, real = _pad(microbatch.segment_starts[segments], microbatch.segment_lengths[segments])
            slots[tokens[real]] = padded + np.flatnonzero(real)
            padded += tokens.size
            own.append(tokens.ravel())
            self.rows.append(_make_rows(microbatch, segments, tokens.shape, device, dtype))
        self.tokens = torch.from_numpy(np.concatenate(own)).to(device)
        """[padded slots] packed index of the token in each slot, 0 where there is none."""
        self.slots = torch.from_numpy(slots).to(device)
        """[T] slot of each packed token."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [T, H, D], key and value [T, K, D] -> [T, H, D]."""
        head_size = query.shape[2]
        keys, values = key.flatten(1), value.flatten(1)
        outputs = []
        padded = (self.pad(tensor) for tensor in (query.flatten(1), keys, values))
        for rows, row_queries, *own in zip(self.rows, *padded, strict=True):
            row_keys, row_values = own
            if rows.prefix_tokens is not None:
                row_keys, row_values = (
                    torch.cat([_prefix_rows(tensor, rows), rest], dim=1)
                    for tensor, rest in ((keys, row_keys), (values, row_values))
                )
            q, k, v = (t.unflatten(2, (-1, head_size)).transpose(1, 2) for t in (row_queries, row_keys, row_values))
            outputs.append(_attend(q, k, v, rows.mask, scale).transpose(1, 2).flatten(2))
        return self.pack(outputs).view(query.shape)

    def pad(self, packed: Tensor) -> list[Tensor]:
        """[T, C] -> [R, L, C] for each batch."""
        padded = _Pad.apply(packed, self.tokens, self.slots)
        parts = padded.split([rows.shape[0] * rows.shape[1] for rows in self.rows])
        return [part.unflatten(0, rows.shape) for part, rows in zip(parts, self.rows, strict=True)]

    def pack(self, padded: list[Tensor]) -> Tensor:
        """[R, L, C] for each batch -> [T, C]."""
        return _Pack.apply(torch.cat([part.flatten(0, 1) for part in padded]), self.slots)


def _like_lengths(microbatch: Microbatch) -> list[IndexArray]:
    """Segments in batches by whether they have a prefix; the shortest of a batch is more than half of its longest."""
    batches: list[list[int]] = []
    with_prefix, lengths = microbatch.segment_prefixes >= 0, microbatch.segment_lengths
    for segment in np.lexsort((-lengths, with_prefix)):
        longest = batches[-1][0] if batches else None
        if longest is None or with_prefix[longest] != with_prefix[segment] or lengths[segment] * 2 <= lengths[longest]:
            batches.append([])
        batches[-1].append(int(segment))
    return [np.array(batch) for batch in batches]


def _pad(starts: IndexArray, lengths: IndexArray) -> tuple[IndexArray, NDArray[np.bool_]]:
    """-> packed index [R, L] of each padded slot, 0 where there is none; and which slots are real."""
    offsets = np.arange(lengths.max())
    real = offsets < lengths[:, None]
    return np.where(real, starts[:, None] + offsets, 0), real


def _make_rows(
    microbatch: Microbatch, segments: IndexArray, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> _Rows:
    num_rows, length = shape
    prefixes, prefix_of_row = np.unique(microbatch.segment_prefixes[segments], return_inverse=True)
    has_prefix = bool(prefixes[0] >= 0)
    tokens, real = np.empty((1, 0), dtype=np.int64), np.empty((1, 0), dtype=np.bool_)
    if has_prefix:
        tokens, real = _pad(microbatch.segment_starts[prefixes], microbatch.segment_lengths[prefixes])
    longest_prefix = tokens.shape[1]
    mask = None
    if has_prefix or _is_plain(device, length):
        hidden = np.empty((num_rows, length, longest_prefix + length), dtype=np.bool_)
        hidden[:, :, :longest_prefix] = ~real[prefix_of_row.ravel(), None, :]
        hidden[:, :, longest_prefix:] = np.triu(np.ones((length, length), dtype=np.bool_), 1)
        hidden_on_device = torch.from_numpy(hidden).to(device)[:, None]
        mask = torch.zeros(hidden_on_device.shape, dtype=dtype, device=device).masked_fill_(
            hidden_on_device, -torch.inf
        )
    return _Rows(
        shape=(num_rows, length),
        prefix_tokens=torch.from_numpy(tokens.ravel()).to(device) if has_prefix else None,
        prefix_slots=torch.from_numpy(np.flatnonzero(real)).to(device),
        prefix_targets=torch.from_numpy(tokens[real]).to(device),
        prefix_of_row=torch.from_numpy(prefix_of_row.ravel()).to(device),
        longest_prefix=longest_prefix,
        mask=mask,
    )


def _is_plain(device: torch.device, num_keys: int) -> bool:
    return device.type == "cpu" and num_keys <= _LONGEST_PLAIN


class _Pad(torch.autograd.Function):
    """Padded slots are never seen by real tokens, so their gradient is zero and the backward pass is a plain gather
    (index_select's own would add row by row)."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return packed.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, d_padded: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return d_padded.index_select(0, slots), None, None


class _Pack(torch.autograd.Function):
    """Backward, the padded slots get zeros."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_slots = len(padded)
        return padded.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, d_packed: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return d_packed.new_zeros(ctx.num_slots, d_packed.shape[1]).index_copy_(0, slots, d_packed), None


class _PadPrefixes(torch.autograd.Function):
    """[T, C] -> [padded slots, C]. Backward, tokens that are in no prefix get zeros."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, tokens: Tensor, slots: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(slots, targets)
        ctx.num_tokens = len(packed)
        return packed.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, d_padded: Tensor) -> tuple[Tensor, None, None, None]:
        slots, targets = ctx.saved_tensors
        d_packed = d_padded.new_zeros(ctx.num_tokens, d_padded.shape[1])
        return d_packed.index_copy_(0, targets, d_padded.index_select(0, slots)), None, None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: PackedLayout,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D].

    Raises TrainerError for attention that is more than causal (softcapping, sinks, a sliding window shorter than the
    microbatch).
    """
    for feature in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise TrainerError(f"{type(module).__name__} uses {feature}, which packed attention does not support")
    window = kwargs.get("sliding_window")
    if window is not None and window < packed_layout.num_tokens:
        raise TrainerError(
            f"{type(module).__name__} has a sliding window of {window} tokens; packed attention supports it only for "
            f"microbatches that are shorter, got {packed_layout.num_tokens}: lower trainer.max_tokens_per_microbatch"
        )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return packed_layout.attend(query, key, value, scale)[None], None


def _prefix_rows(packed: Tensor, rows: _Rows) -> Tensor:
    """[T, C] -> [R, P, C]: each row's prefix."""
    prefixes = _PadPrefixes.apply(packed, rows.prefix_tokens, rows.prefix_slots, rows.prefix_targets)
    return prefixes.unflatten(0, (-1, rows.longest_prefix)).index_select(0, rows.prefix_of_row)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [R, H, L, D], key and value [R, K, P + L, D] -> [R, H, L, D]; without a mask, causal."""
    num_groups = query.shape[1] // key.shape[1]
    if mask is not None and _is_plain(query.device, key.shape[2]):
        # Query heads that share a key-value head are, to it, so many more queries: nothing is repeated.
        stacked = query.reshape(len(query), key.shape[1], -1, query.shape[3])
        scores = (stacked @ key.transpose(-1, -2)).mul_(scale).unflatten(2, (num_groups, -1)).add_(mask[:, :, None])
        return (scores.flatten(2, 3).softmax(-1) @ value).view(query.shape)
    # With a mask, torch's fused kernels want as many key-value heads as query heads.
    key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
# No mask function is registered, so transformers makes no mask.
